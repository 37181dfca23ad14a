"""Execution of the protocol's decisions: members, attempts, catching up, the coordinator. `join` serves other loops."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import TrainingConfig
    from trainer.elastic.own_loop import LoopMember

__all__ = ["join"]


def join(address: str, config: "TrainingConfig | None" = None, **parameters: Any) -> "LoopMember":
    """Make your own training loop a worker of a run. Returns the quorum for `DiLoCo`.

    This claims a worker number in the run and holds it under a lease. The worker is a member while it is in the context
    of `DiLoCo`:

        quorum = trainer.elastic.join("etcd://host:2379/run")
        with DiLoCo(model, optimizer, sync_every=100, quorum=quorum):
            ...  # the loop, unchanged

    Args:
        address: `etcd://host:port/run`: an etcd (several members: `host:port,host:port`) and a name for the run. The
            first worker starts the run. An etcd user is set by `etcd_user`, its password by ETCD_PASSWORD.
        config: A configuration to take the membership's parameters from; by default, the `DILOCO_*` variables.
        parameters: Parameters of the membership by the flat names of `TrainingConfig` (`own_loop.PARAMETERS`), for
            example `nodes=4, batch_size=32, run_dir="runs/mine"`.

    Raises:
        ConfigError: The address or a parameter is invalid.
        TrainingError: etcd cannot be reached or used; the run has ended, or has no free worker number.
    """
    from trainer.elastic.own_loop import LoopMember

    return LoopMember.join(address, config, parameters)
