"""SiT (Ma et al. 2024): the DiT transformer (Peebles & Xie 2023) as velocity, noise or score network of an interpolant.

Shapes: N images, C channels, H = W = input_size, T = (H / patch_size)^2 tokens, D = hidden_size."""

import functools
import math

import torch
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch import nn
from torch.utils.checkpoint import checkpoint


def modulate(x, shift, scale):
    """Scale and shift tokens x (N, T, D) by one vector per image (N, D) each."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """Embed times t (N,) in [0, 1] as vectors (N, D)."""

    def __init__(self, hidden_size, frequency_embedding_size=256):
        super().__init__()
        linear = nn.Linear(frequency_embedding_size, hidden_size)
        self.mlp = nn.Sequential(linear, nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.frequency_embedding_size = frequency_embedding_size

    @staticmethod
    def timestep_embedding(t, dim, max_period=10000):
        """Return cosines and sines (N, dim) of t (N,) at dim / 2 frequencies from 1 down to 1 / max_period radians."""
        half = dim // 2
        dtype = torch.promote_types(t.dtype, torch.float32)  # in bf16 the times of neighbouring steps are the same
        exponents = torch.arange(half, dtype=dtype, device=t.device) / half
        angles = t[:, None].to(dtype) * torch.exp(-math.log(max_period) * exponents)  # (N, dim / 2)
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)

    def forward(self, t):
        frequencies = self.timestep_embedding(t, self.frequency_embedding_size)  # (N, frequency_embedding_size)
        return self.mlp(frequencies.to(self.mlp[0].weight.dtype))  # (N, D)


class LabelEmbedder(nn.Module):
    """Embed class labels (N,) as vectors (N, D), and drop some: they become the null class, the index `num_classes`."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes, self.dropout_prob = num_classes, dropout_prob

    def forward(self, labels, force_drop_ids=None):
        """Drop the labels where `force_drop_ids` (N,) is True; None: at random in training, none in evaluation."""
        if force_drop_ids is None and self.training and self.dropout_prob > 0:
            force_drop_ids = torch.rand(labels.shape, device=labels.device) < self.dropout_prob
        if force_drop_ids is not None:
            labels = torch.where(force_drop_ids, self.num_classes, labels)
        return self.embedding_table(labels)  # (N, D)


