"""The chat completions of OpenAI's API: checks requests, and forms answers and errors.

Reference: https://platform.openai.com/docs/api-reference/chat
"""
from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mindrlhf.cli import UserError, shown
from mindrlhf.data.messages import ROLES, Messages
from mindrlhf.inference.engine import Answer, require_room
from mindrlhf.inference.prompts import with_system
from mindrlhf.inference.sampling import sampling_of
from mindrlhf.models.glm4 import template
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
from mindrlhf.parallel import Settings

MOST_ANSWERS, MOST_STOPS = 16, 4  # of a request
LARGEST_SEED = 2 ** 63
TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "invalid_request_error",
         405: "invalid_request_error", 408: "timeout", 413: "invalid_request_error",
         429: "rate_limit_error"}
CODES = {401: "invalid_api_key", 404: "not_found", 408: "timeout", 413: "request_too_large",
         429: "rate_limit_exceeded", 504: "timeout"}
# accepted with these values only, because the server does not support them
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, 0.0, None), "presence_penalty": (0, 0.0, None),
    "logit_bias": ({}, None),
    "logprobs": (False, None), "top_logprobs": (0, None), "tools": ([], None),
    "tool_choice": ("none", "auto", None), "functions": ([], None),
    "function_call": ("none", "auto", None),
    "response_format": ({"type": "text"}, None), "modalities": (["text"], None),
    "audio": (None,), "prediction": (None,)}
# about the account or the transport; they change no answer
IGNORED = ("user", "store", "metadata", "service_tier", "parallel_tool_calls", "safety_identifier",
           "prompt_cache_key", "reasoning_effort", "verbosity")


class ApiError(Exception):
    """An error that the client gets.

    Args:
        status: of HTTP.
        message: one sentence.
        param: the field of the request, or None.
        code: for programs; None: that of the status.
    """

    def __init__(self, status: int, message: str, param: str | None = None,
                 code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or CODES.get(status)

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        return {"error": {"message": self.message, "type": TYPES.get(self.status, "server_error"),
                          "param": self.param, "code": self.code}}


def _number(low: float, high: float, *, above: bool = False) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        is_number = type(value) in (int, float)
        return is_number and (low < value if above else low <= value) and value <= high
    return check


def _integer(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def _boolean(value: Any) -> bool:
    return isinstance(value, bool)


def _stops(value: Any) -> bool:
    texts = [value] if isinstance(value, str) and value else value or []
    return isinstance(texts, list) and len(texts) <= MOST_STOPS and all(
        isinstance(text, str) and 0 < len(text) <= 256 for text in texts)


# field -> (check, what is expected); null is as if the field was left out
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda value: isinstance(value, str), "a string"),
    "messages": (lambda value: isinstance(value, list) and bool(value), "a list of messages"),
    "temperature": (_number(0, 2), "a number from 0 to 2"),
    "top_p": (_number(0, 1, above=True), "a number above 0, up to 1"),
    "top_k": (_integer(0, 2 ** 31), "an integer of at least 0"),
    "repetition_penalty": (_number(1e-6, 100), "a number from 0.000001 to 100"),
    "max_tokens": (_integer(1, 2 ** 31), "an integer of at least 1"),
    "max_completion_tokens": (_integer(1, 2 ** 31), "an integer of at least 1"),
    "n": (_integer(1, MOST_ANSWERS), f"an integer from 1 to {MOST_ANSWERS}"),
    "seed": (_integer(-LARGEST_SEED, LARGEST_SEED - 1), "an integer of 64 bits"),
    "stop": (_stops, f"a string, or a list of at most {MOST_STOPS}, of 1 to 256 characters"),
    "stream": (_boolean, "true or false"),
    "stream_options": (lambda value: isinstance(value, dict), "an object")}


@dataclass
class Completion:
    """A request, and what its answers need.

    Attributes:
        model: name of the model.
        answers: one for each choice.
        is_stream: whether the answers are sent while they are generated.
        with_usage: whether a stream ends with the number of tokens.
        id, created: of all parts of the response.
    """
    model: str
    answers: list[Answer]
    is_stream: bool
    with_usage: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self) -> dict[str, int]:
        """Numbers of tokens."""
        prompt = len(self.answers[0].prompt)
        made = sum(len(answer.tokens) for answer in self.answers)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def response(self) -> dict[str, Any]:
        """The response with all answers."""
        choices = [{"index": index, "logprobs": None, "finish_reason": answer.finish_reason,
                    "message": {"role": "assistant", "content": answer.text, "refusal": None}}
                   for index, answer in enumerate(self.answers)]
        return {"id": self.id, "object": "chat.completion", "created": self.created,
                "model": self.model, "choices": choices, "usage": self.usage()}

    def chunk(self, index: int, delta: Mapping[str, Any],
              finish_reason: str | None = None) -> dict[str, Any]:
        """A part of a stream: what is new in one choice."""
        return {**self._head(), "choices": [{"index": index, "delta": delta, "logprobs": None,
                                             "finish_reason": finish_reason}]}

    def usage_chunk(self) -> dict[str, Any]:
        """The last part of a stream that was asked for usage."""
        return {**self._head(), "choices": [], "usage": self.usage()}

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "chat.completion.chunk", "created": self.created,
                "model": self.model}


