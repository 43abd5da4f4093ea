"""Labelled images, however they are stored: what readers of all formats return."""

import contextlib
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image, ImageFile
from torch.utils.data import Dataset

from data.images import label_problem
from utils.files import named, one_line
from utils.sizes import pair

MOST_CLASSES = 1_000_000  # a larger label is taken for a mistake
DEFAULT_SIZE = 256  # of images that have no common one
FEW_SIZES, MOST_SIZES = 256, 50_000  # images whose size is read: of any, and where the few are equal


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
    image_size: int | None = None  # where it is known that all images are squares of this size; else it is measured
    mirrors: bool = True  # whether a mirror image keeps its label
    streamed: bool = False  # whether the examples come as a stream, not by index
    left_out: list = dataclasses.field(default_factory=list)  # one line for each bad thing that was left out
    class_names: list | None = None  # (num_classes,) str; None if the data do not name classes
    new_labels: np.ndarray | None = None  # (num_classes,) what the labels are where they are used; None: the same
    notes: list = dataclasses.field(default_factory=list)  # lines for the log: what was passed over or is enlarged
    doubt: str | None = None  # why the classes may be none; a number of classes that is given settles it

    def fingerprint(self):
        """Return the SHA-256 of the examples' names and labels, in their order."""
        digest = hashlib.sha256(b"" if self.labels is None else self.labels.astype(np.int64).tobytes())
        for i in range(self.num_examples):
            digest.update(self.name(i).encode() + b"\0")
        return digest.hexdigest()

    def resolve_classes(self, num_classes=None, skip_bad=False):
        """Return --num-classes or, if None, the data's, and keep the names of so many.

        Raise ValueError if it is unknown, or a label does not fit it."""
        if num_classes is None and self.num_classes is None:
            raise ValueError("--num-classes is missing: the data do not say how many classes they have")
        if self.declares_classes and self.num_classes and num_classes and num_classes > self.num_classes:
            raise ValueError(f"--num-classes {num_classes} contradicts the data, which has {self.num_classes}")
        self.check_doubt(num_classes)
        num_classes = num_classes or self.num_classes
        self.class_names = self.class_names and self.class_names[:num_classes]
        if not skip_bad and self.labels is not None:  # else labels are checked as they are read
            for i in np.flatnonzero((self.labels < 0) | (self.labels >= num_classes))[:1]:
                raise ValueError(label_problem(self.labels[i], num_classes, self.name(int(i))))
        return num_classes

    def check_doubt(self, num_classes):
        """Raise ValueError if the classes may be none, and nobody gave their number."""
        if self.doubt and num_classes != self.num_classes:
            raise ValueError(f"{self.doubt}; if it is right as it is, give --num-classes {self.num_classes}")

    def sizes(self, most=MOST_SIZES):
        """Return (width, height) of images spread over the data, read from the files' headers without decoding.

        These are FEW_SIZES images or, where those are equal, up to `most`, to the first that differs. Of data that are
        no files, and of streams, whose first images are read, they are FEW_SIZES. Bad images are passed over."""
        if self.streamed:
            found = (_size(example) for _, example in itertools.islice(self.examples(None), FEW_SIZES))
            return [size for size, _ in found if size is not None]
        few, many = (dict.fromkeys(np.linspace(0, self.num_examples - 1, n).astype(int)) for n in (FEW_SIZES, most))
        found = [_size(lambda i=int(i): self.examples[i]) for i in few]
        sizes = [size for size, _ in found if size is not None]
        if len(set(sizes)) == 1 and any(is_file for _, is_file in found):
            for i in many:
                size, _ = _size(lambda i=int(i): self.examples[i])
                sizes += [] if size is None else [size]
                if sizes[-1] != sizes[0]:
                    break
        return sizes

    def choose_image_size(self, given, multiple):
        """Return --image-size if `given`, also (H, W); else that of all images, if they are squares in `multiple`s.

        Without either, it is DEFAULT_SIZE. Add lines to `notes` that say what was chosen, and what is enlarged."""
        chosen, sizes = given or self.image_size, [(self.image_size, self.image_size)] * bool(self.image_size)
        if not sizes and self.examples is not None:
            sizes = self.sizes(FEW_SIZES if given else MOST_SIZES)
        if not chosen and len(set(sizes)) == 1 and sizes[0][0] == sizes[0][1] and sizes[0][0] % multiple == 0:
            chosen = sizes[0][0]
            self.notes.append(f"--image-size {chosen}, the size of all images")
        chosen = chosen or DEFAULT_SIZE
        height, width = pair(chosen)
        small, what = [size for size in sizes if size[0] < width or size[1] < height], f"enlarged to {width} x {height}"
        smallest = "{} x {}".format(*min(small, key=min, default=(0, 0)))
        if small and len(set(sizes)) == 1:
            why = "" if given or small[0][0] % multiple == 0 else f", which is no multiple of {multiple},"
            self.notes.append(f"images are {smallest}{why} and are {what} pixels")
        elif small:
            self.notes.append(f"{len(small)} of {len(sizes)} images looked at are {what} pixels; one is {smallest}")
        return chosen


