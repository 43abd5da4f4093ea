"""Files that are either whole or not there: written under another name, flushed to the disk, then renamed."""

import contextlib
import hashlib
import os
import pathlib
import zipfile

import numpy as np


def partial_name(path):
    """The name under which `path` is written."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def written_whole(path):
    """Give a path to write a file or a folder to; when the block ends without an error, it becomes `path`."""
    path = pathlib.Path(path)
    partial = partial_name(path)
    yield partial
    publish(partial, path)


def publish(partial, path):
    """Put a file or a folder that was written under another name on the disk, and rename it."""
    flush(partial)
    partial.rename(path)
    flush_entry(path.parent)


def flush(path):
    """Have the operating system put a file, or a folder with all that is in it, on the disk."""
    for entry in (*pathlib.Path(path).rglob("*"), path):
        flush_entry(entry)


def flush_entry(path):
    """Have the operating system put one file, or a folder's list of entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class NpzWriter:
    """Writes arrays into an .npz that `numpy.load` reads, part by part: no array is in memory as a whole."""

    def __init__(self, path):
        self.archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.archive.close()

    def write_array(self, name, parts, length):
        """Write the array of `length` rows that the arrays `parts`, of one dtype and shape of row, make together."""
        with self.archive.open(f"{name}.npy", "w", force_zip64=True) as file:
            written = 0
            for part in parts:
                if written == 0:
                    header = {"descr": part.dtype.str, "fortran_order": False, "shape": (length, *part.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(part).tobytes())
                written += len(part)
        if written != length:
            raise ValueError(f"{name} has {written} rows, and should have {length}")


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
