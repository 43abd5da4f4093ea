"""Encode a data set once, so that training does not have to.

    python extract_latents.py --data-path /path/to/imagenet/train --output latents
    torchrun --nproc_per_node=8 extract_latents.py --data-path /path/to/imagenet/train --output latents
    torchrun --nproc_per_node=8 train.py --data-path latents

Write shards (safetensors) with the posterior's mean and standard deviation of every image and of its mirror image, and
a manifest. Training samples the posterior anew in each epoch, as it does with the autoencoder in the loop. The same
command continues an extraction that was stopped; neither that nor the number of processes changes what is written."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, while packages load, too, ends without a traceback

import itertools
import os
import time

import torch
from tqdm import tqdm

from data.cached import DTYPES, ShardWriter, stopped_setting
from data.images import ImageDataset, check_problems
from data.loader import make_loader
from data.sources import DATA_FLAGS, Source, add_data_flags, flag_rules, open_source
from utils import distributed
from utils.command_line import Parser, flag_group, given, integer, location, one_of, path, user_errors, without_effect
from utils.encoders import DINOV2, PatchEncoder
from utils.grids import to_uint8
from utils.precision import resolve_precision
from utils.sizes import pair, scaled, size_name
from vae import PRECISIONS, LatentSpace, geometry


def build_parser():
    parser = Parser("Encode a data set into cached latents, on one process or with torchrun on many.")
    add_data_flags(parser)
    add = flag_group(parser, "extraction")
    add("--output", path, "FOLDER", "folder of the shards and the manifest", required=True)
    add("--batch-size", integer(1), "N", "images at a time, per rank", default=64)
    add("--shard-size", integer(1), "N", "images per shard", default=4096)
    add("--num-classes", integer(1), "N", "number of classes (default: the data's)")
    kinds = f"of stored moments (default: {DTYPES[0]}, or that of the stopped extraction)"
    add("--dtype", one_of(*DTYPES), "|".join(DTYPES), kinds)
    add("--keep-images", None, None, "store the cropped images, too, for losses that read them: 3 bytes per pixel")
    kind = "a model of timm, or a folder of one, whose patch features --align is to read: float16, of an image and its"
    kind = f"{kind} mirror image (768 KiB for 256 tokens of 768 features; without a value: {DINOV2})"
    add("--features", location, "ENCODER", kind, nargs="?", const=DINOV2)
    add("--patch-size", integer(1), "N", "of the model to train, as there is one feature per token", default=2)
    statistics = "let training shift and scale each channel to mean 0 and deviation 1 (default: the VAE's one scale)"
    add("--channel-statistics", None, None, statistics)
    return parser


def main():
    # Check the flags, the data and the folder.
    parser = build_parser()
    args = parser.parse_args()
    with user_errors(parser):
        device, rank = distributed.init(), distributed.rank()
        resolve_precision(None, device, on_gpu="tf32")  # as train.py does when it encodes images itself
        source = open_source(**given(args, DATA_FLAGS))
        if not isinstance(source, Source):
            raise ValueError(f"--data-path {args.data_path} holds cached latents already")
        if source.streamed:
            raise ValueError("--streaming does not go with extraction, which reads examples by index")
        unread = (args.features is None, ("patch_size",), "without --features")
        source.notes += without_effect(parser.changed, [unread, *flag_rules(args.data_path, args.data_format)])
        multiple = 2 * geometry(args.vae or "ema", None)[0]  # patches are of 2 latent pixels or more
        image_size = source.choose_image_size(args.image_size or stopped_setting(args.output, "image_size"), multiple)
        space, encoding = open_autoencoder(args.vae or "ema", args.vae_precision, image_size, device)
        encoder, features = open_encoder(args.features, encoding["latent_size"], args.patch_size)
        data_path = os.path.abspath(args.data_path) if os.path.exists(args.data_path) else args.data_path
        num_classes = source.resolve_classes(args.num_classes, args.skip_bad_images)
        settings = {"data_path": data_path} | {key: getattr(args, key) for key in ("split", "image_key", "label_key")}
        settings |= {"names_and_labels": source.fingerprint(), "num_examples": source.num_examples}
        settings |= {"num_classes": num_classes, "mirrors": source.mirrors, **encoding, **features}
        dtype = args.dtype or stopped_setting(args.output, "dtype") or DTYPES[0]
        settings |= {"batch_size": args.batch_size, "shard_size": args.shard_size, "dtype": dtype}
        settings |= {key: True for key in ("keep_images", "channel_statistics") if getattr(args, key)}
        writer = ShardWriter(args.output, settings, source.class_names)
        distributed.on_rank_zero(writer.prepare)

    for line in [*source.notes, *(f"left out {line}" for line in source.left_out)] if rank == 0 else ():
        print(line, flush=True)

    # Encode the shards that are missing, each rank its own.
    mine = distributed.on_rank_zero(writer.missing)[rank :: distributed.world_size()]
    ranges = [indices for k in mine for indices in writer.batches(k)]
    keys = ([(index, False) for index in indices] for indices in ranges)
    batches = make_loader(ImageDataset(source, image_size, 3, num_classes), keys, args.num_workers, device)
    start, total, skipped = time.perf_counter(), sum(map(len, ranges)), 0
    with tqdm(total=total, unit=" images", disable=True if rank else None) as bar, user_errors(parser):
        for k in mine:
            encoded, left_out = [], []
            for batch in itertools.islice(batches, len(writer.batches(k))):
                left_out += check_problems(batch["problems"], args.skip_bad_images)
                encoded.append(encode(space, batch, getattr(torch, dtype), args.keep_images, encoder))
                bar.update(len(batch["y"]))
            for line in left_out:
                tqdm.write(f"left out {line}")
            writer.write(k, {key: torch.cat([part[key] for part in encoded]) for key in encoded[0]}, left_out)
            skipped += len(left_out)
    seconds = time.perf_counter() - start
    print(f"rank {rank}: {total} images in {seconds:.1f} s, {total / seconds:.1f} images/s, {skipped} left out")

    # Write the manifest.
    distributed.barrier()
    if rank == 0:
        with user_errors(parser):
            print(*writer.finish(), args.output, sep="\n")
    distributed.shutdown()


def open_autoencoder(vae, precision, image_size, device):
    """Return the latent space, and what the settings say of it. Raise ValueError if the image size does not divide."""
    if vae == "none":
        raise ValueError("--vae none encodes nothing; give the autoencoder whose latents to cache")
    downsampling, channels = geometry(vae, None)
    if any(side % downsampling for side in pair(image_size)):
        problem = f"--image-size {size_name(image_size)} does not divide"
        raise ValueError(f"{problem}: it must be a multiple of {downsampling}")
    space = LatentSpace(vae, device, PRECISIONS[precision])
    name = os.path.realpath(vae) if os.path.isdir(vae) else vae
    encoding = {"vae": name, "vae_precision": precision, "scale": space.scale, "shift": space.shift}
    sizes = dict(channels=channels, image_size=image_size, latent_size=scaled(image_size, down=downsampling))
    return space, encoding | sizes


def open_encoder(encoder, latent_size, patch_size):
    """Return the encoder of --features, and what the settings say of it; None and {} without one. Raise ValueError."""
    if encoder is None:
        return None, {}
    if any(side % patch_size for side in pair(latent_size)):
        raise ValueError(f"--patch-size {patch_size} does not divide the latents, which are {size_name(latent_size)}")
    encoder = PatchEncoder(encoder, [side // patch_size for side in pair(latent_size)])
    known = {"encoder": encoder.name, "sha256": encoder.load(), "grid": list(encoder.grid), "width": encoder.width}
    return encoder, {"features": known}


def encode(space, batch, dtype, keep_images, encoder=None):
    """Return a batch's good examples as a part of a shard: "labels" is (N,) int64, "images" uint8 (N, 3, H, W).

    "moments" is (N, 2, 2, C, h, w): of the image and of its mirror image, mean and standard deviation. "features" is
    float16 (N, 2, T, width), of both, too. Raise ValueError if a moment or a feature is not finite so."""
    good = torch.tensor([not lines for lines in batch["problems"]])
    images = batch["images"].to(space.device)
    moments = torch.stack([space.moments(images), space.moments(images.flip(-1))], dim=1).cpu()
    part = {"moments": moments[good].to(dtype), "labels": batch["y"][good]}
    if not part["moments"].isfinite().all():
        raise ValueError("latents are not finite, or too large for --dtype float16")
    if encoder is not None:
        part["features"] = torch.stack([encoder(images), encoder(images.flip(-1))], dim=1).cpu()[good].half()
        if not part["features"].isfinite().all():
            raise ValueError(f"features of {encoder.name} are not finite in float16")
    if keep_images:
        part["images"] = to_uint8(batch["images"][good]).permute(0, 3, 1, 2).contiguous()
    return part


if __name__ == "__main__":
    main()
