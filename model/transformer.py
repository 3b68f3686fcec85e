"""DeepSeek-V4: embedding, layers over four residual streams, head (architecture, 2.1).

Letters: T tokens in the step, B requests, L rows that need logits, P pages, D hidden, M streams, H heads, C head dim,
R rope dim, Q q-lora, G groups, O o-lora, I index heads, J index dim, S selected entries, W window, E experts,
A experts per token, F expert inner, V vocab.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from model.batch import ForwardBatch
from model.build import Build, CheckpointModule
from model.config import ModelConfig
from model.hyper_connections import HyperSites, expand_streams
from model.kv_cache import KVCache
from model.layer import Layer
from model.linear import Linear, VocabEmbedding, VocabHead
from model.mtp import MTPBlock
from model.norm import RMSNorm
from model.ops.registry import OpTable
from model.ops.table import resolve_ops
from model.parallel import ParallelGroup
from model.quant import WeightFormat
from model.replay import replay_steps
from model.rope import Rope
from model.step import Step
from model.tensors import CheckpointTensor


class Transformer(HyperSites):
    """The model of one rank. Built on the meta device it only counts; built on a real one it awaits its weights."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        weights: WeightFormat,
        dtype: torch.dtype,
        numerics: Literal["plain", "official"] = "plain",
        ops: OpTable | None = None,
        group: ParallelGroup | None = None,
        with_mtp: bool = False,
        device: torch.device | str = "meta",
    ) -> None:
        """`numerics="official"` simulates the reference's quantized arithmetic (architecture, 2.8).

        Raises:
            ValueError: a dim does not divide over the group; names the config field.
        """
        device = torch.device(device)
        super().__init__(
            Build(
                config=config,
                weights=weights,
                dtype=dtype,
                numerics=numerics,
                ops=ops or resolve_ops(device.type),
                group=group or ParallelGroup.single(),
                device=device,
            )
        )
        build = self.build
        self.config = config
        self.embed = VocabEmbedding(build)
        self.layers = nn.ModuleList(
            Layer(build, i, kind, hashed=i < config.num_hash_layers) for i, kind in enumerate(config.layer_kinds)
        )
        self.norm = RMSNorm(build, config.hidden_size)
        self.head = VocabHead(build)
        self.declare_head_site()
        self.rope = Rope(config)
        self.mtp = MTPBlock(build, self.embed, self.head, self.rope) if with_mtp else None

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """Every tensor of the model under its official name; this rank's experts only."""
        for path, module in self.named_modules():
            if isinstance(module, CheckpointModule):
                prefix = f"{path}." if path else ""
                if path.split(".")[0] == "mtp":
                    prefix = prefix.replace("mtp.", "mtp.0.", 1)
                yield from module.own_tensors(prefix)

    def finish_loading(self) -> None:
        """Once all weights are in: rotary tables to the device, matrices into the op table's fastest form."""
        self.rope.to(self.build.device)
        for module in self.modules():
            if isinstance(module, Linear):
                module.finish_loading()
            elif isinstance(module, HyperSites):
                module.expand_scales()

    def forward(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Final hidden state [L, D] of the rows `batch.logits_index_L`, in the model's dtype; writes `cache`."""
        streams_TMD = self.streams(batch, cache)
        hidden_LD: Tensor = self.norm(self.hyper_head(streams_TMD.index_select(0, batch.logits_index_L)))
        return hidden_LD

    def streams(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Residual streams [T, M, D] after the last layer, before hc_head."""
        step = Step(batch, cache.layout, self.rope)
        x_TMD = expand_streams(self.build, self.embed(batch.token_ids_T))
        for layer, window in zip(self.layers, cache.windows, strict=True):
            assert isinstance(layer, Layer)
            x_TMD = layer.block(x_TMD, step, cache, window)
        return x_TMD

    def replay(self, batch: ForwardBatch, cache: KVCache, position: int) -> None:
        """Rebuild the slot of one request at `position` from its tokens and pages; pages are read, never written.

        `batch`: consecutive tokens of that request. The first batch of a replay starts `replay_rows` tokens before
        `position`, in a slot that has been reset; the last one ends at `position`. Batches may be cut anywhere.
        """
        x_NMD = expand_streams(self.build, self.embed(batch.token_ids_T))
        for layer, window, rows in zip(
            self.layers, cache.windows, replay_steps(batch, cache.layout, self.rope, position), strict=False
        ):
            assert isinstance(layer, Layer)
            x_NMD = layer.replay(x_NMD, rows, cache, window)

    def logits(self, hidden_LD: Tensor) -> Tensor:
        """fp32 [L, V] of hidden states that `forward` returned."""
        logits_LV: Tensor = self.head(hidden_LD)
        return logits_LV
