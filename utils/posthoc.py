"""Post-hoc EMA: averages of any length from snapshots of two (Karras et al. 2024, EDM2, section 3 and appendix C).

A power-function average after t steps gives theta_i, the weights after step i, the share (i^g - (i-1)^g) / t^g. Its
length is the standard deviation of the steps under these shares, divided by t: sigma_rel. A run with --ema-snapshots
keeps, at each checkpoint, snapshots of two such averages:

    {output_dir}/ema-snapshots/
        power-0.05-STEP.safetensors   the average of sigma_rel 0.05 after STEP steps, whole, under the official keys
        manifest.json                 size and SHA-256 of each of these files"""

import contextlib
import os
import re
import shutil

import numpy as np
import safetensors

from utils import files
from utils.tensor_files import write_safetensors

FOLDER, MANIFEST = "ema-snapshots", "manifest.json"
TRACKED = {"power-0.05": 0.05, "power-0.10": 0.10}  # sigma_rel of the averages, by name
NAME = re.compile(rf"({'|'.join(map(re.escape, TRACKED))})-(\d{{1,9}})\.safetensors")
SHORTEST, LONGEST = 1e-6, 12**-0.5  # sigma_rel of one step in a million, and of a plain mean, g = 1
WARN_ABOVE = 0.01  # residual
MOST_AT_ONCE = 1 << 18  # steps, which bounds the memory of a fit


def exponent(sigma_rel):
    """Return g = gamma + 1, where sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (EDM2, section 3.1).

    Raise ValueError unless `SHORTEST` < sigma_rel < `LONGEST`."""
    if not SHORTEST < sigma_rel < LONGEST:
        raise ValueError(f"sigma_rel must be above {SHORTEST:g} and below {LONGEST:.4f}, not {sigma_rel:g}")
    return 1 + np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real.max()


def fit(snapshots, step, sigma_rel):
    """Return (coefficients, residual) of `snapshots`, [(step, sigma_rel)], in the average of a length after a step.

    Beside the newest weights, an average after t steps lacks the share ((i-1)/t)^g of the change from theta_{i-1} to
    theta_i for i <= t, as the product of the decays telescopes, and all of the later ones. These shares are fitted by
    least squares, with coefficients that sum to 1, so that theta_1 has the right weight. EDM2's algorithm 3 fits the
    shares of theta_i instead, as if these were independent; here their changes are, as in a random walk, for which the
    residual is the expected error relative to the distance between the average and the newest weights."""
    times, lengths = np.array([*snapshots, (step, sigma_rel)]).T
    exponents = {length: exponent(length) for length in sorted(set(lengths))}
    powers, rows, start = np.array([exponents[length] for length in lengths]), [], 0
    for end in sorted({*times, *range(MOST_AT_ONCE, int(step), MOST_AT_ONCE)}):
        # From one snapshot to the next, all shares combine the same few functions, of which QR gives coordinates.
        i = np.arange(start, end)
        functions = np.stack([np.ones_like(i), *((i / end) ** power for power in exponents.values())], 1)
        scales = (times >= end) * np.minimum(end / times, 1) ** powers
        combined = np.stack([times < end, *(scales * (lengths == length) for length in exponents)])
        rows.append(np.linalg.qr(functions, mode="r") @ combined)
        start = end
    shares = np.concatenate(rows)
    last, target = shares[:, -2:].T
    free = np.linalg.lstsq(shares[:, :-2] - last[:, None], target - last, rcond=None)[0]
    coefficients = np.append(free, 1 - free.sum())
    error = np.linalg.norm(shares[:, :-1] @ coefficients - target)
    return coefficients, error / (np.linalg.norm(target) or 1)  # after one step, the average is the weights


def length_of(ema):
    """Return the sigma_rel that --ema gives as a number; None if it gives a name. Raise ValueError if out of range."""
    try:
        sigma_rel = float(ema)
    except ValueError:
        return None
    with files.named(f"EMA {ema}", ValueError):
        exponent(sigma_rel)
    return sigma_rel


