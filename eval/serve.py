"""A page to talk to a checkpoint, and OpenAI's completions endpoint.

    pip install -c constraints.txt -e '.[serve]'
    python -m eval.serve runs/gpt2-124m              # then open http://127.0.0.1:8000
    python -m eval.serve hf:gpt2 --port 8001

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    client.completions.create(model="gpt2-124m", prompt="In the beginning", stream=True)

    GET  /                  the page (eval/serve.html), which needs nothing from anywhere else
    GET  /v1/models         the one model there is
    POST /v1/completions    eval/completion_request.py says what may be asked

Listens on this machine alone unless --host says otherwise: there is no password. Requests take
turns, a token each, so that a long one keeps nobody waiting; whoever goes away is not computed for
any longer. What is refused gets one line: {"error": {"message": ...}}.
"""

import asyncio
import ipaddress
import json
import re
import socket
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from data.tokenizer import GPT2, Tokenizer
from eval.completion_request import parse_request
from eval.completions import Answer, Piece, complete
from eval.sample import load_for_sampling
from launch import cli, flags
from launch.config import ReadDtype
from launch.errors import BadInput, Failed, one_line_errors, run_command
from launch.world import autocast, choose_device, choose_dtype, keep_freed_memory
from model.gpt2 import GPT

with one_line_errors():
    try:
        import uvicorn
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.requests import Request
        from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
        from starlette.routing import Route
    except ImportError as missing:
        raise BadInput(f"serving needs starlette and uvicorn ({missing}): "
                       "pip install -c constraints.txt -e '.[serve]'") from None

PAGE = Path(__file__).with_name("serve.html")
# The page runs its own script and talks to this server; nothing else may load, and no other page
# may frame it.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src "
    "'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
MOST_BYTES = 2**20  # of a request
AT_ONCE = 4  # requests that take turns; each keeps its keys and values in memory
MOST_WAITING = 64  # requests that wait for one of these to end
GOODBYE = 2  # seconds that Ctrl-C leaves to running requests


class Service:
    """One model, asked by many."""

    def __init__(
        self, model: GPT, name: str, dtype: str, own_hosts: re.Pattern | None,
        tokenizer: Tokenizer = GPT2,
    ) -> None:
        """own_hosts: what a request's Host header has to be; None: anything."""
        self.tokenizer = tokenizer
        self.model, self.name, self.dtype, self.own_hosts = model, name, dtype, own_hosts
        self.device = model.wte.weight.device
        self.started = int(time.time())
        self.present = 0  # requests that are here, waiting or in turn
        self.places = asyncio.Semaphore(AT_ONCE)
        self.thread = ThreadPoolExecutor(1)  # the only one that touches the model: the queue

    def app(self) -> Starlette:
        """What uvicorn serves."""
        return Starlette(
            routes=[
                Route("/", self.page),
                Route("/v1/models", self.models),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ],
            exception_handlers={
                HTTPException: refused, BadInput: failed, torch.OutOfMemoryError: failed,
                Exception: failed,
            },
        )

    async def page(self, request: Request) -> Response:
        """The page."""
        self.check_host(request)
        return HTMLResponse(PAGE.read_bytes(), headers=PAGE_HEADERS)

    async def models(self, request: Request) -> Response:
        """The list of models: this one. max_model_len, its context, is vLLM's."""
        self.check_host(request)
        model = {"id": self.name, "object": "model", "created": self.started, "owned_by": "local",
                 "max_model_len": self.model.config.n_ctx}
        return JSONResponse({"object": "list", "data": [model]})

    async def completions(self, request: Request) -> Response:
        """One answer, or with "stream" its events."""
        self.check_host(request)
        if self.present >= AT_ONCE + MOST_WAITING:
            raise HTTPException(503, f"{self.present} requests are here already: ask again later")
        body = await read_json(request)
        asked = await asyncio.to_thread(
            parse_request, body, self.model.config, self.tokenizer)
        if body.get("model") not in (None, self.name):
            raise HTTPException(404, f"no model is called {str(body['model'])[:60]!r}: there is "
                                     f"{self.name}")
        answer = Answer(asked, self.name)
        steps = self.take_turns(complete(self.model, asked), request)
        if asked.stream:
            headers = {"Cache-Control": "no-store"}
            return StreamingResponse(events(answer, steps), 200, headers, "text/event-stream")
        async for pieces in steps:
            answer.add(pieces)
        return JSONResponse(answer.whole())

    async def take_turns(
        self, steps: Iterator[list[Piece]], request: Request
    ) -> AsyncIterator[list[Piece]]:
        """The steps of a request, in turn with those of others; ends where nobody listens."""
        self.present += 1
        try:
            async with self.places:
                while not await request.is_disconnected():
                    pieces = await asyncio.get_running_loop().run_in_executor(
                        self.thread, self.step, steps
                    )
                    if pieces is None:
                        return
                    yield pieces
        finally:
            self.present -= 1
            self.thread.submit(steps.close)  # type: ignore[attr-defined]  # after a running step

    def step(self, steps: Iterator[list[Piece]]) -> list[Piece] | None:
        """One step of the model, in its own thread; None at the end."""
        with autocast(self.device, self.dtype):
            return next(steps, None)

    def check_host(self, request: Request) -> None:
        """Refuses a page from elsewhere whose name was made to lead here (DNS rebinding)."""
        if self.own_hosts and not self.own_hosts.fullmatch(request.headers.get("host", "")):
            raise HTTPException(403, "this server is asked as localhost; --host lets others in")


