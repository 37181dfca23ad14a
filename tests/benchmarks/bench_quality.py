"""The cost of each method in held-out loss, and the bytes it sends.

    python tests/benchmarks/bench_quality.py [--task text] [--workers 2 4 8] [--rounds 128] [--local-steps 8]
        [--hidden-size 32] [--inner-lr 0.03] [--seeds 3] [--first-seed 1] [--evaluations 16] [--output quality.json]
        [--quick] [--methods fp32 ternary "int2 merge=sqrt lr=1.2" ...]

A method is a name in METHODS, or a codec with its own settings, as there. The others are compared with the first.

Workers are processes with one thread each. They are started once and make all runs, one after the other, with the
product's own parts: `DiLoCo`, the codecs, the collective over the transport (TCP on loopback), the inner optimizer and
its schedule, the precached dataset, the model family. Only the quorum is simpler: its members are fixed. The model is a
small GPT-NeoX, and the text is Python's standard library, or those of another of the tasks in `quality_tasks.py`; held-
out samples are never trained on. With the same seed and number of workers, all methods start from the same
initialisation and see the same samples.

The settings below, including those of fp32, were tuned on seed 0, so that seed is not used to compare methods. (The
search over inner and outer learning rate, momentum and feedback of each method was coarse, not a full grid.)

It prints one table for each number of workers: the mean held-out loss, its excess over the first method's loss with the
same seed (mean, minimum, maximum), and the MB that a worker sent in the run, as counted by the kernel, with the ratio
to the first method's. It writes build/quality.json, with the loss and the bytes so far at some rounds of each run, from
which `quality_curves.py` draws. It takes about an hour on 2 idle cores; --quick takes a few minutes and only checks
that everything works: its losses mean nothing.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import yaml
from torch import Tensor, nn
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # for the benchmarks' shared code

from tests.benchmarks.mesh import Members, Mesh, Plain  # noqa: E402
from tests.benchmarks.quality_tasks import TASKS, Setting, prepare  # noqa: E402
from trainer import data, models  # noqa: E402
from trainer.config import TrainingConfig  # noqa: E402
from trainer.diloco import DiLoCo, LocalQuorum, Nesterov, Overlap, codecs  # noqa: E402
from trainer.diloco.codecs import Codec, Fp32  # noqa: E402
from trainer.files import write_json  # noqa: E402
from trainer.process import listen  # noqa: E402
from trainer.tasks import scoring, tasks  # noqa: E402
from trainer.volume import Volume  # noqa: E402
from trainer.worker.optimizer import inner_optimizer, learning_rate  # noqa: E402
from trainer.worker.passes import CLIP_NORM  # noqa: E402

OUTPUT = ROOT / "build" / "quality.json"
CPU = torch.device("cpu")
AT_ONCE = 32  # held-out samples that are scored together, at least
Row = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """The synchronisation of a run, and its interval: see `DiLoCo`.

    Attributes:
        rounds: The interval between two synchronisations, in rounds.
        inner_lr: The peak learning rate of the inner optimizer; 0: the common one.
        merge: See `DiLoCo`.
    """

    codec: Codec = field(default_factory=Fp32)
    lr: float = 1.0
    momentum: float = 0.5
    rounds: float = 1
    fragments: int = 1
    overlap: Overlap | None = None
    merge: Literal["mean", "sqrt", "rda"] = "mean"
    ddp: bool = False
    inner_lr: float = 0.0

    def sync_every(self, local_steps: int) -> int:
        """Inner steps between two synchronisations of a parameter."""
        return round(self.rounds * local_steps)

    def interval(self, local_steps: int) -> int:
        """Inner steps between two exchanges."""
        return 1 if self.ddp else self.sync_every(local_steps) // self.fragments

    def hidden(self, local_steps: int) -> int:
        """Inner steps during which an exchange goes on, so that it takes no time: at most those until the next one."""
        most = self.interval(local_steps)
        return min(self.overlap.delay or most, most) if self.overlap else 0


@dataclass(frozen=True)
class Plan:
    """The length of a run, equal for all methods."""

    steps: int
    local_steps: int
    inner_lr: float
    evaluations: int

    def marks(self, method: Method) -> list[int]:
        """The inner steps after which to evaluate, evenly spaced among those that end one of the method's rounds."""
        every = method.sync_every(self.local_steps) // method.fragments
        wanted = [self.steps * number / self.evaluations for number in range(1, self.evaluations + 1)]
        return sorted({min(math.ceil(step / every) * every, self.steps) for step in wanted})


