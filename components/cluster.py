"""The steps on a cluster: `trainer.kubernetes` does the work, and the results come from the workers' claims."""

import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.launcher import Output, about, in_numbers, pages
from components.step import IMAGE
from trainer.config import TrainingConfig
from trainer.errors import TrainingError
from trainer.files import read_json, write_json

if TYPE_CHECKING:
    from trainer.kubernetes.steps.step_context import StepContext

TRAINED = "trained.json"  # in the artifact of train: which workers' claims have the model, the newest first


class ClusterLauncher:
    """See `components.launcher.Launcher`."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self._scratch = Path(tempfile.mkdtemp(prefix=f"{config.run_id}-"))  # the step's pod takes it away

    @cached_property
    def _context(self) -> "StepContext":
        from trainer.kubernetes.steps.step_context import StepContext

        return StepContext.open(self._config, IMAGE)

    def precache(self) -> Output:
        from trainer.data.manifest import MANIFEST, parse_manifest
        from trainer.kubernetes.steps.precache import precache

        held_out = self._scratch / "held-out"
        precached = precache(self._context, held_out)
        write_json(self._scratch / "claims.json", precached.claims)
        manifest = parse_manifest(read_json(held_out / MANIFEST))
        files = {path.name: path for path in (*held_out.iterdir(), self._scratch / "claims.json")}
        return Output(files, {"claims": list(precached.claims)} | about(manifest))

    def train(self) -> Output:
        from trainer.kubernetes.steps.training import train

        directory = self._scratch / "run"
        trained = train(self._context, directory)
        workers = [self._context.plan.workers[index] for index in trained.workers]
        places = [{"worker": worker.index, "claim": worker.claim, "site": worker.site.name} for worker in workers]
        write_json(directory / TRAINED, places)
        said, metrics = in_numbers(directory)
        files = {path.name: path for path in directory.iterdir()}
        return Output(files, {"run_id": self._config.run_id, "claim": workers[0].claim} | said, metrics)

    def export(self, trained: Any) -> Output:
        from trainer.export.export import FACTS
        from trainer.kubernetes.steps.fetch_results import fetch_result

        plan, directory = self._context.plan, self._scratch / "export"
        places = read_json(Path(trained.path) / TRAINED)
        worker = fetch_result(self._context, [plan.workers[place["worker"]] for place in places], "export", directory)
        facts = read_json(directory / FACTS)
        print(f"model of round {facts['round']}, step {facts['step']}, from claim {worker.claim}")
        names = ("run_id", "model", "parameters", "complete", "round", "step", "samples", "tokens")
        metadata = {"worker": worker.index, "claim": worker.claim} | {name: facts[name] for name in names}
        return Output({path.name: path for path in directory.iterdir()}, metadata)

    def evaluate(self, trained: Any, model: Any, precached: Any) -> Output:
        from trainer.kubernetes.steps.fetch_results import fetch_result

        if "worker" not in model.metadata:
            raise TrainingError("the model does not say on which worker's claim it lies: export it again")
        directory, run_dir = self._scratch / "evaluation", self._scratch / "run"
        fetch_result(self._context, [self._context.plan.workers[int(model.metadata["worker"])]], "evaluate", directory)
        shutil.copytree(trained.path, run_dir)  # the workers' events
        shutil.copy(directory / "evaluation.json", run_dir)
        if not self._config.storage.retain:
            self._context.clean_up(finished=False, claims=True)
        scores = read_json(run_dir / "evaluation.json")
        return Output(pages(run_dir), {}, scores)

    def clean_up(self) -> None:
        self._context.clean_up(finished=False)
