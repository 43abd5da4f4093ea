"""SiT (Ma et al. 2024): the DiT transformer (Peebles & Xie 2023) as velocity, noise or score network of an interpolant.

Shapes: N images, C channels, (H, W) = input_size, T = (H / patch_size) (W / patch_size) tokens, D = hidden_size."""

import functools
import math

import torch
from timm.layers import GluMlp, to_2tuple
from timm.models.vision_transformer import Attention, Mlp, PatchEmbed
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# The options of a block beside its sizes, and the blocks of --block.
CHOICES = {"norm": ("layer", "rms"), "mlp": ("gelu", "swiglu"), "position": ("sincos", "rope")}
BLOCKS = {"plain": {}, "modern": dict(qk_norm=True, norm="rms", mlp="swiglu", position="rope")}


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


class HeadNorm(nn.RMSNorm):
    """RMSNorm of queries or keys (N, heads, T, d) over d with a learned scale (Dehghani et al. 2023, ViT-22B)."""

    def forward(self, x):
        # One dtype, because the kernel that computes bf16 in float32 takes no two of them.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class RotaryAttention(Attention):
    """Attention whose queries and keys are rotated by their tokens' positions (RoPE, Su et al. 2021)."""

    def forward(self, x, rotation):
        """Return (N, T, D) for tokens x (N, T, D); `rotation` is as `rotate` takes it."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, T, d) each
        q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v)  # (N, heads, T, d)
        else:
            x = (q * self.scale @ k.transpose(2, 3)).softmax(dim=3) @ v  # (N, heads, T, d)
        return self.proj(x.transpose(1, 2).flatten(2))  # (N, T, D)


def rotate(x, rotation):
    """Rotate the channels i and i + d/2 of x (N, heads, T, d), for each i, as a pair, in float32 at least.

    `rotation` (2, T, d/2), or (2, N, 1, T, d/2) for other tokens in each image, holds the angles' cosines and sines."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def norm_layer(name, hidden_size):
    """Return a norm of tokens without weights, 'layer' or 'rms' (Zhang & Sennrich 2019)."""
    kind = nn.LayerNorm if name == "layer" else nn.RMSNorm
    return kind(hidden_size, elementwise_affine=False, eps=1e-6)


class TanhGELU(nn.GELU):
    """GELU in its tanh approximation, x (1 + tanh(u)) / 2 = x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3)."""

    def __init__(self):
        super().__init__(approximate="tanh")

    def forward(self, x):
        if torch.compiler.is_compiling() and x.device.type == "cpu":  # where tanh takes three times as long
            y = x.to(torch.promote_types(x.dtype, torch.float32))
            return (y * torch.sigmoid(math.sqrt(8 / math.pi) * (y + 0.044715 * y**3))).to(x.dtype)
        return super().forward(x)


def mlp_layer(name, hidden_size, hidden_features):
    """Return an MLP, 'gelu', or 'swiglu' (Shazeer 2020), fc2(SiLU(a) b) with (a, b) = fc1(x), of as many weights.

    For that each of its branches is 2/3 as wide, rounded to a multiple of 8."""
    if name == "swiglu":
        width = max(1, round(hidden_features / 12)) * 8
        return GluMlp(hidden_size, 2 * width, act_layer=nn.SiLU, gate_last=False)
    return Mlp(hidden_size, hidden_features, act_layer=TanhGELU)


