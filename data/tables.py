"""Tables of images, read with the library `datasets`: Parquet, Arrow, saved data sets, and those of the hub."""

import contextlib
import functools
import glob
import io
import os
import pathlib
import re
import tempfile

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from data import folders
from data.folders import find_splits, is_hidden, pick_split, split_of
from data.labelled import Source, from_dataset, name_with_number, number_labels, some_of
from utils import hub
from utils.files import named, one_line

FILE_NAME = "file_name"  # the column of a metadata file that names an image, relative to it
MOST_LEVELS = 3  # of folders in which files of tables are looked for
SHUFFLE_BUFFER = 10_000  # examples of a stream that are shuffled among themselves


def _walk(path):
    """Yield (folder, the names of the folders above it in `path`, the shown files in it) of MOST_LEVELS levels."""
    for root, inner, names in os.walk(path):
        inside = pathlib.Path(root).relative_to(path).parts
        inner[:] = [name for name in inner if not is_hidden(name) and len(inside) < MOST_LEVELS]
        yield root, inside, [name for name in names if not is_hidden(name)]


def table_kind(path):
    """Return 'parquet' or 'arrow' if a folder holds such files: itself or in `data`, or deeper and no images."""
    found = []
    for _, inside, names in _walk(path):
        kinds = [kind for kind in ("parquet", "arrow") if any(name.lower().endswith(f".{kind}") for name in names)]
        if kinds and inside in ((), ("data",)):
            return kinds[0]
        found += kinds
        if any(map(folders.is_image, names)):
            break
    else:
        return next(iter(sorted(found, reverse=True)), None)
    return None


def files_of(path, kind):
    """Return {split: its files of a kind, sorted} and lines for the log; the split is None if the files have none.

    `path` is such a file, or a folder with such files in it, in `data` or in folders of splits; else in one more
    folder, as a snapshot of the hub has for each of its configurations. Raise ValueError if there are several."""
    path, groups = pathlib.Path(path), {}
    if path.is_file():
        return {split_of(path.stem): [str(path)]}, []
    for root, inside, names in _walk(path):
        group = "/".join(part for part in inside if part != "data" and not split_of(part))
        for name in (name for name in names if name.lower().endswith(f".{kind}")):
            split = next(filter(None, map(split_of, reversed(inside))), None) or _split_of_file(name)
            groups.setdefault(group, {}).setdefault(split, []).append(os.path.join(root, name))
    if len(groups) > 1 and "" not in groups:
        raise ValueError(f"it holds several data sets; give one of the folders {some_of(sorted(groups))}")
    chosen = "" if "" in groups else next(iter(groups), "")
    passed = (os.path.join(path, group) for group in sorted(groups) if group != chosen)
    notes = [f"passed over: the .{kind} files in {folder}" for folder in passed]
    parts = groups.get(chosen, {})
    if not any(split in folders.SPLIT_WORDS for split in parts):
        parts = {None: sum(parts.values(), [])} if parts else {}
    return {split: sorted(files) for split, files in parts.items()}, notes


def _split_of_file(name):
    """Return the split in a file's name; without one, the word that it begins with, a split that only its name says."""
    shard = re.sub(r"-\d{5}-of-\d{5}.*", "", name)
    return split_of(pathlib.PurePath(shard).stem if shard == name else shard) or re.match(r"[a-zA-Z]*", name)[0]


def files_to_read(data_path, kind, split):
    """Return the files of --split, and lines for the log. Raise ValueError if there is no such split."""
    parts, notes = files_of(data_path, kind)
    if not parts:
        raise ValueError(f"no .{kind} files there")
    if len(parts) == 1 and os.path.isfile(data_path):  # asked for by its name
        split = split or next(iter(parts))
    if None in parts:
        if split not in (None, "train"):
            raise ValueError(f"--split {split} has no effect: there are no splits in the names of its files")
        return parts[None], notes
    chosen = pick_split(parts, split)
    passed = ", ".join(f"{name} ({len(files)} files)" for name, files in sorted(parts.items()) if name != chosen)
    return parts[chosen], [*notes, *([f"split {chosen}; passed over: {passed}"] if passed else [])]


def _load(kind, paths, streaming):
    """Return the rows of files as `datasets` has them: from its cache of them, unless streaming."""
    import datasets

    # In the library, a name with [brackets] would be a pattern.
    options = dict(data_files=[glob.escape(path) for path in paths], split="train", streaming=streaming)
    options["verification_mode"] = "no_checks"  # of a new file against the one before it
    table = datasets.load_dataset(kind, **options)
    if not streaming:
        # The cache knows a file by its path and time stamp alone, which another file in its place can share.
        written = min(os.stat(file["filename"]).st_mtime for file in table.cache_files)
        if any(os.stat(path).st_ctime > written for path in paths):
            table = datasets.load_dataset(kind, **options, download_mode="reuse_cache_if_exists")
    return table


