"""Random models, the same weights in transformers, and a small driver of requests for the model's tests."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.batch import ForwardBatch
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.kv_layout import PAGE_TOKENS, KVLayout
from model.ops.table import resolve_ops
from model.presets import preset
from model.quant import WeightFormat
from model.tensors import CheckpointTensor
from model.transformer import Transformer

FLOAT32 = WeightFormat(dense="float32", experts="float32", scale=None)


def nano_config(**changes: Any) -> ModelConfig:
    """A model of all layer kinds, smaller than `nano`; top-k of 16 so that entries are dropped from token 68 on."""
    small: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 96,
        "num_attention_heads": 4,
        "head_dim": 64,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 48,
        "o_groups": 2,
        "o_lora_rank": 32,
        "index_head_dim": 32,
        "index_topk": 16,
        "moe_intermediate_size": 48,
    }
    return replace(preset("nano"), **(small | changes))


def fill(record: CheckpointTensor, generator: torch.Generator, config: ModelConfig) -> None:
    """Random values that exercise every path: noise where a fresh model has zeros or ones."""
    target, name = record.destination, record.name
    if name.endswith("tid2eid"):
        order = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator).argsort(1)
        target.copy_(order[:, : config.num_experts_per_tok])
        return
    noise = torch.randn(target.shape, generator=generator)
    if "norm" in name:
        target.copy_(1 + 0.2 * noise)
    elif "_scale" in name:
        target.copy_(0.5 + 0.1 * noise)
    elif name.endswith(("attn_sink", "ape", "gate.bias", "_base")):
        target.copy_(0.5 * noise)
    elif name == "embed.weight":
        target.copy_(noise)
    else:
        target.copy_(noise * 1.5 * target.shape[-1] ** -0.5)


def random_model(
    config: ModelConfig,
    *,
    seed: int = 0,
    deterministic: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Transformer:
    """A model with random weights in floating point on the CPU."""
    model = Transformer(
        config,
        weights=FLOAT32,
        dtype=dtype,
        ops=resolve_ops("cpu", deterministic=deterministic),
        device="cpu",
        **options,
    )
    generator = torch.Generator().manual_seed(seed)
    for record in model.checkpoint_tensors():
        fill(record, generator, config)
    model.finish_loading()
    return model


_RENAMES = (
    ("hc_head_", "model.hc_head.hc_"),
    ("embed.", "model.embed_tokens."),
    ("head.", "lm_head."),
    ("norm.", "model.norm."),
)
_LAYER_RENAMES = (
    ("attn.indexer.compressor.", "self_attn.compressor.indexer."),
    ("attn.indexer.wq_b.", "self_attn.compressor.indexer.q_b_proj."),
    ("attn.indexer.weights_proj.", "self_attn.compressor.indexer.scorer.weights_proj."),
    ("attn.attn_sink", "self_attn.sinks"),
    ("attn_norm.", "input_layernorm."),
    ("ffn_norm.", "post_attention_layernorm."),
    ("hc_attn_", "attn_hc."),
    ("hc_ffn_", "ffn_hc."),
    ("attn.", "self_attn."),
    ("ffn.", "mlp."),
)
_PART_RENAMES = {
    "wq_a": "q_a_proj",
    "q_norm": "q_a_norm",
    "wq_b": "q_b_proj",
    "wo_a": "o_a_proj",
    "wo_b": "o_b_proj",
    "wgate": "gate_proj",
    "ape": "position_bias",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "bias": "e_score_correction_bias",
}


def transformers_name(name: str) -> str:
    """transformers' key of an official key; routed experts are stacked there and handled apart."""
    if not name.startswith("layers."):
        return next(new + name[len(old) :] for old, new in _RENAMES if name.startswith(old))
    _, number, rest = name.split(".", 2)
    rest = next(new + rest[len(old) :] for old, new in _LAYER_RENAMES if rest.startswith(old))
    parts = [_PART_RENAMES.get(part, part) for part in rest.split(".")]
    compressor = "compressor" in parts
    parts = ["kv_proj" if p == "wkv" else "kv_norm" if p == "norm" and compressor else p for p in parts]
    return ".".join(["model", "layers", number, *parts])


