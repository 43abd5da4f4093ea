"""Puts an ODE, an SDE or a likelihood together: a transport, a stepper, and a time grid."""

import math

import torch

from .integrators import FIXED_STEP_ODE_METHODS, ODE_METHODS, SDE_METHODS, ode_integrate, sde_integrate
from .path import DIFFUSION_FORMS, check_choice

LAST_STEPS = (None, "Mean", "Tweedie", "Euler")


class Sampler:
    """Makes sampling functions for one transport.

    Each method returns a function `fn(x, model, **model_kwargs)` of the initial state x (N, ...), float32 or float64 on
    any device, and a model as `Transport` describes it. Sampling needs no gradients and records none.

    `num_steps` counts time points, both ends included. The number of network calls that follows from it is the
    attribute `network_calls` of the returned function; None where the solver decides as it goes.
    """

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
        time_shift=1.0,
        trajectory=False,
    ):
        """Sample by the probability-flow ODE dx/dt = velocity(x, t).

        Args:
            sampling_method: one of `ODE_METHODS`, torchdiffeq's names.
            num_steps: time points of the fixed-step methods; the adaptive ones choose their own steps.
            atol, rtol: tolerances of the adaptive methods. The error is measured as its root mean square over the whole
                batch, so their steps, and within the tolerances the result, depend on what else is in the batch.
            reverse: integrate from data to noise, over the same interval.
            time_shift: above 1, put more of the fixed-step methods' points where there is noise; see `shifted`.
            trajectory: keep every time point, not the end state alone.

        Returns:
            `fn(x, model, **model_kwargs)` -> (S, N, ...): S = 1, the end state, or with `trajectory` S = num_steps,
            the first being x. `fn(...)[-1]` is the end state either way.
        """
        check_choice("sampling method", sampling_method, ODE_METHODS)
        _check_grid(num_steps, time_shift)
        t0, t1 = self.transport.ode_interval()
        self._check_regular(t0, t1)

        @torch.no_grad()
        def sample(x, model, **model_kwargs):
            def velocity(x, t):
                t = _per_sample(t, x)
                return self.transport.velocity(model(x, t, **model_kwargs), x, t)

            times = _time_grid(t0, t1, num_steps, x, time_shift)
            times = times.flip(0) if reverse else times
            states = ode_integrate(
                velocity, x, times, method=sampling_method, atol=atol, rtol=rtol, trajectory=trajectory
            )
            return states if trajectory else states[-1:].clone()  # a view would keep the initial state alive

        sample.network_calls = _ode_network_calls(sampling_method, num_steps)
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
        time_shift=1.0,
        trajectory=False,
        randn_like=torch.randn_like,
    ):
        """Sample by the SDE dx = (velocity + w score) dt + sqrt(2 w) dW, from noise to data.

        Args:
            sampling_method: 'Euler' (Euler-Maruyama) or 'Heun'.
            diffusion_form, diffusion_norm: the shape and scale of w; see `Path.diffusion`.
            last_step: how to get from t = 1 - last_step_size to 1, where the score is singular: 'Mean' (the drift of
                the SDE, no noise), 'Tweedie' (the posterior mean), 'Euler' (the velocity of the ODE), or None: the SDE
                is integrated to the end of the interval and stops there.
            last_step_size: in (0, 1); of no effect without a last step. A larger `sample_eps` that was given takes its
                place.
            num_steps: time points of the SDE; the last step comes on top.
            time_shift: above 1, put more of them where there is noise; see `shifted`.
            trajectory: keep every state, not the end state alone.
            randn_like: draws the noise of a step in the shape of its argument.

        Returns:
            `fn(x, model, **model_kwargs)` -> (S, N, ...): S = 1, the end state, or with `trajectory` x, the state
            after each of the num_steps - 1 steps and, if there is one, after the last step.
        """
        check_choice("sampling method", sampling_method, tuple(SDE_METHODS))
        check_choice("diffusion form", diffusion_form, DIFFUSION_FORMS)
        check_choice("last step", last_step, LAST_STEPS)
        _check_grid(num_steps, time_shift)
        if not 0 <= diffusion_norm < math.inf:
            raise ValueError(f"diffusion norm must be a number of 0 or more, not {diffusion_norm}")
        if last_step is not None and not 0 < last_step_size < 1:
            raise ValueError(f"last step size must lie between 0 and 1, not {last_step_size}")
        path, transport = self.transport.path, self.transport
        t0, t1 = transport.sde_interval(diffusion_form, 0.0 if last_step is None else last_step_size)
        if t0 >= t1:
            raise ValueError(f"last step size {last_step_size} leaves nothing of the interval that begins at {t0}")
        end_is_singular = last_step is None and t1 == 1
        self._check_regular(t0, None if end_is_singular else t1, diffusion_form)

        def diffusion(t):
            return path.diffusion(t, diffusion_form, diffusion_norm)

        @torch.no_grad()
        def sample(x, model, **model_kwargs):
            def drift(x, t):
                t_batch = _per_sample(t, x)
                output = model(x, t_batch, **model_kwargs)
                velocity = transport.velocity(output, x, t_batch)
                return velocity + diffusion(t).to(x.dtype) * transport.score(output, x, t_batch)

            times = _time_grid(t0, t1, num_steps, x, time_shift)
            states = [x]

            def keep(state):
                states[:] = [*states, state] if trajectory else [state]

            steps = dict(method=sampling_method, randn_like=randn_like, end_is_singular=end_is_singular)
            for state in sde_integrate(drift, diffusion, x, times, **steps):
                keep(state)
            if last_step is not None:
                keep(self._last_step(last_step, drift, states[-1], times[-1], model, model_kwargs))
            return torch.stack(states)

        sample.network_calls = (
            SDE_METHODS[sampling_method] * (num_steps - 1)
            + (last_step is not None)
            - (sampling_method == "Heun" and end_is_singular)
        )
        return sample

    def _last_step(self, kind, drift, x, t, model, model_kwargs):
        """From time t to 1 in one step without noise; one network call."""
        if kind == "Mean":
            return x + drift(x, t) * (1 - t)
        t_batch = _per_sample(t, x)
        output = model(x, t_batch, **model_kwargs)
        if kind == "Euler":
            return x + self.transport.velocity(output, x, t_batch) * (1 - t)
        alpha, sigma = self.transport.path.alpha(t), self.transport.path.sigma(t)
        return (x - sigma * self.transport.noise(output, x, t_batch)) / alpha

    def sample_ode_likelihood(
        self, *, sampling_method="dopri5", num_steps=50, atol=1e-6, rtol=1e-3, num_probes=1, probe_like=None
    ):
        """Log-likelihood of data by the instantaneous change of variables (Chen et al. 2018; Song et al. 2021, eq. 39).

        The divergence is Hutchinson's estimate with Rademacher probes, drawn once per solve, so that the adaptive
        solvers integrate a smooth function.

        Args:
            sampling_method, num_steps, atol, rtol: as in `sample_ode`.
            num_probes: probes per sample, over which the estimate is averaged; each costs a backward pass per call.
            probe_like: draws one probe in the shape of its argument; None: -1 or 1 from PyTorch's global generator.

        Returns:
            `fn(x, model, **model_kwargs)` -> (logp, z): log p(x) (N,) in nats, summed over all dimensions, and the
            noise (N, ...) that x is carried to. Works whatever the grad mode outside, inference mode included (for a
            model whose parameters were not made in it); the result carries no gradient.
        """
        check_choice("sampling method", sampling_method, ODE_METHODS)
        _check_grid(num_steps)
        if num_probes < 1 or num_probes != int(num_probes):
            raise ValueError(f"num_probes must be an integer of 1 or more, not {num_probes}")
        t0, t1 = self.transport.ode_interval()
        self._check_regular(t0, t1)

        # Tensors made in inference mode can never enter a graph, so it is left, and what was made in it is copied.
        @torch.inference_mode(False)
        @torch.no_grad()
        def log_likelihood(x, model, **model_kwargs):
            x = _usable_by_autograd(x)
            model_kwargs = {key: _usable_by_autograd(value) for key, value in model_kwargs.items()}
            probes = [(probe_like or _rademacher_like)(x) for _ in range(num_probes)]

            def velocity_and_divergence(state, t):
                x = state[0].detach()
                t = _per_sample(t, x)
                with torch.enable_grad():
                    x.requires_grad_()
                    velocity = self.transport.velocity(model(x, t, **model_kwargs), x, t)
                    divergence = 0
                    for i, probe in enumerate(probes, 1):
                        projection = (velocity * probe + 0 * x).sum()
                        (product,) = torch.autograd.grad(projection, x, retain_graph=i < num_probes)
                        divergence = divergence + (product * probe).flatten(1).sum(1) / num_probes
                return velocity.detach(), divergence

            z, change = ode_integrate(
                velocity_and_divergence,
                (x, x.new_zeros(len(x))),
                _time_grid(t0, t1, num_steps, x).flip(0),
                method=sampling_method,
                atol=atol,
                rtol=rtol,
            )
            return self.transport.prior_logp(z[-1]) + change[-1], z[-1]

        log_likelihood.network_calls = _ode_network_calls(sampling_method, num_steps)
        return log_likelihood

    def _check_regular(self, t0, t1, diffusion_form=None):
        """Raise ValueError where the drift is singular at t0 or t1, as a sample_eps that the user gave can make it."""
        for t in (t0, t1):
            if t is None:
                continue
            t, one = torch.tensor([t], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
            drift = self.transport.velocity(one, one, t)
            if diffusion_form is not None:
                diffusion = self.transport.path.diffusion(t, diffusion_form)
                drift = drift + diffusion * (1 + self.transport.score(one, one, t))
            if not torch.isfinite(drift).all():
                what = f"prediction {self.transport.prediction!r}"
                what += "" if diffusion_form is None else f" with the diffusion form {diffusion_form!r}"
                raise ValueError(
                    f"sample_eps = {self.transport.sample_eps} evaluates the drift at t = {t.item():g}, where it is "
                    f"singular for {what} on this path; use one above 0, such as 1e-3"
                )


def _check_grid(num_steps, time_shift=1.0):
    if not 0 < time_shift < math.inf:
        raise ValueError(f"time_shift must be a number above 0, not {time_shift}")
    if num_steps < 2 or num_steps != int(num_steps):
        raise ValueError(f"num_steps counts both ends of the interval: an integer of 2 or more, not {num_steps}")


def _ode_network_calls(sampling_method, num_steps):
    calls_per_step = FIXED_STEP_ODE_METHODS.get(sampling_method)
    return None if calls_per_step is None else calls_per_step * (num_steps - 1)


def shifted(u, shift):
    """Map u in [0, 1] to itself, points moved to the noise by a shift above 1: u / (u + shift (1 - u)).

    Larger images hide less of themselves in the same noise, so a grid for them begins slower; the noise level 1 - u
    goes to shift (1 - u) / (1 + (shift - 1) (1 - u)) (Esser et al. 2024, eq. 23).
    """
    return u / (u + shift * (1 - u))


def _time_grid(t0, t1, num_steps, x, shift=1.0):
    """Times (num_steps,) from t0 to t1, even but for the shift, in double precision where x's device has it."""
    dtype = torch.float32 if x.device.type == "mps" else torch.float64
    times = torch.linspace(t0, t1, num_steps, dtype=dtype, device=x.device)
    if shift != 1:
        times[1:-1] = t0 + (t1 - t0) * shifted((times[1:-1] - t0) / (t1 - t0), shift)
    return times


def _per_sample(t, x):
    """A 0-D time as the vector (N,) in x's dtype that networks take."""
    return t.to(x.dtype).repeat(len(x))


def _rademacher_like(x):
    return torch.randint(0, 2, x.shape, device=x.device).to(x.dtype) * 2 - 1


def _usable_by_autograd(value):
    is_inference = isinstance(value, torch.Tensor) and value.is_inference()
    return value.clone() if is_inference else value
