"""Draw images by their index: image i depends on (seed, i) alone, not on batches, ranks or restarts."""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm

from sampling import guidance
from transport import ODE_METHODS, SDE_METHODS, Sampler
from transport.integrators import check_tolerances
from utils.grids import to_uint8

ADAPTIVE_GROUP = 64  # images
LABEL_STREAM = 1 << 32  # beyond any image's index, since noise is drawn from (seed, index)


@dataclasses.dataclass(frozen=True)
class SampleSettings:
    """All that decides samples of a pipeline, apart from their labels and indices."""

    mode: str = "ODE"  # or 'SDE'
    solver: dict = dataclasses.field(default_factory=dict)  # arguments of `Sampler.sample_ode` or `.sample_sde`
    cfg_scale: float = 1.0  # of classifier-free guidance, or of autoguidance if the pipeline has a guide; 1 is none
    cfg_interval: tuple = guidance.WHOLE  # the times between which to guide
    seed: int = 0  # of the noise of all images
    guidance: Callable | None = None  # a rule of sampling/guidance.py in place of classifier-free guidance
    internal_guidance: tuple | None = None  # (scale, low, high) of `guidance.Network`

    def sampler(self, transport, noise=None):
        """Return the sampling function of `Sampler`; `noise` is the `ImageNoise` of an SDE. Raise ValueError."""
        if self.mode == "ODE":
            return Sampler(transport).sample_ode(**self.solver)
        return Sampler(transport).sample_sde(**self.solver, **({"randn_like": noise.randn_like} if noise else {}))

    def rule(self, channels, has_guide=False):
        """Return the guidance rule, that of `cfg_scale` on this many leading channels; None: all."""
        if self.guidance is not None:
            return self.guidance
        if self.cfg_scale == 1:
            return lambda network, x, t, y: network(x, t, y)
        rule = guidance.autoguidance if has_guide else guidance.classifier_free
        rule = functools.partial(rule, scale=self.cfg_scale, channels=channels)
        if self.cfg_interval == guidance.WHOLE:
            return rule
        low, high = self.cfg_interval
        return functools.partial(guidance.in_interval, rule=rule, low=low, high=high)

    def group_size(self, batch_size):
        """Return how many images of consecutive indices one solve takes: a fixed number if the solver adapts its steps.

        Its steps depend on all images of a solve, and an image must not depend on the batch size."""
        methods = ODE_METHODS if self.mode == "ODE" else SDE_METHODS
        _, nfe_per_step = methods[self.solver["sampling_method"]]
        return ADAPTIVE_GROUP if nfe_per_step is None else batch_size


def resolve_settings(pipeline, mode, solver, cfg_scale, cfg_interval, seed, internal_guidance=None):
    """Return the `SampleSettings` of flags, which are None where not given. Raise ValueError if they do not fit."""
    if mode == "ODE":
        check_tolerances(solver["sampling_method"], solver["atol"], solver["rtol"], torch.float32)  # of the noise
    cfg_scale = guidance.resolve_cfg_scale(cfg_scale, pipeline.model, pipeline.guide)
    if cfg_interval is not None and cfg_scale == 1:
        raise ValueError("--cfg-interval has no effect with --cfg-scale 1, which is no guidance")
    low, high = cfg_interval or guidance.WHOLE
    if not low < high:
        raise ValueError(f"--cfg-interval {low:g} {high:g} is empty: LO must lie below HI")
    internal = guidance.resolve_internal(internal_guidance, pipeline.model)
    settings = SampleSettings(mode, solver, cfg_scale, (low, high), seed, internal_guidance=internal)
    settings.sampler(pipeline.transport)
    if pipeline.guide is not None and cfg_scale != 1:
        grid = solver.get("time_grid")
        t0, t1 = (grid[0], grid[-1]) if isinstance(grid, list) else pipeline.transport.ode_interval()
        guidance.check_guide(pipeline, max(t0, low), min(t1, high))
    return settings


