"""Donors and fetchers for tests.

A fetcher here has no address: all that a donor sends comes over a connection that the fetcher dials, and so through a
proxy, if one is in between.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.members import LOCAL, SECRET
from trainer.timeouts import TransportTimeouts
from trainer.transport import fetch as transfer
from trainer.transport.credentials import Credentials, credentials
from trainer.transport.donor import Donor, Offer
from trainer.transport.transport import Transport

PATIENT = TransportTimeouts(stall=20.0, retry=0.05, dial_back=0.2, relay=0.5)  # shorter where a test is about silence
CHUNK = 1 << 16
PLAIN = credentials(SECRET)  # on loopback
ENCRYPTED = replace(PLAIN, loopback=True)
Shelf = tuple[dict[str, Offer], dict[str, list[str]]]
Find = Callable[[str], Offer | None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]


def state(count: int = 300_001, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(count, generator=generator) for name in ("parameters", "momentum")}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit for bit, whatever the shapes."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and torch.equal(left[name].view(-1).view(torch.uint8), right[name].view(-1).view(torch.uint8))
        for name in left
    )


@contextmanager
def donors(
    *finds: Find, of: Credentials = PLAIN, timeouts: TransportTimeouts = PATIENT, address: str = LOCAL
) -> Iterator[list[str]]:
    """Donors "0", "1", …, by what they find; yields their endpoints."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(Transport(str(number), [address], of, handle=Donor(find, timeouts))).endpoints[0]
            for number, find in enumerate(finds)
        ]


def numbered(*endpoints: str) -> dict[str, list[str]]:
    return {str(number): [endpoint] for number, endpoint in enumerate(endpoints)}


def fetch(
    name: str,
    donors: dict[str, list[str]],
    of: Credentials = PLAIN,
    timeout: float = 20,
    timeouts: TransportTimeouts = PATIENT,
    **options: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """Over a transport of its own: each time, it is another member."""
    with Transport("fetcher", [], of, timeouts=timeouts) as transport:
        return transfer.fetch(transport, name, donors, timeout=timeout, chunk_bytes=CHUNK, timeouts=timeouts, **options)
