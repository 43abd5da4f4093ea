"""From files to batches: data sets, transforms, and the order in which a run sees its examples."""

import atexit
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import safetensors
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

import files
import hub
from distributed import ORDER_STREAM, generator, seed_from

FORMATS = ("digits", "folder", "saved", "parquet", "arrow", "latents", "hub")
STREAMED_FORMATS = ("parquet", "arrow", "hub")
SPLITS = {"train", "val", "valid", "validation", "test"}
PATIENCE = 1000  # examples that are tried in the place of a bad one
WORKER_GRACE_SECONDS = 30  # in which a worker goes on after SIGTERM
MOST_CLASSES = 1_000_000  # a larger label is taken for a mistake
SHUFFLE_BUFFER = 10_000  # examples of a stream that are shuffled among themselves, after its files
MANIFEST, SETTINGS = "manifest.json", "settings.json"  # of a folder of cached latents


@dataclasses.dataclass
class Source:
    """Labelled images on disk or in memory.

    `examples[i]` is (PIL image, label), or raises an error of any kind if the image cannot be read. `name(i)` says
    which file or row that is. Of a stream, `examples` is a function of a seed that gives (i, function without arguments
    that returns such a pair), one after the other in an order that the seed decides; i may be any key for `name`.
    """

    examples: Sequence | Callable[[int], Iterator]
    labels: np.ndarray | None  # (N,) int64; -1 where the label is missing; None for a stream
    name: Callable[[int], str]
    num_classes: int | None  # None where a stream does not say
    num_examples: int | None  # likewise
    declares_classes: bool = True  # whether the data say how many classes there are, or the largest label does
    channels: int = 3  # of the images as they are: 1 grey, 3 colour
    image_size: int | None = None  # the size that all images have, if they do
    mirrors: bool = True  # whether a mirrored image is still one of its class
    left_out: list = dataclasses.field(default_factory=list)  # a line for each bad thing that was passed over

    def fingerprint(self):
        """SHA-256 of the examples' names and labels, in their order."""
        digest = hashlib.sha256(self.labels.astype(np.int64).tobytes())
        for i in range(len(self.labels)):
            digest.update(self.name(i).encode() + b"\0")
        return digest.hexdigest()

    def check_labels(self, num_classes):
        """Raise ValueError naming the first example whose label is missing or beyond `num_classes`."""
        labels = np.zeros(0) if self.labels is None else self.labels  # a stream's are checked as they come
        bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if len(bad):
            check_label(self.labels[bad[0]], num_classes, self.name(int(bad[0])))


def check_label(label, num_classes, name):
    """Raise ValueError if `label`, of the example called `name`, is missing (-1) or not below `num_classes`."""
    if not 0 <= label < num_classes:
        problem = "the label is missing" if label == -1 else f"label {label} is out of range"
        raise ValueError(f"{name}: {problem}; {num_classes} classes have the labels 0 to {num_classes - 1}")


def open_source(
    data_path,
    data_format=None,
    image_key="image",
    label_key="label",
    split=None,
    streaming=False,
    skip_bad=False,
):
    """Open labelled images of any of these kinds.

        digits     scikit-learn's handwritten digits
        folder     a folder with one folder of images per class, labels in the folders' sorted order
        saved      a folder that `datasets.Dataset.save_to_disk` wrote
        parquet    a .parquet file, or a folder with such files
        arrow      an .arrow file, or a folder with such files
        latents    a folder that extract_latents.py wrote
        hub        the name of a data set on the Hugging Face hub; HF_TOKEN and HF_HOME are honoured

    Args:
        data_path: 'digits', a path or a name.
        data_format: one of FORMATS; None: what is there (`recognise_format`).
        image_key, label_key: columns of the image and of the class label, in tables.
        split: which split to read, where the data has several; None: 'train'.
        streaming: read hub, parquet or arrow data from front to back, without a copy on this machine's disk.
        skip_bad: pass over class folders without images and damaged shards of latents, and say so in `left_out`.

    Returns:
        A `Source` of images, or `CachedLatents`.

    Raises:
        ValueError: nothing of the kind is there, or a column is not there or not what it must be.
    """
    data_format = data_format or recognise_format(data_path)
    if streaming and data_format not in STREAMED_FORMATS:
        kinds = ", ".join(STREAMED_FORMATS)
        raise ValueError(f"--streaming is for data of the kinds {kinds}; {data_path} is of the kind {data_format}")
    if data_format == "digits":
        return _digits()
    if data_format == "folder":
        return _class_folders(data_path, split, skip_bad)
    if data_format == "latents":
        return CachedLatents(data_path, skip_bad)
    table = _open_table(data_path, data_format, split or "train", streaming)
    return _from_table(table, data_path, image_key, label_key, streaming)


