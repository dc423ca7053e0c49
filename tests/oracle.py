"""Native Sparse Attention as an executable specification: plain loops in float64, one rule a function.

The first part visits every (batch, token, head) on its own and applies the rules in the order in which DESIGN.md states
them; read it when in doubt about what is computed. It shares nothing with the library. Outputs are built from torch
operations, so autograd differentiates them and gradients have an oracle too. Tiny sizes only.

The second part states the same rules as dense boolean masks, in the dtype of its inputs. In float64 it is the reference
at lengths where loops are too slow; in float32, float16 and bfloat16 it is "plain PyTorch at the same precision", whose
error is the budget for everything faster. `test_oracle.py` holds the two parts together.

    B batch · T tokens · H query heads · K key/value heads · G = H/K query heads of a group · D head dim
    l block_size · d stride · C compressed blocks · l' select_block_size · N selection blocks · S topk_blocks · W window
    b, t, h, i, j, s: one batch entry, query token, query head, compressed block, selection block, key token
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


def compressed_count(tokens: int, block_size: int, stride: int) -> int:
    """C = (T − l)//d + 1 if T ≥ l, else 0: only whole blocks are compressed."""
    return (tokens - block_size) // stride + 1 if tokens >= block_size else 0


def selection_count(tokens: int, select_block_size: int) -> int:
    """N = ⌈T / l'⌉: the last selection block may be cut short by the end of the sequence."""
    return -(-tokens // select_block_size)


def visible_blocks(t: int, tokens: int, block_size: int, stride: int) -> list[int]:
    """The compressed blocks [i·d, i·d + l) whose last token is t or earlier."""
    count = compressed_count(tokens, block_size, stride)
    return [i for i in range(count) if i * stride + block_size - 1 <= t]


def candidate_blocks(t: int, tokens: int, select_block_size: int) -> list[int]:
    """The selection blocks [j·l', j·l' + l') that have begun by t."""
    return [j for j in range(selection_count(tokens, select_block_size)) if j * select_block_size <= t]


def forced_blocks(t: int, select_block_size: int, init_blocks: int, local_blocks: int) -> set[int]:
    """The first `init_blocks`, and the last `local_blocks` up to and including the query's own block."""
    own = t // select_block_size
    return {j for j in range(own + 1) if j < init_blocks or own - j < local_blocks}


def overlap(i: int, j: int, block_size: int, stride: int, select_block_size: int) -> float:
    """Tokens shared by compressed block i and selection block j, divided by d."""
    of_compressed = set(range(i * stride, i * stride + block_size))
    of_selection = set(range(j * select_block_size, (j + 1) * select_block_size))
    return len(of_compressed & of_selection) / stride


# ---------------------------------------------------------------------------------------------------------------------
# Branches
# ---------------------------------------------------------------------------------------------------------------------


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention of one query (D) over n keys (n, D): output (D), log-sum-exp (), probabilities (n).

    Over no keys at all the output is exactly 0 and the log-sum-exp −inf.
    """
    if len(keys) == 0:
        return 0 * query, 0 * query.sum() - torch.inf, query.new_zeros(0)  # constants, and yet functions of the query
    scores = scale * (keys @ query)  # (n)
    lse = torch.logsumexp(scores, dim=0)
    probabilities = torch.exp(scores - lse)
    return probabilities @ values, lse, probabilities


def attend_each(
    q: Tensor, k: Tensor, v: Tensor, rows_of: Callable[[int, int, int], list[int]], scale: float | None
) -> tuple[Tensor, Tensor]:
    """Every (b, t, h) attends to the rows `rows_of(b, t, kv_head)` of k and v: o (B,T,H,D), lse (B,T,H)."""
    q, k, v = q.double(), k.double(), v.double()
    B, T, H, D = q.shape
    K = k.shape[2]
    scale = D**-0.5 if scale is None else scale
    queries = iter(q.reshape(-1, D).unbind())  # in the order of the loops below
    heads = [[(k[b, :, kv_head], v[b, :, kv_head]) for kv_head in range(K)] for b in range(B)]
    outputs, lses = [], []
    for b in range(B):
        for t in range(T):
            for h in range(H):
                kv_head = h // (H // K)
                keys, values = heads[b][kv_head]
                rows = torch.tensor(rows_of(b, t, kv_head), dtype=torch.int64)
                output, lse, _ = attend(next(queries), keys[rows], values[rows], scale)
                outputs.append(output)
                lses.append(lse)
    if not outputs:
        return q.new_zeros(B, T, H, D), q.new_zeros(B, T, H)
    return torch.stack(outputs).view(B, T, H, D), torch.stack(lses).view(B, T, H)


def local_attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None) -> Tensor:
    """Attention over the W tokens t − W < s ≤ t, the query's own included."""

    def rows_of(b: int, t: int, kv_head: int) -> list[int]:
        return [s for s in range(k.shape[1]) if t - window < s <= t]

    return attend_each(q, k, v, rows_of, scale)[0]


def compressed_attention(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, block_size: int, stride: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the visible compressed blocks, and its log-sum-exp."""

    def rows_of(b: int, t: int, kv_head: int) -> list[int]:
        return visible_blocks(t, q.shape[1], block_size, stride)

    return attend_each(q, k_cmp, v_cmp, rows_of, scale)


def importance(
    q: Tensor, k_cmp: Tensor, block_size: int, stride: int, select_block_size: int, scale: float | None = None
) -> Tensor:
    """Σ_i overlap(i, j) · p_cmp[i], summed over the heads of the group: (B, T, K, N). No gradient flows through it."""
    q, k_cmp = q.detach().double(), k_cmp.detach().double()
    B, T, H, D = q.shape
    K = k_cmp.shape[2]
    N = selection_count(T, select_block_size)
    scale = D**-0.5 if scale is None else scale
    result = q.new_zeros(B, T, K, N)
    for b in range(B):
        for t in range(T):
            visible = visible_blocks(t, T, block_size, stride)
            for h in range(H):
                kv_head = h // (H // K)
                keys = k_cmp[b, visible, kv_head]
                _, _, probabilities = attend(q[b, t, h], keys, keys, scale)
                for i, probability in zip(visible, probabilities, strict=True):
                    for j in range(N):
                        shared = overlap(i, j, block_size, stride, select_block_size)
                        if shared:
                            result[b, t, kv_head, j] += shared * probability
    return result


def choose_blocks(
    scores: Tensor, t: int, tokens: int, select_block_size: int, topk_blocks: int, init_blocks: int, local_blocks: int
) -> list[int]:
    """The S chosen blocks of one query, given the importance (N) of each: ascending, free slots −1 and last.

    Forced blocks rank before all others and count towards S; ties go to the lower block index.
    """
    forced = forced_blocks(t, select_block_size, init_blocks, local_blocks)
    candidates = candidate_blocks(t, tokens, select_block_size)
    ranked = sorted(candidates, key=lambda j: (j not in forced, -float(scores[j]), j))
    chosen = sorted(ranked[:topk_blocks])
    return chosen + [-1] * (topk_blocks - len(chosen))


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    block_size: int,
    stride: int,
    select_block_size: int,
    topk_blocks: int,
    init_blocks: int = 0,
    local_blocks: int = 1,
    scale: float | None = None,
) -> Tensor:
    """One set of blocks for each (b, t, key/value head), shared by the whole group: int32 (B, T, K, S)."""
    scores = importance(q, k_cmp, block_size, stride, select_block_size, scale)
    B, T, K, _ = scores.shape
    result = torch.empty(B, T, K, topk_blocks, dtype=torch.int32)
    for b in range(B):
        for t in range(T):
            for kv_head in range(K):
                chosen = choose_blocks(
                    scores[b, t, kv_head], t, T, select_block_size, topk_blocks, init_blocks, local_blocks
                )
                result[b, t, kv_head] = torch.tensor(chosen, dtype=torch.int32)
    return result


def selective_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, select_block_size: int, scale: float | None = None
) -> Tensor:
    """Attention over the tokens s ≤ t of the chosen blocks."""

    def rows_of(b: int, t: int, kv_head: int) -> list[int]:
        chosen = set(block_indices[b, t, kv_head].tolist())
        return [s for s in range(k.shape[1]) if s <= t and s // select_block_size in chosen]

    return attend_each(q, k, v, rows_of, scale)[0]


def sigmoid(logits: Tensor) -> Tensor:
    """Gate of a logit."""
    return 1 / (1 + torch.exp(-logits.double()))


def gated_sum(gates: Tensor, o_local: Tensor, o_compressed: Tensor, o_selective: Tensor) -> Tensor:
    """o = g_local·o_local + g_compressed·o_compressed + g_selective·o_selective, one gate of each for each head."""
    result = torch.zeros_like(o_local)
    for branch, output in enumerate((o_local, o_compressed, o_selective)):
        result = result + gates[:, :, :, branch, None].double() * output  # (B,T,H,1) · (B,T,H,D)
    return result


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    local_window: int,
    block_size: int,
    stride: int,
    select_block_size: int,
    topk_blocks: int,
    init_blocks: int = 0,
    local_blocks: int = 1,
    k_local: Tensor | None = None,
    v_local: Tensor | None = None,
    scale: float | None = None,
    block_indices: Tensor | None = None,
) -> Tensor:
    """The three branches and their gates. `block_indices` fixes the choice of blocks, else the rules make it."""
    if block_indices is None:
        block_indices = select_blocks(
            q, k_cmp, block_size, stride, select_block_size, topk_blocks, init_blocks, local_blocks, scale
        )
    k_local = k if k_local is None else k_local
    v_local = v if v_local is None else v_local
    o_local = local_attention(q, k_local, v_local, local_window, scale)
    o_compressed, _ = compressed_attention(q, k_cmp, v_cmp, block_size, stride, scale)
    o_selective = selective_attention(q, k, v, block_indices, select_block_size, scale)
    return gated_sum(gates, o_local, o_compressed, o_selective)


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions, norms and compressors
# ---------------------------------------------------------------------------------------------------------------------


def powers(theta: float, D: int) -> list[float]:
    """Frequencies of the rotary position embedding: theta^(−2c/D)."""
    return [theta ** (-2 * c / D) for c in range(D // 2)]


def rope(x: Tensor, frequencies: Sequence[float], position_step: int = 1, scale: float = 1.0) -> Tensor:
    """Rotate row n of x (B, n, heads, D) as position n · position_step: 1 for tokens, d for compressed keys.

    Pairs are Llama's: component c of the first half of D with component c of the second half, turned by the angle
    position · frequencies[c], and scaled.
    """
    x = x.double()
    half = x.shape[-1] // 2
    rows = []
    for n in range(x.shape[1]):
        first, second = x[:, n, :, :half], x[:, n, :, half:]
        angle = n * position_step * torch.tensor(frequencies, dtype=torch.float64)
        cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
        rows.append(torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1))
    return torch.stack(rows, dim=1) if rows else x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Each head of x (..., D) divided by the root of the mean of its squares, and weighted."""
    x = x.double()
    rows = [row / (row.square().mean() + eps).sqrt() * weight.double() for row in x.reshape(-1, x.shape[-1])]
    return torch.stack(rows).view(x.shape) if rows else x


def compress(x: Tensor, block_size: int, stride: int, summarize: Callable[[Tensor], Tensor]) -> Tensor:
    """`summarize` (l, D) → (D) applied to every block of x (b, T, D): (b, C, D)."""
    x = x.double()
    b, T, D = x.shape
    count = compressed_count(T, block_size, stride)
    blocks = [summarize(x[n, i * stride : i * stride + block_size]) for n in range(b) for i in range(count)]
    return torch.stack(blocks).view(b, count, D) if blocks else x.new_zeros(b, count, D)


def avgpool(x: Tensor, block_size: int, stride: int) -> Tensor:
    """A block becomes the mean of its tokens."""
    return compress(x, block_size, stride, lambda block: block.sum(dim=0) / block_size)


def conv1d(x: Tensor, block_size: int, stride: int, position: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A block plus its position embedding (l, D) goes through a convolution: weight (D, D, l), bias (D) or None."""
    position, weight = position.double(), weight.double()

    def summarize(block: Tensor) -> Tensor:
        block = block + position
        result = torch.zeros(weight.shape[0], dtype=torch.float64) if bias is None else bias.double()
        for n in range(block_size):
            result = result + weight[:, :, n] @ block[n]
        return result

    return compress(x, block_size, stride, summarize)


def gelu(x: Tensor) -> Tensor:
    """x · Φ(x), Φ the normal distribution function."""
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def grouped_mlp(
    x: Tensor,
    block_size: int,
    stride: int,
    position: Tensor,
    weight_in: Tensor,
    bias_in: Tensor | None,
    weight_out: Tensor,
    bias_out: Tensor | None,
) -> Tensor:
    """A block plus its position embedding (l, D), flattened to l·D, goes through Linear → GELU → Linear to D."""

    def linear(vector: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        product = weight.double() @ vector
        return product if bias is None else product + bias.double()

    def summarize(block: Tensor) -> Tensor:
        flat = (block + position.double()).reshape(-1)  # (l, D) -> (l·D), token by token
        return linear(gelu(linear(flat, weight_in, bias_in)), weight_out, bias_out)

    return compress(x, block_size, stride, summarize)


# ---------------------------------------------------------------------------------------------------------------------
# The same rules as dense masks, in the dtype of the inputs
# ---------------------------------------------------------------------------------------------------------------------


def local_mask(tokens: int, window: int) -> Tensor:
    """(T, T): t − W < s ≤ t."""
    t, s = torch.arange(tokens)[:, None], torch.arange(tokens)
    return (t - window < s) & (s <= t)


def compressed_mask(tokens: int, block_size: int, stride: int) -> Tensor:
    """(T, C): i·d + l − 1 ≤ t."""
    last_token = torch.arange(compressed_count(tokens, block_size, stride)) * stride + block_size - 1
    return last_token <= torch.arange(tokens)[:, None]


def selective_mask(block_indices: Tensor, select_block_size: int) -> Tensor:
    """(B, T, K, T): s ≤ t and the block of s is among the chosen ones."""
    tokens = block_indices.shape[1]
    t, s = torch.arange(tokens)[:, None], torch.arange(tokens)
    mask = torch.zeros(*block_indices.shape[:3], tokens, dtype=torch.bool)
    for slot in block_indices.unbind(dim=-1):  # (B, T, K)
        mask |= slot.unsqueeze(-1) == s // select_block_size
    return mask & (s <= t)[None, :, None]


def masked_probabilities(q: Tensor, k: Tensor, mask: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Softmax of q (B,T,H,D) over the rows n of k (B,n,K,D) that mask, (T,n) or (B,T,K,n), lets it see.

    Probabilities (B,T,H,n) and log-sum-exp (B,T,H). A row that sees nothing gets exactly 0, −inf, and no gradient.
    """
    group = q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if k.shape[1] == 0:
        return q.new_zeros(*q.shape[:3], 0), 0 * q.sum(dim=-1) - torch.inf
    mask = mask[None, :, None] if mask.dim() == 2 else mask.repeat_interleave(group, dim=2)  # (B|1, T, H|1, n)
    scores = scale * torch.einsum("bthd,bnhd->bthn", q, k.repeat_interleave(group, dim=2))
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    seen = mask.any(dim=-1)
    probabilities = torch.softmax(scores, dim=-1) * seen.unsqueeze(-1)
    return probabilities, torch.logsumexp(scores, dim=-1).masked_fill(~seen, -torch.inf)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Output (B,T,H,D) and log-sum-exp (B,T,H) of attention under a mask."""
    probabilities, lse = masked_probabilities(q, k, mask, scale)
    group = q.shape[2] // v.shape[2]
    return torch.einsum("bthn,bnhd->bthd", probabilities, v.repeat_interleave(group, dim=2)), lse


class Dense:
    """The functions of the first part that dense masks can state, by the same names and arguments."""

    @staticmethod
    def local_attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None) -> Tensor:
        return masked_attention(q, k, v, local_mask(q.shape[1], window), scale)[0]

    @staticmethod
    def compressed_attention(
        q: Tensor, k_cmp: Tensor, v_cmp: Tensor, block_size: int, stride: int, scale: float | None = None
    ) -> tuple[Tensor, Tensor]:
        return masked_attention(q, k_cmp, v_cmp, compressed_mask(q.shape[1], block_size, stride), scale)

    @staticmethod
    def selective_attention(
        q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, select_block_size: int, scale: float | None = None
    ) -> Tensor:
        return masked_attention(q, k, v, selective_mask(block_indices, select_block_size), scale)[0]

    @staticmethod
    def importance(
        q: Tensor, k_cmp: Tensor, block_size: int, stride: int, select_block_size: int, scale: float | None = None
    ) -> Tensor:
        q, k_cmp = q.detach(), k_cmp.detach()
        B, T, H, _ = q.shape
        C, K = k_cmp.shape[1:3]
        first = torch.arange(C)[:, None] * stride  # token of compressed block i
        start = torch.arange(selection_count(T, select_block_size)) * select_block_size  # token of selection block j
        shared = torch.minimum(first + block_size, start + select_block_size) - torch.maximum(first, start)  # (C, N)
        weights = shared.clamp(min=0).to(q.dtype) / stride
        probabilities, _ = masked_probabilities(q, k_cmp, compressed_mask(T, block_size, stride), scale)
        return probabilities.view(B, T, K, H // K, C).sum(dim=3) @ weights

    @staticmethod
    def select_blocks(
        q: Tensor,
        k_cmp: Tensor,
        block_size: int,
        stride: int,
        select_block_size: int,
        topk_blocks: int,
        init_blocks: int = 0,
        local_blocks: int = 1,
        scale: float | None = None,
    ) -> Tensor:
        scores = Dense.importance(q, k_cmp, block_size, stride, select_block_size, scale)
        B, T, K, N = scores.shape
        own = (torch.arange(T) // select_block_size)[:, None]  # (T, 1)
        j = torch.arange(N)
        forced, begun = (j < init_blocks) | (own - j < local_blocks), j <= own  # (T, N)
        scores = scores.masked_fill(forced[:, None], torch.inf).masked_fill(~begun[:, None], -torch.inf)
        order = scores.argsort(dim=-1, descending=True, stable=True)[..., :topk_blocks]  # (B, T, K, min(S, N))
        order = torch.where(order > own[:, None], N, order).sort(dim=-1).values  # N: a free slot, which goes last
        chosen = torch.full((B, T, K, topk_blocks), -1, dtype=torch.int32)
        chosen[..., : order.shape[-1]] = torch.where(order == N, -1, order)
        return chosen

    @staticmethod
    def nsa_attention(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cmp: Tensor,
        v_cmp: Tensor,
        gates: Tensor,
        local_window: int,
        block_size: int,
        stride: int,
        select_block_size: int,
        topk_blocks: int,
        init_blocks: int = 0,
        local_blocks: int = 1,
        k_local: Tensor | None = None,
        v_local: Tensor | None = None,
        scale: float | None = None,
        block_indices: Tensor | None = None,
    ) -> Tensor:
        if block_indices is None:
            block_indices = Dense.select_blocks(
                q, k_cmp, block_size, stride, select_block_size, topk_blocks, init_blocks, local_blocks, scale
            )
        k_local, v_local = k if k_local is None else k_local, v if v_local is None else v_local
        o_local = Dense.local_attention(q, k_local, v_local, local_window, scale)
        o_compressed, _ = Dense.compressed_attention(q, k_cmp, v_cmp, block_size, stride, scale)
        o_selective = Dense.selective_attention(q, k, v, block_indices, select_block_size, scale)
        return (gates.unsqueeze(-2) * torch.stack([o_local, o_compressed, o_selective], dim=-1)).sum(dim=-1)
