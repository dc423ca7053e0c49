"""NaN, infinity and huge numbers stay in their row, their sequence, their tokens and their conversation."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Random, as_cache, interpreted
from torch import Tensor

import native_sparse_attention as nsa

SIZES = {"block_size": 16, "stride": 8, "select_block_size": 16, "topk_blocks": 3, "local_window": 24}
NAMES = ("o", "dq", "dk", "dv", "dk_cmp", "dv_cmp", "dgates")
BROKEN = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e38])
with_each_group = pytest.mark.parametrize("heads, kv_heads", [(4, 2), (16, 1)], ids=["group_2", "group_16"])


def inputs(random: Random, batch: int, tokens: int, blocks: int, heads: int, kv_heads: int, dim: int) -> list[Tensor]:
    """q, k, v, k_cmp, v_cmp and gates, float32."""
    shapes = [(tokens, heads), (tokens, kv_heads), (tokens, kv_heads), (blocks, kv_heads), (blocks, kv_heads)]
    tensors = [random((batch, *shape, dim), torch.float32) for shape in shapes]
    return [*tensors, random((batch, tokens, heads, 3), torch.float32).sigmoid()]


def run(tensors: list[Tensor], backend: str, cu_seqlens: Tensor | None = None, **sizes: int) -> dict[str, Tensor]:
    """The output and the gradients of all inputs, by name."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    o = nsa.nsa_attention(*leaves, **(sizes or SIZES), backend=backend, cu_seqlens=cu_seqlens)
    upstream = Random(seed=1)(o.shape, torch.float32)
    return dict(zip(NAMES, (o, *torch.autograd.grad(o, leaves, upstream)), strict=True))


