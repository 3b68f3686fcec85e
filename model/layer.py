"""One decoder layer: attention and experts, each between a collapse and a spread of the residual streams."""

from torch import Tensor

from model.attention import Attention
from model.build import Build
from model.config import LayerKind
from model.hyper_connections import HyperSites
from model.kv_cache import KVCache, RowStore
from model.moe import MoE
from model.norm import RMSNorm
from model.replay import ReplayRows
from model.step import Step


class Layer(HyperSites):
    """Streams in, streams out."""

    def __init__(self, build: Build, layer: int, kind: LayerKind, *, hashed: bool) -> None:
        super().__init__(build)
        self.declare_mixing_site("attn")
        self.declare_mixing_site("ffn")
        self.attn_norm = RMSNorm(build, build.config.hidden_size)
        self.attn = Attention(build, kind, layer)
        self.ffn_norm = RMSNorm(build, build.config.hidden_size)
        self.ffn = MoE(build, hashed=hashed)

    def block(self, x_TMD: Tensor, step: Step, cache: KVCache, window: RowStore) -> Tensor:
        """[T, M, D]; `window` is the ring of this layer."""
        a_TD, post, comb = self.hyper_pre("attn", x_TMD)
        y_TD = self.attn(self.attn_norm(a_TD), step, cache, window)
        return self._experts(self.build.ops.hyper_post(y_TD, x_TMD, post, comb), step)

    def replay(self, x_NMD: Tensor, rows: ReplayRows, cache: KVCache, window: RowStore) -> Tensor:
        """Rebuild this layer's part of a slot; streams [O, M, D] of the last O of the rows that enter."""
        a_ND, post, comb = self.hyper_pre("attn", x_NMD)
        y_OD = self.attn.replay(self.attn_norm(a_ND), rows, cache, window)
        if rows.output is None:
            return x_NMD[:0]
        last = slice(-rows.output.num_tokens, None)
        return self._experts(self.build.ops.hyper_post(y_OD, x_NMD[last], post[last], comb[last]), rows.output)

    def _experts(self, x_TMD: Tensor, step: Step) -> Tensor:
        a_TD, post, comb = self.hyper_pre("ffn", x_TMD)
        y_TD = self.ffn(self.ffn_norm(a_TD), step.batch.token_ids_T)
        return self.build.ops.hyper_post(y_TD, x_TMD, post, comb)
