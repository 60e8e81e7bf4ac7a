"""The probability regularizer against the independent NumPy version of eqs. 6 to 9, closed forms and typical noises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ipgo_engine import InputError, NoiseRegularizer
from ipgo_engine.noise import CHANNEL_DIM, choose_block_size
from ipgo_engine.permutations import affine_orders, order_indices, run_length
from tests.engine import reference

LOG2 = math.log(2)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orders(values: int, count: int, block: int, seed: int = 0) -> list[np.ndarray]:
    """The permutations the regularizer looks at, as far as they fill blocks: as it lies, then shuffled ones."""
    run = run_length(values, block)
    steps, starts = affine_orders(values // run, count - 1, seed)
    shuffled = order_indices(steps, starts, values // run).long().numpy()
    groups = [order[: len(order) // block * block].reshape(-1, 1, block) for order in shuffled]
    # Block by block: one value of each run.
    return [np.arange(values), *((group * run + np.arange(run)[:, None]).flatten() for group in groups)]


def weights(count: int) -> list[float]:
    """Half for the noise as it lies, half shared by the shuffles."""
    return [1.0] if count == 1 else [0.5] + [0.5 / (count - 1)] * (count - 1)


# --- the permutations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [16, 17, 100, 1023, 1024, 1025, 1026, 2049, 5000])
def test_every_order_is_a_permutation_by_the_affine_formula(values):
    steps, starts = affine_orders(values, 20, seed=3)
    found = order_indices(steps, starts, values)
    assert found.shape == (20, values)
    for row, a, c in zip(found.tolist(), steps.tolist(), starts.tolist(), strict=True):
        assert sorted(row) == list(range(values))
        assert row == [(a * i + c) % (values - 1) for i in range(values - 1)] + [values - 1]


def test_large_orders_do_not_overflow():
    values = 51 * 4 * 128 * 128  # 51 noises of SDXL
    steps, starts = affine_orders(values, 2, seed=0)
    found = order_indices(steps, starts, values)
    i = np.array([1, 1023, 1024, 123_456, values - 3, values - 2], dtype=object)
    for row, a, c in zip(found, steps.tolist(), starts.tolist(), strict=True):
        assert row[i.astype(np.int64)].tolist() == list((a * i + c) % (values - 1))
        assert int(torch.bincount(row.long(), minlength=values).max()) == 1


def test_orders_depend_on_the_seed_and_the_size_alone():
    torch.manual_seed(1)
    first = affine_orders(1024, 10, seed=5)
    torch.manual_seed(2)
    again, other = affine_orders(1024, 10, seed=5), affine_orders(1024, 10, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    state = torch.random.get_rng_state()
    NoiseRegularizer(4).probability(gaussian(256))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_shuffles_mix_the_columns_of_the_blocks():
    """Modulo n, a block size that divides n would keep every residue class together and M1 would never change."""
    z = gaussian(1024).double().numpy()
    norms = [reference.mean_norm(z[order], 4) for order in orders(1024, 30, 4)]
    assert len({round(norm, 9) for norm in norms}) == 30


@pytest.mark.parametrize(("values", "block"), [(65_535, 16), (65_536, 65), (65_536, 64), (835_584, 32)])
def test_many_values_are_shuffled_in_runs_of_64(values, block):
    assert run_length(values, block) == (64 if values >= 65_536 and block <= 64 else 1)


def test_no_block_holds_two_values_of_a_run_and_no_value_is_in_two_blocks():
    values, block = 65_700, 24  # 1026 runs, of which 18 are left out, and 36 values more
    for order in orders(values, 4, block)[1:]:
        assert len(order) == 1008 * 64
        assert len(set(order.tolist())) == len(order)
        runs = np.sort(order.reshape(-1, block) // 64, axis=1)
        assert (np.diff(runs, axis=1) > 0).all()


# --- values -----------------------------------------------------------------------------------------------------

CASES = [(1024, 2, 100), (1024, 4, 7), (1030, 8, 20), (4096, 16, 10), (333, 1, 100), (333, 3, 1), (64, 32, 5)]
LARGE = [(65_536, 16, 12), (65_700, 24, 5), (66_000, 100, 3)]  # in runs; the last one, with its large blocks, is not
SPOILED = {
    "gaussian": lambda z: z,
    "scaled": lambda z: 1.4 * z,
    "shrunk": lambda z: 0.5 * z,
    "shifted": lambda z: z + 0.5,
    "correlated": lambda z: (z + z.roll(1)) / 2**0.5,
    "half zero": lambda z: torch.cat((z[: z.numel() // 2], 0 * z[z.numel() // 2 :])),
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
}


@pytest.mark.parametrize(("values", "block", "count"), CASES + LARGE)
@pytest.mark.parametrize("name", SPOILED)
def test_r_and_p_equal_the_reference(name, values, block, count):
    z = SPOILED[name](gaussian(values, seed=values))
    found = NoiseRegularizer(block, count, seed=7)
    permutations = orders(values, count, block, seed=7)
    expected_r = reference.regularizer(z.numpy(), block, permutations, weights(count))
    expected_p = reference.probability(z.numpy(), block, permutations)
    assert found.log_probability(z).item() == pytest.approx(expected_r, rel=1e-5, abs=1e-5)
    assert found.probability(z) == pytest.approx(expected_p, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("block", [1, 2, 4, 8])
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_closed_form_of_a_constant_noise(block, scale):
    """z = c: M1 = c sqrt(k); the covariance c^2 11^T - I has eigenvalues k c^2 - 1 and -1 (k - 1 times)."""
    values = 1024
    m = values // block
    m2 = max(abs(block * scale**2 - 1), 1.0 if block > 1 else 0.0)
    log_p1 = min(LOG2 - m * scale**2 / 2, 0.0)
    log_p2 = min(LOG2 - m / 2 * max(math.sqrt(1 + m2) - 1 - math.sqrt(block / m), 0.0) ** 2, 0.0)
    found = NoiseRegularizer(block).log_probability(torch.full((values,), scale))
    assert found.item() == pytest.approx(log_p1 + log_p2, rel=1e-5, abs=1e-6)


def test_sign_flips_of_one_column_by_hand():
    """k = 2, rows (2, 0) and (-2, 0): mean 0, covariance diag(4, 0), M2 = 3, sqrt(1 + M2) = 2."""
    z = torch.tensor([[2.0, 0.0], [-2.0, 0.0]]).repeat(16, 1)
    m = 32
    expected = LOG2 - m / 2 * (2 - 1 - math.sqrt(2 / m)) ** 2
    assert NoiseRegularizer(2, permutations=1).log_probability(z).item() == pytest.approx(expected, rel=1e-5)


def test_a_batch_is_its_rows():
    z = torch.stack([SPOILED[name](gaussian(1024, seed=i)) for i, name in enumerate(SPOILED)])
    regularizer = NoiseRegularizer(4, 30)
    r, p = regularizer.measure(z.view(len(z), 4, 16, 16))
    for row, value, probability in zip(z, r, p, strict=True):
        assert value.item() == pytest.approx(regularizer.log_probability(row).item(), rel=1e-5, abs=1e-6)
        assert probability.item() == pytest.approx(regularizer.probability(row), rel=1e-4, abs=1e-9)


def test_gradients_of_a_batch_do_not_mix():
    z = torch.stack([1.3 * gaussian(1024, seed=1), gaussian(1024, seed=2) + 0.4]).requires_grad_()
    regularizer = NoiseRegularizer(4, 30)
    r = regularizer.measure(z)[0]
    (together,) = torch.autograd.grad((r * torch.tensor([2.0, -3.0])).sum(), z)
    for row, factor in ((0, 2.0), (1, -3.0)):
        alone = z[row].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(factor * regularizer.log_probability(alone), alone)
        torch.testing.assert_close(together[row], gradient, rtol=1e-4, atol=1e-6)


def test_typical_noise_beside_it_does_not_change_the_gradient_of_another():
    z = torch.stack([gaussian(1024, seed=1), 1.4 * gaussian(1024, seed=2)]).requires_grad_()
    regularizer = NoiseRegularizer(4, 10)
    (together,) = torch.autograd.grad(regularizer.measure(z)[0].sum(), z)
    for row, gradient in zip(z.detach(), together, strict=True):
        row.requires_grad_()
        (alone,) = torch.autograd.grad(regularizer.log_probability(row), row)
        torch.testing.assert_close(gradient, alone, rtol=1e-4, atol=1e-6)
    assert together[1].norm() > 10 * together[0].norm()


def test_chunks_do_not_change_the_result():
    """A noise large enough for several chunks of permutations, against the reference on the same orders."""
    z = 1.02 * gaussian(40_000, seed=4)
    expected = reference.regularizer(z.numpy(), 4, orders(40_000, 12, 4), weights(12))
    assert NoiseRegularizer(4, 12).log_probability(z).item() == pytest.approx(expected, rel=1e-4)


# --- gradients --------------------------------------------------------------------------------------------------


def autograd_value(z: Tensor, block: int, count: int) -> Tensor:
    """R(z) by ordinary differentiable operations in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for weight, order in zip(weights(count), orders(z.numel(), count, block), strict=True):
        m = len(order) // block
        x = z[torch.as_tensor(order, dtype=torch.long)][: m * block].view(m, block)
        m2 = torch.linalg.matrix_norm(x.T @ x / m - torch.eye(block, dtype=torch.float64), ord=2)
        excess = ((1 + m2).sqrt() - 1 - math.sqrt(block / m)).clamp_min(0)
        log_p1 = LOG2 - m * x.mean(0).square().sum() / (2 * block)
        total = total + weight * (log_p1.clamp_max(0) + (LOG2 - m / 2 * excess**2).clamp_max(0))
    return total


