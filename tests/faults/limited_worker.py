"""The real worker, `trainer train`, each process of which may take `MEMORY_LIMIT` bytes beside its libraries.

It is limited by a control group of its own (version 1, or 2 in the root group), where shared memory counts for the
process that has touched it first. Where no group can be made, it is limited by RLIMIT_DATA: only private memory counts.
"""

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import transformers

from trainer.config import TrainingConfig
from trainer.errors import run_main
from trainer.files import read_json
from trainer.launch.memory_cgroup import ROOT
from trainer.worker import worker

GROUPS = "diloco-test-"  # how the names of the groups begin


def own_group(limit: int) -> Path | None:
    """Move this process to a group with this limit, in bytes; None: there is no permission, or no controller."""
    files = {ROOT / "memory": ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"), ROOT: ("memory.max",)}
    for parent, names in files.items():
        group = parent / f"{GROUPS}{os.getpid()}"
        with suppress(OSError):
            group.mkdir()
            for name in names:
                with suppress(FileNotFoundError):  # without swap, it has no limit
                    (group / name).write_text(str(limit))
            if (group / names[0]).read_text().strip() != "max":
                (group / "cgroup.procs").write_text(str(os.getpid()))
                return group
        with suppress(OSError):
            group.rmdir()
    return None


if __name__ == "__main__":
    limit = int(os.environ["MEMORY_LIMIT"])
    assert transformers.GPTNeoXForCausalLM  # imported before the limit
    if own_group(limit) is None:
        taken = psutil.Process().memory_info().data
        resource.setrlimit(resource.RLIMIT_DATA, (taken + limit, taken + limit))
    run_main(lambda: worker.train(TrainingConfig.model_validate(read_json(Path(sys.argv[1])))))
