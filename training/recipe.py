"""The techniques of a training recipe beside plain SiT: their flags, and what these mean. All are off by default."""

import dataclasses
from collections.abc import Callable

from utils.command_line import flag_group


@dataclasses.dataclass
class Recipe:
    """What a run's recipe flags add to a training step."""

    loss_builders: list[Callable] = dataclasses.field(default_factory=list)  # functions of the model
    emas: list = dataclasses.field(default_factory=list)  # `EMA`s beside that of --ema-decay
    optimizer: dict = dataclasses.field(default_factory=dict)  # arguments of `build_optimizer`


def add_recipe_flags(parser):
    add = flag_group(parser, "recipe", "Techniques beside plain SiT; each is off by default.")


def read_recipe(flags, model, transport, source):
    """Return the `Recipe` of flags {key: value} for a model, a transport and the data. Raise ValueError."""
    recipe = Recipe()
    recipe.optimizer = dict(lr=flags["lr"], betas=flags["betas"] or (0.9, 0.999), weight_decay=flags["weight_decay"])
    return recipe
