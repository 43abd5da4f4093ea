"""Losses beside the main one: subclass `AuxiliaryLoss` in a file of this folder, and build it in train.py."""

import torch
from torch import nn
from torch.nn import functional as F

from models import patchify, select_tokens
from utils import distributed


class AuxiliaryLoss(nn.Module):
    """A loss that is added to the main one. Its parameters are trained, saved and resumed; no EMA has them."""

    name = "auxiliary"  # its key in the log and in checkpoints
    weight = 1.0  # its factor in the sum of losses
    hidden_blocks = ()  # indices of the blocks whose outputs it reads; 'inner' is the inner head's
    reads_images = False  # whether it reads the images, also where training reads cached latents
    until = None  # the step from which on it is left out; None: never
    flops = 0  # operations of its own for an image, forward and backward, two per multiply-add
    saved_bytes = 0  # that autograd saves in it for an image

    def is_active(self, step):
        """Return whether the loss is computed after `step` steps."""
        return self.until is None or step < self.until

    def forward(self, batch, t, xt, output, hidden):
        """Return the loss of each sample (M,) of a micro-batch.

        Args:
            batch: dict with 'y' (M,), the labels, 'x1' and 'x0' (M, C, h, w), data and noise, and with 'images'
                (M, 3, H, W) in [-1, 1] if the loss reads them; 'kept' (M, K), the tokens that skip no block, or None
                if all are such.
            t: (M,) times.
            xt: (M, C, h, w) points of the path.
            output: (M, C, h, w) output of the network.
            hidden: {index: (M, T, D)} tokens after each block of `hidden_blocks`, (M, K, D) if tokens skip it."""


class InnerHead(AuxiliaryLoss):
    """The main loss of what the inner head of a SiT predicts (internal guidance, Zhou et al. 2025).

    The patches of tokens that skip its block are left out: in sampling the head reads none such.
    `transport` gives the loss; a `weight` of 0.5 is that of the paper's code."""

    name, hidden_blocks = "inner_head", ("inner",)

    def __init__(self, model, transport, weight=0.5):
        super().__init__()
        self.transport, self.weight = transport, weight
        self.patch_size, self.out_channels = model.patch_size, model.out_channels

    def forward(self, batch, t, xt, output, hidden):
        predicted = hidden["inner"].float().unflatten(2, (-1, self.out_channels))  # (M, T, p^2, out_channels)
        x0, x1 = (patchify(batch[key], self.patch_size) for key in ("x0", "x1"))  # (M, T, p^2, C)
        if predicted.shape[1] < x0.shape[1]:
            x0, x1 = (select_tokens(x, batch["kept"]) for x in (x0, x1))  # (M, K, p^2, C)
        return self.transport.loss(predicted[..., : x0.shape[3]], t, x0, x1)


class DirectionLoss(AuxiliaryLoss):
    """1 - cosine of the angle between predicted and true velocity (Yao et al. 2024, FasterDiT; in LightningDiT, too).

    The vectors are the channels of each pixel of a latent, as in LightningDiT's code, of which the mean is taken; with
    one channel, whose vectors would have a sign alone, the whole image is one vector."""

    name = "direction"

    def __init__(self, transport, weight):
        super().__init__()
        self.transport, self.weight = transport, weight

    def forward(self, batch, t, xt, output, hidden):
        true = self.transport.path.interpolate(t, batch["x0"], batch["x1"])[1]  # (M, C, h, w)
        vectors = [self.transport.velocity(output, xt, t), true]
        if xt.shape[1] == 1:
            vectors = [v.flatten(1).unsqueeze(2) for v in vectors]  # (M, h w, 1)
        # A root mean square counts as 0.1 at least: a new network predicts 0, and AdamW would long remember the slope.
        floor = 0.1 * vectors[0].shape[1] ** 0.5
        return (1 - F.cosine_similarity(*vectors, dim=1, eps=floor)).flatten(1).mean(1)


def build_losses(builders, model, seed):
    """Return the losses that `builders`, functions of the model, make: with the same initial weights on every rank.

    Raise ValueError if two losses have one name, or one reads a block that the model does not have."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(distributed.seed_from(seed, len(builders)))
        losses = [build(model) for build in builders]
    if len({loss.name for loss in losses}) < len(losses):
        raise ValueError(f"auxiliary losses must have different names, not {[loss.name for loss in losses]}")
    known = {*range(len(model.blocks)), *(["inner"] if model.inner_head else [])}
    for loss in losses:
        if not known.issuperset(loss.hidden_blocks):
            raise ValueError(f"loss {loss.name!r} reads blocks {loss.hidden_blocks}, and there are {len(model.blocks)}")
    return losses
