"""DiffusersGenerator against stock diffusers pipelines, finite differences and separate model calls."""

from __future__ import annotations

import copy
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import diffusers
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ipgo_engine import NoiseConfig, optimize_noise, rewards
from ipgo_engine.errors import Cancelled, InputError
from ipgo_engine.generators.base import Conditioning
from ipgo_engine.generators.denoiser import Guidance
from ipgo_engine.generators.diffusers import DiffusersGenerator
from ipgo_engine.generators.identity import describe_encoder
from ipgo_engine.generators.loading import load_pipeline
from ipgo_engine.generators.samplers import SAMPLERS, make_scheduler

from . import tiny_pipelines as tiny

STEPS = 4
LONG = "a cat on the moon in the rain and a red dog on the moon in the rain and a cat again and again and again"
ALL_SAMPLERS = [(name, 0.0) for name in SAMPLERS] + [("ddim", 0.5), ("ddim", 1.0)]
NOISY = [("ddim", 1.0), ("ddim", 0.5), ("euler_ancestral", 0.0), ("dpmpp_2m_sde", 0.0)]
GRADIENT_SAMPLERS = [("ddim", 0.0), ("ddim", 1.0), *((name, 0.0) for name in SAMPLERS if name != "ddim")]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation", "ignore:`upcast_vae`"),
]


@pytest.fixture(scope="module")
def sd() -> Any:
    return tiny.sd()


@pytest.fixture(scope="module")
def sdxl() -> Any:
    return tiny.sdxl()


@pytest.fixture(scope="module")
def soft() -> Any:
    """float32, no saturated pixels: finite differences see no clamp."""
    return tiny.sd(contrast=0.2)


@pytest.fixture(scope="module")
def soft64() -> Any:
    return tiny.sd(contrast=0.2).to(torch.float64)


def make(pipeline: Any, **settings: Any) -> DiffusersGenerator:
    return DiffusersGenerator(pipeline, **{"steps": STEPS, "guidance_scale": 5.0, **settings})


def stock(pipeline: Any, prompts: list[str], seeds: list[int], *, sampler: str = "ddim", **options: Any) -> Tensor:
    """The pipeline's own picture, with the scheduler swapped as its documentation says."""
    own = pipeline.scheduler
    pipeline.scheduler = make_scheduler(sampler, own.config)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    defaults = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "pt"}
    try:
        return pipeline(prompt=prompts, generator=generators, **{**defaults, **options}).images.float()
    finally:
        pipeline.scheduler = own


