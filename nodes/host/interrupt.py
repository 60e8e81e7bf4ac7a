"""Cancel: ComfyUI's interrupt as the engine's `Cancelled`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
from torch import Tensor

from ...ipgo_engine.errors import Cancelled


def poll_interrupt() -> None:
    """Raise `Cancelled` when the user pressed Cancel; ComfyUI's own exception is its cause."""
    try:
        comfy.model_management.throw_exception_if_processing_interrupted()
    except comfy.model_management.InterruptProcessingException as interrupt:
        raise Cancelled("The run was cancelled.") from interrupt


@contextmanager
def comfy_interrupt_as_cancelled() -> Iterator[None]:
    """Turn ComfyUI's interrupt, raised anywhere inside, into `Cancelled`."""
    try:
        yield
    except comfy.model_management.InterruptProcessingException as interrupt:
        raise Cancelled("The run was cancelled.") from interrupt


class Cancellable:
    """A reward during a run: Cancel that it notices itself, as one that samples does, ends the run like any other."""

    def __init__(self, reward: Any) -> None:
        self._reward = reward

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reward, name)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of the reward."""
        with comfy_interrupt_as_cancelled():
            return self._reward.score(images, prompts)
