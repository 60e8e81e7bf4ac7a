"""Several training loops in one process, one iteration of each at a time: fair times on a machine that is not idle."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


class Calls:
    """Counts forwards and backwards of the UNet and of the VAE's decoder, in images (guidance's second row is free)."""

    NAMES: tuple[str, ...] = ("UNet forwards", "UNet backwards", "VAE forwards", "VAE backwards")

    def __init__(self, pipeline: Any) -> None:
        self.counts: dict[str, float] = dict.fromkeys(self.NAMES, 0.0)
        self._watch(pipeline.unet, "UNet", 2)
        self._watch(pipeline.vae.decoder, "VAE", 1)

    def _watch(self, module: torch.nn.Module, name: str, rows: int) -> None:
        def backward(share: float) -> Callable[[Any], None]:
            def add(_: Any) -> None:
                self.counts[f"{name} backwards"] += share

            return add

        def forward(_: Any, __: Any, output: Any) -> None:
            found = output if isinstance(output, torch.Tensor) else output[0]
            share = found.shape[0] / rows
            self.counts[f"{name} forwards"] += share
            if found.requires_grad:
                found.register_hook(backward(share))

        module.register_forward_hook(forward)

    def take(self) -> dict[str, float]:
        """Counts since the last call."""
        taken, self.counts = self.counts, dict.fromkeys(self.NAMES, 0.0)
        return taken


class Memory:
    """Peak memory in MiB above what was in use at the start: the allocator's on CUDA, the process's own on Linux."""

    def __init__(self, device: str) -> None:
        self.cuda, self.before = device.startswith("cuda"), 0.0

    def start(self) -> None:
        """Forget earlier peaks."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        elif sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.before = self._status("VmRSS")

    def peak(self) -> float:
        """MiB; NaN where nothing can be measured."""
        if self.cuda:
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() / 2**20 - self.before
        return self._status("VmHWM") - self.before if sys.platform == "linux" else float("nan")

    @staticmethod
    def _status(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def clock(device: str) -> float:
    """Seconds of the wall on CUDA; of processor time on a CPU, where other programs take turns with this one."""
    return time.perf_counter() if device.startswith("cuda") else time.process_time()


@dataclass
class Record:
    """What every iteration of one loop took."""

    seconds: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    calls: list[dict[str, float]] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Medians; the first iteration is left out (caches, and what only happens once)."""
        late = slice(1, None) if len(self.seconds) > 1 else slice(None)
        return {
            "seconds": statistics.median(self.seconds[late]),
            "peak MiB": statistics.median(self.peaks[late]),
            "calls": self.calls[-1],
            "all seconds": self.seconds,
        }


Loop = Callable[[Callable[[], None]], None]


class Turns:
    """Runs loops in threads of which exactly one is awake; each calls `done()` at the end of an iteration."""

    def __init__(self, calls: Calls, device: str) -> None:
        self.calls, self.memory, self.device = calls, Memory(device), device
        self._failure: BaseException | None = None

    def run(self, loops: dict[str, Loop]) -> dict[str, Record]:
        """Records by name. The first error ends all of them and is raised here."""
        self.names, self.turn, self.alive = list(loops), 0, set(range(len(loops)))
        self.records = {name: Record() for name in loops}
        self.condition, self.started = threading.Condition(), 0.0
        threads = [threading.Thread(target=self._work, args=(i, loop)) for i, loop in enumerate(loops.values())]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failure is not None:
            raise self._failure
        return self.records

    def _work(self, index: int, loop: Loop) -> None:
        try:
            self._wait(index)
            loop(lambda: self._done(index))
        except BaseException as error:
            self._failure = self._failure or error
        with self.condition:
            self.alive.discard(index)
            self._pass_on()

    def _done(self, index: int) -> None:
        record = self.records[self.names[index]]
        peak = self.memory.peak()  # waits for the device
        record.seconds.append(clock(self.device) - self.started)
        record.peaks.append(peak)
        record.calls.append(self.calls.take())
        with self.condition:
            self._pass_on()
        self._wait(index)

    def _pass_on(self) -> None:
        count = len(self.names)
        following = [(self.turn + step) % count for step in range(1, count + 1)]
        self.turn = next((i for i in following if i in self.alive), -1)
        self.condition.notify_all()

    def _wait(self, index: int) -> None:
        with self.condition:
            self.condition.wait_for(lambda: self.turn == index)
        if self._failure is not None:
            raise RuntimeError("another loop failed")
        self.calls.take()
        self.memory.start()
        self.started = clock(self.device)
