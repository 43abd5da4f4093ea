"""Train a SiT.

python train.py --config configs/digits.yaml
torchrun --nproc_per_node=8 train.py --model SiT-XL/2 --data-path /data/imagenet/train
"""

import argparse
import itertools
import json
import math
import pathlib
import platform
import sys

import torch
from tqdm import tqdm

import checkpoint
import compute
import costs
import data
import distributed
import evaluate
import logs
import options
import plan
import runs
import sampling
import training
from images import ImageBatches
from models import SiT, SiT_models
from transport import create_transport, logit_normal

# How samples are drawn during training: in fixed steps, as with FSDP all ranks must make as many network calls.
SAMPLED_HOW = dict(
    mode="ODE",
    settings=options.ODE_DEFAULTS | {"sampling_method": "heun2", "num_steps": 26},
    show_progress=False,
)
COUNTS = ("bad_steps", "bad_in_a_row", "bad_images")  # of a run, that its checkpoints hold


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
    add("--lr", positive, "LR", "AdamW's learning rate, at its highest", default=1e-4)
    add("--lr-schedule", options.one_of("constant", "cosine"), "constant|cosine", "cosine: to 0", default="constant")
    add("--warmup-steps", options.integer(0), "N", "steps in which the learning rate rises", default=0)
    betas = "AdamW's averaging of gradients and of their squares (default: 0.9 0.999)"
    add("--betas", options.number(0, 1), "B", betas, nargs=2)
    add("--weight-decay", options.number(0), "W", "AdamW's weight decay", default=0.0)
    add("--max-grad-norm", positive, "NORM", "scale larger gradients down to this 2-norm (default: do not)")
    add("--ema-decay", options.number(0, 1), "D", "decay per step of the weights' moving average", default=0.9999)
    warmup = "a faster decay at first, (1 + n) / (10 + n) at step n, so that short runs have an average, too"
    add("--ema-warmup", None, None, warmup, default=True, action=argparse.BooleanOptionalAction)
    times = "distribution of training times; uniform is the paper's"
    add("--time-sampling", options.one_of("uniform", "logit-normal"), "uniform|logit-normal", times, default="uniform")
    add("--logit-normal-mean", options.number(), "M", "above 0: closer to the data", default=0.0)
    add("--logit-normal-std", positive, "S", "small: closer together", default=1.0)
    add("--global-seed", options.integer(0), "SEED", "decides all that is random, for any number of ranks", default=0)
    bad = "stop after this many steps in a row without a finite loss and gradient, which are left out"
    add("--max-bad-steps", at_least_one, "N", bad, default=10)

    add = options.flag_group(parser, "hardware")
    share = "how ranks share the work: each has the whole model, or all hold it together (default: ddp if that fits)"
    add("--parallel", options.one_of("auto", "ddp", "fsdp"), "auto|ddp|fsdp", share, default="auto")
    add("--fsdp-shard-size", at_least_one, "N", "ranks that hold one model together, such as a node's (default: all)")
    kinds = (
        "of the model's arithmetic; weights, optimizer, average and loss are fp32 (default: bf16 on a GPU, else fp32)"
    )
    add("--precision", options.one_of(*compute.DTYPES), "|".join(compute.DTYPES), kinds)
    again = "keep no activations inside blocks and compute them twice: less memory, a third more work"
    parser.add_argument("--grad-checkpoint", action="store_true", help=again)
    parser.add_argument("--compile", action="store_true", help="compile the model: slower to start, faster steps")

    add = options.flag_group(parser, "run")
    add("--output-dir", pathlib.Path, "DIR", "the run's folder (default: a new, numbered one in --results-dir)")
    add("--results-dir", pathlib.Path, "DIR", "where numbered run folders go", default=pathlib.Path("results"))
    where = "auto: from the newest checkpoint in --output-dir, if there is one; never; or a run or checkpoint folder"
    add("--resume", str, "auto|never|PATH", where, default="auto")
    weights = "start a new run from these weights, named as for sample.py's --ckpt, with a new optimizer"
    add("--init-from", str, "PATH|NAME|URL", weights, alias="--ckpt")
    add("--log-every", at_least_one, "STEPS", "steps between lines of the log", default=100)
    add("--ckpt-every", at_least_one, "STEPS", "steps between checkpoints; the end makes one too", default=50_000)
    add("--keep-checkpoints", at_least_one, "N", "keep this many of the newest checkpoints (default: all)")
    add("--keep-every", at_least_one, "STEPS", "keep those of multiples of this step, too")
    add("--sample-every", options.integer(0), "STEPS", "steps between grids of EMA samples; 0: none", default=10_000)
    cfg = "guidance scale of those grids; 1 is none (default: 4, or 1 with --class-dropout-prob 0)"
    add("--cfg-scale", options.number(), "S", cfg)
    every = "steps between Frechet distances of EMA samples without guidance to a reference; 0: none"
    add("--eval-every", options.integer(0), "STEPS", every, default=0)
    add("--eval-samples", options.integer(2), "N", "samples that are drawn for it, by all ranks together", default=5000)
    reference = ".npz or folder, as evaluate.py takes it (default: the training images, if they are small)"
    add("--eval-reference", pathlib.Path, "PATH", reference)
    add("--inception-weights", pathlib.Path, "FILE.pth", "see evaluate.py (default: download them once)")
    parser.add_argument("--tensorboard", action="store_true", help="log to TensorBoard, too, in the run's folder")
    wandb = "log to Weights & Biases, too, which reads WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE"
    parser.add_argument("--wandb", action="store_true", help=wandb)
    plan = "print the flags, the sizes and an estimate of the memory, and do nothing"
    parser.add_argument("--dry-run", action="store_true", help=plan)
    return parser


