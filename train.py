"""Train a SiT.

python train.py --config configs/digits.yaml
torchrun --nproc_per_node=8 train.py --model SiT-XL/2 --data-path /data/imagenet/train"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, while packages load, too, ends without a traceback

import argparse
import dataclasses
import math
import pathlib
import platform
import sys

import torch
from tqdm import tqdm

from data.images import small_images
from data.loader import GlobalBatchSampler
from data.sources import DATA_FLAGS, Source, add_data_flags
from evaluation.images import ImageBatches
from evaluation.metrics import MOST_PIXELS, MOST_REFERENCES, Monitor
from models import BLOCKS, CHOICES, SiT_models
from sampling.draw import NotFinite, SampleSettings, draw_labels, generate
from sampling.flags import ODE_DEFAULTS, SDE_DEFAULTS, add_transport_flags
from sampling.guidance import resolve_cfg_scale
from sampling.pipeline import Pipeline, default_labels
from training import log, losses, resume, setup
from training.recipe import add_recipe_flags, read_recipe
from training.step import EMA, Trainer, batches_on_device, check_emas, draw_randomness, learning_rate
from transport import ODE_METHODS, SDE_METHODS, create_transport, logit_normal
from utils import checkpoint, command_line, distributed
from utils.command_line import Parser, flag_group, given, integer, location, number, one_of, path, plain, size
from utils.precision import DTYPES, resolve_precision
from utils.sizes import pair
from utils.weights import TRANSPORT_KEYS

# That may draw samples during training. Their steps are fixed: with FSDP all ranks must make as many evaluations.
SOLVERS = [name for name, (_, nfe_per_step) in (ODE_METHODS | SDE_METHODS).items() if nfe_per_step is not None]
VERSIONS = {"python": platform.python_version(), "torch": torch.__version__}
YES_OR_NO = argparse.BooleanOptionalAction


def build_parser():
    parser = Parser("Train a SiT on one CPU or GPU, or with torchrun on many.", with_config=True)
    add = add_data_flags(parser)
    add("--horizontal-flip", None, None, "mirror images at random (default: yes, but not digits)", action=YES_OR_NO)
    add_model_flags(parser)
    add_transport_flags(parser, from_checkpoint=False)
    add_optimisation_flags(parser)
    add_recipe_flags(parser)
    add_hardware_flags(parser)
    add_run_flags(parser)
    return parser


def add_model_flags(parser):
    """Add the model's flags. One that is named after an argument of SiT is passed to it and stored with checkpoints."""
    add = flag_group(parser, "model", "--model names a size; the other flags change it, one by one.")
    add("--model", one_of(*SiT_models), "NAME", f"one of {', '.join(SiT_models)}", default="SiT-XL/2")
    add("--input-size", size, "N|HxW", "height and width of the latent, in place of --image-size")
    positions = "scale positions to those of this --input-size: of --init-from, to fine-tune at another (default: no)"
    add("--trained-size", size, "N|HxW", positions)
    add("--patch-size", integer(1), "N", "side of a patch (default: the model's)")
    add("--in-channels", integer(1), "N", "channels of the latent, checked against the VAE's (default: the VAE's)")
    add("--hidden-size", integer(1), "N", "width of the transformer (default: the model's)")
    add("--depth", integer(1), "N", "number of blocks (default: the model's)")
    add("--num-heads", integer(1), "N", "attention heads (default: the model's)")
    add("--mlp-ratio", number(0, exclude_minimum=True), "R", "width of the MLPs / hidden size", default=4.0)
    add("--block", one_of(*BLOCKS), "|".join(BLOCKS), "modern: the next four on; each also alone", default="plain")
    add("--qk-norm", None, None, "normalise queries and keys (RMSNorm)", action=YES_OR_NO)
    add("--norm", one_of(*CHOICES["norm"]), "layer|rms", "norm of tokens (default: layer)")
    add("--mlp", one_of(*CHOICES["mlp"]), "gelu|swiglu", "MLPs; swiglu: of as many weights (default: gelu)")
    add("--position", one_of(*CHOICES["position"]), "sincos|rope", "rope: rotate queries, too (default: sincos)")
    add("--class-dropout-prob", number(0, 1), "P", "share of labels replaced by the null class", default=0.1)
    add("--num-classes", integer(1), "N", "number of classes (default: the data's)")
    add("--inner-head", integer(1), "K", "blocks before a second head, to guide samples by (default: no such head)")
    add("--learn-sigma", None, None, "add as many unused output channels, as released", default=True, action=YES_OR_NO)


