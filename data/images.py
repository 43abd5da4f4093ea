"""From labelled images to tensors: decode, crop, mirror, and replace the bad ones."""

import operator
import re

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image

from utils.files import one_line

PATIENCE = 1000  # examples that are tried in place of a bad one


def label_problem(label, num_classes, name):
    """Return a line that says what is wrong with the label of the example `name`: -1 is missing; None if it is fine."""
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


def center_crop(image, size):
    """Crop as ADM does: halve with a box filter while twice too large, resize the short side bicubically, crop."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


def _to_pil(image):
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
    {"images": float32 (channels, image_size, image_size) in [-1, 1], mirrored if `flip`, "y": int, "problems": []}. If
    the example is bad, the next good one takes its place, and "problems" holds one line that says so. Raise ValueError
    if PATIENCE examples in a row are bad."""

    def __init__(self, source, image_size, channels, num_classes=None):
        self.source, self.image_size, self.mode = source, image_size, {1: "L", 3: "RGB"}[channels]
        self.num_classes = num_classes or source.num_classes

    def __len__(self):
        return len(self.source.examples)

    def __getitem__(self, key):
        index, flip = key
        problems = []
        for candidate in range(index, index + min(len(self), PATIENCE)):
            i = candidate % len(self)
            item = self.read(i, lambda i=i: self.source.examples[i], flip)
            if not item["problems"]:
                return item | {"problems": problems[:1]}  # the others are reported when their turn comes
            problems += item["problems"]
        raise ValueError(f"not one of {len(problems)} examples in a row is good; the first: {problems[0]}")

    def read(self, key, example, flip):
        """Return the item of `example()`, an (image, label) called `key`; "problems" alone if that is bad."""
        name = self.source.name(key)
        try:
            image, label = example()
            label = -1 if label is None else operator.index(label)
            image = center_crop(_to_pil(image).convert(self.mode), self.image_size)
        except Exception as error:  # image decoders raise errors of many kinds
            reason = re.sub(r" ?<_io\.\w+( object at \w+)?>", "", one_line(error))
            return {"problems": [f"{name}: the image cannot be read: {reason}"]}
        if problem := label_problem(label, self.num_classes, name):
            return {"problems": [problem]}
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # In NumPy: PyTorch's threads, on so small a tensor, slow a loader without worker processes several times.
        pixels = np.asarray(image, dtype=np.float32).reshape(self.image_size, self.image_size, -1)  # (H, W, C)
        pixels = np.ascontiguousarray(pixels.transpose(2, 0, 1)) / 127.5 - 1  # (C, H, W)
        return {"images": torch.from_numpy(pixels), "y": label, "problems": []}
