"""Which of a run's nodes are this launch's.

The slots are the run's: several launches number their agents from 0, and an agent takes any slot that is free. What
tells the nodes apart is the id that the launch gives to each agent that it starts.
"""

from collections.abc import Sequence

from trainer.elastic import keys
from trainer.etcd.client import EtcdClient
from trainer.launch.agent_process import AgentProcess


class OwnNodes:
    """The nodes of a launch's agents.

    Args:
        numbered: The run's nodes have no slots, and the numbers of their agents (the `ddp` baseline).
    """

    def __init__(self, client: EtcdClient, agents: Sequence[AgentProcess], *, numbered: bool = False) -> None:
        self._client, self._agents, self._numbered = client, agents, numbered
        self._holders: dict[int, str] = {}  # by slot: the id of the node that holds it, or has held it last

    def look(self) -> None:
        """Take in who holds the slots: they are asked for when a holder's keys may be gone. Called by a watch."""
        for key, entry in self._client.list("slots/").items():
            self._holders[int(key.removeprefix("slots/"))] = entry.value["node"]

    def at(self, slot: int) -> AgentProcess | None:
        """The agent whose node holds a slot of the run, or has held it last; None: it is not this launch's."""
        if self._numbered:
            return self._agents[slot] if slot < len(self._agents) else None
        return next((agent for agent in self._agents if self._holders.get(slot) in agent.ids), None)

    def elsewhere(self) -> int:
        """The nodes that are not this launch's: it may not speak for them. Raises EtcdError."""
        own = {id for agent in self._agents for id in agent.ids}
        return sum(entry.value["node"] not in own for entry in self._client.list("slots/").values())

    def free(self, agent: AgentProcess) -> None:
        """Revoke at once the leases of an agent that was killed. Raises EtcdError."""
        keys.free_slots(self._client, agent.ids)
