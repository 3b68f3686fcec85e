"""The model as one differentiable function of whole rows: the same parameters as `model.Transformer`, other loops.

    rows -> embed -> 4 streams -> [ attention, experts ] x layers -> head -> loss
                                                          \\-> MTP block -> loss of the token after next

What serves computes ragged batches over pages; what learns computes rows from their start. Both read one
`Transformer`, so what has been trained is exported as it stands. Tests compare the two.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from embedded.training.attention import RowAttention
from embedded.training.pieces import Pieces
from embedded.training.rows import Rows
from embedded.training.weights import Weights
from model.config import ModelConfig
from model.hyper_connections import HyperSites, expand_streams
from model.layer import Layer
from model.linear import Linear
from model.moe import MoE
from model.mtp import MTPBlock
from model.norm import RMSNorm
from model.ops.reference.activation import swiglu
from model.ops.reference.norm import rms_norm
from model.quant import OFFICIAL, WeightFormat
from model.rope import Rotation
from model.transformer import Transformer

LOSS_TOKENS = 8192
"""Tokens whose logits are in memory at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Means over the weights; `loads` holds, for each layer with score routing, the share of each expert [E]."""

    next_token: Tensor
    token_after: Tensor
    index: Tensor
    right: Tensor
    """Share of the tokens of weight 1 or more that are the most likely ones."""
    drafted: Tensor
    """The same of the tokens that the MTP block predicts."""
    loads: tuple[Tensor, ...]


class Network(nn.Module):
    """Owns the parameters (fp32). Expert biases are not learnt by gradient: `balance` moves them."""

    def __init__(
        self, config: ModelConfig, device: torch.device | str = "cpu", *, pieces: Pieces | None = None
    ) -> None:
        super().__init__()
        self.pieces = pieces or Pieces()
        plain = WeightFormat(dense="float32", experts="float32", scale=None)
        self.config = config
        self.sparse = False
        """Whether entries are selected, see `embedded.training.attention`."""
        self.model = Transformer(config, weights=plain, dtype=torch.float32, with_mtp=True, device=device)
        self.model.rope.to(torch.device(device))
        official = Transformer(config, weights=OFFICIAL, dtype=torch.bfloat16, with_mtp=True, device="meta")
        fp8 = {name for name, m in official.named_modules() if isinstance(m, Linear) and m.quantized}
        self.weights = Weights(self.model, frozenset(fp8))
        self._attention = RowAttention(self.weights, self.pieces)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(parameter.is_floating_point() and not name.endswith("gate.bias"))

    def forward(self, rows: Rows) -> Losses:
        x_BSMD, divergence, weight, loads = self.streams(rows)
        next_loss, right = self._loss(self.hidden(x_BSMD), *rows.targets(1))
        drafts_BSMD, draft_loads = self.draft_streams(x_BSMD, rows)
        after_loss, drafted = self._loss(self._draft_hidden(drafts_BSMD), *rows.targets(2))
        return Losses(
            next_token=next_loss,
            token_after=after_loss,
            index=divergence / weight.clamp_min(1.0),
            right=right,
            drafted=drafted,
            loads=(*loads, *draft_loads),
        )

    def streams(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        """Residual streams [B, S, M, D] after the last layer; the indexers' divergences and their weights; loads."""
        x_BSD = F.embedding(rows.ids_BS, self.model.embed.weight)
        x_BSMD = expand_streams(self.model.build, x_BSD.flatten(0, 1)).unflatten(0, rows.ids_BS.shape)
        divergences, weights, loads = [], [], []
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            x_BSMD, divergence, weight, load = self._block(layer, x_BSMD, rows)
            divergences.append(divergence)
            weights.append(weight)
            if not layer.ffn.gate.hashed:
                loads.append(load)
        return x_BSMD, torch.stack(divergences).sum(), torch.stack(weights).sum(), tuple(loads)

    def hidden(self, x_BSMD: Tensor) -> Tensor:
        """What the head reads, [B, S, D]."""
        return self._collapsed(self.model, x_BSMD, self.model.norm)

    def draft_streams(self, x_BSMD: Tensor, rows: Rows) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The MTP block's streams: row i knows the tokens up to i + 1."""
        mtp, eps = self._mtp, self.config.rms_norm_eps
        e_BSD = F.embedding(torch.roll(rows.ids_BS, -1, dims=1), self.model.embed.weight)
        e_BSD = self.weights.linear(mtp.e_proj, rms_norm(e_BSD, mtp.enorm.weight, eps))
        h_BSMD = self.weights.linear(mtp.h_proj, rms_norm(x_BSMD, mtp.hnorm.weight, eps))
        drafts_BSMD, _, _, load = self._block(mtp, h_BSMD + e_BSD.unsqueeze(2), rows)
        return drafts_BSMD, (load,)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [*, V]."""
        return F.linear(hidden, self.model.head.weight).float()

    def draft_logits(self, drafts_BSMD: Tensor) -> Tensor:
        return self.logits(self._draft_hidden(drafts_BSMD))

    def balance(self, loads: tuple[Tensor, ...], step: float) -> None:
        """Move each score-routed gate's biases by `step` toward even use of the experts (auxiliary-loss-free)."""
        layers = [m for m in (*self.model.layers, self._mtp) if isinstance(m, Layer) and not m.ffn.gate.hashed]
        with torch.no_grad():
            for layer, load in zip(layers, loads, strict=True):
                layer.ffn.gate.bias.add_(torch.sign(load.mean() - load), alpha=step)

    @property
    def _mtp(self) -> MTPBlock:
        assert self.model.mtp is not None
        return self.model.mtp

    def _draft_hidden(self, drafts_BSMD: Tensor) -> Tensor:
        return self._collapsed(self._mtp, drafts_BSMD, self._mtp.norm)

    def _block(self, layer: Layer, x_BSMD: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if torch.is_grad_enabled():
            found: tuple[Tensor, Tensor, Tensor, Tensor] = checkpoint(
                self._compute, layer, x_BSMD, rows, use_reentrant=False
            )
            return found
        return self._compute(layer, x_BSMD, rows)

    def _compute(self, layer: Layer, x_BSMD: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(streams, divergence, its weight, load of the experts)."""
        a_BSD, post, comb = self._pre(layer, "attn", x_BSMD, layer.attn_norm)
        rotation = self._rotation(rows, compressed=layer.attn.kind != "window")
        attended = self._attention(layer.attn, a_BSD, rows, rotation, sparse=self.sparse)
        x_BSMD = self.pieces.post(attended.y_BSD, x_BSMD, post, comb)
        a_BSD, post, comb = self._pre(layer, "ffn", x_BSMD, layer.ffn_norm)
        y_BSD, load_E = self._moe(layer.ffn, a_BSD, rows)
        return self.pieces.post(y_BSD, x_BSMD, post, comb), attended.divergence, attended.weight, load_E

    def _rotation(self, rows: Rows, *, compressed: bool) -> Rotation:
        cos, sin = self.model.rope.rotation(rows.positions_BS.flatten(), compressed=compressed)
        return cos.unflatten(0, rows.ids_BS.shape), sin.unflatten(0, rows.ids_BS.shape)

    def _pre(self, sites: HyperSites, site: str, x_BSMD: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor, Tensor]:
        c, m = self.config, self.config.hc_mult
        site_parameters = self._site(sites, site, (m, m, m * m))
        return self.pieces.pre(x_BSMD, *site_parameters, norm.weight, c.rms_norm_eps, c.hc_eps, c.hc_sinkhorn_iters)

    def _collapsed(self, sites: HyperSites, x_BSMD: Tensor, norm: RMSNorm) -> Tensor:
        c = self.config
        site_parameters = self._site(sites, "head", (c.hc_mult,))
        return self.pieces.collapse(x_BSMD, *site_parameters, norm.weight, c.rms_norm_eps, c.hc_eps)

    def _site(self, sites: HyperSites, site: str, repeats: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """fn, base, and the scale of each output."""
        fn, base, scale = (getattr(sites, f"hc_{site}_{name}") for name in ("fn", "base", "scale"))
        return fn, base, torch.cat([s.expand(n) for s, n in zip(scale, repeats, strict=True)])

    def _moe(self, moe: MoE, x_BSD: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """(y [B, S, D], how much of the tokens each expert has, [E])."""
        c, gate, shared = self.config, moe.gate, moe.shared_experts
        ids, bias = (F.embedding(rows.ids_BS, gate.tid2eid), None) if gate.hashed else (None, gate.bias)
        weights_BSE, chosen_BSE = self.pieces.route(x_BSD, gate.weight, ids, bias, c.num_experts_per_tok)
        w13, w2 = self.weights.experts(moe.experts)
        y_BSD = self.pieces.experts(x_BSD, weights_BSE * c.routed_scaling_factor, w13, w2, c.swiglu_limit)
        inner = swiglu(self.weights.linear(shared.w1, x_BSD), self.weights.linear(shared.w3, x_BSD), c.swiglu_limit)
        return y_BSD + self.weights.linear(shared.w2, inner), chosen_BSE.mean((0, 1))

    def _loss(self, hidden_BSD: Tensor, targets_BS: Tensor, weights_BS: Tensor) -> tuple[Tensor, Tensor]:
        """(mean loss, share of right tokens among those that count in full)."""
        hidden, targets, weights = hidden_BSD.flatten(0, 1), targets_BS.flatten(), weights_BS.flatten()
        losses, hits = [], []
        for first in range(0, len(targets), LOSS_TOKENS):
            piece = slice(first, first + LOSS_TOKENS)
            loss, hit = checkpoint(self._token_losses, hidden[piece], targets[piece], use_reentrant=False)
            losses.append((loss * weights[piece]).sum())
            hits.append((hit * (weights[piece] >= 1.0)).sum())
        full = (weights >= 1.0).sum().clamp_min(1)
        return torch.stack(losses).sum() / weights.sum().clamp_min(1e-6), torch.stack(hits).sum() / full

    def _token_losses(self, hidden_ND: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        logits_NV = self.logits(hidden_ND)
        return F.cross_entropy(logits_NV, targets_N, reduction="none"), logits_NV.argmax(1) == targets_N
