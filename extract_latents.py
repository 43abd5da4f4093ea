"""Encode a data set once, so that training does not have to.

    python extract_latents.py --data-path /path/to/imagenet/train --output latents
    torchrun --nproc_per_node=8 extract_latents.py --data-path /path/to/imagenet/train --output latents
    torchrun --nproc_per_node=8 train.py --data-path latents

Writes shards (safetensors) with the posterior's mean and standard deviation of every image and of its mirror image, and
a manifest. Training draws from the posterior afresh each time, as with the autoencoder in the loop. Started again, it
continues where it was stopped; what it writes does not depend on that, nor on the number of processes.
"""

import itertools
import json
import math
import os
import pathlib
import time

import safetensors.torch
import torch
from tqdm import tqdm

import compute
import data
import distributed
import files
import latents
import options


def build_parser():
    parser = options.Parser(
        description="Encode a data set into cached latents, on one process or with torchrun on many."
    )
    options.add_data_flags(parser)
    add = options.flag_group(parser, "extraction")
    add("--output", pathlib.Path, "FOLDER", "where shards and manifest go", required=True)
    add("--batch-size", options.integer(1), "N", "images at a time, per rank", default=64)
    add("--shard-size", options.integer(1), "N", "images per shard", default=4096)
    add("--dtype", options.one_of("float32", "float16"), "float32|float16", "of the stored moments", default="float32")
    return parser


def main():
    # Check the flags, the data and the folder.
    parser = build_parser()
    args = parser.parse_args()
    with options.user_errors(parser):
        device = distributed.init()
        compute.resolve_precision(None, device, on_gpu="tf32")  # as train.py has it where it encodes images itself
        source = options.open_data(args)
        if not isinstance(source, data.Source):
            raise ValueError(f"--data-path {args.data_path} holds cached latents already")
        if args.streaming:
            raise ValueError("--streaming does not go with extraction, which reads examples by their number")
        if args.vae == "none":
            raise ValueError("--vae none encodes nothing; give the autoencoder whose latents to cache")
        if not args.skip_bad_images:
            source.check_labels(source.num_classes)
        vae, image_size = args.vae or "ema", args.image_size or source.image_size or 256
        downsampling, channels = latents.geometry(vae, source.channels)
        if image_size % downsampling:
            raise ValueError(f"--image-size {image_size} does not divide: it must be a multiple of {downsampling}")
        space = latents.AutoencoderSpace(vae, device, latents.PRECISIONS[args.vae_precision])
        settings = {
            "data_path": os.path.abspath(args.data_path) if os.path.exists(args.data_path) else args.data_path,
            "split": args.split,
            "image_key": args.image_key,
            "label_key": args.label_key,
            "names_and_labels": source.fingerprint(),
            "num_examples": len(source.examples),
            "num_classes": source.num_classes,
            "mirrors": source.mirrors,
            "vae": str(pathlib.Path(vae).resolve()) if pathlib.Path(vae).is_dir() else vae,
            "vae_precision": args.vae_precision,
            "scale": space.scale,
            "shift": space.shift,
            "channels": channels,
            "image_size": image_size,
            "latent_size": image_size // downsampling,
            "batch_size": args.batch_size,
            "shard_size": args.shard_size,
            "dtype": args.dtype,
        }
        if distributed.rank() == 0:
            check_folder(args.output, settings)
        distributed.barrier()

    # Encode the shards that are not there, each rank its own.
    dataset = data.ImageDataset(source, image_size, 3)
    count = math.ceil(len(dataset) / args.shard_size)
    missing = distributed.from_rank_zero([k for k in range(count) if not is_whole(args.output, k)])
    mine = missing[distributed.rank() :: distributed.world_size()]
    batches = data.make_loader(dataset, ShardBatches(mine, len(dataset), args), args.num_workers, device)
    start, skipped = time.perf_counter(), 0
    total = sum(len(shard_range(k, len(dataset), args.shard_size)) for k in mine)
    with tqdm(total=total, unit=" images", disable=None if distributed.rank() == 0 else True) as bar:
        for k in mine:
            moments, labels, left_out = [], [], []
            for _ in batches_of_shard(k, len(dataset), args):
                with options.user_errors(parser):
                    images, batch_labels, problems = next(batches)
                for problem in itertools.chain(*problems):
                    if not args.skip_bad_images:
                        parser.error(f"{problem} (--skip-bad-images leaves such examples out)")
                    left_out.append(problem)
                    tqdm.write(f"left out {problem}")
                good = torch.tensor([not lines for lines in problems])
                moments.append(encode(space, images.to(device))[good.to(device)].cpu())
                labels.append(batch_labels[good])
                bar.update(len(images))
            shard = {"moments": torch.cat(moments).to(getattr(torch, args.dtype)), "labels": torch.cat(labels)}
            write_shard(args.output, k, shard, left_out)
            skipped += len(left_out)
    seconds = time.perf_counter() - start
    rate = f"{total / seconds:.1f} images/s, {skipped} left out"
    print(f"rank {distributed.rank()}: {total} images in {seconds:.1f} s, {rate}")

    # Say what is there.
    distributed.barrier()
    if distributed.rank() == 0:
        write_manifest(args.output, settings, count)
        print(args.output)
    distributed.shutdown()


