"""A path is one subclass, named in PATHS: the flag, the losses, the ODE, the SDE and the likelihood then know it."""

import pytest
import torch
from conftest import GaussianNetwork

from sampling import flags
from transport import DIFFUSION_FORMS, PATHS, PREDICTIONS, Sampler, create_transport
from transport.path import Path
from utils import command_line


class Quadratic(Path):
    """alpha = t^2, sigma = 1 - t^2: it stands still at t = 0, where a velocity says nothing of the score."""

    def alpha(self, t):
        return t**2

    def sigma(self, t):
        return 1 - t**2

    def d_alpha(self, t):
        return 2 * t

    def d_sigma(self, t):
        return -2 * t


class Circle(Quadratic):
    """alpha = t^2, sigma = sqrt(1 - t^4): variance preserving, with an infinite d_sigma at t = 1."""

    finite_derivatives, default_train_eps = False, 1e-4

    def sigma(self, t):
        return torch.sqrt(1 - t**4)

    def d_sigma(self, t):
        return -2 * t**3 / self.sigma(t)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", [Quadratic, Circle])
def test_a_path_from_outside(monkeypatch, path, prediction):
    monkeypatch.setitem(PATHS, "Toy", path)
    parser = command_line.Parser("a script")
    flags.add_transport_flags(parser, from_checkpoint=False)
    transport = create_transport(parser.parse_args(["--path-type", "Toy"]).path_type, prediction)
    eps = 0 if path is Quadratic and prediction == "velocity" else path.default_train_eps
    assert transport.train_interval() == (eps, 1 - eps)
    network, sampler = GaussianNetwork(transport), Sampler(transport)
    torch.manual_seed(0)
    x1 = 0.5 + 0.7 * torch.randn(5000, 1, dtype=torch.float64)
    assert transport.training_losses(network, x1)["loss"].isfinite().all()
    logp, x0 = sampler.sample_ode_likelihood(rtol=1e-5)(x1, network)
    exact = torch.distributions.Normal(0.5, 0.7).log_prob(x1).sum(1)
    assert (logp - exact).abs().mean() < 0.02
    torch.testing.assert_close(sampler.sample_ode(rtol=1e-5)(x0, network)[-1], x1, atol=1e-3, rtol=0)
    for form in DIFFUSION_FORMS:
        sample = sampler.sample_sde(diffusion_form=form, last_step="Euler", last_step_size=0.01, num_steps=100)
        x = sample(torch.randn_like(x0), network)[-1]
        assert abs(x.mean() - 0.5) < 0.03 and abs(x.std() - 0.7) < 0.03, form
