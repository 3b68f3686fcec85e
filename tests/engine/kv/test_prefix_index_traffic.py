"""Random traffic: the prefix index agrees with dictionaries keyed by whole prefixes, after every step."""

import random

import pytest
from kv.twin import World


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_agrees_with_dictionaries(seed: int) -> None:
    rng = random.Random(1000 + seed)
    world = World(seed, num_pages=rng.choice([12, 24, 40]), num_host_pages=rng.choice([0, 3, 10, 40]))
    for _ in range(250):
        world.now += rng.expovariate(0.3)
        for _ in range(rng.randint(0, 2)):
            salt, tokens = world.new_prompt()
            if len(world.running) < 6:
                world.start(salt, list(tokens))
            else:
                world.probe(salt, list(tokens))
        if world.asleep and rng.random() < 0.3:
            world.wake()
        if rng.random() < 0.1:
            world.evict(rng.randint(1, 4))
        world.run_step()
        world.check()
        for request in list(world.running):
            if rng.random() < 0.12:
                sleep = rng.random() < 0.2 and len(world.asleep) < 3
                world.finish(request, publish=sleep or rng.random() < 0.8, sleep=sleep)
                world.check()
    while world.running:
        world.finish(world.running[0], publish=True)
    for _, _, tip in world.asleep:
        world.tree.unpin(tip)
    world.asleep = []
    world.check()
    world.evict(world.num_pages)
    assert len(world.free) == world.num_pages and world.tree.num_device_pages == 0
    assert all(world.counts[name] > 5 for name in ("hits", "copies", "drops")), world.counts
    if world.num_host_pages:
        assert world.counts["spills"] > 5, world.counts
