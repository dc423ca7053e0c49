"""The Triton kernels without a GPU: run by Triton's interpreter against the oracle, and compiled for Hopper.

`test_gpu.py` holds the same kernels to the same error budget at real sizes, on a GPU.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cases
import oracle
import pytest
import torch
from cases import (
    BRANCHES,
    CASES,
    IN_BOTH,
    LAYOUTS,
    MIDDLE,
    PLAIN,
    SMALL_PIECES,
    TRITON,
    Branch,
    Case,
    Packed,
    Packing,
    Random,
    choice,
    compile_only,
    compressed,
    disassemble,
    double,
    each_branch_every_way,
    every_branch,
    every_case,
    every_dtype,
    every_way,
    going,
    gradients,
    interpreted,
    launch,
    local,
    needs_triton,
    run,
    selective,
    slow,
    small_gates,
    whole,
    without_interpreter,
)
from conftest import assert_valid_choice, assert_within_budget, choice_tolerance
from torch import Tensor

import native_sparse_attention as nsa

# Rows that see nothing are −inf − −inf on their way, as on a GPU; NumPy, the engine of the interpreter, warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

draw = partial(cases.draw, of=TRITON)


def assert_as_exact_as_plain(
    branch: Branch, case: Case, x: dict[str, Tensor], actual: dict[str, Tensor], plain_of: Any = oracle.Dense
) -> None:
    """Values and all gradients within the error budget, in the dtypes that are promised."""
    dtype = x["q"].dtype
    plain = run(branch, plain_of, case, x, dtype)
    exact = run(branch, oracle.Dense, case, double(x), dtype)
    for name in exact:
        assert actual[name].dtype == (torch.float32 if name == "lse" else dtype), f"{name}: {actual[name].dtype}"
        assert_within_budget(actual[name], plain[name], exact[name], name, terms=case.terms)


# ---------------------------------------------------------------------------------------------------------------------
# Values and gradients, by the interpreter
# ---------------------------------------------------------------------------------------------------------------------

tl = nsa.tl


@nsa._kernel
def copy_kernel(source, target, reads, writes, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(target + i, tl.load(source + i, mask=i < reads), mask=i < writes)


@interpreted
@pytest.mark.parametrize("reads, writes, outside", [(5, 3, None), (6, 3, "1 of 6 reads"), (5, 5, "2 of 5 writes")])
def test_access_outside_the_arguments_is_an_error(reads: int, writes: int, outside: str | None) -> None:
    """As in every kernel that the interpreter runs: `conftest.stay_within_arguments`."""
    between = torch.arange(16.0)
    source, target = between[:5], between[8:11]
    launch = lambda: copy_kernel[(1,)](source, target, reads, writes, N=8)  # noqa: E731
    if outside is None:
        launch()
        assert target.tolist() == [0, 1, 2]
    else:
        with pytest.raises(Exception, match=outside):
            launch()
        assert between[11:].tolist() == [11, 12, 13, 14, 15]


@interpreted
@each_branch_every_way
@every_case
def test_each_branch_and_gradient(branch: Branch, way: str, case: Case, dtype: torch.dtype, random: Random) -> None:
    x = draw(branch, case, random, dtype)
    assert_as_exact_as_plain(branch, case, x, run(branch, TRITON, case, x, dtype))


@interpreted
@each_branch_every_way
@pytest.mark.parametrize("case, dtype", [(CASES[1], torch.float16), (CASES[2], torch.float32)], ids=str)
def test_keys_through_descriptors(
    branch: Branch, way: str, case: Case, dtype: torch.dtype, random: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in long sequences: short ones, those of all other tests here among them, come by plain pointers."""
    monkeypatch.setattr(nsa, "_PLAIN_ROWS", 0)
    case = replace(case, D=24)  # whose rows are multiples of 16 bytes
    x = draw(branch, case, random, dtype)
    assert_as_exact_as_plain(branch, case, x, run(branch, TRITON, case, x, dtype))


@interpreted
@pytest.mark.parametrize(
    "case, dtype",
    [
        *((case, torch.float16) for case in (CASES[0], MIDDLE, CASES[5])),
        *(slow(case, torch.float16) for case in (CASES[1], CASES[6], CASES[8])),
    ],
    ids=str,
)
@every_way
def test_the_whole_with_gates(way: str, case: Case, dtype: torch.dtype, random: Random) -> None:
    x = draw(whole, case, random, dtype)
    assert_as_exact_as_plain(whole, case, x, run(whole, TRITON, case, x, dtype))


