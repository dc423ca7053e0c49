"""What is tested, and on what: the awkward sizes, seeded random inputs, and how a case calls each function.

Every call works alike on the library, `PLAIN`, and on its references, `oracle` and `oracle.Dense`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import native_sparse_attention as nsa

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
        return self.choice | {"local_window": self.window}

    @property
    def choice(self) -> dict[str, int]:
        """The arguments of `select_blocks` after its tensors."""
        names = ("select_block_size", "topk_blocks", "init_blocks", "local_blocks")
        return self.compression | {name: getattr(self, name) for name in names}

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


def draw(branch: Branch, case: Case, random: Random, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Inputs, with random blocks to attend to; for `whole`, those that the library will choose."""
    x = case.tensors(random, dtype)
    x["block_indices"] = choice(PLAIN, case, x) if branch is whole else random.block_indices(case)
    return x


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
