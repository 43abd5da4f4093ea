"""Files from the hub and from URLs, without a network: the hub's client is replaced, and URLs are of a server here."""

import hashlib
import http.server
import os
import sys
import threading

import pytest
import safetensors.torch
import torch
from test_models import STATE_DICT

import download
from evaluation import features
from utils import hub

FILES = [
    "README.md",
    "SiT-S-2-256_orig.pt",
    "SiT-B-2-256.pt",
    "SiT-L-2-256.pt",
    "SiT-XL-2-256.pt",
    "SiT-XL-2-512.pt",
    "SiT-XL-2-512-copy.pt",
]


@pytest.fixture
def client(monkeypatch, tmp_path):
    """A hub whose repositories are `client.files`, {repository: names}; downloads lie in the folder `client.root`."""

    class Client:
        files, fetched, root, online = {hub.RELEASED_REPOSITORY: FILES}, [], tmp_path / "fetched", True

        def list_repo_files(self, repository):
            self.require(repository in self.files, f"404: no {repository}")
            return self.files[repository]

        def hf_hub_download(self, repository, filename):
            self.require(filename in self.files.get(repository, ()), f"404: no {filename}")
            self.fetched.append((repository, filename))
            path = self.root / repository / filename
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            return str(path)

        def require(self, there, problem):
            if not (there and self.online):
                raise OSError(problem)

    fake = Client()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.list_repo_files", fake.list_repo_files)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake.hf_hub_download)
    monkeypatch.setattr(hub, "_unreachable", lambda: None if fake.online else "the hub cannot be reached")
    return fake


def cached(tmp_path, repository, names, revision="main", time=1):
    """The folder of a snapshot in the hub's cache that holds these files."""
    folder = tmp_path / "cache" / f"models--{repository.replace('/', '--')}" / "snapshots" / revision
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    os.utime(folder, (time, time))
    return folder


def test_released_weights_are_looked_up_in_the_listing(client):
    for name, file in [
        ("SiT-XL-2-256x256.pt", "SiT-XL-2-256.pt"),
        ("SiT-XL/2-256", "SiT-XL-2-256.pt"),
        ("SiT-S/2-256", "SiT-S-2-256_orig.pt"),
        ("SiT-XL-2-512.pt", "SiT-XL-2-512.pt"),
    ]:
        assert hub.resolve(name) == client.root / hub.RELEASED_REPOSITORY / file
        assert client.fetched[-1] == ("nyu-visionx/SiT-collections", file)
    with pytest.raises(ValueError, match="several files fit.*SiT-XL-2-512.pt, SiT-XL-2-512-copy.pt"):
        hub.resolve("SiT-XL/2-512")
    with pytest.raises(ValueError, match="no file fits.*SiT-B-2-256.pt"):
        hub.resolve("SiT-B/4-256")
    for path in ("model.pt", "/home/me/SiT-XL-2-256x256.pt", "results/my-SiT-B-2-256/checkpoint-9", "./a/b", "a/b.pt"):
        with pytest.raises(ValueError, match=f"no such checkpoint: {path}; give a path"):
            hub.resolve(path)


def test_cached_weights_need_no_network(client, tmp_path):
    newest = cached(tmp_path, hub.RELEASED_REPOSITORY, FILES, "new", 2)
    cached(tmp_path, hub.RELEASED_REPOSITORY, FILES, "old", 1)
    cached(tmp_path, "a/b", ["sub/w.pt"])
    client.online = False
    assert hub.resolve("SiT-XL/2-256") == newest / "SiT-XL-2-256.pt"
    assert hub.resolve("a/b/sub/w.pt").is_file() and hub.resolve("a/b").name == "w.pt" and not client.fetched


REPOSITORIES = [
    (["model.safetensors", "config.json", "README.md", "old.pt"], "", ["model.safetensors", "config.json"]),
    (["model.safetensors"], "model.safetensors", ["model.safetensors"]),
    (["README.md", "weights/0100.pt"], "weights/0100.pt", ["weights/0100.pt"]),
    (
        ["ema.pt", "model.safetensors", "trainer_state.json", "manifest.json", "optimizer/0.distcp"],
        "",
        ["ema.pt", "trainer_state.json", "manifest.json"],
    ),
]


@pytest.mark.parametrize("files, path, fetched", REPOSITORIES)
def test_a_repository_gives_its_weights_and_what_describes_them(files, path, fetched, client):
    client.files["user/my.repo"] = files
    for name in ("user/my.repo", "user/my.repo/", "hf://user/my.repo", "https://huggingface.co/user/my.repo"):
        client.fetched.clear()
        assert hub.resolve(name) == client.root / "user/my.repo" / path
        assert [name for _, name in client.fetched] == fetched


def test_a_repository_that_leaves_open_what_is_meant_is_refused(client, tmp_path):
    client.files |= {"a/two": ["a.pt", "b.pt"], "a/none": ["README.md"]}
    cached(tmp_path, "a/two", ["a.pt"])  # fetched by its name, and no reason to take it for the one
    with pytest.raises(ValueError, match="name one, as a/two/FILE: a.pt, b.pt"):
        hub.resolve("a/two")
    with pytest.raises(ValueError, match="a/none.*it holds no weights"):
        hub.resolve("a/none")
    assert hub.resolve("a/two/b.pt").name == "b.pt"
    with pytest.raises(ValueError, match="cannot fetch a/missing .no such path here.: 404: no a/missing"):
        hub.resolve("a/missing")


