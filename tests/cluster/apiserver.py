"""A stand-in for a Kubernetes API server, at the HTTP edge: the real client speaks to it through a kubeconfig.

It keeps objects and their versions, answers list, watch, get, create, patch, delete and logs as it does, checks
what is created against the published schemas, collects what owners leave behind, and can be told to be difficult.
"""

import base64
import copy
import itertools
import json
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, tzinfo
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.cluster.admission import Refusal, Webhooks
from tests.cluster.forwarding import Forwarding
from tests.cluster.role import allows, permissions
from tests.kubernetes_schemas import is_known, validate

Object = dict[str, Any]

PLURALS = {
    "pods": ("", "v1", "Pod"),
    "persistentvolumeclaims": ("", "v1", "PersistentVolumeClaim"),
    "configmaps": ("", "v1", "ConfigMap"),
    "secrets": ("", "v1", "Secret"),
    "events": ("", "v1", "Event"),
    "jobs": ("batch", "v1", "Job"),
    "networkpolicies": ("networking.k8s.io", "v1", "NetworkPolicy"),
    "pytorchjobs": ("kubeflow.org", "v1", "PyTorchJob"),
    "trainjobs": ("trainer.kubeflow.org", "v1alpha1", "TrainJob"),
    "trainingruntimes": ("trainer.kubeflow.org", "v1alpha1", "TrainingRuntime"),
    "workflows": ("argoproj.io", "v1alpha1", "Workflow"),
    "services": ("", "v1", "Service"),
    "serviceaccounts": ("", "v1", "ServiceAccount"),
    "statefulsets": ("apps", "v1", "StatefulSet"),
    "poddisruptionbudgets": ("policy", "v1", "PodDisruptionBudget"),
    "roles": ("rbac.authorization.k8s.io", "v1", "Role"),
    "rolebindings": ("rbac.authorization.k8s.io", "v1", "RoleBinding"),
}
_PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/(?P<version>v1|v1alpha1)/namespaces/(?P<namespace>[^/]+)/(?P<plural>[a-z]+)"
    r"(?:/(?P<name>[^/]+)(?:/(?P<part>log|portforward))?)?"
)


