"""Datasets of arrays, and pictures: decoded once, held out by content, varied by their position alone."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer import data
from trainer.config import TrainingConfig
from trainer.data.arrays import ArraySplit, ArrayWriter
from trainer.data.images import augment, decode
from trainer.data.manifest import ArrayManifest, Augmentation, Column
from trainer.errors import ConfigError
from trainer.volume import Volume

QUIET: Callable[[str], None] = lambda line: None  # noqa: E731


def config(dataset: str, **values: Any) -> TrainingConfig:
    base = {"model": "resnet18:test", "dataset": dataset, "validation_fraction": 0.2, "device": "cpu"}
    return TrainingConfig.from_flat({**base, **values})


def precached(root: Path, dataset: str, **values: Any) -> data.Dataset:
    places = {"run_dir": root, "dataset_cache_dir": root / "d", "model_cache_dir": root / "m"}
    chosen = config(dataset, **{name: str(place) for name, place in places.items()}, **values)
    data.precache(chosen, Volume.of(chosen), QUIET)
    return data.open_dataset(data.directory(chosen, root / "d"))


def picture(color: tuple[int, int, int], size: tuple[int, int] = (20, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> data.Dataset:
    return precached(tmp_path_factory.mktemp("digits"), "digits", image_size=16)


def test_digits_are_all_there_and_none_is_in_both_splits(digits: data.Dataset) -> None:
    train, held_out = (split[np.arange(len(split))] for split in (digits.train, digits.validation))
    assert train["image"].shape[1:] == (16, 16, 1) and train["image"].dtype == np.uint8
    assert len(digits.train) + len(digits.validation) == 1797
    assert 0.15 < len(digits.validation) / 1797 < 0.25
    contents = {image.tobytes() for image in train["image"]}
    assert not contents & {image.tobytes() for image in held_out["image"]}
    manifest = digits.manifest
    assert isinstance(manifest, ArrayManifest)
    assert manifest.facts["label_counts"] == np.bincount(train["label"], minlength=10).tolist()
    assert manifest.for_model == {"image_size": 16, "channels": 1, "labels": list("0123456789")}


def test_augmentation_depends_on_seed_and_position_alone(digits: data.Dataset) -> None:
    order = data.SampleOrder(len(digits.train), 3)

    def images(positions: range, size: int, seed: int = 3) -> torch.Tensor:
        chosen = data.SampleOrder(len(digits.train), seed) if seed != 3 else order
        return torch.cat([batch["image"] for batch in data.batches(digits.train, chosen, positions, size)])

    whole = images(range(100, 140), 8)
    assert torch.equal(whole, images(range(100, 140), 40)), "the batch size does not matter"
    torch.manual_seed(5)
    assert torch.equal(whole[17:], images(range(117, 140), 8)), "nor where reading began, nor the process's generators"
    plain = digits.train[order.indices(np.arange(100, 140))]["image"]
    assert not np.array_equal(whole.numpy(), plain)
    epoch = len(digits.train)
    seen = [
        int(np.flatnonzero(order.indices(np.arange(k * epoch, (k + 1) * epoch)) == 7)[0]) + k * epoch for k in (0, 1)
    ]
    first, second = (images(range(place, place + 1), 1) for place in seen)
    assert not torch.equal(first, second), "the same digit is varied anew in each epoch"


def test_augmentation_without_freedom_changes_nothing() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (5, 9, 7, 3)).astype(np.uint8)
    assert np.array_equal(augment(pictures, np.arange(5), 1, Augmentation()), pictures)


def test_augmentation_mirrors_about_half() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (400, 4, 4, 1)).astype(np.uint8)
    found = augment(pictures, np.arange(400), 1, Augmentation(flip=True))
    mirrored = [np.array_equal(one, other[:, ::-1]) for one, other in zip(found, pictures, strict=True)]
    kept = [np.array_equal(one, other) for one, other in zip(found, pictures, strict=True)]
    assert all(one != other for one, other in zip(mirrored, kept, strict=True))
    assert 150 < sum(mirrored) < 250


def test_decoding_keeps_the_middle_of_the_shorter_side() -> None:
    wide = Image.new("RGB", (60, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (20, 0, 40, 20))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    found = decode(buffer.getvalue(), 10, 3)
    assert found.shape == (10, 10, 3)
    assert (found[:, 2:8] == (0, 0, 255)).all()
    assert decode(picture((10, 10, 10)), 8, 1).shape == (8, 8, 1)
    with pytest.raises(ValueError, match="its format is unknown"):
        decode(b"no picture", 8, 3)


def test_a_folder_of_each_class(tmp_path: Path) -> None:
    folder = tmp_path / "fruit"
    for label, color in (("apple", (200, 30, 30)), ("lime", (60, 200, 40))):
        (folder / label).mkdir(parents=True)
        for number in range(20):
            (folder / label / f"{number}.png").write_bytes(picture((color[0], color[1], color[2] + number)))
    (folder / "notes.txt").write_text("no picture")
    found = precached(tmp_path, f"files:{folder}", image_size=8)
    assert found.manifest.for_model["labels"] == ["apple", "lime"]
    everything = found.train[np.arange(len(found.train))]
    assert len(found.train) + len(found.validation) == 40
    assert ((everything["image"][:, 0, 0, 0] > 100) == (everything["label"] == 0)).all()

    (folder / "lime" / "3.png").write_bytes(b"torn")
    with pytest.raises(ConfigError, match=r"3\.png is not a picture"):
        precached(tmp_path, f"files:{folder}", image_size=16)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "no such folder"),
        (lambda path: path.mkdir(), "must hold a folder of pictures for each of at least two classes"),
    ],
)
def test_a_folder_that_cannot_be_is_refused_early(make: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(ConfigError, match=reason):
        data.check(config(f"files:{tmp_path / 'x'}"))


def imagenet(folder: Path, rows: int = 30) -> Path:
    """A repository laid out as `ILSVRC/imagenet-1k` is."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["tench", "goldfish"])})
    (folder / "data").mkdir(parents=True)
    for shard in range(2):
        table = {
            "image": [{"bytes": picture((shard * 100, row, 7), (30, 40)), "path": None} for row in range(rows // 2)],
            "label": [row % 2 for row in range(rows // 2)],
        }
        path = folder / "data" / f"train-{shard:05}-of-00002.parquet"
        datasets.Dataset.from_dict(table, features=features).to_parquet(path)
    return folder


def test_imagenet_from_a_folder_of_its_layout(tmp_path: Path) -> None:
    found = precached(tmp_path, f"imagenet:{imagenet(tmp_path / 'copy')}", image_size=16)
    assert found.manifest.for_model == {"image_size": 16, "channels": 3, "labels": ["tench", "goldfish"]}
    assert len(found.train) + len(found.validation) == 30
    manifest = found.manifest
    assert isinstance(manifest, ArrayManifest) and manifest.augmentation is not None and manifest.augmentation.flip
    few = precached(tmp_path, f"imagenet:{tmp_path / 'copy'}", image_size=16, max_samples=12, validation_fraction=0.4)
    assert len(few.train) + len(few.validation) == 12


def test_a_folder_that_is_no_imagenet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no data/train-\*\.parquet"):
        data.check(config(f"imagenet:{tmp_path}"))


def test_ragged_samples_are_sorted_grouped_and_padded(tmp_path: Path) -> None:
    columns = {"audio": Column(dtype="int16", ragged=True, multiple=4), "label": Column(dtype="int64")}
    lengths = [5, 3, 9, 1, 7, 2, 8]
    with ArrayWriter(tmp_path, "train", columns, group=2) as writer:
        for length in lengths:
            writer.add({"audio": np.full(length, length, dtype=np.int16), "label": np.array(length)})
        counts = writer.close()
    assert counts.samples == 6, "the one that fills no group is left out"
    manifest = ArrayManifest.model_construct(columns=columns, train=counts, augmentation=None, group=2)
    split = ArraySplit(tmp_path, "train", manifest)
    everything = split[np.arange(6)]
    assert everything["label"].tolist() == everything["audio_length"].tolist() == [2, 3, 5, 7, 8, 9]
    pair = split[np.array([3, 0])]
    assert pair["audio"].tolist() == [[7] * 7 + [0], [2, 2, 0, 0, 0, 0, 0, 0]]
    with pytest.raises(IndexError):
        split[np.array([6])]
    order = data.SampleOrder(6, 1, group=2)
    found = order.indices(np.arange(12)).reshape(6, 2)
    assert (found[:, 1] == found[:, 0] + 1).all() and (found[:, 0] % 2 == 0).all()
    assert sorted(found[:3].ravel()) == sorted(found[3:].ravel()) == list(range(6))


def test_a_sample_that_is_not_as_its_columns_say_is_refused(tmp_path: Path) -> None:
    with (
        ArrayWriter(tmp_path, "train", {"image": Column(dtype="uint8", shape=(2, 2))}) as writer,
        pytest.raises(ValueError, match="image is"),
    ):
        writer.add({"image": np.zeros((2, 3), dtype=np.uint8)})


def encoded(picture: Any, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, form, **options)
    return buffer.getvalue()


def test_a_picture_is_seen_as_a_viewer_shows_it() -> None:
    from PIL import Image

    upright = Image.fromarray(np.repeat(np.array([[0, 255], [0, 255]], np.uint8), 8, 0).repeat(8, 1))
    lying = upright.rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees clockwise
    seen = decode(encoded(lying, "JPEG", exif=exif, quality=95), 16, 1)[..., 0]
    assert seen[:, :6].max() < 30 and seen[:, -6:].min() > 225

    deep = Image.fromarray((np.linspace(0, 65535, 256).reshape(16, 16)).astype(np.uint16))
    seen = decode(encoded(deep, "PNG"), 16, 1)[..., 0]
    assert np.array_equal(seen, np.arange(256).reshape(16, 16))

    for mode, colour in (("RGBA", (255, 0, 0, 0)), ("LA", (0, 0))):  # wholly transparent
        assert decode(encoded(Image.new(mode, (16, 16), colour), "PNG"), 16, 3).min() == 255
    palette = Image.new("P", (16, 16), 0)
    palette.putpalette([255, 0, 0])
    assert decode(encoded(palette, "PNG"), 16, 3)[0, 0].tolist() == [255, 0, 0]
    assert decode(encoded(palette, "PNG", transparency=0), 16, 3)[0, 0].tolist() == [255, 255, 255]
    assert decode(encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "TIFF"), 16, 3).min() == 255


def test_a_test_split_is_not_a_class(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(3):
                (tmp_path / split / label / f"{number}.PNG").write_bytes(encoded(Image.new("L", (8, 8)), "PNG"))
                (tmp_path / split / label / f"._{number}.png").write_bytes(b"of a Mac")
    (tmp_path / "train" / "__MACOSX" / "dog").mkdir(parents=True)
    (tmp_path / "train" / "__MACOSX" / "dog" / "0.png").write_bytes(b"of a Mac")
    family: Any = data.resolve(TrainingConfig.from_flat({"model": "resnet18:test", "dataset": f"files:{tmp_path}"}))
    assert (family.labels(), family.count()) == (["cat", "dog"], 6)
    assert family.notes() == [
        "2 classes (cat, dog), 6 pictures",
        "6 files of another split are left out of training beside train/",
    ]


def test_a_training_split_alone_is_the_folder_of_the_classes(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        path = tmp_path / "train" / label / "0.JPG"
        path.parent.mkdir(parents=True)
        path.write_bytes(picture((1, 2, 3), (8, 8)))
    (tmp_path / "labels.csv").write_text("0,cat")
    family: Any = data.resolve(config(f"files:{tmp_path}"))
    assert family.labels() == ["cat", "dog"]
    assert family.notes() == ["2 classes (cat, dog), 2 pictures", "passed over 1 file: .csv 1"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    for label, name in (("a", b"x\xe9.png"), ("b", b"y.png")):
        (tmp_path / label).mkdir()
        Path(tmp_path, label, os.fsdecode(name)).write_bytes(picture((1, 2, 3), (8, 8)))
    family: Any = data.resolve(config(f"files:{tmp_path}"))
    assert len(list(family.samples(family.revision()))) == 2
    (tmp_path / "b").rename(tmp_path / os.fsdecode(b"gr\xfcn"))
    with pytest.raises(ConfigError, match=r"the name of the folder .* is not text in UTF-8"):
        data.check(config(f"files:{tmp_path}"))


def test_a_strip_of_a_picture_does_not_fill_the_memory() -> None:
    from PIL import Image

    strip = Image.new("RGB", (60_000, 1), "white")
    assert decode(encoded(strip, "PNG"), 64, 3).min() == 255


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_a_picture_that_is_cut_off_is_refused(form: str) -> None:
    from PIL import Image

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    whole = encoded(noise, form)
    decode(whole, 16, 3)
    for part in (0, 5, len(whole) // 2):
        with pytest.raises(ValueError):
            decode(whole[:part], 16, 3)