def image(generator: DiffusersGenerator, prompts: list[str], seeds: list[int], **options: Any) -> Tensor:
    with torch.no_grad():
        return generator.generate(generator.encode(prompts), generator.draw_noise(seeds), **options)


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def lengthened(conditioning: Conditioning, count: int = 6, seed: int = 9) -> Conditioning:
    """Random tokens before and after, as learned tokens are inserted."""
    rows, _, width = conditioning.embeddings.shape
    extra = rand(rows, count, width, seed=seed, dtype=conditioning.embeddings.dtype)
    embeddings = torch.cat([extra[:, : count // 2], conditioning.embeddings, extra[:, count // 2 :]], dim=1)
    mask = conditioning.mask
    if mask is not None:
        ones = torch.ones(rows, count // 2, dtype=torch.bool)
        mask = torch.cat([ones, mask, ones], dim=1)
    return conditioning.with_embeddings(embeddings, mask)


class SeparateCalls:
    """The UNet called for one row at a time with nothing but that row's valid positions."""

    def __init__(self, pipeline: Any) -> None:
        self.unet, self.guided = pipeline.unet, True

    def one(self, latents: Tensor, timestep: Tensor, embeddings: Tensor, mask: Tensor | None, added: Any) -> Tensor:
        kept = embeddings if mask is None else embeddings[:, mask[0]]
        return self.unet(latents, timestep, encoder_hidden_states=kept, added_cond_kwargs=added)[0]

    def __call__(self, latents: Tensor, timestep: Tensor, guidance: Guidance) -> Tensor:
        assert guidance.negative is not None
        sides = []
        for side, embeddings in enumerate((guidance.negative, guidance.positive)):
            rows = []
            for row in range(len(latents)):
                at = slice(side * len(latents) + row, side * len(latents) + row + 1)
                added = None if guidance.added is None else {k: v[at] for k, v in guidance.added.items()}
                mask = None if guidance.mask is None else guidance.mask[at]
                rows.append(self.one(latents[row : row + 1], timestep, embeddings[row : row + 1], mask, added))
            sides.append(torch.cat(rows))
        return sides[0] + guidance.scale * (sides[1] - sides[0])


# Against the stock pipeline


@pytest.mark.parametrize(("sampler", "eta"), ALL_SAMPLERS)
@pytest.mark.parametrize("negative", [None, "blurry bad"])
def test_sd_equals_stock_bit_for_bit(sd: Any, sampler: str, eta: float, negative: str | None) -> None:
    prompts, seeds = ["a cat on the moon", "red dog"], [3, 8]
    options: dict[str, Any] = {} if negative is None else {"negative_prompt": [negative] * 2}
    expected = stock(sd, prompts, seeds, sampler=sampler, eta=eta, **options)
    found = image(make(sd, sampler=sampler, eta=eta, negative_prompt=negative), prompts, seeds)
    assert torch.equal(found, expected)
    assert found.std() > 0.1


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 1.0), ("lms", 0.0), ("euler_ancestral", 0.0), ("heun", 0.0)])
@pytest.mark.parametrize("force_zeros", [True, False])
@pytest.mark.parametrize("negative", [None, "", "blurry bad"])
def test_sdxl_equals_stock_bit_for_bit(sampler: str, eta: float, force_zeros: bool, negative: str | None) -> None:
    pipeline = tiny.sdxl(force_zeros=force_zeros)
    prompts, seeds = ["a cat on the moon", "red dog"], [3, 8]
    options: dict[str, Any] = {} if negative is None else {"negative_prompt": [negative] * 2}
    expected = stock(pipeline, prompts, seeds, sampler=sampler, eta=eta, **options)
    found = image(make(pipeline, sampler=sampler, eta=eta, negative_prompt=negative), prompts, seeds)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_no_guidance_equals_stock(kind: str, scale: float, request: pytest.FixtureRequest) -> None:
    pipeline = request.getfixturevalue(kind)
    expected = stock(pipeline, ["red dog"], [1], guidance_scale=scale, eta=1.0)
    for negative in (None, "b " * 80):
        generator = make(pipeline, guidance_scale=scale, eta=1.0, negative_prompt=negative)
        assert torch.equal(image(generator, ["red dog"], [1]), expected)


@pytest.mark.parametrize("size", [(24, 32), (32, 16)])
def test_other_sizes_equal_stock(sdxl: Any, size: tuple[int, int]) -> None:
    height, width = size
    expected = stock(sdxl, ["red dog"], [1], height=height, width=width)
    found = image(make(sdxl, height=height, width=width), ["red dog"], [1])
    assert found.shape == (1, 3, height, width)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde"])  # the second draws float32 all the same
def test_half_precision_equals_stock(kind: str, dtype: torch.dtype, sampler: str) -> None:
    pipeline = getattr(tiny, kind)().to(dtype)
    expected = stock(pipeline, ["red dog"], [1], sampler=sampler)
    generator = make(pipeline, sampler=sampler)
    found = image(generator, ["red dog"], [1])
    assert torch.equal(found, expected)
    assert found.dtype == generator.draw_noise([1]).dtype == generator.encode(["a"]).embeddings.dtype == torch.float32
    assert pipeline.vae.dtype == dtype


def test_an_sdxl_vae_that_stays_in_half_precision_equals_stock() -> None:
    pipeline = tiny.sdxl().to(torch.float16)
    upcast = image(make(pipeline), ["red dog"], [1])
    pipeline.vae.register_to_config(force_upcast=False)
    expected = stock(pipeline, ["red dog"], [1])
    assert torch.equal(image(make(pipeline), ["red dog"], [1]), expected)
    assert not torch.equal(upcast, expected)


def test_moments_of_the_latents_count_as_in_the_stock_pipeline(sd: Any, sdxl: Any) -> None:
    """SDXL's undoes them, SD's does not know them."""
    for plain, counts in ((sdxl, True), (sd, False)):
        pipeline = copy.deepcopy(plain)
        pipeline.vae.register_to_config(latents_mean=[-1.6, 0.4, 2.0, -0.7], latents_std=[8.4, 5.9, 3.0, 5.2])
        expected = stock(pipeline, ["red dog"], [3])
        assert torch.equal(image(make(pipeline), ["red dog"], [3]), expected)
        assert torch.allclose(image(make(plain), ["red dog"], [3]), expected, atol=0.01) is not counts


def test_a_model_with_the_guidance_scale_as_input_equals_stock() -> None:
    pipeline = tiny.sd(unet_options={"time_cond_proj_dim": 8})
    assert torch.equal(image(make(pipeline), ["a", "b"], [1, 2]), stock(pipeline, ["a", "b"], [1, 2]))


def test_a_text_encoder_that_does_not_attend_to_padding_equals_stock() -> None:
    pipeline = tiny.sd()
    attending = image(make(pipeline), ["red dog"], [1])
    pipeline.text_encoder.config.use_attention_mask = True
    expected = stock(pipeline, ["red dog"], [1])
    assert torch.equal(image(make(pipeline), ["red dog"], [1]), expected)
    assert not torch.allclose(attending, expected, atol=1e-3)


def test_a_textual_inversion_of_several_vectors_equals_stock() -> None:
    pipeline = tiny.sd()
    plain = image(make(pipeline), ["a <heart>"], [1])
    pipeline.load_textual_inversion(5 * rand(3, 16, seed=1), token="<heart>")
    expected = stock(pipeline, ["a <heart>"], [1])
    assert torch.equal(image(make(pipeline), ["a <heart>"], [1]), expected)
    assert not torch.allclose(plain, expected, atol=0.01)


def test_karras_steps_follow_their_formula(sd: Any) -> None:
    """Karras et al. 2022, eq. 5 with rho = 7; without the name the steps lie otherwise."""
    for name, follows in (("dpmpp_2m_karras", True), ("dpmpp_2m", False)):
        scheduler = make_scheduler(name, sd.scheduler.config)
        scheduler.set_timesteps(10)
        sigmas = scheduler.sigmas[:-1].numpy()
        expected = numpy.linspace(sigmas[0] ** (1 / 7), sigmas[-1] ** (1 / 7), 10) ** 7
        assert numpy.allclose(sigmas, expected, rtol=1e-3) is follows


def test_a_sampler_is_the_one_named_whatever_the_pipeline_had() -> None:
    own = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", beta_schedule="scaled_linear")
    assert make_scheduler("dpmpp_2m", own.config).config.algorithm_type == "dpmsolver++"
    assert make_scheduler("dpmpp_2m_sde", tiny.scheduler().config).config.algorithm_type == "sde-dpmsolver++"


@pytest.mark.parametrize("last", [True, False])
def test_last_noise_counts_only_where_it_is_used(last: bool) -> None:
    """With `set_alpha_to_one` the last DDIM step has variance 0: its noise is drawn and has no effect."""
    pipeline = tiny.sd(set_alpha_to_one=not last)
    generator = make(pipeline, eta=1.0)
    assert generator.noise_shape == (STEPS + last, 4, 8, 8)
    assert torch.equal(image(generator, ["red dog"], [1]), stock(pipeline, ["red dog"], [1], eta=1.0))


@pytest.mark.parametrize(("sampler", "eta"), NOISY)
def test_every_noise_matters(sd: Any, sampler: str, eta: float) -> None:
    generator = make(sd, sampler=sampler, eta=eta)
    conditioning, noise = generator.encode(["red dog"]), generator.draw_noise([1])
    before = image(generator, ["red dog"], [1])
    assert generator.noise_shape[0] > 1
    for index in range(generator.noise_shape[0]):
        changed = noise.clone()
        changed[:, index] *= -1
        with torch.no_grad():
            assert not torch.allclose(generator.generate(conditioning, changed), before, atol=1e-4)


def test_drawn_noise_is_what_the_seed_gives(sd: Any) -> None:
    generator = make(sd, eta=1.0)
    random_generator = torch.Generator("cpu").manual_seed(5)
    expected = [torch.randn((1, 4, 8, 8), generator=random_generator) for _ in range(generator.noise_shape[0])]
    assert torch.equal(generator.draw_noise([4, 5])[1], torch.cat(expected))


# One image does not see another


@pytest.mark.parametrize(("kind", "negative"), [("sd", "bad"), ("sdxl", "bad"), ("sdxl", None)])
@pytest.mark.parametrize("padded", [True, False])
def test_a_batch_equals_single_images(
    kind: str, negative: str | None, padded: bool, request: pytest.FixtureRequest
) -> None:
    prompts, seeds = ["a cat", LONG, "", "red dog on the moon"], [3, 1, 4, 1]
    pipeline = request.getfixturevalue(kind)
    generator = make(pipeline, eta=1.0, padded=padded, negative_prompt=negative)
    batch = image(generator, prompts, seeds)
    rows = generator.encode(prompts)
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = image(generator, [prompt], [seed])
        assert torch.allclose(batch[row : row + 1], alone, atol=2e-5)
        with torch.no_grad():
            taken = generator.generate(rows.select([row]), generator.draw_noise([seed]))
        assert torch.allclose(taken, alone, atol=2e-5)


def test_a_short_prompt_beside_one_as_long_as_the_negative_equals_itself_alone(sd: Any) -> None:
    generator = make(sd, padded=False)
    both = image(generator, ["a cat", "a " * 75], [1, 2])
    assert torch.allclose(both[:1], image(generator, ["a cat"], [1]), atol=2e-5)


# Sequences of different lengths


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("prompts", [["a cat"], ["a cat", "red dog on the moon"], ["a cat", LONG]])
@pytest.mark.parametrize("negative", [None, "bad", LONG])
def test_one_masked_call_equals_separate_calls(
    kind: str, padded: bool, prompts: list[str], negative: str | None, request: pytest.FixtureRequest
) -> None:
    pipeline = request.getfixturevalue(kind)
    generator = make(pipeline, padded=padded, negative_prompt=negative)
    conditioning = lengthened(generator.encode(prompts))
    noise = generator.draw_noise(range(len(prompts)))
    with torch.no_grad():
        found = generator.generate(conditioning, noise)
        generator._denoiser = SeparateCalls(pipeline)  # type: ignore[assignment]
        expected = generator.generate(conditioning, noise)
    assert torch.allclose(found, expected, atol=2e-5)


def test_equal_lengths_need_no_mask(sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = sd.unet.forward
    monkeypatch.setattr(
        sd.unet, "forward", lambda *a, **k: seen.append(k.get("encoder_attention_mask")) or forward(*a, **k)
    )
    generator = make(sd)
    noise = generator.draw_noise([0, 1])
    with torch.no_grad():
        both = generator.encode(["a cat", "red dog"])
        generator.generate(both.with_embeddings(both.embeddings, torch.ones(2, 77, dtype=torch.bool)), noise)
        assert len(seen) == STEPS
        assert seen == [None] * STEPS
        seen.clear()
        generator.generate(lengthened(both), noise)
    assert len(seen) == STEPS
    assert all(mask.shape == (4, 83) and mask[:2].sum() == 2 * 77 and mask[2:].all() for mask in seen)


def test_masked_positions_have_no_effect_and_no_gradient(soft: Any) -> None:
    generator = make(soft, padded=False)
    conditioning, noise = generator.encode(["a cat", "red dog on the moon"]), generator.draw_noise([0, 1])
    assert conditioning.mask is not None
    assert conditioning.mask.sum(1).tolist() == [len("acat") + 2, len("reddogonthemoon") + 2]
    hidden = ~conditioning.mask
    embeddings = conditioning.embeddings.clone().requires_grad_()
    result = generator.generate(conditioning.with_embeddings(embeddings, conditioning.mask), noise)
    (gradient,) = torch.autograd.grad(result.sum(), embeddings)
    assert gradient[hidden].abs().max() == 0
    assert gradient[conditioning.mask].abs().min() > 0
    noisy = torch.where(hidden[..., None], rand(*embeddings.shape, seed=1), embeddings)
    assert torch.equal(generator.generate(conditioning.with_embeddings(noisy, conditioning.mask), noise), result)


def test_unpadded_prompts_are_the_first_positions_of_padded_ones(sd: Any) -> None:
    full = make(sd).encode(["a cat"]).embeddings
    cut = make(sd, padded=False).encode(["a cat"])
    assert cut.mask is None
    assert torch.equal(cut.embeddings, full[:, :6])
    assert make(sd, padded=False).encode([""]).embeddings.shape == (1, 2, 16)


# Prompts of any length


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("count", [74, 75])
def test_up_to_75_tokens_equal_stock(kind: str, count: int, request: pytest.FixtureRequest) -> None:
    pipeline = request.getfixturevalue(kind)
    assert torch.equal(image(make(pipeline), ["a " * count], [1]), stock(pipeline, ["a " * count], [1]))


def test_a_long_prompt_is_encoded_in_parts(sd: Any) -> None:
    generator = make(sd)
    first, second = "a " * 75, "b " * 75
    whole = generator.encode([first + second + "red"]).embeddings
    parts = [generator.encode([text]).embeddings for text in (first, second, "red")]
    assert whole.shape == (1, 3 * 77, 16)
    assert torch.allclose(whole, torch.cat(parts, dim=1), atol=1e-5)


def test_a_short_side_is_continued_with_the_empty_text(sd: Any) -> None:
    short, empty = make(sd).encode(["a cat"]).embeddings, make(sd).encode([""]).embeddings
    conditioning = make(sd, negative_prompt="b " * 80).encode(["a cat"])
    assert conditioning.mask is None
    assert torch.allclose(conditioning.embeddings, torch.cat([short, empty], dim=1), atol=1e-5)
    negative = make(sd, negative_prompt="bad")._negative(make(sd).encode(["b " * 160]))
    bad = make(sd).encode(["bad"]).embeddings
    assert torch.allclose(negative.embeddings, torch.cat([bad, empty, empty], dim=1), atol=1e-5)


# Gradients


def scalar(
    generator: DiffusersGenerator, conditioning: Conditioning, **options: Any
) -> Callable[[Tensor, Tensor], Tensor]:
    """(embeddings, noise) to a fixed random projection of the image."""
    count = len(conditioning)
    pixels = (count, 3, 2 * generator.noise_shape[2], 2 * generator.noise_shape[3])
    weights = rand(*pixels, seed=11, dtype=torch.float64)

    def function(embeddings: Tensor, noise: Tensor) -> Tensor:
        result = generator.generate(conditioning.with_embeddings(embeddings, conditioning.mask), noise, **options)
        assert result.min() > 0
        assert result.max() < 1
        return (weights.to(result.dtype) * result).sum()

    return function


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    return torch.autograd.grad(function(*leaves), leaves)


@torch.no_grad()
def slope(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], which: int, direction: Tensor) -> float:
    """Central difference of fourth order."""
    size = 1e-2

    def at(multiple: int) -> float:
        moved = [t + multiple * size * direction if i == which else t for i, t in enumerate(inputs)]
        return float(function(*moved))

    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * size)


