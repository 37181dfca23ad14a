"""Clusters other than the steps' own. A Secret in the steps' cluster holds the kubeconfig of each, as in MultiKueue.

No content of a kubeconfig appears in messages, not even the address: they name the cluster by its Secret.
"""

import base64
import binascii
import logging
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import yaml

from trainer.errors import ConfigError, one_line
from trainer.kubernetes.api.client import EXPIRED, ApiError, Client
from trainer.kubernetes.api.kinds import SECRET, Kind, Object

logger = logging.getLogger(__name__)

KEY = "kubeconfig"  # in the Secret
_FIELD = "sites[].cluster"
_ALONE = "kubectl config view --minify --flatten --raw"  # prints a self-contained kubeconfig
# Fields of a kubeconfig that name a file or a program, which would be on another machine
_ELSEWHERE = ("certificate-authority", "client-certificate", "client-key", "tokenFile", "exec", "auth-provider")


@dataclass(frozen=True)
class Kubeconfig:
    """The kubeconfig of another cluster."""

    content: Mapping[str, Any]
    namespace: str  # of its current context; "default" if that has none, as for kubectl


def read_kubeconfig(home: Client, secret: str, *, timeout: float | None = None) -> Kubeconfig:
    """Read another cluster's kubeconfig from its Secret.

    Args:
        home: A client of the Secret's namespace.
        timeout: As for `Client.get`.

    Raises:
        ConfigError: There is no such Secret, or it has no self-contained kubeconfig.
        ApiError: It cannot be read.
    """

    def refuse(why: str) -> ConfigError:
        return ConfigError(_FIELD, secret, f"{why}; docs/guide/cluster.md says how to make it")

    try:
        found = home.get(SECRET, secret, timeout=timeout)
    except ApiError as error:
        if error.status != 403:
            raise
        right = f"grant the steps' account the verb get on the Secret {secret} (docs/guide/cluster.md)"
        raise ApiError(f"the kubeconfig of cluster {secret} may not be read: {right}", 403, error.reason) from None
    if found is None:
        raise refuse(f"there is no Secret of this name in namespace {home.namespace}")
    # Find the cluster and the user of the current context
    try:
        text = base64.b64decode((found.get("data") or {})[KEY], validate=True)
        content = yaml.safe_load(text)
        contexts = {one["name"]: one["context"] for one in content["contexts"]}
        context = contexts[content["current-context"]]
        used = [
            next(one[kind] for one in content[f"{kind}s"] if one["name"] == context[kind])
            for kind in ("cluster", "user")
        ]
        server = str(used[0]["server"])
        elsewhere = [name for name in _ELSEWHERE if any(name in one for one in used)]
    except KeyError as error:
        missing = f"no key {KEY}" if error.args == (KEY,) else "no kubeconfig with a current context, cluster and user"
        raise refuse(f"the Secret has {missing}") from None
    except (TypeError, StopIteration, binascii.Error, yaml.YAMLError):  # their messages may quote the content
        raise refuse(f"the value of the Secret's key {KEY} is not a kubeconfig") from None
    # Refuse what cannot work in a pod
    if not server.startswith(("http://", "https://")):
        raise refuse("the server in its kubeconfig must be an http or https URL")
    if elsewhere:
        raise refuse(
            f"its kubeconfig has {elsewhere[0]}, which works on one machine only: `{_ALONE}` embeds certificates"
        )
    return Kubeconfig(content, str(context.get("namespace") or "default"))


class OtherClient(Client):
    """The objects of another cluster, in the namespace named by its kubeconfig.

    If the cluster rejects the credentials, they are read again, because they may have been renewed.

    Args:
        home: A client of the Secret's namespace.
        cluster: The Secret's name.

    Raises:
        ConfigError, ApiError: Same as `read_kubeconfig`.
    """

    def __init__(self, home: Client, cluster: str) -> None:
        self.cluster, self._home = cluster, home
        self._kubeconfig = read_kubeconfig(home, cluster)
        self._renewing = threading.Lock()
        super().__init__(self._kubeconfig.namespace, home.timeouts, patience=home.patience)

    def _configure(self, configuration: Any) -> None:
        from kubernetes import config

        try:
            config.load_kube_config_from_dict(
                dict(self._kubeconfig.content), client_configuration=configuration, persist_config=False
            )
        except (config.ConfigException, OSError, ValueError, TypeError):
            raise ConfigError(_FIELD, self.cluster, "the kubeconfig in this Secret cannot be used") from None

    def _renewed(self, used: Any) -> bool:
        with self._renewing:
            if self._dynamic is not used:
                return True
            try:
                found = read_kubeconfig(self._home, self.cluster, timeout=self.timeouts.answer)
            except (ConfigError, ApiError) as error:
                logger.debug("the credentials of cluster %s are not read again: %s", self.cluster, error)
                return False
            if found.content == self._kubeconfig.content:
                return False
            self._kubeconfig = found
            self._connect()
            return True

    def _unreachable(self, error: Exception) -> str:
        return f"{self.called} cannot be reached: {self._without_address(error)}"

    def _without_address(self, error: Exception) -> str:
        address = urlsplit(self._configuration.host)
        return one_line(error).replace(address.netloc, "…").replace(address.hostname or address.netloc, "…")

    def _refusal(self, verb: str, kind: Kind, name: str, status: int, answer: Mapping[str, Any]) -> ApiError:
        if status == 401:
            text = f"{self.called} rejects the credentials in Secret {self.cluster}: renew them there"
            return ApiError(text, status, EXPIRED)
        return super()._refusal(verb, kind, name, status, answer)

    @contextmanager
    def reached(self, pod: Object, port: int) -> Iterator[tuple[str, int]]:
        """A local port whose connections the API server forwards, because the pod's address may be unreachable.

        A connection that cannot be forwarded is closed, with the reason in the log.
        """
        name = pod["metadata"]["name"]
        with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as connections:

            def accept() -> None:
                with suppress(OSError):  # the listener is closed
                    while True:
                        connection, _ = listener.accept()
                        connections.callback(connection.close)
                        try:
                            self._forward(connection, name, port)
                        except ApiError as error:
                            logger.warning("%s", error)
                            connection.close()

            threading.Thread(target=accept, name=f"forward-{name}", daemon=True).start()
            try:
                yield "127.0.0.1", listener.getsockname()[1]
            finally:
                listener.shutdown(socket.SHUT_RDWR)

    def _forward(self, connection: socket.socket, pod: str, port: int) -> None:
        """Forward a connection to a pod's port, with a WebSocket to the API server and two threads."""
        from kubernetes import client
        from kubernetes.client import ApiException
        from kubernetes.stream import portforward

        # A separate client, because `portforward` replaces one of its methods
        api = client.CoreV1Api(client.ApiClient(self._configuration))
        try:
            forwarded = portforward(api.connect_get_namespaced_pod_portforward, pod, self.namespace, ports=str(port))
        except ApiException as error:
            why = self._without_address(error)
            raise ApiError(f"pod {pod} {self._where} cannot be reached through {self.called}: {why}") from None
        remote = forwarded.socket(port)
        for source, target in ((connection, remote), (remote, connection)):
            threading.Thread(target=_copy, args=(source, target), daemon=True).start()


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Copy data until one of the two is closed; then close both."""
    with suppress(OSError):
        while data := source.recv(1 << 20):
            target.sendall(data)
    for one in (source, target):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()
