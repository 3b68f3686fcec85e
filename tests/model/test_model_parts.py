"""Parts of the model on their own: rotary tables, checkpoint records, top-k ties, storage, parallel shares, MTP."""

import math
import time
from typing import Any

import pytest
import torch

from model.kv_cache import KVCache
from model.kv_layout import KVLayout
from model.ops.reference.activation import sigmoid
from model.ops.reference.hyper import sinkhorn
from model.ops.reference.index import TopK
from model.ops.reference.moe import score_route
from model.ops.reference.topk import select
from model.parallel import ParallelGroup
from model.presets import preset
from model.quant import OFFICIAL
from model.rope import inverse_frequencies
from model.transformer import Transformer

FILE_BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "I64": 8}


@pytest.mark.parametrize(
    ("name", "tensors", "file_bytes"), [("flash", 69_187, 159_609_485_896), ("pro", 145_116, 864_704_792_696)]
)
def test_published_totals(name: str, tensors: int, file_bytes: int) -> None:
    began = time.monotonic()
    model = Transformer(preset(name), weights=OFFICIAL, dtype=torch.bfloat16, with_mtp=True)
    records = list(model.checkpoint_tensors())
    assert len({record.name for record in records}) == len(records) == tensors
    assert sum(math.prod(record.shape) * FILE_BYTES[record.dtype] for record in records) == file_bytes
    assert time.monotonic() - began < 10


def test_every_parameter_stands_in_a_record(tools: Any) -> None:
    model = tools.random_model(tools.nano_config(), with_mtp=True)
    recorded = sum(record.destination.numel() for record in model.checkpoint_tensors())
    assert recorded == sum(parameter.numel() for parameter in model.parameters())


def test_rotary_spot_values() -> None:
    f = inverse_frequencies(160000.0, 64, preset("flash").rope_scaling)
    spots = {0: 1.0, 8: 5.0e-2, 15: 3.635539e-3, 16: 2.265625e-3, 20: 2.969778e-4, 24: 1.953125e-5}
    spots |= {25: 5.372313e-6, 31: 5.680529e-7}
    for i, value in spots.items():
        assert float(f[i]) == pytest.approx(value, rel=2e-6)
    plain = inverse_frequencies(10000.0, 64, None)
    assert float(plain[16]) == pytest.approx(10000.0**-0.5, rel=1e-6)


