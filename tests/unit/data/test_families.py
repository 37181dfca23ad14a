"""Dataset families: where documents come from, and what is refused before anything starts."""

import errno
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trainer import data
from trainer.config import TrainingConfig
from trainer.data import DatasetFamily, families, registry, resolve
from trainer.data.hub import hub_errors
from trainer.data.text import TextDataset
from trainer.errors import ConfigError, TrainingError


def config(dataset: str, **changes: Any) -> TrainingConfig:
    values = {"model": "gpt-neo-x:test", "dataset": dataset, "tokenizer": "bytes", "device": "cpu", **changes}
    return TrainingConfig.from_flat(values)


def documents(dataset: str, **changes: Any) -> list[str]:
    family = resolve(config(dataset, **changes))
    assert isinstance(family, TextDataset)
    family.check()
    return list(family.documents(family.revision()))


def refusal(dataset: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        data.check(config(dataset, **changes))
    return str(error.value)


def test_every_family_is_found_by_its_name() -> None:
    assert {"c4", "files", "stdlib"} <= data.dataset_families().keys()
    for name, same_name in data.dataset_families().items():
        for family in same_name:
            assert family.name == name
            assert issubclass(family, DatasetFamily)


def test_a_newcomers_dataset_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "haiku.py").write_text(
        "from trainer.data.text import TextDataset\n"
        "class Haiku(TextDataset):\n"
        "    name = 'haiku'\n"
        "    def revision(self): return '1'\n"
        "    def text_size(self): return 100\n"
        "    def documents(self, revision): yield 'an old silent pond'\n"
        "FAMILY = Haiku\n"
    )
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    registry.dataset_families.cache_clear()
    try:
        assert documents("haiku") == ["an old silent pond"]
    finally:
        registry.dataset_families.cache_clear()


def test_unknown_datasets_are_refused() -> None:
    assert re.fullmatch(r"dataset = 'c5': no such dataset; there are c4, .*files, .*stdlib.*", refusal("c5"))
    assert refusal("stdlib:3.9") == "dataset = 'stdlib:3.9': takes no argument: just stdlib"


def test_a_dataset_for_another_task_is_refused() -> None:
    assert refusal("digits") == (
        "dataset = 'digits': is for image_classification and image_generation, "
        "but gpt-neo-x:test is for language_modelling"
    )


def test_stdlib_is_real_text_in_a_fixed_order() -> None:
    family: Any = resolve(config("stdlib"))
    first = list(family.documents(""))
    assert 8e6 < sum(map(len, first)) < 25e6
    assert first == list(family.documents(""))
    names = [path.name for path in family._modules]
    assert {"argparse.py", "dataclasses.py"} <= set(names)
    assert not [path for path in family._modules if {"test", "site-packages"} & set(path.parts)]
    assert family.revision() == resolve(config("stdlib")).revision()
    assert abs(family.text_size() - sum(len(text.encode()) for text in first)) < 1000


