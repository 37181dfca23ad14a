"""The protocol's parameters of a run."""

from trainer.config import TrainingConfig
from trainer.protocol.records import Rules


def rules_of(config: TrainingConfig) -> Rules:
    """The protocol's parameters, from a run's configuration."""
    wait = min(config.lost_state_wait, config.elastic.rdzv_timeout / 2)  # before the members give up
    return Rules(
        min_nodes=config.min_nodes,
        max_members=config.max_nodes * config.elastic.nproc_per_node,
        grace_period=config.grace_period,
        retry_period=config.collective_timeout + 1,
        forget_period=config.lease_ttl + 2,
        stall_limit=config.elastic.rdzv_timeout,
        local_steps=config.round_steps,
        total_steps=config.total_steps,
        batch_size=config.batch_size,
        prefetch=2 if config.overlaps else 1,
        lost_state_wait=None if config.lost_state == "stop" else wait,
        speed_tolerance=config.group_perc_variance if config.heterogeneous else None,
    )
