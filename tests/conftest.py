"""What the tests share: a seeded source of random inputs, the ways of comparing numbers, and the gpu marker."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

# Without a GPU, Triton's interpreter runs the kernels on CPU tensors. Triton asks for the variable when a kernel is
# defined, so it must be set before anything imports the library.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["NSA_TUNED"] = "0"  # tests are of the table's tiles, whatever this GPU was tuned to

import oracle
import pytest
from cases import Case, Random, Step, at, double, going, near_ties, project, to_out
from torch import Tensor

import native_sparse_attention as nsa
from native_sparse_attention import NativeSparseAttention

# Thousands of tiny operations: on a busy machine, threads that wait for each other cost more than they bring.
torch.set_num_threads(1)


@pytest.fixture
def random() -> Random:
    """The same numbers in every run of a test."""
    return Random(seed=20250216)


@pytest.fixture
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """How the selected branch of the kernels goes: see `cases.WAYS`."""
    with going(request.param):
        yield request.param


@pytest.fixture
def nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are not looked at on the host, as on a GPU: neither by checks nor by the PyTorch backend."""
    monkeypatch.setattr(nsa, "_readable", lambda x: False)
    monkeypatch.setattr(nsa, "_on_host", lambda x: False)


@pytest.fixture(params=["host_reads", "host_does_not_read"])
def host_reads(request: pytest.FixtureRequest) -> None:
    """Both ways of a test: values are looked at on the host, as on a CPU, and not, as on a GPU."""
    if request.param == "host_does_not_read":
        request.getfixturevalue("nobody_looks")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """`torch.empty` returns NaN, or the largest integer."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(was)


@pytest.fixture(autouse=True)
def forget_plans() -> None:
    """Tests change the sizes that the plans of kernels follow from, and let kernels fail."""
    nsa._FAILURES.clear()
    for value in vars(nsa).values():
        if hasattr(value, "cache_clear") and "_plan" in value.__name__:
            value.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# Triton's interpreter
# ---------------------------------------------------------------------------------------------------------------------


def hasten() -> None:
    """Spares the interpreter half of its time: what it would make anew for each operation is kept.

    It replaces the functions of Triton's language by its own when a kernel starts, and in Triton 3.9 again in every
    call of a function by the kernel: here, only the first call from each module does that. It makes the type and the
    shape of every value. And of whole numbers it computes whether they overflow, but without debug mode tells nobody.
    Other versions of the interpreter are left alone.
    """
    try:
        from triton.runtime import interpreter

        language, semantic = interpreter.tl.core, type(interpreter.interpreter_semantic)
        init_type, init_tensor = language.block_type.__init__, language.tensor.__init__
        broadcast, options = semantic.broadcast_impl_value, interpreter.InterpreterOptions(sanitize_overflow=False)
        patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
        nothing_to_restore = interpreter._LangPatchScope
    except (ImportError, AttributeError, TypeError):
        return
    patched: set[int] = set()
    types: dict[tuple[Any, ...], dict[str, Any]] = {}
    shapes: dict[tuple[Any, ...], dict[str, Any]] = {}

    def patch_once(function: Callable[..., Any]) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return nothing_to_restore()
        patched.add(module)
        return patch(function)

    def launch_anew(*args: Any, **options: Any) -> None:
        patched.clear()
        launch(*args, **options)

    def known_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *shape)
        if key not in types:
            init_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key], element_ty=element_ty)

    def known_shape(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape) if type.is_block() else ()
        if key not in shapes:
            init_tensor(self, handle, type)
            shapes[key] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(shapes[key], handle=handle, type=type, dtype=type.scalar)

    def broadcast_others(self: Any, one: Any, other: Any) -> tuple[Any, Any]:
        return (one, other) if one.shape is other.shape else broadcast(self, one, other)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew
    language.block_type.__init__, language.tensor.__init__ = known_type, known_shape
    semantic.broadcast_impl_value, interpreter.interpreter_builder.options = broadcast_others, options
    if hasattr(interpreter, "_get_np_dtype"):  # which makes a table of all types in every call
        of_type, by_name = interpreter._get_np_dtype, {}

        def remembered(kind: Any) -> Any:
            name = kind.scalar.name
            if name not in by_name:
                by_name[name] = of_type(kind)
            return by_name[name]

        interpreter._get_np_dtype = remembered


def spans(arguments: Iterable[Any]) -> Iterator[tuple[int, int]]:
    """The addresses [begin, end) of the tensors among a kernel's arguments, also in tuples and descriptors."""
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from spans(argument)
        elif hasattr(argument, "base"):
            yield from spans([argument.base])
        elif isinstance(argument, Tensor) and argument.numel() > 0:
            last = sum((n - 1) * stride for n, stride in zip(argument.shape, argument.stride(), strict=True))
            yield argument.data_ptr(), argument.data_ptr() + (last + 1) * argument.element_size()


