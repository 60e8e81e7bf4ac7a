"""Reading weights that somebody else wrote: tensors only, never code, and one clear sentence when that fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError

_FORBIDDEN = re.compile(r"GLOBAL|unrecognized function|Can only (build|create)")
"""How torch's reader speaks of what would run code; it says "weights only" of every other damage, too."""
_SHOWN = 3  # names listed in a message before "and N more"


def find_file(path: str | Path, names: Iterable[str], what: str) -> Path:
    """`path` itself when it is a file, else the first of `names` (glob patterns allowed) inside the folder `path`."""
    path, names = Path(path).expanduser(), list(names)
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"{what}: {str(path)!r} does not exist. Give the file, or the folder that holds it.")
    for name in names:
        found = sorted(item for item in path.glob(name) if item.is_file())
        if found:
            return found[0]
    raise InputError(f"{what}: the folder {str(path)!r} holds none of {', '.join(names)}.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `InputError` when it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is not readable as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} holds a JSON {type(content).__name__}, not an object.")
    return content


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a PyTorch checkpoint, on the CPU, by name.

    The content tells which of them it is: people rename files, and a link may lead to a name without an ending.
    A checkpoint is read with `weights_only=True`: a pickle that would run code is refused, never executed. Wrappings
    the authors use are removed: {"state_dict": ...}, and the prefix "module.".
    """
    if not path.is_file():
        raise InputError(f"{str(path)!r} is not a file: weights are a .safetensors, .pt, .pth or .bin file.")
    safetensors = path.suffix == ".safetensors" or _starts_like_safetensors(path)
    content = _read_safetensors(path) if safetensors else _read_checkpoint(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    tensors = content if isinstance(content, Mapping) else {}
    weights = {str(k).removeprefix("module."): v for k, v in tensors.items() if isinstance(v, Tensor)}
    if not weights:
        raise InputError(f"{str(path)!r} holds no named tensors: it is not a file of weights.")
    odd = [name for name, w in weights.items() if w.is_quantized or w.is_nested or w.layout != torch.strided]
    if odd:
        raise InputError(f"{str(path)!r} holds quantized, nested or sparse tensors ({_some(odd)}): use the plain file.")
    return weights


def _starts_like_safetensors(path: Path) -> bool:
    """A length of eight bytes that fits into the file, then a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def _read_safetensors(path: Path) -> Mapping[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is corrupt or not a safetensors file ({error}): download it again.") from error


def _read_checkpoint(path: Path) -> Any:
    if _is_torchscript(path):
        raise InputError(
            f"{str(path)!r} is a TorchScript program, which can run code: use a state dict or safetensors instead."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # unpickling a foreign file can fail in any way; each of them means the same to a user
        if _FORBIDDEN.search(str(error)):
            raise InputError(
                f"{str(path)!r} holds more than tensors and would run code when opened: it is refused."
            ) from error
        raise InputError(
            f"{str(path)!r} is corrupt, cut short or not a PyTorch checkpoint ({type(error).__name__}): "
            "download it again."
        ) from error


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("constants.pkl") or "/code/" in name for name in archive.namelist())


@contextmanager
def empty_model(what: str) -> Iterator[None]:
    """Networks made inside have no tensors yet, see `fill_module`; settings that make none are an `InputError`."""
    try:
        with torch.device("meta"):
            yield
    except Exception as error:  # nothing is computed on this device: only the settings of a file can be at fault
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{what}: its settings make no model ({type(error).__name__}: {reason}).") from error


def fill_module(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    what: str,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    """`module`, built on the meta device, with these weights in it: frozen, in evaluation mode, where it will run.

    Every parameter must be there with the right shape and nothing may be left over; else `InputError`.
    """
    expected = module.state_dict()
    _check_names_and_shapes(expected, weights, what)
    ready = {name: weights[name].to(device=device, dtype=dtype or torch.float32) for name in expected}
    module.load_state_dict(ready, strict=True, assign=True)
    _fill_constants(module, device)
    module.requires_grad_(False)
    return module.train(False)


def _check_names_and_shapes(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], what: str) -> None:
    missing = [name for name in expected if name not in weights]
    extra = [name for name in weights if name not in expected]
    if missing or extra:
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has besides {_some(extra)}"] * bool(extra)
        raise InputError(f"{what}: this is another kind of model; the file {' and '.join(parts)}.")
    wrong = [
        f"{name} is {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if weights[name].shape != tensor.shape
    ]
    if wrong:
        raise InputError(f"{what}: this is a model of another size; {_some(wrong)}.")


def _some(items: list[str]) -> str:
    rest = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _fill_constants(module: nn.Module, device: str | torch.device | None) -> None:
    """Buffers that no file holds stay on the meta device after loading; the libraries used here have two of them."""
    for owner in module.modules():
        for name, buffer in list(owner.named_buffers(recurse=False)):
            if not buffer.is_meta:
                continue
            if name == "position_ids":
                value = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            elif name == "attn_mask":  # causal: no token sees a later one
                value = torch.full(buffer.shape, float("-inf")).triu(1)
            else:
                raise InputError(f"{type(owner).__name__}.{name} is not known here: this library version is too new.")
            owner.register_buffer(name, value.to(device), persistent=False)


def convert_to_safetensors(source: Path, target: Path) -> None:
    """Write the tensors of `source` as the safetensors file `target`.

    Written under another name and renamed when complete. `InputError` when `source` is refused or `target` cannot be
    written, a full disk for example.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights = {name: tensor.contiguous().clone() for name, tensor in read_weights(source).items()}
    part = target.with_name(target.name + ".part")
    try:
        save_file(weights, str(part), metadata={"format": "pt", "converted_from": source.name.removesuffix(".part")})
        shutil.copymode(source, part)  # safetensors writes files that only their owner can read
        os.replace(part, target)
    except (SafetensorError, OSError) as error:
        part.unlink(missing_ok=True)
        raise InputError(f"{str(target)!r} cannot be written ({error}): make room or choose another folder.") from error
