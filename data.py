"""From files to batches: data sets, transforms, and the order in which a run sees its examples."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from distributed import ORDER_STREAM, generator


@dataclasses.dataclass
class Source:
    """Labelled images on disk or in memory: `examples[i]` is (PIL image, label in [0, num_classes))."""

    examples: Sequence
    num_classes: int
    channels: int  # of the images as they are: 1 grey, 3 colour
    image_size: int | None  # the size that all images have, if they do
    mirrors: bool  # whether a mirrored image is still one of its class


def open_source(data_path):
    """Open what `--data-path` names: 'digits', or a folder with one folder of images per class.

    Raises:
        ValueError: nothing of the kind is there.
    """
    if data_path == "digits":
        return _digits()
    if not pathlib.Path(data_path).is_dir():
        raise ValueError(f"--data-path {data_path!r}: no such folder; give 'digits' or a folder of class folders")
    return _class_folders(data_path)


def _digits():
    """scikit-learn's handwritten digits: 1,797 real images of 8x8 pixels, ten classes, part of the package."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # stored as 0 ... 16
    examples = [(Image.fromarray(image), int(label)) for image, label in zip(pixels, digits.target, strict=True)]
    return Source(examples, num_classes=10, channels=1, image_size=8, mirrors=False)


def _class_folders(data_path):
    from torchvision.datasets import ImageFolder

    try:
        folder = ImageFolder(data_path)
    except FileNotFoundError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--data-path {data_path!r} holds no class folders with images: {reason}") from error
    return Source(folder, num_classes=len(folder.classes), channels=3, image_size=None, mirrors=True)


def center_crop(image, size):
    """ADM's crop: halve with a box filter while twice too large, resize the short side to `size` bicubically, crop."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return image.crop((left, top, left + size, top + size))


class ImageDataset(Dataset):
    """Images of a source as the network takes them.

    An item is asked for by (index, flip): what is random about it was decided by whoever ordered it, so workers hold no
    state. It is (image, label): float32 (channels, image_size, image_size) in [-1, 1], and int.
    """

    def __init__(self, source, image_size, channels):
        self.source = source
        self.image_size = image_size
        self.mode = {1: "L", 3: "RGB"}[channels]

    def __len__(self):
        return len(self.source.examples)

    def __getitem__(self, key):
        index, flip = key
        image, label = self.source.examples[index]
        image = center_crop(image.convert(self.mode), self.image_size)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).float() / 127.5 - 1  # (H, W) or (H, W, 3)
        return pixels.reshape(self.image_size, self.image_size, -1).permute(2, 0, 1).contiguous(), label


class GlobalBatchSampler:
    """The (index, flip) keys of one rank's micro batches, step after step, without end.

    The order is one long sequence: a permutation of the data for each epoch, drawn from (seed, epoch) alone, one after
    the other, so that no example is left out at an epoch's end. Step s takes places [s B, (s + 1) B) of it; each rank
    has a contiguous share of those, in micro batches. What a step trains on is thus the same for any number of ranks,
    any micro batch size, and after any restart.

    Args:
        num_examples: size of the data set.
        global_batch_size: B, over all ranks and accumulated micro batches.
        micro_batch_size: examples per item; B is a multiple of micro_batch_size times world_size.
        mirror: flip each example with probability 1/2 per epoch.
    """

    def __init__(
        self, num_examples, global_batch_size, micro_batch_size, *, seed, rank, world_size, mirror, start_step=0
    ):
        self.num_examples = num_examples
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.mirror = mirror
        self.start_step = start_step

    def __iter__(self):
        # A step can reach over the end of an epoch, so the orders of two are at hand.
        epoch_keys = functools.lru_cache(maxsize=2)(self._epoch_keys)
        share = self.global_batch_size // self.world_size
        step = self.start_step
        while True:
            first = step * self.global_batch_size + self.rank * share
            for start in range(first, first + share, self.micro_batch_size):
                places = (divmod(place, self.num_examples) for place in range(start, start + self.micro_batch_size))
                yield [epoch_keys(epoch)[position] for epoch, position in places]
            step += 1

    def _epoch_keys(self, epoch):
        g = generator("cpu", self.seed, ORDER_STREAM, epoch)
        order = torch.randperm(self.num_examples, generator=g).tolist()
        flips = (torch.rand(self.num_examples, generator=g) < 0.5).tolist() if self.mirror else [False] * len(order)
        return list(zip(order, flips, strict=True))


def make_loader(dataset, sampler, num_workers, device):
    """An endless iterator of (images (M, C, H, W), labels (M,)) on the CPU, M the micro batch size."""
    return iter(DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, pin_memory=device.type == "cuda"))
