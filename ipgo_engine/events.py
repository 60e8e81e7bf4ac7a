"""What a run tells the outside world while it works: progress, previews, messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class StepEvent:
    """One finished step of the loop. Rewards are raw scores, higher is better, regularizers excluded."""

    step: int  # 0 to total: how many updates the parameters have seen
    total: int
    reward: float  # mean over the images of this step
    best: float  # best reward so far, same mean
    penalty: float = 0.0  # what the regularizers added to the loss
    probability: float | None = None  # smallest P(z) of eq. 8 over the images; None without a noise regularizer
    gradient_norm: float = 0.0  # before clipping
    monitors: Mapping[str, float] = field(default_factory=dict)  # held-out rewards measured at this step
    seconds: float = 0.0  # wall-clock of this step
    images: Tensor | None = None  # (B, 3, H, W) in [0, 1], on the CPU; only on the steps that preview


class Observer(Protocol):
    """Receives events; every method is called on the thread that runs the loop."""

    def on_step(self, event: StepEvent) -> None:
        """Called after every step."""
        ...

    def on_message(self, message: str) -> None:
        """Called with one line of text: a warning, a back-off, the reason of an early stop."""
        ...

    def cancelled(self) -> bool:
        """Polled before every step; True ends the run, which returns the best so far."""
        ...


class Silent:
    """The observer that watches nothing."""

    def on_step(self, event: StepEvent) -> None:
        """Ignore the event."""

    def on_message(self, message: str) -> None:
        """Ignore the message."""

    def cancelled(self) -> bool:
        """Never cancel."""
        return False