def test_sinkhorn_is_column_normalised() -> None:
    comb = sinkhorn(torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0)) * 3, 20, 1e-6)
    torch.testing.assert_close(comb.sum(1), torch.ones(5, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(comb.sum(2), torch.ones(5, 4), atol=5e-2, rtol=0)


def test_ties_go_to_the_lower_entry_in_any_blocking() -> None:
    generator = torch.Generator().manual_seed(4)
    scores = torch.randint(-2, 3, (7, 90), generator=generator).float()
    scores[0] = 0.0
    scores[1, ::2] = -0.0
    visible = torch.tensor([90, 90, 3, 10, 40, 64, 89])
    entries = torch.arange(90).expand(7, -1)
    scores = scores.masked_fill(entries >= visible.unsqueeze(1), float("-inf"))
    expected = []
    for row in scores.tolist():
        best = sorted((i for i in range(90) if row[i] > float("-inf")), key=lambda i: (-row[i], i))[:10]
        expected.append(sorted(best) + [-1] * (10 - len(best)))
    for block in (7, 10, 32, 90):
        top = TopK(7, 10, torch.device("cpu"))
        for at in range(0, 90, block):
            top.merge(scores[:, at : at + block], entries[:, at : at + block])
        assert top.entries.tolist() == expected
    assert select(torch.zeros(2, 9), 4).tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("values", ["few", "zeros", "many"])
def test_the_best_of_groups_are_the_best(values: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at maxima of groups first finds the same entries, in any blocks, with ties, NaN and absent entries."""
    from model.ops.cpu import topk

    monkeypatch.setattr(topk, "GROUP", 4)
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        scores = torch.randn(5, 200, generator=generator)
        if values == "few":
            scores = scores.round()
        elif values == "zeros":
            scores = scores.clamp_max(0.0)
        scores[0, 50:] = float("-inf")
        scores[1] = float("-inf")
        scores[2, 120:140] = float("nan")
        scores[3, :150] = float("-inf")
        for k, block in ((3, 200), (3, 37), (12, 64), (60, 90)):
            expected, found = TopK(5, k, scores.device), topk.GroupedTopK(5, k, scores.device)
            for at in range(0, 200, block):
                part = scores[:, at : at + block]
                expected.merge(part, torch.arange(at, at + part.shape[1]).expand(5, -1))
                found.merge(part, at)
            kept = [[e for e in row if e >= 0] for row in found.entries.tolist()]
            assert kept == [[e for e in row if e >= 0] for row in expected.entries.tolist()]


def test_equal_experts_are_chosen_by_number_and_summed_in_order() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, 0.0], [0.0] * 6])
    ids, weights = score_route(logits, torch.zeros(6), 3, 1.5)
    assert ids.tolist() == [[0, 1, 3], [0, 1, 2]]
    torch.testing.assert_close(weights.sum(1), torch.full((2,), 1.5))


@pytest.mark.parametrize(("row_format", "index_format"), [("float32", "float32"), ("bfloat16", "fp8"), ("fp8", "fp4")])
def test_cache_allocates_what_the_layout_says(row_format: Any, index_format: Any) -> None:
    layout = KVLayout(config=preset("nano"), row_format=row_format, index_format=index_format, draft_rows=3)
    cache = KVCache(layout, num_pages=5, num_slots=3, device="cpu", dtype=torch.float32)
    assert cache.allocated_bytes == 5 * layout.bytes_per_page + 3 * layout.bytes_per_slot


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": 257}, {"n_routed_experts": 9}, {"o_groups": 1}, {"moe_intermediate_size": 47}],
    ids=lambda change: next(iter(change)),
)
def test_a_split_that_does_not_divide_names_the_field(tools: Any, change: dict[str, int]) -> None:
    group = ParallelGroup(None, rank=0, size=1)
    group.size = 2
    with pytest.raises(ValueError, match=next(iter(change))):
        Transformer(tools.nano_config(**change), weights=tools.float32, dtype=torch.float32, group=group)


def test_ranks_together_hold_the_whole_model(tools: Any) -> None:
    """Shards of two ranks tile every split tensor, and every expert has one owner."""
    config = tools.nano_config()
    names: dict[str, list[Any]] = {}
    for rank in (0, 1):
        group = ParallelGroup(None, rank=0, size=1)
        group.rank, group.size = rank, 2
        model = Transformer(config, weights=tools.float32, dtype=torch.float32, group=group)
        for record in model.checkpoint_tensors():
            names.setdefault(record.name, []).append(record)
    whole = {r.name: r for r in Transformer(config, weights=tools.float32, dtype=torch.float32).checkpoint_tensors()}
    assert names.keys() == whole.keys()
    for name, records in names.items():
        assert all(record.shape == whole[name].shape for record in records)
        if ".experts." in name:
            assert len(records) == 1
        elif records[0].shard is not None:
            dim = records[0].shard.dim
            assert [r.shard.start for r in records] == [0, records[0].shard.length]
            assert sum(r.destination.shape[dim] for r in records) == whole[name].shape[dim]


def test_mtp_draft_by_hand(tools: Any) -> None:
    """Row i: streams of position i and the token of position i + 1 (architecture, 2.9), formulas written out."""
    model = tools.random_model(tools.nano_config(), with_mtp=True, seed=3)
    config, mtp = model.config, model.mtp
    tokens = tools.random_tokens(config, 10, seed=8)
    driver = tools.Driver(model)
    sequence = driver.start()
    batch = driver.batch([(sequence, tokens[:9])])
    streams = model.streams(batch, driver.cache)
    batch.token_ids_T = torch.tensor(tokens[1:])
    drafted, logits = mtp(batch, streams, driver.cache, driver.cache.new_window())

    p = {
        r.name.removeprefix("mtp.0."): r.destination for r in model.checkpoint_tensors() if r.name.startswith("mtp.0.")
    }

    def rms(x: torch.Tensor, weight: torch.Tensor | float = 1.0) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def turn(x: torch.Tensor, sign: int) -> torch.Tensor:
        x, r = x.clone(), config.qk_rope_head_dim
        for t in range(x.shape[0]):
            for i in range(r // 2):
                angle = sign * t * 10000.0 ** (-2 * i / r)
                a, b = x[t, ..., -r + 2 * i].clone(), x[t, ..., -r + 2 * i + 1].clone()
                x[t, ..., -r + 2 * i] = a * math.cos(angle) - b * math.sin(angle)
                x[t, ..., -r + 2 * i + 1] = b * math.cos(angle) + a * math.sin(angle)
        return x

    def mixed(x: torch.Tensor, site: str, inner: Any) -> torch.Tensor:
        out = torch.empty_like(x)
        flat = x.flatten(1)
        mix = (flat @ p[f"hc_{site}_fn"].T) / (flat.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
        scale, base = p[f"hc_{site}_scale"], p[f"hc_{site}_base"]
        pre = sigmoid(mix[:, :4] * scale[0] + base[:4]) + 1e-6
        post = 2 * sigmoid(mix[:, 4:8] * scale[1] + base[4:8])
        comb = (mix[:, 8:] * scale[2] + base[8:]).view(-1, 4, 4).softmax(2) + 1e-6
        comb = comb / (comb.sum(1, keepdim=True) + 1e-6)
        for _ in range(19):
            comb = comb / (comb.sum(2, keepdim=True) + 1e-6)
            comb = comb / (comb.sum(1, keepdim=True) + 1e-6)
        y = inner(torch.einsum("tm,tmd->td", pre, x))
        for k in range(4):
            out[:, k] = post[:, k, None] * y + torch.einsum("tj,tjd->td", comb[:, :, k], x)
        return out

    def attention(a: torch.Tensor) -> torch.Tensor:
        a = rms(a, p["attn_norm.weight"])
        qr = rms(a @ p["attn.wq_a.weight"].T, p["attn.q_norm.weight"])
        q = turn(rms((qr @ p["attn.wq_b.weight"].T).view(9, config.num_attention_heads, -1)), 1)
        kv = turn(rms(a @ p["attn.wkv.weight"].T, p["attn.kv_norm.weight"]), 1)
        scores = torch.einsum("thc,sc->hts", q, kv) / math.sqrt(config.head_dim)
        scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf"))
        sink = p["attn.attn_sink"].view(-1, 1, 1).expand(-1, 9, 1)
        probability = torch.cat([scores, sink], 2).softmax(2)[..., :9]
        o = turn(torch.einsum("hts,sc->thc", probability, kv), -1).reshape(9, config.o_groups, -1)
        u = torch.einsum("tgx,gox->tgo", o, p["attn.wo_a.weight"].view(config.o_groups, config.o_lora_rank, -1))
        return u.flatten(1) @ p["attn.wo_b.weight"].T

    def expert(x: torch.Tensor, prefix: str) -> torch.Tensor:
        gate = (x @ p[prefix + "w1.weight"].T).clamp(max=10)
        return (gate * sigmoid(gate) * (x @ p[prefix + "w3.weight"].T).clamp(-10, 10)) @ p[prefix + "w2.weight"].T

    def moe(a: torch.Tensor) -> torch.Tensor:
        a = rms(a, p["ffn_norm.weight"])
        score = torch.log1p((a @ p["ffn.gate.weight"].T).exp()).sqrt()
        y = expert(a, "ffn.shared_experts.")
        for t in range(9):
            chosen = (score[t] + p["ffn.gate.bias"]).topk(config.num_experts_per_tok).indices
            for e in chosen.tolist():
                weight = score[t, e] / score[t, chosen].sum() * config.routed_scaling_factor
                y[t] = y[t] + weight * expert(a[t], f"ffn.experts.{e}.")
        return y

    embedded = rms(model.embed.weight[tokens[1:]], p["enorm.weight"]) @ p["e_proj.weight"].T
    x = embedded.unsqueeze(1) + rms(streams, p["hnorm.weight"]) @ p["h_proj.weight"].T
    x = mixed(mixed(x, "attn", attention), "ffn", moe)
    flat = x.flatten(1)
    mix = (flat @ p["hc_head_fn"].T) / (flat.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
    weight = sigmoid(mix * p["hc_head_scale"] + p["hc_head_base"]) + 1e-6
    expected = rms(torch.einsum("tm,tmd->td", weight, x), p["norm.weight"]) @ model.head.weight.T
    torch.testing.assert_close(drafted, x, atol=2e-5, rtol=0)
    torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)
