"""From a checkpoint to images: what sample.py, train.py and every later script that draws samples share."""

import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import math

import numpy as np
import torch
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

import checkpoint
import compute
import download
import latents
import options
from models import SiT, SiT_models
from transport import FIXED_STEP_ODE_METHODS, SDE_METHODS, Sampler, Transport, create_transport

# The classes of the official sample.py: golden retriever, otter, red panda, geyser, macaw, valley, balloon, arctic fox.
SHOWN_IMAGENET_CLASSES = [207, 360, 387, 974, 88, 979, 417, 279]


COUNTS = ("network_calls_per_image", "network_evaluations_per_image")
WHOLE = (0.0, 1.0)  # all times
ADAPTIVE_GROUP = 64  # images
LABEL_STREAM = 1 << 32  # beyond the number of any image, whose noise is drawn from (seed, number)


@dataclasses.dataclass
class Pipeline:
    """All that sampling needs, on one device.

    `guided_channels`: see `SiT.forward_with_cfg`. `model_config`: arguments of SiT. `precision`, `compiled`: how the
    model computes, see `speed_up`.
    """

    model: SiT
    transport: Transport
    space: latents.Space
    device: torch.device
    guided_channels: int | None
    model_config: dict = dataclasses.field(default_factory=dict)
    precision: str = "fp32"
    compiled: bool = False

    @property
    def image_shape(self):
        """(H, W, C) of the images that are drawn."""
        side = self.model.input_size * self.space.downsampling
        return side, side, self.model.in_channels if self.space.in_pixels else 3


def add_weights_flags(parser, with_space=True):
    """Which weights to use, and what they are where they do not say so themselves.

    Without `with_space`, not --image-size and --vae, which the data's flags have already.
    """
    add = options.flag_group(
        parser,
        "weights",
        "A checkpoint of train.py needs --ckpt alone; the other flags describe weights that come without a config.",
    )
    add(
        "--ckpt",
        str,
        "PATH|NAME|URL",
        "run folder (its latest checkpoint), checkpoint folder, .pt, .safetensors, name of a released model, or URL "
        "(default: the released weights of --model at --image-size)",
    )
    names = ", ".join(SiT_models)
    add(
        "--model",
        options.one_of(*SiT_models),
        "NAME",
        f"one of {names} (default: by the weights' shapes; SiT-XL/2 without --ckpt)",
    )
    at_least_one = options.integer(1)
    add("--num-classes", at_least_one, "N", "number of classes (default: by the weights' shapes)")
    add("--num-heads", at_least_one, "N", "attention heads (default: by the width, for the known sizes)")
    if with_space:
        size = "size of the images (default: the checkpoint's; 256 without --ckpt)"
        add("--image-size", at_least_one, "PIXELS", size)
        vae = (
            "autoencoder to decode with: of the released models, none for pixels, a hub name, a folder (default: the "
            "checkpoint's, or ema)"
        )
        add("--vae", str, "ema|mse|none|NAME|FOLDER", vae)


def add_guidance_flags(parser):
    """Classifier-free guidance."""
    add = options.flag_group(parser, "guidance")
    add(
        "--cfg-scale",
        options.number(),
        "S",
        "classifier-free guidance scale; 1 is none (default: 4, or 1 for a model without a null class)",
    )
    interval = "guide at times in [LO, HI] alone, of which 0 is noise and 1 data (default: 0 1)"
    add("--cfg-interval", options.number(0, closed=1), ("LO", "HI"), interval, nargs=2)
    add(
        "--guided-channels",
        lambda text: text if text == "all" else options.integer(1)(text),
        "N|all",
        "leading channels that guidance acts on (default: all for checkpoints of train.py; 3 for others, as the "
        "released models were sampled)",
    )


def add_speed_flags(parser):
    """Precision and compilation."""
    add = options.flag_group(parser, "speed")
    kinds = "of the model's matrix products; all else is fp32 (default: tf32 on a GPU, else fp32)"
    add("--precision", options.one_of(*compute.DTYPES), "|".join(compute.DTYPES), kinds)
    add("--vae-precision", options.one_of(*latents.PRECISIONS), "fp32|bf16", "of the autoencoder", default="fp32")
    parser.add_argument("--compile", action="store_true", help="compile the model: slower to start, faster to draw")


