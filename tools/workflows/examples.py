"""The example workflows: what each shows, and what to look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .graph import Link, Node, Workflow

PROMPT = "dog face"
# Concepts that the demo model draws poorly: green elephants, trees without a trunk. There is something to see.
TOKEN_PROMPT, NOISE_PROMPT, NOISE_SEED = "elephant", "tree", 1
DEMO = {"width": 128, "height": 128, "steps": 10, "cfg": 3.0}
SAMPLER = {"sampler_name": "euler", "scheduler": "normal"}


CHECKPOINTS = {
    512: "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/"
    "v1-5-pruned-emaonly-fp16.safetensors",
    1024: "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
}
"""Where the page's dialog about missing models finds them, by side of the picture."""


def demo_column(w: Workflow, monitor: bool = True) -> tuple[Node, Node, Node | None]:
    """The demo model with its reward and, to watch, its held-out judge."""
    demo = w.add("IPGODemoModel")
    reward = w.add("IPGODemoReward", title="Reward to optimize", network="demo-clip")
    held_out = w.add("IPGODemoReward", title="Held-out reward, only watched", network="demo-judge") if monitor else None
    return demo, reward, held_out


def prompt_node(w: Workflow, text: str = PROMPT, title: str = "Prompt (used everywhere)") -> Link:
    """One text for every node that needs it."""
    return w.add("PrimitiveStringMultiline", title=title, value=text).out("STRING")


def models(source: Node, names: tuple[str, str, str] = ("model", "clip", "vae")) -> dict[str, Link]:
    """MODEL, CLIP and VAE of a loader, by the names of our inputs."""
    return dict(zip(("model", "clip", "vae"), map(source.out, names), strict=True))


def sample(w: Workflow, source: dict[str, Link], positive: Link, negative: Link, title: str, **values: Any) -> Link:
    """KSampler and VAE Decode: the images."""
    latent = values.pop("latent")
    drawn = w.add(
        "KSampler",
        title=title,
        model=source["model"],
        positive=positive,
        negative=negative,
        latent_image=latent,
        **values,
    )
    return w.add("VAEDecode", samples=drawn.out("LATENT"), vae=source["vae"]).out("IMAGE")


def show(w: Workflow, source: Node, *names: str, text: bool = True) -> None:
    """Previews of outputs, and the report."""
    titles = {"images": "After", "before": "Before", "curve": "Reward over the steps"}
    for name in names:
        w.add("PreviewImage", title=titles.get(name, name), images=source.out(name))
    if text:
        w.add("PreviewAny", title="Report", source=source.out("report"), tall=280)


def train_and_compare(w: Workflow) -> None:
    """Train tokens on a few seeds, then compare on seeds that were not trained on."""
    w.column(420)
    w.note(
        """
        # Train tokens and compare

        1. Press **Run**. The reward climbs under *IPGO Train Tokens*, with a live preview.
        2. Press **Cancel** when you like what you see: tokens and pictures of the best so far are kept. Set
           *resume* to *continue* to go on.
        3. On the right the tokens are tried on **eight seeds that were not trained on**. That score is the
           one that counts: the tokens are for reuse.

        **Look at:** the two tables of scores, with and without tokens, and the held-out reward in the curve.
        If the held-out reward falls while the reward rises, the run is fooling the reward: fewer epochs.

        **Your own model:** put *Load Checkpoint* in place of *IPGO Demo Model*, one of the other reward nodes
        in place of the demo reward, and set width and height.
        """
    )
    demo, reward, held_out = demo_column(w)
    source = models(demo)
    text = prompt_node(w, TOKEN_PROMPT)
    w.column(400, "Train")
    train = w.add(
        "IPGOTrainTokens",
        **source,
        reward=reward.out("reward"),
        prompt=text,
        seed=1,
        images_per_prompt=4,
        **DEMO,
        **SAMPLER,
        epochs=12,
        learning_rate=0.02,
        backprop_steps=0,
        monitor_1=held_out.out("reward"),
        save_as="demo_tokens",
    )
    w.column(380, "What was learned on the trained seeds")
    show(w, train, "before", "images", "curve")
    w.column(320, "Eight new seeds")
    positive = w.add("CLIPTextEncode", clip=source["clip"], text=text).out("CONDITIONING")
    negative = w.add("CLIPTextEncode", title="Negative", clip=source["clip"], text="").out("CONDITIONING")
    latent = w.add("EmptyLatentImage", width=128, height=128, batch_size=8).out("LATENT")
    applied = w.add("IPGOApplyConditioning", conditioning=positive, tokens=train.out("tokens")).out("conditioning")
    settings = {"latent": latent, "seed": 1000, "steps": 10, "cfg": 3.0, **SAMPLER, "denoise": 1.0}
    without = sample(w, source, positive, negative, "Without tokens", **settings)
    with_tokens = sample(w, source, applied, negative, "With tokens", **settings)
    compare(w, reward, text, {"Without tokens": without, "With tokens": with_tokens}, held_out)