def test_without_the_network_the_error_is_one_line_that_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "GRACE_SECONDS", 0.1)
    wanted = "cannot fetch nyu-visionx/SiT-collections.*cannot be reached.*give the path of a copy of http"
    with pytest.raises(ValueError, match=wanted) as error:
        download.find_model("SiT-XL-2-256x256.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("offline", [False, True])
def test_the_client_decides_what_can_be_fetched(offline, client, monkeypatch):
    """It may have certificates, a proxy or a mirror of its own; and what ends it ends the call."""
    client.files["a/b"] = ["w.pt"]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub, "_unreachable", lambda: "certificate verify failed")
    assert hub.resolve("a/b/w.pt") == client.root / "a/b/w.pt"
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_: sys.exit(7))
    with pytest.raises(SystemExit, match="7"):
        hub.resolve("a/b/w.pt")


def test_the_autoencoder_of_a_pipeline_on_the_hub_is_found(client, tmp_path):
    client.files |= {"a/vae": ["config.json"], "a/sd": ["model_index.json", "vae/config.json"], "a/x": ["x.json"]}
    for name, folder in (("a/vae", ""), ("a/sd", "vae"), ("a/sd/vae", "vae")):
        repository, inside, path = hub.find_config(name)
        assert f"{repository}/{inside}".rstrip("/") in (name, f"{name}/vae") and inside == folder
        assert path == client.root / repository / folder / "config.json"
    with pytest.raises(ValueError, match="a/x holds no config.json or vae/config.json"):
        hub.find_config("a/x")
    cached(tmp_path, "a/old", ["vae/config.json"])
    client.online = False
    assert hub.find_config("a/old")[1] == "vae"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server of `server.content`, {path: bytes}, that breaks off after half while `server.breaks`; (server, URL)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = self.server.content.get(self.path)
            self.server.calls.append(self.path)
            self.send_response(404 if content is None else 200)
            content = content or b""
            if self.server.says_length:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if self.server.breaks else content)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.calls, server.breaks, server.says_length = {}, [], False, True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_urls_are_fetched_once_and_verified(server, tmp_path):
    server, url = server
    server.content["/w.safetensors"] = weights = safetensors.torch.save(STATE_DICT)
    digest = hashlib.sha256(weights).hexdigest()
    with pytest.raises(ValueError, match="SHA-256"):
        download.find_model(f"{url}/w.safetensors#sha256={'0' * 64}")
    found = download.find_model(f"{url}/w.safetensors#sha256={digest}")
    assert found.keys() == STATE_DICT.keys() and all(torch.equal(found[key], STATE_DICT[key]) for key in found)
    with pytest.raises(ValueError, match="cannot fetch.*404"):
        hub.resolve(f"{url}/missing.pt")
    assert len(server.calls) == 3 and hub.resolve(f"{url}/w.safetensors").read_bytes() == weights
    assert len(server.calls) == 3 and len(list((tmp_path / "cache" / "checkpoints").iterdir())) == 1
    hub.resolve(f"{url}/w.safetensors").write_bytes(b"damaged")
    assert hub.resolve(f"{url}/w.safetensors#sha256={digest}").read_bytes() == weights


def test_a_download_that_breaks_off_is_not_kept(server, tmp_path):
    server, url = server
    server.content["/w.pt"], server.breaks = b"x" * 100_000, True
    with pytest.raises(ValueError, match="the connection ended after 50,000 of 100,000 bytes"):
        hub.resolve(f"{url}/w.pt")
    assert list((tmp_path / "cache" / "checkpoints").iterdir()) == []
    server.breaks = False
    assert len(hub.resolve(f"{url}/w.pt").read_bytes()) == 100_000
    server.content["/v.pt"], server.says_length = b"x" * 1000, False
    assert len(hub.resolve(f"{url}/v.pt").read_bytes()) == 1000


def test_a_web_page_is_not_kept(server, tmp_path):
    server, url = server
    server.content["/w.pt"] = b"\n<!DOCTYPE html><html>"
    with pytest.raises(ValueError, match="it is a web page, not a file of weights"):
        hub.resolve(f"{url}/w.pt")
    assert list((tmp_path / "cache" / "checkpoints").iterdir()) == []


def test_the_page_of_a_file_means_the_file(monkeypatch):
    monkeypatch.setattr(hub, "fetch_url", lambda url: url)
    assert (
        hub.resolve("https://huggingface.co/a/b/blob/main/c/w.pt") == "https://huggingface.co/a/b/resolve/main/c/w.pt"
    )
    assert hub.resolve("https://example.org/a/b/blob/w.pt") == "https://example.org/a/b/blob/w.pt"


def test_a_cache_that_cannot_be_written_is_named_before_the_download(server, tmp_path, monkeypatch):
    server, url = server
    (tmp_path / "file").touch()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "file" / "hub"))
    with pytest.raises(
        ValueError, match=f"{tmp_path}/file/hub/checkpoints, where downloads are kept, cannot be written"
    ):
        hub.resolve(f"{url}/w.pt")
    assert server.calls == []


def test_a_missing_inception_says_how_to_bring_it(server, monkeypatch, tmp_path):
    from torch_fidelity import feature_extractor_inceptionv3

    server, url = server
    server.content["/inception.pth"] = b"x"
    monkeypatch.setattr(feature_extractor_inceptionv3, "URL_INCEPTION_V3", f"{url}/inception.pth")
    for offline, problem in ((True, "HF_HUB_OFFLINE is set"), (False, "its SHA-256 is")):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        with pytest.raises(ValueError, match=f"{url}/inception.pth .or give a copy by --inception-weights.*{problem}"):
            features.load_inception(None, "cpu")
    assert server.calls == ["/inception.pth"] and list((tmp_path / "cache" / "checkpoints").iterdir()) == []
