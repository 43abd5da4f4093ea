"""Throughput of reading each kind of data, beside torchvision's ImageFolder: python benchmarks/data_speed.py

Makes JPEG files of random smooth colours, the same images as Parquet and Arrow, and their cached latents. (A small
random autoencoder encodes them; the latents have the released one's size, which is what reading depends on.) Then reads
every source in turn, round by round, in one process; the results are medians over rounds. torchvision does what a
DiT-style script does: ImageFolder with the same crop, flip, ToTensor and Normalize, in a DataLoader.
"""

import functools
import itertools
import pathlib
import tempfile
import time

import datasets
import measuring
import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from data.images import ImageDataset, center_crop
from data.loader import GlobalBatchSampler, make_loader
from data.sources import Source, open_source
from utils import command_line

CLASSES = 10


def make_folder(folder, count, rng):
    """Write `count` JPEG files of 500 x 375 pixels, ImageNet's average size, into class folders."""
    for i in range(count):
        path = folder / f"class{i % CLASSES}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def make_tables(folder, root):
    """Write the files of class folders, their bytes unchanged, as a Parquet file and as a saved Dataset (Arrow)."""
    datasets.disable_progress_bars()
    paths = sorted(folder.rglob("*.jpg"))
    cells = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    names = sorted({path.parent.name for path in paths})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    columns = {"image": cells, "label": [names.index(path.parent.name) for path in paths]}
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(root / "images.parquet")
    table.save_to_disk(root / "saved")


def make_latents(folder, root, image_size):
    """Run extract_latents.py on class folders with a random autoencoder of the released one's geometry."""
    AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(root / "vae")
    flags = ["--data-path", folder, "--vae", root / "vae", "--image-size", image_size, "--output", root / "latents"]
    measuring.run_script("extract_latents.py", *flags)


def torchvision_loader(folder, image_size, batch_size, num_workers):
    """Return an endless iterator of batches as a DiT-style script makes them."""
    transform = transforms.Compose(
        [
            transforms.Lambda(lambda image: center_crop(image, image_size)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    dataset = ImageFolder(folder, transform=transform)
    # Workers start again in each epoch. In a large data set that is rare, so here an epoch has no end.
    endless = torch.utils.data.RandomSampler(dataset, num_samples=10**9)
    return iter(torch.utils.data.DataLoader(dataset, batch_size, sampler=endless, num_workers=num_workers))


def project_loader(path, image_size, batch_size, num_workers, streaming=False):
    """Return an endless iterator of batches as train.py makes them."""
    source = open_source(str(path), streaming=streaming)
    count = source.num_examples
    sampler = GlobalBatchSampler(count, batch_size, batch_size, seed=0, rank=0, world_size=1, mirror=True)
    dataset = ImageDataset(source, image_size, 3, CLASSES) if isinstance(source, Source) else source
    return make_loader(dataset, sampler, num_workers, torch.device("cpu"))


def make_sources(root, count, image_size, batch_size, num_workers):
    """Write all kinds of data into a folder. Return {name: function that returns an iterator of batches}."""
    folder, flags = root / "folder", (image_size, batch_size, num_workers)
    make_folder(folder, count, np.random.default_rng(0))
    make_tables(folder, root)
    make_latents(folder, root, image_size)
    return {
        "torchvision ImageFolder": functools.partial(torchvision_loader, folder, *flags),
        "class folders": functools.partial(project_loader, folder, *flags),
        "saved Dataset (Arrow)": functools.partial(project_loader, root / "saved", *flags),
        "Parquet": functools.partial(project_loader, root / "images.parquet", *flags),
        "Parquet, streamed": functools.partial(project_loader, root / "images.parquet", *flags, streaming=True),
        "cached latents": functools.partial(project_loader, root / "latents", *flags),
    }


def throughput(batches, batch_size, seconds):
    """Return the images/s of an iterator of batches, over at least `seconds` after one batch of warm-up."""
    next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += batch_size
    return count / (time.perf_counter() - start)


def build_parser():
    parser = command_line.Parser("Throughput of reading each kind of data, beside torchvision's ImageFolder.")
    add, at_least_one = command_line.flag_group(parser, "measurement"), command_line.integer(1)
    add("--images", command_line.integer(64), "N", "images of each source", default=512)
    add("--image-size", command_line.integer(8), "PIXELS", "size after the crop, a multiple of 8", default=256)
    add("--batch-size", at_least_one, "N", "images per batch", default=32)
    add("--num-workers", command_line.integer(0), "N", "loader processes; threads, when streaming", default=2)
    add("--rounds", at_least_one, "N", "rounds over all sources", default=5)
    add("--seconds", command_line.number(0, exclude_minimum=True), "S", "time per source and round", default=4.0)
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    with command_line.user_errors(parser):
        measuring.check_image_size(args.image_size)
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        sources = make_sources(root, args.images, args.image_size, args.batch_size, args.num_workers)
        rates = {name: [] for name in sources}
        for _, (name, start) in itertools.product(range(args.rounds), sources.items()):
            rates[name].append(throughput(start(), args.batch_size, args.seconds))
    medians = {name: measuring.median(values) for name, values in rates.items()}
    base = medians["torchvision ImageFolder"]
    print(f"{measuring.machine(torch.device('cpu'))}\n")
    lines = []
    for name, values in rates.items():
        numbers = (f"{rate:.0f}" for rate in (medians[name], min(values), max(values)))
        lines.append([name, *numbers, f"{medians[name] / base:.2f}"])
    measuring.print_table(["source", "images/s (median)", "min", "max", "ratio to torchvision"], lines)


if __name__ == "__main__":
    main()