def compare(w: Workflow, reward: Node, text: Link, images: dict[str, Link], held_out: Node | None = None) -> None:
    """Labelled pictures and their scores, side by side."""
    for title, picture in images.items():
        w.column(420, title)
        scored = w.add("IPGOScoreImages", images=picture, reward=reward.out("reward"), prompt=text)
        w.add("PreviewImage", title=title, images=scored.out("labelled"), tall=420)
        w.add("PreviewAny", title=f"{title}: mean score", source=scored.out("mean"))
        w.add("PreviewAny", title=f"{title}: scores", source=scored.out("table"), tall=260)
        if held_out is not None:
            judged = w.add(
                "IPGOScoreImages", title="Held-out score", images=picture, reward=held_out.out("reward"), prompt=text
            )
            w.add("PreviewAny", title=f"{title}: held-out mean", source=judged.out("mean"))


def apply_saved_tokens(w: Workflow) -> None:
    """Tokens from a file, on prompts they have not seen."""
    w.column(420)
    w.note(
        """
        # Apply saved tokens to new prompts

        Tokens that were trained once on a list of prompts also help prompts that were not in the list. The file
        chosen here ships with the pack; your own appear in the list after training (press **R** to refresh it).

        **Look at:** the same seeds with and without tokens. *strength* 0 gives the prompt back exactly;
        between 0 and 1 the tokens act more gently.

        *sides* lets you use only the tokens before or after the prompt.
        """
    )
    demo, reward, _ = demo_column(w, monitor=False)
    source = models(demo)
    text = prompt_node(w, "frog face", "A prompt that was not trained on")
    tokens = w.add("IPGOLoadTokens", file="ipgo_demo.safetensors")
    w.add("PreviewAny", title="What the file says", source=tokens.out("information"), tall=260)
    w.column(320, "The same seeds twice")
    positive = w.add("CLIPTextEncode", clip=source["clip"], text=text).out("CONDITIONING")
    negative = w.add("CLIPTextEncode", title="Negative", clip=source["clip"], text="").out("CONDITIONING")
    latent = w.add("EmptyLatentImage", width=128, height=128, batch_size=8).out("LATENT")
    applied = w.add("IPGOApplyConditioning", conditioning=positive, tokens=tokens.out("tokens"), strength=1.0).out(
        "conditioning"
    )
    settings = {"latent": latent, "seed": 7, "steps": 10, "cfg": 3.0, **SAMPLER, "denoise": 1.0}
    without = sample(w, source, positive, negative, "Without tokens", **settings)
    with_tokens = sample(w, source, applied, negative, "With tokens", **settings)
    compare(w, reward, text, {"Without tokens": without, "With tokens": with_tokens})


def noise_inputs(w: Workflow, source: dict[str, Link], text: Link, side: int = 128, batch: int = 1) -> dict[str, Link]:
    """Prompt, negative and latent of a noise run."""
    return {
        "positive": w.add("CLIPTextEncode", clip=source["clip"], text=text).out("CONDITIONING"),
        "negative": w.add("CLIPTextEncode", title="Negative", clip=source["clip"], text="").out("CONDITIONING"),
        "latent_image": w.add("EmptyLatentImage", width=side, height=side, batch_size=batch).out("LATENT"),
    }


