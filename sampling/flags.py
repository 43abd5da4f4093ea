"""Flags of the sampling scripts: weights, interpolant, solver, guidance, speed."""

import os

import transport
from models import SiT_models
from utils import command_line
from utils.command_line import flag_group, flag_name, integer, location, number, one_of, size
from utils.files import named, read_json
from utils.precision import DTYPES
from utils.weights import TRANSPORT_KEYS
from vae import PRECISIONS

ODE_DEFAULTS = dict(sampling_method="dopri5", atol=1e-6, rtol=1e-3, reverse=False)
SDE_DEFAULTS = dict(
    sampling_method="Euler", diffusion_form="sigma", diffusion_norm=1.0, last_step="Mean", last_step_size=0.04
)
# Keys of the flags of `add_weights_flags` and `add_transport_flags`, of a guide, and of `add_solver_flags`.
WEIGHTS_FLAGS = ("ema", "model", "image_size", "num_classes", "num_heads", "vae", *TRANSPORT_KEYS)
GUIDE_FLAGS = ("guide_ckpt", "guide_ema")
SOLVER_FLAGS = ("num_sampling_steps", "time_grid", "time_shift", *(ODE_DEFAULTS | SDE_DEFAULTS))
FAR_OFF = 0.02  # of a time from an end of [0, 1], where images lack or keep noise
# For which a grid is tuned.
GRID_KEYS = ("mode", "path", "prediction", "sampling_method", "cfg_scale", "cfg_interval", "internal_guidance")


def add_sampling_flags(parser):
    """Add all flags of this file: those that sample.py and sample_ddp.py share."""
    add_weights_flags(parser)
    add_transport_flags(parser, from_checkpoint=True)
    add_solver_flags(parser)
    add = flag_group(parser, "guidance")
    scale = "guidance scale; 1 is none (default: 4; 2 with --guide-ckpt; 1 for a model without a null class)"
    add("--cfg-scale", number(), "S", scale)
    guide = "smaller or less trained model, to guide by it in place of the null class (autoguidance); as --ckpt"
    add("--guide-ckpt", location, "PATH|NAME|URL", guide)
    add("--guide-ema", str, "NAME|SIGMA_REL", "EMA of --guide-ckpt (default: ema)")
    interval = "guide at times in [LO, HI] alone; 0 is noise, 1 data (default: 0 1)"
    add("--cfg-interval", number(0, closed=1), ("LO", "HI"), interval, nargs=2)
    internal = "guide by the inner head of a model, too, by W (1 is none), at times in [LO, HI] alone (default: 0 1)"
    add("--internal-guidance", number(), "W [LO HI]", internal, nargs="+")
    channels = "leading channels that are guided (default: all for checkpoints of train.py; 3 for released weights)"
    add("--guided-channels", lambda text: text if text == "all" else integer(1)(text), "N|all", channels)
    add = flag_group(parser, "speed")
    add("--precision", one_of(*DTYPES), "|".join(DTYPES), "of the model's products (default: tf32 on a GPU, else fp32)")
    add("--vae-precision", one_of(*PRECISIONS), "fp32|bf16", "precision of the autoencoder", default="fp32")
    add("--compile", None, None, "compile the model: slower to start, faster to draw")


def add_weights_flags(parser, with_space=True):
    """Add the flags of weights; without `with_space` not --image-size and --vae, which the data's flags have."""
    text = "A checkpoint of train.py needs --ckpt alone; the other flags describe weights that come without a config."
    add = flag_group(parser, "weights", text)
    ckpt = "run or checkpoint folder, .pt, .safetensors, released model, hub name, URL (default: released, of --model)"
    add("--ckpt", location, "PATH|NAME|URL", ckpt)
    ema = "EMA of a checkpoint of train.py: its file's name, or a sigma_rel to reconstruct, as 0.13 (default: ema)"
    add("--ema", str, "NAME|SIGMA_REL", ema)
    names = f"one of {', '.join(SiT_models)} (default: by the weights' shapes; SiT-XL/2 without --ckpt)"
    add("--model", one_of(*SiT_models), "NAME", names)
    add("--num-classes", integer(1), "N", "number of classes (default: by the weights' shapes)")
    add("--num-heads", integer(1), "N", "attention heads (default: by the width, for the known sizes)")
    if with_space:
        sizes = "size of the images; positions are scaled to those of training (default: its; 256 without --ckpt)"
        add("--image-size", size, "PIXELS|HxW", sizes)
        vae = "autoencoder that decodes: ema or mse (stabilityai/sd-vae-ft-*), none for pixels, a hub name, a folder"
        add("--vae", location, "ema|mse|none|NAME|FOLDER", f"{vae} (default: the checkpoint's, or ema)")


