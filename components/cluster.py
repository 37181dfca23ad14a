"""The steps on a cluster. `trainer.kubernetes` runs them, and results are fetched from the workers' volume claims."""

import atexit
import os
import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.output import (
    CHECKPOINT,
    Output,
    dataset_metadata,
    evaluation_output,
    exported_output,
    link_or_copy,
    put_behind,
    training_output,
)
from components.runtime import IMAGE, RUNNER_PID
from trainer.config import TrainingConfig
from trainer.errors import TrainingError
from trainer.files import read_json, write_json
from trainer.kubernetes.objects.plan import DATA
from trainer.kubernetes.pod_main import EVALUATION
from trainer.places import Place, Places

if TYPE_CHECKING:
    from trainer.kubernetes.steps.step_context import StepContext

TRAINED = "trained.json"  # in train's artifact: the workers whose claims hold the model, newest first


class ClusterLauncher:
    """Implements `components.launcher.Launcher`."""

    def __init__(self, config: TrainingConfig) -> None:
        self._config = config
        self._scratch = Path(tempfile.mkdtemp(prefix=f"{config.run_id}-"))
        atexit.register(shutil.rmtree, self._scratch, ignore_errors=True)

    @cached_property
    def _context(self) -> "StepContext":
        from trainer.kubernetes.steps.step_context import StepContext

        return StepContext.open(self._config, IMAGE)

    def precache(self) -> Output:
        from trainer.data.manifest import MANIFEST, parse_manifest
        from trainer.kubernetes.steps.precache import precache

        held_out, claims = self._scratch / "held-out", self._scratch / "claims.json"
        manifests = precache(self._context, held_out)
        write_json(claims, manifests)
        manifest = parse_manifest(read_json(held_out / MANIFEST))
        files = {path.name: path for path in (*held_out.iterdir(), claims)}
        return Output(files, {"claims": list(manifests)} | dataset_metadata(manifest))

    def train(self) -> Output:
        from trainer.kubernetes.steps.training import train
        from trainer.monitor.report.run import KNOWN

        directory = self._scratch / "run"
        workers = train(self._context, directory)
        # Record which claims hold the model, for export
        claims = [{"worker": worker.index, "claim": worker.claim, "site": worker.site.name} for worker in workers]
        write_json(directory / TRAINED, claims)
        # Pods' logs may lack these, and there are no logs if the run had ended before
        write_json(directory / KNOWN, {"status": "complete", "config": self._config.model_dump(mode="json")})
        files = {path.name: path for path in directory.iterdir()}
        metadata = {"run_id": self._config.run_id, "claim": workers[0].claim}
        return training_output(directory, files, metadata, self._context.kubectl)

    def export(self, checkpoint: Any) -> Output:
        from trainer.kubernetes.steps.fetch_results import fetch_result

        workers, directory = self._context.workers, self._scratch / "export"
        claims = read_json(Path(checkpoint.path) / TRAINED)
        worker = fetch_result(self._context, [workers[claim["worker"]] for claim in claims], "export", directory)
        return exported_output(directory, worker=worker.index, claim=worker.claim)

    def evaluate(self, checkpoint: Any, model: Any, precached: Any) -> Output:
        scores = self._scores(model)
        print(f"held out: {read_json(scores)['headline']}", flush=True)
        # Without a backend, artifacts are not kept: put the results where those of a local run are
        here = RUNNER_PID in os.environ
        run_dir = Path(self._config.run_dir) if here else self._scratch / "run"
        # The report also needs the workers' events, of a resumed run including those that are already here
        trained = Path(checkpoint.path)
        for path in filter(Path.is_file, trained.rglob("*")):
            put = put_behind if path.name == "metrics.jsonl" else link_or_copy
            put(path, run_dir / path.relative_to(trained))
        link_or_copy(scores, run_dir / EVALUATION)
        if not self._config.storage.retain:
            try:
                self._context.clean_up(finished=False, claims=True)
            except TrainingError as error:  # the run is complete anyway
                self._context.show(f"warning: the claims are not deleted: {error}")
        output = evaluation_output(run_dir, read_json(scores), self._context.kubectl, self._places)
        if here:
            link_or_copy(Path(model.path), run_dir / "export")
        return output

    @property
    def _places(self) -> Places:
        """How the report describes the workers' directory, and this step's copy of train's artifact."""
        return Places({DATA: Place("the worker's claim"), str(self._scratch / "run"): Place(CHECKPOINT)})

    def _scores(self, model: Any) -> Path:
        """A model's scores. The pod that exported it also evaluated it; if that failed, another pod does so now."""
        from trainer.kubernetes.steps.fetch_results import fetch_result

        scores = Path(model.path) / EVALUATION
        if scores.is_file():
            return scores
        if "worker" not in model.metadata:
            raise TrainingError("the model's metadata does not say which claim holds it: export the model again")
        directory = self._scratch / "evaluation"
        fetch_result(self._context, [self._context.workers[int(model.metadata["worker"])]], "evaluate", directory)
        return directory / EVALUATION

    def clean_up(self) -> None:
        self._context.clean_up(finished=False)
