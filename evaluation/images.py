"""Images on disk, as evaluations read them: an .npz in ADM's format, precomputed statistics, or a folder of files."""

import contextlib
import zipfile

import numpy as np
from PIL import Image

from utils.errors import named

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# Mean and covariance of Inception's features: pooled ones for FID, and seven channels of a 17 x 17 layer for sFID.
POOL, SPATIAL_CHANNELS = 2048, 7
SPATIAL = 17 * 17 * SPATIAL_CHANNELS
STATISTICS = {"mu": (POOL,), "sigma": (POOL, POOL), "mu_s": (SPATIAL,), "sigma_s": (SPATIAL, SPATIAL)}


class ImageBatches:
    """uint8 images of `shape` (N, H, W, C), read batch by batch, and `statistics` {name: float64 array}, or {}.

    `path` is an .npz with the images in arr_0, or a folder of image files of one size. With `may_be_statistics`, the
    .npz may hold `STATISTICS`, too; without images, `shape` is (0,). Raises ValueError for anything else, and for
    damaged files.
    """

    def __init__(self, path, may_be_statistics=False):
        self.path, self.paths, self.statistics = path, None, {}
        with named(path, Exception):  # a damaged archive raises errors of many kinds
            if path.is_dir():
                self.paths = sorted(entry for entry in path.rglob("*") if entry.suffix.lower() in IMAGE_SUFFIXES)
                if not self.paths:
                    raise ValueError("the folder holds no images")
                self.mode = "RGB" if any(map(_has_colour, self.paths)) else "L"
                self.shape = (len(self.paths), *self._read(self.paths[0]).shape)
            elif zipfile.is_zipfile(path):
                self._open_npz(may_be_statistics)
            else:
                raise ValueError("it is not an .npz" if path.is_file() else "no such file or folder")

    def _open_npz(self, may_be_statistics):
        with np.load(self.path, allow_pickle=False) as content:
            names = set(content.files)
            if may_be_statistics and names & STATISTICS.keys():
                self.statistics = _read_statistics(content)
        if "arr_0" in names:
            with self._stream() as (shape, _):
                self.shape = shape
        elif self.statistics:
            self.shape = (0,)
        else:
            raise ValueError(f"it holds no arr_0, but {', '.join(sorted(names)) or 'nothing'}")

    @contextlib.contextmanager
    def _stream(self):
        """Give the shape of arr_0, and its file, open behind the header."""
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            shape, fortran_order, dtype = read_header[min(version[0], 2)](file)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or min(shape) < 0:
                raise ValueError(f"arr_0 is {dtype} {shape}; it must be uint8 (N, H, W, 3) or (N, H, W, 1)")
            if fortran_order:
                raise ValueError("arr_0 is in Fortran's order; save numpy.ascontiguousarray of it")
            size = archive.getinfo("arr_0.npy").file_size - file.tell()
            if size != int(np.prod(shape)):
                raise ValueError(f"arr_0 is {shape}, but has {size} bytes")
            yield shape, file

    def _read(self, path):
        with Image.open(path) as image:
            return np.asarray(image.convert(self.mode)).reshape(*image.size[::-1], -1)

    def __len__(self):
        return self.shape[0]

    def batches(self, size):
        """Yield arrays (up to `size`, H, W, C). Raise ValueError if the file is damaged."""
        with named(f"{self.path} is damaged", Exception):
            if self.paths is not None:
                for start in range(0, len(self), size):
                    images = [self._read(path) for path in self.paths[start : start + size]]
                    if any(image.shape != self.shape[1:] for image in images):
                        raise ValueError(f"not all images are of the size {self.shape[1:]} of the first")
                    yield np.stack(images)
                return
            with self._stream() as (_, file):
                for start in range(0, len(self), size):
                    rows = min(size, len(self) - start)
                    content = file.read(rows * int(np.prod(self.shape[1:])))
                    yield np.frombuffer(content, np.uint8).reshape(rows, *self.shape[1:])


def _read_statistics(content):
    """Return the `STATISTICS` of an open .npz. Raise ValueError if one is missing, misshapen or not finite."""
    if missing := STATISTICS.keys() - content.keys():
        raise ValueError(f"the statistics {', '.join(sorted(missing))} are missing")
    statistics = {name: np.asarray(content[name], dtype=np.float64) for name in STATISTICS}
    for name, array in statistics.items():
        if array.shape != STATISTICS[name]:
            raise ValueError(f"{name} has the shape {array.shape}; Inception's has {STATISTICS[name]}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite")
    return statistics


def _has_colour(path):
    """Return whether an image file is more than greyscale. Raise ValueError for one of more than 8 bits a channel."""
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{path.name} has more than 8 bits a channel")
        return image.mode not in ("1", "L")
