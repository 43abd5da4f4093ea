"""Images of odd shapes, sizes and modes, as training reads them."""

import numpy as np
import pytest
from PIL import Image

from data import images
from data.images import ImageDataset, center_crop, to_pil
from data.sources import Source


def adm_crop(image, size):
    """guided-diffusion's crop of an image that is less than twice as large as `size`, by resizing all of it."""
    scale = size / min(image.size)
    image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size))).astype(int)


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (2, 131), (213, 4), (7, 364, 3), (500, 9, 3)])
def test_the_crop_of_a_thin_image_is_that_of_the_whole(shape):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    for size in (16, 33):
        assert max(image.size) * size / min(image.size) > images.LONG_SIDE * size
        crop = np.asarray(center_crop(image, size)).astype(int)
        assert crop.shape[:2] == (size, size) and np.abs(crop - adm_crop(image, size)).max() <= 1


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000)])
def test_a_thin_image_is_never_resized_as_a_whole(size, monkeypatch):
    """At 256 pixels, 60,000 x 1 would become 15,360,000 x 256: gigabytes."""
    most, resize = [], Image.Image.resize

    def recorded(image, size, *more, **options):
        most.append(size[0] * size[1])
        return resize(image, size, *more, **options)

    monkeypatch.setattr(Image.Image, "resize", recorded)
    assert center_crop(Image.new("RGB", size, (5, 6, 7)), 256).getpixel((128, 128)) == (5, 6, 7)
    assert max(most) <= 256 * 256


def read(image, size=8, channels=3):
    source = Source([(image, 0)], np.zeros(1, int), str, num_classes=1, num_examples=1)
    return ImageDataset(source, size, channels).read(0, lambda: (image() if callable(image) else image, 0), False)


def test_a_scan_is_read_and_a_bomb_is_not(tmp_path, monkeypatch):
    """PIL refuses more than 179 million pixels. Here the limit is of the project, and smaller for this test."""
    Image.new("L", (300, 200), 128).save(tmp_path / "scan.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    item = read(lambda: Image.open(tmp_path / "scan.png"))
    assert item["problems"] == [] and item["images"].mean().item() == pytest.approx(128 / 127.5 - 1, abs=1e-6)
    assert images.MOST_FILE_PIXELS > 14_000 * 13_000
    monkeypatch.setattr(images, "MOST_FILE_PIXELS", 50_000)
    (problem,) = read(lambda: Image.open(tmp_path / "scan.png"))["problems"]
    assert "exceeds limit of 50000 pixels" in problem


def test_a_large_image_is_converted_after_the_crop(monkeypatch):
    sizes, convert = [], Image.Image.convert
    monkeypatch.setattr(Image.Image, "convert", lambda image, mode: sizes.append(image.size) or convert(image, mode))
    read(Image.new("L", (512, 512), 9))
    read(Image.new("RGB", (512, 512), (9, 9, 9)))
    assert set(sizes) == {(8, 8)}


def test_sixteen_bits_keep_their_range(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    Image.fromarray(ramp.astype(">u2")).save(tmp_path / "b.tif")
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert np.abs(np.asarray(to_pil(image)) - ramp / 257).max() <= 0.5


@pytest.mark.parametrize(
    "mode, colour, expected",
    [("CMYK", (0, 255, 255, 0), (255, 0, 0)), ("LA", (100, 0), (100,) * 3), ("RGBA", (9, 8, 7, 0), (9, 8, 7))],
)
def test_other_modes_are_read_without_their_alpha(mode, colour, expected):
    pixels = read(Image.new(mode, (8, 8), colour))["images"].mean((1, 2))
    assert ((pixels + 1) * 127.5).round().tolist() == list(expected)


def test_the_first_picture_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    for name in ("a.gif", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        pixels = read(Image.open(tmp_path / name))["images"].mean((1, 2))
        assert ((pixels + 1) * 127.5).round().tolist() == [200, 0, 0]