def add_optimisation_flags(parser):
    add, positive = flag_group(parser, "optimisation"), number(0, exclude_minimum=True)
    add("--epochs", integer(1), "N", "passes over the data", default=1400)
    add("--max-steps", integer(1), "N", "optimizer steps, in place of --epochs")
    add("--global-batch-size", integer(1), "N", "images per step, over all ranks", default=256)
    add("--micro-batch-size", integer(1), "N", "images per rank at a time (default: global batch / ranks)")
    add("--lr", positive, "LR", "peak learning rate", default=1e-4)
    add("--lr-schedule", one_of("constant", "cosine"), "constant|cosine", "cosine: to 0", default="constant")
    add("--warmup-steps", integer(0), "N", "steps of linear learning rate warm-up", default=0)
    add("--betas", number(0, 1), "B", "AdamW's betas (default: 0.9 0.999)", nargs=2)
    add("--weight-decay", number(0), "W", "weight decay, decoupled from the gradient", default=0.0)
    add("--max-grad-norm", positive, "NORM", "clip the gradient to this 2-norm (default: no clipping)")
    add("--ema-decay", number(0, 1), "D", "decay of the EMA per step", default=0.9999)
    warmup = "use a smaller decay at first, (1 + n) / (10 + n) at step n"
    add("--ema-warmup", None, None, warmup, default=True, action=YES_OR_NO)
    times = "uniform", "logit-normal"
    add("--time-sampling", one_of(*times), "|".join(times), "distribution of training times", default="uniform")
    add("--logit-normal-mean", number(), "M", "above 0: closer to the data", default=0.0)
    add("--logit-normal-std", positive, "S", "smaller: more concentrated", default=1.0)
    add("--global-seed", integer(0), "SEED", "seed of everything random, for any number of ranks", default=0)
    add(
        "--max-bad-steps", integer(1), "N", "stop after so many non-finite steps in a row; each is left out", default=10
    )


def add_hardware_flags(parser):
    add = flag_group(parser, "hardware")
    add("--parallel", one_of("auto", "ddp", "fsdp"), "auto|ddp|fsdp", "auto: ddp if that fits", default="auto")
    add("--fsdp-shard-size", integer(1), "N", "ranks that share one model, such as a node's (default: all)")
    kinds = "of the model's products; weights, optimizer, EMA and loss are fp32 (default: bf16 on a GPU, else fp32)"
    add("--precision", one_of(*DTYPES), "|".join(DTYPES), kinds)
    add("--grad-checkpoint", None, None, "recompute activations inside blocks: less memory, a third more work")
    add("--compile", None, None, "compile the model: slower to start, faster steps")


def add_run_flags(parser):
    add = flag_group(parser, "run")
    add("--output-dir", path, "DIR", "the run's folder (default: a new, numbered one in --results-dir)")
    add("--results-dir", path, "DIR", "folder of numbered run folders", default=pathlib.Path("results"))
    where = "auto: from the newest checkpoint in --output-dir, if there is one; or a run folder or checkpoint folder"
    add("--resume", location, "auto|never|PATH", where, default="auto")
    add("--init-from", location, "PATH|NAME|URL", "start a new run from weights, named as in sample.py", alias="--ckpt")
    add("--log-every", integer(1), "STEPS", "steps between lines of the log", default=100)
    add("--ckpt-every", integer(1), "STEPS", "steps between checkpoints; the end makes one too", default=50_000)
    add("--keep-checkpoints", integer(1), "N", "keep this many of the newest checkpoints (default: all)")
    add("--keep-every", integer(1), "STEPS", "keep checkpoints at multiples of this step, too")
    add("--sample-every", integer(0), "STEPS", "steps between grids of EMA samples; 0: none", default=10_000)
    add("--cfg-scale", number(), "S", "guidance scale of those grids (default: 4, or 1 without a null class)")
    add("--eval-every", integer(0), "STEPS", "steps between FIDs of EMA samples without guidance; 0: none", default=0)
    add("--eval-samples", integer(2), "N", "samples for it, over all ranks", default=5000)
    solvers = f"solver of grids and FIDs: {', '.join(SOLVERS)}"
    add("--eval-sampling-method", one_of(*SOLVERS), "METHOD", solvers, default="heun2")
    add("--eval-num-sampling-steps", integer(2), "N", "its time points, both ends included", default=26)
    add("--eval-reference", path, "PATH", "as for evaluate.py (default: the training images, if they are small)")
    add("--inception-weights", path, "FILE.pth", "see evaluate.py (default: download them once)")
    add("--tensorboard", None, None, "log to TensorBoard, too, in the run's folder")
    add("--wandb", None, None, "log to Weights & Biases, too: WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE are read")
    add("--dry-run", None, None, "print flags, sizes and an estimate of the memory, and exit")


