"""The Triton kernels on a GPU, at real sizes: the error budget, determinism, training, 64k tokens, CUDA graphs.

Outputs are held to float64 on the same GPU: at most twice the error of plain PyTorch at the same precision.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import random as python_random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import accumulate, cycle
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import (
    BRANCHES,
    BRANCHES_AND_WAYS,
    CASES,
    IN_DOUBT,
    IN_KERNELS,
    LAYOUTS,
    TRITON,
    WAYS,
    Branch,
    Case,
    EachAlone,
    Library,
    Packed,
    Packing,
    Random,
    Step,
    as_cache,
    at,
    choice,
    decode,
    double,
    edges,
    every_branch,
    every_branch_every_way,
    going,
    inputs,
    local,
    of_every_length,
    selective,
    sizes,
    surround,
    whole,
    wild_offsets,
)
from conftest import assert_step_as_exact_as_plain, assert_within_budget, choice_tolerance
from torch import Tensor, nn
from training_runs import TINY, flags

import native_sparse_attention as nsa
from nsa_gpt_training import NSALanguageModel

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
with_kernels = pytest.mark.skipif(
    DEVICE == "cuda" and not nsa._triton_preferred(torch.device(DEVICE)), reason="'auto' takes no kernels on this GPU"
)


class DeviceRandom(Random):
    """Normal numbers that are drawn where they are needed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator(DEVICE).manual_seed(seed)

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=DEVICE).to(dtype)


