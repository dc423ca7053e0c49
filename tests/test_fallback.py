"""Kernels that cannot be launched: one warning, then PyTorch, whatever was half done; `which_backend` says why."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import Random, build, going, interpreted, slow
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import native_sparse_attention as nsa
from native_sparse_attention import NativeSparseAttention, which_backend

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # −inf − −inf, as on a GPU

SIZES = {"dim": 32, "heads": 2, "kv_heads": 1, "dim_head": 16, "seq_len": 64, "local_window": 9}
BLOCKS = {"block_size": 8, "stride": 4, "select_block_size": 8, "topk_blocks": 8}  # every block is chosen
FIELDS = SIZES | BLOCKS | {"rope_theta": 100.0, "gate_mode": "q_cond"}


class Failing:
    """Kernel of which no launch succeeds."""

    def __init__(self, kernel: Any, error: BaseException) -> None:
        self.fn, self.error, self.launches = kernel.fn, error, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches += 1
        raise self.error


def too_large() -> Exception:
    return nsa.triton.runtime.errors.OutOfResources(300000, 232448, "shared memory")


@pytest.fixture(autouse=True)
def preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" takes the kernels, as on a GPU."""
    if nsa.triton is not None:
        kernels = nsa._BACKENDS["triton"]._replace(preferred=lambda device: True)
        monkeypatch.setitem(nsa._BACKENDS, "triton", kernels)
        monkeypatch.setattr(nsa, "_triton_preferred", lambda device: True)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Failing]:
    def plant(kernel: str, error: BaseException | None = None) -> Failing:
        failing = Failing(getattr(nsa, f"_{kernel}_kernel"), too_large() if error is None else error)
        monkeypatch.setattr(nsa, f"_{kernel}_kernel", failing)
        return failing

    return plant


