"""The engine's observer inside a node: progress bar, live preview, log line, Cancel."""

from __future__ import annotations

import logging

import comfy.model_management
import comfy.utils

from ...ipgo_engine.events import StepEvent
from ...ipgo_engine.report import to_pil

PREVIEW_SIDE = 512


class NodeProgress:
    """Implements `ipgo_engine.events.Observer` for the node that is running."""

    def __init__(self, total: int) -> None:
        self._bar = comfy.utils.ProgressBar(total)
        self._interrupted = False
        self.messages: list[str] = []

    def on_step(self, event: StepEvent) -> None:
        """Move the bar, show the first image; the interrupt that core raises from here ends the run like any other."""
        preview = None
        if event.images is not None and len(event.images):
            preview = ("JPEG", to_pil(event.images[0]), PREVIEW_SIDE)
        try:
            self._bar.update_absolute(event.step, event.total, preview)
        except comfy.model_management.InterruptProcessingException:
            self._interrupted = True
        logging.info("step %d of %d: reward %.4f, best %.4f", event.step, event.total, event.reward, event.best)

    def on_message(self, message: str) -> None:
        """Log it and keep it for the report."""
        logging.info(message)
        self.messages.append(message)

    def cancelled(self) -> bool:
        """True once Cancel was pressed."""
        return self._interrupted or comfy.model_management.processing_interrupted()


def raise_interrupt() -> None:
    """End the node as ComfyUI expects a cancelled node to end, after what was learned is saved."""
    comfy.model_management.interrupt_current_processing(False)
    raise comfy.model_management.InterruptProcessingException
