"""An OpenAI-compatible server for a trained model: python -m mindrlhf.serve CONFIG."""
from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindrlhf import cli, config
from mindrlhf.cli import UserError

EXAMPLE = """\
  python -m mindrlhf.serve predict_glm4_9b.yaml --load_checkpoint merged.ckpt \\
    --vocab_file tokenizer.model --port 8000"""
EXTRAS = ("fastapi", "uvicorn")
SHUTDOWN = 1  # seconds that open connections get


def parser() -> cli.Parser:
    """The command line."""
    parse = cli.Parser(
        "Serve a trained model with OpenAI's API: POST /v1/chat/completions, GET /v1/models, GET "
        "/health. What a request leaves out follows the YAML. Ctrl-C ends the server.", EXAMPLE)
    parse.add_argument("config", metavar="CONFIG", help="YAML with run_mode predict")
    parse.add_argument("--load_checkpoint", metavar="PATH", help="the weights")
    parse.add_argument("--vocab_file", metavar="FILE", help="tokenizer.model of the model")
    parse.add_argument("--auto_trans_ckpt", type=cli.boolean, metavar="True|False",
                       help="load_checkpoint may be a folder of shards")
    parse.add_argument("--src_strategy", metavar="FOLDER",
                       help="of shards: output/strategy of the run that saved them")
    parse.add_argument("--adapter_checkpoint", metavar="PATH", help="LoRA adapters to add")
    parse.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                       help="address to listen on; 0.0.0.0: of all networks (default: "
                            "%(default)s, this machine only)")
    parse.add_argument("--port", type=port, default=8000,
                       help="0: a free one, which is printed (default: %(default)s)")
    parse.add_argument("--api_key", metavar="KEY",
                       help="that requests must have (default: $MINDRLHF_API_KEY, or none)")
    parse.add_argument("--model_name", metavar="NAME",
                       help="of the model, for clients (default: name of the checkpoint)")
    parse.add_argument("--system", metavar="TEXT",
                       help="system prompt of conversations that have none")
    parse.add_argument("--batch_size", type=cli.positive, metavar="N", default=16,
                       help="answers generated at once (default: %(default)s)")
    parse.add_argument("--max_queue", type=cli.positive, metavar="N", default=64,
                       help="answers that may wait; beyond it, requests get status 429 (default: "
                            "%(default)s)")
    parse.add_argument("--timeout", type=cli.positive, metavar="SECONDS", default=600,
                       help="longest time of a request (default: %(default)s)")
    return parse


def port(text: str) -> int:
    """argparse type for a port."""
    if text.isdecimal() and len(text) <= 5 and int(text) < 65536:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {cli.shown(text)}")


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model, and serve it until Ctrl-C."""
    arguments = parser().parse_args(argv)
    missing = [name for name in EXTRAS if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"the server needs {' and '.join(missing)}, which is not installed; run "
                        "pip install -r requirements-serve.txt")
    settings = config.load_settings(arguments.config, run_mode="predict", overrides={
        "load_checkpoint": arguments.load_checkpoint,
        "auto_trans_ckpt": arguments.auto_trans_ckpt,
        "src_strategy": arguments.src_strategy,
        "processor.tokenizer.vocab_file": arguments.vocab_file})
    from mindrlhf.inference import loading
    model = loading.open_model(settings, arguments.adapter_checkpoint)
    config.require_weights(settings)
    with listen(arguments.host, arguments.port) as listener:
        serve(loading.load_engine(model, arguments.batch_size), arguments, listener)


def listen(host: str, number: int) -> socket.socket:
    """A socket that listens on an address.

    Raises:
        UserError: the address is none of this machine, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a host
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {number}: cannot listen there ({why}); give another "
                        "--port, or an address of this machine") from None
    return listener


def serve(engine: Any, arguments: argparse.Namespace, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM. HTTP has a thread of its own, the model this one."""
    import uvicorn

    from mindrlhf.serve.routes import Service, TimedProtocol, make_app
    from mindrlhf.serve.worker import Worker
    worker = Worker(engine, arguments.max_queue)
    warm_up(engine)
    over: list[int] = []

    def end(number: int, _: Any) -> None:
        if over:  # a second Ctrl-C
            os._exit(128 + number)
        over.append(number)
    # While a graph runs, MindSpore turns a SIGINT into a SIGTERM
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    key = arguments.api_key or os.environ.get("MINDRLHF_API_KEY") or None
    name = arguments.model_name or Path(engine.settings["load_checkpoint"]).stem
    service = Service(worker, engine.settings, name, arguments.system, key, arguments.timeout,
                      int(time.time()))
    server = uvicorn.Server(uvicorn.Config(
        make_app(service), http=TimedProtocol, log_level="warning",
        timeout_graceful_shutdown=SHUTDOWN))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    if not server.started:
        raise UserError("the HTTP server did not start; see the message above")
    address = listener.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    print(f"{name}: http://{shown}:{address[1]}/v1, {engine.batch_size} answers at once, "
          f"{arguments.max_queue} may wait, {engine.room} tokens each", flush=True)
    if not key and not ipaddress.ip_address(address[0]).is_loopback:
        print("warning: other machines can use it without --api_key", file=sys.stderr, flush=True)
    worker.run(lambda: bool(over) or not thread.is_alive())
    server.should_exit = True
    thread.join(2 * SHUTDOWN)


def warm_up(engine: Any) -> None:
    """Compile the graphs before the first request comes."""
    from mindrlhf.inference.engine import Answer
    from mindrlhf.inference.sampling import Sampling
    prompt = [engine.tokenizer.special["<|user|>"], engine.tokenizer.special["<|assistant|>"]]
    for _ in engine.run([Answer(prompt, Sampling(2))]):
        pass


if __name__ == "__main__":
    cli.run_command(main)
    sys.stdout.flush()
    os._exit(0)  # MindSpore takes seconds to clean up
