"""What the demo has planned, uses and found: the steps fill it, the page shows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..generators.base import Generator
from ..rewards import Reward
from .folder import ResultsFolder
from .interrupt import Interrupt


@dataclass(frozen=True)
class Plan:
    """How much the demo does. Measured so that the optimization takes under four minutes on two CPU cores."""

    prompts: tuple[str, ...] = ("tree", "fish", "elephant", "soccer ball")  # the model draws them poorly: room to gain
    hacked: str = "black cat"  # brightened until it is a cat no more (noise paper, section 3)
    steps: int = 8
    epochs: int = 10
    iterations: int = 20
    hack_iterations: int = 20
    best_of: int | None = None  # None: as many images as cost the same as one noise run


QUICK = Plan(prompts=("red heart",), steps=2, epochs=2, iterations=2, hack_iterations=2, best_of=3)


@dataclass
class Trial:
    """One method on some prompts; rows are images."""

    key: str
    title: str
    reward: Reward
    prompts: list[str]
    before: Tensor
    after: Tensor
    history: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = "finished"
    seconds: float = 0.0


@dataclass
class Demo:
    """What every step of the demo uses."""

    plan: Plan
    seed: int
    settings: dict[str, Any]
    generator: Generator
    target: Reward
    judge: Reward
    interrupt: Interrupt
    folder: ResultsFolder
    configs: dict[str, Any] = field(default_factory=dict)
    trials: list[Trial] = field(default_factory=list)

    @property
    def monitors(self) -> list[Reward]:
        """The held-out reward."""
        return [self.judge]
