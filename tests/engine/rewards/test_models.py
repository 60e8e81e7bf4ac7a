"""Aesthetic, HPS v2, PickScore and ImageReward on small models in their authors' own layouts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ipgo_engine import rewards
from ipgo_engine.errors import InputError
from ipgo_engine.rewards import backbones, files, hps, loading
from ipgo_engine.rewards.aesthetic import Aesthetic, load_head
from ipgo_engine.rewards.clip import ClipScore
from ipgo_engine.rewards.imagereward import MEAN, STD, load_imagereward

from . import tiny

HEAD_NAME = "laion_aesthetic_v2_sac+logos+ava1-l14-linearMSE.pth"
REAL_HEAD = Path(__file__).parents[4] / "shared" / "data" / HEAD_NAME


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Every reward's files as the download lays them out."""
    root = tmp_path_factory.mktemp("weights")
    for name in ("aesthetic", "hpsv2", "pickscore", "imagereward", loading.CLIP_L_FOLDER):
        (root / name).mkdir()
    tiny.transformers_clip(root / loading.CLIP_L_FOLDER, projection=768)
    tiny.transformers_clip(root / "pickscore", processor=False, projection=1024)
    head = tiny.AuthorsHead(768)
    head.load_state_dict(tiny.fill(head.state_dict()))
    torch.save(head.state_dict(), root / "aesthetic" / "sac+logos+ava1-l14-linearMSE.pth")
    state = tiny.open_clip_model().state_dict()
    for name in hps.FILES.values():
        torch.save({"epoch": 1, "state_dict": {f"{k}": v for k, v in state.items()}}, root / "hpsv2" / name)
    tiny.save_imagereward(root / "imagereward")
    return root


@pytest.fixture(scope="module")
def models(root):
    return {name: make(root) for name, make in MAKERS.items()}


def hps_of(version):
    return lambda root, **options: hps.load_hps(
        root / "hpsv2", version, architecture={"model_cfg": tiny.ARCHITECTURE}, **options
    )


def demo_of(name):
    return lambda root, **options: rewards.load(name, **options)


MAKERS = {
    "clip": lambda root, **options: rewards.load("clip", root / loading.CLIP_L_FOLDER, **options),
    "demo-clip": demo_of("demo-clip"),
    "demo-judge": demo_of("demo-judge"),
    "aesthetic": lambda root, **options: rewards.load("aesthetic", root / "aesthetic", **options),
    "pickscore": lambda root, **options: rewards.load("pickscore", root / "pickscore", **options),
    "imagereward": lambda root, **options: rewards.load("imagereward", root / "imagereward", **options),
    "hpsv2": hps_of("v2.0"),
    "hpsv2.1": hps_of("v2.1"),
}


def batch(height=40, width=56):
    return tiny.as_batch(tiny.picture(height, width), tiny.picture(height, width, 1))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("size", [(32, 32), (97, 40), (16, 100), (300, 200)])
def test_contract(models, name, size):
    reward = models[name]
    scores = reward.score(batch(*size), tiny.PROMPTS)
    assert isinstance(reward, rewards.Reward)
    assert (reward.name, reward.differentiable) == (name, True)
    assert scores.shape == (2,)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores[:1], reward.score(batch(*size)[:1], tiny.PROMPTS[:1]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores, reward.score(batch(*size), tiny.PROMPTS))  # no dropout: the same every time


