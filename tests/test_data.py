import itertools

import numpy as np
import pytest
import torch
from PIL import Image

import data
from distributed import seed_from


def write_images(folder, sizes):
    """Class folders with one image of random pixels per entry of sizes {class: [(width, height), ...]}."""
    rng = np.random.default_rng(0)
    for name, class_sizes in sizes.items():
        (folder / name).mkdir(parents=True)
        for i, (width, height) in enumerate(class_sizes):
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_digits_are_the_real_ones():
    source = data.open_source("digits")
    assert (len(source.examples), source.num_classes, source.channels, source.image_size) == (1797, 10, 1, 8)
    dataset = data.ImageDataset(source, 8, 1)
    image, label = dataset[0, False]
    assert label == 0 and image.shape == (1, 8, 8) and image.dtype == torch.float32
    # The first digit's first row, as scikit-learn documents it: 0, 0, 5, 13, 9, 1, 0, 0 of 16.
    torch.testing.assert_close(image[0, 0], torch.tensor([0, 0, 5, 13, 9, 1, 0, 0]) / 8 - 1, atol=0.004, rtol=0)
    everything = torch.stack([dataset[i, False][0] for i in range(1797)])
    assert everything.min() == -1 and everything.max() == 1


def test_class_folders_in_sorted_order(tmp_path):
    write_images(tmp_path, {"n02": [(9, 7)], "n01": [(8, 8), (8, 8)], "n10": [(16, 20)]})
    source = data.open_source(str(tmp_path))
    assert source.num_classes == 3 and source.image_size is None
    assert [label for _, label in source.examples] == [0, 0, 1, 2]
    image, label = data.ImageDataset(source, 8, 3)[2, False]
    assert image.shape == (3, 8, 8) and label == 1
    assert -1 <= image.min() < -0.5 and 0.5 < image.max() <= 1


@pytest.mark.parametrize(
    "mode, fill", [("L", 51), ("RGBA", (51, 51, 51, 128)), ("P", 51), ("CMYK", (204, 204, 204, 0))]
)
def test_images_of_any_mode_become_rgb(mode, fill):
    image = Image.new(mode, (8, 8), fill)
    if mode == "P":
        image.putpalette([value for grey in range(256) for value in (grey, grey, grey)])
    source = data.Source([(image, 0)], 1, 3, None, True)
    pixels, _ = data.ImageDataset(source, 8, 3)[0, False]
    torch.testing.assert_close(pixels, torch.full((3, 8, 8), 51 / 127.5 - 1), atol=0.01, rtol=0)


@pytest.mark.parametrize("size", [(37, 91), (91, 37), (64, 64), (5, 9), (16, 16), (33, 32)])
def test_centre_crop_is_square_centred_and_keeps_the_scale(size):
    # A linear ramp survives box and bicubic filters, so the crop's centre has the ramp's middle value.
    width, height = size
    ramp = np.linspace(0, 255, width)[None, :] * np.ones((height, 1))
    crop = np.asarray(data.center_crop(Image.fromarray(ramp.astype(np.uint8)), 16)).astype(float)
    assert crop.shape == (16, 16)
    assert crop[:, 7:9].mean() == pytest.approx(127.5, abs=12)
    slope = 255 / (width - 1) * min(size) / 16
    assert np.diff(crop[:, 4:12], axis=1).mean() == pytest.approx(slope, rel=0.25)


def test_centre_crop_of_the_right_size_changes_nothing():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(data.center_crop(image, 16)), np.asarray(image))


def test_flip_mirrors_left_and_right():
    dataset = data.ImageDataset(data.open_source("digits"), 8, 1)
    torch.testing.assert_close(dataset[5, True][0], dataset[5, False][0].flip(-1))


def take(count, n=100, batch=24, micro=8, rank=0, world_size=1, seed=0, mirror=True, start_step=0):
    sampler = data.GlobalBatchSampler(
        n, batch, micro, seed=seed, rank=rank, world_size=world_size, mirror=mirror, start_step=start_step
    )
    return list(itertools.islice(sampler, count))


def test_every_epoch_is_a_permutation_and_epochs_differ():
    keys = sum(take(75), [])  # 600 keys: six epochs of 100, which no batch divides
    epochs = [[index for index, _ in keys[i : i + 100]] for i in range(0, 600, 100)]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    flips = [flip for _, flip in keys]
    assert 0.4 < sum(flips) / 600 < 0.6
    assert not any(flip for _, flip in sum(take(75, mirror=False), []))


def test_the_global_batch_does_not_depend_on_ranks_or_micro_batches():
    one = sum(take(6, micro=24), [])
    assert sum(take(18, micro=8), []) == one
    ranks = [take(12, micro=6, rank=rank, world_size=2) for rank in range(2)]  # 2 micro batches a step
    steps = [ranks[0][2 * s] + ranks[0][2 * s + 1] + ranks[1][2 * s] + ranks[1][2 * s + 1] for s in range(6)]
    assert sum(steps, []) == one


def test_the_order_continues_from_any_step_and_depends_on_the_seed():
    assert take(6, micro=24, start_step=5) == take(11, micro=24)[5:]
    assert take(3, seed=1) != take(3, seed=0)


def test_a_data_set_smaller_than_the_batch():
    keys = sum(take(1, n=5, batch=24, micro=24), [])
    assert sorted(index for index, _ in keys[:20]) == sorted(list(range(5)) * 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_keeps_the_samplers_order(workers):
    dataset = data.ImageDataset(data.open_source("digits"), 8, 1)
    sampler = data.GlobalBatchSampler(1797, 24, 8, seed=0, rank=0, world_size=1, mirror=True)
    loader = data.make_loader(dataset, sampler, workers, torch.device("cpu"))
    for keys, (images, labels) in zip(itertools.islice(sampler, 6), loader, strict=False):
        expected = [dataset[key] for key in keys]
        torch.testing.assert_close(images, torch.stack([image for image, _ in expected]), rtol=0, atol=0)
        assert labels.tolist() == [label for _, label in expected]


def test_bad_data_paths_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.*no such folder; give 'digits' or a folder"):
        data.open_source(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no class folders"):
        data.open_source(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no class folders"):
        data.open_source(str(tmp_path))


def test_seeds_are_spread():
    seeds = {seed_from(seed, step) for seed in range(30) for step in range(100)}
    assert len(seeds) == 3000 and all(0 <= seed < 2**63 for seed in seeds)
