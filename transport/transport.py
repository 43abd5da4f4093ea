"""What a network learns along a path: targets, loss weights, time intervals, and velocity and score from its output."""

import math

import torch

from .path import expand_like

PREDICTIONS = ("velocity", "score", "noise")
LOSS_WEIGHTS = (None, "velocity", "likelihood")


def logit_normal(uniform, mean=0.0, std=1.0):
    """Map uniform random numbers in [0, 1) to logit-normal ones: sigmoid(mean + std z), z ~ N(0, 1).

    As times of training (Esser et al. 2024) they are more often in the middle of a path than at its ends; a mean above
    0 is closer to the data.
    """
    return torch.sigmoid(mean + std * torch.special.ndtri(uniform))


class Transport:
    """A path together with a prediction target; made by `create_transport`, which documents the arguments.

    A model is any function `model(x, t, **model_kwargs)` of x (N, ...) and t (N,) in [0, 1] that returns x's shape.
    """

    def __init__(self, path, prediction, loss_weight, train_eps, sample_eps, default_train_eps, default_sample_eps):
        self.path = path
        self.prediction = prediction
        self.loss_weight = loss_weight
        self.train_eps = default_train_eps if train_eps is None else train_eps
        self.sample_eps = default_sample_eps if sample_eps is None else sample_eps
        self.sample_eps_is_default = sample_eps is None

    def _start(self, eps):
        """Where an interval that keeps `eps` off the singular ends begins: VP is singular at the data end alone."""
        return eps if self.path.starts_at_pure_noise else 0.0

    def train_interval(self):
        """(t0, t1) between which training draws its times."""
        return self._start(self.train_eps), 1 - self.train_eps

    def ode_interval(self):
        """(t0, t1) over which the probability-flow ODE is integrated."""
        return self._start(self.sample_eps), 1 - self.sample_eps

    def sde_interval(self, diffusion_form, last_step_size):
        """(t0, t1) over which the SDE is integrated; a last step of `last_step_size` (or 0: none) goes on from t1."""
        start = self.sample_eps
        if self.sample_eps_is_default and diffusion_form == "SBDM":
            start = max(start, 1e-3)  # its diffusion is infinite where alpha = 0
        # With a last step nothing is evaluated beyond it, so the default eps, which keeps off the end, has no say.
        end = last_step_size if last_step_size and self.sample_eps_is_default else max(self.sample_eps, last_step_size)
        return self._start(start), 1 - end

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
        """Loss of each sample: the squared error of velocity, noise, or sigma times score, the last two weighted.

        Args:
            model: see the class.
            x1: (N, ...) data, float32 or float64.
            model_kwargs: further arguments of the model, such as dict(y=labels).
            t, x0: times (N,) and noise like x1, for callers that draw their own; both or none.

        Returns:
            dict: 'loss' (N,), the mean over all but the first dimension, and 'pred', the model's output.
        """
        if (t is None) != (x0 is None):
            raise ValueError("give both t and x0, or none of them")
        if t is None:
            t, x0, x1 = self.sample(x1)
        xt, ut = self.path.interpolate(t, x0, x1)
        pred = model(xt, t, **(model_kwargs or {}))
        if pred.shape != xt.shape:
            raise ValueError(f"the model returned shape {tuple(pred.shape)} for inputs of shape {tuple(xt.shape)}")
        if self.prediction == "velocity":
            error = pred - ut
        elif self.prediction == "noise":
            error = pred - x0
        else:
            error = pred * self.path.sigma(expand_like(t, xt)) + x0
        loss = (error**2).flatten(1).mean(1)
        if self.prediction != "velocity":
            loss = self._weight(t) * loss
        return {"loss": loss, "pred": pred}

    def _weight(self, t):
        """Weight (N,) of noise and score losses, both of which are squared errors of x0."""
        alpha, sigma, wronskian = self.path.alpha(t), self.path.sigma(t), self.path.wronskian(t)
        if self.loss_weight == "velocity":
            return (wronskian / alpha) ** 2
        if self.loss_weight == "likelihood":
            return wronskian / (alpha * sigma)
        return torch.ones_like(t)

    def velocity(self, output, x, t):
        """Velocity of the probability-flow ODE (N, ...) from a model's output at x (N, ...), t (N,)."""
        if self.prediction == "velocity":
            return output
        if self.prediction == "noise":
            return self.path.noise_to_velocity(output, x, t)
        return self.path.score_to_velocity(output, x, t)

    def noise(self, output, x, t):
        """E[x0 | x_t = x] (N, ...) from a model's output at x (N, ...), t (N,)."""
        if self.prediction == "velocity":
            return self.path.velocity_to_noise(output, x, t)
        if self.prediction == "noise":
            return output
        return self.path.score_to_noise(output, x, t)

    def score(self, output, x, t):
        """Score (N, ...) from a model's output at x (N, ...), t (N,)."""
        if self.prediction == "score":
            return output
        return self.path.noise_to_score(self.noise(output, x, t), x, t)

    def prior_logp(self, x0):
        """Log density of noise x0 (N, ...) under N(0, I), in nats: (N,)."""
        x0 = x0.flatten(1)
        return -0.5 * (x0**2).sum(1) - 0.5 * x0.shape[1] * math.log(2 * math.pi)
