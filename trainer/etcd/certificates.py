"""Certificates of an embedded etcd that listens for other machines: see `Tls`."""

import datetime
import hashlib
import ipaddress
import secrets
import socket
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from trainer.files import write_text

DOOR_BYTES = 16
_CURVE = ec.SECP256R1()  # gRPC's TLS does not accept Ed25519
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
# Fixed, so that a machine with a wrong clock can take part. The keys live as long as their run.
_VALID = datetime.datetime(2000, 1, 1), datetime.datetime(2100, 1, 1)


@dataclass(frozen=True)
class Tls:
    """PEM files of an etcd, or of its client, in a directory that only the user may read.

    The server's certificate is self-signed, and clients pin it by its fingerprint. The clients' key is derived from a
    few random bytes, the *door*, which are in all tokens of the run. A machine without a token cannot even send a
    request, including those that etcd answers without a user.
    """

    directory: Path

    @property
    def server(self) -> Path:
        """The server's certificate, which is also its authority."""
        return self.directory / "server.crt"

    @property
    def server_key(self) -> Path:
        return self.directory / "server.key"

    @property
    def client(self) -> Path:
        """The clients' certificate, which is also their authority."""
        return self.directory / "client.crt"

    @property
    def client_key(self) -> Path:
        return self.directory / "client.key"

    @property
    def fingerprint(self) -> bytes:
        """SHA-256 of the server's certificate."""
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(self.server.read_text(encoding="ascii"))).digest()

    def make_server(self, hosts: Iterable[str]) -> None:
        """Create the server's certificate for these names and addresses, unless there is one that covers them."""
        names = [_name(host) for host in sorted({*hosts, "localhost", "127.0.0.1", "::1"})]
        if self.server_key.exists() and self.server.exists():
            made = x509.load_pem_x509_certificate(self.server.read_bytes())
            known = made.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            if {*names} <= {*known}:
                return
        self._write(ec.generate_private_key(_CURVE), self.server, self.server_key, names)

    def make_client(self, door: bytes) -> None:
        """Write the clients' certificate and key."""
        derived = HKDF(hashes.SHA256(), 48, None, b"diloco etcd client").derive(door)
        number = int.from_bytes(derived) % (_ORDER - 1) + 1
        self._write(ec.derive_private_key(number, _CURVE), self.client, self.client_key, [])

    def take_server(self, endpoint: str, connection: socket.socket, fingerprint: bytes) -> None:
        """Save the server's certificate from a connection, if it has the right fingerprint. Closes the connection.

        Raises:
            ValueError: It has another fingerprint.
            OSError: The other end does not speak TLS.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # the fingerprint decides
        context.load_cert_chain(self.client, self.client_key)
        with connection, context.wrap_socket(connection) as encrypted:
            certificate = encrypted.getpeercert(binary_form=True) or b""
        if not secrets.compare_digest(hashlib.sha256(certificate).digest(), fingerprint):
            raise ValueError(f"{endpoint} has another certificate than the run's etcd")
        write_text(self.server, ssl.DER_cert_to_PEM_cert(certificate), private=True)

    def _write(
        self, key: ec.EllipticCurvePrivateKey, certificate: Path, file: Path, names: list[x509.GeneralName]
    ) -> None:
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "diloco")])
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_VALID[0])
            .not_valid_after(_VALID[1])
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        )
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        secret = key.private_bytes(pem, form, serialization.NoEncryption())
        write_text(file, secret.decode(), private=True)
        write_text(certificate, builder.sign(key, hashes.SHA256()).public_bytes(pem).decode(), private=True)


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
