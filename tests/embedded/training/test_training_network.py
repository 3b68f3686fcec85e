"""The network that learns is the model that serves: the same numbers from the same parameters."""

import pytest
import torch
from torch import Tensor

from embedded.training import attention
from embedded.training.network import Network
from embedded.training.rows import BLOCK, Rows
from model.config import ModelConfig
from model.transformer import Transformer
from tests.model.conftest import Driver, fill, nano_config, random_tokens

LENGTHS = (300, 128, 77, 500)
"""Of the examples of a row: around blocks, with more entries than the indexer selects."""


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return nano_config()


@pytest.fixture(scope="module")
def network(config: ModelConfig) -> Network:
    """With random parameters, shared with the model that serves."""
    network = Network(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for record in network.model.checkpoint_tensors():
            fill(record, generator, config)
    network.model.finish_loading()
    return network


def packed(examples: list[list[int]]) -> Rows:
    """One row."""
    ids, starts = [], []
    for tokens in examples:
        size = -(-len(tokens) // BLOCK) * BLOCK
        starts += [len(ids)] * size
        ids += tokens + [2] * (size - len(tokens))
    weights = torch.ones(1, len(ids))
    return Rows.of(torch.tensor([ids]), weights, torch.tensor([starts]))


@torch.inference_mode()
def served(model: Transformer, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Logits and draft logits at every position."""
    driver = Driver(model)
    sequence = driver.start()
    batch = driver.batch([(sequence, tokens)])
    streams = model.streams(batch, driver.cache)
    logits = model.logits(model.norm(model.hyper_head(streams)))
    assert model.mtp is not None
    following = batch
    following.token_ids_T = torch.roll(batch.token_ids_T, -1)
    _, drafts = model.mtp(following, streams, driver.cache, driver.cache.new_window())
    return logits, drafts


@torch.inference_mode()
def learnt(network: Network, rows: Rows) -> tuple[Tensor, Tensor]:
    streams = network.streams(rows)[0]
    drafts = network.draft_streams(streams, rows)[0]
    return network.logits(network.hidden(streams)), network.draft_logits(drafts)


def test_packed_rows_give_the_logits_of_the_model_that_serves(network: Network, config: ModelConfig) -> None:
    network.sparse = True
    examples = [random_tokens(config, count, seed) for seed, count in enumerate(LENGTHS)]
    rows = packed(examples)
    logits, drafts = learnt(network, rows)
    for number, tokens in enumerate(examples):
        start = int(rows.starts_BS.unique()[number])
        expected, expected_drafts = served(network.model, tokens)
        place = slice(start, start + len(tokens))
        scale = float(expected.abs().max())
        assert (logits[0, place] - expected).abs().max() < 1e-4 * scale
        # The last token of an example has no next one to draft from.
        difference = (drafts[0, place] - expected_drafts)[:-1].abs().max()
        assert difference < 1e-4 * float(expected_drafts.abs().max())


def test_without_selection_every_entry_is_seen(network: Network, config: ModelConfig) -> None:
    rows = packed([random_tokens(config, 512, 9)])
    network.sparse = True
    selected, _ = learnt(network, rows)
    network.sparse = False
    everything, _ = learnt(network, rows)
    few = 4 * config.index_topk + 3
    assert torch.allclose(selected[0, :few], everything[0, :few], atol=1e-5)
    assert (selected[0, few:] - everything[0, few:]).abs().max() > 1e-2


def test_pieces_of_any_size_give_the_same(
    network: Network, config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = packed([random_tokens(config, 600, 5)])
    network.sparse = True
    whole = network(rows)
    monkeypatch.setattr(attention, "QUERIES", BLOCK)
    pieces = network(rows)
    for name in ("next_token", "token_after", "index"):
        assert getattr(pieces, name).item() == pytest.approx(getattr(whole, name).item(), rel=1e-4)


def test_a_jump_moves_the_rotation_and_nothing_else(network: Network, config: ModelConfig) -> None:
    rows = packed([random_tokens(config, 512, 9), random_tokens(config, 256, 10)])
    jumps = torch.zeros(1, rows.ids_BS.shape[1] // BLOCK, dtype=torch.int64)
    jumps[0, 0], jumps[0, 2], jumps[0, 4] = 512, 1024, 128
    jumped = Rows.of(rows.ids_BS, rows.weights_BS, rows.starts_BS, jumps)
    moved = jumped.positions_BS - rows.positions_BS
    # What would stand before the first block of an example does not count.
    assert moved[0, ::BLOCK].tolist() == [0, 0, 1024, 1024, 0, 0]
    with torch.inference_mode():
        a, b = learnt(network, rows)[0], learnt(network, jumped)[0]
    assert torch.equal(a[0, :256], b[0, :256]) and torch.equal(a[0, 512:], b[0, 512:])
    assert (a[0, 256:512] - b[0, 256:512]).abs().max() > 1e-3


def test_every_parameter_learns_and_the_indexer_from_its_own_loss(network: Network, config: ModelConfig) -> None:
    network.sparse = False
    rows = packed([random_tokens(config, 300, 1), random_tokens(config, 200, 2)])
    losses = network(rows)
    (losses.next_token + losses.token_after).backward()
    indexers = {name for name, _ in network.named_parameters() if ".indexer." in name}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        has_gradient = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert has_gradient != (name in indexers), name
    trunk = {n: None if p.grad is None else p.grad.clone() for n, p in network.named_parameters() if n not in indexers}
    network(rows).index.backward()
    for name, parameter in network.named_parameters():
        if name in indexers:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        elif parameter.grad is not None:
            assert torch.equal(parameter.grad, trunk[name]), name
    network.zero_grad(set_to_none=True)


def test_rounded_weights_are_those_of_the_checkpoint(config: ModelConfig) -> None:
    """The forward pass changes as quantization changes it, and gradients still reach every parameter."""
    network = Network(config)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for record in network.model.checkpoint_tensors():
            fill(record, generator, config)
    rows = packed([random_tokens(config, 200, 2)])
    plain = network(rows).next_token.item()
    network.weights.rounding = True
    network.weights.refresh()
    losses = network(rows)
    assert losses.next_token.item() != plain
    losses.next_token.backward()
    experts = network.model.layers[3].ffn.experts
    assert experts.w13.grad is not None and experts.w13.grad.abs().max() > 0
    w13, _ = network.weights.experts(experts)
    assert len((w13[0, 0, 0, :32] / w13[0, 0, 0, :32].abs().max()).unique()) <= 15, "e2m1 has 15 values"


def test_biases_move_toward_even_use(network: Network) -> None:
    gate = network.model.layers[-1].ffn.gate
    before = gate.bias.clone()
    loads = tuple(torch.full_like(before, 0.25) for _ in range(4))
    for load in loads:
        load[0], load[1] = 0.5, 0.0
    network.balance(loads, 0.01)
    assert torch.allclose(gate.bias[:3] - before[:3], torch.tensor([-0.01, 0.01, 0.0]), atol=1e-6)
    with torch.no_grad():
        gate.bias.copy_(before)


def test_targets_stay_within_an_example() -> None:
    rows = packed([[5, 6, 7] + [8] * 125, [9, 10]])
    ids, weights = rows.targets(1)
    assert ids[0, :3].tolist() == [6, 7, 8] and weights[0, 127] == 0.0 and weights[0, 0] == 1.0
    _, weights = rows.targets(2)
    assert (
        weights[0, 126] == weights[0, 127] == 0.0 and weights[0, 125] == 1.0 and weights[0, -1] == weights[0, -2] == 0.0
    )
