"""Reachability probes over real sockets."""

import socket
import threading
from typing import Any

from trainer.transport.reachability import ReachabilityProbe


class Warnings(list[str]):
    """Collected warnings; a thread waits for the first."""

    def __init__(self) -> None:
        self.warned = threading.Event()

    def __call__(self, message: str) -> None:
        self.append(message)
        self.warned.set()


def member(address: str) -> dict[str, Any]:
    return {"host": "there", "address": address}


def listener(address: str = "127.0.0.1") -> tuple[socket.socket, str]:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.create_server((address, 0), family=family)
    return (
        server,
        f"[{address}]:{server.getsockname()[1]}" if ":" in address else f"{address}:{server.getsockname()[1]}",
    )


def test_a_pair_that_cannot_talk_is_named_once_and_tried_again() -> None:
    (here, at_here), (gone, at_gone) = listener(), listener("::1")
    gone.close()
    warned = Warnings()
    probe, it = ReachabilityProbe(warned), {"007-abc": member(at_gone)}
    assert probe.unprobed(it) == {"007-abc"}
    probe.probe(it)
    assert warned.warned.wait(300)
    assert probe.unreachable == probe.unprobed(it) == {"007-abc"}
    (message,) = warned
    assert message.startswith(f"worker 7 (there) cannot be reached from here at {at_gone}: ")
    assert "network_interface" in message

    probe.check(it, timeout=3)
    assert len(warned) == 1
    probe.check({"007-abc": member(at_here)}, timeout=3)  # it has healed
    assert probe.unreachable == probe.unprobed(it) == set()
    assert probe.unprobed({"008-def"}) == {"008-def"}  # the other is gone from the run, and forgotten
    assert probe.unprobed(it) == {"007-abc"}
    here.close()
    probe.close()


def test_one_that_has_died_is_no_news() -> None:
    server, endpoint = listener()
    server.close()
    warned = Warnings()
    probe = ReachabilityProbe(warned)
    probe.check({"001-abc": member(endpoint)}, timeout=3)
    assert probe.unreachable == {"001-abc"} and not warned
    probe.close()