def main(loss_builders=(), extra_emas=()):
    """Train as the command line says.

    `loss_builders` are functions of the model that return an `AuxiliaryLoss`; `extra_emas` are `EMA`s."""
    # Check the flags against each other, the data and the machine, before anything is written.
    parser = build_parser()
    args = parser.parse_args()
    flags = plain(args)
    with command_line.user_errors(parser):
        device = distributed.init()
        rank, world_size = distributed.rank(), distributed.world_size()
        resume.check_restarts(args.output_dir, args.resume)
        accumulation, micro_batch_size = setup.split_batch(args.global_batch_size, args.micro_batch_size, world_size)
        precision = resolve_precision(args.precision, device, on_gpu="bf16")
        source = setup.open_data(given(args, DATA_FLAGS), args.num_classes, args.dry_run)
        where = ("never", None) if args.dry_run else (args.resume, args.output_dir)
        start = distributed.on_rank_zero(resume.find_start, *where)
        parts = (given(args, names) for names in (setup.model_options(), setup.SIZE_FLAGS, TRANSPORT_KEYS))
        config = setup.resolve_config(source, args.model, *parts, args.vae, args.skip_bad_images, start.state)
        mirror = setup.resolve_flips(source, args.horizontal_flip)
        source.notes += setup.flags_without_effect(parser.changed, flags, config, source, MOST_PIXELS)
        transport = create_transport(**config["transport"])
        model = setup.build_model(config)
        recipe = read_recipe(flags, model, transport, source)
        auxiliary = losses.build_losses([*recipe.loss_builders, *loss_builders], model, args.global_seed)
        emas = check_emas([EMA("ema", args.ema_decay, args.ema_warmup), *recipe.emas, *extra_emas], start.folder)
        parallel, mesh = setup.resolve_parallel(args.parallel, args.fsdp_shard_size, model, device, len(emas))
        settings = draw_settings(flags, transport, model)
        length = args.max_steps, args.epochs, args.global_batch_size, source
        text = f"steps of {args.global_batch_size} images = micro-batch {micro_batch_size} x {world_size} ranks"
        text = f"{text} x {accumulation} gradient accumulation steps; {parallel}, {precision} on {device.type}"
        if args.dry_run:
            lines = [*source.notes, f"{setup.last_step(*length, start):,} {text}"]
            setup.print_plan(flags, config, lines, micro_batch_size, precision, mesh, device, emas, auxiliary, recipe)
            return distributed.shutdown()

        # Load what can fail, and lock the run's folder.
        name = f"{args.model.replace('/', '-')}-{args.path_type}-{args.prediction}-{args.loss_weight}"
        output_dir = resume.choose_folder(args.output_dir, args.resume, start, args.results_dir, name)
        resume.check_model(config, start, args.optimizer)
        weights, notes = setup.initial_weights(config, args.global_seed, args.init_from, start)
        decodes = args.sample_every > 0 or args.eval_every > 0
        space = setup.open_training_space(config, source, device, args.vae_precision, decodes, auxiliary)
        monitor = open_monitor(config, source, args.eval_reference, args.inception_weights, device, args.eval_every)
        open_trackers = log.import_trackers([tracker for tracker in log.TRACKERS if flags[tracker]])
        output_dir, start = resume.claim_folder(output_dir, args.resume, numbered=args.output_dir is None)
        max_steps = setup.last_step(*length, start)
        if start.state is not None and start.step >= max_steps:
            distributed.on_rank_zero(print, f"{start.folder} is of step {start.step} of {max_steps}: it is done")
            return distributed.shutdown()

    # Build the model, its EMAs, its optimizer, the losses beside the main one, and the batches of this rank.
    how = parallel, mesh, recipe.optimizer, recipe.route
    trainer = Trainer(model, transport, device, precision, emas, auxiliary, *how)
    with command_line.user_errors(parser):
        start, more = resume.load(trainer, start, weights, config, args.grad_checkpoint, args.compile)
        max_steps = setup.last_step(*length, start)
        distributed.on_rank_zero(resume.set_aside, start, output_dir)
        trackers = [open_tracker(output_dir, start.step, flags) for open_tracker in open_trackers]
        run_log = log.RunLog(output_dir, start.step, trackers)
    stop = resume.Stop(output_dir)
    ema_pipeline = Pipeline(trainer.ema_modules["ema"], transport, space, device, None, precision=precision)
    state = start.state or {"samples_seen": 0, "window": None} | dict.fromkeys(resume.COUNTS, 0)
    samples_seen = state["samples_seen"]
    order = dict(seed=args.global_seed, rank=rank, world_size=world_size, mirror=mirror, start=samples_seen)
    sampler = GlobalBatchSampler(source.num_examples, args.global_batch_size, micro_batch_size, **order)
    loader = setup.open_loader(config, source, sampler, args.num_workers, device, stop.reasons.append)
    batches = batches_on_device(loader, space, device, trainer.reads_images)
    places = slice(rank * accumulation * micro_batch_size, (rank + 1) * accumulation * micro_batch_size)

    # Train.
    text = f"{max_steps:,} {text}; torch {torch.__version__}"
    changed = resume.changes(flags, source.num_examples, start)
    for line in setup.opening_lines(output_dir, start, notes + more + recipe.notes, config, source, changed, text):
        run_log.line(line)
    writer = checkpoint.Writer(output_dir, args.keep_checkpoints, args.keep_every, run_log.line, args.ema_snapshots)
    finite = resume.FiniteCheck(device, args.max_bad_steps, state["bad_steps"], state["bad_in_a_row"], run_log.line)
    metrics = log.Metrics(device, state["window"])
    meter = log.Meter(config["model"], device, precision, recipe.route, auxiliary)
    left_out = log.LeftOut(state["bad_images"], args.skip_bad_images, [] if start.step else source.left_out)
    bar = dict(initial=start.step, total=max_steps, unit="step", disable=rank or None)
    for step in tqdm(range(start.step, max_steps), **bar):
        # Draw times, label drops and noise for this rank's places in the global batch.
        where = args.global_seed, step, args.global_batch_size, places
        uniform, drop, x0, posterior_noise = draw_randomness(*where, ema_pipeline.latent_shape, device)
        kept = trainer.draw_kept(*where)
        if args.time_sampling == "logit-normal":
            uniform = logit_normal(uniform, args.logit_normal_mean, args.logit_normal_std)
        t, drop = transport.times(uniform), drop < args.class_dropout_prob

        # Forward and backward, micro-batch by micro-batch.
        loss = 0.0
        for i in range(accumulation):
            with meter.timing("waiting"), command_line.user_errors(parser):
                batch = next(batches)
                left_out.add(step + 1, batch["problems"])
            micro = slice(i * micro_batch_size, (i + 1) * micro_batch_size)
            x1 = space.sample(batch["moments"], posterior_noise[micro])
            draws = (draw if draw is None else draw[micro] for draw in (t, x0, drop, kept))
            values, others = trainer.forward_backward(batch, x1, *draws, step, accumulation, i == accumulation - 1)
            metrics.mean("loss", values)
            metrics.mean_by_time("loss_by_time", values, t[micro])
            for name, value in others.items():
                metrics.mean(f"loss_{name}", value)
            loss = loss + values.double().sum()

        # Step the optimizers and the EMAs; a step whose loss or gradient is not finite changes no weight.
        loss = distributed.all_reduce(loss) / args.global_batch_size
        lr = learning_rate(step, max_steps, args.lr, args.warmup_steps, args.lr_schedule)
        gradient_norm, bad = trainer.update(step, loss, lr, args.max_grad_norm)
        metrics.commit(bad)

        # Read, one step late on a GPU, whether it was finite, and whether the run is to stop.
        done, samples_seen = step + 1, samples_seen + args.global_batch_size
        meter.add(args.global_batch_size, step)
        is_last, saves = done == max_steps, done % args.ckpt_every == 0
        if stop.check(at_once=saves or is_last) and stop.lost:
            break
        # The last good checkpoint is kept while steps in a row are not finite.
        saves = (saves and not finite.in_a_row) or is_last or stop.stopping
        logs = done % args.log_every == 0 or is_last
        finite.push(done, torch.stack([loss, gradient_norm.to(loss)]), wait=saves or logs)
        if finite.diverged:
            break

        # Log.
        epoch = None if source.num_examples is None else samples_seen / source.num_examples
        if logs or saves:
            left_out.report(run_log.line)
        if logs:
            metrics.point("gradient_norm", gradient_norm)
            counts = dict(bad_images=left_out.count, bad_steps=finite.bad_steps)
            points = dict(step=done, epoch=epoch, samples_seen=samples_seen, learning_rate=lr)
            run_log.metrics(points | metrics.take() | meter.take() | counts)

        # Save, draw from the EMA, and evaluate it. Their time is not training's.
        with meter.timing("paused"):
            if saves:
                counts = dict(zip(resume.COUNTS, (finite.bad_steps, finite.in_a_row, left_out.count), strict=True))
                progress = dict(step=done, epoch=epoch, samples_seen=samples_seen, seed=args.global_seed)
                state = progress | counts | {"window": metrics.state()} | config | {"args": flags, "versions": VERSIONS}
                writer.save(done, **trainer.checkpointed(), state=state)
            if args.sample_every and done % args.sample_every == 0:
                # With FSDP no rank has the whole model, so all of them draw.
                if rank == 0 or parallel == "fsdp":
                    run_log.grid(*draw_grid(ema_pipeline, settings), done)
                distributed.barrier()
            if args.eval_every and done % args.eval_every == 0:
                run_log.evaluation(done, monitor.metrics(draw_share(ema_pipeline, settings, args.eval_samples)))
        if stop.stopping:
            break

    # End when the last checkpoint is on the disk.
    stop.report(done, run_log.line)
    batches.close()
    failed = stop.lost or not writer.finish()
    run_log.close()
    distributed.shutdown()
    sys.exit(resume.EXIT_DIVERGED if finite.diverged else int(failed) or resume.EXIT_STOPPED * stop.stopping)


