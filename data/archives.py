"""Labelled images in archives and in EDM's folders, read by index without extracting them.

A folder or zip of EDM, EDM2 and REPA has the labels in dataset.json, whatever its folders are called. A zip or tar of
class folders is read as a folder of them is. ADM's .npz has the images in arr_0 and the labels in arr_1."""

import io
import json
import math
import os
import re
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from data import folders
from data.folders import TABLE, image_suffixes, is_hidden, pick_split, split_of, walk
from data.labelled import from_dataset, leave_out, number_labels
from utils.files import named, read_npy_header


class FolderFiles:
    """The files below a folder that are not hidden: `names`, with / between folders, and `read(i)` -> bytes."""

    def __init__(self, path):
        self.path = os.path.join(path, "")
        found = (os.path.join(root, name) for root, names in walk(self.path, folders.PassedOver()) for name in names)
        self.names = sorted(name.removeprefix(self.path) for name in found)

    def read(self, i):
        with open(self.path + self.names[i], "rb") as file:
            return file.read()


class ZipFiles:
    """The files in a zip, as `FolderFiles` has those of a folder. Raise ValueError if it cannot be read."""

    def __init__(self, path):
        self.path = f"{path}/"
        with named(f"{path} is not a readable zip", (zipfile.BadZipFile, OSError)), zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir() and is_shown(info.filename)]
        for info in infos:
            if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{path}: {info.filename} is encrypted, or compressed in a way that is not read")
        infos.sort(key=lambda info: info.filename)
        self.names = [info.filename for info in infos]
        # Worker processes share these numbers; a ZipFile would have an object per file in each of them.
        places = [(info.header_offset, info.compress_size, info.compress_type, info.CRC) for info in infos]
        self.places = np.array(places, dtype=np.int64).reshape(-1, 4)

    def open_at(self, i):
        """Return the zip, open at the first byte of file i."""
        file = open(self.path[:-1], "rb")
        file.seek(int(self.places[i, 0]) + 26)  # in the local header: the lengths of the name and of the extra field
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)
        return file

    def read(self, i):
        _, size, kind, checksum = self.places[i].tolist()
        with self.open_at(i) as file:
            content = file.read(size)
        content = content if kind == zipfile.ZIP_STORED else zlib.decompress(content, -zlib.MAX_WBITS)
        if zlib.crc32(content) != checksum:
            raise ValueError("its checksum is not that of the zip")
        return content


def is_shown(name):
    """Return whether neither a file of this name nor a folder that it lies in is hidden."""
    return not any(map(is_hidden, name.split("/")))


class LabelledFiles(Dataset):
    """The images among `files` at `places`, as (PIL image, label): `targets` are (N,) integers, -1 where missing."""

    def __init__(self, files, places, targets, classes=None):
        self.files, self.places, self.targets, self.classes = files, places, targets, classes

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        return Image.open(io.BytesIO(self.files.read(self.places[index]))), int(self.targets[index])

    def name(self, index):
        """Return what messages call an image."""
        return self.files.path + self.files.names[self.places[index]]


def find_table(files):
    """Return the index of dataset.json among the files, in the folder itself or in its one folder; None without."""
    places = [i for i, name in enumerate(files.names) if re.fullmatch(rf"([^/]*/)?{re.escape(TABLE)}", name)]
    if len(places) > 1:
        raise ValueError(f"{files.path} has several {TABLE}: {', '.join(files.names[i] for i in places[:3])}")
    return places[0] if places else None


def read_table(files, table, suffixes, skip_bad):
    """Return (indices of the files with these suffixes, their labels in dataset.json, lines of what is left out).

    A file without a label has None. Raise ValueError if dataset.json cannot be read, has no labels or, unless
    `skip_bad`, names files that are missing."""
    where, top, left_out = files.path + files.names[table], files.names[table].removesuffix(TABLE), []
    with named(f"{where} is damaged", ValueError):
        content = json.loads(files.read(table))
    if not isinstance(content, dict) or "labels" not in content:
        raise ValueError(f'{where} has no "labels"; if the folders are classes, give --data-format folder')
    with named(f"{where} is damaged", (ValueError, TypeError, AttributeError)):
        listed = {top + name.replace("\\", "/"): label for name, label in dict(content["labels"] or ()).items()}
    if not listed:
        raise ValueError(f'{where} has no labels ("labels" is null or empty), and training needs a class per image')
    places = [i for i, name in enumerate(files.names) if name.startswith(top) and name.lower().endswith(suffixes)]
    if missing := sorted(listed.keys() - {files.names[i] for i in places}):
        with leave_out(left_out, skip_bad):
            raise ValueError(f"{where} lists {len(missing)} files that are missing, the first {missing[0]}")
    return places, [listed.get(files.names[i]) for i in places], left_out


def table_images(files, table, data_path, skip_bad):
    """Return the source of the images that dataset.json labels."""
    places, labels, left_out = read_table(files, table, image_suffixes(), skip_bad)
    with named(files.path + files.names[table], ValueError):
        dataset = LabelledFiles(files, places, *number_labels(labels))
    return from_dataset(dataset, data_path, dataset.name, left_out=left_out)


