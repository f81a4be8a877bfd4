"""The thread that owns the model: takes answers from other threads, and generates them in batches.

MindSpore's context belongs to the thread that set it, so the model stays in the main thread.
"""
from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mindrlhf.inference.engine import Answer, Engine

IDLE = 0.1  # seconds between looks at `is_over` while nothing is to do


class TooManyRequests(Exception):
    """The queue is full."""


class Update(NamedTuple):
    """What is new in an answer.

    Attributes:
        answer: the answer.
        piece: new text, perhaps none.
        finish_reason: as in Answer; "error" if the model failed.
    """
    answer: Answer
    piece: str
    finish_reason: str | None


Report = Callable[[Update], None]


class Worker:
    """Generates answers that other threads submit.

    Args:
        engine: of the thread that calls run().
        max_queue: answers that may wait while the batch is full.
    """

    def __init__(self, engine: Engine, max_queue: int) -> None:
        self.engine, self.most = engine, engine.batch_size + max_queue
        self.inbox: queue.SimpleQueue[tuple[Answer, Report | None]] = queue.SimpleQueue()
        self.reports: dict[Answer, Report] = {}
        self.lock, self.load = threading.Lock(), 0

    def submit(self, answers: Sequence[Answer], report: Report) -> None:
        """Take answers of a request. Any thread may call it.

        Args:
            answers: to be generated.
            report: called by the worker's thread with everything new.

        Raises:
            TooManyRequests: the queue has no room for all of them.
        """
        with self.lock:
            if self.load + len(answers) > self.most:
                raise TooManyRequests
            self.load += len(answers)
        for answer in answers:
            self.inbox.put((answer, report))

    def leave(self, answers: Sequence[Answer]) -> None:
        """Stop generating answers, of which nobody waits for any more. Any thread may call it."""
        for answer in answers:
            self.inbox.put((answer, None))

    def run(self, is_over: Callable[[], bool]) -> None:
        """Generate until is_over()."""
        while not is_over():
            self._read_inbox()
            try:
                changed = self.engine.step()
            except Exception:  # a kernel failed: the requests get an error, the server goes on
                traceback.print_exc()
                for answer in list(self.reports):
                    self._close(answer, "error")
                continue
            for answer in changed:
                self._tell(answer)
        for answer in list(self.reports):
            self._close(answer, "error")

    def _read_inbox(self) -> None:
        """Take what other threads have sent; if nothing is to do, wait for it."""
        wait = not self.reports
        while True:
            try:
                answer, report = self.inbox.get(block=wait, timeout=IDLE)
            except queue.Empty:
                return
            wait = False
            if report is not None:
                self.reports[answer] = report
                self.engine.submit(answer)
            elif answer in self.reports:
                self._close(answer, "cancelled")

    def _tell(self, answer: Answer) -> None:
        """Report what is new in an answer."""
        report = self.reports.get(answer)
        if report is None:
            return
        if answer.finish_reason:
            self._forget(answer)
        report(Update(answer, answer.stream.read(), answer.finish_reason))

    def _close(self, answer: Answer, reason: str) -> None:
        """End an answer early, and report why."""
        report = self._forget(answer)
        self.engine.cancel(answer)
        report(Update(answer, "", reason))

    def _forget(self, answer: Answer) -> Report:
        """An answer has ended: another may take its place."""
        with self.lock:
            self.load -= 1
        return self.reports.pop(answer)
