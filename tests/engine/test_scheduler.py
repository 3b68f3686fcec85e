"""What the scheduler plans and how requests end, on the books alone: results are written by hand."""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from engine.messages import AddRequest, StepOutputs, pack_ids, unpack_ids
from engine.plan import StepPlan, StepResult
from engine.request import InvalidRequestError, Request, RequestStatus
from engine.scheduler import Scheduler

MakeRequest = Callable[..., Request]
MakeScheduler = Callable[..., Scheduler]


def result_of(plan: StepPlan, token_id: int = 5, **fields: Any) -> StepResult:
    """Every request that samples gets `token_id`."""
    ids = tuple(s.request_id for s in plan.scheduled if s.samples)
    fields.setdefault("request_ids", ids)
    count = len(fields["request_ids"])
    return StepResult(step_id=plan.step_id, token_ids=(token_id,) * count, logprobs=(None,) * count, **fields)


def run_step(scheduler: Scheduler, now: float = 0.0, token_id: int = 5) -> tuple[StepPlan, StepOutputs]:
    plan = scheduler.schedule(now)
    outputs = scheduler.update(plan, result_of(plan, token_id), now)
    scheduler.check()
    return plan, outputs


def rows(plan: StepPlan) -> list[tuple[str, int, int]]:
    return [(s.request_id, s.start, s.start + s.num_tokens) for s in plan.scheduled]


def ends(outputs: StepOutputs) -> dict[str, str | None]:
    return dict(zip(outputs.request_ids, outputs.finish, strict=True))


def add_all(scheduler: Scheduler, requests: Iterable[Request]) -> None:
    for request in requests:
        scheduler.add(request)


def assert_idle(scheduler: Scheduler) -> None:
    scheduler.check()
    assert not scheduler.requests
    assert scheduler.kv.num_available_pages == scheduler.config.num_pages
    assert scheduler.kv.num_free_slots == scheduler.config.max_num_seqs


def test_a_request_is_known_once_then_named(make_scheduler: MakeScheduler, make_request: MakeRequest) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 10, max_tokens=3))
    plan, outputs = run_step(scheduler)
    assert [n.request_id for n in plan.new] == ["a"] and plan.new[0].num_prompt_tokens == 10
    assert rows(plan) == [("a", 0, 10)] and plan.scheduled[0].samples and len(plan.scheduled[0].new_page_ids) == 1
    assert unpack_ids(outputs.token_ids).tolist() == [5]
    plan, _ = run_step(scheduler)
    assert plan.new == () and rows(plan) == [("a", 10, 11)] and plan.scheduled[0].new_page_ids == ()
    plan, outputs = run_step(scheduler)
    assert ends(outputs) == {"a": "length"}
    assert_idle(scheduler)
    plan, outputs = run_step(scheduler)
    assert plan.finished == ("a",) and plan.scheduled == () and plan.step_id == 4
    assert not scheduler.has_work
    assert run_step(scheduler)[0] == StepPlan(step_id=4)


def test_chunks_end_at_multiples_of_128_and_prompts_share_a_step(
    make_scheduler: MakeScheduler, make_request: MakeRequest
) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=400)
    add_all(scheduler, [make_request("a", 700), make_request("b", 300), make_request("c", 5)])
    assert rows(run_step(scheduler)[0]) == [("c", 0, 5), ("b", 0, 300), ("a", 0, 95)]
    assert rows(run_step(scheduler)[0]) == [("c", 5, 6), ("b", 300, 301), ("a", 95, 384)]
    assert rows(run_step(scheduler)[0]) == [("c", 6, 7), ("b", 301, 302), ("a", 384, 700)]


def test_a_chunk_of_a_few_rows_is_not_worth_a_slot(make_scheduler: MakeScheduler, make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=330)
    add_all(scheduler, [make_request("b", 300), make_request("a", 700)])
    assert rows(run_step(scheduler)[0]) == [("b", 0, 300)]
    assert scheduler.num_waiting == 1


def test_a_chunk_ends_where_a_snapshot_is_wanted(make_scheduler: MakeScheduler, make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=256)
    scheduler.add(make_request("a", 700, snapshot_positions=pack_ids([5, 128, 600, 697])))
    ends_at = [rows(run_step(scheduler)[0])[0][2] for _ in range(7)]
    assert ends_at == [5, 128, 384, 600, 697, 700, 701]


