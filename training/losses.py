"""Losses beside the main one: subclass `AuxiliaryLoss` in a file of this folder, and build it in train.py."""

import torch
from torch import nn

from utils import distributed


class AuxiliaryLoss(nn.Module):
    """A loss that is added to the main one. Its parameters are trained, saved and resumed; no EMA has them."""

    name = "auxiliary"  # its key in the log and in checkpoints
    weight = 1.0  # its factor in the sum of losses
    hidden_blocks = ()  # indices of the blocks whose outputs it reads
    reads_images = False  # whether it reads the images, also where training reads cached latents
    until = None  # the step from which on it is left out; None: never

    def is_active(self, step):
        """Return whether the loss is computed after `step` steps."""
        return self.until is None or step < self.until

    def forward(self, batch, t, xt, output, hidden):
        """Return the loss of each sample (M,) of a micro-batch.

        Args:
            batch: dict with 'y' (M,), the labels, 'x1' and 'x0' (M, C, h, w), data and noise, and with 'images'
                (M, 3, H, W) in [-1, 1] if the loss reads them.
            t: (M,) times.
            xt: (M, C, h, w) points of the path.
            output: (M, C, h, w) output of the network.
            hidden: {index: (M, T, D)} tokens after each block of `hidden_blocks`."""


def build_losses(builders, model, seed):
    """Return the losses that `builders`, functions of the model, make: with the same initial weights on every rank.

    Raise ValueError if two losses have one name, or one reads a block that the model does not have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(distributed.seed_from(seed, len(builders)))
        losses = [build(model) for build in builders]
    if len({loss.name for loss in losses}) < len(losses):
        raise ValueError(f"auxiliary losses must have different names, not {[loss.name for loss in losses]}")
    for loss in losses:
        if not all(0 <= block < len(model.blocks) for block in loss.hidden_blocks):
            raise ValueError(f"loss {loss.name!r} reads blocks {loss.hidden_blocks}, and there are {len(model.blocks)}")
    return losses
