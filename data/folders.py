"""Images in folders: one folder per class, in splits or not."""

import collections
import functools
import os
import re

from PIL import Image
from torch.utils.data import Dataset

from data.labelled import from_dataset, some_of
from utils.files import named

# The names of splits, by which `datasets` finds them in the names of files and folders, between these separators.
SPLIT_WORDS = {"train": "train", "training": "train"}
SPLIT_WORDS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
SPLIT_WORDS |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
_SPLIT = re.compile(rf"(?:^|[-._ 0-9])({'|'.join(SPLIT_WORDS)})(?=$|[-._ 0-9])")
# Folders of operating systems and tools, which are no classes, beside those whose names begin with a dot.
METADATA = {"__macosx", "@eadir", "__pycache__", "lost+found", "$recycle.bin", "system volume information"}
# Formats of PIL that are documents, videos or measurements, or that need other programs.
NOT_READ = {"BUFR", "EPS", "FITS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "PCD", "PDF", "WMF"}
HIDDEN = "hidden files and folders"
LABEL_FILE = re.compile(r"annot|label|\.csv$|\.tsv$", re.IGNORECASE)
IMAGE_FOLDER = re.compile(r"images?|imgs?|jpegimages", re.IGNORECASE)  # names that do not say which class
TABLE = "dataset.json"  # in which EDM, EDM2 and REPA have the labels


@functools.cache
def image_suffixes():
    """Return the suffixes, in lower case, of the files that are read as images: a tuple."""
    formats = Image.registered_extensions()
    return tuple(suffix for suffix, kind in formats.items() if kind in Image.OPEN and kind not in NOT_READ)


def is_image(name):
    return name.lower().endswith(image_suffixes())


def is_hidden(name):
    """Return whether a file or folder of this name is hidden, or metadata of a system, and thus no image or class."""
    return name.startswith(".") or name.lower() in METADATA


def split_of(name):
    """Return the split that a file's or folder's name has in it, 'train', 'validation' or 'test'; None without one."""
    match = _SPLIT.search(name.lower())
    return match and SPLIT_WORDS[match[1]]


def pick_split(names, split, where=""):
    """Return the one of `names` that --split means, or training if it is None: by its name, or by another word for it.

    Raise ValueError, which begins with `where`, if no split, or more than one, fits."""
    wanted = (split or "train").lower()
    exact = [name for name in names if name.lower() == wanted]
    alike = exact or [name for name in names if split_of(name) == SPLIT_WORDS.get(wanted, wanted)]
    words = [name for name in alike if name.lower() in SPLIT_WORDS]
    fitting = words if len(words) == 1 else alike
    if len(fitting) != 1:
        problem = f"several splits fit {wanted!r}: {', '.join(alike)}" if alike else f"there is no split {wanted!r}"
        raise ValueError(f"{where}{problem}; --split takes one of {', '.join(sorted(names))}")
    return fitting[0]


def shown_folders(path):
    """Return the names of the folders in a folder that are not hidden, sorted."""
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name))


def _holds_folders(path):
    """Return whether a folder holds folders and no images beside them."""
    with os.scandir(path) as entries:
        shown = [entry for entry in entries if not is_hidden(entry.name)]
        return any(entry.is_dir() for entry in shown) and not any(is_image(e.name) and e.is_file() for e in shown)


def find_splits(path):
    """Return the names of the folders in `path` that are splits, and of the others: ([], all) if they are classes.

    The word for a split can also be in a class's name, or be it: a folder `train` that holds images is one among
    others. Splits hold class folders, or have the names of several splits."""
    folders = shown_folders(path)
    named_so = [name for name in folders if split_of(name)]
    others = [name for name in folders if not split_of(name)]
    words = [name for name in folders if name.lower() in SPLIT_WORDS]
    structured = [name for name in named_so if _holds_folders(os.path.join(path, name))]
    sure = set(words) & set(structured) or len({split_of(name) for name in structured}) > 1
    sure = sure or (len({split_of(name) for name in words}) > 1 and 2 * len(words) >= len(folders))
    all_of_them = named_so and not others and (structured or len(words) == len(folders))
    return (named_so, others) if sure or all_of_them else ([], folders)


