"""What goes over the wire: nothing that a listener could read, and as many bytes as are counted."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.members import PATIENCE, SECRET, connect, member, names, reduce, swap
from tests.network.namespaces import Network
from tests.network.proxy import Proxy
from trainer.diloco.codecs import Fp32
from trainer.diloco.collective import weighted_mean
from trainer.transport.credentials import credentials
from trainer.transport.donor import Donor, Offer
from trainer.transport.fetch import fetch

ROOT = Path(__file__).parents[3]
MARK = b"the secret parameters of the model"  # 34 bytes: no alignment hides it


def parameters() -> torch.Tensor:
    """Float32, whose bytes hold `MARK` again and again."""
    return torch.frombuffer(bytearray(MARK * 2000), dtype=torch.float32).clone()


@pytest.mark.parametrize("security", ["tls", "none"])
def test_a_capture_of_the_wire_holds_no_parameters_no_secret_and_no_names(security: str) -> None:
    """Without TLS it does hold the parameters, and this test would see them; the secret is in neither."""
    of = replace(credentials(SECRET, security), loopback=True)
    values = parameters()
    donor = Donor({"state/1": Offer({"round": 1}, {"parameters": values})}.get)
    with ExitStack() as stack:
        one, other = (stack.enter_context(member(rank, of=of, handle=donor)) for rank in (0, 1))
        proxies = [stack.enter_context(Proxy(each.endpoints[0], keeps=True)) for each in (one, other)]
        for each, proxy in zip((one, other), proxies, strict=True):
            each.endpoints = (proxy.endpoint,)
        connect([one, other])
        swap(one, other)
        groups = [each.group(names(2), (1, 1, 2)) for each in (one, other)]
        pending = [group.receive(1 - rank, 1, torch.empty_like(values)) for rank, group in enumerate(groups)]
        pending += [group.send(1 - rank, 1, values) for rank, group in enumerate(groups)]
        for message in pending:
            message.wait(PATIENCE)
        _, received = fetch(one, "state/1", {other.id: other.endpoints}, timeout=PATIENCE)
        assert torch.equal(received["parameters"], values)
        seen = b"".join(piece for proxy in proxies for piece in proxy.seen)
    assert len(seen) > 3 * values.nbytes
    plain = security == "none"
    for word in (MARK, one.id.encode(), b'"proof"', b"state/1", values.numpy().tobytes()[5000:5016]):
        assert (word in seen) is plain, word
    for word in (SECRET, SECRET.hex().encode()):
        assert word not in seen


def test_what_is_counted_is_what_was_sent() -> None:
    """Payload, framing and the handshakes; both ends agree."""
    with member(0) as one, member(1) as other:
        assert one.bytes() == other.bytes() == (0, 0)
        connect([one, other])
        before = [each.bytes() or (0, 0) for each in (one, other)]
        reduce([one, other], size=100_000)
        moved = [
            (after[0] - start[0], after[1] - start[1])
            for start, after in zip(before, [each.bytes() or (0, 0) for each in (one, other)], strict=True)
        ]
        assert moved[0] == moved[1][::-1]
        assert 400_000 <= moved[0][0] <= 400_000 * 1.01
        # Links that have ended count, too
        total = one.bytes()
        other.close()
        assert (one.bytes() or (0, 0))[0] >= (total or (0, 0))[0] > 400_000


def test_tls_costs_less_than_a_percent() -> None:
    found = []
    for security in ("none", "tls"):
        of = replace(credentials(SECRET, security), loopback=True)
        with member(0, of=of) as one, member(1, of=of) as other:
            connect([one, other])
            before = (one.bytes() or (0, 0))[0]
            reduce([one, other], size=500_000)
            found.append((one.bytes() or (0, 0))[0] - before)
    assert found[0] < found[1] < 1.01 * found[0]


# In network namespaces


def serve(rank: int, address: str) -> None:
    """A member in a namespace, which does what it is told, and prints what comes of it."""

    def counters() -> tuple[int, int]:
        """Bytes that the interface has sent and received."""
        (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if "eth0:" in line]
        columns = line.partition(":")[2].split()
        return int(columns[8]), int(columns[0])

    transport, heard = member(rank, address), 0.0
    link: Any = None
    print(json.dumps(transport.endpoints), flush=True)
    for line in sys.stdin:
        task, argument = json.loads(line)
        answer: Any = None
        if task == "connect":
            answer = transport.connect(argument, PATIENCE)
            (link,) = transport._links.values()
        elif task == "reduce":
            group = transport.group(names(2), (1, 1, argument))
            reduced = weighted_mean(group, torch.ones(2_000_000), 1.0, Fp32(), lambda start, mean: None)
            transport.finish(names(2), (1, 1, argument))
            answer = reduced.hash
        elif task == "bytes":
            answer = [transport.bytes(), counters()]
        elif task == "send":
            link.send((1, 2, 1), 1, torch.ones(1 << 22))
        elif task == "heard":
            heard, before = link.heard(), heard
            answer = [heard == before, transport.bytes()]
        print(json.dumps(answer), flush=True)


class Inside:
    """`serve` in a namespace."""

    def __init__(self, network: Network, rank: int) -> None:
        command = "import sys; from tests.unit.transport.test_wire import serve; serve(int(sys.argv[1]), sys.argv[2])"
        inside = [*network.inside(rank), sys.executable, "-c", command, str(rank), network.address_of(rank)]
        self.process = subprocess.Popen(inside, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)

    def tell(self, task: str, argument: Any = None) -> None:
        assert self.process.stdin
        self.process.stdin.write(json.dumps([task, argument]) + "\n")
        self.process.stdin.flush()

    def answer(self) -> Any:
        assert self.process.stdout
        return json.loads(self.process.stdout.readline())

    def ask(self, task: str, argument: Any = None) -> Any:
        self.tell(task, argument)
        return self.answer()


Machines = tuple[Network, list[Inside]]


@pytest.fixture(scope="module", params=[False, True], ids=["IPv4", "IPv6"])
def machines(request: pytest.FixtureRequest) -> Iterator[Machines]:
    """Two members, each in a namespace of its own, and connected."""
    try:
        network = Network(2, ipv6=request.param)
    except (PermissionError, RuntimeError, OSError) as error:
        pytest.skip(f"no network namespace can be made: {error}")
    with network, ExitStack() as stack:
        found = [Inside(network, rank) for rank in range(2)]
        for each in found:
            stack.callback(each.process.wait)
            stack.callback(each.process.kill)
        endpoints = {name: each.answer() for name, each in zip(names(2), found, strict=True)}
        assert all(("[" in one) is request.param for at in endpoints.values() for one in at)
        for each in found:
            each.tell("connect", endpoints)
        assert [each.answer() for each in found] == [{}, {}]
        yield network, found


def test_between_two_machines_the_bytes_are_the_interfaces(machines: Machines) -> None:
    _, found = machines
    before = [each.ask("bytes") for each in found]
    for each in found:
        each.tell("reduce", 1)
    one, other = (each.answer() for each in found)
    assert one == other
    after = [each.ask("bytes") for each in found]
    for start, end in zip(before, after, strict=True):
        for way in (0, 1):
            counted, really = end[0][way] - start[0][way], end[1][way] - start[1][way]
            assert counted >= 8_000_000
            assert counted <= really <= 1.1 * counted + 100_000  # with the headers and acknowledgements


def test_what_is_sent_again_and_again_is_no_sign_of_life(machines: Machines) -> None:
    """A network that is cut: the kernel repeats what nobody acknowledges, and that counts as bytes, not as news."""
    network, (one, _) = machines
    network.cut(1)
    one.ask("send")
    last = one.ask("heard")[1]
    for _ in range(3):  # it is sent again
        while (now := one.ask("heard"))[1] == last:
            pass
        last = now[1]
        assert now[0], "it was taken for a sign of life"
    network.heal(1)
