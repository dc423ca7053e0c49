"""The functional API: how it answers to bad arguments, its scale, and how the branches make up the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from cases import Case, Random, gradients
from conftest import assert_close64, assert_valid_choice
from torch import Tensor

import native_sparse_attention as nsa

CASE = Case("plain", T=43, B=2, H=4, K=2, D=8, block_size=8, stride=4, select_block_size=8, topk_blocks=3, window=6)
SETTINGS = {
    nsa.local_attention: {"window": CASE.window},
    nsa.compressed_attention: CASE.compression,
    nsa.select_blocks: CASE.choice,
    nsa.selective_attention: {"select_block_size": CASE.select_block_size},
    nsa.nsa_attention: CASE.whole,
}
TENSORS = {
    nsa.local_attention: ("q", "k", "v"),
    nsa.compressed_attention: ("q", "k_cmp", "v_cmp"),
    nsa.select_blocks: ("q", "k_cmp", "lse"),
    nsa.selective_attention: ("q", "k", "v", "block_indices"),
    nsa.nsa_attention: ("q", "k", "v", "k_cmp", "v_cmp", "gates"),
}
FUNCTIONS = tuple(SETTINGS)
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


def arguments(function: Callable[..., Any], random: Random) -> dict[str, Any]:
    """A good call of the function, by keyword."""
    x = CASE.tensors(random)
    x["lse"] = oracle.Dense.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], **CASE.compression)[1].detach()
    x["block_indices"] = random.block_indices(CASE)
    return {name: x[name] for name in TENSORS[function]} | SETTINGS[function]


def assert_refused(function: Callable[..., Any], call: dict[str, Any], *parts: str) -> None:
    """A ValueError or TypeError whose message holds every part: the argument, its value, the rule."""
    with pytest.raises((ValueError, TypeError)) as caught:
        function(**call)
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in {str(caught.value)!r}"


# ---------------------------------------------------------------------------------------------------------------------
# Bad arguments
# ---------------------------------------------------------------------------------------------------------------------


def every_tensor(*left_out: str) -> pytest.MarkDecorator:
    """Each tensor of each function, but for those that a rule does not concern."""
    pairs = [(function, name) for function in FUNCTIONS for name in TENSORS[function] if name not in left_out]
    ids = [f"{function.__name__}-{name}" for function, name in pairs]
    return pytest.mark.parametrize("function, name", pairs, ids=ids)


def blame(name: str, call: dict[str, Any]) -> tuple[str, ...]:
    """Where q is the odd one out, the next tensor is blamed for differing from it, whichever that is."""
    return () if name == "q" else (name, str(tuple(call[name].shape)))


@every_function
def test_the_good_call_is_accepted(function: Callable[..., Any], random: Random) -> None:
    result = function(**arguments(function, random))
    o = result[0] if isinstance(result, tuple) else result
    slots = (CASE.K, CASE.topk_blocks) if function is nsa.select_blocks else (CASE.H, CASE.D)
    assert o.shape == (CASE.B, CASE.T, *slots)


@every_tensor()
def test_wrong_rank(function: Callable[..., Any], name: str, random: Random) -> None:
    call = arguments(function, random)
    call[name] = call[name][0]
    assert_refused(function, call, name, str(tuple(call[name].shape)), "dimensions")


@every_tensor()
def test_not_a_tensor(function: Callable[..., Any], name: str, random: Random) -> None:
    call = arguments(function, random)
    call[name] = call[name].tolist()
    assert_refused(function, call, name, "list", "tensor")


@every_tensor("block_indices")
@pytest.mark.parametrize("dimension", [0, 1, -1])
def test_mismatched_shapes(function: Callable[..., Any], name: str, dimension: int, random: Random) -> None:
    """A batch entry, a token or block, or a number too many; the number of heads is a matter of its own."""
    call = arguments(function, random)
    call[name] = torch.cat([call[name], call[name].narrow(dimension, 0, 1)], dim=dimension).detach()
    assert_refused(function, call, *blame(name, call), "shape")


@pytest.mark.parametrize("dimension", [0, 1, 2])
def test_mismatched_block_indices(dimension: int, random: Random) -> None:
    call = arguments(nsa.selective_attention, random)
    call["block_indices"] = call["block_indices"].repeat_interleave(2, dim=dimension)
    assert_refused(nsa.selective_attention, call, *blame("block_indices", call), "shape", str((2, 43, 2, 3)))


@every_tensor("block_indices", "lse")
def test_mismatched_dtypes(function: Callable[..., Any], name: str, random: Random) -> None:
    call = arguments(function, random)
    call[name] = call[name].float()
    assert_refused(function, call, *blame(name, call)[:1], "dtype", "torch.float32", "torch.float64")


@every_tensor("block_indices")
def test_integers_instead_of_floats(function: Callable[..., Any], name: str, random: Random) -> None:
    call = arguments(function, random)
    call[name] = random.integers(0, 5, call[name].shape)
    assert_refused(function, call, name, "dtype", "torch.int64")


@every_tensor()
def test_mismatched_devices(function: Callable[..., Any], name: str, random: Random) -> None:
    call = arguments(function, random)
    call[name] = call[name].to("meta")
    assert_refused(function, call, *blame(name, call)[:1], "device", "meta", "cpu")


@every_function
def test_key_heads_divide_query_heads(function: Callable[..., Any], random: Random) -> None:
    call = arguments(function, random)
    for name in ("k", "v", "k_cmp", "v_cmp"):
        if name in call:
            call[name] = torch.cat([call[name], call[name][:, :, :1]], dim=2).detach()  # 3 of them, for 4 query heads
    first = TENSORS[function][1]
    assert_refused(function, call, first, str(tuple(call[first].shape)), "4 heads", "divi")


@pytest.mark.parametrize("function", [nsa.compressed_attention, nsa.select_blocks, nsa.nsa_attention])
@pytest.mark.parametrize("tokens, rows", [(43, 8), (43, 10), (7, 1), (8, 0)])
def test_number_of_compressed_blocks(function: Callable[..., Any], tokens: int, rows: int, random: Random) -> None:
    call = arguments(function, random)
    for name in set(call) & {"q", "k", "v", "gates", "lse"}:
        call[name] = call[name][:, :tokens]
    for name in set(call) & {"k_cmp", "v_cmp"}:
        call[name] = random((CASE.B, rows, CASE.K, CASE.D))
    wanted = (tokens - 8) // 4 + 1 if tokens >= 8 else 0
    assert_refused(function, call, "k_cmp", str((2, rows, 2, 8)), str((2, wanted, 2, 8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.uint8], ids=str)
def test_block_indices_are_integers(dtype: torch.dtype, random: Random) -> None:
    call = arguments(nsa.selective_attention, random)
    call["block_indices"] = call["block_indices"].clamp(min=0).to(dtype)
    assert_refused(nsa.selective_attention, call, "block_indices", str(dtype), "int32")


NUMBERS = [
    (nsa.local_attention, "window", 0, "at least 1"),
    (nsa.local_attention, "window", -3, "at least 1"),
    (nsa.local_attention, "window", 2.5, "int"),
    (nsa.local_attention, "window", True, "int"),
    (nsa.compressed_attention, "block_size", 0, "at least 1"),
    (nsa.compressed_attention, "stride", 0, "at least 1"),
    (nsa.compressed_attention, "stride", 16, "block_size"),
    (nsa.compressed_attention, "block_size", 6, "multiple of stride"),
    (nsa.select_blocks, "select_block_size", 0, "at least 1"),
    (nsa.select_blocks, "select_block_size", 6, "multiple of stride"),
    (nsa.select_blocks, "topk_blocks", 0, "at least 1"),
    (nsa.select_blocks, "topk_blocks", 3.0, "int"),
    (nsa.select_blocks, "init_blocks", -1, "at least 0"),
    (nsa.select_blocks, "local_blocks", -1, "at least 0"),
    (nsa.selective_attention, "select_block_size", 0, "at least 1"),
    (nsa.selective_attention, "select_block_size", "8", "int"),
    (nsa.nsa_attention, "local_window", 0, "at least 1"),
    (nsa.nsa_attention, "stride", 16, "block_size"),
    (nsa.nsa_attention, "select_block_size", 6, "multiple of stride"),
    (nsa.nsa_attention, "init_blocks", -1, "at least 0"),
]


@pytest.mark.parametrize("function, name, value, rule", NUMBERS)
def test_numbers_out_of_range(function: Callable[..., Any], name: str, value: Any, rule: str, random: Random) -> None:
    assert_refused(function, arguments(function, random) | {name: value}, name, repr(value), rule)


@pytest.mark.parametrize("function", [nsa.select_blocks, nsa.nsa_attention])
def test_more_forced_blocks_than_slots(function: Callable[..., Any], random: Random) -> None:
    call = arguments(function, random) | {"init_blocks": 2, "local_blocks": 2}
    assert_refused(function, call, "topk_blocks", "3", "init_blocks + local_blocks", "4")


@every_function
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", True])
def test_scale_is_a_finite_number(function: Callable[..., Any], scale: Any, random: Random) -> None:
    assert_refused(function, arguments(function, random) | {"scale": scale}, "scale", repr(scale), "finite")


@pytest.mark.parametrize("given", ["k_local", "v_local"])
def test_local_keys_and_values_come_together(given: str, random: Random) -> None:
    call = arguments(nsa.nsa_attention, random)
    assert_refused(nsa.nsa_attention, call | {given: call["k"]}, "k_local", "v_local")


@pytest.mark.parametrize("name", ["k_local", "v_local"])
@pytest.mark.parametrize("dimension", [0, 1, 2, 3])
def test_mismatched_local_keys_and_values(name: str, dimension: int, random: Random) -> None:
    call = arguments(nsa.nsa_attention, random)
    call |= {"k_local": call["k"], "v_local": call["v"]}
    call[name] = torch.cat([call[name], call[name].narrow(dimension, 0, 1)], dim=dimension).detach()
    assert_refused(nsa.nsa_attention, call, *blame(name, call), "shape")


@every_function
def test_unknown_backend(function: Callable[..., Any], random: Random) -> None:
    call = arguments(function, random) | {"backend": "cuda"}
    assert_refused(function, call, "backend", "'cuda'", "'auto'", "'torch'", "'triton'")


def test_more_key_heads_than_a_grid_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nsa, "_INTERPRETED", True)
    q = torch.zeros(65536, 1, 1, 1)
    with pytest.raises(ValueError, match=r"backend = 'triton'.*(65536 × 1|not installed)"):
        nsa.local_attention(q, q, q, 1, backend="triton")


@every_function
def test_triton_on_a_cpu_says_why_not(
    function: Callable[..., Any], random: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the other tests let Triton's interpreter take CPU tensors: here it is off."""
    monkeypatch.setattr(nsa, "_INTERPRETED", False)
    call = arguments(function, random)
    call = {k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}
    with pytest.raises(ValueError, match=r"backend = 'triton'.*(TRITON_INTERPRET|not installed)"):
        function(**call, backend="triton")


