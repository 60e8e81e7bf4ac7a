"""The one contract every reward keeps (DESIGN section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..generators.identity import describe_weights


@runtime_checkable
class Reward(Protocol):
    """Scores images; other packs may pass any object with these three members."""

    @property
    def name(self) -> str:
        """What tables and files call it."""
        ...

    @property
    def differentiable(self) -> bool:
        """True when autograd reaches the pixels."""
        ...

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Raw scores (B,), float32, higher is better, for images (B, 3, H, W) float in [0, 1] and B prompts."""
        ...


def scores_of(reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The reward's scores (B,), float32, on the images' device.

    Raises `InputError` for anything else: a (B, 1) would silently become (B, B) in a sum, a single number would be
    taken for every image's.
    """
    found = reward.score(images, prompts)
    if not isinstance(found, Tensor) or found.shape != images.shape[:1]:
        what = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise InputError(
            f"reward {reward.name!r} returned {what} for {len(images)} image(s): score must return a tensor of shape "
            f"({len(images)},), one number per image."
        )
    return found.to(images.device, torch.float32)


def begin_run(*rewards: Reward) -> None:
    """Tell every reward that has a method `begin_run` that a run begins: one with a budget counts anew."""
    for reward in rewards:
        getattr(reward, "begin_run", _nothing)()


def settings_of(reward: Reward) -> dict[str, Any]:
    """What decides the scores besides the name, as JSON: its own `score_settings`, otherwise its weights."""
    if (settings := getattr(reward, "score_settings", None)) is not None:
        return settings
    module = getattr(reward, "module", None)
    return {"weights": describe_weights(module.named_parameters())} if isinstance(module, nn.Module) else {}


def _nothing() -> None:
    """What most rewards do when a run begins."""
