"""Reward, held-out rewards and P(z) over the steps of one or several runs."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..events import StepEvent
from ..formats.files import write_whole
from .images import from_pil

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
LOWEST = 1e-44  # the smallest probability float32 can hold; below it P(z) is 0 and its logarithm has no place
CROWD = "#BBBBBB"
LABELLED = 8  # more runs than this in one picture are drawn thin and grey behind their mean

Histories = Mapping[str, Sequence[StepEvent]]
Points = tuple[list[int], list[float]]


def draw_curves(histories: Histories, *, reward: str = "reward", title: str = "") -> Figure:
    """One panel for the reward, one for the held-out rewards and one for log10 P(z), where there are any.

    `histories` are the runs by name; a single run also shows its best so far as a stepped line, many runs their mean,
    in which a run that ended early keeps its last value. Nothing global is touched: the figure belongs to the caller.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    events = [event for history in histories.values() for event in history]
    monitors = list(dict.fromkeys(name for event in events for name in event.monitors))
    # Held-out rewards are measured at every so many steps: their few points are marked.
    panels: list[tuple[str, Callable[[Sequence[StepEvent]], Points], dict[str, Any]]] = [(reward, _rewards, {})]
    panels += [(f"{name} (held out)", partial(_held_out, name), {"marker": "o", "ms": 3}) for name in monitors]
    if any(event.probability is not None for event in events):
        panels.append(("log10 P(z)", _probabilities, {}))
    figure = Figure(figsize=(7.2, 1.0 + 2.3 * len(panels)), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (label, points, marks) in zip(axes, panels, strict=True):
        _draw(axis, {name: points(history) for name, history in histories.items()}, marks)
        _tidy(axis, label)
        if points is _probabilities:  # a P(z) that stays at 1 should look flat, not jagged; after the last run only
            low, high = axis.get_ylim()
            axis.set_ylim(min(low, -1.0), max(high, 0.1))
    if len(histories) == 1:
        _draw_best(axes[0], next(iter(histories.values())))
    axes[-1].set_xlabel("step")
    if axes[0].get_legend_handles_labels()[1]:
        axes[0].legend(frameon=False, fontsize=8, loc="best")
    if title:
        figure.suptitle(_plain(title, 80), fontsize=11, x=0.02, ha="left")
    return figure


def _rewards(history: Sequence[StepEvent]) -> Points:
    return [event.step for event in history], [event.reward for event in history]


def _held_out(monitor: str, history: Sequence[StepEvent]) -> Points:
    found = [event for event in history if monitor in event.monitors]
    return [event.step for event in found], [event.monitors[monitor] for event in found]


def _probabilities(history: Sequence[StepEvent]) -> Points:
    found = [(event.step, event.probability) for event in history if event.probability is not None]
    return [step for step, _ in found], [math.log10(max(probability, LOWEST)) for _, probability in found]


def _draw(axis: Any, runs: Mapping[str, Points], marks: dict[str, Any]) -> None:
    if len(runs) <= LABELLED:
        for number, (name, points) in enumerate(runs.items()):
            axis.plot(*points, color=COLOURS[number % len(COLOURS)], lw=1.6, label=_plain(name, 40), **marks)
        return
    for points in runs.values():
        axis.plot(*points, color=CROWD, lw=0.7)
    axis.plot(*_mean(list(runs.values())), color=COLOURS[0], lw=2.0, label=f"mean of {len(runs)}", **marks)


def _mean(runs: Sequence[Points]) -> Points:
    """The mean of the runs that have points; beyond its ends a run has its first and last value."""
    import numpy as np

    kept = [points for points in runs if points[0]]
    steps = sorted({step for own, _ in kept for step in own})
    return steps, np.mean([np.interp(steps, *points) for points in kept], axis=0).tolist()


def _draw_best(axis: Any, history: Sequence[StepEvent]) -> None:
    """The best so far of a run that is alone in its picture, and where it started."""
    if not history:
        return
    steps, best = [event.step for event in history], [event.best for event in history]
    axis.step(steps, best, color=COLOURS[0], lw=1.0, ls="--", where="post", label="best so far")
    axis.axhline(history[0].reward, color="#999999", lw=0.8, ls=":", label="at the start")


def _tidy(axis: Any, label: str) -> None:
    axis.set_ylabel(_plain(label, 32), fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(color="#E6E6E6", lw=0.7)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _plain(text: str, longest: int) -> str:
    """One line without matplotlib's mathematics, which a dollar sign in a prompt would start."""
    line = " ".join(text.split()).replace("$", r"\$")
    return line if len(line) <= longest else line[: longest - 3] + "..."


def save_figure(path: str | Path, figure: Figure) -> Path:
    """Write a PNG file, whole or not at all."""
    with _any_letter():
        return write_whole(path, lambda part: figure.savefig(part, format="png"))


@contextlib.contextmanager
def _any_letter() -> Iterator[None]:
    """A prompt may hold letters the font has not: a box in the picture is enough, no warning is needed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def curve_tensor(histories: Histories, *, reward: str = "reward", title: str = "") -> Tensor:
    """`draw_curves` as an image tensor (1, 3, H, W) in [0, 1]."""
    import numpy as np
    from PIL import Image

    figure = draw_curves(histories, reward=reward, title=title)
    canvas: Any = figure.canvas
    with _any_letter():
        canvas.draw()
    return from_pil(Image.fromarray(np.asarray(canvas.buffer_rgba()).copy()))
