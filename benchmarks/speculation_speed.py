"""Speed with a draft of which a set share of guesses is right, beside plain decoding and mlx-lm's.

    python -m benchmarks.speculation_speed [--model 8B] [--draft 0.5B] [--right 0.6 0.8]
    python -m benchmarks.speculation_speed --cpu MODEL DRAFT [--right 0.6 0.8]

Released shapes with random weights quantized to 4 bits, which MLX computes, ours and mlx-lm's with
the same weights; or, with `--cpu`, two folders that `convert` has made, which the CPU path
computes. What is written is a script of random tokens: the model's logits of the script's next
token are raised, and the draft, after all of its work, guesses that token or, at places drawn once
for everybody, another. So the times are those of real decoding, while the share that is right is
arithmetic: it says nothing of any text. All ways take turns; the first round is left out, medians
are shown. Where other programs use the machine, look at seconds of processor (a token's, and how
much less of them a way needs than its own plain one), not at tokens a second.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from apertus_mlx.cache import allow_cut, rewind
from apertus_mlx.checkpoint.config import parse_config
from apertus_mlx.generation.decode import draw_tokens, prefill
from apertus_mlx.generation.draft_pace import FixedPace, MeasuredPace, Pace
from apertus_mlx.generation.drafts import ModelDraft
from apertus_mlx.generation.model_folder import open_folder
from apertus_mlx.generation.options import RunOptions
from apertus_mlx.generation.sampling import Sampler, SamplingParams
from apertus_mlx.generation.speculate import Draw, Speculation, Speculator
from apertus_mlx.model.apertus import Model
from apertus_mlx.model.language_model import LanguageModel, NextTokenLogits
from benchmarks.make_checkpoint import GEOMETRIES, config

GROUP_SIZE, BITS = 64, 4
# Of a matrix whose rows are these, over and over: only how many bytes are read matters.
DISTINCT = 64
# Above any logit of random weights.
RAISED = 1e4
# Control tokens come before.
FIRST_TEXT_ID = 1000
GREEDY = SamplingParams(temperature=0.0, seed=0)
# Behind the answer, for guesses that reach further.
MARGIN = 16


@dataclass(frozen=True)
class Script:
    """The text that is written, prompt first, and what a draft guesses at each of its places."""

    ids: mx.array
    guesses: list[int]
    prompt: list[int]
    tokens: int

    def raised(self, logits: mx.array, first: int) -> mx.array:
        """Logits `[n, vocabulary]` of the places from `first` on, the script's ids on top."""
        rows = mx.arange(logits.shape[0])
        return logits.at[rows, self.ids[first : first + logits.shape[0]]].add(RAISED)


def make_script(prompt: int, tokens: int, right: float, vocabulary: int) -> Script:
    """A random text; the places where guesses are right are the same for the same share."""
    chance = random.Random(0)
    ids = [chance.randrange(FIRST_TEXT_ID, vocabulary - 1) for _ in range(prompt + tokens + MARGIN)]
    guesses = [token if chance.random() < right else token + 1 for token in ids]
    return Script(mx.array(ids), guesses, ids[:prompt], tokens)


