"""What a soak does to a run: each harm hurts a pod, etcd or the network, and returns what mends it.

A harm is a function of the `Scene` and the planned `Harm`. It returns the repair, which is called `Harm.seconds` later;
None where there was nothing to hurt. Repairs tolerate that the run has ended in between.
"""

import errno
import os
import random
import signal
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.faults.harness import Pod, Run
from tests.network.namespaces import Network
from trainer import checkpoint
from trainer.etcd.embedded import EmbeddedEtcd

DISK_MB = 24  # of the volume that fills up
RATE = "4mbit"  # of a slow link

Repair = Callable[[], None]


@dataclass(frozen=True)
class Harm:
    """One harm of a plan."""

    at: float  # seconds after the first quorum
    name: str
    victim: int  # modulo the number of pods that can be hurt
    seconds: float  # until it is mended

    def __str__(self) -> str:
        return f"{self.at:5.1f} s: {self.name} ({self.victim}), mended after {self.seconds:.1f} s"


@dataclass
class Scene:
    """A run that is being hurt.

    Attributes:
        pods: By slot, those that are meant to run. A pod that ends by itself is started again, as a cluster would.
        hurt: Slots with a harm that is not mended yet: they are left alone.
        disks: Slots whose checkpoints lie on a small volume of their own.
        start: Starts a pod on a slot.
    """

    run: Run
    etcd: EmbeddedEtcd
    network: Network | None
    start: Callable[[int], Pod]
    most: int
    pods: dict[int, Pod] = field(default_factory=dict)
    hurt: set[int] = field(default_factory=set)
    disks: set[int] = field(default_factory=set)
    etcd_hurt: bool = False

    def victim(self, harm: Harm, among: set[int] | None = None) -> Pod | None:
        """The pod to hurt: one that runs and that nothing else is being done to."""
        healthy = [
            slot
            for slot, pod in sorted(self.pods.items())
            if slot not in self.hurt
            and (among is None or slot in among)
            and pod.agent.poll() is None
            and pod.started
            and pod.alive
        ]
        return self.pods[healthy[harm.victim % len(healthy)]] if healthy else None

    def replace(self, pod: Pod) -> Repair:
        """The repair that starts the pod of a slot again."""

        def start() -> None:
            self.pods[pod.slot] = self.start(pod.slot)

        return start


def kill_worker(scene: Scene, harm: Harm) -> Repair | None:
    if (pod := scene.victim(harm)) is None:
        return None
    pod.kill_worker()
    return lambda: None  # its agent starts it again


def kill_pod(scene: Scene, harm: Harm) -> Repair | None:
    if (pod := scene.victim(harm)) is None:
        return None
    scene.hurt.add(pod.slot)
    pod.kill()
    return _mended(scene, pod, scene.replace(pod))


def freeze_worker(scene: Scene, harm: Harm) -> Repair | None:
    if (pod := scene.victim(harm)) is None:
        return None
    scene.hurt.add(pod.slot)
    frozen = psutil.Process(pod.pid)
    frozen.suspend()

    def thaw() -> None:
        with suppress(psutil.NoSuchProcess):
            frozen.resume()

    return _mended(scene, pod, thaw)


def leave(scene: Scene, harm: Harm) -> Repair | None:
    if (pod := scene.victim(harm)) is None:
        return None
    scene.hurt.add(pod.slot)
    pod.agent.terminate()

    def come_back() -> None:
        pod.agent.wait()
        scene.replace(pod)()

    return _mended(scene, pod, come_back)


def scale_down(scene: Scene, harm: Harm) -> Repair | None:
    """For good. A later `scale_up` may take the volume again."""
    if len(scene.pods) < 3 or (pod := scene.victim(harm)) is None:
        return None
    del scene.pods[pod.slot]
    pod.agent.terminate()
    return lambda: _wait(pod)


def scale_up(scene: Scene, harm: Harm) -> Repair | None:
    free = [slot for slot in range(scene.most) if slot not in scene.pods and _is_gone(scene.run, slot)]
    if not free:
        return None
    slot = free[harm.victim % len(free)]
    scene.pods[slot] = scene.start(slot)
    return lambda: None


def kill_etcd(scene: Scene, harm: Harm) -> Repair | None:
    if scene.etcd_hurt or scene.etcd.pid is None:
        return None
    scene.etcd_hurt = True
    psutil.Process(scene.etcd.pid).kill()

    def restart() -> None:
        scene.etcd.restart_if_dead()
        scene.etcd.wait_until_healthy()
        scene.etcd_hurt = False

    return restart


def freeze_etcd(scene: Scene, harm: Harm) -> Repair | None:
    if scene.etcd_hurt or scene.etcd.pid is None:
        return None
    scene.etcd_hurt = True
    frozen = psutil.Process(scene.etcd.pid)
    frozen.suspend()

    def thaw() -> None:
        frozen.resume()
        scene.etcd_hurt = False

    return thaw


