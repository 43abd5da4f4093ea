"""Cached latents of other projects, read as they are: LightningDiT's shards, REPA's moments, fast-DiT's samples.

None of them says how large the images were or, but for the size of its channels, which autoencoder encoded them. --vae
says it; by default it is the one that the project's own script takes, and for LightningDiT unknown."""

import contextlib
import functools
import io
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import safetensors
import torch
from torch.utils.data import Dataset

from data.archives import FolderFiles, read_table
from data.images import first_good, label_problem
from data.labelled import MOST_CLASSES, leave_out, number_labels
from utils.files import named, one_line, read_npy_header
from utils.tensor_files import read_pt
from vae import UNKNOWN_VAE, geometry

SD_SCALE = 0.18215  # of the Stable Diffusion VAEs' latents, in REPA and in fast-DiT
STATISTICS = "latents_stats.pt"
MOST_MEASURED = 10_000  # latents whose mean and standard deviation LightningDiT takes for those of all
# EDM2 encodes images in [0, 1], REPA in [-1, 1]; their files look alike. EDM2's mean of each channel:
EDM2_MEAN = torch.tensor([5.81, 3.25, 0.12, -2.15])
READ_ERRORS = ValueError, OSError, EOFError, safetensors.SafetensorError


class ForeignLatents(Dataset):
    """Latents in another project's files, with the items and attributes of `CachedLatents`.

    A subclass sets `kind`, `folder` and `shape` (C, h, w), and has `name(i)`, what messages call a latent, and
    `moments(i, flip)`, the posterior's mean and standard deviation, unscaled, float32 (2, C, h, w). `resolve` sets what
    the files do not say. A latent that cannot be read is replaced by the next; a line in "problems" says so."""

    vae, scale, shift = UNKNOWN_VAE, SD_SCALE, 0.0
    mirrors, default_downsampling = False, 8  # whether mirror images are stored; of an unknown VAE
    class_names, doubt = None, None  # doubt: why --vae must be given

    def finish(self, labels, left_out, skip_bad):
        """Set what follows from (N,) labels and from the shape (C, h, w). Raise ValueError if they make no sense."""
        self.left_out, self.labels, self.num_examples, self.notes = left_out, np.asarray(labels), len(labels), []
        if not len(labels):
            raise ValueError(f"{self.folder} holds no latents")
        if self.labels.dtype.kind not in "iu" or self.labels.ndim != 1:
            raise ValueError(f"{self.folder}: the labels are {self.labels.dtype}, not one integer for each latent")
        bad = (self.labels < 0) | (self.labels >= MOST_CLASSES)
        for i in np.flatnonzero(bad)[:1]:
            if not skip_bad or bad.all():
                raise ValueError(label_problem(self.labels[i], MOST_CLASSES, self.name(int(i))))
        if len(self.shape) != 3 or self.shape[1] != self.shape[2]:
            raise ValueError(f"{self.folder}: latents of the shape {self.shape}; they must be square (C, h, h)")
        self.channels, self.latent_size = self.shape[:2]
        self.num_classes = int(self.labels[~bad].max()) + 1
        self.image_size = self.latent_size * self.default_downsampling

    def resolve(self, vae, image_size, num_classes):
        """Set vae, image_size and num_classes from flags, None where not given. Raise ValueError if they do not fit."""
        what = f"the latents of {self.kind} in {self.folder}"
        if vae is None and self.doubt:
            raise ValueError(f"{what}: {self.doubt}")
        given, vae = vae, vae or self.vae
        if vae == UNKNOWN_VAE:
            size, fits = image_size or self.image_size, f"a multiple of their side, {self.latent_size}"
        else:
            downsampling, channels = geometry(vae, None)
            if channels != self.channels:
                found = "pixels" if vae == "none" else f"latents of {channels} channels"
                raise ValueError(f"--vae {vae} makes {found}, and {what} have {self.channels} channels")
            size = self.latent_size * downsampling
            fits = f"{size}, {downsampling} times their side"
        if image_size not in (None, size) or isinstance(size, list) or size % self.latent_size:
            raise ValueError(f"--image-size {image_size} does not fit {what}: it must be {fits}")
        if num_classes is not None and num_classes < self.num_classes:
            raise ValueError(f"--num-classes {num_classes}: {what} have labels up to {self.num_classes - 1}")
        self.vae, self.image_size, self.num_classes = vae, size, num_classes or self.num_classes
        if given is None:
            assumed = "to decode, give --vae" if vae == UNKNOWN_VAE else f"assumed: --vae {vae}"
            self.notes.append(f"{what} do not name their VAE; {assumed}; images of {size} x {size} pixels")

    def require_images(self):
        """Raise ValueError: no images are stored beside the latents."""
        raise ValueError(f"{self.folder} stores no images; make latents with extract_latents.py --keep-images")

    def some(self, most):
        """Yield the moments of up to `most` latents at even distances, except those that cannot be read."""
        for i in np.unique(np.linspace(0, len(self) - 1, min(len(self), most)).astype(int)):
            with contextlib.suppress(*READ_ERRORS):  # training names it
                yield self._checked(int(i), False)

    def _checked(self, i, flip):
        moments = self.moments(i, flip)
        if moments.shape != (2, *self.shape) or not moments.isfinite().all():
            raise ValueError(f"the shape is {tuple(moments.shape[1:])}, not {self.shape}, or a value is not finite")
        return moments

    def __len__(self):
        return self.num_examples

    def __getitem__(self, key):
        index, flip = key
        return first_good(lambda i: self._read(i, flip), index, len(self))

    def _read(self, i, flip):
        """Return an item, or "problems" alone."""
        try:
            moments = self._checked(i, flip)
        except READ_ERRORS as error:
            return {"problems": [f"{self.name(i)}: the latent cannot be read: {one_line(error)}"]}
        problem = label_problem(self.labels[i], MOST_CLASSES, self.name(i))
        return {"moments": moments, "y": int(self.labels[i]), "problems": [problem] if problem else []}


