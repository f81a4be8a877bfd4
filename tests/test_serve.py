"""The OpenAI-compatible server, asked with OpenAI's client."""

import asyncio
import functools
import json
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx2 as httpx
import openai
import pytest
import uvicorn
from conftest import EXAMPLE, GOLDEN, ROOT, assert_one_error

from mindrlhf import config
from mindrlhf.cli import UserError
from mindrlhf.inference.engine import Answer
from mindrlhf.inference.sampling import Sampling
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
from mindrlhf.serve import protocol, routes
from mindrlhf.serve.worker import TooManyRequests, Update, Worker

KEY = "secret"
CACHE = (
    "{seq_length: 96, max_decode_length: 16, use_past: True, is_dynamic: True, "
    "use_flash_attention: True, block_size: 16, num_blocks: 48}"
)


def start(golden, yaml, *options):
    """A running server: process, address and lines that it has printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mindrlhf.serve", str(yaml), "--port", "0", *options]
        + ["--load_checkpoint", str(golden.checkpoint), "--vocab_file", str(golden.tokenizer)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    line = process.stdout.readline()
    assert "http://127.0.0.1:" in line, line
    address = line.split("http://")[1].split("/")[0]
    return SimpleNamespace(process=process, address=address, line=line)


@pytest.fixture(scope="module")
def yaml(golden):
    path = golden.folder / "serve.yaml"
    path.write_text(f"base_config: {golden.predict}\nmodel: {{model_config: {CACHE}}}\n")
    return path


@pytest.fixture(scope="module")
def server(golden, yaml):
    """Eight answers at once, four may wait."""
    options = ["--batch_size", "8", "--max_queue", "4", "--api_key", KEY, "--timeout", "60"]
    running = start(golden, yaml, *options)
    yield running
    running.process.kill()
    running.process.wait()


@pytest.fixture
def client(server):
    with openai.OpenAI(
        base_url=f"http://{server.address}/v1", api_key=KEY, max_retries=0, timeout=60
    ) as client:
        yield client


def ask(client, text, **options):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="golden", messages=messages, **options)


def streamed(stream):
    """Text, finish reason and usage of a stream."""
    text, reason, usage = "", None, None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return text, reason, usage


def test_answers_are_pytorchs_at_once_and_streamed(client, texts):
    for text, wanted in texts[:3]:
        response = ask(client, text)
        assert response.choices[0].message.content == wanted
        assert response.choices[0].finish_reason == "length"
        assert response.usage.completion_tokens == 16
        options = {"stream": True, "stream_options": {"include_usage": True}}
        assert streamed(ask(client, text, **options)) == (wanted, "length", response.usage)


def test_the_settings_of_a_request(client, texts):
    text, wanted = texts[3]
    short = ask(client, text, max_tokens=5).choices[0].message.content
    assert short
    assert wanted.startswith(short.rstrip("\ufffd"))
    stop = wanted[3:5]
    stopped = ask(client, text, stop=[stop]).choices[0]
    assert stopped.message.content == wanted[: wanted.index(stop)].rstrip()
    assert stopped.finish_reason == "stop"

    def several(**options):
        found = ask(client, text, n=3, temperature=1.5, **options).choices
        assert [choice.index for choice in found] == [0, 1, 2]
        return [choice.message.content for choice in found]

    assert len(set(several(seed=7))) == 3
    assert several(seed=7) == several(seed=7)
    assert several(seed=8) != several(seed=7)
    assert several() != several()
    assert several(top_p=1e-4, seed=1) == [wanted] * 3


def test_history_and_system_are_part_of_the_prompt(client, texts):
    def answer(*messages):
        turns = [{"role": role, "content": content} for role, content in messages]
        response = client.chat.completions.create(model="golden", messages=turns)
        return response.choices[0].message.content, response.usage.prompt_tokens

    text, wanted = texts[1]
    assert answer(("user", [{"type": "text", "text": text}])) == (wanted, 12)
    assert answer(("system", "x"), ("user", text)) != (wanted, 12)
    assert answer(("developer", "x"), ("user", text)) == answer(("system", "x"), ("user", text))
    with_tag = answer(("user", "a"), ("assistant", "<|user|>"), ("user", text))
    assert with_tag[1] > answer(("user", "a"), ("assistant", "b"), ("user", text))[1] + 4


def test_models_and_health(client, server):
    assert [model.id for model in client.models.list()] == ["golden"]
    assert client.models.retrieve("golden").owned_by == "mindrlhf"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist; this server has"):
        client.models.retrieve("other")
    health = httpx.get(f"http://{server.address}/health").json()
    assert health == {"status": "ok", "model": "golden", "answers": 0, "most_answers": 12}


@pytest.mark.parametrize(
    ("options", "error", "part"),
    [
        ({"temperature": 3}, openai.BadRequestError, "'temperature' is 3; expected a number"),
        ({"max_tokens": 0}, openai.BadRequestError, "an integer of at least 1"),
        ({"n": 17}, openai.BadRequestError, "an integer from 1 to 16"),
        ({"stop": ["a"] * 5}, openai.BadRequestError, "a list of at most 4"),
        ({"frequency_penalty": 1}, openai.BadRequestError, "'frequency_penalty' is not supported"),
        ({"logprobs": True}, openai.BadRequestError, "'logprobs' is not supported"),
        ({"extra_body": {"tempratur": 1}}, openai.BadRequestError, "'tempratur' is no field"),
        ({"model": "gpt-4"}, openai.NotFoundError, "'gpt-4' does not exist"),
        ({"messages": []}, openai.BadRequestError, "'messages' is \\[\\]"),
        ({"messages": [{"role": "x", "content": ""}]}, openai.BadRequestError, r"\[0\].role"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, openai.BadRequestError, "last"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, openai.BadRequestError, "seq_len"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            openai.BadRequestError,
            "parts of the type text",
        ),
    ],
)
def test_wrong_requests_get_an_error_of_openais_form(client, options, error, part):
    request = {"model": "golden", "messages": [{"role": "user", "content": "a"}], **options}
    with pytest.raises(error, match=part) as caught:
        client.chat.completions.create(**request)
    assert caught.value.body["type"] == "invalid_request_error"
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_the_key_is_needed(server):
    for key in ("wrong", "ключ"):
        response = httpx.get(
            f"http://{server.address}/v1/models",
            headers={"Authorization": f"Bearer {key}".encode()},
        )
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    client = openai.OpenAI(base_url=f"http://{server.address}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        ask(client, "a")


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[1]", 400),
        ("POST", "/v1/chat/completions", b"\xff", 400),
        ("POST", "/v1/chat/completions", b"[" * 100_000, 400),
        ("POST", "/v1/chat/completions", b" " * (2 << 20), 413),
        ("GET", "/v1/chat/completions", b"", 405),
        ("GET", "/nothing", b"", 404),
    ],
)
def test_malformed_requests(server, method, path, content, status):
    response = httpx.request(
        method,
        f"http://{server.address}{path}",
        content=content,
        headers={"Authorization": f"Bearer {KEY}"},
    )
    assert response.status_code == status
    assert response.json()["error"]["message"]


def answers_left(server, seconds=5):
    """Answers that are being generated, once there are none or the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        count = httpx.get(f"http://{server.address}/health").json()["answers"]
        if not count or time.monotonic() > deadline:
            return count
        time.sleep(0.05)


