"""Cached latents that were written before the modules were moved continue, and are read."""

import json
import pathlib
import shutil

import pytest
import safetensors.torch
import torch
from processes import run

from data.sources import open_source

BEFORE = pathlib.Path(__file__).parent / "before_layout"


@pytest.fixture
def folder(tmp_path):
    """Return a copy of the files, whose settings name the folder that they are in."""
    for name in ("images", "vae", "latents", "half-latents"):
        shutil.copytree(BEFORE / name, tmp_path / name)
    for path in tmp_path.glob("*latents/*.json"):
        path.write_text(path.read_text().replace("@FOLDER@", str(tmp_path)))
    return tmp_path


def tensors(path):
    return safetensors.torch.load_file(path)


def test_a_stopped_extraction_continues(folder):
    first = folder / "half-latents" / "shard-00000.safetensors"
    stamp = first.stat().st_mtime_ns
    flags = "--data-path images --vae vae --image-size 16 --shard-size 4 --batch-size 2 --num-workers 0".split()
    result = run("extract_latents.py", *flags, "--output", "half-latents", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "3 images in" in result.stdout and first.stat().st_mtime_ns == stamp
    names = {path.name for path in first.parent.iterdir()} - {".lock"}
    assert names == {path.name for path in (folder / "latents").iterdir()}
    assert first.read_bytes() == (folder / "latents" / first.name).read_bytes()
    # The first shard, encoded again, says whether this machine rounds as the one did that wrote the files.
    result = run("extract_latents.py", *flags, "--dtype", "float32", "--output", "new", cwd=folder)
    assert result.returncode == 0, result.stderr
    same_rounding = (folder / "new" / first.name).read_bytes() == first.read_bytes()
    for path in (folder / "latents").iterdir():
        for other in (folder / "half-latents" / path.name, folder / "new" / path.name):
            if path.suffix == ".safetensors":
                torch.testing.assert_close(tensors(other), tensors(path), atol=1e-6, rtol=0)
            if path.name == "manifest.json" and same_rounding:  # the names of classes are new
                now = json.loads(other.read_text())
                assert now.pop("class_names") and now == json.loads(path.read_text())
            elif same_rounding or path.name == "settings.json":
                assert other.read_bytes() == path.read_bytes()


def test_cached_latents_are_read(folder):
    latents = open_source(str(folder / "latents"))
    shards = [tensors(folder / "latents" / f"shard-0000{k}.safetensors") for k in range(2)]
    moments, labels = (torch.cat([shard[key] for shard in shards]) for key in ("moments", "labels"))
    assert len(latents) == 7 and (latents.vae, latents.channels) == (str(folder / "vae"), 2)
    for index in range(7):
        for flip in (False, True):
            item = latents[index, flip]
            assert torch.equal(item["moments"], moments[index, int(flip)]) and item["y"] == labels[index]
    with pytest.raises(ValueError, match="stores no images.*--keep-images"):
        latents.require_images()
    manifest = json.loads((folder / "latents" / "manifest.json").read_text())
    assert [shard["examples"] for shard in manifest["shards"]] == [4, 3]