def add_transport_flags(parser, from_checkpoint):
    """Add the arguments of `create_transport`, whose default is the checkpoint's value if `from_checkpoint`."""
    add = flag_group(parser, "interpolant")

    def add_choice(flag, choices, default, text):
        names = ["none" if choice is None else choice for choice in choices]
        if from_checkpoint:
            text, default = f"{text} (default: the checkpoint's, or {default or 'none'})", None
        elif default is None:
            text = f"{text} (default: none)"
        add(flag, one_of(*choices), "|".join(names), text, default=default)

    add_choice("--path-type", tuple(transport.PATHS), "Linear", "path between noise and data")
    add_choice("--prediction", transport.PREDICTIONS, "velocity", "prediction target of the network")
    add_choice("--loss-weight", transport.LOSS_WEIGHTS, None, "weight over time of noise and score losses")
    for flag, which in (("--train-eps", "training times stay"), ("--sample-eps", "sampling stays")):
        text = f"how far {which} from the path's singular ends (default: 0 to 1e-3, by path and prediction)"
        add(flag, number(0, 0.5), "EPS", text)


def add_solver_flags(parser):
    """Add the mode and the settings of the solver. A flag that is not given is None: see `solver_settings`."""
    parser.add_argument("mode", nargs="?", choices=["ODE", "SDE"], help="how to sample (default: ODE)")
    positive = number(0, exclude_minimum=True)
    add = flag_group(parser, "solver")
    methods = transport.ODE_METHODS | transport.SDE_METHODS
    costs = ", ".join(f"{name} {nfe}" for name, (_, nfe) in methods.items() if nfe)
    steps = f"time points, both ends included. NFE of a step: {costs}; an SDE's last step adds one (default: 250)"
    add("--num-sampling-steps", integer(2), "N", steps)
    ode, sde = (", ".join(methods) for methods in (transport.ODE_METHODS, transport.SDE_METHODS))
    add("--sampling-method", str, "METHOD", f"ODE: {ode} (default: dopri5); SDE: {sde} (default: Euler)")
    grid = f"time points: {', '.join(transport.TIME_GRIDS)}, a file of tune_grid.py, or the times (default: uniform)"
    add("--time-grid", location, "NAME|FILE.json|T", grid, nargs="+")
    add("--time-shift", positive, "S", "above 1: more time points near the noise, as larger images need (default: 1)")
    add = flag_group(parser, "ODE only")
    add("--atol", positive, "TOL", "absolute tolerance of adaptive methods (default: 1e-6)")
    add("--rtol", positive, "TOL", "relative tolerance of adaptive methods (default: 1e-3)")
    reverse = "ODE only: integrate from data to noise; the noise that is drawn stands in for the data"
    parser.add_argument("--reverse", action="store_true", default=None, help=reverse)
    add = flag_group(parser, "SDE only")
    add("--diffusion-form", str, "FORM", f"{', '.join(transport.DIFFUSION_FORMS)} (default: sigma)")
    add("--diffusion-norm", number(0), "W", "scale of the diffusion (default: 1)")
    last_steps = ["none" if step is None else step for step in transport.LAST_STEPS]
    add("--last-step", one_of(*last_steps), "|".join(last_steps), "last step, without noise (default: Mean)")
    add("--last-step-size", number(0, 1, exclude_minimum=True), "DT", "size of the last step in time (default: 0.04)")


def without_effect(changed, mode, solver, cfg_scale=None, in_pixels=False, more=()):
    """Return a line for each flag in `Parser.changed` that these settings, or `more` rules, leave without effect."""
    method = solver["sampling_method"]
    unguided = () if "internal_guidance" in changed else ("guided_channels",)
    adaptive, tolerant = (method in m for m in (transport.ADAPTIVE_ODE_METHODS, transport.TOLERANT_ODE_METHODS))
    rules = [
        *more,
        (True, ("train_eps", "loss_weight"), "on a trained network"),
        (adaptive, ("num_sampling_steps",), f"on {method}, which chooses its own steps"),
        (mode == "ODE" and not tolerant, ("atol", "rtol"), f"on {method}, whose steps are fixed"),
        (mode == "SDE" and solver.get("last_step") is None, ("last_step_size",), "with --last-step none"),
        (not isinstance(solver.get("time_grid", ""), str), ("last_step_size", "sample_eps"), "on a given --time-grid"),
        (cfg_scale == 1, (*unguided, *GUIDE_FLAGS), "with --cfg-scale 1, which is no guidance"),
        ("guide_ckpt" not in changed, ("guide_ema",), "without --guide-ckpt"),
        (in_pixels, ("vae_precision",), "on pixels, which need no autoencoder"),
    ]
    return command_line.without_effect(changed, rules)


