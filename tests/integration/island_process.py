"""The real `trainer train`; a batch whose tokens add up to a multiple of `SPOIL` has a loss of NaN in training."""

import math
import os
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
    run_main(lambda: worker.train(TrainingConfig.model_validate(read_json(Path(sys.argv[1])))))
