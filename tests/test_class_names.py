"""Class names go with latents and checkpoints; other data are matched to them by name, or refused."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from processes import run

import likelihood
from data.cached import ShardWriter
from data.images import ImageDataset
from data.labelled import from_dataset, labels_by_name
from data.sources import open_source
from sampling.pipeline import load_pipeline
from training import resume, setup
from utils.checkpoint import read_state
from utils.weights import load_weights

CLASSES = ["cat", "dog", "fox"]


def write(root, names, count=1):
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), 80 * len(name) % 255).save(root / name / f"{i}.png")
    return str(root)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoint of one step of training on class folders."""
    root = tmp_path_factory.mktemp("class-names")
    data = write(root / "data", CLASSES, count=2)
    result = run("train.py", *TINY, "--data-path", data, "--max-steps", 1, "--output-dir", root / "run")
    assert result.returncode == 0, result.stderr
    assert "classes cat, dog, fox" in result.stdout
    return root / "run" / "checkpoint-1"


def test_labels_by_name():
    assert labels_by_name(["dog", "fox"], CLASSES, "it").tolist() == [1, 2]
    assert labels_by_name(["fox", "cat", "dog"], CLASSES, "it").tolist() == [2, 0, 1]
    assert labels_by_name(["3", "5"], list(map(str, range(10))), "it").tolist() == [3, 5]
    numbers = ["0", "1", "2"]
    for names, known in ((CLASSES, CLASSES), (None, CLASSES), (CLASSES, None), (numbers, CLASSES), (CLASSES, numbers)):
        assert labels_by_name(names, known, "it") is None
    with pytest.raises(
        ValueError, match="it has the class 'elk', which the checkpoint does not know; .* cat, dog, fox"
    ):
        labels_by_name(["dog", "elk", "owl"], CLASSES, "it")
    with pytest.raises(ValueError, match="it has other class names"):
        labels_by_name(["crane", "dog"], ["crane", "dog", "crane"], "it")


def test_a_checkpoint_stores_the_names(trained):
    assert read_state(trained)["data"] == {"class_names": CLASSES}
    assert load_weights(trained).config["data"] == {"class_names": CLASSES}
    assert load_pipeline(trained, torch.device("cpu")).class_names == CLASSES


def labels_in_likelihood(path, pipeline, **options):
    source = open_source(str(path), **options)
    dataset = likelihood.open_examples(source, pipeline, f"--data-path {path}")
    items = [dataset[i, False] for i in range(len(dataset))]
    assert not any(item["problems"] for item in items)
    return [item["y"] for item in items], source.notes


def test_a_validation_folder_without_a_class(trained, tmp_path):
    pipeline = load_pipeline(trained, torch.device("cpu"))
    assert labels_in_likelihood(write(tmp_path / "val", ["dog", "fox"]), pipeline) == ([1, 2], [])
    with_empty = write(tmp_path / "with-empty", ["dog", "fox"])
    (tmp_path / "with-empty" / "cat").mkdir()
    assert labels_in_likelihood(with_empty, pipeline, skip_bad_images=True)[0] == [1, 2]
    with pytest.raises(ValueError, match="has the class 'elk', which the checkpoint does not know"):
        labels_in_likelihood(write(tmp_path / "other", ["dog", "elk"]), pipeline)
    pipeline.class_names = None  # an old checkpoint
    labels, notes = labels_in_likelihood(tmp_path / "val", pipeline)
    assert labels == [0, 1] and "the checkpoint does not say what the classes are called" in notes[0]


def test_a_bad_label_does_not_become_another_class():
    """Label 2 of two classes is no class, also where the checkpoint has three."""
    source = from_dataset([(Image.new("L", (8, 8)), label) for label in (0, 1, 2)], "toy")
    source.new_labels = np.array([1, 2])
    dataset = ImageDataset(source, 8, 1, 3)
    assert dataset[0, False]["y"] == 1 and "label 2 is out of range; 2 classes" in dataset[2, False]["problems"][0]


def config_of(path, **options):
    transport = {"path_type": "Linear", "prediction": "velocity"}
    model = {"hidden_size": 32, "depth": 2, "num_heads": 4}
    return setup.resolve_config(open_source(path, **options), "SiT-S/2", model, {}, transport, "none")


