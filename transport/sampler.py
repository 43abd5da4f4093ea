"""Samplers: a transport, a solver and a time grid make an ODE, an SDE or a likelihood."""

import math

import torch

from .integrators import ODE_METHODS, SDE_METHODS, ode_integrate, sde_integrate
from .path import DIFFUSION_FORMS, check_choice
from .time_grids import check_grid, given_ends, make_times

LAST_STEPS = (None, "Mean", "Tweedie", "Euler")


class Sampler:
    """Makes sampling functions for one transport.

    Each method returns a function `fn(x, model, **model_kwargs)` of the initial state x (N, ...), float32 or float64 on
    any device, and a model as `Transport` describes it. Sampling needs no gradients and records none. `fn.nfe` is the
    number of evaluations of the model per solve; None where the solver decides as it goes.

    Args of the methods:
        sampling_method: a name in `ODE_METHODS` or `SDE_METHODS`.
        num_steps: time points, both ends included; adaptive methods choose their own steps.
        time_grid: a name in `TIME_GRIDS`, or a sequence of increasing times in [0, 1], used as they are in place of the
            transport's interval; `num_steps` is then their number. Adaptive methods use the two ends.
        time_shift: above 1, more points of the uniform grid lie near the noise; see `shifted`.
        atol, rtol: tolerances of the adaptive methods. The error is measured as its root mean square over the whole
            batch, so their steps, and within the tolerances the result, depend on what else is in the batch.
        trajectory: return every state, (S, N, ...), not the end state alone, (1, N, ...). `fn(...)[-1]` is the end
            state either way.

    Raises ValueError for settings out of range, and for a `sample_eps` that leaves the drift singular."""

    def __init__(self, transport):
        self.transport = transport

    def sample_ode(
        self,
        *,
        sampling_method="dopri5",
        num_steps=50,
        atol=1e-6,
        rtol=1e-3,
        reverse=False,
        time_grid="uniform",
        time_shift=1.0,
        trajectory=False,
    ):
        """Sample by the probability-flow ODE dx/dt = velocity(x, t). With `trajectory`, S = num_steps.

        `reverse` integrates from data to noise, over the same interval."""
        num_steps = check_grid(time_grid, num_steps, time_shift)
        t0, t1 = self._ode_interval(sampling_method, time_grid)
        solver = dict(method=sampling_method, atol=atol, rtol=rtol, path=self.transport.path, trajectory=trajectory)

        @torch.no_grad()
        def sample(x, model, **model_kwargs):
            times = make_times(time_grid, self.transport.path, t0, t1, num_steps, x, time_shift)
            times = times.flip(0) if reverse else times
            states = ode_integrate(self._drift(model, model_kwargs), x, times, **solver)
            return states if trajectory else states[-1:].clone()  # a view would keep the initial state alive

        sample.nfe = _nfe(ODE_METHODS[sampling_method], num_steps)
        return sample

    def sample_sde(
        self,
        *,
        sampling_method="Euler",
        diffusion_form="SBDM",
        diffusion_norm=1.0,
        last_step="Mean",
        last_step_size=0.04,
        num_steps=250,
        time_grid="uniform",
        time_shift=1.0,
        trajectory=False,
        randn_like=torch.randn_like,
    ):
        """Sample by the SDE dx = (velocity + w score) dt + sqrt(2 w) dW, from noise to data.

        With `trajectory`, S = num_steps, and one more for the last step, which comes on top of `num_steps`.

        Args:
            diffusion_form, diffusion_norm: the shape and scale of w; see `Path.diffusion`.
            last_step: how to get from t = 1 - last_step_size to 1, where the score is singular; see `_last_step`. None:
                the SDE is integrated to the end of the interval and stops there.
            last_step_size: in (0, 1). A larger `sample_eps` that was given takes its place. From a sequence of times,
                the last step goes from the last of them to 1.
            randn_like: draws the noise of a step in the shape of its argument."""
        check_choice("sampling method", sampling_method, SDE_METHODS)
        num_steps = check_grid(time_grid, num_steps, time_shift)
        t0, t1, singular = self._sde_interval(diffusion_form, diffusion_norm, last_step, last_step_size, time_grid)
        solver = dict(method=sampling_method, path=self.transport.path, randn_like=randn_like, end_is_singular=singular)

        def diffusion(t):
            return self.transport.path.diffusion(t, diffusion_form, diffusion_norm)

        @torch.no_grad()
        def sample(x, model, **model_kwargs):
            drift = self._drift(model, model_kwargs, diffusion)
            times = make_times(time_grid, self.transport.path, t0, t1, num_steps, x, time_shift)
            states = [x]
            for state in sde_integrate(drift, diffusion, x, times, **solver):
                states = [*states, state] if trajectory else [state]
            if last_step is not None:
                state = self._last_step(last_step, drift, states[-1], times[-1], model, model_kwargs)
                states = [*states, state] if trajectory else [state]
            return torch.stack(states)

        sample.nfe = _nfe(SDE_METHODS[sampling_method], num_steps, singular, last_step is not None)
        return sample

    def sample_ode_likelihood(
        self, *, sampling_method="dopri5", num_steps=50, atol=1e-6, rtol=1e-3, num_probes=1, probe_like=None
    ):
        """Compute log p(x) by the instantaneous change of variables (Chen et al. 2018; Song et al. 2021, eq. 39).

        The divergence is Hutchinson's estimate with Rademacher probes, drawn once per solve, so that the adaptive
        solvers integrate a smooth function.

        Args:
            num_probes: probes per sample, over which the estimate is averaged; each costs a backward pass per NFE.
            probe_like: draws one probe in the shape of its argument; None: -1 or 1 from PyTorch's global generator.

        `fn` returns (logp, z): log p(x) (N,) in nats, summed over all dimensions, and the noise (N, ...) that x is
        carried to, without gradients. It works in any grad mode, in inference mode for parameters not made in it."""
        check_grid("uniform", num_steps)
        t0, t1 = self._ode_interval(sampling_method)
        if num_probes < 1 or num_probes != int(num_probes):
            raise ValueError(f"num_probes must be an integer of 1 or more, not {num_probes}")
        solver = dict(method=sampling_method, atol=atol, rtol=rtol, path=self.transport.path)

        # Tensors made in inference mode can never enter a graph, so it is left, and what was made in it is copied.
        @torch.inference_mode(False)
        @torch.no_grad()
        def log_likelihood(x, model, **model_kwargs):
            x = _usable_by_autograd(x)
            model_kwargs = {key: _usable_by_autograd(value) for key, value in model_kwargs.items()}
            velocity = self._drift(model, model_kwargs)
            probes = [(probe_like or _rademacher_like)(x) for _ in range(num_probes)]

            def velocity_and_divergence(state, t):
                return _with_divergence(velocity, state[0], t, probes)

            times = make_times("uniform", self.transport.path, t0, t1, num_steps, x).flip(0)
            z, change = ode_integrate(velocity_and_divergence, (x, x.new_zeros(len(x))), times, **solver)
            return self.transport.prior_logp(z[-1]) + change[-1], z[-1]

        log_likelihood.nfe = _nfe(ODE_METHODS[sampling_method], num_steps)
        return log_likelihood

    def _ode_interval(self, sampling_method, time_grid="uniform"):
        """Check an ODE's settings and return the interval (t0, t1) over which it is integrated."""
        check_choice("sampling method", sampling_method, ODE_METHODS)
        given = given_ends(time_grid)
        t0, t1 = given or self.transport.ode_interval()
        self._check_regular([t0, t1], given=given)
        return t0, t1

    def _sde_interval(self, diffusion_form, diffusion_norm, last_step, last_step_size, time_grid):
        """Check an SDE's settings and return its interval t0, t1, and whether its end must not be evaluated."""
        check_choice("diffusion form", diffusion_form, DIFFUSION_FORMS)
        check_choice("last step", last_step, LAST_STEPS)
        if not 0 <= diffusion_norm < math.inf:
            raise ValueError(f"diffusion norm must be a number of 0 or more, not {diffusion_norm}")
        if last_step is not None and not 0 < last_step_size < 1:
            raise ValueError(f"last step size must lie between 0 and 1, not {last_step_size}")
        given = given_ends(time_grid)
        t0, t1 = given or self.transport.sde_interval(diffusion_form, 0.0 if last_step is None else last_step_size)
        if given and last_step is not None and t1 == 1:
            raise ValueError("the time grid ends at 1, where the last step leads: end it before, or take no last step")
        if t0 >= t1:
            raise ValueError(f"last step size {last_step_size} leaves nothing of the interval that begins at {t0}")
        singular = last_step is None and t1 == 1
        self._check_regular([t0] if singular else [t0, t1], diffusion_form, given)
        return t0, t1, singular

    def _check_regular(self, ends, diffusion_form=None, given=None):
        """Raise ValueError where the drift is singular at an end, as a sample_eps or times that were given can be."""
        for t in ends:
            if not self.transport.is_regular(t, diffusion_form):
                form = "" if diffusion_form is None else f" with the diffusion form {diffusion_form!r}"
                culprit = "the time grid" if given else f"sample_eps = {self.transport.sample_eps}"
                advice = "keep away from it" if given else "use one above 0"
                raise ValueError(
                    f"{culprit} evaluates the drift at t = {t:g}, where it is singular "
                    f"for prediction {self.transport.prediction!r}{form} on this path; {advice}, such as 1e-3"
                )

    def _drift(self, model, model_kwargs, diffusion=None):
        """Return velocity(x, t), or velocity + diffusion(t) score, as a function of x (N, ...) and a 0-D time."""

        def drift(x, t):
            t_batch = _per_sample(t, x)
            output = model(x, t_batch, **model_kwargs)
            velocity = self.transport.velocity(output, x, t_batch)
            if diffusion is None:
                return velocity
            return velocity + diffusion(t).to(x.dtype) * self.transport.score(output, x, t_batch)

        return drift

    def _last_step(self, kind, drift, x, t, model, model_kwargs):
        """Go from time t to 1 in one step without noise and one NFE.

        By 'Mean', the drift of the SDE; 'Euler', the velocity of the ODE; or 'Tweedie', the posterior mean of the data.
        """
        if kind == "Mean":
            return x + drift(x, t) * (1 - t)
        if kind == "Euler":
            return x + self._drift(model, model_kwargs)(x, t) * (1 - t)
        t_batch = _per_sample(t, x)
        noise = self.transport.noise(model(x, t_batch, **model_kwargs), x, t_batch)
        return (x - self.transport.path.sigma(t) * noise) / self.transport.path.alpha(t)


