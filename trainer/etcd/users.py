"""Creating etcd's users and enabling authentication: `python -m trainer.etcd.users`, a Job in manifests/overlays/prod.

The user `etcd.user` may read and write below `elastic.etcd.prefix` and nowhere else. Passwords come from the
environment: ETCD_ROOT_PASSWORD for root, ETCD_PASSWORD for the user. The command can be repeated: existing users and
roles are kept, and the user's password is updated.

https://etcd.io/docs/v3.5/op-guide/authentication/rbac/
"""

import os
from pathlib import Path
from typing import Any

from trainer.config import TrainingConfig, load_config
from trainer.errors import ConfigError, TrainingError, run_main
from trainer.etcd.compat import import_etcd3
from trainer.etcd.values import EtcdValues
from trainer.timeouts import EtcdTimeouts

ROOT = "root"  # etcd's name for the administrator, and for its role
MEMBER = "member:"  # prefix of the users that a run's machines have received with a token


def main() -> int:
    """Read the parameters from the environment and create the users. Returns the exit status."""
    config = load_config()
    root_password, password = (os.environ.get(name, "") for name in ("ETCD_ROOT_PASSWORD", "ETCD_PASSWORD"))
    for field, given, allowed in (
        ("ETCD_ROOT_PASSWORD", root_password, "must be set in the environment"),
        ("ETCD_PASSWORD", password, "must be set in the environment"),
        ("etcd.endpoints", config.etcd.endpoints, "must be given"),
        ("etcd.user", config.etcd.user, "must be given"),
    ):
        if not given:
            raise ConfigError(field, "", allowed)
    enable_users(config, root_password, password)
    print(f"etcd now requires a password; {config.etcd.user} may use {config.elastic.etcd.prefix}/", flush=True)
    return 0


def enable_users(
    config: TrainingConfig, root_password: str, password: str, timeouts: EtcdTimeouts = EtcdTimeouts()
) -> None:
    """Create root and the user `etcd.user` with their passwords, and enable authentication.

    Raises:
        TrainingError: No endpoint answers, or etcd rejects a request.
    """
    import grpc

    reasons = []
    files = (config.etcd.ca, config.etcd.key, config.etcd.cert)
    ca, key, cert = (Path(path).read_bytes() if path else None for path in files)
    for endpoint in config.etcd.endpoints:
        channel = (
            grpc.secure_channel(endpoint, grpc.ssl_channel_credentials(ca, key, cert))
            if ca
            else grpc.insecure_channel(endpoint)
        )
        with channel:
            try:
                _Users(channel, timeouts.admin_call).enable(config, root_password, password)
                return
            except grpc.RpcError as error:
                reasons.append(f"{endpoint}: {error.details() or error.code().name}")
    raise TrainingError(f"etcd's users could not be created: {'; '.join(reasons)}")


class _Users:
    """The Auth service of one etcd member."""

    def __init__(self, channel: Any, timeout: float) -> None:
        self._rpc: Any = import_etcd3().etcdrpc
        self._stub, self._timeout = self._rpc.AuthStub(channel), timeout
        self._token: tuple[tuple[str, str], ...] = ()

    def enable(self, config: TrainingConfig, root_password: str, password: str) -> None:
        import grpc

        # Log in as root if authentication is already enabled
        try:
            self._token = (("token", self._call("Authenticate", name=ROOT, password=root_password).token),)
        except grpc.RpcError as error:
            if "authentication is not enabled" not in (error.details() or ""):
                raise
        # Create each user, with a role of the same name
        user, prefix = config.etcd.user, config.elastic.etcd.prefix.rstrip("/") + "/"
        for name, secret in ((ROOT, root_password), (user, password)):
            if name not in self._call("RoleList").roles:
                self._call("RoleAdd", name=name)
            if name not in self._call("UserList").users:
                self._call("UserAdd", name=name, password=secret)
            elif name != ROOT or not self._token:  # root has logged in with it; setting it would invalidate the token
                self._call("UserChangePassword", name=name, password=secret)
            if name not in self._call("UserGet", name=name).roles:
                self._call("UserGrantRole", user=name, role=name)
        # Restrict the user to the keys below the prefix
        self._call("RoleGrantPermission", name=user, perm=_permission("READWRITE", prefix, below=True))
        self._call("AuthEnable")

    def _call(self, method: str, **fields: Any) -> Any:
        return getattr(self._stub, method)(_request(method, fields), timeout=self._timeout, metadata=self._token)


class Root(EtcdValues):
    """A client with root's rights, which also creates and removes users and their roles."""

    def users(self) -> list[str]:
        """The names of all users, sorted."""
        return sorted(self._auth("UserList").users)

    def add(self, user: str, password: str, role: str) -> None:
        """Create a user with a role that `allow` has created."""
        self._auth("UserAdd", name=user, password=password)
        self._auth("UserGrantRole", user=user, role=role)

    def allow(self, role: str, key: str, *, below: bool = False, write: bool = True) -> None:
        """Let a role, created if missing, read (and write) a key or, with `below`, all keys that begin with it."""
        if role not in self._auth("RoleList").roles:
            self._auth("RoleAdd", name=role)
        kind = "READWRITE" if write else "READ"
        self._auth("RoleGrantPermission", name=role, perm=_permission(kind, key, below))

    def remove(self, user: str) -> None:
        """Delete a user, who is logged out at once, and the role of the same name, if they exist."""
        if user in self._auth("UserList").users:
            self._auth("UserDelete", name=user)
        if user in self._auth("RoleList").roles:
            self._auth("RoleDelete", role=user)

    def _auth(self, method: str, **fields: Any) -> Any:
        request, stub, limit = _request(method, fields), import_etcd3().etcdrpc.AuthStub, self.timeouts.admin_call

        def call(etcd: Any) -> Any:
            return getattr(stub(etcd.channel), method)(request, timeout=limit, metadata=etcd.metadata)

        return self._call(call)


def _request(method: str, fields: dict[str, Any]) -> Any:
    """The request of a method of the Auth service."""
    kind = method if method.startswith("Auth") else f"Auth{method}"
    return getattr(import_etcd3().etcdrpc, f"{kind}Request")(**fields)


def _permission(kind: str, key: str, below: bool) -> dict[str, Any]:
    """The permission for a key, or for all keys that begin with it."""
    end = key[:-1] + chr(ord(key[-1]) + 1) if below else ""
    return {"permType": kind, "key": key.encode(), "range_end": end.encode()}


if __name__ == "__main__":
    run_main(main)
