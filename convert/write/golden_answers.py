"""`apertus_mlx_golden_answers.json`: how the weights of a folder continue its golden prompts.

Prompts alone show a device whether it reads and renders text as it should. Answers show whether it
computes as it should: the likeliest token each time, computed by MLX in float32 from the written
weights, and how far ahead of the second it was. Where it is far ahead, any right arithmetic chooses
it as well, in 16 bits too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from apertus_mlx.api import load
from apertus_mlx.checkpoint.config import read_config
from apertus_mlx.convert.write.golden import golden_prompts
from apertus_mlx.convert.write.manifest import add_file, write_json
from apertus_mlx.errors import RejectedError
from apertus_mlx.generation.decode import prefill
from apertus_mlx.model.language_model import LanguageModel
from apertus_mlx.system.progress import OnProgress, Progress
from apertus_mlx.system.strict_json import read_object
from apertus_mlx.system.whole_file import whole_file

GOLDEN_ANSWERS = "apertus_mlx_golden_answers.json"
FORMAT_VERSION = 1
TOKENS = 16
# Logits. What 16 bits do to the logits of a sound model stays below it.
CLEAR_MARGIN = 0.5


def write_golden_answers(directory: Path, progress: OnProgress | None = None) -> None:
    """Write the file into the finished folder `directory`, and into its manifest.

    Raises:
        RejectedError: the folder has no golden prompts, or is damaged.
        ResourceError: the weights do not fit this machine's memory in float32.
    """
    path = directory / GOLDEN_ANSWERS
    with whole_file(path) as file:
        write_json(file, golden_answers(directory, progress))
    add_file(directory, path)


def golden_answers(directory: Path, progress: OnProgress | None = None) -> dict[str, Any]:
    """Continue each golden prompt without tools; `progress` is told of the stage `answering`.

    Conversations are continued as rendered, texts behind BOS. Every token has its `margin`: its
    logit less that of the second likeliest.
    """
    report = progress or (lambda _: None)
    config = read_config(directory)
    prompts = golden_prompts(directory, config)
    bos = [] if config.bos_token_id is None else [config.bos_token_id]
    # Those with tools would show nothing more of the arithmetic.
    plain = [entry for entry in prompts["conversations"] if "tools" not in entry]
    named = [(entry["name"], entry["token_ids"]) for entry in plain]
    named += [(entry["text"], bos + entry["token_ids"]) for entry in prompts["texts"]]
    if not named:
        raise RejectedError(f"{directory}: no tokenizer that could make prompts")
    answers = []
    with load(directory, compute="mlx", dtype="float32", progress=progress) as apertus:
        model = cast(LanguageModel, apertus.model)
        for index, (name, ids) in enumerate(named):
            report(Progress("answering", index * TOKENS, len(named) * TOKENS, "tokens"))
            answers.append({"name": name, "prompt_token_ids": ids, **_continued(model, ids)})
    report(Progress("answering", len(named) * TOKENS, len(named) * TOKENS, "tokens"))
    return {
        "format_version": FORMAT_VERSION,
        "computed_in": "float32",
        "clear_margin": CLEAR_MARGIN,
        "answers": answers,
    }


def _continued(model: LanguageModel, prompt: list[int]) -> dict[str, Any]:
    """The likeliest `TOKENS` tokens after `prompt`, whatever they are."""
    cache = model.make_cache()
    logits = prefill(model, prompt, cache)
    ids, margins = [], []
    for _ in range(TOKENS):
        best = mx.sort(mx.topk(logits.astype(mx.float32), 2))
        ids.append(int(mx.argmax(logits)))
        margins.append(round(float(best[1] - best[0]), 4))
        logits = model.next_token_logits(mx.array([[ids[-1]]]), cache).values
    return {"token_ids": ids, "margins": margins}


def differing_answers(directory: Path, progress: OnProgress | None = None) -> list[str]:
    """What this machine computes otherwise than the folder's file says, a line for each prompt.

    Compared up to the first token that was not clearly ahead.

    Raises:
        RejectedError: the file is missing, damaged, or compares nothing.
    """
    path = directory / GOLDEN_ANSWERS
    stored = read_object(path)
    if stored.get("format_version") != FORMAT_VERSION:
        raise RejectedError(f"{path}: format_version: expected {FORMAT_VERSION}")
    answers = stored.get("answers")
    if not isinstance(answers, list) or not answers:
        raise RejectedError(f"{path}: answers: expected a list of them")
    read = [_answer(entry, f"{path}: answers[{index}]") for index, entry in enumerate(answers)]
    now = {entry["name"]: entry for entry in golden_answers(directory, progress)["answers"]}
    return [
        name
        for name, clear in read
        if name not in now or now[name]["token_ids"][: len(clear)] != clear
    ]


def _answer(entry: Any, place: str) -> tuple[str, list[int]]:
    """The name of a stored answer, and its tokens up to the first that was not clearly ahead."""
    try:
        name, ids, margins = entry["name"], entry["token_ids"], entry["margins"]
        sound = isinstance(name, str) and len(ids) == len(margins) == TOKENS
        clear = [n for n, margin in enumerate(margins) if margin <= CLEAR_MARGIN]
    except (TypeError, KeyError):
        sound = False
    if not sound:
        raise RejectedError(
            f"{place}: expected a name, and token_ids and margins of {TOKENS} tokens"
        )
    return name, ids[: clear[0] if clear else TOKENS]