@contextmanager
def one_warning(*said: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", module="triton.runtime.interpreter")
        yield
    texts = [str(warning.message) for warning in caught if "from now on PyTorch" in str(warning.message)]
    assert len(texts) == 1, texts
    assert "\n" not in texts[0] and all(word in texts[0] for word in said), texts[0]


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*from now on PyTorch")
        yield


def assert_alike(actual: list[Tensor], expected: list[list[Tensor]]) -> None:
    """Results are as near to the exact values as PyTorch's, which come first in `expected`, in the same dtype.

    Kernels are held to a budget in other tests. Here they are half of a computation, in which errors grow.
    """
    for i, (a, plain, exact) in enumerate(zip(actual, *expected, strict=True)):
        assert a.dtype == plain.dtype and a.shape == plain.shape
        error, usual = (torch.linalg.vector_norm(x - exact).item() for x in (a, plain))
        limit = 8 * usual + 8 * torch.finfo(a.dtype).eps * torch.linalg.vector_norm(exact).item()
        assert error <= limit, f"number {i} is off by {error:.1e}, PyTorch by {usual:.1e}"


def by_torch(run: Callable[[nn.Module], list[Tensor]], module: NativeSparseAttention) -> list[list[Tensor]]:
    """Results that are expected of a run."""
    module.cfg.backend = "torch"
    expected = [run(module), run(copy.deepcopy(module).double())]
    module.cfg.backend = "auto"
    return expected


# ---------------------------------------------------------------------------------------------------------------------
# Forward and backward
# ---------------------------------------------------------------------------------------------------------------------

BY_INDEX = ("preprocess", "span_forward", "span_dq", "span_dkv", "block_scores", "choose", "count_pairs", "place_pairs",
            "cut_tiles", "selected_by_block", "merge_slots", "selected_gradient", "sum_tiles", "sum_slots")  # fmt: skip
COMPRESSION = ("compress", "compress_output", "compress_dhidden", "compress_dx", "compress_dw")
STEP = ("append", "decode_scan", "decode_attend", "project")
# Kernel, layout of the batch, dtype, way of the selected branch.
TRAINING = [
    *((name, "rows", torch.float32, "by_index") for name in BY_INDEX),
    *((name, "packed", torch.float32, "by_mask") for name in ("segments", "span_dkv")),
    ("cut_tiles", "packed", torch.float32, "by_index"),
    ("by_mask", "packed", torch.float32, "by_rule"),
    ("selected_by_query", "rows", torch.float16, "by_index"),
    *((name, "rows", torch.float16, "by_mask") for name in COMPRESSION),
    *((name, "packed", torch.float16, "by_mask") for name in ("compress", "compress_dx")),
]


def test_every_kernel_is_made_to_fail() -> None:
    every = {name[1:-7] for name in vars(nsa) if name.endswith("_kernel") and name != "_kernel"}
    assert {name for name, *_ in TRAINING} | {*STEP} == every


@pytest.fixture
def trained(random: Random) -> Callable[..., tuple[Callable[[], list[Tensor]], NativeSparseAttention]]:
    """A step of training, which returns its output and all gradients, and its module."""

    def trained(
        layout: str, dtype: torch.dtype, **fields: Any
    ) -> tuple[Callable[..., list[Tensor]], NativeSparseAttention]:
        attention = build(random, dtype, **FIELDS | fields)
        inputs = random((2, 1, 29, 32), dtype)
        packed = {"cu_seqlens": torch.tensor([0, 17, 18, 29], dtype=torch.int32)} if layout == "packed" else {}

        def step(call: nn.Module = attention) -> list[Tensor]:
            x, upstream = inputs.to(call.to_q.weight.dtype).unbind()
            y = call(x.requires_grad_(), **packed)
            return [y.detach(), *torch.autograd.grad(y, [x, *call.parameters()], upstream)]

        return step, attention

    return trained


@interpreted
@pytest.mark.parametrize("kernel, layout, dtype, way", TRAINING, ids=lambda value: str(value).replace("torch.", ""))
def test_training(
    kernel: str, layout: str, dtype: torch.dtype, way: str, trained: Any, plant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, attention = trained(layout, dtype)
    expected = by_torch(step, attention)
    monkeypatch.setattr(nsa, "_LARGE_GROUP", 1 if kernel == "selected_by_query" else 16)
    if kernel == "by_mask":  # only lengths tell
        monkeypatch.setattr(nsa, "_ROWS_IN_DOUBT", 0)
        monkeypatch.setattr(nsa, "_SLOT_KEYS", dict.fromkeys(nsa._SLOT_KEYS, -512))
        monkeypatch.setattr(nsa, "_MASKED_KEYS", dict.fromkeys(nsa._MASKED_KEYS, 32000))
    failing = plant(kernel)
    with going(way):
        with one_warning(f"_{kernel}_kernel", "cpu", "out of resource: shared memory, Required: 300000"):
            assert_alike(step(), expected)
        assert failing.launches == 1
        with no_warning():
            assert_alike(step(), expected)
        assert failing.launches == 1, "it is not tried again"
        name, reason = which_backend("cpu", dtype, 16)
        assert name == "torch" and f"_{kernel}_kernel" in reason

        nsa._FAILURES.clear()
        attention.cfg.backend = "triton"
        with no_warning(), pytest.raises(RuntimeError, match=f"^_{kernel}_kernel cannot run on cpu: ") as raised:
            step()
        assert isinstance(raised.value.__cause__, nsa.triton.runtime.errors.OutOfResources)
    assert not nsa._FAILURES


@interpreted
def test_terms_in_the_layout_of_the_other_backend(random: Random) -> None:
    """Groups of three, which the kernels pad; a gate of 0 and a row that sees nothing, whose lse are infinite."""
    do, *outputs = random((4, 2, 5, 6, 8), torch.float32).unbind()
    lses, gates = list(random((3, 2, 5, 6), torch.float32).unbind()), random((2, 5, 6, 3), torch.float32).sigmoid()
    lses[1][:, 0], gates[0, 1, 2, 0] = -torch.inf, 0.0
    plain, by_kernel = (
        of(do, outputs, lses, 2, gates=gates)[0] for of in (nsa._torch_preprocess, nsa._triton_preprocess)
    )
    torch.testing.assert_close(nsa._torch_terms(by_kernel, do), plain)
    torch.testing.assert_close(nsa._torch_terms(nsa._kernel_terms(plain, do, 2), do), plain)
    rows = [nsa._existing_rows(terms, do) for terms in (nsa._kernel_terms(plain, do, 2), by_kernel)]
    torch.testing.assert_close(*rows)


@interpreted
@pytest.mark.parametrize("kernel", ["compress", "compress_dx"])
@pytest.mark.parametrize("method", ["grouped_mlp", "conv1d"])
def test_a_compressor_by_itself(kernel: str, method: str, plant: Any, random: Random) -> None:
    compressor = nsa.TokenCompressor(16, 8, 4, method).half()
    inputs, upstream = random((2, 29, 3, 16), torch.float16), random((2, 6, 3, 16), torch.float16)

    def run(module: nn.Module) -> list[Tensor]:
        x = inputs.to(module.method.position.dtype).requires_grad_()
        y = module(x, heads=True)
        return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], upstream.to(y.dtype))]

    compressor.method.config = nsa.NSAConfig(backend="torch")
    expected = [run(compressor), run(copy.deepcopy(compressor).double())]
    compressor.method.config = None
    failing = plant(kernel)
    with one_warning(f"_{kernel}_kernel"):
        assert_alike(run(compressor), expected)
    assert failing.launches == 1


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_checkpoints(dtype: torch.dtype, plant: Any, random: Random) -> None:
    """PyTorch computes again what the kernels had computed before the failure."""
    attention, inputs = build(random, dtype, **FIELDS), random((1, 29, 32), dtype)
    for parameter in attention.parameters():  # two modules in a row let errors grow
        parameter.detach().mul_(0.5)

    def run(module: nn.Module) -> list[Tensor]:
        x = y = inputs.to(module.to_q.weight.dtype).requires_grad_()
        for _ in range(2):
            y = checkpoint(module, y, use_reentrant=False)
        return [y.detach(), *torch.autograd.grad(y.sum(), [x, *module.parameters()])]

    expected = by_torch(run, attention)
    plant("span_dkv")
    with going("by_index"), one_warning("_span_dkv_kernel"):
        assert_alike(run(attention), expected)


