"""Guidance rules: functions of (network, x, t, y) that return the guided output (N, C, H, W).

`network(x, t, y)` is a `Network`; a rule may call it, and the second network `network.guide` if the pipeline has one,
with any number of rows, which are counted as forward passes.
x (N, C, H, W) is x_t, t (1,) the time that all rows share, y (N,) their labels. To add a rule, write such a function
and give it to `SampleSettings(guidance=...)`."""

import torch

from utils.precision import autocast

WHOLE = (0.0, 1.0)  # the interval of all times


class Network:
    """The network of a pipeline in its precision, as guidance rules call it: (x, t, y) -> output in x's dtype.

    `num_classes` is the index of the null class, `guide` the `Network` of the pipeline's guide or None. A guide's
    output is converted to the `prediction` of the network that it guides. `rows` counts the rows of all calls of both.

    With `internal` = (scale, low, high) the output at times in [low, high] is inner + scale (output - inner), at no
    further row, where inner is what the network's inner head predicts (internal guidance, Zhou et al. 2025). A rule
    then applies to such outputs, classifier-free guidance as in the paper to both. `guided_channels` are as there."""

    def __init__(self, pipeline, prediction=None, internal=None):
        self.internal, self.guided_channels = internal, pipeline.guided_channels
        self.model, self.device, self.precision = pipeline.model, pipeline.device, pipeline.precision
        self.transport, self.prediction = pipeline.transport, prediction
        self.num_classes = pipeline.model.num_classes
        self.guide = pipeline.guide and Network(pipeline.guide, pipeline.transport.prediction)
        self.own_rows = 0

    @property
    def rows(self):
        return self.own_rows + (self.guide.rows if self.guide else 0)

    def __call__(self, x, t, y):
        self.own_rows += len(x)
        with autocast(self.device, self.precision):
            if self.internal is not None and is_within(t, *self.internal[1:]):
                output, (patches,) = self.model(x, t, y, hidden_blocks=("inner",))
                inner = self.model.unpatchify(patches)[:, : self.model.in_channels]
                return _extrapolate(inner.to(x.dtype), output.to(x.dtype), self.internal[0], self.guided_channels)
            output = self.model(x, t, y)
        # A copy: a model that is recorded as CUDA graphs overwrites its output in the next call.
        output = output.to(x.dtype, copy=True)
        return output if self.prediction is None else getattr(self.transport, self.prediction)(output, x, t)


def classifier_free(network, x, t, y, *, scale, channels=None):
    """Return unconditional + scale (conditional - unconditional): two forward passes as one batch.

    Ho & Salimans (2022), with their w = scale - 1. Only the leading `channels` are guided; None: all."""
    null = torch.full_like(y, network.num_classes)
    conditional, unconditional = network(torch.cat([x, x]), t, torch.cat([y, null])).chunk(2)
    return _extrapolate(unconditional, conditional, scale, channels)


def autoguidance(network, x, t, y, *, scale, channels=None):
    """Return guide + scale (network - guide), both for the labels: one forward pass of each.

    Karras et al. (2024, "Guiding a diffusion model with a bad version of itself"), with their w: the guide is a smaller
    or less trained network. Only the leading `channels` are guided; None: all."""
    return _extrapolate(network.guide(x, t, y), network(x, t, y), scale, channels)


def _extrapolate(worse, better, scale, channels):
    """Return worse + scale (better - worse) in the leading channels (None: all), and `better` in the others."""
    guided = worse[:, :channels] + scale * (better[:, :channels] - worse[:, :channels])
    return guided if channels is None else torch.cat([guided, better[:, channels:]], dim=1)


def in_interval(network, x, t, y, *, rule, low, high):
    """Apply a rule at times in [low, high], and no guidance outside (Kynkäänniemi et al. 2024)."""
    return rule(network, x, t, y) if is_within(t, low, high) else network(x, t, y)


def is_within(t, low, high):
    """Return whether a time t (1,) lies in [low, high], for which the host waits unless all times do."""
    return (low, high) == WHOLE or low <= t.item() <= high


def resolve_internal(words, model):
    """Return (W, LO, HI) of --internal-guidance, W or all three; None if not given, or for 1, which is no guidance.

    Raise ValueError if they are not such numbers, or the model has no inner head."""
    if words is None:
        return None
    name = f"--internal-guidance {' '.join(f'{word:g}' for word in words)}"
    if len(words) not in (1, 3):
        raise ValueError(f"{name} must be W or W LO HI")
    scale, low, high = (*words, *WHOLE)[:3]
    if not 0 <= low < high <= 1:
        raise ValueError(f"{name}: LO must lie below HI, and both in [0, 1]")
    if model.inner_head is None:
        raise ValueError(f"{name} needs a model with an inner head, trained with --inner-head")
    return None if scale == 1 else (scale, low, high)


def resolve_cfg_scale(cfg_scale, model, guide=None):
    """Return the guidance scale, by default 4, with a guide 2, without it and a null class 1.

    Raise ValueError if the scale needs a null class, and the model has none."""
    guidable = guide is not None or model.y_embedder.embedding_table.num_embeddings > model.num_classes
    if cfg_scale is None:
        return (4.0 if guide is None else 2.0) if guidable else 1.0
    if cfg_scale != 1 and not guidable:
        raise ValueError(f"--cfg-scale {cfg_scale:g} needs a null class, and the model has none; only 1 is possible")
    return cfg_scale


def check_guide(pipeline, *times):
    """Raise ValueError if the output of a pipeline's guide, as the network's prediction, is singular at a time."""
    its, ours = pipeline.guide.transport, pipeline.transport.prediction
    for t in torch.tensor(times, dtype=torch.float64):
        if not getattr(its, ours)(torch.ones(1), torch.ones(1), t[None]).isfinite():
            problem = (
                f"--guide-ckpt predicts {its.prediction}, which gives no {ours}, as the model predicts, at t = {t:g}"
            )
            raise ValueError(f"{problem}; keep off it by --sample-eps 1e-3 or --cfg-interval")
