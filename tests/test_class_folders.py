"""Folders as people have them: what is a class, what is a split, and what is passed over.

| folder | read as |
|---|---|
| class folders, with images in them or deeper; links are followed | classes, in their names' order |
| splits of class folders, by any of the words that `datasets` knows | --split, or the training split |
| images beside a metadata.csv, .jsonl or .parquet of `datasets`' imagefolder | the labels of its column --label-key |
| hidden folders and those of systems, AppleDouble files, and files that PIL does not read | passed over, with a line |
| a split among classes, one folder too high, images beside annotations | refused without --num-classes |
| images without class folders | refused, with what to do |
"""

import json
import zipfile

import pytest
import torch
from PIL import Image

from data.archives import FolderFiles
from data.folders import image_suffixes, split_of
from data.images import ImageDataset
from data.sources import open_source, recognise_format


def write(root, *names, **options):
    """Write a small image under each of the names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if name.lower().endswith(image_suffixes()):
            Image.new("RGB", (12, 12), (200, 30, 30)).save(root / name, **options)
        else:
            (root / name).write_text("text")
    return str(root)


def two_classes(*splits):
    return [f"{split}/{name}/0.png" for split in splits for name in ("cat", "dog")]


def opened(path, **options):
    source = open_source(path, **options)
    return source.num_examples, source.class_names


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints", ".cache", ".git", ".Trash-0", "__MACOSX", "@eaDir", "lost+found"]
)
def test_hidden_and_metadata_folders_are_no_classes(tmp_path, name):
    path = write(tmp_path, *two_classes(".", name))
    write(tmp_path, f"cat/{name}/1.png", "cat/._0.png", "cat/.DS_Store", "cat/Thumbs.db")
    assert opened(path) == (2, ["cat", "dog"])
    lines = "; ".join(open_source(path).notes)
    assert f"4 hidden files and folders (first: {tmp_path}/cat/" in lines and "(.db 1; first:" in lines
    (tmp_path / ".empty").mkdir()
    assert opened(path, skip_bad_images=True) == (2, ["cat", "dog"])


@pytest.mark.parametrize(
    "splits, passed",
    [
        (["train", "val"], "val"),
        (["training", "testing"], "testing"),
        (["Train", "Test"], "Test"),
        (["train2017", "val2017"], "val2017"),
        (["my-train", "my-dev", "my-eval"], "my-dev, my-eval"),
        (["train", ".cache", "__MACOSX", "valid"], "valid"),
    ],
)
def test_the_training_split_is_read_by_any_word_for_it(tmp_path, splits, passed):
    path = write(tmp_path, *two_classes(*splits), f"{splits[-1]}/fox/0.png")
    assert opened(path) == (2, ["cat", "dog"])
    assert open_source(path).notes[0].endswith(f"passed over: {passed}")


@pytest.mark.parametrize("word", ["val", "valid", "validation", "dev", "VAL", "val2017"])
def test_a_split_is_found_by_another_word(tmp_path, word):
    path = write(tmp_path, *two_classes("train", "val2017", "test"), "val2017/fox/0.png")
    assert opened(path, split=word) == (3, ["cat", "dog", "fox"])
    assert opened(path, split="testing") == (2, ["cat", "dog"])
    write(tmp_path, *two_classes("val_small"))
    if word != "val2017":
        assert "several splits fit" in problem(path, split=word)
        write(tmp_path, *two_classes("dev"), "dev/elk/0.png")  # the word alone goes before names with more in them
        assert opened(path, split=word) == (3, ["cat", "dog", "elk"])


def test_names_of_splits_in_names_of_classes(tmp_path):
    assert [split_of(name) for name in ("trainer", "latest", "restrain", "evaluate", "trainA")] == [None] * 5
    path = write(tmp_path / "flat", "train/0.png", "test_tube/0.png", "cat/0.png")  # CIFAR-100 has a class `train`
    assert opened(path) == (3, ["cat", "test_tube", "train"])
    path = write(tmp_path / "deep", "n01/images/0.png", "n02/images/0.png")
    assert opened(path) == (2, ["n01", "n02"])
    many = [*"abcdefgh", "train", "test", "dev"]
    path = write(tmp_path / "many", *(f"{name}/0.png" for name in many))
    source = open_source(path)
    assert source.resolve_classes() == 11 and len(source.class_names) == 11
    assert source.resolve_classes(2, skip_bad=True) == 2 and source.class_names == ["a", "b"]
    path = write(tmp_path / "vehicles", *two_classes("train"), "bus/0.png", "car/0.png")
    assert "give --num-classes 3" in problem(path)  # a class `train` of two kinds, or a split among other folders
    assert open_source(path).resolve_classes(3) == 3 and opened(path) == (4, ["bus", "car", "train"])
    assert "lies among other folders" in problem(path, split="train")


def problem(path, **options):
    with pytest.raises(ValueError) as error:
        open_source(path, **options).resolve_classes(options.pop("num_classes", None))
    assert "\n" not in str(error.value) and path in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "files, likely",
    [
        (two_classes("train", "val", "annotations"), "train"),
        (two_classes("Test", "annotations"), "Test"),
        (two_classes("test", "trainval"), "trainval"),
        (two_classes("data/train", "data/val"), "data/train"),  # ILSVRC/Data/CLS-LOC/train
        (two_classes("a/b/train", "a/b/val"), "a/b/train"),
        (two_classes("train/images", "val/images"), "train/images"),
        (two_classes("first/train", "first/val", "second/train", "second/val"), "first/train"),
        (two_classes("data"), "data"),
        (["cat/train/0.png", "cat/val/0.png", "dog/train/0.png"], "cat/train"),
    ],
)
def test_the_likely_path_is_said(tmp_path, files, likely):
    path = write(tmp_path, *files)
    assert f"give --data-path {tmp_path / likely}" in problem(path) + ";"
    assert problem(path).endswith(likely) or f"{likely};" in problem(path)


def test_one_class_of_many_folders_is_accepted_if_its_number_is_given(tmp_path):
    path = write(tmp_path, "images/00000/0.png", "images/00001/0.png")  # as FFHQ is stored
    assert "holds folders and no images itself" in problem(path) and "give --num-classes 1" in problem(path)
    assert open_source(path).resolve_classes(1) == 1
    path = write(tmp_path / "val", "images/0.png", "val_annotations.txt")  # as tiny-imagenet's
    assert "'images', and val_annotations.txt may hold their labels" in problem(path)
    assert open_source(path).resolve_classes(1) == 1
    (tmp_path / "val" / "val_annotations.txt").unlink()
    assert open_source(path).resolve_classes() == 1


@pytest.mark.parametrize(
    "files, words",
    [
        (["train/cat.0.png", "test1/0.png"], "the folders test1, train have names of splits"),  # Kaggle's cats and dogs
        (["train2017/0.png", "val2017/0.png", "test2017/0.png", "more/0.png"], "have names of splits"),  # COCO
        (["cars_train/0.png"], "the folders cars_train have names of splits"),
        (["images/0.png", "annotations/masks/0.png"], "'images' lies beside annotations"),  # Oxford's pets
        (["JPEGImages/0.png", "SegmentationClass/0.png"], "'JPEGImages' lies beside SegmentationClass"),
    ],
)
def test_folders_of_other_kinds_are_no_classes(tmp_path, files, words):
    path = write(tmp_path, *files)
    number = len({file.split("/")[0] for file in files})
    assert words in problem(path) and f"give --num-classes {number}" in problem(path)
    assert open_source(path).resolve_classes(number) == number
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for file in [*files, "notes.txt"]:
            archive.writestr(f"top/{file}", b"")
    path = str(tmp_path / "all.zip")
    assert words in problem(path) and open_source(path).resolve_classes(number) == number
    assert open_source(path).notes == [f"passed over: 1 files that are no images (.txt 1; first: {path}/top/notes.txt)"]


def test_labels_of_dataset_json_are_not_replaced_by_folders(tmp_path):
    for name in ("train", "val"):
        write(tmp_path / "splits" / name, "00000/0.png", "00001/0.png")
        write(tmp_path / "sizes" / f"{name}64", "00000/0.png", "00001/0.png")
    for folder in (tmp_path / "splits" / "train", tmp_path / "sizes" / "train64"):
        (folder / "dataset.json").write_text('{"labels": [["00000/0.png", 3], ["00001/0.png", 1]]}')
        assert f"give --data-path {folder};" in problem(str(folder.parent))
        assert open_source(str(folder)).labels.tolist() == [3, 1]


def test_images_without_class_folders(tmp_path):
    assert "2 images and no class folders; put those of a class" in problem(write(tmp_path / "a", "0.png", "1.gif"))
    assert "no class folders; put" in problem(write(tmp_path / "b", "train/0.png", "test/0.png"))
    assert "no class folders; put" in problem(write(tmp_path / "c", "train/0.png"))
    assert "no split 'train'; --split takes one of test, val" in problem(
        write(tmp_path / "d", *two_classes("val", "test"))
    )
    path = write(tmp_path / "imagenet", *two_classes("train"), "test/0.png", "val/0.png")
    assert opened(path) == (2, ["cat", "dog"])
    assert "no class folders; put" in problem(path, split="val")


def test_links_are_followed_and_broken_ones_named(tmp_path):
    path = write(tmp_path / "data", *two_classes("."))
    write(tmp_path / "elsewhere", "0.png", "1.png")
    (tmp_path / "data" / "elk").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "elk" / "back").symlink_to(tmp_path / "data" / "elk")
    assert opened(path) == (4, ["cat", "dog", "elk"])
    (tmp_path / "data" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    assert opened(path) == (6, ["cat", "dog", "elk"])
    (tmp_path / "data" / "cat" / "more").unlink()
    assert any("1 links to a folder that they lie in" in line for line in open_source(path).notes)
    (tmp_path / "data" / "ant").symlink_to(tmp_path / "nowhere")
    assert "ant, a link to what does not exist" in problem(path)
    source = open_source(path, skip_bad_images=True)
    assert source.num_examples == 4 and "ant, a link" in source.left_out[0]


def test_links_in_a_circle_end(tmp_path):
    """A class holds a link to the folder of all classes: the images of others are not taken for its own."""
    path = write(tmp_path / "data", *two_classes("."))
    write(tmp_path / "elsewhere", "0.png", "1.png")
    (tmp_path / "data" / "elk").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "all").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "cat" / "all").symlink_to(tmp_path)
    assert opened(path) == (4, ["cat", "dog", "elk"])
    assert "2 links to a folder that they lie in" in open_source(path).notes[0]
    assert len(FolderFiles(path).names) == 4


def test_files_that_are_no_images_are_counted(tmp_path):
    path = write(tmp_path, *two_classes("."), *(f"cat/{i}.txt" for i in range(3)), "cat/a.NPY", "README", "stray.png")
    notes = open_source(path).notes
    assert notes[0].startswith("passed over: 5 files that are no images (.txt 3, .npy 1, without suffix 1; first: ")
    assert notes[1] == f"passed over: 1 images in no class folder (first: {tmp_path}/stray.png)"


def test_every_kind_of_image_is_read(tmp_path):
    kinds = ["png", "JPG", "jpeg", "jfif", "gif", "bmp", "tif", "TIFF", "webp", "ppm", "jp2", "tga", "ico"]
    kinds += ["avif"] if ".avif" in image_suffixes() else []  # not of the oldest Pillow
    options = {"jfif": {"format": "JPEG"}, "ico": {"sizes": [(12, 12)]}}
    for kind in kinds:
        write(tmp_path, f"a/{kind}.{kind}", **options.get(kind, {}))
    dataset = ImageDataset(open_source(str(tmp_path)), 8, 3)
    items = [dataset[i, False] for i in range(len(dataset))]
    assert len(items) == len(kinds) and not any(item["problems"] for item in items)
    red = torch.tensor([200, 30, 30]).reshape(3, 1, 1) / 127.5 - 1
    for item in items:
        torch.testing.assert_close(item["images"], red.expand(3, 8, 8), atol=0.1, rtol=0)
    assert not {".pdf", ".eps", ".h5", ".mpg", ".txt", ".npy"} & set(image_suffixes())


def metadata(folder, kind, rows):
    """Write a metadata file of `datasets`' imagefolder."""
    import pyarrow
    import pyarrow.csv
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(rows)
    path = folder / f"metadata.{kind}"
    if kind == "jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        {"csv": pyarrow.csv.write_csv, "parquet": pyarrow.parquet.write_table}[kind](table, path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("names", [["dog", "cat", "dog"], [1, 0, 1]])
