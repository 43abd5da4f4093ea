"""Multistep solvers against exact flows and distributions, and against the schedulers of diffusers."""

import itertools
import math

import pytest
import torch
from conftest import GaussianNetwork
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from test_sampler import exact_flow

from transport import DIFFUSION_FORMS, PATHS, PREDICTIONS, Sampler, Transport, create_transport
from transport.integrators import ode_integrate

ORDERS = {"ab2": 2, "ab3": 3, "ab4": 4, "dpmpp_2m": 2, "dpmpp_3m": 3, "unipc": 2, "unipc_3": 3}
IN_LAMBDA = ("dpmpp_2m", "unipc", "unipc_3")
SDE_SOLVERS = ("dpmpp_2m_sde", "dpmpp_3m_sde")


class TwoMixtures:
    """Exact networks for data on the line: a Gaussian, and a mixture of three. x is (..., 2, N), a row for each."""

    means = torch.tensor([[[0.5] * 3], [[-1.0, 0.2, 1.5]]], dtype=torch.float64)
    stds = torch.tensor([[[0.8] * 3], [[0.6, 0.7, 0.65]]], dtype=torch.float64)
    weights = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)

    def __init__(self, path):
        self.path = path

    def standardised(self, x, t):
        """Return x (..., 1), seen from each component at time t, and the components' standard deviations."""
        stds = torch.sqrt((self.path.alpha(t) * self.stds) ** 2 + self.path.sigma(t) ** 2)
        return (x[..., None] - self.path.alpha(t) * self.means) / stds, stds

    def posterior(self, x, t):
        """Return E[x1 | x] and the score."""
        z, stds = self.standardised(x, t)
        shares = torch.softmax(torch.log(self.weights / stds) - z**2 / 2, -1)
        data = self.means + self.path.alpha(t) * self.stds**2 * z / stds
        return (shares * data).sum(-1), -(shares * z / stds).sum(-1)

    def score(self, x, t):
        return self.posterior(x, t)[1]

    def velocity(self, x, t):
        data, score = self.posterior(x, t)
        return self.path.d_alpha(t) * data - self.path.d_sigma(t) * self.path.sigma(t) * score

    def by_predictions(self, x, t):
        """Return the velocity of x (3, 2, N), each row from the network of one prediction."""
        score = self.score(x, t)
        output = {"velocity": self.velocity(x[0], t), "score": score[1], "noise": -self.path.sigma(t) * score[2]}
        rows = zip(PREDICTIONS, x, strict=True)
        return torch.stack([Transport(self.path, name).velocity(output[name], y, t[None]) for name, y in rows])

    def cdf(self, x, t):
        return (self.weights * torch.special.ndtr(self.standardised(x, t)[0])).sum(-1)

    def flow(self, x, t0, t1):
        """Return where the probability flow takes x: to the same quantile, found by bisection."""
        low, high, share = torch.full_like(x, -9), torch.full_like(x, 9), self.cdf(x, t0)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle, t1) < share
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return low


def grid(kind, t0, t1, steps):
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return t0 + (t1 - t0) * (u if kind == "uniform" else u / (2 - u))


def measured_orders(method, network, velocity, ends, kind, x, steps):
    """Return the slope of the error between two numbers of steps, over both data, for each leading row of x."""
    errors = []
    for count in steps:
        times = grid(kind, *ends, count)
        end = ode_integrate(velocity, x, times, method=method, atol=0, rtol=0, path=network.path)[-1]
        errors.append((end - network.flow(x, times[0], times[-1])).pow(2).mean((-2, -1)))
    return torch.log(errors[0] / errors[1]) / 2 / math.log(steps[1] / steps[0])


@pytest.mark.parametrize("path_type", PATHS)
@pytest.mark.parametrize("method", ORDERS)
def test_the_order(method, path_type):
    """To data on an even grid and to noise on an uneven one, by all predictions.

    The solvers in lambda have their order where it is finite; the others up to the ends that the predictions allow."""
    network = TwoMixtures(PATHS[path_type]())
    ends = (0.05, 0.95) if method in IN_LAMBDA else (1e-3, 1 - 1e-3)
    x = torch.linspace(-1.6, 2.0, 13, dtype=torch.float64).repeat(3, 2, 1)
    steps = (60, 300) if method == "ab4" else (40, 160)
    for kind, (t0, t1) in (("uniform", ends), ("shifted", ends[::-1])):
        found = measured_orders(method, network, network.by_predictions, (t0, t1), kind, x, steps)
        assert found.min() > ORDERS[method] - 0.2, (kind, t0, found)