def class_folder_files(files, data_path, split=None, left_out=(), notes=()):
    """Return the source of class folders in archives, maybe inside one folder, or in folders of splits.

    Raise ValueError if there are none, or --split has no effect."""
    where, passed, above = f"--data-path {data_path!r}", folders.PassedOver(), ""
    images = set(folders.images_of(files.path, files.names, passed))
    parts = {i: name.split("/") for i, name in enumerate(files.names) if name in images}
    if not parts or min(map(len, parts.values())) < 2:
        found = "images that are in no folder" if parts else "no images"
        raise ValueError(f"{where}: the archive has {found}; it needs class folders, or {TABLE}")
    while len({part[0] for part in parts.values()}) == 1 and min(map(len, parts.values())) > 2:
        only = next(iter(parts.values()))[0]
        if split_of(only):
            break
        parts, above = {i: part[1:] for i, part in parts.items()}, f"{above}{only}/"
    tops = sorted({part[0] for part in parts.values()})
    deep = set(tops) - {part[0] for part in parts.values() if len(part) == 2}  # hold no images, but folders
    splits = [top for top in tops if top in deep and split_of(top)]
    if splits and len(splits) < len(tops):
        raise ValueError(
            f"{where}: the split {splits[0]!r} lies among other folders, as if it were a class; extract it"
        )
    if splits:
        chosen = pick_split(splits, split, f"{where}: ")
        others = ", ".join(top for top in tops if top != chosen)
        notes = [*notes, *[f"split {chosen}; passed over: {others}"] * (len(tops) > 1)]
        parts, above = {i: part[1:] for i, part in parts.items() if part[0] == chosen}, f"{above}{chosen}/"
    elif split is not None:
        raise ValueError(f"{where}: --split {split} has no effect: there are no splits in it")
    labels = [part[0] for part in parts.values()]
    classes = sorted(set(labels))
    dataset = LabelledFiles(files, list(parts), np.searchsorted(classes, labels), classes)
    beside = {name.removeprefix(above).split("/")[0] for name in files.names if name.startswith(above)}
    doubt = folders.doubt_of_names(classes, beside)
    fields = dict(left_out=list(left_out), notes=[*notes, *passed.lines()], doubt=doubt and f"{where}: {doubt}")
    return from_dataset(dataset, data_path, dataset.name, **fields)


class ArrayImages(Dataset):
    """The images of an .npz in ADM's format, arr_0 uint8 (N, H, W[, C]), and their labels arr_1, as (array, label).

    Images that are stored uncompressed, as NumPy and sample_ddp.py store them, are read from the disk one by one."""

    def __init__(self, path):
        archive = ZipFiles(path)
        arrays = [name.removesuffix(".npy") for name in archive.names]
        if not {"arr_0", "arr_1"} <= set(arrays):
            needed = "arr_0, uint8 images (N, H, W, C), and arr_1, their labels"
            raise ValueError(f"it holds {', '.join(arrays) or 'nothing'}; needed are {needed}")
        place = arrays.index("arr_0")
        stored = archive.places[place, 2] == zipfile.ZIP_STORED
        with archive.open_at(place) as file, np.load(path, allow_pickle=False) as content:
            labels, self.images = content["arr_1"], None if stored else content["arr_0"]
            self.shape, dtype, in_order = read_npy_header(file if stored else io.BytesIO(archive.read(place)))
            self.path, self.start = path, file.tell()
        if dtype != np.uint8 or len(self.shape) not in (3, 4) or self.shape[3:] not in ((), (1,), (3,)) or not in_order:
            found = f"{dtype} {self.shape}{'' if in_order else ' in Fortran order'}"
            raise ValueError(f"arr_0 is {found}; it must be uint8 (N, H, W, 3), (N, H, W, 1) or (N, H, W) in C order")
        if labels.size != len(labels) or len(labels) != self.shape[0] or labels.dtype.kind not in "iuU":
            found = f"{labels.dtype} {labels.shape}"
            raise ValueError(f"arr_1 is {found}; it must be one label, an integer or a string, for each of the images")
        self.targets, self.classes = number_labels(labels.reshape(-1).tolist())

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        if self.images is not None:
            return self.images[index], int(self.targets[index])
        size = math.prod(self.shape[1:])
        with open(self.path, "rb") as file:
            file.seek(self.start + index * size)
            return np.frombuffer(file.read(size), np.uint8).reshape(self.shape[1:]), int(self.targets[index])


def open_npz(data_path):
    """Return the source of an .npz of labelled images. Raise ValueError if it holds none."""
    with named(f"--data-path {data_path!r}", Exception):  # a damaged .npz raises errors of many kinds
        dataset = ArrayImages(data_path)
    height, width, *channels = dataset.shape[1:]
    fields = dict(channels=3 if channels == [3] else 1, image_size=height if height == width else None)
    return from_dataset(dataset, data_path, **fields)
