"""Images per second of each kind of data, beside torchvision's ImageFolder: python benchmarks/data_speed.py

Makes JPEG files of random smooth colour, the same images as Parquet and Arrow, and their cached latents (by a small
random autoencoder: the size of the latents is that of the released ones, and reading them does not depend on who made
them). Then reads every source in turn, round by round, in one process, and prints the median of the rounds. torchvision
does what a DiT-style script does: ImageFolder with the same crop, flip, ToTensor and Normalize, in a DataLoader.
"""

import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from PIL import Image
from data import images
from data import loader
from data import sources
from utils import command_line

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


CPU = torch.device("cpu")


def make_folder(folder, count, rng):
    """`count` JPEG files of 500 x 375 pixels, as ImageNet's are on average, in ten class folders."""
    for i in range(count):
        path = folder / f"class{i % 10}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def make_tables(folder, root):
    """The files of class folders, their bytes unchanged, as a Parquet file and as a saved Dataset (Arrow)."""
    import datasets

    paths = sorted(folder.rglob("*.jpg"))
    cells = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    names = sorted({path.parent.name for path in paths})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    columns = {"image": cells, "label": [names.index(path.parent.name) for path in paths]}
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(root / "images.parquet")
    table.save_to_disk(root / "saved")


def make_latents(folder, root, image_size):
    """Cached latents of class folders, by extract_latents.py with a random autoencoder of the released geometry."""
    from diffusers import AutoencoderKL

    AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(root / "vae")
    script = [sys.executable, ROOT / "extract_latents.py", "--data-path", folder, "--vae", root / "vae"]
    flags = ["--image-size", str(image_size), "--output", root / "latents"]
    subprocess.run([*script, *flags], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def torchvision_loader(folder, image_size, batch_size, num_workers):
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    transform = transforms.Compose(
        [
            transforms.Lambda(lambda image: images.center_crop(image, image_size)),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    dataset = ImageFolder(folder, transform=transform)
    # Epoch after epoch without an end, at which workers would start anew: that of a large data set is far away.
    endless = torch.utils.data.RandomSampler(dataset, num_samples=10**9)
    return iter(torch.utils.data.DataLoader(dataset, batch_size, sampler=endless, num_workers=num_workers))


def project_loader(path, image_size, batch_size, num_workers, streaming=False):
    source = sources.open_source(str(path), streaming=streaming)
    count = source.num_examples
    sampler = loader.GlobalBatchSampler(count, batch_size, batch_size, seed=0, rank=0, world_size=1, mirror=True)
    if streaming:
        dataset = loader.StreamedBatches(source, images.ImageReader(image_size, 3, 10), sampler, num_workers)
    else:
        dataset = images.ImageDataset(source, image_size, 3) if isinstance(source, sources.Source) else source
    return loader.make_loader(dataset, sampler, num_workers, CPU)


def speed(batches, batch_size, seconds):
    """Images per second of an iterator of batches, over at least `seconds` after one batch of warm-up."""
    next(batches)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        count += batch_size
    return count / (time.perf_counter() - start)


def main():
    parser = command_line.Parser(description="Images per second of each kind of data, beside torchvision's ImageFolder.")
    add = command_line.flag_group(parser, "measurement")
    add("--images", command_line.integer(64), "N", "images of each source", default=512)
    add("--image-size", command_line.integer(8), "PIXELS", "size after the crop, a multiple of 8", default=256)
    add("--batch-size", command_line.integer(1), "N", "images per batch", default=32)
    add("--num-workers", command_line.integer(0), "N", "loader processes (threads, when streaming)", default=2)
    add("--rounds", command_line.integer(1), "N", "rounds over all sources", default=5)
    add("--seconds", command_line.number(0, exclude_minimum=True), "S", "time per source and round", default=4.0)
    args = parser.parse_args()
    with command_line.user_errors(parser):
        if args.image_size % 8:
            raise ValueError(f"--image-size {args.image_size} is no multiple of 8")
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        folder = root / "folder"
        make_folder(folder, args.images, np.random.default_rng(0))
        make_tables(folder, root)
        make_latents(folder, root, args.image_size)
        how = (args.image_size, args.batch_size, args.num_workers)
        loaders = {
            "torchvision ImageFolder": lambda: torchvision_loader(folder, *how),
            "class folders": lambda: project_loader(folder, *how),
            "saved Dataset (Arrow)": lambda: project_loader(root / "saved", *how),
            "Parquet": lambda: project_loader(root / "images.parquet", *how),
            "Parquet, streamed": lambda: project_loader(root / "images.parquet", *how, streaming=True),
            "cached latents": lambda: project_loader(root / "latents", *how),
        }
        rates = {name: [] for name in loaders}
        for _ in range(args.rounds):
            for name, make in loaders.items():
                rates[name].append(speed(make(), args.batch_size, args.seconds))
    base = statistics.median(rates["torchvision ImageFolder"])
    print("| source | images/s (median) | min | max | ratio to torchvision |")
    print("|---|---|---|---|---|")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.0f} | {min(values):.0f} | {max(values):.0f} | {median / base:.2f} |")


if __name__ == "__main__":
    main()
