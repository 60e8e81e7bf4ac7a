"""The three methods: tokens, noise, and both together. Each sets up a problem and hands it to the one loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .config import JointConfig, LoopConfig, NoiseConfig, OptimizeConfig, seed_numbers
from .errors import IPGOError
from .events import Observer, Silent, StepEvent
from .generators.base import Generator
from .gradients import Task
from .loop import Loop
from .problems import JointProblem, NoiseProblem, Problem, TokenProblem, check_prompts, restore
from .rewards.base import Reward
from .tokens import IPGOTokens

Learned = TypeVar("Learned")


@dataclass(frozen=True)
class Result(Generic[Learned]):
    """What a run leaves behind, whether it finished, was stopped or failed.

    Tensors are on the CPU; learned tokens stay on the generator's device.
    """

    best: Learned
    """`IPGOTokens`, the noise (B, n, C, H, W), or both in a tuple."""
    image: Tensor
    """Images of the best, (B, 3, H, W) in [0, 1]: one per prompt and seed, or an even choice of at most 16 of them when
    an epoch of `train_tokens` has several updates."""
    rewards: Tensor
    """Rewards of `image`, (B,)."""
    start_image: Tensor
    """What the stock sampler makes of the raw prompts and seeds, (B, 3, H, W)."""
    start_rewards: Tensor
    """Rewards of `start_image`, (B,)."""
    prompts: list[str]
    """The prompt of every image."""
    history: list[StepEvent]
    """One event per step, without images; step 0 is the state before the first update."""
    stopped: str
    """Why the run ended: "finished", "cancelled", or what ended it early."""
    probability: Tensor | None = None
    """P(z) of the best noises, (B,)."""


class RunFailedError(IPGOError):
    """A run broke down after it had learned something: `result` holds the best so far, `__cause__` the reason."""

    def __init__(self, message: str, result: Result[Any]) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What does not change the result of a run: who watches, what is measured besides, where it is kept."""

    observer: Observer | None = None
    monitors: Sequence[Reward] = ()
    state_file: str | Path | None = None
    save_every: int = 10


def _finish(loop: Loop, best: Any) -> Result[Any]:
    """The result of a loop whose parameters were put back to the best."""
    start, found = loop.start, loop.best
    assert start is not None and found.images is not None and found.rewards is not None
    return Result(
        best=best,
        image=found.images.float(),
        rewards=found.rewards,
        start_image=start.images.float(),
        start_rewards=start.rewards,
        prompts=[loop.problem.prompts[row] for row in loop.result_rows],
        history=loop.history,
        stopped=loop.stopped,
        probability=found.probability,
    )


def _run(loop: Loop, resume: bool, learned: Callable[[], Any]) -> Result[Any]:
    """Run the loop; whatever breaks it, what was learned is returned or travels with the error."""
    if resume and loop.state_file is not None and loop.state_file.exists():
        loop.load()
    failure: Exception | None = None
    try:
        loop.run()
    except Exception as error:
        if not loop.has_best or not loop.history:
            raise
        failure, loop.stopped = error, f"failed: {error}"
    assert loop.best.state is not None
    restore(loop.problem, loop.best.state)
    result = _finish(loop, learned())
    if failure is not None:
        raise RunFailedError(f"The run failed at step {loop.update} of {loop.total}: {failure}", result) from failure
    return result


def _loop(
    generator: Generator,
    reward: Reward,
    problem: Problem,
    config: LoopConfig,
    total: int,
    options: RunOptions,
    settings: dict[str, Any],
    token_rate: float | None = None,
) -> Loop:
    task = Task(
        generator=generator,
        problem=problem,
        reward=reward,
        config=config,
        micro_batch=config.micro_batch or len(problem.prompts),
        backprop_steps=config.backprop_steps,
        checkpoint=config.checkpoint,
    )
    return Loop(
        task,
        total,
        options.observer or Silent(),
        _by_name(options.monitors),
        settings,
        None if options.state_file is None else Path(options.state_file),
        options.save_every,
        token_rate,
    )


def _by_name(monitors: Sequence[Reward]) -> dict[str, Reward]:
    """Under names of their own, in order: two CLIP models are "clip" and "clip (2)"."""
    found: dict[str, Reward] = {}
    for monitor in monitors:
        name, number = monitor.name, 1
        while name in found:
            number += 1
            name = f"{monitor.name} ({number})"
        found[name] = monitor
    return found


