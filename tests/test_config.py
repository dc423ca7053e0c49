"""NSAConfig: the defaults of the specification, what it derives from them, and how it answers to a bad field."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import native_sparse_attention as nsa
from native_sparse_attention import NativeSparseAttention, NSAConfig

DEFAULTS = {
    "dim": 512,
    "heads": 8,
    "dim_head": None,
    "kv_heads": None,
    "seq_len": 2048,
    "local_window": 128,
    "block_size": 32,
    "stride": None,
    "select_block_size": None,
    "topk_blocks": 4,
    "init_blocks": 0,
    "local_blocks": 1,
    "compression": "grouped_mlp",
    "gate_mode": "static",
    "gate_init": (2.0, -2.0, -2.0),
    "separate_kv": False,
    "qk_norm": None,
    "rope_theta": None,
    "rope_frequencies": None,
    "rope_scale": 1.0,
    "selection_loss": 0.0,
    "dropout": 0.0,
    "bias": False,
    "ffn_mult": 4,
    "use_flash": True,
    "recompute": False,
    "backend": "auto",
}

# ---------------------------------------------------------------------------------------------------------------------
# Good configurations
# ---------------------------------------------------------------------------------------------------------------------


def test_the_fields_and_their_defaults() -> None:
    assert {field.name: field.default for field in dataclasses.fields(NSAConfig)} == DEFAULTS


def test_every_field_that_is_none_gets_its_value() -> None:
    cfg = NSAConfig()
    derived = {"dim_head": 64, "kv_heads": 8, "stride": 32, "select_block_size": 32}
    assert dataclasses.asdict(cfg) == DEFAULTS | derived


@pytest.mark.parametrize(
    "given, derived",
    [
        ({"dim": 96, "heads": 6}, {"dim_head": 16, "kv_heads": 6}),
        ({"dim": 100, "heads": 6, "dim_head": 24}, {"dim_head": 24}),  # heads need not divide dim then
        ({"heads": 8, "kv_heads": 2}, {"kv_heads": 2}),
        ({"block_size": 16}, {"stride": 16, "select_block_size": 16}),
        ({"block_size": 16, "stride": 8}, {"stride": 8, "select_block_size": 16}),
        ({"block_size": 16, "select_block_size": 64}, {"stride": 16, "select_block_size": 64}),
    ],
)
def test_derived_fields_follow_the_given_ones(given: dict[str, int], derived: dict[str, int]) -> None:
    cfg = NSAConfig(**given)
    assert {name: getattr(cfg, name) for name in derived} == derived


class Mean(nn.Module):
    """A compressor of the user's own."""

    def __init__(self, dim: int, block: int, stride: int) -> None:
        super().__init__()


PAPER = {
    "dim": 2560,
    "heads": 64,
    "kv_heads": 4,
    "block_size": 32,
    "stride": 16,
    "select_block_size": 64,
    "topk_blocks": 16,
    "init_blocks": 1,
    "local_blocks": 2,
    "local_window": 512,
    "gate_mode": "q_cond",
    "separate_kv": True,
}
GOOD = [
    pytest.param(PAPER, id="paper"),
    pytest.param({"local_window": 64, "block_size": 16, "topk_blocks": 2}, id="short"),
    pytest.param({"local_window": 128, "block_size": 32, "topk_blocks": 4}, id="medium"),
    pytest.param({"local_window": 256, "block_size": 64, "topk_blocks": 8, "seq_len": 2**20}, id="long"),
    pytest.param({"topk_blocks": 3, "init_blocks": 1, "local_blocks": 2}, id="every block forced"),
    pytest.param({"topk_blocks": 1, "init_blocks": 0, "local_blocks": 0}, id="no block forced"),
    pytest.param({"block_size": 1, "stride": 1, "select_block_size": 3, "local_window": 1}, id="blocks of one token"),
    pytest.param({"compression": Mean}, id="own compressor"),
    pytest.param({"gate_init": (0, -1.5, 3)}, id="gates from ints and floats"),
    pytest.param({"dropout": 0, "rope_theta": 10000}, id="ints for floats"),
    pytest.param({"dim_head": 4, "rope_frequencies": (1.0, 0), "rope_scale": 1.2, "qk_norm": 1e-6}, id="scaled rope"),
]


@pytest.mark.parametrize("fields", GOOD)
def test_good_fields_are_kept_as_given(fields: dict[str, Any]) -> None:
    cfg = NSAConfig(**fields)
    assert {name: getattr(cfg, name) for name in fields} == fields


@pytest.mark.parametrize("fields", GOOD)
def test_a_config_is_a_plain_value(fields: dict[str, Any]) -> None:
    cfg = NSAConfig(**fields)
    assert NSAConfig(**dataclasses.asdict(cfg)) == cfg == dataclasses.replace(cfg)
    assert pickle.loads(pickle.dumps(cfg)) == copy.deepcopy(cfg) == cfg != NSAConfig(dim=8, heads=2)


