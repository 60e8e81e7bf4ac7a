"""ONE loop for every method: gradient, best so far, early stop, events, back-off, resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .best import Best
from .errors import BudgetSpentError, Cancelled, InputError, IPGOError, NonFiniteError
from .events import Observer, StepEvent
from .formats.state import read_state, write_state
from .gradients import FORWARD_ONLY, Evaluation, Task, choose
from .memory import is_out_of_memory, save_memory
from .problems import Problem, restore
from .resume import differences, put_back, state_of
from .rewards.base import Reward, begin_run

T = TypeVar("T")
RETRIES = 3  # how often a run goes back to its best after a non-finite number before it gives up
VALIDATION_ROWS = 16  # images of one validation pass when an epoch has several updates


class Loop:
    """Evaluate, remember, update, until done, cancelled or broken.

    Step s sees the parameters after s updates; a run of `total` updates has total + 1 steps, and the last one only
    evaluates. Everything random depends on the settings and the step, so a resumed run repeats what an uninterrupted
    one does.
    """

    def __init__(
        self,
        task: Task,
        total: int,
        observer: Observer,
        monitors: Mapping[str, Reward],
        settings: Mapping[str, Any],
        state_file: Path | None = None,
        save_every: int = 10,
        token_rate: float | None = None,
    ) -> None:
        self.task, self.total, self.observer, self.monitors = task, total, observer, monitors
        self.problem: Problem = task.problem
        self.config = task.config
        self.settings, self.state_file, self.save_every = settings, state_file, max(save_every, 1)
        self.estimator = choose(self.config, task.reward)
        parts = [
            (self.problem.shared, token_rate or self.config.learning_rate),
            (self.problem.own, self.config.learning_rate),
        ]
        self.rates = [rate for parameters, rate in parts if parameters]
        self.optimizer = torch.optim.Adam([{"params": parameters} for parameters, _ in parts if parameters])
        self.limit: float | None = getattr(self.config, "min_probability", None)
        self.update, self.failures, self.stopped = 0, 0, "finished"
        self.best = Best()
        self._said: set[str] = set()
        self.measured: int | None = None  # the step at which held-out rewards were measured last
        self._torn = False  # while an update is half done
        self._stepped = False  # a state that was only read is not written again
        self.history: list[StepEvent] = []
        self.start: Evaluation | None = None

    @property
    def result_rows(self) -> list[int]:
        """The rows whose images a run reports: all of them unless an epoch has several updates."""
        count = len(self.problem.prompts)
        return list(range(count)) if self.problem.updates_per_epoch == 1 else spread(count, VALIDATION_ROWS)

    @property
    def has_best(self) -> bool:
        """Whether there is something to hand out: a start and, from the first step on, a best."""
        return self.best.state is not None and self.start is not None

    def run(self) -> None:
        """Step to the end; the state file is written on the way out whatever happens."""
        begin_run(self.task.reward, *self.monitors.values())
        try:
            if self.start is None and self.problem.shared:
                start = self._guarded(self._evaluate_start, len(self.result_rows))
                self._refuse(self._trouble(start))
                self.start = start
            while True:
                if self.observer.cancelled():
                    raise Cancelled("cancelled by the observer")
                if not self._step():
                    break
                if self.update % self.save_every == 0:
                    self._save()
        except (BudgetSpentError, Cancelled, KeyboardInterrupt) as error:
            if not self.has_best:
                raise
            if isinstance(error, BudgetSpentError):
                self._stop(self.update, str(error).rstrip("."))
            else:
                self.stopped = "cancelled"
        finally:
            self._save()

    # -- one step -----------------------------------------------------------------------------------------------------

    def _step(self) -> bool:
        """One evaluation and, but for the last step, one update. False when the run is over."""
        started, step, last = time.perf_counter(), self.update, self.update >= self.total
        rows = self.problem.rows(step)
        gradients = not last and self.estimator not in FORWARD_ONLY
        evaluation = self._guarded(lambda: self._evaluate(rows, last), len(rows), gradients)
        penalty, probability = self.problem.regularize(rows)
        trouble, norm = self._trouble(evaluation), 0.0
        judged = None if trouble else self._judged(rows, evaluation)
        if judged:
            trouble = self._trouble(judged[1])
        if not (trouble or last):
            norm = self._gradient(rows, penalty)
            trouble = None if math.isfinite(norm) else "the gradient is not finite"
        if trouble:
            return self._recover(trouble, last)
        self._remember(judged, probability)  # nothing that has no gradient: a run would go back to it for ever
        monitors = self._measure(judged, step, last)  # before the update: Cancel in here leaves the step to be repeated
        stop = not last and self._should_stop(probability, monitors)
        if not (last or stop):  # an update beyond the stop would be evaluated by a resume, which then ends elsewhere
            self._apply(evaluation, penalty)
        seconds = time.perf_counter() - started
        self._report(step, evaluation, probability, float(penalty.detach()) / len(rows), norm, monitors, seconds)
        if stop:
            self._stop(step, self.stopped)
        return not (last or stop)

    def _judged(self, rows: list[int], evaluation: Evaluation) -> tuple[list[int], Evaluation] | None:
        """What steps are compared by: the update's own rows or, where those are a part of the prompts, a validation.

        None between two validations, of which there is one at the start of every epoch.
        """
        if self.problem.updates_per_epoch == 1:
            return rows, evaluation
        if self.update % self.problem.updates_per_epoch:
            return None
        rows = self.result_rows
        return rows, self._guarded(lambda: self.task.evaluate(rows), len(rows))

    def _evaluate(self, rows: list[int], last: bool) -> Evaluation:
        self.optimizer.zero_grad(set_to_none=True)
        return self.task.evaluate(rows) if last else self.estimator(self.task, rows, self.update)

    def _evaluate_start(self) -> Evaluation:
        return self.task.evaluate(self.result_rows, self.problem.start_inputs)

    def _guarded(self, evaluate: Callable[[], T], rows: int, gradients: bool = False) -> T:
        """Call `evaluate`, which works on so many rows, again with less memory each time memory runs out."""
        while True:
            try:
                return evaluate()
            except Exception as error:
                if "modified by an inplace operation" in str(error):
                    raise InputError(
                        "No gradient: the model, one of its patches, or the reward writes into a tensor that the "
                        "gradient needs. Leave that patch out, or use gradient zeroth-order."
                    ) from error
                if not is_out_of_memory(error):
                    raise
                reason = error.with_traceback(None)  # the frames in it would keep the tensors alive
            message = save_memory(self.task, rows, gradients)
            if message is None:
                spared = ", with recomputation, through one model step" if gradients else ""
                raise IPGOError(
                    f"Out of memory although one image is made at a time{spared}: "
                    "use a smaller picture, a smaller reward model, or lower precision."
                ) from reason
            self.observer.on_message(message)

    def _trouble(self, evaluation: Evaluation) -> str | None:
        if not torch.isfinite(evaluation.images).all():
            return "the image is not finite"
        if not torch.isfinite(evaluation.rewards).all():
            return f"reward {self.task.reward.name!r} is not finite"
        return None

    def _recover(self, trouble: str, last: bool) -> bool:
        """Go back to the best with half the learning rate; give up after a few times."""
        if not self.history:
            self._refuse(trouble)
        assert self.best.state is not None
        self.failures += 1
        self._stepped = True
        restore(self.problem, self.best.state)
        self.optimizer.state.clear()
        self.rates = [rate / 2 for rate in self.rates]
        self.observer.on_message(f"Step {self.update}: {trouble}; back to the best so far, learning rate halved.")
        if self.failures > RETRIES:
            self.stopped = f"{trouble}, again and again in spite of a smaller learning rate"
        self.update += 1
        return not last and self.failures <= RETRIES

    def _refuse(self, trouble: str | None) -> None:
        """What is wrong before anything was learned will be wrong again."""
        if trouble:
            raise NonFiniteError(
                f"At the start {trouble}: nothing can be learned. Check the model's precision and the reward."
            )

    def _remember(self, judged: tuple[list[int], Evaluation] | None, probability: Tensor | None) -> None:
        """Offer the present parameters as the best."""
        self._stepped = True
        if judged is None:
            return
        if self.start is None:  # noise starts as what the stock sampler draws, so its first image is the stock one
            self.start = judged[1]
        self.best.consider(self.problem, judged[1], probability, self.limit)

    def _gradient(self, rows: list[int], penalty: Tensor) -> float:
        """Add the penalty's gradient, average over rows for shared parameters, clip; the norm before clipping."""
        if self.problem.proposer is not None:
            return 0.0
        if penalty.requires_grad:
            penalty.backward()
        limit = self.config.clip_norm or math.inf
        for parameter in self.problem.shared:
            if parameter.grad is not None:
                parameter.grad /= len(rows)
        norm = float(torch.nn.utils.clip_grad_norm_(self.problem.shared, limit)) if self.problem.shared else 0.0
        for parameter in self.problem.own:
            if parameter.grad is not None:
                norms = parameter.grad.flatten(1).norm(dim=1)
                factor = (limit / norms.clamp_min(1e-12)).clamp_max(1.0)
                parameter.grad *= factor.view(-1, *[1] * (parameter.ndim - 1))
                norm = max(norm, float(norms.max())) if torch.isfinite(norms).all() else math.nan
        return norm

    def _apply(self, evaluation: Evaluation, penalty: Tensor) -> None:
        """One update, and its number: a state between the two would repeat it after a resume."""
        self._torn = True
        if self.problem.proposer is not None:
            score = evaluation.rewards.sum() - penalty.detach().to(evaluation.rewards)
            self.problem.proposer.step(float(score) / len(evaluation.rewards))
        else:
            factor = self.config.learning_rate_factor(self.update, self.problem.updates_per_epoch)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            self.optimizer.step()
            self.problem.project_()
        self.update += 1
        self._torn = False

    # -- watching -----------------------------------------------------------------------------------------------------

    def _measure(self, judged: tuple[list[int], Evaluation] | None, step: int, last: bool) -> dict[str, float]:
        """Held-out rewards every so many steps, always of the same rows: other prompts would not compare."""
        due = self.measured is None or step - self.measured >= self.config.monitor_every or last
        if judged is None or not due:
            return {}
        self.measured, found = step, {}
        for name, monitor in self.monitors.items():
            try:
                found[name] = self._guarded(lambda m=monitor: self.task.mean_score(m, *judged), len(judged[0]))
            except Cancelled:
                raise
            except IPGOError as error:  # what is only watched, and says why it has no score, does not end a run
                self._say_once(f"Held-out reward {name!r} has no score at step {step}: {error}", name)
        return found

    def _report(
        self,
        step: int,
        evaluation: Evaluation,
        probability: Tensor | None,
        penalty: float,
        norm: float,
        monitors: dict[str, float],
        seconds: float,
    ) -> None:
        assert self.best.rewards is not None
        event = StepEvent(
            step=step,
            total=self.total,
            reward=float(evaluation.rewards.mean()),
            best=float(self.best.rewards.mean()),
            penalty=penalty,
            probability=None if probability is None else float(probability.min()),
            gradient_norm=norm,
            monitors=monitors,
            seconds=seconds,
        )
        self.history.append(event)
        preview = step % self.config.preview_every == 0 or step == self.total
        self.observer.on_step(replace(event, images=evaluation.images) if preview else event)

    def _should_stop(self, probability: Tensor | None, monitors: dict[str, float]) -> bool:
        improbable = self._improbable(probability)
        if improbable:
            self.stopped = improbable
        elif self.config.patience is not None and self.monitors:
            name = next(iter(self.monitors))
            measured = [*(event.monitors for event in self.history), monitors]
            values = [scores[name] for scores in measured if not math.isnan(scores.get(name, math.nan))]
            if values and len(values) - 1 - values.index(max(values)) >= self.config.patience:
                self.stopped = f"the held-out reward {name!r} has stopped rising"
        return self.stopped != "finished"

    def _improbable(self, probability: Tensor | None) -> str | None:
        """Why no image can become better any more: each noise by itself, or, with shared parameters, all by one."""
        if self.limit is None or probability is None:
            return None
        below = probability < self.limit
        if self.problem.shared:
            return f"P(z) fell below {self.limit:g} for an image that shares its tokens" if below.any() else None
        return f"P(z) fell below {self.limit:g} for every image" if below.all() else None

    def _stop(self, step: int, reason: str) -> None:
        self.stopped = reason
        self.observer.on_message(f"Stopped at step {step}: {reason}.")

    def _say_once(self, message: str, about: str) -> None:
        if about not in self._said:
            self._said.add(about)
            self.observer.on_message(message)

    # -- resume -------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write what a resumed run needs. A full disk costs this state, never the run nor the states to come."""
        if self.state_file is None or not self.has_best or self._torn or not self._stepped:
            return
        try:
            write_state(self.state_file, state_of(self))
        except InputError as error:
            message = f"The run goes on, but its state was not saved this time: {error}"
            self._say_once(message, message)

    def load(self) -> None:
        """Go on from the state file. Raises `InputError` when it is damaged or belongs to another run."""
        assert self.state_file is not None
        state = read_state(self.state_file)
        different = differences(self, state)
        if different:
            raise InputError(
                f"{self.state_file} belongs to another run (different: {', '.join(different)}): "
                "give the settings it was started with, or start anew without resuming."
            )
        put_back(self, state)


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` rows, evenly spread."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]
