"""Bits per dimension of a data set under a checkpoint, by the probability-flow ODE.

    python likelihood.py --ckpt runs/digits --data-path digits --num-examples 500

In pixel space, each of the 256 grey levels gets uniform noise of its width (dequantization), and the density is taken
on the scale [0, 255], so that it bounds the bits of a lossless code. In a latent space, these are bits per dimension of
the latents as the network takes them, which are comparable within one VAE, and one scale and shift, only."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, while packages load, too, ends without a traceback

import math

import numpy as np
from tqdm import tqdm

from data.images import ImageDataset, check_problems
from data.labelled import match_classes
from data.loader import make_loader
from data.sources import DATA_FLAGS, Source, add_data_flags, flag_rules, open_source
from sampling.draw import LABEL_STREAM, ImageNoise
from sampling.flags import WEIGHTS_FLAGS, add_transport_flags, add_weights_flags, without_effect
from sampling.pipeline import load_pipeline
from transport import ODE_METHODS, Sampler
from utils import distributed, files
from utils.command_line import Parser, flag_group, given, integer, number, one_of, path, user_errors
from utils.precision import resolve_precision
from utils.sizes import pair


def build_parser():
    parser, positive = Parser("Bits per dimension of a data set under a SiT."), number(0, exclude_minimum=True)
    add_weights_flags(parser, with_space=False)
    add_transport_flags(parser, from_checkpoint=True)
    add_data_flags(parser, with_loader=False)
    add = flag_group(parser, "likelihood")
    add("--num-examples", integer(2), "N", "examples, drawn by the seed (default: all)")
    add("--batch-size", integer(1), "N", "examples at a time, per rank", default=64)
    add("--probes", integer(1), "N", "random directions per example that estimate the divergence", default=1)
    add("--sampling-method", one_of(*ODE_METHODS), "METHOD", f"one of {', '.join(ODE_METHODS)}", default="dopri5")
    add("--num-sampling-steps", integer(2), "N", "time points of fixed-step methods", default=50)
    add("--atol", positive, "TOL", "absolute tolerance of adaptive methods", default=1e-6)
    add("--rtol", positive, "TOL", "relative tolerance of adaptive methods", default=1e-3)
    add("--seed", integer(0), "SEED", "decides examples, noise and probes", default=0)
    add("--json", path, "FILE.json", "write metrics and settings to this file")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    with user_errors(parser):
        # Check the flags, load weights and data.
        device, rank = distributed.init(), distributed.rank()
        resolve_precision("fp32", device, on_gpu="fp32")
        if args.streaming:
            raise ValueError("--streaming does not go with likelihoods, which draw examples by their number")
        source = open_source(**given(args, DATA_FLAGS))
        if args.json is not None:
            distributed.on_rank_zero(files.check_output, "--json", args.json)
        pipeline = load_pipeline(args.ckpt, device, vae_precision=args.vae_precision, **given(args, WEIGHTS_FLAGS))
        dataset = open_examples(source, pipeline, f"--data-path {args.data_path}")
        solver = dict(sampling_method=args.sampling_method, num_steps=args.num_sampling_steps, num_probes=args.probes)
        solver |= dict(atol=args.atol, rtol=args.rtol)
        no_encoding = pipeline.space.in_pixels or not isinstance(source, Source)
        rules = flag_rules(args.data_path, args.data_format)
        source.notes += without_effect(parser.changed, "ODE", solver, in_pixels=no_encoding, more=rules)
        for line in source.notes if rank == 0 else ():
            print(line, flush=True)
        least = args.num_examples or 2  # a standard error needs two
        if len(dataset) < least:
            raise ValueError(f"--data-path {args.data_path}: there are {len(dataset)} examples, fewer than {least}")
        order = np.random.default_rng([args.seed, LABEL_STREAM]).permutation(len(dataset))[: args.num_examples]

        # Each rank takes its share of the examples.
        mine = order[rank :: distributed.world_size()].tolist()
        batches = [mine[start : start + args.batch_size] for start in range(0, len(mine), args.batch_size)]
        loader = make_loader(dataset, [[(i, False) for i in indices] for indices in batches], 0, device)
        loader = tqdm(loader, total=len(batches), unit=" batches", disable=True if rank else None)
        bits = []
        for indices, batch in zip(batches, loader, strict=True):
            check_problems(batch["problems"], args.skip_bad_images)
            bits += bits_of_examples(batch, indices, pipeline, solver, args.seed)

    # Report the mean over all ranks.
    bits = np.concatenate(distributed.gather(bits))
    if rank == 0:
        mean, error, left_out = bits.mean(), bits.std(ddof=1) / math.sqrt(len(bits)), len(order) - len(bits)
        name = "bits_per_dim" if pipeline.space.in_pixels else "bits_per_latent_dimension"
        print(f"{name} {mean:.4f} ± {error:.4f} (standard error, {len(bits)} examples, {left_out} left out)")
        if args.json is not None:
            metrics = {name: mean, "standard_error": error, "n_examples": len(bits), "left_out": left_out}
            settings = {key: str(value) for key, value in vars(args).items() if value is not None}
            with user_errors(parser), files.named(f"--json {args.json}"):
                files.write_json(args.json, metrics | {"settings": settings})
    distributed.shutdown()


def open_examples(source, pipeline, name):
    """Return the data set of a source. Raise ValueError if it does not fit the model."""
    model, space = pipeline.model, pipeline.space
    match_classes(source, pipeline.class_names, model.num_classes, name)
    if (source.num_classes or 0) > model.num_classes:
        raise ValueError(f"{name} has {source.num_classes} classes, the model {model.num_classes}")
    if isinstance(source, Source):
        return ImageDataset(source, pipeline.image_shape[:2], pipeline.image_shape[2], model.num_classes)
    if space.in_pixels or (source.channels, *pair(source.latent_size)) != pipeline.latent_shape:
        raise ValueError(f"{name}: latents of another shape than the model's")
    if (source.scale, source.shift) != (space.scale, space.shift):
        source.notes.append(f"{name}: scale and shift of the latents are not those of the training, which are taken")
    return source


def bits_of_examples(batch, indices, pipeline, solver, seed):
    """Return the bits per dimension of the good examples of a batch; `indices` (N,) and `seed` decide noise and probes.

    `solver` is keyword arguments of `Sampler.sample_ode_likelihood`. Raise ValueError if a likelihood is not finite."""
    good = [row for row, problems in enumerate(batch["problems"]) if not problems]
    if not good:
        return []
    batch = {key: values[good].to(pipeline.device) for key, values in batch.items() if key != "problems"}
    noise = ImageNoise(seed, [indices[row] for row in good], pipeline.device)
    space, shape = pipeline.space, pipeline.latent_shape
    if space.in_pixels:  # dequantized: each of 256 levels in [-1, 1] is spread over its width
        x = batch["images"] + (noise.draw(shape, "random") - 0.5) / 127.5
    else:
        x = space.sample(batch["moments"] if "moments" in batch else space.moments(batch["images"]), noise.draw(shape))
    solver = solver | {"probe_like": lambda x: noise.randn_like(x).sign()}
    logp, _ = Sampler(pipeline.transport).sample_ode_likelihood(**solver)(x, pipeline.model, y=batch["y"])
    if not logp.isfinite().all():
        raise ValueError("the likelihood is not finite: the weights are damaged, or the steps too large")
    nats = -logp.double() / x[0].numel() + math.log(127.5 if space.in_pixels else 1.0)  # of levels that are 1 apart
    return (nats / math.log(2)).tolist()


if __name__ == "__main__":
    main()
