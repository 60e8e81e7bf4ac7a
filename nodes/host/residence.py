"""Reward models live on the CPU and visit the accelerator for as long as a run needs them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from torch import Tensor, nn

from ...ipgo_engine.rewards.base import begin_run, scores_of


@contextmanager
def resident(rewards: Iterable[Any]) -> Iterator[None]:
    """Move every reward's weights to ComfyUI's device, making room for them, and back afterwards."""
    device = comfy.model_management.get_torch_device()
    moved: list[tuple[nn.Module, torch.device]] = []
    with torch.inference_mode(False):
        try:
            for module in _modules(rewards):
                home = next(module.parameters()).device
                if home != device:
                    comfy.model_management.free_memory(_size(module), device)
                    moved.append((module, home))
                    module.to(device)
            yield
        finally:
            for module, home in moved:
                module.to(home)


def score(reward: Any, images: Tensor, prompts: list[str]) -> Tensor:
    """Scores (B,) on the CPU, one image at a time, outside inference mode (a reward remembers what it computes)."""
    device = comfy.model_management.get_torch_device()
    begin_run(reward)
    with torch.inference_mode(False), torch.no_grad(), resident([reward]):
        scores, bar = [], comfy.utils.ProgressBar(len(images))
        for image, prompt in zip(images, prompts, strict=True):
            comfy.model_management.throw_exception_if_processing_interrupted()
            scores.append(scores_of(reward, image[None].clone().float().to(device), [prompt]).cpu())
            bar.update(1)
        return torch.cat(scores)


def _modules(rewards: Iterable[Any]) -> list[nn.Module]:
    """Every network of the rewards, those inside combined rewards included, each once."""
    found: dict[int, nn.Module] = {}
    waiting = list(rewards)
    while waiting:
        reward = waiting.pop()
        waiting += [part for part, _ in getattr(reward, "parts", ())]
        module = getattr(reward, "module", None)
        if isinstance(module, nn.Module) and any(True for _ in module.parameters()):
            found[id(module)] = module
    return list(found.values())


def _size(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
