"""Pipelines of diffusers: from local folders only, and what is needed of one."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError

_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
_VOCABULARIES = (("vocab.json", "merges.txt"), ("tokenizer.json",))
_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def load_pipeline(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> Any:
    """The pipeline in a local diffusers folder, without its safety checker. `InputError` when it cannot be used."""
    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise InputError(f"folder is {str(folder)!r}: there is no model_index.json; give a local diffusers folder.")
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        name = parts["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{index} cannot be read ({error!r}): give a local diffusers folder.") from error
    if name not in _PIPELINES:
        raise InputError(f"{index} describes a {name}: use a folder of {' or '.join(_PIPELINES)}.")
    _check_parts(Path(folder), parts)
    import diffusers

    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "torch_dtype": dtype or torch.float32}
    if name == _PIPELINES[0]:
        options |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    else:
        options |= {"add_watermarker": False}
    weights = [file.name for file in (Path(folder) / "unet").glob("*.safetensors")]
    if weights and all(".fp16" in name for name in weights):  # downloads of half the size hold nothing else
        options["variant"] = "fp16"
    try:
        with warnings.catch_warnings():
            # The option is called `dtype` in later versions, which still take this name; earlier ones take no other.
            warnings.simplefilter("ignore", FutureWarning)
            pipeline = getattr(diffusers, name).from_pretrained(str(folder), **options)
    except Exception as error:  # the libraries have one for every kind of damage
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"folder is {str(folder)!r}: it cannot be loaded ({type(error).__name__}: {reason}); "
            "every part must be there whole, as safetensors: copy it again."
        ) from error
    return pipeline.to(device) if device is not None else pipeline


def _check_parts(folder: Path, index: dict[str, Any]) -> None:
    """Raise `InputError` unless every part named in the index is there.

    Without a vocabulary the libraries make up a tokenizer, and the picture shows something else.
    """
    for name, entry in index.items():
        if name in _UNUSED or not isinstance(entry, list) or not entry or entry[0] is None:
            continue
        part = folder / name
        if not part.is_dir():
            raise InputError(f"folder is {str(folder)!r}: its part {name} is missing; copy the whole model again.")
        whole = any(all((part / file).is_file() for file in files) for files in _VOCABULARIES)
        if name.startswith("tokenizer") and not whole:
            raise InputError(
                f"folder is {str(folder)!r}: {name} has no vocabulary (vocab.json and merges.txt, or tokenizer.json); "
                "copy the whole model again."
            )


def check_pipeline(pipeline: Any) -> None:
    """Raise `InputError` unless this is a pipeline whose parts can be used."""
    missing = [name for name in _PARTS if getattr(pipeline, name, None) is None]
    if missing:
        kind = type(pipeline).__name__
        raise InputError(f"pipeline is a {kind} without {', '.join(missing)}: use {' or '.join(_PIPELINES)}.")


def image_size(pipeline: Any, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width in pixels, the model's own where not given."""
    factor = int(pipeline.vae_scale_factor)
    sample = pipeline.unet.config.sample_size
    native = (sample, sample) if isinstance(sample, int) else tuple(sample)
    sizes = [given if given is not None else own * factor for given, own in zip((height, width), native, strict=True)]
    for name, size in zip(("height", "width"), sizes, strict=True):
        if size < factor or size % factor:
            nearest = max(size // factor, 1) * factor
            raise InputError(f"{name} is {size}: use a multiple of {factor} pixels, for example {nearest}.")
    return int(sizes[0]), int(sizes[1])
