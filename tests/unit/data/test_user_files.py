"""A user's own files: every form of text, encoding and layout is read, counted or refused by name."""

import bz2
import gzip
import json
import lzma
import os
import re
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trainer.config import TrainingConfig
from trainer.data import resolve
from trainer.data.documents import documents as documents_of
from trainer.data.text import TextDataset
from trainer.errors import ConfigError


def config(dataset: str, **changes: Any) -> TrainingConfig:
    values = {"model": "gpt-neo-x:test", "dataset": dataset, "tokenizer": "bytes", "device": "cpu", **changes}
    return TrainingConfig.from_flat(values)


def documents(dataset: str, **changes: Any) -> list[str]:
    family = resolve(config(dataset, **changes))
    assert isinstance(family, TextDataset)
    family.check()
    return list(family.documents(family.revision()))


def written(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@given(name=st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20))
@example("v[1]")
@example("*?")
@example("a::b")
@example("100% #1")
@example("-x")
@settings(max_examples=30, deadline=None)
def test_a_path_is_a_path_whatever_its_letters(name: str) -> None:
    """Libraries take some for a pattern or a URL, and then read the data of a neighbour."""
    if name in (".", "..") or name.startswith(".") or len(name.encode()) > 200:
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, name)
        for ending, content in (("jsonl", b'{"text": "own"}\n'), ("csv", b"text\nown\n"), ("txt", b"own")):
            written(folder / f"{name[:40]}.{ending}", content)
        written(Path(temporary, "v1", "other.jsonl"), b'{"text": "another\'s"}\n')
        assert documents(f"files:{folder}") == ["own", "own", "own"]