@pytest.mark.parametrize("name", MAKERS)
def test_gradient_agrees_with_finite_differences(models, name):
    x = batch().mul(0.9).add(0.05).requires_grad_()
    (gradient,) = torch.autograd.grad(models[name].score(x, tiny.PROMPTS).sum(), x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    direction = gradient / gradient.norm() + 0.3 * noise / noise.norm()
    step = 0.02
    with torch.no_grad():
        up, down = (models[name].score(x + s * step * direction, tiny.PROMPTS).double().sum() for s in (1, -1))
    assert (gradient * direction).sum().item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-2)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(root, models, name, dtype):
    x = batch().requires_grad_()
    half = MAKERS[name](root, dtype=dtype)
    assert {p.dtype for p in half.module.parameters()} >= {dtype}
    expected, scores = models[name].score(x, tiny.PROMPTS), half.score(x, tiny.PROMPTS)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max()))
    wanted, got = (torch.autograd.grad((1e-4 * s).sum(), x)[0].flatten() for s in (expected, scores))
    assert torch.cosine_similarity(wanted, got, dim=0) > (0.99 if dtype == torch.float16 else 0.9)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_loaded_inside_inference_mode(root, monkeypatch, name, dtype):
    """ComfyUI runs every node there. Weights whose precision stays as it is in the file are not copied on the way."""
    for version in ("hpsv2", "hpsv2.1"):
        small = MAKERS[version]
        monkeypatch.setitem(loading.MODELS, version, lambda _, device, dtype, f=small: f(root, dtype=dtype))
    x = batch().requires_grad_()
    places = {"clip": root / loading.CLIP_L_FOLDER, "hpsv2.1": root / "hpsv2"}
    with torch.inference_mode():
        reward = rewards.load(name, places.get(name, root / name), "cpu", dtype)
        reward.score(batch(), tiny.PROMPTS)
    (gradient,) = torch.autograd.grad(reward.score(x, tiny.PROMPTS).sum(), x)
    assert gradient.abs().sum() > 0
    assert not any(tensor.is_inference() for tensor in reward.module.state_dict().values())


@pytest.mark.parametrize("name", MAKERS)
def test_out_of_range_and_long_prompts(models, name):
    reward, beyond = models[name], batch().mul(2).sub(0.5).requires_grad_()
    scores = reward.score(beyond, tiny.PROMPTS)
    torch.testing.assert_close(scores, reward.score(beyond.detach().clamp(0, 1), tiny.PROMPTS))
    scores.sum().backward()
    outside = (beyond < 0) | (beyond > 1)
    assert (beyond.grad[outside] != 0).float().mean() > 0.5
    long = "word " * 300
    torch.testing.assert_close(reward.score(batch(), [long] * 2), reward.score(batch(), [long + "another ending"] * 2))


def test_aesthetic_is_the_authors_computation(root, models):
    clip = backbones.load_clip(root / loading.CLIP_L_FOLDER)
    assert models["aesthetic"].backbone is clip
    head = tiny.AuthorsHead(768)
    head.load_state_dict(torch.load(root / "aesthetic" / "sac+logos+ava1-l14-linearMSE.pth", weights_only=True))
    features = clip.image_features(batch())
    expected = head.train(False).layers(features / features.norm(dim=-1, keepdim=True)).squeeze(-1)
    torch.testing.assert_close(models["aesthetic"].score(batch(), ["", ""]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(40, 59), (59, 40), (64, 64), (50, 33)])
