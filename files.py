"""Files that are either whole or not there: written under another name, flushed to the disk, then renamed."""

import contextlib
import errno
import fcntl
import hashlib
import os
import pathlib
import shutil
import time
import zipfile

import numpy as np

LOCK = ".lock"
_held = []  # locks are held as long as their files are open


def partial_name(path):
    """The name under which `path` is written."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def written_whole(path):
    """Give a path to write a file or a folder to; when the block ends without an error, it becomes `path`."""
    path = pathlib.Path(path)
    partial = partial_name(path)
    try:
        yield partial
        publish(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise


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


def check_output(flag, path, inputs=()):
    """Raise ValueError where a file could not be written in the end, or would be written over one of `inputs`."""
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder")
    if any(path.resolve() == pathlib.Path(other).resolve() for other in inputs):
        raise ValueError(f"{flag} {path} would be written over what is read")
    try:
        partial_name(path).touch()
        partial_name(path).unlink()
    except OSError as error:
        raise ValueError(f"{flag} {path}: {error.strerror}") from error


def hold(folder, problem, patience=10):
    """Hold a folder until this process ends, by a lock on a file in it; returns the open file.

    Args:
        problem: what to say if somebody else holds it.
        patience: seconds to wait for them, in which the ranks of a killed run can be expected to end.

    Raises:
        ValueError: somebody else holds it.
        OSError: the folder cannot be written to.
    """
    lock = open(folder / LOCK, "a+")
    deadline = time.monotonic() + patience
    while True:
        try:
            # POSIX's lock, which worker processes do not inherit.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                break  # a file system without locks
        if time.monotonic() > deadline:
            raise ValueError(problem)
        time.sleep(0.2)
    _held.append(lock)
    return lock


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
                    kind = part.dtype, part.shape[1:]
                    header = {"descr": part.dtype.str, "fortran_order": False, "shape": (length, *part.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                if (part.dtype, part.shape[1:]) != kind:
                    raise ValueError(f"{name}: rows of {part.dtype} {part.shape[1:]} after rows of {kind[0]} {kind[1]}")
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