class SiTBlock(nn.Module):
    """A transformer block conditioned by adaLN-Zero: shift, scale and gate of both branches come from c (N, D)."""

    def __init__(self, hidden_size, num_heads, mlp_ratio, qk_norm=False, norm="layer", mlp="gelu", position="sincos"):
        super().__init__()
        if position == "rope" and hidden_size // num_heads % 4:
            raise ValueError(f"position rope needs hidden_size / num_heads = {hidden_size // num_heads} to divide by 4")
        for name, value in dict(norm=norm, mlp=mlp, position=position).items():
            if value not in CHOICES[name]:
                raise ValueError(f"unknown {name} {value!r}; choose from {', '.join(CHOICES[name])}")
        self.norm1 = norm_layer(norm, hidden_size)
        attention = RotaryAttention if position == "rope" else Attention
        head_norm = functools.partial(HeadNorm, eps=1e-6)
        self.attn = attention(hidden_size, num_heads, qkv_bias=True, qk_norm=qk_norm, norm_layer=head_norm)
        self.norm2 = norm_layer(norm, hidden_size)
        self.mlp = mlp_layer(mlp, hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c, rotation=None):
        """Return (N, T, D) for tokens x (N, T, D); `rotation`, for position 'rope' alone, is as `rotate` takes it."""
        # (N, D) each
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        positions = () if rotation is None else (rotation,)
        attended = self.attn(modulate(self.norm1(x), shift_msa, scale_msa), *positions)  # (N, T, D)
        x = x + gate_msa.unsqueeze(1) * attended  # (N, T, D)
        x = x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))  # (N, T, D)
        return x


