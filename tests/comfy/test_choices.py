"""The lists that nodes offer hold what other packs add later."""

from __future__ import annotations

import comfy.samplers
import host
import pytest

choices = host.pack("nodes.host.choices")
errors = host.pack("ipgo_engine.errors")


def test_samplers_and_schedulers_of_other_packs_appear(monkeypatch):
    stock = comfy.samplers.KSampler
    assert set(choices.samplers()) == set(stock.SAMPLERS) - {"deis", "ipndm_v", "dpm_adaptive", "ar_video"}
    assert choices.schedulers() == list(stock.SCHEDULERS)
    monkeypatch.setattr(stock, "SAMPLERS", [*stock.SAMPLERS, "a_new_one"])
    monkeypatch.setattr(stock, "SCHEDULERS", [*stock.SCHEDULERS, "another"])
    assert choices.samplers()[-1] == "a_new_one"
    assert choices.schedulers()[-1] == "another"


@pytest.mark.parametrize(("width", "height", "name"), [(0, 64, "width"), (64, -8, "height"), (64, 8, "height")])
def test_sizes_that_only_a_link_can_bring_are_named(width, height, name):
    with pytest.raises(errors.InputError, match=f"{name} is .* pixels: use 16 or more"):
        choices.empty_latent(width, height)
