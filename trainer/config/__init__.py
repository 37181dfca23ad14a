"""`TrainingConfig`: every parameter of a training, once.

The command line, the environment, YAML files, the pipeline's signature, the JSON schema and the help texts are all
derived from its fields (`schema.py`, and `cluster.py` for the groups). Precedence: flag > `DILOCO_*` variable > YAML
file (`--config`) > default.

A parameter has a *path* in the tree (`elastic.min_nodes`, as in YAML) and a *flat name* (`elastic_min_nodes`, as in the
pipeline, `DILOCO_ELASTIC_MIN_NODES` and `--elastic-min-nodes`). No value is ever null: a number that is not given is
-1 (`UNSET`). Lists of parameters for a purpose, such as the model card's, are scopes in the fields' metadata (`Scope`).

Secrets are not parameters: `WANDB_API_KEY`, `HF_TOKEN` and `ETCD_PASSWORD` are read from the environment where they are
needed, and nowhere else.
"""

from trainer.config.cluster import SiteConfig, VendorConfig
from trainer.config.fields import UNSET, Scope, ScopeName, given
from trainer.config.load import ENV_PREFIX, add_config_flags, config_from_arguments, flags_from, load_config
from trainer.config.parameters import Parameter
from trainer.config.training import TrainingConfig

__all__ = [
    "ENV_PREFIX",
    "UNSET",
    "Parameter",
    "Scope",
    "ScopeName",
    "SiteConfig",
    "TrainingConfig",
    "VendorConfig",
    "add_config_flags",
    "config_from_arguments",
    "flags_from",
    "given",
    "load_config",
]
