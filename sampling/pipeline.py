"""From a checkpoint to a network, a transport and a latent space that fit together."""

import dataclasses
import hashlib

import torch

import vae as autoencoders
from models import SIZES, SiT, SiT_models
from transport import Transport, create_transport
from utils import distributed, hub, precision
from utils.command_line import flag_name
from utils.files import named, one_line
from utils.sizes import pair, scaled, size_name
from utils.weights import (
    TRANSPORT_KEYS,
    build_model,
    build_on_meta,
    class_names,
    load_weights,
    model_config_from_shapes,
)

# The classes of the official sample.py: golden retriever, otter, red panda, geyser, macaw, valley, balloon, arctic fox.
SHOWN_IMAGENET_CLASSES = [207, 360, 387, 974, 88, 979, 417, 279]


@dataclasses.dataclass
class Pipeline:
    """A network in evaluation mode, the transport and the latent space that it was trained with, on one device."""

    model: SiT
    transport: Transport
    space: autoencoders.PixelSpace | autoencoders.LatentSpace
    device: torch.device
    guided_channels: int | None  # leading channels that classifier-free guidance acts on; None: all
    model_config: dict = dataclasses.field(default_factory=dict)  # arguments of SiT
    class_names: list | None = None  # (num_classes,) str; None if unknown
    precision: str = "fp32"  # see `speed_up`
    compiled: bool = False
    guide: "Pipeline | None" = None  # of a second network, for autoguidance

    @property
    def latent_shape(self):
        """(C, H, W) of what the network draws."""
        return self.model.in_channels, *pair(self.model.input_size)

    @property
    def image_shape(self):
        """(H, W, C) of the decoded images."""
        height, width = pair(scaled(self.model.input_size, self.space.downsampling))
        return height, width, self.model.in_channels if self.space.in_pixels else 3

    def speed_up(self, dtype_name, compiled):
        """Compute in a precision of `precision.DTYPES`, compiled or not. The networks are changed in place."""
        for pipeline in filter(None, (self, self.guide)):
            precision.prepare_inference(pipeline.model, self.device, dtype_name, compiled)
            pipeline.precision, pipeline.compiled = dtype_name, compiled

    def digests(self):
        """Return what identifies the networks: SHA-256 of the weights, and of the VAE with its scale and shift."""
        space = self.space
        vae = {} if space.in_pixels else {"sha256": _digest(space.model), "scale": space.scale, "shift": space.shift}
        guide = {} if self.guide is None else {"guide_sha256": _digest(self.guide.model)}
        return {"weights_sha256": _digest(self.model), "vae": vae} | guide


def _digest(model):
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def load_pipeline(
    ckpt, device, guided_channels=None, vae_precision="fp32", ema="ema", guide_ckpt=None, guide_ema="ema", **given
):
    """Load a checkpoint as a `Pipeline`, with a second one as its guide if `guide_ckpt` is given.

    `ckpt` is as `hub.resolve` takes it; None means the released weights of given['model'] at given['image_size'].
    `guided_channels` is a number or 'all'; None means all for checkpoints of train.py and REPA, 3 for others. `given`
    are flags of `flags.WEIGHTS_FLAGS`, which describe weights without a config. Rank 0 says what it loads and assumes.
    Raise ValueError if the weights are missing or do not fit, a flag contradicts them, or the guide is of other latents
    or classes, or of another path."""
    weights = _read(ckpt or f"{given.get('model', 'SiT-XL/2')}-{size_name(given.get('image_size', 256))}", ema)
    latents = weights.config.get("latents", {})  # has a scale and a shift if these are not the autoencoder's own
    vae = given.get("vae") or latents.get("vae", "ema")
    if distributed.rank() == 0:
        for note in [*weights.notes, *_assumptions(weights, given)]:
            print(note, flush=True)
    config, model, transport = _build(weights, given)
    downsampling, channels = autoencoders.geometry(vae, model.in_channels)
    image_size = scaled(model.input_size, downsampling)
    if weights.config.get("project") and latents.get("image_size", image_size) != image_size:
        pixels = size_name(image_size)
        makes = f"trained at resolution {latents['image_size']}, with --vae {vae} they make {pixels} pixels"
        raise ValueError(f"{weights.path} holds {weights.config['project']}; {makes}")
    if channels != model.in_channels:
        raise ValueError(f"the weights take {model.in_channels} channels, but --vae {vae} makes {channels}")
    if given.get("image_size", image_size) != image_size:
        config, model = _at_another_size(weights, config, model, given["image_size"], downsampling)
    if guided_channels not in (None, "all") and guided_channels > model.in_channels:
        raise ValueError(f"--guided-channels {guided_channels}: the model has {model.in_channels}")
    guided_channels = guided_channels or weights.guided_channels
    guided_channels = None if guided_channels == "all" else guided_channels
    scaling = latents.get("scale"), latents.get("shift")
    space = autoencoders.open_space(vae, device, autoencoders.PRECISIONS[vae_precision], *scaling)
    model, names = _filled(model, weights, device), class_names(weights.config)
    pipeline = Pipeline(model, transport, space, device, guided_channels, config, class_names=names)
    if guide_ckpt is not None:
        pipeline.guide = _load_guide(pipeline, scaling, guide_ckpt, guide_ema, given)
    return pipeline