def main():
    # Check the flags against each other, the data and the machine, before anything is written.
    parser = build_parser()
    args = parser.parse_args()
    with options.user_errors(parser):
        device = distributed.init()
        runs.check_restarts(args.output_dir, args.resume)
        rank, world_size = distributed.rank(), distributed.world_size()
        accumulation, micro_batch_size = plan.split_batch(args.global_batch_size, args.micro_batch_size, world_size)
        precision = compute.resolve_precision(args.precision, device, on_gpu="bf16")
        source = options.open_data(args)
        config = plan.resolve_config(args, source)
        transport = create_transport(**config["transport"])
        with torch.device("meta"):
            model, ema = SiT(**config["model"]), SiT(**config["model"])
        parallel, mesh = plan.resolve_parallel(args, model, device)
        cfg_scale = sampling.resolve_cfg_scale(args.cfg_scale, model)
        batch_text = (
            f"steps of {args.global_batch_size} images = micro batch {micro_batch_size} x {world_size} ranks "
            f"x accumulation {accumulation}"
        )
        how_text = f"{parallel}, {precision} on {device.type}, torch {torch.__version__}"
        if args.dry_run:
            lines = [f"{plan.last_step(args, source, runs.Start()):,} {batch_text}", how_text]
            plan.print_plan(args, config, micro_batch_size, precision, mesh, device, lines)
            return distributed.shutdown()
        start = distributed.on_rank_zero(runs.find_start, args.resume, args.output_dir)
        output_dir = distributed.from_rank_zero(runs.choose_folder(args, start))
        weights, notes = {}, []
        if start.state is not None:
            runs.check_model(config, start)
        elif rank == 0:
            weights, notes = plan.initial_weights(args, config)
        space = plan.open_space(args, config, source, device)
        for flag, value in (("--eval-reference", args.eval_reference), ("--inception-weights", args.inception_weights)):
            if value is not None and not args.eval_every:
                raise ValueError(f"{flag} has no effect without --eval-every")
        monitor = open_monitor(args, config, source, device) if args.eval_every else None
        packages = logs.import_trackers(args.tensorboard, args.wandb) if rank == 0 else {}
        token = distributed.on_rank_zero(runs.take_folder, output_dir)
        if distributed.any_rank(not runs.sees_folder(output_dir, token)):
            raise ValueError(
                f"the run's folder {output_dir} is not the same for all ranks; it must be on shared storage"
            )
        # Again, now that nobody else writes there: who did until now may have saved.
        start = distributed.on_rank_zero(runs.find_start, args.resume, output_dir)
        if start.state is not None:
            runs.check_model(config, start)
        max_steps = plan.last_step(args, source, start)
        if start.state is not None and start.state["step"] >= max_steps:
            if rank == 0:
                print(f"{start.folder} is of step {start.state['step']}, and the run has {max_steps}: it is done")
            return distributed.shutdown()
        distributed.on_rank_zero(runs.set_aside, start, output_dir)
        trackers = logs.open_trackers(packages, output_dir, plan.first_step_of(start), runs.plain(vars(args)))
        log = logs.RunLog(output_dir, plan.first_step_of(start), trackers)

    # Build what trains: the model and its average, the optimizer. Their weights come into being here, on the device,
    # in the shards that this rank holds.
    ema.eval().requires_grad_(False)
    for module, dtype in ((model, compute.DTYPES[precision]), (ema, torch.float32)):
        if parallel == "fsdp":
            distributed.shard(module, mesh, dtype)
        module.to_empty(device=device)
        compute.choose_attention(module, device, precision)
    optimizer = training.build_optimizer(model, args.lr, args.betas or (0.9, 0.999), args.weight_decay)
    if start.state is None:
        for module in (model, ema):
            checkpoint.place(module, weights, "the initial weights")
        weights = None
    else:
        checkpoint.load_training(start.folder, model, ema, optimizer)
    model.train()
    model.grad_checkpoint = args.grad_checkpoint
    if args.compile:
        compute.compile_training(model, parallel)
    trained = distributed.replicate(model, device) if parallel == "ddp" else model
    drawn_from = sampling.Pipeline(ema, transport, space, device, guided_channels=None, precision=precision)
    averaged, average = distributed.local(model.parameters()), distributed.local(ema.parameters())

    def network(x, t, **labels):
        with compute.autocast(device, precision):
            output = trained(x, t, **labels)
        return output.float()  # the loss is taken in float32

    # The batches of this rank, from where the run is.
    state = start.state or {"samples_seen": 0, "window": None} | dict.fromkeys(COUNTS, 0)
    first_step, samples_seen = plan.first_step_of(start), state["samples_seen"]
    bad_steps, bad_in_a_row, bad_images = (state[key] for key in COUNTS)
    sampler = data.GlobalBatchSampler(
        source.num_examples,
        args.global_batch_size,
        micro_batch_size,
        seed=args.global_seed,
        rank=rank,
        world_size=world_size,
        mirror=source.mirrors if args.horizontal_flip is None else args.horizontal_flip,
        start=samples_seen,
    )
    dataset = plan.open_dataset(args, config, source, sampler)
    loader = data.make_loader(dataset, sampler, args.num_workers, device)
    batches = training.batches_on_device(loader, space, device)
    share = args.global_batch_size // world_size
    places = slice(rank * share, (rank + 1) * share)
    latent_shape = (model.in_channels, model.input_size, model.input_size)

    # Say what is about to happen.
    writer = checkpoint.Writer(output_dir, args.keep_checkpoints, args.keep_every, log.line)
    log.line(f"run folder {output_dir}")
    for line in notes + [f"{problem}; it is not used" for problem in start.damaged]:
        log.line(line)
    if start.state is not None:
        log.line(f"continuing from {start.folder}, step {first_step}")
        for line in runs.changed_flags(args, start):
            log.line(line)
    log.line(f"{costs.num_parameters(config['model']):,} parameters; {json.dumps(config['model'])}")
    images = "a stream of images" if source.num_examples is None else f"{source.num_examples:,} images"
    log.line(f"{images} of {model.num_classes} classes as {latent_shape}; {json.dumps(config['transport'])}")
    log.line(f"{max_steps:,} {batch_text}; {how_text}")

    # Train.
    stop = runs.StopRequest()
    window = logs.LossWindow(device, state["window"])
    reader = distributed.LateReader(device)
    meter = logs.Meter(config["model"], device, precision)
    problems = [] if first_step else [f"left out {line}" for line in source.left_out if rank == 0]
    done, stopping = first_step, None
    for step in tqdm(
        range(first_step, max_steps), initial=first_step, total=max_steps, unit="step", disable=rank or None
    ):
        # All that is random about this step, for this rank's places in the global batch.
        uniform, drop, x0, posterior_noise = training.draw_randomness(
            args.global_seed, step, args.global_batch_size, places, latent_shape, device
        )
        if args.time_sampling == "logit-normal":
            uniform = logit_normal(uniform, args.logit_normal_mean, args.logit_normal_std)
        t = transport.times(uniform)
        drop = drop < args.class_dropout_prob

        # Forward and backward, micro batch by micro batch.
        records = []
        for i in range(accumulation):
            with meter.waiting(), options.user_errors(parser):
                content, y, bad = next(batches)
            for problem in itertools.chain(*bad):
                if not args.skip_bad_images:
                    parser.error(f"{problem} (--skip-bad-images leaves such examples out)")
                problems.append(f"(step={step + 1:07d}) left out {problem}")
            micro = slice(i * micro_batch_size, (i + 1) * micro_batch_size)
            x1 = space.draw(content, posterior_noise[micro])
            with distributed.accumulate(trained, is_last=i == accumulation - 1):
                kwargs = dict(y=y, force_drop_ids=drop[micro])
                losses = transport.training_losses(network, x1, kwargs, t=t[micro], x0=x0[micro])["loss"]
                (losses.mean() / accumulation).backward()
            records.append(window.record(losses, t[micro]))

        # Step the optimizer and the moving average.
        record = distributed.total(torch.stack(records).sum(0))
        loss = window.loss(record)
        lr = training.learning_rate(step, max_steps, args.lr, args.warmup_steps, args.lr_schedule)
        gradient_norm, bad = training.step_optimizer(optimizer, loss, lr, args.max_grad_norm)
        window.add(record, bad)
        training.update_ema(average, averaged, training.ema_decay(step, args.ema_decay, args.ema_warmup))

        # See what came of it, and whether someone asks to stop.
        done = step + 1
        samples_seen += args.global_batch_size
        meter.step(args.global_batch_size)
        is_last = done == max_steps
        if distributed.any_rank(stop.signal is not None):
            stopping = runs.EXIT_STOPPED
        # Not in a row of steps that are not finite, in which the last good checkpoint is kept.
        saves = (done % args.ckpt_every == 0 and not bad_in_a_row) or is_last or stopping is not None
        logging = done % args.log_every == 0 or is_last
        known = reader.push(done, torch.stack([loss, gradient_norm.to(loss)]))
        for late_step, (late_loss, late_norm) in known + (reader.flush() if saves or logging else []):
            if math.isfinite(late_loss) and math.isfinite(late_norm):
                bad_in_a_row = 0
                continue
            bad_steps, bad_in_a_row = bad_steps + 1, bad_in_a_row + 1
            figures = f"loss {late_loss}, gradient norm {late_norm}"
            log.line(f"(step={late_step:07d}) left out: not finite ({figures}), {bad_in_a_row} in a row")
            if bad_in_a_row >= args.max_bad_steps:
                log.line(
                    f"stopped at step {late_step}: --max-bad-steps {args.max_bad_steps} in a row were not finite "
                    f"({figures}); the last good checkpoint is untouched"
                )
                stopping = runs.EXIT_DIVERGED
        if stopping == runs.EXIT_DIVERGED:
            break

        # Log.
        if logging or saves:
            everyone = distributed.from_all(problems)
            problems = []
            for line in itertools.chain(*everyone):
                bad_images += 1
                log.line(line)
        if logging:
            mean_loss, loss_by_time = window.take()
            log.metrics(
                step=done,
                epoch=epochs(samples_seen, source),
                samples_seen=samples_seen,
                loss=mean_loss,
                gradient_norm=finite(gradient_norm.item()),
                learning_rate=lr,
                **meter.take(),
                bad_images=bad_images,
                bad_steps=bad_steps,
                loss_by_time=loss_by_time,
            )

        # Save, and draw from the average. Their time is not training's.
        with meter.pause():
            if saves:
                counts = dict(zip(COUNTS, (bad_steps, bad_in_a_row, bad_images), strict=True))
                state = trainer_state(args, config, done, samples_seen, source, counts | {"window": window.state()})
                writer.save(done, model, ema, optimizer, state)
            if args.sample_every and done % args.sample_every == 0:
                # With FSDP no rank has the whole model, so all of them draw it.
                if rank == 0 or parallel == "fsdp":
                    images, columns = draw_grid(drawn_from, cfg_scale, args.global_seed)
                    log.grid(images, columns, done)
                distributed.barrier()
            if args.eval_every and done % args.eval_every == 0:
                log.evaluation(done, monitor.figures(draw_share(drawn_from, args)))
        if stopping is not None:
            name = stop.signal.name if stop.signal else "a signal to another rank"
            log.line(f"{name}: stopping at step {done}; the same command continues")
            break

    # End when the last checkpoint is on the disk.
    batches.close()
    written = writer.finish()
    log.close()
    distributed.shutdown()
    sys.exit(stopping or (0 if written else 1))


