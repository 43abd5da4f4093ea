"""From files to batches: data sets, transforms, and the order in which a run sees its examples."""

import dataclasses
import functools
import io
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

import hub
from distributed import ORDER_STREAM, generator

FORMATS = ("digits", "folder", "saved", "parquet", "arrow", "hub")


@dataclasses.dataclass
class Source:
    """Labelled images on disk or in memory.

    `examples[i]` is (PIL image, label), or raises an error of any kind if the image cannot be read. `name(i)` says
    which file or row that is.
    """

    examples: Sequence
    labels: np.ndarray  # (N,) int64; -1 where the label is missing
    name: Callable[[int], str]
    num_classes: int
    channels: int = 3  # of the images as they are: 1 grey, 3 colour
    image_size: int | None = None  # the size that all images have, if they do
    mirrors: bool = True  # whether a mirrored image is still one of its class

    def check_labels(self, num_classes):
        """Raise ValueError naming the first example whose label is missing or beyond `num_classes`."""
        bad = np.flatnonzero((self.labels < 0) | (self.labels >= num_classes))
        if len(bad):
            check_label(self.labels[bad[0]], num_classes, self.name(int(bad[0])))


def check_label(label, num_classes, name):
    """Raise ValueError if `label`, of the example called `name`, is missing (-1) or not below `num_classes`."""
    if not 0 <= label < num_classes:
        problem = "the label is missing" if label == -1 else f"label {label} is out of range"
        raise ValueError(f"{name}: {problem}; {num_classes} classes have the labels 0 to {num_classes - 1}")


def open_source(data_path, data_format=None, image_key="image", label_key="label", split="train"):
    """Open labelled images of any of these kinds.

        digits     scikit-learn's handwritten digits
        folder     a folder with one folder of images per class, labels in the folders' sorted order
        saved      a folder that `datasets.Dataset.save_to_disk` wrote
        parquet    a .parquet file, or a folder with such files
        arrow      an .arrow file, or a folder with such files
        hub        the name of a data set on the Hugging Face hub; HF_TOKEN and HF_HOME are honoured

    Args:
        data_path: 'digits', a path or a name.
        data_format: one of FORMATS; None: what is there (`recognise_format`).
        image_key, label_key: columns of the image and of the class label, in all but the first two.
        split: which split to read, where the data has several.

    Raises:
        ValueError: nothing of the kind is there, or a column is not there or not what it must be.
    """
    data_format = data_format or recognise_format(data_path)
    if data_format == "digits":
        return _digits()
    if data_format == "folder":
        return _class_folders(data_path)
    return _from_table(_open_table(data_path, data_format, split), data_path, image_key, label_key)


def recognise_format(data_path):
    """Which of FORMATS `data_path` is. Raises ValueError if it is none."""
    path = pathlib.Path(data_path)
    if data_path == "digits":
        return "digits"
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return "saved"
        return next((kind for kind in ("parquet", "arrow") if _files_of(path, kind)), "folder")
    if path.is_file() and path.suffix in (".parquet", ".arrow"):
        return path.suffix[1:]
    if not path.exists() and data_path.count("/") == 1 and not data_path.startswith((".", "/", "~")):
        return "hub"
    raise ValueError(
        f"--data-path {data_path!r}: no such data; give 'digits', a folder of class folders, a saved Dataset, Parquet "
        "or Arrow files, or the name of a data set on the hub"
    )


def _files_of(path, kind):
    """The files of a kind that `path` is or holds, not looking into class folders, sorted."""
    return [str(path)] if path.is_file() else sorted(map(str, path.glob(f"*.{kind}")))


def _digits():
    """scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, ten classes, part of the package."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0 ... 16
    examples = [(Image.fromarray(image), int(label)) for image, label in zip(pixels, digits.target, strict=True)]
    return Source(examples, digits.target, "digit {}".format, 10, channels=1, image_size=8, mirrors=False)


def _class_folders(data_path):
    from torchvision.datasets import ImageFolder

    try:
        folder = ImageFolder(data_path)
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--data-path {data_path!r} holds no class folders with images: {reason}") from error
    return Source(folder, np.array(folder.targets), lambda i: folder.samples[i][0], len(folder.classes))


def _open_table(data_path, data_format, split):
    """A `datasets.Dataset` of the split. Raises ValueError."""
    import datasets

    try:
        if data_format == "saved":
            table = datasets.load_from_disk(data_path)
            if isinstance(table, datasets.DatasetDict) and split not in table:
                raise ValueError(f"no split {split!r}; there are {', '.join(table)}")
            return table[split] if isinstance(table, datasets.DatasetDict) else table
        if data_format == "hub":
            hub.require(f"the data set {data_path}")
            return datasets.load_dataset(data_path, split=split)
        files = _files_of(pathlib.Path(data_path), data_format)
        if not files:
            raise ValueError(f"no .{data_format} files there")
        return datasets.load_dataset(data_format, data_files=files, split="train")
    except Exception as error:  # of many libraries underneath; all mean that the data cannot be read
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"--data-path {data_path!r} cannot be read as {data_format} data: {reason}") from error


class _TableExamples(Sequence):
    """Rows of a `datasets.Dataset` as (PIL image, label)."""

    def __init__(self, table, image_key, label_key):
        import datasets

        # Not decoded by the table, which would not say which row is broken.
        self.table = table.select_columns([image_key, label_key]).cast_column(image_key, datasets.Image(decode=False))
        self.image_key, self.label_key = image_key, label_key

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        row = self.table[index]
        cell, label = row[self.image_key], row[self.label_key]
        if cell is None:
            raise ValueError("the image is missing")
        image = Image.open(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"]))
        return image, -1 if label is None else label


def _from_table(table, data_path, image_key, label_key):
    """A source of the rows of a `datasets.Dataset`, whose columns it checks. Raises ValueError."""
    import datasets

    for flag, key in (("--image-key", image_key), ("--label-key", label_key)):
        if key not in table.features:
            columns = ", ".join(table.features)
            raise ValueError(f"{flag} {key!r}: {data_path} has no such column; it has {columns}")
    feature = table.features[label_key]
    if not getattr(feature, "dtype", "").startswith(("int", "uint")):
        raise ValueError(f"--label-key {label_key!r}: labels must be integers, and {data_path} has {feature}")
    if len(table) == 0:
        raise ValueError(f"--data-path {data_path!r} holds no rows")
    images = table.features[image_key]
    holds_images = isinstance(images, datasets.Image) or (isinstance(images, dict) and "bytes" in images)
    if not holds_images and getattr(images, "dtype", None) not in ("binary", "large_binary", "string"):
        raise ValueError(f"--image-key {image_key!r}: {data_path} has no images there, but {images}")
    labels = np.array([-1 if label is None else label for label in table[label_key]])
    is_named = isinstance(feature, datasets.ClassLabel)
    num_classes = feature.num_classes if is_named else max(int(labels.max()) + 1, 1)
    examples = _TableExamples(table, image_key, label_key)
    return Source(examples, labels, f"row {{}} of {data_path}".format, num_classes)


def center_crop(image, size):
    """ADM's crop: halve with a box filter while twice too large, resize the short side to `size` bicubically, crop."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


