"""Statistics written and read back, FD-DINOv2's pipeline on a small ViT, and the kernel distance."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from test_command_line import fail
from test_evaluate import block_images, evaluated

from evaluation import features, metrics
from evaluation.images import ImageBatches, write_statistics

CPU = torch.device("cpu")
SMALL = "test_vit.r160_in1k"  # of timm: six blocks of width 64, trained on 160 x 160


@pytest.fixture(scope="module")
def small_vit(tmp_path_factory):
    """The network at its own size, and the file of its weights."""
    torch.manual_seed(0)
    network = timm.create_model(SMALL).eval()
    for value in network.parameters():  # biases and norms too, which start at 0 and 1
        value.data += 0.05 * torch.randn_like(value)
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    save_file(network.state_dict(), path)
    return network, path


@pytest.fixture
def images(tmp_path):
    """a.npz and b.npz of 24 images each, coloured, and their directory."""
    for name, seed in (("a", 1), ("b", 2)):
        np.savez(tmp_path / f"{name}.npz", arr_0=block_images(24, seed, 30, size=48))
    return tmp_path


def position_embedding(embedding, side):
    """Meta's `dinov2_vitl14` at another size, in plain loops: cubic convolution at (i + 1/2) S / (side + 0.1) - 1/2."""
    grid = embedding[0, 1:].double().numpy()
    old = round(len(grid) ** 0.5)
    weights = np.zeros((side, old))
    for i in range(side):
        at = (i + 0.5) * old / (side + 0.1) - 0.5
        for near in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
            d, A = abs(at - near), -0.75
            near_weight = (A + 2) * d**3 - (A + 3) * d**2 + 1 if d <= 1 else A * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[i, min(max(near, 0), old - 1)] += near_weight
    grid = np.einsum("ia,jb,abd->ijd", weights, weights, grid.reshape(old, old, -1)).reshape(side**2, -1)
    return torch.cat([embedding[:, :1], torch.from_numpy(grid)[None].float()], dim=1)


@pytest.mark.parametrize("old, side", [(37, 16), (10, 14), (16, 16)])
def test_position_embeddings_are_resampled_as_in_meta_s_code(old, side):
    embedding = torch.randn(1, 1 + old**2, 3, generator=torch.Generator().manual_seed(0))
    expected = embedding if old == side else position_embedding(embedding, side)
    torch.testing.assert_close(features.resample_positions(embedding, side), expected, rtol=1e-4, atol=1e-5)
    with_registers = torch.cat([torch.zeros(1, 4, 3), embedding], dim=1)
    expected = timm.layers.resample_abs_pos_embed(with_registers, [side] * 2, num_prefix_tokens=5)
    torch.testing.assert_close(features.resample_positions(with_registers, side, registers=True), expected)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_tiny_r_s16_p8_224"])
