"""Part files: the pairs that the workers have scored so far, in a folder beside the destination.

The source is split into parts of a fixed number of pairs, regardless of the number of workers, and
each part is one file. So the result does not depend on the number of workers, and a stopped run
resumes from the parts that are done.
"""
from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mindrlhf.arithmetic import ceil_div
from mindrlhf.cli import UserError
from mindrlhf.data.features import TokenPair
from mindrlhf.files import atomic_file

SMALLEST, LARGEST = 8, 1024  # pairs of a part
PATIENCE = 1800  # seconds without progress after which the other workers count as lost


def part_size(pairs: int) -> int:
    """Pairs of a part: enough to fill its rows, few enough that a kill loses little.

    With enough pairs, the number of parts is a multiple of 64, so that 8 workers finish together.
    """
    parts = 64 * ceil_div(pairs, 64 * LARGEST)
    return max(ceil_div(pairs, parts), SMALLEST)


@dataclass(frozen=True)
class Part:
    """Consecutive pairs of the source, tokenized and scored. The fields are the arrays of its file.

    Attributes:
        pairs: int32 (N,), numbers of the scored pairs among the source's pairs.
        lengths: int32 (N, 3), tokens of prompt, chosen and rejected answer.
        tokens: int32, prompt, chosen and rejected answer of each pair, all concatenated.
        logps: float32 (N, 2), reference log-probs of the chosen and the rejected answer, nats.
        cut: int32 (N,), tokens cut from each prompt.
        dropped: int32 (M,), numbers of the pairs that do not fit into a row.
    """
    pairs: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray
    logps: np.ndarray
    cut: np.ndarray
    dropped: np.ndarray


@dataclass(frozen=True)
class Scored:
    """All N scored pairs, in the order of the source. Their tokens stay on disk until read.

    Attributes:
        pairs: int32 (N,), numbers of the scored pairs among the source's pairs.
        lengths: int32 (N, 3), tokens of prompt, chosen and rejected answer.
        logps: float32 (N, 2), reference log-probs of the chosen and the rejected answer, nats.
        cut: int32 (N,), tokens cut from each prompt.
        dropped: int32 (M,), numbers of the pairs that do not fit into a row.
        files: open part files.
        places: int64 (N, 2), file and first token of each pair.
    """
    pairs: np.ndarray
    lengths: np.ndarray
    logps: np.ndarray
    cut: np.ndarray
    dropped: np.ndarray
    files: list[Any]
    places: np.ndarray

    @property
    def sides(self) -> np.ndarray:
        """int32 (N, 2): tokens of prompt + chosen and of prompt + rejected answer."""
        return self.lengths[:, :1] + self.lengths[:, 1:]

    def tokens(self, number: int) -> TokenPair:
        """Read the tokens of the n-th scored pair."""
        file, begin = self.places[number].tolist()
        ends = np.cumsum(self.lengths[number]).tolist()
        ids = self.files[file].get_slice("tokens")[begin:begin + ends[-1]].tolist()
        return TokenPair(ids[:ends[0]], ids[ends[0]:ends[1]], ids[ends[1]:])


