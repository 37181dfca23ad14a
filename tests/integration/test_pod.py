"""What a pod runs, as a process: how it ends when it is told to."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.timeout(600)


def test_a_pod_that_hands_over_a_result_leaves_on_sigterm(tmp_path: Path) -> None:
    config = {"run_id": "mine", "run_dir": str(tmp_path), "dataset": "stdlib", "device": "cpu"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    # A container's first process ignores signals for which it has no handler: here that is made so.
    script = (
        "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "from pathlib import Path; from trainer.__main__ import main; from trainer.errors import run_main\n"
        "from trainer.kubernetes import pod_main; pod_main._RESULTS['export'] = lambda config: {}\n"
        "run_main(lambda: main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "pod", "export", "--config", str(tmp_path / "config.yaml")]
    environment = {**os.environ, "RESULT_TOKEN": "a token of this test"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as pod:
        assert pod.stdout is not None
        assert next(line for line in pod.stdout if line.startswith("result "))  # it waits for the step now
        pod.send_signal(signal.SIGTERM)
        try:
            assert pod.wait(300) == 143
        finally:
            pod.kill()
