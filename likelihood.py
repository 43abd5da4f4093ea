"""Bits per dimension of a data set under a checkpoint, by the probability-flow ODE.

    python likelihood.py --ckpt runs/digits --data-path digits --num-examples 500

In pixel space, each of the 256 grey levels gets uniform noise of its width (dequantization), and the density is taken
on the scale [0, 255], so that it bounds the bits of a lossless code. In a latent space, these are bits per latent
dimension, which are comparable within one VAE only.
"""

import math
import pathlib

import numpy as np
from torch.utils.data import default_collate
from tqdm import tqdm

from data.cached import CachedLatents
from data.flags import DATA_FLAGS, add_data_flags
from data.images import ImageDataset
from data.sources import open_source
from sampling import flags
from sampling.draw import LABEL_STREAM, ImageNoise
from sampling.pipeline import load_pipeline
from transport import ODE_METHODS, Sampler
from utils import command_line, distributed, files
from utils.precision import resolve_precision
from vae import LatentSpace


def build_parser():
    parser = command_line.Parser("Bits per dimension of a data set under a SiT.")
    flags.add_weights_flags(parser, with_space=False)
    flags.add_transport_flags(parser, from_checkpoint=True)
    add_data_flags(parser, with_loader=False)
    integer, positive = command_line.integer, command_line.number(0, exclude_minimum=True)
    add = command_line.flag_group(parser, "likelihood")
    add("--num-examples", integer(2), "N", "examples, drawn by the seed (default: all)")
    add("--batch-size", integer(1), "N", "examples at a time, per rank", default=64)
    add("--probes", integer(1), "N", "random directions per example that estimate the divergence", default=1)
    add("--sampling-method", command_line.one_of(*ODE_METHODS), "METHOD", "one of torchdiffeq's", default="dopri5")
    add("--num-sampling-steps", integer(2), "N", "time points of fixed-step methods", default=50)
    add("--atol", positive, "TOL", "absolute tolerance of adaptive methods", default=1e-6)
    add("--rtol", positive, "TOL", "relative tolerance of adaptive methods", default=1e-3)
    add("--seed", integer(0), "SEED", "decides examples, noise and probes", default=0)
    add("--json", pathlib.Path, "FILE.json", "write metrics and settings to this file")
    return parser


def main():
    # Check the flags, load weights and data.
    parser = build_parser()
    args = parser.parse_args()
    with command_line.user_errors(parser):
        device = distributed.init()
        resolve_precision("fp32", device, on_gpu="fp32")
        if args.streaming:
            raise ValueError("--streaming does not go with likelihoods, which draw examples by their number")
        source = open_source(**command_line.given(args, DATA_FLAGS))
        if args.json is not None:
            files.check_output("--json", args.json)
        given = command_line.given(args, flags.WEIGHTS_FLAGS)
        pipeline = load_pipeline(args.ckpt, device, vae_precision=args.vae_precision, **given)
        dataset = open_examples(source, pipeline, f"--data-path {args.data_path}")
        if args.num_examples is not None and args.num_examples > len(dataset):
            raise ValueError(f"--num-examples {args.num_examples}: there are {len(dataset)}")
        if len(dataset) < 2:
            raise ValueError(f"--data-path {args.data_path} has one example, and a standard error needs two")
    indices = np.random.default_rng([args.seed, LABEL_STREAM]).permutation(len(dataset))[: args.num_examples]
    solver = dict(sampling_method=args.sampling_method, num_steps=args.num_sampling_steps, num_probes=args.probes)
    solver |= dict(atol=args.atol, rtol=args.rtol)

    # Each rank takes its share of the examples.
    mine = indices[distributed.rank() :: distributed.world_size()].tolist()
    bits, left_out = [], 0
    with tqdm(total=len(mine), unit=" examples", disable=True if distributed.rank() else None) as bar:
        for start in range(0, len(mine), args.batch_size):
            batch = mine[start : start + args.batch_size]
            with command_line.user_errors(parser):
                examples = read_examples(dataset, batch, args.skip_bad_images)
                bits += bits_of_examples(examples, pipeline, solver, args.seed) if examples else []
            left_out += len(batch) - len(examples)
            bar.update(len(batch))

    # Report the mean over all ranks.
    bits, left_out = np.concatenate(distributed.gather(bits)), sum(distributed.gather(left_out))
    if distributed.rank() == 0:
        mean, error = float(np.mean(bits)), float(np.std(bits, ddof=1) / math.sqrt(len(bits)))
        name = "bits_per_dim" if pipeline.space.in_pixels else "bits_per_latent_dimension"
        print(f"{name} {mean:.4f} ± {error:.4f} (standard error, {len(bits)} examples, {left_out} left out)")
        if args.json is not None:
            metrics = {name: mean, "standard_error": error, "n_examples": len(bits), "left_out": left_out}
            settings = {key: str(value) for key, value in vars(args).items() if value is not None}
            files.write_json(args.json, metrics | {"settings": settings})
    distributed.shutdown()


