"""Files from the Hugging Face hub and from URLs, and the released models' names."""

import contextlib
import hashlib
import pathlib
import re
import urllib.error
import urllib.parse
import urllib.request

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from utils import files

TIMEOUT_SECONDS = 10
# S, B and L at 800K steps, XL at 256x256 and at 512x512.
RELEASED_REPOSITORY = "nyu-visionx/SiT-collections"
WEIGHTS_SUFFIXES = (".pt", ".safetensors")


def require(what, url=None):
    """Raise ValueError that `what` cannot be fetched if its `url` (None: the hub) cannot be reached."""
    # The hub's client would retry for half a minute, and then say less.
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"cannot fetch {what}: HF_HUB_OFFLINE is set, and it is not in the cache")
    url = url or constants.ENDPOINT
    # An HTTPError is an answer: the request that follows will tell more.
    with files.named(f"cannot fetch {what}: {url} cannot be reached"), contextlib.suppress(urllib.error.HTTPError):
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_SECONDS)


def resolve(name_or_path):
    """Return the local path of weights, fetched once. Raise ValueError if there are none, or they cannot be fetched.

    `name_or_path` is a path; a released model, as 'SiT-XL/2-256', 'SiT-XL-2-256x256.pt' or a file's name in the
    repository; or an http(s) URL, with '#sha256=HEX' at its end to have it verified."""
    name, repository = str(name_or_path), RELEASED_REPOSITORY
    if pathlib.Path(name).exists():
        return pathlib.Path(name)
    if name.startswith(("https://", "http://")):
        return fetch_url(name)
    if _released_name(name) is None:
        allowed = "a path (run folder, checkpoint folder, .pt, .safetensors), a URL, or a released model"
        raise ValueError(f"no such checkpoint: {name}; give {allowed} such as SiT-XL-2-256x256.pt")
    cache = pathlib.Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"))
    paths = sorted(cache.glob("snapshots/*/*"), key=lambda path: path.parent.stat().st_mtime)
    cached = {path.name: path for path in paths if path.is_file()}  # from the newest snapshot
    matches = match_released(name, cached)
    if len(matches) == 1:
        return cached[matches[0]]
    require(repository)
    with files.named(f"cannot list {repository} on the hub", Exception):  # the client's errors, and its HTTP library's
        listing = huggingface_hub.list_repo_files(repository)
    matches = match_released(name, listing)
    if len(matches) != 1:
        problem = "several files fit" if matches else "no file fits"
        names = matches or [file for file in listing if file.endswith(WEIGHTS_SUFFIXES)]
        raise ValueError(f"{name}: {problem} in {repository}; name one of {', '.join(names)}")
    with files.named(f"cannot fetch {matches[0]} of {repository}", Exception):
        return pathlib.Path(huggingface_hub.hf_hub_download(repository, matches[0]))


def _released_name(name):
    """Return ('XL', '2', '256') for any spelling of a released model's name; None for other names and for paths."""
    match = re.fullmatch(r"SiT-(S|B|L|XL)[-/_](\d+)[-_](\d+)(?!\d)[^/]*", name)
    return match and match.groups()


def match_released(name, listing):
    """Return the files of `listing` that `name` means: the file of that very name, or all of its model and size."""
    model = _released_name(name)
    matches = [file for file in listing if file.endswith(WEIGHTS_SUFFIXES) and _released_name(file) == model]
    return [name] if name in listing else matches


def fetch_url(url):
    """Return the path of a URL's file in torch.hub's cache, fetched once. Raise ValueError if it cannot be fetched."""
    address, _, fragment = url.partition("#")
    folder = pathlib.Path(torch.hub.get_dir()) / "checkpoints"
    # The address is part of the name: two files called model.pt on two hosts are two files.
    key = hashlib.sha256(address.encode()).hexdigest()[:12]
    path = folder / f"{key}-{pathlib.PurePosixPath(urllib.parse.urlparse(address).path).name}"
    if not path.is_file():
        with files.named(f"cannot fetch {address}"):
            folder.mkdir(parents=True, exist_ok=True)
            with files.written_whole(path) as partial:
                torch.hub.download_url_to_file(address, str(partial))
    if fragment.startswith("sha256="):
        actual, expected = files.sha256(path), fragment.removeprefix("sha256=").lower()
        if actual != expected:
            path.unlink()
            raise ValueError(f"{address} has the SHA-256 {actual}, not {expected}; it was removed")
    return path