def method(name: str = "fp32", **settings: Any) -> Method:
    """A method with a codec by name; `settings` are those of the codec and of `Method`."""
    of_method = {key: settings.pop(key) for key in list(settings) if key in Method.__dataclass_fields__}
    return Method(codecs.make(name, **settings), **of_method)


def parsed(text: str) -> Method:
    """A method by its name in METHODS, or "codec setting=value ..."."""
    if text in METHODS:
        return METHODS[text]
    name, *settings = text.split()
    return method(name, **{key: yaml.safe_load(value) for key, value in (setting.split("=") for setting in settings)})


METHODS = {
    "ddp": method(ddp=True),
    "fp32": method(),
    "fp32, Nesterov 0.7 / 0.9": method(lr=0.7, momentum=0.9),
    "fp32, two rounds in one": method(rounds=2),
    "bf16": method("bf16"),
    "int8": method("int8"),
    "int4": method("int4"),
    "int4, two rounds in one": method("int4", rounds=2),
    "int4, 5 fragments": method("int4", fragments=5),
    "fp32, 5 steps late": method(overlap=Overlap(5)),
    "fp32, 29 steps late": method(overlap=Overlap(29)),
    "fp32, 29 steps late, mixed": method(overlap=Overlap(29, 0.5)),
    "int3": method("int3"),
    "int2": method("int2", feedback=0.5, lr=1.2),
    "int2, RDA": method("int2", feedback=0.8, momentum=0.0, merge="rda"),
    "fp32, RDA": method(momentum=0.0, merge="rda"),
    "sparse": method("sparse", feedback=0.8, lr=1.2, momentum=0.0, merge="sqrt"),
    "sparse, RDA": method("sparse", feedback=0.8, lr=1.2, momentum=0.0, merge="rda"),
    "ternary": method("ternary", feedback=0.3, lr=1.2),
    "ternary, mean as coarse": Method(codecs.Ternary(feedback=0.3), lr=1.2),
    "ternary, no feedback": method("ternary", lr=1.4),
    "ternary, two rounds in one": method("ternary", feedback=0.3, lr=1.2, rounds=2),
    "sign": method("sign", feedback=0.5, lr=1.2),
    "sparse, 512": method("sparse", feedback=0.5, topk=512),
    "sparse, 512, no feedback": method("sparse", lr=1.4, topk=512),
    "sparse, 1024": method("sparse", feedback=0.3, topk=1024, lr=1.2),
    "sparse, SparseLoCo's": method("sparse", feedback=0.95, topk=64, momentum=0.0),
    "demo, 512 of 4 bits": method("demo", feedback=0.9, topk=512, values="int4", momentum=0.3),
    "demo, 1024 of 4 bits": method("demo", feedback=0.8, topk=1024, values="int4", lr=1.2, momentum=0.3),
}

RECOMMENDED = ["fp32", "int4", "sparse", "sparse, RDA"]


# The workers


