"""Architecture of a DeepSeek-V4 model, read from `config.json` and validated.

Two spellings are understood: the official one (`compress_ratios`, `num_hash_layers`, `qk_rope_head_dim`,
`rope_scaling`) and the one transformers writes (`layer_types`, `mlp_layer_types`, `partial_rotary_factor`,
`rope_parameters`). Nothing here imports torch, so the engine can plan memory with it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

LayerKind = Literal["window", "csa", "hca"]
"""Attention of a layer: sliding window only, compressed sparse (ratio 4), heavily compressed (ratio 128)."""

CSA_RATIO = 4
HCA_RATIO = 128
_OFFICIAL_SHAPES = ((43, 4096), (61, 7168))
"""Layers and width of Flash and Pro."""
_KIND_BY_RATIO: dict[int, LayerKind] = {0: "window", CSA_RATIO: "csa", HCA_RATIO: "hca"}
_KIND_BY_LAYER_TYPE: dict[str, LayerKind] = {
    "sliding_attention": "window",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}


class ConfigError(ValueError):
    """A model configuration that Fathom cannot run: names the field, what was expected and what was found."""

    def __init__(self, field: str, expected: str, found: Any) -> None:
        super().__init__(f"config.json: {field}: expected {expected}, found {found!r}")
        self.field = field


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """YaRN parameters of the layers with a compressor (architecture, section 1.4). The amplitude factor is always 1."""

    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shapes and constants of one model; field names are those of the official `config.json`."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    """One ratio for each backbone layer (0, 4 or 128); the trailing draft entries of the file are cut off."""
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    n_shared_experts: int = 1
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: RopeScaling | None = RopeScaling()
    """None: the compressed layers use plain RoPE with `compress_rope_theta`."""
    max_position_embeddings: int = 1048576
    num_nextn_predict_layers: int = 1
    bos_token_id: int = 0
    eos_token_id: int = 1
    draft_kind: Literal["none", "mtp", "dspark"] = "mtp"
    """`dspark`: a three-stage block drafter stands under `mtp.0-2`; it is recognised and left unused."""

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        return tuple(_KIND_BY_RATIO[ratio] for ratio in self.compress_ratios)

    @property
    def is_preview(self) -> bool:
        """Flash or Pro in whole with the MTP layer that later releases replaced: the weights of April 2026."""
        return self.draft_kind == "mtp" and (self.num_hidden_layers, self.hidden_size) in _OFFICIAL_SHAPES

    @property
    def nope_head_dim(self) -> int:
        return self.head_dim - self.qk_rope_head_dim

    def layers_of(self, kind: LayerKind) -> tuple[int, ...]:
        return tuple(i for i, k in enumerate(self.layer_kinds) if k == kind)

    def to_dict(self) -> dict[str, Any]:
        """The official `config.json` spelling (without quantization), including the draft layer's ratio."""
        scaling = self.rope_scaling
        return {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": 1,
            "head_dim": self.head_dim,
            "qk_rope_head_dim": self.qk_rope_head_dim,
            "q_lora_rank": self.q_lora_rank,
            "o_groups": self.o_groups,
            "o_lora_rank": self.o_lora_rank,
            "sliding_window": self.sliding_window,
            "compress_ratios": [*self.compress_ratios, *([0] * self.num_nextn_predict_layers)],
            "compress_rope_theta": self.compress_rope_theta,
            "rope_theta": self.rope_theta,
            "rope_scaling": None
            if scaling is None
            else {
                "type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
            },
            "max_position_embeddings": self.max_position_embeddings,
            "index_n_heads": self.index_n_heads,
            "index_head_dim": self.index_head_dim,
            "index_topk": self.index_topk,
            "n_routed_experts": self.n_routed_experts,
            "n_shared_experts": self.n_shared_experts,
            "num_experts_per_tok": self.num_experts_per_tok,
            "moe_intermediate_size": self.moe_intermediate_size,
            "num_hash_layers": self.num_hash_layers,
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "routed_scaling_factor": self.routed_scaling_factor,
            "swiglu_limit": self.swiglu_limit,
            "hidden_act": "silu",
            "hc_mult": self.hc_mult,
            "hc_sinkhorn_iters": self.hc_sinkhorn_iters,
            "hc_eps": self.hc_eps,
            "rms_norm_eps": self.rms_norm_eps,
            "num_nextn_predict_layers": self.num_nextn_predict_layers,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "torch_dtype": "bfloat16",
        }