def fill_disk(scene: Scene, harm: Harm) -> Repair | None:
    """No checkpoint can be written until it is mended."""
    if (pod := scene.victim(harm, scene.disks)) is None:
        return None
    scene.hurt.add(pod.slot)
    filler = pod.root / "checkpoints" / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return _mended(scene, pod, lambda: filler.unlink(missing_ok=True))


def set_clock(scene: Scene, harm: Harm) -> Repair | None:
    """The wall clock jumps by up to a day, back or forth, and later back to the right time."""
    if (pod := scene.victim(harm)) is None:
        return None
    jump = random.Random(f"{harm}").uniform(-86400, 86400)
    (pod.root / "clock").write_text(f"{jump}")
    return lambda: (pod.root / "clock").unlink(missing_ok=True)


def corrupt_checkpoint(scene: Scene, harm: Harm) -> Repair | None:
    """A byte of the newest checkpoint is wrong when the pod starts again; it is put right after that."""
    if (pod := scene.victim(harm)) is None:
        return None
    scene.hurt.add(pod.slot)
    pod.kill()
    found = checkpoint.paths(pod.root / "checkpoints" / scene.run.config.run_id)
    if found:
        path = found[0] / "global.safetensors"
        flipped = _flip(path)
        start = scene.replace(pod)

        def start_and_restore() -> None:
            start()
            scene.run.until(lambda: scene.pods[pod.slot].started or scene.pods[pod.slot].agent.poll() is not None, "it")
            with suppress(OSError):  # it may have been removed as an old one, or written anew
                if path.stat().st_mtime_ns == flipped:
                    _flip(path)

        return _mended(scene, pod, start_and_restore)
    return _mended(scene, pod, scene.replace(pod))


def cut_network(scene: Scene, harm: Harm) -> Repair | None:
    network = scene.network
    if network is None or (pod := scene.victim(harm)) is None:
        return None
    scene.hurt.add(pod.slot)
    network.cut(pod.slot)
    return _mended(scene, pod, lambda: network.heal(pod.slot))


def build_wall(scene: Scene, harm: Harm) -> Repair | None:
    """Two pods cannot talk to each other, while both talk to all others."""
    network = scene.network
    if network is None or (one := scene.victim(harm)) is None:
        return None
    scene.hurt.add(one.slot)
    other = scene.victim(harm)
    if other is None:
        scene.hurt.discard(one.slot)
        return None
    scene.hurt.add(other.slot)
    network.wall(one.slot, other.slot)
    return _mended(scene, one, _mended(scene, other, lambda: network.wall(one.slot, other.slot, built=False)))


def slow_link(scene: Scene, harm: Harm) -> Repair | None:
    network = scene.network
    if network is None or (pod := scene.victim(harm)) is None:
        return None
    scene.hurt.add(pod.slot)
    network.slow(pod.slot, RATE)
    return _mended(scene, pod, lambda: network.slow(pod.slot))


Action = Callable[[Scene, Harm], Repair | None]

# With how often each is drawn
ANYWHERE: dict[Action, int] = {
    kill_worker: 5,
    kill_pod: 3,
    freeze_worker: 3,
    leave: 3,
    scale_down: 2,
    scale_up: 3,
    kill_etcd: 1,
    freeze_etcd: 1,
    set_clock: 1,
    corrupt_checkpoint: 1,
}
ON_SMALL_DISKS: dict[Action, int] = {fill_disk: 2}
ON_NETWORKS: dict[Action, int] = {cut_network: 3, build_wall: 2, slow_link: 2}
ACTIONS = {action.__name__: action for action in (*ANYWHERE, *ON_SMALL_DISKS, *ON_NETWORKS)}


def small_disk(directory: Path, resources: ExitStack) -> None:
    """Make `directory` a volume of `DISK_MB`.

    Raises:
        PermissionError: Not permitted here.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if os.geteuid():
        raise PermissionError("mounting needs root")
    options = ["-t", "tmpfs", "-o", f"size={DISK_MB}m", "soak", str(directory)]
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    resources.callback(subprocess.run, ["umount", "--lazy", str(directory)], check=False)


def _mended(scene: Scene, pod: Pod, repair: Callable[[], object]) -> Repair:
    def mend() -> None:
        repair()
        scene.hurt.discard(pod.slot)

    return mend


def _flip(path: Path) -> int:
    """Flip a bit in the middle of a file; returns when the file was changed, ns."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    return path.stat().st_mtime_ns


def _is_gone(run: Run, slot: int) -> bool:
    return all(pod.agent.poll() is not None for pod in run.pods if pod.slot == slot)


def _wait(pod: Pod) -> None:
    if pod.agent.poll() is None:
        pod.agent.send_signal(signal.SIGTERM)
    pod.agent.wait()
