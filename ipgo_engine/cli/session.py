"""Everything a run needs, checked and loaded before anything is written."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from ..config import JointConfig, LoopConfig
from ..generators.base import Generator
from ..report import environment
from . import models
from .folder import ResultsFolder, check_same, plan_folder
from .inputs import Rewards, gather_prompts, load_rewards, parse_seeds
from .interrupt import Interrupt


@dataclass
class Session:
    """One command's inputs."""

    command: str
    arguments: argparse.Namespace
    config: Any
    prompts: list[str]
    seeds: list[int]
    settings: dict[str, Any]
    rewards: Rewards
    generator: Generator
    interrupt: Interrupt
    folder: ResultsFolder

    @property
    def loop(self) -> LoopConfig:
        """The settings of the loop itself."""
        return self.config.noise if isinstance(self.config, JointConfig) else self.config

    @property
    def mode(self) -> str | None:
        """Whether prompts share their tokens ("batch"); noise has no mode."""
        return getattr(self.arguments, "mode", None)

    @property
    def size(self) -> int:
        """Images at once."""
        return self.loop.micro_batch or len(self.prompts) * len(self.seeds)

    @property
    def record(self) -> dict[str, Any]:
        """What run.json says from the beginning."""
        return {
            "command": self.command,
            **self.fixed,
            "encoder": self.generator.encoder,
            "noise_shape": self.generator.noise_shape,
            "device": str(self.generator.device),
            "threads": _threads(),
            "versions": environment(),
            "stopped": "running",
        }

    @property
    def fixed(self) -> dict[str, Any]:
        """What must be equal when a run is resumed."""
        return {
            "prompts": self.prompts,
            "seeds": self.seeds,
            "mode": self.mode,
            "generator": self.settings,
            "config": self.config,
            "rewards": {key: self.rewards.names[key] for key in ("reward", "monitor")},
        }


def prepare(arguments: argparse.Namespace, config: Any) -> Session:
    """Cheap checks first, then the folder's name, then the models."""
    prompts = gather_prompts(arguments.prompts, arguments.prompts_file)
    seeds = parse_seeds(arguments.seeds)
    settings = models.model_settings(arguments)
    folder = plan_folder(arguments.out, arguments.command, resume=arguments.resume)
    models.set_threads(arguments.threads)
    device = models.choose_device(arguments.device)
    rewards = load_rewards(arguments, device)
    interrupt = Interrupt()
    generator = models.make_generator(settings, device, interrupt)
    session = Session(
        arguments.command, arguments, config, prompts, seeds, settings, rewards, generator, interrupt, folder
    )
    if folder.resumed:
        previous = folder.previous()
        check_same(previous, {"command": session.command, **session.fixed}, folder.path)
    return session


def _threads() -> int:
    import torch

    return torch.get_num_threads()
