"""Every branch in plain PyTorch against the oracle: values, log-sum-exp, choice of blocks, and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from cases import (
    AWKWARD,
    BRANCHES,
    PLAIN,
    Branch,
    Case,
    Random,
    choice,
    compressed,
    double,
    draw,
    every_branch,
    gradients,
    local,
    run,
    selective,
    small_gates,
    whole,
)
from conftest import assert_close64, assert_valid_choice, assert_within_budget, choice_tolerance
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import native_sparse_attention as nsa

# Many tiles of every kind.
LONG = (
    Case("long_one_head_each", T=1100, D=16, block_size=16, stride=16, select_block_size=16, topk_blocks=5, window=130),
    Case("long_group_3", T=515, B=2, H=6, D=9, block_size=8, stride=4, select_block_size=16, topk_blocks=7, window=33),
    Case("long_paper", T=769, H=8, K=2, D=8, block_size=32, stride=16, select_block_size=64, topk_blocks=6,
         init_blocks=1, local_blocks=2, window=300),
    Case("long_tiny_blocks", T=333, H=3, K=1, block_size=2, stride=1, select_block_size=1, topk_blocks=40, window=1),
)  # fmt: skip
MIDDLE = Case("middle", T=203, B=2, H=4, D=32, block_size=16, stride=8, select_block_size=32, topk_blocks=3, window=40)


@every_branch
@pytest.mark.parametrize("case", AWKWARD, ids=str)
def test_awkward_sizes_against_the_loops(branch: Branch, case: Case, random: Random) -> None:
    x = draw(branch, case, random)
    actual = run(branch, PLAIN, case, x)
    exact = run(branch, oracle, case, x)
    for name, value in exact.items():
        assert_close64(actual[name], value, name)


@every_branch
@pytest.mark.parametrize("case", LONG, ids=str)
def test_many_tiles_against_dense_masks(branch: Branch, case: Case, random: Random) -> None:
    x = draw(branch, case, random)
    actual = run(branch, PLAIN, case, x)
    exact = run(branch, oracle.Dense, case, x)
    for name, value in exact.items():
        assert_close64(actual[name], value, name)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of few heads and few pairs, and a chunk of few rows: each loop takes some ten turns."""
    monkeypatch.setattr(nsa, "_TILE_SCORES", 2**10)
    monkeypatch.setattr(nsa, "_PARTIAL_VALUES", 2**14)
    monkeypatch.setattr(nsa, "_PAIR_TILE", 8)


CHUNKED = Case("chunked", T=171, B=2, H=6, K=3, D=16, block_size=8, stride=4, select_block_size=16, topk_blocks=4,
               window=33)  # fmt: skip


@every_branch
def test_many_chunks_against_dense_masks(branch: Branch, small_chunks: None, random: Random) -> None:
    x = draw(branch, CHUNKED, random)
    exact = run(branch, oracle.Dense, CHUNKED, x)
    for name, value in run(branch, PLAIN, CHUNKED, x).items():
        assert_close64(value, exact[name], name)


@pytest.mark.parametrize("case", [MIDDLE, replace(MIDDLE, name="small_blocks", select_block_size=8)], ids=str)
def test_gates_of_0_and_far_below_1(case: Case, random: Random) -> None:
    """A gate of 0 stops its branch's gradients, and has one of its own."""
    x = draw(whole, case, random)
    x["gates"] = small_gates(x["gates"])
    actual, exact = run(whole, PLAIN, case, x), run(whole, oracle.Dense, case, x)
    for name, value in exact.items():
        assert_close64(actual[name], value, name)
    closed = (x["gates"] == 0)[:, case.block_size :]  # where every branch sees something
    assert (actual["gradient of gates"][:, case.block_size :][closed] != 0).all()


@every_branch
@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_of_half_a_million(branch: Branch, sign: int, random: Random) -> None:
    """Hidden scores stay below them. All scores share a term of 2^19, which float64 adds and takes back exactly."""
    case = replace(AWKWARD[6], D=4)
    x = {name: tensor.detach() for name, tensor in draw(branch, case, random).items()}
    x["q"][..., 0] = 1024.0
    for name in ("k", "k_cmp"):
        x[name][..., 0] = 1024.0 * sign
    x = {name: tensor.requires_grad_(tensor.is_floating_point()) for name, tensor in x.items()}
    x["block_indices"] = choice(PLAIN, case, x)
    sizes = case.compression | {"select_block_size": case.select_block_size}
    importance = oracle.importance(x["q"], x["k_cmp"], **sizes)
    assert_valid_choice(x["block_indices"], importance, case, tolerance=1e-6)
    exact = run(branch, oracle, case, x)
    for name, value in run(branch, PLAIN, case, x).items():
        largest = exact[name][exact[name].isfinite()].abs().max().item()
        torch.testing.assert_close(value, exact[name], rtol=0.0, atol=1e-6 * largest, msg=name)


