"""`apertus-mlx generate`: one prompt, one answer."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from apertus_mlx.cli import options
from apertus_mlx.cli.output import print_json, print_pieces
from apertus_mlx.cli.progress import token_progress
from apertus_mlx.cli.prompt_text import read_prompt
from apertus_mlx.cli.sink import note
from apertus_mlx.cli.tool_options import ToolChoiceOption, ToolsOption, read_tool_options
from apertus_mlx.errors import UsageError
from apertus_mlx.generation import request_files
from apertus_mlx.generation.options import NO_DRAFT, DraftOptions, RunOptions, SamplingOptions
from apertus_mlx.system.arguments import Option
from apertus_mlx.system.sizes import counted, format_bytes
from apertus_mlx.text.template_process import TEMPLATES

if TYPE_CHECKING:
    from apertus_mlx.generation.run import Answer, Generation
    from apertus_mlx.memory import Fit
    from apertus_mlx.text.template import Message


def generate(
    prompt: Annotated[
        str | None, Option("What to say to the model; default: standard input.")
    ] = None,
    *,
    messages: Annotated[
        Path | None,
        Option(
            "Answer a conversation instead: JSON as OpenAI's API takes it; - for standard input.",
            metavar="FILE",
        ),
    ] = None,
    model: options.ModelOption = None,
    raw: Annotated[bool, Option("Continue the prompt as text, without chat template.")] = False,
    system: options.SystemOption = None,
    think: options.ThinkOption = False,
    tools: ToolsOption = None,
    tool_choice: ToolChoiceOption = "auto",
    sampling: SamplingOptions,
    settings: RunOptions,
    draft: DraftOptions = NO_DRAFT,
    output_filter: options.OutputFilterOption = None,
    prompt_cache: Annotated[
        Path | None, Option("Keep what a prompt computes in this file, and go on from it.")
    ] = None,
    json: options.JsonOption = False,
) -> None:
    """Generate an answer to PROMPT; the model's text goes to stdout, all else to stderr."""
    TEMPLATES.start()
    from apertus_mlx.backend.memory_limits import mlx_limits
    from apertus_mlx.cli.model_source import (
        load_draft,
        load_weights,
        open_draft,
        open_model,
        plan_run,
    )
    from apertus_mlx.generation.cached_prefix import CachedPrefix
    from apertus_mlx.generation.model_folder import require_prompt
    from apertus_mlx.generation.run import Generation
    from apertus_mlx.text.output_filter import load_output_filter

    toolset = read_tool_options(tools, tool_choice)
    asked = _read_request(prompt, messages, system)
    require_prompt(asked, system, think, raw, bool(toolset.definitions), "--messages")
    chosen = None if output_filter is None else load_output_filter(output_filter)
    started = time.perf_counter()
    folder = open_model(model, settings)
    prompt_ids = folder.prompt_ids(
        asked, system=system, think=think, raw=raw, tools=toolset.definitions
    )
    folder.require_room(len(prompt_ids))
    helper = open_draft(folder, draft, settings)
    plan = plan_run(folder.inventory, settings, len(prompt_ids) + sampling.max_tokens, helper)
    saved = None
    if prompt_cache is not None:
        saved = folder.prompt_cache(prompt_cache, plan.form, settings)
        saved.require_use(prompt_ids)
    with mlx_limits(plan.buffer_cache_bytes, plan.wired_bytes):
        loaded = replace(load_weights(folder, settings), output_filter=chosen)
        loaded = load_draft(loaded, helper, draft, settings)
        loaded_s = time.perf_counter() - started
        if saved is None:
            prefix = CachedPrefix(loaded.model, plan.form)
        else:
            prefix = saved.resume(loaded.model, prompt_ids)
        run = Generation(
            loaded,
            prompt_ids,
            sampling,
            plan.prefill_step,
            prefix,
            on_prefix=None if saved is None else saved.save,
            tool_names=toolset.names,
            tools=toolset.grammar,
            think=think,
        )
        try:
            _answer(run, json)
        finally:
            if json:
                name = str(folder.directory) if model else "embedded"
                print_json(_report(run.answer, loaded_s, name, plan, chosen is not None))
            else:
                note(summary(run.answer))
        if saved is not None:
            saved.finish()


def _read_request(
    prompt: str | None, messages: Path | None, system: str | None
) -> str | list[Message]:
    """What is to be answered: a text, or messages."""
    if messages is None:
        text = read_prompt() if prompt is None or prompt == "-" else prompt
        if not text:
            raise UsageError("the prompt is empty; pass it as an argument or on standard input")
        return text
    if prompt is not None or system is not None:
        raise UsageError("--messages holds the whole conversation; leave out PROMPT and --system")
    if str(messages) == "-":
        return request_files.parse_messages(read_prompt().encode(), "standard input")
    return request_files.read_messages(messages)


def _answer(run: Generation, json: bool) -> None:
    """Run it and print what it says."""
    with token_progress("reading the prompt", len(run.prompt)) as update:
        run.on_prefill = update
        if json:
            deque(run, maxlen=0)
        else:
            print_pieces(run)


def _report(
    answer: Answer, loaded_s: float, model: str, plan: Fit, filtered: bool
) -> dict[str, Any]:
    """What `--json` prints; of an answer that is filtered not the ids, which spell all of it."""
    from apertus_mlx.generation.memory_plan import report_plan

    report = asdict(answer)
    report["speculation"] = answer.speculation and answer.speculation.report()
    if filtered:
        report["token_ids"] = []
    return {
        "text": report.pop("text"),
        "thoughts": report.pop("thought"),
        **report,
        "message": answer.as_message(),
        "load_s": loaded_s,
        "model": model,
        "prompt_tokens": answer.prompt_tokens,
        "generated_tokens": answer.generated_tokens,
        "memory": report_plan(plan),
    }


def summary(answer: Answer) -> str:
    """One line about what a run took."""
    reused = f" ({answer.reused_prompt_tokens} reused)" if answer.reused_prompt_tokens else ""
    guesses = ""
    if (found := answer.speculation) is not None:
        off = f", then off: {found.off}" if found.off else ""
        guesses = (
            f"draft {found.accepted} of {found.drafted} right, {found.tokens_per_pass:.2f} tokens "
            f"a pass{off}; "
        )
    return (
        f"prompt {counted(answer.prompt_tokens, 'token')}{reused}, "
        f"{answer.prefill_tokens_per_s:.1f} tokens/s; "
        f"answer {counted(answer.generated_tokens, 'token')}, "
        f"{answer.decode_tokens_per_s:.1f} tokens/s; {guesses}"
        f"first token after {answer.time_to_first_token_s:.2f} s; "
        f"peak memory {format_bytes(answer.peak_memory_bytes)}"
    )
