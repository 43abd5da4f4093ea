import functools
import inspect
import itertools
import math
import weakref

import pytest
import torch
import torchdiffeq
from conftest import GaussianNetwork, load_golden

from transport import (
    DIFFUSION_FORMS,
    LAST_STEPS,
    ODE_METHODS,
    PATHS,
    PREDICTIONS,
    SDE_METHODS,
    Sampler,
    create_transport,
)
from transport.integrators import ode_integrate

GOLDEN = load_golden("transport.npz")
COMBINATIONS = list(itertools.product(PATHS, PREDICTIONS))
NFE_PER_STEP = {method: nfe for method, (_, nfe) in ODE_METHODS.items() if nfe is not None}


def golden_network(x, t):
    mixed = torch.einsum("cd,ndhw->nchw", GOLDEN["mixing"], x)
    return torch.tanh(mixed) * (1 + t)[:, None, None, None]


def relative_error(value, expected):
    return ((value - expected).abs().max() / expected.abs().max()).item()


def exact_flow(path, x, t0, t1, mean=0.5, std=0.7):
    """Return where the probability flow of Gaussian data takes x from t0 to t1: an affine map between its marginals."""
    t0, t1 = (torch.tensor(t, dtype=torch.float64) for t in (t0, t1))
    scale = [torch.sqrt((path.alpha(t) * std) ** 2 + path.sigma(t) ** 2) for t in (t0, t1)]
    return path.alpha(t1) * mean + scale[1] / scale[0] * (x - path.alpha(t0) * mean)


# ---------------------------------------------------------------------------------------------- golden values

# The official code reverses an interval to [1 - t0, 1 - t1]. On VP, whose interval is not symmetric, that differs from
# the interval of sampling, so there `ode_integrate` is compared with the golden value, not `reverse`.
OFFICIAL_REVERSED_VP = torch.linspace(1, 1e-3, 20)
# On VP with score prediction the official solver steps past the end and interpolates back. The golden end state is
# 1.5e-4 from the exact solution (dopri5 with rtol 1e-6), within its own tolerance (rtol 1e-3) but not within 1e-4.
LOOSE = {"VP/score/ode/dopri5": 1e-3}


@pytest.mark.parametrize("key", [key for key in GOLDEN if "/ode/" in key])
def test_ode_equals_golden(key):
    path_type, prediction, _, method = key.split("/")
    transport = create_transport(path_type, prediction)
    reverse = method.endswith("_reverse")
    method = method.removesuffix("_reverse")
    if reverse and path_type == "VP":

        def velocity(x, t):
            t = t.repeat(len(x))
            return transport.velocity(golden_network(x, t), x, t)

        times = OFFICIAL_REVERSED_VP
        end = ode_integrate(velocity, GOLDEN["x1"], times, method=method, atol=1e-6, rtol=1e-3)[-1]
    else:
        sample = Sampler(transport).sample_ode(sampling_method=method, num_steps=20, reverse=reverse)
        end = sample(GOLDEN["x1" if reverse else "x0"], golden_network)[-1]
    assert relative_error(end, GOLDEN[key]) < LOOSE.get(key, 1e-4)


@pytest.mark.parametrize("key", [key for key in GOLDEN if "/sde_norm0/" in key])
def test_sde_without_noise_equals_golden(key):
    path_type, prediction, _, last_step = key.split("/")
    sample = Sampler(create_transport(path_type, prediction)).sample_sde(
        diffusion_form="sigma",
        diffusion_norm=0.0,
        last_step=None if last_step == "None" else last_step,
        last_step_size=0.04,
        num_steps=20,
    )
    assert relative_error(sample(GOLDEN["x0"], golden_network)[-1], GOLDEN[key]) < 1e-4


def test_every_golden_key_of_the_samplers_is_compared():
    keys = {key for key in GOLDEN if key.count("/") == 3 and key.split("/")[2] != "loss"}
    assert keys == {key for key in GOLDEN if "/ode/" in key or "/sde_norm0/" in key}


