"""A pass of the model over all parts, split over the workers, with its progress."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from mindrlhf import cli
from mindrlhf.data.parts import Parts
from mindrlhf.data.scored import Part
from mindrlhf.parallel import Plan

Report = Callable[[int, int], None]  # called with the numbers of pairs and of positions so far


class Bar:
    """Progress of all workers, drawn on rank 0: pairs, pairs/s, real tokens/s, time left.

    Args:
        parts: of the run.
        total: number of pairs.
    """

    def __init__(self, parts: Parts, total: int):
        self.parts, self.drawn = parts, time.monotonic()
        pairs, self.tokens = parts.progress()
        self.bar = cli.progress_bar(total, "score", "pair", initial=pairs)
        self.began = time.monotonic()

    def show(self, at_once: bool = False) -> None:
        """Draw the progress, at most twice a second unless at_once."""
        now = time.monotonic()
        if self.bar.disable or (now - self.drawn < 0.5 and not at_once):
            return
        self.drawn = now
        pairs, tokens = self.parts.progress()
        speed = (tokens - self.tokens) / (now - self.began)
        self.bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
        self.bar.update(pairs - self.bar.n)

    def close(self) -> None:
        """Draw the final progress and leave it on the screen."""
        self.show(at_once=True)
        self.bar.close()


def missing_parts(parts: Parts, plan: Plan) -> list[int]:
    """Parts that this worker still has to make: those of its share; in a parallel plan, all.

    Args:
        parts: of the run.
        plan: of the run; the cards of a parallel plan compute every part together.
    """
    mine = (range(parts.count) if plan.is_sharded
            else range(cli.rank(), parts.count, cli.workers()))
    return [number for number in mine if not parts.is_done(number)]


def make_parts(parts: Parts, todo: Iterable[int], make: Callable[[int, Report], Part], *, bar: Bar,
               plan: Plan) -> None:
    """Make parts and write them; rank 0 then waits for those of the other workers.

    Args:
        parts: of the run.
        todo: as missing_parts() returns them.
        make: makes the part of a number, and reports its progress.
        bar: shows it.
        plan: of the run; only rank 0 writes the parts of a parallel plan.
    """
    is_writer = cli.rank() == 0 or not plan.is_sharded
    for number in todo:
        def report(pairs: int, tokens: int, number: int = number) -> None:
            if is_writer:
                parts.report(number, pairs, tokens)
            bar.show()

        part = make(number, report)
        if is_writer:
            parts.write(number, part)
    if cli.rank() == 0:
        parts.wait(bar.show)
    bar.close()
