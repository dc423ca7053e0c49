"""Packed sequences: `cu_seqlens` makes every function what it is for each sequence alone, and blind to the others."""

from __future__ import annotations

import functools
import itertools
import random as python_random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from cases import (
    BRANCHES,
    GROUP_1,
    GROUP_3,
    GROUP_16,
    IN_KERNELS,
    LONG_BLOCKS,
    NO_BLOCK,
    OVERLAPPING,
    PLAIN,
    SMALL_PIECES,
    Branch,
    Case,
    EachAlone,
    Packed,
    Packing,
    Random,
    choice,
    compressed,
    double,
    each_branch_every_way,
    edges,
    every_branch,
    every_way,
    gradients,
    in_doubt,
    interpreted,
    local,
    run,
    selective,
    sizes,
    slow,
    whole,
    wild_offsets,
)
from conftest import assert_close64, assert_valid_choice, assert_within_budget, choice_tolerance
from torch import Tensor
from torch.nn import functional as F

import native_sparse_attention as nsa

# As in `test_kernels`: NumPy warns of −inf − −inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

# ---------------------------------------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------------------------------------


SMALL_BLOCKS = Case("small_blocks", T=0, H=3, K=1, D=3, block_size=2, stride=1, select_block_size=3, topk_blocks=4,
                    local_blocks=2, window=3)  # fmt: skip
ALL_ONE = Case("all_one", T=0, H=2, K=2, D=4, block_size=1, stride=1, select_block_size=1, topk_blocks=2, window=1)
PACKINGS = (
    Packing(OVERLAPPING, (13, 29, 8)),
    Packing(OVERLAPPING, (0, 7, 1, 0, 0, 21, 5, 0)),
    Packing(OVERLAPPING, (3, 7, 1)),  # not one compressed block
    Packing(OVERLAPPING, (37,)),
    Packing(SMALL_BLOCKS, (1, 1, 1, 1, 1)),
    Packing(SMALL_BLOCKS, (9, 0, 2, 14)),
    Packing(ALL_ONE, (4, 1, 0, 6)),  # as many compressed blocks as tokens
)
RAGGED = PACKINGS[1]
NOTHING = (Packing(OVERLAPPING, (0, 0)), Packing(OVERLAPPING, ()))
every_packing = pytest.mark.parametrize("packing", PACKINGS, ids=str)

# ---------------------------------------------------------------------------------------------------------------------
# Values and gradients
# ---------------------------------------------------------------------------------------------------------------------


@every_branch
@every_packing
def test_against_the_loops_on_each_sequence(branch: Branch, packing: Packing, random: Random) -> None:
    x = packing.draw(branch, random)
    actual = run(branch, Packed(packing.cu_seqlens), packing.case, x)
    for name, value in run(branch, EachAlone(oracle, packing), packing.case, x).items():
        assert_close64(actual[name], value, name)


@every_branch
@pytest.mark.parametrize("packing", PACKINGS + NOTHING, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_as_each_sequence_alone(branch: Branch, packing: Packing, dtype: torch.dtype, random: Random) -> None:
    x = packing.draw(branch, random, dtype)
    actual = run(branch, Packed(packing.cu_seqlens), packing.case, x, dtype)
    for name, value in run(branch, EachAlone(PLAIN, packing), packing.case, x, dtype).items():
        torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}")


