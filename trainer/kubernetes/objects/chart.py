"""The rendered files of the Helm chart, manifests/chart/: values with their schema, and the objects of manifests/base.

The values are the parameters, with their names in camel case: the cluster's at the top level, the groups
unchanged, and all others below `diloco`. The chart's own templates turn them back into a configuration.
"""

import json
import re
import textwrap
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic.alias_generators import to_camel

from trainer.config import UNSET, Parameter, TrainingConfig

# Flat parameter name -> environment variable of etcd (https://etcd.io/docs/v3.5/op-guide/configuration/)
ETCD_SETTINGS = {
    "etcd_heartbeat_interval": "ETCD_HEARTBEAT_INTERVAL",
    "etcd_election_timeout": "ETCD_ELECTION_TIMEOUT",
    "etcd_snapshot_count": "ETCD_SNAPSHOT_COUNT",
    "etcd_auto_compaction_mode": "ETCD_AUTO_COMPACTION_MODE",
    "etcd_auto_compaction_retention": "ETCD_AUTO_COMPACTION_RETENTION",
}

# Parameters of pods and nodes, which are at the top level
_TOP = (
    "deployment_name", "deployment_namespace", "deployment_image", "image_pull_secrets", "service_account", "nodes",
    "sites", "cpu_cores", "memory_gb", "ephemeral_storage_gb", "gpu_count", "gpu_vendor", "gpu_type", "gpu_memory",
    "active_deadline", "finished_ttl",
)  # fmt: skip
_NO_VALUES = ("run_dir",)  # it is on the release's own claim
_DIFFERENT = {  # parameters with another default in the chart's templates
    "launcher": "Kind of the workers' jobs. auto: TrainJobs, or PyTorchJobs if the cluster has no TrainJobs.",
    "max_samples": "Maximum number of documents, pictures or clips to read from the dataset. -1: all; a million of C4.",
    "run_id": "Name of the run. An unfinished run with that name is resumed. Empty: the release's name.",
    "deployment_namespace": "Namespace of all objects. Empty: the release's.",
    "deployment_image": "Image of all pods. Empty: diloco-pipelines-python at the chart's version.",
    "etcd_enabled": "Install an etcd, unless `etcd.endpoints` or `elastic.etcd.externalEndpoint` names one.",
    "etcd_replica_count": "Members of the release's etcd. An upgrade must not change it.",
}
_WIDTH = 120
_SNAKE = re.compile(r"\b[a-z]+(_[a-z]+)+\b")  # a parameter's name in a description
_EXACT = 2**53  # Helm reads numbers as 64-bit floats

# The Job of overlays/prod that creates etcd's users, in the NetworkPolicy there
_USERS = """\
        - podSelector:
            matchLabels:
              app.kubernetes.io/name: diloco-etcd-users
"""

Tree = dict[str, Any]
_TEXT: Tree = {"type": "string"}
_SECRET = "It becomes a Secret, but Helm also stores it with the release: it is better to name your own in"
_RESOURCES = {"requests": {"cpu": "500m", "memory": "2Gi"}, "limits": {"memory": "4Gi"}}
# Values that are not parameters: default, description and schema
_OWN: dict[tuple[str, ...], tuple[Any, str, Tree]] = {
    ("diloco", "huggingfaceToken"): ("", f"Hugging Face token. {_SECRET} `diloco.huggingfaceSecret`.", _TEXT),
    ("diloco", "wandbApiKey"): ("", f"Weights & Biases key. {_SECRET} `diloco.wandbSecret`.", _TEXT),
    ("diloco", "wandbUserKey"): ("", "Another name for `diloco.wandbApiKey`.", _TEXT),
    ("pipeline", "nodeSelector"): (
        {}, "Node labels for the pod that runs the pipeline; `sites` sets those of the workers.",
        {"type": "object", "additionalProperties": _TEXT},
    ),
    ("pipeline", "tolerations"): ([], "Tolerations of that pod.", {"type": "array", "items": {"type": "object"}}),
    ("pipeline", "resources"): (_RESOURCES, "Resources of that pod, which does not train.", {"type": "object"}),
}  # fmt: skip


def value_path(parameter: Parameter) -> tuple[str, ...] | None:
    """The path of a parameter in the chart's values; None if they do not contain it."""
    if parameter.name in _NO_VALUES:
        return None
    below = () if parameter.name in _TOP or len(parameter.path) > 1 else ("diloco",)
    return (*below, *map(to_camel, parameter.path))


def chart_files(manifests: Path) -> dict[Path, str]:
    """The rendered files of the chart in the folder `manifests`, by path."""
    chart = manifests / "chart"
    base, prod = manifests / "base", manifests / "overlays" / "prod"
    etcd = [base / "etcd.yaml", prod / "network.yaml"]
    return {
        chart / "values.yaml": _values(),
        chart / "values.schema.json": json.dumps(_schema(), indent=2, ensure_ascii=False) + "\n",
        chart / "templates" / "etcd.yaml": _etcd([file.read_text(encoding="utf-8") for file in etcd]),
        chart / "templates" / "rbac.yaml": _rbac((base / "rbac.yaml").read_text(encoding="utf-8")),
    }


# Values


