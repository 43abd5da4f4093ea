import inspect
import json
import math

import pytest
import torch
from conftest import load_golden
from torch.utils.flop_counter import FlopCounterMode

from models import SiT, SiT_models, TimestepEmbedder

GOLDEN = load_golden("model.npz")
META = json.loads(GOLDEN["meta"])
STATE_DICT = {key.removeprefix("state_dict/"): value for key, value in GOLDEN.items() if key.startswith("state_dict/")}


def tiny(**changes):
    return SiT(**{**META["config"], **changes})


@pytest.fixture
def golden_model():
    model = tiny().eval()
    model.load_state_dict(STATE_DICT)
    return model


def randomise(model):
    """Leave adaLN-Zero's initial state, in which the output is 0 whatever the input."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def test_forward_equals_golden(golden_model):
    with torch.no_grad():
        output = golden_model(GOLDEN["x"], GOLDEN["t"], GOLDEN["y"])
    torch.testing.assert_close(output, GOLDEN["forward"], atol=1e-5, rtol=0)


def test_forward_with_cfg_equals_golden(golden_model):
    with torch.no_grad():
        output = golden_model.forward_with_cfg(GOLDEN["cfg_x"], GOLDEN["cfg_t"], GOLDEN["cfg_y"], META["cfg_scale"])
    torch.testing.assert_close(output, GOLDEN["forward_with_cfg"], atol=1e-5, rtol=0)


def test_state_dict_keys_and_shapes_are_the_official_ones():
    expected = {key: value.shape for key, value in STATE_DICT.items()}
    assert {key: value.shape for key, value in tiny().state_dict().items()} == expected


def test_position_embedding_equals_golden():
    torch.testing.assert_close(tiny().pos_embed.data, STATE_DICT["pos_embed"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "name, parameters, gflops",
    [
        ("SiT-S/2", 32_963_360, 6.06),
        ("SiT-B/2", 130_512_416, 23.01),
        ("SiT-L/2", 458_102_816, 80.71),
        ("SiT-XL/2", 675_129_632, 118.64),
    ],
)
def test_sizes(name, parameters, gflops):
    with torch.device("meta"):
        model = SiT_models[name]()
        x, t, y = torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long)
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter:
        model(x, t, y)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gflops, rel=0.01)


def test_there_are_twelve_sizes_which_take_the_arguments_of_the_constructor():
    assert set(SiT_models) == {f"SiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8)}
    model = SiT_models["SiT-S/4"](input_size=16, in_channels=3, num_classes=7, learn_sigma=False, depth=1)
    assert model(torch.zeros(2, 3, 16, 16), torch.zeros(2), torch.tensor([0, 7])).shape == (2, 3, 16, 16)


def test_a_new_model_is_the_identity_of_adaln_zero():
    model = tiny()
    x, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    torch.testing.assert_close(model.blocks[0](x, c), x)
    output = model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2]))
    assert output.abs().max() == 0


def test_the_null_class_is_the_number_of_classes():
    model = randomise(tiny(num_classes=7, class_dropout_prob=0.5)).eval()
    x, t, y = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 3, 6])
    dropped = model(x, t, y, force_drop_ids=torch.tensor([True, False, True]))
    torch.testing.assert_close(dropped, model(x, t, torch.tensor([7, 3, 7])))
    assert not torch.allclose(dropped, model(x, t, y))


def test_labels_are_dropped_in_training_only_and_with_the_given_probability():
    embedder = randomise(tiny(class_dropout_prob=0.3)).y_embedder
    labels = torch.zeros(20_000, dtype=torch.long)
    null = embedder.embedding_table.weight[10]
    embedder.train()
    share = (embedder(labels) == null).all(1).float().mean().item()
    assert share == pytest.approx(0.3, abs=0.02)
    embedder.eval()
    assert not (embedder(labels) == null).all(1).any()


def test_without_label_dropout_there_is_no_null_class():
    assert tiny(class_dropout_prob=0.0).y_embedder.embedding_table.num_embeddings == 10


@pytest.mark.parametrize("channels, guided", [(4, 3), (4, None), (16, None), (2, 3), (4, 1)])
def test_guidance_of_leading_channels(channels, guided):
    model = randomise(tiny(in_channels=channels)).eval()
    x, t = torch.randn(2, channels, 8, 8), torch.rand(2)
    y, null = torch.tensor([3, 4]), torch.tensor([10, 10])
    output = model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]), 2.5, guided)
    conditional, unconditional = model(x, t, y), model(x, t, null)
    count = channels if guided is None else guided
    expected = unconditional + 2.5 * (conditional - unconditional)
    torch.testing.assert_close(output[:2, :count], expected[:, :count], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output[2:, :count], output[:2, :count])
    torch.testing.assert_close(output[:2, count:], conditional[:, count:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output[2:, count:], unconditional[:, count:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_hidden_states_are_those_after_the_blocks(grad_checkpoint):
    model = randomise(tiny(depth=3, class_dropout_prob=0.0))
    model.grad_checkpoint = grad_checkpoint
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, output: outputs.append(output))
    x, t, y = torch.randn(3, 4, 8, 8), torch.rand(3), torch.tensor([0, 3, 6])
    output, hidden = model(x, t, y, hidden_blocks=(2, 0))
    assert torch.equal(hidden[0], outputs[2]) and torch.equal(hidden[1], outputs[0]) and len(hidden) == 2
    assert hidden[0].shape == (3, 16, 32) and torch.equal(output, model(x, t, y))
    hidden[1].square().sum().backward()  # a loss on the first block trains it, and none after it
    assert model.blocks[0].attn.qkv.weight.grad.abs().max() > 0 and model.blocks[1].attn.qkv.weight.grad is None


@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_hidden_states_do_not_break_the_graph(grad_checkpoint):
    model = randomise(tiny())
    model.grad_checkpoint = grad_checkpoint
    x, t, labels = torch.randn(3, 4, 8, 8), torch.rand(3), torch.randn(3, 32)
    torch._dynamo.reset()
    compiled = torch.compile(model.forward_embedded, fullgraph=True, dynamic=False, backend="aot_eager")
    for hidden_blocks in ((), (1,)):  # the same function serves both
        expected, found = (f(x, t, labels, hidden_blocks) for f in (model.forward_embedded, compiled))
        torch.testing.assert_close(found, expected)
    gradients = []
    for output, hidden in (expected, found):
        model.zero_grad()
        (output.square().mean() + hidden[0].square().mean()).backward()
        gradients.append([p.grad for p in model.blocks.parameters()])
    torch.testing.assert_close(*gradients)


def test_unpatchify_puts_patches_where_the_embedding_took_them():
    model = tiny(learn_sigma=False)
    image = torch.arange(2 * 4 * 8 * 8.0).reshape(2, 4, 8, 8)
    patches = image.reshape(2, 4, 4, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, 16)
    torch.testing.assert_close(model.unpatchify(patches), image)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(input_size=9), "input_size 9 is not a multiple of patch_size 2"),
        (dict(hidden_size=30), "hidden_size 30 is not a multiple of num_heads 4"),
        (dict(hidden_size=6, num_heads=1), "multiple of 4"),
        (dict(class_dropout_prob=1.0), "class_dropout_prob"),
        (dict(num_classes=0), "num_classes must be at least 1"),
        (dict(mlp_ratio=0), "mlp_ratio"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_float64_and_gradients():
    model = randomise(tiny()).double()
    x = torch.randn(1, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    model(x, torch.rand(1, dtype=torch.float64), torch.tensor([1])).sum().backward()
    assert x.grad.abs().max() > 0
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not model.pos_embed.requires_grad


def test_buffers_that_checkpoints_do_not_hold_are_refused(monkeypatch):
    """A model is made on the meta device and filled from a state dict, so such a buffer would hold nothing."""
    from training import setup

    class Buffered(SiT):
        def __init__(self, persistent, **sizes):
            super().__init__(**sizes)
            self.register_buffer("phase", torch.arange(3.0), persistent=persistent)

    sizes = dict(input_size=8, hidden_size=32, depth=1, num_heads=4)
    monkeypatch.setattr(setup, "SiT", Buffered)
    assert setup.build_model({"model": dict(sizes, persistent=True)}).phase.is_meta
    with pytest.raises(ValueError, match="must be persistent: phase"):
        setup.build_model({"model": dict(sizes, persistent=False)})


def test_a_new_model_is_initialised_as_dit_is():
    """Zeros: all biases, the modulations of all blocks and of the last layer, and the last layer itself."""
    torch.manual_seed(0)
    model = tiny(hidden_size=128, class_dropout_prob=0.1)
    parameters = dict(model.named_parameters())
    zero = {name for name, value in parameters.items() if value.abs().max() == 0}
    closed = {name for name in parameters if "adaLN_modulation" in name or name.startswith("final_layer.linear")}
    biases = {name for name in parameters if name.endswith("bias")}
    assert zero == closed | biases
    for name in ("y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"):
        assert parameters[name].std().item() == pytest.approx(0.02, rel=0.1)
    for name, value in parameters.items():  # Xavier's uniform distribution, of which the largest is close to the bound
        if name.endswith("weight") and name not in zero and "embedder" not in name or name == "x_embedder.proj.weight":
            bound = (6 / (value.shape[0] + value[0].numel())) ** 0.5
            assert 0.98 * bound < value.abs().max() <= bound and abs(value.mean()) < 0.05 * bound


@pytest.mark.parametrize("grad_checkpoint, training, times", [(True, True, 2), (True, False, 1), (False, True, 1)])
def test_blocks_are_computed_again_in_training_if_activations_are_not_stored(grad_checkpoint, training, times):
    model, calls = randomise(tiny(depth=2, class_dropout_prob=0.0)).train(training), []
    model.grad_checkpoint = grad_checkpoint
    for index, block in enumerate(model.blocks):
        block.attn.register_forward_hook(lambda *_, index=index: calls.append(index))
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 3])
    model(x, t, y).square().mean().backward()
    assert sorted(calls) == sorted([0, 1] * times)


def test_the_arguments_of_a_model_are_by_default_those_of_the_released_one():
    defaults = {key: p.default for key, p in inspect.signature(SiT).parameters.items()}
    width = dict(hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4.0)
    data = dict(input_size=32, patch_size=2, in_channels=4, num_classes=1000, class_dropout_prob=0.1, learn_sigma=True)
    off = dict(qk_norm=False, norm="layer", mlp="gelu", position="sincos", inner_head=None, trained_size=None)
    assert defaults == width | data | off


def test_times_are_embedded_at_frequencies_from_one_down():
    """At dim / 2 = 2 of them: 1 and 10000^(-1/2) = 0.01 radians per unit of time."""
    found = TimestepEmbedder.timestep_embedding(torch.tensor([0.0, 1.0, 0.5]), 4)
    rows = [[math.cos(t), math.cos(0.01 * t), math.sin(t), math.sin(0.01 * t)] for t in (0, 1, 0.5)]
    torch.testing.assert_close(found, torch.tensor(rows), rtol=1e-6, atol=1e-9)
    assert TimestepEmbedder.timestep_embedding(torch.zeros(1, dtype=torch.bfloat16), 4).dtype == torch.float32
