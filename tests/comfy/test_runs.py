"""The run nodes, called as the executor calls them: what is kept, taken, resumed and said when the end goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
import sys
import types
from pathlib import Path

import comfy.cli_args
import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import host
import nodes as comfy_nodes
import pytest
import torch
from comfy_api.latest import io
from PIL import Image

errors = host.pack("ipgo_engine.errors")
state_format = host.pack("ipgo_engine.formats.state")
noise_format = host.pack("ipgo_engine.formats.noise")
files = host.pack("nodes.host.files")
resuming = host.pack("nodes.resuming")
NEW, CONTINUE, TAKE = host.pack("nodes.schema").RESUME
RUNS = ("IPGOTrainTokens", "IPGONoiseOptimize", "IPGOJointOptimize")
Interrupt = comfy.model_management.InterruptProcessingException


@pytest.fixture(scope="module", autouse=True)
def tokens_apart(tmp_path_factory):
    """Tokens go where no other test looks."""
    with pytest.MonkeyPatch.context() as patch:
        place = ([str(tmp_path_factory.mktemp("tokens"))], {".safetensors"})
        patch.setitem(folder_paths.folder_names_and_paths, "ipgo_tokens", place)
        yield


@pytest.fixture(scope="module")
def ours():
    """Every node of the pack by its name."""
    extension = asyncio.run(sys.modules[host.PACK].comfy_entrypoint())
    return {kind.define_schema().node_id: kind for kind in asyncio.run(extension.get_node_list())}


class World:
    """The demo model and small runs on it."""

    def __init__(self, ours):
        self.ours = ours
        self.model, self.clip, self.vae = self.call("IPGODemoModel")
        with host.node():
            self.positive, self.negative = (self.text(text) for text in ("red heart", ""))
            self.latent = comfy_nodes.EmptyLatentImage().generate(128, 128, 1)[0]

    def text(self, text):
        return comfy_nodes.CLIPTextEncode().encode(self.clip, text)[0]

    def call(self, node, **inputs):
        """Outputs of a node, everything else at its default."""
        parts = self.ours[node].define_schema().inputs
        defaults = {part.id: part.default for part in parts if getattr(part, "default", None) is not None}
        with host.node():
            return self.ours[node].execute(**defaults | inputs).args

    def noise(self, save_as, reward=None, **inputs):
        """Noise optimization with a small budget."""
        settings = {
            "model": self.model, "vae": self.vae, "positive": self.positive, "negative": self.negative,
            "latent_image": self.latent, "prompt": "red heart", "steps": 2, "cfg": 2.0, "sampler_name": "euler",
            "scheduler": "normal", "iterations": 1, "permutations": 5,
        }  # fmt: skip
        return self.call("IPGONoiseOptimize", save_as=save_as, reward=reward or Brightness(), **settings | inputs)

    def tokens(self, save_as, reward=None, **inputs):
        """Token training with a small budget."""
        settings = {
            "model": self.model, "clip": self.clip, "vae": self.vae, "prompt": "red heart", "width": 128,
            "height": 128, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "epochs": 1, "prefix_length": 2,
            "suffix_length": 2,
        }  # fmt: skip
        return self.call("IPGOTrainTokens", save_as=save_as, reward=reward or Brightness(), **settings | inputs)

    def joint(self, save_as, reward=None, **inputs):
        """Tokens and noise with a small budget."""
        settings = {
            "model": self.model, "clip": self.clip, "vae": self.vae, "prompt": "red heart", "width": 128,
            "height": 128, "steps": 2, "cfg": 2.0, "sampler_name": "euler", "iterations": 1, "permutations": 5,
        }  # fmt: skip
        return self.call("IPGOJointOptimize", save_as=save_as, reward=reward or Brightness(), **settings | inputs)


@pytest.fixture(scope="module")
def world(ours):
    return World(ours)


class Brightness:
    """A reward that goes wrong at one call."""

    name, differentiable = "brightness", True

    def __init__(self, at=0, wrong=None):
        self.at, self.wrong, self.calls = at, wrong, 0

    def score(self, images, prompts):
        self.calls += 1
        if self.calls == self.at:
            self.wrong()
        return images.mean((1, 2, 3))


def cancel():
    comfy.model_management.interrupt_current_processing(True)


def cancel_now():
    """As a reward or a layer does that polls Cancel itself."""
    cancel()
    comfy.model_management.throw_exception_if_processing_interrupted()


def out_of_memory():
    raise torch.cuda.OutOfMemoryError("simulated")


def written(name):
    """Names of the files of a run in the output folder."""
    return sorted(path.name for path in (Path(folder_paths.get_output_directory()) / "ipgo").glob(name + "*"))


def kept(name):
    return state_format.read_state(files.state_file(name))


def test_taking_the_best_trains_no_further(world):
    prompts = {"prompt": "red heart\ncat\npizza\nstar\nrocket", "prompts_per_step": 1, "epochs": 2}
    with pytest.raises(Interrupt):
        world.tokens("list", Brightness(at=5, wrong=cancel), **prompts)
    before = kept("list")
    assert 0 < before["update"] < 5
    tokens, images, *_, report = world.tokens("list", resume=TAKE, **prompts)
    after = kept("list")
    assert after["update"] == before["update"]
    assert torch.equal(after["best"]["images"], before["best"]["images"])
    # One picture at a time rounds otherwise than a batch: 3e-5 on one processor.
    assert torch.allclose(images.movedim(-1, 1), before["best"]["images"], atol=1e-4)
    assert "the best so far after" in report
    assert tokens.num_parameters


@pytest.mark.parametrize("node", RUNS)
def test_what_is_kept_is_part_of_the_cache_key(world, ours, node):
    version = ours[node].fingerprint_inputs
    assert version(save_as="key", resume=NEW, steps=2) == version(save_as="another", resume=NEW, steps=3)
    assert math.isnan(version(save_as=f"never_{node}", resume=TAKE))
    assert math.isnan(version(save_as=None, resume=TAKE))  # linked
    assert math.isnan(version(save_as="key", resume=None))
    files.state_file("key").unlink(missing_ok=True)
    world.noise("key", iterations=1)
    first = version(save_as="key", resume=TAKE)
    assert first == version(save_as="key", resume=TAKE)
    world.noise("key", iterations=1, resume=TAKE)
    assert version(save_as="key", resume=TAKE) == first
    world.noise("key", iterations=2, seed=9)
    assert version(save_as="key", resume=TAKE) != first


def failing_decode(monkeypatch, wrong):
    """The final pass goes wrong: it alone calls the VAE's own decode."""
    monkeypatch.setattr(comfy.sd.VAE, "decode", lambda *_, **__: wrong())


