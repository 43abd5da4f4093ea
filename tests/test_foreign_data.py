"""Labelled images in other projects' formats, each written here as that project writes it.

| data | labels from | read |
|---|---|---|
| EDM's, EDM2's and REPA's folder or zip: images and dataset.json | "labels" in dataset.json, never the folders | yes |
| the same without labels (null) | - | refused: training needs a class per image |
| a zip or a tar of class folders, maybe in splits | folders, sorted | yes |
| ADM's .npz: arr_0 uint8 (N, H, W, 3), arr_1; sample_ddp.py's | arr_1 | yes |
| WebDataset: a .tar or a folder of them, maybe in splits | .cls, .json, or --label-key | yes |
| any of these with names in place of numbers | names, sorted and stored with the checkpoint | yes |
| a tar of tars, compressed tars, 7z, HDF5, TFRecord, LMDB, FFCV, MATLAB, pickles, MNIST's files, tables without
  images, tensors, single images and arrays, videos, runs, models, the hub's cache | - | named for what it is |
"""

import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from data.images import ImageDataset
from data.sources import open_source, recognise_format


def png(value, size=8):
    """The bytes of an image of one grey value, in which it can be recognised."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def write_zip(path, files, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path, files):
    path.parent.mkdir(exist_ok=True, parents=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def read(source):
    """[(grey value, label)] of all images, as training reads them, after a trip to a worker process."""
    dataset = pickle.loads(pickle.dumps(ImageDataset(source, 8, source.channels)))
    items = [dataset[i, False] for i in range(len(dataset))]
    assert not any(item["problems"] for item in items)
    return [(round((item["images"].mean().item() + 1) * 127.5), item["y"]) for item in items]


def edm(labels=(2, 0, 1, 2), **more):
    """The files of a data set as EDM's dataset_tool.py writes it: folders that count images, and dataset.json."""
    names = [f"{i // 2:05d}/img{i:08d}.png" for i in range(len(labels))]
    table = {"labels": [list(pair) for pair in zip(names, labels, strict=True)]}
    files = {name: png(10 * i) for i, name in enumerate(names)}
    return files | {"dataset.json": json.dumps(table).encode()} | more


def test_edm_labels_are_those_of_dataset_json(tmp_path):
    paths = [
        write_folder(tmp_path / "edm", edm()),
        write_zip(tmp_path / "edm.zip", edm()),
        write_zip(tmp_path / "deflated.zip", edm(), zipfile.ZIP_DEFLATED),
        write_zip(tmp_path / "in-a-folder.zip", {f"images/{name}": content for name, content in edm().items()}),
    ]
    for path in paths:
        source = open_source(str(path))
        assert read(source) == [(0, 2), (10, 0), (20, 1), (30, 2)] and source.resolve_classes() == 3
        assert source.resolve_classes(1000) == 1000 and source.class_names is None


def test_edm_labels_may_be_names_or_a_dict_with_backslashes(tmp_path):
    source = open_source(str(write_folder(tmp_path / "names", edm(labels=("dog", "ant", "cat", "dog")))))
    assert [y for _, y in read(source)] == [2, 0, 1, 2] and source.class_names == ["ant", "cat", "dog"]
    table = {"labels": {f"0000{i // 2}\\img{i:08d}.png": i for i in range(4)}}
    changed = {"dataset.json": json.dumps(table).encode()}
    assert [y for _, y in read(open_source(str(write_folder(tmp_path / "dict", edm(**changed)))))] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (b'{"labels": null}', ["dataset.json", "null", "class per image"]),
        (b'{"labels": [["00000/img00000000.png", 1', ["dataset.json", "damaged"]),
        (b'{"labels": [["00000/img00000000.png"]]}', ["dataset.json", "damaged"]),
        (b'{"labels": [[0, 1]]}', ["dataset.json", "damaged"]),
        (b'{"images": []}', ["dataset.json", "--data-format folder"]),
        (b'{"labels": [["00000/img00000000.png", [0.5, 1]]]}', ["dataset.json", "[0.5, 1]"]),
        (b'{"labels": [["00000/img00000000.png", 1.5]]}', ["dataset.json", "1.5"]),
        (b'{"labels": [["00000/gone.png", 1], ["00000/img00000000.png", 1]]}', ["lists 1 files", "00000/gone.png"]),
    ],
)
def test_a_bad_dataset_json_is_named(tmp_path, table, words):
    for path in (write_folder(tmp_path / "edm", edm(**{"dataset.json": table})), tmp_path / "edm.zip"):
        if path.suffix == ".zip":
            write_zip(path, edm(**{"dataset.json": table}))
        with pytest.raises(ValueError) as error:
            open_source(str(path))
        assert all(word in str(error.value) for word in words), error.value


