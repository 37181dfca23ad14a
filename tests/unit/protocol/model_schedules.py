"""Schedules of faults, each drawn from a seed, and their outcomes; see `test_model`."""

import random
from dataclasses import replace

from tests.unit.protocol.model_etcd import COLLECTIVE, FAULTS_END, GRACE, TTL, Fault
from tests.unit.protocol.model_world import World
from trainer.protocol.records import (
    Rules,
)

WHERE = (
    "arrived",
    "entering",
    "in the collective",
    "reduced",
    "voted",
    "committing",
    "listed",
    "decided",
    "swapped",
    "recorded",
    "saved",
    "ready",
    "left",
    "catching up",
    "joining",
    "registered",
    "registering again",
)


def schedule_of(seed: int) -> World:
    """A run with faults, all of it drawn from the seed."""
    chance = random.Random(seed)
    workers = chance.choice([2, 2, 3, 3, 4])
    nodes = chance.choice([workers, workers, max(2, workers - 1)])
    rules = Rules(
        min_nodes=chance.choice([1, 1, 2]),
        max_members=workers,
        grace_period=GRACE,
        retry_period=COLLECTIVE + 1,
        forget_period=TTL + 2,
        stall_limit=30.0,
        local_steps=chance.choice([2, 3]),
        total_steps=chance.choice([None, 5, 17]),
        batch_size=2,
        prefetch=1 if seed % 8 < 4 else 2,
        least_grace=GRACE * (seed % 3) / 2,
    )
    faults = [Fault(0.0 if worker < 2 else chance.uniform(0, 10), "start", worker) for worker in range(workers)]
    kinds = ["kill", "kill", "freeze", "freeze", "leave", "cut", "lose lease", "slow", "etcd away", "shaky collectives"]
    kinds.append("wall")
    places: tuple[str, ...] = WHERE
    anywhere = ("start", "slow", "flip", "etcd away", "shaky collectives", "wall", "launch again")
    if seed % 4 == 1:
        kinds = ["kill", "kill all", "start"]

        if seed % 16 == 9:
            kinds = ["kill", "launch again", "launch again"]
        elif seed % 16 == 13:
            kinds = ["kill", "lose volume", "kill all", "start"]
            rules = replace(rules, lost_state_wait=TTL + 4)
    elif seed % 4 == 2:  # around a commit
        kinds = ["freeze", "kill", "leave", "lose lease"]
        places = ("reduced", "voted", "committing", "decided", "swapped")
    for _ in range(chance.randint(0, 7)):
        what = chance.choice([*kinds, "flip"] if seed % 4 == 0 else kinds)
        worker, at = chance.randrange(workers), chance.uniform(0, FAULTS_END - 1)
        where = "" if what in anywhere or chance.random() < 0.4 else chance.choice(places)
        faults.append(Fault(at, what, worker, chance.choice([0.5, 2.0, 5.0, 9.0]), where))
        if what in ("kill", "kill all", "leave") and chance.random() < 0.7:
            again = chance.sample(range(workers), chance.randint(1, workers)) if what == "kill all" else [worker]
            faults += [Fault(at + chance.uniform(0.2, 6), "start", worker) for worker in again]
    faults.sort(key=lambda fault: fault.at)
    carry, speeds = chance.random() < 0.8, (1.0,) * workers
    if seed // 8 % 3 == 0:
        rules = replace(rules, speed_tolerance=chance.choice([0.0, 0.15]))
        speeds = tuple(chance.choice([0.2, 0.4, 0.9, 1.0, 2.0]) for _ in range(workers))
        if max(speeds) == 0.2:
            # A known limit: where all rounds take more than twice the grace period, two members that are half a round
            # apart may alternate without end, each of them alone in its quorum.
            speeds = (0.4,) * workers
    return World(seed, tuple(faults), rules, nodes, carry, speeds)


def outcome_of(world: World) -> AssertionError | None:
    try:
        world.run()
    except AssertionError as error:
        return error
    return None


def check(seed: int) -> World:
    """Run a seed's schedule. On failure, drop faults for as long as it still fails, and report the rest."""
    world = schedule_of(seed)
    error = outcome_of(world)
    if error is None:
        return world
    shorter = True
    while shorter:
        shorter = False
        for fault in world.faults:
            rest = tuple(other for other in world.faults if other is not fault)
            candidate = replace(
                world, faults=rest, now=0.0, calm=False, shaky_until=0.0, events=0, processes={}, volumes={}, trace=[]
            )
            if (found := outcome_of(candidate)) is not None and str(found)[:20] == str(error)[:20]:
                world, error, shorter = candidate, found, True
                break
    trace = "\n".join(
        f"{when:7.2f}  {process:8}  {' '.join(map(str, what))}" for when, process, what in world.trace[-120:]
    )
    faults = "\n".join(map(str, world.faults))
    raise AssertionError(f"{error}\n\nseed {seed}, {world.rules}, carry {world.carry}\n{faults}\n\n{trace}") from error