def test_networks_with_another_head_or_grid(name, tmp_path):
    """A second token with a head of its own; patches of the features of convolutions."""
    network = timm.create_model(name).eval()
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    noise = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    ((rows,), _) = features.ViT(name, tmp_path / "w.safetensors", CPU)(noise)
    mean, std = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        expected = network.forward_features((torch.from_numpy(noise).permute(0, 3, 1, 2) / 255 - mean) / std)[:, 0]
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [3, 1])
def test_features_of_a_vit_equal_a_plain_computation(channels, small_vit):
    network, path = small_vit
    uint8 = block_images(3, 0, 30, size=60)[..., :channels]
    ((rows,), logits) = features.ViT(SMALL, path, CPU)(uint8)
    resized = [Image.fromarray(np.broadcast_to(x, (60, 60, 3)).copy()).resize((224, 224), 3) for x in uint8]
    x = (torch.stack([torch.from_numpy(np.array(image)) for image in resized]).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.no_grad():
        patches = network.patch_embed.proj(x).flatten(2).mT
        x = torch.cat([network.cls_token.expand(3, -1, -1), patches], 1) + position_embedding(network.pos_embed, 14)
        expected = network.norm(network.blocks(x))[:, 0]
    assert logits is None and rows.shape == (3, 64)
    torch.testing.assert_close(rows, expected, rtol=1e-3, atol=1e-4)


def test_fd_dinov2_and_its_statistics(small_vit, images, monkeypatch, capsys):
    """Statistics stand for their images; the same command writes the same bytes."""
    _, path = small_vit
    a, b, json_file = images / "a.npz", images / "b.npz", images / "out.json"
    flags = ["--features", "dinov2", "--feature-model", SMALL, "--feature-weights", path, "--batch-size", 10]
    files = [images / "1.npz", images / "2.npz"]
    for file in files:
        out = evaluated(monkeypatch, capsys, b, *flags, "--save-statistics", file)
        assert f"statistics of 24 images, dinov2 {SMALL}" in out and "fd_dinov2  " not in out
    assert files[0].read_bytes() == files[1].read_bytes()
    results = {}
    for name, samples, reference in (("images", a, b), ("statistics", a, files[0]), ("same", b, files[0])):
        out = evaluated(monkeypatch, capsys, samples, "--reference", reference, *flags, "--json", json_file)
        results[name] = json.loads(json_file.read_text())
        assert f"features are those of {SMALL}" in out and "24 samples, not 50000" in out
    vit = features.ViT(SMALL, path, CPU)
    rows = [vit(np.load(file)["arr_0"])[0][0] for file in (a, b)]
    moments = [moment for x in rows for moment in (x.double().mean(0).numpy(), np.cov(x.double().numpy().T))]
    assert results["images"]["fd_dinov2"] == pytest.approx(metrics.frechet_distance(*moments), rel=1e-4)
    assert results["statistics"]["fd_dinov2"] == pytest.approx(results["images"]["fd_dinov2"], rel=1e-9)
    assert results["images"]["fd_dinov2"] > 0.1 and abs(results["same"]["fd_dinov2"]) < 1e-6
    assert results["images"]["kd_dinov2"] == pytest.approx(metrics.kernel_distance(*rows), rel=1e-3, abs=1e-7)
    assert results["statistics"]["kd_dinov2"] is None and len(results["images"]["weights_sha256"]) == 64

    def message(*words):
        return fail("evaluate", [a, *words], capsys, monkeypatch)

    words = ["--reference", files[0], "--features"]
    assert f"1.npz holds statistics of {vit.kind}, not of inception" in message(*words[:2])
    other = images / "other.safetensors"
    save_file({key: 1.5 * value for key, value in small_vit[0].state_dict().items()}, other)
    more = ["dinov2", "--feature-model", SMALL.split(".")[0], "--feature-weights"]  # the tag is the default one
    assert f"of {vit.kind}, not of {features.ViT(SMALL, other, CPU).kind}, and" in message(*words, *more, other)
    with pytest.raises(ValueError, match="not of pixels 4x4x1, and no images"):
        metrics.Monitor(ImageBatches(files[0], may_be_statistics=True), (4, 4, 1), None, CPU)


def test_weights_that_do_not_fit_are_refused(small_vit, images, monkeypatch, capsys):
    network, path = small_vit
    tensors, file, uint8 = network.state_dict(), images / "w.pth", np.load(images / "a.npz")["arr_0"]
    expected = features.ViT(SMALL, path, CPU)
    odd = {"norm.weight": torch.nn.Parameter(torch.stack([tensors["norm.weight"]] * 2, 1)[:, 0])}  # not in one piece
    torch.save(tensors | odd | {"mask_token": torch.zeros(1, 64)}, file)  # as Meta's files
    vit = features.ViT(SMALL, file, CPU)
    assert torch.equal(vit(uint8)[0][0], expected(uint8)[0][0]) and vit.kind == expected.kind

    def message(model=SMALL, *more):
        words = [images / "a.npz", "--reference", images / "b.npz", "--features", "dinov2", "--feature-model", model]
        return fail("evaluate", [*words, *(more or ("--feature-weights", file))], capsys, monkeypatch)

    assert "augreg_in21k_ft_in1k: it does not fit the model: cls_token" in message("vit_tiny_patch16_224")
    assert "is no ViT of timm: " in message("resnet18") and "Unknown model" in message("nothing")
    assert "Unknown model ()" in message("") and "Invalid pretrained tag" in message("test_vit.nothing")
    assert "has no class token" in message("test_vit2")
    json_flag = ["--json", images / "x"]
    assert "36x1_224.untrained: give --feature-weights" in message("vit_small_patch16_36x1_224", *json_flag)
    for content in (
        [tensors],
        {"norm.weight": 3},
        tensors | {"norm.weight": torch.zeros(3)},
        {"pos_embed": torch.ones(1)},
    ):
        torch.save(content, file)
        assert f"w.pth holds no weights of {SMALL}: " in message()
    file.write_text("no weights")
    assert f"w.pth holds no weights of {SMALL}: " in message()
    torch.save({"norm.weight": images}, file)  # a path is no tensor
    assert f"w.pth holds no weights of {SMALL}: " in message()
    torch.save({key: value * float("nan") for key, value in tensors.items()}, file)
    assert f"the features of {SMALL} are not finite" in message()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(images))
    assert f"cannot fetch model.safetensors of timm/{SMALL}: HF_HUB_OFFLINE is set" in message(SMALL, *json_flag)
    assert not (images / "x").exists()


