"""The model's attention as one differentiable function of whole rows, and the loss that teaches the indexer.

The selection of entries has no gradient. The indexer learns from the attention it stands for: its scores, as a
distribution over the entries, are pulled to the attention that all heads together pay to each entry (KL divergence).
Before the selection is switched on every query sees all its entries; afterwards the selected ones.

Letters: those of `embedded.training.rows`; N blocks, E entries, X queries times heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from embedded.training.pieces import Pieces
from embedded.training.rows import BLOCK, Rows
from embedded.training.weights import Weights
from model.attention import Attention
from model.compressor import Compressor
from model.config import CSA_RATIO, HCA_RATIO
from model.indexer import Indexer
from model.ops.reference.norm import rms_norm
from model.rope import Rotation

QUERIES = 1024
"""Queries of one piece: the scores of a piece are in memory at once."""
_LITTLE = 1e-9


@dataclass(frozen=True, slots=True)
class Attended:
    """What a layer's attention gives, and what its indexer has to learn."""

    y_BSD: Tensor
    divergence: Tensor
    """Sum over the queries, each weighted by the attention that its keenest head pays to entries; 0 without indexer."""
    weight: Tensor
    """Sum of those weights."""


class RowAttention:
    """Attention of whole rows with the parameters of any layer."""

    def __init__(self, weights: Weights, pieces: Pieces) -> None:
        self._weights = weights
        self._pieces = pieces

    def __call__(self, attn: Attention, x_BSD: Tensor, rows: Rows, rotation: Rotation, *, sparse: bool) -> Attended:
        """`sparse` selects entries as the model does; otherwise the indexer only learns. `rotation`: [B, S, R / 2]."""
        c, weights = attn.build.config, self._weights
        eps, ratio = c.rms_norm_eps, CSA_RATIO if attn.kind == "csa" else HCA_RATIO
        cos, sin = (t.unsqueeze(2) for t in rotation)
        turned = self._pieces.turned
        latents_BSC = turned(rms_norm(weights.linear(attn.wkv, x_BSD), attn.kv_norm.weight, eps), *rotation)
        qr_BSQ = rms_norm(weights.linear(attn.wq_a, x_BSD), attn.q_norm.weight, eps)
        q_BSHC = weights.linear(attn.wq_b, qr_BSQ).unflatten(2, (attn.heads, c.head_dim))
        q_BSHC = turned(rms_norm(q_BSHC, None, eps), cos, sin)
        entries_BEC = q_BSHC.new_zeros(x_BSD.shape[0], 0, c.head_dim)
        if attn.compressor is not None:
            entries_BEC = self.entries(attn.compressor, x_BSD, rows, rotation, ratio).to(q_BSHC.dtype)
        index = None
        if attn.indexer is not None:
            # What the indexer reads is the trunk's; the trunk learns nothing from it.
            index = self._index(attn.indexer, x_BSD.detach(), qr_BSQ.detach(), rows, rotation)
        outputs = []
        divergences, amounts = [x_BSD.new_zeros((), dtype=torch.float32)], [x_BSD.new_zeros((), dtype=torch.float32)]
        for first in range(0, x_BSD.shape[1], QUERIES):
            piece = slice(first, min(first + QUERIES, x_BSD.shape[1]))
            visible = rows.entry_mask(ratio, piece)[:, :, : entries_BEC.shape[1]]
            scores = None
            if index is not None:
                q, head_weights, keys = index
                scores = self._pieces.index_scores(q[:, piece], head_weights[:, piece], keys[:, : visible.shape[2]])
                scores = scores.masked_fill(~visible, float("-inf"))
                if sparse:
                    visible = visible & best(scores.detach(), c.index_topk)
                    scores = scores.masked_fill(~visible, float("-inf"))
            o_BQHC, paid_BQHE = self._attend(attn, q_BSHC[:, piece], latents_BSC, entries_BEC, visible, rows, piece)
            outputs.append(o_BQHC)
            if scores is not None:
                divergence, amount = index_divergence(scores, paid_BQHE.detach(), visible)
                divergences.append(divergence)
                amounts.append(amount)
        o_BSHC = turned(torch.cat(outputs, dim=1), cos, -sin)
        return Attended(self._output(attn, o_BSHC), torch.stack(divergences).sum(), torch.stack(amounts).sum())

    def entries(self, compressor: Compressor, x_BSD: Tensor, rows: Rows, rotation: Rotation, ratio: int) -> Tensor:
        """Entries [B, E, C] of every `ratio` tokens, as `model.compressor` stores them; fp32."""
        with torch.autocast(x_BSD.device.type, enabled=False):
            product = F.linear(x_BSD.float(), compressor.wkv_gate.flatten(0, 1))
            values, scores = product.unflatten(1, (-1, ratio)).chunk(2, dim=-1)
            scores = scores + compressor.ape
            if compressor.overlap:
                # A token's first half of the channels belongs to the entry after its own.
                width = values.shape[-1] // 2
                before_v, before_s = (F.pad(t[:, :-1, :, :width], (0, 0, 0, 0, 1, 0)) for t in (values, scores))
                opens = rows.starts_BS == torch.arange(x_BSD.shape[1], device=x_BSD.device)
                before_s = before_s.masked_fill(opens[:, ::ratio, None, None], float("-inf"))
                values = torch.cat([before_v, values[..., width:]], dim=2)
                scores = torch.cat([before_s, scores[..., width:]], dim=2)
            entries = rms_norm(
                (scores.softmax(2) * values).sum(2), compressor.norm.weight, compressor.build.config.rms_norm_eps
            )
            cos, sin = rotation
            return self._pieces.turned(entries, cos[:, ::ratio], sin[:, ::ratio])

    def _index(
        self, indexer: Indexer, x_BSD: Tensor, qr_BSQ: Tensor, rows: Rows, rotation: Rotation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, S, I, J], head weights [B, S, I] and keys [B, E, J]."""
        c, (cos, sin) = indexer.build.config, rotation
        keys_BEJ = self.entries(indexer.compressor, x_BSD, rows, rotation, CSA_RATIO)
        q_BSIJ = self._weights.linear(indexer.wq_b, qr_BSQ).unflatten(2, (c.index_n_heads, c.index_head_dim))
        head_weights_BSI = self._weights.linear(indexer.weights_proj, x_BSD)
        scale = c.index_head_dim**-0.5 * c.index_n_heads**-0.5
        return self._pieces.turned(q_BSIJ, cos.unsqueeze(2), sin.unsqueeze(2)), head_weights_BSI * scale, keys_BEJ

    def _attend(
        self,
        attn: Attention,
        q_BQHC: Tensor,
        latents_BSC: Tensor,
        entries_BEC: Tensor,
        visible_BQE: Tensor,
        rows: Rows,
        piece: slice,
    ) -> tuple[Tensor, Tensor]:
        """(o [B, Q, H, C], what is paid to entries [B, Q, H, E])."""
        queries, heads = q_BQHC.shape[1:3]
        blocks = slice(piece.start // BLOCK, piece.stop // BLOCK)
        q_BNXC = q_BQHC.unflatten(1, (-1, BLOCK)).flatten(2, 3)
        own = latents_BSC.unflatten(1, (-1, BLOCK))
        keys_BNKC = torch.cat([F.pad(own[:, :-1], (0, 0, 0, 0, 1, 0)), own], dim=2)[:, blocks]
        near = (q_BNXC @ keys_BNKC.transpose(2, 3)).unflatten(2, (BLOCK, heads)).flatten(1, 2) * attn.scale
        entries_BEC = entries_BEC[:, : visible_BQE.shape[2]]
        far = (q_BQHC.flatten(1, 2) @ entries_BEC.transpose(1, 2)).unflatten(1, (queries, heads)) * attn.scale
        seen = rows.window_mask(blocks).flatten(1, 2)
        paid = self._pieces.softmax(near, seen, far, visible_BQE, attn.attn_sink)
        p_near, p_far = paid[..., : 2 * BLOCK], paid[..., 2 * BLOCK + 1 :]
        o_BNXC = p_near.to(q_BQHC.dtype).unflatten(1, (-1, BLOCK)).flatten(2, 3) @ keys_BNKC
        far_o = p_far.to(q_BQHC.dtype).flatten(1, 2) @ entries_BEC
        return o_BNXC.unflatten(2, (BLOCK, heads)).flatten(1, 2) + far_o.unflatten(1, (queries, heads)), p_far

    def _output(self, attn: Attention, o_BSHC: Tensor) -> Tensor:
        o_BSGX = o_BSHC.unflatten(2, (attn.groups, -1)).flatten(3)
        weight_GOX = self._weights.matrix(attn.wo_a).unflatten(0, (attn.groups, -1))
        u_BSGO = torch.einsum("bsgx,gox->bsgo", o_BSGX, weight_GOX.to(o_BSGX.dtype))
        return self._weights.linear(attn.wo_b, u_BSGO.flatten(2))


def best(scores_BQE: Tensor, k: int) -> Tensor:
    """bool: the k best of each query; those level with the last one as well."""
    if scores_BQE.shape[2] <= k:
        return torch.ones_like(scores_BQE, dtype=torch.bool)
    least = scores_BQE.topk(k, dim=2, sorted=False).values.amin(2, keepdim=True)
    return scores_BQE >= least


def index_divergence(scores_BQE: Tensor, paid_BQHE: Tensor, visible_BQE: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of weight * KL, sum of weights): the attention paid to entries against the softmax of the scores."""
    weight_BQ = paid_BQHE.sum(3).amax(2)
    target = paid_BQHE.sum(2)
    target = target / target.sum(2, keepdim=True).clamp_min(_LITTLE)
    seen = visible_BQE.any(2, keepdim=True)
    log_q = scores_BQE.masked_fill(~seen, 0.0).log_softmax(2).masked_fill(~visible_BQE, 0.0)
    kl_BQ = (target * (target.clamp_min(_LITTLE).log() - log_q)).sum(2)
    return (weight_BQ * kl_BQ).sum(), weight_BQ.sum()
