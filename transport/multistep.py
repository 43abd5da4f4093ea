"""Multistep solvers: one evaluation of the model a step, and past evaluations with weights that are exact integrals.

Every step is linear in a state x and in evaluations f_j (N, ...), made at times s_j:
    x(end) = other(end) / other(t) x(t) + sum_j c_j f_j,    c_j = integral of L_j dM from t to end,
where M(s) = signal(s) other(end) / other(s), and L_j are the Lagrange polynomials of the s_j in some variable:

    Adams-Bashforth methods                 f: velocity          signal: t        other: 1
    exponential integrators, to data        f: predicted data    signal: alpha    other: sigma
    exponential integrators, to noise       f: predicted noise   signal: sigma    other: alpha

With x = alpha D + sigma E, x / sigma changes by the integral of D d(alpha / sigma), and x / alpha by that of
E d(sigma / alpha) (Lu et al. 2022, "DPM-Solver++", proposition 4.1, for any path). Towards data the first has no
singularity where alpha = 0, and the limit x = D where sigma = 0; towards noise it is the other way round. So no end of
a path needs an eps, and the direction of time decides which of the two is integrated.

A variable is a function (path, t) -> (u, du/dt). That of the papers is lambda = log(alpha / sigma), infinite at both
ends of a path: solvers in lambda have their full order only on grids that keep off the ends. `angle` is smooth on the
whole of every path.

To add a solver, write a subclass of `Multistep` and give it a row in integrators.py."""

import math

import torch

# Nodes and weights on [0, 1] of the tanh-sinh rule (Takahasi and Mori 1974), which is accurate for functions that are
# steep at an end, as alpha / sigma and w / sigma^2 are.
_U = torch.arange(-28, 29, dtype=torch.float64) / 10
NODES = torch.sigmoid(math.pi * torch.sinh(_U))
WEIGHTS = torch.cosh(_U) * NODES * (1 - NODES)
WEIGHTS = WEIGHTS / WEIGHTS.sum()

NEAREST = 1 / 30  # of a step: of two evaluations that are nearer to each other, the earlier is left out


def time(path, t):
    return t, torch.ones_like(t)


def angle(path, t):
    """Return the angle of the point (sigma, alpha): on every path, the time of a GVP path but for a factor."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    return torch.atan2(alpha, sigma), path.wronskian(t) / (alpha**2 + sigma**2)


def log_snr(path, t):
    """Return lambda = log(alpha / sigma)."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    return torch.log(alpha / sigma), path.wronskian(t) / (alpha * sigma)


def of_velocity(path, to_data):
    """Return signal, other, and the evaluation from (velocity, x, t), for Adams-Bashforth methods."""
    return (lambda t: t), torch.ones_like, lambda velocity, x, t: velocity


def of_data_or_noise(path, to_data):
    """Return the same for exponential integrators; `to_data` is the direction of time."""
    if to_data:
        return path.alpha, path.sigma, path.velocity_to_data
    return path.sigma, path.alpha, path.velocity_to_noise


