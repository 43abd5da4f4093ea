"""Precision of matrix products, attention kernels and compilation."""

import contextlib

import torch

# The dtype of the blocks' weights and products. In training, weights, times, noise and losses are float32 in any case.
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}

# Tokens up to which two plain products are faster on a CPU than the fused kernel of attention, which stores no (T, T)
# weights: timed on one CPU with bf16 instructions by benchmarks/kernel_speed.py.
MOST_TOKENS_OF_PLAIN_ATTENTION = {"fp32": 32, "bf16": 512}


def resolve_precision(precision, device, on_gpu):
    """Return the precision to compute in, one of DTYPES, and set how PyTorch multiplies float32 matrices.

    None is fp32 on a CPU, and `on_gpu` on a GPU, or fp32 if that is bf16 and the GPU lacks it. With bf16, products
    that stay float32, such as an autoencoder's, use TF32. Raise ValueError for tf32 on a CPU."""
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
    """Context or decorator under which float32 products and convolutions use no TF32."""
    was = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    _allow_tf32(False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(was[0])
        torch.backends.cudnn.allow_tf32 = was[1]


def autocast(device, precision):
    """Return a context in which matrix products are computed in `precision`."""
    # A cache of converted weights would save nothing, as each is used once, and keep what --grad-checkpoint frees.
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def choose_attention(model, device, precision):
    """Set a model to its fastest attention, in place; the results differ by rounding."""
    plain = device.type == "cpu" and model.x_embedder.num_patches <= MOST_TOKENS_OF_PLAIN_ATTENTION[precision]
    for block in model.blocks:
        block.attn.fused_attn = not plain


def compile_training(model, parallel):
    """Compile the forward pass as one graph, in place; under FSDP block by block, so that gathering is not traced.

    The label embedding is not compiled: threads would sum its gradient in an order that varies, and a resumed run
    would not end with the same bytes."""
    if parallel == "fsdp":
        for block in model.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
    else:
        model.forward_embedded = torch.compile(model.forward_embedded, fullgraph=True, dynamic=False)


def prepare_inference(model, device, precision, compiled):
    """Convert the blocks of a model that is not trained to `precision`, and compile its forward pass, in place.

    Call the model under `autocast`. On a GPU the compiled pass is recorded as CUDA graphs, one for each batch size;
    the next call overwrites their output. On a CPU it is compiled for these weights alone, without gradients: each
    batch size has a copy of them, laid out for oneDNN, until `torch.compiler.reset`."""
    choose_attention(model, device, precision)
    model.blocks.to(DTYPES[precision])
    if compiled:
        mode = "reduce-overhead" if device.type == "cuda" else "default"
        forward = torch.compile(model.forward_embedded, fullgraph=True, dynamic=False, mode=mode)
        if device.type == "cpu":
            from torch._inductor import config  # takes a second, which other runs save

            # No option of torch.compile, as it is read before those apply: when a batch size comes for the first time.
            forward = config.patch(freezing=True)(forward)
        model.forward_embedded = forward