def _folder_of_split(data_path, split):
    """Return the folder of class folders to read, lines for the log, and why its folders may be no classes, or None.

    Raise ValueError if that is not clear."""
    where = f"--data-path {data_path!r}"
    splits, others = find_splits(data_path)
    if others and splits:
        train = [name for name in [*splits, *others] if "train" in name.lower()] or splits
        name = train[0] if train[0] in splits else splits[0]
        doubt = f"the split {name!r} lies among other folders ({some_of(others)}), as if it were a class"
        doubt = f"{doubt}; give --data-path {os.path.join(data_path, train[0])}"
        if split is None:
            return data_path, [], doubt
        raise ValueError(f"{where}: {doubt}")
    if not splits:
        if split is not None:
            raise ValueError(f"--split {split} has no effect: the folders in {data_path!r} are classes")
        return data_path, [], None
    chosen = pick_split(splits, split, f"{where}: ")
    passed, path = [name for name in splits if name != chosen], os.path.join(data_path, chosen)
    table = os.path.join(path, TABLE)
    doubt = f"{table} has labels; give --data-path {path}" if os.path.isfile(table) else None
    return path, [f"split {chosen}; passed over: {', '.join(passed)}"] * bool(passed), doubt


class PassedOver:
    """Counts the files and folders that are passed over, for the log."""

    def __init__(self, used=None):
        self.counts, self.first, self.used = collections.defaultdict(collections.Counter), {}, used

    def add(self, what, path, kind=""):
        """Count a path under `what` it is, and under its `kind`, unless it is the file that is `used`."""
        if self.used is not None and os.path.normpath(path) == self.used:
            return
        self.counts[what][kind] += 1
        self.first.setdefault(what, path)

    def lines(self):
        """Return a line for each `what`."""
        for what, kinds in self.counts.items():
            count = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common(5) if kind)
            yield f"passed over: {kinds.total()} {what} ({count}{'; ' if count else ''}first: {self.first[what]})"


def walk(top, passed, above=()):
    """Yield (folder, sorted names of its files) of a folder and all in it, following links; count what is hidden.

    A link to a folder that it lies in, or to one of those `above` or what they lie in, is counted and not followed."""
    above, files, inner = (os.path.realpath(top), *above), [], []
    with os.scandir(top) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_hidden(entry.name):
                passed.add(HIDDEN, entry.path)
            elif not entry.is_dir():
                files.append(entry.name)
            elif entry.is_symlink() and any(_lies_in(folder, os.path.realpath(entry.path)) for folder in above):
                passed.add("links to a folder that they lie in", entry.path)
            else:
                inner.append(entry.path)
    yield top, files
    for path in inner:
        yield from walk(path, passed, above)


def _lies_in(folder, other):
    """Return whether a folder is another, or lies in it; both are real paths."""
    return os.path.commonpath((folder, other)) == other


def images_of(root, names, passed):
    """Return the images among the files `names` in a folder; count the others."""
    for name in (name for name in names if not is_image(name)):
        kind = os.path.splitext(name)[1].lower() or "without suffix"
        passed.add("files that are no images", os.path.join(root, name), kind)
    return list(filter(is_image, names))


def walk_images(top, passed, above=()):
    """Yield (folder, sorted names of its images) as `walk` does; count the other files."""
    for root, names in walk(top, passed, above):
        yield root, images_of(root, names, passed)


class ImageFiles(Dataset):
    """Image files by index, as (PIL image, label); `targets` are their labels, `classes` the classes' names or None."""

    def __init__(self, paths, targets, classes):
        self.paths, self.targets, self.classes = paths, targets, classes

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return Image.open(self.paths[index]), self.targets[index]


def doubt_of_names(classes, beside):
    """Return a line if the names of class folders, or of what lies beside them, say that they are none; else None."""
    words = [name for name in classes if split_of(name)]
    several = len({split_of(name) for name in words}) > 1
    if words and (several or len(classes) == 1) and 4 * len(words) >= 3 * len(classes):
        return f"the folders {some_of(words)} have names of splits, and hold images beside each other"
    images = next(filter(IMAGE_FOLDER.fullmatch, classes), None)
    if images and len(classes) > 1:
        others = some_of([name for name in classes if name != images])
        return f"the folder {images!r} lies beside {others}, as if these were classes"
    if len(classes) == 1 and (labels := sorted(filter(LABEL_FILE.search, beside))):
        return f"all images are in one folder, {classes[0]!r}, and {labels[0]} may hold their labels"
    return None


