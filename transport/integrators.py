"""Steppers, and nothing but steppers: ODEs by torchdiffeq, SDEs by Euler-Maruyama and Heun.

They know functions of (x, t), a time grid and a state; interpolants, networks and guidance stay outside. A state is a
tensor (N, ...) or, for ODEs, a tuple of such tensors; `times` is a 1-D tensor that increases or decreases.
"""

import torch
import torchdiffeq

# Function evaluations per step. The Adams methods and the adaptive ones depend on the data and have no such number.
FIXED_STEP_ODE_METHODS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
ADAMS_ODE_METHODS = ("explicit_adams", "implicit_adams", "fixed_adams")
ADAPTIVE_ODE_METHODS = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
ODE_METHODS = (*ADAPTIVE_ODE_METHODS, *FIXED_STEP_ODE_METHODS, *ADAMS_ODE_METHODS, "scipy_solver")
SDE_METHODS = {"Euler": 1, "Heun": 2}


def ode_integrate(velocity, x, times, *, method, atol, rtol, trajectory=False):
    """Integrate dx/dt = velocity(x, t) over `times` and return the states (S, ...), the last of which is the end state.

    Args:
        velocity: function of the state and a 0-D time tensor, returning the state's time derivative. It is never
            called outside [min(times), max(times)], where a path may be singular.
        x: the state at times[0].
        times: (T,) the grid of the fixed-step methods. Adaptive methods use its two ends and choose their own steps.
        method: one of ODE_METHODS.
        atol, rtol: tolerances of the adaptive methods.
        trajectory: keep the states at all T times (S = T). Otherwise the first and the last (S = 2), so that memory
            does not grow with T.

    Raises:
        ValueError: an adaptive method cannot meet its tolerances.
    """
    low, high = times.min(), times.max()

    def derivative(t, state):
        # The adaptive solvers probe one point ahead to size their first step, wherever that may lie.
        return velocity(state, t.clamp(low, high))

    options = {}
    if method in ADAPTIVE_ODE_METHODS:
        # Without it the last step passes the end, and the end state is interpolated from beyond.
        options["step_t"] = times[-1:]
        options["dtype"] = times.dtype
    elif method != "scipy_solver":
        options["grid_constructor"] = lambda _derivative, _state, _ends: times
    ends = times if trajectory else times[[0, -1]]
    try:
        return torchdiffeq.odeint(derivative, x, ends, method=method, atol=atol, rtol=rtol, options=options)
    except AssertionError as error:  # how torchdiffeq says that its steps became too small
        problem = f"atol {atol:g} and rtol {rtol:g} are too tight, or the network's output is not finite"
        raise ValueError(f"{method} found no step that meets its tolerances ({error}): {problem}") from error


def euler_maruyama_step(drift, diffusion, x, t, dt, noise):
    """One step of dx = drift dt + sqrt(2 diffusion) dW; weak order 1, one evaluation of the drift."""
    return x + drift(x, t) * dt + torch.sqrt(2 * diffusion(t) * dt) * noise


def heun_step(drift, diffusion, x, t, dt, noise, correct=True):
    """One stochastic Heun step: add the step's noise, then a Heun step of the drift (Karras et al. 2022, algorithm 2).

    Two evaluations of the drift, the second at t + dt; with `correct` False that one is left out.
    """
    x = x + torch.sqrt(2 * diffusion(t) * dt) * noise
    slope = drift(x, t)
    if correct:
        slope = 0.5 * (slope + drift(x + slope * dt, t + dt))
    return x + slope * dt


def sde_integrate(drift, diffusion, x, times, *, method, randn_like, end_is_singular=False):
    """Integrate dx = drift(x, t) dt + sqrt(2 diffusion(t)) dW over `times`; a generator of the states after each step.

    Args:
        drift: function of the state (N, ...) and a 0-D time tensor.
        diffusion: function of a 0-D time tensor, giving a 0-D tensor >= 0.
        x: (N, ...) the state at times[0].
        times: (T,) increasing grid; T - 1 steps.
        method: 'Euler' or 'Heun'.
        randn_like: function that draws standard normal noise in the shape of its argument.
        end_is_singular: the drift must not be evaluated at times[-1]. Euler never does; Heun leaves its last
            corrector out, as Karras et al. do at zero noise (2022, algorithm 1, line 6).
    """
    steps = len(times) - 1
    for i in range(steps):
        t, dt = times[i], times[i + 1] - times[i]
        noise = randn_like(x)
        if method == "Euler":
            x = euler_maruyama_step(drift, diffusion, x, t, dt, noise)
        else:
            correct = not (end_is_singular and i == steps - 1)
            x = heun_step(drift, diffusion, x, t, dt, noise, correct)
        yield x
