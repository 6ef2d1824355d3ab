"""The routes. Handlers read a body, ask the batcher, and write the answer; all rules are in the modules beside this."""

from __future__ import annotations

import asyncio
import io
import json
import math
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from numpy.typing import NDArray
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manidp.data.images import load_sample
from manidp.data.pictures import decode_picture, pixels_of
from manidp.engine.engine import Engine
from manidp.errors import CheckpointError, ImageError, quoted
from manidp.formats.checkpoint import OperatingPoint
from manidp.graph.macs import ungated_macs
from manidp.predict import asked_budget, predictions_of
from manidp.result import Result
from manidp.serve import describe, protocol
from manidp.serve.batching import Answer, Batcher, warm_up
from manidp.serve.bodies import Asked, asked_of
from manidp.serve.limits import LONGEST_DEADLINE, Held, Limits, RefusedError
from manidp.serve.log import Log
from manidp.serve.metrics import CONTENT_TYPE, Metrics

OPTIONS = ("budget", "deadline_ms", "top", "channels")
PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
}
ASIDE = 2**16  # bytes of a document that is read in a thread, so that others are answered meanwhile


@dataclass
class Service:
    """A model that is served, and all that its handlers share.

    ladder: operating points for the dial, the best first. target: seconds within which requests are to be answered.
    ``on_warm`` is called before the first request is taken, ``on_fault`` where the model could not be warmed up.
    """

    name: str
    engine: Engine
    ladder: tuple[OperatingPoint, ...]
    target: float
    limits: Limits = field(default_factory=Limits)
    log: Log | None = None
    metrics: Metrics = field(default_factory=Metrics)
    batcher: Batcher | None = None
    draining: bool = False
    fault: BaseException | None = None
    on_fault: Callable[[], None] = lambda: None
    on_warm: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.held = Held(self.limits.held)
        self.threads = ThreadPoolExecutor(self.engine.threads, "decode")
        self.dense = ungated_macs(self.engine.graph)
        self.samples = {str(number): _png(image) for number, image in enumerate(load_sample(describe.SAMPLES).images)}
        self.recent: deque[float] = deque(maxlen=1000)
        self.metrics.watch("ready", "1 while requests are taken", lambda: self.ready)
        queued = "Images that wait for the engine"
        self.metrics.watch("queue_images", queued, lambda: self.batcher.queued if self.batcher else 0)
        self.metrics.watch("held_bytes", "Bytes of requests in memory", lambda: self.held.bytes)
        self.metrics.watch_budgets([one.name for one in self.ladder], lambda: self.in_force.name)

    @property
    def in_force(self) -> OperatingPoint:
        """The operating point of requests that ask for none."""
        return self.batcher.in_force if self.batcher else self.ladder[0]

    @property
    def ready(self) -> bool:
        """Whether requests are taken, and more may be sent."""
        return self.batcher is not None and not self.draining

    def working(self) -> Batcher:
        """The batcher. Raises RefusedError (503) before the engine is warm."""
        if self.batcher is None:
            raise RefusedError(503, "the model is being warmed up; try again", retry=1)
        return self.batcher

    async def begin(self) -> None:
        """Warm the engine up, then take requests."""
        try:
            checkpoint = self.engine.checkpoint
            names = [one.name for one in checkpoint.every_point]
            costs = await asyncio.get_running_loop().run_in_executor(self.threads, warm_up, self.engine, names)
            batcher = Batcher(self.engine, self.ladder, costs, self.target, self.metrics.ran)
            batcher.start()
            self.on_warm()
            self.batcher = batcher
        except Exception as error:
            self.fault = error
            self.on_fault()

    async def end(self) -> None:
        """Answer what was taken, and give threads back."""
        if self.batcher:
            await self.batcher.stop()
        self.threads.shutdown()

    async def aside(self, size: int, work: Callable[..., Any], *arguments: Any) -> Any:
        """The result of work on so many bytes, in a thread if they are many."""
        if size <= ASIDE:
            return work(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self.threads, work, *arguments)

    def asked_point(self, budget: object) -> str | None:
        """The name of the operating point that an option asks for. Raises RefusedError (422)."""
        if budget is None:
            return None
        if isinstance(budget, bool) or not isinstance(budget, (str, int, float)):
            raise RefusedError(422, "budget must be the name of an operating point, or a share such as 45% or 0.45")
        try:
            asked = asked_budget(budget) if isinstance(budget, str) else float(budget)
            if isinstance(asked, float) and asked > 1:
                raise RefusedError(422, "budget is a share of the dense multiply-adds, at most 1 or 100%")
            return self.engine.checkpoint.point(asked).name
        except (CheckpointError, OverflowError) as error:
            raise RefusedError(422, str(error)) from None


