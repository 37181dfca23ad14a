"""Importing `etcd3` 0.12.0 with current protobuf, for which that release's generated modules are too old.

They are rebuilt from the serialized descriptors in their sources.
"""

import ast
import importlib.util
import os
import sys
import threading
import types
from pathlib import Path

from trainer.errors import TrainingError

_import_lock = threading.Lock()


def import_etcd3() -> types.ModuleType:
    """Import `etcd3`, with its message modules rebuilt. Thread-safe; works in either import order with protobuf.

    Raises:
        TrainingError: The package is missing or is not release 0.12.0.
    """
    with _import_lock:
        if "etcd3" not in sys.modules:
            from google.protobuf import descriptor_pool
            from google.protobuf.internal import builder

            spec = importlib.util.find_spec("etcd3")
            if spec is None or spec.origin is None:
                raise TrainingError("the package etcd3 is not installed")
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # our exceptions carry gRPC's messages
            for name in ("kv", "auth", "rpc"):  # rpc imports the other two
                source = (Path(spec.origin).parent / "etcdrpc" / f"{name}_pb2.py").read_text(encoding="utf-8")
                descriptor = descriptor_pool.Default().AddSerializedFile(_serialized_pb(source))
                module = types.ModuleType(f"etcd3.etcdrpc.{name}_pb2")
                builder.BuildMessageAndEnumDescriptors(descriptor, vars(module))
                builder.BuildTopDescriptorsAndMessages(descriptor, module.__name__, vars(module))
                sys.modules[module.__name__] = module
        return importlib.import_module("etcd3")


def _serialized_pb(source: str) -> bytes:
    """The serialized file descriptor in the source of a generated `*_pb2` module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.keyword) and node.arg == "serialized_pb" and isinstance(node.value, ast.Call):
            return str(ast.literal_eval(node.value.args[0])).encode("latin1")
    raise TrainingError("the installed etcd3 is not release 0.12.0, the only one supported")