class ApiServer(ThreadingHTTPServer):
    """The server, and the cluster's store.

    Attributes:
        used: Every (verb, group, resource, name) that was asked for.
        granted: What the caller's Role allows.
        forbidden: (verb, resource)s that it does not, in spite of that.
        missing: Resources that the server does not know.
        quota: Resources of which nothing more may be created, and what the quota says.
        outages: How many requests are broken off before they are answered.
        streams: How often a watch was begun, or a log read.
        frozen: Nodes whose kubelet does not answer: what their pods say is kept, and cannot be read.
        token: What clients have to present.
        zone: Of the nodes, in which they give the time of what containers say.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.namespaces = {"default"}
        self.used: set[tuple[str, str, str, str]] = set()
        self.granted = permissions()
        self.forbidden: set[tuple[str, str]] = set()
        self.missing: set[str] = set()
        self.quota: dict[str, str] = {}
        self.outages = 0
        self.token = "a-bearer-token"
        self.frozen: set[str] = set()
        self._webhooks = Webhooks(lambda plural, namespace: self.all(plural, namespace))
        self._away = False
        self.page = 1000
        self.streams = 0
        self.changed = threading.Condition()
        self._objects: dict[tuple[str, str, str], Object] = {}
        self._history: list[tuple[int, str, str, str, Object]] = []  # version, event, plural, namespace, object
        self._forgotten = 0  # versions up to this one are too old to watch from
        self._versions = itertools.count(1)
        self._version = 0
        self._generation = 0  # streams of another one are to end
        self._logs: dict[str, list[str]] = {}  # by pod's uid
        self._moments = itertools.count()
        self._cut = False  # streams that are to end are cut off
        self._torn = ""  # uid of the pod whose log's end is in the middle of a line
        self.zone: tzinfo = UTC

    # What tests do

    def kubeconfig(self, path: Path) -> Path:
        """Write the kubeconfig by which clients find the server."""
        path.write_text(self.kubeconfig_text())
        return path

    @property
    def kubeconfig_data(self) -> str:
        """The same as the content of a Secret."""
        return base64.b64encode(self.kubeconfig_text().encode()).decode()

    def kubeconfig_text(self) -> str:
        """The same as text."""
        cluster = {"name": "stand-in", "cluster": {"server": f"http://127.0.0.1:{self.server_port}"}}
        user = {"name": "tester", "user": {"token": self.token}}
        context = {"name": "tests", "context": {"cluster": "stand-in", "user": "tester"}}
        content = {"clusters": [cluster], "users": [user], "contexts": [context], "current-context": "tests"}
        return yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **content})

    def all(self, plural: str, namespace: str = "default") -> dict[str, Object]:
        """The objects of a kind, by name."""
        with self.changed:
            found = {key[2]: value for key, value in self._objects.items() if key[:2] == (plural, namespace)}
            return copy.deepcopy(found)

    @property
    def version(self) -> int:
        """Of the last change."""
        return self._version

    def peek(self, plural: str, name: str, namespace: str = "default") -> Object | None:
        """An object as it is kept: not to be changed, and only while `changed` is held."""
        return self._objects.get((plural, namespace, name))

    def everything(self) -> list[Object]:
        """Every object in every state that it ever had, and every line of a log; but no Secret."""
        with self.changed:
            states = [one for _, _, plural, _, one in self._history if plural != "secrets"]
            return [*states, {"logs": list(self._logs.values())}]

    def drop_streams(self, *, cut: bool = False) -> None:
        """End every watch and every followed log; or cut their connections in the middle of a chunk."""
        with self.changed:
            self._cut = cut
            self._generation += 1
            self.changed.notify_all()

    def tear(self, uid: str, line: str) -> None:
        """A pod says a line, in the middle of which its kubelet ends: its log's followers get half of it, and an end in
        good order."""
        with self.changed:
            self._torn = uid
            self.log(uid, line)
            self.drop_streams()

    def go_away(self) -> None:
        """Break off every connection, and every request from now on, until `come_back`."""
        self._away = True
        self.drop_streams(cut=True)

    def come_back(self) -> None:
        self._away = False

    def breaks_off(self) -> bool:
        """Whether a request gets no answer."""
        if self.outages > 0:
            self.outages -= 1
            return True
        return self._away

    def freeze(self, node: str) -> None:
        """Its kubelet does not answer, though connections to it stay open."""
        with self.changed:
            self.frozen.add(node)

    def thaw(self, node: str) -> None:
        with self.changed:
            self.frozen.discard(node)
            self.changed.notify_all()

    def forget(self) -> None:
        """Compact: nobody can watch from an older version than the newest (410 Gone)."""
        with self.changed:
            self._forgotten = self._version
            self._history.clear()

    def wait_until(self, predicate: Callable[[], Any], seconds: float = 300.0) -> Any:
        """Return what the predicate returns, once that is something."""
        deadline = time.monotonic() + seconds
        with self.changed:
            while not (found := predicate()):
                assert time.monotonic() < deadline, "the cluster did not come to be as it should"
                self.changed.wait(0.2)
        return found

    # What controllers and kubelets do: as the API does, without its checks

    def put(self, plural: str, body: Object, namespace: str = "default") -> Object:
        """Create an object."""
        with self.changed:
            name = body["metadata"]["name"]
            if (plural, namespace, name) in self._objects:
                raise Refusal(409, "AlreadyExists", f'{plural} "{name}" already exists', name=name, kind=plural)
            metadata = {"uid": str(uuid.uuid4()), "creationTimestamp": _now(), "namespace": namespace}
            content = copy.deepcopy(body)
            content["metadata"] = {**metadata, **content["metadata"]}
            self._keep("ADDED", plural, namespace, content)
            return copy.deepcopy(content)

    def update(self, plural: str, name: str, change: Callable[[Object], None], namespace: str = "default") -> None:
        """Change an object, if it is there."""
        with self.changed:
            if (found := self._objects.get((plural, namespace, name))) is not None:
                content = copy.deepcopy(found)
                change(content)
                if content != found:
                    self._keep("MODIFIED", plural, namespace, content)

    def remove(self, plural: str, name: str, namespace: str = "default") -> None:
        """Delete an object at once, and what it owns."""
        with self.changed:
            gone = self._objects.pop((plural, namespace, name), None)
            if gone is None:
                return
            self._tell("DELETED", plural, namespace, gone)
            if plural == "pods":
                for claim in self.all("persistentvolumeclaims", namespace).values():
                    if "deletionTimestamp" in claim["metadata"]:
                        self._delete("persistentvolumeclaims", namespace, claim["metadata"]["name"])
            for (kind, space, owned), one in list(self._objects.items()):
                owners = one["metadata"].get("ownerReferences", [])
                if owners and all(owner["uid"] == gone["metadata"]["uid"] for owner in owners):
                    self._delete(kind, space, owned)

    def delete(self, plural: str, name: str, namespace: str = "default") -> None:
        """Delete an object as a client does, in the background, if it is there."""
        with self.changed:
            if (plural, namespace, name) in self._objects:
                self._delete(plural, namespace, name)

    def log(self, uid: str, line: str) -> None:
        """A pod says something."""
        with self.changed:
            moment = datetime.now(self.zone).isoformat(timespec="seconds")
            moment = f"{moment[:19]}.{next(self._moments):09d}{moment[19:].replace('+00:00', 'Z')}"
            self._logs.setdefault(uid, []).append(f"{moment} {line}")
            self.changed.notify_all()

    def said(self, uid: str) -> list[str]:
        """What a pod has said, line by line, also one that is gone."""
        with self.changed:
            return [line.partition(" ")[2] for line in self._logs.get(uid, [])]

    def _keep(self, event: str, plural: str, namespace: str, content: Object) -> None:
        self._objects[plural, namespace, content["metadata"]["name"]] = content
        self._tell(event, plural, namespace, content)

    def _tell(self, event: str, plural: str, namespace: str, content: Object) -> None:
        self._version = next(self._versions)
        content["metadata"]["resourceVersion"] = str(self._version)
        self._history.append((self._version, event, plural, namespace, copy.deepcopy(content)))
        self.changed.notify_all()

    def _delete(self, plural: str, namespace: str, name: str) -> None:
        """Pods are given time to end; a kubelet removes them then. A claim stays while a pod has it, even one that has
        ended (kubernetes.io/pvc-protection)."""
        found = self._objects[plural, namespace, name]
        if plural == "pods" and "nodeName" in found["spec"] and _lives(found):
            self.update(plural, name, lambda pod: pod["metadata"].update(deletionTimestamp=_now()), namespace)
        elif plural == "persistentvolumeclaims" and any(
            volume.get("persistentVolumeClaim", {}).get("claimName") == name
            for pod in self.all("pods", namespace).values()
            for volume in pod["spec"].get("volumes", [])
        ):
            self.update(plural, name, lambda one: one["metadata"].update(deletionTimestamp=_now()), namespace)
        else:
            self.remove(plural, name, namespace)

    def _ends(self, generation: int) -> bool:
        """Whether a stream is to end. Raises ConnectionAbortedError if it is to be cut."""
        if self._generation == generation:
            return False
        if self._cut:
            raise ConnectionAbortedError
        return True

    # What clients ask for

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Object | Iterator[bytes] | Forwarding:
        found = _PATH.fullmatch(path)
        if found is None or found["plural"] not in PLURALS or found["plural"] in self.missing:
            raise _unknown_path()
        group, namespace, plural, name = found["group"] or "", found["namespace"], found["plural"], found["name"] or ""
        if PLURALS[plural][:2] != (group, found["version"]):
            raise _unknown_path()
        resource = f"{plural}/{found['part']}" if found["part"] else plural
        verb = _verb(method, name, query)
        for right in (verb, "create") if found["part"] == "portforward" else (verb,):  # since 1.35
            self.used.add((right, group, resource, name))
            if (right, resource) in self.forbidden or not allows(self.granted, (right, group, resource, name)):
                user = f'User "runner" cannot {right} resource "{resource}" in API group "{group}"'
                raise Refusal(403, "Forbidden", f"{plural} is forbidden: {user}", kind=plural)
        with self.changed:
            if verb == "create":
                return self._create(plural, namespace, body)
            if verb == "list":
                return self._list(plural, namespace, query)
            if verb == "watch":
                return self._watch(plural, namespace, query)
            if verb == "deletecollection":
                for other in self._list(plural, namespace, query)["items"]:
                    self._delete(plural, namespace, other["metadata"]["name"])
                return {}
            one = self._objects.get((plural, namespace, name))
            if one is None:
                raise Refusal(404, "NotFound", f'{plural} "{name}" not found', name=name, kind=plural)
            if found["part"] == "log":
                return self._follow(one, query)
            if found["part"] == "portforward":
                return Forwarding(int(query["ports"]))
            if verb == "patch":
                content = _merged(one, body)
                content = self._check(content, one)
                self._keep("MODIFIED", plural, namespace, content)
                return copy.deepcopy(content)
            if verb == "delete":
                wanted, uid = (body or {}).get("preconditions", {}).get("uid"), one["metadata"]["uid"]
                if wanted not in (None, uid):
                    message = f"Precondition failed: UID in precondition: {wanted}, UID in object meta: {uid}"
                    raise Refusal(409, "Conflict", message, name=name, kind=plural)
                self._delete(plural, namespace, name)
            return copy.deepcopy(one)

    def _create(self, plural: str, namespace: str, body: Object) -> Object:
        if namespace not in self.namespaces:
            raise Refusal(404, "NotFound", f'namespaces "{namespace}" not found', name=namespace, kind="namespaces")
        name = body["metadata"]["name"]
        if plural in self.quota:
            message = f'{plural} "{name}" is forbidden: exceeded quota: {self.quota[plural]}'
            raise Refusal(403, "Forbidden", message, name=name, kind=plural)
        body = self._check(body)
        if (plural, namespace, name) in self._objects:
            raise Refusal(409, "AlreadyExists", f'{plural} "{name}" already exists', name=name, kind=plural)
        return self.put(plural, body, namespace)

    def _check(self, body: Object, before: Object | None = None) -> Object:
        """Validate an object that is created, or changed. Returns it with its defaults."""
        content = {key: value for key, value in body.items() if key != "status"}
        if is_known(body["kind"]):
            try:
                validate(content)
            except Exception as error:
                raise Refusal(
                    422, "Invalid", f"{body['kind']} {body['metadata']['name']} is invalid: {error}"
                ) from None
        return self._webhooks.admit(body, before)

    def _list(self, plural: str, namespace: str, query: dict[str, str]) -> Object:
        found = [
            value
            for key, value in sorted(self._objects.items())
            if key[:2] == (plural, namespace) and _selected(value, query)
        ]
        start, size = int(query.get("continue", 0)), min(self.page, int(query.get("limit", self.page)))
        metadata = {"resourceVersion": str(self._version)}
        metadata |= {"continue": str(start + size)} if start + size < len(found) else {}
        kind = PLURALS[plural][2]
        return {"kind": f"{kind}List", "metadata": metadata, "items": copy.deepcopy(found[start : start + size])}

    def _watch(self, plural: str, namespace: str, query: dict[str, str]) -> Iterator[bytes]:
        version, generation = int(query["resourceVersion"]), self._generation
        self.streams += 1
        deadline = time.monotonic() + float(query.get("timeoutSeconds", 300))

        def events() -> Iterator[bytes]:
            nonlocal version
            while True:
                with self.changed:
                    if version < self._forgotten:
                        gone = Refusal(410, "Expired", f"too old resource version: {version} ({self._forgotten})")
                        batch = [{"type": "ERROR", "object": gone.body}]
                    else:
                        new = [entry for entry in self._history if entry[0] > version]
                        batch = [
                            {"type": event, "object": one}
                            for _, event, kind, space, one in new
                            if (kind, space) == (plural, namespace) and _selected(one, query)
                        ]
                        version = new[-1][0] if new else version
                    if self._ends(generation) or time.monotonic() > deadline:
                        return
                    if not batch:
                        self.changed.wait(0.5)
                        continue
                for event in batch:
                    yield json.dumps(event).encode() + b"\n"
                if batch[0]["type"] == "ERROR":
                    return

        return events()

    def _follow(self, pod: Object, query: dict[str, str]) -> Iterator[bytes]:
        uid, name, namespace = (pod["metadata"][key] for key in ("uid", "name", "namespace"))
        if not pod.get("status", {}).get("containerStatuses"):
            raise Refusal(400, "BadRequest", f'container "{query["container"]}" in pod "{name}" is waiting to start')
        node = pod["spec"].get("nodeName", "")
        if node in self.frozen:  # as the real one says it, after ten seconds
            address = f"https://{node}:10250/containerLogs/{namespace}/{name}/{query['container']}"
            raise Refusal(500, "InternalError", f'Get "{address}": net/http: TLS handshake timeout')
        generation, since = self._generation, _instant(query.get("sinceTime", "1970-01-01T00:00:00Z"))
        self.streams += 1

        def lines() -> Iterator[bytes]:
            told = 0
            while True:
                with self.changed:
                    said = self._logs.get(uid, [])[told:]
                    if ends := self._ends(generation):
                        said = said[:1] if self._torn == uid else []
                if ends:
                    yield from (line[: len(line) // 2 + 15].encode() for line in said)  # more than its time
                    return
                with self.changed:
                    if node in self.frozen:
                        self.changed.wait(0.1)
                        continue
                    said = self._logs.get(uid, [])[told:]
                    now = self._objects.get(("pods", namespace, name))
                    over = now is None or now["metadata"]["uid"] != uid or not _lives(now)
                    if not said and not over and "follow" in query:
                        self.changed.wait(0.5)
                        continue
                told += len(said)
                for line in said:
                    if _instant(line) >= since:
                        yield line.encode() + b"\n"
                if over or "follow" not in query:
                    return

        return lines()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ApiServer

    def reply(self) -> None:
        if self.server.breaks_off():
            self.close_connection = True
            return
        url = urlsplit(self.path)
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size)) if size else None
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        try:
            if self.headers.get("Authorization") != f"Bearer {self.server.token}":
                raise Refusal(401, "Unauthorized", "Unauthorized")
            content = self.server.answer(self.command, url.path, query, body)
        except Refusal as refusal:
            self._send(refusal.status, refusal.body)
            return
        if isinstance(content, Forwarding):
            content.serve(self)
            return
        if isinstance(content, dict):
            self._send(201 if self.command == "POST" else 200, content)
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for part in content:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.write(b"0\r\n\r\n")
        except OSError:  # the client has gone, or is cut off
            self.close_connection = True

    do_GET = do_POST = do_PATCH = do_DELETE = reply  # noqa: N815

    def _send(self, status: int, content: Object | str) -> None:
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[ApiServer]:
    """An API server that runs."""
    server = ApiServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.drop_streams()
        server.shutdown()
        thread.join()
        server.server_close()


def _unknown_path() -> Refusal:
    refusal = Refusal(404, "NotFound", "")
    refusal.body = "404 page not found\n"
    return refusal


def _verb(method: str, name: str, query: dict[str, str]) -> str:
    if method == "GET":
        return "get" if name else "watch" if "watch" in query else "list"
    return {"POST": "create", "PATCH": "patch", "DELETE": "delete" if name else "deletecollection"}[method]


def _selected(one: Object, query: dict[str, str]) -> bool:
    labels = one["metadata"].get("labels", {})
    for part in filter(None, query.get("labelSelector", "").split(",")):
        key, _, value = part.partition("=")
        if labels.get(key) != value:
            return False
    for part in filter(None, query.get("fieldSelector", "").split(",")):
        path, _, value = part.partition("=")
        found: Any = one
        for key in path.split("."):
            found = (found or {}).get(key)
        if found != value:
            return False
    return True


def _merged(one: Any, change: Any) -> Any:
    """RFC 7386."""
    if not isinstance(change, dict):
        return copy.deepcopy(change)
    result = dict(one) if isinstance(one, dict) else {}
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key), value)
    return result


def _lives(pod: Object) -> bool:
    """Whether a pod's container runs, or will."""
    statuses = pod.get("status", {}).get("containerStatuses", [])
    return not statuses or "terminated" not in statuses[0]["state"]


def _instant(line: str) -> datetime:
    """The whole second at which a line of a log was said."""
    moment = line.partition(" ")[0]
    return datetime.fromisoformat(moment[:19] + moment[19:].lstrip(".0123456789"))


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