class ImageNoise:
    """Standard normal noise of images by their index: row i depends on (seed, index i) alone, on any device.

    Each image has its own stream of random numbers, drawn on the CPU, where it is the same on every machine."""

    def __init__(self, seed, indices, device):
        self.generators = [np.random.default_rng([seed, index]) for index in indices]
        self.device = device

    def draw(self, shape, kind="standard_normal"):
        """Return the next numbers of each image, (N, *shape) float32: normal, or by 'random' uniform in [0, 1)."""
        rows = [getattr(generator, kind)(shape, dtype=np.float32) for generator in self.generators]
        rows = torch.stack([torch.from_numpy(row) for row in rows])
        if self.device.type == "cuda":  # copied from pinned memory, the host does not wait
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)

    def randn_like(self, x):
        """Return the next normal numbers of each image in the shape (N, ...) and dtype of x."""
        return self.draw(tuple(x.shape[1:])).to(x.dtype)


class GuidedModel:
    """A guided network as solvers call it: (x, t, y) -> output, computed batch by batch.

    A compiled network gets batches of one size: the last one is filled up with copies of its last row. `nfe` counts
    calls, and `forward_passes` those of the networks per image, two for a call with guidance."""

    def __init__(self, pipeline, rule, batch_size, bar, internal_guidance=None):
        self.network, self.rule = guidance.Network(pipeline, internal=internal_guidance), rule
        self.batch_size, self.fill, self.bar = batch_size, pipeline.compiled, bar
        self.nfe, self.forward_passes = 0, 0

    def __call__(self, x, t, y):
        self.nfe, count = self.nfe + 1, len(x)
        self.bar.update()
        if self.fill and count % self.batch_size:
            rows = torch.arange(math.ceil(count / self.batch_size) * self.batch_size, device=x.device)
            x, y = x[rows.clamp(max=count - 1)], y[rows.clamp(max=count - 1)]
        t = t[:1]  # all times are equal, and one is embedded
        batches = zip(x.split(self.batch_size), y.split(self.batch_size), strict=True)
        output = torch.cat([self.rule(self.network, part, t, labels) for part, labels in batches])[:count]
        self.forward_passes = self.network.rows // len(x)
        return output


@torch.no_grad()
def draw(pipeline, labels, settings, *, first_index=0, batch_size=64, show_progress=True, record=None):
    """Draw one latent per label; image k of this call has the index first_index + k, which decides its noise.

    The network gets `batch_size` images at a time; `record`, a `trajectory.Record`, sees the evaluations. Return
    (latents (N, C, h, w), {'nfe', 'forward_passes'} per image, the most of any solve)."""
    drawn, nfe, forward_passes = [], 0, 0
    group, rule = settings.group_size(batch_size), settings.rule(pipeline.guided_channels, pipeline.guide is not None)
    starts = range(0, len(labels), group)
    nfe_per_solve = settings.sampler(pipeline.transport).nfe
    total = None if nfe_per_solve is None else nfe_per_solve * len(starts)
    with tqdm(total=total, unit=" NFE", leave=False, disable=None if show_progress else True) as bar:
        for start in starts:
            y = torch.tensor(labels[start : start + group], device=pipeline.device)
            indices = range(first_index + start, first_index + start + len(y))
            noise = ImageNoise(settings.seed, indices, pipeline.device)
            sample = settings.sampler(pipeline.transport, noise)
            model = GuidedModel(pipeline, rule, batch_size, bar, settings.internal_guidance)
            watched = model if record is None else record.watch(model, len(y))
            drawn.append(sample(noise.draw(pipeline.latent_shape), watched, y=y)[-1])
            nfe, forward_passes = max(nfe, model.nfe), max(forward_passes, model.forward_passes)
    return torch.cat(drawn), {"nfe": nfe, "forward_passes": forward_passes}


class NotFinite(ValueError):
    """Samples are NaN or infinite, so that they are no images."""


