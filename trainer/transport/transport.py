"""The transport: this member's links with all others, established and re-established as needed.

Each member dials the others to send. If one end of a pair cannot dial, because of a NAT or a firewall, the other end
dials for both directions. If neither can, the pair is relayed by other members that both can dial
(trainer/transport/relay.py).
"""

import atexit
import logging
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Self

from trainer.process import at_once, endpoint_of, refused
from trainer.timeouts import TransportTimeouts
from trainer.transport.credentials import Credentials
from trainer.transport.group import Group
from trainer.transport.handshake import Consent, Dialler, Hello, Listener
from trainer.transport.link import BULK, NEVER, ROUNDS, Handler, Link, LinkError
from trainer.transport.relay import Relay
from trainer.transport.stream import Key, Stream, added

log = logging.getLogger(__name__)

# Default number of a link's streams in each direction: one more for each of these seconds of round-trip time, and the
# maximum. A lost packet halves a cubic stream, whereas BBR streams push each other's packets out of the queue.
CUBIC, BBR = (0.0125, 8), (0.025, 4)
ALL_STREAMS = 512  # approximate maximum per process, because each stream has a thread
RELAYS = 3  # maximum number of members that relay a pair's bytes
Endpoints = Sequence[str]


class Transport:
    """This member's links with all others. A context manager; `close` ends all links.

    Args:
        id: This member's unique id.
        addresses: Addresses at which others can dial this process: IPv4, IPv6 or names. If there is only one and it
            belongs to this machine, the process listens there; otherwise on all interfaces.
        credentials: The run's.
        port_range: "low-high" to listen on; empty: any port.
        port: The port to listen on; 0: see `port_range`.
        streams: Number of a link's streams in each direction; 0: depends on its round-trip time.
        silence: Seconds without a byte after which a member that should send counts as gone.
        handle: Answers requests on the bulk lane.
        call: Called, on any thread, when a member cannot be dialled; asks all others to `prepare` a link of this lane.

    Raises:
        ConfigError: No port is free.
    """

    def __init__(
        self,
        id: str,
        addresses: Sequence[str],
        credentials: Credentials,
        *,
        port_range: str = "",
        port: int = 0,
        streams: int = 0,
        silence: float = 5.0,
        handle: Handler | None = None,
        call: Callable[[str], None] = lambda lane: None,
        timeouts: TransportTimeouts = TransportTimeouts(),
    ) -> None:
        self.id, self.silence = id, silence
        self._streams, self._handle, self._call, self._timeouts = streams, handle, call, timeouts
        self._dialler = Dialler(credentials, timeouts, 3 * silence)
        self._lock = threading.Lock()  # guards the fields below
        self._links: dict[tuple[str, str], Link] = {}  # by member and lane
        self._known: dict[str, Endpoints] = {}
        self._gone: dict[str, tuple[int, int] | None] = dict.fromkeys((ROUNDS, BULK), (0, 0))  # bytes of ended links
        self._ended: list[Link] = []  # links whose streams have not all ended
        self._dialled: set[str] = set()  # members that could be dialled from here
        self._cannot_dial: set[str] = set()  # members that could not dial this one
        self._past: dict[tuple[str, str], str] = {}  # the other end of the last failed link
        self._over = NEVER  # this member's last finished attempt
        self._closing = False
        self._relay = Relay(timeouts.relay)
        own = addresses[0] if len(addresses) == 1 else ""
        self._listener = Listener(own, port_range, port, credentials, self._accept, timeouts, 3 * silence)
        self.port = self._listener.port
        self.endpoints = tuple(endpoint_of(address, self.port) for address in addresses)
        # A thread that still runs while the interpreter is torn down can abort the process, because it cannot unwind
        # C++ frames. That would turn exit status 0 into 134.
        atexit.register(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        atexit.unregister(self.close)
        with self._lock:
            self._closing = True
            links = list(self._links.values())
        self._listener.close()
        self._relay.close()
        for link in links:
            link.fail("was closed here")
        deadline = time.monotonic() + self._timeouts.stall
        for link in links:
            link.join(max(0.0, deadline - time.monotonic()))

    # Links

    def connect(self, members: Mapping[str, Endpoints], timeout: float, lane: str = ROUNDS) -> dict[str, str]:
        """Establish missing or worn links, all at the same time.

        Args:
            members: Endpoints by id; this member's own are ignored.

        Returns:
            Members without a link, each with the reason.
        """
        deadline, missing = time.monotonic() + timeout, {}
        others = {id: at for id, at in members.items() if id != self.id}
        self.prepare(others, lane)
        for id, endpoints in others.items():
            while link := self.prepare({id: endpoints}, lane).get(id):
                if link.wait_for(lambda link=link: link.up, deadline - time.monotonic()):  # type: ignore[misc]
                    break
                if not link.reason or (link.trouble and not link.peer_link) or time.monotonic() > deadline:
                    missing[id] = link.reason or link.trouble or "does not answer"
                    break
                time.sleep(random.uniform(0, self._timeouts.redial))  # both ends tried at the same time
            else:
                missing[id] = "this member is leaving"
        return missing

    def prepare(self, members: Mapping[str, Endpoints], lane: str = ROUNDS) -> dict[str, Link]:
        """Start to establish missing or worn links in the background. Returns all links to these members."""
        with self._lock:
            worn = [link for id in members if (link := self._links.get((id, lane))) and link.worn]
        for link in worn:
            link.fail("is being re-established")
        with self._lock:
            self._known.update(members)
            links = {}
            for id, endpoints in members.items():
                link = self._links.get((id, lane))
                if (link is None or link.reason) and not self._closing:  # a failed one is forgotten a moment later
                    link = self._begin(id, lane, endpoints)
                if link is not None:
                    links[id] = link
        return links

    def group(self, members: Sequence[str], attempt: Key, ended: Callable[[], bool] = lambda: False) -> Group:
        """The members of an attempt, in rank order, for its collective, which `ended` interrupts.

        Raises:
            LinkError: A member has no link.
        """
        links = [self._links.get((id, ROUNDS)) for id in members]
        for id, link in zip(members, links, strict=True):
            if id != self.id and (link is None or not link.up):
                raise LinkError(f"member {id} cannot be reached")
        by_rank = [link if id != self.id else None for id, link in zip(members, links, strict=True)]
        return Group(by_rank, attempt, self.silence, ended)

    def without_link(self, members: Iterable[str]) -> set[str]:
        """The members with which messages cannot currently be exchanged."""
        with self._lock:
            up = {id for (id, lane), link in self._links.items() if lane == ROUNDS and link.up}
        return {id for id in members if id != self.id} - up

    def lacking(self, members: Iterable[str]) -> set[str]:
        """The members to which a link must be established, because there is none or it is worn. See `prepare`."""
        members = set(members)
        with self._lock:
            worn = {id for (id, lane), link in self._links.items() if lane == ROUNDS and id in members and link.worn}
        return self.without_link(members) | worn

    def is_dead(self, id: str, endpoints: Endpoints) -> bool:
        """Whether a member's process is gone: its machine refuses connections that it accepted before."""
        if not self.without_link([id]) or id not in self._dialled:
            return False
        return all(refused(endpoint) for endpoint in endpoints)

    def finish(self, members: Iterable[str], attempt: Key, failed: bool = False) -> None:
        """Stop waiting for anything of this attempt and older ones. If it failed, tell the others."""
        with self._lock:
            self._over = max(self._over, attempt)
            links = [link for (id, lane), link in self._links.items() if id in members and lane == ROUNDS]
        for link in links:
            link.finish(attempt, failed)

    def bytes(self, lane: str = ROUNDS) -> tuple[int, int] | None:
        """Bytes sent and received so far, as counted by the kernel: payload, framing, TLS, retransmissions."""
        with self._lock:
            self._ended = [link for link in self._ended if not self._settled(link)]
            links = [link for link in (*self._links.values(), *self._ended) if link.lane == lane]
            return added([self._gone[lane], *(link.bytes() for link in links)])

    def relayed(self) -> dict[str, tuple[str, ...]]:
        """Members that cannot be reached directly, each with the relays of its link."""
        with self._lock:
            return {id: link.via for (id, _), link in sorted(self._links.items()) if link.via}

    def _settled(self, link: Link) -> bool:
        if link.streams(True) + link.streams(False):
            return False
        self._gone[link.lane] = added([self._gone[link.lane], link.bytes()])
        return True

    def _begin(self, id: str, lane: str, endpoints: Endpoints, peer_link: str = "") -> Link:
        """Create a link, which is established in the background. Called with the lock held."""
        handle = self._handle if lane == BULK else None
        if (replaced := self._links.get((id, lane))) is not None:
            self._ended.append(replaced)  # its bytes count until its streams have ended
        link = self._links[id, lane] = Link(id, lane, secrets.token_hex(8), handle, self._forget)
        link.peer_link = peer_link
        if lane == ROUNDS and self._over > NEVER:
            link.finish(self._over, failed=True)  # the other member may still be in that attempt, or just starting it
        threading.Thread(target=self._establish, args=(link, endpoints), name=f"dial-{id}", daemon=True).start()
        return link

    def _forget(self, link: Link) -> None:
        with self._lock:
            self._past[link.peer, link.lane] = link.peer_link
            if self._links.get((link.peer, link.lane)) is link:  # otherwise another one has replaced it
                del self._links[link.peer, link.lane]
                self._ended.append(link)
        if not self._closing:
            log.debug("link with %s (%s): %s", link.peer, link.lane, link.reason)

    # Dialling

    def _establish(self, link: Link, endpoints: Endpoints) -> None:
        """Dial the other member, let it dial, or connect through relays."""
        peer, timeouts = link.peer, self._timeouts
        try:
            self._dial(link, endpoints, sends=True)
        except OSError as error:
            link.trouble = f"{', '.join(endpoints)}: {error.strerror or error}"
            known = peer in self._dialled
            if not known:
                self._call(link.lane)
            if link.wait_for(lambda: link.streams(False) > 0, 0.0 if known else 2 * timeouts.dial_back):
                self._wait_for_both(link)
            elif known:  # it could be dialled before, so it is dead or the network is cut
                link.fail(link.trouble)
        else:
            self._dialled.add(peer)
            patience = 0.0 if peer in self._cannot_dial or not self.endpoints else timeouts.dial_back
            if link.wait_for(lambda: link.streams(False) > 0, patience) or link.reason:
                return
            # It does not dial back, for example because of NAT: dial for its direction, too
            self._cannot_dial.add(peer)
            with suppress(OSError):
                self._dial(link, endpoints, sends=False)
                return
            link.wait_for(lambda: link.up, timeouts.dial_back)
        if not link.up and not link.reason:
            self._meet(link)

    def _wait_for_both(self, link: Link) -> bool:
        """Wait for both directions: after dialling, the other member opens both if it is not dialled back in time."""
        timeouts = self._timeouts
        return link.wait_for(lambda: link.up, timeouts.dial_back + timeouts.connect + timeouts.handshake)

    def _dial(self, link: Link, endpoints: Endpoints, sends: bool) -> None:
        """Open the streams of a direction. Raises OSError if none can be opened."""
        hello = Hello(self.id, link.peer, link.lane, sends, link.id, False, self.endpoints, link.peer_link)
        first, endpoint = self._dialler.dial(endpoints, hello)
        stream = Stream(first)
        more = self._streams_for(stream) - 1
        link.add(stream, sends)

        def another(number: int) -> None:
            with suppress(OSError):
                made, _ = self._dialler.dial([endpoint], hello)
                link.add(Stream(made), sends)

        at_once(another, range(more))

    def _streams_for(self, first: Stream) -> int:
        """The number of streams in a direction."""
        trip, many = BBR if first.has_bbr() else CUBIC
        most = max(1, ALL_STREAMS // (2 * max(1, len(self._links))))
        return min(self._streams or min(max(1, round(first.round_trip() / trip)), many), most)

    def _meet(self, link: Link) -> None:
        """Connect to the other member through relays; it does the same now."""
        with self._lock:
            linked = {id for (id, _), other in self._links.items() if other.up}
            others = {id: at for id, at in self._known.items() if id not in (self.id, link.peer)}
        nearest = sorted(others, key=lambda id: (id not in linked, id))[
            :RELAYS
        ]  # `known` also contains members that have left
        candidates = [(id, sends) for id in nearest for sends in (True, False)]

        def meet(candidate: tuple[str, bool]) -> None:
            relay, sends = candidate
            hello = Hello(self.id, link.peer, link.lane, sends, link.id, True, self.endpoints)
            with suppress(OSError):
                made, _ = self._dialler.dial(others[relay], hello, self._timeouts.relay)
                link.via = tuple(sorted({*link.via, relay}))
                link.add(Stream(made), sends)

        at_once(meet, candidates)
        if not link.up and not (link.streams(False) and self._wait_for_both(link)):
            link.fail(link.trouble or "cannot be reached, and no other member reaches it")

    # Being dialled

    def _accept(self, connection: socket.socket, hello: Hello, consent: Consent) -> None:
        """Take over an accepted connection. Called on the listener's thread."""
        try:
            if hello.relayed and hello.to != self.id:
                self._relay.take(connection, hello, consent)
                return
            link = self._adopt(hello)
            if link is None:
                connection.close()
                return
            consent()
            link.add(Stream(connection), sends=not hello.sends)
        except OSError:
            connection.close()

    def _adopt(self, hello: Hello) -> Link | None:
        """The link to which a dialler's stream belongs; None if there is none."""
        if hello.to != self.id or hello.lane not in self._gone:
            return None
        key, stale = (hello.by, hello.lane), None
        with self._lock:
            link, past = self._links.get(key), {self._past.get(key)}
            if link is not None and link.reason:  # it is forgotten a moment later
                past.add(link.peer_link)
                link = None
            if hello.link in past or (hello.pair and (link is None or hello.pair != link.id)):
                return None  # the link has failed here, which the dialler has not noticed yet
            if link is None or link.peer_link not in ("", hello.link):
                link, stale = None, link
                if not hello.pair and not self._closing:  # otherwise both would re-establish it forever
                    link = self._begin(hello.by, hello.lane, hello.at, hello.link)
            if link is not None:
                link.peer_link = hello.link
            if hello.at:
                self._known[hello.by] = hello.at
        if stale is not None:
            stale.fail("has re-established the connection")
        return link
