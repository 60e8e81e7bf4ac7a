"""Tests against a real ComfyUI checkout: COMFYUI_PATH, or ~/comfy/ComfyUI (comfy-cli's place).

ComfyUI is imported in this process from its own folder. The pack is loaded the way ComfyUI loads custom nodes, as a
package made from its path; the repository root is taken off `sys.path`, because its `nodes` would hide ComfyUI's.
Without a checkout nothing here runs, and one line at the end of the report says so.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from comfyui_server import COMFYUI

FOUND = (COMFYUI / "comfy" / "samplers.py").is_file()
MISSING = (
    f"tests/comfy: NOT RUN, no ComfyUI checkout at {COMFYUI} (set COMFYUI_PATH): "
    "the host adapter, its gradients and its bit-for-bit equality with stock nodes were not tested."
)

if FOUND:
    sys.path.insert(0, str(Path(__file__).parent))
    import host  # starts ComfyUI
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; run with --slow")
    if FOUND and config.getoption("--second-device"):
        import pytest
        import second_device

        if second_device.MISSING:
            raise pytest.UsageError(f"--second-device {second_device.MISSING}")
        host.compute_on(second_device.start())
    for noise in ("ignore::UserWarning:torchsde", "ignore::UserWarning:comfy", "ignore::DeprecationWarning"):
        config.addinivalue_line("filterwarnings", noise)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")
    parser.addoption(
        "--second-device", action="store_true", help="on a device that is not the CPU (tests/second_device)"
    )


def pytest_collection_modifyitems(config, items):
    import pytest

    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow: run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"tests/comfy: ran against {COMFYUI}" if FOUND else MISSING)