def recognise_format(data_path):
    """Which of FORMATS `data_path` is. Raises ValueError if it is none."""
    path = pathlib.Path(data_path)
    if data_path == "digits":
        return "digits"
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
    raise ValueError(
        f"--data-path {data_path!r}: no such data; give 'digits', a folder of class folders, a saved Dataset, Parquet "
        "or Arrow files, cached latents, or the name of a data set on the hub"
    )


def _files_of(path, kind):
    """The files of a kind that `path` is or holds, itself or in data/ (as on the hub), sorted."""
    return [str(path)] if path.is_file() else sorted(map(str, (*path.glob(f"*.{kind}"), *path.glob(f"data/*.{kind}"))))


def _digits():
    """scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, ten classes, part of the package."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0 ... 16
    examples = [(Image.fromarray(image), int(label)) for image, label in zip(pixels, digits.target, strict=True)]
    name = "digit {}".format
    return Source(examples, digits.target, name, 10, len(examples), channels=1, image_size=8, mirrors=False)


def _class_folders(data_path, split, skip_bad):
    from torchvision.datasets import ImageFolder

    inside = {entry.name for entry in os.scandir(data_path) if entry.is_dir()} if os.path.isdir(data_path) else set()
    if inside and inside <= SPLITS:  # not class folders, but folders of them
        if (split or "train") not in inside:
            raise ValueError(f"--data-path {data_path!r} has no split {split or 'train'!r}; it has {sorted(inside)}")
        data_path = os.path.join(data_path, split or "train")
    elif split is not None:
        raise ValueError(f"--split {split} has no effect: the folders in {data_path!r} are classes")
    try:
        folder = ImageFolder(data_path, loader=_open_image, allow_empty=skip_bad)
        if not folder.samples:
            raise FileNotFoundError("all are empty")
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--data-path {data_path!r} holds no class folders with images: {reason}") from error
    # Named functions, not lambdas: worker processes are sent the source where they are not forked (macOS, Windows).
    name = functools.partial(_path_of_sample, folder)
    empty = sorted(set(range(len(folder.classes))) - set(folder.targets))
    left_out = [f"the folder {os.path.join(data_path, folder.classes[c])}, which holds no image" for c in empty]
    return Source(folder, np.array(folder.targets), name, len(folder.classes), len(folder), left_out=left_out)


def _open_image(path):
    """The image as it is: torchvision's own loader makes 16-bit grey white."""
    with Image.open(path) as image:
        image.load()
        return image


def _path_of_sample(folder, index):
    return folder.samples[index][0]


def _open_table(data_path, data_format, split, streaming):
    """A `datasets.Dataset`, or `datasets.IterableDataset` if streaming, of the split. Raises ValueError."""
    import datasets

    try:
        if data_format == "saved":
            table = datasets.load_from_disk(data_path)
            if isinstance(table, datasets.DatasetDict) and split not in table:
                raise ValueError(f"no split {split!r}; there are {', '.join(table)}")
            return table[split] if isinstance(table, datasets.DatasetDict) else table
        if data_format == "hub":
            try:
                return datasets.load_dataset(data_path, split=split, streaming=streaming)  # or what is in the cache
            except Exception:
                hub.require(f"the data set {data_path}, which is no path here either,")
                raise
        paths = _files_of(pathlib.Path(data_path), data_format)
        if not paths:
            raise ValueError(f"no .{data_format} files there")
        paths = _files_of_split(paths, split)
        return datasets.load_dataset(data_format, data_files=paths, split="train", streaming=streaming)
    except Exception as error:  # of many libraries underneath; all mean that the data cannot be read
        while error.__cause__ is not None:
            error = error.__cause__
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"--data-path {data_path!r} cannot be read as {data_format} data: {reason}") from error