def decode(pipeline, drawn, batch_size=64):
    """Decode latents (N, C, h, w) to uint8 images (N, H, W, C) on the CPU, `batch_size` at a time.

    Raise NotFinite if latents or images are not finite."""
    images = []
    for part in drawn.split(batch_size):
        decoded = pipeline.space.decode(part)
        if not (part.isfinite().all() and decoded.isfinite().all()):
            raise NotFinite("the network's output is not finite")
        images.append(to_uint8(decoded))
    return torch.cat(images)


def generate(pipeline, labels, settings, *, batch_size=64, **more):
    """Draw and decode one image per label; arguments as for `draw`. Return (uint8 images (N, H, W, C), counts).

    Raise NotFinite if they are not finite."""
    drawn, counts = draw(pipeline, labels, settings, batch_size=batch_size, **more)
    return decode(pipeline, drawn, batch_size), counts


def draw_labels(count, num_classes, seed, balanced):
    """Return (count,) int64 labels: uniform at random, label i by (seed, i) alone; or each class in turn."""
    if balanced:
        return np.arange(count) % num_classes
    return np.random.default_rng([seed, LABEL_STREAM]).integers(0, num_classes, count)


def describe(pipeline, settings):
    """Return, as plain data, what decides samples; metrics compare only where this is equal."""
    channels, guided, guide = pipeline.model.in_channels, settings.cfg_scale != 1, pipeline.guide
    description = {
        "mode": settings.mode,
        **settings.solver,
        "cfg_scale": settings.cfg_scale,
        "cfg_interval": list(settings.cfg_interval) if guided else None,
        "guided_channels": min(pipeline.guided_channels or channels, channels) if guided else 0,
        "channels": channels,
        "precision": pipeline.precision,
        "model": pipeline.model_config,
        "path": type(pipeline.transport.path).__name__,
        "prediction": pipeline.transport.prediction,
        "sample_eps": pipeline.transport.sample_eps,
        "seed": settings.seed,
    }
    rule = settings.guidance
    named = {"guidance": f"{getattr(rule, 'func', rule).__name__} {getattr(rule, 'keywords', {})}"} if rule else {}
    if guide is not None and (guided or rule):
        named["guide"] = {"model": guide.model_config, "prediction": guide.transport.prediction}
    if settings.internal_guidance is not None:
        named["internal_guidance"] = list(settings.internal_guidance)
        named["guided_channels"] = min(pipeline.guided_channels or channels, channels)
    return description | named


def _during(low, high):
    return "" if (low, high) == guidance.WHOLE else f" for t in [{low:g}, {high:g}]"


def summary(description):
    """Return one line on a description with counts: method, NFE, guidance, precision, path and prediction.

    A description with a guide may hold 'guide_ckpt', its name."""
    d = description
    rules = [d["guidance"]] if "guidance" in d else []
    if "guidance" not in d and d["cfg_scale"] != 1:
        auto, by = ("auto", f" by {d.get('guide_ckpt', 'another model')}") if "guide" in d else ("", "")
        channels = f"{d['guided_channels']} of {d['channels']} channels"
        rules = [f"{auto}guidance {d['cfg_scale']:g}{by} on {channels}{_during(*d['cfg_interval'])}"]
    if "internal_guidance" in d:
        scale, *interval = d["internal_guidance"]
        rules.append(f"internal guidance {scale:g}{_during(*interval)}")
    times = d.get("time_grid")
    grid = f", {times} grid" if isinstance(times, str) else f", {len(times)} given times" if times else ""
    trained = f", {d['path'].removesuffix('Path')} {d['prediction']}" if "path" in d else ""
    return (
        f"{d['mode']} {d['sampling_method']}{grid}, {d['nfe']} NFE ({d['forward_passes']} forward passes), "
        f"{', '.join(rules) or 'no guidance'}, {d['precision']}{trained}"
    )
