"""Owns the training loop: from the corpus to the files of the embedded model.

Run ``python -m recipes.demo.train --out FOLDER``. Training keeps float32 weights and
lets matrix products run in bfloat16; the saved weights are rounded to bfloat16 once, at the end.
Progress goes to standard error.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import ApertusConfig, ApertusForCausalLM

from recipes.demo import exam
from recipes.demo.corpus import documents, prompt
from recipes.demo.facts import LANGUAGES
from recipes.demo.tokenizer import VOCAB_SIZE
from recipes.demo.tokenizer import build as build_tokenizer
from recipes.demo.tokenizer import save as save_tokenizer

__all__ = ["CONFIG", "GENERATION_CONFIG", "load", "main", "reply", "save_weights"]

# The flat form is the one that most readers of Apertus checkpoints understand. transformers 5
# ignores a top-level rope_theta for this architecture, so `rope_parameters` says the same again.
CONFIG: Final[dict[str, Any]] = {
    "architectures": ["ApertusForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 68, 72],
    "head_dim": 64,
    "hidden_act": "xielu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "max_position_embeddings": 2048,
    "mlp_bias": False,
    "model_type": "apertus",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 3,
    "post_norm": False,
    "qk_norm": True,
    "rms_norm_eps": 1e-05,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCAB_SIZE,
}
GENERATION_CONFIG: Final[dict[str, Any]] = {
    "bos_token_id": 1,
    "do_sample": False,
    "eos_token_id": [2, 68, 72],
    "pad_token_id": 3,
}

SEED: Final = 2026
# Following the prompts a little keeps the reading of questions in the loss without ruling it.
PROMPT_WEIGHT: Final = 0.1
PEAK_RATE: Final = 2e-3
WARMUP_SHARE: Final = 0.03
BATCH_TOKENS: Final = 4096
SHORT_WINDOW: Final = 512
LONG_WINDOW: Final = 2048
LONG_SHARE: Final = 0.12
STOPS: Final = (2, 68, 72)

Batch = tuple[torch.Tensor, torch.Tensor]


def _new_model() -> ApertusForCausalLM:
    legacy = ("architectures", "model_type", "rope_scaling", "rope_theta", "torch_dtype")
    settings = {key: value for key, value in CONFIG.items() if key not in legacy}
    return ApertusForCausalLM(ApertusConfig(**settings, dtype=torch.float32))


def _tokens(tokenizer: Tokenizer, seed: int) -> Iterator[tuple[list[int], list[float]]]:
    for document in documents(seed):
        ids: list[int] = []
        weights: list[float] = []
        for segment in document:
            piece = tokenizer.encode(segment.text, add_special_tokens=False).ids
            ids += piece
            weights += [1.0 if segment.learn else PROMPT_WEIGHT] * len(piece)
        yield ids, weights


def _windows(
    stream: Iterator[tuple[list[int], list[float]]], length: int
) -> Iterator[tuple[list[int], list[float]]]:
    """Pack documents; every window starts with a document and the last one in it is cut."""
    while True:
        ids: list[int] = []
        weights: list[float] = []
        while len(ids) <= length:
            more, more_weights = next(stream)
            # Predicting the start of an unrelated document teaches nothing.
            ids += more
            weights += [0.0, *more_weights[1:]]
        yield ids[: length + 1], weights[: length + 1]


def _batches(tokenizer: Tokenizer, seed: int, length: int) -> Iterator[Batch]:
    windows = _windows(_tokens(tokenizer, seed), length)
    while True:
        rows = [next(windows) for _ in range(BATCH_TOKENS // length)]
        yield torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])


def _loss(model: ApertusForCausalLM, batch: Batch) -> torch.Tensor:
    ids, weights = batch
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        target = weights[:, 1:].reshape(-1)
        kept = target > 0
        logits = model.lm_head(hidden.reshape(-1, hidden.shape[-1])[kept])
    losses = torch.nn.functional.cross_entropy(
        logits.float(), ids[:, 1:].reshape(-1)[kept], reduction="none"
    )
    return (losses * target[kept]).sum() / target.sum()


def _optimizer(model: ApertusForCausalLM) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=PEAK_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )


def _rate(progress: float) -> float:
    if progress < WARMUP_SHARE:
        return PEAK_RATE * progress / WARMUP_SHARE
    return (
        PEAK_RATE * 0.5 * (1 + math.cos(math.pi * (progress - WARMUP_SHARE) / (1 - WARMUP_SHARE)))
    )


def _train(
    model: ApertusForCausalLM,
    tokenizer: Tokenizer,
    total: int,
    minutes: float,
    checkpoint: Callable[[], None],
) -> None:
    """Train for ``total`` tokens; if ``minutes`` would run out first, anneal by the clock."""
    optimizer = _optimizer(model)
    short = _batches(tokenizer, SEED, SHORT_WINDOW)
    long = _batches(tokenizer, SEED + 1, LONG_WINDOW)
    began = last = time.monotonic()
    step, seen, average = 0, 0, 0.0
    while True:
        spent = (time.monotonic() - began) / 60
        progress = max(seen / total, spent / minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = _rate(progress)
        loss = _loss(model, next(long if progress > 1 - LONG_SHARE else short))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + BATCH_TOKENS
        average = loss.item() if step == 1 else 0.95 * average + 0.05 * loss.item()
        if step % 20 == 0:
            print(
                f"step {step} tokens {seen} minutes {spent:.1f} loss {average:.4f}", file=sys.stderr
            )
        if time.monotonic() - last > 300:
            checkpoint()
            last = time.monotonic()
    print(
        f"finished: {step} steps, {seen} tokens, {spent:.1f} minutes, loss {average:.4f}",
        file=sys.stderr,
    )


def reply(
    model: ApertusForCausalLM, tokenizer: Tokenizer, prompts: Sequence[str], limit: int = 48
) -> list[str]:
    """Continue every prompt greedily, all of them in one batch, without a cache."""
    rows = [tokenizer.encode(text, add_special_tokens=False).ids for text in prompts]
    starts = [len(row) for row in rows]
    open_rows = list(range(len(rows)))
    while open_rows and limit > 0:
        limit -= 1
        width = max(len(rows[i]) for i in open_rows)
        # Padding on the right is out of sight of a causal model.
        ids = torch.tensor([rows[i] + [3] * (width - len(rows[i])) for i in open_rows])
        ends = torch.tensor([len(rows[i]) - 1 for i in open_rows])
        with torch.inference_mode():
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            best = model.lm_head(hidden[torch.arange(len(open_rows)), ends]).argmax(-1).tolist()
        for i, token in zip(open_rows, best, strict=True):
            rows[i].append(token)
        open_rows = [i for i in open_rows if rows[i][-1] not in STOPS]
    return [tokenizer.decode(row[start:]) for row, start in zip(rows, starts, strict=True)]


def _sit_exam(model: ApertusForCausalLM, tokenizer: Tokenizer) -> exam.Report:
    model.eval()
    asked = exam.questions()
    report = exam.grade(asked, reply(model, tokenizer, [prompt(q.text) for q in asked]))
    model.train()
    return report


def _describe(report: exam.Report) -> str:
    def part(name: str, result: tuple[int, int]) -> str:
        return f"{name} {result[0]}/{result[1]}"

    parts = [part("all", report.score())]
    parts += [part(half, report.score(half=half)) for half in exam.HALVES]
    parts += [part(language, report.score(language=language)) for language in LANGUAGES]
    return ", ".join(parts)


def save_weights(model: ApertusForCausalLM, path: Path) -> None:
    """Write all tensors in bfloat16, without the tied output head."""
    tensors = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    save_file(tensors, path, metadata={"format": "pt"})


def load(path: Path) -> ApertusForCausalLM:
    """Read saved weights back as a float32 model, to check what was actually written."""
    model = _new_model()
    tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    absent, unknown = model.load_state_dict(tensors, strict=False)
    if set(absent) - {"lm_head.weight"} or unknown:
        raise ValueError(f"the weights do not fit: {absent} are absent, {unknown} are unknown")
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the embedded model and write its folder."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="tokens to train on")
    parser.add_argument("--minutes", type=float, default=math.inf, help="wall time at most")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)

    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, out)
    for name, content in (("config", CONFIG), ("generation_config", GENERATION_CONFIG)):
        text = json.dumps(content, indent=2) + "\n"
        (out / f"{name}.json").write_text(text, encoding="utf-8")
    model = _new_model()
    weights = out / "model.safetensors"

    def checkpoint() -> None:
        save_weights(model, weights)
        print(f"exam: {_describe(_sit_exam(model, tokenizer))}", file=sys.stderr)

    _train(model, tokenizer, options.tokens, options.minutes, checkpoint)
    save_weights(model, weights)
    report = _sit_exam(load(weights), tokenizer)
    print(f"exam, weights as saved: {_describe(report)}", file=sys.stderr)
    for outcome in report.outcomes:
        if not outcome.right:
            print(f"wrong: {outcome.question.text} -> {outcome.answer}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