def resident(process):
    """Resident memory of a process, in kB."""
    with open(f"/proc/{process.pid}/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def load(server, texts, requests):
    """Send requests from 16 clients, again after a 429; return how many ended how."""
    counts, lock, problems = {}, threading.Lock(), []
    local = threading.local()

    def answered(number):
        """What became of a request; None: the queue was full."""
        if not hasattr(local, "client"):
            local.client = openai.OpenAI(
                base_url=f"http://{server.address}/v1", api_key=KEY, max_retries=0, timeout=60
            )
        client = local.client
        kind = ("whole", "stream", "whole", "leaves", "malformed")[number % 5]
        text, wanted = random.Random(number).choice(texts)
        try:
            if kind == "malformed":
                with pytest.raises(openai.BadRequestError):
                    ask(client, text, temperature="hot")
            elif kind == "leaves":
                with ask(client, text, stream=True, max_tokens=60) as stream:
                    next(iter(stream))
            elif kind == "stream":
                found = streamed(ask(client, text, stream=True))[0]
            else:
                found = ask(client, text).choices[0].message.content
            if kind in ("whole", "stream") and found != wanted:
                problems.append((number, text, found, wanted))
        except openai.RateLimitError:
            return None
        return kind

    def one(number):
        while (kind := answered(number)) is None:
            time.sleep(0.1)
        with lock:
            counts[kind] = counts.get(kind, 0) + 1

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(requests)))
    assert not problems
    return counts


