"""Who belongs to a run: a secret that is its certificate authority, or certificates of another authority."""

import datetime
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.members import LOCAL, PATIENCE, SECRET, connect, member, reduce
from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.launch import preflight
from trainer.process import connect as dial
from trainer.timeouts import TransportTimeouts
from trainer.transport.credentials import FILES, MIN_SECRET_BYTES, Credentials, credentials

SHORT = TransportTimeouts(handshake=2.0, dial_back=0.2, relay=0.5)
PEM = serialization.Encoding.PEM
Key = Ed25519PrivateKey | ec.EllipticCurvePrivateKey


class Authority:
    """A certificate authority, as cert-manager would be."""

    def __init__(self, name: str = "an authority", kind: Callable[[], Key] = Ed25519PrivateKey.generate) -> None:
        self._kind, self._key = kind, kind()
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.certificate = self._sign(self._name, self._key, authority=True)

    def _sign(self, name: x509.Name, key: Key, authority: bool = False, days: int = 1) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=2))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        return builder.sign(self._key, hashes.SHA256() if isinstance(self._key, ec.EllipticCurvePrivateKey) else None)

    def write(self, directory: Path, name: str = "worker", days: int = 1) -> str:
        """The files of a member."""
        directory.mkdir()
        key = self._kind()
        leaf = self._sign(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]), key, days=days)
        (directory / "ca.crt").write_bytes(self.certificate.public_bytes(PEM))
        (directory / "tls.crt").write_bytes(leaf.public_bytes(PEM))
        pem = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (directory / "tls.key").write_bytes(pem)
        return str(directory)


def of(directory: str, secret: bytes = SECRET) -> Credentials:
    return replace(credentials(secret, "tls", directory), loopback=True)


def refused(one: Credentials, other: Credentials) -> bool:
    """Whether neither can connect to the other."""
    with member(0, of=one, timeouts=SHORT) as here, member(1, of=other, timeouts=SHORT) as there:
        missing = here.connect({there.id: there.endpoints}, PATIENCE)
        missing |= there.connect({here.id: here.endpoints}, PATIENCE)
        return missing.keys() == {here.id, there.id}


@pytest.mark.parametrize("kind", [Ed25519PrivateKey.generate, lambda: ec.generate_private_key(ec.SECP256R1())])
def test_members_with_certificates_of_one_authority(kind: Callable[[], Key], tmp_path: Path) -> None:
    authority = Authority(kind=kind)
    with ExitStack() as stack:
        transports = [
            stack.enter_context(member(rank, of=of(authority.write(tmp_path / str(rank), f"worker {rank}"))))
            for rank in range(3)
        ]
        connect(transports)
        reduce(transports)


def test_a_certificate_of_another_authority_is_refused_even_with_the_secret(tmp_path: Path) -> None:
    ours, theirs = Authority(), Authority()  # of the same name
    assert refused(of(ours.write(tmp_path / "ours")), of(theirs.write(tmp_path / "theirs")))
    assert refused(of(str(tmp_path / "ours")), of(""))  # the run's own


def test_a_certificate_is_not_enough_without_the_secret(tmp_path: Path) -> None:
    directory = Authority().write(tmp_path / "ours")
    assert refused(of(directory), of(directory, b"the secret of another run"))


@contextmanager
def between(target: str, stranger: Credentials) -> Iterator[str]:
    """The endpoint of a man in the middle, who relays the handshake with `target`."""
    over = threading.Event()
    with socket.create_server((LOCAL, 0)) as server:

        def serve() -> None:
            assert stranger.server and stranger.client
            near = stranger.server.wrap_socket(server.accept()[0], server_side=True)
            with suppress(OSError), near, stranger.client.wrap_socket(dial(target, PATIENCE)) as far:
                for source, sink in ((far, near), (near, far), (far, near)):
                    if not (message := source.recv(4096)):
                        return
                    sink.sendall(message)
                over.wait(PATIENCE)  # keep the stream open

        threading.Thread(target=serve, daemon=True).start()
        yield f"{LOCAL}:{server.getsockname()[1]}"
        over.set()