def test_resuming_with_other_classes_is_refused(trained, tmp_path):
    start = resume.Start(trained, read_state(trained))
    resume.check_model(config_of(write(tmp_path / "same", CLASSES)), start)
    for names, problem in (
        (["dog", "fox"], "lack 'cat'"),
        (["cat", "dog", "elk"], "the class 'elk', which the checkpoint does not know"),
        ([*CLASSES, "owl"], "the class 'owl'"),
    ):
        with pytest.raises(ValueError, match=problem) as error:
            resume.check_model(config_of(write(tmp_path / "-".join(names), names)), start)
        assert "--init-from" in str(error.value) and "\n" not in str(error.value)
    config = config_of(write(tmp_path / "again", CLASSES))
    config["data"]["class_names"] = ["fox", "cat", "dog"]
    with pytest.raises(ValueError, match="are in another order"):
        resume.check_model(config, start)
    for unknown in ({}, {"data": None}, {"data": {"class_names": None}}):  # as before names were stored
        resume.check_model(
            config, resume.Start(trained, {k: v for k, v in start.state.items() if k != "data"} | unknown)
        )


def test_a_new_run_says_which_classes_differ(trained, tmp_path):
    for names, expected in (
        (["cat", "elk", "owl"], ["class 1 is 'dog' in the weights and 'elk' in the data; 2 differ"]),
        (CLASSES, []),
    ):
        config = config_of(write(tmp_path / names[1], names))
        _, notes = setup.initial_weights(config, 0, str(trained), resume.Start())
        assert [line for line in notes if "in the data" in line] == expected


def latents_of(folder, labels, class_names=CLASSES, num_classes=3):
    """Write cached latents with these labels."""
    settings = dict(num_examples=len(labels), shard_size=8, batch_size=8, num_classes=num_classes, mirrors=True)
    settings |= dict(vae="ema", image_size=64, channels=4, latent_size=8, scale=1.0, shift=0.0)
    writer = ShardWriter(folder, settings, class_names)
    writer.prepare()
    moments = torch.rand(len(labels), 2, 2, 4, 8, 8)
    writer.write(0, {"moments": moments, "labels": torch.tensor(labels)}, [])
    writer.finish()
    return str(folder)


def test_latents_store_the_names(tmp_path):
    source = open_source(latents_of(tmp_path / "named", [0, 1, 2]))
    assert source.class_names == CLASSES
    assert json.loads((tmp_path / "named" / "manifest.json").read_text())["class_names"] == CLASSES
    assert open_source(latents_of(tmp_path / "old", [0, 1, 2], None)).class_names is None
    with pytest.raises(ValueError, match="names 3 classes and has 4"):
        open_source(latents_of(tmp_path / "more", [0, 1, 2], num_classes=4))


@pytest.mark.parametrize("label", [3, 4, -1])
def test_labels_of_latents_that_are_no_class(tmp_path, label):
    path = latents_of(tmp_path, [0, 1, label])
    with pytest.raises(ValueError, match=f"example 2 of {path}: .*3 classes have the labels 0 to 2"):
        open_source(path)


def test_latents_without_a_manifest(tmp_path):
    with pytest.raises(ValueError, match="has no manifest.json: it is no cached latents"):
        open_source(str(tmp_path), "latents")
    latents_of(tmp_path / "stopped", [0, 1])
    (tmp_path / "stopped" / "manifest.json").unlink()
    for kind in (None, "latents"):
        with pytest.raises(ValueError, match="extract_latents.py has not finished there; run it again"):
            open_source(str(tmp_path / "stopped"), kind)


def test_latents_are_matched_by_name(tmp_path):
    source = open_source(latents_of(tmp_path, [1, 0, 1], ["dog", "fox"], 2))
    space = type("Space", (), {"in_pixels": False, "scale": source.scale, "shift": source.shift})()
    parts = {"model": type("Model", (), {"num_classes": 3})(), "latent_shape": (4, 8, 8)}
    pipeline = type("Pipeline", (), {"space": space, "device": "cpu", "class_names": CLASSES} | parts)()
    dataset = likelihood.open_examples(source, pipeline, "it")
    assert [dataset[i, False]["y"] for i in range(3)] == [2, 1, 2]
