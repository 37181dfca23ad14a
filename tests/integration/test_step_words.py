"""What the steps of a backend print and show names nothing that only their pods can open: `launcher=local` there."""

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.parameters import folded
from components.runtime import STARTED
from pipelines.pipeline import compiled
from tests.cluster.apiserver import Object
from tests.kfp_backend.launcher import stored
from tests.kfp_backend.server import Backend

pytestmark = pytest.mark.timeout(900)

STEPS = ("precache", "train", "export", "evaluate", "clean-up")
PARAMETERS = {
    "launcher": "local",
    "run_id": "first",
    "model": "gpt-neo-x:tiny",
    "tokenizer": "bytes",
    "sequence_length": 64,
    "validation_fraction": 0.5,
    "device": "cpu",
    "nodes": 1,
    "total_steps": 10,
    "local_steps": 5,
    "batch_size": 4,
    "per_device_train_batch_size": 4,
    "warmup_steps": 2,
    "eval_samples": 8,
    "wandb_logging": False,
}


class Place:
    """A backend whose steps all have one claim mounted at `volume`."""

    def __init__(self, backend: Backend, directory: Path) -> None:
        self.backend, self.volume = backend, directory / "volume"
        corpus = directory / "corpus"
        for path in (self.volume, corpus):
            path.mkdir()
        for source in sorted(Path(re.__file__).parent.glob("*.py")):
            shutil.copy(source, corpus)
        self.parameters = {**PARAMETERS, "dataset": f"files:{corpus}", "run_dir": str(self.volume / "runs" / "first")}

    def mount(self, claim: str) -> None:
        """Give each step's pod the claim."""

        def add(one: Object) -> None:
            one["spec"]["volumes"] = [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}]
            one["spec"]["containers"][0]["volumeMounts"] = [{"name": "runs", "mountPath": str(self.volume)}]

        def prepare(pod: Object) -> None:
            self.backend.kubernetes.update("pods", pod["metadata"]["name"], add)

        self.backend.before = dict.fromkeys(STEPS, prepare)

    def run(self, **changes: Any) -> str:
        """Run the compiled pipeline; how it has ended."""
        ir = next(yaml.safe_load_all(compiled()))
        self.run_id = self.backend.submit(ir, **folded({**self.parameters, **changes}))
        return str(self.backend.wait(self.run_id, 800)["state"])

    def said(self, step: str) -> list[str]:
        """The step's own lines, without the launcher's and kfp's."""
        lines = self.backend.log(step).splitlines()
        begun = next(place for place, line in enumerate(lines) if STARTED.fullmatch(line))
        return [line for line in lines[begun:] if not line.startswith("[KFP Executor")]

    def shown(self, step: str, key: str) -> str:
        """The text of an output artifact."""
        outputs = self.backend.tasks(self.run_id)[step]["outputs"]["artifacts"]
        ((found,),) = (one["artifacts"] for one in outputs if one["artifact_key"] == key)
        return stored(self.backend.root / "store", found["uri"]).read_text()

    def unreadable(self, text: str) -> list[str]:
        """Paths and links in a text that only the pod can open. Python's own are in every pod of the image."""
        found = re.findall(r"(?:file://\S+|(?<![\w:/.])/[\w.+-]+/[^\s\"'<>),;]*)", text)
        return [one for one in found if not one.startswith((sys.prefix, sys.base_prefix))]


@pytest.fixture
def place(tmp_path: Path) -> Any:
    with Backend("native", environment={"OMP_NUM_THREADS": "1"}) as backend:
        yield Place(backend, tmp_path)


@pytest.mark.faults
def test_steps_in_pods_say_what_is_on_which_claim(place: Place) -> None:
    place.mount("training-data")
    assert place.run() == "SUCCEEDED", "\n".join(map(place.backend.log, STEPS))
    for step in STEPS:
        lines = place.said(step)
        assert [line for line in lines if place.unreadable(line)] == [], step
        assert str(place.volume) not in "\n".join(lines)
    for word in ("logs in", "run first is complete:"):
        assert [line for line in place.said("train") if line.startswith(word)]
    assert "run first is complete: runs/first on claim training-data" in place.said("train")
    assert "(path runs/first/export on claim training-data)" in "\n".join(place.said("export"))
    assert "Written" in place.shown("evaluate", "report")
    for step, key in (("train", "training_summary"), ("evaluate", "summary"), ("evaluate", "report")):
        text = place.shown(step, key)
        kept = re.sub(r'(?s)<section id="configuration">.*?</section>', "", text)  # what was asked for
        assert place.unreadable(re.sub(r"(?s)<(style|script|svg)\b.*?</\1>", "", kept)) == [], key
    (trained,) = (one for one in place.backend.root.glob("store/**/checkpoint") if one.is_dir())
    assert (trained / "worker-0" / "metrics.jsonl").is_file()  # where the report says that they are
    assert (trained / "logs" / "worker-0.log").is_file()


def test_a_step_that_fails_says_so_without_a_path(place: Place) -> None:
    """No claim: the next step's pod has another disk, which here is what deletes the run's directory."""

    def lose(pod: Object) -> None:
        shutil.rmtree(place.volume / "runs")

    place.backend.before["train"] = lose
    assert place.run() == "FAILED"
    (error,) = (line for line in place.said("train") if line.startswith("error: "))
    assert place.unreadable(error) == []
