"""--image-size: that of all images where they have one, and what is enlarged is said."""

import io
import pathlib
import shutil

import datasets
import numpy as np
import pytest
from conftest import TINY
from PIL import Image
from processes import run

import extract_latents
from data import labelled
from data.sources import open_source
from training.setup import resolve_config
from utils.tensor_files import read_safetensors

BEFORE = pathlib.Path(__file__).parent / "before_layout"
TRANSPORT = {"path_type": "Linear", "prediction": "velocity"}


def folder_of(root, sizes):
    (root / "a").mkdir(parents=True)
    for i, size in enumerate(sizes):
        Image.fromarray(np.full((size[1], size[0]), i % 256, np.uint8)).save(root / "a" / f"{i:04d}.png")
    return str(root)


def table_of(root, sizes):
    root.mkdir()
    cells = []
    for size in sizes:
        Image.new("L", size).save(buffer := io.BytesIO(), "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    rows = datasets.Dataset.from_dict({"image": cells, "label": [0] * len(sizes)}, features=features)
    rows.to_parquet(root / "train-00000-of-00001.parquet")
    return str(root)


def resolved(source, vae="none", resumed=None, **sizes):
    """The image size, and what the log says of it."""
    config = resolve_config(source, "SiT-S/2", {}, sizes, TRANSPORT, vae, resumed=resumed)
    assert config["model"]["input_size"] * {"none": 1, "ema": 8}[vae] == config["latents"]["image_size"]
    return config["latents"]["image_size"], "; ".join(source.notes)


@pytest.mark.parametrize("write, streaming", [(folder_of, False), (table_of, False), (table_of, True)])
def test_the_size_of_all_images_is_taken(tmp_path, write, streaming):
    path = write(tmp_path / "data", [(28, 28)] * 5)
    assert resolved(open_source(path, streaming=streaming)) == (28, "--image-size 28, the size of all images")
    size, notes = resolved(open_source(path, streaming=streaming), image_size=32)
    assert size == 32 and notes == "images are 28 x 28 and are enlarged to 32 x 32 pixels"
    assert resolved(open_source(path, streaming=streaming), input_size=16) == (16, "")
    size, notes = resolved(open_source(path, streaming=streaming), vae="ema")
    assert size == 256
    assert notes == "images are 28 x 28, which is no multiple of 16, and are enlarged to 256 x 256 pixels"


def test_images_that_differ_have_the_default_size(tmp_path):
    path = folder_of(tmp_path / "one", [(28, 28)] * 300 + [(28, 30)] + [(28, 28)] * 400)
    size, notes = resolved(open_source(path))  # the odd one is not among the first that are looked at
    assert size == 256 and "enlarged to 256 x 256 pixels" in notes
    path = folder_of(tmp_path / "wide", [(300, 28)] * 3)
    assert resolved(open_source(path)) == (256, "images are 300 x 28 and are enlarged to 256 x 256 pixels")
    path = folder_of(tmp_path / "mixed", [(300, 300), (280, 100), (400, 256), (90, 500)])
    assert resolved(open_source(path)) == (
        256,
        "2 of 4 images looked at are enlarged to 256 x 256 pixels; one is 90 x 500",
    )
    path = folder_of(tmp_path / "large", [(300, 300), (400, 256)])
    assert resolved(open_source(path)) == (256, "")


def test_images_that_cannot_be_read_have_no_size(tmp_path):
    path = folder_of(tmp_path, [(32, 32)] * 4)
    for i in (0, 3):
        (tmp_path / "a" / f"000{i}.png").write_bytes(b"no image")
    assert resolved(open_source(path))[0] == 32
    for file in (tmp_path / "a").iterdir():
        file.write_bytes(b"no image")
    assert resolved(open_source(path)) == (256, "")


def test_sizes_are_read_without_decoding_and_of_few_where_they_differ(tmp_path, monkeypatch):
    same, mixed, late = (
        open_source(folder_of(tmp_path / name, sizes))
        for name, sizes in (
            ("same", [(8, 8)] * 40),
            ("mixed", [(8, 8), (9, 9)] * 20),
            ("late", [(8, 8)] * 20 + [(9, 9)] + [(8, 8)] * 19),
        )
    )
    monkeypatch.setattr(labelled, "FEW_SIZES", 10)
    monkeypatch.setattr(Image.Image, "load", None)
    assert same.sizes() == [(8, 8)] * 50 and same.sizes(20) == [(8, 8)] * 30
    assert len(mixed.sizes()) == 10
    sizes = late.sizes()
    assert sizes[-1] == (9, 9) and len(sizes) == 31


def test_sizes_of_arrays_and_tensors():
    for image in (np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8), Image.new("L", (8, 8))):
        assert resolved(labelled.from_dataset([(image, 0)] * 3, "toy"), num_classes=1)[0] == 8
    assert resolved(open_source("digits"))[0] == 8
    with pytest.raises(ValueError, match="--image-size 8 does not divide: it must be a multiple of 16"):
        resolved(open_source("digits"), vae="ema")


def test_a_run_from_before_keeps_its_size(tmp_path):
    """A run whose checkpoint is of another size than the images, as the default was, continues."""
    path = folder_of(tmp_path / "data", [(8, 8)] * 4)
    command = ["train.py", *TINY, "--data-path", path, "--output-dir", tmp_path / "run", "--resume", "auto"]
    first = run(*command, "--image-size", 16, "--max-steps", 1)
    assert first.returncode == 0, first.stderr
    second = run(*command, "--max-steps", 2)
    assert second.returncode == 0 and "continuing from" in second.stdout, second.stderr
    weights = read_safetensors(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    assert weights["pos_embed"].shape[1] == 64


def test_an_extraction_from_before_keeps_its_size(tmp_path, monkeypatch, capsys):
    data = folder_of(tmp_path / "data", [(32, 32)] * 2)
    shutil.copytree(BEFORE / "vae", tmp_path / "vae")

    def extract(output, *more):
        words = ["--data-path", data, "--vae", tmp_path / "vae", "--num-workers", 0, "--output", tmp_path / output]
        monkeypatch.setattr("sys.argv", ["extract_latents.py", *map(str, (*words, *more))])
        extract_latents.main()
        return open_source(str(tmp_path / output)).image_size

    assert extract("latents", "--image-size", 16) == 16
    (tmp_path / "latents" / "manifest.json").unlink()
    assert extract("latents") == 16
    assert extract("other") == 32 and "--image-size 32, the size of all images" in capsys.readouterr().out
