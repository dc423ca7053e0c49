"""The error budget that the other tests rely on: errors planted in plain PyTorch's attention do not pass it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from cases import Branch, Case, Random, compressed, double, draw, local, run, selective
from conftest import assert_within_budget, choice_tolerance
from torch import Tensor

# The sizes at which the budget is used: of the kernels, packed or not, and of the PyTorch path.
SMALL = Case("small", T=41, D=17, block_size=8, stride=4, select_block_size=16, topk_blocks=3, init_blocks=1, window=20)
SIZES = (
    SMALL,
    replace(SMALL, name="group_16", T=59, H=16, K=1, D=32),
    Case("middle", T=203, B=2, H=4, D=32, block_size=16, stride=8, select_block_size=32, topk_blocks=3, window=40),
)
every_size = pytest.mark.parametrize("case", SIZES, ids=str)
each_branch = pytest.mark.parametrize("branch", [local, compressed, selective], ids=lambda branch: branch.__name__)

attend = oracle.masked_probabilities  # of q (B,T,H,D), k (B,n,K,D), mask and scale: (B,T,H,n) and log-sum-exp


def scale_off_by_a_thousandth(q: Tensor, k: Tensor, mask: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    return attend(q, k, mask, 1.001 * q.shape[-1] ** -0.5)


def one_key_too_many(q: Tensor, k: Tensor, mask: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """The first of those that a query does not see, if it sees any."""
    first = (~mask).int().argmax(dim=-1, keepdim=True)
    return attend(q, k, mask.scatter(-1, first, True) & mask.any(dim=-1, keepdim=True), scale)


def no_delta(q: Tensor, k: Tensor, mask: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """In dscores = p · (dp − delta): as if the normalizer of the softmax were a constant."""
    probabilities, lse = attend(q, k, mask, scale)
    normalizer = lse.masked_fill(lse.isinf(), 0.0).unsqueeze(-1)
    return probabilities * torch.exp(normalizer - normalizer.detach()), lse


def no_term_of_one_key(q: Tensor, k: Tensor, mask: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """In dq = Σ dscores · k: dp of the first key is taken for 0."""
    probabilities, lse = attend(q, k, mask, scale)
    probabilities.register_hook(lambda dp: torch.cat([0 * dp[..., :1], dp[..., 1:]], dim=-1))
    return probabilities, lse


# Where each fault must show, and the dtypes whose rounding does not drown it.
EVERY_DTYPE = (torch.float32, torch.float16, torch.bfloat16)
FAULTS: dict[Callable[..., Any], tuple[tuple[str, ...], tuple[torch.dtype, ...]]] = {
    scale_off_by_a_thousandth: (("o", "gradient of q", "gradient of k"), (torch.float32,)),
    one_key_too_many: (("o", "gradient of q", "gradient of k", "gradient of v"), EVERY_DTYPE),
    no_delta: (("gradient of q", "gradient of k"), EVERY_DTYPE),
    no_term_of_one_key: (("gradient of q", "gradient of k"), EVERY_DTYPE),
}
FAULTS_AND_DTYPES = [(fault, dtype) for fault, (_, dtypes) in FAULTS.items() for dtype in dtypes]


@pytest.mark.parametrize("fault, dtype", FAULTS_AND_DTYPES, ids=lambda value: getattr(value, "__name__", str(value)))
@each_branch
@every_size
def test_a_planted_fault_is_caught(
    branch: Branch, case: Case, fault: Callable[..., Any], dtype: torch.dtype, random: Random,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    x = draw(branch, case, random, dtype)
    plain, exact = (run(branch, oracle.Dense, case, y, dtype) for y in (x, double(x)))
    for name in exact:
        assert_within_budget(plain[name], plain[name], exact[name], name, terms=case.terms)
    monkeypatch.setattr(oracle, "masked_probabilities", fault)
    actual = run(branch, oracle.Dense, case, x, dtype)
    for name in FAULTS[fault][0]:
        name = name + "_cmp" * (branch is compressed and name[-1] in "kv")
        with pytest.raises(AssertionError, match=f"{name}: .* exceeds its budget"):
            assert_within_budget(actual[name], plain[name], exact[name], name, terms=case.terms)


@pytest.mark.parametrize("values", [1, 4, 10000])
@pytest.mark.parametrize("dtype", EVERY_DTYPE, ids=str)
def test_rounding_alone_passes(values: int, dtype: torch.dtype, random: Random) -> None:
    """Also where plain PyTorch happens to be exact."""
    exact = random((values,), dtype).double()
    actual = exact * (1 + torch.finfo(dtype).eps * random.integers(-1, 2, (values,)))
    assert_within_budget(actual.to(dtype), exact.to(dtype), exact, terms=1)


def test_one_wrong_value_of_many_is_caught(random: Random) -> None:
    """Which the root mean square hardly feels."""
    exact = random((10000,), torch.float32).double()
    actual = exact.clone()
    actual[7] += 1e-3
    with pytest.raises(AssertionError, match="largest error"):
        assert_within_budget(actual, exact.float(), exact, terms=1000)


def test_many_small_errors_are_caught(random: Random) -> None:
    """Each of them within what one value may be off."""
    exact = random((10000,), torch.float32).double()
    actual = exact + 20 * torch.finfo(torch.float32).eps
    with pytest.raises(AssertionError, match="rms error"):
        assert_within_budget(actual, exact.float(), exact, terms=1000)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_caught(wrong: float, random: Random) -> None:
    exact = random((100,))
    actual = exact.clone()
    actual[3] = wrong
    with pytest.raises(AssertionError):
        assert_within_budget(actual, exact.float(), exact, terms=1000)


def test_a_block_that_weighs_a_thousandth_less_is_no_tie(random: Random) -> None:
    exact = oracle.Dense.importance(random((1, 203, 4, 32)), random((1, 24, 2, 32)), 16, 8, 32)
    tolerance = choice_tolerance(exact.float(), exact, terms=406)
    assert 0 < tolerance < 1e-3 * exact.max()
