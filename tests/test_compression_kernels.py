"""The kernels of the learned compressors, in Triton's interpreter, against the plain composition of operations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import pytest
import torch
from cases import Random, interpreted
from conftest import assert_within_budget
from torch import Tensor, nn

import native_sparse_attention as nsa
from native_sparse_attention import GroupedMLPCompressor, NativeSparseAttention, NSAConfig, TokenCompressor

# NaN on its way, as on a GPU; NumPy, the engine of the interpreter, warns of it.
pytestmark = [interpreted, pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")]

LEARNED = ("grouped_mlp", "conv1d")
every_method = pytest.mark.parametrize("method", LEARNED)

# head dim D, block l, stride d, tokens T, B, K
SIZES = [
    (16, 4, 4, 16, 2, 1),
    (5, 4, 4, 18, 2, 3),
    (3, 8, 2, 27, 1, 2),
    (24, 8, 4, 37, 1, 4),
    (4, 6, 3, 20, 3, 1),
    (6, 1, 1, 5, 1, 2),
    (70, 3, 1, 11, 1, 2),
]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Kernels wherever they can run; the names of those backend functions that were called."""
    called: list[str] = []
    triton = nsa._BACKENDS["triton"]

    def counted(name: str) -> object:
        def function(*arguments: object) -> object:
            called.append(name)
            return getattr(triton, name)(*arguments)

        return function

    names = ("compress", "compress_backward")
    monkeypatch.setattr(nsa, "_triton_preferred", lambda device: True)
    monkeypatch.setitem(nsa._BACKENDS, "triton", triton._replace(**{name: counted(name) for name in names}))
    yield called


def build(method: str, dim: int, block: int, stride: int, random: Random, dtype: torch.dtype) -> TokenCompressor:
    compressor = TokenCompressor(dim, block, stride, method)
    with torch.no_grad():
        for parameter in compressor.parameters():
            parameter.copy_(random(parameter.shape) * 0.3)
    return compressor.to(dtype)


