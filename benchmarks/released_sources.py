"""The authors' own code, read from a local checkout and run on our models; nothing of it is copied here.

Where it cannot run as it stands, the difference is one of the substitutions below: each is text found in the source
(a missing one is an error, not a silent skip) or a name put into its namespace.
"""

from __future__ import annotations

import contextlib
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Loss = Callable[..., Any]


def substitute(source: str, changes: Mapping[str, str]) -> str:
    """`source` with every key replaced wherever it stands."""
    for old, new in changes.items():
        if old not in source:
            raise SystemExit(f"The checkout does not hold {old!r}: this is not the version that was compared.")
        source = source.replace(old, new)
    return source


@dataclass
class Probe:
    """Stands in for `GradScaler`: loss scaling is off (float32), and both loops call it at known places.

    `first` gets the optimizer before the first clipping; `done` is called at the end of every iteration.
    """

    first: Callable[[Any], None]
    done: Callable[[], None]
    _seen: bool = field(default=False, init=False)

    def scale(self, loss: Tensor) -> Tensor:
        """Unchanged."""
        return loss

    def unscale_(self, optimizer: Any) -> None:
        """The gradients are complete and not yet clipped."""
        if not self._seen:
            self.first(optimizer)
        self._seen = True

    def step(self, optimizer: Any) -> None:
        """The update."""
        optimizer.step()

    def update(self) -> None:
        """The end of an iteration."""
        self.done()


# -- the IPGO notebook ------------------------------------------------------------------------------------------------


