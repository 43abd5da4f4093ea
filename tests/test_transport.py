import math

import pytest
import torch
from conftest import load_golden

from transport import DIFFUSION_FORMS, PATHS, PREDICTIONS, create_transport, logit_normal

GOLDEN = load_golden("transport.npz")
X0, X1, T, OUTPUT = (GOLDEN[key] for key in ("x0", "x1", "t", "model_output"))
GOLDEN_PATHS = ("Linear", "GVP", "VP")
FORMS = ("SBDM", "sigma", "linear", "decreasing")


def close_to_golden(value, key, tolerance=1e-4):
    expected = GOLDEN[key].to(value.dtype)
    assert value.shape == expected.shape
    error = (value - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"{key}: relative error {error:.2e}"


@pytest.mark.parametrize("name", GOLDEN_PATHS)
def test_path_equals_golden(name):
    path = create_transport(name).path
    xt, ut = path.interpolate(T, X0, X1)
    values = {
        "alpha": path.alpha(T),
        "d_alpha": path.d_alpha(T),
        "sigma": path.sigma(T),
        "d_sigma": path.d_sigma(T),
        "xt": xt,
        "ut": ut,
        "score_from_velocity": path.noise_to_score(path.velocity_to_noise(OUTPUT, xt, T), xt, T),
        "noise_from_velocity": path.velocity_to_noise(OUTPUT, xt, T),
        "velocity_from_score": path.score_to_velocity(OUTPUT, xt, T),
        **{f"diffusion/{form}": path.diffusion(T, form) for form in FORMS},
    }
    for key, value in values.items():
        close_to_golden(value, f"{name}/{key}")
    covered = {f"{name}/{key}" for key in values}
    assert covered == {k for k in GOLDEN if k.startswith(f"{name}/") and k.split("/")[1] not in PREDICTIONS}


@pytest.mark.parametrize("weight", [None, "velocity", "likelihood"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", GOLDEN_PATHS)
def test_losses_equal_golden(name, prediction, weight):
    transport = create_transport(name, prediction, weight)
    terms = transport.training_losses(lambda x, t: OUTPUT, X1, t=T, x0=X0)
    close_to_golden(terms["loss"], f"{name}/{prediction}/loss/{weight}")
    assert terms["pred"] is OUTPUT
    close_to_golden(terms["xt"], f"{name}/xt")


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_equal_autograd(name):
    path = create_transport(name).path
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    for function, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        (expected,) = torch.autograd.grad(function(t).sum(), t)
        torch.testing.assert_close(derivative(t), expected, rtol=1e-10, atol=1e-10)
    general = path.d_alpha(t) * path.sigma(t) - path.alpha(t) * path.d_sigma(t)
    torch.testing.assert_close(path.wronskian(t), general, rtol=1e-9, atol=0)
    torch.testing.assert_close(path.sigma_wronskian(t), path.sigma(t) * general, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", PATHS)
def test_ends_of_the_path(name):
    path = create_transport(name).path
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    alpha, sigma = path.alpha(ends), path.sigma(ends)
    assert alpha[1] == 1 and sigma[1] == 0
    assert alpha[0] == (pytest.approx(0.00657, abs=1e-5) if name == "VP" else 0)
    assert sigma[0] == pytest.approx(1, abs=1e-4)


def test_vp_equals_its_definition():
    t = torch.linspace(0, 0.9, 10, dtype=torch.float64)
    path = create_transport("VP").path
    log_alpha = -0.25 * (1 - t) ** 2 * 19.9 - 0.5 * (1 - t) * 0.1
    torch.testing.assert_close(path.alpha(t), log_alpha.exp())
    torch.testing.assert_close(path.sigma(t), (1 - (2 * log_alpha).exp()).sqrt())


@pytest.mark.parametrize("name", PATHS)
def test_conversions_hold_for_the_true_pair_and_round_trip(name):
    path = create_transport(name).path
    x0, x1 = torch.randn(2, 50, 3, dtype=torch.float64)
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    xt, ut = path.interpolate(t, x0, x1)
    score = -x0 / path.sigma(t)[:, None]
    close = dict(rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(path.velocity_to_noise(ut, xt, t), x0, **close)
    torch.testing.assert_close(path.velocity_to_data(ut, xt, t), x1, **close)
    torch.testing.assert_close(path.noise_to_score(path.velocity_to_noise(ut, xt, t), xt, t), score, **close)
    torch.testing.assert_close(path.noise_to_velocity(x0, xt, t), ut, **close)
    torch.testing.assert_close(path.score_to_velocity(score, xt, t), ut, **close)
    torch.testing.assert_close(path.score_to_noise(path.noise_to_score(x0, xt, t), xt, t), x0, **close)


@pytest.mark.parametrize("name", ("Linear", "GVP"))
def test_velocity_to_noise_is_finite_at_both_ends(name):
    path = create_transport(name).path
    x, velocity = torch.randn(2, 2, 5)
    noise = path.velocity_to_noise(velocity, x, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(noise[0], x[0])
    assert noise.isfinite().all()


@pytest.mark.parametrize("form", DIFFUSION_FORMS)
def test_diffusion_is_positive_and_scales_with_its_norm(form):
    t = torch.linspace(0.01, 0.99, 50)
    for name in PATHS:
        path = create_transport(name).path
        assert (path.diffusion(t, form) >= 0).all() and path.diffusion(t, form).max() > 0
        torch.testing.assert_close(path.diffusion(t, form, 3.0), 3 * path.diffusion(t, form))
        assert path.diffusion(t, form, 0.0).abs().max() == 0


def test_forms_that_the_official_code_cannot_compute():
    path = create_transport("Linear").path
    t = torch.tensor([0.25, 0.5])
    torch.testing.assert_close(path.diffusion(t, "constant"), torch.ones(2))
    torch.testing.assert_close(path.diffusion(t, "increasing-decreasing"), torch.tensor([0.5, 1.0]))


# The default (t0, t1) of training and of ODE sampling.
INTERVALS = {
    ("Linear", "velocity"): ((0, 1), (0, 1)),
    ("GVP", "velocity"): ((0, 1), (0, 1)),
    ("Linear", "score"): ((1e-3, 1 - 1e-3), (1e-3, 1 - 1e-3)),
    ("GVP", "noise"): ((1e-3, 1 - 1e-3), (1e-3, 1 - 1e-3)),
    ("VP", "velocity"): ((0, 1 - 1e-5), (0, 1 - 1e-3)),
    ("VP", "score"): ((0, 1 - 1e-5), (0, 1 - 1e-3)),
    ("VP", "noise"): ((0, 1 - 1e-5), (0, 1 - 1e-3)),
}


@pytest.mark.parametrize("name, prediction", INTERVALS)
def test_default_intervals(name, prediction):
    transport = create_transport(name, prediction)
    assert (transport.train_interval(), transport.ode_interval()) == INTERVALS[name, prediction]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PATHS)
def test_an_eps_that_is_given_is_used_on_its_own(name, prediction):
    default = create_transport(name, prediction)
    start = 0.0 if name == "VP" else 0.125
    only_sample = create_transport(name, prediction, sample_eps=0.125)
    assert only_sample.ode_interval() == (start, 0.875)
    assert only_sample.train_interval() == default.train_interval()
    only_train = create_transport(name, prediction, train_eps=0.125)
    assert only_train.train_interval() == (start, 0.875)
    assert only_train.ode_interval() == default.ode_interval()
    zero = create_transport(name, prediction, train_eps=0.0)
    assert zero.train_interval() == (0, 1)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PATHS)
def test_training_times_fill_their_interval(name, prediction):
    transport = create_transport(name, prediction, train_eps=0.1)
    seen = []

    def model(x, t):
        seen.append(t)
        return torch.zeros_like(x)

    transport.training_losses(model, torch.zeros(4000, 1))
    start, end = transport.train_interval()
    assert start <= seen[0].min() < start + 0.01 and end - 0.01 < seen[0].max() <= end
    assert seen[0].mean() == pytest.approx((start + end) / 2, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PATHS)
def test_the_exact_prediction_has_no_loss(name, dtype):
    x1 = torch.randn(8, 2, 4, 4, dtype=dtype)
    for prediction in PREDICTIONS:
        transport = create_transport(name, prediction, train_eps=0.05)
        t, x0, _ = transport.sample(x1)
        _, ut = transport.path.interpolate(t, x0, x1)
        sigma = transport.path.sigma(t)[:, None, None, None]
        answer = {"velocity": ut, "noise": x0, "score": -x0 / sigma}[prediction]
        loss = transport.training_losses(lambda x, t, y, answer=answer: answer, x1, dict(y=0), t=t, x0=x0)["loss"]
        assert loss.shape == (8,) and loss.dtype == dtype
        assert loss.abs().max() < 1e-8


@pytest.mark.parametrize("name", PATHS)
def test_weighted_noise_loss_is_the_velocity_loss(name):
    """What the velocity weight is for: it makes the noise loss that of the velocity it implies."""
    noise_transport = create_transport(name, "noise", "velocity", train_eps=0.05)
    velocity_transport = create_transport(name, "velocity", train_eps=0.05)
    x1, output = torch.randn(2, 16, 3, dtype=torch.float64)
    t, x0, _ = noise_transport.sample(x1)
    xt, _ = noise_transport.path.interpolate(t, x0, x1)
    velocity = noise_transport.path.noise_to_velocity(output, xt, t)
    loss = noise_transport.training_losses(lambda x, t: output, x1, t=t, x0=x0)["loss"]
    expected = velocity_transport.training_losses(lambda x, t: velocity, x1, t=t, x0=x0)["loss"]
    torch.testing.assert_close(loss, expected)


def test_prior_log_density():
    transport = create_transport()
    x0 = torch.randn(3, 2, 5)
    expected = torch.distributions.Normal(0, 1).log_prob(x0).sum((1, 2))
    torch.testing.assert_close(transport.prior_logp(x0), expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(path_type="linear"), "unknown path type 'linear'; choose from Linear, GVP, VP"),
        (dict(prediction="velocty"), "unknown prediction 'velocty'; choose from velocity, score, noise"),
        (dict(loss_weight="none"), "unknown loss weight"),
        (dict(train_eps=-0.1), "train_eps must lie in"),
        (dict(sample_eps=0.5), "sample_eps must lie in"),
        (dict(sample_eps=math.nan), "sample_eps must lie in"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_transport(**arguments)


def test_times_without_noise_are_refused():
    with pytest.raises(ValueError, match="both t and x0"):
        create_transport().training_losses(lambda x, t: x, torch.zeros(2, 3), t=torch.zeros(2))


def test_a_model_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match="shape"):
        create_transport().training_losses(lambda x, t: x[:, :1], torch.zeros(2, 3))


def test_logit_normal_times_are_those_of_the_definition():
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    t = logit_normal(uniform, mean=0.5, std=0.8)
    logits = torch.log(t / (1 - t))
    assert logits.mean().item() == pytest.approx(0.5, abs=1e-6) and logits.std().item() == pytest.approx(0.8, abs=2e-3)
    assert logit_normal(torch.tensor([0.0, 0.5])).tolist() == [0.0, 0.5]
