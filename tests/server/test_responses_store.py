"""Kept responses: whose they are, how long they stay, and that the bytes are counted right."""

import asyncio
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import ApiError
from server.protocol.responses_store import EventLog, ResponseStore, Stored

TTL = 100.0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make(max_bytes: int = 10**6) -> tuple[ResponseStore, Clock]:
    clock = Clock()
    return ResponseStore(max_bytes=max_bytes, ttl=TTL, clock=clock), clock


def keep(store: ResponseStore, name: str, key: str = "k", *, previous: Stored | None = None, size: int = 10) -> Stored:
    response = {"id": name, "output": [{"type": "message", "text": "o" * size}]}
    stored = store.open(name, key, [{"id": f"in_{name}"}], snapshot=lambda: response, previous=previous)
    store.finish(stored)
    return stored


def counted(stored: list[Stored]) -> int:
    turns = {id(turn): len(turn.items) for one in stored for turn in one.turns}
    return sum(turns.values()) + sum(len(one.response) + one.num_logged for one in stored)


def test_another_key_finds_nothing() -> None:
    store, _ = make()
    keep(store, "a", "one")
    assert msgspec.json.decode(store.find("a", "one").body())["id"] == "a"
    for name, key in (("a", "two"), ("b", "one")):
        with pytest.raises(ApiError) as caught:
            store.find(name, key)
        assert (caught.value.status, caught.value.code) == (404, "response_not_found")
        with pytest.raises(ApiError) as caught:
            store.find_previous(name, key)
        assert (caught.value.status, caught.value.param) == (400, "previous_response_id")


def test_responses_expire() -> None:
    store, clock = make()
    keep(store, "a")
    clock.now = TTL / 2
    keep(store, "b")
    clock.now = TTL
    with pytest.raises(ApiError):
        store.find("a", "k")
    store.find("b", "k")
    clock.now = 2 * TTL
    with pytest.raises(ApiError):
        store.find("b", "k")
    assert (len(store), store.num_bytes) == (0, 0)


def test_the_oldest_go_when_there_is_no_room() -> None:
    store, _ = make(max_bytes=1000)
    for n in range(20):
        keep(store, str(n), size=100)
    assert 0 < len(store) < 20
    assert store.num_bytes <= 1000
    store.find("19", "k")
    with pytest.raises(ApiError):
        store.find("0", "k")
    keep(store, "huge", size=2000)
    assert (len(store), store.num_bytes) == (0, 0)


def test_a_conversation_shares_its_turns_and_outlives_its_beginning() -> None:
    store, _ = make()
    first = keep(store, "a", size=1000)
    alone = store.num_bytes
    second = keep(store, "b", previous=first, size=10)
    assert store.num_bytes < alone + 300
    assert second.input_items() == [{"id": "in_b"}]
    store.delete(first)
    with pytest.raises(ApiError):
        store.find("a", "k")
    assert [item.get("id") for item in second.conversation()] == ["in_a", None, "in_b", None]
    assert store.num_bytes == counted([second])


def test_a_running_response_stays_and_cannot_be_continued() -> None:
    store, clock = make(max_bytes=50)
    stored = store.open("a", "k", [], snapshot=lambda: {"id": "a", "output": []})
    clock.now = 10 * TTL
    assert store.find("a", "k") is stored
    with pytest.raises(ApiError, match="in progress"):
        store.find_previous("a", "k")
    store.finish(stored)
    assert store.find_previous("a", "k") is stored
    clock.now += TTL
    with pytest.raises(ApiError):
        store.find("a", "k")


def test_one_that_was_deleted_while_it_ran_is_not_kept() -> None:
    store, _ = make()
    stored = store.open("a", "k", [{"id": "x"}], snapshot=lambda: {"output": []}, log=None)
    store.delete(stored)
    store.finish(stored)
    assert (len(store), store.num_bytes) == (0, 0)


@given(st.lists(st.tuples(st.sampled_from(["keep", "continue", "delete", "log", "wait"]), st.integers(0, 400))))
def test_every_byte_is_counted_once(operations: list[tuple[str, int]]) -> None:
    async def main() -> None:
        store, clock = make(max_bytes=1500)
        kept: dict[str, Stored] = {}
        for n, (what, size) in enumerate(operations):
            alive = [one for one in kept.values() if one.response_id in store._stored]
            match what:
                case "keep":
                    kept[str(n)] = keep(store, str(n), size=size)
                case "continue" if alive:
                    kept[str(n)] = keep(store, str(n), previous=alive[size % len(alive)], size=size)
                case "delete" if alive:
                    store.delete(alive[size % len(alive)])
                case "log":
                    response: dict[str, Any] = {"output": []}
                    log = EventLog()
                    kept[str(n)] = store.open(str(n), "k", [], snapshot=lambda r=response: r, log=log)
                    store.log(kept[str(n)], b"x" * size)
                    store.finish(kept[str(n)])
                case "wait":
                    clock.now += size / 4
            assert store.num_bytes == counted(list(store._stored.values()))
            assert store.num_bytes <= store.max_bytes

    asyncio.run(main())


def test_a_log_is_read_from_anywhere_while_it_grows() -> None:
    async def main() -> None:
        log = EventLog()
        log.append(b"0")
        readers = [asyncio.create_task(read(log, start)) for start in (0, 1, 3, 9)]
        for n in (b"1", b"2", b"3"):
            await asyncio.sleep(0)
            log.append(n)
        log.close()
        assert await asyncio.gather(*readers) == [b"0123", b"123", b"3", b""]
        assert await read(log, 2) == b"23"

    async def read(log: EventLog, start: int) -> bytes:
        return b"".join([event async for event in log.follow(start)])

    asyncio.run(main())
