"""MindFormers' ChatGLM4Tokenizer, for any vocabulary in GLM-4's tokenizer.model format."""
import base64
import binascii
import hashlib

from mindrlhf.cli import UserError, existing_file
from mindrlhf.models.glm4 import template


class Glm4Tokenizer:
    """Text to token ids and back.

    Attributes:
        special: dict, special token -> id. The ids follow the file's vocabulary (151329 and up for GLM-4-9B).
        size: number of ids, special tokens included.
        pad_id: id of <|endoftext|>.
        stop_ids: ids that end an answer.
        fingerprint: SHA-256 of the file, in hex.
    """

    def __init__(self, path):
        """
        Args:
            path: a tokenizer.model; each line holds a token in base64 and its number.

        Raises:
            UserError: the file is missing, or a line is none of a tokenizer.model.
        """
        path = existing_file(path, "a tokenizer.model")
        _check(path)
        from mindformers import ChatGLM4Tokenizer
        inner = ChatGLM4Tokenizer(str(path))
        self.path = path
        self._encoding = inner.tokenizer
        self.special = {tag: inner.convert_tokens_to_ids(tag) for tag in inner.special_tokens}
        self.size = len(inner)
        self.pad_id = self.special["<|endoftext|>"]
        self.stop_ids = [self.special[tag] for tag in template.STOP_TOKENS]
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
        self._names = {number: tag for tag, number in self.special.items()}

    def check_vocabulary(self, padded_vocab_size):
        """Raise UserError where an id of this tokenizer has no place in the model's embedding."""
        if self.size > padded_vocab_size:
            raise UserError(f"{self.path}: has {self.size} ids, the model padded_vocab_size "
                            f"{padded_vocab_size}; tokenizer and model belong to each other")

    def encode(self, text):
        """Token ids of a text; special tokens in it are plain text, a lone surrogate counts as U+FFFD."""
        try:
            return self._encoding.encode(text, disallowed_special=())
        except ValueError:  # the splitting pattern runs out of stack on a million blanks in a row
            half = len(text) // 2
            return self.encode(text[:half]) + self.encode(text[half:])

    def decode(self, ids, *, show_special=False):
        """Text of token ids; special tokens and ids beyond the vocabulary are left out unless asked for."""
        pieces, run = [], []
        for number in map(int, ids):
            if number < self._encoding.n_vocab:
                run.append(number)
                continue
            pieces += [self._encoding.decode(run), self._names.get(number, "") if show_special else ""]
            run = []
        return "".join([*pieces, self._encoding.decode(run)])


def _check(path):
    """Raise UserError unless every line is `base64 rank` and the ranks count from 0."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines):
            try:
                token, rank = line.split()
                base64.b64decode(token, validate=True)
                if int(rank) != number:
                    raise ValueError
            except (ValueError, binascii.Error):
                raise UserError(f"{path}:{number + 1}: not a line of GLM-4's tokenizer.model "
                                "(a token in base64 and its number); give --tokenizer the file that "
                                "came with the model") from None
