"""The Kubernetes API, on plain dicts: a thin layer over the official client's credentials and connections.

What the API refuses becomes an `ApiError` that names the object and says what to do; the rest of the room never sees an
HTTP status that it does not ask for. Paths and verbs: https://kubernetes.io/docs/reference/using-api/api-concepts/
"""

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from trainer.errors import TrainingError, one_line

logger = logging.getLogger(__name__)

Object = dict[str, Any]  # as the Kubernetes API has it

PATIENCE = 120.0  # seconds that an API server may be away (an upgrade, a failover) before that is an error
RETRY_INTERVAL = 1.0  # seconds between two tries, at first; it doubles up to ten
CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 60.0  # seconds of one request
ANSWER_TIMEOUT = 10.0  # seconds for the API server, or a kubelet through it, to answer what takes no time
LOG_TIMEOUT = 30.0  # seconds without a line after which a followed log is asked for again: it may be a dead connection
WATCH_SECONDS = 60  # of one watch; the next one begins at the last one's version
PAGE = 500  # objects in one answer to `list`

BROKEN, TIMED_OUT = "Broken", "TimedOut"  # reasons: a connection was cut; nothing came for too long
API_SILENT = "the API server does not answer"
_MERGE_PATCH = "application/merge-patch+json"
PASSING = {0, 429, 500, 502, 503, 504}  # statuses of the server's trouble, which may pass; 0: it did not answer


@dataclass(frozen=True)
class Kind:
    """A kind of objects, and where the API has it.

    Attributes:
        missing: Why an API server may not know it.
    """

    name: str
    prefix: str
    plural: str
    missing: str = "this API server is too old"


POD = Kind("Pod", "/api/v1", "pods")
CLAIM = Kind("PersistentVolumeClaim", "/api/v1", "persistentvolumeclaims")
CONFIG_MAP = Kind("ConfigMap", "/api/v1", "configmaps")
SECRET = Kind("Secret", "/api/v1", "secrets")
EVENT = Kind("Event", "/api/v1", "events")
JOB = Kind("Job", "/apis/batch/v1", "jobs")
NETWORK_POLICY = Kind("NetworkPolicy", "/apis/networking.k8s.io/v1", "networkpolicies")
PYTORCH_JOB = Kind(
    "PyTorchJob",
    "/apis/kubeflow.org/v1",
    "pytorchjobs",
    "its CustomResourceDefinition is missing: install Kubeflow's training operator (1.9), which brings it",
)
WORKFLOW = Kind(
    "Workflow",
    "/apis/argoproj.io/v1alpha1",
    "workflows",
    "its CustomResourceDefinition is missing: Kubeflow Pipelines runs on Argo Workflows, which brings it",
)
KINDS = {kind.name: kind for kind in (POD, CLAIM, CONFIG_MAP, SECRET, EVENT, JOB, NETWORK_POLICY, PYTORCH_JOB)}


