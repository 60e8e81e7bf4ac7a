"""Tokens and noise driven by each kind of reward, with curves: small CLIP, aesthetic, a sum, JPEG size, a judge.

    python -m benchmarks.reward_runs --out results/rewards --head FILE

The aesthetic score has the published head (`--head`, its .pth file) on a CLIP with random weights, so its numbers mean
nothing beyond "it was climbed". The judge is an endpoint on this machine that answers with a picture's brightness.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import add_generator_options, add_reward_options, make_generator, parse, write_table
from ipgo_engine import NoiseConfig, OptimizeConfig, TokenConfig, optimize_noise, rewards, train_tokens
from ipgo_engine.report import draw_curves, save_figure
from ipgo_engine.rewards.judge import Judge, JudgeConfig
from ipgo_engine.rewards.text import CLIP_L_FOLDER
from tests.engine.rewards import tiny
from tests.engine.rewards.conftest import serving
from tests.engine.rewards.test_judge import Endpoint

BLACK_BOX = {"gradient": "hybrid-noise"}


def make_rewards(options: argparse.Namespace, root: Path, judge_url: str) -> dict[str, rewards.Reward]:
    """One of every kind."""
    target = rewards.load(options.reward, options.reward_path, options.device)
    tiny.transformers_clip(root / CLIP_L_FOLDER, projection=768)
    made: dict[str, rewards.Reward] = {options.reward: target}
    if options.head:
        places = {"head": options.head, "clip": root / CLIP_L_FOLDER}
        made["aesthetic, random backbone"] = aesthetic = rewards.load("aesthetic", places, options.device)
        made["sum"] = rewards.Weighted([(target, 1.0), (aesthetic, 0.05)])
    made["robust"] = rewards.Robust(target)
    made["jpeg"] = rewards.load("jpeg")
    made["judge"] = Judge(JudgeConfig(url=f"{judge_url}/v1", max_calls=100_000))
    return made


def run(generator: Any, reward: rewards.Reward, monitor: rewards.Reward, options: argparse.Namespace) -> dict[str, Any]:
    """Histories of both methods, and the first and the best score of each."""
    how: dict[str, Any] = {} if reward.differentiable else {**BLACK_BOX, "perturbations": options.perturbations}
    how |= {"backprop_steps": None, "checkpoint": False, "monitor_every": options.iterations}
    noise = NoiseConfig(iterations=options.iterations, learning_rate=options.noise_lr, **how)
    shape = TokenConfig(basis_size=min(30, generator.dim // 2))
    tokens = OptimizeConfig(
        tokens=shape, epochs=options.iterations, learning_rate=options.token_lr, seeds=(options.seed,), **how
    )
    found = {
        "noise": optimize_noise(generator, reward, [options.prompt], noise, seeds=[options.seed], monitors=[monitor]),
        "tokens": train_tokens(generator, reward, [options.prompt], tokens, monitors=[monitor]),
    }
    return {
        name: {
            "history": result.history,
            "start": float(result.start_rewards.mean()),
            "best": float(result.rewards.mean()),
            "held-out": [event.monitors[monitor.name] for event in result.history if monitor.name in event.monitors],
        }
        for name, result in found.items()
    }


def draw_overview(found: dict[str, dict[str, Any]], path: Path) -> None:
    """One panel per reward with the curves of both methods: every step faint, the best so far strong."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 2.5 * ((len(found) + 2) // 3)), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots((len(found) + 2) // 3, 3, squeeze=False).ravel()
    for axis, (name, results) in zip(axes, found.items(), strict=False):
        for colour, (method, result) in zip(("tab:blue", "tab:orange"), results.items(), strict=True):
            steps = [event.step for event in result["history"]]
            axis.plot(steps, [event.reward for event in result["history"]], color=colour, alpha=0.35, linewidth=1)
            axis.plot(steps, [event.best for event in result["history"]], color=colour, label=method)
        axis.set_title(name, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[len(found) :]:
        axis.set_axis_off()
    axes[0].legend(fontsize=8)
    save_figure(path, figure)


def main() -> None:
    """Run every reward and write curves and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_generator_options(parser)
    parser.add_argument("--out", default="results/rewards")
    parser.add_argument("--prompt", default="red heart")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--token-lr", type=float, default=1e-2)
    parser.add_argument("--noise-lr", type=float, default=1e-2)
    parser.add_argument(
        "--perturbations", type=int, default=8, help="extra images per step for rewards without gradient"
    )
    add_reward_options(parser)
    parser.add_argument("--head", help="sac+logos+ava1-l14-linearMSE.pth")
    parser.add_argument("--only", nargs="+", help="names of the rewards to run, of those that the table shows")
    options = parse(parser)
    generator, _ = make_generator(options)
    monitor = rewards.load(options.held_out, options.held_out_path, options.device)
    out, rows, found = Path(options.out), [], {}
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as root, serving(Endpoint().handler()) as url:
        for name, reward in make_rewards(options, Path(root), url).items():
            if options.only and name not in options.only:
                continue
            results = found[name] = run(generator, reward, monitor, options)
            figure = draw_curves({m: result["history"] for m, result in results.items()}, reward=name, title=name)
            save_figure(out / f"{name.replace(', ', '-').replace(' ', '-')}.png", figure)
            for method, result in results.items():
                held = result["held-out"] or [float("nan")]
                scores = {"start": result["start"], "best": result["best"]}
                scores |= {"held-out, start": held[0], "held-out, last": held[-1]}
                rows.append({"reward": name, "method": method} | {key: f"{v:.3f}" for key, v in scores.items()})
                print(rows[-1], flush=True)
            draw_overview(found, out / "overview.png")
    print(write_table(rows, out / "rewards", "Every kind of reward, tokens and noise"))


if __name__ == "__main__":
    main()