def stay_within_arguments() -> None:
    """A kernel that reads or writes outside the tensors that it was given fails: IndexError.

    Between two tensors that it was given there is no telling which one it meant.
    """
    try:
        import numpy as np
        from triton.runtime import interpreter

        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        load, store, update = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
        copy_arguments = executor._init_args_hst
    except (ImportError, AttributeError):
        return
    begins, ends = [np.zeros(0, np.uint64)] * 2

    def note_arguments(self: Any, arguments: Any, named: dict[str, Any]) -> Any:
        nonlocal begins, ends
        copies = copy_arguments(self, arguments, named)
        together: list[list[int]] = []
        for begin, end in sorted(spans([*copies[0], *copies[1].values()])):
            if together and begin <= together[-1][1]:
                together[-1][1] = max(together[-1][1], end)
            else:
                together.append([begin, end])
        begins, ends = np.array(together, np.uint64).reshape(-1, 2).T
        return copies

    def check(pointers: Any, mask: Any, what: str) -> None:
        first = pointers.data[mask.data]
        if first.size == 0:
            return
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        place = np.searchsorted(begins, first, side="right")
        outside = (place == 0) | (first + np.uint64(size) > ends[place - 1])
        if outside.any():
            raise IndexError(f"{outside.sum()} of {first.size} {what} outside the kernel's arguments")

    def checked_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check(pointers, mask, "reads")
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        check(pointers, mask, "writes")
        return store(self, pointers, value, mask, *rest, **options)

    def checked_update(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask, "updates")
        return update(self, operation, pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_atomic_rmw, executor._init_args_hst = checked_update, note_arguments


if os.environ.get("TRITON_INTERPRET") == "1":
    hasten()
    stay_within_arguments()

# ---------------------------------------------------------------------------------------------------------------------
# Comparisons
# ---------------------------------------------------------------------------------------------------------------------


def assert_close64(actual: Tensor, exact: Tensor, what: str = "value") -> None:
    """Equal but for the rounding of float64, infinities in the same places."""
    assert actual.dtype == torch.float64, f"{what}: {actual.dtype}, not float64"
    torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-11, msg=lambda text: f"{what}: {text}")


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def accumulation(exact: Tensor, terms: int, ulp: float) -> float:
    """Usual error of a value that is a sum of `terms` numbers in any order; half types are summed in float32."""
    return terms**0.5 * min(ulp, torch.finfo(torch.float32).eps) * largest(exact)


def assert_within_budget(
    actual: Tensor, plain: Tensor, exact: Tensor, what: str = "value", *, terms: int, ulps: float = 4
) -> None:
    """The error of `actual` against float64 is at most twice that of plain PyTorch, plus a few ulp and an accumulation.

    Held to it are the root mean square error, in ulp of the root mean square, and the largest error, in ulp of the
    largest value: the largest alone would hide many small errors. Two correct computations have nearly the same root
    mean square error, but their largest errors are two draws from a long tail. So one value may also be off by
    √terms · eps of the largest: what is usual for `terms` numbers that are added in float32, in any order.
    """
    assert exact.dtype == torch.float64, f"{what}: the exact value is {exact.dtype}"
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    ulp = torch.finfo(plain.dtype).eps
    nothing = torch.isneginf(exact)  # the log-sum-exp of a row that sees nothing
    assert torch.equal(torch.isneginf(actual), nothing), f"{what}: −inf elsewhere than in the exact value"
    actual, plain, exact = (tensor.detach().double()[~nothing] for tensor in (actual, plain, exact))
    if exact.numel() == 0:
        return
    # One value that is off adds 1/√numel of that to the root mean square, which in a small tensor is as much of a draw.
    for name, size, share in (("largest", largest, 1.0), ("rms", rms, exact.numel() ** -0.5)):
        budget = 2 * size(plain - exact) + ulps * ulp * size(exact) + share * accumulation(exact, terms, ulp)
        error = size(actual - exact)
        assert error <= budget, f"{what}: {name} error {error:.3g} exceeds its budget {budget:.3g}"  # false for NaN too


