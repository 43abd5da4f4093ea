"""Solvers: torchdiffeq's for ODEs, Euler-Maruyama and Heun for SDEs, multistep.py for both; a table of each kind.

To add a solver, write one step and give it a row in `ODE_METHODS` or `SDE_METHODS`: name -> (step, NFE per step).

    ODE:  step(velocity, x, t, dt)                                      dx = velocity(x, t) dt
    SDE:  step(drift, diffusion, x, t, dt, noise, end_is_singular)      dx = drift(x, t) dt + sqrt(2 diffusion(t)) dW

Both return x at t + dt. x is (N, ...); t and dt are 0-D tensors, in float64 where the device has it, and dt < 0 from
data to noise; `noise` is standard normal, like x. Each call of `velocity` or `drift` is one evaluation of the model.
- A step that remembers evaluations (a multistep method) is a class: each solve makes one by `Step(path, times)` and
  calls it as above. `path` is the `Path`, with its alpha and sigma; `times` (T,) the grid of the solve.
- NFE per step is None where it depends on the data.
- An SDE step must not evaluate `drift` at t + dt if `end_is_singular`, which is True in the last step only. A step of
  more than one evaluation then makes one less."""

import torch

from .multistep import AdamsBashforth, DPMSolver2M, Explicit, Stochastic, UniPC, of_order


def euler_maruyama_step(drift, diffusion, x, t, dt, noise, end_is_singular):
    """Make one Euler-Maruyama step; weak order 1, one evaluation, at t."""
    return x + drift(x, t) * dt + torch.sqrt(2 * diffusion(t) * dt) * noise


def heun_step(drift, diffusion, x, t, dt, noise, end_is_singular):
    """Add the noise, then make a Heun step of the drift (Karras et al. 2022, algorithm 2); evaluations at t and t + dt.

    At a singular end the second is left out, as Karras et al. do at zero noise (algorithm 1, line 6)."""
    x = x + torch.sqrt(2 * diffusion(t) * dt) * noise
    slope = drift(x, t)
    if not end_is_singular:
        slope = 0.5 * (slope + drift(x + slope * dt, t + dt))
    return x + slope * dt


SDE_METHODS = {
    "Euler": (euler_maruyama_step, 1),
    "Heun": (heun_step, 2),
    "dpmpp_2m_sde": (of_order(Stochastic, 2), 1),
    "dpmpp_3m_sde": (of_order(Stochastic, 3), 1),
}

MOST_STEPS = 10_000  # that an adaptive method may accept: beyond, it follows the network's rounding

# Methods that choose their own time steps, all of them torchdiffeq's.
ADAPTIVE_ODE_METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")

# Those, and methods of fixed steps that solve each of them to the tolerances.
TOLERANT_ODE_METHODS = (*ADAPTIVE_ODE_METHODS, "implicit_adams", "fixed_adams")

# A step of None: torchdiffeq integrates, by its method of the same name. Its Adams methods have no fixed NFE per step.
ODE_METHODS = {
    **dict.fromkeys(ADAPTIVE_ODE_METHODS, (None, None)),
    **{"euler": (None, 1), "midpoint": (None, 2), "heun2": (None, 2), "heun3": (None, 3), "rk4": (None, 4)},
    **dict.fromkeys(("explicit_adams", "implicit_adams", "fixed_adams"), (None, None)),
    **{f"ab{order}": (of_order(AdamsBashforth, order), 1) for order in (2, 3, 4)},
    **{"dpmpp_2m": (DPMSolver2M, 1), "dpmpp_3m": (of_order(Explicit, 3), 1)},
    **{"unipc": (of_order(UniPC, 2), 1), "unipc_3": (of_order(UniPC, 3), 1)},
}


def check_tolerances(method, atol, rtol, dtype):
    """Raise ValueError if an adaptive method would look for errors below the rounding of a state in this dtype."""
    eps = torch.finfo(dtype).eps
    if method in ADAPTIVE_ODE_METHODS and atol + rtol < eps:
        name = str(dtype).removeprefix("torch.")
        raise ValueError(f"atol {atol:g} and rtol {rtol:g} are too tight for {name}: give {eps:.1g} or more in all")


