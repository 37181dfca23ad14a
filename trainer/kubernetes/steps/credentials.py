"""etcd, as a step of the pipeline reaches it: the pods have its credentials mounted, the step asks the API for them."""

import base64
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import TrainingError
from trainer.etcd.client import EtcdClient, run_prefix
from trainer.etcd.errors import EtcdError
from trainer.kubernetes.api.client import SECRET, Client
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.plan import ETCD_CREDENTIALS
from trainer.kubernetes.steps.session import Session


@contextmanager
def reachable_etcd(session: Session) -> Iterator[EtcdClient]:
    """A client of the run's keys in etcd, which answers.

    Raises:
        TrainingError: etcd cannot be reached, or refuses us; its credentials are missing.
    """
    config = session.plan.config
    with tempfile.TemporaryDirectory() as directory:
        paths = {name: getattr(config.etcd, name) for name in ("ca", "cert", "key")}
        mounted = {name: Path(path) for name, path in paths.items() if Path(path).parent == Path(ETCD_CREDENTIALS)}
        password = os.environ.get("ETCD_PASSWORD", "")
        if mounted or (config.etcd.user and not password):
            secret = _secret(session.client)
            for name, path in mounted.items():
                own = Path(directory) / path.name
                own.touch(mode=0o600)
                own.write_bytes(_value(secret, path.name))
                paths[name] = str(own)
            if config.etcd.user and not password:
                password = _value(secret, "password").decode()
        prefix = run_prefix(config.elastic.etcd.prefix, config.run_id)
        with EtcdClient(config.etcd.endpoints, prefix, user=config.etcd.user, password=password, **paths) as etcd:
            try:
                etcd.get("run")
            except EtcdError as error:
                if error.kind != "unreachable":
                    raise
                raise TrainingError(
                    f"{error}. Is etcd there (manifests/ has one), is etcd.endpoints right, and may this pod reach it?"
                ) from None
            yield etcd


def _secret(client: Client) -> dict[str, str]:
    secret = client.get(SECRET, names.ETCD_SECRET)
    if secret is None:
        raise TrainingError(
            f"there is no Secret {names.ETCD_SECRET} in namespace {client.namespace}, which etcd's credentials are in: "
            "see manifests/"
        )
    return dict(secret.get("data") or {})


def _value(secret: dict[str, str], key: str) -> bytes:
    if key not in secret:
        raise TrainingError(f"Secret {names.ETCD_SECRET} has no key {key}")
    return base64.b64decode(secret[key])
