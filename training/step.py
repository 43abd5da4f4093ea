"""One training step: its random numbers, forward and backward, optimizer and EMAs."""

import copy
import dataclasses
import itertools
import math
import re

import torch

from training.muon import Muon, parameter_groups
from utils import checkpoint, distributed, posthoc, precision


@dataclasses.dataclass
class EMA:
    """An exponential moving average of the weights; one whose decay is no constant overrides `decay_at`."""

    name: str  # of its file in a checkpoint, NAME.pt, and for --ema NAME
    decay: float  # per step
    warmup: bool = True  # use a smaller decay at first, (1 + n) / (10 + n) at step n

    def decay_at(self, step):
        """Return the decay of the update after `step` others."""
        n = step + 1
        return min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay


class PowerEMA(EMA):
    """A power-function average (Karras et al. 2024, EDM2, section 3.1) of the length sigma_rel, see `posthoc`."""

    def __init__(self, name, sigma_rel):
        super().__init__(name, decay=None)
        self.exponent = posthoc.exponent(sigma_rel)

    def decay_at(self, step):
        return (1 - 1 / (step + 1)) ** self.exponent


def check_emas(emas, folder=None):
    """Return the list of `EMA`s. Raise ValueError if two have one name, or one is no name of a file of its own.

    Raise it, too, if the checkpoint `folder` to resume from lacks a `PowerEMA`, whose length counts from step 0."""
    names = [ema.name for ema in emas]
    good = all(re.fullmatch(r"[^\W\d][\w.-]*", name) and name != "model" for name in names)
    if len(set(names)) < len(names) or not good:
        rules = "EMAs must have different names of letters and digits, that begin with a letter, and none 'model'"
        raise ValueError(f"{rules}: {', '.join(names)}")
    for ema in emas if folder is not None else ():
        if isinstance(ema, PowerEMA) and not (folder / f"{ema.name}.pt").is_file():
            problem = f"{folder} has no EMA {ema.name!r}, which counts from a run's first step"
            raise ValueError(f"{problem}; leave out --ema-snapshots, or start a new run by --init-from")
    return emas


@torch.no_grad()
def update_ema(ema, parameters, decay):
    """Update an EMA, both arguments lists of tensors: ema <- decay ema + (1 - decay) parameters."""
    torch._foreach_lerp_(ema, parameters, 1 - decay)


def draw_randomness(seed, step, global_batch_size, places, latent_shape, device):
    """Return a step's uniform numbers for times and label drops, noise and posterior noise, at `places`, a slice.

    They depend on (seed, step, place in the global batch) alone: every rank draws them for the whole global batch,
    which costs little, so that a run can change its number of ranks."""
    g = distributed.generator(device, seed, distributed.STEP_STREAM, step)
    uniform, drop = torch.rand(2, global_batch_size, generator=g, device=device)[:, places]
    x0, posterior_noise = torch.randn(2, global_batch_size, *latent_shape, generator=g, device=device)[:, places]
    return uniform, drop, x0, posterior_noise


def num_kept(share, num_tokens):
    """Return how many of an image's tokens go through the blocks that a share of them skips: at least one."""
    return max(1, num_tokens - round(share * num_tokens))


def learning_rate(step, max_steps, peak, warmup_steps, schedule):
    """Return the learning rate after `step` steps: a linear warm-up, then constant or half a cosine to 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, max_steps - warmup_steps)))


def build_optimizer(module, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, muon=False):
    """Return fused AdamW over the parameters of a module that are trained; with `muon`, Muon for matrices in blocks."""
    how = dict(lr=lr, betas=tuple(betas), weight_decay=weight_decay, fused=True)
    if muon and hasattr(module, "blocks"):
        return Muon(parameter_groups(module), **how)
    return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], **how)


def step_optimizers(optimizers, loss, lr, max_grad_norm=None):
    """Step fused optimizers and clear their gradients; leave the step out if loss () or gradient is not finite.

    The check stays on the device: `found_inf` tells the optimizers, and the host does not wait. Return (2-norm of the
    gradient, before it is clipped to `max_grad_norm`, whether the step was left out): tensors () on the device."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
    gradient_norm = distributed.total_norm(gradients)
    bad = ~(loss.isfinite() & gradient_norm.isfinite())
    if max_grad_norm is not None:
        torch._foreach_mul_(distributed.local(gradients), (max_grad_norm / (gradient_norm + 1e-6)).clamp(max=1))
    for group in groups:
        group["lr"] = lr
    for optimizer in optimizers:
        optimizer.grad_scale = None
        optimizer.found_inf = distributed.like_parameter(bad.float(), optimizer.param_groups[0]["params"][0])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return gradient_norm, bad