def load_config(model_dir: Path) -> ModelConfig:
    """Read and validate `model_dir/config.json`.

    Raises:
        FileNotFoundError: there is no `config.json`.
        ConfigError: a field is missing, wrong or unsupported.
    """
    path = model_dir / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError("(file)", "a JSON object", str(error)) from None
    if not isinstance(raw, dict):
        raise ConfigError("(file)", "a JSON object", type(raw).__name__)
    return config_from_dict(raw)


def config_from_dict(raw: dict[str, Any]) -> ModelConfig:
    """Validate a parsed `config.json` in the official or in transformers' spelling; raises ConfigError."""
    return _Reader(raw).read()


class _Reader:
    """Reads fields one by one so that an error names the field it met."""

    _FIXED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "model_type": ("deepseek_v4",),
        "num_key_value_heads": (1,),
        "n_shared_experts": (1,),
        "scoring_func": ("sqrtsoftplus",),
        "topk_method": ("noaux_tc",),
        "norm_topk_prob": (True,),
        "hidden_act": ("silu",),
        "tie_word_embeddings": (False,),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "hc_mult": (4,),
    }

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw

    def read(self) -> ModelConfig:
        if "model_type" not in self.raw:
            raise ConfigError("model_type", "'deepseek_v4'", None)
        for field, allowed in self._FIXED.items():
            if field in self.raw and self.raw[field] not in allowed:
                raise ConfigError(field, " or ".join(repr(a) for a in allowed), self.raw[field])
        self._check_quantization()
        layers = self._int("num_hidden_layers")
        ratios, draft_ratios = self._ratios(layers)
        head_dim = self._int("head_dim")
        rope_dim = self._rope_dim(head_dim)
        num_nextn = self._int("num_nextn_predict_layers", default=0, least=0)
        if any(r != 0 for r in draft_ratios):
            raise ConfigError("compress_ratios", "0 for the draft layers behind the backbone", list(draft_ratios))
        dspark = "dspark_block_size" in self.raw or len(draft_ratios) == 3
        config = ModelConfig(
            vocab_size=self._int("vocab_size"),
            hidden_size=self._int("hidden_size"),
            num_hidden_layers=layers,
            num_attention_heads=self._int("num_attention_heads"),
            head_dim=head_dim,
            qk_rope_head_dim=rope_dim,
            q_lora_rank=self._int("q_lora_rank"),
            o_groups=self._int("o_groups"),
            o_lora_rank=self._int("o_lora_rank"),
            sliding_window=self._int("sliding_window"),
            compress_ratios=ratios,
            index_n_heads=self._int("index_n_heads"),
            index_head_dim=self._int("index_head_dim"),
            index_topk=self._int("index_topk"),
            n_routed_experts=self._int("n_routed_experts"),
            num_experts_per_tok=self._int("num_experts_per_tok"),
            moe_intermediate_size=self._int("moe_intermediate_size"),
            num_hash_layers=self._hash_layers(layers),
            routed_scaling_factor=self._float("routed_scaling_factor"),
            swiglu_limit=self._float("swiglu_limit", default=10.0),
            hc_sinkhorn_iters=self._int("hc_sinkhorn_iters", default=20),
            hc_eps=self._float("hc_eps", default=1e-6),
            rms_norm_eps=self._float("rms_norm_eps", default=1e-6),
            rope_theta=self._theta("rope_theta", "main", 10000.0),
            compress_rope_theta=self._theta("compress_rope_theta", "compress", 160000.0),
            rope_scaling=self._scaling(),
            max_position_embeddings=self._int("max_position_embeddings", default=1048576),
            num_nextn_predict_layers=num_nextn,
            bos_token_id=self._int("bos_token_id", default=0, least=0),
            eos_token_id=self._int("eos_token_id", default=1, least=0),
            draft_kind="dspark" if dspark else ("mtp" if num_nextn else "none"),
        )
        self._check_shapes(config)
        return config

    def _int(self, field: str, default: int | None = None, least: int = 1) -> int:
        value = self.raw.get(field)
        if value is None:
            if default is not None:
                return default
            raise ConfigError(field, "an integer", None)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(field, f"an integer >= {least}", value)
        return value

    def _float(self, field: str, default: float | None = None) -> float:
        value = self.raw.get(field)
        if value is None:
            if default is not None:
                return default
            raise ConfigError(field, "a number", None)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(field, "a number > 0", value)
        return float(value)

    def _ratios(self, layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if "compress_ratios" in self.raw:
            ratios = self.raw["compress_ratios"]
            if not isinstance(ratios, list) or any(r not in _KIND_BY_RATIO for r in ratios):
                raise ConfigError("compress_ratios", "a list of 0, 4 and 128", ratios)
            if len(ratios) < layers or len(ratios) > layers + 3:
                raise ConfigError("compress_ratios", f"{layers} to {layers + 3} entries", f"{len(ratios)} entries")
            return tuple(ratios[:layers]), tuple(ratios[layers:])
        types = self.raw.get("layer_types")
        if not isinstance(types, list):
            raise ConfigError("compress_ratios", "a list of 0, 4 and 128 (or layer_types)", types)
        if len(types) < layers:
            raise ConfigError("layer_types", f"at least {layers} entries", f"{len(types)} entries")
        rates = self.raw.get("compress_rates") or {}
        for name, ratio in (("compressed_sparse_attention", CSA_RATIO), ("heavily_compressed_attention", HCA_RATIO)):
            if rates.get(name, ratio) != ratio:
                raise ConfigError(f"compress_rates.{name}", str(ratio), rates[name])
        ratio_of = {kind: ratio for ratio, kind in _KIND_BY_RATIO.items()}
        for name in types:
            if name not in _KIND_BY_LAYER_TYPE:
                raise ConfigError("layer_types", f"entries among {sorted(_KIND_BY_LAYER_TYPE)}", name)
        return tuple(ratio_of[_KIND_BY_LAYER_TYPE[t]] for t in types[:layers]), ()

    def _hash_layers(self, layers: int) -> int:
        if "num_hash_layers" in self.raw:
            return self._int("num_hash_layers", least=0)
        types = self.raw.get("mlp_layer_types")
        if not isinstance(types, list):
            raise ConfigError("num_hash_layers", "an integer >= 0 (or mlp_layer_types)", types)
        num_hash = sum(1 for t in types if t == "hash_moe")
        if types[:layers] != ["hash_moe"] * num_hash + ["moe"] * (layers - num_hash):
            raise ConfigError("mlp_layer_types", "hash_moe layers first, then moe layers", types)
        return num_hash

    def _rope_dim(self, head_dim: int) -> int:
        if "qk_rope_head_dim" in self.raw:
            return self._int("qk_rope_head_dim")
        factor = self.raw.get("partial_rotary_factor")
        if factor is None:
            factor = self._rope_parameters("main").get("partial_rotary_factor")
        if not isinstance(factor, (int, float)):
            raise ConfigError("qk_rope_head_dim", "an integer (or partial_rotary_factor)", factor)
        return int(head_dim * factor)

    def _rope_parameters(self, label: str) -> dict[str, Any]:
        parameters = self.raw.get("rope_parameters") or {}
        value = parameters.get(label) if isinstance(parameters, dict) else None
        return value if isinstance(value, dict) else {}

    def _theta(self, field: str, label: str, default: float) -> float:
        nested = self._rope_parameters(label).get("rope_theta")
        return float(nested) if isinstance(nested, (int, float)) else self._float(field, default)

    def _scaling(self) -> RopeScaling | None:
        nested = self._rope_parameters("compress")
        raw = self.raw.get("rope_scaling") if "rope_scaling" in self.raw else (nested or None)
        if raw is None:
            return None
        if not isinstance(raw, dict):
            raise ConfigError("rope_scaling", "an object or null", raw)
        kind = raw.get("type", raw.get("rope_type"))
        if kind == "default":
            return None
        if kind != "yarn":
            raise ConfigError("rope_scaling.type", "'yarn'", kind)
        if raw.get("attention_factor", 1.0) not in (1, 1.0, None) or raw.get("mscale", 1.0) not in (1, 1.0, None):
            raise ConfigError("rope_scaling.attention_factor", "1.0", raw.get("attention_factor", raw.get("mscale")))
        return RopeScaling(
            factor=float(raw.get("factor", 16.0)),
            original_max_position_embeddings=int(raw.get("original_max_position_embeddings", 65536)),
            beta_fast=float(raw.get("beta_fast", 32.0)),
            beta_slow=float(raw.get("beta_slow", 1.0)),
        )

    def _check_quantization(self) -> None:
        quantization = self.raw.get("quantization_config")
        if quantization is None:
            return
        if not isinstance(quantization, dict):
            raise ConfigError("quantization_config", "an object", quantization)
        expected: dict[str, tuple[Any, ...]] = {
            "quant_method": ("fp8",),
            "fmt": ("e4m3", None),
            "activation_scheme": ("dynamic", None),
            "scale_fmt": ("ue8m0", None),
            "weight_block_size": ([128, 128], None),
        }
        for field, allowed in expected.items():
            if quantization.get(field) not in allowed:
                raise ConfigError(
                    f"quantization_config.{field}", " or ".join(repr(a) for a in allowed), quantization.get(field)
                )

    @staticmethod
    def _check_shapes(c: ModelConfig) -> None:
        def require(holds: bool, field: str, expected: str, found: Any) -> None:
            if not holds:
                raise ConfigError(field, expected, found)

        require(c.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "an even number", c.qk_rope_head_dim)
        require(
            c.qk_rope_head_dim < c.head_dim, "qk_rope_head_dim", f"less than head_dim {c.head_dim}", c.qk_rope_head_dim
        )
        require(
            c.qk_rope_head_dim <= c.index_head_dim,
            "index_head_dim",
            f"at least qk_rope_head_dim {c.qk_rope_head_dim}",
            c.index_head_dim,
        )
        require(c.index_head_dim & (c.index_head_dim - 1) == 0, "index_head_dim", "a power of two", c.index_head_dim)
        require(
            c.num_attention_heads % c.o_groups == 0,
            "o_groups",
            f"a divisor of num_attention_heads {c.num_attention_heads}",
            c.o_groups,
        )
        require(
            c.num_experts_per_tok <= c.n_routed_experts,
            "num_experts_per_tok",
            f"at most n_routed_experts {c.n_routed_experts}",
            c.num_experts_per_tok,
        )
        require(
            c.num_hash_layers <= c.num_hidden_layers,
            "num_hash_layers",
            f"at most num_hidden_layers {c.num_hidden_layers}",
            c.num_hash_layers,
        )
        require(c.eos_token_id < c.vocab_size, "eos_token_id", f"less than vocab_size {c.vocab_size}", c.eos_token_id)
        require(c.bos_token_id < c.vocab_size, "bos_token_id", f"less than vocab_size {c.vocab_size}", c.bos_token_id)
