"""Admission to a run: its tokens, and the etcd users behind them.

Each token belongs to an etcd user that may read one key until the token expires. The key holds the name and password of
a second user, the *member*, which may read and write the run's keys and nothing else. An expired token therefore admits
no further machines, while those that have joined with it keep training. Revoking a token deletes both users, which also
shuts out its machines.
"""

import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from ssl import PEM_cert_to_DER_cert
from typing import Self

from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.etcd.client import EtcdClient, run_prefix
from trainer.etcd.errors import EtcdError
from trainer.etcd.users import MEMBER, ROOT, Root
from trainer.files import write_text
from trainer.launch.listening import Listening, to_forward
from trainer.launch.run_directory import say
from trainer.launch.token import Token, in_words, users_of
from trainer.process import is_loopback
from trainer.protocol import PROTOCOL
from trainer.timeouts import LaunchTimeouts

JOIN_FILE = "join"  # in the run directory: the command for another machine, if there is no terminal to print it on
ROOT_PASSWORD = "ETCD_ROOT_PASSWORD"
_OPEN = "warning: this etcd requires no password: any machine that reaches it can join, with or without the command"
GUESTS = "guests/"  # <token>/<host>: which machines have joined with which token


@dataclass(frozen=True)
class Issued:
    """A token that has been created and not revoked."""

    id: str
    expires: int | None  # Unix seconds; None: it has expired, but its machines may still be members
    hosts: tuple[str, ...]  # self-reported names of the machines that have joined with it


