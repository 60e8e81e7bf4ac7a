"""The generator of --model: the embedded demo model or a local diffusers folder."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..generators.base import Generator
from .inputs import parse_size

DEFAULT_CFG = 7.5
_NUMBER, _SIZE = (int, float), (int, type(None))


class Setting(NamedTuple):
    """One setting of the model: its option, the types it may have in a file, and what it is when nobody says so."""

    option: str
    kinds: Any
    default: Any = None


SETTINGS = {
    "model": Setting("--model", str, "demo"),
    "sampler": Setting("--sampler", str, "ddim"),
    "eta": Setting("--eta", _NUMBER, 0.0),
    "steps": Setting("--steps", int, 25),
    "guidance_scale": Setting("--cfg", _NUMBER),
    "negative_prompt": Setting("--negative", (str, type(None))),
    "width": Setting("--size", _SIZE),
    "height": Setting("--size", _SIZE),
    "padded": Setting("--unpadded", bool, True),
    "dtype": Setting("--dtype", str, "float32"),
    "autocast": Setting("--autocast", str, "none"),
}
"""The parser leaves what is not typed empty, so that a noise file can bring its own."""


def choose_device(name: str) -> Any:
    """The torch device of that name; "auto" is a GPU where there is one."""
    import torch

    if name == "auto":
        mps = getattr(torch.backends, "mps", None)
        name = "cuda" if torch.cuda.is_available() else "mps" if mps is not None and mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" makes tensors without values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"device is {name!r}: it cannot be used here ({reason}); try cpu.") from error
    return device


def set_threads(threads: int | None) -> None:
    """Limit torch's CPU threads."""
    import torch

    if threads is None:
        return
    most = 4 * (os.cpu_count() or 1)  # thousands of threads end the process instead of helping it
    if not 1 <= threads <= most:
        raise InputError(f"threads is {threads}: use 1 to {most}.")
    torch.set_num_threads(threads)


def model_settings(
    arguments: argparse.Namespace, stored: Mapping[str, Any] | None = None, source: str | None = None
) -> dict[str, Any]:
    """What decides about a picture besides prompt and seed; stored with every run and compared on --resume.

    `stored` are the settings in the file `source`, whose noise makes its picture with these alone: they take the place
    of what was not typed, and what was typed must not contradict them.
    """
    from ..generators.samplers import SAMPLERS

    typed, stored = _typed(arguments), _checked(stored or {}, source)
    different = [SETTINGS[key].option for key, value in typed.items() if _contradicts(key, value, stored)]
    if different:
        was = ", ".join(f"{SETTINGS[key].option} {stored[key]}" for key in typed if SETTINGS[key].option in different)
        raise InputError(f"{source} was made with {was}: leave {', '.join(dict.fromkeys(different))} out.")
    found = {key: typed.get(key, stored.get(key, setting.default)) for key, setting in SETTINGS.items()}
    if found["sampler"] not in SAMPLERS:
        raise InputError(f"sampler is {found['sampler']!r}: use one of {', '.join(SAMPLERS)}.")
    demo = found["model"] == "demo"
    if not demo and not Path(found["model"]).is_dir():
        raise InputError(f"model folder {found['model']} does not exist: give a local diffusers folder, or demo.")
    if found["guidance_scale"] is None:
        found["guidance_scale"] = demo_cfg() if demo else DEFAULT_CFG
    check_precision(found["dtype"], found["autocast"])
    return found


def _typed(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given on the command line."""
    width, height = parse_size(arguments.size)
    model = arguments.model
    given = {
        "model": model if model in (None, "demo") else str(Path(model).resolve()),
        "sampler": arguments.sampler,
        "eta": arguments.eta,
        "steps": arguments.steps,
        "guidance_scale": arguments.cfg,
        "negative_prompt": arguments.negative,
        "width": width,
        "height": height,
        "padded": False if arguments.unpadded else None,
        "dtype": arguments.dtype,
        "autocast": arguments.autocast,
    }
    return {key: value for key, value in given.items() if value is not None}


def _checked(stored: Mapping[str, Any], source: str | None) -> Mapping[str, Any]:
    """The stored settings, after a look at their kinds."""
    for key, value in stored.items():
        kinds = SETTINGS[key].kinds if key in SETTINGS else object
        if not isinstance(value, kinds) or (isinstance(value, bool) and key != "padded"):
            raise InputError(f"{source} is damaged: its setting {key} is {value!r}; copy it again.")
    return stored


def _contradicts(key: str, value: Any, stored: Mapping[str, Any]) -> bool:
    """Whether a typed setting would make another picture than the stored one."""
    if key not in stored or key in ("dtype", "autocast"):  # rounding alone: noise from a GPU must open on a CPU, too
        return False
    was = stored[key]
    if key in ("width", "height") and was is None:  # the model's own size, which the noise's shape is compared with
        return False
    if key == "model" and was != "demo" and not Path(was).is_dir():  # the folder has moved
        return False
    return was != value


def check_precision(dtype: str, autocast: str) -> None:
    """Raise `InputError` for two kinds of half precision at once, which no layer can compute with."""
    if {dtype, autocast} == {"float16", "bfloat16"}:
        raise InputError(f"--dtype {dtype} contradicts --autocast {autocast}: leave --autocast out or use one type.")


def demo_cfg() -> float:
    """The guidance scale the demo model looks best with."""
    from .. import demo

    return demo.GUIDANCE_SCALE


def make_generator(settings: dict[str, Any], device: Any, should_stop: Callable[[], bool]) -> Generator:
    """The generator of these settings."""
    _quiet()
    import torch

    from .. import demo
    from ..generators.diffusers import DiffusersGenerator

    options = dict(settings)
    folder, dtype = options.pop("model"), getattr(torch, options.pop("dtype"))
    autocast = options.pop("autocast")
    options["autocast"] = None if autocast == "none" else getattr(torch, autocast)
    options["should_stop"] = should_stop
    where = demo.model_path() if folder == "demo" else folder
    return DiffusersGenerator.load(where, dtype=dtype, device=device, **options)


def _quiet() -> None:
    """What the libraries say while loading is about their own options, not about the user's."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
