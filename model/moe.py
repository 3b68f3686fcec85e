"""Mixture of experts: hash or score routing, routed experts, one shared expert (architecture, 2.7)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.build import Build, CheckpointModule
from model.linear import FLOAT_DTYPES, Linear
from model.ops.expert_bank import ExpertBank
from model.ops.reference import quant
from model.ops.reference.activation import swiglu
from model.ops.reference.moe import hash_route, score_route
from model.quant import FP4_WEIGHT_BLOCK, WEIGHT_BLOCK
from model.tensors import CheckpointTensor


class Gate(CheckpointModule):
    """Chooses experts by biased score, or in the first layers by a table of token ids; weights are unbiased scores."""

    def __init__(self, build: Build, *, hashed: bool) -> None:
        super().__init__(build)
        c = build.config
        self.weight = self.declare("weight", (c.n_routed_experts, c.hidden_size), build.float_code, torch.float32)
        self.hashed = hashed
        if hashed:
            self.tid2eid = self.declare("tid2eid", (c.vocab_size, c.num_experts_per_tok), "I64", torch.int64)
        else:
            self.bias = self.declare("bias", (c.n_routed_experts,), "F32", torch.float32)

    def forward(self, x_TD: Tensor, token_ids_T: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids [T, A] int64 and their weights [T, A] fp32."""
        c = self.build.config
        logits_TE = self.build.ops.linear_fp32(x_TD, self.weight)
        if self.hashed:
            return hash_route(logits_TE, self.tid2eid.index_select(0, token_ids_T), c.routed_scaling_factor)
        return score_route(logits_TE, self.bias, c.num_experts_per_tok, c.routed_scaling_factor)


