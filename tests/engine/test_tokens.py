"""IPGO tokens against the independent NumPy version of eqs. 2 to 11, and what their files promise."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ipgo_engine import (
    EncoderMismatchError,
    InputError,
    IPGOTokens,
    TokenConfig,
    rotate_even_pairs,
    rotate_odd_pairs,
)
from ipgo_engine.formats.tokens import read_metadata
from ipgo_engine.generators.base import Conditioning
from ipgo_engine.tokens import insert_tokens, nearest_orthonormal, wrap_angles
from tests.engine import reference

DIM = 16
SMALL = TokenConfig(prefix_length=3, suffix_length=2, basis_size=5)


def make(config: TokenConfig = SMALL, dim: int = DIM, seed: int = 0) -> IPGOTokens:
    """Tokens in double precision, so that formulas can be compared to the last digits."""
    return IPGOTokens(dim, config, seed=seed).double()


def numpy_side(tokens: IPGOTokens, side: str) -> dict[str, np.ndarray]:
    state = tokens.state_dict()
    names = ("basis", "coefficients", "angles", "bias", "embedding")
    return {name: state[key].numpy() for name in names if (key := f"sides.{side}.{name}") in state}


def prompts(batch: int = 2, length: int = 7, dim: int = DIM, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, length, dim, generator=generator, dtype=torch.float64)


# --- eqs. 3 to 7 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 4, 10, 768])
@pytest.mark.parametrize("angle", [0.0, 0.3, -2.5, math.pi, math.pi / 2, 7.0])
def test_rotations_are_the_matrices_of_eqs_4_and_5(dim, angle):
    x = prompts(3, 2, dim)
    for rotate, matrix in ((rotate_even_pairs, reference.rotation_r1), (rotate_odd_pairs, reference.rotation_r2)):
        found = rotate(x, torch.tensor(angle, dtype=torch.float64)).numpy()
        np.testing.assert_allclose(found, x.numpy() @ matrix(dim, angle).T, atol=1e-12)


def test_rotation_by_a_right_angle_by_hand():
    x, quarter = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor(math.pi / 2)
    torch.testing.assert_close(rotate_even_pairs(x, quarter), torch.tensor([-2.0, 1.0, -4.0, 3.0]))
    # pairs (1, 2) and (3, 0): (2, 3) -> (-3, 2) and (4, 1) -> (-1, 4)
    torch.testing.assert_close(rotate_odd_pairs(x, quarter), torch.tensor([4.0, -3.0, 2.0, -1.0]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_tokens_are_r2_r1_e_z(seed, scale):
    tokens = make(TokenConfig(prefix_length=3, suffix_length=4, basis_size=5, scale=scale), seed=seed)
    for side, found in (("prefix", tokens.prefix()), ("suffix", tokens.suffix())):
        p = numpy_side(tokens, side)
        expected = scale * reference.tokens(p["basis"], p["coefficients"], p["angles"].reshape(2))
        np.testing.assert_allclose(found.detach().numpy(), expected.T, atol=1e-12)


def test_prefix_and_suffix_have_their_own_parameters():
    tokens = make()
    pre, suf = numpy_side(tokens, "prefix"), numpy_side(tokens, "suffix")
    assert not np.allclose(pre["basis"], suf["basis"])
    before = tokens.suffix().detach().clone()
    with torch.no_grad():
        for name, parameter in tokens.named_parameters():
            if "prefix" in name:
                parameter += 1.0
    assert torch.equal(tokens.suffix(), before)


def test_a_fresh_start_obeys_every_constraint():
    tokens = IPGOTokens(64, TokenConfig(prefix_length=10, suffix_length=10, basis_size=30))
    for side in ("prefix", "suffix"):
        p = numpy_side(tokens, side)
        np.testing.assert_allclose(p["basis"].T @ p["basis"], np.eye(30), atol=1e-5)
        assert np.abs(p["coefficients"]).max() <= 1
        assert np.abs(p["coefficients"]).max() > 0.9  # the whole interval is used
        assert ((p["angles"] > -math.pi) & (p["angles"] <= math.pi)).all()
    # |E z| = |z| and z is uniform in [-1, 1]: expected squared length N / 3
    assert tokens.norms()["prefix"] == pytest.approx(math.sqrt(30 / 3), rel=0.2)


def test_a_fresh_start_fills_the_bounds_and_plain_tokens_are_as_long_as_low_rank_ones():
    for bound, largest in ((0.25, 0.25), (None, 1.0)):
        tokens = IPGOTokens(64, TokenConfig(value_bound=bound))
        for side in ("prefix", "suffix"):
            assert 0.8 * largest < np.abs(numpy_side(tokens, side)["coefficients"]).max() <= largest
    plain, low_rank = (IPGOTokens(64, TokenConfig(low_rank=choice)).norms() for choice in (False, True))
    assert plain == pytest.approx(low_rank, rel=0.25)


def test_fresh_angles_are_uniform_on_the_circle():
    starts = [IPGOTokens(4, TokenConfig(prefix_length=1, basis_size=1), seed=seed) for seed in range(100)]
    angles = np.concatenate([numpy_side(tokens, "prefix")["angles"].flatten() for tokens in starts])
    assert ((angles > -math.pi) & (angles <= math.pi)).all()
    assert angles.std() == pytest.approx(math.pi / math.sqrt(3), rel=0.1)


def test_plain_tokens_are_the_parameter_times_the_scale():
    tokens = make(TokenConfig(prefix_length=3, suffix_length=0, low_rank=False, scale=2.5))
    np.testing.assert_allclose(tokens.prefix().detach().numpy(), 2.5 * numpy_side(tokens, "prefix")["embedding"])


def test_shared_rotations_keep_the_basis_orthonormal():
    p = numpy_side(make(), "prefix")
    rotated = reference.tokens(p["basis"], np.eye(5), p["angles"].reshape(2))
    np.testing.assert_allclose(rotated.T @ rotated, np.eye(5), atol=1e-6)


def test_the_seed_fixes_the_start_and_nothing_else_is_touched():
    state = torch.random.get_rng_state()
    a, b, c = IPGOTokens(DIM, SMALL, seed=1), IPGOTokens(DIM, SMALL, seed=1), IPGOTokens(DIM, SMALL, seed=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(a.prefix(), b.prefix())
    assert not torch.allclose(a.prefix(), c.prefix())


# --- how many parameters ----------------------------------------------------------------------------------------


def test_parameter_counts_of_the_paper_and_of_its_table_3():
    assert IPGOTokens(768, TokenConfig()).num_parameters == 46_684
    assert IPGOTokens(768, TokenConfig.preset("paper")).num_parameters == 46_684
    assert IPGOTokens(768, TokenConfig.preset("released-code")).num_parameters == 468_376


@pytest.mark.parametrize(("pre", "suf", "n", "dim"), [(1, 0, 1, 4), (0, 3, 7, 8), (4, 6, 10, 32)])
def test_parameter_count_formula(pre, suf, n, dim):
    tokens = IPGOTokens(dim, TokenConfig(prefix_length=pre, suffix_length=suf, basis_size=n))
    assert tokens.num_parameters == sum(dim * n + n * m + 2 for m in (pre, suf) if m)
    assert tokens.prefix().shape == (pre, dim)
    assert tokens.suffix().shape == (suf, dim)


def test_ablations_drop_the_parameters_they_do_not_use():
    lengths = {"prefix_length": 3, "suffix_length": 2, "basis_size": 5}
    plain = IPGOTokens(DIM, TokenConfig(low_rank=False, **lengths))
    assert plain.num_parameters == 5 * DIM
    still = IPGOTokens(DIM, TokenConfig(rotation=False, **lengths))
    assert still.num_parameters == make().num_parameters - 4


# --- the released notebook --------------------------------------------------------------------------------------


def test_released_code_preset_is_a_clamped_linear_layer():
    """W clamp(x_i, -1, 1) + b per token; W has a column for every (token, column) pair; the rotation never runs."""
    tokens = make(TokenConfig.preset("released-code", prefix_length=2, suffix_length=3, basis_size=4), dim=16)
    with torch.no_grad():
        for name, parameter in tokens.named_parameters():
            if name.endswith("coefficients"):
                parameter *= 2  # some beyond the bounds
    for side, length, found in (("prefix", 2, tokens.prefix()), ("suffix", 3, tokens.suffix())):
        p = numpy_side(tokens, side)
        assert p["basis"].shape == (16, 4 * length)
        expected = p["basis"] @ np.clip(p["coefficients"], -1, 1) + p["bias"][:, None]
        np.testing.assert_allclose(found.detach().numpy(), expected.T, atol=1e-12)


def test_only_the_released_clamp_kills_the_gradient_beyond_the_bound():
    for preset, dead in (("paper", False), ("released-code", True)):
        tokens = make(TokenConfig.preset(preset, prefix_length=2, suffix_length=1, basis_size=3))
        z = tokens.get_parameter("sides.prefix.coefficients")
        with torch.no_grad():
            z[0, 0] = 1.5
        tokens.prefix().square().sum().backward()
        assert (float(z.grad[0, 0]) == 0.0) is dead


# --- insertion and penalty (eqs. 2, 9, 11) ----------------------------------------------------------------------


def test_insert_is_concatenation_in_order():
    tokens, embeddings = make(), prompts()
    found = tokens.insert(embeddings).detach().numpy()
    assert found.shape == (2, 3 + 7 + 2, DIM)
    for row in range(2):
        pre, suf = tokens.prefix().detach().numpy().T, tokens.suffix().detach().numpy().T
        np.testing.assert_array_equal(found[row].T, reference.insert(pre, embeddings[row].numpy().T, suf))


def test_insert_takes_tokens_of_each_row():
    embeddings, pre, suf = prompts(), prompts(2, 1, seed=1), prompts(2, 2, seed=2)
    assert torch.equal(insert_tokens(embeddings, pre, suf), torch.cat((pre, embeddings, suf), dim=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_insert_keeps_the_dtype_of_the_prompt_and_gradients_reach_float32_parameters(dtype):
    tokens = IPGOTokens(DIM, SMALL)
    embeddings = prompts().to(dtype).requires_grad_()
    out = tokens.insert(embeddings)
    assert out.dtype == dtype
    out.float().square().sum().backward()
    for parameter in tokens.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
    assert embeddings.grad is not None
    assert torch.equal(out[:, 3:-2], embeddings)


def test_conditioning_grows_with_its_mask_and_keeps_the_rest():
    tokens, pooled = IPGOTokens(DIM, SMALL), torch.randn(2, 4)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    grown = tokens.condition(Conditioning(prompts().float(), mask, {"pooled": pooled, "size": 64}))
    assert grown.embeddings.shape == (2, 12, DIM)
    assert grown.mask is not None
    assert grown.mask.dtype == torch.bool
    assert grown.mask.tolist() == [[True] * 12, [True] * 7 + [False] * 3 + [True] * 2]
    assert grown.extras["pooled"] is pooled
    assert grown.extras["size"] == 64
    assert tokens.condition(Conditioning(prompts().float())).mask is None


@pytest.mark.parametrize("norm", ["l2-squared", "l1-mean"])
def test_conformity_is_eq_11_averaged_over_the_batch(norm):
    tokens, embeddings = make(), prompts(batch=3)
    pre, suf = tokens.prefix().detach().numpy().T, tokens.suffix().detach().numpy().T
    formula = reference.conformity if norm == "l2-squared" else reference.conformity_l1_mean
    expected = np.mean([formula(reference.insert(pre, e.numpy().T, suf), e.numpy().T) for e in embeddings])
    assert tokens.conformity_penalty(embeddings, norm=norm).item() == pytest.approx(expected, rel=1e-5)


def test_conformity_leaves_masked_positions_out():
    tokens, embeddings = make(), prompts(batch=2)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    pre, suf = tokens.prefix().detach().numpy().T, tokens.suffix().detach().numpy().T
    kept = [embeddings[0].numpy().T, embeddings[1, :4].numpy().T]
    expected = np.mean([reference.conformity(reference.insert(pre, e, suf), e) for e in kept])
    assert tokens.conformity_penalty(embeddings, mask).item() == pytest.approx(expected, rel=1e-5)


def test_conformity_is_zero_exactly_when_the_means_agree():
    """Eq. 9: tokens whose mean is the prompt's mean cost nothing."""
    config = TokenConfig(prefix_length=2, suffix_length=2, basis_size=3, low_rank=False)
    tokens, embeddings = make(config), prompts(batch=1)
    with torch.no_grad():
        for parameter in tokens.parameters():
            parameter.copy_(embeddings[0].mean(0).expand_as(parameter))
    assert tokens.conformity_penalty(embeddings).item() == pytest.approx(0, abs=1e-12)


