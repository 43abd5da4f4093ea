"""What train.py's flags mean for the data, the model and the machine; checked before anything is written."""

import inspect
import json
import math
import os

import torch
import yaml

from data.foreign_latents import ForeignLatents
from data.images import ImageDataset
from data.labelled import some_of
from data.loader import make_loader
from data.sources import Source, flag_rules, open_source, recognise_format
from models import BLOCKS, CHOICES, SiT, SiT_models
from training import costs
from utils import distributed, hub
from utils.checkpoint import without_defaults
from utils.command_line import flag_name, without_effect
from utils.sizes import is_size, pair, scaled, size_name
from utils.tensor_files import check_fit
from utils.weights import TRANSPORT_KEYS, build_on_meta, class_names, load_weights, model_config_from_shapes
from vae import PRECISIONS, LatentSpace, full_name, geometry, open_space

# Arguments of SiT that the data decides; every other one is a model option, with a flag of its name in train.py.
DECIDED_BY_DATA = ("input_size", "in_channels", "num_classes")
SIZE_FLAGS = ("image_size", *DECIDED_BY_DATA)
SCALING = ("scale", "shift")  # of latents


def model_options():
    """Return the names of the flags that are model options: arguments of SiT, and block, which sets several."""
    return ["block", *(key for key in inspect.signature(SiT).parameters if key not in DECIDED_BY_DATA)]


def open_data(settings, num_classes, dry_run):
    """Open the data, `settings` being arguments of `open_source`. For a dry run, do not fetch data from the hub."""
    path = settings.get("data_path")
    if dry_run and path and (settings.get("data_format") or recognise_format(path)) == "hub":
        return Source(None, None, str, num_classes, None, declares_classes=False)
    return open_source(**settings)


def split_batch(global_batch_size, micro_batch_size, world_size):
    """Return (gradient accumulation steps, micro-batch size). Raise ValueError if the global batch does not divide."""
    if global_batch_size % world_size:
        raise ValueError(f"--global-batch-size {global_batch_size} does not divide over {world_size} ranks")
    micro_batch_size = micro_batch_size or global_batch_size // world_size
    if global_batch_size % (micro_batch_size * world_size):
        needed = f"--micro-batch-size {micro_batch_size} x {world_size} ranks = {micro_batch_size * world_size}"
        raise ValueError(f"--global-batch-size {global_batch_size} is no multiple of {needed}")
    return global_batch_size // (micro_batch_size * world_size), micro_batch_size


def resolve_parallel(parallel, fsdp_shard_size, model, device, emas=1):
    """Return (parallelism, mesh): 'one process', 'ddp', or 'fsdp', which alone has a mesh. Raise ValueError."""
    if fsdp_shard_size is not None and parallel != "fsdp":
        raise ValueError("--fsdp-shard-size has no effect without --parallel fsdp")
    if distributed.world_size() == 1:
        return "one process", None
    if parallel == "auto":
        # Weights, gradients, AdamW's two moments and the EMAs, in float32, should leave half of the memory free.
        needed = (16 + 4 * emas) * sum(p.numel() for p in model.parameters())
        limit = torch.cuda.get_device_properties(device).total_memory / 2 if device.type == "cuda" else math.inf
        parallel = distributed.broadcast("ddp" if needed < limit else "fsdp")
    return parallel, distributed.mesh(device, fsdp_shard_size) if parallel == "fsdp" else None


