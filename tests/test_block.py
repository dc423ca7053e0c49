"""NSABlock as users have it: the snippets of the README, saving and loading, dtypes, checkpointing, and training."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import oracle
import pytest
import torch
from cases import Random
from conftest import assert_close64, assert_within_budget
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import native_sparse_attention as nsa
from native_sparse_attention import NativeSparseAttention, NSABlock, NSACache, NSAConfig

BASE = {"dim": 16, "heads": 4, "seq_len": 64, "local_window": 6, "block_size": 4, "topk_blocks": 3}
PAPER = {"stride": 2, "select_block_size": 8, "kv_heads": 2, "gate_mode": "q_cond", "separate_kv": True}
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "conv1d": {"compression": "conv1d", "stride": 2, "bias": True},
    "avgpool": {"compression": "avgpool", "rope_theta": 10000.0},
    "paper": {**PAPER, "init_blocks": 1, "rope_theta": 10000.0},
    "normed": {"qk_norm": 1e-6, "rope_frequencies": (1.0, 0.1), "rope_scale": 1.2},
}
every_config = pytest.mark.parametrize("name", CONFIGS)


def build(name: str = "default", seed: int = 0, **fields: Any) -> NSABlock:
    torch.manual_seed(seed)
    return NSABlock(NSAConfig(**BASE | CONFIGS[name] | fields))


def tokens(random: Random, length: int = 27, dtype: torch.dtype = torch.float32) -> Tensor:
    return random((2, length, 16), dtype)


# ---------------------------------------------------------------------------------------------------------------------
# What a user does
# ---------------------------------------------------------------------------------------------------------------------


def test_the_quick_start() -> None:
    from native_sparse_attention import NSABlock, NSAConfig

    config = NSAConfig(
        dim=512,
        heads=8,
        seq_len=2048,
        local_window=128,
        block_size=32,
        topk_blocks=4,
        compression="grouped_mlp",
    )
    block = NSABlock(config)
    x = torch.randn(2, 1024, 512)
    y = block(x)
    assert y.shape == x.shape == (2, 1024, 512)
    assert bool(y.isfinite().all()) and y.dtype == torch.float32


class UserBlock(nn.Module):
    """A Transformer block of the user's own, with its attention replaced."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = NativeSparseAttention(NSAConfig(dim=n_embd, heads=n_head, seq_len=1024))
        self.ln_2 = nn.LayerNorm(n_embd)
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


def test_attention_in_a_block_of_the_users_own(random: Random) -> None:
    block, x = UserBlock(n_embd=48, n_head=4), random((2, 130, 48), torch.float32)
    y = block(x)
    y.square().mean().backward()
    assert y.shape == x.shape
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), f"no gradient for {name}"


def test_a_stack_of_blocks(random: Random) -> None:
    config = NSAConfig(**BASE)
    model, x = nn.Sequential(*(NSABlock(config) for _ in range(3))), tokens(random)
    by_hand = x
    for block in model:
        by_hand = block(by_hand)
    assert model(x).shape == x.shape
    assert torch.equal(model(x), by_hand)


@every_config
def test_a_block_is_two_residual_steps(name: str, random: Random) -> None:
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""
    block, x = build(name).double(), tokens(random, dtype=torch.float64)

    def norm(y: Tensor, layer: nn.LayerNorm) -> Tensor:
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * layer.weight
        return y if layer.bias is None else y + layer.bias

    def linear(y: Tensor, layer: nn.Linear) -> Tensor:
        return y @ layer.weight.T + (0 if layer.bias is None else layer.bias)

    first, last = (layer for layer in block.ffn if isinstance(layer, nn.Linear))
    assert first.out_features == 4 * 16
    middle = x + block.attn(norm(x, block.norm1))
    exact = middle + linear(oracle.gelu(linear(norm(middle, block.norm2), first)), last)
    assert_close64(block(x), exact)


# ---------------------------------------------------------------------------------------------------------------------
# Copying, saving, loading
# ---------------------------------------------------------------------------------------------------------------------


