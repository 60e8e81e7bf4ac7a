"""CLIP score and its backbones, against transformers' and open_clip's own code on the same weights."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ipgo_engine import rewards
from ipgo_engine.errors import InputError
from ipgo_engine.rewards import backbones, clip_backbone, text
from ipgo_engine.rewards.preprocess import Preprocessing

from . import tiny

SIZES = [(32, 32), (128, 128), (67, 50), (50, 67), (33, 40), (20, 30), (301, 97)]
LONG = "a very long prompt about everything " * 40
STRANGE = "  Ünïcödé &amp; emoji ❤️\n\ttabs,   CAPS -- (punctuation)!! 日本語 'quotes' 3.14  "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("transformers")
    tiny.transformers_clip(path)
    return path


@pytest.fixture(scope="module")
def open_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("open_clip")
    model = tiny.open_clip_model()
    save_file(model.state_dict(), path / "open_clip_model.safetensors")
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny.ARCHITECTURE, "preprocess_cfg": {}}))
    return path


def reference_features(folder, pixels, prompts):
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder).train(False)
    tokens = CLIPTokenizer.from_pretrained(folder)(
        prompts, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(pixel_values=pixels, **tokens)
    return out.image_embeds, out.text_embeds


@pytest.mark.parametrize("prompts", [tiny.PROMPTS, [LONG, STRANGE], ["", "x"]])
def test_transformers_parity_from_the_same_pixels(folder, prompts):
    reward = rewards.load("clip", folder)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    image_embeds, text_embeds = reference_features(folder, pixels, prompts)
    ours = clip_backbone.cosine(reward.backbone.pixel_features(pixels), reward.backbone.text_features(prompts))
    assert (ours - (image_embeds * text_embeds).sum(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("prompts", [tiny.PROMPTS, [LONG, STRANGE], ["", "x"]])
def test_open_clip_parity_from_the_same_pixels(open_folder, prompts):
    import open_clip

    reward = rewards.load("clip", open_folder)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = tiny.open_clip_model()
    tokens = open_clip.SimpleTokenizer()(prompts)
    with torch.no_grad():
        expected = (model.encode_image(pixels, normalize=True) * model.encode_text(tokens, normalize=True)).sum(-1)
    ours = clip_backbone.cosine(reward.backbone.pixel_features(pixels), reward.backbone.text_features(prompts))
    assert (ours - expected).abs().max() < 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_against_the_transformers_processor(folder, size):
    from transformers import CLIPImageProcessor

    picture = tiny.picture(*size)
    theirs = CLIPImageProcessor.from_pretrained(folder)(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    ours = rewards.load("clip", folder).backbone.preprocessing(tiny.as_batch(picture))
    assert (ours - theirs).abs().max() < 1.2 / 255 / 0.26  # one step of 8 bits, in units of the normalization


@pytest.mark.parametrize("size", SIZES)
def test_preprocessing_against_open_clips_transform(open_folder, size):
    from open_clip.transform import image_transform

    picture = tiny.picture(*size)
    theirs = image_transform(32, is_train=False, interpolation="bicubic")(Image.fromarray(picture))[None]
    ours = rewards.load("clip", open_folder).backbone.preprocessing(tiny.as_batch(picture))
    assert (ours - theirs).abs().max() < 1.2 / 255 / 0.26


@pytest.mark.parametrize("size", [(37, 57), (57, 37), (20, 30), (32, 64), (1, 200)])
@pytest.mark.parametrize("fit", ["longer", "squash"])
def test_preprocessing_without_a_cut_against_pillow(size, fit):
    picture = tiny.picture(*size)
    height, width = (max(1, round(side * 32 / max(size))) for side in size) if fit == "longer" else (32, 32)
    square = Image.new("RGB", (32, 32))
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
    square.paste(resized, ((32 - width) // 2, (32 - height) // 2))
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    theirs = (np.asarray(square) / 255 - mean) / std
    ours = Preprocessing(32, mean, std, fit)(tiny.as_batch(picture))[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - theirs).max() < 2 / 255 / 0.5  # two steps of 8 bits, in units of the smallest spread


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mean": (0.5, 0.5)}, "give three numbers"),
        ({"std": (1.0, "1", 1.0)}, "give three numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "must be above 0"),
    ],
)
def test_preprocessing_that_cannot_be_is_refused(settings, words):
    with pytest.raises(InputError, match=words):
        Preprocessing(**settings)


def test_prompts_are_cut_and_text_features_remembered(folder):
    backbone = rewards.load("clip", folder).backbone
    first = backbone.text_features([LONG, LONG + " and more"])
    torch.testing.assert_close(first[0], first[1])
    assert torch.equal(backbone.text_features([LONG])[0], first[0])


def test_gradient_agrees_with_finite_differences(folder, open_folder):
    for path in (folder, open_folder):
        reward = rewards.load("clip", path)
        x = tiny.as_batch(tiny.picture(40, 56), tiny.picture(40, 56, 1)).mul(0.9).add(0.05).requires_grad_()
        (gradient,) = torch.autograd.grad(reward.score(x, tiny.PROMPTS).sum(), x)
        direction = gradient / gradient.norm() + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            up, down = (reward.score(x + s * 5e-3 * direction, tiny.PROMPTS).double().sum() for s in (1, -1))
        assert (gradient * direction).sum().item() == pytest.approx(((up - down) / 1e-2).item(), rel=5e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_float32_and_keeps_the_gradient(folder, open_folder, dtype):
    for path in (folder, open_folder):
        full, half = rewards.load("clip", path), rewards.load("clip", path, dtype=dtype)
        x = tiny.as_batch(tiny.picture(64, 64), tiny.picture(64, 64, 1)).requires_grad_()
        expected, scores = full.score(x, tiny.PROMPTS), half.score(x, tiny.PROMPTS)
        assert scores.dtype == torch.float32
        assert (scores - expected).abs().max() < 0.03
        wanted, got = (torch.autograd.grad((1e-4 * s).sum(), x)[0] for s in (expected, scores))
        assert torch.cosine_similarity(wanted.flatten(), got.flatten(), dim=0) > (
            0.999 if dtype == torch.float16 else 0.97
        )
        assert got.norm().item() == pytest.approx(wanted.norm().item(), rel=0.05)


def test_two_rewards_on_one_file_share_its_weights_until_both_are_gone(folder):
    first, second = rewards.load("clip", folder), rewards.load("clip", str(folder))
    assert first.backbone is second.backbone
    assert rewards.load("clip", folder, dtype=torch.bfloat16).backbone is not first.backbone
    assert all(not p.requires_grad for p in first.module.parameters())
    assert not first.module.training


def test_a_file_that_changed_is_read_again(tmp_path):
    from safetensors.torch import load_file

    tiny.transformers_clip(tmp_path)
    before, file = rewards.load("clip", tmp_path), tmp_path / "model.safetensors"
    save_file({name: tensor * 0.5 for name, tensor in load_file(file).items()}, file)
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    after = rewards.load("clip", tmp_path)
    assert not torch.allclose(before.backbone.pixel_features(pixels), after.backbone.pixel_features(pixels))


def test_one_file_in_transformers_layout_as_in_clip_vision(folder, tmp_path):
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    vision = {k: v for k, v in weights.items() if k.startswith(("vision_model.", "visual_projection."))}
    # heads are recognised as width / 64, the convention of every published CLIP, so one head here: a shape test
    save_file(vision, tmp_path / "vision.safetensors")
    backbone = backbones.load_clip(tmp_path / "vision.safetensors")
    assert backbone.image_features(torch.rand(1, 3, 40, 32)).shape == (1, 24)
    with pytest.raises(InputError, match="vision tower only"):
        backbone.text_features(["x"])
    save_file(weights, tmp_path / "all.safetensors")
    assert rewards.load("clip", tmp_path / "all.safetensors").score(torch.rand(1, 3, 40, 32), ["x"]).shape == (1,)


def test_weights_loaded_inside_inference_mode_still_give_gradients(folder, open_folder):
    for path in (folder, open_folder):
        with torch.inference_mode():
            reward = rewards.load("clip", path, dtype=torch.float64)
            reward.score(torch.rand(1, 3, 32, 32), ["x"])  # what is remembered of the prompt must not carry over
        x = torch.rand(1, 3, 32, 32, requires_grad=True)
        reward.score(x, ["x"]).sum().backward()
        assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("ftfy", [True, False])
def test_open_clip_models_read_prompts_alike_without_open_clip(folder, monkeypatch, ftfy):
    import open_clip

    prompts = [*tiny.PROMPTS, LONG, "", STRANGE] + ["curly \u2019quotes\u2019"] * ftfy
    expected = open_clip.SimpleTokenizer()(prompts)
    monkeypatch.setattr(text, "_shipped", lambda length: None)
    if not ftfy:
        monkeypatch.setitem(sys.modules, "ftfy", None)
    ids = text.load_clip_tokenizer(folder, 77, cleaned=True)(prompts)
    end = 49407
    for ours, theirs in zip(ids.tolist(), expected.tolist(), strict=True):
        assert ours[: ours.index(end) + 1] == theirs[: theirs.index(end) + 1]


def test_without_any_vocabulary_the_message_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_shipped", lambda length: None)
    with pytest.raises(InputError, match=r"put vocab\.json and merges\.txt .* or install open_clip_torch"):
        text.load_clip_tokenizer(tmp_path, 77)
    (tmp_path / text.CLIP_L_FOLDER).mkdir()
    tiny.save_clip_tokenizer(tmp_path / text.CLIP_L_FOLDER)
    assert text.load_clip_tokenizer(tmp_path / "hpsv2", 77)(["red heart"])[0, :4].tolist() == [49406, 736, 1936, 49407]


def test_an_open_clip_file_alone_does_not_tell_its_activation(open_folder, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((open_folder / "open_clip_model.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"open_clip_config\.json"):
        rewards.load("clip", tmp_path / "model.safetensors")
    config = {"model_cfg": {**tiny.ARCHITECTURE, "text_cfg": {**tiny.TEXT, "hf_tokenizer_name": "t5"}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="own two towers"):
        rewards.load("clip", tmp_path / "model.safetensors")


def test_quick_gelu_is_honoured(tmp_path):
    architecture = {**tiny.ARCHITECTURE, "quick_gelu": True}
    model = tiny.open_clip_model(architecture)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": architecture}))
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = rewards.load("clip", tmp_path).backbone.pixel_features(pixels)
    assert (features - model.encode_image(pixels)).abs().max() < 1e-4


def test_wrong_files_are_one_clear_error(tmp_path, folder):
    with pytest.raises(InputError, match="does not exist"):
        rewards.load("clip", tmp_path / "nowhere")
    with pytest.raises(InputError, match="neither"):
        rewards.load("clip", tmp_path)
    with pytest.raises(InputError, match="give the path"):
        rewards.load("clip")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="no plain CLIP"):
        rewards.load("clip", tmp_path / "other.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with pytest.raises(InputError, match="siglip"):
        rewards.load("clip", tmp_path)
