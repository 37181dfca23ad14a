"""Creates etcd's users and enables authentication: `python -m trainer.etcd.users`, the Job of manifests/overlays/prod.

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
from trainer.timeouts import EtcdTimeouts

_ROOT = "root"  # etcd's name for the administrator, and for its role


def main() -> int:
    """Read the parameters from the environment; returns the exit status."""
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
    """Create root and the user `etcd.user`, with their passwords, and enable authentication.

    Raises:
        TrainingError: No endpoint answers, or etcd refuses.
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

        # Log in as root, if authentication is enabled already
        try:
            self._token = (("token", self._call("Authenticate", name=_ROOT, password=root_password).token),)
        except grpc.RpcError as error:
            if "authentication is not enabled" not in (error.details() or ""):
                raise
        # Create each user, with a role of the same name
        user, prefix = config.etcd.user, config.elastic.etcd.prefix.rstrip("/") + "/"
        for name, secret in ((_ROOT, root_password), (user, password)):
            if name not in self._call("RoleList").roles:
                self._call("RoleAdd", name=name)
            if name not in self._call("UserList").users:
                self._call("UserAdd", name=name, password=secret)
            elif name != _ROOT or not self._token:  # root has logged in with it; setting it would invalidate the token
                self._call("UserChangePassword", name=name, password=secret)
            if name not in self._call("UserGet", name=name).roles:
                self._call("UserGrantRole", user=name, role=name)
        # Restrict the user to the keys below the prefix
        end = prefix[:-1] + "0"  # which follows "/"
        below = {"permType": "READWRITE", "key": prefix.encode(), "range_end": end.encode()}
        self._call("RoleGrantPermission", name=user, perm=below)
        self._call("AuthEnable")

    def _call(self, method: str, **fields: Any) -> Any:
        kind = method if method.startswith("Auth") else f"Auth{method}"
        request = getattr(self._rpc, f"{kind}Request")(**fields)
        return getattr(self._stub, method)(request, timeout=self._timeout, metadata=self._token)


if __name__ == "__main__":
    run_main(main)
