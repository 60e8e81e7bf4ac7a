"""What the help pages say besides the tables of inputs and outputs: before them, and after them."""

from __future__ import annotations

KEEPING = """
## Cancel, resume, files

- What was learned is written to a new numbered file, whatever ends the run: tokens to `models/ipgo_tokens`, noise to
  `output/ipgo/<save_as>_00001.noise.safetensors`. After **Cancel** or a failure, also one in the final images, the
  best pictures go to `output/ipgo` too.
- The state of the run is written to `output/ipgo/<save_as>.resume.safetensors` every ten steps and at the end.
  *resume* = **continue** goes on from there with the same model, inputs and settings (more epochs or iterations are
  allowed, and other previews, measurements and memory settings), and gives the result that an uninterrupted run would
  have given. **take the best so far** hands out what a run had found, with all outputs, without going on.
- When memory runs out, the model is recomputed in the backward pass, then fewer images are made at once, then
  gradients go through fewer steps; the report says what was done. When a reward is not a number, the run goes back
  to its best with half the step size, and stops with an error if that happens again and again. Nothing is lost in
  either case.
"""

LOOK_AT = """
## What to look at

- The line under the node: reward, best so far, and the held-out rewards. A **held-out reward** (*monitor*) is
  measured and never optimized. If it falls while the reward rises, the run is fooling the reward: stop earlier.
- A reward curve alone proves nothing. Compare with *Score Images* on seeds that were not used, and with as many plain
  seeds as the run cost (Best-of-N, template *rank seeds*).
"""

WEIGHTS = """
## Weights

Nothing is downloaded by this node. Let *Download Reward Weights* fetch the files, or put them into `models/rewards`
(or a folder that `extra_model_paths.yaml` names under `rewards`) yourself, and press **R**. Repository, revision,
size, checksum and licence of every file are in the pack's `ipgo_engine/rewards/weights.py`.

{files}

The weights rest in main memory and visit the GPU for as long as a run needs them.
"""

RESTRICTIONS = """
## What works

Every stock sampler and scheduler except `deis`, `ipndm_v`, `dpm_adaptive` and `ar_video`, whose gradients are wrong.
Model patches (LoRA, ControlNet, FreeU and the like) are respected. EasyCache, LazyCache and scheduled hooks are refused
by name. The model, the VAE and the text encoder are not changed: the same KSampler gives the same picture before and
after.
"""

