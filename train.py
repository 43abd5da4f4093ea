"""Train a SiT.

python train.py --config configs/digits.yaml
torchrun --nproc_per_node=8 train.py --model SiT-XL/2 --data-path /data/imagenet/train
"""

import argparse
import itertools
import json
import math
import os
import pathlib
import platform
import sys

import torch
import yaml
from tqdm import tqdm

import checkpoint
import costs
import data
import distributed
import download
import evaluate
import latents
import logs
import options
import runs
import sampling
from models import SiT, SiT_models
from transport import create_transport, logit_normal

# How samples are drawn during training: in fixed steps, as with FSDP all ranks must make as many network calls.
SAMPLED_HOW = dict(
    mode="ODE",
    settings=options.ODE_DEFAULTS | {"sampling_method": "heun2", "num_steps": 26},
    show_progress=False,
)
COUNTS = ("bad_steps", "bad_in_a_row", "bad_images")  # of a run, that its checkpoints hold
COMPUTE_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


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
    add("--precision", options.one_of(*COMPUTE_DTYPES), "|".join(COMPUTE_DTYPES), kinds)
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
        accumulation, micro_batch_size = split_batch(args.global_batch_size, args.micro_batch_size, world_size)
        precision = resolve_precision(args.precision, device)
        source = options.open_data(args)
        config = resolve_config(args, source)
        transport = create_transport(**config["transport"])
        with torch.device("meta"):
            model, ema = SiT(**config["model"]), SiT(**config["model"])
        parallel, mesh = resolve_parallel(args, model, device)
        cfg_scale = sampling.resolve_cfg_scale(args.cfg_scale, model)
        batch_text = (
            f"steps of {args.global_batch_size} images = micro batch {micro_batch_size} x {world_size} ranks "
            f"x accumulation {accumulation}"
        )
        how_text = f"{parallel}, {precision} on {device.type}, torch {torch.__version__}"
        if args.dry_run:
            lines = [f"{last_step(args, source, runs.Start()):,} {batch_text}", how_text]
            print_plan(args, config, micro_batch_size, precision, mesh, lines)
            return distributed.shutdown()
        start = distributed.on_rank_zero(runs.find_start, args.resume, args.output_dir)
        output_dir = distributed.from_rank_zero(runs.choose_folder(args, start))
        weights, notes = {}, []
        if start.state is not None:
            runs.check_model(config, start)
        elif rank == 0:
            weights, notes = initial_weights(args, config)
        space = open_space(args, config, source, device)
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
        max_steps = last_step(args, source, start)
        if start.state is not None and start.state["step"] >= max_steps:
            if rank == 0:
                print(f"{start.folder} is of step {start.state['step']}, and the run has {max_steps}: it is done")
            return distributed.shutdown()
        distributed.on_rank_zero(runs.set_aside, start, output_dir)
        trackers = logs.open_trackers(packages, output_dir, first_step_of(start), runs.plain(vars(args)))
        log = logs.RunLog(output_dir, first_step_of(start), trackers)

    # Build what trains: the model and its average, the optimizer. Their weights come into being here, on the device,
    # in the shards that this rank holds.
    ema.eval().requires_grad_(False)
    for module, dtype in ((model, COMPUTE_DTYPES[precision]), (ema, torch.float32)):
        if parallel == "fsdp":
            distributed.shard(module, mesh, dtype)
        module.to_empty(device=device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.lr, betas=tuple(args.betas or (0.9, 0.999)), weight_decay=args.weight_decay, fused=True
    )
    if start.state is None:
        for module in (model, ema):
            checkpoint.place(module, weights, "the initial weights")
        weights = None
    else:
        checkpoint.load_training(start.folder, model, ema, optimizer)
    model.train()
    model.grad_checkpoint = args.grad_checkpoint
    if args.compile:
        compile_forward(model, parallel)
    trained = distributed.replicate(model, device) if parallel == "ddp" else model
    averaged, average = distributed.local(model.parameters()), distributed.local(ema.parameters())

    def network(x, t, **labels):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = trained(x, t, **labels)
        return output.float()  # the loss is taken in float32

    # The batches of this rank, from where the run is.
    state = start.state or {"samples_seen": 0, "window": None} | dict.fromkeys(COUNTS, 0)
    first_step, samples_seen = first_step_of(start), state["samples_seen"]
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
    batches = data.make_loader(open_dataset(args, config, source, sampler), sampler, args.num_workers, device)
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
        uniform, drop, x0, posterior_noise = draw_randomness(
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
                images, labels, bad = next(batches)
            for problem in itertools.chain(*bad):
                if not args.skip_bad_images:
                    parser.error(f"{problem} (--skip-bad-images leaves such examples out)")
                problems.append(f"(step={step + 1:07d}) left out {problem}")
            micro = slice(i * micro_batch_size, (i + 1) * micro_batch_size)
            x1 = space.encode(images.to(device, non_blocking=True), posterior_noise[micro])
            y = labels.to(device, non_blocking=True)
            with distributed.accumulate(trained, is_last=i == accumulation - 1):
                kwargs = dict(y=y, force_drop_ids=drop[micro])
                losses = transport.training_losses(network, x1, kwargs, t=t[micro], x0=x0[micro])["loss"]
                (losses.mean() / accumulation).backward()
            records.append(window.record(losses, t[micro]))

        # Step the optimizer and the moving average. Whether loss and gradient are finite is known on the device alone:
        # `found_inf` tells the fused optimizer there to leave this step out, and the host does not wait.
        record = distributed.total(torch.stack(records).sum(0))
        loss = window.loss(record)
        gradients = [p.grad for p in parameters]
        gradient_norm = distributed.total_norm(gradients)
        bad = ~(loss.isfinite() & gradient_norm.isfinite())
        window.add(record, bad)
        if args.max_grad_norm is not None:
            torch._foreach_mul_(
                distributed.local(gradients), (args.max_grad_norm / (gradient_norm + 1e-6)).clamp(max=1)
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, max_steps, args.lr, args.warmup_steps, args.lr_schedule)
        optimizer.grad_scale = None
        optimizer.found_inf = distributed.like_parameter(bad.float(), parameters[0])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        update_ema(average, averaged, ema_decay(step, args.ema_decay, args.ema_warmup))

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
                learning_rate=optimizer.param_groups[0]["lr"],
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
                    images, columns = draw_grid(ema, transport, space, device, cfg_scale, args.global_seed)
                    log.grid(images, columns, done)
                distributed.barrier()
            if args.eval_every and done % args.eval_every == 0:
                log.evaluation(done, monitor.figures(draw_share(ema, transport, space, device, args)))
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


def first_step_of(start):
    """Steps that the run has made before it starts."""
    return 0 if start.state is None else start.state["step"]


def last_step(args, source, start):
    """The step with which the run is done: --max-steps, or that which completes --epochs from where it starts."""
    if args.max_steps is not None:
        return args.max_steps
    images = args.epochs * source.num_examples
    if start.state is None:
        return max(1, images // args.global_batch_size)
    return first_step_of(start) + max(0, images - start.state["samples_seen"]) // args.global_batch_size


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


def resolve_precision(precision, device):
    """'fp32', 'tf32' or 'bf16'; None: bf16 on a GPU that has it, else fp32. Raises ValueError for what it has not."""
    if device.type != "cuda":
        if precision == "tf32":
            raise ValueError("--precision tf32 needs a CUDA GPU; fp32 and bf16 run on a CPU, too")
        return precision or "fp32"
    if precision is None:
        precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return precision


def resolve_parallel(args, model, device):
    """(how ranks share the work, mesh): 'one process', 'ddp', or 'fsdp', which alone has a mesh. Raises ValueError."""
    parallel = args.parallel
    if args.fsdp_shard_size is not None and parallel != "fsdp":
        raise ValueError("--fsdp-shard-size has no effect without --parallel fsdp")
    if distributed.world_size() == 1:
        return "one process", None
    if parallel == "auto":
        # Weights, gradients, AdamW's two moments and the average, in float32, should leave half of the memory free.
        held = 20 * sum(p.numel() for p in model.parameters())
        room = torch.cuda.get_device_properties(device).total_memory / 2 if device.type == "cuda" else math.inf
        parallel = distributed.from_rank_zero("ddp" if held < room else "fsdp")
    return parallel, distributed.mesh(device, args.fsdp_shard_size) if parallel == "fsdp" else None


def initial_weights(args, config):
    """(state dict, lines for the log) of a new run: DiT's initialisation, or the weights that --init-from names.

    Weights of other classes or another size of image start a run, too: what depends on them begins anew.

    Raises:
        ValueError: weights that are not there, or of another architecture.
    """
    torch.manual_seed(args.global_seed)
    fresh = SiT(**config["model"]).state_dict()
    if args.init_from is None:
        return fresh, []
    weights = checkpoint.load_weights(download.resolve(args.init_from))
    # The shapes do not tell the number of heads, so weights would load and mean something else.
    wanted = config["model"]["num_heads"]
    heads = weights.config["model"].get("num_heads") if weights.own else wanted
    if heads != wanted:
        raise ValueError(f"--init-from {args.init_from} has {heads} attention heads, and the model {wanted}")
    given, notes = dict(weights.state_dict), [f"weights from {weights.path}"]
    for key in ("path_type", "prediction"):
        there, here = weights.config.get("transport", {}).get(key), config["transport"][key]
        if there not in (None, here):
            notes.append(f"the weights were trained with --{key.replace('_', '-')} {there}, and the run has {here}")
    key = "y_embedder.embedding_table.weight"
    if key in given and given[key].shape != fresh[key].shape and given[key].shape[1:] == fresh[key].shape[1:]:
        notes.append(f"{len(given[key])} rows of class embeddings there, {len(fresh[key])} here: they begin anew")
        given[key] = fresh[key]
    if given["pos_embed"].shape[1] != fresh["pos_embed"].shape[1]:
        notes.append(f"{given['pos_embed'].shape[1]} tokens there, {fresh['pos_embed'].shape[1]} here")
        given["pos_embed"] = fresh["pos_embed"]  # fixed: a function of the number of tokens
    checkpoint.check_fit(fresh, given, f"--init-from {args.init_from}")
    return given, notes


def compile_forward(model, parallel):
    """Compile the forward pass as one graph, in place; under FSDP, whose gathering is not to be traced, each block's.

    `fullgraph` makes a graph break an error.
    """
    for module in model.blocks if parallel == "fsdp" else [model]:
        module.forward = torch.compile(module.forward, fullgraph=True, dynamic=False)


def learning_rate(step, max_steps, peak, warmup_steps, schedule):
    """Learning rate of the step after `step` others: a linear rise, then constant or half a cosine, to 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, max_steps - warmup_steps)))


def ema_decay(step, decay, warmup):
    """Decay of the moving average after `step` others; with warm-up, a young one forgets faster: (1 + n) / (10 + n)."""
    n = step + 1
    return min(decay, (1 + n) / (10 + n)) if warmup else decay


def finite(value):
    """The number, or None for one that JSON cannot hold."""
    return value if math.isfinite(value) else None


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
        if args.vae is not None and not latents.same_vae(args.vae, vae):
            # A folder that was moved can be named anew; whether it is the same nobody can tell.
            if not (os.path.isabs(vae) and not os.path.exists(vae) and os.path.isdir(args.vae)):
                raise ValueError(f"--vae {args.vae} contradicts the cached latents, which were made with {vae}")
            vae = args.vae
        for flag, given, cached in (
            ("--image-size", args.image_size, source.image_size),
            ("--num-classes", args.num_classes, source.num_classes),
        ):
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
    if isinstance(source, data.Source):
        if source.declares_classes and source.num_classes is not None and num_classes > source.num_classes:
            raise ValueError(f"--num-classes {num_classes} contradicts the data, which has {source.num_classes}")
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
def update_ema(average, parameters, decay):
    """Move an average towards parameters, both lists of tensors: average <- decay average + (1 - decay) parameters."""
    torch._foreach_lerp_(average, parameters, 1 - decay)


def draw_grid(ema, transport, space, device, cfg_scale, seed):
    """(samples of the moving average as uint8 (N, H, W, C), columns), the same noise and classes each time."""
    pipeline = sampling.Pipeline(ema, transport, space, device, guided_channels=None)
    labels = sampling.default_labels(ema.num_classes)
    images, _ = sampling.generate(pipeline, labels * 2, **SAMPLED_HOW, cfg_scale=cfg_scale, seed=seed)
    return images, len(labels)


def open_monitor(args, config, source, device):
    """What --eval-every measures samples with. Raises ValueError without a reference that is fit for it."""
    size, channels = config["latents"]["image_size"], config["latents"]["channels"]
    shape = (size, size, channels if config["latents"]["vae"] == "none" else 3)
    if args.eval_reference is not None:
        reference = evaluate.ImageBatches(args.eval_reference, may_be_statistics=True)
    elif isinstance(source, data.Source) and source.labels is not None and math.prod(shape) <= evaluate.MOST_PIXELS:
        dataset = data.ImageDataset(source, size, shape[2], config["model"]["num_classes"])
        some = range(min(len(dataset), evaluate.MOST_REFERENCES))
        reference = (sampling.to_uint8(dataset[i, False][0][None]).numpy() for i in some)
    else:
        raise ValueError("--eval-every needs --eval-reference: the training data are no small images")
    return evaluate.Monitor(reference, shape, args.inception_weights, device)


def draw_share(ema, transport, space, device, args):
    """This rank's share of --eval-samples as uint8 (N, H, W, C): of as many network calls as the others' shares."""
    pipeline = sampling.Pipeline(ema, transport, space, device, guided_channels=None)
    labels = sampling.draw_labels(args.eval_samples, ema.num_classes, args.global_seed, balanced=False)
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


def print_plan(args, config, micro_batch_size, precision, mesh, lines):
    """What --dry-run prints, on rank 0."""
    if distributed.rank() != 0:
        return
    print(yaml.safe_dump(runs.plain(vars(args)), sort_keys=False), end="")
    print(f"{costs.num_parameters(config['model']):,} parameters; {json.dumps(config)}")
    for line in lines:
        print(line)
    shards = 1 if mesh is None else mesh.shape[-1]
    memory = costs.training_memory(config["model"], micro_batch_size, precision, args.grad_checkpoint, shards)
    parts = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in memory.items())
    print(f"estimated memory of a rank: {sum(memory.values()) / 2**30:.2f} GiB = {parts}; without the autoencoder")


if __name__ == "__main__":
    main()
