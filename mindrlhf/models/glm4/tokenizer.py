"""MindFormers' ChatGLM4Tokenizer, for any vocabulary in GLM-4's tokenizer.model format."""
from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable
from pathlib import Path

from mindrlhf.cli import UserError, existing_file
from mindrlhf.files import hash_file
from mindrlhf.models.glm4 import template

LARGEST = 64 << 20  # bytes of a tokenizer.model; GLM-4's has 2.6 MB


def hash_vocabulary(path: str | Path) -> str:
    """The fingerprint of a tokenizer.model: SHA-256 of the file, in hex."""
    return hash_file(path, hashlib.sha256)


class Glm4Tokenizer:
    """Text to token ids and back.

    Attributes:
        special: special token -> id. The ids follow the file's vocabulary: 151329 and up for
            GLM-4-9B.
        size: number of ids, including special tokens.
        pad_id: id of <|endoftext|>.
        stop_ids: ids that end an answer.
        fingerprint: SHA-256 of the file, in hex.
    """

    def __init__(self, path: str | Path):
        """
        Args:
            path: a tokenizer.model; each line has a token in base64 and its rank.

        Raises:
            UserError: no file is given, it is missing, or a line is invalid.
        """
        if not str(path):
            raise UserError("no tokenizer given; --vocab_file, or --tokenizer in preprocessing, "
                            "takes the tokenizer.model that came with the model")
        path = existing_file(path, "a tokenizer.model")
        _check(path)
        from mindformers import ChatGLM4Tokenizer
        inner = ChatGLM4Tokenizer(str(path))
        self.path = path
        self._encoding = inner.tokenizer
        self.special: dict[str, int] = {tag: inner.convert_tokens_to_ids(tag)
                                        for tag in inner.special_tokens}
        self.size = len(inner)
        self.pad_id = self.special["<|endoftext|>"]
        self.stop_ids = [self.special[tag] for tag in template.STOP_TOKENS]
        self.fingerprint = hash_vocabulary(path)
        self._names = {number: tag for tag, number in self.special.items()}

    def check_vocabulary(self, padded_vocab_size: int) -> None:
        """Raise UserError if the model's embedding has fewer rows than this tokenizer has ids."""
        if self.size > padded_vocab_size:
            raise UserError(f"{self.path}: has {self.size} ids, but the model's padded_vocab_size "
                            f"is {padded_vocab_size}; use the tokenizer of this model")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Special tokens in it are plain text; a lone surrogate is U+FFFD."""
        passing = text[:1] + text[1:]  # CPython keeps the UTF-8 of a text that tiktoken reads
        try:
            return self._encoding.encode(passing, disallowed_special=())
        except ValueError:  # the splitting regex overflows its stack on a million spaces in a row
            half = len(text) // 2
            return self.encode(text[:half]) + self.encode(text[half:])

    def decode(self, ids: Iterable[int], *, show_special: bool = False) -> str:
        """Text of token ids.

        Args:
            ids: ids of the file's vocabulary and beyond.
            show_special: keep special tokens; else they are left out. Unknown ids always are.
        """
        pieces: list[str] = []
        run: list[int] = []
        for number in map(int, ids):
            if number < self._encoding.n_vocab:
                run.append(number)
                continue
            special = self._names.get(number, "") if show_special else ""
            pieces += [self._encoding.decode(run), special]
            run = []
        return "".join([*pieces, self._encoding.decode(run)])

    def bytes_of(self, token: int) -> bytes | None:
        """UTF-8 of a token, perhaps of a part of a character; None for special and unknown ids."""
        is_text = token < self._encoding.n_vocab
        return self._encoding.decode_single_token_bytes(token) if is_text else None


def _check(path: Path) -> None:
    """Raise UserError unless a file is a tokenizer.model.

    Every line is `base64 rank`, the ranks count up from 0, no token appears twice, and all 256
    bytes are tokens: text of any kind is made of them.
    """
    cure = "give --tokenizer or --vocab_file the tokenizer.model that came with the model"
    if path.stat().st_size > LARGEST:
        raise UserError(f"{path}: has more than {LARGEST >> 20} MB; {cure}")
    seen: dict[bytes, int] = {}  # token -> its line
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text, rank = line.split()
                token = base64.b64decode(text, validate=True)
                if rank != b"%d" % (number - 1):
                    raise ValueError
            except (ValueError, binascii.Error):
                raise UserError(f"{path}:{number}: not a line of GLM-4's tokenizer.model (a token "
                                f"in base64 and its rank); {cure}") from None
            if token in seen:
                raise UserError(f"{path}:{number}: the token of line {seen[token]} again; {cure}")
            seen[token] = number
    if missing := sum(bytes([value]) not in seen for value in range(256)):
        raise UserError(f"{path}: {missing} of the 256 bytes are not tokens, so that most text "
                        f"cannot be encoded; {cure}")
