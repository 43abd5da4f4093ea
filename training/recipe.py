"""The techniques of a training recipe beside plain SiT: their flags, and what these mean. All are off by default."""

import dataclasses
import functools
from collections.abc import Callable

from training.alignment import alignment_builder
from training.losses import DirectionLoss, InnerHead
from training.step import PowerEMA
from utils import posthoc
from utils.command_line import flag_group, flag_name, integer, location, number, one_of
from utils.encoders import DINOV2


@dataclasses.dataclass
class Recipe:
    """What a run's recipe flags add to a training step."""

    loss_builders: list[Callable] = dataclasses.field(default_factory=list)  # functions of the model
    emas: list = dataclasses.field(default_factory=list)  # `EMA`s beside that of --ema-decay
    route: tuple | None = None  # (FROM, TO, share): in training a share of the tokens skips blocks[FROM:TO]
    optimizer: dict = dataclasses.field(default_factory=dict)  # arguments of `build_optimizer`
    notes: list[str] = dataclasses.field(default_factory=list)  # lines for the log


def add_recipe_flags(parser):
    add = flag_group(parser, "recipe", "Techniques beside plain SiT; each is off by default.")
    route = "in training, a random share of an image's tokens skips the blocks after FROM of them up to TO (TREAD)"
    add("--route", number(0), ("FROM", "TO", "SHARE"), route, nargs=3)
    weight = "factor of the loss of the head of --inner-head (default: 0.5)"
    add("--inner-head-weight", number(0, exclude_minimum=True), "W", weight)
    lengths = "keep snapshots at checkpoints, from which --ema 0.13 makes EMAs of any length (Karras et al. 2024)"
    add("--ema-snapshots", one_of("float32", "float16"), "float32|float16", lengths, nargs="?", const="float32")
    angle = "add 1 - cosine of predicted and true velocity, times W (1 if it is left out)"
    add("--direction-loss", number(0, exclude_minimum=True), "W", angle, nargs="?", const=1.0)
    encoder = "align hidden states with patch features of a frozen encoder (REPA, Yu et al. 2025), a model of timm or"
    encoder = f"{encoder} a folder of one (without a value: {DINOV2})"
    add("--align", location, "ENCODER", encoder, nargs="?", const=DINOV2)
    add("--align-block", integer(1), "K", "of the states after K blocks (default: a third of the depth, at most 8)")
    projector = "REPA's MLP, or the 3 x 3 convolution of iREPA (Singh et al. 2025), with its normalised features"
    add("--align-projector", one_of("mlp", "conv"), "mlp|conv", projector, default="mlp")
    width = "of the MLP's hidden layers (default: REPA's 2048; 512 for models narrower than its B, to stay fast)"
    add("--align-width", integer(1), "N", width)
    add("--align-weight", number(0, exclude_minimum=True), "W", "factor of this loss", default=0.5)
    until = "leave it out after STEP steps (HASTE, Wang et al. 2025); images or features are read on"
    add("--align-until", integer(1), "STEP", f"{until} (default: never)")
    kinds = "muon: for the matrices of the blocks, with AdamW for the rest"
    add("--optimizer", one_of("adamw", "muon"), "adamw|muon", kinds, default="adamw")


def read_recipe(flags, model, transport, source):
    """Return the `Recipe` of flags {key: value} for a model, a transport and the data. Raise ValueError."""
    recipe = Recipe(route=read_route(flags["route"], len(model.blocks)))
    if model.inner_head is not None:
        head = functools.partial(InnerHead, transport=transport, weight=flags["inner_head_weight"] or 0.5)
        recipe.loss_builders.append(head)
    if flags["direction_loss"]:
        recipe.loss_builders.append(lambda model: DirectionLoss(transport, flags["direction_loss"]))
    recipe.optimizer = dict(lr=flags["lr"], betas=flags["betas"] or (0.9, 0.999), weight_decay=flags["weight_decay"])
    if flags["optimizer"] == "muon":
        recipe.optimizer["muon"] = True
    if flags["ema_snapshots"]:
        recipe.emas += [PowerEMA(name, sigma_rel) for name, sigma_rel in posthoc.TRACKED.items()]
    if flags["align"]:
        recipe.loss_builders.append(alignment_builder(flags, model, source, recipe.route))
    used = [key for key in ("route", "direction_loss", "align", "ema_snapshots", "inner_head") if flags[key]]
    used += ["optimizer"] if flags["optimizer"] != "adamw" else []
    words = {key: flags[key] if isinstance(flags[key], list) else [flags[key]] for key in used}
    text = ", ".join(" ".join(map(str, [flag_name(key), *values])) for key, values in words.items())
    recipe.notes += [f"recipe {text}"] if text else []
    return recipe


def read_route(words, depth):
    """Return (FROM, TO, share) of --route, three numbers; None if it is not given, or no token skips a block.

    Raise ValueError if they do not fit a model of `depth` blocks."""
    if words is None:
        return None
    start, end, share = words
    if not (start.is_integer() and end.is_integer() and start < end <= depth and share < 1):
        allowed = f"FROM and TO are integers with 0 <= FROM < TO <= {depth}, the depth, and SHARE lies in [0, 1)"
        raise ValueError(f"--route {start:g} {end:g} {share:g}: {allowed}")
    return (int(start), int(end), share) if share else None