def test_gradients_equal_finite_differences():
    tokens, embeddings = make(), prompts()
    weights = prompts(2, 12, seed=5)
    parameters = list(tokens.parameters())

    def loss() -> Tensor:
        return (tokens.insert(embeddings) * weights).sum() + tokens.insert(embeddings).pow(3).sum()

    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        flat = parameter.data.view(-1)
        for index in range(flat.numel()):
            kept, values = float(flat[index]), []
            for sign in (1, -1):
                flat[index] = kept + sign * 1e-6
                values.append(loss().item())
            flat[index] = kept
            slope = (values[0] - values[1]) / 2e-6
            assert float(gradient.flatten()[index]) == pytest.approx(slope, rel=1e-5, abs=1e-6)


# --- constraints (eqs. 8 and 10) --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bound", [1.0, 0.25])
def test_projection_is_the_nearest_feasible_point(seed, bound):
    config = TokenConfig(prefix_length=3, suffix_length=2, basis_size=5, value_bound=bound)
    tokens, random = make(config), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tokens.parameters():
            parameter += torch.randn(parameter.shape, generator=random, dtype=torch.float64) * 4
    before = {side: numpy_side(tokens, side) for side in ("prefix", "suffix")}
    before = {side: {name: value.copy() for name, value in parts.items()} for side, parts in before.items()}
    tokens.project_()
    for side, raw in before.items():
        p = numpy_side(tokens, side)
        np.testing.assert_allclose(p["coefficients"], reference.project_coefficients(raw["coefficients"], bound))
        np.testing.assert_allclose(p["basis"], reference.nearest_orthonormal(raw["basis"]), atol=1e-10)
        wrapped = [reference.wrap_angle(float(a)) for a in raw["angles"].flatten()]
        np.testing.assert_allclose(p["angles"].flatten(), wrapped, atol=1e-10)
        np.testing.assert_allclose(p["basis"].T @ p["basis"], np.eye(5), atol=1e-10)