def test_due_decode_rows_come_first(make_scheduler: MakeScheduler, make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=130)
    add_all(scheduler, [make_request(i, 4, max_tokens=50) for i in "abc"])
    run_step(scheduler)
    scheduler.add(make_request("urgent", 1000, priority=-5))
    for _ in range(5):
        plan, _ = run_step(scheduler)
        assert [s.request_id for s in plan.scheduled[:3]] == ["a", "b", "c"]
        assert plan.scheduled[3].request_id == "urgent" and plan.num_tokens <= 130


def test_priority_then_arrival_then_order_decides(make_scheduler: MakeScheduler, make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=128)
    scheduler.add(make_request("late", 128, arrival_time=2.0))
    scheduler.add(make_request("early", 128, arrival_time=1.0))
    scheduler.add(make_request("early2", 128, arrival_time=1.0))
    scheduler.add(make_request("urgent", 128, arrival_time=3.0, priority=-1))
    started = []
    for _ in range(4):
        plan, _ = run_step(scheduler)
        started += [n.request_id for n in plan.new]
    assert started == ["urgent", "early", "early2", "late"][: len(started)] and len(started) >= 3


def test_an_urgent_arrival_overtakes_a_running_prompt(make_scheduler: MakeScheduler, make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=256)
    scheduler.add(make_request("long", 3000))
    run_step(scheduler)
    scheduler.add(make_request("urgent", 200, priority=-1))
    assert rows(run_step(scheduler)[0]) == [("urgent", 0, 200), ("long", 256, 312)]


def test_admission_reserves_prompt_and_answer_and_passes_what_does_not_fit(
    make_scheduler: MakeScheduler, make_request: MakeRequest
) -> None:
    scheduler = make_scheduler(num_pages=8, max_num_batched_tokens=4096)
    add_all(
        scheduler,
        [
            make_request("a", 10, max_tokens=1000),  # 4 pages
            make_request("b", 10, max_tokens=1300),  # 6 pages: waits, however early it comes
            make_request("c", 10, max_tokens=10),  # fits, and passes b on credit
        ],
    )
    plan, outputs = run_step(scheduler)
    assert [r[0] for r in rows(plan)] == ["a", "c"]
    assert outputs.stats.num_free_pages == 3 and outputs.stats.num_waiting == 1 and outputs.stats.num_bypasses == 1
    scheduler.abort("a")
    assert [r[0] for r in rows(run_step(scheduler)[0])] == ["c", "b"]


def test_slots_bound_how_many_run(make_scheduler: MakeScheduler, make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    add_all(scheduler, [make_request(i, 4, max_tokens=2) for i in "abcd"])
    assert scheduler.num_waiting == 4
    run_step(scheduler)
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 2)
    run_step(scheduler)
    plan, _ = run_step(scheduler)
    assert set(plan.finished) == {"a", "b"} and {n.request_id for n in plan.new} == {"c", "d"}
    assert {n.slot for n in plan.new} == {0, 1}


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "text"),
    [(4096, 1, "The prompt has 4096 tokens; at most 4095"), (2000, 600, "2600 tokens (11 pages of 256)")],
)
def test_what_can_never_fit_is_told_so_with_numbers(
    make_scheduler: MakeScheduler, make_request: MakeRequest, num_prompt: int, max_tokens: int, text: str
) -> None:
    scheduler = make_scheduler(num_pages=10)
    scheduler.add(make_request("big", num_prompt, max_tokens=max_tokens))
    scheduler.add(make_request("small", 4, max_tokens=1))
    plan, outputs = run_step(scheduler)
    assert [r[0] for r in rows(plan)] == ["small"]
    error = outputs.errors[outputs.request_ids.index("big")]
    assert error is not None and error.code == "too_large" and text in error.message
    assert ends(outputs)["big"] == "error"


def test_max_model_len_caps_the_reservation_and_ends_the_answer(
    make_scheduler: MakeScheduler, make_request: MakeRequest
) -> None:
    scheduler = make_scheduler(num_pages=1, max_model_len=256)
    scheduler.add(make_request("a", 250, max_tokens=100_000))
    finish: dict[str, str | None] = {}
    for _ in range(6):
        assert finish.get("a") is None
        finish = ends(run_step(scheduler)[1])
    assert finish == {"a": "length"}
    assert_idle(scheduler)


