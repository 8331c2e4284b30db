"""Serving: OpenAI's client and a browser get what the model says, others one line."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
import requests
import torch

pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra `serve`)")
pytest.importorskip("openai", reason="openai is not installed (extra `dev`)")

import openai
import uvicorn

from data.tokenizer import encode
from eval import serve
from eval.completion_request import parse_request
from eval.completions import complete
from launch.errors import BadInput
from model.convert import write_ours
from model.gpt2 import GPT
from tests.browser import Browser, find_browser
from tests.running import CONFIG, ROOT, environment

LIMIT = 60  # seconds for what takes none


class Serving:
    """A server in a thread of this process."""

    def __init__(self, service: serve.Service, host: str = "127.0.0.1") -> None:
        self.service = service
        self.socket = serve.listen(host, 0)
        self.address = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(service.app(), log_level="critical",
                                                    lifespan="off"))
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        self.client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0)

    def close(self) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join()
        self.service.thread.shutdown()
        self.socket.close()

    def post(self, body, **headers) -> requests.Response:
        headers = {"Content-Type": "application/json", "Connection": "close"} | headers
        data = body if isinstance(body, bytes) else json.dumps(body)
        return requests.post(f"{self.address}/v1/completions", data, headers=headers,
                             timeout=LIMIT)


def make_service(model: GPT) -> serve.Service:
    return serve.Service(model, "tiny", "fp64", serve.own_hosts("127.0.0.1", "127.0.0.1"))


@pytest.fixture(scope="module")
def serving():
    torch.manual_seed(0)
    with closing(Serving(make_service(GPT(CONFIG).double()))) as serving:
        yield serving


def test_openais_client_lists_the_model_and_gets_its_text(serving):
    assert [model.id for model in serving.client.models.list()] == ["tiny"]
    asked = dict(model="tiny", prompt="In the beginning", max_tokens=8, seed=5, n=2)
    whole = serving.client.completions.create(**asked, logprobs=1)
    request = parse_request(asked, CONFIG)
    expected = ["", ""]
    for pieces in complete(serving.service.model, request):
        for piece in pieces:
            expected[piece.choice] += "".join(token.text for token in piece.tokens)
    assert [choice.text for choice in whole.choices] == expected
    assert whole.usage.completion_tokens == 16
    assert len(whole.choices[0].logprobs.token_logprobs) == 8


def test_a_stream_adds_up_to_the_whole(serving):
    asked = dict(model="tiny", prompt="In the beginning", max_tokens=20, seed=5, n=2, echo=True,
                 logprobs=1, stop="zz")
    whole = serving.client.completions.create(**asked)
    texts, places, ends, usage = ["", ""], [[], []], [None, None], None
    for chunk in serving.client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            places[choice.index] += choice.logprobs.text_offset
            ends[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert places == [choice.logprobs.text_offset for choice in whole.choices]
    assert ends == ["length", "length"]
    assert usage == whole.usage


def test_parallel_requests_get_what_each_gets_alone(serving):
    """More than take turns at once, of different lengths."""
    asked = [dict(model="tiny", prompt=prompt, max_tokens=length, seed=length)
             for length, prompt in enumerate(["a", "b c", "In the beginning"] * 3, 1)]
    assert len(asked) > serve.AT_ONCE
    alone = [serving.client.completions.create(**one).choices for one in asked]

    async def together():
        async with openai.AsyncOpenAI(base_url=f"{serving.address}/v1", api_key="-") as client:
            return await asyncio.gather(*(client.completions.create(**one) for one in asked))

    assert [made.choices for made in asyncio.run(together())] == alone


def test_a_short_request_passes_a_long_one(serving):
    """They take turns: the long one is still being drawn when the short one has its answer."""
    long = serving.client.completions.create(model="tiny", prompt="a", max_tokens=2048, stream=True)
    with long:
        next(iter(long))
        serving.client.completions.create(model="tiny", prompt="b", max_tokens=3)
        assert serving.service.present == 1


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_is_not_computed_for_any_longer(model, monkeypatch, stream):
    """The model stands still after three steps until the client has gone, and then hardly moves."""
    steps, at_three, gone, over = [], threading.Event(), threading.Event(), threading.Event()

    def watched(*arguments):
        try:
            for pieces in complete(*arguments):
                steps.append(1)
                if len(steps) == 3:
                    at_three.set()
                    assert gone.wait(LIMIT)
                yield pieces
        finally:
            over.set()

    monkeypatch.setattr(serve, "complete", watched)
    with closing(Serving(make_service(model))) as serving:
        body = {"prompt": "a", "max_tokens": 2048, "stream": stream}
        request = requests.Request("POST", f"{serving.address}/v1/completions", json=body).prepare()
        connection = raw_connection(serving, request)
        assert at_three.wait(LIMIT)
        connection.close()
        gone.set()
        assert over.wait(LIMIT)
    assert len(steps) < 1000  # it takes the server a moment to notice


def raw_connection(serving: Serving, request: requests.PreparedRequest):
    """A connection on which the request was sent, and nothing read."""
    connection = socket.create_connection(serving.socket.getsockname())
    head = ["POST /v1/completions HTTP/1.1", f"Host: {serving.address[7:]}"]
    head += [f"{name}: {value}" for name, value in request.headers.items()]
    connection.sendall("\r\n".join([*head, "", ""]).encode() + request.body)
    return connection


@pytest.mark.parametrize(
    ("body", "headers", "status", "words"),
    [
        ({"temperature": 9}, {}, 400, "temperature 9: expected a number, 0 to 2"),
        ({"model": "gpt-5"}, {}, 404, "no model is called 'gpt-5': there is tiny"),
        ({"prompt": " a" * 40}, {}, 400, "40 tokens, and the model's context is 32"),
        (b"{", {}, 400, "the body is no JSON"),
        (b"[" * 10**5, {}, 400, "the body is no JSON"),
        (b"\xff", {}, 400, "the body is no JSON"),
        (b" " * (2**20 + 1), {}, 413, "up to 1,048,576 bytes"),
        ({}, {"Content-Type": "text/plain"}, 415, "expected Content-Type: application/json"),
        ({}, {"Host": "evil.example"}, 403, "asked as localhost"),
    ],
    ids=str,
)
def test_what_is_refused_gets_one_line_of_json(serving, body, headers, status, words):
    answer = serving.post(body, **headers)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert words in error["message"]
    assert "\n" not in error["message"]


def test_other_addresses_and_methods_are_refused_too(serving):
    for address, method, status in [("/v1/chat/completions", "POST", 404), ("/../etc", "GET", 404),
                                    ("/v1/completions", "GET", 405), ("/docs", "GET", 404)]:
        answer = requests.request(method, serving.address + address, timeout=LIMIT)
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_what_breaks_is_one_line_without_a_path(model, monkeypatch):
    def broken(*_):
        raise RuntimeError(f"in {Path(__file__)}")
        yield

    monkeypatch.setattr(serve, "complete", broken)
    with closing(Serving(make_service(model))) as serving:
        answer = serving.post({})
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "the server failed; its console says why"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [(BadInput("no numbers"), 400, "no numbers"),
     (serve.Failed("no numbers"), 500, "no numbers"),
     (torch.OutOfMemoryError(str(Path(__file__))), 503, "the GPU is full: ask for fewer")],
    ids=["BadInput", "Failed", "OutOfMemoryError"],
)
def test_an_error_while_drawing_is_a_line_and_in_a_stream_an_event(
    model, monkeypatch, error, status, words
):
    def failing(*arguments):
        yield next(complete(*arguments))
        raise error

    monkeypatch.setattr(serve, "complete", failing)
    with closing(Serving(make_service(model))) as serving:
        answer = serving.post({"prompt": "a"})
        with pytest.raises(openai.APIError, match=words):
            list(serving.client.completions.create(model="tiny", prompt="a", stream=True))
    assert answer.status_code == status
    assert answer.json()["error"]["message"].startswith(words)


def test_no_more_are_let_in_than_can_wait(serving, monkeypatch):
    monkeypatch.setattr(serving.service, "present", serve.AT_ONCE + serve.MOST_WAITING)
    answer = serving.post({})
    assert answer.status_code == 503
    assert "68 requests are here already" in answer.json()["error"]["message"]


def test_names_have_no_path_and_a_checkpoint_that_of_its_run(tmp_path):
    assert serve.model_name("runs/gpt2-124m") == "gpt2-124m"
    assert serve.model_name("hf:exported/") == "exported"
    assert serve.model_name("runs/demo/checkpoints/step_00000500") == "demo"


def test_a_port_in_use_is_one_line(serving):
    with pytest.raises(BadInput, match="can't listen on 127.0.0.1:.*: .*; --port names another"):
        serve.listen("127.0.0.1", serving.socket.getsockname()[1])


def test_the_command_serves_until_it_is_interrupted(model, tmp_path):
    write_ours(model, tmp_path / "weights")
    process = subprocess.Popen(
        [sys.executable, "-m", "eval.serve", str(tmp_path / "weights"), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(),
    )
    line = process.stdout.readline()
    address = line.split()[2].rstrip(";")
    assert requests.get(f"{address}/v1/models", timeout=LIMIT).json()["data"][0]["id"] == "weights"
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert printed == ("", "interrupted\n")
    assert str(tmp_path) not in line


def test_only_loopback_asks_for_a_name():
    assert serve.own_hosts("0.0.0.0", "0.0.0.0") is None
    own = serve.own_hosts("127.0.0.1", "127.0.0.1")
    for host in ("localhost", "LOCALHOST:9000", "127.0.0.1:8000", "[::1]:8000"):
        assert own.fullmatch(host)
    for host in ("", "localhost.evil.example", "evil.example:8000", "127x0.0.1"):
        assert not own.fullmatch(host)


def test_the_page_is_one_file_that_loads_nothing(serving):
    answer = requests.get(serving.address, timeout=LIMIT)
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert "http" not in answer.text.replace("http-equiv", "")


SETTLED = """new Promise((done) => {
    const timer = setInterval(() => {
        if (model && !running) { clearInterval(timer); done(); }
    }, 10);
})"""


@pytest.mark.skipif(not find_browser(), reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_samples_and_the_likelihoods(serving, width):
    asked = dict(model="tiny", prompt="In the beginning", max_tokens=12, seed=3, n=2,
                 temperature=0.8, top_k=50)
    own = {key: value for key, value in asked.items() if key != "top_k"}
    expected = serving.client.completions.create(**own, extra_body={"top_k": 50}, echo=True)
    with Browser(width) as browser:
        browser.open(serving.address)
        browser.run(SETTLED)
        assert browser.run("document.title") == "tiny"
        fill = "".join(f"document.getElementById('{key}').value = {json.dumps(value)};"
                       for key, value in asked.items() if key != "model")
        browser.run(fill + "document.getElementById('shade').click()")
        browser.run("document.getElementById('go').click()")
        browser.run(SETTLED)
        texts = browser.run("[...document.querySelectorAll('.text')].map((t) => t.textContent)")
        assert texts == [choice.text for choice in expected.choices]
        assert browser.run("document.querySelectorAll('.prompt span').length") == 2 * len(
            encode("In the beginning"))
        # This model finds everything about equally unlikely: ln 50257 = 10.8 nats, the full shade.
        shade = browser.run("getComputedStyle(document.querySelectorAll('.text span span')[5])"
                            ".backgroundColor")
        assert "0.75" in shade
        browser.run("document.querySelectorAll('.text span span')[5].click()")
        assert "Likeliest: " in browser.run("document.querySelector('.inspect').textContent")
        # Nothing sticks out, and what is refused is shown.
        assert browser.run("document.documentElement.scrollWidth") <= width
        browser.run("document.getElementById('form').noValidate = true;"
                    "document.getElementById('n').value = 99;"
                    "document.getElementById('go').click()")
        browser.run(SETTLED)
        status = browser.run("document.getElementById('status').textContent")
        assert status == "n 99: expected a whole number, 1 to 8"
        assert browser.errors == []
        for address in browser.requests:
            assert address.startswith((serving.address, "data:"))


@pytest.mark.skipif(not find_browser(), reason="no Chromium is installed")
def test_a_browser_can_stop_what_it_asked_for(serving):
    with Browser() as browser:
        browser.open(serving.address)
        browser.run(SETTLED)
        browser.run("document.getElementById('max_tokens').value = 2048;"
                    "document.getElementById('go').click()")
        browser.run("new Promise((done) => { const timer = setInterval(() => { if (document"
                    ".querySelector('.meta')) { clearInterval(timer); done(); } }, 10); })")
        browser.run("document.getElementById('go').click()")
        browser.run(SETTLED)
        assert browser.run("document.getElementById('status').textContent").startswith("Stopped.")
        assert browser.run("document.getElementById('go').textContent") == "Generate"
