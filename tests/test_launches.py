"""Launches: a plan remembers what Triton would find anew in each launch."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Random, needs_triton, without_interpreter
from torch import Tensor

import native_sparse_attention as nsa

HEADS, LENGTHS = [(2, 2), (6, 2), (16, 1)], [17, 100, 256]
SIZES = [(32, 16, 64), (16, 16, 16), (8, 4, 8)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def tensors(random: Random, T: int, H: int, K: int, D: int, C: int, dtype: torch.dtype, layout: str) -> list[Tensor]:
    """q, k, v, k_cmp, v_cmp and gates, which want gradients."""
    made = []
    for rows, heads, width in ((T, H, D), (T, K, D), (T, K, D), (C, K, D), (C, K, D), (T, H, 3)):
        x = random((1, rows, heads, 2 * width), dtype)[..., :width]
        if layout != "strided":
            x = x.contiguous()
        if layout == "misaligned":
            x = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
        made.append(x.requires_grad_())
    return made


def launcher(function: Callable[..., None], **sizes: int) -> Any:
    """Triton's launcher for CUDA, which gives its arguments and what it adds to them to `function`."""
    from triton.backends.nvidia.driver import CudaLauncher

    made = CudaLauncher.__new__(CudaLauncher)
    made.launch, made.launch_cooperative_grid, made.launch_pdl, made.num_ctas = function, False, True, 1
    made.gsan_enabled, made.arg_annotations, made.kernel_signature = False, ["of arguments"], b"signature"
    for name in ("global_scratch", "profile_scratch"):
        setattr(made, f"{name}_size", sizes.get(name, 0))
        setattr(made, f"{name}_align", 1)
    return made


def check_launchers() -> None:
    """Triton's launcher is left out where it only passes arguments on."""
    for kind in ("plain", "global_scratch", "profile_scratch", "unknown"):
        calls: list[tuple[Any, ...]] = []
        in_c = lambda *arguments: calls.append(arguments)  # noqa: B023, E731
        run = in_c if kind == "unknown" else launcher(in_c, **{kind: 64})
        given = (2, 3, 1, "stream", "function", "metadata", None, None, None, "arguments")
        function, expected = nsa._driver_call(run, given)
        assert not calls
        if kind == "plain":
            run(*given)
            assert function is in_c
            assert calls == [expected]
        else:
            assert function is run
            assert expected is given


