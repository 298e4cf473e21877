"""What watches a run from its first moment to its last: heartbeat, watchdog, alerts, profiler, memory."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import torch

from pretrain.config.data import is_remote
from pretrain.launch.setup import Setup
from pretrain.planning.cluster import Cluster, plan_run
from pretrain.planning.devices import DEVICES, device_of
from pretrain.processes.errors import PeerError
from pretrain.watching.alerts import Alerts, read_webhook
from pretrain.watching.forward_clock import ForwardClock
from pretrain.watching.heartbeat import FOLDER, read_heartbeats, remove_heartbeats
from pretrain.watching.profiling import FOLDER as PROFILE_FOLDER
from pretrain.watching.profiling import Profiler
from pretrain.watching.progress import Progress
from pretrain.watching.stragglers import stragglers
from pretrain.watching.watchdog import Place, Watchdog

SETTLING_STEPS, SETTLING_STEPS_COMPILED = 1, 3
STRAGGLER_SECONDS = 60.0
"""How often rank 0 compares the ranks."""
GIB = 2**30


class Watch:
    """Hands what the training loop reports to everyone who watches.

    Args:
        setup: the launch.
        alerts: where people are told.
    """

    def __init__(self, setup: Setup, alerts: Alerts) -> None:
        config, engine = setup.config, setup.engine
        self.setup, self.alerts = setup, alerts
        self.progress = Progress(SETTLING_STEPS_COMPILED if config.train.compile else SETTLING_STEPS)
        self.clock = ForwardClock(engine.device)
        self.profiler = (
            Profiler(*setup.profile, setup.folder.path / PROFILE_FOLDER, engine.rank, setup.display.say)
            if setup.profile
            else None
        )
        self._planned: int | None = None
        self._records = 0

    def enter(self, phase: str, step: int) -> None:
        """Begin a phase of a step."""
        self.progress.enter(phase, step)
        self.clock.enter(phase, time.perf_counter())
        if self.profiler is not None:
            self.profiler.enter(phase, step)

    def memory(self) -> dict[str, int]:
        """Return the peak of this rank's device memory so far and what `aurora plan` expects; nothing on a CPU.

        Reading it does not wait for the device.
        """
        device = self.setup.engine.device
        if device.type != "cuda":
            return {}
        if self._planned is None:
            self._planned = planned_memory(self.setup)
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(device), "planned_memory_bytes": self._planned}

    def lines(self, record: dict[str, Any]) -> list[str]:
        """Return what to print once after the second step of a launch: its memory, on a GPU."""
        self._records += 1
        if self._records != 2 or "peak_memory_bytes" not in record:
            return []
        device = self.setup.engine.device
        total = torch.cuda.get_device_properties(device).total_memory
        return [
            f"memory    peak {record['peak_memory_bytes'] / GIB:.2f} of {total / GIB:.2f} GiB on {device}; "
            f"`aurora plan` expects {record['planned_memory_bytes'] / GIB:.2f} GiB without libraries and allocator"
        ]


@contextlib.contextmanager
def watching(setup: Setup) -> Iterator[Watch]:
    """Watch this rank until the block ends; a collective at its start.

    Raises:
        UserError: `watch.webhook` leads to no URL, on any rank.
    """
    config, engine, folder = setup.config, setup.engine, setup.folder.path / FOLDER
    url = engine.ranks.everywhere(lambda: read_webhook(config.watch.webhook))
    launch = engine.ranks.on_rank_0(lambda: _new_launch(setup))
    alerts = Alerts(url, config.run.name, engine.rank, lambda text: setup.display.say(f"warning: {text}"))
    watch = Watch(setup, alerts)
    remote = any(is_remote(source.path) for source in config.data.sources)
    watchdog = Watchdog(
        Place(folder, launch, engine.rank, engine.world_size),
        config.watch,
        watch.progress,
        data_seconds=60 * config.data.retry_minutes if remote else 0.0,
        forward_seconds=watch.clock.seconds,
        alert=lambda text: _alert_now(alerts, text, watch),
    )
    setup.display.on_warning = lambda text: alerts.send("warning", text, step=watch.progress.now.step)
    with contextlib.ExitStack() as opened:
        opened.callback(alerts.close)
        opened.enter_context(watchdog.watching())
        if engine.rank == 0 and engine.world_size > 1 and config.watch.straggler_factor is not None:
            opened.enter_context(_comparing(setup, watch, launch, config.watch.straggler_factor))
        try:
            yield watch
        except BaseException as error:
            if not isinstance(error, PeerError) and _is_first_to_fail(setup, launch):
                first = (str(error).strip().splitlines() or [""])[0]
                alerts.send("failed", f"{type(error).__name__}: {first}", step=watch.progress.now.step)
            raise
        finally:
            if watch.profiler is not None:
                watch.profiler.close()


def planned_memory(setup: Setup) -> int:
    """Return the bytes that `aurora plan` expects on the device of the rank that needs most."""
    engine = setup.engine
    device = device_of(torch.cuda.get_device_name(engine.device)) if engine.device.type == "cuda" else None
    return plan_run(setup.config, Cluster(engine.world_size, device or DEVICES["h100"])).memory.peak


def _new_launch(setup: Setup) -> str:
    """Name this launch; remove the heartbeats of ranks that died in an earlier one."""
    folder = setup.folder.path / FOLDER
    for claim in folder.glob("failed-*"):
        claim.unlink(missing_ok=True)
    remove_heartbeats(folder, read_heartbeats(folder))
    return uuid.uuid4().hex[:16]


def _is_first_to_fail(setup: Setup, launch: str) -> bool:
    """Whether no other rank of this launch has sent an alert about its failure: one that dies makes others fail."""
    try:
        (setup.folder.path / FOLDER / f"failed-{launch}").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return setup.engine.rank == 0
    return True


def _alert_now(alerts: Alerts, text: str, watch: Watch) -> None:
    """Send an alert before the process ends."""
    alerts.send("hang", text, step=watch.progress.now.step)
    alerts.close()


@contextlib.contextmanager
def _comparing(setup: Setup, watch: Watch, launch: str, factor: float) -> Iterator[None]:
    """Compare the ranks now and then, and warn once of each that is slow."""
    ended, known = threading.Event(), set[int]()

    def compare() -> None:
        while not ended.wait(STRAGGLER_SECONDS):
            found = stragglers(read_heartbeats(setup.folder.path / FOLDER, launch), factor)
            for rank in found.keys() - known:
                setup.display.say(f"warning: {found[rank]}")
                watch.alerts.send("straggler", found[rank], step=watch.progress.now.step)
            known.intersection_update(found)
            known.update(found)

    thread = threading.Thread(target=compare, name="stragglers", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(5)
