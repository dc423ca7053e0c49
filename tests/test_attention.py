"""NativeSparseAttention against the oracle over its configurations, causality, patterns, and bad input."""

from __future__ import annotations

import copy
import random as python_random
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import BASE, CONFIGS, Random, build, draw_config, every_config, every_config_with, gradients, project, to_out
from conftest import assert_close64, assert_within_budget, reference
from torch import Tensor

from native_sparse_attention import NativeSparseAttention, NSAConfig

# ---------------------------------------------------------------------------------------------------------------------
# The specification of the whole module
# ---------------------------------------------------------------------------------------------------------------------


def assert_is_the_reference(attention: NativeSparseAttention, x: Tensor, random: Random, of: Any = oracle) -> None:
    """Output and every gradient, in float64."""
    x = x.requires_grad_()
    actual, (exact, _) = attention(x), reference(attention, x, of)
    assert_close64(actual, exact, "output")
    names, leaves = zip(("x", x), *attention.named_parameters(), strict=True)
    upstream = [random(exact.shape)]
    pairs = zip(gradients(actual, [*leaves], upstream), gradients(exact, [*leaves], upstream), strict=True)
    for name, pair in zip(names, pairs, strict=True):
        assert_close64(*pair, f"gradient of {name}")


@every_config
def test_output_and_gradients_against_the_oracle(name: str, random: Random) -> None:
    assert_is_the_reference(build(random, **CONFIGS[name]), random((1, 21, 12)), random)


@every_config_with("tokens", [1, 3, 4, 37])
def test_other_lengths_against_the_oracle(name: str, tokens: int, random: Random) -> None:
    assert_is_the_reference(build(random, **CONFIGS[name]), random((2, tokens, 12)), random, oracle.Dense)


@pytest.mark.parametrize("seed", range(25))
def test_a_config_that_constructs_also_runs(seed: int, random: Random) -> None:
    pick = python_random.Random(seed)
    attention = draw_config(pick, random)
    x = random((pick.choice([1, 2]), pick.choice([1, 5, 18, 33, 64]), attention.cfg.dim))
    assert_is_the_reference(attention, x, random, oracle.Dense)


# ---------------------------------------------------------------------------------------------------------------------
# Gates, dropout and use_flash
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate_mode", ["static", "q_cond"])
@pytest.mark.parametrize("gate_init", [(2.0, -2.0, -2.0), (0, 0, 0), (-30.0, 1.5, 30.0)], ids=str)
def test_gates_start_from_gate_init(gate_mode: str, gate_init: tuple[float, ...], random: Random) -> None:
    attention = NativeSparseAttention(NSAConfig(**BASE, gate_mode=gate_mode, gate_init=gate_init))
    gates = attention.attention_patterns(random((2, 7, 12), torch.float32)).gates
    assert gates.shape == (2, 7, 2, 3)
    torch.testing.assert_close(gates, torch.tensor(gate_init, dtype=torch.float32).sigmoid().expand_as(gates))


@pytest.mark.parametrize("tokens", [1, 29])
@pytest.mark.parametrize("name", ["qk_norm", "rope_frequencies", "separate_kv_grouped_rope"])
def test_half_the_window_and_half_the_chosen_blocks_are_dense_attention(name: str, tokens: int, random: Random) -> None:
    """Where each has room for all tokens: the start of a conversion from a dense model."""
    fields = CONFIGS[name] | {"local_window": 30, "topk_blocks": 8, "compression": "avgpool", "separate_kv": False}
    attention, x = build(random, **fields), random((2, tokens, 12))
    with torch.no_grad():
        attention.gate_bias.copy_(torch.tensor([0.0, -30.0, 0.0]))
    p = project(attention, x)
    groups = attention.cfg.heads // attention.cfg.kv_heads
    q, k, v = p["q"].transpose(1, 2), *(p[key].repeat_interleave(groups, 2).transpose(1, 2) for key in "kv")
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    assert_close64(attention(x), to_out(attention, dense))


def test_dropout_acts_in_training_only(random: Random) -> None:
    attention, x = build(random, dropout=0.5), random((2, 21, 12))
    plain = attention.eval()(x)
    assert torch.equal(attention(x), plain)
    attention.train()
    torch.manual_seed(0)
    dropped = attention(x)
    zero = dropped == 0
    assert 0.3 < zero.double().mean() < 0.7, "dropout of one half drops about half of the outputs"
    assert_close64(dropped, (2 * plain).masked_fill(zero, 0.0), "what is kept is scaled, nothing else changes")