# ---------------------------------------------------------------------------------------------------------------------
# Scale, and the whole
# ---------------------------------------------------------------------------------------------------------------------


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f is not nsa.select_blocks], ids=lambda f: f.__name__)
@pytest.mark.parametrize("scale", [0.7, -1.3, 2])
def test_scale_is_honoured(function: Callable[..., Any], scale: float, random: Random) -> None:
    """A factor on q·k is the same as a factor on q, once the default of 1/sqrt(D) is taken out."""
    call = arguments(function, random)
    expected = function(**call | {"q": call["q"] * scale * CASE.D**0.5})
    for actual, value, default in zip(
        as_tuple(function(**call, scale=scale)), as_tuple(expected), as_tuple(function(**call)), strict=True
    ):
        assert_close64(actual, value)
        assert not torch.equal(actual, default)


@pytest.mark.parametrize("scale", [0.7, -1.3, 2])
def test_scale_of_the_choice_is_honoured(scale: float, random: Random) -> None:
    x = CASE.tensors(random)
    _, lse = nsa.compressed_attention(x["q"], x["k_cmp"], x["v_cmp"], **CASE.compression, scale=scale)
    chosen = nsa.select_blocks(x["q"], x["k_cmp"], lse, **CASE.choice, scale=scale)
    importance = oracle.importance(x["q"], x["k_cmp"], *CASE.compression.values(), CASE.select_block_size, scale)
    assert_valid_choice(chosen, importance, CASE, tolerance=1e-10)


