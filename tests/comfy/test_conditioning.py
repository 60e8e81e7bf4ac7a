"""Tokens in CONDITIONING of any structure, and CONDITIONING as the engine sees it."""

from __future__ import annotations

import host
import nodes as comfy_nodes
import pytest
import tiny
import torch
from test_stock import CFG, STEPS, generator_module, make, stock

conditioning_module = host.pack("nodes.host.conditioning")
handover_module = host.pack("nodes.host.handover")
errors = host.pack("ipgo_engine.errors")
tokens_module = host.pack("ipgo_engine.tokens")
config = host.pack("ipgo_engine.config")


@pytest.fixture(scope="module")
def world():
    with host.node():
        return tiny.sd15(), tiny.vae(), tiny.conditioning(1), tiny.conditioning(2)


def token(count, seed=0, width=tiny.WIDTH):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_strength_zero_is_the_input_itself():
    given = tiny.conditioning(1)
    assert conditioning_module.insert_tokens(given, token(3), token(2), strength=0.0) is given
    assert conditioning_module.insert_tokens(given, None, token(0)) is given


@pytest.mark.parametrize(("before", "after"), [(3, 2), (0, 2), (3, 0)])
def test_tokens_go_around_the_prompt_and_nothing_is_changed_in_place(before, after):
    control = object()
    with host.node():
        mask = torch.ones(1, 77, dtype=torch.long)
        given = tiny.conditioning(1, area=(8, 8, 0, 0), control=control, attention_mask=mask) + tiny.conditioning(
            2, length=154
        )
        copy = [[e.clone(), dict(o)] for e, o in given]
        out = conditioning_module.insert_tokens(given, token(before, 1), token(after, 2), strength=0.5)
    for (old, old_options), (same, same_options), (new, options) in zip(given, copy, out, strict=True):
        assert torch.equal(old, same)
        assert old_options.keys() == same_options.keys()
        assert new.shape[1] == old.shape[1] + before + after
        assert torch.equal(new[:, before : before + old.shape[1]], old)
        assert torch.allclose(new[0, :before], 0.5 * token(before, 1))
        assert torch.equal(options["pooled_output"], old_options["pooled_output"])
    assert out[0][1]["control"] is control
    assert out[0][1]["attention_mask"].shape == (1, 77 + before + after)
    assert given[0][1]["attention_mask"].shape == (1, 77)


def test_another_encoder_is_refused_clearly():
    with pytest.raises(errors.EncoderMismatchError, match=r"96 wide.*64 wide"):
        conditioning_module.insert_tokens(tiny.conditioning(1), token(2, width=96), None)
    with pytest.raises(errors.InputError, match="t5xxl_ids"):
        conditioning_module.insert_tokens(tiny.conditioning(1, t5xxl_ids=torch.ones(1, 77)), token(2), None)


def test_what_tokens_cannot_go_into_is_refused():
    without, short = tiny.conditioning(1), tiny.conditioning(1, attention_mask=torch.ones(1, 70))
    without[0][0] = None
    with pytest.raises(errors.InputError, match="entry without embeddings"):
        conditioning_module.insert_tokens(without, token(2), None)
    with pytest.raises(errors.InputError, match="attention_mask has length 70, the conditioning 77"):
        conditioning_module.insert_tokens(short, token(2), None)
    two = [[tiny.conditioning(1)[0][0].repeat(2, 1, 1), {}]]
    for given in (without, two):
        with pytest.raises(errors.InputError, match="one prompt per image"):
            conditioning_module.to_engine([given])


def test_tokens_go_into_every_prompt_of_a_batched_conditioning():
    """As nodes make it that join conditionings."""
    batch = [[tiny.conditioning(1)[0][0].repeat(2, 1, 1), {}]]
    ((embeddings, _),) = conditioning_module.insert_tokens(batch, token(3), token(2))
    assert embeddings.shape == (2, 82, tiny.WIDTH)
    assert torch.equal(embeddings[0], embeddings[1])


def test_changing_the_prompt_itself_needs_a_single_entry():
    prompt = conditioning_module.to_engine([tiny.conditioning(1) + tiny.conditioning(2)])
    with pytest.raises(errors.InputError, match="several entries"):
        conditioning_module.from_engine(prompt.with_embeddings(prompt.embeddings + 1, prompt.mask))


def test_only_prompts_that_may_share_a_batch_do():
    """Control, area and mask are of one image each; pooled outputs and prompts are put together."""
    masks = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    options = {"area": [(4, 4, 0, 0), (8, 8, 0, 0)], "control": [object(), object()], "mask": masks, "strength": [1, 2]}
    for name, (same, other) in options.items():
        one, two = (tiny.conditioning(seed, **{name: same}) for seed in (1, 2))
        different = tiny.conditioning(2, **{name: other})
        groups = conditioning_module.from_engine(conditioning_module.to_engine([one, different, two]))
        assert [images for images, _ in groups] == [[0, 2], [1]]
        ((embeddings, kept),) = groups[0][1]
        assert torch.equal(embeddings, torch.cat([one[0][0], two[0][0]]))
        assert kept[name] is same
        assert torch.equal(kept["pooled_output"], torch.cat([c[0][1]["pooled_output"] for c in (one, two)]))


