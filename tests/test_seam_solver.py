"""A solver is one step and its row in a table: name -> (step, NFE per step)."""

import math

import pytest
import torch
from conftest import GaussianNetwork

from transport import DIFFUSION_FORMS, ODE_METHODS, SDE_METHODS, Sampler, create_transport


def ralston_step(velocity, x, t, dt):
    """Make a step of Ralston's method of order 2, with evaluations at t and t + 2/3 dt."""
    slope = velocity(x, t)
    return x + dt * (0.25 * slope + 0.75 * velocity(x + 2 / 3 * dt * slope, t + 2 / 3 * dt))


class AdamsBashforth:
    """A method of order 2 that remembers the evaluation of the step before; the first step is Euler's."""

    def __init__(self, path, times):
        self.before = None

    def __call__(self, velocity, x, t, dt):
        slope, before = velocity(x, t), self.before
        self.before = slope
        return x + dt * (slope if before is None else 1.5 * slope - 0.5 * before)


class DDIM:
    """The method of order 1 that is exact where the predicted data and noise are constant."""

    def __init__(self, path, times):
        self.path = path

    def __call__(self, velocity, x, t, dt):
        slope = velocity(x, t)
        noise = self.path.velocity_to_noise(slope, x, t)
        data = (self.path.sigma(t) * slope - self.path.d_sigma(t) * x) / self.path.wronskian(t)
        return self.path.alpha(t + dt) * data + self.path.sigma(t + dt) * noise


@pytest.mark.parametrize("step, nfe, order", [(ralston_step, 2, 2), (AdamsBashforth, 1, 2), (DDIM, 1, 1)])
@pytest.mark.parametrize("path_type, prediction", [("Linear", "velocity"), ("GVP", "score"), ("VP", "noise")])
def test_an_ode_solver_from_outside(monkeypatch, step, nfe, order, path_type, prediction):
    """It integrates to data, to noise and for the likelihood with its order, by as many evaluations as its row says."""
    monkeypatch.setitem(ODE_METHODS, "toy", (step, nfe))
    transport = create_transport(path_type, prediction, sample_eps=0.02)
    torch.manual_seed(0)
    noise = torch.randn(20, 3, 2, dtype=torch.float64)

    def solve(data=None, **how):
        network, sampler = GaussianNetwork(transport), Sampler(transport)
        samples = [sampler.sample_ode(**how, trajectory=True), sampler.sample_ode(**how, reverse=True)]
        samples.append(sampler.sample_ode_likelihood(**how))
        states = samples[0](noise, network)
        data = states[-1] if data is None else data
        logp, latent = samples[2](data, network)
        if "num_steps" in how:
            assert network.calls == 2 * samples[0].nfe == 2 * nfe * (how["num_steps"] - 1)
            assert len(states) == how["num_steps"] and torch.equal(states[0], noise)
        return states[-1], samples[1](data, network)[-1], logp, latent

    exact = solve(atol=1e-10, rtol=1e-9)
    coarse, fine = (solve(exact[0], sampling_method="toy", num_steps=num_steps) for num_steps in (101, 201))
    for true, *found in zip(exact, coarse, fine, strict=True):
        errors = [(value - true).abs().max() for value in found]
        assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def splitting_step(drift, diffusion, x, t, dt, noise, end_is_singular):
    """Make half a step of the drift, add the noise, and make the other half, or at a singular end the whole first."""
    share = 1 if end_is_singular else 0.5
    x = x + share * dt * drift(x, t) + torch.sqrt(2 * diffusion(t) * dt) * noise
    return x if end_is_singular else x + 0.5 * dt * drift(x, t + dt)


class SDEAdamsBashforth(AdamsBashforth):
    """Euler-Maruyama with the drift of `AdamsBashforth`."""

    def __call__(self, drift, diffusion, x, t, dt, noise, end_is_singular):
        return super().__call__(drift, x, t, dt) + torch.sqrt(2 * diffusion(t) * dt) * noise


@pytest.mark.parametrize("step, nfe", [(splitting_step, 2), (SDEAdamsBashforth, 1)])
@pytest.mark.parametrize("last_step", [None, "Euler"])
def test_an_sde_solver_from_outside(monkeypatch, step, nfe, last_step):
    """It draws the distribution by every diffusion, with one evaluation less if the end is singular."""
    monkeypatch.setitem(SDE_METHODS, "toy", (step, nfe))
    transport = create_transport("Linear", "velocity")
    torch.manual_seed(0)
    for form in DIFFUSION_FORMS:
        how = dict(sampling_method="toy", diffusion_form=form, last_step=last_step, num_steps=150)
        network, sample = GaussianNetwork(transport), Sampler(transport).sample_sde(**how)
        x = sample(torch.randn(100, 100), network)[-1]
        assert abs(x.mean() - 0.5) < 0.03 and abs(x.std() - 0.7) < 0.03, form
        assert network.calls == sample.nfe == 149 * nfe + (1 if last_step else 1 - nfe)
        assert torch.cat(network.times).max() < 1
