"""The error that every etcd operation raises, and its translation from the exceptions of gRPC and etcd3."""

import ssl
from collections.abc import Sequence
from typing import Any, Literal

from trainer.errors import TrainingError
from trainer.etcd.compat import import_etcd3
from trainer.process import connect

Kind = Literal["unreachable", "certificate", "credentials", "permission", "lease", "request"]

# A live etcd that is overloaded or between leaders, or a middlebox that cut the connection
_PROBE = 1.0  # seconds for a connection, and for each answer of a TLS handshake
_TRANSIENT = ("too many requests", "proposal dropped", "raft: stopped", "stream removed", "rst_stream")


class EtcdError(TrainingError):
    """An etcd request failed.

    Attributes:
        kind: "unreachable" (no endpoint answers), "certificate" (TLS failed), "credentials" (user or password is wrong
            or missing), "permission" (the user has no right to the key), "lease" (it has ended), "request" (any other).
        stale_connection: Whether a new connection, perhaps to another endpoint, may help.
    """

    def __init__(self, message: str, kind: Kind, *, stale_connection: bool = False) -> None:
        super().__init__(message)
        self.kind, self.stale_connection = kind, stale_connection


def is_etcd_failure(exception: BaseException) -> bool:
    """Whether the exception comes from etcd or the connection, rather than from a signal handler or a bug."""
    import grpc

    known = (EtcdError, grpc.RpcError, import_etcd3().exceptions.Etcd3Exception, OSError, ValueError)
    return isinstance(exception, known)


def is_dropped_proposal(exception: BaseException) -> bool:
    """Whether a member without a leader dropped the request, which it does at once until the election is over."""
    return "proposal dropped" in _status(exception)[1]


def translate(
    exception: Exception, endpoints: Sequence[str], *, prefix: str, ca: str, user: str, answered: bool
) -> EtcdError:
    """Explain a failure (see `is_etcd_failure`) in terms that a user can act on.

    Args:
        exception: The failure.
        endpoints: The endpoints of all etcd members.
        prefix, ca, user: The client's settings.
        answered: Whether this client has had an answer before, so that its TLS settings must be right.
    """
    import grpc

    if isinstance(exception, EtcdError):
        return exception
    code, details = _status(exception)
    lower, etcd = details.lower(), f"etcd at {', '.join(endpoints)}"

    def unreachable() -> EtcdError:
        hint = "" if answered else _tls_hint(endpoints, ca)
        return EtcdError(f"cannot reach {etcd}{hint}: {details}", "unreachable", stale_connection=True)

    # TLS
    if isinstance(exception, FileNotFoundError | PermissionError):
        return EtcdError(f"cannot read the certificate {exception.filename}", "certificate")
    if any(text in lower for text in ("socket closed", "connection reset")) and "ssl_error" not in lower:
        return unreachable()
    if any(word in lower for word in ("ssl", "tls", "certificate", "handshake")):
        hint = "" if ca else " (no etcd.ca is set)"
        return EtcdError(f"{etcd}: the TLS certificates do not match{hint}: {details}", "certificate")

    # Users and rights
    if "authentication failed" in lower:
        reason = "its token has been revoked" if user.startswith("member:") else "wrong user or ETCD_PASSWORD"
        return EtcdError(f"{etcd} rejects user {user!r}: {reason}", "credentials")
    if "user name is empty" in lower:
        return EtcdError(f"{etcd} requires a user: set etcd.user and ETCD_PASSWORD", "credentials")
    if code == grpc.StatusCode.UNAUTHENTICATED or "revision of auth store is old" in lower:
        # The token has expired, or predates a restart of the server or a change of permissions
        return EtcdError(f"{etcd}: {details}", "credentials", stale_connection=True)
    if code == grpc.StatusCode.PERMISSION_DENIED:
        return EtcdError(f"{etcd} denies access below {prefix}: {details}", "permission")

    # The connection
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return unreachable()
    unsure = code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL)
    if unsure and any(text in lower for text in _TRANSIENT):
        return unreachable()
    if isinstance(exception, ValueError) and "channel" in lower and "closed" in lower:  # closed by another thread
        return unreachable()

    if "requested lease not found" in lower:
        return EtcdError(f"{etcd}: the lease has ended", "lease")
    return EtcdError(f"{etcd}: {details or repr(exception)}", "request")


def _tls_hint(endpoints: Sequence[str], ca: str) -> str:
    """A hint for when only one side speaks TLS. gRPC's own messages differ between versions of etcd."""
    spoken = [speaks for endpoint in endpoints if (speaks := _speaks_tls(endpoint)) is not None]
    if ca and spoken and not any(spoken):
        return " (it does not use TLS, but etcd.ca is set)"
    if not ca and any(spoken):
        return " (it requires TLS, but no etcd.ca is set)"
    return ""


def _speaks_tls(endpoint: str) -> bool | None:
    """Whether an endpoint answers a TLS handshake, whatever its certificate; None if it accepts no connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        connection = connect(endpoint, _PROBE)
    except OSError:
        return None
    try:
        with connection, context.wrap_socket(connection):
            return True
    except TimeoutError:
        return None
    except ssl.SSLError as error:  # an alert about a missing client certificate is also an answer
        return "ALERT" in (error.reason or "")
    except OSError:
        return False


def _status(exception: BaseException) -> tuple[Any, str]:
    """The status code (None: not from gRPC) and the message. etcd3's exceptions have gRPC's as their context."""
    import grpc

    origin = exception if isinstance(exception, grpc.RpcError) else exception.__context__
    if isinstance(origin, grpc.Call):
        return origin.code(), origin.details() or str(exception)
    return None, str(exception)
