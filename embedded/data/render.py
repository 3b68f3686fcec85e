"""Examples as token ids: the prompt that the server sends the model, then what the model must emit.

    BOS ... <｜User｜> question <｜Assistant｜><think> | reasoning </think> content EOS      weights behind the bar: 1

The prompt is made by the server's own code. The answer is written as the official encoding writes a turn of the
history, so that the next prompt begins with it wherever that encoding keeps it.
"""

import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedded.data.conversation import assistant_message
from embedded.data.example import Answer, Example
from server.chat_prompt import chat_prompt
from server.protocol.chat import ChatBody
from server.text.calls import DSML
from server.text.prompt import ASSISTANT, EOS, Prompt
from server.text.tokenizer import Tokenizer

PROMPT_WEIGHT = 0.05
_THINK_END = "</think>"


@dataclass(frozen=True, slots=True)
class Row:
    """One example. Weight t is that of predicting id t from those before it."""

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    """Of the same length: 1 where the model must emit the id (EOS included), in earlier turns too; 0 for the first."""
    prompt_tokens: int
    """What follows them is emitted."""


def prompt_of(tokenizer: Tokenizer, example: Example) -> Prompt:
    """The prompt that `POST /v1/chat/completions` makes of the example's body."""
    body, unknown = ChatBody.from_object({"model": "embedded", **example.body()})
    assert not unknown, unknown
    body.check()
    return chat_prompt(tokenizer, body.chat_request())


def answer_ids(tokenizer: Tokenizer, answer: Answer) -> list[int]:
    """What the model emits, EOS included."""
    pieces, names = _pieces(answer)
    encoded = tokenizer.encode_plain_batch(pieces)
    ids: list[int] = []
    for piece, name in zip(encoded, names, strict=True):
        ids += piece
        special = tokenizer.special_id(name)
        assert special is not None, name
        ids.append(special)
    return ids


def training_row(tokenizer: Tokenizer, example: Example, *, prompt_weight: float = PROMPT_WEIGHT) -> Row:
    """The example with its answer."""
    prompt = prompt_of(tokenizer, example)
    emitted = answer_ids(tokenizer, example.answer)
    weights = np.full(len(prompt.token_ids) + len(emitted), prompt_weight, dtype=np.float32)
    for start, end in _earlier_turns(tokenizer, prompt):
        weights[start:end] = 1.0
    weights[len(prompt.token_ids) :] = 1.0
    weights[0] = 0.0
    ids = np.concatenate([prompt.token_ids, np.asarray(emitted, dtype=np.int32)])
    return Row(ids, weights, len(prompt.token_ids))


def next_messages(example: Example, question: str) -> list[dict[str, object]]:
    """The conversation as a client sends it one turn later."""
    said = [dict(message) for message in example.messages]
    return [*said, assistant_message(example.answer), {"role": "user", "content": question}]


def texts_of(answer: Answer) -> list[str]:
    """The texts between the special tokens of an emitted answer."""
    return _pieces(answer)[0]


def _pieces(answer: Answer) -> tuple[list[str], list[str]]:
    """Texts, and the special token behind each."""
    pieces, names = [], []
    if answer.reasoning is not None:
        pieces.append(answer.reasoning)
        names.append(_THINK_END)
    text = answer.content
    if answer.calls:
        blocks = [f"{text}\n\n<", "tool_calls>\n"]
        for call in answer.calls:
            blocks[-1] += "<"
            blocks.append(f'invoke name="{call.name}">\n')
            for key, value in call.arguments.items():
                is_text = isinstance(value, str)
                shown = value if is_text else json.dumps(value, ensure_ascii=False)
                blocks[-1] += "<"
                blocks += [f'parameter name="{key}" string="{str(is_text).lower()}">{shown}</', "parameter>\n"]
            blocks[-1] += "</"
            blocks.append("invoke>\n")
        blocks[-1] += "</"
        pieces += blocks
        names += [DSML] * len(blocks)
        text = "tool_calls>"
    return [*pieces, text], [*names, EOS]


def _earlier_turns(tokenizer: Tokenizer, prompt: Prompt) -> list[tuple[int, int]]:
    """Of each assistant turn of the history, the range that the model once emitted: behind the token that opens its
    reasoning or its content, up to EOS."""
    ids = prompt.token_ids
    ends = np.flatnonzero(ids == tokenizer.required_id(EOS))
    opened = np.flatnonzero(ids == tokenizer.required_id(ASSISTANT))
    # The last one opens the answer.
    return [(int(start) + 2, int(end) + 1) for start, end in zip(opened[:-1], ends, strict=True)]