WEIGHTS_FLAGS = ("model", "image_size", "num_classes", "num_heads", "vae", *checkpoint.TRANSPORT_KEYS)


def given_flags(args):
    """The flags of `add_weights_flags` and `options.add_transport_flags` that were given, by name."""
    return {key: getattr(args, key) for key in WEIGHTS_FLAGS if getattr(args, key) is not None}


def load_pipeline(ckpt, device, guided_channels=None, vae_precision="fp32", **given):
    """Build what a checkpoint holds.

    Args:
        ckpt: as `download.resolve` takes it; None: the released weights of given['model'] at given['image_size'].
        guided_channels: a number or 'all'; None: all for checkpoints of train.py, 3 for others.
        vae_precision: one of latents.PRECISIONS.
        given: any of WEIGHTS_FLAGS. They say what weights without a config are, and must not contradict the others.

    Raises:
        ValueError: weights that are not there or do not fit, or a flag that contradicts what the weights are.
    """
    weights = checkpoint.load_weights(
        download.resolve(ckpt or f"{given.get('model', 'SiT-XL/2')}-{given.get('image_size', 256)}")
    )
    try:
        config = _model_config(weights, given)
        model = SiT(**config)
        transport = create_transport(**_transport_config(weights, given))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{weights.path}: its configuration is damaged: {error}") from error
    vae = given.get("vae") or weights.config.get("latents", {}).get("vae", "ema")
    downsampling, channels = latents.geometry(vae, model.in_channels)
    image_size = model.input_size * downsampling
    if channels != model.in_channels:
        raise ValueError(f"the weights take {model.in_channels} channels, but --vae {vae} makes {channels}")
    if given.get("image_size", image_size) != image_size:
        raise ValueError(
            f"--image-size {given['image_size']} contradicts the weights: they make images of {image_size} pixels"
        )
    checkpoint.load_into(model, weights.state_dict, weights.path)
    if guided_channels not in (None, "all") and guided_channels > model.in_channels:
        raise ValueError(f"--guided-channels {guided_channels}: the model has {model.in_channels}")
    guided_channels = guided_channels or ("all" if weights.own else 3)
    return Pipeline(
        model.to(device).eval().requires_grad_(False),
        transport,
        latents.open_space(vae, channels, device, latents.PRECISIONS[vae_precision]),
        device,
        None if guided_channels == "all" else guided_channels,
        config,
    )


def speed_up(pipeline, precision, compiled):
    """Have the model compute in a precision of `compute.DTYPES`, compiled or not. Its weights are changed in place."""
    compute.prepare_inference(pipeline.model, pipeline.device, precision, compiled)
    pipeline.precision, pipeline.compiled = precision, compiled


def _model_config(weights, given):
    """Arguments of SiT: the checkpoint's, else by shapes; flags must agree with them, or say what they leave open."""
    named = given.get("model") or weights.config.get("model_name")
    size = SiT_models[named].keywords if named in SiT_models else {}
    if weights.own:
        config = weights.config["model"]
    else:
        config = checkpoint.model_config_from_shapes(weights.state_dict)
        config.setdefault("num_heads", given.get("num_heads", size.get("num_heads")))
        if config["num_heads"] is None:
            raise ValueError(
                f"{weights.path} has width {config['hidden_size']}, which is none of S, B, L, XL, so its number of "
                "attention heads cannot be told; give --num-heads"
            )
    if "model" in given:
        for key, value in size.items():
            if config[key] != value:
                raise ValueError(f"--model {named} contradicts the weights: their {key} is {config[key]}, not {value}")
    for key in ("num_classes", "num_heads"):
        if given.get(key, config[key]) != config[key]:
            raise ValueError(f"--{key.replace('_', '-')} {given[key]} contradicts the weights: it is {config[key]}")
    return config


def _transport_config(weights, given):
    """Arguments of create_transport: the flags', then the checkpoint's; what the network was trained for is fixed."""
    config = weights.config.get("transport", {})
    for key in ("path_type", "prediction"):
        if given.get(key, config.get(key)) != config.get(key, given.get(key)):
            raise ValueError(
                f"--{key.replace('_', '-')} {given[key]} contradicts the checkpoint, trained with {config[key]}"
            )
    return config | {key: given[key] for key in checkpoint.TRANSPORT_KEYS if key in given}