def engine_tokens():
    return tokens_module.IPGOTokens(tiny.WIDTH, config.TokenConfig(prefix_length=3, suffix_length=2, basis_size=8))


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m_sde"])
def test_trained_tokens_reach_stock_nodes_bit_for_bit(world, sampler):
    """generate() on inserted tokens == stock KSampler on the CONDITIONING the Apply node would make."""
    model, vae, positive, negative = world
    generator = make(world, sampler)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = engine_tokens()
    with host.node():
        with generator:
            prompt = generator.encode(["a"])
            image = generator.generate(tokens.condition(prompt), generator.draw_noise([7])).detach().cpu()
        applied = conditioning_module.insert_tokens(positive, tokens.prefix().detach(), tokens.suffix().detach())
        out = comfy_nodes.common_ksampler(model, 7, STEPS, CFG, sampler, "normal", applied, negative, tiny.latent())[0]
        assert torch.equal(image, comfy_nodes.VAEDecode().decode(vae, out)[0].movedim(-1, 1))
    assert not torch.equal(image, stock(world, sampler))


def test_tokens_reach_every_entry_of_a_combined_conditioning(world):
    model, vae, positive, negative = world
    combined = (
        positive + tiny.conditioning(3, area=(4, 8, 2, 0)) + tiny.conditioning(4, start_percent=0.2, end_percent=0.9)
    )
    own = (model, vae, combined, negative)
    generator, tokens = make(own, "euler"), engine_tokens()
    with host.node():
        with generator:
            prompt = generator.encode(["a"])
            image = generator.generate(tokens.condition(prompt), generator.draw_noise([7])).detach().cpu()
        applied = conditioning_module.insert_tokens(combined, tokens.prefix().detach(), tokens.suffix().detach())
    assert torch.equal(image, stock((model, vae, applied, negative), "euler"))
    with host.node(), generator:
        embeddings = generator.encode(["a"])
        inserted = tokens.condition(embeddings)
        images = generator.generate(inserted, generator.draw_noise([7]))
        grads = torch.autograd.grad(
            images.sum(), [p for p in tokens.parameters() if p.requires_grad], allow_unused=True
        )
        assert any(g is not None and bool(g.any()) for g in grads)


class FakeClip:
    """Encodes a prompt into as many chunks of 77 tokens as it has words."""

    cond_stage_model = None

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        return tiny.conditioning(len(text), length=77 * max(1, len(text.split())))


def test_prompts_of_different_length_in_one_batch(world):
    """Each image is what its prompt alone gives; padding is never seen by the model."""
    model, vae, _, _ = world
    with host.node():
        sampling = generator_module.Sampling.by_name(model, "euler", "normal", STEPS, CFG)
        generator = generator_module.ComfyGenerator(model, vae, sampling, "bad", tiny.latent(), clip=FakeClip())
        tokens = engine_tokens()
        prompts = ["short", "two words", "again", "three words now"]
        with generator:
            together = tokens.condition(generator.encode(prompts))
            noise = generator.draw_noise([1, 2, 3, 4])
            images = generator.generate(together, noise).detach()
            for index, prompt in enumerate(prompts):
                single = tokens.condition(generator.encode([prompt]))
                alone = generator.generate(single, noise[index : index + 1]).detach()
                assert float((alone[0] - images[index]).abs().max()) < 1e-5
            rendered, latents = handover_module.render(generator, together, noise)
            assert float((rendered - images.cpu()).abs().max()) < 1e-5
            assert len(latents) == len(prompts)
            rows = together.select([3, 0])
            swapped = generator.generate(rows, noise[[3, 0]]).detach()
            assert float((swapped[0] - images[3]).abs().max()) < 1e-5


def test_native_attention_masks_grow_with_the_tokens():
    mask = torch.ones(1, 77, dtype=torch.long)
    mask[:, 60:] = 0
    given = tiny.conditioning(1, attention_mask=mask)
    prompt = conditioning_module.to_engine([given])
    inserted = engine_tokens().condition(prompt)
    ((rows, back),) = conditioning_module.from_engine(inserted)
    assert rows == [0]
    assert back[0][0].shape == (1, 82, tiny.WIDTH)
    assert back[0][1]["attention_mask"].tolist()[0] == [1] * 3 + mask.tolist()[0] + [1] * 2
    ((_, same),) = conditioning_module.from_engine(prompt)
    assert torch.equal(same[0][0], given[0][0])
    assert torch.equal(same[0][1]["attention_mask"], mask)