def _size(example):
    """Return ((width, height) of the image of `example()`, an (image, label), or None; whether it is a file's)."""
    try:
        image = example()[0]
        if isinstance(image, Image.Image):
            return image.size, isinstance(image, ImageFile.ImageFile)
        height, width = image.shape[-2:] if hasattr(image, "movedim") else image.shape[:2]  # a tensor is (C, H, W)
        return (int(width), int(height)), False
    except Exception:  # image decoders raise errors of many kinds; they are reported when the image is used
        return None, False


def labels_by_name(names, known, what):
    """Return the labels that classes called `names` have where the classes are `known`: (len(names),) integers.

    Return None if the labels stay as they are: the lists are equal, or one is None or names classes by their numbers.
    Raise ValueError, in which `what` has the `names`, if one of them is not known."""
    if names is None or known is None or names == known:
        return None
    numbers = {name: number for number, name in enumerate(known)}
    unknown = next((name for name in names if name not in numbers), None)
    if unknown is None and len(numbers) == len(known):
        return np.array([numbers[name] for name in names])
    if any(side == list(map(str, range(len(side)))) for side in (names, known)):
        return None
    problem = "other class names" if unknown is None else f"the class {unknown!r}, which the checkpoint does not know"
    raise ValueError(f"{what} has {problem}; the checkpoint's classes are {some_of(known)}")


@contextlib.contextmanager
def leave_out(left_out, skip_bad):
    """Context that turns a ValueError into one more line of the list `left_out` if `skip_bad`."""
    try:
        yield
    except ValueError as error:
        if not skip_bad:
            raise
        left_out.append(str(error))


def match_classes(source, known, num_classes, what):
    """Give the classes of a `Source` or of latents the labels that a model has for them, by their names.

    `known` are the names of the model's `num_classes` classes, or None. Raise ValueError if the classes do not fit."""
    if isinstance(source, Source):
        source.check_doubt(num_classes)
    elif doubt := getattr(source, "doubt", None):
        source.notes.append(f"{what}: {doubt}")
    new_labels = labels_by_name(source.class_names, known, what)
    if (source.class_names is None) != (known is None):
        whose = "data do" if known else "checkpoint does"
        source.notes.append(f"labels are compared by their numbers: the {whose} not say what the classes are called")
    if isinstance(source, Source):
        source.new_labels = new_labels
    elif new_labels is not None:
        source.labels = new_labels[source.labels]


def some_of(names, most=5):
    """Return some of many names as text."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def name_with_number(before, after=""):
    """Return a function of a number that returns it between two texts, and can be sent to a worker process."""
    before, after = (text.replace("{", "{{").replace("}", "}}") for text in (before, after))
    return f"{before}{{}}{after}".format


def number_labels(labels):
    """Return ((N,) integers, class names or None) of labels that are all integers, or all strings; a None becomes -1.

    Strings are numbered in their sorted order, except integers as Python writes them, which are those. Raise ValueError
    for labels of other types."""
    kept = [label for label in labels if label is not None]
    kinds = {type(label) for label in kept}
    if kinds == {str} and all(re.fullmatch(r"0|-?[1-9][0-9]*", label) for label in kept):
        labels, kinds = [None if label is None else int(label) for label in labels], {int}
    if kinds == {str}:
        names = sorted(set(kept))
        numbers = {name: number for number, name in enumerate(names)} | {None: -1}
        return np.array([numbers[label] for label in labels]), names
    if kinds - {int}:
        odd = next((label for label in labels if type(label) not in (int, str, type(None))), None)
        found = "they are of both kinds" if odd is None else f"one is {one_line(odd, 40)}"
        raise ValueError(f"labels must be all integers or all strings, and {found}")
    with named("a label is out of range", OverflowError):
        return np.array([-1 if label is None else label for label in labels], dtype=np.int64), None


def from_dataset(dataset, data_path, name=None, **fields):
    """Return the `Source` of a `torch.utils.data.Dataset` that is read by index and whose items are (image, label).

    Its attribute `targets`, (N,) integers, gives the labels beforehand, and `classes`, a sequence, the names of the
    classes; either may be missing or None. `data_path` is what messages call the data set. `name` (default: that and
    the index) and `fields` (channels, image_size, mirrors, left_out, notes, doubt) are those of `Source`. Raise
    ValueError if it has no length or is empty, or its `targets` are not (N,) integers."""
    count = len(dataset) if hasattr(dataset, "__len__") else 0
    if count == 0:
        raise ValueError(f"--data-path {data_path!r} holds no images that can be read by index")
    name = name or name_with_number(f"{data_path} ")
    labels, classes = getattr(dataset, "targets", None), getattr(dataset, "classes", None)
    num_classes, names = (None, None) if classes is None else (len(classes), list(map(str, classes)))
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (count,) or labels.dtype.kind not in "iu":
            raise ValueError(f"--data-path {data_path!r}: the data set's `targets` are not one integer per image")
        if not num_classes:
            largest = int(labels.argmax())
            num_classes = max(int(labels[largest]) + 1, 1)
            if num_classes > MOST_CLASSES:
                raise ValueError(label_problem(labels[largest], MOST_CLASSES, name(largest)))
    return Source(dataset, labels, name, num_classes, count, names is not None, class_names=names, **fields)
