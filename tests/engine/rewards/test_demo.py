"""Rewards of the demo model, with random weights of the same architecture where the model has not been built yet."""

import pytest
import torch

from ipgo_engine import demo, rewards
from ipgo_engine.errors import InputError

from . import tiny


@pytest.fixture
def untrained(monkeypatch, tmp_path):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    layers = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {**layers, "eos_token_id": 49407, "bos_token_id": 49406}
    vision = {**layers, "image_size": 128, "patch_size": 16}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)).train(False)
    tiny.save_clip_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    monkeypatch.setattr(demo, "load_clip", lambda: (model.requires_grad_(False), tokenizer))
    monkeypatch.setattr(demo, "load_judge", lambda: demo.Judge().requires_grad_(False).train(False))


@pytest.mark.parametrize("name", ["demo-clip", "demo-judge"])
@pytest.mark.parametrize("size", [(128, 128), (96, 160), (300, 200)])
def test_contract_and_gradient(untrained, name, size):
    reward = rewards.load(name)
    x = tiny.as_batch(tiny.picture(*size), tiny.picture(*size, 1)).mul(0.9).add(0.05).requires_grad_()
    scores = reward.score(x, tiny.PROMPTS)
    assert isinstance(reward, rewards.Reward)
    assert (reward.name, reward.differentiable) == (name, True)
    assert scores.shape == (2,)
    assert (scores.abs() <= 1).all()
    (gradient,) = torch.autograd.grad(scores.sum(), x)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        up, down = (reward.score(x + s * 0.02 * direction, tiny.PROMPTS).double().sum() for s in (1, -1))
    assert gradient.norm().item() == pytest.approx(((up - down) / 0.04).item(), rel=2e-2)
    assert rewards.Offloaded(reward, "cpu").score(x, tiny.PROMPTS).shape == (2,)


def test_a_demo_model_that_is_not_there_is_one_clear_error(monkeypatch):
    def missing():
        raise FileNotFoundError("clip/config.json")

    monkeypatch.setattr(demo, "load_clip", missing)
    with pytest.raises(InputError, match="embedded demo model"):
        rewards.load("demo-clip")


def test_the_features_of_a_prompt_do_not_depend_on_its_company():
    """A resumed run asks for prompts in other groups than the run it continues, and has to score as that would."""
    prompts = ["black cat", "star / moon: *?", "a long row of red hearts"]
    together = rewards.load("demo-clip").backbone.text_features(prompts)
    alone = rewards.load("demo-clip").backbone
    assert torch.equal(together, torch.cat([alone.text_features([prompt]) for prompt in prompts]))