@interpreted
def test_recompute(random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output of the local branch, computed again to the bit."""
    x = draw(whole, MIDDLE, random, torch.float16)
    kept = run(whole, TRITON, MIDDLE, x, torch.float16)
    monkeypatch.setattr(nsa, "nsa_attention", partial(nsa.nsa_attention, recompute=True))
    for name, value in run(whole, TRITON, MIDDLE, x, torch.float16).items():
        assert torch.equal(value, kept[name]), name


@interpreted
@pytest.mark.parametrize("pieces", ["by_mask", "by_block", "by_query"])
def test_gates_that_all_tokens_share(pieces: str, random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates are read where they are, as static ones of a module: no copy is made for each token."""
    monkeypatch.setattr(nsa, "_LARGE_GROUP", 1 if pieces == "by_query" else 16)
    case = replace(MIDDLE, D=16)
    x = draw(whole, case, random, torch.float16)
    shared = x["gates"][:1, :1].detach().expand_as(x["gates"])
    with going("by_mask" if pieces == "by_mask" else "by_index"):
        o, expected = (
            run(whole, TRITON, case, x | {"gates": gates.requires_grad_()}, torch.float16)
            for gates in (shared, shared.clone())
        )
    for name in expected:
        torch.testing.assert_close(o[name], expected[name], rtol=0, atol=0)


@interpreted
def test_gates_of_0_and_far_below_1(random: Random) -> None:
    x = draw(whole, MIDDLE, random, torch.float32)
    x["gates"] = small_gates(x["gates"])
    actual = run(whole, TRITON, MIDDLE, x, torch.float32)
    assert_as_exact_as_plain(whole, MIDDLE, x, actual)
    closed = (x["gates"] == 0)[:, MIDDLE.block_size :]  # where every branch sees something
    assert (actual["gradient of gates"][:, MIDDLE.block_size :][closed] != 0).all()


@interpreted
@pytest.mark.parametrize("tokens, dtype", [(1, torch.float16), (9, torch.float32)], ids=str)
@pytest.mark.parametrize("branch", [local, selective], ids=lambda branch: branch.__name__)
def test_a_single_key(branch: Branch, tokens: int, dtype: torch.dtype, random: Random) -> None:
    """A single key has probability 1: o is v, dv the sum of do over the group, and no gradient flows to q and k.

    The kernels find that 0 as a difference of two equal sums of D products, which need not be added in the same order.
    """
    case = Case("single_key", T=tokens, H=6, D=17, select_block_size=1, window=1)
    x = draw(branch, case, random, dtype)
    x["block_indices"] = torch.arange(tokens).int()[None, :, None, None].expand(1, tokens, case.K, 1)
    actual = run(branch, TRITON, case, x, dtype)
    plain, exact = run(branch, oracle.Dense, case, x, dtype), run(branch, oracle.Dense, case, double(x), dtype)
    assert torch.equal(actual["o"], x["v"].repeat_interleave(3, dim=2))
    of_v = [values["gradient of v"] for values in (actual, plain, exact)]
    assert_within_budget(*of_v, "gradient of v", terms=case.terms)
    do = Random(seed=1)(actual["o"].shape, dtype)
    sums = (do.abs() * actual["o"].abs()).double().sum(dim=-1).max()
    rounding = 4 * torch.finfo(torch.float32).eps * sums * case.D**-0.5
    for name, factor in (("q", "k"), ("k", "q")):
        bound = rounding * 3 * x[factor].detach().abs().max()  # 3 heads of a group add up
        assert (actual[f"gradient of {name}"].double().abs() <= bound).all(), f"gradient of {name}"


@interpreted
@every_branch
def test_against_the_loops(branch: Branch, random: Random) -> None:
    """The dense masks are the reference above; here the loops, which share nothing with them, have the word."""
    case = replace(MIDDLE, T=19, B=1)
    x = draw(branch, case, random, torch.float32)
    exact, plain = run(branch, oracle, case, x), run(branch, oracle.Dense, case, x, torch.float32)
    for name, value in run(branch, TRITON, case, x, torch.float32).items():
        assert_within_budget(value, plain[name], exact[name].double(), name, terms=case.terms)


@interpreted
@pytest.mark.parametrize("case", [MIDDLE, CASES[4]], ids=str)
def test_the_log_sum_exp_alone_has_gradients(case: Case, random: Random) -> None:
    x = case.tensors(random, torch.float32)
    results = []
    for of, tensors in ((TRITON, x), (oracle.Dense, x), (oracle.Dense, double(x))):
        _, lse = compressed(of, case, tensors)
        upstream = Random(seed=1)(lse.shape).masked_fill(torch.isinf(lse), 0.0)
        results.append(gradients(lse, [tensors["q"], tensors["k_cmp"], tensors["v_cmp"]], [upstream]))
    for name, actual, plain, exact in zip(("q", "k_cmp", "v_cmp"), *results, strict=True):
        assert_within_budget(actual, plain, exact, f"gradient of {name}", terms=case.terms)
    assert (results[0][0] != 0).any() and (results[0][2] == 0).all(), "lse depends on q and k_cmp, not on v_cmp"


@interpreted
@pytest.mark.parametrize("cut", [2, 2048])
@pytest.mark.parametrize("group, size", [(1, 16), (3, 16), (4, 512)])
def test_pairs_in_order_of_their_block(
    cut: int, group: int, size: int, random: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs of the queries from t0 on ascend within their block, and tiles are of one block each; cut again, too."""
    monkeypatch.setattr(nsa, "_CUT", cut)
    monkeypatch.setattr(nsa, "_RUN", 64)
    case, t0, n_tokens = Case("pairs", T=90, B=2, H=2, select_block_size=8, topk_blocks=5, local_blocks=0), 20, 70
    chosen = random.block_indices(case)  # (B, T, K, S)
    N = -(-case.T // case.select_block_size)
    (layout,) = nsa._layout(chosen)
    plan = nsa._index_plan(layout, t0, n_tokens, N, case.select_block_size, size, group)
    index = nsa._index_pairs(plan, chosen, None)
    first_pair = 0
    for z in range(case.B * case.K):
        of_head = chosen[z // case.K, t0 : t0 + n_tokens, z % case.K].flatten()  # by pair, t·S + s
        first_tile = 0
        for j in range(N):
            pairs = (of_head == j).nonzero()[:, 0]
            tiles = -(-len(pairs) * group // size)
            entry = [first_tile, first_tile + tiles, first_pair, first_pair + len(pairs)]
            assert index.table[4 * (z * N + j) :][:4].tolist() == entry
            assert index.pairs[first_pair : first_pair + len(pairs)].tolist() == pairs.tolist()
            assert (index.block[z, first_tile : first_tile + tiles] == j).all()
            first_tile, first_pair = entry[1], entry[3]
        assert first_tile <= index.block.shape[1] and (index.block[z, first_tile:] == N).all()
    plan = nsa._index_plan(layout, t0, n_tokens, N, case.select_block_size, 2 * size, group)
    again, anew = nsa._cut_again(plan, index.table), nsa._index_pairs(plan, chosen, None)
    assert torch.equal(again.pairs[:first_pair], anew.pairs[:first_pair]) and torch.equal(again.block, anew.block)
    assert torch.equal(again.table, anew.table[: plan.table])


def by(forward: bool | Tensor, backward: bool) -> Callable[..., bool | Tensor]:
    return lambda direction, *_: forward if direction == "forward" else backward


# Sizes and ways; how often an index is made, and how often if the backward never took that of the forward.
INDICES = {
    "both_by_index": ({"_by_mask": by(False, False)}, (1, 2)),
    "few_blocks_cut_at_a_time": (SMALL_PIECES["few_blocks_cut_at_a_time"] | {"_by_mask": by(False, False)}, (1, 2)),
    "chunks": (SMALL_PIECES["chunks_of_64_queries"] | {"_by_mask": by(False, False)}, (4, 4)),
    "forward_by_query": ({"_LARGE_GROUP": 1, "_by_mask": by(False, False)}, (1, 1)),
    "forward_by_mask": ({"_by_mask": by(True, False)}, (1, 1)),
    "forward_in_doubt_by_mask": ({"_by_mask": by(torch.tensor([True]), False)}, (2, 2)),
    "forward_in_doubt_by_index": ({"_by_mask": by(torch.tensor([False]), False)}, (2, 2)),
}


@interpreted
@pytest.mark.parametrize("settings, made", INDICES.values(), ids=INDICES)
@pytest.mark.parametrize("lengths", [(30, 0, 50, 1), slow((81,))], ids=["packed", "row"])
def test_the_backward_takes_the_index_of_the_forward(
    lengths: tuple[int, ...], settings: dict[str, Any], made: tuple[int, int], random: Random, poisoned: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Gradients are the same to the bit as by an index of its own, which it makes where the forward has none of use."""
    for name, value in settings.items():
        monkeypatch.setattr(nsa, name, value)
    packing = Packing(replace(MIDDLE, B=1, D=16, select_block_size=8, topk_blocks=3), lengths)
    x, of = packing.draw(whole, random, torch.float16), Packed(packing.cu_seqlens, "triton")
    with patch.object(nsa, "_index_pairs", wraps=nsa._index_pairs) as index_pairs:
        actual = run(whole, of, packing.case, x, torch.float16)
        taken = index_pairs.call_count
        monkeypatch.setattr(nsa, "_forward_made_index", lambda *_: False)
        for name, expected in run(whole, of, packing.case, x, torch.float16).items():
            assert torch.isfinite(expected).all() and torch.equal(actual[name], expected), name
    assert (taken, index_pairs.call_count - taken) == made


@interpreted
def test_the_way_that_does_not_work_leaves_all_as_it_is(random: Random, poisoned: None) -> None:
    """A number on the device says which one works: see `_by_mask`."""
    case = Case("both_ways", T=40, H=6, K=2, D=16, select_block_size=8, topk_blocks=3)
    x = {name: tensor.detach() for name, tensor in draw(selective, case, random, torch.float16).items()}
    tensors, chosen, terms = (x["q"], x["k"], x["v"]), x["block_indices"], nsa._RowTerms(*torch.ones(2, 1, 1, 1))
    by_mask, by_index = torch.tensor([True]), torch.tensor([False])
    for o in nsa._span_forward(*tensors, nsa._Span(0), 0.1, None, None, chosen, 8, (), by_index)[:2]:
        assert o.isnan().all()
    given = [random(t.shape, torch.float16) for t in tensors]
    sums = [t.clone() for t in given]
    of = (nsa._Span(0), 0.1, sums[0], None, None, *sums[1:], chosen, 8, by_index)
    for dx, was in zip(nsa._triton_span_backward(x["q"], terms, *tensors, *of), given, strict=True):
        assert torch.equal(dx, was)
    plan = nsa._index_plan(nsa._layout(chosen)[0], 0, case.T, 5, 8, 64, 3)
    assert (nsa._index_pairs(plan, chosen, None, None, by_mask).block == 5).all(), "there are tiles"
    assert (nsa._index_pairs(plan, chosen, None, None, by_index).block < 5).any(), "there are none"


# Sums over chunks are kept in float32: where that is the dtype of the results, they are the results.
@interpreted
@pytest.mark.parametrize(
    "branch, pieces, dtype",
    [
        *((selective, name, torch.float16) for name in SMALL_PIECES if name != "chunks_of_64_queries"),
        *((whole, name, torch.float16) for name in SMALL_PIECES if name.startswith(("chunks", "two", "every"))),
        (whole, "chunks_of_64_queries", torch.float32),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.parametrize("way", ["by_index"], indirect=True)
def test_selective_attention_in_small_pieces(
    branch: Branch, pieces: str, dtype: torch.dtype, way: str, random: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By itself, and as the last branch of the whole, which adds to the other branches' gradients."""
    for name, value in SMALL_PIECES[pieces].items():
        monkeypatch.setattr(nsa, name, value)
    heads = {"H": 6, "K": 3} if "heads" in pieces else {"K": 1}
    case = replace(MIDDLE, T=81, B=1, D=16, **heads)
    x = draw(branch, case, random, dtype)
    assert_as_exact_as_plain(branch, case, x, run(branch, TRITON, case, x, dtype))


@interpreted
@pytest.mark.parametrize("way", ["by_index"], indirect=True)
def test_many_chunks_of_64_queries(way: str, random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsa, "_PARTIAL_BYTES", (1, 1))
    case = replace(MIDDLE, T=257, B=1, H=1, K=1, D=16)
    x = draw(selective, case, random, torch.float16)
    assert_as_exact_as_plain(selective, case, x, run(selective, TRITON, case, x, torch.float16))


@interpreted
@every_dtype
def test_compressed_gradients_in_parts(dtype: torch.dtype, random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few keys with many queries: dk and dv are sums over parts of the queries, whose sums are added."""
    monkeypatch.setattr(nsa, "_splits", lambda *_: 3)
    case = replace(MIDDLE, H=8)
    x = draw(compressed, case, random, dtype)
    assert_as_exact_as_plain(compressed, case, x, run(compressed, TRITON, case, x, dtype))


@interpreted
@every_dtype
def test_masked_gradients_in_parts(dtype: torch.dtype, random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first part adds the gradients of the local branch."""
    monkeypatch.setattr(nsa, "_splits", lambda *_: 3)
    case = replace(MIDDLE, H=8)
    x = draw(whole, case, random, dtype)
    with going("by_mask"):
        assert_as_exact_as_plain(whole, case, x, run(whole, TRITON, case, x, dtype))


@interpreted
@pytest.mark.parametrize(
    "case, blind", [(MIDDLE, slice(None, None, 2)), (CASES[4], slice(None))], ids=["every_second", "all"]
)
@every_way
def test_queries_without_a_chosen_block(way: str, case: Case, blind: slice, random: Random) -> None:
    case = replace(case, T=33)
    x = draw(selective, case, random, torch.float16)
    x["block_indices"][:, blind] = -1
    actual = run(selective, TRITON, case, x, torch.float16)
    assert (actual["o"][:, blind] == 0).all() and (actual["gradient of q"][:, blind] == 0).all()
    assert_as_exact_as_plain(selective, case, x, actual)


@interpreted
@pytest.mark.parametrize("case", [MIDDLE, CASES[4]], ids=str)
@every_way
def test_slots_in_any_order_and_blocks_that_have_not_begun(way: str, case: Case, random: Random) -> None:
    x = draw(selective, case, random, torch.float32)
    own = (torch.arange(case.T) // case.select_block_size).int()[None, :, None, None]
    last = (case.T - 1) // case.select_block_size
    ahead = (own + 1).clamp(max=last).expand(case.B, case.T, case.K, 1)
    x["block_indices"] = torch.cat([x["block_indices"], ahead], dim=-1).flip(-1)
    at_the_end = own[0, :, 0, 0] == last  # here, the block ahead is the own one: each block is chosen at most once
    x["block_indices"][:, at_the_end, :, 0] = -1
    assert_as_exact_as_plain(selective, case, x, run(selective, TRITON, case, x, torch.float32))


@interpreted
@every_way
def test_indices_of_any_value(way: str, random: Random) -> None:
    """Indices that name no block before the query are free slots."""
    x = draw(selective, MIDDLE, random, torch.float32)
    blocks = -(-MIDDLE.T // MIDDLE.select_block_size)
    wild = torch.tensor([blocks, blocks + 32, 2**30, 2**31 - 1, -2, -(2**31)], dtype=torch.int32)
    wild = wild.expand(*x["block_indices"].shape[:3], -1)
    expected = run(selective, TRITON, MIDDLE, x, torch.float32)
    x["block_indices"] = torch.cat([wild[..., :3], x["block_indices"], wild[..., 3:]], dim=-1)
    for name, value in run(selective, TRITON, MIDDLE, x, torch.float32).items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_short_sequences_go_by_mask() -> None:
    """Small batches up to greater lengths; the backward, whose index is cheaper, up to smaller ones."""

    def ways(B: int, T: int, dtype: torch.dtype = torch.bfloat16) -> list[bool]:
        q = torch.empty(B, T, 8, 64, dtype=dtype, device="meta")
        return [nsa._by_mask(direction, q, 8, 4, 32) for direction in ("forward", "backward")]

    assert ways(1, 2048) == [True, True] and ways(1, 4096) == [True, False] and ways(1, 8192) == [False, False]
    assert ways(8, 1024) == [True, True] and ways(8, 4096) == [False, False]
    assert ways(1, 2048, torch.float32) == [False, False]


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout: str, random: Random) -> None:
    case = replace(MIDDLE, T=33, B=1, D=16)
    x = draw(whole, case, random, torch.float16)
    strided = {name: LAYOUTS[layout](tensor.detach()) for name, tensor in x.items()}
    assert not strided["q"].is_contiguous()
    for name in BRANCHES[whole]:
        strided[name].requires_grad_()
    assert_as_exact_as_plain(whole, case, x, run(whole, TRITON, case, strided, torch.float16))


@interpreted
def test_an_expanded_upstream_gradient(random: Random) -> None:
    """`o.sum().backward()` hands the kernels a gradient of stride 0."""
    case = replace(MIDDLE, T=33, B=1)
    x = draw(whole, case, random, torch.float32)
    o = whole(TRITON, case, x)[0]
    leaves = [x[name] for name in BRANCHES[whole]]
    expanded = torch.autograd.grad(o.sum(), leaves, retain_graph=True)
    for one, other in zip(expanded, gradients(o, leaves, [torch.ones_like(o)]), strict=True):
        assert torch.equal(one, other)


@interpreted
@each_branch_every_way
@pytest.mark.parametrize("case", [MIDDLE, CASES[0]], ids=str)
def test_no_uninitialised_memory_is_read(branch: Branch, way: str, case: Case, random: Random) -> None:
    """Memory is full of NaN, or of the largest integer, before anything is written to it."""
    case = replace(case, B=1)
    x = draw(branch, case, random, torch.float16)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan() and torch.zeros(1).new_empty(1).isnan()
        actual = run(branch, TRITON, case, x, torch.float16)
    finally:
        torch.use_deterministic_algorithms(was)
    assert_as_exact_as_plain(branch, case, x, actual)


@interpreted
@every_branch
def test_scores_too_large_for_exp(branch: Branch, random: Random) -> None:
    """Scores up to some thousand. Dense masks would round them to float16, so the budget is that of PyTorch's path."""
    case = replace(MIDDLE, B=1)
    x = case.tensors(random, torch.float16)
    for name in ("q", "k", "k_cmp"):
        x[name] = (20 * x[name].detach()).requires_grad_()
    x["block_indices"] = choice(TRITON, case, x)
    assert_as_exact_as_plain(branch, case, x, run(branch, TRITON, case, x, torch.float16), plain_of=PLAIN)


@interpreted
def test_a_window_that_sees_everything(random: Random) -> None:
    case = replace(MIDDLE, T=33, window=2**31 - 1)
    x = draw(local, case, random, torch.float32)
    assert_as_exact_as_plain(local, case, x, run(local, TRITON, case, x, torch.float32))


@interpreted
@pytest.mark.parametrize("branch", [local, selective], ids=lambda branch: branch.__name__)
def test_scale_is_the_callers(branch: Branch, random: Random) -> None:
    case = replace(MIDDLE, T=33)
    x = draw(branch, case, random, torch.float16)
    name, last = ("local_attention", (case.window,)) if branch is local else (
        "selective_attention", (x["block_indices"], case.select_block_size))  # fmt: skip
    outputs = [
        getattr(of, name)(tensors["q"], tensors["k"], tensors["v"], *last, scale=0.75)
        for of, tensors in ((TRITON, x), (oracle.Dense, x), (oracle.Dense, double(x)))
    ]
    assert_within_budget(*outputs, "o", terms=case.terms)


# ---------------------------------------------------------------------------------------------------------------------
# Choice of blocks
# ---------------------------------------------------------------------------------------------------------------------


def assert_chooses_well(case: Case, x: dict[str, Tensor]) -> None:
    """The rules, and scores within twice the error of each: half types are multiplied exactly and summed in float32."""
    sizes = case.compression | {"select_block_size": case.select_block_size}
    exact = oracle.Dense.importance(x["q"].double(), x["k_cmp"].double(), **sizes)
    plain = oracle.Dense.importance(x["q"].float(), x["k_cmp"].float(), **sizes)
    assert_valid_choice(choice(TRITON, case, x), exact, case, choice_tolerance(plain, exact, case.terms))


@interpreted
@every_case
def test_choice_by_importance(case: Case, dtype: torch.dtype, random: Random) -> None:
    assert_chooses_well(case, case.tensors(random, dtype))


@interpreted
def test_choice_in_chunks_of_queries(random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsa, "_SCORE_BYTES", 1)
    case = replace(MIDDLE, T=530, B=1, H=1, K=1, D=16)  # chunks are of 128 queries at least
    assert_chooses_well(case, case.tensors(random, torch.float32))


@interpreted
@every_dtype
@pytest.mark.parametrize("spread", [1e-3, 1e-6], ids=lambda spread: f"keys_differ_by_{spread}")
def test_choice_among_near_ties(dtype: torch.dtype, spread: float, random: Random) -> None:
    x = MIDDLE.tensors(random)
    x["k_cmp"] = x["k_cmp"][:, :1] + spread * x["k_cmp"]
    assert_chooses_well(MIDDLE, {name: tensor.detach().to(dtype) for name, tensor in x.items()})


@interpreted
@pytest.mark.parametrize(
    "dtype, group, winners",
    [
        (torch.float32, 1, "none"),
        (torch.float16, 1, "every_fifth"),
        (torch.float32, 3, "every_fifth"),
        (torch.float16, 3, "none"),
    ],
    ids=str,
)
def test_exact_ties_go_to_the_lower_block(dtype: torch.dtype, group: int, winners: str, random: Random) -> None:
    """Queries and keys at right angles: every score is exactly 0 in any order of summation. A few blocks stand out."""
    case = Case("ties", T=61, H=2 * group, topk_blocks=7, init_blocks=1, local_blocks=2)
    x = {name: tensor.detach() for name, tensor in case.tensors(random, dtype).items()}
    x["q"][..., 2:] = 0
    x["k_cmp"][..., :2] = 0
    if winners == "every_fifth":
        x["k_cmp"][:, ::5, :, :2] = random(x["k_cmp"][:, ::5, :, :2].shape, dtype)
    assert torch.equal(choice(TRITON, case, x), oracle.select_blocks(x["q"], x["k_cmp"], **case.choice))


# ---------------------------------------------------------------------------------------------------------------------
# Queries that begin behind a past
# ---------------------------------------------------------------------------------------------------------------------


def behind_a_past(case: Case, x: dict[str, Tensor], first: list[int], new: int) -> dict[str, Tensor]:
    """Results of the branches, and of the choice, for the queries at first[b] ... of buffers with room to spare.

    Behind the last query of each row the buffers hold stale numbers.
    """
    on, choice, scale, start = nsa._BACKENDS["triton"], cases.sizes(case), case.D**-0.5, torch.tensor(first).int()
    count = lambda tokens: oracle.compressed_count(tokens, case.block_size, case.stride)  # noqa: E731
    ends, size, rows = [n + new for n in first], case.T + 9, torch.tensor(first)[:, None] + torch.arange(new)
    k, v = (cases.buffer(x[name], ends, size) for name in ("k", "v"))
    k_cmp, v_cmp = (cases.buffer(x[name], [count(n) for n in ends], count(size)) for name in ("k_cmp", "v_cmp"))
    q, gates, block_indices = (cases.at(x[name], rows) for name in ("q", "gates", "block_indices"))
    o_local, _ = on.span_forward(q, k, v, nsa._Span(case.window), scale, first=start)
    o_compressed, lse = on.span_forward(q, k_cmp, v_cmp, choice.span, scale, first=start)
    gated = (gates, o_local, o_compressed)
    sizes = (block_indices, case.select_block_size, scale)
    o_selective, _, o = on.selected_forward(q, k, v, *sizes, gated=gated, first=start)
    chosen = on.select(q, k_cmp, lse, choice, scale, first=start)
    outputs = {"local": o_local, "compressed": o_compressed, "lse": lse, "selective": o_selective, "whole": o}
    return outputs | {"chosen": chosen}


@interpreted
@pytest.mark.parametrize("case, dtype", [*IN_BOTH, (replace(CASES[1], T=200), torch.float32)], ids=str)
def test_queries_behind_a_past(case: Case, dtype: torch.dtype, random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a forward over the whole."""
    case, new = replace(case, B=3), case.T - case.T // 2
    first = [case.T // 2, 0, case.T // 3]
    monkeypatch.setattr(nsa, "_NARROW", 1)  # so that tiles of every width are needed
    x = {name: tensor.detach() for name, tensor in draw(selective, case, random, dtype).items()}
    rows = torch.tensor(first)[:, None] + torch.arange(new)
    actual, results = behind_a_past(case, x, first, new), []
    for y in (x, double(x)):
        o, lse = compressed(oracle.Dense, case, y)
        exact = {"compressed": o, "lse": lse}
        exact |= {branch.__name__: branch(oracle.Dense, case, y)[0] for branch in (local, selective, whole)}
        results.append({name: cases.at(value.detach(), rows) for name, value in exact.items()})
    for name, exact in results[1].items():
        assert_within_budget(actual[name], results[0][name], exact, name, terms=case.terms)
    clear = ~cases.at(cases.near_ties(case, x), rows)
    chosen = cases.at(oracle.Dense.select_blocks(x["q"].double(), x["k_cmp"].double(), **case.choice), rows)
    assert clear.double().mean() > 0.9 and torch.equal(actual["chosen"][clear], chosen[clear])


@interpreted
@pytest.mark.parametrize("first", [[-(2**31), 2**31 - 1], [90, 200]], ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_a_past_longer_than_the_keys(case: Case, first: list[int], random: Random) -> None:
    """Nothing is read or written outside, and tokens that have their place in the keys are not disturbed."""
    case = replace(case, B=2)
    x = {name: tensor.detach() for name, tensor in draw(selective, case, random, torch.float16).items()}
    start, choice, scale = torch.tensor(first).int(), cases.sizes(case), case.D**-0.5
    q, on = x["q"][:, :20], nsa._BACKENDS["triton"]
    on.span_forward(q, x["k"], x["v"], nsa._Span(case.window), scale, first=start)
    _, lse = on.span_forward(q, x["k_cmp"], x["v_cmp"], choice.span, scale, first=start)
    chosen = on.select(q, x["k_cmp"], lse, choice, scale, first=start)
    assert (chosen >= -1).all() and (chosen <= case.T // case.select_block_size).all()
    on.selected_forward(q, x["k"], x["v"], chosen, case.select_block_size, scale, first=start)
    on.selected_forward(q, x["k"], x["v"], chosen + 10**6, case.select_block_size, scale, first=start)


# ---------------------------------------------------------------------------------------------------------------------
# What there is no kernel for
# ---------------------------------------------------------------------------------------------------------------------

REFUSED = {
    "head_dim": ({"D": 300}, torch.float32, 1.0, "300"),
    "float64": ({}, torch.float64, 1.0, "float64"),
    "bfloat16": ({}, torch.bfloat16, 1.0, "bfloat16"),
    "negative_scale": ({}, torch.float32, -0.5, "-0.5"),
    "zero_scale": ({}, torch.float32, 0.0, "0.0"),
}


@interpreted
@pytest.mark.parametrize("reason", REFUSED)
def test_what_has_no_kernel_is_refused(reason: str, random: Random) -> None:
    sizes, dtype, scale, said = REFUSED[reason]
    case = replace(MIDDLE, T=20, **sizes)
    x = draw(selective, replace(case, D=16), random, torch.float32) | case.tensors(random, dtype)
    of = {"scale": scale, "backend": "triton"}
    calls: tuple[Callable[[], Any], ...] = (
        lambda: nsa.local_attention(x["q"], x["k"], x["v"], 5, **of),
        lambda: nsa.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], **case.compression, **of),
        lambda: nsa.select_blocks(x["q"], x["k_cmp"], torch.randn(case.B, 20, case.H), **case.choice, **of),
        lambda: nsa.selective_attention(x["q"], x["k"], x["v"], x["block_indices"], case.select_block_size, **of),
        lambda: nsa.nsa_attention(*(x[name] for name in BRANCHES[whole]), **case.whole, **of),
    )
    for call in calls:
        with pytest.raises(ValueError, match=rf"backend = 'triton'.*{re.escape(said)}"):
            call()
        of["backend"] = "auto"
        call()  # the PyTorch path serves
        of["backend"] = "triton"


# ---------------------------------------------------------------------------------------------------------------------
# Compiled for Hopper, without one
# ---------------------------------------------------------------------------------------------------------------------

# G, D, what is launched, and the lengths of its sequences: the settings whose tile sizes are tuned. Groups of 4 and 16
# differ in the selective branch. Decoding knows nothing of packing, and it is head dim 128 that leaves the fewest
# registers for it.
BRANCHES_AND_CHOICE = ("local", "compressed", "selective", "select")
BY_POINTER = ("local", "compressed", "masked")
EVERYTHING = (*BRANCHES_AND_CHOICE, "masked", "whole", "decode", "compress")
BUILDS = {
    "16_heads_a_group_of_128": (16, 128, EVERYTHING, [1024]),
    "4_heads_a_group_of_128": (4, 128, ("selective", "whole"), [1024]),
    "1_head_a_group_of_64": (1, 64, EVERYTHING, [1024]),
    "1_head_a_group_of_64_unlike": (1, 64, ("select",), [8000, *range(20)]),
    "16_heads_a_group_of_128_packed": (16, 128, (*BRANCHES_AND_CHOICE, "masked", "whole"), [600, 0, 1, 423]),
    "4_heads_a_group_of_128_packed": (4, 128, ("selective",), [600, 0, 1, 423]),
    "many_compressed_rows_of_128": (1, 128, ("compress",), [20_000]),
    "many_compressed_rows_of_64": (1, 64, ("compress",), [20_000]),
    "many_compressed_rows_of_64_packed": (1, 64, ("compress",), [12_000, 0, 1, 7999]),
    "1_head_a_group_of_64_by_pointer": (1, 64, BY_POINTER, [1024]),
    "4_heads_a_group_of_64_packed_by_pointer": (4, 64, BY_POINTER, [600, 0, 1, 423]),
    "16_heads_a_group_of_128_later": (16, 128, BRANCHES_AND_CHOICE, [1024]),  # queries that begin at a position
    "4_heads_a_group_of_128_packed_later": (4, 128, BRANCHES_AND_CHOICE, [600, 0, 1, 423]),
}
# Kernels of matrix products, and what one multiplies with where it is not Hopper's wgmma: the query is the outer loop
# only in groups of 16 heads, which fill the 16 rows of mma.sync, not the 64 of wgmma.
LOCAL, COMPRESSED, MASKED = (
    [f"{branch}_{part}" for part in ("forward", "dq", "dkv")] for branch in ("local", "compressed", "masked")
)
BY_BLOCK, BY_QUERY = ["selected_by_block", "selected_gradient"], ["selected_gradient"]


def with_products(name: str) -> list[str]:
    """Kernels of a build that multiply matrices."""
    G, _, launched, lengths = BUILDS[name]
    kernels = []
    if "selective" in launched:
        kernels += BY_QUERY if G >= 16 else BY_BLOCK
    if "local" in launched or "whole" in launched:
        kernels += LOCAL
    if "masked" in launched:
        kernels += MASKED
    if "compressed" in launched or "whole" in launched:
        kernels += COMPRESSED
    if "select" in launched or "whole" in launched:
        kernels.append("block_scores")
    if "compress" in launched:
        kernels += ["compress_output", "compress_dw"]
        if sum(lengths) > 16 * 2048 // 2:  # else few rows, which do not fill wgmma
            kernels += ["compress", "compress_dx"]
    return kernels


# A decoding step is bound by memory, and its group of heads fills no more than the 16 rows of mma.sync.
STEP = ("project", "append", "decode_scan", "decode_attend")
# Exceptions to "no spills", all at head dim 128: (registers stored to memory, as found with Triton 3.9; the limit).
# Each of these tile sizes was the fastest of its sweep on an H200, spills included.
SPILLS = {
    "compressed_forward": (54, 64),
    "compressed_dkv": (25, 32),
    "masked_dkv": (16, 56),  # 43 with Triton 3.8
    "selected_by_query": (28, 40),
    "selected_gradient": (31, 40),
    "sum_tiles": (1, 4),
    "block_scores": (9, 16),
    "append": (64, 80),  # no registers: what the cosine of an angle of many turns would need, which ours are not
}
# Packed sequences cost registers: where the segment begins, and 0 in place of what is a neighbour's. Older versions of
# Triton spill up to 20 in masked_dq.
PACKED_SPILLS = SPILLS | {"local_dq": (5, 16), "local_dkv": (16, 32), "masked_dkv": (33, 72),
                           "masked_dq": (0, 24), "selected_gradient": (42, 56)}  # fmt: skip
NARROW_SPILLS = {"merge_slots": (0, 4), "choose": (0, 4)}  # at head dim 64: 2 with Triton 3.8 and with 3.9
POINTER_SPILLS = NARROW_SPILLS | {"masked_dkv": (3, 8)}  # as found with Triton 3.6


def read_twice(ttgir: str) -> list[str]:
    """Tiles that an asynchronous product reads in shared memory, and from which registers are loaded, too.

    Triton (3.6) has been seen to give these too few buffers: the next copy overwrote what the product still read.
    """
    tiles: dict[str, str] = {}  # what a name stands for: another loop may use it again
    operands, loaded = set(), set()
    for number, line in enumerate(ttgir.splitlines()):
        name, _, operation = line.strip().partition(" = ")
        used = [tiles.get(each, each) for each in re.findall(r"%\w+", operation)]
        if operation.startswith("ttng.warp_group_dot %") and "isAsync = true" in operation:
            operands.update(used[:2])
        if operation.startswith("ttg.local_load"):
            loaded.add(used[0])
        tiles[name] = used[0] if operation.startswith("ttg.memdesc_trans") else f"{name} of line {number}"
    return sorted(operands & loaded)


def build(names: list[str], folder: str) -> None:
    """Compile every launch for sm_90 where it would have run, and print what came out as JSON."""
    result: dict[str, dict[str, Any]] = {}

    def take(label: str, options: dict[str, Any], kernel: Any) -> None:
        machine = disassemble(kernel.asm["cubin"], Path(folder) / "kernel.cubin")
        wgmma, twice = kernel.asm["ptx"].count("wgmma.mma_async"), read_twice(kernel.asm["ttgir"])
        result[name][label] = {"wgmma": wgmma, "machine": machine, "read twice": twice}

    compile_only(("cuda", 90, 32), take)
    for name in names:
        result[name] = {}
        nsa._PLAIN_ROWS = math.inf if name.endswith("by_pointer") else 0
        launch(*BUILDS[name], first=512 if name.endswith("later") else 0)
    print(json.dumps(result))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@cache
def built(folder: Path) -> dict[str, dict[str, Any]]:
    """Every kernel of every build."""
    script = f"import test_kernels; test_kernels.build({list(BUILDS)!r}, {str(folder)!r})"
    return json.loads(without_interpreter(script, TRITON_CACHE_DIR=str(folder / "cache")))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDS)
def test_kernels_compile_for_hopper(name: str, folder: Path) -> None:
    kernels = built(folder)[name]
    everything = {"choose", "preprocess", "compress", "compress_output", "compress_dhidden", "compress_dx"}
    everything |= set(STEP)
    launched = BUILDS[name][2]
    rest = everything if launched == EVERYTHING else {"sum_slots"} if "selective" in launched else set()
    assert set(with_products(name)) | rest <= set(kernels), f"only these were built: {list(kernels)}"
    for kernel in with_products(name):
        assert kernels[kernel]["wgmma"] > 0, f"{kernel} does without Hopper's matrix unit"
    for kernel, found in kernels.items():
        assert not found["read twice"], f"{kernel}: {found['read twice']} may be overwritten while a product reads them"


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDS)
def test_machine_code_for_hopper(name: str, folder: Path) -> None:
    kernels = {kernel: found["machine"] for kernel, found in built(folder)[name].items()}
    if None in kernels.values():
        pytest.skip("needs cuobjdump, which some packages of Triton leave out")
    spills = PACKED_SPILLS if len(BUILDS[name][3]) > 1 else SPILLS
    if BUILDS[name][1] < 128:
        spills = POINTER_SPILLS if name.endswith("by_pointer") else NARROW_SPILLS
    for kernel, machine in kernels.items():
        _, limit = spills.get(kernel, (0, 0))
        assert machine["STL"] <= limit, f"{kernel} stores {machine['STL']} spilled registers; the limit is {limit}"
        assert (machine["HGMMA"] > 0) == (kernel in with_products(name)), f"{kernel}: {machine}"
    # An operand that stays in registers for a whole loop has been seen to be overwritten there, by ptxas 13.0.
    for kernel in kernels.keys() & {*LOCAL, *COMPRESSED, *MASKED}:
        assert kernels[kernel]["loads"] == 0, f"{kernel} keeps an operand of its products in registers"
