"""What the pods of a run are told: the ConfigMap with its configuration, and the Secret with its token."""

import yaml

from trainer.kubernetes.objects import names, pod_template
from trainer.kubernetes.objects.plan import Object, Plan


def config_map(plan: Plan) -> Object:
    """The ConfigMap that every pod of the run mounts: the file that `--config` reads. No secret is a parameter."""
    text = yaml.safe_dump(plan.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": plan.metadata(names.of_training(plan.name, "config"), "config"),
        "data": {pod_template.CONFIG_NAME: text},
    }


def run_secret(plan: Plan, token: str) -> Object:
    """The Secret with the token that a result's pod asks for.

    Args:
        plan: The training's.
        token: New for each step that fetches a result; nobody reads it back.
    """
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": plan.metadata(names.of_training(plan.name, "run"), "config"),
        "type": "Opaque",
        "stringData": {pod_template.TOKEN_KEY: token},
    }