@every_branch
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [MIDDLE, replace(MIDDLE, name="short", T=61)], ids=str)
def test_error_budget(branch: Branch, case: Case, dtype: torch.dtype, random: Random) -> None:
    x = draw(branch, case, random, dtype)
    actual = run(branch, PLAIN, case, x, dtype)
    plain = run(branch, oracle.Dense, case, x, dtype)
    exact = run(branch, oracle.Dense, case, double(x), dtype)
    for name in exact:
        assert actual[name].dtype == (torch.float32 if name == "lse" else dtype), f"{name}: {actual[name].dtype}"
        assert_within_budget(actual[name], plain[name], exact[name], name, terms=case.terms)


# ---------------------------------------------------------------------------------------------------------------------
# Choice of blocks
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", AWKWARD + LONG, ids=str)
def test_choice_against_exact_importance(case: Case, random: Random) -> None:
    x = case.tensors(random)
    chosen = choice(PLAIN, case, x)
    sizes = case.compression | {"select_block_size": case.select_block_size}
    importance = (oracle if case in AWKWARD else oracle.Dense).importance(x["q"], x["k_cmp"], **sizes)
    assert_valid_choice(chosen, importance, case, tolerance=1e-10)
    assert not chosen.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-6], ids=lambda spread: f"keys_differ_by_{spread}")
def test_choice_among_near_ties(dtype: torch.dtype, spread: float, random: Random) -> None:
    """Keys that differ by little leave the choice to rounding: its scores may be off by twice their error, no more."""
    x = MIDDLE.tensors(random)
    x["k_cmp"] = x["k_cmp"][:, :1] + spread * x["k_cmp"]
    x = {name: tensor.detach().to(dtype) for name, tensor in x.items()}
    sizes = MIDDLE.compression | {"select_block_size": MIDDLE.select_block_size}
    exact = oracle.Dense.importance(x["q"].double(), x["k_cmp"].double(), **sizes)
    plain = oracle.Dense.importance(x["q"], x["k_cmp"], **sizes)
    assert_valid_choice(choice(PLAIN, MIDDLE, x), exact, MIDDLE, choice_tolerance(plain, exact, MIDDLE.terms))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("winners", ["none", "every_fifth"])
def test_exact_ties_go_to_the_lower_block(dtype: torch.dtype, group: int, winners: str, random: Random) -> None:
    """Queries and keys at right angles: every score is exactly 0 in any order of summation. A few blocks stand out."""
    case = Case("ties", T=90, H=2 * group, block_size=4, stride=4, topk_blocks=7, init_blocks=1, local_blocks=2)
    x = {name: tensor.detach() for name, tensor in case.tensors(random, dtype).items()}
    x["q"][..., 2:] = 0
    x["k_cmp"][..., :2] = 0
    if winners == "every_fifth":
        x["k_cmp"][:, ::5, :, :2] = random(x["k_cmp"][:, ::5, :, :2].shape, dtype)
    assert torch.equal(choice(PLAIN, case, x), oracle.select_blocks(x["q"], x["k_cmp"], **case.choice))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("distinct", [1, 3])
def test_equal_keys_tie_but_for_rounding(dtype: torch.dtype, distinct: int, random: Random) -> None:
    """Blocks take turns with a few keys: whatever is chosen among equals, nothing better is missed."""
    case = Case("equal_keys", T=150, H=6, D=16, block_size=4, stride=4, topk_blocks=7, init_blocks=1, local_blocks=2)
    x = {name: tensor.detach() for name, tensor in case.tensors(random, dtype).items()}
    x["k_cmp"] = x["k_cmp"][:, torch.arange(case.C) % distinct]
    importance = oracle.Dense.importance(x["q"].double(), x["k_cmp"].double(), 4, 4, 4)
    precision = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert_valid_choice(choice(PLAIN, case, x), importance, case, tolerance=64 * precision)


