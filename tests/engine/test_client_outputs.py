"""Outputs of several steps that a slow reader gets as one, and a death behind them."""

import asyncio

import pytest

from engine.client import EngineDeadError, RequestOutput, joined
from engine.clients import StreamingClient
from engine.messages import AddRequest, LogprobRow, SamplingParams, ToEngine, pack_ids

ROWS = tuple(LogprobRow(-float(n), (), ()) for n in range(3))


def test_several_outputs_as_one() -> None:
    first = RequestOutput(token_ids=(1,), cached_tokens=7, miss_reason="cold", logprobs=ROWS[:1], queued_seconds=0.5)
    second = RequestOutput(token_ids=(2,), logprobs=ROWS[1:2])
    last = RequestOutput(token_ids=(3,), logprobs=ROWS[2:], finish_reason="stop", stop_token_id=3)
    assert joined([first, second, last]) == RequestOutput(
        token_ids=(1, 2, 3),
        cached_tokens=7,
        miss_reason="cold",
        logprobs=ROWS,
        queued_seconds=0.5,
        finish_reason="stop",
        stop_token_id=3,
    )
    assert joined([second]) == second


class Silent(StreamingClient):
    """Sends nothing anywhere."""

    def _send(self, message: ToEngine) -> None:
        del message

    async def close(self) -> None:
        self._die("closed")


def test_what_came_before_a_death_is_read_first() -> None:
    async def main() -> None:
        client = Silent()
        request = AddRequest(request_id="r", prompt_token_ids=pack_ids([1]), sampling=SamplingParams())
        outputs = client.submit(request)
        reading = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(0)
        for n in range(3):
            client._streams["r"].put_nowait(RequestOutput(token_ids=(n,)))
        await client.close()
        assert (await reading).token_ids == (0, 1, 2)
        with pytest.raises(EngineDeadError, match="closed"):
            await anext(outputs)

    asyncio.run(main())
