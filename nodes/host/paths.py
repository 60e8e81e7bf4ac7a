"""Where tokens and the states of runs are kept: ComfyUI's own folders, names contained in them."""

from __future__ import annotations

import re
from pathlib import Path

import folder_paths

from ...ipgo_engine.errors import InputError

TOKENS = "ipgo_tokens"
"""Name of the models folder; a section of `extra_model_paths.yaml` may add places under the same name."""

SUFFIX = ".safetensors"


def register() -> None:
    """Add models/ipgo_tokens to ComfyUI's folders, beside the places the user configured."""
    default = str(Path(folder_paths.models_dir) / TOKENS)
    places = list(folder_paths.folder_names_and_paths.get(TOKENS, ([], set()))[0])
    if default not in places:
        places.append(default)
    folder_paths.folder_names_and_paths[TOKENS] = (places, {SUFFIX})


def token_files() -> list[str]:
    """Names of all tokens files, as a list box shows them."""
    return folder_paths.get_filename_list(TOKENS)


def token_file(name: str) -> Path:
    """The file of that name in any of the places."""
    found = folder_paths.get_full_path(TOKENS, str(name))  # a prompt of somebody's script may hold a number
    if found is None:
        raise InputError(f"tokens file {name!r} is not in {', '.join(_places())}.")
    return Path(found)


def new_token_file(name: str) -> Path:
    """Where to save tokens under that name: in the first place, made if it is missing, never outside of it."""
    place = Path(_places()[0])
    file = contained(place, name, SUFFIX)
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def run_file(name: str, suffix: str) -> Path:
    """A file of a run (state to resume from, report) in output/ipgo, never outside of it."""
    place = Path(folder_paths.get_output_directory()) / "ipgo"
    file = contained(place, name, suffix)
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def contained(place: Path, name: str, suffix: str) -> Path:
    """place/name.suffix; names that would leave the place, or that some systems cannot store, are refused."""
    parts = [part for part in re.split(r"[\\/]+", name.strip()) if part not in ("", ".")]
    bad = [
        part for part in parts if part == ".." or re.search(r'[<>:"|?*\x00-\x1f]', part) or part.endswith((" ", "."))
    ]
    if not parts or bad or name.strip().startswith(("/", "\\")):
        raise InputError(f"the file name is {name!r}: use a plain one, with sub-folders if you like ('styles/vivid').")
    file = place.joinpath(*parts)
    if file.suffix.lower() != suffix:
        file = file.with_name(file.name + suffix)
    if place.resolve() not in file.resolve().parents:
        raise InputError(f"the file name is {name!r}: it leads outside of {place}.")
    return file


def _places() -> list[str]:
    if TOKENS not in folder_paths.folder_names_and_paths:
        register()
    return folder_paths.get_folder_paths(TOKENS)
