"""What is refused before anything starts, and that nothing is written then."""

import re
import socket
from pathlib import Path
from typing import Any

import pytest

from trainer import checkpoint
from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.files import sha256, write_json
from trainer.launch import preflight
from trainer.volume import Volume, worker_configs


def config(root: Path, **values: Any) -> TrainingConfig:
    good = {
        "model": "gpt-neo-x:test", "dataset": "stdlib", "tokenizer": "bytes", "device": "cpu", "total_steps": 100,
        "warmup_steps": 0, "local_steps": 5, "run_id": "r", "run_dir": str(root / "run"),
    }  # fmt: skip
    return TrainingConfig.from_flat({**good, **values})


def save(directory: Path, made_with: TrainingConfig, step: int = 50, **state: Any) -> Path:
    """A checkpoint, but for its tensors."""
    path = directory / f"round-000010-step-{step:08}"
    content = {"round": 10, "step": step, "complete": False, "config": made_with.model_dump(mode="json"), **state}
    write_json(path / "state.json", content)
    file = path / "state.json"
    write_json(
        path / "manifest.json",
        {"format": checkpoint.FORMAT, "files": {file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)}}},
    )
    return path


def own(checked: TrainingConfig, worker: int = 0) -> Path:
    return Volume.of(worker_configs(checked)[worker]).checkpoints


def refusal(checked: TrainingConfig) -> str:
    with pytest.raises(ConfigError) as refused:
        preflight.check(checked)
    return str(refused.value)


def test_what_can_go_on_is_not_refused(tmp_path: Path) -> None:
    save(own(config(tmp_path), worker=1), config(tmp_path))
    preflight.check(config(tmp_path))
    # A longer schedule is no other run, unless an etcd has kept the shorter one as the run's.
    preflight.check(config(tmp_path, total_steps=200))
    (tmp_path / "run" / "etcd").mkdir()
    assert re.match(
        r"total_steps = 200: the checkpoints in .* have 100: keep that", refusal(config(tmp_path, total_steps=200))
    )
    assert re.match(r"outer_momentum = 0.5: the checkpoints .* have 0.9", refusal(config(tmp_path, outer_momentum=0.5)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "gpt-neo-x:tiny"}, "model = 'gpt-neo-x:tiny': the checkpoint is of model 'gpt-neo-x:test'"),
        ({"local_steps": 6}, "local_steps = 6: the checkpoints in {own} have 5: keep that, or choose another"),
        ({"batch_size": 1024}, "batch_size = 1024: the checkpoints in {own} have 512"),
        ({"optim_method": "ddp"}, "optim_method = 'ddp': the checkpoints in {own} have sgd"),
        ({"seed": 1}, "seed = 1: the checkpoints in {own} have 42"),
        ({"total_steps": 49}, "total_steps = 49: the checkpoint is already at step 50"),
        ({"resume": "never"}, "resume = 'never': run r has checkpoints in {own}; choose another run_id"),
    ],
)
def test_a_run_does_not_go_on_as_another_one(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    directory = own(config(tmp_path), worker=1)
    save(directory, config(tmp_path))
    assert message.format(own=directory) in refusal(config(tmp_path, **values))


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        hash = "other"

    save(own(config(tmp_path)), config(tmp_path), dataset="this")
    preflight.check(config(tmp_path))  # not precached: nothing to compare with
    monkeypatch.setattr(preflight, "read_manifest", lambda directory: Other)
    assert "belong to other data (stdlib, tokenizer 'bytes')" in refusal(config(tmp_path))


def test_a_torn_checkpoint_of_its_own_is_passed_over(tmp_path: Path) -> None:
    path = save(own(config(tmp_path)), config(tmp_path, seed=1), step=60)
    (path / "state.json").write_text("[")
    save(own(config(tmp_path)), config(tmp_path))
    preflight.check(config(tmp_path))


def test_the_checkpoint_to_begin_with(tmp_path: Path) -> None:
    path = save(tmp_path / "other", config(tmp_path, seed=1))
    begun = config(tmp_path, resume=str(path))
    preflight.check(begun)
    assert "total_steps = 49: the checkpoint is already at step 50" in refusal(
        config(tmp_path, resume=str(path), total_steps=49)
    )
    other = refusal(config(tmp_path, resume=str(path), model="gpt-neo-x:tiny"))
    assert other.endswith("the checkpoint is of model 'gpt-neo-x:test', this run's is 'gpt-neo-x:tiny'")
    save(own(begun), begun)
    preflight.check(begun)  # interrupted, and tried again
    save(own(begun), config(tmp_path))
    assert refusal(begun).startswith(f"resume = '{path}': run r has its own checkpoints in {own(begun)}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", "{}"),
        ("manifest.json", "[]"),
        ("state.json", "{}"),
        ("state.json", None),
        ("manifest.json", None),
    ],
)
def test_a_checkpoint_that_is_none(tmp_path: Path, name: str, content: str | None) -> None:
    path = save(tmp_path / "other", config(tmp_path))
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_text(content)
    message = refusal(config(tmp_path, resume=str(path)))
    assert message.startswith(
        f"resume = '{path}': must be auto, never, or the directory of a checkpoint (checkpoint {path} "
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"network_interface": "nope0"}, "network_interface = 'nope0': must be one of "),
        (
            {"advertise_address": "10.0.0.1,no such host"},
            "advertise_address = 'no such host': is neither an address nor a resolvable name",
        ),
        ({"port_range": "{taken}-{taken}"}, "must hold 3 ports: 2 workers and an etcd listen here"),
        ({"port_range": "7000-7003", "etcd_endpoints": ["h:1"], "elastic_nproc_per_node": 3}, "must hold 6 ports"),
        (
            {"port_range": "{taken}-{taken}", "optim_method": "ddp", "etcd_endpoints": ["127.0.0.1:1"]},
            "has 0 free ports",
        ),
        (
            {"hf_upload": True, "trained_model_hf_name": "a/b/c"},
            "trained_model_hf_name = 'a/b/c': is not a valid Hub repository",
        ),
        ({"resume": "nowhere"}, "resume = 'nowhere': must be auto, never, or the directory of a checkpoint"),
    ],
)
def test_a_refusal_leaves_nothing(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        shown = {k: v.format(taken=taken) if isinstance(v, str) else v for k, v in values.items()}
        assert message in refusal(config(tmp_path, **shown))
    assert not list(tmp_path.iterdir())


def test_a_port_range_that_suffices(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        ports = f"{taken - 40}-{taken}" if taken > 32768 else f"{taken}-{taken + 40}"
        preflight.check(config(tmp_path, port_range=ports))
        preflight.check(config(tmp_path, port_range=f"{taken}-{taken}"), network=False)


def test_data_that_is_not_precached(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `python -m trainer precache` first"):
        preflight.check(config(tmp_path), precached=True)
    assert not list(tmp_path.iterdir())
