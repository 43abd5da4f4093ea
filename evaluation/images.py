"""Images on disk, as evaluations read them: an .npz in ADM's format, precomputed statistics, or a folder of files."""

import contextlib
import math
import pathlib
import zipfile

import numpy as np
from PIL import Image

from data.folders import PassedOver, find_splits, walk_images
from data.images import allow_large_images, to_pil
from utils.files import named, one_line, read_npy_header, written_whole

GREY_MODES = ("1", "L", "LA", "I;16", "I;16B", "I;16L", "I;16N")  # of PIL
INCEPTION, FEATURES_OF = "inception", "features_of"  # a file without this name holds statistics of Inception's features
# Mean and covariance of Inception's features: pooled ones for FID, and seven channels of a 17 x 17 layer for sFID.
POOL, SPATIAL_CHANNELS = 2048, 7
SPATIAL = 17 * 17 * SPATIAL_CHANNELS
STATISTICS = {"mu": (POOL,), "sigma": (POOL, POOL), "mu_s": (SPATIAL,), "sigma_s": (SPATIAL, SPATIAL)}
ASYMMETRY = 1e-3  # of a covariance, relative to its largest number; float32 and other orders of summation stay below


class ImageBatches:
    """uint8 images of `shape` (N, H, W, C), read batch by batch, and `statistics` {name: float64 array}, or {}.

    `path` is an .npz with the images in arr_0, or a folder of image files of one size, also in folders within it. With
    `may_be_statistics`, the .npz may hold mu and sigma of `STATISTICS`, or all four, too, or those of other features,
    see `write_statistics`; without images, `shape` is (0,). `notes` are lines on what of a folder is passed over. Raise
    ValueError for other or damaged files."""

    def __init__(self, path, may_be_statistics=False):
        self.path, self.paths, self.shape, self.statistics, self.notes = path, None, (0,), {}, []
        self.kind = None  # of the features that the statistics are of
        with named(path, Exception):  # a damaged archive raises errors of many kinds
            if path.is_dir():
                self._open_folder()
            elif zipfile.is_zipfile(path):
                self._open_npz(may_be_statistics)
            elif path.suffix in (".pkl", ".pickle"):
                raise ValueError("a pickle can run code and is not read; store its mu and sigma by np.savez")
            else:
                raise ValueError("it is not an .npz" if path.is_file() else "no such file or folder")

    def _open_folder(self):
        passed = PassedOver()
        found = walk_images(self.path, passed)
        self.paths = sorted(pathlib.Path(root, name) for root, names in found for name in names)
        self.notes = [f"{self.path}: {line}" for line in passed.lines()]
        if splits := find_splits(self.path)[0]:
            self.notes.append(f"{self.path}: the images of {', '.join(splits)} are read together")
        if not self.paths:
            raise ValueError("the folder holds no images")
        allow_large_images()
        sizes, self.mode = {}, "L"
        for path in self.paths:
            with named(path.relative_to(self.path), Exception), Image.open(path) as image:
                to_pil(Image.new(image.mode, (1, 1)))  # whether the range of its pixels is known
                sizes.setdefault(image.size, path.name)
                self.mode = self.mode if image.mode in GREY_MODES else "RGB"
            if len(sizes) > 1:
                found = " and ".join(f"{name} of {width} x {height}" for (width, height), name in sizes.items())
                raise ValueError(f"not all images are of one size: there are {found} pixels")
        ((width, height),) = sizes
        self.shape = (len(self.paths), height, width, len(self.mode))

    def _open_npz(self, may_be_statistics):
        with np.load(self.path, allow_pickle=False) as content:
            names = set(content.files)
            if may_be_statistics and names & STATISTICS.keys():
                wanted = list(STATISTICS)[: 4 if names & {"mu_s", "sigma_s"} else 2]
                if missing := set(wanted) - names:
                    raise ValueError(f"the statistics {', '.join(sorted(missing))} are missing")
                self.kind, shapes = INCEPTION, STATISTICS
                if FEATURES_OF in names:
                    self.kind, size = one_line(content[FEATURES_OF], 150), content["mu"].size
                    shapes = STATISTICS | dict(mu=(size,), sigma=(size, size))
                self.statistics = {name: _checked(name, content[name], shapes[name]) for name in wanted}
        if "arr_0" in names:
            with self._stream() as (shape, _):
                self.shape = shape
        elif not self.statistics:
            some = sorted(names)[:5] + ["..."] * (len(names) > 5)
            raise ValueError(f"it holds no arr_0, but {', '.join(some) or 'nothing'}")

    @contextlib.contextmanager
    def _stream(self):
        """Give the shape of arr_0, and its file, open behind the header."""
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            shape, dtype, in_order = read_npy_header(file)
            size = archive.getinfo("arr_0.npy").file_size - file.tell()
            is_images = dtype == np.uint8 and len(shape) == 4 and shape[3] in (1, 3) and min(shape) >= 0
            if not is_images or not in_order or size != math.prod(shape):
                found = f"{dtype} {shape}{'' if in_order else ' in Fortran order'} with {size} bytes"
                raise ValueError(f"arr_0 is {found}; it must be uint8 (N, H, W, 3) or (N, H, W, 1) in C order")
            yield shape, file

    def _read(self, path):
        with named(path.relative_to(self.path), Exception), Image.open(path) as image:
            return np.asarray(to_pil(image).convert(self.mode)).reshape(*self.shape[1:])

    def __len__(self):
        return self.shape[0]

    def statistics_of(self, features):
        """Return the statistics of `features`, or {}. Raise ValueError if there are only others, or sizes differ."""
        if self.kind != features.kind:
            if self.statistics and not len(self):
                raise ValueError(f"{self.path} holds statistics of {self.kind}, not of {features.kind}, and no images")
            return {}
        sizes = tuple(map(len, self.statistics.values()))[::2]
        if sizes != features.sizes[: len(sizes)]:
            raise ValueError(f"{self.path} holds statistics of {sizes} features, not of {features.sizes}")
        return self.statistics

    def batches(self, size):
        """Yield arrays (up to `size`, H, W, C). Raise ValueError if the file is damaged."""
        shape, starts = self.shape[1:], range(0, len(self), size)
        with named(f"{self.path} is damaged", Exception):
            if self.paths is None:
                with self._stream() as (_, file):
                    for _ in starts:
                        yield np.frombuffer(file.read(size * math.prod(shape)), np.uint8).reshape(-1, *shape)
                return
            for start in starts:
                yield np.stack([self._read(path) for path in self.paths[start : start + size]])


def write_statistics(path, kind, statistics):
    """Write a tuple (mu, sigma) or (mu, sigma, mu_s, sigma_s) of features of a kind, as `ImageBatches` reads it.

    Those of Inception have the names and shapes of ADM's references; others have a mark of their kind beside them."""
    mark = {} if kind == INCEPTION else {FEATURES_OF: kind}
    with written_whole(path) as partial, open(partial, "wb") as file:
        np.savez(file, **dict(zip(STATISTICS, statistics, strict=False)), **mark)


def _checked(name, array, shape):
    """Return one of STATISTICS in float64. Raise ValueError if it cannot be a mean or covariance of this shape."""
    if array.shape != shape:
        raise ValueError(f"{name} has the shape {array.shape}, and must be {shape}")
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} holds {array.dtype}, not real numbers")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} is not finite")
    if array.ndim == 2 and (abs(array - array.T).max() > ASYMMETRY * abs(array).max() or array.diagonal().min() < 0):
        raise ValueError(f"{name} is no covariance: it is not symmetric, or has a variance below 0")
    return array