def _nfe(row, num_steps, end_is_singular=False, has_last_step=False):
    """Return the NFE of a solve by a row (step, NFE per step) of a table of solvers; None where they depend on data."""
    _, per_step = row
    if per_step is None:
        return None
    return per_step * (num_steps - 1) - (end_is_singular and per_step > 1) + has_last_step


def _per_sample(t, x):
    """Return a 0-D time as the vector (N,) in x's dtype that networks take."""
    return t.to(x.dtype).repeat(len(x))


def _with_divergence(velocity, x, t, probes):
    """Return velocity(x, t) (N, ...) and Hutchinson's estimate of its divergence (N,), averaged over the probes."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = velocity(x, t)
        divergence = 0
        for i, probe in enumerate(probes, 1):
            projection = (value * probe + 0 * x).sum()  # 0 * x, for a velocity that does not depend on x
            (product,) = torch.autograd.grad(projection, x, retain_graph=i < len(probes))
            divergence = divergence + (product * probe).flatten(1).sum(1) / len(probes)
    return value.detach(), divergence


def _rademacher_like(x):
    return torch.randint(0, 2, x.shape, device=x.device).to(x.dtype) * 2 - 1


def _usable_by_autograd(value):
    is_inference = isinstance(value, torch.Tensor) and value.is_inference()
    return value.clone() if is_inference else value