@pytest.mark.parametrize(
    ("values", "block", "count"), [(1024, 4, 20), (1030, 8, 5), (500, 1, 1), (1024, 2, 1), *LARGE[:2]]
)
@pytest.mark.parametrize("name", ["scaled", "shrunk", "shifted", "correlated", "half zero"])
def test_gradient_equals_autograd_of_the_formulas(name, values, block, count):
    z = SPOILED[name](gaussian(values, seed=2))
    exact = z.double().requires_grad_()
    (expected,) = torch.autograd.grad(autograd_value(exact, block, count), exact)
    z.requires_grad_()
    (found,) = torch.autograd.grad(NoiseRegularizer(block, count).log_probability(z), z)
    assert (found.double() - expected).norm() <= 1e-4 * expected.norm()
    blind = (block == 1 and name == "correlated") or (block == 8 and name == "half zero")
    assert (expected.norm() == 0) == blind


@pytest.mark.parametrize("name", ["scaled", "shifted", "correlated"])
def test_gradient_equals_finite_differences_of_the_reference(name):
    values, block, count = 200, 2, 6
    z = SPOILED[name](gaussian(values, seed=9)).requires_grad_()
    (found,) = torch.autograd.grad(NoiseRegularizer(block, count).log_probability(z), z)
    base, permutations = z.detach().double().numpy(), orders(values, count, block)
    for index in range(0, values, 17):
        step = np.zeros(values)
        step[index] = 1e-5
        up, down = (reference.regularizer(base + s * step, block, permutations, weights(count)) for s in (1, -1))
        assert found[index].item() == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-4)


