"""Recomputation in the backward equals plain autograd, also where a function writes in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from ipgo_engine.recompute import recompute


def smooth(x: Tensor, y: Tensor) -> Tensor:
    return (x.sin() * y.exp()).cumsum(-1).tanh()


def writes_in_place(x: Tensor, y: Tensor) -> Tensor:
    """Every tensor that a backward needs is overwritten: plain autograd refuses this function."""
    hidden = x.exp()
    product = hidden * y
    hidden[..., :2] = hidden[..., :2] * product[..., :2]
    hidden.add_(product.sin_())
    return hidden * product


def the_same_without_writing(x: Tensor, y: Tensor) -> Tensor:
    hidden = x.exp()
    product = hidden * y
    mixed = torch.cat([hidden[..., :2] * product[..., :2], hidden[..., 2:]], dim=-1)
    return (mixed + product.sin()) * product.sin()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_()


def test_equals_autograd() -> None:
    x, y = inputs()
    expected = torch.autograd.grad(smooth(x, y).square().sum(), (x, y))
    result = recompute(smooth, x, y)
    assert torch.equal(result, smooth(x, y))
    found = torch.autograd.grad(result.square().sum(), (x, y))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_writing_in_place_keeps_the_gradient_right() -> None:
    x, y = inputs()
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.grad(writes_in_place(x, y).sum(), (x, y))
    expected = torch.autograd.grad(the_same_without_writing(x, y).sum(), (x, y))
    result = recompute(writes_in_place, x, y)
    assert torch.allclose(result, the_same_without_writing(x, y))
    found = torch.autograd.grad(result.sum(), (x, y))
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


def test_tensors_that_lie_where_an_overwritten_one_lay_are_not_taken_for_it() -> None:
    def function(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for factor in range(1, 200):  # some of them get the address of one before
            hidden = x * factor
            total = total + hidden * hidden
            hidden.zero_()
            del hidden
        return total

    x = torch.linspace(1, 2, 512, dtype=torch.float64).requires_grad_()
    expected = 2 * x * sum(factor**2 for factor in range(1, 200))
    for _ in range(6):
        (found,) = torch.autograd.grad(recompute(function, x).sum(), x)
        assert torch.allclose(found, expected, rtol=1e-9)


def test_a_function_that_writes_in_place_is_recognised_once() -> None:
    calls: list[int] = []

    def function(x: Tensor) -> Tensor:
        calls.append(0)
        hidden = x.exp()
        return hidden * hidden.clone().mul_(2) + hidden.add_(1)

    x, _ = inputs()
    found = [torch.autograd.grad(recompute(function, x).sum(), x)[0] for _ in range(2)]
    assert len(calls) == 3 + 2  # forward, refused, repeated; then forward and repeated
    assert torch.allclose(found[0], 4 * x.exp() ** 2 + x.exp())
    assert torch.equal(found[0], found[1])


def test_only_inputs_that_need_a_gradient_get_one() -> None:
    x, y = inputs()
    recompute(smooth, x, y.detach()).sum().backward()
    assert x.grad is not None
    assert y.grad is None
    unused = torch.ones(2, requires_grad=True)
    assert torch.autograd.grad(recompute(lambda a, b: a.sin(), x, unused).sum(), unused, allow_unused=True)[0] is None


def test_the_context_surrounds_the_second_call_only() -> None:
    seen: list[str] = []

    @contextmanager
    def context() -> Iterator[None]:
        seen.append("enter")
        yield
        seen.append("leave")

    def function(x: Tensor) -> Tensor:
        seen.append("grad" if torch.is_grad_enabled() else "no grad")
        return x.sin()

    x, _ = inputs()
    result = recompute(function, x, context=context)
    assert seen == ["no grad"]
    result.sum().backward()
    assert seen == ["no grad", "enter", "grad", "leave"]


def test_a_second_backward_is_the_same() -> None:
    x, y = inputs()
    result = recompute(smooth, x, y).sum()
    first = torch.autograd.grad(result, (x, y), retain_graph=True)
    second = torch.autograd.grad(result, (x, y))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("error", [KeyError, RuntimeError, torch.cuda.OutOfMemoryError])
def test_an_error_in_the_second_call_comes_out_as_it_is(error: type[Exception]) -> None:
    calls: list[int] = []

    def function(x: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) > 1:
            raise error("second")
        return x.sin()

    x, _ = inputs()
    result = recompute(function, x).sum()
    with pytest.raises(error, match="second"):
        result.backward()
    assert len(calls) == 2
