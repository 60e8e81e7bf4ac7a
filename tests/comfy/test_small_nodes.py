"""The nodes that are no runs, called as the executor calls them: scores, P(z), tokens, rewards."""

from __future__ import annotations

import asyncio
import io
import math
import sys

import comfy.model_management
import comfy.utils
import host
import pytest
import tiny
import torch
from PIL import Image

config = host.pack("ipgo_engine.config")
errors = host.pack("ipgo_engine.errors")
rewards = host.pack("ipgo_engine.rewards")
residence = host.pack("nodes.host.residence")
reward_nodes = host.pack("nodes.rewards")
tokens_module = host.pack("ipgo_engine.tokens")


@pytest.fixture(scope="module")
def ours():
    """Every node of the pack by its name."""
    extension = asyncio.run(sys.modules[host.PACK].comfy_entrypoint())
    return {kind.define_schema().node_id: kind for kind in asyncio.run(extension.get_node_list())}


def call(kind, **inputs):
    """Outputs of a node, everything else at its default."""
    parts = kind.define_schema().inputs
    defaults = {part.id: part.default for part in parts if getattr(part, "default", None) is not None}
    with host.node():
        return kind.execute(**defaults | inputs).args


def greys(*levels):
    """IMAGE: one grey picture per level."""
    with host.node():
        return torch.stack([torch.full((16, 16, 3), level) for level in levels])


class ByPrompt:
    """Brightness, or what the prompt says."""

    name, differentiable = "by prompt", True

    def score(self, images, prompts):
        said = torch.tensor([float(prompt) if prompt != "brightness" else math.inf for prompt in prompts]).to(images)
        return torch.where(said.isinf(), images.mean((1, 2, 3)), said)


def test_images_are_ranked_best_first_and_scored_in_their_own_order(ours):
    images = greys(0.2, 0.8, 0.5)
    ranked, labelled, scores, mean, best, table = call(
        ours["IPGOScoreImages"], images=images, reward=ByPrompt(), prompt="brightness"
    )
    assert torch.equal(ranked, images[[1, 2, 0]])
    assert labelled.shape[0] == 1
    assert scores == pytest.approx([0.2, 0.8, 0.5])
    assert (mean, best) == pytest.approx((0.5, 0.8))
    assert [line.split()[:3] for line in table.splitlines()[2:]] == [
        ["1", "2", "0.8"],
        ["2", "3", "0.5"],
        ["3", "1", "0.2"],
    ]
    assert torch.equal(
        call(ours["IPGOScoreImages"], images=images, reward=ByPrompt(), prompt="brightness", top_k=1)[0], images[[1]]
    )


def test_every_image_is_scored_by_its_own_prompt(ours):
    *_, scores, _, _, table = call(
        ours["IPGOScoreImages"], images=greys(0.1, 0.1, 0.1), reward=ByPrompt(), prompt="1\n3\n2"
    )
    assert scores == [1, 3, 2]
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["1", "2", "3", "3"],
        ["2", "3", "2", "2"],
        ["3", "1", "1", "1"],
    ]
    with pytest.raises(errors.InputError, match=r"prompt has 2 lines for 3 image\(s\)"):
        call(ours["IPGOScoreImages"], images=greys(0.1, 0.1, 0.1), reward=ByPrompt(), prompt="1\n2")


def test_images_without_a_number_come_last(ours):
    """The black picture of a VAE that overflowed costs itself only."""
    images = greys(0.3, 0.1, 0.6)
    ranked, _, scores, mean, best, _ = call(
        ours["IPGOScoreImages"], images=images, reward=ByPrompt(), prompt="nan\nbrightness\nbrightness"
    )
    assert torch.equal(ranked, images[[2, 1, 0]])
    assert math.isnan(scores[0])
    assert (mean, best) == pytest.approx((0.35, 0.6))
    with pytest.raises(errors.NonFiniteError, match="none of the 3 image"):
        call(ours["IPGOScoreImages"], images=images, reward=ByPrompt(), prompt="nan")


def test_transparency_is_not_scored_and_colours_are_clamped(ours):
    with host.node():
        images = torch.cat([greys(1.5), torch.zeros(1, 16, 16, 1)], dim=-1)
    ranked, _, scores, *_ = call(ours["IPGOScoreImages"], images=images, reward=ByPrompt(), prompt="brightness")
    assert ranked.shape[-1] == 3
    assert scores == [1.0]