def default_labels(num_classes):
    """The classes that a grid shows when nobody says which."""
    return SHOWN_IMAGENET_CLASSES if num_classes == 1000 else list(range(min(num_classes, 10)))


def draw_labels(count, num_classes, seed, balanced):
    """(count,) int64 class labels: uniform at random, label i by the seed and i alone; or each class in turn."""
    if balanced:
        return np.arange(count) % num_classes
    return np.random.default_rng([seed, LABEL_STREAM]).integers(0, num_classes, count)


def digests(pipeline):
    """What two runs can tell by whether they draw from the same networks: SHA-256 of weights, and the VAE's scaling."""
    space = pipeline.space
    vae = {} if space.in_pixels else {"sha256": _digest(space.model), "scale": space.scale, "shift": space.shift}
    return {"weights_sha256": _digest(pipeline.model), "vae": vae}


def _digest(model):
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_labels(labels, num_classes):
    """Raise ValueError for a label that is no class of the model."""
    for label in labels:
        if not 0 <= label < num_classes:
            raise ValueError(
                f"class label {label} is out of range: the model has {num_classes} classes, 0 to {num_classes - 1}"
            )


def resolve_cfg_scale(cfg_scale, model):
    """The guidance scale to use: 4 unless given, 1 for a model that knows no null class. Raises ValueError."""
    guidable = model.y_embedder.embedding_table.num_embeddings > model.num_classes
    if cfg_scale is None:
        return 4.0 if guidable else 1.0
    if cfg_scale != 1 and not guidable:
        raise ValueError(
            f"--cfg-scale {cfg_scale:g} needs a null class, and the model was trained without; only 1 is possible"
        )
    return cfg_scale


def resolve_cfg_interval(interval, cfg_scale):
    """(low, high), the times between which there is guidance: all unless given. Raises ValueError."""
    if interval is None:
        return WHOLE
    if cfg_scale == 1:
        raise ValueError("--cfg-interval has no effect with --cfg-scale 1, which is no guidance")
    if not interval[0] < interval[1]:
        raise ValueError(f"--cfg-interval {interval[0]:g} {interval[1]:g} is empty: LO must lie below HI")
    return tuple(interval)


def guide(pipeline, cfg_scale, interval=WHOLE):
    """The pipeline's model as a function (x, t, y) with classifier-free guidance, in its precision.

    The unconditional half is added here, so that samplers see a batch of N, not 2N. It is computed for times in the
    `interval` (low, high) alone, outside of which there is no guidance (Kynkäänniemi et al. 2024), and not at all with
    scale 1. All times of a call are the same. The function's attribute `evaluations` counts the halves computed.
    """
    model = pipeline.model

    def guided_model(x, t, y):
        t = t[:1]  # embedded once
        with compute.autocast(pipeline.device, pipeline.precision):
            if cfg_scale == 1 or (interval != WHOLE and not interval[0] <= t.item() <= interval[1]):
                guided_model.evaluations += 1
                output = model(x, t, y)
            else:
                guided_model.evaluations += 2
                null = torch.full_like(y, model.num_classes)
                doubled = (torch.cat([x, x]), t, torch.cat([y, null]))
                output = model.forward_with_cfg(*doubled, cfg_scale, pipeline.guided_channels)[: len(x)]
        # A copy: the next call of a model that is recorded as a CUDA graph writes over this one's output.
        return output.to(x.dtype, copy=True)

    guided_model.evaluations = 0
    return guided_model


class ImageNoise:
    """Standard normal noise for images by their index: row i depends on (seed, index i) alone, on any device.

    Each image has a stream of its own, from which `draw` and `randn_like` take turn by turn, so the noise that an image
    gets depends neither on the batch it is in nor on the number of processes. Drawn on the CPU, where it is the same on
    every machine.
    """

    def __init__(self, seed, indices, device):
        self.generators = [np.random.default_rng([seed, index]) for index in indices]
        self.device = device

    def draw(self, shape):
        """(N, *shape) float32."""
        rows = [torch.from_numpy(g.standard_normal(shape, dtype=np.float32)) for g in self.generators]
        return self._on_device(rows)

    def uniform(self, shape):
        """(N, *shape) float32 in [0, 1)."""
        return self._on_device([torch.from_numpy(g.random(shape, dtype=np.float32)) for g in self.generators])

    def _on_device(self, rows):
        rows = torch.stack(rows)
        if self.device.type == "cuda":  # from pinned memory, so that the host does not wait and draws the next ones
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)

    def randn_like(self, x):
        """Noise in the shape (N, ...) and dtype of x."""
        return self.draw(tuple(x.shape[1:])).to(x.dtype)