class Experts(CheckpointModule):
    """This rank's routed experts, stacked.

    float   w13 [E, 2, F, D]         w2 [E, D, F]
    fp8     w13 [E, 2, F, D] e4m3    w2 [E, D, F] e4m3     + a scale for each 128 x 128
    fp4     w13 [E, 2, F, D / 2]     w2 [E, D, F / 2] i8   + a scale for each 1 x 32
    """

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        c, kind = build.config, build.weights.experts
        self.format = kind
        self.start, self.length = build.group.share("n_routed_experts", c.n_routed_experts)
        self.bank: ExpertBank | None = None
        inner, hidden, experts = c.moe_intermediate_size, c.hidden_size, self.length
        if kind == "fp4":
            self.w13 = self._stack(experts, 2, inner, hidden // 2, dtype=torch.int8)
            self.w2 = self._stack(experts, hidden, inner // 2, dtype=torch.int8)
            columns = (-(-hidden // FP4_WEIGHT_BLOCK), -(-inner // FP4_WEIGHT_BLOCK))
            self.w13_scale = self._stack(experts, 2, inner, columns[0], dtype=torch.float8_e8m0fnu)
            self.w2_scale = self._stack(experts, hidden, columns[1], dtype=torch.float8_e8m0fnu)
        elif kind == "fp8":
            self.w13 = self._stack(experts, 2, inner, hidden, dtype=torch.float8_e4m3fn)
            self.w2 = self._stack(experts, hidden, inner, dtype=torch.float8_e4m3fn)
            inner_blocks, hidden_blocks = -(-inner // WEIGHT_BLOCK), -(-hidden // WEIGHT_BLOCK)
            self.w13_scale = self._stack(experts, 2, inner_blocks, hidden_blocks, dtype=build.scale_dtype)
            self.w2_scale = self._stack(experts, hidden_blocks, inner_blocks, dtype=build.scale_dtype)
        else:
            self.w13 = self._stack(experts, 2, inner, hidden, dtype=build.dtype)
            self.w2 = self._stack(experts, hidden, inner, dtype=build.dtype)

    def _stack(self, *shape: int, dtype: torch.dtype) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=dtype, device=self.build.device), requires_grad=False)

    def own_tensors(self, prefix: str) -> Iterator[CheckpointTensor]:
        build, kind = self.build, self.format
        code = {"fp4": "I8", "fp8": "F8_E4M3", "bfloat16": "BF16", "float32": "F32"}[kind]
        scale_code = "F8_E8M0" if kind == "fp4" else build.scale_code
        for local in range(self.length):
            w1, w3 = self.w13[local].unbind(0)
            parts = {"w1.weight": w1, "w2.weight": self.w2[local], "w3.weight": w3}
            if kind not in FLOAT_DTYPES:
                s1, s3 = self.w13_scale[local].unbind(0)
                parts |= {"w1.scale": s1, "w2.scale": self.w2_scale[local], "w3.scale": s3}
            for name, destination in parts.items():
                yield CheckpointTensor(
                    name=f"{prefix}{self.start + local}.{name}",
                    dtype=scale_code if name.endswith("scale") else code,
                    shape=tuple(destination.shape),
                    destination=destination,
                )

    def gate_up(self, expert: int) -> Tensor:
        """w1 over w3 of a local expert: [2F, D] in the model's dtype."""
        w13 = self.w13[expert]
        if self.format in FLOAT_DTYPES:
            return w13.flatten(0, 1)
        scale = self.w13_scale[expert]
        if self.format == "fp4":
            return quant.dequantize_fp4(w13.flatten(0, 1), scale.flatten(0, 1), self.build.dtype)
        halves = [quant.dequantize_fp8(w13[i], scale[i], self.build.dtype) for i in (0, 1)]
        return torch.cat(halves)

    def down(self, expert: int) -> Tensor:
        """w2 of a local expert: [D, F] in the model's dtype."""
        if self.format in FLOAT_DTYPES:
            return self.w2[expert]
        dequantize = quant.dequantize_fp4 if self.format == "fp4" else quant.dequantize_fp8
        return dequantize(self.w2[expert], self.w2_scale[expert], self.build.dtype)

    def round_activations(self, x: Tensor) -> Tensor:
        """Official numerics round the input of every quantized matrix to FP8."""
        if self.build.numerics == "official" and self.format not in FLOAT_DTYPES:
            return quant.fp8_round_trip(x, WEIGHT_BLOCK)
        return x

    def forward(self, x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        """fp32 [T, D]: this rank's part of the weighted sum."""
        bank = ExpertBank(
            start=self.start,
            length=self.length,
            gate_up=self.gate_up,
            down=self.down,
            round_activations=self.round_activations,
            limit=self.build.config.swiglu_limit,
        )
        return self.build.ops.experts(x_TD, ids_TA, weights_TA, bank, weight_first=self.build.numerics == "official")


class SharedExpert(CheckpointModule):
    """The expert every token goes through; inner dim split over the group (the caller reduces)."""

    def __init__(self, build: Build) -> None:
        super().__init__(build)
        c = build.config
        inner = c.moe_intermediate_size * c.n_shared_experts
        self.w1 = Linear(build, c.hidden_size, inner, field="moe_intermediate_size", shard_dim=0)
        self.w2 = Linear(build, inner, c.hidden_size, field="moe_intermediate_size", shard_dim=1)
        self.w3 = Linear(build, c.hidden_size, inner, field="moe_intermediate_size", shard_dim=0)

    def forward(self, x_TD: Tensor) -> Tensor:
        out: Tensor = self.w2(swiglu(self.w1(x_TD), self.w3(x_TD), self.build.config.swiglu_limit))
        return out


class MoE(CheckpointModule):
    """gate, experts and shared_experts of one layer."""

    def __init__(self, build: Build, *, hashed: bool) -> None:
        super().__init__(build)
        self.gate = Gate(build, hashed=hashed)
        self.experts = Experts(build)
        self.shared_experts = SharedExpert(build)

    def forward(self, x_TD: Tensor, token_ids_T: Tensor) -> Tensor:
        ids_TA, weights_TA = self.gate(x_TD, token_ids_T)
        y_TD = self.experts(x_TD, ids_TA, weights_TA)
        y_TD += self.shared_experts(x_TD)
        return self.build.group.all_reduce(y_TD).to(x_TD.dtype)