def resolve_config(source, model_name, options, sizes, transport, vae=None, skip_bad_images=False, resumed=None):
    """Return what a checkpoint stores to build everything again: 'model', 'transport', 'latents' and 'data'.

    `options`, `sizes` and `transport` are the model options, SIZE_FLAGS and TRANSPORT_KEYS that were given. Of a run
    that is `resumed`, the state of its checkpoint, the image size, the folders that are classes and the scale of the
    latents are known. Raise ValueError if sizes do not divide, or flags contradict the data or the VAE."""
    sizes = dict.fromkeys(SIZE_FLAGS) | sizes
    if resumed is not None and isinstance(source, Source):
        source.doubt = None
        if sizes["image_size"] is None and sizes["input_size"] is None:
            size = resumed["latents"].get("image_size")
            sizes["image_size"] = size if is_size(size) else None
    vae, downsampling, channels = _resolve_vae(source, vae, sizes)
    block, options = BLOCKS[options.get("block", "plain")], {k: v for k, v in options.items() if k != "block"}
    options = SiT_models[model_name].keywords | block | options
    image_size = _resolve_image_size(source, sizes, vae, downsampling, options["patch_size"])
    if sizes["in_channels"] not in (None, channels):
        raise ValueError(f"--in-channels {sizes['in_channels']} contradicts --vae {vae}, which has {channels} channels")
    if isinstance(source, Source):
        num_classes = source.resolve_classes(sizes["num_classes"], skip_bad_images)
    else:
        num_classes = source.num_classes
    vae = os.path.abspath(vae) if os.path.isdir(vae) else vae
    input_size = scaled(image_size, down=downsampling)
    decided = dict(input_size=input_size, in_channels=channels, num_classes=num_classes)
    if options.get("trained_size") == input_size:
        del options["trained_size"]  # which is its default
    latents = {"vae": vae, "image_size": image_size, "channels": channels} | _resolve_scaling(source, resumed)
    return {
        "model": without_defaults(options | decided),
        "transport": dict.fromkeys(TRANSPORT_KEYS) | transport,
        "latents": latents,
        "data": {"class_names": source.class_names},
    }


def _resolve_scaling(source, resumed):
    """Return 'scale' and 'shift' of the latents; {} if they are the autoencoder's own. A run that is resumed keeps its.

    Cached latents are given them, or None for the autoencoder's own."""
    is_foreign = isinstance(source, ForeignLatents)
    has_own = is_foreign or getattr(source, "scaled_by_data", False)
    own = {key: getattr(source, key) for key in SCALING} if has_own else {}
    kept = own if resumed is None else {key: resumed["latents"][key] for key in SCALING if key in resumed["latents"]}
    scaling = own | kept if is_foreign else kept
    if scaling != own:
        source.notes.append("scale and shift of the latents are those of the run until now, not those of the data")
        if not isinstance(source, Source):
            source.scale, source.shift = scaling.get("scale"), scaling.get("shift")
    return scaling


def resolve_flips(source, horizontal_flip):
    """Return whether images are mirrored at random. Raise ValueError if that was asked for and is not possible."""
    if horizontal_flip and isinstance(source, ForeignLatents) and not source.mirrors:
        raise ValueError(f"--horizontal-flip: {source.folder} has no latents of mirror images")
    return source.mirrors if horizontal_flip is None else horizontal_flip


def _resolve_vae(source, vae, sizes):
    """Return (VAE, its downsampling, its channels). Raise ValueError if flags contradict cached latents."""
    if isinstance(source, Source):
        return vae or "ema", *geometry(vae or "ema", source.channels)
    if isinstance(source, ForeignLatents):
        source.resolve(vae, sizes["image_size"], sizes["num_classes"])
    # A folder that was moved can be named by its new path; whether it holds the same VAE cannot be checked.
    moved = os.path.isabs(source.vae) and not os.path.exists(source.vae) and vae is not None and os.path.isdir(vae)
    if vae is not None and not moved and full_name(vae) != full_name(source.vae):
        raise ValueError(f"--vae {vae} contradicts the cached latents, which were made with {source.vae}")
    known = dict(image_size=source.image_size, input_size=source.latent_size, num_classes=source.num_classes)
    for key, there in known.items():
        if sizes[key] not in (None, there):
            given = f"{flag_name(key)} {size_name(sizes[key])}"
            raise ValueError(f"{given} contradicts the cached latents, which have {size_name(there)}")
    downsampling = pair(source.image_size)[0] // pair(source.latent_size)[0]
    return vae if moved else source.vae, downsampling, source.channels


