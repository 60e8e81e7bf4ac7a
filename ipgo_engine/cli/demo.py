"""`demo`: every method once on the embedded demo model, with an index page that says what to look at."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from ..config import NoiseConfig, OptimizeConfig, TokenConfig
from ..errors import Cancelled, InputError, IPGOError
from ..formats.noise import write_noise
from ..noise import CHANNEL_DIM, NoiseRegularizer
from ..optimize import Result, optimize_noise, train_tokens
from ..report import environment, slug
from ..rewards import Reward, load
from . import models
from .demo_page import write_page
from .demo_trials import QUICK, Demo, Plan, Trial
from .evaluate import best_of, images_at_equal_cost, rate, render
from .folder import plan_folder
from .interrupt import Interrupt
from .progress import Progress

TOKEN_RATE = 2e-2  # twenty times the paper's ...
NOISE_RATE = 1e-1  # ... and ten times: a demonstration has few updates
NOISE_STEPS = 3  # the noise's K: at equal cost better on this model than gradients through all steps


def run(arguments: argparse.Namespace) -> int:
    """`ipgo demo`."""
    from . import INTERRUPTED

    demo, record = _prepare(arguments)
    started, stopped = time.time(), "finished"
    with demo.interrupt, demo.folder.writing(record):
        for step in (_tokens, _noise, _best_of_n, _hack):
            if demo.interrupt.requested:
                break
            try:
                step(demo)
            except IPGOError as error:
                if not demo.trials:
                    raise
                if not isinstance(error, Cancelled):
                    stopped = f"failed: {error}"
                    print(f"ipgo: {error}", file=sys.stderr)
                break
        if demo.interrupt.requested:
            stopped = "cancelled"
        record |= {"seconds": time.time() - started, "config": demo.configs, "stopped": stopped}
        print(write_page(demo, record))
    if stopped == "cancelled":
        return INTERRUPTED
    return 0 if stopped == "finished" else 1


def _prepare(arguments: argparse.Namespace) -> tuple[Demo, dict[str, Any]]:
    plan = QUICK if arguments.quick else Plan()
    if not 0 <= arguments.seed < 1 << 62:
        raise InputError(f"seed is {arguments.seed}: use 0 or a positive number below 2^62.")
    folder = plan_folder(arguments.out, "demo")
    models.set_threads(arguments.threads)
    device = models.choose_device(arguments.device)
    interrupt = Interrupt()
    settings: dict[str, Any] = {
        "model": "demo",
        "sampler": "ddim",
        "eta": 0.0,
        "steps": plan.steps,
        "guidance_scale": models.demo_cfg(),
        **{name: getattr(arguments, name) or models.SETTINGS[name].default for name in ("dtype", "autocast")},
    }
    models.check_precision(settings["dtype"], settings["autocast"])
    generator = models.make_generator(settings, device, interrupt)
    target, judge = load("demo-clip", None, device), load("demo-judge", None, device)
    record: dict[str, Any] = {
        "command": "demo",
        "plan": asdict(plan),
        "seed": arguments.seed,
        "generator": settings,
        "encoder": generator.encoder,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": environment(),
        "stopped": "running",
    }
    return Demo(plan, arguments.seed, settings, generator, target, judge, interrupt, folder), record


# -- the steps --------------------------------------------------------------------------------------------------------


def _tokens(demo: Demo) -> None:
    """IPGO, one set of tokens per prompt.

    The paper's tokens, but gradients through every model step and a larger learning rate: this model has eight
    steps that each do a lot, and the last one alone (the paper's K = 1) hardly moves the picture.
    """
    config = OptimizeConfig(
        tokens=TokenConfig(basis_size=min(30, demo.generator.dim)),
        epochs=demo.plan.epochs,
        learning_rate=TOKEN_RATE,
        backprop_steps=None,
        seeds=(demo.seed,),
        monitor_every=2,
        checkpoint=False,
    )
    demo.configs["tokens"] = config
    results: list[Result[Any]] = []
    trouble: IPGOError | None = None
    for prompt in demo.plan.prompts:
        call: Callable[[Progress], Result[Any]] = lambda progress, prompt=prompt: train_tokens(  # noqa: E731
            demo.generator, demo.target, [prompt], config, progress, monitors=demo.monitors
        )
        try:
            result = _watched(demo, f"tokens: {prompt}", call)
        except IPGOError as error:
            if not results:
                raise
            trouble = error  # the prompts before this one are shown first
            break
        result.best.save(demo.folder / f"tokens-{slug(prompt)}.safetensors", preset="demo")
        results.append(result)
        if demo.interrupt.requested:
            break
    trial = _trial(demo, "tokens", "IPGO tokens", demo.target, results)
    for record, result in zip(trial.records, results, strict=True):
        record["fresh raw"], record["fresh"] = _fresh(demo, record["prompt"], result)
    if trouble is not None:
        raise trouble


def _noise(demo: Demo) -> None:
    """Noise with the regularizer and, at the same learning rate, without."""
    base = _noise_config(demo.plan.iterations)
    for key, title, config in (
        ("noise", "noise, regularized", base),
        ("noise-free", "noise, not regularized", replace(base, regularization=0.0)),
    ):
        demo.configs[key] = config
        prompts = list(demo.plan.prompts)
        result = _watched(demo, title, _noise_call(demo, demo.target, prompts, config))
        _trial(demo, key, title, demo.target, [result])
        if key == "noise":
            seeds = [demo.seed] * len(prompts)
            labels = {"prompts": prompts, "seeds": seeds, "encoder": demo.generator.encoder}
            labels["run"] = {"generator": demo.settings}
            write_noise(demo.folder / "noise.safetensors", result.best, **labels)
        if demo.interrupt.requested:
            return


def _best_of_n(demo: Demo) -> None:
    """The cheap rival: as many random seeds as the noise run cost model evaluations."""
    noise = next(trial for trial in demo.trials if trial.key == "noise")
    history, config = noise.history[noise.title], demo.configs["noise"]
    count = demo.plan.best_of or images_at_equal_cost(config, history, demo.generator.steps)
    from tqdm import tqdm

    winners, started = [], time.perf_counter()
    size = 8
    with tqdm(total=count * len(demo.plan.prompts), desc=f"best of {count}", unit="image", file=sys.stderr) as bar:
        for prompt in demo.plan.prompts:
            tick: Callable[[], object] = lambda: bar.update(size)  # noqa: E731
            winners.append(best_of(demo.generator, demo.target, prompt, count, size, tick)[0])
            bar.n = count * len(winners)
            bar.refresh()
    title = f"best of {count} seeds"
    trial = Trial("best-of", title, demo.target, list(demo.plan.prompts), noise.before, torch.stack(winners))
    trial.seconds = time.perf_counter() - started
    _score(demo, trial)


def _hack(demo: Demo) -> None:
    """Brightness as the reward of something black: P(z) tells the cheat from the find (noise paper, section 3)."""
    bright = load("brightness")
    base = _noise_config(demo.plan.hack_iterations)
    for key, title, config in (
        ("bright", "regularized", base),
        ("bright-free", "not regularized", replace(base, regularization=0.0)),
    ):
        demo.configs[key] = config
        result = _watched(demo, f"brightness, {title}", _noise_call(demo, bright, [demo.plan.hacked], config))
        _trial(demo, key, title, bright, [result])
        if demo.interrupt.requested:
            return


def _noise_config(iterations: int) -> NoiseConfig:
    return NoiseConfig(
        iterations=iterations,
        learning_rate=NOISE_RATE,
        backprop_steps=NOISE_STEPS,
        monitor_every=2,
        checkpoint=False,
    )


def _noise_call(
    demo: Demo, reward: Reward, prompts: Sequence[str], config: NoiseConfig
) -> Callable[[Progress], Result[Any]]:
    seeds = [demo.seed] * len(prompts)
    return lambda progress: optimize_noise(
        demo.generator, reward, prompts, config, progress, seeds=seeds, monitors=demo.monitors
    )


def _watched(demo: Demo, label: str, call: Callable[[Progress], Result[Any]]) -> Result[Any]:
    progress = Progress(label, demo.interrupt)
    try:
        return call(progress)
    finally:
        progress.close()


# -- numbers ----------------------------------------------------------------------------------------------------------


def _trial(demo: Demo, key: str, title: str, reward: Reward, results: Sequence[Result[Any]]) -> Trial:
    """Pictures and scores of one method; several results are several prompts."""
    prompts = [prompt for result in results for prompt in result.prompts]
    before, after = torch.cat([r.start_image for r in results]), torch.cat([r.image for r in results])
    trial = Trial(key, title, reward, prompts, before, after)
    trial.history = {(title if len(results) == 1 else r.prompts[0]): r.history for r in results}
    trial.stopped = results[-1].stopped
    trial.seconds = sum(event.seconds for r in results for event in r.history)
    _score(demo, trial)
    probability = [r.probability for r in results]
    if all(p is not None for p in probability):
        raw = NoiseRegularizer().measure(demo.generator.draw_noise([demo.seed]), CHANNEL_DIM)[1]
        for record, value in zip(trial.records, torch.cat([p for p in probability if p is not None]), strict=True):
            record.update({"P(z) raw": float(raw[0]), "P(z)": float(value)})
    return trial


def _score(demo: Demo, trial: Trial) -> None:
    """Fill the trial's records and add it to the demo."""
    device = demo.generator.device
    columns = {
        "raw": rate(trial.reward, trial.before, trial.prompts, device),
        "best": rate(trial.reward, trial.after, trial.prompts, device),
        "held-out raw": rate(demo.judge, trial.before, trial.prompts, device),
        "held-out best": rate(demo.judge, trial.after, trial.prompts, device),
    }
    for i, prompt in enumerate(trial.prompts):
        numbers = {name: values[i] for name, values in columns.items()}
        trial.records.append({"method": trial.title, "reward": trial.reward.name, "prompt": prompt, **numbers})
    demo.trials.append(trial)


def _fresh(demo: Demo, prompt: str, result: Result[Any]) -> tuple[float | None, float | None]:
    """Raw prompt and tokens on seeds that nothing was learned with: means."""
    seeds = [demo.seed + 1 + i for i in range(4)]
    prompts = [prompt] * len(seeds)
    try:
        raw = render(demo.generator, prompts, seeds)
        learned = render(demo.generator, prompts, seeds, tokens=result.best)
    except Cancelled:
        return None, None
    scores = [rate(demo.target, images, prompts, demo.generator.device) for images in (raw, learned)]
    return statistics.fmean(scores[0]), statistics.fmean(scores[1])