class ApiError(TrainingError):
    """What the API server has refused, or that it cannot be reached.

    Attributes:
        status: The HTTP status; 0 if there was no answer.
        reason: The API's word for it: `NotFound`, `AlreadyExists`, `Conflict`, `Expired`, `Forbidden`, ...; of a stream
            that was answered and did not end well, `BROKEN` or `TIMED_OUT`.
    """

    def __init__(self, message: str, status: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Silence:
    """That nothing can be heard of a pod, or of the API's objects.

    Attributes:
        since: When something was heard last, in seconds of `time.monotonic`.
        why: Who does not answer.
    """

    since: float
    why: str


class Client:
    """The objects of one namespace.

    The cluster and the credentials are KUBECONFIG's, else those of the pod that this runs in, else `~/.kube/config`'s.

    Args:
        namespace: Of all objects.
        patience: Seconds that the API server may be away; an attribute, too.

    Raises:
        TrainingError: There is no cluster to speak to. From every method `ApiError`: refused, or not reached.
    """

    def __init__(self, namespace: str, patience: float = PATIENCE) -> None:
        from kubernetes import client, config

        self.namespace, self.patience = namespace, patience
        configuration = client.Configuration()
        file = os.environ.get("KUBECONFIG")
        try:
            if not file and "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(client_configuration=configuration)
            else:
                config.load_kube_config(config_file=file, client_configuration=configuration)
        except (config.ConfigException, OSError) as error:
            raise TrainingError(
                f"no cluster to train on ({one_line(error)}): run in a cluster, or name one by KUBECONFIG"
            ) from None
        configuration.retries = False  # that is done here
        configuration.connection_pool_maxsize = 256  # each followed log and watch holds a connection
        self._host = configuration.host
        self._api = client.ApiClient(configuration)

    def get(self, kind: Kind, name: str, *, timeout: float | None = None) -> Object | None:
        """The object; None if there is none.

        Args:
            timeout: Seconds for one try, which is the only one; else it is tried again for `patience`.
        """
        try:
            return self._json("get", "GET", kind, name, timeout=timeout)
        except ApiError as error:
            if error.reason == "NotFound":
                return None
            raise

    def list(
        self, kind: Kind, labels: str = "", fields: str = "", *, timeout: float | None = None
    ) -> tuple[list[Object], str]:
        """All objects that the selectors select, and the `resourceVersion` from which a watch goes on.

        Args:
            timeout: As `get` has it, for each page.
        """
        found: list[Object] = []
        query = _selectors(labels, fields) | {"limit": str(PAGE)}
        while True:
            page = self._json("list", "GET", kind, query=query, timeout=timeout)
            found += page["items"] or []
            metadata = page["metadata"]
            if not metadata.get("continue"):
                return found, metadata["resourceVersion"]
            query["continue"] = metadata["continue"]

    def create(self, body: Object) -> Object:
        """Create an object. `ApiError.reason` is `AlreadyExists` if one of its name is there."""
        return self._json("create", "POST", KINDS[body["kind"]], body=body, shown=body["metadata"]["name"])

    def patch(self, kind: Kind, name: str, change: Object) -> Object:
        """Merge a change into an object (RFC 7386)."""
        return self._json("patch", "PATCH", kind, name, body=change)

    def delete(self, kind: Kind, name: str) -> bool:
        """Delete an object, and in the background what it owns. False if there was none."""
        try:
            self._json("delete", "DELETE", kind, name, body={"propagationPolicy": "Background"})
        except ApiError as error:
            if error.reason == "NotFound":
                return False
            raise
        return True

    def delete_all(self, kind: Kind, labels: str) -> None:
        """Delete all objects that the selector selects by one request, and in the background what they own."""
        body = {"propagationPolicy": "Background"}
        self._json("deletecollection", "DELETE", kind, query=_selectors(labels, ""), body=body)

    def watch(
        self, kind: Kind, version: str, labels: str = "", *, begun: Callable[[], None] = lambda: None
    ) -> Iterator[Object]:
        """What has changed since `version`: `{type: ADDED | MODIFIED | DELETED | BOOKMARK, object}`, as it happens.

        It ends after `WATCH_SECONDS`, or when the connection does; one begins again with the last object's version.

        Args:
            begun: Called when the API server has taken the request.

        Raises:
            ApiError: With status 410, the version is too old: list again.
        """
        query = _selectors(labels, "") | {
            "watch": "true",
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        with self._stream("watch", kind, "", query, WATCH_SECONDS + ANSWER_TIMEOUT) as lines:
            begun()
            for line in lines:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    answer = event["object"]
                    raise self._refusal("watch", kind, "", int(answer.get("code") or 500), answer)
                yield event

    def log(
        self, pod: str, container: str, since: str = "", *, follow: bool = True, previous: bool = False
    ) -> Iterator[str]:
        """The lines of a container, each after the time at which it was said (RFC 3339) and a space.

        Args:
            since: Time from which on, RFC 3339; whole seconds count.
            follow: Go on until the container ends, or the connection does, or is silent for `LOG_TIMEOUT`.
        """
        query = {"container": container, "timestamps": "true"}
        query |= {"follow": "true"} if follow else {}
        query |= {"sinceTime": since} if since else {}
        limit = LOG_TIMEOUT if follow else ANSWER_TIMEOUT
        with self._stream("get", POD, pod, query, limit, "/log", whole=follow) as lines:
            for line in lines:
                yield line.decode(errors="replace")

    def _json(
        self,
        verb: str,
        method: str,
        kind: Kind,
        name: str = "",
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        shown: str = "",
        timeout: float | None = None,
    ) -> Any:
        """One request, made again while the server is away, unless `timeout` allows only one try."""
        deadline, pause = time.monotonic() + (self.patience if timeout is None else 0.0), RETRY_INTERVAL
        limits = (CONNECT_TIMEOUT, READ_TIMEOUT) if timeout is None else (timeout, timeout)
        while True:
            try:
                response = self._request(verb, method, kind, name, query, body, limits, shown=shown)
                return json.loads(response.data)
            except ApiError as error:
                if error.status not in PASSING or time.monotonic() + pause > deadline:
                    raise
                logger.warning("%s; trying again", error)
            time.sleep(pause)
            pause = min(2 * pause, 10.0)

    def _stream(
        self,
        verb: str,
        kind: Kind,
        name: str,
        query: Mapping[str, str],
        silence: float | None,
        part: str = "",
        *,
        whole: bool = True,
    ) -> "_Lines":
        """One request whose answer comes line by line.

        Args:
            silence: Seconds without a line that are borne.
            whole: Drop what comes after the last newline: a kubelet, or a proxy, that ends in the middle of a line ends
                the answer in good order.
        """
        timeout = CONNECT_TIMEOUT, silence
        return _Lines(self._request(verb, "GET", kind, name, query, None, timeout, part=part, stream=True), whole)

    def _request(
        self,
        verb: str,
        method: str,
        kind: Kind,
        name: str,
        query: Mapping[str, str] | None,
        body: Object | None,
        timeout: tuple[float, float | None],
        *,
        part: str = "",
        shown: str = "",
        stream: bool = False,
    ) -> Any:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        path = f"{kind.prefix}/namespaces/{quote(self.namespace, safe='')}/{kind.plural}"
        path += f"/{quote(name, safe='')}{part}" if name else ""
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if method == "PATCH":
            headers["Content-Type"] = _MERGE_PATCH
        if part:
            headers["Accept"] = "*/*"
        try:
            response = self._api.call_api(
                path,
                method,
                query_params=list((query or {}).items()),
                header_params=headers,
                body=body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                _request_timeout=timeout,
            )
            if not stream:
                _ = response.data  # read here, where a connection that breaks is still the request's failure
            return response
        except ApiException as error:
            raise self._refusal(verb, kind, shown or name, error.status or 0, _answer(error), bool(shown)) from None
        except (HTTPError, OSError) as error:
            why = f"the Kubernetes API at {self._host} cannot be reached: {one_line(error)}"
            raise ApiError(why, 0, "Unreachable") from None

    def _refusal(
        self, verb: str, kind: Kind, name: str, status: int, answer: Mapping[str, Any], creating: bool = False
    ) -> ApiError:
        """What the server has refused, in a person's words."""
        what = f"{kind.name} {name}".strip() + f" in namespace {self.namespace}"
        said, reason = str(answer.get("message") or ""), str(answer.get("reason") or "")
        details = answer.get("details") or {}
        if status == 401:
            text = f"the Kubernetes API does not know who we are: sign in again, or mend the service account ({said})"
        elif status == 403 and "exceeded quota" in said:
            reason = "QuotaExceeded"
            text = f"{what} does not fit the namespace's quota: {quota(said)}. {QUOTA_ADVICE}"
        elif status == 403:
            text = (
                f"not allowed to {verb} {kind.plural} in namespace {self.namespace}: {said}. "
                "Apply the service account and the Role in manifests/, and let the step's pod use them"
            )
        elif status == 404 and details.get("kind") == "namespaces":
            reason = "NamespaceNotFound"
            text = f"there is no namespace {self.namespace}: make it, or set deployment_namespace"
        elif status == 404 and (creating or not name):
            reason = "KindNotFound"
            text = f"the cluster has no {kind.plural}: {kind.missing}"
        elif status == 404:
            reason, text = "NotFound", f"there is no {what}"
        elif status == 409:
            text = f"{what} is there already, or has changed meanwhile: {said}"
        elif status == 410:
            reason, text = "Expired", f"what {what} was is no longer known: {said}"
        elif status == 422:
            text = f"the cluster does not take {what}: {said}"
        else:
            text = f"the Kubernetes API would not {verb} {what}: {status} {said}"
        return ApiError(text, status, reason)


class _Lines:
    """The lines of a response as they come. The connection is closed in the end: what is left in it is of no use."""

    def __init__(self, response: Any, whole: bool) -> None:
        self._response, self._whole = response, whole

    def __enter__(self) -> Iterator[bytes]:
        return self._lines()

    def __exit__(self, *exception: object) -> None:
        self._response.close()

    def _lines(self) -> Iterator[bytes]:
        from urllib3.exceptions import HTTPError, ReadTimeoutError

        rest = b""
        try:
            for part in self._response.stream(65536, decode_content=False):
                *lines, rest = (rest + part).split(b"\n")
                yield from (line for line in lines if line)
        except (HTTPError, OSError) as error:
            reason = TIMED_OUT if isinstance(error, ReadTimeoutError) else BROKEN
            raise ApiError(f"a connection to the Kubernetes API broke: {one_line(error)}", 0, reason) from None
        if rest and not self._whole:
            yield rest


QUOTA_ADVICE = "Ask for a larger quota, or for less: nodes, gpu_count, cpu_cores, memory_gb, storage.size_gb"


def quota(message: str) -> str:
    """The part of an API server's message that says which quota, what was asked for, and what there is.

    >>> quota('pods "a" is forbidden: exceeded quota: team, requested: pods=1, used: pods=2, limited: pods=2')
    'team, requested: pods=1, used: pods=2, limited: pods=2'
    """
    return message.partition("exceeded quota: ")[2] or message


def _selectors(labels: str, fields: str) -> dict[str, str]:
    return ({"labelSelector": labels} if labels else {}) | ({"fieldSelector": fields} if fields else {})


def _answer(error: Any) -> dict[str, Any]:
    """The `Status` in an answer's body; of another body, its text."""
    body = error.body.decode(errors="replace") if isinstance(error.body, bytes) else str(error.body or error.reason)
    try:
        status = json.loads(body)
    except ValueError:
        return {"message": " ".join(body.split())[:300]}
    return status if isinstance(status, dict) else {"message": str(status)}