def notebook_cell(checkout: Path, marker: str) -> str:
    """The source of the one code cell that holds `marker`."""
    (path,) = checkout.glob("*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = ["".join(c["source"]) for c in cells if c["cell_type"] == "code" and marker in "".join(c["source"])]
    if len(found) != 1:
        raise SystemExit(f"{path} has {len(found)} cells with {marker!r}: expected one.")
    return found[0]


def ipgo_names(checkout: Path) -> dict[str, Any]:
    """What the notebook's cell of token modules defines."""
    import math
    import os
    import random

    import numpy as np
    from torch.nn.utils import parametrize
    from torch.nn.utils.parametrizations import orthogonal

    names: dict[str, Any] = {
        "torch": torch,
        "nn": torch.nn,
        "F": torch.nn.functional,
        "Tensor": Tensor,
        "parametrize": parametrize,
        "orthogonal": orthogonal,
        "np": np,
        "os": os,
        "math": math,
        "random": random,
    }
    exec(compile(notebook_cell(checkout, "class ProjX"), "notebook: tokens", "exec"), names)
    return names


@dataclass(frozen=True)
class Setting:
    """What both implementations are given."""

    pipeline: Any
    prompt: str
    steps: int
    size: int
    guidance: float
    device: str


def run_ipgo(
    checkout: Path, setting: Setting, basis: int, epochs: int, reward: Loss, probe: Callable[[dict[str, Any]], Probe]
) -> None:
    """The notebook's cell "Individual Training" on one prompt.

    Its constants (size, steps, guidance, width, basis, epochs) take our values; mixed precision, printing, the picture
    before training and the checkpoint written at every new best are left out. `probe` gets the notebook's names.
    """
    from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler

    pipeline, steps = setting.pipeline, setting.steps
    source = substitute(
        notebook_cell(checkout, "#Individual Training"),
        {
            "height = 512": f"height = {setting.size}",
            "width = 512": f"width = {setting.size}",
            "num_inference_steps = 50": f"num_inference_steps = {steps}",
            "if i < 48:": f"if i < {steps - 2}:",
            "guidance_scale = 7.5": f"guidance_scale = {setting.guidance}",
            "text_emb_dim=768": f"text_emb_dim={pipeline.text_encoder.config.hidden_size}",
            "proj_dim=30": f"proj_dim={basis}",
            "Epochs = 50": f"Epochs = {epochs}",
            "0.18215": str(pipeline.vae.config.scaling_factor),
            "torch.cuda.amp.GradScaler()": "GradScaler()",
            "torch.autocast(device_type='cuda', dtype=torch.float16)": "full_precision()",
            "torch.save(": "not_saved(",
        },
    )
    names = ipgo_names(checkout)
    remember_gradients(names["ProjX"])
    names |= {
        "prompt_bases_tot": [setting.prompt],
        "vae": pipeline.vae,
        "text_encoder": pipeline.text_encoder,
        "unet": pipeline.unet,
        "tokenizer": pipeline.tokenizer,
        "scheduler": LMSDiscreteScheduler.from_config(pipeline.scheduler.config),
        "device": torch.device(setting.device),
        "data_type": torch.float32,
        "inference_data_type": torch.float32,
        "image_pipeline_default": lambda *_: torch.zeros(1, 3, 8, 8, device=setting.device),
        "loss_fn_hps": lambda image, prompts: (None, reward(image, prompts)),
        "full_precision": contextlib.nullcontext,
        "not_saved": lambda *_: None,
        "tqdm": lambda items, **_: items,
        "print": lambda *_: None,
    }
    names["GradScaler"] = lambda: probe(names)
    with TemporaryDirectory() as folder:
        names["INDIVIDUAL_TRAINING_PATH"] = folder
        exec(compile(source, "notebook: individual training", "exec"), names)


def remember_gradients(tokens_class: Any) -> None:
    """The outputs of the notebook's token module keep their gradient."""
    original = tokens_class.forward

    def forward(self: Any) -> Tensor:
        out = original(self)
        if out.requires_grad:
            out.retain_grad()
        return out

    tokens_class.forward = forward


# -- the noise paper's script -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def importable(checkout: Path) -> Iterator[None]:
    """The checkout on the import path, and the package `rewards` of it not in the way afterwards."""
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        sys.path.remove(str(checkout))
        for name in [name for name in sys.modules if name == "rewards" or name.startswith("rewards.")]:
            del sys.modules[name]


def noise_script(checkout: Path, changes: Mapping[str, str]) -> types.ModuleType:
    """`dno_stable_diffusion.py` as a module, with substitutions; its `main` is not run.

    Names that newer versions of diffusers no longer have are imported and never used by it: empty stand-ins.
    """
    import diffusers.loaders
    import diffusers.models.attention_processor as processors

    path = checkout / "dno_stable_diffusion.py"
    module = types.ModuleType("released_noise_script")
    stand_ins = [(diffusers.loaders, "AttnProcsLayers"), (processors, "LoRAAttnProcessor")]
    with contextlib.ExitStack() as stack:
        stack.enter_context(importable(checkout))
        for owner, name in stand_ins:
            if not hasattr(owner, name):
                stack.enter_context(mock.patch.object(owner, name, object, create=True))
        exec(compile(substitute(path.read_text(encoding="utf-8"), changes), str(path), "exec"), module.__dict__)
    return module


def run_noise(
    checkout: Path, setting: Setting, eta: float, iterations: int, regularization: float, probe: Probe
) -> None:
    """The script's `main` with its own whiteness reward, in float32; the latent's size and the model are ours."""
    side = setting.size // setting.pipeline.vae_scale_factor
    module = noise_script(
        checkout,
        {
            "4, 64, 64": f"4, {side}, {side}",
            "0.18215": str(setting.pipeline.vae.config.scaling_factor),
            'autocast(device_type="cuda", dtype=amp_dtype, enabled=use_amp)': "full_precision()",
        },
    )
    stand_in = types.SimpleNamespace(from_pretrained=lambda _: setting.pipeline)
    names = {"StableDiffusionPipeline": stand_in, "full_precision": contextlib.nullcontext}
    names |= {"GradScaler": lambda **_: probe, "print": lambda *_: None}
    module.__dict__.update(names)
    arguments: dict[str, Any] = {
        "prompt": setting.prompt,
        "num_steps": setting.steps,
        "opt_time": setting.steps,
        "eta": eta,
        "guidance_scale": setting.guidance,
        "device": setting.device,
        "opt_steps": iterations,
        "objective": "white",
        "precision": "fp32",
        "gamma": regularization,
    }
    with TemporaryDirectory() as folder:
        line = ["script", *(part for k, v in arguments.items() for part in (f"--{k}", str(v))), "--output", folder]
        with mock.patch.object(sys, "argv", line):
            module.main()


def released_regularizer(checkout: Path, noise: Tensor, permutations: int = 100) -> Tensor:
    """The script's loss of the noises (steps + 1, C, h, w), blocks of 4: about -2 R(z) plus a constant."""
    module = noise_script(checkout, {})
    return module.compute_probability_regularization(noise, 1.0, len(noise) - 1, 1, permutations)
