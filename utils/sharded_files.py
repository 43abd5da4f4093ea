"""What torch.distributed.checkpoint wrote, read without running code.

The library's reader unpickles its metadata, and every entry that they declare as bytes, with all that a pickle can do.
"""

import io
import math
import pathlib
import pickle
import types

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from utils import files

METADATA = ".metadata"
MOST_DIMENSIONS = 16  # the product of a long list of integers takes hours
CLASSES = {  # of which metadata of tensors consist
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
}
# Constructors of what reading needs not: layouts, memory formats and the path that was written to.
UNUSED = {
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": ("_MEM_FORMAT_ENCODING",),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
}


class _Unpickler(pickle._Unpickler):  # in C, a pickle of a few bytes can demand gigabytes
    """Reads metadata as records: for each object of the library one, whose `state` is plain data."""

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def find_class(self, module, name):
        if name in CLASSES.get(module, ()):

            def set_state(record, state):
                record.state = state

            return type(name, (), {"__setstate__": set_state})  # a new class: a pickle can change attributes of it
        if name in UNUSED.get(module, ()):
            return lambda *arguments: None
        if (module, name) == ("torch", "Size"):
            return lambda sizes=(): tuple(sizes)
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name} is no part of the metadata of tensors")


def read_metadata(folder):
    """Return the metadata in a folder of torch.distributed.checkpoint as its `Metadata`, with tensors alone.

    Raise ValueError if they hold anything else, if a tensor is not wholly there, or if one lies outside the folder."""
    folder = pathlib.Path(folder)
    with files.named(f"{folder / METADATA} is damaged, or holds more than tensors", Exception):
        state = _Unpickler(io.BytesIO((folder / METADATA).read_bytes())).load().state
        stored = {(key.state["fqn"], key.state["offset"]): info.state for key, info in state["storage_data"].items()}
        metadata, checked = Metadata({}, storage_data={}, storage_meta=StorageMeta()), {}
        for name, record in state["state_dict_metadata"].items():
            if type(record).__name__ != "TensorStorageMetadata":
                raise ValueError(f"{name} is no tensor")
            size, dtype = _shape(record.state["size"]), record.state["properties"].state[0]
            sizes = {}
            for chunk in record.state["chunks"]:
                offset = _shape(chunk.state["offsets"])
                info, sizes[offset] = stored[name, tuple(offset)], _shape(chunk.state["sizes"])
                _check_place(folder, info, math.prod(sizes[offset]) * dtype.itemsize, checked)
                where = dict(relative_path=info["relative_path"], offset=info["offset"], length=info["length"])
                index = MetadataIndex(name, offset)
                metadata.storage_data[index] = types.SimpleNamespace(**where, transform_descriptors=None)
            if sum(map(math.prod, sizes.values())) != math.prod(size):
                raise ValueError(f"{name} is not wholly there")
            chunks = [ChunkStorageMetadata(offset, part) for offset, part in sizes.items()]
            metadata.state_dict_metadata[str(name)] = TensorStorageMetadata(TensorProperties(dtype), size, chunks)
    return metadata


def _shape(sizes):
    """Return a tuple of sizes as torch.Size. Raise ValueError unless they are integers, and none is negative."""
    if len(sizes) > MOST_DIMENSIONS or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"{repr(sizes)[:80]} is no shape")
    return torch.Size(sizes)


def _check_place(folder, info, least, checked):
    """Raise ValueError unless a chunk of at least `least` bytes lies in a file of the folder; `checked` keeps sizes."""
    name = info["relative_path"]
    if name not in checked:
        path = folder / name
        if path.resolve().parent != folder.resolve() or path.name != name:
            raise ValueError(f"{name} is not in the folder")
        if not path.is_file():
            raise ValueError(f"{name} is missing: all ranks must write to one storage")
        checked[name] = path.stat().st_size
    offset, length = _shape((info["offset"], info["length"]))
    if info.get("transform_descriptors") or not least <= length <= checked[name] - offset:
        raise ValueError(f"{name} does not hold what the metadata say")


class TensorReader(dcp.FileSystemReader):
    """A reader for `dcp.load` that takes tensors alone; the library reads each with weights_only=True."""

    def read_metadata(self):
        """Return what the function `read_metadata` returns of the folder."""
        return read_metadata(self.path)
