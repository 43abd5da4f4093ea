"""From train.py's flags to what they mean for the data and the machine, found out before anything is written."""

import json
import math
import os

import torch
import yaml

import checkpoint
import costs
import data
import distributed
import download
import latents
import runs
from models import SiT, SiT_models


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


def print_plan(args, config, micro_batch_size, precision, mesh, device, lines):
    """What --dry-run prints, on rank 0."""
    if distributed.rank() != 0:
        return
    print(yaml.safe_dump(runs.plain(vars(args)), sort_keys=False), end="")
    print(f"{costs.num_parameters(config['model']):,} parameters; {json.dumps(config)}")
    for line in lines:
        print(line)
    shards = 1 if mesh is None else mesh.shape[-1]
    memory = costs.training_memory(config["model"], micro_batch_size, precision, args.grad_checkpoint, shards, device)
    parts = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in memory.items())
    print(f"estimated memory of a rank: {sum(memory.values()) / 2**30:.2f} GiB = {parts}; without the autoencoder")
