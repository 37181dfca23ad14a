"""`TrainingConfig`: the single list of a run's parameters.

The command line, the environment, YAML files, the pipeline's signature, the JSON schema and the help texts are derived
from its fields. Precedence: flag > `DILOCO_*` variable > YAML file (`--config`) > default. A parameter has a *path*
(`elastic.min_nodes`, as in YAML) and a *flat name* (`elastic_min_nodes`, as in the pipeline,
`DILOCO_ELASTIC_MIN_NODES` and `--elastic-min-nodes`). No value is null; a number that is not given is -1 (`UNSET`).

Secrets (`WANDB_API_KEY`, `HF_TOKEN`, `ETCD_PASSWORD`) are not parameters: they come from the environment only.
"""

from trainer.config.cluster import SiteConfig, VendorConfig
from trainer.config.fields import UNSET, ScopeName, given
from trainer.config.load import ENV_PREFIX, add_config_flags, config_from_arguments, load_config
from trainer.config.parameters import Parameter
from trainer.config.training import TrainingConfig

__all__ = [
    "ENV_PREFIX",
    "UNSET",
    "Parameter",
    "ScopeName",
    "SiteConfig",
    "TrainingConfig",
    "VendorConfig",
    "add_config_flags",
    "config_from_arguments",
    "given",
    "load_config",
]
