"""The nodes in a real server: through the queue, against stock nodes, cancelled, resumed, broken on purpose."""

from __future__ import annotations

import importlib.util
import re
import shutil
import time

import pytest
import torch
from comfyui_server import ROOT, Graph, Server

SMALL = {"steps": 3, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal"}
PROMPT = "red heart"
TOKENS, IMAGES, BEFORE, CURVE, LOSS, REPORT = range(6)  # outputs of IPGOTrainTokens
NOISE = {"noise": 0, "sampler": 1, "sigmas": 2, "model": 3, "latent": 4, "images": 5, "report": 9}
ADVANCED = {"preview_every": 1, "monitor_every": 1}
SAMPLERS = (
    "euler", "euler_ancestral", "ddim", "lms", "dpmpp_2m", "dpmpp_sde", "dpmpp_2m_sde", "uni_pc", "lcm",
    "res_multistep", "ddpm",
)  # fmt: skip
LONG = {"IPGOTrainTokens", "IPGONoiseOptimize", "IPGOJointOptimize"}


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        running.digest = stock_digest(running)
        yield running


class Demo(Graph):
    """A graph with the demo model in it."""

    def __init__(self, info):
        super().__init__(info)
        demo = self.add("IPGODemoModel")
        self.model, self.clip, self.vae = (demo, 0), (demo, 1), (demo, 2)

    def reward(self, fault=None, after=0, times=0):
        if fault is None:
            return (self.add("IPGOBrightnessReward"), 0)
        return (self.add("IPGOTestFaultyReward", fault=fault, after=after, times=times), 0)

    def text(self, text=PROMPT):
        return (self.add("CLIPTextEncode", clip=self.clip, text=text), 0)

    def latent(self, batch=1):
        return (self.add("EmptyLatentImage", width=128, height=128, batch_size=batch), 0)

    def sampled(self, positive, negative, model=None, **values):
        """KSampler and VAEDecode."""
        settings = {"seed": 5, "denoise": 1.0, "latent_image": self.latent(), **SMALL, **values}
        node = self.add("KSampler", model=model or self.model, positive=positive, negative=negative, **settings)
        return (self.add("VAEDecode", samples=(node, 0), vae=self.vae), 0)

    def train(self, save_as, reward=None, **values):
        """Token training with a small budget."""
        settings = {
            "prompt": PROMPT,
            "width": 128,
            "height": 128,
            "seed": 5,
            "epochs": 2,
            "prefix_length": 3,
            "suffix_length": 3,
            "learning_rate": 0.05,
            **SMALL,
            **ADVANCED,
            **values,
        }
        return self.add(
            "IPGOTrainTokens",
            model=self.model,
            clip=self.clip,
            vae=self.vae,
            reward=reward or self.reward(),
            save_as=save_as,
            **settings,
        )

    def optimize(self, save_as, reward=None, batch=1, **values):
        """Noise optimization with a small budget."""
        settings = {"prompt": PROMPT, "seed": 5, "iterations": 2, "permutations": 10, **SMALL, **ADVANCED, **values}
        self.positive, self.negative, self.size = self.text(), self.text(""), self.latent(batch)
        return self.add(
            "IPGONoiseOptimize",
            model=self.model,
            vae=self.vae,
            positive=self.positive,
            negative=self.negative,
            latent_image=self.size,
            reward=reward or self.reward(),
            save_as=save_as,
            **settings,
        )


def finished(server, graph):
    """Run a graph that must succeed."""
    done = server.run(graph.nodes)
    assert done.status == "success", done.error + server.log()[-2000:]
    return done


def gains(report):
    """(before, after) of every row of a report's table."""
    rows = re.findall(rf"^{PROMPT}\s+(-?[\d.e-]+)\s+(-?[\d.e-]+)", report, re.MULTILINE)
    return [(float(a), float(b)) for a, b in rows]


def test_every_input_and_output_is_explained(server):
    for node_id, info in server.info.items():
        if not node_id.startswith("IPGO") or "Test" in node_id:
            continue
        assert info["category"].startswith("IPGO")
        assert info["description"]
        for part in ("required", "optional"):
            for name, spec in info["input"].get(part, {}).items():
                assert spec[1].get("tooltip"), f"{node_id}.{name}"
        assert all(info["output_tooltips"]), node_id
        if "search_aliases" in server.info["KSampler"]:  # older releases know none
            assert info["search_aliases"], node_id


def test_rarely_touched_inputs_are_marked_advanced(server):
    if not any("advanced" in spec for spec in options_of(server, "IPGOTrainTokens").values()):
        pytest.skip("this ComfyUI does not know advanced inputs")
    for node_id in LONG:
        options = options_of(server, node_id)
        assert options["preview_every"]["advanced"]
        assert options["backprop_steps"]["advanced"]
        for plain in ("steps", "cfg", "seed", "sampler_name", "save_as"):
            assert not options[plain].get("advanced"), plain


def options_of(server, node_id):
    """Options of every input of a node."""
    found = server.info[node_id]["input"]
    return {name: spec[1] for part in ("required", "optional") for name, spec in found.get(part, {}).items()}


def test_help_pages_and_templates_are_served(server):
    assert b"# IPGO Train Tokens" in server.bytes("/extensions/ipgo/docs/IPGOTrainTokens/en.md")
    templates = server.get("/workflow_templates")["ipgo"]
    assert len(templates) == 10
    for name in templates:
        assert server.get(f"/api/workflow_templates/ipgo/{name}.json")["nodes"]
        assert server.bytes(f"/api/workflow_templates/ipgo/{name}.jpg")[:2] == b"\xff\xd8"
    names = server.get("/i18n")["en"]["nodeDefs"]
    ours = {node_id for node_id in server.info if node_id.startswith("IPGO") and "Test" not in node_id}
    assert ours <= set(names)


def test_training_shows_progress_and_equals_stock_nodes(server):
    graph = Demo(server.info)
    train = graph.train("equal_tokens", monitor_1=graph.reward())
    applied = (graph.add("IPGOApplyConditioning", conditioning=graph.text(), tokens=(train, TOKENS)), 0)
    negative = graph.text("")
    with_tokens = graph.same((train, IMAGES), graph.sampled(applied, negative))
    without = graph.same((train, BEFORE), graph.sampled(graph.text(), negative))
    report, shown = graph.show((train, REPORT)), graph.add("PreviewImage", images=(train, CURVE))
    loss = graph.add("LossGraphNode", loss=(train, LOSS))
    done, watched = server.run_watched(graph.nodes)
    assert done.status == "success", done.error
    assert done.text(with_tokens) == "equal"
    assert done.text(without) == "equal"
    assert done.outputs[shown]["images"]
    assert done.outputs[loss]["images"]
    assert len(watched.previews) >= 3
    assert watched.progress
    assert any("reward" in text for text in watched.texts)
    assert "Kept: models/ipgo_tokens/equal_tokens_00001.safetensors" in done.text(report)
    assert (server.base / "models" / "ipgo_tokens" / "equal_tokens_00001.safetensors").is_file()
    (_, after), *_ = gains(done.text(report))
    assert after > 0
    still_works(server)


def test_strength_zero_is_the_prompt_itself(server):
    graph = Demo(server.info)
    train = graph.train("zero", epochs=1)
    applied = (graph.add("IPGOApplyConditioning", conditioning=graph.text(), tokens=(train, TOKENS), strength=0.0), 0)
    check = graph.same((train, BEFORE), graph.sampled(applied, graph.text("")))
    assert finished(server, graph).text(check) == "equal"


def test_one_set_of_tokens_for_a_list_of_prompts(server):
    graph = Demo(server.info)
    train = graph.train(
        "list", prompt=f"{PROMPT}\n\nblue sky\ngreen tree\n", images_per_prompt=2, epochs=1, prompts_per_step=2
    )
    report = finished(server, graph_with(graph, train)).text(graph.last)
    assert "green tree" in report
    assert "(mean)" in report


def graph_with(graph, run, output=REPORT):
    """The graph with a text preview of a run's report."""
    graph.last = graph.show((run, output))
    return graph


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_tokens_equal_stock_nodes(server, sampler):
    """97-token CONDITIONING into a plain KSampler, with a negative of 77 tokens."""
    graph = Demo(server.info)
    train = graph.train(f"tokens_{sampler}", epochs=1, prefix_length=10, suffix_length=10, sampler_name=sampler)
    applied = (graph.add("IPGOApplyConditioning", conditioning=graph.text(), tokens=(train, TOKENS)), 0)
    stock = graph.sampled(applied, graph.text(""), sampler_name=sampler)
    check = graph.same((train, IMAGES), stock)
    assert finished(server, graph).text(check) == "equal"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_optimized_noise_equals_stock_nodes(server, sampler):
    """SamplerCustomAdvanced and a plain KSampler, from what was handed over."""
    graph = Demo(server.info)
    run = graph.optimize(f"equal_{sampler}", sampler_name=sampler)
    guider = graph.add("CFGGuider", model=graph.model, positive=graph.positive, negative=graph.negative, cfg=4.0)
    custom = graph.add(
        "SamplerCustomAdvanced",
        noise=(run, NOISE["noise"]),
        guider=(guider, 0),
        sampler=(run, NOISE["sampler"]),
        sigmas=(run, NOISE["sigmas"]),
        latent_image=graph.size,
    )
    advanced = (graph.add("VAEDecode", samples=(custom, 0), vae=graph.vae), 0)
    plain = graph.sampled(graph.positive, graph.negative, model=(run, NOISE["model"]), seed=77, sampler_name=sampler)
    checks = [graph.same((run, NOISE["images"]), advanced), graph.same((run, NOISE["images"]), plain)]
    measured = graph.show((graph.add("IPGONoiseProbability", latent=graph.size, noise=(run, NOISE["noise"])), 0))
    done = finished(server, graph)
    assert [done.text(check) for check in checks] == ["equal", "equal"]
    assert 0 < float(done.text(measured)) <= 1
    still_works(server)


def test_a_batch_of_noises(server):
    graph = Demo(server.info)
    run = graph.optimize("batch", batch=2)
    plain = graph.sampled(graph.positive, graph.negative, model=(run, NOISE["model"]), latent_image=graph.size)
    check = graph.same((run, NOISE["images"]), plain)
    assert finished(server, graph).text(check) == "equal"


def test_latent_where_it_is_right_and_the_reason_where_it_is_not(server):
    for sampler, right in (("euler", True), ("euler_ancestral", False)):
        graph = Demo(server.info)
        run = graph.optimize(f"latent_{sampler}", sampler_name=sampler)
        node = graph.add(
            "KSamplerAdvanced",
            model=graph.model,
            positive=graph.positive,
            negative=graph.negative,
            latent_image=(run, NOISE["latent"]),
            add_noise="disable",
            noise_seed=0,
            **{**SMALL, "sampler_name": sampler},
        )
        shown = graph.add("PreviewImage", images=(graph.add("VAEDecode", samples=(node, 0), vae=graph.vae), 0))
        done, watched = server.run_watched(graph.nodes)
        assert done.status == "success"  # the rest of the graph goes on
        assert (shown in done.outputs) == right
        assert right or "use NOISE, SAMPLER and SIGMAS" in watched.errors[0]


def test_joint_equals_stock_nodes(server):
    graph = Demo(server.info)
    joint = graph.add(
        "IPGOJointOptimize",
        model=graph.model,
        clip=graph.clip,
        vae=graph.vae,
        reward=graph.reward(),
        prompt=PROMPT,
        width=128,
        height=128,
        seed=5,
        iterations=2,
        permutations=10,
        prefix_length=3,
        suffix_length=3,
        save_as="joint",
        **SMALL,
    )
    check = graph.same((joint, 8), graph.sampled((joint, 1), (joint, 2), model=(joint, 6), seed=123))
    assert finished(server, graph).text(check) == "equal"


def test_black_box_reward(server):
    graph = Demo(server.info)
    run = graph.optimize("jpeg", reward=(graph.add("IPGOJpegReward"), 0), perturbations=2, iterations=1)
    assert "jpeg" in finished(server, graph_with(graph, run, NOISE["report"])).text(graph.last)


def test_reward_models_are_read_and_followed(server):
    """Small files in the authors' layouts, in the precision they are stored in."""
    spec = importlib.util.spec_from_file_location("reward_files", ROOT / "tests" / "engine" / "rewards" / "tiny.py")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    root = server.base / "models" / "rewards"
    for name in ("clip-vit-large-patch14", "aesthetic", "pickscore", "imagereward"):
        (root / name).mkdir(parents=True)
    tiny.transformers_clip(root / "clip-vit-large-patch14", projection=768)
    tiny.transformers_clip(root / "pickscore", processor=False, projection=1024)
    tiny.save_imagereward(root / "imagereward")
    head = tiny.AuthorsHead(768)
    head.load_state_dict(tiny.fill(head.state_dict()))
    torch.save(head.state_dict(), root / "aesthetic" / "sac+logos+ava1-l14-linearMSE.pth")
    graph = Demo(server.info)
    loaders = {
        "IPGOClipReward": "clip-vit-large-patch14",
        "IPGOAestheticReward": "aesthetic",
        "IPGOPickScoreReward": "pickscore",
        "IPGOImageReward": "imagereward",
    }
    places = {f"reward_{i}": (graph.add(n, weights=w), 0) for i, (n, w) in enumerate(loaders.items(), start=1)}
    both = graph.add("IPGOCombineRewards", **places, **{f"weight_{i}": 1.0 for i in range(1, 5)})
    train = graph.train("reward models", reward=(both, 0), epochs=1)
    try:
        assert "reward" in finished(server, graph_with(graph, train, REPORT)).text(graph.last)
    finally:
        shutil.rmtree(root)


def test_rank_and_combine(server):
    graph = Demo(server.info)
    images = graph.sampled(graph.text(), graph.text(""), latent_image=graph.latent(4))
    both = graph.add(
        "IPGOCombineRewards",
        reward_1=graph.reward(),
        weight_1=1.0,
        reward_2=(graph.add("IPGOContrastReward"), 0),
        weight_2=0.5,
        calibration_images=images,
        calibration_prompts=PROMPT,
    )
    scored = graph.add("IPGOScoreImages", images=images, reward=(both, 0), prompt=PROMPT, top_k=2)
    table, mean, sheet = graph.show((scored, 5)), graph.show((scored, 3)), graph.add("PreviewImage", images=(scored, 0))
    graph.add("PreviewImage", images=(scored, 1))
    done = finished(server, graph)
    assert len(done.text(table).splitlines()) == 6
    assert abs(float(done.text(mean))) < 1e-3  # calibrated on the very same images
    assert len(done.outputs[sheet]["images"]) == 2


def test_save_load_and_contained_names(server):
    graph = Demo(server.info)
    train = graph.train("roundtrip", epochs=1)
    saved = graph.add("IPGOSaveTokens", tokens=(train, TOKENS), filename_prefix="styles/mine", note="hello")
    finished(server, graph)
    assert (server.base / "models" / "ipgo_tokens" / "styles" / "mine_00001.safetensors").is_file()
    loader = Demo(server.info)
    tokens = loader.add("IPGOLoadTokens", file="styles/mine_00001.safetensors")
    information = loader.show((tokens, 1))
    applied = (loader.add("IPGOApplyConditioning", conditioning=loader.text(), tokens=(tokens, 0)), 0)
    loader.add("PreviewImage", images=loader.sampled(applied, loader.text("")))
    done = finished(server, loader)
    assert '"note": "hello"' in done.text(information)
    graph.nodes[saved]["inputs"]["filename_prefix"] = "../outside"
    assert "use a plain one" in server.run(graph.nodes).error


def test_a_missing_file_is_refused_before_anything_runs(server):
    graph = Demo(server.info)
    graph.show((graph.add("IPGOLoadTokens", file="nothing.safetensors"), 1))
    refused = str(server.post("/prompt", {"prompt": graph.nodes}))
    assert "nothing.safetensors" in refused


@pytest.mark.parametrize(
    ("node", "name"), [("IPGOLoadTokens", "file"), ("IPGOClipReward", "weights"), ("IPGOJudgeReward", "url")]
)
def test_a_missing_or_wrong_input_is_named(server, node, name):
    """Core runs our own check of an input even where the prompt lacks it or holds another type."""
    graph = Demo(server.info)
    number = graph.add(node)
    graph.show((number, 0))
    for inputs in ({}, {name: [1, 2, 3]}):
        graph.nodes[number]["inputs"] = inputs
        refused = str(server.post("/prompt", {"prompt": graph.nodes}))
        assert "exception_during" not in refused
        assert ("required_input_missing" if not inputs else "bad_linked_input") in refused


def test_download_shows_size_and_licence_and_fetches_nothing(server):
    graph = Demo(server.info)
    graph.show((graph.add("IPGODownloadWeights", reward_name="pickscore"), 0))
    report = finished(server, graph).text(str(len(graph.nodes)))
    assert "pickscore/model.safetensors" in report
    assert "licence: " in report
    assert "pickscore/tokenizer.json" in report  # tokenizers too
    assert "Nothing was fetched" in report
    assert not list((server.base / "models" / "rewards").rglob("*.safetensors"))


def test_download_from_a_mirror_that_has_nothing_says_so(server):
    graph = Demo(server.info)
    graph.show((graph.add("IPGODownloadWeights", reward_name="pickscore", action="download", mirror=server.url), 0))
    assert "127.0.0.1 answers 404" in server.run(graph.nodes).error
    assert not list((server.base / "models" / "rewards").rglob("*.safetensors"))


def test_a_second_run_of_the_same_is_cached(server):
    graph = Demo(server.info)
    train = graph.train("cached", epochs=1)
    finished(server, graph_with(graph, train))
    assert train in finished(server, graph).cached


def test_what_is_taken_is_not_an_old_result_from_the_cache(server):
    graph = Demo(server.info)
    run = graph.optimize("fresh")
    graph_with(graph, run, NOISE["report"])
    taken = {"resume": "take the best so far"}
    for iterations in (1, 2):
        graph.nodes[run]["inputs"].update(iterations=iterations, resume="start anew")
        finished(server, graph)
        graph.nodes[run]["inputs"].update(iterations=1, **taken)
        done = finished(server, graph)
        assert run not in done.cached
        assert f"the best so far after {iterations} updates" in done.text(graph.last)
    assert run in finished(server, graph).cached  # nothing has changed


def test_an_address_may_be_linked(server):
    graph = Demo(server.info)
    text = graph.add("PrimitiveString", value="http://127.0.0.1:9/v1")
    judge = graph.add("IPGOJudgeReward", url=(text, 0), retries=0, timeout=1.0)
    graph_with(graph, graph.optimize("linked", reward=(judge, 0), perturbations=1), NOISE["report"])
    assert "127.0.0.1" in server.run(graph.nodes).error


def test_cancel_keeps_the_best_and_resume_takes_it_or_goes_on(server):
    graph = Demo(server.info)
    run = graph.optimize("cancelled", reward=graph.reward("slow"), iterations=500)
    graph_with(graph, run, NOISE["report"])
    prompt = server.queue(graph.nodes)
    state = server.base / "output" / "ipgo" / "cancelled.resume.safetensors"
    for _ in range(2400):
        if state.exists():
            break
        time.sleep(0.25)
    server.post("/interrupt")
    done = server.wait(prompt)
    assert done.interrupted
    for ending in ("png", "noise.safetensors"):
        assert (server.base / "output" / "ipgo" / f"cancelled_00001.{ending}").is_file()
    still_works(server)
    graph.nodes[run]["inputs"]["resume"] = "take the best so far"
    report = finished(server, graph).text(graph.last)
    (before, after), *_ = gains(report)
    assert after >= before
    graph.nodes[run]["inputs"].update(resume="continue", prompt="another prompt")
    assert "another run" in server.run(graph.nodes).error


def test_cancelled_training_leaves_tokens_that_can_be_loaded(server):
    graph = Demo(server.info)
    train = graph.train("stopped", reward=graph.reward("slow"), epochs=444)
    graph_with(graph, train)
    prompt = server.queue(graph.nodes)
    while "step 2 of 444" not in server.log():
        time.sleep(0.25)
    server.post("/interrupt")
    assert server.wait(prompt).interrupted
    loader = Demo(server.info)
    loader.show((loader.add("IPGOLoadTokens", file="stopped_00001.safetensors"), 1))
    finished(server, loader)


def test_resumed_equals_uninterrupted(server):
    whole, part = Demo(server.info), Demo(server.info)
    one = whole.train("whole", epochs=4)
    two = part.train("parts", epochs=2)
    finished(server, graph_with(part, two))
    part.nodes[two]["inputs"].update(epochs=4, resume="continue")
    expected = finished(server, graph_with(whole, one)).text(whole.last)
    found = finished(server, part).text(part.last)
    assert gains(found) == gains(expected)
    assert "after 4 updates" in found


def test_nothing_to_take(server):
    graph = Demo(server.info)
    graph_with(graph, graph.train("never_ran", resume="take the best so far"))
    assert "there is no run called 'never_ran'" in server.run(graph.nodes).error


@pytest.mark.parametrize("fault", ["nan", "out of memory", "error"])
def test_a_reward_that_breaks_at_once_gives_one_clear_error(server, fault):
    graph = Demo(server.info)
    graph_with(graph, graph.train("broken_at_once", reward=graph.reward(fault)))
    done = server.run(graph.nodes)
    expected = {"nan": "not finite", "out of memory": "Out of memory", "error": "simulated failure"}[fault]
    assert expected in done.error
    still_works(server)


@pytest.mark.parametrize(("fault", "expected"), [("out of memory", "Out of memory"), ("error", "simulated failure")])
def test_a_reward_that_breaks_later_keeps_the_best(server, fault, expected):
    name = "broken_later_" + fault.replace(" ", "_")
    graph = Demo(server.info)
    graph_with(graph, graph.train(name, reward=graph.reward(fault, after=3), epochs=6))
    done = server.run(graph.nodes)
    assert expected in done.error
    assert "best so far is not lost" in done.error
    assert (server.base / "models" / "ipgo_tokens" / f"{name}_00001.safetensors").is_file()
    assert (server.base / "output" / "ipgo" / f"{name}_00001.png").is_file()
    still_works(server)


@pytest.mark.parametrize("fault", ["nan", "out of memory"])
def test_a_reward_that_breaks_once_does_not_end_the_run(server, fault):
    graph = Demo(server.info)
    reward = graph.reward(fault, after=5, times=1)
    run = graph.train("recovers", reward=reward, epochs=4, images_per_prompt=2)  # two, so that fewer are possible
    report = finished(server, graph_with(graph, run)).text(graph.last)
    assert ("back to the best" if fault == "nan" else "Out of memory") in report


def test_biased_samplers_and_bad_prompts_are_refused(server):
    graph = Demo(server.info)
    graph_with(graph, graph.train("no_prompt", prompt="  \n "))
    assert "prompt is empty" in server.run(graph.nodes).error
    graph = Demo(server.info)
    graph_with(graph, graph.train("biased", sampler_name="deis"))
    answer = server.post("/prompt", {"prompt": graph.nodes})  # newer releases refuse it here, older ones when it runs
    assert "deis" in (server.wait(answer["prompt_id"]).error if "prompt_id" in answer else str(answer))


def stock_digest(server):
    """What a stock prompt gives, to the last bit; nothing in it is taken from the cache."""
    graph = Demo(server.info)
    latent = (graph.add("IPGOTestAgain", latent=graph.latent()), 0)
    images = graph.sampled(graph.text(), graph.text(""), seed=11, latent_image=latent, sampler_name="dpmpp_sde")
    shown = graph.add("IPGOTestDigest", images=images)
    return finished(server, graph).text(shown)


def still_works(server):
    """A stock prompt gives the very same picture as before any of our nodes ran."""
    assert stock_digest(server) == server.digest
