"""`train`, `noise` and `joint`: one job per prompt or set of tokens, then pictures, curves and tables."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Cancelled, InputError, IPGOError
from ..optimize import Result, RunFailedError, optimize_jointly, optimize_noise, train_tokens
from ..report import slug
from .evaluate import describe_error
from .progress import Progress
from .results import Failure, Outcome, describe, write_learned, write_results, write_so_far
from .session import Session, prepare
from .settings import joint_config, noise_config, token_config

Method = Callable[..., Result[Any]]


@dataclass(frozen=True)
class Job:
    """The prompts of one call of the engine."""

    number: int
    prompts: list[str]
    seeds: list[int]
    name: str
    """The end of its files' names; empty where there is one job only."""

    @property
    def rows(self) -> list[tuple[str, int]]:
        """Every prompt with every seed."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]

    @property
    def first(self) -> int:
        """The number of the first row among those of all jobs, which are equally large."""
        return 1 + (self.number - 1) * len(self.rows)


def run_train(arguments: argparse.Namespace) -> int:
    """`ipgo train`."""
    return _run(prepare(arguments, token_config(arguments)), train_tokens)


def run_noise(arguments: argparse.Namespace) -> int:
    """`ipgo noise`."""
    return _run(prepare(arguments, noise_config(arguments)), optimize_noise)


def run_joint(arguments: argparse.Namespace) -> int:
    """`ipgo joint`."""
    return _run(prepare(arguments, joint_config(arguments)), optimize_jointly)


def _jobs(session: Session) -> list[Job]:
    """One per prompt, so that a long list needs no more memory than a short one; of tokens in batch mode one in all."""
    groups = [session.prompts] if session.mode == "batch" else [[prompt] for prompt in session.prompts]
    names = [f"-{i:02d}-{slug(group[0])}" if len(groups) > 1 else "" for i, group in enumerate(groups, start=1)]
    return [Job(i, group, session.seeds, name) for i, (group, name) in enumerate(zip(groups, names, strict=True), 1)]


def _run(session: Session, method: Method) -> int:
    from . import INTERRUPTED

    started = time.time()
    jobs = _jobs(session)
    with session.interrupt, session.folder.writing(session.record):
        outcomes, failures = _work(session, method, jobs)
        if not outcomes:
            raise _nothing(failures)
        try:
            table = write_results(session, outcomes, failures, time.time() - started)
        except InputError as error:  # a full disk by now is no bad input: what was learned is written
            raise IPGOError(str(error)) from error
    print(table)
    print(describe(session.folder.path))
    if failures and len(jobs) > 1:
        names = ", ".join(repr(failure.prompts[0]) for failure in failures)
        print(f"ipgo: {len(failures)} of {len(jobs)} prompts broke down ({names})", file=sys.stderr)
    if session.interrupt.requested:
        return INTERRUPTED
    return 1 if failures else 0


def _work(session: Session, method: Method, jobs: list[Job]) -> tuple[list[Outcome], list[Failure]]:
    """Every job, whatever becomes of the others; what a job learned is on the disk before the next one begins."""
    outcomes: list[Outcome] = []
    failures: list[Failure] = []
    for job in jobs:
        # After Ctrl-C what an earlier run has learned still counts: read from its state, it costs no picture.
        if session.interrupt.requested and not (session.folder.resumed and _state(session, job).exists()):
            continue
        kept = ""
        try:
            outcome, reason = _one(session, method, job, len(jobs))
            outcomes.append(outcome)
            write_learned(session, outcome)
            kept, bad_input = "; the best so far is written", False
            write_so_far(session, outcomes)
        except Cancelled:
            break
        except Exception as error:  # as text: the error itself would keep the model's tensors alive
            reason, bad_input = describe_error(error), isinstance(error, InputError)
        if reason is not None:
            failures.append(Failure(job.prompts, reason, bad_input))
            if len(jobs) > 1 or outcomes:
                print(f"ipgo: {_label(session, job, len(jobs))}: {' '.join(reason.split())}{kept}", file=sys.stderr)
    return outcomes, failures


def _nothing(failures: list[Failure]) -> IPGOError:
    """The error of a command that has learned nothing at all."""
    if not failures:
        return Cancelled("cancelled before anything was learned")
    return (InputError if failures[0].bad_input else IPGOError)(failures[0].reason)


def _label(session: Session, job: Job, count: int) -> str:
    return session.command if count == 1 else f"[{job.number}/{count}] {job.prompts[0][:24]}"


def _one(session: Session, method: Method, job: Job, count: int) -> tuple[Outcome, str | None]:
    """What one job learned, and why it ended if it broke down."""
    progress = Progress(_label(session, job, count), session.interrupt)
    started, reason = time.perf_counter(), None
    try:
        result = method(session.generator, session.rewards.target, **_inputs(session, method, job, progress))
    except RunFailedError as error:
        result, reason = error.result, str(error)
    finally:
        progress.close()
    last = progress.last_images if reason is None else None
    return Outcome(job.name, job.first, job.rows, job.prompts, result, last, time.perf_counter() - started), reason


def _state(session: Session, job: Job) -> Path:
    return session.folder / f"state-{job.number:02d}.safetensors"


def _inputs(session: Session, method: Method, job: Job, progress: Progress) -> dict[str, Any]:
    """The arguments of one call; `train` takes its seeds from the settings, the others one seed per row."""
    common: dict[str, Any] = {
        "config": session.config,
        "observer": progress,
        "monitors": session.rewards.monitors,
        "state_file": _state(session, job),
        "resume": session.folder.resumed,
    }
    if method is train_tokens:
        return {"prompts": job.prompts, **common}
    return {"prompts": [p for p, _ in job.rows], "seeds": [s for _, s in job.rows], **common}