IN_OPERATORS = [
    ("span_forward", "rows", torch.float32),
    slow("selected_gradient", "rows", torch.float32),
    ("segments", "packed", torch.float32),
    slow("span_dkv", "packed", torch.float32),
    slow("compress_output", "rows", torch.float16),
    ("compress_dw", "packed", torch.float16),
]


@interpreted
@pytest.mark.parametrize("kernel, layout, dtype", IN_OPERATORS, ids=lambda value: str(value).replace("torch.", ""))
def test_compiled_training(
    kernel: str, layout: str, dtype: torch.dtype, trained: Any, plant: Any, nobody_looks: None
) -> None:
    """A graph that was compiled before the failure, and one that is compiled after it."""
    torch._dynamo.reset()
    step, attention = trained(layout, dtype)
    expected = by_torch(step, attention)
    failing, call = plant(kernel), torch.compile(attention, fullgraph=True, backend="aot_eager")
    with going("by_index"):
        with one_warning(f"_{kernel}_kernel"):
            assert_alike(step(call), expected)
        with no_warning():
            assert_alike(step(call), expected)
            torch._dynamo.reset()
            assert_alike(step(call), expected)
    assert failing.launches == 1


# ---------------------------------------------------------------------------------------------------------------------
# Steps with a cache
# ---------------------------------------------------------------------------------------------------------------------

VARIANTS = {
    "mlp": {},
    "conv1d": {"compression": "conv1d", "separate_kv": True},
    "avgpool": {"compression": "avgpool", "rope_theta": None},
}
PIECES = [13, 1, 3, 17, 1, 1, 1]
STEPS = [(kernel, "mlp") for kernel in (*STEP, "span_forward", "block_scores")]
STEPS += [("append", "conv1d"), ("append", "avgpool")]


@pytest.fixture
def stepped(random: Random) -> Callable[..., Any]:
    """Pieces of two rows: a function of a call that returns the outputs and the cache; and the module."""

    def stepped(**fields: Any) -> tuple[Callable[..., list[Tensor]], NativeSparseAttention]:
        attention = build(random, torch.float32, **FIELDS | fields)
        inputs = random((2, sum(PIECES), 32), torch.float32)

        def steps(call: nn.Module = attention) -> list[Tensor]:
            x = inputs.to(call.to_q.weight.dtype)
            cache = nsa.NSACache(attention.cfg, 2, sum(PIECES), dtype=x.dtype)
            with torch.inference_mode():
                outputs = [call(piece, cache=cache) for piece in x.split(PIECES, dim=1)]
            assert cache.lengths == (sum(PIECES),) * 2
            return [*outputs, cache.tokens[:, :, :-1], cache.blocks[:, :, :-1]]

        return steps, attention

    return stepped


