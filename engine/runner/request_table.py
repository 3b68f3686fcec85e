"""What the runner remembers between steps of each request, in columns by slot.

The table is told of a request once (`NewRequest`) and then follows the plans: pages are appended, sampled tokens are
appended, and the row is forgotten when a plan says so. Adding a request rewrites every column of its slot.
"""

import numpy as np

from engine.messages import SamplingParams
from engine.plan import NewRequest
from engine.runner.penalties import PenaltyCounts
from engine.runner.philox import uniform
from engine.runner.sampler import GREEDY_TEMPERATURE, NO_PENALTIES, SamplingBatch

_FIRST_PAGES = 16
_SPARE_TOKENS = 256


class RequestTable:
    """Rows of at most `num_slots` requests with at most `max_pages` pages each."""

    def __init__(self, *, num_slots: int, max_pages: int, eos_token_id: int, counts: PenaltyCounts) -> None:
        self.counts = counts
        self.page_ids_SP = np.zeros((num_slots, min(_FIRST_PAGES, max_pages)), dtype=np.int32)
        """Page ids of each slot; 0 past its own pages. Columns are added as requests grow."""
        self.num_pages_S = np.zeros(num_slots, dtype=np.int64)
        self.num_tokens_S = np.zeros(num_slots, dtype=np.int64)
        """Tokens known: prompt and output."""
        self.num_computed_S = np.zeros(num_slots, dtype=np.int64)
        """Tokens that the slot stands behind; -1 while a resumed request's slot is neither restored nor replayed."""
        self._max_pages = max_pages
        self._eos_token_id = eos_token_id
        self._slots: dict[str, int] = {}
        self._owners: list[str | None] = [None] * num_slots
        self._tokens: list[np.ndarray] = [np.empty(0, dtype=np.int32)] * num_slots
        self._num_prompt_S = np.zeros(num_slots, dtype=np.int64)
        self._temperature_S = np.zeros(num_slots)
        self._top_k_S = np.zeros(num_slots, dtype=np.int64)
        self._top_p_S = np.ones(num_slots)
        self._min_p_S = np.zeros(num_slots)
        self._seed_S = np.zeros(num_slots, dtype=np.uint64)
        self._penalties_3S = np.zeros((3, num_slots))
        self._num_logprobs_S = np.full(num_slots, -1, dtype=np.int64)
        self._min_tokens_S = np.zeros(num_slots, dtype=np.int64)
        no_ids, no_values = np.empty(0, dtype=np.int64), np.empty(0)
        self._bias: list[tuple[np.ndarray, np.ndarray]] = [(no_ids, no_values)] * num_slots
        self._stop_ids: list[np.ndarray] = [no_ids] * num_slots

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, request_id: str) -> int:
        return self._slots[request_id]

    def add(self, new: NewRequest) -> None:
        """Take a request in; its slot must be free."""
        slot, sampling, known = new.slot, new.sampling, len(new.token_ids)
        assert new.request_id not in self._slots, f"{new.request_id} is new twice"
        assert self._owners[slot] is None, f"slot {slot} belongs to {self._owners[slot]}"
        assert known >= new.num_prompt_tokens >= 1
        assert 0 <= new.num_computed_tokens < known, "a resumed request computes at least its last known token"
        self._slots[new.request_id] = slot
        self._owners[slot] = new.request_id
        tokens = np.empty(known + min(sampling.max_tokens, _SPARE_TOKENS), dtype=np.int32)
        tokens[:known] = new.token_ids
        self._tokens[slot] = tokens
        self.num_tokens_S[slot] = known
        self.num_computed_S[slot] = -1 if new.num_computed_tokens else 0
        self._num_prompt_S[slot] = new.num_prompt_tokens
        self.page_ids_SP[slot] = 0
        self.num_pages_S[slot] = 0
        self._set_sampling(slot, sampling)
        if (self._penalties_3S[:, [slot]] != NO_PENALTIES).any():
            self.counts.start(slot, new.token_ids, new.num_prompt_tokens)

    def _set_sampling(self, slot: int, sampling: SamplingParams) -> None:
        # The engine draws a seed for every request; a greedy one never looks at it.
        assert sampling.seed is not None or sampling.temperature < GREEDY_TEMPERATURE, "a request without a seed"
        self._temperature_S[slot] = sampling.temperature
        self._top_k_S[slot] = sampling.top_k
        self._top_p_S[slot] = sampling.top_p
        self._min_p_S[slot] = sampling.min_p
        self._seed_S[slot] = (sampling.seed or 0) % 2**64
        self._penalties_3S[:, slot] = (
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        )
        self._num_logprobs_S[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        self._min_tokens_S[slot] = sampling.min_tokens
        self._bias[slot] = (
            np.fromiter(sampling.logit_bias.keys(), dtype=np.int64),
            np.fromiter(sampling.logit_bias.values(), dtype=np.float64),
        )
        self._stop_ids[slot] = np.array(sorted({self._eos_token_id, *sampling.stop_token_ids}), dtype=np.int64)

    def remove(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored (the only step they were planned for may have failed)."""
        slot = self._slots.pop(request_id, None)
        if slot is not None:
            self._owners[slot] = None
            self._tokens[slot] = np.empty(0, dtype=np.int32)

    def append_pages(self, slot: int, page_ids: tuple[int, ...]) -> None:
        first = int(self.num_pages_S[slot])
        last = first + len(page_ids)
        assert last <= self._max_pages, f"slot {slot}: {last} pages, at most {self._max_pages}"
        columns = self.page_ids_SP.shape[1]
        if last > columns:
            grown = min(max(last, 2 * columns), self._max_pages)
            self.page_ids_SP = np.pad(self.page_ids_SP, ((0, 0), (0, grown - columns)))
        self.page_ids_SP[slot, first:last] = page_ids
        self.num_pages_S[slot] = last

    def append_tokens(self, slots_N: np.ndarray, token_ids_N: np.ndarray) -> None:
        """One sampled token for each of these slots."""
        for slot, token_id in zip(slots_N.tolist(), token_ids_N.tolist(), strict=True):
            count = int(self.num_tokens_S[slot])
            if count == len(self._tokens[slot]):
                spare = np.empty(max(_SPARE_TOKENS, count // 4), dtype=np.int32)
                self._tokens[slot] = np.concatenate([self._tokens[slot], spare])
            self._tokens[slot][count] = token_id
        self.num_tokens_S[slots_N] += 1
        counted = (self._penalties_3S[:, slots_N] != NO_PENALTIES).any(0)
        if counted.any():
            self.counts.add(slots_N[counted], token_ids_N[counted])

    def token_ids(self, slot: int, start: int, stop: int) -> np.ndarray:
        """int32 view of tokens start .. stop, all of them known."""
        assert stop <= self.num_tokens_S[slot], f"slot {slot}: token {stop} of {self.num_tokens_S[slot]}"
        return self._tokens[slot][start:stop]

    def sampling(self, slots_L: np.ndarray) -> SamplingBatch:
        """Parameters of the rows that sample now; the token to come stands at position `num_tokens` of its request."""
        positions_L = self.num_tokens_S[slots_L]
        biases = [self._bias[slot] for slot in slots_L]
        young_L = positions_L - self._num_prompt_S[slots_L] < self._min_tokens_S[slots_L]
        banned = [
            self._stop_ids[slot] if young else self._stop_ids[slot][:0]
            for slot, young in zip(slots_L, young_L, strict=True)
        ]
        rows_L = np.arange(len(slots_L))
        return SamplingBatch(
            temperature_L=self._temperature_S[slots_L],
            top_k_L=self._top_k_S[slots_L],
            top_p_L=self._top_p_S[slots_L],
            min_p_L=self._min_p_S[slots_L],
            uniform_L=uniform(self._seed_S[slots_L], positions_L),
            num_logprobs_L=self._num_logprobs_S[slots_L],
            slot_L=slots_L,
            penalties_3L=self._penalties_3S[:, slots_L],
            bias_rows_N=np.repeat(rows_L, [len(ids) for ids, _ in biases]),
            bias_ids_N=np.concatenate([ids for ids, _ in biases]),
            bias_values_N=np.concatenate([values for _, values in biases]),
            banned_rows_N=np.repeat(rows_L, [len(ids) for ids in banned]),
            banned_ids_N=np.concatenate(banned),
        )
