"""Paths in words: those of known directories, and no others."""

import pytest

from trainer.kubernetes.api.mounts import places_of
from trainer.places import OWN_DISK, Place, Places

KNOWN = Places({"/data": Place("claim llm"), "/data/models": Place("claim all", "models"), "/tmp": Place(OWN_DISK)})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("in /data/datasets/c4-1f.", "in datasets/c4-1f on claim llm."),
        ("/data", "claim llm"),
        ("read '/data/models/tiny/model.safetensors': gone", "read 'models/tiny/model.safetensors on claim all': gone"),
        ("`cat /data/a` (logs: /data/b)", "`cat a on claim llm` (logs: b on claim llm)"),
        ("/tmp/x", f"x on {OWN_DISK}"),
        ("files:/data/corpus, http://host/data/x, 3 a/data/b, /database", None),
    ],
)
def test_paths_of_known_directories_are_said_in_words_and_nothing_else(text: str, words: str | None) -> None:
    assert KNOWN.in_words(text) == (words or text)
    assert Places().in_words(text) == text


def test_a_pod_s_mounts_are_its_volumes() -> None:
    mounts = [
        {"name": "data", "mountPath": "/data", "subPathExpr": "$(POD_NAME)"},
        {"name": "data", "mountPath": "/data/models", "subPath": "models"},
        {"name": "etcd", "mountPath": "/etc/diloco-etcd"},
        {"name": "temporary", "mountPath": "/tmp/"},
        {"name": "unknown", "mountPath": "/mnt"},
    ]
    volumes = [
        {"name": "data", "persistentVolumeClaim": {"claimName": "llm-data"}},
        {"name": "etcd", "secret": {"secretName": "diloco-etcd"}},
        {"name": "temporary", "emptyDir": {}},
        {"name": "unknown", "nfs": {}},
    ]
    containers = [{"name": "wait", "volumeMounts": [mounts[-1]]}, {"name": "main", "volumeMounts": mounts}]
    pod = {"metadata": {"name": "llm-worker-1"}, "spec": {"volumes": volumes, "containers": containers}}
    assert places_of(pod, "main").known == {
        "/data": Place("claim llm-data", "llm-worker-1"),
        "/data/models": Place("claim llm-data", "models"),
        "/etc/diloco-etcd": Place("Secret diloco-etcd"),
        "/tmp": Place(OWN_DISK),
    }