# ---------------------------------------------------------------------------------------------- ODEs


@pytest.mark.parametrize("method", ODE_METHODS)
@pytest.mark.parametrize("path_type, prediction", COMBINATIONS)
def test_every_ode_method_follows_the_exact_flow_and_back(path_type, prediction, method):
    transport = create_transport(path_type, prediction)
    network = GaussianNetwork(transport)
    t0, t1 = transport.ode_interval()
    x = torch.randn(64, 2, 3, dtype=torch.float64)
    expected = exact_flow(transport.path, x, t0, t1)
    num_steps = {"euler": 800, "dpmpp_2m": 200}.get(method, 80)
    settings = dict(sampling_method=method, num_steps=num_steps, atol=1e-6, rtol=1e-5)
    end = Sampler(transport).sample_ode(**settings)(x, network)[-1]
    tolerance = 2e-2 if method == "euler" else 5e-3
    assert (end - expected).abs().max() < tolerance
    back = Sampler(transport).sample_ode(**settings, reverse=True)(end, network)[-1]
    assert (back - x).abs().max() < 2 * tolerance
    times = torch.cat(network.times)
    assert times.min() >= t0 and times.max() <= t1


@pytest.mark.parametrize("path_type, prediction", COMBINATIONS)
def test_the_default_ode_never_leaves_its_interval_in_float32(path_type, prediction):
    transport = create_transport(path_type, prediction)
    network = GaussianNetwork(transport)
    x = torch.randn(2000, 2)
    end = Sampler(transport).sample_ode()(x, network)[-1]
    t0, t1 = transport.ode_interval()
    assert torch.cat(network.times).min() >= t0 and torch.cat(network.times).max() <= torch.tensor(t1)
    expected = exact_flow(transport.path, x.double(), t0, t1)
    assert (end - expected).abs().max() < 1e-2
    assert end.dtype == torch.float32


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)])
@pytest.mark.parametrize("reverse", [False, True])
def test_fixed_step_methods_reach_their_order(method, order, reverse):
    transport = create_transport("GVP")
    network = GaussianNetwork(transport)
    x = torch.randn(16, 2, dtype=torch.float64)
    ends = (1.0, 0.0) if reverse else (0.0, 1.0)
    expected = exact_flow(transport.path, x, *ends)
    errors = []
    for num_steps in (21, 41):
        sample = Sampler(transport).sample_ode(sampling_method=method, num_steps=num_steps, reverse=reverse)
        errors.append((sample(x, network)[-1] - expected).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("kind", ["ode", "reverse", "sde"])
def test_a_time_shift_moves_the_grid_to_the_noise(kind):
    """Shift 3 takes the noise levels 1 - u to 3 (1 - u) / (1 + 2 (1 - u)), and the ends stay."""
    transport = create_transport(sample_eps=0.1)
    network = GaussianNetwork(transport)
    if kind == "sde":
        sample = Sampler(transport).sample_sde(num_steps=6, time_shift=3.0, last_step=None)
    else:
        sample = Sampler(transport).sample_ode(
            sampling_method="euler", num_steps=6, time_shift=3.0, reverse=kind == "reverse"
        )
    sample(torch.randn(2, 3, dtype=torch.float64), network)
    level = 1 - torch.linspace(0, 1, 6, dtype=torch.float64)
    times = 0.1 + 0.8 * (1 - 3 * level / (1 + 2 * level))
    expected = times.flip(0)[:-1] if kind == "reverse" else times[:-1]
    torch.testing.assert_close(torch.stack(network.times)[:, 0], expected)


@pytest.mark.parametrize("method", NFE_PER_STEP)
def test_the_nfe_of_an_ode_is_as_announced(method):
    transport = create_transport()
    network = GaussianNetwork(transport)
    sample = Sampler(transport).sample_ode(sampling_method=method, num_steps=10)
    sample(torch.randn(2, 3), network)
    assert network.calls == sample.nfe == 9 * NFE_PER_STEP[method]


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5", "explicit_adams", "scipy_solver"])
@pytest.mark.parametrize("reverse", [False, True])
def test_trajectory_on_request(method, reverse):
    transport = create_transport("VP", "noise")
    x = torch.randn(4, 3, dtype=torch.float64)
    settings = dict(sampling_method=method, num_steps=12, reverse=reverse)
    sampler, network = Sampler(transport), GaussianNetwork(transport)
    states = sampler.sample_ode(**settings, trajectory=True)(x, network)
    end = sampler.sample_ode(**settings)(x, network)
    assert states.shape == (12, 4, 3) and end.shape == (1, 4, 3)
    torch.testing.assert_close(states[0], x)
    # An adaptive method interpolates between its own steps; a fixed one gives the same numbers.
    torch.testing.assert_close(states[-1], end[-1], rtol=1e-3, atol=1e-3)


def test_sampling_keeps_one_state_and_no_graph():
    transport = create_transport()
    weight = torch.ones((), requires_grad=True)
    x = torch.randn(2, 3)
    for sample in (Sampler(transport).sample_ode(sampling_method="euler"), Sampler(transport).sample_sde(num_steps=20)):
        states = sample(x, lambda x, t: weight * x)
        assert states.shape[0] == 1 and not states.requires_grad


@pytest.mark.parametrize(
    "method", ["euler", "rk4", "explicit_adams", "dopri5", "ab4", "unipc_3", "Euler", "Heun", "dpmpp_3m_sde"]
)
def test_memory_does_not_grow_with_the_number_of_steps(method):
    """Count the states that are alive when the model is called, by weak references: as many for 60 steps as for 20."""

    def most_alive(num_steps):
        seen, most = [], 0

        def model(x, t):
            nonlocal most
            seen.append(weakref.ref(x))
            most = max(most, sum(reference() is not None for reference in seen))
            return -x

        sampler = Sampler(create_transport())
        make = sampler.sample_sde if method in SDE_METHODS else sampler.sample_ode
        make(sampling_method=method, num_steps=num_steps)(torch.randn(2, 3), model)
        return most

    assert most_alive(60) <= most_alive(20)


def test_the_ode_stores_two_states(monkeypatch):
    stored = []
    original = torchdiffeq.odeint
    monkeypatch.setattr(
        torchdiffeq, "odeint", lambda f, x, times, **more: stored.append(len(times)) or original(f, x, times, **more)
    )
    Sampler(create_transport()).sample_ode(sampling_method="rk4", num_steps=50)(torch.randn(2, 3), lambda x, t: x)
    assert stored == [2]


def test_a_default_eps_does_not_change_a_given_last_step():
    transport = create_transport("Linear", "noise")
    network = GaussianNetwork(transport)
    Sampler(transport).sample_sde(last_step_size=1e-4, num_steps=10)(torch.randn(2, 3), network)
    assert network.times[-1][0].item() == pytest.approx(1 - 1e-4, abs=1e-6)


def test_the_caller_s_tensor_is_not_changed():
    transport = create_transport()
    x = torch.randn(2, 3)
    copy = x.clone()
    Sampler(transport).sample_sde(num_steps=5)(x, GaussianNetwork(transport))
    Sampler(transport).sample_ode(num_steps=5)(x, GaussianNetwork(transport))
    torch.testing.assert_close(x, copy, rtol=0, atol=0)


def test_model_arguments_reach_the_model():
    x = torch.zeros(2, 3)
    sample = Sampler(create_transport()).sample_ode(sampling_method="euler", num_steps=3)
    end = sample(x, lambda x, t, y, scale: scale * y[:, None].expand_as(x), y=torch.tensor([1.0, 2.0]), scale=3.0)[-1]
    torch.testing.assert_close(end, torch.tensor([[3.0] * 3, [6.0] * 3]))


# ---------------------------------------------------------------------------------------------- SDEs


@pytest.mark.parametrize("method", SDE_METHODS)
@pytest.mark.parametrize("path_type, prediction", COMBINATIONS)
def test_every_sde_gives_the_right_distribution(path_type, prediction, method):
    """Six forms and four last steps for each of the 18 cases: all 432 combinations.

    The drift is affine in x, and the noises of all steps are uncorrelated over the particles. So the end state has the
    mean and the std of the scheme itself, and 160 numbers show its bias without a statistical error.
    """
    transport = create_transport(path_type, prediction)
    wrong = []
    for form, last_step in itertools.product(DIFFUSION_FORMS, LAST_STEPS):
        noises = iter(uncorrelated_noises(80, (2, 80)))
        sample = Sampler(transport).sample_sde(
            sampling_method=method,
            diffusion_form=form,
            last_step=last_step,
            last_step_size=0.01,
            num_steps=80,
            randn_like=lambda x, noises=noises: next(noises),
        )
        network = GaussianNetwork(transport)
        end = sample(next(noises), network)[-1]
        assert network.calls == sample.nfe and next(noises, None) is None
        mean, std = end.mean().item(), end.std(correction=0).item()
        # 'Mean' leaves out its step's noise, 2 w last_step_size of variance: 0.02 of 0.49 for the constant form.
        if not (abs(mean - 0.5) < 0.01 and abs(std - 0.7) < 0.03):
            wrong.append((form, last_step, mean, std))
    assert not wrong


@functools.cache
def uncorrelated_noises(count, shape):
    """Return noises (count, *shape), each of mean 0 and std 1, and uncorrelated with each other; all to rounding."""
    columns = torch.randn(math.prod(shape), count + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    columns[:, 0] = 1  # what is orthogonal to it has mean 0
    orthonormal = torch.linalg.qr(columns).Q[:, 1:]
    return (orthonormal.T * math.sqrt(len(columns))).reshape(count, *shape).float()


@pytest.mark.parametrize("method, per_step", [("Euler", 1), ("Heun", 2)])
def test_the_nfe_of_an_sde(method, per_step):
    sampler = Sampler(create_transport("Linear", "noise"))
    for last_step, extra in ((None, 0), ("Mean", 1), ("Tweedie", 1), ("Euler", 1)):
        sample = sampler.sample_sde(sampling_method=method, last_step=last_step, num_steps=250)
        assert sample.nfe == 249 * per_step + extra


@pytest.mark.parametrize("path_type, prediction", COMBINATIONS)
def test_the_sde_keeps_to_its_interval(path_type, prediction):
    for eps, last_step in itertools.product((None, 0.1), (None, "Mean")):
        transport = create_transport(path_type, prediction, sample_eps=eps)
        network = GaussianNetwork(transport)
        Sampler(transport).sample_sde(sampling_method="Heun", last_step=last_step, num_steps=30)(
            torch.randn(8, 2), network
        )
        times = torch.cat(network.times)
        end = 0.9 if eps else 0.96 if last_step else 1 - transport.sample_eps
        assert times.max() <= end + 1e-6
        if eps is not None:
            assert times.max() == pytest.approx(end, abs=1e-6)
            assert times.min() == pytest.approx(0 if path_type == "VP" else eps, abs=1e-6)


def test_sde_noise_comes_from_the_given_source_and_states_are_kept_on_request():
    transport = create_transport()
    drawn = []

    def randn_like(x):
        drawn.append(torch.randn_like(x))
        return drawn[-1]

    sample = Sampler(transport).sample_sde(num_steps=6, randn_like=randn_like, trajectory=True)
    states = sample(torch.randn(3, 2), GaussianNetwork(transport))
    assert len(drawn) == 5
    assert states.shape == (7, 3, 2)  # the start, five steps, the last step


# ---------------------------------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("path_type, prediction", COMBINATIONS)
def test_likelihood_of_gaussian_data(path_type, prediction, context):
    transport = create_transport(path_type, prediction)
    with context():
        x = 0.5 + 0.7 * torch.randn(64, 3, 4)
        logp, z = Sampler(transport).sample_ode_likelihood()(x, GaussianNetwork(transport))
    expected = torch.distributions.Normal(0.5, 0.7).log_prob(x).sum((1, 2))
    bits_per_dim = (logp - expected) / (12 * math.log(2))
    assert bits_per_dim.abs().mean() < 0.03
    assert logp.shape == (64,) and z.shape == x.shape and not logp.requires_grad


def test_likelihood_uses_one_probe_per_solve():
    """A Jacobian that is not diagonal makes the probe visible: the estimated divergence of A x is p' A p, p fixed."""
    transport = create_transport()
    matrix = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    x = torch.zeros(200, 2, dtype=torch.float64)
    logp, _ = Sampler(transport).sample_ode_likelihood()(x, lambda x, t: x @ matrix.T)
    # The exact log-likelihood is that of the prior; each sample's estimate is off by its own p1 p2 = +-1 for the unit
    # of time that the solve lasts. Probes drawn at every call would average out.
    difference = (logp - transport.prior_logp(x)).round(decimals=4)
    assert set(difference.tolist()) == {-1.0, 1.0}


def test_likelihood_of_a_constant_flow():
    """A velocity that does not depend on x moves all points alike and has no divergence."""
    sample = Sampler(create_transport()).sample_ode_likelihood(sampling_method="euler", num_steps=5)
    x = torch.randn(3, 4)
    logp, z = sample(x, lambda x, t: torch.ones_like(x))
    torch.testing.assert_close(z, x - 1)
    torch.testing.assert_close(logp, create_transport().prior_logp(x - 1))
    assert sample.nfe == 4


def test_likelihood_through_a_module_whatever_the_grad_mode():
    module = torch.nn.Linear(4, 4)

    def model(x, t, y):
        return module(x) * y[:, None]

    sample = Sampler(create_transport()).sample_ode_likelihood(sampling_method="rk4", num_steps=4)
    with torch.inference_mode():
        logp, _ = sample(torch.randn(3, 4), model, y=torch.ones(3))
    assert logp.isfinite().all() and module.weight.grad is None


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "method, arguments, message",
    [
        ("sample_ode", dict(sampling_method="Dopri5"), "unknown sampling method 'Dopri5'; choose from dopri5"),
        ("sample_ode", dict(num_steps=1), "num_steps"),
        ("sample_sde", dict(sampling_method="euler"), "unknown sampling method 'euler'; choose from Euler, Heun"),
        ("sample_sde", dict(diffusion_form="inccreasing-decreasing"), "unknown diffusion form"),
        ("sample_sde", dict(last_step="mean"), "unknown last step 'mean'; choose from None, Mean, Tweedie, Euler"),
        ("sample_sde", dict(last_step_size=0.0), "last step size"),
        ("sample_sde", dict(diffusion_norm=-1.0), "diffusion norm"),
        ("sample_sde", dict(diffusion_norm=math.nan), "diffusion norm"),
        ("sample_ode", dict(num_steps=2.5), "num_steps"),
        ("sample_ode_likelihood", dict(sampling_method="rk5"), "unknown sampling method 'rk5'"),
    ],
)
def test_bad_arguments_are_named(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(Sampler(create_transport()), method)(**arguments)


def test_a_network_that_is_not_finite_is_named():
    with pytest.raises(ValueError, match="the network's output is not finite"):
        Sampler(create_transport()).sample_ode()(torch.randn(2, 3), lambda x, t: x / 0)


@pytest.mark.parametrize("path_type, prediction", [("Linear", "noise"), ("GVP", "score"), ("VP", "noise")])
def test_an_eps_of_zero_where_the_drift_is_singular_is_refused(path_type, prediction):
    sampler = Sampler(create_transport(path_type, prediction, sample_eps=0.0))
    with pytest.raises(ValueError, match="singular"):
        sampler.sample_ode()
    if path_type == "VP":  # singular at the end alone, which an SDE does not evaluate
        assert (
            sampler.sample_sde(last_step=None)(torch.randn(2, 3), GaussianNetwork(sampler.transport)).isfinite().all()
        )
    else:
        with pytest.raises(ValueError, match="singular"):
            sampler.sample_sde(last_step=None)


# ---------------------------------------------------------------------------------------------- details


@pytest.mark.parametrize("method, degree", [("dopri5", 4), ("bosh3", 2), ("dopri8", 7)])
def test_an_adaptive_method_ends_its_last_step_at_the_end(method, degree):
    """A method of an order integrates powers of t exactly, unless its last step reaches beyond the end."""
    times = torch.linspace(0, 1, 5, dtype=torch.float64)
    for grid, start, end in ((times, 0.0, 1.0), (times.flip(0), 1.0, 0.0)):
        x = torch.full((2, 3), start, dtype=torch.float64)
        states = ode_integrate(
            lambda x, t: (degree + 1) * t**degree * torch.ones_like(x), x, grid, method=method, atol=1e-2, rtol=1e-2
        )
        torch.testing.assert_close(states[-1], torch.full_like(x, end), rtol=0, atol=1e-12)


def test_a_likelihood_is_the_mean_over_its_probes():
    """With dx/dt = x the divergence is 3 whatever the probe; with a triangular matrix it depends on the probes."""
    sampler, x = Sampler(create_transport()), torch.randn(4, 3, dtype=torch.float64)
    settings = dict(sampling_method="rk4", num_steps=20)
    for num_probes in (1, 2, 3):
        logp, z = sampler.sample_ode_likelihood(**settings, num_probes=num_probes)(x, lambda x, t: x)
        torch.testing.assert_close(logp, create_transport().prior_logp(x / math.e) - 3, rtol=0, atol=1e-4)
    probes = [torch.ones(4, 3), torch.tensor([1.0, -1, 1]).expand(4, 3), torch.tensor([1.0, -1, 1]).expand(4, 3)]
    drawn = iter(probe.double() for probe in probes)
    fn = sampler.sample_ode_likelihood(**settings, num_probes=3, probe_like=lambda x: next(drawn))
    matrix = torch.tensor([[0.0, 1, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.float64)
    logp, z = fn(x, lambda x, t: x @ matrix.T)
    # p' A p is 1, -1 and -1: a mean of -1/3.
    torch.testing.assert_close(logp, create_transport().prior_logp(z) + 1 / 3, rtol=0, atol=1e-6)


def test_the_defaults_of_the_methods():
    """Of the official code, whose callers do not give them."""

    def defaults(method):
        return {key: p.default for key, p in inspect.signature(method).parameters.items() if key != "self"}

    ode = dict(sampling_method="dopri5", num_steps=50, atol=1e-6, rtol=1e-3)
    sde = dict(sampling_method="Euler", diffusion_form="SBDM", diffusion_norm=1.0, last_step="Mean")
    grid = dict(last_step_size=0.04, num_steps=250)
    more = dict(time_grid="uniform", time_shift=1.0, trajectory=False)
    assert defaults(Sampler.sample_ode) == ode | dict(reverse=False) | more
    assert defaults(Sampler.sample_sde) == sde | grid | more | dict(randn_like=torch.randn_like)
    assert defaults(Sampler.sample_ode_likelihood) == ode | dict(num_probes=1, probe_like=None)


def test_the_size_of_a_last_step_that_is_not_made_does_not_matter():
    sampler, x, settings = Sampler(create_transport()), torch.randn(2, 3), dict(last_step=None, num_steps=5)
    torch.manual_seed(0)
    expected = sampler.sample_sde(**settings)(x, lambda x, t: -x)
    torch.manual_seed(0)
    torch.testing.assert_close(sampler.sample_sde(**settings, last_step_size=0.0)(x, lambda x, t: -x), expected)


def test_a_last_step_that_leaves_nothing_to_integrate_is_refused():
    sampler = Sampler(create_transport(sample_eps=0.25))
    sampler.sample_sde(last_step_size=0.74)
    for size in (0.75, 0.8):
        with pytest.raises(ValueError, match=f"last step size {size} leaves nothing of the interval"):
            sampler.sample_sde(last_step_size=size)