def test_deadline_holds_while_queued_only(make_scheduler: MakeScheduler, make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    scheduler.add(make_request("a", 4, max_tokens=9, deadline=5.0))
    scheduler.add(make_request("b", 4, max_tokens=9, deadline=6.0, arrival_time=1.0))
    run_step(scheduler, now=1.0)
    assert ends(run_step(scheduler, now=5.5)[1]) == {"a": None}
    outputs = run_step(scheduler, now=6.0)[1]
    assert ends(outputs) == {"b": "error", "a": None}
    error = outputs.errors[0]
    assert error is not None and error.code == "deadline_exceeded" and "5.0 s" in error.message
    assert scheduler.num_waiting == 0


@pytest.mark.parametrize(
    ("sampling", "tokens", "finish", "stop_id"),
    [
        ({"max_tokens": 9}, [5, 1], "stop", 1),
        ({"max_tokens": 3, "ignore_eos": True}, [1, 1, 1], "length", None),
        ({"max_tokens": 9, "stop_token_ids": (6,)}, [5, 6], "stop", 6),
        ({"max_tokens": 9, "stop_token_ids": (6,), "min_tokens": 2}, [6, 1, 6], "stop", 6),
        ({"max_tokens": 9, "ignore_eos": True, "stop_token_ids": (1,)}, [1], "stop", 1),
        ({"max_tokens": 2}, [5, 1], "stop", 1),
        ({"max_tokens": 1}, [5], "length", None),
    ],
)
def test_why_an_answer_ends(
    make_scheduler: MakeScheduler,
    make_request: MakeRequest,
    sampling: dict[str, Any],
    tokens: list[int],
    finish: str,
    stop_id: int | None,
) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 4, **sampling))
    seen: list[int] = []
    for i, token_id in enumerate(tokens):
        _, outputs = run_step(scheduler, token_id=token_id)
        seen += unpack_ids(outputs.token_ids).tolist()
        assert ends(outputs) == {"a": finish if i + 1 == len(tokens) else None}
    assert outputs.stop_ids == (stop_id,) and seen == tokens
    assert_idle(scheduler)


def test_abort_in_every_state_twice_and_unknown(make_scheduler: MakeScheduler, make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=128, max_num_seqs=2)
    requests = [make_request("decoding", 4, max_tokens=99), make_request("prefill", 999), make_request("queued", 2000)]
    add_all(scheduler, requests)
    run_step(scheduler)
    run_step(scheduler)
    assert 0 < requests[1].num_computed_tokens < 999 and requests[2].status is RequestStatus.QUEUED
    for request_id in ("queued", "prefill", "decoding", "unknown"):
        scheduler.abort(request_id)
        scheduler.check()
        scheduler.abort(request_id)
        scheduler.check()
    assert_idle(scheduler)
    plan, outputs = run_step(scheduler)
    assert ends(outputs) == {"queued": "abort", "prefill": "abort", "decoding": "abort"}
    assert set(plan.finished) == {"prefill", "decoding"}
    assert run_step(scheduler)[1].request_ids == ()


def test_an_abort_in_flight_frees_after_its_step(make_scheduler: MakeScheduler, make_request: MakeRequest) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 300))
    plan = scheduler.schedule(0.0)
    scheduler.abort("a")
    scheduler.check()
    assert scheduler.kv.pages.num_free == 62 and scheduler.kv.num_free_slots == 7
    outputs = scheduler.update(plan, result_of(plan), 0.0)
    assert ends(outputs) == {"a": "abort"} and outputs.token_ids == b""
    assert scheduler.totals.num_dropped_results == 1
    assert_idle(scheduler)


def test_a_result_for_a_stranger_is_dropped_and_counted(
    make_scheduler: MakeScheduler, make_request: MakeRequest
) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a", 4))
    plan = scheduler.schedule(0.0)
    outputs = scheduler.update(plan, result_of(plan, request_ids=("stranger", "a")), 0.0)
    assert outputs.request_ids == ("a",) and scheduler.totals.num_dropped_results == 1


