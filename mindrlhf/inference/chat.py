"""A conversation with the model in the terminal: history, streaming, commands."""
from __future__ import annotations

import os
import select
import sys
import termios
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from mindrlhf import cli
from mindrlhf.cli import UserError
from mindrlhf.inference.engine import Answer, Engine, require_room
from mindrlhf.inference.prompts import as_json
from mindrlhf.inference.sampling import Sampling
from mindrlhf.json_files import write_json
from mindrlhf.models.glm4 import template

HELP = """\
/reset         forget the conversation
/system TEXT   set the system prompt; without TEXT, remove it
/save FILE     write the conversation to a new file, as JSON
/quit          end; so does Ctrl-D. Ctrl-C stops an answer"""


def require_terminal_editor() -> None:
    """Raise UserError if there is a terminal, but not the package that edits its lines."""
    if not sys.stdin.isatty():
        return
    try:
        import prompt_toolkit  # noqa: F401
    except ImportError:
        raise UserError("--chat in a terminal needs prompt_toolkit, which is not installed; run "
                        "pip install -r requirements-serve.txt") from None


class Conversation:
    """The messages so far, and the commands that change them.

    Args:
        engine: answers.
        sampling: of every answer.
        system: the system prompt, or None.

    Attributes:
        messages: (role, text) of each turn, without the system prompt.
        is_over: whether /quit was given.
    """

    def __init__(self, engine: Engine, sampling: Sampling, system: str | None = None) -> None:
        self.engine, self.sampling, self.system = engine, sampling, system
        self.messages: list[tuple[str, str]] = []
        self.is_over = False
        self.commands: dict[str, Callable[[str], str]] = {
            "/reset": self.reset, "/system": self.set_system, "/save": self.save,
            "/quit": self.quit, "/help": lambda _: HELP}

    @property
    def all_messages(self) -> list[tuple[str, str]]:
        """The messages, the system prompt first."""
        return [*([("system", self.system)] if self.system else []), *self.messages]

    def command(self, line: str) -> str:
        """Do a command; return what to print.

        Raises:
            UserError: there is no such command, or it cannot be done.
        """
        name, _, rest = line.strip().partition(" ")
        if name not in self.commands:
            raise UserError(f"{name} is no command; there are {', '.join(self.commands)}")
        return self.commands[name](rest.strip())

    def reset(self, _: str) -> str:
        """Forget the messages."""
        self.messages.clear()
        return "the conversation starts again"

    def set_system(self, text: str) -> str:
        """Set or remove the system prompt."""
        self.system = text or None
        return "system prompt set" if text else "no system prompt"

    def save(self, path: str) -> str:
        """Write the conversation to a new file."""
        if not path:
            raise UserError("/save needs the name of a file")
        try:
            if Path(path).exists():
                raise UserError(f"{path}: exists; give the name of a new file")
            write_json(path, {"messages": as_json(tuple(self.all_messages))})
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; give another name") from None
        return f"{path}: {len(self.messages)} messages"

    def quit(self, _: str) -> str:
        """End the conversation."""
        self.is_over = True
        return ""

    def answer(self, text: str) -> Generator[str, None, None]:
        """Answer a message; yield the answer as it comes.

        Question and answer join the history when the answer ends, also when the iterator is closed
        before.

        Raises:
            UserError: the conversation leaves no room for an answer. It stays as it was.
        """
        messages = [*self.all_messages, ("user", text)]
        prompt = template.prompt_ids(self.engine.tokenizer, messages)
        require_room(prompt, self.engine.settings, "the conversation", "/reset it")
        answer = Answer(prompt, self.sampling, number=len(self.messages))
        try:
            with closing(self.engine.stream(answer)) as pieces:
                yield from pieces
        finally:
            self.messages += [("user", text), ("assistant", answer.text)]


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within the block, Ctrl-C in a terminal is a key and no signal.

    MindSpore ends the process if a SIGINT arrives while a graph runs, whatever Python's handler is
    (SignalGuard in its graph_scheduler.cc). Other keys are ignored.

    Yields:
        a function that says whether Ctrl-C was pressed since its last call.
    """
    if not sys.stdin.isatty():
        yield lambda: False
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    changed = termios.tcgetattr(terminal)
    changed[3] &= ~(termios.ISIG | termios.ICANON | termios.ECHO)
    termios.tcsetattr(terminal, termios.TCSANOW, changed)

    def is_pressed() -> bool:
        ready = select.select([terminal], [], [], 0)[0]
        return bool(ready) and b"\x03" in os.read(terminal, 1024)
    try:
        yield is_pressed
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


def line_reader() -> Callable[[], str | None]:
    """A function that reads the next line of the user; None at the end."""
    if not sys.stdin.isatty():
        return lambda: next(sys.stdin, None)
    from prompt_toolkit import PromptSession
    session: Any = PromptSession()

    def read() -> str | None:
        try:
            return session.prompt("> ")
        except KeyboardInterrupt:  # clears the line, as in a shell
            return ""
        except EOFError:
            return None
    return read


def converse(engine: Engine, sampling: Sampling, system: str | None = None) -> None:
    """Talk until the user ends it.

    Args:
        engine: answers.
        sampling: of every answer.
        system: the system prompt, or None.
    """
    talk, read = Conversation(engine, sampling, system), line_reader()
    if sys.stdin.isatty():
        print(HELP, flush=True)
    while not talk.is_over:
        line = read()
        if line is None:
            return
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                if text := talk.command(line):
                    print(text, flush=True)
            else:
                _show(talk, line.rstrip("\n"))
        except UserError as error:
            print(f"error: {cli.printable(str(error))}", flush=True)


def _show(talk: Conversation, line: str) -> None:
    """Print an answer as it comes."""
    with interruptible() as is_pressed, closing(talk.answer(line)) as pieces:
        for piece in pieces:
            print("\n".join(map(cli.printable, piece.split("\n"))), end="", flush=True)
            if is_pressed():
                print(" [stopped]", end="")
                break
    print(flush=True)
