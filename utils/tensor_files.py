"""Files of tensors, .safetensors and .pt, read without running code."""

import argparse
import pickle
import zipfile

import safetensors.torch
import torch

from utils import files


def check_fit(expected, state_dict, source):
    """Raise ValueError, naming `source`, unless a state dict has the names and shapes of the expected one."""
    shapes = {key: tuple(value.shape) for key, value in expected.items()}
    given = {key: tuple(value.shape) for key, value in state_dict.items()}
    for key in shapes.keys() | given.keys():
        actual, wanted = given.get(key), shapes.get(key)
        if actual != wanted:
            raise ValueError(f"{source} does not fit the model: {key} is {actual}, and must be {wanted}")


def read_safetensors(path):
    """Return the tensors of a .safetensors file as a dict. Raise ValueError if it cannot be read."""
    with files.named(f"{path} is not a readable .safetensors file", (safetensors.SafetensorError, OSError)):
        return safetensors.torch.load_file(path)


def read_pt(path):
    """Return what `torch.save` wrote, on the CPU. Raise ValueError if it cannot be read or holds other objects."""
    try:
        # The official train.py stores its arguments as a Namespace, which is plain data.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and plain data, or is damaged; it was not loaded") from error
    except Exception as error:  # a damaged file fails in many ways
        raise ValueError(f"{path} is not a readable PyTorch file: {files.one_line(error, 200)}") from error
