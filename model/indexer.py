"""Lightning indexer: which entries of a CSA layer a token attends to (architecture, 2.5)."""

from torch import Tensor

from model.build import Build, CheckpointModule
from model.compressor import Compressor
from model.config import CSA_RATIO
from model.kv_cache import RowStore
from model.linear import Linear
from model.ops.reference import quant
from model.step import Step


class Indexer(CheckpointModule):
    """Scores every visible entry by a cheap attention of its own and keeps the best `index_topk`. Replicated."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        c = build.config
        self.wq_b = Linear(build, c.q_lora_rank, c.index_n_heads * c.index_head_dim)
        self.weights_proj = Linear(build, c.hidden_size, c.index_n_heads, quantized=False)
        self.compressor = Compressor(build, c.index_head_dim, CSA_RATIO, overlap=True, index_keys=True)

    def forward(self, x_TD: Tensor, qr_TQ: Tensor, step: Step, keys: RowStore) -> Tensor | None:
        """Selected entries [T, S], or None when every token sees no more than `index_topk`: all are selected."""
        build, c = self.build, self.build.config
        if step.csa_entries.most_visible <= c.index_topk:
            return None
        q_TIJ = self.wq_b(qr_TQ).unflatten(1, (c.index_n_heads, c.index_head_dim))
        q_TIJ = build.ops.rotate(q_TIJ, step.compressed_rotation)
        official = build.numerics == "official"
        if official:
            q_TIJ = quant.fp4_round_trip(quant.hadamard(q_TIJ))
        weights_TI = self.weights_proj(x_TD) * (c.index_head_dim**-0.5 * c.index_n_heads**-0.5)
        return build.ops.index(q_TIJ, weights_TI, keys, step, step.csa_entries, c.index_topk, low_precision=official)