class LightningLatents(ForeignLatents):
    """LightningDiT's shards (safetensors): "latents", "labels" and maybe "latents_flip", of the mirror images.

    The scaled latent is (latent - mean) / std, of each channel, from latents_stats.pt. Without that file they are those
    of up to 10,000 latents, at even distances, where LightningDiT takes as many at random."""

    kind, default_downsampling = "LightningDiT (.safetensors)", 16  # of VA-VAE

    def __init__(self, folder, skip_bad=False):
        self.folder, self.paths, self.shape, self.mirrors = str(folder), [], None, True
        labels, left_out = [], []
        for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
            with leave_out(left_out, skip_bad):
                labels.append(self._add(path))
        self.ends = np.cumsum([len(part) for part in labels])
        self.finish(np.concatenate(labels) if labels else [], left_out, skip_bad)
        self.opened = {}  # shards, by process and path
        self.shift, self.scale = self._statistics()

    def __getstate__(self):
        return self.__dict__ | {"opened": {}}  # a worker process opens the shards itself

    def _add(self, path):
        """Add a shard. Return its labels."""
        with named(f"{path} is not a readable shard of LightningDiT", READ_ERRORS):
            with safetensors.safe_open(path, framework="pt") as shard:
                labels = shard.get_tensor("labels").flatten().numpy()
                keys = {"latents", "latents_flip"} & set(shard.keys())
                shapes = {tuple(shard.get_slice(key).get_shape()) for key in keys}
            shape = shapes.pop() if len(shapes) == 1 else ()
            if shape[:1] != labels.shape or shape[1:] != (self.shape or shape[1:]):
                raise ValueError(f"latents of the shape {shape} for {len(labels)} labels, after {self.shape}")
        self.shape, self.mirrors = shape[1:], self.mirrors and "latents_flip" in keys
        self.paths.append(path)
        return labels

    def _statistics(self):
        """Return (mean, std) of each channel as lists, (shift, 1 / scale)."""
        path = pathlib.Path(self.folder) / STATISTICS
        if path.exists():
            content = read_pt(path)
            with named(f"{path} does not hold 'mean' and 'std' of {self.channels} channels", Exception):
                mean, std = (content[key].double().flatten() for key in ("mean", "std"))
                if not len(mean) == len(std) == self.channels or not mean.isfinite().all() or not (std > 0).all():
                    raise ValueError(f"their shapes are {tuple(mean.shape)} and {tuple(std.shape)}")
        else:
            some = [mean for mean, _ in self.some(MOST_MEASURED)]
            if not some:
                raise ValueError(f"{self.folder}: not one latent can be read")
            std, mean = torch.std_mean(torch.stack(some, dim=1).flatten(1).double(), dim=1)
            std = std.clamp(min=1e-6)
            self.notes.append(f"{path} is missing: mean and standard deviation are those of {len(some)} latents")
        return mean.tolist(), (1 / std).tolist()

    def _place(self, index):
        number = int(np.searchsorted(self.ends, index, side="right"))
        return self.paths[number], index - (int(self.ends[number - 1]) if number else 0)

    def name(self, index):
        return "{}, row {}".format(*self._place(index))

    def moments(self, index, flip):
        path, row = self._place(index)
        opened = os.getpid(), path
        if opened not in self.opened:
            self.opened[opened] = safetensors.safe_open(path, framework="pt")
        latent = self.opened[opened].get_slice("latents_flip" if flip else "latents")[row].float()
        return torch.stack([latent, torch.zeros_like(latent)])


