"""Representation alignment (REPA, Yu et al. 2025): hidden states agree with the patch features of a frozen encoder."""

import itertools

import torch
from torch import nn

from data.cached import CachedLatents
from data.sources import Source
from training.losses import AuxiliaryLoss
from training.step import num_kept
from utils.encoders import PatchEncoder


class Alignment(AuxiliaryLoss):
    """1 - the cosine similarity of projected tokens and the features of their patches, mean over tokens.

    REPA's loss is that similarity with a minus sign: the gradients are the same. The tokens are those after block
    `block`, counted from 1; (M, kept, D) inside a `route`. The projector is REPA's MLP of three layers `width` wide, or
    iREPA's 3 x 3 convolution of the grid (Singh et al. 2025, arXiv 2512.10794), for which the features of an image are
    normalised, each channel over the patches. The target is `encoder`'s, called with the images, or batch["features"]
    (M, T, `size`) without one. Raise ValueError if the block is missing or the route takes the grid apart."""

    name = "alignment"

    def __init__(self, model, size, block=None, projector="mlp", width=None, route=None, encoder=None):
        super().__init__()
        depth, self.grid = len(model.blocks), tuple(model.x_embedder.grid_size)
        block = default_block(depth) if block is None else block
        if not 1 <= block <= depth:
            raise ValueError(f"--align-block {block}: the model has the blocks 1 to {depth}")
        is_routed = route is not None and route[0] < block <= route[1]
        if is_routed and projector == "conv":
            inside = f"--align-block {block} lies inside --route {route[0]} {route[1]}, where tokens are missing"
            raise ValueError(f"--align-projector conv needs the whole grid: {inside}")
        hidden_size, tokens = model.pos_embed.shape[-1], model.x_embedder.num_patches
        width = width or default_width(hidden_size)
        self.encoder, self.reads_images, self.hidden_blocks = encoder, encoder is not None, (block - 1,)
        if projector == "conv":
            self.projector = nn.Conv2d(hidden_size, size, 3, padding=1)
        else:
            linear = [nn.Linear(*sizes) for sizes in itertools.pairwise((hidden_size, width, width, size))]
            self.projector = nn.Sequential(linear[0], nn.SiLU(), linear[1], nn.SiLU(), linear[2])
        for parameter in self.projector.parameters():
            nn.init.xavier_uniform_(parameter) if parameter.dim() > 1 else nn.init.zeros_(parameter)
        tokens = num_kept(route[2], tokens) if is_routed else tokens
        products = sum(p.numel() for p in self.projector.parameters() if p.dim() > 1)
        self.flops = 3 * 2 * tokens * products + (0 if encoder is None else encoder.flops)
        self.saved_bytes = 4 * tokens * (hidden_size + (4 * width if projector == "mlp" else 0) + 3 * size)

    def forward(self, batch, t, xt, output, hidden):
        (x,) = hidden.values()  # (M, T, D)
        target = batch["features"] if self.encoder is None else self.encoder(batch["images"])  # (M, T, size)
        if isinstance(self.projector, nn.Conv2d):
            std, mean = torch.std_mean(target.to(torch.promote_types(target.dtype, torch.float32)), 1, keepdim=True)
            target = (target - mean) / (std + 1e-6)
            x = self.projector(x.mT.unflatten(2, self.grid)).flatten(2).mT  # (M, T, size)
        else:
            if x.shape[1] < target.shape[1]:
                target = target.take_along_dim(batch["kept"][:, :, None], dim=1)  # (M, kept, size)
            x = self.projector(x)  # (M, T or kept, size)
        # In float32 at least, which is what bf16 and float16 are promoted to.
        return 1 - nn.functional.cosine_similarity(x, target, dim=2).mean(1)


def default_block(depth):
    """Return the block of REPA's recipes: 8 of L and XL, 4 of B; and a third of any other depth."""
    return max(1, min(8, depth // 3))


def default_width(hidden_size):
    """Return REPA's width; a narrow one for models narrower than its B, whose steps would take a quarter longer."""
    return 2048 if hidden_size >= 768 else 512


def alignment_builder(flags, model, source, route):
    """Return the builder of the `Alignment` of flags {key: value}; load its encoder, unless features are cached.

    Raise ValueError if the data hold neither features of that encoder nor images, or the encoder cannot be loaded."""
    name, grid, encoder = flags["align"], model.x_embedder.grid_size, None
    if isinstance(source, CachedLatents) and source.features is not None:
        source.require_features(name, grid)
        size = source.features["width"]
    else:
        if not isinstance(source, Source) and not getattr(source, "stores_images", False):
            missing = f"{source.folder} stores neither features nor images"
            raise ValueError(f"--align: {missing}; make latents with extract_latents.py --features {name}")
        encoder = PatchEncoder(name, grid)
        size = encoder.width
        if not flags["dry_run"]:
            encoder.load()
    how = dict(block=flags["align_block"], projector=flags["align_projector"], width=flags["align_width"])

    def build(model):
        loss = Alignment(model, size, **how, route=route, encoder=encoder)
        loss.weight, loss.until = flags["align_weight"], flags["align_until"]
        return loss

    return build