def assert_slopes(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
    """Random directions see an error anywhere in the gradient: one in all embeddings, one in each noise."""
    embeddings, noise = inputs
    directions = [(0, rand(*embeddings.shape, seed=21, dtype=embeddings.dtype))]
    for index in range(noise.shape[1]):
        direction = torch.zeros_like(noise)
        direction[:, index] = rand(*noise[:, index].shape, seed=22 + index)
        directions.append((1, direction))
    for which, direction in directions:
        touched = direction != 0
        typical = found[which][touched].norm()
        expected = slope(function, inputs, which, direction)
        assert abs(float((found[which] * direction).sum()) - expected) < 1e-3 * typical
        assert typical > 1e-6


@pytest.mark.parametrize(("sampler", "eta"), GRADIENT_SAMPLERS)
def test_gradients_equal_finite_differences(soft: Any, soft64: Any, sampler: str, eta: float) -> None:
    settings = {"sampler": sampler, "eta": eta, "steps": 3}
    generator = make(soft64, **settings)
    conditioning = lengthened(generator.encode(["a cat"]))
    inputs = (conditioning.embeddings, generator.draw_noise([5]))
    function = scalar(generator, conditioning)
    stored = gradients(function, *inputs)
    assert_slopes(function, inputs, stored)
    plain = gradients(scalar(generator, conditioning, checkpoint=False), *inputs)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(stored, plain, strict=True))
    single = make(soft, **settings)
    for options in ({"checkpoint": True}, {"checkpoint": False}):
        rounded = gradients(scalar(single, conditioning, **options), *(tensor.float() for tensor in inputs))
        for half, full in zip(rounded, stored, strict=True):
            assert half.dtype == torch.float32
            assert (half.double() - full).norm() < 1e-3 * full.norm()


