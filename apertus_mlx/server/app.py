"""The ASGI application: which path is answered by what."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from apertus_mlx.generation.options import SamplingOptions
from apertus_mlx.server.body import BODY_TIMEOUT_S, MAX_BODY_BYTES, read_body
from apertus_mlx.server.chat_completions import ChatReply, read_chat
from apertus_mlx.server.chat_page import page_routes
from apertus_mlx.server.completions import CompletionReply, read_completion
from apertus_mlx.server.engine import Engine
from apertus_mlx.server.errors import ApiError, busy
from apertus_mlx.server.fields import ignored_fields, unsupported
from apertus_mlx.server.input_items import list_input
from apertus_mlx.server.jobs import Job, Task
from apertus_mlx.server.message_fields import MESSAGE_FIELDS
from apertus_mlx.server.message_reply import MessageReply
from apertus_mlx.server.messages import count_message_tokens, read_message_request
from apertus_mlx.server.openapi import describe
from apertus_mlx.server.outbox import JobOutbox, RequestOutbox
from apertus_mlx.server.response_fields import RESPONSE_FIELDS
from apertus_mlx.server.response_reply import ResponseReply
from apertus_mlx.server.response_store import ResponseStore
from apertus_mlx.server.responses import count_response_input, read_response
from apertus_mlx.server.security import Access, Application, Guard, error_response
from apertus_mlx.server.served_model import ServedModel
from apertus_mlx.server.stream import PING_AFTER_S, event_stream
from apertus_mlx.server.token_endpoints import apply_template, count_input, detokenize, tokenize
from apertus_mlx.server.whole_answer import whole_answers

_log = logging.getLogger(__name__)
T = TypeVar("T")


class Endpoints:
    """What answers requests, with all that it needs."""

    def __init__(
        self,
        engine: Engine,
        model: ServedModel,
        *,
        metrics: bool = False,
        key: bool = False,
        most_body_bytes: int = MAX_BODY_BYTES,
        body_timeout_s: float = BODY_TIMEOUT_S,
        ping_after_s: float = PING_AFTER_S,
        responses: ResponseStore | None = None,
    ) -> None:
        self._engine, self._model = engine, model
        self._shows_metrics = metrics
        self._description = describe(model.names, metrics=metrics, key=key)
        self._most_body_bytes, self._body_timeout_s = most_body_bytes, body_timeout_s
        self._ping_after_s = ping_after_s
        self._responses = ResponseStore() if responses is None else responses
        # Templates, tokens and grammars of requests, one after the other.
        self._preparing = ThreadPoolExecutor(1, "prepare")

    def routes(self) -> list[Route]:
        """All paths."""
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/messages", self.messages, methods=["POST"]),
            Route("/v1/responses", self.responses, methods=["POST"]),
            *(
                Route(path, partial(self.tokens, answer), methods=["POST"])
                for path, answer in (
                    ("/tokenize", tokenize),
                    ("/detokenize", detokenize),
                    ("/apply-template", apply_template),
                    ("/v1/chat/completions/input_tokens", count_input),
                    ("/v1/messages/count_tokens", count_message_tokens),
                    ("/v1/responses/input_tokens", partial(count_response_input, self._responses)),
                )
            ),
            # After the path above that has no id in this place.
            Route("/v1/responses/{id}", self.one_response, methods=["GET", "DELETE"]),
            Route("/v1/responses/{id}/input_items", self.input_items, methods=["GET"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.one_model, methods=["GET"]),
            Route("/v1/status", self.status, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/openapi.json", self.openapi, methods=["GET"]),
            *([Route("/metrics", self.metrics, methods=["GET"])] if self._shows_metrics else []),
        ]

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await self._body(request)
        asked = await self._prepare(read_chat, body)
        reply = ChatReply(self._model.name, asked.task, asked.usage)
        jobs, outbox = self._submit([asked.task])
        if asked.streams:
            return event_stream(
                self._engine, jobs, outbox, reply.chunks, reply.last, self._ping_after_s
            )
        [(answers, _)] = await whole_answers(self._engine, jobs, outbox, request)
        return JSONResponse(reply.whole(answers))

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = await self._body(request)
        asked = await self._prepare(read_completion, body)
        reply = CompletionReply(self._model.name, asked.tasks, asked.usage)
        jobs, outbox = self._submit(asked.tasks)
        if asked.streams:
            return event_stream(
                self._engine, jobs, outbox, reply.chunks, reply.last, self._ping_after_s
            )
        return JSONResponse(reply.whole(await whole_answers(self._engine, jobs, outbox, request)))

    async def messages(self, request: Request) -> Response:
        """POST /v1/messages."""
        body = await self._body(request)
        asked = await self._prepare(read_message_request, body)
        jobs, outbox = self._submit([asked.task])
        reply = MessageReply(self._model.name, asked, jobs[0])
        headers = {"request-id": reply.request_id}
        if asked.task.streams:
            stream = event_stream(
                self._engine, jobs, outbox, reply.events, reply.last, self._ping_after_s, reply.form
            )
            stream.headers.update(headers)
            return stream
        [([ended], _)] = await whole_answers(self._engine, jobs, outbox, request)
        return JSONResponse(reply.whole(ended), headers=headers)

    async def responses(self, request: Request) -> Response:
        """POST /v1/responses."""
        body = await self._body(request)
        asked = await self._prepare(partial(read_response, self._responses), body)
        reply = ResponseReply(self._model.name, asked, self._responses)
        jobs, outbox = self._submit([asked.task])
        if asked.task.streams:
            return event_stream(
                self._engine, jobs, outbox, reply.events, reply.last, self._ping_after_s, reply.form
            )
        [([ended], _)] = await whole_answers(self._engine, jobs, outbox, request)
        return JSONResponse(reply.whole(ended))

    async def one_response(self, request: Request) -> Response:
        """GET or DELETE /v1/responses/ID."""
        name = request.path_params["id"]
        if request.method == "DELETE":
            self._responses.drop(name)
            return JSONResponse({"id": name, "object": "response", "deleted": True})
        if request.query_params:
            raise unsupported(next(iter(request.query_params)))
        return JSONResponse(self._responses.get(name).response)

    async def input_items(self, request: Request) -> Response:
        """GET /v1/responses/ID/input_items."""
        stored = self._responses.get(request.path_params["id"])
        return JSONResponse(list_input(stored, request.query_params))

    async def tokens(
        self, answer: Callable[[Mapping[str, Any], ServedModel], dict[str, Any]], request: Request
    ) -> Response:
        """What needs no model but its tokenizer and template."""
        return JSONResponse(await self._prepare(answer, await self._body(request)))

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model.entry()]})

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self._model.require_name(request.path_params["name"])
        return JSONResponse(self._model.entry())

    async def status(self, _: Request) -> Response:
        """GET /v1/status."""
        plan = self._engine.budget.plan
        return JSONResponse(
            {
                "model": self._model.entry(),
                "engine": self._engine.report(),
                "cache": str(plan.form),
                "memory_limit_bytes": plan.limit_bytes,
                "accepted_but_ignored": {
                    "chat": ignored_fields("chat"),
                    "completions": ignored_fields("completions"),
                    "messages": ignored_fields("messages", MESSAGE_FIELDS),
                    "responses": ignored_fields("responses", RESPONSE_FIELDS),
                },
            }
        )

    async def health(self, request: Request) -> Response:
        """GET /health, and with `?deep=1` a token, too."""
        report = {"status": self._engine.state}
        if not self._engine.healthy:
            status = report["status"] if report["status"] != "ready" else "stuck"
            error = busy(503, f"the engine is {status}", status)
            return JSONResponse({**error.body(), "status": status}, 503, error.headers)
        if request.query_params.get("deep", "0") not in ("0", ""):
            ids = self._model.folder.encode_raw("a")
            task = Task(ids, SamplingOptions(max_tokens=1, temperature=0))
            jobs, outbox = self._submit([task])
            await whole_answers(self._engine, jobs, outbox, request)
        return JSONResponse({"status": "ok" if report["status"] == "ready" else "sleeping"})

    async def metrics(self, _: Request) -> Response:
        """GET /metrics."""
        return Response(self._engine.metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, _: Request) -> Response:
        """GET /openapi.json."""
        return JSONResponse(self._description)

    async def _body(self, request: Request) -> dict[str, Any]:
        return await read_body(request, self._most_body_bytes, self._body_timeout_s)

    async def _prepare(
        self, read: Callable[[Mapping[str, Any], ServedModel], T], body: Mapping[str, Any]
    ) -> T:
        """Check a body on the thread for that."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._preparing, read, body, self._model)

    def _submit(self, tasks: Sequence[Task]) -> tuple[list[Job], RequestOutbox]:
        outbox = RequestOutbox()
        jobs = [Job(task, JobOutbox(outbox, number)) for number, task in enumerate(tasks)]
        self._engine.submit(jobs)
        return jobs, outbox


