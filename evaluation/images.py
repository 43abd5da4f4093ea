"""Images on disk, as evaluations read them: an .npz in ADM's format, precomputed statistics, or a folder of files."""

import contextlib
import math
import zipfile

import numpy as np
from PIL import Image

from utils.files import named

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# Mean and covariance of Inception's features: pooled ones for FID, and seven channels of a 17 x 17 layer for sFID.
POOL, SPATIAL_CHANNELS = 2048, 7
SPATIAL = 17 * 17 * SPATIAL_CHANNELS
STATISTICS = {"mu": (POOL,), "sigma": (POOL, POOL), "mu_s": (SPATIAL,), "sigma_s": (SPATIAL, SPATIAL)}


class ImageBatches:
    """uint8 images of `shape` (N, H, W, C), read batch by batch, and `statistics` {name: float64 array}, or {}.

    `path` is an .npz with the images in arr_0, or a folder of image files of one size. With `may_be_statistics`, the
    .npz may hold `STATISTICS`, too; without images, `shape` is (0,). Raise ValueError for other or damaged files."""

    def __init__(self, path, may_be_statistics=False):
        self.path, self.paths, self.shape, self.statistics = path, None, (0,), {}
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
                if missing := STATISTICS.keys() - names:
                    raise ValueError(f"the statistics {', '.join(sorted(missing))} are missing")
                self.statistics = {name: np.asarray(content[name], dtype=np.float64) for name in STATISTICS}
        for name, array in self.statistics.items():
            if array.shape != STATISTICS[name]:
                raise ValueError(f"{name} has the shape {array.shape}; Inception's has {STATISTICS[name]}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} is not finite")
        if "arr_0" in names:
            with self._stream() as (shape, _):
                self.shape = shape
        elif not self.statistics:
            raise ValueError(f"it holds no arr_0, but {', '.join(sorted(names)) or 'nothing'}")

    @contextlib.contextmanager
    def _stream(self):
        """Give the shape of arr_0, and its file, open behind the header."""
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            shape, fortran_order, dtype = read_header[min(version[0], 2)](file)
            size = archive.getinfo("arr_0.npy").file_size - file.tell()
            is_images = dtype == np.uint8 and len(shape) == 4 and shape[3] in (1, 3) and min(shape) >= 0
            if not is_images or fortran_order or size != math.prod(shape):
                found = f"{dtype} {shape}{' in Fortran order' if fortran_order else ''} with {size} bytes"
                raise ValueError(f"arr_0 is {found}; it must be uint8 (N, H, W, 3) or (N, H, W, 1) in C order")
            yield shape, file

    def _read(self, path):
        with Image.open(path) as image:
            return np.asarray(image.convert(self.mode)).reshape(*image.size[::-1], -1)

    def __len__(self):
        return self.shape[0]

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
                images = [self._read(path) for path in self.paths[start : start + size]]
                if any(image.shape != shape for image in images):
                    raise ValueError(f"not all images are of the size {shape} of the first")
                yield np.stack(images)


def _has_colour(path):
    """Return whether an image file is more than greyscale. Raise ValueError for one of more than 8 bits a channel."""
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{path.name} has more than 8 bits a channel")
        return image.mode not in ("1", "L")
