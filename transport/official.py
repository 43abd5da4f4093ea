"""Names of the official code that notebooks and downstream projects use, in terms of this project's."""

import enum

from .path import PATHS, expand_like

ModelType = enum.Enum("ModelType", ["NOISE", "SCORE", "VELOCITY"])  # predictions
PathType = enum.Enum("PathType", ["LINEAR", "GVP", "VP"])
WeightType = enum.Enum("WeightType", ["NONE", "VELOCITY", "LIKELIHOOD"])  # loss weights


def named(member):
    """Return this project's name of a member of the enums, None for `WeightType.NONE`; other values as they are."""
    if isinstance(member, PathType):
        return next(name for name in PATHS if name.upper() == member.name)
    if isinstance(member, (ModelType, WeightType)):
        return None if member is WeightType.NONE else member.name.lower()
    return member


class PathSampler:
    """A `Path` by the official names. Shapes as there: x, x0 and x1 are (N, ...), t is (N,) or broadcasts."""

    def __init__(self, path):
        self.path = path

    def compute_alpha_t(self, t):
        """Return alpha and its time derivative."""
        return self.path.alpha(t), self.path.d_alpha(t)

    def compute_sigma_t(self, t):
        """Return sigma and its time derivative."""
        return self.path.sigma(t), self.path.d_sigma(t)

    def plan(self, t, x0, x1):
        """Return t, the point x_t and its velocity, of noise x0 and data x1."""
        return t, *self.path.interpolate(t, x0, x1)

    def compute_drift(self, x, t):
        """Return (a, b) such that the velocity is b score - a."""
        t = expand_like(t, x)
        return -self.path.d_alpha(t) / self.path.alpha(t) * x, self.path.sigma_wronskian(t) / self.path.alpha(t)

    def compute_diffusion(self, x, t, form="constant", norm=1.0):
        """Return the diffusion w(t) of the SDE, which broadcasts over x."""
        return self.path.diffusion(expand_like(t, x), form, norm)

    def get_velocity_from_score(self, score, x, t):
        return self.path.score_to_velocity(score, x, t)

    def get_noise_from_velocity(self, velocity, x, t):
        return self.path.velocity_to_noise(velocity, x, t)

    def get_score_from_velocity(self, velocity, x, t):
        return self.path.noise_to_score(self.path.velocity_to_noise(velocity, x, t), x, t)


class OfficialNames:
    """The official methods and attributes of a transport."""

    @property
    def model_type(self):
        return ModelType[self.prediction.upper()]

    @property
    def loss_type(self):
        return WeightType[(self.loss_weight or "none").upper()]

    @property
    def path_sampler(self):
        return PathSampler(self.path)

    def check_interval(
        self, train_eps, sample_eps, *, diffusion_form="SBDM", sde=False, reverse=False, eval=False, last_step_size=0.0
    ):
        """Return (t0, t1) of training, or with `eval` of sampling, for other eps than the transport's own.

        Unlike the official code's, the ends of a `reverse` interval are those of the interval, swapped."""
        other = type(self)(self.path, self.prediction, self.loss_weight, train_eps, sample_eps)
        if sde:
            t0, t1 = other.sde_interval(diffusion_form, last_step_size)
        else:
            t0, t1 = other.ode_interval() if eval else other.train_interval()
        return (t1, t0) if reverse else (t0, t1)

    def get_drift(self):
        """Return the velocity of the probability-flow ODE as a function of (x, t, model, **model_kwargs)."""
        return lambda x, t, model, **model_kwargs: self.velocity(model(x, t, **model_kwargs), x, t)

    def get_score(self):
        """Return the score as a function of (x, t, model, **model_kwargs)."""
        return lambda x, t, model, **model_kwargs: self.score(model(x, t, **model_kwargs), x, t)
