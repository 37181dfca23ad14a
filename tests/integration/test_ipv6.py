"""A host that has no IPv4: a network namespace of its own, with the IPv6 loopback alone."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = ["unshare", "--net", "sh", "-c", 'ip link set lo up && ip address del 127.0.0.1/8 dev lo && exec "$@"', "sh"]

PROGRAM = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from trainer.config import TrainingConfig
from trainer.diloco.outer import Nesterov
from trainer.diloco.quorum import RoundReport
from trainer.diloco.state import GlobalState
from trainer.elastic.member import ElasticQuorum
from trainer.etcd.client import local_address
from trainer.etcd.embedded import EmbeddedEtcd
from trainer.launch import preflight
from trainer.launch.agent import _rendezvous
from trainer.process import loopback
from trainer.protocol.records import Cursor

def member(quorum):
    state = GlobalState(torch.zeros(10), Nesterov(lr=1.0, momentum=0.0))
    with quorum:
        quorum.join(state, Cursor())
        made = state.begin(state.full_model)
        commit = quorum.synchronise(torch.ones(10), 1.0, RoundReport(), made.fragment, made.add)
        return len(commit.members), commit.bytes_sent

def quorum(slot):
    os.environ["ELASTIC_SLOT"] = str(slot)
    return ElasticQuorum(config, {})

with EmbeddedEtcd(Path(sys.argv[1]), loopback()) as etcd:
    assert etcd.endpoint.startswith("[::1]:") and local_address(etcd.endpoint) == "::1"
    config = TrainingConfig.from_flat({
        "etcd_endpoints": [etcd.endpoint], "run_id": "r", "local_steps": 1, "batch_size": 1,
        "per_device_train_batch_size": 1, "nodes": 2, "port_range": "20000-20300"})
    for address in ("", "::1"):
        preflight.check_network(config.with_values(advertise_address=address))
    rendezvous = _rendezvous(config.with_values(nodes=1), 0, "")
    rendezvous.next_rendezvous()  # torch's store, for the workers of a node
    rendezvous.shutdown()
    with ThreadPoolExecutor() as pool:
        for members, sent in pool.map(member, [quorum(0), quorum(1)]):
            assert members == 2 and sent > 0
print("two members have synchronised")
"""


def test_members_synchronise_where_there_is_no_ipv4(tmp_path: Path) -> None:
    try:
        made = subprocess.run([*COMMAND, "true"], capture_output=True, text=True, timeout=20, check=False)
    except OSError as error:
        pytest.skip(f"no network namespace can be made: {error}")
    if made.returncode:
        pytest.skip(f"no network namespace can be made: {made.stderr.strip()}")
    program = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    ended = subprocess.run([*COMMAND, *program], capture_output=True, text=True, timeout=60, check=False)
    assert "two members have synchronised" in ended.stdout, ended.stderr