class Worker:
    """One of `size` workers. All workers get the same requests at the same time."""

    def __init__(self, config: TrainingConfig, directory: Path, held_out: int, rank: int, size: int, port: int) -> None:
        torch.set_num_threads(1)
        self.config, self.directory, self.rank, self.size = config, directory, rank, size
        store = TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
        self.plain = Plain(store, rank, size, "127.0.0.1")
        self.mesh = Mesh(store, "quality", rank, size, "127.0.0.1", tls=False)
        self.mesh.connect()
        spec = models.resolve(config.model)
        self.family, self.task = spec.family, tasks()[spec.family.task]
        self.dataset = data.open_dataset(data.directory(config, Volume.of(config).datasets))
        self.held_out = data.evenly(len(self.dataset.validation), held_out)[rank::size]
        self.shared = scoring.shared_tensors(self.dataset.shared, CPU)

    def train(self, chosen: Method, plan: Plan, seed: int) -> Row:
        """Make one run; returns the parameters' `hash` and number (`size`), and the `points` of its curve.

        A point has the score sums on this worker's part of the held-out samples, and the bytes so far.
        """
        steps, lr = plan.steps, chosen.inner_lr or plan.inner_lr
        config = self.config.with_values(total_steps=steps, warmup_steps=steps // 10, lr=lr, seed=seed)
        torch.manual_seed(seed)
        model = self.family.build(self.directory)
        torch.manual_seed(1000 * seed + self.rank)  # dropout differs
        parameters = list(model.parameters())
        optimizer = inner_optimizer(config, model)
        diloco = DiLoCo(
            model,
            optimizer,
            outer=Nesterov(1.0, 0.0) if chosen.ddp else Nesterov(chosen.lr, chosen.momentum),
            codec=chosen.codec,
            sync_every=chosen.sync_every(plan.local_steps),
            quorum=LocalQuorum() if chosen.ddp else Members(self.mesh),
            total_steps=steps,
            fragments=chosen.fragments,
            overlap=chosen.overlap,
            merge=chosen.merge,
        )
        everybody = np.arange(steps * self.size * config.batch_size).reshape(steps, self.size, config.batch_size)
        order = data.SampleOrder(len(self.dataset.train), seed)
        mine, marks, before, points = everybody[:, self.rank].ravel(), plan.marks(chosen), self.bytes(), list[Row]()
        with closing(data.batches(self.dataset.train, order, mine, config.batch_size)) as batches:
            for batch in batches:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(diloco.schedule.step, config)
                self.task.loss(model, scoring.on_device(batch, self.shared, CPU)).backward()
                if chosen.ddp:
                    self._average([parameter.grad for parameter in parameters if parameter.grad is not None])
                nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                diloco.after_inner_step(config.batch_size)
                if (step := round(diloco.schedule.step)) == marks[len(points)]:
                    sent, received = (now - then for now, then in zip(self.bytes(), before, strict=True))
                    points.append({"step": step, "sent": sent, "received": received, "sums": self._score(model)})
        assert diloco.complete and len(points) == len(marks), "the run is not complete"
        return {"hash": diloco.state.hash(), "size": diloco.state.parameters.numel(), "points": points}

    def _average(self, gradients: list[Tensor]) -> None:
        """Average the gradients over the workers, as in data parallelism."""
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        self.plain.sum(flat)
        for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient) / self.size)

    def _score(self, model: nn.Module) -> dict[str, float]:
        """Score sums of the model as this worker has it: after an exchange, the global one, unless it overlaps."""
        size, sums = max(AT_ONCE, self.config.batch_size), dict[str, Any]()
        with scoring.evaluating(model, CPU, seed=0):
            scoring.recompute_buffers(self.task, model, self.dataset, size, CPU)
            with torch.inference_mode():
                for batch in scoring.batches(self.dataset.validation, self.held_out, size, self.shared, CPU):
                    scoring.add(sums, self.task.score(model, batch))
        return sums

    def bytes(self) -> tuple[int, int]:
        """Bytes sent and received so far."""
        both = zip(self.mesh.bytes(), self.plain.bytes(), strict=True)
        sent, received = (sum(pair) for pair in both)
        return sent, received


def serve(questions: Connection, *arguments: Any) -> None:
    """Run a worker that executes the incoming requests."""
    worker = Worker(*arguments)
    while (asked := questions.recv()) is not None:
        questions.send(worker.train(*asked))


# The main process


