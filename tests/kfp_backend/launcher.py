"""What the launcher of Kubeflow Pipelines does around a step's own command: backend/src/v2/component/launcher_v2.go.

A pod has a disk of its own: input artifacts come from the object store, and what is not uploaded is lost. Within a step
an artifact's URI is its path on that disk: where a pod has /minio, kfp's executor can look nowhere else here.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tests.kfp_backend.driver import Failed, Flavour, Ir, Values, as_json, parameters_of

LOGS = "executor-logs"
_SCHEME = "minio://"
_METRICS, _CLASSIFICATION = "system.Metrics", "system.ClassificationMetrics"
_SLICED = "system.SlicedClassificationMetrics"

Run = Callable[[list[str]], int]  # runs a command until it ends, and returns its exit status


class Launcher:
    """One attempt at a step.

    Args:
        store: Directory that is the object store.
        disk: Directory that is the pod's own disk.
        task_root: Where the step's artifacts lie in the store, without the scheme.
        inputs: As the driver has resolved them.
    """

    def __init__(
        self, flavour: Flavour, component: Ir, inputs: Values, store: Path, disk: Path, task_root: str
    ) -> None:
        self._flavour, self._component, self._store, self._disk = flavour, component, store, disk
        self._root = task_root
        definitions = parameters_of(component)
        defaults = {name: one["defaultValue"] for name, one in definitions.items() if "defaultValue" in one}
        self._parameters = {**defaults, **inputs.parameters}
        self._inputs = {name: self._here(artifact) for name, artifact in inputs.artifacts.items()}
        outputs = component.get("outputDefinitions", {})
        self._files = {name: disk / "tmp/kfp/outputs" / name for name in outputs.get("parameters", {})}
        types = {name: one["artifactType"] for name, one in outputs.get("artifacts", {}).items()}
        types[LOGS] = {"schemaTitle": "system.Artifact"}
        self._outputs = {
            name: self._here({"name": name, "uri": f"{_SCHEME}{task_root}/{name}", "type": kind})
            for name, kind in types.items()
        }
        self._result = self._local(f"{_SCHEME}{task_root}/output_metadata.json")

    @property
    def log(self) -> Path:
        """Takes what the command prints."""
        return Path(self._outputs[LOGS]["uri"])

    def execute(self, container: Ir, run: Run) -> Values:
        """Run the step's command, and hand on its outputs. Raises Failed; the log is in the store in any case."""
        for artifact in self._inputs.values():
            _copy(self._stored(artifact), Path(artifact["uri"]))
        for path in (*self._files.values(), self._result, *(Path(one["uri"]) for one in self._outputs.values())):
            path.parent.mkdir(parents=True, exist_ok=True)
        code = run([self._filled(word) for word in (*container.get("command", []), *container.get("args", []))])
        _copy(self.log, self._stored(self._outputs[LOGS]))
        if code:
            raise Failed(f"failed to execute component: exit status {code}")
        said = self._executor_output()
        parameters = {
            name: said["parameterValues"][name] if name in said.get("parameterValues", {}) else self._read(name, path)
            for name, path in self._files.items()
        }
        artifacts = {}
        for name, artifact in self._outputs.items():
            reported = said.get("artifacts", {}).get(name, {}).get("artifacts", [{}])[0]
            artifact["metadata"] = reported.get("metadata", {})
            check(self._flavour, name, artifact)
            _copy(Path(artifact["uri"]), self._stored(artifact))
            moved = reported.get("uri", artifact["uri"]) != artifact["uri"]
            artifacts[name] = {**artifact, "uri": reported["uri"] if moved else self._remote(artifact)}
        return Values(parameters, artifacts)

    def logs_artifact(self) -> Ir:
        """The artifact that holds what the command has printed."""
        return {**self._outputs[LOGS], "uri": self._remote(self._outputs[LOGS]), "metadata": {}}

    def _executor_output(self) -> Ir:
        """What kfp's executor reports of the outputs: no further fields are allowed."""
        if not self._result.is_file():
            return {}

        try:
            said: Ir = _from_json(self._result.read_text())
            if unknown := set(said) - {"parameterValues", "artifacts"}:
                raise ValueError(f"unknown field {sorted(unknown)[0]!r}")
        except ValueError as error:
            raise Failed(f'failed to unmarshall ExecutorOutput in file "{self._result}": {error}') from None
        return said

    def _read(self, name: str, path: Path) -> Any:
        kind = self._component["outputDefinitions"]["parameters"][name]["parameterType"]
        words = f'failed to read output parameter name="{name}" type="{kind}" path="{path}"'
        try:
            return parsed(path.read_text(), kind)
        except OSError:
            raise Failed(f"{words}: no such file or directory") from None
        except ValueError as error:
            raise Failed(f"{words}: {error}") from None

    def _filled(self, word: str) -> str:
        """A word of the command with its placeholders filled in."""
        outputs = {
            "artifacts": {name: {"artifacts": [one]} for name, one in self._outputs.items()},
            "parameters": {name: {"outputFile": str(path)} for name, path in self._files.items()},
            "outputFile": str(self._result),
        }
        artifacts = {name: {"artifacts": [one]} for name, one in self._inputs.items()}
        inputs = {"parameterValues": self._parameters, "artifacts": artifacts}
        places = {"{{$}}": as_json({"inputs": inputs, "outputs": outputs})}
        for name, value in self._parameters.items():
            places[f"{{{{$.inputs.parameters['{name}']}}}}"] = value if isinstance(value, str) else as_json(value)
        for name, path in self._files.items():
            places[f"{{{{$.outputs.parameters['{name}'].output_file}}}}"] = str(path)
        for side, known in (("inputs", self._inputs), ("outputs", self._outputs)):
            for name, one in known.items():
                places[f"{{{{$.{side}.artifacts['{name}'].path}}}}"] = one["uri"]
                places[f"{{{{$.{side}.artifacts['{name}'].uri}}}}"] = one["uri"]
        for place, text in places.items():
            word = word.replace(place, text)
        return word

    def _here(self, artifact: Ir) -> Ir:
        """The artifact as the step has it."""
        return {**artifact, "uri": str(self._local(artifact["uri"]))}  # one of another scheme is its own affair

    def _local(self, uri: str) -> Path:
        return self._disk / "minio" / uri.removeprefix(_SCHEME)

    def _stored(self, artifact: Ir) -> Path:
        return stored(self._store, self._remote(artifact))

    def _remote(self, artifact: Ir) -> str:
        return f"{_SCHEME}{Path(artifact['uri']).relative_to(self._disk / 'minio')}"


