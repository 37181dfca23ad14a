"""How an API server admits us: by a service account, by certificates, by a token, or by what a program makes."""

import base64
import json
import ssl
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.errors import TrainingError
from trainer.etcd.certificates import Tls
from trainer.kubernetes.api import connection
from trainer.kubernetes.api.client import ApiError, Client
from trainer.kubernetes.api.connection import Unusable, access_of
from trainer.kubernetes.api.kinds import CONFIG_MAP


class Server(ThreadingHTTPServer):
    """Serves one object over TLS, and notes how it is asked."""

    def __init__(self, tls: Tls) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tls, self.context = tls, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(tls.server, tls.server_key)
        self.context.load_verify_locations(tls.client)
        self.context.verify_mode = ssl.CERT_OPTIONAL
        self.asked: list[tuple[str, bool]] = []  # the header Authorization, and whether the client has a certificate

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        return self.context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), address

    def handle_error(self, *_: Any) -> None: ...  # a client that does not trust us

    def kubeconfig(self, user: dict[str, Any], **cluster: Any) -> dict[str, Any]:
        """A kubeconfig for this server; without anything else, it embeds the server's certificate."""
        cluster = cluster or {"certificate-authority-data": encoded(self.tls.server)}
        where = {"server": f"https://127.0.0.1:{self.server_port}", **cluster}
        return {
            "clusters": [{"name": "here", "cluster": where}],
            "users": [{"name": "me", "user": user}],
            "contexts": [{"name": "now", "context": {"cluster": "here", "user": "me"}}],
            "current-context": "now",
        }


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        certificate = self.connection.getpeercert()  # type: ignore[attr-defined]
        self.server.asked.append((self.headers.get("Authorization", ""), bool(certificate)))
        body = json.dumps({"path": self.path}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    tls = Tls(tmp_path)
    tls.make_server(["127.0.0.1"])
    tls.make_client(b"a door of tests")
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with Server(tls) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(kubeconfig: dict[str, Any] | None = None, folder: Path | None = None) -> str:
    """What the server answers to a client with this kubeconfig."""
    if folder and kubeconfig:
        (folder / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
    found = Client("team", patience=0.0).get(CONFIG_MAP, "one/two")
    assert found is not None
    return str(found["path"])


def test_a_pod_s_service_account_admits_by_its_newest_token(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = tmp_path / "account"
    account.mkdir()
    (account / "ca.crt").write_bytes(server.tls.server.read_bytes())
    monkeypatch.setattr(connection, "SERVICE_ACCOUNT", account)
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.server_port))
    with pytest.raises(TrainingError, match="no cluster to train on"):
        Client("team")
    (account / "token").write_text("first\n")
    client = Client("team")
    for token in ("first", "second"):
        (account / "token").write_text(token)
        client.get(CONFIG_MAP, "one")
    assert server.asked == [("Bearer first", False), ("Bearer second", False)]


def test_a_kubeconfig_admits_by_certificates_that_it_embeds_or_names(server: Server, tmp_path: Path) -> None:
    tls = server.tls
    embedded = {"client-certificate-data": encoded(tls.client), "client-key-data": encoded(tls.client_key)}
    assert ask(server.kubeconfig(embedded), tmp_path) == "/api/v1/namespaces/team/configmaps/one%2Ftwo"
    named = {"client-certificate": tls.client.name, "client-key": str(tls.client_key)}
    ask(server.kubeconfig(named, **{"certificate-authority": tls.server.name}), tmp_path)
    assert server.asked == [("", True), ("", True)]
    access_of(server.kubeconfig(embedded))
    with pytest.raises((Unusable, OSError)):  # files belong to the machine that the kubeconfig is from
        access_of(server.kubeconfig({"tokenFile": "token"}))


def test_a_kubeconfig_admits_by_a_token_or_a_password(server: Server, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("kept\n")
    password = {"username": "me", "password": "mine"}
    for user in ({"token": "given"}, {"tokenFile": "token"}, password, {}):
        ask(server.kubeconfig(user), tmp_path)
    basic = f"Basic {base64.b64encode(b'me:mine').decode()}"
    assert [value for value, _ in server.asked] == ["Bearer given", "Bearer kept", basic, ""]


def test_a_program_makes_the_credentials_if_the_kubeconfig_says_so(server: Server, tmp_path: Path) -> None:
    kind = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential"}
    words = json.dumps({**kind, "status": {"token": "made"}})
    program = {"apiVersion": kind["apiVersion"], "command": sys.executable, "args": ["-c", f"print({words!r})"]}
    ask(server.kubeconfig({"exec": program}), tmp_path)
    assert server.asked == [("Bearer made", False)]


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_a_server_is_trusted_by_its_certificate_unless_told_otherwise(server: Server, tmp_path: Path) -> None:
    unknown = {"certificate-authority-data": encoded(server.tls.client)}
    with pytest.raises(ApiError, match=r"cannot be reached: .*CERTIFICATE_VERIFY_FAILED"):
        ask(server.kubeconfig({}, **unknown), tmp_path)
    ask(server.kubeconfig({}, **{"insecure-skip-tls-verify": True}), tmp_path)
    authority = {"certificate-authority-data": encoded(server.tls.server)}
    ask(server.kubeconfig({}, **authority, **{"tls-server-name": "localhost"}), tmp_path)
    with pytest.raises(ApiError, match="cannot be reached"):
        ask(server.kubeconfig({}, **authority, **{"tls-server-name": "elsewhere"}), tmp_path)
    assert len(server.asked) == 2
