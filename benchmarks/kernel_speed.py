"""Attention and modulation by themselves: python benchmarks/kernel_speed.py

Attention by backend and head size. SiT-XL has heads of size 72, which is no power of two. Each backend of PyTorch that
accepts the sizes is measured on heads as they are, and padded with zeros to 80, 96 and 128, which does not change the
result. "Two products" stores the (T, T) weights; utils/precision.py chooses it for few tokens on a CPU.

Modulation (adaLN), the shifts, scales and gates of all blocks: by one product per block, as in the model; by one
product with the weights of all blocks, concatenated beforehand, as sampling could do; and with the weights concatenated
in every step, as training would have to.

Rows are measured in turn, round by round; the results are medians over rounds.
"""

import contextlib

import measuring
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from models import SIZES
from utils import command_line, distributed

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
    """Return a function that computes attention of heads padded to `head_size`, and its gradients.

    Args:
        backend: a value of BACKENDS.
        q, k, v: (N, heads, T, head size).
        gradient: of the output, in the shape of q; None: compute the output alone.
    """
    scale = q.shape[-1] ** -0.5

    def compute():
        if backend == "two products":
            output = (q * scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        else:
            padding = head_size - q.shape[-1]
            padded = [torch.nn.functional.pad(x, (0, padding)) for x in (q, k, v)] if padding else (q, k, v)
            with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                output = torch.nn.functional.scaled_dot_product_attention(*padded, scale=scale)[..., : q.shape[-1]]
        if gradient is not None:
            torch.autograd.grad(output, (q, k, v), gradient)
        return output

    return compute


def works(function):
    """Return whether a backend accepts the sizes, the precision and the device."""
    try:
        function()
    except RuntimeError:
        return False
    return True


def attention_rows(batch_size, heads, tokens, head_size, device):
    """Return {(backend, padded head size): function} for the forward pass, and for forward and backward."""
    # Laid out as in the model: token by token, and in each token q, k and v of all heads.
    qkv = torch.randn(batch_size, tokens, 3, heads, head_size, device=device, dtype=torch.bfloat16)
    q, k, v = (x.requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0))
    gradient = torch.randn_like(qkv[:, :, 0]).transpose(1, 2)
    forward, both = {}, {}
    for name, backend in BACKENDS.items():
        padded = () if backend == "two products" else PADDED
        for size in (head_size, *(size for size in padded if size > head_size)):
            forward_only = attention(backend, q.detach(), k.detach(), v.detach(), size, None)
            with_backward = attention(backend, q, k, v, size, gradient)
            if works(forward_only) and works(with_backward):  # which also warms them up
                forward[name, size], both[name, size] = forward_only, with_backward
    return forward, both


def print_attention(head_size, forward, both):
    """Print a table of attention's median seconds, {(backend, padded head size): seconds} each."""
    base = next(iter(BACKENDS)), head_size
    lines = []
    for name, size in forward:
        cells = (f"{t[name, size] * 1e3:.3f} ({t[base] / t[name, size]:.2f})" for t in (forward, both))
        lines.append([name, size, *cells])
    columns = ["backend", "head size", "forward, ms (ratio)", "forward and backward, ms (ratio)"]
    measuring.print_table(columns, lines)
    left_out = [name for name in BACKENDS if (name, head_size) not in forward]
    print(f"\ndo not accept these sizes on this device: {', '.join(left_out) or 'none'}\n")


def modulation_rows(size, batch_size, device):
    """Return {name: function} that computes, in bf16, the modulation of all blocks of a model of a size."""
    width, depth = SIZES[size]["hidden_size"], SIZES[size]["depth"]
    c = torch.randn(batch_size, width, device=device, dtype=torch.bfloat16)
    weights = [0.02 * torch.randn(6 * width, width, device=device, dtype=torch.bfloat16) for _ in range(depth)]
    concatenated = torch.cat(weights)
    linear = torch.nn.functional.linear
    return {
        "block by block": lambda: [linear(c, weight) for weight in weights],
        "all blocks at once": lambda: linear(c, concatenated).chunk(depth, dim=1),
        "all at once, concatenated each time": lambda: linear(c, torch.cat(weights)).chunk(depth, dim=1),
    }


def build_parser():
    parser = command_line.Parser("Time attention by backend and head size, and modulation.")
    add, at_least_one = command_line.flag_group(parser, "measurement"), command_line.integer(1)
    add("--size", command_line.one_of(*SIZES), "|".join(SIZES), "size of the model that has these heads", default="XL")
    add("--tokens", at_least_one, "N", "per image; 256 at 256 x 256 with patches of 2", default=256)
    add("--batch-size", at_least_one, "N", "images (default: 32 on a GPU, 4 on a CPU)")
    add("--rounds", at_least_one, "N", "rounds over all rows", default=5)
    add("--repeats", at_least_one, "N", "calls of a row in a round (default: 50 on a GPU, 2 on a CPU)")
    measuring.add_json_flag(add)
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    with command_line.user_errors(parser):
        measuring.check_json(args.json)
        device = distributed.init()
    on_gpu = device.type == "cuda"
    batch_size, repeats = args.batch_size or (32 if on_gpu else 4), args.repeats or (50 if on_gpu else 2)
    heads, depth = SIZES[args.size]["num_heads"], SIZES[args.size]["depth"]
    head_size = SIZES[args.size]["hidden_size"] // heads
    torch.manual_seed(0)

    rows = attention_rows(batch_size, heads, args.tokens, head_size, device)
    forward, both = (measuring.medians_in_turn(functions, args.rounds, repeats, device) for functions in rows)
    shape = (batch_size, heads, args.tokens, head_size)
    print(f"heads of SiT-{args.size}: {shape} in bf16; {measuring.machine(device)}\n")
    print_attention(head_size, forward, both)

    functions = modulation_rows(args.size, batch_size, device)
    measuring.seconds_in_turn(functions, 1, 1, device)  # warms up
    medians = measuring.medians_in_turn(functions, args.rounds, repeats, device)
    print(f"modulation of {depth} blocks for {batch_size} images in bf16")
    first = medians["block by block"]
    lines = [[name, f"{seconds * 1e3:.3f} ({first / seconds:.2f})"] for name, seconds in medians.items()]
    measuring.print_table(["how", "ms (ratio)"], lines)
    seconds = {"forward": forward, "forward and backward": both}
    rows = {kind: {f"{name}, {size}": value for (name, size), value in row.items()} for kind, row in seconds.items()}
    settings = {"heads": heads, "tokens": args.tokens, "head_size": head_size, "batch_size": batch_size}
    measuring.write_json(args.json, settings, rows | {"modulation": medians}, device)


if __name__ == "__main__":
    main()