class Crew:
    """`size` workers, which end with this process."""

    def __init__(self, config: TrainingConfig, directory: Path, held_out: int, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        with listen("127.0.0.1") as free:
            port = free.getsockname()[1]
        self.task = tasks()[models.resolve(config.model).family.task]
        self._pipes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (theirs, config, directory, held_out, rank, size, port)
            context.Process(target=serve, args=arguments, daemon=True).start()
            theirs.close()
            self._pipes.append(ours)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for pipe in self._pipes:
            with suppress(OSError):  # it has ended, with a message on stderr
                pipe.send(None)

    def train(self, chosen: Method, plan: Plan, seed: int) -> Row:
        """Make one run.

        Returns:
            Its held-out `loss`, the `mb` that a worker sent, its `seconds`, the number of `parameters`, and the `curve`
            of loss and MB, where `busiest_mb` is the most that a worker has sent or received.
        """
        started = time.perf_counter()
        for pipe in self._pipes:
            pipe.send((chosen, plan, seed))
        answers = [pipe.recv() for pipe in self._pipes]
        assert len({answer["hash"] for answer in answers}) == 1, "the workers' parameters differ"
        curve = [self._point(points) for points in zip(*(answer["points"] for answer in answers), strict=True)]
        last, seconds = curve[-1], time.perf_counter() - started
        return {
            "loss": last["loss"],
            "mb": last["mb"],
            "seconds": seconds,
            "parameters": answers[0]["size"],
            "curve": curve,
        }

    def _point(self, points: Sequence[Row]) -> Row:
        """A point of a run's curve from all workers' answers."""
        return {
            "step": points[0]["step"],
            "loss": self.task.metrics(scoring.total(point["sums"] for point in points))["loss"],
            "mb": statistics.mean(point["sent"] for point in points) / 1e6,
            "busiest_mb": max(max(point["sent"], point["received"]) for point in points) / 1e6,
        }


def table(rows: dict[str, list[Row]]) -> str:
    """A table of each method's runs, compared seed by seed with the first method's."""
    width = max(len(name) for name in rows)
    base = next(iter(rows.values()))
    lines = [
        f"{'method':<{width}}{'loss':>9}{'against ' + next(iter(rows)):>16}{'from':>8}{'to':>8}{'MB':>10}{'fewer':>8}"
    ]
    for name, runs in rows.items():
        gaps = [(run["loss"] / other["loss"] - 1) * 100 for run, other in zip(runs, base, strict=False)]
        loss, sent, of_base = (
            statistics.mean(run[key] for run in of) for key, of in (("loss", runs), ("mb", runs), ("mb", base))
        )
        gap = f"{statistics.mean(gaps):>+15.2f}%{min(gaps):>+7.2f}%{max(gaps):>+7.2f}%"
        lines.append(f"{name:<{width}}{loss:>9.4f}{gap}{sent:>10.3f}{of_base / sent:>8.1f}")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="text", help="what to train")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8], help="worker counts; one table each")
    parser.add_argument("--methods", nargs="+", default=RECOMMENDED, metavar="METHOD", help="compared with the first")
    parser.add_argument("--rounds", type=int, default=128)
    parser.add_argument("--local-steps", type=int, default=8, help="inner steps per round")
    parser.add_argument("--hidden-size", type=int, default=32, help="hidden size of the language model")
    parser.add_argument("--inner-lr", type=float, default=0, help="for methods that set none; by default, the task's")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, and so of runs of each method")
    parser.add_argument("--first-seed", type=int, default=1, help="the first seed")
    parser.add_argument("--evaluations", type=int, default=16, help="points of each run's curve")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--quick", action="store_true", help="one short run of each method")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.seeds = 4, 1
    return arguments


def main() -> None:
    arguments = parse()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the workers
    chosen = {name: parsed(name) for name in arguments.methods}
    setting: Setting = TASKS[arguments.task]
    steps, local = arguments.rounds * arguments.local_steps, arguments.local_steps
    plan = Plan(steps, local, arguments.inner_lr or setting.inner_lr, arguments.evaluations)
    about = {name: {"interval": one.interval(local), "hidden": one.hidden(local)} for name, one in chosen.items()}
    results: dict[str, dict[str, list[Row]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        prepared = prepare(Path(directory), setting, arguments.hidden_size)
        for workers in arguments.workers:
            rows = results[str(workers)] = {name: [] for name in chosen}
            with Crew(*prepared, setting.held_out, workers) as crew:
                for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
                    for name, wanted in chosen.items():
                        row = crew.train(wanted, plan, seed)
                        rows[name].append({"seed": seed, **row})
                        figures = {key: value for key, value in row.items() if key != "curve"}
                        print(f"{workers} workers, seed {seed}, {name}: {figures}", file=sys.stderr, flush=True)
            head = f"{arguments.task}, {workers} workers, {plan.steps} steps, seeds {arguments.first_seed} to {seed}"
            print(f"\n{head}\n{table(rows)}", flush=True)
            arguments.output.parent.mkdir(exist_ok=True)
            write_json(arguments.output, {"task": arguments.task, **asdict(plan), "methods": about, "runs": results})


if __name__ == "__main__":
    main()