def test_projection_changes_nothing_that_is_feasible():
    tokens = make()
    tokens.project_()
    before = {name: value.clone() for name, value in tokens.state_dict().items()}
    tokens.project_()
    for name, value in tokens.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-12, rtol=0)


def test_wrapping_angles_does_not_change_the_tokens():
    tokens = make()
    with torch.no_grad():
        for name, parameter in tokens.named_parameters():
            if name.endswith("angles"):
                parameter += torch.tensor([[2 * math.pi, -6 * math.pi]])
    before = tokens.prefix().detach().clone()
    tokens.project_()
    torch.testing.assert_close(tokens.prefix(), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_angles_end_in_the_half_open_interval(dtype):
    angles = torch.tensor([-math.pi, math.pi, 0.0, 3 * math.pi, -3 * math.pi, 100.0, -100.0], dtype=dtype)
    found = wrap_angles(angles)
    expected = torch.tensor([reference.wrap_angle(float(a)) for a in angles.double()], dtype=torch.float64)
    edge = (expected.abs() - math.pi).abs() < 1e-5  # -pi and pi are the same rotation: pi is the one allowed
    assert (found > -math.pi).all()
    torch.testing.assert_close(found[~edge].double(), expected[~edge], atol=2e-5, rtol=0)
    torch.testing.assert_close(found[edge].abs().double(), expected[edge].abs(), atol=2e-5, rtol=0)


def test_nearest_orthonormal_is_nearest():
    """No other matrix with orthonormal columns is closer, here among many random ones and small rotations."""
    random = torch.Generator().manual_seed(0)
    raw = torch.randn(8, 3, generator=random, dtype=torch.float64)
    best = nearest_orthonormal(raw)
    distance = (raw - best).norm()
    for size in (0.01, 0.1, 1.0):
        for _ in range(50):
            other = nearest_orthonormal(best + size * torch.randn(8, 3, generator=random, dtype=torch.float64))
            assert (raw - other).norm() >= distance - 1e-12


def test_switched_off_constraints_stay_off():
    config = TokenConfig(prefix_length=2, suffix_length=2, basis_size=3, orthonormal=False, value_bound=None)
    tokens = make(config)
    with torch.no_grad():
        for parameter in tokens.parameters():
            parameter *= 3
    before = numpy_side(tokens, "prefix")
    raw = {name: value.copy() for name, value in before.items()}
    tokens.project_()
    after = numpy_side(tokens, "prefix")
    np.testing.assert_array_equal(after["basis"], raw["basis"])
    np.testing.assert_array_equal(after["coefficients"], raw["coefficients"])


def test_coefficients_of_the_released_code_may_leave_the_bounds():
    tokens = make(TokenConfig.preset("released-code", prefix_length=2, suffix_length=1, basis_size=3))
    coefficients = tokens.get_parameter("sides.prefix.coefficients")
    with torch.no_grad():
        coefficients *= 3
    before = coefficients.detach().clone()
    tokens.project_()
    assert torch.equal(coefficients, before)


def test_constraints_hold_all_along_training():
    tokens = IPGOTokens(DIM, SMALL)
    optimizer = torch.optim.Adam(tokens.parameters(), lr=0.3)
    target = prompts(1, 12).float()
    for _ in range(30):
        optimizer.zero_grad()
        (tokens.insert(prompts(1).float()) - 9 * target).square().sum().backward()
        optimizer.step()
        tokens.project_()
        for side in ("prefix", "suffix"):
            p = numpy_side(tokens, side)
            np.testing.assert_allclose(p["basis"].T @ p["basis"], np.eye(5), atol=1e-5)
            assert np.abs(p["coefficients"]).max() <= 1
            assert ((p["angles"] > -math.pi) & (p["angles"] <= np.float32(math.pi))).all()


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"prefix_length": -1},
        {"prefix_length": 0, "suffix_length": 0},
        {"basis_size": 0},
        {"value_bound": 0.0},
        {"value_bound": -1.0},
        {"value_bound": math.nan},
        {"value_bound": math.inf},
        {"prefix_length": 2.0},
        {"scale": 0.0},
        {"scale": math.inf},
    ],
)
def test_settings_that_make_no_sense_are_refused(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        TokenConfig(**changes)


def test_unknown_preset_is_refused():
    with pytest.raises(InputError, match="papr"):
        TokenConfig.preset("papr")


@pytest.mark.parametrize("dim", [0, 1, 7, -2])
def test_odd_widths_are_refused(dim):
    with pytest.raises(InputError, match=str(dim)):
        IPGOTokens(dim, TokenConfig(basis_size=1))


def test_a_basis_wider_than_the_embedding_is_refused():
    with pytest.raises(InputError, match="basis_size"):
        IPGOTokens(DIM, TokenConfig(basis_size=DIM + 1))
    IPGOTokens(DIM, TokenConfig(basis_size=DIM))


@pytest.mark.parametrize("shape", [(2, 7, DIM + 2), (7, DIM), (1, 2, 7, DIM)])
def test_embeddings_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match=r"need \(batch, sequence, 16\)"):
        IPGOTokens(DIM, SMALL).insert(torch.zeros(shape))


