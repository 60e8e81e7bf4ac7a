"""The embedded demo model: what ships, and that it is the model it says it is."""

from __future__ import annotations

import json
import re

import pytest
import torch

from ipgo_engine import demo, rewards

FOLDER = demo.model_path()
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipeline():
    return demo.load_pipeline()


def test_weights_are_small_float16_safetensors_and_nothing_else():
    from safetensors.torch import load_file

    weights = list(FOLDER.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in weights) <= 50 * 2**20
    assert all(v.dtype == torch.float16 for file in weights for v in load_file(file).values() if v.is_floating_point())
    kinds = {file.suffix for file in FOLDER.rglob("*") if file.is_file()}
    assert kinds <= {".safetensors", ".json", ".txt", ".md", ".png", ".jpg"}


def test_it_is_laid_out_as_stable_diffusion(pipeline):
    assert type(pipeline).__name__ == "StableDiffusionPipeline"
    assert pipeline.unet.config.cross_attention_dim == pipeline.text_encoder.config.hidden_size == 192
    assert pipeline.vae_scale_factor == 8
    assert pipeline.unet.config.sample_size == 16
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert pipeline.tokenizer.model_max_length == 77


def test_any_text_has_tokens_and_known_words_are_one_token_each(pipeline):
    tokenizer = pipeline.tokenizer
    assert len(tokenizer("red heart on a blue background").input_ids) == 2 + 6
    for text in ("zyxwv 12345 !?", "\u00e9t\u00e9 \u732b \U0001f600", ""):
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.unk_token_id not in ids[1:-1]


def picture(pipeline, prompt: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipeline(
        prompt, num_inference_steps=12, guidance_scale=3.0, generator=generator, output_type="pt"
    ).images.float()


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(pipeline):
    first, second, other = (picture(pipeline, "red heart", seed) for seed in (0, 0, 1))
    assert first.shape == (1, 3, 128, 128)
    assert torch.equal(first, second)
    assert (first - other).abs().mean() > 0.01


@pytest.mark.parametrize("name", ["demo-clip", "demo-judge"])
def test_both_judges_know_what_was_asked_for(pipeline, name):
    """Of five prompts, each picture's own scores highest for at least four."""
    prompts = ["red heart", "green tree", "yellow star", "blue circle", "black cat"]
    images = torch.cat([picture(pipeline, prompt) for prompt in prompts])
    reward = rewards.load(name)
    table = torch.stack([reward.score(images, [prompt] * len(prompts)) for prompt in prompts])
    assert int((table.argmax(dim=0) == torch.arange(len(prompts))).sum()) >= 4


def test_the_small_clip_and_the_text_encoder_share_their_text_tower(pipeline):
    clip, _ = demo.load_clip()
    ids = pipeline.tokenizer(["dog face"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        mine = clip.text_model(input_ids=ids).last_hidden_state
        theirs = pipeline.text_encoder(ids).last_hidden_state
    assert torch.allclose(mine, theirs, atol=1e-5)


def test_the_card_gives_the_numbers_that_were_measured():
    numbers = json.loads((FOLDER / "measured.json").read_text())
    card = (FOLDER / "MODEL_CARD.md").read_text()
    assert f"{numbers['psnr_held_out']:.1f} dB" in card
    for group in ("generated", "held_out"):
        for name, share in numbers[group].items():
            assert re.search(rf"{name} {share:.0%}", card)
