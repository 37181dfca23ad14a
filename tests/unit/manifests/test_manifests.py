"""manifests/: the overlays render to what an API server takes, fit the code, and the rendered files are current."""

import base64
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.apiserver import serving
from tests.cluster.place import STEP_LABELS
from tests.cluster.role import permissions
from tests.kube_tools import kubectl
from tests.kubernetes_schemas import needs_crd, validate
from trainer.config import TrainingConfig, load_config
from trainer.kubernetes.api.client import Client
from trainer.kubernetes.api.other_cluster import read_kubeconfig
from trainer.kubernetes.objects import names
from trainer.kubernetes.objects.plan import plan
from trainer.kubernetes.objects.render import ETCD_SETTINGS, main, render_manifests
from trainer.kubernetes.objects.training_jobs import training_jobs

MANIFESTS = Path(__file__).parents[3] / "manifests"
OVERLAYS = ("dev", "prod")  # with an etcd; `site` is for clusters that have none


@cache
def rendered(overlay: str) -> tuple[dict[str, Any], ...]:
    return tuple(kustomized(MANIFESTS / "overlays" / overlay))


def kustomized(folder: Path) -> list[dict[str, Any]]:
    made = kubectl("kustomize", folder)
    assert made.returncode == 0, made.stderr
    return list(yaml.safe_load_all(made.stdout))


def one(overlay: str, kind: str, name: str = "") -> dict[str, Any]:
    (found,) = [obj for obj in rendered(overlay) if obj["kind"] == kind and obj["metadata"]["name"].startswith(name)]
    return found


def edited_prod(place: Path, **changes: str) -> dict[str, dict[str, Any]]:
    """The objects of prod, by kind, after lines of its kustomization.yaml that begin so have become these; "": gone."""
    copy = place / "manifests"
    shutil.copytree(MANIFESTS, copy)
    file = copy / "overlays" / "prod" / "kustomization.yaml"
    lines = file.read_text(encoding="utf-8").splitlines()
    for beginning, text in changes.items():
        (number,) = (number for number, line in enumerate(lines) if line.strip().startswith(beginning))
        lines[number] = text
    file.write_text("\n".join(lines), encoding="utf-8")
    return {obj["kind"]: obj for obj in kustomized(file.parent)}


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


RUNS = ("TrainingRuntime", "TrainJob")  # what trains


def training(**values: Any) -> Any:
    config = TrainingConfig.from_flat({"launcher": "pytorchjob", "run_id": "mine", **values})
    return plan(config, namespace="team", image="i")


def test_rendered_files_are_current(tmp_path: Path) -> None:
    """`make manifests` writes them anew: then read what has changed."""
    copy = tmp_path / "manifests"
    shutil.copytree(MANIFESTS, copy)
    for path in render_manifests(copy, TrainingConfig()):
        kept = MANIFESTS / path.relative_to(copy)
        assert path.read_text(encoding="utf-8") == kept.read_text(encoding="utf-8"), f"{kept}: run `make manifests`"


@needs_crd
@pytest.mark.parametrize("file", sorted(MANIFESTS.glob("examples/*/objects.yaml")), ids=lambda file: file.parent.name)
def test_examples_are_valid(file: Path) -> None:
    found = documents(file)
    for obj in found:
        validate(obj)
    jobs = {"PyTorchJob"} if "launcher: pytorchjob" in file.with_name("config.yaml").read_text() else RUNS
    assert {obj["kind"] for obj in found} == {
        "PersistentVolumeClaim",
        "ConfigMap",
        "Secret",
        "NetworkPolicy",
        "Job",
        *jobs,
    }


@pytest.mark.parametrize("overlay", [*OVERLAYS, "site"])
def test_overlays_are_valid_and_labelled(overlay: str) -> None:
    for obj in rendered(overlay):
        validate(obj)
        assert obj["metadata"]["labels"]["app.kubernetes.io/part-of"] == names.PREFIX
        assert overlay == "site" or "namespace" not in obj["metadata"]  # `-n` says which


