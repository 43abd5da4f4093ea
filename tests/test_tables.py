"""Tables as people have them: Parquet and Arrow with columns of many types, in files named by split, through the cache.

| table | read as |
|---|---|
| images as binary, large, view, of fixed size, in a struct, or as paths | images |
| labels of any integer type, booleans, ClassLabel | classes by number, with their names if there are any |
| labels as strings of any type | classes in their sorted order; strings of integers are these |
| files with a split in their name or their folder's, in `data`, in one folder as the hub's configurations | --split |
| a file of one split that is named itself | that file |
"""

import io
import itertools
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data.images import ImageDataset
from data.sources import open_source
from data.tables import files_of


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def png(number=0):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 9, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path, images=None, labels=(0, 1, 2, 0, 1, 2), key="label"):
    """Write a table; its images are PNGs unless given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"image": [png()] * len(labels) if images is None else images, key: labels})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    return str(path)


def labels_of(source):
    """The labels that training sees, by index or from a stream in its stored order; bad examples raise."""
    if source.streamed:
        return [example()[1] for _, example in source.examples(None)]
    dataset = ImageDataset(source, 8, 3)
    items = [dataset[i, False] for i in range(len(dataset))]
    assert not any(item["problems"] for item in items)
    return [item["y"] for item in items]


def problem(path, **options):
    with pytest.raises(ValueError) as error:
        open_source(str(path), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


IMAGES = {
    "binary": pyarrow.array([png()] * 6, pyarrow.binary()),
    "large": pyarrow.array([png()] * 6, pyarrow.large_binary()),
    "view": pyarrow.array([png()] * 6, pyarrow.binary_view()),
    "fixed": pyarrow.array([png()] * 6, pyarrow.binary(len(png()))),
    "struct": pyarrow.array([{"bytes": png()}] * 6),
    "with path": pyarrow.array([{"bytes": png(), "path": "a.png"}] * 6),
}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("name", IMAGES)
def test_images_of_many_types(tmp_path, kind, name):
    path = write(tmp_path / f"{name}.{kind}", IMAGES[name])
    try:
        datasets.Features.from_arrow_schema(pyarrow.schema({"image": IMAGES[name].type}))
    except ValueError:  # the oldest `datasets` that is allowed does not know binaries of a fixed size
        assert name == "fixed" and f"cannot be read as {kind} data" in problem(path)
        return
    assert labels_of(open_source(path)) == labels_of(open_source(path, streaming=True)) == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    "labels, numbers, names",
    [
        *(
            (pyarrow.array([0, 1, 2], kind()), [0, 1, 2], None)
            for kind in (pyarrow.int8, pyarrow.uint8, pyarrow.uint64)
        ),
        (["dog", "cat", "dog"], [1, 0, 1], ["cat", "dog"]),
        (pyarrow.array(["dog", "cat", "dog"], pyarrow.large_string()), [1, 0, 1], ["cat", "dog"]),
        (pyarrow.array(["dog", "cat", "dog"], pyarrow.string_view()), [1, 0, 1], ["cat", "dog"]),
        (pyarrow.array(["dog", "cat", "dog"]).dictionary_encode(), [1, 0, 1], ["cat", "dog"]),
        (["10", "9", "0"], [10, 9, 0], None),
        (["010", "9", "0"], [1, 2, 0], ["0", "010", "9"]),
        ([True, False, True], [1, 0, 1], ["False", "True"]),
    ],
)
def test_labels_of_many_types(tmp_path, labels, numbers, names):
    source = open_source(write(tmp_path / "a.parquet", labels=labels))
    assert labels_of(source) == source.labels.tolist() == numbers and source.class_names == names
    assert source.num_classes == max(numbers) + 1


def test_labels_that_are_none(tmp_path):
    path = write(tmp_path / "float.parquet", labels=[0.0, 1.0])
    assert "--label-key 'label': labels must be integers, booleans or class names, and" in problem(path)
    assert "Value('float64')" in problem(path)
    path = write(tmp_path / "lists.parquet", labels=[[0], [1]])
    assert "labels must be integers, booleans or class names" in problem(path)
    path = write(tmp_path / "text.parquet", labels=["cat", "dog"])
    assert "a stream does not tell the class names beforehand" in problem(path, streaming=True)
    source = open_source(write(tmp_path / "missing.parquet", labels=["cat", None, "dog"]))
    assert source.labels.tolist() == [0, -1, 1]
    with pytest.raises(ValueError, match="row 1 of .*: the label is missing"):
        source.resolve_classes()


def test_names_of_a_class_label(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a"])})
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": png(), "path": None}] * 2, "label": [0, 1]}, features=features
    )
    table.to_parquet(tmp_path / "a.parquet")
    for streaming in (False, True):
        assert open_source(str(tmp_path / "a.parquet"), streaming=streaming).class_names == ["b", "a"]


LAYOUTS = {
    "hub": "{}-00000-of-00001.parquet",
    "data": "data/{}-00000-of-00001.parquet",
    "configuration": "plain_text/{}-00000-of-00001.parquet",
    "folders": "{}/x.parquet",
    "configuration with folders": "plain_text/{}/0000.parquet",
    "suffix": "my_dataset-{}.parquet",
    "number": "{}1.parquet",
    "dots": "x.{}.arrow",
}


@pytest.mark.parametrize("words", [("train", "validation", "test"), ("TRAINING", "dev", "Eval")], ids=" ".join)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_of_splits(tmp_path, layout, words):
    kind = LAYOUTS[layout].rsplit(".")[-1]
    for word in words:
        (tmp_path / LAYOUTS[layout].format(word)).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / LAYOUTS[layout].format(word)).touch()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / f"train.{kind}").touch()
    expected = zip(("train", "validation", "test"), words, strict=True)
    assert files_of(tmp_path, kind)[0] == {s: [str(tmp_path / LAYOUTS[layout].format(word))] for s, word in expected}


def test_splits_are_never_mixed(tmp_path):
    for split, count in (("train", 2), ("test", 3), ("extra", 4)):
        write(tmp_path / "a" / "data" / f"{split}-00000-of-00001.parquet", labels=range(count))
    path = str(tmp_path / "a")
    source = open_source(path)
    assert labels_of(source) == [0, 1]
    assert source.notes == ["split train; passed over: extra (1 files), test (1 files)"]
    for split, count in (("testing", 3), ("extra", 4)):
        assert labels_of(open_source(path, split=split)) == list(range(count))
    assert "no split 'val'; --split takes one of extra, test, train" in problem(path, split="val")
    (tmp_path / "a" / "data" / "train-00000-of-00001.parquet").unlink()
    assert "no split 'train'; --split takes one of extra, test" in problem(path)
    test = tmp_path / "a" / "data" / "test-00000-of-00001.parquet"
    for split in (None, "test", "evaluation"):  # asked for by its name
        assert labels_of(open_source(str(test), split=split)) == [0, 1, 2]
    assert "no split 'train'" in problem(test, split="train")


def test_a_split_that_is_not_looked_at_is_refused(tmp_path):
    write(tmp_path / "b" / "mydata.parquet")
    table = datasets.Dataset.from_dict({"image": [png()], "label": [0]})
    table.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "b" / "mydata.parquet", tmp_path / "b", tmp_path / "saved", "digits"):
        assert "--split test has no effect" in problem(path, split="test")
        assert open_source(str(path), split="train").num_examples > 0  # the default
    datasets.DatasetDict(train=table, validation=table).save_to_disk(tmp_path / "dict")
    assert open_source(str(tmp_path / "dict"), split="val").num_examples == 1
    assert "--split takes one of train, validation" in problem(tmp_path / "dict", split="test")


def test_files_in_several_folders(tmp_path):
    for name in ("one/train.parquet", "two/train.parquet"):
        write(tmp_path / "several" / name)
    assert "several data sets; give one of the folders one, two" in problem(tmp_path / "several")
    write(tmp_path / "several" / "a.parquet", labels=[0, 1])
    source = open_source(str(tmp_path / "several"))
    assert labels_of(source) == [0, 1] and "passed over: the .parquet files in" in source.notes[0]
    write(tmp_path / "several" / "data" / "b.parquet", labels=[2])  # one data set with what lies beside `data`
    assert labels_of(open_source(str(tmp_path / "several"))) == [0, 1, 2]
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    (tmp_path / "classes" / "cat" / "0.png").write_bytes(png())
    write(tmp_path / "classes" / "cat" / "features.parquet")
    assert open_source(str(tmp_path / "classes")).class_names == ["cat"]


@pytest.mark.parametrize("name", ["[D] set", "what * and ?", "{a,b}", "%20 #1"])
def test_paths_that_look_like_patterns(tmp_path, name):
    paths = [write(tmp_path / name / "a.parquet"), str(tmp_path / name)]
    write(tmp_path / "D" / "a.parquet", labels=[0])
    for path, streaming in itertools.product(paths, (False, True)):
        assert labels_of(open_source(path, streaming=streaming)) == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_file_in_place_of_another_with_its_time_stamp(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    for labels in ([0, 1], [1, 0], [0, 1, 2]):
        write(path, labels=labels)
        os.utime(path, (1.7e9, 1.7e9))
        for _ in range(2):
            assert labels_of(open_source(str(path))) == labels


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet")
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file" / "hf"))
    for streaming in (False, True):
        named = f"the cache {tmp_path / 'file' / 'hf'} cannot be written; set HF_HOME"
        assert named in problem(path, streaming=streaming)
