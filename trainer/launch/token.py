"""The token of `diloco join`: one printable line with everything that a machine needs to join a run.

    diloco-<base64url of: version (u8), fields (each a u16 length and its bytes), the first 4 bytes of their SHA-256>

It contains secrets: it appears only on the terminal that requested it, or in a file of mode 0600.
"""

import base64
import binascii
import hashlib
import os
import re
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trainer.config.fields import RUN_ID
from trainer.errors import ConfigError
from trainer.etcd.client import run_prefix

VARIABLE = "JOIN_TOKEN"  # environment variable that may hold a token
DEFAULT_TTL = 24 * 3600  # seconds
VERSION = 1
_MARK = "diloco-"
_CHECKSUM_BYTES = 4
_LONGEST = 16 << 10  # bytes; larger files cannot be a token's
_COMMAND = "diloco join "


@dataclass(frozen=True)
class Token:
    """The content of a token.

    The etcd of `launch --listen` admits only TLS clients with the key derived from `door`, and `fingerprint` pins its
    certificate. For any other etcd, `authority` is its certificate authority, if it has one.
    """

    endpoints: tuple[str, ...]  # host:port of etcd, as other machines reach it
    prefix: str  # `elastic.etcd.prefix`
    run_id: str
    protocol: int  # version of the members' protocol
    id: str  # hexadecimal; for listing and revoking
    expires: int  # Unix seconds
    password: str = field(repr=False)  # of etcd's user `user`; empty: that etcd has no users
    door: bytes = field(default=b"", repr=False)
    fingerprint: bytes = b""  # SHA-256 of etcd's certificate
    authority: bytes = b""  # DER

    @property
    def user(self) -> str:
        """The token's etcd user. Its name contains the time of expiry, so that no member can change it."""
        return f"{users_of(self.prefix, self.run_id)}{self.id}:{self.expires}"

    @property
    def line(self) -> str:
        """The command to type on another machine."""
        return _COMMAND + encode(self)


def users_of(prefix: str, run_id: str) -> str:
    """The common prefix of the user names of a run's tokens."""
    return f"token:{run_prefix(prefix, run_id)}:"


def encode(token: Token) -> str:
    """The token as one line of printable text."""
    numbers = struct.pack(">HQ", token.protocol, token.expires)
    texts = ("\n".join(token.endpoints), token.prefix, token.run_id, token.id, token.password)
    fields = [numbers, *(text.encode() for text in texts), token.door, token.fingerprint, token.authority]
    content = bytes([VERSION]) + b"".join(struct.pack(">H", len(one)) + one for one in fields)
    return _MARK + base64.urlsafe_b64encode(content + _checksum(content)).decode().rstrip("=")


def decode(text: str) -> Token:
    """Read a token, or the whole command that `launch` printed. White space is ignored.

    Raises:
        ConfigError: It is malformed or of another version. The message does not show the token.
    """
    encoded = "".join(text.partition(_MARK)[2].split())
    if not re.fullmatch(r"[\w-]+", encoded, re.ASCII):
        raise _refused(f"must be the one that `diloco launch --listen` printed; it begins with {_MARK}")
    try:
        content = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    except binascii.Error:
        content = b""
    content, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if not content or _checksum(content) != checksum:
        raise _refused("is incomplete or has a typo: copy the whole line")
    if content[0] != VERSION:
        raise _refused(f"has version {content[0]}, but this release reads version {VERSION}: install the run's release")
    try:
        numbers, endpoints, prefix, run_id, id, password, door, fingerprint, authority = _fields(content[1:])
        protocol, expires = struct.unpack(">HQ", numbers)
        if not re.fullmatch(RUN_ID, run_id.decode()):  # it names a directory
            raise ValueError
        where = tuple(endpoints.decode().split("\n")), prefix.decode(), run_id.decode()
        return Token(*where, protocol, id.decode(), expires, password.decode(), door, fingerprint, authority)
    except (ValueError, struct.error):
        raise _refused("is malformed") from None


def read(argument: str | None, file: Path | None) -> str:
    """The text of a token: the argument ("-": standard input), the file's content, or the value of `JOIN_TOKEN`.

    The variable is removed from the environment, so that child processes do not inherit it.

    Raises:
        ConfigError: There is no token, or the file cannot be read.
    """
    variable = os.environ.pop(VARIABLE, "")
    if argument == "-":
        return sys.stdin.read(_LONGEST)
    if argument:
        return argument
    if file is not None:
        try:
            with file.open(encoding="utf-8") as opened:
                return opened.read(_LONGEST)
        except (OSError, ValueError) as error:
            raise ConfigError("--token-file", file, f"cannot be read: {error}") from None
    if not variable.strip():
        raise ConfigError("token", "", f"must be given: as an argument, by --token-file, or in {VARIABLE}")
    return variable


def require_current(token: Token, protocol: int) -> None:
    """Raise ConfigError if the token has expired or is for another release."""
    if token.protocol != protocol:
        speaks = f"is for protocol {token.protocol} of run {token.run_id}, but this release has protocol {protocol}"
        raise _refused(f"{speaks}: install the run's release")
    if token.expires < time.time():
        here = f"it is {in_words(time.time())} on this machine"
        raise _refused(f"expired at {in_words(token.expires)} ({here}): create a new one there (`diloco token create`)")


def in_words(moment: float) -> str:
    """A time in readable form, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))


def seconds_of(ttl: str) -> int:
    """A duration such as 90s, 30m, 24h or 7d, in seconds. Raises ConfigError."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", ttl)
    if not found:
        raise ConfigError("--ttl", ttl, "must be a number and a unit: 30m, 24h or 7d")
    return int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def _refused(reason: str) -> ConfigError:
    return ConfigError("token", "…", reason)


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:_CHECKSUM_BYTES]


def _fields(content: bytes) -> Iterator[bytes]:
    while content:
        (length,) = struct.unpack(">H", content[:2])
        if length > len(content) - 2:
            raise ValueError
        yield content[2 : 2 + length]
        content = content[2 + length :]