@pytest.mark.parametrize(("overlay", "members"), [("dev", 1), ("prod", 3)])
def test_members_are_where_the_pods_look_for_them(overlay: str, members: int) -> None:
    etcd, service = one(overlay, "StatefulSet"), one(overlay, "Service")
    assert etcd["spec"]["replicas"] == members
    assert service["metadata"]["name"] == etcd["spec"]["serviceName"] == names.ETCD_SERVICE
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert etcd["spec"]["podManagementPolicy"] == "Parallel"
    scheme = {"dev": "http", "prod": "https"}[overlay]
    cluster = one(overlay, "ConfigMap", "diloco-etcd-members")["data"]["ETCD_INITIAL_CLUSTER"].split(",")
    name = etcd["metadata"]["name"]
    assert cluster == [f"{name}-{i}={scheme}://{name}-{i}.{name}:2380" for i in range(members)]
    endpoints = training(etcd_replica_count=members).config.etcd.endpoints
    assert endpoints == [f"{name}-{i}.{service['metadata']['name']}.team.svc:2379" for i in range(members)]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_restart_no_member_that_has_lost_its_quorum(overlay: str) -> None:
    (container,) = one(overlay, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    # https://etcd.io/docs/v3.5/op-guide/monitoring/: livez reads locally, readyz asks the quorum.
    assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "metrics"}
    assert container["startupProbe"]["httpGet"] == {"path": "/livez", "port": "metrics"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "metrics"}
    patience = container["livenessProbe"]["periodSeconds"] * container["livenessProbe"]["failureThreshold"]
    assert patience >= 300
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert environment["ETCD_LISTEN_METRICS_URLS"] == "http://0.0.0.0:2381"  # asks for no certificate


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_slow_link_timings_are_the_parameters_defaults(overlay: str) -> None:
    settings = one(overlay, "ConfigMap", "diloco-etcd-settings")["data"]
    values = TrainingConfig().to_flat()
    assert settings == {variable: str(values[name]) for name, variable in ETCD_SETTINGS.items()}
    assert (settings["ETCD_HEARTBEAT_INTERVAL"], settings["ETCD_ELECTION_TIMEOUT"]) == ("500", "5000")


def test_etcds_parameters_reach_its_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {
        "--etcd-heartbeat-interval": "100", "--etcd-election-timeout": "1000", "--etcd-snapshot-count": "5",
        "--etcd-auto-compaction-mode": "revision", "--etcd-auto-compaction-retention": "1000",
    }  # fmt: skip
    assert main(["--manifests", str(tmp_path), *(word for pair in flags.items() for word in pair)]) == 0
    written = Path(capsys.readouterr().out.strip())
    assert written == tmp_path / "base" / "etcd.env"
    assert written.read_text().split() == [
        "ETCD_HEARTBEAT_INTERVAL=100", "ETCD_ELECTION_TIMEOUT=1000", "ETCD_SNAPSHOT_COUNT=5",
        "ETCD_AUTO_COMPACTION_MODE=revision", "ETCD_AUTO_COMPACTION_RETENTION=1000",
    ]  # fmt: skip