def _files_of_split(paths, split):
    """Those of the files whose names begin with the split, as on the hub; all if none begins with any split."""
    splits = [re.match(r"[a-z]*", pathlib.Path(path).name)[0] for path in paths]
    if not SPLITS & set(splits):
        return paths
    chosen = [path for path, name in zip(paths, splits, strict=True) if name == split]
    if not chosen:
        raise ValueError(f"no split {split!r}; there are {', '.join(sorted(set(splits)))}")
    return chosen


IMAGE_COLUMNS = ("binary", "large_binary", "string", "large_string")  # encoded images, or their paths


def _from_table(table, data_path, image_key, label_key, streaming):
    """A source of the rows of a `datasets.Dataset` or `IterableDataset`, its columns checked. Raises ValueError."""
    import datasets

    features = table.features
    if features is None:
        raise ValueError(f"--data-path {data_path!r} does not say what its columns are, so it cannot be streamed")
    for flag, key in (("--image-key", image_key), ("--label-key", label_key)):
        if key not in features:
            raise ValueError(f"{flag} {key!r}: {data_path} has no such column; it has {', '.join(features)}")
    images, classes = features[image_key], features[label_key]
    if not getattr(classes, "dtype", "").startswith(("int", "uint")):
        raise ValueError(f"--label-key {label_key!r}: labels must be integers, and {data_path} has {classes}")
    holds_images = isinstance(images, datasets.Image) or (isinstance(images, dict) and "bytes" in images)
    if not holds_images and getattr(images, "dtype", None) not in IMAGE_COLUMNS:
        raise ValueError(f"--image-key {image_key!r}: {data_path} has no images there, but {images}")
    declares_classes = isinstance(classes, datasets.ClassLabel)
    num_classes = classes.num_classes if declares_classes else None
    name = f"row {{}} of {data_path}".format
    # The table does not decode images itself, where an error would not say which row is broken.
    rows = table.select_columns([image_key, label_key]).cast_column(image_key, datasets.Image(decode=False))
    rows = rows if streaming else rows.with_format(None)
    example = functools.partial(_example_of_row, image_key=image_key, label_key=label_key)
    if streaming:
        splits = table.info.splits or {}
        num_examples = splits[table.split].num_examples if table.split in splits else None
        stream = functools.partial(_stream, rows, example)
        return Source(stream, None, name, num_classes, num_examples, declares_classes)
    if len(table) == 0:
        raise ValueError(f"--data-path {data_path!r} holds no rows")
    labels = np.array([-1 if label is None else label for label in rows[label_key]])
    num_classes = num_classes or max(int(labels.max()) + 1, 1)
    if num_classes > MOST_CLASSES:
        check_label(int(labels.max()), MOST_CLASSES, name(int(labels.argmax())))
    return Source(_TableExamples(rows, example), labels, name, num_classes, len(table), declares_classes)


class _TableExamples(Sequence):
    """Rows of a `datasets.Dataset` as (PIL image, label)."""

    def __init__(self, rows, example):
        self.rows = rows
        self.example = example

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.example(self.rows[index])


def _stream(rows, example, seed):
    """Rows of a `datasets.IterableDataset` in the order of a seed: (row name, function giving (image, label)).

    The files come in a random order, and a buffer of rows is shuffled as they pass. (The library's own buffer passes
    about fifty rows a second, fewer than one process decodes.)
    """
    rng = np.random.default_rng(seed)
    buffer = []
    for shard in rng.permutation(rows.num_shards):
        for number, row in enumerate(_rows_of_shard(rows, int(shard))):
            entry = (f"{number} of file {shard}", functools.partial(example, row))
            if len(buffer) < SHUFFLE_BUFFER:
                buffer.append(entry)
                continue
            place = rng.integers(SHUFFLE_BUFFER)
            buffer[place], entry = entry, buffer[place]
            yield entry
    rng.shuffle(buffer)
    yield from buffer


def _rows_of_shard(rows, shard):
    try:
        yield from rows.shard(rows.num_shards, shard)
    except Exception as error:  # of the libraries that read the file
        raise ValueError(f"file {shard} of the stream cannot be read: {' '.join(str(error).split())[:300]}") from error


