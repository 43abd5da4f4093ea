"""Estimates of costs, held to counts by hand and to what autograd really keeps."""

import pytest
import torch

from models import SiT
from training import costs
from utils.precision import choose_attention

CPU = torch.device("cpu")
CONFIG = dict(
    input_size=8, patch_size=2, in_channels=4, hidden_size=64, depth=3, num_heads=4, num_classes=10, learn_sigma=False
)


def test_operations_are_those_of_the_matrix_products():
    tokens, width = 16, 64
    block = 2 * tokens * width * (3 * width + width + 8 * width) + 2 * 2 * tokens**2 * width + 2 * width * 6 * width
    embedders = 2 * tokens * 16 * width + 2 * (256 * width + width * width)
    final = 2 * width * 2 * width + 2 * tokens * width * 16
    assert costs.forward_flops(CONFIG) == 3 * block + embedders + final
    assert costs.training_flops(CONFIG) == 3 * costs.forward_flops(CONFIG)


def test_parameters_are_counted_without_making_them():
    assert costs.num_parameters(CONFIG) == sum(p.numel() for p in SiT(**CONFIG).parameters())


def saved_bytes(precision, grad_checkpoint):
    model = SiT(**CONFIG)
    model.grad_checkpoint = grad_checkpoint
    choose_attention(model, CPU, precision)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = (tensor.untyped_storage().nbytes(), tensor)
        return tensor

    x, t, y = torch.randn(8, 4, 8, 8), torch.rand(8), torch.zeros(8, dtype=torch.long)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
        output = model(x, t, y)
    assert output.requires_grad
    return sum(size for address, (size, _) in kept.items() if address not in weights)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(precision):
    everything = saved_bytes(precision, False)
    assert costs.training_memory(CONFIG, 8, precision, False, 1, CPU)["activations"] == pytest.approx(
        everything, rel=0.02
    )
    between_blocks = saved_bytes(precision, True)
    expected = between_blocks + (everything - between_blocks) / CONFIG["depth"]
    assert expected < everything
    assert costs.training_memory(CONFIG, 8, precision, True, 1, CPU)["activations"] == pytest.approx(expected, rel=0.02)


def test_memory_is_shared_among_shards():
    whole, shared = (costs.training_memory(CONFIG, 8, "bf16", False, shards, CPU) for shards in (1, 4))
    for part in ("weights", "gradients", "optimizer", "EMA"):
        assert shared[part] == whole[part] / 4
    assert whole["weights"] == 4 * costs.num_parameters(CONFIG) and shared["activations"] == whole["activations"]


def test_a_cpu_has_no_known_peak():
    assert costs.peak_flops(torch.device("cpu"), "bf16") is None


def test_two_gathered_blocks_count_where_a_model_is_sharded():
    for precision, size in (("bf16", 2), ("fp32", 4)):
        for shards in (2, 4):
            memory = costs.training_memory(CONFIG, 8, precision, False, shards, CPU)
            assert memory["gathered blocks"] == 2 * size * costs.num_parameters(CONFIG) / CONFIG["depth"]
        assert "gathered blocks" not in costs.training_memory(CONFIG, 8, precision, False, 1, CPU)


def test_peaks_are_those_of_the_data_sheets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    peaks = [costs.peak_flops(torch.device("cuda"), precision) for precision in ("bf16", "tf32", "fp32")]
    assert peaks == [312e12, 156e12, 19.5e12]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB MIG 1g.10gb")
    assert costs.peak_flops(torch.device("cuda"), "bf16") is None
