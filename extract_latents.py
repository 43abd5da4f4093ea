"""Encode a data set once, so that training does not have to.

    python extract_latents.py --data-path /path/to/imagenet/train --output latents
    torchrun --nproc_per_node=8 extract_latents.py --data-path /path/to/imagenet/train --output latents
    torchrun --nproc_per_node=8 train.py --data-path latents

Write shards (safetensors) with the posterior's mean and standard deviation of every image and of its mirror image, and
a manifest. Training samples the posterior anew in each epoch, as it does with the autoencoder in the loop. The same
command continues an extraction that was stopped; neither that nor the number of processes changes what is written.
"""

import itertools
import os
import pathlib
import time

import torch
from tqdm import tqdm

from data.cached import ShardWriter
from data.flags import DATA_FLAGS, add_data_flags
from data.images import ImageDataset, check_problems
from data.loader import make_loader
from data.sources import Source, open_source
from utils import command_line, distributed
from utils.grids import to_uint8
from utils.precision import resolve_precision
from vae import PRECISIONS, LatentSpace, geometry


def build_parser():
    parser = command_line.Parser("Encode a data set into cached latents, on one process or with torchrun on many.")
    add_data_flags(parser)
    add = command_line.flag_group(parser, "extraction")
    at_least_one = command_line.integer(1)
    add("--output", pathlib.Path, "FOLDER", "folder of the shards and the manifest", required=True)
    add("--batch-size", at_least_one, "N", "images at a time, per rank", default=64)
    add("--shard-size", at_least_one, "N", "images per shard", default=4096)
    add("--num-classes", at_least_one, "N", "number of classes (default: the data's)")
    add("--dtype", command_line.one_of("float32", "float16"), "float32|float16", "of stored moments", default="float32")
    add("--keep-images", None, None, "store the cropped images, too, for losses that read them: 3 bytes per pixel")
    return parser


def main():
    # Check the flags, the data and the folder.
    parser = build_parser()
    args = parser.parse_args()
    with command_line.user_errors(parser):
        device = distributed.init()
        resolve_precision(None, device, on_gpu="tf32")  # as train.py does when it encodes images itself
        source = open_source(**command_line.given(args, DATA_FLAGS))
        if not isinstance(source, Source):
            raise ValueError(f"--data-path {args.data_path} holds cached latents already")
        if source.streamed:
            raise ValueError("--streaming does not go with extraction, which reads examples by index")
        image_size = args.image_size or source.image_size or 256
        space, encoding = open_autoencoder(args.vae or "ema", args.vae_precision, image_size, device)
        settings = {
            "data_path": os.path.abspath(args.data_path) if os.path.exists(args.data_path) else args.data_path,
            **{key: getattr(args, key) for key in ("split", "image_key", "label_key")},
            "names_and_labels": source.fingerprint(),
            "num_examples": source.num_examples,
            "num_classes": source.resolve_classes(args.num_classes, args.skip_bad_images),
            "mirrors": source.mirrors,
            **encoding,
            **{key: getattr(args, key) for key in ("batch_size", "shard_size", "dtype")},
            **({"keep_images": True} if args.keep_images else {}),
        }
        writer = ShardWriter(args.output, settings)
        distributed.on_rank_zero(writer.prepare)

    # Encode the shards that are missing, each rank its own.
    mine = distributed.on_rank_zero(writer.missing)[distributed.rank() :: distributed.world_size()]
    ranges = [indices for k in mine for indices in writer.batches(k)]
    keys = ([(index, False) for index in indices] for indices in ranges)
    dataset = ImageDataset(source, image_size, 3, settings["num_classes"])
    batches = make_loader(dataset, keys, args.num_workers, device)
    start, total, skipped = time.perf_counter(), sum(map(len, ranges)), 0
    bar = tqdm(total=total, unit=" images", disable=None if distributed.rank() == 0 else True)
    with bar, command_line.user_errors(parser):
        for k in mine:
            encoded, left_out = [], []
            for batch in itertools.islice(batches, len(writer.batches(k))):
                left_out += check_problems(batch["problems"], args.skip_bad_images)
                encoded.append(encode(space, batch, getattr(torch, args.dtype), args.keep_images))
                bar.update(len(batch["y"]))
            for line in left_out:
                tqdm.write(f"left out {line}")
            writer.write(k, {key: torch.cat([part[key] for part in encoded]) for key in encoded[0]}, left_out)
            skipped += len(left_out)
    seconds = time.perf_counter() - start
    speed = f"{total} images in {seconds:.1f} s, {total / seconds:.1f} images/s"
    print(f"rank {distributed.rank()}: {speed}, {skipped} left out")

    # Write the manifest.
    distributed.barrier()
    if distributed.rank() == 0:
        writer.finish()
        print(args.output)
    distributed.shutdown()


def open_autoencoder(vae, precision, image_size, device):
    """Return the latent space, and what the settings say of it. Raise ValueError if the image size does not divide."""
    if vae == "none":
        raise ValueError("--vae none encodes nothing; give the autoencoder whose latents to cache")
    downsampling, channels = geometry(vae, None)
    if image_size % downsampling:
        raise ValueError(f"--image-size {image_size} does not divide: it must be a multiple of {downsampling}")
    space = LatentSpace(vae, device, PRECISIONS[precision])
    return space, {
        "vae": str(pathlib.Path(vae).resolve()) if pathlib.Path(vae).is_dir() else vae,
        "vae_precision": precision,
        "scale": space.scale,
        "shift": space.shift,
        "channels": channels,
        "image_size": image_size,
        "latent_size": image_size // downsampling,
    }


def encode(space, batch, dtype, keep_images):
    """Return a part of a shard, {key: tensor}, of a batch's good examples.

    "moments" is (N, 2, 2, C, h, w): of the image and of its mirror image, mean and standard deviation. "labels" is (N,)
    int64. "images" is uint8 (N, 3, H, W).
    """
    good = torch.tensor([not lines for lines in batch["problems"]])
    images = batch["images"].to(space.device)
    moments = torch.stack([space.moments(images), space.moments(images.flip(-1))], dim=1).cpu()
    part = {"moments": moments[good].to(dtype), "labels": batch["y"][good]}
    if keep_images:
        part["images"] = to_uint8(batch["images"][good]).permute(0, 3, 1, 2).contiguous()
    return part


if __name__ == "__main__":
    main()
