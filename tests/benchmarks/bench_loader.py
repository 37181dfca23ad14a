"""How much of an inner step is spent waiting for data: `python tests/benchmarks/bench_loader.py [model] [batch size]`.

Prints one line of JSON; the share should stay below 2 %.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from trainer import data, models
from trainer.config import TrainingConfig
from trainer.volume import Volume


def main(model: str = "gpt-neo-x:tiny", batch_size: str = "8", steps: int = 40) -> None:
    with tempfile.TemporaryDirectory() as root:
        config = TrainingConfig.from_flat(
            {
                "model": model,
                "dataset": "stdlib",
                "tokenizer": "bytes",
                "sequence_length": 256,
                "device": "cpu",
                "dataset_cache_dir": f"{root}/datasets",
                "model_cache_dir": f"{root}/models",
            }
        )
        volume = Volume.of(config)
        manifest = data.precache(config, volume)
        train = data.open_dataset(data.directory(config, volume.datasets)).train
        network = models.build(models.directory(config, manifest.for_model, Path(config.model_cache_dir)), config.seed)
        size = int(batch_size)
        order = data.SampleOrder(len(train), config.seed)
        stream = data.batches(train, order, range((steps + 2) * size), size)
        waited = trained = 0.0
        for step in range(steps + 2):
            began = time.perf_counter()
            batch = next(stream)
            read = time.perf_counter()
            network(**batch, labels=batch["input_ids"]).loss.backward()
            if step >= 2:  # the first ones warm up
                waited += read - began
                trained += time.perf_counter() - read
        stream.close()
    share = waited / (waited + trained)
    print(
        json.dumps(
            {
                "model": model,
                "threads": torch.get_num_threads(),
                "step_ms": round(1000 * trained / steps, 3),
                "waiting_ms": round(1000 * waited / steps, 4),
                "waiting_share": round(share, 5),
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])
