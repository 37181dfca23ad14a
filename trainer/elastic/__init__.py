"""Performs what the protocol decides: members, attempts, catching up, the coordinator. `join` is for other loops."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.config import TrainingConfig
    from trainer.elastic.own_loop import LoopMember

__all__ = ["join"]


def join(address: str, config: "TrainingConfig | None" = None, **parameters: Any) -> "LoopMember":
    """Make a training loop of one's own a worker of a run: the quorum for `DiLoCo`.

    Takes a number in the run, and holds it under a lease. The worker becomes a member in the context of `DiLoCo`, which
    ends the membership, too:

        quorum = trainer.elastic.join("etcd://host:2379/run")
        with DiLoCo(model, optimizer, sync_every=100, quorum=quorum):
            ...  # the loop, unchanged

    Args:
        address: `etcd://host:port/run`: an etcd (several members: `host:port,host:port`) and a name for the run. The
            first worker begins the run. A user is `etcd_user`, with the password in ETCD_PASSWORD.
        config: Membership as another configuration has it; by default as the `DILOCO_*` variables do.
        parameters: By the flat names of `TrainingConfig`, those that concern a membership (`own_loop.PARAMETERS`), for
            example `nodes=4, batch_size=32, run_dir="runs/mine"`.

    Raises:
        ConfigError: The address or a parameter is not as above.
        TrainingError: etcd cannot be reached or used; the run has ended, or has no number left.
    """
    from trainer.elastic.own_loop import LoopMember

    return LoopMember.join(address, config, parameters)