def _load_guide(pipeline, scaling, ckpt, ema, given):
    """Return the `Pipeline` of a checkpoint that can guide another; what it does not say is taken to be as there.

    `scaling` are scale and shift of the other's latents, None for the autoencoder's own."""
    weights, path_type = _read(ckpt, ema), type(pipeline.transport.path).__name__.removesuffix("Path")
    known, latents = (weights.config.get(part, {}) for part in ("transport", "latents"))
    trained = {"path_type": path_type, "prediction": pipeline.transport.prediction}
    assumed = {key: value for key, value in trained.items() if key not in known}
    if distributed.rank() == 0:
        more = [f"{weights.path} does not say how it was trained; assumed: as the model"] if assumed else []
        for note in [*weights.notes, *more]:
            print(note, flush=True)
    if not weights.own:
        shape = weights.state_dict.get("y_embedder.embedding_table.weight", torch.empty(0)).shape
        rows, width = (*shape, 0, 0)[:2]
        assumed |= {"num_classes": rows} if rows == pipeline.model.num_classes else {}
        if width == pipeline.model_config["hidden_size"] or all(
            size["hidden_size"] != width for size in SIZES.values()
        ):
            assumed |= {key: given[key] for key in ("num_heads",) if key in given}
    config, model, transport = _build(weights, assumed)
    if pipeline.model_config.get("trained_size") and model.input_size != pipeline.model.input_size:
        config, model = _at_another_size(weights, config, model, scaled(pipeline.model.input_size))
    guide = dataclasses.replace(pipeline, model=model, transport=transport, model_config=config)
    vae, space = latents.get("vae", autoencoders.UNKNOWN_VAE), pipeline.space.name
    is_known = vae != autoencoders.UNKNOWN_VAE
    pairs = [
        ("latent shape", guide.latent_shape, pipeline.latent_shape),
        ("number of classes", model.num_classes, pipeline.model.num_classes),
        ("path", type(transport.path).__name__.removesuffix("Path"), path_type),
        ("VAE", autoencoders.full_name(vae) if is_known else space, space),
        ("latents' (scale, shift)", (latents.get("scale"), latents.get("shift")) if is_known else scaling, scaling),
    ]
    for name, its, ours in pairs:
        if its != ours:
            raise ValueError(f"--guide-ckpt {ckpt} cannot guide this model: its {name} is {its}, the model's {ours}")
    _filled(model, weights, pipeline.device)
    return guide


def _read(ckpt, ema):
    """Return the weights that `ckpt` names. Rank 0 says that it loads them."""
    if distributed.rank() == 0:
        print(f"loading {ckpt}", flush=True)
    return load_weights(hub.resolve(ckpt), ema)


def _build(weights, given):
    """Return (arguments of SiT, the SiT on the meta device, its transport). Raise ValueError if weights do not fit."""
    try:
        config = _model_config(weights, given)
        return config, build_model(config, weights), create_transport(**_transport_config(weights, given))
    except (TypeError, KeyError, AttributeError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"{weights.path}: its configuration is damaged: {one_line(error)}") from error


