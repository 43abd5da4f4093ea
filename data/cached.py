"""Cached latents: shards of posterior moments, which extract_latents.py writes and train.py reads."""

import contextlib
import math
import os
import pathlib

import numpy as np
import safetensors.torch
import torch
from torch.utils.data import Dataset

from data.images import label_problem
from utils import encoders, files
from utils.sizes import is_size, pair, scaled
from utils.weights import class_names

MANIFEST, SETTINGS = "manifest.json", "settings.json"
SIZES, COUNTS = ("image_size", "latent_size"), ("channels", "num_classes")  # keys of a manifest
CONSTANT = 1e-6  # standard deviation of a channel that is only rounded, in units of its mean or 1
DTYPES = "float16", "float32"  # of moments
FEATURES = {"encoder": str, "sha256": str, "grid": list, "width": int}  # of the patch features in the shards
OTHER_KEYS = {"vae": str, "mirrors": bool, "scale": (int, float, list), "shift": (int, float, list)}


class CachedLatents(Dataset):
    """Posterior moments of images and of their mirror images, in memory-mapped shards.

    The key of an item is (index, flip), as for `ImageDataset`. An item is {"moments": float32 (2, C, h, w), the mean
    and standard deviation of the VAE's posterior, "y": int, "problems": []}. The manifest's keys are attributes. Raise
    ValueError if the manifest that extract_latents.py wrote into `folder` cannot be read, or a shard is missing or
    differs from it; with `skip_bad`, leave such shards out, with a line for each in `left_out`. A shard is read to see
    that if it is new or has changed since it was; with `verify` "full", always."""

    def __init__(self, folder, skip_bad=False, verify="changed"):
        self.folder = pathlib.Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            stopped = (self.folder / SETTINGS).is_file()
            advice = "extract_latents.py has not finished there; run it again" if stopped else "it is no cached latents"
            raise ValueError(f"{self.folder} has no {MANIFEST}: {advice}")
        manifest = files.read_json(path)
        problem = f"{path} is damaged or was not written by extract_latents.py"
        with files.named(problem, (ValueError, KeyError, TypeError)):
            kinds = dict.fromkeys(SIZES, (int, list)) | dict.fromkeys(COUNTS, int) | OTHER_KEYS
            for key, kind in kinds.items():
                if not isinstance(manifest[key], kind) or (key in SIZES + COUNTS and not is_size(manifest[key])):
                    raise ValueError(f"{key} is {manifest[key]!r}")
                is_list = key in OTHER_KEYS and isinstance(manifest[key], list)
                if is_list and not np.array_equal(np.isfinite(manifest[key]), [True] * manifest["channels"]):
                    raise ValueError(f"{key} is {manifest[key]!r}, not one finite number per channel")
                setattr(self, key, manifest[key])
            if scaled(self.latent_size, pair(self.image_size)[0] // pair(self.latent_size)[0]) != self.image_size:
                raise ValueError(f"latent_size is {self.latent_size}, and image_size {self.image_size} no multiple")
            self.features, self.with_features = manifest.get("features"), False
            for key, kind in FEATURES.items() if self.features is not None else ():
                if not isinstance(self.features[key], kind):
                    raise ValueError(f"{key} of the features is {self.features[key]!r}")
            paths = [self.folder / shard["file"] for shard in manifest["shards"]]
            problems = files.problems_with(self.folder, manifest["shards"], read_all=verify == "full")
        self.left_out = [f"{problem}; run extract_latents.py again to rewrite it" for problem in problems if problem]
        self.paths = [path for path, problem in zip(paths, problems, strict=True) if not problem]
        if not self.paths or (self.left_out and not skip_bad):
            raise ValueError((self.left_out or [f"{path} names no shards"])[0])
        labels = [safetensors.safe_open(path, framework="pt").get_tensor("labels") for path in self.paths]
        self.ends, self.labels = np.cumsum([len(part) for part in labels]), torch.cat(labels).numpy()
        self.num_examples, self.class_names, self.notes = len(self.labels), class_names({"data": manifest}), []
        for i in np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))[:1]:
            raise ValueError(label_problem(self.labels[i], self.num_classes, f"example {i} of {self.folder}"))
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"{path} names {len(self.class_names)} classes and has {self.num_classes}")
        self.stores_images, self.with_images = manifest.get("keep_images", False), False
        self.scaled_by_data = manifest.get("channel_statistics", False)  # and not by the autoencoder's config
        self.shards = {}  # open ones, by process and number

    def require_images(self):
        """Add "images" to the items: float32 (3, H, W) in [-1, 1], mirrored if flip. Raise ValueError if not stored."""
        if not self.stores_images:
            raise ValueError(f"{self.folder} stores no images; make latents with extract_latents.py --keep-images")
        self.with_images = True

    def require_features(self, encoder, grid):
        """Add "features" to the items: float16 (h * w, width), of the image's patches, mirrored if flip.

        Raise ValueError unless they are stored, of `encoder`, a name in timm or a folder, and on a grid (h, w)."""
        there = self.features
        if not encoders.is_same(encoder, there["encoder"], there["sha256"]):
            raise ValueError(f"--align {encoder}: the features in {self.folder} are of {there['encoder']}")
        if there["grid"] != list(grid):
            sides = [" x ".join(map(str, sides)) for sides in (there["grid"], grid)]
            problem = f"the features in {self.folder} are of {sides[0]} patches, and the model has {sides[1]} tokens"
            raise ValueError(f"{problem}; extract_latents.py --patch-size decides it")
        self.with_features = True

    def __len__(self):
        return self.num_examples

    def __getstate__(self):
        return self.__dict__ | {"shards": {}}  # a worker process opens the shards itself

    def __getitem__(self, key):
        index, flip = key
        number = int(np.searchsorted(self.ends, index, side="right"))
        opened = os.getpid(), number
        if opened not in self.shards:
            self.shards[opened] = safetensors.safe_open(self.paths[number], framework="pt")
        shard, row = self.shards[opened], index - (int(self.ends[number - 1]) if number else 0)
        moments = shard.get_slice("moments")[row, int(flip)].float()
        item = {"moments": moments, "y": int(self.labels[index]), "problems": []}
        if self.with_images:
            image = shard.get_slice("images")[row] / 127.5 - 1
            item["images"] = image.flip(-1) if flip else image
        if self.with_features:
            item["features"] = shard.get_slice("features")[row, int(flip)]
        return item


