"""Machines that join by a token: to the end of a run, over IPv6; with a token that is revoked amid the run."""

import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.machines import machines, text_files
from tests.network.proxy import Proxy
from trainer import models
from trainer.config import TrainingConfig
from trainer.etcd.embedded import EmbeddedEtcd
from trainer.etcd.users import enable_users

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]


def test_two_machines_that_need_each_other_train_to_the_end(tmp_path: Path) -> None:
    """Over IPv6; the second has neither the dataset nor the pretrained model, and both must be there to begin."""
    with machines(2, tmp_path, ipv6=True) as place:
        data, model = text_files(tmp_path / "data"), tmp_path / "pretrained"
        written = {"vocabulary_size": 257, "sequence_length": 64, "eos_token_id": 256}
        path, _ = models.precache(TrainingConfig.from_flat({"model": "gpt-neo-x:test"}), written, tmp_path / "made")
        models.build(path, 3).save_pretrained(model)  # type: ignore[operator]
        listen = f"--listen [{place.network.address_of(0)}]:7777 --elastic-min-nodes 2"
        first = place.begin(listen, data, steps=64, model=str(model))
        line = place.line(first)
        shutil.rmtree(data)
        shutil.rmtree(model)
        second = place.type(1, line)
        assert (first.wait(), second.wait()) == (0, 0), f"{first.text}\n{second.text}"
        assert "fetching the model from the run" in second.text
        place.prove()
        assert {event["world_size"] for event in place.rounds(1)} == {2}

        again = place.type(1, line)  # the run is over, and with it its etcd
        assert again.wait() == 2 and "none of its addresses answers" in again.text


def test_a_revoked_machine_is_put_out_and_the_run_goes_on(tmp_path: Path) -> None:
    with machines(2, tmp_path) as place:
        data = text_files(tmp_path / "data")
        first = place.begin(f"--listen {place.network.address_of(0)}", data)
        line = place.line(first)
        second = place.type(1, line)
        place.until_both(second)

        listed = place.type(0, "diloco token list --run-id mine")
        assert listed.wait() == 0
        ((token, *_),) = (row.split() for row in listed.text.splitlines())
        revoked = place.type(0, f"diloco token revoke {token} --run-id mine")
        assert revoked.wait() == 0 and f"token {token} is revoked" in revoked.text
        assert second.wait() == 1
        assert "its token has been revoked" in second.text.splitlines()[-1] and "Traceback" not in second.text

        place.until_alone(first)
        refused = place.type(1, line)
        assert refused.wait() == 2 and "has expired or was revoked" in refused.text
        fresh = place.type(0, "diloco token create --ttl 1h --run-id mine")
        assert fresh.wait() == 0
        third = place.type(1, fresh.text.strip())
        joined = len(place.rounds(1))
        third.until(lambda: len(place.rounds(1)) > joined + 1, "rounds with the new token")
        assert third.interrupt() == 130
        assert first.interrupt() == 130
        place.prove()


def test_the_launch_that_listens_is_killed_and_begun_again(tmp_path: Path) -> None:
    """Its etcd dies with it; the other machine waits, and trains on with it when it is back."""
    with machines(2, tmp_path) as place:
        data = text_files(tmp_path / "data")
        listen = f"--listen {place.network.address_of(0)}"
        first = place.begin(listen, data)
        second = place.type(1, place.line(first))
        place.until_both(second)
        first.process.kill()
        first.wait()

        before = len(place.rounds(1))
        first = place.begin(listen, data)
        place.until_both(second, before + 1)
        lives = [event for event in place.events(1) if event["event"] == "start"]
        assert len(lives) == 1  # nothing was begun again there
        assert (first.interrupt(), second.interrupt()) == (130, 130)
        place.prove()


def test_a_run_with_an_etcd_of_its_own_outlives_the_machine_that_began_it(tmp_path: Path) -> None:
    with machines(2, tmp_path) as place, EmbeddedEtcd(tmp_path / "etcd", place.network.address) as etcd:
        own = {"etcd_endpoints": [etcd.endpoint], "etcd_user": "us"}
        enable_users(TrainingConfig.from_flat(own), "root's", "ours")
        data = text_files(tmp_path / "data")
        listen = f"--etcd {etcd.endpoint} --etcd-user us --listen {place.network.address_of(0)}"
        first = place.begin(listen, data, ETCD_PASSWORD="ours", ETCD_ROOT_PASSWORD="root's")
        line = place.line(first)
        shutil.rmtree(data)
        second = place.type(1, line)
        place.until_both(second)
        assert "fetched the dataset from the run" in second.text
        assert first.interrupt() == 130

        place.until_alone(second)
        assert second.interrupt() == 130
        place.prove()
        place.assert_no_secret(line)


def test_a_machine_is_joined_by_the_name_of_the_router_before_it(tmp_path: Path) -> None:
    """The router passes on some ports; there is no other way, and the name is known on one machine only."""
    with machines(2, tmp_path) as place, ExitStack() as router:
        outside, ports = place.network.address, range(20000, 20004)
        place.network.wall(0, 1)
        place.network.name(0, "site.example", outside)
        for port in ports:
            router.enter_context(Proxy(f"{place.network.address_of(0)}:{port}", at=(outside, port)))
        data = text_files(tmp_path / "data")
        first = place.begin(f"--listen site.example:{ports[0]} --port-range {ports[0]}-{ports[-1]}", data)
        line = place.line(first)
        shutil.rmtree(data)
        second = place.type(1, line)
        place.until_both(second)
        assert "unchanged, the TCP ports 20000 (etcd) and 20000-20003 (workers)" in first.text
        assert (second.interrupt(), first.interrupt()) == (130, 130)
        place.prove()
