"""The followers of an island: they run the leader's commands."""

import logging
import threading

from trainer.config import TrainingConfig
from trainer.island.processes import Island
from trainer.worker.passes import Passes
from trainer.worker.setup import build_follower

logger = logging.getLogger(__name__)


def follow(config: TrainingConfig, island: Island, stopping: threading.Event) -> int:
    """Train as a follower of an island until its leader ends. Returns the leader's exit status.

    Raises:
        ConfigError: This process cannot take part with this configuration.
        TrainingError: Another process of the island is gone.
    """
    process = build_follower(config, island, logger.warning)
    Passes(process, stopping)
    try:
        return island.follow()
    finally:
        process.samples.close()
