"""Find the times between which a checkpoint, its guidance and a solver make the least error in few steps.

    python tune_grid.py --ckpt runs/xl --cfg-scale 1.5 --sampling-method ab2 --num-sampling-steps 10 --output grid.json
    python sample.py --ckpt runs/xl --cfg-scale 1.5 --sampling-method ab2 --time-grid grid.json

A few samples are solved on a fine grid. The times are those of its points between which Euler steps have the least
total of local errors, by dynamic programming (Chen et al. 2024, "On the Trajectory Regularity of ODE-based Diffusion
Sampling"); then each is moved as long as that lowers the error of the solver's own end states, which is what counts."""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C, while packages load, too, ends without a traceback

import itertools
import math
import pathlib

import numpy as np
import torch
from tqdm import tqdm

from sampling import flags
from sampling.draw import GuidedModel, ImageNoise, describe, draw_labels, resolve_settings
from sampling.pipeline import load_pipeline
from transport import ODE_METHODS, TIME_GRIDS, Sampler
from utils import distributed, files
from utils.command_line import Parser, flag_group, flag_name, given, integer, path, user_errors
from utils.precision import resolve_precision

FINE = 40  # intervals of the uniform part of the fine grid, or more
MOVES = (-4, -2, -1, 1, 2, 4)  # of a time, in points of the fine grid
ENOUGH = 0.03  # of the error, that a round of moves must take away for another to follow
MOST_STEPS = 50  # time points to tune: the search grows with their square
MOST_KEPT = 1 << 30  # bytes of the network's outputs in memory


def build_parser():
    parser = Parser("Find the time grid of the least error for a checkpoint, its guidance and a solver of an ODE.")
    flags.add_sampling_flags(parser)
    add = flag_group(parser, "grid")
    add("--num-samples", integer(1), "N", "samples whose errors are measured", default=16)
    add("--seed", integer(0), "SEED", "noise and label of sample i depend on it and i alone", default=0)
    add("--output", path, "FILE.json", "the times, and what they were made for", default=pathlib.Path("grid.json"))
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    with user_errors(parser):
        mode, solver = solver_to_tune(args.mode, given(args, flags.SOLVER_FLAGS))
        files.check_output("--output", args.output)
        device = distributed.init()
        if distributed.rank() != 0:
            return distributed.shutdown()  # one process finds the grid
        precision = resolve_precision(args.precision, device, on_gpu="tf32")
        weights = given(args, flags.WEIGHTS_FLAGS + flags.GUIDE_FLAGS)
        pipeline = load_pipeline(args.ckpt, device, args.guided_channels, args.vae_precision, **weights)
        guided = args.cfg_scale, args.cfg_interval, args.seed, args.internal_guidance
        settings = resolve_settings(pipeline, mode, solver, *guided)
        more = [(True, ("vae_precision",), "on a time grid")]
        for line in flags.without_effect(parser.changed, mode, solver, settings.cfg_scale, more=more):
            print(line, flush=True)
        made_for = pipeline.digests() | {"ckpt": args.ckpt, "num_samples": args.num_samples}
        pipeline.speed_up(precision, args.compile)
        with tqdm(unit=" NFE", leave=False, disable=None) as bar:
            times, errors = tune(solves_of(pipeline, settings, args.num_samples, bar), solver["num_steps"])
        with files.named(f"--output {args.output}"):
            files.write_json(args.output, {"times": times} | describe(pipeline, settings) | made_for | errors)
    of_grid, of_uniform = errors.values()
    print(f"error of {solver['sampling_method']} at {len(times)} times: {of_uniform:g} uniform, {of_grid:g} tuned")
    print(args.output)


def solver_to_tune(mode, given):
    """Return what `flags.solver_settings` does. Raise ValueError for settings without a grid of fixed steps to find."""
    for key in ("time_grid", "time_shift", "reverse"):
        if key in given:
            raise ValueError(f"{flag_name(key)} has no effect here: a grid from noise to data is looked for")
    if mode == "SDE":
        raise ValueError("a grid is tuned for an ODE, whose end state has an error, and not for an SDE")
    if "num_sampling_steps" not in given:
        raise ValueError("give the number of time points, --num-sampling-steps")
    mode, solver = flags.solver_settings(mode, given)
    if solver["num_steps"] > MOST_STEPS:
        raise ValueError(f"--num-sampling-steps {solver['num_steps']}: a grid is tuned for at most {MOST_STEPS}")
    fixed = [name for name, (_, nfe) in ODE_METHODS.items() if nfe is not None]
    if solver["sampling_method"] not in fixed:
        named = f"--sampling-method {solver['sampling_method']}"
        raise ValueError(f"{named} has no fixed number of evaluations a step; choose from {', '.join(fixed)}")
    return mode, solver


