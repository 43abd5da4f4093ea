"""Files that are either complete or absent: written under another name, flushed, then renamed; errors as one line."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import time
import zipfile

import numpy as np

LOCK = ".lock"
_locks = []  # a lock is held while its file is open


def one_line(error, most=300):
    """Return an error's text as one line of at most `most` characters; the name of its type where it has no text."""
    return " ".join(str(error).split())[:most] or type(error).__name__


@contextlib.contextmanager
def named(name, kinds=OSError):
    """Context that turns errors of these kinds into a ValueError of one line that begins with `name`."""
    try:
        yield
    except kinds as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise ValueError(f"{name}: {reason}") from error


def partial_name(path):
    """Return the name under which `path` is written."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def written_whole(path):
    """Context that gives a path to write a file or folder to, and renames it to `path` if the block raises nothing."""
    path = pathlib.Path(path)
    partial = partial_name(path)
    try:
        yield partial
        for entry in (*partial.rglob("*"), partial):
            _fsync(entry)
        partial.rename(path)
        _fsync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise


def _fsync(path):
    """Flush one file, or a folder's list of entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path, content):
    """Write plain data as a JSON file that is either complete or absent."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path):
    """Return the object in a JSON file. Raise ValueError naming the file if it cannot be read or holds none."""
    with named(f"{path} is damaged", (OSError, ValueError)):
        content = json.loads(pathlib.Path(path).read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    return content


def check_same_settings(path, settings, advice):
    """Raise ValueError naming the first of `settings` that differs from those in a JSON file, with `advice` behind."""
    earlier = read_json(path)
    for key, value in settings.items():
        if earlier.get(key) != value:
            raise ValueError(f"{path}: made with {key} {earlier.get(key)!r}, not {value!r}; {advice}")


def check_output(flag, path, inputs=()):
    """Raise ValueError if the file `path` cannot be written, or is one of `inputs`; `flag` named it."""
    if not path.parent.is_dir():
        raise ValueError(f"{flag} {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder")
    if any(path.resolve() == pathlib.Path(other).resolve() for other in inputs):
        raise ValueError(f"{flag} {path} is an input; it would be overwritten")
    with named(f"{flag} {path}"):
        partial_name(path).touch()
        partial_name(path).unlink(missing_ok=True)  # another rank may check the same path


def lock(folder, problem, patience=10):
    """Lock a folder until this process ends, by a lock on a file in it. Return the open file.

    Raise ValueError(problem) if another process still has the lock after `patience` seconds, in which the ranks of a
    killed run can be expected to end, and OSError if the folder does not exist or cannot be written to."""
    file = open(folder / LOCK, "a+")
    _locks.append(file)
    for _ in range(1 + int(patience / 0.2)):
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # POSIX's lock, which worker processes do not inherit
            return file
        except (BlockingIOError, PermissionError):
            time.sleep(0.2)
        except OSError:
            return file  # a file system without locks
    raise ValueError(problem)


class NpzWriter(zipfile.ZipFile):
    """Writes arrays into an .npz that `numpy.load` reads, batch by batch, so that no array is in memory as a whole."""

    def write_array(self, name, batches, length):
        """Write an array from batches of rows. Raise ValueError unless all `length` rows are of one dtype and shape."""
        with self.open(f"{name}.npy", "w", force_zip64=True) as file:
            kind, written = None, 0
            for batch in batches:
                given = f"{batch.dtype} {batch.shape[1:]}"
                if kind is None:
                    kind = given
                    header = {"descr": batch.dtype.str, "fortran_order": False, "shape": (length, *batch.shape[1:])}
                    np.lib.format.write_array_header_1_0(file, header)
                if given != kind:
                    raise ValueError(f"{name}: rows of {given} after rows of {kind}")
                file.write(np.ascontiguousarray(batch).tobytes())
                written += len(batch)
        if written != length:
            raise ValueError(f"{name} has {written} rows, and should have {length}")


def sha256(path):
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def manifest_entry(path):
    """Return what a manifest records of a file: its size in bytes and its SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def problem_with(path, entry):
    """Return a line that says what is wrong with a file, given its entry in a manifest; None if it is intact."""
    try:
        intact = path.stat().st_size == entry.get("bytes") and sha256(path) == entry.get("sha256")
        return None if intact else f"{path} is damaged: its size or checksum is not the manifest's"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