def test_typical_noise_is_free():
    """Where both bounds are 1 there is no gradient: the regularizer does not move noise that is Gaussian already."""
    rows = gaussian(2048, 8, seed=11)
    rows = rows - rows.mean(0)
    rows = rows @ torch.linalg.inv(torch.linalg.cholesky(rows.T @ rows / len(rows)).T)  # covariance exactly 1
    z = rows.flatten().requires_grad_()
    value = NoiseRegularizer(8, permutations=1).log_probability(z)
    (gradient,) = torch.autograd.grad(value, z)
    assert value.item() == 0
    assert gradient.abs().max() == 0


def test_following_the_gradient_makes_noise_plausible_again():
    z = (1.15 * gaussian(4096) + 0.1).requires_grad_()
    regularizer = NoiseRegularizer(permutations=20)
    before = regularizer.probability(z)
    optimizer = torch.optim.Adam([z], lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        (-regularizer.log_probability(z)).backward()
        optimizer.step()
    assert before < 1e-4
    assert regularizer.probability(z) > 0.1


# --- power: what eq. 8 must tell apart --------------------------------------------------------------------------

SHAPES = [(1, 4, 16, 16), (1, 4, 64, 64), (10, 4, 64, 64)]


@pytest.mark.parametrize("shape", SHAPES)
def test_gaussian_noise_is_rarely_called_unlikely(shape):
    z = torch.stack([gaussian(*shape, seed=seed) for seed in range(30 if math.prod(shape) < 20_000 else 5)])
    r, p = NoiseRegularizer().measure(z)
    assert (p < 0.01).sum() == 0
    assert p.median() > 0.15  # a minimum over 200 looks, not a p-value
    assert r.median() > -0.5


def channels(z: Tensor, size: float) -> Tensor:
    """Each channel drifts by a constant of its own sign; mean and variance over everything stay 0 and 1."""
    z = z + size * torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 4, 1, 1)
    return (z - z.mean()) / z.std()


