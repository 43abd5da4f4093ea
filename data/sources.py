"""Labelled images by name, in class folders, in tables, and on the hub; and the flags that say which."""

import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from data.cached import MANIFEST, SETTINGS, CachedLatents
from data.images import label_problem
from utils import hub
from utils.command_line import flag_group, integer, one_of
from utils.files import named, one_line
from vae import PRECISIONS

# Keys of the flags that are arguments of `open_source`: `open_source(**given(args, DATA_FLAGS))`.
DATA_FLAGS = ("data_path", "data_format", "image_key", "label_key", "split", "streaming", "skip_bad_images")
FORMATS = ("folder", "saved", "parquet", "arrow", "latents", "hub")  # beside the names in DATASETS
STREAMED_FORMATS = ("parquet", "arrow", "hub")
PATHS = "a folder of class folders, a saved Dataset, Parquet or Arrow files, cached latents, or a hub data set's name"
SPLITS = {"train", "val", "valid", "validation", "test"}
MOST_CLASSES = 1_000_000  # a larger label is taken for a mistake
SHUFFLE_BUFFER = 10_000  # examples of a stream that are shuffled among themselves


@dataclasses.dataclass
class Source:
    """Labelled images. `examples[i]` is (image, label), or raises any error if the image cannot be read.

    The image is a PIL image, or a uint8 array (H, W[, C]) or tensor (C, H, W) for torchvision's `to_pil_image`. The
    label is an integer; -1 or None if missing. Of a stream, `examples` is a function of a seed, which decides the
    order: it returns an iterator over (key, function without arguments that returns (image, label))."""

    examples: Sequence | Dataset | Callable[[int], Iterator]
    labels: np.ndarray | None  # (N,) integers, -1 where missing; None if they are known only from the examples
    name: Callable[[int], str]  # from an index, or a stream's key, to what messages call the example
    num_classes: int | None  # None if unknown
    num_examples: int | None  # None if unknown, which only a stream's can be
    declares_classes: bool = True  # False if num_classes is the largest label + 1, or unknown
    channels: int = 3  # of the images in pixel space: 1 grey, 3 RGB
    image_size: int | None = None  # None if the images differ in size
    mirrors: bool = True  # whether a mirror image keeps its label
    streamed: bool = False  # whether the examples come as a stream, not by index
    left_out: list = dataclasses.field(default_factory=list)  # one line for each bad thing that was left out

    def fingerprint(self):
        """Return the SHA-256 of the examples' names and labels, in their order."""
        digest = hashlib.sha256(b"" if self.labels is None else self.labels.astype(np.int64).tobytes())
        for i in range(self.num_examples):
            digest.update(self.name(i).encode() + b"\0")
        return digest.hexdigest()

    def resolve_classes(self, num_classes=None, skip_bad=False):
        """Return --num-classes or, if None, the data's. Raise ValueError if unknown, or a label does not fit it."""
        if num_classes is None and self.num_classes is None:
            raise ValueError("--num-classes is missing: the data do not say how many classes they have")
        if self.declares_classes and self.num_classes and num_classes and num_classes > self.num_classes:
            raise ValueError(f"--num-classes {num_classes} contradicts the data, which has {self.num_classes}")
        num_classes = num_classes or self.num_classes
        if not skip_bad and self.labels is not None:  # else labels are checked as they are read
            for i in np.flatnonzero((self.labels < 0) | (self.labels >= num_classes))[:1]:
                raise ValueError(label_problem(self.labels[i], num_classes, self.name(int(i))))
        return num_classes