def _leaves() -> Iterator[tuple[tuple[str, ...], Any, str, Tree]]:
    """Path, default, description and schema of each value: the cluster's, then the groups', then the training's."""
    whole = _inlined(TrainingConfig.model_json_schema())
    found = []
    for parameter in TrainingConfig.parameters():
        if path := value_path(parameter):
            schema = reduce(lambda node, key: node["properties"][key], parameter.path, whole)
            text = _DIFFERENT.get(parameter.name, _SNAKE.sub(lambda word: to_camel(word[0]), parameter.description))
            default = UNSET if parameter.default == UNSET else parameter.default
            found.append((path, default, text, _narrowed(schema)))
    found += [(path, *rest) for path, rest in _OWN.items()]
    first = [path[0] for path, *_ in found]
    yield from sorted(found, key=lambda one: (one[0][0] == "diloco", len(one[0]) > 1, first.index(one[0][0])))


def _values() -> str:
    lines = [
        "# Rendered by `make manifests` from the parameters (trainer/config/).",
        "# Set text that looks like a number with `--set-string`. A default of -1 means `not set`.",
        "",
    ]
    above: tuple[str, ...] = ()
    for path, default, description, _ in _leaves():
        for depth, key in enumerate(path[:-1]):
            if path[: depth + 1] != above[: depth + 1]:
                lines += [*([""] if depth == 0 else []), f"{'  ' * depth}{key}:"]
        above, pad = path[:-1], "  " * (len(path) - 1)
        lines += textwrap.wrap(description, _WIDTH, initial_indent=f"{pad}# ", subsequent_indent=f"{pad}# ")
        lines.append(f"{pad}{path[-1]}: {json.dumps(default, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def _schema() -> Tree:
    """The JSON Schema of the values. It rejects unknown names."""
    root = _group()
    root["properties"]["global"] = {
        "type": "object",
        "description": "Helm's global values; may contain `deploymentName`.",
    }
    for path, default, description, schema in _leaves():
        group = root
        for key in path[:-1]:
            group = group["properties"].setdefault(key, _group())
        group["properties"][path[-1]] = {**schema, "default": default, "description": description}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart diloco-training",
        **root,
    }


def _group() -> Tree:
    return {"type": "object", "additionalProperties": False, "properties": {}}


def _inlined(schema: Tree) -> Tree:
    """A JSON Schema without references and titles."""
    definitions = schema.get("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, list):
            return [inline(one) for one in node]
        if not isinstance(node, dict):
            return node
        if name := node.get("$ref"):
            return inline(definitions[name.rpartition("/")[2]])
        named = isinstance(node.get("properties"), dict)
        inlined = {key: inline(value) for key, value in node.items() if key not in ("title", "$defs")}
        if named:  # a field may itself be called `title`
            inlined["properties"] = {key: inline(value) for key, value in node["properties"].items()}
        return inlined

    return dict(inline(schema))


def _narrowed(schema: Tree) -> Tree:
    """The schema without what a chart does not support: integers that Helm would round, and workers without pods."""
    if schema.get("type") == "integer" and schema.get("exclusiveMaximum", 0) > _EXACT:
        return {key: value for key, value in schema.items() if key != "exclusiveMaximum"} | {"maximum": _EXACT}
    if "local" in schema.get("enum", ()):
        return {**schema, "enum": [choice for choice in schema["enum"] if choice != "local"]}
    return schema


# Objects


def _etcd(documents: list[str]) -> str:
    """The etcd of manifests/base, with the NetworkPolicy of overlays/prod."""
    types = {parameter.name: parameter for parameter in TrainingConfig.parameters()}
    settings = []
    for name, variable in ETCD_SETTINGS.items():
        path, kind = value_path(types[name]), types[name].type
        assert path is not None
        value = f".Values.{'.'.join(path)}"  # `int64` keeps large numbers from being printed with an exponent
        settings.append(f"{variable}: {{{{ {f'int64 {value}' if kind is int else value} | quote }}}}")
    head = [
        "{{/* Rendered by `make manifests` from manifests/base/ and overlays/prod/network.yaml. */}}",
        '{{- define "diloco.etcd.settings" -}}',
        *settings,
        "{{- end }}",
        '{{- if include "diloco.etcd.installed" . }}',
    ]
    text = "---\n".join(_in_release(document) for document in documents)
    text = text.replace(_USERS, "").replace(", the pipeline's steps and the users' Job", " and the pipeline's steps")
    for what in ("settings", "members"):
        name = f'{{{{ include "diloco.etcd.config" (list . "{what}") }}}}'
        text = text.replace(f"diloco-etcd-{what}", name)
    text = re.sub(r"\bdiloco-etcd\b", '{{ include "diloco.etcd" . }}', text)
    text = re.sub(r"(?m)^  replicas: 1$", "  replicas: {{ int .Values.etcd.replicaCount }}", text)
    return "\n".join(head) + "\n" + text + "{{- end }}\n"


def _rbac(text: str) -> str:
    """The ServiceAccount and Role of manifests/base, and a binding for that account alone."""
    name = '{{ include "diloco.name" . }}'
    text = re.sub(r"(?m)^#.*\n", "", text)
    text, _, _ = text.partition("subjects:")
    text = re.sub(r"(?m)^(\s+)name: diloco-pipelines$", rf"\1name: {name}", _in_release(text))
    text += f"subjects:\n  - kind: ServiceAccount\n    name: {name}\n"
    return "{{/* Rendered by `make manifests` from manifests/base/rbac.yaml. */}}\n" + text


def _in_release(text: str) -> str:
    """Put objects into the release's namespace, with the labels that kustomize adds in manifests/."""
    text = re.sub(r"(?m)^metadata:\n", 'metadata:\n  namespace: {{ include "diloco.namespace" . }}\n', text)
    own = r"\1labels:\n\1  app.kubernetes.io/part-of: diloco-pipelines\n"
    return re.sub(r"(?m)^( +)labels:\n", own, text)
