"""Prompts of completions: texts, token ids, and the form that fills in the middle. No template and no BOS is added."""

import numpy as np

from server.errors import bad_request
from server.protocol.completions import CompletionBody, TextOrIds
from server.routes.call import check_text_length
from server.state import Serving
from server.text.tokenizer import Tokenizer
from server.validation import END_OF_REASONING, check_token_ids, truncated

FIM_BEGIN, FIM_HOLE, FIM_END = (f"<｜fim▁{part}｜>" for part in ("begin", "hole", "end"))
_REASONING = "<think>"


def encode_prompts(serving: Serving, body: CompletionBody) -> list[np.ndarray]:
    """int32 ids of each prompt.

    Text is plain text: a spelling of a special token becomes that token only with `parse_special`.

    Raises:
        ApiError: 400 for an empty prompt, an id that the model does not have, or a text that is too long.
    """
    encoded = []
    for n, prompt in enumerate(body.prompt):
        param = f"prompt[{n}]" if len(body.prompt) > 1 else "prompt"
        if body.suffix:
            assert isinstance(prompt, str)
            ids = np.asarray(_fill_in(serving, body, prompt, param), dtype=np.int32)
        else:
            ids = np.asarray(_encode(serving, body, prompt, param), dtype=np.int32)
            ids = truncated(ids, body, serving.max_request_tokens, body.max_tokens)
        if not len(ids):
            raise bad_request(f"{param} must not be empty.", param=param)
        encoded.append(ids)
    return encoded


def echoed_text(serving: Serving, body: CompletionBody, index: int, prompt_ids: np.ndarray) -> str:
    """The prompt as an answer with `echo` repeats it: what was read of it, without the suffix."""
    prompt = body.prompt[index]
    if isinstance(prompt, str) and body.truncate_prompt_tokens is None:
        return prompt
    return serving.tokenizer.decode(prompt_ids.tolist())


def ends_in_reasoning(prompt_ids: np.ndarray, tokenizer: Tokenizer) -> bool:
    """Whether reasoning was opened in the prompt and not closed."""
    opened = np.flatnonzero(prompt_ids == tokenizer.required_id(_REASONING))
    closed = np.flatnonzero(prompt_ids == tokenizer.required_id(END_OF_REASONING))
    return len(opened) > 0 and (len(closed) == 0 or opened[-1] > closed[-1])


def _encode(serving: Serving, body: CompletionBody, prompt: TextOrIds, param: str) -> list[int]:
    if isinstance(prompt, str):
        truncates = body.truncate_prompt_tokens is not None
        check_text_length(serving, [prompt], special=body.parse_special, param=param, truncates=truncates)
        return serving.tokenizer.encode(prompt, special=body.parse_special)
    check_token_ids(prompt, serving.info.vocab_size, param)
    return prompt


def _fill_in(serving: Serving, body: CompletionBody, prompt: str, param: str) -> list[int]:
    """`<｜fim▁begin｜>` prompt `<｜fim▁hole｜>` suffix `<｜fim▁end｜>`, as the peers serve it (chat-protocol 4.6)."""
    assert body.suffix is not None
    begin, hole, end = (serving.tokenizer.special_id(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END))
    if begin is None or hole is None or end is None:
        raise bad_request("suffix: this model's tokenizer has no fill-in-the-middle tokens.", param="suffix")
    check_text_length(serving, [prompt, body.suffix], special=body.parse_special, param=param)
    before = serving.tokenizer.encode(prompt, special=body.parse_special)
    after = serving.tokenizer.encode(body.suffix, special=body.parse_special)
    return [begin, *before, hole, *after, end]