def add_data_flags(parser, with_loader=True):
    """Add the flags of the images, the autoencoder and, if `with_loader`, the loader. Return the group's `add`."""
    add, kinds = flag_group(parser, "data"), (*DATASETS, *FORMATS)
    add("--data-path", str, "PATH|NAME", f"a data set by name ({', '.join(DATASETS)}), {PATHS}")
    add("--data-format", one_of(*kinds), "FORMAT", f"one of {', '.join(kinds)} (default: recognised from --data-path)")
    add("--image-key", str, "COLUMN", "column of the images, in tables", default="image")
    add("--label-key", str, "COLUMN", "column of the class labels, in tables", default="label")
    add("--split", str, "NAME", "split to read, where the data have several (default: train)")
    add("--streaming", None, None, "read hub, parquet or arrow data from front to back, without a copy on the disk")
    add("--skip-bad-images", None, None, "leave out bad images, labels, class folders and shards (default: stop)")
    add("--image-size", integer(1), "PIXELS", "size of the crops (default: the images' if they have one, else 256)")
    add("--vae", str, "ema|mse|none|NAME|FOLDER", "autoencoder, none for pixels (default: the cached latents', or ema)")
    add("--vae-precision", one_of(*PRECISIONS), "fp32|bf16", "precision of the autoencoder", default="fp32")
    if with_loader:
        add("--num-workers", integer(0), "N", "processes per rank that load data", default=4)
    return add


def open_source(
    data_path=None,
    data_format=None,
    image_key="image",
    label_key="label",
    split=None,
    streaming=False,
    skip_bad_images=False,
):
    """Open the labelled images that the flags of these names describe. A format is a name in DATASETS, or

        folder     a folder with one folder of images per class, labels in the folders' sorted order
        saved      a folder that `datasets.Dataset.save_to_disk` wrote
        parquet, arrow    a file with this suffix, or a folder with such files
        latents    a folder that extract_latents.py wrote
        hub        the name of a data set on the Hugging Face hub; HF_TOKEN and HF_HOME are honoured

    Return a `Source`, or `CachedLatents`. Raise ValueError if there are no such data, or their columns do not fit."""
    if data_path is None:
        raise ValueError("--data-path is missing: --help says what it can be, digits for one")
    with named(f"--data-path {data_path!r}"):
        data_format = data_format or recognise_format(data_path)
    if streaming and data_format not in STREAMED_FORMATS:
        raise ValueError(f"--streaming is for {', '.join(STREAMED_FORMATS)} data; {data_path} is {data_format} data")
    if data_format in DATASETS:
        with named(f"--data-path {data_format}", (OSError, RuntimeError)):  # torchvision's errors of missing files
            dataset = DATASETS[data_format]()
        return dataset if isinstance(dataset, Source) else from_dataset(dataset, data_format)
    if data_format == "folder":
        return _class_folders(data_path, split, skip_bad_images)
    if data_format == "latents":
        return CachedLatents(data_path, skip_bad_images)
    table = _open_table(data_path, data_format, split or "train", streaming)
    return _from_table(table, data_path, image_key, label_key, streaming)


def recognise_format(data_path):
    """Return the format of `data_path`: a name in DATASETS or one of FORMATS. Raise ValueError if it has none."""
    path = pathlib.Path(data_path)
    if data_path in DATASETS:
        return data_path
    if path.is_dir():
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return "saved"
        if (path / MANIFEST).is_file():
            return "latents"
        if (path / SETTINGS).is_file():
            raise ValueError(f"--data-path {data_path!r}: extract_latents.py has not finished there; run it again")
        return next((kind for kind in ("parquet", "arrow") if _files_of(path, kind)), "folder")
    if path.is_file() and path.suffix in (".parquet", ".arrow"):
        return path.suffix[1:]
    if not path.exists() and data_path.count("/") == 1 and not data_path.startswith((".", "/", "~")):
        return "hub"
    raise ValueError(f"--data-path {data_path!r}: no such data; give {', '.join(map(repr, DATASETS))}, {PATHS}")


