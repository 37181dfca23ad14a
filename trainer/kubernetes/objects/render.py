"""The objects of a run as YAML, without a cluster: `python -m trainer.kubernetes.objects.render`.

It prints the objects for `--config FILE` and the flags of all parameters. The jobs are TrainJobs unless `launcher` says
otherwise. `make manifests` updates `manifests/`: `examples/<name>/objects.yaml` from `examples/<name>/config.yaml`,
etcd's settings `base/etcd.env` from `etcd.…`, and the Helm chart's values and objects
(`trainer.kubernetes.objects.chart`).
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import yaml

from trainer.config import TrainingConfig, add_config_flags, config_from_arguments, load_config
from trainer.errors import run_main
from trainer.files import write_text
from trainer.kubernetes.objects.chart import ETCD_SETTINGS, chart_files
from trainer.kubernetes.objects.jobs import claim, config_map, network_policy, run_secret, step_job
from trainer.kubernetes.objects.plan import Object, Plan, plan
from trainer.kubernetes.objects.pod_template import RESULTS
from trainer.kubernetes.objects.sites import cluster_names
from trainer.kubernetes.objects.training_jobs import training_jobs
from trainer.version import DEFAULT_IMAGE


class _Readable(yaml.SafeDumper):
    """Writes multi-line text as blocks rather than with escapes, and lists of numbers on one line."""


_Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)
_Readable.add_representer(
    list,
    lambda dumper, items: dumper.represent_sequence(
        "tag:yaml.org,2002:seq", items, flow_style=bool(items) and all(isinstance(item, int) for item in items)
    ),
)


def objects(plan: Plan) -> Iterator[Object]:
    """All objects that the steps would create, in order, with results from the first worker's claim."""
    yield from (claim(plan, worker) for worker in plan.claimants)
    yield config_map(plan)
    yield run_secret(plan, "made by each step that needs one")
    yield network_policy(plan)
    yield from (step_job(plan, worker, "precache") for worker in plan.claimants)
    for job in training_jobs(plan):
        yield from job.all
    yield from (step_job(plan, plan.workers[0], what) for what in RESULTS)


def render(config: TrainingConfig) -> str:
    """The objects of a run as YAML. Raises ConfigError."""
    resolved, texts = config.resolved(), []
    for cluster in cluster_names(resolved):
        part = plan(resolved, namespace=config.deployment_namespace, image=DEFAULT_IMAGE, cluster=cluster)
        head = f"# On cluster {cluster}, in the namespace of its kubeconfig\n" if cluster else ""
        for obj in objects(part) if part.workers else ():
            texts.append(head + yaml.dump(obj, Dumper=_Readable, sort_keys=False, allow_unicode=True))
    return "---\n".join(texts)


def render_manifests(root: Path, config: TrainingConfig) -> list[Path]:
    """Write the rendered files of the folder `manifests`. Returns their paths."""
    values = config.to_flat()
    lines = [f"{variable}={values[name]}\n" for name, variable in ETCD_SETTINGS.items()]
    written = {root / "base" / "etcd.env": "".join(lines)}
    for file in sorted(root.glob("examples/*/config.yaml")):
        head = f"# Rendered from {file.name} by `make manifests`: the objects that the pipeline's steps would create.\n"
        written[file.with_name("objects.yaml")] = head + render(load_config(file, environ={}))
    if (root / "chart").is_dir():
        written |= chart_files(root)
    for path, text in written.items():
        write_text(path, text)
    return list(written)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and render. Returns the exit status."""
    description = "Print the Kubernetes objects of a run."
    parser = argparse.ArgumentParser(prog="python -m trainer.kubernetes.objects.render", description=description)
    parser.add_argument(
        "--manifests", type=Path, metavar="FOLDER", help="update the rendered files in this folder (manifests/)"
    )
    add_config_flags(parser)
    parsed = parser.parse_args(arguments)
    config = config_from_arguments(parsed)
    if parsed.manifests is None:
        print(render(config if config.on_cluster else config.with_values(launcher="trainjob")), end="")
    else:
        for path in render_manifests(parsed.manifests, config):
            print(path)
    return 0


if __name__ == "__main__":
    run_main(main)
