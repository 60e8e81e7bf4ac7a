"""What a state file holds of a run: taken from a loop, compared with it, and put back into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .best import Best
from .events import StepEvent
from .gradients import Evaluation
from .problems import restore, snapshot
from .rewards.base import settings_of

if TYPE_CHECKING:
    from .loop import Loop

WATCHING = ("epochs", "iterations", "micro_batch", "checkpoint", "monitor_every", "preview_every", "patience")
"""Settings that change how long a run is, what it shows and how much memory it takes: free to differ after a resume."""


def state_of(loop: Loop) -> dict[str, Any]:
    """Everything a resumed run needs, of a loop that has a best."""
    return {
        "identity": _identity(loop),
        "update": loop.update,
        "failures": loop.failures,
        "rates": loop.rates,
        "parameters": snapshot(loop.problem),
        "optimizer": loop.optimizer.state_dict()["state"],
        "proposer": loop.problem.proposer.state_dict() if loop.problem.proposer else None,
        "best": vars(loop.best),
        "start": vars(loop.start),  # there is one where there is a best
        "history": [asdict(event) for event in loop.history],
    }


def differences(loop: Loop, state: Mapping[str, Any]) -> list[str]:
    """Names of the settings in which the run that left this state differs from this one."""
    return differing(state.get("identity", {}), _identity(loop))


def put_back(loop: Loop, state: Mapping[str, Any]) -> None:
    """Make the loop what it was when the state was taken."""
    restore(loop.problem, state["parameters"])
    optimizer = loop.optimizer.state_dict()
    optimizer["state"] = {int(key): value for key, value in state["optimizer"].items()}
    loop.optimizer.load_state_dict(optimizer)
    if loop.problem.proposer is not None:
        loop.problem.proposer.load_state_dict(state["proposer"])
    loop.update, loop.failures, loop.rates = state["update"], state["failures"], state["rates"]
    loop.best, loop.start = Best(**state["best"]), Evaluation(**state["start"])
    device = loop.task.generator.device
    loop.best.state = {key: value.to(device) for key, value in state["best"]["state"].items()}
    events = [StepEvent(**event) for event in state["history"]]
    loop.history = [event for event in events if event.step < loop.update]  # the last step is evaluated again
    loop.measured = max((event.step for event in loop.history if event.monitors), default=None)


def _identity(loop: Loop) -> dict[str, Any]:
    """What must be equal for a resume to make sense; a longer run of the same kind may go on."""
    return {
        "settings": comparable(loop.settings),
        "generator": comparable(loop.task.generator.settings),
        "prompts": loop.problem.prompts,
        "encoder": loop.task.generator.encoder,
        "noise_shape": list(loop.task.generator.noise_shape),
        "reward": loop.task.reward.name,
        "reward_settings": comparable(settings_of(loop.task.reward)),
    }


def comparable(value: Any) -> Any:
    """Settings as JSON gives them back, so that they compare equal after a round trip, less those of `WATCHING`."""
    if isinstance(value, Mapping):
        return {key: comparable(item) for key, item in value.items() if key not in WATCHING}
    return [comparable(item) for item in value] if isinstance(value, list | tuple) else value


def differing(theirs: Any, mine: Any, name: str = "") -> list[str]:
    """Names of the settings that differ, innermost ones."""
    if not (isinstance(theirs, Mapping) and isinstance(mine, Mapping)):
        return [] if theirs == mine else [name]
    keys = sorted({*theirs, *mine})
    return [found for key in keys for found in differing(theirs.get(key), mine.get(key), str(key))]
