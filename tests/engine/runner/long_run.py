"""One long cold run on a real model, and with it the answer to every prompt that is a beginning of it.

Tokens are greedy, so a request whose prompt is `tokens[:n]` must go on with `tokens[n:]`, from the same distributions.
`FIRST` is the end of a page behind which a replay is a whole triangle (762 rows of `nano`), and the run decodes a page
more: every residue mod 4, 128 and 256 is a position of it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from runner.core_lab import Answer, Engine
from torch import Tensor

from engine.messages import LogprobRow
from model.batch import ForwardBatch
from model.kv_cache import KVCache
from model.transformer import Transformer

FIRST, COUNT = 1024, 256
SPARE = 4
"""Tokens decoded beyond."""
LANES = 16
"""Requests in one step: in deterministic mode so many cost what one costs."""
LAST = FIRST + COUNT
EVERY = set(range(FIRST, LAST))
STARTS = range(FIRST, LAST, COUNT // LANES)
WHOLE = 10**6
"""Log probabilities of all tokens: the logits but for a constant."""


@dataclass(frozen=True)
class LongRun:
    tokens: list[int]
    rows: dict[int, Tensor]
    """Log probabilities [V] of the token at a position."""

    def check(self, answer: Answer, num_prompt: int, *, tolerance: float = 0.0) -> None:
        """Compare an answer to `tokens[:num_prompt]`. `tolerance` is relative to the largest logit; 0: to the bit."""
        assert answer.tokens and answer.finish == "length"
        for position, found in enumerate(answer.logprobs, start=num_prompt):
            expected = self.rows[position]
            furthest = float((dense(found) - expected).abs().max())
            assert furthest <= tolerance * float(expected.abs().max()), f"logits before {position} differ by {furthest}"
        assert answer.tokens == self.tokens[num_prompt : num_prompt + len(answer.tokens)]


def dense(row: LogprobRow) -> Tensor:
    """[V] from a row of all tokens."""
    found = torch.empty(len(row.top_ids))
    found[list(row.top_ids)] = torch.tensor(row.top_logprobs)
    return found


def decoded(lab: Any) -> LongRun:
    """Token by token, through an engine without a cache and with the fast operations."""
    engine = Engine(lab, enable_prefix_cache=False, top=WHOLE, deterministic=False)
    prompt = lab.prompt(FIRST, seed=77)
    answer = engine.ask(prompt, COUNT + SPARE)
    rows = {position: dense(row) for position, row in enumerate(answer.logprobs, start=FIRST)}
    return LongRun([*prompt, *answer.tokens], rows)


@torch.inference_mode()
def in_one_piece(lab: Any, tokens: list[int]) -> LongRun:
    """The model alone, deterministic, in one forward pass; it must be the greedy run as well."""
    model: Transformer = lab.models[True]
    layout = lab.resolved().layout(model.config)
    length, pages = len(tokens), layout.pages_for(len(tokens))
    cache = KVCache(layout, num_pages=pages, num_slots=1, device="cpu", dtype=torch.float32)
    batch = ForwardBatch(
        token_ids_T=torch.tensor(tokens),
        positions_T=torch.arange(length),
        request_index_T=torch.zeros(length, dtype=torch.int64),
        query_start_B1=torch.tensor([0, length]),
        seq_lens_B=torch.tensor([length]),
        page_table_BP=torch.arange(pages)[None],
        slot_B=torch.tensor([0]),
        logits_index_L=torch.arange(FIRST - 1, length - 1),
        query_lens=(length,),
        start_positions=(0,),
    )
    rows = torch.log_softmax(model.logits(model(batch, cache)), dim=-1)
    assert rows.argmax(-1).tolist() == tokens[FIRST:]
    return LongRun(tokens, dict(enumerate(rows, start=FIRST)))


def engine_for(lab: Any, **options: Any) -> Engine:
    """Room for all lanes and what they leave."""
    places = {"num_pages": 64, "max_num_seqs": LANES + 1, "num_host_pages": 64, "num_snapshots": COUNT + 2 * LANES}
    places |= options.pop("places", {})
    return Engine(lab, places=places, page_order=5, top=WHOLE, **options)
