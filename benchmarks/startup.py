"""What a start reads, takes and holds until the keys of the first batch: python benchmarks/startup.py

Makes cached latents of ImageNet's and ImageNet-21k's number of examples, as sparse files: their moments are zeros that
take no room on the disk, but are hashed like any other bytes. (A disk's own speed is thus not measured.) Opens them for
the first time, a second time, and with --verify full, each in a new process. So for class folders of empty files, and
for a Parquet file of labels. The first batch reaches over the end of an epoch, which is when the orders of two are in
memory. CPU seconds are those of all threads. Memory is the peak of the whole process, in which PyTorch takes 0.7 GiB
before it opens anything. Labels are mapped into memory, and are counted as read.
"""

import itertools
import json
import multiprocessing
import os
import pathlib
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import measuring
import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from data.cached import MANIFEST
from data.loader import GlobalBatchSampler
from data.sources import open_source
from utils import command_line, files

BATCH = 256
SHARD = 4096  # extract_latents.py's default
BYTES_OF_LABEL, BYTES_OF_MOMENT = 8, 2  # int64 and float16
MOST_CLASSES = {1_281_167: 1000}  # of ImageNet; any other number has those of ImageNet-21k
CLASSES_OF_21K = 21_841


def write_shard(path, labels, latent_size):
    """Write a shard of cached latents whose moments are a hole in the file."""
    shape = [len(labels), 2, 2, measuring.LATENT_CHANNELS, latent_size, latent_size]
    start, size = labels.nbytes, int(np.prod(shape)) * BYTES_OF_MOMENT
    tensors = {"labels": {"dtype": "I64", "shape": [len(labels)], "data_offsets": [0, start]}}
    tensors["moments"] = {"dtype": "F16", "shape": shape, "data_offsets": [start, start + size]}
    header = json.dumps(tensors).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + labels.tobytes())
        file.truncate(8 + len(header) + start + size)


def make_latents(folder, num_examples, latent_size):
    """Write cached latents. Shards of equal length are equal, so that two are hashed here. Return their bytes."""
    num_classes = MOST_CLASSES.get(num_examples, CLASSES_OF_21K)
    folder.mkdir()
    entries, known = [], {}
    for first in range(0, num_examples, SHARD):
        labels = np.arange(min(SHARD, num_examples - first)) * 5 % num_classes
        path = folder / f"shard-{first // SHARD:05d}.safetensors"
        write_shard(path, labels, latent_size)
        if len(labels) not in known:
            known[len(labels)] = files.manifest_entry(path)
        entries.append({"file": path.name, "examples": len(labels), **known[len(labels)]})
    sizes = dict(image_size=latent_size * measuring.DOWNSAMPLING, latent_size=latent_size)
    settings = dict(vae="ema", mirrors=True, scale=0.18215, shift=0.0, channels=measuring.LATENT_CHANNELS, **sizes)
    names = [f"class {number}" for number in range(num_classes)]
    manifest = settings | {"num_classes": num_classes, "class_names": names, "shards": entries}
    files.write_json(folder / MANIFEST, manifest)
    time.sleep(2 * files.SETTLED / 1e9)  # verdicts on files that have just changed are not stored
    return sum(entry["bytes"] for entry in entries)


def make_folder(folder, num_examples):
    """Write empty files with the names of images into 1000 class folders."""
    for number in range(1000):
        inner = folder / f"n{number:08d}"
        inner.mkdir(parents=True)
        for i in range(number, num_examples, 1000):
            os.close(os.open(inner / f"n{number:08d}_{i}.JPEG", os.O_CREAT | os.O_WRONLY))