@every_config
def test_use_flash_changes_no_result(name: str, random: Random) -> None:
    attention, x = build(random, **CONFIGS[name]), random((2, 21, 12))
    fast = attention(x)
    attention.cfg.use_flash = False
    assert_close64(attention(x), fast)


@every_config
@pytest.mark.parametrize("packed", [False, True])
def test_recompute_keeps_less_and_changes_no_bit(name: str, packed: bool, random: Random) -> None:
    attention, x = build(random, **CONFIGS[name]), random((1, 42, 12))
    cu_seqlens = torch.tensor([0, 21, 23, 42], dtype=torch.int32) if packed else None
    values, kept = [], []
    for attention.cfg.recompute in (False, True):
        sizes: dict[int, int] = {}

        def keep(y: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
            return y

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda y: y):
            y = attention(x, cu_seqlens=cu_seqlens)
        values.append((y, *torch.autograd.grad(y.square().sum(), list(attention.parameters()), allow_unused=True)))
        kept.append(sum(sizes.values()))
    for one, other in zip(*values, strict=True):
        assert one is other or torch.equal(one, other)
    assert kept[0] - kept[1] == y.shape[1] * attention.cfg.heads * attention.cfg.dim_head * y.element_size()


# ---------------------------------------------------------------------------------------------------------------------
# Causality
# ---------------------------------------------------------------------------------------------------------------------


@every_config_with("training", [False, True])
def test_the_future_changes_no_output_and_gets_no_gradient(name: str, training: bool, random: Random) -> None:
    attention = build(random, **CONFIGS[name], dropout=0.2).train(training)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(5)  # the same outputs are dropped every time
        return attention(x)

    x = random((1, 21, 12)).requires_grad_()
    y = run(x)
    for at in (1, 3, 4, 8, 13, 20):
        changed = torch.cat([x[:, :at], random((1, 21 - at, 12))], dim=1)
        after = run(changed)
        assert_close64(after[:, :at], y[:, :at], f"output before token {at}")
        assert not torch.equal(after[:, at:], y[:, at:]), f"nothing depends on the tokens from {at} on"
        (gradient,) = torch.autograd.grad(y[:, :at], x, random((1, at, 12)), retain_graph=True)
        assert not gradient[:, at:].any(), f"the output before token {at} has a gradient in the future"
        assert gradient[:, :at].any(), f"the output before token {at} has no gradient at all"


# ---------------------------------------------------------------------------------------------------------------------
# Attention patterns
# ---------------------------------------------------------------------------------------------------------------------


@every_config
def test_patterns_have_rows_of_one_or_zero(name: str, random: Random) -> None:
    attention, tokens = build(random, torch.float32, **CONFIGS[name]), 21
    cfg, patterns = attention.cfg, attention.attention_patterns(random((2, tokens, 12), torch.float32))
    blocks = oracle.compressed_count(tokens, cfg.block_size, cfg.stride)
    assert patterns.local.shape == patterns.selective.shape == (2, cfg.heads, tokens, tokens)
    assert patterns.compressed.shape == (2, cfg.heads, tokens, blocks)
    assert patterns.gates.shape == (2, tokens, cfg.heads, 3)
    assert patterns.block_indices.shape == (2, tokens, cfg.kv_heads, cfg.topk_blocks)
    chosen = oracle.selective_mask(patterns.block_indices, cfg.select_block_size)  # (B, T, K, T)
    group = cfg.heads // cfg.kv_heads
    masks = {
        "local": oracle.local_mask(tokens, cfg.local_window),
        "compressed": oracle.compressed_mask(tokens, cfg.block_size, cfg.stride),
        "selective": chosen.transpose(1, 2).repeat_interleave(group, dim=1),
    }
    for branch, mask in masks.items():
        p = getattr(patterns, branch)
        assert p.is_floating_point() and not p.requires_grad
        assert torch.equal(p > 0, mask.expand_as(p)), f"{branch}: not what the rules let a query see"
        assert p.ge(0).all(), f"{branch}: a negative probability"
        torch.testing.assert_close(p.sum(-1), mask.any(-1).float().expand(p.shape[:-1]))


