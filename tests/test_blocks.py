"""The options of a block, alone and as --block modern; inputs that are not square; the velocity direction loss."""

import warnings

import numpy as np
import pytest
import torch
from conftest import TINY, read_metrics
from processes import run

from data.sources import open_source
from models import BLOCKS, HeadNorm, SiT, SiT_models, TanhGELU, position_angles, rotate, sincos_position_embedding
from training import resume, setup
from training.losses import DirectionLoss
from transport import create_transport
from utils.checkpoint import without_defaults
from utils.precision import prepare_inference
from utils.weights import load_weights, model_config_from_shapes

OPTIONS = [dict([option]) for option in BLOCKS["modern"].items()]
SIZES = dict(input_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=10, class_dropout_prob=0.0)
D, HEAD = 32, 16


def tiny(dtype=torch.float64, **options):
    """A small SiT with random weights, none of which is 0."""
    torch.manual_seed(0)
    model = SiT(**SIZES | options).to(dtype)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p) * p.requires_grad
    return model


def inputs(model, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *model.latent_shape, generator=generator, dtype=dtype)
    return x, torch.tensor([0.1, 0.5, 0.9], dtype=dtype), torch.tensor([0, 3, 9])


def turned(x, grid, scale=(1.0, 1.0)):
    """Rotary positions of x (T, d) pair by pair: as complex numbers, times e^(i angle)."""
    d = x.shape[-1]
    result = torch.empty_like(x)
    for token in range(grid[0] * grid[1]):
        row, column = token // grid[1] * scale[0], token % grid[1] * scale[1]
        for i in range(d // 2):
            angle = (row if i < d // 4 else column) * 10000 ** (-(i % (d // 4)) / (d // 4))
            pair = complex(x[token, i], x[token, i + d // 2]) * np.exp(1j * angle)
            result[token, i], result[token, i + d // 2] = pair.real, pair.imag
    return result


@pytest.mark.parametrize("trained, scale", [(None, (1, 1)), ((8, 4), (2, 0.5)), (8, (2, 1))])
def test_rotary_positions_are_rotations_of_pairs(trained, scale):
    model = tiny(position="rope", input_size=(4, 8), trained_size=trained)
    x = torch.randn(8, HEAD, dtype=torch.float64)
    found = rotate(x[None, None], model.rotation(x))[0, 0]
    torch.testing.assert_close(found, turned(x, (2, 4), scale), rtol=0, atol=1e-12)
    kept = torch.tensor([[0, 3, 6], [1, 2, 7]])  # other tokens in each image
    part = rotate(x[kept][:, None], model.rotation(x)[:, kept].unsqueeze(2))[:, 0]
    assert torch.equal(part, found[kept])


def test_rotary_attention_sees_differences_of_positions():
    model = tiny(position="rope", input_size=(6, 8))
    q, k = torch.randn(2, 1, HEAD, dtype=torch.float64)
    rotation = model.rotation(q)
    q, k = (rotate(vector.expand(12, HEAD)[None, None], rotation)[0, 0] for vector in (q, k))
    scores = (q @ k.T).reshape(3, 4, 3, 4)
    torch.testing.assert_close(scores[0, 0, 1, 2], scores[1, 1, 2, 3], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores[2, 3, 0, 1], scores[2, 2, 0, 0], rtol=1e-12, atol=1e-12)
    assert abs(scores[0, 0, 1, 2] - scores[0, 0, 2, 1]) > 1e-3


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [BLOCKS["modern"], dict(position="rope"), dict(qk_norm=True)])
def test_attention_equals_its_formula(options, fused):
    attn = tiny(**options).blocks[0].attn
    attn.fused_attn = fused
    x = torch.randn(1, 16, D, dtype=torch.float64)
    rotation = tiny(position="rope").rotation(x) if "position" in options else None
    heads = []
    for rows in (attn.qkv.weight @ x[0].T + attn.qkv.bias[:, None]).T.reshape(16, 3, 2, HEAD).permute(2, 1, 0, 3):
        q, k, v = rows
        if options.get("qk_norm"):
            q, k = (
                norm.weight * y / (y.square().mean(1, keepdim=True) + 1e-6).sqrt()
                for norm, y in ((attn.q_norm, q), (attn.k_norm, k))
            )
        if rotation is not None:
            q, k = turned(q.detach(), (4, 4)), turned(k.detach(), (4, 4))
        heads.append(torch.softmax(q @ k.T / HEAD**0.5, dim=1) @ v)
    expected = torch.cat(heads, dim=1) @ attn.proj.weight.T + attn.proj.bias
    found = attn(x) if rotation is None else attn(x, rotation)
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)


def test_norm_and_mlp_equal_their_formulas():
    model, x = tiny(norm="rms", mlp="swiglu"), torch.randn(3, 5, D, dtype=torch.float64)
    expected = x / (x.square().mean(2, keepdim=True) + 1e-6).sqrt()
    for norm in (model.blocks[1].norm1, model.blocks[1].norm2, model.final_layer.norm_final):
        torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    mlp = model.blocks[0].mlp
    gate, value = (x @ mlp.fc1.weight.T + mlp.fc1.bias).chunk(2, dim=2)
    expected = (gate * torch.sigmoid(gate) * value) @ mlp.fc2.weight.T + mlp.fc2.bias
    torch.testing.assert_close(mlp(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["SiT-S/2", "SiT-B/2", "SiT-L/2", "SiT-XL/2"])
def test_the_modern_block_has_as_many_parameters(name):
    with torch.device("meta"):
        plain, modern = (sum(p.numel() for p in SiT_models[name](**block).parameters()) for block in BLOCKS.values())
    assert modern == pytest.approx(plain, rel=0.01)


@pytest.mark.parametrize("options", [{}, dict(norm="rms"), dict(position="rope"), dict(qk_norm=True)])
def test_options_draw_the_same_initial_weights(options):
    """So options can be compared from the same start. (Names and outputs without options: test_models.py.)"""
    torch.manual_seed(5)
    expected, after = SiT(**SIZES).state_dict(), torch.rand(3)
    torch.manual_seed(5)
    found = SiT(**SIZES, **options).state_dict()
    assert torch.equal(torch.rand(3), after)
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert all((found[key] == 1).all() and "_norm.weight" in key for key in found.keys() - expected.keys())


@pytest.mark.parametrize("options", [BLOCKS["modern"], dict(qk_norm=True)])
def test_options_compile_recompute_and_compute_in_bf16(options):
    model = tiny(torch.float32, depth=1, **options)
    x, t, y = inputs(model, torch.float32)
    labels, results = model.y_embedder(y).detach(), {}
    torch._dynamo.reset()
    compiled = torch.compile(model.forward_embedded, fullgraph=True, dynamic=False, backend="aot_eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for way in ("plain", "compiled", "recomputed", "bf16"):
            model.zero_grad()
            model.grad_checkpoint = way == "recomputed"
            with torch.autocast("cpu", torch.bfloat16, enabled=way == "bf16"):
                output = (compiled if way == "compiled" else model.forward_embedded)(x, t, labels)
            output.square().mean().backward()
            gradient = torch.cat([p.grad.flatten() for p in model.blocks.parameters()])
            results[way] = output.detach(), gradient
    for way, error in (("compiled", 1e-4), ("recomputed", 1e-4), ("bf16", 0.02)):
        for found, expected in zip(results[way], results["plain"], strict=True):
            assert (found - expected).norm() < error * expected.norm(), way
    prepare_inference(model.eval(), torch.device("cpu"), "bf16", compiled=False)
    assert model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16 and not model.blocks[0].attn.fused_attn
    with torch.autocast("cpu", torch.bfloat16):
        found = model.forward_embedded(x, t, labels)
    assert (found - results["plain"][0]).norm() < 0.02 * found.norm()


def test_the_norm_of_heads_keeps_the_dtype():
    norm = HeadNorm(HEAD, eps=1e-6)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert norm(torch.randn(1, 2, 3, HEAD, dtype=dtype)).dtype == dtype


def test_positions_of_a_grid_that_is_not_square():
    found = sincos_position_embedding(D, (2, 3)).reshape(2, 3, D)
    square = sincos_position_embedding(D, 3).reshape(3, 3, D)
    assert torch.equal(found, square[:2])
    assert torch.equal(sincos_position_embedding(D, (4, 6), (2, 3)).reshape(4, 6, D)[::2, ::2], found)
    angles = position_angles(HEAD, (4, 6), (2, 3)).reshape(2, 4, 6, -1)
    assert torch.equal(angles[:, ::2, ::2], position_angles(HEAD, (2, 3)).reshape(2, 2, 3, -1))
    assert angles[0, 3, 0, 0] == 1.5 and angles[1, 0, 5, 0] == 2.5


@pytest.mark.parametrize("block", BLOCKS)
def test_a_network_of_images_that_are_not_square(block):
    model = tiny(input_size=[4, 12], **BLOCKS[block])
    x, t, y = inputs(model)
    assert model.latent_shape == (4, 4, 12) and model.input_size == (4, 12)
    output = model(x, t, y)
    assert output.shape == x.shape
    columns = tiny(input_size=(12, 4), **BLOCKS[block])  # the same network, but for positions
    columns.load_state_dict(model.state_dict())
    assert not torch.allclose(columns(x.transpose(2, 3), t, y).transpose(2, 3), output)
    larger = tiny(input_size=(8, 24), trained_size=[4, 12], **BLOCKS[block])
    assert torch.equal(larger.sincos_positions().reshape(4, 12, D)[::2, ::2], model.pos_embed.reshape(2, 6, D).float())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(position="rope", num_heads=16), "position rope needs hidden_size / num_heads = 2 to divide by 4"),
        (dict(norm="batch"), "unknown norm 'batch'; choose from layer, rms"),
        (dict(mlp="relu"), "unknown mlp 'relu'"),
        (dict(position="none"), "unknown position 'none'"),
        (dict(input_size=(8, 9)), "not a multiple of patch_size"),
        (dict(trained_size=(8, 0)), "trained_size"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_checkpoints_say_of_options_those_that_are_on():
    model = {key: value for key, value in SIZES.items()} | {"learn_sigma": True}  # which is as released
    off = dict(qk_norm=False, norm="layer", mlp="gelu", position="sincos", trained_size=None)
    assert list(without_defaults(model | off)) == list(model)
    assert without_defaults(model | off | {"mlp": "swiglu"}) == model | {"mlp": "swiglu"}


def config_of(block):
    model = SIZES | {"learn_sigma": True, "in_channels": 4, "patch_size": 2} | block
    return {"model": model, "transport": {"path_type": "Linear", "prediction": "velocity"}, "latents": {}, "data": {}}


@pytest.mark.parametrize("option", OPTIONS)
def test_other_blocks_neither_resume_nor_start_a_run(option, tmp_path):
    (key, value), plain = *option.items(), config_of({})
    start = resume.Start("checkpoint-1", {"step": 1} | config_of(option))
    resume.check_model(config_of(option), start)
    flag = f"--{key.replace('_', '-')}"
    with pytest.raises(ValueError, match=f"{flag}: .* was given, but checkpoint-1 was trained with {value}"):
        resume.check_model(plain, start)
    torch.save(SiT(**SIZES).state_dict(), tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match=f"was trained with {flag} .*, and the model has {value}"):
        setup.initial_weights(config_of(option), 0, tmp_path / "foreign.pt", resume.Start())
    setup.initial_weights(plain, 0, tmp_path / "foreign.pt", resume.Start())


def test_weights_without_a_config_are_those_of_plain_blocks(tmp_path):
    assert model_config_from_shapes(SiT(**SIZES).state_dict())["mlp_ratio"] == 4
    with pytest.raises(ValueError, match="SwiGLU"):
        model_config_from_shapes(SiT(**SIZES, mlp="swiglu").state_dict())


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("prediction", ["velocity", "noise", "score"])
def test_the_direction_loss_equals_its_formula(prediction, channels):
    transport = create_transport(path_type="GVP", prediction=prediction)
    loss = DirectionLoss(transport, 1.0)
    torch.manual_seed(0)
    x0, x1, output = torch.randn(3, 2, channels, 3, 5, dtype=torch.float64)
    t = torch.tensor([0.3, 0.6], dtype=torch.float64)
    xt, true = transport.path.interpolate(t, x0, x1)
    batch, velocity = {"x0": x0, "x1": x1}, transport.velocity(output, xt, t)
    expected = []
    for v, u in zip(velocity, true, strict=True):
        vectors = [(v.flatten(), u.flatten())]
        if channels > 1:
            vectors = [(v[:, i, j], u[:, i, j]) for i in range(3) for j in range(5)]
        expected.append(torch.stack([1 - a @ b / (a.norm() * b.norm()) for a, b in vectors]).mean())
    found = loss(batch, t, xt, output, {})
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
    torch.autograd.gradcheck(lambda output: loss(batch, t, xt, output, {}), output.requires_grad_())
    sigma = transport.path.sigma(t).reshape(2, 1, 1, 1)
    exact = {"velocity": true, "noise": x0, "score": -x0 / sigma}[prediction]
    assert loss(batch, t, xt, exact, {}).abs().max() < 1e-12
    if prediction == "velocity":  # a new network predicts 0
        zero = torch.zeros_like(output, requires_grad=True)
        loss(batch, t, xt, zero, {}).sum().backward()
        assert 0 < zero.grad.abs().max() <= 10


def test_a_modern_run_is_sampled_and_stays_modern(tmp_path):
    """(Sharded and resumed: test_recipes.py.)"""
    flags = [*TINY, "--output-dir", tmp_path, "--max-steps"]
    result = run("train.py", *flags, 8, "--block", "modern", "--direction-loss", "--lr", "1e-2")
    assert result.returncode == 0, result.stderr
    curve = [line["loss_direction"] for line in read_metrics(tmp_path)]
    assert np.mean(curve[-3:]) < 0.9 * curve[0]
    assert BLOCKS["modern"].items() <= load_weights(tmp_path).config["model"].items()
    sample = ["--ckpt", tmp_path, "--num-sampling-steps", 2, "--precision", "bf16", "--output", tmp_path / "grid.png"]
    assert run("sample.py", *sample).returncode == 0
    plain = run("train.py", *flags, 9)
    assert plain.returncode == 2 and plain.stderr.count("\n") == 1 and "--qk-norm: False" in plain.stderr


def test_a_flag_beside_the_block_wins():
    options = {"block": "modern", "mlp": "gelu", "qk_norm": False}
    transport = {"path_type": "Linear", "prediction": "velocity"}
    model = setup.resolve_config(open_source("digits"), "SiT-S/2", options, {}, transport, "none")["model"]
    assert (model["norm"], model["position"]) == ("rms", "rope") and not {"block", "mlp", "qk_norm"} & set(model)


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 2**-7)])
def test_gelu_computes_the_same_where_it_is_compiled(dtype, error):
    """PyTorch's GELU in its tanh approximation, and its gradient."""
    x = torch.cat([torch.linspace(-12, 12, 401), torch.tensor([-1e30, 0.0, 1e30])]).to(dtype).requires_grad_()
    formulas = []

    def backend(graph, inputs):
        formulas.append(str(graph.code))
        return graph

    compiled = torch.compile(TanhGELU(), backend=backend, fullgraph=True, dynamic=False)
    for function in (TanhGELU(), compiled):
        expected, found = torch.nn.functional.gelu(x, approximate="tanh"), function(x)
        torch.testing.assert_close(found, expected, rtol=error, atol=error)
        gradients = (torch.autograd.grad(y[:-3].sum(), x)[0][:-3] for y in (found, expected))
        torch.testing.assert_close(*gradients, rtol=error, atol=error)
    assert len(formulas) == 1 and "sigmoid" in formulas[0]