def test_sdxl_gradients_equal_finite_differences() -> None:
    pipeline = tiny.sdxl(contrast=0.2).to(torch.float64)
    generator = make(pipeline, eta=1.0, steps=2, negative_prompt="bad")
    conditioning = lengthened(generator.encode(["a cat", "dog"]))
    inputs = (conditioning.embeddings, generator.draw_noise([5, 6]))
    function = scalar(generator, conditioning)
    assert_slopes(function, inputs, gradients(function, *inputs))


def test_gradients_are_right_where_the_model_writes_in_place(soft64: Any) -> None:
    pipeline = copy.deepcopy(soft64)
    pipeline.enable_freeu(s1=0.6, s2=0.4, b1=1.4, b2=1.6)
    generator = make(pipeline, steps=2)
    conditioning = generator.encode(["a cat"])
    inputs = (conditioning.embeddings, generator.draw_noise([5]))
    function = scalar(generator, conditioning)
    assert_slopes(function, inputs, gradients(function, *inputs))


class OnlyLast:
    """Replays recorded predictions and calls the model in the last `count` steps only."""

    def __init__(self, generator: DiffusersGenerator, count: int) -> None:
        self.inner, self.guided = generator._denoiser, True
        self.first, self.calls, self.steps = generator.steps - count, 0, generator.steps
        self.recorded: dict[int, Tensor] = {}

    def __call__(self, latents: Tensor, timestep: Tensor, guidance: Guidance) -> Tensor:
        index = self.calls % self.steps
        self.calls += 1
        if index < self.first and index in self.recorded:
            return self.recorded[index]
        self.recorded[index] = self.inner(latents, timestep, guidance).detach()
        return self.recorded[index]


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 1.0), ("lms", 0.0), ("heun", 0.0), ("dpmpp_2m", 0.0)])
@pytest.mark.parametrize("last", [1, 2])
def test_truncated_gradients_hold_earlier_predictions_fixed(soft64: Any, sampler: str, eta: float, last: int) -> None:
    generator = make(soft64, sampler=sampler, eta=eta, steps=3)
    conditioning = generator.encode(["a cat"])
    inputs = (conditioning.embeddings, generator.draw_noise([5]))
    function = scalar(generator, conditioning, backprop_steps=last)
    found = gradients(function, *inputs)
    plain = gradients(scalar(generator, conditioning, backprop_steps=last, checkpoint=False), *inputs)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(found, plain, strict=True))
    generator._denoiser = OnlyLast(generator, last)  # type: ignore[assignment]
    with torch.no_grad():
        function(*inputs)
    assert_slopes(function, inputs, found)


