"""The whole pipeline on something that is no text: pictures, from precaching to their confusion matrix."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = {
    "model": "resnet18:test",
    "dataset": "digits",
    "validation-fraction": "0.2",
    "device": "cpu",
    "nodes": "1",
    "total-steps": "6",
    "local-steps": "3",
    "batch-size": "8",
    "per-device-train-batch-size": "8",
    "warmup-steps": "0",
    "eval-interval": "0",
    "eval-samples": "64",
    "wandb-logging": "false",
    "run-id": "digits",
}


@pytest.mark.timeout(900)
def test_pictures_go_through_the_pipeline(tmp_path: Path) -> None:
    flags = [part for name, value in FLAGS.items() for part in (f"--{name}", value)]
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "run", *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "% of the pictures are classified correctly; the most frequent class alone gives" in done.stdout
    run_dir = tmp_path / "runs" / "digits"
    found = json.loads((run_dir / "evaluation.json").read_text())
    assert found["sequences"] == 64 and len(found["sample"]["pictures"]) == 24
    assert sum(map(sum, found["confusion"]["matrix"])) == 64
    (output,) = (run_dir / "pipeline").glob("*/evaluate/executor_output.json")
    artifacts = json.loads(output.read_text())["artifacts"]
    (summary,) = artifacts["summary"]["artifacts"]
    assert (
        "### Confusion matrix\n\n| Class | 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 |" in Path(summary["uri"]).read_text()
    )
    (precached,) = json.loads(next((run_dir / "pipeline").glob("*/precache/executor_output.json")).read_text())[
        "artifacts"
    ]["precached"]["artifacts"]
    held_out = {path.name for path in Path(precached["uri"]).iterdir()}
    assert held_out == {"manifest.json", "validation-image.bin", "validation-label.bin"}
    report = (run_dir / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 24
    assert "Confusion matrix" in report and "Most frequent class" in report