def read_manifest(folder):
    """Return {name: (step, sigma_rel, entry)} of the snapshots in a folder, by step; {} if it has no manifest."""
    path = folder / MANIFEST
    if not path.exists():
        return {}
    with files.named(f"{path} is damaged", (LookupError, TypeError, AttributeError)):
        matches = [(NAME.fullmatch(name), dict(entry)) for name, entry in files.read_json(path)["files"].items()]
        found = {match[0]: (int(match[2]), TRACKED[match[1]], entry) for match, entry in matches}
    return dict(sorted(found.items(), key=lambda item: item[1][:2]))


def write_snapshots(output_dir, step, emas, config, dtype):
    """Write the snapshots of a step, in a dtype; `emas` is {name: state dict}. Return lines on what is in float32."""
    folder, notes = output_dir / FOLDER, []
    folder.mkdir(exist_ok=True)
    entries = {name: entry for name, (*_, entry) in read_manifest(folder).items()}
    for name, sigma_rel in TRACKED.items():
        path = folder / f"{name}-{step}.safetensors"
        stored = {key: value.to(dtype) for key, value in emas[name].items()}
        large = [key for key, value in stored.items() if not value.isfinite().all()]
        if large:
            notes.append(f"{path.name}: {', '.join(large)} is in float32, as it is too large for {dtype}")
        with files.written_whole(path) as partial:
            write_safetensors(
                partial, stored | {key: emas[name][key] for key in large}, config | {"sigma_rel": sigma_rel}
            )
        entries[path.name] = files.manifest_entry(path)
    files.write_json(folder / MANIFEST, {"files": dict(sorted(entries.items()))})
    return notes


def carry_over(origin, output_dir, step):
    """Leave in a run's folder the snapshots up to `step` of the run in `origin`, which it goes on with, and no others.

    Those of another folder are linked, or copied where the file system has no links; None is no run."""
    source, target = origin and origin / FOLDER, output_dir / FOLDER
    found = {} if origin is None else read_manifest(source)
    kept = {name: entry for name, (t, _, entry) in found.items() if t <= step and (source / name).is_file()}
    if not kept:
        return files.remove(target)
    target.mkdir(exist_ok=True)
    is_same = source.samefile(target)
    for path in target.iterdir():
        if not is_same or path.name not in (*kept, MANIFEST):
            files.remove(path)
    for name in () if is_same else kept:
        try:
            os.link(source / name, target / name)
        except OSError:
            shutil.copyfile(source / name, target / name)
    files.write_json(target / MANIFEST, {"files": dict(sorted(kept.items()))})


def reconstruct(output_dir, step, sigma_rel):
    """Return (the average of a length after a step as a state dict in float32, a line on how well it is known).

    It is made of the snapshots of a run's folder up to this step, one tensor at a time. Raise ValueError naming the
    folder or file if there are none of this step, or one is damaged."""
    folder = output_dir / FOLDER
    found = read_manifest(folder)
    if not any(t == step for t, *_ in found.values()):
        raise ValueError(f"{folder} has no snapshots of step {step}; they are written with --ema-snapshots")
    snapshots = {name: entry for name, entry in found.items() if entry[0] <= step}
    problems = (files.problem_with(folder / name, entry) for name, (*_, entry) in snapshots.items())
    if problem := next(filter(None, problems), None):
        raise ValueError(problem)
    times = [(t, length) for t, length, _ in snapshots.values()]
    coefficients, residual = fit(times, step, sigma_rel)
    if residual > 1:  # the newest weights would be nearer
        raise ValueError(
            f"{folder} cannot make an EMA of length {sigma_rel:g}: its checkpoints are too far apart for it"
        )
    kinds = safetensors.SafetensorError, OSError, RuntimeError, AttributeError
    with files.named(f"{folder} is damaged", kinds), contextlib.ExitStack() as stack:
        opened = [stack.enter_context(safetensors.safe_open(folder / name, framework="pt")) for name in snapshots]
        pairs = list(zip(coefficients.tolist(), opened, strict=True))
        keys = opened[0].keys()
        state_dict = {key: sum(c * file.get_tensor(key).double() for c, file in pairs).float() for key in keys}
    error = f"error about {residual:.2g} of its distance to the weights"
    few = "; checkpoints are too few or too far apart for this length" if residual > WARN_ABOVE else ""
    return state_dict, f"EMA {sigma_rel:g} reconstructed from {len(times)} snapshots, {error}{few}"
