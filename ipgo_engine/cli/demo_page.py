"""The demo's files: pictures, curves, table and the page that ties them together."""

from __future__ import annotations

import html
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..config import NoiseConfig, OptimizeConfig
from ..report import (
    Row,
    Tile,
    draw_curves,
    grid,
    plain_table,
    save_figure,
    save_image,
    slug,
    write_csv,
    write_json,
    write_text,
)
from .demo_trials import Demo, Trial
from .folder import RUN_FILE

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
img { max-width: 100%; border: 1px solid #ddd }
table { border-collapse: collapse; font-size: 14px } td, th { padding: .25rem .6rem; border-bottom: 1px solid #ddd }
td.n { text-align: right; font-variant-numeric: tabular-nums }
"""
HACKS = ("bright", "bright-free")


def write_page(demo: Demo, record: dict[str, Any]) -> str:
    """Write everything; what to print at the end."""
    folder = demo.folder
    main = [trial for trial in demo.trials if trial.key not in HACKS]
    hacks = [trial for trial in demo.trials if trial.key in HACKS]
    _save_single(demo)
    sections = []
    if main:
        save_image(folder / "before-after.png", _methods(demo, main))
        sections.append(_section(_WHAT_GRID, ["before-after.png"]))
        sections.append(_section(_WHAT_CURVES, _curves(demo, main)))
    if hacks:
        save_image(folder / "brightness.png", _hacks(demo, hacks))
        histories = {trial.title: trial.history[trial.title] for trial in hacks}
        figure = draw_curves(histories, reward="brightness", title=f"brightness of {demo.plan.hacked!r}")
        save_figure(folder / "curves-brightness.png", figure)
        sections.append(_section(_WHAT_HACK, ["brightness.png", "curves-brightness.png"]))
    records = [line for trial in demo.trials for line in trial.records]
    write_csv(folder / "scores.csv", records)
    summary = _summary(demo.trials)
    sections.insert(1, f"<h2>Scores</h2>{_table(summary)}<p>{_WHAT_TABLE}</p>{_table(records)}")
    trials = [
        {"method": t.title, "seconds": t.seconds, "stopped": t.stopped, "history": _plain(t)} for t in demo.trials
    ]
    write_json(folder / RUN_FILE, {**record, "scores": records, "summary": summary, "trials": trials})
    write_text(folder / "index.html", _page(sections, record))
    seconds = sum(trial.seconds for trial in demo.trials)
    return (
        f"\n{plain_table(records)}\n\n{plain_table(summary)}\n\n"
        f"Optimization: {seconds:.0f} s. Open {folder / 'index.html'}; all files are in {folder.path}"
    )


def _plain(trial: Trial) -> dict[str, Any]:
    return {
        name: [{"step": e.step, "reward": e.reward, "best": e.best, "probability": e.probability} for e in events]
        for name, events in trial.history.items()
    }


def _save_single(demo: Demo) -> None:
    for trial in demo.trials:
        for prompt, before, after in zip(trial.prompts, trial.before, trial.after, strict=True):
            folder = demo.folder / "images"
            save_image(folder / f"{slug(prompt)}-{trial.key}.png", after)
            save_image(folder / f"{slug(prompt)}-raw.png", before)


def _methods(demo: Demo, trials: Sequence[Trial]) -> Any:
    """One row per prompt, one column per method."""
    rows = []
    for prompt in demo.plan.prompts:
        tiles: list[Tile | None] = []
        for trial in trials:
            if prompt not in trial.prompts:
                tiles.append(None)
                continue
            i = trial.prompts.index(prompt)
            if not tiles:
                tiles.append(Tile(trial.before[i], f"{trial.records[i]['raw']:.3f}"))
            line = trial.records[i]
            tiles.append(Tile(trial.after[i], f"{line['best']:.3f} ({line['best'] - line['raw']:+.3f})"))
        if any(tiles):
            rows.append(Row(prompt, tiles))
    return grid(rows, ["before", *(trial.title for trial in trials)], title=f"reward: {demo.target.name}")


def _hacks(demo: Demo, trials: Sequence[Trial]) -> Any:
    first = trials[0]
    tiles = [Tile(first.before[0], f"brightness {first.records[0]['raw']:.3f}")]
    for trial in trials:
        line = trial.records[0]
        tiles.append(Tile(trial.after[0], f"{line['best']:.3f}, P(z) {line['P(z)']:.2g}"))
    row = Row(f"{demo.plan.hacked!r}, as bright as it gets", tiles)
    return grid([row], ["before", *(trial.title for trial in trials)])


def _curves(demo: Demo, trials: Sequence[Trial]) -> list[str]:
    names = []
    tokens = next((trial for trial in trials if trial.key == "tokens"), None)
    if tokens is not None:
        names.append("curves-tokens.png")
        figure = draw_curves(tokens.history, reward=demo.target.name, title="IPGO tokens, one set per prompt")
        save_figure(demo.folder / names[-1], figure)
    noise = {trial.title: trial.history[trial.title] for trial in trials if trial.key.startswith("noise")}
    if noise:
        names.append("curves-noise.png")
        title = "noise, mean over the prompts; P(z) is the smallest"
        save_figure(demo.folder / names[-1], draw_curves(noise, reward=demo.target.name, title=title))
    return names


def _summary(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """One line per method: means over the prompts, smallest P(z)."""
    lines = []
    for trial in trials:
        line: dict[str, Any] = {"method": trial.title, "reward": trial.reward.name, "pictures": len(trial.records)}
        for key in dict.fromkeys(key for record in trial.records for key in record):
            values = [record[key] for record in trial.records if isinstance(record.get(key), float)]
            if values:
                line[key] = min(values) if key.startswith("P(z)") else statistics.fmean(values)
        lines.append({**line, "seconds": trial.seconds})
    return lines


_WHAT_GRID = (
    "Pictures",
    "The same prompt and the same seed in every column but the last. The number below a picture is the reward that was "
    "maximized, in brackets the gain over the first column. <b>Best of N</b> is what as many random seeds would have "
    "given for the same number of model evaluations as the noise run.",
)
_WHAT_CURVES = (
    "Curves",
    "The reward should rise, and so should the <b>held-out</b> judge, which nothing was optimized for. P(z) bounds the "
    "probability that random noise looks as odd as the optimized one: near 1 it is ordinary, far below 1 the picture "
    "was bought with noise that the model was never trained on.",
)
_WHAT_HACK = (
    "Reward hacking, and how it is stopped",
    "Brightness is a bad reward for something black. Without the regularizer it goes up by leaving the noise the model "
    "knows, and P(z) collapses; with it, P(z) holds.",
)
_WHAT_TABLE = (
    "<b>fresh</b>: the tokens with four seeds they were not trained on, beside the raw prompt with the same seeds. "
    "<b>held-out</b>: the judge. All scores are those of a small demonstration model of emoji and say nothing about "
    "Stable Diffusion."
)


def _section(what: tuple[str, str], pictures: Sequence[str]) -> str:
    images = "".join(f'<p><img src="{name}" alt="{name}"></p>' for name in pictures)
    return f"<h2>{what[0]}</h2><p>{what[1]}</p>{images}"


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for record in records for key in record))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = ""
    for record in records:
        cells = ""
        for name in columns:
            value = record.get(name)
            number = isinstance(value, float | int)
            text = f"{value:.4g}" if number else html.escape(str(value)) if value is not None else ""
            cells += f"<td{' class=n' if number else ''}>{text}</td>"
        body += f"<tr>{cells}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


_SHOWN = ("epochs", "iterations", "learning_rate", "backprop_steps")


def _settings(configs: Mapping[str, Any]) -> str:
    """What was set otherwise than in the papers."""
    papers = {"tokens": OptimizeConfig(), "noise": NoiseConfig()}
    parts = []
    for key, paper in papers.items():
        if key in configs:
            pairs = (
                f"{name} {_show(configs[key], name)} ({_show(paper, name)})" for name in _SHOWN if hasattr(paper, name)
            )
            parts.append(f"{key}: {', '.join(pairs)}")
    return (
        f"Settings that suit a few minutes on this model, the papers' in brackets. {'; '.join(parts)}." if parts else ""
    )


def _show(config: Any, name: str) -> str:
    value = getattr(config, name)
    return "all" if value is None else f"{value:g}"


def _page(sections: Sequence[str], record: Mapping[str, Any]) -> str:
    facts = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    ending = f"{record['seconds']:.0f} s in all on {record['device']}, {torch.get_num_threads()} threads; {facts}."
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>IPGO demo</title><style>{STYLE}</style>'
        "<h1>Reward-guided optimization on the demo model</h1>"
        "<p>IPGO learns a few tokens around the prompt; noise optimization changes the noise a picture starts from. "
        "Both follow the gradient of a reward: here, how well picture and prompt agree in the eyes of a small CLIP.</p>"
        f"{''.join(sections)}<p>{_settings(record['config'])}</p>"
        "<p>Files: scores.csv, run.json, tokens-*.safetensors, noise.safetensors, images/. "
        f"{html.escape(ending)}</p></html>\n"
    )
