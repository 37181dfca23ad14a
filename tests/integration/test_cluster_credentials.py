"""The train step reaches an etcd with TLS by the certificates in its Secret, and leaves none of them lying about."""

import base64
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.apiserver import ApiServer, serving
from trainer.config import TrainingConfig
from trainer.errors import TrainingError
from trainer.etcd.embedded import etcd_binary
from trainer.kubernetes.api.client import Client
from trainer.kubernetes.objects.plan import plan
from trainer.kubernetes.steps.cluster import Cluster
from trainer.kubernetes.steps.credentials import reachable_etcd
from trainer.kubernetes.steps.step_context import StepContext
from trainer.process import dying_with_parent, refused

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed"),
]


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[bytes, bytes]:
    """A certificate that serves as its own authority, and its key."""
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", "k", "-out", "c", "-days", "2", "-subj", "/CN=etcd", "-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    return (tmp_path / "c").read_bytes(), (tmp_path / "k").read_bytes()


@pytest.fixture
def endpoint(tmp_path: Path, certificate: tuple[bytes, bytes]) -> Iterator[str]:
    """An etcd that speaks TLS and asks for client certificates."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    command = [
        *(str(etcd_binary()), "--data-dir", str(tmp_path / "etcd"), "--log-level", "error", "--client-cert-auth"),
        *("--listen-client-urls", f"https://{address}", "--advertise-client-urls", f"https://{address}"),
        *("--listen-peer-urls", "http://127.0.0.1:0", "--cert-file", str(tmp_path / "c")),
        *("--key-file", str(tmp_path / "k"), "--trusted-ca-file", str(tmp_path / "c")),
    ]
    process = subprocess.Popen(dying_with_parent(command))
    deadline = time.monotonic() + 300
    while refused(address):
        assert time.monotonic() < deadline, "etcd does not start"
        time.sleep(0.05)
    yield address
    process.kill()
    process.wait()


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    with serving() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        yield server


def context(endpoint: str) -> StepContext:
    values = {
        "launcher": "pytorchjob",
        "run_id": "mine",
        "elastic_etcd_protocol": "https",
        "etcd_endpoints": [endpoint],
    }
    config = TrainingConfig.from_flat(values).resolved()
    made = plan(config, namespace="default", image="python:1")
    return StepContext(Cluster("", lambda: Client("default"), lambda _: made, print, lambda mark: False), print)


def test_the_secret_s_certificates_open_etcd_and_are_gone_again(
    server: ApiServer,
    endpoint: str,
    certificate: tuple[bytes, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ca, key = certificate
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    data = {"ca.crt": ca, "tls.crt": ca, "tls.key": key}
    encoded = {name: base64.b64encode(value).decode() for name, value in data.items()}
    server.put("secrets", {"metadata": {"name": "diloco-etcd-client"}, "data": encoded})
    here = context(endpoint)
    with reachable_etcd(here) as etcd:
        etcd.put("run", {"status": "open"})
        files = list((tmp_path / "scratch").rglob("*.*"))
        assert {path.name for path in files} == set(data)
        assert all(path.stat().st_mode & 0o077 == 0 for path in files)
    assert not list((tmp_path / "scratch").iterdir())
    assert "PRIVATE KEY" not in capsys.readouterr().out


def test_an_incomplete_secret_is_named(server: ApiServer, endpoint: str) -> None:
    server.put("secrets", {"metadata": {"name": "diloco-etcd-client"}, "data": {"ca.crt": ""}})
    with (
        pytest.raises(TrainingError, match=r"Secret diloco-etcd-client has no key tls\.crt"),
        reachable_etcd(context(endpoint)),
    ):
        pass
