"""A worker's metrics for Prometheus: `http://<worker>:<metrics_port>/metrics`.

Names and types follow https://prometheus.io/docs/practices/naming/: base units, and counters that end in `_total`. A
restarted worker's counters start at 0 again, as Prometheus expects.
"""

from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)  # upper bounds of a synchronisation's buckets
_UPDATES = {Gauge: "set", Counter: "inc", Histogram: "observe"}
# Kind, name and help of the metric for a field of an event
_METRICS: dict[tuple[str, str], tuple[type[Gauge | Counter | Histogram], str, str]] = {
    ("step", "step"): (Gauge, "step", "Schedule position: inner steps since the start of the training."),
    ("step", "loss"): (Gauge, "loss", "Training loss of this worker's last inner step."),
    ("step", "gradient_norm"): (Gauge, "gradient_norm", "Norm of its gradient, before clipping."),
    ("step", "lr"): (Gauge, "learning_rate", "Learning rate of the inner optimizer."),
    ("step", "samples_per_second"): (Gauge, "samples_per_second", "Samples per second in the last inner step."),
    ("step", "samples"): (Counter, "samples", "Samples that this worker has trained on."),
    ("step", "tokens"): (Counter, "tokens", "Tokens (pixels, frames) in these samples."),
    ("round", "round"): (Gauge, "round", "Committed rounds."),
    ("round", "world_size"): (Gauge, "members", "Members of this worker's last round."),
    ("round", "bytes_sent"): (Counter, "sent_bytes", "Bytes sent by synchronisations."),
    ("round", "bytes_received"): (Counter, "received_bytes", "Bytes received by synchronisations."),
    ("round", "sync_seconds"): (Histogram, "synchronisation_seconds", "Duration of a synchronisation."),
    ("round", "exposed_seconds"): (Histogram, "exposed_seconds", "Time a synchronisation blocked inner steps."),
    ("round", "tokens_per_second"): (Gauge, "tokens_per_second", "Tokens per second in the last round."),
    ("round", "flops_per_second"): (
        Gauge,
        "model_flops_per_second",
        "Model FLOPs per second in the last round.",
    ),
    ("round", "mfu"): (Gauge, "mfu_ratio", "Model FLOPs per second as a fraction of the devices' peak."),
    ("round", "peak_memory"): (Gauge, "peak_memory_bytes", "Highest memory use of a process on its device."),
    ("eval", "loss"): (Gauge, "held_out_loss", "Loss on this worker's part of the held-out samples."),
    ("warning", "count"): (Counter, "warnings", "Warnings."),
}


class PrometheusSink:
    """Serves the metrics of a worker's events on a port of all addresses, from a thread.

    Raises:
        OSError: The port is taken.
    """

    name = "Prometheus"

    def __init__(self, port: int, run_id: str, worker: int) -> None:
        registry = CollectorRegistry()
        self._updates: dict[tuple[str, str], Callable[[float], None]] = {}
        for field, (kind, name, text) in _METRICS.items():
            buckets: dict[str, Any] = {"buckets": _SECONDS} if kind is Histogram else {}
            metric = kind(f"diloco_{name}", text, ("run_id", "worker"), registry=registry, **buckets)
            self._updates[field] = getattr(metric.labels(run_id, str(worker)), _UPDATES[kind])
        self._server, self._thread = start_http_server(port, registry=registry)

    def write(self, event: Mapping[str, Any]) -> None:
        kind, values = event["event"], dict(event)
        if kind == "step" and event["seconds"]:
            values["samples_per_second"] = event["samples"] / event["seconds"]
        if kind == "warning":
            values["count"] = 1
        for field, value in values.items():
            if (kind, field) in self._updates and isinstance(value, int | float):
                self._updates[kind, field](value)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
