"""Files from the Hugging Face hub and from URLs, and the released models' names."""

import hashlib
import pathlib
import re
import urllib.error
import urllib.parse
import urllib.request

import huggingface_hub
import torch
from huggingface_hub import constants

from utils import files
from utils.errors import named

TIMEOUT_SECONDS = 10
# S, B and L at 800K steps, XL at 256x256 and at 512x512.
RELEASED_REPOSITORY = "nyu-visionx/SiT-collections"
WEIGHTS_SUFFIXES = (".pt", ".safetensors")


def require(what, url=None):
    """Raise ValueError if the hub cannot be reached: its client would retry for half a minute and then say less.

    Args:
        what: what is to be fetched, for the message.
        url: where it is; None: on the hub.
    """
    url = url or constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"cannot fetch {what}: HF_HUB_OFFLINE is set, and it is not in the cache")
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError:
        return  # the server answers; the request itself will tell
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"cannot fetch {what}: {url} cannot be reached ({reason})") from error


def list_files(repository):
    """Return the names of all files of a model repository. Raise ValueError if it cannot be listed."""
    require(repository)
    with named(f"cannot list {repository} on the hub", Exception):  # the client's errors, and its HTTP library's
        return huggingface_hub.list_repo_files(repository)


def cached_files(repository):
    """Return the names of a model repository's files that are in the hub's cache."""
    try:
        repositories = huggingface_hub.scan_cache_dir().repos
    except huggingface_hub.errors.CacheNotFound:
        return []
    revisions = [revision for entry in repositories if entry.repo_id == repository for revision in entry.revisions]
    return sorted({file.file_name for revision in revisions for file in revision.files})


def fetch(repository, filename):
    """Return the path of a file of a model repository, fetched into the cache unless it is there. Raise ValueError."""
    cached = huggingface_hub.try_to_load_from_cache(repository, filename)
    if isinstance(cached, str):
        return cached
    require(f"{filename} of {repository}")
    with named(f"cannot fetch {filename} of {repository}", Exception):
        return huggingface_hub.hf_hub_download(repository, filename)


def resolve(name_or_path):
    """Return the local path of weights, fetched once if they are not here.

    Args:
        name_or_path: a path (see `weights.load_weights`); a released model, as 'SiT-XL/2-256', 'SiT-XL-2-256x256.pt'
            or a file's name in the repository; or an http(s) URL, with '#sha256=HEX' at its end to have it verified.

    Raises:
        ValueError: nothing is there, or it cannot be fetched.
    """
    name = str(name_or_path)
    if pathlib.Path(name).exists():
        return pathlib.Path(name)
    if name.startswith(("https://", "http://")):
        return fetch_url(name)
    if _released_name(name) is None:
        raise ValueError(
            f"no such checkpoint: {name}; give a path (run folder, checkpoint folder, .pt, .safetensors), a URL, "
            "or a released model such as SiT-XL-2-256x256.pt"
        )
    matches = match_released(name, cached_files(RELEASED_REPOSITORY))
    if len(matches) != 1:
        listing = list_files(RELEASED_REPOSITORY)
        matches = match_released(name, listing)
        if len(matches) != 1:
            problem = "several files fit" if matches else "no file fits"
            names = matches or [file for file in listing if file.endswith(WEIGHTS_SUFFIXES)]
            raise ValueError(f"{name}: {problem} in {RELEASED_REPOSITORY}; name one of {', '.join(names)}")
    return pathlib.Path(fetch(RELEASED_REPOSITORY, matches[0]))


def _released_name(name):
    """Return ('XL', '2', '256') for any spelling of a released model's name; None for other names and for paths."""
    match = re.fullmatch(r"SiT-(S|B|L|XL)[-/_](\d+)[-_](\d+)(?!\d)[^/]*", name)
    return match and match.groups()


def match_released(name, listing):
    """Return the files of `listing` that `name` means: the file of that very name, or all of its model and size."""
    if name in listing:
        return [name]
    return [
        file for file in listing if file.endswith(WEIGHTS_SUFFIXES) and _released_name(file) == _released_name(name)
    ]


def fetch_url(url):
    """Return the path of a URL's file in torch.hub's cache, fetched once. Raise ValueError if it cannot be fetched."""
    address, _, fragment = url.partition("#")
    folder = pathlib.Path(torch.hub.get_dir()) / "checkpoints"
    # The address is part of the name: two files called model.pt on two hosts are two files.
    key = hashlib.sha256(address.encode()).hexdigest()[:12]
    path = folder / f"{key}-{pathlib.PurePosixPath(urllib.parse.urlparse(address).path).name}"
    if not path.is_file():
        with named(f"cannot fetch {address}"):
            folder.mkdir(parents=True, exist_ok=True)
            with files.written_whole(path) as partial:
                torch.hub.download_url_to_file(address, str(partial))
    if fragment.startswith("sha256="):
        actual, expected = files.sha256(path), fragment.removeprefix("sha256=").lower()
        if actual != expected:
            path.unlink()
            raise ValueError(f"{address} has the SHA-256 {actual}, not {expected}; it was removed")
    return path