def build_app(
    engine: Engine, model: ServedModel, access: Access | None = None, **settings: Any
) -> Application:
    """The application; `settings` are those of `Endpoints`."""
    access = access or Access()
    endpoints = Endpoints(engine, model, key=access.key is not None, **settings)
    known: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
        ApiError: _failed,
        HTTPException: _not_found,
        Exception: _our_fault,
    }
    routes = [*page_routes(), *endpoints.routes()]
    app = Starlette(routes=routes, exception_handlers=known)
    app.router.redirect_slashes = False
    return Guard(_logged(app, engine), access)


def _logged(app: Application, engine: Engine) -> Application:
    """Note each request: no more of it than its method, path and status."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        async def noting(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            engine.metrics.responses.labels(route, str(status)).inc()
            took_ms = 1000 * (time.perf_counter() - started)
            path = ascii(scope["path"][:100])
            _log.info("%s %s %d %.0f ms", scope["method"][:10], path, status, took_ms)

    return serve


async def _failed(request: Request, error: ApiError) -> Response:
    return error_response(error, request.url.path)


async def _not_found(request: Request, error: HTTPException) -> Response:
    words = {404: "there is no such path here", 405: f"{request.method} does not work here"}
    message = words.get(error.status_code, error.detail)
    told = ApiError(error.status_code, message, headers=error.headers)
    return error_response(told, request.url.path)


async def _our_fault(request: Request, error: Exception) -> Response:
    _log.error("a request failed", exc_info=error)
    told = ApiError(500, "the server failed on this request", code="internal")
    return error_response(told, request.url.path)
