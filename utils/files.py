"""Files that are either complete or absent: written under another name, flushed, then renamed; errors as one line."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np

LOCK = ".lock"
VERDICTS = ".verified.json"  # beside a manifest: which of its files were intact, and in which state
SETTLED = 2 * 10**9  # nanoseconds after a change, from which another one is sure to change the time stamps, too
PATIENCE = 10  # seconds of waiting for another process, after which a line says so
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
    if partial.is_symlink() or partial.is_file():
        partial.unlink(missing_ok=True)  # what is written may not go through a link
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


def open_own(path, mode, **how):
    """Open a file to write to, as `open` does. Raise OSError if it is a symbolic link, which may lead anywhere."""
    try:
        return open(path, mode, opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666), **how)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        problem = f"{pathlib.Path(path).name} is a symbolic link, which is not written through"
        raise OSError(errno.ELOOP, problem, str(path)) from error


def remove(path):
    """Remove a file, a link or a folder, as far as that is possible."""
    with contextlib.suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def to_json(content, **how):
    """Return plain data as JSON, which knows neither NaN nor infinities: they become null."""

    def finite(value):
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(content), allow_nan=False, **how)


def write_json(path, content):
    """Write plain data as a JSON file that is either complete or absent."""
    with written_whole(path) as partial:
        partial.write_text(to_json(content, indent=2) + "\n")


def read_json(path, kinds=dict):
    """Return the object, or a value of other `kinds`, in a JSON file. Raise ValueError naming the file without one."""
    with named(f"{path} is damaged", (OSError, ValueError, RecursionError)):
        content = json.loads(pathlib.Path(path).read_text())
        if not isinstance(content, kinds):
            raise ValueError("it holds no object")
    return content


def keep_settings(path, settings, advice, author):
    """Check settings as `check_same_settings` does, or write them if nothing else lies in their folder.

    Leftovers of a process that was killed are nothing. Raise ValueError if `author`, a script, wrote no settings there,
    and the folder holds files."""
    if not path.exists():
        names = [entry.name for entry in path.parent.iterdir()]
        if any(name not in (LOCK, VERDICTS) and not re.fullmatch(r"\..+\.partial", name) for name in names):
            raise ValueError(f"{path.parent} is not empty, and {author} did not write it; {advice}")
        write_json(path, settings)
    check_same_settings(path, settings, advice)


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
        partial_name(path).write_bytes(bytes(4096))  # which a full disk refuses, too
        partial_name(path).unlink(missing_ok=True)  # another rank may check the same path


def lock(folder, problem, patience=10):
    """Make a folder, and lock it until this process ends, by a lock on a file in it. Return the open file.

    Raise ValueError(problem) if another process still has the lock after `patience` seconds, in which the ranks of a
    killed run can be expected to end, and OSError if the folder cannot be written to."""
    deadline, removed = time.monotonic() + patience, 0
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open_own(folder / LOCK, "a+")
        except (FileExistsError, FileNotFoundError):  # another process may remove the folder at this moment
            removed += 1
            if removed > 3:
                raise
            continue
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # POSIX's lock, which worker processes do not inherit
        except (BlockingIOError, PermissionError):
            file.close()
        except OSError:
            pass  # a file system without locks
        if not file.closed:
            _locks.append(file)  # for ever: closing any file of it would end the lock
            if is_locked(folder):  # else the process that had the lock has removed it
                return file
        if time.monotonic() >= deadline:
            raise ValueError(problem)
        time.sleep(0.2)


def is_locked(folder):
    """Return whether the last lock that this process took of a folder is still the folder's, not of a removed file."""
    file = next(file for file in reversed(_locks) if pathlib.Path(file.name) == folder / LOCK)
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK))
    except FileNotFoundError:
        return False
    except OSError:
        return True  # a file system that is away for a moment


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