def draw_settings(flags, transport, model):
    """Return the `SampleSettings` of grids of samples, by flags {key: value}. Raise ValueError if they do not fit."""
    method = flags["eval_sampling_method"]
    mode, solver = ("ODE", ODE_DEFAULTS) if method in ODE_METHODS else ("SDE", SDE_DEFAULTS)
    solver = solver | {"sampling_method": method, "num_steps": flags["eval_num_sampling_steps"]}
    settings = SampleSettings(mode, solver, resolve_cfg_scale(flags["cfg_scale"], model), seed=flags["global_seed"])
    if flags["sample_every"] or flags["eval_every"]:
        settings.sampler(transport)
    return settings


def draw_grid(pipeline, settings):
    """Return (samples as uint8 (N, H, W, C), columns), from the same noise and classes each time.

    The samples are None if they are not finite."""
    labels = default_labels(pipeline.model.num_classes)
    try:
        images, _ = generate(pipeline, labels * 2, settings, show_progress=False)
    except NotFinite:
        images = None
    return images, len(labels)


def draw_share(pipeline, settings, count):
    """Return this rank's share of `count` samples without guidance as uint8 (N, H, W, C).

    All ranks make as many evaluations of the network. Return None on all ranks if samples of any are not finite."""
    labels = draw_labels(count, pipeline.model.num_classes, settings.seed, balanced=False)
    share = math.ceil(count / distributed.world_size())
    first = distributed.rank() * share
    mine = labels[first : first + share].tolist()
    padded = mine + [0] * (share - len(mine))
    settings = dataclasses.replace(settings, cfg_scale=1.0)
    try:
        images, _ = generate(pipeline, padded, settings, first_index=first, show_progress=False)
    except NotFinite:
        images = None
    return None if distributed.any_rank(images is None) else images[: len(mine)].numpy()


def open_monitor(config, source, reference, weights, device, eval_every):
    """Return the `Monitor` of --eval-every; None without it. Raise ValueError if it has no suitable reference."""
    if not eval_every:
        if reference is not None or weights is not None:
            raise ValueError("--eval-reference and --inception-weights have no effect without --eval-every")
        return None
    image_size, channels = config["latents"]["image_size"], config["latents"]["channels"]
    shape = (*pair(image_size), channels if config["latents"]["vae"] == "none" else 3)
    if reference is not None:
        reference = ImageBatches(reference, may_be_statistics=True)
    elif isinstance(source, Source) and not source.streamed and math.prod(shape) <= MOST_PIXELS:
        reference = small_images(source, image_size, shape[2], config["model"]["num_classes"], MOST_REFERENCES)
    else:
        raise ValueError("--eval-every needs --eval-reference: the training data are no small images")
    return Monitor(reference, shape, weights, device)


if __name__ == "__main__":
    main()