def test_prod_bears_the_loss_of_a_node() -> None:
    selected = {"matchLabels": {"app.kubernetes.io/instance": "diloco-etcd"}}
    etcd = one("prod", "StatefulSet")["spec"]
    (rule,) = etcd["template"]["spec"]["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert rule == {"topologyKey": "kubernetes.io/hostname", "labelSelector": selected}
    budget = one("prod", "PodDisruptionBudget")["spec"]
    assert budget == {"maxUnavailable": 1, "selector": selected}
    assert selected["matchLabels"].items() <= etcd["template"]["metadata"]["labels"].items()


def test_prod_on_fewer_than_three_nodes_is_one_line_less(tmp_path: Path) -> None:
    found = edited_prod(tmp_path, **{"- path: a-node-each.yaml": ""})
    shared, apart = (etcd["spec"]["template"]["spec"] for etcd in (found["StatefulSet"], one("prod", "StatefulSet")))
    rule = apart["affinity"]["podAntiAffinity"].pop("requiredDuringSchedulingIgnoredDuringExecution")
    try:
        assert shared == apart, "nothing else has changed"
    finally:  # what is rendered is kept for other tests
        apart["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] = rule


def test_prods_image_is_named_in_two_lines(tmp_path: Path) -> None:
    changes = {"newName:": "    newName: registry.example/team/python", "newTag:": "    newTag: 0.2.0-cpu"}
    (container,) = edited_prod(tmp_path, **changes)["Job"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example/team/python:0.2.0-cpu"


def test_prods_readme_says_what_to_decide_before_the_first_apply() -> None:
    text = (MANIFESTS / "overlays" / "prod" / "README.md").read_text(encoding="utf-8")
    first_apply = text.index("kubectl apply")
    for decision in ("`- path: a-node-each.yaml`", "`newName`", "`newTag`", "Three nodes must be able to take"):
        assert text.index(decision) < first_apply, decision
    (selected,) = re.findall(r"kubectl delete pod -n <namespace> -l ([^`]+)`", text)
    label, _, value = selected.partition("=")
    pods = {obj["kind"]: obj["spec"]["template"] for obj in rendered("prod") if obj["kind"] in ("StatefulSet", "Job")}
    assert pods["StatefulSet"]["metadata"]["labels"][label] == value
    assert pods["Job"]["metadata"]["labels"].get(label) != value, "only the members are made anew"


def test_the_guide_starts_runs_for_the_etcd_that_it_installs() -> None:
    guide = (MANIFESTS.parent / "docs" / "guide" / "cluster.md").read_text(encoding="utf-8")
    (commands,) = [block for block in re.findall(r"```sh\n(.*?)```", guide, re.DOTALL) if "overlays/dev" in block]
    members = one("dev", "StatefulSet")["spec"]["replicas"]
    starts = [line for line in commands.splitlines() if re.search(" (submit|run create|schedule create) ", line)]
    assert len(starts) == 3
    for line in starts:
        assert re.search(rf'etcd.replica.count"?:? {members}\b', line), line


def test_prods_etcd_lets_our_pods_at_it_and_nobody_else() -> None:
    policy = one("prod", "NetworkPolicy")["spec"]
    pods = one("prod", "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    assert policy["podSelector"]["matchLabels"].items() <= pods.items()
    peers, clients = policy["ingress"]
    assert [port["port"] for port in clients["ports"]] == [2379]
    admitted = [peer["podSelector"]["matchLabels"] for peer in clients["from"]]
    worker = training_jobs(training())[0].template["metadata"]["labels"]
    users = one("prod", "Job")["spec"]["template"]["metadata"]["labels"]
    for labels in (worker, users, STEP_LABELS):
        assert any(wanted.items() <= labels.items() for wanted in admitted)
    assert peers["from"] == [{"podSelector": policy["podSelector"]}]


def test_prods_pods_find_the_certificates_that_the_script_makes() -> None:
    script = (MANIFESTS / "overlays" / "prod" / "certificates.sh").read_text()
    made = {line.split()[1] for line in script.splitlines() if line.startswith("secret diloco-")}
    worker = training_jobs(training(elastic_etcd_protocol="https", etcd_user="diloco"))[0].template["spec"]
    (certificates,) = [volume for volume in worker["volumes"] if volume["name"] == "etcd"]
    (server,) = one("prod", "StatefulSet")["spec"]["template"]["spec"]["volumes"]
    assert {certificates["secret"]["secretName"], server["secret"]["secretName"], "diloco-etcd-root"} == made


def test_the_role_is_of_one_namespace_and_names_what_it_may() -> None:
    """What the code asks for, the stand-in's test records; here: nothing more could have slipped in."""
    objects = documents(MANIFESTS / "base" / "rbac.yaml")
    assert {obj["kind"] for obj in objects} == {"ServiceAccount", "Role", "RoleBinding"}
    (role,) = [obj for obj in objects if obj["kind"] == "Role"]
    for rule in role["rules"]:
        assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
        if "secrets" in rule["resources"] and "get" in rule["verbs"]:
            assert rule["resourceNames"] == [names.ETCD_SECRET]
        assert not {"update", "escalate", "bind", "impersonate"} & set(rule["verbs"])
    (binding,) = [obj for obj in objects if obj["kind"] == "RoleBinding"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]


def test_a_cluster_that_lends_workers_grants_what_the_steps_own_does_and_its_api_servers_ports() -> None:
    here, there = permissions(), permissions("overlays/site")
    assert {one for one in here - there if "pods/portforward" not in one} == {
        ("get", "argoproj.io", "workflows", ""),
        ("get", "", "secrets", names.ETCD_SECRET),
    }
    assert there - here == {(verb, "", "pods/portforward", "") for verb in ("get", "create")}
    assert {obj["kind"] for obj in rendered("site")} == {"Namespace", "ServiceAccount", "Role", "RoleBinding"}
    role, binding = one("site", "Role"), one("site", "RoleBinding")
    assert (
        role["metadata"]["namespace"]
        == binding["metadata"]["namespace"]
        == one("site", "Namespace")["metadata"]["name"]
    )
    assert binding["roleRef"]["name"] == role["metadata"]["name"]


def test_the_kubeconfig_of_a_site_is_one_that_the_steps_take(tmp_path: Path) -> None:
    """With kubectl's answers, of which only the token's would need a cluster."""
    answers = {"server}": "https://10.0.0.1:6443", "authority-data}": "Y2E=", "create token": "a-token"}
    cases = "".join(f"*'{words}'*) echo {answer};;\n" for words, answer in answers.items())
    program = tmp_path / "kubectl"
    program.write_text(f'#!/bin/sh\ncase "$*" in\n{cases}esac\n')
    program.chmod(0o755)
    script = MANIFESTS / "overlays" / "site" / "kubeconfig.sh"
    done = subprocess.run([script], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, check=True)
    with serving() as server:
        data = {"kubeconfig": base64.b64encode(done.stdout).decode()}
        server.put("secrets", {"metadata": {"name": "oslo"}, "data": data})
        server.granted.add(("get", "", "secrets", "oslo"))
        path = server.kubeconfig(tmp_path / "kubeconfig")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KUBECONFIG", str(path))
            found = read_kubeconfig(Client("default"), "oslo")
    assert found.namespace == one("site", "Namespace")["metadata"]["name"]
    (user,), (cluster,) = found.content["users"], found.content["clusters"]
    assert user["user"] == {"token": "a-token"}
    assert cluster["cluster"] == {"server": "https://10.0.0.1:6443", "certificate-authority-data": "Y2E="}


def test_secret_templates_are_empty_and_named_as_the_pods_refer_to_them() -> None:
    templates = {file.stem: documents(file)[0] for file in (MANIFESTS / "secrets").glob("*.yaml")}
    for template in templates.values():
        validate(template)
        assert set(template["stringData"].values()) == {""}
    assert templates["wandb"]["metadata"]["name"] == TrainingConfig().wandb_secret
    assert list(templates["wandb"]["stringData"]) == ["WANDB_API_KEY"]
    assert templates["huggingface"]["metadata"]["name"] == TrainingConfig().huggingface_secret
    assert list(templates["huggingface"]["stringData"]) == ["HF_TOKEN"]


def test_the_scheduled_example_is_a_configuration_of_runs_that_have_no_name_yet() -> None:
    config = load_config(MANIFESTS / "schedule" / "nightly.yaml", environ={})
    assert (config.launcher, config.run_id) == ("auto", "")
    assert config.active_deadline < 24 * 3600


def test_the_readmes_name_files_that_are_there() -> None:
    for readme in MANIFESTS.rglob("README.md"):
        text = readme.read_text(encoding="utf-8")
        for word in text.replace("`", " ").replace("(", " ").replace(")", " ").split():
            if word.startswith("manifests/") and "<" not in word:
                assert (MANIFESTS.parent / word.rstrip(".,:;")).exists(), f"{readme}: {word}"


# What manifests/README.md says is needed, and what the repository brings.
PROGRAMS = {"kubectl", "helm", "python", "make", "docker", "openssl"}


def programs(script: str) -> Iterator[str]:
    """What a shell would run: the first word of each command."""
    for line in script.replace("\\\n", " ").splitlines():
        begins = True
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for word in lexer:
            if begins and not re.match(r"\w+=", word) and word != "(":
                yield word
            begins = word in ("&&", "||", "|", ";", "(") or (begins and re.match(r"\w+=", word) is not None)


def foreign_programs(text: str) -> list[str]:
    """Programs that a README runs, in blocks or in its text, and that nobody needs to have."""
    found = [program for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for program in programs(block)]
    inline = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    # Words apart by spaces are a command; `member add` and its like are etcdctl's, in a pod.
    found += [code.split()[0] for code in inline if re.match(r"[a-z][\w./-]*\s+(?!.*, )", code)]
    known = PROGRAMS | {"member"}
    return [one for one in found if one not in known and not (MANIFESTS.parent / one).is_file()]


@pytest.mark.parametrize("readme", sorted(MANIFESTS.rglob("README.md")), ids=lambda readme: readme.parent.name)
def test_the_readmes_call_no_further_programs(readme: Path) -> None:
    assert foreign_programs(readme.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("```sh\n(cd manifests && kustomize edit set image a=b:1)\n```", ["cd", "kustomize"]),
        ("```sh\nkubectl get x -o json | jq .items  # helm is not called\n```", ["jq"]),
        ("```sh\nA=b python -m x \\\n    --y && nosuch/script.sh\n```", ["nosuch/script.sh"]),
        ("use `etcdctl member add`, not `kubectl scale`, of `kind, name`", ["etcdctl"]),
    ],
)
def test_a_further_program_is_found(text: str, found: list[str]) -> None:
    assert foreign_programs(text) == found


def test_a_training_is_printed_without_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--run-id", "mine", "--nodes", "1", "--device", "cpu"]) == 0
    kinds = [obj["kind"] for obj in yaml.safe_load_all(capsys.readouterr().out)]
    assert kinds == ["PersistentVolumeClaim", "ConfigMap", "Secret", "NetworkPolicy", "Job", *RUNS, *["Job"] * 3]