class Admission:
    """Creates, lists and revokes the tokens of a run. A context manager.

    Args:
        template: A token of the run without id, expiry and password.
        root: A client of the run's etcd with root's rights; None: that etcd has no users.
    """

    def __init__(self, template: Token, root: Root | None) -> None:
        self._template, self._root = template, root
        self._keys = run_prefix(template.prefix, template.run_id)
        self._tokens, self._member = users_of(template.prefix, template.run_id), f"{MEMBER}{self._keys}:"

    @classmethod
    def of(cls, config: TrainingConfig, run_dir: Path | None) -> Self:
        """The admission to a run, from the files of `launch --listen` in its directory, or for an external etcd.

        Raises:
            ConfigError: The external etcd has users, and root's password is not in the environment.
        """
        # The run's etcd: the one of `launch --listen`, or an external one
        listening = Listening.read(run_dir) if run_dir else None
        if listening and config.etcd.ca != str(listening.tls.server):
            listening = None  # the run has moved to an external etcd since
        authority = b""
        if listening is None and config.etcd.ca:
            authority = PEM_cert_to_DER_cert(Path(config.etcd.ca).read_text(encoding="ascii"))
        # What all tokens of the run have in common
        template = Token(
            listening.public if listening else tuple(config.etcd.endpoints),
            config.elastic.etcd.prefix,
            config.run_id,
            PROTOCOL,
            id="",
            expires=0,
            password="",
            door=listening.door if listening else b"",
            fingerprint=listening.tls.fingerprint if listening else b"",
            authority=authority,
        )
        # Only root can create a token's users; an etcd without users has none
        password = listening.root if listening else os.environ.get(ROOT_PASSWORD, "")
        if password:
            tls = config.etcd.model_dump(include={"ca", "cert", "key"})
            prefix = config.elastic.etcd.prefix
            return cls(template, Root(config.etcd.endpoints, prefix, **tls, user=ROOT, password=password))
        if config.etcd.user or _wants_a_user(config):
            needed = "must be set in the environment: a token needs an etcd user, and only root can create one"
            raise ConfigError(ROOT_PASSWORD, "", needed)
        return cls(template, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._root:
            self._root.close()

    @property
    def is_enforced(self) -> bool:
        """Whether etcd itself rejects machines without a valid token."""
        return self._root is not None

    def create(self, ttl: int) -> Token:
        """A new token with which machines can join for `ttl` seconds."""
        fresh = replace(self._template, id=secrets.token_hex(4), expires=int(time.time()) + ttl)
        if self._root is None:
            return fresh
        self.drop_expired()
        token = replace(fresh, password=secrets.token_urlsafe(16))
        member, run = {"user": f"{self._member}{token.id}", "password": secrets.token_urlsafe(16)}, f"run:{self._keys}"
        self._root.allow(run, self._keys, below=True)
        self._root.add(member["user"], member["password"], run)
        key = admission_key(token)
        self._root.put(key, member)
        self._root.allow(token.user, f"{self._root.prefix}{key}", write=False)
        self._root.add(token.user, token.password, token.user)
        return token

    def list(self) -> list[Issued]:
        """The tokens, ordered by id."""
        if self._root is None:
            raise ConfigError("etcd.endpoints", ", ".join(self._template.endpoints), "has no users, and so no tokens")
        self.drop_expired()
        names = self._root.users()
        members = (name.removeprefix(self._member) for name in names if name.startswith(self._member))
        found: dict[str, int | None] = dict.fromkeys(members)
        found |= {token.id: token.expires for token in self._issued(names)}
        return [Issued(id, found[id], self._hosts(id)) for id in sorted(found)]

    def revoke(self, id: str) -> None:
        """Delete a token's users: it admits no more machines, and those that have joined with it are shut out.

        Raises:
            ConfigError: There is no such token.
        """
        known = [issued.id for issued in self.list()]
        if id not in known:
            raise ConfigError("token", id, f"must be one of {', '.join(known)}" if known else "there are no tokens")
        assert self._root is not None
        for token in self._issued(self._root.users()):
            if token.id == id:
                self._close(token)
        self._root.remove(f"{self._member}{id}")

    def drop_expired(self) -> None:
        """Delete the users of expired tokens; the member users of machines that have joined with them stay."""
        if self._root is None:
            return
        for token in self._issued(self._root.users()):
            if token.expires <= time.time():
                self._close(token)
                if not self._hosts(token.id):
                    self._root.remove(f"{self._member}{token.id}")

    def _close(self, token: Token) -> None:
        """Stop a token from admitting further machines."""
        assert self._root is not None
        self._root.remove(token.user)
        self._root.delete(admission_key(token))

    def _hosts(self, id: str) -> tuple[str, ...]:
        """The machines that have joined with a token."""
        assert self._root is not None
        return tuple(key.rpartition("/")[2] for key in self._root.list(f"{self._template.run_id}/{GUESTS}{id}/"))

    @contextmanager
    def dropping_expired(self, interval: float = LaunchTimeouts.expiry) -> Iterator[None]:
        """Call `drop_expired` regularly, on a thread, for the duration of the block."""
        over = threading.Event()

        def drop() -> None:
            while not over.wait(interval):
                with suppress(EtcdError):  # unreachable: try again next time
                    self.drop_expired()

        thread = threading.Thread(target=drop, name="tokens", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _issued(self, names: Iterable[str]) -> Iterator[Token]:
        """The tokens that still admit machines, without their secrets."""
        for name in names:
            id, _, expires = name.removeprefix(self._tokens).partition(":")
            if name.startswith(self._tokens) and expires.isdecimal():
                yield replace(self._template, id=id, expires=int(expires))


def admission_key(token: Token) -> str:
    """The key below `elastic.etcd.prefix` that a token's user may read. It holds the member's name and password."""
    return f".admissions/{token.run_id}/{token.id}"  # run ids never begin with a dot


def manage(action: str, config: TrainingConfig, run_dir: Path | None, id: str | None, ttl: int) -> None:
    """Perform `diloco token`: create, list or revoke. Prints the result.

    Args:
        run_dir: The run's directory, if the run was found by it; None: it was found by its etcd.
    """
    if run_dir and Listening.read(run_dir) is None and all(map(is_loopback, config.etcd.endpoints)):
        alone = "its etcd listens only on this machine: start it again with --listen ADDRESS"
        raise ConfigError("run_dir", run_dir, alone)
    with Admission.of(config, run_dir) as admission:
        if action == "create":
            print(admission.create(ttl).line, flush=True)
            if not admission.is_enforced:
                print(_OPEN, file=sys.stderr, flush=True)
            return
        issued = admission.list()
        if action == "revoke":
            admission.revoke(str(id))
            hosts = next(one.hosts for one in issued if one.id == id)
            print(f"token {id} is revoked" + (f"; {', '.join(hosts)} can no longer train" if hosts else ""), flush=True)
            return
        for one in issued:
            state = f"until {in_words(one.expires)}" if one.expires else "expired"
            print(f"{one.id}  {state:<30}  {', '.join(one.hosts) or 'not used'}", flush=True)


@contextmanager
def admitting(config: TrainingConfig, run_dir: Path, ttl: int, log: Callable[[str], None] = say) -> Iterator[None]:
    """Print how other machines join, and drop expired tokens for the duration of the block."""
    try:
        admission = Admission.of(config, run_dir)
    except ConfigError as error:
        log(f"`diloco token create` makes the token with which other machines join: {error}")
        yield
        return
    with admission:
        _announce(token := admission.create(ttl), run_dir, log, enforced=admission.is_enforced)
        if ports := to_forward(config, token.endpoints[0] if token.fingerprint else ""):
            log(f"note: {ports}")
        with admission.dropping_expired():
            yield


def _announce(token: Token, run_dir: Path, log: Callable[[str], None], *, enforced: bool) -> None:
    """Print the command with which another machine joins on a terminal, or else write it to a file of mode 0600."""
    until = f"until {in_words(token.expires)}"
    if sys.stdout.isatty():
        log(f"any machine that reaches this one can join the run with this command, {until}:\n\n{token.line}\n")
    else:
        write_text(run_dir / JOIN_FILE, token.line + "\n", private=True)
        log(f"the command with which other machines join, {until}, is in {run_dir / JOIN_FILE} (readable only by you)")
    if not enforced:
        log(_OPEN)


def _wants_a_user(config: TrainingConfig) -> bool:
    """Whether a run's etcd rejects clients without a user."""
    with EtcdClient.of(config) as client:
        try:
            client.get("run")
        except EtcdError as error:
            if error.kind in ("credentials", "permission"):
                return True
            raise
    return False
