"""Multi-token prediction: one extra layer that drafts the token after next (architecture, 2.9)."""

from collections.abc import Callable

from torch import Tensor

from model.batch import ForwardBatch
from model.build import Build
from model.kv_cache import KVCache, RowStore
from model.layer import Layer
from model.linear import Linear
from model.norm import RMSNorm
from model.rope import Rope
from model.step import Step


class MTPBlock(Layer):
    """Row i takes the streams of position i and the token of position i + 1, and predicts that of position i + 2.

    A sliding-window layer with score routing of its own; embedding and head are the main model's.
    """

    def __init__(
        self, build: Build, embed: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], rope: Rope
    ) -> None:
        super().__init__(build, build.config.num_hidden_layers, "window", hashed=False)
        hidden = build.config.hidden_size
        self.declare_head_site()
        self.e_proj = Linear(build, hidden, hidden)
        self.h_proj = Linear(build, hidden, hidden)
        self.enorm = RMSNorm(build, hidden)
        self.hnorm = RMSNorm(build, hidden)
        self.norm = RMSNorm(build, hidden)
        # In a tuple, so that the main model's modules are not counted as children of this one.
        self._shared = (embed, head)
        self._rope = rope

    def forward(
        self, batch: ForwardBatch, previous_TMD: Tensor, cache: KVCache, window: RowStore
    ) -> tuple[Tensor, Tensor]:
        """Streams [T, M, D] (to chain another draft) and fp32 logits [T, V].

        `batch.token_ids_T` holds the next tokens, its positions are those of the previous ones; `previous_TMD` are
        the streams before hc_head; `window` is a ring of this block's own (`cache.new_window()`).
        """
        step = Step(batch, cache.layout, self._rope)
        embed, head = self._shared
        e_TD = self.e_proj(self.enorm(embed(batch.token_ids_T)))
        h_TMD = self.h_proj(self.hnorm(previous_TMD))
        streams_TMD = self.block(h_TMD + e_TD.unsqueeze(1), step, cache, window)
        return streams_TMD, head(self.norm(self.hyper_head(streams_TMD)))
