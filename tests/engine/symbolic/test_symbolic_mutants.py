"""Every trap that the design can fall into is found when somebody falls into it: engine, device and clockwork broken in
one line each."""

import logging

import pytest
from symbolic.driver import EPISODE_OPS, EPISODES, Episode, MakeDevice, Run
from symbolic.mutants import DEVICE, ENGINE, Mutant
from symbolic.traffic import Kind


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("engine").setLevel(logging.CRITICAL + 1)


def found(kind: Kind, **how: MakeDevice) -> bool:
    """Within the episodes that pass while nothing is broken (`test_symbolic_device`)."""
    for seed in range(EPISODES[kind]):
        run = Run(Episode.draw(seed, EPISODE_OPS, kind), **how)
        try:
            run.all()
        except Exception:
            return True
    return False


@pytest.mark.parametrize("mutant", ENGINE, ids=lambda m: f"{m.trap} {m.what}")
def test_a_broken_engine_is_found(mutant: Mutant) -> None:
    with mutant.active():
        assert found(mutant.kind)


@pytest.mark.parametrize("device", DEVICE)
def test_a_broken_device_is_found(device: MakeDevice) -> None:
    assert found("plain", make_device=device) or found("full", make_device=device)
