"""A sharded model has the leader's values in all processes, which build it without values."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch.distributed.tensor import DTensor

from trainer import models
from trainer.config import TrainingConfig
from trainer.island.parallel import shard
from trainer.island.processes import Island
from trainer.process import listen

TEXT = {"vocabulary_size": 257, "sequence_length": 32, "eos_token_id": 256}
SPEECH = {"vocabulary": ["<pad>", "<s>", "</s>", "A"]}


def compare(rank: int, port: int, paths: list[Path]) -> None:
    """In each process of an island."""
    own = {"LOCAL_RANK": rank, "RANK": rank, "LOCAL_WORLD_SIZE": 2, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in own.items()}}
    config = TrainingConfig.from_flat({"inner_parallel": "fsdp", "elastic_nproc_per_node": 2, "batch_size": 64})
    with Island.form(config, torch.device("cpu")) as island:
        for path in paths:
            expected = models.build(path, 7)
            model = models.build(path, 7, "cpu" if island.leads else "meta")
            shard(model, island.device, path.name)
            found: dict[str, Any] = dict(model.state_dict(keep_vars=True)) | dict(model.named_buffers())
            wanted = dict(expected.state_dict(keep_vars=True)) | dict(expected.named_buffers())
            assert found.keys() == wanted.keys()
            for name, tensor in found.items():
                assert tensor.requires_grad == wanted[name].requires_grad, name
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                assert torch.equal(whole, wanted[name]), name
            tied, others = (len({id(one) for one in of.parameters()}) for of in (model, expected))
            assert tied == others


@pytest.mark.timeout(900)
def test_the_leaders_values_are_everyones(tmp_path: Path) -> None:
    """Those of buffers, tied parameters, and frozen and reparametrised ones of a pretrained model."""
    random, _ = models.precache(TrainingConfig(model="gpt-neo:test"), TEXT, tmp_path)
    speech, _ = models.precache(TrainingConfig(model="wav2vec2:test"), SPEECH, tmp_path)
    models.build(speech, 3).save_pretrained(tmp_path / "it")  # type: ignore[operator]
    pretrained, _ = models.precache(TrainingConfig(model=f"wav2vec2:{tmp_path / 'it'}"), SPEECH, tmp_path)
    with listen("127.0.0.1") as probe:
        port = probe.getsockname()[1]
    multiprocessing.spawn(compare, (port, [random, pretrained]), nprocs=2)  # type: ignore[no-untyped-call]