def check_folder(folder, settings):
    """Make the folder and note the settings in it. Raises ValueError if it was begun with others."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / data.SETTINGS
        if path.exists():
            earlier = read_json(path)
            for key, value in settings.items():
                if earlier.get(key) != value:
                    raise ValueError(f"--output {folder} was begun with {key} {earlier.get(key)!r}, not {value!r}")
        elif any(entry != files.partial_name(path) for entry in folder.iterdir()):
            raise ValueError(f"--output {folder} is not empty, and what is there is not of extract_latents.py")
        else:
            with files.written_whole(path) as partial:
                partial.write_text(json.dumps(settings, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"--output {folder}: {error.strerror}") from error


def read_json(path):
    """A JSON file that holds an object. Raises ValueError naming it if it does not."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return content


def shard_path(folder, k):
    return folder / f"shard-{k:05d}.safetensors"


def entry_path(folder, k):
    """Where the shard's entry of the manifest lies until the manifest is written: with what was written, not found."""
    return folder / f"shard-{k:05d}.json"


def write_shard(folder, k, shard, left_out):
    """Write a shard and its entry of the manifest."""
    path = shard_path(folder, k)
    with files.written_whole(path) as partial:
        safetensors.torch.save_file(shard, partial)
        entry = {
            "file": path.name,
            "examples": len(shard["labels"]),
            "bytes": partial.stat().st_size,
            "sha256": files.sha256(partial),
            "left_out": left_out,
        }
        with files.written_whole(entry_path(folder, k)) as partial_entry:
            partial_entry.write_text(json.dumps(entry) + "\n")


def entry_of(folder, k):
    """The entry of a shard as it was when the shard was written; None if there is none."""
    try:
        path = entry_path(folder, k)
        return read_json(path) if path.is_file() else read_json(folder / data.MANIFEST)["shards"][k]
    except (OSError, ValueError, KeyError, IndexError):
        return None


def is_whole(folder, k):
    """Whether shard k is there as it was written; one that is damaged is made anew."""
    path, entry = shard_path(folder, k), entry_of(folder, k)
    if not path.exists():
        return False
    if entry is not None and path.stat().st_size == entry["bytes"] and files.sha256(path) == entry["sha256"]:
        return True
    print(f"{path} is damaged, and is made anew")
    return False


def shard_range(k, num_examples, shard_size):
    """The indices of the examples in shard k."""
    return range(k * shard_size, min((k + 1) * shard_size, num_examples))


def batches_of_shard(k, num_examples, args):
    """The batches of shard k as ranges: they begin with the shard, so that its bytes depend on nothing else."""
    indices = shard_range(k, num_examples, args.shard_size)
    return [indices[i : i + args.batch_size] for i in range(0, len(indices), args.batch_size)]


class ShardBatches:
    """The (index, flip) keys of the batches of some shards, one after the other; the flip is made from the tensor."""

    def __init__(self, shards, num_examples, args):
        self.batches = [batch for k in shards for batch in batches_of_shard(k, num_examples, args)]

    def __iter__(self):
        for batch in self.batches:
            yield [(index, False) for index in batch]


def encode(space, images):
    """Moments (N, 2, 2, C, h, w) of images (N, 3, H, W): of the image and of its mirror image, mean and deviation."""
    return torch.stack([space.moments(images), space.moments(images.flip(-1))], dim=1)


def write_manifest(folder, settings, count):
    """Write manifest.json: the settings, and size, checksum and number of examples of each shard."""
    entries = [entry_of(folder, k) for k in range(count)]
    with files.written_whole(folder / data.MANIFEST) as partial:
        partial.write_text(json.dumps({**settings, "shards": entries}, indent=2) + "\n")
    for k in range(count):
        entry_path(folder, k).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