def test_without_a_visible_block_the_lowest_candidates_are_chosen(random: Random) -> None:
    case = Case("blind", T=31, block_size=32, stride=4, topk_blocks=4)
    nothing = torch.zeros(8)  # the importance of each of the N blocks
    expected = [oracle.choose_blocks(nothing, t, case.T, 4, 4, init_blocks=0, local_blocks=1) for t in range(case.T)]
    chosen = choice(PLAIN, case, case.tensors(random))
    for kv_head in range(case.K):
        assert chosen[0, :, kv_head].tolist() == expected


# ---------------------------------------------------------------------------------------------------------------------
# Rows that see nothing
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [20, 150, 40], ids=["no_block_at_all", "some_blocks", "one_block"])
def test_compressed_attention_without_a_visible_block(dtype: torch.dtype, tokens: int, random: Random) -> None:
    case = Case("blind", T=tokens, H=4, D=5, block_size=32, stride=16, select_block_size=32)
    x = case.tensors(random, dtype)
    o, lse = compressed(PLAIN, case, x)
    blind = slice(0, case.block_size - 1)
    assert (o[:, blind] == 0).all(), "the output of a row that sees nothing is exactly 0"
    assert torch.equal(torch.isneginf(lse), (torch.arange(tokens) < 31)[None, :, None].expand_as(lse))
    upstream = [random(o.shape, dtype), random(lse.shape, lse.dtype)]  # not 0 in the rows that see nothing
    dq, dk, dv = gradients((o, lse), [x["q"], x["k_cmp"], x["v_cmp"]], upstream)
    assert (dq[:, blind] == 0).all(), "no gradient reaches a query that sees nothing"
    assert all(torch.isfinite(g).all() for g in (dq, dk, dv)), "gradients are finite"
    assert not dq.numel() or tokens < 32 or (dq[:, 31:] != 0).any(), "the other queries have gradients"