def test_one_with_a_certificate_cannot_pass_on_what_members_prove_to_each_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise it could read and change all traffic without having the secret."""
    authority = Authority()
    one, other, stranger = (of(authority.write(tmp_path / name)) for name in ("one", "other", "stranger"))
    with ExitStack() as stack:
        here = stack.enter_context(member(0, of=one, timeouts=SHORT))
        there = stack.enter_context(member(1, of=other, timeouts=SHORT))
        endpoint = stack.enter_context(between(there.endpoints[0], stranger))
        assert here.connect({there.id: (endpoint,)}, PATIENCE).keys() == {there.id}
        assert not there._links
        assert "which does not have this run's secret" in caplog.text
        connect([here, there])  # with no one in between


def test_a_certificate_that_has_expired_is_refused(tmp_path: Path) -> None:
    authority = Authority()
    good, old = authority.write(tmp_path / "good"), authority.write(tmp_path / "old", days=-1)
    assert refused(of(good), of(old))


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_is_named(missing: str, tmp_path: Path) -> None:
    directory = Authority().write(tmp_path / "some")
    (tmp_path / "some" / missing).unlink()
    with pytest.raises(ConfigError, match=rf"transport_certificates = '{directory}'.*\.crt, .*No such file"):
        of(directory)
    with pytest.raises(ConfigError, match="transport_certificates"):
        preflight.check_network(TrainingConfig.from_flat({"run_id": "r", "transport_certificates": directory}))


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", ["", "nonsense", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_a_file_that_is_none_is_refused(file: str, content: str, tmp_path: Path) -> None:
    directory = Authority().write(tmp_path / "some")
    (tmp_path / "some" / file).write_text(content)
    with pytest.raises(ConfigError, match=r"transport_certificates.*must hold ca\.crt, tls\.crt, tls\.key in PEM"):
        of(directory)


def test_a_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    authority = Authority()
    directory, other = authority.write(tmp_path / "some"), authority.write(tmp_path / "other")
    (tmp_path / "some" / "tls.key").write_bytes((Path(other) / "tls.key").read_bytes())
    with pytest.raises(ConfigError, match="transport_certificates"):
        of(directory)


ASK = """
import os, sys
os.open(os.ttyname(0), os.O_RDWR)  # the terminal is this process's now
from trainer.errors import ConfigError
from trainer.transport.credentials import credentials
try:
    credentials(bytes(32), "tls", sys.argv[1])
except ConfigError as error:
    print(error)
"""


def test_a_key_with_a_password_is_refused_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    """At a terminal, OpenSSL would ask, and the worker wait."""
    directory = Authority().write(tmp_path / "some")
    key, form = Ed25519PrivateKey.generate(), serialization.PrivateFormat.PKCS8
    locked = key.private_bytes(PEM, form, serialization.BestAvailableEncryption(b"a password"))
    (tmp_path / "some" / "tls.key").write_bytes(locked)
    near, terminal = os.openpty()
    try:
        ended = subprocess.run(
            [sys.executable, "-c", ASK, directory],
            stdin=terminal,
            capture_output=True,
            text=True,
            start_new_session=True,
            timeout=PATIENCE,
            check=True,
        )
    finally:
        os.close(near)
        os.close(terminal)
    assert "transport_certificates" in ended.stdout


def test_a_trivial_secret_is_refused() -> None:
    for security in ("tls", "none"):
        credentials(bytes(MIN_SECRET_BYTES), security)
        with pytest.raises(ValueError, match="shorter"):
            credentials(bytes(MIN_SECRET_BYTES - 1), security)


def test_the_secret_is_the_authority_wherever_it_is_made() -> None:
    """Two processes make the same certificate; another secret, another one."""
    own = [credentials(SECRET) for _ in range(2)]
    found = [one.server.get_ca_certs(binary_form=True) for one in own if one.server]
    assert found[0] == found[1] and len(found[0]) == 1
    other = credentials(b"the secret of another run").server
    assert other and other.get_ca_certs(binary_form=True) != found[0]
    for context in (own[0].server, own[0].client):
        assert context and context.minimum_version is ssl.TLSVersion.TLSv1_3
        assert context.verify_mode is ssl.CERT_REQUIRED


def test_tls_is_for_what_leaves_the_machine() -> None:
    tls, none = credentials(SECRET), credentials(SECRET, "none")
    with member(0, of=tls) as here, member(1, of=tls) as there:
        connect([here, there])
        ends = [end for link in here._links.values() for end in (*link._out, *link._into)]
        assert not any(isinstance(end._connection, ssl.SSLSocket) for end in ends)
        assert ends and not any(none.encrypts(end._connection) or tls.encrypts(end._connection) for end in ends)
        assert all(replace(tls, loopback=True).encrypts(end._connection) for end in ends)


def test_members_that_begin_at_once_need_no_common_directory() -> None:
    """Contexts are made from files that are gone again; several at a time do not disturb each other."""
    made: list[Credentials] = []
    threads = [threading.Thread(target=lambda: made.append(credentials(SECRET))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with ExitStack() as stack:
        transports = [
            stack.enter_context(member(rank, of=replace(one, loopback=True))) for rank, one in enumerate(made[:3])
        ]
        connect(transports)
        reduce(transports)
    assert len(made) == 8
