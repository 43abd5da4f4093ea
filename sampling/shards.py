"""Samples that are drawn shard by shard, resumed, and written as one .npz.

Beside the output FILE.npz lie FILE.npz.parts/ with one .npy per shard, until FILE.npz is written; from then on
FILE.npz.json, which says how the samples were made; and FILE.pngs/ if PNGs are asked for."""

import collections
import concurrent.futures
import contextlib
import math
import re
import shutil
import zipfile

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from sampling.draw import NotFinite, decode, draw
from utils import distributed, files

# Indices of the first image and of the one behind the last; NFE and forward passes per image.
SHARD = re.compile(r"(\d+)-(\d+)\.calls-(\d+)-(\d+)\.npy")
ADVICE = "give another --output"
# Keys of `describe` that are absent where the option is not in use.
OPTIONAL = ("time_grid", "guidance", "guide", "internal_guidance")


class Shards:
    """The shards of `output`, an .npz of `count` uint8 images of `image_shape` (H, W, C).

    All ranks make one; rank 0 calls `prepare` first and `finish` last."""

    def __init__(self, output, count, image_shape):
        self.output, self.count, self.image_shape = output, count, tuple(image_shape)
        self.folder = output.with_name(output.name + ".parts")
        self.description = output.with_name(output.name + ".json")
        self.pngs = output.with_suffix(".pngs")

    def prepare(self, identity, save_png=False, locks=True):
        """Make and lock the folder of shards, unless the output is complete. Return whether it is.

        Without `locks`, the caller has locked a folder around it. `identity` is plain data that decides the images.
        Raise ValueError if the shards were made with another identity or by another script, another process draws
        them, or the folder cannot be written to. An output that was damaged since is named, and drawn again."""
        if self.output.suffix != ".npz":
            raise ValueError(f"--output {self.output} must end in .npz")
        with files.named(f"--output {self.output}"):
            complete = self._is_complete(identity)
            if not complete:
                if self.description.is_dir():
                    raise ValueError(f"{self.description} is a folder")
                if locks:
                    files.lock(self.folder, f"another process is drawing {self.output}; wait for it, or {ADVICE}")
                self.folder.mkdir(parents=True, exist_ok=True)
                complete = self._is_complete(identity)  # the process that held the lock may have completed it
            if not complete:
                settings = self.folder / "settings.json"
                if save_png and not settings.exists() and self.pngs.is_dir() and any(self.pngs.iterdir()):
                    raise ValueError(f"{self.pngs} is not empty; {ADVICE}")
                files.keep_settings(settings, identity, ADVICE, "sample_ddp.py")
                files.check_same_settings(settings, dict.fromkeys(OPTIONAL) | identity, ADVICE)
            if save_png:
                self.pngs.mkdir(exist_ok=True)
            return complete

    def _is_complete(self, identity):
        if not self.output.exists():
            return False
        if not self.description.is_file():
            problem = f"{self.output} exists, but {self.description.name}, which says how it was made, does not"
            raise ValueError(f"{problem}; put it back or {ADVICE}")
        files.check_same_settings(self.description, dict.fromkeys(OPTIONAL) | identity, ADVICE)
        try:
            check_npz(self.output, {"arr_0": (self.count, *self.image_shape), "arr_1": (self.count,)})
        except ValueError as error:
            print(f"{error}; it is drawn again")
            return False
        shutil.rmtree(self.folder, ignore_errors=True)  # left by a process that was killed after its last rename
        return True

    def intact(self):
        """Return {(begin, end): path} of the intact shards in order; remove damaged ones."""
        shards = {}
        for path in filter(lambda path: SHARD.fullmatch(path.name), sorted(self.folder.iterdir())):
            begin, end = map(int, SHARD.fullmatch(path.name).groups()[:2])
            try:
                images = np.load(path, mmap_mode="r", allow_pickle=False)
                if images.dtype != np.uint8 or images.shape != (end - begin, *self.image_shape):
                    raise ValueError
                shards[begin, end] = path
            except (OSError, ValueError, EOFError):
                print(f"{path} is damaged, and is drawn again")
                path.unlink()
        return shards

    def missing(self, group):
        """Return the ranges (begin, end) of images that no shard holds, none longer than a group."""
        ranges, begin = [], 0
        for first, last in (*self.intact(), (self.count, self.count)):
            ranges += [(i, min(i + group, first)) for i in range(begin, first, group)]
            begin = last
        return ranges

    def write(self, images, begin, counts, save_png):
        """Write a shard of images (N, H, W, C) whose first index is `begin`. Raise ValueError if that fails."""
        name = f"{begin:07d}-{begin + len(images):07d}.calls-{counts['nfe']}-{counts['forward_passes']}.npy"
        path = self.folder / name
        with files.named(path):
            if save_png:
                self.write_pngs(images, begin)  # first: a shard that exists is not drawn again
            with files.written_whole(path) as partial, open(partial, "wb") as file:
                np.save(file, images)

    def write_pngs(self, images, begin):
        """Write PNGs of images (N, H, W, C) with indices from `begin`, unless they exist."""
        for i, image in enumerate(images, begin):
            path = self.pngs / f"{i:06d}.png"
            if not path.exists():
                partial = files.partial_name(path)
                files.remove(partial)
                Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(partial, format="png")
                partial.rename(path)

    def counts(self):
        """Return {'nfe', 'forward_passes'} per image, the most of any shard."""
        matches = [SHARD.fullmatch(path.name) for path in self.intact().values()]
        return {key: max(int(match[i]) for match in matches) for i, key in ((3, "nfe"), (4, "forward_passes"))}

    def finish(self, labels, description):
        """Write shards and labels (N,) as one .npz, and remove the shards. Raise ValueError if that fails.

        Return the description, to which the counts are added, as it is stored beside the .npz."""
        description = description | self.counts()
        with files.named(self.output):
            with files.written_whole(self.output) as partial:
                with files.NpzWriter(partial, "w") as archive:
                    shards = (np.load(path, allow_pickle=False) for path in self.intact().values())
                    archive.write_array("arr_0", shards, self.count)
                    archive.write_array("arr_1", [labels], self.count)
                files.write_json(self.description, description)
            shutil.rmtree(self.folder, ignore_errors=True)
        return description

    def remove(self):
        """Remove the output and all that lies beside it, apart from PNGs."""
        for path in (self.folder, self.output, self.description):
            files.remove(path)


