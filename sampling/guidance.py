"""Guidance rules: functions of (network, x, t, y) that return the guided output (N, C, H, W).

`network(x, t, y)` is a `Network`; a rule may call it with any number of rows, which are counted as forward passes.
x (N, C, H, W) is x_t, t (1,) the time that all rows share, y (N,) their labels. To add a rule, write such a function
and give it to `SampleSettings(guidance=...)`."""

import torch

from utils.precision import autocast

WHOLE = (0.0, 1.0)  # the interval of all times


class Network:
    """The network of a pipeline in its precision, as guidance rules call it: (x, t, y) -> output in x's dtype.

    `rows` counts the rows of all calls. `num_classes` is the index of the null class."""

    def __init__(self, pipeline):
        self.model, self.device, self.precision = pipeline.model, pipeline.device, pipeline.precision
        self.num_classes = pipeline.model.num_classes
        self.rows = 0

    def __call__(self, x, t, y):
        self.rows += len(x)
        with autocast(self.device, self.precision):
            output = self.model(x, t, y)
        # A copy: a model that is recorded as CUDA graphs overwrites its output in the next call.
        return output.to(x.dtype, copy=True)


def classifier_free(network, x, t, y, *, scale, channels=None):
    """Return unconditional + scale (conditional - unconditional): two forward passes as one batch.

    Ho & Salimans (2022), with their w = scale - 1. Only the leading `channels` are guided; None: all."""
    null = torch.full_like(y, network.num_classes)
    conditional, unconditional = network(torch.cat([x, x]), t, torch.cat([y, null])).chunk(2)
    guided = unconditional[:, :channels] + scale * (conditional[:, :channels] - unconditional[:, :channels])
    return guided if channels is None else torch.cat([guided, conditional[:, channels:]], dim=1)


def in_interval(network, x, t, y, *, rule, low, high):
    """Apply a rule at times in [low, high], and no guidance outside (Kynkäänniemi et al. 2024)."""
    return rule(network, x, t, y) if low <= t.item() <= high else network(x, t, y)


def resolve_cfg_scale(cfg_scale, model):
    """Return the guidance scale, by default 4, or 1 without a null class. Raise ValueError if it needs one."""
    guidable = model.y_embedder.embedding_table.num_embeddings > model.num_classes
    if cfg_scale is None:
        return 4.0 if guidable else 1.0
    if cfg_scale != 1 and not guidable:
        raise ValueError(f"--cfg-scale {cfg_scale:g} needs a null class, and the model has none; only 1 is possible")
    return cfg_scale
