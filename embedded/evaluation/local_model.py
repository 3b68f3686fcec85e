"""A checkpoint in this process, without an engine: what needs logits or streams instead of answers.

Letters: T tokens of a chunk, L rows that need logits, M streams, D hidden, V vocab.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.batch import ForwardBatch
from model.checkpoint import inspect_checkpoint, load_model
from model.kv_cache import KVCache, RowStore
from model.kv_layout import KVLayout
from model.ops.registry import OpTable
from model.ops.table import resolve_ops
from model.transformer import Transformer
from server.text.tokenizer import Tokenizer

CHUNK_TOKENS = 1024

ChangesOps = Callable[[OpTable], OpTable]


def unchanged(ops: OpTable) -> OpTable:
    return ops


class LocalModel:
    """A model in float32 and its tokenizer."""

    def __init__(self, transformer: Transformer, tokenizer: Tokenizer) -> None:
        self.transformer = transformer
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, model_dir: Path, *, change_ops: ChangesOps = unchanged, with_mtp: bool = False) -> "LocalModel":
        """On a GPU where there is one. Raises CheckpointError, ConfigError or TokenizerError."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        transformer = load_model(
            model_dir,
            dtype=torch.float32,
            numerics="plain",
            device=device,
            ops=change_ops(resolve_ops(device)),
            with_mtp=with_mtp,
            progress=False,
        )
        return cls(transformer, Tokenizer.load(model_dir, transformer.config.vocab_size))

    @staticmethod
    def has_mtp(model_dir: Path) -> bool:
        return inspect_checkpoint(model_dir).drafter == "mtp"


class Request:
    """One sequence with memory of its own."""

    def __init__(self, transformer: Transformer, most_tokens: int) -> None:
        self._model = transformer
        self._device = transformer.build.device
        layout = KVLayout(config=transformer.config, row_format="float32", index_format="float32")
        self._pages = layout.pages_for(most_tokens)
        self.cache = KVCache(
            layout, num_pages=self._pages, num_slots=1, device=self._device, dtype=transformer.build.dtype
        )
        self.cache.reset_slots(torch.zeros(1, dtype=torch.int64, device=self._device))
        self.position = 0

    @torch.inference_mode()
    def streams(self, tokens: Sequence[int]) -> Tensor:
        """Residual streams [T, M, D] of the next tokens, before hc_head."""
        parts = [self._model.streams(batch, self.cache) for batch in self._chunks(tokens)]
        return torch.cat(parts)

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int], rows: int) -> Tensor:
        """fp32 logits [L, V] behind the last `rows` of the next tokens."""
        first = len(tokens) - rows
        assert first >= 0
        parts, done = [], 0
        for batch in self._chunks(tokens):
            length = batch.token_ids_T.shape[0]
            wanted = max(0, done + length - max(first, done))
            # A step computes at least one row.
            batch.logits_index_L = torch.arange(length - max(1, wanted), length, device=self._device)
            hidden_LD = self._model(batch, self.cache)
            if wanted:
                parts.append(self._model.logits(hidden_LD))
            done += length
        return torch.cat(parts)

    def save(self) -> tuple[int, Tensor]:
        """The slot as it is; what the pages hold stays."""
        row = torch.zeros(self.cache.layout.bytes_per_snapshot, dtype=torch.uint8, device=self._device)
        self.cache.pack_slot(0, self.position, row)
        return self.position, row

    def restore(self, saved: tuple[int, Tensor]) -> None:
        """Go on behind the tokens that were computed when `saved` was made."""
        self.position, row = saved
        self.cache.unpack_slot(0, self.position, row)

    @torch.inference_mode()
    def draft_logits(self, tokens: Sequence[int], streams_TMD: Tensor) -> Tensor:
        """fp32 logits [T, V] of the MTP block for whole sequences: row i, of the streams of position i and of token
        i + 1, is about token i + 2. `tokens` are one more than the streams' rows."""
        assert self._model.mtp is not None and len(tokens) == streams_TMD.shape[0] + 1
        window: RowStore = self.cache.new_window()
        parts = []
        for first in range(0, len(tokens) - 1, CHUNK_TOKENS):
            chunk = tokens[first + 1 : first + 1 + CHUNK_TOKENS]
            rows = streams_TMD[first : first + len(chunk)]
            parts.append(self._model.mtp(self._batch(chunk, first), rows, self.cache, window)[1])
        return torch.cat(parts)

    def _chunks(self, tokens: Sequence[int]) -> Iterator[ForwardBatch]:
        for first in range(0, len(tokens), CHUNK_TOKENS):
            chunk = tokens[first : first + CHUNK_TOKENS]
            yield self._batch(chunk, self.position)
            self.position += len(chunk)

    def _batch(self, tokens: Sequence[int], start: int) -> ForwardBatch:
        count, device = len(tokens), self._device
        return ForwardBatch(
            token_ids_T=torch.tensor(tokens, dtype=torch.int64, device=device),
            positions_T=torch.arange(start, start + count, device=device),
            request_index_T=torch.zeros(count, dtype=torch.int64, device=device),
            query_start_B1=torch.tensor([0, count], device=device),
            seq_lens_B=torch.tensor([start + count], device=device),
            page_table_BP=torch.arange(self._pages, device=device).unsqueeze(0),
            slot_B=torch.zeros(1, dtype=torch.int64, device=device),
            logits_index_L=torch.arange(count, device=device),
            query_lens=(count,),
            start_positions=(start,),
        )
