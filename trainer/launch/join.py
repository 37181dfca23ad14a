"""`diloco join`: take part in a run with nothing but a token."""

import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from ssl import DER_cert_to_PEM_cert

from trainer.config import TrainingConfig
from trainer.data import precache_all
from trainer.elastic import keys
from trainer.errors import ConfigError
from trainer.etcd.certificates import Tls
from trainer.etcd.client import EtcdClient
from trainer.etcd.errors import EtcdError
from trainer.files import read_json, require_writable, write_json, write_text
from trainer.launch import local, preflight
from trainer.launch.admission import GUESTS, admission_key
from trainer.launch.run_directory import locked
from trainer.launch.sharing import RunOnOtherMachines
from trainer.launch.token import Token, require_current
from trainer.monitor.find_run import LAUNCHED, PASSWORD, SECRETS
from trainer.process import connect
from trainer.protocol import PROTOCOL
from trainer.timeouts import LaunchTimeouts

_MEMBER = "member.json"  # in the folder SECRETS: {token, user} of this machine
_ETCD = ("run_id", "elastic_etcd_prefix", "etcd_endpoints", "etcd_ca", "etcd_cert", "etcd_key")


def join(token: Token, given: TrainingConfig, timeouts: LaunchTimeouts = LaunchTimeouts()) -> int:
    """Take part in a run until it is complete. Returns the exit status. Must run on the main thread (signals).

    Args:
        given: This machine's own parameters (`nodes`, `device`, addresses, …); all others come from the run.

    Raises:
        ConfigError: The token does not admit this machine, or a parameter does not fit the run.
        TrainingError: The dataset or the model cannot be obtained, or the run has failed.
    """
    run_dir = Path(given.run_dir) if given.run_dir else directory_for(token)
    secrets = run_dir.absolute() / SECRETS
    user = _known_user(secrets, token)
    if user is None:
        require_current(token, PROTOCOL)
    require_writable(run_dir, "run_dir")

    # Become a user of the run's etcd
    try:
        own = _connected(token, given, secrets, timeouts)
        user = user or _admitted(token, own, secrets)
        os.environ["ETCD_PASSWORD"] = (secrets / PASSWORD).read_text(encoding="utf-8")
        with EtcdClient.of(own.with_values(etcd_user=user)) as client:
            client.put(f"{GUESTS}{token.id}/{socket.gethostname()}", {"time": int(time.time())})
            # Take the configuration from the run
            result = keys.verdict(client)
            if result.status == "succeeded":
                print(f"run {token.run_id} is already complete", flush=True)
                return 0
            if result.terminal:
                raise ConfigError("token", "…", f"is for run {token.run_id}: {result}")
            limit = timeouts.begin
            if not client.wait_for(lambda: client.get("config") is not None, limit, "config"):
                raise ConfigError("token", "…", f"run {token.run_id} did not start within {limit:.0f} s")
            config = _configuration(client, given, own, user, run_dir)
            # Get the dataset and the model
            preflight.check(config, joins=True)
            print(f"joining run {token.run_id} with {config.model} on {config.dataset}, in {run_dir}", flush=True)
            precache_all(config, run=RunOnOtherMachines.of(client, config))
    except EtcdError as error:
        raise ConfigError("token", "…", _explained(error, token)) from None
    return local.launch(config, joins=True)


def _configuration(
    client: EtcdClient, given: TrainingConfig, own: TrainingConfig, user: str, run_dir: Path
) -> TrainingConfig:
    """The run's configuration with this machine's own parameters."""
    values = {"run_dir": str(run_dir.absolute()), "etcd_user": user}
    names = given.given()
    if "device" not in names:
        import torch

        values["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if "nodes" not in names:
        values["nodes"] = "1"
    # Only given parameters count as this machine's own
    flat = {**names, **{name: own.to_flat()[name] for name in _ETCD}, **values}
    return keys.joined(client, TrainingConfig.from_flat(flat)).resolved()


def directory_for(token: Token) -> Path:
    """The run directory: `runs/<run id>`, or another one if a launch on a shared disk already uses that."""
    number = 1
    while True:
        directory = Path("runs") / (token.run_id if number == 1 else f"{token.run_id}-{number}")
        began_it = (directory / LAUNCHED).exists() and not (directory / SECRETS / _MEMBER).exists()
        if not began_it and not _is_locked(directory):
            return directory
        number += 1


def _is_locked(run_dir: Path) -> bool:
    """Whether a launch is using the run directory."""
    try:
        with locked(run_dir):
            return False
    except FileNotFoundError:
        return False
    except ConfigError:
        return True


def _known_user(secrets: Path, token: Token) -> str | None:
    """The etcd user that this machine received from the token earlier, if any."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = read_json(secrets / _MEMBER)
        if kept["token"] == token.id:
            return str(kept["user"])
    return None


def _connected(token: Token, given: TrainingConfig, secrets: Path, timeouts: LaunchTimeouts) -> TrainingConfig:
    """The configuration with an etcd address that answers, and the files for connecting to it."""
    answering, reasons = "", []
    for endpoint in token.endpoints:
        try:
            connection = connect(endpoint, timeouts.connect)
        except OSError as error:
            reasons.append(f"{endpoint} ({error.strerror or error})")
            continue
        answering = endpoint
        break
    else:
        tried = ", ".join(reasons)
        advice = "is the run still running there, and can this machine reach the port?"
        raise ConfigError("token", "…", f"none of its addresses answers: {tried}: {advice}")
    # Accept no server but the one that the token names
    secrets.mkdir(mode=0o700, parents=True, exist_ok=True)
    tls, files = Tls(secrets), {}
    try:
        if token.fingerprint:
            tls.make_client(token.door)
            tls.take_server(answering, connection, token.fingerprint)
            files = {"etcd_ca": tls.server, "etcd_cert": tls.client, "etcd_key": tls.client_key}
        elif token.authority:
            write_text(tls.server, DER_cert_to_PEM_cert(token.authority), private=True)
            files = {"etcd_ca": tls.server}
    except OSError as error:
        raise ConfigError("token", "…", f"the server at {answering} is not the run's etcd: {error}") from None
    except ValueError as error:
        raise ConfigError("token", "…", f"{error}: the connection may be intercepted") from None
    finally:
        connection.close()
    # All addresses of `launch --listen` lead to one etcd member; an external etcd may have several
    endpoints = [answering] if token.fingerprint else sorted(token.endpoints, key=lambda one: one != answering)
    return given.with_values(
        etcd_endpoints=endpoints,
        elastic_etcd_prefix=token.prefix,
        run_id=token.run_id,
        **{name: str(path) for name, path in files.items()},
    )


def _admitted(token: Token, config: TrainingConfig, secrets: Path) -> str:
    """Exchange the token for this machine's member user, whose password is kept in a file."""
    user, password = "", ""
    if token.password:
        tls = config.etcd.model_dump(include={"ca", "cert", "key"})
        with EtcdClient(config.etcd.endpoints, token.prefix, **tls, user=token.user, password=token.password) as client:
            entry = client.get(admission_key(token))
        if entry is None:
            raise ConfigError("token", "…", "has expired or was revoked")
        user, password = entry.value["user"], entry.value["password"]
    write_text(secrets / PASSWORD, password, private=True)
    write_json(secrets / _MEMBER, {"token": token.id, "user": user}, private=True)
    return user


def _explained(error: EtcdError, token: Token) -> str:
    """Why etcd does not admit this machine."""
    if error.kind in ("credentials", "permission"):
        return f"has expired or was revoked: create a new one where run {token.run_id} started (`diloco token create`)"
    return str(error)