def random_local(random: Random, separate: bool) -> dict[str, Tensor]:
    shape = (CASE.B, CASE.T, CASE.K, CASE.D)
    return {name: random(shape).requires_grad_() for name in ("k_local", "v_local")} if separate else {}


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("separate", [False, True], ids=["shared_kv", "separate_kv"])
def test_the_whole_is_the_gated_sum_of_the_branches(separate: bool, scale: float | None, random: Random) -> None:
    call = arguments(nsa.nsa_attention, random)
    own = random_local(random, separate)
    q, k, v, k_cmp, v_cmp, gates = (call[name] for name in TENSORS[nsa.nsa_attention])
    o = nsa.nsa_attention(**call, **own, scale=scale)
    o_local = nsa.local_attention(q, own.get("k_local", k), own.get("v_local", v), CASE.window, scale=scale)
    o_compressed, lse = nsa.compressed_attention(q, k_cmp, v_cmp, **CASE.compression, scale=scale)
    chosen = nsa.select_blocks(q, k_cmp, lse, **CASE.choice, scale=scale)
    o_selective = nsa.selective_attention(q, k, v, chosen, CASE.select_block_size, scale=scale)
    parts = gates[..., :1] * o_local + gates[..., 1:2] * o_compressed + gates[..., 2:] * o_selective
    assert_close64(o, parts)
    leaves = [q, k, v, k_cmp, v_cmp, gates, *own.values()]
    upstream = [random(o.shape)]
    for actual, expected in zip(gradients(o, leaves, upstream), gradients(parts, leaves, upstream), strict=True):
        assert_close64(actual, expected)