def test_statistics_of_pixels(tmp_path, monkeypatch, capsys):
    x = np.random.default_rng(0).integers(0, 256, (200, 4, 4, 1), dtype=np.uint8)
    for name, content in dict(a=x, b=x[::-1] // 2, small=x[:, :2]).items():
        np.savez(tmp_path / f"{name}.npz", arr_0=content)
    words, out = ["--features", "pixels", "--json", tmp_path / "o.json", "--reference"], tmp_path / "stats.npz"
    evaluated(monkeypatch, capsys, tmp_path / "a.npz", *words, tmp_path / "b.npz")
    expected = json.loads((tmp_path / "o.json").read_text())["fd_pixels"]
    evaluated(monkeypatch, capsys, tmp_path / "b.npz", "--features", "pixels", "--save-statistics", out)
    text = evaluated(monkeypatch, capsys, tmp_path / "a.npz", *words, out)
    results = json.loads((tmp_path / "o.json").read_text())
    assert results["fd_pixels"] == pytest.approx(expected, rel=1e-12) and results["fd_pixels_floor"] is None
    assert "needs images in the reference" in text and set(np.load(out).files) == {"mu", "sigma", "features_of"}
    monitor = metrics.Monitor(ImageBatches(out, may_be_statistics=True), (4, 4, 1), None, CPU)
    assert monitor.metrics(x)["fd_pixels"] == pytest.approx(expected, rel=1e-12)

    def message(samples, *more):
        return fail("evaluate", [tmp_path / samples, *more], capsys, monkeypatch)

    assert "not of pixels 2x4x1, and no images" in message("small.npz", *words, out)
    assert "statistics of pixels 4x4x1, not of inception" in message("a.npz", "--reference", out)
    assert "--reference is required" in message("a.npz")
    assert "--reference is required" in message(
        "a.npz", "--save-statistics", tmp_path / "s.npz", "--json", tmp_path / "j"
    )
    assert "--save-statistics" in message("a.npz", "--save-statistics", tmp_path / "nowhere" / "s.npz")
    for flag, target in (("--save-statistics", "a.npz"), ("--json", "b.npz"), ("--save-statistics", "b.npz")):
        assert "is an input" in message("a.npz", "--reference", tmp_path / "b.npz", flag, tmp_path / target)
    assert "must end in .npz" in message("a.npz", "--save-statistics", tmp_path / "a.png")
    same = ["--json", tmp_path / "one.npz", "--save-statistics", tmp_path / ".." / tmp_path.name / "one.npz"]
    assert "are one file" in message("a.npz", "--reference", out, *same)
    for flag in ("--feature-model", "--feature-weights"):
        assert f"{flag} has no effect with --features inception" in message("a.npz", "--reference", out, flag, "x")
    assert not list(tmp_path.glob("*.png")) and not (tmp_path / "one.npz").exists()


def test_statistics_of_other_sizes_and_beside_images(tmp_path, monkeypatch, capsys):
    """Sizes are checked before anything is computed; all who compare take statistics before the images beside them."""
    x = np.random.default_rng(0).integers(0, 256, (50, 4, 4, 1), dtype=np.uint8)
    file, of_x = tmp_path / "s.npz", tmp_path / "x.npz"
    np.savez(of_x, arr_0=x)

    def words(kind, *statistics):
        mark = {"features_of": kind, **dict(zip(("mu", "sigma", "mu_s", "sigma_s"), statistics, strict=False))}
        np.savez(file, **mark, arr_0=x // 2)
        return [of_x, "--features", "pixels", "--reference", file]

    def monitor():
        return metrics.Monitor(ImageBatches(file, may_be_statistics=True), (4, 4, 1), None, CPU)

    own = metrics.moments(features.pixels(x))
    for wrong in ([np.zeros(3), np.eye(3)], [*own, np.zeros(2023), np.eye(2023)]):
        assert "features, not of (16,)" in fail("evaluate", words("pixels 4x4x1", *wrong), capsys, monkeypatch)
        with pytest.raises(ValueError, match="holds statistics of .* features"):
            monitor()
    out = evaluated(monkeypatch, capsys, *words("pixels 4x4x1", *own))
    assert abs(float(out.split("fd_pixels ")[1].split()[0])) < 1e-9 and abs(monitor().metrics(x)["fd_pixels"]) < 1e-9
    evaluated(monkeypatch, capsys, *words("other\nfeatures", *own))  # the images
    assert monitor().metrics(x)["fd_pixels"] > 1


def test_statistics_are_written_whole(tmp_path, monkeypatch):
    def full_disk(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    path, statistics = tmp_path / "s.npz", (np.ones(2), np.eye(2))
    write_statistics(path, "pixels 2x1x1", statistics)
    read = ImageBatches(path, may_be_statistics=True).statistics_of(features.Pixels((2, 1, 1)))
    assert all(np.array_equal(a, b) for a, b in zip(read.values(), statistics, strict=True))
    before = path.read_bytes()
    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_statistics(path, "pixels 2x1x1", statistics)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------------------------------- kernel distance


def test_kernel_distance_equals_a_double_loop(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((13, 5)), rng.standard_normal((9, 5)) + 0.5

    def mean(a, b, pairs):
        return np.mean([(sum(a[i] * b[j]) / 5 + 1) ** 3 for i, j in pairs])

    def distance(x, y):
        within = [mean(a, a, [(i, j) for i in range(len(a)) for j in range(len(a)) if i != j]) for a in (x, y)]
        return sum(within) - 2 * mean(x, y, [(i, j) for i in range(len(x)) for j in range(len(y))])

    for block in (4, 100):
        assert metrics.kernel_distance(*map(torch.from_numpy, (x, y)), block) == pytest.approx(
            distance(x, y), rel=1e-12
        )
    monkeypatch.setattr(metrics, "MOST_KERNEL_ROWS", 10)
    fewer = x[[i * 13 // 10 for i in range(10)]]  # evenly spaced
    assert metrics.kernel_distance(*map(torch.from_numpy, (x, y))) == pytest.approx(distance(fewer, y), rel=1e-12)


def test_kernel_distance_is_unbiased():
    """0 on average for samples of one distribution, on either side of it; far from 0 for another distribution."""
    g = torch.Generator().manual_seed(0)
    distances = torch.tensor([metrics.kernel_distance(*torch.randn(2, 50, 8, generator=g)) for _ in range(200)])
    assert distances.min() < 0 < distances.max()
    assert distances.mean().abs() < 3 * distances.std() / 200**0.5
    x, y = torch.randn(2, 50, 8, generator=g)
    assert metrics.kernel_distance(x, y + 1) > distances.max()
