"""What every start of a worker needs, whatever its incarnation: imports and compiled code. For a standby."""

import gc
import os
from contextlib import suppress

from trainer.config import TrainingConfig


def set_up_torch() -> None:
    """Set what torch reads from the environment when it is first used."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages make fresh memory cheaper


def preload(config: TrainingConfig) -> None:
    """Import and compile what a worker with this configuration needs. Touches no device, and starts no thread.

    Whatever fails is left out; if it fails in the worker as well, the worker reports it.
    """
    set_up_torch()
    # Nothing may remain that a fork does not survive: a GPU's context, a thread
    fork_safe, before = "PYTORCH_NVML_BASED_CUDA_CHECK", {**os.environ}  # for libraries that look for a GPU
    os.environ[fork_safe] = "1"
    gc.disable()  # imports leave almost nothing to collect, and collections would take a sixth of their time
    try:
        import torch

        from trainer import models
        from trainer.data import directory
        from trainer.data.manifest import read_manifest
        from trainer.diloco.collective import warm_up
        from trainer.volume import Volume
        from trainer.worker import worker  # noqa: F401
        from trainer.worker.setup import algorithm

        threads, volume = torch.get_num_threads(), Volume.of(config)
        torch.set_num_threads(1)  # OpenMP's threads would not survive a fork
        # Build the model once, without memory, and compile the codec
        with suppress(Exception):
            manifest = read_manifest(directory(config, volume.datasets))
            if manifest is not None:
                with torch.device("meta"):  # a model's parts are imported when it is built
                    models.build(models.directory(config, manifest.for_model, volume.models), config.seed)
        with suppress(Exception):
            warm_up(*algorithm(config))
        torch.set_num_threads(threads)
    finally:
        gc.enable()
        if fork_safe not in before:
            del os.environ[fork_safe]
