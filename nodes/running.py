"""One long run of a node: watched, kept, cancelled and resumed the same way whatever is learned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..ipgo_engine.errors import Cancelled, InputError, IPGOError
from ..ipgo_engine.events import StepEvent
from ..ipgo_engine.optimize import Result, RunFailedError
from .host import files
from .host.interrupt import Cancellable, comfy_interrupt_as_cancelled
from .host.progress import raise_interrupt
from .host.residence import resident
from .host.watch import NodeObserver, cancelled_as_comfy_interrupt, release_memory
from .resuming import NothingMore, kept_history
from .schema import RESUME

Keep = Callable[[Result[Any]], list[Path]]


@dataclass
class Job:
    """What a run needs besides its method: rewards, where it is kept, who watches."""

    generator: Any
    reward: Any
    save_as: str
    resume: str = RESUME[0]
    monitors: Sequence[Any] = ()
    hidden: Any = None
    keep: Keep | None = None  # writes what was learned
    notes: list[str] = field(default_factory=list)  # what the user should know
    kept: list[str] = field(default_factory=list)  # what was written

    def run(
        self,
        method: Callable[..., Result[Any]],
        prompts: list[str],
        config: Any,
        finish: Callable[[Result[Any]], Any],
        **options: Any,
    ) -> tuple[Result[Any], Any]:
        """The result and what `finish` made of it inside the session; keeps the best so far on Cancel and on failure.

        Cancel ends in ComfyUI's own interrupt, a failure in one error that says where the best so far is.
        """
        require_matplotlib()
        state = files.state_file(self.save_as)
        taken = self._taken(state)
        observer = (NodeObserver if taken is None else NothingMore)(getattr(self.hidden, "unique_id", None))
        with cancelled_as_comfy_interrupt(), resident([self.reward, *self.monitors]), self.generator:
            try:
                result = method(
                    self.generator, Cancellable(self.reward), prompts, config, observer,
                    monitors=[*map(Cancellable, self.monitors)], state_file=state,
                    resume=self.resume != RESUME[0], **options,
                )  # fmt: skip
            except RunFailedError as error:
                self._keep(error.result)
                self._fail(str(error), error, error.result)
            except IPGOError:
                release_memory()
                raise
            self.notes += observer.messages
            self._keep(result)
            if taken is not None:
                result = replace(result, stopped="the best so far", history=taken)
            if result.stopped == "cancelled":
                self._cancel(result)
            with self.keeping(result):
                return result, finish(result)

    @contextmanager
    def keeping(self, result: Result[Any]) -> Iterator[None]:
        """For what comes after the last step: Cancel and failures in it keep the best as those in the run do."""
        try:
            with comfy_interrupt_as_cancelled():
                yield
        except Cancelled:
            self._cancel(result)
        except Exception as error:
            self._fail(f"The run is through, but its final images failed: {error}", error, result)

    def _taken(self, state: Path) -> list[StepEvent] | None:
        """The history of what is only given out; None for a run that goes on."""
        if self.resume != RESUME[2]:
            return None
        if not state.is_file():
            raise InputError(
                f"resume is '{RESUME[2]}', but there is no run called {self.save_as!r} ({files.shown(state)} is "
                f"missing): run it first with '{RESUME[0]}'."
            )
        return kept_history(state)

    def _keep(self, result: Result[Any]) -> None:
        """Write what was learned."""
        keep = self.keep
        if keep is not None:
            self._write(lambda: keep(result))

    def _keep_pictures(self, result: Result[Any]) -> None:
        hidden = getattr(self.hidden, "prompt", None), getattr(self.hidden, "extra_pnginfo", None)
        self._write(lambda: files.save_images(result.image, self.save_as, *hidden))

    def _write(self, write: Callable[[], list[Path]]) -> None:
        """A full disk costs the file, not the run."""
        try:
            self.kept += [f"Kept: {files.shown(path)}" for path in write()]
        except (IPGOError, OSError) as error:
            self.kept.append(f"Not kept: {error}")

    def _cancel(self, result: Result[Any]) -> None:
        """Cancelled: the pictures of the best go to the output folder, then the prompt ends as ComfyUI expects."""
        self._keep_pictures(result)
        logging.info("IPGO: cancelled; the best so far is kept. %s", "; ".join(self.kept))
        raise_interrupt()

    def _fail(self, message: str, error: Exception, result: Result[Any]) -> NoReturn:
        """One error that names the reason and where the best so far is; frames that hold memory are let go."""
        logging.warning("IPGO: the run failed", exc_info=error)
        self._keep_pictures(result)
        error.__cause__ = error.__context__ = error.__traceback__ = None
        release_memory()
        raise IPGOError(
            f"{message.rstrip('.')}. The best so far is not lost. {'; '.join(self.kept)}. With resume set to "
            f"'{RESUME[2]}' this node gives it out."
        ) from None


def require_matplotlib() -> None:
    """The one package that ComfyUI does not bring along: better missed now than when the curve is drawn."""
    if find_spec("matplotlib") is None:
        raise IPGOError("matplotlib is missing: run `pip install -r requirements.txt` in the folder of this node pack.")


def lines(text: str, name: str = "prompt") -> list[str]:
    """One prompt per line that is not blank."""
    found = [line.strip() for line in text.split("\n") if line.strip()]  # not splitlines: it breaks inside lines too
    if not found:
        raise InputError(f"{name} is empty: write at least one.")
    return found


def for_every_image(prompts: list[str], count: int, counted: str = "") -> list[str]:
    """One prompt per image; a single one serves all. `counted` is the input that says how many images there are."""
    if len(prompts) == 1:
        return prompts * count
    if len(prompts) != count:
        images = f"{count} image(s){f' ({counted})' if counted else ''}"
        raise InputError(f"prompt has {len(prompts)} lines for {images}: write one line, or one for each image.")
    return prompts


def seeds_from(seed: int, count: int) -> tuple[int, ...]:
    """`count` seeds that follow one another."""
    return tuple((seed + i) % 2**64 for i in range(count))


def or_none(value: Any) -> Any:
    """None for a widget at 0."""
    return value or None


def shared_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The engine's settings from the widgets of `schema.gradient_inputs` and `schema.watching_inputs`."""
    return {
        "backprop_steps": or_none(settings["backprop_steps"]),
        "gradient": settings["gradient"],
        "perturbations": settings["perturbations"],
        "perturbation_scale": settings["perturbation_scale"],
        "checkpoint": settings["save_memory"],
        "preview_every": settings["preview_every"],
        "monitor_every": settings["monitor_every"],
        "patience": or_none(settings["patience"]),
    }


def monitors_of(settings: dict[str, Any]) -> list[Any]:
    """The held-out rewards that are connected."""
    return [settings[name] for name in ("monitor_1", "monitor_2") if settings.get(name) is not None]


def to_comfy(images: Tensor) -> Tensor:
    """IMAGE (B, H, W, 3) from (B, 3, H, W)."""
    return images.detach().float().cpu().movedim(1, -1).contiguous()


def from_comfy(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] from IMAGE, as a tensor of its own; a fourth channel is dropped."""
    with torch.inference_mode(False):
        return images[..., :3].clone().movedim(-1, 1).float().clamp(0, 1).contiguous()
