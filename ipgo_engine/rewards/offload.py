"""Running a reward on a device that has no room to keep it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .base import Reward, begin_run, scores_of, settings_of


class Offloaded:
    """A reward whose weights visit `device` for the length of one call and rest in main memory otherwise.

    Score and gradient with respect to the pixels are computed in the same visit, so neither weights nor activations of
    the reward are on the device while the generator runs forward or backward. The cost is one copy of the weights to
    the device per call (their bytes divided by the speed of the bus) and none back, because frozen weights do not
    change. A call costs one forward and, when a gradient is wanted, one backward: no more than without offloading.

    It has no attribute `module` of its own, so that a host which moves the weights of rewards leaves these where they
    rest. Needs a score that depends on its own image only, as every reward here; gradients of gradients are not
    available.
    """

    def __init__(self, reward: Reward, device: str | torch.device | None = None) -> None:
        """`reward` must hold its weights in an attribute `module` (every model of `rewards.load` does).

        `device` is where they visit; None is wherever the images of a call are.
        """
        module = getattr(reward, "module", None)
        if not isinstance(module, nn.Module):
            raise InputError(f"reward {reward.name!r} has no weights to offload: use it as it is.")
        self.reward = reward
        self.device = None if device is None else torch.device(device)
        self._weights = module

    @property
    def name(self) -> str:
        """That of the reward."""
        return self.reward.name

    @property
    def score_settings(self) -> dict[str, Any]:
        """Those of the reward: where its weights rest changes no score."""
        return settings_of(self.reward)

    @property
    def differentiable(self) -> bool:
        """As the reward."""
        return self.reward.differentiable

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) of the reward, with their gradient."""
        wanted = torch.is_grad_enabled() and images.requires_grad and self.differentiable
        if wanted:
            return _ScoreNow.apply(images, self, prompts)  # pyright: ignore[reportReturnType]
        with self.visiting(self.device or images.device), torch.no_grad():
            return scores_of(self.reward, images, prompts)

    def begin_run(self) -> None:
        """Passed on to the reward."""
        begin_run(self.reward)

    @contextmanager
    def visiting(self, device: torch.device) -> Iterator[None]:
        """The weights are on the device inside, and back where they rested afterwards."""
        resting = [(part, name, tensor) for part in self._weights.modules() for name, tensor in _own(part)]
        visitors: dict[int, Tensor] = {}  # a weight that two places share is copied once
        try:
            # Whole tensors change places, not their data: that cannot change to every kind of device.
            for part, name, tensor in resting:
                if id(tensor) not in visitors:
                    visitors[id(tensor)] = _on(tensor, device)
                setattr(part, name, visitors[id(tensor)])
            yield
        finally:
            for part, name, tensor in resting:
                setattr(part, name, tensor)


class _ScoreNow(torch.autograd.Function):
    """Scores and their gradients, computed together; backward only multiplies."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, offloaded: Offloaded, prompts: Sequence[str]) -> Tensor:
        with offloaded.visiting(offloaded.device or images.device), torch.enable_grad():
            pixels = images.detach().requires_grad_()
            scores = scores_of(offloaded.reward, pixels, prompts)
            (gradient,) = torch.autograd.grad(scores.sum(), pixels)
        ctx.save_for_backward(gradient)
        return scores.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.device).view(-1, 1, 1, 1), None, None


def _own(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights and buffers of a module without those of the modules in it, by name."""
    yield from part.named_parameters(recurse=False, remove_duplicate=False)
    yield from part.named_buffers(recurse=False, remove_duplicate=False)


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    """The same kind of tensor elsewhere: a module takes only parameters in place of its parameters."""
    moved = tensor.detach().to(device, non_blocking=True)
    return nn.Parameter(moved, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
