"""Authentication within a run: both ends of a connection prove that they hold the run's secret.

With TLS 1.3, the proof is a certificate, and everything after it is encrypted. The run's secret *is* its certificate
authority: the authority's key (Ed25519) is derived from it, and its certificate is the same, byte for byte, wherever it
is made. So etcd only has to hold a few random bytes, and every process that may read the run's keys belongs to the run.
Certificates of another authority can be given instead: a directory with `ca.crt`, `tls.crt` and `tls.key`, as written
by cert-manager and found in Kubernetes' TLS secrets.

Whether or not a connection is encrypted, each end also answers the other's challenge with the secret: see `proof`. So a
certificate of another authority is not enough by itself.
"""

import datetime
import hashlib
import hmac
import ipaddress
import re
import socket
import ssl
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from trainer.errors import ConfigError

MIN_SECRET_BYTES = 16
FILES = ("ca.crt", "tls.crt", "tls.key")
DIALLER, ACCEPTOR = b"dialler", b"acceptor"  # roles
# Fixed, so that a machine with a wrong clock can take part. A secret lives as long as its run.
_VALID = datetime.datetime(2000, 1, 1), datetime.datetime(2100, 1, 1)


@dataclass(frozen=True)
class Credentials:
    """This process's proof that it belongs to a run. `server` and `client` are None without TLS."""

    secret: bytes
    server: ssl.SSLContext | None = None
    client: ssl.SSLContext | None = None
    certificate: bytes = b""  # this process's certificate, in DER
    loopback: bool = False  # whether connections within this machine are also encrypted

    def encrypts(self, connection: socket.socket) -> bool:
        """Whether TLS is used on a connection."""
        address = ipaddress.ip_address(connection.getsockname()[0].partition("%")[0])
        local = (getattr(address, "ipv4_mapped", None) or address).is_loopback
        return self.server is not None and (self.loopback or not local)

    def channel(self, connection: socket.socket, dialled: bool) -> bytes:
        """What both ends of a connection know about it. It differs between a man in the middle's two connections.

        Args:
            dialled: Whether this end is the dialler.

        Returns:
            The SHA-256 of the dialler's certificate and that of the acceptor's; zeros without TLS.
        """
        if not isinstance(connection, ssl.SSLSocket):
            return bytes(2 * hashlib.sha256().digest_size)
        ends = [self.certificate, connection.getpeercert(binary_form=True) or b""]
        return b"".join(hashlib.sha256(end).digest() for end in (ends if dialled else reversed(ends)))

    def proof(self, role: bytes, context: bytes, message: bytes) -> bytes:
        """HMAC-SHA256 with which one end proves that it has the secret.

        Args:
            role: `DIALLER` or `ACCEPTOR`. The proof of one is invalid for the other.
            context: The channel and a new challenge, of fixed length.
        """
        return hmac.digest(self.secret, role + context + message, "sha256")


def credentials(secret: bytes, security: str = "tls", directory: str = "") -> Credentials:
    """The credentials of a run's member.

    Args:
        secret: The run's; at least `MIN_SECRET_BYTES`.
        security: "tls" or "none".
        directory: Contains `FILES` in PEM. Empty: the certificate is derived from the secret.

    Raises:
        ConfigError: A file of the directory is missing, or is not a certificate or key.
    """
    if len(secret) < MIN_SECRET_BYTES:
        raise ValueError(f"the secret is shorter than {MIN_SECRET_BYTES} bytes")
    if security == "none":
        return Credentials(secret)
    with tempfile.TemporaryDirectory() as made:  # `ssl` reads keys only from files
        if not directory:
            _write(secret, Path(made))
        where = Path(directory or made)
        server, client = (_context(side, where) for side in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT))
        return Credentials(secret, server, client, _first(where / FILES[1]))


def _context(side: int, directory: Path) -> ssl.SSLContext:
    authority, certificate, key = (directory / name for name in FILES)
    context = ssl.SSLContext(side)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # certificates do not contain the members' addresses; the authority is the run's own
    context.verify_mode = ssl.CERT_REQUIRED
    if side == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # sessions are not resumed, and a stream's receiver must not send
    try:
        context.load_verify_locations(authority)
        context.load_cert_chain(certificate, key, password=str)  # "": OpenSSL must not prompt for one
    except OSError as error:  # SSLError is one
        allowed = f"must hold {', '.join(FILES)} in PEM: {error.strerror or error}"
        raise ConfigError("transport_certificates", directory, allowed) from None
    return context


def _first(file: Path) -> bytes:
    """The first certificate in a file, in DER. This is the one that OpenSSL, which has loaded the file, presents."""
    pem = re.search("-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", file.read_text("latin-1"), re.DOTALL)
    if pem is None:
        raise ConfigError("transport_certificates", file.parent, f"must hold {', '.join(FILES)} in PEM")
    return ssl.PEM_cert_to_DER_cert(pem[0])


def _write(secret: bytes, directory: Path) -> None:
    """Write `FILES`. The authority's certificate is also that of its members."""
    key = Ed25519PrivateKey.from_private_bytes(HKDF(hashes.SHA256(), 32, None, b"diloco authority").derive(secret))
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "diloco")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(_VALID[0])
        .not_valid_after(_VALID[1])
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, None)
    )
    for file in FILES[:2]:
        (directory / file).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (directory / FILES[2]).write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))
