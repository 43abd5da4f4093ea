"""WebDataset's tars, read by index: the files of a sample share a name up to its first dot.

The image is NAME.jpg, NAME.png or the like; the label is the text of NAME.cls, or in NAME.json. Tars whose images have
no labels but lie in folders are read as class folders."""

import collections
import json
import re
import tarfile

from data.archives import LabelledFiles, class_folder_files, is_shown
from data.folders import PassedOver, image_suffixes, is_image, shown_folders, split_of
from data.labelled import from_dataset, leave_out, number_labels
from data.tables import files_to_read
from utils.files import named

LABEL_KEYS = ("cls", "label", "class")  # suffixes of files, or keys in NAME.json, without --label-key
IMAGE = re.compile(r"(.*)\.([^/.]+)")
SAMPLE = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]+)")


def holds_tars(path):
    """Return whether a folder has tars and no other folders, itself, or in data/, or in folders of splits."""
    inside = [path / name for name in shown_folders(path) if name == "data" or split_of(name)]
    return any(next(folder.glob("*.tar"), None) and not shown_folders(folder) for folder in (path, *inside))


class TarFiles:
    """Files in tars by index, as those of `archives.FolderFiles`: `names`, and `read(i)` -> bytes."""

    def __init__(self, path):
        self.path, self.tars, self.names, self.places = f"{path}/", [], [], []

    def members(self, tar):
        """Return {name: place} of the files in a tar, in their order. Raise ValueError if it cannot be read."""
        problem = f"{tar} is not a readable tar"
        with named(problem, (tarfile.TarError, OSError, EOFError)), tarfile.open(tar, "r:") as archive:
            entries = list(archive)
        if links := [entry.name for entry in entries if entry.issym() or entry.islnk()]:
            advice = "store the files by tar --dereference --hard-dereference"
            raise ValueError(f"{tar} holds {len(links)} links, which are not read, the first {links[0]}; {advice}")
        found = [(entry.name, (entry.offset_data, entry.size)) for entry in entries if entry.isfile()]
        files = {name.removeprefix("./"): place for name, place in found}
        if len(files) < len(found):
            raise ValueError(f"{tar} holds {len(found) - len(files)} files whose name an earlier one in it has")
        self.tars.append(str(tar))
        return {name: (len(self.tars) - 1, *place) for name, place in files.items() if is_shown(name)}

    def read_at(self, place):
        """Return the bytes of a file at a place that `members` gave."""
        number, start, size = place
        with open(self.tars[number], "rb") as file:
            file.seek(start)
            return file.read(size)

    def read(self, i):
        return self.read_at(self.places[i])


def open_tars(data_path, split, image_key, label_key, skip_bad):
    """Return the source of a split of tars. `image_key` and `label_key` are suffixes, or `label_key` a key of the JSON.

    Raise ValueError if they hold no labelled images or, unless `skip_bad`, one cannot be read."""
    where = f"--data-path {data_path!r}"
    with named(where, ValueError):
        paths, notes = files_to_read(data_path, "tar", split)
    files, labels, suffixes, left_out = TarFiles(data_path), [], collections.Counter(), []
    passed = PassedOver()
    for path in paths:
        with leave_out(left_out, skip_bad):
            samples = _group(files.members(path))
            suffixes.update(suffix for sample in samples.values() for suffix in sample)
            images = {key: _image(sample, image_key, f"{path}: {key}") for key, sample in samples.items()}
            found = {key: _label(files, sample, label_key, f"{path}: {key}") for key, sample in samples.items()}
            if alone := [key for key, label in found.items() if label is not None and images[key] is None]:
                raise ValueError(f"{path}: {len(alone)} samples have a label and no image, the first {alone[0]}")
            for key in (key for key, suffix in images.items() if suffix is None):
                passed.add("samples without an image", f"{path}: {key}", ", ".join(samples[key]))
            for key in filter(images.get, images):
                files.names.append(f"{key}.{images[key]}")
                files.places.append(samples[key][images[key]])
                labels.append(found[key])
    if not labels:
        if set(suffixes) == {"tar"}:
            what = "a tar of tars, as ImageNet's ILSVRC2012_img_train.tar is"
            raise ValueError(f"{where} is {what}; extract each tar in it into a folder of its name, a class")
        raise ValueError(f"{where} holds no images, but {', '.join(sorted(suffixes)) or 'nothing'}")
    if all(label is None for label in labels):
        if all(is_image(f"x.{suffix}") for suffix in suffixes) and all("/" in name for name in files.names):
            return class_folder_files(files, data_path, left_out=left_out, notes=notes)
        needed = f"a class in NAME.cls, or in NAME.json as {label_key!r} (--label-key)"
        needed += "; of tars that are a class each, extract each into a folder of its name" * (len(paths) > 1)
        raise ValueError(f"{where}: samples of {', '.join(sorted(suffixes))} without labels; each needs {needed}")
    with named(where, ValueError):
        dataset = LabelledFiles(files, range(len(labels)), *number_labels(labels))
    return from_dataset(dataset, data_path, dataset.name, left_out=left_out, notes=[*notes, *passed.lines()])


def _group(members):
    """Return {sample's key: {suffix: place}} of {file name: place}. Images alone are samples each."""
    samples, pattern = {}, IMAGE if all(map(is_image, members)) else SAMPLE
    for name, place in members.items():
        if match := pattern.fullmatch(name):
            samples.setdefault(match[1], {})[match[2].lower()] = place
    return samples


def _image(sample, image_key, name):
    """Return the suffix of a sample's image, or None if it has none. Raise ValueError if it has several."""
    if image_key in sample or image_key != "image":  # its default
        return image_key if image_key in sample else None
    images = [suffix for suffix in sample if f".{suffix}" in image_suffixes()]
    images = images or [suffix for suffix in sample if is_image(suffix)]
    if len(images) > 1:
        raise ValueError(f"{name} has several images, {', '.join(images)}; name one with --image-key")
    return images[0] if images else None


def _label(files, sample, label_key, name):
    """Return the label of a sample, an integer or a string; None if it has none. Raise ValueError if it is damaged."""
    keys = LABEL_KEYS if label_key == "label" else (label_key,)
    for key in keys:
        if key in sample:
            with named(f"{name}.{key} is damaged", ValueError):
                return files.read_at(sample[key]).decode().strip() or None
    if "json" in sample:
        with named(f"{name}.json is damaged", ValueError):
            content = json.loads(files.read_at(sample["json"]))
        if isinstance(content, dict):
            return next((content[key] for key in keys if key in content), None)
    return None