def from_dataset(dataset, data_path, name=None, **fields):
    """Return the `Source` of a `torch.utils.data.Dataset` that is read by index and whose items are (image, label).

    Its attribute `targets`, (N,) integers, gives the labels beforehand, and `classes`, a sequence, the number of
    classes; either may be missing or None. `data_path` is what messages call the data set. `name` (default: that and
    the index) and `fields` (channels, image_size, mirrors, left_out) are those of `Source`. Raise ValueError if it has
    no length or is empty, or its `targets` are not (N,) integers."""
    count = len(dataset) if hasattr(dataset, "__len__") else 0
    if count == 0:
        raise ValueError(f"--data-path {data_path!r} holds no images that can be read by index")
    name = name or f"{data_path} {{}}".format
    labels, classes = getattr(dataset, "targets", None), getattr(dataset, "classes", None)
    num_classes = None if classes is None else len(classes)
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (count,) or labels.dtype.kind not in "iu":
            raise ValueError(f"--data-path {data_path!r}: the data set's `targets` are not one integer per image")
        if not num_classes:
            largest = int(labels.argmax())
            num_classes = max(int(labels[largest]) + 1, 1)
            if num_classes > MOST_CLASSES:
                raise ValueError(label_problem(labels[largest], MOST_CLASSES, name(largest)))
    return Source(dataset, labels, name, num_classes, count, classes is not None, **fields)


def _digits():
    """Return scikit-learn's handwritten digits: 1,797 images of 8x8 pixels in ten classes, part of the package."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0 ... 16
    examples = [(Image.fromarray(image), int(label)) for image, label in zip(pixels, digits.target, strict=True)]
    return Source(
        examples, digits.target, "digit {}".format, 10, len(examples), channels=1, image_size=8, mirrors=False
    )


# Data sets that --data-path takes by name. Each is a function without arguments that returns a
# `torch.utils.data.Dataset` of (image, label), or a `Source` made by `from_dataset`, which can say more: channels=1.
DATASETS = {"digits": _digits}


def _class_folders(data_path, split, skip_bad):
    """Return the source of a folder of class folders, or of a folder of splits that are such folders."""
    with named(f"--data-path {data_path!r} holds no class folders with images"):
        inside = {entry.name for entry in os.scandir(data_path) if entry.is_dir()}
        if inside and inside <= SPLITS:
            split = split or "train"
            if split not in inside:
                raise ValueError(f"--data-path {data_path!r} has no split {split!r}; it has {sorted(inside)}")
            data_path = os.path.join(data_path, split)
        elif split is not None:
            raise ValueError(f"--split {split} has no effect: the folders in {data_path!r} are classes")
        folder = ImageFolder(data_path, loader=Image.open, allow_empty=skip_bad)  # its own loader whitens 16-bit grey
    empty = sorted(set(range(len(folder.classes))) - set(folder.targets))
    left_out = [f"the folder {os.path.join(data_path, folder.classes[c])}, which holds no image" for c in empty]
    return from_dataset(folder, data_path, [path for path, _ in folder.samples].__getitem__, left_out=left_out)


def _files_of(path, kind):
    """Return the files of a kind that `path` is or holds, itself or in data/ (as on the hub), sorted."""
    return [str(path)] if path.is_file() else sorted(map(str, (*path.glob(f"*.{kind}"), *path.glob(f"data/*.{kind}"))))


def _of_split(parts, split):
    """Return parts[split]. Raise ValueError if there is no such split."""
    if split not in parts:
        raise ValueError(f"no split {split!r}; there are {', '.join(parts)}")
    return parts[split]


def _open_table(data_path, data_format, split, streaming):
    """Return the split's `datasets.Dataset`, or `datasets.IterableDataset` if streaming. Raise ValueError."""
    import datasets

    try:
        if data_format == "saved":
            table = datasets.load_from_disk(data_path)
            return _of_split(table, split) if isinstance(table, datasets.DatasetDict) else table
        if data_format == "hub":
            try:
                return datasets.load_dataset(data_path, split=split, streaming=streaming)  # may be in the cache
            except Exception:
                hub.require(f"the data set {data_path}, which is no path here either,")
                raise
        paths = _files_of(pathlib.Path(data_path), data_format)
        if not paths:
            raise ValueError(f"no .{data_format} files there")
        parts = {}  # by the split that the files' names begin with, as on the hub
        for path in paths:
            parts.setdefault(re.match(r"[a-z]*", os.path.basename(path))[0], []).append(path)
        paths = _of_split(parts, split) if SPLITS & parts.keys() else paths
        return datasets.load_dataset(data_format, data_files=paths, split="train", streaming=streaming)
    except Exception as error:  # of many libraries; all mean that the data cannot be read
        while error.__cause__ is not None:
            error = error.__cause__
        problem = f"--data-path {data_path!r} cannot be read as {data_format} data"
        raise ValueError(f"{problem}: {one_line(error)}") from error


