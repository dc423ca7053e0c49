"""cu_seqlens and key_padding_mask through the modules: every sequence as if it were alone, forward and gradients."""

from __future__ import annotations

import copy
import random as python_random
from typing import Any

import pytest
import torch
from cases import (
    CONFIGS,
    PAPER,
    Random,
    build,
    build_block,
    draw_config,
    edges,
    every_config,
    every_config_with,
    gradients,
    interpreted,
    slow,
    whether_the_host_reads,
    wild_offsets,
)
from conftest import assert_close64, assert_within_budget
from torch import Tensor, nn

import native_sparse_attention as nsa
from native_sparse_attention import NativeSparseAttention, NSABlock, NSACache, NSAConfig

LENGTHS = (0, 9, 1, 0, 27, 3, 4, 5, 0)  # empty ones, one token, shorter than a block, a whole block


def assert_alone(module: nn.Module, y: Tensor, x: Tensor, sequences: list[Tensor], of: Any, random: Random) -> None:
    """y is what `of` makes of each sequence alone, and so are the gradients of x and of every parameter.

    y: (total, dim), the outputs for all tokens of all sequences, one after another, computed from x.
    """
    exact = torch.cat([y[:0].detach(), *(of(sequence[None])[0] for sequence in sequences)])
    assert_close64(y, exact, "output")
    names, leaves = zip(("x", x), *module.named_parameters(), strict=True)
    upstream = [random(y.shape)]
    pairs = zip(gradients(y, [*leaves], upstream), gradients(exact, [*leaves], upstream), strict=True)
    for name, pair in zip(names, pairs, strict=True):
        assert_close64(*pair, f"gradient of {name}")


def masks(tokens: int, rows: int, pick: python_random.Random) -> Tensor:
    """Padding on the left, on the right, anywhere; rows of nothing but tokens, and of nothing but padding."""
    count, column = [pick.randint(0, tokens) for _ in range(rows)], torch.arange(tokens)
    patterns = [column >= tokens - count[0], column < count[1], column % 3 != 1, column >= 0, column < 0]
    patterns += [torch.tensor([pick.random() < 0.5 for _ in range(tokens)]) for _ in range(rows)]
    return torch.stack(pick.sample(patterns, rows))


# ---------------------------------------------------------------------------------------------------------------------
# Packed sequences
# ---------------------------------------------------------------------------------------------------------------------


@whether_the_host_reads
@every_config
def test_packed_attention_is_each_sequence_alone(name: str, random: Random) -> None:
    attention, x = build(random, **CONFIGS[name]), random((1, sum(LENGTHS), 12)).requires_grad_()
    y = attention(x, cu_seqlens=edges(LENGTHS))
    assert_alone(attention, y[0], x, list(x[0].split(LENGTHS)), attention, random)


@whether_the_host_reads
@every_config
def test_packed_block_is_each_sequence_alone(name: str, random: Random) -> None:
    block, x = build_block(random, **CONFIGS[name]), random((1, sum(LENGTHS), 12)).requires_grad_()
    y = block(x, cu_seqlens=edges(LENGTHS))
    assert_alone(block, y[0], x, list(x[0].split(LENGTHS)), block, random)


@whether_the_host_reads
@pytest.mark.parametrize("seed", range(25))
def test_random_configs_and_lengths(seed: int, random: Random) -> None:
    pick = python_random.Random(seed)
    attention = draw_config(pick, random)
    lengths = [pick.choice([0, 1, 2, 5, 16, 40, 64]) for _ in range(pick.choice([1, 2, 5]))]
    x = random((1, sum(lengths), attention.cfg.dim)).requires_grad_()
    y = attention(x, cu_seqlens=edges(lengths))
    assert_alone(attention, y[0], x, list(x[0].split(lengths)), attention, random)


@whether_the_host_reads
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)], ids=str)
def test_no_tokens_at_all(lengths: tuple[int, ...], random: Random) -> None:
    x = random((1, 0, 12)).requires_grad_()
    for module in (build(random, **PAPER), build_block(random)):
        y = module(x, cu_seqlens=edges(lengths))
        assert y.shape == (1, 0, 12)
        y.sum().backward()


