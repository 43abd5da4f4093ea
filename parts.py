"""Samples that are drawn part by part: what is there already, who may add to it, and one .npz of it all in the end.

Beside the output FILE.npz lie, until it is written, FILE.npz.parts/ with one .npy for each part, and from then on
FILE.npz.json with how it was made; FILE.pngs/ if PNGs are asked for.
"""

import contextlib
import json
import re
import shutil

import numpy as np
from PIL import Image

import files
from images import ImageBatches

# Images from the first number up to, not including, the second; network calls and evaluations that an image took.
PART = re.compile(r"(\d+)-(\d+)\.calls-(\d+)-(\d+)\.npy")
SETTINGS = "settings.json"
BEGUN, DONE = "begun", "done"


class Parts:
    """The parts of `output`, an .npz of `count` uint8 images of `image_shape` (H, W, C).

    Ranks make one each; rank 0 calls `prepare` first and `finish` last.
    """

    def __init__(self, output, count, image_shape):
        self.output, self.count, self.image_shape = output, count, tuple(image_shape)
        self.folder = output.with_name(output.name + ".parts")
        self.description = output.with_name(output.name + ".json")
        self.pngs = output.with_suffix(".pngs")

    def prepare(self, identity, save_png):
        """Hold the folder of parts, or find that all is done; DONE, or BEGUN.

        Args:
            identity: what decides the images, as JSON; what is there must have been made with the same.
            save_png: PNGs are to be written, too.

        Raises:
            ValueError: what is there was made with other settings, or is not of this script; another process is at it;
                or nothing can be made there.
        """
        if self.output.suffix != ".npz":
            raise ValueError(f"--output {self.output} must end in .npz")
        with _plain_errors(f"--output {self.output}"):
            if not self._is_done(identity):
                if self.description.is_dir():
                    raise ValueError(f"{self.description} is a folder")
                self.folder.mkdir(parents=True, exist_ok=True)
                files.hold(self.folder, f"another process is drawing {self.output}; wait for it, or give another")
                if not self._is_done(identity):  # by who held it until now
                    self.folder.mkdir(exist_ok=True)
                    self._begin(identity, save_png)
            if save_png:
                self.pngs.mkdir(exist_ok=True)
            return DONE if self.output.exists() else BEGUN

    def _is_done(self, identity):
        if not self.output.exists():
            return False
        if not self.description.is_file():
            raise ValueError(
                f"{self.output} is there, and {self.description.name}, which says how it was made, is not; put it back "
                "or give another --output"
            )
        check_same(self.description, identity)
        shutil.rmtree(self.folder, ignore_errors=True)  # of one that was killed after its last rename
        return True

    def _begin(self, identity, save_png):
        settings = self.folder / SETTINGS
        if settings.is_file():
            return check_same(settings, identity)
        if any(entry.name != files.LOCK for entry in self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty, and what is there is not of sample_ddp.py")
        if save_png and self.pngs.is_dir() and any(self.pngs.iterdir()):
            raise ValueError(f"{self.pngs} is not empty; give another --output")
        with files.written_whole(settings) as partial:
            partial.write_text(json.dumps(identity, indent=2) + "\n")

    def there(self):
        """{(begin, end): path} of the parts that are there and whole, by number; those that are damaged are removed."""
        parts = {}
        for path in self.folder.iterdir():
            match = PART.fullmatch(path.name)
            if match is None:
                continue
            begin, end = map(int, match.groups()[:2])
            try:
                images = np.load(path, mmap_mode="r", allow_pickle=False)
                whole = images.dtype == np.uint8 and images.shape == (end - begin, *self.image_shape)
            except (OSError, ValueError, EOFError):
                whole = False
            if whole:
                parts[begin, end] = path
            else:
                print(f"{path} is damaged, and is drawn anew")
                path.unlink()
        return dict(sorted(parts.items()))

    def missing(self, group):
        """The ranges (begin, end) of images that no part holds, none longer than a group."""
        ranges, begin = [], 0
        for first, last in (*self.there(), (self.count, self.count)):
            ranges += [(i, min(i + group, first)) for i in range(begin, first, group)]
            begin = last
        return ranges

    def write(self, images, begin, counts, save_png):
        """Write a part: images (N, H, W, C), the first of which has the number `begin`. Raises ValueError."""
        calls, evaluations = counts.values()
        path = self.folder / f"{begin:07d}-{begin + len(images):07d}.calls-{calls}-{evaluations}.npy"
        with _plain_errors(path):
            if save_png:
                self.write_pngs(images, begin)  # first: a part that is there is not drawn again
            with files.written_whole(path) as partial, open(partial, "wb") as file:
                np.save(file, images)

    def write_pngs(self, images, begin):
        """Write those PNGs of images (N, H, W, C), numbered from `begin`, that are not there."""
        for i, image in enumerate(images, begin):
            path = self.pngs / f"{i:06d}.png"
            if not path.exists():
                partial = files.partial_name(path).with_suffix(".png")
                Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(partial)
                partial.rename(path)

    def write_pngs_of_what_is_there(self):
        """PNGs of the output, or of its parts: for who asks for them late."""
        with _plain_errors(self.pngs):
            if self.output.exists():
                begin = 0
                for images in ImageBatches(self.output).batches(256):
                    self.write_pngs(images, begin)
                    begin += len(images)
                return
            for (begin, _), path in self.there().items():
                self.write_pngs(np.load(path, allow_pickle=False), begin)

    def counts(self):
        """(network calls, evaluations) of an image: the most of any part."""
        matches = [PART.fullmatch(path.name) for path in self.there().values()]
        return tuple(max(int(match.group(i)) for match in matches) for i in (3, 4))

    def finish(self, labels, description):
        """Write parts and labels (N,) as one .npz, part by part, and how they were made; then remove the parts.

        Raises:
            ValueError: it cannot be written.
        """
        with _plain_errors(self.output):
            with files.written_whole(self.output) as partial:
                with files.NpzWriter(partial) as archive:
                    parts = (np.load(path, allow_pickle=False) for path in self.there().values())
                    archive.write_array("arr_0", parts, self.count)
                    archive.write_array("arr_1", [labels], self.count)
                with files.written_whole(self.description) as partial_description:
                    partial_description.write_text(json.dumps(description, indent=2) + "\n")
            shutil.rmtree(self.folder, ignore_errors=True)


def check_same(path, identity):
    """Raise ValueError naming the first setting that differs from those in a JSON file."""
    try:
        there = json.loads(path.read_text())
        different = [key for key, value in identity.items() if there.get(key) != value]
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if different:
        key = different[0]
        raise ValueError(f"{path}: made with {key} {there.get(key)!r}, not {identity[key]!r}; give another --output")


@contextlib.contextmanager
def _plain_errors(name):
    """Turn what the operating system refuses into a ValueError that names it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror or error}") from error
