"""evaluate.py, its metrics and the monitor of training, compared with closed forms and with ADM's own suite."""

import json
import pathlib
import pickle

import numpy as np
import pytest
import torch
import torchvision
from conftest import GOLDEN
from PIL import Image
from test_command_line import fail

import evaluate
from evaluation import features, metrics
from evaluation.images import STATISTICS, ImageBatches

CPU = torch.device("cpu")

# ---------------------------------------------------------------------------------------------- metrics


def random_orthogonal(rng, size):
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


@pytest.mark.parametrize("rank", [40, 15])
def test_frechet_distance_of_gaussians_in_closed_form(rank):
    """Covariances with the same eigenvectors commute: |mean difference|^2 + sum (sqrt a - sqrt b)^2."""
    rng = np.random.default_rng(0)
    rotation = random_orthogonal(rng, 40)
    a, b = rng.uniform(0.1, 3, (2, 40))
    a[rank:] = 0
    shift = rng.standard_normal(40)
    covariances = [rotation @ np.diag(values) @ rotation.T for values in (a, b)]
    expected = (shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert metrics.frechet_distance(shift, covariances[0], 0 * shift, covariances[1]) == pytest.approx(
        expected, rel=1e-9
    )
    assert metrics.frechet_distance(shift, covariances[0], shift, covariances[0]) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """In one plane, of A = R diag(1, 0) R^T and diag(1, 0): tr (A B)^(1/2) = |cos angle|."""
    angle = 0.7
    direction = np.array([np.cos(angle), np.sin(angle)])
    distance = metrics.frechet_distance(np.zeros(2), np.outer(direction, direction), np.zeros(2), np.diag([1.0, 0.0]))
    assert distance == pytest.approx(2 - 2 * np.cos(angle), rel=1e-9)


def test_moments_of_batches_equal_numpy_s():
    rows = np.random.default_rng(0).standard_normal((101, 7)) * 3 + 1000
    accumulated = metrics.Moments(7)
    for start in range(0, 101, 13):
        accumulated.add(rows[start : start + 13].astype(np.float32))
    mean, covariance = accumulated.result()
    rows = rows.astype(np.float32).astype(np.float64)
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(rows.T), rtol=1e-10)
    with pytest.raises(ValueError, match="needs two images or more, not 0"):
        metrics.Moments(3).result()


def test_inception_score_of_known_distributions():
    certain = 50 * torch.eye(10).repeat(30, 1)  # ten classes, each image certain: the score is 10
    assert metrics.inception_score(certain) == pytest.approx(10, rel=1e-6)
    assert metrics.inception_score(torch.zeros(50, 10)) == pytest.approx(1)
    assert metrics.inception_score(5000 * torch.eye(10)) == pytest.approx(10)  # where a probability is 0
    # Contiguous splits of 5,000, each of one class: nothing varies within a split.
    assert metrics.inception_score(50 * torch.eye(2).repeat_interleave(5000, 0)) == pytest.approx(1)


def test_precision_and_recall_of_points_on_a_line():
    """Reference 0 ... 9: the ball about each reaches to its third neighbour. Samples 0, 1, 2, 3 and six far away."""
    reference = torch.arange(10.0)[:, None]
    samples = torch.cat([torch.arange(4.0), 1000 + 100 * torch.arange(6.0)])[:, None]
    precision, recall = metrics.precision_and_recall(reference, samples, block=3)
    assert precision == 0.4
    # The balls about the samples 0 to 3 have the radii 3, 2, 2 and 3 and reach up to 6; those far away reach nothing.
    assert recall == 0.7
    assert metrics.precision_and_recall(reference, reference) == (1.0, 1.0)


# ---------------------------------------------------------------------------------------------- the script