def _example_of_row(row, image_key, label_key):
    cell, label = row[image_key], row[label_key]
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        raise ValueError("the image is missing")
    if cell["bytes"] is not None:
        image = Image.open(io.BytesIO(cell["bytes"]))
    elif "://" in cell["path"]:  # in an archive or on the hub
        import datasets

        image = datasets.Image().decode_example(cell)
    else:
        image = _open_image(cell["path"])
    return image, -1 if label is None else label


def center_crop(image, size):
    """ADM's crop: halve with a box filter while twice too large, resize the short side to `size` bicubically, crop."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def _eight_bits(image):
    """The image with 8 bits a channel; PIL's conversion from 16 would cut them off. Raises ValueError."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"images of mode {image.mode} have no range that is known")
    return image


class ImageReader:
    """Turns an example into what the network takes.

    Args:
        image_size, channels: of the images that come out; 1 channel is grey, 3 are RGB.
        num_classes: labels must lie below.
    """

    def __init__(self, image_size, channels, num_classes):
        self.image_size = image_size
        self.mode = {1: "L", 3: "RGB"}[channels]
        self.num_classes = num_classes

    def read(self, example, flip, name):
        """(image, label) of an example, which is a function that returns (PIL image, label).

        The image is float32 (channels, image_size, image_size) in [-1, 1], mirrored if `flip`. Raises ValueError that
        begins with `name` for an image that cannot be read or a label that is no class.
        """
        try:
            image, label = example()
            image = center_crop(_eight_bits(image).convert(self.mode), self.image_size)
        except Exception as error:  # image decoders raise errors of many kinds
            reason = re.sub(r" ?<_io\.\w+( object at \w+)?>", "", " ".join(str(error).split()))
            raise ValueError(f"{name}: the image cannot be read: {reason}") from error
        check_label(label, self.num_classes, name)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # In NumPy: PyTorch's threads, on so small a tensor, slow a loader without worker processes several times.
        pixels = np.asarray(image, dtype=np.float32).reshape(self.image_size, self.image_size, -1)  # (H, W, C)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)) / 127.5 - 1), label


class ImageDataset(Dataset):
    """Images of a source, by number.

    An item is asked for by (index, flip): what is random about it was decided by whoever ordered it, so workers hold
    no state. It is (image, label, problems), the first two as `ImageReader` has them. If the example that was asked for
    is bad, the next good one stands in its place, and `problems` has a line that says so; whoever takes the item
    decides what that means. Raises ValueError if PATIENCE examples in a row are bad.
    """

    def __init__(self, source, image_size, channels, num_classes=None):
        self.source = source
        self.reader = ImageReader(image_size, channels, num_classes or source.num_classes)

    def __len__(self):
        return len(self.source.examples)

    def __getitem__(self, key):
        index, flip = key
        problems = []
        for candidate in range(index, index + min(len(self), PATIENCE)):
            i = candidate % len(self)
            try:
                item = self.reader.read(lambda i=i: self.source.examples[i], flip, self.source.name(i))
                return *item, problems[:1]  # the others will be told when they are asked for
            except ValueError as error:
                problems.append(str(error))
        raise ValueError(f"not one of {len(problems)} examples in a row is good; the first: {problems[0]}")


