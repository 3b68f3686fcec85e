"""Packed rows: where examples stand, and that only numbers decide which."""

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from embedded.data import stream
from embedded.data.mixture import STAGES, Stage, example_at
from embedded.data.parallel import Batches
from embedded.data.render import training_row
from embedded.data.stream import ALIGNMENT, BLOCK_ROWS, PAD_ID, Stream
from embedded.data.tasks import LONG_TASKS, TASKS
from embedded.tokenizer import VOCAB_SIZE
from server.text.prompt import EOS
from server.text.tokenizer import Tokenizer

SHORT = STAGES["short"]
FIRST_EVALUATION_SEED = 1 << 31


def test_stages_know_every_task() -> None:
    for stage in STAGES.values():
        assert set(stage.weights) == set(TASKS)
        assert stage.row_tokens % ALIGNMENT == 0


def test_tasks_come_in_their_shares() -> None:
    drawn = Counter(example_at(SHORT, 1, index).task for index in range(1500))
    total = sum(SHORT.weights.values())
    for task, weight in SHORT.weights.items():
        expected = 1500 * weight / total
        assert abs(drawn[task] - expected) < 5 * expected**0.5


def test_lengths_of_a_stage_are_spread() -> None:
    drawn = (example_at(STAGES["long"], 1, index) for index in range(300))
    lengths = [example.details["tokens"] for example in drawn if example.task in LONG_TASKS]
    assert min(lengths) < 400
    assert max(lengths) > 6000


def test_rows_hold_whole_examples(tokenizer: Tokenizer) -> None:
    rows = list(itertools.islice(Stream(tokenizer, SHORT, 3), BLOCK_ROWS))
    known = {training_row(tokenizer, example_at(SHORT, 3, index)).ids.tobytes() for index in range(300)}
    examples = 0
    for row in rows:
        assert row.ids.shape == row.weights.shape == row.starts.shape == (SHORT.row_tokens,)
        assert (row.ids.dtype, row.weights.dtype, row.starts.dtype) == (np.int32, np.float32, np.int32)
        starts = np.unique(row.starts)
        assert starts[0] == 0
        assert not (starts % ALIGNMENT).any()
        assert (np.diff(row.starts) >= 0).all()
        assert (row.weights[row.ids == PAD_ID] == 0).all()
        for start, end in itertools.pairwise([*starts.tolist(), SHORT.row_tokens]):
            ids, weights = row.ids[start:end], row.weights[start:end]
            length = int(np.flatnonzero(weights)[-1]) + 1
            assert ids[0] == 0
            assert weights[0] == 0
            assert (ids[length:] == PAD_ID).all()
            assert end == SHORT.row_tokens or end - start - length < ALIGNMENT
            assert ids[length - 1] == tokenizer.required_id(EOS)
            assert ids[:length].tobytes() in known
            examples += 1
    assert examples > 2 * BLOCK_ROWS
    filled = sum(int((row.ids != PAD_ID).sum()) for row in rows)
    assert filled > 0.7 * BLOCK_ROWS * SHORT.row_tokens


def test_a_stream_goes_on_where_it_stopped(tokenizer: Tokenizer) -> None:
    whole = Stream(tokenizer, SHORT, 3)
    rows = list(itertools.islice(whole, BLOCK_ROWS + 4))
    assert whole.state == BLOCK_ROWS + 4
    resumed = Stream(tokenizer, SHORT, 3, first=BLOCK_ROWS + 1)
    for row in rows[BLOCK_ROWS + 1 :]:
        again = next(resumed)
        assert again.ids.tobytes() == row.ids.tobytes()
        assert again.weights.tobytes() == row.weights.tobytes()
        assert again.starts.tobytes() == row.starts.tobytes()
    assert resumed.state == whole.state
    assert next(Stream(tokenizer, SHORT, 4)).ids.tobytes() != rows[0].ids.tobytes()


def test_examples_longer_than_a_row_are_left_out(tokenizer: Tokenizer) -> None:
    stage = dataclasses.replace(SHORT, lengths=(2000, 3000))
    for row in itertools.islice(Stream(tokenizer, stage, 3, row_tokens=1024), BLOCK_ROWS):
        for start in np.unique(row.starts):
            ids = row.ids[row.starts == start]
            assert (ids == tokenizer.required_id(EOS)).any()


def test_a_stage_that_fits_no_row_is_an_error_and_no_endless_loop(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_BLOCK_EXAMPLES", 64)
    stage = Stage("huge", 256, {"recall_list": 1.0}, (600, 700))
    with pytest.raises(AssertionError, match="longer than its rows"):
        next(Stream(tokenizer, stage, 3))


@pytest.mark.parametrize("seed", [-1, FIRST_EVALUATION_SEED, FIRST_EVALUATION_SEED + 5])
def test_training_never_sees_a_seed_of_the_evaluation(tokenizer: Tokenizer, seed: int) -> None:
    with pytest.raises(ValueError, match=r"a training seed is in \[0, 2147483648\)"):
        Stream(tokenizer, SHORT, seed)
    with pytest.raises(ValueError, match="a training seed"):
        example_at(SHORT, seed, 0)


@pytest.mark.parametrize("row_tokens", [100, 1 << 20])
def test_rows_of_a_wrong_length_are_refused(tokenizer: Tokenizer, row_tokens: int) -> None:
    with pytest.raises(ValueError, match="row_tokens must be a multiple of 128 up to"):
        Stream(tokenizer, SHORT, 1, row_tokens=row_tokens)


def test_batches_are_the_stream_whatever_the_number_of_workers(tokenizer_dir: Path, tokenizer: Tokenizer) -> None:
    rows = list(itertools.islice(Stream(tokenizer, SHORT, 3, row_tokens=512, first=12), 40))
    for workers in (1, 3):
        with Batches(
            tokenizer_dir, VOCAB_SIZE, "short", 3, batch_rows=10, workers=workers, row_tokens=512, first=12
        ) as batches:
            for n in range(4):
                batch = next(batches)
                expected = rows[n * 10 : n * 10 + 10]
                assert np.array_equal(batch.ids, [row.ids for row in expected])
                assert np.array_equal(batch.weights, [row.weights for row in expected])
                assert np.array_equal(batch.starts, [row.starts for row in expected])
            assert batches.state == 52


def test_a_worker_that_died_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedded.data.parallel._PATIENCE_SECONDS", 0.2)
    with (
        Batches(tmp_path, VOCAB_SIZE, "short", 3, batch_rows=1, workers=1) as batches,
        pytest.raises(RuntimeError, match="data worker 0 ended with 1"),
    ):
        next(batches)
