"""The real `trainer train`; a batch whose tokens add up to a multiple of `SPOIL` has a loss of NaN in training.

With `MEMORY`, the process may take so many bytes of its own from now on; memory that it shares does not count.
"""

import math
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from trainer.config import TrainingConfig
from trainer.errors import run_main
from trainer.files import read_json
from trainer.tasks.language_modelling import LanguageModelling
from trainer.worker import worker

if __name__ == "__main__":
    plain, every = LanguageModelling.loss, int(os.environ["SPOIL"])

    def loss(self: LanguageModelling, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        spoilt = model.training and int(batch["input_ids"].sum()) % every == 0
        return plain(self, model, batch) * (math.nan if spoilt else 1.0)

    LanguageModelling.loss = loss  # type: ignore[method-assign]
    if more := int(os.environ.get("MEMORY", "0")):
        (line,) = (one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmData"))
        most = int(line.split()[1]) * 1024 + more
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    run_main(lambda: worker.train(TrainingConfig.model_validate(read_json(Path(sys.argv[1])))))
