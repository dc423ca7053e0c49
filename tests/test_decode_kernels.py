"""The kernels of a decoding step without a GPU: run by Triton's interpreter against the oracle, compiled for Hopper.

A step is the rows of a full forward at the positions of the new tokens. `test_gpu.py` holds the same kernels to the
same error budget at real sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import oracle
import pytest
import torch
from cases import Case, Random, double
from conftest import assert_within_budget
from test_kernels import CASES, LAYOUTS, every_case, every_dtype, interpreted, needs_triton
from torch import Tensor

import native_sparse_attention as nsa

# Rows that see nothing are −inf − −inf on their way, as on a GPU; NumPy, the engine of the interpreter, warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

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


def of_every_length(case: Case, new: int) -> Step:
    """Rows around every edge: of a token, of a compressed and of a selection block, and of the window."""
    edges = (1, case.block_size, case.select_block_size + 1, case.window + 1, case.T)
    lengths = tuple(sorted({min(edge, case.T) for edge in edges}))
    return Step(lengths, tuple(min(new, length) for length in lengths))


def inputs(case: Case, step: Step, random: Random, dtype: torch.dtype) -> dict[str, Tensor]:
    """Those of a full forward, and keys and values of the local branch of its own."""
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


def decode(case: Case, step: Step, x: dict[str, Tensor], layout: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The kernels' output (B, M, H, D)."""
    layout = layout or (lambda x: x)
    positions, size = step.positions(), max(step.lengths) + step.spare
    count = lambda tokens: oracle.compressed_count(tokens, case.block_size, case.stride)  # noqa: E731
    tokens = [buffer(x[name], list(step.lengths), size) for name in ("k", "v", "k_local", "v_local")]
    blocks = [buffer(x[name], [count(n) for n in step.lengths], count(size)) for name in ("k_cmp", "v_cmp")]
    tensors = (at(x["q"], positions), *tokens, *blocks, at(x["gates"], positions))
    return nsa._triton_decode(*map(layout, tensors), positions, **case.whole, scale=case.D**-0.5)


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


