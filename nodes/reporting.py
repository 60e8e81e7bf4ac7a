"""What a run hands out to look at: images, curve, loss and report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ipgo_engine.errors import Cancelled
from ..ipgo_engine.events import StepEvent
from ..ipgo_engine.optimize import Result
from ..ipgo_engine.report import curve_tensor, plain_table
from .host.handover import blocked
from .host.interrupt import comfy_interrupt_as_cancelled
from .host.residence import score
from .host.watch import release_memory
from .running import Job, to_comfy


def run_results(job: Job, title: str, result: Result[Any], images: Tensor, facts: Sequence[str] = ()) -> list[Any]:
    """Values of `schema.run_outputs`, for the final images (B, 3, H, W) of the stock path."""
    with torch.inference_mode(False):
        after = final_scores(job, result, images)
        report = report_text(job, title, result, after, facts)
        curve = curve_image(job, title, result)
    return [to_comfy(images), to_comfy(result.start_image), curve, loss_map(result.history), report]


def final_scores(job: Job, result: Result[Any], images: Tensor) -> Tensor:
    """Scores (B,) of the final images; when that fails, those which the run itself gave to the same images."""
    try:
        with comfy_interrupt_as_cancelled():
            return score(job.reward, images, result.prompts)
    except Cancelled:
        raise
    except Exception as error:
        job.notes.append(f"The final images have no score ({error}): 'after' is what the run itself measured.")
    release_memory()
    return result.rewards


def curve_image(job: Job, title: str, result: Result[Any]) -> Any:
    """The curve as IMAGE; when it cannot be drawn, nodes behind it say why."""
    try:
        return to_comfy(curve_tensor({title: result.history}, reward=job.reward.name, title=title))
    except Exception as error:
        return blocked(f"curve: it cannot be drawn ({error})")


def loss_map(history: Sequence[StepEvent]) -> dict[str, list[float]]:
    """Loss per step: minus the reward, plus the regularizers. Two values or more, as the stock graph needs."""
    losses = [event.penalty - event.reward for event in history]
    return {"loss": losses if len(set(losses)) > 1 else [*losses, (losses[-1] if losses else 0.0) + 1e-6]}


def report_text(job: Job, title: str, result: Result[Any], after: Tensor, facts: Sequence[str]) -> str:
    """Scores before and after, how it ended, where it is kept."""
    before = result.start_rewards.float()
    rows = [
        {"prompt": prompt, "before": float(b), "after": float(a), "gain": float(a - b)}
        for prompt, b, a in zip(result.prompts, before, after, strict=True)
    ]
    if len(rows) > 1:
        means = {"before": float(before.mean()), "after": float(after.mean())}
        rows.append({"prompt": "(mean)", **means, "gain": means["after"] - means["before"]})
    if result.probability is not None:
        for row, value in zip(rows, result.probability.tolist(), strict=False):
            row["P(z)"] = value
    seconds = [event.seconds for event in result.history]
    pace = f"{sum(seconds) / len(seconds):.2f} s per step" if seconds else "no step"
    parts = [
        f"{title}: {result.stopped} after {max(len(result.history) - 1, 0)} updates, {pace}.",
        f"Reward: {job.reward.name}, higher is better.",
        "",
        plain_table(rows),
        "",
        *held_out(result.history),
        *facts,
        *job.notes,
        *job.kept,
    ]
    return "\n".join(parts).strip()


def held_out(history: Sequence[StepEvent]) -> list[str]:
    """One line per held-out reward: at the start, at its best and at the end."""
    names = list(dict.fromkeys(name for event in history for name in event.monitors))
    found = []
    for name in names:
        values = [event.monitors[name] for event in history if name in event.monitors]
        found.append(
            f"Held out: {name} {values[0]:.4g} at the start, {values[-1]:.4g} at the end, best {max(values):.4g}."
        )
    return found