class SiTBlock(nn.Module):
    """A transformer block conditioned by adaLN-Zero: shift, scale and gate of both branches come from c (N, D)."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        gelu = functools.partial(nn.GELU, approximate="tanh")
        self.mlp = Mlp(hidden_size, hidden_features=int(hidden_size * mlp_ratio), act_layer=gelu)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        # (N, D) each
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))  # (N, T, D)
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))  # (N, T, D)
        return x


class FinalLayer(nn.Module):
    """Map tokens (N, T, D) to patches of pixels (N, T, patch_size^2 * out_channels)."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiT(nn.Module):
    """The network: it maps an image, a time and a class label to an image of the same shape.

    To add an option, give __init__ a keyword argument whose default builds the network of today. A flag of train.py
    with the argument's name is passed on to it. Checkpoints store the arguments, so those without the option load as
    what they were. Buffers must be persistent: a new model is made without data, and then filled.

    Args:
        input_size: height and width of the input in pixels, or latent pixels; a multiple of patch_size.
        patch_size: side of the square patches that become tokens.
        in_channels: channels of the input.
        hidden_size: width of the transformer; a multiple of num_heads and of 4.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLP's hidden layer relative to hidden_size.
        class_dropout_prob: share of labels replaced by the null class in training; 0: no null class, no guidance.
        num_classes: number of classes; the null class is the index after the last.
        learn_sigma: predict twice the channels and discard the second half, as the released ImageNet models do.

    Raise ValueError if sizes do not fit each other."""

    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        class_dropout_prob=0.1,
        num_classes=1000,
        learn_sigma=True,
    ):
        super().__init__()
        sizes = dict(input_size=input_size, patch_size=patch_size, in_channels=in_channels, hidden_size=hidden_size)
        for name, value in dict(sizes, depth=depth, num_heads=num_heads, num_classes=num_classes).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be greater than 0, not {mlp_ratio}")
        if input_size % patch_size:
            raise ValueError(f"input_size {input_size} is not a multiple of patch_size {patch_size}")
        if hidden_size % num_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of num_heads {num_heads}")
        if hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of 4, as the position embedding needs")
        if not 0 <= class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1), not {class_dropout_prob}")

        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes, self.learn_sigma = num_classes, learn_sigma
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        # True: training stores no activations inside blocks, and computes them again in the backward pass.
        self.grad_checkpoint = False

        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # A parameter that is not trained, not a buffer: released checkpoints hold it among the parameters.
        self.pos_embed = nn.Parameter(torch.zeros(1, self.x_embedder.num_patches, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(SiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self):
        """Initialise as DiT does; the zeros make every block the identity and the output 0 at first (adaLN-Zero)."""

        def initialize_linear(module):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        self.apply(initialize_linear)
        with torch.no_grad():
            self.pos_embed.copy_(sincos_position_embedding(self.pos_embed.shape[-1], self.x_embedder.grid_size[0]))
        # The patch embedding is a convolution that acts as a linear layer, and is initialised as one.
        projection = self.x_embedder.proj
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        nn.init.zeros_(projection.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        modulations = [module.adaLN_modulation[-1] for module in (*self.blocks, self.final_layer)]
        for linear in (*modulations, self.final_layer.linear):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def unpatchify(self, x):
        """Join patches (N, T, patch_size^2 * out_channels) to images (N, out_channels, H, W)."""
        p, c = self.patch_size, self.out_channels
        h, w = self.x_embedder.grid_size
        x = x.reshape(x.shape[0], h, w, p, p, c)
        x = torch.einsum("nhwpqc->nchpwq", x)  # (N, c, h, p, w, p)
        return x.reshape(x.shape[0], c, h * p, w * p)

    def forward(self, x, t, y, force_drop_ids=None, hidden_blocks=()):
        """Predict velocity, noise or score, whichever the network is trained for.

        Args:
            x: (N, in_channels, H, W) noisy images or latents.
            t: (N,) times in [0, 1], or (1,) for one that all share; 0 is noise, 1 is data.
            y: (N,) int64 class labels in [0, num_classes], num_classes being the null class.
            force_drop_ids: (N,) bool, labels to replace by the null class; None: at random, in training mode alone.
            hidden_blocks: indices of blocks, in [0, depth), whose output is wanted too, for losses on hidden states.

        Return (N, in_channels, H, W); with `hidden_blocks`, that and a list of (N, T, D), one for each of them."""
        return self.forward_embedded(x, t, self.y_embedder(y, force_drop_ids), hidden_blocks)

    def forward_embedded(self, x, t, labels, hidden_blocks=()):
        """Do what `forward` does, for labels that are embedded already (N, D). This part of it can be compiled."""
        # In this order the sum is laid out as the positions are, token by token; the patches are channel by channel.
        x = self.pos_embed + self.x_embedder(x)  # (N, T, D)
        c = self.t_embedder(t) + labels  # (N, D)
        hidden = {}
        for index, block in enumerate(self.blocks):
            if self.grad_checkpoint and self.training:
                x = checkpoint(block, x, c, use_reentrant=False)  # (N, T, D)
            else:
                x = block(x, c)  # (N, T, D)
            if index in hidden_blocks:
                hidden[index] = x
        x = self.final_layer(x, c)  # (N, T, patch_size^2 * out_channels)
        x = self.unpatchify(x)[:, : self.in_channels]  # (N, in_channels, H, W)
        return (x, [hidden[index] for index in hidden_blocks]) if hidden_blocks else x

    def forward_with_cfg(self, x, t, y, cfg_scale, guided_channels=3):
        """Predict with classifier-free guidance: unconditional + scale (conditional - unconditional).

        Ho & Salimans (2022), with their w = cfg_scale - 1. x is (2N, C, H, W), of which the first half is used twice; t
        (2N,) or (1,); y (2N,), N classes and N times the null class. The leading `guided_channels` (None: all) are
        guided, 3 as the released models were sampled; the rest is as predicted for each half. Return (2N, C, H, W): the
        guided prediction, twice."""
        half = x[: len(x) // 2]
        output = self.forward(torch.cat([half, half]), t, y).to(x.dtype)  # a difference that bf16 would round
        guided_channels = self.in_channels if guided_channels is None else guided_channels
        guided, rest = output[:, :guided_channels], output[:, guided_channels:]
        conditional, unconditional = guided.chunk(2)
        guided = unconditional + cfg_scale * (conditional - unconditional)
        return torch.cat([torch.cat([guided, guided]), rest], dim=1)


def sincos_position_embedding(dim, grid_size):
    """Return the fixed 2-D sine-cosine position embedding (grid_size^2, dim), row by row (He et al. 2022, MAE).

    The first half of the channels encodes the column, the second the row; each half is sines, then cosines."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies  # (grid_size, dim / 4)
    one_axis = torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)  # (grid_size, dim / 2)
    columns = one_axis[None, :, :].expand(grid_size, -1, -1)
    rows = one_axis[:, None, :].expand(-1, grid_size, -1)
    return torch.cat([columns, rows], dim=2).reshape(grid_size**2, dim).float()


# DiT, table 1.
SIZES = {
    "S": dict(hidden_size=384, depth=12, num_heads=6),
    "B": dict(hidden_size=768, depth=12, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, num_heads=16),
    "XL": dict(hidden_size=1152, depth=28, num_heads=16),
}

SiT_models = {
    f"SiT-{size}/{patch_size}": functools.partial(SiT, patch_size=patch_size, **width)
    for size, width in SIZES.items()
    for patch_size in (2, 4, 8)
}

# The names of the official code.
SiT_S_2, SiT_S_4, SiT_S_8 = (SiT_models[f"SiT-S/{patch_size}"] for patch_size in (2, 4, 8))
SiT_B_2, SiT_B_4, SiT_B_8 = (SiT_models[f"SiT-B/{patch_size}"] for patch_size in (2, 4, 8))
SiT_L_2, SiT_L_4, SiT_L_8 = (SiT_models[f"SiT-L/{patch_size}"] for patch_size in (2, 4, 8))
SiT_XL_2, SiT_XL_4, SiT_XL_8 = (SiT_models[f"SiT-XL/{patch_size}"] for patch_size in (2, 4, 8))
