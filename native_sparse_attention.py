"""Native Sparse Attention in one file: local window + compressed blocks + selected blocks, joined by learned gates.

Yuan et al., "Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention", arXiv 2502.11089.
Every query token attends along three branches, each a causal softmax attention over its own few keys:

    local       the last W tokens, itself included
    compressed  one learned summary vector for every block of l tokens, a block starting every d tokens
    selective   the tokens of the S blocks (of l' tokens) that the compressed attention found most important

    o = g_local · o_local + g_compressed · o_compressed + g_selective · o_selective            each g a sigmoid (eq. 5)

so that a token reads about T/d + S·l' + W keys in place of T.

    >>> import torch
    >>> block = NSABlock(NSAConfig(dim=64, heads=4, seq_len=256))
    >>> block(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])

Letters, here and everywhere below. Tensors are (B, T, H, D), flash-attention's layout; positions count from 0.

    B batch · T tokens · H query heads · K key/value heads · G = H/K query heads of a group · D head dim
    l block_size · d stride · C compressed blocks · l' select_block_size · N selection blocks · S topk_blocks · W window

Where the paper's equations live.

    eq. 5      gated sum of the branches             nsa_attention
    eq. 7      compression of a block of tokens      GroupedMLPCompressor, Conv1dCompressor, AvgPoolCompressor
    eq. 8      compressed attention probabilities    compressed_attention
    eq. 9, 10  importance of a selection block       _block_importance
    eq. 11     choice of the S highest blocks        _choose_blocks
    eq. 12     attention over the chosen tokens      selective_attention
    §3.3.3     sliding window                        local_attention

Sections; each one calls only those above it.

     1 imports and capability      5 Triton kernels                 9 NativeSparseAttention
     2 configuration               6 autograd                      10 NSABlock
     3 block arithmetic            7 functions (the functional API) 11 self-tests
     4 PyTorch branches            8 compressors                   12 main
"""

# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 1  Imports and capability
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

from __future__ import annotations

import inspect
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = [
    "AttentionPatterns",
    "AvgPoolCompressor",
    "Conv1dCompressor",
    "GroupedMLPCompressor",
    "NSABlock",
    "NSAConfig",
    "NativeSparseAttention",
    "TokenCompressor",
    "compressed_attention",
    "local_attention",
    "nsa_attention",
    "select_blocks",
    "selective_attention",
]
__version__ = "0.1.0"


def _check(holds: bool, argument: str, value: object, rule: str, error: type[Exception] = ValueError) -> None:
    """The one form of every complaint: the argument, what it was, and the rule that it breaks."""
    if not holds:
        raise error(f"{argument} = {value!r}: {rule}")


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 2  Configuration
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


_COMPRESSIONS = ("grouped_mlp", "conv1d", "avgpool")
_COMPRESSION_RULE = f"must be one of {', '.join(map(repr, _COMPRESSIONS))}, or a class (dim, block, stride) -> Module"


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_integer(name: str, value: object, least: int) -> None:
    _check(isinstance(value, int) and not isinstance(value, bool), name, value, "must be an int", TypeError)
    _check(value >= least, name, value, f"must be at least {least}")


def _check_blocks(
    block_size: int, stride: int, select_block_size: int, topk_blocks: int, init_blocks: int, local_blocks: int
) -> None:
    """The rules that tie the block sizes together: those of the paper, §3.3.1 and §3.3.2."""
    _check(stride <= block_size, "stride", stride, f"must be at most block_size = {block_size}")
    for name, size in (("block_size", block_size), ("select_block_size", select_block_size)):
        _check(size % stride == 0, name, size, f"must be a multiple of stride = {stride}")
    forced = init_blocks + local_blocks
    rule = f"must be at least init_blocks + local_blocks = {init_blocks} + {local_blocks} = {forced}"
    _check(topk_blocks >= forced, "topk_blocks", topk_blocks, rule)


@dataclass
class NSAConfig:
    """Everything that shapes a NativeSparseAttention or an NSABlock. Checked on construction.

    The fields whose default is None are filled in by `__post_init__`, so that afterwards all of them can be read as
    plain numbers. `use_flash` may be changed at any time; it takes effect with the next forward.

    >>> NSAConfig(dim=512, heads=8, block_size=32).stride
    32

    Raises:
        ValueError: a field is out of range or contradicts another; the message names the field, its value, the rule.
        TypeError: a field is of the wrong type.
    """

    dim: int = 512  # width of the residual stream
    heads: int = 8  # H, query heads
    dim_head: int | None = None  # D; None: dim // heads
    kv_heads: int | None = None  # K, key/value heads, each shared by heads // kv_heads query heads; None: heads
    seq_len: int = 2048  # longest sequence accepted
    local_window: int = 128  # W, tokens that the local branch sees, the query's own included
    block_size: int = 32  # l, tokens in a compressed block
    stride: int | None = None  # d, tokens between the starts of two compressed blocks; None: block_size
    select_block_size: int | None = None  # l', tokens in a selection block; None: block_size
    topk_blocks: int = 4  # S, selection blocks that a query attends to, the forced ones included
    init_blocks: int = 0  # forced: so many blocks at the start of the sequence
    local_blocks: int = 1  # forced: so many blocks up to and including the query's own
    compression: str | type[nn.Module] = "grouped_mlp"  # or "conv1d", "avgpool", a class (dim, block, stride) → Module
    gate_mode: str = "static"  # "static": a learned number for each head and branch; "q_cond": linear in the input
    gate_init: tuple[float, float, float] = (2.0, -2.0, -2.0)  # logits: local, compressed, selective
    separate_kv: bool = False  # True: each branch has its own key and value projections, as in the paper
    rope_theta: float | None = None  # base of the rotary position embedding; None: no rotation
    dropout: float = 0.0  # on the output projection and in the feed-forward, never on attention probabilities
    bias: bool = False  # in the projections, the feed-forward and the norms
    ffn_mult: int = 4  # hidden width of the feed-forward, in units of dim
    use_flash: bool = True  # accelerated kernels where they exist; False: plain PyTorch everywhere

    def __post_init__(self) -> None:
        self._check_integers()
        if self.dim_head is None:
            _check(self.dim % self.heads == 0, "dim", self.dim, f"must be divisible by heads = {self.heads}")
            self.dim_head = self.dim // self.heads
        self.kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        self.stride = self.block_size if self.stride is None else self.stride
        self.select_block_size = self.block_size if self.select_block_size is None else self.select_block_size
        _check(
            self.heads % self.kv_heads == 0, "heads", self.heads, f"must be divisible by kv_heads = {self.kv_heads}"
        )
        _check_blocks(**self.selection)
        self._check_choices()

    @property
    def selection(self) -> dict[str, int]:
        """The keyword arguments of `select_blocks` that this configuration fixes."""
        names = ("block_size", "stride", "select_block_size", "topk_blocks", "init_blocks", "local_blocks")
        return {name: getattr(self, name) for name in names}

    def _check_integers(self) -> None:
        least = {"init_blocks": 0, "local_blocks": 0}
        optional = ("dim_head", "kv_heads", "stride", "select_block_size")
        required = ("dim", "heads", "seq_len", "local_window", "block_size", "topk_blocks", "ffn_mult", *least)
        for name in required + tuple(name for name in optional if getattr(self, name) is not None):
            _check_integer(name, getattr(self, name), least.get(name, 1))

    def _check_choices(self) -> None:
        named = isinstance(self.compression, str)
        _check(named or callable(self.compression), "compression", self.compression, _COMPRESSION_RULE, TypeError)
        _check(not named or self.compression in _COMPRESSIONS, "compression", self.compression, _COMPRESSION_RULE)
        _check(self.gate_mode in ("static", "q_cond"), "gate_mode", self.gate_mode, "must be 'static' or 'q_cond'")
        _check(
            isinstance(self.gate_init, tuple | list) and len(self.gate_init) == 3 and all(map(_finite, self.gate_init)),
            "gate_init",
            self.gate_init,
            "must be 3 finite numbers: the local, compressed and selective logit",
        )
        for name in ("separate_kv", "bias", "use_flash"):
            value = getattr(self, name)
            _check(isinstance(value, bool), name, value, "must be True or False", TypeError)
        _check(_finite(self.dropout) and 0 <= self.dropout < 1, "dropout", self.dropout, "must be in [0, 1)")
        if self.rope_theta is not None:
            rule = "must be a finite number above 0, or None"
            _check(_finite(self.rope_theta) and self.rope_theta > 0, "rope_theta", self.rope_theta, rule)
            _check(self.dim_head % 2 == 0, "dim_head", self.dim_head, "must be even where rope_theta is given")


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 3  Block arithmetic: which token belongs to which block, and who sees whom. The only home of these rules.
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