class ImageDataset(Dataset):
    """Images of a source as the network takes them.

    An item is asked for by (index, flip): what is random about it was decided by whoever ordered it, so workers hold
    no state. It is (image, label, problems): float32 (channels, image_size, image_size) in [-1, 1], and int. If the
    example that was asked for is bad (an image that cannot be read, a label that is no class), the next good one stands
    in its place, and `problems` has one line for each that was passed over; whoever takes the item decides what that
    means.

    Args:
        source: where images and labels come from.
        image_size, channels: of the images that come out; 1 channel is grey, 3 are RGB.
        num_classes: labels must lie below; None: the source's.
    """

    def __init__(self, source, image_size, channels, num_classes=None):
        self.source = source
        self.image_size = image_size
        self.mode = {1: "L", 3: "RGB"}[channels]
        self.num_classes = num_classes or source.num_classes

    def __len__(self):
        return len(self.source.examples)

    def __getitem__(self, key):
        index, flip = key
        problems = []
        for candidate in range(index, index + len(self)):
            try:
                return *self._load(candidate % len(self), flip), problems
            except ValueError as error:
                problems.append(str(error))
        raise ValueError(f"not one example is good; the first: {problems[0]}")

    def _load(self, index, flip):
        name = self.source.name(index)
        try:
            image, label = self.source.examples[index]
            image = image.convert(self.mode)
        except Exception as error:  # image decoders raise errors of many kinds
            raise ValueError(f"{name}: the image cannot be read: {' '.join(str(error).split())}") from error
        check_label(label, self.num_classes, name)
        image = center_crop(image, self.image_size)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1  # (H, W) or (H, W, 3)
        return pixels.reshape(self.image_size, self.image_size, -1).permute(2, 0, 1).contiguous(), label


class GlobalBatchSampler:
    """The (index, flip) keys of one rank's micro batches, step after step, without end.

    The order is one long sequence: a permutation of the data for each epoch, drawn from (seed, epoch) alone, one after
    the other, so that no example is left out at an epoch's end. Step s takes places [s B, (s + 1) B) of it; each rank
    has a contiguous share of those, in micro batches. What a step trains on is thus the same for any number of ranks,
    any micro batch size, and after any restart.

    Args:
        num_examples: size of the data set.
        global_batch_size: B, over all ranks and accumulated micro batches.
        micro_batch_size: examples per item; B is a multiple of micro_batch_size times world_size.
        mirror: flip each example with probability 1/2 per epoch.
    """

    def __init__(
        self, num_examples, global_batch_size, micro_batch_size, *, seed, rank, world_size, mirror, start_step=0
    ):
        self.num_examples = num_examples
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.mirror = mirror
        self.start_step = start_step

    def __iter__(self):
        # A step can reach over the end of an epoch, so the orders of two are at hand.
        epoch_keys = functools.lru_cache(maxsize=2)(self._epoch_keys)
        share = self.global_batch_size // self.world_size
        step = self.start_step
        while True:
            first = step * self.global_batch_size + self.rank * share
            for start in range(first, first + share, self.micro_batch_size):
                places = (divmod(place, self.num_examples) for place in range(start, start + self.micro_batch_size))
                yield [epoch_keys(epoch)[position] for epoch, position in places]
            step += 1

    def _epoch_keys(self, epoch):
        g = generator("cpu", self.seed, ORDER_STREAM, epoch)
        order = torch.randperm(self.num_examples, generator=g).tolist()
        flips = (torch.rand(self.num_examples, generator=g) < 0.5).tolist() if self.mirror else [False] * len(order)
        return list(zip(order, flips, strict=True))


def make_loader(dataset, sampler, num_workers, device):
    """An endless iterator of (images (M, C, H, W), labels (M,), problems) on the CPU, M the micro batch size.

    `problems` lists the bad examples for which others stand in the batch; see `ImageDataset`.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
        collate_fn=_collate,
    )
    return iter(loader)


def _collate(items):
    images, labels, problems = zip(*items, strict=True)
    return *default_collate(list(zip(images, labels, strict=True))), sum(problems, [])
