"""Pictures of what solver, time grid and guidance do: x_t, and the data that is predicted from it, over time."""

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.functional import pad

from sampling.draw import decode
from utils import files, grids

MOST_IMAGES, MOST_COLUMNS, MOST_FRAMES = 8, 12, 60
FRAME_MS, LAST_FRAME_MS = 100, 2000
TILE_INCHES, DPI = 0.75, 200


class Record:
    """The evaluations of the first `most` images of a call of `draw(..., record=...)`; none is made for it."""

    def __init__(self, transport, most=MOST_IMAGES):
        self.transport, self.left, self.solves = transport, most, []

    def watch(self, model, count):
        """Return a model (x, t, y) for a solve of `count` images that does as the given one, and is recorded."""
        kept, evaluations = min(self.left, count), []
        self.left -= kept
        if not kept:
            return model
        self.solves.append(evaluations)

        def watched(x, t, y):
            output = model(x, t, y)
            xt, time = x[:kept], t[:1]
            data = self.transport.path.velocity_to_data(self.transport.velocity(output[:kept], xt, time), xt, time)
            # d_sigma may be infinite where sigma = 0, and there x_t is the data.
            data = torch.where(data.isfinite(), data, xt)
            evaluations.append((t[0].item(), torch.stack([xt, data]).cpu()))
            return output

        return watched

    def spread(self, most):
        """Return the indices of at most `most` evaluations, evenly spread from the first to the last.

        Those that an earlier or the same time follows are left out: tries of a step that was not, or not so, taken."""
        times = np.array([t for t, _ in self.solves[0]])
        times = times if times[0] <= times[-1] else -times
        taken = np.flatnonzero(np.append(times[:-1] < np.minimum.accumulate(times[:0:-1])[::-1], True))
        return taken[np.linspace(0, len(taken) - 1, min(len(taken), most)).round().astype(int)]

    def strips(self, pipeline, images, indices):
        """Return the times (S,) of the evaluations at `indices`, and pictures (2, S + 1, N, H, W, C), uint8.

        These are of x_t and of the predicted data; the last are the drawn `images` (N or more, H, W, C), or beside
        noise, where a reverse solve ends, the last prediction."""
        times = [self.solves[0][i][0] for i in indices]
        latents = torch.cat([torch.stack([solve[i][1] for i in indices], dim=1) for solve in self.solves], dim=2)
        pictures = decode(pipeline, latents.flatten(0, 2).to(pipeline.device)).unflatten(0, latents.shape[:3])
        end = images[: latents.shape[2]]
        is_reverse = (times[0], times[0]) > (times[-1], 0.5)  # the time of a single evaluation says where it starts
        last = torch.stack([end, pictures[1, -1] if is_reverse else end])
        return times, torch.cat([pictures, last[:, None]], dim=1)


def draw_strips(axes, labels, pictures):
    """Draw pictures (2, S, N, H, W, C), uint8, on matplotlib axes: two rows for each image, `labels` (S,) below."""
    count, side, width = pictures.shape[2:5]
    gap = max(1, side // 16)
    tiles = pad(pictures, (0, 0, 0, gap, 0, gap), value=255).permute(2, 0, 3, 1, 4, 5)  # (N, 2, H', S, W', C)
    mosaic = pad(tiles.flatten(3, 4).flatten(1, 2), (0, 0, 0, 0, 0, 2 * gap), value=255)  # (N, 2 H' + 2 gap, S W', C)
    axes.imshow(mosaic.flatten(0, 1)[: -2 * gap].expand(-1, -1, 3).numpy())
    centres = (width + gap) * np.arange(len(labels)) + (width - 1) / 2
    rows = [n * mosaic.shape[1] + (side + gap) * k + (side - 1) / 2 for n in range(count) for k in range(2)]
    axes.set(xlabel="t (0: noise, 1: data)", xticks=centres, xticklabels=labels)
    axes.set(yticks=rows, yticklabels=["$x_t$", "predicted $x_1$"] * count)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def check_output(path, output):
    """Raise ValueError if pictures cannot be written to `path`, which --trajectory named; --output is `output`."""
    if path.suffix not in (".png", ".gif"):
        raise ValueError(f"--trajectory {path} must end in .png or .gif")
    if path.resolve() == output.resolve():
        raise ValueError(f"--trajectory {path} is --output, too")
    files.check_output("--trajectory", path)


def write(path, pipeline, record, images):
    """Write what was recorded while `images` (N, H, W, C) were drawn, and return of how many images.

    To a .png: two rows for each image, time from left to right. To a .gif: a frame for each time, with x_t and the
    predicted data of each image side by side."""
    is_png = path.suffix == ".png"
    times, pictures = record.strips(pipeline, images, record.spread(MOST_COLUMNS - 1 if is_png else MOST_FRAMES))
    columns, count = pictures.shape[1:3]
    with files.written_whole(path) as partial:
        if is_png:
            size = TILE_INCHES * (columns + 2), TILE_INCHES * (2.2 * count + 1)
            figure = Figure(figsize=size, layout="constrained", facecolor="white")
            draw_strips(figure.subplots(), [*(f"{t:.3g}" for t in times), "end"], pictures)
            figure.savefig(partial, format="png", dpi=DPI)
        else:
            frames = [
                grids.grid_image(frame, min(4, 2 * count)) for frame in pictures.permute(1, 2, 0, 3, 4, 5).flatten(1, 2)
            ]
            how = dict(save_all=True, append_images=frames[1:], loop=0)
            frames[0].save(partial, format="gif", duration=[FRAME_MS] * (columns - 1) + [LAST_FRAME_MS], **how)
    return count
