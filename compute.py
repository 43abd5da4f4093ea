"""How the network's arithmetic is done: the precision of its matrix products, and compilation."""

import contextlib

import torch

# What blocks compute in. Whatever the precision, weights in training, sums, times, noise and losses are float32.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}

# Tokens up to which a CPU is faster without the fused kernel of attention; timed on one CPU with bf16 instructions.
MOST_TOKENS_OF_PLAIN_ATTENTION = {"fp32": 32, "bf16": 512}


def resolve_precision(precision, device, on_gpu):
    """The precision to compute in, 'fp32', 'tf32' or 'bf16'; sets how PyTorch multiplies float32 matrices.

    With bf16, too, GPUs may take TF32 for what is float32 then: an autoencoder, as in the official scripts.

    Args:
        precision: one of DTYPES; None: fp32 on a CPU, `on_gpu` on a GPU, or fp32 if that is bf16 and the GPU has none.

    Raises:
        ValueError: tf32 on a CPU.
    """
    if device.type != "cuda":
        if precision == "tf32":
            raise ValueError("--precision tf32 needs a CUDA GPU; fp32 and bf16 run on a CPU, too")
        return precision or "fp32"
    if precision is None:
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "fp32" if on_gpu == "bf16" and not has_bf16 else on_gpu
    _allow_tf32(precision != "fp32")
    return precision


def _allow_tf32(allowed):
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def without_tf32():
    """Context or decorator under which float32 products and convolutions are float32, whatever the run's precision."""
    was = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    _allow_tf32(False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(was[0])
        torch.backends.cudnn.allow_tf32 = was[1]


def autocast(device, precision):
    """Context in which matrix products are taken in `precision`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def choose_attention(model, device, precision):
    """Have a model compute attention in the way that is fastest, which is the same but for rounding; in place.

    PyTorch's fused kernel keeps no (T, T) weights. Those of few tokens are small, and on a CPU two plain products then
    win: benchmarks/kernel_speed.py.
    """
    plain = device.type == "cpu" and model.x_embedder.num_patches <= MOST_TOKENS_OF_PLAIN_ATTENTION[precision]
    for block in model.blocks:
        block.attn.fused_attn = not plain


def compile_training(model, parallel):
    """Compile the forward pass as one graph, in place; under FSDP, whose gathering is not to be traced, each block's.

    `fullgraph` makes a graph break an error. The labels' embedding stays outside: compiled, its gradient is summed by
    threads in an order that is up to chance, and a run would not continue to the same bytes.
    """
    if parallel == "fsdp":
        for block in model.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
    else:
        model.forward_embedded = torch.compile(model.forward_embedded, fullgraph=True, dynamic=False)


def prepare_inference(model, device, precision, compiled):
    """Make a model that is not trained fast, in place: its blocks' weights in `precision`, its forward pass compiled.

    The model is then to be called under `autocast`, which then has no weights of blocks left to convert. On a GPU the
    compiled pass is recorded as CUDA graphs, one for each batch size, whose output the next call overwrites.
    """
    choose_attention(model, device, precision)
    model.blocks.to(DTYPES[precision])
    if compiled:
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        model.forward_embedded = torch.compile(model.forward_embedded, fullgraph=True, dynamic=False, mode=mode)
