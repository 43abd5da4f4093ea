"""Files from the Hugging Face hub and from URLs, and the released models' names."""

import concurrent.futures
import contextlib
import hashlib
import http.client
import logging
import os
import pathlib
import re
import shutil
import threading
import urllib.parse
import urllib.request
import uuid

import huggingface_hub
import torch
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import get_session
from tqdm import tqdm

from utils import files

TIMEOUT_SECONDS = 10
GRACE_SECONDS = 2  # for the hub's client, if the hub does not answer
# S, B and L at 800K steps, XL at 256x256 and at 512x512.
RELEASED_REPOSITORY = "nyu-visionx/SiT-collections"
WEIGHTS_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
DESCRIPTIONS = ("config.json", "trainer_state.json", "manifest.json")  # files that say what the weights beside them are
REPOSITORY = re.compile(r"(?:hf://)?(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?")
KINDS = "a path (run folder, checkpoint folder, .pt, .safetensors), a URL, a repository of the hub (USER/NAME[/FILE])"


def _unreachable():
    """Return why the hub cannot be reached; None if it answers."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, and it is not in the cache"
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT_SECONDS)  # of the hub's client, with its certificates
    except Exception as error:  # of whichever HTTP library the client uses
        return f"{constants.ENDPOINT} cannot be reached: {files.one_line(error)}"


def require(what):
    """Raise ValueError that `what` cannot be fetched if the hub cannot be reached."""
    if problem := _unreachable():
        raise ValueError(f"cannot fetch {what}: {problem}")


def fetch(what, by_hand, function, *arguments, **options):
    """Return function(*arguments, **options), which fetches `what` with the hub's client.

    The client decides: it may know a mirror or a proxy that an attempt to reach the hub does not take. But without a
    network it would retry for half a minute. Raise ValueError, which ends with `by_hand`, how to do without."""
    problem, future = _unreachable(), concurrent.futures.Future()

    def call():
        try:
            future.set_result(function(*arguments, **options))
        except BaseException as error:
            future.set_exception(error)

    if problem is None or constants.HF_HUB_OFFLINE:
        call()
    else:
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it would warn of each attempt
        threading.Thread(target=call, daemon=True).start()
    try:
        return future.result(GRACE_SECONDS)
    except Exception as error:
        raise ValueError(f"cannot fetch {what}: {problem or files.one_line(error)}; {by_hand}") from error


def resolve(name_or_path):
    """Return the local path of weights, fetched once. Raise ValueError if there are none, or they cannot be fetched.

    `name_or_path` is a path; a released model, as 'SiT-XL/2-256', 'SiT-XL-2-256x256.pt' or a file's name in the
    repository; a repository of the hub, as 'user/name', or a file in it, as 'user/name/file.pt'; or an http(s) URL,
    with '#sha256=HEX' at its end to have it verified."""
    name = os.path.expanduser(str(name_or_path))
    if pathlib.Path(name).exists():
        return pathlib.Path(name)
    if name.startswith(("https://", "http://")):
        page = re.fullmatch(r"https://huggingface\.co/([^/]+/[^/]+?)(?:/tree/main)?/?", name)
        if not page:
            return fetch_url(re.sub(r"^(https://huggingface\.co/[^/]+/[^/]+)/blob/", r"\1/resolve/", name))
        name = page[1]
    name = name.rstrip("/")
    if _released_name(name) is not None:
        return _released(name)
    repository = REPOSITORY.fullmatch(name)
    if repository and repository[2] is None and not name.endswith(WEIGHTS_SUFFIXES):
        return _repository(repository[1])
    if repository and repository[2] and name.endswith(WEIGHTS_SUFFIXES):
        return _file(*repository.groups())
    raise ValueError(f"no such checkpoint: {name}; give {KINDS}, or a released model such as SiT-XL-2-256x256.pt")


def find_config(name):
    """Return (repository, folder in it, path of the config.json there) of an autoencoder on the hub.

    `name` is a repository's, of the autoencoder or of a pipeline with vae/, or that and a folder in it. Raise
    ValueError if it is neither or cannot be fetched."""
    parts = REPOSITORY.fullmatch(name)
    if not parts:
        raise ValueError("no such folder")
    repository, wanted = parts[1], ([parts[2]] if parts[2] else ["", "vae"])
    listings = [names for _, names in _snapshots(repository)]
    for names in listings or [_listing(repository, " (no such folder here)")]:
        for folder in wanted:
            if (file := str(pathlib.PurePosixPath(folder, "config.json"))) in names:
                return repository, folder, _file(repository, file)
    raise ValueError(f"{repository} holds no {' or '.join(f'{folder}/config.json'.lstrip('/') for folder in wanted)}")


def _file(repository, name):
    """Return the local path of a file in a repository of the hub: the newest in the cache, or fetched."""
    cached = [folder / name for folder, names in _snapshots(repository) if name in names]
    return cached[0] if cached else _download(repository, name)


def _released(name):
    """Return the local path of a released model."""
    for folder, names in _snapshots(RELEASED_REPOSITORY):
        if len(matches := match_released(name, names)) == 1:
            return folder / matches[0]
    listing = _listing(RELEASED_REPOSITORY)
    matches = match_released(name, listing)
    if len(matches) != 1:
        problem = "several files fit" if matches else "no file fits"
        names = matches or [file for file in listing if file.endswith(WEIGHTS_SUFFIXES)]
        raise ValueError(f"{name}: {problem} in {RELEASED_REPOSITORY}; name one of {', '.join(names)}")
    return _download(RELEASED_REPOSITORY, matches[0])


def _released_name(name):
    """Return ('XL', '2', '256') for any spelling of a released model's name; None for other names and for paths."""
    match = re.fullmatch(r"SiT-(S|B|L|XL)[-/_](\d+)[-_](\d+)(?!\d)[^/]*", name)
    return match and match.groups()