def assert_as_exact_as_plain(case: Case, step: Step, x: dict[str, Tensor], actual: Tensor) -> None:
    """The rows of a full forward, within the error budget, where the choice of blocks is clear; 0 at −1."""
    positions = step.positions()
    names = ("q", "k", "v", "k_cmp", "v_cmp", "gates")
    local = {"k_local": x["k_local"], "v_local": x["v_local"]}
    chosen = oracle.Dense.select_blocks(x["q"].double(), x["k_cmp"].double(), **case.choice)
    plain, exact = (
        at(
            oracle.Dense.nsa_attention(
                *(y[name] for name in names), **case.whole, k_local=y["k_local"], v_local=y["v_local"],
                block_indices=chosen,
            ),
            positions,
        )
        for y in (x | local, double(x | local))
    )  # fmt: skip
    assert actual.shape == exact.shape and actual.dtype == x["q"].dtype
    assert (actual[positions < 0] == 0).all(), "rows without a token are 0"
    unclear = at(near_ties(case, x), positions).repeat_interleave(case.H // case.K, dim=-1)  # (B, M, H)
    assert unclear.double().mean() < 0.1, "hardly a row has near ties"
    kept = (positions >= 0)[:, :, None] & ~unclear
    assert_within_budget(actual[kept], plain[kept], exact[kept], "o", terms=case.terms)


def check(case: Case, step: Step, random: Random, dtype: torch.dtype) -> None:
    x = inputs(case, step, random, dtype)
    assert_as_exact_as_plain(case, step, x, decode(case, step, x))


# ---------------------------------------------------------------------------------------------------------------------
# Values, by the interpreter
# ---------------------------------------------------------------------------------------------------------------------

MIDDLE = replace(CASES[1], name="middle", T=41, D=17)


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many parts as a GPU has room for; the interpreter counts two multiprocessors."""
    monkeypatch.setattr(nsa, "_processors", lambda device: 64)


@interpreted
@every_case
def test_rows_of_every_length(case: Case, dtype: torch.dtype, split: None, random: Random) -> None:
    check(case, of_every_length(case, new=1), random, dtype)


# (case, new tokens, dtype)
SEVERAL = [(CASES[0], 5, torch.float16), (CASES[10], 5, torch.float16),
           (MIDDLE, 2, torch.float16), (MIDDLE, 2, torch.float32)]  # fmt: skip


@interpreted
@pytest.mark.parametrize("case, new, dtype", SEVERAL, ids=str)
def test_several_new_tokens(case: Case, new: int, dtype: torch.dtype, split: None, random: Random) -> None:
    check(case, of_every_length(case, new), random, dtype)


@interpreted
@pytest.mark.parametrize("processors", [1, 2, 1000])
def test_any_number_of_parts(processors: int, random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part a branch, a few, one a tile; with buffers so long that most parts have nothing to read."""
    monkeypatch.setattr(nsa, "_processors", lambda device: processors)
    case = replace(MIDDLE, T=97)
    check(case, Step((97, 30), (1, 1), spare=300), random, torch.float16)


@interpreted
def test_blocks_that_nothing_but_their_left_weighs(random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed blocks reach three selection blocks far, from one tile of scores into the next; no block is forced."""
    tile = {"PROGRAMS": 8, "KEYS": 16, "STAGES": 1, "num_warps": 4}
    monkeypatch.setitem(nsa._DECODE_TILES, ("compressed", 4, 128), tile)
    case = Case("reaching", T=81, H=3, K=1, D=16, block_size=16, stride=4, topk_blocks=10, local_blocks=0)
    check(case, Step((76, 76, 81), (4, 4, 4)), random, torch.float32)


@interpreted
def test_chunks_of_new_tokens(random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsa, "_DECODE_BYTES", 1)
    check(MIDDLE, Step((41, 2, 20), (3, 2, 1)), random, torch.float32)


@interpreted
def test_no_uninitialised_memory_is_read(split: None, random: Random) -> None:
    """Memory is full of NaN, or of the largest integer, before anything is written to it."""
    step = Step((41, 1, 20), (2, 1, 1))
    x = inputs(MIDDLE, step, random, torch.float16)
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        actual = decode(MIDDLE, step, x)
    finally:
        torch.use_deterministic_algorithms(was)
    assert_as_exact_as_plain(MIDDLE, step, x, actual)


@interpreted
def test_scores_too_large_for_exp(split: None, random: Random) -> None:
    """Scores up to some thousand: float32, as dense masks would round them to float16."""
    step = Step((41, 20), (1, 1))
    x = inputs(MIDDLE, step, random, torch.float32)
    for name in ("q", "k", "k_local", "k_cmp"):
        x[name] *= 20
    assert_as_exact_as_plain(MIDDLE, step, x, decode(MIDDLE, step, x))


@interpreted
@every_dtype
@pytest.mark.parametrize("winners", ["none", "every_fifth"])
def test_exact_ties_go_to_the_lower_block(dtype: torch.dtype, winners: str, split: None, random: Random) -> None:
    """Queries and keys at right angles: every score is 0 but for a few blocks that stand out.

    A value names its block, and all tokens weigh the same, so that the output tells which blocks were chosen.
    """
    case = Case("ties", T=61, H=6, D=16, topk_blocks=7, init_blocks=1, local_blocks=2)
    step = Step((61, 45), (1, 1))
    x = inputs(case, step, random, dtype)
    x["q"][..., 2:] = 0
    x["k"].zero_()
    x["k_cmp"][..., :2] = 0
    if winners == "every_fifth":
        x["k_cmp"][:, ::5, :, :2] = random(x["k_cmp"][:, ::5, :, :2].shape, dtype)
    x["gates"][..., :2] = 0
    actual = decode(case, step, x)
    chosen = oracle.select_blocks(x["q"], x["k_cmp"], **case.choice)
    o = oracle.Dense.selective_attention(x["q"].double(), x["k"].double(), x["v"].double(), chosen, 4)
    expected = at(o * x["gates"][..., 2:].double(), step.positions())
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=4e-3 if dtype == torch.float16 else 1e-5)


@interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout: str, split: None, random: Random) -> None:
    case, step = replace(MIDDLE, D=16), Step((41, 20), (3, 1))
    x = inputs(case, step, random, torch.float16)
    assert_as_exact_as_plain(case, step, x, decode(case, step, x, LAYOUTS[layout]))


@needs_triton
def test_every_setting_has_a_kernel_or_a_reason() -> None:
    for case in CASES:
        assert nsa._decode_obstacle(case.block_size, case.stride, case.select_block_size) is None
    for sizes in ((256, 1, 1), (129, 1, 129)):
        assert "/".join(map(str, sizes)) in nsa._decode_obstacle(*sizes)
