"""Where an API server is, and how it admits us: by the service account of a pod, or by a kubeconfig.

Requests go over urllib3, as those of the official client do. That client is imported only where it is needed: for a
kubeconfig that is more than addresses, certificates and tokens, and to forward a port. It imports a class for each kind
of objects, which costs a step of the pipeline half of its CPU time.
"""

import base64
import os
import ssl
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    import urllib3

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_CONNECTIONS = 256  # each followed log and watch holds one
_MADE = ("exec", "auth-provider")  # fields of a user whose credentials are made when they are needed


class Unusable(Exception):
    """There is no such configuration, or it cannot be used."""


@dataclass(frozen=True)
class Access:
    """An API server and our credentials for it.

    Attributes:
        host: Its URL.
        authorization: The value of the header of this name at this moment; "" without one.
        tls: A context with certificates; None if the URL is http.
        server_name: The name in the server's certificate, if it is not the host.
    """

    host: str
    authorization: Callable[[], str] = field(default=lambda: "")
    tls: ssl.SSLContext | None = None
    server_name: str = ""

    @cached_property
    def _pool(self) -> "urllib3.PoolManager":
        import urllib3

        if self.tls is None:
            return urllib3.PoolManager(maxsize=_CONNECTIONS)
        name: dict[str, Any] = {"server_hostname": self.server_name} if self.server_name else {}
        mode = "CERT_NONE" if self.tls.verify_mode == ssl.CERT_NONE else "CERT_REQUIRED"
        return urllib3.PoolManager(maxsize=_CONNECTIONS, ssl_context=self.tls, cert_reqs=mode, **name)

    def request(
        self, method: str, path: str, headers: Mapping[str, str], body: str | None, limits: tuple[float, float]
    ) -> "urllib3.BaseHTTPResponse":
        """Send one request. Returns the response, whatever its status, before its body has been read.

        Args:
            limits: Seconds to connect, and without data.

        Raises:
            urllib3.exceptions.HTTPError, OSError: There is no response.
        """
        import urllib3

        admitted = {"Authorization": value} if (value := self.authorization()) else {}
        return self._pool.request(
            method,
            self.host + path,
            body=body,
            headers={**headers, **admitted},
            timeout=urllib3.Timeout(connect=limits[0], read=limits[1]),
            preload_content=False,
            retries=False,
        )


def find_access() -> Access:
    """That of KUBECONFIG, else of this process's own pod, else of `~/.kube/config`. Raises Unusable, OSError."""
    file = os.environ.get("KUBECONFIG", "")
    if not file and "KUBERNETES_SERVICE_HOST" in os.environ:
        return _of_service_account()
    path = Path(file or "~/.kube/config").expanduser()
    content = _content(path) if path.is_file() else None
    if content is not None and (access := _simple(content, path.parent)):
        return access
    from kubernetes import config

    return _by_official_client(lambda into: config.load_kube_config(file or None, client_configuration=into))


def access_of(content: Mapping[str, Any]) -> Access:
    """That of a kubeconfig's content. Raises Unusable, OSError, ValueError, TypeError."""
    if access := _simple(content, None):
        return access
    return _by_official_client(lambda into: official_configuration(content, into))


def official_configuration(content: Mapping[str, Any], into: Any = None) -> Any:
    """A kubeconfig's content as the official client has it. `into` is an empty configuration of its own."""
    from kubernetes import client, config

    into = client.Configuration() if into is None else into
    config.load_kube_config_from_dict(dict(content), client_configuration=into, persist_config=False)
    return into


def _by_official_client(load: Callable[[Any], None]) -> Access:
    """The access that `load` fills into an empty configuration of the official client."""
    from kubernetes import client, config

    configuration = client.Configuration()
    try:
        load(configuration)
    except config.ConfigException as error:
        raise Unusable(str(error)) from None

    def authorization() -> str:
        settings = configuration.auth_settings().values()  # it makes new credentials when these expire
        return next((str(one["value"] or "") for one in settings), "")

    authority, *own = (configuration.ssl_ca_cert, configuration.cert_file, configuration.key_file)
    tls = None
    if configuration.host.startswith("https"):
        certificate, key = (Path(file).read_bytes() if file else None for file in own)
        tls = _context(authority and Path(authority), certificate, key, verify=configuration.verify_ssl)
    return Access(configuration.host, authorization, tls, configuration.tls_server_name or "")


def _of_service_account() -> Access:
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    token = SERVICE_ACCOUNT / "token"

    def authorization() -> str:
        return f"Bearer {token.read_text(encoding='utf-8').strip()}"  # the kubelet renews it

    authorization()
    tls = _context(SERVICE_ACCOUNT / "ca.crt")
    return Access(f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}", authorization, tls)


def _content(path: Path) -> Mapping[str, Any] | None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None


def _simple(content: Mapping[str, Any], folder: Path | None) -> Access | None:
    """The access of a kubeconfig's current context; None if that is beyond us, so that the official client judges it.

    `folder`: of the files that it names; None: it may name none.
    """
    try:
        contexts = {one["name"]: one["context"] for one in content["contexts"]}
        context = contexts[content["current-context"]]
        cluster, user = (
            next(one[kind] for one in content[f"{kind}s"] if one["name"] == context[kind])
            for kind in ("cluster", "user")
        )
        host, user = str(cluster["server"]).rstrip("/"), user or {}
        if any(name in user for name in _MADE):
            return None

        def data(owner: Mapping[str, Any], name: str) -> bytes | None:
            """What a field holds, or the file that it names."""
            if f"{name}-data" in owner:
                return base64.b64decode(owner[f"{name}-data"])
            return _file(folder, owner[name]) if name in owner else None

        tls = None
        if host.startswith("https"):
            tls = _context(
                data(cluster, "certificate-authority"),
                data(user, "client-certificate"),
                data(user, "client-key"),
                verify=not cluster.get("insecure-skip-tls-verify"),
            )
        value = _authorization(user, folder)
        return Access(host, lambda: value, tls, str(cluster.get("tls-server-name") or ""))
    except (KeyError, TypeError, AttributeError, StopIteration, ValueError, OSError):  # ssl's errors are OSErrors
        return None


def _authorization(user: Mapping[str, Any], folder: Path | None) -> str:
    token = user.get("token") or (_file(folder, user["tokenFile"]).decode().strip() if "tokenFile" in user else "")
    if token:
        return f"Bearer {token}"
    if "username" in user and "password" in user:
        return "Basic " + base64.b64encode(f"{user['username']}:{user['password']}".encode()).decode()
    return ""


def _file(folder: Path | None, name: str) -> bytes:
    if folder is None:
        raise ValueError("a kubeconfig without a place names a file")
    return (folder / name).read_bytes()


def _context(
    authority: bytes | Path | None = None,
    certificate: bytes | None = None,
    key: bytes | None = None,
    *,
    verify: bool = True,
) -> ssl.SSLContext:
    """A context like that of the official client, which takes Mozilla's authorities unless it is given one."""
    import certifi
    from urllib3.util.ssl_ import create_urllib3_context

    context = create_urllib3_context(cert_reqs=ssl.CERT_REQUIRED if verify else ssl.CERT_NONE)
    context.check_hostname = verify
    if isinstance(authority, bytes):
        context.load_verify_locations(cadata=authority.decode())
    else:
        context.load_verify_locations(cafile=str(authority or certifi.where()))
    if certificate:
        with tempfile.NamedTemporaryFile() as file:  # ssl reads files only; this one is ours alone, and goes at once
            file.write(certificate + b"\n" + (key or b""))
            file.flush()
            context.load_cert_chain(file.name)
    return context