def optimize_noise(w: Workflow) -> None:
    """Optimize noise, and make the picture again with stock nodes."""
    w.column(420)
    w.note(
        """
        # Optimize the noise of a picture

        Starts from the picture of your seed and changes its noise until the reward rises. The regularizer keeps
        the noise likely: **P(z)** in the curve should stay where it began.

        **Look at:** *After* and the two pictures on the right: stock samplers make the very same picture
        from what is handed over. KSampler's own seed does not matter any more.

        **Try:** *regularization* 0. The reward climbs faster, P(z) falls, and the picture starts to fall apart:
        the reward is being fooled. *ancestral* samplers have more noise to optimize (*which_noise*).
        """
    )
    demo, reward, held_out = demo_column(w)
    source = models(demo)
    text = prompt_node(w, NOISE_PROMPT)
    w.column(400, "Optimize")
    inputs = noise_inputs(w, source, text)
    found = w.add(
        "IPGONoiseOptimize",
        model=source["model"],
        vae=source["vae"],
        **inputs,
        reward=reward.out("reward"),
        prompt=text,
        monitor_1=held_out.out("reward"),
        seed=NOISE_SEED,
        steps=10,
        cfg=3.0,
        **SAMPLER,
        iterations=25,
        noise_learning_rate=0.05,
        save_as="demo_noise",
    )
    w.column(380, "What was found")
    show(w, found, "before", "images", "curve")
    same_from_stock_nodes(w, source, inputs, found)


def same_from_stock_nodes(w: Workflow, source: dict[str, Link], inputs: dict[str, Link], found: Node) -> None:
    """What is handed over, in the two stock samplers, and how likely the noise is."""
    w.column(340, "The same picture from stock nodes")
    guider = w.add(
        "CFGGuider", model=source["model"], positive=inputs["positive"], negative=inputs["negative"], cfg=3.0
    )
    custom = w.add(
        "SamplerCustomAdvanced",
        noise=found.out("noise"),
        guider=guider.out("GUIDER"),
        sampler=found.out("sampler"),
        sigmas=found.out("sigmas"),
        latent_image=inputs["latent_image"],
    )
    decoded = w.add("VAEDecode", samples=custom.out("output"), vae=source["vae"])
    w.add("PreviewImage", title="SamplerCustomAdvanced", images=decoded.out("IMAGE"))
    w.column(340, "And from a plain KSampler")
    plain = sample(
        w,
        {**source, "model": found.out("model")},
        inputs["positive"],
        inputs["negative"],
        "KSampler, any seed",
        latent=inputs["latent_image"],
        seed=99,
        steps=10,
        cfg=3.0,
        **SAMPLER,
        denoise=1.0,
    )
    w.add("PreviewImage", title="KSampler", images=plain)
    measured = w.add("IPGONoiseProbability", latent=inputs["latent_image"], noise=found.out("noise"))
    w.add("PreviewAny", title="How likely the noise is", source=measured.out("report"))


