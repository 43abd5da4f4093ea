"""Stochastic interpolants (SiT; Albergo et al. 2023): paths, training losses, and ODE and SDE samplers.

transport = create_transport("Linear", "velocity")
loss = transport.training_losses(model, x1, dict(y=y))["loss"].mean()
images = Sampler(transport).sample_ode()(noise, model, y=y)[-1]"""

from .integrators import ADAPTIVE_ODE_METHODS, ODE_METHODS, SDE_METHODS, TOLERANT_ODE_METHODS
from .official import ModelType, PathType, WeightType
from .path import DIFFUSION_FORMS, PATHS
from .sampler import LAST_STEPS, Sampler
from .time_grids import TIME_GRIDS, check_times
from .transport import LOSS_WEIGHTS, PREDICTIONS, Transport, create_transport, logit_normal
