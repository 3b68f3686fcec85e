"""Every operation of the op table on random inputs: what a backend must compute, and how near.

A case runs the same inputs through any table on any device; `op_checks` runs it through this machine's and through the
reference, and the tests do the same. A tolerance is relative to the largest expected value: some sums are taken in
another order (float32), and some backends round scores to the model's dtype (bfloat16).

Letters: T tokens, O outputs, I inputs, G groups, M streams, D hidden, H heads, C channels, J index dim, E experts,
A experts per token, F expert inner.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from embedded.selfcheck.op_steps import STEPS, SmallStep, Stored, small_config
from model.kv_cache import MAXIMUM
from model.ops.expert_bank import ExpertBank
from model.ops.registry import OpTable

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class OpCase:
    op: str
    inputs: str
    """Shapes and dtype, for people."""
    tolerance: float
    run: Callable[[OpTable, str], Outputs]
    """(table, device) -> what the operation returns and what it has written."""


def op_cases() -> Iterator[OpCase]:
    """Integers that are selected must be equal, so the index runs on small integers too, whose scores are exact."""
    for dtype in (torch.float32, torch.bfloat16):
        yield from _matrix_cases(dtype)
        yield from _row_cases(dtype)
        yield from _hyper_cases(dtype)
        yield from _expert_cases(dtype)
        for step, stored in product(STEPS, ("float", "fp8")):
            yield _attention_case(dtype, step, stored, "window")
            yield _attention_case(dtype, step, stored, "all entries")
            yield _attention_case(dtype, step, stored, "selected entries")
    for step in STEPS:
        yield _compress_case(step, overlap=True)
        yield _compress_case(step, overlap=False)
        yield _index_case(step, torch.float32)
        yield _index_case(step, torch.bfloat16)


class _Random:
    """Numbers that are the same on every device."""

    def __init__(self, device: str, seed: int = 1) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(self.device, dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator).to(self.device, dtype)


def _case(op: str, inputs: str, dtype: torch.dtype, run: Callable[[OpTable, str], Outputs]) -> OpCase:
    return OpCase(op, f"{inputs}, {_NAMES[dtype]}", TOLERANCES[dtype], run)


def _matrix_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    for rows, outputs, inputs in ((1, 96, 64), (33, 160, 96), (300, 72, 256)):

        def linear(table: OpTable, device: str, shape: tuple[int, int, int] = (rows, outputs, inputs)) -> Outputs:
            random = _Random(device)
            x, weight = random.normal(shape[0], shape[2], dtype=dtype), random.normal(shape[1], shape[2], dtype=dtype)
            packed = None if table.pack_weight is None else table.pack_weight(weight)
            return (table.linear(x, weight if packed is None else packed),)

        def linear_fp32(table: OpTable, device: str, shape: tuple[int, int, int] = (rows, outputs, inputs)) -> Outputs:
            random = _Random(device)
            x, weight = random.normal(shape[0], shape[2], dtype=dtype), random.normal(shape[1], shape[2], dtype=dtype)
            return (table.linear_fp32(x, weight),)

        def grouped(table: OpTable, device: str, shape: tuple[int, int, int] = (rows, outputs, inputs)) -> Outputs:
            random = _Random(device)
            x = random.normal(shape[0], 4, shape[2], dtype=dtype)
            return (table.grouped_linear(x, random.normal(4, shape[1], shape[2], dtype=dtype)),)

        text = f"[{rows}, {inputs}] x [{outputs}, {inputs}]"
        yield _case("linear", text, dtype, linear)
        yield OpCase("linear_fp32", f"{text}, {_NAMES[dtype]}", TOLERANCES[torch.float32], linear_fp32)
        yield _case("grouped_linear", f"4 of {text}", dtype, grouped)


def _row_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    for rows in (1, 70):

        def norm(table: OpTable, device: str, rows: int = rows) -> Outputs:
            random = _Random(device)
            x, weight = random.normal(rows, 4, 128, dtype=dtype, scale=3.0), random.normal(128)
            return (table.rms_norm(x, weight, 1e-6), table.rms_norm(x, None, 1e-6))

        yield _case("rms_norm", f"[{rows}, 4, 128]", dtype, norm)
    for step, inverse in product(("prompt", "decode"), (False, True)):

        def rotate(table: OpTable, device: str, step: str = step, inverse: bool = inverse) -> Outputs:
            small = SmallStep(STEPS[step], "float32", device)
            x = _Random(device).normal(small.num_tokens, 4, 128, dtype=dtype)
            found = []
            for rotation in (small.step.main_rotation, small.step.compressed_rotation):
                found += [
                    table.rotate(x.clone(), rotation, inverse=inverse),
                    table.rotate(x[:, 0].clone(), rotation, inverse=inverse),
                ]
            return tuple(found)

        yield _case("rotate", f"{step}{', inverse' if inverse else ''}", dtype, rotate)


def _hyper_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    config = small_config()
    m, hidden = config.hc_mult, config.hidden_size
    for tokens in (1, 130):

        def site(random: _Random, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
            fn = random.normal(outputs, m * hidden, scale=(m * hidden) ** -0.5)
            return fn, 0.5 + random.normal(outputs, scale=0.1), random.normal(outputs, scale=0.5)

        def pre(table: OpTable, device: str, tokens: int = tokens) -> Outputs:
            random = _Random(device)
            x = random.normal(tokens, m, hidden, dtype=dtype)
            return table.hyper_pre(x, *site(random, (2 + m) * m), iters=20, eps=1e-6, norm_eps=1e-6)

        def post(table: OpTable, device: str, tokens: int = tokens) -> Outputs:
            random = _Random(device)
            y, x = random.normal(tokens, hidden, dtype=dtype), random.normal(tokens, m, hidden, dtype=dtype)
            return (table.hyper_post(y, x, random.normal(tokens, m), random.normal(tokens, m, m)),)

        def head(table: OpTable, device: str, tokens: int = tokens) -> Outputs:
            random = _Random(device)
            x = random.normal(tokens, m, hidden, dtype=dtype)
            return (table.hyper_head(x, *site(random, m), eps=1e-6, norm_eps=1e-6),)

        text = f"[{tokens}, {m}, {hidden}]"
        yield _case("hyper_pre", text, dtype, pre)
        yield _case("hyper_post", text, dtype, post)
        yield _case("hyper_head", text, dtype, head)


def _expert_cases(dtype: torch.dtype) -> Iterator[OpCase]:
    config = small_config()
    experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    for tokens, weight_first in product((1, 90), (False, True)):

        def run(table: OpTable, device: str, tokens: int = tokens, weight_first: bool = weight_first) -> Outputs:
            random = _Random(device)
            gate_up = random.normal(experts, 2 * inner, hidden, dtype=dtype, scale=hidden**-0.5)
            down = random.normal(experts, hidden, inner, dtype=dtype, scale=inner**-0.5)
            bank = ExpertBank(
                start=0,
                length=experts,
                gate_up=lambda e: gate_up[e],
                down=lambda e: down[e],
                round_activations=lambda x: x,
                limit=config.swiglu_limit,
            )
            x = random.normal(tokens, hidden, dtype=dtype)
            # Two different experts for each token, ascending; the last expert has no token.
            first = random.integers(0, experts - 2, tokens, 1)
            ids = torch.cat([first, first + 1], dim=1)
            weights = random.normal(tokens, 2).abs()
            return (table.experts(x, ids, weights, bank, weight_first=weight_first),)

        text = f"{tokens} tokens, {experts} experts{', weight first' if weight_first else ''}"
        yield _case("experts", text, dtype, run)


def _attention_case(dtype: torch.dtype, step: str, stored: str, rows: str) -> OpCase:
    row_format: Stored = "fp8" if stored == "fp8" else "float32" if dtype == torch.float32 else "bfloat16"

    def run(table: OpTable, device: str) -> Outputs:
        small = SmallStep(STEPS[step], row_format, device)
        config, random = small.config, _Random(device)
        heads, channels = config.num_attention_heads, config.head_dim
        q = random.normal(small.num_tokens, heads, channels, dtype=dtype)
        window = random.normal(small.step.window.num_rows, channels, dtype=dtype)
        sink = random.normal(heads)
        scale = channels**-0.5
        if rows == "window":
            return (table.attention(q, window, small.step, sink, scale),)
        csa = rows == "selected entries"
        entries = small.step.csa_entries if csa else small.step.hca_entries
        store = small.entry_store(random.normal(small.num_pages * entries.rows_per_page, channels), dtype)
        selected = _selection(entries.visible_T, config.index_topk).to(device) if csa else None
        return (table.attention(q, window, small.step, sink, scale, store, entries, selected),)

    return _case("attention", f"{step}, {rows} stored as {row_format}", dtype, run)


def _selection(visible_T: Tensor, topk: int) -> Tensor:
    """Some visible entries of each token, ascending, -1 absent."""
    generator = torch.Generator().manual_seed(2)
    chosen = torch.full((visible_T.shape[0], topk), -1, dtype=torch.int64)
    for token, count in enumerate(visible_T.tolist()):
        picked = torch.randperm(count, generator=generator)[:topk].sort().values
        chosen[token, : picked.shape[0]] = picked
    return chosen


def _compress_case(step: str, *, overlap: bool) -> OpCase:
    def run(table: OpTable, device: str) -> Outputs:
        small = SmallStep(STEPS[step], "float32", device)
        plan = small.step.csa_compress if overlap else small.step.hca_compress
        channels, parts, random = small.config.head_dim, 2 if overlap else 1, _Random(device)
        width = channels * parts
        values, scores = random.normal(small.num_tokens, width), random.normal(small.num_tokens, width)
        accumulators = random.normal(len(STEPS[step]), parts, 3, channels).abs()
        for number, (start, _) in enumerate(STEPS[step]):
            if start == 0:
                accumulators[number] = 0.0
                accumulators[number, :, MAXIMUM] = float("-inf")
        return table.compress(values, scores, plan, accumulators, overlap=overlap), accumulators

    return _case("compress", f"{step}, {'CSA' if overlap else 'HCA'}", torch.float32, run)


def _index_case(step: str, dtype: torch.dtype) -> OpCase:
    def run(table: OpTable, device: str) -> Outputs:
        row_format: Stored = "float32" if dtype == torch.float32 else "bfloat16"
        small = SmallStep(STEPS[step], row_format, device)
        config, entries, random = small.config, small.step.csa_entries, _Random(device)
        heads, channels = config.index_n_heads, config.index_head_dim
        # Sums of at most 64 products of -1, 0 and 1 are exact in bfloat16 too, and there are many ties.
        q = random.integers(-1, 2, small.num_tokens, heads, channels, dtype=dtype)
        keys = random.integers(-1, 2, small.num_pages * entries.rows_per_page, channels, dtype=dtype)
        weights = random.integers(1, 3, small.num_tokens, heads, dtype=dtype)
        store = small.key_store(keys, dtype)
        found = table.index(q, weights, store, small.step, entries, config.index_topk, low_precision=False)
        # Absent entries may stand anywhere behind those that are there, and as many as the backend likes.
        kept = torch.full((small.num_tokens, config.index_topk), -1, dtype=torch.int64)
        for token, row in enumerate(found.tolist()):
            present = torch.tensor([entry for entry in row if entry >= 0], dtype=torch.int64)
            kept[token, : present.shape[0]] = present
        return (kept,)

    return OpCase("index", f"{step}, {_NAMES[dtype]}, exact", 0.0, run)