def open_examples(source, pipeline, name):
    """Return the data set of a source that `name` names, and set the pipeline's space to that of cached latents.

    Raises ValueError if the source has more classes than the model, or latents of another shape.
    """
    model, space = pipeline.model, pipeline.space
    if (source.num_classes or 0) > model.num_classes:
        raise ValueError(f"{name} has {source.num_classes} classes, the model {model.num_classes}")
    if not isinstance(source, CachedLatents):
        channels = model.in_channels if space.in_pixels else 3
        return ImageDataset(source, model.input_size * space.downsampling, channels, model.num_classes)
    if (source.channels, source.latent_size) != (model.in_channels, model.input_size):
        raise ValueError(f"{name}: latents of another shape than the model's")
    pipeline.space = LatentSpace(source.vae, pipeline.device, scale=source.scale, shift=source.shift)
    return source


def read_examples(dataset, indices, skip_bad):
    """Return {index: item} of the readable examples. Raise ValueError if one is not, unless `skip_bad`."""
    items = {index: dataset[index, False] for index in indices}
    problems = [line for item in items.values() for line in item["problems"]]
    if problems and not skip_bad:
        raise ValueError(f"{problems[0]} (--skip-bad-images leaves such examples out)")
    return {index: item for index, item in items.items() if not item["problems"]}


def bits_of_examples(examples, pipeline, solver, seed):
    """Return the bits per dimension of {index: item}. Noise and probes depend on (seed, index) alone.

    `solver` is keyword arguments of `Sampler.sample_ode_likelihood`. Raises ValueError if a likelihood is not finite.
    """
    space, device, shape = pipeline.space, pipeline.device, pipeline.latent_shape
    batch, noise = default_collate(list(examples.values())), ImageNoise(seed, list(examples), device)
    if "moments" in batch:
        x = space.sample(batch["moments"].to(device), noise.draw(shape))
    elif space.in_pixels:
        x = dequantize(batch["images"].to(device), noise.uniform(shape))
    else:
        x = space.encode(batch["images"].to(device), noise.draw(shape))
    solver = solver | {"probe_like": lambda x: noise.randn_like(x).sign()}
    logp, _ = Sampler(pipeline.transport).sample_ode_likelihood(**solver)(x, pipeline.model, y=batch["y"].to(device))
    if not logp.isfinite().all():
        raise ValueError("the likelihood is not finite: the weights are damaged, or the steps too large")
    return bits_per_dimension(logp, x[0].numel(), 127.5 if space.in_pixels else 1.0).tolist()


def dequantize(images, uniform):
    """Return images of 256 grey levels in [-1, 1] with each level spread over its width by numbers in [0, 1)."""
    return images + (uniform - 0.5) / 127.5


def bits_per_dimension(logp, dimensions, scale):
    """Return the bits per dimension (N,) of log densities (N,) in nats of x, for the variable scale * x."""
    return (-logp.double() / dimensions + math.log(scale)) / math.log(2)


if __name__ == "__main__":
    main()
