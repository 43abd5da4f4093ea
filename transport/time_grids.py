"""Time grids: the times between which a solver of fixed steps goes, and a table of them.

To add a grid, write one function and give it a row in `TIME_GRIDS`: name -> function of (path, t0, t1, num_steps). It
returns increasing times (num_steps,) from t0 to t1, both exact, in float64 on the CPU. `path` is the `Path`; its
noise-to-data ratio sigma / alpha falls with time, and may be infinite at t0 = 0 and 0 at t1 = 1."""

import itertools
import math
from numbers import Real

import torch

from .path import check_choice

EDM_LEVELS, EDM_RHO = (80.0, 0.002), 7  # Karras et al. 2022, table 1
LOGSNR_EPS = 0.03  # of the interval: how far the levels of `logsnr` stay from a singular end


def uniform(path, t0, t1, num_steps, device="cpu", dtype=torch.float64):
    """Return times at even distances."""
    return torch.linspace(t0, t1, num_steps, device=device, dtype=dtype)


def logsnr(path, t0, t1, num_steps):
    """Return times even in lambda = log(alpha / sigma) (Lu et al. 2022), of which singular ends are cut."""
    first, last = _regular_levels(path, t0, t1, LOGSNR_EPS)
    return _at_levels(path, t0, t1, torch.linspace(first, last, num_steps, dtype=torch.float64))


def edm(path, t0, t1, num_steps):
    """Return times whose sigma / alpha are the noise levels of Karras et al. 2022 (eq. 5, rho = 7).

    They run from 80 to 0.002, or what of these the path has between t0 and t1; then the two ends take their places."""
    first, last = _regular_levels(path, t0, t1, 1e-9)
    low, high = (-math.log(level) for level in EDM_LEVELS)
    if first < high and low < last:  # else the interval lies beyond all these levels
        first, last = max(first, low), min(last, high)
    ends = (math.exp(-level / EDM_RHO) for level in (first, last))
    return _at_levels(path, t0, t1, -EDM_RHO * torch.linspace(*ends, num_steps, dtype=torch.float64).log())


TIME_GRIDS = {"uniform": uniform, "logsnr": logsnr, "edm": edm}


def shifted(u, shift):
    """Map u in [0, 1] to itself; a shift above 1 moves points towards the noise: u / (u + shift (1 - u)).

    The same noise hides less of a larger image, so its grid needs more steps there. The noise level 1 - u goes to
    shift (1 - u) / (1 + (shift - 1) (1 - u)) (Esser et al. 2024, eq. 23)."""
    return u / (u + shift * (1 - u))


def check_grid(time_grid, num_steps, time_shift=1.0):
    """Return the number of times of a grid. Raise ValueError unless `make_times` takes these arguments."""
    if not 0 < time_shift < math.inf:
        raise ValueError(f"time_shift must be a number above 0, not {time_shift}")
    is_name = isinstance(time_grid, str)
    if time_shift != 1 and not (is_name and time_grid == "uniform"):
        raise ValueError("time_shift moves the points of the uniform grid, and has no effect on another")
    if not is_name:
        return check_times(time_grid)
    check_choice("time grid", time_grid, TIME_GRIDS)
    if num_steps < 2 or num_steps != int(num_steps):
        raise ValueError(f"num_steps counts both ends of the interval: an integer of 2 or more, not {num_steps}")
    return num_steps


def check_times(times):
    """Return the number of `times`. Raise ValueError unless they are two or more increasing numbers in [0, 1]."""
    for t in times:
        if isinstance(t, bool) or not isinstance(t, Real) or not 0 <= t <= 1:
            raise ValueError(f"a time grid holds numbers in [0, 1], not {t!r}")
    if len(times) < 2:
        raise ValueError(f"a time grid has two times or more, not {len(times)}")
    for t, following in itertools.pairwise(times):
        if t >= following:
            raise ValueError(f"the times of a grid increase, but {following} follows {t}")
    return len(times)


def given_ends(time_grid):
    """Return the first and the last of a sequence of times; None for a name."""
    return None if isinstance(time_grid, str) else (float(time_grid[0]), float(time_grid[-1]))


def make_times(time_grid, path, t0, t1, num_steps, x, shift=1.0):
    """Return the times of a grid on x's device, in float64 where it has that.

    `time_grid` is a name in TIME_GRIDS or a sequence of times, which are taken as they are."""
    where = dict(device=x.device, dtype=torch.float32 if x.device.type == "mps" else torch.float64)
    if not isinstance(time_grid, str):
        return torch.tensor(time_grid, **where)
    if time_grid != "uniform":
        return torch.tensor(TIME_GRIDS[time_grid](path, t0, t1, num_steps).tolist(), **where)
    times = uniform(path, t0, t1, num_steps, **where)  # on the device: the last digit of a time may depend on it
    if shift != 1:
        times[1:-1] = t0 + (t1 - t0) * shifted((times[1:-1] - t0) / (t1 - t0), shift)
    return times


def _log_snr(path, t):
    return torch.log(path.alpha(t)) - torch.log(path.sigma(t))


def _regular_levels(path, t0, t1, eps):
    """Return lambda at t0 and t1, and where it is infinite, at the share `eps` of the interval away from there."""
    ends = torch.tensor([t0, t1, t0 + eps * (t1 - t0), t1 - eps * (t1 - t0)], dtype=torch.float64)
    first, last, inner_first, inner_last = _log_snr(path, ends).tolist()
    return first if math.isfinite(first) else inner_first, last if math.isfinite(last) else inner_last


def _at_levels(path, t0, t1, levels):
    """Return the times (T,) at which lambda takes the increasing `levels` (T,), by bisection, with the ends t0, t1."""
    low, high = torch.full_like(levels, t0), torch.full_like(levels, t1)
    for _ in range(64):  # halvings, which leave a float64 nothing
        middle = (low + high) / 2
        below = _log_snr(path, middle) < levels
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    low[0], low[-1] = t0, t1
    return low