class ShardWriter:
    """A writer of cached latents into a folder, shard by shard, that continues where an earlier one was stopped.

    `settings` is {key: plain data} of all that decides what is written; num_examples, shard_size and batch_size here.
    `class_names` go into the manifest.
    """

    def __init__(self, folder, settings, class_names=None):
        self.folder, self.settings, self.class_names = folder, settings, class_names
        examples, size = range(settings["num_examples"]), settings["shard_size"]
        self.shards = [examples[start : start + size] for start in range(0, len(examples), size)]
        self.paths = [folder / f"shard-{k:05d}.safetensors" for k in range(len(self.shards))]

    def prepare(self):
        """Create and lock the folder, and record the settings.

        Raise ValueError if it holds other files or other settings, or another process writes to it."""
        path, advice = self.folder / SETTINGS, "give another --output"
        with files.named(f"--output {self.folder}"):
            files.lock(self.folder, f"another process is writing to --output {self.folder}; wait for it, or {advice}")
            files.keep_settings(path, self.settings, advice, "extract_latents.py")
        options = dict.fromkeys(("keep_images", "features", "channel_statistics"))
        files.check_same_settings(path, options | self.settings, advice)

    def missing(self):
        """Return the numbers of the shards that are to be written. A damaged shard is named and written again."""
        missing = []
        for k, path in enumerate(self.paths):
            if problem := files.problem_with(path, self._entry(k)):
                missing.append(k)
                if path.exists():
                    print(f"{problem}; it is written again")
        return missing

    def batches(self, k):
        """Return the batches of shard k, as ranges of indices. Each shard has its own: no other changes its bytes."""
        shard, size = self.shards[k], self.settings["batch_size"]
        return [shard[start : start + size] for start in range(0, len(shard), size)]

    def write(self, k, tensors, left_out):
        """Write shard k, {key: tensor}, and its entry of the manifest; `left_out` has a line for each bad example.

        Raise ValueError if that fails, on a full disk for example."""
        path, kinds = self.paths[k], (OSError, safetensors.SafetensorError)
        with files.named(f"{path} cannot be written", kinds), files.written_whole(path) as partial:
            safetensors.torch.save_file(tensors, partial)
            entry = {"file": path.name, "examples": len(tensors["labels"]), **files.manifest_entry(partial)}
            if self.settings.get("channel_statistics"):
                entry["sums"] = channel_sums(tensors["moments"])
            files.write_json(path.with_suffix(".json"), entry | {"left_out": left_out})

    def finish(self):
        """Write the manifest: settings, class names and the entries of all shards. Return lines for the user.

        Raise ValueError if that fails."""
        entries, lines = [self._entry(k) for k in range(len(self.paths))], []
        named = {"class_names": self.class_names} if self.class_names else {}
        if self.settings.get("channel_statistics"):
            scaling, constant = channel_statistics([entry["sums"] for entry in entries])
            named |= scaling
            lines = [f"channel {channel} is constant: it is shifted, and not scaled" for channel in constant]
        with files.named(self.folder / MANIFEST):
            files.write_json(self.folder / MANIFEST, self.settings | named | {"shards": entries})
        for path in self.paths:
            path.with_suffix(".json").unlink(missing_ok=True)
        return lines

    def _entry(self, k):
        """Return the entry of shard k: from its own file, or else from the manifest. Without either, none fits it."""
        path = self.paths[k].with_suffix(".json")
        try:
            return files.read_json(path) if path.is_file() else files.read_json(self.folder / MANIFEST)["shards"][k]
        except (ValueError, KeyError, IndexError):
            return {"bytes": None}


