"""Whether and how a run goes on from what was kept of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..ipgo_engine.errors import InputError
from ..ipgo_engine.events import StepEvent
from ..ipgo_engine.formats.state import read_state
from ..ipgo_engine.loop import spread
from .host import files
from .host.fingerprint import fingerprint
from .host.watch import NodeObserver
from .schema import RESUME

SAMPLING = ("seed", "steps", "cfg", "sampler_name", "scheduler", "denoise", "width", "height", "negative")
PATCHES_READ = 8


class NothingMore(NodeObserver):
    """Ends a resumed run before its first step: the best that was kept is handed out as it is."""

    def cancelled(self) -> bool:
        """At once."""
        return True


def pin(generator: Any, settings: dict[str, Any], **given: Any) -> None:
    """Add to the generator's own settings whatever else decides a picture: a run is resumed only with the same."""
    generator.settings |= {key: settings[key] for key in SAMPLING if key in settings}
    generator.settings |= {key: fingerprint(value) for key, value in given.items()}
    generator.settings |= {
        "model_weights": weights_fingerprint(generator.model),
        "vae_weights": weights_fingerprint(generator.vae.patcher),
    }


def weights_fingerprint(patcher: Any) -> str:
    """Of weights without their patches, of where patches are and how strong, and of what a few of them hold.

    The weights read are the vectors: small, hardly ever quantized, and changed by every kind of fine-tuning.
    """
    named = [(name, weight) for name, weight in patcher.model.named_parameters() if weight.ndim == 1]
    bare = {name: patcher.backup[name].weight if name in patcher.backup else weight for name, weight in named}
    patches = sorted(patcher.patches.items())
    strengths = {key: [(strength, kept) for strength, _, kept, *_ in parts] for key, parts in patches}
    chosen = [patches[i][1] for i in spread(len(patches), PATCHES_READ)]
    held = [getattr(part[1], "weights", part[1]) for parts in chosen for part in parts]
    return fingerprint([{name: value for name, value in bare.items() if not value.is_meta}, strengths, held])


def kept_history(state: Path) -> list[StepEvent]:
    """Every step that is kept; a run that goes on forgets the last one, because it does that again."""
    return [StepEvent(**event) for event in read_state(state)["history"]]


def kept_version(save_as: str | None, resume: str | None, **_: Any) -> Any:
    """For `fingerprint_inputs`: changes with what is kept under the name, where a run depends on it.

    ComfyUI gives None for a linked input; not a number means that nothing is known, and the node runs.
    """
    if resume == RESUME[0]:
        return resume
    if save_as is None or resume is None:
        return math.nan
    try:
        state = read_state(files.state_file(save_as))
    except InputError:
        return math.nan
    return fingerprint([state["update"], state["best"]])
