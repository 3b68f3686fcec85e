"""A run of a recipe: it learns, stops and goes on to the bit, and what it exports is what it has learnt."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from embedded.training import state
from embedded.training.export import export, rounding_loss
from embedded.training.initial import initialise
from embedded.training.network import Network
from embedded.training.pieces import Pieces
from embedded.training.recipe import Recipe, Stage
from embedded.training.rows import BLOCK, Rows
from embedded.training.trainer import Batch, DivergedError, Trainer
from model.checkpoint import load_model
from model.tools.byte_tokenizer import save_byte_tokenizer
from tests.model.conftest import nano_config

CONFIG = replace(nano_config(), vocab_size=512, num_hidden_layers=4, compress_ratios=(0, 4, 128, 4))
SHORT = Stage(data="", row_tokens=256, rows=2, steps=6)
RECIPE = Recipe(
    name="test",
    model=CONFIG,
    stages=(
        SHORT,
        replace(SHORT, steps=4, sparse=True, jumps=True),
        replace(SHORT, steps=4, sparse=True, rounded=True, decays=True),
    ),
    warmup_steps=4,
)


def batch_of(stage: Stage, step: int, *, period: int = 7) -> Batch:
    """Rows that repeat a few random tokens: what comes next stands `period` tokens before."""
    rng = np.random.default_rng(step)
    ids = np.tile(rng.integers(3, 60, (stage.rows, period)), (1, stage.row_tokens // period + 1))
    starts = np.zeros((stage.rows, stage.row_tokens), np.int32)
    starts[:, BLOCK:] = BLOCK * rng.integers(0, 2, (stage.rows, 1))
    weights = np.ones((stage.rows, stage.row_tokens), np.float32)
    return ids[:, : stage.row_tokens].astype(np.int32), weights, starts


def batches(stage: Stage, first: int) -> Iterator[Batch]:
    for step in range(first, stage.steps):
        yield batch_of(stage, step)


def test_it_stops_and_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole = Trainer(RECIPE, tmp_path / "whole", batches)
    assert whole.run(seconds=600)
    for _ in range(20):
        if Trainer(RECIPE, tmp_path / "parts", batches).run(seconds=0):
            break
    else:
        pytest.fail("each call makes at least one step, so the recipe ends")
    parts = Trainer(RECIPE, tmp_path / "parts", batches)
    assert parts.progress.total_steps == whole.progress.total_steps == 14
    for (name, a), b in zip(whole.network.named_parameters(), parts.network.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert len(list((tmp_path / "whole").glob("step-*"))) <= state.KEPT


def test_a_state_of_another_recipe_is_refused(tmp_path: Path) -> None:
    Trainer(RECIPE, tmp_path, batches).run(seconds=0)
    with pytest.raises(state.StateError, match="expected the recipe other-"):
        Trainer(replace(RECIPE, name="other"), tmp_path, batches)
    with pytest.raises(state.StateError, match="no state"):
        state.newest(tmp_path / "nothing")


def test_it_learns(tmp_path: Path) -> None:
    """Repetition is found within a minute by a model that starts from nothing."""
    stage = replace(SHORT, steps=40)

    def repeats(stage: Stage, first: int) -> Iterator[Batch]:
        for step in range(first, stage.steps):
            yield batch_of(stage, step % 3)

    trainer = Trainer(replace(RECIPE, stages=(stage,), rate=5e-3), tmp_path, repeats)
    row = as_rows(batch_of(stage, 0))
    before = trainer.network(row)
    assert trainer.run(seconds=600)
    after = trainer.network(row)
    assert before.next_token > 5.0 and after.next_token < 0.5 * before.next_token
    assert after.token_after < before.token_after and after.index < before.index


def test_a_recipe_is_scaled_to_the_time_there_is() -> None:
    half = RECIPE.scaled(0.5)
    assert [stage.steps for stage in half.stages] == [3, 2, 2] and half.identity != RECIPE.identity
    assert RECIPE.scaled(1.0).identity == RECIPE.identity
    with pytest.raises(ValueError, match="positive"):
        RECIPE.scaled(0.0)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedded.training.trainer.REPORT_SECONDS", 0.0)
    trainer = Trainer(RECIPE, tmp_path, batches)
    with torch.no_grad():
        trainer.network.model.norm.weight.fill_(float("nan"))
    with pytest.raises(DivergedError, match="stage 0, step 1"):
        trainer.run(seconds=600)


def test_what_is_exported_is_what_was_learnt(tmp_path: Path) -> None:
    """The ordinary loader reads the rounded weights of the last stage, to the bit."""
    network = Network(CONFIG)
    initialise(network.model, 5)
    save_byte_tokenizer(tmp_path, model_max_length=4096)
    export(network, tmp_path / "model", tmp_path)
    loaded = load_model(tmp_path / "model", dtype=torch.float32, numerics="plain", progress=False)
    network.weights.rounding = True
    network.weights.refresh()
    for mine, theirs in zip(network.model.layers, loaded.layers, strict=True):
        assert torch.equal(network.weights.matrix(mine.attn.wq_b), theirs.attn.wq_b.dense_weight())
        w13, w2 = network.weights.experts(mine.ffn.experts)
        assert torch.equal(w13[1].flatten(0, 1), theirs.ffn.experts.gate_up(1))
        assert torch.equal(w2[1], theirs.ffn.experts.down(1))
        assert torch.equal(mine.hc_attn_fn, theirs.hc_attn_fn)
    costs = rounding_loss(network, [as_rows(batch_of(SHORT, 0))])
    assert costs["plain_loss"] != costs["rounded_loss"] and 0.0 <= costs["plain_right"] <= 1.0


def test_fresh_streams_keep_their_size() -> None:
    """Through all layers, or nothing can be learnt; and they differ from each other."""
    network = Network(CONFIG)
    initialise(network.model, 5)
    with torch.no_grad():
        streams = network.streams(as_rows(batch_of(SHORT, 0)))[0]
    assert 0.5 < float(streams.square().mean().sqrt()) < 2.0
    assert float((streams[:, :, 0] - streams[:, :, 1]).abs().mean()) > 1e-2


@pytest.mark.long
def test_compiled_pieces_give_the_same_numbers() -> None:
    network, compiled = Network(CONFIG), Network(CONFIG, pieces=Pieces.compiled())
    initialise(network.model, 5)
    compiled.load_state_dict(network.state_dict())
    rows = as_rows(batch_of(SHORT, 0))
    network.sparse = compiled.sparse = True
    losses = [n(rows) for n in (network, compiled)]
    for loss in losses:
        (loss.next_token + loss.token_after + loss.index).backward()
    assert losses[0].next_token.item() == pytest.approx(losses[1].next_token.item(), rel=1e-5)
    for (name, a), b in zip(network.named_parameters(), compiled.parameters(), strict=True):
        if a.grad is not None and b.grad is not None:
            assert torch.allclose(a.grad, b.grad, atol=1e-5, rtol=1e-3), name


def as_rows(batch: Batch) -> Rows:
    ids, weights, starts = (torch.from_numpy(part) for part in batch)
    return Rows.of(ids.long(), weights, starts.long())


@pytest.mark.gpu
def test_a_gpu_learns_the_same(tmp_path: Path) -> None:
    """Fused, in bfloat16, with the optimizer's fused step: the loss of each step is near the CPU's."""
    stage = replace(SHORT, sparse=True, jumps=True, steps=8)
    recipe = replace(RECIPE, stages=(stage,))
    last = []
    for name, options in (("cpu", {}), ("cuda", {"device": "cuda", "compiled": True})):
        trainer = Trainer(recipe, tmp_path / name, batches, **options)
        assert trainer.run(seconds=600)
        with torch.no_grad():
            rows = as_rows(batch_of(SHORT, 1))
            rows = Rows(**{f: getattr(rows, f).to(name) for f in rows.__dataclass_fields__})
            last.append(trainer.network(rows).next_token.item())
    assert last[1] == pytest.approx(last[0], rel=0.02)
