"""How the etcd of manifests/ is set up, from the parameters `etcd.…`."""

from trainer.config import TrainingConfig

# Parameter, by flat name, and the variable that etcd reads (https://etcd.io/docs/v3.5/op-guide/configuration/).
ETCD_SETTINGS = {
    "etcd_heartbeat_interval": "ETCD_HEARTBEAT_INTERVAL",
    "etcd_election_timeout": "ETCD_ELECTION_TIMEOUT",
    "etcd_snapshot_count": "ETCD_SNAPSHOT_COUNT",
    "etcd_auto_compaction_mode": "ETCD_AUTO_COMPACTION_MODE",
    "etcd_auto_compaction_retention": "ETCD_AUTO_COMPACTION_RETENTION",
}


def etcd_environment(config: TrainingConfig) -> dict[str, str]:
    """The environment of etcd's members. Far-apart members need longer intervals than etcd's own 100 and 1000 ms."""
    values = config.to_flat()
    return {variable: str(values[name]) for name, variable in ETCD_SETTINGS.items()}