@pytest.mark.parametrize(("sampler", "eta"), [("ddim", 1.0), ("lms", 0.0)])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_values_are_the_same_for_every_truncation(sd: Any, sampler: str, eta: float, checkpoint: bool) -> None:
    generator = make(sd, sampler=sampler, eta=eta)
    conditioning, noise = generator.encode(["red dog"]), generator.draw_noise([2])
    expected = image(generator, ["red dog"], [2])
    slopes = []
    for last in (1, 2, 3, STEPS, STEPS + 5, None):
        embeddings = conditioning.embeddings.clone().requires_grad_()
        changed = conditioning.with_embeddings(embeddings)
        result = generator.generate(changed, noise, backprop_steps=last, checkpoint=checkpoint)
        assert torch.equal(result, expected)
        slopes.append(torch.autograd.grad(result.sum(), embeddings)[0])
    assert torch.equal(slopes[3], slopes[5])
    assert torch.equal(slopes[4], slopes[5])
    assert not torch.allclose(slopes[0], slopes[5], rtol=1e-2)


def test_gradient_passes_through_the_clamp() -> None:
    generator = make(tiny.sd(contrast=8.0), steps=1)
    conditioning, noise = generator.encode(["red dog"]), generator.draw_noise([2]).requires_grad_()
    result = generator.generate(conditioning, noise)
    saturated = (result == 0) | (result == 1)
    assert saturated.float().mean() > 0.2
    (gradient,) = torch.autograd.grad((result * saturated).sum(), noise)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_tiny_gradients_survive_half_precision(soft: Any, checkpoint: bool, way: str) -> None:
    if way == "weights":
        half = make(copy.deepcopy(soft).to(torch.float16), eta=1.0)
    else:
        half = make(soft, eta=1.0, autocast=torch.float16)
    found = []
    for generator in (make(soft, eta=1.0), half):
        conditioning = make(soft).encode(["a cat"])
        inputs = (conditioning.embeddings, make(soft, eta=1.0).draw_noise([5]))
        function = scalar(generator, conditioning, checkpoint=checkpoint)
        found.append(gradients(lambda *both, function=function: 1e-9 * function(*both), *inputs))
    for exact, rounded in zip(*found, strict=True):
        assert rounded.dtype == torch.float32
        assert (exact - rounded).norm() < 0.1 * exact.norm()


