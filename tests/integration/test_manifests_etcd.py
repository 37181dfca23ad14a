"""The etcd of manifests/overlays/prod, started here: three members, with the variables, certificates and users that the
overlay has."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer.config import TrainingConfig
from trainer.errors import ConfigError, TrainingError
from trainer.etcd.client import EtcdClient
from trainer.etcd.embedded import EmbeddedEtcd, etcd_binary
from trainer.etcd.errors import EtcdError
from trainer.etcd.users import enable_users, main
from trainer.process import dying_with_parent, listen

ROOT = Path(__file__).parents[2]
PROD = ROOT / "manifests" / "overlays" / "prod"

pytestmark = [
    pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed") for tool in ("kubectl", "openssl")
]


@pytest.fixture(scope="module")
def overlay() -> list[dict[str, Any]]:
    rendered = subprocess.run(["kubectl", "kustomize", str(PROD)], check=True, capture_output=True, text=True)
    return list(yaml.safe_load_all(rendered.stdout))


@pytest.fixture(scope="module")
def credentials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("credentials")
    subprocess.run([str(PROD / "certificates.sh"), "team", str(directory)], check=True, capture_output=True)
    return directory


def test_the_server_s_certificate_has_the_names_by_which_other_clusters_reach_it(tmp_path: Path) -> None:
    environment = {**os.environ, "ETCD_NAMES": "DNS:etcd.example.org,IP:192.0.2.1"}
    subprocess.run([str(PROD / "certificates.sh"), "team", str(tmp_path)], check=True, env=environment)
    show = ["openssl", "x509", "-in", str(tmp_path / "server.crt"), "-noout", "-text"]
    text = subprocess.run(show, check=True, capture_output=True, text=True).stdout
    for name in ("DNS:diloco-etcd-2.diloco-etcd.team.svc", "DNS:etcd.example.org", "IP Address:192.0.2.1"):
        assert name in text


def variables(overlay: list[dict[str, Any]], member: int) -> dict[str, str]:
    """The environment of a member's container, as the kubelet expands it."""
    (container,) = one(overlay, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    maps = {obj["metadata"]["name"]: obj["data"] for obj in overlay if obj["kind"] == "ConfigMap"}
    values: dict[str, str] = {}
    for source in container["envFrom"]:
        values |= maps[source["configMapRef"]["name"]]
    fields = {"metadata.name": f"diloco-etcd-{member}", "metadata.namespace": "team"}
    for entry in container["env"]:
        text = entry.get("value") or fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        values[entry["name"]] = re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], text)
    return values