@pytest.mark.parametrize("separate", [False, True], ids=["shared_kv", "separate_kv"])
def test_the_whole_against_the_oracle(separate: bool, random: Random) -> None:
    """With a choice of its own on either side."""
    call = arguments(nsa.nsa_attention, random)
    own = random_local(random, separate)
    o, exact = nsa.nsa_attention(**call, **own, backend="torch"), oracle.nsa_attention(**call, **own)
    assert_close64(o, exact)
    leaves = [x for x in (call | own).values() if isinstance(x, Tensor)]
    upstream = [random(o.shape)]
    for actual, expected in zip(gradients(o, leaves, upstream), gradients(exact, leaves, upstream), strict=True):
        assert_close64(actual, expected)


@every_function
def test_auto_is_the_torch_backend_on_a_cpu(function: Callable[..., Any], random: Random) -> None:
    call = arguments(function, random)
    auto, plain = function(**call), function(**call, backend="torch")
    for one, other in zip(as_tuple(auto), as_tuple(plain), strict=True):
        assert torch.equal(one, other)


# ---------------------------------------------------------------------------------------------------------------------
# flash-attn
# ---------------------------------------------------------------------------------------------------------------------


def test_flash_attention_sees_the_same_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where flash-attn serves, it is asked for W keys; here a dense mask stands in for the package."""

    def flash(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window_size: tuple) -> Tensor:
        assert causal, "flash-attn must be asked for causal attention"
        left, right = window_size
        t, s = torch.arange(q.shape[1])[:, None], torch.arange(q.shape[1])
        seen = (s <= t + right) & (s >= t - left)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=softmax_scale, enable_gqa=True)
        return o.transpose(1, 2)

    shapes = ((1, 40, 4, 16), (1, 40, 2, 16), (1, 40, 2, 16))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    own = nsa.local_attention(q, k, v, 7, scale=0.3)
    monkeypatch.setattr(nsa, "_flash_attention", lambda q, backend, *_: flash if backend == "auto" else None)
    torch.testing.assert_close(nsa.local_attention(q, k, v, 7, scale=0.3), own, rtol=1e-10, atol=1e-12)
    explicit = nsa.local_attention(q, k, v, 7, scale=0.3, backend="torch")
    assert torch.equal(explicit, own), "backend='torch' must not take flash-attn"
