"""25,000 operations against an engine whose rows are tags: every row that is read is the row that was meant."""

import logging
from collections import Counter

import pytest
from symbolic.driver import EPISODE_OPS, EPISODES, Episode, run_episode
from symbolic.exact_replay import replay_is_exact
from symbolic.mutants import narrow_replay, window_replay
from symbolic.traffic import MODEL, Kind

from model.kv_layout import replay_layers


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("engine").setLevel(logging.CRITICAL)


@pytest.mark.parametrize(("kind", "seed"), [(kind, seed) for kind, count in EPISODES.items() for seed in range(count)])
def test_no_row_is_read_that_was_not_meant(kind: Kind, seed: int) -> None:
    run_episode(Episode.draw(seed, EPISODE_OPS, kind), shrink_seconds=5.0)


def test_the_traffic_orders_every_kind_of_move() -> None:
    orders: Counter[str] = Counter()
    for kind in EPISODES:
        for seed in range(2):
            run = run_episode(Episode.draw(seed, 2 * EPISODE_OPS, kind), shrink_seconds=5.0)
            orders.update(run.device.num_orders)
            orders["preemptions"] += run.scheduler.totals.num_preemptions
    assert min(orders.values()) >= 5 and len(orders) == 7, orders


@pytest.mark.parametrize("position", [1, 3, 4, 127, 128, 129, 255, 256, 500, 641, 1023, 1024, 1027, 1500])
def test_the_triangle_of_a_replay_is_exactly_large_enough(position: int) -> None:
    layers = replay_layers(MODEL, position)
    assert replay_is_exact(MODEL, position, layers)
    assert replay_is_exact(MODEL, position, narrow_replay(MODEL, position)) == (layers[0].start == 0)
    whole = all(layer.start == 0 for layer in layers)
    assert replay_is_exact(MODEL, position, window_replay(MODEL, position)) == whole
