"""What a model costs before it is run: parameters, operations, memory; and what GPUs can do at most."""

import contextlib

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import compute
from models import SiT

# Dense peak of matrix products in 10^12 operations a second, by precision and by the name that CUDA gives the device (a
# part of a GPU and its laptop edition have others): NVIDIA's data sheets, without sparsity.
A100 = {"bf16": 312, "tf32": 156, "fp32": 19.5}
PEAK_TERAFLOPS = {
    "NVIDIA A100-SXM4-40GB": A100,
    "NVIDIA A100-SXM4-80GB": A100,
    "NVIDIA A100-PCIE-40GB": A100,
    "NVIDIA A100 80GB PCIe": A100,
    "NVIDIA H100 PCIe": {"bf16": 756, "tf32": 378, "fp32": 51},
    "NVIDIA H100 80GB HBM3": {"bf16": 989, "tf32": 495, "fp32": 67},
    "NVIDIA H200": {"bf16": 989, "tf32": 495, "fp32": 67},
    "NVIDIA L40S": {"bf16": 362, "tf32": 183, "fp32": 92},
    "NVIDIA GeForce RTX 4090": {"bf16": 165, "tf32": 83, "fp32": 83},
}


def peak_flops(device, precision):
    """Operations a second that a GPU's matrix products reach at most; None for a device that is not in the table."""
    if device.type != "cuda":
        return None
    peaks = PEAK_TERAFLOPS.get(torch.cuda.get_device_name(device))
    return peaks and peaks[precision] * 1e12


def _on(device, model_config, batch_size):
    """(model, its arguments) on a device that stores nothing."""
    with torch.device(device):
        model = SiT(**model_config)
        x = torch.empty(batch_size, model.in_channels, model.input_size, model.input_size)
        return model, (x, torch.empty(batch_size), torch.zeros(batch_size, dtype=torch.long))


def num_parameters(model_config):
    """Number of parameters of SiT(**model_config)."""
    return sum(p.numel() for p in _on("meta", model_config, 1)[0].parameters())


def forward_flops(model_config):
    """Operations of the matrix products of one forward pass of one image, two for each multiply-add."""
    model, inputs = _on("meta", model_config, 1)
    with FlopCounterMode(display=False) as counter:
        model(*inputs)
    return counter.get_total_flops()


def training_flops(model_config):
    """Operations of one image's forward and backward pass, which computes two products for each of the forward's."""
    return 3 * forward_flops(model_config)


def activation_bytes(model_config, batch_size, precision, grad_checkpoint, device):
    """Memory of what a forward pass keeps for the backward pass, with checkpoints also of the block computed again.

    Counted on tensors without data, as the CPU's kernels save them; `device` decides how attention is computed.
    """
    kept = _saved_bytes(model_config, batch_size, precision, grad_checkpoint, device)
    if grad_checkpoint:
        everything = _saved_bytes(model_config, batch_size, precision, False, device)
        kept += (everything - kept) // model_config["depth"]
    return kept


def _saved_bytes(model_config, batch_size, precision, grad_checkpoint, device):
    """Memory of the tensors that autograd saves in a forward pass, each storage once."""
    storages = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = (storage, storage.nbytes())  # held, so that no other takes its address
        return tensor

    with FakeTensorMode():
        model, inputs = _on("cpu", model_config, batch_size)
        model.grad_checkpoint = grad_checkpoint
        compute.choose_attention(model, device, precision)
        weights = {p.untyped_storage()._cdata for p in model.parameters()}
        autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor), autocast:
            output = model(*inputs)
        total = sum(size for address, (_, size) in storages.items() if address not in weights)
        del output
    return total


def training_memory(model_config, batch_size, precision, grad_checkpoint, shards, device):
    """Estimated memory of training on one device, as {part: bytes}.

    Without what the allocator wastes, the work space of kernels and the autoencoder; FSDP's gathered blocks are two.
    All activations and all gradients are there at once, as in DDP's buckets and with several micro batches; one process
    with one micro batch takes up to the smaller of the two less.

    Args:
        batch_size: micro batch of one rank.
        shards: ranks that hold one model together; 1: every rank has its own.
        device: where it trains.
    """
    weights = 4 * num_parameters(model_config)
    parts = {
        "weights": weights / shards,
        "gradients": weights / shards,
        "optimizer": 2 * weights / shards,
        "moving average": weights / shards,
        "activations": activation_bytes(model_config, batch_size, precision, grad_checkpoint, device),
    }
    if shards > 1:
        size = 2 if precision == "bf16" else 4
        parts["gathered blocks"] = 2 * size * num_parameters(model_config) / model_config["depth"]
    return parts
