"""What is tested, and on what: the awkward sizes, seeded random inputs, and how a case calls each function.

Every call works alike on the library, `PLAIN`, and on its references, `oracle` and `oracle.Dense`.
"""

from __future__ import annotations

import math
import os
import random as python_random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, repeat
from pathlib import Path
from typing import Any
from unittest.mock import patch

import oracle
import pytest
import torch
from torch import Tensor, nn

import native_sparse_attention as nsa
from native_sparse_attention import NativeSparseAttention, NSABlock, NSACache, NSAConfig, TokenCompressor

# ---------------------------------------------------------------------------------------------------------------------
# Sizes and inputs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One setting of every size in DESIGN.md, and the random inputs that fit it."""

    name: str
    T: int
    B: int = 1
    H: int = 2
    K: int = 2
    D: int = 4
    block_size: int = 4
    stride: int = 4
    select_block_size: int = 4
    topk_blocks: int = 2
    init_blocks: int = 0
    local_blocks: int = 1
    window: int = 5

    def __str__(self) -> str:
        return self.name

    @property
    def C(self) -> int:
        return (self.T - self.block_size) // self.stride + 1 if self.T >= self.block_size else 0

    @property
    def terms(self) -> int:
        """Length of the longest sum: a score's over D, or a key's gradient over the queries of a group of heads."""
        return max(self.T * self.H // self.K, self.D)

    @property
    def compression(self) -> dict[str, int]:
        """The arguments of `compressed_attention` after its tensors."""
        return {"block_size": self.block_size, "stride": self.stride}

    @property
    def whole(self) -> dict[str, int]:
        """The arguments of `nsa_attention` after its tensors."""
        return {**self.choice, "local_window": self.window}

    @property
    def choice(self) -> dict[str, int]:
        """The arguments of `select_blocks` after its tensors."""
        names = ("select_block_size", "topk_blocks", "init_blocks", "local_blocks")
        return {**self.compression, **{name: getattr(self, name) for name in names}}

    def tensors(self, random: Random, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """q, k, v, k_cmp, v_cmp and gates, as leaves that require gradients."""
        tokens, blocks = (self.B, self.T, self.K, self.D), (self.B, self.C, self.K, self.D)
        shapes = {"q": (self.B, self.T, self.H, self.D), "k": tokens, "v": tokens, "k_cmp": blocks, "v_cmp": blocks}
        tensors = {name: random(shape, dtype) for name, shape in shapes.items()}
        tensors["gates"] = random((self.B, self.T, self.H, 3), dtype).sigmoid()
        return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


AWKWARD = (
    Case("one_token", T=1),
    Case("one_token_one_block", T=1, block_size=1, stride=1, select_block_size=1, window=1),
    Case("shorter_than_a_block", T=5, block_size=8, stride=8, select_block_size=8),
    Case("exactly_a_block", T=8, block_size=8, stride=4, select_block_size=8),
    Case("one_short_of_two_blocks", T=15, block_size=8, stride=8, select_block_size=8, window=1),
    Case("nothing_divides", T=29, B=2, D=7, window=6),
    Case("overlapping_blocks", T=27, block_size=8, stride=4, select_block_size=8, topk_blocks=3, init_blocks=1),
    Case("group_of_3", T=26, H=6, D=5, block_size=6, stride=2, select_block_size=4, topk_blocks=3, local_blocks=2),
    Case("group_of_4", T=33, H=4, K=1, D=3, block_size=4, stride=2, select_block_size=8, topk_blocks=2, window=9),
    Case(
        "paper_ratios", T=37, B=2, H=4, D=6, stride=2, select_block_size=8, topk_blocks=4, init_blocks=1, local_blocks=2
    ),
    Case("small_selection_blocks", T=23, H=3, K=1, block_size=8, stride=2, select_block_size=2, topk_blocks=5),
    Case("fewer_blocks_than_slots", T=14, topk_blocks=9, init_blocks=2, local_blocks=2, window=100),
    Case("one_dimension", T=11, D=1, block_size=3, stride=3, select_block_size=6, topk_blocks=1),
    Case("only_forced_blocks", T=22, topk_blocks=3, init_blocks=1, local_blocks=2),
)


class Random:
    """Normal numbers from a generator of its own: `random(shape, dtype)`."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        """Whole numbers from low up to, not including, high."""
        return torch.randint(low, high, shape, generator=self.generator)

    def block_indices(self, case: Case) -> Tensor:
        """Random sets of S selection blocks that have begun by their query: ascending, free slots −1 and last."""
        own = torch.arange(case.T) // case.select_block_size
        blocks = -(-case.T // case.select_block_size)
        slots = max(blocks, case.topk_blocks)
        draw = torch.rand(case.B, case.T, case.K, slots, generator=self.generator)
        draw = draw.masked_fill(torch.arange(slots) > own[:, None, None], torch.inf)  # not begun: drawn last
        picks = draw.argsort(dim=-1)[..., : case.topk_blocks]
        picks = torch.where(picks > own[:, None, None], slots, picks).sort(dim=-1).values
        return torch.where(picks == slots, -1, picks).to(torch.int32)


# ---------------------------------------------------------------------------------------------------------------------
# The functions under test, and how a case calls them
# ---------------------------------------------------------------------------------------------------------------------


class Library:
    """The library's functions on one backend, callable as those of the oracle are."""

    def __init__(self, backend: str) -> None:
        for name in ("local_attention", "compressed_attention", "select_blocks", "selective_attention"):
            setattr(self, name, partial(getattr(nsa, name), backend=backend))
        self.backend = backend

    def nsa_attention(self, *args: Tensor, block_indices: Tensor, **settings: Any) -> Tensor:
        """The library makes its own choice of blocks; the oracle is given the same one, `block_indices`."""
        return nsa.nsa_attention(*args, **settings, backend=self.backend)


PLAIN = Library("torch")


def local(of: Any, case: Case, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return (of.local_attention(x["q"], x["k"], x["v"], case.window),)


def compressed(of: Any, case: Case, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return of.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], **case.compression)


def selective(of: Any, case: Case, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return (of.selective_attention(x["q"], x["k"], x["v"], x["block_indices"], case.select_block_size),)


def whole(of: Any, case: Case, x: dict[str, Tensor]) -> tuple[Tensor, ...]:
    tensors = (x[name] for name in ("q", "k", "v", "k_cmp", "v_cmp", "gates"))
    return (of.nsa_attention(*tensors, **case.whole, block_indices=x["block_indices"]),)


Branch = Callable[[Any, Case, dict[str, Tensor]], tuple[Tensor, ...]]
# The branches and their sum, and the tensors that each differentiates.
BRANCHES: dict[Branch, tuple[str, ...]] = {
    local: ("q", "k", "v"),
    compressed: ("q", "k_cmp", "v_cmp"),
    selective: ("q", "k", "v"),
    whole: ("q", "k", "v", "k_cmp", "v_cmp", "gates"),
}
every_branch = pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.__name__)


def choice(of: Library, case: Case, x: dict[str, Tensor]) -> Tensor:
    """The blocks that the library chooses."""
    _, lse = compressed(of, case, x)
    return of.select_blocks(x["q"], x["k_cmp"], lse, **case.choice)


def draw(
    branch: Branch, case: Case, random: Random, dtype: torch.dtype = torch.float64, of: Library = PLAIN
) -> dict[str, Tensor]:
    """Inputs, with random blocks to attend to; for `whole`, those that the library will choose."""
    x = case.tensors(random, dtype)
    x["block_indices"] = choice(of, case, x) if branch is whole else random.block_indices(case)
    return x


def small_gates(gates: Tensor) -> Tensor:
    """The same gates, but for three of four, which are 0 or far below 1: of every branch, beside any of the others."""
    t, c = torch.arange(gates.shape[1])[:, None, None], torch.arange(3)
    factor = torch.tensor([1.0, 0.0, 1e-4, 1e-7], dtype=gates.dtype)[(t // 4**c) % 4]  # (T, 1, 3)
    return (gates.detach() * factor).requires_grad_()


def double(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers as float64 leaves."""
    return {name: t.detach().double().requires_grad_() if t.is_floating_point() else t for name, t in x.items()}


def finite(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """0 in place of the −inf that is the log-sum-exp of a row that sees nothing."""
    return tuple(output.masked_fill(torch.isinf(output), 0.0) for output in outputs)


def gradients(outputs: Tensor | tuple[Tensor, ...], inputs: list[Tensor], upstream: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of Σ upstream · output; an input that a case leaves unused gets zeros."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    upstream = [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)]
    return torch.autograd.grad(outputs, inputs, upstream, allow_unused=True, materialize_grads=True)


def run(
    branch: Branch, of: Any, case: Case, x: dict[str, Tensor], upstream_dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Outputs and gradients by name, for random upstream gradients: the same in every run, 0 where lse is −inf."""
    outputs = branch(of, case, x)
    random = Random(seed=1)
    upstream = [random(o.shape, upstream_dtype).masked_fill(torch.isinf(o), 0.0) for o in outputs]
    names = BRANCHES[branch]
    of_leaves = gradients(outputs, [x[name] for name in names], upstream)
    values = dict(zip(("o", "lse"), outputs, strict=False))
    return values | {f"gradient of {name}": g for name, g in zip(names, of_leaves, strict=True)}


def slow(*values: Any) -> Any:
    """The values of a case that is left out by default."""
    return pytest.param(*values, marks=pytest.mark.slow)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels: where they run, and their sizes
# ---------------------------------------------------------------------------------------------------------------------

TRITON = Library("triton")

needs_triton = pytest.mark.skipif(nsa.triton is None, reason="needs Triton 3.4 or later")
# Triton 3.4's interpreter refuses descriptors of head dims that are no multiple of 16 bytes; 3.5 has not been tried.
interpreted = pytest.mark.skipif(
    nsa.triton is None
    or not nsa.triton.knobs.runtime.interpret
    or [int(part) for part in nsa.triton.__version__.split(".")[:2]] < [3, 6],
    reason="needs the interpreter of Triton 3.6 or later (TRITON_INTERPRET=1), which is on wherever there is no GPU",
)

# Every group size that has a path of its own, odd head dims and lengths, and every relation of l, d, l', S and W that
# the kernels tell apart.
CASES = (
    Case("shorter_than_a_block", T=7, H=4, D=16, block_size=8, stride=8, select_block_size=8, topk_blocks=3),
    Case("group_1", T=97, H=2, K=2, D=33, block_size=8, stride=4, select_block_size=16, topk_blocks=3,
         init_blocks=1, window=20),
    Case("group_3_small_selection", T=59, H=6, K=2, D=17, block_size=16, stride=8, select_block_size=8,
         topk_blocks=4, local_blocks=2, window=9),
    Case("group_4", T=33, B=2, H=4, K=1, D=64, block_size=8, stride=8, select_block_size=16, window=100),
    Case("group_16", T=59, H=16, K=1, D=32, block_size=16, stride=4, select_block_size=16, topk_blocks=3,
         init_blocks=1, local_blocks=1, window=17),
    Case("group_16_unaligned", T=33, H=16, K=1, D=17, block_size=4, stride=4, window=3),
    Case("group_20", T=33, H=20, K=1, D=16, block_size=8, stride=4, select_block_size=8, topk_blocks=3),
    Case("fewer_blocks_than_slots", T=33, H=4, D=16, select_block_size=8, topk_blocks=9, init_blocks=2, local_blocks=2),
    Case("blocks_longer_than_a_tile", T=97, H=4, D=16, block_size=24, stride=8, select_block_size=72, topk_blocks=2),
    Case("many_strides_in_a_block", T=59, D=16, block_size=3, stride=1, select_block_size=40, topk_blocks=2),
    Case("spill_over_many_blocks", T=59, H=3, K=1, D=16, block_size=16, stride=2, select_block_size=4, topk_blocks=6,
         init_blocks=1, local_blocks=2, window=33),
    Case("everything_one", T=33, D=16, block_size=1, stride=1, select_block_size=1, topk_blocks=5, window=2),
)  # fmt: skip
MIDDLE = replace(CASES[1], name="middle", T=41, B=2, D=17)
# (case, dtype): all in float16, and in float32 those that bring a path of their own to it.
IN_BOTH = [
    *((case, torch.float16) for case in CASES),
    (CASES[4], torch.float32),
    *(slow(case, torch.float32) for case in CASES[1:4]),
]
every_case = pytest.mark.parametrize("case, dtype", IN_BOTH, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


# The selected branch goes one of two ways: under a mask of the chosen blocks, or by an index of who chose them. Where
# lengths on the device decide, both are launched, and the answer says which one works.
WAYS = {"by_mask": math.inf, "by_index": -math.inf}
IN_DOUBT = {"in_doubt_by_mask": True, "in_doubt_by_index": False}
BRANCHES_AND_WAYS = (
    *((branch, "by_rule") for branch in (local, compressed)),
    *((branch, way) for branch in (selective, whole) for way in WAYS),
)
every_way = pytest.mark.parametrize("way", WAYS, indirect=True)
in_doubt = pytest.mark.parametrize("way", IN_DOUBT, indirect=True)
each_branch_every_way, every_branch_every_way = (
    pytest.mark.parametrize(
        "branch, way", pairs, ids=lambda value: getattr(value, "__name__", value), indirect=["way"]
    )
    for pairs in (BRANCHES_AND_WAYS[:4], BRANCHES_AND_WAYS)
)


@contextmanager
def going(way: str) -> Iterator[None]:
    """The selected branch goes this way, wherever it can; "by_rule": as it would for a user."""
    keys, by_mask = nsa._MASKED_KEYS, nsa._by_mask

    def answer(direction: str, q: Tensor, *others: Any) -> bool | Tensor:
        can = by_mask(direction, q, *others) and q.numel() > 0
        return torch.tensor([IN_DOUBT[way]], device=q.device) if can else by_mask(direction, q, *others)

    if way != "by_rule":
        nsa._MASKED_KEYS = dict.fromkeys(keys, WAYS.get(way, math.inf))
    if way in IN_DOUBT:
        nsa._by_mask = answer
    try:
        yield
    finally:
        nsa._MASKED_KEYS, nsa._by_mask = keys, by_mask


# Small chunks, spans and parts: what takes tens of thousands of tokens otherwise.
SMALL_PIECES = {
    "chunks_of_64_queries": {"_PARTIAL_BYTES": (1, 1)},
    "two_key_heads_at_a_time": {"_partial_chunk": lambda Z, T, *_: (2, T)},
    "short_runs_of_pairs": {"_RUN": 64},
    "longer_runs_where_counts_are_short": {"_RUN": 32, "_COUNT_BYTES": 600},
    "short_spans_of_rows": {"_FORWARD_ROWS": 64, "_SUM_ROWS": (64, 64), "_SUM_ROWS_FLOAT32": 32},
    "few_blocks_cut_at_a_time": {"_CUT": 4, "_FORWARD_ROWS": 16, "_SUM_ROWS": (16, 16), "_SUM_ROWS_FLOAT32": 16},
    "every_loop_by_query": {"_LARGE_GROUP": 1},
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads_first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "last_dimension_strided": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "slice_of_a_packed_tensor": lambda x: torch.cat([x, x + 1], dim=2)[:, :, : x.shape[2]],
    "every_second_token": lambda x: x.repeat_interleave(2, dim=1)[:, 1::2],
    "start_not_aligned": lambda x: torch.cat([x, x], dim=-1)[..., 1 : 1 + x.shape[-1]].copy_(x),
}


# ---------------------------------------------------------------------------------------------------------------------
# Packed sequences
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packing:
    """Sequences of these lengths, of which each has the sizes of `case`."""

    case: Case
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.case.name}_{'_'.join(map(str, self.lengths))}"

    @property
    def cu_seqlens(self) -> Tensor:
        return edges(self.lengths)

    @property
    def alone(self) -> list[Case]:
        return [replace(self.case, T=length) for length in self.lengths or (0,)]

    def draw(self, branch: Branch, random: Random, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """Inputs, with random blocks to attend to; for `whole`, those that each sequence chooses alone."""
        inputs = [case.tensors(random, dtype) for case in self.alone]
        for case, x in zip(self.alone, inputs, strict=True):
            x["block_indices"] = choice(PLAIN, case, x) if branch is whole else random.block_indices(case)
        packed = {name: torch.cat([x[name].detach() for x in inputs], dim=1) for name in inputs[0]}
        return {name: x.requires_grad_(x.is_floating_point()) for name, x in packed.items()}

    def unpack(self, x: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The rows of each sequence."""
        tokens, blocks = ([getattr(case, letter) for case in self.alone] for letter in "TC")
        parts = {name: t.split(blocks if name in ("k_cmp", "v_cmp") else tokens, dim=1) for name, t in x.items()}
        return [dict(zip(parts, rows, strict=True)) for rows in zip(*parts.values(), strict=True)]


class Packed(Library):
    """The library's functions with these `cu_seqlens`."""

    def __init__(self, cu_seqlens: Tensor, backend: str = "torch") -> None:
        super().__init__(backend)
        for function in filter(callable, vars(self).values()):
            function.keywords["cu_seqlens"] = cu_seqlens
        self.cu_seqlens = cu_seqlens

    def nsa_attention(self, *args: Tensor, **settings: Any) -> Tensor:
        return super().nsa_attention(*args, **settings, cu_seqlens=self.cu_seqlens)


class EachAlone:
    """The functions of a library or an oracle for each of some packed sequences alone: results one after another."""

    def __init__(self, of: Any, packing: Packing) -> None:
        self.of = of
        lengths, counts = ([getattr(case, letter) for case in packing.alone] for letter in "TC")
        self.rows = {sum(counts): counts, sum(lengths): lengths}  # where there are as many blocks as tokens, each has

    def split(self, x: Any) -> Iterable[Any]:
        return x.split(self.rows[x.shape[1]], dim=1) if isinstance(x, Tensor) else repeat(x)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def of_packed(*args: Any, **settings: Any) -> Any:
            calls = zip(*map(self.split, (*args, *settings.values())), strict=False)
            outputs = [
                getattr(self.of, name)(*call[: len(args)], **dict(zip(settings, call[len(args) :], strict=True)))
                for call in calls
            ]
            if isinstance(outputs[0], Tensor):
                return torch.cat(outputs, dim=1)
            return tuple(torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True))

        return of_packed


OVERLAPPING = Case("overlapping", T=0, H=4, K=2, D=5, block_size=8, stride=4, select_block_size=8, topk_blocks=3,
                   init_blocks=1, window=6)  # fmt: skip
# Sequences that end within a tile and on its edge, shorter than a block, of one token and of none, at every place.
GROUP_1 = Packing(
    Case("group_1", T=0, D=17, block_size=8, stride=4, select_block_size=16, topk_blocks=3, init_blocks=1, window=20),
    (5, 0, 41, 1, 64, 20),
)
GROUP_3 = Packing(
    Case("group_3", T=0, H=6, D=33, block_size=16, stride=8, select_block_size=8, topk_blocks=4, local_blocks=2,
         window=9),
    (33, 7, 0, 21),
)  # fmt: skip
GROUP_4 = Packing(
    Case("group_4", T=0, H=4, K=1, D=64, block_size=8, stride=8, select_block_size=16, window=100), (0, 40, 3, 30)
)
GROUP_16 = Packing(
    Case("group_16", T=0, H=16, K=1, D=32, block_size=16, stride=4, select_block_size=16, topk_blocks=3, init_blocks=1,
         window=17),
    (19, 0, 33, 1, 8),
)  # fmt: skip
LONG_BLOCKS = Packing(
    Case("long_blocks", T=0, H=4, D=16, block_size=24, stride=8, select_block_size=72, topk_blocks=2), (73, 1, 100)
)
SPILL = Packing(
    Case("spill", T=0, H=3, K=1, D=16, block_size=16, stride=2, select_block_size=4, topk_blocks=6, init_blocks=1,
         local_blocks=2, window=33),
    (30, 17, 3, 15),
)  # fmt: skip
NO_BLOCK = Packing(OVERLAPPING, (3, 7, 1))
IN_KERNELS = [
    *((packing, torch.float16) for packing in (GROUP_1, GROUP_3, GROUP_4, GROUP_16, LONG_BLOCKS, SPILL)),
    *((packing, torch.float32) for packing in (GROUP_1, NO_BLOCK)),
]


# ---------------------------------------------------------------------------------------------------------------------
# Steps of decoding
# ---------------------------------------------------------------------------------------------------------------------

STALE = 1e4  # what buffers hold past a row's length


@dataclass(frozen=True)
class Step:
    """Rows of the lengths given, of which the last tokens are new: `new` of them, or one number for each row."""

    lengths: tuple[int, ...]
    new: tuple[int, ...]
    spare: int = 5  # how much longer the buffers are than the longest row

    def positions(self) -> Tensor:
        """int32 (B, M), −1 where a row has fewer new tokens than another."""
        m = torch.arange(max(self.new))
        lengths, new = torch.tensor(self.lengths)[:, None], torch.tensor(self.new)[:, None]
        return torch.where(m < new, lengths - new + m, -1).int()

    def first(self) -> Tensor:
        """int32 (B,): tokens of each row before the step."""
        return torch.tensor([length - new for length, new in zip(self.lengths, self.new, strict=True)]).int()


def of_every_length(case: Case, new: int) -> Step:
    """Rows around every edge: of a token, of a compressed and of a selection block, and of the window."""
    edges = (1, case.block_size, case.select_block_size + 1, case.window + 1, case.T)
    lengths = tuple(sorted({min(edge, case.T) for edge in edges}))
    return Step(lengths, tuple(min(new, length) for length in lengths))


def inputs(case: Case, step: Step, random: Random, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of a full forward, and keys and values of the local branch of its own."""
    case = replace(case, B=len(step.lengths))
    x = {name: tensor.detach() for name, tensor in case.tensors(random, dtype).items()}
    return x | {name: random(x["k"].shape, dtype) for name in ("k_local", "v_local")}


def at(x: Tensor, positions: Tensor) -> Tensor:
    """x (B, T, ...) at the positions (B, M); at −1 some other token."""
    return x[torch.arange(len(positions))[:, None], positions.long()]


def buffer(x: Tensor, lengths: list[int], size: int) -> Tensor:
    """(B, size, K, D) whose rows begin with those of x; behind their lengths stale numbers."""
    stale = STALE * torch.randn(x.shape[0], size, *x.shape[2:]).to(x.dtype).sign()
    for b, length in enumerate(lengths):
        stale[b, :length] = x[b, :length]
    return stale


def sizes(case: Case) -> nsa._Choice:
    return nsa._Choice(**case.choice)


def as_cache(*keys: Tensor) -> tuple[Tensor, Tensor]:
    """tokens and blocks of a cache with these k, v, k_local, v_local, k_cmp, v_cmp; NaN where nothing is to be read."""
    spare = [torch.cat([x, torch.full_like(x[:, :1], torch.nan)], dim=1) for x in keys]
    raw = torch.full_like(spare[0], torch.nan)
    return torch.stack([*spare[:4], raw, raw]), torch.stack(spare[4:])


def decode(case: Case, step: Step, x: dict[str, Tensor], layout: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The kernels' output (B, M, H, D)."""
    layout = layout or (lambda x: x)
    positions, size = step.positions(), max(step.lengths) + step.spare
    count = lambda tokens: oracle.compressed_count(tokens, case.block_size, case.stride)  # noqa: E731
    tokens = [buffer(x[name], list(step.lengths), size) for name in ("k", "v", "k_local", "v_local")]
    blocks = [buffer(x[name], [count(n) for n in step.lengths], count(size)) for name in ("k_cmp", "v_cmp")]
    q, logits = layout(at(x["q"], positions)), layout(torch.logit(at(x["gates"], positions).float()))
    cache = as_cache(*tokens, *blocks)
    o = nsa._triton_decode(q, *cache, logits, step.first(), None, case.window, sizes(case), case.D**-0.5)
    return o.masked_fill((positions < 0)[..., None, None], 0.0)  # what stands behind a row's tokens is anybody's


def near_ties(case: Case, x: dict[str, Tensor]) -> Tensor:
    """(B, T, K): where the last block that is chosen and the first that is not weigh the same but for rounding."""
    sizes = case.compression | {"select_block_size": case.select_block_size}
    scores = oracle.Dense.importance(x["q"].double(), x["k_cmp"].double(), **sizes)
    own, j = (torch.arange(case.T) // case.select_block_size)[:, None, None], torch.arange(scores.shape[-1])
    forced = (j < case.init_blocks) | (own - j < case.local_blocks)
    ranked = scores.masked_fill(forced, torch.inf).masked_fill(j > own, -torch.inf).sort(descending=True).values
    if ranked.shape[-1] <= case.topk_blocks:
        return torch.zeros(ranked.shape[:-1], dtype=torch.bool)
    last, first = ranked[..., case.topk_blocks - 1], ranked[..., case.topk_blocks]
    return (last - first < 1e-5 * scores.amax(dim=-1)) & (last > 0)


# ---------------------------------------------------------------------------------------------------------------------
# The whole module
# ---------------------------------------------------------------------------------------------------------------------


class Last(nn.Module):
    """A compressor of the user's own: the last token of each block, scaled."""

    def __init__(self, dim: int, block: int, stride: int) -> None:
        super().__init__()
        self.block, self.stride = block, stride
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.block - 1 :: self.stride] * self.weight


BASE = {"dim": 12, "heads": 2, "seq_len": 64, "local_window": 5, "block_size": 4, "topk_blocks": 2}
OVERLAP = {"block_size": 6, "stride": 2}
PAPER = {"block_size": 4, "stride": 2, "select_block_size": 8, "topk_blocks": 4, "init_blocks": 1, "local_blocks": 2}
PAPER |= {"heads": 4, "kv_heads": 2, "dim_head": 6, "gate_mode": "q_cond", "separate_kv": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "grouped_mlp": {},
    "conv1d": {"compression": "conv1d"},
    "avgpool": {"compression": "avgpool"},
    "own_class": {"compression": Last, **OVERLAP},
    "overlapping_grouped_mlp": {"compression": "grouped_mlp", **OVERLAP},
    "overlapping_conv1d": {"compression": "conv1d", **OVERLAP},
    "overlapping_avgpool": {"compression": "avgpool", **OVERLAP},
    "large_selection_blocks": {"select_block_size": 8},
    "small_selection_blocks": {"block_size": 8, "stride": 2, "select_block_size": 2, "topk_blocks": 4},
    "forced_blocks": {"topk_blocks": 4, "init_blocks": 1, "local_blocks": 2},
    "no_forced_blocks": {"local_blocks": 0},
    "static_gates": {"gate_init": (0.5, -3.0, 40.0)},
    "q_cond_gates": {"gate_mode": "q_cond", "gate_init": (-1.0, 0.0, 2.0)},
    "grouped_queries": {"heads": 6, "kv_heads": 2, "dim_head": 3},
    "one_key_head": {"heads": 4, "kv_heads": 1},
    "separate_kv": {"separate_kv": True},
    "separate_kv_grouped_rope": {"separate_kv": True, "heads": 4, "kv_heads": 2, "dim_head": 4, "rope_theta": 50.0},
    "rope": {"rope_theta": 10000.0},
    "rope_overlapping": {"rope_theta": 100.0, **OVERLAP},
    "rope_frequencies": {"rope_frequencies": (1.0, 0.3, 0.0), "rope_scale": 1.2, **OVERLAP},
    "qk_norm": {"qk_norm": 1e-6, "rope_theta": 100.0},
    "bias": {"bias": True, "dim_head": 5},
    "paper": PAPER,
    "paper_rope_bias": {**PAPER, "rope_theta": 10000.0, "bias": True, "compression": "conv1d"},
    "paper_scaled_rope_norm": {**PAPER, "rope_frequencies": (0.9, 0.2, 0.01), "rope_scale": 0.8, "qk_norm": 0.1},
}
every_config = pytest.mark.parametrize("name", CONFIGS)
whether_the_host_reads = pytest.mark.usefixtures("host_reads")


def every_config_with(argument: str, values: list[Any]) -> pytest.MarkDecorator:
    """Every configuration, each with the next of the values in turn."""
    pairs = list(zip(CONFIGS, cycle(values), strict=False))
    return pytest.mark.parametrize(f"name, {argument}", pairs, ids=str)


def build(random: Random, dtype: torch.dtype = torch.float64, **fields: Any) -> NativeSparseAttention:
    """With random weights: those of a start would hide what position embeddings and gate weights do."""
    attention = NativeSparseAttention(NSAConfig(**BASE | fields)).to(dtype)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.3 * random(parameter.shape, dtype))
    return attention


def build_block(random: Random, **fields: Any) -> NSABlock:
    """A block with random weights, float64."""
    block = NSABlock(NSAConfig(**BASE | fields)).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * random(parameter.shape))
    return block


def edges(lengths: Iterable[int]) -> Tensor:
    """cu_seqlens of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def wild_offsets(
    seed: int, total: int, dtype: torch.dtype = torch.int32, n: int | None = None
) -> tuple[Tensor, Tensor]:
    """cu_seqlens of any values, and what a device that reads them must make of them: ascending, from 0 to total."""
    pick, limits = python_random.Random(seed), torch.iinfo(dtype)
    ranges = (limits.min, limits.max), (-3, total + 3), (0, total), (limits.max, limits.max), (limits.min, limits.min)
    values = [pick.randint(*pick.choice(ranges)) for _ in range(1 + (n or pick.randint(1, 7)))]
    read = [0]
    for value in values[1:-1]:
        read.append(max(read[-1], min(max(value, 0), total)))
    return torch.tensor(values, dtype=dtype), torch.tensor([*read, total], dtype=torch.int32)


def surround(cache: NSACache) -> dict[str, Tensor]:
    """Moves the memory of a cache between numbers that are returned."""
    margins = {}
    for name in ("tokens", "blocks", "seqlens"):
        x, margin = getattr(cache, name), 1024
        memory = torch.full((x.numel() + 2 * margin,), 7, dtype=x.dtype, device=x.device)
        setattr(cache, name, memory[margin:-margin].view_as(x).copy_(x))
        margins[name] = memory.as_strided((2, margin), (margin + x.numel(), 1))
    return margins


def compress(x: Tensor, cfg: NSAConfig, compressor: TokenCompressor) -> Tensor:
    """(B, T, K, D) → (B, C, K, D), head by head, by the oracle's definition of the compressor."""
    w, sizes = dict(compressor.method.named_parameters()), (cfg.block_size, cfg.stride)
    summarize = {
        "avgpool": lambda y: oracle.avgpool(y, *sizes),
        "conv1d": lambda y: oracle.conv1d(y, *sizes, w["position"], w["weight"], w["bias"]),
        "grouped_mlp": lambda y: oracle.grouped_mlp(
            y, *sizes, w["position"], w["w_in"], w["b_in"], w["w_out"], w["b_out"]
        ),
        Last: lambda y: oracle.compress(y, *sizes, lambda block: block[-1] * w["weight"].double()),
    }[cfg.compression]
    return torch.stack([summarize(head) for head in x.unbind(2)], dim=2)


def project(attention: NativeSparseAttention, x: Tensor) -> dict[str, Tensor]:
    """All tensors of the oracle's `nsa_attention`, in float64, from the module's weights."""
    cfg = attention.cfg
    x = x.double()

    def linear(layer: nn.Linear, *shape: int) -> Tensor:
        y = x @ layer.weight.double().T
        y = y if layer.bias is None else y + layer.bias.double()
        return y.view(*x.shape[:2], *shape)

    sets = 3 if cfg.separate_kv else 1
    q = linear(attention.to_q, cfg.heads, cfg.dim_head)
    k = linear(attention.to_k, sets, cfg.kv_heads, cfg.dim_head)
    v = linear(attention.to_v, sets, cfg.kv_heads, cfg.dim_head)
    if cfg.qk_norm is not None:
        q, k = (oracle.rms_norm(y, n.weight, cfg.qk_norm) for y, n in ((q, attention.norm_q), (k, attention.norm_k)))
    local, compressed, selective = (0, 1, 2) if cfg.separate_kv else (0, 0, 0)
    k_local, k_selective = k[:, :, local], k[:, :, selective]
    k_cmp = compress(k[:, :, compressed], cfg, attention.compress_k)
    if cfg.rope_theta is not None or cfg.rope_frequencies is not None:
        frequencies = cfg.rope_frequencies or oracle.powers(cfg.rope_theta, cfg.dim_head)
        rope = lambda y, step: oracle.rope(y, frequencies, step, cfg.rope_scale)  # noqa: E731
        q, k_local, k_selective, k_cmp = rope(q, 1), rope(k_local, 1), rope(k_selective, 1), rope(k_cmp, cfg.stride)
    logits = attention.gate_bias.double().expand(*x.shape[:2], cfg.heads, 3)
    if cfg.gate_mode == "q_cond":
        logits = logits + (x @ attention.gate_weight.double().T).view(logits.shape)
    return {
        "q": q,
        "k": k_selective,
        "v": v[:, :, selective],
        "k_cmp": k_cmp,
        "v_cmp": compress(v[:, :, compressed], cfg, attention.compress_v),
        "gates": oracle.sigmoid(logits),
        "k_local": k_local,
        "v_local": v[:, :, local],
    }


def to_out(attention: NativeSparseAttention, o: Tensor) -> Tensor:
    """(B, T, H, D) → (B, T, dim) in the dtype of o."""
    layer = attention.to_out
    y = o.flatten(2) @ layer.weight.to(o.dtype).T
    return y if layer.bias is None else y + layer.bias.to(o.dtype)


def draw_config(pick: python_random.Random, random: Random) -> NativeSparseAttention:
    """Fields drawn at random, until they make a configuration."""
    while True:
        fields = {
            "dim": pick.choice([4, 7, 12]),
            "heads": pick.choice([1, 2, 3, 4, 6]),
            "kv_heads": pick.choice([None, 1, 2, 3]),
            "dim_head": pick.choice([None, 1, 2, 5, 8]),
            "local_window": pick.choice([1, 2, 7, 16, 100]),
            "block_size": pick.choice([1, 2, 4, 6, 9, 16]),
            "stride": pick.choice([None, 1, 2, 3, 8]),
            "select_block_size": pick.choice([None, 1, 3, 4, 8, 24]),
            "topk_blocks": pick.choice([1, 2, 3, 5, 40]),
            "init_blocks": pick.choice([0, 0, 1, 2]),
            "local_blocks": pick.choice([0, 1, 1, 3]),
            "compression": pick.choice(["grouped_mlp", "conv1d", "avgpool", Last]),
            "gate_mode": pick.choice(["static", "q_cond"]),
            "gate_init": tuple(pick.uniform(-4, 4) for _ in range(3)),
            "separate_kv": pick.choice([False, True]),
            "rope_theta": pick.choice([None, 10.0, 10000.0]),
            "rope_frequencies": pick.choice([None, None, (1.0,), (0.5, 0.1), (2.0, 1.0, 0.2, 0.0)]),
            "rope_scale": pick.choice([1.0, 1.0, 1.3]),
            "qk_norm": pick.choice([None, None, 1e-3]),
            "bias": pick.choice([False, True]),
            "use_flash": pick.choice([False, True]),
        }
        try:
            return build(random, **fields)
        except ValueError:  # a combination that the rules forbid
            continue


# ---------------------------------------------------------------------------------------------------------------------
# Kernels compiled for a GPU, without one
# ---------------------------------------------------------------------------------------------------------------------


def launch(
    G: int, D: int, launched: tuple[str, ...], lengths: list[int], dtype: torch.dtype = torch.bfloat16, K: int = 2,
    first: int = 0,
) -> None:  # fmt: skip
    """All that Part II registers, once each, with the paper's block sizes. With a `first` position, to be built."""
    random, H, T, S = Random(seed=1), K * G, sum(lengths), 16
    C = sum(max(0, (length - 32) // 16 + 1) for length in lengths)
    q, k, k_cmp = (random((1, *shape, D), dtype) for shape in ((T, H), (T, K), (C, K)))
    lse, gates = random((1, T, H), torch.float32), random((1, T, H, 3), dtype)
    chosen, choice, scale = torch.zeros(1, T, K, S, dtype=torch.int32), nsa._Choice(32, 16, 64, S, 1, 2), 0.1
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int() if len(lengths) > 1 else None
    tables = nsa._Segments() if cu_seqlens is None else nsa._triton_segments(cu_seqlens, T, C, 32, 16)
    on, packed = nsa._backend("triton", q, *tables[:3], None, first)
    (terms,) = nsa._row_terms(on.preprocess(q, [q], [lse], K, dlse=lse)[0])
    for name, keys, span in (("local", k, nsa._Span(512)), ("compressed", k_cmp, choice.span)):
        if name in launched:
            on.span_forward(q, keys, keys, span, scale, **packed)
            on.span_backward(q, terms, q, keys, keys, span, scale, dq=q, **packed)
    if "selective" in launched:
        with going("by_index"):
            on.selected_forward(q, k, k, chosen, 64, scale, **packed)
            on.selected_backward(q, terms, q, k, k, chosen, 64, scale, dq=q, **packed)
    if "masked" in launched:
        lengths_decide = cu_seqlens is not None and "selective" in launched
        with going("in_doubt_by_mask" if lengths_decide else "by_mask"):
            on.selected_forward(q, k, k, chosen, 64, scale, gated=(gates, q, q), **packed)
            on.selected_backward(q, terms, q, k, k, chosen, 64, scale, dq=q, dk=k, dv=k, **packed)
    if "select" in launched:
        on.select(q, k_cmp, lse, choice, scale, **packed)
    if "whole" in launched:
        tensors = (q, k, k, k_cmp, k_cmp, gates, None, None)
        settings = (*tables[:3], None, "triton", 512)
        with going("by_index"):
            _, *outputs, indices, index = nsa._attention_forward(*tensors, *settings, *choice, scale, False, first)
            terms, _ = nsa._gated_terms(q, *outputs, gates, K, "triton")
            keys = (q, k, k, k_cmp, k_cmp, None, None)
            nsa._attention_backward(q, terms, indices, index, *keys, *settings, *choice[:3], scale, first)
    if "decode" in launched:
        (tokens, blocks), first = as_cache(k, k, k, k, k_cmp, k_cmp), torch.zeros(1, dtype=torch.int32)
        on.decode(q[:, :1], tokens, blocks, gates[:, :1], first, None, 512, choice, scale)
        weights: list[Tensor | None] = [None] * 10
        if nsa._triton_extends(k, 2 * D):
            shapes = (32, D), (2 * D, 32 * D), (2 * D,), (D, 2 * D), (D,)
            weights = [random(shape, dtype) for shape in shapes] * 2
        raw = random((1, 1, 3 * K, D), dtype)
        given = torch.ones(D // 2, dtype=torch.float64)
        rotation = {128: nsa._Rotation(1e4), 256: nsa._Rotation(None, 1.2, given)}.get(D, nsa._Rotation())
        on.extend(q[:, :1], raw, raw, tokens, blocks, first, None, rotation, 32, 16, weights)
        on.project(random((1, 1, 1024), dtype), [random((64, 1024), dtype)] * 4, [None] * 4)
    if "compress" in launched:
        w_in, w_out, bias = random((2 * D, 32 * D), dtype), random((D, 2 * D), dtype), random((2 * D,), dtype)
        position = w_in[:32, :D].contiguous()
        for layers in ((position, w_in[:D], bias[:D], None, None), (position, w_in, bias, w_out, bias[:D])):
            with patch.object(nsa, "_num_sms", lambda device: 132):  # few rows are split into parts
                y, hidden = on.compress((k, k), layers, layers, tables, 16)
            saved = layers[0], layers[1], layers[3]
            on.compress_backward(tuple(y), (k, k), saved, saved, hidden, tables, 16, True, True)


def without_interpreter(script: str, **environment: str) -> str:
    """Last line that a script prints in a process of its own: in this one, kernels belong to the interpreter."""
    here = Path(__file__).resolve().parent
    environment |= {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return (done.stdout.splitlines() or [""])[-1]


def compile_only(target: tuple[str, str | int, int], take: Callable[[str, dict[str, Any], Any], None]) -> None:
    """From now on, launches compile for a target (backend, architecture, lanes of a warp) and do not run.

    `take` is given the name of each kernel, its constants, and what was compiled. For a process of its own.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Device:
        """All that the compiler asks about a device."""

        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget(*target))

    def compile_it(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = compile_and_launch(self, *args, grid=grid, warmup=True, **options)
        name = self.fn.__name__.removeprefix("_").removesuffix("_kernel")
        if name.startswith("span"):
            branch = "local" if options["WINDOW"] else "masked" if options["S"] else "compressed"
            name = name.replace("span", branch)
        take(name, options, kernel)

    driver.set_active(Device())
    compile_and_launch, JITFunction.run = JITFunction.run, compile_it


def cuobjdump(option: str, cubin: bytes, path: Path) -> str | None:
    """Output of NVIDIA's tool, which Triton brings along, about machine code; None where it is missing."""
    bundled = Path(nsa.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    tool = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if tool is None:
        return None
    path.write_bytes(cubin)
    return subprocess.run([tool, option, str(path)], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes, path: Path) -> dict[str, int] | None:
    """Counts in the machine code; None where the tool is missing."""
    code = cuobjdump("-sass", cubin, path)
    if code is None:
        return None
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in ("HGMMA", "STL", "LDL")}
    before, _, after = code.rpartition("HGMMA")  # what follows only writes results
    return counts | {"loads": len(re.findall(r"\bLDSM\b", before)), "loads after": len(re.findall(r"\bLDSM\b", after))}