@whether_the_host_reads
def test_neighbours_are_not_seen(random: Random) -> None:
    """Exactly: not a bit changes, and no gradient crosses."""
    block, x = build_block(random, **PAPER, rope_theta=50.0), random((1, 40, 12)).requires_grad_()
    cu_seqlens = edges((11, 18, 11))
    changed = torch.cat([random((1, 11, 12)), x[:, 11:29].detach(), random((1, 11, 12))], dim=1)
    y = block(x, cu_seqlens=cu_seqlens)
    assert torch.equal(block(changed, cu_seqlens=cu_seqlens)[:, 11:29], y[:, 11:29])
    (gradient,) = torch.autograd.grad(y[:, 11:29].sum(), x)
    assert gradient[:, 11:29].any() and not gradient[:, :11].any() and not gradient[:, 29:].any()


def test_seq_len_bounds_each_sequence(random: Random) -> None:
    attention, x = build(random), random((1, 150, 12))
    assert attention(x, cu_seqlens=edges((64, 22, 64))).shape == (1, 150, 12)
    with pytest.raises(ValueError, match=r"cu_seqlens\[2\] - cu_seqlens\[1\] = 65: must be at most seq_len = 64"):
        attention(x, cu_seqlens=edges((40, 65, 45)))


def test_compressors_are_given_whole_blocks(random: Random) -> None:
    shapes = []

    class Last(nn.Module):
        def __init__(self, dim: int, block: int) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            shapes.append(tuple(x.shape))
            return x[:, 3::4]

    attention = build(random, compression=Last)
    attention(random((1, 13, 12)), cu_seqlens=edges((9, 0, 4)))
    assert shapes == [(3 * 2, 4, 6)] * 2, "of keys and of values: 2 + 0 + 1 blocks, 2 heads"
    attention(random((1, 7, 12)), cu_seqlens=edges((3, 3, 1)))
    assert len(shapes) == 2, "called where there is no block"


# ---------------------------------------------------------------------------------------------------------------------
# Offsets that the host does not look at
# ---------------------------------------------------------------------------------------------------------------------


def step(module: nn.Module, x: Tensor, cu_seqlens: Tensor) -> list[Tensor]:
    """The output and the gradients of x and of all parameters."""
    leaves = [x.requires_grad_(), *module.parameters()]
    y = module(x, cu_seqlens=cu_seqlens)
    return [y, *gradients(y, leaves, [Random(seed=1)(y.shape)])]


@every_config_with("seed", range(100))
def test_garbage(name: str, seed: int, random: Random, nobody_looks: None) -> None:
    """A call on any values is that on the nearest offsets that could be: as on a GPU, where no error can tell."""
    module, x = (build, build_block)[seed % 2](random, **CONFIGS[name]), random((1, 37, 12))
    given, read = wild_offsets(seed, 37, (torch.int32, torch.int64)[seed % 3 == 0])
    for actual, expected in zip(step(module, x, given), step(module, x, read), strict=True):
        assert torch.equal(actual, expected) and expected.isfinite().all()


