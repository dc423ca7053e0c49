"""NSAConfig.selection_loss: its value against plain loops, its gradients, and that nothing else changes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from native_sparse_attention import AvgPoolCompressor, NativeSparseAttention, NSABlock, NSAConfig

SIZES = {"dim": 24, "heads": 4, "kv_heads": 2, "dim_head": 8, "seq_len": 96, "local_window": 8, "block_size": 8}
SIZES |= {"stride": 4, "select_block_size": 8, "topk_blocks": 5, "init_blocks": 1, "local_blocks": 2}
CU_SEQLENS = torch.tensor([0, 10, 15, 96], dtype=torch.int32)
MASK = torch.ones(2, 96, dtype=torch.bool)
MASK[0, :40], MASK[1, 30:33] = False, False


def make(**changes: object) -> tuple[NativeSparseAttention, Tensor]:
    torch.manual_seed(0)
    attention = NativeSparseAttention(NSAConfig(**SIZES | {"selection_loss": 1.0} | changes)).double()
    with torch.no_grad():
        attention.to_q.weight *= 6  # so that attention differs between keys
    return attention, torch.randn(2, 96, 24, dtype=torch.float64)


def loss_of_sequence(attention: NativeSparseAttention, x: Tensor, queries: list[int]) -> list[Tensor]:
    """Terms of the loss for one sequence (T, dim): one for each query that may choose, and each key head."""
    cfg, terms, batch = attention.cfg, [], (1, x.shape[0], -1, 8)
    q, k = attention.to_q(x).view(*batch)[0].detach(), attention.to_k(x).view(*batch)[0].detach()
    k_cmp = attention.compress_k(k[None], heads=True)[0]
    for t in queries:
        own = t // cfg.select_block_size
        free = range(cfg.init_blocks * cfg.select_block_size, (own - cfg.local_blocks + 1) * cfg.select_block_size)
        blocks = [i for i in range(len(k_cmp)) if set(range(4 * i, 4 * i + 8)) <= set(free) and 4 * i + 7 <= t]
        for head in range(cfg.kv_heads if blocks else 0):
            truth, guess = torch.zeros(len(blocks)).double(), torch.zeros(len(blocks)).double()
            for h in (2 * head, 2 * head + 1):
                dense = (k[: t + 1, head] @ q[t, h] / math.sqrt(8)).softmax(0)
                seen = [i for i in range(len(k_cmp)) if 4 * i + 7 <= t]
                compressed = (k_cmp[: len(seen), head] @ q[t, h] / math.sqrt(8)).softmax(0)
                truth = truth + torch.stack([dense[4 * i : 4 * i + 8].sum() for i in blocks]) / 2
                guess = guess + torch.stack([compressed[i] for i in blocks]) / 2
            terms.append(-(truth / truth.sum() * (guess / guess.sum() + 1e-6).log()).sum())
    return terms


def expected(attention: NativeSparseAttention, x: Tensor, batch: str, drawn: list[int]) -> Tensor:
    if batch == "packed":
        bounds = CU_SEQLENS.tolist()
        terms = []
        for first, end in zip(bounds, bounds[1:], strict=False):
            terms += loss_of_sequence(attention, x[0, first:end], [t - first for t in drawn if first <= t < end])
    else:
        rows = [x[b][MASK[b]] for b in range(2)] if batch == "padded" else list(x)
        terms = [
            term for row in rows for term in loss_of_sequence(attention, row, [t for t in drawn if t < len(row)])
        ]
    return torch.stack(terms).mean()


def arguments_of(batch: str, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    if batch == "packed":
        return x[:1], {"cu_seqlens": CU_SEQLENS}
    return x, {"key_padding_mask": MASK} if batch == "padded" else {}


def gradients(attention: NativeSparseAttention, loss: Tensor) -> dict[str, Tensor]:
    attention.zero_grad()
    loss.backward()
    return {name: each.grad.clone() for name, each in attention.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("batch", ["rows", "padded", "packed"])
@pytest.mark.parametrize(
    "changes", [{}, {"init_blocks": 0, "local_blocks": 0}, {"compression": "conv1d"}, {"select_block_size": 16}]
)
def test_it_is_the_cross_entropy_of_shares_of_blocks(batch: str, changes: dict[str, object]) -> None:
    attention, x = make(**changes)
    x, given = arguments_of(batch, x)
    torch.manual_seed(7)
    tokens = int(MASK.sum(1).max()) if batch == "padded" else 96
    drawn = torch.randint(tokens, (16, 1)).flatten().tolist()
    truth = gradients(attention, expected(attention, x, batch, drawn))
    torch.manual_seed(7)
    found = gradients(attention, (attention(x, **given) * 0).sum())
    assert truth and all(name.startswith("compress_k") for name in truth)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, truth.get(name, torch.zeros_like(gradient)), atol=1e-12, rtol=1e-9)


def test_outputs_and_all_other_gradients_stay() -> None:
    results = {}
    for weight in (0.0, 0.5, 1.0):
        attention, x = make(selection_loss=weight)
        torch.manual_seed(1)
        y = attention(x.requires_grad_())
        results[weight] = (y, gradients(attention, y.square().sum()), x.grad)
    (y0, without, x0), (y, half, x1), (_, whole, _) = results.values()
    assert torch.equal(y, y0) and torch.equal(x1, x0)
    for name, gradient in without.items():
        if name.startswith("compress_k"):
            assert not torch.equal(half[name], gradient)
            torch.testing.assert_close(whole[name] - gradient, 2 * (half[name] - gradient), atol=1e-12, rtol=1e-9)
        else:
            assert torch.equal(half[name], gradient), name


@pytest.mark.parametrize("case", ["weight 0", "evaluation", "no gradients"])
def test_nothing_is_drawn_where_nothing_is_taught(case: str) -> None:
    attention, x = make(selection_loss=0.0 if case == "weight 0" else 1.0)
    attention.train(case != "evaluation")
    before = torch.get_rng_state()
    with torch.set_grad_enabled(case != "no gradients"):
        attention(x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("T", [1, 7, 9, 24])
def test_short_sequences_have_nothing_to_choose(T: int) -> None:
    attention, x = make()
    found = gradients(attention, (attention(x[:, :T]) * 0).sum())
    assert all((gradient == 0).all() for gradient in found.values())


def test_it_works_without_parameters_in_autocast_and_in_a_block() -> None:
    attention, x = make(compression=AvgPoolCompressor)
    assert all((gradient == 0).all() for gradient in gradients(attention, (attention(x) * 0).sum()).values())
    torch.manual_seed(0)
    block = NSABlock(NSAConfig(**SIZES, selection_loss=1.0, rope_theta=100.0, qk_norm=1e-6))
    with torch.autocast("cpu", torch.bfloat16):
        (block(x.float()) * 0).sum().backward()
    taught = {name for name, each in block.named_parameters() if each.grad is not None and (each.grad != 0).any()}
    assert taught and all(name.startswith("attn.compress_k") for name in taught)
    assert all(each.grad.isfinite().all() for each in block.parameters() if each.grad is not None)


@pytest.mark.parametrize("batch", ["rows", "padded", "packed"])
def test_compiled_code_has_it_in_its_graph(batch: str) -> None:
    attention, x = make()
    x, given = arguments_of(batch, x)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    found = gradients(attention, (compiled(x, **given) * 0).sum())
    assert all((gradient != 0).any() == name.startswith("compress_k") for name, gradient in found.items())


@pytest.mark.parametrize("weight", [-0.1, math.inf, "0.1", None])
def test_weights_that_are_refused(weight: object) -> None:
    with pytest.raises(ValueError, match="selection_loss = .*must be a finite number of at least 0"):
        NSAConfig(**SIZES, selection_loss=weight)


def test_means_have_nothing_to_learn() -> None:
    with pytest.raises(ValueError, match="selection_loss = 0.1: must be 0 with compression='avgpool'"):
        NSAConfig(**SIZES | {"compression": "avgpool"}, selection_loss=0.1)
