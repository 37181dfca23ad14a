"""Tokenizers: a model's own from the hub, one from a directory, a byte-level one, or one trained on the data.

All are Hugging Face fast tokenizers with an end-of-text token, which separates documents.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trainer import models
from trainer.config import TrainingConfig
from trainer.data.hub import hub_errors
from trainer.errors import ConfigError, one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

_TRAINING_CHARACTERS = 256 * 2**20  # enough for any vocabulary; takes about a minute


def resolve(config: TrainingConfig) -> str:
    """The tokenizer named by `config`, or the model's default. Raises ConfigError if there is neither."""
    spec = config.tokenizer or models.resolve(config.model).default_tokenizer
    if not spec:
        problem = f"{config.model} has no tokenizer: name one, for example bytes or bpe:4096"
        raise ConfigError("tokenizer", "", problem)
    return spec


def check(spec: str) -> None:
    """Raise ConfigError for a tokenizer that cannot exist. Does not contact the hub."""
    if spec == "bytes":
        return
    if spec == "bpe" or spec.startswith("bpe:"):
        _bpe_size(spec)
    elif _is_path(spec):
        path = Path(spec).expanduser()
        if not path.is_dir():
            raise ConfigError("tokenizer", spec, "no such directory")
        if not (path / "tokenizer_config.json").exists() and not (path / "tokenizer.json").exists():
            raise ConfigError("tokenizer", spec, "holds neither tokenizer.json nor tokenizer_config.json")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            try:
                json.loads((path / name).read_bytes() if (path / name).exists() else "{}")
            except (OSError, ValueError) as error:
                raise ConfigError("tokenizer", spec, f"its {name} cannot be read: {one_line(error)}") from None
    elif not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec):
        raise ConfigError("tokenizer", spec, "must be a Hub id, a directory, bytes or bpe:<vocabulary size>")


def load(spec: str, texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """Build or fetch the tokenizer.

    Args:
        spec: `bytes`, `bpe:<vocabulary size>`, a directory or a Hub id.
        texts: The training text, which is read if the tokenizer is trained.

    Raises:
        ConfigError: There is no such tokenizer, or it cannot be used here.
        TrainingError: The hub cannot be reached.
    """
    # Our own kinds
    if spec == "bytes":
        return _wrap(_byte_level())
    if spec.startswith("bpe:"):
        return _wrap(_trained(_bpe_size(spec), texts))
    # A directory's or the hub's
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if _is_path(spec):
        try:
            tokenizer = AutoTokenizer.from_pretrained(Path(spec).expanduser(), local_files_only=True)
        except Exception as error:  # the libraries raise many kinds of errors
            raise ConfigError("tokenizer", spec, f"cannot be loaded: {one_line(error)}") from None
    else:
        with hub_errors("tokenizer", spec, "or give a directory, bytes or bpe:<vocabulary size>"):
            tokenizer = _from_hub(spec)
    # Encoding needs a fast tokenizer, and packing needs a separator
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError("tokenizer", spec, "is a slow tokenizer: a fast one (tokenizer.json) is needed")
    if tokenizer.eos_token_id is None:
        raise ConfigError("tokenizer", spec, "has no end-of-text token, which separates documents")
    _forget_last_use(tokenizer)
    return tokenizer


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The largest token id plus one."""
    return max(tokenizer.get_vocab().values()) + 1


def encode(tokenizer: "PreTrainedTokenizerFast", texts: list[str]) -> list[np.ndarray]:
    """The tokens of each text. Nothing is added, and text that looks like a special token is treated as text."""
    if _is_bytes(tokenizer):  # the same result, a hundred times faster
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.int64) for encoding in encodings]


def token_contents(tokenizer: "PreTrainedTokenizerFast") -> list[bytes]:
    """The UTF-8 bytes of text that each token represents, by token id. Special tokens represent none.

    This is exact for byte-level tokenizers, and for SentencePiece except for the space that some prepend to a text.
    """
    decoder = json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder"))
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())}

    def content(token: str) -> bytes:
        if "ByteLevel" in decoder:
            return bytes(byte_of[character] for character in token)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.removeprefix("##").replace("▁", " ").encode()

    # Added tokens are stored as plain text, all others in the decoder's alphabet
    added = tokenizer.added_tokens_decoder
    special = set(tokenizer.all_special_ids)
    contents = [b""] * vocabulary_size(tokenizer)
    for token, number in tokenizer.get_vocab().items():
        if number in added:
            contents[number] = b"" if added[number].special or number in special else token.encode()
        elif number not in special:
            contents[number] = content(token)
    return contents


def token_bytes(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """Number of UTF-8 bytes that each token represents (see `token_contents`): int64 (vocabulary_size,)."""
    return np.array([len(content) for content in token_contents(tokenizer)], dtype=np.int64)


def _forget_last_use(tokenizer: "PreTrainedTokenizerFast") -> None:
    """Reset the settings left over from a saved tokenizer's last use, and disable those that would change the data."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    if getattr(backend.model, "dropout", None):  # of BPE merges, at random
        backend.model.dropout = None


def _from_hub(name: str) -> Any:
    """Load from the hub, or from the local cache if the hub cannot be reached."""
    from huggingface_hub import HfApi
    from transformers import AutoTokenizer

    try:
        # Try a single request first, because without a network the loaders below retry for a minute
        revision = HfApi().model_info(name).sha
    except Exception:
        try:
            return AutoTokenizer.from_pretrained(name, local_files_only=True)
        except Exception:
            pass  # not cached either: the hub's own error is more helpful
        raise
    return AutoTokenizer.from_pretrained(name, revision=revision)


def _is_path(spec: str) -> bool:
    return spec.startswith(("/", "./", "../", "~")) or spec in (".", "..") or Path(spec).exists()


def _bpe_size(spec: str) -> int:
    number = spec.removeprefix("bpe").removeprefix(":")
    # The 256 bytes and the end-of-text token are always included
    if not number.isdecimal() or not 257 <= int(number) <= 1_000_000:
        raise ConfigError("tokenizer", spec, "must be bpe:<vocabulary size>, from 257 to 1000000, for example bpe:4096")
    return int(number)


def _byte_characters() -> list[str]:
    """The characters for the 256 bytes in byte-level tokenizers (GPT-2). Visible bytes represent themselves."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = (chr(number) for number in range(256, 512))
    return [chr(byte) if byte in visible else next(hidden) for byte in range(256)]


def _is_bytes(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether this is the tokenizer of `_byte_level`."""
    return tokenizer.get_vocab() == {token: byte for byte, token in enumerate((*_byte_characters(), END_OF_TEXT))}


def _byte_level() -> "Tokenizer":
    """A tokenizer in which every byte is a token whose id is the byte's value."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE(vocab={character: byte for byte, character in enumerate(_byte_characters())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _trained(size: int, texts: Iterable[str]) -> "Tokenizer":
    """A byte-level BPE tokenizer, trained on the first 256 Mi characters. The same text gives the same tokenizer."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    def first_texts(limit: int = _TRAINING_CHARACTERS) -> Iterator[str]:
        for text in texts:
            if limit <= 0:
                return
            limit -= len(text)
            yield text

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(first_texts(), trainer)
    return tokenizer


def _wrap(tokenizer: "Tokenizer") -> "PreTrainedTokenizerFast":
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