def _resolve_image_size(source, sizes, vae, downsampling, patch_size):
    """Return the size of the images. Raise ValueError if flags contradict each other or it does not divide."""
    image_size, input_size = sizes["image_size"], sizes["input_size"]
    if input_size is not None and image_size not in (None, scaled(input_size, downsampling)):
        problem = f"--image-size {size_name(image_size)} contradicts --input-size {size_name(input_size)}"
        raise ValueError(f"{problem}: with --vae {vae} the image is {downsampling} times as large")
    image_size = image_size or (input_size and scaled(input_size, downsampling))
    if isinstance(source, Source):
        image_size = source.choose_image_size(image_size, downsampling * patch_size)
    image_size = image_size or source.image_size
    if any(side % (downsampling * patch_size) for side in pair(image_size)):
        factors = f"--vae {vae} (downsampling {downsampling}) and patches of {patch_size}"
        needed = f"it must be a multiple of {downsampling * patch_size} with {factors}"
        raise ValueError(f"--image-size {size_name(image_size)} does not divide: {needed}")
    return image_size


def build_model(config):
    """Return SiT on the meta device. Raise ValueError if it has buffers that are not in its state dict."""
    return build_on_meta(SiT, config["model"])


def last_step(max_steps, epochs, global_batch_size, source, start):
    """Return the step at which the run ends: --max-steps, or the one that completes --epochs from its start."""
    if max_steps is not None:
        return max_steps
    if source.num_examples is None:
        raise ValueError("--max-steps is missing: the data does not say how many images it has")
    images = epochs * source.num_examples
    if start.state is None:
        return max(1, images // global_batch_size)
    return start.step + max(0, images - start.state["samples_seen"]) // global_batch_size


def initial_weights(config, seed, init_from, start):
    """Return (state dict, lines for the log) of a new run: DiT's initialisation, or the weights of --init-from.

    Weights of other classes or another image size can start a run: the tensors that depend on them are initialised. For
    a run that resumes, and on ranks other than 0, return (None, []). Raise ValueError if the weights are missing or of
    another architecture."""
    if start.state is not None or distributed.rank() != 0:
        return None, []
    torch.manual_seed(seed)
    model = SiT(**config["model"])
    fresh = model.state_dict()
    if init_from is None:
        return fresh, []
    weights = load_weights(hub.resolve(init_from))
    # Shapes determine neither the number of heads nor all of a block: other weights would load and be wrong.
    plain = {"qk_norm": False} | {key: values[0] for key, values in CHOICES.items()}
    there = plain | (weights.config["model"] if weights.own else {"num_heads": config["model"]["num_heads"]})
    for key, wanted in (plain | config["model"]).items():
        if key in ("num_heads", *plain) and there.get(key) != wanted:
            given = f"{flag_name(key)} {there.get(key)}"
            raise ValueError(f"--init-from {init_from} was trained with {given}, and the model has {wanted}")
    given, notes = dict(weights.state_dict), [*weights.notes, f"weights from {weights.path}"]
    for key in ("path_type", "prediction"):
        earlier, now = weights.config.get("transport", {}).get(key), config["transport"][key]
        if earlier is None:
            notes.append(f"the weights do not say with which {flag_name(key)} they were trained; the run has {now}")
        elif earlier != now:
            notes.append(f"the weights were trained with {flag_name(key)} {earlier}, and the run has {now}")
    there, here = (part.get("latents", {}).get("scale") for part in (weights.config, config))
    if there != here and list in (type(there), type(here)):
        notes.append("the weights were trained on latents of other scale and shift, those of their own data or VAE")
    pairs = zip(class_names(weights.config) or (), class_names(config) or (), strict=False)
    if other := [(number, *names) for number, names in enumerate(pairs) if names[0] != names[1]]:
        number, there, here = other[0]
        notes.append(f"class {number} is {there!r} in the weights and {here!r} in the data; {len(other)} differ")
    fixed = [key for key, parameter in model.named_parameters() if not parameter.requires_grad]
    for key in ("y_embedder.embedding_table.weight", *fixed):
        then, now = given.get(key, fresh[key]), fresh[key]
        if then.shape == now.shape or then.shape[-1] != now.shape[-1]:
            continue
        given[key] = now  # class embeddings, or positions, which are a function of the number of tokens
        notes.append(f"{key} is {tuple(then.shape)} in the weights and {tuple(now.shape)} here: it is initialised")
    if "pos_embed" in given and (note := _note_on_positions(weights, config["model"])):
        given["pos_embed"] = fresh["pos_embed"]
        notes.append(note)
    head = {key: value for key, value in fresh.items() if key.startswith("inner_layer.") and key not in given}
    if head:
        given |= head
        notes.append("the weights have no inner head: it is initialised")
    last = "final_layer.linear.weight"
    if last in given and 2 * len(given[last]) == len(fresh[last]):
        raise ValueError(f"--init-from {init_from} predicts half of the model's channels; give --no-learn-sigma")
    check_fit(fresh, given, f"--init-from {init_from}")
    return given, notes


def _note_on_positions(weights, model):
    """Return a line if positions of a model, by its arguments, are not those of the `weights`; '' if they are."""

    def sizes(arguments):
        return [arguments.get("input_size"), arguments.get("trained_size") or arguments.get("input_size")]

    known = weights.config["model"] if weights.own else model_config_from_shapes(weights.state_dict)
    there, here = sizes(known), sizes(model)
    if there == here:
        return ""
    if not all(map(is_size, there)):
        raise ValueError(f"{weights.path}: its configuration is damaged: input_size is {there[0]!r}")
    trained = size_name(there[1])
    if there[1] == here[1]:
        return f"positions of inputs of {size_name(here[0])} are scaled to those of {trained}, as in the weights"
    return f"positions are not those of the weights, which --trained-size {trained} would scale to this input size"


def open_training_space(config, source, device, vae_precision, decodes, losses):
    """Return the space to train in. With cached latents, load the autoencoder only if it `decodes` grids.

    Raise ValueError if the VAE cannot be loaded, or one of the auxiliary `losses` reads images and the cache has none.
    """
    vae, dtype = config["latents"]["vae"], PRECISIONS[vae_precision]
    if isinstance(source, Source):
        return open_space(vae, device, dtype, *map(config["latents"].get, SCALING))
    if any(loss.reads_images for loss in losses):
        source.require_images()
    space = LatentSpace(vae, device, dtype, source.scale, source.shift)
    if decodes:
        space.load()
    return space


def open_loader(config, source, sampler, num_workers, device, report):
    """Return the loader of this rank's micro-batches: images by index or from a stream, or cached latents.

    `report` is called with a line if a loader process ends; the batches after that are read in this process."""
    if isinstance(source, Source):
        channels = source.channels if config["latents"]["vae"] == "none" else 3
        source = ImageDataset(source, config["latents"]["image_size"], channels, config["model"]["num_classes"])
    return make_loader(source, sampler, num_workers, device, report)


def flags_without_effect(changed, flags, config, source, most_pixels):
    """Return a line for each flag in `Parser.changed` that the other flags, {key: value}, leave without effect.

    Images of up to `most_pixels` numbers are evaluated without Inception."""
    in_pixels, image_size = config["latents"]["vae"] == "none", config["latents"]["image_size"]
    is_small = math.prod(pair(image_size)) * (config["latents"]["channels"] if in_pixels else 3) <= most_pixels
    decodes, one_process = flags["sample_every"] or flags["eval_every"], distributed.world_size() == 1
    tokens = math.prod(pair(config["model"]["input_size"])) // config["model"]["patch_size"] ** 2
    share = (flags["route"] or [1])[-1]
    rules = [
        (flags["max_steps"] is not None, ("epochs",), "beside --max-steps"),
        (flags["align"] is None, [key for key in flags if key.startswith("align_")], "without --align"),
        (flags["align_projector"] == "conv", ("align_width",), "with --align-projector conv"),
        (flags["time_sampling"] == "uniform", ("logit_normal_mean", "logit_normal_std"), "on --time-sampling uniform"),
        (flags["prediction"] == "velocity", ("loss_weight",), "on --prediction velocity"),
        (one_process and not flags["dry_run"], ("parallel", "fsdp_shard_size"), "on one process"),
        (flags["output_dir"] is not None, ("results_dir",), "beside --output-dir"),
        (flags["keep_checkpoints"] is None, ("keep_every",), "without --keep-checkpoints: all are kept"),
        (not flags["sample_every"], ("cfg_scale",), "without --sample-every"),
        (not flags["eval_every"], ("eval_samples",), "without --eval-every"),
        (not decodes, ("eval_sampling_method", "eval_num_sampling_steps"), "without --sample-every and --eval-every"),
        (flags["inner_head"] is None, ("inner_head_weight",), "without --inner-head"),
        (flags["trained_size"] == config["model"]["input_size"], ("trained_size",), "where it is the input size"),
        (not round(share * tokens), ("route",), f"with a SHARE of {share:g}, which is none of {tokens} tokens"),
        (is_small, ("inception_weights",), "on images this small, whose pixels are compared"),
        (in_pixels, ("vae_precision",), "with --vae none"),
        (not isinstance(source, Source) and not decodes, ("vae_precision",), "where no latents are decoded"),
    ]
    return without_effect(changed, [*rules, *flag_rules(flags["data_path"], flags["data_format"])])


def opening_lines(output_dir, start, notes, config, source, changes, text):
    """Return the lines of the log that say what a run is about to do; `text`, of the batch and the machine, is last."""
    lines = [f"run folder {output_dir}", *notes, *(f"{problem}; it is not used" for problem in start.damaged)]
    if start.state is not None:
        lines += [f"continuing from {start.folder}, step {start.step}", *changes]
    model, count = config["model"], source.num_examples
    shape = (model["in_channels"], *pair(model["input_size"]))
    images = "a stream of images" if count is None else f"{count:,} images"
    lines.append(f"{costs.num_parameters(model):,} parameters; {json.dumps(model)}")
    lines += [*source.notes, *([f"classes {some_of(source.class_names)}"] if source.class_names else [])]
    return [*lines, f"{images} of {model['num_classes']} classes as {shape}; {json.dumps(config['transport'])}", text]


def print_plan(flags, config, lines, micro_batch_size, precision, mesh, device, emas, losses, recipe):
    """Print, on rank 0, the flags, the config, lines of text, operations and estimated memory, for --dry-run."""
    if distributed.rank() != 0:
        return
    print(yaml.safe_dump(flags, sort_keys=False), end="")
    print(f"{costs.num_parameters(config['model']):,} parameters; {json.dumps(config)}")
    print("\n".join(lines))
    shards, grad_checkpoint = 1 if mesh is None else mesh.shape[-1], flags["grad_checkpoint"]
    flops = costs.training_flops(config["model"], recipe.route, losses)
    print(f"{flops / 1e9:,.2f} GFLOPs per image (forward and backward, two per multiply-add)")
    how = precision, grad_checkpoint, shards, device, len(emas), losses, recipe.route, "muon" in recipe.optimizer
    memory = costs.training_memory(config["model"], micro_batch_size, *how)
    parts = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in memory.items())
    print(f"estimated peak memory of a rank: {sum(memory.values()) / 2**30:.2f} GiB = {parts}; without the autoencoder")
