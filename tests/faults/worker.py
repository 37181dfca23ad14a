"""The real worker, `trainer train`, whose inner steps take `STEP_SECONDS` longer, without work for the CPU.

On two cores three workers would otherwise keep a fourth from starting, and what is measured would be that. A file
`pause` on the worker's own volume says other seconds for it alone. When the file `hurry` is in the run's directory,
there is nothing more to measure, and steps take as long as they take. A file `clock` on the worker's own volume says
by how many seconds its wall clock is wrong. While a file `stuck` is there, its collectives do not begin; one that would
makes a file `waits`.

Workers talk to each other over TLS, though they are on one machine.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any

from trainer.config import TrainingConfig
from trainer.elastic.attempt import Attempts
from trainer.errors import run_main
from trainer.files import read_json
from trainer.transport.credentials import Credentials
from trainer.worker import worker

STEP_SECONDS = 0.08

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    config = Path(sys.argv[1])
    pause, clock, stuck = (config.with_name(name) for name in ("pause", "clock", "stuck"))
    inner_step, right_time, collective = worker.Worker._inner_step, time.time, Attempts._collective

    def wrong_time() -> float:
        try:
            return right_time() + float(clock.read_text() or 0)
        except FileNotFoundError:
            return right_time()

    time.time = wrong_time

    def slow_step(worker: worker.Worker, *arguments: Any) -> Any:
        if not (config.parents[1] / "hurry").exists():
            time.sleep(float(pause.read_text()) if pause.exists() else STEP_SECONDS)
        return inner_step(worker, *arguments)

    def late_collective(attempts: Attempts, *arguments: Any) -> Any:
        while stuck.exists():
            config.with_name("waits").touch()
            time.sleep(0.05)
        return collective(attempts, *arguments)

    worker.Worker._inner_step = slow_step  # type: ignore[method-assign]
    Attempts._collective = late_collective  # type: ignore[method-assign]
    Credentials.encrypts = lambda self, connection: self.server is not None  # type: ignore[method-assign]
    run_main(lambda: worker.train(TrainingConfig.model_validate(read_json(config))))