def test_stdlib_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    assert "the sources of Python's library are not in" in refusal("stdlib")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One document in each kind of file, and things that are none."""
    (tmp_path / "b.txt").write_text("größer\r\nb", encoding="utf-8", newline="")
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "a.md").write_text("# deep")
    (tmp_path / "a.PY").write_bytes(b"print(1)")
    (tmp_path / "rows.jsonl").write_text('{"text": "one", "id": 1}\n{"text": null}\n{"text": "two\\nlines"}\n')
    (tmp_path / "rows.json.gz").write_bytes(gzip.compress(b'{"text": "zipped", "other": [1]}\n'))
    (tmp_path / "list.json").write_text(json.dumps([{"text": "listed"}]))
    (tmp_path / "note.txt.gz").write_bytes(gzip.compress(b"zipped note"))
    pq.write_table(pa.table({"id": [1, 2], "text": ["p1", "p2"]}), tmp_path / "table.parquet")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "a.txt").write_text("hidden")
    return tmp_path


def test_files_of_every_kind_in_order(folder: Path) -> None:
    assert documents(f"files:{folder}") == [
        *("print(1)", "größer\r\nb", "# deep", "zipped note"),
        *("listed", "zipped", "one", "two\nlines"),
        *("p1", "p2"),
    ]


def test_a_single_file(folder: Path) -> None:
    assert documents(f"files:{folder / 'rows.jsonl'}") == ["one", "two\nlines"]


def test_a_long_text_is_cut_between_lines(tmp_path: Path) -> None:
    whole = "".join(f"line {i} of a long book\n" for i in range(20_000))
    (tmp_path / "book.txt").write_text(whole)
    pieces = documents(f"files:{tmp_path}")
    assert "".join(pieces) == whole
    assert len(pieces) == -(-len(whole) // 2**15)
    assert all(piece.endswith("\n") for piece in pieces)
    (tmp_path / "book.txt").write_text("x" * 100_000)
    assert [len(piece) for piece in documents(f"files:{tmp_path}")] == [65536, 34464]


def test_the_revision_of_files_is_their_content(folder: Path) -> None:
    def revision() -> str:
        return resolve(config(f"files:{folder}")).revision()

    first = revision()
    (folder / "b.txt").touch()
    (folder / "picture.png").unlink()
    assert revision() == first
    (folder / "b.txt").write_text("größer\n")
    assert revision() != first


def test_files_that_cannot_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal("files") == "dataset = 'files': must name a file or a folder: files:<path>"
    assert refusal("files:/no/such") == "dataset = 'files:/no/such': no such file or folder"
    assert "holds no text; looked for .txt" in refusal(f"files:{tmp_path}")
    (tmp_path / "a.png").touch()
    assert "holds no text; looked for .txt" in refusal(f"files:{tmp_path}")
    assert "is not a supported kind of file; looked for .txt" in refusal(f"files:{tmp_path / 'a.png'}")
    (tmp_path / "a.txt").touch()
    assert "holds only empty files" in refusal(f"files:{tmp_path}")
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: Path(path).name != "a.txt")
        (tmp_path / "a.txt").write_text("a")
        assert "a.txt is not readable" in refusal(f"files:{tmp_path}")
    (tmp_path / "a.jsonl").write_text('{"content": "x", "id": 1}\n')
    assert "a.jsonl has no column `text` in line 1; it has content, id" in refusal(f"files:{tmp_path}")
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    assert "a.parquet is not a complete Parquet file" in refusal(f"files:{tmp_path}")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    assert "a.parquet has no column `text`; it has body" in refusal(f"files:{tmp_path}")


def test_rows_without_text_and_torn_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(ConfigError, match=r"a.jsonl has no text in the column `text` of line 1, but a int"):
        documents(f"files:{tmp_path}")
    (tmp_path / "a.jsonl").unlink()
    for name, content, message in (
        ("a.txt.gz", gzip.compress(b"text" * 1000)[:-20], "is not a complete .gz file: Compressed file ended"),
        ("a.txt.gz", b"no gzip", "is not a complete .gz file: Not a gzipped file"),
        ("a.txt", b"GIF89\0", "is not text: it has bytes of value 0"),
        ("a.jsonl", b'{"text": "x"\n', "line 1 is not JSON: "),
    ):
        (tmp_path / name).write_bytes(content)
        assert f"{tmp_path / name}" in (said := refusal(f"files:{tmp_path / name}")) and message in said
    # Further on, it is noticed when it is read; so is every file but the first.
    for name, content, message in (
        (
            "b.txt.gz",
            gzip.compress(random.Random(1).randbytes(20_000).hex().encode())[:-20],
            "is not a complete .gz file: ",
        ),
        ("b.jsonl", b'{"text": "x"}\n{"text": \n', "line 2 is not JSON: "),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"{name} {message}"):
            documents(f"files:{tmp_path / name}")


@pytest.fixture
def c4(tmp_path: Path) -> Path:
    """The layout of allenai/c4."""
    (tmp_path / "en").mkdir()
    for number in range(3):
        rows = [
            {"text": f"shard {number} row {row}", "timestamp": "2019-04-25T12:57:54Z", "url": "u"} for row in range(4)
        ]
        packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
        (tmp_path / "en" / f"c4-train.{number:05}-of-01024.json.gz").write_bytes(packed)
        (tmp_path / "en" / f"c4-validation.{number:05}-of-00008.json.gz").write_bytes(packed)
    (tmp_path / "realnewslike").mkdir()
    return tmp_path


def test_c4_from_a_local_copy(c4: Path) -> None:
    assert documents(f"c4:{c4}") == [f"shard {number} row {row}" for number in range(3) for row in range(4)]


@pytest.mark.parametrize("name", ["v[1]", "a::b", "s3:", "*?#100% ü"])
def test_a_copy_of_a_hub_dataset_may_lie_anywhere(c4: Path, name: str) -> None:
    (c4 / name).mkdir()
    (c4 / "en").rename(c4 / name / "en")
    (c4 / "v1" / "en").mkdir(parents=True)
    (c4 / "v1" / "en" / "c4-train.00000-of-01024.json.gz").write_bytes(gzip.compress(b'{"text": "another"}'))
    assert documents(f"c4:{c4 / name}")[0] == "shard 0 row 0"


def test_a_cache_of_the_hub_that_cannot_be_written_is_named() -> None:
    problem = r"cache cannot be written .*/cache.*: set HF_HOME"
    with pytest.raises(TrainingError, match=problem), hub_errors("dataset", "c4"):
        try:
            raise PermissionError(errno.EACCES, "Permission denied", "/cache/hub")
        except PermissionError as error:
            raise OSError("cannot download") from error


def test_c4_is_streamed(c4: Path) -> None:
    """Shards beyond `max_samples` are not even opened."""
    for path in (c4 / "en").glob("*.json.gz"):
        if "00000-of" not in path.name:
            path.write_bytes(b"this is no gzip file")
    family: Any = resolve(config(f"c4:{c4}", max_samples=3))
    stream: Iterator[str] = family.documents("")
    assert [next(stream) for _ in range(3)] == [f"shard 0 row {row}" for row in range(3)]
    assert family.text_size() < 10_000


def test_the_revision_of_a_local_c4_is_its_content(c4: Path) -> None:
    def revision() -> str:
        return resolve(config(f"c4:{c4}")).revision()

    first = revision()
    shard = c4 / "en" / "c4-train.00001-of-01024.json.gz"
    shard.touch()
    assert revision() == first
    shard.write_bytes(gzip.compress(b'{"text": "changed"}\n'))
    assert revision() != first


def test_c4_needs_a_bound() -> None:
    message = refusal("c4", total_steps=1000, batch_size=512, nodes=2, sequence_length=1024)
    assert message.startswith("max_samples = -1: must be set: C4 has 364,868,892 documents (800 GB).")
    assert "1,024,000 sequences of 1024 tokens, about 2,231,013 documents" in message
    data.check(config("c4", max_samples=1000))


def test_c4_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "holds no en/c4-train.*.json.gz" in refusal(f"c4:{tmp_path}")
    assert refusal("c4:/no/such", max_samples=1) == "dataset = 'c4:/no/such': no such folder"


@pytest.mark.parametrize(
    ("failure", "expected", "message"),
    [
        ("OSError", TrainingError, "dataset c4 cannot be fetched from the hub (no route): check the network"),
        ("RepositoryNotFoundError", ConfigError, "dataset = 'c4': is not on the hub, or is private"),
        ("GatedRepoError", ConfigError, "is gated: accept its terms on the hub and set HF_TOKEN in the environment"),
        ("RevisionNotFoundError", ConfigError, "has no such revision on the hub"),
        ("HfHubHTTPError", TrainingError, "dataset c4: the hub answered with an error: no route"),
    ],
)
def test_the_hubs_errors_in_one_sentence(
    failure: str, expected: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def fail(*_: object, **__: object) -> None:
        kind: Any = getattr(errors, failure, OSError)
        error = kind.__new__(kind)  # their constructors want a whole HTTP response
        Exception.__init__(error, "no route\nsecond line")
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(expected) as error:
        resolve(config("c4", max_samples=1)).revision()
    assert message in str(error.value)
    assert "second line" not in str(error.value)


def test_c4s_bound_is_asked_for_where_its_data_is_not(tmp_path: Path) -> None:
    """On the laptop that submits, or in the step that makes the claims; a folder is looked at where it is."""
    with pytest.raises(ConfigError, match="max_samples = -1: must be set"):
        data.resolve(config("c4")).check_parameters()
    data.resolve(config("c4", max_samples=1)).check_parameters()
    data.resolve(config(f"c4:{tmp_path / 'only-there'}")).check_parameters()