def test_one_failed_request_leaves_its_neighbours_alone(
    make_scheduler: MakeScheduler, make_request: MakeRequest
) -> None:
    scheduler = make_scheduler()
    add_all(scheduler, [make_request(i, 4) for i in ("good", "bad", "silent")])
    plan = scheduler.schedule(0.0)
    outputs = scheduler.update(plan, result_of(plan, request_ids=("good",), failed={"bad": "NaN logits"}), 0.0)
    assert ends(outputs) == {"good": None, "bad": "error", "silent": "error"}
    assert {e.code for e in outputs.errors if e is not None} == {"internal"}
    scheduler.check()
    assert run_step(scheduler)[0].finished == ("bad", "silent")


def test_a_step_smaller_than_the_slots_starts_only_what_it_can_keep_running(
    make_scheduler: MakeScheduler, make_request: MakeRequest
) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=3, max_num_seqs=8)
    add_all(scheduler, [make_request(str(i), 2, max_tokens=12, priority=-i % 3) for i in range(7)])
    decoding: set[str] = set()
    while scheduler.requests:
        plan, outputs = run_step(scheduler)
        assert plan.num_tokens <= 3
        assert decoding <= {s.request_id for s in plan.scheduled}, "a due decode row was left out"
        decoding |= {s.request_id for s in plan.scheduled if s.samples}
        decoding -= {request_id for request_id, finish in ends(outputs).items() if finish}
    assert_idle(scheduler)


def test_queued_seconds_and_totals(make_scheduler: MakeScheduler, make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_num_batched_tokens=256)
    scheduler.add(make_request("a", 300, max_tokens=2, arrival_time=10.0))
    run_step(scheduler, now=12.5)
    _, outputs = run_step(scheduler, now=13.0)
    assert outputs.queued_seconds == (2.5,)
    _, outputs = run_step(scheduler, now=14.0)
    assert (outputs.stats.prompt_tokens, outputs.stats.generation_tokens, outputs.stats.step_id) == (300, 2, 3)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": []}, "at least one token"),
        ({"prompt": [2048]}, "prompt token ids"),
        ({"prompt": [-1]}, "prompt token ids"),
        ({"stop_token_ids": (2048,)}, "stop and bias"),
        ({"logit_bias": {-1: 1.0}}, "stop and bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"snapshot_positions": b"abc"}, "four bytes"),
        ({"snapshot_positions": pack_ids([0, 2])}, "within the prompt"),
        ({"snapshot_positions": pack_ids([2, 9])}, "within the prompt"),
        ({"snapshot_positions": pack_ids([4, 4])}, "ascend"),
    ],
)
def test_ids_outside_the_logits_never_become_a_request(
    make_message: Callable[..., AddRequest], fields: dict[str, Any], text: str
) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        Request(make_message("a", **fields), vocab_size=2048, order=1, seed=0)


def test_tokens_known_are_kept_as_they_grow(make_request: MakeRequest) -> None:
    request = make_request("a", [3, 4])
    before = request.token_ids
    for token_id in range(500):
        request.append(token_id)
    assert request.token_ids.dtype == np.int32 and request.token_ids.tolist() == [3, 4, *range(500)]
    assert before.tolist() == [3, 4] and request.num_output_tokens == 500


def test_a_million_tokens_are_planned_in_milliseconds(make_scheduler: MakeScheduler, make_request: MakeRequest) -> None:
    scheduler = make_scheduler(max_model_len=1 << 20, num_pages=4096, max_num_batched_tokens=8192)
    scheduler.add(make_request("a", (1 << 20) - 16, max_tokens=16))
    num_steps = 0
    while scheduler.requests:
        run_step(scheduler)
        num_steps += 1
    assert num_steps == 128 + 15
    assert_idle(scheduler)


def test_schedule_is_fast_with_256_running_and_1000_waiting(
    make_scheduler: MakeScheduler, make_request: MakeRequest
) -> None:
    scheduler = make_scheduler(max_num_seqs=256, num_pages=2048, max_num_batched_tokens=8192)
    add_all(scheduler, [make_request(str(i), 20, max_tokens=1000, deadline=1e9) for i in range(1256)])
    seconds = []
    while scheduler.num_running < 256:
        run_step(scheduler)
    for _ in range(60):
        began = time.thread_time()
        plan = scheduler.schedule(0.0)
        seconds.append(time.thread_time() - began)
        assert len(plan.scheduled) == 256 and scheduler.num_waiting == 1000
        scheduler.update(plan, result_of(plan), 0.0)
    median = statistics.median(seconds)
    assert median < 1e-3, f"{median * 1e6:.0f} us"