def solver_settings(mode, given):
    """Return (mode, keyword arguments of `Sampler.sample_ode` or `.sample_sde`).

    `mode` is 'ODE', 'SDE' or None, which means 'ODE'; `given` holds the flags in SOLVER_FLAGS that were given. Raise
    ValueError if one has no effect on this mode or method."""
    mode = mode or "ODE"
    defaults = ODE_DEFAULTS if mode == "ODE" else SDE_DEFAULTS
    for key in given:
        if key not in (*defaults, "num_sampling_steps", "time_grid", "time_shift"):
            raise ValueError(f"{flag_name(key)} has no effect on {mode}; it belongs to the other mode")
    settings = {key: given.get(key, default) for key, default in defaults.items()}
    if settings.get("last_step") == "none":
        settings["last_step"] = None
    for key in ("time_grid", "time_shift"):
        if key in given and settings["sampling_method"] in transport.ADAPTIVE_ODE_METHODS:
            why = f"has no effect on {settings['sampling_method']}, which chooses its own steps"
            raise ValueError(f"{flag_name(key)} {why}")
    grid = {"num_steps": given.get("num_sampling_steps", 250), "time_shift": given.get("time_shift", 1.0)}
    if "time_grid" in given:
        grid |= time_grid_settings(given["time_grid"], given)
    return mode, settings | grid


def time_grid_settings(words, given):
    """Return {'time_grid', 'num_steps'} of --time-grid, a name or words as in `read_time_grid`; nothing if uniform."""
    if words in ("uniform", ["uniform"]):
        return {}
    grid, _ = read_time_grid(words)
    if "time_shift" in given:
        raise ValueError("--time-shift has no effect on a --time-grid other than uniform")
    if isinstance(grid, str):
        return {"time_grid": grid}
    if given.get("num_sampling_steps", len(grid)) != len(grid):
        raise ValueError(f"--num-sampling-steps {given['num_sampling_steps']}: --time-grid has {len(grid)} times")
    return {"time_grid": grid, "num_steps": len(grid)}


def read_time_grid(words):
    """Return the grid that words of --time-grid give, and what else its file holds, a dict.

    The words are a name in TIME_GRIDS, which is returned, or times, or the name of a JSON file that holds a list of
    times, or an object that has them as 'times'; then a list of floats is returned. Raise ValueError."""
    words = [words] if isinstance(words, str) else words
    times, made, name = words, {}, f"--time-grid {' '.join(map(str, words[:3]))}"
    if len(words) == 1 and words[0] in transport.TIME_GRIDS:
        return words[0], made
    if len(words) == 1 and os.path.isfile(words[0]):
        made = read_json(words[0], (dict, list))
        made = made if isinstance(made, dict) else {"times": made}
        times = made.get("times")
        if not isinstance(times, list):
            raise ValueError(f"{name} holds no list of 'times'")
    elif len(words) == 1 and words[0].endswith(".json"):
        raise ValueError(f"{name}: there is no such file")
    else:
        try:
            times = [float(word) for word in words]
        except ValueError:
            allowed = f"{', '.join(transport.TIME_GRIDS)}, a JSON file, or two times or more"
            raise ValueError(f"{name}: unknown time grid; choose from {allowed}") from None
    with named(name, ValueError):
        transport.check_times(times)
    return [float(t) for t in times], made


def grid_notes(words, description):
    """Return lines on a --time-grid that was made for other settings than `description`, or begins or ends far off."""
    times, made = read_time_grid(words) if words else ("", {})
    made = {"internal_guidance": None} | made if "cfg_scale" in made else made  # those with it alone name it
    other = [f"{key} {made[key]}" for key in GRID_KEYS if made.get(key, now := description.get(key)) != now]
    lines = [f"--time-grid {words[0]} was made for {', '.join(other)}"] if other else []
    if isinstance(times, list) and times[0] > FAR_OFF:
        lines.append(f"--time-grid begins at t = {times[0]:g}, and pure noise is x_t at t = 0")
    if isinstance(times, list) and times[-1] < 1 - FAR_OFF and not description.get("last_step"):
        lines.append(f"--time-grid ends at t = {times[-1]:g}, and data are x_t at t = 1")
    return lines
