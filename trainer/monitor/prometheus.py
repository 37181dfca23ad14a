"""A worker's metrics for Prometheus: `http://<worker>:<metrics_port>/metrics`.

Names and types as Prometheus asks for them (https://prometheus.io/docs/practices/naming/): base units, and counters
that end in `_total`. A worker that was started again begins its counters anew, as counters may.
"""

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)  # upper bounds of a synchronisation's buckets
_LABELS = ("run_id", "worker")


class PrometheusSink:
    """Serves what the events of a worker say, from a thread.

    Args:
        port: Where it listens, on all addresses.
        run_id, worker: Labels of all metrics.

    Raises:
        OSError: The port is taken.
    """

    name = "Prometheus"

    def __init__(self, port: int, run_id: str, worker: int) -> None:
        registry, values = CollectorRegistry(), (run_id, str(worker))

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"diloco_{name}", text, _LABELS, registry=registry).labels(*values)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"diloco_{name}", text, _LABELS, registry=registry).labels(*values)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"diloco_{name}", text, _LABELS, registry=registry, buckets=_SECONDS).labels(*values)

        self._gauges = {
            ("step", "step"): gauge("step", "Schedule position: inner steps since the training began."),
            ("step", "loss"): gauge("loss", "Training loss of this worker's last inner step."),
            ("step", "gradient_norm"): gauge("gradient_norm", "Norm of its gradient, before it was clipped."),
            ("step", "lr"): gauge("learning_rate", "Learning rate of the inner optimizer."),
            ("round", "round"): gauge("round", "Rounds that are committed."),
            ("round", "world_size"): gauge("members", "Members of the last round that this worker took part in."),
            ("eval", "loss"): gauge("held_out_loss", "Loss of this worker's share of the held-out samples."),
        }
        self._rate = gauge("samples_per_second", "Samples of the last inner step, by its seconds.")
        self._counters = {
            ("step", "samples"): counter("samples", "Samples that this worker has trained on."),
            ("step", "tokens"): counter("tokens", "Tokens (pixels, frames) of them."),
            ("round", "bytes_sent"): counter("sent_bytes", "Bytes that synchronisations have sent."),
            ("round", "bytes_received"): counter("received_bytes", "Bytes that they have received."),
        }
        self._histograms = {
            ("round", "sync_seconds"): seconds("synchronisation_seconds", "Duration of a synchronisation."),
            ("round", "exposed_seconds"): seconds("exposed_seconds", "How long inner steps stood still for one."),
        }
        self._warnings = counter("warnings", "Warnings.")
        self._server, self._thread = start_http_server(port, registry=registry)

    def write(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        for key, value in event.items():
            if not isinstance(value, int | float):
                continue
            if found := self._gauges.get((kind, key)):
                found.set(value)
            elif counted := self._counters.get((kind, key)):
                counted.inc(value)
            elif observed := self._histograms.get((kind, key)):
                observed.observe(value)
        if kind == "step" and event["seconds"]:
            self._rate.set(event["samples"] / event["seconds"])
        if kind == "warning":
            self._warnings.inc()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
