"""What a path is that is not read as data, and what to do with it."""

import collections
import re

from data.folders import image_suffixes, is_hidden, is_image

EXTRACT = "extract it, and give the folder of class folders"
WEIGHTS = "weights are for --ckpt or --init-from"
CONVERT = "write its images into class folders, Parquet files, WebDataset tars or an .npz"
# From what the name of a file ends in: what it is, and what to do.
KINDS = {
    r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)": ("a compressed tar", f"{EXTRACT}, or store it as a plain .tar"),
    r"idx\d-u?byte(\.gz)?|\.idx": ("a file of MNIST's format", f"give the name of a data set on the hub, or {CONVERT}"),
    r"\.(7z|rar|gz|bz2|xz|zst)": ("a compressed archive or file", EXTRACT),
    r"\.(h5|hdf5)": ("an HDF5 file", CONVERT),
    r"(\.tfrec(ords?)?|-\d+-of-\d+)": ("a TFRecord of TensorFlow", CONVERT),
    r"\.(mdb|lmdb)": ("an LMDB database", CONVERT),
    r"\.beton": ("an FFCV file", CONVERT),
    r"\.mat": ("a MATLAB file", CONVERT),
    r"(\.pkl|\.pickle|data_batch_\d|batches\.meta|^meta)": ("a pickle, which can run code", CONVERT),
    r"\.npy": ("a single array", "give an .npz with images arr_0, uint8 (N, H, W, C), and labels arr_1"),
    r"\.(npz|zip)": ("an .npz or a zip", "give the one file that is the data"),
    r"\.(csv|tsv|jsonl?|txt|xml|ya?ml)": ("a table or a text without images", "give the folder of the images"),
    r"\.(pt|pth|ckpt|safetensors|bin)": ("a file of tensors", f"{WEIGHTS}; of cached latents give the folder"),
    r"\.(mp4|avi|mkv|mov|webm)": ("a video", CONVERT),
    "|".join(map(re.escape, image_suffixes())): ("a single image", "give the folder that holds its class folder"),
}


def _kind(name):
    """Return (what a file of this name is, what to do); None if that is not known."""
    return next((kind for end, kind in KINDS.items() if re.search(f"({end})$", name.lower())), None)


def name_unread(path):
    """Return what the file or folder `path` is if that is known and not read as data, and what to do; else None."""
    if path.is_file():
        unknown = f"a file of a kind that is not known ({path.suffix or 'no suffix'})", CONVERT
        what, advice = _kind(path.name) or unknown
        return f"it is {what}, which is not read; {advice}"
    entries = sorted(entry for entry in path.iterdir() if not is_hidden(entry.name))
    names = {entry.name for entry in entries}
    if "trainer_state.json" in names or any((entry / "trainer_state.json").is_file() for entry in entries):
        return "it is a run or a checkpoint of train.py, which is no data; it is for --resume, --init-from or --ckpt"
    if "snapshots" in names and path.name.startswith(("datasets--", "models--")):
        found = sorted((path / "snapshots").iterdir()) or [path / "snapshots" / "..."]
        kind, *owner_and_name = path.name.split("--")
        advice = f"give the snapshot, {found[-1]}, or the name {'/'.join(owner_and_name)}"
        advice = advice if kind == "datasets" else WEIGHTS
        return f"it is a repository in the hub's cache; {advice}"
    if any(name.startswith(("datasets--", "models--")) for name in names):
        return "it is the hub's cache; give the name of a data set, or the folder of a snapshot in it"
    if "data.mdb" in names:
        return f"it is an LMDB database, which is not read; {CONVERT}"
    only_files = not any(map(is_image, names)) and all(entry.is_file() for entry in entries)
    kinds = collections.Counter(filter(None, map(_kind, names)))
    if "model_index.json" in names or (only_files and "config.json" in names and _kind(".pt") in kinds):
        return f"it is a folder of a model, which is no data; {WEIGHTS}, a VAE for --vae"
    if only_files and kinds:
        what, advice = kinds.most_common(1)[0][0]
        example = next(entry.name for entry in entries if _kind(entry.name) == (what, advice))
        return f"it is a folder of files such as {example}, {what}, which is not read; {advice}"
    inside = [entry for entry in entries if entry.is_dir()]  # maybe one folder too high
    if inside and not any(map(is_image, names)) and all(map(name_unread, inside)):
        return f"in {inside[0].name}: {name_unread(inside[0])}"
    return None
