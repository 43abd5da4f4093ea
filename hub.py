"""The Hugging Face hub: whether it is there, and what it holds; huggingface_hub fetches, resumes and verifies."""

import urllib.error
import urllib.request

import huggingface_hub
from huggingface_hub import constants

TIMEOUT_SECONDS = 10


def require(what, url=None):
    """Raise ValueError if the hub cannot be reached: its client would retry for half a minute and then say less.

    Args:
        what: what is wanted from there, for the message.
        url: where it is, if not on the hub.
    """
    url = url or constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"cannot fetch {what}: HF_HUB_OFFLINE is set, and it is not in the cache")
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError:
        return  # an answer, if not a friendly one: the request proper will tell
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ValueError(f"cannot fetch {what}: {url} cannot be reached ({reason})") from error


def list_files(repository):
    """Names of all files of a model repository. Raises ValueError."""
    require(repository)
    try:
        return huggingface_hub.list_repo_files(repository)
    except Exception as error:  # the client's own errors, and those of whichever HTTP library it uses
        raise ValueError(f"cannot list {repository} on the hub: {_first_line(error)}") from error


def cached_files(repository):
    """Names of the files of a model repository that earlier calls fetched into the cache."""
    try:
        repositories = huggingface_hub.scan_cache_dir().repos
    except huggingface_hub.errors.CacheNotFound:
        return []
    revisions = [revision for entry in repositories if entry.repo_id == repository for revision in entry.revisions]
    return sorted({file.file_name for revision in revisions for file in revision.files})


def fetch(repository, filename):
    """Path of a file of a model repository, from the cache or fetched into it. Raises ValueError."""
    cached = huggingface_hub.try_to_load_from_cache(repository, filename)
    if isinstance(cached, str):
        return cached
    require(f"{filename} of {repository}")
    try:
        return huggingface_hub.hf_hub_download(repository, filename)
    except Exception as error:
        raise ValueError(f"cannot fetch {filename} of {repository}: {_first_line(error)}") from error


def _first_line(error):
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
