"""Files that are either whole or not there: written under another name, flushed to the disk, then renamed."""

import contextlib
import hashlib
import os
import pathlib


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


def sha256(path):
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
