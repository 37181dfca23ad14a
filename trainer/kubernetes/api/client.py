"""The Kubernetes API with plain dicts as objects: the official dynamic client with readable errors.

The dynamic client's discovery is not used: it needs extra requests, rights that no Role of manifests/ grants, and a
cache file that all clusters behind the same address would share. `kinds` lists the few kinds that are needed.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from trainer.errors import TrainingError, one_line
from trainer.kubernetes.api.kinds import KINDS, POD, Kind, Object
from trainer.retry import retrying
from trainer.timeouts import KubernetesTimeouts

logger = logging.getLogger(__name__)

PAGE = 500  # objects in one page of a list
BROKEN, TIMED_OUT = "Broken", "TimedOut"  # reasons: the connection broke; nothing arrived for too long
EXPIRED = "CredentialsExpired"  # reason: another cluster rejects the credentials in its Secret, which may be renewed
RUNTIME_UNSEEN = "RuntimeUnseen"  # reason: Trainer's webhook does not know a runtime with this name (yet)
_TRANSIENT = {0, 429, 500, 502, 503, 504}  # HTTP statuses of a server in trouble; 0: no answer
_METHODS = {"list": "get", "watch": "get", "deletecollection": "delete"}  # by RBAC verb; other verbs are HTTP methods
_IN_BACKGROUND = {"propagationPolicy": "Background"}

QUOTA_ADVICE = "Ask for a larger quota, or request less: nodes, gpu_count, cpu_cores, memory_gb, storage.size_gb"


class ApiError(TrainingError):
    """The API server rejected a request, or cannot be reached.

    Attributes:
        status: The HTTP status; 0 if there was no answer.
        reason: The API's reason (`NotFound`, `AlreadyExists`, ...); `BROKEN` or `TIMED_OUT` for an interrupted stream.
    """

    def __init__(self, message: str, status: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.status, self.reason = status, reason

    @property
    def is_outage(self) -> bool:
        """Whether the API server is failing or unreachable."""
        return self.status in _TRANSIENT

    @property
    def is_transient(self) -> bool:
        """Whether the same request may succeed later."""
        return self.is_outage or self.reason == EXPIRED


class Client:
    """The objects of one namespace.

    Cluster and credentials come from KUBECONFIG, else from this process's own pod, else from `~/.kube/config`;
    `OtherClient` is for other clusters.

    Attributes:
        cluster: The name of another cluster; "" for this one.
        patience: Seconds for which a request is retried while the API server does not answer; `timeouts.outage`.

    Raises:
        TrainingError: No cluster is configured. All methods raise `ApiError`.
    """

    cluster = ""

    def __init__(
        self, namespace: str, timeouts: KubernetesTimeouts | None = None, *, patience: float | None = None
    ) -> None:
        self.namespace, self.timeouts = namespace, timeouts or KubernetesTimeouts()
        self.patience = self.timeouts.outage if patience is None else patience
        self._connect()

    def _connect(self) -> None:
        from kubernetes import client
        from kubernetes.dynamic import DynamicClient

        configuration = client.Configuration()
        self._configure(configuration)
        configuration.retries = False  # `retrying` does this
        configuration.connection_pool_maxsize = 256  # each followed log and watch holds a connection
        self._configuration = configuration
        self._dynamic = DynamicClient(client.ApiClient(configuration), discoverer=lambda client, cache_file: None)

    def _configure(self, configuration: Any) -> None:
        """Fill in the cluster's address and the credentials."""
        from kubernetes import config

        file = os.environ.get("KUBECONFIG")
        try:
            if not file and "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(client_configuration=configuration)
            else:
                config.load_kube_config(config_file=file, client_configuration=configuration)
        except (config.ConfigException, OSError) as error:
            raise TrainingError(
                f"no cluster to train on ({one_line(error)}): run in a cluster, or set KUBECONFIG"
            ) from None

    def _renewed(self, used: Any) -> bool:
        """Whether there are newer credentials than those of the dynamic client `used`."""
        return False

    @property
    def called(self) -> str:
        """The API server's name in messages."""
        return f"the API server of cluster {self.cluster}" if self.cluster else "the API server"

    def why_silent(self, error: ApiError) -> str:
        """Why no news arrives, after a failed request."""
        return f"{self.called} does not answer" if error.is_outage else str(error)

    @contextmanager
    def reached(self, pod: Object, port: int) -> Iterator[tuple[str, int]]:
        """Host and port at which a port of a pod can be reached."""
        yield pod["status"]["podIP"], port

    def get(self, kind: Kind, name: str, *, timeout: float | None = None) -> Object | None:
        """The object; None if it does not exist. A `timeout`, in seconds, allows a single attempt."""
        return self._existing("get", kind, name, timeout)

    def list(
        self, kind: Kind, labels: str = "", fields: str = "", *, timeout: float | None = None
    ) -> tuple[list[Object], str]:
        """All objects that match the selectors, and the `resourceVersion` from which to watch them."""
        found: list[Object] = []
        token = None
        while True:
            selectors = {"label_selector": labels or None, "field_selector": fields or None}
            page = self._json("list", kind, "", timeout, limit=PAGE, _continue=token, **selectors)
            found += page["items"] or []
            token = page["metadata"].get("continue")
            if not token:
                return found, page["metadata"]["resourceVersion"]

    def create(self, body: Object) -> Object:
        """Create an object. `ApiError.reason` is `AlreadyExists` if its name is taken."""
        return self._json("create", KINDS[body["kind"]], body["metadata"]["name"], body=body)

    def patch(self, kind: Kind, name: str, change: Object) -> Object:
        """Merge a change into an object (RFC 7386)."""
        return self._json("patch", kind, name, body=change, content_type="application/merge-patch+json")

    def delete(self, kind: Kind, name: str, *, uid: str = "") -> bool:
        """Delete an object and, in the background, the objects that it owns. False if it does not exist.

        Args:
            uid: The object's uid. A later object of the same name is not deleted. If empty, any is.
        """
        body = {**_IN_BACKGROUND, "preconditions": {"uid": uid}} if uid else _IN_BACKGROUND
        try:
            return self._existing("delete", kind, name, body=body) is not None
        except ApiError as error:
            if not uid or error.reason != "Conflict":
                raise
            return False

    def delete_all(self, kind: Kind, labels: str) -> None:
        """Delete all objects that match the selector in one request and, in the background, those that they own."""
        self._json("deletecollection", kind, label_selector=labels, body=_IN_BACKGROUND)

    def watch(
        self, kind: Kind, version: str, labels: str = "", *, begun: Callable[[], None] = lambda: None
    ) -> Iterator[Object]:
        """Changes since `version` as they happen: `{type: ADDED | MODIFIED | DELETED | BOOKMARK, object}`.

        The iterator ends after `timeouts.watch`, or with the connection. (`kubernetes.watch.Watch` creates a client for
        each watch, and fails on errors without a reason.)

        Args:
            begun: Called when the API server has accepted the request.

        Raises:
            ApiError: With status 410, the version is too old: list again.
        """
        seconds = self.timeouts.watch
        limits = (self.timeouts.connect, seconds + self.timeouts.answer)
        since: dict[str, Any] = {"watch": "true", "resource_version": version, "timeout_seconds": round(seconds)}
        bookmarks = [("allowWatchBookmarks", "true")]
        response = self._send(
            "watch", kind, limits=limits, stream=True, label_selector=labels or None, query_params=bookmarks, **since
        )
        begun()
        for line in _lines(response):
            event = json.loads(line)
            if event["type"] == "ERROR":
                answer = event["object"]
                raise self._refusal("watch", kind, "", int(answer.get("code") or 500), answer)
            yield event

    def log(self, pod: str, container: str, since: str = "", *, follow: bool = True) -> Iterator[str]:
        """The lines of a container's log, each prefixed with its time (RFC 3339) and a space.

        Args:
            since: RFC 3339 time from which to read; the API ignores fractions of a second.
            follow: Continue until the container or the connection ends, or no line arrives for `timeouts.log_silence`.
        """
        query = [("container", container), ("timestamps", "true")]
        query += [("follow", "true")] if follow else []
        query += [("sinceTime", since)] if since else []
        limits = (self.timeouts.connect, self.timeouts.log_silence if follow else self.timeouts.answer)
        response = self._send("log", POD, pod, limits=limits, stream=follow, query_params=query)
        yield from _lines(response) if follow else filter(None, response.data.decode(errors="replace").split("\n"))

    def _existing(self, *request: Any, **arguments: Any) -> Object | None:
        try:
            return self._json(*request, **arguments)
        except ApiError as error:
            if error.reason != "NotFound":
                raise
            return None

    def _json(self, verb: str, kind: Kind, name: str = "", timeout: float | None = None, **arguments: Any) -> Any:
        """One request, retried while the server does not answer, unless `timeout` allows a single attempt."""
        limits = (self.timeouts.connect, self.timeouts.read) if timeout is None else (timeout, timeout)
        policy = retrying(
            lambda error: isinstance(error, ApiError) and error.is_transient,
            patience=self.patience if timeout is None else 0.0,
            first_pause=self.timeouts.retry,
            longest_pause=self.timeouts.longest_retry,
            on_retry=lambda error: logger.warning("%s; trying again", error),
        )
        return json.loads(policy(self._send, verb, kind, name, limits=limits, **arguments).data)

    def _send(
        self, verb: str, kind: Kind, name: str = "", *, limits: tuple[float, float], stream: bool = False, **more: Any
    ) -> Any:
        """One attempt at a request with the dynamic client. Returns the response.

        Args:
            limits: Seconds to connect, and seconds without data.
            stream: Whether to leave the response's data to the caller.
        """
        from kubernetes.client import ApiException
        from kubernetes.dynamic import Resource
        from urllib3.exceptions import HTTPError

        # Describe the resource here: the dynamic client would first ask the server for all of its resources
        prefix, version = "apis" if kind.group else "api", kind.version
        resource = Resource(prefix, kind.group, version, kind.name, name=kind.plural, namespaced=True)
        where = {"name": quote(name, safe="") or None, "namespace": quote(self.namespace, safe="")}
        options = {**more, "serialize": False, "_request_timeout": limits}
        dynamic = self._dynamic
        try:
            if verb == "log":
                path, accept = resource.path(**where) + "/log", {"Accept": "*/*"}
                response = dynamic.request("get", path, header_params=accept, **options)
            else:
                response = getattr(dynamic, _METHODS.get(verb, verb))(resource, **where, **options)
            if not stream:
                _ = response.data  # if the connection breaks here, the request has failed
            return response
        except ApiException as error:
            if error.status == 401 and self._renewed(dynamic):
                return self._send(verb, kind, name, limits=limits, stream=stream, **more)
            raise self._refusal(verb.replace("log", "get"), kind, name, error.status or 0, _answer(error)) from None
        except (HTTPError, OSError) as error:
            raise ApiError(self._unreachable(error)) from None

    def _unreachable(self, error: Exception) -> str:
        return f"the Kubernetes API at {self._configuration.host} cannot be reached: {one_line(error)}"

    @property
    def _where(self) -> str:
        return f"in namespace {self.namespace}" + (f" of cluster {self.cluster}" if self.cluster else "")

    def _refusal(self, verb: str, kind: Kind, name: str, status: int, answer: Mapping[str, Any]) -> ApiError:
        """The server's rejection as a readable sentence."""
        what = f"{kind.name} {name}".strip() + f" {self._where}"
        message, reason = str(answer.get("message") or ""), str(answer.get("reason") or "")
        details = answer.get("details") or {}
        text = f"the Kubernetes API failed to {verb} {what}: {status} {message}"
        # Explain the rejections that a user can resolve
        if status == 401:
            text = f"the Kubernetes API rejects our credentials: sign in again, or fix the service account ({message})"
        elif status == 403 and "exceeded quota" in message:
            reason = "QuotaExceeded"
            text = f"{what} does not fit the namespace's quota: {quota(message)}. {QUOTA_ADVICE}"
        elif status == 403 and "must be created before" in message:
            reason, text = RUNTIME_UNSEEN, f"{what} is rejected: {message}"
        elif status == 403:
            text = (
                f"not allowed to {verb} {kind.plural} {self._where}: {message}. "
                "Apply the service account and the Role in manifests/, and let the step's pod use them"
            )
        elif status == 404 and details.get("kind") == "namespaces":
            reason = "NamespaceNotFound"
            advice = "create it" if self.cluster else "create it, or set deployment_namespace"
            text = f"there is no {self._where.removeprefix('in ')}: {advice}"
        elif status == 404 and (verb == "create" or not name):
            reason = "KindNotFound"
            text = f"the cluster {self.cluster}".rstrip() + f" has no {kind.plural}: {kind.missing}"
        elif status == 404:
            reason, text = "NotFound", f"there is no {what}"
        elif status == 409:
            text = f"{what} already exists, or has changed in the meantime: {message}"
        elif status == 410:
            reason, text = "Expired", f"the history of {what} is no longer available: {message}"
        elif status == 422:
            text = f"the cluster rejects {what}: {message}"
        return ApiError(text, status, reason)


def _lines(response: Any) -> Iterator[str]:
    """The complete lines of a response as they arrive. Closes the connection at the end."""
    from kubernetes.watch.watch import iter_resp_lines
    from urllib3.exceptions import HTTPError, ReadTimeoutError

    try:
        yield from iter_resp_lines(response)
    except (HTTPError, OSError) as error:
        reason = TIMED_OUT if isinstance(error, ReadTimeoutError) else BROKEN
        raise ApiError(f"a connection to the Kubernetes API broke: {one_line(error)}", 0, reason) from None
    finally:
        response.close()


def quota(message: str) -> str:
    """The part of an API server's message that names the quota, the request, the usage and the limit.

    >>> quota('pods "a" is forbidden: exceeded quota: team, requested: pods=1, used: pods=2, limited: pods=2')
    'team, requested: pods=1, used: pods=2, limited: pods=2'
    """
    return message.partition("exceeded quota: ")[2] or message


def _answer(error: Any) -> dict[str, Any]:
    """The `Status` object in an error's body; for any other body, one with its text as the message."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or error.reason)
    try:
        status = json.loads(body)
    except ValueError:
        return {"message": " ".join(body.split())[:300]}
    return status if isinstance(status, dict) else {"message": str(status)}
