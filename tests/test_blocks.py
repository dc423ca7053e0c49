"""Block arithmetic: how many blocks there are, who sees whom, what a block is worth, and which blocks are chosen."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import Random
from conftest import assert_close64
from torch import Tensor

from native_sparse_attention import (
    _block_importance,
    _Choice,
    _choose_blocks,
    _compressed_count,
    _numbered,
    _selection_count,
    _Span,
)

# block_size l, stride d, select_block_size l'
BLOCK_SIZES = [(1, 1, 1), (4, 4, 4), (8, 4, 8), (8, 2, 4), (4, 2, 12), (6, 3, 3), (8, 2, 2), (5, 5, 10), (32, 16, 64)]
every_block_size = pytest.mark.parametrize("block_size, stride, select_block_size", BLOCK_SIZES)

# ---------------------------------------------------------------------------------------------------------------------
# Counts
# ---------------------------------------------------------------------------------------------------------------------


@every_block_size
def test_number_of_blocks(block_size: int, stride: int, select_block_size: int) -> None:
    for tokens in range(3 * max(block_size, select_block_size)):
        whole = [first for first in range(0, tokens, stride) if first + block_size <= tokens]
        begun = list(range(0, tokens, select_block_size))
        assert _compressed_count(tokens, block_size, stride) == len(whole), f"C of {tokens} tokens"
        assert _selection_count(tokens, select_block_size) == len(begun), f"N of {tokens} tokens"


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("counts", [[], [0], [5], [3, 0, 0, 2, 1, 0], [0, 4]])
def test_rows_of_segments(counts: list[int], dtype: torch.dtype) -> None:
    segment, number = _numbered(torch.tensor(counts, dtype=dtype), sum(counts))
    assert segment.tolist() == [i for i, count in enumerate(counts) for _ in range(count)]
    assert number.tolist() == [n for count in counts for n in range(count)]
    assert number.dtype == dtype


@pytest.mark.parametrize("tokens, count", [(31, 0), (32, 1), (47, 1), (48, 2), (64, 3), (8192, 511)])
def test_number_of_compressed_blocks_by_hand(tokens: int, count: int) -> None:
    assert _compressed_count(tokens, 32, 16) == count


# ---------------------------------------------------------------------------------------------------------------------
# Visibility
# ---------------------------------------------------------------------------------------------------------------------


def seen(span: _Span, tokens: int, columns: int) -> list[list[int]]:
    """For each query the keys or blocks that it sees."""
    table = span.sees(torch.arange(tokens)[:, None], torch.arange(columns))
    assert table.dtype == torch.bool and table.shape == (tokens, columns)
    return [row.nonzero()[:, 0].tolist() for row in table]


def assert_spans(span: _Span, rows: list[list[int]]) -> None:
    """`span.keys` is the shortest slice with all that some consecutive queries see."""
    for start in range(len(rows)):
        for stop in range(start + 1, len(rows) + 1):
            union = sorted(set().union(*rows[start:stop]))
            keys = span.keys(start, stop)
            assert list(range(keys.start, keys.stop)) == union, f"keys of the queries [{start}, {stop})"


@pytest.mark.parametrize("window", [1, 2, 5, 13, 14, 100])
def test_a_query_sees_the_tokens_of_its_window(window: int) -> None:
    span, tokens = _Span(window), 13
    rows = seen(span, tokens, tokens)
    assert rows == [[s for s in range(tokens) if t - window < s <= t] for t in range(tokens)]
    assert_spans(span, rows)


@pytest.mark.parametrize("block_size, stride", sorted({(size, stride) for size, stride, _ in BLOCK_SIZES}))
def test_a_query_sees_the_blocks_that_are_complete(block_size: int, stride: int) -> None:
    span, tokens = _Span(0, block_size, stride), min(3 * block_size + 2, 40)
    rows = seen(span, tokens, oracle.compressed_count(tokens, block_size, stride))
    assert rows == [oracle.visible_blocks(t, tokens, block_size, stride) for t in range(tokens)]
    assert_spans(span, rows)


def test_the_last_token_of_a_block_sees_it_and_the_one_before_does_not() -> None:
    rows = seen(_Span(0, block_size=4, stride=2), tokens=8, columns=3)
    assert rows == [[], [], [], [0], [0], [0, 1], [0, 1], [0, 1, 2]]


# ---------------------------------------------------------------------------------------------------------------------
# Importance
# ---------------------------------------------------------------------------------------------------------------------


def importance_weights(tokens: int, block_size: int, stride: int, select_block_size: int) -> Tensor:
    """(C, N): what compressed block i alone, with probability 1, is worth to selection block j."""
    p = torch.eye(_compressed_count(tokens, block_size, stride), dtype=torch.float64)
    blocks = _selection_count(tokens, select_block_size)
    return _block_importance(p, block_size, stride, select_block_size, blocks)


@every_block_size
def test_importance_weighs_by_overlap(block_size: int, stride: int, select_block_size: int) -> None:
    for tokens in range(block_size, 3 * max(block_size, select_block_size), max(1, stride // 3)):
        weights = importance_weights(tokens, block_size, stride, select_block_size)
        expected = [
            [oracle.overlap(i, j, block_size, stride, select_block_size) for j in range(weights.shape[1])]
            for i in range(weights.shape[0])
        ]
        assert weights.tolist() == expected, f"{tokens} tokens"


def test_the_weights_of_the_paper() -> None:
    """For l/d/l' = 32/16/64 a selection block sums five compressed blocks, weighed 1, 2, 2, 2, 1 (eq. 9)."""
    weights = importance_weights(tokens=192, block_size=32, stride=16, select_block_size=64)  # C = 11, N = 3
    assert weights.T.tolist() == [
        [2, 2, 2, 1, 0, 0, 0, 0, 0, 0, 0],  # no block starts before the sequence
        [0, 0, 0, 1, 2, 2, 2, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 1, 2, 2, 2],
    ]