def _deadline(value: object, started: float) -> float | None:
    """The time on the clock that an option means. Raises RefusedError (422)."""
    if value is None:
        return None
    number = _number(value)
    if not 1 <= number <= LONGEST_DEADLINE:
        raise RefusedError(422, f"deadline_ms must be a number of milliseconds, 1 to {LONGEST_DEADLINE:,}")
    return started + number / 1000


def _number(value: object) -> float:
    if isinstance(value, str) and not (value.isascii() and "_" not in value):  # which Python's numbers may have
        return math.nan
    try:
        return float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def _top(value: object) -> int:
    number = _number(5 if value is None else value)
    if number != number or number != int(min(number, 1e9)) or not 1 <= number <= 1000:
        raise RefusedError(422, "top must be a whole number from 1 to 1000")
    return int(number)


def _yes(value: object) -> bool:
    answers = {None: False, False: False, True: True, "false": False, "true": True}
    if not isinstance(value, (bool, str, type(None))) or value not in answers:
        raise RefusedError(422, "channels must be true or false")
    return answers[value]


def _options(query: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options from the address, and those of the body before them. Raises RefusedError (422) for unknown ones."""
    unknown = [name for name in (*query, *given) if name not in OPTIONS]
    if unknown:
        raise RefusedError(422, f"options are {', '.join(OPTIONS)}; got {quoted(unknown[0], 60)}")
    return {**query, **given}


async def _body(request: Request, take: Callable[[int], None], most: int) -> bytes:
    """The whole body. Raises RefusedError (413, 503) as soon as it is too long."""
    length = request.headers.get("content-length", "")
    too_long = RefusedError(413, f"a request has at most {most:,} bytes")
    if length.isdecimal() and int(length[:18]) > most:
        raise too_long
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RefusedError(415, "the body must not be compressed (Content-Encoding)")
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most:
            raise too_long
        take(len(chunk))
        chunks.append(chunk)
    return b"".join(chunks)


def _json(content: Any, status: int = 200) -> Response:
    return Response(json.dumps(content, separators=(",", ":")), status, media_type="application/json")


def _page(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    async def page(_: Request) -> Response:
        return Response(content, media_type=kind, headers=PAGE_HEADERS)

    return page


def _png(image: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def _told(service: Service, answer: Answer, top: int, channels: bool) -> dict[str, Any]:
    pictures: list[dict[str, Any]] = []
    for one in predictions_of(service.engine.checkpoint, answer.result, top):
        pictures.append({
            "class": one.label,
            "probability": round(one.probability, 6),
            "top": [{"class": name, "probability": round(share, 6)} for name, share in one.top],
            "macs": one.macs,
            "share_of_dense": round(one.share_of_dense, 6),
            "kept": {stage: round(share, 6) for stage, share in one.kept.items()},
        })  # fmt: skip
    if channels:
        for told, mask in zip(pictures, _channels(answer.result), strict=True):
            told["channels"] = mask
    return {"model": service.name, "budget": answer.point, "pictures": pictures}


def _channels(result: Result) -> list[dict[str, str]]:
    """For each image, gate -> a digit a channel, 1 where it ran."""
    digits = {gate: (mask + ord("0")).astype(np.uint8) for gate, mask in result.kept.items()}
    return [{gate: rows[i].tobytes().decode() for gate, rows in digits.items()} for i in range(len(result.logits))]


def _decoded(asked: Asked, size: tuple[int, int], limits: Limits) -> NDArray[np.uint8]:
    images = np.empty((len(asked.pictures), *size, 3), np.uint8)
    left = limits.pixels_together
    for number, content in enumerate(asked.pictures):
        try:
            if len(asked.pictures) > 1 and (left := left - pixels_of(content)) < 0:
                raise RefusedError(422, f"the pictures of a request have at most {limits.pixels_together:,} pixels")
            images[number] = decode_picture(content, size, limits.pixels)
        except ImageError as error:
            raise RefusedError(422, f"picture {number}: {error}") from None
        except MemoryError:
            raise RefusedError(503, "there is no memory for so large a picture now", retry=1) from None
    return images


def make_app(service: Service) -> Watch:
    """The application of a service; its lifespan warms the engine up and drains it.

    FastAPI describes the routes; it does not answer, since at each request it would look for parameters and
    dependencies that no handler here has.
    """

    @asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        beginning = asyncio.create_task(service.begin())
        yield
        await beginning
        await service.end()

    app = FastAPI(title="manidp", version=protocol.VERSION, openapi_url=None, description=describe.ABOUT,
                  servers=[{"url": "/"}])  # fmt: skip
    checkpoint, limits = service.engine.checkpoint, service.limits
    told = describe.Described(service.name, checkpoint, limits)
    size = checkpoint.preprocessing.size

    def known(request: Request) -> None:
        asked = request.path_params
        if asked["name"] != service.name or asked.get("version", protocol.VERSION) != protocol.VERSION:
            raise RefusedError(404, f"the model is {quoted(service.name, 60)}, version {protocol.VERSION}")

    @app.post("/v2/models/{name}/infer", **told.infer)
    @app.post("/v2/models/{name}/versions/{version}/infer", **describe.versioned(told.infer))
    async def infer(request: Request) -> Response:
        started = request.scope["manidp"]["started"]
        known(request)
        batcher = service.working()
        with service.held.room() as take:
            body = await _body(request, take, limits.body)
            length = request.headers.get(protocol.LENGTH)
            json_size = len(body) if length is None else 0
            asked: protocol.Infer = await service.aside(
                json_size, protocol.parse_infer, body, length, checkpoint, limits
            )
            point = service.asked_point(asked.options.get("budget"))
            until = _deadline(asked.options.get("deadline_ms"), started)
            with batcher.place(len(asked.images), point, until) as place:
                answer = await place.compute(asked.images)
        request.scope["manidp"].update(pictures=len(asked.images), budget=answer.point)
        content, head = protocol.format_infer(asked, service.name, checkpoint, answer.result, answer.point)
        if head == len(content):
            return Response(content, media_type="application/json")
        return Response(content, media_type="application/octet-stream", headers={protocol.LENGTH: str(head)})

    @app.post("/v1/classify", **told.classify)
    async def classify(request: Request) -> Response:
        started = request.scope["manidp"]["started"]
        batcher = service.working()
        with service.held.room() as take:
            body = await _body(request, take, limits.body)
            kind = request.headers.get("content-type", "")
            asked: Asked = await service.aside(len(body), asked_of, kind, body, limits)
            del body
            options = _options(request.query_params, asked.options)
            top, channels = _top(options.get("top")), _yes(options.get("channels"))
            point = service.asked_point(options.get("budget"))
            with batcher.place(len(asked.pictures), point, _deadline(options.get("deadline_ms"), started)) as place:
                images = await asyncio.get_running_loop().run_in_executor(
                    service.threads, _decoded, asked, size, limits
                )
                answer = await place.compute(images)
        request.scope["manidp"].update(pictures=len(images), budget=answer.point)
        return _json(_told(service, answer, top, channels))

    @app.get("/v1/model", **told.model)
    async def model(_: Request) -> Response:
        chosen = [one.name for one in service.ladder]
        return _json({
            "name": service.name,
            "classes": list(checkpoint.classes),
            "size": list(size),
            "dense_macs": service.dense,
            "target_ms": service.target * 1000,
            "points": [
                {"name": one.name, "macs": one.macs, "accuracy": one.accuracy, "on_dial": one.name in chosen}
                for one in checkpoint.every_point
            ],
            "samples": len(service.samples),
            "limits": {"body": limits.body, "pictures": limits.pictures, "pixels": limits.pixels},
        })  # fmt: skip

    @app.get("/v1/samples/{number}", **told.samples)
    async def samples(request: Request) -> Response:
        number = request.path_params["number"]
        if number not in service.samples:
            raise RefusedError(404, f"test images are 0 to {len(service.samples) - 1}")
        return Response(service.samples[number], media_type="image/png")

    for path, (name, kind) in PAGE.items():
        content = resources.files("manidp.serve").joinpath("page", name).read_bytes()
        app.add_api_route(path, _page(content, kind), include_in_schema=False)

    @app.get("/v1/status", **told.status)
    async def status(_: Request) -> Response:
        batcher = service.batcher
        last = sorted(service.recent)
        return _json({
            "ready": service.ready,
            "budget": service.in_force.name,
            "queued": batcher.queued if batcher else 0,
            "wait_ms": round(1000 * batcher.wait(batcher.dial.level), 3) if batcher else 0.0,
            "images_per_second": round(batcher.rate.at(time.monotonic()), 1) if batcher else 0.0,
            "p50_ms": round(1000 * last[len(last) // 2], 3) if last else None,
            "p99_ms": round(1000 * last[len(last) * 99 // 100], 3) if last else None,
        })  # fmt: skip

    @app.get("/metrics", **told.metrics)
    async def metrics(_: Request) -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    def when_ready() -> Response:
        if not service.ready:
            raise RefusedError(503, "not ready", retry=1)
        return _json({"ready": True})

    @app.get("/v2/health/live", **told.live)
    async def live(_: Request) -> Response:
        return _json({"live": True})

    @app.get("/v2/health/ready", **told.ready)
    async def ready(_: Request) -> Response:
        return when_ready()

    @app.get("/v2", **told.server)
    async def server(_: Request) -> Response:
        from manidp import __version__

        return _json({"name": "manidp", "version": __version__, "extensions": protocol.EXTENSIONS})

    @app.get("/v2/models/{name}", **told.metadata)
    @app.get("/v2/models/{name}/versions/{version}", **describe.versioned(told.metadata))
    async def metadata(request: Request) -> Response:
        known(request)
        return _json(protocol.metadata(service.name, checkpoint))

    @app.get("/v2/models/{name}/ready", **told.model_ready)
    @app.get("/v2/models/{name}/versions/{version}/ready", **describe.versioned(told.model_ready))
    async def model_ready(request: Request) -> Response:
        known(request)
        return when_ready()

    document = json.dumps(app.openapi() | {"components": {"schemas": told.schemas}}).encode()
    app.add_api_route("/openapi.json", _page(document, "application/json"), include_in_schema=False)
    routes = [_Route(one.path, one.endpoint, one.methods or ()) for one in app.routes if isinstance(one, APIRoute)]
    return Watch(Router(routes, redirect_slashes=False, lifespan=lifespan), service)


class _Route(Route):
    """A handler at its path; what it raises is for Watch."""

    def __init__(self, path: str, endpoint: Callable[[Request], Awaitable[Response]], methods: Collection[str]) -> None:
        super().__init__(path, endpoint)
        self._only = frozenset(methods)  # GET without HEAD, as described

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        scope["manidp"]["route"] = self.path
        if scope["method"] not in self._only:
            raise HTTPException(405, headers={"allow": ", ".join(self._only)})
        answer = await self.endpoint(Request(scope, receive))
        await answer(scope, receive, send)


def _error(status: int, message: str, retry: int | None = None) -> Response:
    answer = _json({"error": message}, status)
    if retry is not None:
        answer.headers["retry-after"] = str(retry)
    return answer


class Watch:
    """Around all routes: the time limit, the log, metrics, and an answer whatever happens.

    An answer to a request that was not read to its end, and any answer while the server drains, closes its connection.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service, started = self._service, time.monotonic()
        scope["app"] = self  # so that the router raises HTTPException for a path that it does not know
        entry = scope["manidp"] = {"started": started}
        headers = dict(scope["headers"])
        unread = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
        status, sent = 0, False

        async def reading() -> Message:
            nonlocal unread
            message = await receive()
            unread = message["type"] == "http.request" and message.get("more_body", False)
            if message["type"] == "http.disconnect":
                raise _GoneError
            return message

        async def writing(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-content-type-options", b"nosniff")]
                if unread or service.draining:
                    own.append((b"connection", b"close"))
                message = {**message, "headers": [*message["headers"], *own]}
            elif not message.get("more_body", False):
                sent = True
            await send(message)

        fault = None
        try:
            async with asyncio.timeout(service.limits.seconds):
                await self._answer(scope, reading, writing)
        except _GoneError:
            fault = "the client has gone"
        except TimeoutError:
            fault = "timeout"
            if not status:
                late = RefusedError(408, "the request took too long to come") if unread else RefusedError(
                    503, "the request took too long to answer", retry=1)  # fmt: skip
                await _error(late.status, late.message, late.retry)(scope, receive, writing)
        except Exception:
            fault = traceback.format_exc(limit=-6)
            if not status:
                await _error(500, "internal error; the server's log has more")(scope, receive, writing)
        finally:
            seconds = time.monotonic() - started
            route = entry.get("route", "other")
            service.metrics.answered(route, status, seconds)
            if status == 200 and "budget" in entry:
                service.recent.append(seconds)
            if service.log:
                client = scope.get("client")
                service.log.line(
                    time=round(time.time(), 3), client=client[0] if client else None, method=scope["method"],
                    route=route, status=status, ms=round(1000 * seconds, 3),
                    **{key: entry[key] for key in ("pictures", "budget") if key in entry},
                    **({"fault": fault} if fault else {}),
                )  # fmt: skip
        if not sent and status:  # a client that does not read its answer
            raise _GoneError

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The answer of the route, or what it, or the lack of one, was refused with."""
        try:
            await self._app(scope, receive, send)
        except RefusedError as error:
            await _error(error.status, error.message, error.retry)(scope, receive, send)
        except HTTPException as error:
            refusal = _error(error.status_code, error.detail)
            refusal.headers.update(error.headers or {})
            await refusal(scope, receive, send)


class _GoneError(Exception):
    """The client closed its connection before its request ended."""