def blocks(tokens: int, block: int, stride: int) -> int:
    return max((tokens - block) // stride + 1, 0)


def plainly(compressor: TokenCompressor, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(nsa, "_triton_preferred", lambda device: False)
        return compressor(x, heads=True)


def with_gradients(y: Tensor, x: Tensor, compressor: nn.Module, upstream: Tensor) -> list[Tensor]:
    leaves = [x, *compressor.parameters()]
    return [y, *torch.autograd.grad(y, leaves, upstream.to(y.dtype), materialize_grads=True)]


@every_method
@pytest.mark.parametrize("dim, block, stride, tokens, batch, heads", SIZES)
@pytest.mark.parametrize("rows", [1024, 4], ids=["whole", "split"])
def test_values_and_gradients(
    method: str, dim: int, block: int, stride: int, tokens: int, batch: int, heads: int, rows: int, random: Random,
    monkeypatch: pytest.MonkeyPatch, kernels: list[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(nsa, "_COMPRESS_ROWS", rows)
    monkeypatch.setattr(nsa, "_num_sms", lambda device: 8 if rows == 4 else 1)
    dtype = torch.float16
    compressor = build(method, dim, block, stride, random, dtype)
    # Keys of one branch among three, as with separate_kv: strided.
    x = random((batch, tokens, 3, heads, dim), dtype)[:, :, 1].requires_grad_()
    upstream = random((batch, blocks(tokens, block, stride), heads, dim), dtype)
    actual = with_gradients(compressor(x, heads=True), x, compressor, upstream)
    assert kernels == ["compress", "compress_backward"]
    plain = with_gradients(plainly(compressor, x, monkeypatch), x, compressor, upstream)
    compressor, x = compressor.double(), x.detach().double().requires_grad_()
    exact = with_gradients(compressor(x, heads=True), x, compressor, upstream)
    for name, *three in zip(("y", "x", *dict(compressor.named_parameters())), actual, plain, exact, strict=True):
        assert three[0].dtype == dtype
        assert_within_budget(*three, name, terms=block * dim + batch * tokens * heads)


@every_method
@pytest.mark.parametrize("dim", [24, 40])
def test_a_few_units_at_a_time(
    method: str, dim: int, random: Random, monkeypatch: pytest.MonkeyPatch, kernels: list[str]
) -> None:
    """Tiles of units, where products take their operands from registers; the last one is not full."""
    monkeypatch.setattr(nsa, "_COMPRESS_UNITS", (32, 16))
    monkeypatch.setattr(nsa, "_multiplies_in_shared", lambda device: False)
    test_values_and_gradients(method, dim, 4, 2, 29, 2, 3, 4, random, monkeypatch, kernels)


@every_method
@pytest.mark.parametrize("same", ["compressors", "layouts", "nothing"])
def test_keys_and_values_at_a_time(
    method: str, same: str, random: Random, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As each by itself, split into parts or not; one compressor may serve both."""
    first = build(method, 8, 4, 2, random, torch.float16)
    second = first if same == "compressors" else build(method, 8, 4, 2, random, torch.float16)
    k, v = random((2, 2, 29, 3, 8), torch.float16).unbind()
    v = v.transpose(1, 2).contiguous().transpose(1, 2) if same == "nothing" else v
    inputs, upstream = [k.requires_grad_(), v.requires_grad_()], list(random((2, 2, 13, 3, 8), torch.float16).unbind())
    if same == "nothing":
        upstream[1] = upstream[1].transpose(1, 3).contiguous().transpose(1, 3)
    leaves = [*inputs, *first.parameters(), *([] if second is first else second.parameters())]

    def together() -> list[Tensor]:
        y = nsa._compress_heads((first.method, k), (second.method, v))
        return [*y, *torch.autograd.grad(y, leaves, upstream)]

    monkeypatch.setattr(nsa, "_num_sms", lambda device: 1)
    actual = together()
    assert kernels == ["compress", "compress_backward"]
    y = first(k, heads=True), second(v, heads=True)
    expected = [*y, *torch.autograd.grad(y, leaves, upstream)]
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
    monkeypatch.setattr(nsa, "_num_sms", lambda device: 64)
    nsa._compress_plan.cache_clear()
    for ours, theirs in zip(together(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.01, atol=0.01)


def test_compressors_unlike_each_other(random: Random, kernels: list[str]) -> None:
    attention = NativeSparseAttention(NSAConfig(dim=16, heads=2, seq_len=64, block_size=4)).half()
    attention.compress_v = build("conv1d", 8, 4, 4, random, torch.float16)
    x = random((1, 29, 16), torch.float16)
    actual = attention(x)
    assert kernels == ["compress"] * 2
    attention.compress_v.method.config = attention.cfg
    attention.cfg.use_flash = False
    torch.testing.assert_close(actual, attention(x), rtol=0.02, atol=0.01)


@every_method
def test_folded_heads_are_a_batch(method: str, random: Random, kernels: list[str]) -> None:
    compressor, x = build(method, 8, 4, 2, random, torch.float16), random((2, 13, 3, 8), torch.float16)
    y = compressor(x.transpose(1, 2).flatten(0, 1))
    assert torch.equal(y.unflatten(0, (2, 3)).transpose(1, 2), compressor(x, heads=True))
    assert kernels == ["compress"] * 2


@every_method
def test_what_is_not_finite_stays_in_its_blocks(method: str, random: Random) -> None:
    """NaN in one token reaches the blocks that hold it, and through them the gradients of weights, nothing else."""
    compressor, x = build(method, 4, 4, 2, random, torch.float16), random((2, 12, 2, 4), torch.float16)
    x[0, 5, 1] = torch.nan  # in the blocks that begin with tokens 2 and 4
    x.requires_grad_()
    y = compressor(x, heads=True)
    expected = torch.zeros(2, 5, 2, 4, dtype=torch.bool)
    expected[0, 1:3, 1] = True
    assert torch.equal(y.isnan(), expected)
    (dx,) = torch.autograd.grad(y[1].sum() + y[0, 4].sum(), x)
    assert bool(dx[1].isfinite().all()) and bool(dx[0, :, 0].isfinite().all())


@every_method
@pytest.mark.parametrize("learns", ["x", "weights"])
def test_gradients_that_nobody_wants_are_not_made(
    method: str, learns: str, random: Random, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compressor, x = build(method, 8, 4, 4, random, torch.float16), random((1, 9, 2, 8), torch.float16)
    compressor.requires_grad_(learns == "weights")
    leaves = [x.requires_grad_()] if learns == "x" else list(compressor.parameters())
    actual = torch.autograd.grad(compressor(x, heads=True).sum(), leaves)
    plain = torch.autograd.grad(plainly(compressor, x, monkeypatch).sum(), leaves)
    assert kernels == ["compress", "compress_backward"]
    for pair in zip(actual, plain, strict=True):
        torch.testing.assert_close(*pair, rtol=0.01, atol=0.01)


def test_gradients_of_gradients_raise(random: Random) -> None:
    compressor, x = build("grouped_mlp", 8, 4, 4, random, torch.float16), random((1, 9, 2, 8), torch.float16)
    (dx,) = torch.autograd.grad(compressor(x.requires_grad_(), heads=True).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        dx.square().sum().backward()


def tables(offsets: list[int], total: int, block: int, stride: int) -> nsa._Segments:
    """Tables of packed sequences for as many compressed rows as any lengths need."""
    return nsa._triton_segments(torch.tensor(offsets), total, total // stride, block, stride)


def packed_with_gradients(
    compressor: TokenCompressor, x: Tensor, lengths: Sequence[int], upstream: Tensor
) -> list[Tensor]:
    """By the kernels; NaN as the gradient of rows that no block needs."""
    segments = tables([0, *accumulate(lengths)], sum(lengths), compressor.block, compressor.stride)
    (y,) = nsa._compress_heads((compressor.method, x), segments=segments)
    needed, upstream_of_all = upstream.shape[1], torch.full(y.shape, torch.nan, dtype=y.dtype)
    assert y.shape[1] == x.shape[1] // compressor.stride and y[:, needed:].isfinite().all()
    upstream_of_all[:, :needed] = upstream
    y, *gradients = with_gradients(y, x, compressor, upstream_of_all)
    return [y[:, :needed], *gradients]


LENGTHS = (0, 1, 3, 29, 8, 0, 17, 5, 0)


@every_method
@pytest.mark.parametrize("lengths", [LENGTHS, (3, 1, 2, 2)], ids=["many", "no_block"])
@pytest.mark.parametrize("dim, block, stride", [(16, 4, 4), (5, 8, 4), (24, 8, 2), (3, 3, 1), (8, 12, 3)])
@pytest.mark.parametrize("rows", [1024, 4], ids=["whole", "split"])
def test_packed_sequences(
    method: str, lengths: tuple[int, ...], dim: int, block: int, stride: int, rows: int, random: Random,
    monkeypatch: pytest.MonkeyPatch, kernels: list[str], poisoned: None,
) -> None:  # fmt: skip
    """As each by itself, where it stands among others; tokens of no block are not read, and their gradient is 0."""
    monkeypatch.setattr(nsa, "_COMPRESS_ROWS", rows)
    monkeypatch.setattr(nsa, "_num_sms", lambda device: 8 if rows == 4 else 1)
    dtype, heads, counts = torch.float16, 3, [blocks(n, block, stride) for n in lengths]
    compressor = build(method, dim, block, stride, random, dtype)
    x = random((1, sum(lengths), 3, heads, dim), dtype)[:, :, 1]
    for part, count in zip(x.split(lengths, dim=1), counts, strict=True):
        part[:, (count - 1) * stride + block if count else 0 :] = torch.nan
    x, upstream = x.requires_grad_(), random((1, sum(counts), heads, dim), dtype)
    actual = packed_with_gradients(compressor, x, lengths, upstream)
    assert kernels == ["compress", "compress_backward"]

    def each_alone() -> list[Tensor]:
        y = torch.cat([plainly(compressor, part, monkeypatch) for part in x.split(lengths, dim=1)], 1)
        return with_gradients(y, x, compressor, upstream)

    plain = each_alone()
    compressor, x = compressor.double(), x.detach().double().requires_grad_()
    for name, *three in zip(("y", "x", *dict(compressor.named_parameters())), actual, plain, each_alone(), strict=True):
        assert three[0].dtype == dtype
        assert_within_budget(*three, name, terms=block * dim + sum(lengths) * heads)


@every_method
def test_what_is_not_finite_stays_in_its_sequence(method: str, random: Random) -> None:
    compressor, x = build(method, 4, 4, 2, random, torch.float16), random((1, sum(LENGTHS), 2, 4), torch.float16)
    upstream, results = random((1, sum(blocks(n, 4, 2) for n in LENGTHS), 2, 4), torch.float16), []
    for value in (0.0, torch.nan, torch.inf):
        x[:, 9:12] = value  # of the sequence of 29 tokens, which begins at 4
        y, dx, *_ = packed_with_gradients(compressor, x.detach().requires_grad_(), LENGTHS, upstream)
        results.append((y[:, 13:], dx[:, :4], dx[:, 33:]))
        assert y[:, 3:13].isfinite().all() == (value == 0) and y[:, 4:13].isfinite().all()
    for pair in (results[:2], results[::2]):
        assert all(torch.equal(one, other) for one, other in zip(*pair, strict=True))


@every_method
def test_no_offset_reaches_outside(method: str, random: Random, poisoned: None) -> None:
    """Whatever the offsets are, no access is outside of the tensors, and everything is written."""
    for given in ([-5, 40, 7, 3, 1000], [3, 3, 3, 3], [63, -(2**31), 2**31 - 1, 0], [0, 0, 63, 63]):
        compressor, x = build(method, 4, 6, 2, random, torch.float16), random((1, 63, 2, 4), torch.float16)
        leaves = [x.requires_grad_(), *compressor.parameters()]
        (y,) = nsa._compress_heads((compressor.method, x), segments=tables(given, 63, 6, 2))
        assert all(z.isfinite().all() for z in (y, *torch.autograd.grad(y.sum(), leaves)))


@every_method
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tensors", [1, 2])
def test_opcheck(method: str, tensors: int, packed: bool, random: Random) -> None:
    shape, segments = ((1, 13, 3, 8), tables([0, 6, 6, 13], 13, 4, 2)) if packed else ((2, 13, 3, 8), nsa._Segments())
    of = segments.block_tables()
    x = [random(shape, torch.float16).transpose(0, 2).contiguous().transpose(0, 2) for _ in range(tensors)]
    layers = [build(method, 8, 4, 2, random, torch.float16).method._layers() for _ in range(tensors)]
    layers = [[w if w is None else w.detach().contiguous() for w in each] for each in layers]
    missing = [None] * (2 - tensors)
    arguments = (*x, *missing, *sum(layers, []), *missing * 5, *of, "triton", 2)
    torch.library.opcheck(nsa._compress_forward.operator, arguments)
    y, hidden = nsa._compress_forward(*arguments)
    saved = [*x, *missing, *[each[i] for each in layers for i in (0, 1, 3)], *missing * 3, hidden, *of, "triton", 2]
    for wanted in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(nsa._compress_backward.operator, (*y.unbind(), *missing, *saved, *wanted))


@every_method
@pytest.mark.parametrize("shared", [False, True])
def test_compiled(method: str, shared: bool, random: Random, kernels: list[str]) -> None:
    """Forward and backward are one operator each, for both compressors."""
    torch._dynamo.reset()
    cfg = NSAConfig(dim=16, heads=2, seq_len=64, block_size=4, stride=2, compression=method, separate_kv=True)
    attention, x = NativeSparseAttention(cfg).half(), random((1, 29, 16), torch.float16).requires_grad_()
    if shared:
        attention.compress_v = attention.compress_k
    results = []
    for call in (attention, torch.compile(attention, fullgraph=True, backend="aot_eager")):
        y = call(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *attention.parameters()])])
        assert kernels == ["compress", "compress_backward"]
        kernels.clear()
    for pair in zip(*results, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-3)


@every_method
def test_compiled_once_for_all_lengths(method: str, random: Random, kernels: list[str], nobody_looks: None) -> None:
    torch._dynamo.reset()
    cfg = NSAConfig(dim=16, heads=2, seq_len=64, block_size=4, stride=2, compression=method, rope_theta=1e4)
    attention = NativeSparseAttention(cfg).half()
    call = torch.compile(attention, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((20, 0, 9), (29, 0, 0), (1, 1, 44), (7, 3, 4)):
            x = random((1, sum(lengths), 16), torch.float16).requires_grad_()
            cu_seqlens, results = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), []
            for each in (attention, call):
                y = each(x, cu_seqlens=cu_seqlens)
                results.append([y, *torch.autograd.grad(y.square().sum(), [x, *attention.parameters()])])
                assert kernels == ["compress", "compress_backward"]
                kernels.clear()
            for pair in zip(*results, strict=True):
                torch.testing.assert_close(*pair, rtol=1e-3, atol=1e-3)


def test_compiled_transforms_take_the_plain_operations(random: Random, kernels: list[str]) -> None:
    torch._dynamo.reset()
    compressor, x = build("grouped_mlp", 8, 4, 4, random, torch.float16), random((1, 9, 2, 8), torch.float16)
    for call in (
        lambda x: torch.func.grad(lambda x: compressor(x, heads=True).sum())(x),
        torch.func.vmap(lambda x: compressor(x[None], heads=True)),
    ):
        actual = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(actual, call(x), rtol=1e-2, atol=1e-2)
    assert kernels == []


@every_method
def test_transforms_and_modes_take_the_plain_operations(method: str, random: Random, kernels: list[str]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    compressor, x = build(method, 8, 4, 4, random, torch.float16), random((1, 9, 2, 8), torch.float16)
    torch.func.grad(lambda x: compressor(x, heads=True).sum())(x)
    torch.func.vmap(lambda x: compressor(x[None], heads=True))(x)
    with FlopCounterMode(display=False) as counter:
        compressor(x, heads=True)
    assert counter.get_total_flops() > 0 and kernels == []


@pytest.mark.parametrize("dim, dtype", [(129, torch.float16), (8, torch.float32)], ids=str)
def test_what_the_kernels_do_not_take(dim: int, dtype: torch.dtype, random: Random, kernels: list[str]) -> None:
    compressor = build("grouped_mlp", dim, 4, 4, random, dtype)
    assert compressor(random((1, 9, 2, dim), dtype), heads=True).shape == (1, 2, 2, dim)
    assert kernels == []


def test_autocast(random: Random, kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and tokens go through the autocast dtype; gradients come back in that of the leaves."""
    compressor, x = build("grouped_mlp", 8, 4, 2, random, torch.float32), random((1, 9, 2, 8), torch.float32)
    x.requires_grad_()
    upstream = random((1, 3, 2, 8), torch.float16)
    with torch.autocast("cpu", torch.float16):
        actual, plain = compressor(x, heads=True), plainly(compressor, x, monkeypatch)
    assert actual.dtype == plain.dtype == torch.float16 and kernels == ["compress"]
    pairs = zip(*(with_gradients(y, x, compressor, upstream) for y in (actual, plain)), strict=True)
    for ours, theirs in pairs:
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


class Doubled(GroupedMLPCompressor):
    """A user's variant, which knows no heads."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 3
        return 2 * super().forward(x)


def test_variants_of_a_user_and_hooks(random: Random, kernels: list[str]) -> None:
    cfg = NSAConfig(dim=8, heads=2, seq_len=32, block_size=4, compression=Doubled)
    attention, seen = NativeSparseAttention(cfg).half(), []
    for compressor in (attention.compress_k, attention.compress_v):
        compressor.register_forward_hook(lambda *call: seen.append(call[2].shape))
    attention(random((1, 14, 8), torch.float16))
    assert seen == [(1, 3, 2, 4)] * 2 and kernels == ["compress"] * 2


@every_method
@pytest.mark.parametrize("packed", [False, True])
def test_in_attention(method: str, packed: bool, random: Random, kernels: list[str]) -> None:
    """use_flash=False is plain PyTorch, and computes the same; all blocks are chosen."""
    cfg = NSAConfig(dim=16, heads=2, seq_len=64, block_size=4, stride=2, topk_blocks=8, compression=method)
    attention, x = NativeSparseAttention(cfg).half(), random((1, 29, 16), torch.float16).requires_grad_()
    options = {"cu_seqlens": torch.tensor([0, 11, 13, 29], dtype=torch.int32)} if packed else {}
    results = []
    for use_flash in (True, False):
        attention.cfg.use_flash = use_flash
        y = attention(x, **options)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *attention.parameters()])])
        assert kernels == ["compress", "compress_backward"], "both compressors at a time; none without use_flash"
    for pair in zip(*results, strict=True):
        torch.testing.assert_close(*pair, rtol=0.02, atol=0.01)
