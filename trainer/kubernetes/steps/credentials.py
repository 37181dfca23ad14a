"""A step's etcd client. Pods mount etcd's credentials; a step reads them from their Secret through the API."""

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
from trainer.retry import retrying


@contextmanager
def reachable_etcd(context: StepContext) -> Iterator[EtcdClient]:
    """A client of the run's keys in etcd, once etcd has answered.

    An etcd that was created together with the run may need some minutes, so this waits for up to `etcd_outage_limit`.

    Raises:
        TrainingError: It cannot be used.
    """
    config = context.plan.config
    with tempfile.TemporaryDirectory() as directory:
        # Copy the certificates that pods mount to temporary files for the lifetime of the client
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
                _first_answer(context, etcd)
            except EtcdError as error:
                if error.kind != "unreachable":
                    raise
                raise TrainingError(
                    f"{error}. Is etcd running (manifests/ has one), is etcd.endpoints right, and may this pod connect?"
                ) from None
            yield etcd


def _first_answer(context: StepContext, etcd: EtcdClient) -> None:
    """Wait until etcd answers. Raises EtcdError if it does not within `etcd_outage_limit`."""
    patience, said = context.plan.config.etcd_outage_limit, False

    def say(error: BaseException) -> None:
        nonlocal said
        if not said:
            context.show(f"waiting up to {patience:.0f} s for etcd: {error}")
        said = True

    def is_away(error: BaseException) -> bool:
        return isinstance(error, EtcdError) and error.kind == "unreachable"

    retrying(is_away, patience=patience, on_retry=say)(etcd.get, "run")


def _value(secret: Object, key: str) -> bytes:
    data = secret.get("data") or {}
    if key not in data:
        raise TrainingError(f"Secret {names.ETCD_SECRET} has no key {key}")
    return base64.b64decode(data[key])