def check_rows(backend: str, tokens: int, heads: int, kv_heads: int, value: float, random: Random) -> None:
    """Row 1 is to the bit what it is beside a row of ordinary numbers: outputs and gradients."""
    tensors = inputs(random, 2, tokens, (tokens - 16) // 8 + 1, heads, kv_heads, 16)
    expected = run(tensors, backend)
    for x in tensors[:5]:
        x[0] = value
    for name, actual in run(tensors, backend).items():
        assert torch.equal(actual[1], expected[name][1]), f"{name} of row 1 depends on what row 0 holds"


@BROKEN
@with_each_group
def test_rows_of_a_batch(heads: int, kv_heads: int, value: float, random: Random) -> None:
    check_rows("torch", 130, heads, kv_heads, value, random)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("value", [math.nan, 1e38])
@with_each_group
def test_rows_of_a_batch_in_kernels(heads: int, kv_heads: int, value: float, random: Random) -> None:
    check_rows("triton", 70, heads, kv_heads, value, random)


@pytest.mark.parametrize("value", [math.nan, 1e38])
def test_rows_whose_partial_outputs_share_memory(value: float, random: Random) -> None:
    """There are so many slots, heads and tokens that the rows of a batch are done in several chunks."""
    sizes = SIZES | {"stride": 16, "topk_blocks": 16}
    tensors = inputs(random, 2, 1024, 64, 16, 1, 128)
    assert 2 * 1024 * 16 * 16 * 128 > 2 * nsa._PARTIAL_VALUES
    expected = run(tensors, "torch", **sizes)["o"]
    for x in tensors[:5]:
        x[0] = value
    assert torch.equal(run(tensors, "torch", **sizes)["o"][1], expected[1])


@BROKEN
@with_each_group
@pytest.mark.parametrize("way", ["rows_together", "rows_in_groups", "tables"])
def test_packed_sequences(
    heads: int, kv_heads: int, way: str, value: float, random: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nsa, "_CALL_TOKENS", 0 if way == "rows_in_groups" else 256)
    monkeypatch.setattr(nsa, "_on_host", lambda x: way != "tables")
    edges, block_edges = [0, 37, 57, 66, 130], [0, 3, 4, 4, 11]
    tensors = inputs(random, 1, 130, 11, heads, kv_heads, 16)
    cu_seqlens = torch.tensor(edges, dtype=torch.int32)
    expected = run(tensors, "torch", cu_seqlens)
    for x in tensors[:3]:
        x[:, edges[1] : edges[2]] = value
    for x in tensors[3:5]:
        x[:, block_edges[1] : block_edges[2]] = value
    for name, actual in run(tensors, "torch", cu_seqlens).items():
        begin, end = (block_edges if name.endswith("cmp") else edges)[1:3]
        assert torch.equal(actual[:, :begin], expected[name][:, :begin]), f"{name} of the sequence before"
        assert torch.equal(actual[:, end:], expected[name][:, end:]), f"{name} of the sequences behind"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("broken", ["q", "k", "v"])
@pytest.mark.parametrize("token", [0, 53, 99])
def test_earlier_tokens(token: int, broken: str, value: float, random: Random) -> None:
    """Outputs before the token are what they were; dense attention lets values through, as 0·NaN is NaN."""
    tensors = inputs(random, 1, 100, 11, 4, 2, 16)
    expected = run(tensors, "torch")["o"]
    tensors["qkv".index(broken)][:, token] = value
    o = run(tensors, "torch")["o"]
    assert torch.equal(o[:, :token], expected[:, :token])
    assert not o[:, token].isfinite().any(), "a token hides what it is"


CONFIGS = {
    "shared keys": {},
    "separate keys": {"separate_kv": True, "rope_theta": 10000.0, "kv_heads": 2, "stride": 4},
}


@torch.no_grad()
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("forget", ["reset", "truncate", "reorder", "failed call"])
@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_an_earlier_conversation(
    settings: dict[str, object], forget: str, value: float, random: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache is never read beyond a row's length."""
    cfg = nsa.NSAConfig(dim=32, heads=4, seq_len=96, local_window=12, block_size=8, topk_blocks=3, **settings)
    attention, cache = nsa.NativeSparseAttention(cfg).eval(), nsa.NSACache(cfg, batch=2, max_len=96)
    x, garbage, kept = random((2, 60, 32), torch.float32), torch.full((2, 70, 32), value), 21
    if forget == "reset":
        attention(garbage, cache=cache)
        cache.reset()
        kept = 0
    elif forget == "truncate":
        attention(x[:, :kept], cache=cache)
        attention(garbage, cache=cache)
        cache.truncate(kept)
    elif forget == "reorder":  # row 0 takes the place of row 1, which was longer
        attention(x[:, :kept], cache=cache)
        attention(garbage, cache=cache, key_padding_mask=torch.tensor([[False], [True]]).expand(2, 70))
        cache.reorder([0, 0])
        x = x[:1].expand(2, -1, -1)
    else:
        attention(x[:, :kept], cache=cache)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(attention.to_out, "forward", lambda y: 1 / 0)
            attention(garbage, cache=cache)
    assert cache.lengths == (kept, kept)
    expected = attention(x)
    for begin, end in ((kept, kept + 1), (kept + 1, kept + 4), (kept + 4, 60)):
        y = attention(x[:, begin:end], cache=cache)
        torch.testing.assert_close(y, expected[:, begin:end], rtol=0, atol=1e-4)


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_an_earlier_conversation_in_kernels(settings: dict[str, object], random: Random) -> None:
    cfg = nsa.NSAConfig(dim=32, heads=2, seq_len=64, local_window=12, block_size=8, topk_blocks=3, **settings)
    sizes = 12, nsa._Choice(**cfg.selection), 0.25
    row, blocks = (2, 64, cfg.kv_heads, 16), (2, 64 // cfg.stride - 1, cfg.kv_heads, 16)
    keys = [random(shape, torch.float32) for shape in (row, row, row, row, blocks, blocks)]
    q, logits = random((2, 1, 2, 16), torch.float32), torch.zeros(2, 1, 2, 3)
    first = torch.tensor([20, 33], dtype=torch.int32)
    expected = nsa._torch_decode(q, *as_cache(*keys), logits, first, None, *sizes)
    for i, at in enumerate(first.tolist()):
        for x in keys[:4]:
            x[i, at + 1 :] = math.nan
        for x in keys[4:]:
            x[i, nsa._compressed_count(at + 1, cfg.block_size, cfg.stride) :] = math.nan
    for decode in (nsa._torch_decode, nsa._triton_decode):
        actual = decode(q, *as_cache(*keys), logits, first, None, *sizes)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