class FinalLayer(nn.Module):
    """Map tokens (N, T, D) to patches of pixels (N, T, patch_size^2 * out_channels)."""

    def __init__(self, hidden_size, patch_size, out_channels, norm="layer"):
        super().__init__()
        self.norm_final = norm_layer(norm, hidden_size)
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
        input_size: height and width of the input in pixels, or latent pixels; a multiple of patch_size, or two (H, W).
        patch_size: side of the square patches that become tokens.
        in_channels: channels of the input.
        hidden_size: width of the transformer; a multiple of num_heads and of 4.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: width of the MLP's hidden layer relative to hidden_size.
        class_dropout_prob: share of labels replaced by the null class in training; 0: no null class, no guidance.
        num_classes: number of classes; the null class is the index after the last.
        learn_sigma: predict twice the channels and discard the second half, as the released ImageNet models do.
        qk_norm: normalise queries and keys, see `HeadNorm`.
        norm: 'layer' or 'rms', the norm of tokens.
        mlp: 'gelu' or 'swiglu', see `mlp_layer`.
        position: 'sincos', positions added to the tokens; 'rope', beside that, rotations of queries and keys, as in
            LightningDiT (Yao et al. 2025). hidden_size / num_heads must be a multiple of 4 for it.
        inner_head: blocks, at least 1 and fewer than `depth`, after which a second head predicts what the last one does
            from the hidden state, to guide the output by (internal guidance, Zhou et al. 2025); None: no such head.
        trained_size: the input_size whose positions the tokens' are scaled to; None: input_size.

    Raise ValueError if sizes do not fit each other, or an option is unknown."""

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
        qk_norm=False,
        norm="layer",
        mlp="gelu",
        position="sincos",
        inner_head=None,
        trained_size=None,
    ):
        super().__init__()
        height, width = to_2tuple(input_size)
        sizes = dict(patch_size=patch_size, in_channels=in_channels, hidden_size=hidden_size)
        for name, value in dict(sizes, depth=depth, num_heads=num_heads, num_classes=num_classes).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be greater than 0, not {mlp_ratio}")
        for name, size in dict(input_size=input_size, trained_size=trained_size or input_size).items():
            if min(to_2tuple(size)) < 1 or any(side % patch_size for side in to_2tuple(size)):
                raise ValueError(f"{name} {size} is not a multiple of patch_size {patch_size}")
        for divisor, name in ((num_heads, f"num_heads {num_heads}"), (4, "4, as the position embedding needs")):
            if hidden_size % divisor:
                raise ValueError(f"hidden_size {hidden_size} is not a multiple of {name}")
        if not 0 <= class_dropout_prob < 1:
            raise ValueError(f"class_dropout_prob must lie in [0, 1), not {class_dropout_prob}")
        if inner_head is not None and not 1 <= inner_head < depth:
            raise ValueError(f"inner_head {inner_head} must be at least 1, and less than the depth, {depth}")

        self.input_size = height if height == width else (height, width)
        self.patch_size, self.in_channels, self.latent_shape = patch_size, in_channels, (in_channels, height, width)
        self.trained_grid = [side // patch_size for side in to_2tuple(trained_size or input_size)]
        self.num_classes, self.inner_head, self.position = num_classes, inner_head, position
        self.learn_sigma, self.out_channels = learn_sigma, in_channels * 2 if learn_sigma else in_channels
        # True: training stores no activations inside blocks, and computes them again in the backward pass.
        self.grad_checkpoint = False

        self.x_embedder = PatchEmbed((height, width), patch_size, in_channels, hidden_size, bias=True)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        # A parameter that is not trained, not a buffer: released checkpoints hold it among the parameters.
        self.pos_embed = nn.Parameter(torch.zeros(1, self.x_embedder.num_patches, hidden_size), requires_grad=False)
        options = dict(qk_norm=qk_norm, norm=norm, mlp=mlp, position=position)
        self.blocks = nn.ModuleList(SiTBlock(hidden_size, num_heads, mlp_ratio, **options) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, norm)
        self.initialize_weights()
        if inner_head is not None:  # made last, the other weights are the same as without it
            self.inner_layer = FinalLayer(hidden_size, patch_size, self.out_channels, norm)
            for parameter in self.inner_layer.parameters():
                nn.init.zeros_(parameter)

    def initialize_weights(self):
        """Initialise as DiT does; the zeros make every block the identity and the output 0 at first (adaLN-Zero)."""

        def initialize_linear(module):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        self.apply(initialize_linear)
        with torch.no_grad():
            self.pos_embed.copy_(self.sincos_positions())
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

    def sincos_positions(self):
        """Return what `pos_embed` holds (1, T, D), on the CPU."""
        return sincos_position_embedding(self.pos_embed.shape[-1], self.x_embedder.grid_size, self.trained_grid)[None]

    def rotation(self, x):
        """Return the rotations of the tokens x (N, T, D) as `rotate` takes them; None unless position is 'rope'.

        The pairs' first half is rotated by the row, the second by the column, at d/4 frequencies each (d: head)."""
        if self.position != "rope":
            return None
        angles = position_angles(self.blocks[0].attn.head_dim, self.x_embedder.grid_size, self.trained_grid, x.device)
        angles = torch.cat(list(angles), dim=1)  # (T, d / 2)
        return torch.stack([angles.cos(), angles.sin()]).to(torch.promote_types(x.dtype, torch.float32))

    def unpatchify(self, x):
        """Join patches (N, T, patch_size^2 * out_channels) to images (N, out_channels, H, W)."""
        p, c = self.patch_size, self.out_channels
        h, w = self.x_embedder.grid_size
        x = x.reshape(x.shape[0], h, w, p, p, c)
        x = torch.einsum("nhwpqc->nchpwq", x)  # (N, c, h, p, w, p)
        return x.reshape(x.shape[0], c, h * p, w * p)

    def forward(self, x, t, y, force_drop_ids=None, hidden_blocks=(), route=None):
        """Predict velocity, noise or score, whichever the network is trained for.

        Args:
            x: (N, in_channels, H, W) noisy images or latents.
            t: (N,) times in [0, 1], or (1,) for one that all share; 0 is noise, 1 is data.
            y: (N,) int64 class labels in [0, num_classes], num_classes being the null class.
            force_drop_ids: (N,) bool, labels to replace by the null class; None: at random, in training mode alone.
            hidden_blocks: indices of blocks, in [0, depth), whose output is wanted too, for losses on hidden states;
                'inner' is the patches (N, T, patch_size^2 * out_channels) that the inner head predicts.
            route: (FROM, TO, kept), the tokens `kept` (N, K) int64 of each image, in order, go through blocks[FROM:TO];
                the others skip these blocks and join again (TREAD, Krause et al. 2025). None: no token skips any.

        Return (N, in_channels, H, W); with `hidden_blocks`, that and a list of (N, T, D), one for each of them, or of
        (N, K, D) for blocks that tokens skip."""
        return self.forward_embedded(x, t, self.y_embedder(y, force_drop_ids), hidden_blocks, route)

    def forward_embedded(self, x, t, labels, hidden_blocks=(), route=None):
        """Do what `forward` does, for labels that are embedded already (N, D). This part of it can be compiled."""
        # In this order the sum is laid out as the positions are, token by token; the patches are channel by channel.
        x = self.pos_embed + self.x_embedder(x)  # (N, T, D)
        c, rotation = self.t_embedder(t) + labels, self.rotation(x)  # (N, D), (2, T, d / 2)
        start, end, kept = route or (None, None, None)
        hidden = {}
        for index, block in enumerate(self.blocks):
            if index == start:
                whole, rotations, x = x, rotation, select_tokens(x, kept)  # (N, K, D)
                rotation = None if rotation is None else rotation[:, kept].unsqueeze(2)  # (2, N, 1, K, d / 2)
            if self.grad_checkpoint and self.training:
                x = checkpoint(block, x, c, rotation, use_reentrant=False)  # (N, T, D)
            else:
                x = block(x, c, rotation)  # (N, T, D)
            if index in hidden_blocks:
                hidden[index] = x
            if index + 1 == self.inner_head and "inner" in hidden_blocks:
                hidden["inner"] = self.inner_layer(x, c)  # (N, T, patch_size^2 * out_channels)
            if index + 1 == end:
                x, rotation = replace_tokens(whole, kept, x), rotations  # (N, T, D)
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


