"""Parameters, operations and peak memory of a model, and peak throughput of GPUs, before anything is run."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from models import SiT
from training.muon import parameter_groups
from training.step import num_kept
from utils.precision import autocast, choose_attention

# Dense peak of matrix products in 10^12 operations per second, from NVIDIA's data sheets, by CUDA's name of the
# device: a MIG slice and a laptop edition have other names.
A100 = ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe")
PEAK_TERAFLOPS = {
    **dict.fromkeys(A100, {"bf16": 312, "tf32": 156, "fp32": 19.5}),
    "NVIDIA H100 PCIe": {"bf16": 756, "tf32": 378, "fp32": 51},
    **dict.fromkeys(("NVIDIA H100 80GB HBM3", "NVIDIA H200"), {"bf16": 989, "tf32": 495, "fp32": 67}),
    "NVIDIA L40S": {"bf16": 362, "tf32": 183, "fp32": 92},
    "NVIDIA GeForce RTX 4090": {"bf16": 165, "tf32": 83, "fp32": 83},
}


def peak_flops(device, precision):
    """Return the peak of a GPU's matrix products in operations per second; None if the device is not in the table."""
    peaks = PEAK_TERAFLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return peaks and peaks[precision] * 1e12


def _on(device, model_config, batch_size):
    """Return (model, its inputs) on a device; the caller chooses one that stores no data."""
    with torch.device(device):
        model = SiT(**model_config)
        x = torch.empty(batch_size, *model.latent_shape)
        return model, (x, torch.empty(batch_size), torch.zeros(batch_size, dtype=torch.long))


def num_parameters(model_config):
    """Return the number of parameters of SiT(**model_config)."""
    return sum(p.numel() for p in _on("meta", model_config, 1)[0].parameters())


def _options(model, batch_size, route, losses):
    """Return the arguments of the forward pass of a training step with a route and auxiliary losses."""
    hidden_blocks = tuple({block for loss in losses for block in loss.hidden_blocks})
    if route is None:
        return {"hidden_blocks": hidden_blocks}
    kept = torch.zeros(batch_size, num_kept(route[2], model.x_embedder.num_patches), dtype=torch.long)
    return {"hidden_blocks": hidden_blocks, "route": (*route[:2], kept.to(model.pos_embed.device))}


def forward_flops(model_config, route=None, losses=()):
    """Return the operations of one forward pass of one image in matrix products, two per multiply-add.

    A `route` (FROM, TO, share) and the outputs that auxiliary `losses` read count; their own operations do not."""
    model, inputs = _on("meta", model_config, 1)
    with FlopCounterMode(display=False) as counter:
        model(*inputs, **_options(model, 1, route, losses))
    return counter.get_total_flops()


def training_flops(model_config, route=None, losses=()):
    """Return the operations of one image's forward and backward pass, with those of a route and auxiliary losses.

    The network's backward pass computes two products for each; a loss knows its `flops`."""
    return 3 * forward_flops(model_config, route, losses) + sum(loss.flops for loss in losses)


def saved_bytes(model_config, batch_size, precision, grad_checkpoint, device, route=None, losses=()):
    """Return the bytes that autograd saves in a forward pass, as CPU kernels do, counted on tensors without data.

    `device` decides the kernel of attention. Of auxiliary losses, what the network computes for them counts."""
    storages = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = (storage, storage.nbytes())  # kept, so that its address is not reused
        return tensor

    with FakeTensorMode():
        model, inputs = _on("cpu", model_config, batch_size)
        model.grad_checkpoint = grad_checkpoint
        choose_attention(model, device, precision)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        with hooks, autocast(torch.device("cpu"), precision):
            output = model(*inputs, **_options(model, batch_size, route, losses))
        total = sum(size for address, (_, size) in storages.items() if address not in weights)
        del output
    return total


def training_memory(
    model_config, batch_size, precision, grad_checkpoint, shards, device, emas=1, losses=(), route=None, muon=False
):
    """Return an estimate of the peak memory of training on one device, as {part: bytes}.

    `batch_size` is a rank's micro-batch, `shards` the ranks that share one model, and `emas` the number of EMAs.
    With `muon` the optimizer stores one number for each of the blocks' matrices, not two. It counts auxiliary
    losses, by their parameters and `saved_bytes`, and two gathered blocks for FSDP, and leaves out fragmentation,
    the workspace of kernels and the autoencoder. All activations and all gradients count, as with DDP and gradient
    accumulation; otherwise up to the smaller of the two is not needed."""
    weights = 4 * num_parameters(model_config)
    parameters = [p for loss in losses for p in loss.parameters()]
    trained = weights + 4 * sum(p.numel() for p in parameters if p.requires_grad)
    frozen = 4 * sum(p.numel() for p in parameters if not p.requires_grad)
    activations = saved_bytes(model_config, batch_size, precision, grad_checkpoint, device, route, losses)
    if grad_checkpoint:  # one block at a time is computed again
        everything = saved_bytes(model_config, batch_size, precision, False, device, route, losses)
        activations += (everything - activations) // model_config["depth"]
    activations += batch_size * sum(loss.saved_bytes for loss in losses)
    groups = parameter_groups(_on("meta", model_config, 1)[0]) if muon else []
    matrices = 4 * sum(p.numel() for group in groups if group["matrices"] for p in group["params"])
    parts = {
        "weights": trained / shards + frozen,
        "gradients": trained / shards,
        "optimizer": (2 * trained - matrices) / shards,
        "EMA": emas * weights / shards,
        "activations": activations,
    }
    if shards > 1:
        size = 2 if precision == "bf16" else 4
        parts["gathered blocks"] = 2 * size * num_parameters(model_config) / model_config["depth"]
    return parts
