"""Matrices: plain or FP8, whole or one rank's shard. Quantized weights are dequantized where they compute."""

import torch
from torch import Tensor, nn

from model.build import Build, CheckpointModule
from model.ops.reference import quant
from model.quant import WEIGHT_BLOCK
from model.tensors import Shard

FLOAT_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class Linear(CheckpointModule):
    """y = x W^T in one of the checkpoint's dense formats; input and output dims of the full matrix are given.

    `shard_dim` 0 splits the outputs over the group (columns of y), 1 the inputs (the caller reduces), None neither.
    `quantized=False` keeps the tensor in floating point in every weight format.
    """

    def __init__(
        self,
        build: Build,
        in_features: int,
        out_features: int,
        *,
        field: str = "",
        shard_dim: int | None = None,
        quantized: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`field` names the config field behind the split dim; ValueError if that does not divide."""
        super().__init__(build)
        self.quantized = quantized and build.weights.dense == "fp8"
        self._packed: Tensor | None = None
        shape = (out_features, in_features)
        shard = None
        if shard_dim is not None:
            unit = WEIGHT_BLOCK if self.quantized else 1
            start, length = build.group.share(field, shape[shard_dim], unit)
            shard = Shard(dim=shard_dim, start=start, length=length) if build.group.size > 1 else None
        if not self.quantized:
            self.weight = self.declare("weight", shape, build.float_code, dtype or build.dtype, shard)
            return
        self.weight = self.declare("weight", shape, "F8_E4M3", torch.float8_e4m3fn, shard)
        blocks = (-(-out_features // WEIGHT_BLOCK), -(-in_features // WEIGHT_BLOCK))
        scale_shard = shard and Shard(
            dim=shard.dim, start=shard.start // WEIGHT_BLOCK, length=shard.length // WEIGHT_BLOCK
        )
        self.scale = self.declare("scale", blocks, build.scale_code, build.scale_dtype, scale_shard)

    def dense_weight(self) -> Tensor:
        """[O, I] in the model's dtype."""
        if self.quantized:
            return quant.dequantize_fp8(self.weight, self.scale, self.build.dtype)
        return self.weight

    def finish_loading(self) -> None:
        """Keep a second copy of a plain matrix in the form that the op table's `linear` reads fastest."""
        pack = self.build.ops.pack_weight
        if pack is not None and not self.quantized and self.weight.dtype == self.build.dtype:
            self._packed = pack(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.quantized and self.build.numerics == "official":
            x = quant.fp8_round_trip(x, WEIGHT_BLOCK)
        return self.build.ops.linear(x, self._packed if self._packed is not None else self.dense_weight())


class VocabEmbedding(CheckpointModule):
    """Token embedding, split over the group by vocabulary."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        vocab = build.config.vocab_size
        self.start, self.length = build.group.share("vocab_size", vocab)
        shard = Shard(dim=0, start=self.start, length=self.length) if build.group.size > 1 else None
        self.weight = self.declare("weight", (vocab, build.config.hidden_size), build.float_code, build.dtype, shard)

    def forward(self, token_ids_T: Tensor) -> Tensor:
        """[T, D] in the model's dtype."""
        if self.build.group.size == 1:
            return nn.functional.embedding(token_ids_T, self.weight)
        local = token_ids_T - self.start
        here = (local >= 0) & (local < self.length)
        rows = nn.functional.embedding(local.clamp(0, self.length - 1), self.weight)
        return self.build.group.all_reduce(rows.masked_fill_(~here.unsqueeze(1), 0.0))


class VocabHead(CheckpointModule):
    """Output projection to fp32 logits, split over the group by vocabulary."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        vocab = build.config.vocab_size
        start, length = build.group.share("vocab_size", vocab)
        shard = Shard(dim=0, start=start, length=length) if build.group.size > 1 else None
        self.weight = self.declare("weight", (vocab, build.config.hidden_size), build.float_code, build.dtype, shard)

    def forward(self, hidden_LD: Tensor) -> Tensor:
        """fp32 [L, V]."""
        return self.build.group.all_gather(self.build.ops.linear_fp32(hidden_LD, self.weight), dim=1)
