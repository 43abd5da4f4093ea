"""Images on the disk, as evaluations take them: an .npz as ADM writes it, its statistics, or a folder of files."""

import contextlib
import zipfile

import numpy as np
from PIL import Image

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# Of Inception's features, for FID (mu, sigma) and for sFID (mu_s, sigma_s: seven channels of 17 x 17).
STATISTICS = ("mu", "sigma", "mu_s", "sigma_s")
SIZES_OF_STATISTICS = {"mu": 2048, "mu_s": 17 * 17 * 7}


class ImageBatches:
    """uint8 images (N, H, W, C) of an .npz or a folder, read batch by batch.

    Args:
        path: the .npz, with the images in arr_0, or a folder of images of one size.
        may_be_statistics: an .npz may hold `STATISTICS` in place of images, or beside them: see `statistics`.

    Raises:
        ValueError: nothing of the kind is there.
    """

    def __init__(self, path, may_be_statistics=False):
        self.path = path
        self.statistics = {}
        self.paths = None
        try:
            if path.is_dir():
                self.paths = sorted(entry for entry in path.rglob("*") if entry.suffix.lower() in IMAGE_SUFFIXES)
                if not self.paths:
                    raise ValueError("the folder holds no images")
                self.mode = "RGB" if any(map(_has_colour, self.paths)) else "L"
                self.shape = (len(self.paths), *self._read(self.paths[0]).shape)
            elif not path.is_file():
                raise ValueError("no such file or folder")
            else:
                self._open_npz(may_be_statistics)
        except Exception as error:  # a damaged archive fails in many ways
            raise ValueError(f"{path}: {' '.join(str(error).split()) or 'it is damaged'}") from error

    def _open_npz(self, may_be_statistics):
        if not zipfile.is_zipfile(self.path):
            raise ValueError("it is no .npz")
        with np.load(self.path, allow_pickle=False) as content:
            names = set(content.files)
            if may_be_statistics and names & set(STATISTICS):
                missing = set(STATISTICS) - names
                if missing:
                    raise ValueError(f"the statistics {', '.join(sorted(missing))} are missing")
                self.statistics = {key: np.asarray(content[key], dtype=np.float64) for key in STATISTICS}
                for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
                    size = SIZES_OF_STATISTICS[mean]
                    shapes = self.statistics[mean].shape, self.statistics[covariance].shape
                    if shapes != ((size,), (size, size)):
                        raise ValueError(
                            f"{mean} and {covariance} are {shapes[0]} and {shapes[1]}; Inception's are "
                            f"({size},) and ({size}, {size})"
                        )
                    if not (
                        np.isfinite(self.statistics[mean]).all() and np.isfinite(self.statistics[covariance]).all()
                    ):
                        raise ValueError(f"{mean} or {covariance} is not finite")
        if "arr_0" in names:
            with self._stream() as (shape, _):
                self.shape = shape
        elif self.statistics:
            self.shape = (0,)
        else:
            kinds = "arr_0 or statistics" if may_be_statistics else "arr_0"
            raise ValueError(f"it holds no {kinds}, but {', '.join(sorted(names)) or 'nothing'}")

    @contextlib.contextmanager
    def _stream(self):
        """(shape of arr_0, the open file behind its header)."""
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            read_header = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            shape, fortran_order, dtype = read_header[min(version[0], 2)](file)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or min(shape) < 0:
                raise ValueError(f"arr_0 is {dtype} {shape}; it must be uint8 (N, H, W, 3) or (N, H, W, 1)")
            if fortran_order:
                raise ValueError("arr_0 is in Fortran's order; save numpy.ascontiguousarray of it")
            held = archive.getinfo("arr_0.npy").file_size - file.tell()
            if held != int(np.prod(shape)):
                raise ValueError(f"arr_0 is {shape}, and {held} bytes of it are there")
            yield shape, file

    def _read(self, path):
        with Image.open(path) as image:
            return np.asarray(image.convert(self.mode)).reshape(*image.size[::-1], -1)

    def __len__(self):
        return self.shape[0]

    def batches(self, size, most=None):
        """Arrays (up to `size`, H, W, C) of the first `most` images. Raises ValueError where the file is damaged."""
        count = len(self) if most is None else min(most, len(self))
        try:
            if self.paths is not None:
                for start in range(0, count, size):
                    images = [self._read(path) for path in self.paths[start : min(start + size, count)]]
                    if any(image.shape != self.shape[1:] for image in images):
                        raise ValueError(f"not all images are of the size {self.shape[1:]} of the first")
                    yield np.stack(images)
                return
            with self._stream() as (_, file):
                for start in range(0, count, size):
                    rows = min(size, count - start)
                    content = file.read(rows * int(np.prod(self.shape[1:])))
                    yield np.frombuffer(content, np.uint8).reshape(rows, *self.shape[1:])
        except Exception as error:  # as above
            raise ValueError(f"{self.path} is damaged: {' '.join(str(error).split())}") from error


def _has_colour(path):
    """Whether an image file has more than grey. Raises ValueError for one of more than 8 bits."""
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"{path.name} has more than 8 bits a channel")
        return image.mode not in ("1", "L")
