"""The workflows for a user's own checkpoint, on checkpoints with random weights, through stock loader and queue.

Slow: the files are 2 GB each. The pictures are 64 pixels wide, everything else is as the workflows come.
"""

from __future__ import annotations

import gc
import json

import checkpoints
import pytest
from comfyui_server import ROOT, Server, workflow_tools

pytestmark = pytest.mark.slow

STEPS = 3
SMALL = {"epochs": 1, "iterations": 1, "steps": STEPS, "width": 64, "height": 64, "permutations": 10}
TOKENS, NOISE_MODEL = 0, 3  # outputs of the two optimizers
IMAGES = {"IPGOTrainTokens": 1, "IPGONoiseOptimize": 5}
REPORT = {"IPGOTrainTokens": 5, "IPGONoiseOptimize": 9}


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def world(request):
    """A server with one checkpoint, and the family."""
    with Server() as server:
        folder = server.base / "models" / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        weights = checkpoints.write(request.param, folder / "random.safetensors")
        assert request.param != "sd15" or weights == 859_520_964  # the real size
        gc.collect()
        yield server, request.param


def prepared(server, family, subject):
    """The workflow as a prompt with a small budget, and the number of its optimizer."""
    (file,) = (ROOT / "workflows").glob(f"*_{family}_{subject}.json")
    prompt = workflow_tools("prompt").to_prompt(json.loads(file.read_text()), server.info)
    for node in prompt.values():
        node["inputs"].update({key: value for key, value in SMALL.items() if key in node["inputs"]})
        if node["class_type"] == "CheckpointLoaderSimple":
            node["inputs"]["ckpt_name"] = "random.safetensors"
    (optimizer,) = [n for n, node in prompt.items() if node["class_type"] in IMAGES]
    return prompt, optimizer


def add_stock(prompt, optimizer):
    """KSampler and VAE Decode on what the optimizer hands over, compared with its images."""
    node = prompt[optimizer]
    inputs, kind = node["inputs"], node["class_type"]
    if kind == "IPGOTrainTokens":
        for name, text in (("positive", inputs["prompt"]), ("negative", inputs["negative"])):
            prompt[name] = {"class_type": "CLIPTextEncode", "inputs": {"clip": inputs["clip"], "text": text}}
        prompt["applied"] = {
            "class_type": "IPGOApplyConditioning",
            "inputs": {
                "conditioning": ["positive", 0],
                "tokens": [optimizer, TOKENS],
                "strength": 1.0,
                "sides": "both",
            },
        }
        prompt["latent"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}}
        links = {"model": inputs["model"], "positive": ["applied", 0], "negative": ["negative", 0]}
        links["latent_image"] = ["latent", 0]
    else:
        links = {key: inputs[key] for key in ("positive", "negative", "latent_image")}
        links["model"] = [optimizer, NOISE_MODEL]
    settings = {key: inputs[key] for key in ("seed", "steps", "cfg", "sampler_name", "scheduler")}
    prompt["stock"] = {"class_type": "KSampler", "inputs": {**links, **settings, "denoise": 1.0}}
    prompt["decoded"] = {"class_type": "VAEDecode", "inputs": {"samples": ["stock", 0], "vae": inputs["vae"]}}
    prompt["same"] = {
        "class_type": "IPGOTestSameImages",
        "inputs": {"a": [optimizer, IMAGES[kind]], "b": ["decoded", 0]},
    }
    prompt["report"] = {"class_type": "PreviewAny", "inputs": {"source": [optimizer, REPORT[kind]]}}


@pytest.mark.parametrize("subject", ["train_tokens", "optimize_noise"])
def test_workflow_with_a_checkpoint_equals_stock_nodes(world, subject):
    server, family = world
    prompt, optimizer = prepared(server, family, subject)
    add_stock(prompt, optimizer)
    done = server.run(prompt)
    assert done.status == "success", done.error + server.log()[-2000:]
    assert done.text("same") == "equal"
    report = done.text("report")
    assert "after 1 updates" in report
    assert "nan" not in report.lower().split()
