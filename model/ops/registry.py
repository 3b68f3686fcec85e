"""The table of ops that a model computes with: one callable for each op, chosen once at start.

`model/ops/reference` defines every op in plain torch; a table for a device replaces some of them by faster ones of
the same meaning. Letters as in the house: T tokens, D hidden, M streams, H heads, C head dim, I index heads, J index
dim, S selected entries, E experts, A experts per token, F expert inner.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from model.kv_cache import RowStore
    from model.ops.expert_bank import ExpertBank
    from model.rope import Rotation
    from model.step import CompressPlan, EntryPlan, Step


class LinearOp(Protocol):
    def __call__(self, x: Tensor, weight_OI: Tensor) -> Tensor:
        """[*, I] -> [*, O], in x's dtype."""
        ...


class GroupedLinearOp(Protocol):
    def __call__(self, x_TGX: Tensor, weight_GOX: Tensor) -> Tensor:
        """Each group by its own matrix: [T, G, O], in x's dtype."""
        ...


class RmsNormOp(Protocol):
    def __call__(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """Over the last dim; fp32 inside; like x."""
        ...


class RotateOp(Protocol):
    def __call__(self, x: Tensor, rotation: "Rotation", *, inverse: bool = False) -> Tensor:
        """Rotate interleaved pairs of the last channels of x [N, C] or [N, H, C], in place; returns x."""
        ...


class HyperPreOp(Protocol):
    def __call__(
        self, x_TMD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, iters: int, eps: float, norm_eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Collapse the streams: (a_TD like x, post_TM fp32, comb_TMM fp32). `scale` holds one value for each output."""
        ...


class HyperPostOp(Protocol):
    def __call__(self, y_TD: Tensor, x_TMD: Tensor, post_TM: Tensor, comb_TMM: Tensor) -> Tensor:
        """Spread a sub-layer's output over the mixed streams; like x_TMD."""
        ...


class HyperHeadOp(Protocol):
    def __call__(
        self, x_TMD: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, eps: float, norm_eps: float
    ) -> Tensor:
        """Collapse the streams before the final norm; [T, D] like x."""
        ...


class CompressOp(Protocol):
    def __call__(
        self, values_TX: Tensor, scores_TX: Tensor, plan: "CompressPlan", accumulators: Tensor, *, overlap: bool
    ) -> Tensor:
        """Fold the step's tokens into the accumulators; fp32 entries [E, C] that the step completes (before norm)."""
        ...


class IndexOp(Protocol):
    def __call__(
        self,
        q_TIJ: Tensor,
        weights_TI: Tensor,
        keys: "RowStore",
        step: "Step",
        entries: "EntryPlan",
        topk: int,
        *,
        low_precision: bool,
    ) -> Tensor:
        """Entries that each token attends to, ascending, int64 [T, S], -1 absent. Ties go to the lower entry."""
        ...


class AttentionOp(Protocol):
    def __call__(
        self,
        q_THC: Tensor,
        window_NC: Tensor,
        step: "Step",
        sink_H: Tensor,
        scale: float,
        store: "RowStore | None" = None,
        entries: "EntryPlan | None" = None,
        selected_TS: Tensor | None = None,
    ) -> Tensor:
        """Softmax over window rows, visible (or selected) entries and the sink; rows are keys and values. [T, H, C]."""
        ...


class ExpertsOp(Protocol):
    def __call__(
        self, x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor, bank: "ExpertBank", *, weight_first: bool
    ) -> Tensor:
        """Weighted sum of this rank's experts over each token's choices; fp32 [T, D]."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class OpTable:
    """One callable for each op."""

    linear: LinearOp
    linear_fp32: LinearOp
    """Operands of any float dtype, multiplied and returned in fp32."""
    grouped_linear: GroupedLinearOp
    rms_norm: RmsNormOp
    rotate: RotateOp
    hyper_pre: HyperPreOp
    hyper_post: HyperPostOp
    hyper_head: HyperHeadOp
    compress: CompressOp
    index: IndexOp
    attention: AttentionOp
    experts: ExpertsOp
    pack_weight: Callable[[Tensor], Tensor | None] | None = None
    """Once after loading: a matrix [O, I] in the form that this table's `linear` reads fastest. None: as it is."""