class Multistep:
    """What the solvers share: the states and evaluations of past steps, and the weights of a step.

    A solver is a subclass whose `step(i)` returns the state at index i + 1 of the grid. The grid is read once, and all
    weights are computed from it in float64 on the CPU, so that no step waits for another device."""

    order = None  # see `of_order`
    roles = staticmethod(of_data_or_noise)
    variable = staticmethod(angle)

    def __init__(self, path, times):
        self.path, self.times = path, times.cpu().double()
        self.u = self.variable(path, self.times)[0]
        self.signal, self.other, self.evaluation = self.roles(path, bool(self.times[-1] > self.times[0]))
        self.index, self.states, self.evaluations = -1, {}, {}  # both by the index of their time

    def __call__(self, velocity, x, t, dt):
        self.remember(velocity(x, t), x, t)
        return self.step(self.index)

    def remember(self, velocity, x, t):
        self.index += 1
        self.states[self.index] = x
        self.evaluations[self.index] = self.evaluation(velocity, x, t).to(x.dtype)

    def advance(self, base, end, nodes):
        """Return the state at index `end` from the state at index `base` and the evaluations at indices `nodes`.

        Forget all others. To extrapolate far from evaluations close to each other would be to extrapolate errors."""
        u, kept = self.u, []
        near = NEAREST * (u[end] - u[base]).abs()
        for i in reversed(nodes):
            if i in self.evaluations and all((u[i] - u[j]).abs() >= near or near.isinf() for j in kept):
                kept.insert(0, i)
        self.evaluations = {i: self.evaluations[i] for i in kept}
        self.states = {base: self.states[base]}
        t, end = self.times[base], self.times[end]
        weights = self.weights(self.times[kept], t, end).tolist()
        change = sum(c * f for c, f in zip(weights, self.evaluations.values(), strict=True))
        return self.states[base] * self.decay(t, end).item() + change

    def decay(self, s, end):
        """Return how much of a state at times s is left in that at `end`."""
        return self.other(end) / self.other(s) if self.other(end) > 0 else torch.zeros_like(s)

    def weights(self, nodes, t, end):
        """Return c_j (J,) for 0-D times and nodes (J,): those that integrate all powers of the variable below J."""
        start = self.variable(self.path, t)[0]
        scale = self.variable(self.path, end)[0] - start
        if scale == 0:  # a step too short for the variable's last digit
            return torch.zeros_like(nodes)
        s = t + (end - t) * NODES
        u, du = self.variable(self.path, s)
        powers = torch.arange(len(nodes), dtype=torch.float64)[:, None]
        # By parts, with u from 0 to 1: [u^k M] - integral of M d(u^k). M is 0 before an end where `other` is.
        slopes = powers * ((u - start) / scale) ** (powers - 1).clamp(0) * du * (end - t) / scale
        moments = self.signal(end) - (WEIGHTS * self.signal(s) * self.decay(s, end) * slopes).sum(1)
        moments[0] -= self.signal(t) * self.decay(t, end)
        return torch.linalg.solve(((self.variable(self.path, nodes)[0] - start) / scale) ** powers, moments)


class Explicit(Multistep):
    """A step from the latest `order` evaluations, 2 to 4, with a start from fewer.

    If the first steps were of lower orders, the solve would be of order 2, whatever comes after. So early states are
    integrated anew from the first one, over all evaluations so far, whose errors count there times the length of a
    step: each state gains an order. For order 4, the second evaluation, at the end of an Euler step, is left out as
    soon as there is a third.

    With order 3 and the predicted data, this is `dpmpp_3m`. It differs from the multistep formula of order 3 in
    diffusers by the start, by the variable, and by the second derivative of D, of which that takes half, so that its
    measured order is 2, from an exact start, too."""

    def step(self, i):
        nodes = [0, *range(2 if self.order > 3 and i > 1 else 1, i + 1)][-self.order :]
        return self.advance(0 if i < self.order else i, i + 1, nodes)


class AdamsBashforth(Explicit):
    """The explicit Adams method for variable steps (Hairer, Norsett and Wanner 1993, section III.5)."""

    roles = staticmethod(of_velocity)
    variable = staticmethod(time)


class LogSNR(Multistep):
    """The weights of DPM-Solver++ and UniPC, whose variable is lambda = log(alpha / sigma)."""

    variable = staticmethod(log_snr)

    def order_at(self, i):
        """Return the order of the step from index i: lower at the start, and before an end that is far off in lambda.

        A polynomial in lambda that is extrapolated over more than 1 is far off the data prediction, which converges."""
        length = (self.u[-1] - self.u[-2]).abs()
        return min(self.order, i + 1, len(self.times) - 1 - i if length > 1 else self.order)

    def weights(self, nodes, t, end):
        """Return c_j that integrate a polynomial in lambda exactly; two nodes take its slope at half the step.

        Where a lambda is infinite, these are the limits: an evaluation there counts in no step but the one that begins
        there; that step, and one that ends there, extrapolates from no other evaluation."""
        lam, start = (self.variable(self.path, s)[0] for s in (nodes, t))
        distance = (lam - start) / (self.variable(self.path, end)[0] - start)
        distance[nodes == end] = 1
        others = (nodes != t) & (distance != 0) & torch.isfinite(distance)
        if len(nodes) > 2 and others.any():
            weights = torch.zeros_like(nodes)
            weights[others | (nodes == t)] = super().weights(nodes[others | (nodes == t)], t, end)
            return weights
        total = self.signal(end) - self.signal(t) * self.decay(t, end)
        weights = torch.where(others, 0.5 * total / distance, 0)
        return torch.where(nodes == t, total - weights.sum(), weights)