@pytest.mark.parametrize("rows", ["all", "every_second"])
def test_selective_attention_without_a_chosen_block(rows: str, random: Random) -> None:
    case = Case("blind", T=70, H=4, D=5, select_block_size=8, block_size=8, topk_blocks=3)
    x = draw(selective, case, random)
    blind = slice(None) if rows == "all" else slice(None, None, 2)
    x["block_indices"][:, blind] = -1
    (o,) = selective(PLAIN, case, x)
    dq, dk, dv = gradients(o, [x["q"], x["k"], x["v"]], [random(o.shape)])
    assert (o[:, blind] == 0).all()
    assert (dq[:, blind] == 0).all()
    assert all(torch.isfinite(g).all() for g in (dq, dk, dv))
    assert_close64(o, selective(oracle.Dense, case, x)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Selective attention on unusual choices
# ---------------------------------------------------------------------------------------------------------------------

UNUSUAL: dict[str, Callable[[Tensor, int], Tensor]] = {
    "slots_in_reverse": lambda chosen, own: chosen.flip(-1),
    "first_block_only": lambda chosen, own: torch.full_like(chosen, -1).index_fill(-1, torch.tensor([0]), 0),
    "own_block_only": lambda chosen, own: torch.full_like(chosen, -1).index_copy(-1, torch.tensor([0]), own),
    "blocks_that_have_not_begun": lambda chosen, own: torch.cat([chosen[..., :-1], (own + 1).clamp(max=24)], dim=-1),
}


@pytest.mark.parametrize("blocks", UNUSUAL)
def test_unusual_choices(blocks: str, random: Random) -> None:
    """Slots in another order, every query on one block, each on its own, and blocks of which no token is visible."""
    case = Case("unusual", T=197, H=4, block_size=8, stride=8, select_block_size=8, topk_blocks=3)
    x = draw(selective, case, random)
    own = (torch.arange(case.T) // 8).int()[None, :, None, None].expand(1, case.T, case.K, 1)
    x["block_indices"] = UNUSUAL[blocks](x["block_indices"], own).contiguous()
    actual = run(selective, PLAIN, case, x)
    exact = run(selective, oracle.Dense, case, x)
    for name, value in exact.items():
        assert_close64(actual[name], value, name)


@pytest.mark.parametrize("block", [25, 26, 1000])
def test_a_block_beyond_the_sequence_is_refused_or_ignored(block: int, random: Random) -> None:
    """There are 25 blocks. Whatever happens, nobody attends to a block of another head or batch entry instead."""
    case = Case("beyond", T=197, B=2, H=4, block_size=8, stride=8, select_block_size=8, topk_blocks=3)
    x = draw(selective, case, random)
    x["block_indices"][..., -1] = block
    try:
        (o,) = selective(PLAIN, case, x)
    except ValueError as refused:
        assert "block_indices" in str(refused)
    else:
        assert_close64(o, selective(oracle.Dense, case, x)[0])


# ---------------------------------------------------------------------------------------------------------------------
# Causality
# ---------------------------------------------------------------------------------------------------------------------


def future(case: Case, t: int) -> dict[str, slice]:
    """Rows of each tensor that a query at t must not depend on."""
    seen_blocks = len(oracle.visible_blocks(t, case.T, case.block_size, case.stride))
    tokens, blocks = slice(t + 1, None), slice(seen_blocks, None)
    return {"q": tokens, "k": tokens, "v": tokens, "gates": tokens, "k_cmp": blocks, "v_cmp": blocks}


@every_branch
@pytest.mark.parametrize("t", [0, 14, 15, 16, 64, 119, 201])
def test_the_future_changes_nothing(branch: Branch, t: int, random: Random) -> None:
    x = draw(branch, MIDDLE, random)
    changed = {name: tensor.detach().clone() for name, tensor in x.items()}
    for name, rows in future(MIDDLE, t).items():
        changed[name][:, rows] = 3 * random(changed[name][:, rows].shape)
    before, after = branch(PLAIN, MIDDLE, x), branch(PLAIN, MIDDLE, changed)
    assert torch.equal(choice(PLAIN, MIDDLE, x)[:, : t + 1], choice(PLAIN, MIDDLE, changed)[:, : t + 1])
    for one, other in zip(before, after, strict=True):
        assert_close64(other[:, : t + 1], one[:, : t + 1])
        assert not torch.equal(other[:, t + 1 :], one[:, t + 1 :]), "the future itself does change"


@every_branch
@pytest.mark.parametrize("t", [0, 14, 15, 16, 64, 119, 201])
def test_no_gradient_flows_to_the_future(branch: Branch, t: int, random: Random) -> None:
    x = draw(branch, MIDDLE, random)
    outputs = branch(PLAIN, MIDDLE, x)
    upstream = [random(output.shape).masked_fill(torch.isinf(output), 0.0) for output in outputs]
    for g in upstream:
        g[:, t + 1 :] = 0
    names = BRANCHES[branch]
    for name, g in zip(names, gradients(outputs, [x[name] for name in names], upstream), strict=True):
        rows = future(MIDDLE, t)[name]
        past = g[:, : rows.start]
        assert (g[:, rows] == 0).all(), f"{name}: gradient flows to the future"
        # Of a single key the probability is 1, whatever the scores: their gradient is 0, or some rounding of it.
        one_key = t <= 16 and name in ("q", "k", "k_cmp")
        none = past.numel() == 0 or (t < 15 and branch is compressed)
        assert (past != 0).any() or none or one_key, f"{name}: no gradient"


def test_nothing_beyond_the_window_is_seen(random: Random) -> None:
    case = replace(MIDDLE, T=150)
    x = case.tensors(random)
    (o,) = local(PLAIN, case, x)
    for t in (39, 40, 100, 149):
        (dk,) = torch.autograd.grad(o[:, t].sum(), x["k"], retain_graph=True)
        seen = (dk != 0).flatten(2).any(dim=-1)[0].nonzero().flatten().tolist()
        assert seen == list(range(max(0, t - 39), t + 1)), f"the query at {t} sees {seen}"


# ---------------------------------------------------------------------------------------------------------------------
# Empty inputs, memory layout, extreme numbers
# ---------------------------------------------------------------------------------------------------------------------


@every_branch
@pytest.mark.parametrize("empty", [{"T": 0}, {"B": 0}, {"B": 0, "T": 0}], ids=str)
def test_empty_inputs_give_empty_outputs(branch: Branch, empty: dict[str, int], random: Random) -> None:
    case = replace(AWKWARD[6], **empty)
    x = case.tensors(random)
    x["block_indices"] = choice(PLAIN, case, x)
    assert x["block_indices"].shape == (case.B, case.T, case.K, case.topk_blocks)
    assert x["block_indices"].dtype == torch.int32
    outputs = branch(PLAIN, case, x)
    assert outputs[0].shape == (case.B, case.T, case.H, case.D)
    assert all(lse.shape == (case.B, case.T, case.H) for lse in outputs[1:])
    leaves = [x[name] for name in BRANCHES[branch]]
    for leaf, g in zip(leaves, gradients(outputs, leaves, [torch.ones_like(o) for o in outputs]), strict=True):
        assert g.shape == leaf.shape


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last_dimension_strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "slice_of_a_packed_tensor": lambda x: torch.cat([x, x + 1], dim=2)[:, :, : x.shape[2]],
    "every_second_token": lambda x: x.repeat_interleave(2, dim=1)[:, 1::2],
}


@every_branch
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(branch: Branch, layout: str, random: Random) -> None:
    case = AWKWARD[9]
    x = draw(branch, case, random)
    strided = {name: LAYOUTS[layout](tensor.detach()) for name, tensor in x.items()}
    assert not strided["q"].is_contiguous()
    for name in BRANCHES[branch]:
        strided[name].requires_grad_()
    actual = run(branch, PLAIN, case, strided)
    for name, value in run(branch, PLAIN, case, x).items():
        assert_close64(actual[name], value, name)


@every_branch
def test_an_expanded_upstream_gradient(branch: Branch, random: Random) -> None:
    """`o.sum().backward()` hands every branch a gradient of stride 0."""
    x = draw(branch, MIDDLE, random)
    o = branch(PLAIN, MIDDLE, x)[0]
    leaves = [x[name] for name in BRANCHES[branch]]
    expanded = torch.autograd.grad(o.sum(), leaves, retain_graph=True)
    for one, other in zip(expanded, gradients(o, leaves, [torch.ones_like(o)][:1]), strict=True):
        assert_close64(one, other)


@every_branch
def test_inputs_are_left_alone(branch: Branch, random: Random) -> None:
    x = draw(branch, MIDDLE, random)
    before = {name: tensor.detach().clone() for name, tensor in x.items()}
    outputs = branch(PLAIN, MIDDLE, x)
    upstream = [random(output.shape) for output in outputs]
    upstream_before = [g.clone() for g in upstream]
    gradients(outputs, [x[name] for name in BRANCHES[branch]], upstream)
    assert all(torch.equal(x[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(g, other) for g, other in zip(upstream, upstream_before, strict=True))


@every_branch
def test_scores_too_large_for_exp(branch: Branch, random: Random) -> None:
    """Scores up to some ten thousand, of both signs: the softmax must take its maximum out."""
    x = draw(branch, MIDDLE, random)
    for name in ("q", "k", "k_cmp"):
        x[name] = (100 * x[name].detach()).requires_grad_()
    x["block_indices"] = choice(PLAIN, MIDDLE, x)
    actual = run(branch, PLAIN, MIDDLE, x)
    for name, value in run(branch, oracle.Dense, MIDDLE, x).items():
        scale = value[torch.isfinite(value)].abs().max()
        assert_close64(actual[name] / scale, value / scale, name)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` returns NaN, or the largest integer."""
    assert torch.utils.deterministic.fill_uninitialized_memory, "torch's default"
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@every_branch
@pytest.mark.parametrize("case", [MIDDLE, *AWKWARD[:4]], ids=str)
def test_no_uninitialised_memory_is_read(branch: Branch, case: Case, random: Random, poisoned_memory: None) -> None:
    assert torch.empty(1).isnan()
    x = draw(branch, case, random)
    actual = run(branch, PLAIN, case, x)
    for name, value in run(branch, oracle.Dense, case, x).items():
        assert_close64(actual[name], value, name)


class Largest(TorchDispatchMode):
    """Numbers in the largest piece of memory that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@every_branch
def test_nothing_is_as_large_as_tokens_by_tokens(branch: Branch, random: Random) -> None:
    case = Case("long", T=4096, H=1, K=1, D=4, block_size=32, stride=16, select_block_size=64, topk_blocks=4, window=64)
    x = draw(branch, case, random, torch.float32)
    with Largest() as largest:
        run(branch, PLAIN, case, x, torch.float32)
        choice(PLAIN, case, x)
    assert case.T * case.D <= largest.numel <= case.T**2 // 16, f"{largest.numel} numbers in one tensor"
