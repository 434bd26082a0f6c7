"""A server in this process, on a model in the package or a double, asked without sockets."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import httpx

from apertus_mlx.generation.memory_plan import plan_memory
from apertus_mlx.generation.model_folder import LoadedModel, open_folder
from apertus_mlx.generation.options import CHAT_CONTEXT, RunOptions
from apertus_mlx.hub.demo import model_dir
from apertus_mlx.server.admission import MemoryBudget
from apertus_mlx.server.app import build_app
from apertus_mlx.server.engine import Engine, EngineLimits
from apertus_mlx.server.security import Access
from apertus_mlx.server.served_model import ServedModel
from apertus_mlx.server.slots import slot_folder

T = TypeVar("T")
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."


class Server:
    """An application and its engine; `post` and `get` ask it."""

    def __init__(self, app: Any, engine: Engine, model: ServedModel) -> None:
        self.app, self.engine, self.model = app, engine, model
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    async def ask(self, method: str, path: str, **given: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **given)

    def get(self, path: str, **given: Any) -> httpx.Response:
        return self.run(self.ask("GET", path, **given))

    def post(self, path: str, body: Any = None, **given: Any) -> httpx.Response:
        if body is not None:
            headers = {"content-type": "application/json", **given.pop("headers", {})}
            # httpx refuses what JSON cannot hold; here that is the point.
            content = json.dumps(body).encode() if not isinstance(body, bytes) else body
            given = {**given, "content": content, "headers": headers}
        return self.run(self.ask("POST", path, **given))

    def chat(self, **fields: Any) -> httpx.Response:
        body = {"model": "default", "messages": QUESTION, "temperature": 0, **fields}
        return self.post("/v1/chat/completions", body)

    def events(self, path: str, body: Any) -> list[Any]:
        """The data of a stream: objects, and the last word."""
        response = self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        found = [part[6:] for part in response.text.split("\n\n") if part.startswith("data: ")]
        return [part if part == "[DONE]" else json.loads(part) for part in found]

    def lives(self) -> None:
        """A generation, and nothing left behind."""
        response = self.get("/health?deep=1")
        assert (response.status_code, response.json()) == (200, {"status": "ok"})

    def close(self) -> None:
        self.engine.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@cache
def embedded() -> LoadedModel:
    """The embedded model, loaded once for all tests of a process."""
    return open_folder(model_dir()).load()


@cache
def embedded_on_mlx() -> LoadedModel:
    """The same computed by MLX in float32, which shares steps among requests."""
    return open_folder(model_dir()).load(RunOptions(compute="mlx", dtype="float32"))


@contextmanager
def serving(
    *,
    access: Access | None = None,
    limits: EngineLimits | None = None,
    names: tuple[str, ...] = ("tiny", "other-name"),
    load: Callable[[], LoadedModel] | None = None,
    wait: bool = True,
    model: dict[str, Any] | None = None,
    settings: RunOptions | None = None,
    slots: Path | None = None,
    **endpoints: Any,
) -> Iterator[Server]:
    """A server of the embedded model, or of what `load` gives."""
    folder = embedded().folder
    settings = settings or RunOptions()
    plan = plan_memory(folder.inventory, settings, CHAT_CONTEXT)
    kept = None if slots is None else slot_folder(slots, folder, settings)
    loaded = threading.Event()

    def loading() -> LoadedModel:
        found = (load or embedded)()
        loaded.set()
        return found

    engine = Engine(folder, loading, MemoryBudget(folder.inventory, plan), limits, slots=kept)
    served = ServedModel(folder, names, **{"most_tokens": 64, **(model or {})})
    engine.start()
    server = Server(build_app(engine, served, access, **endpoints), engine, served)
    try:
        while wait and engine.state == "loading":
            loaded.wait(0.01)
        yield server
    finally:
        server.close()