def draw_missing(shards, pipeline, labels, settings, batch_size, save_png=False):
    """Draw this rank's share of the missing images, and write them as shards. Return the number that all ranks draw.

    Raise NotFinite if the network's output is not finite."""
    rank, world_size = distributed.rank(), distributed.world_size()
    missing = distributed.on_rank_zero(shards.missing, settings.group_size(batch_size))
    total = sum(end - begin for begin, end in missing)
    with (
        tqdm(total=total, unit=" images", disable=None if rank == 0 else True) as bar,
        background(pipeline.device) as submit,
    ):

        def finish(drawn, begin, counts):
            if not drawn.isfinite().all():
                raise NotFinite(f"the network's output is not finite for images {begin} to {begin + len(drawn) - 1}")
            images = decode(pipeline, drawn, batch_size).numpy()
            shards.write(images, begin, counts, save_png)
            bar.update(min(len(images) * world_size, total - bar.n))  # the other ranks have drawn about as many

        for begin, end in missing[rank::world_size]:
            how = dict(first_index=begin, batch_size=batch_size, show_progress=False)
            drawn, counts = draw(pipeline, labels[begin:end].tolist(), settings, **how)
            submit(finish, drawn, begin, counts)
    return total


def check_npz(path, shapes):
    """Raise ValueError unless an .npz holds whole arrays of these names and shapes; their content is not read."""
    with files.named(f"{path} is damaged", (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)):
        with zipfile.ZipFile(path) as archive:
            for name, shape in shapes.items():
                entry = archive.getinfo(f"{name}.npy")
                with archive.open(entry) as file:
                    actual, dtype, _ = files.read_npy_header(file)
                    if actual != shape or entry.file_size != file.tell() + math.prod(shape) * dtype.itemsize:
                        raise ValueError(f"{name} is {actual}, and must be {shape}")


@contextlib.contextmanager
def background(device, most_waiting=2):
    """Context that gives `submit(function, *arguments)`, which calls functions in a thread, on another CUDA stream.

    Images are decoded and written so while the next are drawn. The device work of a function must be done when it
    returns; what it raises, a later `submit` or the end of the block raises. Waiting work holds memory."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    waiting = collections.deque()

    def call(ready, function, arguments):
        with torch.no_grad(), torch.cuda.stream(stream):
            if ready is not None:
                stream.wait_event(ready)
            function(*arguments)

    def submit(function, *arguments):
        if len(waiting) == most_waiting:
            waiting.popleft().result()
        ready = None if stream is None else torch.cuda.current_stream(device).record_event()
        waiting.append(thread.submit(call, ready, function, arguments))

    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        try:
            yield submit
            while waiting:
                waiting.popleft().result()
        finally:
            thread.shutdown(cancel_futures=True)