def test_gradients_pass_through_the_vae_that_sdxl_runs_in_float32() -> None:
    exact = tiny.sdxl(contrast=0.2)
    half = copy.deepcopy(exact).to(torch.float16)
    conditioning, noise = make(exact).encode(["a cat"]), make(exact).draw_noise([5])
    found = [
        gradients(scalar(make(pipeline), conditioning), conditioning.embeddings, noise) for pipeline in (exact, half)
    ]
    for expected, rounded in zip(*found, strict=True):
        assert (expected - rounded).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("checkpoint", [True, False])
def test_autocast_is_close_and_differentiable(soft: Any, checkpoint: bool) -> None:
    exact, fast = make(soft, eta=1.0), make(soft, eta=1.0, autocast=torch.bfloat16)
    difference = (image(exact, ["a cat"], [1]) - image(fast, ["a cat"], [1])).abs().max()
    assert 0 < difference < 0.05
    conditioning = exact.encode(["a cat"])
    inputs = (conditioning.embeddings, exact.draw_noise([1]))
    a = gradients(scalar(exact, conditioning, checkpoint=checkpoint), *inputs)
    b = gradients(scalar(fast, conditioning, checkpoint=checkpoint), *inputs)
    assert all(torch.cosine_similarity(x.flatten(), y.flatten(), dim=0) > 0.98 for x, y in zip(a, b, strict=True))


# What stays as it was


def test_no_global_random_state_is_used(sd: Any) -> None:
    before = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    generator = make(sd, eta=1.0)
    noise = generator.draw_noise([1]).requires_grad_()
    generator.generate(generator.encode(["a cat"]), noise).sum().backward()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert str(numpy.random.get_state()) == before[2]


def test_the_pipeline_is_left_as_found() -> None:
    pipeline = tiny.sd()
    scheduler, settings = pipeline.scheduler, dict(pipeline.scheduler.config)
    module = sys.modules[diffusers.DDIMScheduler.__module__]
    draw = vars(module)["randn_tensor"]
    before = stock(pipeline, ["red dog"], [1], eta=1.0)
    generator = make(pipeline, eta=1.0)
    image(generator, ["a cat"], [4])
    assert pipeline.scheduler is scheduler
    assert dict(scheduler.config) == settings
    assert vars(module)["randn_tensor"] is draw
    assert torch.equal(stock(pipeline, ["red dog"], [1], eta=1.0), before)
    modules = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert not any(p.requires_grad for module in modules for p in module.parameters())
    assert not any(module.training for module in modules)