TEXTS: dict[str, tuple[str, str]] = {
    "IPGOTrainTokens": (
        """
Learns a few tokens that stand before and after your prompt and make its pictures score higher with a reward. The
prompt itself, the model and the text encoder stay as they are. Use the result with *Apply IPGO Conditioning* in any
workflow.

- **One line** in *prompt*: tokens for this prompt.
- **Several lines**: one set of tokens for all of them. On the demo model it did not help prompts that were not there.
- **images_per_prompt**: 1 is fast and fits one seed. With 4 more of the gain carries over to other seeds.
""",
        LOOK_AT + KEEPING + RESTRICTIONS,
    ),
    "IPGOApplyConditioning": (
        """
Puts learned tokens into an encoded prompt. Connect it between *CLIP Text Encode* and the sampler's positive input;
the negative stays as it is.

*strength* 0 gives the prompt back exactly as it was. Areas, masks, time ranges, pooled output and control stay;
attention masks grow by the inserted tokens. Combined and scheduled conditionings get the tokens in every part.
""",
        """
## When it refuses

Tokens fit one text encoder only. When the widths differ, the error says so: use the checkpoint family that the tokens
were trained with. Models that keep one value per prompt token beside the embedding (HiDream's llama, Anima) are
refused.
""",
    ),
    "IPGOSaveTokens": (
        """
Writes tokens into `models/ipgo_tokens`, or the first folder that `extra_model_paths.yaml` names under `ipgo_tokens`.
The file gets a number and never overwrites an older one. Training saves by itself; this node is for a name of your
own.
""",
        """
## The file

A safetensors file with the learned parameters, the finished tokens, and what they belong to: text encoder, prompts,
reward, seeds, size, sampler. It is not a textual-inversion embedding: `embedding:name` in a prompt does not do the
same, because the tokens are inserted behind the text encoder, not in front of it.
""",
    ),
    "IPGOLoadTokens": (
        """
Reads tokens that training or *Save IPGO Tokens* wrote. Press **R** to refresh the list. *information* shows what the
file says about itself. A damaged or foreign file is refused by name.
""",
        "",
    ),
    "IPGONoiseOptimize": (
        """
Starts from the picture of your seed and changes its **noise** until the reward rises. A regularizer keeps the noise
likely under the Gaussian it should come from. That prevents blank pages; a reward that contradicts the prompt still
wears the picture down, so watch a held-out reward.

- **P(z)** is a bound on how likely the noise is. At 128 pixels twenty fresh noises had 0.08 to 0.54, and
  the lowest of many picked seeds 0.02. A noise bent to please the reward falls below that by powers of ten.
- *regularization* 0 shows what happens without it: P(z) falls, and a reward that contradicts the prompt can end in a
  blank page. With a reward that reads the prompt the difference is small at moderate learning rates.
- A latent batch optimizes several pictures at once, each with its own noise.
""",
        """
## Where the result goes

| output | into | with |
|---|---|---|
| noise, sampler, sigmas | SamplerCustomAdvanced | every sampler, bit for bit |
| model | a plain KSampler with the same settings; its seed does not matter | every sampler, bit for bit |
| latent | KSamplerAdvanced with add_noise disabled | samplers that inject no noise, eps models, full denoise |

Where *latent* would give another picture, nodes behind it stop with the reason.
"""
        + LOOK_AT
        + KEEPING
        + RESTRICTIONS,
    ),
    "IPGOJointOptimize": (
        """
Learns tokens and optimizes the noise in the same run: the most reward for the same number of images. On the demo model
noise alone came out better in the held-out reward. To reuse what was learned with other seeds, train tokens alone.

Connect *positive*, *negative* and *model* to a KSampler with the same settings, and it makes the same picture.
""",
        LOOK_AT + KEEPING + RESTRICTIONS,
    ),
    "IPGONoiseProbability": (
        """
Measures how likely a noise is under the Gaussian that samplers draw from. Two bounds (on the mean and on the
covariance of blocks of values) are taken over many orders of the values, one of which puts the channels of a place
together, where a shift of the whole picture's colour shows; P(z) is the smallest. At 128 pixels twenty fresh
noises gave 0.08 to 0.54, and the lowest of many picked seeds 0.02; noise that was optimized without a
regularizer falls below that by powers of ten.
""",
        "",
    ),
    "IPGODemoModel": (
        """
A small model that ships with the pack and draws emoji-like pictures at 128 x 128. Everything can be tried with it in
seconds, on a CPU too, and without a download. It is a demonstration and a test bed: its scores say nothing about
other models. Put *Load Checkpoint* in its place for real pictures, and set width and height.
""",
        """
## Prompts it knows

Names of emoji: animals, food, objects, faces ("red heart", "cat", "pizza", "yellow star"). The model card in
`ipgo_engine/demo/model/MODEL_CARD.md` says what it was trained on.
""",
    ),
    "IPGODemoReward": (
        """
How well a small emoji picture matches its prompt. **demo-clip** is the one to optimize. **demo-judge** has an image
tower of another kind: connect it as *monitor* to see whether an optimization fools demo-clip.
""",
        "",
    ),
    "IPGOBrightnessReward": (
        "How bright, or how dark, the picture is. The simplest reward, good for a first look.",
        "",
    ),
    "IPGOContrastReward": (
        "How much the brightness of the picture varies from place to place. It needs no weights, which makes it a good "
        "first try with a checkpoint of your own.",
        "",
    ),
    "IPGOJpegReward": (
        """
The size of the picture as a JPEG file, in kilobytes; *small file* scores minus the size. It has no gradient: the
optimizers estimate one from slightly changed pictures (*perturbations*), which costs so many more images per step.
""",
        "",
    ),
    "IPGOJudgeReward": (
        """
A vision-language model rates the picture from 0 to 10. It runs behind an address that speaks OpenAI's chat format,
such as a llama.cpp or vLLM server on your own machine. Pictures are sent to the address in *url* and nowhere else:
there is no default, and redirects are not followed. A workflow somebody else made may bring an address, so one outside
this machine and its network is refused unless ComfyUI was started with `IPGO_JUDGE_HOSTS=that.host` in its environment.
No key is ever sent; servers that want one can be used from Python (`JudgeConfig.key_variable`).
Every perturbation of every step is a call: *max_calls* ends the run with its best so far.
""",
        """
## The question

Unless *template* holds another one, the judge is asked:

> You judge pictures made by an image generator. The prompt was:
>
> {prompt}
>
> Rate how well the picture shows what the prompt asks for and how good it looks, from {low} (worst) to {high} (best).
> Use the whole range and one decimal. Answer with one line and nothing else:
> Score: <number>
""",
    ),
    "IPGOOffloadReward": (
        """
For GPUs with little memory. The weights of a reward usually stay on the GPU for the whole run. Behind this node they
rest in main memory and visit the GPU for one score and its gradient at a time, so that they are gone while the image
is made. Scores and gradients are the same; each step costs one copy of the weights to the GPU more.
""",
        "",
    ),
    "IPGORobustReward": (
        """
Averages another reward over slightly cropped, shrunk and noisy versions of the picture. Patterns that please a
reward on one exact grid of pixels, and nowhere else, pay less. Costs one more score per version.
""",
        "",
    ),
    "IPGOClipReward": (
        "How well the picture matches the prompt: cosine similarity in any CLIP.",
        WEIGHTS.format(
            files="A transformers or open_clip folder, for example `models/rewards/clip-vit-large-patch14`."
        ),
    ),
    "IPGOAestheticReward": (
        "How beautiful people would find the picture, whatever the prompt (LAION aesthetic predictor, SAC+LOGOS+AVA1).",
        WEIGHTS.format(
            files="`models/rewards/aesthetic/sac+logos+ava1-l14-linearMSE.pth` and, beside it, the folder\n"
            "`models/rewards/clip-vit-large-patch14`."
        ),
    ),
    "IPGOHPSReward": (
        "What people prefer, given the prompt: Human Preference Score v2. v2.0 and v2.1 are different checkpoints "
        "whose scores do not compare.",
        WEIGHTS.format(
            files="`models/rewards/hpsv2/HPS_v2_compressed.pt` for v2.0,\n"
            "`models/rewards/hpsv2/HPS_v2.1_compressed.pt` for v2.1."
        ),
    ),
    "IPGOPickScoreReward": (
        "What the users of a picture service picked, given the prompt: PickScore v1.",
        WEIGHTS.format(files="The transformers folder of PickScore_v1 as `models/rewards/pickscore`."),
    ),
    "IPGOImageReward": (
        "What people prefer, given the prompt: ImageReward 1.0.",
        WEIGHTS.format(
            files="`models/rewards/imagereward/ImageReward.pt` and, in the same folder, `vocab.txt` of\n"
            "bert-base-uncased."
        ),
    ),
    "IPGODownloadWeights": (
        """
Fetches the published weights of a reward into `models/rewards`. As it comes it only **shows** what it would fetch:
address, size, licence and whether the checksum is known. Set *action* to **download** and press Run again.

Each file is written under another name until it is whole and its checksum is right. After **Cancel** or a broken line
the next run goes on from there; files that are there and right are not fetched again. Afterwards everything works
offline. No other node fetches anything.
""",
        "",
    ),
    "IPGOCombineRewards": (
        """
A weighted sum of rewards, itself a reward. Rewards have very different ranges: aesthetic scores spread over two
points, HPS v2 over 0.05. Connect a batch of ordinary *calibration_images* (two or more, with their prompts) and each
reward counts in units of its own spread; otherwise the raw scores are added. A negative weight avoids, a weight of 0
leaves out.
""",
        "",
    ),
    "IPGOScoreImages": (
        """
Scores a batch of pictures, ranks and labels them. Two uses: **Best-of-N** (draw many seeds, keep the best), which
every optimization has to beat at the same cost; and a fair comparison with and without what was learned, on seeds
that were not used for learning.
""",
        "",
    ),
}
