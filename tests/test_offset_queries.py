"""Queries that begin at a position of their own, over the keys of a whole sequence: forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import oracle
import pytest
import torch
from cases import (
    AWKWARD,
    CASES,
    GROUP_1,
    GROUP_3,
    GROUP_4,
    GROUP_16,
    LONG_BLOCKS,
    NO_BLOCK,
    OVERLAPPING,
    PLAIN,
    SPILL,
    TRITON,
    Branch,
    Case,
    Packed,
    Packing,
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
from torch import Tensor, nn

import native_sparse_attention as nsa

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # −inf − −inf


class Pieces:
    """The library's functions, a piece of the queries at a time, over the keys of all tokens up to its end."""

    def __init__(
        self, backend: str, *cuts: int, cu_seqlens: Tensor | None = None, recompute: bool = False
    ) -> None:  # fmt: skip
        self.backend, self.cuts, self.cu_seqlens, self.recompute = backend, cuts, cu_seqlens, recompute

    def pieces(self, keys: Tensor, span: nsa._Span) -> Iterator[tuple[int, int, nsa._Segments]]:
        """Ends of each piece, and its tables; `keys` are those of the span."""
        for a, b in pairwise(self.cuts):
            tables = nsa._Segments(self.cu_seqlens)
            yield a, b, tables.last(self.backend, a, b, keys.shape[1], span)

    def _branch(
        self, span: nsa._Span, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor | None = None
    ) -> tuple[Tensor, ...]:  # fmt: skip
        outputs = []
        for a, b, segments in self.pieces(k, span):
            settings, slots = (self.backend, *span, q.shape[-1] ** -0.5, a), None if chosen is None else chosen[:, a:b]
            keys = (k[:, :b], v[:, :b]) if span.window or chosen is not None else (k, v)
            outputs.append(nsa._BranchFunction.apply(settings, *segments.tables(), None, q[:, a:b], *keys, slots))
        return tuple(torch.cat(each, 1) for each in zip(*outputs, strict=True))

    def local_attention(self, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        return self._branch(nsa._Span(window), q, k, v)[0]

    def compressed_attention(self, q: Tensor, k: Tensor, v: Tensor, block_size: int, stride: int) -> tuple[Tensor, ...]:
        return self._branch(nsa._Span(0, block_size, stride), q, k, v)

    def selective_attention(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, size: int) -> Tensor:
        return self._branch(nsa._Span.block(size), q, k, v, chosen)[0]

    def nsa_attention(self, *x: Tensor, local_window: int, block_indices: Tensor, **sizes: int) -> Tensor:
        q, k, v, k_cmp, v_cmp, gates = x
        choice, outputs = nsa._Choice(**sizes), []
        settings = {"local_window": local_window, "choice": choice, "scale": q.shape[-1] ** -0.5}
        settings |= {"backend": self.backend, "recompute": self.recompute}
        for a, b, segments in self.pieces(k_cmp, choice.span):
            tensors = (q[:, a:b], k[:, :b], v[:, :b], k_cmp, v_cmp, gates[:, a:b], None, None)
            outputs.append(nsa._attention(*tensors, **settings, segments=segments, first=a))
        return torch.cat(outputs, dim=1)


class Uneven(Pieces):
    """Two pieces, of which the second begins elsewhere in each row and goes on behind the last token."""

    def nsa_attention(self, *x: Tensor, local_window: int, block_indices: Tensor, **sizes: int) -> Tensor:
        (B, T), choice = x[0].shape[:2], nsa._Choice(**sizes)
        first, row = (T // 3 + torch.arange(B, dtype=torch.int32) * 5) % T, torch.arange(B)[:, None]
        cut, tail = int(first.max()), T - int(first.min())
        blocks = nsa._compressed_count(cut + tail, *choice[:2])
        settings = {"local_window": local_window, "choice": choice, "scale": x[0].shape[-1] ** -0.5}
        settings |= {"backend": self.backend, "recompute": self.recompute, "segments": nsa._Segments()}
        outputs = []
        for queries, keys, at in (
            (torch.arange(cut).expand(B, -1), (T, x[3].shape[1]), {}),
            (first[:, None] + torch.arange(tail), (cut + tail, blocks), {"first": cut, "row_first": first}),
        ):
            q, gates = (y[row, queries.clamp(max=T - 1)] for y in (x[0], x[5]))
            each = zip(x[1:5], (keys[0], keys[0], keys[1], keys[1]), strict=True)
            k, v, k_cmp, v_cmp = (nn.functional.pad(y, (0, 0, 0, 0, 0, n - y.shape[1])) for y, n in each)
            outputs.append(nsa._attention(q, k, v, k_cmp, v_cmp, gates, None, None, **settings, **at))
        t = torch.arange(T)
        return torch.cat(outputs, 1)[row, torch.where(t < first[:, None], t, cut + t - first[:, None])]


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
    pieces = Pieces("triton", 0, 21, case.T, recompute=recompute)
    for name, actual in run(whole, pieces, case, x).items():
        assert_within_budget(actual, plain[name], exact[name], name, terms=case.terms)


@pytest.mark.parametrize("case", AWKWARD, ids=str)
@pytest.mark.usefixtures("host_reads")
def test_rows_begin_elsewhere(case: Case, random: Random) -> None:
    x = draw(whole, case := replace(case, B=3), random)
    expected = run(whole, PLAIN, case, x)
    for name, actual in run(whole, Uneven("torch"), case, x).items():
        assert_close64(actual, expected[name], name)


@interpreted
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("way", ["by_mask", "by_index"], indirect=True)
@pytest.mark.parametrize("case", [CASES[2], *map(slow, (CASES[1], *CASES[3:]))], ids=str)
def test_rows_begin_elsewhere_for_kernels(way: str, case: Case, random: Random) -> None:
    x = draw(whole, case := replace(case, B=2), random, torch.float32, TRITON)
    plain, exact = run(whole, oracle.Dense, case, x), run(whole, oracle.Dense, case, double(x))
    for name, actual in run(whole, Uneven("triton"), case, x).items():
        assert_within_budget(actual, plain[name], exact[name], name, terms=case.terms)


# ---------------------------------------------------------------------------------------------------------------------
# Packed sequences, which straddle the pieces in every way
# ---------------------------------------------------------------------------------------------------------------------


@every_branch
@pytest.mark.parametrize(
    "packing",
    [*(Packing(OVERLAPPING, lengths) for lengths in ((13, 29, 8), (0, 7, 1, 0, 0, 21, 5, 0), (37,))), NO_BLOCK, SPILL],
    ids=str,
)
@pytest.mark.usefixtures("host_reads")
def test_pieces_of_packed_sequences(branch: Branch, packing: Packing, random: Random) -> None:
    x, total, cu_seqlens = packing.draw(branch, random), sum(packing.lengths), packing.cu_seqlens
    expected = run(branch, Packed(cu_seqlens), packing.case, x)
    for cuts in (thirds(total), (0, min(packing.lengths[:1]) or 1, total)):
        pieces = Pieces("torch", *cuts, cu_seqlens=cu_seqlens)
        for name, actual in run(branch, pieces, packing.case, x).items():
            assert_close64(actual, expected[name], f"{name}, {cuts}")


@interpreted
@pytest.mark.usefixtures("poisoned")
@each_branch_every_way
@pytest.mark.parametrize(
    "packing", [GROUP_1, GROUP_16, *map(slow, (GROUP_3, GROUP_4, LONG_BLOCKS, NO_BLOCK, SPILL))], ids=str
)
def test_pieces_of_packed_sequences_for_kernels(branch: Branch, way: str, packing: Packing, random: Random) -> None:
    x, of = packing.draw(branch, random, torch.float16), Packed(packing.cu_seqlens)
    plain, exact = (run(branch, of, packing.case, y, torch.float16) for y in (x, double(x)))
    total = sum(packing.lengths)
    pieces = Pieces("triton", 0, total // 4, total // 2 + 1, total, cu_seqlens=packing.cu_seqlens)
    for name, actual in run(branch, pieces, packing.case, x, torch.float16).items():
        assert_within_budget(actual, plain[name], exact[name], name, terms=total * packing.case.H // packing.case.K)


@interpreted
@pytest.mark.usefixtures("poisoned")
def test_pieces_of_the_whole_attention_of_packed_sequences_for_kernels(random: Random) -> None:
    packing = GROUP_3
    x, of = packing.draw(whole, random, torch.float32), Packed(packing.cu_seqlens)
    plain, exact = run(whole, of, packing.case, x), run(whole, of, packing.case, double(x))
    pieces, total = Pieces("triton", 0, 25, 37, 61, cu_seqlens=packing.cu_seqlens), 61
    for name, actual in run(whole, pieces, packing.case, x).items():
        assert_within_budget(actual, plain[name], exact[name], name, terms=total * 3)