# --- files ------------------------------------------------------------------------------------------------------

CONFIGS = {
    "paper": SMALL,
    "released-code": TokenConfig.preset("released-code", prefix_length=2, suffix_length=1, basis_size=3),
    "plain": TokenConfig(low_rank=False, prefix_length=2, suffix_length=1, basis_size=3),
    "suffix only": TokenConfig(prefix_length=0, suffix_length=2, basis_size=3, scale=3.0, value_bound=None),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_return_the_same_tokens(name, tmp_path):
    tokens = IPGOTokens(DIM, CONFIGS[name], seed=3)
    path = tokens.save(tmp_path / "new folder" / "heart.safetensors", encoder="clip-l", prompts=["a ♥"], reward="toy")
    loaded = IPGOTokens.load(path, encoder="clip-l", dim=DIM)
    assert torch.equal(loaded.prefix(), tokens.prefix())
    assert torch.equal(loaded.suffix(), tokens.suffix())
    assert loaded.config == tokens.config
    assert loaded.num_parameters == tokens.num_parameters
    assert loaded.metadata["prompts"] == ["a ♥"]
    assert loaded.metadata["encoder"] == "clip-l"
    loaded.save(path)  # metadata survives a second trip
    assert IPGOTokens.load(path).metadata["reward"] == "toy"


def test_the_file_holds_the_finished_tokens_for_other_programs(tmp_path):
    tokens = IPGOTokens(DIM, SMALL)
    tensors = load_file(tokens.save(tmp_path / "t.safetensors"))
    assert torch.equal(tensors["tokens.prefix"], tokens.prefix())
    assert torch.equal(tensors["tokens.suffix"], tokens.suffix())


def test_tokens_of_another_encoder_are_refused(tmp_path):
    path = IPGOTokens(DIM, SMALL).save(tmp_path / "t.safetensors", encoder="clip-l")
    with pytest.raises(EncoderMismatchError, match=r"clip-l.*clip-g"):
        IPGOTokens.load(path, encoder="clip-g")
    with pytest.raises(EncoderMismatchError, match=r"16.*1280"):
        IPGOTokens.load(path, dim=1280)
    assert IPGOTokens.load(path).metadata["encoder"] == "clip-l"


def test_tokens_that_name_no_encoder_fit_every_one_of_their_width(tmp_path):
    path = IPGOTokens(DIM, SMALL).save(tmp_path / "t.safetensors", reward="toy")
    assert set(IPGOTokens.load(path, encoder="clip-g", dim=DIM).metadata) == {"reward", "version"}


def test_a_missing_file_and_one_of_another_kind_are_told_apart(tmp_path):
    with pytest.raises(InputError, match="gone does not exist"):
        read_metadata(tmp_path / "gone")
    for name, header in (("bare", None), ("noise", {"format": '"ipgo-noise-1"'})):
        save_file({"x": torch.zeros(2)}, tmp_path / name, metadata=header)
        with pytest.raises(InputError, match=f"{name} is a safetensors file but not an IPGO tokens file"):
            read_metadata(tmp_path / name)


def damage(path: Path, how: str) -> None:
    """Break a tokens file in one particular way."""
    data = path.read_bytes()
    if how == "cut short":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "nonsense":
        path.write_bytes(bytes(range(256)) * 40)
    elif how == "another safetensors":
        save_file({"x": torch.zeros(2)}, path)
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "gone":
        path.unlink()
    else:
        rewrite(path, how)


def rewrite(path: Path, how: str) -> None:
    """Write the file again with one inconsistency."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    tensors = load_file(path)
    if how == "a tensor too few":
        del tensors["sides.prefix.basis"]
    elif how == "no finished tokens":
        del tensors["tokens.prefix"]
    elif how == "a tensor too small":
        tensors["sides.prefix.basis"] = torch.zeros(DIM, 2)
    elif how == "unknown setting":
        header["config"] = json.dumps(json.loads(header["config"]) | {"flavour": "vanilla"})
    elif how == "senseless setting":
        header["config"] = json.dumps(json.loads(header["config"]) | {"basis_size": 0})
    elif how == "settings of the wrong kind":
        header["config"] = json.dumps([1, 2])
    elif how == "basis_size is text":
        header["config"] = json.dumps(json.loads(header["config"]) | {"basis_size": "5"})
    elif how == "no dim":
        del header["dim"]
    elif how == "endless dim":
        header["dim"] = "Infinity"
    elif how == "odd dim":
        header["dim"] = "15"
    elif how == "not JSON":
        header["config"] = "{"
    elif how == "not finite":
        tensors["sides.prefix.coefficients"][0, 0] = math.nan
    elif how in ("half a token", "endless"):
        length = 2.5 if how == "half a token" else 10**12
        header["config"] = json.dumps(json.loads(header["config"]) | {"prefix_length": length})
    elif how == "numbers of eight bits":
        tensors = {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()}
    save_file(tensors, path, metadata=header)


DAMAGE = [
    "cut short", "empty", "nonsense", "another safetensors", "a folder", "gone", "a tensor too few",
    "no finished tokens", "a tensor too small", "unknown setting", "senseless setting", "settings of the wrong kind",
    "basis_size is text", "no dim", "endless dim", "odd dim", "not JSON", "not finite", "half a token", "endless",
    "numbers of eight bits",
]  # fmt: skip


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_gives_one_clear_error(how, tmp_path):
    path = IPGOTokens(DIM, SMALL).save(tmp_path / "heart.safetensors", encoder="clip-l")
    damage(path, how)
    with pytest.raises(InputError, match=r"heart\.safetensors"):
        IPGOTokens.load(path)


def test_labels_cannot_overwrite_what_the_reader_relies_on(tmp_path):
    path = IPGOTokens(DIM, SMALL).save(tmp_path / "t.safetensors", dim=99, format="?", config=None)
    assert IPGOTokens.load(path, dim=DIM).config == SMALL


def test_a_failed_save_leaves_the_old_file_alone(tmp_path):
    path = IPGOTokens(DIM, SMALL, seed=1).save(tmp_path / "t.safetensors")
    before = path.read_bytes()
    with pytest.raises((InputError, TypeError)):
        IPGOTokens(DIM, SMALL, seed=2).save(path, reward=object())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    with pytest.raises(InputError, match="file"):
        IPGOTokens(DIM, SMALL).save(blocker / "t.safetensors")