def test_aesthetic_crops_as_the_transform_its_authors_use(models, size):
    """OpenAI's, which is torchvision's; transformers' processor rounds odd margins the other way."""
    from PIL import Image
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    ours = models["aesthetic"].preprocessing
    side, image = ours.size, tiny.picture(*size)
    theirs = transforms.Compose(
        [
            transforms.Resize(side, interpolation=InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize(ours.mean, ours.std),
        ]
    )
    difference = (
        (ours(tiny.as_batch(image))[0] - theirs(Image.fromarray(image))).abs()
        * torch.tensor(ours.std).view(3, 1, 1)
        * 255
    )
    assert difference.max() < 2


def test_pickscores_scale_is_not_rounded(root):
    exact = MAKERS["pickscore"](root)
    images = batch()
    for dtype in (torch.float16, torch.bfloat16):
        half = MAKERS["pickscore"](root, dtype=dtype)
        ratio = half.score(images, tiny.PROMPTS) / ClipScore(half.backbone).score(images, tiny.PROMPTS)
        expected = exact.score(images, tiny.PROMPTS) / ClipScore(exact.backbone).score(images, tiny.PROMPTS)
        torch.testing.assert_close(ratio, expected, rtol=1e-5, atol=0)


def test_aesthetic_and_clip_share_a_backbone(root, models):
    clip = rewards.load("clip", root / loading.CLIP_L_FOLDER)
    assert clip.backbone is models["aesthetic"].backbone


def test_aesthetic_paths(root, tmp_path):
    both = {"head": root / "aesthetic", "clip": root / loading.CLIP_L_FOLDER}
    assert isinstance(rewards.load("aesthetic", both), Aesthetic)
    head = next((root / "aesthetic").glob("*.pth"))
    assert isinstance(rewards.load("aesthetic", head), Aesthetic)
    with pytest.raises(InputError, match="CLIP ViT-L/14"):
        rewards.load("aesthetic", tmp_path)
    with pytest.raises(InputError, match="give 'head' and 'clip'"):
        rewards.load("aesthetic", {"head": head})
    with pytest.raises(InputError, match="not a mapping"):
        rewards.load("hpsv2", both)


def test_head_of_another_width_is_refused(root, tmp_path):
    with pytest.raises(InputError, match="width 768, this CLIP gives 1024"):
        rewards.load("aesthetic", {"head": root / "aesthetic", "clip": root / "pickscore"})
    torch.save({"layers.0.weight": torch.zeros(3, 768)}, tmp_path / "x-linearMSE.pth")
    with pytest.raises(InputError, match="lacks"):
        load_head(tmp_path, 768)


@pytest.mark.skipif(not REAL_HEAD.is_file(), reason=f"the published head file is not at {REAL_HEAD}")
def test_the_published_aesthetic_head(tmp_path):
    head = load_head(REAL_HEAD, 768)
    features = torch.nn.functional.normalize(torch.randn(4, 768, generator=torch.Generator().manual_seed(0)), dim=-1)
    state = torch.load(REAL_HEAD, map_location="cpu", weights_only=True)
    expected = features.double()
    for layer in (0, 2, 4, 6, 7):
        expected = expected @ state[f"layers.{layer}.weight"].double().T + state[f"layers.{layer}.bias"].double()
    assert (head(features).squeeze(-1) - expected.squeeze(-1)).abs().max() < 1e-4
    converted = tmp_path / "head-linearMSE.safetensors"
    files.convert_to_safetensors(REAL_HEAD, converted)
    torch.testing.assert_close(load_head(converted, 768)(features), head(features))


def test_pickscore_is_the_authors_computation(root, models):
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(root / "pickscore").train(False)
    pixels = models["pickscore"].backbone.preprocessing(batch())
    tokens = CLIPTokenizer.from_pretrained(root / "pickscore")(
        tiny.PROMPTS, padding=True, truncation=True, max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        out = model(pixel_values=pixels, **tokens)
    expected = out.logits_per_image.diagonal()
    assert (models["pickscore"].score(batch(), tiny.PROMPTS) - expected).abs().max() < 1e-4


def test_pickscore_without_tokenizer_files_uses_the_shipped_vocabulary(root, models, tmp_path):
    tiny.transformers_clip(tmp_path, tokenizer=False, projection=1024)
    bare = rewards.load("pickscore", tmp_path)
    torch.testing.assert_close(
        bare.score(batch(), tiny.PROMPTS), models["pickscore"].score(batch(), tiny.PROMPTS), atol=1e-4, rtol=1e-5
    )


def test_hps_versions_read_their_own_file(tmp_path):
    state = tiny.open_clip_model().state_dict()
    torch.save({"state_dict": state}, tmp_path / "HPS_v2_compressed.pt")
    with pytest.raises(InputError, match=r"HPS v2.1 .* holds none of HPS_v2.1_compressed"):
        hps.load_hps(tmp_path, "v2.1", architecture={"model_cfg": tiny.ARCHITECTURE})
    with pytest.raises(InputError, match="its width is 64 instead of 1280"):
        rewards.load("hpsv2", tmp_path)  # not the size of ViT-H-14
    files.convert_to_safetensors(tmp_path / "HPS_v2_compressed.pt", tmp_path / "HPS_v2_compressed.safetensors")
    one = hps.load_hps(tmp_path / "HPS_v2_compressed.pt", "v2.0", architecture={"model_cfg": tiny.ARCHITECTURE})
    two = hps.load_hps(tmp_path, "v2.0", architecture={"model_cfg": tiny.ARCHITECTURE})
    torch.testing.assert_close(one.score(batch(), tiny.PROMPTS), two.score(batch(), tiny.PROMPTS))


def test_hps_sees_the_whole_picture(models):
    wide = batch(32, 96)
    wide.requires_grad_()
    models["hpsv2"].score(wide, tiny.PROMPTS).sum().backward()
    assert (wide.grad[..., 0] != 0).any()
    assert (wide.grad[..., -1] != 0).any()
    assert models["hpsv2"].preprocessing(wide).shape == (2, 3, 32, 32)


def test_imagereward_constants_and_prompt_length(root, models):
    reward = models["imagereward"]
    ids, mask = reward._tokenize(["red heart", "word " * 100])
    assert ids.shape == mask.shape == (2, 35)
    assert ids[0, :4].tolist() == [2, 5, 6, 3]
    assert mask.sum(1).tolist() == [4, 35]
    assert ids[1, -1] == 3
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)


def test_imagereward_needs_its_vocabulary(tmp_path):
    tiny.save_imagereward(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(InputError, match=r"vocab\.txt"):
        load_imagereward(tmp_path)


def test_converted_imagereward_scores_the_same(root, models, tmp_path):
    tiny.save_imagereward(tmp_path)
    files.convert_to_safetensors(tmp_path / "ImageReward.pt", tmp_path / "ImageReward.safetensors")
    (tmp_path / "ImageReward.pt").unlink()
    converted = load_imagereward(tmp_path)
    torch.testing.assert_close(
        converted.score(batch(), tiny.PROMPTS), models["imagereward"].score(batch(), tiny.PROMPTS)
    )
    assert "blip.visual_encoder.cls_token" in load_file(tmp_path / "ImageReward.safetensors")


def test_another_model_under_the_name_is_refused(root, tmp_path):
    """A wrong click in a list of folders must not give plausible numbers."""
    with pytest.raises(InputError, match="another CLIP, with 768 features instead of 1024"):
        rewards.load("pickscore", root / loading.CLIP_L_FOLDER)
    with pytest.raises(InputError, match=r"is version 2\.0"):
        hps.load_hps(root / "hpsv2" / hps.FILES["v2.0"], "v2.1")


def test_a_link_to_a_name_without_ending_loads_with_the_vocabulary_beside_the_link(root, tmp_path):
    """Hubs keep files under their hashes and link to them."""
    blob = tmp_path / "blobs" / "0a1b2c"
    blob.parent.mkdir()
    save_file(tiny.open_clip_model().state_dict(), blob)
    link = tmp_path / "HPS_v2.1_compressed.safetensors"
    link.symlink_to(blob)
    tiny.save_clip_tokenizer(tmp_path)
    architecture = {"model_cfg": tiny.ARCHITECTURE}
    linked = hps.load_hps(link, "v2.1", architecture=architecture)
    torch.testing.assert_close(linked.score(batch(), tiny.PROMPTS), hps_of("v2.1")(root).score(batch(), tiny.PROMPTS))
    blob.rename(tmp_path / "renamed.pt")  # safetensors under the name of a checkpoint
    assert set(files.read_weights(tmp_path / "renamed.pt")) == set(tiny.open_clip_model().state_dict())
