"""The branches inside torch's machinery: gradcheck, torch.func, checkpointing, autocast, and what stays in memory."""

from __future__ import annotations

import gc
import weakref

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
    finite,
    gradients,
    run,
    whole,
)
from conftest import assert_close64, assert_within_budget
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import native_sparse_attention as nsa

SMALL = (
    Case("blocks_alike", T=9, H=2, K=1, D=3, block_size=2, stride=2, select_block_size=2, topk_blocks=2, window=3),
    Case("blocks_overlap", T=11, H=2, K=2, D=2, block_size=4, stride=2, select_block_size=4, topk_blocks=2, window=4),
)
MIDDLE = Case("middle", T=97, B=2, H=4, D=16, block_size=16, stride=8, select_block_size=16, topk_blocks=3, window=20)


def loss(branch: Branch, case: Case, x: dict[str, Tensor]) -> Tensor:
    """A scalar in which every output has a say of its own."""
    return sum((output.double().sin() ** 2).sum() for output in finite(branch(PLAIN, case, x)))


@every_branch
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(branch: Branch, case: Case, random: Random) -> None:
    x = draw(branch, case, random)
    names = BRANCHES[branch]

    def outputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        return finite(branch(PLAIN, case, x | dict(zip(names, tensors, strict=True))))

    assert torch.autograd.gradcheck(outputs, [x[name] for name in names], fast_mode=False)


@pytest.mark.parametrize("case", AWKWARD, ids=str)
def test_the_log_sum_exp_alone_is_differentiable(case: Case, random: Random) -> None:
    x = case.tensors(random)
    leaves = [x["q"], x["k_cmp"], x["v_cmp"]]
    _, lse = compressed(PLAIN, case, x)
    upstream = random(lse.shape).masked_fill(torch.isinf(lse), 0.0)
    _, exact = compressed(oracle, case, x)
    for name, actual, expected in zip(
        ("q", "k_cmp", "v_cmp"), gradients(lse, leaves, [upstream]), gradients(exact, leaves, [upstream]), strict=True
    ):
        assert_close64(actual, expected, f"gradient of {name}")


@every_branch
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_one_input_needs_a_gradient(branch: Branch, wanted: int, random: Random) -> None:
    x = draw(branch, MIDDLE, random)
    name = BRANCHES[branch][wanted]
    (expected,) = torch.autograd.grad(loss(branch, MIDDLE, x), x[name])
    x = {other: tensor.detach() for other, tensor in x.items()}
    x[name].requires_grad_()
    (actual,) = torch.autograd.grad(loss(branch, MIDDLE, x), x[name])
    assert_close64(actual, expected)


@every_branch
def test_no_graph_without_gradients(branch: Branch, random: Random) -> None:
    x = draw(branch, MIDDLE, random)
    expected = branch(PLAIN, MIDDLE, x)
    assert all(output.requires_grad for output in expected)
    with torch.no_grad():
        outputs = branch(PLAIN, MIDDLE, x)
    with torch.inference_mode():
        inferred = branch(PLAIN, MIDDLE, x)
    for output, other, value in zip(outputs, inferred, expected, strict=True):
        assert not output.requires_grad
        assert_close64(output, value)
        assert_close64(other, value)


@every_branch
def test_func_grad(branch: Branch, random: Random) -> None:
    x = draw(branch, MIDDLE, random)
    names = BRANCHES[branch]
    expected = torch.autograd.grad(loss(branch, MIDDLE, x), [x[name] for name in names])

    def of(leaves: dict[str, Tensor]) -> Tensor:
        return loss(branch, MIDDLE, x | leaves)

    actual = torch.func.grad(of)({name: x[name].detach() for name in names})
    for name, value in zip(names, expected, strict=True):
        assert_close64(actual[name], value, f"gradient of {name}")


@every_branch
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(branch: Branch, use_reentrant: bool, random: Random) -> None:
    x = draw(branch, MIDDLE, random)
    names = BRANCHES[branch]
    leaves = [x[name] for name in names]
    expected = torch.autograd.grad(loss(branch, MIDDLE, x), leaves)

    def of(*tensors: Tensor) -> Tensor:
        return loss(branch, MIDDLE, x | dict(zip(names, tensors, strict=True)))

    checkpoint(of, *leaves, use_reentrant=use_reentrant).backward()
    for name, leaf, value in zip(names, leaves, expected, strict=True):
        assert_close64(leaf.grad, value, f"gradient of {name}")