def make_table(path, num_examples):
    """Write a Parquet file of labels, beside images of one byte."""
    labels = pyarrow.array(np.arange(num_examples) * 5 % 1000)
    images = pyarrow.array(np.zeros(num_examples, np.uint8)).cast(pyarrow.string()).cast(pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": labels}), path)


def bytes_read():
    """Return the bytes that this process has read by system calls."""
    lines = pathlib.Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar")).split()[1])


def start(path, verify):
    """Open data and draw the keys of the first batch. Return what that took; bytes are None where no Linux counts."""
    begin, cpu, counts = time.perf_counter(), time.process_time(), pathlib.Path("/proc/self/io").exists()
    before = bytes_read() if counts else 0
    source = open_source(str(path), verify=verify)
    count = source.num_examples
    order = dict(seed=0, rank=0, world_size=1, mirror=True, start=count - BATCH // 2)
    keys = next(iter(GlobalBatchSampler(count, BATCH, BATCH, **order)))
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    mapped = BYTES_OF_LABEL * count if path.is_dir() and (path / MANIFEST).exists() else 0  # by safetensors
    read = bytes_read() - before + mapped if counts else None
    assert len(keys) == BATCH
    return {"seconds": seconds, "cpu": cpu, "memory": measuring.peak_memory(torch.device("cpu")), "read": read}


def measure(path, verify="changed"):
    """Return the result of `start` in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(start, path, verify).result()


def measure_latents(root, num_examples, latent_size):
    """Return the rows of the three starts on cached latents."""
    path = root / f"latents-{num_examples}"
    size = make_latents(path, num_examples, latent_size)
    row = {"data": f"cached latents, {latent_size} x {latent_size}", "examples": num_examples, "bytes": size}
    starts = {"first": "changed", "second": "changed", "--verify full": "full"}
    return [row | {"start": name} | measure(path, verify) for name, verify in starts.items()]


def measure_images(root, folder_images, table_rows):
    """Return the rows of starts on class folders and on a Parquet file, without those of number 0."""
    rows = []
    if folder_images:
        make_folder(root / "folder", folder_images)
        row = {"data": "class folders", "examples": folder_images, "bytes": None}
        rows.append(row | {"start": "any"} | measure(root / "folder"))
    if table_rows:
        path = root / "train.parquet"
        make_table(path, table_rows)
        row = {"data": "Parquet", "examples": table_rows, "bytes": None}
        rows += [row | {"start": name} | measure(path) for name in ("first", "second")]
    return rows


def print_rows(rows):
    lines = []
    for row in rows:
        share = None if row["read"] is None or not row["bytes"] else f"{row['read'] / row['bytes']:.3%}"
        read = None if row["read"] is None else f"{row['read'] / 1e6:,.1f}"
        size = measuring.cell(row["bytes"] and row["bytes"] / 1e9, "{:.2f}")
        figures = f"{row['seconds']:.1f}", f"{row['cpu']:.1f}", f"{measuring.gib(row['memory']):.2f}"
        lines.append([row["data"], f"{row['examples']:,}", size, row["start"], *figures, read, share])
    columns = ["data", "examples", "GB", "start", "seconds", "CPU seconds", "peak GiB", "read, MB", "of all bytes"]
    measuring.print_table(columns, lines)


def build_parser():
    parser = command_line.Parser("What a start of training reads, takes and holds, until the first batch's keys.")
    add, at_least_one = command_line.flag_group(parser, "measurement"), command_line.integer(1)
    numbers = "numbers of cached latents"
    add("--examples", at_least_one, "N", numbers, nargs="+", default=[1_281_167, 14_197_122])
    sizes = "sides of the latents, one for each of --examples"
    add("--latent-sizes", at_least_one, "N", sizes, nargs="+", default=[32, 8])
    add("--folder-images", command_line.integer(0), "N", "images in class folders; 0: none", default=128_000)
    add("--table-rows", command_line.integer(0), "N", "rows of a Parquet file; 0: none", default=1_281_167)
    measuring.add_json_flag(add)
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    with command_line.user_errors(parser):
        measuring.check_json(args.json)
        if len(args.examples) != len(args.latent_sizes):
            raise ValueError("--latent-sizes must be as many as --examples")
    device = torch.device("cpu")
    print(f"{measuring.machine(device)}\n")
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        os.environ |= {"HF_HOME": str(root / "hub"), "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        pairs = zip(args.examples, args.latent_sizes, strict=True)
        rows = list(itertools.chain.from_iterable(measure_latents(root, *pair) for pair in pairs))
        rows += measure_images(root, args.folder_images, args.table_rows)
    print_rows(rows)
    measuring.write_json(args.json, {"batch_size": BATCH}, rows, device)


if __name__ == "__main__":
    main()