def test_200_requests_of_16_clients(server, texts):
    """Each well-formed one is answered right, at last; nothing stays behind."""
    load(server, texts, 100)  # buffers of the first requests are no leak
    before = resident(server.process)
    counts = load(server, texts, 200)
    assert counts == {"whole": 80, "stream": 40, "leaves": 40, "malformed": 40}
    assert answers_left(server) == 0
    assert resident(server.process) < 1.05 * before


def test_beyond_the_queue_requests_get_429(client, server):
    client.chat.completions.create(  # 12 answers are the most
        model="golden", messages=[{"role": "user", "content": "a"}], n=12, max_tokens=2
    )
    with pytest.raises(openai.BadRequestError, match="at most 12 answers"):
        ask(client, "a", n=13)
    stream = ask(client, "a", n=12, stream=True)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError, match="12 answers"):
        ask(client, "a")
    for _ in stream:
        pass


def test_a_client_that_leaves_ends_its_generation(golden, yaml, tmp_path):
    """Answers of thousands of tokens: they would take minutes. Ctrl-C then ends the server."""
    longer = tmp_path / "long.yaml"
    longer.write_text(
        f"base_config: {yaml}\nmodel: {{model_config: {{seq_length: 8192, num_blocks: 4096}}}}\n"
    )
    server = start(golden, longer)
    try:
        with openai.OpenAI(
            base_url=f"http://{server.address}/v1", api_key="x", max_retries=0
        ) as client:
            options = {"n": 4, "temperature": 2.0, "max_tokens": 8000}
            with ask(client, "a", stream=True, **options) as stream:
                iterator = iter(stream)
                while not next(iterator).choices[0].delta.content:
                    pass
                assert answers_left(server, 0) > 0
            assert answers_left(server) == 0
            with pytest.raises(openai.APITimeoutError):
                ask(client, "a", timeout=1.5, **options)
            assert answers_left(server) == 0
            with ask(client, "a", stream=True, **options) as stream:
                next(iter(stream))
                server.process.send_signal(signal.SIGINT)
                start_time = time.monotonic()
                assert server.process.wait(20) == 0
                assert time.monotonic() - start_time < 5
    finally:
        server.process.kill()
        server.process.wait()


def test_what_cannot_be_served_is_one_line(golden, yaml):
    def run(
        *arguments, code="import runpy; runpy.run_module('mindrlhf.serve', run_name='__main__')"
    ):
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
        )

    base = [yaml, "--load_checkpoint", golden.checkpoint, "--vocab_file", golden.tokenizer]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run(*base, "--port", taken.getsockname()[1])
    assert_one_error(result, "cannot listen there", "give another --port")
    result = run(
        *base,
        code="import sys, importlib.util as u; f = u.find_spec; "
        "u.find_spec = lambda name, *a: None if name == 'uvicorn' else f(name, *a); "
        "from mindrlhf import cli; from mindrlhf.serve.__main__ import main; cli.run_command(main)",
    )
    assert_one_error(result, "needs uvicorn", "pip install -r requirements-serve.txt")
    result = run(EXAMPLE / "finetune_glm4_tiny.yaml")
    assert_one_error(result, "run_mode is finetune, but this command needs predict")


# without a server


class Engine:
    """Fails at its second step."""

    batch_size = 1

    def __init__(self):
        self.steps, self.ended = 0, []

    def submit(self, answer):
        pass

    def cancel(self, answer):
        self.ended.append(answer)

    def step(self):
        self.steps += 1
        if self.steps == 2:
            raise RuntimeError("a kernel failed")
        return []


def test_a_failure_of_the_model_reaches_the_requests_and_the_server_goes_on(capsys):
    engine, found = Engine(), []
    worker = Worker(engine, 1)
    answers = [Answer([1], Sampling(1), number) for number in range(2)]
    worker.submit(answers, found.append)
    with pytest.raises(TooManyRequests):
        worker.submit([Answer([1], Sampling(1))], found.append)
    worker.run(lambda: engine.steps > 3)
    assert [(update.answer, update.finish_reason) for update in found] == [
        (answer, "error") for answer in answers
    ]
    assert engine.ended == answers
    assert worker.load == 0
    assert "a kernel failed" in capsys.readouterr().err