@interpreted
@pytest.mark.parametrize("kernel, variant", STEPS)
def test_steps(kernel: str, variant: str, stepped: Any, plant: Any) -> None:
    """The outputs, and what the cache holds: written twice, or half by kernels."""
    steps, attention = stepped(**VARIANTS[variant])
    expected = by_torch(steps, attention)
    failing = plant(kernel)
    with one_warning(f"_{kernel}_kernel"):
        assert_alike(steps(), expected)
    with no_warning():
        assert_alike(steps(), expected)
    assert failing.launches == 1
    assert f"_{kernel}_kernel" in which_backend("cpu", torch.float32, 16).reason
    nsa._FAILURES.clear()
    attention.cfg.backend = "triton"
    with no_warning(), pytest.raises(RuntimeError, match=f"^_{kernel}_kernel cannot run"):
        steps()


@interpreted
@pytest.mark.parametrize("kernel", ["append", slow("project"), slow("decode_attend")])
def test_compiled_steps(kernel: str, stepped: Any, plant: Any, nobody_looks: None) -> None:
    """The operators of a graph that was made for the kernels do all that these would have done."""
    torch._dynamo.reset()
    steps, attention = stepped(compression="conv1d")
    expected = by_torch(steps, attention)
    plant(kernel)
    call = torch.compile(attention, fullgraph=True, backend="aot_eager")
    with one_warning(f"_{kernel}_kernel"):
        assert_alike(steps(call), expected)
    with no_warning():
        assert_alike(steps(call), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


def attend(random: Random, dim: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    q, k, v = random((3, 1, 20, 2, dim), dtype)
    return nsa.local_attention(q, k, v, 5)


@interpreted
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("Triton Error [CUDA]: operation not permitted when stream is capturing"),
        RuntimeError("Triton Error [HIP]:  Code: 719, Messsage: unspecified launch failure"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: f"{type(error).__name__}: {error}",
)
def test_errors_that_are_no_fault_of_the_kernel(error: BaseException, plant: Any, random: Random) -> None:
    plant("span_forward", error)
    with no_warning(), pytest.raises(type(error)) as raised:
        attend(random)
    assert raised.value is error
    assert not nsa._FAILURES


@interpreted
@pytest.mark.parametrize(
    "error, said",
    [
        (RuntimeError("PassManager::run failed"), "RuntimeError: PassManager::run failed"),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "kernel image is invalid"),
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable."), "C compiler"),
        (FileNotFoundError(2, "No such file or directory", "ptxas"), "ptxas"),
        ("PTXASError", "ptxas fatal : Value 'sm_199' is not defined"),
    ],
    ids=str,
)
def test_errors_of_building(error: Any, said: str, plant: Any, random: Random) -> None:
    if error == "PTXASError":
        error = nsa.triton.runtime.errors.PTXASError(f"PTX codegen error\n`ptxas` stderr:\n{said}\n" + "more\n" * 99)
    plant("span_forward", error)
    with one_warning("_span_forward_kernel cannot run on cpu", said, "PyTorch serves cpu, torch.float32, head dim 16"):
        o = attend(random)
    assert torch.equal(o, nsa.local_attention(*Random(seed=20250216)((3, 1, 20, 2, 16), torch.float32), 5))


@interpreted
def test_a_failure_concerns_its_device_dtype_and_head_dim(plant: Any, random: Random) -> None:
    failing = plant("span_forward")
    for dim, dtype, launches in ((16, torch.float32, 1), (8, torch.float32, 2), (16, torch.float16, 3)):
        with one_warning(f"cpu, {dtype}, head dim {dim}"):
            attend(random, dim, dtype)
        with no_warning():
            attend(random, dim, dtype)
        assert failing.launches == launches
    assert which_backend("cpu", torch.float32, 4).name == "triton"


# ---------------------------------------------------------------------------------------------------------------------
# The backend of a module
# ---------------------------------------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("fields", [{"backend": "torch"}, {"use_flash": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_no_kernel_runs_without_them(
    fields: dict[str, Any], dtype: torch.dtype, trained: Any, stepped: Any, plant: Any
) -> None:
    failing = [plant(name) for name in {*STEP, *(name for name, *_ in TRAINING)}]
    for layout in ("rows", "packed"):
        trained(layout, dtype, **fields)[0]()
    stepped(**fields)[0]()
    assert not any(kernel.launches for kernel in failing)


