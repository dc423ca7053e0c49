"""The Triton kernels on a GPU, at real sizes: the error budget, determinism, training, 64k tokens, CUDA graphs.

Outputs are held to float64 on the same GPU: at most twice the error of plain PyTorch at the same precision.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import (
    BRANCHES,
    BRANCHES_AND_WAYS,
    CASES,
    IN_KERNELS,
    LAYOUTS,
    TRITON,
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
    every_branch,
    every_branch_every_way,
    going,
    inputs,
    local,
    of_every_length,
    sizes,
    whole,
)
from conftest import assert_step_as_exact_as_plain, assert_within_budget, choice_tolerance
from torch import Tensor, nn
from training_runs import TINY, flags

import native_sparse_attention as nsa
from nsa_gpt_training import NSALanguageModel

pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_hopper = pytest.mark.skipif(
    DEVICE == "cuda" and torch.cuda.get_device_capability()[0] != 9, reason="'auto' takes the kernels on Hopper only"
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
    """Tensors made without a device, those of the oracle among them, are on the GPU."""
    with torch.device(DEVICE):
        yield


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
        for branch, way in BRANCHES_AND_WAYS:
            with going(way):
                run(branch, of, case, x)


@pytest.fixture(scope="module")
def compiled() -> None:
    """Compile what the tests below need with all cores: one after the other it would take longer than the tests."""
    jobs = [*SWEEP, (LONG, torch.bfloat16), *((LAYOUT_CASE, torch.bfloat16, layout) for layout in LAYOUTS)]
    jobs = [*((warm_up, *job) for job in jobs), *((warm_up_packed, *job) for job in PACKED)]
    processes = min(len(jobs), len(os.sched_getaffinity(0)), 16)
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


def exact_row(case: Case, x: dict[str, Tensor], t: int, h: int) -> Tensor:
    """The output (D) of one query head at one token, in the dtype of x, by the rules of the oracle."""
    kv_head = h // (case.H // case.K)
    q, k, v, k_cmp, v_cmp = (x[name].detach()[0] for name in ("q", "k", "v", "k_cmp", "v_cmp"))
    window = torch.arange(max(0, t - case.window + 1), t + 1)
    blocks = torch.tensor(oracle.visible_blocks(t, case.T, case.block_size, case.stride), dtype=torch.int64)
    chosen = x["block_indices"][0, t, kv_head].long()
    tokens = (chosen[chosen >= 0, None] * case.select_block_size + torch.arange(case.select_block_size)).flatten()
    outputs = [
        oracle.attend(q[t, h], keys[rows, kv_head], values[rows, kv_head], case.D**-0.5)[0]
        for keys, values, rows in ((k, v, window), (k_cmp, v_cmp, blocks), (k, v, tokens[tokens <= t]))
    ]
    return (x["gates"].detach()[0, t, h, :, None] * torch.stack(outputs)).sum(dim=0)


def assert_long_sequence(case: Case, dtype: torch.dtype) -> None:
    """All numbers finite, and a few rows near the ends and in the middle within the error budget."""
    x = draw(case, dtype)
    values = run(whole, TRITON, case, x)
    for name, value in values.items():
        assert torch.isfinite(value).all(), f"{name} is not finite"
        assert (value != 0).any(), f"{name} is 0"
    rows = [(t, h) for t in (0, case.block_size, case.T // 3, case.T - 1) for h in (0, case.H // 3, case.H - 1)]
    exact = double({name: tensor for name, tensor in x.items()})
    assert_within_budget(
        torch.stack([values["o"][0, t, h] for t, h in rows]),
        torch.stack([exact_row(case, x, t, h) for t, h in rows]),
        torch.stack([exact_row(case, exact, t, h) for t, h in rows]),
        "o",
        terms=case.terms,
    )


def test_64k_tokens(compiled: None) -> None:
    assert_long_sequence(LONG, torch.bfloat16)


def test_a_million_tokens() -> None:
    """Offsets beyond 32 bits."""
    assert_long_sequence(replace(LONG, name="1M", T=2**20, H=16, K=1), torch.bfloat16)


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


@on_hopper
@pytest.mark.parametrize("method", ["grouped_mlp", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [417, 33_001])
@pytest.mark.parametrize("D, block_size, stride", [(64, 32, 32), (128, 32, 16), (80, 24, 4)])
def test_compression(
    D: int, block_size: int, stride: int, tokens: int, dtype: torch.dtype, method: str, random: Random
) -> None:
    """Few and many rows, which differ in tiles and splits; twice the same bits."""
    with torch.device(DEVICE):
        compressor = nsa.TokenCompressor(D, block_size, stride, method).to(dtype)
    for parameter in compressor.parameters():
        parameter.data = random(parameter.shape, dtype) * 0.1
    x, upstream = random((2, tokens, 4, D), dtype), random((2, (tokens - block_size) // stride + 1, 4, D), dtype)

    def step(compressor: nn.Module, x: Tensor, kernels: bool) -> list[Tensor]:
        y = compressor(x.requires_grad_(), heads=True)
        assert ("Compression" in y.grad_fn.name()) == kernels
        return [y, *torch.autograd.grad(y, [x, *compressor.parameters()], upstream.to(y.dtype))]

    actual, again = (step(compressor, x, True) for _ in range(2))
    compressor.method.config = nsa.NSAConfig(use_flash=False)
    plain, exact = step(compressor, x, False), step(compressor.double(), x.detach().double(), False)
    names = ["y", "dx", *dict(compressor.named_parameters())]
    for name, a, b, *others in zip(names, actual, again, plain, exact, strict=True):
        assert torch.equal(a, b), name
        assert_within_budget(a, *others, name, terms=block_size * D + 2 * tokens)


@on_hopper
def test_ten_steps_of_training() -> None:
    q = torch.empty(1, 1, 1, 32)
    assert nsa._choose_backend("auto", q, q, 1.0) == "triton"
    assert_trains_alike(tokens=384)


STEADY = real(1, 64)
in_rows_and_packed = pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])


def draw_steady(packed: bool, seed: int = 20250216) -> tuple[Library, Case, dict[str, Tensor]]:
    if packed:
        return draw_packed(PACKED[0][0], torch.bfloat16, seed)
    return TRITON, STEADY, draw(STEADY, torch.bfloat16, seed)


@every_branch
def test_the_host_never_waits(branch: Branch, compiled: None) -> None:
    """For packed sequences it does, to read cu_seqlens."""
    of, case, x = draw_steady(packed=False)
    leaves = [x[name] for name in BRANCHES[branch]]

    def step() -> tuple[Tensor, ...]:
        outputs = branch(of, case, x)[:1]
        return outputs + torch.autograd.grad(outputs, leaves, [torch.ones_like(outputs[0])], allow_unused=True)

    step()  # kernels are compiled and loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@in_rows_and_packed
def test_cuda_graph_of_forward_and_backward(packed: bool, compiled: None) -> None:
    """Captured once, replayed on other numbers: the same bits as without a graph."""
    of, case, x = draw_steady(packed)
    other = draw_steady(packed, seed=3)[2]
    leaves = [x[name] for name in BRANCHES[whole]]
    upstream = DeviceRandom(seed=1)(x["q"].shape, torch.bfloat16)

    def step() -> tuple[Tensor, ...]:
        (o,) = whole(of, case, x)
        return o, *torch.autograd.grad(o, leaves, upstream)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for name in BRANCHES[whole]:
            x[name].copy_(other[name])
    graph.replay()
    for name, actual, expected in zip(("o", *BRANCHES[whole]), captured, step(), strict=True):
        assert torch.equal(actual, expected), f"{name} differs from what runs without a graph"
        assert torch.isfinite(actual).all(), f"{name} is not finite"


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
    assert_within_budget(
        torch.stack([actual[t - LONG.T, h] for t, h in rows]),
        torch.stack([exact_row(LONG, x, t, h) for t, h in rows]),
        torch.stack([exact_row(LONG, double(x), t, h) for t, h in rows]).detach(),
        "o",
        terms=LONG.terms,
    )


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
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
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


def fresh_block(dtype: torch.dtype, use_flash: bool) -> nn.Module:
    torch.manual_seed(0)
    return nsa.NSABlock(replace(COMPILED, use_flash=use_flash)).to(dtype)


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


@on_hopper
def test_compiled_block_for_any_number_of_tokens(fresh_compiler: None) -> None:
    module = fresh_block(torch.bfloat16, use_flash=True)
    call = torch.compile(module, fullgraph=True, dynamic=True)
    for tokens in (300, 500, 417, 512, 130):
        assert_block_step(call, module, tokens)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@on_hopper
def test_compiled_block_in_cuda_graphs(fresh_compiler: None) -> None:
    module = fresh_block(torch.bfloat16, use_flash=True)
    call = torch.compile(module, fullgraph=True, mode="reduce-overhead")
    for seed in range(5):  # warm-up, recording, replays
        torch.compiler.cudagraph_mark_step_begin()
        assert_block_step(call, module, 417, seed)
    skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    assert skipped == 0, f"{skipped} graphs ran without a CUDA graph"


@on_hopper
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


@on_hopper
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