def train_tokens(
    generator: Generator,
    reward: Reward,
    prompts: Sequence[str],
    config: OptimizeConfig | None = None,
    observer: Observer | None = None,
    *,
    monitors: Sequence[Reward] = (),
    state_file: str | Path | None = None,
    resume: bool = False,
    save_every: int = 10,
) -> Result[IPGOTokens]:
    """Learn one set of tokens for `prompts` (IPGO, algorithm 1): one prompt, or a batch that shares the tokens.

    `monitors` are held-out rewards, measured and never optimized. With `state_file` everything needed to go on is
    written every `save_every` updates and at the end; `resume=True` goes on from it, if it exists, with the result of
    an uninterrupted run. Cancellation returns the best so far. Raises `InputError` for bad input, `NonFiniteError`
    when the first reward or gradient is not finite, `RunFailedError` with the best so far when something breaks later.
    """
    config = config or OptimizeConfig()
    options = RunOptions(observer=observer, monitors=monitors, state_file=state_file, save_every=save_every)
    with torch.inference_mode(False), torch.enable_grad():
        problem = TokenProblem(generator, prompts, config)
        total = config.epochs * problem.updates_per_epoch
        loop = _loop(generator, reward, problem, config, total, options, asdict(config))
        return _run(loop, resume, lambda: _labelled(problem.tokens, generator, reward, problem.prompts, config.seeds))


def optimize_noise(
    generator: Generator,
    reward: Reward,
    prompts: Sequence[str],
    config: NoiseConfig | None = None,
    observer: Observer | None = None,
    *,
    seeds: Sequence[int] | None = None,
    monitors: Sequence[Reward] = (),
    state_file: str | Path | None = None,
    resume: bool = False,
    save_every: int = 10,
) -> Result[Tensor]:
    """Optimize the noise of every prompt, each picture by itself (noise paper, algorithm 1 with eq. 9).

    `seeds` gives each prompt's starting noise; 0, 1, ... when left out. `result.best` is what `generator.generate`
    takes: all noises, optimized or not. Everything else is as in `train_tokens`.
    """
    config = config or NoiseConfig()
    prompts = check_prompts(prompts)
    seeds = seed_numbers(range(len(prompts)) if seeds is None else seeds)
    options = RunOptions(observer=observer, monitors=monitors, state_file=state_file, save_every=save_every)
    with torch.inference_mode(False), torch.enable_grad():
        problem = NoiseProblem(generator, prompts, seeds, config)
        settings = asdict(config) | {"start": list(seeds)}
        loop = _loop(generator, reward, problem, config, config.iterations, options, settings)
        return _run(loop, resume, problem.finished_noise)


def optimize_jointly(
    generator: Generator,
    reward: Reward,
    prompts: Sequence[str],
    config: JointConfig | None = None,
    observer: Observer | None = None,
    *,
    seeds: Sequence[int] | None = None,
    monitors: Sequence[Reward] = (),
    state_file: str | Path | None = None,
    resume: bool = False,
    save_every: int = 10,
) -> Result[tuple[IPGOTokens, Tensor]]:
    """Learn shared tokens and every picture's noise in one run; `result.best` is (tokens, noise).

    Budget, gradient and stopping rules are those of `config.noise`; `config.tokens` gives the tokens, their conformity
    and their learning rate. Everything else is as in `optimize_noise`.
    """
    config = config or JointConfig()
    prompts = check_prompts(prompts)
    seeds = seed_numbers(range(len(prompts)) if seeds is None else seeds)
    options = RunOptions(observer=observer, monitors=monitors, state_file=state_file, save_every=save_every)
    with torch.inference_mode(False), torch.enable_grad():
        problem = JointProblem(generator, prompts, seeds, config)
        settings = asdict(config) | {"start": list(seeds)}
        total, rate = config.noise.iterations, config.tokens.learning_rate
        loop = _loop(generator, reward, problem, config.noise, total, options, settings, rate)

        def learned() -> tuple[IPGOTokens, Tensor]:
            tokens = _labelled(problem.tokens, generator, reward, problem.prompts, seeds)
            return tokens, problem.noise.finished_noise()

        return _run(loop, resume, learned)


def _labelled(
    tokens: IPGOTokens, generator: Generator, reward: Reward, prompts: Sequence[str], seeds: Sequence[int]
) -> IPGOTokens:
    """The tokens, frozen, with what their file should say about them."""
    tokens.metadata.update(
        encoder=generator.encoder, prompts=list(dict.fromkeys(prompts)), reward=reward.name, seeds=list(seeds)
    )
    return tokens.requires_grad_(False)
