"""`apertus-mlx serve`: an HTTP server as OpenAI's clients expect it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from apertus_mlx.cli import options, several
from apertus_mlx.cli.sink import note
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.options import CHAT_CONTEXT, NO_DRAFT, DraftOptions, RunOptions
from apertus_mlx.server.options import ServeOptions

if TYPE_CHECKING:
    from apertus_mlx.generation.model_folder import LoadedModel


def serve(
    model: options.ModelArgument = None,
    *,
    serving: ServeOptions,
    settings: RunOptions,
    draft: DraftOptions = NO_DRAFT,
    output_filter: options.OutputFilterOption = None,
) -> None:
    """Serve MODEL at http://HOST:PORT/v1; see docs/server.md."""
    _require_libraries()
    from apertus_mlx.backend.rank_channel import RankChannel
    from apertus_mlx.backend.ranks import joined
    from apertus_mlx.cli.model_source import open_draft, open_model, plan_run
    from apertus_mlx.generation.draft_model import load_drafting
    from apertus_mlx.generation.led_model import end, lead
    from apertus_mlx.generation.own_part import common_room
    from apertus_mlx.generation.parallelism import default_rows
    from apertus_mlx.model.apertus import Model
    from apertus_mlx.server.admission import MemoryBudget
    from apertus_mlx.server.app import build_app
    from apertus_mlx.server.engine import Engine, EngineLimits
    from apertus_mlx.server.listen import bind, read_access
    from apertus_mlx.server.listen import serve as listen
    from apertus_mlx.server.served_model import ServedModel
    from apertus_mlx.server.slots import slot_folder
    from apertus_mlx.text.output_filter import load_output_filter
    from apertus_mlx.text.template.chat_template import fix_now

    ranks = joined()
    if ranks is not None and serving.idle_unload is not None:
        raise UsageError("--idle-unload: is for one machine; under mlx.launch leave it out")
    if ranks is not None and draft.draft is not None:
        raise UsageError("--draft: is for one machine; under mlx.launch leave it out")
    if ranks is not None and serving.slots is not None:
        raise UsageError("--slots: is for one machine; under mlx.launch leave it out")
    if ranks is not None and ranks.rank:
        _follow(model, serving, settings)
        return
    access = read_access(serving)
    chosen = None if output_filter is None else load_output_filter(output_filter)
    socket = bind(serving.host, serving.port)
    fix_now()
    folder = open_model(model, settings)
    helper = open_draft(folder, draft, settings)
    context = serving.context or CHAT_CONTEXT
    plan = common_room(folder.inventory, plan_run(folder.inventory, settings, context, helper))
    channel = None if ranks is None else RankChannel(ranks)

    def load() -> LoadedModel:
        loaded = folder.load(settings)
        if ranks is not None and channel is not None and isinstance(loaded.model, Model):
            # Where a rank is gone it waits here until the watch ends the process.
            lead(loaded.model, ranks.sum, channel.tell, several.explain_loss)
        drafting = load_drafting(folder, helper, draft, settings, context=context)
        return replace(loaded, output_filter=chosen, drafting=drafting)

    budget = MemoryBudget(folder.inventory, plan, settings.force)
    formats = [each.spec for each in folder.inventory.matrices.values() if each.spec is not None]
    limits = EngineLimits(
        serving.parallel or default_rows(formats),
        serving.max_queue,
        serving.keep_prefixes,
        serving.idle_unload,
    )
    slots = None if serving.slots is None else slot_folder(serving.slots, folder, settings)
    engine = Engine(folder, load, budget, limits, slots=slots)
    served = ServedModel(
        folder,
        [_name(model, folder.directory.name), *(serving.alias or ())],
        serving.max_tokens,
        serving.think,
        serving.max_thought_tokens,
        chosen is not None,
    )
    app = build_app(engine, served, access, metrics=serving.metrics)
    host = f"[{serving.host}]" if ":" in serving.host else serving.host
    line = f"serving {served.name} at http://{host}:{socket.getsockname()[1]}/v1"
    interrupted = False
    try:
        listen(app, engine, socket, serving.grace, lambda: note(line))
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        if channel is not None:
            end(channel.tell, interrupted)


def _follow(model: str | None, serving: ServeOptions, settings: RunOptions) -> None:
    """Be one of the ranks that compute what rank 0 serves; it alone listens, and ends them."""
    import signal

    from apertus_mlx.backend.memory_limits import mlx_limits
    from apertus_mlx.backend.rank_channel import RankChannel
    from apertus_mlx.backend.ranks import joined
    from apertus_mlx.cli.model_source import open_model, plan_run
    from apertus_mlx.generation.led_model import follow
    from apertus_mlx.generation.own_part import common_room
    from apertus_mlx.model.apertus import Model

    folder = open_model(model, settings)
    plan = plan_run(folder.inventory, settings, serving.context or CHAT_CONTEXT)
    common_room(folder.inventory, plan)
    ranks = joined()
    assert ranks is not None
    channel = RankChannel(ranks)
    # Answers may have time to end; rank 0 knows how long.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with mlx_limits(plan.buffer_cache_bytes, plan.wired_bytes):
        loaded = folder.load(settings).model
        assert isinstance(loaded, Model)
        follow(loaded, plan.form, ranks.sum, channel.orders())


def _name(model: str | None, folder: str) -> str:
    """What the model is called: its Hub id, or the name of its folder."""
    from pathlib import Path

    if model is None:
        return "embedded"
    return folder if Path(model).exists() else model


def _require_libraries() -> None:
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UsageError(
            "serve needs its libraries; install them with: "
            "pip install starlette uvicorn prometheus-client"
        ) from None