@pytest.mark.parametrize("path_type, ends", [*itertools.product(("Linear", "GVP"), ((0.0, 1.0), (1.0, 0.0)))])
def test_the_order_from_one_singular_end_to_the_other(path_type, ends):
    """The solvers in lambda have order 2 there, but for the logarithm of the number of steps in that of `dpmpp_2m`."""
    network = TwoMixtures(PATHS[path_type]())
    x = torch.linspace(-1.6, 2.0, 13, dtype=torch.float64).repeat(2, 1)
    for method, order in (ORDERS | {"unipc_3": 2, "dpmpp_2m": 1.75}).items():
        found = measured_orders(
            method, network, network.velocity, ends, "uniform", x, (60, 300) if order < 2 else (40, 160)
        )
        assert found > order - 0.2, (method, found)


def scheduler_of(method, times):
    """Return diffusers' scheduler for times of the Linear path, whose sigma is 1 - t."""
    settings = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
    lower = bool(torch.logit(times[-2:]).diff() > 1)
    if method == "dpmpp_2m":
        settings |= dict(euler_at_final=lower, lower_order_final=False, final_sigmas_type="sigma_min")
        scheduler = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, **settings)
    else:
        settings |= dict(solver_order=ORDERS[method], lower_order_final=lower)
        scheduler = UniPCMultistepScheduler(solver_type="bh2", **settings)
    scheduler.set_timesteps(len(times) - 1)
    scheduler.sigmas, scheduler.timesteps = 1 - times, 1000 * (1 - times[:-1])
    scheduler.set_begin_index(0)
    return scheduler


@pytest.mark.parametrize("method", ["dpmpp_2m", "unipc", "unipc_3"])
@pytest.mark.parametrize("ends", [(0.01, 0.98), (0.1, 0.9), (1e-3, 1.0), (0.0, 1.0)])
def test_the_states_of_diffusers(method, ends):
    """Equal are the start at lower orders, all steps, and the lower order at the end if that step is long in lambda.

    Where it is short, a lower order at the end, an option of theirs, would cost UniPC its order. Their UniPC of order
    3 gives NaN from alpha = 0 on; their own grids begin beside it."""
    if method == "unipc_3" and ends[0] == 0:
        ends = (1e-9, 1.0)
    network = TwoMixtures(PATHS["Linear"]())
    x = torch.linspace(-1.6, 2.0, 13, dtype=torch.float64).repeat(2, 1)
    for kind, steps in itertools.product(("uniform", "shifted"), (1, 2, 5, 20)):
        times = grid(kind, *ends, steps)
        scheduler, expected = scheduler_of(method, times), [x]
        for t, step in zip(times[:-1], scheduler.timesteps, strict=True):
            output = -network.velocity(expected[-1], t)  # theirs is noise - data
            expected.append(scheduler.step(output, step, expected[-1]).prev_sample)
        states = ode_integrate(
            network.velocity, x, times, method=method, atol=0, rtol=0, path=network.path, trajectory=True
        )
        for found, state in zip(states, expected, strict=True):
            assert (found - state).abs().max() < 1e-5 * state.abs().max(), (kind, steps)