def position_angles(dim, grid_size, trained_size=None, device=None):
    """Return row and column of each token, row by row, times dim / 4 frequencies from 1 down: (2, T, dim / 4), float64.

    `grid_size`, in tokens, is a number or (rows, columns). Row r of R counts as r R' / R, R' being the rows of
    `trained_size`, and columns alike (position interpolation, Chen et al. 2023); None: `grid_size`."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim // 4))
    pairs = zip(to_2tuple(grid_size), to_2tuple(trained_size or grid_size), strict=True)
    rows, columns = (torch.arange(n, dtype=torch.float64, device=device) * (trained / n) for n, trained in pairs)
    return torch.cartesian_prod(rows, columns).T[:, :, None] * frequencies


def patchify(x, patch_size):
    """Cut images (N, C, H, W) into the patches of their tokens (N, T, patch_size^2, C)."""
    return F.pixel_unshuffle(x, patch_size).flatten(2).unflatten(1, (x.shape[1], -1)).permute(0, 3, 2, 1)


def flat_indices(kept, num_tokens):
    """Return the rows (N K,) of tokens `kept` (N, K) among those of all images, (N num_tokens, D)."""
    return (kept + num_tokens * torch.arange(len(kept), device=kept.device)[:, None]).flatten()


def select_tokens(x, kept):
    """Return the tokens `kept` (N, K) of x (N, T, D), as (N, K, D)."""
    return x.flatten(0, 1).index_select(0, flat_indices(kept, x.shape[1])).unflatten(0, kept.shape)


def replace_tokens(x, kept, values):
    """Return x (N, T, D) with `values` (N, K, D) in place of its tokens `kept` (N, K)."""
    indices = flat_indices(kept, x.shape[1])
    return x.flatten(0, 1).index_copy(0, indices, values.flatten(0, 1).to(x.dtype)).unflatten(0, x.shape[:2])


def sincos_position_embedding(dim, grid_size, trained_size=None):
    """Return the fixed 2-D sine-cosine position embedding (T, dim), row by row (He et al. 2022, MAE).

    The first half of the channels encodes the column, the second the row; each half is sines, then cosines. The sizes
    are as `position_angles` takes them."""
    rows, columns = position_angles(dim, grid_size, trained_size)
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1).float()


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