def make_sample_function(transport, mode, settings, noise):
    """The function of `Sampler` that `options.solver_settings` describes, drawing an SDE's noise from `noise`."""
    if mode == "ODE":
        return Sampler(transport).sample_ode(**settings)
    return Sampler(transport).sample_sde(**settings, randn_like=noise.randn_like)


def solver_group(settings, batch_size):
    """How many images are solved for together, those of consecutive numbers.

    Methods that adapt have one step size for all of them, so the number is fixed: else an image would depend on the
    size of the batch that it is in. The network still gets them in batches.
    """
    adapts = settings["sampling_method"] not in (*FIXED_STEP_ODE_METHODS, *SDE_METHODS)
    return ADAPTIVE_GROUP if adapts else batch_size


def in_batches(model, batch_size, bar, whole=False):
    """A function (x, t, y) that calls one of the kind batch by batch, tells the bar, and counts its calls: `calls`.

    With `whole`, it fills up the last batch, for a model that is compiled for one size.
    """

    def batched_model(x, t, y):
        batched_model.calls += 1
        bar.update()
        count = len(x)
        if whole and count % batch_size:
            rows = torch.arange(math.ceil(count / batch_size) * batch_size, device=x.device).clamp(max=count - 1)
            x, t, y = x[rows], t[rows], y[rows]
        batches = zip(x.split(batch_size), t.split(batch_size), y.split(batch_size), strict=True)
        return torch.cat([model(*batch) for batch in batches])[:count]

    batched_model.calls = 0
    return batched_model


