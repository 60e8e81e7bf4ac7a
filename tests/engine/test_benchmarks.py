"""What the benchmark numbers rest on: counting evaluations, intervals, Best-of-N, who is trained with whom."""

from __future__ import annotations

import argparse
import csv
import shlex

import numpy as np
import pytest
import torch

from benchmarks.__main__ import LENGTHS, demo_commands, paper_commands
from benchmarks.__main__ import main as suite
from benchmarks.cheaper_updates import ReusedTrajectory
from benchmarks.cheaper_updates import main as cheaper_updates
from benchmarks.claims import CATEGORIES, Runner, Unit, cell, groups, read_categories, units
from benchmarks.claims_table import Budget, Entry, questions, token_questions
from benchmarks.common import (
    PROMPTS,
    EvaluationCounter,
    add_generator_options,
    add_prompt_options,
    cached,
    interval,
    parse,
    write_table,
)
from benchmarks.compare_report import at_equal_cost, pick
from ipgo_engine import OptimizeConfig, demo
from ipgo_engine.recompute import recompute


class Doubling(torch.nn.Module):
    def forward(self, sample):
        return 2 * sample


@pytest.mark.parametrize("steps_with_gradient", [0, 2, 5])
@pytest.mark.parametrize("stored", [True, False])
def test_an_evaluation_is_a_forward_and_a_backward_is_two(steps_with_gradient, stored):
    """Five model calls for two pictures with guidance, as a sampler makes them."""
    unet = Doubling()
    counter = EvaluationCounter(unet, rows_per_image=2)
    latents = torch.ones(2, 3, requires_grad=True)
    for step in range(5):
        rows = torch.cat([latents, latents])
        if step < 5 - steps_with_gradient:
            with torch.no_grad():
                latents = unet(rows).chunk(2)[0]
            latents.requires_grad_()
        elif stored:
            latents = unet(rows).chunk(2)[0]
        else:
            latents = recompute(lambda r: unet(r), rows).chunk(2)[0]
    latents.sum().backward()
    again = 0 if stored else steps_with_gradient  # the backward runs the forward once more
    assert counter.take() == 2 * (5 + again + 2 * steps_with_gradient)
    assert counter.take() == 0


def test_interval_resamples_prompts_not_pictures():
    """Pictures of one prompt that say the same thing three times narrow nothing."""
    random = np.random.default_rng(0)
    prompts = random.normal(size=20)
    once = interval(prompts.tolist(), list(range(20)))
    thrice = interval(np.repeat(prompts, 3).tolist(), np.repeat(np.arange(20), 3).tolist())
    assert thrice == pytest.approx(once)
    scipy_stats = pytest.importorskip("scipy.stats")
    found = scipy_stats.bootstrap((prompts,), np.mean, n_resamples=4000, method="percentile", rng=random)
    assert once[0] == pytest.approx(prompts.mean())
    assert once[1:] == pytest.approx(tuple(found.confidence_interval), abs=0.05)


def test_best_of_n_looks_at_the_first_n_and_at_the_target_alone():
    seed = {"target": [0.1, 0.5, 0.3, 0.9], "held_out": [1.0, 0.0, 1.0, 0.2]}
    assert pick([seed, seed], 3) == {"target": [0.5, 0.5], "held_out": [0.0, 0.0]}
    assert pick([seed], 4)["target"] == [0.9]
    # 18 evaluations pay for two pictures of 8, however many candidates there are; nothing pays for more than there are
    assert at_equal_cost([seed], 18.0, 8.0)["target"] == [0.5]
    assert at_equal_cost([seed], 1000.0, 8.0)["n"] == 4


def test_prompts_of_the_transfer_test_were_not_trained_on():
    prompts = PROMPTS.read_text().splitlines()
    categories = read_categories(CATEGORIES)
    for entry in questions(Budget(1, 1e-3, 1e-2, None, None, 1))["category"] + [
        Entry("B = 4", OptimizeConfig(), batch=4),
        Entry("B = 10", OptimizeConfig(), batch=10),
    ]:
        made = units(entry, prompts, categories)
        assert all(len(unit.prompts) == entry.batch and unit.unseen for unit in made)
        assert not any(set(unit.prompts) & {*unit.unseen, *unit.elsewhere} for unit in made)
    everything = [prompt for names in categories for prompt in names]
    assert len(set(everything)) == len(everything)  # no prompt is in two categories
    alike, mixed = (units(Entry("", OptimizeConfig(), batch=4, among=a), [], categories) for a in ("category", "mixed"))
    assert len(alike) == len(mixed)
    assert all(any(set(u.prompts) <= set(c) for c in categories) and u.elsewhere for u in alike)
    assert not any(any(set(u.prompts) <= set(c) for c in categories) for u in mixed)
    assert groups("abcde", 2) == [["a", "b"], ["c", "d"]]


def test_entries_of_one_question_differ_and_share_what_they_can():
    table = questions(Budget(6, 0.02, 0.1, None, 3, 15))
    for name, entries in table.items():
        settings = [(entry.config, str(entry.generator), entry.batch, entry.among, entry.reward) for entry in entries]
        assert len({str(s) for s in settings}) == len(entries), name
        assert len({entry.label for entry in entries}) == len(entries), name
    shared = {
        name: entries[0].config for name, entries in table.items() if name in ("constraints", "rotation", "basis")
    }
    assert len(set(map(str, shared.values()))) == 1


