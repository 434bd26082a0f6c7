"""`apertus-mlx generate`: one prompt, one answer."""

from __future__ import annotations

import sys
import time
from collections import deque
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from apertus_mlx.cli import cache_options, options
from apertus_mlx.cli.output import note, print_data, print_json, print_pieces
from apertus_mlx.cli.progress import token_progress
from apertus_mlx.cli.prompt_text import read_prompt, require_short
from apertus_mlx.system.sizes import format_bytes

if TYPE_CHECKING:
    from apertus_mlx.checkpoint.inventory import Inventory
    from apertus_mlx.generation.prompt_cache import PromptCache
    from apertus_mlx.generation.run import Generation, Result
    from apertus_mlx.text.template import ChatTemplate
    from apertus_mlx.text.tokenizer import Tokenizer


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="What to say to the model; default: standard input.")
    ] = None,
    model: options.ModelOption = None,
    revision: options.RevisionOption = None,
    offline: options.OfflineOption = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as text, without chat template.")
    ] = False,
    system: options.SystemOption = None,
    think: options.ThinkOption = False,
    max_tokens: options.MaxTokensOption = 1024,
    temperature: options.TemperatureOption = None,
    top_p: options.TopPOption = None,
    top_k: options.TopKOption = None,
    min_p: options.MinPOption = None,
    repetition_penalty: options.RepetitionPenaltyOption = None,
    seed: options.SeedOption = None,
    stop: options.StopOption = None,
    dtype: options.DTypeOption = None,
    compute: options.ComputeOption = options.Compute.AUTO,
    precision: options.PrecisionOption = options.Precision.AUTO,
    kv_bits: cache_options.KvBitsOption = None,
    kv_bits_v: cache_options.KvBitsVOption = None,
    max_kv: cache_options.MaxKvOption = None,
    kv_sink: cache_options.KvSinkOption = None,
    kv_rotate: cache_options.KvRotateOption = None,
    prefill_step: cache_options.PrefillStepOption = None,
    memory_limit: cache_options.MemoryLimitOption = None,
    force: cache_options.ForceOption = False,
    prompt_cache: cache_options.PromptCacheOption = None,
    json: options.JsonOption = False,
) -> None:
    """Generate an answer to PROMPT; the model's text goes to stdout, all else to stderr."""
    from apertus_mlx.checkpoint.generation_config import GenerationConfig
    from apertus_mlx.cli.model_source import locate_model, open_speaker
    from apertus_mlx.errors import UsageError
    from apertus_mlx.generation.cached_prefix import CachedPrefix
    from apertus_mlx.generation.run import Generation, require_room
    from apertus_mlx.generation.sampling import SamplingParams, resolve_params

    def choose(config: GenerationConfig) -> SamplingParams:
        return resolve_params(
            config,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )

    choose(GenerationConfig())  # Refuse bad values before a model is fetched or loaded.
    if raw and (system is not None or think):
        raise UsageError("--raw takes no chat template, so neither --system nor --think")
    if stop and not all(stop):
        raise UsageError("--stop: an empty string would stop at once")
    text = read_prompt() if prompt is None or prompt == "-" else prompt
    if not text:
        raise UsageError("the prompt is empty; pass it as an argument or on standard input")

    form = cache_options.read_cache_form(kv_bits, kv_bits_v, max_kv, kv_sink, kv_rotate)
    request = cache_options.read_memory_request(form, prefill_step, memory_limit, force)
    dtype_name = dtype.value if dtype else None

    started = time.perf_counter()
    directory = locate_model(model, revision, offline)
    prompt_ids: list[int] = []
    saved: PromptCache | None = None

    def before_weights(
        inventory: Inventory, tokenizer: Tokenizer, template: ChatTemplate | None
    ) -> None:
        nonlocal saved
        require_short(text, tokenizer, inventory.config.max_position_embeddings)
        prompt_ids.extend(_prompt_ids(tokenizer, template, text, raw, system, think))
        require_room(len(prompt_ids), inventory.config.max_position_embeddings)
        memory.choose(inventory, len(prompt_ids) + max_tokens)
        if prompt_cache is not None:
            saved = cache_options.open_prompt_cache(
                prompt_cache, inventory, memory.fit.form, dtype_name, compute.value
            )
            saved.require_use(prompt_ids)

    guard = cache_options.MemoryGuard(request, dtype_name, compute.value, precision.value)
    with guard as memory:
        speaker = open_speaker(directory, dtype_name, compute, precision, before_weights)
        loaded_s = time.perf_counter() - started
        if saved is None:
            prefix = CachedPrefix(speaker.model, memory.fit.form)
        else:
            prefix = saved.resume(speaker.model, prompt_ids)
        run = Generation(
            speaker,
            prompt_ids,
            choose(speaker.generation_config),
            max_tokens,
            stop or (),
            memory.fit.prefill_step,
            prefix,
            on_prefix=None if saved is None else saved.save,
        )
        try:
            _answer(run, json)
        finally:
            result = run.result
            if json:
                print_json(
                    {
                        **asdict(result),
                        "load_s": loaded_s,
                        "model": str(directory) if model else "embedded",
                        "prompt_tokens": len(result.prompt_token_ids),
                        "generated_tokens": len(result.token_ids),
                        "memory": cache_options.report_fit(memory.fit),
                    }
                )
            else:
                if sys.stdout.isatty():
                    print_data("")
                note(summary(result))
        if saved is not None:
            saved.finish()


def _answer(run: Generation, json: bool) -> None:
    """Run it and print what it says."""
    with token_progress("reading the prompt", len(run.prompt)) as update:
        run.on_prefill = update
        if json:
            deque(run, maxlen=0)
        else:
            print_pieces(run)


def summary(result: Result) -> str:
    """One line about what a run took."""
    prompt_tokens = len(result.prompt_token_ids)
    reused = f" ({result.reused_prompt_tokens} reused)" if result.reused_prompt_tokens else ""
    return (
        f"prompt {prompt_tokens} tokens{reused}, {result.prefill_tokens_per_s:.1f} tokens/s; "
        f"answer {len(result.token_ids)} tokens, {result.decode_tokens_per_s:.1f} tokens/s; "
        f"first token after {result.time_to_first_token_s:.2f} s; "
        f"peak memory {format_bytes(result.peak_memory_bytes)}"
    )


def _prompt_ids(
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    text: str,
    raw: bool,
    system: str | None,
    think: bool,
) -> list[int]:
    from apertus_mlx.text.template import Message

    if raw or template is None:
        if not raw:
            note("the model has no chat template (a base model?); continuing the prompt as text")
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return bos + tokenizer.encode(text)
    messages = [] if system is None else [Message(role="system", content=system)]
    messages.append(Message(role="user", content=text))
    return template.render(messages, think=think)