@pytest.mark.parametrize("method", ["dpmpp_2m", "dpmpp_3m", "unipc", "unipc_3"])
@pytest.mark.parametrize("path_type", PATHS)
def test_a_single_image_is_reached_in_a_single_step(method, path_type):
    """Its data prediction is constant, so every exponential integrator is exact, and so it is back to noise."""
    path = PATHS[path_type]()
    noise = torch.randn(5, 3, dtype=torch.float64)
    for times in (torch.tensor([0.0, 0.4, 0.99]), torch.tensor([0.0, 0.99]), torch.tensor([0.99, 0.5, 0.2, 0.01])):
        times = times.double()
        points = [path.alpha(t) * 0.3 + path.sigma(t) * noise for t in (times[0], times[-1])]
        end = ode_integrate(
            lambda x, t: path.d_alpha(t) * 0.3 + path.d_sigma(t) * (x - path.alpha(t) * 0.3) / path.sigma(t),
            *(points[0], times),
            **dict(method=method, atol=0, rtol=0, path=path),
        )[-1]
        torch.testing.assert_close(end, points[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", ORDERS)
def test_an_image_does_not_depend_on_its_batch_and_float32_suffices(method):
    transport = create_transport("GVP", "score")
    x = torch.randn(4, 3, 2)
    sample = Sampler(transport).sample_ode(sampling_method=method, num_steps=12)
    together, alone = (sample(part, GaussianNetwork(transport))[-1] for part in (x, x[1:2]))
    assert torch.equal(together[1:2], alone) and together.dtype == torch.float32
    torch.testing.assert_close(together.double(), sample(x.double(), GaussianNetwork(transport))[-1], rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", ["euler", *ORDERS])
@pytest.mark.parametrize(
    "times",
    [
        (0.0, 1e-17, 2e-17, 5e-17, 0.5, 1.0),
        (0.1, 0.5, 0.5 + 1e-12, 0.5 + 2e-12, 0.8),
        (0.7, 0.9, 0.9 + 2e-16, 0.9 + 4e-16),
    ],
)
def test_times_close_to_each_other_do_no_harm(times, method):
    transport = create_transport()
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    end = Sampler(transport).sample_ode(sampling_method=method, time_grid=times)(x, GaussianNetwork(transport))[-1]
    assert (end - exact_flow(transport.path, x, times[0], times[-1])).abs().max() < 0.8


@pytest.mark.parametrize("method", ORDERS)
def test_the_likelihood(method):
    transport = create_transport()
    x = 0.5 + 0.7 * torch.randn(16, 3, dtype=torch.float64)
    logp, _ = Sampler(transport).sample_ode_likelihood(sampling_method=method, num_steps=81)(
        x, GaussianNetwork(transport)
    )
    expected = torch.distributions.Normal(0.5, 0.7).log_prob(x).sum(1)
    torch.testing.assert_close(logp, expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("method", SDE_SOLVERS)
@pytest.mark.parametrize("path_type", PATHS)
def test_a_stochastic_step_is_exact_for_a_single_image(method, path_type):
    """A step is then affine in state and noise. Rows differ by one unit of one of them, which gives the variance."""
    transport = create_transport(path_type, "noise", sample_eps=0.1)
    path, t0, t1 = transport.path, *torch.tensor([0.0 if path_type == "VP" else 0.1, 0.9], dtype=torch.float64)
    for form, steps in itertools.product(DIFFUSION_FORMS, (1, 4)):
        units = iter(torch.eye(2 + steps, dtype=torch.float64)[2:, :, None])
        sample = Sampler(transport).sample_sde(
            sampling_method=method,
            diffusion_form=form,
            last_step=None,
            num_steps=steps + 1,
            randn_like=lambda x, units=units: next(units),
        )
        x = (path.alpha(t0) * 0.3).repeat(2 + steps, 1)
        x[1] += path.sigma(t0)
        network = GaussianNetwork(transport, mean=0.3, std=0.0)
        end = sample(x, network)[-1]
        assert network.calls == sample.nfe == steps
        torch.testing.assert_close(end[0, 0], path.alpha(t1) * 0.3, rtol=0, atol=1e-9)
        torch.testing.assert_close((end[1:] - end[0]).square().sum(), path.sigma(t1) ** 2, rtol=0, atol=1e-9)
        if form == "SBDM":  # of sigma(t0), as much is left as of the noise-to-signal ratio, squared
            left = path.sigma(t0) ** 2 / path.alpha(t0) * path.alpha(t1) / path.sigma(t1) ** 2
            torch.testing.assert_close((end[1] - end[0])[0] * left, path.sigma(t0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", SDE_SOLVERS)
@pytest.mark.parametrize("path_type, prediction", [*itertools.product(PATHS, PREDICTIONS)])
def test_the_distribution_of_an_sde_in_50_evaluations(method, path_type, prediction):
    """Of a Gaussian and of a mixture: their empirical distributions over 8000 samples, everywhere on the line."""
    transport = create_transport(path_type, prediction)
    network = TwoMixtures(transport.path)
    outputs = {"velocity": network.velocity, "score": network.score}
    outputs["noise"] = lambda x, t: -transport.path.sigma(t) * network.score(x, t)
    torch.manual_seed(0)
    calls = []

    def model(x, t):
        calls.append(t[0])
        return outputs[prediction](x, t[0])

    how = dict(sampling_method=method, num_steps=50, last_step="Tweedie", last_step_size=0.01)
    for form in ("SBDM", "sigma", "increasing-decreasing"):
        sample = Sampler(transport).sample_sde(**how, diffusion_form=form)
        end = sample(torch.randn(2, 8000, dtype=torch.float64), model)[-1].sort().values
        below = network.cdf(end, torch.tensor(1.0, dtype=torch.float64))
        assert (below - torch.linspace(0, 1, 8000)).abs().max() < 0.03, form
        assert abs(end[0].mean() - 0.5) < 0.03 and abs(end[0].std() - 0.8) < 0.03, form
    assert len(calls) == 150