class Trainer:
    """A SiT that was made on the meta device, with its `EMA`s, `AuxiliaryLoss`es and optimizers, sharded or replicated.

    Args:
        transport: gives the main loss.
        parallel, mesh: 'one process', 'ddp' or 'fsdp', which alone has a mesh.
        adamw: arguments of `build_optimizer`.
        route: (FROM, TO, share), of each image's tokens a random share skips blocks[FROM:TO] (TREAD, Krause et al.
            2025); None: no token does."""

    def __init__(self, model, transport, device, precision_name, emas, losses, parallel, mesh, adamw, route=None):
        self.route = route
        self.model, self.transport, self.device, self.precision = model, transport, device, precision_name
        self.parallel, self.emas, self.losses = parallel, list(emas), list(losses)
        self.ema_modules = {ema.name: copy.deepcopy(model).eval().requires_grad_(False) for ema in self.emas}
        for module in (model, *self.ema_modules.values()):
            if parallel == "fsdp":
                distributed.shard(module, mesh, precision.DTYPES[precision_name if module is model else "fp32"])
            module.to_empty(device=device)  # `start` fills it
            precision.choose_attention(module, device, precision_name)
        self.optimizer, self.loss_optimizers = build_optimizer(model, **adamw), {}
        for loss in self.losses:
            loss.to(device)
            if any(p.requires_grad for p in loss.parameters()):
                if parallel == "fsdp":
                    distributed.shard(loss, mesh)
                self.loss_optimizers[loss.name] = build_optimizer(loss, **adamw)
        self.reads_images = any(loss.reads_images for loss in self.losses)
        self.parameters = distributed.local(model.parameters())
        self.ema_parameters = [distributed.local(module.parameters()) for module in self.ema_modules.values()]

    def checkpointed(self):
        """Return what a checkpoint holds, as `checkpoint.Writer.save` and `checkpoint.load_training` take it."""
        losses = {loss.name: (loss, self.loss_optimizers.get(loss.name)) for loss in self.losses if loss.state_dict()}
        return dict(model=self.model, emas=self.ema_modules, optimizer=self.optimizer, losses=losses)

    def start(self, weights=None, folder=None, grad_checkpoint=False, compiled=False):
        """Load initial weights, on rank 0, or a checkpoint's folder; then compile and replicate.

        Return a line for each EMA or loss that the checkpoint lacks."""
        notes = []
        if folder is not None:
            notes = checkpoint.load_training(folder, **self.checkpointed())
        else:
            for module in (self.model, *self.ema_modules.values()):
                checkpoint.place(module, weights, "the initial weights")
        self.model.train()
        self.model.grad_checkpoint = grad_checkpoint
        if compiled:
            precision.compile_training(self.model, self.parallel)
        modules = [self.model, *self.losses]
        if self.parallel == "ddp":
            modules = [distributed.replicate(module, self.device) for module in modules]
        self.wrapped, *self.wrapped_losses = modules
        return notes

    def draw_kept(self, seed, step, global_batch_size, places):
        """Return the tokens (M, K) of a step at `places`, a slice, that skip no block, int64 in order; None: all.

        They depend on (seed, step, place in the global batch) alone, as the numbers of `draw_randomness` do."""
        num_tokens = self.model.x_embedder.num_patches
        kept = num_tokens if self.route is None else num_kept(self.route[2], num_tokens)
        if kept == num_tokens:
            return None
        g = distributed.generator(self.device, seed, distributed.ROUTE_STREAM, step)
        uniform = torch.rand(global_batch_size, num_tokens, generator=g, device=self.device)[places]
        return uniform.argsort(dim=1, stable=True)[:, :kept].sort(dim=1).values

    def forward_backward(self, batch, x1, t, x0, drop, kept=None, step=0, accumulation=1, is_last=True):
        """Compute the losses of a micro-batch, and add their gradient, divided by the accumulation steps.

        Args:
            batch: dict with 'y' (M,) and what else the auxiliary losses read.
            x1, t, x0: data (M, C, h, w), times (M,) and noise.
            drop: (M,) bool, labels to replace by the null class.
            kept: (M, K) tokens of `draw_kept`.
            step: steps before this one, which decide the losses that are computed.
            is_last: whether it is the last micro-batch of the step.

        Return (main loss (M,), {name: auxiliary loss (M,)}), without gradients."""
        hidden, auxiliary = {}, {}
        losses = [pair for pair in zip(self.losses, self.wrapped_losses, strict=True) if pair[0].is_active(step)]
        hidden_blocks = tuple(sorted({block for loss, _ in losses for block in loss.hidden_blocks}, key=str))
        route = {} if kept is None else {"route": (*self.route[:2], kept)}

        def network(x, t, **more):
            with precision.autocast(self.device, self.precision):
                if not hidden_blocks:
                    return self.wrapped(x, t, **more).float()  # the loss is computed in float32
                output, states = self.wrapped(x, t, **more, hidden_blocks=hidden_blocks)
            hidden.update(zip(hidden_blocks, states, strict=True))
            return output.float()

        with distributed.accumulate([self.wrapped, *self.wrapped_losses], is_last):
            kwargs = dict(y=batch["y"], force_drop_ids=drop) | route
            result = self.transport.training_losses(network, x1, kwargs, t=t, x0=x0)
            total, batch = result["loss"], batch | {"x1": x1, "x0": x0, "kept": kept}
            for loss, wrapped in losses:
                states = {block: hidden[block] for block in loss.hidden_blocks}
                with precision.autocast(self.device, self.precision):
                    value = wrapped(batch, t, result["xt"], result["pred"], states).float()
                auxiliary[loss.name] = value.detach()
                total = total + loss.weight * value
            (total.mean() / accumulation).backward()
        return result["loss"].detach(), auxiliary

    def update(self, step, loss, lr, max_grad_norm=None):
        """Step the optimizers and the EMAs after `step` other steps. Return what `step_optimizers` returns."""
        optimizers = [self.optimizer, *self.loss_optimizers.values()]
        gradient_norm, bad = step_optimizers(optimizers, loss, lr, max_grad_norm)
        for ema, parameters in zip(self.emas, self.ema_parameters, strict=True):
            update_ema(parameters, self.parameters, ema.decay_at(step))
        return gradient_norm, bad


def batches_on_device(loader, space, device, with_images=False):
    """Yield the batches of an endless loader on the device, with 'moments' of the space beside or in place of 'images'.

    On a GPU the next batch is copied, and encoded if need be, on a second stream while a step computes."""
    stream = None
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # for the autoencoder's weights

    def prepare(batch):
        tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
        batch = batch | {key: value.to(device, non_blocking=True) for key, value in tensors.items()}
        if "moments" not in batch:
            batch["moments"] = space.moments(batch["images"])
        if not with_images:
            batch.pop("images", None)
        return batch

    def ahead():
        for batch in loader:
            with torch.cuda.stream(stream):
                prepared, done = prepare(batch), stream.record_event()
            yield prepared, done  # outside the block, in which the stream would be the caller's, too

    try:
        if stream is None:
            yield from map(prepare, loader)
            return
        for (batch, done), _ in itertools.pairwise(ahead()):  # the second of a pair is being copied
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            for value in batch.values():
                if isinstance(value, torch.Tensor):
                    value.record_stream(current)  # its memory must not be reused before this stream is done
            yield batch
    finally:
        loader.close()