def channel_sums(moments):
    """Return the number of sampled values in each channel, and the expected sums of them and of their squares.

    `moments` is (N, 2, 2, C, h, w), mean and standard deviation of the posteriors of N images and of their mirror
    images; the expected square of a sample is mean^2 + std^2. NumPy's sums of float64 depend on no number of threads.
    Raise ValueError if one is not finite."""
    sums = {"values": moments[:, :, 0, 0].numel(), "sum": [], "squares": []}
    for channel in moments.unbind(3):  # one at a time: in float64 a whole shard takes twice its memory
        mean, std = (part.numpy() for part in channel.double().unbind(2))
        sums["sum"].append(float(mean.sum()))
        sums["squares"].append(float((mean**2 + std**2).sum()))
    if not np.isfinite(sums["squares"]).all():
        raise ValueError("latents are not finite, or too large for --dtype float16")
    return sums


def channel_statistics(sums):
    """Return ({"scale": 1 / std, "shift": mean}, each a list of C floats, the constant channels, whose scale is 1).

    `sums` are the `channel_sums` of parts of the data; their order changes nothing."""
    count = max(1, sum(part["values"] for part in sums))
    columns = (zip(*(part[key] for part in sums), strict=True) for key in ("sum", "squares"))
    mean, square = (np.array([math.fsum(column) / count for column in rows]) for rows in columns)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    constant = std <= CONSTANT * np.maximum(abs(mean), 1)
    scaling = {"scale": (1 / np.where(constant, 1, std)).tolist(), "shift": mean.tolist()}
    return scaling, np.flatnonzero(constant).tolist()


def stopped_setting(folder, key):
    """Return "image_size" or "dtype" of an extraction into `folder` that was stopped, and continues so; else None."""
    with contextlib.suppress(ValueError):
        value = files.read_json(folder / SETTINGS).get(key)
        return value if (is_size(value) if key == "image_size" else value in DTYPES) else None
