"""20,000 operations against an engine whose rows are tags: every row that is read is the row that was meant."""

import logging

import pytest
from symbolic.driver import Episode, run_episode

from engine.kv.grant import Moves
from engine.kv.manager import KVManager

EPISODES, OPS = 50, 400


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("engine").setLevel(logging.CRITICAL)


@pytest.mark.parametrize("seed", range(EPISODES))
def test_no_row_is_read_that_was_not_meant(seed: int) -> None:
    run_episode(Episode.draw(seed, OPS), shrink_seconds=5.0)


@pytest.mark.parametrize("forgotten", ["page_copies", "slot_restores"])
def test_a_forgotten_move_is_noticed(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seal = KVManager.seal

    def forgetful(self: KVManager) -> Moves:
        moves = seal(self)
        getattr(moves, forgotten).clear()
        return moves

    monkeypatch.setattr(KVManager, "seal", forgetful)
    with pytest.raises(AssertionError):
        _run_many(20)


def _run_many(count: int) -> None:
    for seed in range(count):
        run_episode(Episode.draw(seed, OPS, faulty=False), shrink_seconds=0.0)