def test_the_probability_of_a_batch_is_that_of_its_least_likely_noise(ours):
    with host.node():
        noise = torch.randn(3, 4, 32, 32, generator=torch.Generator().manual_seed(1))
        noise[1] *= 1.2
    probability, log, report = call(ours["IPGONoiseProbability"], latent={"samples": noise})
    alone = call(ours["IPGONoiseProbability"], latent={"samples": noise[1:2]})
    assert (probability, log) == pytest.approx(alone[:2])
    assert [line.split(":")[0] for line in report.splitlines()] == ["image 1", "image 2", "image 3"]
    assert call(ours["IPGONoiseProbability"], latent={"samples": noise[:1]})[0] > probability
    assert call(ours["IPGONoiseProbability"], latent={"samples": noise}, block_size=8)[1] != log


@pytest.mark.parametrize(("sides", "before", "after"), [("both", 3, 2), ("prefix only", 3, 0), ("suffix only", 0, 2)])
def test_tokens_are_applied_on_the_sides_asked_for(ours, sides, before, after):
    tokens = tokens_module.IPGOTokens(
        tiny.WIDTH, config.TokenConfig(prefix_length=3, suffix_length=2, basis_size=8, scale=1.0)
    )
    with host.node():
        given = tiny.conditioning(1)
    (out,) = call(ours["IPGOApplyConditioning"], conditioning=given, tokens=tokens, strength=0.5, sides=sides)
    learned = [0.5 * tokens.prefix().detach()[:before], given[0][0][0], 0.5 * tokens.suffix().detach()[:after]]
    assert torch.equal(out[0][0][0], torch.cat(learned))


def test_every_loader_reads_its_own_reward(ours, monkeypatch, tmp_path):
    """HPS has two checkpoints of one layout, whose scores do not compare."""
    loaded = []
    monkeypatch.setattr(reward_nodes.files, "reward_path", lambda name: tmp_path / name)
    monkeypatch.setattr(reward_nodes.engine, "load", lambda *given: loaded.append(given))
    for node, options, name in (
        ("IPGOClipReward", {}, "clip"),
        ("IPGOAestheticReward", {}, "aesthetic"),
        ("IPGOHPSReward", {}, "hpsv2.1"),
        ("IPGOHPSReward", {"version": "v2.0"}, "hpsv2"),
        ("IPGOPickScoreReward", {}, "pickscore"),
        ("IPGOImageReward", {}, "imagereward"),
    ):
        call(ours[node], weights=name, precision="bfloat16", **options)
        assert loaded.pop() == (name, tmp_path / name, "cpu", torch.bfloat16)


def test_reward_models_are_halved_on_a_gpu_only(monkeypatch):
    choices = host.pack("nodes.host.choices")
    for kind, dtype in (("cpu", torch.float32), ("cuda", torch.float16), ("mps", torch.float16)):
        monkeypatch.setattr(choices, "get_torch_device", lambda kind=kind: torch.device(kind))
        assert choices.reward_dtype("auto") is dtype
        assert choices.reward_dtype("float32") is torch.float32


def test_missing_reward_weights_are_named_when_the_prompt_is_checked(ours):
    for node in ("IPGOClipReward", "IPGOAestheticReward", "IPGOHPSReward", "IPGOPickScoreReward", "IPGOImageReward"):
        assert "'gone.pt'" in ours[node].validate_inputs(weights="gone.pt")


def test_rewards_are_summed_by_weight(ours):
    bright, contrast = rewards.load("brightness"), rewards.load("contrast")
    images = torch.rand(3, 3, 8, 8)
    (combined,) = call(
        ours["IPGOCombineRewards"], reward_1=bright, weight_1=2.0, reward_2=contrast, weight_2=0.0,
        reward_4=contrast, weight_4=-3.0,
    )  # fmt: skip
    expected = 2 * bright.score(images, [""] * 3) - 3 * contrast.score(images, [""] * 3)
    torch.testing.assert_close(combined.score(images, [""] * 3), expected)


def test_rewards_without_weights_do_what_their_widgets_say(ours):
    noisy = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    (dark,) = call(ours["IPGOBrightnessReward"], direction="darkness")
    assert float(dark.score(noisy, [""])) == pytest.approx(1 - float(noisy.mean()), abs=1e-6)
    assert call(ours["IPGOContrastReward"])[0].name == "contrast"
    for direction, sign in (("small file", -1), ("large file", 1)):
        (size,) = call(ours["IPGOJpegReward"], direction=direction, quality=50)
        file = io.BytesIO()
        Image.fromarray((noisy[0] * 255).round().byte().movedim(0, -1).numpy()).save(file, "JPEG", quality=50)
        assert float(size.score(noisy, [""])) == pytest.approx(sign * file.tell() / 1000)
    (robust,) = call(ours["IPGORobustReward"], reward_in=dark, samples=3, noise=0.1, crop=0.2, resample=0.4)
    wanted = rewards.Robust(dark, 3, crop=0.2, resample=0.4, noise=0.1)
    assert torch.equal(robust.score(noisy, [""]), wanted.score(noisy, [""]))


