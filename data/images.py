"""From labelled images to tensors: decode, crop, mirror, and replace the bad ones."""

import math
import operator
import re

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image

from utils.files import one_line
from utils.grids import to_uint8
from utils.sizes import pair

PATIENCE = 1000  # examples that are tried in place of a bad one
MOST_FILE_PIXELS = 1_000_000_000  # of an image file, 4 GB once decoded; PIL alone refuses more than 179 million
LONG_SIDE = 16  # in sizes of the crop; an image that would become longer is not enlarged as a whole


def label_problem(label, num_classes, name):
    """Return a line that says what is wrong with the label of the example `name`; None if it is fine.

    It must be an integer; -1 or None is missing."""
    try:
        label = -1 if label is None else operator.index(label)
    except TypeError:
        return f"{name}: the label {one_line(repr(label), 80)} is no integer"
    if 0 <= label < num_classes:
        return None
    problem = "the label is missing" if label == -1 else f"label {label} is out of range"
    return f"{name}: {problem}; {num_classes} classes have the labels 0 to {num_classes - 1}"


def check_problems(problems, skip_bad):
    """Return the lines of a batch's "problems" as one list. Raise ValueError if there are any, unless `skip_bad`."""
    lines = [line for item in problems for line in item]
    if lines and not skip_bad:
        raise ValueError(f"{lines[0]} (--skip-bad-images leaves such examples out)")
    return lines


def first_good(read, index, count):
    """Return the first of the items read(i), i from `index` on, that has no "problems", but the line of the first bad.

    Indices from `count` on begin again at 0. Raise ValueError if PATIENCE examples in a row are bad."""
    problems = []
    for i in range(index, index + min(count, PATIENCE)):
        item = read(i % count)
        if not item["problems"]:
            return item | {"problems": problems[:1]}  # the others are reported when their turn comes
        problems += item["problems"]
    raise ValueError(f"not one of {len(problems)} examples in a row is good; the first: {problems[0]}")


def center_crop(image, size):
    """Crop to an integer size as ADM does: halve with a box filter while twice too large, resize bicubically, crop.

    The image is resized until its short side has the size or, for a pair (height, width), until it just covers that."""
    wanted = pair(size)[::-1]  # (width, height), as PIL has it
    while all(side >= 2 * least for side, least in zip(image.size, wanted, strict=True)):
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = max(least / side for side, least in zip(image.size, wanted, strict=True))
    resized = tuple(round(side * scale) for side in image.size)
    left, top = ((side - least) // 2 for side, least in zip(resized, wanted, strict=True))
    crop = left, top, left + wanted[0], top + wanted[1]
    if scale > 1 and max(resized) > LONG_SIDE * max(wanted):  # 1 x 60,000 pixels would become gigabytes
        return _enlarge_part(image, resized, crop)
    return image.resize(resized, resample=Image.Resampling.BICUBIC).crop(crop)


def _enlarge_part(image, resized, crop):
    """Return the part `crop` of `image.resize(resized)`, larger than the image, without resizing what lies outside.

    The bicubic filter reaches over two pixels, and PIL enlarges the columns first. Rounding can change a pixel by 1."""
    scales = [side / side_resized for side, side_resized in zip(image.size, resized, strict=True)] * 2
    left, top, right, bottom = (edge * scale for edge, scale in zip(crop, scales, strict=True))
    x, y = max(math.floor(left) - 3, 0), max(math.floor(top) - 3, 0)
    image = image.crop((x, y, min(math.ceil(right) + 3, image.width), min(math.ceil(bottom) + 3, image.height)))
    width, height, resample = crop[2] - crop[0], crop[3] - crop[1], Image.Resampling.BICUBIC
    image = image.resize((width, image.height), resample, box=(left - x, 0, right - x, image.height))
    return image.resize((width, height), resample, box=(0, top - y, width, bottom - y))


def allow_large_images():
    """Let PIL open images of up to MOST_FILE_PIXELS in this process, and refuse larger ones as decompression bombs."""
    Image.MAX_IMAGE_PIXELS = MOST_FILE_PIXELS // 2  # PIL raises DecompressionBombError above twice as many


def to_pil(image):
    """Return an image as a PIL image with 8 bits per channel. Raise ValueError if its range is not known."""
    if not isinstance(image, Image.Image):
        values = np.asarray(image)
        if values.dtype != np.uint8 and not (values.dtype.kind == "f" and values.min() >= 0 and values.max() <= 1):
            raise ValueError("an array must be uint8, or floats in [0, 1]")
        image = to_pil_image(image)
    if image.mode.startswith("I;16"):  # PIL's own conversion would clip it
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"images of mode {image.mode} have no range that is known")
    return image


class ImageDataset(Dataset):
    """The images of a `Source` as tensors: `channels` is 1 for grey, 3 for RGB; labels must be below `num_classes`.

    The key of an item is (index, flip): the sampler decides all that is random, so workers have no state. An item is
    {"images": float32 (channels, H, W) in [-1, 1], mirrored if `flip`, "y": int, "problems": []}; `image_size` is H = W
    or a pair (H, W). If the example is bad, the next good one takes its place, and "problems" holds one line that says
    so. Raise ValueError if PATIENCE examples in a row are bad."""

    def __init__(self, source, image_size, channels, num_classes=None):
        self.source, self.image_size, self.mode = source, image_size, {1: "L", 3: "RGB"}[channels]
        self.num_classes = num_classes or source.num_classes

    def __len__(self):
        return len(self.source.examples)

    def __getitem__(self, key):
        index, flip = key
        return first_good(lambda i: self.read(i, lambda: self.source.examples[i], flip), index, len(self))

    def read(self, key, example, flip):
        """Return the item of `example()`, an (image, label) called `key`; "problems" alone if that is bad."""
        name = self.source.name(key)
        allow_large_images()
        try:
            image, label = example()
            image = to_pil(image)
            # Grey images are converted after the crop, which gives the same pixels: a large scan is in memory once.
            image = image if image.mode in ("L", self.mode) else image.convert(self.mode)
            image = center_crop(image, self.image_size).convert(self.mode)
        except Exception as error:  # image decoders raise errors of many kinds
            reason = re.sub(r" ?<_io\.\w+( object at \w+)?>", "", one_line(error))
            return {"problems": [f"{name}: the image cannot be read: {reason}"]}
        new_labels = self.source.new_labels
        if problem := label_problem(label, self.num_classes if new_labels is None else len(new_labels), name):
            return {"problems": [problem]}
        label = operator.index(label) if new_labels is None else int(new_labels[label])
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # In NumPy: PyTorch's threads, on so small a tensor, slow a loader without worker processes several times.
        pixels = np.asarray(image, dtype=np.float32).reshape(*pair(self.image_size), -1)  # (H, W, C)
        pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1)) / 127.5 - 1  # (C, H, W)
        return {"images": torch.from_numpy(pixels), "y": label, "problems": []}


def small_images(source, image_size, channels, num_classes, most):
    """Yield up to `most` images of a `Source`, cropped as for training, as uint8 arrays (1, H, W, C)."""
    dataset = ImageDataset(source, image_size, channels, num_classes)
    for i in range(min(len(dataset), most)):
        yield to_uint8(dataset[i, False]["images"][None]).numpy()
