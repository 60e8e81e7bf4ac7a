"""First gradients and iterations of both implementations on one model (see `released_code.py`)."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import released_sources as released
from benchmarks.released_models import full_prompt, make_pipeline
from benchmarks.turns import Calls, Turns, clock
from ipgo_engine import NoiseConfig, NoiseRegularizer, OptimizeConfig, TokenConfig, optimize_noise, train_tokens
from ipgo_engine.generators.diffusers import DiffusersGenerator
from ipgo_engine.gradients import Task, exact
from ipgo_engine.problems import NoiseProblem, TokenProblem


class Whiteness:
    """The noise script's reward: the mean of pixels in [-1, 1]."""

    name = "whiteness"
    differentiable = True

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (B,) for images in [0, 1]."""
        return (2 * images - 1).mean(dim=(1, 2, 3))


class TurnTaker:
    """An observer that ends our iterations; the last event is an evaluation without an update and does not count."""

    def __init__(self, done: Callable[[], None]) -> None:
        self.done = done

    def on_step(self, event: Any) -> None:
        """One iteration is over."""
        if event.step < event.total:
            self.done()

    def on_message(self, message: str) -> None:
        """Nothing is shown while the clock runs."""

    def cancelled(self) -> bool:
        """Never."""
        return False


def agreement(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Cosine and relative error of two vectors."""
    a, b = ours.detach().double().flatten().cpu(), theirs.detach().double().flatten().cpu()
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0)
    return {"cosine": float(cosine), "relative error": float((a - b).norm() / b.norm())}


