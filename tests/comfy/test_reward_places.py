"""Reward weights are found in ComfyUI's folders, those of extra_model_paths.yaml included; judge and offload nodes."""

from __future__ import annotations

import folder_paths
import host
import pytest
import torch
from utils.extra_config import load_extra_path_config

files = host.pack("nodes.host.files")
residence = host.pack("nodes.host.residence")
errors = host.pack("ipgo_engine.errors")
rewards = host.pack("ipgo_engine.rewards")
nodes = host.pack("nodes.black_box_rewards")


@pytest.fixture
def places(monkeypatch):
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    folder_paths.folder_names_and_paths.pop(files.REWARDS, None)


def test_models_rewards_is_registered(places):
    files.register_folders()
    (folder,) = folder_paths.get_folder_paths(files.REWARDS)
    assert files.Path(folder) == files.Path(folder_paths.models_dir) / "rewards"


def test_extra_model_paths_are_honoured(places, tmp_path):
    (tmp_path / "here" / "pickscore").mkdir(parents=True)
    (tmp_path / "here" / "head-linearMSE.pth").touch()
    (tmp_path / "here" / "notes.txt").touch()
    (tmp_path / "extra.yaml").write_text(f"mine:\n  base_path: {tmp_path}\n  rewards: here\n")
    load_extra_path_config(str(tmp_path / "extra.yaml"))
    files.register_folders()
    assert {"pickscore", "head-linearMSE.pth"} <= set(files.reward_places())
    assert "notes.txt" not in files.reward_places()
    assert files.reward_path("pickscore") == tmp_path / "here" / "pickscore"
    for name in ("../here/pickscore", "missing", str(tmp_path)):
        with pytest.raises(errors.InputError, match="Download Reward Weights"):
            files.reward_path(name)


class Weighty:
    name, differentiable = "weighty", True

    def __init__(self):
        self.module = torch.nn.Linear(3, 1).requires_grad_(False)

    def score(self, images, prompts):
        return images.mean((1, 2, 3))


def test_a_run_keeps_weights_at_hand_but_leaves_offloaded_ones_where_they_rest():
    reward = Weighty()
    for keeps in (reward, rewards.Robust(reward), rewards.Robust(rewards.Weighted([(reward, 1.0)]))):
        assert {id(p) for module in residence._modules([keeps]) for p in module.parameters()} == {
            id(p) for p in reward.module.parameters()
        }
    resting = rewards.Offloaded(reward)
    for rests in (resting, rewards.Robust(resting), rewards.Weighted([(resting, 1.0)])):
        assert residence._modules([rests]) == []


def test_the_offload_node_lets_a_reward_rest():
    reward = Weighty()
    (resting,) = nodes.IPGOOffloadReward.execute(reward).args
    assert residence._modules([resting]) == []
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(resting.score(images, ["", ""]), reward.score(images, ["", ""]))
    with pytest.raises(errors.InputError, match="no weights to offload"):
        nodes.IPGOOffloadReward.execute(rewards.load("contrast"))


def test_the_judge_has_no_address_until_one_is_typed():
    schema = {part.id: part for part in nodes.IPGOJudgeReward.define_schema().inputs}
    assert schema["url"].default == ""
    assert "type the judge's address" in nodes.IPGOJudgeReward.validate_inputs(url=" ")
    assert nodes.IPGOJudgeReward.validate_inputs(url="http://127.0.0.1:9/v1") is True
    with pytest.raises(errors.InputError, match="judge url"):
        nodes.IPGOJudgeReward.execute(url="", model_name="m")
    (judge,) = nodes.IPGOJudgeReward.execute(
        url="http://127.0.0.1:9/v1", model_name="m", max_calls=7, timeout=1.0, concurrency=1, retries=0, template=""
    ).args
    assert (judge.config.max_calls, judge.config.retries, judge.config.key_variable) == (7, 0, None)
    assert "{prompt}" in judge.config.template
    (judge,) = nodes.IPGOJudgeReward.execute(url="http://127.0.0.1:9/v1", model_name="m", template="{prompt}?").args
    assert judge.config.template == "{prompt}?"


NEAR = ["127.0.0.1", "localhost", "192.168.1.7", "10.0.0.2", "[::1]", "nas", "box.local", "[fd00::1]"]
NEAR += ["3090box", "127.1"]
FAR = ["example.com", "8.8.8.8", "169.254.169.254", "127.0.0.1.example.com", "[2001:4860:4860::8888]"]
FAR += ["134744072", "0x08080808", "010.8.8.8", "8.526344", "[::ffff:8.8.8.8]"]


@pytest.mark.parametrize("host", NEAR + FAR)
def test_somebody_elses_workflow_sends_no_pictures_out_of_the_house(host, monkeypatch):
    url = f"http://{host}:8080/v1"
    if host in FAR:
        with pytest.raises(errors.InputError, match=r"not on this machine or its network.*IPGO_JUDGE_HOSTS="):
            nodes.IPGOJudgeReward.execute(url=url, model_name="m")
        monkeypatch.setenv("IPGO_JUDGE_HOSTS", f"other.org, {host.strip('[]')}")
    nodes.IPGOJudgeReward.execute(url=url, model_name="m")