def test_images_without_a_label_are_named_or_left_out(tmp_path):
    path = write_folder(tmp_path / "edm", edm(**{"00009/more.png": png(99)}))
    with pytest.raises(ValueError, match=r"00009/more.png.*label is missing"):
        open_source(str(path)).resolve_classes()
    (path / "00000" / "img00000000.png").unlink()
    source = open_source(str(path), skip_bad_images=True)
    assert "img00000000.png" in source.left_out[0] and source.resolve_classes(skip_bad=True) == 3
    assert len(ImageDataset(source, 8, 3)[3, False]["problems"]) == 1


def classes(*tops):
    return {f"{top}{name}/{i}.png": png(100 * c + i) for top in tops for c, name in enumerate("ba") for i in range(2)}


def test_class_folders_in_a_zip_or_a_tar(tmp_path):
    right = [(100, 0), (101, 0), (0, 1), (1, 1)]
    hidden = {"__MACOSX/a/._0.png": b"", "a/.DS_Store": b"", "readme.txt": b""}
    for top in ("", "birds/", "data/birds/"):
        source = open_source(str(write_zip(tmp_path / "birds.zip", hidden | classes(top))))
        assert read(source) == right and source.class_names == ["a", "b"]
    dotted = {f"{name[:-5]}x.{name[-5:]}": content for name, content in classes("./birds/").items()}
    source = open_source(str(write_tar(tmp_path / "birds.tar", dotted)))
    assert sorted(read(source)) == sorted(right) and source.class_names == ["a", "b"]
    numbers = open_source(str(write_zip(tmp_path / "numbers.zip", {f"{c}/0.png": png(c) for c in (2, 10)})))
    assert read(numbers) == [(10, 0), (2, 1)]  # sorted as names, as ImageFolder does


def test_splits_in_a_zip(tmp_path):
    path = str(write_zip(tmp_path / "birds.zip", classes("birds/train/", "birds/val/")))
    assert len(read(open_source(path))) == len(read(open_source(path, split="validation"))) == 4
    with pytest.raises(ValueError, match="no split 'test'"):
        open_source(path, split="test")
    with pytest.raises(ValueError, match="'train' lies among other folders"):
        open_source(str(write_zip(tmp_path / "mixed.zip", classes("train/", "other/"))))
    for path in (write_zip(tmp_path / "flat.zip", classes("")), write_zip(tmp_path / "edm.zip", edm())):
        with pytest.raises(ValueError, match="--split val has no effect"):
            open_source(str(path), split="val")


def test_a_damaged_zip_is_named_and_so_is_a_damaged_image_in_it(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "BMP")  # without a checksum of its own
    path = write_zip(tmp_path / "birds.zip", {"a/0.bmp": buffer.getvalue(), "a/1.bmp": buffer.getvalue()})
    content = bytearray(path.read_bytes())
    content[content.index(b"a/0.bmp") + len(buffer.getvalue())] ^= 1
    path.write_bytes(content)
    problem = ImageDataset(open_source(str(path)), 8, 3)[0, False]["problems"][0]
    assert "birds.zip/a/0.bmp" in problem and "checksum" in problem
    path.write_bytes(content[:-30])
    with pytest.raises(ValueError, match="not a readable zip"):
        open_source(str(path))
    with pytest.raises(ValueError, match="no images; it needs class folders"):
        open_source(str(write_zip(tmp_path / "empty.zip", {"a.txt": b""})))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_in_adms_format(tmp_path, save):
    images = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    save(tmp_path / "adm.npz", images, np.array([1, 0, 2, 2, 0]))
    source = open_source(str(tmp_path / "adm.npz"))
    assert read(source) == [(0, 1), (1, 0), (2, 2), (3, 2), (4, 0)]
    assert source.image_size == 8 and source.channels == 3 and source.resolve_classes() == 3
    save(tmp_path / "grey.npz", images[..., :1], np.array([[b] for b in "aabba"]))
    source = open_source(str(tmp_path / "grey.npz"))
    assert source.channels == 1 and source.class_names == ["a", "b"] and read(source)[2] == (2, 1)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (dict(arr_0=np.zeros((2, 8, 8, 3), np.uint8)), "it holds arr_0; needed are"),
        (dict(mu=np.zeros(3), sigma=np.zeros(3)), "it holds mu, sigma; needed are"),
        (dict(arr_0=np.zeros((2, 3, 8, 8), np.uint8), arr_1=np.zeros(2, int)), "arr_0 is uint8"),
        (dict(arr_0=np.zeros((2, 8, 8, 3), np.float32), arr_1=np.zeros(2, int)), "arr_0 is float32"),
        (dict(arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.zeros(3, int)), "arr_1 is int64"),
        (dict(arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.eye(2)), "arr_1 is float64"),
        (dict(arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.array([1, None])), "(?i)pickle|object"),
    ],
)
def test_npz_of_other_arrays(tmp_path, arrays, words):
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(ValueError, match=words):
        open_source(str(tmp_path / "other.npz"))