def match_released(name, listing):
    """Return the files of `listing` that `name` means: the file of that very name, or all of its model and size."""
    model = _released_name(name)
    matches = [file for file in listing if file.endswith(WEIGHTS_SUFFIXES) and _released_name(file) == model]
    return [name] if name in listing else matches


def _repository(name):
    """Return the local folder, or the only file, of the weights in a repository of the hub."""
    folder = None
    try:
        listing = _listing(name, " (no such path here)")
    except ValueError:
        cached = [(f, names) for f, names in _snapshots(name) if any(n.endswith(WEIGHTS_SUFFIXES) for n in names)]
        if not cached:
            raise
        folder, listing = cached[0]
    wanted = _weights_among(listing, name)
    paths = [folder / file if folder else _download(name, file) for file in wanted]
    return paths[0] if len(paths) == 1 else paths[0].parent


def _weights_among(listing, repository):
    """Return the files of a listing to fetch: weights, and what describes them. Raise ValueError if that is unclear."""
    usual = "ema.pt" if "trainer_state.json" in listing else "model.safetensors"
    if usual in listing:
        return [usual, *(file for file in DESCRIPTIONS if file in listing)]
    weights = [file for file in listing if file.endswith(WEIGHTS_SUFFIXES)]
    if len(weights) != 1:
        names = f"name one, as {repository}/FILE: {', '.join(weights[:20])}" if weights else "it holds no weights"
        raise ValueError(f"{repository} has no model.safetensors; {names}")
    return weights


def _snapshots(repository):
    """Return [(folder, names of its files)] of a repository in the hub's cache, the newest snapshot first."""
    cache = pathlib.Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repository, repo_type="model"))
    folders = sorted(cache.glob("snapshots/*"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    return [(f, [path.relative_to(f).as_posix() for path in f.rglob("*") if path.is_file()]) for f in folders]


def _listing(repository, note=""):
    by_hand = f"give the path of a copy of {constants.ENDPOINT}/{repository}"
    return fetch(f"{repository}{note}", by_hand, huggingface_hub.list_repo_files, repository)


def _download(repository, file):
    by_hand = f"give the path of a copy of {constants.ENDPOINT}/{repository}/resolve/main/{file}"
    path = fetch(f"{file} of {repository}", by_hand, huggingface_hub.hf_hub_download, repository, file)
    return pathlib.Path(path)


def fetch_url(url):
    """Return the path of a URL's file in torch.hub's cache, fetched once. Raise ValueError if it cannot be fetched."""
    address, _, fragment = url.partition("#")
    # The address is part of the name: two files called model.pt on two hosts are two files.
    key = hashlib.sha256(address.encode()).hexdigest()[:12]
    path = cache_of_urls() / f"{key}-{pathlib.PurePosixPath(urllib.parse.urlparse(address).path).name}"
    sha256 = fragment.removeprefix("sha256=").lower() if fragment.startswith("sha256=") else ""
    if not path.is_file() or not files.sha256(path).startswith(sha256):
        download(address, path, f"{address} (or give the path of a copy)", sha256)
    return path


def cache_of_urls():
    """Return the folder of downloads from URLs, which TORCH_HOME moves."""
    return pathlib.Path(torch.hub.get_dir()) / "checkpoints"


def download(url, path, what, sha256=""):
    """Download a URL to `path`, which is then complete, or as it was. Several processes may do so at a time.

    Raise ValueError, naming `what`, if that fails, the connection ends early, what comes is a web page, or its SHA-256
    does not begin with `sha256`."""
    partial = path.with_name(f".{path.name[-100:]}.{uuid.uuid4().hex}.partial")
    kinds = (OSError, ValueError, http.client.HTTPException)
    try:
        with files.named(f"{path.parent}, where downloads are kept, cannot be written (TORCH_HOME moves it)"):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.touch()
        with files.named(f"cannot fetch {what} into {path.parent}", kinds):
            request = urllib.request.Request(url, headers={"User-Agent": "SiT"})
            with open(partial, "wb") as file, urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
                size = response.length  # None if the server does not say
                with tqdm.wrapattr(response, "read", total=size, disable=None) as reader:
                    shutil.copyfileobj(reader, file)
                if size not in (None, file.tell()):
                    raise ValueError(f"the connection ended after {file.tell():,} of {size:,} bytes; try again")
            with open(partial, "rb") as file:
                if file.read(64).lstrip().lower().startswith((b"<!doctype", b"<html")):
                    raise ValueError("it is a web page, not a file of weights")
            if not (actual := files.sha256(partial)).startswith(sha256):
                raise ValueError(f"its SHA-256 is {actual}, not {sha256}; it was removed")
            partial.rename(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()