class Travels(torch.nn.Linear):
    """Writes down where it is sent."""

    def __init__(self):
        super().__init__(3, 1)
        self.sent = []

    def to(self, device):
        self.sent.append(str(device))
        return self


def test_a_reward_visits_the_device_for_the_length_of_a_run_and_room_is_made(monkeypatch):
    room = []
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda size, device: room.append((size, str(device))))
    reward = rewards.load("brightness")
    reward.module = Travels()

    def run():
        with residence.resident([reward]):
            assert reward.module.sent == ["cuda"]
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert reward.module.sent == ["cuda", "cpu"]
    assert room == [(4 * 4, "cuda")]


def test_rewards_visit_the_device_to_score_and_to_be_calibrated(ours, monkeypatch):
    """cpu:0 stands for a device that the weights do not rest on."""
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cpu", 0))
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda *_: None)
    reward, images = rewards.load("brightness"), greys(0.1, 0.6)
    reward.module = Travels()
    call(ours["IPGOScoreImages"], images=images, reward=reward, prompt="a")
    assert reward.module.sent == ["cpu:0", "cpu"]
    (combined,) = call(
        ours["IPGOCombineRewards"], reward_1=reward, calibration_images=images, calibration_prompts="a"
    )  # fmt: skip
    assert combined.scales == [pytest.approx((0.35, 0.5 / 2**0.5))]
    assert reward.module.sent == ["cpu:0", "cpu"] * 2


def test_a_reward_that_does_not_fit_goes_back(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_torch_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda *_: None)

    class Large(Travels):
        def to(self, device):
            super().to(device)
            if str(device) == "cuda":
                raise torch.cuda.OutOfMemoryError("half of it is there")

    reward = rewards.load("brightness")
    reward.module = Large()
    with pytest.raises(torch.cuda.OutOfMemoryError), residence.resident([reward]):
        pass
    assert reward.module.sent == ["cuda", "cpu"]


def test_scoring_many_images_can_be_cancelled(ours):
    class Cancels(ByPrompt):
        def score(self, images, prompts):
            comfy.model_management.interrupt_current_processing(True)
            return super().score(images, prompts)

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        call(ours["IPGOScoreImages"], images=greys(0.1, 0.2), reward=Cancels(), prompt="brightness")
    assert not comfy.model_management.processing_interrupted()


def test_a_tokens_file_that_was_replaced_is_read_again(ours, tmp_path, monkeypatch):
    file = tmp_path / "mine.safetensors"
    monkeypatch.setattr(host.pack("nodes.host.paths"), "token_file", lambda name: tmp_path / name)
    kind, shape = ours["IPGOLoadTokens"], config.TokenConfig(prefix_length=1, suffix_length=1, basis_size=4)
    seen = set()
    for step in range(2):
        tokens = tokens_module.IPGOTokens(tiny.WIDTH, shape)
        tokens.save(file, note=f"number {step}")
        loaded, information = call(kind, file=file.name)
        assert torch.equal(loaded.prefix(), tokens.prefix())
        assert f"number {step}" in information
        seen.add(kind.fingerprint_inputs(file=file.name))
        assert kind.fingerprint_inputs(file=file.name) in seen
    assert len(seen) == 2
    assert math.isnan(kind.fingerprint_inputs(file=None))


def test_a_run_shows_all_its_pictures_and_numbers(monkeypatch):
    watch = host.pack("nodes.host.watch")
    event = host.pack("ipgo_engine.events").StepEvent(
        step=2, total=5, reward=0.5, best=0.75, probability=0.125, monitors={"judge": 0.25},
        images=torch.rand(4, 3, 32, 16),
    )  # fmt: skip
    shown = []
    monkeypatch.setattr(watch, "show_text", lambda text, node_id: shown.append((text, node_id)))
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *given, **_: shown.append(given[:3]))
    watch.NodeObserver("7").on_step(event)
    (step, total, (kind, picture, side)), text = shown
    assert (step, total, kind, side) == (2, 5, "JPEG", 512)
    assert picture.width > 3 * 16
    assert text == ("step 2/5 | reward 0.5 | best 0.75 | P(z) 0.12 | judge (held out) 0.25", "7")