def _at_another_size(weights, config, trained, image_size, downsampling=1):
    """Return (arguments of SiT, the SiT on the meta device) of weights for images of another size than `trained`.

    The positions of the tokens are scaled to those of training; rank 0 says so. Raise ValueError if the size does not
    divide, or the weights' own positions are no sines and cosines."""
    multiple, trained_size = downsampling * trained.patch_size, scaled(trained.input_size)
    pixels = size_name(scaled(trained_size, downsampling))
    problem = f"--image-size {size_name(image_size)} contradicts the weights, which make {pixels} pixels"
    if any(side % multiple for side in pair(image_size)):
        raise ValueError(f"{problem}; another size must be a multiple of {multiple}")
    if not torch.allclose(weights.state_dict["pos_embed"].float(), trained.sincos_positions(), atol=1e-2):
        raise ValueError(f"{problem}; their positions are no sines and cosines, which alone can be scaled")
    sizes = dict(input_size=scaled(image_size, down=downsampling), trained_size=trained_size)
    config = config | sizes | {key: value for key, value in config.items() if key == "trained_size" and value}
    model = build_on_meta(SiT, config)
    weights.state_dict["pos_embed"] = model.sincos_positions()
    if distributed.rank() == 0:
        grids = (" x ".join(map(str, network.x_embedder.grid_size)) for network in (trained, model))
        print("positions resampled from {} to {} tokens".format(*grids), flush=True)
    return config, model


def _filled(model, weights, device):
    """Give a model on the meta device memory and its weights, in place, and return it in evaluation mode."""
    model.to_empty(device=device).load_state_dict(weights.state_dict)
    return model.eval().requires_grad_(False)


def _model_config(weights, given):
    """Return SiT's arguments, from the checkpoint or by shapes. Flags must agree, or say what shapes do not."""
    name = given.get("model") or weights.config.get("model_name")
    size = SiT_models[name].keywords if name in SiT_models else {}
    if weights.own:
        config = weights.config["model"]
    else:
        num_classes = weights.config.get("num_classes") or given.get("num_classes")
        with named(weights.path, ValueError):
            shapes = model_config_from_shapes(weights.state_dict, num_classes)
        if "model" not in given and size.get("hidden_size") != shapes["hidden_size"]:
            size = {}  # another project's model of this name
        config = {"num_heads": size.get("num_heads")} | shapes
        config["num_heads"] = given.get("num_heads", config["num_heads"])
        if config["num_heads"] is None:
            width = f"{weights.path} has width {config['hidden_size']}, which is none of S, B, L, XL"
            raise ValueError(f"{width}, so its number of attention heads cannot be inferred; give --num-heads")
    if "model" in given:
        for key, value in size.items():
            if config[key] != value:
                raise ValueError(f"--model {name} contradicts the weights: their {key} is {config[key]}, not {value}")
    for key in ("num_classes", "num_heads"):
        if given.get(key, config[key]) != config[key]:
            raise ValueError(f"{flag_name(key)} {given[key]} contradicts the weights: it is {config[key]}")
    return config


def _assumptions(weights, given):
    """Return lines for the user on what weights and flags do not say; none if they say all."""
    rows = weights.state_dict.get("y_embedder.embedding_table.weight", torch.empty(0)).shape[:1]
    lines = []
    if not weights.own and rows == (given.get("num_classes"),):
        lines.append(f"{weights.path} has embeddings of {rows[0]} labels: none of them is taken for the null class")
    known = weights.config.get("transport", {}) | weights.config.get("latents", {}) | given
    assumed = {"path_type": "Linear", "prediction": "velocity", "vae": "ema"}
    missing = {key: value for key, value in assumed.items() if key not in known}
    if missing and rows and not (weights.own or weights.config.get("num_classes") or "num_classes" in given):
        missing["num_classes"] = f"{rows[0] - 1} (one label more is the null class)"
    values = ", ".join(f"{flag_name(key)} {value}" for key, value in missing.items())
    if missing:
        problem = f"{weights.path} does not say how it was trained; assumed: {values}"
        lines.append(f"{problem}. Give these flags if it was otherwise")
    return lines


def _transport_config(weights, given):
    """Return the arguments of create_transport: flags first, but what the network was trained for must not change."""
    config = weights.config.get("transport", {})
    for key in ("path_type", "prediction"):
        if key in config and given.get(key, config[key]) != config[key]:
            raise ValueError(f"{flag_name(key)} {given[key]} contradicts the checkpoint, trained with {config[key]}")
    return config | {key: given[key] for key in TRANSPORT_KEYS if key in given}


def default_labels(num_classes):
    """Return the classes that a grid shows by default."""
    return SHOWN_IMAGENET_CLASSES if num_classes == 1000 else list(range(min(num_classes, 10)))