def open_table(data_path, data_format, split, streaming):
    """Return the split as a `datasets.Dataset`, or `IterableDataset` if streaming, and lines for the log.

    Raise ValueError if it cannot be read."""
    import datasets

    cache = datasets.config.HF_DATASETS_CACHE
    with named(f"--data-path {data_path!r}: the cache {cache} cannot be written; set HF_HOME to another folder"):
        if data_format != "saved":
            os.makedirs(cache, exist_ok=True)
            tempfile.TemporaryFile(dir=cache).close()
    try:
        if data_format == "saved":
            table = datasets.load_from_disk(data_path)
            if isinstance(table, datasets.DatasetDict):
                return table[pick_split(table, split)], []
            if split not in (None, table.split or "train"):
                raise ValueError(f"--split {split} has no effect: it is one table, without splits")
            return table, []
        if data_format == "hub":
            try:
                # It may be in the cache.
                return datasets.load_dataset(data_path, split=split or "train", streaming=streaming), []
            except Exception:
                hub.require(f"the data set {data_path}, which is no path here either,")
                raise
        paths, notes = files_to_read(data_path, data_format, split)
        return _load(data_format, paths, streaming), notes
    except Exception as error:  # of many libraries; all mean that the data cannot be read
        while error.__cause__ is not None:
            error = error.__cause__
        problem = f"--data-path {data_path!r} cannot be read as {data_format} data"
        raise ValueError(f"{problem}: {one_line(error)}") from error


def from_table(table, data_path, image_key, label_key, streaming=False, notes=()):
    """Return the source of a `datasets.Dataset` or `IterableDataset`. Raise ValueError if its columns do not fit.

    The images are files or paths of files. The labels are integers, booleans, or strings, which are numbered."""
    import datasets

    features = table.features
    if features is None:
        raise ValueError(f"--data-path {data_path!r} does not say what its columns are, so it cannot be streamed")
    for flag, key in (("--image-key", image_key), ("--label-key", label_key)):
        if key not in features:
            raise ValueError(f"{flag} {key!r}: {data_path} has no such column; it has {', '.join(features)}")
    images, labels = features[image_key], features[label_key]
    kind = re.sub(r"^large_|_view$", "", getattr(labels, "dtype", ""))
    if not re.match("u?int|bool|string$", kind):
        needed = "labels must be integers, booleans or class names"
        raise ValueError(f"--label-key {label_key!r}: {needed}, and {data_path} has {labels}")
    holds_images = isinstance(images, datasets.Image) or (isinstance(images, dict) and "bytes" in images)
    if not holds_images and not re.search("binary|string", getattr(images, "dtype", "")):  # files, or their paths
        raise ValueError(f"--image-key {image_key!r}: {data_path} has no images there, but {images}")
    name = name_with_number("row ", f" of {data_path}")
    table = table.select_columns([image_key, label_key])
    if isinstance(images, datasets.Image):  # decoded by the library, an error would not say which row is broken
        table = table.cast_column(image_key, datasets.Image(decode=False))
    rows = _Rows(table if streaming else table.with_format(None), image_key, label_key)
    rows.classes = labels.names if isinstance(labels, datasets.ClassLabel) else None
    if kind == "bool":
        rows.classes, rows.numbers = ["False", "True"], {False: 0, True: 1, None: -1}
    if not streaming:
        found = table.select_columns([label_key]).with_format("arrow")[:][label_key].to_pylist()
        if kind == "string":
            rows.targets, rows.classes = number_labels(found)
            rows.numbers = dict(zip(found, rows.targets.tolist(), strict=True))
        else:
            rows.targets = np.array([-1 if label is None else label for label in found])
            rows.targets = rows.targets.astype(int) if kind == "bool" else rows.targets
        return from_dataset(rows, data_path, name, notes=list(notes))
    if kind == "string":
        needed = "a stream does not tell the class names beforehand, so its labels must be integers or a ClassLabel"
        raise ValueError(f"--label-key {label_key!r}: {needed}; leave out --streaming")
    num_examples = getattr((table.info.splits or {}).get(table.split), "num_examples", None)
    num_classes = len(rows.classes) if rows.classes else None
    fields = dict(streamed=True, class_names=rows.classes, notes=list(notes))
    return Source(rows.stream, None, name, num_classes, num_examples, bool(rows.classes), **fields)