@every_block_size
def test_importance_is_linear_over_any_leading_dimensions(
    block_size: int, stride: int, select_block_size: int, random: Random
) -> None:
    tokens = 2 * max(block_size, select_block_size) + 3
    weights = importance_weights(tokens, block_size, stride, select_block_size)
    p = random((2, 3, 5, weights.shape[0])).abs()
    importance = _block_importance(p, block_size, stride, select_block_size, weights.shape[1])
    assert_close64(importance, p @ weights)
    assert_close64(importance.sum(-1), p.sum(-1) * block_size / stride, "every token of a block counts once")


def test_no_compressed_block_no_importance() -> None:
    importance = _block_importance(torch.empty(2, 7, 0, dtype=torch.float64), 8, 4, 8, blocks=1)
    assert importance.tolist() == torch.zeros(2, 7, 1).tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Choice
# ---------------------------------------------------------------------------------------------------------------------

# select_block_size, topk_blocks, init_blocks, local_blocks
CHOICES = [
    (4, 1, 0, 0),
    (4, 1, 0, 1),
    (4, 2, 0, 1),
    (4, 3, 1, 1),
    (4, 3, 1, 2),
    (1, 5, 2, 2),
    (3, 4, 0, 0),
    (7, 2, 2, 0),
    (4, 20, 3, 3),
]
every_choice = pytest.mark.parametrize("select_block_size, topk_blocks, init_blocks, local_blocks", CHOICES)


def choose(importance: Tensor, select_block_size: int, **settings: int) -> list[list[int]]:
    """The choice of every query t = 0 … T − 1, for importance (T, N)."""
    defaults = {"topk_blocks": 2, "init_blocks": 0, "local_blocks": 1}
    query = torch.arange(importance.shape[-2])
    return _choose_blocks(importance, query, _Choice(1, 1, select_block_size, **defaults | settings)).tolist()


@every_choice
@pytest.mark.parametrize("levels", [1, 2, 4, 1000])
def test_choice_against_the_oracle(
    select_block_size: int, topk_blocks: int, init_blocks: int, local_blocks: int, levels: int, random: Random
) -> None:
    """With few levels of importance most are tied; one level is a tie of all."""
    tokens = 26
    blocks = oracle.selection_count(tokens, select_block_size)
    importance = random.integers(0, levels, (2, tokens, blocks)).double()
    settings = (select_block_size, topk_blocks, init_blocks, local_blocks)
    chosen = _choose_blocks(importance, torch.arange(tokens), _Choice(1, 1, *settings))
    assert chosen.dtype == torch.int32 and chosen.shape == (2, tokens, topk_blocks)
    expected = [
        [oracle.choose_blocks(scores[t], t, tokens, *settings) for t in range(tokens)] for scores in importance
    ]
    assert chosen.tolist() == expected


