"""Creates etcd's users and enables authentication: `python -m trainer.etcd.users`, the Job of manifests/overlays/prod.

The parameters name the etcd (`etcd.endpoints`, `ca`, `cert`, `key`) and the user, which may read and write below
`elastic.etcd.prefix` and nowhere else. Passwords come from the environment: ETCD_ROOT_PASSWORD for root, ETCD_PASSWORD
for the user. The command is idempotent: existing users and roles are kept, and the user's password is updated.

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
    passwords = {name: os.environ.get(name, "") for name in ("ETCD_ROOT_PASSWORD", "ETCD_PASSWORD")}
    for name, value in passwords.items():
        if not value:
            raise ConfigError(name, "", "must be set in the environment")
    for field, given in (("etcd.endpoints", config.etcd.endpoints), ("etcd.user", config.etcd.user)):
        if not given:
            raise ConfigError(field, "", "must be given")
    enable_users(config, passwords["ETCD_ROOT_PASSWORD"], passwords["ETCD_PASSWORD"])
    print(f"etcd now requires a password; {config.etcd.user} may use {config.elastic.etcd.prefix}/", flush=True)
    return 0


def enable_users(
    config: TrainingConfig, root_password: str, password: str, timeouts: EtcdTimeouts = EtcdTimeouts()
) -> None:
    """Create the users and enable authentication.

    Args:
        config: Names the etcd, the user, and the prefix of the user's keys.
        root_password: Password of root, which has all rights.
        password: Password of `etcd.user`.
        timeouts: Limits of the requests.

    Raises:
        TrainingError: No endpoint answers, or etcd refuses.
    """
    import grpc

    reasons = []
    for endpoint in config.etcd.endpoints:
        with _channel(config, endpoint) as channel:
            try:
                _Users(channel, root_password, timeouts.admin_call).enable(config, password)
                return
            except grpc.RpcError as error:
                reasons.append(f"{endpoint}: {error.details() or error.code().name}")
    raise TrainingError(f"etcd's users could not be created: {'; '.join(reasons)}")


class _Users:
    """The Auth service of one etcd member."""

    def __init__(self, channel: Any, root_password: str, timeout: float) -> None:
        self._rpc: Any = import_etcd3().etcdrpc
        self._stub = self._rpc.AuthStub(channel)
        self._root_password, self._timeout = root_password, timeout
        self._token: tuple[tuple[str, str], ...] = ()

    def enable(self, config: TrainingConfig, password: str) -> None:
        user, prefix = config.etcd.user, config.elastic.etcd.prefix.rstrip("/") + "/"
        self._log_in()
        self._add_role(_ROOT)
        self._add_user(_ROOT, self._root_password)
        self._add_role(user)
        self._add_user(user, password)
        end = prefix[:-1] + "0"  # which follows "/"
        below = {"permType": "READWRITE", "key": prefix.encode(), "range_end": end.encode()}
        self._call("RoleGrantPermission", name=user, perm=below)
        self._call("AuthEnable")

    def _log_in(self) -> None:
        """Authenticate as root, if authentication is enabled already."""
        import grpc

        try:
            answer = self._call("Authenticate", name=_ROOT, password=self._root_password)
        except grpc.RpcError as error:
            if "authentication is not enabled" not in (error.details() or ""):
                raise
        else:
            self._token = (("token", answer.token),)

    def _add_role(self, name: str) -> None:
        if name not in self._call("RoleList").roles:
            self._call("RoleAdd", name=name)

    def _add_user(self, name: str, password: str) -> None:
        if name == _ROOT and self._token:
            return  # root has this password; setting it would invalidate our token
        if name in self._call("UserList").users:
            self._call("UserChangePassword", name=name, password=password)
        else:
            self._call("UserAdd", name=name, password=password)
        if name not in self._call("UserGet", name=name).roles:
            self._call("UserGrantRole", user=name, role=name)

    def _call(self, method: str, **fields: Any) -> Any:
        kind = method if method.startswith("Auth") else f"Auth{method}"
        request = getattr(self._rpc, f"{kind}Request")(**fields)
        return getattr(self._stub, method)(request, timeout=self._timeout, metadata=self._token)


def _channel(config: TrainingConfig, endpoint: str) -> Any:
    import grpc

    etcd = config.etcd
    if not etcd.ca:
        return grpc.insecure_channel(endpoint)
    ca, key, cert = (Path(path).read_bytes() if path else None for path in (etcd.ca, etcd.key, etcd.cert))
    return grpc.secure_channel(endpoint, grpc.ssl_channel_credentials(ca, key, cert))


if __name__ == "__main__":
    run_main(main)