DEGENERATE = {
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "x1.5": lambda z: 1.5 * z,
    "x0.5": lambda z: 0.5 * z,
    "mean 0.3": lambda z: z + 0.3,
    "half zero": lambda z: torch.cat((z.flatten()[: z.numel() // 2], torch.zeros(z.numel() // 2))),
    "one noise repeated along a row": lambda z: z[..., :1].expand(z.shape).clone(),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_noise_is_unlikely(name, shape):
    assert NoiseRegularizer().probability(DEGENERATE[name](gaussian(*shape))) < 1e-3


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_local_structure_is_seen_though_mean_and_variance_are_perfect(shape):
    """Only the order in which the values lie gives it away, which is why the identity is one of the orders."""
    z = channels(gaussian(*shape), 0.4)
    assert NoiseRegularizer().probability(z) < 1e-6
    mixed = z.flatten()[torch.randperm(z.numel(), generator=torch.Generator().manual_seed(0))]
    assert NoiseRegularizer().probability(mixed) > 0.01


def test_more_distance_is_never_more_likely():
    z, regularizer = gaussian(1, 4, 64, 64), NoiseRegularizer()
    values = [regularizer.probability(z * scale) for scale in (1.0, 1.05, 1.1, 1.2, 1.4)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.1
    assert values[-1] < 1e-20


# --- block size, dtypes, bad input ------------------------------------------------------------------------------


def test_block_size_is_the_largest_power_of_two_with_256_k_squared_values():
    for values in [16, 255, 256, 1023, 1024, 4095, 4096, 10_240, 16_383, 16_384, 65_536, 835_584, 1 << 20, 1 << 26]:
        allowed = [2**e for e in range(7) if 256 * 4**e <= values]
        assert choose_block_size(values) == max(allowed, default=1)
    z = gaussian(16_384)
    assert NoiseRegularizer().log_probability(z) == NoiseRegularizer(8).log_probability(z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_everything_is_computed_in_float32(dtype):
    z = (1.3 * gaussian(1024)).to(dtype).requires_grad_()
    value, probability = NoiseRegularizer(4, 10).measure(z.view(1, -1))
    assert value.dtype == probability.dtype == torch.float32
    same = NoiseRegularizer(4, 10).log_probability(z.detach().float())
    assert value.item() == pytest.approx(same.item(), rel=1e-6)
    value.sum().backward()
    assert z.grad is not None
    assert z.grad.dtype == dtype
    assert torch.isfinite(z.grad).all()


def test_shape_and_strides_do_not_matter():
    z, regularizer = gaussian(3, 4, 16, 16), NoiseRegularizer(4)
    expected = regularizer.log_probability(z)
    assert regularizer.log_probability(z.flatten()) == expected
    strided = z.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not strided.is_contiguous()
    assert regularizer.log_probability(strided) == expected


def test_the_input_is_not_changed():
    z = 1.3 * gaussian(1024)
    kept = z.clone()
    NoiseRegularizer(4).measure(z.view(1, -1))
    assert torch.equal(z, kept)


@pytest.mark.parametrize("arguments", [{"block_size": 0}, {"block_size": -4}, {"permutations": 0}])
def test_settings_that_make_no_sense_are_refused(arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        NoiseRegularizer(**arguments)


@pytest.mark.parametrize(("values", "block"), [(0, None), (3, None), (15, 1), (100, 64)])
def test_too_few_values_are_refused(values, block):
    with pytest.raises(InputError, match=str(values)):
        NoiseRegularizer(block).probability(torch.zeros(values))


def test_sixteen_values_are_enough():
    assert 0 < NoiseRegularizer(1).probability(gaussian(16)) <= 1


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("block", [1, 4])
def test_noise_that_is_not_finite_is_refused(value, block):
    z = gaussian(1024)
    z[10] = value
    with pytest.raises(InputError, match="NaN or infinity"):
        NoiseRegularizer(block).probability(z)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_numbers():
    z, regularizer = 1.1 * gaussian(16_384), NoiseRegularizer()
    here, there = z.clone().requires_grad_(), z.cuda().requires_grad_()
    a, b = regularizer.log_probability(here), regularizer.log_probability(there)
    assert b.item() == pytest.approx(a.item(), rel=1e-4)
    a.backward()
    b.backward()
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 4, 16, 16), (1, 3, 4, 8, 8), (1, 1, 16, 8, 8), (1, 1, 4, 3, 8, 8)])
@pytest.mark.parametrize("offset", [0.0, 0.4])
def test_the_channels_of_one_place_together_equal_the_reference(shape, offset):
    z = gaussian(*shape) + offset * torch.linspace(-1, 1, shape[2]).view(-1, *[1] * (len(shape) - 3))
    found = NoiseRegularizer(2, 10, seed=3)
    permutations = orders(z[0].numel(), 10, 2, seed=3)
    together = z[0].movedim(1, -1).flatten().numpy()
    r = reference.regularizer(z.numpy(), 2, permutations, weights(10))
    count = shape[2]
    r_places = reference.log_p1(together, count) + reference.log_p2(together, count)
    p_places = math.exp(min(reference.log_p1(together, count), reference.log_p2(together, count)))
    value, probability = found.measure(z, CHANNEL_DIM)
    assert value.item() == pytest.approx((r + r_places) / 2, rel=1e-4, abs=1e-5)
    assert probability.item() == pytest.approx(
        min(reference.probability(z.numpy(), 2, permutations), p_places), rel=1e-3, abs=1e-9
    )


def test_a_single_noise_is_measured_like_a_row():
    """`channel_dim` counts the dimensions of what is given: a noise here, a batch of them there."""
    z, regularizer = channels(gaussian(1, 4, 16, 16), 0.4), NoiseRegularizer(2, 5)
    value, probability = regularizer.measure(z[None], CHANNEL_DIM)
    assert regularizer.log_probability(z, CHANNEL_DIM - 1) == value[0]
    assert regularizer.probability(z, CHANNEL_DIM - 1) == probability[0]
    assert regularizer.probability(z) > 100 * probability[0]


def test_offsets_of_whole_channels_are_seen_in_a_small_noise():
    """What turned a black cat into an empty page on the demo model (n = 1024) while P(z) stayed at 0.5."""
    z = gaussian(1, 1, 4, 16, 16) + torch.tensor([0.26, -0.43, 0.33, 0.0]).view(4, 1, 1)
    assert NoiseRegularizer().measure(z)[1].item() > 0.01
    assert NoiseRegularizer().measure(z, CHANNEL_DIM)[1].item() < 1e-3


def test_a_noise_alone_counts_its_channels_like_a_batch_of_one():
    z, regularizer = gaussian(1, 4, 16, 16) + torch.tensor([0.3, -0.3, 0.3, -0.3]).view(4, 1, 1), NoiseRegularizer()
    r, p = regularizer.measure(z[None], CHANNEL_DIM)
    assert regularizer.log_probability(z, CHANNEL_DIM - 1) == r
    assert regularizer.probability(z, CHANNEL_DIM - 1) == p
    assert regularizer.probability(z) > p


def test_fresh_noise_passes_with_its_channels_together():
    fresh = torch.stack([gaussian(1, 4, 16, 16, seed=seed) for seed in range(50)])
    with_channels, without = (NoiseRegularizer().measure(fresh, d)[1] for d in (CHANNEL_DIM, None))
    assert with_channels.min() > 0.01
    assert with_channels.median() > without.median() / 2


def test_the_gradient_with_channels_together_equals_differences():
    z = channels(gaussian(1, 1, 4, 8, 8), 0.5).requires_grad_()
    (found,) = torch.autograd.grad(NoiseRegularizer(2, 5).measure(z, CHANNEL_DIM)[0].sum(), z)
    direction = gaussian(*z.shape, seed=9)
    up, down = (NoiseRegularizer(2, 5).measure((z + s * direction).detach(), CHANNEL_DIM)[0] for s in (1e-2, -1e-2))
    assert float((found * direction).sum()) == pytest.approx(float(up - down) / 2e-2, rel=1e-2)


def test_a_single_channel_or_a_single_place_changes_nothing():
    for shape in ((2, 5, 1, 8, 8), (2, 64, 4)):
        z = gaussian(*shape)
        assert torch.equal(NoiseRegularizer().measure(z, 2)[0], NoiseRegularizer().measure(z)[0])
