"""Train a SiT.

python train.py --config configs/digits.yaml
torchrun --nproc_per_node=8 train.py --model SiT-XL/2 --data-path /data/imagenet/train
"""

import argparse
import copy
import itertools
import json
import os
import pathlib
import platform
import re
import sys
import time

import torch
from tqdm import tqdm

import checkpoint
import data
import distributed
import download
import latents
import options
import sampling
from models import SiT, SiT_models
from transport import create_transport


def build_parser():
    parser = options.Parser(description="Train a SiT on one CPU or GPU, or with torchrun on many.")
    options.add_config_flag(parser)

    at_least_one, positive = options.integer(1), options.number(0, exclude_minimum=True)

    add = options.add_data_flags(parser)
    flip = "mirror images at random (default: yes, but not digits)"
    add("--horizontal-flip", None, None, flip, action=argparse.BooleanOptionalAction)

    add = options.flag_group(parser, "model", "--model names a size; the other flags change it, one by one.")
    add("--model", options.one_of(*SiT_models), "NAME", f"one of {', '.join(SiT_models)}", default="SiT-XL/2")
    add("--input-size", at_least_one, "N", "height and width of the latent, in place of --image-size")
    add("--patch-size", at_least_one, "N", "side of a patch (default: the model's)")
    add("--in-channels", at_least_one, "N", "channels of the latent, held against the VAE's (default: the VAE's)")
    add("--hidden-size", at_least_one, "N", "width of the transformer (default: the model's)")
    add("--depth", at_least_one, "N", "number of blocks (default: the model's)")
    add("--num-heads", at_least_one, "N", "attention heads (default: the model's)")
    add("--mlp-ratio", positive, "R", "hidden width of the MLPs / width of the transformer", default=4.0)
    dropout = "share of labels that training replaces by the null class; 0: no guidance"
    add("--class-dropout-prob", options.number(0, 1), "P", dropout, default=0.1)
    add("--num-classes", at_least_one, "N", "number of classes (default: the data's)")
    sigma = "twice the output channels, the second half unused, as in the released models"
    add("--learn-sigma", None, None, sigma, default=True, action=argparse.BooleanOptionalAction)

    options.add_transport_flags(parser, from_checkpoint=False)

    add = options.flag_group(parser, "optimisation")
    add("--epochs", at_least_one, "N", "passes over the data", default=1400)
    add("--max-steps", at_least_one, "N", "optimizer steps, in place of --epochs")
    add("--global-batch-size", at_least_one, "N", "images per step = micro batch x ranks x accumulation", default=256)
    micro = "images per rank at a time, accumulated to the global batch (default: global batch / ranks)"
    add("--micro-batch-size", at_least_one, "N", micro)
    add("--lr", positive, "LR", "AdamW's learning rate, constant", default=1e-4)
    add("--weight-decay", options.number(0), "W", "AdamW's weight decay", default=0.0)
    add("--ema-decay", options.number(0, 1), "D", "decay per step of the weights' moving average", default=0.9999)
    add("--global-seed", options.integer(0), "SEED", "decides all that is random, for any number of ranks", default=0)
    weights = "start from these weights, named as for sample.py, with a new optimizer (default: from scratch)"
    add("--ckpt", str, "PATH|NAME|URL", weights)

    add = options.flag_group(parser, "run")
    add("--output-dir", pathlib.Path, "DIR", "the run's folder (default: a new, numbered one in --results-dir)")
    add("--results-dir", pathlib.Path, "DIR", "where numbered run folders go", default=pathlib.Path("results"))
    add("--log-every", at_least_one, "STEPS", "steps between lines of the log", default=100)
    add("--ckpt-every", at_least_one, "STEPS", "steps between checkpoints; the end makes one too", default=50_000)
    add("--sample-every", options.integer(0), "STEPS", "steps between grids of EMA samples; 0: none", default=10_000)
    cfg = "guidance scale of those grids; 1 is none (default: 4, or 1 with --class-dropout-prob 0)"
    add("--cfg-scale", options.number(), "S", cfg)
    wandb = "log to Weights & Biases too, which reads WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE"
    parser.add_argument("--wandb", action="store_true", help=wandb)
    return parser


