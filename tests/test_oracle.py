"""The oracle against cases worked by hand, against torch's own layers, and its two parts against each other."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import AWKWARD, Case, Random, gradients
from conftest import assert_close64


def vector(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("tokens, count", [(0, 0), (3, 0), (4, 1), (5, 1), (6, 2), (9, 3), (10, 4)])
def test_only_whole_blocks_are_compressed(tokens: int, count: int) -> None:
    assert oracle.compressed_count(tokens, block_size=4, stride=2) == count


@pytest.mark.parametrize("t, visible", [(0, []), (2, []), (3, [0]), (4, [0]), (5, [0, 1]), (8, [0, 1, 2])])
def test_a_block_is_visible_from_its_last_token_on(t: int, visible: list[int]) -> None:
    assert oracle.visible_blocks(t, tokens=9, block_size=4, stride=2) == visible


def test_overlap_gives_the_weights_of_the_paper() -> None:
    weights = [oracle.overlap(i, j=1, block_size=32, stride=16, select_block_size=64) for i in range(10)]
    assert weights == [0, 0, 0, 1, 2, 2, 2, 1, 0, 0]


@pytest.mark.parametrize("t, forced", [(2, {0}), (4, {0, 1}), (11, {0, 1, 2}), (17, {0, 3, 4})])
def test_forced_blocks(t: int, forced: set[int]) -> None:
    assert oracle.forced_blocks(t, select_block_size=4, init_blocks=1, local_blocks=2) == forced


@pytest.mark.parametrize(
    "t, slots, chosen",
    [
        (19, 2, [1, 4]),  # the query's own block is forced, block 1 is the most important
        (19, 3, [1, 2, 4]),  # blocks 2 and 3 tie: the lower index wins
        (19, 4, [1, 2, 3, 4]),
        (15, 2, [1, 3]),  # block 4 has not begun
        (4, 4, [0, 1, -1, -1]),  # fewer candidates than slots
    ],
)
def test_choice_worked_by_hand(t: int, slots: int, chosen: list[int]) -> None:
    scores = vector(0.1, 0.9, 0.5, 0.5, 0.0)
    assert oracle.choose_blocks(scores, t, 20, 4, topk_blocks=slots, init_blocks=0, local_blocks=1) == chosen


def test_attention_worked_by_hand() -> None:
    keys, values = vector(0.0, math.log(3.0))[:, None], vector(4.0, 8.0)[:, None]
    output, lse, probabilities = oracle.attend(vector(1.0), keys, values, scale=1.0)
    assert_close64(probabilities, vector(0.25, 0.75))
    assert_close64(output, vector(7.0))
    assert_close64(lse, torch.tensor(math.log(4.0), dtype=torch.float64))


def test_attention_over_nothing_is_zero() -> None:
    output, lse, _ = oracle.attend(vector(1.0, 2.0), torch.empty(0, 2), torch.empty(0, 2), scale=1.0)
    assert output.tolist() == [0.0, 0.0]
    assert lse == -math.inf


def test_importance_spreads_every_probability_over_the_tokens_of_its_block(random: Random) -> None:
    case = Case("whole", T=24, H=6, K=2, block_size=8, stride=4, select_block_size=8)
    x = case.tensors(random)
    total = oracle.importance(x["q"], x["k_cmp"], **case.compression, select_block_size=8).sum(dim=-1)
    visible = vector(*(bool(oracle.visible_blocks(t, 24, 8, 4)) for t in range(24)))
    assert_close64(total, (3 * 8 / 4 * visible)[None, :, None].expand(1, 24, 2))  # G · l/d


def test_all_blocks_or_an_endless_window_are_dense_causal_attention(random: Random) -> None:
    case = Case("dense", T=13, H=6, K=2, topk_blocks=4)
    q, k, v = (case.tensors(random)[name] for name in "qkv")
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    dense = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)
    every_block = torch.arange(4).expand(1, 13, 2, 4)
    assert_close64(oracle.local_attention(q, k, v, window=13), dense)
    assert_close64(oracle.selective_attention(q, k, v, every_block, select_block_size=4), dense)


def test_window_of_one_returns_the_value(random: Random) -> None:
    x = Case("own", T=6).tensors(random)
    assert_close64(oracle.local_attention(x["q"], x["k"], x["v"], window=1), x["v"])


def test_gates_weigh_the_branches() -> None:
    gates = oracle.sigmoid(vector(0.0, math.log(3.0), -math.log(4.0))).view(1, 1, 1, 3)  # 1/2, 3/4, 1/5
    outputs = (vector(n).view(1, 1, 1, 1) for n in (2.0, 4.0, 10.0))
    assert oracle.gated_sum(gates, *outputs).item() == pytest.approx(1.0 + 3.0 + 2.0, abs=1e-14)


def test_rope_turns_a_pair_of_halves() -> None:
    x = vector(1.0, 0.0, 0.0, 0.0).expand(1, 3, 1, 4)  # the first component of the first half
    expected = [[math.cos(n), 0.0, math.sin(n), 0.0] for n in range(3)]
    assert_close64(oracle.rope(x, oracle.powers(100.0, 4))[0, :, 0], vector(*sum(expected, [])).view(3, 4))
    x = vector(0.0, 1.0, 0.0, 0.0).expand(1, 3, 1, 4)  # the second pair turns by theta^(−1/2) = 1/10
    expected = [[0.0, math.cos(n / 10), 0.0, math.sin(n / 10)] for n in range(3)]
    assert_close64(oracle.rope(x, oracle.powers(100.0, 4))[0, :, 0], vector(*sum(expected, [])).view(3, 4))


def test_rope_of_compressed_keys_takes_strides_for_steps(random: Random) -> None:
    x = random((2, 1, 3, 6))
    tokens = oracle.rope(x.expand(2, 13, 3, 6), oracle.powers(10.0, 6))
    assert_close64(oracle.rope(x.expand(2, 4, 3, 6), oracle.powers(10.0, 6), position_step=4), tokens[:, ::4])


@pytest.mark.parametrize("tokens, stride", [(3, 4), (4, 4), (14, 4), (13, 2)])
def test_compressors_against_torch_layers(random: Random, tokens: int, stride: int) -> None:
    dim, block, hidden = 3, 4, 5
    x, position, weight, bias = (random(s) for s in ((2, tokens, dim), (block, dim), (dim, dim, block), (dim,)))
    w_in, b_in, w_out, b_out = (random(s) for s in ((hidden, block * dim), (hidden,), (dim, hidden), (dim,)))
    blocks = x.unfold(1, block, stride) if tokens >= block else x.new_zeros(2, 0, dim, block)  # (b, C, D, l)
    placed = blocks + position.T
    assert_close64(oracle.avgpool(x, block, stride), blocks.mean(dim=-1))
    convolved = torch.einsum("bcel,del->bcd", placed, weight) + bias
    assert_close64(oracle.conv1d(x, block, stride, position, weight, bias), convolved)
    mlp = F.linear(F.gelu(F.linear(placed.mT.flatten(2), w_in, b_in)), w_out, b_out)
    assert_close64(oracle.grouped_mlp(x, block, stride, position, w_in, b_in, w_out, b_out), mlp)


@pytest.mark.parametrize("case", AWKWARD, ids=str)
def test_dense_masks_agree_with_the_loops(case: Case, random: Random) -> None:
    x = case.tensors(random)
    upstream = [random((case.B, case.T, case.H, case.D))]
    chosen = oracle.select_blocks(x["q"], x["k_cmp"], **case.choice)
    loops = oracle.nsa_attention(**x, **case.whole, block_indices=chosen)
    dense = oracle.Dense.nsa_attention(**x, **case.whole, block_indices=chosen)
    assert_close64(dense, loops, "o")
    leaves = list(x.values())
    of_dense, of_loops = (gradients(o, leaves, upstream) for o in (dense, loops))
    for name, actual, exact in zip(x, of_dense, of_loops, strict=True):
        assert_close64(actual, exact, f"gradient of {name}")
    lse = oracle.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], **case.compression)[1]
    assert_close64(oracle.Dense.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], **case.compression)[1], lse, "lse")
    sizes = case.compression | {"select_block_size": case.select_block_size}
    importance = oracle.importance(x["q"], x["k_cmp"], **sizes)
    assert_close64(oracle.Dense.importance(x["q"], x["k_cmp"], **sizes), importance, "importance")
    assert torch.equal(oracle.Dense.select_blocks(x["q"], x["k_cmp"], **case.choice), chosen)
