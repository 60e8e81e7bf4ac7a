"""What a run shows besides the progress bar: all its pictures at once, and its numbers under the node."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.utils
from torch import Tensor

from ...ipgo_engine.errors import Cancelled
from ...ipgo_engine.events import StepEvent
from ...ipgo_engine.generators.base import Conditioning
from ...ipgo_engine.report import Tile, contact_sheet, from_pil
from .handover import render
from .progress import NodeProgress, raise_interrupt

SHOWN = 9  # pictures of one preview


class NodeObserver(NodeProgress):
    """The engine's observer for one node; every call comes from the thread that executes it."""

    def __init__(self, node_id: str | None = None) -> None:
        super().__init__(1)
        self._node_id = node_id

    def on_step(self, event: StepEvent) -> None:
        """Move the bar, show the pictures and the numbers."""
        pictures = event.images
        super().on_step(event if pictures is None else replace(event, images=together(pictures)))
        show_text(step_text(event), self._node_id)


class Transfer:
    """Watches a download: its text under the node, a bar in MB, Cancel at every piece."""

    def __init__(self, node_id: str | None = None) -> None:
        self._node_id, self._bar, self.text = node_id, comfy.utils.ProgressBar(1), ""

    def report(self, message: str) -> None:
        """One more line."""
        self.text = "\n".join(filter(None, (self.text, message)))
        show_text(self.text, self._node_id)

    def progress(self, item: Any, done: int, total: int | None) -> None:
        """Move the bar; the interrupt leaves what was fetched, to go on from."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(done // 10**6, max(1, (total or done) // 10**6))


def show_text(text: str, node_id: str | None) -> None:
    """Text under the node, where this release shows some."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None and node_id is not None and hasattr(server, "send_progress_text"):
        server.send_progress_text(text, node_id)


def step_text(event: StepEvent) -> str:
    """One line: reward, best, P(z) and held-out rewards."""
    parts = [f"step {event.step}/{event.total}", f"reward {event.reward:.4g}", f"best {event.best:.4g}"]
    if event.probability is not None:
        parts.append(f"P(z) {event.probability:.2g}")
    parts += [f"{name} (held out) {value:.4g}" for name, value in event.monitors.items()]
    return " | ".join(parts)


def together(images: Tensor) -> Tensor:
    """One picture (1, 3, H, W) of several, side by side; a single one as it is."""
    if len(images) == 1:
        return images
    return from_pil(contact_sheet([Tile(image) for image in images[:SHOWN].detach().cpu()], columns=3))


@contextmanager
def cancelled_as_comfy_interrupt() -> Iterator[None]:
    """Turn the engine's `Cancelled` into ComfyUI's own interrupt, which its queue understands."""
    try:
        yield
    except Cancelled:
        raise_interrupt()


def final_images(generator: Any, conditioning: Conditioning, noise: Tensor) -> Tensor:
    """Images (B, 3, H, W) on the CPU, made by the user's own MODEL and VAE as stock nodes make them."""
    return render(generator, conditioning, noise)[0].cpu()


def release_memory() -> None:
    """Give cached memory back after a run that broke down."""
    comfy.model_management.cleanup_models_gc()
    comfy.model_management.soft_empty_cache()
