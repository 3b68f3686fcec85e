"""The queue's bounds, with a clock of our own."""

import asyncio
import contextlib
import random
from typing import Any

import pytest

from server.admission import Admission, Ticket
from server.config import ServerConfig
from server.errors import ApiError


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def refused(admission: Admission, key: str = "k", tokens: int = 1) -> ApiError:
    with pytest.raises(ApiError) as caught:
        admission.enter(key, tokens)
    assert int(caught.value.headers["Retry-After"]) >= 1
    return caught.value


def test_bound_on_requests() -> None:
    admission = Admission(max_queued_requests=2)
    first, second = admission.enter("a", 10), admission.enter("b", 10)
    assert refused(admission).status == 503
    first.started()
    third = admission.enter("c", 10)
    assert refused(admission).status == 503
    assert (admission.queued_requests, admission.in_flight) == (2, 3)
    for ticket in (first, second, third, first):
        ticket.close()
    assert (admission.queued_requests, admission.queued_tokens, admission.in_flight) == (0, 0, 0)


def test_bound_on_tokens() -> None:
    admission = Admission(max_queued_requests=100, max_queued_tokens=1000)
    huge = admission.enter("a", 5000)
    assert refused(admission).status == 503
    huge.count(900)
    assert refused(admission, tokens=101).status == 503
    small = admission.enter("a", 100)
    assert admission.queued_tokens == 1000
    huge.started()
    huge.count(7)
    assert admission.queued_tokens == 100
    small.close()
    assert admission.queued_tokens == 0


def test_bound_on_a_key() -> None:
    admission = Admission(max_queued_requests=100, max_requests_per_key=2)
    tickets = [admission.enter("a", 1), admission.enter("a", 1)]
    tickets[0].started()
    error = refused(admission, "a")
    assert (error.status, error.code) == (429, "rate_limit_exceeded")
    admission.enter("b", 1)
    tickets[0].close()
    admission.enter("a", 1)


def test_retry_after_follows_the_rate() -> None:
    clock = Clock()
    admission = Admission(max_queued_requests=10**6, clock=clock)
    assert admission.retry_after(0) == 1
    assert admission.retry_after(7) == 7
    for _ in range(20):
        clock.now += 0.5
        admission.enter("a", 1).started()
    assert admission.retry_after(20) in (9, 10, 11)
    assert admission.retry_after(10**6) == 60
    clock.now += 31
    assert admission.retry_after(3) == 3


def test_retry_after_is_the_engines_own_estimate() -> None:
    admission = Admission(max_queued_requests=10, clock=Clock())
    admission.drain_seconds = lambda: 12.2
    assert admission.retry_after(1) == 13
    admission.drain_seconds = lambda: 1e6
    assert admission.retry_after(1) == 60
    admission.drain_seconds = lambda: 0.0
    assert admission.retry_after(4) == 4


def test_books_balance_under_random_use() -> None:
    chance = random.Random(1)
    admission = Admission(max_queued_requests=20, max_queued_tokens=500, max_requests_per_key=9)
    tickets: list[Ticket] = []
    for _ in range(5000):
        match chance.randrange(4):
            case 0:
                with contextlib.suppress(ApiError):
                    tickets.append(admission.enter(chance.choice("abc"), chance.randrange(100)))
            case 1 if tickets:
                chance.choice(tickets).started()
            case 2 if tickets:
                chance.choice(tickets).count(chance.randrange(200))
            case 3 if tickets:
                chance.choice(tickets).close()
        assert 0 <= admission.queued_requests <= min(20, admission.in_flight)
        assert admission.queued_tokens >= 0
    for ticket in tickets:
        ticket.close()
    assert (admission.queued_requests, admission.queued_tokens, admission.in_flight) == (0, 0, 0)
    asyncio.run(asyncio.wait_for(admission.wait_idle(), 1))


def test_a_full_server_sheds_and_recovers(serving: Any) -> None:
    config = ServerConfig(max_queued_requests=4)

    async def main() -> None:
        async with serving(answer="x" * 30, config=config, max_num_seqs=2, step_seconds=0.001) as server:
            answers = await asyncio.gather(*(server.complete(max_tokens=40) for _ in range(60)))
            statuses = [a.status_code for a in answers]
            assert set(statuses) == {200, 503}
            assert statuses.count(200) >= 4
            for answer in answers:
                if answer.status_code == 503:
                    assert int(answer.headers["retry-after"]) >= 1
                    assert answer.json()["error"]["code"] == "server_overloaded"
            await server.idle()
            assert (await server.complete()).status_code == 200
            text = (await server.http.get("/metrics")).text
            assert f'fathom_admission_rejections_total{{code="503"}} {float(statuses.count(503))}' in text

    asyncio.run(main())


def test_a_request_that_waits_too_long_gets_503(serving: Any) -> None:
    config = ServerConfig(queue_timeout=0.1)

    async def main() -> None:
        async with serving(config=config, max_num_seqs=1, step_seconds=0.005) as server:
            long = asyncio.create_task(server.complete(max_tokens=100, ignore_eos=True))
            await asyncio.sleep(0.02)
            late, streamed = await asyncio.gather(server.complete(), server.complete(stream=True))
            assert late.status_code == 503
            assert late.json()["error"]["code"] == "deadline_exceeded"
            assert int(late.headers["retry-after"]) >= 1
            assert '"code":"deadline_exceeded"' in streamed.text
            assert "[DONE]" not in streamed.text
            assert (await long).status_code == 200
            await server.idle()

    asyncio.run(main())
