"""Random engines and random traffic as plain data: a list of operations that can be shortened and run again.

Prompts come from a few families, so that they share pages, parts of pages, everything, or nothing; later turns continue
an earlier answer, which is known without running anything (`tags.answer`).
"""

import random
from dataclasses import dataclass
from typing import Literal

import numpy as np
from symbolic import tags

from engine.config import ResolvedConfig, SchedulingConfig
from engine.messages import AbortRequest, AddRequest, FinishReason, SamplingParams, pack_ids, unpack_ids
from model.config import ModelConfig
from model.presets import preset

MODEL: ModelConfig = preset("nano")
MAX_MODEL_LEN = 1500
EDGES = (1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 512, 513, 768)


@dataclass(frozen=True, slots=True)
class Step:
    """One turn of the engine."""


@dataclass(frozen=True, slots=True)
class Jump:
    """Time passes."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Budget:
    """From now on a step has at most so many rows."""

    num_rows: int


@dataclass(frozen=True, slots=True)
class AbortInFlight:
    """A request ends while the next step is under way."""

    request_id: str


Kind = Literal["plain", "crowded", "asleep", "storm", "full", "faulty"]
"""crowded: answers outgrow what was reserved for them; asleep: the same, with no room in host memory for all who are
set aside; storm: many are aborted, in small steps; full: sessions that
take all pages; faulty: the device fails now and then."""

Op = Step | AbortInFlight | Jump | Budget | AddRequest | AbortRequest


def expected(message: AddRequest) -> tuple[list[int], FinishReason]:
    return tags.answer(
        unpack_ids(message.prompt_token_ids),
        message.sampling,
        eos_token_id=MODEL.eos_token_id,
        vocab_size=MODEL.vocab_size,
        max_model_len=MAX_MODEL_LEN,
    )


def random_config(rng: random.Random, kind: Kind) -> ResolvedConfig:
    """Small pools, most of them too small."""
    num_seqs, num_pages = rng.choice((1, 2, 3, 5, 8)), rng.choice((6, 7, 10, 16, 30))
    num_rows, quantile = rng.choice((48, 300, 1000, 3000)), rng.choice((0.3, 0.9, 1.0))
    num_snapshots, seconds = rng.choice((0, 1, 4, 12, 40)), rng.choice((0.002, 0.02, 1e6))
    host_pages = (0, 1, 4, 12, 40)
    match kind:
        case "crowded":
            num_seqs, num_pages, quantile = 8, rng.choice((6, 7)), 0.02
        case "asleep":
            num_seqs, num_pages, quantile, num_rows, host_pages = 8, 6, 0.02, 3000, (0, 1)
        case "storm":
            num_seqs, num_rows, num_snapshots = rng.choice((3, 5)), 48, rng.choice((4, 12))
        case "full":
            num_seqs, num_pages, num_snapshots = rng.choice((1, 2)), 6, rng.choice((4, 12))
        case "faulty":
            num_snapshots, num_pages = rng.choice((4, 12, 40)), min(num_pages, 10)
            host_pages = (4, 12, 40)
        case "plain":
            pass
    return ResolvedConfig(
        model_dir="",
        device="cpu",
        dtype="float32",
        numerics="plain",
        row_format="float32",
        index_format="float32",
        deterministic=True,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=num_rows,
        num_pages=num_pages,
        num_threads=1,
        num_host_pages=rng.choice(host_pages),
        num_snapshots=num_snapshots,
        scheduling=SchedulingConfig(
            step_seconds=seconds,
            interactive_itl_seconds=seconds,
            long_itl_seconds=seconds,
            long_prompt_tokens=rng.choice((600, 262_144)),
            output_quantile=quantile,
            **({"unknown_output_tokens": 1, "woken_output_tokens": 20} if kind in ("crowded", "asleep") else {}),
        ),
    )


class Traffic:
    """Makes operations; remembers what it has asked so that it can ask on."""

    def __init__(self, rng: random.Random, config: ResolvedConfig, kind: Kind) -> None:
        self._rng = rng
        self._config = config
        draw = np.random.default_rng(rng.getrandbits(64))
        self._families = [self._ids(draw, MAX_MODEL_LEN) for _ in range(rng.choice((1, 2, 4)))]
        self._draw = draw
        self._sent: list[AddRequest] = []
        self._kind = kind
        self._is_crowded = kind in ("crowded", "asleep")
        self._arrivals = 0.12 if kind == "crowded" else 0.1 if kind == "asleep" else rng.choice((0.03, 0.06, 0.12))
        self._aborts = self._arrivals * (0.9 if kind == "storm" else 0.6 if kind == "asleep" else 0.2)

    def ops(self, count: int) -> list[Op]:
        return [self._op() for _ in range(count)]

    def _op(self) -> Op:
        rng, x = self._rng, self._rng.random()
        if x < self._arrivals or not self._sent:
            self._sent.append(self._request())
            return self._sent[-1]
        if x < self._arrivals + self._aborts:
            request_id = rng.choice(self._sent[-rng.choice((3, 12)) :]).request_id
            return AbortRequest(request_id=request_id) if rng.random() < 0.6 else AbortInFlight(request_id)
        if x < self._arrivals + self._aborts + 0.01:
            return Jump(rng.choice((0.01, 1.0, 700.0)))
        if x < self._arrivals + self._aborts + 0.02:
            return Budget(rng.choice((self._config.max_num_seqs, 17, 200, 3000)))
        return Step()

    def _request(self) -> AddRequest:
        rng, crowded = self._rng, self._is_crowded
        salt = rng.choice(("", "", "", "a", "b"))
        kind = rng.random()
        if self._sent and kind < 0.45:
            before = rng.choice(self._sent[-rng.choice((2, 20)) :])
            prompt, salt = unpack_ids(before.prompt_token_ids), before.cache_salt
            if kind < 0.33:
                answer, _ = expected(before)
                kept = answer[: rng.choice((len(answer), len(answer), len(answer) - 1, len(answer) // 2))]
                prompt = np.concatenate(
                    [prompt, np.array(kept, dtype=np.int32), self._ids(self._draw, rng.randrange(1, 90))]
                )
            if kind > 0.42:
                salt = rng.choice(("", "a", "b"))
        else:
            cut = rng.choice((*EDGES, rng.randrange(1, 1300), rng.randrange(1, 1300), rng.randrange(1100, 1450)))
            if crowded:
                cut = min(cut, rng.randrange(100, 300))
            elif self._kind == "full":
                cut = max(cut, rng.randrange(800, 1350))
            prompt = rng.choice(self._families)[:cut]
            if rng.random() < 0.6:
                prompt = np.concatenate([prompt, self._ids(self._draw, rng.choice((1, 2, 64, 200, 300)))])
        prompt = prompt[: MAX_MODEL_LEN - 1 if rng.random() < 0.99 else MAX_MODEL_LEN]
        ends = (rng.randrange(1, len(prompt) + 1), len(prompt), len(prompt) - 3, len(prompt) // 256 * 256, 256, 512)
        positions = sorted({p for p in ends if 0 < p <= len(prompt)})
        return AddRequest(
            request_id=f"r{len(self._sent)}",
            prompt_token_ids=pack_ids(prompt),
            sampling=SamplingParams(
                max_tokens=rng.choice(
                    (300, 600) if self._kind == "asleep" else (1, 2, 300) if crowded else (1, 2, 7, 30, 30, 120, 300)
                ),
                ignore_eos=rng.random() < (0.7 if crowded else 0.2),
                min_tokens=rng.choice((0, 0, 0, 5)),
                seed=rng.choice((1, 2, 3)),
            ),
            priority=rng.choice((0, 0, 0, 1, -1)),
            deadline=rng.choice((None, None, None, 0.5, 50.0)),
            cache_salt=salt,
            tenant=rng.choice(("", "x", "y")),
            snapshot_positions=pack_ids(rng.sample(positions, 1) if rng.random() < 0.6 else []),
        )

    @staticmethod
    def _ids(draw: np.random.Generator, count: int) -> np.ndarray:
        return draw.integers(2, MODEL.vocab_size, count).astype(np.int32)
