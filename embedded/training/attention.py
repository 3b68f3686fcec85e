"""The model's attention as one differentiable function of whole rows, and the loss that teaches the indexer.

The selection of entries has no gradient. The indexer learns from the attention it stands for: its scores, as a
distribution over the entries, are pulled to the attention that all heads together pay to each entry (KL divergence).
Before the selection is switched on every query sees all its entries; afterwards the selected ones.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from embedded.training.rows import BLOCK, Rows
from embedded.training.weights import Weights
from model.attention import Attention
from model.compressor import Compressor
from model.config import CSA_RATIO, HCA_RATIO
from model.ops.reference.norm import rms_norm
from model.rope import Rope, Rotation

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


def attend(attn: Attention, x_BSD: Tensor, rows: Rows, rope: Rope, weights: Weights, *, sparse: bool) -> Attended:
    """`sparse` selects entries as the model does; otherwise the indexer only learns."""
    c = attn.build.config
    rotation = rope.rotation(rows.positions_BS.flatten(), compressed=attn.kind != "window")
    rotation = _unflatten(rotation, rows)
    eps = c.rms_norm_eps
    latents_BSC = turned(rms_norm(weights.linear(attn.wkv, x_BSD), attn.kv_norm.weight, eps), rotation)
    qr_BSQ = rms_norm(weights.linear(attn.wq_a, x_BSD), attn.q_norm.weight, eps)
    q_BSHC = weights.linear(attn.wq_b, qr_BSQ).unflatten(2, (attn.heads, c.head_dim))
    q_BSHC = turned(rms_norm(q_BSHC, None, eps), _per_head(rotation))
    entries_BEC = keys_BEJ = iq_BSIJ = head_weights_BSI = None
    ratio = CSA_RATIO if attn.kind == "csa" else HCA_RATIO
    if attn.compressor is not None:
        entries_BEC = compress(attn.compressor, x_BSD, rows, rotation, ratio)
    if attn.indexer is not None:
        # What the indexer reads is the trunk's; it learns nothing for it.
        x, qr = x_BSD.detach(), qr_BSQ.detach()
        keys_BEJ = compress(attn.indexer.compressor, x, rows, rotation, ratio)
        iq_BSIJ = weights.linear(attn.indexer.wq_b, qr).unflatten(2, (c.index_n_heads, c.index_head_dim))
        iq_BSIJ = turned(iq_BSIJ, _per_head(rotation))
        head_weights_BSI = weights.linear(attn.indexer.weights_proj, x) * (
            c.index_head_dim**-0.5 * c.index_n_heads**-0.5
        )
    pieces, divergences, amounts = [], [], []
    for first in range(0, x_BSD.shape[1], QUERIES):
        piece = slice(first, min(first + QUERIES, x_BSD.shape[1]))
        visible = scores = None
        if entries_BEC is not None:
            visible = rows.entry_mask(ratio, piece)
        if keys_BEJ is not None and iq_BSIJ is not None and head_weights_BSI is not None and visible is not None:
            scores = index_scores(iq_BSIJ[:, piece], head_weights_BSI[:, piece], keys_BEJ[:, : visible.shape[2]])
            scores = scores.masked_fill(~visible, float("-inf"))
            if sparse:
                visible = visible & best(scores.detach(), c.index_topk)
                scores = scores.masked_fill(~visible, float("-inf"))
        o_BQHC, paid_BQHE = _softmax(
            q_BSHC, latents_BSC, entries_BEC, visible, attn.attn_sink, attn.scale, rows, piece
        )
        pieces.append(o_BQHC)
        if scores is not None and paid_BQHE is not None and visible is not None:
            divergence, amount = index_divergence(scores, paid_BQHE.detach(), visible)
            divergences.append(divergence)
            amounts.append(amount)
    o_BSHC = turned(torch.cat(pieces, dim=1), _per_head(rotation), inverse=True)
    nothing = x_BSD.new_zeros((), dtype=torch.float32)
    return Attended(
        _output(attn, o_BSHC, weights),
        torch.stack(divergences).sum() if divergences else nothing,
        torch.stack(amounts).sum() if amounts else nothing,
    )


def compress(compressor: Compressor, x_BSD: Tensor, rows: Rows, rotation: Rotation, ratio: int) -> Tensor:
    """Entries [B, E, C] of every `ratio` tokens, as `model.compressor` stores them; fp32."""
    with torch.autocast(x_BSD.device.type, enabled=False):
        product = F.linear(x_BSD.float(), compressor.wkv_gate.flatten(0, 1))
        values, scores = product.unflatten(1, (-1, ratio)).chunk(2, dim=-1)
        scores = scores + compressor.ape
        if compressor.overlap:
            # A token's first half of the channels belongs to the entry after its own.
            width = values.shape[-1] // 2
            before_v, before_s = (F.pad(t[:, :-1, :, :width], (0, 0, 0, 0, 1, 0)) for t in (values, scores))
            opens = (rows.starts_BS == torch.arange(x_BSD.shape[1], device=x_BSD.device))[:, ::ratio, None, None]
            before_s = before_s.masked_fill(opens, float("-inf"))
            values = torch.cat([before_v, values[..., width:]], dim=2)
            scores = torch.cat([before_s, scores[..., width:]], dim=2)
        entries = (scores.softmax(2) * values).sum(2)
        cos, sin = rotation
        eps = compressor.build.config.rms_norm_eps
        return turned(rms_norm(entries, compressor.norm.weight, eps), (cos[:, ::ratio], sin[:, ::ratio]))


def index_scores(q_BQIJ: Tensor, weights_BQI: Tensor, keys_BEJ: Tensor) -> Tensor:
    """fp32 [B, Q, E]: sum over heads of weight * relu(q . key)."""
    products = q_BQIJ.flatten(1, 2) @ keys_BEJ.to(q_BQIJ.dtype).transpose(1, 2)
    products = products.unflatten(1, q_BQIJ.shape[1:3]).relu()
    return (products.float() * weights_BQI.float().unsqueeze(3)).sum(2)


def best(scores_BQE: Tensor, k: int) -> Tensor:
    """bool: the k best of each query; those level with the last one as well."""
    if scores_BQE.shape[2] <= k:
        return torch.ones_like(scores_BQE, dtype=torch.bool)
    least = scores_BQE.topk(k, dim=2, sorted=False).values.amin(2, keepdim=True)
    return scores_BQE >= least


def index_divergence(scores_BQE: Tensor, paid_BQHE: Tensor, visible_BQE: Tensor) -> tuple[Tensor, Tensor]:
    """(sum of weight * KL, sum of weights): the attention paid to entries against the softmax of the scores."""
    paid = paid_BQHE.float().masked_fill(~visible_BQE.unsqueeze(2), 0.0)
    weight_BQ = paid.sum(3).amax(2)
    target = paid.sum(2)
    target = target / target.sum(2, keepdim=True).clamp_min(_LITTLE)
    seen = visible_BQE.any(2, keepdim=True)
    log_q = scores_BQE.masked_fill(~seen, 0.0).log_softmax(2).masked_fill(~visible_BQE, 0.0)
    kl_BQ = (target * (target.clamp_min(_LITTLE).log() - log_q)).sum(2)
    return (weight_BQ * kl_BQ).sum(), weight_BQ.sum()


def turned(x: Tensor, rotation: Rotation, *, inverse: bool = False) -> Tensor:
    """The rotary channels (the last ones, interleaved pairs) turned by `rotation`; not in place."""
    cos, sin = rotation
    width = 2 * cos.shape[-1]
    still, tail = x[..., : x.shape[-1] - width], x[..., x.shape[-1] - width :].float()
    first, second = tail.unflatten(-1, (-1, 2)).unbind(-1)
    if inverse:
        sin = -sin
    pairs = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return torch.cat([still, pairs.flatten(-2).to(x.dtype)], dim=-1)


def _softmax(
    q_BSHC: Tensor,
    latents_BSC: Tensor,
    entries_BEC: Tensor | None,
    visible_BQE: Tensor | None,
    sink_H: Tensor,
    scale: float,
    rows: Rows,
    piece: slice,
) -> tuple[Tensor, Tensor | None]:
    """One softmax over window rows, entries and the sink: (o [B, Q, H, C], what is paid to entries [B, Q, H, E])."""
    batch, queries, heads, channels = q_BSHC[:, piece].shape
    blocks = slice(piece.start // BLOCK, piece.stop // BLOCK)
    q_BNXC = q_BSHC[:, piece].reshape(batch, queries // BLOCK, BLOCK * heads, channels)
    own = latents_BSC.unflatten(1, (-1, BLOCK))
    before = F.pad(own[:, :-1], (0, 0, 0, 0, 1, 0))
    keys_BNKC = torch.cat([before, own], dim=2)[:, blocks]
    near = (q_BNXC @ keys_BNKC.transpose(2, 3)).unflatten(2, (BLOCK, heads)) * scale
    near = near.masked_fill(~rows.window_mask(blocks).unsqueeze(3), float("-inf")).flatten(1, 2)
    parts = [near.float(), sink_H.view(1, 1, heads, 1).expand(batch, queries, heads, 1).float()]
    if entries_BEC is not None and visible_BQE is not None:
        entries_BEC = entries_BEC[:, : visible_BQE.shape[2]].to(q_BSHC.dtype)
        far = (q_BSHC[:, piece].flatten(1, 2) @ entries_BEC.transpose(1, 2)).unflatten(1, (queries, heads)) * scale
        parts.append(far.masked_fill(~visible_BQE.unsqueeze(2), float("-inf")).float())
    paid = torch.cat(parts, dim=3).softmax(3)
    width = 2 * BLOCK
    p_near = paid[..., :width].to(q_BSHC.dtype).reshape(batch, queries // BLOCK, BLOCK * heads, width)
    o_BQHC = (p_near @ keys_BNKC).reshape(batch, queries, heads, channels)
    if entries_BEC is None or visible_BQE is None:
        return o_BQHC, None
    p_far = paid[..., width + 1 :]
    far_o = p_far.to(q_BSHC.dtype).flatten(1, 2) @ entries_BEC
    return o_BQHC + far_o.unflatten(1, (queries, heads)), p_far


def _output(attn: Attention, o_BSHC: Tensor, weights: Weights) -> Tensor:
    o_BSGX = o_BSHC.unflatten(2, (attn.groups, -1)).flatten(3)
    weight_GOX = weights.matrix(attn.wo_a).unflatten(0, (attn.groups, -1))
    u_BSGO = torch.einsum("bsgx,gox->bsgo", o_BSGX, weight_GOX.to(o_BSGX.dtype))
    return weights.linear(attn.wo_b, u_BSGO.flatten(2))


def _unflatten(rotation: Rotation, rows: Rows) -> Rotation:
    cos, sin = (t.unflatten(0, rows.ids_BS.shape) for t in rotation)
    return cos, sin


def _per_head(rotation: Rotation) -> Rotation:
    cos, sin = rotation
    return cos.unsqueeze(2), sin.unsqueeze(2)
