"""Stochastic interpolants (SiT; Albergo et al. 2023): paths, training losses, and ODE and SDE samplers.

transport = create_transport("Linear", "velocity")
loss = transport.training_losses(model, x1, dict(y=y))["loss"].mean()
images = Sampler(transport).sample_ode()(noise, model, y=y)[-1]
"""

from .integrators import ADAPTIVE_ODE_METHODS, FIXED_STEP_ODE_METHODS, ODE_METHODS, SDE_METHODS
from .path import DIFFUSION_FORMS, PATHS, check_choice
from .sampler import LAST_STEPS, Sampler
from .transport import LOSS_WEIGHTS, PREDICTIONS, Transport, logit_normal

__all__ = [
    "ADAPTIVE_ODE_METHODS",
    "DIFFUSION_FORMS",
    "FIXED_STEP_ODE_METHODS",
    "LAST_STEPS",
    "LOSS_WEIGHTS",
    "ODE_METHODS",
    "PATHS",
    "PREDICTIONS",
    "SDE_METHODS",
    "Sampler",
    "Transport",
    "create_transport",
    "logit_normal",
]


def create_transport(path_type="Linear", prediction="velocity", loss_weight=None, train_eps=None, sample_eps=None):
    """Make the transport that trains and samples a network.

    Args:
        path_type: 'Linear', 'GVP' or 'VP'.
        prediction: what the network predicts: 'velocity', 'score' or 'noise'.
        loss_weight: None, 'velocity' or 'likelihood': weight over time of score and noise losses. The
            velocity loss is taken unweighted whatever this says, as in the official code.
        train_eps, sample_eps: in [0, 0.5): how far training times and sampling stay from the singular ends of [0, 1]:
            both ends for Linear and GVP, the data end alone for VP. None: 0 for velocity on Linear and GVP, 1e-3 for
            score and noise on them; for VP 1e-5 in training and 1e-3 in sampling. Each is used as given, on its own.

    Raises:
        ValueError: an unknown name, or an eps out of range; the message lists what is allowed.
    """
    for name, value, choices in (
        ("path type", path_type, PATHS),
        ("prediction", prediction, PREDICTIONS),
        ("loss weight", loss_weight, LOSS_WEIGHTS),
    ):
        check_choice(name, value, choices)
    for name, eps in (("train_eps", train_eps), ("sample_eps", sample_eps)):
        if eps is not None and not 0 <= eps < 0.5:
            raise ValueError(f"{name} must lie in [0, 0.5), not {eps}")
    if path_type == "VP":
        default_train_eps, default_sample_eps = 1e-5, 1e-3
    elif prediction == "velocity":
        default_train_eps, default_sample_eps = 0.0, 0.0
    else:
        default_train_eps, default_sample_eps = 1e-3, 1e-3
    return Transport(
        PATHS[path_type](), prediction, loss_weight, train_eps, sample_eps, default_train_eps, default_sample_eps
    )