@pytest.fixture
def random() -> Random:
    return DeviceRandom(seed=20250216)


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    """Tensors made without a device, those of the oracle among them, are on the GPU; its memory goes back afterwards.

    Other processes may test on the same GPU.
    """
    with torch.device(DEVICE):
        yield
    torch.cuda.empty_cache()


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` returns NaN, or the largest integer."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(was)


# ---------------------------------------------------------------------------------------------------------------------
# What is run
# ---------------------------------------------------------------------------------------------------------------------


def real(G: int, D: int, T: int = 1000) -> Case:
    """The paper's ratios, two key heads, and a batch of two where it is small."""
    K, B = (1, 1) if G > 16 else (2, 2 if G * D <= 256 else 1)
    return Case(f"{G}_heads_a_group_of_{D}", T=T, B=B, H=G * K, K=K, D=D, block_size=32, stride=16,
                select_block_size=64, topk_blocks=6, init_blocks=1, local_blocks=2, window=130)  # fmt: skip


# Every group size and every head dim in bfloat16; each kind of tile again in the other types; then the awkward cases.
SWEEP = (
    *((real(G, D), torch.bfloat16) for G, D in ((1, 64), (2, 192), (3, 80), (4, 128), (7, 16), (16, 256), (64, 96))),
    *((real(G, D, T=1027), torch.float16) for G, D in ((1, 128), (3, 192), (16, 64))),
    *((real(G, D, T=777), torch.float32) for G, D in ((1, 64), (4, 80), (7, 256), (16, 128))),
    *((case, torch.bfloat16) for case in CASES),
)
LAYOUT_CASE = replace(real(2, 64), T=500)
LONG = Case("64k", T=65536, H=64, K=4, D=128, block_size=32, stride=16, select_block_size=64, topk_blocks=16,
            init_blocks=1, local_blocks=2, window=512)  # fmt: skip

# Packed sequences: longer than a tile and shorter than a block, of one token and of none; then the awkward ones.
LENGTHS = (300, 0, 1, 500, 31, 0, 64, 131)
PACKED = (
    *((Packing(real(G, D), LENGTHS), torch.bfloat16) for G, D in ((1, 64), (3, 80), (4, 128), (16, 128), (64, 96))),
    *((Packing(real(G, D), LENGTHS), torch.float16) for G, D in ((1, 128), (16, 64))),
    *((Packing(real(G, D), LENGTHS), torch.float32) for G, D in ((2, 64), (16, 128))),
    *((packing, torch.bfloat16) for packing in dict.fromkeys(packing for packing, _ in IN_KERNELS)),
)


def draw(case: Case, dtype: torch.dtype, seed: int = 20250216) -> dict[str, Tensor]:
    """Inputs, and the blocks that the kernels choose for them, which every branch and every reference takes."""
    x = case.tensors(DeviceRandom(seed), dtype)
    x["block_indices"] = choice(TRITON, case, x)
    return x


def draw_packed(packing: Packing, dtype: torch.dtype, seed: int = 20250216) -> tuple[Packed, Case, dict[str, Tensor]]:
    """The kernels for these sequences, the sizes of each, and inputs with the blocks that the kernels choose."""
    packing = replace(packing, case=replace(packing.case, B=1))
    of = Packed(packing.cu_seqlens, "triton")
    x = packing.draw(local, DeviceRandom(seed), dtype)
    x["block_indices"] = choice(of, packing.case, x)
    return of, packing.case, x


def run(branch: Branch, of: object, case: Case, x: dict[str, Tensor], layout: str | None = None) -> dict[str, Tensor]:
    """Outputs and gradients by name, for upstream gradients that are the same in every run; 0 where lse is −inf."""
    names = BRANCHES[branch]
    if layout is not None:
        x = {name: LAYOUTS[layout](tensor.detach()) for name, tensor in x.items()}
        for name in names:
            x[name].requires_grad_()
    outputs = branch(of, case, x)
    random, dtype = DeviceRandom(seed=1), torch.bfloat16  # exact in every type
    upstream = [random(o.shape, dtype).to(o.dtype).masked_fill(torch.isinf(o), 0.0) for o in outputs]
    leaves = [x[name] for name in names]
    of_leaves = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True, materialize_grads=True)
    values = dict(zip(("o", "lse"), outputs, strict=False))
    return values | {f"gradient of {name}": g for name, g in zip(names, of_leaves, strict=True)}


def warm_up(case: Case, dtype: torch.dtype, layout: str | None = None) -> None:
    """Leave all kernels of a case in Triton's cache on disk."""
    with torch.device(DEVICE):
        x = draw(case, dtype)
        for branch, way in BRANCHES_AND_WAYS if layout is None and case is not LONG else ((whole, "by_rule"),):
            with going(way):
                run(branch, TRITON, case, x, layout)
        if layout is None and case is not LONG:
            step = of_every_length(case, new=1)
            decode(case, step, inputs(case, step, DeviceRandom(seed=1), dtype))


def warm_up_packed(packing: Packing, dtype: torch.dtype) -> None:
    with torch.device(DEVICE):
        of, case, x = draw_packed(packing, dtype)
        for branch, way in (*BRANCHES_AND_WAYS, *((whole, way) for way in IN_DOUBT)):
            with going(way):
                run(branch, of, case, x)


@pytest.fixture(scope="module")
def compiled() -> None:
    """Compile what the tests below need with all cores: one after the other it would take longer than the tests.

    Where pytest-xdist runs several workers, each compiles its share; they find the others' in Triton's cache.
    """
    jobs = [*SWEEP, (LONG, torch.bfloat16), *((LAYOUT_CASE, torch.bfloat16, layout) for layout in LAYOUTS)]
    jobs = [*((warm_up, *job) for job in jobs), *((warm_up_packed, *job) for job in PACKED)]
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    jobs = jobs[int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) :: workers]
    processes = min(len(jobs), max(len(os.sched_getaffinity(0)) // workers, 1), 16)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for job in [pool.submit(*job) for job in reversed(jobs)]:
            job.exception()  # a failure is reported by the test that meets it


# ---------------------------------------------------------------------------------------------------------------------
# Values, gradients, choice of blocks
# ---------------------------------------------------------------------------------------------------------------------


def assert_as_exact_as_plain(
    branch: Branch,
    case: Case,
    x: dict[str, Tensor],
    actual: dict[str, Tensor],
    reference: object = oracle.Dense,
    ulps: float = 4,
) -> None:
    """Values and all gradients within the error budget, in the dtypes that are promised."""
    dtype = x["q"].dtype
    plain, exact = run(branch, reference, case, x), run(branch, reference, case, double(x))
    for name in exact:
        assert actual[name].dtype == (torch.float32 if name == "lse" else dtype), f"{name}: {actual[name].dtype}"
        assert_within_budget(actual[name], plain[name], exact[name], name, terms=case.terms, ulps=ulps)


@every_branch_every_way
@pytest.mark.parametrize("case, dtype", SWEEP, ids=str)
def test_error_budget_and_repeatability(
    branch: Branch, way: str, case: Case, dtype: torch.dtype, compiled: None
) -> None:
    """In memory full of NaN, twice: gradients are the same to the bit."""
    x = draw(case, dtype)
    with poisoned_memory():
        actual, again = run(branch, TRITON, case, x), run(branch, TRITON, case, x)
    for name, value in actual.items():
        assert torch.equal(value, again[name]), f"{name} differs from run to run"
    assert_as_exact_as_plain(branch, case, x, actual)


@every_branch_every_way
@pytest.mark.parametrize("packing, dtype", PACKED, ids=str)
def test_packed_sequences(branch: Branch, way: str, packing: Packing, dtype: torch.dtype, compiled: None) -> None:
    """Results of each alone, within the error budget; in memory full of NaN, twice.

    The first token of a sequence sees one key, so that its ds is do·v − do·o with o = v: exactly 0 by the reference's
    softmax, the rounding of two sums of D products in a kernel that recomputes from the log-sum-exp. Half types drown
    it; in float32 it is the largest error there is, about sqrt(D) ulp, and packed sequences have many first tokens.
    """
    of, case, x = draw_packed(packing, dtype)
    with poisoned_memory():
        actual, again = run(branch, of, case, x), run(branch, of, case, x)
    for name, value in actual.items():
        assert torch.equal(value, again[name]), f"{name} differs from run to run"
    ulps = 4 + case.D**0.5 * (dtype == torch.float32)
    assert_as_exact_as_plain(branch, case, x, actual, EachAlone(oracle.Dense, replace(packing, case=case)), ulps)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("packing, dtype", PACKED, ids=str)
def test_packed_sequences_whose_lengths_decide(way: str, packing: Packing, dtype: torch.dtype, compiled: None) -> None:
    """Both ways are launched, and one works: the same bits as of that one alone."""
    of, case, x = draw_packed(packing, dtype)
    with going(f"in_doubt_{way}"), poisoned_memory():
        actual = run(whole, of, case, x)
    with going(way):
        expected = run(whole, of, case, x)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), f"{name} differs"


def assert_valid_choice(chosen: Tensor, importance: Tensor, case: Case, tolerance: float) -> None:
    """The rules of `conftest.assert_valid_choice`, for all queries at once: (B, T, K, S) of (B, T, K, N)."""
    assert chosen.dtype == torch.int32 and chosen.shape == (case.B, case.T, case.K, case.topk_blocks)
    N = importance.shape[-1]
    own = (torch.arange(case.T) // case.select_block_size)[:, None, None]  # (T, 1, 1)
    block, slot = torch.arange(N), torch.arange(case.topk_blocks)
    candidate = (block <= own).expand_as(importance)
    forced = candidate & ((block < case.init_blocks) | (own - block < case.local_blocks))
    filled = slot < (own + 1).clamp(max=case.topk_blocks)  # (T, 1, S)
    assert torch.equal(chosen == -1, ~filled.expand_as(chosen)), "as many blocks as there are, then −1"
    assert ((chosen <= own) & (chosen >= -1)).all(), "only blocks that have begun"
    ascending = (chosen[..., 1:] > chosen[..., :-1]) | ~filled[..., 1:]
    assert ascending.all(), "ascending, and none twice"
    taken = torch.zeros(*importance.shape[:-1], N + 1, dtype=torch.bool)  # the last column collects the free slots
    taken = taken.scatter(-1, chosen.long().where(filled, N), True)[..., :N]
    assert (taken | ~forced).all(), "every forced block"
    worst = importance.masked_fill(~taken | forced, torch.inf).amin(dim=-1)
    best = importance.masked_fill(taken | ~candidate, -torch.inf).amax(dim=-1)
    regret = (best - worst).max().item()
    assert regret <= tolerance, f"a block that is more important by {regret:.3g} is missed"


@pytest.mark.parametrize("case, dtype", SWEEP, ids=str)
@pytest.mark.parametrize("spread", [1.0, 1e-3], ids=lambda spread: f"keys_differ_by_{spread}")
def test_choice_by_importance(case: Case, dtype: torch.dtype, spread: float, compiled: None) -> None:
    """Scores are held to float32: the kernels multiply half types exactly and sum in float32."""
    x = {name: tensor.detach() for name, tensor in case.tensors(DeviceRandom(7), dtype).items()}
    x["k_cmp"] = x["k_cmp"][:, :1] + spread * x["k_cmp"]
    sizes = case.compression | {"select_block_size": case.select_block_size}
    exact = oracle.Dense.importance(x["q"].double(), x["k_cmp"].double(), **sizes)
    plain = oracle.Dense.importance(x["q"].float(), x["k_cmp"].float(), **sizes)
    with poisoned_memory():
        chosen = choice(TRITON, case, x)
    assert_valid_choice(chosen, exact, case, choice_tolerance(plain, exact, case.terms))


@pytest.mark.parametrize("packing, dtype", PACKED, ids=str)
def test_choice_of_packed_sequences(packing: Packing, dtype: torch.dtype, compiled: None) -> None:
    of, case, x = draw_packed(packing, dtype)
    packing = replace(packing, case=case)
    with poisoned_memory():
        chosen = choice(of, case, x)
    sizes = case.compression | {"select_block_size": case.select_block_size}
    choices = chosen.split(list(packing.lengths), dim=1)
    for alone, rows, of_sequence in zip(packing.alone, packing.unpack(x), choices, strict=True):
        if alone.T > 0:
            exact = oracle.Dense.importance(rows["q"].double(), rows["k_cmp"].double(), **sizes)
            plain = oracle.Dense.importance(rows["q"].float(), rows["k_cmp"].float(), **sizes)
            assert_valid_choice(of_sequence, exact, alone, choice_tolerance(plain, exact, alone.terms))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(layout: str, compiled: None) -> None:
    x = draw(LAYOUT_CASE, torch.bfloat16)
    assert not LAYOUTS[layout](x["q"]).is_contiguous()
    assert_as_exact_as_plain(whole, LAYOUT_CASE, x, run(whole, TRITON, LAYOUT_CASE, x, layout))


@pytest.mark.parametrize("case, dtype", SWEEP, ids=str)
def test_direct_launches(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, compiled: None) -> None:
    """To the bit what Triton's own launches give."""
    x = draw(case, dtype)
    run(whole, TRITON, case, x)
    direct = run(whole, TRITON, case, x)
    monkeypatch.setattr(nsa, "_DIRECT_LAUNCH", False)
    for name, value in run(whole, TRITON, case, x).items():
        assert torch.equal(value, direct[name]), f"{name} differs"


MEMCHECK = (*CASES, real(1, 64, T=200), real(3, 80, T=200), real(16, 128, T=200))


def test_no_access_out_of_bounds() -> None:
    """NVIDIA's memcheck over small shapes, every tensor in an allocation of its own."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        pytest.skip("needs compute-sanitizer")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "1", sys.executable, "-c"]
    script = "from test_gpu import *\nfor case in MEMCHECK: warm_up(case, torch.bfloat16)\n"
    script += "for packing, dtype in PACKED: warm_up_packed(packing, dtype)"
    here = Path(__file__).resolve().parent
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]),
    }
    done = subprocess.run([*command, script], env=environment, capture_output=True, text=True)
    if "ERROR SUMMARY" not in done.stdout:
        pytest.skip(f"compute-sanitizer did not start: {(done.stdout + done.stderr)[-300:]}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


# ---------------------------------------------------------------------------------------------------------------------
# Long sequences
# ---------------------------------------------------------------------------------------------------------------------


def one_query(
    case: Case, x: dict[str, Tensor], t: int, h: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], list[tuple[str, Tensor, Tensor]]]:
    """Output (D) of one query head at one token, by the rules of the oracle in this dtype.

    Its q and gates; and for each tensor of keys or values that it read: name, rows and what they held. All are leaves.
    """
    kv_head = h // (case.H // case.K)
    leaf = lambda y: y.detach().to(dtype).requires_grad_()  # noqa: E731
    window = torch.arange(max(0, t - case.window + 1), t + 1)
    blocks = torch.tensor(oracle.visible_blocks(t, case.T, case.block_size, case.stride), dtype=torch.int64)
    chosen = x["block_indices"][0, t, kv_head].long()
    tokens = (chosen[chosen >= 0, None] * case.select_block_size + torch.arange(case.select_block_size)).flatten()
    tokens = tokens[tokens <= t]
    q, gates, read, outputs = leaf(x["q"][0, t, h]), leaf(x["gates"][0, t, h]), [], []
    for names, rows in ((("k", "v"), window), (("k_cmp", "v_cmp"), blocks), (("k", "v"), tokens)):
        both = [(name, rows, leaf(x[name][0, rows, kv_head])) for name in names]
        outputs.append(oracle.attend(q, both[0][2], both[1][2], case.D**-0.5)[0])
        read += both
    return (gates[:, None] * torch.stack(outputs)).sum(dim=0), [q, gates], read


def gradients_at_the_end(case: Case, x: dict[str, Tensor], do: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients of the last tokens and blocks of the last key head: nothing later sees them."""
    tokens, heads = case.stride + 1, case.H // case.K
    sizes = {"k": (case.T, tokens), "v": (case.T, tokens), "k_cmp": (case.C, 2), "v_cmp": (case.C, 2)}
    sums = {name: torch.zeros(last, case.D, dtype=torch.float64) for name, (_, last) in sizes.items()}
    own: list[list[Tensor]] = []
    for t in range(case.T - tokens, case.T):
        for h in range(case.H - heads, case.H):
            o, leaves, read = one_query(case, x, t, h, dtype)
            gradients = torch.autograd.grad(o, [*leaves, *(y for _, _, y in read)], do[0, t, h].to(dtype))
            own.append(list(gradients[:2]))
            for (name, rows, _), gradient in zip(read, gradients[2:], strict=True):
                n, last = sizes[name]
                late = rows >= n - last
                sums[name].index_add_(0, rows[late] - (n - last), gradient[late].double())
    dq, dgates = (torch.stack(each).unflatten(0, (tokens, heads)) for each in zip(*own, strict=True))
    return {"q": dq, "gates": dgates} | {name: total.to(dtype) for name, total in sums.items()}


def assert_rows_within_budget(case: Case, x: dict[str, Tensor], rows: list[tuple[int, int]], o: Tensor) -> None:
    plain, exact = (
        torch.stack([one_query(case, x, *row, dtype)[0] for row in rows]) for dtype in (o.dtype, torch.float64)
    )
    assert_within_budget(o, plain, exact, "o", terms=case.terms)


def assert_long_sequence(case: Case, dtype: torch.dtype) -> None:
    """All numbers finite; some outputs of all parts, and gradients at the end, within the error budget."""
    x = draw(case, dtype)
    values = run(whole, TRITON, case, x)
    for name, value in values.items():
        assert torch.isfinite(value).all(), f"{name} is not finite"
        assert (value != 0).any(), f"{name} is 0"
    rows = [(t, h) for t in (0, case.block_size, case.T // 3, case.T - 1) for h in (0, case.H // 3, case.H - 1)]
    assert_rows_within_budget(case, x, rows, torch.stack([values["o"][0, t, h] for t, h in rows]))
    do = DeviceRandom(seed=1)(values["o"].shape, torch.bfloat16)  # as in `run`
    plain, exact = (gradients_at_the_end(case, x, do, of) for of in (dtype, torch.float64))
    for name, expected in exact.items():
        actual = values[f"gradient of {name}"][0, -len(expected) :]
        actual = actual[:, -expected.shape[1] :] if name in ("q", "gates") else actual[:, -1]
        assert_within_budget(actual, plain[name], expected, f"gradient of {name}", terms=case.terms)


def test_64k_tokens(compiled: None) -> None:
    assert_long_sequence(LONG, torch.bfloat16)


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_of_both_passes(recompute: bool, compiled: None) -> None:
    """Above the inputs, in tensors as large as q: the output and those of the branches, later dq and parts of it."""
    x = draw(LONG, torch.bfloat16)
    names = BRANCHES[whole]
    inputs, upstream = [x[name] for name in names], torch.ones_like(x["q"])
    for _ in range(2):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        o = nsa.nsa_attention(*inputs, **LONG.whole, backend="triton", recompute=recompute)
        kept = torch.cuda.memory_allocated() - before
        torch.autograd.grad(o, inputs, upstream)
        peak = torch.cuda.max_memory_allocated() - before
    size = x["q"].numel() * x["q"].element_size()
    assert kept <= (3.2 if recompute else 4.2) * size and peak <= 4.4 * size


def test_a_million_tokens() -> None:
    """Queries behind 2^31 numbers."""
    assert_long_sequence(replace(LONG, name="1M", T=2**20 + 2048, H=16, K=1), torch.bfloat16)


def test_many_key_heads() -> None:
    """Keys and values behind 2^31 numbers, too."""
    assert_long_sequence(replace(LONG, name="128 heads", T=2**17 + 64, H=128, K=128), torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------------------
# Training, host synchronisation, CUDA graphs
# ---------------------------------------------------------------------------------------------------------------------


def train(dtype: torch.dtype, use_flash: bool, tokens: int, steps: int = 10) -> tuple[Tensor, Tensor]:
    """Losses (steps) and final parameters of a small stack that learns random text by heart."""
    torch.manual_seed(0)
    cfg = nsa.NSAConfig(dim=128, heads=4, kv_heads=2, seq_len=tokens, block_size=16, stride=8, select_block_size=32,
                        topk_blocks=4, init_blocks=1, local_window=48, rope_theta=1e4, use_flash=use_flash)  # fmt: skip
    model = nn.Sequential(nn.Embedding(50, 128), nsa.NSABlock(cfg), nsa.NSABlock(cfg), nn.Linear(128, 50)).to(dtype)
    text = torch.randint(50, (2, tokens + 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_trains_alike(tokens: int) -> None:
    """Ten steps with the kernels stay as close to float64 as ten steps of the PyTorch path do."""
    runs = ((torch.float32, True), (torch.float32, False), (torch.float64, False))
    losses, parameters = zip(*(train(dtype, use_flash, tokens) for dtype, use_flash in runs), strict=True)
    assert losses[2][-1] < losses[2][0], "it learns"
    assert_within_budget(*losses, "losses", terms=2 * tokens)
    assert_within_budget(*parameters, "parameters after ten steps", terms=2 * tokens)


@with_kernels
@pytest.mark.parametrize("method", ["grouped_mlp", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [417, 33_001])
@pytest.mark.parametrize("D, block_size, stride", [(64, 32, 32), (128, 32, 16), (80, 24, 4)])
def test_compression(
    D: int, block_size: int, stride: int, tokens: int, packed: bool, dtype: torch.dtype, method: str, random: Random
) -> None:
    """Keys and values, few and many rows, which differ in tiles and splits; twice the same bits."""
    compressors = []
    for _ in range(2):
        with torch.device(DEVICE):
            compressors.append(nsa.TokenCompressor(D, block_size, stride, method).to(dtype))
        for parameter in compressors[-1].parameters():
            parameter.data = random(parameter.shape, dtype) * 0.1
    lengths = (0, tokens // 3, 1, 31, tokens - tokens // 3 - 32, 0) if packed else (tokens,)
    segments, B, C = None, 1 if packed else 2, sum(max((n - block_size) // stride + 1, 0) for n in lengths)
    if packed:
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=DEVICE)
        segments = nsa._triton_segments(cu_seqlens, tokens, tokens // stride, block_size, stride)
    inputs = [random((B, tokens, 4, D), dtype) for _ in compressors]
    upstream = [random((B, C, 4, D), dtype) for _ in compressors]

    def step(kernels: bool, dtype: torch.dtype = dtype) -> list[Tensor]:
        given = [x.to(dtype).requires_grad_() for x in inputs]
        pairs = list(zip(compressors, given, strict=True))
        if kernels:
            outputs = nsa._compress_heads(*((c.method, x) for c, x in pairs), segments=segments)
            assert all("Compression" in y.grad_fn.name() for y in outputs)
            outputs = [y[:, :C] for y in outputs]
        else:
            each = [[c.to(dtype)(part, heads=True) for part in x.split(lengths, dim=1)] for c, x in pairs]
            outputs = [torch.cat(parts, dim=1) for parts in each]
        leaves = [*given, *(p for c in compressors for p in c.parameters())]
        return [*outputs, *torch.autograd.grad(outputs, leaves, [g.to(dtype) for g in upstream])]

    actual, again = step(True), step(True)
    alone = nsa._compress_heads((compressors[0].method, inputs[0]), segments=segments)[0][:, :C]
    for compressor in compressors:
        compressor.method.config = nsa.NSAConfig(use_flash=False)
    plain, exact = step(False), step(False, torch.float64)
    names = [f"{name} of {x}" for name in ("y", "dx") for x in "kv"]
    names += [f"{name} of {x}" for x in "kv" for name in dict(compressors[0].named_parameters())]
    assert_within_budget(alone, plain[0], exact[0], "y of k alone", terms=block_size * D)
    for name, a, b, *others in zip(names, actual, again, plain, exact, strict=True):
        assert torch.equal(a, b), name
        assert_within_budget(a, *others, name, terms=block_size * D + 2 * tokens)


@with_kernels
def test_ten_steps_of_training() -> None:
    q = torch.empty(1, 1, 1, 32)
    assert nsa._choose_backend("auto", q, q, 1.0) == "auto"
    assert_trains_alike(tokens=384)


STEADY = real(1, 64)
in_rows_and_packed = pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])


def draw_steady(packed: bool, seed: int = 20250216) -> tuple[Library, Case, dict[str, Tensor]]:
    """Inputs; those of packed sequences have rows of compressed keys for any lengths."""
    if not packed:
        return TRITON, STEADY, draw(STEADY, torch.bfloat16, seed)
    of, case, x = draw_packed(PACKED[0][0], torch.bfloat16, seed)
    rows = (1, sum(LENGTHS) // case.stride, case.K, case.D)
    random = DeviceRandom(seed)
    return of, case, x | {name: random(rows, torch.bfloat16).requires_grad_() for name in ("k_cmp", "v_cmp")}


@contextmanager
def no_waiting() -> Iterator[None]:
    """Makes it an error that the host waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(
    step: Callable[[], Sequence[Tensor]], before: Callable[[], object] = lambda: None
) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A CUDA graph of a step, and the tensors that it returns, which each replay fills.

    Beforehand the step is run twice, on another stream; then what comes `before` it, outside of the graph.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    before()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [y.detach() for y in step()]
    return graph, outputs


@every_branch
@in_rows_and_packed
def test_the_host_never_waits(branch: Branch, packed: bool, compiled: None) -> None:
    of, case, x = draw_steady(packed)
    leaves = [x[name] for name in BRANCHES[branch]]

    def step() -> tuple[Tensor, ...]:
        outputs = branch(of, case, x)[:1]
        return outputs + torch.autograd.grad(outputs, leaves, [torch.ones_like(outputs[0])], allow_unused=True)

    step()  # kernels are compiled and loaded
    with no_waiting():
        step()


@in_rows_and_packed
def test_cuda_graph_of_forward_and_backward(packed: bool, compiled: None) -> None:
    """Captured once, replayed on other numbers and other lengths: the same bits as without a graph."""
    of, case, x = draw_steady(packed)
    other = draw_steady(packed, seed=3)[2]
    leaves = [x[name] for name in BRANCHES[whole]]
    upstream = DeviceRandom(seed=1)(x["q"].shape, torch.bfloat16)

    def step() -> tuple[Tensor, ...]:
        (o,) = whole(of, case, x)
        return o, *torch.autograd.grad(o, leaves, upstream)

    graph, captured = capture(step)
    with torch.no_grad():
        for name in BRANCHES[whole]:
            x[name].copy_(other[name])
        if packed:
            of.cu_seqlens.copy_(edges(reversed(LENGTHS)))
    graph.replay()
    for name, actual, expected in zip(("o", *BRANCHES[whole]), captured, step(), strict=True):
        assert torch.equal(actual, expected), f"{name} differs from what runs without a graph"
        assert torch.isfinite(actual).all(), f"{name} is not finite"


@pytest.mark.parametrize("G", [4, 16])
def test_cuda_graph_goes_the_other_way(G: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay on other lengths decides anew between the mask and the index."""
    answers, ask, packing = [], nsa._by_mask, Packing(real(G, 64), (256,) * 4)
    monkeypatch.setattr(nsa, "_by_mask", lambda *given: answers.append(ask(*given)) or answers[-1])
    monkeypatch.setattr(nsa, "_SLOT_KEYS", dict.fromkeys(nsa._SLOT_KEYS, -56))  # a slot is worth 8 keys
    monkeypatch.setattr(nsa, "_MASKED_KEYS", dict.fromkeys(nsa._MASKED_KEYS, G * 400_000))
    monkeypatch.setattr(nsa, "_ROWS_IN_DOUBT", 0)
    of, case, x = draw_packed(packing, torch.bfloat16)
    rows = (1, 1024 // case.stride, case.K, case.D)
    x |= {name: DeviceRandom(1)(rows, torch.bfloat16).requires_grad_() for name in ("k_cmp", "v_cmp")}
    leaves = [x[name] for name in BRANCHES[whole]]

    def step() -> tuple[Tensor, ...]:
        (o,) = whole(of, case, x)
        return o, *torch.autograd.grad(o, leaves, torch.ones_like(o))

    graph, captured = capture(step)
    in_graph = answers[-2:]
    for lengths, by_mask in (((256,) * 4, True), ((900, 60, 60, 4), False), ((200, 300, 274, 250), True)):
        of.cu_seqlens.copy_(edges(lengths))
        graph.replay()
        assert [answer.item() for answer in in_graph] == [by_mask] * 2
        for name, actual, expected in zip(("o", *BRANCHES[whole]), captured, step(), strict=True):
            assert torch.equal(actual, expected), f"{name} differs from what runs without a graph"


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("branch", [selective, whole], ids=lambda branch: branch.__name__)
def test_garbage(branch: Branch, seed: int) -> None:
    """Any cu_seqlens and block indices give, to the bit, what the offsets give that they are read as."""
    case = replace(real(4, 128, T=777), B=1)
    given, read = wild_offsets(seed, case.T, (torch.int32, torch.int64)[seed % 2])
    random = DeviceRandom(seed)
    x = case.tensors(random, torch.bfloat16)
    x["block_indices"] = random.integers(-(2**31), 2**31, (1, case.T, case.K, case.topk_blocks)).int()
    blocks = sum(oracle.compressed_count(n, case.block_size, case.stride) for n in read.diff().tolist())
    rows = (1, case.T // case.stride, case.K, case.D)
    spare = (torch.arange(rows[1]) >= blocks)[:, None, None]
    for name in ("k_cmp", "v_cmp"):
        x[name] = random(rows, torch.bfloat16).masked_fill(spare, torch.nan).requires_grad_()
    actual, expected = (run(branch, Packed(offsets, "triton"), case, x) for offsets in (given, read))
    for name, value in expected.items():
        assert torch.equal(actual[name], value), f"{name} of {given.tolist()}"
        assert value.isfinite().all(), name


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("case, dtype", SWEEP, ids=str)
def test_step_of_decoding(case: Case, dtype: torch.dtype, new: int, random: Random, compiled: None) -> None:
    step = of_every_length(case, new)
    x = inputs(case, step, random, dtype)
    with poisoned_memory():
        actual = decode(case, step, x)
    assert_step_as_exact_as_plain(case, step, x, actual)


def test_chunk_of_1000_tokens(random: Random) -> None:
    """More than the partial results of one chunk may take."""
    case = real(16, 64, T=1100)
    step = Step((case.T, 700), (1000, 1))
    x = inputs(case, step, random, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nsa, "_DECODE_BYTES", 64 << 20)
        actual = decode(case, step, x)
    assert_step_as_exact_as_plain(case, step, x, actual)


def test_step_after_64k_tokens(compiled: None) -> None:
    """Against single rows: nothing of size T × T."""
    x = {name: tensor.detach() for name, tensor in draw(LONG, torch.bfloat16).items()}
    step = Step((LONG.T,), (3,), spare=LONG.T)  # room for twice as many tokens
    actual = decode(LONG, step, x | {"k_local": x["k"], "v_local": x["v"]})[0]  # (3, H, D)
    rows = [(t, h) for t in range(LONG.T - 3, LONG.T) for h in (0, 21, 42, 63)]
    assert_rows_within_budget(LONG, x, rows, torch.stack([actual[t - LONG.T, h] for t, h in rows]))


def test_cuda_graph_of_a_step(random: Random) -> None:
    """Captured at some positions and replayed at others, with other queries: the host neither waits nor knows."""
    case, dtype = real(16, 128), torch.bfloat16
    steps = Step((900, 500, 3), (2, 1, 2)), Step((case.T, 64, 1), (2, 2, 1))
    x = inputs(case, steps[0], random, dtype)
    positions = steps[0].positions()
    first = steps[0].first()
    cache = as_cache(*(x[name] for name in ("k", "v", "k_local", "v_local", "k_cmp", "v_cmp")))
    arguments = (*cache, torch.logit(at(x["gates"], positions)))
    q, settings = at(x["q"], positions), (case.window, sizes(case), case.D**-0.5)

    def run_step() -> Tensor:
        return nsa._triton_decode(q, *arguments, first, None, *settings)

    run_step()
    with no_waiting():
        run_step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_step()
    for step in steps:
        first.copy_(step.first())
        q.copy_(random(q.shape, dtype))
        graph.replay()
        assert torch.equal(captured, run_step()) and torch.isfinite(captured).all()


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile
# ---------------------------------------------------------------------------------------------------------------------

# Every block is chosen: bfloat16 and float64 would choose different ones.
COMPILED = nsa.NSAConfig(dim=128, heads=4, kv_heads=2, seq_len=512, block_size=32, stride=16, select_block_size=64,
                         topk_blocks=8, local_window=100, gate_mode="q_cond", rope_theta=1e4)  # fmt: skip

SCALED = replace(COMPILED, rope_theta=None, rope_frequencies=tuple(0.6**i for i in range(16)), rope_scale=1.2,
                 qk_norm=1e-6)  # fmt: skip


def fresh_block(dtype: torch.dtype, use_flash: bool, cfg: nsa.NSAConfig = COMPILED) -> nn.Module:
    torch.manual_seed(0)
    return nsa.NSABlock(replace(cfg, use_flash=use_flash)).to(dtype)


def block_step(call: Callable[[Tensor], Tensor], module: nn.Module, tokens: int, seed: int = 5) -> dict[str, Tensor]:
    """The output and all gradients, by name."""
    dtype = next(module.parameters()).dtype
    x, upstream = (DeviceRandom(seed + i)((2, tokens, COMPILED.dim), torch.bfloat16).to(dtype) for i in range(2))
    leaves = {"x": x.requires_grad_()} | dict(module.named_parameters())
    y = call(x)
    of_leaves = torch.autograd.grad(y, list(leaves.values()), upstream)
    values = {"y": y} | {f"gradient of {name}": g for name, g in zip(leaves, of_leaves, strict=True)}
    return {name: value.detach().clone() for name, value in values.items()}  # a CUDA graph takes its memory back


def assert_block_step(call: Callable[[Tensor], Tensor], module: nn.Module, tokens: int, seed: int = 5) -> None:
    actual = block_step(call, module, tokens, seed)
    plain, exact = (fresh_block(dtype, use_flash=False) for dtype in (torch.bfloat16, torch.float64))
    plain, exact = (block_step(each, each, tokens, seed) for each in (plain, exact))
    for name, value in exact.items():
        assert_within_budget(actual[name], plain[name], value, name, terms=2 * tokens)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@with_kernels
def test_compiled_block_for_any_number_of_tokens(fresh_compiler: None) -> None:
    module = fresh_block(torch.bfloat16, use_flash=True)
    call = torch.compile(module, fullgraph=True, dynamic=True)
    for tokens in (300, 500, 417, 512, 130):
        assert_block_step(call, module, tokens)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@with_kernels
def test_compiled_block_in_cuda_graphs(fresh_compiler: None) -> None:
    module = fresh_block(torch.bfloat16, use_flash=True)
    call = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    for seed in range(5):  # warm-up, recording, replays
        torch.compiler.cudagraph_mark_step_begin()
        assert_block_step(call, module, 417, seed)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    assert skipped == 0, f"{skipped} graphs ran without a CUDA graph"


@with_kernels
def test_compiled_training(fresh_compiler: None) -> None:
    """The language model under bfloat16 autocast: ten steps, compiled and not."""

    def losses(compile: bool) -> Tensor:
        torch.manual_seed(0)
        model = NSALanguageModel(50, COMPILED, layers=2)
        call = torch.compile(model, fullgraph=True) if compile else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        text = torch.randint(50, (4, 385))
        made = []
        for _ in range(10):
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = call(text[:, :-1], text[:, 1:])[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            made.append(loss.detach())
        return torch.stack(made)

    actual, expected = losses(compile=True), losses(compile=False)
    assert expected[-1] < expected[0] - 0.1, "it learns"
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0.0)


@with_kernels
def test_training_script_in_cuda_graphs(tmp_path: Path) -> None:
    """From its start to the text that it writes, steps and evaluations: as without compiling anything."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question; " * 200, encoding="utf-8")

    def losses(name: str, **changes: str) -> list[float]:
        settings = replace(TINY, data=text, out=tmp_path / name, layers=1, iterations=20, eval_interval=10, **changes)
        command = [sys.executable, str(Path(nsa.__file__).with_name("nsa_gpt_training.py")), *flags(settings)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (settings.out / "nsa.jsonl").read_text(encoding="utf-8").splitlines()]
        return [line["loss"] if "loss" in line else line["val"] for line in lines if {"loss", "val"} & line.keys()]

    actual, expected = losses("graphs", compile="reduce-overhead"), losses("eager")
    assert len(actual) > 20 and expected[-1] < expected[0] - 0.1, "it learns"
    assert actual == pytest.approx(expected, rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Modules: nothing waits for the host
# ---------------------------------------------------------------------------------------------------------------------

# All branches weigh the same.
EVEN = replace(COMPILED, gate_init=(0.0, 0.0, 0.0))
SHAPES = {"plain": (2, 300), "packed": (1, 500), "padded": (3, 200), "step": (3, 1), "piece": (3, 40)}
SHAPES |= {"packed_step": (1, 9), "padded_step": (3, 5)}
every_kind = pytest.mark.parametrize("kind", SHAPES)
every_module = pytest.mark.parametrize("of", [nsa.NativeSparseAttention, nsa.NSABlock], ids=lambda of: of.__name__)


class Use:
    """A module and all tensors of a call, which stay where they are: `draw` gives them other contents.

    There are three sequences, those of a cache with up to 300 tokens before the call.
    """

    def __init__(self, kind: str, of: type[nn.Module], max_len: int = 400) -> None:
        torch.manual_seed(0)
        self.module = of(EVEN).to(torch.bfloat16)
        self.attention = getattr(self.module, "attn", self.module)
        self.start = [parameter.detach().clone() for parameter in self.module.parameters()]
        self.x = torch.zeros(*SHAPES[kind], EVEN.dim, dtype=torch.bfloat16)
        self.upstream, self.arguments = torch.zeros_like(self.x), {}
        if kind.startswith("packed"):
            self.arguments["cu_seqlens"] = torch.zeros(4, dtype=torch.int32)
        if kind.startswith("padded"):
            self.arguments["key_padding_mask"] = torch.zeros(SHAPES[kind], dtype=torch.bool)
        cached = kind in ("step", "piece", "packed_step", "padded_step")
        self.cache = nsa.NSACache(EVEN, 3, max_len, device=DEVICE, dtype=torch.bfloat16) if cached else None
        self.draw(0)

    @torch.no_grad()
    def draw(self, seed: int, weights: bool = True) -> None:
        random, pick, total = DeviceRandom(seed), python_random.Random(seed), self.x.shape[1]
        for x in (self.x, self.upstream):
            x.copy_(random(x.shape, x.dtype))
        for parameter, start in zip(self.module.parameters(), self.start, strict=True):
            if weights:
                parameter.copy_(start + 0.05 * random(start.shape, start.dtype))
        if "cu_seqlens" in self.arguments:
            cuts = sorted(pick.randint(0, total) for _ in range(2))
            self.arguments["cu_seqlens"].copy_(torch.tensor([0, *cuts, total]))
        if "key_padding_mask" in self.arguments:
            mask = self.arguments["key_padding_mask"]
            mask.copy_(random(mask.shape) > torch.tensor([-9.0, pick.uniform(-1, 1), pick.uniform(-1, 1)])[:, None])
        if self.cache is not None:
            self.cache.reset()
            most = min(300, self.cache.max_len)
            lengths = torch.tensor([[pick.randint(0, most)] for _ in range(3)])
            prompt = random((3, most, EVEN.dim), torch.bfloat16)
            self.attention(prompt, cache=self.cache, key_padding_mask=torch.arange(most) < lengths)

    def step(self, call: Callable[..., Tensor] | None = None) -> list[Tensor]:
        """The output, and all gradients where there is no cache.

        The leaves are made here: those of another stream could not be captured.
        """
        if self.cache is not None:
            call = self.module if call is None else call
            with torch.no_grad():
                return [call(self.x, cache=self.cache, **self.arguments)]
        x, leaves = self.x.detach().requires_grad_(), dict(self.module.named_parameters())
        if call is None:
            leaves = {name: parameter.detach().requires_grad_() for name, parameter in leaves.items()}
            y = torch.func.functional_call(self.module, leaves, (x,), self.arguments)
        else:
            y = call(x, **self.arguments)
        return [y, *torch.autograd.grad(y, [x, *leaves.values()], self.upstream)]

    def eager(self, seed: int) -> tuple[list[Tensor], tuple[int, ...] | None]:
        """Outputs of a step on those contents, and the cache's lengths after it; the contents are drawn once more."""
        self.draw(seed)
        outputs = [y.detach().clone() for y in self.step()]
        lengths = None if self.cache is None else self.cache.lengths
        self.draw(seed)
        return outputs, lengths


def assert_same(actual: list[Tensor], expected: list[Tensor], tolerance: float = 0.01) -> None:
    """But for the rounding of bfloat16, which another algorithm for a matrix product may do in other places."""
    for i, (value, exact) in enumerate(zip(actual, expected, strict=True)):
        assert exact.isfinite().all() and (exact != 0).any()
        error = ((value.double() - exact.double()).norm() / exact.double().norm()).item()
        assert error <= tolerance, f"tensor {i} differs by {error:.2g}"


@with_kernels
@every_module
@every_kind
def test_the_host_never_waits_for_a_module(kind: str, of: type[nn.Module]) -> None:
    use = Use(kind, of)
    for _ in range(2):
        use.step()
    with no_waiting():
        use.step()


@with_kernels
def test_the_host_never_waits_for_a_cache() -> None:
    use = Use("step", nsa.NSABlock)
    prompt, rows = torch.zeros(3, 30, EVEN.dim, dtype=torch.bfloat16), torch.tensor([2, 0, 5])
    lengths = torch.tensor([20, 11, 30], dtype=torch.int32)
    for waiting in (nullcontext, no_waiting):
        with waiting(), torch.no_grad():
            use.cache.reset()
            use.module(prompt, cache=use.cache)
            use.cache.truncate(lengths)
            use.step()
            use.cache.reorder(rows)  # 2, 0 and the last there is
            use.step()
            use.cache.truncate(25)
            use.cache.reorder([1, 1, 2])
            use.cache.truncate([13, 20, 7])
            use.step()
        assert use.cache.lengths == (14, 21, 8)


@with_kernels
@every_module
@every_kind
def test_a_module_in_a_cuda_graph(kind: str, of: type[nn.Module]) -> None:
    """Captured once, replayed with other inputs, weights, lengths, masks and caches."""
    use = Use(kind, of)
    graph, outputs = capture(use.step)
    for seed in (1, 2, 3):
        expected, lengths = use.eager(seed)
        graph.replay()
        assert_same(outputs, expected)
        assert lengths is None or use.cache.lengths == lengths


TOO_LARGE = ((128, 128, 8, 32, 64),)  # over 500 KiB of shared memory at a head dim of 32


@with_kernels
@pytest.mark.parametrize("warm", [True, False], ids=["before_the_capture", "in_the_capture"])
@pytest.mark.parametrize(
    "tile, kind", [("compressed_forward", "plain"), ("local_dkv", "packed"), ("decode_scan", "step")]
)
def test_a_kernel_that_does_not_fit(tile: str, kind: str, warm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning, and PyTorch from then on, in a CUDA graph too; the error of Triton, if nothing else was allowed."""
    monkeypatch.setattr(EVEN, "backend", "torch")
    use = Use(kind, nsa.NSABlock)
    plain, _ = use.eager(1)
    monkeypatch.setattr(EVEN, "backend", "auto")
    use.eager(1)  # all other kernels are compiled and loaded
    for plan in (nsa._span_forward_plan, nsa._span_backward_plan, nsa._decode_plan):
        plan.cache_clear()
    monkeypatch.setitem(nsa._TILES, tile, (TOO_LARGE,) * 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if warm:
            assert_same(use.eager(1)[0], plain, 0.03)
            graph, outputs = capture(use.step)
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = [y.detach() for y in use.step()]
    said = [str(warning.message) for warning in caught if "from now on PyTorch" in str(warning.message)]
    assert len(said) == 1 and "out of resource: shared memory" in said[0], said
    assert torch.cuda.get_device_name() in said[0] and "cuda:0, torch.bfloat16, head dim 32" in said[0]
    for seed in (1, 2):
        expected, _ = use.eager(seed)
        graph.replay()
        assert_same(outputs, expected, 0.01 if warm else 0.03)  # in the graph, other kernels work
    assert "out of resource" in nsa.which_backend(DEVICE, torch.bfloat16, 32).reason
    nsa._FAILURES.clear()
    monkeypatch.setattr(EVEN, "backend", "triton")
    with pytest.raises(RuntimeError, match=r"_kernel cannot run on .*: OutOfResources: .*shared memory"):
        use.eager(3)


@with_kernels
@pytest.mark.parametrize("kind", ["step", "piece", "packed_step"])
def test_a_graph_of_the_first_call_serves_later_ones(kind: str) -> None:
    """The cache is empty when the call is captured, and is not when it is replayed."""
    use = Use(kind, nsa.NSABlock)
    graph, outputs = capture(use.step, before=use.cache.reset)
    expected, lengths = use.eager(1)
    graph.replay()
    assert_same(outputs, expected)
    assert use.cache.lengths == lengths


@with_kernels
@pytest.mark.parametrize("cfg", [COMPILED, SCALED], ids=["theta", "frequencies"])
@torch.no_grad()
def test_300_captured_steps(cfg: nsa.NSAConfig) -> None:
    """Steps of two rows, against one forward."""
    x, module = DeviceRandom(3)((2, 340, cfg.dim), torch.bfloat16), fresh_block(torch.bfloat16, True, cfg)
    plain, exact = (fresh_block(dtype, False, cfg) for dtype in (torch.bfloat16, torch.float64))
    cache = nsa.NSACache(module.attn.cfg, 2, 400, device=DEVICE, dtype=torch.bfloat16)
    outputs, token = [module(x[:, :40], cache=cache)], x[:, 40:41].clone()
    graph, (y,) = capture(lambda: [module(token, cache=cache)], before=lambda: cache.truncate(40))
    for t in range(40, 340):
        token.copy_(x[:, t : t + 1])
        graph.replay()
        outputs.append(y.clone())
    assert cache.lengths == (340, 340)
    assert_within_budget(torch.cat(outputs, dim=1), plain(x), exact(x.double()), "y", terms=2 * 340)


@with_kernels
@pytest.mark.parametrize("kind", ["plain", "packed", "padded"])
def test_training_steps_in_a_cuda_graph(kind: str) -> None:
    """Forward, backward and optimizer, with other tokens and other lengths in each step."""
    use = Use(kind, nsa.NSABlock)

    def training_step(module: nn.Module) -> Callable[[], list[Tensor]]:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)

        def step() -> list[Tensor]:
            optimizer.zero_grad(set_to_none=True)
            loss = (module(use.x, **use.arguments).float() - use.upstream).square().mean()
            loss.backward()
            optimizer.step()
            return [loss]

        return step

    graph, (loss,) = capture(training_step(use.module))
    start = copy.deepcopy(use.module.state_dict())
    losses, expected = [], []
    twin = nsa.NSABlock(EVEN).to(torch.bfloat16)
    twin.load_state_dict(start)
    eager = training_step(twin)
    for seed in range(10):
        use.draw(seed % 2, weights=False)
        expected.append(eager()[0].detach())
        graph.replay()
        losses.append(loss.clone())
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected), rtol=0.02, atol=0.0)
    assert expected[-2] < expected[0] and expected[-1] < expected[1], "it learns"
    for name, value in twin.state_dict().items():
        moved, apart = (value - start[name]).norm(), (value - use.module.state_dict()[name]).norm()
        assert apart <= 0.2 * moved, f"{name} went elsewhere"


@with_kernels
@pytest.mark.parametrize("kind", ["packed", "padded", "step", "packed_step"])
def test_compiled_once_for_all_lengths(kind: str, fresh_compiler: None) -> None:
    use = Use(kind, nsa.NSABlock)
    call = torch.compile(use.module, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(5):
            expected, lengths = use.eager(seed)
            assert_same(use.step(call), expected, tolerance=0.05)
            assert lengths is None or use.cache.lengths == lengths


@with_kernels
@every_module
@pytest.mark.parametrize("kind", ["packed", "packed_step"])
def test_garbage_in_a_module(kind: str, of: type[nn.Module]) -> None:
    use = Use(kind, of)
    for seed in range(6):
        results = []
        for cu_seqlens in wild_offsets(seed, use.x.shape[1], (torch.int32, torch.int64)[seed % 2], n=3):
            use.arguments["cu_seqlens"] = cu_seqlens
            if use.cache is not None:
                use.draw(seed, weights=False)  # once more, so as to begin alike
                use.arguments["cu_seqlens"] = cu_seqlens
            results.append(use.step())
        assert_same(*results)


@with_kernels
@pytest.mark.parametrize("kind", ["step", "piece", "packed_step", "padded_step"])
def test_a_full_cache_in_a_cuda_graph(kind: str) -> None:
    """Never written past its end: what had room stays, the memory around it too, and the rows go on after a cut."""
    use = Use(kind, nsa.NSABlock, max_len=70)
    margins = surround(use.cache)
    graph, outputs = capture(use.step)
    use.draw(1)
    before, tokens, blocks = use.cache.lengths, use.cache.tokens.clone(), use.cache.blocks.clone()
    for _ in range(80):
        graph.replay()
    for name, margin in margins.items():
        assert (margin == 7).all(), f"written outside of {name}"
    grew = torch.tensor(use.cache.lengths) > torch.tensor(before)
    assert use.cache.lengths == tuple(torch.where(grew, 70, torch.tensor(before)).tolist()) and grew.any()
    for row, n in enumerate(before):
        full = oracle.compressed_count(n, EVEN.block_size, EVEN.stride)
        assert torch.equal(use.cache.tokens[:, row, :n], tokens[:, row, :n])
        assert torch.equal(use.cache.blocks[:, row, :full], blocks[:, row, :full])
    lengths = [min(n, 15) for n in before]
    use.cache.truncate(lengths)
    twin = nsa.NSACache(EVEN, 3, 70, device=DEVICE, dtype=torch.bfloat16)
    twin.tokens.copy_(use.cache.tokens), twin.blocks.copy_(use.cache.blocks), twin.seqlens.copy_(use.cache.seqlens)
    twin._know(tuple(lengths))
    with torch.no_grad():
        expected = use.module(use.x, cache=twin, **use.arguments)
    graph.replay()
    assert_same(outputs, [expected])
    assert use.cache.lengths == twin.lengths


PROMPT = replace(COMPILED, seq_len=1024, topk_blocks=16)


@with_kernels
@pytest.mark.parametrize("pieces", [(1000,), (400, 1, 599), (16, 17, 967), (512, 488)], ids=str)
@torch.no_grad()
def test_a_prompt_in_pieces(pieces: tuple[int, ...]) -> None:
    x, module = DeviceRandom(2)((2, 1000, COMPILED.dim), torch.bfloat16), fresh_block(torch.bfloat16, True, PROMPT)
    plain, exact = (fresh_block(dtype, False, PROMPT) for dtype in (torch.bfloat16, torch.float64))
    cache = nsa.NSACache(PROMPT, 2, 1000, device=DEVICE, dtype=torch.bfloat16)
    y = torch.cat([module(part, cache=cache) for part in x.split(pieces, dim=1)], dim=1)
    assert_within_budget(y, plain(x), exact(x.double()), "y", terms=2 * 1000)


@with_kernels
@torch.no_grad()
def test_ragged_prompts_in_pieces() -> None:
    """Rows of different lengths go on together, by padding and packed."""
    x, module = DeviceRandom(2)((2, 1000, COMPILED.dim), torch.bfloat16), fresh_block(torch.bfloat16, True, PROMPT)
    plain, exact = (fresh_block(dtype, False, PROMPT) for dtype in (torch.bfloat16, torch.float64))
    cache, y, starts = nsa.NSACache(PROMPT, 2, 1000, device=DEVICE, dtype=torch.bfloat16), torch.zeros_like(x), [0, 0]
    for counts, packed in zip(
        ([300, 180], [40, 200], [1, 7], [59, 13], [600, 600]), cycle([False, True]), strict=False
    ):
        spans = [slice(start, start + n) for start, n in zip(starts, counts, strict=True)]
        rows = [x[row, span] for row, span in enumerate(spans)]
        if packed:
            new = module(torch.cat(rows)[None], cache=cache, cu_seqlens=edges(counts))[0].split(counts)
        else:
            mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
            padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
            new = [row[m] for row, m in zip(module(padded, cache=cache, key_padding_mask=mask), mask, strict=True)]
        for row, span in enumerate(spans):
            y[row, span] = new[row]
        starts = [span.stop for span in spans]
    assert starts == [1000, 1000] and cache.lengths == (1000, 1000)
    assert_within_budget(y, plain(x), exact(x.double()), "y", terms=2 * 1000)
