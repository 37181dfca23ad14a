"""Tokenizers, packing, and what is held out."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from trainer.config import TrainingConfig
from trainer.data import Split, registry, resolve, text, tokenizer
from trainer.errors import ConfigError, TrainingError

TEXTS = [
    "naïve café, straße, Ω≈ç√",
    "日本語のテキスト",
    "emoji \U0001f600\U0001f468‍\U0001f469",
    "tab\tnul\0end\r\n",
    "",
    "x" * 100,
]
CORPUS = [*TEXTS, *(f"def f_{i}(x):\n    return x + {i}  # größer\n" for i in range(200))]


class Memory(text.TextDataset):
    """A dataset of the documents in a list."""

    name = "memory"
    contents: ClassVar[list[str]] = []

    def revision(self) -> str:
        return hashlib.sha256(repr(self.contents).encode()).hexdigest()

    def text_size(self) -> int:
        return sum(map(len, self.contents))

    def documents(self, revision: str) -> Iterator[str]:
        return iter(self.contents)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> type[Memory]:
    monkeypatch.setitem(registry.dataset_families(), "memory", (Memory,))
    monkeypatch.setattr(Memory, "contents", CORPUS)
    return Memory


def config(**changes: Any) -> TrainingConfig:
    values = {"model": "gpt-neo-x:test", "dataset": "memory", "tokenizer": "bytes", "sequence_length": 32}
    return TrainingConfig.from_flat({**values, "validation_fraction": 0.1, "device": "cpu", **changes})


@pytest.fixture(scope="module", params=["bytes", "bpe:300"])
def some_tokenizer(request: pytest.FixtureRequest) -> Any:
    return tokenizer.load(request.param, CORPUS)


def test_tokens_round_trip_through_a_directory(some_tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    some_tokenizer.save_pretrained(tmp_path)
    again: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == len(some_tokenizer) == tokenizer.vocabulary_size(again)
    assert again.eos_token_id == some_tokenizer.eos_token_id
    for one in TEXTS:
        [tokens] = tokenizer.encode(some_tokenizer, [one])
        assert tokens.tolist() == tokenizer.encode(again, [one])[0].tolist() == again(one)["input_ids"]
        assert again.decode(tokens) == one


def test_a_byte_is_its_own_token() -> None:
    made = tokenizer.load("bytes", [])
    assert tokenizer.encode(made, ["aé\0"])[0].tolist() == [97, 195, 169, 0]
    assert (tokenizer.vocabulary_size(made), made.eos_token_id) == (257, 256)


@given(st.text(max_size=60))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_byte_counts_are_exact(some_tokenizer: Any, one: str) -> None:
    contents = tokenizer.token_contents(some_tokenizer)
    [tokens] = tokenizer.encode(some_tokenizer, [one])
    assert b"".join(contents[token] for token in tokens) == one.encode()
    assert tokenizer.token_bytes(some_tokenizer)[tokens].sum() == len(one.encode())


def test_text_that_looks_like_a_special_token_stays_text(some_tokenizer: Any) -> None:
    [tokens] = tokenizer.encode(some_tokenizer, ["a<|endoftext|>b"])
    assert some_tokenizer.eos_token_id not in tokens
    assert tokenizer.token_bytes(some_tokenizer)[tokens].sum() == len("a<|endoftext|>b")
    assert tokenizer.token_bytes(some_tokenizer)[some_tokenizer.eos_token_id] == 0


def test_sentencepiece_like_tokens_are_counted(tmp_path: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "</s>": 1, "▁": 2, "▁ab": 3, "é": 4, "<0xAB>": 5}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens(["<unk>", "</s>"])
    raw.add_tokens([AddedToken("    ", normalized=False)])
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>")
    assert tokenizer.token_bytes(made).tolist() == [0, 0, 1, 3, 2, 1, 4]


def test_the_same_text_trains_the_same_tokenizer() -> None:
    """In other processes, with other numbers of threads and other hash seeds."""
    program = (
        "import json, sys; from trainer.data import tokenizer; corpus = json.load(sys.stdin);"
        "print(tokenizer.load('bpe:400', corpus).backend_tokenizer.to_str())"
    )
    made = tokenizer.load("bpe:400", CORPUS).backend_tokenizer.to_str()
    environment = {**os.environ, "RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(CORPUS),
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert other.stdout.strip() == made
    assert len(tokenizer.load("bpe:400", CORPUS)) == 400


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bpe:100", "tokenizer = 'bpe:100': must be bpe:<vocabulary size>, from 257 to 1000000, for example bpe:4096"),
        ("bpe", "tokenizer = 'bpe': must be bpe:<vocabulary size>"),
        ("bpe:many", "must be bpe:<vocabulary size>"),
        ("./nowhere", "tokenizer = './nowhere': no such directory"),
        ("a b/c", "must be a Hub id, a directory, bytes or bpe:<vocabulary size>"),
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused_early(memory: object, spec: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(config(tokenizer=spec)).check()
    assert message in str(error.value)


def test_a_folder_without_a_tokenizer_is_refused_early(memory: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds neither tokenizer.json nor tokenizer_config.json"):
        resolve(config(tokenizer=str(tmp_path))).check()


def test_a_broken_tokenizer_is_refused(memory: object, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ConfigError, match=r"tokenizer = .*: its tokenizer.json cannot be read: "):
        resolve(config(tokenizer=str(tmp_path))).check()
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    resolve(config(tokenizer=str(tmp_path))).check()
    with pytest.raises(ConfigError, match=r"tokenizer = .*: cannot be loaded: "):
        tokenizer.load(str(tmp_path), [])


def test_a_tokenizer_from_a_directory(some_tokenizer: Any, tmp_path: Path) -> None:
    some_tokenizer.save_pretrained(tmp_path)
    assert tokenizer.load(str(tmp_path), []).get_vocab() == some_tokenizer.get_vocab()


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=tokenizer._byte_level()).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no end-of-text token"):
        tokenizer.load(str(tmp_path), [])


def test_no_network_is_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known\nand more")

    from transformers import AutoTokenizer

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(TrainingError) as error:
        tokenizer.load("EleutherAI/gpt-neox-20b", [])
    assert str(error.value) == (
        "tokenizer EleutherAI/gpt-neox-20b cannot be fetched from the hub (Name or service not known): "
        "check the network, or give a directory, bytes or bpe:<vocabulary size>"
    )


@given(
    documents=st.lists(st.lists(st.integers(0, 255), max_size=40), max_size=40),
    length=st.integers(2, 9),
    chunk=st.integers(1, 80),
    shard=st.integers(1, 300),
)
@settings(max_examples=40, deadline=None)
def test_packing_loses_the_tail_alone(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], length: int, chunk: int, shard: int
) -> None:
    directory = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_CHUNK_BYTES", chunk)
        patch.setattr(text, "_SHARD_BYTES", shard)
        sizes = np.arange(257)
        packer = text._Packer(directory, "validation", length, np.dtype(np.uint16), sizes)
        for document in documents:
            packer.add(np.array(document, dtype=np.int64), 256, len(document))
        counts = packer.close()
    stream = [token for document in documents for token in (*document, 256)]
    rows = np.array(stream[: len(stream) // length * length], dtype=np.int64).reshape(-1, length)
    split = Split(sorted(directory.glob("*.arrow")))
    assert len(split) == len(rows) == counts.sequences
    assert counts.tokens == rows.size
    assert (counts.documents, counts.bytes) == (len(documents), sum(map(len, documents)))
    if len(rows):
        order = np.random.default_rng(0).permutation(len(rows))
        assert np.array_equal(split[order]["input_ids"], rows[order])
        assert np.array_equal(split[order]["bytes"], sizes[rows[order, 1:]].sum(axis=1))


def test_content_does_not_depend_on_how_it_is_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = []
    for number, limit in enumerate((10, 64, 10**6)):
        monkeypatch.setattr(text, "_CHUNK_BYTES", limit)
        monkeypatch.setattr(text, "_SHARD_BYTES", 2 * limit)
        (tmp_path / str(number)).mkdir()
        packer = text._Packer(tmp_path / str(number), "train", 8, np.dtype(np.uint16))
        for start in range(0, 600, 30):
            packer.add(np.arange(start, start + 29), start + 29, 29)
        packer.close()
        digests.append(packer.hash.hexdigest())
    assert len(set(digests)) == 1
    assert len(list((tmp_path / "0").iterdir())) > len(list((tmp_path / "2").iterdir())) == 1


def test_arrow_files_open_with_datasets_too(memory: object, tmp_path: Path) -> None:
    from datasets import Dataset

    manifest = resolve(config()).prepare(tmp_path, "1", print)
    rows = Dataset.from_file(str(tmp_path / "validation-00000.arrow"))
    assert len(rows) == manifest.validation.sequences
    assert rows.column_names == ["input_ids", "bytes"]
    assert rows[0]["input_ids"] == Split([tmp_path / "validation-00000.arrow"])[np.array([0])]["input_ids"][0].tolist()


def test_reading_copies_nothing_but_what_is_asked_for(memory: object, tmp_path: Path) -> None:
    resolve(config()).prepare(tmp_path, "1", print)
    split = Split([tmp_path / "train-00000.arrow"])
    assert not any(column.flags.owndata for chunk in split._chunks for column in chunk.values())
    with pytest.raises(IndexError):
        split[np.array([len(split)])]
    with pytest.raises(IndexError):
        split[np.array([-1])]


def test_what_is_held_out_depends_on_content_alone(memory: type[Memory], tmp_path: Path) -> None:
    def held_out(contents: list[str], name: str) -> set[str]:
        memory.contents = contents
        (tmp_path / name).mkdir()
        resolve(config(sequence_length=2)).prepare(tmp_path / name, "1", print)
        split = Split(sorted((tmp_path / name).glob("validation-*")))
        tokens = split[np.arange(len(split))]["input_ids"].ravel()
        ends = np.flatnonzero(tokens == 256)
        return {bytes(part[part < 256].astype(np.uint8)).decode() for part in np.split(tokens, ends + 1)[:-1]}

    last = next(f"last {i}" for i in itertools.count() if text.content_hash(f"last {i}".encode()) < 0.1)
    first = held_out([*CORPUS, last], "all")  # of the last one, the end may be missing
    assert first - {last} == {one for one in CORPUS if text.content_hash(one.encode()) < 0.1}
    assert 5 < len(first) < 50
    assert first - {last} <= held_out([*reversed(CORPUS), *(f"new {i}" for i in range(50)), last], "more")


def test_manifest_counts(memory: type[Memory], tmp_path: Path) -> None:
    manifest = resolve(config(max_samples=150)).prepare(tmp_path, "rev", print)
    train = [one.encode() for one in CORPUS[:150] if text.content_hash(one.encode()) >= 0.1]
    assert manifest.train.documents == len(train)
    assert manifest.validation.documents == 150 - len(train)
    assert manifest.train.bytes == sum(map(len, train))
    assert manifest.train.tokens == (manifest.train.bytes + len(train)) // 32 * 32 == manifest.train.sequences * 32
    assert manifest.byte_counts == np.bincount(list(itertools.chain(*train)), minlength=256).tolist()
    assert manifest.for_model == {"vocabulary_size": 257, "sequence_length": 32, "eos_token_id": 256}
    assert (manifest.revision, manifest.tokenizer) == ("rev", "bytes")


def test_tokenizer_is_trained_without_the_held_out_text(
    memory: type[Memory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    load = tokenizer.load
    monkeypatch.setattr(tokenizer, "load", lambda spec, texts: load(spec, seen.extend(texts) or seen))
    resolve(config(tokenizer="bpe:300", max_samples=100)).prepare(tmp_path, "1", print)
    assert seen == [one for one in CORPUS[:100] if text.content_hash(one.encode()) >= 0.1]


def test_too_little_text_says_what_would_do(memory: type[Memory], tmp_path: Path) -> None:
    memory.contents = ["short"]
    with pytest.raises(ConfigError, match=r"dataset = 'memory': has too little text: 1 training documents do not fill"):
        resolve(config()).prepare(tmp_path, "1", print)
    memory.contents = [f"document {i} " * 10 for i in range(30)]
    with pytest.raises(ConfigError) as error:
        resolve(config(validation_fraction=1e-9)).prepare(tmp_path, "1", print)
    assert "validation_fraction = 1e-09: holds out 0 of 30 documents" in str(error.value)
    enough = float(str(error.value).split("(above ")[1].split(" ")[0]) * 1.1
    assert resolve(config(validation_fraction=enough)).prepare(tmp_path, "1", print).validation.sequences > 0


def test_half_a_surrogate_pair_is_no_obstacle(memory: type[Memory], tmp_path: Path) -> None:
    memory.contents = [*CORPUS, "\ud83d broken"]
    resolve(config()).prepare(tmp_path, "1", print)


def test_a_saved_tokenizer_keeps_nothing_of_its_last_use(tmp_path: Path) -> None:
    """Truncation, padding and dropout are saved with a tokenizer; data that it encodes next must not depend on them."""
    made = tokenizer.load("bpe:300", CORPUS)
    expected = [tokens.tolist() for tokens in tokenizer.encode(made, CORPUS)]
    used = tokenizer.load("bpe:300", CORPUS)
    used.backend_tokenizer.enable_truncation(16)
    used.backend_tokenizer.enable_padding(length=64)
    used.backend_tokenizer.model.dropout = 0.5
    used.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "tokenizer.json").read_text())
    assert kept["truncation"] and kept["padding"] and kept["model"]["dropout"]
    again = tokenizer.load(str(tmp_path), [])
    assert [tokens.tolist() for tokens in tokenizer.encode(again, CORPUS)] == expected
    again.save_pretrained(tmp_path / "precached")  # what export and evaluation load
    kept = json.loads((tmp_path / "precached" / "tokenizer.json").read_text())
    assert not kept["truncation"] and not kept["padding"] and not kept["model"]["dropout"]


@given(name=st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20))
@example("v[1]")
@example("a::b")
@example("file::x *?#100%")
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_precached_text_is_where_the_path_says_whatever_its_letters(memory: type[Memory], name: str) -> None:
    """Libraries take `::` for a chain of file systems, and write elsewhere."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, f"-{name}")
        folder.mkdir()
        manifest = resolve(config()).prepare(folder, "1", lambda line: None)
        assert list(Path(temporary).iterdir()) == [folder]
        assert len(Split(sorted(path for path in folder.iterdir() if path.name.startswith("train-")))) == (
            manifest.train.sequences
        )
        saved = tokenizer.load(str(folder / "tokenizer"), [])
        assert saved.get_vocab() == tokenizer.load("bytes", []).get_vocab()


def test_characters_that_stand_for_lost_text_are_counted(memory: type[Memory], tmp_path: Path) -> None:
    memory.contents = [*CORPUS, "\ud83d broken", "lost \ufffd before"]
    lines: list[str] = []
    resolve(config()).prepare(tmp_path, "1", lines.append)
    assert any("2 documents contain the character U+FFFD" in line for line in lines)
