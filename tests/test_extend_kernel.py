"""The kernel that takes new tokens into a cache, by Triton's interpreter: against rotation, compressors and copies."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import Last, Random, interpreted
from torch.nn.utils import prune

import native_sparse_attention as nsa

# Rows that see nothing are −inf − −inf on their way, as on a GPU; NumPy, the engine of the interpreter, warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

L, D, ROOM = 8, 16, 50
NONE, THETA = nsa._Rotation(), nsa._Rotation(10000.0)
SCALED = nsa._Rotation(None, 1.3, torch.tensor([1.0, 0.7, 0.5, 0.2, 1e-2, 1e-3, 1e-6, 0.0], dtype=torch.float64))


def weights(cfg: nsa.NSAConfig, random: Random, dtype: torch.dtype) -> tuple[list[nsa.TokenCompressor], list]:
    made, tensors = [], []
    for _ in range(2):
        compressor = nsa.TokenCompressor(cfg.dim_head, cfg.block_size, cfg.stride, cfg.compression)
        for parameter in compressor.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        compressor.to(dtype)
        made.append(compressor)
        method = compressor.method
        names = {"grouped_mlp": "position w_in b_in w_out b_out", "conv1d": "position weight bias", "avgpool": ""}
        of = [getattr(method, name).detach() for name in names[cfg.compression].split()]
        tensors += of + [None] * (5 - len(of))
    return made, tensors


@interpreted
@pytest.mark.parametrize("M", [1, 5])
@pytest.mark.parametrize("rope", [NONE, THETA, SCALED], ids=["none", "theta", "scaled"])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("compression", ["grouped_mlp", "conv1d", "avgpool"])
def test_tokens_and_blocks(compression: str, separate: bool, rope: nsa._Rotation, M: int, random: Random) -> None:
    """Rows in all places: empty, a token before the end of a block, at it, and with no room left."""
    first = torch.tensor([0, 7, 12, 31, 44, 48, 50, 61], dtype=torch.int32)
    B, H, K, sets, dtype, stride = len(first), 4, 2, 3 if separate else 1, torch.float32, 4
    cfg = nsa.NSAConfig(
        dim=64, heads=H, kv_heads=K, dim_head=D, block_size=L, stride=stride, select_block_size=8, seq_len=64,
        compression=compression, separate_kv=separate,
    )  # fmt: skip
    compressors, tensors = weights(cfg, random, dtype)
    raw_k, raw_v = (random((B, ROOM + 20, sets, K, D), dtype) for _ in range(2))  # all tokens, as projected
    q = random((B, M, H, D), dtype)
    positions = first[:, None] + torch.arange(M)
    cos_sin = None if rope is NONE else nsa._rope(torch.arange(ROOM + 20), rope, raw_k)
    turned = lambda x: x if rope is NONE else nsa._apply_rope(x, cos_sin)  # noqa: E731
    streams = [turned(raw_k[:, :, -1]), raw_v[:, :, -1]]
    if separate:
        streams += [turned(raw_k[:, :, 0]), raw_v[:, :, 0], raw_k[:, :, 1], raw_v[:, :, 1]]
    elif rope is not NONE:
        streams += [raw_k[:, :, 0]]
    expected = torch.stack(streams)[:, :, : ROOM + 1].clone()
    C = nsa._compressed_count(ROOM, L, stride)
    blocks = torch.full((2, B, C + 1, K, D), 7.0)
    all_blocks = []
    for i, x in enumerate((raw_k, raw_v)):
        y = compressors[i](x[:, :ROOM, sets // 2].transpose(1, 2).flatten(0, 1)).detach()
        y = y.unflatten(0, (B, K)).transpose(1, 2)
        if i == 0 and rope is not NONE:
            y = nsa._apply_rope(y, nsa._rope(torch.arange(C) * stride, rope, y))
        all_blocks.append(y)
    tokens, expected_blocks = expected.clone(), blocks.clone()
    for b, at in enumerate(first.tolist()):
        tokens[:, b, min(at, ROOM) :] = math.nan
        expected[:, b, min(at + M, ROOM) :] = math.nan
        old, new = (nsa._compressed_count(min(n, ROOM), L, stride) for n in (at, at + M))
        for i, y in enumerate(all_blocks):
            expected_blocks[i, b, old:new] = y[b, old:new]
    place = torch.arange(B)[:, None]
    k, v = (x[place, positions].flatten(2, 3) for x in (raw_k, raw_v))
    out = nsa._triton_extend(q, k, v, tokens, blocks, first, None, rope, L, stride, tensors)
    expected_q = q[:0, 0, 0, 0] if rope is NONE else nsa._apply_rope(q, nsa._rope(positions, rope, q))
    torch.testing.assert_close(out, expected_q, rtol=0, atol=2e-6)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(blocks, expected_blocks, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("rope", [NONE, nsa._Rotation(500000.0), SCALED], ids=["none", "theta", "scaled"])
def test_packed(rope: nsa._Rotation, random: Random) -> None:
    """Each token has a row and a number there; positions up to a million."""
    first, lengths = torch.tensor([3, 10**6 - 4, 0], dtype=torch.int32), [2, 3, 4]
    of_token = torch.tensor([[i, m] for i, n in enumerate(lengths) for m in range(n)], dtype=torch.int32).T.contiguous()
    K, room = 2, 20
    q, k, v = (random((1, sum(lengths), heads, D), torch.float32) for heads in (4, K, K))
    tokens, blocks = torch.zeros(2 if rope is NONE else 3, 3, room + 1, K, D), torch.zeros(2, 3, 2, K, D)
    out = nsa._triton_extend(q, k, v, tokens, blocks, first, of_token, rope, 0, 1, [None] * 10)
    row, position = of_token[0].long(), first[of_token[0]] + of_token[1]
    turned = lambda x: x if rope is NONE else nsa._apply_rope(x, nsa._rope(position[None], rope, x))  # noqa: E731
    turned_k = turned(k)[0]
    torch.testing.assert_close(out, q[:0, 0, 0, 0] if rope is NONE else turned(q), rtol=0, atol=2e-6)
    fits = position < room
    row, position = row[fits], position[fits].long()
    torch.testing.assert_close(tokens[0, row, position], turned_k[fits], rtol=0, atol=2e-6)
    torch.testing.assert_close(tokens[1, row, position], v[0, fits])
    assert (tokens.count_nonzero() == (2 if rope is NONE else 3) * v[:, fits].numel()) and not blocks.any()


@interpreted
@pytest.mark.parametrize("bias", [False, True])
def test_projections(bias: bool, random: Random) -> None:
    sizes = (24, 8, 8, 12)
    x = random((3, 2, 100), torch.float32)
    weights = [random((size, 100), torch.float32) for size in sizes]
    biases = [random((size,), torch.float32) if bias else None for size in sizes]
    layers = (weights, biases) if bias else ([*weights[:3], None], biases)
    for actual, expected in zip(nsa._triton_project(x, *layers), nsa._torch_project(x, *layers), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


MODULES = {
    "plain": {},
    "overlapping_blocks": {"stride": 4},
    "as_in_the_paper": {"kv_heads": 1, "stride": 4, "separate_kv": True, "rope_theta": 100.0, "gate_mode": "q_cond"},
    "convolution": {"compression": "conv1d", "rope_theta": 100.0, "bias": True},
    "mean": {"compression": "avgpool", "rope_theta": 100.0},
    "own_compressor": {"compression": Last, "rope_theta": 100.0},
    "normed": {"stride": 4, "qk_norm": 1e-6, "rope_scale": 1.2, "rope_frequencies": tuple(2.0**-i for i in range(8))},
}


# The others are for those who wait.
SELECTED = [("as_in_the_paper", False), ("own_compressor", True), ("normed", False)]


@interpreted
@pytest.mark.parametrize(
    "name, packed",
    [
        pytest.param(name, packed, marks=[] if (name, packed) in SELECTED else pytest.mark.slow)
        for name in MODULES
        for packed in (False, True)
    ],
)
def test_module(name: str, packed: bool, random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt, pieces and steps of one token, all in kernels, against one forward."""
    kernels = nsa._BACKENDS["triton"]._replace(preferred=lambda device: True)
    sizes = {"seq_len": 64, "local_window": 12, "block_size": 8, "topk_blocks": 3}
    cfg = nsa.NSAConfig(dim=32, heads=2, dim_head=16, **sizes, **MODULES[name])
    attention, x = nsa.NativeSparseAttention(cfg).eval(), random((2, 40, 32), torch.float32)
    for name, weight in attention.named_parameters():
        if name in ("gate_weight", "norm_q.weight", "norm_k.weight"):
            torch.nn.init.normal_(weight, std=0.3)
    cache, pieces = nsa.NSACache(cfg, 2, 40), [13, 1, 1, 1, 17, 1, 5, 1]
    with torch.no_grad():
        expected = attention(x)
        monkeypatch.setitem(nsa._BACKENDS, "triton", kernels)
        for end, count in zip(itertools.accumulate(pieces), pieces, strict=True):
            new = x[:, end - count : end]
            if packed:
                offsets = torch.tensor([0, count, 2 * count])
                y = attention(new.flatten(0, 1)[None], cu_seqlens=offsets, cache=cache).view(new.shape)
            else:
                y = attention(new, cache=cache)
            torch.testing.assert_close(y, expected[:, end - count : end], rtol=0, atol=1e-5)
    assert cache.lengths == (40, 40)


