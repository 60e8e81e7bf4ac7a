"""A real ComfyUI in this process, and the pack loaded into it as a custom node.

`COMFYUI_ARGUMENTS` replaces its command line (`--cpu`). `compute_on` moves it to a device it does not know.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import tempfile
import types
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from comfyui_server import COMFYUI, ROOT

ARGUMENTS = os.environ.get("COMFYUI_ARGUMENTS", "--cpu").split()
PACK = "ipgo_pack_under_test"


def _start_comfyui() -> None:
    """Import ComfyUI with its command line set and a base folder of its own; the root's `nodes` must not hide its."""
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    sys.path.insert(0, str(COMFYUI))
    base = tempfile.mkdtemp(prefix="comfy-test-")
    arguments, sys.argv = sys.argv, ["main.py", *ARGUMENTS, "--base-directory", base]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = arguments
    import utils.extra_config  # noqa: F401  claims the package name `utils`

    logging.getLogger().setLevel(logging.WARNING)
    import comfy.utils
    import torch

    comfy.utils.set_progress_bar_enabled(False)
    torch.set_num_threads(1)  # the models are tiny, and threads waiting for each other cost more than they give


def _load_pack() -> None:
    """As ComfyUI's loader does: a module made from the folder's path, sub-modules relative to it."""
    entry = ROOT / "__init__.py"
    if entry.is_file():
        spec = importlib.util.spec_from_file_location(PACK, entry, submodule_search_locations=[str(ROOT)])
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACK] = module
        spec.loader.exec_module(module)
    else:
        module = types.ModuleType(PACK)
        module.__path__ = [str(ROOT)]
        sys.modules[PACK] = module


_start_comfyui()
_load_pack()


def pack(name: str):
    """A module of the pack, `pack("nodes.host.generator")` for example."""
    return importlib.import_module(f"{PACK}.{name}")


def compute_on(device) -> None:
    """Models and samplers go to `device`, as they go to a GPU; float32, as on the CPU."""
    import comfy.model_management as management

    def memory(_device=None, torch_total_too=False, torch_free_too=False):
        return (8 << 30, 8 << 30) if torch_total_too or torch_free_too else 8 << 30

    management.cpu_state, management.vram_state = management.CPUState.GPU, management.VRAMState.NORMAL_VRAM
    management.directml_enabled, management.directml_device = True, device  # the branch that asks nothing of a driver
    management.get_torch_device = lambda: device
    management.get_total_memory = management.get_free_memory = memory
    for name in vars(management):
        if name in ("should_use_fp16", "should_use_bf16") or (
            name.startswith("supports_") and name.endswith("compute")
        ):
            setattr(management, name, lambda *args, **kwargs: False)


@contextmanager
def node():
    """The mode in which ComfyUI's executor runs every node."""
    import torch

    with torch.inference_mode():
        yield


def run_node(kind, **inputs):
    """The first output of a core node, of the old schema or the new one."""
    with node():
        result = kind.execute(**inputs) if hasattr(kind, "define_schema") else getattr(kind(), kind.FUNCTION)(**inputs)
        return result.args[0] if hasattr(result, "args") else result[0]
