"""Log probabilities of a chat's prompt: seen in the events of its first choice, told beside the whole answer."""

from contextlib import aclosing

import numpy as np

from engine.messages import PromptLogprobColumns
from server.chat_run import Events
from server.protocol import sse
from server.protocol.completion_logprobs import PromptScores
from server.state import Serving


class PromptScoresSeen:
    """Of one request, which wants the `num_top` likeliest tokens beside each of its prompt's, or nothing (None)."""

    def __init__(self, num_top: int | None) -> None:
        self.columns: PromptLogprobColumns | None = None
        self._num_top = num_top

    def watch(self, events: Events) -> Events:
        """The same events."""
        return events if self._num_top is None else self._watched(events)

    def added_to(self, answer: bytes, serving: Serving, prompt_ids: np.ndarray) -> bytes:
        """A JSON object with the member `prompt_logprobs` more."""
        assert self.columns is not None and self._num_top is not None and answer.endswith(b"}")
        rows = PromptScores(prompt_ids, self.columns, serving.tokenizer).by_id(self._num_top)
        return answer[:-1] + b',"prompt_logprobs":' + sse.json_bytes(rows) + b"}"

    async def _watched(self, events: Events) -> Events:
        async with aclosing(events):
            async for event in events:
                self.columns = event.prompt_logprobs or self.columns
                yield event