@interpreted
def test_layers_that_do_more_than_multiply(random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks of projections and compressors are called in a step, too, and a forward of one's own."""
    kernels = nsa._BACKENDS["triton"]._replace(preferred=lambda device: True)
    cfg = nsa.NSAConfig(dim=32, heads=2, dim_head=16, seq_len=64, local_window=12, block_size=8, topk_blocks=3)
    attention, x = nsa.NativeSparseAttention(cfg).eval(), random((1, 24, 32), torch.float32)
    attention.to_k.register_forward_hook(lambda module, given, y: 2 * y)
    attention.compress_v.method.register_forward_hook(lambda module, given, y: y + 1)
    project = attention.to_v.forward
    attention.to_v.forward = lambda y: project(y) - 1
    cache = nsa.NSACache(cfg, 1, 40)
    with torch.no_grad():
        expected = attention(x)
        monkeypatch.setitem(nsa._BACKENDS, "triton", kernels)
        pieces = [attention(piece, cache=cache) for piece in x.split([21, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-5)


@interpreted
def test_parameters_in_another_order(random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pruning that has been made permanent leaves a weight behind the parameters that followed it."""
    kernels = nsa._BACKENDS["triton"]._replace(preferred=lambda device: True)
    sizes = {"seq_len": 64, "local_window": 12, "block_size": 8, "topk_blocks": 3}
    attention = nsa.NativeSparseAttention(nsa.NSAConfig(dim=32, heads=2, dim_head=16, bias=True, **sizes)).eval()
    for layer, name in ((attention.to_k, "weight"), (attention.compress_k.method, "w_in")):
        prune.random_unstructured(layer, name, amount=0.5)
        prune.remove(layer, name)
        assert list(layer._parameters)[-1] == name
    x, cache = random((1, 24, 32), torch.float32), nsa.NSACache(attention.cfg, 1, 40)
    with torch.no_grad():
        expected = attention(x)
        monkeypatch.setitem(nsa._BACKENDS, "triton", kernels)
        pieces = [attention(piece, cache=cache) for piece in x.split([15, *[1] * 9], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=0, atol=1e-5)


@interpreted
@pytest.mark.parametrize("M", [1, 3])
def test_lengths_that_cannot_be(M: int, random: Random) -> None:
    """Nothing is read or written outside, and nothing stored."""
    first, choice = torch.tensor([-7, 2**31 - 1, 90], dtype=torch.int32), nsa._Choice(8, 4, 8, 3, 0, 1)
    tokens, blocks = random((3, 3, 41, 2, D), torch.float32), random((2, 3, 10, 2, D), torch.float32)
    q, k = random((3, M, 4, D), torch.float32), random((3, M, 2, D), torch.float32)
    weights = [random(s, torch.float32) for s in ((8, D), (2 * D, 8 * D), (2 * D,), (D, 2 * D), (D,))] * 2
    before = tokens.clone(), blocks.clone()
    q = nsa._triton_extend(q, k, k, tokens, blocks, first, None, nsa._Rotation(100.0), 8, 4, weights)
    assert torch.equal(tokens, before[0]) and torch.equal(blocks, before[1])
    o = nsa._triton_decode(q, tokens, blocks, torch.zeros(3, M, 4, 3), first, None, 12, choice, 0.25)
    assert torch.isfinite(o).all()
