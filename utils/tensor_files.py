"""Files of tensors, .safetensors and .pt, read without running code, and written with a config beside the tensors."""

import argparse
import collections
import contextlib
import datetime
import json
import os
import pathlib
import pickle
import pickletools
import re
import types
import warnings
import zipfile
import zlib

import numpy as np
import safetensors.torch
import torch

from utils import files

CONFIG_KEY = "sit_config"
MOST_OPCODES = 500_000  # of a pickle; a checkpoint of SiT-XL/2 with its optimizer and EMA has about 50,000
MOST_EXPANSION = 4  # bytes of tensors per byte of their file, and what comes free
FREE_BYTES = 1 << 26


def check_fit(expected, state_dict, source, hint=""):
    """Raise ValueError unless a state dict has the names, shapes and kinds of the expected one.

    The message names `source`, and has the `hint` behind names that are not expected."""
    unknown = [key for key in state_dict if key not in expected]
    if unknown:
        names = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise ValueError(f"{source} does not fit the model, which has no {names}{hint}")
    for key, wanted in expected.items():
        actual = tuple(state_dict[key].shape) if key in state_dict else "missing"
        if actual != tuple(wanted.shape):
            raise ValueError(f"{source} does not fit the model: {key} is {actual}, and must be {tuple(wanted.shape)}")
        value = state_dict[key]
        if value.is_floating_point() != wanted.is_floating_point() or value.layout != torch.strided or value.is_meta:
            kind = f"{value.dtype}, {value.layout}, {'without data' if value.is_meta else 'with data'}"
            raise ValueError(f"{source} does not fit the model: {key} is {kind}")


def config_of(state_dict):
    """Return the config that `write_pt` or `write_safetensors` stored beside a state dict; None if there is none."""
    metadata = getattr(state_dict, "_metadata", None)
    return metadata.get(CONFIG_KEY) if isinstance(metadata, dict) else None


def write_pt(path, state_dict, config):
    """Write a state dict by torch.save, with a config, which is plain data.

    It stands where PyTorch keeps the versions of modules, so `model.load_state_dict(torch.load(path))` ignores it."""
    state_dict = collections.OrderedDict(state_dict)
    state_dict._metadata = {CONFIG_KEY: json.loads(json.dumps(config))}  # new objects: pickles depend on identities
    torch.save(state_dict, path)


def write_safetensors(path, state_dict, config):
    """Write a state dict as .safetensors, with a config as JSON in its metadata."""
    safetensors.torch.save_file(state_dict, path, metadata={"format": "pt", CONFIG_KEY: json.dumps(config)})
    # The library writes the metadata in random order, and the bytes of a checkpoint are a function of the run.
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":")).encode().ljust(size))


def read_safetensors(path):
    """Return the tensors of a .safetensors file, see `config_of`. Raise ValueError if it cannot be read."""
    _check_kind(path)
    kinds = (safetensors.SafetensorError, OSError, ValueError, RecursionError)
    with files.named(f"{path} is not a readable .safetensors file", kinds):
        state_dict = collections.OrderedDict(safetensors.torch.load_file(path))
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        if CONFIG_KEY in metadata:
            state_dict._metadata = {CONFIG_KEY: json.loads(metadata[CONFIG_KEY])}
    return state_dict


def read_pt(path):
    """Return what `torch.save` wrote, on the CPU. Raise ValueError if it cannot be read or holds other objects.

    Numbers of NumPy become Python's, its arrays are passed over, and paths become pure paths."""
    _check_kind(path)
    stored = _check_size(path)
    try:
        with torch.serialization.safe_globals(PLAIN_DATA), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error says it all
            return torch.load(path, map_location="cpu", weights_only=True, mmap=stored)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)|<(?:class|built-in function|function) '?([\w.]+)", str(error))
        what = f" ({found[1] or found[2]})" if found else ""
        problem = f"{path} holds more than tensors and plain data{what}, or is damaged; it was not loaded"
        raise ValueError(problem) from error
    except Exception as error:  # a damaged file fails in many ways
        problem = f"{path} is not a readable PyTorch file, perhaps incomplete"
        raise ValueError(f"{problem}: {files.one_line(error, 200)}") from error