class DPMSolver2M(LogSNR):
    """DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2).

    From one end of a path to the other its error falls with the squared step times the logarithm of the steps."""

    order = 2

    def step(self, i):
        return self.advance(i, i + 1, [*range(i + 1 - self.order_at(i), i + 1)])


class UniPC(LogSNR):
    """UniPC (Zhao et al. 2023, algorithms 1 and 2) on the data prediction with their B_2(h) = exp(h) - 1.

    The corrector of a step needs the evaluation at its end, which the next step makes anyway and then begins from the
    corrected state. So its order is `order` + 1; from one end of a path to the other, where lambda is infinite, it is
    2. The last step has no corrector."""

    def step(self, i):
        if i:
            self.states[i] = self.advance(i - 1, i, [*range(i - self.order_at(i - 1), i + 1)])
        return self.advance(i, i + 1, [*range(i + 1 - self.order_at(i), i + 1)])


class Stochastic(Multistep):
    """The integrator for the SDE dx = (velocity + w score) dt + sqrt(2 w) dW, with any w, from noise to data.

    With tau the integral of w / sigma^2, x / sigma exp(tau) changes by the integral of D exp(tau) d(alpha / sigma),
    D exp(tau) alpha / sigma d(tau) and noise: M above has the factor exp(tau(s) - tau(end)) in addition, and the noise
    of a step the variance sigma(end)^2 (1 - exp(2 tau(t) - 2 tau(end))). The SBDM form, whose tau is lambda, gives the
    stochastic DPM-Solver++ of Lu et al. 2022. Their weak order is 1.

    An evaluation says nothing of the next step once noise has replaced most of the state: to extrapolate from it would
    add noise, and more in each step. It is dropped from a tau of 1 on."""

    def __call__(self, drift, diffusion, x, t, dt, noise, end_is_singular):
        path = self.path
        # drift = velocity + w score, where score = (alpha velocity - d_alpha x) / (sigma wronskian)
        speed, w = path.sigma_wronskian(t), diffusion(t)
        velocity = (speed * drift(x, t) + w * path.d_alpha(t) * x) / (speed + w * path.alpha(t))
        self.remember(velocity, x, t)
        self.diffusion = diffusion
        return self.step(self.index, noise)

    def step(self, i, noise):
        t, end = self.times[i], self.times[i + 1]
        latest = range(max(0, i + 1 - self.order), i + 1)
        nodes = [j for j in latest if self.tau(self.times[j], t) < 1]
        variance = self.path.sigma(end) ** 2 - (self.path.sigma(t) * self.decay(t, end)) ** 2
        return self.advance(i, i + 1, nodes) + variance.clamp(min=0).sqrt().item() * noise

    def tau(self, s, end):
        """Return the integral of w / sigma^2 from times s to `end`, like s."""
        length = (end - s)[..., None]
        times = s[..., None] + length * NODES
        return (length * WEIGHTS * self.diffusion(times) / self.path.sigma(times) ** 2).sum(-1)

    def decay(self, s, end):
        return super().decay(s, end) * torch.exp(-self.tau(s, end)) if self.other(end) > 0 else torch.zeros_like(s)


def of_order(solver, order):
    """Return the class `solver` at an order."""
    return type(f"{solver.__name__}{order}", (solver,), {"order": order})