def transformers_twin(model: Transformer) -> Any:
    """transformers' DeepseekV4ForCausalLM, eager attention, fp32, with this model's weights."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    raw = model.config.to_dict()
    for unused in ("model_type", "architectures", "torch_dtype"):
        raw.pop(unused)
    scaling = raw.pop("rope_scaling")
    config = DeepseekV4Config(
        **raw,
        rope_parameters=None if scaling is None else {"rope_type": scaling.pop("type"), **scaling},
        attn_implementation="eager",
    )
    twin = DeepseekV4ForCausalLM(config).float().eval()
    state: dict[str, Tensor] = {}
    experts: dict[str, list[dict[str, Tensor]]] = {}
    for record in model.checkpoint_tensors():
        if ".experts." in record.name:
            prefix, rest = record.name.split(".experts.")
            number, part = rest.split(".")[:2]
            bank = experts.setdefault(prefix, [{} for _ in range(model.config.n_routed_experts)])
            bank[int(number)][part] = record.destination
        elif not record.name.startswith("mtp."):
            state[transformers_name(record.name)] = record.destination
    for prefix, bank in experts.items():
        key = f"model.{prefix.replace('ffn', 'mlp')}.experts."
        state[key + "gate_up_proj"] = torch.stack([torch.cat([e["w1"], e["w3"]]) for e in bank])
        state[key + "down_proj"] = torch.stack([e["w2"] for e in bank])
    with torch.no_grad():
        missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert not [name for name in missing if "inv_freq" not in name], missing
    return twin


@dataclass
class Sequence:
    """One request of the driver."""

    slot: int
    pages: list[int]
    computed: int = 0
    tokens: list[int] = field(default_factory=list)


class Driver:
    """Feeds chunks of requests to a model and keeps their pages and slots."""

    def __init__(
        self,
        model: Transformer,
        *,
        num_pages: int = 16,
        num_slots: int = 8,
        row_format: Any = "float32",
        index_format: Any = "float32",
        page_order: list[int] | None = None,
    ) -> None:
        self.model = model
        self.layout = KVLayout(config=model.config, row_format=row_format, index_format=index_format)
        self.cache = KVCache(
            self.layout, num_pages=num_pages, num_slots=num_slots, device="cpu", dtype=model.build.dtype
        )
        # Page 0 stays unused: it is what the page table holds past a request's own pages.
        self.free_pages = page_order if page_order is not None else list(range(1, num_pages))
        self.free_slots = list(range(num_slots))

    def start(self) -> Sequence:
        sequence = Sequence(slot=self.free_slots.pop(0), pages=[])
        self.cache.reset_slots(torch.tensor([sequence.slot]))
        return sequence

    def batch(self, chunks: list[tuple[Sequence, list[int]]], *, every_row: bool = True) -> ForwardBatch:
        """The batch of these chunks; also moves each request on."""
        for sequence, tokens in chunks:
            while len(sequence.pages) * PAGE_TOKENS < sequence.computed + len(tokens):
                sequence.pages.append(self.free_pages.pop(0))
        table = torch.zeros(len(chunks), max(len(s.pages) for s, _ in chunks), dtype=torch.int64)
        for row, (sequence, _) in enumerate(chunks):
            table[row, : len(sequence.pages)] = torch.tensor(sequence.pages)
        lens = [len(tokens) for _, tokens in chunks]
        starts = [sequence.computed for sequence, _ in chunks]
        ends = torch.tensor(lens).cumsum(0)
        batch = ForwardBatch(
            token_ids_T=torch.tensor([t for _, tokens in chunks for t in tokens]),
            positions_T=torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lens, strict=True)]),
            request_index_T=torch.repeat_interleave(torch.arange(len(chunks)), torch.tensor(lens)),
            query_start_B1=torch.cat([torch.zeros(1, dtype=torch.int64), ends]),
            seq_lens_B=torch.tensor(starts) + torch.tensor(lens),
            page_table_BP=table,
            slot_B=torch.tensor([sequence.slot for sequence, _ in chunks]),
            logits_index_L=torch.arange(int(ends[-1])) if every_row else ends - 1,
            query_lens=tuple(lens),
            start_positions=tuple(starts),
        )
        for sequence, tokens in chunks:
            sequence.computed += len(tokens)
            sequence.tokens += tokens
        return batch

    def step(self, chunks: list[tuple[Sequence, list[int]]], *, every_row: bool = True) -> Tensor:
        """Logits of every token of the step, or only of each request's last."""
        return self.model.logits(self.model(self.batch(chunks, every_row=every_row), self.cache))

    def prompt(self, tokens: list[int], chunk: int | None = None) -> tuple[Sequence, Tensor]:
        """A new request with its logits at every position."""
        sequence = self.start()
        size = chunk or len(tokens)
        parts = [self.step([(sequence, tokens[i : i + size])]) for i in range(0, len(tokens), size)]
        return sequence, torch.cat(parts)

    def greedy(self, sequence: Sequence, logits: Tensor, count: int) -> tuple[list[int], Tensor]:
        """`count` greedy tokens after `logits` [V], and the logits they were chosen from."""
        tokens, rows = [], []
        for _ in range(count):
            rows.append(logits)
            tokens.append(int(logits.argmax()))
            logits = self.step([(sequence, [tokens[-1]])])[-1]
        return tokens, torch.stack(rows)


def random_tokens(config: ModelConfig, count: int, seed: int) -> list[int]:
    return torch.randint(config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="session")
def tools() -> Any:
    """The helpers of this file, for tests of the model."""
    from types import SimpleNamespace

    return SimpleNamespace(
        nano_config=nano_config,
        random_model=random_model,
        random_tokens=random_tokens,
        transformers_twin=transformers_twin,
        Driver=Driver,
        fill=fill,
        float32=FLOAT32,
    )