@interpreted
@pytest.mark.parametrize("fields", [{"backend": "torch"}, {"use_flash": False}], ids=str)
def test_compressors_ask_the_module(fields: dict[str, Any], random: Random) -> None:
    """Plain operations, which have second derivatives, unless the module takes kernels."""
    attention, x = build(random, torch.float16, **FIELDS), random((2, 20, 16), torch.float16)
    compressor = attention.compress_k.method
    assert compressor.has_kernels(x)
    for name, value in fields.items():
        setattr(attention.cfg, name, value)
    assert not compressor.has_kernels(x)


@interpreted
def test_kernels_or_an_error(random: Random, plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, packed sequences, prompts and steps alike."""
    tables = plant("segments")
    attention, x = build(random, torch.float32, **FIELDS, backend="triton"), random((1, 20, 32), torch.float32)
    cache = nsa.NSACache(attention.cfg, 1, 40)
    with torch.no_grad():
        attention(x, cache=cache)
        monkeypatch.setattr(nsa, "_INTERPRETED", False)
        offsets = {"cu_seqlens": torch.tensor([0, 9, 20])}
        for arguments in ({}, offsets, {"cache": nsa.NSACache(attention.cfg, 1, 40)}, {"cache": cache}):
            with pytest.raises(ValueError, match="^backend = 'triton': cannot run here: .*TRITON_INTERPRET"):
                attention(x[:, :1] if arguments.get("cache") is cache else x, **arguments)
    assert cache.lengths == (20,) and tables.launches == 0
    wide = copy.deepcopy(attention).double()
    monkeypatch.setattr(nsa, "_INTERPRETED", True)
    with pytest.raises(ValueError, match="^backend = 'triton': cannot run here: there is no kernel for torch.float64"):
        wide(x.double())


# ---------------------------------------------------------------------------------------------------------------------
# which_backend
# ---------------------------------------------------------------------------------------------------------------------

H100 = {"capability": 90}
REASONS = [
    (H100, {}, None),
    (H100, {"dtype": torch.float32, "dim_head": 256}, None),
    ({"capability": 75}, {}, "from sm_80 on"),
    ({"architecture": "gfx942"}, {}, None),
    ({"architecture": "gfx1100"}, {}, "AMD's MI300"),
    (H100, {"dtype": torch.float64}, "there is no kernel for torch.float64"),
    (H100, {"dim_head": 257}, "the head dim is 257"),
    (H100 | {"triton": None}, {}, "Triton is not installed, or older than 3.4"),
    (H100, {"device": "cpu"}, "the kernels are for GPUs"),
    ({}, {}, "the kernels are for GPUs"),
    ({}, {"device": "cuda"}, "there is no GPU"),
]


@pytest.mark.skipif(nsa.triton is None, reason="needs Triton 3.4 or later")
@pytest.mark.parametrize("machine, asked, reason", REASONS, ids=str)
def test_which_backend(
    machine: dict[str, Any], asked: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # "auto" as it is
    initialised = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: initialised.append(1) or bool(machine))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: initialised.append(1) or 3)
    monkeypatch.setattr(nsa, "_capability", lambda device: machine["capability"])
    monkeypatch.setattr(nsa, "_architecture", lambda device: machine["architecture"])
    monkeypatch.setattr(nsa, "_AMD", "architecture" in machine)
    monkeypatch.setattr(nsa, "triton", machine.get("triton", nsa.triton))
    nsa._FAILURES[torch.device("cuda", 2), None, None] = "of another GPU"
    name, why = which_backend(**asked)
    assert name == ("triton" if reason is None else "torch")
    assert why is None if reason is None else reason in why
    assert not initialised or asked.get("device") != "cpu", "CUDA is not asked about a CPU"
    if machine and asked.get("device") != "cpu" and reason is None:
        nsa._FAILURES[torch.device("cuda", 3), None, None] = "it burned"
        assert which_backend(**asked) == ("torch", "it burned")


def test_without_part_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(nsa._BACKENDS, "triton")
    assert which_backend() == ("torch", "this file has no kernels")


@pytest.mark.parametrize(
    "asked, error, said",
    [
        ({"dtype": "bfloat16"}, TypeError, "dtype = 'bfloat16': must be a torch.dtype"),
        ({"dim_head": 0}, ValueError, "dim_head = 0: must be at least 1"),
        ({"dim_head": 64.0}, TypeError, "dim_head = 64.0: must be an int"),
    ],
    ids=str,
)
def test_questions_that_make_no_sense(asked: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=f"^{said}"):
        which_backend(**asked)
