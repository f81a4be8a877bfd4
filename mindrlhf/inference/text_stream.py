"""Tokens of an answer to text that can be shown while it is generated."""
from __future__ import annotations

import codecs
from collections.abc import Sequence

from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer


class TextStream:
    """The text of an answer, token by token.

    What was read once never changes: a character whose bytes are incomplete, space that may be the
    end, and what may be the beginning of a stop string are held back. All pieces together are the
    decoded answer without the space around it.

    Args:
        tokenizer: of the model.
        stop: strings that end the answer; they are no part of it.

    Attributes:
        text: the answer so far, including what is held back.
        is_stopped: whether a stop string has ended the answer.
    """

    def __init__(self, tokenizer: Glm4Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, [text for text in stop if text]
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""
        self.is_stopped = False
        self.is_ended = False
        self.read_to = 0

    def put(self, token: int) -> None:
        """Add a token; special tokens have no text."""
        piece = self.tokenizer.bytes_of(token)
        self._add(self.decoder.decode(b"", final=True) if piece is None
                  else self.decoder.decode(piece))

    def end(self) -> None:
        """The answer is complete: nothing is held back any more."""
        if not self.is_stopped:
            self._add(self.decoder.decode(b"", final=True))
        self.text = self.text.rstrip()
        self.is_ended = True

    def _add(self, piece: str) -> None:
        """Add text; cut it at a stop string."""
        start = max(0, len(self.text) - max(map(len, self.stop), default=0))
        self.text += piece
        if not self.read_to:
            stripped = self.text.lstrip()
            start, self.text = max(0, start - len(self.text) + len(stripped)), stripped
        found = [place for text in self.stop if (place := self.text.find(text, start)) >= 0]
        if found:
            self.text, self.is_stopped = self.text[:min(found)], True

    def read(self) -> str:
        """The text since the last call, as far as it is certain."""
        certain = len(self.text) if self.is_ended else self._certain()
        piece = self.text[self.read_to:certain]
        self.read_to = max(self.read_to, certain)
        return piece

    def _certain(self) -> int:
        """Number of characters that no later token can change."""
        size = len(self.text)
        for text in self.stop:
            held = [length for length in range(1, len(text))
                    if self.text.endswith(text[:length])]
            size = min(size, len(self.text) - max(held, default=0))
        return len(self.text[:size].rstrip())