def test_a_config_comes_back_from_json() -> None:
    cfg = NSAConfig(dim_head=4, rope_frequencies=(1.0, 0.1), qk_norm=1e-6, gate_init=(0.0, 1.0, 2.0))
    assert NSAConfig(**json.loads(json.dumps(dataclasses.asdict(cfg)))) == cfg  # JSON makes lists of tuples


# ---------------------------------------------------------------------------------------------------------------------
# Bad fields: the message names the field, its value and the rule
# ---------------------------------------------------------------------------------------------------------------------


def assert_refused(fields: dict[str, Any], error: type[Exception], name: str, *rule: str) -> None:
    with pytest.raises(error) as caught:
        NSAConfig(**fields)
    value = fields.get(name, DEFAULTS[name])
    text = str(caught.value)
    assert text.split()[0] == name, f"{text!r} does not begin with {name}"
    missing = [part for part in (repr(value), *rule) if part not in text]
    assert not missing, f"{missing} not in {text!r}"


POSITIVE = ("dim", "heads", "dim_head", "kv_heads", "seq_len", "local_window", "block_size", "stride")
POSITIVE += ("select_block_size", "topk_blocks", "ffn_mult")
NOT_NEGATIVE = ("init_blocks", "local_blocks")


@pytest.mark.parametrize("name, least", [(name, 1) for name in POSITIVE] + [(name, 0) for name in NOT_NEGATIVE])
@pytest.mark.parametrize("below", [1, 7])
def test_integers_have_a_least_value(name: str, least: int, below: int) -> None:
    assert_refused({name: least - below}, ValueError, name, f"at least {least}")


@pytest.mark.parametrize("name", POSITIVE + NOT_NEGATIVE)
@pytest.mark.parametrize("value", [32.0, "32", True, (32,)], ids=repr)
def test_integers_are_ints(name: str, value: Any) -> None:
    assert_refused({name: value}, TypeError, name, "int")


OPTIONAL = ("dim_head", "kv_heads", "stride", "select_block_size")


@pytest.mark.parametrize("name", sorted({*POSITIVE, *NOT_NEGATIVE} - {*OPTIONAL}))
def test_a_required_integer_is_not_none(name: str) -> None:
    assert_refused({name: None}, TypeError, name, "int")


@pytest.mark.parametrize("name", ["separate_kv", "bias", "use_flash", "recompute"])
@pytest.mark.parametrize("value", [1, 0, "yes", None], ids=repr)
def test_switches_are_true_or_false(name: str, value: Any) -> None:
    assert_refused({name: value}, TypeError, name, "True or False")


INCONSISTENT = [
    ({"dim": 100, "heads": 8}, "dim", "divisible by heads = 8"),
    ({"heads": 8, "kv_heads": 3}, "heads", "divisible by kv_heads = 3"),
    ({"dim_head": 64, "heads": 8, "kv_heads": 16}, "heads", "divisible by kv_heads = 16"),
    ({"block_size": 16, "stride": 32, "select_block_size": 32}, "stride", "at most block_size = 16"),
    ({"block_size": 20, "stride": 8, "select_block_size": 16}, "block_size", "multiple of stride = 8"),
    ({"block_size": 16, "stride": 8, "select_block_size": 20}, "select_block_size", "multiple of stride = 8"),
    ({"block_size": 16, "select_block_size": 8}, "select_block_size", "multiple of stride = 16"),
    ({"topk_blocks": 3, "init_blocks": 2, "local_blocks": 2}, "topk_blocks", "init_blocks + local_blocks = 2 + 2 = 4"),
    ({"init_blocks": 4}, "topk_blocks", "init_blocks + local_blocks = 4 + 1 = 5"),
    ({"dim": 24, "heads": 8, "dim_head": 3, "rope_theta": 1e4}, "dim_head", "even"),
    ({"dim_head": 3, "rope_frequencies": (1.0,)}, "dim_head", "even"),
    ({"rope_scale": 1.2}, "rope_scale", "needs rope_theta or rope_frequencies"),
    ({"use_flash": False, "backend": "triton"}, "backend", "contradicts use_flash = False"),
]


@pytest.mark.parametrize("fields, name, rule", INCONSISTENT)
def test_fields_that_contradict_each_other(fields: dict[str, Any], name: str, rule: str) -> None:
    assert_refused(fields, ValueError, name, rule)


def test_a_derived_head_dim_is_held_to_the_rules_too() -> None:
    with pytest.raises(ValueError, match=r"^dim_head = 3: .*even"):
        NSAConfig(dim=24, heads=8, rope_theta=1e4)


@pytest.mark.parametrize("value", ["mean", "", "GROUPED_MLP"])
def test_unknown_compression_lists_the_valid_ones(value: str) -> None:
    assert_refused({"compression": value}, ValueError, "compression", "'grouped_mlp'", "'conv1d'", "'avgpool'", "class")


@pytest.mark.parametrize("value", [None, 3, ("avgpool",)], ids=repr)
def test_compression_is_a_name_or_a_class(value: Any) -> None:
    assert_refused({"compression": value}, TypeError, "compression", "'grouped_mlp'", "'conv1d'", "'avgpool'", "class")


