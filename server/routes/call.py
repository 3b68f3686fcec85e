"""What the routes do first: find the state, read a body, settle how many tokens may be generated."""

import asyncio
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from starlette.requests import Request

from server import limits
from server.errors import ApiError, context_exceeded
from server.middleware import context_of
from server.protocol.common import Body
from server.state import ServerState, Serving

B = TypeVar("B", bound=Body)
T = TypeVar("T")

LARGE_BYTES = 64 * 1024
"""Work on more text than this leaves the event loop, so that other streams go on."""
_BYTES_PER_TOKEN = 4
_SLICE_CHARS = 2**18
_CUT_TOKENS = 64
_TRUNCATED_CHARS = 2**20


def state_of(request: Request) -> ServerState:
    state = request.app.state.fathom
    assert isinstance(state, ServerState)
    return state


async def read_body(request: Request, kind: type[B]) -> tuple[B, int]:
    """The validated body and its size in bytes. Raises ApiError 400 or 415."""
    limits.check_content_type(request.scope["headers"])
    raw = await request.body()
    body, unknown = await off_loop(len(raw), lambda: kind.read(raw))
    if unknown:
        state_of(request).metrics.unknown_fields.inc(len(unknown))
        context_of(request.scope).ignored_fields = unknown
    return body, len(raw)


@contextmanager
def renamed_params(names: Mapping[str, str]) -> Iterator[None]:
    """ApiErrors that blame a field of a chat request blame the field of the API in use: `names` has the pairs."""
    try:
        yield
    except ApiError as error:
        if error.param is not None:
            head = re.split(r"[.\[]", error.param, maxsplit=1)[0]
            error.param = names.get(head, head) + error.param[len(head) :]
        raise


async def off_loop(num_bytes: int, work: Callable[[], T]) -> T:
    """Run `work` here when it is small and in a thread when it is not."""
    return await asyncio.to_thread(work) if num_bytes > LARGE_BYTES else work()


def estimated_tokens(num_bytes: int) -> int:
    """What a body probably holds, for the queue's bounds before anything is tokenised."""
    return num_bytes // _BYTES_PER_TOKEN + 1


def check_text_length(
    serving: Serving, texts: Iterable[str], *, special: bool, param: str, truncates: bool = False
) -> None:
    """Refuse text that is far too long before it is tokenised as a whole, which takes some 400 bytes for each token.

    A text of no more characters than the context has tokens passes unseen; a longer one is counted slice by slice.
    With `truncates` a prompt may be longer than the context, but not without bound.

    Raises:
        ApiError: 400 context_length_exceeded.
    """
    texts = list(texts)
    limit = max(serving.max_request_tokens, _TRUNCATED_CHARS if truncates else 0)
    if sum(map(len, texts)) <= limit:
        return
    least = 0
    for text in texts:
        for start in range(0, len(text), _SLICE_CHARS):
            # A cut can split tokens, so a slice may count a few more than the whole would.
            count = len(serving.tokenizer.encode(text[start : start + _SLICE_CHARS], special=special))
            least += max(0, count - _CUT_TOKENS)
            if least > limit:
                raise context_exceeded(limit, least, 1, param=param)


def completion_budget(
    serving: Serving,
    prompt_tokens: int,
    requested: int | None,
    default: int,
    *,
    param: str,
    limit_param: str,
    lowers: bool = False,
) -> int:
    """max_tokens of a request: what it asks for, or `default` clipped to the room that the prompt leaves (at least 1).

    `lowers`: an explicit number is clipped as well.

    Raises:
        ApiError: 400 context_length_exceeded; `param` is blamed for the prompt, `limit_param` for an explicit number.
    """
    limit = serving.max_request_tokens
    room = limit - prompt_tokens
    if room < 1:
        raise context_exceeded(limit, prompt_tokens, requested or 1, param=param)
    if requested is None:
        return min(default, room)
    if requested > room and lowers:
        return room
    if requested > room:
        raise context_exceeded(limit, prompt_tokens, requested, param=limit_param)
    return requested
