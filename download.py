"""Finds weights: a name of the released models, a path on this machine, or a URL."""

import hashlib
import pathlib
import re
import urllib.error
import urllib.parse
import urllib.request

import torch

import checkpoint
import files
import hub
import options

# S, B and L at 800K steps and XL at 256x256, XL at 512x512.
RELEASED_REPOSITORY = "nyu-visionx/SiT-collections"


def find_model(name_or_path):
    """The state dict that `name_or_path` means, for `SiT.load_state_dict`; EMA weights where both are there.

    Args:
        name_or_path: as `resolve` takes it.

    Raises:
        ValueError: nothing is there, it cannot be reached, or it is not a SiT; the message says which.
    """
    return checkpoint.load_weights(resolve(name_or_path)).state_dict


def resolve(name_or_path):
    """Path on this machine of what `name_or_path` means; fetched there, once, if it is not here.

    Args:
        name_or_path: a path (see `checkpoint.load_weights`); a released model, as 'SiT-XL/2-256', 'SiT-XL-2-256x256.pt'
            or a file's name in the repository; or an http(s) URL, with '#sha256=HEX' at its end to have it verified.

    Raises:
        ValueError: as `find_model`.
    """
    name = str(name_or_path)
    if pathlib.Path(name).exists():
        return pathlib.Path(name)
    if name.startswith(("https://", "http://")):
        return _fetch_url(name)
    if _released_name(name) is None:
        raise ValueError(
            f"no such checkpoint: {name}; give a path (run folder, checkpoint folder, .pt, .safetensors), a URL, "
            "or a released model such as SiT-XL-2-256x256.pt"
        )
    cached = match_released(name, hub.cached_files(RELEASED_REPOSITORY))
    if len(cached) != 1:
        listing = hub.list_files(RELEASED_REPOSITORY)
        candidates = match_released(name, listing)
        if len(candidates) != 1:
            weights = [file for file in listing if file.endswith((".pt", ".safetensors"))]
            problem = "several files fit" if candidates else "no file fits"
            raise ValueError(
                f"{name}: {problem} in {RELEASED_REPOSITORY}; name one of {', '.join(candidates or weights)}"
            )
        cached = candidates
    return pathlib.Path(hub.fetch(RELEASED_REPOSITORY, cached[0]))


def _released_name(name):
    """('XL', '2', '256') of any spelling of a released model's name; None if it is not one, as a path is not."""
    match = re.fullmatch(r"SiT-(S|B|L|XL)[-/_](\d+)[-_](\d+)(?!\d)[^/]*", name)
    return match and match.groups()


def match_released(name, listing):
    """The weights in `listing` that `name` means: the file of that very name, or all of its model and image size."""
    if name in listing:
        return [name]
    weights = [file for file in listing if file.endswith((".pt", ".safetensors"))]
    return [file for file in weights if _released_name(file) == _released_name(name)]


def _fetch_url(url):
    """Download into torch.hub's cache, beside and renamed; the same URL is not fetched twice."""
    address, _, fragment = url.partition("#")
    expected = fragment.removeprefix("sha256=").lower() if fragment.startswith("sha256=") else None
    folder = pathlib.Path(torch.hub.get_dir()) / "checkpoints"
    # The address is part of the name: two files called model.pt on two hosts are two files.
    key = hashlib.sha256(address.encode()).hexdigest()[:12]
    path = folder / f"{key}-{pathlib.PurePosixPath(urllib.parse.urlparse(address).path).name}"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        try:
            torch.hub.download_url_to_file(address, str(partial))
        except (urllib.error.URLError, OSError) as error:
            raise ValueError(f"cannot fetch {address}: {error}") from error
        partial.rename(path)
    if expected is not None:
        actual = files.sha256(path)
        if actual != expected:
            path.unlink()
            raise ValueError(f"{address} has the SHA-256 {actual}, not {expected}; it was removed")
    return path


def main():
    parser = options.Parser(description="Fetch released SiT weights into the hub's cache and print where they are.")
    parser.add_argument(
        "names",
        nargs="*",
        default=["SiT-XL-2-256x256.pt"],
        help="released models such as SiT-XL-2-256x256.pt or SiT-B/2-256, or URLs (default: SiT-XL-2-256x256.pt)",
    )
    args = parser.parse_args()
    for name in args.names:
        with options.user_errors(parser):
            print(f"{name}: {resolve(name)}")


if __name__ == "__main__":
    main()