def _from_table(table, data_path, image_key, label_key, streaming):
    """Return the source of a `datasets.Dataset` or `IterableDataset`. Raise ValueError if its columns do not fit."""
    import datasets

    features = table.features
    if features is None:
        raise ValueError(f"--data-path {data_path!r} does not say what its columns are, so it cannot be streamed")
    for flag, key in (("--image-key", image_key), ("--label-key", label_key)):
        if key not in features:
            raise ValueError(f"{flag} {key!r}: {data_path} has no such column; it has {', '.join(features)}")
    images, labels = features[image_key], features[label_key]
    if not getattr(labels, "dtype", "").startswith(("int", "uint")):
        raise ValueError(f"--label-key {label_key!r}: labels must be integers, and {data_path} has {labels}")
    holds_images = isinstance(images, datasets.Image) or (isinstance(images, dict) and "bytes" in images)
    if not holds_images and not getattr(images, "dtype", "").endswith(("binary", "string")):  # files, or their paths
        raise ValueError(f"--image-key {image_key!r}: {data_path} has no images there, but {images}")
    classes = labels.names if isinstance(labels, datasets.ClassLabel) else None
    name = f"row {{}} of {data_path}".format
    # The table does not decode images itself, where an error would not say which row is broken.
    columns = table.select_columns([image_key, label_key]).cast_column(image_key, datasets.Image(decode=False))
    rows = _Rows(columns if streaming else columns.with_format(None), image_key, label_key, classes)
    if not streaming:
        rows.targets = np.array([-1 if label is None else label for label in rows.table[label_key]])
        return from_dataset(rows, data_path, name)
    num_examples = getattr((table.info.splits or {}).get(table.split), "num_examples", None)
    num_classes = len(classes) if classes else None
    return Source(rows.stream, None, name, num_classes, num_examples, bool(classes), streamed=True)


class _Rows(Dataset):
    """The rows of a `datasets.Dataset` by index, or of an `IterableDataset` as a stream, as (PIL image, label)."""

    def __init__(self, table, image_key, label_key, classes):
        self.table, self.image_key, self.label_key, self.classes = table, image_key, label_key, classes

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        return self.decode(self.table[index])

    def decode(self, row):
        """Return (PIL image, label) of a row."""
        cell, label = row[self.image_key] or {"bytes": None, "path": None}, row[self.label_key]
        if cell["bytes"] is not None:
            return Image.open(io.BytesIO(cell["bytes"])), label
        if cell["path"] is None:
            raise ValueError("the image is missing")
        if "://" in cell["path"]:  # in an archive or on the hub
            import datasets

            return datasets.Image().decode_example(cell), label
        return Image.open(cell["path"]), label

    def stream(self, seed):
        """Yield (key, function without arguments that returns (image, label)) of every row.

        The seed decides the order of the files, and of rows within a buffer. (The library's own buffer passes about
        fifty rows a second, fewer than one process decodes.)"""
        rng = np.random.default_rng(seed)
        buffer = []
        for shard in rng.permutation(self.table.num_shards):
            with named(f"file {shard} of the stream cannot be read", Exception):  # of the libraries that read the file
                for number, row in enumerate(self.table.shard(self.table.num_shards, int(shard))):
                    buffer.append((f"{number} of file {shard}", functools.partial(self.decode, row)))
                    if len(buffer) > SHUFFLE_BUFFER:
                        place = rng.integers(SHUFFLE_BUFFER)
                        buffer[place], buffer[-1] = buffer[-1], buffer[place]
                        yield buffer.pop()
        rng.shuffle(buffer)
        yield from buffer