class StreamedBatches(IterableDataset):
    """One rank's micro batches of a streamed source, step after step, without end: collated as by `make_loader`.

    The counterpart of `ImageDataset` with `GlobalBatchSampler`, whose arguments it takes and whose places it keeps to:
    every rank reads the whole stream and decodes its own share, so that a step trains on the same examples for any
    number of ranks. (Apart from bad ones: the next good example of the micro batch takes their places.) Each epoch has
    an order of its own. `threads` decode images side by side.
    """

    def __init__(self, source, reader, sampler, threads):
        self.source, self.reader, self.sampler, self.threads = source, reader, sampler, threads

    def __iter__(self):
        # Threads, not worker processes, among which `datasets` would deal out the files, so that the order would depend
        # on their number. One runs a micro batch ahead.
        with ThreadPoolExecutor(1) as thread:
            batches = self._batches()
            following = thread.submit(next, batches)
            while True:
                batch = following.result()
                following = thread.submit(next, batches)
                yield batch

    def _batches(self):
        s = self.sampler
        share = s.global_batch_size // s.world_size
        rows, waiting, spare = [], [], None
        with ThreadPoolExecutor(max(1, self.threads)) as threads:
            for place, number, example, flip in self._places():
                within = (place - s.start) % s.global_batch_size
                if place < s.start or not s.rank * share <= within < (s.rank + 1) * share:
                    continue
                rows.append((number, example, flip))
                if len(rows) < s.micro_batch_size:
                    continue
                waiting.append(list(threads.map(self._read, rows)))
                rows = []
                spare = next((item for item in waiting[-1] if item[0] is not None), None)
                if spare is None and len(waiting) * s.micro_batch_size >= PATIENCE:
                    raise ValueError(f"not one of {PATIENCE} examples is good; the first: {waiting[0][0][2][0]}")
                while spare is not None and waiting:
                    yield _collate(_fill(waiting.pop(0), spare))

    def _places(self):
        """(place, row number, example, flip) of the endless sequence of epochs, from that in which the run starts."""
        first = self.sampler.start // self.source.num_examples if self.source.num_examples else 0
        place = first * (self.source.num_examples or 0)
        for epoch in itertools.count(first):
            start = place
            flips = np.random.default_rng([self.sampler.seed, ORDER_STREAM, epoch])
            for number, example in self.source.examples(seed_from(self.sampler.seed, ORDER_STREAM, epoch)):
                yield place, number, example, self.sampler.mirror and flips.random() < 0.5
                place += 1
            if place == start:
                raise ValueError(f"the stream holds no rows: {self.source.name('...')}")

    def _read(self, row):
        number, example, flip = row
        try:
            return *self.reader.read(example, flip, self.source.name(number)), []
        except ValueError as error:
            return None, None, [str(error)]


def _fill(items, spare):
    """Put the next good item in the place of each bad one, `spare` if there is none, with its problems kept."""
    filled = []
    for item in reversed(items):
        spare = spare if item[0] is None else item
        filled.append((*spare[:2], item[2]))
    return filled[::-1]


MANIFEST_KEYS = {
    "vae": str,
    "image_size": int,
    "channels": int,
    "latent_size": int,
    "num_classes": int,
    "mirrors": bool,
    "scale": (int, float),
    "shift": (int, float),
}


