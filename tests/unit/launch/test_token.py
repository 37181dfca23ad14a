"""The token of `diloco join`."""

import base64
import dataclasses
import io
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.errors import ConfigError
from trainer.launch import token as tokens
from trainer.launch.token import Token, decode, encode, read, require_current, seconds_of

TOKEN = Token(
    ("node.example:2379", "[fd00::1]:2379"),
    "/torchelastic",
    "mine",
    protocol=4,
    id="ab12cd34",
    expires=int(time.time()) + 3600,
    password="a secret",
    door=b"\x00\xffdoor",
    fingerprint=bytes(range(32)),
)


def test_it_is_one_line_that_is_read_back() -> None:
    assert re.fullmatch(r"diloco join diloco-[\w-]+", TOKEN.line)
    assert decode(encode(TOKEN)) == TOKEN
    assert decode(TOKEN.line) == TOKEN


@given(st.text(max_size=80), st.binary(max_size=40), st.integers(0, 2**40), st.binary(max_size=2000))
def test_any_content_is_read_back(text: str, door: bytes, expires: int, authority: bytes) -> None:
    token = dataclasses.replace(TOKEN, password=text, door=door, expires=expires, authority=authority)
    assert decode(encode(token)) == token


def test_white_space_of_a_terminal_does_not_matter() -> None:
    line = TOKEN.line
    assert decode(f"\n  {line[:50]}\n{line[50:90]} \r\n{line[90:]}\n") == TOKEN


@given(st.integers(7, 150), st.sampled_from("abcXYZ019-_"))
def test_a_typing_error_is_noticed(position: int, letter: str) -> None:
    text = encode(TOKEN)
    changed = text[:position] + letter + text[position + 1 :]
    if changed != text:
        with pytest.raises(ConfigError, match="incomplete or has a typo"):
            decode(changed)


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 60, 150])
def test_a_part_of_it_is_refused(cut: int) -> None:
    with pytest.raises(ConfigError, match="incomplete or has a typo"):
        decode(encode(TOKEN)[:-cut])


@pytest.mark.parametrize("text", ["", "diloco-", "AbCd", "diloco join", "diloco-ä", "http://host:1/"])
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"token = '…': must be the one that `diloco launch --listen` printed"):
        decode(text)


def test_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "VERSION", 9)
    text = encode(TOKEN)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="has version 9, but this release reads version 1"):
        decode(text)


def test_content_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="is malformed"):
        decode(encode(dataclasses.replace(TOKEN, run_id="../../elsewhere")))
    content = bytes([1, 0, 9, 1])
    text = base64.urlsafe_b64encode(content + tokens._checksum(content)).decode().rstrip("=")
    with pytest.raises(ConfigError, match="is malformed"):
        decode(f"diloco-{text}")


def test_neither_its_text_nor_its_errors_show_secrets() -> None:
    assert "a secret" not in repr(TOKEN) and "door" not in repr(TOKEN)
    text = encode(TOKEN)[:-1]
    with pytest.raises(ConfigError) as caught:
        decode(text)
    assert text not in str(caught.value)


def test_an_expired_one_says_when() -> None:
    require_current(TOKEN, protocol=4)
    with pytest.raises(ConfigError, match=r"expired at 2001-09-09 01:46:40 UTC \(it is 2.* on this machine\)"):
        require_current(dataclasses.replace(TOKEN, expires=1_000_000_000), protocol=4)


def test_another_protocol_is_named() -> None:
    with pytest.raises(ConfigError, match="is for protocol 4 of run mine, but this release has protocol 5: install"):
        require_current(TOKEN, protocol=5)


def test_its_user_names_run_and_expiry() -> None:
    assert TOKEN.user == f"token:/torchelastic/mine/:ab12cd34:{TOKEN.expires}"


def test_where_it_may_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "join").write_text(TOKEN.line + "\n")
    assert decode(read(None, tmp_path / "join")) == TOKEN
    monkeypatch.setattr("sys.stdin", io.StringIO(TOKEN.line + "\n"))
    assert decode(read("-", None)) == TOKEN
    monkeypatch.setenv(tokens.VARIABLE, TOKEN.line)
    assert decode(read(None, None)) == TOKEN
    with pytest.raises(ConfigError, match="by --token-file, or in JOIN_TOKEN"):  # child processes do not inherit it
        read(None, None)
    with pytest.raises(ConfigError, match=r"--token-file.*cannot be read"):
        read(None, tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"--token-file.*cannot be read"):
        read(None, tmp_path / "binary")


def test_durations() -> None:
    assert [seconds_of(text) for text in ("90s", "30m", "24h", "7d")] == [90, 1800, 86400, 604800]
    for text in ("", "0h", "24", "h", "-1h", "1.5h", "1w"):
        with pytest.raises(ConfigError, match="must be a number and a unit"):
            seconds_of(text)
