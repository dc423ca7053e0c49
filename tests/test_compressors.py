"""Compressors: the three variants against their definitions, where they start, and a user's own class."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import oracle
import pytest
import torch
from cases import Random, gradients
from conftest import assert_close64
from torch import Tensor, nn

from native_sparse_attention import (
    AvgPoolCompressor,
    Conv1dCompressor,
    GroupedMLPCompressor,
    NativeSparseAttention,
    NSAConfig,
    TokenCompressor,
)

Compressor = AvgPoolCompressor | Conv1dCompressor | GroupedMLPCompressor
CLASSES = {"grouped_mlp": GroupedMLPCompressor, "conv1d": Conv1dCompressor, "avgpool": AvgPoolCompressor}
LEARNED = [GroupedMLPCompressor, Conv1dCompressor]
every_class = pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)
every_learned_class = pytest.mark.parametrize("kind", LEARNED, ids=lambda kind: kind.__name__)

# dim, block l, stride d, tokens T
SIZES = [
    (5, 4, 4, 16),
    (3, 8, 2, 27),
    (4, 8, 4, 8),
    (4, 6, 3, 20),
    (6, 1, 1, 5),
    (1, 3, 3, 11),
]
every_size = pytest.mark.parametrize("dim, block, stride, tokens", SIZES)


def randomize(module: nn.Module, random: Random) -> nn.Module:
    """Random weights in float64: the start near the mean would hide what a weight does."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(random(parameter.shape) * 0.5)
    return module


def definition(compressor: Compressor) -> Callable[[Tensor], Tensor]:
    """The oracle's function with the weights of this compressor."""
    w, sizes = dict(compressor.named_parameters()), (compressor.block, compressor.stride)
    if isinstance(compressor, GroupedMLPCompressor):
        return lambda x: oracle.grouped_mlp(x, *sizes, w["position"], w["w_in"], w["b_in"], w["w_out"], w["b_out"])
    if isinstance(compressor, Conv1dCompressor):
        return lambda x: oracle.conv1d(x, *sizes, w["position"], w["weight"], w["bias"])
    return lambda x: oracle.avgpool(x, *sizes)


# ---------------------------------------------------------------------------------------------------------------------
# What they compute
# ---------------------------------------------------------------------------------------------------------------------


@every_class
@every_size
def test_values_and_gradients_against_the_oracle(
    kind: type[Compressor], dim: int, block: int, stride: int, tokens: int, random: Random
) -> None:
    compressor = randomize(kind(dim, block, stride), random)
    x = random((2, tokens, dim)).requires_grad_()
    actual, exact = compressor(x), definition(compressor)(x)
    assert_close64(actual, exact, "summaries")
    names, leaves = ["x"], [x]
    for name, parameter in compressor.named_parameters():
        names, leaves = [*names, name], [*leaves, parameter]
    upstream = [random(exact.shape)]
    pairs = zip(gradients(actual, leaves, upstream), gradients(exact, leaves, upstream), strict=True)
    for name, pair in zip(names, pairs, strict=True):
        assert_close64(*pair, f"gradient of {name}")


@every_class
def test_a_block_depends_on_its_own_tokens_only(kind: type[Compressor], random: Random) -> None:
    dim, block, stride, tokens = 3, 6, 2, 15
    compressor = randomize(kind(dim, block, stride), random)
    x = random((1, tokens, dim)).requires_grad_()
    for i, summary in enumerate(compressor(x)[0]):
        (gradient,) = torch.autograd.grad(summary.sum(), x, retain_graph=True)
        touched = gradient[0].any(-1).nonzero()[:, 0].tolist()
        assert touched == list(range(i * stride, i * stride + block)), f"block {i}"


@every_class
def test_tokens_behind_the_last_whole_block_do_not_count(kind: type[Compressor], random: Random) -> None:
    compressor = randomize(kind(3, 8, 4), random)
    x = random((2, 23, 3))  # whole blocks end with tokens 8, 12, 16 and 20
    assert_close64(compressor(x), compressor(x[:, :20]))


@pytest.mark.parametrize("method", CLASSES)
@pytest.mark.parametrize("block, stride, tokens", [(4, 4, 3), (4, 2, 0), (8, 1, 7), (2, 2, 1)])
def test_shorter_than_a_block_is_no_block(method: str, block: int, stride: int, tokens: int, random: Random) -> None:
    for compressor in (CLASSES[method](5, block, stride), TokenCompressor(5, block, stride, method)):
        summaries = compressor.double()(random((3, tokens, 5)))
        assert summaries.shape == (3, 0, 5) and summaries.dtype == torch.float64


@every_class
def test_no_sequence_at_all(kind: type[Compressor], random: Random) -> None:
    assert kind(5, 4, 2).double()(random((0, 13, 5))).shape == (0, 5, 5)


@every_class
def test_stride_is_the_block_unless_given(kind: type[Compressor], random: Random) -> None:
    x = random((1, 21, 3))
    apart, overlapping = (kind(3, 4, *stride).double()(x) for stride in ((), (2,)))
    assert apart.shape == (1, 5, 3) and overlapping.shape == (1, 9, 3)