class ArrayFiles(ForeignLatents):
    """Latents in .npy files, `files` at `places`: REPA's moments (2C, h, h), or fast-DiT's scaled samples (1, C, h, h).

    The moments are mean and standard deviation of the posterior; that of a sample is 0."""

    def __init__(self, files, places, labels, left_out, skip_bad, samples):
        self.kind, self.vae = ("fast-DiT (.npy)", "ema") if samples else ("REPA (.npy)", "mse")
        self.folder, self.files, self.places, self.samples = files.path.rstrip("/"), files, places, samples
        for i in range(len(places)):
            with leave_out([], skip_bad), named(f"{self.name(i)} cannot be read", READ_ERRORS):  # training names it
                self.shape = tuple(self.moments(i, False).shape[1:])
                break
        else:
            raise ValueError(f"{self.folder} holds no latents that can be read")
        self.finish(labels, left_out, skip_bad)
        some = [] if samples else list(self.some(64))
        mean = torch.stack(some).mean((0, 3, 4))[0] if some else torch.zeros(0)
        if any((std < 0).any() for _, std in some):
            what = "standard deviations below 0, as the logarithms of variances are, which are not read as such"
            self.notes.append(f"warning: {self.folder} has {what}")
        if mean.shape == EDM2_MEAN.shape and (mean - EDM2_MEAN).abs().max() < 1.5:
            advice = "encode the images again with extract_latents.py, or give --vae mse if they are REPA's"
            self.doubt = f"they look like EDM2's, of images in [0, 1], which decode wrongly here; {advice}"

    def name(self, index):
        return self.files.path + self.files.names[self.places[index]]

    def moments(self, index, flip):
        array = _read_npy(self.files.read(self.places[index]))
        if array.ndim != (4 if self.samples else 3) or (len(array) != 1 if self.samples else len(array) % 2):
            form = "(1, C, h, h), a sample" if self.samples else "(2C, h, h), mean and standard deviation"
            raise ValueError(f"the array is {array.shape}; it must be {form}")
        values = torch.from_numpy(array.astype(np.float32).reshape(-1, *array.shape[-2:]))
        return torch.stack((values / SD_SCALE, torch.zeros_like(values)) if self.samples else values.chunk(2))


def open_moments(files, table, skip_bad):
    """Return the latents of REPA's vae-sd, a folder or zip with .npy files and dataset.json. Raise ValueError."""
    places, labels, left_out = read_table(files, table, (".npy",), skip_bad)
    with named(files.path + files.names[table], ValueError):
        labels, names = number_labels(labels)
    latents = ArrayFiles(files, places, labels, left_out, skip_bad, samples=False)
    latents.class_names = names
    return latents


def open_samples(features, labels, skip_bad):
    """Return the latents of fast-DiT: folders NAME_features and NAME_labels of .npy files. Raise ValueError."""
    files, labelled, left_out = FolderFiles(features), FolderFiles(labels), []
    if alone := sorted(set(files.names) ^ set(labelled.names)):
        with leave_out(left_out, skip_bad):
            where = f"{features.parent}: {len(alone)} files of {features.name} and {labels.name}"
            raise ValueError(f"{where} have no partner, the first {alone[0]}")
    pairs = set(files.names) & set(labelled.names)
    places, label_places = ([i for i, name in enumerate(part.names) if name in pairs] for part in (files, labelled))
    with ThreadPoolExecutor() as threads:
        numbers = list(threads.map(functools.partial(_read_label, labelled), label_places))
    return ArrayFiles(files, places, numbers, left_out, skip_bad, samples=True)


def _read_label(files, i):
    with named(f"{files.path}{files.names[i]} is not a readable label", READ_ERRORS):
        return _read_npy(files.read(i)).item()


@functools.lru_cache
def _parse_header(header):
    return read_npy_header(io.BytesIO(header))


def _read_npy(content):
    """Return the array in the bytes of an .npy file. Headers repeat: NumPy's parser takes longer than the rest."""
    end = 10 + int.from_bytes(content[8:10], "little")
    shape, dtype, in_order = _parse_header(content[:end])
    return np.frombuffer(content, dtype, offset=end).reshape(shape, order="C" if in_order else "F")


def find_latents(path):
    """Return a function of `skip_bad` that opens LightningDiT's or fast-DiT's latents in a folder; None without any."""
    for folder in (path, path.parent) if path.name.endswith("features") else (path,):
        for features in sorted(folder.glob("*features")):
            labels = features.with_name(features.name.removesuffix("features") + "labels")
            if labels.is_dir() and any(features.glob("*.npy")):
                return functools.partial(open_samples, features, labels)
    shards = sorted(path.glob("*.safetensors"))
    return functools.partial(LightningLatents, path) if any(map(_is_shard, shards[:1])) else None


def _is_shard(path):
    """Return whether a file is a shard of LightningDiT, maybe a damaged one."""
    try:
        with safetensors.safe_open(path, framework="pt") as shard:
            return "latents" in shard.keys()
    except (OSError, safetensors.SafetensorError):
        return path.name.startswith("latents") or (path.parent / STATISTICS).exists()