class CachedLatents(Dataset):
    """What extract_latents.py wrote: posterior moments of images and of their mirror images, in memory-mapped shards.

    An item is asked for by (index, flip), as of `ImageDataset`, and is (moments, label, []): float32 (2, C, h, w), the
    mean and standard deviation of the VAE's posterior. Attributes of the manifest: `vae`, `image_size`, `channels`,
    `latent_size`, `num_classes`, `mirrors`, `scale`, `shift`.

    Args:
        folder: with manifest.json and the shards that it names.
        skip_bad: pass over damaged shards, with a line for each in `left_out`.

    Raises:
        ValueError: the manifest is not readable, or a shard is missing or not of the size or checksum that it says.
    """

    def __init__(self, folder, skip_bad=False):
        self.folder = pathlib.Path(folder)
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text())
            for key, kind in MANIFEST_KEYS.items():
                if not isinstance(manifest[key], kind) or (kind is int and manifest[key] < 1):
                    raise ValueError(f"{key} is {manifest[key]!r}")
                setattr(self, key, manifest[key])
            shards = [
                (str(shard["file"]), int(shard["examples"]), int(shard["bytes"]), str(shard["sha256"]))
                for shard in manifest["shards"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.folder / MANIFEST} is damaged or not of extract_latents.py: {error}") from error
        with ThreadPoolExecutor() as threads:
            problems = list(threads.map(self._problem_of, shards))
        self.left_out = [
            f"{problem}; extract_latents.py, run again, writes it anew" for problem in problems if problem is not None
        ]
        good = [shard for shard, problem in zip(shards, problems, strict=True) if problem is None]
        if not good or (self.left_out and not skip_bad):
            raise ValueError((self.left_out or [f"{self.folder / MANIFEST} names no shards"])[0])
        self.shards = [name for name, *_ in good]
        self.ends = np.cumsum([examples for _, examples, *_ in good])
        self.num_examples = len(self)
        self.opened = {}

    def _problem_of(self, shard):
        name, examples, size, sha256 = shard
        path = self.folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size or files.sha256(path) != sha256:
            return f"{path} is damaged: its size or checksum is not the manifest's"
        with safetensors.safe_open(path, framework="pt") as content:
            if content.get_slice("labels").get_shape() != [examples]:
                return f"{path} has not the {examples} examples of the manifest"
        return None

    def __len__(self):
        return int(self.ends[-1])

    def __getstate__(self):
        return self.__dict__ | {"opened": {}}  # a worker process opens the shards itself

    def __getitem__(self, key):
        index, flip = key
        number = int(np.searchsorted(self.ends, index, side="right"))
        row = index - (int(self.ends[number - 1]) if number else 0)
        moments, labels = self._open(number)
        return moments[row, int(flip)].float(), int(labels[row]), []

    def _open(self, number):
        """(slices of the moments, labels) of a shard, memory-mapped by each process that reads it."""
        key = (os.getpid(), number)
        if key not in self.opened:
            shard = safetensors.safe_open(self.folder / self.shards[number], framework="pt")
            self.opened[key] = (shard.get_slice("moments"), shard.get_tensor("labels"))
        return self.opened[key]


class GlobalBatchSampler:
    """The (index, flip) keys of one rank's micro batches, step after step, without end.

    The order is one long sequence: a permutation of the data for each epoch, drawn from (seed, epoch) alone, one after
    the other, so that no example is left out at an epoch's end. Each step takes the next B places of it; each rank has
    a contiguous share of those, in micro batches. What a step trains on is thus the same for any number of ranks, any
    micro batch size, and after any restart.

    Args:
        num_examples: size of the data set.
        global_batch_size: B, over all ranks and accumulated micro batches.
        micro_batch_size: examples per item; B is a multiple of micro_batch_size times world_size.
        mirror: flip each example with probability 1/2 per epoch.
        start: places of the sequence to pass over: the examples that a run saw before it was stopped.
    """

    def __init__(self, num_examples, global_batch_size, micro_batch_size, *, seed, rank, world_size, mirror, start=0):
        self.num_examples = num_examples
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.mirror = mirror
        self.start = start

    def __iter__(self):
        # A step can reach over the end of an epoch, so the orders of two are at hand.
        epoch_keys = functools.lru_cache(maxsize=2)(self._epoch_keys)
        share = self.global_batch_size // self.world_size
        for step_start in itertools.count(self.start, self.global_batch_size):
            first = step_start + self.rank * share
            for start in range(first, first + share, self.micro_batch_size):
                places = (divmod(place, self.num_examples) for place in range(start, start + self.micro_batch_size))
                yield [epoch_keys(epoch)[position] for epoch, position in places]

    def _epoch_keys(self, epoch):
        g = generator("cpu", self.seed, ORDER_STREAM, epoch)
        order = torch.randperm(self.num_examples, generator=g).tolist()
        flips = (torch.rand(self.num_examples, generator=g) < 0.5).tolist() if self.mirror else [False] * len(order)
        return list(zip(order, flips, strict=True))


def make_loader(dataset, sampler, num_workers, device):
    """An iterator of (images or moments (M, ...), labels (M,), problems) on the CPU, M the micro batch size.

    `problems` has a list for each place of the batch: the bad examples for which another stands there, as
    `ImageDataset` has it. `dataset` may be `StreamedBatches`, which needs no sampler.
    """
    pin_memory = device.type == "cuda"
    if isinstance(dataset, StreamedBatches):
        loader = DataLoader(dataset, batch_size=None, pin_memory=pin_memory)  # its own threads do the work
    else:
        workers = dict(num_workers=num_workers, worker_init_fn=_outlast_stop_signals)
        loader = DataLoader(dataset, batch_sampler=sampler, pin_memory=pin_memory, collate_fn=_collate, **workers)
    batches = _with_plain_errors(loader)
    atexit.register(batches.close)  # ends the workers before multiprocessing waits for them
    return batches


def _with_plain_errors(loader):
    """The loader's batches; a worker's ValueError is raised without the worker's traceback in its text."""
    try:
        yield from loader
    except ValueError as error:
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error


def _outlast_stop_signals(worker):
    """A worker that ended on a signal to all processes would take with it the step that the parent wants to finish."""

    def end_later(number, frame):
        timer = threading.Timer(WORKER_GRACE_SECONDS, os._exit, (0,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end_later)


def _collate(items):
    images, labels, problems = zip(*items, strict=True)
    return *default_collate(list(zip(images, labels, strict=True))), problems
