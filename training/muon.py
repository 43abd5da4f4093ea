"""Muon, an optimizer for matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon), beside AdamW for the rest.

`torch.optim.Muon` does not serve: it cannot leave out a step on the device, takes a weight that holds several matrices
for one, and gives every rank all of the work."""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from utils import distributed

MOMENTUM = 0.95
# The polynomial a s + b s^3 + c s^5 of singular values s, applied five times, is steep at 0 and stays near 1.
COEFFICIENTS, ITERATIONS = (3.4445, -4.7750, 2.0315), 5
RMS = 0.2  # of an update at learning rate 1, about that of AdamW's, so that both take one (Liu et al. 2025, 2.2)


def parameter_groups(model):
    """Return parameter groups of a SiT: first what AdamW trains, with `matrices` 0, then weights of one shape each.

    These are the weights of linear layers in the blocks; `matrices` is the number that each holds, one above the other.
    """
    groups, counts = {0: []}, {}
    for block in model.blocks:
        counts |= {layer.weight: 1 for layer in block.modules() if isinstance(layer, nn.Linear)}
        counts |= {block.attn.qkv.weight: 3, block.adaLN_modulation[-1].weight: 6}
        counts[block.mlp.fc1.weight] = block.mlp.fc1.out_features // block.mlp.fc2.in_features  # of SwiGLU 2, else 1
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        count = counts.get(parameter, 0)
        groups.setdefault(count and (count, parameter.shape), []).append(parameter)
    return [{"params": group, "matrices": counts.get(group[0], 0)} for group in groups.values()]


def orthogonalize(matrices):
    """Return U S' V^T of matrices (n, R, C) = U S V^T by Newton-Schulz iterations, in their precision.

    S' lies in [0.68, 1.21] where S is at least 0.002 of the matrix's 2-norm (of all of S), and near 0 falls to 0."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT).mT
    dtype, (a, b, c) = torch.promote_types(matrices.dtype, torch.float32), COEFFICIENTS
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True, dtype=dtype)
    x = (matrices / norms.clamp(min=torch.finfo(dtype).tiny)).to(matrices.dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT  # (n, R, R), of the shorter side
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def orthogonalize_together(updates, parameter, count):
    """Do `orthogonalize` with updates (n, r, C) of n weights, whose r rows are those that this rank has of each.

    Each weight like `parameter` (R, C) holds `count` matrices, and is the work of one rank: a rank gets the other rows
    of its weights first, if they are sharded, and sends each rank its rows of the result. Return (n, r, C)."""
    (n, _, columns), rows, is_sharded = updates.shape, len(parameter), isinstance(parameter, DTensor)
    group = parameter.device_mesh.get_group(parameter.device_mesh.ndim - 1) if is_sharded else None
    size, rank = (dist.get_world_size(group), dist.get_rank(group)) if dist.is_initialized() else (1, 0)
    work = _shares(n, size)
    held = _shares(rows, size) if is_sharded else [rows] * size
    mine = updates.split(work)[rank]
    if is_sharded:
        mine = torch.cat(_exchange(updates.split(work), [(work[rank], r, columns) for r in held], group), dim=1)
    mine = orthogonalize(mine.reshape(-1, rows // count, columns)).reshape(-1, rows, columns)
    parts = mine.split(held, dim=1) if is_sharded else [mine] * size
    return torch.cat(_exchange(parts, [(w, held[rank], columns) for w in work], group))


def _shares(n, size):
    """Return how many of `n` things each of `size` ranks has: as many, the last ones fewer, as FSDP2 shards rows."""
    most = math.ceil(n / size)
    return [min(max(n - rank * most, 0), most) for rank in range(size)]


def _exchange(parts, shapes, group):
    """Send a tensor to each rank of a group. Return what they sent to this one, tensors of `shapes`."""
    if len(parts) == 1:
        return parts
    sent, sizes = torch.cat([part.flatten() for part in parts]), [math.prod(shape) for shape in shapes]
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts], group=group)
    return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


class Muon(torch.optim.AdamW):
    """Fused AdamW, and Muon for the groups of `parameter_groups` that hold matrices, which need half of its memory.

    Muon moves a matrix (R, C) by lr 0.2 sqrt(max(R, C)) times its orthogonalised gradient, with Nesterov momentum and
    decoupled weight decay; its products are bf16 on a GPU. Like fused AdamW, it leaves a step out where `found_inf` is
    not 0. Weights are sharded by `distributed.shard`, or the same on all ranks, which call `step` together."""

    def __setstate__(self, state):
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's expects a 'step' of every parameter

    @torch.no_grad()
    def step(self, closure=None):
        """Do a step, and clear the gradients of the matrices."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["matrices"] and parameters:
                self._step_matrices(parameters, group["matrices"], group["lr"], group["weight_decay"])
        return super().step(closure)  # of the parameters that have a gradient still

    def _step_matrices(self, parameters, count, lr, weight_decay):
        """Do a step of weights of one shape."""
        for parameter in parameters:
            if parameter not in self.state:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        tensors = [
            distributed.local(tensors) for tensors in (parameters, [self.state[p]["momentum"] for p in parameters])
        ]
        weights, momenta = map(torch.stack, tensors)  # (n, r, C): this rank's r rows of n weights
        gradients = torch.stack(distributed.local(parameter.grad for parameter in parameters))
        moved = momenta.lerp(gradients, 1 - MOMENTUM)
        update = gradients.lerp(moved, MOMENTUM)
        update = orthogonalize_together(update.bfloat16() if update.is_cuda else update, parameters[0], count)
        scale = RMS * math.sqrt(max(len(parameters[0]) // count, weights.shape[2]))
        stepped = (weights * (1 - lr * weight_decay)).add_(update, alpha=-lr * scale)
        if (found := getattr(self, "found_inf", None)) is not None:
            good = distributed.local([found])[0] == 0  # the host does not wait for it
            stepped, moved = torch.where(good, stepped, weights), torch.where(good, moved, momenta)
        for destination, source in zip(tensors, (stepped, moved), strict=True):
            torch._foreach_copy_(destination, source.unbind())
        for parameter in parameters:
            parameter.grad = None