def test_a_final_pass_that_fails_says_where_the_best_is(world, monkeypatch):
    with monkeypatch.context() as patch:
        failing_decode(patch, out_of_memory)
        with pytest.raises(errors.IPGOError, match=r"simulated.*not lost.*end_00001.*png.*take the best so far"):
            world.noise("end")
    assert written("end") == ["end.resume.safetensors", "end_00001.noise.safetensors", "end_00001.png"]
    assert world.noise("end", resume=TAKE)[-1].startswith("Regularized Noise Optimize: the best so far")


def test_cancel_in_the_final_pass_keeps_the_pictures(world, monkeypatch):
    with monkeypatch.context() as patch:
        failing_decode(patch, cancel_now)
        with pytest.raises(Interrupt):
            world.tokens("end_cancelled")
    assert written("end_cancelled") == ["end_cancelled.resume.safetensors", "end_cancelled_00001.png"]
    comfy.model_management.interrupt_current_processing(False)


@pytest.mark.parametrize("part", ["reward", "monitor_1"])
def test_cancel_that_a_reward_notices_keeps_the_best(world, part):
    name = f"noticed_{part}"
    with pytest.raises(Interrupt):
        world.noise(name, **{part: Brightness(at=2, wrong=cancel_now)})
    assert written(name) == [f"{name}.resume.safetensors", f"{name}_00001.noise.safetensors", f"{name}_00001.png"]
    assert kept(name)["update"] == 1