class Comparison:
    """Both methods on one model."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.reward = options, Whiteness()
        self.pipeline = make_pipeline(options.weights, options.device)
        self.calls = Calls(self.pipeline)

    def setting(self, prompt: str, steps: int, guidance: float) -> released.Setting:
        """What both sides get."""
        return released.Setting(self.pipeline, prompt, steps, self.options.size, guidance, self.options.device)

    def generator(self, setting: released.Setting, **changes: Any) -> DiffusersGenerator:
        """Our sampler for it."""
        return DiffusersGenerator(
            self.pipeline,
            steps=setting.steps,
            guidance_scale=setting.guidance,
            width=setting.size,
            height=setting.size,
            **changes,
        )

    # -- tokens -------------------------------------------------------------------------------------------------------

    def tokens(self, length: int) -> dict[str, Any]:
        """First gradients with a prompt of `length` tokens, then iterations in turns."""
        setting = self.setting(full_prompt(self.pipeline.tokenizer, length), self.options.token_steps, 7.5)
        generator = self.generator(setting, sampler="lms", padded=False)
        shape = TokenConfig.preset("released-code", basis_size=self.options.basis)
        config = OptimizeConfig.preset("released-code", tokens=shape)
        first: dict[str, Any] = {}

        def probe(names: dict[str, Any], done: Callable[[], None]) -> released.Probe:
            return released.Probe(
                lambda _: first.update(self._token_gradients(names, generator, setting, config)), done
            )

        def theirs(done: Callable[[], None]) -> None:
            released.run_ipgo(
                self.options.ipgo,
                setting,
                self.options.basis,
                self.options.repeats + 1,
                lambda image, prompts: self.reward.score(image, prompts),
                lambda names: probe(names, done),
            )

        def ours(preset: str, **more: Any) -> Callable[[Callable[[], None]], None]:
            shape = TokenConfig.preset(preset, basis_size=self.options.basis)
            made = OptimizeConfig.preset(preset, tokens=shape, epochs=self.options.repeats + 1, **more)
            return lambda done: ignore(train_tokens(generator, self.reward, [setting.prompt], made, TurnTaker(done)))

        loops = {
            "released": theirs,
            "ours, released-code preset": ours("released-code"),
            "ours, released-code preset, stored": ours("released-code", checkpoint=False),
            "ours, paper preset": ours("paper"),
        }
        records = Turns(self.calls, self.options.device).run(loops)
        return {"agreement": first, "cost": {name: record.summary() for name, record in records.items()}}

    def _token_gradients(
        self, names: dict[str, Any], generator: DiffusersGenerator, setting: released.Setting, config: OptimizeConfig
    ) -> dict[str, Any]:
        """Our gradients at the notebook's own parameters against the notebook's."""
        problem = TokenProblem(generator, [setting.prompt], config)
        modules = {"prefix": names["PX"], "suffix": names["PX_suffix"]}
        sides: dict[str, Any] = {name: problem.tokens.sides[name] for name in modules}
        with torch.no_grad():
            for name, module in modules.items():
                columns = sides[name].basis.shape[1]
                sides[name].basis.copy_(module.L_total.weight)
                sides[name].bias.copy_(module.L_total.bias)
                sides[name].coefficients.copy_(module.x[:, :columns].T)
        tokens = (problem.tokens.prefix(), problem.tokens.suffix())
        kept = {"tokens themselves": agreement(flat(tokens), flat([names["proj_xs"], names["proj_xs_suffix"]]))}
        task = Task(generator, problem, self.reward, config, 1, config.backprop_steps, config.checkpoint)
        evaluation = exact(task, [0], 0)
        torch.autograd.backward(problem.regularize([0])[0])
        pairs: dict[str, list[tuple[Tensor, Tensor]]] = {"coefficients": [], "bias": [], "basis": []}
        for name, module in modules.items():
            side, columns = sides[name], sides[name].basis.shape[1]
            pairs["coefficients"].append(
                (side.coefficients.grad.T, module.parametrizations.x.original.grad[:, :columns])
            )
            pairs["bias"].append((side.bias.grad, module.L_total.bias.grad))
            # Their basis lives in Householder coordinates: ours is pulled back through their own map.
            own = module.L_total.parametrizations.weight
            with torch.enable_grad():
                (pulled,) = torch.autograd.grad(module.L_total.weight, own.original, side.basis.grad)
            pairs["basis"].append((pulled, own.original.grad))
        for name, found in pairs.items():
            kept[f"gradient of the {name}"] = agreement(flat([a for a, _ in found]), flat([b for _, b in found]))
        kept["rewards"] = {"ours": float(evaluation.rewards[0]), "released": names["l_curr"].item()}
        return kept

    # -- noise --------------------------------------------------------------------------------------------------------

    def noise(self, eta: float, regularization: float = 1.0) -> dict[str, Any]:
        """First gradients of the noise at this eta, without the regularizer (its permutations are random), then
        iterations with it in turns."""
        setting = self.setting("red heart", self.options.noise_steps, 5.0)
        generator = self.generator(setting, sampler="ddim", eta=eta)
        config = NoiseConfig(iterations=self.options.repeats, regularization=0.0)
        first: dict[str, Any] = {}

        def compare(optimizer: Any) -> None:
            first.update(self._noise_gradients(optimizer.param_groups[0]["params"][0], generator, setting, config))

        def theirs(done: Callable[[], None]) -> None:
            count = self.options.repeats + 1
            released.run_noise(self.options.noise, setting, eta, count, regularization, released.Probe(ignore, done))

        def ours(**more: Any) -> Callable[[Callable[[], None]], None]:
            made = NoiseConfig(iterations=self.options.repeats + 1, regularization=regularization, **more)
            return lambda done: ignore(optimize_noise(generator, self.reward, [setting.prompt], made, TurnTaker(done)))

        released.run_noise(self.options.noise, setting, eta, 1, 0.0, released.Probe(compare, lambda: None))
        loops = {"released": theirs, "ours, recomputed": ours(), "ours, stored": ours(checkpoint=False)}
        records = Turns(self.calls, self.options.device).run(loops)
        return {"agreement": first, "cost": {name: record.summary() for name, record in records.items()}}

    def _noise_gradients(
        self, theirs: Tensor, generator: DiffusersGenerator, setting: released.Setting, config: NoiseConfig
    ) -> dict[str, Any]:
        """Ours at the script's own noise. Its vectors are in reverse order: the initial one is last."""
        problem = NoiseProblem(generator, [setting.prompt], [0], config)
        count = problem.noise.shape[1]
        with torch.no_grad():
            problem.noise.copy_(theirs.flip(0)[None, :count])
        task = Task(generator, problem, self.reward, config, 1, None, True)
        evaluation = exact(task, [0], 0)
        kept: dict[str, Any] = {"rewards": {"ours": float(evaluation.rewards[0])}}
        assert problem.noise.grad is not None
        assert theirs.grad is not None
        grad = theirs.grad.flip(0)[None, :count]
        kept["gradient, all noises"] = agreement(problem.noise.grad, grad)
        kept["gradient, initial noise"] = agreement(problem.noise.grad[:, 0], grad[:, 0])
        if count > 2:
            kept["gradient, injected noises but the last"] = agreement(problem.noise.grad[:, 1:-1], grad[:, 1:-1])
        return kept

    # -- the regularizer ----------------------------------------------------------------------------------------------

    def regularizer(self, scale: float) -> dict[str, Any]:
        """Value, gradient and time of both at n = 835,584, the noises of 50 steps of SD1.5 at 512 pixels."""
        noise = torch.randn(51, 4, 64, 64, generator=torch.Generator().manual_seed(0)) * scale
        noise = noise.to(self.options.device).requires_grad_()
        measured = {"released": lambda: released.released_regularizer(self.options.noise, noise)}
        measured["ours, k = 4"] = lambda: -2 * NoiseRegularizer(block_size=4).log_probability(noise)
        measured["ours, k chosen"] = lambda: -2 * NoiseRegularizer().log_probability(noise)
        seconds: dict[str, list[float]] = {name: [] for name in measured}
        grads: dict[str, Tensor] = {}
        for _ in range(self.options.repeats):
            for name, call in measured.items():
                started = clock(self.options.device)
                (grads[name],) = torch.autograd.grad(call(), noise)
                if noise.is_cuda:
                    torch.cuda.synchronize()
                seconds[name].append(clock(self.options.device) - started)
        zero = not bool(grads["released"].any())
        same = {} if zero else {"gradient, k = 4": agreement(grads["ours, k = 4"], grads["released"])}
        return {"agreement": same, "seconds": {name: statistics.median(s) for name, s in seconds.items()}}


def flat(parts: Sequence[Tensor]) -> Tensor:
    """One vector."""
    return torch.cat([part.detach().flatten() for part in parts])


def ignore(_: Any) -> None:
    """Take anything, return nothing."""
