"""The model against transformers' deepseek_v4 (eager, fp32): an independent implementation with the same weights."""

from typing import Any

import pytest
import torch

TOLERANCE = 1e-4
LENGTHS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 66, 67, 68, 69, *range(126, 131), *range(254, 259), 383, 384, 385, 512, 639, 700]


@pytest.fixture(scope="module")
def oracle(tools: Any) -> tuple[Any, list[int], torch.Tensor]:
    """A model, 700 tokens, and transformers' logits at each of them."""
    model = tools.random_model(tools.nano_config())
    tokens = tools.random_tokens(model.config, 700, seed=1)
    with torch.no_grad():
        return model, tokens, tools.transformers_twin(model)(torch.tensor([tokens])).logits[0]


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.std() > 0.5, "logits of a scale that could show a difference"
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("length", LENGTHS)
def test_prompt_of_any_length(tools: Any, oracle: Any, length: int) -> None:
    model, tokens, theirs = oracle
    _, ours = tools.Driver(model).prompt(tokens[:length])
    assert_close(ours, theirs[:length])


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 31, 64, 127, 128, 129, 256, 300])
def test_any_chunking(tools: Any, oracle: Any, chunk: int) -> None:
    model, tokens, theirs = oracle
    length = min(700, chunk * 60)
    _, ours = tools.Driver(model).prompt(tokens[:length], chunk=chunk)
    assert_close(ours, theirs[:length])


def test_three_hundred_decode_steps(tools: Any) -> None:
    model = tools.random_model(tools.nano_config(), seed=5)
    driver = tools.Driver(model)
    sequence, logits = driver.prompt(tools.random_tokens(model.config, 41, seed=2))
    tokens, ours = driver.greedy(sequence, logits[-1], 300)
    with torch.no_grad():
        theirs = tools.transformers_twin(model)(torch.tensor([sequence.tokens])).logits[0]
    assert_close(ours, theirs[40:-1])
    assert tokens == theirs[40:-1].argmax(-1).tolist()


def test_ragged_batch_of_prefill_and_decode(tools: Any, oracle: Any) -> None:
    """Requests at different positions share every step; all rows are compared."""
    model, tokens, theirs = oracle
    driver = tools.Driver(model)
    plans = [[130, 1, 1, 60, 1], [1, 1, 2, 3, 4], [5, 300, 7, 1, 250], [64, 64, 64, 64, 1]]
    sequences = [driver.start() for _ in plans]
    for lens in zip(*plans, strict=True):
        starts = [s.computed for s in sequences]
        chunks = [(s, tokens[s.computed : s.computed + n]) for s, n in zip(sequences, lens, strict=True)]
        expected = torch.cat([theirs[at : at + n] for at, n in zip(starts, lens, strict=True)])
        assert_close(driver.step(chunks), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"compress_ratios": (128, 128, 4, 128), "num_hidden_layers": 4},
        {"compress_ratios": (0, 4, 4, 0), "num_hidden_layers": 4, "num_hash_layers": 0},
        {"rope_scaling": None, "num_hash_layers": 6},
        {"sliding_window": 32, "index_topk": 5, "num_experts_per_tok": 5},
        {"swiglu_limit": 0.3, "hc_sinkhorn_iters": 3},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_architectures(tools: Any, changes: dict[str, Any]) -> None:
    model = tools.random_model(tools.nano_config(**changes), seed=7)
    tokens = tools.random_tokens(model.config, 333, seed=3)
    with torch.no_grad():
        theirs = tools.transformers_twin(model)(torch.tensor([tokens])).logits[0]
    _, ours = tools.Driver(model).prompt(tokens, chunk=150)
    assert_close(ours, theirs)


def test_nano_itself(tools: Any) -> None:
    from model.presets import preset

    model = tools.random_model(preset("nano"), seed=11)
    tokens = tools.random_tokens(model.config, 400, seed=4)
    with torch.no_grad():
        theirs = tools.transformers_twin(model)(torch.tensor([tokens])).logits[0]
    _, ours = tools.Driver(model).prompt(tokens)
    assert_close(ours, theirs)