@every_class
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_summaries_have_the_dtype_of_the_tokens(kind: type[Compressor], dtype: torch.dtype, random: Random) -> None:
    assert kind(3, 4).to(dtype)(random((1, 9, 3), dtype)).dtype == dtype


# ---------------------------------------------------------------------------------------------------------------------
# Where they start
# ---------------------------------------------------------------------------------------------------------------------


def assert_starts_at_the_mean(compressor: Compressor, random: Random) -> None:
    """The mean of the block's tokens, each with its small position embedding: but for that, the mean exactly."""
    x = random((2, 3 * compressor.block, compressor.dim))
    compressor.double()
    position = compressor.position if hasattr(compressor, "position") else torch.zeros(1, dtype=torch.float64)
    mean = oracle.avgpool(x, compressor.block, compressor.stride)
    rounding = 8 * torch.finfo(torch.float32).eps  # of the weights 1/l, which were stored in float32
    torch.testing.assert_close(compressor(x), mean + position.mean(0), rtol=0, atol=rounding)
    assert position.abs().max() < 0.1, "the position embedding starts small beside tokens of size 1"


@every_class
@every_size
def test_the_start_is_the_mean(
    kind: type[Compressor], dim: int, block: int, stride: int, tokens: int, random: Random
) -> None:
    assert_starts_at_the_mean(kind(dim, block, stride), random)


@every_learned_class
def test_positions_start_different_and_learn(kind: type[Compressor], random: Random) -> None:
    """All weights get gradients at the start: none of them is cut off by a zero of another."""
    compressor = kind(4, 6, 3).double()
    assert len(compressor.position.unique()) == 24
    compressor(random((2, 20, 4))).square().sum().backward()
    for name, parameter in compressor.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.ne(0).any()), f"{name} learns nothing"


def initialize_like_gpt(module: nn.Module) -> None:
    """Initialisation that models commonly `apply`: small normal weights, no bias."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
        nn.init.zeros_(module.bias)


@pytest.mark.parametrize("compression", CLASSES)
@pytest.mark.parametrize("gate_mode", ["static", "q_cond"])
def test_the_start_survives_the_initialization_of_a_model(compression: str, gate_mode: str, random: Random) -> None:
    gates = {"gate_mode": gate_mode, "gate_init": (0.5, -1.0, 3.0)}
    cfg = NSAConfig(dim=8, heads=2, block_size=4, stride=2, compression=compression, seq_len=32, **gates)
    attention = NativeSparseAttention(cfg)
    model = nn.Sequential(attention, nn.Linear(8, 8))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    model.apply(initialize_like_gpt)
    assert not torch.equal(attention.to_q.weight, before["0.to_q.weight"]), "apply did not reach the projections"
    kept = {name for name, weight in model.named_parameters() if torch.equal(weight, before[name])}
    untouched = {name for name in before if "compress" in name or "gate" in name}
    assert untouched and untouched <= kept, f"{untouched - kept} were initialized anew"
    for compressor in (attention.compress_k.method, attention.compress_v.method):
        assert_starts_at_the_mean(compressor, random)
    expected = torch.tensor(cfg.gate_init).sigmoid().expand(1, 9, 2, 3)
    attention.float()
    torch.testing.assert_close(attention.attention_patterns(random((1, 9, 8), torch.float32)).gates, expected)


def poison(module: nn.Module) -> nn.Module:
    """Memory that `to_empty` leaves behind may hold anything."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    return module


@every_learned_class
def test_reset_parameters_after_construction_on_meta(kind: type[Compressor], random: Random) -> None:
    with torch.device("meta"):
        compressor = kind(4, 6, 3)
    assert all(parameter.is_meta for parameter in compressor.parameters())
    poison(compressor.to_empty(device="cpu"))
    compressor.reset_parameters()
    assert_starts_at_the_mean(compressor, random)


@every_learned_class
def test_reset_parameters_forgets_what_was_learned(kind: type[Compressor], random: Random) -> None:
    compressor = randomize(kind(4, 6, 3), random)
    compressor.reset_parameters()
    assert_starts_at_the_mean(compressor, random)


# ---------------------------------------------------------------------------------------------------------------------
# TokenCompressor: one of them by name, or a class of the user's own
# ---------------------------------------------------------------------------------------------------------------------