def read_npy_header(file):
    """Return (shape, dtype, whether in C order) of an .npy that is open at its start; leave it open at its values."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    return shape, dtype, not fortran_order or len(shape) < 2


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
        has_size = path.stat().st_size == entry.get("bytes") and path.is_file()  # a device could be read for ever
        intact = has_size and sha256(path) == entry.get("sha256")
        return None if intact else f"{path} is damaged: its size or checksum is not the manifest's"
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"


def problems_with(folder, entries, read_all=False):
    """Return for each entry of a manifest, whose "file" is in `folder`, the line of `problem_with`, or None.

    A file that was intact is not read again, unless its size, its time stamps or its entry change, or all files are to
    be read (`read_all`). Verdicts are stored in the folder, else in the user's cache, else nowhere. Processes on a node
    take turns, so that one reads for all of them."""
    paths, places = [folder / entry["file"] for entry in entries], _places_of_verdicts(folder)
    with contextlib.ExitStack() as turn, ThreadPoolExecutor() as threads:
        if not read_all:
            turn.enter_context(_in_turn(places[-1].stem))
        verdicts, problems = list(threads.map(_verdict, paths, entries)), [None] * len(paths)
        stored = [{} if read_all else _read_verdicts(place) for place in places]
        known = {v["file"]: v for v in verdicts if v and _says_intact(stored, v)}
        unread = [k for k, v in enumerate(verdicts) if not v or known.get(v["file"]) != v]
        if unread and not read_all and not _write_verdicts(places, known):
            turn.close()  # no other process could learn from this one
        for k, problem in zip(unread, threads.map(lambda k: problem_with(paths[k], entries[k]), unread), strict=True):
            problems[k], verdict = problem, verdicts[k]
            if verdict and verdict == _verdict(paths[k], entries[k]):
                known[verdict["file"]] = verdict | ({"damaged": True} if problem else {})
        if unread:
            _write_verdicts(places, known)
    return problems


def _verdict(path, entry):
    """Return what is stored of an intact file; None if its size is wrong, or it has only just changed.

    A program can set back the first time stamp, and not the second."""
    with contextlib.suppress(OSError):
        state = path.stat()
        if state.st_size == entry.get("bytes") and max(state.st_mtime_ns, state.st_ctime_ns) < time.time_ns() - SETTLED:
            times = {"mtime_ns": state.st_mtime_ns, "ctime_ns": state.st_ctime_ns}
            return {key: entry.get(key) for key in ("file", "bytes", "sha256")} | times


def _says_intact(stored, verdict):
    """Return whether stored verdicts hold this one. One that found damage counts more, wherever it is stored."""
    found = [there.get(verdict["file"]) for there in stored]
    return verdict in found and verdict | {"damaged": True} not in found


def _places_of_verdicts(folder):
    """Return the files that can hold the verdicts on a folder's files, in the order in which they are tried."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    cache = cache if cache.is_absolute() else pathlib.Path(os.devnull)  # of a user without a home, nowhere
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()
    return [folder / VERDICTS, cache / "sit" / f"{name}.json"]


def _read_verdicts(place):
    """Return the verdicts in a file; {} if there is none, or it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        return read_json(place) if place.is_file() else {}
    return {}


def _write_verdicts(places, verdicts):
    """Replace the verdicts in the first of `places` that can be written. Return whether there is one."""
    for place in places:
        own = place.with_name(f".{place.name}-{os.uname().nodename}-{os.getpid()}.partial")  # nodes may write at once
        with contextlib.suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                write_json(own, verdicts)
                own.replace(place)
                return True
            finally:
                own.unlink(missing_ok=True)
    return False


@contextlib.contextmanager
def _in_turn(name):
    """Context in which one of a user's processes on this node is at a time, if files can be locked there.

    A line says what is waited for: a process that is stopped has its turn for ever."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path = pathlib.Path(tempfile.gettempdir()) / f"sit-{os.getuid()}-{name}.lock"
            file = stack.enter_context(open_own(path, "a"))
            text = f"waiting for a process that checks the same files and has locked {path}"
            note = threading.Timer(PATIENCE, print, [text], {"flush": True})
            note.start()
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            finally:
                note.cancel()
            stack.callback(path.unlink, missing_ok=True)
        yield