def _metadata_of(folder):
    """Return (path, pyarrow table) of the metadata file that names a folder's images, as `datasets` has it, or None."""
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    convert = pyarrow.csv.ConvertOptions(strings_can_be_null=True, null_values=[""])
    read_csv = functools.partial(pyarrow.csv.read_csv, convert_options=convert)
    readers = {"csv": read_csv, "jsonl": pyarrow.json.read_json, "parquet": pyarrow.parquet.read_table}
    for suffix, read in readers.items():
        if (path := pathlib.Path(folder) / f"metadata.{suffix}").is_file():
            with named(f"{path} cannot be read", (OSError, pyarrow.ArrowException)):
                table = read(path)
            if FILE_NAME in table.column_names:
                return path, table
    return None


def doubt_of_folders(folder, label_key):
    """Return a line if a metadata file labels the images of a folder of class folders, too; else None."""
    with contextlib.suppress(ValueError):  # then the folders are all that can be read
        found = _metadata_of(folder)
        if found and label_key in found[1].column_names:
            return f"{found[0]} labels the images, too; --data-format imagefolder reads that, folder the class folders"
    return None


def holds_metadata(path):
    """Return whether a folder's images, or those of its splits, are labelled by a metadata file and not by folders."""
    splits, others = find_splits(path)
    paths = [path] * (len(others) < 2)
    paths += [path / split for split in splits if len(folders.shown_folders(path / split)) < 2]
    return any(map(_metadata_of, paths))


def open_metadata(data_path, split, label_key, skip_bad):
    """Return the source of a folder whose metadata file gives each image's file_name and label.

    Raise ValueError if that cannot be read, lacks the label or, unless `skip_bad`, names a file that is missing."""
    where, folder = f"--data-path {data_path!r}", data_path
    splits, found = find_splits(data_path)[0], _metadata_of(data_path)
    chosen = pick_split(splits, split, f"{where}: ") if splits else None
    if found is None and splits:  # there is one in each
        folder, splits = os.path.join(data_path, chosen), []
        found = _metadata_of(folder)
    elif split is not None and not splits:
        raise ValueError(f"--split {split} has no effect: there are no splits in {data_path!r}")
    if found is None:
        raise ValueError(f"{where} holds no metadata.csv, .jsonl or .parquet with a column {FILE_NAME!r}")
    path, table = found
    if label_key not in table.column_names:
        raise ValueError(
            f"--label-key {label_key!r}: {path} has no such column; it has {', '.join(table.column_names)}"
        )
    with named(f"--label-key {label_key!r} of {path}", ValueError):
        labels, classes = number_labels(table[label_key].to_pylist())
    names = [name or "" for name in table[FILE_NAME].to_pylist()]
    kept = [i for i, name in enumerate(names) if name and (not splits or pathlib.PurePath(name).parts[0] == chosen)]
    paths = [os.path.normpath(os.path.join(folder, names[i])) for i in kept]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing and not skip_bad:
        raise ValueError(f"{path} names {len(missing)} files that are missing, the first {missing[0]}")
    passed = folders.PassedOver(used=os.path.normpath(path))
    found = (os.path.join(root, name) for root, names in folders.walk_images(folder, passed) for name in names)
    for image in sorted(set(map(os.path.normpath, found)) - set(paths)):
        passed.add(f"images of other splits, or that {path.name} does not name", image)
    dataset = folders.ImageFiles(paths, labels[kept], classes)
    return from_dataset(dataset, data_path, paths.__getitem__, notes=list(passed.lines()))


class _Rows(Dataset):
    """The rows of a `datasets.Dataset` by index, or of an `IterableDataset` as a stream, as (PIL image, label)."""

    classes, targets, numbers = None, None, None  # names of the classes; labels by row; the labels' numbers

    def __init__(self, table, image_key, label_key):
        self.table, self.image_key, self.label_key = table, image_key, label_key

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        return self.decode(self.table[index])

    def decode(self, row):
        """Return (PIL image, label) of a row."""
        cell, label = row[self.image_key], row[self.label_key]
        label = label if self.numbers is None else self.numbers[label]
        cell = cell if isinstance(cell, dict) else {"bytes" if isinstance(cell, bytes) else "path": cell}
        cell = {"bytes": None, "path": None} | cell
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

        The seed decides the order of the files, and of rows within a buffer; None keeps the order in which they are
        stored. (The library's own buffer passes about fifty rows a second, fewer than one process decodes.)"""
        if seed is None:
            yield from ((str(i), functools.partial(self.decode, row)) for i, row in enumerate(self.table))
            return
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
