"""Machines that join by a token: to the end of a run, over IPv6; with a token that is revoked amid the run."""

import shutil
from pathlib import Path

import pytest

from tests.machines import SMALL, machines, text_files
from trainer import models
from trainer.config import TrainingConfig
from trainer.monitor.verify import verify

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1800)]


def test_two_machines_that_need_each_other_train_to_the_end(tmp_path: Path) -> None:
    """Over IPv6; the second has neither the dataset nor the pretrained model, and both must be there to begin."""
    with machines(2, tmp_path, ipv6=True) as place:
        data, model = text_files(tmp_path / "data"), tmp_path / "pretrained"
        written = {"vocabulary_size": 257, "sequence_length": 64, "eos_token_id": 256}
        path, _ = models.precache(TrainingConfig.from_flat({"model": "gpt-neo-x:test"}), written, tmp_path / "made")
        models.build(path, 3).save_pretrained(model)  # type: ignore[operator]
        listen = f"--listen [{place.network.address_of(0)}]:7777 --run-id mine --nodes 1 --elastic-min-nodes 2"
        what = f"--total-steps 64 --model gpt-neo-x:{model} --dataset files:{data}"
        first = place.type(0, f"diloco launch {listen} {what} {SMALL}")
        line = place.line(first)
        shutil.rmtree(data)
        shutil.rmtree(model)
        second = place.type(1, line)
        assert (first.wait(), second.wait()) == (0, 0), f"{first.text}\n{second.text}"
        assert "fetching the model from the run" in second.text
        (judgement,) = verify([place.run_dir(0), place.run_dir(1)])
        assert not judgement.refuted, judgement
        assert {event["world_size"] for event in place.rounds(1)} == {2}

        again = place.type(1, line)  # the run is over, and with it its etcd
        assert again.wait() == 2 and "none of its addresses answers" in again.text


def test_a_revoked_machine_is_put_out_and_the_run_goes_on(tmp_path: Path) -> None:
    with machines(2, tmp_path) as place:
        data = text_files(tmp_path / "data")
        listen = f"--listen {place.network.address_of(0)} --run-id mine --nodes 1 --total-steps 100000"
        first = place.type(0, f"diloco launch {listen} --model gpt-neo-x:test --dataset files:{data} {SMALL}")
        line = place.line(first)
        second = place.type(1, line)
        second.until(lambda: any(event["world_size"] == 2 for event in place.rounds(1)), "a round of both")

        listed = place.type(0, "diloco token list --run-id mine")
        assert listed.wait() == 0
        ((token, *_),) = (row.split() for row in listed.text.splitlines())
        revoked = place.type(0, f"diloco token revoke {token} --run-id mine")
        assert revoked.wait() == 0 and f"token {token} is revoked" in revoked.text
        assert second.wait() == 1
        assert "its token has been revoked" in second.text.splitlines()[-1] and "Traceback" not in second.text

        last = place.rounds(0)[-1]["round"]
        first.until(lambda: place.rounds(0)[-1]["round"] > last + 2, "the run to go on")
        refused = place.type(1, line)
        assert refused.wait() == 2 and "has expired or was revoked" in refused.text
        fresh = place.type(0, "diloco token create --ttl 1h --run-id mine")
        assert fresh.wait() == 0
        third = place.type(1, fresh.text.strip())
        joined = len(place.rounds(1))
        third.until(lambda: len(place.rounds(1)) > joined + 1, "rounds with the new token")
        assert third.interrupt() == 130
        assert first.interrupt() == 130
        (judgement,) = verify([place.run_dir(0), place.run_dir(1)])
        assert not judgement.refuted, judgement


def test_the_launch_that_listens_is_killed_and_begun_again(tmp_path: Path) -> None:
    """Its etcd dies with it; the other machine waits, and trains on with it when it is back."""
    with machines(2, tmp_path) as place:
        data = text_files(tmp_path / "data")
        listen = f"--listen {place.network.address_of(0)} --run-id mine --nodes 1 --total-steps 100000"
        command = f"diloco launch {listen} --model gpt-neo-x:test --dataset files:{data} {SMALL}"
        first = place.type(0, command)
        second = place.type(1, place.line(first))
        second.until(lambda: any(event["world_size"] == 2 for event in place.rounds(1)), "a round of both")
        first.process.kill()
        first.wait()

        before = len(place.rounds(1))
        first = place.type(0, command)
        second.until(
            lambda: any(event["world_size"] == 2 for event in place.rounds(1)[before + 1 :]), "a round of both again"
        )
        lives = [event for event in place.events(1) if event["event"] == "start"]
        assert len(lives) == 1  # nothing was begun again there
        assert (first.interrupt(), second.interrupt()) == (130, 130)
        (judgement,) = verify([place.run_dir(0), place.run_dir(1)])
        assert not judgement.refuted, judgement
