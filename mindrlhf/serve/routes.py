"""The server's routes: chat completions, models, health."""
from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import H11Protocol

from mindrlhf.parallel import Settings
from mindrlhf.serve.protocol import ApiError, Completion, parse_request, require_model
from mindrlhf.serve.worker import TooManyRequests, Update, Worker

LARGEST_BODY = 1 << 20  # bytes; 8192 tokens have about 40 kB
HEADER_SECONDS = BODY_SECONDS = 30  # to receive a header, and a body
LOOK = 0.5  # seconds between looks whether the client is still there


@dataclass(frozen=True)
class Service:
    """What the routes need.

    Attributes:
        worker: generates.
        settings: as config.load_settings returns them, of run_mode predict.
        model: name of the model.
        system: system prompt of conversations that have none.
        api_key: that requests must have; None: none.
        timeout: seconds that a request may take.
        started: of the server, in seconds since 1970.
    """
    worker: Worker
    settings: Settings
    model: str
    system: str | None
    api_key: str | None
    timeout: float
    started: int

    def describe_model(self) -> dict[str, Any]:
        """The model as /v1/models has it."""
        return {"id": self.model, "object": "model", "created": self.started,
                "owned_by": "mindrlhf"}


def make_app(service: Service) -> FastAPI:
    """The application for uvicorn."""
    app = FastAPI(openapi_url=None)

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> Response:
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return JSONResponse(error.body, error.status, headers)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        text = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(ApiError(error.status_code, text).body, error.status_code,
                            getattr(error, "headers", None))

    @app.exception_handler(Exception)
    async def fault(_: Request, __: Exception) -> Response:
        return JSONResponse(ApiError(500, "the server failed; see its log").body, 500)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        worker = service.worker
        return {"status": "ok", "model": service.model, "answers": worker.load,
                "most_answers": worker.most}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        require_key(request, service.api_key)
        return {"object": "list", "data": [service.describe_model()]}

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> dict[str, Any]:
        require_key(request, service.api_key)
        require_model(name, service.model)
        return service.describe_model()

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        require_key(request, service.api_key)
        body = await read_body(request)
        completion = await asyncio.to_thread(
            parse_request, body, model=service.model, tokenizer=service.worker.engine.tokenizer,
            settings=service.settings, system=service.system)
        events = start(completion, service)
        if completion.is_stream:
            return StreamingResponse(stream_events(completion, events, service),
                                     media_type="text/event-stream")
        return await answer_at_once(completion, events, service, request)

    return app


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP, which closes connections that have no complete header for HEADER_SECONDS.

    Silent connections would take the descriptors of others. uvicorn itself ends them only between
    two requests.
    """

    def connection_made(self, transport: Any) -> None:
        """Start to look at the connection."""
        super().connection_made(transport)
        self.loop.call_later(HEADER_SECONDS, self._look, None)

    def _look(self, before: Any) -> None:
        """Close the connection if nothing was asked since the last look.

        Args:
            before: the last request then, if it had been answered, or None.
        """
        if self.transport.is_closing():
            return
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self.cycle is before:
            self.transport.close()
            return
        self.loop.call_later(HEADER_SECONDS, self._look, self.cycle)


def require_key(request: Request, key: str | None) -> None:
    """Raise ApiError if a request lacks the API key."""
    given = request.headers.get("authorization", "")
    if key is not None and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
        raise ApiError(401, "wrong or missing API key; send it as Authorization: Bearer KEY")


async def read_body(request: Request) -> Any:
    """The JSON of a request; its size and the time to receive it are limited."""
    async def receive() -> bytes:
        data = b""
        async for part in request.stream():
            data += part
            if len(data) > LARGEST_BODY:
                raise ApiError(413, f"the request has more than {LARGEST_BODY >> 20} MB")
        return data
    try:
        return json.loads(await asyncio.wait_for(receive(), BODY_SECONDS))
    except asyncio.TimeoutError:
        raise ApiError(408, f"the request was not received in {BODY_SECONDS} s") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the request is not JSON ({error})") from None


def start(completion: Completion, service: Service) -> asyncio.Queue[Update]:
    """Submit the answers of a request; return the queue of what is new in them."""
    if len(completion.answers) > service.worker.most:
        raise ApiError(400, f"'n' is {len(completion.answers)}; this server takes at most "
                       f"{service.worker.most} answers", "n")
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[Update] = asyncio.Queue()

    def report(progress: Update) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server ends
            loop.call_soon_threadsafe(events.put_nowait, progress)
    try:
        service.worker.submit(completion.answers, report)
    except TooManyRequests:
        raise ApiError(429, f"{service.worker.most} answers are being generated or wait already; "
                       "try again later") from None
    return events


async def next_event(events: asyncio.Queue[Update], deadline: float) -> Update | None:
    """The next progress, or None if there is none for a while.

    Raises:
        ApiError: the deadline has passed, or the model failed.
    """
    try:
        progress = await asyncio.wait_for(events.get(), LOOK)
    except asyncio.TimeoutError:
        progress = None
    if progress and progress.finish_reason == "error":
        raise ApiError(500, "the model failed, or the server ends; see its log")
    if time.monotonic() > deadline:
        raise ApiError(504, "the request took too long; ask for fewer tokens")
    return progress


async def answer_at_once(completion: Completion, events: asyncio.Queue[Update],
                         service: Service, request: Request) -> Response:
    """The response when all answers are complete; none if the client has left."""
    left, deadline = len(completion.answers), time.monotonic() + service.timeout
    try:
        looked = time.monotonic()
        while left:
            progress = await next_event(events, deadline)
            left -= bool(progress and progress.finish_reason)
            if left and time.monotonic() - looked > LOOK:
                looked = time.monotonic()
                if await request.is_disconnected():
                    return Response(status_code=499)
        return JSONResponse(completion.response())
    finally:
        service.worker.leave(completion.answers)


async def stream_events(completion: Completion, events: asyncio.Queue[Update],
                        service: Service) -> AsyncIterator[str]:
    """Server-sent events with the answers. The iterator is closed when the client leaves."""
    left, deadline = len(completion.answers), time.monotonic() + service.timeout
    place = {answer: index for index, answer in enumerate(completion.answers)}
    try:
        for index in range(left):
            yield as_event(completion.chunk(index, {"role": "assistant", "content": ""}))
        while left:
            progress = await next_event(events, deadline)
            if progress is None:
                continue
            index = place[progress.answer]
            if progress.piece:
                yield as_event(completion.chunk(index, {"content": progress.piece}))
            if progress.finish_reason:
                left -= 1
                yield as_event(completion.chunk(index, {}, progress.finish_reason))
        if completion.with_usage:
            yield as_event(completion.usage_chunk())
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield as_event(error.body)
    finally:
        service.worker.leave(completion.answers)


def as_event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content)}\n\n"