@every_config
def test_patterns_times_values_is_the_output(name: str, random: Random) -> None:
    attention = build(random, torch.float32, **CONFIGS[name])
    x = random((2, 21, 12), torch.float32)
    patterns, group = attention.attention_patterns(x), attention.cfg.heads // attention.cfg.kv_heads
    exact, _ = reference(attention, x, oracle.Dense)
    tensors = project(attention, x)
    branches = ((patterns.local, "v_local"), (patterns.compressed, "v_cmp"), (patterns.selective, "v"))
    o = 0
    for branch, (p, values) in enumerate(branches):
        v = tensors[values].float().repeat_interleave(group, dim=2)
        o = o + patterns.gates[..., branch, None] * torch.einsum("bhts,bshd->bthd", p, v)
    assert_within_budget(to_out(attention, o), plain=attention(x), exact=exact, what="patterns · values", terms=21)


def test_patterns_look_the_same_in_training(random: Random) -> None:
    """Dropout is never on probabilities."""
    attention, x = build(random, dropout=0.5), random((2, 21, 12))
    pairs = zip(attention.train().attention_patterns(x), attention.eval().attention_patterns(x), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


# ---------------------------------------------------------------------------------------------------------------------
# Empty and bad input
# ---------------------------------------------------------------------------------------------------------------------


@every_config_with("shape", [(2, 0, 12), (0, 21, 12), (0, 0, 12)])
def test_empty_input_gives_empty_output(name: str, shape: tuple[int, ...], random: Random) -> None:
    attention = build(random, **CONFIGS[name])
    x = random(shape).requires_grad_()
    y = attention(x)
    assert y.shape == shape and y.dtype == torch.float64
    y.sum().backward()
    assert x.grad.shape == shape
    for parameter, weight in attention.named_parameters():
        assert weight.grad is None or not weight.grad.any(), f"{parameter} learns from nothing"
    patterns = attention.attention_patterns(x)
    assert patterns.local.shape == (shape[0], attention.cfg.heads, shape[1], shape[1])
    assert patterns.block_indices.shape == (*shape[:2], attention.cfg.kv_heads, attention.cfg.topk_blocks)


BAD = {
    "rank 2": (lambda x: x[0], ValueError, "x.shape", "(21, 12)", "3 dimensions"),
    "rank 4": (lambda x: x[None], ValueError, "x.shape", "(1, 2, 21, 12)", "3 dimensions"),
    "width": (lambda x: x[..., :11], ValueError, "x.shape", "(2, 21, 11)", "dim = 12"),
    "too long": (lambda x: x.repeat(1, 4, 1)[:, :65], ValueError, "x.shape", "(2, 65, 12)", "seq_len = 64"),
    "half": (lambda x: x.half(), ValueError, "x.dtype", "torch.float16", "torch.float64"),
    "float": (lambda x: x.float(), ValueError, "x.dtype", "torch.float32", "torch.float64"),
    "integers": (lambda x: x.long(), TypeError, "x.dtype", "torch.int64", "floating point"),
    "complex": (lambda x: x.to(torch.complex128), TypeError, "x.dtype", "torch.complex128", "floating point"),
    "device": (lambda x: x.to("meta"), ValueError, "x.device", "meta", "cpu"),
    "list": (lambda x: x.tolist(), TypeError, "x", "list", "tensor"),
    "none": (lambda x: None, TypeError, "x", "NoneType", "tensor"),
}


@pytest.mark.parametrize("method", ["forward", "attention_patterns"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_refused(kind: str, method: str, random: Random) -> None:
    spoil, error, *parts = BAD[kind]
    with pytest.raises(error) as caught:
        getattr(build(random), method)(spoil(random((2, 21, 12))))
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in {str(caught.value)!r}"


def test_frequencies_stay_exact_in_a_module_of_low_precision(random: Random) -> None:
    """And a first call on a device, here on one where the module has not been, may be in inference mode."""
    attention, x = build(random, **CONFIGS["rope_frequencies"]), random((2, 30, 12))
    other = copy.deepcopy(attention).bfloat16().double()
    other.load_state_dict(attention.state_dict())
    assert torch.equal(other(x), attention(x))
    with torch.device("meta"):
        other = NativeSparseAttention(attention.cfg)
    other.load_state_dict(attention.state_dict(), assign=True)
    with torch.inference_mode():
        assert torch.equal(other(x), attention(x))
    other(x).sum().backward()


def test_the_longest_sequence_is_accepted(random: Random) -> None:
    assert build(random)(random((1, 64, 12))).shape == (1, 64, 12)


@pytest.mark.parametrize("config", [None, BASE, 512], ids=["None", "dict", "int"])
def test_the_config_is_an_nsa_config(config: object) -> None:
    with pytest.raises(TypeError, match="config.*NSAConfig"):
        NativeSparseAttention(config)
