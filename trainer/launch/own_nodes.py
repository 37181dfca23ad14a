"""Which of a run's nodes belong to this launch.

Slots belong to the run, not to a launch: several launches number their agents from 0, and an agent takes any free slot.
So nodes are told apart by the id that a launch gives to each agent that it starts.
"""

from collections.abc import Sequence

from trainer.elastic import keys
from trainer.etcd.client import EtcdClient
from trainer.launch.agent_process import AgentProcess


class OwnNodes:
    """The nodes of a launch's agents.

    Args:
        numbered: Whether nodes have no slots and are numbered like their agents (the `ddp` baseline).
    """

    def __init__(self, client: EtcdClient, agents: Sequence[AgentProcess], *, numbered: bool = False) -> None:
        self._client, self._agents, self._numbered = client, agents, numbered
        self._holders: dict[int, str] = {}  # by slot: the id of the node that holds it, or was the last to hold it

    def look(self) -> None:
        """Record which nodes hold the slots, for when their keys are gone. Called by a watch."""
        for key, entry in self._client.list("slots/").items():
            self._holders[int(key.removeprefix("slots/"))] = entry.value["node"]

    def at(self, slot: int) -> AgentProcess | None:
        """The agent whose node holds a slot of the run, or was the last to hold it; None if it is another launch's."""
        if self._numbered:
            return self._agents[slot] if slot < len(self._agents) else None
        return next((agent for agent in self._agents if self._holders.get(slot) in agent.ids), None)

    def elsewhere(self) -> int:
        """The number of nodes of other launches, about which this launch may not decide. Raises EtcdError."""
        own = {id for agent in self._agents for id in agent.ids}
        return sum(entry.value["node"] not in own for entry in self._client.list("slots/").values())

    def free(self, agent: AgentProcess) -> None:
        """Immediately revoke the leases of an agent that was killed. Raises EtcdError."""
        keys.free_slots(self._client, agent.ids)