class Last(nn.Module):
    """A user's compressor: a scaled last token of each block."""

    def __init__(self, dim: int, block: int, stride: int) -> None:
        super().__init__()
        self.block, self.stride = block, stride
        self.weight = nn.Parameter(torch.full((dim,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.block - 1 :: self.stride] * self.weight


class LastWithoutStride(Last):
    """Compressor of the signature (dim, block)."""

    def __init__(self, dim: int, block: int) -> None:
        super().__init__(dim, block, block)


class Misshapen(nn.Module):
    """Returns what its `result` makes of x."""

    def __init__(self, dim: int, block: int, stride: int, *, result: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.result = result

    def forward(self, x: Tensor) -> object:
        return self.result(x)


@pytest.mark.parametrize("method", CLASSES)
def test_by_name_and_by_class(method: str, random: Random) -> None:
    for chosen in (method, CLASSES[method]):
        compressor = TokenCompressor(3, 8, 4, method=chosen)
        assert type(compressor.method) is CLASSES[method]
        randomize(compressor, random)
        x = random((2, 23, 3))
        assert_close64(compressor(x), definition(compressor.method)(x))


def test_the_method_is_grouped_mlp_unless_given() -> None:
    assert type(TokenCompressor(3, 8).method) is GroupedMLPCompressor
    assert TokenCompressor(3, 8).method.stride == 8


@pytest.mark.parametrize("tokens", [8, 9, 23, 24])
def test_an_own_class_with_stride(tokens: int, random: Random) -> None:
    x = random((2, tokens, 3))
    summaries = TokenCompressor(3, 8, 4, method=Last).double()(x)
    assert_close64(summaries, oracle.compress(x, 8, 4, lambda block: 2 * block[-1]))


@pytest.mark.parametrize("stride", [None, 8])
def test_an_own_class_without_stride(stride: int | None, random: Random) -> None:
    x = random((2, 27, 3))
    summaries = TokenCompressor(3, 8, stride, method=LastWithoutStride).double()(x)
    assert_close64(summaries, oracle.compress(x, 8, 8, lambda block: 2 * block[-1]))


def test_an_own_class_without_stride_cannot_overlap() -> None:
    with pytest.raises(ValueError, match="LastWithoutStride.*stride = 4.*block_size = 8"):
        TokenCompressor(3, 8, 4, method=LastWithoutStride)
    cfg = NSAConfig(dim=6, heads=2, block_size=8, stride=4, compression=LastWithoutStride)
    with pytest.raises(ValueError, match="LastWithoutStride.*stride = 4.*block_size = 8"):
        NativeSparseAttention(cfg)


@pytest.mark.parametrize("compression", [Last, LastWithoutStride])
def test_an_own_class_in_attention_learns(compression: type[nn.Module], random: Random) -> None:
    cfg = NSAConfig(dim=6, heads=2, block_size=4, topk_blocks=1, compression=compression)
    attention = NativeSparseAttention(cfg).double()
    attention(random((2, 19, 6))).square().sum().backward()
    for compressor in (attention.compress_k.method, attention.compress_v.method):
        assert type(compressor) is compression
        assert bool(compressor.weight.grad.ne(0).any()), "no gradient reaches the user's compressor"


WRONG_SHAPES = {
    "a block too few": lambda x: x[:, :4],
    "a block too many": lambda x: x[:, :6],
    "another width": lambda x: x[:, :5, :2],
    "another batch": lambda x: x[:1, :5],
    "no blocks": lambda x: x[:, 0],
}


@pytest.mark.parametrize("result", WRONG_SHAPES.values(), ids=WRONG_SHAPES)
def test_an_own_class_of_the_wrong_shape_is_named(result: Callable[[Tensor], Tensor], random: Random) -> None:
    x = random((2, 25, 3))  # C = 5
    compressor = TokenCompressor(3, 8, 4, method=partial(Misshapen, result=result))
    with pytest.raises(ValueError, match="Misshapen") as caught:
        compressor(x)
    for shape in (tuple(result(x).shape), (2, 5, 3)):
        assert str(shape) in str(caught.value), f"the message does not say {shape}"


def test_an_own_class_that_returns_no_tensor(random: Random) -> None:
    compressor = TokenCompressor(3, 8, 4, method=partial(Misshapen, result=lambda x: x.tolist()))
    with pytest.raises(TypeError, match="Misshapen.*list.*tensor"):
        compressor(random((2, 25, 3)))


@pytest.mark.parametrize("method", ["mean", "", "Conv1d"])
def test_unknown_names_list_the_valid_ones(method: str) -> None:
    with pytest.raises(ValueError, match="'grouped_mlp', 'conv1d', 'avgpool'") as caught:
        TokenCompressor(3, 8, method=method)
    assert repr(method) in str(caught.value)


@pytest.mark.parametrize("method", [None, 3, lambda *sizes: sizes], ids=["None", "3", "a tuple"])
def test_what_builds_no_module(method: object) -> None:
    with pytest.raises(TypeError, match="class|Module"):
        TokenCompressor(3, 8, method=method)


@pytest.mark.parametrize("kind", [*CLASSES.values(), TokenCompressor], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", ["dim", "block", "stride"])
def test_sizes_are_positive_integers(kind: type[nn.Module], name: str) -> None:
    good = {"dim": 3, "block": 8, "stride": 4}
    with pytest.raises(ValueError, match=f"^{name} = 0: .*at least 1"):
        kind(**good | {name: 0})
    with pytest.raises(TypeError, match=f"^{name} = 2.0: .*int"):
        kind(**good | {name: 2.0})


@pytest.mark.parametrize("shape", [(25, 3), (1, 2, 25, 3), (2, 25, 4)], ids=str)
def test_input_of_the_wrong_shape(shape: tuple[int, ...], random: Random) -> None:
    with pytest.raises(ValueError, match="x.shape") as caught:
        TokenCompressor(3, 8, 4).double()(random(shape))
    assert str(shape) in str(caught.value)