def rank_seeds(w: Workflow) -> None:
    """Best-of-N: the plain way to a better picture, and what everything else has to beat."""
    w.column(420)
    w.note(
        """
        # Rank seeds by reward (Best-of-N)

        Draws sixteen seeds, scores them, shows the best four. No training: the honest comparison for every other
        workflow here. An optimization of 50 steps costs about as much as 100 to 150 seeds.

        **Look at:** the spread of the scores in the table. Where it is wide, more seeds are the cheapest way
        to a better picture; where it is narrow, optimization has more to give.
        """
    )
    demo, reward, held_out = demo_column(w)
    source = models(demo)
    text = prompt_node(w)
    w.column(320, "Sixteen seeds")
    positive = w.add("CLIPTextEncode", clip=source["clip"], text=text).out("CONDITIONING")
    negative = w.add("CLIPTextEncode", title="Negative", clip=source["clip"], text="").out("CONDITIONING")
    latent = w.add("EmptyLatentImage", width=128, height=128, batch_size=16).out("LATENT")
    images = sample(
        w, source, positive, negative, "Sixteen seeds", latent=latent, seed=0, steps=10, cfg=3.0, **SAMPLER, denoise=1.0
    )
    w.column(420, "Ranked")
    ranked = w.add("IPGOScoreImages", images=images, reward=reward.out("reward"), prompt=text, top_k=4)
    w.add("PreviewImage", title="The best four, with rank and score", images=ranked.out("labelled"), tall=420)
    w.add("PreviewAny", title="All scores", source=ranked.out("table"), tall=420)
    w.column(420, "What the held-out reward says of the best four")
    judged = w.add("IPGOScoreImages", images=ranked.out("ranked"), reward=held_out.out("reward"), prompt=text)
    w.add("PreviewAny", title="Held-out scores of the best four", source=judged.out("table"), tall=200)
    w.add("PreviewImage", title="The best four", images=ranked.out("ranked"), tall=420)


def black_box(w: Workflow) -> None:
    """A reward without a gradient."""
    w.column(420)
    w.note(
        """
        # A black-box reward: the size of the JPEG file

        Nothing can be differentiated here: the reward is the size of the picture as a JPEG file, together with how
        well the picture matches the prompt. The gradient is estimated from a few slightly changed pictures per step
        (*perturbations*) and passed through the model.

        **Look at:** *After* needs fewer kilobytes and still shows the prompt.

        **Try:** *weight_2* 0, so that only the file size counts. The reward climbs higher, the held-out reward
        falls, and what is left is an empty picture: a reward gives you what it says, not what you meant.
        *large file* does the opposite.
        """
    )
    demo = w.add("IPGODemoModel")
    source = models(demo)
    size = w.add("IPGOJpegReward", direction="small file")
    match = w.add("IPGODemoReward", title="It must still show the prompt", network="demo-clip")
    reward = w.add(
        "IPGOCombineRewards",
        reward_1=size.out("reward"),
        weight_1=1.0,
        reward_2=match.out("reward"),
        weight_2=6.0,
    )
    watched = w.add("IPGODemoReward", title="Held-out reward, only watched", network="demo-judge")
    text = prompt_node(w)
    w.column(400, "Optimize")
    inputs = noise_inputs(w, source, text)
    found = w.add(
        "IPGONoiseOptimize",
        model=source["model"],
        vae=source["vae"],
        **inputs,
        reward=reward.out("reward"),
        prompt=text,
        monitor_1=watched.out("reward"),
        seed=2,
        steps=10,
        cfg=3.0,
        **SAMPLER,
        iterations=15,
        noise_learning_rate=0.05,
        perturbations=4,
        save_as="demo_jpeg",
    )
    w.column(380, "What was found")
    show(w, found, "before", "images", "curve")


def joint(w: Workflow) -> None:
    """Tokens and noise together."""
    w.column(420)
    w.note(
        """
        # Tokens and noise together

        *Joint Optimize* learns tokens and changes the noise in the same run: the most reward for the same number
        of images. Use it for a picture you want to keep; train tokens alone for a prompt you want to reuse.

        **Look at:** the curve, then the picture that KSampler makes from *positive* and *model* on the right:
        it is the same.
        """
    )
    demo, reward, held_out = demo_column(w)
    source = models(demo)
    text = prompt_node(w, NOISE_PROMPT)
    w.column(400, "Optimize")
    found = w.add(
        "IPGOJointOptimize",
        **source,
        reward=reward.out("reward"),
        prompt=text,
        seed=NOISE_SEED,
        width=128,
        height=128,
        steps=10,
        cfg=3.0,
        **SAMPLER,
        iterations=25,
        noise_learning_rate=0.05,
        token_learning_rate=0.02,
        monitor_1=held_out.out("reward"),
        save_as="demo_joint",
    )
    w.column(380, "What was found")
    show(w, found, "before", "images", "curve")
    w.column(340, "The same picture from a plain KSampler")
    latent = w.add("EmptyLatentImage", width=128, height=128, batch_size=1).out("LATENT")
    plain = sample(
        w,
        {**source, "model": found.out("model")},
        found.out("positive"),
        found.out("negative"),
        "KSampler, any seed",
        latent=latent,
        seed=99,
        steps=10,
        cfg=3.0,
        **SAMPLER,
        denoise=1.0,
    )
    w.add("PreviewImage", title="KSampler", images=plain)