@every_branch
@every_packing
def test_as_groups_of_rows(branch: Branch, packing: Packing, random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch runs sequences of about equal lengths together; here nothing else is a reason to."""
    x = packing.draw(branch, random)
    expected = run(branch, EachAlone(PLAIN, packing), packing.case, x)
    monkeypatch.setattr(nsa, "_CALL_TOKENS", 0)
    for name, value in run(branch, Packed(packing.cu_seqlens), packing.case, x).items():
        assert_close64(value, expected[name], name)


@every_branch
@every_packing
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_by_tables(
    branch: Branch, packing: Packing, dtype: torch.dtype, random: Random, request: pytest.FixtureRequest
) -> None:
    """PyTorch on a GPU, where the host must not read lengths or choices."""
    x = packing.draw(branch, random, dtype)
    expected = run(branch, EachAlone(PLAIN, packing), packing.case, x, dtype)
    request.getfixturevalue("nobody_looks")
    for name, value in run(branch, Packed(packing.cu_seqlens), packing.case, x, dtype).items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_groups_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [8, 100, 0, 90, 10, 7, 100, 3]
    order, shapes = nsa._row_groups(lengths)
    assert order == [1, 6, 3, 4, 0, 5, 7]
    assert shapes == [(5, 100), (2, 7)], "10 + 90 + 92 are less than a call costs, 93 more are not"
    monkeypatch.setattr(nsa, "_CALL_TOKENS", 0)
    assert nsa._row_groups(lengths) == (order, [(3, 100), (2, 10), (1, 7), (1, 3)])
    assert nsa._row_groups([4] * 4096)[1] == [(4096, 4)]
    assert nsa._row_groups([0, 0]) == nsa._row_groups([]) == ([], [(0, 0)])


@pytest.mark.parametrize("packing", PACKINGS + NOTHING, ids=str)
def test_choice_of_each_sequence(packing: Packing, random: Random) -> None:
    x = packing.draw(compressed, random)
    chosen = choice(Packed(packing.cu_seqlens), packing.case, x)
    sizes = packing.case.compression | {"select_block_size": packing.case.select_block_size}
    tokens = [case.T for case in packing.alone]
    for case, rows, of_sequence in zip(packing.alone, packing.unpack(x), chosen.split(tokens, dim=1), strict=True):
        importance = oracle.importance(rows["q"], rows["k_cmp"], **sizes)
        assert_valid_choice(of_sequence, importance, case, tolerance=1e-10)


@pytest.mark.parametrize("separate", [False, True], ids=["shared_kv", "separate_kv"])
def test_the_whole_takes_scale_and_local_keys(separate: bool, random: Random) -> None:
    x = RAGGED.draw(whole, random)
    names, case = ("k_local", "v_local"), RAGGED.case
    own = {name: random(x["k"].shape).requires_grad_() for name in names} if separate else {}
    leaves = {name: x[name] for name in BRANCHES[whole]} | own
    settings = case.whole | {"scale": 0.4}
    packed = nsa.nsa_attention(**leaves, **settings, cu_seqlens=RAGGED.cu_seqlens)
    alone = torch.cat([nsa.nsa_attention(**rows, **settings) for rows in RAGGED.unpack(leaves)], dim=1)
    assert_close64(packed, alone, "o")
    upstream = [random(packed.shape)]
    of_packed, of_alone = (gradients(o, list(leaves.values()), upstream) for o in (packed, alone))
    for name, actual, expected in zip(leaves, of_packed, of_alone, strict=True):
        assert_close64(actual, expected, f"gradient of {name}")


def assert_blind(
    branch: Branch, of: Any, packing: Packing, changed: int, x: dict[str, Tensor], other: dict[str, Tensor]
) -> None:
    """Values and gradients are the same, to the bit, in every sequence but the changed one."""
    before, after = run(branch, of, packing.case, x), run(branch, of, packing.case, other)
    for name in before:
        rows = name.removeprefix("gradient of ")  # of tokens, or of the compressed blocks
        sequences = (packing.unpack({rows: values[name]}) for values in (before, after))
        for i, (one, other) in enumerate(zip(*sequences, strict=True)):
            assert torch.equal(one[rows], other[rows]) or i == changed, f"{name} of sequence {i}"
    assert not torch.equal(before["o"], after["o"])


@every_branch
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_blind_to_the_neighbours(branch: Branch, changed: int, random: Random) -> None:
    """Other numbers in one sequence, even NaN, change nothing in the others: neither values nor gradients."""
    packing = PACKINGS[0]
    x = packing.draw(branch, random)
    other = {name: t.detach().clone() for name, t in x.items()}
    for name, rows in packing.unpack(other)[changed].items():
        rows.copy_(-1 if name == "block_indices" else rows.new_tensor(torch.nan))
    other = {name: t.requires_grad_(t.is_floating_point()) for name, t in other.items()}
    assert_blind(branch, Packed(packing.cu_seqlens), packing, changed, x, other)


# ---------------------------------------------------------------------------------------------------------------------
# Bad cu_seqlens
# ---------------------------------------------------------------------------------------------------------------------


CALLS: dict[str, Callable[[Any, Case, dict[str, Tensor]], Any]] = {
    **{branch.__name__: branch for branch in BRANCHES},
    "choice": lambda of, case, x: of.select_blocks(x["q"], x["k_cmp"], x["q"][..., 0].detach(), **case.choice),
}
every_call = pytest.mark.parametrize("call", CALLS)
BAD = {
    "not_from_0": (torch.tensor([1, 13, 50]), ValueError, ["cu_seqlens[0] = 1", "0"]),
    "descending": (torch.tensor([0, 13, 9, 50]), ValueError, ["cu_seqlens[2] = 9", "at least cu_seqlens[1] = 13"]),
    "negative": (torch.tensor([0, -1, 50]), ValueError, ["cu_seqlens[1] = -1", "at least cu_seqlens[0] = 0"]),
    "too_short": (torch.tensor([0, 13, 49]), ValueError, ["cu_seqlens[-1] = 49", "50"]),
    "too_long": (torch.tensor([0, 13, 51]), ValueError, ["cu_seqlens[-1] = 51", "50"]),
    "lengths_instead": (torch.tensor([13, 29, 8]), ValueError, ["cu_seqlens[0] = 13", "0"]),
    "int16": (torch.tensor([0, 50]).short(), ValueError, ["cu_seqlens.dtype", "int16", "int32"]),
    "float": (torch.tensor([0.0, 50.0]), ValueError, ["cu_seqlens.dtype", "float32", "int32"]),
    "device": (torch.tensor([0, 50], device="meta"), ValueError, ["cu_seqlens.device", "meta", "cpu"]),
    "rank": (torch.tensor([[0, 50]]), ValueError, ["cu_seqlens.shape", "(1, 2)"]),
    "number": (torch.tensor(50), ValueError, ["cu_seqlens.shape", "()"]),
    "nothing": (torch.tensor([]), ValueError, ["cu_seqlens.shape", "(0,)"]),
    "list": ([0, 50], TypeError, ["cu_seqlens", "list", "tensor"]),
}


@every_call
@pytest.mark.parametrize("bad", BAD)
def test_bad_cu_seqlens(call: str, bad: str, random: Random) -> None:
    cu_seqlens, error, parts = BAD[bad]
    if isinstance(cu_seqlens, Tensor) and bad not in ("int16", "float"):
        cu_seqlens = cu_seqlens.int()
    x = PACKINGS[0].draw(whole, random)
    for _ in range(2):  # what was refused is not remembered as right
        with pytest.raises(error) as caught:
            CALLS[call](Packed(cu_seqlens), PACKINGS[0].case, x)
        missing = [part for part in parts if part not in str(caught.value)]
        assert not missing, f"{missing} not in {str(caught.value)!r}"


@every_call
def test_more_than_one_row(call: str, random: Random) -> None:
    case = replace(OVERLAPPING, B=2, T=25)
    x = case.tensors(random) | {"block_indices": random.block_indices(case)}
    cu_seqlens = torch.tensor([0, 25], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"batch = 2: must be 1 .*cu_seqlens"):
        CALLS[call](Packed(cu_seqlens), case, x)


@pytest.mark.parametrize("call", ["compressed", "choice", "whole"])
@pytest.mark.parametrize("rows", [8, 13])
def test_too_few_or_too_many_compressed_blocks(call: str, rows: int, random: Random) -> None:
    """50 tokens in rows of 13, 29 and 8 have 2 + 6 + 1 blocks; 50 // 4 rows are always enough."""
    packing = PACKINGS[0]
    x = packing.draw(whole, random)
    x |= {name: random((1, rows, packing.case.K, packing.case.D)) for name in ("k_cmp", "v_cmp")}
    with pytest.raises(ValueError, match=rf"k_cmp.shape = \(1, {rows}, 2, 5\): must .* 9, up to .* 12"):
        CALLS[call](Packed(packing.cu_seqlens), packing.case, x)


@every_packing
@pytest.mark.parametrize("branch", [compressed, whole], ids=lambda branch: branch.__name__)
def test_spare_rows_of_compressed_keys(branch: Branch, packing: Packing, random: Random) -> None:
    """Spare rows may hold anything, and their gradient is 0."""
    x = packing.draw(branch, random)
    spare = packing.cu_seqlens[-1].item() // packing.case.stride - x["k_cmp"].shape[1]
    more = {name: F.pad(x[name].detach(), (0, 0, 0, 0, 0, spare), value=torch.nan) for name in ("k_cmp", "v_cmp")}
    more = x | {name: value.requires_grad_() for name, value in more.items()}
    expected, actual = (run(branch, Packed(packing.cu_seqlens), packing.case, y) for y in (x, more))
    for name, value in expected.items():
        if name.startswith("gradient of") and name.endswith("_cmp"):
            assert not actual[name][:, value.shape[1] :].any(), name
            actual[name] = actual[name][:, : value.shape[1]]
        assert_close64(actual[name], value, name)


# ---------------------------------------------------------------------------------------------------------------------
# Reading cu_seqlens
# ---------------------------------------------------------------------------------------------------------------------


def test_read_again_after_a_change(random: Random) -> None:
    case = OVERLAPPING
    x = Packing(case, (13, 12)).draw(compressed, random)
    cu_seqlens = torch.tensor([0, 13, 25], dtype=torch.int32)
    q, k, v = x["q"], x["k"], x["v"]
    nsa.local_attention(q, k, v, 6, cu_seqlens=cu_seqlens)
    cu_seqlens[1] = 5
    fresh = nsa.local_attention(q, k, v, 6, cu_seqlens=cu_seqlens.clone())
    assert torch.equal(nsa.local_attention(q, k, v, 6, cu_seqlens=cu_seqlens), fresh)
    cu_seqlens[1] = 26
    with pytest.raises(ValueError, match=r"cu_seqlens\[2\] = 25"):
        nsa.local_attention(q, k, v, 6, cu_seqlens=cu_seqlens)
    with torch.inference_mode():  # where tensors do not count their changes
        cu_seqlens = torch.tensor([0, 13, 25], dtype=torch.int32)
        nsa.local_attention(q, k, v, 6, cu_seqlens=cu_seqlens)
        cu_seqlens[1] = 5
        assert torch.equal(nsa.local_attention(q, k, v, 6, cu_seqlens=cu_seqlens), fresh)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("through", ["numpy", "data"])
def test_a_change_that_torch_does_not_count(through: str, dtype: torch.dtype, random: Random) -> None:
    x = Packing(OVERLAPPING, (13, 12)).draw(local, random)
    cu_seqlens = torch.tensor([0, 13, 25], dtype=dtype)
    expected = nsa.local_attention(x["q"], x["k"], x["v"], 6, cu_seqlens=torch.tensor([0, 5, 25], dtype=torch.int32))
    nsa.local_attention(x["q"], x["k"], x["v"], 6, cu_seqlens=cu_seqlens)
    (cu_seqlens.numpy() if through == "numpy" else cu_seqlens.data)[1] = 5
    assert torch.equal(nsa.local_attention(x["q"], x["k"], x["v"], 6, cu_seqlens=cu_seqlens), expected)


@pytest.mark.parametrize("branch", [local, compressed, selective, whole], ids=lambda branch: branch.__name__)
def test_what_cumsum_gives(branch: Branch, random: Random) -> None:
    """Edges of type int64."""
    packing = PACKINGS[0]
    x = packing.draw(branch, random)
    expected, actual = (run(branch, Packed(edges), packing.case, x) for edges in
                        (packing.cu_seqlens, packing.cu_seqlens.long()))  # fmt: skip
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_a_change_before_the_backward_does_not_reach_it(random: Random) -> None:
    """The backward reads the tables of the forward."""
    x = Packing(OVERLAPPING, (13, 12)).draw(compressed, random)
    cu_seqlens, gradients = torch.tensor([0, 13, 25], dtype=torch.int32), []
    for change in (13, 5):
        o = nsa.local_attention(x["q"], x["k"], x["v"], 6, cu_seqlens=cu_seqlens)
        cu_seqlens[1] = change
        gradients.append(torch.autograd.grad(o.sum(), x["k"])[0])
    assert torch.equal(*gradients)


# ---------------------------------------------------------------------------------------------------------------------
# Offsets that the host does not look at
# ---------------------------------------------------------------------------------------------------------------------


def draw_with_spare_rows(case: Case, cu_seqlens: Tensor, random: Random, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs, with total // stride rows of compressed keys: NaN from where the sequences' blocks end."""
    x = case.tensors(random, dtype) | {"block_indices": random.block_indices(case)}
    blocks = sum(oracle.compressed_count(n, case.block_size, case.stride) for n in cu_seqlens.diff().tolist())
    rows = (1, case.T // case.stride, case.K, case.D)
    spare = (torch.arange(rows[1]) >= blocks)[:, None, None]
    return x | {name: random(rows, dtype).masked_fill(spare, torch.nan).requires_grad_() for name in ("k_cmp", "v_cmp")}


GARBAGE = [(seed, dtype) for seed in range(6) for dtype in (torch.int32, torch.int64)]


@every_branch
@pytest.mark.parametrize("seed, dtype", GARBAGE, ids=str)
def test_garbage(branch: Branch, seed: int, dtype: torch.dtype, random: Random, nobody_looks: None) -> None:
    case = replace(OVERLAPPING, T=41)
    given, read = wild_offsets(seed, case.T, dtype)
    x = draw_with_spare_rows(case, read, random, torch.float64)
    actual, expected = (run(branch, Packed(edges), case, x) for edges in (given, read))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
        assert value[~torch.isneginf(value)].isfinite().all(), name


@pytest.mark.parametrize("rows", [0, 1, 6])
@pytest.mark.parametrize("branch", [compressed, whole], ids=lambda branch: branch.__name__)
def test_too_few_compressed_keys(branch: Branch, rows: int, random: Random, nobody_looks: None) -> None:
    """All is finite, whatever stands for the blocks that have none."""
    packing = replace(PACKINGS[0], case=OVERLAPPING)
    x = packing.draw(branch, random)
    x |= {name: x[name].detach()[:, :rows].clone().requires_grad_() for name in ("k_cmp", "v_cmp")}
    for name, value in run(branch, Packed(packing.cu_seqlens), packing.case, x).items():
        assert value[~torch.isneginf(value)].isfinite().all(), name


# ---------------------------------------------------------------------------------------------------------------------
# The kernels, by Triton's interpreter
# ---------------------------------------------------------------------------------------------------------------------

every_kernel_packing = pytest.mark.parametrize("packing, dtype", [*IN_KERNELS, slow(GROUP_16, torch.float32)], ids=str)


def assert_kernels_as_exact_as_plain(branch: Branch, packing: Packing, dtype: torch.dtype, random: Random) -> None:
    """Values and all gradients within the error budget of dense masks on each sequence alone."""
    x, of = packing.draw(branch, random, dtype), Packed(packing.cu_seqlens, "triton")
    if branch is whole:
        x["block_indices"] = choice(of, packing.case, x)
    actual = run(branch, of, packing.case, x, dtype)
    plain = run(branch, EachAlone(oracle.Dense, packing), packing.case, x, dtype)
    exact = run(branch, EachAlone(oracle.Dense, packing), packing.case, double(x), dtype)
    terms = max(case.terms for case in packing.alone)
    for name in exact:
        assert actual[name].dtype == (torch.float32 if name == "lse" else dtype), f"{name}: {actual[name].dtype}"
        assert_within_budget(actual[name], plain[name], exact[name], name, terms=terms)


@interpreted
@each_branch_every_way
@every_kernel_packing
def test_kernels(branch: Branch, way: str, packing: Packing, dtype: torch.dtype, random: Random) -> None:
    assert_kernels_as_exact_as_plain(branch, packing, dtype, random)


@interpreted
@pytest.mark.parametrize(
    "packing",
    [GROUP_1, NO_BLOCK, *(slow(each) for each in (GROUP_3, GROUP_16))],
    ids=str,
)
@every_way
def test_kernels_of_the_whole(packing: Packing, way: str, random: Random) -> None:
    assert_kernels_as_exact_as_plain(whole, packing, torch.float16, random)


@interpreted
@pytest.mark.parametrize(
    "branch, packing, dtype",
    [
        (whole, GROUP_1, torch.float16),
        (whole, NO_BLOCK, torch.float32),
        (selective, GROUP_3, torch.float16),
        (selective, replace(GROUP_16, case=replace(GROUP_16.case, D=16)), torch.float16),
        *(slow(whole, *each) for each in IN_KERNELS),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@in_doubt
def test_kernels_where_lengths_decide(
    branch: Branch, packing: Packing, dtype: torch.dtype, way: str, random: Random, poisoned: None
) -> None:
    """Both ways are launched, and one works; it adds to the gradients of other branches, or to none."""
    assert_kernels_as_exact_as_plain(branch, packing, dtype, random)


@interpreted
@pytest.mark.parametrize("branch", [slow(selective), whole], ids=lambda branch: branch.__name__)
@pytest.mark.parametrize("pieces", ["splits_of_the_queries", "chunks_of_64_queries", "every_loop_by_query"])
@in_doubt
def test_where_lengths_decide_in_small_pieces(
    branch: Branch, pieces: str, way: str, random: Random, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over splits, of the way under a mask, and over chunks, of the one by an index, leave those of the other."""
    for name, value in SMALL_PIECES.get(pieces, {"_splits": lambda *_: 3}).items():
        monkeypatch.setattr(nsa, name, value)
    packing = replace(GROUP_1, case=replace(GROUP_1.case, D=16, K=1))
    assert_kernels_as_exact_as_plain(branch, packing, torch.float16, random)


# Sequences of 90 tokens in all: short, long and mixed.
DECIDED = {(30, 30, 30): True, (23, 38, 29): True, (20, 30, 40): False, (2, 87, 1): False, (90, 0, 0): False}


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, slow(torch.float32)], ids=str)
@pytest.mark.parametrize("lengths", DECIDED, ids=str)
def test_lengths_decide(
    lengths: tuple[int, ...], dtype: torch.dtype, random: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host launches the same for all of them, as it knows only the shapes."""
    answers, ask, packing = [], nsa._by_mask, replace(GROUP_1, lengths=lengths)
    key, slot_keys = 1 if dtype == torch.float16 else 64, 1 - packing.case.select_block_size  # a slot is worth one key
    monkeypatch.setattr(nsa, "_by_mask", lambda *given: answers.append(ask(*given)) or answers[-1])
    monkeypatch.setattr(nsa, "_MASKED_KEYS", dict.fromkeys(nsa._MASKED_KEYS, 2300 * key))
    monkeypatch.setattr(nsa, "_SLOT_KEYS", dict.fromkeys(nsa._SLOT_KEYS, slot_keys * key))
    monkeypatch.setattr(nsa, "_ROWS_IN_DOUBT", 0)
    assert_kernels_as_exact_as_plain(whole, packing, dtype, random)
    assert [answer.tolist() for answer in answers] == [[DECIDED[lengths]]] * 2


@interpreted
def test_the_device_decides_as_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of equal length as so many rows; others by the sum of what they read in vain."""
    monkeypatch.setattr(nsa, "_ROWS_IN_DOUBT", 0)
    pick, asked = python_random.Random(1), {True: 0, False: 0}

    def decide(direction: str, shape: tuple[int, ...], lengths: list[int] | None = None) -> bool | Tensor:
        q, segments = torch.empty(shape, dtype=torch.float16), None
        if lengths is not None:
            segments = nsa._Segments(edges(lengths), of_token=torch.empty(0))
        return nsa._by_mask(direction, q, 2, 2, 16, segments)

    for _ in range(300):
        n, T = pick.choice([1, 2, 7, 40, 1100]), pick.randrange(1, 400)
        limit, direction = pick.randrange(1, 9 * n * T * T), pick.choice(["forward", "backward"])
        monkeypatch.setattr(nsa, "_MASKED_KEYS", dict.fromkeys(nsa._MASKED_KEYS, limit))
        alike = decide(direction, (1, n * T, 6, 1), [T] * n)
        assert bool(alike) == decide(direction, (n, T, 6, 1))
        lengths = torch.tensor([0, *sorted(pick.randrange(n * T + 1) for _ in range(n - 1)), n * T]).diff().tolist()
        answer = decide(direction, (1, n * T, 6, 1), lengths)
        useful = 2 * 2 * (16 + nsa._SLOT_KEYS[direction])
        assert bool(answer) == (sum(8 * t * max(t - useful, 0) for t in lengths) <= 2 * limit)
        if isinstance(answer, Tensor):
            asked[answer.item()] += 1
    assert min(asked.values()) > 20, asked
    monkeypatch.undo()
    assert decide("forward", (1, 2**14, 6, 1), [512] * 32) is False  # to launch both ways would cost too much
    assert decide("forward", (1, 2**15, 6, 1), [512] * 64).item() is True


@interpreted
@pytest.mark.parametrize("packing", [GROUP_3, slow(GROUP_16)], ids=str)
@each_branch_every_way
def test_keys_through_descriptors(
    branch: Branch, way: str, packing: Packing, random: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in long batches: short ones, those of all other tests here among them, come by plain pointers."""
    monkeypatch.setattr(nsa, "_PLAIN_ROWS", 0)
    packing = replace(packing, case=replace(packing.case, D=24))  # whose rows are multiples of 16 bytes
    assert_kernels_as_exact_as_plain(branch, packing, torch.float16, random)


def assert_kernels_choose_well(packing: Packing, dtype: torch.dtype, random: Random) -> None:
    """The rules, and scores within twice the error of each: half types are multiplied exactly and summed in float32."""
    x = packing.draw(compressed, random, dtype)
    chosen = choice(Packed(packing.cu_seqlens, "triton"), packing.case, x)
    sizes = packing.case.compression | {"select_block_size": packing.case.select_block_size}
    tokens = [case.T for case in packing.alone]
    for case, rows, of_sequence in zip(packing.alone, packing.unpack(x), chosen.split(tokens, dim=1), strict=True):
        exact = oracle.Dense.importance(rows["q"].double(), rows["k_cmp"].double(), **sizes)
        plain = oracle.Dense.importance(rows["q"].float(), rows["k_cmp"].float(), **sizes)
        assert_valid_choice(of_sequence, exact, case, choice_tolerance(plain, exact, case.terms))


@interpreted
@every_kernel_packing
def test_choice_of_the_kernels(packing: Packing, dtype: torch.dtype, random: Random) -> None:
    assert_kernels_choose_well(packing, dtype, random)


@interpreted
def test_choice_of_the_kernels_in_chunks(random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of queries belongs to one sequence, and a chunk is made of tiles. Sequences of unlike lengths."""
    monkeypatch.setattr(nsa, "_SCORE_BYTES", 1)
    monkeypatch.setattr(nsa, "_NARROW", 1)
    assert_kernels_choose_well(replace(GROUP_1, lengths=(70, 1, 0, 40, 33, 90)), torch.float32, random)


@interpreted
@pytest.mark.parametrize(
    "pieces", ["chunks_of_64_queries", slow("few_blocks_cut_at_a_time"), slow("every_loop_by_query")]
)
@pytest.mark.parametrize("way", ["by_index"], indirect=True)
def test_selective_kernels_in_small_pieces(
    pieces: str, way: str, random: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SMALL_PIECES[pieces].items():
        monkeypatch.setattr(nsa, name, value)
    packing = replace(GROUP_1, case=replace(GROUP_1.case, D=16, K=1))
    assert_kernels_as_exact_as_plain(selective, packing, torch.float16, random)


@interpreted
def test_compressed_gradients_in_parts(random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile of keys splits the queries that see it."""
    monkeypatch.setattr(nsa, "_splits", lambda *_: 3)
    assert_kernels_as_exact_as_plain(compressed, GROUP_16, torch.float16, random)


@interpreted
@each_branch_every_way
def test_kernels_read_no_uninitialised_memory(branch: Branch, way: str, random: Random) -> None:
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        assert_kernels_as_exact_as_plain(branch, GROUP_3, torch.float16, random)
    finally:
        torch.use_deterministic_algorithms(was)


@interpreted
@every_way
def test_kernels_are_blind_to_the_neighbours(way: str, random: Random) -> None:
    """To any finite numbers there."""
    changed, packing = 1, replace(GROUP_3, lengths=(18, 17, 1))
    x, of = packing.draw(whole, random, torch.float16), Packed(packing.cu_seqlens, "triton")
    other = {name: t.detach().clone() for name, t in x.items()}
    for name in BRANCHES[whole]:
        rows = packing.unpack({name: other[name]})[changed][name]
        rows.copy_(random(rows.shape).sigmoid() if name == "gates" else 9 * random(rows.shape))
    other = {name: t.requires_grad_(t.is_floating_point()) for name, t in other.items()}
    assert_blind(whole, of, packing, changed, x, other)


@interpreted
@pytest.mark.parametrize("changed, value", [(0, torch.nan), (1, torch.inf), (2, torch.nan)])
@pytest.mark.parametrize(
    "dtype, group, way",
    [
        (torch.float16, 3, "by_index"),
        (torch.float16, 16, "by_index"),
        (torch.float32, 16, "by_index"),
        (torch.float16, 16, "by_mask"),
        (torch.float16, 3, "in_doubt_by_index"),
        (torch.float16, 3, "in_doubt_by_mask"),
    ],
    ids=str,
    indirect=["way"],
)
def test_kernels_are_blind_to_neighbours_that_are_not_finite(
    dtype: torch.dtype, group: int, way: str, changed: int, value: float, random: Random
) -> None:
    """Every tile lies in one sequence."""
    case = replace(GROUP_3.case if group == 3 else GROUP_16.case, D=16)
    packing = replace(GROUP_3, case=case, lengths=(18, 17, 9))
    x, of = packing.draw(whole, random, dtype), Packed(packing.cu_seqlens, "triton")
    other = {name: t.detach().clone() for name, t in x.items()}
    for name in BRANCHES[whole]:
        packing.unpack({name: other[name]})[changed][name].fill_(value)
    other = {name: t.requires_grad_(t.is_floating_point()) for name, t in other.items()}
    assert_blind(whole, of, packing, changed, x, other)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels' tables
# ---------------------------------------------------------------------------------------------------------------------


def tables(given: list[int], total: int, keys: int, block_size: int, stride: int) -> list[list[Any]]:
    """The tables in plain Python: an offset is the highest so far, between 0 and the total."""
    offsets = [0]
    for offset in given[1:-1]:
        offsets.append(max(offsets[-1], min(max(offset, 0), total)))
    offsets.append(total)
    of_token, of_key, cu_keys = [[], []], [[], []], [0]
    for s, (start, stop) in enumerate(itertools.pairwise(offsets)):
        for position in range(stop - start):
            of_token[0].append(s)
            of_token[1].append(position)
        for i in range(oracle.compressed_count(stop - start, block_size, stride)):
            of_key[0].append(start + i * stride)
            of_key[1].append(i * stride)
        cu_keys.append(min(len(of_key[0]), keys))
    return [offsets, cu_keys, of_token, [(row + [0] * keys)[:keys] for row in of_key]]


def garbage(pick: python_random.Random, n: int, total: int, dtype: torch.dtype) -> Tensor:
    """Offsets that neither ascend nor stay between 0 and the total."""
    limits = torch.iinfo(dtype)
    values = [limits.min, -1, 0, total, total + 1, limits.max, *(pick.randrange(-9, total + 9) for _ in range(n))]
    return torch.tensor(pick.choices(values, k=n + 1), dtype=dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("n, total", [(1, 1), (3, 40), (9, 0), (70, 300), (200, 130)])
@pytest.mark.parametrize("block_size, stride", [(4, 2), (1, 1)])
def test_tables_of_the_kernel(n: int, total: int, block_size: int, stride: int, dtype: torch.dtype) -> None:
    pick = python_random.Random(n)
    ascending = torch.tensor([0, *sorted(pick.choices(range(total + 1), k=n - 1)), total], dtype=dtype)
    for given in (ascending, garbage(pick, n, total, dtype), garbage(pick, n, total, dtype)):
        for keys in (total // stride, 0, 3):
            actual = nsa._triton_segments(given, total, keys, block_size, stride)
            expected = tables(given.tolist(), total, keys, block_size, stride)
            for name, table, value in zip(actual._fields, actual, expected, strict=True):
                assert table.dtype == torch.int32 and table.tolist() == value, f"{name} of {given.tolist()}"


def test_tables_of_no_sequence() -> None:
    actual = nsa._BACKENDS["torch"].segments(torch.zeros(1).int(), 0, 0, 4, 2)
    assert [table.tolist() for table in actual] == [[0], [0], [[], []], [[], []]]


@interpreted
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("packing", [GROUP_1, GROUP_3, GROUP_16], ids=str)
def test_no_offset_reaches_outside(packing: Packing, seed: int, random: Random) -> None:
    """Every access of every kernel stays within its tensors, and every row is written."""
    case, pick, on = replace(packing.case, T=60), python_random.Random(seed), nsa._BACKENDS["triton"]
    x = {name: tensor.detach() for name, tensor in case.tensors(random, torch.float16).items()}
    q, k, v = x["q"], x["k"], x["v"]
    k_cmp, v_cmp = (random((1, case.T // case.stride, case.K, case.D), torch.float16) for _ in range(2))
    choice, span, scale = sizes(case), nsa._Span(case.window), case.D**-0.5
    given = garbage(pick, 6, case.T, torch.int64)
    segments = nsa._triton_segments(given, case.T, k_cmp.shape[1], case.block_size, case.stride)
    o_local, lse = on.span_forward(q, k, v, span, scale, segments)
    (terms,) = nsa._row_terms(on.preprocess(q, [o_local], [lse], case.K, dlse=lse)[0])
    results = [o_local, *on.span_backward(q, terms, q, k, v, span, scale, segments=segments)]
    o, lse = on.span_forward(q, k_cmp, v_cmp, choice.span, scale, segments)
    (terms,) = nsa._row_terms(on.preprocess(q, [o], [lse], case.K, dlse=torch.zeros_like(lse))[0])
    results += [o, *on.span_backward(q, terms, q, k_cmp, v_cmp, choice.span, scale, segments=segments)]
    chosen = on.select(q, k_cmp, lse, choice, scale, segments)
    assert (chosen >= -1).all() and (chosen <= case.T // case.select_block_size).all()
    for blocks in (chosen, torch.full_like(chosen, 2**31 - 1)):
        rest = (blocks, case.select_block_size, scale)
        o, lse, _ = on.selected_forward(q, k, v, *rest, segments=segments)
        (terms,) = nsa._row_terms(on.preprocess(q, [o], [lse], case.K, dlse=torch.zeros_like(lse))[0])
        results += [o, *on.selected_backward(q, terms, q, k, v, *rest, segments=segments)]
    assert all(result.isfinite().all() for result in results)


@interpreted
@pytest.mark.parametrize("packing", [GROUP_1, GROUP_16, NO_BLOCK], ids=str)
def test_rows_of_compressed_keys_that_no_block_needs(packing: Packing, random: Random) -> None:
    """Their content is not read, be it NaN, and their gradient is 0."""
    case, on = packing.case, nsa._BACKENDS["triton"]
    x = {name: tensor.detach() for name, tensor in packing.draw(compressed, random, torch.float16).items()}
    choice, scale, total, needed = sizes(case), case.D**-0.5, x["q"].shape[1], x["k_cmp"].shape[1]
    results = []
    for rows in (needed, total):
        k, v = (torch.full((1, rows, *x[name].shape[2:]), torch.nan).half() for name in ("k_cmp", "v_cmp"))
        k[:, :needed], v[:, :needed] = x["k_cmp"], x["v_cmp"]
        segments = nsa._triton_segments(packing.cu_seqlens, total, rows, case.block_size, case.stride)
        o, lse = on.span_forward(x["q"], k, v, choice.span, scale, segments)
        (terms,) = nsa._row_terms(on.preprocess(x["q"], [o], [lse], case.K, dlse=torch.zeros_like(lse))[0])
        dq, dk, dv = on.span_backward(x["q"], terms, x["q"], k, v, choice.span, scale, segments=segments)
        chosen = on.select(x["q"], k, lse, choice, scale, segments)
        assert (dk[:, needed:] == 0).all() and (dv[:, needed:] == 0).all()
        results.append((o, lse, dq, dk[:, :needed], dv[:, :needed], chosen))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@interpreted
@pytest.mark.parametrize("branch", [compressed, whole], ids=lambda branch: branch.__name__)
@pytest.mark.parametrize("packing", [NO_BLOCK, *map(slow, (GROUP_1, GROUP_3, GROUP_16, LONG_BLOCKS))], ids=str)
def test_kernels_and_spare_rows_of_compressed_keys(branch: Branch, packing: Packing, random: Random) -> None:
    """Spare rows may hold NaN, and their gradient is 0."""
    case = replace(packing.case, T=sum(packing.lengths))
    x = draw_with_spare_rows(case, packing.cu_seqlens, random, torch.float32)
    actual, expected = (
        run(branch, Packed(packing.cu_seqlens, backend), case, tensors, torch.float32)
        for backend, tensors in (("triton", x), ("torch", double(x)))
    )
    assert_close_to_plain(actual, expected)
    blocks = sum(alone.C for alone in packing.alone)
    for name in ("gradient of k_cmp", "gradient of v_cmp"):
        assert not actual[name][:, blocks:].any(), f"{name}: spare rows"


def assert_close_to_plain(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Close to the PyTorch path in float64, and finite but for the log-sum-exp of rows that see nothing."""
    for name, value in expected.items():
        assert torch.equal(torch.isneginf(actual[name]), torch.isneginf(value)), name
        finite, exact = (y[~torch.isneginf(value)].double() for y in (actual[name], value))
        message = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(finite, exact, rtol=1e-3, atol=1e-4, msg=message)


@interpreted
@pytest.mark.parametrize("branch", [local, compressed, selective, slow(whole)], ids=lambda branch: branch.__name__)
@pytest.mark.parametrize("seed, dtype", [GARBAGE[1], *(slow(*each) for each in GARBAGE[2:])], ids=str)
def test_kernels_and_garbage(
    branch: Branch, seed: int, dtype: torch.dtype, random: Random, nobody_looks: None, poisoned: None
) -> None:
    """No access outside the tensors, which `conftest` checks, nor a read of what nothing has written."""
    case = replace(GROUP_3.case, T=41, D=16)
    given, read = wild_offsets(seed, case.T, dtype)
    x = draw_with_spare_rows(case, read, random, torch.float32)
    actual = run(branch, Packed(given, "triton"), case, x, torch.float32)
    assert_close_to_plain(actual, run(branch, Packed(read), case, double(x)))


@interpreted
@pytest.mark.parametrize("rows", [slow(0), 1, slow(6)])
@pytest.mark.parametrize("branch", [compressed, slow(whole)], ids=lambda branch: branch.__name__)
def test_kernels_and_too_few_compressed_keys(
    branch: Branch, rows: int, random: Random, nobody_looks: None, poisoned: None
) -> None:
    """Nothing outside of them is read or written, and all is finite."""
    packing = replace(GROUP_3, case=replace(GROUP_3.case, D=16), lengths=(18, 33, 9))
    x = packing.draw(branch, random, torch.float32)
    x |= {name: x[name].detach()[:, :rows].clone().requires_grad_() for name in ("k_cmp", "v_cmp")}
    for name, value in run(branch, Packed(packing.cu_seqlens, "triton"), packing.case, x, torch.float32).items():
        assert value[~torch.isneginf(value)].isfinite().all(), name
