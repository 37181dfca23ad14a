"""The worker's event log takes in what other rooms log for people."""

import json
import logging
from pathlib import Path

from trainer.worker.events import event_log


def test_a_log_record_that_is_marked_becomes_a_warning_event(tmp_path: Path) -> None:
    log = logging.getLogger("trainer.elastic.somewhere")
    path = tmp_path / "metrics.jsonl"
    with event_log(path):
        log.warning("only in the log")
        log.warning("worker %d cannot be reached", 3, extra={"event": True})
    log.warning("too late", extra={"event": True})
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(event["event"], event["message"]) for event in events] == [("warning", "worker 3 cannot be reached")]