def own_checkpoint(w: Workflow, family: str, side: int, what: str) -> tuple[dict[str, Link], Link, Link]:
    """Checkpoint, reward and prompt for a user's own model."""
    memory = "about 6 GB at 512 px in half precision" if side == 512 else "16 GB and more at 1024 px"
    w.column(440)
    w.note(
        f"""
        # {what} ({family})

        1. Choose your {family} checkpoint on the left. LoRAs and other patches go between it and the optimizer.
        2. As it comes, *Contrast Reward* is optimized, which needs no download: it shows that everything works.
        3. For pictures people like better, fetch PickScore once with the node *Download Reward Weights* (about 4 GB;
           or put another reward model into **models/rewards**, see the **?** of its node) and connect
           *PickScore Reward* below instead.

        **Memory:** {memory}; when it runs
        out, fewer images are made at once and gradients go through fewer steps, and the report says so. Start with
        a smaller size if in doubt.
        """
    )
    loader = w.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINTS[side].rsplit("/", 1)[1])
    loader.link_model(CHECKPOINTS[side], "checkpoints")
    reward = w.add("IPGOContrastReward", title="Reward that needs no download")
    w.add("IPGOPickScoreReward", title="Connect this one instead (needs weights)", weights="pickscore")
    text = prompt_node(w, "a lighthouse on a cliff at sunset, oil painting")
    return models(loader, ("MODEL", "CLIP", "VAE")), reward.out("reward"), text


def train_own(family: str, side: int) -> Callable[[Workflow], None]:
    """Token training with a user's checkpoint."""

    def build(w: Workflow) -> None:
        source, reward, text = own_checkpoint(w, family, side, "Train tokens with your checkpoint")
        w.column(400, "Train")
        train = w.add(
            "IPGOTrainTokens",
            **source,
            reward=reward,
            prompt=text,
            width=side,
            height=side,
            seed=1,
            images_per_prompt=1,
            steps=20,
            cfg=7.0,
            sampler_name="dpmpp_2m",
            scheduler="karras",
            epochs=40,
            save_as=f"{family.lower()}_tokens",
        )
        w.column(420, "What was learned")
        show(w, train, "before", "images", "curve")

    return build


def noise_own(family: str, side: int) -> Callable[[Workflow], None]:
    """Noise optimization with a user's checkpoint."""

    def build(w: Workflow) -> None:
        source, reward, text = own_checkpoint(w, family, side, "Optimize noise with your checkpoint")
        w.column(400, "Optimize")
        inputs = noise_inputs(w, source, text, side)
        found = w.add(
            "IPGONoiseOptimize",
            model=source["model"],
            vae=source["vae"],
            **inputs,
            reward=reward,
            prompt=text,
            seed=1,
            steps=10,
            cfg=6.0,
            **SAMPLER,
            iterations=30,
            save_as=f"{family.lower()}_noise",
        )
        w.column(420, "What was found")
        show(w, found, "before", "images", "curve")

    return build


EXAMPLES: dict[str, Callable[[Workflow], None]] = {
    "1_demo_train_and_compare": train_and_compare,
    "2_demo_apply_saved_tokens": apply_saved_tokens,
    "3_demo_optimize_noise": optimize_noise,
    "4_demo_rank_seeds": rank_seeds,
    "5_demo_black_box_jpeg": black_box,
    "6_demo_joint": joint,
    "7_sd15_train_tokens": train_own("SD1.5", 512),
    "8_sd15_optimize_noise": noise_own("SD1.5", 512),
    "9_sdxl_train_tokens": train_own("SDXL", 1024),
    "10_sdxl_optimize_noise": noise_own("SDXL", 1024),
}
