"""Official tensor names for the names that transformers writes (architecture 3.6).

`save_pretrained` writes two spellings: its own modules' (`save_original_format=False`), and by default a half-way
one: official leaves below `model.`, with `attn.norm` for the latent's norm. The same rules read both, because every
rule leaves an official name as it is. Fused expert tensors become views of their byte ranges:

    experts.gate_up_proj [E, 2F, D]   expert e: w1 = rows 0..F, w3 = rows F..2F of slice e
    experts.down_proj    [E, D, F]    expert e: w2 = slice e
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from model.loading_errors import CheckpointError
from model.safetensors_index import StoredTensor

_COMPRESSOR_LEAVES = {"kv_proj": "wkv", "gate_proj": "wgate", "position_bias": "ape", "kv_norm": "norm"}
_RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^model\.", ""),
        (r"^embed_tokens\.", "embed."),
        (r"^lm_head\.", "head."),
        (r"^hc_head\.hc_", "hc_head_"),
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.input_layernorm\.", ".attn_norm."),
        (r"\.post_attention_layernorm\.", ".ffn_norm."),
        (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
        (r"\.attn\.sinks$", ".attn.attn_sink"),
        (r"\.attn\.norm\.", ".attn.kv_norm."),
        (r"\.compressor\.indexer\.scorer\.weights_proj\.", ".indexer.weights_proj."),
        (r"\.compressor\.indexer\.q_b_proj\.", ".indexer.wq_b."),
        *(
            (rf"\.compressor\.indexer\.{theirs}\b", rf".indexer.compressor.{ours}")
            for theirs, ours in _COMPRESSOR_LEAVES.items()
        ),
        *((rf"\.compressor\.{theirs}\b", rf".compressor.{ours}") for theirs, ours in _COMPRESSOR_LEAVES.items()),
        (r"\.attn\.q_a_proj\.", ".attn.wq_a."),
        (r"\.attn\.q_a_norm\.", ".attn.q_norm."),
        (r"\.attn\.q_b_proj\.", ".attn.wq_b."),
        (r"\.attn\.kv_proj\.", ".attn.wkv."),
        (r"\.attn\.o_([ab])_proj\.", r".attn.wo_\1."),
        (r"\.gate\.e_score_correction_bias$", ".gate.bias"),
        (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
        (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
        (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
        (r"\.weight_scale_inv$", ".scale"),
    )
]


def official_name(name: str) -> str:
    """The official key of a tensor that transformers or the official checkpoint calls `name`."""
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name)
    return name


def with_official_names(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`stored` by official names; an official checkpoint comes back unchanged.

    Raises:
        CheckpointError: two tensors have one official name, or fused experts cannot be split.
    """
    if not any(name.startswith("model.") for name in stored):
        return dict(stored)
    renamed: dict[str, StoredTensor] = {}
    for tensor in stored.values():
        for part in _split(replace(tensor, name=official_name(tensor.name)), tensor.name):
            if part.name in renamed:
                raise CheckpointError(tensor.path, f"tensor {tensor.name!r} is a second {part.name!r}")
            renamed[part.name] = part
    return renamed


def _split(tensor: StoredTensor, stored_name: str) -> Iterator[StoredTensor]:
    base, _, leaf = tensor.name.rpartition(".experts.")
    leaves = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}.get(leaf)
    if leaves is None:
        yield tensor
        return
    if len(tensor.shape) != 3 or tensor.shape[0] == 0 or tensor.shape[1] % len(leaves):
        expected = f"[experts, {len(leaves)} x rows, columns]"
        raise CheckpointError(
            tensor.path, f"tensor {stored_name!r}: shape", expected=expected, found=str(list(tensor.shape))
        )
    num_experts, rows, columns = tensor.shape
    part_bytes = tensor.num_bytes // (num_experts * len(leaves))
    for i in range(num_experts * len(leaves)):
        start = tensor.start + i * part_bytes
        yield replace(
            tensor,
            name=f"{base}.experts.{i // len(leaves)}.{leaves[i % len(leaves)]}.weight",
            shape=(rows // len(leaves), columns),
            start=start,
            end=start + part_bytes,
        )