def solves_of(pipeline, settings, count, bar):
    """Return the `Solves` of `count` samples of a pipeline, whose labels and noise are those of sample_ddp.py."""
    labels = draw_labels(count, pipeline.model.num_classes, settings.seed, balanced=False)
    noise = ImageNoise(settings.seed, range(count), pipeline.device).draw(pipeline.latent_shape)
    rule = settings.rule(pipeline.guided_channels, pipeline.guide is not None)
    model = GuidedModel(pipeline, rule, count, bar, settings.internal_guidance)
    labels = torch.tensor(labels, device=pipeline.device)
    how = settings.solver["sampling_method"], settings.solver["num_steps"]
    return Solves(pipeline.transport, lambda x, t: model(x, t, labels), noise, *how)


class Solves:
    """Solves of a model, (x, t) -> output, between points of a fine grid, by a method of ODE_METHODS of fixed NFE.

    `times` (K,) are those of the fine grid, at the indices `uniform` those of the uniform grid; `states` (K, N, ...)
    are the solutions from noise (N, ...). Outputs are kept by the times of the steps that led to them, so a step must
    not depend on later times."""

    def __init__(self, transport, model, noise, method, num_steps):
        self.sampler, self.model, self.method = Sampler(transport), model, method
        self.outputs = {}
        t0, t1 = transport.ode_interval()
        count = max(2, math.ceil(FINE / (num_steps - 1))) * (num_steps - 1) + 1
        even, more = (
            [round(t, 6) for t in TIME_GRIDS[grid](transport.path, t0, t1, n).tolist()[1:-1]]
            for grid, n in (("uniform", count), ("logsnr", FINE // 2 + 1))
        )
        self.times = [t0, *sorted(t for t in {*even, *more} if t0 < t < t1), t1]
        self.uniform = tuple(self.times.index(t) for t in [t0, *even, t1][:: (count - 1) // (num_steps - 1)])
        halves = [(t + following) / 2 for t, following in itertools.pairwise(self.times)]
        fine = dict(sampling_method="heun2", time_grid=sorted([*self.times, *halves]), trajectory=True)
        self.states = self.sampler.sample_ode(**fine)(noise, model)[::2]
        if not self.states.isfinite().all():
            raise ValueError("the network's output is not finite")

    def error(self, indices, method=None):
        """Return the mean squared error of a solve over the times of `indices`, from the fine state at the first."""
        method = method or self.method
        calls, nfe = itertools.count(), ODE_METHODS[method][1]

        def model(x, t):
            step, part = divmod(next(calls), nfe)
            key = part, indices[: step + 1 + (part > 0)]
            if len(self.outputs) * x.nbytes > MOST_KEPT:
                self.outputs.clear()
            if key not in self.outputs:
                self.outputs[key] = self.model(x, t)
            return self.outputs[key]

        how = dict(sampling_method=method, time_grid=[self.times[i] for i in indices])
        end = self.sampler.sample_ode(**how)(self.states[indices[0]], model)[-1]
        return (end - self.states[indices[-1]]).double().square().mean().item()


def tune(solves, num_steps):
    """Return times (num_steps,), and the errors of their end states and of the uniform grid's."""
    cost = np.full((len(solves.times), len(solves.times)), np.inf)
    for i, j in itertools.combinations(range(len(cost)), 2):
        cost[i, j] = math.sqrt(solves.error((i, j), "euler"))  # of any method: it takes no more evaluations
    start = min(least_sum(cost, num_steps - 1), solves.uniform, key=solves.error)
    indices, error = moved(solves.error, start)
    errors = {"error": error, "error_of_uniform": solves.error(solves.uniform)}
    return [solves.times[i] for i in indices], {key: float(f"{value:.4g}") for key, value in errors.items()}


def least_sum(cost, num_steps):
    """Return indices from 0 to K - 1 whose `num_steps` steps i -> j have the least sum of `cost` (K, K).

    The cost of a step that is not to be made, as all with j <= i, is inf."""
    total, before = np.full(len(cost), np.inf), []
    total[0] = 0
    for _ in range(num_steps):
        sums = total[:, None] + cost
        before.append(sums.argmin(0))
        total = sums.min(0)
    indices = [len(cost) - 1]
    for of_step in reversed(before):
        indices.insert(0, int(of_step[indices[0]]))
    return tuple(indices)


def moved(error, indices):
    """Move indices between the ends one by one, in rounds, as long as a round lowers error(indices) by ENOUGH.

    Return them and the error."""
    least, before = error(indices), math.inf
    while least < (1 - ENOUGH) * before:
        before = least
        for k, shift in itertools.product(range(len(indices) - 2, 0, -1), MOVES):
            other = (*indices[:k], indices[k] + shift, *indices[k + 1 :])
            if indices[k - 1] < other[k] < indices[k + 1] and (found := error(other)) < least:
                indices, least = other, found
    return indices, least


if __name__ == "__main__":
    main()
