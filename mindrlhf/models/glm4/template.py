"""GLM-4's chat template, the only place that knows its tags.

    [gMASK] <sop> <|user|> \\n {prompt} <|assistant|>      the prompt
    \\n {answer} <|user|>                                   the response

`<|user|>` ends a turn of the assistant, and so is the stop token that training teaches. Text is encoded with
special tokens switched off: a tag that a user types stays text. Source: build_single_message of GLM-4's
tokenizer.
"""
VERSION = "glm4-chat-1"  # goes into the sidecar of the data: raise it when the tokens change
PREFIX = ("[gMASK]", "<sop>")
END_OF_TURN = "<|user|>"
STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")


def prompt_ids(tokenizer, messages):
    """Token ids of a conversation up to the point where the assistant answers.

    Args:
        tokenizer: a Glm4Tokenizer.
        messages: [(role, text), ...] with roles system, user, assistant or observation.

    Returns:
        list[int], from [gMASK] to <|assistant|>.
    """
    ids = [tokenizer.special[tag] for tag in PREFIX]
    for role, text in messages:
        ids += [tokenizer.special[f"<|{role}|>"], *tokenizer.encode("\n"), *tokenizer.encode(text)]
    return [*ids, tokenizer.special["<|assistant|>"]]


def text_positions(tokenizer, prompt):
    """Positions in prompt_ids() that hold text: neither prefix, nor tag, nor the newline after a tag."""
    special = set(tokenizer.special.values())
    return [place for place, token in enumerate(prompt)
            if token not in special and prompt[place - 1] not in special]


def response_ids(tokenizer, answer):
    """Token ids of an answer, its stop token included."""
    return [*tokenizer.encode("\n"), *tokenizer.encode(answer), tokenizer.special[END_OF_TURN]]
