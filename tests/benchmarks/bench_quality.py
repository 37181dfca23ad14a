"""Held-out loss of two DiLoCo workers against the `ddp` baseline, after the same number of samples.

    python tests/benchmarks/bench_quality.py [--steps 450] [--seeds 3] [--first-seed 1]

Real runs (`python -m trainer launch`: etcd, agents, two workers) on Python's standard library, one after the other,
from the same initialisation and over the same samples, with the laptop's recipe. Seed 0 is what the recipe's outer
learning rate and momentum were picked on, so it does not judge them. Prints one table, and writes build/quality.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from trainer.files import write_json

ROOT = Path(__file__).parents[2]
METHODS = {
    "ddp": ["--optim-method", "ddp"],
    "DiLoCo, Nesterov 0.7 / 0.9": ["--optim-method", "sgd", "--outer-lr", "0.7", "--outer-momentum", "0.9"],
    "DiLoCo, Nesterov 0.8 / 0.5": ["--optim-method", "sgd", "--outer-lr", "0.8", "--outer-momentum", "0.5"],
}


def run(flags: list[str], steps: int, seed: int, shared: Path, run_dir: Path) -> dict[str, float]:
    """Held-out loss and megabytes sent by a worker of one run."""
    common = ["--config", str(ROOT / "trainer/recipes/stdlib.yaml"), "--total-steps", str(steps), "--seed", str(seed)]
    common += ["--run-id", "bench", "--run-dir", str(run_dir), "--wandb-logging", "false", "--max-samples", "400"]
    common += ["--dataset-cache-dir", str(shared / "datasets"), "--model-cache-dir", str(shared / "models"), *flags]
    for command in ("precache", "launch"):
        subprocess.run([sys.executable, "-m", "trainer", command, *common], check=True, stdout=subprocess.DEVNULL)
    scores, sent = [], 0
    for worker in sorted(run_dir.glob("worker-*")):
        events = [json.loads(line) for line in (worker / "metrics.jsonl").read_text().splitlines()]
        last = [event for event in events if event["event"] == "eval"][-1]
        scores.append((last["loss"], last["samples"]))
        sent += sum(event["bytes_sent"] for event in events if event["event"] == "round")
    samples = sum(count for _, count in scores)
    return {"loss": sum(loss * count for loss, count in scores) / samples, "sent_mb": sent / len(scores) / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=450, help="inner steps of each run")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--first-seed", type=int, default=1, help="the seed of the first of them")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="beside ddp")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    methods = {name: METHODS[name] for name in METHODS if name == "ddp" or name in arguments.methods}
    results: dict[str, list[dict[str, float]]] = {method: [] for method in methods}
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            for number, (method, flags) in enumerate(methods.items()):
                place = Path(directory) / f"{seed}-{number}"
                results[method].append(run(flags, arguments.steps, seed, Path(directory) / "shared", place))
                print(f"seed {seed}, {method}: {results[method][-1]}", file=sys.stderr, flush=True)
    print(f"{'method':<30}{'held-out loss':>15}{'against ddp':>13}{'from':>9}{'to':>9}{'MB sent a worker':>19}")
    for method, found in results.items():
        losses = [result["loss"] for result in found]
        gaps = [(loss / ddp["loss"] - 1) * 100 for loss, ddp in zip(losses, results["ddp"], strict=True)]
        row = f"{statistics.mean(losses):>15.4f}{statistics.mean(gaps):>+12.2f}%{min(gaps):>+8.2f}%{max(gaps):>+8.2f}%"
        print(f"{method:<30}{row}{found[0]['sent_mb']:>19.1f}")
    write_json(ROOT / "build" / "quality.json", {"steps": arguments.steps, "runs": results})


if __name__ == "__main__":
    main()
