"""A sharded model has the values of a whole one in all processes, none of which has built it as a whole."""

import math
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from trainer import models
from trainer.config import TrainingConfig
from trainer.errors import ConfigError
from trainer.island.parallel import shard
from trainer.island.processes import Island
from trainer.process import listen
from trainer.worker import setup

TEXT = {"vocabulary_size": 257, "sequence_length": 32, "eos_token_id": 256}
SPEECH = {"vocabulary": ["<pad>", "<s>", "</s>", "A"]}
MODELS = {"gpt-neo:test": TEXT, "gpt-neo-x:test": TEXT, "wav2vec2:test": SPEECH}
# What each process imports: once for all of them, which are forked
IMPORTED = [__name__, *(f"transformers.models.{name}.modeling_{name}" for name in ("gpt_neo", "gpt_neox", "wav2vec2"))]

CONFIG = TrainingConfig.from_flat({"inner_parallel": "fsdp", "elastic_nproc_per_node": 2, "batch_size": 64, "seed": 7})


def island_of_two(rank: int, port: int) -> AbstractContextManager[Island]:
    own = {"LOCAL_RANK": rank, "RANK": rank, "LOCAL_WORLD_SIZE": 2, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in own.items()}}
    return Island.form(CONFIG, torch.device("cpu"))


def compare(rank: int, port: int, paths: list[Path]) -> None:
    """In each process of an island."""
    with island_of_two(rank, port) as island:
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
    in_two_processes(compare, paths)


def refuse(rank: int, port: int, path: Path, followers: str) -> None:
    """In each process of an island; `followers`: why they end."""
    with pytest.raises(ConfigError) as error, island_of_two(rank, port) as island:
        setup._model(CONFIG, path, island.device, island)
        raise ConfigError("model", "", f"the leader has ended with {island.follow()}")
    assert (WEIGHT if rank == 0 else followers) in str(error.value)


WEIGHT = "gpt_neox.layers.0.mlp.dense_h_to_4h.weight"
UNFIT: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda weights: weights.pop(WEIGHT), "cannot be built by the leader"),
    "not finite": (lambda weights: weights[WEIGHT].fill_(math.nan), "the leader has ended with 2"),
}


@pytest.mark.parametrize("problem", UNFIT)
def test_weights_that_do_not_fit_end_all_processes(problem: str, tmp_path: Path) -> None:
    random, _ = models.precache(TrainingConfig(model="gpt-neo-x:test"), TEXT, tmp_path)
    first: Any = models.build(random, 3)
    first.save_pretrained(tmp_path / "it")
    path, _ = models.precache(TrainingConfig(model=f"hf:{tmp_path / 'it'}"), TEXT, tmp_path)
    weights, (change, followers) = load_file(path / "model.safetensors"), UNFIT[problem]
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    in_two_processes(refuse, path, followers)


def in_two_processes(call: Callable[..., None], *arguments: Any) -> None:
    with listen("127.0.0.1") as probe:
        port = probe.getsockname()[1]
    multiprocessing.set_forkserver_preload(IMPORTED)
    multiprocessing.start_processes(call, (port, *arguments), nprocs=2, start_method="forkserver")  # type: ignore[no-untyped-call]
