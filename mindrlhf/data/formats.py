"""The formats of preference data: one parsed row to a conversation and its two answers."""
# what a row of each type has; --dataset_type auto tells the types by these fields, in this order
FIELDS = {"cvalues": ("prompt", "pos_resp", "neg_resp"), "dpo": ("conversations", "chosen", "rejected"),
          "pairs": ("chosen", "rejected")}
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "observation": "observation", "tool": "observation"}


def parse_row(row, kind):
    """One row.

    Args:
        row: parsed JSON.
        kind: a key of FIELDS.

    Returns:
        (messages, chosen, rejected): messages are ((role, text), ...) with the roles of template.py.

    Raises:
        ValueError: saying what the row lacks.
    """
    return _PARSE[kind](row)


def detect_type(row):
    """The kind of a row, by its fields.

    Raises:
        ValueError: saying what was found instead.
    """
    for kind, fields in FIELDS.items():
        if isinstance(row, dict) and all(name in row for name in fields):
            return kind
    found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
    raise ValueError(f"auto tells a row by its fields ({describe_fields(FIELDS)}); this one has: {found or 'none'}")


def describe_fields(kinds):
    """The fields of some kinds, in words."""
    return "; ".join(f"{kind}: {', '.join(FIELDS[kind])}" for kind in kinds)


def _cvalues(row):
    prompt, chosen, rejected = _values(row, "cvalues")
    return (("user", _text(prompt, "prompt")),), _answer(chosen, "pos_resp"), _answer(rejected, "neg_resp")


def _dpo(row):
    conversation, chosen, rejected = _values(row, "dpo")
    messages = _messages(conversation, "conversations")
    if row.get("system"):
        messages = (("system", _text(row["system"], "system")), *messages)
    return _prompt(messages, "conversations"), _answer(chosen, "chosen"), _answer(rejected, "rejected")


def _pairs(row):
    """As TRL reads them: a prompt that is not given is what the answers begin with in common."""
    chosen, rejected = _values(row, "pairs")
    prompt = row.get("prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("'chosen' and 'rejected' are of different kinds; two strings, or two lists of "
                         "messages expected")
    if isinstance(prompt, str) and (isinstance(chosen, str) or (_is_one(chosen) and _is_one(rejected))):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str) or prompt is None:  # beside whole conversations it says nothing new
        split = _split_texts if isinstance(chosen, str) else _split_conversations
        messages, chosen, rejected = split(chosen, rejected)
    else:
        messages = _messages(prompt, "prompt")
    return _prompt(messages, "prompt"), _answer(chosen, "chosen"), _answer(rejected, "rejected")


_PARSE = {"cvalues": _cvalues, "dpo": _dpo, "pairs": _pairs}


def _values(row, kind):
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object expected, got {type(row).__name__}")
    for name in FIELDS[kind]:
        if name not in row:
            raise ValueError(f"missing '{name}'; a {kind} row has {', '.join(FIELDS[kind])}")
    return [row[name] for name in FIELDS[kind]]


def _text(value, name):
    if not isinstance(value, str):
        raise ValueError(f"'{name}' is {type(value).__name__}; a string expected")
    return value


def _is_one(value):
    return isinstance(value, dict) or (isinstance(value, list) and len(value) == 1)


def _answer(value, name):
    """Text of an answer: a string, a message, or a list of one message."""
    if not isinstance(value, str):
        messages = _messages([value] if isinstance(value, dict) else value, name)
        if len(messages) != 1 or messages[0][0] != "assistant":
            roles = ", ".join(role for role, _ in messages)
            raise ValueError(f"'{name}' holds {roles or 'no message'}; one message of the assistant expected")
        value = messages[0][1]
    if not value.strip():
        raise ValueError(f"'{name}' is empty; an answer needs text, or remove the line")
    return value


def _messages(value, name):
    """((role, text), ...) of a list of messages, with the fields role and content or from and value."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"'{name}' is no list of messages")
    messages = []
    for message in value:
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"'{name}' has the role {role!r}; known are {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise ValueError(f"'{name}' holds tool_calls, which are not rendered; put the call into the text")
        text = _text(message.get("content", message.get("value")), f"{name} of {role}")
        messages.append((ROLES[role], text))
    return tuple(messages)


def _prompt(messages, name):
    if not messages or messages[-1][0] == "assistant":
        found = "ends with the assistant" if messages else "holds no message"
        raise ValueError(f"'{name}' {found}; the message to be answered expected last")
    return messages


def _common(one, other):
    """How many items two sequences share at their beginning."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _split_texts(chosen, rejected):
    prompt = chosen[:_common(chosen, rejected)]
    if len(prompt) in (len(chosen), len(rejected)):
        raise ValueError("no 'prompt', and one answer begins with all of the other; none can be told")
    if prompt.endswith(" "):  # the blank belongs to what follows, as in TRL
        prompt = prompt[:-1]
    return (("user", prompt),), chosen[len(prompt):], rejected[len(prompt):]


def _split_conversations(chosen, rejected):
    chosen, rejected = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    common = _common(chosen, rejected)
    common = min(common, len(chosen) - 1, len(rejected) - 1)  # the last message is the answer
    if common < 0 or len(chosen) != common + 1 or len(rejected) != common + 1:
        raise ValueError(f"'chosen' and 'rejected' share {max(common, 0)} messages of {len(chosen)} and "
                         f"{len(rejected)}; they may differ in their last message only")
    return chosen[:-1], *[[{"role": side[-1][0], "content": side[-1][1]}] for side in (chosen, rejected)]
