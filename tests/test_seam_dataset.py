"""A data set from outside the project: any `torch.utils.data.Dataset` of (image, label), registered by name."""

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from processes import run
from torch.utils.data import Dataset

from data.images import ImageDataset
from data.loader import GlobalBatchSampler, make_loader
from data.sources import DATASETS, open_source

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
KINDS = {
    "pil": Image.fromarray,
    "array": np.asarray,
    "tensor": lambda image: torch.from_numpy(image).permute(2, 0, 1),
    "float": lambda image: torch.from_numpy(image).permute(2, 0, 1) / 255,
}


class Stripes(Dataset):
    kind = "array"

    def __len__(self):
        return len(PIXELS)

    def __getitem__(self, index):
        return KINDS[self.kind](PIXELS[index]), torch.tensor(index % 3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_is_read_by_name(kind, monkeypatch):
    monkeypatch.setattr(Stripes, "kind", kind)
    monkeypatch.setitem(DATASETS, "stripes", Stripes)
    source = open_source("stripes")
    assert (source.num_examples, source.num_classes, source.labels, source.streamed) == (12, None, None, False)
    sampler = GlobalBatchSampler(12, 12, 12, seed=0, rank=0, world_size=1, mirror=False)
    batch = next(make_loader(ImageDataset(source, 8, 3, 3), sampler, 0, torch.device("cpu")))
    order = [index for index, _ in next(iter(sampler))]
    expected = torch.from_numpy(PIXELS[order]).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(batch["images"], expected) and batch["y"].tolist() == [index % 3 for index in order]


@pytest.mark.parametrize("script", ["train", "extract_latents"])
def test_scripts_take_its_name(script, small_vae, tmp_path):
    file = tmp_path / "script.py"
    file.write_text(f"import {script}, test_seam_dataset as seam\nseam.DATASETS['s'] = seam.Stripes\n{script}.main()\n")
    own = {"train": [*TINY, "--max-steps", 1, "--output-dir"], "extract_latents": ["--vae", small_vae(), "--output"]}
    flags = [*own[script], tmp_path / "out", "--data-path", "s", "--image-size", 8, "--num-workers", 0]
    result = run(file, *flags)
    assert result.returncode == 2 and "--num-classes is missing" in result.stderr
    result = run(file, *flags, "--num-classes", 3)
    assert result.returncode == 0, result.stderr
    if script == "extract_latents":
        latents = open_source(str(tmp_path / "out"))
        assert latents.num_classes == 3 and [latents[i, False]["y"] for i in range(12)] == [0, 1, 2] * 4