@every_choice
def test_queries_of_a_tile_choose_as_those_of_the_whole(
    select_block_size: int, topk_blocks: int, init_blocks: int, local_blocks: int, random: Random
) -> None:
    """A tile has queries from the middle of the sequence, and no columns for blocks that begin behind it."""
    tokens, tile = 26, torch.arange(9, 17)
    importance = random((tokens, oracle.selection_count(tokens, select_block_size))).abs()
    choice = _Choice(1, 1, select_block_size, topk_blocks, init_blocks, local_blocks)
    whole = _choose_blocks(importance, torch.arange(tokens), choice)
    narrow = importance[9:17, : oracle.selection_count(17, select_block_size)]
    assert torch.equal(_choose_blocks(narrow, tile, choice), whole[9:17])


def test_the_most_important_are_chosen_in_ascending_order() -> None:
    importance = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.0]).expand(10, 5)
    assert choose(importance, 2, topk_blocks=3)[9] == [1, 3, 4]


def test_forced_blocks_rank_before_all_others_and_take_slots() -> None:
    importance = torch.tensor([0.0, 9.0, 8.0, 0.0, 0.0]).expand(10, 5)
    assert choose(importance, 2, topk_blocks=3, init_blocks=1, local_blocks=2)[9] == [0, 3, 4]
    assert choose(importance, 2, topk_blocks=4, init_blocks=1, local_blocks=2)[9] == [0, 1, 3, 4]


def test_a_block_forced_twice_takes_one_slot() -> None:
    importance = torch.tensor([0.0, 1.0, 2.0]).expand(6, 3)
    assert choose(importance, 2, topk_blocks=4, init_blocks=2, local_blocks=2)[3] == [0, 1, -1, -1]
    assert choose(importance, 2, topk_blocks=4, init_blocks=2, local_blocks=2)[5] == [0, 1, 2, -1]


def test_without_forced_blocks_even_the_own_block_must_earn_its_place() -> None:
    importance = torch.tensor([3.0, 2.0, 1.0]).expand(6, 3)
    assert choose(importance, 2, topk_blocks=2, local_blocks=0)[5] == [0, 1]


@pytest.mark.parametrize("blocks", [4, 90, 100, 255, 256, 300])
def test_rows_of_any_length(blocks: int, random: Random) -> None:
    """torch.topk has several algorithms, by the length of a row and the number of places; here 4."""
    importance = 1e-3 * random.integers(0, blocks // 2, (40, blocks)).double()
    query = random.integers(3, blocks, (40,))
    behind = torch.arange(blocks) > query[:, None]
    ranked = importance.masked_fill(behind, -1.0).sort(dim=-1, descending=True, stable=True).indices[:, :4]
    assert torch.equal(_choose_blocks(importance, query, _Choice(1, 1, 1, 4, 0, 0)).long(), ranked.sort(dim=-1).values)


@pytest.mark.parametrize("blocks", [5, 200, 300, 5000])
def test_ties_go_to_the_lower_index(blocks: int) -> None:
    """Also where rows are so long that sorting algorithms change, and where the tie is of some blocks only."""
    tied = torch.ones(1, blocks)
    last = torch.tensor([blocks - 1])
    assert _choose_blocks(tied, last, _Choice(1, 1, 1, 4, 0, 1)).tolist() == [[0, 1, 2, blocks - 1]]
    tied[:, 2] = 2.0
    tied[:, 0] = 0.5
    assert _choose_blocks(tied, last, _Choice(1, 1, 1, 4, 0, 1)).tolist() == [[1, 2, 3, blocks - 1]]


def test_free_slots_hold_minus_one_and_come_last() -> None:
    importance = torch.tensor([5.0, 4.0, 3.0]).expand(6, 3)
    assert choose(importance, 2, topk_blocks=4) == [
        [0, -1, -1, -1],
        [0, -1, -1, -1],
        [0, 1, -1, -1],
        [0, 1, -1, -1],
        [0, 1, 2, -1],
        [0, 1, 2, -1],
    ]


def test_what_begins_behind_the_query_is_never_chosen() -> None:
    importance = torch.tensor([0.0, 1.0, 1e30, torch.inf]).expand(8, 4)
    assert choose(importance, 2, topk_blocks=2)[:4] == [[0, -1], [0, -1], [0, 1], [0, 1]]
