"""From a reward's name and the place of its weights to the reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .aesthetic import Aesthetic, feature_width, load_head
from .backbones import load_clip
from .base import Reward
from .brightness import Brightness, Darkness
from .clip import ClipScore
from .contrast import Contrast
from .demo import load_demo
from .hps import load_hps
from .imagereward import load_imagereward
from .jpeg import JpegSize
from .judge import Judge, JudgeConfig
from .pickscore import load_pickscore
from .text import CLIP_L_FOLDER

Place = str | Path
_NOT_OF_THE_FILES = (InputError, RuntimeError, MemoryError, ImportError, AssertionError)
"""Clear already, or about memory, the device and the installation."""
Device = str | torch.device | None
Loader = Callable[[Place | Mapping[str, Place], Device, torch.dtype | None], Reward]


def _file_or_folder(name: str, path: Place | Mapping[str, Place]) -> Place:
    if isinstance(path, Mapping):
        raise InputError(f"reward {name!r} reads one file or folder: give its path, not a mapping.")
    return path


def _clip(path: Place | Mapping[str, Place], device: Device, dtype: torch.dtype | None) -> Reward:
    return ClipScore(load_clip(_file_or_folder("clip", path), device, dtype))


def _aesthetic(path: Place | Mapping[str, Place], device: Device, dtype: torch.dtype | None) -> Reward:
    head, clip = _aesthetic_places(path)
    backbone = load_clip(clip, device, dtype)
    return Aesthetic(backbone, load_head(head, feature_width(backbone), device))


def _aesthetic_places(path: Place | Mapping[str, Place]) -> tuple[Place, Place]:
    """(head, CLIP): as given, or the CLIP folder looked for in the head's folder and beside it."""
    if isinstance(path, Mapping):
        if set(path) != {"head", "clip"}:
            raise InputError(f"reward 'aesthetic' got paths for {sorted(path)}: give 'head' and 'clip'.")
        return path["head"], path["clip"]
    folder = Path(path).expanduser() if Path(path).is_dir() else Path(path).expanduser().parent
    for place in (folder / CLIP_L_FOLDER, folder.parent / CLIP_L_FOLDER):
        if place.is_dir():
            return path, place
    raise InputError(
        f"reward 'aesthetic' found no folder {CLIP_L_FOLDER!r} in {str(folder)!r} or beside it: put CLIP ViT-L/14 "
        "there, or give both places as {'head': ..., 'clip': ...}."
    )


def _pickscore(path: Place | Mapping[str, Place], device: Device, dtype: torch.dtype | None) -> Reward:
    return load_pickscore(_file_or_folder("pickscore", path), device, dtype)


def _judge(place: Place | Mapping[str, Place]) -> Reward:
    """Of an address, or of settings as texts: {"url": ..., "model": ..., "max_calls": "2000"}."""
    given = place if isinstance(place, Mapping) else {"url": place}
    kinds = {field.name: _KINDS[str(field.type)] for field in fields(JudgeConfig) if str(field.type) in _KINDS}
    settings: dict[str, Any] = {}
    for name, value in given.items():
        if name not in kinds:
            raise InputError(f"reward 'judge' has no setting {name!r}: use {', '.join(kinds)}.")
        try:
            settings[name] = kinds[name](value)
        except ValueError:
            raise InputError(f"reward 'judge': {name} is {value!r}, which is not a number.") from None
    settings.setdefault("url", "")
    return Judge(JudgeConfig(**settings))


_KINDS: dict[str, Callable[[Any], Any]] = {"str": str, "str | None": str, "int": int, "float": float}
SIMPLE: dict[str, Callable[[], Reward]] = {
    "brightness": Brightness,
    "darkness": Darkness,
    "contrast": Contrast,
    "jpeg": JpegSize,
    "jpeg-incompressibility": lambda: JpegSize(compressible=False),
}
DEMO = ("demo-clip", "demo-judge")
MODELS: dict[str, Loader] = {
    "clip": _clip,
    "aesthetic": _aesthetic,
    "hpsv2": lambda path, device, dtype: load_hps(_file_or_folder("hpsv2", path), "v2.0", device, dtype),
    "hpsv2.1": lambda path, device, dtype: load_hps(_file_or_folder("hpsv2.1", path), "v2.1", device, dtype),
    "pickscore": _pickscore,
    "imagereward": lambda path, device, dtype: load_imagereward(_file_or_folder("imagereward", path), device, dtype),
}

NAMES = (*SIMPLE, *DEMO, *MODELS, "judge")
"""Every name `load` knows."""


@torch.inference_mode(False)  # a host may load inside inference mode; such tensors could never carry gradients
def load(
    name: str,
    path: Place | Mapping[str, Place] | None = None,
    device: Device = None,
    dtype: torch.dtype | None = None,
) -> Reward:
    """The reward of that name, ready to score.

    `path` is the local file or folder of a reward that has weights ("aesthetic" also takes {"head": ..., "clip": ...}),
    or the address of "judge", or its settings by name, "url" among them. `device` and `dtype` are where and how weights
    are kept (default: CPU, float32). Scores come out float32 whatever `dtype`. "hpsv2" is version 2.0. Raises
    `InputError` for an unknown name and for weights that are missing or are not what the name says; nothing is ever
    fetched here, see `rewards.download`.
    """
    if name in SIMPLE:
        return SIMPLE[name]()
    if name in DEMO:
        return load_demo(name, device, dtype)
    if name == "judge":
        return _judge(path or "")
    if name not in MODELS:
        raise InputError(f"reward {name!r} is unknown: use one of {', '.join(NAMES)}.")
    if path is None:
        raise InputError(f"reward {name!r} has weights: give the path of the local file or folder that holds them.")
    try:
        return MODELS[name](path, device, dtype)
    except RecursionError as error:  # a RuntimeError, but of the files
        raise InputError(f"reward {name!r}: the files at {str(path)!r} are damaged (nested too deeply).") from error
    except _NOT_OF_THE_FILES:
        raise
    except Exception as error:  # the settings of a foreign file can break a library in any way
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"reward {name!r}: the files at {str(path)!r} are damaged or of another model ({type(error).__name__}: "
            f"{reason})."
        ) from error