async def events(answer: Answer, steps: AsyncIterator[list[Piece]]) -> AsyncIterator[str]:
    """The answer as server-sent events. An error ends it, as an event of its own."""
    try:
        async for pieces in steps:
            chunk = answer.chunk(pieces)
            if chunk:
                yield event(chunk)
        if answer.asked.include_usage:
            yield event(answer.head | {"choices": [], "usage": answer.usage()})
    except (BadInput, torch.OutOfMemoryError) as error:
        yield event(error_json(*what_failed(error)))
        return
    finally:
        await steps.aclose()  # type: ignore[attr-defined]
    yield "data: [DONE]\n\n"


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, allow_nan=False)}\n\n"


async def read_json(request: Request) -> Any:
    """The body of a request. Raises HTTPException for one that is no JSON, or too long."""
    # A page from elsewhere can't send this type without asking first, and nobody answers it.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "expected Content-Type: application/json")
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise HTTPException(413, f"a request has up to {MOST_BYTES:,} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the body is no JSON") from None


# ---- what goes wrong ----


def what_failed(error: Exception) -> tuple[int, str]:
    """The status and the line for an error."""
    if isinstance(error, torch.OutOfMemoryError):
        return 503, "the GPU is full: ask for fewer samples or tokens"
    if isinstance(error, Failed):  # the request was right
        return 500, str(error)
    if isinstance(error, BadInput):
        return 400, str(error)
    return 500, "the server failed; its console says why"


def error_json(status: int, line: str) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": line, "type": kind, "param": None, "code": status}}


async def failed(_request: Request, error: Exception) -> Response:
    """The answer where something was raised."""
    status, line = what_failed(error)
    return JSONResponse(error_json(status, line), status)


async def refused(_request: Request, error: Exception) -> Response:
    """The answer to what isn't done at all."""
    assert isinstance(error, HTTPException)
    line = error.detail
    if line == "Not Found":
        line = "there are /, /v1/models and /v1/completions; a base model knows no chat"
    return JSONResponse(error_json(error.status_code, line), error.status_code, error.headers)


# ---- start ----


def model_name(checkpoint: str) -> str:
    """What the model is called: its run or folder, without the way there."""
    path = Path(checkpoint.removeprefix("hf:")).resolve()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.name


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes a free one. Raises BadInput where it can't."""
    cli.within("port", port, 0, 65535)
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise BadInput(f"can't listen on {host}:{port}: {error.strerror}; --port names another "
                       "port, --host another address of this machine") from None


def own_hosts(host: str, address: str) -> re.Pattern | None:
    """The Host headers of requests that were meant for a server on loopback; None elsewhere."""
    if not ipaddress.ip_address(address).is_loopback:
        return None
    names = ["localhost", "127.0.0.1", "[::1]", host]  # any port: it may be forwarded
    return re.compile(rf"({'|'.join(map(re.escape, names))})(:\d+)?", re.IGNORECASE)


def main(
    checkpoint: Annotated[str, tyro.conf.Positional] = "",
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: ReadDtype = "auto",
) -> None:
    """Serves a page to talk to a checkpoint, and OpenAI's completions endpoint.

    Args:
        checkpoint: A checkpoint folder, a run folder (its newest checkpoint), or hf:DIR.
        host: Address to listen on; 0.0.0.0 for every machine that can reach this one.
        port: Port to listen on.
        dtype: Number format of the matrices and their products; int8: of the matrices, on a CPU.
    """
    if not checkpoint:
        raise BadInput("which checkpoint? python -m eval.serve CHECKPOINT")
    with listen(host, port) as sock:
        address, port = sock.getsockname()[:2]
        device = choose_device()
        keep_freed_memory()
        dtype_name = choose_dtype(dtype, device)
        model, tokenizer = load_for_sampling(checkpoint, dtype, device, several=True)
        name, hosts = model_name(checkpoint), own_hosts(host, address)
        shown = f"[{host}]" if ":" in host else host
        if hosts is None:
            print(f"warning: whoever can reach {shown}:{port} can ask this model, without a "
                  "password")
        print(f"{name} on http://{shown}:{port}; for OpenAI's clients http://{shown}:{port}/v1; "
              "Ctrl-C ends it", flush=True)
        app = Service(model, name, dtype_name, hosts, tokenizer).app()
        config = uvicorn.Config(app, log_level="warning", lifespan="off",
                                timeout_graceful_shutdown=GOODBYE)
        uvicorn.Server(config).run(sockets=[sock])


if __name__ == "__main__":
    run_command(lambda: flags.parse(main))