def samples(labels, suffix="cls", first=0):
    """The files of WebDataset samples: an image each, and a label that is not None."""
    files = {}
    for i, label in enumerate(labels, first):
        files[f"{i:04d}.png"] = png(i)
        if label is not None:
            files[f"{i:04d}.{suffix}"] = label if isinstance(label, bytes) else str(label).encode()
    return files


def test_webdataset_tars_and_their_splits(tmp_path):
    write_tar(tmp_path / "imagenet-train-0000.tar", samples([1, b"0\n", 2]))
    write_tar(tmp_path / "imagenet-train-0001.tar", samples([2, 2], first=10))
    write_tar(tmp_path / "imagenet-validation-0000.tar", samples([0], first=20))
    right = [(0, 1), (1, 0), (2, 2), (10, 2), (11, 2)]
    assert read(open_source(str(tmp_path))) == right
    assert read(open_source(str(tmp_path), split="val")) == [(20, 0)]
    assert read(open_source(str(tmp_path / "imagenet-train-0000.tar"))) == right[:3]
    for path in (tmp_path / "shards" / "data", tmp_path / "splits" / "train"):
        write_tar(path / "00000.tar", samples([5, 4]))
        assert read(open_source(str(path.parent))) == [(0, 5), (1, 4)]


def test_webdataset_labels(tmp_path):
    def labels(name, files, **flags):
        source = open_source(str(write_tar(tmp_path / f"{name}.tar", files)), **flags)
        return [y for _, y in read(source)], source.class_names

    assert labels("names", samples(["n02", "n01", "n02"])) == ([1, 0, 1], ["n01", "n02"])
    assert labels("json", samples([b'{"label": 3, "width": 8}', b'{"label": 1}'], "json")) == ([3, 1], None)
    assert labels("key", samples([b'{"species": 1}', b'{"species": 0}'], "json"), label_key="species") == ([1, 0], None)
    assert labels("suffix", samples([1, 0], "species"), label_key="species") == ([1, 0], None)
    both = {"a.input.png": png(1), "a.target.png": png(2), "a.cls": b"0"}
    assert labels("two", both, image_key="target.png") == ([0], None)
    with pytest.raises(ValueError, match="--image-key"):
        labels("several", both)
    with pytest.raises(ValueError, match="without labels"):  # not those of .cls
        labels("other", samples([1, 0]), label_key="species")
    with pytest.raises(ValueError, match="a label and no image"):
        labels("none", samples([1, 0]), image_key="jpg")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (samples([None, None]), "without labels"),
        (samples([b"a photo", b"of a cat"], "txt"), "png, txt without labels"),
        (samples([1, b"\xff\xfe"]), "0001.cls is damaged"),
        (samples([1, b'{"label"'], "json"), "0000.json is damaged|0001.json is damaged"),
        (samples([b'{"label": 1.5}'], "json"), "1.5"),
        ({"a.png": png(1), "a.cls": b"1", "b.cls": b"1"}, "label and no image, the first b"),
        ({"n01.tar": b"", "n02.tar": b""}, "a tar of tars"),
        ({"readme.md": b""}, "no images, but md"),
    ],
)
def test_tars_that_are_no_labelled_images(tmp_path, files, words):
    with pytest.raises(ValueError, match=words):
        open_source(str(write_tar(tmp_path / "x.tar", files)))