def make_model(values: dict[str, Any], dtype: mx.Dtype) -> Model:
    """A quantized model whose matrices repeat a few random rows."""
    model = Model(parse_config(values))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            rows, columns = module.weight.shape
            some = 0.02 * mx.random.normal((DISTINCT, columns))
            module.weight = mx.tile(some, (-(-rows // DISTINCT), 1))[:rows]
    model.set_dtype(dtype)
    nn.quantize(model, GROUP_SIZE, BITS)
    # One after the other, so that only one is ever there in full precision.
    for module in model.modules():
        mx.eval(module.parameters() if not module.children() else [])
    mx.eval(model.parameters())
    return model


class Target:
    """The model that checks, see `speculate.Target`."""

    def __init__(self, model: LanguageModel, script: Script, cuts: int) -> None:
        self._model, self._script = model, script
        self._layers = model.make_cache()
        if cuts and not allow_cut(self._layers, cuts):
            raise AssertionError("a plain cache can be cut")
        self.logits = self._raised(prefill(model, script.prompt, self._layers)[None])[0]

    def step(self, token: mx.array) -> NextTokenLogits:
        found = self._model.next_token_logits(token.reshape(1, 1), self._layers)
        return NextTokenLogits(self._raised(found.values[None])[0])

    def check(self, tokens: mx.array) -> mx.array:
        return self._raised(self._model(tokens[None], self._layers)[0])

    def keep(self, length: int) -> None:
        if not rewind(self._layers, max(self._layers[0].offset - length, 0)):
            raise AssertionError("a plain cache can be cut")

    def _raised(self, logits: mx.array) -> mx.array:
        # Behind the tokens that the cache has now.
        first = self._layers[0].offset - logits.shape[0] + 1
        return self._script.raised(logits, first)


class ScriptedDraft(ModelDraft):
    """Computes what a draft computes, draws too, and then guesses what the script says."""

    def __init__(self, model: LanguageModel, script: Script) -> None:
        width = model.config.output_vocab_size
        super().__init__(model, model.config.max_position_embeddings, width)
        self._script = script

    def propose(self, ids: Sequence[int], most: int, draw: Draw) -> mx.array | None:
        guesses = iter(self._script.guesses[len(ids) :])

        def scripted(logits: mx.array) -> mx.array:
            drawn = draw(logits)
            assert drawn is not None
            return drawn * 0 + next(guesses)

        return super().propose(ids, most, scripted)


@dataclass
class Written:
    """What one way did, and in how many seconds, of processor too; the first token is not timed."""

    seconds: float
    cpu_seconds: float
    tokens: int
    passes: int
    drafted: int = 0
    accepted: int = 0


def plain(model: LanguageModel, script: Script) -> Written:
    target = Target(model, script, 0)
    sampler = Sampler(GREEDY, script.prompt, model.config.output_vocab_size)
    taken = timed(draw_tokens(target.step, target.logits, sampler, script.tokens), script)
    return Written(*taken, script.tokens, script.tokens)


def drafted(model: LanguageModel, small: LanguageModel, script: Script, pace: Pace) -> Written:
    target = Target(model, script, pace.most)
    sampler = Sampler(GREEDY, script.prompt, model.config.output_vocab_size)
    draft = ScriptedDraft(small, script)
    speculator = Speculator(target, draft, pace, script.prompt, sampler)
    taken = timed(speculator.tokens(target.logits, script.tokens), script)
    found: Speculation = speculator.found
    return Written(*taken, found.tokens, found.passes, found.drafted, found.accepted)


def timed(tokens: Iterator[int], script: Script) -> tuple[float, float]:
    """Seconds behind the first token, and of processor, once the answer is that of the script."""
    written = [next(tokens)]
    started, cpu_started = time.perf_counter(), time.process_time()
    written += tokens
    taken = time.perf_counter() - started, time.process_time() - cpu_started
    length = len(script.prompt)
    if written != script.ids.tolist()[length : length + script.tokens]:
        raise AssertionError("the answer is not that of the script")
    return taken


class Peer:
    """A model of mlx-lm with the weights of ours; `raised` has its logits follow the script."""

    def __init__(self, ours: Model, values: dict[str, Any]) -> None:
        from mlx_lm.models import apertus

        self._model: Any = apertus.Model(apertus.ModelArgs.from_dict(values))
        nn.quantize(self._model, GROUP_SIZE, BITS)
        names = {name for name, _ in tree_flatten(self._model.parameters())}
        shared = [pair for pair in tree_flatten(ours.parameters()) if pair[0] in names]
        # Activations have constants that only one of them counts as weights.
        self._model.load_weights(shared, strict=False)
        self.layers = self._model.layers
        self.follows: mx.array | None = None
        self.script: Script | None = None

    def caches(self) -> list[Any]:
        from mlx_lm.models.cache import make_prompt_cache

        caches: list[Any] = make_prompt_cache(self._model)
        return caches

    def following(self, ids: mx.array) -> Peer:
        self.follows = ids
        return self

    def __call__(self, tokens: mx.array, cache: Any = None, **more: Any) -> mx.array:
        logits = self._model(tokens, cache=cache, **more)
        assert self.follows is not None
        count = logits.shape[1]
        first = cache[0].offset - count + 1
        at = self.follows[first : first + count]
        return logits.at[0, mx.arange(count), at].add(RAISED)


def peer_plain(target: Peer, script: Script) -> Written:
    from mlx_lm.generate import generate_step

    target.following(script.ids)
    prompt: Any = mx.array(script.prompt)
    caches = target.caches()
    steps = generate_step(prompt, target, max_tokens=script.tokens, prompt_cache=caches)  # type: ignore[arg-type]
    taken = timed((int(token) for token, _ in steps), script)
    return Written(*taken, script.tokens, script.tokens)


def peer_drafted(target: Peer, small: Peer, script: Script, ahead: int) -> Written:
    from mlx_lm.generate import speculative_generate_step

    target.following(script.ids)
    small.following(mx.array(script.guesses))
    caches = [*target.caches(), *small.caches()]
    steps = speculative_generate_step(
        mx.array(script.prompt), target, small, num_draft_tokens=ahead,  # type: ignore[arg-type]
        max_tokens=script.tokens, prompt_cache=caches,
    )  # fmt: skip
    counts = Written(0.0, 0.0, script.tokens, 0)

    def tokens() -> Iterator[int]:
        begins = True
        for number, (token, _, was_drafted) in enumerate(steps):
            if begins:
                counts.passes += 1
                counts.drafted += min(ahead, script.tokens - number)
            counts.accepted += was_drafted
            begins = not was_drafted
            yield int(token)

    counts.seconds, counts.cpu_seconds = timed(tokens(), script)
    return counts


def main() -> None:
    """Measure, and print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=GEOMETRIES, default="1.5B")
    parser.add_argument("--draft", choices=GEOMETRIES, default="0.5B")
    parser.add_argument("--cpu", type=Path, nargs=2, metavar=("MODEL", "DRAFT"))
    parser.add_argument("--right", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--ahead", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--prompt-tokens", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    results = list(measure(given))
    if given.json:
        print(json.dumps({"arguments": vars(given), "results": results}, indent=2, default=str))
        return
    if given.cpu:
        print(f"{given.cpu[0]} with {given.cpu[1]}, the CPU path, {given.tokens} tokens")
    else:
        print(
            f"{given.model} with {given.draft} as its draft, {given.dtype}, {given.tokens} tokens"
        )
    print(
        "| right | way | tokens/s | in its own plain | CPU s a token | in its own plain "
        "| tokens a pass | accepted |"
    )
    print("|---" * 8 + "|")
    for each in results:
        print(
            f"| {each['right']} | {each['way']} | {each['tokens_per_s']:.2f} | {each['ratio']:.2f} "
            f"| {each['cpu_s_per_token']:.3f} | {each['cpu_ratio']:.2f} "
            f"| {each['tokens_per_pass']:.2f} | {each['accepted']}/{each['drafted']} |"
        )


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each way and share."""
    model, small, peers = models_of(given)
    vocabulary = min(each.config.output_vocab_size for each in (model, small))
    for right in given.right:
        script = make_script(given.prompt_tokens, given.tokens, right, vocabulary)
        ways = ways_of(model, small, peers, script, given.ahead)
        done: dict[str, list[Written]] = {name: [] for name in ways}
        for _ in range(given.rounds + 1):
            for name, way in ways.items():
                done[name].append(way())
        rates = {
            name: statistics.median((given.tokens - 1) / each.seconds for each in rounds[1:])
            for name, rounds in done.items()
        }
        costs = {
            name: statistics.median(each.cpu_seconds / (given.tokens - 1) for each in rounds[1:])
            for name, rounds in done.items()
        }
        for name, rounds in done.items():
            own = "mlx-lm, plain" if name.startswith("mlx-lm") else "plain"
            counted = rounds[1:]
            yield {
                "right": right, "way": name, "tokens_per_s": rates[name],
                "ratio": rates[name] / rates[own],
                "cpu_s_per_token": costs[name], "cpu_ratio": costs[own] / costs[name],
                "tokens_per_pass": sum(e.tokens for e in counted) / sum(e.passes for e in counted),
                "drafted": sum(e.drafted for e in counted),
                "accepted": sum(e.accepted for e in counted),
            }  # fmt: skip


def models_of(given: argparse.Namespace) -> tuple[LanguageModel, LanguageModel, list[Peer]]:
    """The model, its draft, and both as mlx-lm has them, where it can compute the same."""
    if given.cpu:
        options = RunOptions(compute="cpu")
        large, little = (open_folder(each).load(options).model for each in given.cpu)
        return large, little, []
    values = [config(size) for size in (given.model, given.draft)]
    model, small = (make_model(each, getattr(mx, given.dtype)) for each in values)
    peers: list[Peer] = []
    if importlib.util.find_spec("mlx_lm") is not None:
        peers = [Peer(*pair) for pair in zip((model, small), values, strict=True)]
    return model, small, peers


def ways_of(
    model: LanguageModel, small: LanguageModel, peers: Sequence[Peer], script: Script,
    ahead: Sequence[int],
) -> dict[str, Callable[[], Written]]:  # fmt: skip
    """What is compared, by name."""
    measured = MeasuredPace()
    ways: dict[str, Callable[[], Written]] = {
        "plain": lambda: plain(model, script),
        "as far as it pays": lambda: drafted(model, small, script, measured),
    }
    for count in ahead:
        ways[f"{count} ahead"] = lambda k=count: drafted(model, small, script, FixedPace(k))  # type: ignore[misc]
    if peers:
        target, other = peers
        ways["mlx-lm, plain"] = lambda: peer_plain(target, script)
        for count in ahead:
            ways[f"mlx-lm, {count} ahead"] = lambda k=count: peer_drafted(target, other, script, k)  # type: ignore[misc]
    return ways


if __name__ == "__main__":
    main()
