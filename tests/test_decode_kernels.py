"""The kernels of a decoding step without a GPU: run by Triton's interpreter against the oracle, compiled for Hopper.

A step is the rows of a full forward at the positions of the new tokens. `test_gpu.py` holds the same kernels to the
same error budget at real sizes.
"""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from cases import (
    CASES,
    LAYOUTS,
    MIDDLE,
    Case,
    Random,
    Step,
    at,
    decode,
    every_case,
    every_dtype,
    inputs,
    interpreted,
    of_every_length,
    sizes,
    slow,
)
from conftest import assert_step_as_exact_as_plain

import native_sparse_attention as nsa

# Rows that see nothing are −inf − −inf on their way, as on a GPU; NumPy, the engine of the interpreter, warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def check(case: Case, step: Step, random: Random, dtype: torch.dtype) -> None:
    x = inputs(case, step, random, dtype)
    assert_step_as_exact_as_plain(case, step, x, decode(case, step, x))


# ---------------------------------------------------------------------------------------------------------------------
# Values, by the interpreter
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def split(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many parts as a GPU has room for; the interpreter counts two multiprocessors."""
    monkeypatch.setattr(nsa, "_num_sms", lambda device: 64)


@interpreted
@every_case
def test_rows_of_every_length(case: Case, dtype: torch.dtype, split: None, random: Random) -> None:
    check(case, of_every_length(case, new=1), random, dtype)


# (case, new tokens, dtype)
SEVERAL = [(CASES[0], 5, torch.float16), (MIDDLE, 2, torch.float32),
           slow(CASES[10], 5, torch.float16)]  # fmt: skip


@interpreted
@pytest.mark.parametrize("case, new, dtype", SEVERAL, ids=str)
def test_several_new_tokens(case: Case, new: int, dtype: torch.dtype, split: None, random: Random) -> None:
    check(case, of_every_length(case, new), random, dtype)


@interpreted
@pytest.mark.parametrize("processors", [1, 2, 1000])
def test_any_number_of_parts(processors: int, random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part a branch, a few, one a tile; with buffers so long that most parts have nothing to read."""
    monkeypatch.setattr(nsa, "_num_sms", lambda device: processors)
    case = replace(MIDDLE, T=97)
    check(case, Step((97, 30), (1, 1), spare=300), random, torch.float16)


@interpreted
def test_blocks_that_nothing_but_their_left_weighs(random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compressed blocks reach three selection blocks far, from one tile of scores into the next; no block is forced."""
    for name in ("decode_scan", "decode_attend"):
        monkeypatch.setitem(nsa._FLOAT32_TILES, name, (((16, 16, 4, 1, 64),),) * 3)
    case = Case("reaching", T=81, H=3, K=1, D=16, block_size=16, stride=4, topk_blocks=10, local_blocks=0)
    check(case, Step((76, 76, 81), (4, 4, 4)), random, torch.float32)


@interpreted
def test_chunks_of_new_tokens(random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsa, "_DECODE_BYTES", 1)
    check(MIDDLE, Step((41, 2, 20), (6, 2, 1)), random, torch.float32)


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
    assert_step_as_exact_as_plain(MIDDLE, step, x, actual)


@interpreted
def test_scores_too_large_for_exp(split: None, random: Random) -> None:
    """Scores up to some thousand: float32, as dense masks would round them to float16."""
    step = Step((41, 20), (1, 1))
    x = inputs(MIDDLE, step, random, torch.float32)
    for name in ("q", "k", "k_local", "k_cmp"):
        x[name] *= 20
    assert_step_as_exact_as_plain(MIDDLE, step, x, decode(MIDDLE, step, x))


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
    assert_step_as_exact_as_plain(case, step, x, decode(case, step, x, LAYOUTS[layout]))


@interpreted
def test_every_setting_has_a_kernel_or_a_reason() -> None:
    x = torch.empty(1, 1, 1, 16, dtype=torch.float16)
    for case in CASES:
        assert nsa._triton_obstacle(x, x, 1.0, sizes(case), decoding=True) is None
    for block_size, stride, select_block_size in ((256, 1, 8), (129, 1, 129)):
        choice = nsa._Choice(block_size, stride, select_block_size, 4, 0, 1)
        reason = nsa._triton_obstacle(x, x, 1.0, choice, decoding=True)
        assert f"{block_size}/{stride}/{select_block_size}" in reason
        assert nsa._triton_obstacle(x, x, 1.0, choice) is None