def ode_integrate(velocity, x, times, *, method, atol, rtol, path=None, trajectory=False):
    """Integrate dx/dt = velocity(x, t) over `times` and return the states (S, N, ...), of which the last is the end.

    x is the state at times[0], a tensor (N, ...) or a tuple of them; then the result is a tuple, too. `velocity` is
    never called outside [min(times), max(times)], where a path may be singular. `times` (T,) increases or decreases;
    adaptive methods use its two ends. With `trajectory`, S = T; otherwise the first and the last state are kept, so
    that memory does not grow with T. Raise ValueError if an adaptive method cannot meet its tolerances."""
    check_tolerances(method, atol, rtol, (x[0] if isinstance(x, tuple) else x).dtype)
    low, high = times.min(), times.max()

    def inside(x, t):
        # The adaptive solvers probe one point ahead to size their first step, wherever that may lie.
        return velocity(x, t.clamp(low, high))

    step, _ = ODE_METHODS[method]
    if step is not None:
        return _integrate_by(_for_this_solve(step, path, times), inside, x, times, trajectory)
    options = {}
    if method not in ADAPTIVE_ODE_METHODS:
        options["grid_constructor"] = lambda _derivative, _state, _ends: times
    elif method != "scipy_solver":
        # Without it the last step passes the end, and the end state is interpolated from beyond.
        options["step_t"] = times[-1:]
        options["dtype"] = times.dtype
        options["max_num_steps"] = MOST_STEPS
    settings = dict(method=method, atol=atol, rtol=rtol, options=options)
    import torchdiffeq  # takes a second to import, and training and the multistep solvers do not need it

    try:
        return torchdiffeq.odeint(lambda t, x: inside(x, t), x, times if trajectory else times[[0, -1]], **settings)
    except AssertionError as error:  # how torchdiffeq says that its steps became too small or too many
        problem = f"atol {atol:g} and rtol {rtol:g} are too tight, or the network's output is not finite"
        raise ValueError(f"{method} found no step that meets its tolerances ({error}): {problem}") from error


def _for_this_solve(step, path, times):
    return step(path, times) if isinstance(step, type) else step


def _integrate_by(step, velocity, x, times, trajectory):
    """Do the work of `ode_integrate` for a step of the table. The step sees a tuple as one tensor (N, D)."""
    if isinstance(x, tuple):
        states = _integrate_by(step, lambda y, t: _pack(velocity(_unpack(y, x), t)), _pack(x), times, trajectory)
        return _unpack(states, x)
    states = [x]
    for t, end in zip(times[:-1], times[1:], strict=True):
        x = step(velocity, x, t, end - t)
        states = [*states, x] if trajectory else [states[0], x]
    return torch.stack(states)


def _pack(parts):
    """Join a tuple of tensors (N, ...) to one (N, D)."""
    return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)


def _unpack(packed, parts):
    """Split (..., N, D) into a tuple of (..., N, ...) in the shapes of `parts`."""
    columns = packed.split([part[0].numel() for part in parts], dim=-1)
    return tuple(c.reshape(*c.shape[:-1], *part.shape[1:]) for c, part in zip(columns, parts, strict=True))


def sde_integrate(drift, diffusion, x, times, *, method, randn_like, path=None, end_is_singular=False):
    """Integrate an SDE from x (N, ...) over `times` (T,), increasing; yield the state after each of the T - 1 steps.

    `drift` and `diffusion` are functions of (x, t) and of t, which is 0-D, as the diffusion is. `randn_like` draws
    standard normal noise in the shape of its argument. If `end_is_singular`, no drift is evaluated at times[-1]."""
    step = _for_this_solve(SDE_METHODS[method][0], path, times)
    last = len(times) - 2
    for i in range(last + 1):
        t, dt = times[i], times[i + 1] - times[i]
        x = step(drift, diffusion, x, t, dt, randn_like(x), end_is_singular and i == last)
        yield x