def test_a_metadata_file_labels_the_images(tmp_path, kind, names):
    path = write(tmp_path, *(f"{i}.png" for i in range(4)))
    metadata(tmp_path, kind, [{"file_name": f"{i}.png", "label": name} for i, name in enumerate(names)])
    assert recognise_format(path) == "imagefolder"
    source = open_source(path)
    assert source.labels.tolist() == [1, 0, 1] and source.num_classes == 2
    assert source.class_names == (["cat", "dog"] if isinstance(names[0], str) else None)
    assert ImageDataset(source, 8, 3)[0, False]["problems"] == [] and source.name(2) == f"{path}/2.png"
    assert f"metadata.{kind} does not name (first: {path}/3.png)" in source.notes[-1] and len(source.notes) == 1
    assert "--label-key 'y'" in problem(path, label_key="y") and "file_name, label" in problem(path, label_key="y")
    (tmp_path / "1.png").unlink()
    assert f"names 1 files that are missing, the first {path}/1.png" in problem(path)


def test_metadata_files_in_splits(tmp_path):
    for folder in ("each", "root"):
        write(tmp_path / folder, *(f"{split}/{i}.png" for split in ("train", "test") for i in range(2)))
    for split, label in (("train", "dog"), ("test", "cat")):
        metadata(tmp_path / "each" / split, "csv", [{"file_name": f"{i}.png", "label": label} for i in range(2)])
    rows = [{"file_name": f"{split}/{i}.png", "label": f"{split} {i}"} for split in ("test", "train") for i in range(2)]
    metadata(tmp_path / "root", "jsonl", rows)
    each, root = str(tmp_path / "each"), str(tmp_path / "root")
    assert opened(each) == (2, ["dog"]) and opened(each, split="test") == (2, ["cat"])
    names = ["test 0", "test 1", "train 0", "train 1"]
    assert opened(root) == (2, names) and open_source(root).labels.tolist() == [2, 3]
    assert open_source(root, split="eval").labels.tolist() == [0, 1]


def test_class_folders_beside_a_metadata_file_stay_classes(tmp_path):
    path = write(tmp_path, *two_classes("."))
    metadata(tmp_path, "csv", [{"file_name": "cat/0.png", "label": 7}, {"file_name": "dog/0.png", "label": 5}])
    assert opened(path) == (2, ["cat", "dog"])
    assert "metadata.csv labels the images, too; --data-format imagefolder" in problem(path)
    assert open_source(path, "folder").resolve_classes() == open_source(path).resolve_classes(2) == 2
    assert open_source(path, label_key="caption").resolve_classes() == 2
    assert open_source(path, "imagefolder").labels.tolist() == [7, 5]
