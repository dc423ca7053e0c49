"""Every kernel built for the GPUs that it is meant for, without one: it fits, and it multiplies by the matrix unit."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import compile_only, cuobjdump, launch, needs_triton, without_interpreter

import native_sparse_attention as nsa

pytestmark = [needs_triton, pytest.mark.slow]

# Backend, architecture, lanes of a warp; KiB of shared memory that a program may take; instructions of the matrix unit.
MMA, WGMMA, TCGEN05, MFMA = "mma.sync", "wgmma.mma_async", "tcgen05.mma", "v_mfma"
TARGETS = {
    "sm_80": (("cuda", 80, 32), 163, (MMA,)),  # A100
    "sm_86": (("cuda", 86, 32), 99, (MMA,)),  # RTX 3090, A10
    "sm_89": (("cuda", 89, 32), 99, (MMA,)),  # RTX 4090, L40S
    "sm_90": (("cuda", 90, 32), 227, (MMA, WGMMA)),  # H100, H200
    "sm_100": (("cuda", 100, 32), 227, (MMA, TCGEN05)),  # B200
    "sm_120": (("cuda", 120, 32), 99, (MMA,)),  # RTX 5090
    "gfx942": (("hip", "gfx942", 64), 64, (MFMA,)),  # MI300
}
EVERYTHING = ("local", "compressed", "masked", "selective", "select", "decode", "compress")
INDEX = {"count_pairs", "place_pairs", "cut_tiles"}
WITHOUT_PRODUCTS = INDEX | {"preprocess", "merge_slots", "sum_tiles", "sum_slots", "choose"}
WITHOUT_PRODUCTS |= {"append"}  # unless a step compresses, which it does where the weights fit
# Registers that a kernel may keep in memory, by head dim; 4 bytes each, of the 255 or, on AMD's, 512 of a lane. On an
# H100, the fastest tiles of head dim 256 keep up to 198, those of float32 up to 98 at head dims up to 128. On an A100,
# the gradient of the selected branch keeps 244 at 256; tiles of 16 keys keep few, but take four times the parts of dq.
SPILLS = {64: 100, 128: 100, 256: 250}

# (target, dtype, head dim) of each build: a cover, of five minutes of one core. sm_80, sm_86 and sm_89 have the same
# products, sm_86, sm_89 and sm_120 the same shared memory; bfloat16 and float16 take the same tiles; head dim 64 has
# room everywhere; test_kernels.py builds for sm_90 at head dims 64 and 128. Most pairs of a target and a head dim are
# left out, and float32 but for one build. NSA_ALL_TARGETS=1 builds all, which takes half
# an hour of two cores.
COVER = [
    "sm_80 bfloat16 128",
    "sm_86 bfloat16 256",
    "sm_89 float32 64",
    "sm_90 float16 256",
    "sm_100 bfloat16 128",
    "sm_120 float16 128",
    "gfx942 bfloat16 128",
]
ALL = [f"{target} {dtype} {D}" for target in TARGETS for dtype in ("bfloat16", "float16", "float32") for D in SPILLS]
BUILDS = ALL if os.environ.get("NSA_ALL_TARGETS") == "1" else COVER


def build(name: str, folder: str) -> None:
    """Compile every launch for a target where it would have run, and print what came out as JSON."""
    on, dtype, D = name.split()
    target, kib, matrix_unit = TARGETS[on]
    result: dict[str, list[dict[str, int]]] = {}

    def take(kernel: str, options: dict[str, Any], compiled: Any) -> None:
        code = compiled.asm["ptx" if target[0] == "cuda" else "amdgcn"]
        if target[0] == "cuda":
            usage = cuobjdump("-res-usage", compiled.asm["cubin"], Path(folder) / "kernel.cubin") or "STACK:0"
            spills = int(re.search(r"STACK:(\d+)", usage)[1]) // 4
        else:
            spills = int(re.search(r"\.vgpr_spill_count: +(\d+)", code)[1])
        products = sum(code.count(word) for word in matrix_unit)
        found = {"shared": compiled.metadata.shared, "products": products, "spills": spills}
        result.setdefault(kernel, []).append(found)

    compile_only(target, take)
    nsa._AMD = target[0] == "hip"
    nsa._shared_memory = lambda device: kib << 10
    nsa._has_descriptors = lambda device: target[0] == "cuda" and target[1] >= 90
    nsa._multiplies_in_shared = lambda device: target[0] == "cuda" and target[1] in (90, 100)
    nsa._has_tensor_memory = lambda device: target[0] == "cuda" and target[1] == 100
    nsa._PLAIN_ROWS = 0  # descriptors where there are any
    kinds = [kind for kind in EVERYTHING if kind != "compress" or (dtype != "float32" and int(D) <= 128)]
    G = 16 if int(D) < 256 else 64  # the largest tiles of the kernels that take a whole group at once
    launch(G, int(D), tuple(kinds), [1024], getattr(torch, dtype))
    launch(4, int(D), ("selective",), [1024], getattr(torch, dtype))
    if int(D) == 64 and nsa._multiplies_in_shared(None):
        nsa._PLAIN_ROWS = math.inf  # as in most calls
        launch(1, 64, ("local", "compressed", "masked"), [1024], getattr(torch, dtype))
    print(json.dumps(result))


def built(name: str, folder: Path) -> dict[str, list[dict[str, int]]]:
    """Every kernel of a build."""
    script = f"import test_targets; test_targets.build({name!r}, {str(folder)!r})"
    return json.loads(without_interpreter(script, TRITON_CACHE_DIR=str(folder / "cache")))


@pytest.fixture(scope="module")
def builds(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future]]:
    """All builds that were asked for, two at a time."""
    names = [item.callspec.params["name"] for item in request.session.items if item.module is request.module]
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(built, name, tmp_path_factory.mktemp("build")) for name in names}


@pytest.mark.parametrize("name", BUILDS)
def test_kernels_for(name: str, builds: dict[str, Future]) -> None:
    target, dtype, D = name.split()
    kib, kernels = TARGETS[target][1], builds[name].result()
    assert {"local_dkv", "selected_gradient", "block_scores", "decode_scan", "decode_attend"} <= set(kernels)
    for kernel, versions in kernels.items():
        for found in versions:
            assert found["shared"] <= kib << 10, f"{kernel} takes {found['shared']} bytes of {kib} KiB"
            assert found["spills"] <= SPILLS[int(D)], f"{kernel} keeps {found['spills']} registers in memory"
        if kernel not in WITHOUT_PRODUCTS and dtype != "float32":  # whose products are exact
            assert any(found["products"] for found in versions), f"{kernel} does without the matrix unit"