def _compressed_count(tokens: int, block_size: int, stride: int) -> int:
    """C: compressed block i covers the tokens [i·d, i·d + l), and only whole blocks count."""
    return max(0, (tokens - block_size) // stride + 1)


def _selection_count(tokens: int, select_block_size: int) -> int:
    """N: selection block j covers the tokens [j·l', (j + 1)·l'); the last may be cut short by the sequence's end."""
    return -(-tokens // select_block_size)


class _Window(NamedTuple):
    """Who sees whom in the local branch: the query at t sees the keys at t − W < s ≤ t."""

    window: int

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - self.window)

    def keys(self, start: int, stop: int) -> slice:
        """The keys that the queries [start, stop) see between them."""
        return slice(max(0, start - self.window + 1), stop)


class _Staircase(NamedTuple):
    """Who sees whom in the compressed branch: block i is visible once its last token is there, i·d + l − 1 ≤ t."""

    block_size: int
    stride: int

    def sees(self, query: Tensor, block: Tensor) -> Tensor:
        return block * self.stride + self.block_size - 1 <= query

    def keys(self, start: int, stop: int) -> slice:
        return slice(0, _compressed_count(stop, self.block_size, self.stride))


def _block_importance(p: Tensor, block_size: int, stride: int, select_block_size: int, blocks: int) -> Tensor:
    """Paper eq. 9: probabilities of compressed blocks → importance of selection blocks.

    importance[j] = Σ_i overlap(i, j) · p[i], overlap(i, j) = tokens shared by compressed block i and selection block j,
    in units of d. Both sizes are multiples of d, so we count in cells of d tokens: block i spreads p[i] over its l/d
    cells, and block j gathers its l'/d cells. For l/d/l' = 32/16/64 that weighs p with 1, 2, 2, 2, 1.

    p: (..., C) → (..., N), N = blocks.
    """
    spread, gather = block_size // stride, select_block_size // stride
    length = blocks * gather
    # Compressed block i − m reaches cell i for m = 0 … l/d − 1. No whole block ends behind the last selection block.
    cells = sum(F.pad(p, (m, length - p.shape[-1] - m)) for m in range(spread))
    return cells.unflatten(-1, (blocks, gather)).sum(-1)  # (..., N·l'/d) → (..., N)


def _choose_blocks(
    importance: Tensor, query: Tensor, select_block_size: int, topk_blocks: int, init_blocks: int, local_blocks: int
) -> Tensor:
    """Paper eq. 11 with the forced blocks of §3.3.2: the S highest blocks of each row, ascending, −1 in free slots.

    Candidates start at or before the query. Forced ones rank before all others; ties go to the lower index.

    importance: (..., T, N), 0 or more; query: (T,) positions → int32 (..., T, S).
    """
    block = torch.arange(importance.shape[-1], device=importance.device)
    own = (query // select_block_size)[:, None]  # (T, 1): the block that the query stands in
    forced = (block < init_blocks) | (block > own - local_blocks)
    # Blocks behind the query take distinct negative scores: they fill what is left over, last and in order.
    scores = importance.masked_fill(forced, math.inf)
    scores = torch.where(block > own, -1.0 - block.to(scores.dtype), scores)
    chosen = _highest(scores, min(topk_blocks, scores.shape[-1]))
    chosen = chosen.masked_fill(chosen > own, -1)  # ascending already puts them last
    return F.pad(chosen, (0, topk_blocks - chosen.shape[-1]), value=-1).int()


def _highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores of each row, ascending. Of equal scores the lower index wins."""
    values, index = scores.topk(count)
    # topk breaks ties as it likes. Only where a tie straddles the last place does that matter: sort those rows stably.
    tied = (scores >= values[..., -1:]).sum(-1) > count
    if tied.any():
        index[tied] = scores[tied].sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return index.sort(dim=-1).values


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 4  PyTorch branches: forward and backward of each branch on any device, in tiles, so that nothing of size T × T exists
#
# A tile is a batch of small dense attentions: for each of b heads (or b blocks), M query tokens of a group against n
# keys. The branches differ in nothing but the tiles: local and compressed attention walk along the sequence; selective
# attention sorts the (query, chosen block) pairs by block and lets every block meet the queries that chose it, so that
# keys are read once a tile rather than gathered for each query.
# Arithmetic is in float32 (float64 for float64 inputs). A backward recomputes the probabilities from the log-sum-exp.
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

_TILE_SCORES = 2**18  # scores in a batch of tiles: 1 MiB of float32, so that every pass over them stays in the L2 cache
_PAIR_TILE = 64  # pairs of one selection block in a tile: 32 starves the matrix product, 128 pads more
_PARTIAL_VALUES = 2**22  # numbers in the partial outputs of a chunk of rows: 16 MiB of float32
_LOG2E = math.log2(math.e)
_HIDDEN = -1e30


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _hide(hidden: Tensor, like: Tensor) -> Tensor:
    """True → −1e30, False → 0: added to scores, hides them. Finite, so that a row that sees nothing makes no NaN."""
    return hidden.to(_accumulation_dtype(like)).mul_(_HIDDEN)


def _tile_scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, offset: Tensor) -> Tensor:
    """offset + scale·q·kᵀ + mask, (b, M·G, n).

    q: (b, M·G, D), k: (b, n, D), mask: from `_hide`, broadcasting to (b, M, G, n), offset: to (b, M·G, 1).
    """
    s = torch.baddbmm(offset, q, k.mT, alpha=scale)
    if mask is not None:
        s.unflatten(1, (mask.shape[-3], -1)).add_(mask)  # twenty times faster than masked_fill
    return s


def _tile_softmax(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax within a batch of tiles, (b, M·G, n), and its log-sum-exp, (b, M·G), near −1e30 where nothing is seen."""
    s = _tile_scores(q, k, mask, scale, q.new_zeros(1, 1, 1))
    p = s.softmax(-1)
    # log p = s − lse, read at the row's maximum: no second pass of exponentials.
    return p, s.amax(-1) - p.amax(-1).log()


def _tile_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """o = softmax(scale·q·kᵀ)·v, (b, M·G, D), and lse, (b, M·G), of a batch of tiles; 0 and −inf in blind rows."""
    p, lse = _tile_softmax(q, k, mask, scale)
    o = torch.bmm(p, v)
    if mask is not None:
        blind = lse < _HIDDEN / 2
        o.masked_fill_(blind[..., None], 0.0)
        lse.masked_fill_(blind, -math.inf)
    return o, lse


class _Rows(NamedTuple):
    """What the backward of a tile needs of its query rows: (b, M·G, D) and (b, M·G)."""

    q: Tensor
    do: Tensor
    lse: Tensor  # of the whole row
    delta: Tensor  # Σ_d do·o − dlse: what the normalisation of the softmax takes back

    def map(self, function: Callable[[Tensor], Tensor]) -> _Rows:
        return _Rows(*map(function, self))


def _delta(do: Tensor, dlse: Tensor, o: Tensor) -> Tensor:
    """(B, T, H) in the precision of dlse, without a copy of `do` in it."""
    return torch.einsum("bthd,bthd->bth", do.to(dlse.dtype), o.to(dlse.dtype)) - dlse


def _tile_backward(
    rows: _Rows, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """P = exp(scale·Q·Kᵀ − lse), for the lse of whole rows, which may span tiles; then

    dV = Pᵀ·dO,  dS = P·(dO·Vᵀ − delta),  dQ = scale·dS·K,  dK = scale·dSᵀ·Q.  → (b, M·G, D), twice (b, n, D)
    """
    lse = rows.lse.masked_fill(rows.lse == -math.inf, math.inf)  # makes P 0 in a row that sees nothing
    # In powers of two, which a CPU computes several times faster than exp.
    p = _tile_scores(rows.q, k, mask, scale * _LOG2E, lse[..., None] * -_LOG2E).exp2_()
    ds = torch.baddbmm(rows.delta[..., None], rows.do, v.mT, beta=-1).mul_(p)
    dq = torch.bmm(ds, k).mul_(scale)
    dk = torch.bmm(ds.mT, rows.q).mul_(scale)
    return dq, dk, torch.bmm(p.mT, rows.do)


# Local and compressed: tiles along the sequence ───────────────────────────────────────────────────────────────────────


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(B, T, K·g, ...) → (B, T, K, g, ...), a view; g is G for queries and 1 for keys."""
    return x.unflatten(2, (kv_heads, -1))


class _Tile(NamedTuple):
    """Some sequences and key heads, some queries, and all the keys that they see."""

    batch: slice
    heads: slice
    queries: slice
    keys: slice
    mask: Tensor  # (M, 1, n), from `_hide`

    def rows(self, x: Tensor) -> Tensor:
        """Of x (B, T, K, g, ...) those of the tile's queries, (b, M, k, g, ...), a view."""
        return x[self.batch, self.queries, self.heads]

    def columns(self, x: Tensor) -> Tensor:
        """Of x (B, T or C, K, 1, D) those of the tile's keys, (b, n, k, 1, D), a view."""
        return x[self.batch, self.keys, self.heads]


def _fold(x: Tensor) -> Tensor:
    """(b, m, k, g, ...) → (b·k, m·g, ...), a dense copy in the accumulation dtype."""
    return x.to(_accumulation_dtype(x)).transpose(1, 2).flatten(2, 3).flatten(0, 1).contiguous()


def _unfold(x: Tensor, like: Tensor) -> Tensor:
    """(b·k, m·g, ...) → (b, m, k, g, ...), a view, of the shape of `like`."""
    b, m, k, g = like.shape[:4]
    return x.unflatten(1, (m, g)).unflatten(0, (b, k)).transpose(1, 2)


def _sequence_tiles(q: Tensor, rule: _Window | _Staircase) -> Iterator[_Tile]:
    """Tiles of q (B, T, K, G, D): some query tokens, all keys that they see, as many heads as fit the cache."""
    batch, tokens, heads, group, _ = q.shape
    seen = rule.keys(tokens - 1, tokens)
    # Half as many queries as keys: few scores are computed in vain, and the matrix product is still of a fair size.
    size = max(1, min(512 // group, max(32, (seen.stop - seen.start) // 2)))
    for start in range(0, tokens, size):
        queries = slice(start, min(start + size, tokens))
        keys = rule.keys(queries.start, queries.stop)
        query = torch.arange(queries.start, queries.stop, device=q.device)[:, None, None]
        mask = _hide(~rule.sees(query, torch.arange(keys.start, keys.stop, device=q.device)), q)
        most = max(1, _TILE_SCORES // max(1, mask.numel() * group))  # heads in the tile, over all its sequences
        for b, h in itertools.product(range(0, batch, max(1, most // heads)), range(0, heads, most)):
            yield _Tile(slice(b, b + max(1, most // heads)), slice(h, h + most), queries, keys, mask)


def _sequence_forward(
    q: Tensor, k: Tensor, v: Tensor, rule: _Window | _Staircase, scale: float
) -> tuple[Tensor, Tensor]:
    q, k, v = (_grouped(x, k.shape[2]) for x in (q, k, v))
    o = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:4], -math.inf, dtype=_accumulation_dtype(q), device=q.device)
    for tile in _sequence_tiles(q, rule):
        if tile.mask.numel() > 0:
            rows, keys, values = _fold(tile.rows(q)), _fold(tile.columns(k)), _fold(tile.columns(v))
            o_tile, lse_tile = _tile_forward(rows, keys, values, tile.mask, scale)
            tile.rows(o).copy_(_unfold(o_tile, tile.rows(o)))
            tile.rows(lse).copy_(_unfold(lse_tile, tile.rows(lse)))
    return o.flatten(2, 3), lse.flatten(2, 3)


def _sequence_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    rule: _Window | _Staircase,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _Rows(q, do, lse, _delta(do, dlse, o)).map(lambda x: _grouped(x, k.shape[2]))
    k, v = k.unsqueeze(3), v.unsqueeze(3)
    dq = torch.empty_like(rows.q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (k, v))
    for tile in _sequence_tiles(rows.q, rule):
        tile_rows = rows.map(lambda x, tile=tile: _fold(tile.rows(x)))
        keys, values = _fold(tile.columns(k)), _fold(tile.columns(v))
        dq_tile, dk_tile, dv_tile = _tile_backward(tile_rows, keys, values, tile.mask, scale)
        tile.rows(dq).copy_(_unfold(dq_tile, tile.rows(dq)))
        tile.columns(dk).add_(_unfold(dk_tile, tile.columns(dk)))
        tile.columns(dv).add_(_unfold(dv_tile, tile.columns(dv)))
    return dq.flatten(2, 3), dk.squeeze(3).to(k.dtype), dv.squeeze(3).to(v.dtype)


def _torch_local_forward(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    return _sequence_forward(q, k, v, _Window(window), scale)


def _torch_local_backward(
    do: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _sequence_backward(do, dlse, q, k, v, o, lse, _Window(window), scale)


def _torch_compressed_forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, block_size: int, stride: int, scale: float
) -> tuple[Tensor, Tensor]:
    return _sequence_forward(q, k_cmp, v_cmp, _Staircase(block_size, stride), scale)


def _torch_compressed_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    o: Tensor,
    lse: Tensor,
    block_size: int,
    stride: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _sequence_backward(do, dlse, q, k_cmp, v_cmp, o, lse, _Staircase(block_size, stride), scale)


# Choice of blocks: the compressed tiles once more ─────────────────────────────────────────────────────────────────────


def _torch_select(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    block_size: int,
    stride: int,
    select_block_size: int,
    topk_blocks: int,
    init_blocks: int,
    local_blocks: int,
    scale: float,
) -> Tensor:
    """Chosen blocks (B, T, K, S), a tile of queries at a time: scores are (M, n), never (T, C) or (T, N)."""
    kv_heads, group = k_cmp.shape[2], q.shape[2] // k_cmp.shape[2]
    q, lse, k_cmp = (_grouped(x, kv_heads) for x in (q, lse, k_cmp))
    chosen = torch.empty(*q.shape[:3], 1, topk_blocks, dtype=torch.int32, device=q.device)
    for tile in _sequence_tiles(q, _Staircase(block_size, stride)):
        rows, keys, row_lse = _fold(tile.rows(q)), _fold(tile.columns(k_cmp)), _fold(tile.rows(lse))
        if tile.mask.numel() > 0:
            p, tile_lse = _tile_softmax(rows, keys, tile.mask, scale)
            p *= (tile_lse - row_lse.masked_fill(row_lse == -math.inf, math.inf)).exp()[..., None]
        else:
            p = rows.new_zeros(*rows.shape[:2], 0)  # no block is complete yet
        p = p.unflatten(1, (-1, group)).sum(2)  # (b, M·G, n) → (b, M, n): one choice for the group
        candidates = _selection_count(tile.queries.stop, select_block_size)
        importance = _block_importance(p, block_size, stride, select_block_size, candidates)
        query = torch.arange(tile.queries.start, tile.queries.stop, device=q.device)
        highest = _choose_blocks(importance, query, select_block_size, topk_blocks, init_blocks, local_blocks)
        tile.rows(chosen).copy_(_unfold(highest, tile.rows(chosen)))
    return chosen.squeeze(3)


# Selective: tiles of the pairs (query row, chosen block), sorted by block ─────────────────────────────────────────────
#
# A row is the G query heads of one (sequence, token, key head): in (B, T, H, D) they lie side by side, so that rows are
# numbered (b·T + t)·K + k and a row's q is read where it is. Keys are numbered alike.


class _PairTiles(NamedTuple):
    """n tiles of M pairs, each tile of one block."""

    pair: Tensor  # (n, M) number of the pair among those of its chunk of rows: place of the row · S + slot
    spare: Tensor  # (n, M) True where a pair only fills up its tile; its number is then one past the last
    row: Tensor  # (n, M) number of its query row
    key: Tensor  # (n, l') numbers of the block's keys
    mask: Tensor | None  # (n, M, 1, l') from `_hide`, or None where every query sees every token of its block


def _row_chunks(block_indices: Tensor, row_values: int) -> Iterator[Tensor]:
    """All row numbers, head by head, in chunks whose pairs' partial outputs keep to _PARTIAL_VALUES numbers."""
    batch, tokens, kv_heads, slots = block_indices.shape
    rows = torch.arange(batch * tokens * kv_heads, device=block_indices.device)
    rows = rows.view(batch, tokens, kv_heads).transpose(1, 2).flatten()
    return iter(rows.split(max(1, _PARTIAL_VALUES // max(1, slots * row_values))) if rows.numel() * slots else ())


def _pair_tiles(
    block_indices: Tensor, rows: Tensor, size: int, group: int, like: Tensor
) -> Iterator[_PairTiles]:
    """Sorts the pairs of some rows by block, cuts them in tiles, and yields as many at a time as fit the cache."""
    (_, tokens, kv_heads, slots), device = block_indices.shape, rows.device
    per_head = _selection_count(tokens, size)
    head = rows // (tokens * kv_heads) * kv_heads + rows % kv_heads  # b·K + k
    chosen = block_indices.reshape(-1, slots)[rows].long()  # (R, S)
    own = (rows // kv_heads % tokens // size)[:, None]
    free = (chosen < 0) | (chosen > own)  # what begins behind the query has no token that it sees
    chosen = torch.where(free, -1, chosen + (head * per_head)[:, None]).flatten()
    order = chosen.argsort(stable=True)  # free slots first, then block by block, queries ascending
    count = torch.bincount(chosen + 1, minlength=1)  # pairs of each block, those of free slots in front
    offset = (count.cumsum(0) - count)[1:]  # where in `order` they begin
    count = count[1:]
    tiles = (count + _PAIR_TILE - 1) // _PAIR_TILE
    block = torch.repeat_interleave(tiles)  # (n,) of b·K·N
    nth = torch.arange(len(block), device=device) - (tiles.cumsum(0) - tiles)[block]
    slot = nth[:, None] * _PAIR_TILE + torch.arange(_PAIR_TILE, device=device)  # (n, M): place among the block's pairs
    pair = order[(offset[block, None] + slot).clamp_(max=len(order) - 1)]
    row = rows[pair // slots]
    query = row // kv_heads % tokens
    spare = slot >= count[block, None]
    pair = pair.masked_fill_(spare, len(order))
    token = (block % per_head * size)[:, None] + torch.arange(size, device=device)  # (n, l')
    head = block // per_head
    first = head // kv_heads * tokens * kv_heads + head % kv_heads  # number of the key at position 0
    key = first[:, None] + token.clamp(max=tokens - 1) * kv_heads  # what lies past the end is hidden from everybody
    # A query stands inside its own block, and of every other block that it may choose it sees all tokens.
    edge = query[:, 0] < token[:, -1]
    most = max(1, _TILE_SCORES // (_PAIR_TILE * group * size))
    for part in edge.nonzero()[:, 0].split(most):
        mask = _hide(token[part, None, None, :] > query[part, :, None, None], like)
        yield _PairTiles(pair[part], spare[part], row[part], key[part], mask)
    for part in (~edge).nonzero()[:, 0].split(most):
        yield _PairTiles(pair[part], spare[part], row[part], key[part], None)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for x (R, g, ...) and index (n, m) → (n, m·g, ...) in the accumulation dtype."""
    x = x.index_select(0, index.flatten())  # faster than indexing
    return x.to(_accumulation_dtype(x)).unflatten(0, index.shape).flatten(1, 2)


def _merge_partials(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of S disjoint sets of keys from the attention over each: (R, S, G, D) and (R, S, G)."""
    total = lse.logsumexp(1)  # (R, G)
    weight = (lse - total.masked_fill(total == -math.inf, 0.0)[:, None]).exp_()
    return o.mul_(weight[..., None]).sum(1), total


def _torch_selective_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, select_block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    slots, group, dim = block_indices.shape[3], q.shape[2] // k.shape[2], q.shape[3]
    rows, keys, values = (x.reshape(-1, g, dim) for x, g in ((q, group), (k, 1), (v, 1)))  # (B·T·K, g, D)
    o = torch.zeros_like(rows)
    lse = torch.full(rows.shape[:2], -math.inf, dtype=_accumulation_dtype(q), device=q.device)
    partial = lse.new_zeros(0, group, dim)
    for chunk in _row_chunks(block_indices, group * dim):
        pairs = len(chunk) * slots
        # What a free slot holds does not matter, as long as it is finite, so the memory serves every chunk.
        partial = partial[: pairs + 1] if len(partial) > pairs else lse.new_zeros(pairs + 1, group, dim)
        partial_lse = lse.new_full((pairs + 1, group), -math.inf)
        for tiles in _pair_tiles(block_indices, chunk, select_block_size, group, lse):
            k_tile, v_tile = _gather(keys, tiles.key), _gather(values, tiles.key)
            o_tile, lse_tile = _tile_forward(_gather(rows, tiles.row), k_tile, v_tile, tiles.mask, scale)
            partial.index_copy_(0, tiles.pair.flatten(), o_tile.reshape(-1, group, dim))
            partial_lse.index_copy_(0, tiles.pair.flatten(), lse_tile.reshape(-1, group))
        by_row = (x[:-1].unflatten(0, (-1, slots)) for x in (partial, partial_lse))
        o_chunk, lse_chunk = _merge_partials(*by_row)
        o.index_copy_(0, chunk, o_chunk.to(o.dtype))
        lse.index_copy_(0, chunk, lse_chunk)
    return o.view(q.shape), lse.view(q.shape[:3])


def _torch_selective_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    o: Tensor,
    lse: Tensor,
    select_block_size: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    group, dim = q.shape[2] // k.shape[2], q.shape[3]
    rows = _Rows(q, do, lse, _delta(do, dlse, o)).map(lambda x: x.reshape(-1, group, *x.shape[3:]))  # (B·T·K, G, ·)
    keys, values = k.reshape(-1, 1, dim), v.reshape(-1, 1, dim)
    dq, dk, dv = (torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (rows.q, keys, values))
    for chunk in _row_chunks(block_indices, group * dim):
        for tiles in _pair_tiles(block_indices, chunk, select_block_size, group, lse):
            tile_rows = rows.map(lambda x, index=tiles.row: _gather(x, index))
            # What only fills up a tile has no gradient.
            tile_rows.lse.unflatten(1, (-1, group)).masked_fill_(tiles.spare[..., None], math.inf)
            k_tile, v_tile = _gather(keys, tiles.key), _gather(values, tiles.key)
            dq_tile, dk_tile, dv_tile = _tile_backward(tile_rows, k_tile, v_tile, tiles.mask, scale)
            dq.index_add_(0, tiles.row.flatten(), dq_tile.reshape(-1, group, dim))
            dk.index_add_(0, tiles.key.flatten(), dk_tile.reshape(-1, 1, dim))
            dv.index_add_(0, tiles.key.flatten(), dv_tile.reshape(-1, 1, dim))
    return dq.to(q.dtype).view(q.shape), dk.to(k.dtype).view(k.shape), dv.to(v.dtype).view(v.shape)


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 5  Triton kernels: the same branches for CUDA, with the signatures of section 4
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 6  Autograd: one function for every branch and backend
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


class _Branch(NamedTuple):
    """A branch on a backend. `forward(q, k, v[, block_indices], **settings) → o, lse`, and its `backward`."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


class _BranchFunction(torch.autograd.Function):
    """(q, k, v[, block_indices]) → o, lse. Saves its inputs and outputs, never a probability."""

    @staticmethod
    def forward(branch: _Branch, settings: dict[str, Any], *tensors: Tensor) -> tuple[Tensor, Tensor]:
        # The precision is the branch's business: it works in float32 under autocast, too.
        with torch.autocast(tensors[0].device.type, enabled=False):
            return branch.forward(*tensors, **settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.branch, ctx.settings, *tensors = inputs
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        with torch.autocast(do.device.type, enabled=False):
            gradients = ctx.branch.backward(do, dlse, *tensors, **ctx.settings)
        return None, None, *gradients, *[None] * (len(tensors) - 5)  # block_indices, where given


_TORCH_LOCAL = _Branch(_torch_local_forward, _torch_local_backward)
_TORCH_COMPRESSED = _Branch(_torch_compressed_forward, _torch_compressed_backward)
_TORCH_SELECTIVE = _Branch(_torch_selective_forward, _torch_selective_backward)


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 7  Functions: the functional API. The only place that knows every backend.
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

_BACKENDS = ("auto", "torch", "triton")


def _choose_backend(backend: str, q: Tensor) -> str:
    """"torch" or "triton". An explicit choice never falls back silently."""
    _check(backend in _BACKENDS, "backend", backend, f"must be one of {', '.join(map(repr, _BACKENDS))}")
    _check(backend != "triton", "backend", backend, "this version has no Triton kernels; use 'auto' or 'torch'")
    return "torch"


def _flash_attention(q: Tensor) -> Callable[..., Tensor] | None:
    """flash-attn's function, where that package is installed and takes such a query; None elsewhere."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] > 256 or q.numel() == 0:
        return None
    try:
        from flash_attn import flash_attn_func
    except Exception:  # a broken build of it raises all kinds of errors
        return None
    return flash_attn_func


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under torch.autocast, attention takes the autocast dtype, as scaled_dot_product_attention does."""
    device = next(x for x in tensors if isinstance(x, Tensor)).device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    narrow = lambda x: isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64  # noqa: E731
    return tuple(x.to(dtype) if narrow(x) else x for x in tensors)


def _check_tensor(name: str, x: object, rank: int, letters: str) -> None:
    _check(isinstance(x, Tensor), name, type(x).__name__, "must be a tensor", TypeError)
    _check(x.ndim == rank, f"{name}.shape", tuple(x.shape), f"must have {rank} dimensions, {letters}")


def _check_like(name: str, x: Tensor, q: Tensor) -> None:
    _check(x.dtype == q.dtype, f"{name}.dtype", x.dtype, f"must be q's, {q.dtype}")
    _check(x.device == q.device, f"{name}.device", str(x.device), f"must be q's, {q.device}")


def _check_attention(q: Tensor, scale: float | None, rows: int | None = None, **keys_and_values: Tensor) -> float:
    """Checks q (B, T, H, D) against pairs of keys and values (B, rows, K, D); returns the scale."""
    _check_tensor("q", q, 4, "(B, T, H, D)")
    _check(q.is_floating_point(), "q.dtype", q.dtype, "must be a floating point type", TypeError)
    _check(q.shape[3] > 0, "q.shape", tuple(q.shape), "must have at least 1 number a head")
    first = None
    for name, x in keys_and_values.items():
        _check_tensor(name, x, 4, "(B, T, K, D)")
        _check_like(name, x, q)
        _check(x.shape[2] > 0, f"{name}.shape", tuple(x.shape), "must have at least 1 head")
        rule = f"must be a divisor of q's {q.shape[2]} heads in dimension 2"
        _check(q.shape[2] % x.shape[2] == 0, f"{name}.shape", tuple(x.shape), rule)
        length = q.shape[1] if rows is None else rows
        expected = (q.shape[0], length, (x if first is None else first).shape[2], q.shape[3])
        rule = f"must be {expected} for q of shape {tuple(q.shape)}"
        _check(tuple(x.shape) == expected, f"{name}.shape", tuple(x.shape), rule)
        first = x if first is None else first
    if scale is None:
        return q.shape[3] ** -0.5
    _check(_finite(scale), "scale", scale, "must be a finite number, or None for 1/sqrt(D)")
    return float(scale)


def _check_compressed(q: Tensor, block_size: int, stride: int, scale: float | None, **keys_and_values: Tensor) -> float:
    _check_integer("block_size", block_size, 1)
    _check_integer("stride", stride, 1)
    _check_blocks(block_size, stride, stride, 0, 0, 0)
    _check_tensor("q", q, 4, "(B, T, H, D)")
    return _check_attention(q, scale, _compressed_count(q.shape[1], block_size, stride), **keys_and_values)


def local_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int, *, scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """Sliding-window causal attention (§3.3.3): the query at t attends to the keys at t − W < s ≤ t, itself included.

    W = 3:            keys →
            queries   ■ · · · ·
               ↓      ■ ■ · · ·
                      ■ ■ ■ · ·
                      · ■ ■ ■ ·
                      · · ■ ■ ■

    >>> q, k = torch.randn(1, 100, 8, 64), torch.randn(1, 100, 2, 64)  # 4 query heads share a key head
    >>> local_attention(q, k, torch.randn_like(k), window=32).shape
    torch.Size([1, 100, 8, 64])

    Args:
        q: queries (B, T, H, D), of any floating point type.
        k, v: keys and values (B, T, K, D), K a divisor of H; query head h uses key head h // (H/K).
        window: W ≥ 1, in tokens.
        scale: factor on q·k; None is 1/sqrt(D).
        backend: "auto", "torch" or "triton".

    Returns:
        (B, T, H, D) in q's dtype; sums are accumulated in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: an argument breaks one of these rules; the message names it, its value and the rule.
    """
    q, k, v = _autocast(q, k, v)
    scale = _check_attention(q, scale, k=k, v=v)
    _check_integer("window", window, 1)
    _choose_backend(backend, q)
    flash = _flash_attention(q) if backend == "auto" else None
    if flash is not None:
        return flash(q, k, v, softmax_scale=scale, causal=True, window_size=(window - 1, 0))
    return _BranchFunction.apply(_TORCH_LOCAL, {"window": window, "scale": scale}, q, k, v)[0]


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    block_size: int,
    stride: int,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over compressed blocks (eq. 8): query t sees block i iff its last token i·d + l − 1 is at t or earlier.

    l = 4, d = 2:       blocks →                  tokens of block 0: 0 1 2 3
            query 2     · · ·                                block 1:     2 3 4 5
            query 3     ■ · ·                                block 2:         4 5 6 7
            query 4     ■ · ·
            query 5     ■ ■ ·

    >>> q, k_cmp = torch.randn(1, 100, 8, 64), torch.randn(1, 5, 8, 64)
    >>> o, lse = compressed_attention(q, k_cmp, torch.randn_like(k_cmp), block_size=32, stride=16)
    >>> o.shape, lse.shape, bool((o[:, :31] == 0).all())
    (torch.Size([1, 100, 8, 64]), torch.Size([1, 100, 8]), True)

    Args:
        q: queries (B, T, H, D).
        k_cmp, v_cmp: compressed keys and values (B, C, K, D), C = (T − l)//d + 1, or 0 where T < l.
        block_size, stride: l and d, in tokens; l is a multiple of d.
        scale, backend: as in `local_attention`.

    Returns:
        o (B, T, H, D) in q's dtype, exactly 0 where a query sees no block, and the log-sum-exp of the scaled scores,
        (B, T, H) in float32 (float64 for float64), −inf there. Both are differentiable.
    """
    q, k_cmp, v_cmp = _autocast(q, k_cmp, v_cmp)
    scale = _check_compressed(q, block_size, stride, scale, k_cmp=k_cmp, v_cmp=v_cmp)
    _choose_backend(backend, q)
    settings = {"block_size": block_size, "stride": stride, "scale": scale}
    return _BranchFunction.apply(_TORCH_COMPRESSED, settings, q, k_cmp, v_cmp)


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    *,
    block_size: int,
    stride: int,
    select_block_size: int,
    topk_blocks: int,
    init_blocks: int = 0,
    local_blocks: int = 1,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The blocks that each query attends to in the selective branch (eq. 9 to 11). No gradient flows through it.

    The compressed probabilities exp(scale·q·k_cmp − lse) are summed over the G heads of a group and gathered, weighed
    by overlap, into the importance of each selection block. Of the blocks that start at t or before, a query takes the
    first `init_blocks`, the last `local_blocks` up to its own, and then the most important; ties go to the lower index.

    >>> q, k_cmp = torch.randn(1, 100, 8, 64), torch.randn(1, 6, 2, 64)
    >>> o, lse = compressed_attention(q, k_cmp, k_cmp, block_size=16, stride=16)
    >>> select_blocks(q, k_cmp, lse, block_size=16, stride=16, select_block_size=32, topk_blocks=3)[0, 40, 0]
    tensor([ 0,  1, -1], dtype=torch.int32)

    Args:
        q, k_cmp, block_size, stride, scale, backend: as in `compressed_attention`.
        lse: its second result, (B, T, H).
        select_block_size: l' in tokens, a multiple of `stride`.
        topk_blocks: S, at least `init_blocks` + `local_blocks`.

    Returns:
        int32 (B, T, K, S): block indices in ascending order, one set for each group, −1 in slots that stay free.
    """
    q, k_cmp = _autocast(q, k_cmp)
    scale = _check_compressed(q, block_size, stride, scale, k_cmp=k_cmp)
    _check_tensor("lse", lse, 3, "(B, T, H)")
    _check(lse.shape == q.shape[:3], "lse.shape", tuple(lse.shape), f"must be {tuple(q.shape[:3])}, q's (B, T, H)")
    _check(lse.device == q.device, "lse.device", str(lse.device), f"must be q's, {q.device}")
    _check(lse.is_floating_point(), "lse.dtype", lse.dtype, "must be a floating point type", TypeError)
    for name, value in (("select_block_size", select_block_size), ("topk_blocks", topk_blocks)):
        _check_integer(name, value, 1)
    for name, value in (("init_blocks", init_blocks), ("local_blocks", local_blocks)):
        _check_integer(name, value, 0)
    _check_blocks(block_size, stride, select_block_size, topk_blocks, init_blocks, local_blocks)
    _choose_backend(backend, q)
    with torch.autocast(q.device.type, enabled=False):
        return _torch_select(
            q, k_cmp, lse, block_size, stride, select_block_size, topk_blocks, init_blocks, local_blocks, scale
        )


def selective_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    select_block_size: int,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention over the tokens of chosen blocks (eq. 12): query t sees the tokens s ≤ t of its blocks.

    >>> q = torch.randn(1, 100, 4, 64)
    >>> own = (torch.arange(100) // 16).int().view(1, 100, 1, 1)  # everybody chooses the block that it stands in
    >>> selective_attention(q, q[:, :, :1], q[:, :, :1], own, select_block_size=16).shape
    torch.Size([1, 100, 4, 64])

    Args:
        q, k, v, scale, backend: as in `local_attention`.
        block_indices: int32 or int64 (B, T, K, S), as `select_blocks` returns it: for each key head the blocks chosen,
            each at most once, in any order; −1 leaves a slot free. A block behind the query is not seen.
        select_block_size: l', in tokens.

    Returns:
        (B, T, H, D) in q's dtype; 0 where a query has chosen nothing that it sees.
    """
    q, k, v = _autocast(q, k, v)
    scale = _check_attention(q, scale, k=k, v=v)
    _check_integer("select_block_size", select_block_size, 1)
    _check_tensor("block_indices", block_indices, 4, "(B, T, K, S)")
    expected = (*k.shape[:3], block_indices.shape[3])
    _check(
        tuple(block_indices.shape) == expected,
        "block_indices.shape",
        tuple(block_indices.shape),
        f"must be (B, T, K, S) = {expected}",
    )
    dtype, device = block_indices.dtype, block_indices.device
    _check(dtype in (torch.int32, torch.int64), "block_indices.dtype", dtype, "must be int32 or int64", TypeError)
    _check(device == q.device, "block_indices.device", str(device), f"must be q's, {q.device}")
    _choose_backend(backend, q)
    settings = {"select_block_size": select_block_size, "scale": scale}
    return _BranchFunction.apply(_TORCH_SELECTIVE, settings, q, k, v, block_indices)[0]


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    *,
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
    backend: str = "auto",
) -> Tensor:
    """Native Sparse Attention (eq. 5): the gated sum of the local, the compressed and the selective branch.

    >>> q, k, v = torch.randn(3, 1, 128, 8, 64)
    >>> k_cmp, v_cmp = (x.unflatten(1, (4, 32)).mean(2) for x in (k, v))  # 4 blocks of 32 tokens, each its mean
    >>> gates = torch.full((1, 128, 8, 3), 0.5)
    >>> o = nsa_attention(q, k, v, k_cmp, v_cmp, gates, local_window=32, block_size=32, stride=32,
    ...                   select_block_size=32, topk_blocks=2)
    >>> o.shape
    torch.Size([1, 128, 8, 64])

    Args:
        q: queries (B, T, H, D).
        k, v: keys and values of the local and the selective branch, (B, T, K, D).
        k_cmp, v_cmp: compressed keys and values (B, C, K, D).
        gates: (B, T, H, 3), through the sigmoid already, in (local, compressed, selective) order.
        local_window, block_size, stride, select_block_size, topk_blocks, init_blocks, local_blocks: as in
            `local_attention`, `compressed_attention` and `select_blocks`.
        k_local, v_local: keys and values of the local branch alone, where it has its own; both or neither.
        scale, backend: as in `local_attention`.

    Returns:
        (B, T, H, D) in q's dtype.
    """
    _check_integer("local_window", local_window, 1)
    _check((k_local is None) == (v_local is None), "k_local, v_local", "one of them", "give both or neither")
    q, k, v, k_cmp, v_cmp, gates, k_local, v_local = _autocast(q, k, v, k_cmp, v_cmp, gates, k_local, v_local)
    if k_local is None:
        k_local, v_local = k, v
    _check_attention(q, scale, k=k, v=v, k_local=k_local, v_local=v_local)
    _check_tensor("gates", gates, 4, "(B, T, H, 3)")
    expected = (*q.shape[:3], 3)
    _check(tuple(gates.shape) == expected, "gates.shape", tuple(gates.shape), f"must be (B, T, H, 3) = {expected}")
    _check_like("gates", gates, q)
    options = {"scale": scale, "backend": backend}
    blocks = {"block_size": block_size, "stride": stride}
    o_local = local_attention(q, k_local, v_local, local_window, **options)
    o_compressed, lse = compressed_attention(q, k_cmp, v_cmp, **blocks, **options)
    chosen = select_blocks(
        q,
        k_cmp,
        lse,
        **blocks,
        select_block_size=select_block_size,
        topk_blocks=topk_blocks,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        **options,
    )
    o_selective = selective_attention(q, k, v, chosen, select_block_size, **options)
    g_local, g_compressed, g_selective = gates.unsqueeze(-1).unbind(3)  # each (B, T, H, 1)
    return (g_local * o_local).addcmul_(g_compressed, o_compressed).addcmul_(g_selective, o_selective)


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 8  Compressors: a block of l tokens becomes one vector (eq. 7). Weights are shared by the heads.
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


class _Compressor(nn.Module):
    """What the three variants share. (b, T, dim) → (b, C, dim), the heads folded into b.

    Weights are plain parameters rather than nn.Linear or nn.Conv1d: the start near the mean of the block, from which
    the ranking of blocks is useful at once, then survives a model's own `model.apply(init_weights)`.
    """

    def __init__(self, dim: int, block: int, stride: int | None = None) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("block", block), ("stride", block if stride is None else stride)):
            _check_integer(name, value, 1)
        self.dim, self.block, self.stride = dim, block, block if stride is None else stride

    def _blocks(self, x: Tensor) -> Tensor:
        """(b, T, dim) → (b, C, l, dim), a view."""
        if x.shape[1] < self.block:
            return x.new_empty(x.shape[0], 0, self.block, self.dim)
        return x.unfold(1, self.block, self.stride).transpose(2, 3)  # unfold puts l last

    def extra_repr(self) -> str:
        return f"dim={self.dim}, block={self.block}, stride={self.stride}"


class AvgPoolCompressor(_Compressor):
    """The mean of the block. No parameters.

    >>> AvgPoolCompressor(64, block=32, stride=16)(torch.randn(2, 100, 64)).shape
    torch.Size([2, 5, 64])
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._blocks(x).mean(2)


class _LearnedCompressor(_Compressor):
    """Adds the learned position embedding inside the block, of shape (l, dim)."""

    def __init__(self, dim: int, block: int, stride: int | None = None) -> None:
        super().__init__(dim, block, stride)
        self.position = nn.Parameter(torch.empty(block, dim))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.position, std=0.02)

    def _positioned_blocks(self, x: Tensor) -> Tensor:
        return self._blocks(x) + self.position  # (b, C, l, dim)


class GroupedMLPCompressor(_LearnedCompressor):
    """Position embedding, then an MLP over the whole block: (l·dim) → Linear → GELU (2·dim) → Linear → dim.

    It starts as the mean, exactly: half of the hidden units hold the mean m, the other half −m, and
    GELU(m) − GELU(−m) = m.

    >>> GroupedMLPCompressor(64, block=32, stride=16)(torch.randn(2, 100, 64)).shape
    torch.Size([2, 5, 64])
    """

    def __init__(self, dim: int, block: int, stride: int | None = None) -> None:
        super().__init__(dim, block, stride)
        self.w_in, self.b_in = nn.Parameter(torch.empty(2 * dim, block * dim)), nn.Parameter(torch.empty(2 * dim))
        self.w_out, self.b_out = nn.Parameter(torch.empty(dim, 2 * dim)), nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        identity = torch.eye(self.dim, device=self.w_in.device, dtype=self.w_in.dtype)
        mean = identity.repeat(1, self.block) / self.block  # (dim, l·dim)
        self.w_in.copy_(torch.cat([mean, -mean]))
        self.w_out.copy_(torch.cat([identity, -identity], dim=1))
        nn.init.zeros_(self.b_in)
        nn.init.zeros_(self.b_out)

    def forward(self, x: Tensor) -> Tensor:
        flat = self._positioned_blocks(x).flatten(2)  # (b, C, l·dim)
        return F.linear(F.gelu(F.linear(flat, self.w_in, self.b_in)), self.w_out, self.b_out)


class Conv1dCompressor(_LearnedCompressor):
    """Position embedding, then a convolution over the tokens, of kernel l and stride d; it starts as the mean.

    >>> Conv1dCompressor(64, block=32, stride=16)(torch.randn(2, 100, 64)).shape
    torch.Size([2, 5, 64])
    """

    def __init__(self, dim: int, block: int, stride: int | None = None) -> None:
        super().__init__(dim, block, stride)
        self.weight, self.bias = nn.Parameter(torch.empty(dim, dim, block)), nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        identity = torch.eye(self.dim, device=self.weight.device, dtype=self.weight.dtype)
        self.weight.copy_(identity[:, :, None].expand_as(self.weight) / self.block)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        # The embedding belongs to places in the block, not in the sequence, so that overlapping blocks disagree on it:
        # the convolution is the product of each block with the kernel, (l·dim) × (dim, l·dim).
        flat = self._positioned_blocks(x).flatten(2)  # (b, C, l·dim)
        return F.linear(flat, self.weight.transpose(1, 2).flatten(1), self.bias)


_COMPRESSOR_CLASSES = {"grouped_mlp": GroupedMLPCompressor, "conv1d": Conv1dCompressor, "avgpool": AvgPoolCompressor}


class TokenCompressor(nn.Module):
    """The compressor of that name or class, with its input and its output checked.

    A class of the user's own is built as `method(dim, block, stride)`, or as `method(dim, block)` where it takes no
    stride and stride == block. Its forward gets (b, T', dim), the tokens of the C whole blocks, and returns
    (b, C, dim); it is not called where there is no whole block.

    >>> TokenCompressor(64, 32, 16, method="conv1d")(torch.randn(2, 100, 64)).shape
    torch.Size([2, 5, 64])

    Raises:
        ValueError: an unknown name; a class that takes no stride where stride != block; an output of another shape.
    """

    def __init__(
        self, dim: int, block: int, stride: int | None = None, method: str | type[nn.Module] = "grouped_mlp"
    ) -> None:
        super().__init__()
        stride = block if stride is None else stride
        for name, value in (("dim", dim), ("block", block), ("stride", stride)):
            _check_integer(name, value, 1)
        self.dim, self.block, self.stride = dim, block, stride
        if isinstance(method, str):
            _check(method in _COMPRESSOR_CLASSES, "method", method, _COMPRESSION_RULE)
            method = _COMPRESSOR_CLASSES[method]
        _check(callable(method), "method", method, _COMPRESSION_RULE, TypeError)
        takes_stride = _accepts(method, dim, block, stride)
        rule = f"takes no stride, so that stride = {stride} must be block_size = {block}"
        _check(takes_stride or stride == block, "compression", method, rule)
        self.method = method(dim, block, stride) if takes_stride else method(dim, block)
        _check(isinstance(self.method, nn.Module), "compression", method, "must build a torch.nn.Module", TypeError)

    def forward(self, x: Tensor) -> Tensor:
        _check_tensor("x", x, 3, "(b, T, dim)")
        _check(x.shape[2] == self.dim, "x.shape", tuple(x.shape), f"must have dim = {self.dim} in dimension 2")
        count = _compressed_count(x.shape[1], self.block, self.stride)
        if count == 0:
            return x.new_empty(x.shape[0], 0, self.dim)
        out = self.method(x[:, : (count - 1) * self.stride + self.block])
        expected, name = (x.shape[0], count, self.dim), type(self.method).__name__
        _check(isinstance(out, Tensor), f"output of {name}", type(out).__name__, "must be a tensor", TypeError)
        _check(tuple(out.shape) == expected, f"output of {name}", tuple(out.shape), f"must have shape {expected}")
        return out


def _accepts(function: Callable[..., object], *arguments: object) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except (TypeError, ValueError):
        return False
    return True


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 9  NativeSparseAttention
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


class AttentionPatterns(NamedTuple):
    """What each branch looked at: probabilities whose rows sum to 1, or to 0 where a query sees nothing."""

    local: Tensor  # (B, H, T, T)
    compressed: Tensor  # (B, H, T, C)
    selective: Tensor  # (B, H, T, T)
    gates: Tensor  # (B, T, H, 3)
    block_indices: Tensor  # (B, T, K, S)


class _Projections(NamedTuple):
    """All that the branches need of an input x, positions already rotated in."""

    q: Tensor  # (B, T, H, D)
    k: Tensor  # (B, T, K, D)
    v: Tensor
    k_local: Tensor
    v_local: Tensor
    k_cmp: Tensor  # (B, C, K, D)
    v_cmp: Tensor
    gates: Tensor  # (B, T, H, 3)


def _rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary position embedding: dimension i and i + D/2 turn as a pair by positions·theta^(−2i/D).  x: (B, T, H, D)"""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = (positions[:, None].double() * frequencies)[:, None]  # (T, 1, D/2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class NativeSparseAttention(nn.Module):
    """Multi-head Native Sparse Attention, causal: (B, T, dim) → (B, T, dim). Takes the place of self-attention.

    >>> attention = NativeSparseAttention(NSAConfig(dim=256, heads=4, seq_len=1024))
    >>> attention(torch.randn(2, 300, 256)).shape
    torch.Size([2, 300, 256])

    Raises:
        ValueError, TypeError: x is not a floating point tensor (B, T ≤ seq_len, dim) of the weights' dtype and device.
    """

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        _check(isinstance(config, NSAConfig), "config", config, "must be an NSAConfig", TypeError)
        self.cfg = cfg = config
        sets = 3 if cfg.separate_kv else 1  # of keys and values: for the local, compressed and selective branch
        self.to_q = nn.Linear(cfg.dim, cfg.heads * cfg.dim_head, bias=cfg.bias)
        self.to_k = nn.Linear(cfg.dim, sets * cfg.kv_heads * cfg.dim_head, bias=cfg.bias)
        self.to_v = nn.Linear(cfg.dim, sets * cfg.kv_heads * cfg.dim_head, bias=cfg.bias)
        self.to_out = nn.Linear(cfg.heads * cfg.dim_head, cfg.dim, bias=cfg.bias)
        self.dropout = nn.Dropout(cfg.dropout)
        self.compress_k = TokenCompressor(cfg.dim_head, cfg.block_size, cfg.stride, cfg.compression)
        self.compress_v = TokenCompressor(cfg.dim_head, cfg.block_size, cfg.stride, cfg.compression)
        # Plain parameters, so that a model's own `apply(init_weights)` leaves gate_init in place.
        self.gate_bias = nn.Parameter(torch.empty(cfg.heads, 3))
        self.gate_weight = nn.Parameter(torch.empty(cfg.heads * 3, cfg.dim)) if cfg.gate_mode == "q_cond" else None
        self.reset_gates()

    @torch.no_grad()
    def reset_gates(self) -> None:
        self.gate_bias.copy_(torch.tensor(self.cfg.gate_init).expand(self.cfg.heads, 3))
        if self.gate_weight is not None:
            nn.init.zeros_(self.gate_weight)

    def forward(self, x: Tensor) -> Tensor:
        cfg, p = self.cfg, self._project(x)
        o = nsa_attention(**p._asdict(), local_window=cfg.local_window, **cfg.selection, backend=self._backend)
        return self.dropout(self.to_out(o.flatten(2)))  # (B, T, H, D) → (B, T, H·D) → (B, T, dim)

    @torch.no_grad()
    def attention_patterns(self, x: Tensor) -> AttentionPatterns:
        """Dense probabilities of every branch, for study and plots: T × T in memory. Same x as for forward.

        >>> attention = NativeSparseAttention(NSAConfig(dim=64, heads=2, seq_len=128))
        >>> attention.attention_patterns(torch.randn(1, 70, 64)).compressed.shape
        torch.Size([1, 2, 70, 2])
        """
        cfg, p, tokens = self.cfg, self._project(x), x.shape[1]
        options = {"block_size": cfg.block_size, "stride": cfg.stride, "backend": self._backend}
        lse = compressed_attention(p.q, p.k_cmp, p.v_cmp, **options)[1]
        chosen = select_blocks(p.q, p.k_cmp, lse, **cfg.selection, backend=self._backend)
        query, key = torch.arange(tokens, device=x.device)[:, None], torch.arange(tokens, device=x.device)
        block = torch.arange(p.k_cmp.shape[1], device=x.device)
        of_chosen = (key // cfg.select_block_size == chosen.transpose(1, 2)[..., None]).any(3)  # (B, K, T, T)
        of_chosen = of_chosen.repeat_interleave(cfg.heads // cfg.kv_heads, dim=1)
        return AttentionPatterns(
            local=_dense_probabilities(p.q, p.k_local, _Window(cfg.local_window).sees(query, key)),
            compressed=_dense_probabilities(p.q, p.k_cmp, _Staircase(cfg.block_size, cfg.stride).sees(query, block)),
            selective=_dense_probabilities(p.q, p.k, of_chosen & (key <= query)),
            gates=p.gates.float(),
            block_indices=chosen,
        )

    @property
    def _backend(self) -> str:
        return "auto" if self.cfg.use_flash else "torch"

    def _project(self, x: Tensor) -> _Projections:
        self._check_input(x)
        cfg, tokens = self.cfg, x.shape[1]
        heads = lambda y, *shape: y.unflatten(-1, (*shape, cfg.dim_head))  # noqa: E731
        q = heads(self.to_q(x), cfg.heads)  # (B, T, H, D)
        keys = heads(self.to_k(x), -1, cfg.kv_heads).unbind(2)  # 1 or 3 of (B, T, K, D): local, compressed, selective
        values = heads(self.to_v(x), -1, cfg.kv_heads).unbind(2)
        k_cmp, v_cmp = (
            self._compress(compressor, y[len(y) // 2])
            for compressor, y in ((self.compress_k, keys), (self.compress_v, values))
        )
        k_local, k = keys[0], keys[-1]
        if cfg.rope_theta is not None:
            # Keys are compressed before rotation; compressed key i then turns as position i·d.
            at = torch.arange(tokens, device=x.device)
            q, k_local = _rotate(q, at, cfg.rope_theta), _rotate(k_local, at, cfg.rope_theta)
            k = _rotate(k, at, cfg.rope_theta) if cfg.separate_kv else k_local
            k_cmp = _rotate(k_cmp, torch.arange(k_cmp.shape[1], device=x.device) * cfg.stride, cfg.rope_theta)
        return _Projections(q, k, values[-1], k_local, values[0], k_cmp, v_cmp, self._gates(x))

    def _compress(self, compressor: TokenCompressor, x: Tensor) -> Tensor:
        """(B, T, K, D) → (B, C, K, D)."""
        compressed = compressor(rearrange(x, "b t k d -> (b k) t d"))
        return rearrange(compressed, "(b k) c d -> b c k d", k=self.cfg.kv_heads)

    def _gates(self, x: Tensor) -> Tensor:
        """(B, T, H, 3): a sigmoid for each token, head and branch."""
        if self.gate_weight is None:
            return self.gate_bias.sigmoid().to(x.dtype).expand(*x.shape[:2], -1, -1)
        return F.linear(x, self.gate_weight, self.gate_bias.flatten()).sigmoid().unflatten(-1, (self.cfg.heads, 3))

    def _check_input(self, x: Tensor) -> None:
        cfg, weight = self.cfg, self.to_q.weight
        _check_tensor("x", x, 3, "(B, T, dim)")
        _check(x.shape[2] == cfg.dim, "x.shape", tuple(x.shape), f"must have dim = {cfg.dim} in dimension 2")
        _check(x.shape[1] <= cfg.seq_len, "x.shape", tuple(x.shape), f"must have T of at most seq_len = {cfg.seq_len}")
        _check(x.is_floating_point(), "x.dtype", x.dtype, "must be a floating point type", TypeError)
        autocast = torch.is_autocast_enabled(x.device.type)
        _check(autocast or x.dtype == weight.dtype, "x.dtype", x.dtype, f"must be the weights', {weight.dtype}")
        _check(x.device == weight.device, "x.device", str(x.device), f"must be the weights', {weight.device}")


def _dense_probabilities(q: Tensor, k: Tensor, sees: Tensor) -> Tensor:
    """softmax of q·kᵀ/sqrt(D) over the keys that are seen; rows of zeros where there are none.  → (B, H, T, keys)"""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    s = torch.einsum("bthd,bshd->bhts", q.float(), k.float()) * q.shape[3] ** -0.5
    return s.masked_fill(~sees, -math.inf).softmax(-1).nan_to_num(0.0).masked_fill(~sees, 0.0)


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 10  NSABlock
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


class NSABlock(nn.Module):
    """A Transformer block with Native Sparse Attention: x + attention(norm(x)), then x + feed-forward(norm(x)).

    >>> model = nn.Sequential(*(NSABlock(NSAConfig(dim=64, heads=4, seq_len=256)) for _ in range(2)))
    >>> model(torch.randn(2, 100, 64)).shape
    torch.Size([2, 100, 64])
    """

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        self.attn = NativeSparseAttention(config)
        hidden = config.ffn_mult * config.dim
        self.norm1 = nn.LayerNorm(config.dim, bias=config.bias)
        self.norm2 = nn.LayerNorm(config.dim, bias=config.bias)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, hidden, bias=config.bias),
            nn.GELU(),
            nn.Linear(hidden, config.dim, bias=config.bias),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, dim) → (B, T, dim)."""
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 11  Self-tests: what `python native_sparse_attention.py` runs, wherever this file was copied to
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


class _Skip(Exception):
    """A self-test that cannot run here, and why."""


def _reference(p: _Projections, cfg: NSAConfig, chosen: Tensor) -> Tensor:
    """NSA by dense masks in float64: each branch a softmax over the whole row. For small sizes."""
    tokens, group = p.q.shape[1], cfg.heads // cfg.kv_heads
    t, s, i = (torch.arange(n) for n in (tokens, tokens, p.k_cmp.shape[1]))
    in_chosen = (chosen.transpose(1, 2)[..., None] == s // cfg.select_block_size).any(3)  # (B, K, T, T)
    masks = {
        "local": (s <= t[:, None]) & (s > t[:, None] - cfg.local_window),
        "compressed": i * cfg.stride + cfg.block_size - 1 <= t[:, None],
        "selective": in_chosen.repeat_interleave(group, 1) & (s <= t[:, None]),
    }
    pairs = {"local": (p.k_local, p.v_local), "compressed": (p.k_cmp, p.v_cmp), "selective": (p.k, p.v)}
    o = torch.zeros_like(p.q, dtype=torch.float64)
    for branch, (name, (k, v)) in enumerate(pairs.items()):
        k, v = (x.double().repeat_interleave(group, 2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", p.q.double(), k) / math.sqrt(p.q.shape[3])
        weights = scores.masked_fill(~masks[name], -math.inf).softmax(-1).nan_to_num(0.0)
        o = o + p.gates[..., branch, None] * torch.einsum("bhts,bshd->bthd", weights, v)
    return o


def _selftest_configs() -> dict[str, NSAConfig]:
    base = {"dim": 64, "heads": 4, "seq_len": 256, "local_window": 24, "block_size": 16, "topk_blocks": 3}
    paper = {"kv_heads": 2, "gate_mode": "q_cond", "separate_kv": True, "init_blocks": 1}
    overlap = {"stride": 8, "select_block_size": 32}
    return {
        "grouped_mlp": NSAConfig(**base),
        "conv1d, overlapping": NSAConfig(**base, **overlap, compression="conv1d"),
        "avgpool, one key head": NSAConfig(**base, kv_heads=1, compression="avgpool"),
        "rotary positions": NSAConfig(**base, rope_theta=10000.0, dropout=0.1, bias=True),
        "as in the paper": NSAConfig(**base, **overlap, **paper),
    }


def _selftest_smoke() -> str:
    configs = _selftest_configs()
    for cfg in configs.values():
        block, lengths = NSABlock(cfg), (1, 15, 16, 100, 256)
        for tokens in lengths:
            x = torch.randn(2, tokens, cfg.dim, requires_grad=True)
            y = block(x)
            y.square().mean().backward()
            assert y.shape == x.shape, f"{cfg}: {tuple(x.shape)} became {tuple(y.shape)}"
            assert bool(y.isfinite().all() and x.grad.isfinite().all()), f"{cfg}: not finite at T = {tokens}"
    return f"{len(configs)} configurations, forward and backward, T = 1 to 256"


def _selftest_causality() -> str:
    for name, cfg in _selftest_configs().items():
        attention, x = NativeSparseAttention(cfg).eval(), torch.randn(1, 120, cfg.dim)
        for at in (1, 47, 96):
            changed = torch.cat([x[:, :at], torch.randn(1, 120 - at, cfg.dim)], dim=1)
            error = (attention(x) - attention(changed))[:, :at].abs().max().item()
            assert error < 1e-5, f"{name}: a change from token {at} on moves earlier outputs by {error:.1e}"
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(attention(x)[:, :at].sum(), x)
            assert not gradient[:, at:].any(), f"{name}: the output before token {at} has a gradient in the future"
            x = x.detach()
    return "the future changes no output and takes no gradient"


def _selftest_dense() -> str:
    q, k, v = (torch.randn(2, 150, heads, 16, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))
    every_block = torch.arange(10, dtype=torch.int32).expand(2, 150, 2, 10)
    o = selective_attention(q, k, v, every_block, 16)
    by_head = (x.transpose(1, 2) for x in (q, k, v))
    dense = F.scaled_dot_product_attention(*by_head, is_causal=True, enable_gqa=True).transpose(1, 2)
    upstream = torch.randn_like(dense)
    ours, theirs = ((x, *torch.autograd.grad(x, (q, k, v), upstream)) for x in (o, dense))
    error = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    assert error < 1e-10, f"selecting every block differs from dense attention by {error:.1e}"
    return f"selecting every block is dense attention, gradients too: error {error:.0e}"


def _selftest_reference() -> str:
    worst = 0.0
    for name, cfg in _selftest_configs().items():
        attention, x = NativeSparseAttention(cfg).double(), torch.randn(2, 130, cfg.dim, dtype=torch.float64)
        p = attention._project(x)
        o = nsa_attention(**p._asdict(), local_window=cfg.local_window, **cfg.selection, backend="torch")
        exact = _reference(p, cfg, attention.attention_patterns(x).block_indices)
        names, weights = zip(*attention.named_parameters(), strict=True)
        upstream = torch.randn_like(o)
        options = {"retain_graph": True, "allow_unused": True}
        ours, theirs = ((y, *torch.autograd.grad(y, weights, upstream, **options)) for y in (o, exact))
        for label, a, b in zip(("output", *names), ours, theirs, strict=True):
            assert (a is None) == (b is None), f"{name}: only one side has a gradient for {label}"
            error = 0.0 if a is None else (a - b).abs().max().item()
            assert error < 1e-9, f"{name}: {label} differs from the reference by {error:.1e}"
            worst = max(worst, error)
    return f"PyTorch path is the exact reference, all gradients: error {worst:.0e}"


def _selftest_learning() -> str:
    """Recall of a token seen once, far outside the window: only the compressed and the selective branch can do it."""
    cfg = NSAConfig(dim=32, heads=2, seq_len=64, local_window=4, block_size=4, topk_blocks=4, gate_init=(0.0, 0.0, 0.0))
    embedding, block, head = nn.Embedding(16, 32), NSABlock(cfg), nn.Linear(32, 8)
    optimizer = torch.optim.AdamW([*embedding.parameters(), *block.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(100):
        tokens = torch.randint(8, 15, (32, 32))
        answer = torch.randint(0, 8, (32,))
        tokens[torch.arange(32), torch.randint(0, 20, (32,))] = answer
        loss = F.cross_entropy(head(block(embedding(tokens))[:, -1]), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    chance = math.log(8)
    assert loss.item() < chance / 2, f"loss {loss.item():.2f} after 100 steps, {chance:.2f} is chance"
    return f"recalls a token beyond the window: loss {loss.item():.2f} after 100 steps, chance {chance:.2f}"


def _selftest_flash() -> str:
    q, k, v = (torch.randn(2, 300, 4, 64) for _ in range(3))
    if not torch.cuda.is_available():
        raise _Skip("no CUDA device")
    q, k, v = (x.cuda().bfloat16() for x in (q, k, v))
    if _flash_attention(q) is None:
        raise _Skip("flash-attn is not installed")
    exact = local_attention(q.double(), k.double(), v.double(), 64, backend="torch")
    ours, flash = (local_attention(q, k, v, 64, backend=backend) for backend in ("torch", "auto"))
    limit, error = 2 * (ours - exact).abs().max().item(), (flash - exact).abs().max().item()
    assert error <= max(limit, 1e-2), f"flash-attn differs by {error:.1e}, PyTorch by {limit / 2:.1e}"
    return f"local branch by flash-attn: error {error:.0e}"


def _selftest_triton() -> str:
    raise _Skip("this version has no Triton kernels")


_SELFTESTS = {
    "smoke": _selftest_smoke,
    "causality": _selftest_causality,
    "dense": _selftest_dense,
    "reference": _selftest_reference,
    "learning": _selftest_learning,
    "flash-attn": _selftest_flash,
    "triton": _selftest_triton,
}


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 12  Main
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


def _main() -> int:
    """Runs the self-tests and prints a table of them. Exit code 1 if one fails."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
    print(f"native_sparse_attention {__version__} · torch {torch.__version__} · {device}\n")
    print(f"{'test':<12}{'result':<8}{'seconds':>8}   what")
    results = {"pass": 0, "FAIL": 0, "skip": 0}
    for name, test in _SELFTESTS.items():
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            result, what = "pass", test()
        except _Skip as reason:
            result, what = "skip", str(reason)
        except Exception as error:
            result, what = "FAIL", f"{type(error).__name__}: {error}"
        results[result] += 1
        print(f"{name:<12}{result:<8}{time.perf_counter() - start:>8.1f}   {what}", flush=True)
    print(f"\n{results['pass']} passed, {results['FAIL']} failed, {results['skip']} skipped")
    return 1 if results["FAIL"] else 0


if __name__ == "__main__":
    raise SystemExit(_main())