def parse_request(body: Any, *, model: str, tokenizer: Glm4Tokenizer, settings: Settings,
                  system: str | None) -> Completion:
    """Check a request.

    Args:
        body: the decoded JSON.
        model: name of the model that is served.
        tokenizer: of the model.
        settings: as config.load_settings returns them, of run_mode predict; what a request leaves
            out follows them, except the seed, which is random.
        system: system prompt of conversations that have none.

    Raises:
        ApiError: a field is wrong, unknown or not supported, or the prompt is too long.
    """
    if not isinstance(body, dict):
        raise ApiError(400, f"expected a JSON object, got {type(body).__name__}")
    given = {name: value for name, value in body.items()
             if name not in IGNORED and not _is_unsupported(name, value) and value is not None}
    for name, value in given.items():
        if name not in FIELDS:
            raise ApiError(400, f"{shown(name)} is no field of a chat completion that this server "
                           "knows", name[:80])
        check, expected = FIELDS[name]
        if not check(value):
            raise ApiError(400, f"'{name}' is {shown(value)}; expected {expected}", name)
    if "messages" not in given:
        raise ApiError(400, "'messages' is missing; give a list of messages", "messages")
    require_model(given.get("model", model), model)
    messages = with_system(_messages(given["messages"]), system)
    prompt = template.prompt_ids(tokenizer, messages)
    try:
        require_room(prompt, settings, "the prompt")
    except UserError as error:
        raise ApiError(400, str(error), "messages", "context_length_exceeded") from None
    sampling = sampling_of(settings, {
        **{name: given.get(name) for name in ("temperature", "top_p", "top_k",
                                              "repetition_penalty")},
        "max_new_tokens": given.get("max_completion_tokens", given.get("max_tokens")),
        "seed": given.get("seed", secrets.randbits(63)) % LARGEST_SEED})
    stop = given.get("stop") or []  # clients send "" for none
    answers = [Answer(prompt, sampling, number, [stop] if isinstance(stop, str) else stop)
               for number in range(given.get("n", 1))]
    options = given.get("stream_options", {})
    return Completion(model, answers, given.get("stream", False),
                      bool(options.get("include_usage")))


def require_model(name: str, served: str) -> None:
    """Raise ApiError if a model is not the one that is served."""
    if name != served:
        raise ApiError(404, f"the model {shown(name)} does not exist; this server has {served}",
                       "model", "model_not_found")


def _is_unsupported(name: str, value: Any) -> bool:
    """Whether a field is one of UNSUPPORTED with a value that changes nothing.

    Raises:
        ApiError: it has another value.
    """
    if name not in UNSUPPORTED:
        return False
    if not any(value == neutral and type(value) is type(neutral)
               for neutral in UNSUPPORTED[name]):
        raise ApiError(400, f"'{name}' is not supported; leave it out", name)
    return True


def _messages(values: Sequence[Any]) -> Messages:
    """(role, text) of each message."""
    messages = []
    for place, value in enumerate(values):
        name = f"messages[{place}]"
        if not isinstance(value, dict):
            raise ApiError(400, f"'{name}' is {shown(value)}; expected an object with role and "
                           "content", name)
        role = value.get("role")
        if role == "developer":
            role = "system"
        if not isinstance(role, str) or role not in ROLES:
            raise ApiError(400, f"'{name}.role' is {shown(role)}; expected system, developer, "
                           "user, assistant or tool", f"{name}.role")
        if value.get("tool_calls"):
            raise ApiError(400, f"'{name}.tool_calls' is not supported; write the call as text",
                           f"{name}.tool_calls")
        content = value.get("content")
        if content is None and role == "assistant":  # OpenAI's own form of an empty answer
            content = ""
        messages.append((ROLES[role], _text(content, f"{name}.content")))
    if messages[-1][0] == "assistant":
        raise ApiError(400, "the last message is the assistant's; it must be one to answer",
                       "messages")
    return tuple(messages)


def _text(content: Any, name: str) -> str:
    """Text of a message: a string, or parts of the type text."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content and all(
            isinstance(part, dict) and part.get("type") == "text"
            and isinstance(part.get("text"), str) for part in content):
        return "".join(part["text"] for part in content)
    raise ApiError(400, f"'{name}' is {shown(content)}; expected a string, or parts of the type "
                   "text", name)
