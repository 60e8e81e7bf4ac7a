"""What to do when memory runs out: recompute, then fewer images at once, then fewer model steps with gradients."""

from __future__ import annotations

import torch

from .gradients import Task

_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")
"""Windows and Linux, MPS and others, cuBLAS and cuDNN."""


def is_out_of_memory(error: BaseException) -> bool:
    """True for an accelerator's out-of-memory error, its libraries', and the CPU allocator's."""
    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def save_memory(task: Task, rows: int, gradients: bool) -> str | None:
    """Use less memory from now on and say how; None when nothing is left to give.

    `rows` is the number of images of the call that failed, `gradients` whether it was to give any: only then do
    recomputation and fewer model steps help. Recomputation and smaller groups of images change nothing but time. Fewer
    model steps change the gradient, so they come last.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if gradients and not task.checkpoint:
        task.checkpoint = True
        return "Out of memory: model calls are recomputed in the backward pass from now on."
    size = min(task.micro_batch, rows)
    if size > 1:
        task.micro_batch = size // 2
        return f"Out of memory: {task.micro_batch} image(s) at a time from now on."
    steps = min(task.backprop_steps or task.generator.steps, task.generator.steps)
    if gradients and steps > 1:
        task.backprop_steps = steps // 2
        return f"Out of memory: gradients pass through the last {task.backprop_steps} model step(s) only from now on."
    return None