class Parts:
    """The part files of a run.

    Args:
        destination: path of the training file; the folder is destination + ".parts".
        count: number of parts.
        identity: JSON values that determine the content of the parts.
    """

    def __init__(self, destination: str | Path, count: int, identity: dict[str, Any]):
        self.folder = Path(f"{destination}.parts")
        self.count = count
        self.identity = json.loads(json.dumps(identity))
        self._counts: dict[int, list[int]] = {}  # part number -> pairs and tokens

    def path(self, number: int) -> Path:
        """Path of a part."""
        return self.folder / f"part-{number:06d}.safetensors"

    def done(self) -> int:
        """Number of parts that exist."""
        return sum(self.path(number).exists() for number in range(self.count))

    def write(self, number: int, part: Part) -> None:
        """Write a part atomically."""
        pairs = len(part.pairs) + len(part.dropped)
        tokens = int(len(part.tokens) + part.lengths[:, 0].sum())  # both sides have the prompt
        about = json.dumps({"run": self.identity, "counts": [pairs, tokens]})
        with atomic_file(self.path(number)) as file:
            file.write(save(vars(part), {"about": about}))
        self._progress_path(number).unlink(missing_ok=True)

    def is_done(self, number: int) -> bool:
        """Whether a part exists.

        Raises:
            UserError: it belongs to another run, or is not a part.
        """
        path = self.path(number)
        if path.exists():
            self._check(path)
        return path.exists()

    def check(self) -> None:
        """Raise UserError unless every part in the folder belongs to this run."""
        for path in sorted(self.folder.glob("part-*.safetensors")):
            self._check(path)

    def _check(self, path: Path) -> None:
        """Raise UserError unless a file is a part of this run."""
        try:
            with safe_open(path, "np") as part:
                found = _about(part)["run"]
        except FileNotFoundError:  # rank 0 has just removed it, because all parts are merged
            return
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"{path}: not a part file ({error}); remove {self.folder}") from None
        if found != self.identity:
            different = [name for name in {**found, **self.identity}
                         if found.get(name) != self.identity.get(name)]
            raise UserError(f"{path}: belongs to a run with different {', '.join(different)}; "
                            f"remove {self.folder} to start over, or choose another --dst")

    # Progress: (pairs, tokens, padding excluded) of finished and unfinished parts.

    def _progress_path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.progress"

    def report(self, number: int, pairs: int, tokens: int) -> None:
        """Record the progress of an unfinished part.

        Args:
            number: of the part.
            pairs, tokens: scored so far.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._progress_path(number).write_text(f"[{pairs}, {tokens}]")

    def progress(self) -> tuple[int, int]:
        """(pairs, tokens) of all workers together."""
        total = np.zeros(2, np.int64)
        for number in range(self.count):
            # a file may be half-written, or have just been replaced
            with contextlib.suppress(OSError, SafetensorError, ValueError):
                if number not in self._counts and self.path(number).exists():
                    with safe_open(self.path(number), "np") as part:
                        self._counts[number] = _about(part)["counts"]
                counts = self._counts.get(number)
                total += counts or json.loads(self._progress_path(number).read_text())
        pairs, tokens = total.tolist()
        return pairs, tokens

    def wait(self, show: Callable[[], None] | None = None, poll: float = 0.2,
             patience: float = PATIENCE) -> None:
        """Wait until every part exists.

        Args:
            show: called at each poll and at the end.
            poll: seconds between polls.
            patience: seconds without any progress of the other workers to wait, at most.

        Raises:
            UserError: they made none for so long, or parts that were done are gone.
        """
        reached, since = (0, (0, 0)), time.monotonic()
        while (done := self.done()) < self.count:
            found = done, self.progress()
            is_late = found == reached and time.monotonic() - since > patience
            if is_late or done < reached[0]:
                why = f"no progress for {patience:g} s" if is_late else "parts were removed"
                raise UserError(f"{self.folder}: {why}; {self.count - done} of {self.count} parts "
                                "are missing. See the logs of the other workers, and repeat the "
                                "command to continue")
            if found != reached:
                reached, since = found, time.monotonic()
            if show:
                show()
            time.sleep(poll)
        if show:
            show()

    def read(self) -> Scored:
        """Read all parts, except for their tokens."""
        self.check()
        files = [safe_open(self.path(number), "np") for number in range(self.count)]
        joined = {name: np.concatenate([file.get_tensor(name) for file in files])
                  for name in ("pairs", "lengths", "logps", "cut", "dropped")}
        places = []
        for number, file in enumerate(files):
            sizes = file.get_tensor("lengths").sum(1, dtype=np.int64)
            places.append(np.stack([np.full(len(sizes), number), np.cumsum(sizes) - sizes], 1))
        return Scored(**joined, files=files, places=np.concatenate(places))

    def remove(self) -> None:
        """Delete the parts, the leftovers of killed workers and, once empty, the folder."""
        for pattern in ("part-*.safetensors", "part-*.progress", ".part-*.tmp"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _about(part: Any) -> dict[str, Any]:
    """Metadata of an open part file: the run, and the counts of pairs and tokens."""
    return json.loads(part.metadata()["about"])
