"""Interpolant paths between noise and data: their coefficients and the identities that follow from them.

Time runs from noise to data, everywhere in this project: t = 0 is noise x0 ~ N(0, I), t = 1 is data x1, and
    x_t = alpha(t) x1 + sigma(t) x0          (SiT, section 2, with time reversed as in the official code)
with alpha(0) ~ 0, sigma(0) ~ 1, alpha(1) = 1, sigma(1) = 0. Nothing here knows of a network.

Every conversion is linear algebra on x = alpha x1 + sigma x0 and velocity = d_alpha x1 + d_sigma x0, whose determinant
is, up to its sign, `wronskian` = d_alpha sigma - alpha d_sigma, together with score = -x0 / sigma. Written so, and not
through d_alpha / alpha, only a score at sigma = 0, and a velocity from noise or score at alpha = 0, are singular."""

import math

import torch

# The shapes of the diffusion w(t); see `Path.diffusion`.
DIFFUSION_FORMS = {
    "constant": lambda path, t: torch.ones_like(t),
    # The reverse of the forward diffusion of score-based models; infinite where alpha(t) = 0.
    "SBDM": lambda path, t: path.sigma_wronskian(t) / path.alpha(t),
    "sigma": lambda path, t: path.sigma(t),
    "linear": lambda path, t: 1 - t,
    "decreasing": lambda path, t: 0.25 * (torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda path, t: torch.sin(math.pi * t) ** 2,
}


def check_choice(name, value, choices):
    """Raise ValueError that lists the choices if `value` is none of them."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(map(str, choices))}")


def expand_like(t, x):
    """Reshape t (N,) to (N, 1, ..., 1) with as many dimensions as x (N, ...), so that it multiplies row by row."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


class Path:
    """A path is alpha, sigma and their time derivatives. To add one, write a subclass and name it in `PATHS`.

    A subclass has the methods alpha(t) and sigma(t), the coefficients of data and noise, and d_alpha(t) and d_sigma(t).
    Their t is a tensor of any shape with values in [0, 1], and the result is like t. In all methods that have x, x0 or
    x1, these, velocity, score and noise are (N, ...) and t is (N,)."""

    singular_at_noise = True  # alpha(0) = 0: times then keep an eps from 0, too, where noise gives no velocity
    finite_derivatives = True  # of alpha and sigma on [0, 1]; otherwise velocity predictions need an eps, too
    default_train_eps = 1e-3  # for predictions that need an eps, as noise and score always do
    default_sample_eps = 1e-3

    def wronskian(self, t):
        """Return d_alpha sigma - alpha d_sigma, which is positive for 0 < t < 1: how fast data displaces noise."""
        return self.d_alpha(t) * self.sigma(t) - self.alpha(t) * self.d_sigma(t)

    def sigma_wronskian(self, t):
        """Return sigma times `wronskian`. Override it where it is finite though d_sigma is not (VP, t = 1)."""
        return self.sigma(t) * self.wronskian(t)

    def interpolate(self, t, x0, x1):
        """Return the point x_t of the path and its velocity u_t = d x_t / dt, both (N, ...)."""
        t = expand_like(t, x1)
        xt = self.alpha(t) * x1 + self.sigma(t) * x0
        ut = self.d_alpha(t) * x1 + self.d_sigma(t) * x0
        return xt, ut

    def velocity_to_noise(self, velocity, x, t):
        """Return E[x0 | x_t = x] from E[d x_t / dt | x_t = x]."""
        t = expand_like(t, x)
        return (self.d_alpha(t) * x - self.alpha(t) * velocity) / self.wronskian(t)

    def velocity_to_data(self, velocity, x, t):
        """Return E[x1 | x_t = x]; not finite where d_sigma is not."""
        t = expand_like(t, x)
        return (self.sigma(t) * velocity - self.d_sigma(t) * x) / self.wronskian(t)

    def noise_to_velocity(self, noise, x, t):
        """Invert `velocity_to_noise`; singular where alpha(t) = 0."""
        t = expand_like(t, x)
        return (self.d_alpha(t) * x - self.wronskian(t) * noise) / self.alpha(t)

    def noise_to_score(self, noise, x, t):
        """Return grad_x log p_t(x) = -E[x0 | x_t = x] / sigma; singular where sigma(t) = 0."""
        return -noise / self.sigma(expand_like(t, x))

    def score_to_noise(self, score, x, t):
        """Invert `noise_to_score`."""
        return -self.sigma(expand_like(t, x)) * score

    def score_to_velocity(self, score, x, t):
        """Return the velocity, the drift of the probability-flow ODE, from the score; singular where alpha(t) = 0."""
        t = expand_like(t, x)
        return (self.d_alpha(t) * x + self.sigma_wronskian(t) * score) / self.alpha(t)

    def diffusion(self, t, form, norm=1.0):
        """Return w(t), the diffusion of the SDE dx = (velocity + w score) dt + sqrt(2 w) dW, as in the official code.

        The paper writes w / 2 and sqrt(w), so this w is half of the paper's. Any w >= 0 leaves the path's marginals
        unchanged; `form`, a name in DIFFUSION_FORMS, chooses its shape and `norm` its scale. The result is like t."""
        check_choice("diffusion form", form, DIFFUSION_FORMS)
        return norm * DIFFUSION_FORMS[form](self, t)


class LinearPath(Path):
    """alpha = t, sigma = 1 - t (also known as rectified flow, or flow matching on the optimal-transport path)."""

    def alpha(self, t):
        return t

    def sigma(self, t):
        return 1 - t

    def d_alpha(self, t):
        return torch.ones_like(t)

    def d_sigma(self, t):
        return -torch.ones_like(t)


class GVPPath(Path):
    """alpha = sin(pi t / 2), sigma = cos(pi t / 2): generalised variance preserving, alpha^2 + sigma^2 = 1."""

    def alpha(self, t):
        return torch.sin(math.pi / 2 * t)

    def sigma(self, t):
        return torch.sin(math.pi / 2 * (1 - t))  # cos(pi t / 2) with an exact zero at t = 1

    def d_alpha(self, t):
        return math.pi / 2 * self.sigma(t)

    def d_sigma(self, t):
        return -math.pi / 2 * self.alpha(t)


class VPPath(Path):
    """Variance preserving diffusion of Song et al. (2021) with linear beta, run from noise to data.

    log alpha = -(1-t)^2 (beta_max - beta_min) / 4 - (1-t) beta_min / 2 and sigma = sqrt(1 - alpha^2). alpha(0) = 0.0066
    is small but not zero, so x_0 is N(0, I) to that precision; d_sigma is infinite at t = 1."""

    singular_at_noise = False
    finite_derivatives = False
    default_train_eps = 1e-5

    def __init__(self, beta_min=0.1, beta_max=20.0):
        self.beta_min, self.beta_max = beta_min, beta_max

    def log_alpha(self, t):
        return -0.25 * (1 - t) ** 2 * (self.beta_max - self.beta_min) - 0.5 * (1 - t) * self.beta_min

    def d_log_alpha(self, t):
        return 0.5 * (1 - t) * (self.beta_max - self.beta_min) + 0.5 * self.beta_min

    def alpha(self, t):
        return torch.exp(self.log_alpha(t))

    def sigma(self, t):
        # expm1 keeps the digits that 1 - alpha^2 loses near t = 1.
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))

    def d_alpha(self, t):
        return self.alpha(t) * self.d_log_alpha(t)

    def d_sigma(self, t):
        return -(self.alpha(t) ** 2) * self.d_log_alpha(t) / self.sigma(t)

    def wronskian(self, t):
        return self.d_alpha(t) / self.sigma(t)  # the general form, with alpha^2 + sigma^2 = 1 used

    def sigma_wronskian(self, t):
        return self.d_alpha(t)


PATHS = {"Linear": LinearPath, "GVP": GVPPath, "VP": VPPath}
