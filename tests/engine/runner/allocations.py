"""What a step allocates on the CPU: torch's own account of its allocator, kept by the profiler."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocations(run: Callable[[], object]) -> tuple[int, int]:
    """(most bytes that were held at once, bytes that are still held) of those that `run` took."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler
    assert results is not None
    held = most = 0
    for event in results.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most, held
