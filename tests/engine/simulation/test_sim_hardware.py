"""The simulated machine against the roofline tables of the fact sheet."""

import pytest

from engine.cost_model import CostModel, StepFeatures, cost_prior
from engine.plan import PageCopy, ScheduledTokens, StepPlan
from engine.simulation.hardware import GPUS, FittedMachine, Machine, StepWork, gpu, simulated_config
from model.config import ModelConfig
from model.presets import preset

FLASH, PRO = preset("flash"), preset("pro")


def machine(model: ModelConfig, card: str = "h200", efficiency: float | None = 1.0) -> Machine:
    layout = simulated_config(model, kv_bytes=80 << 30).layout(model)
    return Machine(model, layout, gpu(card, efficiency=efficiency))


def step_ms(m: Machine, batch: int, context: int) -> float:
    work = StepWork(decode_contexts=[context] * batch, num_sampled=batch)
    return 1e3 * (m.step_seconds(work) - m.card.step_seconds)


# Microseconds for each layer: sliding, CSA, HCA, and the head (performance 4), FP8 and FP4 weights, FP8 rows.
@pytest.mark.parametrize(
    ("batch", "context", "layers"),
    [
        (1, 8 << 10, (50.8, 57.9, 52.7, 246)),
        (1, 1 << 20, (50.8, 66.3, 54.1, 246)),
        (16, 8 << 10, (286, 295, 288, 246)),
        (64, 8 << 10, (665, 681, 668, 246)),
        (64, 128 << 10, (665, 745, 676, 246)),
        (256, 8 << 10, (875, 920, 880, 343)),
        (256, 1 << 20, (875, 3088, 1219, 343)),
    ],
)
def test_decode_steps_of_flash_on_an_h200(batch: int, context: int, layers: tuple[float, ...]) -> None:
    sliding, csa, hca, head = layers
    expected = (2 * sliding + 21 * csa + 20 * hca + head) / 1e3
    assert step_ms(machine(FLASH), batch, context) == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize(("context", "milliseconds"), [(8 << 10, 6.2), (128 << 10, 9.5), (1 << 20, 33.5)])
def test_prompt_chunks_of_flash_on_an_h200(context: int, milliseconds: float) -> None:
    """A CSA layer under 8,192 rows, as the difference of two machines that differ by CSA layers only."""
    few, many = (preset(f"flash-slice-{n}") for n in (3, 4))
    assert len(many.layers_of("csa")) == 2 and len(many.layers_of("hca")) == len(few.layers_of("hca")) == 1
    work = StepWork(chunks=[(context - 8192, 8192)])
    one = machine(many).step_seconds(work) - machine(few).step_seconds(work)
    assert 1e3 * (one - machine(few).card.launch_seconds) == pytest.approx(milliseconds, rel=0.1)


@pytest.mark.parametrize(("model", "petaflop"), [(FLASH, 87.5), (PRO, 213.5)])
def test_a_cold_million(model: ModelConfig, petaflop: float) -> None:
    """Architecture 5.3: between all of it at the FP8 rate and all of it at half the BF16 rate."""
    seconds = machine(model).prefill_seconds(0, 1 << 20)
    assert petaflop / 1.5 < seconds < 2 * petaflop / 0.79


def test_the_usual_efficiency_is_the_rate_of_the_fact_sheet() -> None:
    seconds = machine(FLASH, efficiency=None).prefill_seconds(0, 1_000_000)
    assert 87.5 * (1e6 / 2**20) ** 2 / seconds == pytest.approx(0.88, rel=0.15)


def test_cards_are_ordered_and_efficiency_scales() -> None:
    times = {name: machine(FLASH, name).prefill_seconds(0, 50_000) for name in GPUS}
    assert times["h100"] > times["h200"] > times["b200"]
    decode = {name: step_ms(machine(FLASH, name), 8, 10_000) for name in GPUS}
    assert decode["h200"] / decode["h100"] == pytest.approx(3.0 / 4.3, rel=0.01)
    # Decode reads weights, prompts multiply: only the latter depend on the arithmetic rates.
    slow = machine(FLASH, efficiency=0.5)
    assert step_ms(slow, 8, 10_000) == pytest.approx(decode["h200"], rel=0.02)
    assert slow.prefill_seconds(0, 50_000) == pytest.approx(2 * times["h200"], rel=0.1)
    with pytest.raises(ValueError, match="h100, h200, b200"):
        gpu("abacus")
    with pytest.raises(ValueError, match="efficiency"):
        gpu("h200", efficiency=0.0)