def check_launches() -> None:
    """Each launch of a compiled kernel is of the one that Triton would choose, with the arguments that it would pass.

    Nothing is compiled: instead of a kernel there is Triton's own description of what it would compile, and Triton's
    own launcher, but for the function in C.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Hopper:
        """All that Triton asks about a device."""

        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 7)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    class Compiled:
        function, packed_metadata = 123, (4, 1, 0)

        def __init__(self, kind: tuple[str, ...]) -> None:
            self.run = launcher(lambda *arguments: launches.append((kind, self, arguments)))

    def kind_of(kernel: JITFunction, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[str, ...]:
        _, kind, options = kernel.device_caches[0][-1](*arguments, **constants)
        return kernel.fn.__name__, str(kind), str(sorted(options.items()))

    def look_up(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **constants: Any) -> Compiled:
        counts["looked up"] += 1
        return Compiled(kind_of(self, arguments, constants))

    def launch(self: nsa._Launch, *pointers: Any) -> None:
        launches.clear()
        before(self, *pointers)
        if launches:
            ((kind, compiled, _),) = launches
            expected = self.arguments(*pointers)
            assert kind == kind_of(self.kernel, expected, self.constants)
            names = self.kernel.arg_names[len(expected) :]
            expected = (*expected, *(self.constants[name] for name in names))
            addresses = [x.data_ptr() if isinstance(x, Tensor) else x for x in expected]
            metadata = (compiled.packed_metadata, None, None, None)
            compiled.run(*(*self.grid, 1, 1)[:3], 7, compiled.function, *metadata, *addresses)
            (_, _, given), (_, _, of_triton) = launches
            assert given == of_triton, kind[0]
            counts["direct"] += 1
            kernels.add(kind[0])

    launches, kernels, counts, before = [], set(), {"looked up": 0, "direct": 0}, nsa._Launch.__call__
    driver.set_active(Hopper())
    check_launchers()
    JITFunction.run, nsa._Launch.__call__ = look_up, launch
    nsa._num_sms = lambda device: 132
    nsa._BACKENDS["triton"] = nsa._BACKENDS["triton"]._replace(obstacle=lambda *_: None, unserved=lambda *_: None)
    random, results = Random(seed=1), {}

    def run(dtype: torch.dtype, T: int, heads: tuple[int, int], sizes: tuple[int, ...], layout: str) -> dict[str, int]:
        block, stride, select = sizes
        edges = [0, T // 3, T] if layout == "packed" else [0, T]
        C = sum(max(0, (n - block) // stride + 1) for n in (b - a for a, b in itertools.pairwise(edges)))
        x = tensors(random, T, *heads, 40 if layout == "strided" else 64, C, dtype, layout)
        given = {"local_window": 20, "block_size": block, "stride": stride, "select_block_size": select}
        given |= {"topk_blocks": 3, "cu_seqlens": torch.tensor(edges) if layout == "packed" else None}
        for name in counts:
            counts[name] = 0
        for _ in range(2):
            o = nsa.nsa_attention(*x, **given, backend="triton")
            torch.autograd.grad(o, x, torch.ones_like(o))
        return dict(counts)

    by_index, in_doubt = ({"forward": keys, "backward": keys} for keys in (-(2**40), 30000))
    nsa._SLOT_KEYS, nsa._ROWS_IN_DOUBT = {"forward": 0, "backward": 0}, 0
    for masked, plain in ((nsa._MASKED_KEYS, 2**15), (nsa._MASKED_KEYS, 0), (by_index, 0), (in_doubt, 0)):
        nsa._MASKED_KEYS, nsa._PLAIN_ROWS = masked, plain
        for T, heads, sizes, layout in itertools.product(LENGTHS, HEADS, SIZES, ("plain", "strided", "packed")):
            for dtype in DTYPES:
                run(dtype, T, heads, sizes, layout)
    nsa.GroupedMLPCompressor.has_kernels = nsa.Conv1dCompressor.has_kernels = lambda self, x: True
    for kind, dtype in itertools.product((nsa.GroupedMLPCompressor, nsa.Conv1dCompressor), DTYPES[:2]):
        compressor, x = kind(64, 16, 8).to(dtype), random((2, 90, 64), dtype).requires_grad_()
        for _ in range(2):
            y = compressor(x)
            torch.autograd.grad(y, [x, *compressor.parameters()], torch.ones_like(y))
    choice = nsa._Choice(16, 8, 32, 3, 0, 1)
    for new, (H, K), dtype in itertools.product((1, 3), HEADS, DTYPES[:2]):
        x, q, logits = (random((2, new, *shape), dtype) for shape in ((64,), (H, 64), (H, 3)))
        k, streams, blocks = (random(shape, dtype) for shape in ((2, new, K, 64), (3, 2, 65, K, 64), (2, 2, 8, K, 64)))
        first, layers = torch.tensor([40, 7], dtype=torch.int32), [random((64, 64), dtype)] * 3
        for _ in range(2):
            nsa._triton_project(x, (*layers, None), (None,) * 4)
            nsa._triton_extend(q, k, k, streams, blocks, first, None, nsa._Rotation(1e4), 0, 1, [None] * 10)
            nsa._triton_decode(q, streams, blocks, logits, first, None, 20, choice, 0.1)
    again = (torch.bfloat16, 100, (2, 2), SIZES[0])
    results["again"] = run(*again, "plain")
    results["misaligned"] = run(*again, "misaligned")
    runtime = nsa.triton.knobs.runtime
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(runtime.launch_enter_hook, "add"):  # a chain of hooks, from Triton 3.5 on
            patch.setattr(runtime.launch_enter_hook, "calls", [print])
        else:
            patch.setattr(runtime, "launch_enter_hook", print)
        results["with a hook"] = run(*again, "plain")
    nsa._DIRECT_LAUNCH = False
    results["switched off"] = run(*again, "plain")
    print(json.dumps(results | {"kernels": sorted(kernels)}))


@needs_triton
def test_launches_are_those_that_triton_would_choose() -> None:
    results = json.loads(without_interpreter("import test_launches; test_launches.check_launches()"))
    attention = {name for name in vars(nsa) if name.endswith("_kernel")} - {"_kernel"}
    assert attention <= set(results["kernels"])
    assert results["again"]["looked up"] == 0 < results["again"]["direct"]
    assert results["misaligned"]["looked up"] > 0 < results["misaligned"]["direct"]
    for case in ("with a hook", "switched off"):
        assert results[case]["direct"] == 0 < results[case]["looked up"]


@needs_triton
@pytest.mark.parametrize("version, direct", [("3.3.1", False), ("3.4.0", True), ("3.6.0+git1", True), ("4.0.0", False)])
def test_versions(version: str, direct: bool) -> None:
    assert nsa._launches_directly(version) is direct


@pytest.mark.parametrize("kib", [227, 163, 99, 64])
def test_a_gpu_takes_the_first_tile_that_fits(kib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsa, "_shared_memory", lambda device: (kib << 10) + 512)
    others = dict.fromkeys(nsa._TILES, nsa._FLOAT32_TILES["others"])
    tables = (torch.float16, nsa._TILES), (torch.float32, others | nsa._FLOAT32_TILES)
    for (dtype, table), name, (i, D) in itertools.product(tables, nsa._TILES, enumerate((64, 80, 256))):
        if kib == 64 and name == "selected_by_query":
            continue
        tiles, made = table[name][i], nsa._constants(name, 4, 2, D, dtype, "ieee", torch.device("cpu"))
        made = tuple(made[key] for key in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))
        fitting = [tile[:4] for tile in tiles if tile[4] <= kib]
        assert made == fitting[0]
        assert [tile[4] for tile in tiles] == sorted((tile[4] for tile in tiles), reverse=True)
