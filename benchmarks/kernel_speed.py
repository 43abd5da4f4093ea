"""Parts of a block by themselves: python benchmarks/kernel_speed.py

Attention by backend and head size. SiT-XL has heads of 72 numbers, no power of two. Each backend of
PyTorch that takes the sizes is measured on heads as they are and on heads filled up with zeros to 80, 96 and 128, which
changes nothing in the result. "Two products" keeps the (T, T) weights; compute.py has it for few tokens on a CPU.

Modulation (adaLN): shifts, scales and gates of all blocks by a product for each block, as the model has it; by one
product with the weights of all blocks, laid together beforehand, as sampling could; and laid together in every step, as
training would have to.

Rows are measured in turn, round by round; medians over rounds.
"""

import contextlib
import pathlib
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import measuring  # noqa: E402

from models import SIZES  # noqa: E402
from utils import command_line
from utils import distributed

BACKENDS = {
    "PyTorch's choice": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "PyTorch's plain": SDPBackend.MATH,
    "two products": "two products",
}
PADDED = (80, 96, 128)


def attention(backend, q, k, v, head_size, gradient):
    """A function that computes attention of heads filled up to `head_size`, and its gradients if asked for."""
    scale = q.shape[-1] ** -0.5

    def compute():
        if backend == "two products":
            output = (q * scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        else:
            filling = head_size - q.shape[-1]
            padded = [torch.nn.functional.pad(x, (0, filling)) for x in (q, k, v)] if filling else (q, k, v)
            with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                output = torch.nn.functional.scaled_dot_product_attention(*padded, scale=scale)[..., : q.shape[-1]]
        if gradient is not None:
            torch.autograd.grad(output, (q, k, v), gradient)
        return output

    return compute


def works(function):
    """Whether a backend takes the sizes, the precision and the device."""
    try:
        function()
    except RuntimeError:
        return False
    return True


def modulations(size, batch_size, device):
    """{name: function} that computes the modulation of all blocks of a model of a size, for a batch in bf16."""
    width, depth = SIZES[size]["hidden_size"], SIZES[size]["depth"]
    c = torch.randn(batch_size, width, device=device, dtype=torch.bfloat16)
    weights = [0.02 * torch.randn(6 * width, width, device=device, dtype=torch.bfloat16) for _ in range(depth)]
    together = torch.cat(weights)
    linear = torch.nn.functional.linear
    return {
        "block by block": lambda: [linear(c, weight) for weight in weights],
        "all blocks at once": lambda: linear(c, together).chunk(depth, dim=1),
        "all at once, laid together first": lambda: linear(c, torch.cat(weights)).chunk(depth, dim=1),
    }


def build_parser():
    parser = command_line.Parser(description="Attention by backend and head size, and modulation.")
    add = command_line.flag_group(parser, "measurement")
    add("--size", command_line.one_of(*SIZES), "|".join(SIZES), "of the model, whose heads these are", default="XL")
    add("--tokens", command_line.integer(1), "N", "per image; 256 at 256 x 256 with patches of 2", default=256)
    add("--batch-size", command_line.integer(1), "N", "images (default: 32 on a GPU, 4 on a CPU)")
    add("--rounds", command_line.integer(1), "N", "rounds over all rows", default=5)
    add("--repeats", command_line.integer(1), "N", "calls of a row in a round (default: 50 on a GPU, 2 on a CPU)")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    with command_line.user_errors(parser):
        device = distributed.init()
    on_gpu = device.type == "cuda"
    batch_size, repeats = args.batch_size or (32 if on_gpu else 4), args.repeats or (50 if on_gpu else 2)
    heads = SIZES[args.size]["num_heads"]
    head_size = SIZES[args.size]["hidden_size"] // heads
    shape = (batch_size, heads, args.tokens, head_size)
    torch.manual_seed(0)
    # Laid out as the model has them: token by token, and in each q, k and v of all heads.
    qkv = torch.randn(batch_size, args.tokens, 3, heads, head_size, device=device, dtype=torch.bfloat16)
    q, k, v = (x.requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0))
    gradient = torch.randn_like(qkv[:, :, 0]).transpose(1, 2)
    forward, both = {}, {}
    for name, backend in BACKENDS.items():
        more = () if backend == "two products" else PADDED
        for size in (head_size, *(size for size in more if size > head_size)):
            function = attention(backend, q.detach(), k.detach(), v.detach(), size, None)
            backward = attention(backend, q, k, v, size, gradient)
            if works(function) and works(backward):  # and both are warm
                forward[name, size], both[name, size] = function, backward
    medians = [
        {
            row: measuring.median(values)
            for row, values in measuring.seconds_in_turn(rows, args.rounds, repeats, device).items()
        }
        for rows in (forward, both)
    ]
    print(f"heads of SiT-{args.size}: {shape} in bf16; {measuring.where(device)}\n")
    base = [column["PyTorch's choice", head_size] for column in medians]
    lines = [
        [
            name,
            size,
            *(
                f"{column[name, size] * 1e3:.3f} ({b / column[name, size]:.2f})"
                for column, b in zip(medians, base, strict=True)
            ),
        ]
        for name, size in forward
    ]
    columns = ["backend", "head size", "forward, ms (ratio)", "forward and backward, ms (ratio)"]
    measuring.print_table(columns, lines)
    left_out = [name for name in BACKENDS if (name, head_size) not in forward]
    print(f"\nnot for these sizes on this device: {', '.join(left_out) or 'none'}\n")

    rows = modulations(args.size, batch_size, device)
    for function in rows.values():
        function()
    seconds = measuring.seconds_in_turn(rows, args.rounds, repeats, device)
    medians = {name: measuring.median(values) for name, values in seconds.items()}
    base = next(iter(medians.values()))
    print(f"modulation of {SIZES[args.size]['depth']} blocks for {batch_size} images in bf16")
    measuring.print_table(["how", "ms (ratio)"], [[k, f"{v * 1e3:.3f} ({base / v:.2f})"] for k, v in medians.items()])


if __name__ == "__main__":
    main()