class ClassFolders(ImageFiles):
    """The images in a folder of class folders, in the order of torchvision's `ImageFolder`.

    `classes` are the folders' sorted names. Raise ValueError for images beside each other in place of class folders,
    and for a broken link among them unless `skip_bad`, which adds a line to `left_out`."""

    def __init__(self, path, skip_bad):
        super().__init__([], [], shown_folders(path))
        self.path, self.passed, self.left_out = path, PassedOver(), []
        self.direct = set()  # classes with images that lie in no deeper folder
        for number, name in enumerate(self.classes):
            top = os.path.join(path, name)
            for root, names in sorted(walk_images(top, self.passed, (os.path.realpath(path),))):
                self.paths += [os.path.join(root, name) for name in names]
                self.targets += [number] * len(names)
                self.direct |= {number} if names and root == top else set()
        beside = []
        for name in sorted(set(os.listdir(path)) - set(self.classes)):
            place = os.path.join(path, name)
            if is_hidden(name):
                self.passed.add(HIDDEN, place)
            elif os.path.exists(place):
                beside.append(name)
            else:
                self.left_out.append(f"{place}, a link to what does not exist")
        if self.left_out and not skip_bad:
            raise ValueError(f"it holds {self.left_out[0]} and may be a class")
        images = images_of(path, beside, self.passed)
        for name in images:
            self.passed.add("images in no class folder", os.path.join(path, name))
        if not self.paths and images:
            advice = "put those of a class into a folder of its name, or file_name and label of each into metadata.csv"
            raise ValueError(f"it holds {len(images)} images and no class folders; {advice}")

    def doubt(self):
        """Return a line if the folders do not look like classes, but as if the path were one too high; else None."""
        held = sorted(set(self.targets))
        for folder in (os.path.join(self.path, self.classes[number]) for number in held):
            if os.path.isfile(os.path.join(folder, TABLE)):
                return f"{folder} holds {TABLE}, with labels; give --data-path {folder}"
        if not set(held) - self.direct or len(held) > 1:
            if doubt := doubt_of_names([self.classes[number] for number in held], os.listdir(self.path)):
                return doubt
        for number in (number for number in held if number not in self.direct):
            folder = os.path.join(self.path, self.classes[number])
            while not (splits := find_splits(folder)[0]) and len(inside := shown_folders(folder)) == 1:
                folder = os.path.join(folder, inside[0])
            if splits or (len(held) == 1 and _holds_folders(folder)):
                split = next((name for name in splits if split_of(name) == "train"), *splits[:1] or [""])
                what = f"the class folder {self.classes[number]!r} holds {'splits' if splits else 'folders'}"
                return f"{what} and no images itself; give --data-path {os.path.join(folder, split).rstrip(os.sep)}"
        return None


def class_folders(data_path, split, skip_bad):
    """Return the source of a folder of class folders, or of a folder of splits that are such folders.

    Raise ValueError if there are none or, unless `skip_bad`, one is a broken link or holds no image."""
    where = f"--data-path {data_path!r}"
    with named(f"{where} holds no class folders with images"):
        path, notes, doubt = _folder_of_split(data_path, split)
        with named(f"--data-path {path!r}", ValueError):
            dataset = ClassFolders(path, skip_bad)
        doubt = doubt or dataset.doubt()
    empty = sorted(set(range(len(dataset.classes))) - set(dataset.targets))
    names = [os.path.join(path, dataset.classes[number]) for number in empty]
    if not dataset.paths or (empty and not skip_bad):
        found = f"there is no image in {some_of(names)}" if names else "it holds no folders"
        raise ValueError(f"{where} holds no class folders with images: {found}{f'; {doubt}' if doubt else ''}")
    left_out = [*dataset.left_out, *(f"the folder {name}, which holds no image" for name in names)]
    fields = dict(left_out=left_out, notes=[*notes, *dataset.passed.lines()], doubt=doubt and f"{where}: {doubt}")
    return from_dataset(dataset, data_path, dataset.paths.__getitem__, **fields)
