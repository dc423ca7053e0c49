"""torch.compile and the operators behind it: no graph break, few graphs, the numbers of eager."""

from __future__ import annotations

import copy
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from cases import (
    BRANCHES,
    PLAIN,
    Branch,
    Case,
    Random,
    choice,
    draw,
    edges,
    every_branch,
    finite,
    interpreted,
    slow,
    whole,
)
from conftest import assert_close64
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import native_sparse_attention as nsa
from nsa_gpt_training import NSALanguageModel

CASE = Case("overlap", T=29, B=2, H=4, D=10, block_size=8, stride=4, select_block_size=8, topk_blocks=3, window=6)
CFG = nsa.NSAConfig(dim=16, heads=4, kv_heads=2, seq_len=64, local_window=6, block_size=8, stride=4,
                    select_block_size=8, topk_blocks=3, rope_theta=1e4, gate_mode="q_cond")  # fmt: skip
LENGTHS = (29, 37, 22, 40, 53)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def graphs() -> int:
    """How many graphs were made since the test began."""
    return counters["stats"]["unique_graphs"]


def assert_alike(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    for name, value in expected.items():
        assert value.abs().sum() > 0, f"{name} is 0"
        assert (actual[name].dtype, actual[name].shape) == (value.dtype, value.shape), name
        error = ((actual[name] - value).norm() / value.norm()).item()
        assert error <= tolerance, f"{name} differs from eager by {error:.1e}"


def step(call: Callable[..., Any], leaves: dict[str, Tensor], *inputs: Any) -> dict[str, Tensor]:
    """The outputs of `call` and the gradients of the leaves, for upstream gradients that are the same in every run."""
    outputs = call(*inputs)
    outputs = finite(outputs if isinstance(outputs, tuple) else (outputs,))
    random = Random(seed=1)
    upstream = [random(tuple(y.shape), y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    values = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return values | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}


def assert_same_step(
    call: Callable[..., Any],
    eager: Callable[..., Any],
    leaves: dict[str, Tensor],
    *inputs: Any,
    tolerance: float = 1e-10,
) -> None:
    assert_alike(step(call, leaves, *inputs), step(eager, leaves, *inputs), tolerance)


def attention(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nsa.NativeSparseAttention(replace(CFG, **options)).double()


def block() -> nn.Module:
    torch.manual_seed(0)
    return nsa.NSABlock(CFG).double()


MODULES = {"attention": attention, "block": block}


def hidden(random: Random, tokens: int = 29) -> Tensor:
    return random((2, tokens, CFG.dim)).requires_grad_()


def leaves_of(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {"x": x} | dict(module.named_parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Forward and backward, for any number of tokens
# ---------------------------------------------------------------------------------------------------------------------


@every_branch
def test_functions(branch: Branch, random: Random) -> None:
    def outputs(x: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return branch(PLAIN, CASE, x)

    call = compiled(outputs, dynamic=True)
    for tokens in LENGTHS:
        x = draw(branch, replace(CASE, T=tokens), random)
        assert_same_step(call, outputs, {name: x[name] for name in BRANCHES[branch]}, x)
    assert graphs() == 1


def test_choice_of_blocks(random: Random) -> None:
    x = CASE.tensors(random)
    assert torch.equal(compiled(lambda x: choice(PLAIN, CASE, x))(x), choice(PLAIN, CASE, x))


@pytest.mark.slow
def test_attention(random: Random) -> None:
    """A graph where the compressed blocks cover all tokens, and one where they do not."""
    module = attention(separate_kv=True, compression="conv1d", rope_theta=None)
    call = compiled(module, dynamic=True)
    for tokens in LENGTHS:
        x = hidden(random, tokens)
        assert_same_step(call, module, leaves_of(module, x), x)
    assert graphs() == 2


@pytest.mark.slow
def test_block(random: Random) -> None:
    module = block()
    call = compiled(module, dynamic=True)
    for tokens in LENGTHS:
        x = hidden(random, tokens)
        assert_same_step(call, module, leaves_of(module, x), x)
    assert graphs() <= 2


@pytest.mark.slow
def test_attention_without_a_word_about_dynamic_shapes(random: Random) -> None:
    """The first length has a graph to itself; then as above."""
    module = attention()
    call = compiled(module)
    for tokens in LENGTHS:
        x = hidden(random, tokens)
        assert_same_step(call, module, leaves_of(module, x), x)
    assert graphs() == 3


@pytest.mark.parametrize("frequencies", [None, slow((1.0, 0.3))], ids=["theta", "frequencies"])
def test_norms_and_a_scaled_rope(frequencies: tuple[float, ...] | None, random: Random, compiled_once: None) -> None:
    """One graph for training, another for a step with a cache."""
    theta = 1e4 if frequencies is None else None
    module = attention(qk_norm=1e-6, rope_theta=theta, rope_frequencies=frequencies, rope_scale=1.2)
    x = hidden(random)
    for call in [compiled(module)] * 2:
        assert_same_step(call, module, leaves_of(module, x), x)
    torch._dynamo.reset()
    with torch.no_grad():
        caches = [nsa.NSACache(module.cfg, 2, 64, dtype=torch.float64) for _ in range(2)]
        for cache in caches:
            module(x[:, :-3], cache=cache)
        step = compiled(module)
        for token in x[:, -3:].split(1, dim=1):
            actual, expected = (of(token, cache=cache) for of, cache in zip((step, module), caches, strict=True))
            torch.testing.assert_close(actual, expected)


@pytest.mark.slow
def test_language_model(random: Random) -> None:
    torch.manual_seed(0)
    module = NSALanguageModel(11, replace(CFG, rope_theta=None), layers=1).double()
    call = compiled(module, dynamic=True)
    for tokens in LENGTHS[:3]:
        text = random.integers(0, 11, (2, tokens + 1))
        leaves = dict(module.named_parameters())
        assert_same_step(call, module, leaves, text[:, :-1], text[:, 1:], tolerance=1e-6)  # its loss is float32
    assert graphs() == 1


@pytest.mark.slow
def test_inductor(random: Random) -> None:
    module = attention(compression="avgpool", rope_theta=None)
    x = hidden(random)
    assert_same_step(compiled(module, "inductor"), module, leaves_of(module, x), x)


@pytest.mark.slow
def test_overlapping_blocks_in_bfloat16(random: Random) -> None:
    """Inductor's vector code for a CPU (torch 2.13) has made NaN of the gradient of weights that had been split."""
    module = nsa.GroupedMLPCompressor(32, 16, 8).bfloat16()
    x = random((4, 100, 32), torch.bfloat16).requires_grad_()
    y = compiled(module, "inductor")(x)
    for gradient in torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y)):
        assert gradient.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------------
# New contents in the same shapes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled_once() -> Iterator[None]:
    """Makes a second compilation of the same code an error."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def edges_of(*lengths: int) -> dict[str, Tensor]:
    return {"cu_seqlens": edges(lengths)}


def mask_of(*tokens: Tensor) -> dict[str, Tensor]:
    return {"key_padding_mask": torch.stack(torch.broadcast_tensors(*tokens))}


COLUMN = torch.arange(29)
# Arguments beside x: empty sequences, sequences of one token and of no block, rows of padding alone and of none.
PACKED = tuple(
    edges_of(*lengths) for lengths in ((20, 0, 9, 29), (58, 0, 0, 0), (1, 1, 55, 1), (7, 44, 3, 4), (0, 0, 0, 58))
)
PADDED = tuple(
    mask_of(*tokens)
    for tokens in (
        (COLUMN >= 0, COLUMN < 13),
        (COLUMN > 11, COLUMN % 3 != 1),
        (COLUMN < 29, COLUMN >= 0),
        (COLUMN < 0, COLUMN >= 17),
        (COLUMN == 4, COLUMN != 4),
    )
)
of_new_contents = pytest.mark.parametrize(
    "of, contents, compiler",
    [
        ("block", PACKED, "aot_eager"),
        ("block", PADDED, "aot_eager"),
        slow("attention", PACKED, "aot_eager"),
        slow("attention", PADDED, "aot_eager"),
        slow("block", PACKED, "inductor"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "packed" if value is PACKED else "padded",
)


@of_new_contents
def test_new_lengths(
    of: str, contents: tuple[dict[str, Tensor], ...], compiler: str, random: Random, compiled_once: None
) -> None:
    module = MODULES[of]()
    call = compiled(module, compiler)
    for arguments in contents:
        x = hidden(random)
        x = x.detach().reshape(1, -1, CFG.dim).requires_grad_() if "cu_seqlens" in arguments else x
        leaves = leaves_of(module, x)
        actual, expected = (step(lambda of=of: of(x, **arguments), leaves) for of in (call, module))  # noqa: B023
        assert_alike(actual, expected)


@pytest.mark.slow
def test_packed_sequences_of_any_number(random: Random) -> None:
    """One compilation serves other numbers of tokens and of sequences."""
    module = attention()
    call = compiled(module, dynamic=True)
    for lengths in ((20, 9), (3, 37, 14), (1, 30, 0, 8), (64, 64, 50, 2, 1)):
        x, arguments = random((1, sum(lengths), CFG.dim)).requires_grad_(), edges_of(*lengths)
        leaves = leaves_of(module, x)
        actual, expected = (step(lambda of=of: of(x, **arguments), leaves) for of in (call, module))  # noqa: B023
        assert_alike(actual, expected)
    assert graphs() == 1


Change = Callable[[nsa.NSACache], None]
CHANGES: tuple[Change, ...] = (
    lambda cache: None,
    lambda cache: cache.truncate(17),
    lambda cache: cache.reorder([1, 0]),
    lambda cache: cache.truncate([9, 12]),
    lambda cache: cache.reorder(torch.tensor([1, 1])),
    lambda cache: cache.truncate(torch.tensor([3, 12])),
    lambda cache: cache.reset(),
    lambda cache: None,
)
CACHED: dict[str, tuple[tuple[int, int], list[dict[str, Tensor]]]] = {
    "step": ((2, 1), [{}] * 8),
    "piece": ((2, 20), [{}] * 8),
    "padded": ((2, 5), [mask_of(COLUMN[:5] < i, COLUMN[:5] >= 8 - i) for i in range(8)]),
    "packed": ((1, 7), [edges_of(i, 7 - i) for i in range(8)]),
}


@pytest.mark.parametrize(
    "of, what, compiler",
    [
        ("block", "step", "aot_eager"),
        ("block", "packed", "aot_eager"),
        slow("block", "piece", "aot_eager"),
        slow("block", "padded", "aot_eager"),
        *(slow("attention", what, "aot_eager") for what in CACHED),
        slow("block", "step", "inductor"),
    ],
)
@torch.no_grad()
def test_cached(of: str, what: str, compiler: str, random: Random, compiled_once: None) -> None:
    """Compiled code does not see what a cache holds, nor what was done to it."""
    module, (shape, contents) = MODULES[of](), CACHED[what]
    call, cache = compiled(module, compiler), nsa.NSACache(CFG, 2, 64, dtype=torch.float64)
    module(random((2, 23, CFG.dim)), cache=cache)
    assert_same_use(call, module, cache, CHANGES, shape, contents, random)


@pytest.mark.parametrize("what", ["step", *map(slow, ("piece", "padded", "packed"))])
@torch.no_grad()
def test_cached_from_the_first_token(what: str, random: Random, compiled_once: None) -> None:
    module, (shape, contents) = block(), CACHED[what]
    cache = nsa.NSACache(CFG, 2, 64, dtype=torch.float64)
    changes = [lambda cache: None] * 3 + [nsa.NSACache.reset]
    assert_same_use(compiled(module), module, cache, changes, shape, contents, random)


def assert_same_use(
    call: Callable[..., Tensor],
    module: nn.Module,
    cache: nsa.NSACache,
    changes: Iterable[Change],
    shape: tuple[int, int],
    contents: list[dict[str, Tensor]],
    random: Random,
) -> None:
    """Outputs and cache are those of eager calls, after each of the changes."""
    twin = copy.deepcopy(cache)
    for change, arguments in zip(changes, contents, strict=False):
        change(cache), change(twin)
        x = random((*shape, CFG.dim))
        actual, expected = call(x, cache=cache, **arguments), module(x, cache=twin, **arguments)
        assert_close64(actual, expected)
        assert cache.lengths == twin.lengths
        for row, n in enumerate(twin.lengths):
            blocks = nsa._compressed_count(n, CFG.block_size, CFG.stride)
            assert_close64(cache.tokens[:, row, :n], twin.tokens[:, row, :n])
            assert_close64(cache.blocks[:, row, :blocks], twin.blocks[:, row, :blocks])


# ---------------------------------------------------------------------------------------------------------------------
# Inside torch's machinery
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "device",
    [nullcontext(), slow(torch.device("cpu"))],
    ids=["", "default_device"],
)
def test_without_gradients(device: AbstractContextManager, random: Random) -> None:
    """Also where tensors have a device by default, whose context torch.compile traces through."""
    module, x = block(), hidden(random)
    with torch.no_grad(), device:
        assert_alike({"output": compiled(module)(x)}, {"output": module(x)})


@every_branch
@pytest.mark.parametrize("context", [torch.enable_grad, torch.inference_mode], ids=lambda context: context.__name__)
def test_functions_of_tensors_without_gradients(
    branch: Branch, context: Callable[[], AbstractContextManager], random: Random
) -> None:
    with context():
        x = {name: tensor.detach() for name, tensor in draw(branch, CASE, random).items()}
        actual, expected = compiled(lambda x: branch(PLAIN, CASE, x))(x), branch(PLAIN, CASE, x)
    for one, other in zip(finite(actual), finite(expected), strict=True):
        assert_close64(one, other)


@every_branch
def test_a_tensor_given_twice(branch: Branch, random: Random) -> None:
    """As keys and as values: its gradient is the sum of both."""
    x = draw(branch, CASE, random)
    one, other = ("k_cmp", "v_cmp") if "k_cmp" in BRANCHES[branch] else ("k", "v")

    def output(x: dict[str, Tensor]) -> Tensor:
        return branch(PLAIN, CASE, x)[0]

    def of_a_pair(x: dict[str, Tensor]) -> Tensor:
        return output({**x, other: x[one]})

    apart = x | {other: x[one].detach().clone().requires_grad_()}
    expected = step(output, {name: apart[name] for name in (one, other)}, apart)
    expected[f"gradient of {one}"] += expected.pop(f"gradient of {other}")
    for call in (of_a_pair, compiled(of_a_pair)):
        assert_alike(step(call, {one: x[one]}, x), expected)


@pytest.mark.slow
def test_autocast(random: Random) -> None:
    module, x = block().float(), hidden(random).detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (step(call, leaves_of(module, x), x) for call in (module, compiled(module)))
    assert expected["output 0"].dtype == torch.float32
    assert_alike(actual, expected, tolerance=torch.finfo(torch.bfloat16).eps)


@pytest.mark.slow
def test_checkpoint(random: Random) -> None:
    module, x = block(), hidden(random)
    call = compiled(lambda x: checkpoint(module, x, use_reentrant=False))
    assert_same_step(call, module, leaves_of(module, x), x)


@every_branch
def test_func_grad(branch: Branch, random: Random) -> None:
    x = draw(branch, CASE, random)
    names = BRANCHES[branch]

    def loss(leaves: dict[str, Tensor], x: dict[str, Tensor]) -> Tensor:
        return sum((output.sin() ** 2).sum() for output in finite(branch(PLAIN, CASE, x | leaves)))

    leaves = {name: x.pop(name) for name in names}
    expected = dict(zip(names, torch.autograd.grad(loss(leaves, x), list(leaves.values())), strict=True))
    leaves, x = ({name: tensor.detach() for name, tensor in each.items()} for each in (leaves, x))
    assert_alike(torch.func.grad(loss)(leaves, x), expected)
    try:
        actual = compiled(torch.func.grad(loss))(leaves, x)
    except torch._dynamo.exc.TorchDynamoException:  # an error, and never other numbers
        pytest.xfail("torch does not trace an autograd function inside torch.func.grad")
    assert_alike(actual, expected)


# ---------------------------------------------------------------------------------------------------------------------
# The path of a GPU, on tensors that hold no numbers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)


@pytest.fixture
def a_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of that name, with a function that can be told in a graph."""
    package = ModuleType("flash_attn")
    package.flash_attn_func = lambda q, k, v, softmax_scale, causal, window_size: torch.tanh(q)
    monkeypatch.setitem(sys.modules, "flash_attn", package)


def operators(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """The operators of the one graph of a function, with their arguments that are strings."""
    nodes: list[torch.fx.Node] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nodes.extend(graph.graph.nodes)
        return graph.forward

    compiled(function, backend)(*arguments)
    called = [node for node in nodes if node.target is torch.tanh or isinstance(node.target, torch._ops.OpOverload)]
    name = lambda node: getattr(node.target, "_opname", "tanh")  # noqa: E731
    return [" ".join([name(node), *(word for word in node.args if isinstance(word, str))]) for node in called]


@pytest.mark.parametrize(
    "capability, flash, expected",
    [
        ((9, 0), "no_flash", ["attention_forward auto"]),
        ((9, 0), "a_flash", ["attention_forward auto"]),
        ((8, 0), "no_flash", ["attention_forward auto"]),
        ((12, 0), "a_flash", ["attention_forward auto"]),
        ((7, 5), "no_flash", ["attention_forward torch"]),
        ((7, 5), "a_flash", ["tanh", "branch_forward torch", "select torch", "branch_forward torch"]),
    ],
)  # fmt: skip
def test_choice_of_a_backend_on_a_gpu(
    capability: tuple[int, int],
    flash: str,
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if nsa.triton is None:
        pytest.skip("needs Triton")
    request.getfixturevalue(flash)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    for name in ("_capability", "_flash_works"):  # with nothing remembered
        monkeypatch.setattr(nsa, name, nsa._once(getattr(nsa, name).__wrapped__))

    def attend(x: dict[str, Tensor]) -> Tensor:
        tensors = (x[name] for name in BRANCHES[whole])
        return nsa.nsa_attention(*tensors, **CASE.whole)

    with FakeTensorMode():
        x = CASE.tensors(Random(seed=0), torch.bfloat16)
        x = {name: torch.empty_like(tensor, device="cuda", requires_grad=False) for name, tensor in x.items()}
        assert operators(attend, x) == expected


@pytest.mark.parametrize("name, taken", [("gfx942:sramecc+:xnack-", True), ("gfx950", True), ("gfx1100", False)])
def test_amd_gpus_that_take_the_kernels(name: str, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    monkeypatch.setattr(nsa, "_architecture", nsa._once(nsa._architecture.__wrapped__))
    monkeypatch.setattr(nsa, "_AMD", True)
    assert nsa._triton_preferred(torch.device("cuda")) is taken


# ---------------------------------------------------------------------------------------------------------------------
# Operators
# ---------------------------------------------------------------------------------------------------------------------

Calls = dict[str, tuple[Any, tuple[Any, ...]]]
NOT_PACKED = (None, None, None, None)  # the tables, and positions of rows


def turned(x: Tensor) -> Tensor:
    """The same numbers in another layout."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def calls(case: Case, backend: str, dtype: torch.dtype) -> Calls:
    """Every operator on every branch, and its arguments: tensors that are not contiguous."""
    random = Random(seed=2)
    x = {name: turned(tensor.detach()) for name, tensor in case.tensors(random, dtype).items()}
    q, k, v, k_cmp, v_cmp, gates = x.values()
    do, choice, scale = turned(torch.randn_like(q)), list(case.choice.values()), 0.3
    own_keys = {"attention": (None, None), "own keys": (turned(k), turned(v))}
    spans = {"local": (k, v, (case.window, 1, 1)), "compressed": (k_cmp, v_cmp, (0, *choice[:2]))}
    lse = nsa._branch_forward(q, k_cmp, v_cmp, None, *NOT_PACKED, backend, *spans["compressed"][2], scale, 0)[1]
    select = q, k_cmp, lse, *NOT_PACKED, backend, *choice, scale, 0
    made: Calls = {"select": (nsa._select, select)}
    branches = {name: ((q, keys, values, None), span) for name, (keys, values, span) in spans.items()}
    branches["selective"] = (q, k, v, nsa._select(*select)), (0, choice[2], choice[2])
    for name, (tensors, span) in branches.items():
        settings = *NOT_PACKED, backend, *span, scale, 0
        o, lse = nsa._branch_forward(*tensors, *settings)
        made[f"{name} forward"] = nsa._branch_forward, (*tensors, *settings)
        made[f"{name} backward"] = nsa._branch_backward, (do, torch.randn_like(lse), o, lse, *tensors, *settings)
    for name, local in own_keys.items():
        tensors, settings = (q, k, v, k_cmp, v_cmp, gates, *local), (*NOT_PACKED, backend, case.window)
        _, *outputs, chosen, index = nsa._attention_forward(*tensors, *settings, *choice, scale, False, 0)
        for recompute in (False, True):
            forward = (*tensors, *settings, *choice, scale, recompute, 0)
            made[f"{name} forward" + ", recomputed" * recompute] = nsa._attention_forward, forward
        made[f"{name} terms"] = nsa._gated_terms, (do, *outputs, gates, case.K, backend)
        keys, terms = (q, k, v, k_cmp, v_cmp, *local), nsa._gated_terms(*made[f"{name} terms"][1])[0]
        backward = (do, terms, chosen, index, *keys, *settings, *choice[:3], scale, 0)
        made[f"{name} backward"] = nsa._attention_backward, backward
    later, tensors = [x[:, 3:] for x in (q, do, gates)], (k, v, k_cmp, v_cmp)
    for name, row_first in {"later": None, "later in each row": torch.arange(case.B, dtype=torch.int32) % 4}.items():
        settings = (*NOT_PACKED[:3], row_first, backend, case.window)
        forward = (later[0], *tensors, later[2], None, None, *settings, *choice, scale, False, 3)
        made[f"attention forward, {name}"] = nsa._attention_forward, forward
        _, *outputs, chosen, index = nsa._attention_forward(*forward)
        terms = nsa._gated_terms(later[1], *outputs, later[2], case.K, backend)[0]
        backward = (later[1], terms, chosen, index, later[0], *tensors, None, None, *settings, *choice[:3], scale, 3)
        made[f"attention backward, {name}"] = nsa._attention_backward, backward
    return made


def calls_of_a_cache() -> Calls:
    """Operators that PyTorch's backend has for caches, packed sequences and positions."""
    case, random = CASE, Random(seed=3)
    x = {name: tensor.detach() for name, tensor in case.tensors(random, torch.float32).items()}
    q, k, v, _, _, gates = x.values()
    streams, blocks = (random((n, case.B, 40, *k.shape[2:]), torch.float32) for n in (3, 2))
    first, choice = torch.tensor([3, 0], dtype=torch.int32), list(case.choice.values())
    return {
        "tables": (nsa._tables, (torch.tensor([0, 3, 20]), 20, 4, "torch", *choice[:2])),
        "append": (nsa._cache_append, (streams, [k, v, k], first, None, "torch")),
        "extend": (nsa._cache_extend, (q, k, v, streams, blocks, first, None, "torch", 1e4, 1.0, None, 0, 1, [])),
        "cached": (nsa._cached_forward, (q, streams, blocks, gates, first, None, "torch", case.window, *choice, 0.3)),
        "project": (nsa._project_few, (gates[:, :, 0], gates[0, 0], *[None, gates[0, 1]] * 2, *[None] * 3, "torch")),
        "rope": (nsa._rope_operator, (torch.tensor([[0, 3], [7, 1]]), 4, 1e4, 1.5, None, torch.bfloat16)),
    }


OPERATORS = [value for value in vars(nsa).values() if hasattr(value, "operator")]


class Recorded(TorchDispatchMode):
    """The first call of each operator by each kind of arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = {value.operator for value in OPERATORS}
        self.calls: dict[Any, tuple[Any, tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in self.operators:
            copies = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args)
            self.calls.setdefault((function, *map(type, args)), (function, copies))
        return function(*args, **(kwargs or {}))


def calls_of_modules(dtype: torch.dtype, tokens: int, **options: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """Every operator that rows, packed sequences and caches come to, and its arguments."""
    random, module = Random(seed=3), attention(**options).to(dtype)
    x = random((2, tokens, module.cfg.dim), dtype)
    packed, cache = edges_of(tokens - 2, 2 + tokens), nsa.NSACache(module.cfg, 2, 64, dtype=dtype)
    with Recorded() as recorded:
        module(x).sum().backward()
        module(x.view(1, -1, module.cfg.dim), **packed).sum().backward()
        with torch.no_grad():
            module(x, cache=cache)
            module(x[:, :1], cache=cache)
            module(x, cache=cache, key_padding_mask=torch.arange(tokens) < torch.tensor([[3], [tokens]]))
            module(x.view(1, -1, module.cfg.dim), cache=cache, **packed)
            module(x[:1, :3], cache=cache, **edges_of(1, 2))
    assert {"tables", "cached_forward"} <= {operator._opname for operator, _ in recorded.calls.values()}
    return list(recorded.calls.values())


@pytest.mark.slow
def test_opcheck() -> None:
    made = calls(CASE, "torch", torch.bfloat16)
    made |= calls_of_a_cache()
    kernels_only = {nsa._compress_forward, nsa._compress_backward}
    assert {operator for operator, _ in made.values()} == set(OPERATORS) - kernels_only
    for operator, arguments in made.values():
        torch.library.opcheck(operator.operator, arguments)
    for arguments in (*calls_of_modules(torch.bfloat16, 11), *calls_of_modules(torch.float64, 11, separate_kv=True)):
        torch.library.opcheck(*arguments)


@interpreted
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes with infinities
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck_of_the_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dtypes, shapes and strides; what else opcheck looks at does not depend on the backend."""
    made = calls(replace(CASE, T=9, B=1), "triton", dtype)
    for name in ("select", "compressed backward", "attention forward", "attention backward"):
        operator, arguments = made[name]
        torch.library.opcheck(operator.operator, arguments, test_utils="test_faketensor")
    kernels = nsa._BACKENDS["triton"]
    monkeypatch.setitem(nsa._BACKENDS, "triton", kernels._replace(preferred=lambda device: True))
    for arguments in calls_of_modules(dtype, 9, dim=64):
        torch.library.opcheck(*arguments, test_utils="test_faketensor")


# ---------------------------------------------------------------------------------------------------------------------
# Importing
# ---------------------------------------------------------------------------------------------------------------------


def test_importing_does_not_load_the_compiler(tmp_path: Path) -> None:
    shutil.copy(nsa.__file__, tmp_path)
    script = "import sys, native_sparse_attention; assert 'torch._dynamo' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_file_imported_twice(tmp_path: Path, random: Random, recwarn: pytest.WarningsRecorder) -> None:
    """Under another name: each has operators of its own, so that a fault of one is none of the other."""
    x = draw(whole, CASE, random)
    tensors = {name: x[name] for name in BRANCHES[whole]}
    expected = step(lambda: nsa.nsa_attention(**tensors, **CASE.whole), tensors)
    copy = Path(shutil.copy(nsa.__file__, tmp_path / "nsa_of_another_project.py"))
    spec = importlib.util.spec_from_file_location(copy.stem, copy)
    other = importlib.util.module_from_spec(spec)
    sys.modules[copy.stem] = other  # where the dataclass looks for its module
    try:
        spec.loader.exec_module(other)
        assert not list(recwarn), [str(each.message) for each in recwarn]
        other._BACKENDS["torch"] = other._BACKENDS["torch"]._replace(
            selected_forward=lambda q, *_, gated, **__: (q + 1, q[..., 0] + 1, gated[1] + 1)
        )
        broken = step(lambda: other.nsa_attention(**tensors, **CASE.whole, backend="torch"), tensors)
        assert not torch.equal(broken["output 0"], expected["output 0"])
        assert_alike(step(lambda: nsa.nsa_attention(**tensors, **CASE.whole), tensors), expected)
        other._BACKENDS["torch"] = nsa._BACKENDS["torch"]
        for module in (other, nsa):
            for call in (module.nsa_attention, compiled(module.nsa_attention)):
                actual = step(lambda call=call: call(**tensors, **CASE.whole), tensors)
                assert_alike(actual, expected)
    finally:
        del sys.modules[copy.stem]
