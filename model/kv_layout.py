"""Byte sizes of a sequence's memory: pages for what grows, slots for what does not. Torch-free.

    page   256 tokens of every growing kind, all layers, one id
             CSA layer   64 entry rows [head_dim] and 64 index-key rows [index_head_dim]
             HCA layer    2 entry rows [head_dim]
    slot   bounded state of one running request
             every layer window ring, `sliding_window` rows [head_dim]; token p stands in row p mod ring
             CSA layer   two online softmax accumulators (max, sum, weighted sum; fp32) for the entry in progress and
                         for the overlap of the next one, of the main compressor and of the index compressor
             HCA layer   one accumulator
    snapshot   a slot at a position p, packed: the last `sliding_window - 1` window rows before p of every layer, and
               the accumulators. It holds all that a request needs beside its pages to go on at p.

The same functions plan, allocate, admit and document (architecture 4.1-4.3; kv-and-scheduling 8.1).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from model.config import CSA_RATIO, HCA_RATIO, LayerKind, ModelConfig

PAGE_TOKENS = 256
FP8_BLOCK = 64
"""Width of one FP8 scale block of a KV row (along the non-rotary channels)."""
FP4_BLOCK = 32

RowFormat = Literal["float32", "bfloat16", "fp8"]
"""Storage of window and entry rows. `fp8`: e4m3 nope channels, bf16 rope channels, E8M0 scales padded to 8 bytes."""
IndexFormat = Literal["float32", "bfloat16", "fp8", "fp4"]
"""Storage of index keys. `fp8`: e4m3 and one fp32 scale; `fp4`: packed e2m1 and one E8M0 scale for each 32 channels."""

_ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
_ACCUMULATOR_FIELDS = 3
_FP32_BYTES = 4


def row_bytes(row_format: RowFormat, head_dim: int, rope_dim: int) -> int:
    """Bytes of one window or entry row; 584 for V4's 512 channels in FP8."""
    if row_format != "fp8":
        return _ELEMENT_BYTES[row_format] * head_dim
    nope = head_dim - rope_dim
    scales = -(-nope // min(FP8_BLOCK, nope))
    return nope + 2 * rope_dim + -(-scales // 8) * 8


def index_row_bytes(index_format: IndexFormat, index_head_dim: int) -> int:
    """Bytes of one index key; 132 in FP8 and 68 in FP4 for V4's 128 channels."""
    if index_format == "fp8":
        return index_head_dim + _FP32_BYTES
    if index_format == "fp4":
        return index_head_dim // 2 + -(-index_head_dim // FP4_BLOCK)
    return _ELEMENT_BYTES[index_format] * index_head_dim


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """Sizes of pages and slots of one model under one storage format."""

    config: ModelConfig
    row_format: RowFormat
    index_format: IndexFormat
    draft_rows: int = 0
    """Extra window rows for tokens that may still be rejected."""

    @property
    def page_tokens(self) -> int:
        return PAGE_TOKENS

    @property
    def csa_rows_per_page(self) -> int:
        return PAGE_TOKENS // CSA_RATIO

    @property
    def hca_rows_per_page(self) -> int:
        return PAGE_TOKENS // HCA_RATIO

    @property
    def window_ring(self) -> int:
        """Rows of a slot's window ring in each layer."""
        return self.config.sliding_window + self.draft_rows

    @property
    def bytes_per_row(self) -> int:
        return row_bytes(self.row_format, self.config.head_dim, self.config.qk_rope_head_dim)

    @property
    def bytes_per_index_row(self) -> int:
        return index_row_bytes(self.index_format, self.config.index_head_dim)

    @cached_property
    def bytes_per_page(self) -> int:
        num_csa, num_hca = len(self.config.layers_of("csa")), len(self.config.layers_of("hca"))
        csa = num_csa * self.csa_rows_per_page * (self.bytes_per_row + self.bytes_per_index_row)
        return csa + num_hca * self.hca_rows_per_page * self.bytes_per_row

    @cached_property
    def bytes_per_slot(self) -> int:
        return self.config.num_hidden_layers * self.window_ring * self.bytes_per_row + self._accumulator_bytes

    @property
    def snapshot_window_rows(self) -> int:
        """Window rows of each layer that the next token sees beside its own."""
        return self.config.sliding_window - 1

    @cached_property
    def bytes_per_snapshot(self) -> int:
        """A snapshot at any position; one before `snapshot_window_rows` has room to spare."""
        window = self.config.num_hidden_layers * self.snapshot_window_rows * self.bytes_per_row
        return window + self._accumulator_bytes

    @property
    def _accumulator_bytes(self) -> int:
        """Of all layers of one slot."""
        c = self.config
        accumulator = _ACCUMULATOR_FIELDS * _FP32_BYTES
        csa = len(c.layers_of("csa")) * 2 * accumulator * (c.head_dim + c.index_head_dim)
        return csa + len(c.layers_of("hca")) * accumulator * c.head_dim

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // PAGE_TOKENS)

    def bytes_for(self, num_tokens: int) -> int:
        """Bytes of pages that a request of `num_tokens` tokens holds (its slot is not included)."""
        return self.pages_for(num_tokens) * self.bytes_per_page


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReplay:
    """What one layer computes so that a slot at position p can be rebuilt from tokens and pages.

    Each field is the first token of a range that ends at p; p where the range is empty.
    """

    start: int
    """Rows that enter the layer: their latent rows are made."""
    fold: int
    """Rows folded into the accumulators: whole groups, so that the first one begins empty."""
    output: int
    """Rows whose attention and experts are computed, because the next layer needs them."""


def replay_layers(config: ModelConfig, position: int) -> tuple[LayerReplay, ...]:
    """Rows of each layer in an exact replay to `position`: a triangle, `sliding_window - 1` rows wider in each layer
    below (kv-and-scheduling 0.5)."""
    window = config.sliding_window - 1
    layers: list[LayerReplay] = []
    output = position
    for kind in reversed(config.layer_kinds):
        fold = _first_folded(kind, position)
        seen = position if output == position else output - window
        start = max(0, min(position - window, fold, output, seen))
        layers.append(LayerReplay(start=start, fold=fold, output=output))
        output = start
    return tuple(reversed(layers))


def replay_rows(config: ModelConfig, position: int) -> int:
    """Tokens before `position` whose ids an exact replay reads; all of them where there are fewer."""
    return position - replay_layers(config, position)[0].start


def _first_folded(kind: LayerKind, position: int) -> int:
    if kind == "csa":
        # The entry in progress mixes its own group with the one before it.
        return max(0, position // CSA_RATIO * CSA_RATIO - CSA_RATIO)
    return position // HCA_RATIO * HCA_RATIO if kind == "hca" else position
