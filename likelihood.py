"""Bits per dimension of a data set under a checkpoint, by the probability-flow ODE.

    python likelihood.py --ckpt runs/digits --data-path digits --num-examples 500

In pixel space the figure is of the images' 256 grey levels: each gets uniform noise of its own width (dequantization),
and the density is taken to the scale [0, 255], so that it is a bound on the bits of a lossless code. In a latent space
it is of the latents, which compare with nothing but themselves: bits per latent dimension.
"""

import json
import math
import pathlib

import numpy as np
import torch
from tqdm import tqdm

import compute
import data
import distributed
import files
import latents
import options
import sampling
from transport import ODE_METHODS, Sampler


def build_parser():
    parser = options.Parser(description="Bits per dimension of a data set under a SiT.")
    sampling.add_weights_flags(parser, with_space=False)
    options.add_transport_flags(parser, from_checkpoint=True)
    options.add_data_flags(parser, with_loader=False)
    positive = options.number(0, exclude_minimum=True)
    add = options.flag_group(parser, "likelihood")
    add("--num-examples", options.integer(2), "N", "examples, drawn by the seed (default: all)")
    add("--batch-size", options.integer(1), "N", "examples at a time, per rank", default=64)
    add("--probes", options.integer(1), "N", "random directions per example that estimate the divergence", default=1)
    add("--sampling-method", options.one_of(*ODE_METHODS), "METHOD", "one of torchdiffeq's", default="dopri5")
    add("--num-sampling-steps", options.integer(2), "N", "time points of fixed-step methods", default=50)
    add("--atol", positive, "TOL", "absolute tolerance of adaptive methods", default=1e-6)
    add("--rtol", positive, "TOL", "relative tolerance of adaptive methods", default=1e-3)
    add("--seed", options.integer(0), "SEED", "decides examples, noise and probes", default=0)
    add("--json", pathlib.Path, "FILE.json", "write figures and settings there")
    return parser


def main():
    # Check the flags, load weights and data.
    parser = build_parser()
    args = parser.parse_args()
    with options.user_errors(parser):
        device = distributed.init()
        compute.resolve_precision("fp32", device, on_gpu="fp32")
        if args.streaming:
            raise ValueError("--streaming does not go with likelihoods, which draw examples by their number")
        source = options.open_data(args)
        if args.json is not None:
            files.check_output("--json", args.json)
        pipeline = sampling.load_pipeline(
            args.ckpt, device, vae_precision=args.vae_precision, **sampling.given_flags(args)
        )
        model = pipeline.model
        space, dataset = open_examples(args, source, pipeline)
        sampler = Sampler(pipeline.transport)
        solver = dict(sampling_method=args.sampling_method, num_steps=args.num_sampling_steps, num_probes=args.probes)
        solver |= dict(atol=args.atol, rtol=args.rtol)
        sampler.sample_ode_likelihood(**solver)
        order = np.random.default_rng([args.seed, sampling.LABEL_STREAM]).permutation(len(dataset))
        indices = order[: args.num_examples]
        if args.num_examples is not None and args.num_examples > len(dataset):
            raise ValueError(f"--num-examples {args.num_examples}: there are {len(dataset)}")
        if len(indices) < 2:
            raise ValueError(f"--data-path {args.data_path} has one example, and a standard error needs two")

    # Each rank its share of the examples.
    mine = indices[distributed.rank() :: distributed.world_size()]
    per_example, left_out = [], 0
    shape = (model.in_channels, model.input_size, model.input_size)
    with tqdm(total=len(mine), unit=" examples", disable=True if distributed.rank() else None) as bar:
        for start in range(0, len(mine), args.batch_size):
            rows = mine[start : start + args.batch_size]
            with options.user_errors(parser):
                content, labels, problems = zip(*(dataset[int(i), False] for i in rows), strict=True)
                for lines in problems:
                    if lines and not args.skip_bad_images:
                        raise ValueError(f"{lines[0]} (--skip-bad-images leaves such examples out)")
                good = [i for i, lines in enumerate(problems) if not lines]
                left_out += len(rows) - len(good)
                if not good:
                    continue
                noise = sampling.ImageNoise(args.seed, [int(rows[i]) for i in good], device)
                x = torch.stack([content[i] for i in good]).to(device)
                if space.in_pixels:
                    x, scale = dequantize(x, noise.uniform(shape)), 127.5
                else:
                    x, scale = space.encode(x, noise.draw(shape)), 1.0
                likelihood = sampler.sample_ode_likelihood(**solver, probe_like=rademacher_from(noise))
                logp, _ = likelihood(x, model, y=torch.tensor([labels[i] for i in good], device=device))
                if not logp.isfinite().all():
                    raise ValueError("the likelihood is not finite: the weights are damaged, or the steps too large")
            per_example += bits_per_dimension(logp, x[0].numel(), scale).tolist()
            bar.update(len(rows))

    # Say what it is.
    per_example = [value for share in distributed.from_all(per_example) for value in share]
    left_out = sum(distributed.from_all(left_out))
    if distributed.rank() == 0:
        mean, error = float(np.mean(per_example)), float(np.std(per_example, ddof=1) / math.sqrt(len(per_example)))
        name = "bits_per_dim" if space.in_pixels else "bits_per_latent_dimension"
        print(f"{name} {mean:.4f} ± {error:.4f} (standard error, {len(per_example)} examples, {left_out} left out)")
        if args.json is not None:
            figures = {name: mean, "standard_error": error, "n_examples": len(per_example), "left_out": left_out}
            settings = {key: str(value) for key, value in vars(args).items() if value is not None}
            with files.written_whole(args.json) as partial:
                partial.write_text(json.dumps(figures | {"settings": settings}, indent=2) + "\n")
    distributed.shutdown()


def rademacher_from(noise):
    """A function that draws probes of -1 and 1, those of each example from its stream of a `sampling.ImageNoise`."""
    return lambda x: noise.randn_like(x).sign()


def open_examples(args, source, pipeline):
    """(space, data set of (image or moments, label, problems)) that fit the model. Raises ValueError."""
    model, space = pipeline.model, pipeline.space
    if source.num_classes > model.num_classes:
        raise ValueError(
            f"--data-path {args.data_path} has {source.num_classes} classes, the model {model.num_classes}"
        )
    if isinstance(source, data.CachedLatents):
        if (source.channels, source.latent_size) != (model.in_channels, model.input_size):
            raise ValueError(f"--data-path {args.data_path}: latents of another shape than the model's")
        return latents.CachedSpace(source.vae, pipeline.device, torch.float32, source.scale, source.shift), source
    image_size = model.input_size * space.downsampling
    channels = model.in_channels if space.in_pixels else 3
    return space, data.ImageDataset(source, image_size, channels, model.num_classes)


def dequantize(images, uniform):
    """Images in [-1, 1] of 256 grey levels, each level spread over its width by numbers in [0, 1)."""
    return images + (uniform - 0.5) / 127.5


def bits_per_dimension(logp, dimensions, scale):
    """Bits per dimension (N,) of log densities (N,) in nats, of x taken to the scale `scale` x."""
    return (-logp.double() / dimensions + math.log(scale)) / math.log(2)


if __name__ == "__main__":
    main()
