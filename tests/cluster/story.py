"""A kubelet that plays what pods do, in moments: everything goes well, unless a test says otherwise."""

import base64
import json
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.cluster.apiserver import Object
from tests.cluster.nodes import Cluster
from trainer.data.manifest import SplitCounts, TextManifest
from trainer.errors import TrainingError
from trainer.transport.handover import ResultServer

MANIFEST = {"hash": "abc", "dataset": "files:corpus"}

SPLIT = SplitCounts(documents=1, tokens=64, sequences=1, bytes=64)
HELD_OUT = TextManifest(
    **MANIFEST,
    revision="1",
    inputs={},
    versions={},
    tokenizer="bytes",
    vocabulary_size=257,
    eos_token_id=256,
    sequence_length=64,
    train=SPLIT,
    validation=SPLIT,
    byte_counts=[1] * 256,
)
FACTS = {
    "run_id": "mine",
    "model": "gpt-neo-x:tiny",
    "parameters": 1000,
    "complete": True,
    "round": 2,
    "step": 20,
    "samples": 80,
    "tokens": 5120,
}
SCORES = {"headline": "bits per byte 4.1", "bits_per_byte": 4.1, "time": 1.0, "sample": [], "confusion": None}


def whole_results() -> dict[str, str]:
    """What result pods hand over, complete enough for all steps of the pipeline."""
    return {
        "manifest.json": HELD_OUT.model_dump_json(),
        "training.json": json.dumps(FACTS),
        "evaluation.json": json.dumps(SCORES),
    }


class Story:
    """What becomes of pods, by their component: `precache`, `held-out`, `train`, `export`, `evaluate`.

    Attributes:
        told: What a test wants instead, by component: called with the cluster, the pod, and how many pods of this name
            there were before.
        released: Training pods end when it is set.
        lives: How many pods of each name there were.
        results: The files that result pods hand over.
    """

    def __init__(self) -> None:
        self.told: dict[str, Callable[[Cluster, Object, int], None]] = {}
        self.released = threading.Event()
        self.released.set()
        self.lives: dict[str, int] = {}
        self.results = {"manifest.json": "{}"}

    def __call__(self, cluster: Cluster, pod: Object) -> None:
        if "labels" not in pod["metadata"]:
            return  # a person's own pod: nothing runs in it
        component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        # A Job's pods have a random ending.
        owner = pod["metadata"]["ownerReferences"][0]
        name = owner["name"] if owner["kind"] == "Job" else pod["metadata"]["name"]
        life = self.lives[name] = self.lives.get(name, -1) + 1
        if component in self.told:
            self.told[component](cluster, pod, life)
        elif component == "train":
            self.train(cluster, pod)
        elif component == "precache":
            self.precache(cluster, pod)
        else:
            self.serve(cluster, pod)

    def precache(self, cluster: Cluster, pod: Object, **manifest: Any) -> None:
        """A claim is filled."""
        cluster.start(pod)
        cluster.say(pod, "precaching: 1 of about 1 MB")
        cluster.say(pod, f"precached {json.dumps({**MANIFEST, **manifest})}")
        cluster.end(pod, 0)

    def fail(self, component: str, words: str, status: int = 1) -> None:
        """All pods of this component end with an error."""

        def fail(cluster: Cluster, pod: Object, life: int) -> None:
            cluster.start(pod)
            cluster.say(pod, f"error: {words}")
            cluster.end(pod, status)

        self.told[component] = fail

    def train(self, cluster: Cluster, pod: Object, rounds: int = 2) -> None:
        """A worker trains to the end; or leaves, when its pod is deleted."""
        cluster.start(pod)
        self.metrics(cluster, pod, "start", run_id="mine", config={})
        for number in range(1, rounds + 1):
            self.metrics(cluster, pod, "step", round=number, step=10 * number, loss=2.5, samples=4)
            self.metrics(cluster, pod, "round", round=number, step=10 * number, loss=2.5)
        self.metrics(cluster, pod, "checkpoint", round=rounds, step=10 * rounds)
        while not self.released.wait(0.05):
            if not cluster.is_wanted(pod):
                cluster.end(pod, 143)
                return
        self.metrics(cluster, pod, "end", status="complete", step=10 * rounds)
        cluster.end(pod, 0)

    def metrics(self, cluster: Cluster, pod: Object, event: str, **content: Any) -> None:
        """A worker's event."""
        cluster.say(pod, f"metrics {json.dumps({'local_rank': 0, 'event': event, 'time': 1.0, **content})}")

    def serve(self, cluster: Cluster, pod: Object) -> None:
        """A result is handed over."""
        with tempfile.TemporaryDirectory() as directory:
            files = {name: Path(directory) / str(number) for number, name in enumerate(self.results)}
            for name, path in files.items():
                path.write_text(self.results[name])
            with ResultServer(files, token_of(cluster, pod), 0) as server:
                cluster.start(pod)
                cluster.say(pod, f"result {json.dumps({'port': server.port})}")
                while not server.delivered and cluster.is_wanted(pod):
                    with suppress(TrainingError):  # nobody has come yet
                        server.wait(0.2)
        cluster.end(pod, 0 if server.delivered else 143)


def token_of(cluster: Cluster, pod: Object) -> str:
    """The token in the environment of a result's pod."""
    variables = {one["name"]: one for one in pod["spec"]["containers"][0]["env"]}
    source = variables["RESULT_TOKEN"]["valueFrom"]["secretKeyRef"]
    secret = cluster.server.all("secrets")[source["name"]]
    return str(
        secret.get("stringData", {}).get(source["key"]) or base64.b64decode(secret["data"][source["key"]]).decode()
    )