def saved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state_dict that went through a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_config
@pytest.mark.parametrize("through", [dict, saved], ids=["in memory", "through a file"])
def test_state_dict_round_trip(name: str, through: Any, random: Random) -> None:
    block, other, x = build(name, seed=1), build(name, seed=2), tokens(random)
    y = block(x)
    assert not torch.equal(other(x), y), "two seeds, one block: nothing to load"
    other.load_state_dict(through(block.state_dict()))
    assert torch.equal(other(x), y)


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(2, 5, 17), ValueError, r"x.shape = \(2, 5, 17\): must have dim = 16 in dimension 2"),
        (torch.zeros(5, 16), ValueError, r"x.shape = \(5, 16\): must have 3 dimensions"),
        (torch.zeros(2, 5, 16, dtype=torch.float64), ValueError, "x.dtype = torch.float64: must be the weights'"),
        (torch.zeros(2, 5, 16, dtype=torch.int64), TypeError, "x.dtype = torch.int64: must be a floating point type"),
        (torch.zeros(2, 5, 16, device="meta"), ValueError, "x.device = 'meta': must be the weights', cpu"),
        ([[0.0] * 16], TypeError, "x = 'list': must be a tensor"),
    ],
)
def test_a_wrong_input_is_named_before_the_norm_sees_it(x: Any, error: type[Exception], message: str) -> None:
    block = NSABlock(NSAConfig(**BASE))
    cache = NSACache(block.attn.cfg, batch=2, max_len=20)
    for options in ({}, {"cache": cache}):
        with pytest.raises(error, match=message):
            block(x, **options)
    assert cache.lengths == (0, 0)


def test_state_dict_holds_the_parameters_and_nothing_else() -> None:
    block = build("paper")
    assert set(block.state_dict()) == {name for name, _ in block.named_parameters()}


@every_config
def test_a_deep_copy_is_equal_and_independent(name: str, random: Random) -> None:
    block, x = build(name), tokens(random)
    y, twin = block(x), copy.deepcopy(block)
    assert torch.equal(twin(x), y)
    twin.attn.cfg.use_flash = False
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2.0)
    assert torch.equal(block(x), y) and block.attn.cfg.use_flash
    assert not torch.equal(twin(x), y)


@every_config
def test_pickling_keeps_the_whole_block(name: str, random: Random) -> None:
    block, x = build(name, dropout=0.1).eval(), tokens(random)
    twin = pickle.loads(pickle.dumps(block))
    assert twin.attn.cfg == block.attn.cfg and not twin.training
    assert torch.equal(twin(x), block(x))


@every_config
@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
def test_construction_on_meta(name: str, assign: bool, random: Random) -> None:
    block, x = build(name), tokens(random)
    with torch.device("meta"):
        empty = NSABlock(NSAConfig(**BASE | CONFIGS[name]))
    assert all(tensor.is_meta for tensor in empty.state_dict().values())
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(block.state_dict(), assign=assign)
    assert torch.equal(empty(x), block(x))


# ---------------------------------------------------------------------------------------------------------------------
# Precision: the block with the library's attention, and with plain PyTorch's in its place
# ---------------------------------------------------------------------------------------------------------------------


def plain_attention(*args: Tensor, backend: str, cu_seqlens: None, **arguments: Any) -> Tensor:
    """The oracle's dense masks, in the dtype of its inputs."""
    return oracle.Dense.nsa_attention(*args, **arguments)