def main():
    # Check the flags against each other, the data and the machine, before anything is written.
    parser = build_parser()
    args = parser.parse_args()
    with options.user_errors(parser):
        device = distributed.init()
        accumulation, micro_batch_size = split_batch(
            args.global_batch_size, args.micro_batch_size, distributed.world_size()
        )
        source = options.open_data(args)
        config = resolve_config(args, source)
        transport = create_transport(**config["transport"])
        torch.manual_seed(args.global_seed)
        model = SiT(**config["model"]).to(device)
        if args.ckpt is not None:
            load_initial_weights(model, config["model"], args.ckpt)
        cfg_scale = sampling.resolve_cfg_scale(args.cfg_scale, model)
        space = open_space(args, config, source, device)
        wandb = import_wandb() if args.wandb and distributed.rank() == 0 else None
        output_dir = distributed.from_rank_zero(choose_output_dir(args))

    # Build what trains: the model's average, the optimizer, the batches of this rank.
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    trained = distributed.data_parallel(model, device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=args.weight_decay)
    rank, world_size = distributed.rank(), distributed.world_size()
    sampler = data.GlobalBatchSampler(
        source.num_examples,
        args.global_batch_size,
        micro_batch_size,
        seed=args.global_seed,
        rank=rank,
        world_size=world_size,
        mirror=source.mirrors if args.horizontal_flip is None else args.horizontal_flip,
    )
    batches = data.make_loader(open_dataset(args, config, source, sampler), sampler, args.num_workers, device)
    share = args.global_batch_size // world_size
    places = slice(rank * share, (rank + 1) * share)
    latent_shape = (model.in_channels, model.input_size, model.input_size)
    max_steps = args.max_steps or max(1, args.epochs * source.num_examples // args.global_batch_size)

    # Say what is about to happen.
    if wandb is not None:
        wandb.init(name=output_dir.name, dir=output_dir, config=vars(args))
    log = RunLog(output_dir, wandb)
    log.line(f"run folder {output_dir}")
    log.line(f"{sum(p.numel() for p in model.parameters()):,} parameters; {json.dumps(config['model'])}")
    images = "a stream of images" if source.num_examples is None else f"{source.num_examples:,} images"
    log.line(f"{images} of {model.num_classes} classes as {latent_shape}; {json.dumps(config['transport'])}")
    log.line(
        f"{max_steps:,} steps of {args.global_batch_size} images = micro batch {micro_batch_size} x {world_size} ranks "
        f"x accumulation {accumulation}; on {device.type}, torch {torch.__version__}"
    )

    # Train.
    model.train()
    loss_sum = torch.zeros((), device=device)
    logged_step, since = 0, time.perf_counter()
    waiting, bad_images = 0.0, 0
    for step in tqdm(range(max_steps), unit="step", disable=None if rank == 0 else True):
        # All that is random about this step, for this rank's places in the global batch.
        uniform, drop, x0, posterior_noise = draw_randomness(
            args.global_seed, step, args.global_batch_size, places, latent_shape, device
        )
        t = transport.times(uniform)
        drop = drop < args.class_dropout_prob

        # Forward and backward, micro batch by micro batch.
        for i in range(accumulation):
            waited = time.perf_counter()
            images, labels, problems = next(batches)
            waiting += time.perf_counter() - waited
            for problem in itertools.chain(*problems):
                if not args.skip_bad_images:
                    parser.error(f"{problem} (--skip-bad-images leaves such examples out)")
                bad_images += 1
                log.line(f"(step={step + 1:07d}) left out {problem}")
            micro = slice(i * micro_batch_size, (i + 1) * micro_batch_size)
            x1 = space.encode(images.to(device, non_blocking=True), posterior_noise[micro])
            y = labels.to(device, non_blocking=True)
            with distributed.accumulate(trained, is_last=i == accumulation - 1):
                kwargs = dict(y=y, force_drop_ids=drop[micro])
                losses = transport.training_losses(trained, x1, kwargs, t=t[micro], x0=x0[micro])["loss"]
                loss = losses.mean() / accumulation
                loss.backward()
            loss_sum += loss.detach()

        # Step the optimizer and the moving average.
        gradient_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(ema, model, args.ema_decay)

        # Log.
        done = step + 1
        if done % args.log_every == 0 or done == max_steps:
            mean_loss = distributed.mean(loss_sum).item() / (done - logged_step)
            seconds = time.perf_counter() - since
            log.metrics(
                step=done,
                epoch=epochs(done * args.global_batch_size, source),
                samples_seen=done * args.global_batch_size,
                loss=mean_loss,
                gradient_norm=gradient_norm.item(),
                learning_rate=args.lr,
                images_per_second=(done - logged_step) * args.global_batch_size / seconds,
                data_wait=waiting / seconds,
                bad_images=bad_images,
            )
            loss_sum.zero_()
            logged_step, since, waiting = done, time.perf_counter(), 0.0

        # Draw a grid from the average, and save. Their time is not training's.
        pause = time.perf_counter()
        if args.sample_every and done % args.sample_every == 0:
            if rank == 0:
                path = draw_grid(ema, transport, space, device, cfg_scale, args.global_seed, output_dir, done)
                log.line(f"(step={done:07d}) samples {path}")
            distributed.barrier()
        if done % args.ckpt_every == 0 or done == max_steps:
            state = trainer_state(args, config, done, source)
            path = checkpoint.save(output_dir, done, model, ema, optimizer, state)
            log.line(f"(step={done:07d}) checkpoint {path}")
        since += time.perf_counter() - pause

    log.close()
    distributed.shutdown()


def split_batch(global_batch_size, micro_batch_size, world_size):
    """(accumulation, micro batch size), where global batch = micro batch x ranks x accumulation. Raises ValueError."""
    if global_batch_size % world_size:
        raise ValueError(f"--global-batch-size {global_batch_size} does not divide over {world_size} ranks")
    micro_batch_size = micro_batch_size or global_batch_size // world_size
    if global_batch_size % (micro_batch_size * world_size):
        raise ValueError(
            f"--global-batch-size {global_batch_size} is not micro batch x ranks x accumulation: it is no multiple of "
            f"--micro-batch-size {micro_batch_size} x {world_size} ranks = {micro_batch_size * world_size}"
        )
    return global_batch_size // (micro_batch_size * world_size), micro_batch_size


def load_initial_weights(model, model_config, name):
    """Put the weights that --ckpt names into the model. Raises ValueError where they are not this model's."""
    weights = checkpoint.load_weights(download.resolve(name))
    # The shapes do not tell the number of heads, so weights would load and mean something else.
    heads = weights.config["model"].get("num_heads") if weights.own else model_config["num_heads"]
    if heads != model_config["num_heads"]:
        raise ValueError(f"--ckpt {name} has {heads} attention heads, and the model {model_config['num_heads']}")
    checkpoint.load_into(model, weights.state_dict, name)


def open_space(args, config, source, device):
    """The space to train in; with cached latents, the autoencoder is loaded only if grids are to be drawn."""
    vae, dtype = config["latents"]["vae"], latents.PRECISIONS[args.vae_precision]
    if isinstance(source, data.Source):
        return latents.open_space(vae, config["latents"]["channels"], device, dtype)
    space = latents.CachedSpace(vae, device, dtype, source.scale, source.shift)
    if args.sample_every:
        space.load_decoder()
    return space


def open_dataset(args, config, source, sampler):
    """The data set that the loader reads: images by number or as they come, or cached latents."""
    if not isinstance(source, data.Source):
        return source
    image_size, num_classes = config["latents"]["image_size"], config["model"]["num_classes"]
    channels = source.channels if config["latents"]["vae"] == "none" else 3
    if source.labels is None:
        reader = data.ImageReader(image_size, channels, num_classes)
        return data.StreamedBatches(source, reader, sampler, args.num_workers)
    return data.ImageDataset(source, image_size, channels, num_classes)


def resolve_config(args, source):
    """What defines the network and its data space: 'model', 'transport' and 'latents' as a checkpoint stores them.

    Raises:
        ValueError: sizes that do not divide, or flags that contradict the data or the VAE.
    """
    if isinstance(source, data.Source):
        vae = args.vae or "ema"
        downsampling, channels = latents.geometry(vae, source.channels)
    else:
        vae, downsampling, channels = source.vae, source.image_size // source.latent_size, source.channels
        for flag, given, cached in (("--vae", args.vae, vae), ("--image-size", args.image_size, source.image_size)):
            if given not in (None, cached):
                raise ValueError(f"{flag} {given} contradicts the cached latents, which were made with {cached}")
    model = dict(SiT_models[args.model].keywords)
    for key in ("patch_size", "hidden_size", "depth", "num_heads"):
        if getattr(args, key) is not None:
            model[key] = getattr(args, key)
    if args.input_size is not None and args.image_size not in (None, args.input_size * downsampling):
        raise ValueError(
            f"--image-size {args.image_size} contradicts --input-size {args.input_size}: "
            f"with --vae {vae} the image is {downsampling} times as large"
        )
    image_size = args.image_size or (args.input_size or 0) * downsampling or source.image_size or 256
    multiple = downsampling * model["patch_size"]
    if image_size % multiple:
        raise ValueError(
            f"--image-size {image_size} does not divide: with --vae {vae} (downsampling {downsampling}) and "
            f"patches of {model['patch_size']} it must be a multiple of {multiple}"
        )
    if args.in_channels not in (None, channels):
        raise ValueError(f"--in-channels {args.in_channels} contradicts --vae {vae}, which gives {channels} channels")
    num_classes = args.num_classes or source.num_classes
    if num_classes is None:
        raise ValueError("--num-classes is missing: the stream does not say how many classes it has")
    if source.num_examples is None and args.max_steps is None:
        raise ValueError("--max-steps is missing: the stream does not say how many images it has")
    if not args.skip_bad_images:
        source.check_labels(num_classes)
    model |= dict(
        input_size=image_size // downsampling,
        in_channels=channels,
        mlp_ratio=args.mlp_ratio,
        class_dropout_prob=args.class_dropout_prob,
        num_classes=num_classes,
        learn_sigma=args.learn_sigma,
    )
    transport = {key: getattr(args, key) for key in checkpoint.TRANSPORT_KEYS}
    vae = os.path.abspath(vae) if os.path.isdir(vae) else vae
    return {
        "model": model,
        "transport": transport,
        "latents": {"vae": vae, "image_size": image_size, "channels": channels},
    }


def choose_output_dir(args):
    """Make the run's folder on rank 0. Raises ValueError for a folder that holds another run's checkpoints."""
    if distributed.rank() != 0:
        return None
    output_dir = args.output_dir
    if output_dir is None:
        numbers = [re.match(r"(\d{3,})-", path.name) for path in args.results_dir.glob("*/")]
        number = max((int(match[1]) + 1 for match in numbers if match), default=0)
        name = f"{args.model.replace('/', '-')}-{args.path_type}-{args.prediction}-{args.loss_weight}"
        while (output_dir := args.results_dir / f"{number:03d}-{name}").exists():
            number += 1
    latest = checkpoint.find_latest(output_dir)
    if latest is not None:
        raise ValueError(f"--output-dir {output_dir} holds {latest.name} of an earlier run; give another folder")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"the run's folder {output_dir} cannot be made: {error.strerror}") from error
    return output_dir