@pytest.mark.parametrize("value", ["dynamic", "", None, 1], ids=repr)
def test_unknown_gate_mode_lists_the_valid_ones(value: Any) -> None:
    assert_refused({"gate_mode": value}, ValueError, "gate_mode", "'static'", "'q_cond'")


@pytest.mark.parametrize("value", ["cuda", "", None, 1, ["torch"]], ids=repr)
def test_unknown_backend_lists_the_valid_ones(value: Any) -> None:
    assert_refused({"backend": value}, ValueError, "backend", "'auto', 'torch' or 'triton'")
    assert_refused({"backend": value, "use_flash": False}, ValueError, "backend", "'auto', 'torch' or 'triton'")


NOT_FINITE = (float("nan"), float("inf"), -float("inf"))


@pytest.mark.parametrize(
    "value",
    [(1.0, 2.0), (0.0,) * 4, (), 1.0, None, "abc", {1.0, 2.0, 3.0}, (1.0, "2", 3.0), (1.0, None, 3.0), (1.0, True, 3.0)]
    + [(0.0, number, 1.0) for number in NOT_FINITE],
    ids=repr,
)
def test_gate_init_is_three_finite_numbers(value: Any) -> None:
    assert_refused({"gate_init": value}, ValueError, "gate_init", "3 finite numbers")


@pytest.mark.parametrize("value", [-0.1, 1.0, 1, 2.5, True, "0.1", None, *NOT_FINITE], ids=repr)
def test_dropout_is_a_probability_below_one(value: Any) -> None:
    assert_refused({"dropout": value}, ValueError, "dropout", "[0, 1)")


@pytest.mark.parametrize("value", [0, 0.0, -1e4, True, "10000", *NOT_FINITE], ids=repr)
def test_rope_theta_is_a_finite_number_above_zero(value: Any) -> None:
    assert_refused({"rope_theta": value}, ValueError, "rope_theta", "finite", "above 0")


@pytest.mark.parametrize("value", [0, 0.0, -1e-6, True, "1e-6", *NOT_FINITE], ids=repr)
def test_qk_norm_is_an_eps(value: Any) -> None:
    assert_refused({"qk_norm": value}, ValueError, "qk_norm", "eps", "above 0", "None")


@pytest.mark.parametrize(
    "value",
    [1.0, "ab", (), (1.0,), (1.0,) * 3, (1.0, -0.1), (1.0, True), (1.0, None), torch.ones(2)]
    + [(1.0, number) for number in NOT_FINITE],
    ids=repr,
)
def test_rope_frequencies_are_numbers_for_half_a_head(value: Any) -> None:
    rule = ("dim_head / 2 = 2", "finite numbers of at least 0")
    assert_refused({"dim_head": 4, "rope_frequencies": value}, ValueError, "rope_frequencies", *rule)


@pytest.mark.parametrize("value", [0, 0.0, -1.0, None, True, "1", *NOT_FINITE], ids=repr)
def test_rope_scale_is_a_finite_number_above_zero(value: Any) -> None:
    assert_refused({"rope_scale": value, "rope_theta": 1e4}, ValueError, "rope_scale", "finite", "above 0")


def test_one_rotation_at_most() -> None:
    with pytest.raises(ValueError, match="^rope_theta, rope_frequencies = 'both': give one of them at most"):
        NSAConfig(dim_head=4, rope_theta=1e4, rope_frequencies=(1.0, 0.1))


def test_a_field_that_does_not_exist() -> None:
    with pytest.raises(TypeError, match="windw"):
        NSAConfig(windw=64)


# ---------------------------------------------------------------------------------------------------------------------
# use_flash and backend may change at any time
# ---------------------------------------------------------------------------------------------------------------------


def test_a_change_takes_effect_with_the_next_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    backends: list[str] = []
    whole = nsa._attention

    def record(*args: Any, backend: str, **settings: Any) -> torch.Tensor:
        backends.append(backend)
        return whole(*args, backend=backend, **settings)

    monkeypatch.setattr(nsa, "_attention", record)
    cfg = NSAConfig(dim=8, heads=2, block_size=4)
    attention, x = NativeSparseAttention(cfg), torch.randn(1, 9, 8)
    assert attention.cfg is cfg
    changes = [(True, "auto"), (False, "auto"), (True, "torch"), (False, "torch"), (True, "auto")]
    for attention.cfg.use_flash, attention.cfg.backend in changes:
        attention(x)
    assert backends == ["auto", "torch", "torch", "torch", "auto"]
    attention.cfg.use_flash, attention.cfg.backend = False, "triton"
    with pytest.raises(ValueError, match="^backend = 'triton': contradicts use_flash = False"):
        attention(x)
    attention.cfg.use_flash, attention.cfg.backend = True, "cuda"
    with pytest.raises(ValueError, match="^backend = 'cuda': must be 'auto', 'torch' or 'triton'"):
        attention(x)