def test_cancel_in_the_final_score_keeps_the_pictures(world):
    steps_and_start = 2
    with pytest.raises(Interrupt):
        world.noise("score_cancelled", Brightness(at=steps_and_start + 1, wrong=cancel_now))
    assert "score_cancelled_00001.png" in written("score_cancelled")


def test_a_final_score_that_fails_costs_that_score(world):
    *_, images, _, _, _, report = world.noise("unscored", Brightness(at=3, wrong=out_of_memory))
    assert images.shape == (1, 128, 128, 3)
    assert "The final images have no score (simulated)" in report


def test_a_curve_that_fails_costs_the_curve(world, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no font")

    monkeypatch.setattr(host.pack("nodes.reporting"), "curve_tensor", broken)
    *_, images, _, curve, loss, report = world.noise("uncurved")
    assert images.shape == (1, 128, 128, 3)
    assert "no font" in curve.message
    assert len(loss["loss"]) == 2
    assert "brightness" in report


@pytest.mark.parametrize("run", ["noise", "tokens"])
def test_a_missing_matplotlib_is_missed_before_the_run(world, monkeypatch, run):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    reward = Brightness()
    with pytest.raises(errors.IPGOError, match=r"pip install -r requirements\.txt"):
        getattr(world, run)("no_curves", reward)
    assert reward.calls == 0


def test_a_full_disk_costs_the_file_and_is_said(world, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "next_noise_file", full)
    outputs = world.noise("full")
    assert outputs[5].shape == (1, 128, 128, 3)
    assert "Not kept: [Errno 28] No space left on device" in outputs[-1]


def test_pictures_of_a_cancelled_run_hold_the_workflow(world, ours, monkeypatch):
    """So that they can be dragged into ComfyUI like any other picture it saved."""
    prompt, extra = {"1": {"class_type": "KSampler"}}, {"workflow": {"nodes": [1]}}
    hidden = types.SimpleNamespace(unique_id=None, prompt=prompt, extra_pnginfo=extra)
    monkeypatch.setattr(ours["IPGONoiseOptimize"], "hidden", hidden)
    for disabled, expected in ((False, [prompt, extra["workflow"]]), (True, [])):
        monkeypatch.setattr(comfy.cli_args.args, "disable_metadata", disabled)
        with pytest.raises(Interrupt):
            world.noise(f"dragged_{disabled}", Brightness(at=2, wrong=cancel))
        comfy.model_management.interrupt_current_processing(False)
        with Image.open(Path(folder_paths.get_output_directory()) / "ipgo" / f"dragged_{disabled}_00001.png") as file:
            assert [json.loads(text) for text in file.text.values()] == expected


def test_cancel_that_the_progress_bar_notices_keeps_the_best(world, monkeypatch):
    """A server's hook raises the interrupt from there."""

    def hook(value, *_, **__):
        if value == 1:
            cancel_now()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    with pytest.raises(Interrupt):
        world.noise("bar", iterations=5)
    comfy.model_management.interrupt_current_processing(False)
    assert "bar_00001.png" in written("bar")
    assert kept("bar")["update"] < 5


class Contrast:
    name, differentiable = "contrast", True

    def __init__(self, name):
        self.name = name

    def score(self, images, prompts):
        return images.std((1, 2, 3))


def test_held_out_rewards_are_in_the_report(world):
    held = {"monitor_1": Contrast("first"), "monitor_2": Contrast("second"), "monitor_every": 1}
    outputs = world.noise("held", iterations=2, **held)
    before, after = (float(image.movedim(-1, 1).std()) for image in (outputs[6], outputs[5]))
    for name in ("first", "second"):
        found = re.search(rf"Held out: {name} (\S+) at the start, (\S+) at the end, best (\S+)\.$", outputs[-1], re.M)
        start, end, best = map(float, found.groups())
        assert start == pytest.approx(before, rel=1e-2)
        assert end == pytest.approx(after, rel=1e-2)
        assert best >= max(start, end)


def test_every_image_of_a_batch_may_have_a_prompt_of_its_own(world):
    with host.node():
        two = comfy_nodes.EmptyLatentImage().generate(128, 128, 2)[0]
    report = world.noise("pair", latent_image=two, prompt="red heart\nblue sky")[-1]
    assert re.search(r"^red heart .*\nblue sky ", report, re.MULTILINE)
    with pytest.raises(errors.InputError, match=r"prompt has 3 lines for 2 image\(s\): write one line"):
        world.noise("pair", latent_image=two, prompt="a\nb\nc")
    with pytest.raises(errors.InputError, match=r"3 lines for 2 image\(s\) \(batch_size\)"):
        world.joint("pair", batch_size=2, prompt="a\nb\nc")


def test_pictures_may_be_wider_than_high(world):
    for run, images in ((world.tokens, 1), (world.joint, 8)):
        assert run("wide", width=128, height=64)[images].shape == (1, 64, 128, 3)


SHARED = {
    "backprop_steps": 3, "gradient": "zeroth-order", "perturbations": 5, "perturbation_scale": 0.5,
    "preview_every": 4, "monitor_every": 6, "patience": 2,
}  # fmt: skip
WIDGETS = SHARED | {
    "save_memory": False, "preset": "released-code", "prefix_length": 3, "suffix_length": 4, "basis_size": 5,
    "token_scale": 6.0, "epochs": 7, "learning_rate": 0.5, "token_learning_rate": 0.25, "conformity": 8.0,
    "seed": 2**64 - 1, "images_per_prompt": 2, "prompts_per_step": 2, "iterations": 9, "noise_learning_rate": 0.125,
    "regularization": 10.0, "which_noise": "initial", "block_size": 11, "permutations": 12,
    "stop_below_probability": 0.0625,
}  # fmt: skip
TOKEN_SHAPE = {"prefix_length": 3, "suffix_length": 4, "basis_size": 5, "scale": 6.0, "wide_basis": True}
OF_TOKENS = {"epochs": 7, "learning_rate": 0.5, "conformity": 8.0, "seeds": (2**64 - 1, 0), "batch_size": 2}
OF_NOISE = {
    "iterations": 9, "learning_rate": 0.125, "regularization": 10.0, "which": "initial", "block_size": 11,
    "permutations": 12, "min_probability": 0.0625,
}  # fmt: skip


def test_every_widget_reaches_the_engine():
    train_config, noise_config, joint_config = (
        getattr(host.pack(f"nodes.{module}"), f"{name}_config")
        for module, name in (("training", "train"), ("noise", "noise"), ("joint", "joint"))
    )
    shared = SHARED | {"checkpoint": False}
    tokens, noise, joint = train_config(WIDGETS, 3), noise_config(WIDGETS), joint_config(WIDGETS)
    for config, expected in (
        (tokens, OF_TOKENS | shared),
        (tokens.tokens, TOKEN_SHAPE),
        (noise, OF_NOISE | shared),
        (joint.noise, OF_NOISE | shared),
        (joint.tokens, {"learning_rate": 0.25, "conformity": 8.0, "conformity_norm": tokens.conformity_norm}),
        (joint.tokens.tokens, TOKEN_SHAPE),
    ):
        assert {name: getattr(config, name) for name in expected} == expected
    zeros = dict.fromkeys(("backprop_steps", "patience", "prompts_per_step", "block_size", "stop_below_probability"), 0)
    unlimited = train_config(WIDGETS | zeros, 3), noise_config(WIDGETS | zeros)
    assert (unlimited[0].backprop_steps, unlimited[0].patience, unlimited[0].batch_size) == (None, None, None)
    assert (unlimited[1].block_size, unlimited[1].min_probability) == (None, None)
    assert train_config(WIDGETS, 1).decay != train_config(WIDGETS, 2).decay  # one prompt and a list learn differently


@contextlib.contextmanager
def other(weight):
    """A weight of a model is another one."""
    with torch.inference_mode():
        old = weight.clone()
        weight.mul_(1.01)
        yield
        weight.copy_(old)


def test_another_model_or_vae_is_not_resumed(world):
    world.noise("weights")
    world.tokens("weights_tokens")
    weights = {
        "model_weights": world.model.model.diffusion_model.out[0].weight,
        "vae_weights": world.vae.first_stage_model.decoder.norm_out.weight,
    }
    for (name, weight), resume in zip(weights.items(), (CONTINUE, TAKE), strict=True):
        with other(weight):
            for run, save_as in ((world.noise, "weights"), (world.tokens, "weights_tokens")):
                with pytest.raises(errors.InputError, match=rf"different: {name}\)"):
                    run(save_as, resume=resume)
    assert "the best so far" in world.noise("weights", resume=TAKE)[-1]


@pytest.mark.parametrize("run", ["tokens", "joint"])
def test_another_text_encoder_is_not_resumed(world, monkeypatch, run):
    """Clip skip and a LoRA of the text encoder change every prompt, though its own weights stay."""
    name = f"encoder_{run}"
    getattr(world, run)(name)
    with monkeypatch.context() as patch, host.node():
        patch.setattr(world, "clip", comfy_nodes.CLIPSetLastLayer().set_last_layer(world.clip, -2)[0])
        for resume in (CONTINUE, TAKE):
            with pytest.raises(errors.InputError, match=r"different: clip\)"):
                getattr(world, run)(name, resume=resume)
    assert "the best so far" in getattr(world, run)(name, resume=TAKE)[-1]


def lora(model, strength=1.0, seed=1):
    """MODEL with a LoRA on one attention projection."""
    key = next(key for key in model.model.state_dict() if key.endswith("attn2.to_k.weight"))
    rows, columns = model.model.state_dict()[key].shape
    name, random = "lora_unet_x", torch.Generator().manual_seed(seed)
    weights = {
        f"{name}.lora_up.weight": torch.randn(rows, 2, generator=random),
        f"{name}.lora_down.weight": torch.randn(2, columns, generator=random),
    }
    patched = model.clone()
    loaded = comfy.lora.load_lora(weights, {name: key})
    assert patched.add_patches(loaded, strength)
    return patched


def test_patches_count_and_being_loaded_does_not(world):
    fingerprint = resuming.weights_fingerprint
    plain, patched = fingerprint(world.model), fingerprint(lora(world.model))
    different = {plain, patched, fingerprint(lora(world.model, 0.5)), fingerprint(lora(world.model, seed=2))}
    assert len(different) == 4
    everywhere = world.model.clone()
    bias = [name for name, weight in world.model.model.named_parameters() if weight.ndim == 1]
    everywhere.add_patches({name: ("diff", (torch.ones(1),)) for name in bias})
    loose = fingerprint(everywhere)
    with host.node():
        comfy.model_management.load_models_gpu([everywhere])
        try:
            assert everywhere.backup
            assert (fingerprint(world.model), fingerprint(everywhere)) == (plain, loose)
        finally:
            everywhere.unpatch_model(torch.device("cpu"))
            comfy.model_management.unload_all_models()
    assert fingerprint(lora(world.model)) == patched


def test_another_mask_is_not_resumed(world):
    left = torch.zeros(1, 128, 128)
    left[..., :64] = 1
    masked, right = ({**world.latent, "noise_mask": mask} for mask in (left, 1 - left))
    world.noise("mask", latent_image=masked)
    for latent in (right, world.latent):
        with pytest.raises(errors.InputError, match="different: mask"):
            world.noise("mask", latent_image=latent, resume=CONTINUE)
    assert "the best so far" in world.noise("mask", latent_image=masked, resume=TAKE)[-1]


def test_another_picture_of_a_batch_is_not_resumed(world):
    """Its noise is another one of the same seed."""
    with host.node():
        batch = comfy_nodes.EmptyLatentImage().generate(128, 128, 4)[0]
        second, third = (comfy_nodes.LatentFromBatch().frombatch(batch, place, 1)[0] for place in (1, 2))
    world.noise("place", latent_image=second)
    with pytest.raises(errors.InputError, match="different: batch_index"):
        world.noise("place", latent_image=third, resume=CONTINUE)


def test_what_only_shows_or_saves_memory_may_differ(world):
    world.noise("shown")
    changed = {"preview_every": 2, "save_memory": False, "monitor_every": 2, "patience": 3}
    report = world.noise("shown", resume=CONTINUE, iterations=2, **changed)[-1]
    assert "finished after 2 updates" in report


def test_every_noise_is_kept_in_a_file_of_its_own(world):
    first = world.noise("numbered")
    second = world.noise("numbered", seed=99)
    for number, outputs, seed in ((1, first, 0), (2, second, 99)):
        name = f"numbered_{number:05}.noise.safetensors"
        noise, labels = noise_format.read_noise(Path(folder_paths.get_output_directory()) / "ipgo" / name)
        assert torch.equal(noise[:, 0], outputs[0].generate_noise(world.latent))
        assert (labels["prompts"], labels["seeds"], labels["steps"]) == (["red heart"], [seed], 2)
        assert name in outputs[-1]


def test_tokens_and_noise_of_a_joint_run_name_each_other(world):
    world.joint("both")
    _, labels = noise_format.read_noise(
        Path(folder_paths.get_output_directory()) / "ipgo" / "both_00001.noise.safetensors"
    )
    assert labels[noise_format.LEARNED_WITH] == "both_00001.safetensors"
    assert labels["encoder"].startswith("clip-")


def test_a_state_that_was_read_lets_go_of_its_file(tmp_path):
    path = state_format.write_state(tmp_path / "state.safetensors", {"values": torch.ones(4096)})
    state = state_format.read_state(path)
    with path.open("r+b") as file:  # Windows would not even replace a file that is still mapped
        file.write(bytes(path.stat().st_size))
    assert bool((state["values"] == 1).all())


def test_links_into_checked_inputs_are_let_through(ours):
    """ComfyUI gives None for them before anything runs."""
    placeholder = io.ComfyNode.validate_inputs.__func__
    checked = [kind for kind in ours.values() if kind.validate_inputs.__func__ is not placeholder]
    assert len(checked) >= 7
    for kind in checked:
        code = kind.validate_inputs.__func__.__code__
        assert kind.validate_inputs(*[None] * (code.co_argcount - 1)) is True


def test_names_that_no_file_system_stores_are_refused(world):
    tokens = world.tokens("short")[0]
    with pytest.raises(errors.InputError, match="260 bytes long"):
        world.call("IPGOSaveTokens", tokens=tokens, filename_prefix="a" * 260, note="")
    reward = Brightness()
    with pytest.raises(errors.InputError, match="260 bytes long"):
        world.tokens("folder/" + "a" * 260, reward)
    assert reward.calls == 0
    longest = "a" * files.LONGEST_NAME
    assert longest in world.call("IPGOSaveTokens", tokens=tokens, filename_prefix=longest, note="")[0]


def test_blanks_around_a_name_do_not_count(world):
    """A name that comes through a link may end in a line break: what was learned is kept all the same."""
    report = world.tokens(" linked\n")[-1]
    assert re.search(r"^Kept: .*\blinked_00001\.safetensors$", report, re.MULTILINE)
