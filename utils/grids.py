"""Images as uint8 arrays and as picture grids."""

import math

import torch
from PIL import Image
from torchvision.utils import make_grid

from utils import files


def to_uint8(images):
    """Return images (N, C, H, W) in [-1, 1] as uint8 (N, H, W, C) on the CPU, rounded to the nearest grey level."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


def check_grid_output(path, inputs=()):
    """Raise ValueError if a grid and its .json cannot be written to `path`, which --output named, or are `inputs`."""
    if path.suffix != ".png":
        raise ValueError(f"--output {path} must end in .png")
    for file in (path, path.with_suffix(".json")):
        files.check_output("--output", file, inputs)


def grid_image(images, columns, min_side=64):
    """Return a picture of uint8 images (N, H, W, C) as a grid, each enlarged by whole pixels to `min_side` or more."""
    factor = math.ceil(min_side / images.shape[1])
    enlarged = images.repeat_interleave(factor, 1).repeat_interleave(factor, 2).permute(0, 3, 1, 2)
    grid = make_grid(enlarged, nrow=columns, padding=2, pad_value=255)  # repeats a grey channel three times
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def save_grid(images, path, columns, min_side=64):
    """Write the picture of `grid_image` to a .png."""
    grid_image(images, columns, min_side).save(path, format="png")
