"""Every example workflow fits the node definitions; those of the demo model run through the queue."""

from __future__ import annotations

import json

import pytest
from comfyui_server import ROOT, Server, workflow_tools

FILES = sorted((ROOT / "workflows").glob("*.json"))
SMALL = {"epochs": 1, "iterations": 1, "steps": 3, "images_per_prompt": 1, "perturbations": 2, "permutations": 10}
"""Budgets of the test; everything else is as the workflow comes."""


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_fits_the_node_definitions(server, file):
    workflow = json.loads(file.read_text())
    found = workflow_tools("prompt").problems(workflow, server.info)
    assert [problem for problem in found if "ckpt_name" not in problem] == []


@pytest.mark.parametrize("file", [file for file in FILES if "_demo_" in file.name], ids=lambda file: file.stem)
def test_demo_workflow_runs(server, file):
    prompt = workflow_tools("prompt").to_prompt(json.loads(file.read_text()), server.info)
    for node in prompt.values():
        node["inputs"].update({key: value for key, value in SMALL.items() if key in node["inputs"]})
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"]["batch_size"] = min(node["inputs"]["batch_size"], 4)
    done = server.run(prompt)
    assert done.status == "success", done.error + server.log()[-2000:]
    shown = {number for number, node in prompt.items() if node["class_type"].startswith("Preview")}
    assert shown == set(done.outputs)