def run(block: NSABlock, x: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """Output and gradients by name."""
    x = x.detach().requires_grad_()
    leaves = {"x": x, **dict(block.named_parameters())}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = block(x)
    upstream = Random(seed=1)(y.shape, y.dtype)
    of_leaves = torch.autograd.grad(y, list(leaves.values()), upstream)
    return {"output": y} | {f"gradient of {name}": g for name, g in zip(leaves, of_leaves, strict=True)}


def in_plain_pytorch(block: NSABlock, x: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nsa, "nsa_attention", plain_attention)
        return run(block, x, autocast)


def assert_within_budgets(actual: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Output and gradients, each within its error budget."""
    terms = actual["output"].shape[:2].numel()
    largest = max(value.abs().max().item() for value in exact.values())
    for what, value in actual.items():
        if exact[what].abs().max() > 1e-9 * largest:
            assert_within_budget(value, plain[what], exact[what], what, terms=terms)
        else:  # softmax does not feel a shift of all keys: this gradient is 0, and what is left of it is rounding
            bound = terms**0.5 * torch.finfo(plain[what].dtype).eps * largest
            assert value.abs().max() <= bound, f"{what} should vanish, and is {value.abs().max():.3g}, over {bound:.3g}"


@every_config
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_to_dtype_keeps_to_the_error_of_plain_pytorch(name: str, dtype: torch.dtype, random: Random) -> None:
    """Slots for every block: rounding must not turn the choice, or outputs could not be compared."""
    block, x = build(name, topk_blocks=16).to(dtype), tokens(random, dtype=dtype)
    exact = in_plain_pytorch(copy.deepcopy(block).double(), x.double())
    plain, actual = in_plain_pytorch(block, x), run(block, x)
    for what, value in actual.items():
        assert value.dtype == dtype, f"{what} is {value.dtype}"
    if dtype == torch.float64:
        for what, value in actual.items():
            assert_close64(value, exact[what], what)
    else:
        assert_within_budgets(actual, plain, exact)


@every_config
def test_autocast_keeps_to_the_error_of_plain_pytorch(name: str, random: Random) -> None:
    block, x = build(name, topk_blocks=16), tokens(random)
    exact = in_plain_pytorch(copy.deepcopy(block).double(), x.double())
    plain, actual = (f(block, x, autocast=True) for f in (in_plain_pytorch, run))
    full = run(block, x)
    assert not torch.equal(actual["output"], full["output"]), "autocast had no effect"
    for what, value in actual.items():
        assert value.dtype == torch.float32, f"{what} is {value.dtype}"
    # The products are bfloat16 ones, whatever the dtype of the result: so is the ulp that the budget counts in.
    assert_within_budgets(actual, {what: value.bfloat16() for what, value in plain.items()}, exact)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


@every_config
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(name: str, use_reentrant: bool, random: Random) -> None:
    block, x = build(name, dropout=0.2).double(), tokens(random, dtype=torch.float64).requires_grad_()
    upstream, results = random(x.shape), []
    for call in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        torch.manual_seed(3)  # the same dropout
        block.zero_grad()
        x.grad = None
        call(x).backward(upstream)
        results.append({"x": x.grad, **{name: weight.grad for name, weight in block.named_parameters()}})
    stored, recomputed = results
    for what, gradient in stored.items():
        assert gradient.any(), f"{what} has no gradient"
        assert_close64(recomputed[what], gradient, f"gradient of {what}")


@every_config
def test_a_step_leaves_no_graph_behind(name: str, random: Random) -> None:
    """Everything goes with its last reference, without the garbage collector: no cycles, no caches."""
    block = build(name)
    optimizer = torch.optim.SGD(block.parameters(), lr=1e-3)

    def step() -> weakref.ref[Tensor]:
        y = block(tokens(random))
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        block.attn.attention_patterns(tokens(random))
        return weakref.ref(y)

    def living() -> int:
        return sum(type(thing) in (Tensor, nn.Parameter) for thing in gc.get_objects())

    step()
    gc.collect()
    gc.disable()
    try:
        before = living()
        outputs = [step() for _ in range(3)]
        assert [output() for output in outputs] == [None] * 3, "an output outlives its step"
        assert living() == before, f"{living() - before} tensors are left of 3 steps"
    finally:
        gc.enable()


@every_config
def test_training_reduces_the_loss(name: str, random: Random) -> None:
    """Every parameter takes part in fitting a fixed random target."""
    block, x = build(name, gate_init=(0.0, 0.0, 0.0)), tokens(random)
    target = random(x.shape, torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in block.named_parameters()}
    optimizer = torch.optim.Adam(block.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (block(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4, f"loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
    stuck = [name for name, parameter in block.named_parameters() if torch.equal(parameter, before[name])]
    assert not stuck, f"{stuck} did not learn"
