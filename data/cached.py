"""Cached latents: shards of posterior moments, which extract_latents.py writes and train.py reads."""

import math
import os
import pathlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import safetensors.torch
import torch
from torch.utils.data import Dataset

from utils import files
from utils.errors import named

MANIFEST, SETTINGS = "manifest.json", "settings.json"
# Keys of a manifest by their type; integers are positive.
MANIFEST_KEYS = {
    str: ("vae",),
    int: ("image_size", "channels", "latent_size", "num_classes"),
    bool: ("mirrors",),
    (int, float): ("scale", "shift"),
}


class CachedLatents(Dataset):
    """Posterior moments of images and of their mirror images, in memory-mapped shards.

    The key of an item is (index, flip), as for `ImageDataset`. An item is {"moments": float32 (2, C, h, w), the mean
    and standard deviation of the VAE's posterior, "y": int, "problems": []}. The manifest's keys are attributes.

    Args:
        folder: where extract_latents.py wrote a manifest and shards.
        skip_bad: leave out damaged shards, with a line for each in `left_out`.

    Raises:
        ValueError: the manifest cannot be read, or a shard is missing or differs from the manifest.
    """

    def __init__(self, folder, skip_bad=False):
        self.folder = pathlib.Path(folder)
        path = self.folder / MANIFEST
        manifest = files.read_json(path)
        with named(f"{path} is damaged or was not written by extract_latents.py", (ValueError, KeyError, TypeError)):
            for kind, key in ((kind, key) for kind, keys in MANIFEST_KEYS.items() for key in keys):
                if not isinstance(manifest[key], kind) or (kind is int and manifest[key] < 1):
                    raise ValueError(f"{key} is {manifest[key]!r}")
                setattr(self, key, manifest[key])
            paths = [self.folder / shard["file"] for shard in manifest["shards"]]
            with ThreadPoolExecutor() as threads:
                problems = list(threads.map(files.problem_with, paths, manifest["shards"]))
        self.left_out = [f"{problem}; run extract_latents.py again to rewrite it" for problem in problems if problem]
        self.paths = [path for path, problem in zip(paths, problems, strict=True) if not problem]
        if not self.paths or (self.left_out and not skip_bad):
            raise ValueError((self.left_out or [f"{path} names no shards"])[0])
        labels = [safetensors.safe_open(path, framework="pt").get_tensor("labels") for path in self.paths]
        self.ends, self.labels = np.cumsum([len(part) for part in labels]), torch.cat(labels).numpy()
        self.num_examples = len(self.labels)
        self.stores_images, self.with_images = manifest.get("keep_images", False), False
        self.opened = {}

    def require_images(self):
        """Add "images" to the items: float32 (3, H, W) in [-1, 1], mirrored if flip. Raise ValueError if not stored."""
        if not self.stores_images:
            raise ValueError(f"{self.folder} stores no images; make latents with extract_latents.py --keep-images")
        self.with_images = True

    def __len__(self):
        return self.num_examples

    def __getstate__(self):
        return self.__dict__ | {"opened": {}}  # a worker process opens the shards itself

    def __getitem__(self, key):
        index, flip = key
        number = int(np.searchsorted(self.ends, index, side="right"))
        shard, row = self._open(number), index - (int(self.ends[number - 1]) if number else 0)
        moments = shard.get_slice("moments")[row, int(flip)].float()
        item = {"moments": moments, "y": int(self.labels[index]), "problems": []}
        if self.with_images:
            image = shard.get_slice("images")[row] / 127.5 - 1
            item["images"] = image.flip(-1) if flip else image
        return item

    def _open(self, number):
        """Return a shard, memory-mapped by each process that reads it."""
        key = os.getpid(), number
        if key not in self.opened:
            self.opened[key] = safetensors.safe_open(self.paths[number], framework="pt")
        return self.opened[key]


class ShardWriter:
    """A writer of cached latents, shard by shard, that continues where an earlier one was stopped.

    Args:
        folder: for the shards and the manifest.
        settings: {key: plain data} of all that decides what is written; num_examples, shard_size and batch_size here.
    """

    def __init__(self, folder, settings):
        self.folder, self.settings = folder, settings
        self.count = math.ceil(settings["num_examples"] / settings["shard_size"])

    def prepare(self):
        """Create the folder and record the settings. Raise ValueError if it holds other files, or other settings."""
        path = self.folder / SETTINGS
        with named(f"--output {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                if any(entry != files.partial_name(path) for entry in self.folder.iterdir()):
                    raise ValueError(f"--output {self.folder} is not empty, and extract_latents.py did not write it")
                files.write_json(path, self.settings)
        files.check_same_settings(path, {"keep_images": None} | self.settings, "give another --output")

    def missing(self):
        """Return the numbers of the shards that are to be written. A damaged shard is named and written again."""
        missing = []
        for k in range(self.count):
            problem = files.problem_with(self._path(k), self._entry(k))
            if problem is not None:
                missing.append(k)
                if self._path(k).exists():
                    print(f"{problem}; it is written again")
        return missing

    def batches(self, k):
        """Return the batches of shard k, as ranges of indices. Each shard has its own: no other changes its bytes."""
        size, step = self.settings["shard_size"], self.settings["batch_size"]
        end = min((k + 1) * size, self.settings["num_examples"])
        return [range(start, min(start + step, end)) for start in range(k * size, end, step)]

    def write(self, k, tensors, left_out):
        """Write shard k, {key: tensor}, and its entry of the manifest; `left_out` has a line for each bad example."""
        with files.written_whole(self._path(k)) as partial:
            safetensors.torch.save_file(tensors, partial)
            name, examples = self._path(k).name, len(tensors["labels"])
            entry = {"file": name, "examples": examples, **files.manifest_entry(partial), "left_out": left_out}
            files.write_json(self._path(k).with_suffix(".json"), entry)

    def finish(self):
        """Write the manifest: the settings and the entries of all shards."""
        entries = [self._entry(k) for k in range(self.count)]
        files.write_json(self.folder / MANIFEST, self.settings | {"shards": entries})
        for k in range(self.count):
            self._path(k).with_suffix(".json").unlink(missing_ok=True)

    def _path(self, k):
        return self.folder / f"shard-{k:05d}.safetensors"

    def _entry(self, k):
        """Return the entry of shard k: from its own file, or else from the manifest. Without either, none fits it."""
        path = self._path(k).with_suffix(".json")
        try:
            return files.read_json(path) if path.is_file() else files.read_json(self.folder / MANIFEST)["shards"][k]
        except (ValueError, KeyError, IndexError):
            return {"bytes": None}
