"""Train the tokens that ship with the pack: `python -m tools.workflows.demo_tokens --server http://127.0.0.1:8188`.

One set for a list of prompts of the demo model, through the node itself. The file is written by the server; this copies
it to assets/tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from .definitions import inputs_of
from .pictures import run

TARGET = Path(__file__).resolve().parents[2] / "assets" / "tokens" / "ipgo_demo.safetensors"
PROMPTS = ("dog face", "cat face", "panda face", "fox face", "lion face", "pig face", "tiger face", "rabbit face")


def prompt(info: dict[str, Any], epochs: int) -> dict[str, Any]:
    """The smallest graph that trains."""
    training = {spec.name: spec.default for spec in inputs_of(info["IPGOTrainTokens"]) if spec.is_widget}
    training |= {
        "model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "reward": ["2", 0], "prompt": "\n".join(PROMPTS),
        "width": 128, "height": 128, "seed": 11, "images_per_prompt": 1, "steps": 10, "cfg": 3.0, "epochs": epochs,
        "learning_rate": 0.05, "backprop_steps": 0,
        "save_as": "ipgo_demo", "prompts_per_step": 4, "preview_every": 10,
    }  # fmt: skip
    return {
        "1": {"class_type": "IPGODemoModel", "inputs": {}},
        "2": {"class_type": "IPGODemoReward", "inputs": {"network": "demo-clip"}},
        "3": {"class_type": "IPGOTrainTokens", "inputs": training},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 5]}},
    }


def main() -> int:
    """Train and copy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="http://127.0.0.1:8188", help="a running ComfyUI with this pack")
    parser.add_argument("--tokens", type=Path, required=True, help="its models/ipgo_tokens folder")
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    with urlopen(f"{arguments.server}/object_info") as answer:
        info = json.load(answer)
    outputs = run(arguments.server, prompt(info, arguments.epochs))
    print(outputs["4"]["text"][0])
    newest = max(arguments.tokens.glob("ipgo_demo_*.safetensors"), key=lambda path: path.stat().st_mtime)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(newest, TARGET)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
