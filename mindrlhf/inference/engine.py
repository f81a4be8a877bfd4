"""One loaded model that generates many answers at once.

The engine calls MindFormers' GenerationMixin.forward, which computes the next logits of a batch
with or without a key-value cache, as generate() does. It chooses the tokens itself. So every answer
has its own settings and random numbers and depends on no other, answers join and leave the batch at
any token, and each can be read while it is generated.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mindrlhf import cli
from mindrlhf.cli import UserError
from mindrlhf.inference.blocks import BlockPool
from mindrlhf.inference.sampling import Sampling, choose_token, generator_of
from mindrlhf.inference.text_stream import TextStream
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
from mindrlhf.parallel import Settings

BLOCK_SIZE, NUM_BLOCKS = 16, 128  # MindFormers' defaults


@dataclass(eq=False)
class Answer:
    """An answer, before, while and after it is generated.

    Attributes:
        prompt: token ids, as template.prompt_ids() returns them.
        sampling: how it is generated.
        number: among the answers to this prompt.
        stop: strings that end it.
        tokens: generated so far, the stop token included.
        finish_reason: "stop": a stop token or string has ended it; "length": it has
            max_new_tokens, or fills the model's sequence; "cancelled"; None while it is generated.
        stream: its text; set by the engine, as are the other attributes below.
        blocks: of the key-value cache.
        random: its random numbers.
    """
    prompt: list[int]
    sampling: Sampling
    number: int = 0
    stop: Sequence[str] = ()
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stream: TextStream = field(init=False)
    blocks: list[int] = field(default_factory=list)
    random: np.random.Generator = field(init=False)

    @property
    def text(self) -> str:
        """What has been generated."""
        return self.stream.text

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.tokens)


def room_of(settings: Settings) -> int:
    """Tokens that prompt and answer may have together.

    Args:
        settings: as config.load_settings returns them, of run_mode predict.
    """
    model = settings["model"]["model_config"]
    most = min(model["seq_length"], model.get("max_length") or model["seq_length"])
    if not model.get("use_past"):
        return most
    block = model.get("block_size", BLOCK_SIZE)
    blocks = min(model["seq_length"] // block, model.get("num_blocks", NUM_BLOCKS))
    return min(blocks * block, most)


def require_room(prompt: Sequence[int], settings: Settings, what: str,
                 cure: str = "shorten it") -> None:
    """Raise UserError if a prompt leaves no room for an answer.

    Args:
        prompt: token ids with the chat template.
        settings: as room_of() takes them.
        what: the option or place that the prompt comes from, for the message.
        cure: what to do, for the message.
    """
    room = room_of(settings)
    if len(prompt) >= room:
        raise UserError(f"{what} is {len(prompt)} tokens with the chat template, which fills "
                        f"seq_length {room}; {cure}")


class Engine:
    """A model that generates answers in batches.

    Args:
        model: a ChatGLM2ForConditionalGeneration with its weights.
        tokenizer: of the model.
        settings: as config.load_settings returns them, of run_mode predict.
        batch_size: answers that are generated at once; None: the YAML's.
        most: answers that there are; no more are generated at once. None: unknown.

    Attributes:
        running: answers that have a place in the batch.
        waiting: answers that will get one, the first one first.
        generated: tokens so far.
    """

    def __init__(self, model: Any, tokenizer: Glm4Tokenizer, settings: Settings,
                 batch_size: int | None = None, most: int | None = None) -> None:
        config = settings["model"]["model_config"]
        self.model, self.tokenizer, self.settings = model.set_train(False), tokenizer, settings
        self.room, self.seq_length = room_of(settings), config["seq_length"]
        size = batch_size or config.get("batch_size", 1)
        self.batch_size = min(size, most or size)
        self.pool = BlockPool(config.get("block_size", BLOCK_SIZE), config.get(
            "num_blocks", NUM_BLOCKS), self.seq_length) if config.get("use_past") else None
        self.is_dynamic = bool(self.pool and config.get("is_dynamic"))
        if self.is_dynamic:
            model.set_dynamic_inputs()
        self.running: list[Answer] = []
        self.waiting: deque[Answer] = deque()
        self.compiled: set[int] = set()  # batch sizes of static graphs
        self.generated = 0

    def submit(self, answer: Answer) -> Answer:
        """Take an answer that is to be generated. step() generates it.

        Raises:
            UserError: its prompt leaves no room.
        """
        require_room(answer.prompt, self.settings, "the prompt")
        answer.stream = TextStream(self.tokenizer, answer.stop)
        answer.random = generator_of(answer.sampling, answer.prompt, answer.number)
        self.waiting.append(answer)
        return answer

    def cancel(self, answer: Answer) -> None:
        """End an answer early; one that has ended stays as it is."""
        if answer.finish_reason is None:
            self._end(answer, "cancelled")

    def run(self, answers: Iterable[Answer]) -> Iterator[Answer]:
        """Generate many answers; yield each when it is complete. The batch is kept full."""
        left = iter(answers)
        more = True
        while more or self.running or self.waiting:
            while more and len(self.waiting) < self.batch_size:
                answer = next(left, None)
                more = answer is not None
                if answer is not None:
                    self.submit(answer)
            yield from (answer for answer in self.step() if answer.finish_reason)

    def stream(self, answer: Answer) -> Generator[str, None, None]:
        """Generate one answer; yield its text as it comes. Closing the iterator cancels it."""
        self.submit(answer)
        try:
            while answer.finish_reason is None:
                self.step()
                yield answer.stream.read()
        finally:
            self.cancel(answer)

    def step(self) -> list[Answer]:
        """Generate one token: the first one of answers that join the batch, or one for each.

        Returns:
            the answers that have a new token.
        """
        joined = self._admit()
        rows = joined if joined and self.pool else list(self.running)
        if not rows:
            return []
        with cli.quiet_stdout():  # compiling prints
            tokens = self._next_tokens(rows, is_first=bool(joined))
        for answer, token in zip(rows, tokens):
            self._add(answer, token)
        return rows

    def _longest(self, answer: Answer) -> int:
        """Tokens of prompt and answer when it ends for its length."""
        return min(len(answer.prompt) + answer.sampling.max_new_tokens, self.room)

    def _admit(self) -> list[Answer]:
        """Move waiting answers into the batch, in their order, as far as there is room.

        The first pass of an answer computes logits at every position of its prompt. Together, those
        that join have no more positions than one longest prompt.
        """
        joined: list[Answer] = []
        while self.waiting and len(self.running) < self.batch_size:
            answer = self.waiting[0]
            if self.pool:
                widest = max(len(other.prompt) for other in (*joined, answer))
                width = widest if self.is_dynamic else self.seq_length
                if joined and (len(joined) + 1) * width > self.seq_length:
                    break
                blocks = self.pool.take(self._longest(answer))
                if blocks is None:
                    break
                answer.blocks = blocks
            joined.append(self.waiting.popleft())
            self.running.append(answer)
        return joined

    def _add(self, answer: Answer, token: int) -> None:
        """Add a token to an answer, and end it if it is complete."""
        answer.tokens.append(token)
        answer.stream.put(token)
        self.generated += 1
        if token in self.tokenizer.stop_ids or answer.stream.is_stopped:
            self._end(answer, "stop")
        elif answer.length >= self._longest(answer):
            self._end(answer, "length")

    def _end(self, answer: Answer, reason: str) -> None:
        """Take an answer out of the batch or the queue."""
        answer.finish_reason = reason
        answer.stream.end()
        if self.pool:
            self.pool.give_back(answer.blocks)
            answer.blocks = []
        if answer in self.running:
            self.running.remove(answer)
        elif answer in self.waiting:
            self.waiting.remove(answer)

    def _next_tokens(self, rows: list[Answer], *, is_first: bool) -> list[int]:
        """The next token of each row."""
        logits = self._next_logits(rows, is_first)
        if all(answer.sampling.is_argmax for answer in rows):
            return self.model.argmax(logits, -1).asnumpy().tolist()[:len(rows)]
        values = logits.asnumpy()
        return [choose_token(row, answer.sampling, [*answer.prompt, *answer.tokens], answer.random)
                for row, answer in zip(values, rows)]

    def _next_logits(self, rows: list[Answer], is_first: bool) -> Any:
        """Logits of the next token of each row, a tensor (rows or more, V)."""
        from mindspore import Tensor
        if not self.pool or not is_first:
            rows = self._padded(rows)
        lengths = np.array([answer.length for answer in rows])
        if self.pool and not is_first:
            logits, _ = self.model.forward(
                input_ids=np.array([[answer.tokens[-1]] for answer in rows], np.int32),
                valid_length_each_example=lengths, use_past=True, prefill=False,
                block_tables=self.pool.tables([answer.blocks for answer in rows]),
                slot_mapping=np.concatenate([
                    self.pool.slots(answer.blocks, answer.length - 1, answer.length, 1)
                    for answer in rows]))
            return _flat(logits)
        width = lengths.max() if self.is_dynamic else self.seq_length
        ids = np.full((len(rows), width), self.tokenizer.pad_id, np.int32)
        for row, answer in zip(ids, rows):
            row[:answer.length] = [*answer.prompt, *answer.tokens]
        cache = {} if not self.pool else {
            "block_tables": self.pool.tables([answer.blocks for answer in rows]),
            "slot_mapping": np.concatenate([
                self.pool.slots(answer.blocks, 0, answer.length, width) for answer in rows])}
        logits, last = self.model.forward(
            input_ids=ids, valid_length_each_example=lengths, use_past=bool(self.pool),
            prefill=True, **cache)
        logits = _flat(logits)
        return logits if len(logits) == len(rows) else logits[Tensor(last.astype(np.int32))]

    def _padded(self, rows: list[Answer]) -> list[Answer]:
        """Rows of a static graph: the first row again and again, up to a size that is compiled.

        A repeated row computes and stores what the first one does. With a cache there is one size
        for ever: MindSpore looks up graphs of the phases prefill and increment by phase alone.
        """
        if self.is_dynamic:
            return rows
        size = self.batch_size if self.pool else min(
            (size for size in self.compiled if size >= len(rows)), default=0)
        if not size:
            size = min(1 << (len(rows) - 1).bit_length(), self.batch_size)
            self.compiled.add(size)
        return rows + rows[:1] * (size - len(rows))


def _flat(output: Any) -> Any:
    """Logits (positions, V) of what the network returns."""
    logits = output[0] if isinstance(output, tuple) else output
    return logits.reshape((-1, logits.shape[-1]))
