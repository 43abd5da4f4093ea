"""What a training step is made of: train.py runs it, and benchmarks/train_speed.py measures it."""

import itertools
import math

import torch

import distributed


def draw_randomness(seed, step, global_batch_size, places, latent_shape, device):
    """Uniform numbers for times and label drops, noise, and posterior noise of this rank's places in the global batch.

    They depend on (seed, step, place) alone: every rank draws them for the whole global batch and keeps its own, which
    costs little and lets a run change its number of ranks.
    """
    g = distributed.generator(device, seed, distributed.STEP_STREAM, step)
    uniform, drop = torch.rand(2, global_batch_size, generator=g, device=device)[:, places]
    x0, posterior_noise = torch.randn(2, global_batch_size, *latent_shape, generator=g, device=device)[:, places]
    return uniform, drop, x0, posterior_noise


def learning_rate(step, max_steps, peak, warmup_steps, schedule):
    """Learning rate of the step after `step` others: a linear rise, then constant or half a cosine, to 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, max_steps - warmup_steps)))


def ema_decay(step, decay, warmup):
    """Decay of the moving average after `step` others; with warm-up, a young one forgets faster: (1 + n) / (10 + n)."""
    n = step + 1
    return min(decay, (1 + n) / (10 + n)) if warmup else decay


@torch.no_grad()
def update_ema(average, parameters, decay):
    """Move an average towards parameters, both lists of tensors: average <- decay average + (1 - decay) parameters."""
    torch._foreach_lerp_(average, parameters, 1 - decay)


def build_optimizer(model, lr, betas, weight_decay):
    """AdamW over what is trained of a model, in its fused form."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=lr, betas=tuple(betas), weight_decay=weight_decay, fused=True)


def step_optimizer(optimizer, loss, lr, max_grad_norm=None):
    """One step with the gradients that are there, which are let go; left out if loss or gradient is not finite.

    Whether they are is known on the device alone: `found_inf` tells the fused optimizer there, and the host does not
    wait.

    Args:
        loss: () of the step, over all ranks.
        max_grad_norm: scale larger gradients down to this 2-norm.

    Returns:
        (2-norm of the gradients, whether the step was left out): tensors () on the device.
    """
    (group,) = optimizer.param_groups
    gradients = [p.grad for p in group["params"]]
    gradient_norm = distributed.total_norm(gradients)
    bad = ~(loss.isfinite() & gradient_norm.isfinite())
    if max_grad_norm is not None:
        torch._foreach_mul_(distributed.local(gradients), (max_grad_norm / (gradient_norm + 1e-6)).clamp(max=1))
    group["lr"] = lr
    optimizer.grad_scale = None
    optimizer.found_inf = distributed.like_parameter(bad.float(), group["params"][0])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return gradient_norm, bad


def batches_on_device(loader, space, device):
    """A generator of (what `space.draw` takes, labels (M,), problems), on the device, from a loader's batches.

    On a GPU the next batch is copied, and if need be encoded, on a stream of its own while a step computes.

    Args:
        loader: of `data.make_loader`; endless.
        space: of latents.py.
    """
    stream = None
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))  # for the autoencoder's weights

    def prepare(images, labels, problems):
        return space.prepare(images.to(device, non_blocking=True)), labels.to(device, non_blocking=True), problems

    def ahead():
        for batch in loader:
            with torch.cuda.stream(stream):
                ready, done = prepare(*batch), stream.record_event()
            yield ready, done  # not in the block, whose stream would be the caller's until it asks for the next

    try:
        if stream is None:
            yield from itertools.starmap(prepare, loader)
            return
        for (ready, done), _ in itertools.pairwise(ahead()):  # the second of a pair is on its way by now
            current = torch.cuda.current_stream(device)
            current.wait_event(done)
            for tensor in ready[:2]:
                tensor.record_stream(current)  # not to be written over before this stream is done with it, too
            yield ready
    finally:
        loader.close()