def test_a_sample_without_a_label_and_a_damaged_tar(tmp_path):
    path = write_tar(tmp_path / "0.tar", samples([1, None, 0]))
    with pytest.raises(ValueError, match=r"0001.png: the label is missing"):
        open_source(str(path)).resolve_classes()
    other = write_tar(tmp_path / "1.tar", samples([1, 1]))
    other.write_bytes(other.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"1.tar is not a readable tar"):
        open_source(str(tmp_path))
    source = open_source(str(tmp_path), skip_bad_images=True)
    assert len(source.examples) == 3 and "1.tar" in source.left_out[0]
    write_tar(tmp_path / "0.tar", classes(""))
    source = open_source(str(tmp_path), skip_bad_images=True)
    assert source.class_names == ["a", "b"] and "1.tar" in source.left_out[0]


def test_files_of_a_tar_that_are_no_examples(tmp_path):
    path = write_tar(tmp_path / "0.tar", samples([1, 0]) | {"about.txt": b"", "licence.md": b""})
    source = open_source(str(path))
    assert source.notes == [f"passed over: 2 samples without an image (txt 1, md 1; first: {path}: about)"]
    with tarfile.open(path, "a") as archive:  # another image of the same name
        archive.addfile(archive.getmembers()[0])
    with pytest.raises(ValueError, match="0.tar holds 1 files whose name an earlier one in it has"):
        open_source(str(path))
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        with tarfile.open(write_tar(path, samples([1, 0])), "a") as archive:
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = kind, "0000.png"
            archive.addfile(link)
        with pytest.raises(ValueError, match="0.tar holds 1 links, which are not read, the first link.png"):
            open_source(str(path))
    for name in ("n01", "n02"):
        write_tar(tmp_path / "classes" / f"{name}.tar", {"0.png": png(0)})
    with pytest.raises(ValueError, match="extract each into a folder of its name"):
        open_source(str(tmp_path / "classes"))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("train.tar.gz", "a compressed tar"),
        ("train.tgz", "a compressed tar"),
        ("train.7z", "archive"),
        ("train.rar", "archive"),
        ("train.h5", "HDF5"),
        ("train.tfrecord", "TFRecord"),
        ("train.tfrecord-00000-of-01024", "TFRecord"),
        ("imagenet2012-train-00000-of-01024", "TFRecord"),
        ("data.mdb", "LMDB"),
        ("train.beton", "FFCV"),
        ("train.mat", "MATLAB"),
        ("train.pkl", "pickle"),
        ("data_batch_1", "pickle"),
        ("train-images-idx3-ubyte", "MNIST"),
        ("labels.csv", "table"),
        ("train.json", "table"),
        ("latents.pt", "tensors"),
        ("images.npy", "single array"),
        ("cat.png", "single image"),
        ("film.mp4", "video"),
        ("strange.xyz", "not known"),
    ],
)
def test_what_is_not_read_is_named(tmp_path, name, what):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=what):
        recognise_format(str(tmp_path / name))
    if what not in ("single image", "not known"):
        with pytest.raises(ValueError, match=what):
            recognise_format(str(tmp_path))


def test_folders_that_are_no_data_are_named(tmp_path):
    cases = {
        "run/checkpoint-0000010/trainer_state.json": "a run or a checkpoint of train.py",
        "checkpoint/trainer_state.json": "a run or a checkpoint of train.py",
        "datasets--user--birds/snapshots/0123/README.md": "snapshots/0123, or the name user/birds",
        "models--user--sit/snapshots/0123/model.safetensors": "--ckpt",
        "hub/datasets--user--birds/refs": "it is the hub's cache",
        "model/config.json": "a folder of a model",
        "edm2/img64.zip": "give the one file",
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.bin").touch()
    for name, words in cases.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=words):
            recognise_format(str(tmp_path / name.split("/")[0]))
    for name in ("cifar/cifar-100-python/meta", "digits/MNIST/raw/t10k-images-idx3-ubyte.gz", "lsun/church/data.mdb"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=f"in {name.split('/')[1]}: .*(pickle|MNIST|LMDB)"):
            recognise_format(str(tmp_path / name.split("/")[0]))
    for pattern in ("shards/train-{0000..0010}.tar", "/data/*.tar"):
        with pytest.raises(ValueError, match="patterns are not read; give the folder"):
            recognise_format(pattern)
    files = {f"{c}/0.png": png(0) for c in "ab"} | {"labels.csv": b"", "train.tar.gz": b""}
    assert recognise_format(str(write_folder(tmp_path / "classes", files | {"devkit.tar": b""}))) == "folder"
    splits = {f"train/{name}": content for name, content in files.items()} | {"train.tar": b"", "val/val.tar": b""}
    assert recognise_format(str(write_folder(tmp_path / "imagenet", {**splits, "val/a/0.png": b""}))) == "folder"
