"""A second device without a GPU: tensors that would meet on the wrong device there raise an error here, too.

It computes with the CPU's kernels, so it shows nothing about speed, memory or rounding of a GPU. Needs a C++ compiler
and ninja; the first start compiles for half a minute.
"""

from __future__ import annotations

import functools
import shutil
import types
from pathlib import Path

import torch

MISSING = None if shutil.which("c++") and shutil.which("ninja") else "needs c++ and ninja"


class _Module(types.ModuleType):
    """What `torch.second` answers."""

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        """The device's own random numbers are only drawn from generators."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


@functools.cache
def start() -> torch.device:
    """The device; from now on it exists in this process."""
    from torch.utils.cpp_extension import load

    torch.utils.rename_privateuse1_backend("second")
    extension = load("ipgo_second_device", [str(Path(__file__).with_name("device.cpp"))], extra_cflags=["-O1"])
    torch._register_device_module("second", _Module("second"))
    torch.utils.generate_methods_for_privateuse1_backend()
    extension.start()
    return torch.device("second", 0)
