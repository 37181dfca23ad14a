"""`python -m pipelines`: what is refused before anything starts, and what it says at the end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cli import main, outcome
from tests.cluster.apiserver import serving
from trainer.__main__ import main as train_main
from trainer.config import TrainingConfig
from trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--dataset", "files:nowhere"], "dataset"),
        (["--dataset", "stdlibb"], "dataset"),
        (["--model", "gpt-neo-z"], "model"),
        (["--device", "cuda:99"], "device"),
        (["--batch-size", "6"], "batch_size"),
        (["--launcher", "slurm"], "launcher"),
        (["--config", "missing.yaml"], "--config"),
        (["--resume", "nowhere"], "resume"),
        (["--run-dir", "file"], "run_dir"),
        (["--network-interface", "nope0"], "network_interface"),
        (["--port-range", "7000-7001"], "port_range"),
        (["--launcher", "pytorchjob", "--dataset", "c4"], "max_samples"),
        (["--launcher", "pytorchjob", "--run-dir", "file"], "run_dir"),
    ],
)
def test_bad_input(flags: list[str], field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a directory")
    good = ["--dataset", "stdlib", "--tokenizer", "bytes", "--device", "cpu", "--per-device-train-batch-size", "4"]
    with pytest.raises(ConfigError) as refused:
        main(["run", *good, "--batch-size", "8", *flags])
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("command", "namespace"), [(["run", "--launcher", "trainjob"], "default"), (["submit"], "kubeflow")]
)
def test_a_site_s_cluster_without_a_secret(
    command: list[str], namespace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KF_PIPELINES_ENDPOINT", raising=False)
    site = {"name": "far", "cluster": "oslo", "etcd_endpoints": ["etcd:2379"]}
    flags = ["--nodes", "1", "--sites", json.dumps([site]), "--port-range", "7000-7999", "--max-samples", "9"]
    with serving() as server:
        server.granted.add(("get", "", "secrets", "oslo"))
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        with pytest.raises(ConfigError, match=f"'oslo': there is no Secret of this name in namespace {namespace}"):
            main([*command, *flags])
    assert set(tmp_path.iterdir()) == {tmp_path / "kubeconfig"}


@pytest.mark.parametrize("output", [".", "file/pipeline.yaml"])
def test_an_output_that_cannot_be_written(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match=f"--output = '{output}': "):
        main(["compile", "--output", output])
    with pytest.raises(ConfigError, match=f"--output = '{output}': "):
        train_main(["report", "run", "--output", output])
    assert not list((tmp_path / "run").iterdir())


def test_numbers_and_addresses_of_commands(tmp_path: Path) -> None:
    for count in ("²", "-1", "9" * 5000):
        with pytest.raises(ConfigError, match=r"N = .*: must be a number of nodes"):
            train_main(["scale", "--", count])
    for endpoint in ("", ",", "[]"):
        with pytest.raises(ConfigError, match=r"--etcd = .*: must be host:port"):
            train_main(["status", "--etcd", endpoint, "--run-dir", str(tmp_path)])


def test_a_misspelt_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--total-step", "5"], ["--learning-rate", "1"]):
        with pytest.raises(SystemExit) as ended:
            main(["run", *flags])
        assert ended.value.code == 2
        assert flags[0] in capsys.readouterr().err


def test_the_outcome_names_model_scores_and_report(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({"headline": "2.500 bits per byte"}))
    config = TrainingConfig.from_flat({"run_dir": str(tmp_path), "run_id": "x"})
    assert outcome(config).splitlines() == [
        "",
        f"model       {tmp_path}/export",
        f"evaluation  {tmp_path}/evaluation.json: 2.500 bits per byte",
        f"report      {tmp_path}/report.html",
    ]


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from pipelines.cli import main\n"
        "for command in ([], ['run'], ['submit'], ['schedule', 'create']):\n"
        "    try: main([*command, '--help'])\n"
        "    except SystemExit: pass\n"
        "    heavy = {'torch', 'kfp', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "    assert not heavy, (command, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: python -m pipelines") == 4