def one(overlay: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [obj for obj in overlay if obj["kind"] == kind]
    return found


def free_ports(count: int) -> list[int]:
    """Different ones: each is held until the last is chosen."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(listen("127.0.0.1")) for _ in range(count)]
        return [int(listener.getsockname()[1]) for listener in listeners]


@pytest.fixture(scope="module")
def members(
    overlay: list[dict[str, Any]], credentials: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[str]]:
    """The endpoints of three members. Only hosts, ports and paths are this machine's."""
    directory = tmp_path_factory.mktemp("members")
    theirs = [(member, port) for member in range(3) for port in ("2379", "2380", "2381")]
    ports = dict(zip(theirs, free_ports(len(theirs)), strict=True))
    here = {"tls.crt": "server.crt", "tls.key": "server.key", "ca.crt": "ca.crt"}

    def local(text: str, member: int) -> str:
        text = re.sub(
            r"diloco-etcd-(\d)\.diloco-etcd(?:\.team\.svc)?:(\d+)",
            lambda found: f"localhost:{ports[int(found[1]), found[2]]}",
            text,
        )
        text = re.sub(r"0\.0\.0\.0:(\d+)", lambda found: f"127.0.0.1:{ports[member, found[1]]}", text)
        text = re.sub(r"/etc/etcd/tls/([\w.]+)", lambda found: str(credentials / here[found[1]]), text)
        return text.replace("/var/lib/etcd", str(directory / str(member)))

    with ExitStack() as stack:
        for member in range(3):
            environment = {name: local(value, member) for name, value in variables(overlay, member).items()}
            log = stack.enter_context((directory / f"{member}.log").open("wb"))
            process = subprocess.Popen(
                dying_with_parent([str(etcd_binary())]),
                env={"PATH": os.environ["PATH"], **environment},
                stdout=log,
                stderr=log,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield [f"localhost:{ports[member, '2379']}" for member in range(3)]


def test_prod_asks_for_a_certificate_and_a_password(
    overlay: list[dict[str, Any]], members: list[str], credentials: Path, etcdctl: Path
) -> None:
    files = {"ca": credentials / "ca.crt", "cert": credentials / "client.crt", "key": credentials / "client.key"}
    tls = {name: str(path) for name, path in files.items()}
    with EtcdClient(members, "/torchelastic", **tls) as early:
        early.wait_for(lambda: early.get("x") is None, 60)  # elected
        early.put("before", 1)

    # The Job of the overlay, with this machine's paths: twice, as a Job may run.
    (container,) = one(overlay, "Job")["spec"]["template"]["spec"]["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    given |= {"DILOCO_ETCD_ENDPOINTS": ",".join(members)}
    given |= {f"DILOCO_ETCD_{name.upper()}": path for name, path in tls.items()}
    passwords = {
        "ETCD_ROOT_PASSWORD": (credentials / "root.password").read_text(),
        "ETCD_PASSWORD": (credentials / "client.password").read_text(),
    }
    assert set(passwords) == {entry["name"] for entry in container["env"] if "valueFrom" in entry}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, *container["command"][1:]],
            env={**os.environ, **given, **passwords, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert not any(password in done.stdout + done.stderr for password in passwords.values())

    password = passwords["ETCD_PASSWORD"]
    with EtcdClient(members, "/torchelastic/run", user="diloco", password=password, **tls) as client:
        client.put("a", 1)
        lease = client.lease(15)
        assert lease.create("b", 2)
        lease.revoke()
        entry = client.get("a")
        assert entry is not None and entry.value == 1
    with EtcdClient(members, "/others", user="diloco", password=password, **tls) as client, pytest.raises(EtcdError):
        client.put("a", 1)
    with (
        EtcdClient(members, "/torchelastic", user="diloco", password="wrong", **tls) as client,
        pytest.raises(EtcdError),
    ):
        client.get("before")
    with EtcdClient(members, "/torchelastic", ca=tls["ca"]) as client, pytest.raises(EtcdError):
        client.get("before")

    command = etcdctl_of_the_readme(etcdctl, members, credentials)
    listed = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ETCDCTL_API": "3"})
    assert listed.returncode == 0, listed.stderr
    assert all(f"diloco-etcd-{member}" in listed.stdout for member in range(3))


def etcdctl_of_the_readme(etcdctl: Path, members: list[str], credentials: Path) -> list[str]:
    """The command that prod's README has for a member's pod, with this machine's port and paths."""
    (command,) = re.findall(r"-- (etcdctl .*? member list)\n", (PROD / "README.md").read_text(), re.DOTALL)
    tls = {"tls.crt": "server.crt", "tls.key": "server.key", "ca.crt": "ca.crt"}
    here = {f"/etc/etcd/tls/{theirs}": str(credentials / ours) for theirs, ours in tls.items()}
    here |= {"https://localhost:2379": f"https://{members[0]}", "\\\n": ""}
    here |= {"<password>": (credentials / "root.password").read_text()}
    for theirs, ours in here.items():
        assert theirs in command
        command = command.replace(theirs, ours)
    _, *arguments = shlex.split(command)
    return [str(etcdctl), *arguments]


def test_users_without_tls_and_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedEtcd(tmp_path / "etcd") as server:
        config = TrainingConfig.from_flat({"etcd_endpoints": [server.endpoint], "etcd_user": "me"})
        enable_users(config, "root's", "mine")
        enable_users(config, "root's", "newer")
        with EtcdClient([server.endpoint], "/torchelastic", user="me", password="newer") as client:
            client.put("a", 1)
        with pytest.raises(TrainingError, match=r"users could not be created: .* authentication failed"):
            enable_users(config, "not root's", "mine")
    for name in ("ETCD_ROOT_PASSWORD", "ETCD_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="ETCD_ROOT_PASSWORD"):
        main()