def _check_kind(path):
    """Raise ValueError if a file is what often lies in the place of weights that were not downloaded."""
    with files.named(path), open(path, "rb") as file:
        head = file.read(64).lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS, not the weights: fetch them by `git lfs pull`")
    if head.startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path} is a web page, not weights: download the file itself")


def _check_size(path):
    """Raise ValueError if a .pt file would take much more memory or time than its size says.

    Return whether it is a zip file whose entries are not compressed, which can be mapped into memory."""
    count, stored, makes_bytes = 0, False, False
    damaged = f"{path} is not a readable PyTorch file"
    kinds = zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, MemoryError, OverflowError
    # What is no pickle or no zip file is named by torch.load; but it reads zip files that the module does not.
    with open(path, "rb") as file, files.named(damaged, kinds):
        pickles = [file] * 5  # of the old format: magic number, protocol, system, content, names of storages
        if zipfile.is_zipfile(path):
            archive = zipfile.ZipFile(path)
            entries = archive.infolist()
            check_expansion(path, sum(entry.file_size for entry in entries))
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
            pickles = [archive.open(entry) for entry in entries if entry.filename.lower().endswith("/data.pkl")]
        for stream in pickles:
            with contextlib.suppress(ValueError):
                for opcode, argument, _ in pickletools.genops(stream):
                    count += 1
                    makes_bytes |= opcode.name == "GLOBAL" and argument.endswith(" bytearray")
                    if count > MOST_OPCODES:
                        break
    if count > MOST_OPCODES:
        raise ValueError(f"{path} holds too many objects for weights: its pickle has more than {MOST_OPCODES:,} steps")
    if makes_bytes:  # of any length, from a few bytes
        raise ValueError(f"{path} holds a bytearray beside tensors and plain data; it was not loaded")
    return stored


def check_expansion(path, size):
    """Raise ValueError if `size` bytes of content are many more than the file has."""
    if size > MOST_EXPANSION * os.path.getsize(path) + FREE_BYTES:
        raise ValueError(f"{path} has {os.path.getsize(path):,} bytes for {size:,} bytes of content; it was not loaded")


class _NumpyType:
    """Stands for a `numpy.dtype` in a pickle, whose own state could make NumPy read any memory."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"[biufc]\d{1,2}|[SU]\d{1,6}", str(code)):
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype of {code}")
        self.code, self.order = str(code), "="

    def __setstate__(self, state):
        self.order = state[1] if state[1] in ("<", ">") else "="

    def scalar(self, data):
        """Return the number or text that `data`, bytes, holds."""
        return np.frombuffer(data, self.order + self.code)[0].item()


class _NumpyArray:
    """Stands for an array of NumPy in a pickle."""

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


def _names(value, *names):
    return [(value, name) for name in names]


_CORES = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since NumPy 2
_PATHS = ("pathlib.", "pathlib.Pure", "pathlib._local.", "pathlib._local.Pure")  # before and since Python 3.13
# Plain data beside the tensors of a .pt file: the official train.py stores its arguments as a Namespace.
PLAIN_DATA = [
    argparse.Namespace,
    types.SimpleNamespace,
    *(datetime.date, datetime.time, datetime.datetime, datetime.timedelta),
    *_names(pathlib.PurePosixPath, *(f"{start}PosixPath" for start in _PATHS)),
    *_names(pathlib.PureWindowsPath, *(f"{start}WindowsPath" for start in _PATHS)),
    *_names(_NumpyType, "numpy.dtype"),
    *_names(_NumpyType.scalar, *(f"{core}.scalar" for core in _CORES)),
    *_names(_NumpyArray, "numpy.ndarray", *(f"{core}._reconstruct" for core in _CORES)),
]