def test_decode_attention_is_a_straight_line_where_the_shortcut_says_so() -> None:
    for model in (FLASH, PRO, preset("nano")):
        m = machine(model)
        for context in (1, 100, 128, 2047, 2048, 4096, 5000, 1 << 20):
            assert m.decode_attention_seconds(context) == pytest.approx(m.attention_seconds(context, 1), rel=1e-9)


def test_chunking_costs_weights_and_launches_only() -> None:
    m = machine(FLASH)
    whole, pieces = m.prefill_seconds(0, 65_536, 8192), m.prefill_seconds(0, 65_536, 1024)
    assert whole < pieces < 3 * whole
    assert m.prefill_seconds(7, 7) == 0.0 and m.replay_seconds(0) == 0.0
    assert m.replay_seconds(50) < m.replay_seconds(5000) < m.prefill_seconds(0, 5461)


def test_bytes_of_a_plan() -> None:
    m = machine(FLASH)
    rows = ScheduledTokens(request_id="a", start=300, num_tokens=1, new_page_ids=(), samples=True)
    chunk = ScheduledTokens(request_id="b", start=0, num_tokens=128, new_page_ids=(), samples=False)
    plan = StepPlan(
        step_id=1,
        scheduled=(rows, chunk),
        page_copies=(PageCopy(source=1, target=2),),
        page_loads=((0, 5), (1, 6)),
        page_spills=((7, 2),),
        slot_restores=((0, 3),),
        slot_snapshots=((1, 128, 4),),
    )
    work = m.work_of(plan)
    page, slot = m.layout.bytes_per_page, m.layout.bytes_per_snapshot
    assert (work.decode_contexts, work.chunks, work.num_sampled) == ([301], [(0, 128)], 1)
    assert (work.bytes_in, work.bytes_out, work.bytes_copied) == (2 * page + slot, page + slot, 2 * page)
    assert m.step_seconds(StepWork()) == 0.0
    # A request of 1M tokens comes back in about 80 ms (kv-and-scheduling 8.5).
    assert m.step_seconds(StepWork(bytes_in=m.layout.bytes_for(1 << 20))) == pytest.approx(0.081, rel=0.05)
    # What goes out runs beside the rows: only the longer of the two counts.
    rows_only = m.step_seconds(StepWork(decode_contexts=[301]))
    assert m.step_seconds(StepWork(decode_contexts=[301], bytes_out=page)) == rows_only


def test_the_configuration_holds_the_bytes_it_was_given() -> None:
    config = simulated_config(FLASH, kv_bytes=80 << 30, max_num_seqs=64)
    layout = config.layout(FLASH)
    used = config.num_pages * layout.bytes_per_page + 64 * layout.bytes_per_slot
    assert (80 << 30) - layout.bytes_per_page < used <= 80 << 30
    assert config.max_model_len == 1 << 20 and config.row_format == "fp8" and config.index_format == "fp8"


def test_a_fitted_machine_takes_what_its_cost_model_says() -> None:
    layout = simulated_config(FLASH, kv_bytes=80 << 30).layout(FLASH)
    cost = CostModel(FLASH, cost_prior(FLASH, "cuda"))
    fitted = FittedMachine(FLASH, layout, gpu("h200"), cost)
    features = StepFeatures()
    features.add_decode(500)
    features.add_prefill(100, 256)
    work = StepWork(decode_contexts=[500], chunks=[(100, 256)], num_sampled=1, bytes_in=10**9)
    assert fitted.step_seconds(work) == pytest.approx(cost.predict(features) + 10**9 / fitted.card.link_bandwidth)
    assert fitted.prefill_seconds(0, 4096, 2048) == pytest.approx(cost.prefill_seconds(0, 4096))