def choice_tolerance(plain: Tensor, exact: Tensor, terms: int) -> float:
    """How much less a chosen block may weigh than another: both scores may be off by the budget of the largest."""
    ulp = torch.finfo(plain.dtype).eps
    return 2 * (2 * largest(plain - exact) + 4 * ulp * largest(exact) + accumulation(exact, terms, ulp))


def assert_valid_choice(chosen: Tensor, importance: Tensor, case: Case, tolerance: float) -> None:
    """Every rule for `chosen` (B, T, K, S), given the exact importance (B, T, K, N).

    Near ties two correct backends may choose different blocks, so the free choices are judged by their scores.
    """
    assert chosen.dtype == torch.int32, f"block indices are {chosen.dtype}"
    assert chosen.shape == (case.B, case.T, case.K, case.topk_blocks), f"block indices are {tuple(chosen.shape)}"
    for b in range(case.B):
        for t in range(case.T):
            candidates = oracle.candidate_blocks(t, case.T, case.select_block_size)
            forced = oracle.forced_blocks(t, case.select_block_size, case.init_blocks, case.local_blocks)
            for kv_head in range(case.K):
                row, scores = chosen[b, t, kv_head].tolist(), importance[b, t, kv_head].tolist()
                where, taken = f"(b={b}, t={t}, kv_head={kv_head})", min(case.topk_blocks, len(candidates))
                blocks, free_slots = row[:taken], row[taken:]
                assert blocks == sorted(set(blocks)), f"{where}: {row} is not ascending"
                assert set(blocks) <= set(candidates), f"{where}: {row} reaches beyond the candidates {candidates}"
                assert forced <= set(blocks), f"{where}: {row} misses one of the forced blocks {forced}"
                assert all(slot == -1 for slot in free_slots), f"{where}: {row} has no −1 in its free slots"
                free = sorted((scores[j] for j in blocks if j not in forced), reverse=True)
                best = sorted((scores[j] for j in candidates if j not in forced), reverse=True)
                regret = max((better - got for better, got in zip(best, free, strict=False)), default=0.0)
                assert regret <= tolerance, f"{where}: {row} misses a block that is more important by {regret:.3g}"


def reference(attention: NativeSparseAttention, x: Tensor, of: Any = oracle) -> tuple[Tensor, Tensor]:
    """Exact output, and the blocks that the library chose, after every rule for that choice has been checked."""
    cfg, tensors = attention.cfg, project(attention, x)
    chosen = attention.attention_patterns(x).block_indices
    blocks = {"block_size": cfg.block_size, "stride": cfg.stride, "select_block_size": cfg.select_block_size}
    choice = blocks | {name: getattr(cfg, name) for name in ("topk_blocks", "init_blocks", "local_blocks")}
    case = Case("", T=x.shape[1], B=x.shape[0], H=cfg.heads, K=cfg.kv_heads, D=cfg.dim_head, **choice)
    importance = of.importance(tensors["q"], tensors["k_cmp"], **blocks)
    assert_valid_choice(chosen, importance, case, tolerance=1e-10 if x.dtype == torch.float64 else 1e-5)
    o = of.nsa_attention(**tensors, local_window=cfg.local_window, **choice, block_indices=chosen)
    return to_out(attention, o), chosen


def assert_step_as_exact_as_plain(case: Case, step: Step, x: dict[str, Tensor], actual: Tensor) -> None:
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


# ---------------------------------------------------------------------------------------------------------------------
# Markers
# ---------------------------------------------------------------------------------------------------------------------


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    share, seen, dropped = int(os.environ.get("NSA_SLOW_SHARE", "1")), Counter(), []  # CI: of each slow test's cases
    for item in [item for item in items if "slow" in item.keywords]:
        function = item.nodeid.split("[")[0]
        if seen[function] % share:
            dropped.append(item)
        seen[function] += 1
    items[:] = [item for item in items if item not in set(dropped)]
    config.hook.pytest_deselected(items=dropped)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
