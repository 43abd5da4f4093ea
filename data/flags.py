"""Flags of the data, which train.py, likelihood.py and extract_latents.py share."""

from data.sources import DATASETS, FORMATS
from utils.command_line import flag_group, integer, one_of
from vae import PRECISIONS

# The keys of the flags that are arguments of `open_source`: `open_source(**given(args, DATA_FLAGS))`.
DATA_FLAGS = ("data_path", "data_format", "image_key", "label_key", "split", "streaming", "skip_bad_images")


def add_data_flags(parser, with_loader=True):
    """Add the flags of the labelled images and of the autoencoder; --num-workers only if `with_loader`.

    Return the group's `add`, for more of them.
    """
    add = flag_group(parser, "data")
    names = ", ".join(DATASETS)
    path = (
        f"a data set by name ({names}), a folder of class folders, a saved Dataset, Parquet or Arrow files, cached "
        "latents, or a data set's name on the hub"
    )
    add("--data-path", str, f"PATH|NAME|{'|'.join(DATASETS)}", path)
    kinds = (*DATASETS, *FORMATS)
    add("--data-format", one_of(*kinds), "FORMAT", f"one of {', '.join(kinds)} (default: recognised from --data-path)")
    add("--image-key", str, "COLUMN", "column of the images, in tables", default="image")
    add("--label-key", str, "COLUMN", "column of the class labels, in tables", default="label")
    add("--split", str, "NAME", "split to read, where the data have several (default: train)")
    stream = "read hub, parquet or arrow data from front to back, without a copy on this machine's disk"
    add("--streaming", None, None, stream)
    skip = (
        "leave out images that cannot be read, labels that are missing or out of range, empty class folders and "
        "damaged shards, and count them in the log (default: stop and name the first)"
    )
    add("--skip-bad-images", None, None, skip)
    size = "images are resized and cropped to this (default: the data's size where all images have one, else 256)"
    add("--image-size", integer(1), "PIXELS", size)
    vae = "autoencoder: sd-vae-ft-ema or -mse, none for pixels, a hub name, a folder"
    add("--vae", str, "ema|mse|none|NAME|FOLDER", f"{vae} (default: that of cached latents, else ema)")
    add("--vae-precision", one_of(*PRECISIONS), "fp32|bf16", "precision of the autoencoder", default="fp32")
    if with_loader:
        add("--num-workers", integer(0), "N", "processes per rank that load data", default=4)
    return add
