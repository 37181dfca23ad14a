"""A sharded model has the values of a whole one in all processes, none of which has built it as a whole."""

import os
import shutil
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
MODELS = {"gpt-neo:test": TEXT, "gpt-neo-x:test": TEXT, "wav2vec2:test": SPEECH}


def compare(rank: int, port: int, paths: list[Path]) -> None:
    """In each process of an island."""
    own = {"LOCAL_RANK": rank, "RANK": rank, "LOCAL_WORLD_SIZE": 2, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in own.items()}}
    config = TrainingConfig.from_flat({"inner_parallel": "fsdp", "elastic_nproc_per_node": 2, "batch_size": 64})
    with Island.form(config, torch.device("cpu")) as island:
        for path in paths:
            expected = models.build(path, 7)
            if island.leads:
                model, deferred = models.build_deferred(path, 7, large=1)
                assert all(parameter.is_meta for parameter in model.parameters())
                shard(model, island.device, path.name, deferred.value)
            else:
                model = models.build(path, 7, "meta")
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
def test_the_values_of_a_whole_model_are_everyones(tmp_path: Path) -> None:
    """Those of buffers, tied parameters, and frozen and reparametrised ones of a pretrained model, in several files."""
    paths = []
    for name, data in MODELS.items():
        random, _ = models.precache(TrainingConfig(model=name), data, tmp_path)
        first: Any = models.build(random, 3)
        first.save_pretrained(tmp_path / name)
        source = f"{name.partition(':')[0]}:{tmp_path / name}"
        pretrained, _ = models.precache(TrainingConfig(model=source), data, tmp_path)
        # As precaching writes a large one: in several files
        shutil.copytree(pretrained, parts := tmp_path / f"{pretrained.name}-parts")
        (parts / "model.safetensors").unlink()
        first.save_pretrained(parts, max_shard_size="20KB", save_original_format=False)
        assert len(list(parts.glob("*.safetensors"))) > 1
        paths += [random, pretrained, parts]
    with listen("127.0.0.1") as probe:
        port = probe.getsockname()[1]
    multiprocessing.spawn(compare, (port, paths), nprocs=2)  # type: ignore[no-untyped-call]
