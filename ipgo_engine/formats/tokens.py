"""The tokens file: safetensors, parameters and finished tokens, with metadata saying where they belong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import TokenConfig, whole_number
from ..errors import EncoderMismatchError, InputError
from .files import write_whole

FORMAT = "ipgo-tokens-1"


def engine_version() -> str:
    """Version of the installed engine; "source" when it runs from a checkout or inside ComfyUI."""
    try:
        return version("ipgo")
    except PackageNotFoundError:
        return "source"


def json_header(labels: Mapping[str, Any], own: Mapping[str, Any], kind: str) -> dict[str, str]:
    """The file's own entries and the caller's labels, each as JSON; a label cannot overwrite what the reader needs."""
    try:
        return {key: json.dumps(value) for key, value in {**labels, **own}.items()}
    except (TypeError, ValueError) as error:
        raise InputError(f"a label of the {kind} cannot be written as JSON ({error}): use plain data.") from error


def write_tokens(
    path: str | Path, dim: int, config: TokenConfig, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> Path:
    """Write one tokens file; `metadata` values must be JSON, `encoder` names the text encoder."""
    own = {"format": FORMAT, "dim": dim, "config": asdict(config), "version": engine_version()}
    text = json_header(metadata, own, "tokens file")
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return write_whole(path, lambda part: save_file(plain, part, metadata=text))


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata alone, without reading the tensors. Raises `InputError` unless this is a whole tokens file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the path of a tokens file.")
    try:
        with safe_open(path, framework="pt") as file:
            raw = file.metadata() or {}
        header = {key: json.loads(value) for key, value in raw.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a tokens file or is damaged ({error}).") from error
    if header.get("format") != FORMAT:
        raise InputError(f"{path} is a safetensors file but not an IPGO tokens file (format {header.get('format')!r}).")
    return header


def read_tokens(
    path: str | Path, *, encoder: str | None = None, dim: int | None = None
) -> tuple[int, TokenConfig, dict[str, Tensor], dict[str, Any]]:
    """Width, settings, tensors and remaining metadata of a tokens file, checked against the encoder if one is given."""
    header = read_metadata(path)
    try:
        width, config = whole_number("dim", header.pop("dim"), 2), TokenConfig(**header.pop("config"))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: its settings cannot be read ({error}).") from error
    learned_for = header.get("encoder")
    if dim is not None and dim != width:
        raise EncoderMismatchError(
            f"{Path(path).name} holds tokens {width} wide, for text encoder {learned_for or 'unknown'}; this model's "
            f"text embedding is {dim} wide. Use the model they were trained with, or train new tokens."
        )
    if encoder is not None and learned_for is not None and learned_for != encoder:
        raise EncoderMismatchError(
            f"{Path(path).name} was trained for text encoder {learned_for}, not {encoder}. "
            "Use the model it was trained with, or train new tokens."
        )
    with safe_open(Path(path), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    header.pop("format")
    return width, config, tensors, header