@every_branch
def test_backward_twice_needs_a_retained_graph(branch: Branch, random: Random) -> None:
    x = draw(branch, MIDDLE, random)
    total, query = loss(branch, MIDDLE, x), x["q"]
    first = torch.autograd.grad(total, query, retain_graph=True)
    assert_close64(torch.autograd.grad(total, query)[0], first[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(total, query)


@every_branch
def test_no_graph_outlives_its_step(branch: Branch, random: Random) -> None:
    """With the cycle collector off, everything that forward and backward made is gone once the caller lets go."""
    saved: list[weakref.ref[Tensor]] = []

    def watch(tensor: Tensor) -> Tensor:
        saved.append(weakref.ref(tensor))
        return tensor

    gc.collect()
    gc.disable()
    try:
        x = draw(branch, MIDDLE, random)
        with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
            outputs = branch(PLAIN, MIDDLE, x)
        made = [*x.values(), *outputs, *gradients(outputs, [x[n] for n in BRANCHES[branch]], finite(outputs))]
        made = [weakref.ref(tensor) for tensor in made]
        assert saved, "nothing was saved for the backward"
        del x, outputs
        assert [ref() for ref in made + saved if ref() is not None] == []
    finally:
        gc.enable()


@pytest.mark.parametrize("retained", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_outputs_of_the_branches_are_freed_early(
    retained: bool, recompute: bool, random: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the backward takes memory for gradients, unless the graph is used again."""
    x = draw(whole, MIDDLE, random)
    read, alive, terms, backward = [], [], nsa._gated_terms, nsa._attention_backward

    def watch(do: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
        read[:] = [weakref.ref(output.untyped_storage()) for output in arguments[:3]]
        return terms(do, *arguments)

    def look(*arguments: object) -> tuple[Tensor, ...]:
        alive.append([storage() is not None for storage in read])
        return backward(*arguments)

    monkeypatch.setattr(nsa, "_gated_terms", watch)
    monkeypatch.setattr(nsa, "_attention_backward", look)
    leaves = [x[name] for name in BRANCHES[whole]]
    tensors = (x[name] for name in ("q", "k", "v", "k_cmp", "v_cmp", "gates"))
    o = nsa.nsa_attention(*tensors, **MIDDLE.whole, recompute=recompute)
    first = torch.autograd.grad(o.sum(), leaves, retain_graph=retained)
    assert alive == [[retained and not recompute, retained, retained]]
    if retained:
        for gradient, again in zip(first, torch.autograd.grad(o.sum(), leaves), strict=True):
            assert torch.equal(gradient, again)
        assert alive[1:] == [[False] * 3]


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def test_training_steps_leave_nothing_behind(random: Random) -> None:
    inputs = {branch: draw(branch, MIDDLE, random) for branch in BRANCHES}
    counts = []
    for _ in range(4):
        for branch, x in inputs.items():
            loss(branch, MIDDLE, x).backward()
        counts.append(live_tensors())
    assert len(set(counts[1:])) == 1, f"live tensors after each step: {counts}"


@every_branch
def test_autocast(branch: Branch, random: Random) -> None:
    """float32 inputs under bfloat16 autocast: bfloat16 outputs, float32 gradients, within bfloat16's budget."""
    x = draw(branch, MIDDLE, random, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        if branch is whole:
            x["block_indices"] = choice(PLAIN, MIDDLE, x)
        actual = run(branch, PLAIN, MIDDLE, x, torch.bfloat16)
    rounded = {name: t.detach().bfloat16() if t.is_floating_point() else t for name, t in x.items()}
    rounded = {name: t.requires_grad_() if t.is_floating_point() else t for name, t in rounded.items()}
    plain = run(branch, oracle.Dense, MIDDLE, rounded, torch.bfloat16)
    exact = run(branch, oracle.Dense, MIDDLE, double(rounded), torch.bfloat16)
    for name, value in exact.items():
        assert actual[name].dtype == (torch.bfloat16 if name == "o" else torch.float32), f"{name}: {actual[name].dtype}"
        assert_within_budget(actual[name], plain[name], value, name, terms=MIDDLE.terms)