ROW = b'{"text": "na\xc3\xafve"}\n'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl.gz", gzip.compress(ROW, mtime=0), ["naïve"]),
        ("a.jsonl.bz2", bz2.compress(ROW), ["naïve"]),
        ("a.jsonl.xz", lzma.compress(ROW), ["naïve"]),
        ("a.jsonl.zst", pa.compress(ROW, "zstd", asbytes=True), ["naïve"]),
        ("A.JSONL", ROW, ["naïve"]),
        ("a.jsonl", b"\xef\xbb\xbf" + ROW + b"\r\n\n" + ROW, ["naïve", "naïve"]),
        ("a.json", b'[{"text": "one"},\n {"text": "two"}]', ["one", "two"]),
        ("a.json", b'{\n "text": "one"\n}', ["one"]),
        ("a.jsonl", b'{"text": "one", "score": NaN}\n', ["one"]),
        ("a.csv", b'id,text\r\n1,"two\r\nlines, ""quoted"""\r\n', ['two\r\nlines, "quoted"']),
        ("a.csv", b"\xef\xbb\xbftext\nmarked\n", ["marked"]),
        ("a.tsv", b"id\ttext\n1\tone, two\n", ["one, two"]),
        ("a.txt", b"\xef\xbb\xbfmarked\r\n", ["marked\r\n"]),
        ("a.txt", "größer".encode("utf-16"), ["größer"]),
        ("a.txt", "größer".encode("utf-32"), ["größer"]),
        ("a.csv", "text\ngrößer\n".encode("utf-16"), ["größer"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # gzip's content has the time in it
)
def test_text_in_every_form(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    written(tmp_path / name, content)
    assert documents(f"files:{tmp_path}") == expected


@given(text=st.text(st.characters(min_codepoint=128, max_codepoint=255), min_size=1, max_size=30))
@settings(max_examples=30, deadline=None)
def test_other_encodings_are_refused_by_name_and_never_trained_on(text: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        content = f"{text} and some more".encode("latin-1")
        written(Path(temporary, "a.txt"), content)
        try:
            read = documents(f"files:{temporary}")
        except ConfigError as error:
            assert "a.txt is not UTF-8" in str(error)
        else:
            assert "".join(read).encode() == content  # it happens to be UTF-8, too


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", b"id,text\n1,Hello, world\n", "has 3 fields in line 2, more than its header"),
        ("a.csv", b"text,text\na,b\n", "has the column `text` twice"),
        ("a.csv", b'text\n"no end\n', "is not CSV: unexpected end of data"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', "line 1 has an object with the field `text` twice"),
        ("a.jsonl", b"[" * 100_000, "line 1 is JSON nested too deeply"),
        ("a.json", b"[" * 100_000, "is JSON nested too deeply"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16-le"), "line 1 is not JSON"),
        ("a.txt", b"\xff\xfeab\x00\xd8", "is not utf-16-le, as its byte-order mark says"),
        ("a.txt", "text".encode("utf-16-le"), "is not text: it has bytes of value 0"),
        ("a.arrow", b"ARROW1\0\0", "is not a complete Arrow file"),
        ("a.txt.zst", b"no zstd", "is not a complete .zst file"),
        ("a.txt.bz2", b"no bz2", "is not a complete .bz2 file"),
        ("a.txt.gz", gzip.compress(ROW, mtime=0)[:10] + b"damaged", "is not a complete .gz file"),
    ],
)
def test_text_that_would_be_lost_is_refused(tmp_path: Path, name: str, content: bytes, problem: str) -> None:
    written(tmp_path / name, content)
    with pytest.raises(ConfigError, match=f"{re.escape(name)} .*{re.escape(problem)}"):
        documents(f"files:{tmp_path}")


@given(content=st.binary(max_size=200), name=st.sampled_from(["a.txt", "a.JSONL", "a.json", "a.csv", "a.tsv"]))
@example(content=b"PAR1", name="a.parquet")
@example(content=b"ARROW1", name="a.arrow")
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_read_or_refused_by_the_files_name(content: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        written(Path(temporary, name), content)
        try:
            read = documents(f"files:{temporary}")
        except ConfigError as error:
            assert name in str(error) or "only empty files" in str(error)
        else:
            assert "\ufffd" not in "".join(read) or b"\xef\xbf\xbd" in content or b"\xfd" in content


def test_tables_of_arrow_and_of_categories_are_read(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array(["one", "two", "one", None]).dictionary_encode()})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    assert documents(f"files:{tmp_path}") == ["one", "two", "one"] * 2
    pq.write_table(pa.table({"text": [["a"], ["b"]]}), tmp_path / "c.parquet")
    assert "c.parquet has no text in the column `text`, but list<" in refused(f"files:{tmp_path}")


def refused(dataset: str) -> str:
    with pytest.raises(ConfigError) as error:
        documents(dataset)
    return str(error.value)


def test_empty_files_are_passed_over(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.txt.gz", "c.csv.gz"):
        written(tmp_path / name, gzip.compress(b""))
    for name in ("a.jsonl", "b.csv", "c.parquet", "d.txt"):
        written(tmp_path / name, b"")
    written(tmp_path / "e.txt", b"text")
    assert documents(f"files:{tmp_path}") == ["text"]
    assert notes(f"files:{tmp_path}") == ["4 of the files are empty"]


@pytest.mark.parametrize(
    ("model", "name"),
    [("gpt-neo-x:test", "b.txt"), ("gpt-neo-x:test", "b.parquet"), ("resnet18", "x/b.png"), ("wav2vec2", "b.wav")],
)
def test_a_pointer_of_git_lfs_is_no_data(tmp_path: Path, model: str, name: str) -> None:
    for other in ("a.txt", "b.txt", "y/a.png"):
        written(tmp_path / other, b"text")
    written(tmp_path / name, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ConfigError, match=f"{name} is a Git LFS pointer: run `git lfs pull` there"):
        resolve(config(f"files:{tmp_path}", model=model)).check()


def notes(dataset: str, **changes: Any) -> list[str]:
    return resolve(config(dataset, **changes)).notes()


def test_a_clone_of_a_hub_dataset_is_its_training_split_without_its_card(tmp_path: Path) -> None:
    for name in ("README.md", "dataset_infos.json", ".gitattributes", "LICENSE"):
        written(tmp_path / name, b'{"text": "about the data"}')
    for split in ("train", "validation", "test"):
        rows = pa.table({"text": [f"of {split}"]})
        (tmp_path / "data").mkdir(exist_ok=True)
        pq.write_table(rows, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    assert documents(f"files:{tmp_path}") == ["of train"]
    assert notes(f"files:{tmp_path}") == ["2 files of another split are left out of training"]


@pytest.mark.parametrize("layout", ["default/{}/0000.parquet", "en/{}-00000-of-00001.parquet", "{}.jsonl.zst"])
def test_the_training_split_of_other_layouts(tmp_path: Path, layout: str) -> None:
    written(tmp_path / "README.md", b"---\nlicense: mit\n---\n# Card")
    for split in ("train", "test"):
        path = tmp_path / layout.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.table({"text": [f"of {split}"]}), path)
        else:
            written(path, pa.compress(json.dumps({"text": f"of {split}"}).encode(), "zstd", asbytes=True))
    assert documents(f"files:{tmp_path}") == ["of train"]


def test_a_card_beside_compressed_or_plain_text_is_no_data(tmp_path: Path) -> None:
    written(tmp_path / "a" / "README.md", b"# Card")
    written(tmp_path / "a" / "part.jsonl.gz", gzip.compress(ROW))
    assert documents(f"files:{tmp_path / 'a'}") == ["naïve"]
    written(tmp_path / "b" / "README.md", b"---\nlicense: mit\n---\n# Card")
    written(tmp_path / "b" / "part.txt", b"text")
    assert documents(f"files:{tmp_path / 'b'}") == ["text"]


def test_what_datasets_keeps_of_maps_is_not_read_again(tmp_path: Path) -> None:
    from datasets import Dataset, load_from_disk

    Dataset.from_dict({"text": ["one", "two"]}).save_to_disk(tmp_path / "saved")
    load_from_disk(tmp_path / "saved").map(lambda row: {"text": row["text"].upper()})
    assert len(list((tmp_path / "saved").glob("*.arrow"))) == 2
    assert documents(f"files:{tmp_path / 'saved'}") == ["one", "two"]


def test_a_table_of_long_texts_is_read_a_few_rows_at_a_time(tmp_path: Path) -> None:
    """Whatever the number of rows in a group: a text may be a whole book."""
    texts = [f"{number:05d}" * 2000 for number in range(1000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    read = documents_of(tmp_path / "a.parquet")
    tracemalloc.start()
    try:
        assert [next(read) for _ in range(3)] == texts[:3]
        assert tracemalloc.get_traced_memory()[1] < 1000 * len(texts[0]) / 4
    finally:
        tracemalloc.stop()
    assert [*read] == texts[3:]


def test_a_readme_beside_plain_text_is_text(tmp_path: Path) -> None:
    written(tmp_path / "README.md", b"# Title")
    written(tmp_path / "test_notes.txt", b"notes")
    written(tmp_path / "train.txt", b"trains")
    assert documents(f"files:{tmp_path}") == ["# Title", "notes", "trains"]


def test_what_datasets_saves_to_disk_is_read(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": ["one", "two"], "id": [1, 2]})
    rows.save_to_disk(tmp_path / "single")
    assert documents(f"files:{tmp_path / 'single'}") == ["one", "two"]
    DatasetDict({"train": rows, "test": Dataset.from_dict({"text": ["three"]})}).save_to_disk(tmp_path / "both")
    assert documents(f"files:{tmp_path / 'both'}") == ["one", "two"]
    assert notes(f"files:{tmp_path / 'both'}") == ["1 file of another split is left out of training beside train/"]


def test_what_is_passed_over_is_counted(tmp_path: Path) -> None:
    for name in ("a.docx", "b.docx", "c.bin", "d.txt"):
        written(tmp_path / "in" / name, b"text")
    assert notes(f"files:{tmp_path / 'in'}") == ["passed over 3 files: .docx 2, .bin 1"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    written(tmp_path / "elsewhere" / "a.txt", b"linked")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "up").symlink_to(tmp_path)
    (tmp_path / "in" / "broken.txt").symlink_to(tmp_path / "nowhere")
    assert documents(f"files:{tmp_path / 'in'}") == ["linked"]


def test_a_cache_that_cannot_be_written_is_not_needed(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", ROW)
    pq.write_table(pa.table({"text": ["table"]}), tmp_path / "b.parquet")
    program = (
        "import sys; from trainer.config import TrainingConfig; from trainer.data import resolve;"
        "dataset = resolve(TrainingConfig.from_flat({'dataset': 'files:' + sys.argv[1], 'tokenizer': 'bytes'}));"
        "dataset.check(); print(list(dataset.documents('')))"
    )
    environment = {**os.environ, "HF_HOME": "/proc/nowhere", "HOME": "/proc/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "['naïve', 'table']\n"
