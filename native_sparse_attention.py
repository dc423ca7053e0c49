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

With an NSACache a module goes on from the tokens that it has seen. Sequences of several lengths share a batch packed
(cu_seqlens) or padded (key_padding_mask). Under context_parallel one sequence is spread over several processes.

Letters, here and everywhere below. Tensors are (B, T, H, D), flash-attention's layout; positions count from 0.

    B batch · T tokens · H query heads · K key/value heads · G = H/K query heads of a group · D head dim
    l block_size · d stride · C compressed blocks · l' select_block_size · N selection blocks · S topk_blocks · W window

Where the paper's equations live.

    eq. 5      gated sum of the branches             nsa_attention; kernels: _store_selected
    eq. 7      compression of a block of tokens      GroupedMLPCompressor, Conv1dCompressor, AvgPoolCompressor
    eq. 8      compressed attention probabilities    compressed_attention
    eq. 9, 10  importance of a selection block       _block_importance; kernels: _fold_importance
    eq. 11     choice of the S highest blocks        select_blocks: _choose_blocks; kernels: _store_highest
    eq. 12     attention over the chosen tokens      selective_attention
    §3.3.3     sliding window                        local_attention
    all        by dense masks, in 30 lines           _dense_attention

Contents, callers above callees.

    Part I   1 imports, NSAConfig                          Part II  9 launching, shared steps
             2 the definition                              Triton  10 local and compressed attention
             3 the model: NSABlock, attention, compressors         11 choice of blocks
             4 functions                                           12 selected attention
             5 batches, NSACache, context_parallel                 13 decoding
             6 operators and autograd                              14 compression
             7 block rules, PyTorch backend                        15 tuning
             8 self-tests                                          16 registration

Part I is complete by itself: without Part II the library is pure PyTorch.
"""


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 1  Imports and configuration
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import inspect
import itertools
import json
import math
import os
import re
import sys
import textwrap
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import InitVar, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = [
    "AttentionPatterns",
    "AvgPoolCompressor",
    "BackendChoice",
    "Conv1dCompressor",
    "GroupedMLPCompressor",
    "NSABlock",
    "NSACache",
    "NSAConfig",
    "NativeSparseAttention",
    "TokenCompressor",
    "compressed_attention",
    "context_parallel",
    "local_attention",
    "nsa_attention",
    "select_blocks",
    "selective_attention",
    "tune",
    "which_backend",
]
__version__ = "0.1.0"


_DERIVED_FIELDS = ("dim_head", "kv_heads", "stride", "select_block_size")
_COMPRESSIONS = ("grouped_mlp", "conv1d", "avgpool")
_COMPRESSION_RULE = f"must be one of {', '.join(map(repr, _COMPRESSIONS))}, or a class (dim, block, stride) -> Module"
_BACKEND_RULE = "must be 'auto', 'torch' or 'triton'"
_INSTANCE_RULE = "must be the class, not an instance of it: keys and values have a compressor each"


@dataclass
class NSAConfig:
    """Settings of a NativeSparseAttention or an NSABlock, checked on construction.

    Fields whose default is None are derived from others by `__post_init__`, so that all can be read as plain numbers.
    In `dataclasses.replace` a derived field follows the fields that it comes from, unless it is given a value other
    than it had.

    >>> from dataclasses import replace
    >>> cfg = NSAConfig(dim=512, heads=8, block_size=32)
    >>> cfg.dim_head, cfg.stride, replace(cfg, heads=16).dim_head
    (64, 32, 32)

    Args:
        dim: width of the residual stream.
        heads: H, query heads.
        dim_head: D, numbers in a head; None: dim // heads.
        kv_heads: K, key/value heads, each shared by heads // kv_heads query heads; None: heads.
        seq_len: longest sequence accepted, in tokens.
        local_window: W, tokens that the local branch sees, the query's own included.
        block_size: l, tokens in a compressed block.
        stride: d, tokens between the starts of two compressed blocks, a divisor of block_size and select_block_size;
            None: block_size.
        select_block_size: l', tokens in a selection block; None: block_size.
        topk_blocks: S, selection blocks that a query attends to, the forced ones included.
        init_blocks: number of forced blocks at the start of the sequence.
        local_blocks: number of forced blocks up to and including the query's own.
        compression: "grouped_mlp", "conv1d" or "avgpool", or a class (dim, block, stride) → Module.
        gate_mode: "static": a learned number for each head and branch; "q_cond": a linear map of the input, too.
        gate_init: logits of the local, the compressed and the selective gate at the start.
        separate_kv: True: each branch has its own key and value projections, as in the paper.
        qk_norm: eps of an RMSNorm of every head of queries and of keys, as in Qwen3, before keys are compressed and
            all are rotated: one learned weight (D,) for queries, one for keys. None: no norm.
        rope_theta: θ, base of the rotary position embedding: from token to token, pair i of a head turns by θ^(−2i/D).
            None: no rotation, unless rope_frequencies are given.
        rope_frequencies: D/2 numbers in place of those powers of θ, for embeddings that scale them, as Llama 3.1 does.
        rope_scale: factor on cosine and sine, as YaRN has it; queries and keys both get it.
        selection_loss: weight of a loss by which compressed keys learn what to choose, which no other gradient tells
            them: 16 random queries of each row compare their blocks' shares of dense attention and of the compressed
            branch. In training, its gradient comes on top of that of any loss, whatever factor that one has
            (accumulation, GradScaler), to the compressors of keys alone; no output changes. 0.1 does it; 0: none;
            "avgpool", which cannot learn, takes no other.
        dropout: probability on the output projection and in the feed-forward, never on attention probabilities.
        bias: True: projections, feed-forward and norms have biases.
        ffn_mult: hidden width of the feed-forward, in units of dim.
        use_flash: True: accelerated kernels where they exist; False: plain PyTorch everywhere, as backend = "torch".
        recompute: True: the backward computes the local branch's output again, in 2 to 6 % of the time, in place of
            keeping it: a tensor as large as the queries.
        backend: "auto", "torch" or "triton", as in `local_attention`. With "torch" no kernel of this file runs in the
            module; with "triton" its attention runs in kernels, or an error says why not. The last three fields may be
            changed at any time, and take effect with the next forward.

    Raises:
        ValueError: a field is out of range or contradicts another; the message names the field, its value, the rule.
        TypeError: a field is of the wrong type.
    """

    dim: int = 512
    heads: int = 8
    dim_head: int | None = None
    kv_heads: int | None = None
    seq_len: int = 2048
    local_window: int = 128
    block_size: int = 32
    stride: int | None = None
    select_block_size: int | None = None
    topk_blocks: int = 4
    init_blocks: int = 0
    local_blocks: int = 1
    compression: str | type[nn.Module] = "grouped_mlp"
    gate_mode: str = "static"
    gate_init: tuple[float, float, float] = (2.0, -2.0, -2.0)
    separate_kv: bool = False
    qk_norm: float | None = None
    rope_theta: float | None = None
    rope_frequencies: tuple[float, ...] | None = None
    rope_scale: float = 1.0
    selection_loss: float = 0.0
    dropout: float = 0.0
    bias: bool = False
    ffn_mult: int = 4
    use_flash: bool = True
    recompute: bool = False
    backend: str = "auto"
    _derived: InitVar[dict[str, int] | None] = None  # what was derived; dataclasses.replace hands it to the copy

    def __post_init__(self, _derived: dict[str, int] | None) -> None:
        for name, value in (_derived or {}).items():
            if getattr(self, name) == value:
                setattr(self, name, None)
        missing = [name for name in _DERIVED_FIELDS if getattr(self, name) is None]
        self._check_integers()
        if self.dim_head is None:
            _check(self.dim % self.heads == 0, "dim", self.dim, f"must be divisible by heads = {self.heads}")
            self.dim_head = self.dim // self.heads
        self.kv_heads = self.heads if self.kv_heads is None else self.kv_heads
        self.stride = self.block_size if self.stride is None else self.stride
        self.select_block_size = self.block_size if self.select_block_size is None else self.select_block_size
        self._derived = {name: getattr(self, name) for name in missing}
        _check(self.heads % self.kv_heads == 0, "heads", self.heads, f"must be divisible by kv_heads = {self.kv_heads}")
        _check_blocks(**self.selection)
        self._check_choices()

    @property
    def selection(self) -> dict[str, int]:
        """The keyword arguments of `select_blocks` that this configuration fixes."""
        names = ("block_size", "stride", "select_block_size", "topk_blocks", "init_blocks", "local_blocks")
        return {name: getattr(self, name) for name in names}

    @property
    def rotates(self) -> bool:
        """Whether queries and keys have a rotary position embedding."""
        return self.rope_theta is not None or self.rope_frequencies is not None

    @property
    def effective_backend(self) -> str:
        """`backend`, which is "torch" without use_flash."""
        backend = self.backend
        if backend not in ("auto", "torch", "triton"):
            _check(False, "backend", backend, _BACKEND_RULE)
        if self.use_flash:
            return backend
        if backend == "triton":
            _check(False, "backend", backend, "contradicts use_flash = False, which is plain PyTorch everywhere")
        return "torch"

    def _check_integers(self) -> None:
        least = {"init_blocks": 0, "local_blocks": 0}
        required = ("dim", "heads", "seq_len", "local_window", "block_size", "topk_blocks", "ffn_mult", *least)
        for name in required + tuple(name for name in _DERIVED_FIELDS if getattr(self, name) is not None):
            _check_integer(name, getattr(self, name), least.get(name, 1))

    def _check_choices(self) -> None:
        instance = isinstance(self.compression, nn.Module)
        _check(not instance, "compression", type(self.compression).__name__ + "(...)", _INSTANCE_RULE, TypeError)
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
        self.gate_init = tuple(self.gate_init)  # JSON makes lists of tuples
        for name in ("separate_kv", "bias", "use_flash", "recompute"):
            value = getattr(self, name)
            _check(isinstance(value, bool), name, value, "must be True or False", TypeError)
        _ = self.effective_backend  # which complains
        _check(_finite(self.dropout) and 0 <= self.dropout < 1, "dropout", self.dropout, "must be in [0, 1)")
        weight = self.selection_loss
        _check(_finite(weight) and weight >= 0, "selection_loss", weight, "must be a finite number of at least 0")
        rule = "must be 0 with compression='avgpool', in which nothing can learn"
        _check(weight == 0 or self.compression != "avgpool", "selection_loss", weight, rule)
        self._check_rope()
        eps = self.qk_norm
        rule = "must be the norm's eps, a finite number above 0 such as 1e-6, or None"
        _check(eps is None or _finite(eps) and eps > 0, "qk_norm", eps, rule)

    def _check_rope(self) -> None:
        theta, frequencies, scale = self.rope_theta, self.rope_frequencies, self.rope_scale
        rule = "must be a finite number above 0, or None"
        _check(theta is None or _finite(theta) and theta > 0, "rope_theta", theta, rule)
        if self.rotates:
            rule = "must be even where rope_theta or rope_frequencies are given"
            _check(self.dim_head % 2 == 0, "dim_head", self.dim_head, rule)
        if frequencies is not None:
            numbers = isinstance(frequencies, tuple | list) and all(_finite(x) and x >= 0 for x in frequencies)
            rule = f"must be dim_head / 2 = {self.dim_head // 2} finite numbers of at least 0, or None"
            _check(numbers and 2 * len(frequencies) == self.dim_head, "rope_frequencies", frequencies, rule)
            _check(theta is None, "rope_theta, rope_frequencies", "both", "give one of them at most")
            self.rope_frequencies = tuple(frequencies)
        _check(_finite(scale) and scale > 0, "rope_scale", scale, "must be a finite number above 0")
        _check(scale == 1 or self.rotates, "rope_scale", scale, "needs rope_theta or rope_frequencies")


def _check(
    holds: bool, argument: str, value: object, rule: str | Callable[[], str], error: type[Exception] = ValueError
) -> None:
    """The one form of every complaint: the argument, what it was, and the rule that it breaks.

    A rule that speaks of shapes or numbers is a function, called on failure only: torch.compile would bind itself to
    their values, and a call that is right would take the time to spell them out.
    """
    if not holds:
        raise error(f"{argument} = {value!r}: {rule() if callable(rule) else rule}")


def _finite(value: object) -> bool:
    # A tuple of types: torch 2.8 does not trace their union.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_integer(name: str, value: object, least: int) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31:
        return
    _check(isinstance(value, int) and not isinstance(value, bool), name, value, "must be an int", TypeError)
    _check(value >= least, name, value, lambda: f"must be at least {least}")
    _check(value < 2**31, name, value, "must be less than 2**31: positions are 32-bit numbers")


def _check_blocks(
    block_size: int, stride: int, select_block_size: int, topk_blocks: int, init_blocks: int, local_blocks: int
) -> None:
    """The rules that tie the block sizes together: those of the paper, §3.3.1 and §3.3.2."""
    _check(stride <= block_size, "stride", stride, lambda: f"must be at most block_size = {block_size}")
    for name, size in (("block_size", block_size), ("select_block_size", select_block_size)):
        _check(size % stride == 0, name, size, lambda: f"must be a multiple of stride = {stride}")
    forced = init_blocks + local_blocks
    if topk_blocks < forced:
        rule = f"must be at least init_blocks + local_blocks = {init_blocks} + {local_blocks} = {forced}"
        _check(False, "topk_blocks", topk_blocks, rule)


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    """Remembers what `function` returns. torch.compile does not look inside, and takes the result for a constant.

    The mark is that of torch.compiler.assume_constant_result, which would load the compiler to set it.
    """
    remembered = functools.cache(function)

    @functools.wraps(function)
    def once(*arguments: Any) -> Any:
        return remembered(*arguments)

    once._dynamo_marked_constant = True
    return once


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 2  The definition: Native Sparse Attention by dense masks. All else in this file computes the same, faster.
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


class AttentionPatterns(NamedTuple):
    """Dense probabilities of each branch, whose rows sum to 1, or to 0 where a query sees nothing."""

    local: Tensor  # (B, H, T, T)
    compressed: Tensor  # (B, H, T, C)
    selective: Tensor  # (B, H, T, T)
    gates: Tensor  # (B, T, H, 3)
    block_indices: Tensor  # (B, T, K, S)


def _dense_attention(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, k_local: Tensor, v_local: Tensor, *,
    local_window: int, block_size: int, stride: int, select_block_size: int, topk_blocks: int, init_blocks: int,
    local_blocks: int, block_indices: Tensor | None = None,
) -> tuple[Tensor, AttentionPatterns]:  # fmt: skip
    """o (B, T, H, D) and all probabilities of `nsa_attention`, with T × T numbers in memory.

    Given block_indices take the place of the choice.
    """
    (_, tokens, _, dim), kv_heads, blocks = q.shape, k.shape[2], _selection_count(q.shape[1], select_block_size)
    t, s = torch.arange(tokens, device=q.device)[:, None], torch.arange(tokens, device=q.device)
    i, j = torch.arange(k_cmp.shape[1], device=q.device), torch.arange(blocks, device=q.device)
    per_head = lambda x: x.repeat_interleave(q.shape[2] // kv_heads, dim=2)  # noqa: E731

    def probabilities(k: Tensor, sees: Tensor) -> Tensor:  # (B, keys, K, D), (..., T, keys) → (B, H, T, keys)
        scores = torch.einsum("bthd,bshd->bhts", q, per_head(k)) / math.sqrt(dim)
        return scores.masked_fill(~sees, -math.inf).softmax(-1).masked_fill(~sees, 0.0)

    local = probabilities(k_local, (s <= t) & (s > t - local_window))  # §3.3.3
    compressed = probabilities(k_cmp, i * stride + block_size - 1 <= t)  # eq. 8
    if block_indices is None:
        first, last = torch.maximum(i * stride, (j * select_block_size)[:, None]), (j + 1) * select_block_size
        overlap = (torch.minimum(i * stride + block_size, last[:, None]) - first).clamp(min=0) / stride  # (N, C)
        importance = torch.einsum("bhti,ji->bhtj", compressed, overlap.to(q.dtype))
        importance = importance.unflatten(1, (kv_heads, -1)).sum(2)  # eq. 9 and 10: (B, K, T, N), one for a group
        own = t // select_block_size
        importance = importance.masked_fill((j < init_blocks) | (j > own - local_blocks), math.inf)
        ranked = importance.masked_fill(j > own, -1.0).sort(dim=-1, descending=True, stable=True).indices
        chosen = ranked[..., :topk_blocks].sort(dim=-1).values  # eq. 11, with the forced blocks of §3.3.2
        chosen = F.pad(chosen.masked_fill(chosen > own, -1), (0, topk_blocks - chosen.shape[-1]), value=-1)
        block_indices = chosen.transpose(1, 2).int()
    in_chosen = (block_indices.transpose(1, 2)[..., None] == s // select_block_size).any(3)  # (B, K, T, T)
    selective = probabilities(k, in_chosen.repeat_interleave(q.shape[2] // kv_heads, dim=1) & (s <= t))  # eq. 12
    o = torch.zeros_like(q)  # eq. 5
    for c, (p, values) in enumerate(((local, v_local), (compressed, v_cmp), (selective, v))):
        o = o + gates[..., c, None] * torch.einsum("bhts,bshd->bthd", p, per_head(values))
    return o, AttentionPatterns(local, compressed, selective, gates, block_indices)


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 3  The model
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

    def forward(
        self,
        x: Tensor,
        *others: object,
        cache: NSACache | None = None,
        cu_seqlens: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        **unknown: object,
    ) -> Tensor:
        """(B, T, dim) → (B, T, dim); arguments and errors are those of `NativeSparseAttention.forward`.

        A cache is one of this block alone, made with `block.attn.cfg`.

        With a key_padding_mask the output is 0 at padding here, too.
        """
        _check_call(self, others, unknown)
        batch = _read_batch(self.attn.cfg, self.norm1, x, cache, cu_seqlens, key_padding_mask)
        x = batch.pack(x)
        # Our own attention need not check again; another forward in its place takes tensors.
        own = type(self.attn).forward is NativeSparseAttention.forward
        given = {"cu_seqlens": batch} if own else {"cache": cache, "cu_seqlens": cu_seqlens}
        if not own and key_padding_mask is not None and (cache is not None or batch.context is not None):
            given["key_padding_mask"] = batch.padding.packed_mask()
        x = x + self.attn(self.norm1(x), **given)
        y = batch.unpack(x + self.ffn(self.norm2(x)))
        if own and cache is not None:
            cache._commit(batch, self.attn)
        return y


class NativeSparseAttention(nn.Module):
    """Multi-head Native Sparse Attention, causal: (B, T, dim) → (B, T, dim). Takes the place of self-attention.

    >>> attention = NativeSparseAttention(NSAConfig(dim=256, heads=4, seq_len=1024))
    >>> attention(torch.randn(2, 300, 256)).shape
    torch.Size([2, 300, 256])
    """

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        _check(isinstance(config, NSAConfig), "config", type(config).__name__, "must be an NSAConfig", TypeError)
        self.cfg = cfg = config
        sets = 3 if cfg.separate_kv else 1  # of keys and values: for the local, compressed and selective branch
        self.to_q = nn.Linear(cfg.dim, cfg.heads * cfg.dim_head, bias=cfg.bias)
        self.to_k = nn.Linear(cfg.dim, sets * cfg.kv_heads * cfg.dim_head, bias=cfg.bias)
        self.to_v = nn.Linear(cfg.dim, sets * cfg.kv_heads * cfg.dim_head, bias=cfg.bias)
        self.to_out = nn.Linear(cfg.heads * cfg.dim_head, cfg.dim, bias=cfg.bias)
        self.norm_q, self.norm_k = (
            None if cfg.qk_norm is None else nn.RMSNorm(cfg.dim_head, eps=cfg.qk_norm) for _ in range(2)
        )
        self.dropout = nn.Dropout(cfg.dropout)
        self.compress_k = TokenCompressor(cfg.dim_head, cfg.block_size, cfg.stride, cfg.compression)
        self.compress_v = TokenCompressor(cfg.dim_head, cfg.block_size, cfg.stride, cfg.compression)
        for compressor in (self.compress_k.method, self.compress_v.method):
            if isinstance(compressor, _LearnedCompressor):
                compressor.config = cfg
        # Plain parameters, so that a model's own `apply(init_weights)` leaves gate_init in place.
        self.gate_bias = nn.Parameter(torch.empty(cfg.heads, 3))
        self.gate_weight = nn.Parameter(torch.empty(cfg.heads * 3, cfg.dim)) if cfg.gate_mode == "q_cond" else None
        self._frequencies: Tensor | None = None  # no buffer, which `.to(dtype)` would round
        self._rotation(self.gate_bias.device)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.gate_bias.copy_(self.gate_bias.new_tensor(self.cfg.gate_init).expand(self.cfg.heads, 3))
        if self.gate_weight is not None:
            nn.init.zeros_(self.gate_weight)

    def forward(
        self,
        x: Tensor,
        *others: object,
        cache: NSACache | None = None,
        cu_seqlens: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        **unknown: object,
    ) -> Tensor:
        """(B, T, dim) → (B, T, dim).

        >>> attention = NativeSparseAttention(NSAConfig(dim=64, heads=2, seq_len=128))
        >>> x, mask = torch.randn(2, 70, 64), torch.arange(70) >= torch.tensor([[0], [30]])  # 30 places of left padding
        >>> y = attention(x, key_padding_mask=mask)
        >>> bool((y[1, :30] == 0).all()), torch.allclose(y[1, 30:], attention(x[1:, 30:])[0], atol=1e-5)
        (True, True)

        Args:
            x: (B, T, dim), T at most seq_len, of the weights' dtype and device.
            cache: x holds the next tokens of its rows, which it appends to the cache. The output is that of one forward
                over all tokens of each row. Where gradients are enabled, nothing may require one. What fails leaves the
                cache as it was.
            cu_seqlens: int32 or int64 (n + 1,), x is (1, total, dim): the tokens of n sequences one after another, as
                in `local_attention`, each at most seq_len. The output is that of each sequence alone; with a cache,
                sequence i goes on from row i.
            key_padding_mask: bool (B, T), True for a token, in any pattern. The output is that of each row's tokens by
                themselves, positions counted among them; elsewhere it is 0, and x has no gradient. With a cache, rows
                append as many tokens as they have.

        Raises:
            ValueError, TypeError: an argument breaks one of these rules, or the cache is full or of another module,
                configuration, batch, dtype or device.
        """
        if isinstance(cu_seqlens, _Batch):  # an NSABlock has checked all, and will make the rows of the cache longer
            return self._attend(x, cu_seqlens)
        _check_call(self, others, unknown)
        batch = _read_batch(self.cfg, self.to_q, x, cache, cu_seqlens, key_padding_mask)
        y = batch.unpack(self._attend(batch.pack(x), batch))
        if cache is not None:
            cache._commit(batch, self)
        return y

    def _attend(self, x: Tensor, batch: _Batch) -> Tensor:
        """One flow for whole rows, for packed sequences, and for either going on from a cache."""
        cfg, cache, segments = self.cfg, batch.cache, batch.segments
        if cache is not None and not cache._is_new():
            o = self._attend_past(x, batch)
        else:
            p = self._project(x, batch)
            k_cmp, v_cmp = self._compress(p, segments)
            if cache is not None:
                cache._check_owner(self, p.k)
                cache._append(p, segments)
                cache._fill_blocks(k_cmp, v_cmp, segments)
            own_keys = (p.k_local, p.v_local) if cfg.separate_kv else (None, None)
            tensors = _autocast(p.q, p.k, p.v, k_cmp, v_cmp, p.gates, *own_keys)
            settings = {**self._settings, "scale": cfg.dim_head**-0.5, "segments": segments}
            o = self._attend_shard(batch, *tensors, **settings)
            if cfg.selection_loss > 0 and self.training and torch.is_grad_enabled():
                o = _AddLoss.apply(o, cfg.selection_loss * self._selection_loss(p, batch))
        return self.dropout(self.to_out(o.flatten(2)))  # (B, T, H, D) → (B, T, H·D) → (B, T, dim)

    def _attend_shard(
        self, batch: _Batch, q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor,
        k_local: Tensor | None, v_local: Tensor | None, **settings: Any,
    ) -> Tensor:  # fmt: skip
        """Attention of this rank's queries over the keys of all ranks, each part over those up to its end."""
        if batch.context is None:
            return _attention(q, k, v, k_cmp, v_cmp, gates, k_local, v_local, **settings)
        until, outputs = lambda end, *keys: [None if x is None else x[:, :end] for x in keys], []  # noqa: E731
        choice, segments, backend = settings["choice"], settings.pop("segments"), settings["backend"]
        for part, first in batch.context._places(q.shape[1]):
            end, blocks = first + part.stop - part.start, k_cmp.shape[1]
            if segments.cu_seqlens is None:
                blocks = _compressed_count(end, choice.block_size, choice.stride)
            tensors = (*until(end, k, v), *until(blocks, k_cmp, v_cmp), gates[:, part], *until(end, k_local, v_local))
            tables = segments.last(backend, first, end, blocks, _Span(0, choice.block_size, choice.stride))
            at = {"segments": tables, "first": first, "row_first": batch.row_first(first)}
            outputs.append(_attention(q[:, part], *tensors, **settings, **at))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _selection_loss(self, p: _Projections, batch: _Batch) -> Tensor:
        """Cross-entropy of the compressed branch's shares of blocks, with dense attention's as the truth.

        The shares are those of compressed blocks that random queries may choose, neither forced nor later, means over
        the heads of a group. Only the compressors of keys have gradients. 16·H·T numbers a row are in memory at a time.
        """
        cfg, segments, T, device = self.cfg, batch.segments, p.q.shape[1], p.q.device
        rule = "must be 0 under context_parallel: it needs the keys and the queries of the whole sequence"
        _check(batch.context is None, "selection_loss", cfg.selection_loss, rule)
        k_cmp, _ = self._compress(p._replace(k_raw=p.k_raw.detach(), v_raw=p.v_raw.detach()), segments)
        t, token = torch.randint(T, (16, 1), device=device), torch.arange(T, device=device)
        block = torch.arange(k_cmp.shape[1], device=device)
        first, position = block * cfg.stride, t  # first token of each block, and positions of the queries
        if segments.of_token is not None:
            first, position = segments.of_key[0], segments.of_token[1][t]
            first = first.where(block < segments.cu_keys[-1], T)  # rows of no block lie behind all queries
        start, size, last = t - position, cfg.select_block_size, first + cfg.block_size - 1

        def shares(keys: Tensor, seen: Tensor) -> Tensor:  # (B, Q, K, tokens or blocks)
            q = torch.unflatten(p.q.detach()[:, t[:, 0]], 2, (cfg.kv_heads, -1))  # (B, Q, K, G, D)
            scores = torch.einsum("bqkgd,bskd->bqkgs", q, keys.to(q.dtype)).to(_accumulation_dtype(q))
            hidden = ~seen[:, None, None]  # a finite score: a query may see none
            return (scores * cfg.dim_head**-0.5).masked_fill(hidden, -1e30).softmax(-1).mean(3)

        with torch.no_grad():
            dense = shares(p.k, (token >= start) & (token <= t))
            truth = dense[..., (first[:, None] + torch.arange(cfg.block_size, device=device)).clamp(max=T - 1)].sum(-1)
        guess = shares(k_cmp, (first >= start) & (last <= t))
        forced = [_is_forced((token - start) // size, position // size, cfg) for token in (first, last)]
        free = ~(forced[0] | forced[1]) & (last <= t)
        truth, guess = (y * free[:, None] for y in (truth, guess))
        truth, guess = (y / y.sum(-1, keepdim=True).clamp(min=1e-9) for y in (truth, guess))
        taught = free.any(-1)[None, :, None].expand(truth.shape[:3])
        if batch.padding is not None:
            taught = taught & (position[:, 0] < batch.counts[:, None])[..., None]
        loss = -(truth * (guess + 1e-6).log()).sum(-1).where(taught, 0.0)
        return loss.sum() / taught.sum().clamp(min=1)

    def _attend_past(self, x: Tensor, batch: _Batch) -> Tensor:
        """Attention of the next tokens over a cache, which takes their keys first: (B, T, H, D)."""
        cfg, cache, settings, of_token = self.cfg, batch.cache, self._settings, batch.segments.of_token
        backend = settings["backend"]
        layers = self._plain_projections(x, backend) if x.shape[0] * x.shape[1] <= _FEW else None
        if layers is None:
            q, k, v, logits = self.to_q(x), self.to_k(x), self.to_v(x), self._gate_logits(x)
        else:
            q, k, v, logits = _project_few(x, *layers, backend)
            logits = self._gate_logits(x) if self.gate_weight is None else torch.unflatten(logits, -1, (cfg.heads, 3))
        q, k, v = (torch.unflatten(y, -1, (-1, cfg.dim_head)) for y in (q, k, v))
        q, k = self._normed(q, k)
        cache._check_owner(self, k)
        if q.numel() == 0:
            return q
        choice, scale = settings["choice"], cfg.dim_head**-0.5
        on = _choose_backend(backend, q, k, scale, choice, decoding=True)
        few = on != "torch" and of_token is None and x.shape[1] <= _FEW
        weights = self._compressor_weights(k) if few else None
        sizes = (0, 1, [None] * 10) if weights is None else (cfg.block_size, cfg.stride, weights)
        rotation = self._rotation(x.device)
        rotated = _cache_extend(q, k, v, cache.tokens, cache.blocks, cache.seqlens, of_token, on, *rotation, *sizes)
        if weights is None:
            self._finish_blocks(cache, batch, x.shape[1])
        others = (cache.tokens, cache.blocks, logits, cache.seqlens, of_token, on)
        return _cached_forward(rotated if cfg.rotates else q, *others, settings["local_window"], *choice, scale)

    def _plain_projections(self, x: Tensor, backend: str) -> list[Tensor | None] | None:
        """Weights and biases of q, k, v and gates, where calling the layers would do nothing but multiply by them."""
        if _autocast_enabled(x.device.type) or x.dtype == torch.float64:
            return None
        if _device_backend(backend, x.device, x.dtype, self.cfg.dim_head) == "torch":
            return None
        tensors = []
        for layer in (self.to_q, self.to_k, self.to_v):
            if type(layer) is not nn.Linear or not _untouched(layer):
                return None
            tensors += [layer.weight, layer.bias]
        if self.gate_weight is not None:
            tensors += [self.gate_weight, self.gate_bias]
        given = [y for y in tensors if y is not None]
        if any(type(y) is not nn.Parameter or y.dtype != x.dtype or not y.is_contiguous() for y in given):
            return None
        return [*tensors, *[None] * (8 - len(tensors))]

    def _compressor_weights(self, k: Tensor) -> list[Tensor | None] | None:
        """Parameters for the kernel that finishes blocks; None where it cannot do what the compressors would."""
        weights: list[Tensor | None] = []
        for compressor in (self.compress_k, self.compress_v):
            if type(compressor) is not TokenCompressor or not _untouched(compressor, compressor.method):
                return None
            method = compressor.method
            if type(method) not in _COMPRESSOR_CLASSES.values():
                return None
            of = [getattr(method, name) for name in method.weights]
            fits = not of or _BACKENDS["triton"].extends(k, len(of[2]))
            if not fits or any(x.dtype != k.dtype or not x.is_contiguous() for x in of):
                return None
            weights += of + [None] * (5 - len(of))
        return weights

    @torch.no_grad()
    def attention_patterns(self, x: Tensor) -> AttentionPatterns:
        """Dense probabilities of every branch, for study and plots: T × T in memory. Same x as for forward.

        >>> attention = NativeSparseAttention(NSAConfig(dim=64, heads=2, seq_len=128))
        >>> attention.attention_patterns(torch.randn(1, 70, 64)).compressed.shape
        torch.Size([1, 2, 70, 2])
        """
        batch = _read_batch(self.cfg, self.to_q, x)
        _check(batch.context is None, "context_parallel", "a context", "attention_patterns needs the whole sequence")
        p = self._project(x, batch)
        k_cmp, v_cmp = self._compress(p, _Segments())
        cfg, backend = self.cfg, self._settings["backend"]
        lse = compressed_attention(p.q, k_cmp, v_cmp, cfg.block_size, cfg.stride, backend=backend)[1]
        chosen = select_blocks(p.q, k_cmp, lse, **cfg.selection, backend=backend)
        tensors = (p.q, p.k, p.v, k_cmp, v_cmp, p.gates, p.k_local, p.v_local)
        wide = (y.to(_accumulation_dtype(y)) for y in tensors)
        return _dense_attention(*wide, local_window=cfg.local_window, **cfg.selection, block_indices=chosen)[1]

    @property
    def _settings(self) -> dict[str, Any]:
        """Window, choice, backend and recompute of a forward. There are no more slots than blocks to fill them."""
        cfg = self.cfg
        most = max(_selection_count(cfg.seq_len, cfg.select_block_size), cfg.init_blocks + cfg.local_blocks)
        choice = _Choice(**cfg.selection | {"topk_blocks": min(cfg.topk_blocks, most)})
        others = {"backend": cfg.effective_backend, "recompute": cfg.recompute}
        return {"local_window": cfg.local_window, "choice": choice, **others}

    def _project(self, x: Tensor, batch: _Batch) -> _Projections:
        cfg = self.cfg
        # torch.unflatten: torch.compile cannot trace the tensor's method under torch.set_default_device.
        heads = (torch.unflatten(layer(x), -1, (-1, cfg.dim_head)) for layer in (self.to_q, self.to_k, self.to_v))
        queries, keys, values = heads  # (B, T, H, D), (B, T, sets·K, D)
        queries, keys = self._normed(queries, keys)
        # Of all ranks, where each has its own tokens: the keys, their values and their positions.
        shared = batch.gather(keys, values)
        rope = _rope(batch.positions(shared[0]), self._rotation(x.device), queries) if cfg.rotates else None
        rotated = lambda y: y if rope is None else _apply_rope(y, rope)  # noqa: E731
        # 1 or 3 of (B, T, K, D): local, compressed, selective. To split off a single one would copy its gradient.
        keys, values = (y.split(cfg.kv_heads, 2) if cfg.separate_kv else (y,) for y in shared)
        k_local = rotated(keys[0])
        if rope is not None:
            queries = _apply_rope(queries, batch.rope_of_queries(rope))
        return _Projections(
            q=queries,
            k=rotated(keys[-1]) if cfg.separate_kv else k_local,
            v=values[-1],
            k_local=k_local,
            v_local=values[0],
            k_raw=keys[len(keys) // 2],
            v_raw=values[len(values) // 2],
            gates=self._gates(x),
            rope=rope,
        )

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (..., D) by their norms, if there are any."""
        if self.norm_q is None:
            return q, k
        # Under autocast, too, a norm computes in its weight's dtype.
        pairs = ((self.norm_q, q), (self.norm_k, k))
        q, k = (norm(y.to(norm.weight.dtype)).to(y.dtype) for norm, y in pairs)
        return q, k

    def _rotation(self, device: torch.device) -> _Rotation:
        """Rotation of queries and keys; frequencies are copied to a device once, in the first call there."""
        cfg = self.cfg
        moved = self._frequencies is None or self._frequencies.device != device
        if cfg.rope_frequencies is not None and moved:
            with torch.inference_mode(False):
                self._frequencies = torch.tensor(cfg.rope_frequencies, dtype=torch.float64, device=device)
        return _Rotation(cfg.rope_theta, cfg.rope_scale, self._frequencies)

    def _compress(self, p: _Projections, segments: _Segments) -> tuple[Tensor, Tensor]:
        """Compressed keys and values of all blocks, (B, C, K, D), or (1, total // d, K, D) of packed sequences."""
        k_cmp, v_cmp = self._compress_rows(p.k_raw, p.v_raw, segments)
        if p.rope is not None:  # keys turn as the first token of their block does
            if segments.of_key is None:
                rope = p.rope[..., :: self.cfg.stride, :, :][..., : k_cmp.shape[1], :, :]
            else:
                rope = p.rope.index_select(-3, segments.of_key[0])
            k_cmp = _apply_rope(k_cmp, rope)
        return k_cmp, v_cmp

    def _rotate_blocks(self, k_cmp: Tensor, position: Tensor) -> Tensor:
        """Compressed keys (B, n, K, D) of blocks that begin at these n positions, turned as their first token is."""
        return _apply_rope(k_cmp, _rope(position, self._rotation(k_cmp.device), k_cmp))

    def _compress_rows(self, k: Tensor, v: Tensor, segments: _Segments | None = None) -> tuple[Tensor, Tensor]:
        """(B, T, K, D) → (B, C, K, D), before rotation."""
        compress_k, compress_v, of_key = self.compress_k, self.compress_v, None if segments is None else segments.of_key
        if type(compress_k) is type(compress_v) is TokenCompressor and (of_key is None or of_key.shape[1] > 0):
            of_k, of_v = compress_k._of_kernels(k), compress_v._of_kernels(v)
            if of_k is not None and of_v is not None and _untouched(compress_k, of_k, compress_v, of_v):
                shapes = [[getattr(c, name).shape for name in c.weights] for c in (of_k, of_v)]
                if type(of_k) is type(of_v) and of_k.stride == of_v.stride and shapes[0] == shapes[1]:
                    return _compress_heads((of_k, k), (of_v, v), segments=segments)  # share their launches
        if of_key is None:
            return compress_k(k, heads=True), compress_v(v, heads=True)
        tokens = of_key[0][:, None] + torch.arange(self.cfg.block_size, device=k.device)
        tokens = tokens.clamp(max=k.shape[1] - 1)  # of rows that no block needs
        return self._compress_blocks(k[0, tokens], v[0, tokens])

    def _compress_blocks(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Single blocks (n, l, K, D) → (1, n, K, D), before rotation."""
        k_cmp, v_cmp = self._compress_rows(k, v)
        return k_cmp.transpose(0, 1), v_cmp.transpose(0, 1)

    def _finish_blocks(self, cache: NSACache, batch: _Batch, tokens: int) -> None:
        """Compresses the blocks that the new tokens of each row complete, from the tokens in the cache."""
        cfg, B, length = self.cfg, cache.batch, cache._equal_length()
        if length is not None and type(batch.counts) is int:  # the same in all rows, one after another
            old, new = (_compressed_count(n, cfg.block_size, cfg.stride) for n in (length, length + tokens))
            if new > old:
                theirs = slice(old * cfg.stride, (new - 1) * cfg.stride + cfg.block_size)
                k_cmp, v_cmp = self._compress_rows(cache.k_raw[:, theirs], cache.v_raw[:, theirs])
                if cfg.rotates:
                    k_cmp = self._rotate_blocks(k_cmp, torch.arange(old, new, device=k_cmp.device) * cfg.stride)
                cache._fill_blocks(k_cmp, v_cmp, batch.segments, old)
            return
        packed = batch.segments.of_token is not None  # shapes bound the number of blocks
        most = tokens // cfg.stride + B if packed else B * _selection_count(tokens, cfg.stride)
        row, number, token = _finished_blocks(cache.seqlens, batch.counts, most, cfg.block_size, cfg.stride)
        k, v = (_tokens_of(x, row, token) for x in (cache.k_raw, cache.v_raw))  # (n, l, K, D)
        k_cmp, v_cmp = self._compress_blocks(k, v)
        if cfg.rotates:
            k_cmp = self._rotate_blocks(k_cmp, number * cfg.stride)
        _store_blocks(cache.blocks, row, number, k_cmp, v_cmp)

    def _gates(self, x: Tensor) -> Tensor:
        """(B, T, H, 3): a sigmoid for each token, head and branch."""
        if self.gate_weight is None:
            return self.gate_bias.sigmoid().to(x.dtype).expand(*x.shape[:2], -1, -1)
        return self._gate_logits(x).sigmoid()

    def _gate_logits(self, x: Tensor) -> Tensor:
        """(B, T, H, 3), before the sigmoid; static ones without a copy for each token."""
        if self.gate_weight is None:
            return self.gate_bias.expand(*x.shape[:2], -1, -1)
        return torch.unflatten(F.linear(x, self.gate_weight, self.gate_bias.flatten()), -1, (self.cfg.heads, 3))


def _untouched(*modules: nn.Module) -> bool:
    """Whether a call of each of these modules does what its class says and nothing else."""
    for m in modules:
        hooks = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        if hooks or "forward" in m.__dict__:
            return False
    return True


class _Projections(NamedTuple):
    """Tensors that the branches and the compressors read, made of an input x; under context_parallel, keys of all."""

    q: Tensor  # (B, T, H, D); queries and keys are rotated by their positions already
    k: Tensor  # (B, T, K, D)
    v: Tensor
    k_local: Tensor
    v_local: Tensor
    k_raw: Tensor  # for the compressors: not rotated
    v_raw: Tensor
    gates: Tensor  # (B, T, H, 3)
    rope: Tensor | None  # cos and sin of the keys


class _Rotation(NamedTuple):
    """Rotary position embedding: angles of a position are powers of theta, or the frequencies that are given."""

    theta: float | None = None
    scale: float = 1.0  # of cosine and sine
    frequencies: Tensor | None = None  # float64 (D/2,); with neither there is no rotation


def _rope(positions: Tensor, rotation: _Rotation, like: Tensor) -> Tensor:
    """cos and sin for heads like those given, (..., D): positions (T,) or (B, T) → (2, [B,] T, 1, D/2)."""
    cos_sin = _rope_operator if torch.compiler.is_compiling() else _rope_cos_sin
    return cos_sin(positions, like.shape[-1] // 2, *rotation, like.dtype).unsqueeze(-2)


def _apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotary position embedding of x (B, T, H, D): dimensions i and i + D/2 turn as a pair."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class _Compressor(nn.Module):
    """Base of the three variants: (b, T, dim) → (b, C, dim), the heads folded into b.

    Weights are plain parameters rather than nn.Linear or nn.Conv1d: the start near the mean of the block, from which
    the ranking of blocks is useful at once, then survives a model's own `model.apply(init_weights)`.
    """

    weights: tuple[str, ...] = ()  # names of the parameters, in the order in which kernels take them

    def __init__(self, dim: int, block: int, stride: int | None = None) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("block", block), ("stride", block if stride is None else stride)):
            _check_integer(name, value, 1)
        self.dim, self.block, self.stride = dim, block, block if stride is None else stride

    def _blocks(self, x: Tensor) -> Tensor:
        """(b, T, dim) → (b, C, l, dim), a view."""
        if x.shape[1] < self.block:
            return x.new_empty(x.shape[0], 0, self.block, self.dim)
        if self.stride == self.block:  # a gradient that is a view, too, where that of unfold is a sum
            return torch.unflatten(x[:, : x.shape[1] // self.block * self.block], 1, (-1, self.block))
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
    """Adds the learned position embedding inside the block, of shape (l, dim), and applies one or two linear layers.

    `_layers` returns the position, w_in, b_in, w_out and b_out; None for those of a second layer that there is not.
    """

    config: NSAConfig | None = None  # of the attention that it is a part of, which chooses the backend

    def __init__(self, dim: int, block: int, stride: int | None = None) -> None:
        super().__init__(dim, block, stride)
        self.position = nn.Parameter(torch.empty(block, dim))

    def reset_parameters(self) -> None:
        nn.init.normal_(self.position, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """y = w_in·(flattened block + position) + b_in of each block; with a second layer, w_out·GELU(y) + b_out."""
        if x.ndim == 4:
            return _compress_heads((self, x))[0]
        if self.has_kernels(x):
            return _compress_heads((self, x.unsqueeze(2)))[0].squeeze(2)
        _, w_in, b_in, w_out, b_out = self._layers()
        y = self._linear(x, w_in, b_in)
        return y if w_out is None else F.linear(F.gelu(y), w_out, b_out)

    def has_kernels(self, x: Tensor) -> bool:
        """Whether kernels serve x, (b, T, dim) or with heads (B, T, K, dim), which the forward then takes as it stands.

        Transforms of torch.func and dispatch modes look at plain operations.
        """
        kernels = _BACKENDS.get("triton")
        if kernels is None or _transformed() or type(x) is not Tensor:
            return False
        backend = self._backend()
        whole = backend != "torch" and x.numel() > 0 and x.shape[1] >= self.block
        return whole and kernels.compresses(x, self.position, backend)

    def _backend(self) -> str:
        return "auto" if self.config is None else self.config.effective_backend

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """weight·(flattened block + position) + bias of each block: (b, T, dim) and (out, l·dim) → (b, C, out).

        A block is l/d pieces of d tokens. Each part of the weight meets the pieces of the whole sequence, which do not
        overlap, so that no token is copied for each block that it is in. The position is the same in all blocks, and so
        becomes a part of the bias.
        """
        pieces, parts = x.shape[1] // self.stride, self.block // self.stride
        x = x[:, : pieces * self.stride].reshape(x.shape[0], pieces, self.stride * self.dim)
        # Each part by itself: of split columns Inductor makes a gradient of NaN (CPU, torch 2.13, bfloat16).
        each = torch.unflatten(weight, 1, (parts, -1)).transpose(0, 1).contiguous()  # (l/d, out, d·dim)
        y = F.linear(x, each[0], F.linear(self.position.flatten(), weight, bias))
        y = y[:, : pieces - parts + 1]  # block i starts with piece i
        for i in range(1, parts):
            y = y + F.linear(x, each[i])[:, i : i + y.shape[1]]
        return y


class GroupedMLPCompressor(_LearnedCompressor):
    """Position embedding, then an MLP over the whole block: (l·dim) → Linear → GELU (2·dim) → Linear → dim.

    It starts as the mean, exactly: half of the hidden units hold the mean m, the other half −m, and
    GELU(m) − GELU(−m) = m.

    >>> GroupedMLPCompressor(64, block=32, stride=16)(torch.randn(2, 100, 64)).shape
    torch.Size([2, 5, 64])
    """

    weights = ("position", "w_in", "b_in", "w_out", "b_out")

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

    def _layers(self) -> tuple[Tensor | None, ...]:
        return self.position, self.w_in, self.b_in, self.w_out, self.b_out


class Conv1dCompressor(_LearnedCompressor):
    """Position embedding, then a convolution over the tokens, of kernel l and stride d; it starts as the mean.

    >>> Conv1dCompressor(64, block=32, stride=16)(torch.randn(2, 100, 64)).shape
    torch.Size([2, 5, 64])
    """

    weights = ("position", "weight", "bias")

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

    def _layers(self) -> tuple[Tensor | None, ...]:
        # The embedding belongs to places in the block, not in the sequence, so that overlapping blocks disagree on it:
        # the convolution is the product of each block with the kernel, (l·dim) × (dim, l·dim).
        return self.position, self.weight.transpose(1, 2).flatten(1), self.bias, None, None


def _compress_heads(
    *pairs: tuple[_LearnedCompressor, Tensor], segments: _Segments | None = None
) -> tuple[Tensor, ...]:
    """Heads (B, T, K, dim) through the compressor beside them, by kernels: (B, C, K, dim) of each.

    Two pairs must be alike in all but their numbers.
    """
    inputs, weights, missing = [], [], [None] * (2 - len(pairs))
    for compressor, x in pairs:
        x, *layers = _autocast(x, *compressor._layers())
        inputs.append(x)
        weights += [w if w is None else w.contiguous() for w in layers]
    tensors = _apart(*inputs, *missing, *weights, *missing * 5)
    tables = (None, None, None) if segments is None else segments.block_tables()
    first = pairs[0][0]
    return _apply(_CompressionFunction, (first._backend(), first.stride), *tables, *tensors)


_COMPRESSOR_CLASSES = {"grouped_mlp": GroupedMLPCompressor, "conv1d": Conv1dCompressor, "avgpool": AvgPoolCompressor}


def _accepts(function: Callable[..., object], *arguments: object) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except (TypeError, ValueError):
        return False
    return True


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
        instance = isinstance(method, nn.Module)
        _check(not instance, "method", type(method).__name__ + "(...)", _INSTANCE_RULE, TypeError)
        _check(callable(method), "method", method, _COMPRESSION_RULE, TypeError)
        takes_stride = _accepts(method, dim, block, stride)
        rule = f"takes no stride, so that stride = {stride} must be block_size = {block}"
        _check(takes_stride or stride == block, "compression", method, rule)
        self.method = method(dim, block, stride) if takes_stride else method(dim, block)
        _check(isinstance(self.method, nn.Module), "compression", method, "must build a torch.nn.Module", TypeError)

    def _of_kernels(self, x: Tensor) -> _LearnedCompressor | None:
        """The method, if it takes x as it stands, heads too; a class of the user's own may not know them."""
        method = self.method
        known = type(method) in (GroupedMLPCompressor, Conv1dCompressor)
        return method if known and method.has_kernels(x) else None

    def forward(self, x: Tensor, *, heads: bool = False) -> Tensor:
        """(b, T, dim) → (b, C, dim); with heads, (B, T, K, dim) → (B, C, K, dim)."""
        _check_tensor("x", x, 4 if heads else 3, "(B, T, K, dim)" if heads else "(b, T, dim)")
        _check(x.shape[-1] == self.dim, "x.shape", tuple(x.shape), f"must have dim = {self.dim} as its last dimension")
        count = _compressed_count(x.shape[1], self.block, self.stride)
        expected, method = (x.shape[0], count, *x.shape[2:]), self.method
        if 0 in expected:  # the parameters take part all the same: DDP waits for all gradients
            none = [parameter.flatten()[:0].sum().to(x.dtype) for parameter in method.parameters()]
            return sum(none, x.new_empty(expected))
        if self._of_kernels(x) is not None:
            return method(x)
        if heads:
            y = self.forward(rearrange(x, "b t k d -> (b k) t d"))
            return rearrange(y, "(b k) c d -> b c k d", k=x.shape[2])
        out, name = method(x[:, : (count - 1) * self.stride + self.block]), type(method).__name__
        _check(isinstance(out, Tensor), f"output of {name}", type(out).__name__, "must be a tensor", TypeError)
        _check(tuple(out.shape) == expected, f"output of {name}", tuple(out.shape), f"must have shape {expected}")
        return out


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 4  Functions: the functional API. The only place that chooses a backend.
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


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
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    recompute: bool = False,
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
        k_cmp, v_cmp: compressed keys and values, as in `compressed_attention`.
        gates: (B, T, H, 3), through the sigmoid already, in (local, compressed, selective) order. Gates below 0 take
            twice the time on a CPU; on a GPU and in compiled code, where nobody looks, they make the output NaN.
        local_window, block_size, stride, select_block_size, topk_blocks, init_blocks, local_blocks: as in
            `local_attention`, `compressed_attention` and `select_blocks`.
        k_local, v_local: keys and values of the local branch alone, where it has its own; both or neither.
        cu_seqlens, scale, backend, and the errors raised: as in `local_attention`.
        recompute: True: the backward computes the local branch's output again, in place of keeping it.

    Returns:
        (B, T, H, D) in q's dtype.
    """
    _check((k_local is None) == (v_local is None), "k_local, v_local", "one of them", "give both or neither")
    q, k, v, k_cmp, v_cmp, gates, k_local, v_local = _autocast(q, k, v, k_cmp, v_cmp, gates, k_local, v_local)
    if k_local is k and v_local is v:
        k_local = v_local = None
    local = {} if k_local is None else {"k_local": k_local, "v_local": v_local}
    scale = _check_query(q, scale)
    _check_keys(q, "(B, T, K, D)", _as_many, k=k, v=v, **local)
    _check_packed(cu_seqlens, *q.shape[:2], q.device)
    _check_compressed(q, block_size, stride, cu_seqlens, k_cmp=k_cmp, v_cmp=v_cmp)
    _check(k_cmp.shape[2] == k.shape[2], "k_cmp.shape", tuple(k_cmp.shape), lambda: f"must have k's {k.shape[2]} heads")
    _check_shape("gates", gates, "(B, T, H, 3)", (*q.shape[:3], 3))
    _check_like("gates", gates, q)
    _check_integer("local_window", local_window, 1)
    choice = _Choice(block_size, stride, select_block_size, topk_blocks, init_blocks, local_blocks)
    _check_choice(choice)
    segments = _packed_tables(backend, cu_seqlens, q.shape[1], k_cmp.shape[1], choice.span)
    _check(isinstance(recompute, bool), "recompute", recompute, "must be True or False", TypeError)
    settings = {"local_window": local_window, "choice": choice, "segments": segments, "scale": scale}
    settings |= {"backend": backend, "recompute": recompute}
    gated = lambda gates: _attention(q, k, v, k_cmp, v_cmp, gates, k_local, v_local, **settings)  # noqa: E731
    if _readable(gates) and bool((gates < 0).any()):  # the backward has their logarithm: one sign at a time
        return gated(gates.masked_fill(gates < 0, 0.0)) - gated((-gates).masked_fill(gates >= 0, 0.0))
    return gated(gates)


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sliding-window causal attention (§3.3.3): the query at t attends to the keys at t − W < s ≤ t, itself included.

    W = 3:            keys →              packed, cu_seqlens = [0, 3, 5]:    ■ · · | · ·
            queries   ■ · · · ·                                              ■ ■ · | · ·
               ↓      ■ ■ · · ·           two sequences, of 3 and of         ■ ■ ■ | · ·
                      ■ ■ ■ · ·           2 tokens; each is as causal        ——————|————
                      · ■ ■ ■ ·           as it is alone, and blind          · · · | ■ ·
                      · · ■ ■ ■           to the other                       · · · | ■ ■

    >>> q, k = torch.randn(1, 100, 8, 64), torch.randn(1, 100, 2, 64)  # 4 query heads share a key head
    >>> local_attention(q, k, torch.randn_like(k), window=32).shape
    torch.Size([1, 100, 8, 64])

    Args:
        q: queries (B, T, H, D), of any floating point type.
        k, v: keys and values (B, T, K, D), K a divisor of H; query head h uses key head h // (H/K).
        window: W ≥ 1, in tokens.
        cu_seqlens: None, or int32 or int64 (n + 1,) on q's device for n packed sequences, flash-attn's convention: B is
            1, and sequence i is the tokens [cu_seqlens[i], cu_seqlens[i + 1]), none where the two are equal. The result
            is that of each sequence alone. On a CPU its values are checked; on a GPU the host does not read them, and
            what is not ascending from 0 to T is clamped.
        scale: factor on q·k; None is 1/sqrt(D).
        backend: "auto": Triton kernels for float16, bfloat16 and float32 on NVIDIA GPUs from sm_80 on and AMD's MI300;
            PyTorch elsewhere, with flash-attn for this branch where it is installed. Where a kernel cannot be built or
            launched, it warns once, and PyTorch serves that device, dtype and head dim from then on: `which_backend`.
            "torch"; or "triton", which raises an error, with the reason, where it cannot run.

    Returns:
        (B, T, H, D) in q's dtype; sums are accumulated in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: an argument breaks one of these rules; the message names it, its value and the rule.
        RuntimeError: backend is "triton", and a kernel cannot be built or launched; Triton's own error is its cause.
    """
    q, k, v = _autocast(q, k, v)
    scale = _check_query(q, scale)
    _check_keys(q, "(B, T, K, D)", _as_many, k=k, v=v)
    _check_integer("window", window, 1)
    _check_packed(cu_seqlens, *q.shape[:2], q.device)
    on = _choose_backend(backend, q, k, scale)
    segments = _packed_tables(backend, cu_seqlens, q.shape[1], q.shape[1], _Span(window))
    flash = _flash_attention(q, backend, on, segments)
    if flash is not None:
        return flash(q, k, v, softmax_scale=scale, causal=True, window_size=(window - 1, 0))
    return _branch(on, _Span(window), scale, segments, q, k, v)[0]


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    block_size: int,
    stride: int,
    *,
    cu_seqlens: Tensor | None = None,
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
        k_cmp, v_cmp: compressed keys and values (B, C, K, D), C = (T − l)//d + 1, or 0 where T < l. Of packed
            sequences, (1, C₁ + … + Cₙ, K, D): the blocks of each, one sequence after another; there may be more rows,
            up to T//d, which always suffice; they are not read, and their gradient is 0.
        block_size, stride: l and d, in tokens; l is a multiple of d.
        cu_seqlens, scale, backend, and the errors raised: as in `local_attention`.

    Returns:
        o (B, T, H, D) in q's dtype, exactly 0 where a query sees no block, and the log-sum-exp of the scaled scores,
        (B, T, H) in float32 (float64 for float64), −inf there. Both are differentiable.
    """
    q, k_cmp, v_cmp = _autocast(q, k_cmp, v_cmp)
    scale = _check_query(q, scale)
    _check_packed(cu_seqlens, *q.shape[:2], q.device)
    _check_compressed(q, block_size, stride, cu_seqlens, k_cmp=k_cmp, v_cmp=v_cmp)
    on, span = _choose_backend(backend, q, k_cmp, scale), _Span(0, block_size, stride)
    segments = _packed_tables(backend, cu_seqlens, q.shape[1], k_cmp.shape[1], span)
    return _branch(on, span, scale, segments, q, k_cmp, v_cmp)


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
    cu_seqlens: Tensor | None = None,
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
        q, k_cmp, block_size, stride, cu_seqlens, scale, backend, and the errors raised: as in `compressed_attention`.
        lse: its second result, (B, T, H).
        select_block_size: l' in tokens, a multiple of `stride`.
        topk_blocks: S, at least `init_blocks` + `local_blocks`.

    Returns:
        int32 (B, T, K, S): block indices in ascending order, one set for each group, −1 in slots that stay free. In
        packed sequences they count from the start of the query's own.
    """
    q, k_cmp = _autocast(q, k_cmp)
    scale = _check_query(q, scale)
    _check_packed(cu_seqlens, *q.shape[:2], q.device)
    _check_compressed(q, block_size, stride, cu_seqlens, k_cmp=k_cmp)
    _check_shape("lse", lse, "q's (B, T, H)", tuple(q.shape[:3]))
    _check_device("lse", lse, "q's", q.device)
    _check(lse.is_floating_point(), "lse.dtype", lse.dtype, "must be a floating point type", TypeError)
    choice = _Choice(block_size, stride, select_block_size, topk_blocks, init_blocks, local_blocks)
    _check_choice(choice)
    on = _choose_backend(backend, q, k_cmp, scale, choice)
    segments = _packed_tables(backend, cu_seqlens, q.shape[1], k_cmp.shape[1], choice.span)
    return _select(q, k_cmp, lse, *segments.tables(), None, on, *choice, scale, 0)


def selective_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    select_block_size: int,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention over the tokens of chosen blocks (eq. 12): query t sees the tokens s ≤ t of its blocks.

    >>> q = torch.randn(1, 100, 4, 64)
    >>> own = (torch.arange(100) // 16).int().view(1, 100, 1, 1)  # everybody chooses the block that it stands in
    >>> selective_attention(q, q[:, :, :1], q[:, :, :1], own, select_block_size=16).shape
    torch.Size([1, 100, 4, 64])

    Args:
        q, k, v, cu_seqlens, scale, backend, and the errors raised: as in `local_attention`.
        block_indices: int32 or int64 (B, T, K, S), as `select_blocks` returns it: for each key head the blocks chosen,
            each at most once, in any order; −1 leaves a slot free. A block behind the query is not seen. In packed
            sequences they count from the start of the query's own.
        select_block_size: l', in tokens.

    Returns:
        (B, T, H, D) in q's dtype; 0 where a query has chosen nothing that it sees.
    """
    q, k, v = _autocast(q, k, v)
    scale = _check_query(q, scale)
    _check_keys(q, "(B, T, K, D)", _as_many, k=k, v=v)
    _check_integer("select_block_size", select_block_size, 1)
    _check_tensor("block_indices", block_indices, 4, "(B, T, K, S)")
    _check_shape("block_indices", block_indices, "(B, T, K, S)", (*k.shape[:3], block_indices.shape[3]))
    dtype = block_indices.dtype
    _check(dtype in (torch.int32, torch.int64), "block_indices.dtype", dtype, "must be int32 or int64", TypeError)
    _check_device("block_indices", block_indices, "q's", q.device)
    _check_packed(cu_seqlens, *q.shape[:2], q.device)
    on, span = _choose_backend(backend, q, k, scale), _Span.block(select_block_size)
    segments = _packed_tables(backend, cu_seqlens, q.shape[1], q.shape[1], span)
    return _branch(on, span, scale, segments, q, k, v, block_indices)[0]


class BackendChoice(NamedTuple):
    """A backend, and why it is not the kernels."""

    name: str  # "triton" or "torch"
    reason: str | None = None


def which_backend(
    device: torch.device | str | int | None = None, dtype: torch.dtype = torch.bfloat16, dim_head: int = 64
) -> BackendChoice:
    """The backend that "auto" takes for heads of that dtype and dimension, and the reason where it is PyTorch.

    >>> which_backend("cpu")
    BackendChoice(name='torch', reason='the kernels are for GPUs, and the device is cpu')

    The sizes of a call may rule the kernels out, too; then `backend="triton"` raises an error that says why.

    Args:
        device: None is the current GPU, or the CPU where there is no GPU.
        dtype: of queries and keys; under autocast, the autocast dtype.
        dim_head: D.

    Raises:
        ValueError, TypeError: an argument is out of range, or of the wrong type.
    """
    _check(isinstance(dtype, torch.dtype), "dtype", dtype, "must be a torch.dtype", TypeError)
    _check_integer("dim_head", dim_head, 1)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        return BackendChoice("torch", "there is no GPU")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    reason = _obstacle("auto", device, dtype, dim_head) or _failure(device, dtype, dim_head)
    return BackendChoice("triton" if reason is None else "torch", reason)


def tune(device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16, dim_head: int = 128) -> Path:
    """Finds the fastest tiles of the kernels on this GPU, which takes minutes, and writes them to a file: its path.

    The tiles of the kernels are those of a table that was tuned on an H200. This times the tiles around them, in the
    paper's setting, and takes those that are faster by 2 % and give the same results. It prints a line for each kernel:
    the time of a call that launches it, before and after. Every process reads the file when it first uses the GPU.

        python native_sparse_attention.py --tune --dtype bfloat16 --dim-head 128

    A file serves one kind of GPU, one version of this library and one of Triton; further dtypes and head dims are added
    to it. To go back to the table, delete the file, or set NSA_TUNED=0 in the environment.

    Args:
        device: a GPU; None: the current one.
        dtype: torch.bfloat16 or torch.float16, which have their tiles in common, or torch.float32.
        dim_head: D. Tiles are found for all head dims up to 64, for those up to 128, or for those up to 256.

    Returns:
        path of the file, in $XDG_CACHE_HOME/native_sparse_attention or, without that, in ~/.cache.

    Raises:
        ValueError: the kernels do not run on this device, or not for this dtype or head dim; the message says why.
        OSError: the folder cannot be made or written.
        RuntimeError: a tile made the GPU fail, which no other call in this process survives; nothing was written.
    """
    _check_integer("dim_head", dim_head, 1)
    device, kernels = torch.device("cuda" if device is None else device), _BACKENDS.get("triton")
    _check(kernels is not None, "device", str(device), "has nothing to tune: this file has no kernels")
    usable = device.type == "cuda" and torch.cuda.is_available()
    _check(usable, "device", str(device), "must be a GPU, and one that torch finds")
    with torch.cuda.device(device):
        probe = torch.empty(1, 1, 1, dim_head, device="cuda", dtype=dtype)
        obstacle = kernels.obstacle(probe, probe, 1.0)
        _check(obstacle is None, "device", str(device), f"cannot run the kernels: {obstacle}")
        return kernels.tune(probe.device, dtype, dim_head)


# Behind the door: what modules call, with arguments that have been checked ────────────────────────────────────────────


def _attention(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor, k_local: Tensor | None,
    v_local: Tensor | None, *, local_window: int, choice: _Choice, segments: _Segments, scale: float, backend: str,
    recompute: bool, first: int = 0, row_first: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`nsa_attention` of arguments that are right, gates of at least 0; without k_local and v_local, k and v serve.

    Keys begin at position 0, and queries at `first`; where row_first is given, those of row b at row_first[b] ≤ first.
    """
    on = _choose_backend(backend, q, k, scale, choice)
    flash = _flash_attention(q, backend, on, segments) if q.shape[1] == k.shape[1] else None
    if flash is not None:  # it has a backward of its own, so that the branches are joined by autograd
        local = (k, v) if k_local is None else (k_local, v_local)
        o_local = flash(q, *local, softmax_scale=scale, causal=True, window_size=(local_window - 1, 0))
        span = _Span(0, choice.block_size, choice.stride)  # torch 2.8 does not trace a NamedTuple's property
        o_compressed, lse = _branch(on, span, scale, segments, q, k_cmp, v_cmp)
        chosen = _select(q, k_cmp, lse.detach(), *segments.tables(), None, on, *choice, scale, 0)
        o_selective, _ = _branch(on, _Span.block(choice.select_block_size), scale, segments, q, k, v, chosen)
        return _torch_gate(gates, o_local, o_compressed, o_selective)
    tensors = _apart(q, k, v, k_cmp, v_cmp, gates, k_local, v_local)
    settings = (on, local_window, *choice, scale, recompute, first)
    return _apply(_AttentionFunction, settings, *segments.tables(), row_first, *tensors)[0]


def _branch(
    on: str, span: _Span, scale: float, segments: _Segments, q: Tensor, k: Tensor, v: Tensor,
    block_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and lse of one branch on a backend: over spans of keys, or over the blocks that are chosen."""
    settings, tables = (on, *span, scale, 0), (*segments.tables(), None)
    return _apply(_BranchFunction, settings, *tables, *_apart(q, k, v), block_indices)


def _obstacle(
    backend: str, device: torch.device, dtype: torch.dtype | None, dim_head: int | None, *call: Any
) -> str | None:
    """Reason why the kernels do not serve a call with this backend, "auto" or "triton"; None if they do.

    A dtype or a head dim of None is any. `call` are the arguments of a backend's `obstacle`, where they are known.
    """
    kernels = _BACKENDS.get("triton")
    if kernels is None:
        return "this file has no kernels"
    if backend == "auto" and not kernels.preferred(device):
        if device.type != "cuda":
            return f"the kernels are for GPUs, and the device is {device.type}"
        return "the kernels are for NVIDIA GPUs from sm_80 on and for AMD's MI300 and MI350"
    return kernels.obstacle(*call) if call else kernels.unserved(device, dtype, dim_head)


def _choose_backend(
    backend: str, q: Tensor, k: Tensor, scale: float, choice: _Choice | None = None, decoding: bool = False
) -> str:
    """Name of the backend for operators. An explicit choice never falls back silently; "auto" may: `_serving`."""
    _check(backend in ("auto", "torch", "triton"), "backend", backend, _BACKEND_RULE)
    call = (q, k, scale, choice, decoding)
    on = _device_backend(backend, q.device, q.dtype, q.shape[-1], *call)
    return on if q.numel() > 0 else "torch"


def _device_backend(
    backend: str, device: torch.device, dtype: torch.dtype | None = None, dim_head: int | None = None, *call: Any
) -> str:
    """Name of the backend for operators, without tensors to ask about. A dtype or a head dim of None is any."""
    if backend == "torch":
        return "torch"
    obstacle = _obstacle(backend, device, dtype, dim_head, *call)
    if backend == "triton" and obstacle is not None:
        _check(False, "backend", backend, f"cannot run here: {obstacle}; use 'auto' or 'torch'")
    return backend if obstacle is None else "torch"


@_once
def _flash_works() -> bool:
    try:
        from flash_attn import flash_attn_func  # noqa: F401
    except Exception:  # not installed; or a broken build, which raises all kinds of errors
        return False
    return True


def _flash_attention(q: Tensor, backend: str, on: str, segments: _Segments) -> Callable[..., Tensor] | None:
    """flash-attn's function for the PyTorch backend's local branch, where that package is installed and takes q."""
    takes = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256 and q.numel() > 0
    rows = segments.cu_seqlens is None
    if (backend, on, rows) != ("auto", "torch", True) or not takes or not _flash_works():
        return None
    from flash_attn import flash_attn_func

    return flash_attn_func


def _autocast_enabled(device: str) -> bool:
    return device in ("cpu", "cuda", "xpu", "mps") and torch.is_autocast_enabled(device)


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under torch.autocast, attention takes the autocast dtype, as scaled_dot_product_attention does."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else ""
    if not _autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    narrow = lambda x: isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64  # noqa: E731
    return tuple(x.to(dtype) if narrow(x) else x for x in tensors)


def _check_tensor(name: str, x: object, rank: int, letters: str) -> None:
    _check(isinstance(x, Tensor), name, type(x).__name__, "must be a tensor", TypeError)
    if x.ndim != rank:
        _check(False, f"{name}.shape", tuple(x.shape), f"must have {rank} dimensions, {letters}")


def _check_shape(name: str, x: Tensor, letters: str, expected: tuple[int, ...]) -> None:
    _check_tensor(name, x, len(expected), letters)
    if x.shape != expected:
        _check(False, f"{name}.shape", tuple(x.shape), f"must be {letters} = {expected}")


def _check_device(name: str, x: Tensor, owner: str, device: torch.device) -> None:
    if x.device != device:
        _check(False, f"{name}.device", str(x.device), f"must be {owner}, {device}")


def _readable(x: Tensor) -> bool:
    """Whether a look at the values costs nothing: on a CPU, and neither in compiled code nor of a fake tensor."""
    plain = type(x) in (Tensor, nn.Parameter)
    return plain and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_like(name: str, x: Tensor, q: Tensor) -> None:
    if x.dtype != q.dtype:
        _check(False, f"{name}.dtype", x.dtype, f"must be q's, {q.dtype}")
    _check_device(name, x, "q's", q.device)


def _check_query(q: Tensor, scale: float | None) -> float:
    """Checks q (B, T, H, D); returns the scale."""
    _check_tensor("q", q, 4, "(B, T, H, D)")
    _check(q.is_floating_point(), "q.dtype", q.dtype, "must be a floating point type", TypeError)
    _check(q.shape[3] > 0, "q.shape", tuple(q.shape), "must have at least 1 number a head")
    _check(scale is None or _finite(scale), "scale", scale, "must be a finite number, or None for 1/sqrt(D)")
    return q.shape[3] ** -0.5 if scale is None else float(scale)


def _check_layout(q: Tensor, x: Tensor, name: str, rows: Callable[[int], int]) -> None:
    """Complains where keys x do not fit q, and would if both were (B, heads, tokens, D). rows: of x, by tokens of q."""
    (batch, tokens, heads, _), (x_batch, x_tokens, x_heads, _) = q.shape, x.shape
    fits = lambda tokens, heads, x_tokens, x_heads: (  # noqa: E731
        batch == x_batch and x_tokens == rows(tokens) and x_heads > 0 and heads % x_heads == 0
    )
    transposed = fits(heads, tokens, x_heads, x_tokens) and not fits(tokens, heads, x_tokens, x_heads)
    rule = "q, k, v are (B, T, H, D), tokens before heads; these look like (B, H, T, D), so transpose(1, 2) them"
    _check(not transposed, f"q.shape, {name}.shape", (tuple(q.shape), tuple(x.shape)), rule)


def _check_keys(q: Tensor, letters: str, rows: Callable[[int], int], **keys_and_values: Tensor) -> None:
    """Checks keys and values, (B, rows(T), K, D), against a q that has been checked: the first sets K for all."""
    (B, T, H, D), K = q.shape, None
    for name, x in keys_and_values.items():
        _check_tensor(name, x, 4, letters)
        _check_like(name, x, q)
        K = x.shape[2] if K is None else K
        of_group = K > 0 and H % K == 0
        expected = (B, rows(T), K, D)
        if not of_group or x.shape != expected:
            _check_layout(q, x, name, rows)
            _check(of_group, f"{name}.shape", tuple(x.shape), f"must have a divisor of q's {H} heads")
            _check_shape(name, x, letters, expected)


def _as_many(tokens: int) -> int:
    """A key for each token."""
    return tokens


def _check_compressed(
    q: Tensor, block_size: int, stride: int, cu_seqlens: Tensor | None, **keys_and_values: Tensor
) -> None:
    _check_integer("block_size", block_size, 1)
    _check_integer("stride", stride, 1)
    _check_blocks(block_size, stride, stride, 0, 0, 0)
    if cu_seqlens is None:
        rows = lambda tokens: _compressed_count(tokens, block_size, stride)  # noqa: E731
        return _check_keys(q, "(B, C, K, D)", rows, **keys_and_values)
    (name, x), *_ = keys_and_values.items()
    _check_tensor(name, x, 4, "(B, C, K, D)")
    least, most = 0, q.shape[1] // stride
    if _readable(cu_seqlens):
        least = sum(_compressed_count(n, block_size, stride) for n in cu_seqlens.diff().tolist())
    if not least <= x.shape[1] <= most:
        rule = f"must have as many rows as all sequences have blocks, {least}, up to total // stride = {most}"
        _check(False, f"{name}.shape", tuple(x.shape), rule)
    _check_keys(q, "(1, C, K, D)", lambda _: x.shape[1], **keys_and_values)


def _check_packed(cu_seqlens: Tensor | None, batch: int, tokens: int, device: torch.device) -> None:
    """Checks the offsets of sequences packed in (batch, tokens, ...); their values where a look costs nothing."""
    if cu_seqlens is None:
        return
    _check_tensor("cu_seqlens", cu_seqlens, 1, "(n + 1,)")
    enough = len(cu_seqlens) > (1 if tokens > 0 else 0)
    _check(enough, "cu_seqlens.shape", tuple(cu_seqlens.shape), "must be (n + 1,) for n sequences")
    dtype = cu_seqlens.dtype
    _check(dtype in (torch.int32, torch.int64), "cu_seqlens.dtype", dtype, "must be torch.int32 or torch.int64")
    _check_device("cu_seqlens", cu_seqlens, "the tokens'", device)
    _check(batch == 1, "batch", batch, "must be 1 where cu_seqlens packs the sequences of a batch one after another")
    if _readable(cu_seqlens):
        offsets = cu_seqlens.tolist()
        _check(offsets[0] == 0, "cu_seqlens[0]", offsets[0], "must be 0, where the first sequence begins")
        for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
            rule = f"must be at least cu_seqlens[{i}] = {start}, where the sequence begins that ends here"
            _check(stop >= start, f"cu_seqlens[{i + 1}]", stop, rule)
        _check(offsets[-1] == tokens, "cu_seqlens[-1]", offsets[-1], f"must be {tokens}, the number of tokens")


def _check_choice(choice: _Choice) -> None:
    """Checks the sizes of the choice; block_size and stride have been checked."""
    for name in ("select_block_size", "topk_blocks", "init_blocks", "local_blocks"):
        _check_integer(name, getattr(choice, name), 0 if name.endswith("_blocks") and name != "topk_blocks" else 1)
    _check_blocks(*choice)


def _check_tokens(x: Tensor, dim: int, first: nn.Module) -> None:
    """Checks that x can go through a module of that width, whose first layer is given.

    Quantised layers and adapters may have no weight, or none of a floating point type; they know what they take.
    """
    _check_tensor("x", x, 3, "(B, T, dim)")
    if x.shape[2] != dim:
        _check(False, "x.shape", tuple(x.shape), f"must have dim = {dim} in dimension 2")
    _check(x.is_floating_point(), "x.dtype", x.dtype, "must be a floating point type", TypeError)
    weight = getattr(first, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        cast = _autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
        if not cast and x.dtype != weight.dtype:
            _check(False, "x.dtype", x.dtype, f"must be the weights', {weight.dtype}")
        _check_device("x", x, "the weights'", weight.device)


def _check_call(module: nn.Module, arguments: tuple[object, ...], named: dict[str, object]) -> None:
    """Complains about arguments that other attention modules take."""
    name, rule = type(module).__name__, "takes x and, by name, cache, cu_seqlens or key_padding_mask."
    if arguments:
        given = f"{1 + len(arguments)} positional arguments"
        raise TypeError(f"{name} {rule} It projects x to queries, keys and values itself; it was given {given}")
    for argument in named:
        masks = "It is causal by itself; give padding as key_padding_mask, True for a token"
        raise TypeError(f"{name} {rule} {masks}; it was given {argument}")


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 5  Batches: packed and padded sequences, the cache by which a module goes on, and a sequence over several processes
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


class _Segments(NamedTuple):
    """Tables of packed sequences on the device, made once for all readers; None where there are only rows."""

    cu_seqlens: Tensor | None = None  # int32 (n + 1,): offsets of tokens, ascending from 0 to total
    cu_keys: Tensor | None = None  # int32 (n + 1,): offsets of compressed keys, ascending from 0 to at most C
    of_token: Tensor | None = None  # int32 (2, total): segment of each token, and its position there
    of_key: Tensor | None = None  # int32 (2, C): first token of each compressed block, and its position there

    def last(self, backend: str, first: int, end: int, keys: int, span: _Span) -> _Segments:
        """Tables of the first `end` tokens, of which those from `first` on are the queries."""
        if self.cu_seqlens is None:
            return self
        tables = _packed_tables(backend, self.cu_seqlens.clamp(max=end), end, keys, span)
        return tables._replace(of_token=tables.of_token[:, first:].contiguous())

    def tables(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Tables that the operators of attention take. (torch 2.8 does not trace a slice.)"""
        return self.cu_seqlens, self.cu_keys, self.of_token

    def block_tables(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Tables that the operators of compression take."""
        return self.cu_seqlens, self.cu_keys, self.of_key


def _packed_tables(backend: str, cu_seqlens: Tensor | None, total: int, keys: int, span: _Span) -> _Segments:
    """Tables of `total` tokens and `keys` rows of compressed keys, of which some may belong to no block."""
    if cu_seqlens is None:
        return _Segments()
    on = _device_backend(backend, cu_seqlens.device)
    return _Segments(*_tables(cu_seqlens, total, keys, on, span.block_size, span.stride))


def _numbered(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Segment id and offset of each row, (total,), of segments of `counts` rows, one after another."""
    end = counts.cumsum(0, dtype=counts.dtype)
    row = torch.arange(total, dtype=counts.dtype, device=counts.device)
    segment = torch.searchsorted(end, row, right=True)
    return segment, row - F.pad(end, (1, 0))[segment]  # rows behind all segments are of one more


class _Padding(NamedTuple):
    """A padded batch as rows whose tokens come first: nothing that is causal sees what stands behind them."""

    mask: Tensor  # bool (B, T): True for a token
    place: Tensor  # (B, rows): where each token of the rows stood, among all B·T

    @classmethod
    def of(cls, mask: Tensor, parts: int = 1) -> _Padding:
        """Padding of rows, or of each of the equal parts of a row by itself."""
        B, size = mask.shape[0], mask.shape[1] // parts
        order = torch.unflatten(mask.logical_not().to(torch.uint8), 1, (parts, size)).argsort(dim=2, stable=True)
        begin = torch.arange(B * parts, device=mask.device).view(B, parts, 1) * size
        return cls(mask, (order + begin).flatten(1))

    def packed_mask(self) -> Tensor:
        """bool (B, rows): True for a token of the rows."""
        return self.mask.flatten()[self.place]

    def pack(self, x: Tensor) -> Tensor:
        """Rows with their tokens first, and zeros behind them."""
        x = x.masked_fill(~self.mask[..., None], 0.0).flatten(0, 1)
        return torch.unflatten(x.index_select(0, self.place.flatten()), 0, self.place.shape)

    def unpack(self, x: Tensor) -> Tensor:
        """Tokens back in their places, and zeros between them."""
        y = x.new_zeros(self.mask.numel(), x.shape[2]).index_copy(0, self.place.flatten(), x.flatten(0, 1))
        return torch.unflatten(y, 0, self.mask.shape).masked_fill(~self.mask[..., None], 0.0)


class _Batch(NamedTuple):
    """Rows or packed sequences of one call, all arguments checked."""

    cache: NSACache | None = None
    segments: _Segments = _Segments()
    padding: _Padding | None = None
    counts: Tensor | int = 0  # tokens of each row: int32 (B,), or one number for all
    known: tuple[int, ...] | None = None  # the same on the host, where it knows them
    context: context_parallel | None = None  # in which each rank has a part of the tokens
    of_all: _Padding | None = None  # padding of all ranks' tokens, each part of which has been packed

    def pack(self, x: Tensor) -> Tensor:
        return x if self.padding is None else self.padding.pack(x)

    def unpack(self, x: Tensor) -> Tensor:
        return x if self.padding is None else self.padding.unpack(x)

    def gather(self, *xs: Tensor) -> tuple[Tensor, ...]:
        """Keys and values (B, T, heads, D) of all ranks' tokens, and rows packed, from those of this rank's."""
        xs = xs if self.context is None else self.context._gather(xs)
        if self.of_all is None:
            return xs
        return tuple(torch.unflatten(self.of_all.pack(x.flatten(2)), 2, x.shape[2:]) for x in xs)

    def row_first(self, first: int) -> Tensor | None:
        """Tokens of each row before the part that begins at place `first`: int32 (B,); None where it has no padding."""
        return None if self.of_all is None else self.of_all.mask[:, :first].sum(1, dtype=torch.int32)

    def rope_of_queries(self, rope: Tensor) -> Tensor:
        """cos and sin of this rank's tokens from those of all."""
        if self.of_all is not None:
            return rope[:, self.context.shard(self.of_all.mask.cumsum(1) - 1).clamp(min=0)]
        return rope if self.context is None else self.context.shard(rope, dim=-3)

    def positions(self, x: Tensor) -> Tensor:
        """Position of each token in its sequence: (B, T), or (T,) where all rows begin at 0."""
        if self.segments.of_token is None:
            positions = torch.arange(x.shape[1], device=x.device)
            return positions if self.cache is None else self.cache.seqlens[:, None] + positions
        segment, positions = self.segments.of_token
        return (positions if self.cache is None else self.cache.seqlens[segment] + positions)[None]


def _read_batch(
    cfg: NSAConfig, layer: nn.Module, x: Tensor, cache: NSACache | None = None, cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> _Batch:  # fmt: skip
    """Checks the arguments of a module's forward, whose first layer is given; once, whatever else they pass through."""
    context = None if _CONTEXT is None or _CONTEXT.size == 1 else _CONTEXT
    if context is not None:
        context._check_alike(x=x, cu_seqlens=cu_seqlens, key_padding_mask=mask)  # before what one rank alone may find
    _check_tokens(x, cfg.dim, layer)
    known_cache = cache is None or isinstance(cache, NSACache)
    _check(known_cache, "cache", type(cache).__name__, "must be an NSACache", TypeError)
    (rows, tokens), padding, of_all, segments = x.shape[:2], None, None, _Segments()
    if context is not None:
        rule = "cannot be given under context_parallel, in which modules take whole sequences"
        _check(cache is None, "cache", type(cache).__name__, rule)
        tokens *= context.size
        context._part_size("tokens of all ranks", tokens)
    counts, known = tokens, (tokens,) * rows if cache is not None else None
    if mask is not None:
        _check(cu_seqlens is None, "key_padding_mask, cu_seqlens", "both", "give one of them at most")
        padding, of_all, counts, known = _read_mask(mask, x, context)
    elif cu_seqlens is not None:
        segments, known = _read_offsets(cfg, cu_seqlens, rows, tokens, x.device)
        rows, counts = len(cu_seqlens) - 1, 0 if cache is None else segments.cu_seqlens.diff()
    if known is None and cu_seqlens is None and tokens > cfg.seq_len:
        of_all = "" if context is None else f", {tokens} on all ranks,"
        _check(False, "x.shape", tuple(x.shape), f"must have T{of_all} of at most seq_len = {cfg.seq_len}")
    for i, n in enumerate(known or ()):
        of = f"cu_seqlens[{i + 1}] - cu_seqlens[{i}]" if cu_seqlens is not None else f"tokens of row {i}"
        _check(n <= cfg.seq_len, of, n, f"must be at most seq_len = {cfg.seq_len}")
    if cache is not None:
        cache._check_room(cfg, rows, known, x.device)
    return _Batch(cache, segments, padding, counts, known, context, of_all)


def _read_mask(
    mask: Tensor, x: Tensor, context: context_parallel | None
) -> tuple[_Padding, _Padding | None, Tensor, tuple[int, ...] | None]:
    """Padding of x and, in a context, of all ranks' tokens; the tokens in each row, also on the host if that is free.

    There each part of x is packed by itself first, so that the keys that are gathered begin as queries do.
    """
    _check_shape("key_padding_mask", mask, "(B, T)", tuple(x.shape[:2]))
    _check(mask.dtype == torch.bool, "key_padding_mask.dtype", mask.dtype, "must be torch.bool, True for a token")
    _check_device("key_padding_mask", mask, "x's", x.device)
    padding, of_all = _Padding.of(mask, 1 if context is None else len(context._parts(0))), None
    if context is not None:
        of_all = _Padding.of(context._gather((padding.packed_mask(),))[0])
    counts = (padding if of_all is None else of_all).mask.sum(1, dtype=torch.int32)
    known = tuple(counts.tolist()) if _readable(mask) else None
    if known is not None and of_all is None:
        padding = padding._replace(place=padding.place[:, : max(known, default=0)])
    return padding, of_all, counts, known


def _read_offsets(
    cfg: NSAConfig, cu_seqlens: Tensor, batch: int, total: int, device: torch.device
) -> tuple[_Segments, tuple[int, ...] | None]:
    """Tables of packed sequences of so many tokens, and their lengths on the host where a look is free."""
    _check_packed(cu_seqlens, batch, total, device)
    blocks, known = total // cfg.stride, None  # which is always enough
    if _readable(cu_seqlens):
        known = tuple(cu_seqlens.diff().tolist())
        blocks = sum(_compressed_count(n, cfg.block_size, cfg.stride) for n in known)
    span = _Span(0, cfg.block_size, cfg.stride)
    return _packed_tables(cfg.effective_backend, cu_seqlens, total, blocks, span), known


class NSACache:
    """Keys and values of the tokens that one NativeSparseAttention has seen, so that it can go on from there.

    Each layer has its own. A forward with a cache takes the next tokens of every row, one or many, appends them, and
    returns what one forward over all tokens of the row would at their positions. It belongs to the module that first
    fills it, until `reset()`, and refuses another's tokens. It records nothing for gradients: where they are enabled
    and something would need one, a call is refused.

    >>> layers = [NSABlock(NSAConfig(dim=64, heads=4, seq_len=256)) for _ in range(2)]
    >>> caches = [NSACache(layer.attn.cfg, batch=3, max_len=200) for layer in layers]
    >>> x = torch.randn(3, 100, 64)  # the prompts
    >>> with torch.inference_mode():
    ...     for _ in range(5):
    ...         for layer, cache in zip(layers, caches):
    ...             x = layer(x, cache=cache)
    ...         x = x[:, -1:]  # a model would sample a token from this, and go on with its embedding
    >>> caches[0]
    NSACache(batch=3, max_len=200, lengths=104, dtype=torch.float32, device=cpu)

    All memory is allocated here. A token takes 2·K·D numbers in each row, 3·K·D where keys are rotated, 6·K·D where
    separate_kv is set, and 2·K·D/d more for the compressed blocks, each number as many bytes as the dtype has. At the
    paper's sizes (K = 4, D = 128, d = 16, separate_kv, bfloat16) that is 6272 bytes.

    Args:
        cfg: the configuration of the module that it serves.
        batch: rows.
        max_len: tokens that each row has room for, at most `cfg.seq_len`.
        device, dtype: of the keys and values, those of the module's weights (under autocast, the autocast dtype).

    Nothing here waits for a GPU but `lengths`: the numbers of tokens are kept on the device, so that a step can be
    captured in a CUDA graph. What would go beyond max_len is refused where the host knows it: on a CPU, and on a GPU
    as long as it was told all lengths as Python numbers. Elsewhere it is not stored, and the row counts as full.

    Attributes:
        lengths: a tuple of `batch` ints, the number of tokens in each row; reads the device.
        seqlens: the same on the device, int32 (batch,), not to be written by others.
        cfg, batch, max_len, device, dtype: as it was made.

    Raises:
        ValueError, TypeError: an argument breaks one of these rules; the message names it, its value and the rule.
    """

    def __init__(
        self,
        cfg: NSAConfig,
        batch: int,
        max_len: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check(isinstance(cfg, NSAConfig), "cfg", type(cfg).__name__, "must be an NSAConfig", TypeError)
        _check_integer("batch", batch, 1)
        _check_integer("max_len", max_len, 1)
        _check(max_len <= cfg.seq_len, "max_len", max_len, f"must be at most seq_len = {cfg.seq_len}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
        _check(floating, "dtype", dtype, "must be a floating point type", TypeError)
        self.cfg, self.batch, self.max_len = cfg, batch, max_len
        # What the compressors read is not rotated, and kept, so that a cache can be cut anywhere.
        raw = ("k_local", "v_local", "k_raw", "v_raw") if cfg.separate_kv else ("k_raw",) * cfg.rotates
        self._streams = ("k", "v", *raw)
        blocks = _compressed_count(max_len, cfg.block_size, cfg.stride)

        def room(streams: int, rows: int) -> Tensor:  # and a spare row for what is not to be stored
            shape = (streams, batch, rows + 1, cfg.kv_heads, cfg.dim_head)
            return torch.zeros(shape, device=device, dtype=dtype)

        with torch.inference_mode(False):  # what is made inside of it cannot be written outside
            self.tokens, self.blocks = room(len(self._streams), max_len), room(2, blocks)
            self.seqlens = torch.zeros(batch, device=self.device, dtype=torch.int32)
        self._captured = False
        self.reset()

    def _stream(self, *names: str) -> Tensor:
        """(B, max_len, K, D): the first of these streams that is kept."""
        name = next(name for name in names if name in self._streams)
        return self.tokens[self._streams.index(name), :, :-1]

    k = property(lambda self: self._stream("k"))  # of the selective branch
    v = property(lambda self: self._stream("v"))
    k_local = property(lambda self: self._stream("k_local", "k"))
    v_local = property(lambda self: self._stream("v_local", "v"))
    k_raw = property(lambda self: self._stream("k_raw", "k"))  # of the compressors
    v_raw = property(lambda self: self._stream("v_raw", "v"))
    k_cmp = property(lambda self: self.blocks[0, :, :-1])
    v_cmp = property(lambda self: self.blocks[1, :, :-1])

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(self.seqlens.clamp(max=self.max_len).tolist())

    @property
    def dtype(self) -> torch.dtype:
        return self.tokens.dtype

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def __repr__(self) -> str:
        lengths = self.lengths
        longest = lengths[0] if len(set(lengths)) == 1 else f"{min(lengths)}..{max(lengths)}"
        sizes = f"batch={self.batch}, max_len={self.max_len}, lengths={longest}"
        return f"NSACache({sizes}, dtype={self.dtype}, device={self.device})"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_owner": None}  # a copy belongs to the module that next fills it

    def reset(self) -> None:
        """Forgets all tokens, and whose they were."""
        self.seqlens.zero_()
        self._owner: weakref.ref[nn.Module] | None = None  # the module whose tokens these are
        self._know((0,) * self.batch)

    def truncate(self, n: int | Sequence[int] | Tensor) -> None:
        """Keeps the first n tokens of every row, or n[row] of each, and forgets the others, so as to go on from there.

        >>> cache = NSACache(NSAConfig(dim=64, heads=4, seq_len=256), batch=2, max_len=200)
        >>> with torch.inference_mode():
        ...     _ = NativeSparseAttention(cache.cfg)(torch.randn(2, 50, 64), cache=cache)
        >>> cache.truncate([48, 49])
        >>> cache.lengths
        (48, 49)

        Args:
            n: an int, or `batch` of them as a list, a tuple or a tensor. A tensor on a GPU is not read: a row that is
                shorter than its number stays as it is, and below 0 counts as 0.

        Raises:
            ValueError, TypeError: n is no such number or numbers, below 0, or above the length of a row that the host
                knows.
        """
        n, limit = ((n,) * self.batch, min(n, self.max_len)) if type(n) is int else self._numbers("n", n)
        before = self._lengths_on_host()
        for row, kept in enumerate(n or ()):
            _check(kept >= 0, f"n[{row}]", kept, "must be at least 0")
            if before is not None:
                _check(kept <= before[row], f"n[{row}]", kept, f"must be at most the row's length, {before[row]}")
        self.seqlens.clamp_(max=limit).clamp_(min=0)
        self._know(n if before is not None or not any(n or (1,)) else None)

    @torch.no_grad()
    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Row i becomes what row indices[i] was. A row may be taken many times, as beam search does, or never.

        Args:
            indices: `batch` ints from 0 to batch − 1, as a list, a tuple or a tensor. A tensor on a GPU is not read:
                its numbers are clamped.

        Raises:
            ValueError, TypeError: indices are not `batch` numbers of rows.
        """
        indices, on_device = self._numbers("indices", indices)
        for i, source in enumerate(indices or ()):
            _check(0 <= source < self.batch, f"indices[{i}]", source, f"must be from 0 to batch - 1 = {self.batch - 1}")
        before = self._lengths_on_host()
        if indices == tuple(range(self.batch)):
            return
        on_device, longest = on_device.clamp(0, self.batch - 1), self.max_len if before is None else max(before)
        blocks = _compressed_count(longest, self.cfg.block_size, self.cfg.stride)
        for stream, used in (*((x, longest) for x in self.tokens), *((x, blocks) for x in self.blocks)):
            stream[:, :used] = stream[:, :used].index_select(0, on_device)
        self.seqlens.copy_(self.seqlens[on_device])
        equal = before is not None and len(set(before)) == 1
        self._know(tuple(before[i] for i in indices) if before and indices else before if equal else None)

    def _numbers(self, name: str, values: object) -> tuple[tuple[int, ...] | None, Tensor]:
        """A number for each row: on the host, None where only a GPU knows them; and int32 on the device."""
        if isinstance(values, Tensor):
            integers = not values.is_floating_point() and values.dtype not in (torch.bool, torch.complex64)
            _check(integers, f"{name}.dtype", values.dtype, "must be an integer type", TypeError)
            _check_shape(name, values, "(batch,)", (self.batch,))
            if not _readable(values):
                _check_device(name, values, "the cache's", self.device)
                return None, values.int()
            values = values.tolist()
        integers = isinstance(values, list | tuple) and all(type(value) is int for value in values)
        _check(integers, name, values, "must be an int for each row", TypeError)
        _check(len(values) == self.batch, name, values, f"must be as many as there are rows, {self.batch}")
        within = [max(-1, min(value, 2**31 - 1)) for value in values]
        return tuple(values), torch.tensor(within, dtype=torch.int32, device="cpu").to(self.device, non_blocking=True)

    # What the host knows without a look at the device. In a CUDA graph rows grow without it, and so from the first
    # capture on it claims no more; nor does compiled code, which would be compiled anew for each length.

    def _know(self, lengths: tuple[int, ...] | None) -> None:
        self._captured = self._captured or self._capturing()
        self._known = None if self._captured else lengths

    def _capturing(self) -> bool:
        return self.tokens.is_cuda and torch.cuda.is_current_stream_capturing()

    def _equal_length(self) -> int | None:
        """Tokens of each row, where the host knows them to be as many in all; not in a call that is recorded."""
        recorded = torch.compiler.is_compiling() or self._capturing()
        lengths = set(() if recorded or self._known is None else self._known)
        return lengths.pop() if len(lengths) == 1 else None

    def _is_new(self) -> bool:
        """Whether a call may take its tokens for all there are; not one that is recorded, which will find others."""
        return self._equal_length() == 0

    def _lengths_on_host(self) -> tuple[int, ...] | None:
        if self._known is None and _readable(self.seqlens):
            return self.lengths
        return self._known

    def _append(self, p: _Projections, segments: _Segments) -> None:
        """Writes the keys and values of new tokens behind those of each row. No row is longer for it yet."""
        values = [getattr(p, name) for name in self._streams]
        on = _device_backend(self.cfg.effective_backend, self.device)
        _cache_append(self.tokens, values, self.seqlens, segments.of_token, on)

    def _fill_blocks(self, k_cmp: Tensor, v_cmp: Tensor, segments: _Segments, first: int = 0) -> None:
        """Writes the compressed keys and values of rows, from block `first` on, or of packed sequences from 0."""
        if segments.of_key is None:
            for blocks, values in zip(self.blocks[:, :, first:-1], (k_cmp, v_cmp), strict=True):
                blocks[:, : values.shape[1]] = values[:, : blocks.shape[1]]
            return
        first, position = segments.of_key
        needed = torch.arange(len(first), device=first.device) < segments.cu_keys[-1]
        row = torch.where(needed, segments.of_token[0, first], self.batch)
        _store_blocks(self.blocks, row, position // self.cfg.stride, k_cmp, v_cmp)

    def _commit(self, batch: _Batch, owner: nn.Module) -> None:
        """Makes the rows longer by the tokens of a call that has come to its end."""
        before = None if torch.compiler.is_compiling() else self._known
        self.seqlens.add_(batch.counts)
        if torch.compiler.is_compiling():
            self._known = None
            return
        both = before is not None and batch.known is not None
        self._know(tuple(map(sum, zip(before, batch.known, strict=True))) if both else None)
        self._owner = self._owner if self._is_new() else weakref.ref(owner)

    def _check_room(self, cfg: NSAConfig, rows: int, counts: tuple[int, ...] | None, device: torch.device) -> None:
        """Checks that a module of such a configuration can append so many tokens to each row."""
        for name in (field.name for field in fields(cfg)) if self.cfg is not cfg and self.cfg != cfg else ():
            value, free = getattr(self.cfg, name), name in ("use_flash", "backend")
            same = free or value == getattr(cfg, name)
            _check(same, f"cache.cfg.{name}", value, f"must be the module's, {getattr(cfg, name)!r}")
        _check(self.batch == rows, "cache.batch", self.batch, f"must be that of the tokens, {rows}")
        _check(self.device == device, "cache.device", str(self.device), f"must be that of the tokens, {device}")
        if torch.compiler.is_compiling():
            return
        before = self._lengths_on_host()
        for row, (length, more) in enumerate(zip(before, counts, strict=True)) if before and counts else ():
            rule = f"must leave room for {more} more within max_len = {self.max_len}"
            _check(length + more <= self.max_len, f"cache.lengths[{row}]", length, rule)

    def _check_owner(self, owner: nn.Module, keys: Tensor) -> None:
        """Checks that these keys of a module may go on from the tokens that are here."""
        _check(self.dtype == keys.dtype, "cache.dtype", self.dtype, f"must be that of the module's keys, {keys.dtype}")
        owned = torch.compiler.is_compiling() or self._owner is None or self._owner() is owner
        _check(owned, "cache", self, "holds another module's tokens; each layer has a cache of its own (or reset() it)")
        wanted = torch.is_grad_enabled() and (keys.requires_grad or any(p.requires_grad for p in owner.parameters()))
        rule = "records no gradients, but x or a parameter wants one: call it under torch.no_grad() or inference_mode()"
        _check(not wanted, "cache", self, rule)


# The context that modules are in. Not a context variable, which the threads of a backward would not see: a checkpoint
# computes a forward again in one of them.
_CONTEXT: context_parallel | None = None

# Their names from torch 2.13 on, and before; a build without processes has neither.
_all_gather = getattr(dist, "all_gather_single", getattr(dist, "all_gather_into_tensor", None))
_reduce_scatter = getattr(dist, "reduce_scatter_single", getattr(dist, "reduce_scatter_tensor", None))


class context_parallel:
    """A context in which a sequence is spread over the processes of a group: each has a part of its tokens.

        mesh = init_device_mesh("cuda", (4,), mesh_dim_names=("cp",))
        with context_parallel(mesh["cp"], layout="zigzag") as cp:
            x, targets = cp.shard(x), cp.shard(targets)  # (B, T, ...) → (B, T / 4, ...): this rank's tokens
            loss = F.cross_entropy(model(x).flatten(0, 1), targets.flatten())
            loss.backward()

    NativeSparseAttention and NSABlock then take this rank's tokens, and return their outputs: those that one process
    would have for the whole sequence. Queries stay where they are; each layer gathers the keys and values of all ranks,
    and a backward adds up their gradients. Everything else that a model does token by token stays as it is; learned
    positions are those of `positions`. `cu_seqlens` are those of all tokens, the same on all ranks; a key_padding_mask
    is that of this rank's tokens, shard(mask), of any pattern.

    A backward differentiates the sum of all ranks' losses. The gradients of parameters are this rank's share: their sum
    over the group is the gradient. The mean over the group, which DistributedDataParallel and FSDP take, is therefore
    right for losses that are means over a rank's tokens, as above.

    All ranks call the same modules in the same order, and all call backward. Where a checkpoint computes a forward
    again, backward is called within the context. torch.compile takes the collectives into its graph.

    Args:
        mesh_or_group: a DeviceMesh of one dimension, or a process group. A group of one changes nothing.
        layout: the tokens of rank r of P. "contiguous": part r of P. "zigzag": parts r and 2·P − 1 − r of 2·P, so that
            all ranks have about as much to do, as later queries see more.

    Attributes:
        rank, size, layout: this rank, r; the number of ranks, P; and the layout.

    Raises:
        ValueError, TypeError: an argument breaks one of these rules; contexts are nested; ranks differ in the shapes or
            dtypes of what they give to a module, in which case all of them raise it. On a GPU only the first call in a
            context compares them, through the host where the group has "cpu:gloo" beside "cuda:nccl", and with NCCL
            alone by a wait for the GPU. Compiled code compares nothing.
    """

    def __init__(self, mesh_or_group: dist.DeviceMesh | dist.ProcessGroup, layout: str = "contiguous") -> None:
        group, rule = mesh_or_group, "must be a DeviceMesh of one dimension, or a process group with this process in it"
        if hasattr(group, "get_group"):
            _check(group.ndim == 1, "mesh_or_group", group, rule)
            group = group.get_group()
        _check(dist.is_available() and isinstance(group, dist.ProcessGroup), "mesh_or_group", group, rule, TypeError)
        _check(layout in ("contiguous", "zigzag"), "layout", layout, "must be 'contiguous' or 'zigzag'")
        self.layout, self._group, self._compared = layout, group, False
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __enter__(self) -> context_parallel:
        global _CONTEXT
        _check(_CONTEXT is None, "context_parallel", self.layout, "is within another one, which must be left first")
        _CONTEXT, self._compared = self, False
        return self

    def __exit__(self, *_: object) -> None:
        global _CONTEXT
        _CONTEXT = None

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's part of a tensor of all tokens, (B, T, ...) → (B, T / P, ...)."""
        return self._shard(x, dim, self.rank)

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The reverse, from the parts of all ranks: (B, T / P, ...) → (B, T, ...), the same on each of them.

        A loss of the result that all ranks compute alike counts P times.
        """
        self._check_alike(x=x)
        return self._gather((x,), dim)[0]

    def positions(self, total: int, device: torch.device | str | None = None) -> Tensor:
        """Positions of this rank's tokens in a sequence of so many, int64 (T / P,)."""
        return self.shard(torch.arange(total, device=device), dim=0)

    def _parts(self, rank: int) -> tuple[int, ...]:
        """Numbers of a rank's parts, of P, or 2·P in zigzag."""
        return (rank,) if self.layout == "contiguous" or self.size == 1 else (rank, 2 * self.size - 1 - rank)

    def _part_size(self, name: str, tokens: int) -> int:
        """Tokens of a part, of so many in all."""
        parts = self.size * len(self._parts(0))
        if tokens % parts:
            to = _selection_count(tokens, parts) * parts
            _check(False, name, tokens, f"must be a multiple of {parts} in layout {self.layout!r}; pad them to {to}")
        return tokens // parts

    def _shard(self, x: Tensor, dim: int, rank: int) -> Tensor:
        size = self._part_size(f"x.shape[{dim}]", x.shape[dim])
        parts = [x.narrow(dim, part * size, size) for part in self._parts(rank)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def _places(self, tokens: int) -> Iterator[tuple[slice, int]]:
        """Each part of this rank's tokens, a slice of them, and the position of its first."""
        size = tokens // len(self._parts(self.rank))
        for i, part in enumerate(self._parts(self.rank)):
            yield slice(i * size, (i + 1) * size), part * size

    def _gather(self, xs: tuple[Tensor, ...], dim: int = 1) -> tuple[Tensor, ...]:
        """Tensors of all ranks' tokens from those of this rank's and the others'."""
        return xs if self.size == 1 else _Gather.apply(self, dim, *xs)

    def _join(self, x: Tensor, dim: int) -> Tensor:
        """One of these tensors."""
        size = self._part_size(f"x.shape[{dim}] of all ranks", x.shape[dim] * self.size)
        every = x.new_empty(self.size, *x.shape)
        _all_gather(every.flatten(0, 1), x.contiguous(), group=self._group)
        parts = [
            (part, every[rank].narrow(dim, i * size, size))
            for rank in range(self.size)
            for i, part in enumerate(self._parts(rank))
        ]
        return torch.cat([x for _, x in sorted(parts, key=lambda part: part[0])], dim)

    def _sum(self, x: Tensor, dim: int) -> Tensor:
        """The reverse for gradients: this rank's part of the sum over all ranks."""
        every = torch.stack([self._shard(x, dim, rank) for rank in range(self.size)])
        part = torch.empty_like(every[0])
        _reduce_scatter(part, every.flatten(0, 1), group=self._group)
        return part

    def _check_alike(self, **tensors: object) -> None:
        """Complains, on all ranks, where they differ in the layout, or in a tensor's shape, dtype or known values."""
        if self.size == 1 or torch.compiler.is_compiling():
            return
        device = getattr(tensors["x"], "device", torch.device("cpu"))
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        compared = self._compared and device.type != "cpu"  # else the host would wait for the others in each call
        if compared or capturing:
            return
        mine = {name: _description(x) for name, x in tensors.items() if x is not None} | {"layout": self.layout}
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, mine, self._group)
        given = "; ".join(f"rank {rank}: {theirs}" for rank, theirs in enumerate(map(str, every)))
        _check(all(theirs == mine for theirs in every), "context_parallel", given, "must be the same on all ranks")
        self._compared = True


def _description(x: object) -> str:
    if not isinstance(x, Tensor):
        return type(x).__name__
    values = f", {x.tolist()}" if x.ndim == 1 and _readable(x) else ""
    return f"{tuple(x.shape)}, {x.dtype}{values}"


class _Gather(torch.autograd.Function):
    """Tensors of all ranks' tokens from those of each rank. Their gradients are added up over the ranks."""

    @staticmethod
    def forward(ctx: Any, context: context_parallel, dim: int, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.context, ctx.dim = context, dim
        return tuple(context._join(x, dim) for x in xs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(ctx.context._sum(x, ctx.dim) for x in gradients)


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 6  Operators and autograd: one function for the whole, one for a branch, on every backend
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


class _RowTerms(NamedTuple):
    """lse and delta of each query row, in a layout of the backend's own (PyTorch: (B, T, H)).

    With p = exp(s − lse) the gradient of a branch's scores is ds = p·(do·v − do·o + dlse). Under a gate g, do is g
    times the gradient of the sum, so that ds = g·p·(do·v − do·o): the gate goes into the exponent, and into nothing
    else. So a row brings two numbers: lse − log g, +∞ where nothing flows; and delta = do·o − dlse.
    """

    lse: Tensor
    delta: Tensor


def _row_terms(terms: Tensor) -> list[_RowTerms]:
    """Terms of each branch, which lie side by side in dimension 2: lse of the first, its delta, lse of the second …"""
    rows = terms.unbind(2)
    return [_RowTerms(*pair) for pair in zip(rows[::2], rows[1::2], strict=True)]


class _Backend(NamedTuple):
    """All that a backend must bring. `segments` are packed sequences; PyTorch on a CPU is given rows instead.

    Queries may begin at a position `first`, of keys that begin at 0: PyTorch takes a number for all rows, or a tensor
    of one for each row; the kernels take a tensor.

    span_forward(q, k, v, span, scale, segments, first) → o, lse
    span_backward(do, terms, q, k, v, span, scale, dq, segments, first) → dq, dk, dv; added to the dq that is given
    select(q, k_cmp, lse, choice, scale, segments, first, max_len) → block_indices; all positions are below max_len
    selected_forward(q, k, v, block_indices, l', scale, gated, segments, first, index) → o, lse, and the gated sum of
        all branches where `gated` is (gates, o_local, o_compressed), as contiguous as span_forward returns them
    selected_backward(do, terms, q, k, v, block_indices, l', scale, dq, dk, dv, segments, first, index) → dq, dk, dv;
        likewise
        `index`: memory from `_index_room`, in which a forward may leave to its backward what it has worked out
    preprocess(do, outputs, lses, kv_heads, gates, dlse) → terms, which `_row_terms` takes apart, and dgates
    decode(q, tokens, blocks, logits, first, of_token, window, choice, scale) → o
    segments(cu_seqlens, total, keys, block_size, stride) → `_Segments`
    append(tokens, values, first, of_token)
    project(x, weights, biases) → x·weight + bias of each
    extend(q, k, v, tokens, blocks, first, of_token, rotation, block_size, stride, weights) → q, rotated
    compress, compress_backward: the operators `_compress_forward` and `_compress_backward`

    The kernels also say where they serve:
    unserved(device, dtype, dim_head) → why they cannot run there, or None; what is None is any dtype or dimension
    obstacle(q, k, scale, choice, decoding) → why they cannot run in such a call, or None
    preferred(device) → whether "auto" takes them
    extends(k, units) → whether `extend` takes the weights of a compressor of so many hidden units
    compresses(x, weight, backend) → whether they serve such an input and such weights

    Where it compiles kernels:
    prepare(run): compiles those that run() launches, side by side, and launches none
    tune(device, dtype, D) → path of the file for which it has found the fastest tiles
    untune(device) → whether there were such tiles, which it no longer uses
    """

    span_forward: Callable[..., tuple[Tensor, Tensor]]
    span_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    select: Callable[..., Tensor]
    selected_forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    selected_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    preprocess: Callable[..., tuple[Tensor, Tensor | None]]
    decode: Callable[..., Tensor]
    segments: Callable[..., _Segments]
    append: Callable[..., None]
    project: Callable[..., tuple[Tensor, ...]]
    extend: Callable[..., Tensor]
    compress: Callable[..., tuple[Tensor, Tensor]]
    compress_backward: Callable[..., tuple[Tensor, Tensor]]
    unserved: Callable[..., str | None] = lambda *_: None
    obstacle: Callable[..., str | None] = lambda *_: None
    preferred: Callable[[torch.device], bool] = lambda _: True
    extends: Callable[[Tensor, int], bool] = lambda *_: False
    compresses: Callable[[Tensor, Tensor, str], bool] = lambda *_: False
    prepare: Callable[[Callable[[], object]], None] = lambda _: None
    tune: Callable[..., Path] | None = None
    untune: Callable[[torch.device], bool] = lambda _: False


_BACKENDS: dict[str, _Backend] = {}  # "torch" is entered by section 7, "triton" by section 16

# The namespace of the operators: the module's own name, so that two copies of this file in one process keep to
# themselves. A module may have a name that is no identifier; its bytes then keep such names apart.
_LIBRARY = __name__ if __name__.isidentifier() and __name__.isascii() else f"nsa_{__name__.encode().hex()}"

# Padding that PyTorch accepts for a call less: about what a call costs beside its tokens.
_CALL_TOKENS = 256

# Fallback. To an operator, "auto" means the kernels until one of them cannot be launched, and PyTorch from then on. The
# operator then starts again from the beginning: it has made all its results itself, and writes the same values into a
# cache once more. PyTorch's backward reads what the kernels' forward has saved. Callers do not look at failures: a
# compiled graph, and a checkpoint that computes a forward again, rely on the shapes that there were.


class _CannotLaunch(RuntimeError):
    """A kernel that cannot be built or launched, and has done nothing."""


# Why kernels could not be launched, by device, dtype and head dim; None is any.
_FAILURES: dict[tuple[torch.device, torch.dtype | None, int | None], str] = {}


def _failure(device: torch.device, dtype: torch.dtype | None, dim_head: int | None) -> str | None:
    """Reason why PyTorch serves such heads under "auto" in place of kernels that failed; None if none did."""
    heads = (device, dtype, dim_head)
    concerns = lambda failed: all(a is None or a == b for a, b in zip(failed, heads, strict=True))  # noqa: E731
    return next((reason for failed, reason in _FAILURES.items() if concerns(failed)), None)


def _heads(x: Tensor) -> tuple[torch.device, torch.dtype | None, int | None]:
    """Device, dtype and head dim of an operator's first argument; None for what it does not tell.

    It is (..., heads, D), or (B, M, dim) for projections, or the offsets of packed sequences, (n + 1,).
    """
    return x.device, x.dtype if x.ndim > 1 else None, x.shape[-1] if x.ndim > 3 else None


def _serving(backend: str, x: Tensor) -> _Backend:
    """The backend for an operator whose first argument is x."""
    failed = backend == "auto" and _FAILURES and _failure(*_heads(x)) is not None
    return _BACKENDS["torch" if failed or backend == "torch" else "triton"]


def _fell_back(on: _Backend, backend: str) -> bool:
    """Whether PyTorch serves a call that was made for the kernels, so that tensors have their layouts."""
    return backend != "torch" and on is _BACKENDS["torch"]


def _fall_back(failure: _CannotLaunch, x: Tensor) -> None:
    """Leaves such heads to PyTorch from now on, and says so."""
    device, dtype, dim_head = heads = _heads(x)
    _FAILURES[heads] = str(failure)
    of = ("" if dtype is None else f", {dtype}") + ("" if dim_head is None else f", head dim {dim_head}")
    warnings.warn(f"{failure}; from now on PyTorch serves {device}{of}", RuntimeWarning, stacklevel=2)


# Operators: what torch.compile sees of a forward and of a backward. It does not look inside; the fake of an operator
# tells it the shapes.

_OPERATORS = torch.library.Library(_LIBRARY, "FRAGMENT")


def _operator(function: Callable[..., Any] | None = None, *, mutates: Sequence[str] = ()) -> Any:
    """`function` as an operator, <name of this module>::<its name>, which changes those of its arguments alone.

    Precision is its own business, under autocast too, and it runs on the GPU of its first argument, a tensor. Where
    nobody looks at operations and no gradient is recorded, PyTorch's dispatcher is left out: it takes 10 to 30 µs.
    """
    if function is None:
        return functools.partial(_operator, mutates=mutates)
    names = list(inspect.signature(function).parameters)
    packed = names.index("cu_keys") if {"cu_keys", "of_token", "backend"} <= {*names} else None

    def body(*arguments: Any) -> Any:
        try:
            if packed is not None and arguments[packed] is not None:
                given = dict(zip(names, arguments, strict=True))
                if given["backend"] == "torch" and _on_host(given["cu_keys"]) and given["first"] == 0:
                    return _in_rows(function, **given)
            return function(*arguments)
        except _CannotLaunch as failure:
            if not _BACKENDS["triton"].untune(arguments[0].device):  # tiles are tuned in some of all calls only
                if arguments[names.index("backend")] != "auto":
                    raise
                _fall_back(failure, arguments[0])
        return body(*arguments)  # not in the handler, where the failure holds the memory of the first attempt

    run = functools.partial(_run, body)
    name = function.__name__.lstrip("_")
    schema = torch.library.infer_schema(function, mutates_args=mutates)
    _OPERATORS.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _OPERATORS.impl(name, run, "CompositeExplicitAutograd")
    operator = getattr(getattr(torch.ops, _LIBRARY), name).default

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        x = arguments[0]
        recorded = torch.is_grad_enabled() and x.is_floating_point()
        if recorded or _traced() or type(x) is not Tensor:
            return operator(*arguments)
        return run(*arguments)

    call.operator = operator
    return call


def _run(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) without autocast, on the GPU of the first argument, a tensor."""
    x = arguments[0]
    elsewhere = x.is_cuda and x.get_device() != torch.cuda.current_device()
    if elsewhere or _autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False), torch.cuda.device(x.get_device()):
            return function(*arguments)
    return function(*arguments)


def _fake_of(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.library.register_fake(function.operator, lib=_OPERATORS)


def _refuse_gradients(ctx: Any, *_: Tensor) -> None:
    """Backward of the operators for which there is a function below: so nothing goes past it without a word."""
    raise RuntimeError("an operator of Native Sparse Attention has its gradients from torch.autograd.Function alone")


def _in_rows(
    function: Callable[..., Any], *, cu_seqlens: Tensor, cu_keys: Tensor, of_token: Tensor, **arguments: Any
) -> Any:
    """`function` of packed sequences as rows, of those of about equal lengths at a time; its results packed again."""
    order, shapes = _row_groups(cu_seqlens.diff().tolist())
    blocks = [(n, _compressed_count(longest, arguments["block_size"], arguments["stride"])) for n, longest in shapes]
    tokens, keys = _PackedRows.of(cu_seqlens, order, shapes), _PackedRows.of(cu_keys, order, blocks)
    span = arguments.get("window") == 0 and arguments["block_indices"] is None
    of_blocks = {"k", "v"} if span else {"k_cmp", "v_cmp"}
    packing = lambda name: keys if name in of_blocks else tokens  # noqa: E731
    rows = {name: packing(name).split(x) for name, x in arguments.items() if isinstance(x, Tensor)}
    results = []
    for i in range(len(shapes)):
        group = arguments | {name: x[i] for name, x in rows.items()}
        results.append(function(**group, cu_seqlens=None, cu_keys=None, of_token=None))
    if isinstance(results[0], Tensor):
        return tokens.join(results, arguments["q"])
    # A backward returns the gradients of these, and all that a forward returns has the rows of q.
    inputs = ("q", "k", "v", "k_cmp", "v_cmp", "k_local", "v_local")
    names = inputs if "do" in arguments else itertools.repeat("q")
    each = zip(names, zip(*results, strict=True), strict=False)
    return tuple(packing(name).join(groups, arguments[name]) for name, groups in each)


def _row_groups(lengths: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Sequences that have tokens, the longest first, and the shape (n, longest) of each group of rows."""
    order = sorted((i for i, length in enumerate(lengths) if length > 0), key=lambda i: -lengths[i])
    shapes, padding = [(0, 0)], 0
    for length in (lengths[i] for i in order):
        n, longest = shapes[-1]
        padding += longest - length
        if n > 0 and (longest <= 1.25 * length or padding <= _CALL_TOKENS):
            shapes[-1] = (n + 1, longest)
        else:
            shapes.append((1, length))
            padding = 0
    return order, shapes[1:] or shapes


class _PackedRows(NamedTuple):
    """Packed sequences as groups of rows, which go on with zeros where a sequence is shorter than the longest.

    The zeros change nothing: no token sees what comes behind it, and a query without an upstream gradient adds 0 to the
    gradients of keys.
    """

    shapes: list[tuple[int, int]]  # (n, longest) of each group
    slot: Tensor | None  # (total,) number of each token or key in the rows of all groups; None where it is its own

    @classmethod
    def of(cls, offsets: Tensor, order: list[int], shapes: list[tuple[int, int]]) -> _PackedRows:
        offsets = offsets.long()
        size = offsets.new_tensor([longest for n, longest in shapes for _ in range(n)])
        start = offsets.new_zeros(len(offsets) - 1)
        start[order] = size.cumsum(0) - size
        number = torch.arange(int(offsets[-1]), device=offsets.device)
        slot = number + (start - offsets[:-1]).repeat_interleave(offsets.diff())
        return cls(shapes, None if len(number) == size.sum() and torch.equal(slot, number) else slot)

    def split(self, x: Tensor) -> list[Tensor]:
        """Rows of each group; integers go on with −1: (1, total, ...) → (n, longest, ...)."""
        sizes = [math.prod(shape) for shape in self.shapes]
        if self.slot is None:
            x = x[0, : sum(sizes)]
        else:
            rows = x.new_full((sum(sizes), *x.shape[2:]), 0 if x.is_floating_point() else -1)
            x = rows.index_copy_(0, self.slot, x[0, : len(self.slot)])
        return [y.unflatten(0, shape) for y, shape in zip(x.split(sizes), self.shapes, strict=True)]

    def join(self, rows: Sequence[Tensor], like: Tensor | None) -> Tensor:
        """The reverse: (n, longest, ...) of each group → (1, total, ...), and zeros up to the rows of `like`."""
        if like is None:  # a gradient that was not asked for
            return rows[0][:1]
        x = rows[0].flatten(0, 1) if len(rows) == 1 else torch.cat([y.flatten(0, 1) for y in rows])
        x = x if self.slot is None else x.index_select(0, self.slot)
        more = like.shape[1] - len(x)
        return (F.pad(x, (0, 0) * (x.dim() - 1) + (0, more)) if more else x)[None]


def _backend(
    backend: str, x: Tensor, cu_seqlens: Tensor | None, cu_keys: Tensor | None, of_token: Tensor | None,
    row_first: Tensor | None, first: int,
) -> tuple[_Backend, dict[str, Any]]:  # fmt: skip
    """The backend, and for its functions `segments` where sequences are packed, `first` where queries begin later.

    Then the queries of row b begin at position row_first[b] ≤ first, or of all rows at `first`. Those of packed
    sequences are the last of all tokens.
    """
    on, at = _serving(backend, x), {}
    if cu_seqlens is not None:
        at["segments"] = _Segments(cu_seqlens, cu_keys, of_token)
    if first > 0:
        if row_first is None and on is not _BACKENDS["torch"]:
            row_first = torch.full((x.shape[0],), first, dtype=torch.int32, device=x.device)
        at["first"] = first if row_first is None else row_first
    return on, at


@_operator
def _tables(
    cu_seqlens: Tensor, total: int, keys: int, backend: str, block_size: int, stride: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`_Segments` of packed sequences."""
    return tuple(_serving(backend, cu_seqlens).segments(cu_seqlens, total, keys, block_size, stride))


@_fake_of(_tables)
def _(cu_seqlens: Tensor, total: int, keys: int, *_: Any) -> tuple[Tensor, ...]:
    shapes = (cu_seqlens.shape, cu_seqlens.shape, (2, total), (2, keys))
    return tuple(cu_seqlens.new_empty(shape, dtype=torch.int32) for shape in shapes)


@_operator(mutates=("tokens",))
def _cache_append(
    tokens: Tensor, values: list[Tensor], first: Tensor, of_token: Tensor | None, backend: str
) -> None:
    """Writes values (B, M, K, D), or (1, total, K, D) of packed sequences, behind the first tokens of their rows."""
    _serving(backend, tokens).append(tokens, values, first, of_token)


@_fake_of(_cache_append)
def _(*_: Any) -> None: ...


@_operator
def _project_few(
    x: Tensor, q: Tensor, q_bias: Tensor | None, k: Tensor, k_bias: Tensor | None, v: Tensor, v_bias: Tensor | None,
    gates: Tensor | None, gate_bias: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Linear layers of a few tokens x (B, M, dim) by these weights and biases; the last empty without a weight."""
    return _serving(backend, x).project(x, (q, k, v, gates), (q_bias, k_bias, v_bias, gate_bias))


@_fake_of(_project_few)
def _(x: Tensor, q: Tensor, q_bias: Tensor | None, k: Tensor, k_bias: Tensor | None, v: Tensor, v_bias: Tensor | None,
      gates: Tensor | None, gate_bias: Tensor | None, backend: str) -> tuple[Tensor, ...]:  # fmt: skip
    return tuple(x.new_empty((*x.shape[:2], 0 if w is None else w.shape[0])) for w in (q, k, v, gates))


@_operator(mutates=("tokens", "blocks"))
def _cache_extend(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, blocks: Tensor, first: Tensor, of_token: Tensor | None,
    backend: str, theta: float | None, rope_scale: float, frequencies: Tensor | None, block_size: int, stride: int,
    weights: list[Tensor | None],
) -> Tensor:  # fmt: skip
    """Takes projections of new tokens into a cache, behind the first ones of each row → q rotated; empty if it is not.

    With a block size, the compressors with these weights are applied to the blocks that the tokens complete.
    """
    on, rotation = _serving(backend, q), _Rotation(theta, rope_scale, frequencies)
    return on.extend(q, k, v, tokens, blocks, first, of_token, rotation, block_size, stride, weights)


@_fake_of(_cache_extend)
def _(q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, blocks: Tensor, first: Tensor, of_token: Tensor | None,
      backend: str, theta: float | None, rope_scale: float, frequencies: Tensor | None, *_: Any,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape if theta is not None or frequencies is not None else 0)


@_operator
def _cached_forward(
    q: Tensor, tokens: Tensor, blocks: Tensor, logits: Tensor, first: Tensor, of_token: Tensor | None, backend: str,
    local_window: int, block_size: int, stride: int, select_block_size: int, topk_blocks: int, init_blocks: int,
    local_blocks: int, scale: float,
) -> Tensor:  # fmt: skip
    """o of queries that stand behind the first tokens of their rows, over the keys of a cache, which has theirs."""
    choice = _Choice(block_size, stride, select_block_size, topk_blocks, init_blocks, local_blocks)
    return _serving(backend, q).decode(q, tokens, blocks, logits, first, of_token, local_window, choice, scale)


@_fake_of(_cached_forward)
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


def _cache_keys(tokens: Tensor, blocks: Tensor) -> tuple[Tensor, ...]:
    """k, v, k_local, v_local (B, max_len, K, D), k_cmp and v_cmp of a cache."""
    streams = [*tokens[:, :, :-1], *blocks[:, :, :-1]]
    local = 2 if len(tokens) == 6 else 0
    return *streams[:2], *streams[local : local + 2], *streams[-2:]


def _fake_output(q: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of o and lse."""
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=_accumulation_dtype(q))


def _fake_like(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors)


@_operator
def _branch_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor | None,
    cu_seqlens: Tensor | None, cu_keys: Tensor | None, of_token: Tensor | None, row_first: Tensor | None, backend: str,
    window: int, block_size: int, stride: int, scale: float, first: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and lse over the blocks of `block_size` tokens that are chosen; without a choice, over the spans."""
    on, at = _backend(backend, q, cu_seqlens, cu_keys, of_token, row_first, first)
    if block_indices is None:
        return on.span_forward(q, k, v, _Span(window, block_size, stride), scale, **at)
    return on.selected_forward(q, k, v, block_indices, block_size, scale, **at)[:2]


@_fake_of(_branch_forward)
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _fake_output(q)


torch.library.register_autograd(_branch_forward.operator, _refuse_gradients, lib=_OPERATORS)


@_operator
def _branch_backward(
    do: Tensor, dlse: Tensor, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor | None,
    cu_seqlens: Tensor | None, cu_keys: Tensor | None, of_token: Tensor | None, row_first: Tensor | None, backend: str,
    window: int, block_size: int, stride: int, scale: float, first: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv."""
    on, at = _backend(backend, do, cu_seqlens, cu_keys, of_token, row_first, first)
    (terms,) = _row_terms(on.preprocess(do, [o], [lse], k.shape[2], dlse=dlse)[0])
    if block_indices is None:
        span = _Span(window, block_size, stride)
        dq, dk, dv = on.span_backward(do, terms, q, k, v, span, scale, **at)
    else:
        dq, dk, dv = on.selected_backward(do, terms, q, k, v, block_indices, block_size, scale, **at)
    return dq.to(q.dtype).contiguous(), dk, dv


@_fake_of(_branch_backward)
def _(do: Tensor, dlse: Tensor, o: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return _fake_like(*inputs[:3])


@_operator
def _select(
    q: Tensor, k_cmp: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, cu_keys: Tensor | None, of_token: Tensor | None, row_first: Tensor | None, backend: str,
    block_size: int, stride: int, select_block_size: int, topk_blocks: int, init_blocks: int, local_blocks: int,
    scale: float, first: int,
) -> Tensor:  # fmt: skip
    """block_indices."""
    on, at = _backend(backend, q, cu_seqlens, cu_keys, of_token, row_first, first)
    choice = _Choice(block_size, stride, select_block_size, topk_blocks, init_blocks, local_blocks)
    return on.select(q, k_cmp, lse, choice, scale, **at, max_len=first + q.shape[1])


@_fake_of(_select)
def _(q: Tensor, k_cmp: Tensor, *others: Any) -> Tensor:
    topk_blocks = others[9]
    return q.new_empty(*q.shape[:2], k_cmp.shape[2], topk_blocks, dtype=torch.int32)


def _index_room(
    q: Tensor, k: Tensor, S: int, select_block_size: int, cu_seqlens: Tensor | None, backend: str
) -> Tensor:
    """Memory for an index: four numbers of each block, one of each slot of a query; none for PyTorch's backend."""
    (B, T), (T_keys, K) = q.shape[:2], k.shape[1:3]
    if backend == "torch":
        return q.new_empty(B, T, 0, dtype=torch.int32)
    more = 1 if cu_seqlens is None else cu_seqlens.shape[0]
    blocks = T_keys // select_block_size + more  # as many as there are, or one more
    return q.new_empty(B * K * (4 * blocks + T * S), dtype=torch.int32)


@_operator
def _attention_forward(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor,
    k_local: Tensor | None, v_local: Tensor | None,
    cu_seqlens: Tensor | None, cu_keys: Tensor | None, of_token: Tensor | None, row_first: Tensor | None, backend: str,
    local_window: int, block_size: int, stride: int, select_block_size: int, topk_blocks: int, init_blocks: int,
    local_blocks: int, scale: float, recompute: bool, first: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """o; o of the local, the compressed and the selective branch; their lse; block_indices, and an index of them.

    The first of the branches is empty where the backward is to `recompute` it. Queries begin at position `first`.
    """
    on, at = _backend(backend, q, cu_seqlens, cu_keys, of_token, row_first, first)
    choice = _Choice(block_size, stride, select_block_size, topk_blocks, init_blocks, local_blocks)
    local = (k, v) if k_local is None else (k_local, v_local)
    o_local, lse_local = on.span_forward(q, *local, _Span(local_window), scale, **at)
    o_compressed, lse_compressed = on.span_forward(q, k_cmp, v_cmp, choice.span, scale, **at)
    chosen = on.select(q, k_cmp, lse_compressed, choice, scale, **at, max_len=first + q.shape[1])
    index = _index_room(q, k, topk_blocks, select_block_size, cu_seqlens, backend)
    o_selective, lse_selective, o = on.selected_forward(
        q, k, v, chosen, select_block_size, scale, gated=(gates, o_local, o_compressed), index=index, **at
    )
    o_local = q.new_empty(*q.shape[:2], 0) if recompute else o_local
    return o, o_local, o_compressed, o_selective, lse_local, lse_compressed, lse_selective, chosen, index


@_fake_of(_attention_forward)
def _(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor,
    k_local: Tensor | None, v_local: Tensor | None,
    cu_seqlens: Tensor | None, cu_keys: Tensor | None, of_token: Tensor | None, row_first: Tensor | None, backend: str,
    local_window: int, block_size: int, stride: int, select_block_size: int, topk_blocks: int, init_blocks: int,
    local_blocks: int, scale: float, recompute: bool, first: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    outputs, lses = map(list, zip(*(_fake_output(q) for _ in range(3)), strict=True))
    chosen = q.new_empty(*q.shape[:2], k.shape[2], topk_blocks, dtype=torch.int32)
    index = _index_room(q, k, topk_blocks, select_block_size, cu_seqlens, backend)
    outputs[0] = q.new_empty(*q.shape[:2], 0) if recompute else outputs[0]
    return *_fake_like(q), *outputs, *lses, chosen, index


torch.library.register_autograd(_attention_forward.operator, _refuse_gradients, lib=_OPERATORS)


def _term_room(do: Tensor, kv_heads: int, branches: int, backend: str) -> Tensor:
    """Memory for the terms of all query rows; the kernels' tiles, of up to 128 rows, may begin at any of them."""
    B, T, H, _ = do.shape
    if backend == "torch":
        return do.new_empty(B, T, 2 * branches, H, dtype=_accumulation_dtype(do))
    rows = T << (H // kv_heads - 1).bit_length()  # of a group, rounded up to a power of two
    return do.new_empty(B, kv_heads, 2 * branches, (rows + 255) // 128 * 128, dtype=torch.float32)


def _kernel_terms(terms: Tensor, do: Tensor, kv_heads: int) -> Tensor:
    """PyTorch's terms (B, T, 2·branches, H) in the layout of the kernels: rows padded, lse to the base 2."""
    room = _term_room(do, kv_heads, terms.shape[2] // 2, "triton")
    _existing_rows(room, do).copy_(_scaled_lse(terms, _LOG2E).unflatten(3, (kv_heads, -1)))
    return room


def _torch_terms(terms: Tensor, do: Tensor) -> Tensor:
    """The reverse: terms of the kernels in PyTorch's layout."""
    return _scaled_lse(_existing_rows(terms, do).flatten(3), 1 / _LOG2E)


def _existing_rows(terms: Tensor, do: Tensor) -> Tensor:
    """Terms of the kernels (B, K, 2·branches, rows) → (B, T, 2·branches, K, G), a view."""
    (_, T, H, _), K = do.shape, terms.shape[1]
    pad = 1 << (H // K - 1).bit_length()
    return terms[..., : T * pad].unflatten(3, (T, pad))[..., : H // K].permute(0, 3, 2, 1, 4)


def _scaled_lse(terms: Tensor, factor: float) -> Tensor:
    lse, delta = terms[:, :, ::2], terms[:, :, 1::2]
    return torch.stack([lse * factor, delta], dim=3).flatten(2, 3)


@_operator
def _gated_terms(
    do: Tensor, o_local: Tensor, o_compressed: Tensor, o_selective: Tensor,
    lse_local: Tensor, lse_compressed: Tensor, lse_selective: Tensor, gates: Tensor, kv_heads: int, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Terms of the three branches, which take their gates into them, and dgates.

    An operator of its own, so that the branches' outputs are freed before the rest of the backward takes its memory.
    """
    outputs, lses = [o_local, o_compressed, o_selective], [lse_local, lse_compressed, lse_selective]
    on = _serving(backend, do)
    terms, dgates = on.preprocess(do, outputs, lses, kv_heads, gates=gates)
    return _kernel_terms(terms, do, kv_heads) if _fell_back(on, backend) else terms, dgates


@_fake_of(_gated_terms)
def _(do: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, gates, kv_heads, backend = others
    return _term_room(do, kv_heads, 3, backend), gates.new_empty(gates.shape)


@_operator
def _attention_backward(
    do: Tensor, terms: Tensor, block_indices: Tensor, index: Tensor,
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_local: Tensor | None, v_local: Tensor | None,
    cu_seqlens: Tensor | None, cu_keys: Tensor | None, of_token: Tensor | None, row_first: Tensor | None, backend: str,
    local_window: int, block_size: int, stride: int, select_block_size: int, scale: float, first: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dk_cmp, dv_cmp, dk_local, dv_local; the last two are empty where k and v serve all.

    The branches add up their dq in place.
    """
    on, at = _backend(backend, do, cu_seqlens, cu_keys, of_token, row_first, first)
    terms = _torch_terms(terms, do) if _fell_back(on, backend) else terms
    local, compressed, selective = _row_terms(terms)
    own_keys = k_local is not None
    keys = (k_local, v_local) if own_keys else (k, v)
    dq, dk_local, dv_local = on.span_backward(do, local, q, *keys, _Span(local_window), scale, **at)
    span = _Span(0, block_size, stride)
    dq, dk_cmp, dv_cmp = on.span_backward(do, compressed, q, k_cmp, v_cmp, span, scale, dq=dq, **at)
    sums = {"dq": dq} if own_keys else {"dq": dq, "dk": dk_local, "dv": dv_local}
    dq, dk, dv = on.selected_backward(
        do, selective, q, k, v, block_indices, select_block_size, scale, index=index, **sums, **at
    )
    if not own_keys:
        dk_local, dv_local = k.new_empty(0), v.new_empty(0)
    return dq.to(q.dtype).contiguous(), dk, dv, dk_cmp, dv_cmp, dk_local, dv_local


@_fake_of(_attention_backward)
def _(*arguments: Any) -> tuple[Tensor, ...]:
    *inputs, k_local, v_local = arguments[4:11]
    local = _fake_like(k_local, v_local) if k_local is not None else [x.new_empty(0) for x in inputs[1:3]]
    return *_fake_like(*inputs), *local


# Two compressors, of keys and of values, that are alike in shapes, or the first alone.


@_operator
def _compress_forward(
    k: Tensor, v: Tensor | None,
    k_position: Tensor, k_w_in: Tensor, k_b_in: Tensor, k_w_out: Tensor | None, k_b_out: Tensor | None,
    v_position: Tensor | None, v_w_in: Tensor | None, v_b_in: Tensor | None, v_w_out: Tensor | None,
    v_b_out: Tensor | None, cu_seqlens: Tensor | None, cu_keys: Tensor | None, of_key: Tensor | None, backend: str,
    stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compressed keys and values (1 or 2, B, C, K, D); hidden units (1 or 2, C·B·K, N), empty if there is one layer."""
    of_k, of_v = (k_position, k_w_in, k_b_in, k_w_out, k_b_out), (v_position, v_w_in, v_b_in, v_w_out, v_b_out)
    segments = _Segments(cu_seqlens, cu_keys, of_key=of_key)
    return _serving(backend, k).compress((k, v), of_k, of_v, segments, stride)


@_fake_of(_compress_forward)
def _(
    k: Tensor, v: Tensor | None, k_position: Tensor, k_w_in: Tensor, k_b_in: Tensor, k_w_out: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    (B, T, K, D), of_key, _, stride = k.shape, *others[-3:]
    C = _compressed_count(T, k_position.shape[0], stride) if of_key is None else of_key.shape[1]
    n = 1 if v is None else 2
    hidden = k.new_empty(0 if k_w_out is None else (n, C * B * K, k_w_in.shape[0]))
    return k.new_empty(n, B, C, K, D), hidden


torch.library.register_autograd(_compress_forward.operator, _refuse_gradients, lib=_OPERATORS)


@_operator
def _compress_backward(
    dk_cmp: Tensor, dv_cmp: Tensor | None, k: Tensor, v: Tensor | None,
    k_position: Tensor, k_w_in: Tensor, k_w_out: Tensor | None,
    v_position: Tensor | None, v_w_in: Tensor | None, v_w_out: Tensor | None,
    hidden: Tensor, cu_seqlens: Tensor | None, cu_keys: Tensor | None, of_key: Tensor | None, backend: str, stride: int,
    of_x: bool, of_weights: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv (1 or 2, B, T, K, D); gradients of the layers of both, one after another; empty if not wanted."""
    of_k, of_v = (k_position, k_w_in, k_w_out), (v_position, v_w_in, v_w_out)
    settings = (hidden, _Segments(cu_seqlens, cu_keys, of_key=of_key), stride, of_x, of_weights)
    return _serving(backend, dk_cmp).compress_backward((dk_cmp, dv_cmp), (k, v), of_k, of_v, *settings)


@_fake_of(_compress_backward)
def _(
    dk_cmp: Tensor, dv_cmp: Tensor | None, k: Tensor, v: Tensor | None, k_position: Tensor, k_w_in: Tensor,
    k_w_out: Tensor | None, *others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, of_x, of_weights = 1 if v is None else 2, *others[-2:]
    shapes = _layer_shapes(*k_position.shape, k_w_in.shape[0], 1 if k_w_out is None else 2)
    size = n * sum(map(math.prod, shapes))
    return k.new_empty((n, *k.shape) if of_x else 0), k.new_empty(size if of_weights else 0)


def _layer_shapes(block: int, D: int, N: int, layers: int) -> list[tuple[int, ...]]:
    """Shapes of the layers of a learned compressor: position, w_in, b_in; of a second layer w_out, b_out."""
    return [(block, D), (N, block * D), (N,), (D, N), (D,)][: 1 + 2 * layers]


# torch.compile takes no tensor twice as an argument of an autograd function. Where nothing needs a gradient, it counts
# the parameters of `forward` to learn whether a context comes first, so that *tensors would mislead it.


def _apart(*tensors: Tensor | None) -> Sequence[Tensor | None]:
    """The tensors, each its own in compiled code: one that came before comes again as a view."""
    if not torch.compiler.is_compiling():
        return tensors
    again = lambda i, x: x is not None and any(x is y for y in tensors[:i])  # noqa: E731
    return [x.view_as(x) if again(i, x) else x for i, x in enumerate(tensors)]


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """function.apply(*arguments), without what torch.func needs where it is not at work: two thirds of the time."""
    if _traced():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)


class _BranchFunction(torch.autograd.Function):
    """One branch → o, lse. Saves its arguments and results, never a probability.

    settings: backend, window, block_size, stride, scale, first.
    """

    @staticmethod
    def forward(
        settings: tuple[Any, ...], cu_seqlens: Tensor | None, cu_keys: Tensor | None, of_token: Tensor | None,
        row_first: Tensor | None, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return _branch_forward(q, k, v, block_indices, cu_seqlens, cu_keys, of_token, row_first, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.settings, *segments = inputs[:5]
        ctx.save_for_backward(*output, *inputs[5:], *segments)

    @staticmethod
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint gives them no second time
        with torch.no_grad():
            gradients = _branch_backward(do, dlse, *saved, *ctx.settings)
        return *(None,) * 5, *_first_gradients(gradients, do, dlse, *saved), None


class _AttentionFunction(torch.autograd.Function):
    """Gated sum of the branches → o, and what backward reads.

    settings: backend, window, the six numbers of a `_Choice`, scale, recompute, first.
    """

    @staticmethod
    def forward(
        settings: tuple[Any, ...], cu_seqlens: Tensor | None, cu_keys: Tensor | None, of_token: Tensor | None,
        row_first: Tensor | None, q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, gates: Tensor,
        k_local: Tensor | None, v_local: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        tensors = (q, k, v, k_cmp, v_cmp, gates, k_local, v_local)
        return _attention_forward(*tensors, cu_seqlens, cu_keys, of_token, row_first, *settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings, *segments = inputs[:5]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # of what is not differentiable: it would be as large as the outputs
        ctx.save_for_backward(*output[1:], *inputs[5:], *segments)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if do is None:  # o took no part in what is differentiated
            return (None,) * 13
        backend, window, block_size, stride, select_block_size, *_, scale, recompute, first = ctx.settings
        saved = ctx.saved_tensors
        if not _traced():
            ctx.maybe_clear_saved_tensors()  # the outputs of the branches are freed with the last name for them
        outputs, (*lses, block_indices, index), saved = list(saved[:3]), saved[3:8], saved[8:]
        q, k, v, k_cmp, v_cmp, gates, k_local, v_local, *segments = saved
        own_keys = ctx.needs_input_grad[11] or ctx.needs_input_grad[12]
        with torch.no_grad():
            if recompute:
                keys = (k, v) if k_local is None else (k_local, v_local)
                outputs[0], _ = _branch_forward(q, *keys, None, *segments, backend, *_Span(window), scale, first)
            terms, dgates = _gated_terms(do, *outputs, *lses, gates, k.shape[2], backend)
            del outputs
            settings = (*segments, backend, window, block_size, stride, select_block_size, scale, first)
            tensors = (q, k, v, k_cmp, v_cmp, k_local, v_local)
            *gradients, dk_local, dv_local = _attention_backward(do, terms, block_indices, index, *tensors, *settings)
        local = (dk_local, dv_local) if own_keys else (None, None)
        return *(None,) * 5, *_first_gradients((*gradients, dgates, *local), do, *saved)


class _CompressionFunction(torch.autograd.Function):
    """Layers of learned compressors by kernels → k_cmp and v_cmp; without v, k_cmp alone.

    settings: backend, stride.

    Once differentiable, and without a context for torch.func, whose transforms take the plain composition.
    """

    @staticmethod
    def forward(
        ctx: Any, settings: tuple[Any, ...], cu_seqlens: Tensor | None, cu_keys: Tensor | None, of_key: Tensor | None,
        k: Tensor, v: Tensor | None,
        k_position: Tensor, k_w_in: Tensor, k_b_in: Tensor, k_w_out: Tensor | None, k_b_out: Tensor | None,
        v_position: Tensor | None, v_w_in: Tensor | None, v_b_in: Tensor | None, v_w_out: Tensor | None,
        v_b_out: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        of_k, of_v = (k_position, k_w_in, k_b_in, k_w_out, k_b_out), (v_position, v_w_in, v_b_in, v_w_out, v_b_out)
        tables = cu_seqlens, cu_keys, of_key
        y, hidden = _compress_forward(k, v, *of_k, *of_v, *tables, *settings)
        ctx.settings = settings
        ctx.save_for_backward(k, v, k_position, k_w_in, k_w_out, v_position, v_w_in, v_w_out, hidden, *tables)
        return y.unbind()

    @staticmethod
    def backward(ctx: Any, dk_cmp: Tensor, dv_cmp: Tensor | None = None) -> tuple[Tensor | None, ...]:
        saved, wanted = ctx.saved_tensors, ctx.needs_input_grad
        of_x, of_weights = any(wanted[4:6]), any(wanted[6:])
        with torch.no_grad():
            dx, dw = _compress_backward(dk_cmp, dv_cmp, *saved, *ctx.settings, of_x, of_weights)
        _, _, position, w_in, w_out, *_ = saved
        inputs = [*dx.unbind(), None][:2] if of_x else [None, None]
        of_layers: list[Tensor | None] = []
        if of_weights:
            shapes, n = _layer_shapes(*position.shape, len(w_in), 1 if w_out is None else 2), 1 if dv_cmp is None else 2
            parts = dw.split_with_sizes([math.prod(shape) for shape in shapes] * n)
            parts = [x if len(shape) == 1 else x.view(shape) for x, shape in zip(parts, shapes * n, strict=True)]
            for i in range(0, len(parts), len(shapes)):
                of_layers += [*parts[i : i + len(shapes)], *[None] * (5 - len(shapes))]
        gradients = (*inputs, *of_layers, *[None] * (10 - len(of_layers)))
        return *(None,) * 4, *_first_gradients(gradients, dk_cmp, dv_cmp, *saved)


class _AddLoss(torch.autograd.Function):
    """o as it is, whose backward also differentiates a loss: as if it had been added to what is differentiated."""

    @staticmethod
    def forward(o: Tensor, loss: Tensor) -> Tensor:
        return o.view_as(o)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor]:
        return do, torch.ones_like(*ctx.saved_tensors)


class _FirstGradients(torch.autograd.Function):
    """The gradients as they are, and an error for whoever differentiates them.

    torch's once_differentiable raises only where the upstream gradient requires one itself. A gradient penalty, whose
    upstream gradient is a constant, would lose its own gradient without a word.
    """

    @staticmethod
    def forward(count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("Native Sparse Attention has first derivatives only: this needs the gradient of a gradient")


def _traced() -> bool:
    """Whether others look at each operation: torch.compile, a transform of torch.func, or a dispatch mode."""
    return torch.compiler.is_compiling() or _transformed()


def _transformed() -> bool:
    """Whether a transform of torch.func looks at each operation, or a dispatch mode other than torch.compile's own."""
    if torch._C._are_functorch_transforms_active():
        return True
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def _first_gradients(gradients: tuple[Tensor | None, ...], *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of a backward that read these inputs; where a graph of it is recorded, to be differentiated once.

    Compiled code has no second derivatives, and says so itself.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    return _FirstGradients.apply(len(gradients), *gradients, *(x for x in inputs if x is not None))


def _rope_cos_sin(
    positions: Tensor, half: int, theta: float | None, scale: float, frequencies: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """scale · cosine and sine of positions · frequencies, or theta^(−2i/D) for i < D/2: (..., T) → (2, ..., T, D/2)."""
    if frequencies is None:  # float64: a position may be a million
        options = {"base": theta, "dtype": torch.float64, "device": positions.device}
        frequencies = torch.logspace(0, (1 - half) / half, half, **options)
    angles = positions[..., None] * frequencies
    cos_sin = angles.new_empty((2, *angles.shape), dtype=dtype)
    for wave, out in zip((torch.cos, torch.sin), cos_sin, strict=True):
        wave(angles, out=out) if scale == 1 else torch.mul(wave(angles), scale, out=out)
    return cos_sin


# Compiled code that saw inside would compute them anew for each head and each use, which has taken a quarter of a step.
_rope_operator = _operator(_rope_cos_sin)


@_fake_of(_rope_operator)
def _(positions: Tensor, half: int, theta: float | None, scale: float, frequencies: Tensor | None,
      dtype: torch.dtype) -> Tensor:  # fmt: skip
    return positions.new_empty((2, *positions.shape, half), dtype=dtype)


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 7  Block rules, and the PyTorch backend
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


def _compressed_count(tokens: int, block_size: int, stride: int) -> int:
    """C: compressed block i covers the tokens [i·d, i·d + l), and only whole blocks count."""
    return max(0, (tokens - block_size) // stride + 1)


def _selection_count(tokens: int, select_block_size: int) -> int:
    """N: selection block j covers the tokens [j·l', (j + 1)·l'); the last may be cut short by the sequence's end."""
    return -(-tokens // select_block_size)


class _Span(NamedTuple):
    """Keys that a query sees in the local and in the compressed branch: one contiguous span.

    Key i covers the tokens [i·d, i·d + l), and a query at t sees it once its last token is there: i·d + l − 1 ≤ t. In
    the local branch a key is a token, l = d = 1, and the last W count; a window of 0 has no limit.
    """

    window: int
    block_size: int = 1
    stride: int = 1

    @classmethod
    def block(cls, size: int) -> _Span:
        """Selection blocks, for the operators; a span is not asked for."""
        return cls(0, size, size)

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        seen = key * self.stride + self.block_size - 1 <= query
        return seen & (key > query - self.window) if self.window else seen

    def keys(self, start: int, stop: int) -> slice:
        """Keys that any of the queries [start, stop) sees."""
        first = max(0, start - self.window + 1) if self.window else 0
        return slice(first, _compressed_count(stop, self.block_size, self.stride))


class _Choice(NamedTuple):
    """Sizes of the choice of blocks."""

    block_size: int
    stride: int
    select_block_size: int
    topk_blocks: int
    init_blocks: int
    local_blocks: int

    @property
    def span(self) -> _Span:
        """Compressed keys that a query sees."""
        return _Span(0, self.block_size, self.stride)


def _block_importance(p: Tensor, block_size: int, stride: int, select_block_size: int, blocks: int) -> Tensor:
    """Paper eq. 9: probabilities of compressed blocks → importance of selection blocks.

    importance[j] = Σ_i overlap(i, j) · p[i], overlap(i, j) = tokens shared by compressed block i and selection block j,
    in units of d. Both sizes are multiples of d, so we count in cells of d tokens: block i spreads p[i] over its l/d
    cells, and block j gathers its l'/d cells. For l/d/l' = 32/16/64 that weighs p with 1, 2, 2, 2, 1.

    p: (..., C) → (..., N), N = blocks.
    """
    if blocks == 1:  # however long it is, all lie in it
        return block_size // stride * p.sum(-1, keepdim=True)
    gather = select_block_size // stride
    # No whole block ends behind the last selection block, so that as many cells are enough.
    cells = _trailing_sums(F.pad(p, (0, blocks * gather - p.shape[-1])), block_size // stride)
    return cells.unflatten(-1, (blocks, gather)).sum(-1)  # (..., N·l'/d) → (..., N)


def _trailing_sums(x: Tensor, count: int) -> Tensor:
    """Σ_{m < count} x[..., i − m]. Where the terms are equal but for zeros, so are the sums, to the bit: ties stay."""
    shifted = lambda y, by: F.pad(y, (by, 0))[..., : y.shape[-1]]  # noqa: E731
    if count <= 8:
        return functools.reduce(torch.add, (shifted(x, m) for m in range(count)))
    total = x.double().cumsum(-1)  # in a time that does not depend on the count
    return (total - shifted(total, count)).to(x.dtype)


def _highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores of each row, ascending. Of equal scores the lower index wins."""
    if not _on_host(scores):
        highest = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
        return highest.sort(dim=-1).values
    # On a CPU topk partitions rows as a whole, up to 64·count numbers; longer ones it sorts in part, twice as fast.
    spare = 64 * count - scores.shape[-1]
    worth = scores.device.type == "cpu" and 0 < spare < 40 * count
    values, index = (F.pad(scores, (0, spare), value=-math.inf) if worth else scores).topk(count)
    # topk breaks ties as it likes. Only where a tie straddles the last place does that matter: sort those rows stably.
    tied = (scores >= values[..., -1:]).sum(-1) > count
    if tied.any():
        index[tied] = scores[tied].sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return index.sort(dim=-1).values


def _choose_blocks(importance: Tensor, query: Tensor, choice: _Choice) -> Tensor:
    """Paper eq. 11 with the forced blocks of §3.3.2: the S highest blocks of each row, ascending, −1 in free slots.

    Candidates start at or before the query. Forced ones rank before all others; ties go to the lower index.

    importance: (..., T, N), 0 or more; query: (T,) or (..., T) positions → int32 (..., T, S).
    """
    block = torch.arange(importance.shape[-1], device=importance.device)
    own = (query // choice.select_block_size)[..., None]  # (T, 1): the block that the query stands in
    forced = _is_forced(block, own, choice)
    # Blocks behind the query take distinct negative scores: they fill what is left over, last and in order.
    scores = importance.masked_fill(forced, math.inf)
    scores = torch.where(block > own, -1.0 - block.to(scores.dtype), scores)
    chosen = _highest(scores, min(choice.topk_blocks, scores.shape[-1]))
    chosen = chosen.masked_fill(chosen > own, -1)  # ascending already puts them last
    return F.pad(chosen, (0, choice.topk_blocks - chosen.shape[-1]), value=-1).int()


def _is_forced(block: Tensor, own: Tensor, choice: _Choice | NSAConfig) -> Tensor:
    """Whether blocks are always chosen: the first, and the last up to the query's own (§3.3.2). True of later ones."""
    return (block < choice.init_blocks) | (block > own - choice.local_blocks)


# PyTorch backend ──────────────────────────────────────────────────────────────────────────────────────────────────────
#
# Forward and backward of each branch on any device, in tiles, so that nothing of size T × T exists. A tile is a batch
# of small dense attentions: for each of b heads (or b blocks), M query tokens of a group against n keys. The branches
# differ in their tiles alone: local and compressed attention walk along the sequence; selected attention sorts the
# (query, chosen block) pairs by block and lets every block meet the queries that chose it, so that keys are read once
# a tile rather than gathered for each query. A backward recomputes the probabilities from the log-sum-exp. A forward
# may begin at a position `first`, over keys that begin at 0: so new queries go on over the keys of a cache.
#
# Where the host must not look at values, on a GPU, packed sequences and the rows of a cache are cut into rows of 64
# queries by tables on the device, each row gathers the keys of its sequence that it may see, and selected attention
# gathers the keys of each query's blocks: more memory traffic, no number that depends on lengths or on the choice.

_TILE_SCORES = 2**20  # scores in a batch of tiles: 4 MiB, near the caches; 2**18 and 2**22 took a fifth longer at 32k
_PAIR_TILE = 64  # pairs of one selection block in a tile: 32 starves the matrix product, 128 pads more
_PARTIAL_VALUES = 2**24  # numbers in the partial outputs of a chunk of rows, 64 MiB; short chunks half-fill tiles
_FEW = 16  # tokens that are a step rather than a prompt
_LOG2E = math.log2(math.e)
_HIDDEN = -1e30


def _on_host(x: Tensor) -> bool:
    """Whether a look at the values costs nothing. Elsewhere tables on the device take its place."""
    return x.device.type == "cpu"


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _wide_zeros(x: Tensor) -> Tensor:
    """Zeros of x's shape in the accumulation dtype, contiguous."""
    return torch.zeros(x.shape, dtype=_accumulation_dtype(x), device=x.device)


def _hide(hidden: Tensor, like: Tensor) -> Tensor:
    """Ceiling of the scores: −1e30 hides one, whatever it was; +∞ leaves it.

    Finite, so that a row that sees nothing makes no NaN. A minimum hides an overflow too, which a sum would not.
    """
    ceiling = torch.full(hidden.shape, math.inf, dtype=_accumulation_dtype(like), device=hidden.device)
    return ceiling.masked_fill_(hidden, _HIDDEN)


def _tile_scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, offset: Tensor) -> Tensor:
    """min(offset + scale·q·kᵀ, mask), (b, M·G, n).

    q: (b, M·G, D), k: (b, n, D), mask: from `_hide`, broadcasting to (b, M, G, n), offset: to (b, M·G, 1).
    """
    s = torch.baddbmm(offset, q, k.mT, alpha=scale)
    if mask is not None:
        s.unflatten(1, (mask.shape[-3], -1)).clamp_(max=mask)  # seven times faster than masked_fill
    return s


def _tile_softmax(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax within a batch of tiles, (b, M·G, n), and its log-sum-exp, (b, M·G), near −1e30 where nothing is seen."""
    s = _tile_scores(q, k, mask, scale, q.new_zeros(1, 1, 1))
    p = s.softmax(-1)
    # log p = s − lse, read at the row's maximum: no second pass of exponentials.
    return p, s.amax(-1) - p.amax(-1).log()


def _broken_keys(k: Tensor, v: Tensor) -> Tensor | None:
    """True for keys that hold NaN or infinity, (b, n); None where a look at the host tells that there are none."""
    if _on_host(k) and math.isfinite(k.sum() + v.sum()):
        return None
    return ~(k.isfinite() & v.isfinite()).all(-1)


def _tile_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """o = softmax(scale·q·kᵀ)·v, (b, M·G, D), and lse, (b, M·G), of a batch of tiles; 0 and −inf in blind rows.

    In a product of matrices a hidden NaN is one all the same, 0·NaN. So keys that are not finite count as 0, and the
    rows that see one become NaN.
    """
    broken = _broken_keys(k, v)
    if broken is not None:
        k, v = (x.masked_fill(broken[..., None], 0.0) for x in (k, v))
    p, lse = _tile_softmax(q, k, mask, scale)
    o = torch.bmm(p, v)
    if mask is not None:
        blind = lse < _HIDDEN / 2
        o.masked_fill_(blind[..., None], 0.0)
        lse.masked_fill_(blind, -math.inf)
    if broken is not None:
        seen = broken[:, None] if mask is None else (broken[:, None, None] & (mask > 0)).any(2)  # (b, 1 or M, n)
        seen = seen.any(-1, keepdim=True).expand(-1, -1, q.shape[1] // seen.shape[1]).flatten(1)  # (b, M·G)
        o.masked_fill_(seen[..., None], math.nan)
        lse.masked_fill_(seen, math.nan)
    return o, lse


class _Rows(NamedTuple):
    """Query rows of a tile as its backward reads them: (b, M·G, D) and (b, M·G)."""

    q: Tensor
    do: Tensor
    lse: Tensor  # as in `_RowTerms`
    delta: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> _Rows:
        return _Rows(*map(function, self))


def _tile_backward(
    rows: _Rows, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """P = exp(scale·Q·Kᵀ − lse), for the lse of whole rows, which may span tiles; then

    dV = Pᵀ·dO,  dS = P·(dO·Vᵀ − delta),  dQ = scale·dS·K,  dK = scale·dSᵀ·Q.  → (b, M·G, D), twice (b, n, D)
    """
    # In powers of two, which a CPU computes several times faster than exp.
    p = _tile_scores(rows.q, k, mask, scale * _LOG2E, rows.lse[..., None] * -_LOG2E).exp2_()
    ds = torch.baddbmm(rows.delta[..., None], rows.do, v.mT, beta=-1).mul_(p)
    dq = torch.bmm(ds, k).mul_(scale)
    dk = torch.bmm(ds.mT, rows.q).mul_(scale)
    return dq, dk, torch.bmm(p.mT, rows.do)


def _torch_preprocess(
    do: Tensor, outputs: Sequence[Tensor], lses: Sequence[Tensor], kv_heads: int, gates: Tensor | None = None,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """lse and delta of each branch, (B, T, 2·branches, H); and the gradient of the gates where they have any."""
    dot = lambda o, dtype: torch.einsum("bthd,bthd->bth", do.to(dtype), o.to(dtype))  # noqa: E731
    dots = [dot(o, lse.dtype) for o, lse in zip(outputs, lses, strict=True)]
    terms = []
    for c, (lse, delta) in enumerate(zip(lses, dots, strict=True)):
        gate = torch.ones_like(lse) if gates is None else gates[..., c].to(lse.dtype)
        gated = (lse - gate.log()).masked_fill_((gate == 0) | (lse == -math.inf), math.inf)
        terms += [gated, delta if dlse is None else delta - dlse]
    return torch.stack(terms, dim=2), None if gates is None else torch.stack(dots, dim=-1).to(gates.dtype)


# Local and compressed: tiles along the sequence ───────────────────────────────────────────────────────────────────────


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(B, T, K·g, ...) → (B, T, K, g, ...), a view; g is G for queries and 1 for keys."""
    return x.unflatten(2, (kv_heads, -1))


class _Tile(NamedTuple):
    """Some sequences and key heads, some queries, and all the keys that they see."""

    batch: slice
    heads: slice
    queries: slice
    positions: Tensor  # (M,), or (b, M), of the queries: where they stand in their sequence
    stop: int  # all positions are lower
    keys: slice | Tensor  # or numbers (b, n) among all keys, −1 where there is none
    mask: Tensor  # (M, 1, n), or (b·k, M, 1, n), from `_hide`

    def rows(self, x: Tensor) -> Tensor:
        """Rows of the tile's queries: x (B, T, K, g, ...) → (b, M, k, g, ...), a view."""
        return x[self.batch, self.queries, self.heads]

    def columns(self, x: Tensor) -> Tensor:
        """Rows of the tile's keys: x (B, T or C, K, 1, D) → (b, n, k, 1, D), a view or, of numbers, a copy."""
        if isinstance(self.keys, slice):
            return x[self.batch, self.keys, self.heads]
        rows = x.flatten(0, 1).index_select(0, self.keys.flatten().clamp(min=0)).unflatten(0, self.keys.shape)
        return rows.masked_fill_((self.keys < 0)[..., None, None, None], 0.0)

    def add_columns(self, x: Tensor, y: Tensor) -> None:
        """Adds y (b·k, n, D) to the rows of the keys in x (B, T or C, K, 1, D)."""
        if isinstance(self.keys, slice):
            self.columns(x).add_(_unfold(y, self.columns(x)))
        else:
            y = y.unflatten(0, (len(self.keys), -1)).transpose(1, 2)[..., None, :]  # (b, n, k, 1, D)
            y = y.masked_fill((self.keys < 0)[..., None, None, None], 0.0)
            x.flatten(0, 1).index_add_(0, self.keys.flatten().clamp(min=0), y.flatten(0, 1))


def _fold(x: Tensor) -> Tensor:
    """(b, m, k, g, ...) → (b·k, m·g, ...), a dense copy in the accumulation dtype."""
    return x.to(_accumulation_dtype(x)).transpose(1, 2).flatten(2, 3).flatten(0, 1).contiguous()


def _unfold(x: Tensor, like: Tensor) -> Tensor:
    """(b·k, m·g, ...) → (b, m, k, g, ...), a view, of the shape of `like`."""
    b, m, k, g = like.shape[:4]
    return x.unflatten(1, (m, g)).unflatten(0, (b, k)).transpose(1, 2)


class _WholeRows(NamedTuple):
    """Queries of whole rows, all of which begin at position `first`; keys begin at 0."""

    first: int

    def spread(self, x: Tensor) -> Tensor:
        return x

    def collect(self, x: Tensor, like: Tensor) -> Tensor:
        return x

    def tiles(self, q: Tensor, span: _Span) -> Iterator[_Tile]:
        """Tiles of q (B, T, K, G, D): some query tokens, all keys that they see, as many heads as fit the cache."""
        first = self.first
        batch, tokens, heads, group, _ = q.shape
        seen = span.keys(first + tokens - 1, first + tokens)
        # Half as many queries as keys: few scores are computed in vain, and the matrix product is still of a fair size.
        size = max(1, min(512 // group, max(32, (seen.stop - seen.start) // 2)))
        for start in range(0, tokens, size):
            queries = slice(start, min(start + size, tokens))
            positions = slice(first + queries.start, first + queries.stop)
            keys = span.keys(positions.start, positions.stop)
            query = torch.arange(positions.start, positions.stop, device=q.device)
            mask = _hide(~span.sees(query[:, None, None], torch.arange(keys.start, keys.stop, device=q.device)), q)
            most = max(1, _TILE_SCORES // max(1, mask.numel() * group))  # heads in the tile, over all its sequences
            for b, h in itertools.product(range(0, batch, max(1, most // heads)), range(0, heads, most)):
                rows = slice(b, b + max(1, most // heads))
                yield _Tile(rows, slice(h, h + most), queries, query, positions.stop, keys, mask)


class _Places(NamedTuple):
    """Queries of sequences whose lengths only the device knows, in n rows of M. Each row lies in one sequence.

    The rows of a sequence begin anew: the first of sequence s is begin // M + s, which leaves room for all before it.
    """

    token: Tensor  # (n, M) number of each query among all; −1 where a sequence has ended
    position: Tensor  # (n, M) in its sequence
    first_key: Tensor  # (n, 1) number of the sequence's first key, among all
    end_key: Tensor  # (n, 1), and where its keys end
    most_keys: int  # that a sequence may have
    stop: int  # all positions are lower
    place: Tensor  # (total,) of each query among the n·M

    @classmethod
    def of(cls, q: Tensor, k: Tensor, span: _Span, segments: _Segments | None, first: Tensor | int) -> _Places:
        """Places of packed sequences, or of queries that go on from the positions `first` over rows of keys.

        Of packed sequences, `first` tokens came before the first query.
        """
        (batch, tokens), device = q.shape[:2], q.device
        total, rows = batch * tokens, min(64, tokens)
        each = torch.arange(total, device=device)
        begin = torch.arange(batch + 1, device=device) * tokens if segments is None else segments.cu_seqlens.long()
        if isinstance(first, Tensor):
            keys = torch.arange(len(first) + 1, device=device) * k.shape[1]
            stop = k.shape[1] * span.stride + span.block_size
        else:
            keys, stop = (segments.cu_seqlens if span.window else segments.cu_keys).long(), first + tokens
            begin, first = (begin - first).clamp(min=0), (first - begin[:-1]).clamp(min=0)
        first_row = begin[:-1] // rows + torch.arange(len(begin) - 1, device=device)
        row = torch.arange(total // rows + len(begin) - 1, device=device)
        s = torch.searchsorted(first_row, row, right=True)[:, None] - 1
        offset = (row[:, None] - first_row[s]) * rows + torch.arange(rows, device=device)
        token = (begin[s] + offset).masked_fill(offset >= (begin[s + 1] - begin[s]), -1)
        of = torch.searchsorted(begin, each, right=True) - 1
        place = first_row[of] * rows + each - begin[of]
        return cls(token, first[s] + offset, keys[s], keys[s + 1], k.shape[1], stop, place)

    def spread(self, x: Tensor) -> Tensor:
        """(B, T, ...) → (n, M, ...), 0 where there is no query."""
        rows = x.flatten(0, 1).index_select(0, self.token.flatten().clamp(min=0)).unflatten(0, self.token.shape)
        return rows.masked_fill_((self.token < 0).view(*self.token.shape, *(1,) * (x.dim() - 2)), 0.0)

    def collect(self, x: Tensor, like: Tensor) -> Tensor:
        """The reverse, (n, M, ...) → (B, T, ...)."""
        return x.flatten(0, 1).index_select(0, self.place).unflatten(0, like.shape[:2])

    def tiles(self, q: Tensor, span: _Span) -> Iterator[_Tile]:
        """Tiles of some of the rows q (n, M, K, G, D), with keys that are gathered for each."""
        rows, size, heads, group, _ = q.shape
        count = size + span.window - 1 if span.window else self.most_keys
        most = max(1, _TILE_SCORES // max(1, heads * size * group * count))
        for batch in (slice(b, b + most) for b in range(0, rows, most)):
            positions = self.position[batch]
            key = torch.arange(count, device=q.device) + (positions[:, :1] - span.window + 1 if span.window else 0)
            number = self.first_key[batch] + key  # (b, n)
            number = number.masked_fill((key < 0) | (number >= self.end_key[batch]), -1)
            seen = span.sees(positions[..., None], key[..., None, :]) & (number >= 0)[:, None]  # (b, M, n)
            mask = _hide(~seen, q)[:, :, None].repeat_interleave(heads, 0)
            yield _Tile(batch, slice(None), slice(None), positions, self.stop, number, mask)


def _placed(
    q: Tensor, k: Tensor, span: _Span, segments: _Segments | None, first: int | Tensor
) -> _WholeRows | _Places:
    """Positions of queries: numbers where the host knows them, else tables."""
    plain = q.numel() == 0 or (segments is None and isinstance(first, int))
    return _WholeRows(first) if plain else _Places.of(q, k, span, segments, first)


def _torch_span_forward(
    q: Tensor, k: Tensor, v: Tensor, span: _Span, scale: float, segments: _Segments | None = None,
    first: int | Tensor = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o and lse of queries that begin at position `first`, or at first[b] in row b, over keys that begin at 0."""
    like, at = q, _placed(q, k, span, segments, first)
    q, k, v = (_grouped(x, k.shape[2]) for x in (at.spread(q), k, v))
    o = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:4], -math.inf, dtype=_accumulation_dtype(q), device=q.device)
    for tile in at.tiles(q, span):
        if tile.mask.numel() > 0:
            rows, keys, values = _fold(tile.rows(q)), _fold(tile.columns(k)), _fold(tile.columns(v))
            o_tile, lse_tile = _tile_forward(rows, keys, values, tile.mask, scale)
            tile.rows(o).copy_(_unfold(o_tile, tile.rows(o)))
            tile.rows(lse).copy_(_unfold(lse_tile, tile.rows(lse)))
    return at.collect(o.flatten(2, 3), like), at.collect(lse.flatten(2, 3), like)


def _torch_span_backward(
    do: Tensor, terms: _RowTerms, q: Tensor, k: Tensor, v: Tensor, span: _Span, scale: float, dq: Tensor | None = None,
    segments: _Segments | None = None, first: int | Tensor = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, added to the one that is given; dk, dv."""
    like, at = q, _placed(q, k, span, segments, first)
    dq = _wide_zeros(q) if dq is None else dq
    rows = _Rows(q, do, *terms).map(lambda x: _grouped(at.spread(x), k.shape[2]))
    k, v, dq_rows = k.unsqueeze(3), v.unsqueeze(3), _grouped(at.spread(dq), k.shape[2])
    dk, dv = _wide_zeros(k), _wide_zeros(v)
    for tile in at.tiles(rows.q, span):
        if tile.mask.numel() == 0:
            continue
        tile_rows = rows.map(lambda x, tile=tile: _fold(tile.rows(x)))
        keys, values = _fold(tile.columns(k)), _fold(tile.columns(v))
        dq_tile, dk_tile, dv_tile = _tile_backward(tile_rows, keys, values, tile.mask, scale)
        tile.rows(dq_rows).add_(_unfold(dq_tile, tile.rows(dq_rows)))
        tile.add_columns(dk, dk_tile)
        tile.add_columns(dv, dv_tile)
    dq = at.collect(dq_rows.flatten(2, 3), like)
    return dq, dk.squeeze(3).to(k.dtype), dv.squeeze(3).to(v.dtype)


# Choice of blocks: the compressed tiles once more ─────────────────────────────────────────────────────────────────────


def _torch_select(
    q: Tensor, k_cmp: Tensor, lse: Tensor, choice: _Choice, scale: float, segments: _Segments | None = None,
    first: int | Tensor = 0, max_len: int | None = None,
) -> Tensor:  # fmt: skip
    """Chosen blocks (B, T, K, S), a tile of queries at a time: scores are (M, n), never (T, C) or (T, N)."""
    kv_heads, group = k_cmp.shape[2], q.shape[2] // k_cmp.shape[2]
    k_cmp = k_cmp.where(k_cmp.isfinite(), 0.0)  # a row that sees NaN has it in its lse; the others must not
    like, at = q, _placed(q, k_cmp, choice.span, segments, first)
    q, lse, k_cmp = (_grouped(x, kv_heads) for x in (at.spread(q), at.spread(lse), k_cmp))
    chosen = torch.empty(*q.shape[:3], 1, choice.topk_blocks, dtype=torch.int32, device=q.device)
    for tile in at.tiles(q, choice.span):
        rows, keys, row_lse = _fold(tile.rows(q)), _fold(tile.columns(k_cmp)), _fold(tile.rows(lse))
        if tile.mask.numel() > 0:
            p, tile_lse = _tile_softmax(rows, keys, tile.mask, scale)
            p *= (tile_lse - row_lse.masked_fill(row_lse == -math.inf, math.inf)).exp()[..., None]
        else:
            p = rows.new_zeros(*rows.shape[:2], 0)  # no block is complete yet
        p = p.unflatten(1, (-1, group)).sum(2)  # (b, M·G, n) → (b, M, n): one choice for the group
        importance = _block_importance(p, *choice[:3], _selection_count(tile.stop, choice.select_block_size))
        query = tile.positions if tile.positions.dim() == 1 else tile.positions.repeat_interleave(kv_heads, 0)
        highest = _choose_blocks(importance, query, choice)
        tile.rows(chosen).copy_(_unfold(highest, tile.rows(chosen)))
    return at.collect(chosen.squeeze(3), like)


# Selective: tiles of the pairs (query row, chosen block), sorted by block ─────────────────────────────────────────────
#
# A row is the G query heads of one (sequence, token, key head): in (B, T, H, D) they lie side by side, so that rows are
# numbered (b·T + t)·K + k and a row's q is read where it is. Keys are numbered alike, by their own T.


class _PairTiles(NamedTuple):
    """n tiles of M pairs, each tile of one block."""

    pair: Tensor  # (n, M) number of the pair among those of its chunk of rows: place of the row · S + slot
    spare: Tensor  # (n, M) True where a pair only fills up its tile; its number is then one past the last
    row: Tensor  # (n, M) number of its query row; of a spare pair, that of the block's last
    key: Tensor  # (n, l') numbers of the block's keys
    mask: Tensor | None  # (n, M, 1, l') from `_hide`, or None where every query sees every token of its block


def _row_chunks(block_indices: Tensor, row_values: int) -> Iterator[Tensor]:
    """All row numbers, head by head, in chunks whose pairs' partial outputs keep to _PARTIAL_VALUES numbers."""
    batch, tokens, kv_heads, slots = block_indices.shape
    rows = torch.arange(batch * tokens * kv_heads, device=block_indices.device)
    rows = rows.view(batch, tokens, kv_heads).transpose(1, 2).flatten()
    return iter(rows.split(max(1, _PARTIAL_VALUES // max(1, slots * row_values))) if rows.numel() * slots else ())


def _pair_tiles(
    block_indices: Tensor, rows: Tensor, keys: int, size: int, group: int, like: Tensor, first: int = 0
) -> Iterator[_PairTiles]:
    """Sorts the pairs of some rows by block, cuts them in tiles, and yields as many at a time as fit the cache.

    The first query stands at position `first` of a sequence of so many `keys`. `like` is of the accumulation dtype, and
    its last dimension the head dim.
    """
    dim = like.shape[-1]
    (_, tokens, kv_heads, slots), device = block_indices.shape, rows.device
    per_head = _selection_count(keys, size)
    # A block meets a query once, and slots·size queries if all are chosen alike.
    pairs = min(_PAIR_TILE, tokens, max(8, slots * size))
    head = rows // (tokens * kv_heads) * kv_heads + rows % kv_heads  # b·K + k
    chosen = block_indices.reshape(-1, slots)[rows].long()  # (R, S)
    own = ((first + rows // kv_heads % tokens) // size)[:, None]
    free = (chosen < 0) | (chosen > own)  # what begins behind the query has no token that it sees
    chosen = torch.where(free, -1, chosen + (head * per_head)[:, None]).flatten()
    order = chosen.argsort(stable=True)  # free slots first, then block by block, queries ascending
    count = torch.bincount(chosen + 1, minlength=1)  # pairs of each block, those of free slots in front
    offset = (count.cumsum(0) - count)[1:]  # where in `order` they begin
    count = count[1:]
    tiles = (count + pairs - 1) // pairs
    block, nth = _numbered(tiles, int(tiles.sum()))  # (n,): of each tile its block, of b·K·N, and its number there
    slot = nth[:, None] * pairs + torch.arange(pairs, device=device)  # (n, M): place among the block's pairs
    last = count[block, None] - 1
    spare = slot > last  # such a pair repeats the block's last, whose row meets these keys anyway, whatever it holds
    pair = order[offset[block, None] + slot.minimum(last)]
    row = rows[pair // slots]
    query = first + row // kv_heads % tokens
    pair = pair.masked_fill_(spare, len(order))
    # (n, l'), or fewer where a block is longer than the sequence
    token = (block % per_head * size)[:, None] + torch.arange(min(size, first + tokens), device=device)
    head = block // per_head
    start = head // kv_heads * keys * kv_heads + head % kv_heads  # number of the key at position 0
    key = start[:, None] + token.clamp(max=first + tokens - 1) * kv_heads  # what lies behind is never read
    # A query stands inside its own block, and of every other block that it may choose it sees all tokens.
    edge = query[:, 0] < token[:, -1]
    most = max(1, _TILE_SCORES // (pairs * group * max(token.shape[1], dim // 4)))  # rows of small blocks count, too
    for part in edge.nonzero()[:, 0].split(most):
        mask = _hide(token[part, None, None, :] > query[part, :, None, None], like)
        yield _PairTiles(pair[part], spare[part], row[part], key[part], mask)
    for part in (~edge).nonzero()[:, 0].split(most):
        yield _PairTiles(pair[part], spare[part], row[part], key[part], None)


def _by_query(q: Tensor, segments: _Segments | None, first: int | Tensor = 0) -> bool:
    """Whether selected attention goes query by query: the host must not look at the choice, or not at the lengths."""
    return not _on_host(q) or segments is not None or isinstance(first, Tensor)


def _row_tiles(
    block_indices: Tensor, rows: Tensor, keys: int, size: int, group: int, like: Tensor,
    segments: _Segments | None = None, first: int | Tensor = 0,
) -> Iterator[_PairTiles]:  # fmt: skip
    """Tiles of one query row each and the keys of all its blocks, as if they were one: no number depends on the choice.

    For keys that a row does not see it reads that of its own token, so that nothing of another sequence comes in.
    """
    (_, tokens, kv_heads, slots), device = block_indices.shape, rows.device
    token = rows // kv_heads
    sequence, position = (token // tokens, token % tokens) if segments is None else segments.of_token[:, token].long()
    if isinstance(first, Tensor):
        position = (first[sequence] + position).clamp(max=keys - 1)
        begin = sequence * keys
    elif segments is None:
        position = position + first
        begin = token // tokens * keys
    else:
        begin = first + token - position
    inside = torch.arange(min(size, keys), device=device)
    most = max(1, _PARTIAL_VALUES // max(1, slots * len(inside) * like.shape[-1]))
    for part in torch.arange(len(rows), device=device)[:, None].split(most):  # (n, 1)
        row, query = rows[part], position[part]
        chosen = block_indices.reshape(-1, slots)[row[:, 0]].long()
        free = (chosen < 0) | (chosen > query // size)
        token = (chosen.masked_fill(free, 0)[..., None] * size + inside).flatten(1)  # (n, S·l')
        hidden = free.repeat_interleave(len(inside), dim=1) | (token > query)
        key = (begin[part] + token.where(~hidden, query)) * kv_heads + row % kv_heads
        yield _PairTiles(part, torch.zeros_like(part, dtype=torch.bool), row, key, _hide(hidden, like)[:, None, None])


def _without_free_slots(block_indices: Tensor, blocks: int) -> Tensor:
    """(B, T, K, S) with no more slots than there are blocks."""
    if block_indices.shape[3] <= blocks:
        return block_indices
    chosen = block_indices.masked_fill((block_indices < 0) | (block_indices >= blocks), -1)
    return chosen.sort(dim=-1, descending=True).values[..., :blocks]


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x[index] for x (R, g, ...) and index (n, m) → (n, m·g, ...) in the accumulation dtype."""
    x = x.index_select(0, index.flatten())  # faster than indexing
    return x.to(_accumulation_dtype(x)).unflatten(0, index.shape).flatten(1, 2)


def _merge_partials(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of S disjoint sets of keys from the attention over each: (R, S, G, D) and (R, S, G)."""
    total = lse.logsumexp(1)  # (R, G)
    weight = (lse - total.masked_fill(total == -math.inf, 0.0)[:, None]).exp_()
    return o.mul_(weight[..., None]).sum(1), total


def _torch_selected_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, select_block_size: int, scale: float,
    gated: tuple[Tensor, ...] = (), segments: _Segments | None = None, first: int | Tensor = 0,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o, lse; and the gated sum, where gates and the outputs of the other branches are given."""
    by_query = _by_query(q, segments, first)
    tokens = k.shape[1] if isinstance(first, Tensor) else first + q.shape[1]
    block_indices = _without_free_slots(block_indices, _selection_count(tokens, select_block_size))
    parts, group, dim = 1 if by_query else block_indices.shape[3], q.shape[2] // k.shape[2], q.shape[3]
    rows, keys, values = (x.reshape(-1, g, dim) for x, g in ((q, group), (k, 1), (v, 1)))  # (B·T·K, g, D)
    o = torch.zeros_like(rows)
    lse = torch.full(rows.shape[:2], -math.inf, dtype=_accumulation_dtype(q), device=q.device)
    partial = lse.new_empty(0, group, dim)
    for chunk in _row_chunks(block_indices, group * dim):
        pairs = len(chunk) * parts
        partial = partial[: pairs + 1] if len(partial) > pairs else lse.new_empty(pairs + 1, group, dim)
        partial_lse = lse.new_full((pairs + 1, group), -math.inf)
        settings = (block_indices, chunk, k.shape[1], select_block_size, group, partial)
        for tiles in _row_tiles(*settings, segments, first) if by_query else _pair_tiles(*settings, first):
            k_tile, v_tile = _gather(keys, tiles.key), _gather(values, tiles.key)
            o_tile, lse_tile = _tile_forward(_gather(rows, tiles.row), k_tile, v_tile, tiles.mask, scale)
            partial.index_copy_(0, tiles.pair.flatten(), o_tile.reshape(-1, group, dim))
            partial_lse.index_copy_(0, tiles.pair.flatten(), lse_tile.reshape(-1, group))
        if not by_query:  # the memory serves every chunk, and may hold anything
            partial.index_fill_(0, (partial_lse[:, 0] == -math.inf).nonzero()[:, 0], 0.0)
        by_row = (x[:-1].unflatten(0, (-1, parts)) for x in (partial, partial_lse))
        o_chunk, lse_chunk = _merge_partials(*by_row)
        o.index_copy_(0, chunk, o_chunk.to(o.dtype))
        lse.index_copy_(0, chunk, lse_chunk)
    o, lse = o.view(q.shape), lse.view(q.shape[:3])
    return o, lse, _torch_gate(*gated, o).contiguous() if gated else o


def _torch_selected_backward(
    do: Tensor, terms: _RowTerms, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, select_block_size: int,
    scale: float, dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None,
    segments: _Segments | None = None, first: int | Tensor = 0, index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, added to those that are given."""
    dq, by_query = _wide_zeros(q) if dq is None else dq, _by_query(q, segments, first)
    tokens = k.shape[1] if isinstance(first, Tensor) else first + q.shape[1]
    block_indices = _without_free_slots(block_indices, _selection_count(tokens, select_block_size))
    group, dim = q.shape[2] // k.shape[2], q.shape[3]
    rows = _Rows(q, do, *terms).map(lambda x: x.reshape(-1, group, *x.shape[3:]))  # (B·T·K, G, ·)
    keys, values, dq_rows = k.reshape(-1, 1, dim), v.reshape(-1, 1, dim), dq.view(-1, group, dim)
    wide = lambda sum_, x: _wide_zeros(x) if sum_ is None else sum_.to(dq.dtype).reshape(x.shape)  # noqa: E731
    dk, dv = wide(dk, keys), wide(dv, values)
    for chunk in _row_chunks(block_indices, group * dim):
        settings = (block_indices, chunk, k.shape[1], select_block_size, group, dq)
        for tiles in _row_tiles(*settings, segments, first) if by_query else _pair_tiles(*settings, first):
            tile_rows = rows.map(lambda x, index=tiles.row: _gather(x, index))
            # pairs that only fill up a tile have no gradient
            tile_rows.lse.unflatten(1, (-1, group)).masked_fill_(tiles.spare[..., None], math.inf)
            k_tile, v_tile = _gather(keys, tiles.key), _gather(values, tiles.key)
            dq_tile, dk_tile, dv_tile = _tile_backward(tile_rows, k_tile, v_tile, tiles.mask, scale)
            dq_rows.index_add_(0, tiles.row.flatten(), dq_tile.reshape(-1, group, dim))
            dk.index_add_(0, tiles.key.flatten(), dk_tile.reshape(-1, 1, dim))
            dv.index_add_(0, tiles.key.flatten(), dv_tile.reshape(-1, 1, dim))
    return dq, dk.to(k.dtype).view(k.shape), dv.to(v.dtype).view(v.shape)


# Gates: eq. 5 ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _torch_gate(gates: Tensor, *branches: Tensor) -> Tensor:
    """Σ_c gates[..., c]·branches[c]:  (B, T, H, 3) and three of (B, T, H, D) → (B, T, H, D).

    NaN where a gate is below 0, of which the backward has the logarithm.
    """
    gates = gates.masked_fill(gates < 0, math.nan)
    first, second, third = gates.unsqueeze(-1).unbind(3)  # each (B, T, H, 1)
    o = first * branches[0]
    return o.addcmul_(second, branches[1]).addcmul_(third, branches[2])


# Compression: of single blocks, and in place of the kernels that cannot be launched. Else modules compose it of plain
# operations, which autograd differentiates.


def _block_rows(x: Tensor, block: int, stride: int, segments: _Segments) -> tuple[Tensor, Tensor]:
    """Tokens of each block, (C·B·K, l, D), of x (B, T, K, D); and their numbers, (C, l). Rows of no block are 0."""
    if segments.of_key is None:
        first = torch.arange(_compressed_count(x.shape[1], block, stride), device=x.device) * stride
    else:
        first = segments.of_key[0]
    token = (first[:, None] + torch.arange(block, device=x.device)).clamp(max=x.shape[1] - 1)
    rows = x[:, token].permute(1, 0, 3, 2, 4)  # (C, B, K, l, D)
    return _without_spare_rows(rows, segments).flatten(0, 2), token


def _without_spare_rows(rows: Tensor, segments: _Segments) -> Tensor:
    """rows (C, ...), 0 behind the last block of packed sequences."""
    if segments.of_key is None:
        return rows
    spare = torch.arange(len(rows), device=rows.device) >= segments.cu_keys[-1]
    return rows.masked_fill(spare.view(-1, *(1,) * (rows.dim() - 1)), 0.0)


def _torch_compress(
    inputs: tuple[Tensor, Tensor | None], first: tuple[Tensor | None, ...], second: tuple[Tensor | None, ...],
    segments: _Segments, stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Results of `_compress_forward`, of the inputs and the layers of both compressors."""
    outputs, units = [], []
    for x, (position, w_in, b_in, w_out, b_out) in zip(inputs, (first, second), strict=True):
        if x is not None:
            rows, token = _block_rows(x, len(position), stride, segments)
            units.append(F.linear((rows + position).flatten(1), w_in, b_in))
            y = units[-1] if w_out is None else F.linear(F.gelu(units[-1]), w_out, b_out)
            outputs.append(y.view(len(token), len(x), *x.shape[2:]).transpose(0, 1))
    return torch.stack(outputs), outputs[0].new_empty(0) if first[3] is None else torch.stack(units)


def _torch_compress_backward(
    upstream: tuple[Tensor, Tensor | None], inputs: tuple[Tensor, Tensor | None], first: tuple[Tensor | None, ...],
    second: tuple[Tensor | None, ...], hidden: Tensor, segments: _Segments, stride: int, of_x: bool, of_weights: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Results of `_compress_backward`."""
    dxs, dws = [], []
    for i, (dy, x, (position, w_in, w_out)) in enumerate(zip(upstream, inputs, (first, second), strict=True)):
        if x is None:
            continue
        rows, token = _block_rows(x, len(position), stride, segments)
        dh = dy = _without_spare_rows(dy.transpose(0, 1), segments).flatten(0, 2)  # (C·B·K, D)
        if w_out is not None:
            dh = torch.ops.aten.gelu_backward(dy @ w_out, hidden[i])
        drows = (dh @ w_in).view(rows.shape)
        if of_x:
            drows_of = drows.view(len(token), len(x), -1, *rows.shape[1:]).permute(1, 0, 3, 2, 4)  # (B, C, l, K, D)
            dxs.append(_wide_zeros(x).index_add_(1, token.flatten(), drows_of.flatten(1, 2).to(_accumulation_dtype(x))))
        if of_weights:
            dws += [drows.sum(0), dh.T @ (rows + position).flatten(1), dh.sum(0)]
            dws += [] if w_out is None else [dy.T @ F.gelu(hidden[i]), dy.sum(0)]
    like, none = inputs[0], inputs[0].new_empty(0)
    return torch.stack(dxs).to(like.dtype) if of_x else none, torch.cat([w.flatten() for w in dws]) if dws else none


# Cached keys ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _torch_decode(
    q: Tensor, tokens: Tensor, blocks: Tensor, logits: Tensor, first: Tensor, of_token: Tensor | None,
    local_window: int, choice: _Choice, scale: float,
) -> Tensor:  # fmt: skip
    """The gated sum of the branches for queries q (B, M, H, D) over the keys of a cache: (B, M, H, D).

    Behind the last query there may be anything that is finite. The queries of row b stand at first[b] and behind; of
    packed sequences, (1, total, H, D), each has a row. Gates (B, M, H, 3) come before the sigmoid.
    """
    k, v, k_local, v_local, k_cmp, v_cmp = _cache_keys(tokens, blocks)
    o, segments, gates = torch.zeros_like(q), None, logits.sigmoid().to(q.dtype)
    starts = first.tolist() if _on_host(first) else None
    room = lambda start: max(0, k.shape[1] - start)  # noqa: E731
    if starts is None:  # all at once, by tables
        if of_token is not None:
            row = torch.arange(len(first) + 1, dtype=of_token.dtype, device=first.device)
            segments = _Segments(torch.searchsorted(of_token[0].contiguous(), row), of_token=of_token)
        pieces = [(first, slice(None), slice(None), slice(None))]
    elif of_token is None:  # neighbouring rows that begin at the same position, together
        groups = ((start, list(same)) for start, same in itertools.groupby(range(len(starts)), starts.__getitem__))
        rows = ((start, slice(same[0], same[-1] + 1)) for start, same in groups)
        pieces = [(start, row, row, slice(0, room(start))) for start, row in rows]
    else:
        ends = of_token[0].bincount(minlength=len(starts)).cumsum(0).tolist()
        rows = enumerate(zip(starts, [0, *ends], ends, strict=False))
        pieces = [
            (start, slice(row, row + 1), slice(None), slice(begin, min(end, begin + room(start))))
            for row, (start, begin, end) in rows
        ]
    for start, keys, batch, new in pieces:
        queries, blocks = q[batch, new], k_cmp[keys]
        if queries.numel() == 0:
            continue
        at = (segments, start)
        o_local, _ = _torch_span_forward(queries, k_local[keys], v_local[keys], _Span(local_window), scale, *at)
        o_compressed, lse = _torch_span_forward(queries, blocks, v_cmp[keys], choice.span, scale, *at)
        chosen = _torch_select(queries, blocks, lse, choice, scale, *at)
        others = (gates[batch, new], o_local, o_compressed)
        selected = (queries, k[keys], v[keys], chosen, choice.select_block_size, scale, others, *at)
        _, _, o[batch, new] = _torch_selected_forward(*selected)
    return o


def _torch_append(tokens: Tensor, values: list[Tensor], first: Tensor, of_token: Tensor | None) -> None:
    """Writes new tokens of all streams into tokens (streams, B, max_len + 1, K, D); what is too many, behind them."""
    batch, room = tokens.shape[1:3]
    if of_token is None:
        row = torch.arange(batch, device=first.device)[:, None]
        position = first[:, None] + torch.arange(values[0].shape[1], device=first.device)
    else:
        row, position = of_token[0], first[of_token[0]] + of_token[1]
    place = (row * room + position.clamp(max=room - 1)).flatten().long()
    for stream, x in zip(tokens, values, strict=True):
        stream.flatten(0, 1).index_copy_(0, place, x.flatten(0, 1).to(stream.dtype))


def _torch_project(
    x: Tensor, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    layers = ((w, None if b is None else b.flatten()) for w, b in zip(weights, biases, strict=True))
    return tuple(x.new_empty((*x.shape[:2], 0)) if w is None else F.linear(x, w, b) for w, b in layers)


def _torch_extend(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, blocks: Tensor, first: Tensor, of_token: Tensor | None,
    rotation: _Rotation, block_size: int, stride: int, weights: Sequence[Tensor | None],
) -> Tensor:  # fmt: skip
    """Keys and values into the streams of a cache, rotated → q, rotated; with a block size, finished blocks, too."""
    rotated = lambda x: x  # noqa: E731
    turns = rotation.theta is not None or rotation.frequencies is not None
    if turns:
        if of_token is None:
            positions = first[:, None] + torch.arange(q.shape[1], device=q.device)
        else:
            positions = (first[of_token[0]] + of_token[1])[None]
        rope = _rope(positions, rotation, q)
        rotated = lambda x: _apply_rope(x, rope)  # noqa: E731
    K = tokens.shape[3]
    (*_, k_last), (*_, v_last) = keys, values = k.split(K, 2), v.split(K, 2)  # local, compressed, selective; or one
    streams = [rotated(k_last), v_last]
    if len(tokens) == 6:
        streams += [rotated(keys[0]), values[0], keys[1], values[1]]
    elif len(tokens) == 3:
        streams += [k_last]
    _torch_append(tokens, streams, first, of_token)
    if block_size:
        most = q.shape[0] * _selection_count(q.shape[1], stride)
        row, number, token = _finished_blocks(first, q.shape[1], most, block_size, stride)
        raw = tokens[-2:] if len(tokens) == 6 else (tokens[2 if len(tokens) == 3 else 0], tokens[1])
        k_cmp, v_cmp = _compress_each([_tokens_of(x[:, :-1], row, token) for x in raw], weights)
        if turns:
            k_cmp = _apply_rope(k_cmp, _rope(number * stride, rotation, q))
        _store_blocks(blocks, row, number, k_cmp, v_cmp)
    return rotated(q) if turns else q.new_empty(0)


def _compress_each(blocks: list[Tensor], weights: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Blocks of keys and of values (n, l, K, D), by the weights that an `extend` takes → (1, n, K, D) of each."""
    if weights[0] is None:
        k_cmp, v_cmp = (x.mean(1) for x in blocks)
        return k_cmp[None], v_cmp[None]
    of_kernel = lambda w: w.transpose(1, 2).flatten(1) if w is not None and w.dim() == 3 else w  # noqa: E731
    weights = [of_kernel(w) for w in weights]
    y, _ = _torch_compress(tuple(blocks), weights[:5], weights[5:], _Segments(), 1)
    k_cmp, v_cmp = y.squeeze(2)
    return k_cmp[None], v_cmp[None]


def _finished_blocks(
    seqlens: Tensor, counts: Tensor | int, most: int, block_size: int, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks that `counts` more tokens complete, at most so many: row (n,), its number there, its tokens (n, l).

    Where there is none, the row is one past the last.
    """
    blocks = lambda n: ((n - block_size) // stride + 1).clamp(min=0)  # noqa: E731
    before, after = blocks(seqlens), blocks(seqlens + counts)
    most = int((after - before).sum()) if _readable(before) else most  # where a look at the host is free, it tells
    row, number = _numbered((after - before).long(), most)
    number = number + before[row.clamp(max=len(seqlens) - 1)]
    return row, number, number[:, None] * stride + torch.arange(block_size, device=row.device)


def _tokens_of(x: Tensor, row: Tensor, token: Tensor) -> Tensor:
    """x (B, max_len, K, D) at the tokens (n, l) of these rows, (n,); at the nearest ones where there are none."""
    return x[row.clamp(max=x.shape[0] - 1)[:, None], token.clamp(max=x.shape[1] - 1)]


def _store_blocks(blocks: Tensor, row: Tensor, number: Tensor, k_cmp: Tensor, v_cmp: Tensor) -> None:
    """Writes compressed keys and values, (1, n, K, D): each by its row and its number there; elsewhere if none."""
    batch, room = blocks.shape[1:3]
    stored = (row < batch) & (number < room - 1)
    place = torch.where(stored, row * room + number, room - 1).long()
    for of, values in zip(blocks, (k_cmp, v_cmp), strict=True):
        of.flatten(0, 1).index_copy_(0, place, values[0].to(of.dtype))


# Packed sequences ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _torch_segments(cu_seqlens: Tensor, total: int, keys: int, block_size: int, stride: int) -> _Segments:
    """Tables of packed sequences, whatever the offsets are: those that are none count as the nearest that could be."""
    offsets = cu_seqlens.long().clamp(0, total)
    offsets[-1:], offsets[:1] = total, 0
    offsets = offsets.cummax(0).values
    counts = ((offsets.diff() - block_size) // stride + 1).clamp(min=0)
    cu_keys = F.pad(counts.cumsum(0), (1, 0)).clamp(max=keys)
    token, key = torch.arange(total, device=offsets.device), torch.arange(keys, device=offsets.device)
    segment = torch.searchsorted(offsets, token, right=True) - 1
    of_key = (torch.searchsorted(cu_keys, key, right=True) - 1).clamp(max=len(offsets) - 2)
    position, needed = (key - cu_keys[of_key]) * stride, key < cu_keys[-1:]
    of_token = torch.stack([segment, token - offsets[segment]])
    of_key = torch.stack([offsets[of_key] + position, position]).where(needed, 0)
    return _Segments(*(x.int() for x in (offsets, cu_keys, of_token, of_key)))


_BACKENDS["torch"] = _Backend(
    _torch_span_forward,
    _torch_span_backward,
    _torch_select,
    _torch_selected_forward,
    _torch_selected_backward,
    _torch_preprocess,
    _torch_decode,
    _torch_segments,
    _torch_append,
    _torch_project,
    _torch_extend,
    _torch_compress,
    _torch_compress_backward,
)


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 8  The file as a program: self-tests, speed, tuning, wherever it was copied to
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


def _main(arguments: Sequence[str] = ()) -> int:
    """Run the self-tests and print a table of them, and on a GPU the speed; or tune. Exit code 1 if a test fails."""
    about = "Self-tests of Native Sparse Attention, and on a GPU its speed beside dense attention."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    add = parser.add_argument
    add("--tune", action="store_true", help="find the fastest tiles for this GPU, in minutes; later processes use them")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="to tune for; bfloat16")
    add("--dim-head", type=int, default=128, metavar="D", help="to tune for; 128")
    options = parser.parse_args(arguments)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU only"
    print(f"native_sparse_attention {__version__} · torch {torch.__version__} · {device}\n")
    if options.tune:
        try:
            print(f"\nwritten to {tune(None, getattr(torch, options.dtype), options.dim_head)}")
        except (ValueError, OSError, RuntimeError) as error:
            parser.error(str(error))
        return 0
    print(f"{'test':<12}{'result':<8}{'seconds':>8}   what")
    results = {"pass": 0, "FAIL": 0, "skip": 0}
    gpu = torch.cuda.is_available()
    for name, test in (_SELFTESTS | _GPU_SELFTESTS if gpu else _SELFTESTS).items():
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            result, what = "pass", test()
        except _Skip as reason:
            result, what = "skip", str(reason)
        except _Failure as failure:
            result, what = "FAIL", str(failure)
        except Exception as error:
            result, what = "FAIL", f"{type(error).__name__}: {error}"
        results[result] += 1
        print(f"{name:<12}{result:<8}{time.perf_counter() - start:>8.1f}   {what}", flush=True)
    print(f"\n{results['pass']} passed, {results['FAIL']} failed, {results['skip']} skipped")
    if gpu:
        print(_speed())
    return 1 if results["FAIL"] else 0


class _Skip(Exception):
    """A self-test that cannot run here, and why."""


class _Failure(AssertionError):
    """A self-test that failed, and how."""


def _require(holds: bool, failure: str) -> None:
    """An assert that `python -O` does not remove."""
    if not holds:
        raise _Failure(failure)


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
            _require(y.shape == x.shape, f"{cfg}: {tuple(x.shape)} became {tuple(y.shape)}")
            _require(bool(y.isfinite().all() and x.grad.isfinite().all()), f"{cfg}: not finite at T = {tokens}")
    return f"{len(configs)} configurations, forward and backward, T = 1 to 256"


def _selftest_causality() -> str:
    for name, cfg in _selftest_configs().items():
        attention, x = NativeSparseAttention(cfg).eval(), torch.randn(1, 120, cfg.dim)
        for at in (1, 47, 96):
            changed = torch.cat([x[:, :at], torch.randn(1, 120 - at, cfg.dim)], dim=1)
            error = (attention(x) - attention(changed))[:, :at].abs().max().item()
            _require(error < 1e-5, f"{name}: a change from token {at} on moves earlier outputs by {error:.1e}")
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(attention(x)[:, :at].sum(), x)
            _require(not gradient[:, at:].any(), f"{name}: the output before token {at} has a gradient in the future")
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
    _require(error < 1e-10, f"selecting every block differs from dense attention by {error:.1e}")
    return f"selecting every block is dense attention, gradients too: error {error:.0e}"


def _selftest_reference() -> str:
    worst = 0.0
    for name, cfg in _selftest_configs().items():
        attention, x = NativeSparseAttention(cfg).double().eval(), torch.randn(2, 130, cfg.dim, dtype=torch.float64)
        p = attention._project(x, _Batch())
        tensors = (p.q, p.k, p.v, *attention._compress(p, _Segments()), p.gates, p.k_local, p.v_local)
        exact, _ = _dense_attention(*tensors, local_window=cfg.local_window, **cfg.selection)
        y, exact = attention(x), attention.to_out(exact.flatten(2))
        names, weights = zip(*attention.named_parameters(), strict=True)
        upstream = torch.randn_like(y)
        options = {"retain_graph": True, "allow_unused": True}
        ours, theirs = ((o, *torch.autograd.grad(o, weights, upstream, **options)) for o in (y, exact))
        for label, a, b in zip(("output", *names), ours, theirs, strict=True):
            _require((a is None) == (b is None), f"{name}: only one side has a gradient for {label}")
            error = 0.0 if a is None else (a - b).abs().max().item()
            _require(error < 1e-9, f"{name}: {label} differs from the reference by {error:.1e}")
            worst = max(worst, error)
    return f"the module is its definition, gradients too: error {worst:.0e}"


@torch.no_grad()
def _selftest_cache() -> str:
    """Prompts of 70 and 53 tokens, then pieces of all lengths, for both rows or for one of them."""
    worst = 0.0
    for name, cfg in _selftest_configs().items():
        block, x = NSABlock(cfg).double().eval(), torch.randn(2, 160, cfg.dim, dtype=torch.float64)
        y, cache, rows = block(x), NSACache(cfg, batch=2, max_len=160, dtype=torch.float64), torch.arange(2)[:, None]
        for lengths in ((70, 53), (1, 1), (1, 1), (17, 34), (0, 1), (40, 7), (1, 0), (30, 63)):
            more = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
            at = (torch.tensor(cache.lengths)[:, None] + torch.arange(max(lengths))).clamp(max=159)
            new, whole = block(x[rows, at], cache=cache, key_padding_mask=more), y[rows, at]
            error = (new - whole)[more].abs().max().item()
            _require(error < 1e-10, f"{name}: with a cache of {cache.lengths} tokens the output is off by {error:.1e}")
            worst = max(worst, error)
    return f"a cache gives what one forward does, at every split: error {worst:.0e}"


def _selftest_learning() -> str:
    """Recall of a token seen once, far outside the window: only the compressed and the selective branch can do it."""
    cfg = NSAConfig(dim=32, heads=2, seq_len=64, local_window=4, block_size=4, topk_blocks=4, gate_init=(0.0, 0.0, 0.0))
    embedding, block, head = nn.Embedding(16, 32), NSABlock(cfg), nn.Linear(32, 8)
    optimizer = torch.optim.AdamW([*embedding.parameters(), *block.parameters(), *head.parameters()], lr=5e-3)
    schedule, losses = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=200), []
    for _ in range(schedule.total_iters):
        tokens = torch.randint(8, 15, (32, 32))
        answer = torch.randint(0, 8, (32,))
        tokens[torch.arange(32), torch.randint(0, 20, (32,))] = answer
        losses.append(F.cross_entropy(head(block(embedding(tokens))[:, -1]), answer))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
        schedule.step()
    chance, loss = math.log(8), torch.stack(losses[-20:]).mean().item()
    _require(loss < chance / 10, f"loss {loss:.2f} after {len(losses)} steps, {chance:.2f} is chance")
    return f"recalls a token beyond the window: loss {loss:.2f} after {len(losses)} steps, chance {chance:.2f}"


# Kernels. On a GPU each row of the table first compiles its kernels side by side, some 150 in all: that is most of its
# time where Triton's cache is empty, half a minute with eight cores.

_Results = dict[str, Tensor]
_Run = Callable[[torch.dtype, str], _Results]  # results by name, in this precision and on this backend


def _test_device(dtype: torch.dtype, dim: int) -> str:
    """Device on which kernels can be tested; Triton's interpreter makes the CPU one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    probe, kernels = torch.empty(1, 1, 1, dim, device=device, dtype=dtype), _BACKENDS.get("triton")
    obstacle = "this file has no kernels" if kernels is None else kernels.obstacle(probe, probe, 1.0)
    if obstacle is not None:
        raise _Skip(obstacle)
    return device


def _hold_to_float64(runs: dict[tuple[str, torch.dtype], _Run]) -> str:
    """Requires of kernels at most twice PyTorch's error at that precision, and in no row over eight times its worst."""
    _BACKENDS["triton"].prepare(lambda: [run(dtype, "triton") for (_, dtype), run in runs.items()])
    worst = 0.0
    for (name, dtype), run in runs.items():
        exact, plain, kernel = run(torch.float64, "torch"), run(dtype, "torch"), run(dtype, "triton")
        for label, x in exact.items():
            (limit, row_limit), (error, row_error) = (_relative_error(y[label], x) for y in (plain, kernel))
            failure = f"{name}, {dtype}: {label} is off by {error:.1e}, PyTorch by {limit:.1e}"
            _require(error <= 2 * limit + 1e-6, failure)
            failure = f"{name}, {dtype}: a row of {label} is off by {row_error:.1e}, of PyTorch by {row_limit:.1e}"
            _require(row_error <= 8 * row_limit + 1e-6, failure)
            worst = max(worst, error / (limit + 1e-6))
    return f"{len(runs)} settings against float64: error at most {worst:.1f} times PyTorch's"


def _relative_error(y: Tensor, exact: Tensor) -> tuple[float, float]:
    """Error relative to the norm of all numbers; and of the row that is off most, relative to the largest row."""
    of_rows = [x.norm(dim=-1) for x in (y - exact, exact)]
    return tuple((off / size).item() for off, size in ([x.norm() for x in of_rows], [x.max() for x in of_rows]))


def _selftest_triton() -> str:
    """`nsa_attention`, all dtypes in groups of 1, 4 and 16; longer sequences take an index of the chosen blocks."""
    device = _test_device(torch.float32, 64)
    settings = [(torch.float32, 1, 64, 70), (torch.float32, 4, 64, 70)]
    if device == "cuda":
        bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
        settings = [(bf16, 1, 64, 900), (bf16, 4, 128, 5000), (bf16, 16, 64, 8200), (bf16, 16, 128, 5000)]
        settings += [(fp16, 1, 128, 5000), (fp16, 4, 64, 900), (fp16, 16, 128, 900)]
        settings += [(fp32, 1, 128, 500), (fp32, 4, 64, 1500), (fp32, 16, 128, 1500)]
    return _hold_to_float64(dict(_attention_run(device, *setting) for setting in settings))


def _selftest_packed() -> str:
    """`nsa_attention` of packed sequences, one of them a token, one shorter than a block."""
    device = _test_device(torch.float32, 64)
    settings = [(torch.bfloat16, 4, 128, 700, 1, 20, 4000, 300)]
    settings += [(dtype, G, 64, 300, 1, 20, 400) for dtype, G in ((torch.float16, 16), (torch.float32, 1))]
    return _hold_to_float64(dict(_attention_run(device, *setting) for setting in settings))


def _attention_run(
    device: str, dtype: torch.dtype, G: int, D: int, *lengths: int
) -> tuple[tuple[str, torch.dtype], _Run]:
    """`nsa_attention` and its gradients; in PyTorch, the sum of its branches, with the blocks that kernels choose."""
    H, T, choice = 16 if device == "cuda" else 4, sum(lengths), _Choice(32, 16, 64, 4, 1, 1)
    packed, blocks = None, [_compressed_count(n, 32, 16) for n in lengths]
    if len(lengths) > 1:
        packed = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    shapes = [(T, H), (T, H // G), (T, H // G), (sum(blocks), H // G), (sum(blocks), H // G), (T, H)]
    *leaves, upstream = (torch.randn(1, *shape, D, device=device, dtype=dtype) for shape in shapes)
    leaves.append(torch.rand(1, T, H, 3, device=device, dtype=dtype))
    options = {"cu_seqlens": packed, "backend": "triton"}

    @functools.cache
    def chosen() -> Tensor:
        q, _, _, k_cmp, v_cmp, _ = leaves
        _, lse = compressed_attention(q, k_cmp, v_cmp, 32, 16, **options)
        chosen = select_blocks(q, k_cmp, lse, **choice._asdict(), **options)
        for x in zip(q.split(lengths, 1), k_cmp.split(blocks, 1), chosen.split(lengths, 1), strict=True):
            _require_highest(*x, choice)
        return chosen

    def run(precision: torch.dtype, on: str) -> _Results:
        q, k, v, k_cmp, v_cmp, gates = x = [leaf.detach().to(precision).requires_grad_() for leaf in leaves]
        if on == "triton":
            o = nsa_attention(*x, local_window=128, **choice._asdict(), **options)
        else:
            plain = options | {"backend": on}
            branches = (
                local_attention(q, k, v, 128, **plain),
                compressed_attention(q, k_cmp, v_cmp, 32, 16, **plain)[0],
                selective_attention(q, k, v, chosen(), 64, **plain),
            )
            o = _torch_gate(gates, *branches)
        names = ("o", "dq", "dk", "dv", "dk_cmp", "dv_cmp", "dgates")
        return dict(zip(names, (o, *torch.autograd.grad(o, x, upstream.to(precision))), strict=True))

    return (f"G = {G}, D = {D}, T = {' + '.join(map(str, lengths))}", dtype), run


def _require_highest(q: Tensor, k_cmp: Tensor, chosen: Tensor, choice: _Choice) -> None:
    """Requires that what is chosen, by some of the queries, scores as high as what float64 chooses."""
    T = q.shape[1]
    t, i = torch.arange(0, T, max(T // 500, 1), device=q.device), torch.arange(k_cmp.shape[1], device=q.device)
    q, chosen = _grouped(q[:, t].double(), k_cmp.shape[2]), chosen[0, t].transpose(0, 1).long()  # (K, t, S)
    scores = torch.einsum("btkgd,bikd->kgti", q, k_cmp.double()) * q.shape[-1] ** -0.5
    unseen = i * choice.stride + choice.block_size - 1 > t[:, None]
    p = scores.masked_fill(unseen, -math.inf).softmax(-1).masked_fill(unseen, 0.0).sum(1)
    importance = _block_importance(p, *choice[:3], _selection_count(T, choice.select_block_size))
    at = lambda blocks: importance.gather(-1, blocks.clamp(min=0)).masked_fill(blocks < 0, 0.0)  # noqa: E731
    exact = _choose_blocks(importance, t, choice).long()
    in_order = (chosen < 0).equal(exact < 0) and bool(((chosen.diff() > 0) | (chosen[..., 1:] < 0)).all())
    _require(in_order, "chosen blocks are not in ascending order, or too few")
    missed = (at(exact).sort().values - at(chosen).sort().values).abs().max().item()
    _require(missed < 1e-4, f"a chosen block scores {missed:.1e} less than another")


def _selftest_compressors() -> str:
    runs = {}
    for dtype, D, method in ((torch.bfloat16, 128, "grouped_mlp"), (torch.float16, 64, "conv1d")):
        device = _test_device(dtype, D)
        compressor = TokenCompressor(D, 32, 16, method=method).to(device, dtype)
        for parameter in compressor.parameters():
            nn.init.normal_(parameter, std=0.03)
        x, upstream = (torch.randn(2, n, 3, D, device=device, dtype=dtype) for n in (700, 42))
        if compressor._of_kernels(x) is None:
            raise _Skip("on this GPU, PyTorch compresses")

        def run(precision: torch.dtype, on: str, of: nn.Module = compressor, given: Any = (x, upstream)) -> _Results:
            module, (x, upstream) = copy.deepcopy(of).to(precision), (y.to(precision) for y in given)
            module.method.config = NSAConfig(backend=on)
            leaves = {"input": x.requires_grad_(), **dict(module.method.named_parameters())}
            y = module(x, heads=True)
            gradients = torch.autograd.grad(y, list(leaves.values()), upstream)
            return {"output": y} | {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}

        runs[f"{method}, D = {D}", dtype] = run
    return _hold_to_float64(runs)


def _selftest_decoding() -> str:
    """A prompt, a piece and steps through a module with its cache; and steps alone, which choose few of many blocks.

    In 16 bits all blocks are chosen, as PyTorch rounds scores, and thus would choose others.
    """
    runs = {}
    for dtype, G, D in ((torch.bfloat16, 4, 128), (torch.float16, 16, 64)):
        device = _test_device(dtype, D)
        sizes = {"block_size": 32, "stride": 16, "select_block_size": 64, "topk_blocks": 16, "seq_len": 700}
        cfg = NSAConfig(dim=256, heads=16, dim_head=D, kv_heads=16 // G, rope_theta=1e4, gate_mode="q_cond", **sizes)
        attention = NativeSparseAttention(cfg).to(device, dtype)
        x = torch.randn(2, 700, 256, device=device, dtype=dtype)

        @torch.no_grad()
        def run(precision: torch.dtype, on: str, of: nn.Module = attention, x: Tensor = x) -> _Results:
            module = copy.deepcopy(of).to(precision)
            module.cfg.backend = on
            cache, ends = NSACache(module.cfg, 2, 700, device=x.device, dtype=precision), (0, 600, 697, 698, 699, 700)
            pieces = (x[:, start:end].to(precision) for start, end in itertools.pairwise(ends))
            return {"output": torch.cat([module(piece, cache=cache) for piece in pieces], dim=1)}

        runs[f"module, G = {G}, D = {D}", dtype] = run
    shapes = (3, 1, 16, 64), (2, 3, 3001, 4, 64), (2, 3, 187, 4, 64), (3, 1, 16, 3)
    tensors = [torch.randn(shape, device=device) for shape in shapes]
    first = torch.tensor([2999, 1000, 17], dtype=torch.int32, device=device)

    @torch.no_grad()
    def step(precision: torch.dtype, on: str) -> _Results:
        given = (*(x.to(precision) for x in tensors), first, None, on, 128)
        return {"o": _cached_forward(*given, *_Choice(32, 16, 64, 4, 1, 1), 0.125)}

    return _hold_to_float64(runs | {("step, G = 4, D = 64", torch.float32): step})


def _speed() -> str:
    """Times of forward + backward, NSA's and dense attention's: by the GPU's clock in eager mode, each a median.

    The paper's block sizes; half the heads of many a model of 8 billion parameters, so that a GPU of 8 GB has room.
    """
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    sizes = {"local_window": 512, **_Choice(32, 16, 64, 16, 1, 2)._asdict()}
    random = lambda *shape: torch.randn(1, *shape, device="cuda", dtype=dtype, requires_grad=True)  # noqa: E731
    results = []
    for T in (4096, 32768):
        try:
            q, do, k, v = (random(T, heads, 128) for heads in (16, 16, 4, 4))
            k_cmp, v_cmp = (random(_compressed_count(T, 32, 16), 4, 128) for _ in range(2))
            gates = torch.rand(1, T, 16, 3, device="cuda", dtype=dtype, requires_grad=True)
            dense = lambda *x: F.scaled_dot_product_attention(  # noqa: E731
                *(y.transpose(1, 2) for y in x), is_causal=True, enable_gqa=True
            ).transpose(1, 2)
            sparse = functools.partial(nsa_attention, **sizes)
            ms, dense_ms = _median_ms(sparse, do, q, k, v, k_cmp, v_cmp, gates), _median_ms(dense, do, q, k, v)
            results.append(f"{T // 1024}k {ms:.2f} ms (dense {dense_ms:.2f}: {dense_ms / ms:.1f}×)")
        except torch.OutOfMemoryError:
            results.append(f"{T // 1024}k takes more memory than is free")
    name, on = str(dtype).removeprefix("torch."), which_backend("cuda", dtype, 128).name
    return f"speed: forward + backward, 16 query / 4 key heads, D 128, {name}, backend {on}: {', '.join(results)}"


def _median_ms(attend: Callable[..., Tensor], upstream: Tensor, *leaves: Tensor) -> float:
    """Milliseconds of a forward and a backward on the GPU, for a second after a warm-up, at least 5 times."""
    times, start = [], time.perf_counter()
    while len(times) < 7 or time.perf_counter() - start < 1.0:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        torch.autograd.grad(attend(*leaves), leaves, upstream)
        after.record()
        after.synchronize()
        times.append(before.elapsed_time(after))
        start = time.perf_counter() if len(times) == 2 else start  # kernels are compiled
    return sorted(times[2:])[len(times[2:]) // 2]


_SELFTESTS = {
    "smoke": _selftest_smoke,
    "causality": _selftest_causality,
    "dense": _selftest_dense,
    "reference": _selftest_reference,
    "cache": _selftest_cache,
    "learning": _selftest_learning,
    "triton": _selftest_triton,
}
_GPU_SELFTESTS = {"packed": _selftest_packed, "compressors": _selftest_compressors, "decoding": _selftest_decoding}


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# Part II  Triton kernels
#
# The same functions for GPUs. Part I does not need this part: cut it out, and the PyTorch backend serves everywhere.
# A kernel's docstring is its formula. Letters beyond those of the header: Z = B·K, key heads in all; BLOCK_M query rows
# by BLOCK_N keys, a tile; BLOCK_D, the head dim D rounded up to a power of two. Scores and log-sum-exps are to the base
# 2 on their way. Nothing here waits for the GPU, and no gradient is summed by atomics: results repeat to the bit.
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 9  Launching: tile sizes, plans, and the device functions that all kernels share
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    def _probe() -> None: ...

    triton.jit(_probe)  # reads this file, of which there may be the bytecode alone
    _INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU
except Exception:  # not installed, too old for tensor descriptors, or broken: the PyTorch backend serves
    triton = tl = TensorDescriptor = None
    _INTERPRETED = False

_AMD = torch.version.hip is not None  # a warp has 64 lanes there, and a program 1024

# Tiles (BLOCK_M, BLOCK_N, warps, stages, KiB) of each kernel, for head dims up to 64, 128 and 256: in 16-bit types, and
# in float32, whose products are exact and take no matrix unit. A GPU takes the first tile that fits its shared memory.
# KiB are those of the smallest GPU that a tile was built for: 227 are Hopper, 163 A100 and B200, 99 other NVIDIA GPUs,
# 64 MI300. The first tiles are tuned on an H200 and an H100; the others, chosen for few spilled registers, have not run
# on their GPUs. In the query-outer kernel the warps are those of every 16 heads.
_TILES = {
    "local_forward": (((64, 64, 4, 3, 64),), ((64, 64, 4, 2, 64),), ((128, 64, 8, 2, 163), (64, 32, 8, 2, 64))),
    "local_dq": (
        ((64, 32, 4, 3, 64),),
        ((64, 64, 4, 2, 64),),
        ((64, 64, 4, 2, 227), (64, 64, 8, 2, 163), (32, 32, 8, 2, 99), (32, 32, 4, 2, 64)),
    ),
    "local_dkv": (
        ((32, 64, 4, 3, 64),),
        ((32, 64, 4, 4, 64),),
        ((64, 64, 8, 2, 227), (32, 64, 8, 2, 163), (32, 32, 8, 2, 99), (32, 32, 4, 2, 64)),
    ),
    "compressed_forward": (
        ((64, 64, 4, 2, 64),),
        ((128, 64, 4, 2, 227), (128, 64, 8, 2, 64)),
        ((128, 64, 8, 2, 163), (64, 32, 8, 2, 64)),
    ),
    "compressed_dq": (
        ((64, 64, 4, 2, 64),),
        ((128, 64, 8, 3, 163), (128, 64, 8, 2, 99), (64, 64, 4, 2, 64)),
        ((128, 32, 8, 2, 227), (64, 64, 8, 2, 163), (32, 32, 8, 2, 99), (32, 32, 4, 2, 64)),
    ),
    "compressed_dkv": (
        ((64, 64, 4, 3, 64),),
        ((64, 128, 8, 3, 227), (64, 128, 8, 2, 99), (64, 64, 4, 2, 64)),
        ((64, 64, 8, 2, 227), (32, 64, 8, 2, 163), (32, 32, 8, 2, 99), (32, 32, 4, 2, 64)),
    ),
    "scores": (((64, 128, 8, 2, 64),), ((64, 128, 8, 3, 64),), ((64, 64, 4, 2, 64),)),
    "masked_forward": (
        ((64, 64, 4, 3, 64),),
        ((64, 64, 4, 2, 64),),
        ((64, 64, 4, 1, 227), (64, 64, 8, 2, 163), (64, 32, 8, 2, 64)),
    ),
    "masked_dq": (
        ((64, 64, 4, 3, 227), (64, 32, 4, 3, 64)),
        ((64, 64, 4, 2, 64),),
        ((64, 64, 4, 2, 227), (64, 64, 8, 2, 163), (32, 32, 8, 2, 99), (32, 32, 4, 2, 64)),
    ),
    "masked_dkv": (
        ((64, 64, 4, 2, 227), (32, 64, 4, 3, 64)),
        ((64, 64, 4, 2, 99), (32, 64, 4, 2, 64)),
        ((64, 64, 8, 2, 227), (32, 64, 8, 2, 163), (32, 32, 8, 2, 99), (32, 32, 4, 2, 64)),
    ),
    "selected_by_query": (
        ((64, 64, 1, 2, 99),),  # by descriptor, which no GPU of less has
        ((64, 64, 1, 2, 99),),
        ((64, 64, 2, 2, 227), (64, 32, 2, 2, 99)),
    ),
    "selected_by_block": (((64, 64, 4, 2, 64),), ((64, 64, 4, 2, 64),), ((64, 64, 4, 1, 227), (64, 64, 8, 1, 64))),
    "selected_backward": (
        ((64, 64, 4, 2, 64),),
        ((32, 64, 4, 4, 227), (32, 64, 8, 3, 99), (32, 64, 4, 3, 64)),
        ((32, 32, 4, 2, 227), (16, 32, 4, 2, 99), (16, 32, 4, 1, 64)),
    ),
    "selected_backward_large_group": (
        ((64, 64, 4, 3, 64),),
        ((32, 64, 4, 3, 227), (32, 64, 8, 3, 99), (32, 64, 4, 3, 64)),
        ((32, 32, 4, 2, 227), (16, 32, 4, 2, 99), (16, 32, 4, 1, 64)),
    ),
    "decode_scan": (
        ((64, 64, 4, 3, 64),),
        ((64, 64, 4, 3, 99), (64, 64, 4, 2, 64)),
        ((64, 64, 8, 2, 163), (64, 32, 8, 2, 64)),
    ),
    "decode_attend": (
        ((64, 64, 4, 3, 64),),
        ((64, 64, 4, 3, 99), (64, 64, 4, 2, 64)),
        ((64, 64, 8, 2, 163), (64, 32, 8, 2, 64)),
    ),
}
_FLOAT32_TILES = {
    "others": (((32, 32, 4, 1, 64),), ((16, 16, 4, 1, 64),), ((16, 16, 4, 1, 64),)),
    "compressed_dkv": (((32, 64, 8, 1, 64),), ((16, 16, 4, 1, 64),), ((16, 16, 4, 1, 64),)),
    "scores": (((32, 64, 8, 1, 64),), ((16, 64, 8, 1, 64),), ((16, 64, 8, 1, 99), (16, 16, 4, 1, 64))),
    "selected_by_block": (
        ((32, 64, 8, 1, 64),),
        ((16, 64, 8, 1, 99), (16, 16, 4, 1, 64)),
        ((16, 64, 8, 1, 163), (16, 16, 8, 1, 99), (16, 16, 4, 1, 64)),
    ),
    "selected_backward": (((32, 64, 8, 1, 64),), ((16, 16, 4, 1, 64),), ((16, 16, 4, 1, 64),)),
    "selected_backward_large_group": (((32, 64, 8, 1, 64),), ((16, 16, 4, 1, 64),), ((16, 16, 4, 1, 64),)),
    "decode_scan": (((16, 64, 4, 1, 64),), ((16, 64, 4, 1, 99), (16, 16, 4, 1, 64)), ((16, 16, 4, 1, 64),)),
    "decode_attend": (
        ((16, 64, 4, 1, 64),),
        ((16, 32, 4, 2, 99), (16, 16, 4, 1, 64)),
        ((16, 16, 4, 2, 99), (16, 16, 4, 1, 64)),
    ),
}
_LARGE_GROUP = 16  # query heads of a group that fill a tile of the matrix unit, which has 16 rows, by themselves

# Compression: rows of blocks whose gradient of the weights one program sums up; tokens of a block that are enough for a
# program; hidden units at a time where products take their operands from registers, of both layers.
_COMPRESS_ROWS, _COMPRESS_TOKENS, _COMPRESS_UNITS = 1024, 4, (128, 64)

# Bytes of memory that the intermediate results of one chunk of queries may take.
_SCORE_BYTES = 256 << 20  # importance of selection blocks
_PARTIAL_BYTES = 256 << 20, 1 << 30  # partial outputs or dq of the selective branch: four times q's, within these
_COUNT_BYTES = 64 << 20  # counts of pairs
_DECODE_BYTES = 256 << 20  # partial outputs and importance in decoding

_NARROW = 64  # the narrowest tile of blocks to choose from, where queries at any position may come
_RUN = 1024  # pairs that one program counts or places; more where the counts would pass their limit
_CUT = 2048  # blocks that are cut into tiles at a time
_MASKED_KEYS = {"forward": 2**27, "backward": 2**25}  # keys read in vain, over all rows, that save an index
_SLOT_KEYS = {"forward": 64, "backward": 32}  # keys that a row could read for what a slot costs it besides its block
_ROWS_IN_DOUBT = 2**18  # packed query rows from which it pays to launch both ways, where lengths decide which one works
_FORWARD_ROWS = 512  # rows that a program takes while a block's keys stay
_SUM_ROWS = 2048, 4096  # rows summed into dk and dv at once, in small and in large groups
_SUM_ROWS_FLOAT32 = 512  # long sums cost digits
_SUM_KEYS = 16  # keys of a block whose sums one program adds up
_DECODE_MAX_KEYS = 128  # the most keys in a tile of a decoding kernel
_DECODE_MAX_SPLITS = 32  # the most splits of a row in each branch
_MERGED = 16384  # numbers of partial outputs that are merged at once
_PLAIN_ROWS = 2**17  # query rows up to which tensors come by plain pointers, because descriptors cost the host time
_FAR = 2**30  # a window that sees everything, and still fits 32 bits when a position is added


def _kernel(function: Callable | None = None, **options: Any) -> Callable:
    """`triton.jit(function)`; without a Triton, the function itself, which nobody calls."""
    if function is None:
        return functools.partial(_kernel, **options)
    return function if triton is None else triton.jit(function, **options)


def _constexpr(value: float) -> Any:
    return value if triton is None else tl.constexpr(value)


_TL_LOG2E = _constexpr(_LOG2E)  # exp(x) = exp2(x·log2 e), and exp2 is the instruction that the GPU has
_TL_LN2 = _constexpr(math.log(2.0))
_TL_FORCED = _constexpr(0x7F800000)  # the bits of infinity
_TL_TURN, _TL_PER_TURN = _constexpr(2 * math.pi), _constexpr(1 / (2 * math.pi))
_TL_SQRT_HALF = _constexpr(math.sqrt(0.5))


def _cdiv(a: int, b: int) -> int:
    """Quotient rounded up. Triton's own takes microseconds; so does its next power of two."""
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """Least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _block_d(D: int) -> int:
    """Head dim as the matrix unit takes it: a power of two, 16 at least."""
    return max(_power_of_2(D), 16)


def _merge_rows(D: int) -> int:
    """Rows of one program of a kernel that only adds or scales rows: 16 numbers a thread."""
    return max(2048 // _block_d(D), 1)


def _unroll(slots: int) -> int:
    """Number of slots to read at a time, so that none are left over."""
    return max(n for n in range(1, 8) if slots % n == 0)


def _precision(x: Tensor) -> str:
    """Precision of float32 products: exact unless torch's own switch allows tf32. 16-bit types do not care."""
    narrow = x.element_size() == 2  # to look at the switch takes longer
    return "tf32" if not narrow and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@functools.cache
def _num_sms(device: torch.device) -> int:
    """Multiprocessors of the GPU; under the interpreter, a small number."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@_once
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take; under the interpreter, those of an H100."""
    if device.type != "cuda":
        return 227 << 10
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block


def _has_descriptors(device: torch.device) -> bool:
    """Whether the GPU copies tiles by descriptor: NVIDIA's from Hopper on, and the interpreter."""
    return device.type != "cuda" or (not _AMD and _capability(device) >= 90)


def _multiplies_in_shared(device: torch.device) -> bool:
    """Whether products take both operands from shared memory: on Hopper, B200 and Thor, but not on the RTX 5090."""
    return device.type != "cuda" or (not _AMD and _capability(device) // 10 in (9, 10, 11))


def _has_tensor_memory(device: torch.device) -> bool:
    """Whether products are summed in tensor memory, as on B200, which takes more shared memory for their operands."""
    return device.type == "cuda" and not _AMD and _capability(device) // 10 in (10, 11)


def _tile_name(kernel: str, D: int, dtype: torch.dtype) -> str:
    """Name of all that shares a tile of a kernel: "local_forward/16/128", by bits of a number and largest head dim."""
    return f"{kernel}/{8 * dtype.itemsize}/{64 if D <= 64 else 128 if D <= 128 else 256}"


def _tiles_of(name: str) -> tuple[tuple[int, ...], ...]:
    """The tiles in the table that go by this name."""
    kernel, bits, width = name.split("/")
    row = _TILES[kernel] if bits == "16" else _FLOAT32_TILES.get(kernel, _FLOAT32_TILES["others"])
    return row[(64, 128, 256).index(int(width))]


def _first_tile(name: str, device: torch.device) -> tuple[int, ...]:
    """BLOCK_M, BLOCK_N, warps and stages: the first tile in the table that fits the GPU."""
    tiles, kib = _tiles_of(name), _shared_memory(device) >> 10
    kib = min(kib, 163) if _has_tensor_memory(device) else kib
    return next((tile for tile in tiles if tile[4] <= kib), tiles[-1])[:4]


@functools.cache
def _tuned(device: torch.device) -> dict[str, tuple[int, ...]]:
    """Tiles by name that `tune` found for this GPU; they go before those of the table."""
    return {} if os.environ.get("NSA_TUNED") == "0" else _read_tiles(_tiles_file(device))


def _constants(
    kernel: str, H: int, K: int, D: int, dtype: torch.dtype, precision: str, device: torch.device
) -> dict[str, Any]:
    """Constants and launch options that all matrix kernels take: sizes of heads, groups and tiles."""
    name = _tile_name(kernel, D, dtype)
    block_m, block_n, warps, stages = _tuned(device).get(name) or _first_tile(name, device)
    heads = {"K": K, "GROUP": H // K, "D": D, "BLOCK_D": _block_d(D), "BLOCK_M": block_m, "BLOCK_N": block_n}
    return heads | {"PRECISION": precision, "num_warps": warps, "num_stages": stages}


def _launches_directly(version: str) -> bool:
    """Whether `_Launch` launches compiled kernels by itself: in the versions of Triton that it is written for."""
    return (3, 4) <= tuple(map(int, version.split(".")[:2])) < (3, 10)


# If False, every launch is Triton's own. On AMD's GPUs, kernels differ by the size of tensors too.
_DIRECT_LAUNCH = triton is not None and not _AMD and _launches_directly(triton.__version__)


class _Launch:
    """A kernel with all that it takes but for its pointers; called with these: tensors, and None for what is missing.

    The kernel takes a tensor that has a view, (shape, strides, box), here, by its number, as a descriptor.

    In each launch Triton looks at every argument to find which of its compiled kernels is meant, which takes two thirds
    of the host's time. Here numbers, views and constants stay as they are. Hence the first launch is Triton's own, and
    the others are of what it compiled; unless the dtypes are not those of the launch before, an address is no multiple
    of 16 bytes, or somebody, a profiler maybe, wants to know of launches. A plan has launches for one device.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], numbers: tuple[Any, ...], views: dict[int, Any] | None = None,
        **constants: Any,
    ) -> None:  # fmt: skip
        self.kernel, self.grid, self.numbers, self.constants = kernel, grid, numbers, constants
        self.views = list((views or {}).items())
        self._last: tuple[Any, ...] = None, None, None  # dtypes of a launch, its function, what was compiled

    def __call__(self, *tensors: Tensor | None) -> None:
        dtypes: list[torch.dtype | None] = []
        addresses: list[Any] = []
        bits = 0  # that are set in any address
        for x in tensors:
            if x is None:
                dtypes.append(None)
                addresses.append(None)
            else:
                address = x.data_ptr()
                bits |= address
                dtypes.append(x.dtype)
                addresses.append(address)
        direct = _DIRECT_LAUNCH and bits % 16 == 0 and not _launch_hooks()
        last, launch, _ = self._last  # at once: another thread may launch the same
        if direct and dtypes == last:
            for i, view in self.views:
                addresses[i] = _descriptor(tensors[i], *view)
            launch(addresses)
            return
        try:
            compiled = self.kernel[self.grid](*self.arguments(*tensors), **self.constants)
        except Exception as error:  # building a kernel fails in many ways
            if not _at_fault(error):
                raise
            device = next(x.device for x in tensors if x is not None)
            where = f"{self.kernel.fn.__name__} cannot run on {_device_name(device)}"
            raise _CannotLaunch(f"{where}: {_in_words(error)}") from error
        if direct and compiled is not None:
            self._last = dtypes, self._direct(compiled), compiled  # kept: Triton unloads what nobody has

    def arguments(self, *tensors: Tensor | None) -> list[Any]:
        """Arguments of the kernel but for its constants."""
        arguments: list[Any] = list(tensors)
        for i, view in self.views:
            arguments[i] = _descriptor(tensors[i], *view)
        return [*arguments, *self.numbers]

    def _direct(self, compiled: Any) -> Callable[[list[Any]], None]:
        """Launch of what was compiled, by the addresses of tensors; all else is prepared.

        Of a tensor itself, Triton would ask the driver whether it is on the GPU.
        """
        driver, parameters = triton.runtime.driver.active, inspect.signature(self.kernel.fn).parameters
        after = (*self.numbers, *(self.constants[name] for name in parameters if name in self.constants))
        stream, arguments = object(), object()  # stand for what comes with each launch
        given = (*(*self.grid, 1, 1)[:3], stream, compiled.function, compiled.packed_metadata, None, None, None)
        launch, (*given, last) = _driver_call(compiled.run, (*given, arguments))
        i, device, stream_of = given.index(stream), driver.get_current_device(), driver.get_current_stream
        before, between = given[:i], given[i + 1 :]
        if last is arguments:
            return lambda addresses: launch(*before, stream_of(device), *between, *addresses, *after)
        return lambda addresses: launch(*before, stream_of(device), *between, (*addresses, *after))


# What the driver says in a launch that is no fault of the kernel: of memory, or of what the GPU ran before.
_NO_FAULT = re.compile(
    r"(Triton|CUDA|HIP) error.*(out of memory|illegal|misaligned|unspecified|time|assert|address space|uncorrectable|"
    r"hardware|captur|destroyed|program counter)",
    re.DOTALL | re.IGNORECASE,
)


def _at_fault(error: Exception) -> bool:
    """Whether an error of Triton's launch says that this kernel cannot be built or launched."""
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError, MemoryError)):
        return False
    return not (isinstance(error, RuntimeError) and _NO_FAULT.match(str(error)))


def _in_words(error: Exception) -> str:
    """Message of an error of Triton's, in one line."""
    said = (error.error_message or error.__cause__ or error) if hasattr(error, "error_message") else error
    return textwrap.shorten(f"{type(error).__name__}: {said}", 300)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _compile_together(run: Callable[[], object]) -> None:
    """Compiles all kernels that run() launches, side by side, and launches none: no result is ever read on the host.

    Before Triton 3.6 they wait until they are launched.
    """
    if _INTERPRETED or not hasattr(triton, "AsyncCompileMode"):
        return
    launch = _Launch.__call__
    _Launch.__call__ = lambda self, *tensors: self.kernel.warmup(  # type: ignore[method-assign]
        *self.arguments(*tensors), grid=self.grid, **self.constants
    )
    try:  # the mode is that of this thread, and so a backward must not have one of its own
        with torch.autograd.set_multithreading_enabled(False), ThreadPoolExecutor() as threads:
            with triton.AsyncCompileMode(threads, ignore_errors=True):
                run()
    finally:
        _Launch.__call__ = launch  # type: ignore[method-assign]


def _driver_call(run: Any, given: tuple[Any, ...]) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """Function in C that Triton's launcher, `run`, calls when it is given this, the kernel's arguments last, and how.

    What the launcher adds stays the same, unless it allocates memory or instruments the kernel: then `run` itself.
    """
    varying = ("scratch_size", "_enabled")
    if not hasattr(run, "launch") or any(value for name, value in vars(run).items() if name.endswith(varying)):
        return run, given
    recorder, calls = copy.copy(run), []
    recorder.launch = lambda *arguments: calls.append(arguments)
    recorder(*given)
    ((*_, last),) = calls
    return (run.launch, *calls) if last in (given[-1], given[-1:]) else (run, given)


def _launch_hooks() -> bool:
    runtime = triton.knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def _layout(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """Shape and strides of each tensor, dtype and device of the first: the key of a plan."""
    return ((x.shape, x.stride(), x.dtype, x.device), *[y if y is None else (y.shape, y.stride()) for y in others])


def _empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Contiguous tensor of x's shape. For another, x.new_empty of single numbers takes half the time of torch.empty."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _empty_outputs(q: Tensor, gated: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """o and lse for queries; and the gated sum of all branches, or o again."""
    B, T, H, _ = q.shape
    o = _empty(q)
    return o, q.new_empty(B, T, H, dtype=torch.float32), _empty(q) if gated else o


def _unit_stride(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, else a copy; kernels take any other strides."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _addressable(x: Tensor) -> bool:
    """Whether a tensor descriptor can address x: unit stride last; start and other strides multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and _addressable_strides(x.stride(), x.element_size())


@functools.lru_cache(maxsize=4096)
def _addressable_strides(strides: tuple[int, ...], size: int) -> bool:
    return strides[-1] == 1 and all(s > 0 and s * size % 16 == 0 for s in strides[:-1])


def _by_descriptor(q: Tensor, *described: Tensor) -> bool:
    """Whether kernels read these tensors through descriptors, which Hopper copies by itself, or by plain pointers.

    A descriptor costs the host time, which counts where there are few query rows; pointers cost registers, of which
    wide heads leave none. Where products take their operands from registers, as in float32, descriptors cost more of
    them.
    """
    B, T, H, D = q.shape
    pays = q.dtype.itemsize == 2 and (B * T * H > _PLAIN_ROWS or D > 64)
    return pays and _multiplies_in_shared(q.device) and all(_addressable(x) for x in described)


def _descriptor(x: Tensor, shape: list[int], strides: list[int], box: list[int]) -> TensorDescriptor:
    """TensorDescriptor(x, shape, strides, box) of an addressable x, without the time that its own checks take."""
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.base, descriptor.shape, descriptor.strides, descriptor.block_shape = x, shape, strides, box
    return descriptor


def _key_view(layout: tuple[Any, ...], rows: int) -> tuple[list[int], list[int], list[int]]:
    """(B, T, K, D) as (B, K, T, D), in tiles of (rows, D)."""
    (B, T, K, D), (sb, st, sk, sd), *_ = layout
    return [B, K, T, D], [sb, sk, st, sd], [1, 1, rows, _block_d(D)]


def _query_view(layout: tuple[Any, ...], K: int, rows: int) -> tuple[list[int], list[int], list[int]]:
    """(B, T, H, D) as (B, K, T, G, D), in tiles of rows that pack tokens and the heads of a group."""
    (B, T, H, D), (sb, st, sh, sd), *_ = layout
    G, pad = H // K, _power_of_2(H // K)
    return [B, K, T, G, D], [sb, G * sh, st, sh, sd], [1, 1, max(1, rows // pad), min(rows, pad), _block_d(D)]


# Rows and tiles ───────────────────────────────────────────────────────────────────────────────────────────────────────


@_kernel
def _offsets(strides, b, t, h):
    """Offsets of the rows (b, t, h) of a (B, T, heads, D) tensor."""
    b, t, h = tl.cast(b, tl.int64), tl.cast(t, tl.int64), tl.cast(h, tl.int64)
    return b * strides[0] + t * strides[1] + h * strides[2]


@_kernel
def _load_rows(x_ptr, offsets, exists, D: tl.constexpr, BLOCK_D: tl.constexpr, first=0):
    """x[offsets, first:D] as a (len(offsets), BLOCK_D) tile, 0 where a row or a column does not exist."""
    d = first + tl.arange(0, BLOCK_D)
    return tl.load(x_ptr + offsets[:, None] + d[None, :], mask=exists[:, None] & (d < D)[None, :], other=0.0)


@_kernel
def _load_keys(x, strides, b, k, first, end, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Keys first, first + 1, ... of head k, 0 from `end` on. x is a pointer; without strides, a descriptor."""
    if strides is None:
        tile = x.load([b, k, first, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        i = first + tl.arange(0, BLOCK_N)
        tile = _load_rows(x, _offsets(strides, b, i, k), i < end, D, BLOCK_D)
    return tile


@_kernel
def _load_queries(
    x, strides, b, k, row, T, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Rows of tokens and heads of the group k from `row` on, 0 where they do not exist. x is as in `_load_keys`."""
    if strides is None:
        tile = x.load([b, k, row // GROUP_PAD, row % GROUP_PAD, 0]).reshape(BLOCK_M, BLOCK_D)
    else:
        n = row + tl.arange(0, BLOCK_M)
        t, h, exists = n // GROUP_PAD, k * GROUP + n % GROUP_PAD, (n // GROUP_PAD < T) & (n % GROUP_PAD < GROUP)
        tile = _load_rows(x, _offsets(strides, b, t, h), exists, D, BLOCK_D)
    return tile


@_kernel
def _store_rows(x_ptr, offsets, x, exists, D: tl.constexpr, BLOCK_D: tl.constexpr, first=0):
    """x[offsets, first:D] = the tile, where rows and columns exist."""
    d = first + tl.arange(0, BLOCK_D)
    pointers = x_ptr + offsets[:, None] + d[None, :]
    tl.store(pointers, x.to(x_ptr.dtype.element_ty), mask=exists[:, None] & (d < D)[None, :])


@_kernel
def _store_sum(x_ptr, given_ptr, offsets, x, exists, added, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x[offsets, :D] = the tile; where something is given, plus given[offsets] in the rows that are `added`."""
    if given_ptr is not None:
        x += _load_rows(given_ptr, offsets, added, D, BLOCK_D)
    _store_rows(x_ptr, offsets, x, exists, D, BLOCK_D)


# Segments: packed sequences, one after another in a batch of 1. Every tile lies in one segment, so that nothing of a
# neighbour is seen, NaN included. The tiles of a segment begin anew: with tiles of SIZE rows, the first tile of segment
# s is offsets[s] // SIZE + s, which leaves room for all tiles of those before it. Hence `total // SIZE + n` tiles are
# enough for n segments, and the number of a tile tells its segment. Selection blocks are numbered in the same way.
#
# The queries of each row may begin behind a past: query t of row b has the position first[b] + t among keys that begin
# at 0. Positions are clamped to the keys' rows, so that no number in `first` reaches outside. Of packed sequences,
# first[0] tokens came before the first query: whole sequences, and the past of the one that it stands in.


@_kernel
def _larger(a, b):
    return tl.maximum(a, b)


@_kernel(do_not_specialize=["n_segments", "T", "C"])
def _segments_kernel(
    given_ptr, cu_seqlens, cu_keys, of_token, of_key, n_segments, T, C, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The tables of `_Segments`. Every program reads all offsets, and looks up SIZE tokens and compressed blocks.

    Offset s is the running maximum of what was given, clamped to [0, T]; the first is 0 and the last is T.
    """
    t0 = tl.program_id(0) * SIZE
    t = t0 + tl.arange(0, SIZE)  # a token, and a compressed block
    segment, start, key_token, key_position = t * 0, t * 0, t * 0, t * 0
    highest, keys = 0, 0  # of the offsets so far, and the number of their compressed blocks
    for first in range(0, n_segments + 1, CHUNK):
        s = first + tl.arange(0, CHUNK)
        inner = (s > 0) & (s < n_segments)
        last = tl.load(given_ptr + s - 1, mask=(s > 1) & (s <= n_segments), other=0)
        last = tl.minimum(tl.maximum(last, 0), T).to(tl.int32)
        last = tl.maximum(tl.associative_scan(last, 0, _larger), highest)
        offset = tl.minimum(tl.maximum(tl.load(given_ptr + s, mask=inner, other=0), 0), T).to(tl.int32)
        offset = tl.where(s < n_segments, tl.maximum(offset, last), T)
        blocks = tl.where(inner | (s == n_segments), tl.maximum(offset - last - BLOCK + STRIDE, 0) // STRIDE, 0)
        key_end = keys + tl.cumsum(blocks, 0)
        if tl.program_id(0) == 0:
            tl.store(cu_seqlens + s, offset, mask=s <= n_segments)
            tl.store(cu_keys + s, tl.minimum(key_end, C), mask=s <= n_segments)

        # (CHUNK, SIZE): offsets up to the token; the segment from `last` to `offset` that has the compressed block
        lowest, highest = tl.min(tl.where(inner, offset, T), 0), tl.max(last, 0)
        top = tl.max(tl.where(inner, offset, 0), 0)
        if top <= t0:  # all, for every token
            segment += tl.sum(inner.to(tl.int32), 0)
            start = tl.maximum(start, top)
        elif lowest < t0 + SIZE:
            begun = inner[:, None] & (offset[:, None] <= t[None, :])
            segment += tl.sum(begun.to(tl.int32), 0)
            start = tl.maximum(start, tl.max(tl.where(begun, offset[:, None], 0), 0))
        more_keys = tl.sum(blocks, 0)
        if (keys < t0 + SIZE) & (keys + more_keys > t0):
            index = t[None, :] - (key_end - blocks)[:, None]
            inside = (index >= 0) & (index < blocks[:, None])
            key_token += tl.sum(tl.where(inside, last[:, None] + index * STRIDE, 0), 0)
            key_position += tl.sum(tl.where(inside, index * STRIDE, 0), 0)
        keys += more_keys
    tl.store(of_token + t, segment, mask=t < T)
    tl.store(of_token + T + t, t - start, mask=t < T)
    tl.store(of_key + t, key_token, mask=t < C)
    tl.store(of_key + C + t, key_position, mask=t < C)


@functools.lru_cache(maxsize=4096)
def _segments_plan(layout: tuple[Any, ...], total: int, keys: int, block_size: int, stride: int) -> _Launch:
    n, constants = layout[0][0][0] - 1, {"BLOCK": block_size, "STRIDE": stride, "SIZE": 128}
    grid = (_cdiv(max(total, keys, 1), constants["SIZE"]),)
    return _Launch(_segments_kernel, grid, (n, total, keys), **constants, CHUNK=min(_power_of_2(n + 1), 64))


def _triton_segments(cu_seqlens: Tensor, total: int, keys: int, block_size: int, stride: int) -> _Segments:
    """Tables of the sequences packed in `total` tokens and in `keys` rows of compressed keys."""
    cu_seqlens = cu_seqlens.contiguous()
    offsets = [_empty(cu_seqlens, torch.int32) for _ in range(2)]
    places = [cu_seqlens.new_empty(2, n, dtype=torch.int32) for n in (total, keys)]
    tables = _Segments(*offsets, *places)
    _segments_plan(_layout(cu_seqlens), total, keys, block_size, stride)(cu_seqlens, *tables)
    return tables


@_kernel
def _find_segment(tile, offsets_ptr, n_segments, past, UNIT: tl.constexpr, SIZE: tl.constexpr):
    """Segment of a tile of SIZE rows, and the tile's first row there; an item has UNIT rows, one of the past none."""
    low, left = tile * 0, tl.cast(n_segments, tl.int32)
    while left > 1:  # the segment is one of the `left` from `low` on
        middle = low + left // 2
        later = tl.maximum(tl.load(offsets_ptr + middle) - past, 0) * UNIT // SIZE + middle > tile
        low, left = tl.where(later, low, middle), left - left // 2
    return low, (tile - tl.maximum(tl.load(offsets_ptr + low) - past, 0) * UNIT // SIZE - low) * SIZE


@_kernel
def _queries_of(segment, cu_seqlens, past):
    """Queries of a segment: (tokens before its first, number of the first, how many)."""
    begin, end = tl.load(cu_seqlens + segment), tl.load(cu_seqlens + segment + 1)
    first = tl.maximum(begin - past, 0)
    return tl.maximum(past - begin, 0), first, tl.maximum(end - past, 0) - first


@_kernel
def _query_tile(
    tile, cu_seqlens, cu_keys, first_ptr, b, n_segments, T, C, T_keys, GROUP_PAD: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """(first row of a tile in its segment; the segment's past, its first query, its queries; its first key, its keys).

    A row has at most T_keys tokens of the past.
    """
    row, token, key = tile * BLOCK_M, tile * 0, tile * 0
    past = _past(first_ptr, b, T_keys, cu_seqlens)
    if cu_seqlens is not None:
        segment, row = _find_segment(tile, cu_seqlens, n_segments, past, GROUP_PAD, BLOCK_M)
        past, token, T = _queries_of(segment, cu_seqlens, past)
        key = tl.load(cu_keys + segment)
        C = tl.load(cu_keys + segment + 1) - key
    return row, past, token, T, key, C


@_kernel
def _key_tile(
    tile, cu_seqlens, cu_keys, first_ptr, b, n_segments, T, C, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
    STRIDE: tl.constexpr,
):  # fmt: skip
    """First key of a tile and what `_query_tile` returns; the keys that are written, as those of no segment are 0."""
    key, token, first, keys, written = tile * BLOCK_N, tile * 0, tile * 0, C, C
    past = _past(first_ptr, b, C * STRIDE + (BLOCK - 1), cu_seqlens)
    if cu_seqlens is not None:
        segment, key = _find_segment(tile, cu_keys, n_segments, 0, 1, BLOCK_N)
        past, token, T = _queries_of(segment, cu_seqlens, past)
        first = tl.load(cu_keys + segment)
        keys = tl.load(cu_keys + segment + 1) - first
        written = tl.where(segment == n_segments - 1, C - first, keys)
    return key, past, token, T, first, keys, written


@_kernel
def _past(first_ptr, b, T_keys, cu_seqlens):
    """Number of tokens that came before the first query of row b: at most those that have room among the keys."""
    past = b * 0
    if first_ptr is not None:
        past = tl.load(first_ptr + b)
        if cu_seqlens is None:
            past = tl.minimum(tl.maximum(past, 0), T_keys)
    return past


@_kernel
def _position_of_token(t, b, of_token, first_ptr, T, T_keys, exists):
    """(segment of query t of row b, number of the segment's first token, the query's position there)."""
    segment, start, position = t * 0, t * 0, _past(first_ptr, b, T_keys, of_token) + t
    if of_token is not None:
        segment = tl.load(of_token + t, mask=exists, other=0)
        start = position
        position = tl.load(of_token + T + t, mask=exists, other=0)
        start -= position
    elif first_ptr is not None:
        position = tl.minimum(position, T_keys - 1)
    return segment, start, position


@_kernel
def _tokens_of_block(j, cu_seqlens, n_segments, T, SELECT: tl.constexpr):
    """[first, end): the tokens of selection block j, of which no more than SELECT count."""
    first, end = j * SELECT, T
    if cu_seqlens is not None:
        segment, first = _find_segment(j, cu_seqlens, n_segments, 0, 1, SELECT)
        first += tl.load(cu_seqlens + segment)
        end = tl.load(cu_seqlens + segment + 1)
    return first, end


# Attention ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@_kernel
def _softmax_step(acc, m_i, q, k_t, v, visible, scale, PRECISION: tl.constexpr):
    """One tile of keys of the online softmax: s = scale·q·k, p = exp2(s − m_i), acc += p·v; → acc, m_i, alpha, p.

    `visible` is None where every row sees every key. `alpha` is the factor that brings older sums to the new maximum.
    """
    s = tl.dot(q, k_t, input_precision=PRECISION)
    if visible is not None:
        s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(s, 1) * scale)
    shift = m_new
    if visible is not None:  # a row without a visible key so far: any finite shift keeps its exponentials at exactly 0
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s * scale - shift[:, None])
    alpha = tl.exp2(m_i - shift)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, m_new, alpha, p


@_kernel
def _probabilities(s, lse, visible, scale):
    """p = exp2(scale·s − lse), 0 where not visible; `visible` is None where everything is."""
    p = tl.exp2(s * scale - lse)
    if visible is not None:
        p = tl.where(visible, p, 0.0)
    return p


@_kernel
def _dscores(p, dp, delta):
    """ds = p·(dp − delta): the gradient of the scores, dp = do·v."""
    return p * (dp - delta)


# Preprocess: lse and delta of each query row, as in `_RowTerms` but to the base 2, for row n of key head z: token
# n // Gp, head n % Gp of the group, where Gp is G rounded up to a power of two. In rows that do not exist lse is +inf,
# so that their p is 0.


@_kernel(do_not_specialize=["T"])
def _preprocess_kernel(
    do_ptr, dlse_ptr, gates_ptr, o_0, o_1, o_2, lse_0, lse_1, lse_2, dgates_ptr, terms_ptr, T, rows_pad, do_strides,
    gate_strides, K: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BRANCHES: tl.constexpr,
):  # fmt: skip
    """dgates[c] = do·o_c, delta[c] = do·o_c − dlse, lse[c] = lse_c − log gates[c].

    One branch stands alone, ungated, with the gradient of its lse; three are under their gates, which have gradients.
    """
    z = tl.program_id(1)
    b, n = z // K, tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    t, h = n // GROUP_PAD, z % K * GROUP + n % GROUP_PAD
    exists = (t < T) & (n % GROUP_PAD < GROUP)
    row = (b.to(tl.int64) * T + t) * (K * GROUP) + h  # of the contiguous (B, T, H)
    do = _load_rows(do_ptr, _offsets(do_strides, b, t, h), exists, D, BLOCK_D).to(tl.float32)
    for c in tl.static_range(BRANCHES):
        o_ptr = o_0 if c == 0 else (o_1 if c == 1 else o_2)
        branch_lse = lse_0 if c == 0 else (lse_1 if c == 1 else lse_2)
        delta = tl.sum(do * _load_rows(o_ptr, row * D, exists, D, BLOCK_D).to(tl.float32), axis=1)
        lse = tl.load(branch_lse + row, mask=exists, other=float("-inf")) * _TL_LOG2E
        log_gate = tl.zeros([BLOCK_M], tl.float32)
        if BRANCHES > 1:
            gate = gates_ptr + _offsets(gate_strides, b, t, h) + c * gate_strides[3]
            tl.store(dgates_ptr + row * BRANCHES + c, delta.to(dgates_ptr.dtype.element_ty), mask=exists)
            log_gate = tl.log2(tl.load(gate, mask=exists, other=0.0).to(tl.float32))
        else:
            delta -= tl.load(dlse_ptr + row, mask=exists, other=0.0)
        nothing = (lse == float("-inf")) | (log_gate == float("-inf"))
        out = terms_ptr + (z.to(tl.int64) * BRANCHES + c) * 2 * rows_pad + n
        tl.store(out, tl.where(nothing, float("inf"), lse - log_gate))
        tl.store(out + rows_pad, delta)


@functools.lru_cache(maxsize=4096)
def _preprocess_plan(layout: tuple[Any, ...], K: int, branches: int, rows_pad: int) -> _Launch:
    ((B, T, H, D), do_strides, *_), gates = layout
    numbers = (T, rows_pad, do_strides, (0, 0, 0, 0) if gates is None else gates[1])
    sizes = {"K": K, "GROUP": H // K, "GROUP_PAD": _power_of_2(H // K), "D": D, "BLOCK_D": _block_d(D)}
    grid = (_cdiv(rows_pad, _merge_rows(D)), B * K)
    return _Launch(_preprocess_kernel, grid, numbers, **sizes, BLOCK_M=_merge_rows(D), BRANCHES=branches)


def _triton_preprocess(
    do: Tensor, outputs: Sequence[Tensor], lses: Sequence[Tensor], kv_heads: int,
    gates: Tensor | None = None, dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    do, outputs, lses = _unit_stride(do), [x.contiguous() for x in outputs], [x.contiguous() for x in lses]
    terms = _term_room(do, kv_heads, len(outputs), "triton")
    dgates = None if gates is None else _empty(gates)
    dlse = None if dlse is None else dlse.contiguous()
    launch = _preprocess_plan(_layout(do, gates), kv_heads, len(outputs), terms.shape[3])
    launch(do, dlse, gates, *(outputs * 3)[:3], *(lses * 3)[:3], dgates, terms)
    return terms, dgates


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 10  Span attention: the local and the compressed branch
#
# In both a query sees one contiguous span of keys, first(t) ≤ i < end(t), so one algorithm serves them:
#
#     compressed   first(t) = 0                    end(t) = (t + 1 − l)//d + 1, at least 0
#     local        first(t) = max(0, t + 1 − W)    end(t) = t + 1, which is the rule above with l = d = 1
#
# A tile of query rows packs tokens × G heads, so that the heads of a group share every key that is loaded: row n of key
# head k is token n // Gp, head k·G + n % Gp.
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


@_kernel
def _span(t, WINDOW: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """(first, end): the query at t sees the keys [first, end). A window of 0 has no limit."""
    first = t * 0
    if WINDOW > 0:
        first = tl.maximum(t + 1 - WINDOW, 0)
    return first, tl.maximum(t + 1 - BLOCK + STRIDE, 0) // STRIDE


@_kernel
def _span_of_key(key, past, T, WINDOW: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr):
    """(first, end): of T queries behind a past, [first, end) see the key."""
    end = key * 0 + T
    if WINDOW > 0:
        end = tl.maximum(tl.minimum(key + WINDOW - past, T), 0)
    return tl.maximum(key * STRIDE + (BLOCK - 1) - past, 0), end


@_kernel
def _key_tiles(
    t_low, t_high, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr
):  # fmt: skip
    """Tiles of the keys that the queries t_low..t_high see: (first key, tiles before the full ones, full ones, all).

    Every query sees all keys of a full one.
    """
    first, end_of_all = _span(t_low, WINDOW, BLOCK, STRIDE)
    first_of_all, end = _span(t_high, WINDOW, BLOCK, STRIDE)
    before = tl.cdiv(first_of_all - first, BLOCK_N)
    full = tl.maximum((end_of_all - first) // BLOCK_N - before, 0)
    return first, before, full, tl.cdiv(end - first, BLOCK_N)


@_kernel
def _query_tiles(
    key_low, key_high, past, T, GROUP_PAD: tl.constexpr, BLOCK_M: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Tiles of the query rows that see any of the keys key_low..key_high: (first, first full, end of full, end).

    Every row of a full one sees all keys.
    """
    first, full_end = _span_of_key(key_low, past, T, WINDOW, BLOCK, STRIDE)
    full, end = _span_of_key(key_high, past, T, WINDOW, BLOCK, STRIDE)
    first, end = tl.minimum(first, T) * GROUP_PAD // BLOCK_M, tl.cdiv(end * GROUP_PAD, BLOCK_M)
    full = tl.minimum(tl.cdiv(tl.minimum(full, T) * GROUP_PAD, BLOCK_M), end)
    return first, full, tl.maximum(full_end * GROUP_PAD // BLOCK_M, full), end


@_kernel
def _cut(x, start, end, ROWS: tl.constexpr, CUT: tl.constexpr):
    """Tile x whose first row is `start`. With CUT, rows from `end` on are a neighbour's, and 0 here."""
    if CUT:
        x = tl.where((start + tl.arange(0, ROWS) < end)[:, None], x, 0.0)
    return x


# The selected branch may be a span too: all keys up to the query, under a mask of the blocks that it chose.


@_kernel
def _load_slots(blocks_ptr, strides, b, t, k, exists, S: tl.constexpr):
    """Blocks that the tokens t chose, a power of two a token; −1 where there is none."""
    SLOTS: tl.constexpr = triton.next_power_of_2(S)
    slot = tl.arange(0, SLOTS)[None, :]
    pointers = blocks_ptr + _offsets(strides, b, t, k)[:, None] + slot
    return tl.load(pointers, mask=exists[:, None] & (slot < S), other=-1)


@_kernel
def _mask_chosen(
    visible, slots, key, TRANSPOSED: tl.constexpr, BLOCK_N: tl.constexpr, SELECT: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """`visible` where a row, or with TRANSPOSED a column, chose the block of a key; the tile of keys begins at `key`.

    It touches no more than BLOCKS blocks, a bit each: those that a row chose meet that of a key.
    """
    first = key // SELECT
    of_row = tl.max((slots == first).to(tl.int32), 1)
    for n in tl.static_range(1, BLOCKS):
        of_row += tl.max((slots == first + n).to(tl.int32), 1) << n
    of_key = 1 << ((key + tl.arange(0, BLOCK_N)) // SELECT - first)
    if TRANSPOSED:
        chosen = (of_key[:, None] & of_row[None, :]) != 0
    else:
        chosen = (of_row[:, None] & of_key[None, :]) != 0
    if visible is not None:
        chosen = chosen & visible
    return chosen


@_kernel
def _other_way_works(by_mask, MASKED: tl.constexpr):
    """Whether a kernel, of the way under a mask or of the one by an index, must leave all as it is: see `_by_mask`."""
    other = False
    if by_mask is not None:
        other = tl.load(by_mask) != MASKED
    return other


# Query rows that stay for a whole program come by plain pointers, so that they are an operand in shared memory: through
# a descriptor they would be one in registers, and ptxas (13.0) has been seen to overwrite such registers in the loop.


@_kernel(do_not_specialize=["n_segments", "T", "C"])
def _span_forward_kernel(
    q_ptr, k_from, v_from, o_ptr, lse_ptr, mixed_ptr, gates_ptr, o_local, o_compressed, blocks_ptr, cu_seqlens, cu_keys,
    first_ptr, by_mask, n_segments, T, C, Z, scale, q_strides, k_strides, v_strides, block_strides, gate_strides,
    K: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, S: tl.constexpr, SELECT: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o_t = sum_i p_ti v_i, p_ti = exp(scale·q_t·k_i − lse_t), lse_t = log sum_i exp(scale·q_t·k_i), i in span(t).

    With S > 0 only the keys of the S blocks that a query chose count.
    """
    if _other_way_works(by_mask, True):
        return
    PACKED: tl.constexpr = cu_seqlens is not None
    # The last tokens see the most keys and go first, so that no long program starts late.
    tile, z = (tl.num_programs(0) - 1 - tl.program_id(0)) // Z, tl.program_id(0) % Z
    b, k = z // K, z % K
    row, past, token, tokens, key, keys = _query_tile(
        tile, cu_seqlens, cu_keys, first_ptr, b, n_segments, T, C, C * STRIDE + (BLOCK - 1), GROUP_PAD, BLOCK_M
    )
    if PACKED:
        if row >= tokens * GROUP_PAD:
            return
    n = row + tl.arange(0, BLOCK_M)
    t, h, exists = n // GROUP_PAD, k * GROUP + n % GROUP_PAD, (n // GROUP_PAD < tokens) & (n % GROUP_PAD < GROUP)
    q = _load_rows(q_ptr, _offsets(q_strides, b, token + t, h), exists, D, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_i, l_i = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    first, end = _span(past + t, WINDOW, BLOCK, STRIDE)
    t_low, t_high = past + row // GROUP_PAD, past + tl.minimum((row + BLOCK_M - 1) // GROUP_PAD, tokens - 1)
    start, before, full, tiles = _key_tiles(t_low, t_high, BLOCK_N, WINDOW, BLOCK, STRIDE)
    if S > 0:
        slots = _load_slots(blocks_ptr, block_strides, b, token + t, k, exists, S)

    # tiles that every row sees whole, then the ones at both edges of the span
    for EDGE in tl.static_range(2):
        for n_tile in range(tiles - full if EDGE else full):
            j = n_tile + (tl.where(n_tile < before, 0, full) if EDGE else before)
            i = start + j * BLOCK_N
            k_tile = _load_keys(k_from, k_strides, b, k, key + i, C, D, BLOCK_D, BLOCK_N)
            v_tile = _load_keys(v_from, v_strides, b, k, key + i, C, D, BLOCK_D, BLOCK_N)
            visible = None
            if EDGE:
                s = (i + tl.arange(0, BLOCK_N))[None, :]
                visible = (s >= first[:, None]) & (s < end[:, None])
                v_tile = _cut(v_tile, i, keys, BLOCK_N, PACKED)
            if S > 0:
                visible = _mask_chosen(visible, slots, i, False, BLOCK_N, SELECT, BLOCKS)
            acc, m_i, alpha, p = _softmax_step(
                acc, m_i, q, tl.trans(k_tile), v_tile, visible, scale * _TL_LOG2E, PRECISION
            )
            l_i = l_i * alpha + tl.sum(p, 1)

    # a row that saw nothing has l_i = 0 and m_i = -inf, hence o = 0 and lse = -inf
    out = (b.to(tl.int64) * T + token + t) * (K * GROUP) + h
    _store_selected(
        acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None], m_i + tl.log2(l_i), o_ptr, lse_ptr, mixed_ptr, gates_ptr,
        gate_strides, o_local, o_compressed, b, token + t, h, out, exists, D, BLOCK_D,
    )  # fmt: skip


@_kernel(do_not_specialize=["n_segments", "T", "C"])
def _span_dq_kernel(
    do_ptr, q_ptr, k_from, v_from, lse_ptr, delta_ptr, dq_ptr, blocks_ptr, cu_seqlens, cu_keys, first_ptr, by_mask,
    n_segments, T, C, Z, term_stride, scale, do_strides, q_strides, k_strides, v_strides, block_strides,
    K: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, S: tl.constexpr, SELECT: tl.constexpr,
    BLOCKS: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq_t = scale·sum_i ds_ti k_i, ds_ti = p_ti (do_t·v_i − delta_t), p_ti = exp(scale·q_t·k_i − lse_t).

    With ADD it is added to what dq holds.
    """
    if _other_way_works(by_mask, True):
        return
    PACKED: tl.constexpr = cu_seqlens is not None
    tile, z = (tl.num_programs(0) - 1 - tl.program_id(0)) // Z, tl.program_id(0) % Z
    b, k = z // K, z % K
    row, past, token, tokens, key, keys = _query_tile(
        tile, cu_seqlens, cu_keys, first_ptr, b, n_segments, T, C, C * STRIDE + (BLOCK - 1), GROUP_PAD, BLOCK_M
    )
    if PACKED:
        if row >= tokens * GROUP_PAD:
            return
    n = row + tl.arange(0, BLOCK_M)
    t, h, exists = n // GROUP_PAD, k * GROUP + n % GROUP_PAD, (n // GROUP_PAD < tokens) & (n % GROUP_PAD < GROUP)
    do = _load_rows(do_ptr, _offsets(do_strides, b, token + t, h), exists, D, BLOCK_D)
    q = _load_rows(q_ptr, _offsets(q_strides, b, token + t, h), exists, D, BLOCK_D)
    term = z.to(tl.int64) * term_stride + token * GROUP_PAD + n
    lse, delta = tl.load(lse_ptr + term), tl.load(delta_ptr + term)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first, end = _span(past + t, WINDOW, BLOCK, STRIDE)
    t_low, t_high = past + row // GROUP_PAD, past + tl.minimum((row + BLOCK_M - 1) // GROUP_PAD, tokens - 1)
    start, before, full, tiles = _key_tiles(t_low, t_high, BLOCK_N, WINDOW, BLOCK, STRIDE)
    if S > 0:
        slots = _load_slots(blocks_ptr, block_strides, b, token + t, k, exists, S)

    # tiles that every row sees whole, then the ones at both edges of the span
    for EDGE in tl.static_range(2):
        for n_tile in range(tiles - full if EDGE else full):
            j = n_tile + (tl.where(n_tile < before, 0, full) if EDGE else before)
            i = start + j * BLOCK_N
            k_tile = _load_keys(k_from, k_strides, b, k, key + i, C, D, BLOCK_D, BLOCK_N)
            v_tile = _load_keys(v_from, v_strides, b, k, key + i, C, D, BLOCK_D, BLOCK_N)
            visible = None
            if EDGE:
                s = (i + tl.arange(0, BLOCK_N))[None, :]
                visible = (s >= first[:, None]) & (s < end[:, None])
                k_tile, v_tile = _cut(k_tile, i, keys, BLOCK_N, PACKED), _cut(v_tile, i, keys, BLOCK_N, PACKED)
            if S > 0:
                visible = _mask_chosen(visible, slots, i, False, BLOCK_N, SELECT, BLOCKS)
            qk = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
            dp = tl.dot(do, tl.trans(v_tile), input_precision=PRECISION)
            ds = _dscores(_probabilities(qk, lse[:, None], visible, scale * _TL_LOG2E), dp, delta[:, None])
            dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)

    dq *= scale
    out = ((b.to(tl.int64) * T + token + t) * (K * GROUP) + h) * D
    if ADD:
        dq += _load_rows(dq_ptr, out, exists, D, BLOCK_D)
    _store_rows(dq_ptr, out, dq, exists, D, BLOCK_D)


@_kernel(do_not_specialize=["n_segments", "T", "C", "key_tiles", "tiles_per_split"])
def _span_dkv_kernel(
    do_from, q_from, k_from, v_from, lse_ptr, delta_ptr, dk_ptr, dv_ptr, dk_given, dv_given, blocks_ptr, cu_seqlens,
    cu_keys, first_ptr, by_mask, n_segments, T, C, Z, term_stride, key_tiles, tiles_per_split, scale, do_strides,
    q_strides, k_strides, v_strides, block_strides, K: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr,
    S: tl.constexpr, SELECT: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dv_i = sum_t p_ti do_t and dk_i = scale·sum_t ds_ti q_t, over a split of the rows; the first adds those given."""
    if _other_way_works(by_mask, True):
        return
    PACKED: tl.constexpr = cu_seqlens is not None
    # Later splits are seen by more keys and go first.
    split, z = (tl.num_programs(0) - 1 - tl.program_id(0)) // (Z * key_tiles), tl.program_id(0) % Z
    b, k = z // K, z % K
    start, past, token, tokens, key, keys, written = _key_tile(
        tl.program_id(0) // Z % key_tiles, cu_seqlens, cu_keys, first_ptr, b, n_segments, T, C, BLOCK_N, BLOCK, STRIDE
    )
    if PACKED:
        if start >= written:
            return
    key_high = tl.minimum(start + BLOCK_N, keys) - 1
    first, full, full_end, end = _query_tiles(start, key_high, past, tokens, GROUP_PAD, BLOCK_M, WINDOW, BLOCK, STRIDE)
    low, high = split * tiles_per_split, (split + 1) * tiles_per_split
    if PACKED:  # its own rows are split
        splits = tl.num_programs(0) // (Z * key_tiles)
        low, high = first + (end - first) * split // splits, first + (end - first) * (split + 1) // splits
    first, end = tl.maximum(first, low), tl.minimum(end, high)
    full = tl.minimum(tl.maximum(full, first), end)
    full_end = tl.maximum(tl.minimum(full_end, end), full)
    k_tile = _load_keys(k_from, k_strides, b, k, key + start, C, D, BLOCK_D, BLOCK_N)
    v_tile = _load_keys(v_from, v_strides, b, k, key + start, C, D, BLOCK_D, BLOCK_N)
    i = start + tl.arange(0, BLOCK_N)  # a neighbour's keys stay in their rows
    t_first, t_end = _span_of_key(i, past, tokens, WINDOW, BLOCK, STRIDE)
    lse_ptr, delta_ptr = lse_ptr + z.to(tl.int64) * term_stride, delta_ptr + z.to(tl.int64) * term_stride
    row0, rows = token * GROUP_PAD, tokens * GROUP_PAD
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    # rows that see every key of the tile, then the ones at both edges; transposed, so that p is an operand as it stands
    for EDGE in tl.static_range(2):
        for tile in range(first if EDGE else full, end - full_end + full if EDGE else full_end):
            row = (tl.where(tile < full, tile, tile - full + full_end) if EDGE else tile) * BLOCK_M
            n, visible = row + tl.arange(0, BLOCK_M), None
            if EDGE:
                t = (n // GROUP_PAD)[None, :]
                visible = (t >= t_first[:, None]) & (t < t_end[:, None])
            if EDGE and PACKED:
                lse = tl.load(lse_ptr + row0 + n, mask=n < rows, other=0.0)
                delta = tl.load(delta_ptr + row0 + n, mask=n < rows, other=0.0)
            else:
                lse, delta = tl.load(lse_ptr + row0 + n), tl.load(delta_ptr + row0 + n)
            q = _load_queries(q_from, q_strides, b, k, row0 + row, T, GROUP, GROUP_PAD, D, BLOCK_D, BLOCK_M)
            do = _load_queries(do_from, do_strides, b, k, row0 + row, T, GROUP, GROUP_PAD, D, BLOCK_D, BLOCK_M)
            if EDGE:
                q, do = _cut(q, row, rows, BLOCK_M, PACKED), _cut(do, row, rows, BLOCK_M, PACKED)
            if S > 0:
                slots = _load_slots(blocks_ptr, block_strides, b, token + n // GROUP_PAD, k, n < rows, S)
                visible = _mask_chosen(visible, slots, start, True, BLOCK_N, SELECT, BLOCKS)
            qk = tl.dot(k_tile, tl.trans(q), input_precision=PRECISION)
            dp = tl.dot(v_tile, tl.trans(do), input_precision=PRECISION)
            p = _probabilities(qk, lse[None, :], visible, scale * _TL_LOG2E)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dk = tl.dot(_dscores(p, dp, delta[None, :]).to(q.dtype), q, dk, input_precision=PRECISION)

    out = (((split * (Z // K) + b).to(tl.int64) * C + key + i) * K + k) * D
    if PACKED:
        dk, dv = tl.where((i < keys)[:, None], dk, 0.0), tl.where((i < keys)[:, None], dv, 0.0)
    added = i < tl.where(split == 0, keys, 0)
    _store_sum(dk_ptr, dk_given, out, dk * scale, i < written, added, D, BLOCK_D)
    _store_sum(dv_ptr, dv_given, out, dv, i < written, added, D, BLOCK_D)


def _splits(row_tiles: int, programs: int, device: torch.device) -> int:
    """Number of splits of the query rows for dk and dv, each of at least 32 tiles.

    Enough to fill the GPU three times over, since half of the (split, key tile) pairs see nothing; then up to sixteen
    times, which evens out the staircase, as long as the splits stay so long that adding their sums costs little.
    """
    fill, even = (_cdiv(n * _num_sms(device), programs) for n in (3, 16))
    return max(1, min(fill, row_tiles // 32), min(even, row_tiles // 512))


def _span_constants(
    kernel: str, layout: tuple[Any, ...], span: _Span, select_block_size: int, precision: str
) -> dict[str, Any]:
    """Constants of a kernel. Where queries chose blocks, no other keys count."""
    ((_, _, H, D), _, dtype, device), (k_shape, *_), _, chosen, *_ = layout
    branch, window = ("local", min(span.window, _FAR)) if span.window else ("masked" if chosen else "compressed", 0)
    constants = _constants(f"{branch}_{kernel}", H, k_shape[2], D, dtype, precision, device)
    constants |= {"GROUP_PAD": _power_of_2(constants["GROUP"]), "WINDOW": window}
    constants |= {"BLOCK": span.block_size, "STRIDE": span.stride, "S": 0, "SELECT": select_block_size, "BLOCKS": 0}
    if chosen:  # BLOCKS: the most blocks that share a tile, whose first key is a multiple of its size
        l_, keys = select_block_size, constants["BLOCK_N"]
        constants |= {"S": chosen[0][3], "BLOCKS": (l_ - math.gcd(keys, l_) + keys - 1) // l_ + 1}
    return constants


def _tile_count(rows: int, size: int, segments: int) -> int:
    """Tiles of `size` rows. Those of each packed sequence begin anew."""
    return rows // size + segments if segments else _cdiv(rows, size)


@functools.lru_cache(maxsize=4096)
def _span_forward_plan(
    layout: tuple[Any, ...], described: bool, segments: int, span: _Span, scale: float, select_block_size: int,
    precision: str,
) -> _Launch:  # fmt: skip
    ((B, T, *_), q_strides, *_), ((_, C, K, _), *_), _, chosen, gates, _ = layout
    constants = _span_constants("forward", layout, span, select_block_size, precision)
    tiles = _tile_count(T * constants["GROUP_PAD"], constants["BLOCK_M"], segments)
    views = {i: _key_view(layout[i], constants["BLOCK_N"]) for i in (1, 2) if described}
    strides = (None, None) if described else (layout[1][1], layout[2][1])
    numbers = (segments, T, C, B * K, scale, q_strides, *strides, chosen and chosen[1], gates and gates[1])
    return _Launch(_span_forward_kernel, (tiles * B * K,), numbers, views, **constants)


@functools.lru_cache(maxsize=4096)
def _span_backward_plan(
    layout: tuple[Any, ...], described: bool, add_dq: bool, add_dk: bool, segments: int, term_stride: int, span: _Span,
    scale: float, select_block_size: int, precision: str,
) -> tuple[_Launch, _Launch, int]:  # fmt: skip
    """Launches for dq, over tiles of queries, and for dk and dv, over tiles of keys and splits of the queries."""
    ((B, T, H, _), q_strides, _, device), ((_, C, K, _), *_), _, chosen, (_, do_strides, *_), _ = layout
    block_strides = chosen and chosen[1]
    q, k, v, _, do, _ = layout
    constants = _span_constants("dq", layout, span, select_block_size, precision)
    tiles = _tile_count(T * constants["GROUP_PAD"], constants["BLOCK_M"], segments)
    views = {i: _key_view(x, constants["BLOCK_N"]) for i, x in ((2, k), (3, v)) if described}
    strides = (None, None) if described else (k[1], v[1])
    numbers = (segments, T, C, B * K, term_stride, scale, do_strides, q_strides, *strides, block_strides)
    dq = _Launch(_span_dq_kernel, (tiles * B * K,), numbers, views, ADD=add_dq, **constants)

    constants = _span_constants("dkv", layout, span, select_block_size, precision)
    tiles = _tile_count(C, constants["BLOCK_N"], segments)
    row_tiles = _cdiv(T // max(segments, 1) * constants["GROUP_PAD"], constants["BLOCK_M"])  # of an average sequence
    splits = 1 if span.window else _splits(row_tiles, tiles * B * K, device)
    views = {i: _query_view(x, K, constants["BLOCK_M"]) for i, x in enumerate((do, q)) if described}
    views |= {i: _key_view(x, constants["BLOCK_N"]) for i, x in ((2, k), (3, v)) if described}
    strides = (None,) * 4 if described else (do_strides, q_strides, *strides)
    numbers = (segments, T, C, B * K, term_stride, tiles, _cdiv(row_tiles, splits), scale, *strides, block_strides)
    return dq, _Launch(_span_dkv_kernel, (splits * tiles * B * K,), numbers, views, **constants), splits


def _span_offsets(
    segments: _Segments | None, span: _Span, masked: bool = False
) -> tuple[Tensor | None, Tensor | None, int]:
    """Offsets of tokens, offsets of the keys of a span, and the number of sequences; under a mask a key is a token."""
    if segments is None:
        return None, None, 0
    cu_seqlens = segments.cu_seqlens
    return cu_seqlens, cu_seqlens if span.window > 0 or masked else segments.cu_keys, len(cu_seqlens) - 1


def _triton_span_forward(
    q: Tensor, k: Tensor, v: Tensor, span: _Span, scale: float, segments: _Segments | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o (B, T, H, D) and lse (B, T, H). Row b's queries begin at the position first[b], its keys at 0."""
    return _span_forward(q, k, v, span, scale, segments, first)[:2]


def _span_forward(
    q: Tensor, k: Tensor, v: Tensor, span: _Span, scale: float, segments: _Segments | None, first: Tensor | None = None,
    block_indices: Tensor | None = None, select_block_size: int = 0, gated: tuple[Tensor, ...] = (),
    by_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o (B, T, H, D), lse (B, T, H); and the gated sum, where gates and the outputs of the other branches are given."""
    o, lse, mixed = _empty_outputs(q, gated)
    if q.numel() == 0 or k.shape[1] == 0:
        return o.zero_(), lse.fill_(-math.inf), mixed
    masked = block_indices is not None
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    chosen = _unit_stride(block_indices) if masked else None
    *offsets, n = _span_offsets(segments, span, masked)
    gates, *others = gated or (None, None, None)
    layout, settings = _layout(q, k, v, chosen, gates, first), (span, scale, select_block_size, _precision(q))
    launch = _span_forward_plan(layout, _by_descriptor(q, k, v), n, *settings)
    launch(q, k, v, o, lse, mixed, gates, *others, chosen, *offsets, first, by_mask)
    return o, lse, mixed


def _triton_span_backward(
    do: Tensor, terms: _RowTerms, q: Tensor, k: Tensor, v: Tensor, span: _Span, scale: float, dq: Tensor | None = None,
    segments: _Segments | None = None, first: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None,
    block_indices: Tensor | None = None, select_block_size: int = 0, by_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, added to those that are given; where `by_mask` says no, those themselves."""
    given, masked = (dk, dv), block_indices is not None
    if q.numel() == 0 or k.numel() == 0:
        dq, dk, dv = (x.new_zeros(x.shape) if dx is None else dx for x, dx in ((q, dq), (k, dk), (v, dv)))
        return dq, dk, dv
    do, q, k, v = _unit_stride(do), _unit_stride(q), _unit_stride(k), _unit_stride(v)
    chosen = _unit_stride(block_indices) if masked else None
    *offsets, n = _span_offsets(segments, span, masked)
    layout, add = _layout(q, k, v, chosen, do, first), (dq is not None, dk is not None)
    settings = (n, terms.lse.stride(1), span, scale, select_block_size, _precision(q))
    launch_dq, launch_dkv, splits = _span_backward_plan(layout, _by_descriptor(q, do, q, k, v), *add, *settings)
    dq = _empty(q) if dq is None else dq
    launch_dq(do, q, k, v, *terms, dq, chosen, *offsets, first, by_mask)
    if splits > 1:
        dk, dv = k.new_empty(2, splits, *k.shape, dtype=torch.float32).unbind()
    elif dk is None:
        dk, dv = _empty(k), _empty(k)
    launch_dkv(do, q, k, v, *terms, dk, dv, *given, chosen, *offsets, first, by_mask)
    if splits > 1:
        dk, dv = dk.sum(0).to(k.dtype), dv.sum(0).to(k.dtype)
        if by_mask is not None and given[0] is not None:
            dk, dv = (torch.where(by_mask, dx, was) for dx, was in zip((dk, dv), given, strict=True))
    return dq, dk, dv


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 11  Selection: importance of the blocks, and the S highest
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


@_kernel
def _fold_importance(
    p, part_first, m: tl.constexpr, r: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, PART: tl.constexpr, CARRY: tl.constexpr,
):  # fmt: skip
    """score[j] = sum_i overlap(i, j)·p[i] (eq. 9) over a tile's i = j·r + part_first ...; and the tile's carry.

    In units of the stride, compressed block i covers [i, i + m) and selection block j covers [j·r, (j + 1)·r). A block
    may overlap up to CARRY selection blocks to the right of its own; the carry is for the first CARRY of the next tile.
    """
    p = tl.reshape(p, [ROWS, BLOCKS, PART])
    i = part_first + tl.arange(0, PART)
    jj = tl.arange(0, BLOCKS)
    own = tl.minimum(i + m, r) - i
    score = tl.sum(p * own.to(tl.float32)[None, None, :], axis=2)
    carry = tl.zeros([ROWS, BLOCKS], tl.float32)
    for right in tl.static_range(1, CARRY + 1):
        overlap = tl.maximum(tl.minimum(i + m, (right + 1) * r) - right * r, 0)
        share = tl.sum(p * overlap.to(tl.float32)[None, None, :], axis=2)
        source = tl.broadcast_to(tl.maximum(jj - right, 0)[None, :], [ROWS, BLOCKS])
        score += tl.where((jj >= right)[None, :], tl.gather(share, source, axis=1), 0.0)
        source = tl.broadcast_to(tl.minimum(jj + (BLOCKS - right), BLOCKS - 1)[None, :], [ROWS, BLOCKS])
        carry += tl.where((jj < right)[None, :], tl.gather(share, source, axis=1), 0.0)
    return score, carry


@_kernel
def _store_scores(
    block_tile, q_ptr, q_row, q_stride, k_ptr, key, keys, k_strides, lse_row, scores_ptr, out, t, exists, b, k,
    n_blocks, scale, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    STRIDE: tl.constexpr, SELECT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, PART: tl.constexpr,
    CARRY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of scores: BLOCKS selection blocks, the first CARRY of them only for what they carry to their right."""
    m: tl.constexpr = BLOCK // STRIDE
    r: tl.constexpr = SELECT // STRIDE
    column = tl.arange(0, BLOCKS * PART)
    j_first = block_tile * (BLOCKS - CARRY) - CARRY
    score = tl.zeros([BLOCK_M, BLOCKS], tl.float32)
    for part_first in tl.static_range(0, r, PART):
        inside = part_first + column % PART
        i = (j_first + column // PART) * r + inside
        seen = (inside < r) & (i >= 0) & (i < keys)
        k_tile = _load_rows(k_ptr, _offsets(k_strides, b, key + i, k), seen, D, BLOCK_D)
        k_t = tl.trans(k_tile)  # here, so that it stays in shared memory
        # probabilities, summed over the group; masked once, after the sum
        p = tl.zeros([BLOCK_M, BLOCKS * PART], tl.float32)
        lse_next = tl.load(lse_row, mask=exists, other=0.0)
        for g in range(GROUP):
            q = _load_rows(q_ptr + g * q_stride, q_row, exists, D, BLOCK_D)
            lse = lse_next * _TL_LOG2E
            lse_next = tl.load(lse_row + (g + 1), mask=exists & (g + 1 < GROUP), other=0.0)  # early, for the next round
            p += _probabilities(tl.dot(q, k_t, input_precision=PRECISION), lse[:, None], None, scale * _TL_LOG2E)
        visible = ((i >= 0) & (inside < r))[None, :] & ((i * STRIDE + (BLOCK - 1))[None, :] <= t[:, None])
        score += _fold_importance(tl.where(visible, p, 0.0), part_first, m, r, BLOCK_M, BLOCKS, PART, CARRY)[0]
    jj = tl.arange(0, BLOCKS)
    stored = exists[:, None] & ((jj >= CARRY) & (j_first + jj < n_blocks))[None, :]
    tl.store(scores_ptr + out[:, None] + (j_first + jj)[None, :], score, mask=stored)


@_kernel(do_not_specialize=["n_segments", "T", "C", "first_tile", "n_rows", "n_blocks"])
def _block_scores_kernel(
    q_ptr, k_ptr, lse_ptr, scores_ptr, cu_seqlens, cu_keys, first_ptr, n_segments, T, C, first_tile, n_rows, n_blocks,
    scale, q_strides, k_strides, K: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr,
    PART: tl.constexpr, CARRY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores[z, t, j] = sum_i overlap(i, j) sum_g exp(scale·q[t, g]·k[i] − lse[t, g]), over the visible i.

    One program: a tile of blocks. Of packed sequences, every so many-th, as the longest they could be has many tiles.
    """
    z, block_tile = tl.program_id(2), tl.program_id(1)
    b, k = z // K, z % K
    row, past, token, tokens, key, keys = _query_tile(
        first_tile + tl.program_id(0), cu_seqlens, cu_keys, first_ptr, b, n_segments, T, C, n_blocks * SELECT, 1,
        BLOCK_M,
    )  # fmt: skip
    last = (past + tl.minimum(row + BLOCK_M, tokens) - 1) // SELECT  # the last block that has begun
    tiles = tl.cdiv(tl.minimum(last + 1, n_blocks), BLOCKS - CARRY)
    if (block_tile >= tiles) | (row >= tokens):
        return
    t = row + tl.arange(0, BLOCK_M)
    exists = t < tokens
    lse_row = lse_ptr + (b.to(tl.int64) * T + token + t) * (K * GROUP) + k * GROUP  # of a contiguous (B, T, H)
    q_row = _offsets(q_strides, b, token + t, k * GROUP)
    out = (z.to(tl.int64) * n_rows + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)) * n_blocks
    if cu_seqlens is None:
        _store_scores(
            block_tile, q_ptr, q_row, q_strides[2], k_ptr, key, keys, k_strides, lse_row, scores_ptr, out, past + t,
            exists, b, k, n_blocks, scale, GROUP, D, BLOCK_D, BLOCK, STRIDE, SELECT, BLOCK_M, BLOCKS, PART, CARRY,
            PRECISION,
        )  # fmt: skip
    else:
        for each_tile in range(block_tile, tiles, tl.num_programs(1)):
            _store_scores(
                each_tile, q_ptr, q_row, q_strides[2], k_ptr, key, keys, k_strides, lse_row, scores_ptr, out, past + t,
                exists, b, k, n_blocks, scale, GROUP, D, BLOCK_D, BLOCK, STRIDE, SELECT, BLOCK_M, BLOCKS, PART, CARRY,
                PRECISION,
            )  # fmt: skip


@_kernel
def _store_highest(
    score, own, exists, out_row,
    S: tl.constexpr, SP: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, ROWS: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """out_row[:] = the S highest of score[: own + 1], forced ones first, ties to the lower index; ROWS rows at once.

    Scores are not negative, so their bits order as integers: the S-th highest is found by bisection, by counting, and
    a round that counts exactly S ends it. The running count of chosen blocks is the slot: slots ascend without a sort.
    """
    QUAD: tl.constexpr = 4 if NP > 4 else 1
    j = tl.arange(0, NP)[None, :]

    # keys: -1 no candidate, score bits, above every score for the forced blocks
    candidate = exists[:, None] & (j <= own[:, None])
    key = tl.where((score >= 0) & (score < float("inf")), score, 0.0).to(tl.int32, bitcast=True)
    forced = candidate & ((j < INIT) | (j > (own - LOCAL)[:, None]))
    key = tl.where(candidate & ~forced, key, -1)
    wanted = tl.where(exists, tl.minimum(own + 1, S), 0)

    # at least `wanted` keys reach the threshold, fewer reach `over`; SP strided groups have a maximum each
    over = tl.max(key, axis=1) + 1
    key = tl.where(forced, _TL_FORCED, key)
    group_max = tl.max(tl.reshape(key, [ROWS, NP // SP, SP]), axis=1)
    threshold = tl.maximum(tl.min(group_max, axis=1), 0)
    n_forced = tl.sum(forced.to(tl.int32), axis=1)
    threshold = tl.where(n_forced >= wanted, _TL_FORCED, tl.minimum(threshold, over - 1))
    over = tl.where(n_forced >= wanted, _TL_FORCED + 1, over)
    while tl.max(over - threshold, axis=0) > 1:
        trial = threshold + (over - threshold) // 2
        reached = tl.sum((key >= trial[:, None]).to(tl.int32), axis=1)
        threshold = tl.where(reached >= wanted, trial, threshold)
        over = tl.where(reached > wanted, over, tl.where(reached == wanted, trial + 1, trial))

    # ties at the threshold: those before `limit` are chosen, so that `wanted` are chosen in all
    limit = tl.full([ROWS], NP, tl.int32)
    reached = tl.sum((key >= threshold[:, None]).to(tl.int32), axis=1)
    if tl.max(reached - wanted, axis=0) > 0:
        low = tl.zeros([ROWS], tl.int32)
        while tl.max(limit - low, axis=0) > 1:
            middle = (low + limit) // 2
            ranked = (key > threshold[:, None]) | ((key == threshold[:, None]) & (j < middle[:, None]))
            enough = tl.sum(ranked.to(tl.int32), axis=1) >= wanted
            limit = tl.where(enough, middle, limit)
            low = tl.where(enough, low, middle)
    chosen = candidate & ((key > threshold[:, None]) | ((key == threshold[:, None]) & (j < limit[:, None])))
    # the running count in two steps, over quads and within them, as a lane holds four neighbours
    count = tl.reshape(chosen.to(tl.int32), [ROWS, NP // QUAD, QUAD])
    quad = tl.sum(count, axis=2)
    slot = (tl.cumsum(quad, axis=1) - quad)[:, :, None] + tl.cumsum(count, axis=2) - 1
    tl.store(out_row[:, None] + tl.reshape(slot, [ROWS, NP]), tl.broadcast_to(j, [ROWS, NP]), mask=chosen)
    free = tl.arange(0, SP)[None, :]
    empty = exists[:, None] & (free >= wanted[:, None]) & (free < S)
    tl.store(out_row[:, None] + free, tl.full([ROWS, SP], -1, tl.int32), mask=empty)


@_kernel
def _choose_level(
    scores_ptr, chosen_ptr, n, row, past, z, token, tokens, T, n_rows, n_blocks, K: tl.constexpr, S: tl.constexpr,
    SP: tl.constexpr, SELECT: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, ALL: tl.constexpr,
    LOW: tl.constexpr, NP: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """The choice of ALL queries from `row` on, a few at once, if from LOW up to NP blocks are before the last's own."""
    FIT: tl.constexpr = 512 // NP if NP < 512 else 1
    ROWS: tl.constexpr = FIT if FIT < ALL else ALL
    last = (past + tl.minimum(row + ALL, tokens) - 1) // SELECT
    if ((last >= LOW) | (LOW == 0)) & ((last < NP) | TOP):
        j = tl.arange(0, NP)[None, :]
        for more in range(0, ALL, ROWS):
            i = more + tl.arange(0, ROWS)
            t, exists = row + i, row + i < tokens
            own = tl.minimum((past + t) // SELECT, n_blocks - 1)
            score_row = (z.to(tl.int64) * n_rows + n + i) * n_blocks
            # With blocks after the own masked here already, the choice would take half as long again.
            read = exists[:, None] & (j < n_blocks)
            score = tl.load(scores_ptr + score_row[:, None] + j, mask=read, other=0.0)
            out = (((z // K).to(tl.int64) * T + token + t) * K + z % K) * S
            _store_highest(score, own, exists, chosen_ptr + out, S, SP, INIT, LOCAL, ROWS, NP)


@_kernel(do_not_specialize=["n_segments", "T", "first_tile", "n_rows", "n_blocks"])
def _choose_kernel(
    scores_ptr, chosen_ptr, cu_seqlens, first_ptr, n_segments, T, first_tile, n_rows, n_blocks,
    K: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, SELECT: tl.constexpr, BLOCK_M: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, ROWS: tl.constexpr, NP: tl.constexpr, LEAST_NP: tl.constexpr,
    LEVELS: tl.constexpr,
):  # fmt: skip
    """chosen[t] = the S highest of scores[t, : t // SELECT + 1], in ascending order, -1 in free slots.

    One program: ROWS queries. Its tiles are NP blocks wide, or as few of LEAST_NP, 4·LEAST_NP ... as its blocks fit.
    """
    z, n = tl.program_id(1), tl.program_id(0) * ROWS
    row, past, token, tokens, _, _ = _query_tile(
        first_tile + n // BLOCK_M, cu_seqlens, cu_seqlens, first_ptr, z // K, n_segments, T, 0, n_blocks * SELECT, 1,
        BLOCK_M,
    )  # fmt: skip
    row += n % BLOCK_M
    if row >= tokens:
        return
    for level in tl.static_range(LEVELS):
        _choose_level(
            scores_ptr, chosen_ptr, n, row, past, z, token, tokens, T, n_rows, n_blocks, K, S, SP, SELECT, INIT, LOCAL,
            ROWS, LEAST_NP << (2 * level - 2) if level > 0 else 0, NP if level == LEVELS - 1 else LEAST_NP << 2 * level,
            level == LEVELS - 1,
        )  # fmt: skip


def _carry(choice: _Choice) -> tuple[int, int]:
    """Compressed blocks that start in a selection block, and selection blocks to its right that the last overlaps."""
    ratio = choice.select_block_size // choice.stride
    return ratio, (ratio + choice.block_size // choice.stride - 2) // ratio


class _SelectPlan(NamedTuple):
    """Launches for scores and for the choice, of each chunk of rows."""

    score_values: int  # of a chunk
    chunks: list[tuple[_Launch, _Launch]]


@functools.lru_cache(maxsize=4096)
def _select_plan(
    layout: tuple[Any, ...], choice: _Choice, segments: int, positions: int, scale: float, precision: str
) -> _SelectPlan:
    """Rows are those of a grid of tiles: those that fill up the last tile of a segment are among them."""
    ((B, T, H, D), q_strides, dtype, device), (k_shape, k_strides, *_), _, first = layout
    (C, K), S, slots = k_shape[1:3], choice.topk_blocks, _power_of_2(choice.topk_blocks)
    constants = _constants("scores", H, K, D, dtype, precision, device)
    rows, (ratio, carry) = constants["BLOCK_M"], _carry(choice)
    part = min(_power_of_2(ratio), 32)
    blocks = max(constants.pop("BLOCK_N") // part, _power_of_2(2 * carry), 2)
    constants |= {"BLOCK": choice.block_size, "STRIDE": choice.stride, "SELECT": choice.select_block_size}
    constants |= {"BLOCKS": blocks, "PART": part, "CARRY": carry}
    all_rows = _tile_count(T, rows, segments) * rows if segments else T
    all_blocks = _selection_count(positions, choice.select_block_size)
    most = _SCORE_BYTES * (4 if segments else 1)  # of packed sequences, few rows fill the room that they have
    chunk = min(_cdiv(max(most // (4 * B * K * all_blocks), 1), 128) * 128, all_rows)
    # Rows of unlike lengths, of which shapes do not tell: their own width, from the average length up.
    usual_blocks = _power_of_2(_selection_count(T // segments, choice.select_block_size)) if segments else _NARROW
    chunks = []
    for row in range(0, all_rows, chunk):
        n_rows, n_blocks = min(chunk, all_rows - row), all_blocks
        if first is None:  # no others have begun
            n_blocks = min(n_blocks, _selection_count(row + n_rows, choice.select_block_size))
        tiles, splits = _cdiv(n_rows, rows), _cdiv(n_blocks, blocks - carry)
        if segments:
            splits = min(splits, _cdiv(16 * _num_sms(device), tiles * B * K))
        numbers = (segments, T, C, row // rows, n_rows, n_blocks, scale, q_strides, k_strides)
        scores = _Launch(_block_scores_kernel, (tiles, splits, B * K), numbers, **constants)

        least = width = max(_power_of_2(n_blocks), slots)
        if segments or first is not None:
            least = min(width, max(min(usual_blocks, _NARROW), slots))
        rows_each = min(max(1, 512 // least), rows)
        choose = _Launch(
            _choose_kernel, (_cdiv(n_rows, rows_each), B * K), (segments, T, row // rows, n_rows, n_blocks),
            K=K, S=S, SP=slots, SELECT=choice.select_block_size, BLOCK_M=rows, INIT=choice.init_blocks,
            LOCAL=choice.local_blocks, ROWS=rows_each, NP=width, LEAST_NP=least,
            LEVELS=1 + (width // least).bit_length() // 2, num_warps=min(max(width // 1024, 1), 16 if _AMD else 32),
        )  # fmt: skip
        chunks.append((scores, choose))
    return _SelectPlan(B * K * chunk * all_blocks, chunks)


def _triton_select(
    q: Tensor, k_cmp: Tensor, lse: Tensor, choice: _Choice, scale: float, segments: _Segments | None = None,
    first: Tensor | None = None, max_len: int | None = None,
) -> Tensor:  # fmt: skip
    """The S blocks of every query and key head, int32 (B, T, K, S): ascending, -1 in the free slots.

    Behind a past, positions end at max_len, or where one more compressed key would be whole.
    """
    (B, T), (C, K) = q.shape[:2], k_cmp.shape[1:3]
    q, k_cmp, lse = _unit_stride(q), _unit_stride(k_cmp), lse.contiguous()
    *offsets, n = _span_offsets(segments, choice.span)
    positions = T if first is None else max_len or C * choice.stride + choice.block_size - 1
    plan = _select_plan(_layout(q, k_cmp, lse, first), choice, n, positions, scale, _precision(q))
    chosen = q.new_empty(B, T, K, choice.topk_blocks, dtype=torch.int32)
    scores = q.new_empty(plan.score_values, dtype=torch.float32)
    for launch_scores, launch_choice in plan.chunks:
        launch_scores(q, k_cmp, lse, scores, *offsets, first)
        launch_choice(scores, chosen, offsets[0], first)
    return chosen


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 12  Selected attention
#
# In short sequences all keys up to the query are read, as in a span, under a mask of the chosen blocks: `_by_mask`.
# Elsewhere an index says who chose a block. The device alone knows the lengths of packed sequences: where they decide,
# both ways are launched, and the kernels of one leave all as it is.
#
# A pair is (query t, slot s), numbered t·S + s. The loops are exchanged: the block is outside, the queries that chose
# it are inside, so that a block's keys are read once a tile and no query gathers keys. A second kernel merges the S
# partial results of each query. In large groups, whose heads fill a tile by themselves, the forward keeps the query
# outside. Partial results are those of some key heads z0, z0 + 1 ..., or of some queries t0, t0 + 1 ... of one head, so
# that they never take more than _PARTIAL_BYTES. Where all queries are in one chunk, the backward takes the index of its
# forward.
#
# The index is that of a sparse matrix in CSR form, the pairs of each block side by side. Four queries, two slots:
#
#     block_indices    t = 0: 0 −1    t = 1: 0 1    t = 2: 1 2    t = 3: 0 2          (pair 1 is a free slot)
#     pairs            0 2 6   3 4   5 7                 in order of their block, stable
#     offsets          0       3     5     7             block j has pairs[offsets[j]:offsets[j + 1]]
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


@_kernel
def _load_pair_block(
    blocks_ptr, pair, in_range, b, of_token, first_ptr, T, n_blocks, t0, stride_t, S: tl.constexpr,
    SELECT: tl.constexpr,
):  # fmt: skip
    """Block of each pair, and whether it counts: free slots and blocks after the query do not."""
    t = t0 + pair // S
    segment, start, position = _position_of_token(t, b, of_token, first_ptr, T, n_blocks * SELECT, in_range)
    j = tl.load(blocks_ptr + t.to(tl.int64) * stride_t + pair % S, mask=in_range, other=-1)
    counted = in_range & (j >= 0) & (j <= position // SELECT)
    if of_token is not None:
        j += start // SELECT + segment  # behind the blocks of the segments before it
    return j, counted


@_kernel(do_not_specialize=["T", "n_pairs", "n_blocks", "n_runs", "t0"])
def _count_pairs_kernel(
    block_indices, counts_ptr, of_token, first_ptr, by_mask, T, n_pairs, n_blocks, n_runs, t0, strides,
    K: tl.constexpr, S: tl.constexpr, SELECT: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """counts[z, j, run] = number of pairs of this run of RUN pairs that chose block j."""
    if _other_way_works(by_mask, False):  # what follows finds no tiles
        return
    run, z = tl.program_id(0), tl.program_id(1)
    blocks_ptr = block_indices + (z // K).to(tl.int64) * strides[0] + (z % K) * strides[2]
    pair = run * RUN + tl.arange(0, RUN)
    j, counted = _load_pair_block(
        blocks_ptr, pair, pair < n_pairs, z // K, of_token, first_ptr, T, n_blocks, t0, strides[1], S, SELECT
    )
    cell = (z.to(tl.int64) * n_blocks + j) * n_runs + run
    tl.atomic_add(counts_ptr + cell, 1, mask=counted, sem="relaxed")


@_kernel(do_not_specialize=["T", "n_pairs", "n_blocks", "n_runs", "t0"])
def _place_pairs_kernel(
    block_indices, left_ptr, ends_ptr, pairs_ptr, of_token, first_ptr, by_mask, T, n_pairs, n_blocks, n_runs, t0,
    strides, K: tl.constexpr, S: tl.constexpr, SELECT: tl.constexpr, RUN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """pairs[ends[z, j, run] − left[z, j, run] + rank] = pair, for the pairs of this run that chose j: a stable sort.

    `left` counts those that have no place yet, at first all; `rank` is a pair's rank among them. A run has one program,
    which takes a tile at a time off what is left; so nothing is left to chance.
    """
    if _other_way_works(by_mask, False):
        return
    run, z = tl.program_id(0), tl.program_id(1)
    blocks_ptr = block_indices + (z // K).to(tl.int64) * strides[0] + (z % K) * strides[2]
    lane = tl.arange(0, TILE)
    weight = tl.where(lane[:, None] < lane[None, :], 1, 1 << 16)  # low half: before me; high half: me and after me
    pair = run * RUN + lane
    j, counted = _load_pair_block(
        blocks_ptr, pair, pair < n_pairs, z // K, of_token, first_ptr, T, n_blocks, t0, strides[1], S, SELECT
    )
    for first in range(TILE, RUN + TILE, TILE):
        next_pair = run * RUN + first + lane  # asked for early; the round after the last is empty
        in_run = (next_pair < n_pairs) & (first < RUN)
        next_j, next_counted = _load_pair_block(
            blocks_ptr, next_pair, in_run, z // K, of_token, first_ptr, T, n_blocks, t0, strides[1], S, SELECT
        )
        cell = (z.to(tl.int64) * n_blocks + j) * n_runs + run
        left = tl.load(left_ptr + cell, mask=counted, other=0)
        place = tl.load(ends_ptr + cell, mask=counted, other=0) - left
        j = tl.where(counted, j, -1 - lane)  # a pair that does not count is alone with its number
        counts = tl.sum(tl.where(j[:, None] == j[None, :], weight, 0), axis=0)
        rank = counts & 0xFFFF
        tl.store(pairs_ptr + place + rank, pair, mask=counted)
        tl.debug_barrier()  # every thread has read what was left
        tl.store(left_ptr + cell, left - rank - 1, mask=counted & (counts >> 16 == 1))
        tl.debug_barrier()  # the next tile reads what this one wrote
        pair, j, counted = next_pair, next_j, next_counted


@_kernel(do_not_specialize=["n_blocks", "n_runs", "n_tiles"])
def _cut_tiles_kernel(
    ends_ptr, table_ptr, block_ptr, n_blocks, n_runs, n_tiles, GROUP: tl.constexpr, SIZE: tl.constexpr,
    NP: tl.constexpr,
):  # fmt: skip
    """Tiles of at most SIZE rows (pair, head), each of one block: `table` and `block` of `_PairIndex`."""
    z = tl.program_id(0).to(tl.int64)
    table_ptr += z * n_blocks * 4
    block_ptr += z * n_tiles
    total = 0
    for first in range(0, n_blocks, NP):
        j = first + tl.arange(0, NP)
        exists = j < n_blocks
        cell = z * n_blocks + j
        begin = tl.load(ends_ptr + cell * n_runs - 1, mask=exists & (cell > 0), other=0)  # the end of the last block
        end = tl.load(ends_ptr + (cell + 1) * n_runs - 1, mask=exists, other=0)
        tiles = tl.where(exists, ((end - begin) * GROUP + (SIZE - 1)) // SIZE, 0)
        tile_end = total + tl.cumsum(tiles, axis=0)
        tl.store(table_ptr + j * 4, tile_end - tiles, mask=exists)
        tl.store(table_ptr + j * 4 + 1, tile_end, mask=exists)
        tl.store(table_ptr + j * 4 + 2, begin, mask=exists)
        tl.store(table_ptr + j * 4 + 3, end, mask=exists)
        for i in range(0, tl.max(tiles, axis=0)):
            tl.store(block_ptr + tile_end - tiles + i, j, mask=i < tiles)
        total += tl.sum(tiles, axis=0)
    for i in range(total, n_tiles, NP):
        tile = i + tl.arange(0, NP)
        tl.store(block_ptr + tile, tile * 0 + n_blocks, mask=tile < n_tiles)


def _token_tables(segments: _Segments | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Segment of each token, offsets of the packed sequences, and their number."""
    if segments is None:
        return None, None, 0
    return segments.of_token, segments.cu_seqlens, len(segments.cu_seqlens) - 1


class _PairIndex(NamedTuple):
    """Pairs of a chunk of queries in order of their block, and their rows (pair, head) cut into tiles of one block."""

    pairs: Tensor  # (Z·n_tokens·S,) int32; free slots are no pairs, and leave some at the end without a value
    table: Tensor  # (Z, N, 4) int32, before the pairs: first tile of a block, one past its last; first pair, likewise
    block: Tensor  # (Z, n_tiles) int32: the block of each tile, N where there is no tile


class _IndexPlan(NamedTuple):
    """Launches that make a `_PairIndex`, and the shapes of what they write."""

    count: _Launch
    place: _Launch
    cut: _Launch
    cut_again: _Launch  # from a table: an entry's last number is the end of its block, as in the running sum
    counts: int
    table: int
    pairs: int
    block: tuple[int, int]  # its tiles: as many as there may be, without a look at the data


def _index_plan(
    layout: tuple[Any, ...], t0: int, n_tokens: int, n_blocks: int, select_block_size: int, size: int, group: int
) -> _IndexPlan:
    """Plan for tiles of at most `size` rows, of the queries from t0 on; by the layout of their block indices."""
    (B, T, K, S), strides, *_ = layout
    Z, n_pairs, run = B * K, n_tokens * S, _RUN
    while run < 16384 and 4 * Z * n_blocks * _cdiv(n_pairs, run) > _COUNT_BYTES:
        run *= 2
    n_runs, n_tiles = _cdiv(n_pairs, run), n_pairs * group // size + n_blocks
    numbers = (T, n_pairs, n_blocks, n_runs, t0, strides)
    constants = {"K": K, "S": S, "SELECT": select_block_size, "RUN": run}
    step = {"TILE": 32, "num_warps": 1, "num_stages": 1}
    sizes = {"GROUP": group, "SIZE": size, "NP": min(_power_of_2(n_blocks), _CUT)}
    return _IndexPlan(
        _Launch(_count_pairs_kernel, (n_runs, Z), numbers, **constants, num_warps=4),
        _Launch(_place_pairs_kernel, (n_runs, Z), numbers, **constants, **step),
        *(_Launch(_cut_tiles_kernel, (Z,), (n_blocks, ends, n_tiles), **sizes) for ends in (n_runs, 4)),
        Z * n_blocks * n_runs, Z * n_blocks * 4, Z * n_pairs, (Z, n_tiles),
    )  # fmt: skip


def _index_pairs(
    plan: _IndexPlan, block_indices: Tensor, of_token: Tensor | None, first: Tensor | None = None,
    by_mask: Tensor | None = None, room: Tensor | None = None,
) -> _PairIndex:  # fmt: skip
    """Counting sort by block: counts of each run of pairs, a running sum, then every pair goes to its place.

    Table and pairs lie side by side, in `room` where that is given.
    """
    options = {"dtype": torch.int32, "device": block_indices.device}
    counts, block = torch.zeros(plan.counts, **options), torch.empty(plan.block, **options)
    table = torch.empty(plan.table + plan.pairs, **options) if room is None else room
    pairs = table[plan.table :]
    plan.count(block_indices, counts, of_token, first, by_mask)
    ends = counts.cumsum(0, dtype=torch.int32)
    plan.place(block_indices, counts, ends, pairs, of_token, first, by_mask)
    plan.cut(ends, table, block)
    return _PairIndex(pairs, table, block)


def _cut_again(plan: _IndexPlan, index: Tensor) -> _PairIndex:
    """The index, table and pairs side by side, with tiles of this plan's size."""
    table, block = index.new_empty(plan.table), index.new_empty(*plan.block)
    plan.cut_again(index, table, block)
    return _PairIndex(index[plan.table :], table, block)


@_kernel
def _rows_of_tile(entry_ptr, tile, GROUP: tl.constexpr, SIZE: tl.constexpr):
    """By the entry of its block in the table: the block's first pair, and the tile's rows [first, end) among its."""
    first_pair = tl.load(entry_ptr + 2)
    first = (tile - tl.load(entry_ptr)) * SIZE
    return first_pair, first, tl.minimum(first + SIZE, (tl.load(entry_ptr + 3) - first_pair) * GROUP)


# Forward ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@_kernel(do_not_specialize=["n_segments", "T_keys", "n_blocks", "n_tiles", "n_pairs", "t0", "z0"])
def _selected_by_block_kernel(
    q_ptr, k_ptr, v_ptr, pairs_ptr, table_ptr, block_ptr, o_part, lse_part, cu_seqlens, first_ptr,
    n_segments, T_keys, n_blocks, n_tiles, n_pairs, t0, z0, scale, q_strides, k_strides, v_strides,
    K: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SELECT: tl.constexpr, SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o_part[t, s] = softmax(scale·q[t]·k) v over the tokens <= t of the block in slot s; lse_part to the base 2.

    One program: a block, whose keys stay, and SIZE of the rows (pair, head) that chose it, a tile at a time.
    """
    tile, z = tl.program_id(0), z0 + tl.program_id(1)
    j = tl.load(block_ptr + z.to(tl.int64) * n_tiles + tile)
    if j >= n_blocks:
        return
    b, k = z // K, z % K
    first_pair, first, end = _rows_of_tile(table_ptr + (z.to(tl.int64) * n_blocks + j) * 4, tile, GROUP, SIZE)
    begin, block_end = _tokens_of_block(j, cu_seqlens, n_segments, T_keys, SELECT)
    block_end = tl.minimum(block_end, begin + SELECT)
    past = _past(first_ptr, b, T_keys, cu_seqlens)
    s = begin + tl.arange(0, BLOCK_N)
    k_tile = _load_rows(k_ptr, _offsets(k_strides, b, s, k), s < block_end, D, BLOCK_D)
    k_t = tl.trans(k_tile)  # here, so that it stays in shared memory
    v = _load_rows(v_ptr, _offsets(v_strides, b, s, k), s < block_end, D, BLOCK_D)
    row = first + tl.arange(0, BLOCK_M)
    pair = tl.load(pairs_ptr + first_pair + row // GROUP, mask=row < end, other=0)
    for r in tl.range(first, end, BLOCK_M):
        row = r + tl.arange(0, BLOCK_M)
        exists = row < end
        t = tl.where(exists, past + t0 + pair // S, -1)
        q = _load_rows(q_ptr, _offsets(q_strides, b, t0 + pair // S, k * GROUP + row % GROUP), exists, D, BLOCK_D)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
        visible = (s < block_end)[None, :] & (s[None, :] <= t[:, None])
        acc, m_i, _, p = _softmax_step(acc, m_i, q, k_t, v, visible, scale * _TL_LOG2E, PRECISION)
        l_i = tl.sum(p, 1)
        if SELECT > BLOCK_N:
            for n0 in range(BLOCK_N, SELECT, BLOCK_N):
                more = s + n0
                k_more = _load_rows(k_ptr, _offsets(k_strides, b, more, k), more < block_end, D, BLOCK_D)
                v_more = _load_rows(v_ptr, _offsets(v_strides, b, more, k), more < block_end, D, BLOCK_D)
                visible = (more < block_end)[None, :] & (more[None, :] <= t[:, None])
                acc, m_i, alpha, p = _softmax_step(
                    acc, m_i, q, tl.trans(k_more), v_more, visible, scale * _TL_LOG2E, PRECISION
                )
                l_i = l_i * alpha + tl.sum(p, 1)
        out = (tl.program_id(1).to(tl.int64) * n_pairs + pair) * GROUP + row % GROUP
        _store_rows(o_part, out * D, acc / tl.where(exists, l_i, 1.0)[:, None], exists, D, BLOCK_D)
        tl.store(lse_part + out, m_i + tl.log2(l_i), mask=exists)
        # early: rows that are gathered by numbers of the same round would wait for them
        pair = tl.load(pairs_ptr + first_pair + (row + BLOCK_M) // GROUP, mask=row + BLOCK_M < end, other=0)


@_kernel
def _load_gate(pointers, mask):
    """Gates in float32; NaN in place of those below 0, as the gradients have their logarithm."""
    gate = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return tl.where(gate < 0, float("nan"), gate)


@_kernel
def _store_selected(
    o, lse, o_ptr, lse_ptr, mixed_ptr, gates_ptr, gate_strides, o_local, o_compressed, b, t, h, row, exists,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of the branch; with gates, mixed[row] = Σ_c gates[row, c]·o_c[row] too (eq. 5).

    `row` numbers the heads (b, t, h) of a contiguous tensor; gates may be the same for many of them.
    """
    _store_rows(o_ptr, row * D, o, exists, D, BLOCK_D)
    tl.store(lse_ptr + row, lse * _TL_LN2, mask=exists)
    if gates_ptr is not None:
        gates = gates_ptr + _offsets(gate_strides, b, t, h)
        mixed = _load_gate(gates + 2 * gate_strides[3], exists)[:, None] * o
        gate = _load_gate(gates, exists)
        mixed += gate[:, None] * _load_rows(o_local, row * D, exists, D, BLOCK_D).to(tl.float32)
        gate = _load_gate(gates + gate_strides[3], exists)
        mixed += gate[:, None] * _load_rows(o_compressed, row * D, exists, D, BLOCK_D).to(tl.float32)
        _store_rows(mixed_ptr, row * D, mixed, exists, D, BLOCK_D)


@_kernel(do_not_specialize=["T", "T_keys", "n_tokens", "t0", "z0"])
def _merge_slots_kernel(
    o_part, lse_part, block_indices, o_ptr, lse_ptr, mixed_ptr, gates_ptr, o_local, o_compressed, of_token, first_ptr,
    by_mask, T, T_keys, n_tokens, t0, z0, strides, gate_strides, K: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr,
    SP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SELECT: tl.constexpr, BLOCK_M: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """lse[t] = log sum_s exp lse_part[t, s]; o[t] = sum_s exp(lse_part[t, s] − lse[t]) o_part[t, s]."""
    if _other_way_works(by_mask, False):
        return
    z = z0 + tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # (token, head)
    exists = row < n_tokens * GROUP
    t = t0 + row // GROUP
    _, _, position = _position_of_token(t, z // K, of_token, first_ptr, T, T_keys, exists)
    own = position // SELECT
    blocks = block_indices + (z // K).to(tl.int64) * strides[0] + (z % K) * strides[2] + t.to(tl.int64) * strides[1]
    part = (tl.program_id(1).to(tl.int64) * n_tokens + row // GROUP) * (S * GROUP) + row % GROUP  # slot 0

    # log-sum-exp over the slots
    s = tl.arange(0, SP)[None, :]
    slots = tl.load(blocks[:, None] + s, mask=exists[:, None] & (s < S), other=-1)
    counted = (slots >= 0) & (slots <= own[:, None])
    lse_s = tl.load(lse_part + part[:, None] + s * GROUP, mask=counted, other=float("-inf"))
    m_i = tl.max(lse_s, axis=1)
    shift = tl.where(m_i == float("-inf"), 0.0, m_i)
    lse = m_i + tl.log2(tl.sum(tl.exp2(lse_s - shift[:, None]), axis=1))

    # weighted sum, slot by slot
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for slot in tl.range(0, S, loop_unroll_factor=UNROLL):
        j = tl.load(blocks + slot, mask=exists, other=-1)
        used = (j >= 0) & (j <= own)
        weight = tl.exp2(tl.load(lse_part + part + slot * GROUP, mask=used, other=float("-inf")) - lse)
        o_slot = _load_rows(o_part, (part + slot * GROUP) * D, used, D, BLOCK_D)
        acc += tl.where(used, weight, 0.0)[:, None] * o_slot.to(tl.float32)
    h = z % K * GROUP + row % GROUP
    out = ((z // K).to(tl.int64) * T + t) * (K * GROUP) + h
    _store_selected(
        acc, lse, o_ptr, lse_ptr, mixed_ptr, gates_ptr, gate_strides, o_local, o_compressed, z // K, t, h, out, exists,
        D, BLOCK_D,
    )  # fmt: skip


@_kernel(do_not_specialize=["T_keys"])
def _selected_by_query_kernel(
    q_ptr, k_desc, v_desc, k_ptr, v_ptr, block_indices, o_ptr, lse_ptr, mixed_ptr, gates_ptr, o_local, o_compressed,
    of_token, cu_seqlens, first_ptr, by_mask, T_keys, scale, q_strides, k_strides, v_strides, strides, gate_strides,
    K: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SELECT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o[t] = softmax(scale·q[t]·k) v over the tokens <= t of the blocks that t chose; one token, its whole group.

    A tile that a packed sequence's end cuts is loaded from behind all keys, where a descriptor gives 0, so that nothing
    of a neighbour comes along; it follows after the loop, by masked loads, which in the loop would cost its pipeline.
    """
    if _other_way_works(by_mask, False):
        return
    PACKED: tl.constexpr = cu_seqlens is not None
    t, z = tl.program_id(0), tl.program_id(1)
    b, k = z // K, z % K
    segment, token, position = _position_of_token(t, b, of_token, first_ptr, tl.num_programs(0), T_keys, True)
    end, own = T_keys, position // SELECT
    if PACKED:
        end = tl.load(cu_seqlens + segment + 1)
    g = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = g < GROUP
    q = _load_rows(q_ptr, _offsets(q_strides, b, t, k * GROUP + g), exists, D, BLOCK_D)
    blocks = block_indices + _offsets(strides, b, t, k)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m_i, l_i = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    parts: tl.constexpr = (SELECT + BLOCK_N - 1) // BLOCK_N
    j = tl.load(blocks)
    for step in tl.range(0, S * parts, num_stages=STAGES):
        n = step % parts * BLOCK_N + tl.arange(0, BLOCK_N)
        used = (j >= 0) & (j <= own)
        first = token + tl.where(used, j, 0) * SELECT + step % parts * BLOCK_N
        if PACKED:
            used &= first + BLOCK_N <= end
            first = tl.where(used, first, T_keys)
        k_t = tl.trans(tl.reshape(k_desc.load([b, k, first, 0]), [BLOCK_N, BLOCK_D]))
        v = tl.reshape(v_desc.load([b, k, first, 0]), [BLOCK_N, BLOCK_D])
        visible = used & (n < SELECT) & (j * SELECT + n <= position)
        acc, m_i, alpha, p = _softmax_step(acc, m_i, q, k_t, v, visible[None, :], scale * _TL_LOG2E, PRECISION)
        l_i = l_i * alpha + tl.sum(p, 1)
        j = tl.load(blocks + tl.minimum((step + 1) // parts, S - 1))  # early, for the next round's copies
    if PACKED:
        if token + own * SELECT + parts * BLOCK_N > end:
            for piece in range(0, S * parts * (BLOCK_N // 16)):  # few keys at a time, so that no register is spilled
                j = tl.load(blocks + piece // (parts * (BLOCK_N // 16)))
                n = piece % (parts * (BLOCK_N // 16)) * 16
                if (j >= 0) & (j <= own) & (token + j * SELECT + (n // BLOCK_N + 1) * BLOCK_N > end):
                    each = n + tl.arange(0, 16)
                    s = token + j * SELECT + each
                    k_tile = _load_rows(k_ptr, _offsets(k_strides, b, s, k), s < end, D, BLOCK_D)
                    v = _load_rows(v_ptr, _offsets(v_strides, b, s, k), s < end, D, BLOCK_D)
                    visible = (each < SELECT) & (s <= token + position)
                    acc, m_i, alpha, p = _softmax_step(
                        acc, m_i, q, tl.trans(k_tile), v, visible[None, :], scale * _TL_LOG2E, PRECISION
                    )
                    l_i = l_i * alpha + tl.sum(p, 1)
    h = k * GROUP + g
    row = (b.to(tl.int64) * tl.num_programs(0) + t) * (K * GROUP) + h
    acc = acc / tl.where(l_i > 0, l_i, 1.0)[:, None]
    _store_selected(
        acc, m_i + tl.log2(l_i), o_ptr, lse_ptr, mixed_ptr, gates_ptr, gate_strides, o_local, o_compressed, b, t, h,
        row, exists, D, BLOCK_D,
    )  # fmt: skip


def _selected_constants(
    kernel: str, H: int, K: int, D: int, S: int, select_block_size: int, dtype: torch.dtype, precision: str,
    device: torch.device,
) -> dict[str, Any]:  # fmt: skip
    constants = _constants(kernel, H, K, D, dtype, precision, device) | {"S": S, "SELECT": select_block_size}
    constants["BLOCK_N"] = min(constants["BLOCK_N"], max(_power_of_2(select_block_size), 16))
    return constants


def _partial_chunk(Z: int, T: int, slots: int, slot_bytes: int) -> tuple[int, int]:
    """Key heads and queries whose partial results are in memory at a time: a query has `slots` of them for each head.

    All queries of some heads, or where they do not fit, some queries of one head: a block's keys then serve more rows.
    """
    least, most = _PARTIAL_BYTES
    queries = max(min(max(4 * Z * T * slot_bytes, least), most) // (slots * slot_bytes), 1)
    heads = _cdiv(Z, _cdiv(Z, max(queries // T, 1)))
    return heads, min(_cdiv(queries, 64) * 64, T)


def _pieces(n: int, size: int) -> list[tuple[int, int]]:
    """Start and length of each piece of range(n)."""
    return [(start, min(size, n - start)) for start in range(0, n, size)]


@_kernel(do_not_specialize=["n_segments", "useful", "limit"])
def _by_mask_kernel(cu_seqlens, by_mask, n_segments, useful, limit, CHUNK: tl.constexpr):
    """by_mask = whether sum_s T_s·max(T_s − useful, 0) <= limit, over the sequences of T_s tokens."""
    vain = tl.zeros([CHUNK], tl.int64)
    for first in range(0, n_segments, CHUNK):
        s = first + tl.arange(0, CHUNK)
        start = tl.load(cu_seqlens + s, mask=s < n_segments, other=0)
        T = (tl.load(cu_seqlens + s + 1, mask=s < n_segments, other=0) - start).to(tl.int64)
        vain += T * tl.maximum(T - useful, 0)
    tl.store(by_mask, tl.sum(vain, 0) <= limit)


@functools.lru_cache(maxsize=4096)
def _by_mask_plan(segments: int, useful: int, limit: int, device: torch.device) -> _Launch:
    return _Launch(_by_mask_kernel, (1,), (segments, useful, limit), CHUNK=min(_power_of_2(segments), 1024))


def _by_mask(
    direction: str, q: Tensor, K: int, S: int, select_block_size: int, segments: _Segments | None = None
) -> bool | Tensor:
    """Whether to read all keys up to the query, under a mask, and not by an index of the chosen ones.

    A row then reads T/2 keys on average, most of them in vain; an index has its price too, in launches and in memory
    for each slot. One packed sequence of all tokens reads the most in vain, sequences of equal length the fewest. Where
    these differ, the answer is on the device: both ways are launched, and the kernels of one of them do nothing.
    """
    B, T, H, _ = q.shape
    heads, key = K * _power_of_2(H // K), 1 if q.dtype.itemsize == 2 else 64  # float32 is that much slower
    useful = 2 * S * (select_block_size + _SLOT_KEYS[direction] // key)
    limit = 2 * _MASKED_KEYS[direction] / (heads * key)
    if select_block_size < 8:  # many in a tile
        return False
    longest = B * T * max(T - useful, 0) <= limit
    if longest or segments is None or heads * T < _ROWS_IN_DOUBT:
        return longest
    _, cu_seqlens, n = _token_tables(segments)
    if T * max(T / max(n, 1) - useful, 0) > limit:
        return False
    by_mask = torch.empty(1, dtype=torch.bool, device=q.device)
    _by_mask_plan(n, useful, int(limit), q.device)(cu_seqlens, by_mask)
    return by_mask


def _large_group(q: Tensor, K: int) -> bool:
    """Whether the forward keeps the query outside, and needs no index, if descriptors can address the keys."""
    return q.shape[2] // K >= _LARGE_GROUP and q.dtype.itemsize == 2 and _has_descriptors(q.device)


def _forward_made_index(
    q: Tensor, K: int, S: int, select_block_size: int, segments: _Segments | None, first: Tensor | None
) -> bool:
    """Whether the forward made an index, by shapes alone. Where the backward has one chunk, it has no more."""
    by_index = first is not None or _by_mask("forward", q, K, S, select_block_size, segments) is False
    return by_index and not _large_group(q, K)


def _block_count(T: int, select_block_size: int, segments: int) -> int:
    """N, or the numbers that the blocks of packed sequences take up."""
    return T // select_block_size + segments if segments else _selection_count(T, select_block_size)


@functools.lru_cache(maxsize=4096)
def _by_query_plan(layout: tuple[Any, ...], select_block_size: int, scale: float, precision: str) -> _Launch:
    ((B, T, H, D), q_strides, dtype, device), (k_shape, k_strides), (_, v_strides), indices, gates, *_ = layout
    (_, _, K, S), strides, *_ = indices
    constants = _selected_constants("selected_by_query", H, K, D, S, select_block_size, dtype, precision, device)
    heads = min(max(_power_of_2(H // K), 16), constants["BLOCK_M"])
    constants |= {"BLOCK_M": heads, "STAGES": constants.pop("num_stages")}
    constants["num_warps"] *= heads // 16
    numbers = (k_shape[1], scale, q_strides, k_strides, v_strides, strides, gates and gates[1])
    views = {i: _key_view(layout[i], constants["BLOCK_N"]) for i in (1, 2)}
    return _Launch(_selected_by_query_kernel, (T, B * K, _cdiv(H // K, heads)), numbers, views, **constants)


@functools.lru_cache(maxsize=4096)
def _by_block_plan(
    layout: tuple[Any, ...], segments: int, select_block_size: int, scale: float, precision: str
) -> tuple[int, list[tuple[_IndexPlan, list[tuple[_Launch, _Launch]]]]]:
    """Rows of partial results; for each chunk of queries its index, and for each of key heads attention and merger."""
    ((B, T, H, D), q_strides, dtype, device), (k_shape, k_strides), (_, v_strides), indices, gates, *_ = layout
    (_, _, K, S), strides, *_ = indices
    T_keys, G = k_shape[1], H // K
    constants = _selected_constants("selected_by_block", H, K, D, S, select_block_size, dtype, precision, device)
    sizes = {name: constants[name] for name in ("K", "GROUP", "S", "D", "BLOCK_D", "SELECT")}
    sizes |= {"SP": _power_of_2(S), "BLOCK_M": _merge_rows(D), "UNROLL": _unroll(S)}
    n_blocks = _block_count(T_keys, select_block_size, segments)
    heads, queries = _partial_chunk(B * K, T, S, G * D * dtype.itemsize)
    chunks = []
    for t0, n_tokens in _pieces(T, queries):
        index = _index_plan(indices, t0, n_tokens, n_blocks, select_block_size, _FORWARD_ROWS, G)
        n_tiles, launches = index.block[1], []
        rows = (segments, T_keys, n_blocks, n_tiles)
        for z0, n_heads in _pieces(B * K, heads):
            numbers = (*rows, n_tokens * S, t0, z0, scale, q_strides, k_strides, v_strides)
            attend = _Launch(_selected_by_block_kernel, (n_tiles, n_heads), numbers, SIZE=_FORWARD_ROWS, **constants)
            numbers = (T, T_keys, n_tokens, t0, z0, strides, gates and gates[1])
            merge_grid = (_cdiv(n_tokens * G, _merge_rows(D)), n_heads)
            launches.append((attend, _Launch(_merge_slots_kernel, merge_grid, numbers, **sizes)))
        chunks.append((index, launches))
    return heads * queries * S * G, chunks


def _triton_selected_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, select_block_size: int, scale: float,
    gated: tuple[Tensor, ...] = (), segments: _Segments | None = None, first: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """o (B, T, H, D), lse (B, T, H); and the gated sum, where gates and the outputs of the other branches are given."""
    K, S = block_indices.shape[2:]
    by_mask = first is None and _by_mask("forward", q, K, S, select_block_size, segments)
    flag = by_mask if isinstance(by_mask, Tensor) else None
    if by_mask is False:
        o, lse, mixed = _empty_outputs(q, gated)
    else:
        masked = (block_indices, select_block_size, gated, flag)
        o, lse, mixed = _span_forward(q, k, v, _Span(0), scale, segments, None, *masked)
    if by_mask is True:
        return o, lse, mixed
    q, k, v, block_indices = (_unit_stride(x) for x in (q, k, v, block_indices))
    gates, *others = gated or (None, None, None)
    outputs = (o, lse, mixed, gates, *others)
    of_token, cu_seqlens, n = _token_tables(segments)
    layout = _layout(q, k, v, block_indices, gates, of_token, first)
    settings = (select_block_size, scale, _precision(q))
    if _large_group(q, K) and _addressable(k) and _addressable(v):
        launch = _by_query_plan(layout, *settings)
        launch(q, k, v, k, v, block_indices, *outputs, of_token, cu_seqlens, first, flag)
        return o, lse, mixed
    rows, chunks = _by_block_plan(layout, n, *settings)
    o_part, lse_part = q.new_empty(rows, q.shape[3]), q.new_empty(rows, dtype=torch.float32)
    room = index if len(chunks) == 1 else None
    for index_plan, launches in chunks:
        pairs = _index_pairs(index_plan, block_indices, of_token, first, flag, room)
        for attend, merge in launches:
            attend(q, k, v, *pairs, o_part, lse_part, cu_seqlens, first)
            merge(o_part, lse_part, block_indices, *outputs, of_token, first, flag)
    return o, lse, mixed


# Backward ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@_kernel(do_not_specialize=["n_segments", "T_keys", "n_blocks", "n_tiles", "n_pairs", "t0", "z0"])
def _selected_gradient_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, pairs_ptr, table_ptr, block_ptr, dq_part, dk_part, dv_part,
    cu_seqlens, first_ptr, n_segments, T_keys, n_blocks, n_tiles, n_pairs, term_stride, t0, z0, scale,
    do_strides, q_strides, k_strides, v_strides,
    K: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, S: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, SELECT: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """p = exp(scale·q·k − lse), ds = p (do·v − delta): dq_part[t, s] = scale·ds·k, and over a tile of the rows that
    chose the block dv_part = p'·do, dk_part = scale·ds'·q. One program: BLOCK_N keys of a block, SIZE rows.
    """
    tile, split, part, z = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64), z0 + tl.program_id(2)
    j = tl.load(block_ptr + z.to(tl.int64) * n_tiles + tile)
    if j >= n_blocks:
        return
    b, k = z // K, z % K
    first_pair, first, end = _rows_of_tile(table_ptr + (z.to(tl.int64) * n_blocks + j) * 4, tile, GROUP, SIZE)
    begin, block_end = _tokens_of_block(j, cu_seqlens, n_segments, T_keys, SELECT)
    past = _past(first_ptr, b, T_keys, cu_seqlens)
    s = begin + split * BLOCK_N + tl.arange(0, BLOCK_N)
    in_block = s < tl.minimum(block_end, begin + SELECT)
    k_tile = _load_rows(k_ptr, _offsets(k_strides, b, s, k), in_block, D, BLOCK_D)
    v_tile = _load_rows(v_ptr, _offsets(v_strides, b, s, k), in_block, D, BLOCK_D)
    q_ptr += _offsets(q_strides, b, 0, k * GROUP)
    do_ptr += _offsets(do_strides, b, 0, k * GROUP)
    lse_ptr += z.to(tl.int64) * term_stride
    delta_ptr += z.to(tl.int64) * term_stride
    dq_part += (part * n_pairs * SPLITS + split) * GROUP * D
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    row = first + tl.arange(0, BLOCK_M)
    pair = tl.load(pairs_ptr + first_pair + row // GROUP, mask=row < end, other=0)
    for r in range(first, end, BLOCK_M):
        row = r + tl.arange(0, BLOCK_M)
        exists = row < end
        t = tl.where(exists, past + t0 + pair // S, -1)
        term = (t0 + pair // S) * GROUP_PAD + row % GROUP
        q = _load_rows(q_ptr, _offsets(q_strides, 0, t0 + pair // S, row % GROUP), exists, D, BLOCK_D)
        do = _load_rows(do_ptr, _offsets(do_strides, 0, t0 + pair // S, row % GROUP), exists, D, BLOCK_D)
        lse = tl.load(lse_ptr + term, mask=exists, other=0.0)
        delta = tl.load(delta_ptr + term, mask=exists, other=0.0)

        # transposed: (keys, rows). The order of the products decides what spills; this one is the fastest.
        visible = in_block[:, None] & (s[:, None] <= t[None, :])
        sT = tl.dot(k_tile, tl.trans(q), input_precision=PRECISION)
        p = _probabilities(sT, lse[None, :], visible, scale * _TL_LOG2E)
        dv += tl.dot(p.to(do.dtype), do, input_precision=PRECISION)
        dp = tl.dot(v_tile, tl.trans(do), input_precision=PRECISION)
        ds = _dscores(p, dp, delta[None, :]).to(q.dtype)
        dk += tl.dot(ds, q, input_precision=PRECISION)
        dq = tl.trans(tl.dot(tl.trans(k_tile), ds, input_precision=PRECISION)) * scale
        out = (pair * (SPLITS * GROUP) + row % GROUP).to(tl.int64)
        _store_rows(dq_part, out * D, dq, exists, D, BLOCK_D)
        # early: rows that are gathered by numbers of the same round would wait for them
        pair = tl.load(pairs_ptr + first_pair + (row + BLOCK_M) // GROUP, mask=row + BLOCK_M < end, other=0)

    out = ((part * n_tiles + tile) * SPLITS + split) * BLOCK_N + tl.arange(0, BLOCK_N)
    _store_rows(dk_part, out * D, dk * scale, in_block, D, BLOCK_D)
    _store_rows(dv_part, out * D, dv, in_block, D, BLOCK_D)


@_kernel(do_not_specialize=["n_segments", "T_keys", "n_blocks", "n_tiles", "z0"])
def _sum_tiles_kernel(
    dk_part, dv_part, table_ptr, dk_ptr, dv_ptr, cu_seqlens, by_mask, n_segments, T_keys, n_blocks, n_tiles, z0,
    K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SELECT: tl.constexpr, ROOM: tl.constexpr,
    BLOCK_N: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dk[block j] = sum over the tiles of block j of dk_part, dv likewise; with ADD, added to what they hold.

    One program: BLOCK_N keys of a block. A tile has ROOM keys.
    """
    if _other_way_works(by_mask, False):
        return
    j, z = tl.program_id(0), z0 + tl.program_id(2)
    i = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    entry_ptr = table_ptr + (z.to(tl.int64) * n_blocks + j) * 4
    begin, end = _tokens_of_block(j, cu_seqlens, n_segments, T_keys, SELECT)
    in_block = (i < SELECT) & (begin + i < end)
    out = (((z // K).to(tl.int64) * T_keys + begin + i) * K + z % K) * D
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if ADD:
        dk += _load_rows(dk_ptr, out, in_block, D, BLOCK_D)
        dv += _load_rows(dv_ptr, out, in_block, D, BLOCK_D)
    first_tile = tl.program_id(2).to(tl.int64) * n_tiles
    for tile in tl.range(tl.load(entry_ptr), tl.load(entry_ptr + 1), loop_unroll_factor=4):
        part = ((first_tile + tile) * ROOM + i) * D
        dk += _load_rows(dk_part, part, in_block, D, BLOCK_D)
        dv += _load_rows(dv_part, part, in_block, D, BLOCK_D)
    _store_rows(dk_ptr, out, dk, in_block, D, BLOCK_D)
    _store_rows(dv_ptr, out, dv, in_block, D, BLOCK_D)


@_kernel(do_not_specialize=["T", "T_keys", "n_tokens", "t0", "z0"])
def _sum_slots_kernel(
    dq_part, block_indices, dq_ptr, of_token, first_ptr, by_mask, T, T_keys, n_tokens, t0, z0, strides,
    K: tl.constexpr, GROUP: tl.constexpr, S: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SELECT: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, ADD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dq[t] = sum_s dq_part[t, s], over the slots that hold a block; with ADD, added to what dq holds."""
    if _other_way_works(by_mask, False):
        return
    z = z0 + tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # (token, head)
    exists = row < n_tokens * GROUP
    t = t0 + row // GROUP
    _, _, position = _position_of_token(t, z // K, of_token, first_ptr, T, T_keys, exists)
    blocks = block_indices + (z // K).to(tl.int64) * strides[0] + (z % K) * strides[2] + t.to(tl.int64) * strides[1]
    part = (tl.program_id(1).to(tl.int64) * n_tokens + row // GROUP) * (S * SPLITS * GROUP) + row % GROUP
    out = (((z // K).to(tl.int64) * T + t) * (K * GROUP) + z % K * GROUP + row % GROUP) * D
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if ADD:
        dq += _load_rows(dq_ptr, out, exists, D, BLOCK_D).to(tl.float32)
    for slot in tl.range(0, S * SPLITS, loop_unroll_factor=UNROLL):
        j = tl.load(blocks + slot // SPLITS, mask=exists, other=-1)
        counted = (j >= 0) & (j <= position // SELECT)
        dq += _load_rows(dq_part, (part + slot * GROUP) * D, counted, D, BLOCK_D).to(tl.float32)
    _store_rows(dq_ptr, out, dq, exists, D, BLOCK_D)


@functools.lru_cache(maxsize=4096)
def _selected_backward_plan(
    layout: tuple[Any, ...], segments: int, term_stride: int, select_block_size: int, scale: float, add_dq: bool,
    add_dk: bool, precision: str,
) -> tuple[int, list[tuple[_IndexPlan, int, list[tuple[_Launch, _Launch, _Launch]]]]]:  # fmt: skip
    """Rows of partial dq; for each chunk of queries its index and rows of partial dk, and for each of key heads the
    launches for parts and their sums."""
    ((B, T, H, D), q_strides, dtype, device), (k_shape, k_strides, *_), (_, v_strides, *_), *others = layout
    ((_, _, K, S), strides, *_), (_, do_strides, *_), *_ = others
    T_keys, G = k_shape[1], H // K
    large = G >= _LARGE_GROUP
    kernel = "selected_backward_large_group" if large else "selected_backward"
    constants = _selected_constants(kernel, H, K, D, S, select_block_size, dtype, precision, device)
    keys, merge_rows = constants["BLOCK_N"], _merge_rows(D)
    splits, size = _cdiv(select_block_size, keys), _SUM_ROWS[large] if dtype.itemsize == 2 else _SUM_ROWS_FLOAT32
    n_blocks = _block_count(T_keys, select_block_size, segments)
    heads, queries = _partial_chunk(B * K, T, S * splits, G * D * dtype.itemsize)
    sizes = {name: constants[name] for name in ("K", "D", "BLOCK_D", "SELECT")}
    constants |= {"GROUP_PAD": _power_of_2(G), "SIZE": size, "SPLITS": splits}
    slot_sizes = sizes | {"GROUP": G, "S": S, "SPLITS": splits, "BLOCK_M": merge_rows, "UNROLL": _unroll(S * splits)}
    tile_sizes = sizes | {"ROOM": splits * keys, "BLOCK_N": min(keys, _SUM_KEYS)}
    pieces = _cdiv(select_block_size, min(keys, _SUM_KEYS))
    chunks = []
    for t0, n_tokens in _pieces(T, queries):
        index = _index_plan(others[0], t0, n_tokens, n_blocks, select_block_size, size, G)
        n_tiles, launches = index.block[1], []
        numbers, add_dk = (segments, T_keys, n_blocks, n_tiles), add_dk or t0 > 0
        for z0, n_heads in _pieces(B * K, heads):
            more = (n_tokens * S, term_stride, t0, z0, scale, do_strides, q_strides, k_strides, v_strides)
            merge_grid = (_cdiv(n_tokens * G, merge_rows), n_heads)
            gradient = _Launch(_selected_gradient_kernel, (n_tiles, splits, n_heads), (*numbers, *more), **constants)
            grid, last = (n_blocks, pieces, n_heads), (*numbers, z0)
            sum_tiles = _Launch(_sum_tiles_kernel, grid, last, ADD=add_dk, **tile_sizes)
            last = (T, T_keys, n_tokens, t0, z0, strides)
            sum_slots = _Launch(_sum_slots_kernel, merge_grid, last, ADD=add_dq, **slot_sizes)
            launches.append((gradient, sum_tiles, sum_slots))
        chunks.append((index, heads * n_tiles * splits * keys, launches))
    return heads * queries * G * S * splits, chunks


def _triton_selected_backward(
    do: Tensor, terms: _RowTerms, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, select_block_size: int,
    scale: float, dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None,
    segments: _Segments | None = None, first: Tensor | None = None, index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, added to those that are given. A block's sums are made by its own programs, in a fixed order."""
    K, S = block_indices.shape[2:]
    add = (dq is not None, dk is not None)
    by_mask = first is None and _by_mask("backward", q, K, S, select_block_size, segments)
    flag = by_mask if isinstance(by_mask, Tensor) else None
    if by_mask is not False:
        masked = (block_indices, select_block_size, flag)
        dq, dk, dv = _triton_span_backward(do, terms, q, k, v, _Span(0), scale, dq, segments, None, dk, dv, *masked)
    if by_mask is True:
        return dq, dk, dv
    do, q, k, v, block_indices = (_unit_stride(x) for x in (do, q, k, v, block_indices))
    of_token, cu_seqlens, n = _token_tables(segments)
    layout = _layout(q, k, v, block_indices, do, of_token, first)
    settings = (n, terms.lse.stride(1), select_block_size, scale, *add, _precision(q))
    dq_rows, chunks = _selected_backward_plan(layout, *settings)
    dq = _empty(q) if dq is None else dq
    sum_dtype = k.dtype if len(chunks) == 1 else torch.float32  # a sum over several chunks: until the last
    dk, dv = (_empty(k, sum_dtype) if x is None else x.to(sum_dtype).contiguous() for x in (dk, dv))
    dq_part = q.new_empty(dq_rows, q.shape[3])
    made = index is not None and len(chunks) == 1 and by_mask is False
    made = made and _forward_made_index(q, K, S, select_block_size, segments, first)
    for index_plan, dk_rows, launches in chunks:
        given = (block_indices, of_token, first, flag)
        pairs = _cut_again(index_plan, index) if made else _index_pairs(index_plan, *given)
        dk_part, dv_part = q.new_empty(2, dk_rows, q.shape[3], dtype=torch.float32).unbind()
        for gradient, sum_tiles, sum_slots in launches:
            gradient(do, q, k, v, *terms, *pairs, dq_part, dk_part, dv_part, cu_seqlens, first)
            sum_tiles(dk_part, dv_part, pairs.table, dk, dv, cu_seqlens, flag)
            sum_slots(dq_part, block_indices, dq, of_token, first, flag)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 13  Decoding
#
# A step of M new tokens a row, mostly 1, takes three kernels:
#
#     append      keys and values into the cache, rotated; the compressed blocks that they finish; the rotated queries
#     scan        splits of the visible compressed blocks, with the importance of the selection blocks from the same
#                 scores; beside them, splits of the local window
#     attend      splits of the S slots: each chooses the row's blocks for itself, merges what the scan has left, and
#                 reads its slots; the split of a row that ends last adds those of the others
#
# Attention is bound by reading keys. A row is one new token and one key head, numbered (b·M + m)·K + k; the heads of
# its group are a tile. Its keys are split so often that all multiprocessors read, and a split writes an output and a
# log-sum-exp of its own. The number of splits depends on shapes alone, their length on the row's position, which only
# the GPU knows.
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


# Projections ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@_kernel
def _store_columns(acc, bias_ptr, y_ptr, m, n, rows, N: tl.constexpr):
    """y[m, n] = acc + bias[n], in the rows and columns that exist."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m[:, None] * N + n[None, :], y, mask=(m < rows)[:, None] & (n < N)[None, :])


@_kernel(do_not_specialize=["rows"])
def _project_kernel(
    x_ptr, q_weight, k_weight, v_weight, gate_weight, q_bias, k_bias, v_bias, gate_bias, q, k, v, gates, rows,
    Q: tl.constexpr, KV: tl.constexpr, GATES: tl.constexpr, DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries, keys, values and gates of a few rows, y[:, n] = x·w[n] + bias[n]: BLOCK_N columns n in each program.

    One loop serves all layers, as each loop has buffers of its own.
    """
    tile = tl.program_id(0)
    k_tile: tl.constexpr = (Q + BLOCK_N - 1) // BLOCK_N  # the first of the keys
    v_tile: tl.constexpr = k_tile + (KV + BLOCK_N - 1) // BLOCK_N
    gate_tile: tl.constexpr = v_tile + (KV + BLOCK_N - 1) // BLOCK_N
    w_ptr = tl.where(tile < k_tile, q_weight, tl.where(tile < v_tile, k_weight, v_weight))
    first = tl.where(tile < k_tile, 0, tl.where(tile < v_tile, k_tile, v_tile))
    N = tl.where(tile < k_tile, Q, KV)
    if GATES > 0:
        w_ptr, first = tl.where(tile < gate_tile, w_ptr, gate_weight), tl.where(tile < gate_tile, first, gate_tile)
        N = tl.where(tile < gate_tile, N, GATES)
    m, n = tl.arange(0, BLOCK_M), (tile - first) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for d0 in tl.range(0, DIM, BLOCK_D, num_stages=STAGES):
        d = d0 + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + m[:, None] * DIM + d[None, :], mask=(m < rows)[:, None] & (d < DIM)[None, :], other=0.0)
        w = tl.load(w_ptr + n[None, :] * DIM + d[:, None], mask=(n < N)[None, :] & (d < DIM)[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if tile < k_tile:
        _store_columns(acc, q_bias, q, m, n, rows, Q)
    elif tile < v_tile:
        _store_columns(acc, k_bias, k, m, n, rows, KV)
    elif tile < gate_tile:
        _store_columns(acc, v_bias, v, m, n, rows, KV)
    elif GATES > 0:
        _store_columns(acc, gate_bias, gates, m, n, rows, GATES)


@functools.lru_cache(maxsize=4096)
def _project_plan(
    rows: int, dim: int, sizes: tuple[int, ...], biased: tuple[bool, ...], dtype: torch.dtype, device: torch.device,
    precision: str,
) -> _Launch:  # fmt: skip
    constants = {"Q": sizes[0], "KV": sizes[1], "GATES": sizes[3], "DIM": dim, "BLOCK_M": _FEW, "BLOCK_N": 16}
    constants |= {"BLOCK_D": 512 // dtype.itemsize, "STAGES": 4, "PRECISION": precision, "num_warps": 4}
    grid = (sum(_cdiv(size, constants["BLOCK_N"]) for size in sizes),)
    return _Launch(_project_kernel, grid, (rows,), **constants)


def _triton_project(
    x: Tensor, weights: Sequence[Tensor | None], biases: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Linear layers of a few rows x (B, M, dim), at most _FEW in all."""
    (B, M, dim), dtype, device = x.shape, x.dtype, x.device
    sizes = tuple([0 if w is None else w.shape[0] for w in weights])
    outputs = tuple([x.new_empty(B, M, size) for size in sizes])
    biased = tuple([bias is not None for bias in biases])
    plan = _project_plan(B * M, dim, sizes, biased, dtype, device, _precision(x))
    plan(x.contiguous(), *weights, *biases, *outputs)
    return outputs


# Append ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@_kernel
def _stream_size(B, room, K: tl.constexpr, D: tl.constexpr):
    """Numbers in one stream of a cache, (B, room, K, D), whose last row is a spare one."""
    return tl.cast(B, tl.int64) * room * (K * D)


@_kernel
def _rotate(
    x, partner, position, d, frequencies, TURNS: tl.constexpr, SCALE: tl.constexpr, HALF: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Rotary embedding of rows x at their positions; partner[d] = x[d ± D/2], and theta = 2^(−HALF·TURNS).

    Frequencies that are given take the place of theta's. Angles are float64 until whole turns are gone: a position may
    be a million. cos and sin are rounded to the dtype, as in a forward.
    """
    if frequencies is None:
        frequency = tl.exp2((d % HALF).to(tl.float64) * TURNS)
    else:
        frequency = tl.load(frequencies + d % HALF)
    turns = position.to(tl.float64)[:, None] * frequency[None, :] * _TL_PER_TURN
    angle = ((turns - tl.floor(turns)) * _TL_TURN).to(tl.float32)
    cos, sin = (tl.cos(angle) * SCALE).to(dtype).to(tl.float32), (tl.sin(angle) * SCALE).to(dtype).to(tl.float32)
    return x * cos + tl.where((d < HALF)[None, :], -partner, partner) * sin


@_kernel
def _append_rows(
    x_ptr, out_ptr, first, of_token, frequencies, tile, n_tokens, M, B, room,
    VALUES: tl.constexpr, HEADS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, TURNS: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """One tile of the heads of new tokens: queries to rows like theirs, keys and values into the streams of a cache.

    Sets of heads are in the order of the projections (local, compressed, selective), or there is one for all.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    SETS: tl.constexpr = HEADS // K
    n, d = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    token, head = n // HEADS, n % HEADS
    exists = token < n_tokens
    if of_token is None:
        b, m = token // M, token % M
    else:
        b = tl.load(of_token + token, mask=exists, other=0)
        m = tl.load(of_token + n_tokens + token, mask=exists, other=0)
    position = tl.load(first + b, mask=exists, other=0) + m
    row = n.to(tl.int64) * D
    x = _load_rows(x_ptr, row, exists, D, BLOCK_D).to(tl.float32)
    rotated = x
    if TURNS is not None and VALUES != 1:
        partner = x_ptr + row[:, None] + ((d + D // 2) % D)[None, :]
        partner = tl.load(partner, mask=exists[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        rotated = _rotate(x, partner, position, d, frequencies, TURNS, SCALE, D // 2, dtype)
    if VALUES is None:
        _store_rows(out_ptr, row, rotated, exists, D, BLOCK_D)
    else:
        exists &= (position >= 0) & (position < room - 1)
        stream = _stream_size(B, room, K, D)
        out = (b.to(tl.int64) * room + position) * (K * D) + head % K * D
        if SETS == 3:  # k, v of the selective branch are the streams 0, 1; of the local 2, 3; of the compressed 4, 5
            part = (head // K + 1) % 3
            x = tl.where((part == 2)[:, None], x, rotated)
            _store_rows(out_ptr, (part * 2 + VALUES) * stream + out, x, exists, D, BLOCK_D)
        else:
            _store_rows(out_ptr, VALUES * stream + out, rotated, exists, D, BLOCK_D)
            if TURNS is not None and VALUES == 0:
                _store_rows(out_ptr, 2 * stream + out, x, exists, D, BLOCK_D)


@_kernel
def _finish_blocks(
    x_ptr, tokens, blocks, first, frequencies, position_ptr, w_in, b_in, w_out, b_out, chunk, M, B, room, C_room,
    VALUES: tl.constexpr, SETS: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, UNITS: tl.constexpr, UNITS_PAD: tl.constexpr, BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr, TURNS: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compressed keys (or values) of the blocks that the new tokens finish: nothing to do in most steps.

    Rows are blocks, and the last one is the position embedding, which the products thereby meet in its own precision:
    W·(x + position) + b, and with an output layer W_out·gelu(that) + b_out. Without weights it is the mean. Tokens
    that are new come from the projections, as their way into the cache may not have ended.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    RAW: tl.constexpr = 4 if SETS == 3 else 2 if TURNS is not None and VALUES == 0 else 0
    # the weight of a convolution is (out, in, token), the first of an MLP (units, token, in)
    TOKENS: tl.constexpr = 128 // BLOCK_D if w_in is not None and BLOCK_D < 128 else 1
    UNIT: tl.constexpr = 128 // dtype.primitive_bitwidth  # numbers in the 16 bytes that are copied at once
    TOKEN_STEP: tl.constexpr = D if w_out is not None else 1
    DIM_STEP: tl.constexpr = 1 if w_out is not None else BLOCK
    r, d, unit = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, UNITS_PAD)
    each = tl.cdiv(M, STRIDE) * K  # M tokens finish no more blocks, of each key head
    n = chunk * (BLOCK_M - 1) + r
    b, i, k = (n // each).to(tl.int64), (n % each // K).to(tl.int64), n % K
    exists = (r < BLOCK_M - 1) & (b < B)
    begin = tl.minimum(tl.maximum(tl.load(first + b, mask=exists, other=0), 0), room)
    i += _span(begin - 1, 0, BLOCK, STRIDE)[1]
    exists &= i < _span(tl.minimum(begin + M, room - 1) - 1, 0, BLOCK, STRIDE)[1]
    if tl.max(exists.to(tl.int32), axis=0) > 0:
        s = i * STRIDE
        cached = tokens + (RAW + VALUES) * _stream_size(B, room, K, D) + ((b * room + s) * K + k)[:, None] * D
        new = x_ptr + ((b * M + s - begin) * (SETS * K) + SETS // 2 * K + k)[:, None] * D
        of_position = (r == BLOCK_M - 1)[:, None]
        column = tl.arange(0, TOKENS * BLOCK_D)  # several tokens at a time: rounds wait for each other
        acc = tl.zeros([BLOCK_M, UNITS_PAD], tl.float32)
        for first_token in tl.range(0, BLOCK, TOKENS, num_stages=STAGES):
            u, c = first_token + column // BLOCK_D, column % BLOCK_D
            inside, step = (u < BLOCK) & (c < D), u[None, :].to(tl.int64)
            row = tl.where(s[:, None] + step < begin[:, None], cached + step * (K * D), new + step * (SETS * K * D))
            mask = exists[:, None] & inside[None, :]
            if w_in is None:
                acc += tl.load(row + c[None, :], mask=mask, other=0.0).to(tl.float32)
            else:
                row = tl.where(of_position, position_ptr + step * D, row)
                row += c[None, :]
                if D % UNIT == 0:
                    row = tl.max_contiguous(tl.multiple_of(row, [1, 16]), [1, UNIT])
                x = tl.load(row, mask=mask | (of_position & inside[None, :]), other=0.0)
                w = w_in + unit[None, :] * (BLOCK * D) + u[:, None] * TOKEN_STEP + c[:, None] * DIM_STEP
                w = tl.load(w, mask=(unit < UNITS)[None, :] & inside[:, None], other=0.0)
                acc = tl.dot(x, w, acc, input_precision=PRECISION)
        if w_in is None:
            acc /= BLOCK
        else:
            of_position = tl.sum(tl.where(of_position, acc, 0.0), axis=0)
            acc += (of_position + tl.load(b_in + unit, mask=unit < UNITS, other=0.0))[None, :]
        if w_out is not None:
            hidden = (0.5 * acc * (1 + tl.erf(acc * _TL_SQRT_HALF))).to(dtype)
            w = w_out + d[None, :] * UNITS + unit[:, None]
            w = tl.load(w, mask=(unit < UNITS)[:, None] & (d < D)[None, :], other=0.0)
            acc = tl.dot(hidden, w, input_precision=PRECISION)
            acc += tl.load(b_out + d, mask=d < D, other=0.0)[None, :]
        y = acc.to(dtype).to(tl.float32)
        if TURNS is not None and VALUES == 0:
            partner = tl.gather(y, tl.broadcast_to(((d + D // 2) % D)[None, :], [BLOCK_M, BLOCK_D]), axis=1)
            y = _rotate(y, partner, s, d, frequencies, TURNS, SCALE, D // 2, dtype)
        _store_rows(blocks, (((VALUES * B + b) * C_room + i) * K + k) * D, y, exists, D, BLOCK_D)


@_kernel(do_not_specialize=["n_tokens", "M", "B", "room", "C_room"])
def _append_kernel(
    q_ptr, k_ptr, v_ptr, q_out, tokens, blocks, first, of_token, frequencies,
    k_position, k_in, k_in_bias, k_out, k_out_bias, v_position, v_in, v_in_bias, v_out, v_out_bias,
    n_tokens, M, B, room, C_room,
    H: tl.constexpr, K: tl.constexpr, SETS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    TURNS: tl.constexpr, SCALE: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr, UNITS: tl.constexpr,
    UNITS_PAD: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs for the heads of keys, of values and, if they turn, of queries; then those for finished blocks."""
    program, tiles = tl.program_id(0), tl.cdiv(n_tokens * (SETS * K), ROWS)
    query_tiles = tl.cdiv(n_tokens * H, ROWS) if TURNS is not None else 0
    if program < tiles:
        _append_rows(
            k_ptr, tokens, first, of_token, frequencies, program, n_tokens, M, B, room,
            0, SETS * K, K, D, BLOCK_D, ROWS, TURNS, SCALE,
        )  # fmt: skip
    elif program < 2 * tiles:
        _append_rows(
            v_ptr, tokens, first, of_token, frequencies, program - tiles, n_tokens, M, B, room,
            1, SETS * K, K, D, BLOCK_D, ROWS, TURNS, SCALE,
        )  # fmt: skip
    elif program < 2 * tiles + query_tiles:
        _append_rows(
            q_ptr, q_out, first, of_token, frequencies, program - 2 * tiles, n_tokens, M, B, room,
            None, H, K, D, BLOCK_D, ROWS, TURNS, SCALE,
        )  # fmt: skip
    elif BLOCK > 0:
        chunk = program - 2 * tiles - query_tiles
        if chunk % 2 == 0:
            _finish_blocks(
                k_ptr, tokens, blocks, first, frequencies, k_position, k_in, k_in_bias, k_out, k_out_bias,
                chunk // 2, M, B, room, C_room, 0, SETS, K, D, BLOCK_D, BLOCK, STRIDE, UNITS, UNITS_PAD, BLOCK_M,
                STAGES, TURNS, SCALE, PRECISION,
            )  # fmt: skip
        else:
            _finish_blocks(
                v_ptr, tokens, blocks, first, frequencies, v_position, v_in, v_in_bias, v_out, v_out_bias,
                chunk // 2, M, B, room, C_room, 1, SETS, K, D, BLOCK_D, BLOCK, STRIDE, UNITS, UNITS_PAD, BLOCK_M,
                STAGES, TURNS, SCALE, PRECISION,
            )  # fmt: skip


@functools.lru_cache(maxsize=4096)
def _append_plan(
    q: torch.Size, heads: int, tokens: torch.Size, C_room: int, packed: bool, given: tuple[bool, ...], units: int,
    turns: float | None, scale: float, block_size: int, stride: int, dtype: torch.dtype, device: torch.device,
    precision: str,
) -> _Launch:  # fmt: skip
    (rows, M, H, D), (_, B, room, K, _) = q, tokens
    n_tokens = rows * M
    size = 8 if n_tokens <= 64 else _merge_rows(D)  # a step waits for the latency of one program
    constants = {"H": H, "K": K, "SETS": heads // K, "D": D, "BLOCK_D": _block_d(D), "ROWS": size, "TURNS": turns}
    constants |= {"SCALE": scale}
    constants |= {"BLOCK": block_size, "STRIDE": stride, "UNITS": units, "UNITS_PAD": max(_power_of_2(units), 16)}
    stage_bytes = max(_block_d(D), 128) * constants["UNITS_PAD"] * dtype.itemsize
    most = _shared_memory(device) * constants["UNITS_PAD"] // (constants["UNITS_PAD"] + 16)  # beside 16 rows
    constants |= {"BLOCK_M": 16, "STAGES": 1 + min(2**17 // stage_bytes, most // stage_bytes, 4)}
    constants |= {"PRECISION": precision}
    constants |= {"num_warps": 8 if block_size else 4}
    programs = 2 * _cdiv(n_tokens * heads, size) + (0 if turns is None else _cdiv(n_tokens * H, size))
    chunks = _cdiv(B * _cdiv(M, stride) * K, constants["BLOCK_M"] - 1) if block_size else 0
    return _Launch(_append_kernel, (programs + 2 * chunks,), (n_tokens, M, B, room, C_room), **constants)


def _whole(x: Tensor) -> Tensor:
    """x itself where it is contiguous from a multiple of 16 bytes on, else such a copy."""
    return x if x.is_contiguous() and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def _triton_extend(
    q: Tensor, k: Tensor, v: Tensor, tokens: Tensor, blocks: Tensor, first: Tensor, of_token: Tensor | None,
    rotation: _Rotation, block_size: int, stride: int, weights: Sequence[Tensor | None],
) -> Tensor:  # fmt: skip
    """k and v (B, M, sets·K, D) of new tokens into a cache; q (B, M, H, D) rotated, or nothing if it does not turn.

    `weights` of the compressors are position, weight, bias, weight and bias of the output layer, for keys and then for
    values; None where there are none. With a block size of 0 the blocks are not touched.
    """
    q, k, v = _whole(q), _whole(k), _whole(v)
    weights = [None if w is None else _whole(w) for w in weights]
    units, given = q.shape[3] if weights[1] is None else len(weights[1]), tuple([w is not None for w in weights])
    shape = (q.shape, k.shape[2], tokens.shape, blocks.shape[2], of_token is not None, given, units)
    theta, scale, frequencies = rotation
    turns = None if theta is None else -2 * math.log2(theta) / q.shape[3]
    turns = turns if frequencies is None else 0.0  # any but None: the kernel reads the frequencies
    plan = _append_plan(*shape, turns, scale, block_size, stride, q.dtype, q.device, _precision(q))
    rotated = torch.empty(0 if turns is None else q.shape, dtype=q.dtype, device=q.device)
    plan(q, k, v, rotated, tokens, blocks, first, of_token, frequencies, *weights)
    return rotated


# Attention ────────────────────────────────────────────────────────────────────────────────────────────────────────────
#
# One float32 buffer takes the partial outputs: row (split·rows + row)·GROUP + g has D numbers of o and, behind them,
# lse. Another takes the importance that the scan hands on, and counters of the kernel that attends.

_PART_PAD = _constexpr(4)  # a row of a partial output is D + 4 numbers, so that each begins at a multiple of 16 bytes


@_kernel
def _decode_row(row, first, of_token, M, room, K: tl.constexpr):
    """(row of q, row of the cache, key head, position within the room) of a row."""
    n, k = row // K, row % K
    b, m = n // M, n % M
    if of_token is not None:
        b, m = tl.load(of_token + n), tl.load(of_token + M + n)
    t = tl.load(first + b) + m
    return n.to(tl.int64), b.to(tl.int64), k, tl.minimum(tl.maximum(t, 0), room - 2)


@_kernel
def _decode_begin(
    q_ptr, n, k, K: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Heads of the group, their queries, and an empty softmax: g, q, acc, m_i, l_i.

    l_i stays apart by the keys of a tile, as a sum over them would make the warps wait for each other.
    """
    g = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _load_rows(q_ptr, ((n * K + k) * GROUP + g) * D, g < GROUP, D, BLOCK_D)
    acc, l_i = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    return g, q, acc, tl.full([BLOCK_M], float("-inf"), tl.float32), l_i


@_kernel
def _decode_tile(
    acc, m_i, l_i, q, k_ptr, v_ptr, offset, i, seen, scale,
    K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys i, rows of K·D numbers that begin at the offset, of the online softmax; p too."""
    rows = offset + i.to(tl.int64) * (K * D)
    k_t = tl.trans(_load_rows(k_ptr, rows, seen, D, BLOCK_D))
    v = _load_rows(v_ptr, rows, seen, D, BLOCK_D)
    acc, m_i, alpha, p = _softmax_step(acc, m_i, q, k_t, v, seen[None, :], scale * _TL_LOG2E, PRECISION)
    return acc, m_i, l_i * alpha[:, None] + p, p


@_kernel
def _split_bounds(tiles, split, splits):
    """[begin, end): the tiles of a split."""
    return tiles * split // splits, tiles * (split + 1) // splits


@_kernel
def _part_row(row, split, g, GROUP: tl.constexpr):
    """Row of a partial output."""
    return (tl.cast(split, tl.int64) * tl.num_programs(0) + row) * GROUP + g


@_kernel
def _decode_end(
    acc, m_i, l_i, parts, row, split, g, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """A partial output: acc / l and its m_i + log2 l, where l = sum l_i; without a key 0 and -inf."""
    l_i = tl.sum(l_i, axis=1)
    out = _part_row(row, split, g, GROUP) * (D + _PART_PAD)
    _store_rows(parts, out, acc / tl.where(l_i > 0, l_i, 1.0)[:, None], g < GROUP, D, BLOCK_D)
    tl.store(parts + out + D, m_i + tl.log2(l_i), mask=g < GROUP)


@_kernel
def _behind_scores(scores, n_scores, GROUP: tl.constexpr, BLOCKS: tl.constexpr, CARRY: tl.constexpr):
    """Addresses behind the scores in their buffer: carries of tiles, and counters."""
    heads = tl.num_programs(0).to(tl.int64) * GROUP
    carries = scores + heads * n_scores
    return carries, (carries + heads * (n_scores // BLOCKS) * CARRY).to(tl.pointer_type(tl.int32), bitcast=True)


@_kernel
def _carried(
    carries, row, tile, right, g, n_scores, GROUP: tl.constexpr, BLOCKS: tl.constexpr, CARRY: tl.constexpr
):  # fmt: skip
    """Address of a tile's carry to block `right` of the next one; heads side by side, as lone numbers are slow."""
    return carries + ((row.to(tl.int64) * (n_scores // BLOCKS) + tile) * CARRY + right) * GROUP + g


@_kernel(do_not_specialize=["M", "B", "room", "C_room", "n_compressed", "n_scores"])
def _decode_scan_kernel(
    q_ptr, tokens, blocks, first, of_token, parts, scores, M, B, room, C_room, n_compressed, n_scores, scale,
    K: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr, WINDOW: tl.constexpr, LOCAL_STREAM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, PART: tl.constexpr, CARRY: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A split of softmax(scale·q·k) v over compressed blocks, or over the local window.

    Of the former also scores[row, g, j] = log2 sum_i overlap(i, j) exp2(scale·q[g]·k[i]). A tile has the keys of BLOCKS
    selection blocks; its carry to the next tile's first CARRY blocks is kept too. The counters of the kernel that
    attends are set to 0 here.
    """
    r: tl.constexpr = SELECT // STRIDE
    row, split = tl.program_id(0), tl.program_id(1)
    n_scores = n_scores // BLOCKS * BLOCKS  # which it is: the compiler sees that rows are aligned
    carries, arrived = _behind_scores(scores, n_scores, GROUP, BLOCKS, CARRY)
    if split == 0:
        tl.store(arrived + row * tl.num_programs(2) + tl.program_id(2), 0)
    n, b, k, t = _decode_row(row, first, of_token, M, room, K)
    if split >= n_compressed:
        g, q, acc, m_i, l_i = _decode_begin(q_ptr, n, k, K, GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N)
        k_local = tokens + LOCAL_STREAM * _stream_size(B, room, K, D)
        v_local, offset = k_local + _stream_size(B, room, K, D), (b * room * K + k) * D
        first_key, end = _span(t, WINDOW, 1, 1)
        tiles, n_local = tl.cdiv(end - first_key, BLOCK_N), tl.num_programs(1) - n_compressed
        begin_tile, end_tile = _split_bounds(tiles, split - n_compressed, n_local)
        for tile in tl.range(begin_tile, end_tile, num_stages=STAGES):
            s = first_key + tile * BLOCK_N + tl.arange(0, BLOCK_N)
            acc, m_i, l_i, _ = _decode_tile(
                acc, m_i, l_i, q, k_local, v_local, offset, s, s < end, scale, K, D, BLOCK_D, PRECISION
            )
        _decode_end(acc, m_i, l_i, parts, row, split, g, GROUP, D, BLOCK_D)
    else:
        g, q, acc, m_i, l_i = _decode_begin(q_ptr, n, k, K, GROUP, D, BLOCK_D, BLOCK_M, BLOCKS * PART)
        v_cmp, offset = blocks + _stream_size(B, C_room, K, D), (b * C_room * K + k) * D
        _, end = _span(t, 0, BLOCK, STRIDE)
        begin_tile, end_tile = _split_bounds(tl.cdiv(end, BLOCKS * r), split, n_compressed)
        column, jj = tl.arange(0, BLOCKS * PART), tl.arange(0, BLOCKS)
        score_rows = ((row.to(tl.int64) * GROUP + g) * n_scores)[:, None]
        for tile in tl.range(begin_tile, end_tile, num_stages=STAGES):
            i = (tile * BLOCKS + column // PART) * r + column % PART
            seen = (column % PART < r) & (i < end)
            acc, m_i, l_i, p = _decode_tile(
                acc, m_i, l_i, q, blocks, v_cmp, offset, i, seen, scale, K, D, BLOCK_D, PRECISION
            )
            score, carry = _fold_importance(p, 0, BLOCK // STRIDE, r, BLOCK_M, BLOCKS, PART, CARRY)
            score = m_i[:, None] + tl.log2(score)  # to stay in the L2 for the next kernel while keys pass by
            out = scores + score_rows + (tile * BLOCKS + jj)[None, :]
            tl.store(out, score, mask=(g < GROUP)[:, None], eviction_policy="evict_last")
            if CARRY > 0:
                out = _carried(carries, row, tile, jj[None, :], g[:, None], n_scores, GROUP, BLOCKS, CARRY)
                mask = (g < GROUP)[:, None] & (jj < CARRY)[None, :]
                tl.store(out, m_i[:, None] + tl.log2(carry), mask=mask, eviction_policy="evict_last")
        _decode_end(acc, m_i, l_i, parts, row, split, g, GROUP, D, BLOCK_D)


@_kernel
def _sum_exp2(x, lse):
    """sum_g exp2(x − lse) over the rows of x, 0 for −inf."""
    return tl.sum(tl.where(x == float("-inf"), 0.0, tl.exp2(x - lse)), axis=0)


@_kernel
def _decode_score(
    parts, scores, carries, row, tiles, n_compressed, n_scores, GROUP: tl.constexpr, D: tl.constexpr,
    SPLITS_PAD: tl.constexpr, BLOCKS: tl.constexpr, CARRY: tl.constexpr, HEADS: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """score[j] = sum_g exp2(scores[row, g, j] − lse[g]), and the same of the carries; lse over the splits: (NP,)."""
    j, split = tl.arange(0, NP)[None, :], tl.arange(0, SPLITS_PAD)[None, :]
    NT: tl.constexpr = NP // BLOCKS  # tiles; nothing is carried to the first one
    tile, jj = tl.arange(0, NT if NT > 1 else 1)[None, :], tl.arange(0, BLOCKS)[None, :]
    score = tl.zeros([NP], tl.float32)
    for first_head in range(0, GROUP, HEADS):
        g = first_head + tl.arange(0, HEADS)[:, None]
        own = scores + (row.to(tl.int64) * GROUP + g) * n_scores + j
        mask = (g < GROUP) & (j < tiles * BLOCKS)
        own = tl.load(own, mask=mask, other=float("-inf"), eviction_policy="evict_first")  # before it waits for lse
        lse = parts + _part_row(row, split, g, GROUP) * (D + _PART_PAD) + D
        lse = tl.load(lse, mask=(g < GROUP) & (split < n_compressed), other=float("-inf"))
        m_i = tl.max(lse, axis=1)
        m_i = tl.where(m_i == float("-inf"), 0.0, m_i)
        lse = (m_i + tl.log2(tl.sum(tl.exp2(lse - m_i[:, None]), axis=1)))[:, None]
        score += _sum_exp2(own, lse)
        for right in tl.static_range(CARRY if NT > 1 else 0):
            carry = _carried(carries, row, tile - 1, right, g, n_scores, GROUP, BLOCKS, CARRY)
            mask = (g < GROUP) & (tile > 0) & (tile <= tiles)
            carry = _sum_exp2(tl.load(carry, mask=mask, other=float("-inf"), eviction_policy="evict_first"), lse)
            score += tl.reshape(tl.where(jj == right, carry[:, None], 0.0), [NP])
    return score


@_kernel
def _choose_slots(
    score, own, end_slot, SP: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, NP: tl.constexpr
):  # fmt: skip
    """Slots of one row, up to end_slot: forced blocks, then the highest of score[: own + 1], ties to the lower index.

    Slots hold -1 where nothing is left. A few maxima take less time than the bisection of `_store_highest`. A score
    that is not negative orders by its bits, and below them a key has the index, so that no two are equal.
    """
    j, slot = tl.arange(0, NP), tl.arange(0, SP)
    local, init = own - slot, slot - LOCAL
    chosen = tl.where(slot < LOCAL, tl.maximum(local, -1), tl.where((init < INIT) & (init <= own - LOCAL), init, -1))
    score = tl.where((score >= 0) & (score < float("inf")), score, 0.0)
    key = score.to(tl.int32, bitcast=True).to(tl.int64) * NP + (NP - 1 - j)
    key = tl.where((j >= INIT) & (j <= own - LOCAL), key, -1)
    for s in range(LOCAL + INIT, end_slot):
        highest = tl.max(key, axis=0)
        chosen = tl.where((slot == s) & (highest >= 0), NP - 1 - (highest % NP).to(tl.int32), chosen)
        key = tl.where(key == highest, -1, key)
    return chosen


@_kernel
def _branch_weight(lse, of_branch, logit):
    """gate·exp2(lse[n] − lse) over the splits n of a branch, lse their log-sum; 0 for the others."""
    lse = tl.where(of_branch[:, None], lse, float("-inf"))
    m_i = tl.max(lse, axis=0)
    weight = tl.exp2(lse - tl.where(m_i == float("-inf"), 0.0, m_i)[None, :])
    # the sum is 0 or, as its largest term is 1, at least 1
    return weight * (tl.sigmoid(logit.to(tl.float32)) / tl.maximum(tl.sum(weight, axis=0), 1.0))[None, :]


@_kernel
def _merge_splits(
    parts, logits, o_ptr, row, h, n_compressed, n_others, n_parts,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS_PAD: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    """o[g] = sum over the branches of gate·sum_n exp2(lse[n] − lse)·o[n], HEADS heads at a time."""
    split, d = tl.arange(0, SPLITS_PAD), tl.arange(0, BLOCK_D)
    for first_head in range(0, GROUP if GROUP < BLOCK_M else BLOCK_M, HEADS):
        g = tl.program_id(2) * BLOCK_M + first_head + tl.arange(0, HEADS)
        exists = (split < n_parts)[:, None] & (g < GROUP)[None, :]
        out = _part_row(row, split[:, None], g[None, :], GROUP) * (D + _PART_PAD)
        lse = tl.load(parts + out + D, mask=exists, other=float("-inf"))
        mask = exists[:, :, None] & (d < D)[None, None, :]
        o = tl.load(parts + out[:, :, None] + d[None, None, :], mask=mask, other=0.0)
        logit = logits + g * 3
        local = tl.load(logit, mask=g < GROUP, other=0.0)
        compressed = tl.load(logit + 1, mask=g < GROUP, other=0.0)
        selective = tl.load(logit + 2, mask=g < GROUP, other=0.0)
        weight = _branch_weight(lse, split < n_compressed, compressed)
        weight += _branch_weight(lse, (split >= n_compressed) & (split < n_others), local)
        weight += _branch_weight(lse, split >= n_others, selective)
        o = tl.sum(o * weight[:, :, None], axis=0)
        _store_rows(o_ptr, (h + g) * D, o, g < GROUP, D, BLOCK_D)


@_kernel(do_not_specialize=["M", "B", "room", "logit_stride", "n_compressed", "n_others", "n_scores"])
def _decode_attend_kernel(
    q_ptr, tokens, logits, o_ptr, first, of_token, parts, scores, M, B, room, logit_stride, n_compressed, n_others,
    n_scores, scale,
    K: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, BLOCKS: tl.constexpr, CARRY: tl.constexpr, HEADS: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, NP: tl.constexpr,
    SELECT: tl.constexpr, SELECT_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr, SCORE_SPLITS: tl.constexpr,
    MERGE_HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The S blocks of a row, and a split of softmax(q·k) v over their tokens up to t; a slot is SELECT_PAD keys long.

    Splits [0, n_compressed) are of the compressed branch, those up to n_others of the local one. The split of a row
    that ends last writes o[row], all branches merged.
    """
    row, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    n, b, k, t = _decode_row(row, first, of_token, M, room, K)
    g, q, acc, m_i, l_i = _decode_begin(q_ptr, n, k, K, GROUP, D, BLOCK_D, BLOCK_M, BLOCK_N)
    n_scores = n_scores // BLOCKS * BLOCKS  # which it is: the compiler sees that rows are aligned
    carries, arrived = _behind_scores(scores, n_scores, GROUP, BLOCKS, CARRY)
    tiles = tl.cdiv(_span(t, 0, BLOCK, STRIDE)[1], BLOCKS * (SELECT // STRIDE))
    score = _decode_score(
        parts, scores, carries, row, tiles, n_compressed, n_scores, GROUP, D, SCORE_SPLITS, BLOCKS, CARRY, HEADS, NP
    )
    taken = tl.minimum((t + SELECT) // SELECT, S)  # slots that hold a block: as many blocks as have begun
    begin_tile, end_tile = _split_bounds(tl.cdiv(taken * SELECT_PAD, BLOCK_N), split, splits)
    end_slot = tl.minimum(tl.cdiv(end_tile * BLOCK_N, SELECT_PAD), taken)
    blocks, slot = _choose_slots(score, t // SELECT, end_slot, SP, INIT, LOCAL, NP), tl.arange(0, SP)
    v_ptr, offset = tokens + _stream_size(B, room, K, D), (b * room * K + k) * D
    for tile in tl.range(begin_tile, end_tile, num_stages=STAGES):
        c = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        of_slot = (c // SELECT_PAD)[:, None] == slot[None, :]
        j = tl.max(tl.where(of_slot, blocks[None, :], -1), axis=1)  # no load, so that those of keys can run far ahead
        s = j * SELECT + c % SELECT_PAD
        seen = (j >= 0) & (c % SELECT_PAD < SELECT) & (s <= t)
        acc, m_i, l_i, _ = _decode_tile(
            acc, m_i, l_i, q, tokens, v_ptr, offset, s, seen, scale, K, D, BLOCK_D, PRECISION
        )
    _decode_end(acc, m_i, l_i, parts, row, n_others + split, g, GROUP, D, BLOCK_D)
    tl.debug_barrier()  # every thread has written
    ended = 1
    if splits > 1:  # what the others wrote before they arrived can be read
        ended += tl.atomic_add(arrived + row * tl.num_programs(2) + tl.program_id(2), 1, sem="acq_rel", scope="gpu")
    if ended == splits:
        h = n * (K * GROUP) + k * GROUP
        logits += n * logit_stride + k * GROUP * 3
        _merge_splits(
            parts, logits, o_ptr, row, h, n_compressed, n_others, n_others + splits,
            GROUP, D, BLOCK_D, BLOCK_M, SPLITS_PAD, MERGE_HEADS,
        )  # fmt: skip


class _DecodePlan(NamedTuple):
    """Launches of a step, and the numbers in the two buffers by which one hands on to the other."""

    chunk: int  # new tokens of a row at a time
    parts_size: int
    scores_size: int
    scan: _Launch
    attend: _Launch


@functools.lru_cache(maxsize=4096)
def _decode_plan(
    q: torch.Size, tokens: torch.Size, C_room: int, packed: bool, static: bool, logits: torch.dtype,
    local_window: int, choice: _Choice, scale: float, dtype: torch.dtype, device: torch.device, precision: str,
) -> _DecodePlan:  # fmt: skip
    (B, M, H, D), S, l_ = q, choice.topk_blocks, choice.select_block_size
    streams, cache_rows, room, K, _ = tokens
    T, C = room - 1, C_room - 1
    ratio, carry = _carry(choice)
    scan, attend = (_constants(f"decode_{kernel}", H, K, D, dtype, precision, device) for kernel in ("scan", "attend"))
    for constants in (scan, attend):
        constants["STAGES"] = constants.pop("num_stages")
        constants["BLOCK_M"] = heads = min(max(_power_of_2(H // K), 16), constants["BLOCK_M"])
    part, select_pad, head_tiles = _power_of_2(ratio), _power_of_2(l_), _cdiv(H // K, heads)
    blocks = max(scan["BLOCK_N"] // part, _power_of_2(max(carry, 1)))
    score_tiles = _cdiv(C, blocks * ratio)
    n_scores, NP = score_tiles * blocks, _power_of_2(max(_cdiv(T, l_), S))
    chunk = min(max(_DECODE_BYTES // (4 * B * H * (2 * n_scores + 3 * D)), 1), M)
    rows = B * chunk * K
    # as many programs for each row as multiprocessors hold at a time; those of the scan by the tiles of the branches
    programs, scan_programs = (n * _num_sms(device) // (rows * head_tiles) for n in (2, 4 if D <= 64 else 2))
    splits = lambda programs, tiles: max(min(programs, tiles, _DECODE_MAX_SPLITS), 1)  # noqa: E731
    local_tiles = _cdiv(min(local_window, T), scan["BLOCK_N"])
    n_compressed = splits(scan_programs * score_tiles // (score_tiles + local_tiles), score_tiles)
    n_local = splits(scan_programs - n_compressed, local_tiles)
    n_selected = splits(programs, _cdiv(S * select_pad, attend["BLOCK_N"]))
    sizes = {"BLOCK": choice.block_size, "STRIDE": choice.stride, "SELECT": l_, "BLOCKS": blocks, "CARRY": carry}
    scan |= {**sizes, "PART": part, "WINDOW": min(local_window, _FAR), "LOCAL_STREAM": 2 if streams == 6 else 0}
    attend |= {**sizes, "S": S, "SP": _power_of_2(S), "INIT": choice.init_blocks, "LOCAL": choice.local_blocks}
    attend |= {"NP": NP, "HEADS": max(min(_power_of_2(H // K), 16384 // NP), 1), "SELECT_PAD": select_pad}
    attend |= {"num_warps": max(attend["num_warps"], min(NP // 512, 16))}
    n_parts = n_compressed + n_local + n_selected
    merged = max(min(_MERGED // (_power_of_2(n_parts) * _block_d(D)), _power_of_2(H // K), heads), 1)
    attend |= {"SPLITS_PAD": _power_of_2(n_parts), "SCORE_SPLITS": _power_of_2(n_compressed), "MERGE_HEADS": merged}
    scores_size = rows * H // K * (n_scores + score_tiles * carry) + rows * head_tiles
    n_others, numbers = n_compressed + n_local, (M, cache_rows, room)
    scan_numbers = (*numbers, C_room, n_compressed, n_scores, scale)
    attend_numbers = (*numbers, 0 if static else H * 3, n_compressed, n_others, n_scores, scale)
    return _DecodePlan(
        chunk, rows * n_parts * H // K * (D + 4), scores_size,
        _Launch(_decode_scan_kernel, (rows, n_others, head_tiles), scan_numbers, **scan),
        _Launch(_decode_attend_kernel, (rows, n_selected, head_tiles), attend_numbers, **attend),
    )  # fmt: skip


def _triton_decode(
    q: Tensor, tokens: Tensor, blocks: Tensor, logits: Tensor, first: Tensor, of_token: Tensor | None,
    local_window: int, choice: _Choice, scale: float,
) -> Tensor:  # fmt: skip
    """o (B, M, H, D): all branches and gates, for M new tokens a row over a cache that holds their keys already.

    Row b's stand at the positions first[b] + 0, 1, ...; packed ones, (1, total, H, D), at first[row] + m over the keys
    of that row, where of_token is (2, total): row and m. Positions behind the room for keys count as its last.
    """
    M, static, device = q.shape[1], logits.stride() == (0, 0, 3, 1), q.device
    kinds = (of_token is not None, static, logits.dtype, local_window, choice, scale, q.dtype, device, _precision(q))
    plan = _decode_plan(q.shape, tokens.shape, blocks.shape[2], *kinds)
    if plan.chunk < M:
        outputs = []
        for m in range(0, M, plan.chunk):
            new = slice(m, m + plan.chunk)
            own = (first + m, None) if of_token is None else (first, of_token[:, new].contiguous())
            settings = (*own, local_window, choice, scale)
            outputs.append(_triton_decode(q[:, new], tokens, blocks, logits[:, new], *settings))
        return torch.cat(outputs, dim=1)
    q, logits = q.contiguous(), logits if static else logits.contiguous()
    o = torch.empty_like(q)
    parts, scores = (q.new_empty(size, dtype=torch.float32) for size in plan[1:3])
    plan.scan(q, tokens, blocks, first, of_token, parts, scores)
    plan.attend(q, tokens, logits, o, first, of_token, parts, scores)
    return o


def _triton_cached(
    q: Tensor, tokens: Tensor, blocks: Tensor, logits: Tensor, first: Tensor, of_token: Tensor | None,
    local_window: int, choice: _Choice, scale: float,
) -> Tensor:  # fmt: skip
    """Attention over a cache: a piece of a prompt by the kernels of a forward, a step by those above."""
    if of_token is not None or q.shape[1] <= _FEW:
        return _triton_decode(q, tokens, blocks, logits, first, of_token, local_window, choice, scale)
    k, v, k_local, v_local, k_cmp, v_cmp = _cache_keys(tokens, blocks)
    o_local, _ = _triton_span_forward(q, k_local, v_local, _Span(local_window), scale, first=first)
    o_compressed, lse = _triton_span_forward(q, k_cmp, v_cmp, choice.span, scale, first=first)
    chosen = _triton_select(q, k_cmp, lse, choice, scale, first=first, max_len=k.shape[1])
    gated, size = (logits.sigmoid().to(q.dtype), o_local, o_compressed), choice.select_block_size
    return _triton_selected_forward(q, k, v, chosen, size, scale, gated, first=first)[2]


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 14  Compression (eq. 7): the layers of a learned compressor
#
# Row r is head r % K of block c = r // K // B of sequence b, so that neighbours in a tile are the heads of one token,
# which lie side by side. N hidden units, BLOCK_N at a time; where there is one layer only, they are the D outputs.
# A block is read token by token where it stands: no copy, with overlap neither. The gradient of a token has one summand
# for each of the l/d blocks that it is in. Types of 16 bits only: of float32, the products are better left to cuBLAS.
# Blocks of packed sequences begin where `of_key` says. Rows behind the last block read no token, which may be NaN, and
# take no part in gradients.
#
# The last axis of every grid is the compressors, of keys and of values. Where the rows make few programs, each program
# takes a part of the block's tokens, and the output kernel adds up the parts.
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


@_kernel
def _of_compressor(first_ptr, second_ptr):
    """Pointer for the compressor that this program works for."""
    return tl.where(tl.program_id(2) == 0, first_ptr, second_ptr)


@_kernel
def _compressor_offset(size):
    """Offset of the tensor of this program's compressor where one of this size follows another."""
    return tl.program_id(2).to(tl.int64) * size


@_kernel
def _block_offsets(row, B, strides, K: tl.constexpr, UNIT: tl.constexpr):
    """Offsets of rows in a tensor (B, tokens or blocks, K, ...) of these strides, where a block begins all UNIT."""
    return _offsets(strides, row // K % B, row // (K * B) * UNIT, row % K)


@_kernel
def _first_tokens(row, exists, B, of_key, strides, K: tl.constexpr, STRIDE: tl.constexpr):
    """Offsets of the first token of each row's block."""
    if of_key is None:
        offsets = _block_offsets(row, B, strides, K, STRIDE)
    else:
        offsets = _offsets(strides, 0, tl.load(of_key + row // K, mask=exists, other=0), row % K)
    return offsets


@_kernel
def _rows_of_blocks(n_rows, cu_keys, n_segments, K: tl.constexpr):
    """Number of rows that hold a block."""
    if cu_keys is not None:
        n_rows = tl.minimum(tl.load(cu_keys + n_segments) * K, n_rows)
    return n_rows


@_kernel
def _load_positioned(x_ptr, position_ptr, offsets, s, exists, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Token s of each block, with its position added."""
    d = tl.arange(0, BLOCK_D)
    position = tl.load(position_ptr + s * D + d, mask=d < D, other=0.0).to(tl.float32)
    x = _load_rows(x_ptr, offsets, exists, D, BLOCK_D)
    return (x.to(tl.float32) + position[None, :]).to(x.dtype)


@_kernel
def _gelu_cdf(x):
    """Φ(x) of GELU(x) = x·Φ(x)."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@_kernel(do_not_specialize=["n_rows", "B", "n_segments"])
def _compress_kernel(
    x_ptr, x2_ptr, position_ptr, position2_ptr, w_in_ptr, w_in2_ptr, b_in_ptr, b_in2_ptr, cu_keys, of_key, out_ptr,
    n_rows, B, n_segments, x_strides, out_strides,
    K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Part of w_in·(x + position) + b_in, of TOKENS tokens of each block; the first part has b_in."""
    row, split = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1)
    exists = row < n_rows
    x_ptr, w_in_ptr = _of_compressor(x_ptr, x2_ptr), _of_compressor(w_in_ptr, w_in2_ptr)
    position_ptr, b_in_ptr = _of_compressor(position_ptr, position2_ptr), _of_compressor(b_in_ptr, b_in2_ptr)
    holds = row < _rows_of_blocks(n_rows, cu_keys, n_segments, K)
    first = _first_tokens(row, holds, B, of_key, x_strides, K, STRIDE)
    size = tl.cast(n_rows, tl.int64) * N
    out_ptr += _compressor_offset(tl.num_programs(1) * size) + split * size
    out = _block_offsets(row, B, out_strides, K, 1)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        b_in = tl.load(b_in_ptr + n, mask=n < tl.where(split == 0, N, 0), other=0.0).to(tl.float32)
        hidden = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + b_in[None, :]
        for s in range(split * TOKENS, tl.minimum(split * TOKENS + TOKENS, BLOCK)):
            x = _load_positioned(x_ptr, position_ptr, first + s * x_strides[1], s, holds, D, BLOCK_D)
            w = _load_rows(w_in_ptr, (n * BLOCK + s) * D, n < N, D, BLOCK_D)
            hidden += tl.dot(x, tl.trans(w))
        _store_rows(out_ptr, out, hidden, exists, N, BLOCK_N, n0)


@_kernel(do_not_specialize=["n_rows", "B"])
def _compress_output_kernel(
    parts_ptr, w_out_ptr, w_out2_ptr, b_out_ptr, b_out2_ptr, hidden_ptr, y_ptr, n_rows, B, y_strides,
    K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """hidden = Σ of its parts, if it is in parts; y = w_out·GELU(hidden) + b_out, or hidden itself."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d, exists = tl.arange(0, BLOCK_D), row < n_rows
    rows, size = row.to(tl.int64) * N, tl.cast(n_rows, tl.int64) * N
    y_ptr += _compressor_offset(tl.cast(n_rows, tl.int64) * D)
    y_rows = _block_offsets(row, B, y_strides, K, 1)
    if hidden_ptr is not None:
        hidden_ptr += _compressor_offset(size)
    if parts_ptr is not None:
        parts_ptr += _compressor_offset(SPLITS * size)
    y = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    for n0 in tl.range(0, N, BLOCK_N, num_stages=1):
        if parts_ptr is None:
            hidden = _load_rows(hidden_ptr, rows, exists, N, BLOCK_N, n0).to(tl.float32)
        else:
            hidden = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for split in tl.static_range(SPLITS):
                hidden += _load_rows(parts_ptr + split * size, rows, exists, N, BLOCK_N, n0)
        if w_out_ptr is None:
            _store_rows(y_ptr, y_rows, hidden, exists, D, BLOCK_N, n0)
        else:
            if parts_ptr is not None:
                _store_rows(hidden_ptr, rows, hidden, exists, N, BLOCK_N, n0)
            w = _load_rows(_of_compressor(w_out_ptr, w_out2_ptr), d * N, d < D, N, BLOCK_N, n0)
            active = (hidden * _gelu_cdf(hidden)).to(w.dtype)
            # Turned, so that the units are the operand that the warps share: as the other, each would compute all.
            y = tl.dot(w, tl.trans(active), y)
    if w_out_ptr is not None:
        b_out = tl.load(_of_compressor(b_out_ptr, b_out2_ptr) + d, mask=d < D, other=0.0).to(tl.float32)
        _store_rows(y_ptr, y_rows, tl.trans(y) + b_out[None, :], exists, D, BLOCK_D)


@_kernel(do_not_specialize=["n_rows", "B"])
def _compress_dhidden_kernel(
    dy_ptr, dy2_ptr, w_out_ptr, w_out2_ptr, hidden_ptr, dhidden_ptr, active_ptr, n_rows, B, dy_strides,
    K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dhidden = (w_outᵀ·dy)·GELU'(hidden), where GELU'(x) = Φ(x) + x·exp(−x²/2)/√(2π); and GELU(hidden) again."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d, exists = tl.arange(0, BLOCK_D), row < n_rows
    rows = _compressor_offset(tl.cast(n_rows, tl.int64) * N) + row.to(tl.int64) * N
    dy_rows = _block_offsets(row, B, dy_strides, K, 1)
    dy = _load_rows(_of_compressor(dy_ptr, dy2_ptr), dy_rows, exists, D, BLOCK_D)
    for n0 in tl.range(0, N, BLOCK_N, num_stages=1):
        w = _load_rows(_of_compressor(w_out_ptr, w_out2_ptr), d * N, d < D, N, BLOCK_N, n0)
        h = _load_rows(hidden_ptr, rows, exists, N, BLOCK_N, n0).to(tl.float32)
        cdf = _gelu_cdf(h)
        slope = cdf + h * tl.exp2(h * h * (-0.5 * _TL_LOG2E)) * 0.3989422804014327
        _store_rows(active_ptr, rows, h * cdf, exists, N, BLOCK_N, n0)
        _store_rows(dhidden_ptr, rows, tl.dot(dy, w) * slope, exists, N, BLOCK_N, n0)


@_kernel(do_not_specialize=["n_blocks", "B", "T", "n_segments"])
def _compress_dx_kernel(
    dh_ptr, dh2_ptr, w_in_ptr, w_in2_ptr, cu_seqlens, cu_keys, dx_ptr, n_blocks, B, T, n_segments, dh_strides,
    dx_strides,
    K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, TOKENS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dx[t] = Σ over the blocks c of token t of w_in[:, t − c·d]ᵀ·dhidden[c]; a row is d tokens, a program TOKENS.

    The d tokens of a row are a tile of their segment: they begin where a block of it begins.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile, b, head = row // (B * K), row // K % B, row % K
    t, _, token, tokens, key, keys = _query_tile(
        tile, cu_seqlens, cu_keys, None, b, n_segments, T, n_blocks, T, 1, STRIDE
    )
    last = t // STRIDE  # the last block that its tokens may be in
    dh_ptr, w_in_ptr = _of_compressor(dh_ptr, dh2_ptr), _of_compressor(w_in_ptr, w_in2_ptr)
    dx_ptr += _compressor_offset(tl.cast(B, tl.int64) * T * (K * D))
    dx_rows, dh_rows = _offsets(dx_strides, b, token + t, head), _offsets(dh_strides, b, key + last, head)
    parts: tl.constexpr = BLOCK // STRIDE
    dx = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    unit_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    for step in range(TOKENS * parts * unit_tiles):  # one loop, which is pipelined, for tokens, their blocks and units
        s, n0 = tl.program_id(1) * TOKENS + step // (parts * unit_tiles), step % unit_tiles * BLOCK_N
        part, n = step // unit_tiles % parts, n0 + tl.arange(0, BLOCK_N)
        holds = (last >= part) & (last - part < keys)
        dh = _load_rows(dh_ptr, dh_rows - part * dh_strides[1], holds, N, BLOCK_N, n0)
        w = _load_rows(w_in_ptr, (n * BLOCK + part * STRIDE + s) * D, n < N, D, BLOCK_D)
        dx = tl.dot(dh, w, tl.where(step % (parts * unit_tiles) == 0, 0.0, dx))
        complete = t + s < tl.where(step % (parts * unit_tiles) == parts * unit_tiles - 1, tokens, 0)
        _store_rows(dx_ptr, dx_rows + s * dx_strides[1], dx, complete, D, BLOCK_D)


@_kernel(do_not_specialize=["n_rows", "B", "n_segments", "rows_per_split"])
def _compress_dw_kernel(
    dh_ptr, dh2_ptr, x_ptr, x2_ptr, position_ptr, position2_ptr, w_in_ptr, w_in2_ptr, dy_ptr, dy2_ptr, active_ptr,
    cu_keys, of_key, out_ptr, n_rows, B, n_segments, rows_per_split, dh_strides, x_strides, dy_strides,
    K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dw_in[:, s] = Σ dhiddenᵀ·(x + position)[s], db_in = Σ dhidden, dposition[s] = w_in[:, s]ᵀ·db_in; one s a program.

    One more program: dw_out = Σ dyᵀ·GELU(hidden), db_out = Σ dy. All in a buffer, in the order of `_layer_shapes`.

    Rows are summed up as products with ones: to add them in registers, Triton (3.6) would keep them in too few buffers,
    and the next copy would overwrite what a product still reads.
    """
    s, split = tl.program_id(0), tl.program_id(1)
    start = split * rows_per_split
    end = tl.minimum(start + rows_per_split, _rows_of_blocks(n_rows, cu_keys, n_segments, K))
    d = tl.arange(0, BLOCK_D)
    size: tl.constexpr = BLOCK * D * (N + 1) + N + (0 if active_ptr is None else D * (N + 1))
    dposition = out_ptr + _compressor_offset(tl.num_programs(1) * size) + split * size
    dw_in = dposition + BLOCK * D
    db_in = dw_in + N * BLOCK * D
    ones = tl.full([BLOCK_M, 16], 1.0, x_ptr.dtype.element_ty)
    if s < BLOCK:
        dh_ptr, x_ptr = _of_compressor(dh_ptr, dh2_ptr), _of_compressor(x_ptr, x2_ptr) + s * x_strides[1]
        position_ptr, w_in_ptr = _of_compressor(position_ptr, position2_ptr), _of_compressor(w_in_ptr, w_in2_ptr)
        dp = tl.zeros([BLOCK_D], tl.float32)
        for n0 in range(0, N, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            dw, sums = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, 16], tl.float32)
            for r in range(start, end, BLOCK_M):
                row = r + tl.arange(0, BLOCK_M)
                dh = _load_rows(dh_ptr, _block_offsets(row, B, dh_strides, K, 1), row < end, N, BLOCK_N, n0)
                tokens = _first_tokens(row, row < end, B, of_key, x_strides, K, STRIDE)
                x = _load_rows(x_ptr, tokens, row < end, D, BLOCK_D)
                dw += tl.dot(tl.trans(dh), x)
                sums += tl.dot(tl.trans(dh), ones)
            db = tl.sum(sums, axis=1) / 16
            position = tl.load(position_ptr + s * D + d, mask=d < D, other=0.0).to(tl.float32)
            _store_rows(dw_in, (n * BLOCK + s) * D, dw + db[:, None] * position[None, :], n < N, D, BLOCK_D)
            w = _load_rows(w_in_ptr, (n * BLOCK + s) * D, n < N, D, BLOCK_D).to(tl.float32)
            dp += tl.sum(w * db[:, None], axis=0)
            if s == 0:
                tl.store(db_in + n, db.to(out_ptr.dtype.element_ty), mask=n < N)
        tl.store(dposition + s * D + d, dp.to(out_ptr.dtype.element_ty), mask=d < D)
    elif active_ptr is not None:
        dy_ptr, active_ptr = _of_compressor(dy_ptr, dy2_ptr), active_ptr + _compressor_offset(n_rows * N)
        for n0 in range(0, N, BLOCK_N):
            dw_2, sums_2 = tl.zeros([BLOCK_D, BLOCK_N], tl.float32), tl.zeros([BLOCK_D, 16], tl.float32)
            for r in range(start, end, BLOCK_M):
                row = r + tl.arange(0, BLOCK_M)
                dy = _load_rows(dy_ptr, _block_offsets(row, B, dy_strides, K, 1), row < end, D, BLOCK_D)
                active = _load_rows(active_ptr, row.to(tl.int64) * N, row < end, N, BLOCK_N, n0)
                dw_2 += tl.dot(tl.trans(dy), active)
                sums_2 += tl.dot(tl.trans(dy), ones)
            db_2 = tl.sum(sums_2, axis=1) / 16
            _store_rows(db_in + N, d * N, dw_2, d < D, N, BLOCK_N, n0)
            tl.store(db_in + N + D * N + d, db_2.to(out_ptr.dtype.element_ty), mask=d < D)


def _alike(first: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two tensors of one layout, the last dimension contiguous; the first again in place of a second."""
    first = _unit_stride(first)
    second = first if second is None else _unit_stride(second)
    return (first, second) if first.stride() == second.stride() else (first.contiguous(), second.contiguous())


def _compress_constants(
    rows: int, K: int, D: int, N: int, block: int, stride: int, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Constants of the kernels that know blocks, and of those that do not. Few rows are cut into smaller tiles."""
    wide, many = _block_d(N) > 128, rows > 2048
    whole = _multiplies_in_shared(device)  # registers do not hold all units at once
    units, output_units = (_block_d(N) if whole else min(_block_d(N), most) for most in _COMPRESS_UNITS)
    weights, columns, limit = units * _block_d(D), max(units, _block_d(D)), _shared_memory(device) // 2
    tiles = [(m, stages) for m in ((64, 32) if many else (32,)) for stages in ((2,) if wide and many else (3, 2))]
    fits = [(m, n) for m, n in tiles if (n - 1) * (weights + m * columns) + m * columns <= limit]
    block_m, stages = fits[0]
    layer = {"K": K, "D": D, "BLOCK_D": _block_d(D), "N": N, "BLOCK_N": output_units, "BLOCK_M": 32 if many else 16}
    layer |= {"num_warps": 8 if wide else 4, "num_stages": stages}
    return layer | {"BLOCK": block, "STRIDE": stride, "BLOCK_M": block_m, "BLOCK_N": units}, layer


class _CompressPlan(NamedTuple):
    y: tuple[int, ...]  # shapes
    hidden: tuple[int, ...]
    parts: tuple[int, ...] | None
    first: _Launch
    output: _Launch | None


def _block_counts(x: Tensor, block: int, stride: int, segments: _Segments) -> tuple[int, int]:
    """(number of compressed rows of each row of x, number of segments)."""
    if segments.of_key is None:
        return _compressed_count(x.shape[1], block, stride), 0
    return segments.of_key.shape[1], segments.cu_keys.shape[0] - 1


@functools.lru_cache(maxsize=4096)
def _compress_plan(
    layout: tuple[Any, ...], C: int, n_segments: int, n: int, N: int, layers: int, block: int, stride: int
) -> _CompressPlan:
    """The forward of n compressors of inputs of that layout."""
    (((B, _, K, D), strides, _, device),) = layout
    rows, y_strides = C * B * K, (C * K * D, K * D, D, 1)
    constants, layer = _compress_constants(rows, K, D, N, block, stride, device)
    tiles = _cdiv(rows, constants["BLOCK_M"])
    tokens = _cdiv(block, max(min(_num_sms(device) // (tiles * n), block // _COMPRESS_TOKENS), 1))
    splits = _cdiv(block, tokens)
    out_strides = y_strides if (layers, splits) == (1, 1) else (K * N, B * K * N, N, 1)
    grid, numbers = (tiles, splits, n), (rows, B, n_segments, strides, out_strides)
    first, output = _Launch(_compress_kernel, grid, numbers, **constants, TOKENS=tokens), None
    if (layers, splits) != (1, 1):
        grid = (_cdiv(rows, layer["BLOCK_M"]), 1, n)
        output = _Launch(_compress_output_kernel, grid, (rows, B, y_strides), **layer, SPLITS=splits)
    parts = None if splits == 1 else (n, splits, rows, N)
    return _CompressPlan((n, B, C, K, D), (n, rows, N) if layers == 2 else (0,), parts, first, output)


def _triton_compress(
    inputs: tuple[Tensor, Tensor | None], first: tuple[Tensor | None, ...], second: tuple[Tensor | None, ...],
    segments: _Segments, stride: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Results of `_compress_forward`, of the inputs and the layers of both compressors."""
    n, (x, x_2) = 1 if inputs[1] is None else 2, _alike(*inputs)
    positions, w_ins, b_ins, w_outs, b_outs = zip(first, first if n == 1 else second, strict=True)
    layers = 1 if w_outs[0] is None else 2
    block = positions[0].shape[0]
    counts = _block_counts(x, block, stride, segments)
    plan = _compress_plan(_layout(x), *counts, n, w_ins[0].shape[0], layers, block, stride)
    y, hidden = x.new_empty(*plan.y), x.new_empty(*plan.hidden)
    parts = None if plan.parts is None else x.new_empty(*plan.parts, dtype=torch.float32)
    units = hidden if layers == 2 else None
    out = parts if parts is not None else y if units is None else units
    plan.first(x, x_2, *positions, *w_ins, *b_ins, segments.cu_keys, segments.of_key, out)
    if plan.output is not None:
        plan.output(parts, *w_outs, *b_outs, units, y)
    return y, hidden


class _CompressBackwardPlan(NamedTuple):
    dhidden: _Launch
    dx: _Launch
    dw: _Launch
    dw_shape: tuple[int, ...]  # (n, splits of the rows, size of the layers), to be added up; or (n · size,)


@functools.lru_cache(maxsize=4096)
def _compress_backward_plan(
    layout: tuple[Any, ...], C: int, n_segments: int, n: int, N: int, layers: int, block: int, stride: int
) -> _CompressBackwardPlan:
    ((B, T, K, D), strides, _, device), (_, dy_strides) = layout
    rows, tokens = C * B * K, math.gcd(stride, _COMPRESS_TOKENS)
    constants, layer = _compress_constants(rows, K, D, N, block, stride, device)
    dh_strides = dy_strides if layers == 1 else (K * N, B * K * N, N, 1)
    splits = min(max(rows // _COMPRESS_ROWS, 1), 16)
    grid = (_cdiv(rows, layer["BLOCK_M"]), 1, n)
    dhidden = _Launch(_compress_dhidden_kernel, grid, (rows, B, dy_strides), **layer)
    grid = (_cdiv(_tile_count(T, stride, n_segments) * B * K, constants["BLOCK_M"]), stride // tokens, n)
    numbers = (C, B, T, n_segments, dh_strides, (T * K * D, K * D, D, 1))
    dx = _Launch(_compress_dx_kernel, grid, numbers, **constants, TOKENS=tokens)
    numbers = (rows, B, n_segments, _cdiv(rows, splits), dh_strides, strides, dy_strides)
    constants |= {"BLOCK_M": 64 if constants["BLOCK_N"] * constants["BLOCK_D"] <= 8192 else 32, "num_stages": 3}
    dw = _Launch(_compress_dw_kernel, (block + layers - 1, splits, n), numbers, **constants)
    size = sum(map(math.prod, _layer_shapes(block, D, N, layers)))
    return _CompressBackwardPlan(dhidden, dx, dw, (n * size,) if splits == 1 else (n, splits, size))


def _triton_compress_backward(
    upstream: tuple[Tensor, Tensor | None], inputs: tuple[Tensor, Tensor | None], first: tuple[Tensor | None, ...],
    second: tuple[Tensor | None, ...], hidden: Tensor, segments: _Segments, stride: int, of_x: bool, of_weights: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Results of `_compress_backward`."""
    n, dy, (x, x_2) = 1 if inputs[1] is None else 2, _alike(*upstream), _alike(*inputs)
    positions, w_ins, w_outs = zip(first, first if n == 1 else second, strict=True)
    layers = 1 if w_outs[0] is None else 2
    block = positions[0].shape[0]
    counts, N = _block_counts(x, block, stride, segments), w_ins[0].shape[0]
    plan = _compress_backward_plan(_layout(x, dy[0]), *counts, n, N, layers, block, stride)
    dh, active = dy, None
    if layers == 2:
        dhidden, active = hidden.new_empty(2, *hidden.shape).unbind()
        plan.dhidden(*dy, *w_outs, hidden, dhidden, active)
        dh = dhidden[0], dhidden[-1]
    dx = x.new_empty(n, *x.shape) if of_x else x.new_empty(0)
    if of_x:
        plan.dx(*dh, *w_ins, segments.cu_seqlens, segments.cu_keys, dx)
    if not of_weights:
        return dx, x.new_empty(0)
    dw = x.new_empty(*plan.dw_shape, dtype=torch.float32 if len(plan.dw_shape) > 1 else x.dtype)
    plan.dw(*dh, x, x_2, *positions, *w_ins, *dy, active, segments.cu_keys, segments.of_key, dw)
    return dx, dw if dw.ndim == 1 else dw.sum(1).flatten().to(x.dtype)


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 15  Tuning: the fastest tiles on a GPU, and their file
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


def _tune(device: torch.device, dtype: torch.dtype, D: int, tokens: int = 8192) -> Path:
    """Writes the fastest tile of each kernel into the file, beside what it has. If stopped early, nothing changes.

    8192 tokens of 16 query heads fill every GPU. A kernel has 6 to 60 candidates; most of the time goes to build them.
    """
    path, tiles = _tiles_file(device), _tuned(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, found = path.with_suffix(f".{os.getpid()}"), _read_tiles(path)
    try:
        part.touch()  # a folder that cannot be written is found out now
        print(f"{'kernel/bits/head dim':<36}{'table, ms':>10}{'best, ms':>10}   rows, keys, warps, stages", flush=True)
        for kernel, call in _tuning_calls(device, dtype, D, tokens):
            name = _tile_name(kernel, D, dtype)
            found[name] = tiles[name] = _fastest_tile(name, _first_tile(name, device), tiles, call)
        part.write_text(json.dumps(found, indent=1), encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        _tuned.cache_clear()
        _forget_plans()
    return path


def _fastest_tile(
    name: str, default: tuple[int, ...], tiles: dict[str, tuple[int, ...]], call: Callable[[], Sequence[Tensor]]
) -> tuple[int, ...]:
    """The candidate with which a call is fastest, if it is faster than with the default by more than noise.

    One that does not build or does not fit takes forever, and so does one with other results.
    """

    def run(tile: tuple[int, ...]) -> Sequence[Tensor]:
        tiles[name] = tile
        _forget_plans()
        return call()

    def milliseconds(tile: tuple[int, ...]) -> float:
        run(tile)
        return triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median")

    def build() -> None:
        for tile in candidates:
            with contextlib.suppress(Exception):  # which comes again with the launch
                run(tile)

    candidates = list(dict.fromkeys((default, *_candidates(name))))
    _compile_together(build)
    exact = run(default)
    times = {default: milliseconds(default)}
    for tile in candidates[1:]:
        poison = [torch.full_like(x, math.nan if x.is_floating_point() else -1) for x in exact]
        del poison  # from the memory that the next results get, so that none is right by what lies there
        try:
            if all(map(_same_results, run(tile), exact)):
                times[tile] = milliseconds(tile)
        except _CannotLaunch:
            continue
        except Exception as error:  # the GPU does nothing more in this process
            raise RuntimeError(f"tile {tile} of {name} failed: {error}") from error
    best = min(times, key=times.__getitem__)
    before, after = milliseconds(default), milliseconds(best)  # side by side: a clock moves meanwhile
    if after > 0.98 * before:
        best, after = default, before
    print(f"{name:<36}{before:>10.3f}{after:>10.3f}   {', '.join(map(str, best))}", flush=True)
    return best


def _same_results(x: Tensor, y: Tensor) -> bool:
    """Whether results are the same but for rounding, and choices but for a few near ties."""
    if not x.is_floating_point():
        return bool((x == y).float().mean() > 0.99)
    tolerance = (0.1 if x.element_size() == 2 else 1e-4) * y.abs().nan_to_num(posinf=0.0).max()  # lse may be -inf
    return bool(((x == y) | ((x - y).abs() <= tolerance)).all())


def _candidates(name: str) -> list[tuple[int, ...]]:
    """Tiles to try for a kernel: those of the table, and around them half or twice the rows or keys, as they fit.

    A lane holds 64 scores and 128 numbers of one output at most. Rows of some kernels follow from the group.
    """
    kernel, _, width = name.split("/")
    by_group = kernel in ("selected_by_query", "decode_scan", "decode_attend")
    most_keys = 64 if kernel.startswith("selected") else 128  # keys of one block
    found = [tile[:4] for tile in _tiles_of(name)]
    for m, n, *_ in found[:]:
        sizes = [(m, n), (m, n // 2), (m, 2 * n)] + [(m // 2, n), (2 * m, n)] * (not by_group)
        for (m_, n_), warps, stages in itertools.product(sizes, (4, 8), (2, 3, 4)):
            lanes = 32 * warps
            fits = m_ * n_ <= 64 * lanes and max(m_, n_) * int(width) <= 128 * lanes
            if kernel.startswith("selected_backward"):  # with 16 rows in 8 warps, Triton 3.6 reads past shared memory
                fits = fits and m_ >= 4 * warps
            if fits and 16 <= m_ <= 128 and 16 <= n_ <= most_keys:  # 128 as in `_term_room`
                found.append((m_, n_, warps // 4 if kernel == "selected_by_query" else warps, stages))
    return list(dict.fromkeys(found))


def _tuning_calls(
    device: torch.device, dtype: torch.dtype, D: int, tokens: int
) -> Iterator[tuple[str, Callable[[], Sequence[Tensor]]]]:
    """Every kernel, and a call that launches it: in the paper's setting, 16 query heads in groups of 4 or 16."""
    choice, scale, C = _Choice(32, 16, 64, 16, 1, 2), D**-0.5, _compressed_count(tokens, 32, 16)
    random = lambda *shape: torch.randn(shape, device=device, dtype=dtype)  # noqa: E731
    for G, B, T in ((4, 1, tokens), (16, 1, tokens), (4, 4, tokens // 4)):
        K = 16 // G
        (q, do), (k, v) = random(2, B, T, 16, D), random(2, B, T, K, D)
        k_cmp, v_cmp = random(2, B, _compressed_count(T, 32, 16), K, D)
        o, lse = _triton_span_forward(q, k_cmp, v_cmp, choice.span, scale)
        chosen = _triton_select(q, k_cmp, lse, choice, scale)
        (terms,) = _row_terms(_triton_preprocess(do, [o], [lse], K, dlse=torch.zeros_like(lse))[0])
        forward = functools.partial(_triton_selected_forward, q, k, v, chosen, 64, scale)
        backward = functools.partial(_triton_selected_backward, do, terms, q, k, v, chosen, 64, scale)
        if B > 1:  # so short that all keys are read, under a mask
            yield from (("masked_forward", forward), ("masked_dq", backward), ("masked_dkv", backward))
        elif G == 16:
            if _large_group(q, K):
                yield "selected_by_query", forward
            yield "selected_backward_large_group", backward
        else:
            yield from (("selected_by_block", forward), ("selected_backward", backward))
            for branch, *keys in (("local", k, v, _Span(512)), ("compressed", k_cmp, v_cmp, choice.span)):
                yield f"{branch}_forward", functools.partial(_triton_span_forward, q, *keys, scale)
                for kernel in ("dq", "dkv"):
                    yield f"{branch}_{kernel}", functools.partial(_triton_span_backward, do, terms, q, *keys, scale)
            yield "scores", lambda x=(q, k_cmp, lse): (_triton_select(*x, choice, scale),)
    q, *cache = random(16, 1, 16, D), random(2, 16, tokens + 1, 4, D), random(2, 16, C + 1, 4, D)
    logits, first = random(16, 1, 16, 3), torch.full((16,), tokens - 1, dtype=torch.int32, device=device)
    for kernel in ("decode_scan", "decode_attend"):
        yield kernel, lambda: (_triton_decode(q, *cache, logits, first, None, 512, choice, scale),)


def _forget_plans() -> None:
    """Launches are planned anew, with the tiles of now."""
    for function in list(globals().values()):
        if hasattr(function, "cache_clear") and function.__name__.endswith("_plan"):
            function.cache_clear()


def _untune(device: torch.device) -> bool:
    """Goes back to the table for this GPU; False if that is where it is. Tiles are tried in some of all calls only."""
    tiles = _tuned(device)
    if not tiles:
        return False
    warnings.warn(f"a tile of {_tiles_file(device)} does not fit, and those of the table serve", stacklevel=2)
    tiles.clear()
    _forget_plans()
    return True


def _tiles_file(device: torch.device) -> Path:
    """File of the tiles for a kind of GPU, in the user's cache folder."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = f"{gpu} nsa-{__version__} triton-{triton.__version__}.json"
    return Path(folder, "native_sparse_attention", "".join(c if c.isalnum() or c in "-." else "_" for c in name))


def _read_tiles(path: Path) -> dict[str, tuple[int, ...]]:
    """Tiles by name, as `tune` wrote them; none, and a warning, where a file holds anything else."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        tiles = {name: tuple(map(int, tile)) for name, tile in read.items()}
        foreign = [f"{name}: {tile}" for name, tile in tiles.items() if tile not in _candidates(name)]
        if not foreign:
            return tiles
        problem = f"{foreign[0]} is no tile of this kernel"
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except Exception as error:  # as many as there are contents
        problem = f"{type(error).__name__}: {error}"
    warnings.warn(
        f"{path} is not what tune() writes, and is ignored; delete it or tune again ({problem})", stacklevel=2
    )
    return {}


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 16  Registration: what ties this part to the first
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


@_once
def _capability(device: torch.device) -> int:
    """90 for sm_90. One number, because torch 2.8 cannot trace a comparison with a tuple that is a constant."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@_once
def _architecture(device: torch.device) -> str:
    """Name of an AMD GPU's architecture: "gfx942"."""
    return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]


def _triton_preferred(device: torch.device) -> bool:
    """Whether "auto" takes the kernels: on the GPUs that they are built for, NVIDIA's from sm_80 on and AMD's MI300."""
    if device.type != "cuda":
        return False
    if _AMD:
        return _architecture(device) in ("gfx942", "gfx950")
    return _capability(device) >= 80


def _triton_unserved(device: torch.device, dtype: torch.dtype | None = None, dim_head: int | None = None) -> str | None:
    """Reason why there are no kernels for such heads there; None if there are, or might be for some."""
    if triton is None:
        return "Triton is not installed, or older than 3.4"
    if device.type == "cuda":
        if not _AMD and _capability(device) < 80:
            return "the GPU is older than sm_80"
    elif device.type != "cpu" or not _INTERPRETED:
        return f"the tensors are on {device.type}, and TRITON_INTERPRET=1 is not set"
    # Triton's interpreter gets bfloat16 wrong.
    dtypes = [torch.float16, torch.float32] + [torch.bfloat16] * (device.type == "cuda")
    if dtype is not None and dtype not in dtypes:
        return f"there is no kernel for {dtype} on {device.type}"
    if dim_head is not None and dim_head > 256:
        return f"the head dim is {dim_head}, and the kernels go to 256"
    return None


def _triton_obstacle(
    q: Tensor, k: Tensor, scale: float, choice: _Choice | None = None, decoding: bool = False
) -> str | None:
    """Reason why the kernels cannot run on such queries, keys and sizes; None if they can."""
    unserved = _triton_unserved(q.device, q.dtype, q.shape[-1])
    if unserved is not None:
        return unserved
    if q.shape[0] * k.shape[2] > 65535:
        return f"there are {q.shape[0]} × {k.shape[2]} key heads, and a GPU's grid takes 65535"
    if scale <= 0:
        return f"scale is {scale}, and the kernels take positive ones only"
    if choice is not None:
        ratio, carry = _carry(choice)
        if choice.block_size > 32 * choice.select_block_size:
            return "block_size is more than 32 times select_block_size"
        if decoding and _power_of_2(ratio) * _power_of_2(max(carry, 1)) > _DECODE_MAX_KEYS:
            sizes = f"l/d/l' = {choice.block_size}/{choice.stride}/{choice.select_block_size}"
            return f"for {sizes} the importance takes more keys than fit in a tile"
    return None


def _triton_extends(k: Tensor, units: int) -> bool:
    """Whether a step compresses by itself: where the weights of a token are not too many to be read so often."""
    D, size = k.shape[3], k.element_size()
    tile = _block_d(units) * _block_d(D) * size  # which must leave room for the tokens that it multiplies
    return units * D * size <= 2**16 and tile <= _shared_memory(k.device) * 2 // 3


def _triton_compresses(x: Tensor, weight: Tensor, backend: str) -> bool:
    """Whether the kernels of compression serve x (..., dim) and weights like that one."""
    cast = _autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
    served = cast or x.dtype == weight.dtype and x.dtype in (torch.bfloat16, torch.float16)
    if not served or _triton_unserved(x.device) is not None or (backend == "auto" and not _triton_preferred(x.device)):
        return False
    return x.shape[-1] <= 128


_BACKENDS["triton"] = _Backend(
    _triton_span_forward,
    _triton_span_backward,
    _triton_select,
    _triton_selected_forward,
    _triton_selected_backward,
    _triton_preprocess,
    _triton_cached,
    _triton_segments,
    _torch_append,
    _triton_project,
    _triton_extend,
    _triton_compress,
    _triton_compress_backward,
    _triton_unserved,
    _triton_obstacle,
    _triton_preferred,
    _triton_extends,
    _triton_compresses,
    _compile_together,
    _tune,
    _untune,
)


# End of Part II


if __name__ == "__main__":
    raise SystemExit(_main(sys.argv[1:]))