def test_a_request_that_fails_or_takes_too_long_ends(monkeypatch):
    monkeypatch.setattr(routes, "LOOK", 0.01)

    async def wait(update, deadline):
        events = asyncio.Queue()
        if update:
            events.put_nowait(update)
        return await routes.next_event(events, deadline)

    answer, later = Answer([1], Sampling(1)), time.monotonic() + 60
    assert asyncio.run(wait(None, later)) is None
    assert asyncio.run(wait(Update(answer, "a", None), later)).piece == "a"
    for update, deadline, status in ((None, 0, 504), (Update(answer, "", "error"), later, 500)):
        with pytest.raises(protocol.ApiError) as caught:
            asyncio.run(wait(update, deadline))
        assert caught.value.status == status


TOKENIZER = functools.cache(lambda: Glm4Tokenizer(GOLDEN / "tokenizer.model"))


def parse(body):
    settings = config.load_settings(EXAMPLE / "predict_glm4_tiny.yaml", run_mode="predict")
    return protocol.parse_request(
        body, model="m", tokenizer=TOKENIZER(), settings=settings, system=None
    )


def test_what_a_request_leaves_out_follows_the_yaml():
    plain = {"messages": [{"role": "user", "content": "a"}], "user": "me", "logprobs": False}
    found = parse(plain).answers[0].sampling
    assert (found.is_argmax, found.max_new_tokens) == (True, 128)
    assert not parse({**plain, "top_p": 0.5}).answers[0].sampling.is_greedy
    assert parse({**plain, "seed": -1}).answers[0].sampling.seed == 2**63 - 1
    assert parse({**plain, "temperature": None, "stop": None}).answers[0].stop == []
    assert parse({**plain, "max_completion_tokens": 7}).answers[0].sampling.max_new_tokens == 7


def test_random_requests_are_answered_or_refused():
    values = [None, 0, -1, 1e400, float("nan"), "", "x", [], {}, [{}], True, {"role": "user"}]
    choose = random.Random(0).choice
    for _ in range(300):
        body = {name: choose(values) for name in (*protocol.FIELDS, *protocol.UNSUPPORTED)
                if choose((True, False, False))}  # fmt: skip
        status = 200
        try:
            parse(body)
        except protocol.ApiError as error:
            status = error.status
            json.dumps(error.body)
        assert status in (200, 400, 404)


def test_connections_without_a_request_are_closed(monkeypatch):
    """Silent ones, half a header, half a second header; but none whose answer takes long."""
    monkeypatch.setattr(routes, "HEADER_SECONDS", 0.3)

    async def app(scope, receive, send):
        assert scope["type"] == "http"
        await asyncio.sleep(1.2 if scope["path"] == "/slow" else 0)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http=routes.TimedProtocol, lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    request = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n"
    sent = [b"", b"GET / HTTP/1.1\r\nHost", request % b"/" + b"GET / HT", request % b"/slow"]
    sockets = [socket.create_connection(listener.getsockname()) for _ in sent]
    received = []
    for each, text in zip(sockets, sent):
        each.sendall(text)
    for each in sockets:
        each.settimeout(20)
        with each, each.makefile("rb") as file:
            received.append(file.read())  # until the server closes
    server.should_exit = True
    thread.join(20)
    assert [text.count(b"204 No Content") for text in received] == [0, 0, 1, 1]


def test_more_answers_than_the_server_takes_are_a_wrong_request():
    service = SimpleNamespace(worker=SimpleNamespace(most=4))
    with pytest.raises(protocol.ApiError, match="'n' is 5; this server takes at most 4") as error:
        routes.start(SimpleNamespace(answers=[None] * 5), service)
    assert (error.value.status, error.value.param) == (400, "n")


def test_fields_that_clients_send_without_meaning():
    settings = config.load_settings(EXAMPLE / "predict_glm4_tiny.yaml", run_mode="predict")
    body = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None},
            {"role": "user", "content": "b"},
        ],
        **{"tools": [], "tool_choice": "auto", "stop": "", "repetition_penalty": 1e-6},
    }
    parse = functools.partial(
        protocol.parse_request,
        model="golden",
        tokenizer=Glm4Tokenizer(GOLDEN / "tokenizer.model"),
        settings=settings,
        system=None,
    )
    assert parse(body).answers[0].stop == []
    for wrong in ({"repetition_penalty": 1e-320}, {"stop": [""]}):
        with pytest.raises(protocol.ApiError):
            parse({**body, **wrong})


def test_a_host_that_is_no_name_is_one_line():
    from mindrlhf.serve.__main__ import listen

    for name in ("a..b", "a" * 70):
        with pytest.raises(UserError, match="cannot listen there"):
            listen(name, 0)