@pytest.mark.parametrize("sampler", ["lms", "dpmpp_2m", "unipc"])
def test_runs_do_not_see_each_other(sd: Any, sampler: str) -> None:
    generator = make(sd, sampler=sampler)
    first = image(generator, ["a cat"], [4])
    image(generator, ["red dog"], [5])
    assert torch.equal(image(generator, ["a cat"], [4]), first)


def test_stopping_works_in_both_directions(sd: Any) -> None:
    calls: list[int] = []
    limit = [2]
    generator = make(sd, should_stop=lambda: calls.append(0) or len(calls) > limit[0])
    conditioning, noise = generator.encode(["a cat"]), generator.draw_noise([1]).requires_grad_()
    with pytest.raises(Cancelled):
        generator.generate(conditioning, noise)
    assert len(calls) == 3
    calls.clear()
    limit[0] = STEPS + 1 + 2  # every forward call, the decoder included, then two calls of the backward
    result = generator.generate(conditioning, noise)
    with pytest.raises(Cancelled):
        result.sum().backward()


def test_importing_the_module_does_not_import_diffusers() -> None:
    code = "import sys, ipgo_engine.generators.diffusers; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Encoders


def test_encoder_identity_survives_rounding_and_tells_weights_apart() -> None:
    names = {make(tiny.sd().to(dtype)).encoder for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    assert len(names) == 1
    assert names != {make(tiny.sd(seed=1)).encoder}
    assert next(iter(names)).startswith("clip-16x3-")


def test_encoder_identity_does_not_depend_on_wrapping_or_order(sd: Any) -> None:
    weights = list(sd.text_encoder.named_parameters())
    wrapped = [(f"clip_l.transformer.{name}", weight) for name, weight in reversed(weights)]
    assert describe_encoder(wrapped) == describe_encoder(weights)
    assert describe_encoder([("a", torch.ones(3))]).startswith("encoder-0x0-")


def test_both_encoders_count_in_sdxl(sd: Any, sdxl: Any) -> None:
    generator = make(sdxl)
    assert generator.dim == 40
    assert generator.encoder.count("+") == 1
    assert make(sd).dim == 16


# Loading


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_load_from_a_folder(kind: str, tmp_path: Any, request: pytest.FixtureRequest) -> None:
    pipeline = request.getfixturevalue(kind)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusersGenerator.load(tmp_path, steps=STEPS, guidance_scale=5.0, device="cpu")
    # Not bit for bit: products depend on where in memory the weights lie.
    assert torch.allclose(image(loaded, ["a cat"], [1]), image(make(pipeline), ["a cat"], [1]), atol=2e-5)
    assert loaded.encoder == make(pipeline).encoder
    half = DiffusersGenerator.load(tmp_path, steps=1, dtype=torch.bfloat16)
    assert half._dtype == torch.bfloat16


def test_load_from_a_folder_of_half_precision_files_alone(sdxl: Any, tmp_path: Any) -> None:
    for variant in (None, "fp16"):
        sdxl.save_pretrained(tmp_path / str(variant), variant=variant)
    plain, half = (DiffusersGenerator.load(tmp_path / str(variant), steps=2) for variant in (None, "fp16"))
    assert plain.settings == half.settings
    assert torch.allclose(image(plain, ["a cat"], [1]), image(half, ["a cat"], [1]), atol=2e-5)


def test_load_takes_the_whole_weights_where_those_of_half_precision_lie_beside_them(sd: Any, tmp_path: Any) -> None:
    for variant in (None, "fp16"):
        sd.save_pretrained(tmp_path, variant=variant)
    (half,) = (tmp_path / "unet").glob("*.fp16.safetensors")
    save_file({name: torch.zeros_like(weight) for name, weight in load_file(half).items()}, half)
    loaded = load_pipeline(tmp_path).unet.state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in sd.unet.state_dict().items())


def test_load_needs_no_safety_checker(sd: Any, tmp_path: Any) -> None:
    sd.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    parts = json.loads(index.read_text(encoding="utf-8"))
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index.write_text(json.dumps(parts | {"safety_checker": checker}), encoding="utf-8")
    assert load_pipeline(tmp_path).safety_checker is None