def check(flavour: Flavour, name: str, artifact: Ir) -> None:
    """Raise Failed if a step may not end with this output artifact, whose URI is a path: launcher_v2.go, and of the
    newest backend artifact_server.go, of the released one metadata/converter.go."""
    title, metadata, path = artifact["type"].get("schemaTitle", ""), artifact["metadata"], Path(artifact["uri"])
    if flavour == "mlmd":
        if None in metadata.values():
            kind = "unknown/unsupported value type *structpb.Value_NullValue"
            raise Failed(f'unable to produce MLMD artifact for output "{name}": {kind}')
    elif title == _METRICS:
        for key, value in metadata.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise Failed(f'metric value "{key}" must be a number, got {type(value).__name__}')
            if not key:
                raise Failed("Artifact name is required")
    elif title in (_CLASSIFICATION, _SLICED):
        if not metadata:
            kind = title.removeprefix("system.").removesuffix("s")
            raise Failed(f"failed to flush batch updates: No metric or metadata was found for {kind} artifact")
    elif not path.exists():  # the released one only warns
        raise Failed(f'declared output artifact "{name}" is missing at "{path}": no such file or directory')


def stored(store: Path, uri: str) -> Path:
    """Where an artifact lies in the object store."""
    return store / uri.removeprefix(_SCHEME)


def parsed(text: str, kind: str) -> Any:
    """An output parameter's file as a value of its type. Raises ValueError."""
    if kind == "STRING":
        return text
    if kind in ("NUMBER_INTEGER", "NUMBER_DOUBLE"):
        return int(text) if kind == "NUMBER_INTEGER" else float(text)
    if kind == "BOOLEAN":
        if text.strip() in ("true", "True", "TRUE", "t", "T", "1", "false", "False", "FALSE", "f", "F", "0"):
            return text.strip() in ("true", "True", "TRUE", "t", "T", "1")
        raise ValueError(f"parsing {text!r}: invalid syntax")
    value = _from_json(text)
    if not isinstance(value, {"LIST": list, "STRUCT": dict}[kind]):
        raise ValueError("unexpected type")
    return value


def _from_json(text: str) -> Any:
    """As protobuf reads it: it knows no NaN and no Infinity."""

    def refuse(word: str) -> NoReturn:
        raise ValueError(f"invalid value {word}")

    return json.loads(text, parse_constant=refuse)


def _copy(source: Path, target: Path) -> None:
    """Copy a file or a directory, if it is there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    elif source.is_file():
        shutil.copyfile(source, target)
