"""Training steps of train.py on random latents."""

import torch

from models import SiT
from training.step import EMA, Trainer
from transport import create_transport
from utils import distributed

LR, DECAY, DROPOUT = 1e-4, 0.9999, 0.1  # train.py's defaults


def start_trainer(model_config, device, precision, parallel="one process", grad_checkpoint=False):
    """Return a `Trainer` of SiT(**model_config) with random weights, set up by train.py's defaults."""
    weights = SiT(**model_config).state_dict()
    with torch.device("meta"):
        model = SiT(**model_config)
    mesh = distributed.mesh(device, None) if parallel == "fsdp" else None
    emas, adamw = [EMA("ema", DECAY)], dict(lr=LR)
    trainer = Trainer(model, create_transport(), device, precision, emas, [], parallel, mesh, adamw)
    trainer.start(weights, grad_checkpoint=grad_checkpoint)
    return trainer


def training_step(trainer, batch_size):
    """Return a function that makes a step, from the forward pass to the EMA, always on the same random latents."""
    model, device = trainer.model, trainer.device
    shape = (batch_size, *model.latent_shape)
    x1, x0 = torch.randn(shape, device=device), torch.randn(shape, device=device)
    t, drop = torch.rand(2, batch_size, device=device)
    batch = {"y": torch.zeros(batch_size, dtype=torch.long, device=device)}

    def step():
        losses, _ = trainer.forward_backward(batch, x1, t, x0, drop < DROPOUT)
        trainer.update(0, losses.mean(), LR)

    return step
