"""Directories over the bulk lane: whole or not at all, and on from where an interruption left them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.members import LOCAL
from tests.unit.transport.donors import PLAIN, donors, numbered
from trainer.errors import TrainingError
from trainer.files import sha256
from trainer.transport import files as shared
from trainer.transport.donor import Offer
from trainer.transport.fetch import TransferError
from trainer.transport.files import Files, SharedDirectories, SharedFile, fetch_files, list_files, present_bytes
from trainer.transport.transport import Transport

CONTENTS = {"train.arrow": bytes(range(256)) * 20, "tokenizer/config.json": b"{}", "READY": b""}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "PIECE_BYTES", 1000)


@pytest.fixture
def source(tmp_path: Path) -> tuple[Path, Files]:
    """A directory, and the list of its files."""
    for name, content in CONTENTS.items():
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    root = tmp_path / "source"
    return root, {name: SharedFile(len(content), sha256(root / name)) for name, content in CONTENTS.items()}


@pytest.fixture
def joiner() -> Iterator[Transport]:
    with Transport("joiner", [LOCAL], PLAIN) as transport:
        yield transport


def contents(directory: Path) -> dict[str, bytes]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in found}


def test_a_directory_arrives_from_two_at_a_time(source: tuple[Path, Files], joiner: Transport, tmp_path: Path) -> None:
    find, counted, final = SharedDirectories({"dataset": source}).find, [], tmp_path / "new" / "data"
    with donors(find, find) as endpoints:
        found = numbered(*endpoints)
        files = list_files(joiner, "dataset", found, 20)
        assert files == source[1]
        fetch_files(joiner, "dataset", found, files, final, counted.append)
    assert contents(final) == CONTENTS
    assert sum(counted) == sum(map(len, CONTENTS.values()))
    assert [path.name for path in final.parent.iterdir()] == ["data"]


def test_it_goes_on_where_it_was_interrupted(source: tuple[Path, Files], joiner: Transport, tmp_path: Path) -> None:
    asked: list[str] = []
    shelf, final = SharedDirectories({"dataset": source}), tmp_path / "data"

    def find(name: str) -> Offer | None:
        asked.append(name)
        return None if "/3000-" in name and len(asked) < 20 else shelf.find(name)

    with donors(find) as endpoints:
        found = numbered(*endpoints)
        with pytest.raises(TransferError, match="no data for 1 s"):
            fetch_files(joiner, "dataset", found, source[1], final, patience=0.6)
        assert not final.exists()
        assert present_bytes(final) == 3000
        asked[:] = [""] * 20
        fetch_files(joiner, "dataset", found, source[1], final)
    assert contents(final) == CONTENTS
    assert asked[20] == "dataset/3000-4000/train.arrow"  # what had arrived was not asked for again


def test_what_an_earlier_fetch_has_left_of_another_content_is_replaced(
    source: tuple[Path, Files], joiner: Transport, tmp_path: Path
) -> None:
    partial = tmp_path / ".data.partial"
    partial.mkdir()
    (partial / "train.arrow").write_bytes(b"x" * 700)
    (partial / "READY").write_bytes(b"too long")
    (partial / "of another version").write_bytes(b"x")
    with donors(SharedDirectories({"dataset": source}).find) as endpoints:
        fetch_files(joiner, "dataset", numbered(*endpoints), source[1], tmp_path / "data")
    assert contents(tmp_path / "data") == CONTENTS


def test_a_file_that_changes_at_its_donor_is_never_taken(
    source: tuple[Path, Files], joiner: Transport, tmp_path: Path
) -> None:
    (source[0] / "train.arrow").write_bytes(bytes(5120))
    twice = pytest.raises(TransferError, match=r"train\.arrow arrived twice with content other than announced")
    with donors(SharedDirectories({"dataset": source}).find) as endpoints, twice:
        fetch_files(joiner, "dataset", numbered(*endpoints), source[1], tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_no_file_lands_outside_and_no_other_is_served(
    source: tuple[Path, Files], joiner: Transport, tmp_path: Path
) -> None:
    shelf = SharedDirectories({"dataset": source})
    (tmp_path / "private").write_text("x")
    assert shelf.find("dataset/0-1/../private") is None
    assert shelf.find("model") is None
    with pytest.raises(TrainingError, match=r"offers a file outside the directory: \.\./evil"):
        fetch_files(joiner, "dataset", {}, {"../evil": SharedFile(1, "")}, tmp_path / "data")
