"""Queries that begin at a position of their own, over the keys of a whole sequence: forward and backward."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import oracle
import pytest
import torch
from cases import (
    AWKWARD,
    CASES,
    PLAIN,
    TRITON,
    Branch,
    Case,
    Random,
    double,
    draw,
    each_branch_every_way,
    every_branch,
    interpreted,
    run,
    slow,
    whole,
)
from conftest import assert_close64, assert_within_budget
from torch import Tensor

import native_sparse_attention as nsa

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # −inf − −inf


class Pieces:
    """The library's functions, a piece of the queries at a time; pieces end before these tokens."""

    def __init__(self, backend: str, *cuts: int, recompute: bool = False) -> None:
        self.backend, self.cuts, self.recompute = backend, cuts, recompute

    def _branch(self, span: nsa._Span, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor | None) -> tuple[Tensor, ...]:
        def piece(a: int, b: int) -> tuple[Tensor, Tensor]:
            settings, slots = (self.backend, *span, q.shape[-1] ** -0.5, a), None if chosen is None else chosen[:, a:b]
            return nsa._BranchFunction.apply(settings, None, None, None, q[:, a:b], k, v, slots)

        return tuple(torch.cat(each, 1) for each in zip(*(piece(*ends) for ends in pairwise(self.cuts)), strict=True))

    def local_attention(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return self._branch(nsa._Span(window), q, k, v, None)[0]

    def compressed_attention(self, q: Tensor, k: Tensor, v: Tensor, block_size: int, stride: int) -> tuple[Tensor, ...]:
        return self._branch(nsa._Span(0, block_size, stride), q, k, v, None)

    def selective_attention(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, size: int) -> Tensor:
        return self._branch(nsa._Span.block(size), q, k, v, chosen)[0]

    def nsa_attention(self, *x: Tensor, local_window: int, block_indices: Tensor, **sizes: int) -> Tensor:
        q, k, v, k_cmp, v_cmp, gates = x
        settings = {"local_window": local_window, "choice": nsa._Choice(**sizes), "segments": nsa._Segments()}
        settings |= {"scale": q.shape[-1] ** -0.5, "backend": self.backend, "recompute": self.recompute}
        pieces = (
            nsa._attention(q[:, a:b], k, v, k_cmp, v_cmp, gates[:, a:b], None, None, **settings, first=a)
            for a, b in pairwise(self.cuts)
        )
        return torch.cat(list(pieces), dim=1)


def thirds(T: int) -> tuple[int, ...]:
    return tuple(sorted({0, T // 3, T * 2 // 3, T}))


@every_branch
@pytest.mark.parametrize("case", AWKWARD, ids=str)
@pytest.mark.usefixtures("host_reads")
def test_pieces_are_the_whole(branch: Branch, case: Case, random: Random) -> None:
    """Outputs and all gradients of the PyTorch backend; the keys' gradients are sums over the pieces."""
    x = draw(branch, case, random)
    expected = run(branch, PLAIN, case, x)
    for name, actual in run(branch, Pieces("torch", *thirds(case.T)), case, x).items():
        assert_close64(actual, expected[name], name)


@interpreted
@pytest.mark.usefixtures("poisoned")
@each_branch_every_way
@pytest.mark.parametrize("case", [CASES[2], CASES[4], *map(slow, (CASES[1], *CASES[3:4], *CASES[5:]))], ids=str)
def test_pieces_are_the_whole_for_kernels(branch: Branch, way: str, case: Case, random: Random) -> None:
    x = draw(branch, case, random, torch.float16)
    of = oracle.Dense
    plain, exact = run(branch, of, case, x, torch.float16), run(branch, of, case, double(x), torch.float16)
    for name, actual in run(branch, Pieces("triton", *thirds(case.T)), case, x, torch.float16).items():
        assert_within_budget(actual, plain[name], exact[name], name, terms=case.terms)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("way", ["by_mask", "by_index"], indirect=True)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recompute"])
def test_pieces_of_the_whole_attention_for_kernels(way: str, recompute: bool, random: Random) -> None:
    case = CASES[2]
    x = draw(whole, case, random, torch.float32, TRITON)
    plain, exact = run(whole, oracle.Dense, case, x), run(whole, oracle.Dense, case, double(x))
    pieces: Any = Pieces("triton", 0, 21, case.T, recompute=recompute)
    for name, actual in run(whole, pieces, case, x).items():
        assert_within_budget(actual, plain[name], exact[name], name, terms=case.terms)