def draw_randomness(seed, step, global_batch_size, places, latent_shape, device):
    """Uniform numbers for times and label drops, noise, and posterior noise of this rank's places in the global batch.

    They depend on (seed, step, place) alone: every rank draws them for the whole global batch and keeps its own, which
    costs little and lets a run change its number of ranks.
    """
    g = distributed.generator(device, seed, distributed.STEP_STREAM, step)
    uniform, drop = torch.rand(2, global_batch_size, generator=g, device=device)[:, places]
    x0, posterior_noise = torch.randn(2, global_batch_size, *latent_shape, generator=g, device=device)[:, places]
    return uniform, drop, x0, posterior_noise


@torch.no_grad()
def update_ema(ema, model, decay):
    """Move the average towards the model: ema <- decay ema + (1 - decay) model."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def draw_grid(ema, transport, space, device, cfg_scale, seed, output_dir, step):
    """Write a grid of samples of the moving average, the same noise and classes each time."""
    pipeline = sampling.Pipeline(ema, transport, space, device, guided_channels=None)
    labels = sampling.default_labels(ema.num_classes)
    settings = options.ODE_DEFAULTS | {"num_steps": 50}
    images, _ = sampling.generate(
        pipeline, labels * 2, mode="ODE", settings=settings, cfg_scale=cfg_scale, seed=seed, show_progress=False
    )
    path = output_dir / "samples" / f"{step:07d}.png"
    path.parent.mkdir(exist_ok=True)
    sampling.save_grid(images, path, columns=len(labels))
    return path


def epochs(samples_seen, source):
    """Passes over the data; None for a stream that does not say how long it is."""
    return None if source.num_examples is None else samples_seen / source.num_examples


def trainer_state(args, config, step, source):
    """What trainer_state.json holds."""
    samples_seen = step * args.global_batch_size
    return {
        "step": step,
        "epoch": epochs(samples_seen, source),
        "samples_seen": samples_seen,
        "seed": args.global_seed,
        **config,
        "args": {key: str(value) if isinstance(value, pathlib.Path) else value for key, value in vars(args).items()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def import_wandb():
    """Weights & Biases, which is imported when it is asked for and not before. Raises ValueError if it is not there."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError("--wandb needs the package wandb: pip install wandb") from error
    return wandb


class RunLog:
    """The run's log: lines on stdout and in log.txt, figures in metrics.jsonl as well; silent on all ranks but 0."""

    def __init__(self, output_dir, wandb):
        self.wandb = wandb
        self.active = distributed.rank() == 0
        if self.active:
            self.text = open(output_dir / "log.txt", "a", buffering=1)
            self.figures = open(output_dir / "metrics.jsonl", "a", buffering=1)

    def line(self, text):
        if self.active:
            tqdm.write(text)
            sys.stdout.flush()  # a log that is piped to a file is watched too
            self.text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def metrics(self, **figures):
        self.line(
            f"(step={figures['step']:07d}) loss {figures['loss']:.4f}, gradient norm {figures['gradient_norm']:.3f}, "
            f"{figures['images_per_second']:.1f} images/s, {figures['data_wait']:.0%} of the time waiting for data"
        )
        if self.active:
            self.figures.write(json.dumps(figures) + "\n")
            if self.wandb is not None:
                self.wandb.log(figures, step=figures["step"])

    def close(self):
        if self.active:
            self.text.close()
            self.figures.close()
            if self.wandb is not None:
                self.wandb.finish()


if __name__ == "__main__":
    main()