def inception_weights(seed):
    """The weights of golden/evaluator: drawn from `seed`, in the layout of torch-fidelity."""
    network = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    weights = network.state_dict()
    g = torch.Generator().manual_seed(seed + 1)
    for key, value in weights.items():
        if key.endswith("conv.weight"):
            value.copy_(torch.randn(value.shape, generator=g) * (2 / value[0].numel()) ** 0.5)
        elif key.endswith(("bn.weight", "running_var")):
            value.copy_(0.7 + 0.6 * torch.rand(value.shape, generator=g))
        elif key.endswith(("bn.bias", "running_mean")):
            value.copy_(0.2 * torch.randn(value.shape, generator=g))
        elif key == "fc.weight":
            value.copy_(0.06 * torch.randn(value.shape, generator=g))
        elif key == "fc.bias":
            value.copy_(torch.randn(value.shape, generator=g))
    return weights


def block_images(count, seed, noise, size=96):
    """The images of golden/evaluator (count, size, size, 3): blocks of random colour with Gaussian noise on top."""
    rng = np.random.default_rng(seed)
    blocks = np.kron(rng.uniform(0, 255, (count, 6, 6, 3)), np.ones((1, size // 6, size // 6, 1)))
    return np.clip(blocks + rng.normal(0, noise, blocks.shape), 0, 255).astype(np.uint8)


def evaluated(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, words)])
    evaluate.main()
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(inception_weights(0), path)
    return path


def test_metrics_equal_those_of_adm_s_suite(weights_file, tmp_path, monkeypatch, capsys):
    expected = json.loads((GOLDEN / "evaluator.json").read_text())
    np.savez(tmp_path / "reference.npz", arr_0=block_images(96, 1, 30))
    np.savez_compressed(tmp_path / "sample.npz", arr_0=block_images(128, 2, 40), arr_1=np.arange(128))
    files = [tmp_path / "sample.npz", "--reference", tmp_path / "reference.npz", "--json", tmp_path / "out.json"]
    out = evaluated(monkeypatch, capsys, *files, "--inception-weights", weights_file, "--batch-size", 48)
    results = json.loads((tmp_path / "out.json").read_text())
    for key in ("fid", "sfid", "inception_score"):
        assert results[key] == pytest.approx(expected[key], rel=1e-4)
    for key in ("precision", "recall"):
        assert results[key] == pytest.approx(expected[key], abs=0.002)
    assert (results["n_samples"], results["n_reference"], results["weights_verified"]) == (128, 96, False)
    assert len(results["weights_sha256"]) == len(results["reference_sha256"]) == 64
    assert "not comparable" in out and "weights are not the published ones" in out and "128 samples" in out


def test_statistics_as_reference_and_grey_images(weights_file, tmp_path, monkeypatch, capsys):
    """Statistics of the samples themselves: distance 0 up to rounding, and no images for precision and recall."""
    images = block_images(4, 3, 20, size=24)[..., :1]
    np.savez(tmp_path / "s.npz", arr_0=images)
    words = [tmp_path / "s.npz", "--inception-weights", weights_file]
    evaluated(monkeypatch, capsys, *words, "--save-statistics", tmp_path / "stats.npz", "--batch-size", 3)
    with np.load(tmp_path / "stats.npz") as file:
        assert {name: file[name].shape for name in file.files} == STATISTICS
        assert all(file[name].dtype == np.float64 for name in file.files)
    words += ["--reference", tmp_path / "stats.npz", "--json", tmp_path / "out.json"]
    out = evaluated(monkeypatch, capsys, *words)
    results = json.loads((tmp_path / "out.json").read_text())
    assert abs(results["fid"]) < 1e-4 and abs(results["sfid"]) < 1e-4
    assert results["precision"] is None and results["n_reference"] is None
    assert "needs images in the reference" in out
    # The monitor of training compares the same moments; their distance takes seconds, and is tested above.
    monkeypatch.setattr("evaluation.metrics.frechet_distance", lambda *moments: moments)
    reference = ImageBatches(tmp_path / "stats.npz", may_be_statistics=True)
    measured = metrics.Monitor(reference, (72, 72, 3), weights_file, CPU).metrics(images)
    mean, covariance, *of_reference = measured.pop("fid")
    np.testing.assert_allclose(mean, of_reference[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(covariance, of_reference[1], rtol=1e-5, atol=1e-6)
    caveats = ["Inception's weights are not the published ones", "4 samples, not 50000"]
    assert measured == {"n_samples": 4, "weights_verified": False, "caveats": caveats}


def test_pixel_metrics_for_any_batch_size(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    real = rng.integers(0, 256, (400, 4, 4, 1), dtype=np.uint8)
    folder = tmp_path / "real"
    folder.mkdir()
    for i, image in enumerate(real):
        Image.fromarray(image[..., 0]).save(folder / f"{i:04d}.png")
    np.savez(tmp_path / "s.npz", arr_0=real[::-1] // 2)
    words = [tmp_path / "s.npz", "--reference", folder, "--features", "pixels", "--json", tmp_path / "out.json"]
    rows = [x.reshape(len(x), -1) / 255 for x in (real[::-1] // 2, real, real[::2], real[1::2])]
    expected = [metrics.frechet_distance(*metrics.moments(a), *metrics.moments(b)) for a, b in (rows[:2], rows[2:])]
    for batch_size in (64, 1, 7):
        out = evaluated(monkeypatch, capsys, *words, "--batch-size", batch_size)
        results = json.loads((tmp_path / "out.json").read_text())
        assert [results["fd_pixels"], results["fd_pixels_floor"]] == pytest.approx(expected, rel=1e-9)
        assert "fid" not in results and "fd_pixels " in out and "\nfid" not in out
    monitor = metrics.Monitor((real[start : start + 9] for start in range(0, 400, 9)), (4, 4, 1), None, CPU)
    assert monitor.metrics(real[::-1] // 2) == {"fd_pixels": pytest.approx(expected[0], rel=1e-9), "n_samples": 400}
    with pytest.raises(ValueError, match="real does not hold images of"):
        metrics.Monitor(ImageBatches(folder), (4, 4, 3), None, CPU)


def test_a_folder_of_grey_and_coloured_images_is_coloured(tmp_path):
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(np.full((4, 4, 3), 9, np.uint8)).save(tmp_path / "b.png")
    (images,) = ImageBatches(tmp_path).batches(2)
    assert images.shape == (2, 4, 4, 3) and images[0].max() == images[0].min() == 7


def test_mu_and_sigma_alone_or_beside_images(weights_file, tmp_path, monkeypatch, capsys):
    """The layout of pytorch-fid: FID by mu and sigma, the other metrics by the images beside them, if there are any."""
    images, others = block_images(4, 3, 20, size=24), block_images(3, 5, 60, size=24)
    mean, spread = np.full(2048, 0.5, np.float32), 2 * np.eye(2048, dtype=np.float32)
    np.savez(tmp_path / "s.npz", arr_0=images)
    np.savez(tmp_path / "stats.npz", mu=mean, sigma=spread)
    np.savez(tmp_path / "both.npz", mu=mean, sigma=spread, arr_0=others)
    np.savez(tmp_path / "images.npz", arr_0=others)
    monkeypatch.setattr(metrics, "frechet_distance", lambda *moments: sum(float(m.sum()) for m in moments[2:]))
    results = {}
    for name in ("stats", "both", "images"):
        words = [tmp_path / "s.npz", "--reference", tmp_path / f"{name}.npz", "--inception-weights", weights_file]
        out = evaluated(monkeypatch, capsys, *words, "--json", tmp_path / "out.json")
        assert out.startswith("reading ")
        assert ("sfid             needs images in the reference" in out) == (name == "stats")
        results[name] = json.loads((tmp_path / "out.json").read_text())
    assert results["stats"]["fid"] == results["both"]["fid"] == 2048 * 2.5 != results["images"]["fid"]
    assert results["stats"]["sfid"] is None and results["stats"]["recall"] is None and results["stats"]["kid"] is None
    for key in ("sfid", "precision", "recall", "kid"):
        assert results["both"][key] == results["images"][key]


def test_small_numbers_keep_their_digits(capsys):
    evaluate.report({"fid": 2.12345, "kid": 0.000512345, "caveats": []}, 2, 2)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[:2]] == ["2.1235", "0.000512"]


def test_a_covariance_with_a_negative_eigenvalue_is_refused():
    with pytest.raises(ValueError, match="has the eigenvalue -1"):
        metrics.frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]]))


def test_a_folder_is_read_as_training_reads_it(tmp_path, monkeypatch, capsys):
    """Links to folders are followed, hidden files and folders are not; what is no image is counted, and said."""
    real, elsewhere = tmp_path / "real", tmp_path / "elsewhere"
    for folder in (real / "a", elsewhere, real / ".hidden"):
        folder.mkdir(parents=True)
        for i, suffix in enumerate(("png", "gif", "tif", "JPG")):
            Image.new("RGB", (4, 4), (60 * i, 9, 9)).save(folder / f"{i}.{suffix}")
    (real / "b").symlink_to(elsewhere)
    (elsewhere / "again").symlink_to(real)  # a loop
    (real / "a" / "._1.png").write_text("a resource fork")
    (real / "a" / "notes.txt").write_text("no image")
    assert ImageBatches(real).shape == (8, 4, 4, 3)
    words = [real, "--reference", real, "--features", "pixels"]
    out = evaluated(monkeypatch, capsys, *words)
    assert "8 samples; 8 reference images" in out
    assert "passed over: 2 hidden files and folders" in out and "passed over: 1 files that are no images (.txt" in out
    (real / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    assert "gone.png: No such file" in fail("evaluate", words, capsys, monkeypatch)


def test_splits_that_are_read_together_are_named(tmp_path):
    for split in ("training", "testing"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / split / "cat" / "a.png")
    (note,) = ImageBatches(tmp_path).notes
    assert "testing, training are read together" in note and ImageBatches(tmp_path / "training").notes == []


def test_every_image_of_a_folder_is_checked(tmp_path):
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "a.png")
    Image.fromarray(np.full((4, 4), 20000, np.uint16)).save(tmp_path / "b.png")
    Image.new("LA", (4, 4), (100, 0)).save(tmp_path / "c.png")
    (images,) = ImageBatches(tmp_path).batches(3)
    assert images.shape == (3, 4, 4, 3)
    assert [set(image.ravel().tolist()) for image in images] == [{9}, {78}, {100}]  # 20000 / 257
    (tmp_path / "a.png").unlink()
    assert ImageBatches(tmp_path).shape == (2, 4, 4, 1)
    Image.new("F", (4, 4), 0.5).save(tmp_path / "d.tif")
    with pytest.raises(ValueError, match="d.tif: images of mode F have no range that is known"):
        ImageBatches(tmp_path)
    (tmp_path / "d.tif").unlink()
    Image.new("L", (5, 4)).save(tmp_path / "e.png")
    with pytest.raises(ValueError, match="b.png of 4 x 4 and e.png of 5 x 4 pixels"):
        ImageBatches(tmp_path)


def write_odd_files(folder):
    """Write good.npz, and files that are wrong in one way each."""
    good = block_images(4, 0, 10, size=12)
    np.savez(folder / "good.npz", arr_0=good)
    np.savez(folder / "small.npz", arr_0=good[:, :6, :6])
    np.savez(folder / "floats.npz", arr_0=good / 255)
    np.savez(folder / "flat.npz", arr_0=good[0])
    np.savez(folder / "labels.npz", arr_1=np.arange(3))
    np.savez(folder / "half.npz", mu=np.zeros(2048))
    np.savez(folder / "three.npz", mu=np.zeros(2048), sigma=np.eye(2048), mu_s=np.zeros(2023))
    sizes = dict(mu=2048, sigma=(2048, 2048), mu_s=2023, sigma_s=(2023, 2023))
    whole_statistics = {key: np.zeros(size) for key, size in sizes.items()}
    np.savez(folder / "scalar.npz", **whole_statistics | {"mu": 3.0})
    np.savez(folder / "narrow.npz", **whole_statistics | {"mu": np.zeros(3), "sigma": np.eye(3)})
    np.savez(folder / "complex.npz", mu=np.zeros(2048, complex), sigma=np.eye(2048))
    np.savez(folder / "skewed.npz", mu=np.zeros(2048), sigma=np.triu(np.ones((2048, 2048))))
    np.savez(folder / "negative.npz", mu=np.zeros(2048), sigma=-np.eye(2048))
    np.savez(folder / "boxed.npz", fid=np.array({"mu": 0}, dtype=object))
    (folder / "edm2.pkl").write_bytes(pickle.dumps({"fid": {"mu": np.zeros(3)}}))
    np.savez(folder / "nan.npz", **whole_statistics | {"mu": np.full(2048, np.nan)})
    np.savez(folder / "fortran.npz", arr_0=np.asfortranarray(good))
    np.savez(folder / "one.npz", arr_0=good[:1])
    np.savez(folder / "one-and-statistics.npz", arr_0=good[:1], mu=np.zeros(2048), sigma=np.eye(2048))
    np.save(folder / "array.npy", good)
    np.savez(folder / "pickled.npz", arr_0=np.array([{"a": 1}], dtype=object))
    (folder / "text.npz").write_text("no archive")
    whole = (folder / "good.npz").read_bytes()
    (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (folder / "flipped.npz").write_bytes(flipped)
    (folder / "empty").mkdir()
    (folder / "w.pth").write_bytes(pickle.dumps({"a": pathlib.Path("x")}))
    np.savez_compressed(folder / "packed.npz", arr_0=good)
    packed = bytearray((folder / "packed.npz").read_bytes())
    packed[len(packed) // 2] ^= 1
    (folder / "packed.npz").write_bytes(packed)
    header = bytearray(whole)
    header[header.index(b"descr") - 2 : header.index(b"descr")] = b"(("
    (folder / "header.npz").write_bytes(header)
    short = whole.replace(b"'shape': (4, 12, 12, 3)", b"'shape': (9, 12, 12, 3)")
    (folder / "short.npz").write_bytes(short)


def test_mistakes_in_evaluation(tmp_path, monkeypatch, capsys):
    write_odd_files(tmp_path)
    whole = (tmp_path / "good.npz").read_bytes()

    def message(samples, reference="good.npz", *more):
        words = [tmp_path / samples, "--reference", tmp_path / reference, "--features", "pixels", *more]
        return fail("evaluate", words, capsys, monkeypatch)

    assert "no such file or folder" in message("nowhere.npz")
    assert "arr_0 is float64" in message("floats.npz")
    assert "it must be uint8 (N, H, W, 3)" in message("flat.npz")
    assert "it holds no arr_0, but arr_1" in message("labels.npz")
    assert "statistics sigma are missing" in message("good.npz", "half.npz")
    assert "statistics sigma_s are missing" in message("good.npz", "three.npz")
    assert "mu holds complex128" in message("good.npz", "complex.npz")
    assert "sigma is no covariance" in message("good.npz", "skewed.npz")
    assert "sigma is no covariance" in message("good.npz", "negative.npz")
    assert "it holds no arr_0, but fid" in message("good.npz", "boxed.npz")
    assert "a pickle can run code" in message("good.npz", "edm2.pkl")
    assert "arr_0 is object" in message("pickled.npz")
    for name in ("text.npz", "cut.npz", "flipped.npz", "packed.npz", "header.npz", "short.npz", "array.npy"):
        assert name in message(name)
    assert "in Fortran order with" in message("fortran.npz")
    for words in (["one.npz"], ["good.npz", "one-and-statistics.npz"]):
        assert f"{words[-1]}: a covariance needs two images or more, not 1" in message(*words)
    assert "mu has the shape (), and must be (2048,)" in message("good.npz", "scalar.npz")
    assert "mu has the shape (3,)" in message("good.npz", "narrow.npz")
    assert "mu is not finite" in message("good.npz", "nan.npz")
    assert "the folder holds no images" in message("empty")
    assert "holds images of (12, 12, 3), and" in message("good.npz", "small.npz")
    words = ["good.npz", "good.npz", "--json"]
    assert "is an input; it would be overwritten" in message(*words, tmp_path / "good.npz")
    assert "is a folder" in message(*words, tmp_path / "empty")
    assert "cannot" in message(*words, "/proc/x.json") or "No such file" in message(*words, "/proc/x.json")
    assert whole == (tmp_path / "good.npz").read_bytes()
    assert "the folder /nowhere does not exist" in message("good.npz", "good.npz", "--json", "/nowhere/x.json")
    words = [tmp_path / "good.npz", "--reference", tmp_path / "small.npz"]
    assert "holds images of (12, 12), and" in fail("evaluate", words, capsys, monkeypatch)
    words = [tmp_path / "good.npz", "--reference", tmp_path / "good.npz", "--inception-weights"]
    assert "No such file" in fail("evaluate", [*words, tmp_path / "nowhere.pth"], capsys, monkeypatch)
    assert "holds no weights of this Inception" in fail("evaluate", [*words, tmp_path / "w.pth"], capsys, monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert "cannot fetch Inception's weights" in fail("evaluate", words[:-1], capsys, monkeypatch)


def test_squared_distances_are_never_negative():
    """Rounding makes that of a point and its copy negative, and another one with every size of a block."""
    x = 30 + torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    distances = metrics._squared_distances(x, x)
    assert distances.min() == 0
    expected = (x.double()[:, None] - x.double()[None]).square().sum(2)
    torch.testing.assert_close(distances.double(), expected, atol=0.1, rtol=1e-3)


def test_what_makes_metrics_comparable_with_published_ones():
    inception = features.Inception(None, CPU)
    inception._loaded = None, features.WEIGHTS_SHA256_PREFIX + "0" * 56
    assert inception.comparability(50_000) == {"weights_verified": True, "caveats": []}
    assert inception.comparability(49_999)["caveats"] == ["49999 samples, not 50000"]
    inception._loaded = None, "1" * 64
    caveats = ["Inception's weights are not the published ones"]
    assert inception.comparability(60_000) == {"weights_verified": False, "caveats": caveats}


class Points:
    """Stands in for `ImageBatches`, and for the features: each image has two features, for FID and for sFID."""

    metric, kernel_metric, kind, sizes, axes, sha256 = "fid", "kid", "inception", (2, 2), 2, "0" * 64

    def __init__(self, path, rows, statistics=None, asked=()):
        self.path, self.rows, self.shape, self.asked = path, rows, (len(rows), 4, 4, 3), asked
        self.statistics = statistics or {}

    def __len__(self):
        return len(self.rows)

    def statistics_of(self, features):
        return self.statistics

    def batches(self, size):
        for batch in self.rows.split(size):
            self.asked.append(self.path)
            yield batch

    def __call__(self, rows):
        return (rows, rows), torch.zeros(len(rows), 3)

    def comparability(self, num_samples):
        return {"caveats": [f"{num_samples} samples"]}


def test_precision_and_recall_are_of_the_first_reference_images_and_fid_of_all(monkeypatch):
    asked = []
    monkeypatch.setattr(metrics, "MOST_REFERENCES", 5)
    rows = torch.randn(10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows[5:] += 100
    reference = Points("reference", rows.flip(0), asked=asked)
    samples = metrics.collect(reference, Points("samples", rows, asked=asked), 4)
    results = metrics.network_metrics(reference, samples, reference, 4)
    assert asked == ["samples"] * 3 + ["reference"] * 3 and results["caveats"] == ["10 samples"]
    assert (results["precision"], results["recall"]) == (0.5, 1.0)  # half of the samples are far from the first five
    assert results["fid"] == pytest.approx(0, abs=1e-6) and results["sfid"] == pytest.approx(0, abs=1e-6)
    mean, covariance = metrics.moments(rows.numpy())
    reference.statistics = dict(mu=mean + [3, 4], sigma=covariance, mu_s=mean + [0, 2], sigma_s=covariance)
    results = metrics.network_metrics(reference, samples, reference, 4)
    assert len(asked) == 6 + 2  # batches for five images
    assert results["kid"] == metrics.kernel_distance(rows, reference.rows[:5])  # for any size of batches
    assert results["fid"] == pytest.approx(25) and results["sfid"] == pytest.approx(4)
    nothing = Points("statistics", rows[:0], reference.statistics)
    results = metrics.network_metrics(reference, samples, nothing, 4)
    assert [results[key] for key in ("precision", "recall", "kid")] == [None] * 3 and results["fid"] == pytest.approx(
        25
    )
    other = Points("samples", rows)
    other.shape = (10, 8, 8, 3)
    with pytest.raises(ValueError, match="samples holds images of"):
        metrics.check_reference(reference, other, reference)
