"""The error that every etcd operation raises."""

from typing import Literal

from trainer.errors import TrainingError

Kind = Literal["unreachable", "certificate", "credentials", "permission", "lease", "request"]


class EtcdError(TrainingError):
    """An etcd request failed.

    Attributes:
        kind: "unreachable" (no endpoint answers), "certificate" (TLS failed), "credentials" (user or password is wrong
            or missing), "permission" (the user has no right to the key), "lease" (it has ended), "request" (any other).
        stale_connection: A new connection, perhaps to another endpoint, may help.
    """

    def __init__(self, message: str, kind: Kind, *, stale_connection: bool = False) -> None:
        super().__init__(message)
        self.kind = kind
        self.stale_connection = stale_connection
