"""Part files: the pairs that the workers have scored so far, in a folder beside the destination.

The source is split into parts regardless of the number of workers, and each part is one file. So
the result does not depend on the number of workers, and a stopped run resumes from the parts that
are done.
"""
from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from mindrlhf.arithmetic import ceil_div
from mindrlhf.cli import UserError
from mindrlhf.data.groups import bundle_pairs, estimate_tokens
from mindrlhf.data.preference import Pair
from mindrlhf.data.scored import Part, Scored
from mindrlhf.files import atomic_file

SMALLEST, LARGEST = 8, 1024  # pairs of a part; more where a bundle has more, or batches need more
BATCHES = 4  # that a part fills, at least: the last one is half empty on average
PATIENCE = 1800  # seconds without progress after which the other workers count as lost


def split_bundles(bundles: Sequence[Sequence[int]], tokens: Sequence[int],
                  batch_positions: int) -> list[list[int]]:
    """Split the source into parts: bundles of pairs, none of them divided.

    A part has enough pairs to fill BATCHES batches, and few enough that a kill loses little. With
    enough pairs, there are about 64 parts or a multiple of it, so that 8 workers finish together.

    Args:
        bundles: indices of the pairs of each bundle.
        tokens: estimated tokens of each bundle.
        batch_positions: of a batch.

    Returns:
        Indices of the pairs of each part.
    """
    pairs = sum(map(len, bundles))
    least = max(ceil_div(pairs, 64 * ceil_div(pairs, 64 * LARGEST)), SMALLEST)
    parts: list[list[int]] = []
    room = 0  # tokens that the last part still needs
    for bundle, size in zip(bundles, tokens):
        if not parts or (len(parts[-1]) >= least and room <= 0):
            parts.append([])
            room = BATCHES * batch_positions
        parts[-1] += bundle
        room -= size
    return parts


def split_pairs(pairs: Sequence[Pair], *, share: bool, batch_positions: int) -> list[list[int]]:
    """Split the source into parts, pairs with the same conversation together.

    Args:
        pairs: of the source.
        share: False allows pairs with the same conversation in different parts.
        batch_positions: of a batch.

    Returns:
        Indices of the pairs of each part.
    """
    bundles = bundle_pairs(pairs, share)
    return split_bundles(bundles, [estimate_tokens(pairs, bundle) for bundle in bundles],
                         batch_positions)


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
        pairs, tokens = len(part.numbers) + len(part.dropped), len(part.tokens)
        about = json.dumps({"run": self.identity, "counts": [pairs, tokens],
                            "content": _hash(vars(part))})
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

    def read(self, share: bool = True) -> Scored:
        """Read all parts, except for their tokens.

        Args:
            share: whether prompts that are equal in different parts become one.

        Raises:
            UserError: a part is damaged.
        """
        self.check()
        files = [safe_open(self.path(number), "np") for number in range(self.count)]
        parts = [self._read_part(number, file) for number, file in enumerate(files)]
        return Scored.of(parts, files, share)

    def _read_part(self, number: int, file: Any) -> dict[str, np.ndarray]:
        """The arrays of an open part but its tokens; a damaged part is a UserError."""
        arrays = {field.name: file.get_tensor(field.name) for field in fields(Part)}
        if _about(file).get("content") != _hash(arrays):
            raise UserError(f"{self.path(number)}: was damaged after it was written; remove it and "
                            "repeat the command, which scores its pairs again")
        del arrays["tokens"]
        return arrays

    def remove(self) -> None:
        """Delete the parts, the leftovers of killed workers and, once empty, the folder."""
        for pattern in ("part-*.safetensors", "part-*.progress", ".part-*.tmp"):
            for path in self.folder.glob(pattern):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _hash(arrays: Mapping[str, np.ndarray]) -> str:
    """XXH3 (128 bits) of the arrays of a part, 32 hex digits."""
    content = xxhash.xxh3_128()
    for field in fields(Part):
        content.update(np.ascontiguousarray(arrays[field.name]).tobytes())
    return content.hexdigest()


def _about(part: Any) -> dict[str, Any]:
    """Metadata of an open part file: the run, and the counts of pairs and tokens."""
    return json.loads(part.metadata()["about"])
