"""The lists that nodes offer hold what other packs add later."""

from __future__ import annotations

import comfy.samplers
import host

choices = host.pack("nodes.host.choices")


def test_samplers_and_schedulers_of_other_packs_appear(monkeypatch):
    stock = comfy.samplers.KSampler
    assert set(choices.samplers()) == set(stock.SAMPLERS) - {"deis", "ipndm_v", "dpm_adaptive", "ar_video"}
    assert choices.schedulers() == list(stock.SCHEDULERS)
    monkeypatch.setattr(stock, "SAMPLERS", [*stock.SAMPLERS, "a_new_one"])
    monkeypatch.setattr(stock, "SCHEDULERS", [*stock.SCHEDULERS, "another"])
    assert choices.samplers()[-1] == "a_new_one"
    assert choices.schedulers()[-1] == "another"
