"""The model on a GPU computes what it computes on the CPU."""

from typing import Any

import pytest
import torch

from model.kv_cache import KVCache
from model.kv_layout import KVLayout
from model.ops.table import resolve_ops
from model.presets import preset
from model.transformer import Transformer


def on_gpu(batch: Any) -> Any:
    for name in batch.__slots__:
        value = getattr(batch, name)
        if isinstance(value, torch.Tensor):
            setattr(batch, name, value.cuda())
    return batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("deterministic", [True, False])
def test_same_logits_on_both_devices(tools: Any, deterministic: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tools.random_model(preset("nano"), seed=3)
    ops = resolve_ops("cuda", deterministic=deterministic)
    twin = Transformer(model.config, weights=tools.float32, dtype=torch.float32, ops=ops, device="cuda")
    for source, target in zip(model.checkpoint_tensors(), twin.checkpoint_tensors(), strict=True):
        target.destination.copy_(source.destination)
    twin.finish_loading()
    layout = KVLayout(config=model.config, row_format="float32", index_format="float32")
    cache = KVCache(layout, num_pages=16, num_slots=8, device="cuda", dtype=torch.float32)
    driver = tools.Driver(model)
    first, second = driver.start(), driver.start()
    tokens = tools.random_tokens(model.config, 400, seed=4)
    for chunks in (
        [(first, tokens[:300]), (second, tokens[:7])],
        [(first, tokens[300:]), (second, tokens[7:8])],
        [(first, [5]), (second, [9])],
    ):
        batch = driver.batch(chunks)
        expected = model.logits(model(batch, driver.cache))
        on_gpu(batch)
        ours = twin.logits(twin(batch, cache)).cpu()
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
