"""A step's client of etcd. Pods have etcd's credentials mounted; a step reads them from their Secret by the API."""

import base64
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.errors import TrainingError
from trainer.etcd.client import EtcdClient, run_prefix
from trainer.etcd.errors import EtcdError
from trainer.kubernetes.api.kinds import SECRET, Object
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.plan import ETCD_CREDENTIALS
from trainer.kubernetes.steps.step_context import StepContext


@contextmanager
def reachable_etcd(context: StepContext) -> Iterator[EtcdClient]:
    """A client of the run's keys in etcd, once etcd has answered. Raises TrainingError if it cannot be used."""
    config = context.plan.config
    with tempfile.TemporaryDirectory() as directory:
        # Copy the certificates that pods have mounted to temporary files, for as long as the client lives
        paths = {name: getattr(config.etcd, name) for name in ("ca", "cert", "key")}
        mounted = {name: Path(path) for name, path in paths.items() if Path(path).parent == Path(ETCD_CREDENTIALS)}
        password = os.environ.get("ETCD_PASSWORD", "")
        if mounted or (config.etcd.user and not password):
            secret = context.client.get(SECRET, names.ETCD_SECRET)
            if secret is None:
                raise TrainingError(
                    f"there is no Secret {names.ETCD_SECRET} with etcd's credentials in namespace "
                    f"{context.client.namespace}: see manifests/"
                )
            for name, path in mounted.items():
                own = Path(directory) / path.name
                own.touch(mode=0o600)
                own.write_bytes(_value(secret, path.name))
                paths[name] = str(own)
            if config.etcd.user and not password:
                password = _value(secret, "password").decode()

        # Connect, and check that etcd answers
        prefix = run_prefix(config.elastic.etcd.prefix, config.run_id)
        with EtcdClient(config.etcd.endpoints, prefix, user=config.etcd.user, password=password, **paths) as etcd:
            try:
                etcd.get("run")
            except EtcdError as error:
                if error.kind != "unreachable":
                    raise
                raise TrainingError(
                    f"{error}. Does etcd run (manifests/ has one), is etcd.endpoints right, and may this pod connect?"
                ) from None
            yield etcd


def _value(secret: Object, key: str) -> bytes:
    data = secret.get("data") or {}
    if key not in data:
        raise TrainingError(f"Secret {names.ETCD_SECRET} has no key {key}")
    return base64.b64decode(data[key])
