"""The resume file: nested dictionaries and lists of tensors and plain values, as safetensors (no pickle)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from .files import write_whole

FORMAT = "ipgo-state-1"
_TENSOR = "__tensor__"


def write_state(path: str | Path, state: dict[str, Any]) -> Path:
    """Write a tree of dicts, lists, tensors and JSON values. Raises `InputError` when the file cannot be written."""
    tensors: dict[str, Tensor] = {}

    def strip(value: Any) -> Any:
        if isinstance(value, Tensor):
            name = str(len(tensors))
            tensors[name] = value.detach().cpu().contiguous().clone()
            return {_TENSOR: name}
        if isinstance(value, dict):
            return {str(key): strip(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [strip(item) for item in value]
        return value

    text = json.dumps(strip(state))
    return write_whole(path, lambda part: save_file(tensors, part, metadata={"format": FORMAT, "state": text}))


def read_state(path: str | Path) -> dict[str, Any]:
    """What `write_state` wrote, tensors on the CPU. Raises `InputError` when the file is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: there is nothing to resume.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Clones: Windows replaces no file, such as this one at the next save, that tensors are still mapped to.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"format {metadata.get('format')!r}")
        return _filled(json.loads(metadata["state"]), tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not a resume file of this engine or is damaged ({error}).") from error


def _filled(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree with its tensors back in their places."""
    if isinstance(value, dict) and _TENSOR in value:
        return tensors[value[_TENSOR]]
    if isinstance(value, dict):
        return {key: _filled(item, tensors) for key, item in value.items()}
    return [_filled(item, tensors) for item in value] if isinstance(value, list) else value