@pytest.mark.parametrize("commands", [demo_commands(quick=True), demo_commands(quick=False), paper_commands()])
def test_suite_asks_questions_that_exist(commands):
    known = set(questions(Budget(1, 1e-3, 1e-2, None, None, 1))) | {"degenerate"}
    for command in commands:
        words = shlex.split(command.arguments)
        if "--question" in words:
            assert set(words[words.index("--question") + 1 :]) <= known


def test_a_model_of_ones_own_needs_rewards_of_ones_own(monkeypatch, capsys):
    parser = argparse.ArgumentParser()
    add_generator_options(parser)
    add_prompt_options(parser)
    monkeypatch.setattr("sys.argv", ["benchmark"])
    assert (parse(parser).reward, parse(parser).held_out) == ("demo-clip", "demo-judge")
    monkeypatch.setattr("sys.argv", ["benchmark", "--model", "folder", "--reward", "clip"])
    for main in (lambda: parse(parser), suite):
        with pytest.raises(SystemExit):
            main()
        assert "--model needs --reward and --held-out" in capsys.readouterr().err
    named = "--model folder --reward clip --held-out aesthetic"
    monkeypatch.setattr("sys.argv", ["benchmark", *shlex.split(named), "--show"])
    assert suite() == 0
    shown = [line for line in capsys.readouterr().out.splitlines() if "iteration_cost" not in line]
    assert all(named in line for line in shown)


def test_each_papers_questions_get_its_sampler():
    asked = {}
    for command in paper_commands():
        if command.module == "claims":
            options, _, names = command.arguments.partition("--question")
            asked |= dict.fromkeys(names.split(), "--sampler lms --eta 0" in options)
    budget = Budget(1, 1e-3, 1e-2, None, None, 1)
    assert set(asked) == {*questions(budget), "degenerate"}
    assert {name for name, lms in asked.items() if lms} == set(token_questions(budget))


@pytest.mark.parametrize("wrong", ["--eta 1", "--eta 0 --sampler lms"])
def test_trajectories_are_reused_with_a_sampler_that_allows_it_only(wrong, monkeypatch, capsys):
    (command,) = (c for c in paper_commands() if c.module == "cheaper_updates")
    assert "--eta 0" in command.arguments
    monkeypatch.setattr("sys.argv", ["cheaper_updates", *wrong.split()])
    with pytest.raises(SystemExit):
        cheaper_updates()
    assert "--sampler ddim --eta 0" in capsys.readouterr().err


def test_a_picture_without_gradient_is_the_plain_samplers_wherever_it_comes():
    generator = ReusedTrajectory(demo.load_pipeline(), steps=3, guidance_scale=1.0)
    generator.every = 4
    generator.restart()
    conditioning, noise = generator.encode(["red heart"]), generator.draw_noise([0])
    with torch.no_grad():
        raw = generator.generate(conditioning, noise)
        first, second = (generator.generate(conditioning, noise, backprop_steps=1) for _ in range(2))
        assert torch.equal(generator.generate(conditioning, noise), raw)
        third = generator.generate(generator.encode(["black cat"]), noise, backprop_steps=1)
    assert torch.equal(first, raw)
    assert torch.equal(second, raw)  # the same prompt: the kept latents are the right ones
    assert not torch.equal(third, raw)


def test_shared_tokens_are_drawn_as_often_as_others():
    runner = Runner.__new__(Runner)
    runner.options, runner.seeds = argparse.Namespace(draw=None), (3, 4)
    own, shared = OptimizeConfig(), OptimizeConfig(seeds=(0, 1))

    def drawn(config):
        return [(made.seeds, made.seed) for made in runner._drawn(config)]

    assert drawn(own) == [((3,), 3), ((4,), 4)]
    assert drawn(shared) == [((0, 1), 3), ((0, 1), 4)]
    runner.options.draw = 7
    assert drawn(own) == [((3,), 7), ((4,), 7)]
    assert drawn(shared) == [((0, 1), 7)]


def test_prompts_by_length_are_ten_each_and_long_names_stay_apart(tmp_path):
    prompts = LENGTHS.read_text().splitlines()
    table = questions(Budget(1, 1e-3, 1e-2, None, None, 1))
    for name in ("short-prompts", "medium-prompts", "long-prompts"):
        assert {len(units(entry, prompts, [])) for entry in table[name]} == {10}
    options = argparse.Namespace(
        model=None, steps=8, guidance=4, sampler="ddim", eta=0, held_out="a", seeds=1, reward="b",
        size=None, first_seed=0, reward_path=None, held_out_path=None, categories=None, draw=None,
    )  # fmt: skip
    entry, same = table["long-prompts"][0], "a very long prompt " * 10
    files = {cell(tmp_path, entry, options, Unit([same + end])) for end in ("with a cat", "with a dog")}
    options.size = 512
    assert len(files | {cell(tmp_path, entry, options, Unit([same + "with a cat"]))}) == 3


def test_an_interrupted_cell_is_computed_again_and_a_whole_one_is_not(tmp_path):
    path = tmp_path / "cells" / "one.json"
    with pytest.raises(KeyboardInterrupt):
        cached(path, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not path.exists()
    assert cached(path, lambda: {"found": 1}) == {"found": 1}
    assert cached(path, lambda: {"found": 2}) == {"found": 1}


def test_tables_say_the_same_in_both_formats(tmp_path):
    rows = [{"method": "noise, free", "gain": 0.5}, {"method": "raw", "gain": 0}]
    text = write_table(rows, tmp_path / "table", "A title")
    assert text.startswith("# A title")
    assert "| noise, free | 0.5 |" in text
    with (tmp_path / "table.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{k: str(v) for k, v in row.items()} for row in rows]
