"""Part files: what the workers have scored so far, in a folder beside the destination.

The source is cut into parts of a fixed number of pairs, whatever the number of workers, and each part is one
file. So the result does not depend on how many workers there were, and a stopped run goes on from them.
"""
import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mindrlhf.arithmetic import ceil_div
from mindrlhf.cli import UserError
from mindrlhf.data.features import TokenPair
from mindrlhf.files import atomic_file

SMALLEST, LARGEST = 8, 1024  # pairs of a part


def part_size(pairs):
    """Pairs of a part: enough to fill its rows, few enough that little is lost by a kill.

    The number of parts is a multiple of 64 where there are enough pairs, so that 8 workers end together.
    """
    parts = 64 * ceil_div(pairs, 64 * LARGEST)
    return max(ceil_div(pairs, parts), SMALLEST)


@dataclass(frozen=True)
class Scored:
    """All scored pairs, N of them, in the order of the source. Their tokens stay in the files till asked for.

    Attributes:
        pairs: int32 (N,), which pairs of the source: others fit into no row.
        lengths: int32 (N, 3), tokens of prompt, chosen and rejected answer.
        logps: float32 (N, 2), reference log-probs of the chosen and the rejected answer, nats.
        cut: int32 (N,), tokens that the prompt lost.
        dropped: int32 (M,), which pairs of the source fit into no row.
        files: list of open parts.
        places: int64 (N, 2), file and first token of each pair.
    """
    pairs: np.ndarray
    lengths: np.ndarray
    logps: np.ndarray
    cut: np.ndarray
    dropped: np.ndarray
    files: list
    places: np.ndarray

    @property
    def sides(self):
        """int32 (N, 2): tokens of prompt + chosen and of prompt + rejected answer."""
        return self.lengths[:, :1] + self.lengths[:, 1:]

    def tokens(self, number):
        """The n-th scored pair as a TokenPair."""
        file, begin = self.places[number].tolist()
        ends = np.cumsum(self.lengths[number]).tolist()
        ids = self.files[file].get_slice("tokens")[begin:begin + ends[-1]].tolist()
        return TokenPair(ids[:ends[0]], ids[ends[0]:ends[1]], ids[ends[1]:])


class Parts:
    """The part files of a run.

    Args:
        destination: path of the training file; the folder is destination + ".parts".
        count: number of parts.
        identity: dict of JSON values, all that the content of a part depends on.
    """

    def __init__(self, destination, count, identity):
        self.folder = Path(f"{destination}.parts")
        self.count = count
        self.identity = json.loads(json.dumps(identity))
        self._counts = {}

    def path(self, number):
        """Where a part lies."""
        return self.folder / f"part-{number:06d}.safetensors"

    def done(self):
        """How many parts are there."""
        return sum(self.path(number).exists() for number in range(self.count))

    def write(self, number, arrays):
        """Write one part, the arrays of reference.make_part; it takes its name when it is whole."""
        pairs = len(arrays["pairs"]) + len(arrays["dropped"])
        tokens = int(len(arrays["tokens"]) + arrays["lengths"][:, 0].sum())  # the prompt stands on both sides
        about = json.dumps({"run": self.identity, "counts": [pairs, tokens]})
        with atomic_file(self.path(number)) as file:
            file.write(save(arrays, {"about": about}))
        self._progress_path(number).unlink(missing_ok=True)

    def is_done(self, number):
        """Whether a part is there.

        Raises:
            UserError: it is of another run, or no part.
        """
        path = self.path(number)
        if path.exists():
            self._check(path)
        return path.exists()

    def check(self):
        """Raise UserError where a file in the folder is no part of this run."""
        for path in sorted(self.folder.glob("part-*.safetensors")):
            self._check(path)

    def _check(self, path):
        try:
            with safe_open(path, "np") as part:
                found = _about(part)["run"]
        except FileNotFoundError:  # rank 0 has just removed it: all is done
            return
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as error:
            raise UserError(f"{path}: is no part of a run ({error}); remove {self.folder}") from None
        if found != self.identity:
            names = {**found, **self.identity}
            names = [name for name in names if found.get(name) != self.identity.get(name)]
            raise UserError(f"{path}: was left by a run with other {', '.join(names)}; remove "
                            f"{self.folder} to begin anew, or give another --dst")

    # progress: (pairs, real tokens), of parts that are done and of those that are being made

    def _progress_path(self, number):
        return self.folder / f"part-{number:06d}.progress"

    def report(self, number, pairs, tokens):
        """Say how far a part is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._progress_path(number).write_text(f"[{pairs}, {tokens}]")

    def progress(self):
        """(pairs, tokens) over all workers."""
        total = np.zeros(2, np.int64)
        for number in range(self.count):
            with contextlib.suppress(OSError, SafetensorError, ValueError):  # half written, or just replaced
                if number not in self._counts and self.path(number).exists():
                    with safe_open(self.path(number), "np") as part:
                        self._counts[number] = _about(part)["counts"]
                total += self._counts.get(number) or json.loads(self._progress_path(number).read_text())
        return total.tolist()

    def wait(self, show=None, poll=0.2):
        """Return when every part is there; show() is called meanwhile."""
        while self.done() < self.count:
            if show:
                show()
            time.sleep(poll)
        if show:
            show()

    def read(self):
        """All parts as Scored."""
        self.check()
        files = [safe_open(self.path(number), "np") for number in range(self.count)]
        joined = {name: np.concatenate([file.get_tensor(name) for file in files])
                  for name in ("pairs", "lengths", "logps", "cut", "dropped")}
        places = []
        for number, file in enumerate(files):
            sizes = file.get_tensor("lengths").sum(1, dtype=np.int64)
            places.append(np.stack([np.full(len(sizes), number), np.cumsum(sizes) - sizes], 1))
        return Scored(**joined, files=files, places=np.concatenate(places))

    def remove(self):
        """Delete the parts, what killed workers left, and, if nothing else is in it, the folder."""
        for pattern in ("part-*.safetensors", "part-*.progress", ".part-*.tmp"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _about(part):
    return json.loads(part.metadata()["about"])
