"""What a network learns along a path: targets, loss weights, time intervals, and velocity and score from its output."""

import math

import torch

from .official import OfficialNames, PathType, named
from .path import PATHS, check_choice, expand_like

PREDICTIONS = ("velocity", "score", "noise")
LOSS_WEIGHTS = (None, "velocity", "likelihood")


def create_transport(path_type="Linear", prediction="velocity", loss_weight=None, train_eps=None, sample_eps=None):
    """Return the `Transport` that trains and samples a network; `path_type` is a name in `PATHS`, or of `PathType`."""
    path_type = named(path_type)
    check_choice("path type", path_type, PATHS)
    return Transport(PATHS[path_type](), prediction, loss_weight, train_eps, sample_eps)


def logit_normal(uniform, mean=0.0, std=1.0):
    """Map uniform random numbers in [0, 1) to logit-normal ones: sigmoid(mean + std z), z ~ N(0, 1).

    As training times (Esser et al. 2024) they lie in the middle of a path more often than at its ends; a mean above 0
    moves them towards the data."""
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform))


class Transport(OfficialNames):
    """A path together with a prediction target.

    A model is any function `model(x, t, **model_kwargs)` of x (N, ...) and t (N,) in [0, 1] that returns x's shape.

    Args:
        path: a `Path`.
        prediction: what the network predicts: 'velocity', 'score' or 'noise'.
        loss_weight: None, 'velocity' or 'likelihood': weight over time of score and noise losses. It has no effect on
            the velocity loss, as in the official code.
        train_eps, sample_eps: in [0, 0.5): how far training times and sampling stay from the singular ends of [0, 1]:
            both ends, or the data end alone if the path is not `singular_at_noise`. None: the path's default; 0 for
            velocity if the path has `finite_derivatives`. Each is used as given, whether or not the other is.
        path_type, model_type, loss_type: path, prediction and loss weight by the enums of the official code instead.

    Raise ValueError for an unknown name, or an eps out of range; the message lists what is allowed."""

    def __init__(
        self,
        path=None,
        prediction="velocity",
        loss_weight=None,
        train_eps=None,
        sample_eps=None,
        *,
        path_type=None,
        model_type=None,
        loss_type=None,
    ):
        path = PATHS[named(path_type or PathType.LINEAR)]() if path is None else path
        prediction, loss_weight = named(model_type or prediction), named(loss_type or loss_weight)
        check_choice("prediction", prediction, PREDICTIONS)
        check_choice("loss weight", loss_weight, LOSS_WEIGHTS)
        for name, eps in (("train_eps", train_eps), ("sample_eps", sample_eps)):
            if eps is not None and not 0 <= eps < 0.5:
                raise ValueError(f"{name} must lie in [0, 0.5), not {eps}")
        self.path, self.prediction, self.loss_weight = path, prediction, loss_weight
        needs_eps = prediction != "velocity" or not path.finite_derivatives
        self.train_eps = (path.default_train_eps if needs_eps else 0.0) if train_eps is None else train_eps
        self.sample_eps = (path.default_sample_eps if needs_eps else 0.0) if sample_eps is None else sample_eps
        self.sample_eps_is_default = sample_eps is None

    def _start(self, eps):
        return eps if self.path.singular_at_noise else 0.0

    def train_interval(self):
        """Return (t0, t1), between which training draws its times."""
        return self._start(self.train_eps), 1 - self.train_eps

    def ode_interval(self):
        """Return (t0, t1), over which the probability-flow ODE is integrated."""
        return self._start(self.sample_eps), 1 - self.sample_eps

    def sde_interval(self, diffusion_form, last_step_size):
        """Return (t0, t1), over which the SDE is integrated; a last step of `last_step_size` (0: none) follows."""
        start = self.sample_eps
        if self.sample_eps_is_default and not self.is_regular(0.0, diffusion_form):
            # The diffusion may be infinite at pure noise (SBDM), or the score of a velocity 0 / 0 (wronskian(0) = 0).
            start = max(start, self.path.default_sample_eps)
        # With a last step nothing is evaluated after t1, so the default eps, which keeps off the end, is not needed.
        end = last_step_size if last_step_size and self.sample_eps_is_default else max(self.sample_eps, last_step_size)
        return self._start(start), 1 - end

    def is_regular(self, t, diffusion_form=None):
        """Return whether the drift at time t is finite: that of the ODE, or of the SDE with a diffusion form."""
        t, one = torch.tensor([t], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        drift = self.velocity(one, one, t)
        if diffusion_form is not None:
            drift = drift + self.path.diffusion(t, diffusion_form) * (1 + self.score(one, one, t))
        return bool(torch.isfinite(drift).all())

    def times(self, uniform):
        """Map uniform random numbers in [0, 1) to training times, any shape."""
        t0, t1 = self.train_interval()
        return t0 + (t1 - t0) * uniform

    def sample(self, x1):
        """Draw times (N,) and noise like x1 (N, ...) from PyTorch's global generator; return (t, x0, x1)."""
        x0 = torch.randn_like(x1)
        t = self.times(torch.rand(len(x1), dtype=x1.dtype, device=x1.device))
        return t, x0, x1

    def training_losses(self, model, x1, model_kwargs=None, *, t=None, x0=None):
        """Compute the loss of each sample: the squared error of velocity or, weighted, of noise or sigma times score.

        x1 is data (N, ...), float32 or float64; `model_kwargs` are more arguments of the model, such as dict(y=labels);
        t (N,) and x0 are times and noise, for callers that draw them. Return a dict: 'loss' (N,), a mean over all other
        dimensions; 'pred' and 'xt' (N, ...), the model's output and input."""
        if (t is None) != (x0 is None):
            raise ValueError("give both t and x0, or none of them")
        if t is None:
            t, x0, x1 = self.sample(x1)
        xt, _ = self.path.interpolate(t, x0, x1)
        pred = model(xt, t, **(model_kwargs or {}))
        if pred.shape != xt.shape:
            raise ValueError(f"the model returned shape {tuple(pred.shape)} for inputs of shape {tuple(xt.shape)}")
        return {"loss": self.loss(pred, t, x0, x1), "pred": pred, "xt": xt}

    def loss(self, output, t, x0, x1):
        """Return the loss (N,) of `training_losses` of a model's output (N, ...) at t (N,), noise x0 and data x1."""
        if self.prediction == "score":
            error = output * self.path.sigma(expand_like(t, x0)) + x0
        else:
            error = output - (self.path.interpolate(t, x0, x1)[1] if self.prediction == "velocity" else x0)
        loss = (error**2).flatten(1).mean(1)
        return loss if self.prediction == "velocity" else self._weight(t) * loss

    def _weight(self, t):
        """Return the weight (N,) of noise and score losses, both of which are squared errors of x0."""
        alpha, sigma, wronskian = self.path.alpha(t), self.path.sigma(t), self.path.wronskian(t)
        if self.loss_weight == "velocity":
            return (wronskian / alpha) ** 2
        if self.loss_weight == "likelihood":
            return wronskian / (alpha * sigma)
        return torch.ones_like(t)

    def velocity(self, output, x, t):
        """Return the velocity (N, ...) of the probability-flow ODE from a model's output at x (N, ...), t (N,)."""
        if self.prediction == "velocity":
            return output
        if self.prediction == "noise":
            return self.path.noise_to_velocity(output, x, t)
        return self.path.score_to_velocity(output, x, t)

    def noise(self, output, x, t):
        """Return E[x0 | x_t = x] (N, ...) from a model's output at x (N, ...), t (N,)."""
        if self.prediction == "velocity":
            return self.path.velocity_to_noise(output, x, t)
        if self.prediction == "noise":
            return output
        return self.path.score_to_noise(output, x, t)

    def score(self, output, x, t):
        """Return the score (N, ...) from a model's output at x (N, ...), t (N,)."""
        if self.prediction == "score":
            return output
        return self.path.noise_to_score(self.noise(output, x, t), x, t)

    def prior_logp(self, x0):
        """Return the log density (N,) of noise x0 (N, ...) under N(0, I), in nats."""
        x0 = x0.flatten(1)
        return -0.5 * (x0**2).sum(1) - 0.5 * x0.shape[1] * math.log(2 * math.pi)
