"""What nodes read and write besides tokens: reward weights, pictures, the state of a run; all of it numbered."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args
from torch import Tensor

from ...ipgo_engine.errors import InputError
from ...ipgo_engine.report import to_pil
from . import paths

SHIPPED_TOKENS = Path(__file__).resolve().parents[2] / "assets" / "tokens"
"""Tokens for the demo model that come with the pack; new ones are never written there."""
REWARDS = "rewards"
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
NOTHING = "(nothing found)"
LONGEST_NAME = 200
"""Bytes of a name; file systems take 255, number, ending and the mark of an unfinished file included."""


def register_folders() -> None:
    """Make `models/ipgo_tokens` and `models/rewards` known, beside what extra_model_paths.yaml says and what ships."""
    paths.register()
    folder_paths.add_model_folder_path(paths.TOKENS, str(SHIPPED_TOKENS))
    folder_paths.add_model_folder_path(REWARDS, os.path.join(folder_paths.models_dir, REWARDS))


def reward_places() -> list[str]:
    """Files and folders with reward weights, by name."""
    names = set()
    for folder in map(Path, folder_paths.get_folder_paths(REWARDS)):
        for item in folder.iterdir() if folder.is_dir() else ():
            if item.is_dir() or item.suffix in WEIGHTS:
                names.add(item.name)
    return sorted(names)


def reward_root() -> Path:
    """Where downloaded reward weights go: the first place that ComfyUI knows."""
    return Path(folder_paths.get_folder_paths(REWARDS)[0])


def reward_path(name: str) -> Path:
    """The file or folder of that name; `InputError` with where to put it when there is none."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths(REWARDS)]
    for folder in folders:
        if folder.is_dir() and name in {item.name for item in folder.iterdir()}:
            return folder / name
    where = " or ".join(map(str, folders))
    raise InputError(
        f"weights is {name!r}, which is not in {where}: fetch it with the node Download Reward Weights, or put it "
        "there, and press R."
    )


def state_file(name: str) -> Path:
    """The file from which the run of that name is resumed."""
    return paths.run_file(checked(name), ".resume.safetensors")


def next_token_file(name: str) -> Path:
    """A new numbered tokens file."""
    return numbered(lambda part: paths.new_token_file(part), name)


def next_noise_file(name: str) -> Path:
    """A new numbered noise file, beside the pictures."""
    return numbered(lambda part: paths.run_file(part, ".noise.safetensors"), name)


def checked(name: str) -> str:
    """The name without blanks around it, if there is one and file systems can store it with a number and an ending."""
    name = name.strip()
    if not name:
        raise InputError("the file name (save_as or filename_prefix) is empty: write one.")
    longest = max(len(part.encode()) for part in re.split(r"[\\/]", name))
    if longest > LONGEST_NAME:
        raise InputError(
            f"the file name is {longest} bytes long: use at most {LONGEST_NAME} for the file and for each folder."
        )
    return name


def numbered(place: Callable[[str], Path], name: str) -> Path:
    """The first of `name_00001`, `name_00002`, ... that does not exist yet."""
    number, name = 1, checked(name)
    while (path := place(f"{name}_{number:05}")).exists():
        number += 1
    return path


def save_images(images: Tensor, name: str, prompt: Any = None, extra: Any = None) -> list[Path]:
    """Images (B, 3, H, W) as numbered PNG files in output/ipgo, with the workflow in them."""
    from PIL.PngImagePlugin import PngInfo

    information = None
    if not args.disable_metadata:
        information = PngInfo()
        for key, value in {"prompt": prompt, **(extra or {})}.items():
            if value is not None:
                information.add_text(key, json.dumps(value))
    found = []
    for image in images:
        path = numbered(lambda part: paths.run_file(part, ".png"), name)
        to_pil(image).save(path, pnginfo=information, compress_level=4)
        found.append(path)
    return found


def shown(path: Path) -> str:
    """A path as a user knows it: below the models or output folder."""
    for folder in (folder_paths.get_output_directory(), folder_paths.models_dir):
        if path.is_relative_to(folder):
            return str(Path(Path(folder).name) / path.relative_to(folder))
    return str(path)