@torch.no_grad()
def draw(
    pipeline,
    labels,
    *,
    mode,
    settings,
    cfg_scale,
    seed,
    cfg_interval=WHOLE,
    first_index=0,
    batch_size=64,
    show_progress=True,
):
    """Draw one latent per label.

    Args:
        labels: N class labels; image i of the call has the index first_index + i, which decides its noise.
        mode, settings: as from `options.solver_settings`.
        cfg_scale, cfg_interval: guidance scale, and the times between which there is guidance.
        batch_size: images that the network gets at a time.
        show_progress: a bar of network calls, on a terminal.

    Returns:
        (latents, counts): (N, channels, h, w); and {'network_calls_per_image', 'network_evaluations_per_image'}, a
        guided call being two evaluations: the most that any batch took.
    """
    model, device = pipeline.model, pipeline.device
    shape = (model.in_channels, model.input_size, model.input_size)
    drawn, most_calls, most_evaluations = [], 0, 0
    group = solver_group(settings, batch_size)
    starts = range(0, len(labels), group)
    calls_per_batch = make_sample_function(
        pipeline.transport, mode, settings, ImageNoise(seed, [], device)
    ).network_calls
    total = None if calls_per_batch is None else calls_per_batch * len(starts)
    with tqdm(total=total, unit=" network calls", leave=False, disable=None if show_progress else True) as bar:
        for start in starts:
            y = torch.tensor(labels[start : start + group], device=device)
            noise = ImageNoise(seed, range(first_index + start, first_index + start + len(y)), device)
            sample = make_sample_function(pipeline.transport, mode, settings, noise)
            guided_model = guide(pipeline, cfg_scale, cfg_interval)
            batched_model = in_batches(guided_model, batch_size, bar, whole=pipeline.compiled)
            drawn.append(sample(noise.draw(shape), batched_model, y=y)[-1])
            most_calls = max(most_calls, batched_model.calls)
            batches = math.ceil(len(y) / batch_size)
            most_evaluations = max(most_evaluations, guided_model.evaluations // batches)
    return torch.cat(drawn), dict(zip(COUNTS, (most_calls, most_evaluations), strict=True))


def decode(pipeline, drawn, batch_size=64):
    """uint8 images (N, H, W, C) on the CPU from what `draw` returns, `batch_size` at a time."""
    return torch.cat([to_uint8(pipeline.space.decode(part)) for part in drawn.split(batch_size)])


def generate(pipeline, labels, *, batch_size=64, **how):
    """Draw one image per label: `draw`, with its arguments, and `decode`. Returns (images, counts)."""
    drawn, counts = draw(pipeline, labels, batch_size=batch_size, **how)
    return decode(pipeline, drawn, batch_size), counts


class Background:
    """Calls functions in a thread, one after the other, on a stream of their own where there are streams.

    So that images are decoded and written while the next are drawn. A context manager; an exception that one raises is
    raised by a later `submit`, or at the end of the block.
    """

    MOST_WAITING = 2  # what they work on is memory

    def __init__(self, device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.waiting = collections.deque()

    def submit(self, function, *args):
        """Call function(*args) after what was submitted before; it must be done on the device when it returns."""
        if len(self.waiting) == self.MOST_WAITING:
            self.waiting.popleft().result()
        ready = None if self.stream is None else torch.cuda.current_stream(self.stream.device).record_event()
        self.waiting.append(self.thread.submit(self._call, ready, function, args))

    @torch.no_grad()
    def _call(self, ready, function, args):
        with torch.cuda.stream(self.stream):
            if ready is not None:
                self.stream.wait_event(ready)
            function(*args)

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        """Wait until all is done; after an error, for what has begun."""
        try:
            while self.waiting and error is None:
                self.waiting.popleft().result()
        finally:
            self.thread.shutdown(cancel_futures=True)


def to_uint8(images):
    """Images (N, C, H, W) in [-1, 1] as uint8 (N, H, W, C) on the CPU, rounded to the nearest grey level."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()


def check_output(path):
    """Raise ValueError where a grid could not be written to `path` when it is done."""
    if path.suffix != ".png":
        raise ValueError(f"--output {path} must end in .png")
    if not path.parent.is_dir():
        raise ValueError(f"--output {path}: the folder {path.parent} does not exist")
    for file in (path, path.with_suffix(".json")):
        if file.is_dir():
            raise ValueError(f"--output {path}: {file} is a folder")


def save_grid(images, path, columns, min_side=64):
    """Write uint8 images (N, H, W, C) as a grid, each enlarged by whole pixels to at least `min_side` pixels."""
    factor = math.ceil(min_side / images.shape[1])
    enlarged = images.repeat_interleave(factor, 1).repeat_interleave(factor, 2).permute(0, 3, 1, 2)
    grid = make_grid(enlarged, nrow=columns, padding=2, pad_value=255)  # repeats a grey channel three times
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


def describe(pipeline, *, mode, settings, cfg_scale, seed, cfg_interval=WHOLE):
    """What was done to make samples, as plain data: without it, figures of two runs cannot be compared."""
    guided_channels = pipeline.guided_channels or pipeline.model.in_channels
    return {
        "mode": mode,
        **settings,
        "cfg_scale": cfg_scale,
        "cfg_interval": list(cfg_interval) if cfg_scale != 1 else None,
        "guided_channels": min(guided_channels, pipeline.model.in_channels) if cfg_scale != 1 else 0,
        "channels": pipeline.model.in_channels,
        "precision": pipeline.precision,
        "model": pipeline.model_config,
        "path": type(pipeline.transport.path).__name__,
        "prediction": pipeline.transport.prediction,
        "sample_eps": pipeline.transport.sample_eps,
        "seed": seed,
    }


def summary(description):
    """One line for people from what `describe` returns and what `generate` counted."""
    d = description
    guidance = "no guidance"
    if d["cfg_scale"] != 1:
        low, high = d["cfg_interval"]
        where = "" if (low, high) == WHOLE else f" for t in [{low:g}, {high:g}]"
        guidance = f"guidance {d['cfg_scale']:g} on {d['guided_channels']} of {d['channels']} channels{where}"
    return (
        f"{d['mode']} {d['sampling_method']}, {d['network_calls_per_image']} network calls per image "
        f"({d['network_evaluations_per_image']} evaluations), {guidance}, {d['precision']}"
    )


def save_description(description, path):
    """Write what `describe` returns as JSON."""
    path.write_text(json.dumps(description, indent=2) + "\n")