def finite(value):
    """The number, or None for one that JSON cannot hold."""
    return value if math.isfinite(value) else None


def draw_grid(pipeline, cfg_scale, seed):
    """(samples as uint8 (N, H, W, C), columns), the same noise and classes each time."""
    labels = sampling.default_labels(pipeline.model.num_classes)
    images, _ = sampling.generate(pipeline, labels * 2, **SAMPLED_HOW, cfg_scale=cfg_scale, seed=seed)
    return images, len(labels)


def open_monitor(args, config, source, device):
    """What --eval-every measures samples with. Raises ValueError without a reference that is fit for it."""
    size, channels = config["latents"]["image_size"], config["latents"]["channels"]
    shape = (size, size, channels if config["latents"]["vae"] == "none" else 3)
    if args.eval_reference is not None:
        reference = ImageBatches(args.eval_reference, may_be_statistics=True)
    elif isinstance(source, data.Source) and source.labels is not None and math.prod(shape) <= evaluate.MOST_PIXELS:
        dataset = data.ImageDataset(source, size, shape[2], config["model"]["num_classes"])
        some = range(min(len(dataset), evaluate.MOST_REFERENCES))
        reference = (sampling.to_uint8(dataset[i, False][0][None]).numpy() for i in some)
    else:
        raise ValueError("--eval-every needs --eval-reference: the training data are no small images")
    return evaluate.Monitor(reference, shape, args.inception_weights, device)


def draw_share(pipeline, args):
    """This rank's share of --eval-samples as uint8 (N, H, W, C): of as many network calls as the others' shares."""
    labels = sampling.draw_labels(args.eval_samples, pipeline.model.num_classes, args.global_seed, balanced=False)
    share = math.ceil(args.eval_samples / distributed.world_size())
    first = distributed.rank() * share
    mine = labels[first : first + share].tolist()
    padded = mine + [0] * (share - len(mine))
    images, _ = sampling.generate(
        pipeline, padded, **SAMPLED_HOW, cfg_scale=1.0, seed=args.global_seed, first_index=first
    )
    return images[: len(mine)].numpy()


def epochs(samples_seen, source):
    """Passes over the data; None for a stream that does not say how long it is."""
    return None if source.num_examples is None else samples_seen / source.num_examples


def trainer_state(args, config, step, samples_seen, source, counts):
    """What trainer_state.json holds."""
    return {
        "step": step,
        "epoch": epochs(samples_seen, source),
        "samples_seen": samples_seen,
        "seed": args.global_seed,
        **counts,
        **config,
        "args": runs.plain(vars(args)),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


if __name__ == "__main__":
    main()