@torch.no_grad()
@every_config_with("seed", range(200, 300))
def test_garbage_and_a_cache(name: str, seed: int, random: Random, nobody_looks: None) -> None:
    module, x = (build, build_block)[seed % 2](random, **CONFIGS[name]), random((1, 37, 12))
    cfg, (given, read) = getattr(module, "attn", module).cfg, wild_offsets(seed, 37)
    outputs, caches = [], [NSACache(cfg, len(given) - 1, 40, dtype=torch.float64) for _ in range(2)]
    for cache, cu_seqlens in zip(caches, (given, read), strict=True):
        outputs += [module(x, cache=cache, cu_seqlens=cu_seqlens), module(x[:, :9], cache=cache, cu_seqlens=cu_seqlens)]
    assert torch.equal(outputs[0], outputs[2]) and torch.equal(outputs[1], outputs[3])
    assert caches[0].lengths == caches[1].lengths
    assert torch.equal(caches[0].tokens, caches[1].tokens) and torch.equal(caches[0].blocks, caches[1].blocks)


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # −inf − −inf, as on a GPU
@pytest.mark.parametrize("name, seed", [("rope_overlapping", 1), slow("paper_rope_bias", 2), slow("avgpool", 3)])
def test_garbage_in_kernels(
    name: str, seed: int, random: Random, nobody_looks: None, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables and all by the kernels; `conftest` checks that they stay within their arguments."""
    exact, x = build(random, **CONFIGS[name]), random((1, 37, 12), torch.float32)
    given, read = wild_offsets(seed, 37)
    expected = step(exact, x.double(), read)
    kernels = nsa._BACKENDS["triton"]
    monkeypatch.setitem(nsa._BACKENDS, "triton", kernels._replace(preferred=lambda device: True))
    for actual, value in zip(step(copy.deepcopy(exact).float(), x, given), expected, strict=True):
        torch.testing.assert_close(actual.double(), value, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Padding
# ---------------------------------------------------------------------------------------------------------------------


def assert_padding(module: nn.Module, x: Tensor, mask: Tensor, random: Random) -> None:
    """Tokens give what they give alone. Padding gives 0, takes no gradient, and may hold anything, even NaN."""
    x = torch.where(mask[..., None], x, torch.nan).requires_grad_()
    y = module(x, key_padding_mask=mask)
    assert y.shape == x.shape
    assert not y[~mask].any()
    (gradient,) = torch.autograd.grad(y, x, random(y.shape), retain_graph=True)
    assert not gradient[~mask].any()
    assert_alone(module, y[mask], x, [row[tokens] for row, tokens in zip(x, mask, strict=True)], module, random)


@whether_the_host_reads
@every_config
def test_padding_around_attention(name: str, random: Random) -> None:
    mask = masks(24, 5, python_random.Random(name))
    assert_padding(build(random, **CONFIGS[name]), random((5, 24, 12)), mask, random)


@whether_the_host_reads
@every_config
def test_padding_around_a_block(name: str, random: Random) -> None:
    mask = masks(24, 5, python_random.Random(name))
    assert_padding(build_block(random, **CONFIGS[name]), random((5, 24, 12)), mask, random)


@whether_the_host_reads
@pytest.mark.parametrize("seed", range(25))
def test_random_configs_and_masks(seed: int, random: Random) -> None:
    pick = python_random.Random(seed)
    attention, rows, tokens = draw_config(pick, random), pick.choice([2, 3]), pick.choice([1, 5, 33, 64])
    assert_padding(attention, random((rows, tokens, attention.cfg.dim)), masks(tokens, rows, pick), random)


def test_without_padding_a_mask_changes_nothing(random: Random) -> None:
    block, x = build_block(random, **PAPER), random((3, 30, 12))
    assert_close64(block(x, key_padding_mask=torch.ones(3, 30, dtype=torch.bool)), block(x))


@whether_the_host_reads
def test_nothing_but_padding(random: Random) -> None:
    block, x = build_block(random, bias=True), random((2, 9, 12)).requires_grad_()
    y = block(x, key_padding_mask=torch.zeros(2, 9, dtype=torch.bool))
    assert torch.equal(y, torch.zeros_like(x))
    y.sum().backward()
    assert not x.grad.any()


def test_padding_does_not_count_towards_seq_len(random: Random) -> None:
    attention, x = build(random), random((2, 100, 12))
    mask = torch.arange(100) >= torch.tensor([[36], [70]])
    assert_close64(attention(x, key_padding_mask=mask)[:1, 36:], attention(x[:1, 36:]))
    with pytest.raises(ValueError, match="= 65: must be at most seq_len = 64"):
        attention(x, key_padding_mask=torch.arange(100) >= torch.tensor([[36], [35]]))


@whether_the_host_reads
def test_a_mask_that_changes_is_read_again(random: Random) -> None:
    attention, x, mask = build(random), random((1, 12, 12)), torch.arange(12)[None] < 7
    for stop in (7, 11, 3):
        mask[:] = torch.arange(12) < stop
        y = attention(x, key_padding_mask=mask)
        assert_close64(y[:, :stop], attention(x[:, :stop]))
        assert not y[:, stop:].any()


@pytest.mark.parametrize("through", ["numpy", "data"])
def test_a_mask_that_changes_where_torch_does_not_count_it(through: str, random: Random) -> None:
    attention, x, mask = build(random), random((1, 12, 12)), torch.arange(12)[None] < 7
    attention(x, key_padding_mask=mask)
    (mask.numpy() if through == "numpy" else mask.data)[:, 7:11] = True
    assert torch.equal(attention(x, key_padding_mask=mask), attention(x, key_padding_mask=mask.clone()))


def test_a_mask_may_serve_inference_before_training(random: Random) -> None:
    block, x, mask = build_block(random), random((1, 12, 12)), torch.arange(12)[None] < 7
    with torch.inference_mode():
        y = block(x, key_padding_mask=mask)
        assert torch.equal(block(x, key_padding_mask=torch.arange(12)[None] < 7), y), "made inside of it"
    trained = block(x.requires_grad_(), key_padding_mask=mask)
    trained.sum().backward()
    assert torch.equal(trained, y)


# ---------------------------------------------------------------------------------------------------------------------
# Precision and bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["overlapping_conv1d", "paper_rope_bias"])
@pytest.mark.parametrize("how", [torch.float32, torch.bfloat16, "autocast"], ids=str)
def test_precision_is_that_of_sequences_alone(name: str, how: Any, random: Random) -> None:
    """Slots for every block: rounding must not turn the choice, or outputs could not be compared."""
    exact, lengths = build(random, **CONFIGS[name] | {"topk_blocks": 40}), (13, 0, 24, 3)
    dtype = torch.float32 if how == "autocast" else how
    attention, x = NativeSparseAttention(exact.cfg).to(dtype), random((1, 40, 12), dtype)
    attention.load_state_dict(exact.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        actual = attention(x, cu_seqlens=edges(lengths))
        plain = torch.cat([attention(part) for part in x.split(lengths, dim=1)], dim=1)
    assert actual.dtype == plain.dtype
    assert_within_budget(actual, plain, exact(x.double(), cu_seqlens=edges(lengths)), terms=40)


@pytest.mark.parametrize("module", [build, build_block])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cu_seqlens": torch.tensor([1, 10]).int()}, r"cu_seqlens\[0\] = 1"),
        ({"cu_seqlens": torch.tensor([0, 7, 5, 10]).int()}, r"cu_seqlens\[2\] = 5"),
        ({"cu_seqlens": torch.tensor([0, 9]).int()}, r"cu_seqlens\[-1\] = 9"),
        ({"cu_seqlens": torch.tensor([0.0, 10.0])}, "cu_seqlens.dtype = torch.float32"),
        ({"cu_seqlens": [0, 10]}, "cu_seqlens = 'list'"),
        ({"cu_seqlens": torch.tensor([0, 10]).int().to("meta")}, "cu_seqlens.device = 'meta'"),
        ({"x": torch.zeros(2, 5, 12).double(), "cu_seqlens": torch.tensor([0, 5]).int()}, "batch = 2"),
        ({"key_padding_mask": torch.ones(10).bool()}, "key_padding_mask.shape"),
        ({"key_padding_mask": torch.ones(1, 9).bool()}, r"key_padding_mask.shape = \(1, 9\)"),
        ({"key_padding_mask": torch.ones(1, 10)}, "key_padding_mask.dtype = torch.float32"),
        ({"key_padding_mask": torch.ones(1, 10, device="meta").bool()}, "key_padding_mask.device = 'meta'"),
        ({"key_padding_mask": "left"}, "key_padding_mask = 'str'"),
        ({"key_padding_mask": torch.ones(1, 10).bool(), "cu_seqlens": edges((10,))}, "key_padding_mask, cu_seqlens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(module: Any, arguments: dict[str, Any], message: str, random: Random) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        module(random)(**{"x": random((1, 10, 12))} | arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Another attention in a block
# ---------------------------------------------------------------------------------------------------------------------


class Watched(NativeSparseAttention):
    """Attention of the user's own, which looks at its arguments."""

    def forward(self, x: Tensor, *, cache: Any = None, cu_seqlens: Tensor | None = None) -> Tensor:
        self.seen = cu_seqlens
        return super().forward(x, cache=cache, cu_seqlens=cu_seqlens)


def test_another_attention_in_a_block_is_given_tensors(random: Random) -> None:
    block, x = NSABlock(NSAConfig(dim=16, heads=2, seq_len=32, block_size=4)), random((2, 20, 16))
    block = block.double()
    mask = torch.arange(20) < torch.tensor([[20], [7]])
    expected = block(x), block(x, key_padding_mask=mask)
    block.attn.__class__ = Watched
    assert torch.equal(block(x), expected[0]) and block.attn.seen is None
    assert torch.equal(block(x, key_padding_mask=mask), expected[1]) and block.attn.seen is None, "rows: tokens first"
