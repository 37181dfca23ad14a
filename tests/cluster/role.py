"""The Role in manifests/, as the API server would apply it."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
Permission = tuple[str, str, str, str]  # verb, API group, resource, name ("": any)


def permissions(folder: str = "base") -> set[Permission]:
    """What the steps may do in the namespace of a training, by the Role in a folder of manifests/."""
    documents = yaml.safe_load_all((ROOT / "manifests" / folder / "rbac.yaml").read_text())
    (role,) = (document for document in documents if document["kind"] == "Role")
    return {
        (verb, group, resource, name)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for name in rule.get("resourceNames", [""])
    }


def allows(granted: set[Permission], asked: Permission) -> bool:
    """Whether a request is allowed."""
    verb, group, resource, name = asked
    return (verb, group, resource, "") in granted or (bool(name) and (verb, group, resource, name) in granted)


def unused(granted: set[Permission], asked: set[Permission]) -> set[Permission]:
    """What is granted and was never asked for."""
    general = {(*permission[:3], "") for permission in asked}
    return {one for one in granted if one not in asked and not (one[3] == "" and one in general)}