def test_load_refuses_what_it_cannot_use(sd: Any, tmp_path: Any) -> None:
    with pytest.raises(InputError, match=r"folder is .*nowhere.*model_index\.json"):
        DiffusersGenerator.load(tmp_path / "nowhere")
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', encoding="utf-8")
    with pytest.raises(InputError, match="FluxPipeline"):
        DiffusersGenerator.load(tmp_path)
    (tmp_path / "model_index.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"model_index\.json"):
        DiffusersGenerator.load(tmp_path)
    sd.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(InputError, match="safetensors"):
        DiffusersGenerator.load(tmp_path)


@pytest.mark.parametrize("part", ["tokenizer", "unet", "scheduler"])
def test_load_misses_a_part(sd: Any, tmp_path: Any, part: str) -> None:
    sd.save_pretrained(tmp_path)
    shutil.rmtree(tmp_path / part)
    with pytest.raises(InputError, match=f"its part {part} is missing"):
        DiffusersGenerator.load(tmp_path)


def test_load_misses_a_vocabulary(sd: Any, tmp_path: Any) -> None:
    sd.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "vocab.json"):
        (tmp_path / "tokenizer" / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="tokenizer has no vocabulary"):
        DiffusersGenerator.load(tmp_path)


def test_load_of_damaged_weights(sd: Any, tmp_path: Any) -> None:
    sd.save_pretrained(tmp_path)
    config = tmp_path / "text_encoder" / "config.json"
    found = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(found | {"hidden_size": 32}), encoding="utf-8")
    with pytest.raises(InputError, match="cannot be loaded"):
        DiffusersGenerator.load(tmp_path)
    config.write_text(json.dumps(found), encoding="utf-8")
    weights = tmp_path / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        DiffusersGenerator.load(tmp_path)


# Mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "magic"}, "sampler is 'magic': use one of ddim"),
        ({"steps": 0}, "steps is 0: use 1 to 1000"),
        ({"steps": 1001}, "steps is 1001"),
        ({"width": 17}, "width is 17: use a multiple of 2 pixels, for example 16"),
        ({"height": 0}, "height is 0: use a multiple of 2 pixels, for example 2"),
        ({"eta": 1.5}, "eta is 1.5: use 0"),
        ({"eta": 0.5, "sampler": "lms"}, "eta is 0.5, but LMSDiscreteScheduler has none"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
    ],
)
def test_settings_that_cannot_work(sd: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(sd, **settings)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_models_without_betas_are_refused(name: str) -> None:
    """The samplers here would make up betas, and the picture would be noise."""
    pipeline = tiny.sd()
    pipeline.scheduler = getattr(diffusers, name)()
    with pytest.raises(InputError, match="flow matching, EDM"):
        make(pipeline)


@pytest.mark.parametrize(("kind", "sampler"), [("flow_prediction", "ddim"), ("sample", "euler_ancestral")])
def test_predictions_that_a_sampler_does_not_know_are_refused(kind: str, sampler: str) -> None:
    pipeline = tiny.sd()
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type=kind)
    with pytest.raises(InputError, match=f"prediction_type is '{kind}'.*another sampler"):
        make(pipeline, sampler=sampler)
    make(pipeline, sampler="dpmpp_2m")


def test_inputs_that_cannot_work(sd: Any, sdxl: Any) -> None:
    generator = make(sd, eta=1.0)
    conditioning, noise = generator.encode(["a cat"]), generator.draw_noise([1])
    with pytest.raises(InputError, match="noise has shape"):
        generator.generate(conditioning, noise[:, :1])
    with pytest.raises(InputError, match=r"noise has shape \(2,"):
        generator.generate(conditioning, torch.cat([noise] * 2))
    with pytest.raises(InputError, match="embeddings have shape"):
        generator.generate(conditioning.with_embeddings(torch.zeros(1, 77, 12)), noise)
    with pytest.raises(InputError, match="mask has shape"):
        generator.generate(conditioning.with_embeddings(conditioning.embeddings, torch.ones(1, 70)), noise)
    with pytest.raises(InputError, match="backprop_steps is 0"):
        generator.generate(conditioning, noise, backprop_steps=0)
    for prompts in ("a cat", [], [3]):
        with pytest.raises(InputError, match="prompts is"):
            generator.encode(prompts)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="seeds is empty"):
        generator.draw_noise([])
    other = make(sdxl)
    bare, noise = Conditioning(other.encode(["a"]).embeddings), other.draw_noise([1])
    with pytest.raises(InputError, match="pooled"):
        other.generate(bare, noise)
    with pytest.raises(InputError, match="without unet, vae"):
        make(object())


def test_a_run_is_not_resumed_with_another_model_behind_the_same_text_encoder(tmp_path):
    state = tmp_path / "state.safetensors"
    config = NoiseConfig(iterations=1, permutations=2)

    def resumed(pipeline):
        generator = DiffusersGenerator(pipeline, steps=2)
        return optimize_noise(generator, rewards.load("brightness"), ["a"], config, state_file=state, resume=True)

    resumed(tiny.sd())
    resumed(tiny.sd())
    for part in ("unet", "vae"):
        other = tiny.sd()
        with torch.no_grad():
            for weight in getattr(other, part).parameters():
                weight.neg_()
        with pytest.raises(InputError, match=f"different: {part}"):
            resumed(other)
