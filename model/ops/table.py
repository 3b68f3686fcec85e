"""Which implementation of each op a device gets."""

from dataclasses import replace
from functools import partial

from model.ops.cpu import attention as fast_attention
from model.ops.cpu import compress as fast_compress
from model.ops.cpu import hyper as fast_hyper
from model.ops.cpu import index as fast_index
from model.ops.cpu import linear as fast_linear
from model.ops.cpu import moe as fast_moe
from model.ops.cpu import norm as fast_norm
from model.ops.reference import attention, compress, hyper, index, linear, moe, norm, rope
from model.ops.registry import OpTable


def resolve_ops(device: str, *, deterministic: bool = False) -> OpTable:
    """The op table of a device type, such as "cpu" or "cuda"; resolved once at start.

    `deterministic`: a row's bits depend neither on the other rows of the step nor on its place among them, so chunked
    and whole prompts, and single and batched requests, agree exactly.
    """
    table = _reference(tiled=deterministic)
    if deterministic:
        return table
    fast = replace(
        table,
        attention=fast_attention.attention,
        compress=fast_compress.compress,
        experts=fast_moe.experts,
        index=fast_index.index,
    )
    if device != "cpu":
        return fast
    # Tiles made for caches, and oneDNN's packed weights.
    return replace(
        fast,
        hyper_head=fast_hyper.hyper_head,
        hyper_post=fast_hyper.hyper_post,
        hyper_pre=fast_hyper.hyper_pre,
        linear=fast_linear.linear,
        linear_fp32=fast_linear.linear_fp32,
        pack_weight=fast_linear.pack_weight,
        rms_norm=fast_norm.rms_norm,
    )


def _reference(*, tiled: bool) -> OpTable:
    product = linear.linear_tiled if tiled else linear.linear
    product_fp32 = linear.linear_fp32_tiled if tiled else linear.linear_fp32
    return OpTable(
        linear=product,
        linear_fp32=product_fp32,
        grouped_linear=linear.grouped_linear_tiled if tiled else linear.grouped_linear,
        rms_norm=norm.rms_norm,
        rotate=rope.rotate,
        hyper_pre=partial(hyper.hyper_pre, linear=product_fp32),
        hyper_post=hyper.hyper_post,
        hyper_head=partial(hyper.hyper_head, linear=product_fp32),
        compress=compress.compress,
        index=index.index,
        attention=attention.attention,
        experts=partial(moe.experts, linear=product),
    )
