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
(cu_seqlens) or padded (key_padding_mask).

Letters, here and everywhere below. Tensors are (B, T, H, D), flash-attention's layout; positions count from 0.

    B batch · T tokens · H query heads · K key/value heads · G = H/K query heads of a group · D head dim
    l block_size · d stride · C compressed blocks · l' select_block_size · N selection blocks · S topk_blocks · W window

Where the paper's equations live.

    eq. 5      gated sum of the branches             nsa_attention
    eq. 7      compression of a block of tokens      GroupedMLPCompressor, Conv1dCompressor, AvgPoolCompressor
    eq. 8      compressed attention probabilities    compressed_attention
    eq. 9, 10  importance of a selection block       _block_importance; in kernels _fold_importance
    eq. 11     choice of the S highest blocks        _choose_blocks; in kernels _store_highest; both: select_blocks
    eq. 12     attention over the chosen tokens      selective_attention
    §3.3.3     sliding window                        local_attention

Sections; each one calls only those above it.

     1 imports and capability      5 Triton kernels                  9 NativeSparseAttention, NSACache
     2 configuration               6 autograd and operators         10 NSABlock
     3 block arithmetic            7 functions: the functional API  11 self-tests
     4 PyTorch branches            8 compressors                    12 main
"""


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 1  Imports and configuration
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import InitVar, dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = [
    "AttentionPatterns",
    "AvgPoolCompressor",
    "Conv1dCompressor",
    "GroupedMLPCompressor",
    "NSABlock",
    "NSACache",
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


_DERIVED_FIELDS = ("dim_head", "kv_heads", "stride", "select_block_size")
_COMPRESSIONS = ("grouped_mlp", "conv1d", "avgpool")
_COMPRESSION_RULE = f"must be one of {', '.join(map(repr, _COMPRESSIONS))}, or a class (dim, block, stride) -> Module"
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
        rope_theta: base of the rotary position embedding; None: no rotation.
        dropout: probability on the output projection and in the feed-forward, never on attention probabilities.
        bias: True: projections, feed-forward and norms have biases.
        ffn_mult: hidden width of the feed-forward, in units of dim.
        use_flash: True: accelerated kernels where they exist; False: plain PyTorch everywhere. May be changed at any
            time, and takes effect with the next forward.

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
    rope_theta: float | None = None
    dropout: float = 0.0
    bias: bool = False
    ffn_mult: int = 4
    use_flash: bool = True
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
        for name in ("separate_kv", "bias", "use_flash"):
            value = getattr(self, name)
            _check(isinstance(value, bool), name, value, "must be True or False", TypeError)
        _check(_finite(self.dropout) and 0 <= self.dropout < 1, "dropout", self.dropout, "must be in [0, 1)")
        if self.rope_theta is not None:
            rule = "must be a finite number above 0, or None"
            _check(_finite(self.rope_theta) and self.rope_theta > 0, "rope_theta", self.rope_theta, rule)
            _check(self.dim_head % 2 == 0, "dim_head", self.dim_head, "must be even where rope_theta is given")


def _check(
    holds: bool, argument: str, value: object, rule: str | Callable[[], str], error: type[Exception] = ValueError
) -> None:
    """The one form of every complaint: the argument, what it was, and the rule that it breaks.

    A rule that speaks of shapes is a function, called on failure only: torch.compile would bind itself to their values.
    """
    if not holds:
        raise error(f"{argument} = {value!r}: {rule() if callable(rule) else rule}")


def _finite(value: object) -> bool:
    # A tuple of types: torch 2.8 does not trace their union.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_integer(name: str, value: object, least: int) -> None:
    _check(isinstance(value, int) and not isinstance(value, bool), name, value, "must be an int", TypeError)
    _check(value >= least, name, value, f"must be at least {least}")
    _check(value < 2**31, name, value, "must be less than 2**31: positions are 32-bit numbers")


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
# 2  The definition: what every backend computes, by dense masks
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


def _reference(attention: NativeSparseAttention, x: Tensor) -> Tensor:
    """NSA by dense masks in float64: each branch a softmax over the whole row. For small sizes."""
    cfg, s = attention.cfg, torch.arange(x.shape[1])
    chosen = attention.attention_patterns(x).block_indices
    p = attention._project(x, s)
    k_cmp, v_cmp = attention._compress(p)
    t, i, group = s[:, None], torch.arange(k_cmp.shape[1]), cfg.heads // cfg.kv_heads
    in_chosen = (chosen.transpose(1, 2)[..., None] == s // cfg.select_block_size).any(3)  # (B, K, T, T)
    masks = {
        "local": (s <= t) & (s > t - cfg.local_window),
        "compressed": i * cfg.stride + cfg.block_size - 1 <= t,
        "selective": in_chosen.repeat_interleave(group, 1) & (s <= t),
    }
    pairs = {"local": (p.k_local, p.v_local), "compressed": (k_cmp, v_cmp), "selective": (p.k, p.v)}
    o = torch.zeros_like(p.q, dtype=torch.float64)
    for branch, (name, (k, v)) in enumerate(pairs.items()):
        k, v = (x.double().repeat_interleave(group, 2) for x in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", p.q.double(), k) / math.sqrt(p.q.shape[3])
        weights = scores.masked_fill(~masks[name], -math.inf).softmax(-1).nan_to_num(0.0)
        o = o + p.gates[..., branch, None] * torch.einsum("bhts,bshd->bthd", weights, v)
    return attention.to_out(o.flatten(2))


class AttentionPatterns(NamedTuple):
    """What each branch looked at: probabilities whose rows sum to 1, or to 0 where a query sees nothing."""

    local: Tensor  # (B, H, T, T)
    compressed: Tensor  # (B, H, T, C)
    selective: Tensor  # (B, H, T, T)
    gates: Tensor  # (B, T, H, 3)
    block_indices: Tensor  # (B, T, K, S)


def _dense_probabilities(q: Tensor, k: Tensor, sees: Tensor) -> Tensor:
    """softmax of q·kᵀ/sqrt(D) over the keys that are seen; rows of zeros where there are none.  → (B, H, T, keys)"""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    wide = _accumulation_dtype(q)
    s = torch.einsum("bthd,bshd->bhts", q.to(wide), k.to(wide)) * q.shape[3] ** -0.5
    return s.masked_fill(~sees, -math.inf).softmax(-1).nan_to_num(0.0).masked_fill(~sees, 0.0)


def _check_tokens(x: Tensor, dim: int, first: nn.Module) -> None:
    """Checks that x can go through a module of that width, whose first layer is given.

    Quantised layers and adapters may have no weight, or none of a floating point type; they know what they take.
    """
    _check_tensor("x", x, 3, "(B, T, dim)")
    _check(x.shape[2] == dim, "x.shape", tuple(x.shape), f"must have dim = {dim} in dimension 2")
    _check(x.is_floating_point(), "x.dtype", x.dtype, "must be a floating point type", TypeError)
    weight = getattr(first, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        cast = _autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
        _check(cast or x.dtype == weight.dtype, "x.dtype", x.dtype, f"must be the weights', {weight.dtype}")
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

        Norms and feed-forward see packed tokens too: with a key_padding_mask, no work is done for padding.
        """
        _check_call(self, others, unknown)
        with _appending(cache):
            return _without_padding(self._residuals, x, cache, cu_seqlens, key_padding_mask)

    def _residuals(self, x: Tensor, cache: NSACache | None, cu_seqlens: Tensor | None) -> Tensor:
        _check_tokens(x, self.attn.cfg.dim, self.norm1)  # PyTorch would complain in its own words
        x = x + self.attn(self.norm1(x), cache=cache, cu_seqlens=cu_seqlens)
        return x + self.ffn(self.norm2(x))


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
        self.dropout = nn.Dropout(cfg.dropout)
        self.compress_k = TokenCompressor(cfg.dim_head, cfg.block_size, cfg.stride, cfg.compression)
        self.compress_v = TokenCompressor(cfg.dim_head, cfg.block_size, cfg.stride, cfg.compression)
        # Plain parameters, so that a model's own `apply(init_weights)` leaves gate_init in place.
        self.gate_bias = nn.Parameter(torch.empty(cfg.heads, 3))
        self.gate_weight = nn.Parameter(torch.empty(cfg.heads * 3, cfg.dim)) if cfg.gate_mode == "q_cond" else None
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
        _check_call(self, others, unknown)
        with _appending(cache):
            return _without_padding(self._attend, x, cache, cu_seqlens, key_padding_mask)

    def _attend(self, x: Tensor, cache: NSACache | None, cu_seqlens: Tensor | None) -> Tensor:
        """One flow for whole rows, for packed sequences, and for either going on from a cache."""
        cfg, packed = self.cfg, cu_seqlens is not None
        first, stop = self._check_input(x, cache, cu_seqlens)
        past = any(first)  # there are keys that x does not hold
        positions = torch.arange(x.shape[1], device=x.device)
        if packed or cache is not None:
            tokens = _places(first, stop, x.device)
            positions = tokens.number.view(x.shape[:2])
            counts = ([_compressed_count(n, cfg.block_size, cfg.stride) for n in edge] for edge in (first, stop))
            blocks = _places(*counts, x.device)  # those that x completes
        p = self._project(x, positions)
        if cache is not None:
            cache._check_owner(self, p.k)
            cache._write(tokens, p._asdict())
        if past:
            k_cmp, v_cmp = self._compress(cache, blocks.number, blocks.row * cache.max_len)
        elif packed:
            k_cmp, v_cmp = self._compress(p, blocks.number, cu_seqlens[blocks.row])
        else:
            k_cmp, v_cmp = self._compress(p)
        if cache is not None:
            cache._write(blocks, {"k_cmp": k_cmp, "v_cmp": v_cmp})
        # No more slots than there can be blocks to fill them.
        most = max(_selection_count(cfg.seq_len, cfg.select_block_size), cfg.init_blocks + cfg.local_blocks)
        sizes = {"local_window": cfg.local_window, **cfg.selection, "topk_blocks": min(cfg.topk_blocks, most)}
        sizes["backend"] = self._backend
        if past:
            lengths = [end - begin for begin, end in zip(first, stop, strict=True)] if packed else None
            o = self._attend_past(p, cache, positions, lengths, **sizes)
        else:
            tensors, local = (p.q, p.k, p.v, k_cmp, v_cmp, p.gates), {"k_local": p.k_local, "v_local": p.v_local}
            o = nsa_attention(*tensors, **local, **sizes, cu_seqlens=cu_seqlens)
        y = self.dropout(self.to_out(o.flatten(2)))  # (B, T, H, D) → (B, T, H·D) → (B, T, dim)
        if cache is not None:
            cache._extend(stop, self)
        return y

    @torch.no_grad()
    def attention_patterns(self, x: Tensor) -> AttentionPatterns:
        """Dense probabilities of every branch, for study and plots: T × T in memory. Same x as for forward.

        >>> attention = NativeSparseAttention(NSAConfig(dim=64, heads=2, seq_len=128))
        >>> attention.attention_patterns(torch.randn(1, 70, 64)).compressed.shape
        torch.Size([1, 2, 70, 2])
        """
        self._check_input(x)
        cfg, key = self.cfg, torch.arange(x.shape[1], device=x.device)
        p = self._project(x, key)
        k_cmp, v_cmp = self._compress(p)
        options = {"block_size": cfg.block_size, "stride": cfg.stride, "backend": self._backend}
        lse = compressed_attention(p.q, k_cmp, v_cmp, **options)[1]
        chosen = select_blocks(p.q, k_cmp, lse, **cfg.selection, backend=self._backend)
        query, block = key[:, None], torch.arange(k_cmp.shape[1], device=x.device)
        of_chosen = (key // cfg.select_block_size == chosen.transpose(1, 2)[..., None]).any(3)  # (B, K, T, T)
        of_chosen = of_chosen.repeat_interleave(cfg.heads // cfg.kv_heads, dim=1)
        return AttentionPatterns(
            local=_dense_probabilities(p.q, p.k_local, _Window(cfg.local_window).sees(query, key)),
            compressed=_dense_probabilities(p.q, k_cmp, _Staircase(cfg.block_size, cfg.stride).sees(query, block)),
            selective=_dense_probabilities(p.q, p.k, of_chosen & (key <= query)),
            gates=p.gates.to(_accumulation_dtype(p.gates)),
            block_indices=chosen,
        )

    @property
    def _backend(self) -> str:
        return "auto" if self.cfg.use_flash else "torch"

    def _project(self, x: Tensor, positions: Tensor) -> _Projections:
        cfg = self.cfg
        # torch.unflatten: torch.compile cannot trace the tensor's method under torch.set_default_device.
        heads = lambda y, *shape: torch.unflatten(y, -1, (*shape, cfg.dim_head))  # noqa: E731
        queries = heads(self.to_q(x), cfg.heads)  # (B, T, H, D)
        rotation = None if cfg.rope_theta is None else _rotation(positions, cfg.rope_theta, queries)
        rotated = lambda y: y if rotation is None else _rotate(y, rotation)  # noqa: E731
        keys = heads(self.to_k(x), -1, cfg.kv_heads).unbind(2)  # 1 or 3 of (B, T, K, D): local, compressed, selective
        values = heads(self.to_v(x), -1, cfg.kv_heads).unbind(2)
        k_local = rotated(keys[0])
        return _Projections(
            q=rotated(queries),
            k=rotated(keys[-1]) if cfg.separate_kv else k_local,
            v=values[-1],
            k_local=k_local,
            v_local=values[0],
            k_raw=keys[len(keys) // 2],
            v_raw=values[len(values) // 2],
            gates=self._gates(x),
            rotation=rotation,
        )

    def _compress(
        self, tokens: _Projections | NSACache, number: Tensor | None = None, origin: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compressed keys and values of all blocks of whole rows, (B, C, K, D).

        Or of some blocks, (1, n, K, D): the number of each, (n,), and where its sequence begins among the B·T tokens.
        """
        cfg, compressed = self.cfg, []
        for compressor, x in ((self.compress_k, tokens.k_raw), (self.compress_v, tokens.v_raw)):
            if origin is not None:  # each block is a sequence of its own, (n, l, K, D)
                begin, x = (origin + number * cfg.stride)[:, None], x.flatten(0, 1)
                none = x.new_empty(0, cfg.block_size, *x.shape[1:])  # a block may be longer than all memory
                x = x[begin + torch.arange(cfg.block_size, device=x.device)] if len(number) else none
            y = compressor(rearrange(x, "b t k d -> (b k) t d"))
            y = rearrange(y, "(b k) c d -> b c k d", k=cfg.kv_heads)
            compressed.append(y if origin is None else y.transpose(0, 1))
        k_cmp, v_cmp = compressed
        if cfg.rope_theta is not None:
            # Keys are compressed before rotation; compressed key i then turns as position i·d, as its first token does.
            if number is None:
                rotation = tokens.rotation[..., :: cfg.stride, :, :][..., : k_cmp.shape[1], :, :]
            else:
                rotation = _rotation(number * cfg.stride, cfg.rope_theta, k_cmp)
            k_cmp = _rotate(k_cmp, rotation)
        return k_cmp, v_cmp

    def _attend_past(
        self, p: _Projections, cache: NSACache, positions: Tensor, lengths: list[int] | None, **sizes: Any
    ) -> Tensor:
        """Attention over the keys of a cache, at positions (B, T) of rows, or (1, total) of sequences of `lengths`."""
        keys = (cache.k, cache.v, cache.k_local, cache.v_local, cache.k_cmp, cache.v_cmp)
        if lengths is None:
            return _cached_attention(p.q, *keys, p.gates, positions.int(), **sizes)
        places, longest = _places([0] * len(lengths), lengths, positions.device), max(lengths)
        padding = _Padding(places.row * longest + places.number, (len(lengths), longest))
        positions = padding.unpack(positions + 1) - 1
        o = _cached_attention(padding.unpack(p.q), *keys, padding.unpack(p.gates), positions.int(), **sizes)
        return padding.pack(o)

    def _gates(self, x: Tensor) -> Tensor:
        """(B, T, H, 3): a sigmoid for each token, head and branch."""
        if self.gate_weight is None:
            return self.gate_bias.sigmoid().to(x.dtype).expand(*x.shape[:2], -1, -1)
        gates = F.linear(x, self.gate_weight, self.gate_bias.flatten()).sigmoid()
        return torch.unflatten(gates, -1, (self.cfg.heads, 3))

    def _check_input(
        self, x: Tensor, cache: NSACache | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Checks all. Of each row or sequence, returns the position of the first token, and the one behind the last."""
        _check_tokens(x, self.cfg.dim, self.to_q)
        cfg, (batch, tokens) = self.cfg, x.shape[:2]
        if cu_seqlens is None:
            _check(tokens <= cfg.seq_len, "x.shape", tuple(x.shape), f"must have T of at most seq_len = {cfg.seq_len}")
            lengths = (tokens,) * batch
        else:
            _, lengths = _sequences(cu_seqlens, batch, tokens, x.device)
            for i, n in enumerate(lengths):
                rule = f"must be at most seq_len = {cfg.seq_len} (of a key_padding_mask: the tokens of row {i})"
                _check(n <= cfg.seq_len, f"cu_seqlens[{i + 1}] - cu_seqlens[{i}]", n, rule)
        if cache is None:
            return (0,) * len(lengths), lengths
        cache._check_room(cfg, lengths, x.device)
        return cache.lengths, tuple(length + more for length, more in zip(cache.lengths, lengths, strict=True))


class _Projections(NamedTuple):
    """What the branches and the compressors read of each token of an input x."""

    q: Tensor  # (B, T, H, D); queries and keys are rotated by their positions already
    k: Tensor  # (B, T, K, D)
    v: Tensor
    k_local: Tensor
    v_local: Tensor
    k_raw: Tensor  # for the compressors: not rotated
    v_raw: Tensor
    gates: Tensor  # (B, T, H, 3)
    rotation: Tensor | None  # of the tokens


def _rotation(positions: Tensor, theta: float, like: Tensor) -> Tensor:
    """`_turns` for heads like those given (..., D): positions (T,) or (B, T) → (2, T, 1, D/2) or (2, B, T, 1, D/2)."""
    turns = _turns_as_operator if torch.compiler.is_compiling() else _turns
    return turns(positions, like.shape[-1] // 2, theta, like.dtype).unsqueeze(-2)


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary position embedding of x (B, T, H, D): dimensions i and i + D/2 turn as a pair."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


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
        if self.stride == self.block:  # a gradient that is a view, too, where that of unfold is a sum
            return x[:, : x.shape[1] // self.block * self.block].unflatten(1, (-1, self.block))
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

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """weight·(flattened block + position) + bias of each block: (b, T, dim) and (out, l·dim) → (b, C, out).

        A block is l/d pieces of d tokens. Each part of the weight meets the pieces of the whole sequence, which do not
        overlap, so that no token is copied for each block that it is in. The position is the same in all blocks, and so
        becomes a part of the bias.
        """
        pieces, parts = x.shape[1] // self.stride, weight.split(self.stride * self.dim, dim=1)
        x = x[:, : pieces * self.stride].reshape(x.shape[0], pieces, self.stride * self.dim)
        y = F.linear(x, parts[0], F.linear(self.position.flatten(), weight, bias))
        if len(parts) == 1:
            return y
        y = y[:, : pieces - len(parts) + 1]  # block i starts with piece i
        for i, part in enumerate(parts[1:], 1):
            y = y + F.linear(x, part)[:, i : i + y.shape[1]]
        return y


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
        return F.linear(F.gelu(self._linear(x, self.w_in, self.b_in)), self.w_out, self.b_out)


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
        return self._linear(x, self.weight.transpose(1, 2).flatten(1), self.bias)


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

    def forward(self, x: Tensor) -> Tensor:
        _check_tensor("x", x, 3, "(b, T, dim)")
        _check(x.shape[2] == self.dim, "x.shape", tuple(x.shape), f"must have dim = {self.dim} in dimension 2")
        count = _compressed_count(x.shape[1], self.block, self.stride)
        if count == 0 or x.shape[0] == 0:  # the parameters take part all the same: DDP waits for all gradients
            none = [parameter.flatten()[:0].sum().to(x.dtype) for parameter in self.method.parameters()]
            return sum(none, x.new_empty(x.shape[0], count, self.dim))
        out = self.method(x[:, : (count - 1) * self.stride + self.block])
        expected, name = (x.shape[0], count, self.dim), type(self.method).__name__
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
        cu_seqlens, scale, backend: as in `local_attention`.

    Returns:
        (B, T, H, D) in q's dtype.

    Raises:
        ValueError, TypeError: as in `local_attention`.
    """
    _check((k_local is None) == (v_local is None), "k_local, v_local", "one of them", "give both or neither")
    q, k, v, k_cmp, v_cmp, gates, k_local, v_local = _autocast(q, k, v, k_cmp, v_cmp, gates, k_local, v_local)
    own = k_local is not None and not (k_local is k and v_local is v)
    local = {"k_local": k_local, "v_local": v_local} if own else {}
    scale = _check_query(q, scale)
    _check_keys(q, "(B, T, K, D)", _as_many, k=k, v=v, **local)
    cu_seqlens, lengths = _sequences(cu_seqlens, *q.shape[:2], q.device)
    _check_compressed(q, block_size, stride, lengths, k_cmp=k_cmp, v_cmp=v_cmp)
    _check(k_cmp.shape[2] == k.shape[2], "k_cmp.shape", tuple(k_cmp.shape), lambda: f"must have k's {k.shape[2]} heads")
    _check_shape("gates", gates, "(B, T, H, 3)", (*q.shape[:3], 3))
    _check_like("gates", gates, q)
    _check_integer("local_window", local_window, 1)
    sizes = [block_size, stride, select_block_size, topk_blocks, init_blocks, local_blocks]
    _check_choice(*sizes)
    on = _choose_backend(backend, q, k, scale, obstacle=_select_obstacle(block_size, select_block_size))
    if backend == "auto" and not lengths and _flash_attention(q) is not None:  # its part has a backward of its own
        o_local = local_attention(q, *((k_local, v_local) if own else (k, v)), local_window, scale=scale)
        o_compressed, lse = compressed_attention(q, k_cmp, v_cmp, block_size, stride, scale=scale)
        chosen = _select([q, k_cmp, lse.detach()], None, [], on, sizes, scale)
        o_selective = selective_attention(q, k, v, chosen, select_block_size, scale=scale)
        return _torch_gate(gates, o_local, o_compressed, o_selective)
    settings, none = (lengths, on, local_window, sizes, scale), [None] * (2 - len(local))
    gated = lambda gates: _AttentionFunction.apply(  # noqa: E731
        settings, cu_seqlens, *_apart(q, k, v, k_cmp, v_cmp, gates, *local.values()), *none
    )[0]
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
            is that of each sequence alone. Its values are read on the host, which waits for the GPU; a CUDA graph is
            captured for those of the call before, and replayed on no others.
        scale: factor on q·k; None is 1/sqrt(D).
        backend: "auto": Triton kernels for float16, bfloat16 and float32 on Hopper GPUs (flash-attn for this branch,
            where it is installed), PyTorch elsewhere; "torch"; or "triton", which says so where it cannot run.

    Returns:
        (B, T, H, D) in q's dtype; sums are accumulated in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: an argument breaks one of these rules; the message names it, its value and the rule.
    """
    q, k, v = _autocast(q, k, v)
    scale = _check_query(q, scale)
    _check_keys(q, "(B, T, K, D)", _as_many, k=k, v=v)
    _check_integer("window", window, 1)
    cu_seqlens, lengths = _sequences(cu_seqlens, *q.shape[:2], q.device)
    on = _choose_backend(backend, q, k, scale)
    flash = _flash_attention(q) if backend == "auto" and not lengths else None
    if flash is not None:
        return flash(q, k, v, softmax_scale=scale, causal=True, window_size=(window - 1, 0))
    return _BranchFunction.apply((lengths, on, "local", [window], scale), cu_seqlens, *_apart(q, k, v), None)[0]


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
            sequences, (1, C₁ + … + Cₙ, K, D): the blocks of each, one sequence after another.
        block_size, stride: l and d, in tokens; l is a multiple of d.
        cu_seqlens, scale, backend: as in `local_attention`.

    Returns:
        o (B, T, H, D) in q's dtype, exactly 0 where a query sees no block, and the log-sum-exp of the scaled scores,
        (B, T, H) in float32 (float64 for float64), −inf there. Both are differentiable.

    Raises:
        ValueError, TypeError: as in `local_attention`.
    """
    q, k_cmp, v_cmp = _autocast(q, k_cmp, v_cmp)
    scale = _check_query(q, scale)
    cu_seqlens, lengths = _sequences(cu_seqlens, *q.shape[:2], q.device)
    _check_compressed(q, block_size, stride, lengths, k_cmp=k_cmp, v_cmp=v_cmp)
    on = _choose_backend(backend, q, k_cmp, scale)
    settings = (lengths, on, "compressed", [block_size, stride], scale)
    return _BranchFunction.apply(settings, cu_seqlens, *_apart(q, k_cmp, v_cmp), None)


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
        q, k_cmp, block_size, stride, cu_seqlens, scale, backend: as in `compressed_attention`.
        lse: its second result, (B, T, H).
        select_block_size: l' in tokens, a multiple of `stride`.
        topk_blocks: S, at least `init_blocks` + `local_blocks`.

    Returns:
        int32 (B, T, K, S): block indices in ascending order, one set for each group, −1 in slots that stay free. In
        packed sequences they count from the start of the query's own.

    Raises:
        ValueError, TypeError: as in `local_attention`.
    """
    q, k_cmp = _autocast(q, k_cmp)
    scale = _check_query(q, scale)
    cu_seqlens, lengths = _sequences(cu_seqlens, *q.shape[:2], q.device)
    _check_compressed(q, block_size, stride, lengths, k_cmp=k_cmp)
    _check_shape("lse", lse, "q's (B, T, H)", tuple(q.shape[:3]))
    _check_device("lse", lse, "q's", q.device)
    _check(lse.is_floating_point(), "lse.dtype", lse.dtype, "must be a floating point type", TypeError)
    sizes = [block_size, stride, select_block_size, topk_blocks, init_blocks, local_blocks]
    _check_choice(*sizes)
    on = _choose_backend(backend, q, k_cmp, scale, obstacle=_select_obstacle(block_size, select_block_size))
    return _select([q, k_cmp, lse], cu_seqlens, lengths, on, sizes, scale)


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
        q, k, v, cu_seqlens, scale, backend: as in `local_attention`.
        block_indices: int32 or int64 (B, T, K, S), as `select_blocks` returns it: for each key head the blocks chosen,
            each at most once, in any order; −1 leaves a slot free. A block behind the query is not seen. In packed
            sequences they count from the start of the query's own.
        select_block_size: l', in tokens.

    Returns:
        (B, T, H, D) in q's dtype; 0 where a query has chosen nothing that it sees.

    Raises:
        ValueError, TypeError: as in `local_attention`.
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
    cu_seqlens, lengths = _sequences(cu_seqlens, *q.shape[:2], q.device)
    on = _choose_backend(backend, q, k, scale)
    settings = (lengths, on, "selective", [select_block_size], scale)
    return _BranchFunction.apply(settings, cu_seqlens, *_apart(q, k, v), block_indices)[0]


@torch.no_grad()
def _cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_local: Tensor,
    v_local: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    positions: Tensor,
    *,
    local_window: int,
    backend: str,
    **choice: int,
) -> Tensor:
    """`nsa_attention` of the next tokens of some rows over the keys of a cache: q, gates (B, M, ...) → (B, M, H, D).

    The queries stand at `positions`, int32 (B, M), −1 where a row has fewer than M. The keys, (B, max_len, K, D) and
    (B, C, K, D), hold theirs already; what a cache holds behind a query is not seen.
    """
    q, gates = _autocast(q, gates)
    scale = _check_query(q, None)
    if q.numel() == 0:
        return q
    obstacle = _decode_obstacle(choice["block_size"], choice["stride"], choice["select_block_size"])
    on = _choose_backend(backend, q, k, scale, obstacle=obstacle)
    with torch.autocast(q.device.type, enabled=False):
        tensors = (q, k, v, k_local, v_local, k_cmp, v_cmp, gates, positions)
        return _BACKENDS[on].decode(*tensors, local_window=local_window, **choice, scale=scale)


def _choose_backend(backend: str, q: Tensor, k: Tensor, scale: float, obstacle: str | None = None) -> str:
    """An explicit choice never falls back silently. "auto" takes the kernels where they have been tested: on Hopper.

    `obstacle`: why the caller's function has no kernel for its other arguments, if so.
    """
    _check(backend in ("auto", *_BACKENDS), "backend", backend, "must be 'auto', 'torch' or 'triton'")
    if backend == "torch":
        return "torch"
    obstacle = obstacle or _triton_obstacle(q, k, scale)
    usable = obstacle is None
    if backend == "auto":
        usable = usable and q.is_cuda and _capability(q.device)[0] == 9
    else:
        _check(usable, "backend", backend, f"cannot run here: {obstacle}; use 'auto' or 'torch'")
    return "triton" if usable and q.numel() > 0 else "torch"


@_once
def _flash_works() -> bool:
    try:
        from flash_attn import flash_attn_func  # noqa: F401
    except Exception:  # not installed; or a broken build, which raises all kinds of errors
        return False
    return True


def _flash_attention(q: Tensor) -> Callable[..., Tensor] | None:
    """flash-attn's function, where that package is installed and takes such a query; None elsewhere."""
    takes = q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256 and q.numel() > 0
    if not takes or not _flash_works():
        return None
    from flash_attn import flash_attn_func

    return flash_attn_func


def _autocast_enabled(device: str) -> bool:
    return device in ("cpu", "cuda", "xpu", "mps") and torch.is_autocast_enabled(device)


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under torch.autocast, attention takes the autocast dtype, as scaled_dot_product_attention does."""
    devices = [x.device.type for x in tensors if isinstance(x, Tensor)]
    if not devices or not _autocast_enabled(devices[0]):
        return tensors
    dtype = torch.get_autocast_dtype(devices[0])
    narrow = lambda x: isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64  # noqa: E731
    return tuple(x.to(dtype) if narrow(x) else x for x in tensors)


def _check_tensor(name: str, x: object, rank: int, letters: str) -> None:
    _check(isinstance(x, Tensor), name, type(x).__name__, "must be a tensor", TypeError)
    _check(x.ndim == rank, f"{name}.shape", tuple(x.shape), f"must have {rank} dimensions, {letters}")


def _check_shape(name: str, x: Tensor, letters: str, expected: tuple[int, ...]) -> None:
    _check_tensor(name, x, len(expected), letters)
    _check(tuple(x.shape) == expected, f"{name}.shape", tuple(x.shape), lambda: f"must be {letters} = {expected}")


def _check_device(name: str, x: Tensor, owner: str, device: torch.device) -> None:
    _check(x.device == device, f"{name}.device", str(x.device), f"must be {owner}, {device}")


def _readable(x: Tensor) -> bool:
    """Whether a look at the values costs nothing: on a CPU, and neither in compiled code nor of a fake tensor."""
    plain = type(x) in (Tensor, nn.Parameter)
    return plain and x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_like(name: str, x: Tensor, q: Tensor) -> None:
    _check(x.dtype == q.dtype, f"{name}.dtype", x.dtype, f"must be q's, {q.dtype}")
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
    heads = None
    for name, x in keys_and_values.items():
        _check_tensor(name, x, 4, letters)
        _check_like(name, x, q)
        _check_layout(q, x, name, rows)
        heads = x.shape[2] if heads is None else heads
        of_group = heads > 0 and q.shape[2] % heads == 0
        _check(of_group, f"{name}.shape", tuple(x.shape), lambda: f"must have a divisor of q's {q.shape[2]} heads")
        _check_shape(name, x, letters, (q.shape[0], rows(q.shape[1]), heads, q.shape[3]))


def _as_many(tokens: int) -> int:
    """A key for each token."""
    return tokens


def _check_compressed(
    q: Tensor, block_size: int, stride: int, lengths: tuple[int, ...], **keys_and_values: Tensor
) -> None:
    _check_integer("block_size", block_size, 1)
    _check_integer("stride", stride, 1)
    _check_blocks(block_size, stride, stride, 0, 0, 0)
    packed = sum(_compressed_count(n, block_size, stride) for n in lengths)
    rows = lambda tokens: packed if lengths else _compressed_count(tokens, block_size, stride)  # noqa: E731
    _check_keys(q, "(B, C, K, D)", rows, **keys_and_values)


def _check_choice(
    block_size: int, stride: int, select_block_size: int, topk_blocks: int, init_blocks: int, local_blocks: int
) -> None:
    """Checks the sizes of the choice; block_size and stride have been checked."""
    for name, value in (("select_block_size", select_block_size), ("topk_blocks", topk_blocks)):
        _check_integer(name, value, 1)
    for name, value in (("init_blocks", init_blocks), ("local_blocks", local_blocks)):
        _check_integer(name, value, 0)
    _check_blocks(block_size, stride, select_block_size, topk_blocks, init_blocks, local_blocks)


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 5  Batches: packed and padded sequences, and the cache by which a module goes on
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


# What was last read of a tensor that is still alive and on a GPU.
_READINGS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _read(tensor: Tensor, read: Callable[[Tensor], Any]) -> Any:
    """`read(tensor)`, for which the host waits. In the capture of a CUDA graph, where it must not: what that last gave.

    The graph is then replayed on the same numbers only. Elsewhere nothing is taken from memory: numpy, DLPack or
    `.data` may have changed the tensor, and torch would not know.
    """
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        _check(tensor in _READINGS, "values on the GPU", "not read", "run the same call before it is captured")
        return _READINGS[tensor]
    result = read(tensor)
    if tensor.is_cuda:
        _READINGS[tensor] = result
    return result


def _read_lengths(cu_seqlens: Tensor) -> tuple[int, ...]:
    """The lengths of packed sequences, on the host."""
    edges = cu_seqlens.tolist()
    _check(edges[0] == 0, "cu_seqlens[0]", edges[0], "must be 0, where the first sequence begins")
    lengths = tuple(stop - start for start, stop in itertools.pairwise(edges))
    for i, length in enumerate(lengths):
        rule = f"must be at least cu_seqlens[{i}] = {edges[i]}, where the sequence begins that ends here"
        _check(length >= 0, f"cu_seqlens[{i + 1}]", edges[i + 1], rule)
    return lengths


def _sequences(
    cu_seqlens: Tensor | None, batch: int, tokens: int, device: torch.device
) -> tuple[Tensor | None, tuple[int, ...]]:
    """cu_seqlens as int32, and the lengths of the sequences packed in (batch, tokens, ...); None and () without any."""
    if cu_seqlens is None:
        return None, ()
    _check_tensor("cu_seqlens", cu_seqlens, 1, "(n + 1,)")
    _check(len(cu_seqlens) > 0, "cu_seqlens.shape", tuple(cu_seqlens.shape), "must be (n + 1,) for n sequences")
    dtype = cu_seqlens.dtype
    _check(dtype in (torch.int32, torch.int64), "cu_seqlens.dtype", dtype, "must be torch.int32 or torch.int64")
    _check_device("cu_seqlens", cu_seqlens, "the tokens'", device)
    _check(batch == 1, "batch", batch, "must be 1 where cu_seqlens packs the sequences of a batch one after another")
    lengths = _read(cu_seqlens, _read_lengths)
    _check(sum(lengths) == tokens, "cu_seqlens[-1]", sum(lengths), f"must be {tokens}, the number of tokens")
    return cu_seqlens.int(), lengths


class _Places(NamedTuple):
    """Where tokens or blocks belong: the row of each, (n,), and its number there."""

    row: Tensor
    number: Tensor


def _places(starts: Sequence[int], stops: Sequence[int], device: torch.device) -> _Places:
    """In each row i the numbers from starts[i] up to, not including, stops[i]; row after row."""
    counts = [stop - start for start, stop in zip(starts, stops, strict=True)]
    table = torch.tensor([list(starts), counts], dtype=torch.int64, device="cpu")
    start, count = table.to(device, non_blocking=True)  # the host does not wait for the GPU
    row, number = _runs(count, sum(counts))
    return _Places(row, number + start[row])


class _Padding(NamedTuple):
    """Rows with places that hold no token, (B, T, ...), and the tokens alone, packed: (1, total, ...)."""

    place: Tensor  # (total,) of each token, among the B·T
    shape: tuple[int, int]  # B, T

    def pack(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self.place)[None]

    def unpack(self, x: Tensor) -> Tensor:
        """0 where there is no token."""
        rows = x.new_zeros(math.prod(self.shape), *x.shape[2:])
        return rows.index_copy_(0, self.place, x[0]).unflatten(0, self.shape)


def _read_padding(mask: Tensor) -> tuple[_Padding, Tensor]:
    """The padding of rows, and the cu_seqlens of their tokens."""
    lengths = F.pad(mask.sum(1), (1, 0))
    return _Padding(mask.flatten().nonzero()[:, 0], tuple(mask.shape)), lengths.cumsum(0, dtype=torch.int32)


def _without_padding(
    function: Callable[[Tensor, NSACache | None, Tensor | None], Tensor],
    x: Tensor,
    cache: NSACache | None,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """`function` of x, cache, cu_seqlens; of the tokens alone, packed, where a key_padding_mask says which they are."""
    if mask is None:
        return function(x, cache, cu_seqlens)
    _check(cu_seqlens is None, "key_padding_mask, cu_seqlens", "both", "give one of them at most")
    _check_tensor("x", x, 3, "(B, T, dim)")
    _check_shape("key_padding_mask", mask, "(B, T)", tuple(x.shape[:2]))
    _check(mask.dtype == torch.bool, "key_padding_mask.dtype", mask.dtype, "must be torch.bool, True for a token")
    _check_device("key_padding_mask", mask, "x's", x.device)
    padding, cu_seqlens = _read(mask, _read_padding)
    return padding.unpack(function(padding.pack(x), cache, cu_seqlens))


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

    All memory is allocated here. A token takes 2·K·D numbers in each row, 3·K·D where rope_theta is given, 6·K·D where
    separate_kv is, and 2·K·D/d more for the compressed blocks, each number as many bytes as the dtype has. At the
    paper's sizes (K = 4, D = 128, d = 16, separate_kv, bfloat16) that is 6272 bytes.

    Args:
        cfg: the configuration of the module that it serves.
        batch: rows.
        max_len: tokens that each row has room for, at most `cfg.seq_len`.
        device, dtype: of the keys and values, those of the module's weights (under autocast, the autocast dtype).

    Attributes:
        lengths: a tuple of `batch` ints, the number of tokens in each row.
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
        self._lengths = (0,) * batch
        self._owner: weakref.ref[nn.Module] | None = None  # the module whose tokens these are

        def room(rows: int) -> Tensor:
            return torch.zeros(batch, rows, cfg.kv_heads, cfg.dim_head, device=device, dtype=dtype)

        with torch.inference_mode(False):  # what is made inside of it cannot be written outside
            self.k, self.v = room(max_len), room(max_len)  # of the selective branch
            self.k_local, self.v_local = (room(max_len), room(max_len)) if cfg.separate_kv else (self.k, self.v)
            # What the compressors read, which is not rotated. All of it is kept, so that a cache can be cut anywhere.
            self.k_raw = room(max_len) if cfg.separate_kv or cfg.rope_theta is not None else self.k
            self.v_raw = room(max_len) if cfg.separate_kv else self.v
            blocks = _compressed_count(max_len, cfg.block_size, cfg.stride)
            self.k_cmp, self.v_cmp = room(blocks), room(blocks)

    @property
    def lengths(self) -> tuple[int, ...]:
        return self._lengths

    @property
    def dtype(self) -> torch.dtype:
        return self.k.dtype

    @property
    def device(self) -> torch.device:
        return self.k.device

    def __repr__(self) -> str:
        shortest, longest = min(self._lengths), max(self._lengths)
        lengths = longest if shortest == longest else f"{shortest}..{longest}"
        sizes = f"batch={self.batch}, max_len={self.max_len}, lengths={lengths}"
        return f"NSACache({sizes}, dtype={self.dtype}, device={self.device})"

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_owner": None}  # a copy belongs to the module that next fills it

    def reset(self) -> None:
        """Forgets all tokens, and whose they were."""
        self._lengths, self._owner = (0,) * self.batch, None

    def truncate(self, n: int | Sequence[int] | Tensor) -> None:
        """Keeps the first n tokens of every row, or n[row] of each, and forgets the others, so as to go on from there.

        >>> cache = NSACache(NSAConfig(dim=64, heads=4, seq_len=256), batch=2, max_len=200)
        >>> with torch.inference_mode():
        ...     _ = NativeSparseAttention(cache.cfg)(torch.randn(2, 50, 64), cache=cache)
        >>> cache.truncate([48, 49])
        >>> cache.lengths
        (48, 49)

        Args:
            n: an int, or `batch` of them as a list, a tuple or a tensor (read on the host).

        Raises:
            ValueError, TypeError: n is no such number or numbers, below 0, or above the length of a row.
        """
        n = n.tolist() if isinstance(n, Tensor) else n
        lengths = self._of_rows("n", [n] * self.batch if isinstance(n, int) else n)
        for row, (kept, length) in enumerate(zip(lengths, self._lengths, strict=True)):
            _check(0 <= kept <= length, f"n[{row}]", kept, f"must be from 0 to the row's length, {length}")
        self._lengths = lengths

    @torch.no_grad()
    def reorder(self, indices: Sequence[int] | Tensor) -> None:
        """Row i becomes what row indices[i] was. A row may be taken many times, as beam search does, or never.

        Args:
            indices: `batch` ints from 0 to batch − 1, as a list, a tuple or a tensor (read on the host).

        Raises:
            ValueError, TypeError: indices are not `batch` numbers of rows.
        """
        sources = self._of_rows("indices", indices.tolist() if isinstance(indices, Tensor) else indices)
        for i, source in enumerate(sources):
            _check(0 <= source < self.batch, f"indices[{i}]", source, f"must be from 0 to batch - 1 = {self.batch - 1}")
        moves = [(row, source) for row, source in enumerate(sources) if row != source]
        if moves:
            rows, taken = torch.tensor(moves, device=self.device).unbind(1)
            longest = max(self._lengths[source] for _, source in moves)
            blocks = _compressed_count(longest, self.cfg.block_size, self.cfg.stride)
            for name, buffer in self._buffers().items():
                used = buffer[:, : blocks if name in ("k_cmp", "v_cmp") else longest]
                used[rows] = used[taken]
        self._lengths = tuple(self._lengths[source] for source in sources)

    def _of_rows(self, name: str, values: object) -> tuple[int, ...]:
        integers = isinstance(values, list | tuple) and all(type(value) is int for value in values)
        _check(integers, name, values, "must be an int for each row", TypeError)
        _check(len(values) == self.batch, name, values, f"must be as many as there are rows, {self.batch}")
        return tuple(values)

    def _buffers(self) -> dict[str, Tensor]:
        """All tensors, by the first of the names that each has."""
        names = ("k", "v", "k_local", "v_local", "k_raw", "v_raw", "k_cmp", "v_cmp")
        named = {id(getattr(self, name)): name for name in reversed(names)}
        return {name: getattr(self, name) for name in named.values()}

    @contextlib.contextmanager
    def _appending(self) -> Iterator[None]:
        """Leaves the rows as long as they were if what runs inside fails."""
        before = self._lengths, self._owner
        try:
            yield
        except BaseException:
            self._lengths, self._owner = before
            raise

    def _extend(self, lengths: tuple[int, ...], owner: nn.Module) -> None:
        """Makes the rows as long as that: what the owner has written counts from now on."""
        self._lengths = lengths
        if any(lengths):
            self._owner = weakref.ref(owner)

    def _write(self, places: _Places, values: dict[str, Tensor]) -> None:
        """Puts values, (B, T, K, D) or (1, total, K, D), where they belong. No row is longer for it yet."""
        for name, buffer in self._buffers().items():
            if name in values:
                buffer.index_put_(tuple(places), values[name].flatten(0, 1).to(buffer.dtype))

    def _check_room(self, cfg: NSAConfig, lengths: tuple[int, ...], device: torch.device) -> None:
        """Checks that a module of such a configuration can append so many tokens to each row."""
        for name in (field.name for field in fields(cfg)) if self.cfg != cfg else ():
            value, same = getattr(self.cfg, name), name == "use_flash" or getattr(self.cfg, name) == getattr(cfg, name)
            _check(same, f"cache.cfg.{name}", value, f"must be the module's, {getattr(cfg, name)!r}")
        _check(self.batch == len(lengths), "cache.batch", self.batch, f"must be that of the tokens, {len(lengths)}")
        _check(self.device == device, "cache.device", str(self.device), f"must be that of the tokens, {device}")
        for row, (length, more) in enumerate(zip(self._lengths, lengths, strict=True)):
            rule = f"must leave room for {more} more within max_len = {self.max_len}"
            _check(length + more <= self.max_len, f"cache.lengths[{row}]", length, rule)

    def _check_owner(self, owner: nn.Module, keys: Tensor) -> None:
        """Checks that these keys of a module may go on from the tokens that are here."""
        _check(self.dtype == keys.dtype, "cache.dtype", self.dtype, f"must be that of the module's keys, {keys.dtype}")
        owned = self._owner is None or self._owner() is owner
        _check(owned, "cache", self, "holds another module's tokens; each layer has a cache of its own (or reset() it)")
        wanted = torch.is_grad_enabled() and (keys.requires_grad or any(p.requires_grad for p in owner.parameters()))
        rule = "records no gradients, but x or a parameter wants one: call it under torch.no_grad() or inference_mode()"
        _check(not wanted, "cache", self, rule)


def _appending(cache: NSACache | None) -> contextlib.AbstractContextManager[None]:
    """Surrounds a forward that may have a cache."""
    if cache is None:
        return contextlib.nullcontext()
    _check(isinstance(cache, NSACache), "cache", type(cache).__name__, "must be an NSACache", TypeError)
    return cache._appending()


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 6  Operators and autograd: one function for a branch, one for the whole, on every backend
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


class _Branch(NamedTuple):
    """A branch on a backend. The sizes are its integers: the window, l and d, or l'. `_on` adds packed sequences.

    forward(q, k, v[, block_indices], *sizes, scale) → o, lse
    backward(do, terms, q, k, v[, block_indices], *sizes, scale, dq) → dq, dk, dv; added to the dq that is given, if any

    The selective branch adds to dk and dv as well where they are given, and takes the pairs that its forward kept. The
    local branch's forward returns o and lse over recent blocks as well, if it does any for the selective branch, whose
    terms its backward then takes, too.
    """

    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


class _Backend(NamedTuple):
    """All that a backend must bring."""

    local: _Branch
    compressed: _Branch
    selective: _Branch
    select: Callable[..., Tensor]
    taken_over: Callable[..., _Recent]  # what the local branch does for the selective one
    gated_selective: Callable[..., tuple[Tensor, Tensor, Tensor, list[Tensor]]]
    kept_pairs: Callable[..., list[tuple[int, ...]]]  # shapes of what the former returns last, for the backward
    row_terms: Callable[..., _RowTerms]
    gated_row_terms: Callable[..., tuple[Tensor, list[_RowTerms]]]
    decode: Callable[..., Tensor]


# Operators: what torch.compile sees of a forward and of a backward. It does not look inside; the second function of a
# pair tells it the shapes. Precision is the branches' own business, under autocast too: they accumulate in float32.


# The namespace of the operators. A module may have a name that is no identifier; its bytes then keep such names apart.
_LIBRARY = __name__ if __name__.isidentifier() and __name__.isascii() else f"nsa_{__name__.encode().hex()}"


def _registered(function: Callable[..., Any]) -> Any:
    """`function` as an operator <name of this module>::<its name>; it changes none of its arguments.

    By the module's own name, so that two copies of this file in one process keep to themselves.
    """
    return torch.library.custom_op(f"{_LIBRARY}::{function.__name__.lstrip('_')}", function, mutates_args=())


def _operator(function: Callable[..., Any]) -> Any:
    """An operator of the branches. Packed sequences are their cu_seqlens and lengths, else None and []."""

    @functools.wraps(function)
    def in_full_precision(
        tensors: list[Tensor], cu_seqlens: Tensor | None, lengths: list[int], backend: str, *settings: Any
    ) -> Any:
        *_, sizes, _scale = settings
        lengths = [length for length in lengths if length > 0]
        with torch.autocast(tensors[0].device.type, enabled=False):
            if backend == "torch" and lengths:  # PyTorch runs each alone
                of_one = lambda sequence: function(sequence, None, [], backend, *settings)  # noqa: E731
                return _each_sequence(of_one, tensors, lengths, *(sizes[:2] if len(sizes) > 1 else ()))
            return function(tensors, cu_seqlens, lengths, backend, *settings)

    return _registered(in_full_precision)


def _fake_output(q: Tensor) -> list[Tensor]:
    """Shapes of o and lse."""
    return [q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=_accumulation_dtype(q))]


def _recent_blocks(backend: str, q: Tensor, own_local_keys: bool, window: int, sizes: list[int]) -> _Recent:
    """Those that the local branch does, which must have the selective one's keys; the sizes are those of `_select`."""
    _, _, select_block_size, topk_blocks, _, local_blocks = sizes
    if own_local_keys:
        return _NOTHING_RECENT
    return _BACKENDS[backend].taken_over(q, window, select_block_size, topk_blocks, local_blocks)


def _fake_choice(q: Tensor, k: Tensor, sizes: list[int]) -> Tensor:
    """Shape of block_indices; the sizes are those of `_select`."""
    return q.new_empty(*q.shape[:2], k.shape[2], sizes[3], dtype=torch.int32)


@_operator
def _branch_forward(
    tensors: list[Tensor],
    cu_seqlens: Tensor | None,
    lengths: list[int],
    backend: str,
    branch: str,
    sizes: list[int],
    scale: float,
) -> list[Tensor]:
    """q, k, v[, block_indices] → o, lse."""
    return list(getattr(_on(backend, cu_seqlens, lengths), branch).forward(*tensors, *sizes, scale))


@_branch_forward.register_fake
def _(tensors: list[Tensor], *_: Any) -> list[Tensor]:
    return _fake_output(tensors[0])


@_operator
def _branch_backward(
    tensors: list[Tensor],
    cu_seqlens: Tensor | None,
    lengths: list[int],
    backend: str,
    branch: str,
    sizes: list[int],
    scale: float,
) -> list[Tensor]:
    """do, dlse, o, lse, q, k, v[, block_indices] → dq, dk, dv."""
    (do, dlse, o, lse, *inputs), on = tensors, _on(backend, cu_seqlens, lengths)
    terms = on.row_terms(do, dlse, o, lse, inputs[1].shape[2])
    dq, dk, dv = getattr(on, branch).backward(do, terms, *inputs, *sizes, scale, None)
    return [dq.to(do.dtype).contiguous(), dk, dv]


@_branch_backward.register_fake
def _(tensors: list[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in tensors[4:7]]


@_operator
def _select(
    tensors: list[Tensor], cu_seqlens: Tensor | None, lengths: list[int], backend: str, sizes: list[int], scale: float
) -> Tensor:
    """q, k_cmp, lse → block_indices; sizes: l, d, l', S, forced first, forced last."""
    return _on(backend, cu_seqlens, lengths).select(*tensors, *sizes, scale)


@_select.register_fake
def _(tensors: list[Tensor], *settings: Any) -> Tensor:
    return _fake_choice(*tensors[:2], settings[-2])


@_operator
def _attention_forward(
    tensors: list[Tensor],
    cu_seqlens: Tensor | None,
    lengths: list[int],
    backend: str,
    window: int,
    sizes: list[int],
    scale: float,
) -> list[Tensor]:
    """q, k, v, k_cmp, v_cmp, gates[, k_local, v_local] → o, o and lse of each branch, block_indices, and kept pairs."""
    q, k, v, k_cmp, v_cmp, gates, *local = tensors
    on = _on(backend, cu_seqlens, lengths, _recent_blocks(backend, q, bool(local), window, sizes))
    o_local, lse_local, *recent_part = on.local.forward(q, *(local or (k, v)), window, scale)
    o_compressed, lse_compressed = on.compressed.forward(q, k_cmp, v_cmp, *sizes[:2], scale)
    chosen = on.select(q, k_cmp, lse_compressed, *sizes, scale)
    selective = (q, k, v, chosen, sizes[2], scale)
    o, o_selective, lse_selective, kept = on.gated_selective(gates, o_local, o_compressed, *selective, *recent_part)
    outputs, lses = (o_local, o_compressed, o_selective), (lse_local, lse_compressed, lse_selective)
    return [o.contiguous(), *outputs, *lses, chosen, *kept]


@_attention_forward.register_fake
def _(
    tensors: list[Tensor], _: Tensor | None, lengths: list[int], backend: str, window: int, sizes: list[int], __: float
) -> list[Tensor]:
    q, k = tensors[:2]
    outputs, lses = zip(*(_fake_output(q) for _ in range(3)), strict=True)
    recent = _recent_blocks(backend, q, len(tensors) > 6, window, sizes)
    kept = _BACKENDS[backend].kept_pairs(q, k.shape[2], sizes[3] - recent.blocks, sizes[2], lengths)
    kept = [q.new_empty(shape, dtype=torch.int32) for shape in kept]
    return [q.new_empty(q.shape), *outputs, *lses, _fake_choice(q, k, sizes), *kept]


@_operator
def _attention_backward(
    tensors: list[Tensor],
    cu_seqlens: Tensor | None,
    lengths: list[int],
    backend: str,
    kept: list[Tensor],
    window: int,
    sizes: list[int],
    scale: float,
) -> list[Tensor]:
    """do, the results of the forward but for o and the kept pairs, and its arguments → the gradients of the arguments.

    The gates reach the branches through the terms of the rows, and the branches add up their dq in place.
    """
    do, *outputs, chosen, q, k, v, k_cmp, v_cmp, gates = tensors[:14]
    k_local, v_local = tensors[14:] or (k, v)
    recent = _recent_blocks(backend, q, bool(tensors[14:]), window, sizes)
    on = _on(backend, cu_seqlens, lengths, recent)
    dgates, terms = on.gated_row_terms(do, gates, outputs[:3], outputs[3:], k.shape[2])
    also = terms[2:] if recent.blocks else []
    dq, dk_local, dv_local = on.local.backward(do, terms[0], q, k_local, v_local, window, scale, None, *also)
    dq, dk_cmp, dv_cmp = on.compressed.backward(do, terms[1], q, k_cmp, v_cmp, *sizes[:2], scale, dq)
    shared = (None, None) if tensors[14:] else (dk_local, dv_local)
    dq, dk, dv = on.selective.backward(do, terms[2], q, k, v, chosen, sizes[2], scale, dq, *shared, kept)
    gradients = [dq.to(q.dtype).contiguous(), dk, dv, dk_cmp, dv_cmp, dgates]
    return [*gradients, dk_local, dv_local] if tensors[14:] else gradients


@_attention_backward.register_fake
def _(tensors: list[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in tensors[8:]]


# torch.compile takes no tensor twice as an argument of an autograd function. Where nothing needs a gradient, it counts
# the parameters of `forward` to learn whether a context comes first, so that *tensors would mislead it.


def _apart(*tensors: Tensor) -> list[Tensor]:
    """The tensors, each its own: one that came before comes again as a view."""
    return [x.view_as(x) if any(x is y for y in tensors[:i]) else x for i, x in enumerate(tensors)]


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


class _FirstGradients(torch.autograd.Function):
    """The gradients as they are, and an error for whoever differentiates them.

    torch's once_differentiable raises only where the upstream gradient requires one itself. A gradient penalty, whose
    upstream gradient is a constant, would lose its own gradient without a word.
    """

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("Native Sparse Attention has first derivatives only: this needs the gradient of a gradient")


def _first_gradients(gradients: Sequence[Tensor], *inputs: Tensor | None) -> Sequence[Tensor]:
    """The gradients of a backward that read these inputs; where a graph of it is recorded, to be differentiated once.

    Compiled code has no second derivatives, and says so itself.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    return _FirstGradients.apply(len(gradients), *gradients, *_given(*inputs))


class _BranchFunction(torch.autograd.Function):
    """A branch by itself → o, lse. Saves what goes in and out, never a probability."""

    @staticmethod
    def forward(
        settings: tuple[Any, ...],
        cu_seqlens: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        block_indices: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        return tuple(_branch_forward(_given(q, k, v, block_indices), cu_seqlens, *settings))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.settings, cu_seqlens, *tensors = inputs
        ctx.save_for_backward(cu_seqlens, *output, *tensors)

    @staticmethod
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        cu_seqlens, *saved = ctx.saved_tensors
        with torch.no_grad():
            gradients = _branch_backward([do, dlse, *_given(*saved)], cu_seqlens, *ctx.settings)
        gradients = _first_gradients(gradients, do, dlse, *saved)
        return None, None, *gradients, None  # settings, cu_seqlens, and block_indices


class _AttentionFunction(torch.autograd.Function):
    """The gated sum of the branches → o, and what backward reads."""

    @staticmethod
    def forward(
        settings: tuple[Any, ...],
        cu_seqlens: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_cmp: Tensor,
        v_cmp: Tensor,
        gates: Tensor,
        k_local: Tensor | None,
        v_local: Tensor | None,
    ) -> tuple[Tensor, ...]:
        return tuple(_attention_forward(_given(q, k, v, k_cmp, v_cmp, gates, k_local, v_local), cu_seqlens, *settings))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings, cu_seqlens, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # of what is not differentiable: it would be as large as the outputs
        ctx.n_kept = len(output[8:])
        ctx.save_for_backward(cu_seqlens, *output[8:], *output[1:8], *tensors)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if do is None:  # o took no part in what is differentiated
            return (None,) * 10
        cu_seqlens, *saved = ctx.saved_tensors
        kept, saved = saved[: ctx.n_kept], _given(*saved[ctx.n_kept :])
        (lengths, backend, *sizes) = ctx.settings
        with torch.no_grad():
            gradients = _attention_backward([do, *saved], cu_seqlens, lengths, backend, kept, *sizes)
        gradients = _first_gradients(gradients, do, *saved)
        return None, None, *gradients, *[None] * (8 - len(gradients))  # settings, cu_seqlens, local keys if not given


def _turns(positions: Tensor, half: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Cosine and sine of positions·theta^(−2i/D) for i < D/2 = half: (..., T) → (2, ..., T, D/2)."""
    options = {"base": theta, "dtype": torch.float64, "device": positions.device}  # a position may be a million
    angles = positions[..., None] * torch.logspace(0, (1 - half) / half, half, **options)
    turns = angles.new_empty((2, *angles.shape), dtype=dtype)
    torch.cos(angles, out=turns[0])
    torch.sin(angles, out=turns[1])
    return turns


# Compiled code that saw inside would compute them anew for each head and each use, which has taken a quarter of a step.
_turns_as_operator = _registered(_turns)


@_turns_as_operator.register_fake
def _(positions: Tensor, half: int, theta: float, dtype: torch.dtype) -> Tensor:
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


def _runs(counts: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Runs of so many rows each, one after another, `total` in all: each row's run, and its number there, (total,)."""
    end = counts.cumsum(0, dtype=counts.dtype)
    row = torch.arange(total, dtype=counts.dtype, device=counts.device)
    run = torch.searchsorted(end, row, right=True, out_int32=counts.dtype == torch.int32)
    return run, row - (end - counts)[run]


class _Window(NamedTuple):
    """Who sees whom in the local branch: the query at t sees the keys at t − W < s ≤ t."""

    window: int

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key > query - self.window)

    def keys(self, start: int, stop: int) -> slice:
        """The keys that the queries [start, stop) see between them."""
        return slice(max(0, start - self.window + 1), stop)

    def span(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """The first key that each query sees, and one past the last."""
        return (query - self.window + 1).clamp(min=0), query + 1

    def seen_by(self, key: Tensor) -> tuple[Tensor, Tensor]:
        """The first query that sees each key, and one past the last, where the sequence is long enough."""
        return key, key + self.window


class _Staircase(NamedTuple):
    """Who sees whom in the compressed branch: block i is visible once its last token is there, i·d + l − 1 ≤ t."""

    block_size: int
    stride: int

    def sees(self, query: Tensor, block: Tensor) -> Tensor:
        return block * self.stride + self.block_size - 1 <= query

    def keys(self, start: int, stop: int) -> slice:
        return slice(0, _compressed_count(stop, self.block_size, self.stride))

    def span(self, query: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(query), ((query + 1 - self.block_size) // self.stride + 1).clamp(min=0)

    def seen_by(self, block: Tensor) -> tuple[Tensor, Tensor]:
        return block * self.stride + self.block_size - 1, torch.full_like(block, torch.iinfo(block.dtype).max)


class _Recent(NamedTuple):
    """The last blocks of each query, up to its own, which it chooses whatever their scores (§3.3.2)."""

    select_block_size: int
    blocks: int

    def others(self, block_indices: Tensor) -> Tensor:
        """The slots, ascending, without those that only recent blocks take."""
        return block_indices[..., : block_indices.shape[-1] - self.blocks]

    def first(self, query: Tensor) -> Tensor:
        """The first key of each query's recent blocks."""
        return ((query // self.select_block_size - self.blocks + 1) * self.select_block_size).clamp(min=0)

    def end(self, key: Tensor) -> Tensor:
        """The first query that no longer has each key in its recent blocks."""
        return (key // self.select_block_size + self.blocks) * self.select_block_size


_NOTHING_RECENT = _Recent(1, 0)


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
    # On a CPU topk partitions rows as a whole, up to 64·count numbers; longer ones it sorts in part, twice as fast.
    spare = 64 * count - scores.shape[-1]
    worth = scores.device.type == "cpu" and 0 < spare < 40 * count
    values, index = (F.pad(scores, (0, spare), value=-math.inf) if worth else scores).topk(count)
    # topk breaks ties as it likes. Only where a tie straddles the last place does that matter: sort those rows stably.
    tied = (scores >= values[..., -1:]).sum(-1) > count
    if tied.any():
        index[tied] = scores[tied].sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return index.sort(dim=-1).values


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


# 4  PyTorch branches: forward and backward of each branch on any device, in tiles, so that nothing of size T × T exists
#
# A tile is a batch of small dense attentions: for each of b heads (or b blocks), M query tokens of a group against n
# keys. The branches differ in nothing but the tiles: local and compressed attention walk along the sequence; selective
# attention sorts the (query, chosen block) pairs by block and lets every block meet the queries that chose it, so that
# keys are read once a tile rather than gathered for each query.
# Arithmetic is in float32 (float64 for float64 inputs). A backward recomputes the probabilities from the log-sum-exp.
# A forward may begin at a position `first`, over keys that begin at 0: so new queries go on over the keys of a cache.
# Packed sequences run one at a time.


_TILE_SCORES = 2**20  # scores in a batch of tiles: 4 MiB, near the caches; 2**18 and 2**22 took a fifth longer at 32k
_PAIR_TILE = 64  # pairs of one selection block in a tile: 32 starves the matrix product, 128 pads more
_PARTIAL_VALUES = 2**24  # numbers in the partial outputs of a chunk of rows, 64 MiB; short chunks half-fill tiles
_LOG2E = math.log2(math.e)
_HIDDEN = -1e30


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
    if k.device.type == "cpu" and math.isfinite(k.sum() + v.sum()):
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
    """What the backward of a tile needs of its query rows: (b, M·G, D) and (b, M·G)."""

    q: Tensor
    do: Tensor
    shift: Tensor  # the gradient's share of a key is exp(s − shift)
    delta: Tensor  # what the normalisation of the softmax takes back

    def map(self, function: Callable[[Tensor], Tensor]) -> _Rows:
        return _Rows(*map(function, self))


def _tile_backward(
    rows: _Rows, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """P = exp(scale·Q·Kᵀ − shift), for the shift of whole rows, which may span tiles; then

    dV = Pᵀ·dO,  dS = P·(dO·Vᵀ − delta),  dQ = scale·dS·K,  dK = scale·dSᵀ·Q.  → (b, M·G, D), twice (b, n, D)
    """
    # In powers of two, which a CPU computes several times faster than exp.
    p = _tile_scores(rows.q, k, mask, scale * _LOG2E, rows.shift[..., None] * -_LOG2E).exp2_()
    ds = torch.baddbmm(rows.delta[..., None], rows.do, v.mT, beta=-1).mul_(p)
    dq = torch.bmm(ds, k).mul_(scale)
    dk = torch.bmm(ds.mT, rows.q).mul_(scale)
    return dq, dk, torch.bmm(p.mT, rows.do)


# What a backward needs of each query row ──────────────────────────────────────────────────────────────────────────────
#
# With p = exp(s − lse) the gradient of a branch's scores is ds = p·(do·v − do·o + dlse). Under a gate g, do is g times
# the gradient of the sum, so that ds = g·p·(do·v − do·o): the gate goes into the exponent, and into nothing else. So a
# row brings two numbers, in the accumulation dtype: shift = lse − log g, +∞ where nothing flows; delta = do·o − dlse.


class _RowTerms(NamedTuple):
    """Of each query row, laid out as the backend likes it; here (B, T, H)."""

    shift: Tensor
    delta: Tensor


def _row_dots(do: Tensor, o: Tensor, dtype: torch.dtype) -> Tensor:
    """do·o, (B, T, H)."""
    return torch.einsum("bthd,bthd->bth", do.to(dtype), o.to(dtype))


def _torch_row_terms(do: Tensor, dlse: Tensor, o: Tensor, lse: Tensor, kv_heads: int) -> _RowTerms:
    """Those of a branch that stands alone."""
    return _RowTerms(lse.masked_fill(lse == -math.inf, math.inf), _row_dots(do, o, lse.dtype) - dlse)


def _torch_gated_row_terms(
    do: Tensor, gates: Tensor, outputs: list[Tensor], lses: list[Tensor], kv_heads: int
) -> tuple[Tensor, list[_RowTerms]]:
    """dgates, (B, T, H, 3), and those of the three branches under their gates."""
    dots = [_row_dots(do, o, lse.dtype) for o, lse in zip(outputs, lses, strict=True)]
    terms = []
    for gate, lse, dot in zip(gates.unbind(3), lses, dots, strict=True):
        shift = (lse - gate.to(lse.dtype).log()).masked_fill_((gate == 0) | (lse == -math.inf), math.inf)
        terms.append(_RowTerms(shift, dot))
    return torch.stack(dots, dim=-1).to(gates.dtype), terms


# Local and compressed: tiles along the sequence ───────────────────────────────────────────────────────────────────────


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(B, T, K·g, ...) → (B, T, K, g, ...), a view; g is G for queries and 1 for keys."""
    return x.unflatten(2, (kv_heads, -1))


class _Tile(NamedTuple):
    """Some sequences and key heads, some queries, and all the keys that they see."""

    batch: slice
    heads: slice
    queries: slice
    positions: slice  # of the queries: where they stand in the sequence
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


def _sequence_tiles(q: Tensor, rule: _Window | _Staircase, first: int = 0) -> Iterator[_Tile]:
    """Tiles of q (B, T, K, G, D): some query tokens, all keys that they see, as many heads as fit the cache.

    The first query stands at position `first`, the first key always at 0.
    """
    batch, tokens, heads, group, _ = q.shape
    seen = rule.keys(first + tokens - 1, first + tokens)
    # Half as many queries as keys: few scores are computed in vain, and the matrix product is still of a fair size.
    size = max(1, min(512 // group, max(32, (seen.stop - seen.start) // 2)))
    for start in range(0, tokens, size):
        queries = slice(start, min(start + size, tokens))
        positions = slice(first + queries.start, first + queries.stop)
        keys = rule.keys(positions.start, positions.stop)
        query = torch.arange(positions.start, positions.stop, device=q.device)[:, None, None]
        mask = _hide(~rule.sees(query, torch.arange(keys.start, keys.stop, device=q.device)), q)
        most = max(1, _TILE_SCORES // max(1, mask.numel() * group))  # heads in the tile, over all its sequences
        for b, h in itertools.product(range(0, batch, max(1, most // heads)), range(0, heads, most)):
            yield _Tile(slice(b, b + max(1, most // heads)), slice(h, h + most), queries, positions, keys, mask)


def _sequence_forward(
    q: Tensor, k: Tensor, v: Tensor, rule: _Window | _Staircase, scale: float, first: int = 0
) -> tuple[Tensor, Tensor]:
    q, k, v = (_grouped(x, k.shape[2]) for x in (q, k, v))
    o = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:4], -math.inf, dtype=_accumulation_dtype(q), device=q.device)
    for tile in _sequence_tiles(q, rule, first):
        if tile.mask.numel() > 0:
            rows, keys, values = _fold(tile.rows(q)), _fold(tile.columns(k)), _fold(tile.columns(v))
            o_tile, lse_tile = _tile_forward(rows, keys, values, tile.mask, scale)
            tile.rows(o).copy_(_unfold(o_tile, tile.rows(o)))
            tile.rows(lse).copy_(_unfold(lse_tile, tile.rows(lse)))
    return o.flatten(2, 3), lse.flatten(2, 3)


def _sequence_backward(
    do: Tensor,
    terms: _RowTerms,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rule: _Window | _Staircase,
    scale: float,
    dq: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq = _wide_zeros(q) if dq is None else dq
    rows = _Rows(q, do, *terms).map(lambda x: _grouped(x, k.shape[2]))
    k, v, dq_rows = k.unsqueeze(3), v.unsqueeze(3), _grouped(dq, k.shape[2])
    dk, dv = _wide_zeros(k), _wide_zeros(v)
    for tile in _sequence_tiles(rows.q, rule):
        tile_rows = rows.map(lambda x, tile=tile: _fold(tile.rows(x)))
        keys, values = _fold(tile.columns(k)), _fold(tile.columns(v))
        dq_tile, dk_tile, dv_tile = _tile_backward(tile_rows, keys, values, tile.mask, scale)
        tile.rows(dq_rows).add_(_unfold(dq_tile, tile.rows(dq_rows)))
        tile.columns(dk).add_(_unfold(dk_tile, tile.columns(dk)))
        tile.columns(dv).add_(_unfold(dv_tile, tile.columns(dv)))
    return dq, dk.squeeze(3).to(k.dtype), dv.squeeze(3).to(v.dtype)


def _torch_local_forward(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    return _sequence_forward(q, k, v, _Window(window), scale)


def _torch_local_backward(
    do: Tensor, terms: _RowTerms, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, dq: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _sequence_backward(do, terms, q, k, v, _Window(window), scale, dq)


def _torch_compressed_forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, block_size: int, stride: int, scale: float
) -> tuple[Tensor, Tensor]:
    return _sequence_forward(q, k_cmp, v_cmp, _Staircase(block_size, stride), scale)


def _torch_compressed_backward(
    do: Tensor,
    terms: _RowTerms,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    block_size: int,
    stride: int,
    scale: float,
    dq: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _sequence_backward(do, terms, q, k_cmp, v_cmp, _Staircase(block_size, stride), scale, dq)


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
    first: int = 0,
) -> Tensor:
    """Chosen blocks (B, T, K, S), a tile of queries at a time: scores are (M, n), never (T, C) or (T, N)."""
    kv_heads, group = k_cmp.shape[2], q.shape[2] // k_cmp.shape[2]
    k_cmp = k_cmp.where(k_cmp.isfinite(), 0.0)  # a row that sees NaN has it in its lse; the others must not
    q, lse, k_cmp = (_grouped(x, kv_heads) for x in (q, lse, k_cmp))
    chosen = torch.empty(*q.shape[:3], 1, topk_blocks, dtype=torch.int32, device=q.device)
    for tile in _sequence_tiles(q, _Staircase(block_size, stride), first):
        rows, keys, row_lse = _fold(tile.rows(q)), _fold(tile.columns(k_cmp)), _fold(tile.rows(lse))
        if tile.mask.numel() > 0:
            p, tile_lse = _tile_softmax(rows, keys, tile.mask, scale)
            p *= (tile_lse - row_lse.masked_fill(row_lse == -math.inf, math.inf)).exp()[..., None]
        else:
            p = rows.new_zeros(*rows.shape[:2], 0)  # no block is complete yet
        p = p.unflatten(1, (-1, group)).sum(2)  # (b, M·G, n) → (b, M, n): one choice for the group
        candidates = _selection_count(tile.positions.stop, select_block_size)
        importance = _block_importance(p, block_size, stride, select_block_size, candidates)
        query = torch.arange(tile.positions.start, tile.positions.stop, device=q.device)
        highest = _choose_blocks(importance, query, select_block_size, topk_blocks, init_blocks, local_blocks)
        tile.rows(chosen).copy_(_unfold(highest, tile.rows(chosen)))
    return chosen.squeeze(3)


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
    block, nth = _runs(tiles, int(tiles.sum()))  # (n,): of each tile its block, of b·K·N, and its number there
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


def _torch_selective_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, select_block_size: int, scale: float, first: int = 0
) -> tuple[Tensor, Tensor]:
    block_indices = _without_free_slots(block_indices, _selection_count(first + q.shape[1], select_block_size))
    slots, group, dim = block_indices.shape[3], q.shape[2] // k.shape[2], q.shape[3]
    rows, keys, values = (x.reshape(-1, g, dim) for x, g in ((q, group), (k, 1), (v, 1)))  # (B·T·K, g, D)
    o = torch.zeros_like(rows)
    lse = torch.full(rows.shape[:2], -math.inf, dtype=_accumulation_dtype(q), device=q.device)
    partial = lse.new_empty(0, group, dim)
    for chunk in _row_chunks(block_indices, group * dim):
        pairs = len(chunk) * slots
        partial = partial[: pairs + 1] if len(partial) > pairs else lse.new_empty(pairs + 1, group, dim)
        partial_lse = lse.new_full((pairs + 1, group), -math.inf)
        for tiles in _pair_tiles(block_indices, chunk, k.shape[1], select_block_size, group, partial, first):
            k_tile, v_tile = _gather(keys, tiles.key), _gather(values, tiles.key)
            o_tile, lse_tile = _tile_forward(_gather(rows, tiles.row), k_tile, v_tile, tiles.mask, scale)
            partial.index_copy_(0, tiles.pair.flatten(), o_tile.reshape(-1, group, dim))
            partial_lse.index_copy_(0, tiles.pair.flatten(), lse_tile.reshape(-1, group))
        free = (partial_lse[:, 0] == -math.inf).nonzero()[:, 0]
        partial.index_fill_(0, free, 0.0)  # the memory serves every chunk, and may hold anything
        by_row = (x[:-1].unflatten(0, (-1, slots)) for x in (partial, partial_lse))
        o_chunk, lse_chunk = _merge_partials(*by_row)
        o.index_copy_(0, chunk, o_chunk.to(o.dtype))
        lse.index_copy_(0, chunk, lse_chunk)
    return o.view(q.shape), lse.view(q.shape[:3])


def _torch_selective_backward(
    do: Tensor,
    terms: _RowTerms,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    select_block_size: int,
    scale: float,
    dq: Tensor | None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    sorted_pairs: list[Tensor] | None = None,  # there are none
) -> tuple[Tensor, Tensor, Tensor]:
    dq = _wide_zeros(q) if dq is None else dq
    block_indices = _without_free_slots(block_indices, _selection_count(q.shape[1], select_block_size))
    group, dim = q.shape[2] // k.shape[2], q.shape[3]
    rows = _Rows(q, do, *terms).map(lambda x: x.reshape(-1, group, *x.shape[3:]))  # (B·T·K, G, ·)
    keys, values, dq_rows = k.reshape(-1, 1, dim), v.reshape(-1, 1, dim), dq.view(-1, group, dim)
    wide = lambda sum_, x: _wide_zeros(x) if sum_ is None else sum_.to(dq.dtype).reshape(x.shape)  # noqa: E731
    dk, dv = wide(dk, keys), wide(dv, values)
    for chunk in _row_chunks(block_indices, group * dim):
        for tiles in _pair_tiles(block_indices, chunk, k.shape[1], select_block_size, group, dq):
            tile_rows = rows.map(lambda x, index=tiles.row: _gather(x, index))
            # What only fills up a tile has no gradient.
            tile_rows.shift.unflatten(1, (-1, group)).masked_fill_(tiles.spare[..., None], math.inf)
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


def _torch_gated_selective(
    gates: Tensor, o_local: Tensor, o_compressed: Tensor, *selective: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The selective branch, and the gated sum of all three: o, o of the branch, its lse; for the backward, nothing."""
    o, lse = _torch_selective_forward(*selective)
    return _torch_gate(gates, o_local, o_compressed, o), o, lse, []


# Cached keys ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _equal_rows(positions: Tensor) -> Iterator[tuple[slice, int, int]]:
    """Neighbouring rows of positions (B, M) that begin at the same one and hold as many: (rows, first, count)."""
    stop = 0
    spans = zip(positions[:, 0].tolist(), (positions >= 0).sum(1).tolist(), strict=True)
    for (first, count), rows in itertools.groupby(spans):
        start, stop = stop, stop + len(list(rows))
        if count > 0:
            yield slice(start, stop), first, count


def _torch_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_local: Tensor,
    v_local: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    positions: Tensor,
    *,
    local_window: int,
    block_size: int,
    stride: int,
    select_block_size: int,
    topk_blocks: int,
    init_blocks: int,
    local_blocks: int,
    scale: float,
) -> Tensor:
    """The gated sum of the branches for a few queries q (B, M, H, D) over many keys: (B, M, H, D).

    The keys (B, T, K, D) and (B, C, K, D) start at position 0 and may go on behind the last query, with anything that
    is finite. `positions`, (B, M): where each query stands, ascending by 1 from the left; −1 where a row has fewer
    queries, and o is 0.
    """
    o = torch.zeros_like(q)
    choice = (block_size, stride, select_block_size, topk_blocks, init_blocks, local_blocks)
    for rows, first, count in _equal_rows(positions):
        queries, blocks = q[rows, :count], k_cmp[rows]
        o_local, _ = _sequence_forward(queries, k_local[rows], v_local[rows], _Window(local_window), scale, first)
        o_compressed, lse = _sequence_forward(queries, blocks, v_cmp[rows], _Staircase(*choice[:2]), scale, first)
        chosen = _torch_select(queries, blocks, lse, *choice, scale, first)
        o_selective, _ = _torch_selective_forward(queries, k[rows], v[rows], chosen, select_block_size, scale, first)
        o[rows, :count] = _torch_gate(gates[rows, :count], o_local, o_compressed, o_selective)
    return o


def _each_sequence(
    function: Callable[[list[Tensor]], list[Tensor] | Tensor], tensors: list[Tensor], lengths: list[int], *blocks: int
) -> list[Tensor] | Tensor:
    """`function` of each of some packed sequences alone, its results one after another.

    A tensor (1, rows, ...) has a row for each token or for each compressed block, of l and d in `blocks`. Their numbers
    tell which: no sequence has more blocks than tokens, so where there are as many overall, every sequence has as many.
    """
    counts = [_compressed_count(n, *blocks) for n in lengths] if blocks else lengths
    rows = {sum(counts): counts, sum(lengths): lengths}
    sequences = zip(*(x.split(rows[x.shape[1]], dim=1) for x in tensors), strict=True)
    results = [function(list(sequence)) for sequence in sequences]
    if isinstance(results[0], Tensor):
        return torch.cat(results, dim=1)
    return [torch.cat(parts, dim=1) for parts in zip(*results, strict=True)]


_BACKENDS = {
    "torch": _Backend(
        _Branch(_torch_local_forward, _torch_local_backward),
        _Branch(_torch_compressed_forward, _torch_compressed_backward),
        _Branch(_torch_selective_forward, _torch_selective_backward),
        _torch_select,
        lambda *_: _NOTHING_RECENT,
        _torch_gated_selective,
        lambda *_: [],
        _torch_row_terms,
        _torch_gated_row_terms,
        _torch_decode,
    ),
}


def _on(backend: str, cu_seqlens: Tensor | None, lengths: list[int], recent: _Recent = _NOTHING_RECENT) -> _Backend:
    """The backend, for packed sequences and for recent blocks that the local branch does, where there are any.

    PyTorch's is given one sequence at a time, and its selective branch all blocks.
    """
    on = _BACKENDS[backend]
    if recent.blocks:
        apart = lambda function: functools.partial(function, recent=recent)  # noqa: E731
        selective = _Branch(on.selective.forward, apart(on.selective.backward))
        on = on._replace(
            local=_Branch(*map(apart, on.local)), selective=selective, gated_selective=apart(on.gated_selective)
        )
    if lengths:
        packing = _Packing(cu_seqlens, lengths)
        packed = lambda function: functools.partial(function, packing=packing)  # noqa: E731
        local, compressed, selective = (_Branch(*map(packed, branch)) for branch in on[:3])
        branches = {"local": local, "compressed": compressed, "selective": selective}
        on = on._replace(**branches, select=packed(on.select), gated_selective=packed(on.gated_selective))
    return on


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 8  Self-tests: what `python native_sparse_attention.py` runs, wherever this file was copied to
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
        except _Failure as failure:
            result, what = "FAIL", str(failure)
        except Exception as error:
            result, what = "FAIL", f"{type(error).__name__}: {error}"
        results[result] += 1
        print(f"{name:<12}{result:<8}{time.perf_counter() - start:>8.1f}   {what}", flush=True)
    print(f"\n{results['pass']} passed, {results['FAIL']} failed, {results['skip']} skipped")
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
        attention, x = NativeSparseAttention(cfg).double(), torch.randn(2, 130, cfg.dim, dtype=torch.float64)
        y, exact = attention.eval()(x), _reference(attention, x)
        names, weights = zip(*attention.named_parameters(), strict=True)
        upstream = torch.randn_like(y)
        options = {"retain_graph": True, "allow_unused": True}
        ours, theirs = ((o, *torch.autograd.grad(o, weights, upstream, **options)) for o in (y, exact))
        for label, a, b in zip(("output", *names), ours, theirs, strict=True):
            _require((a is None) == (b is None), f"{name}: only one side has a gradient for {label}")
            error = 0.0 if a is None else (a - b).abs().max().item()
            _require(error < 1e-9, f"{name}: {label} differs from the reference by {error:.1e}")
            worst = max(worst, error)
    return f"PyTorch path is the exact reference, all gradients: error {worst:.0e}"


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
    _require(error <= max(limit, 1e-2), f"flash-attn differs by {error:.1e}, PyTorch by {limit / 2:.1e}")
    return f"local branch by flash-attn: error {error:.0e}"


def _selftest_triton() -> str:
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    probe = torch.empty(1, 1, 1, 64, device=device, dtype=dtype)
    obstacle = _triton_obstacle(probe, probe, 1.0)
    if obstacle is not None:
        raise _Skip(obstacle)
    tokens = 1000 if device == "cuda" else 70
    for heads, kv_heads in ((4, 4), (4, 1)):
        shapes = [(tokens, heads), (tokens, kv_heads), (tokens, kv_heads), *[(tokens // 16 - 1, kv_heads)] * 2]
        leaves = [torch.randn(1, *shape, 64, device=device, dtype=dtype) for shape in shapes]  # q, k, v, k_cmp, v_cmp
        chosen = torch.arange(3, device=device, dtype=torch.int32).expand(1, tokens, kv_heads, 3)
        upstream = torch.randn_like(leaves[0])
        results = []
        for precision, backend in ((torch.float64, "torch"), (dtype, "torch"), (dtype, "triton")):
            q, k, v, k_cmp, v_cmp = x = [leaf.to(precision).requires_grad_() for leaf in leaves]
            o = local_attention(q, k, v, 64, backend=backend)
            o = o + selective_attention(q, k, v, chosen, 32, backend=backend)
            o = o + compressed_attention(q, k_cmp, v_cmp, 32, 16, backend=backend)[0]
            results.append((o, *torch.autograd.grad(o, x, upstream.to(precision))))
        for label, exact, plain, kernel in zip(("o", "dq", "dk", "dv", "dk_cmp", "dv_cmp"), *results, strict=True):
            limit, error = (((y - exact).norm() / exact.norm()).item() for y in (plain, kernel))
            worst = f"G = {heads // kv_heads}: {label} is off by {error:.1e}, PyTorch by {limit:.1e}"
            _require(error <= 2 * limit + 1e-6, worst)
    return "each branch within twice PyTorch's error, all gradients"


_SELFTESTS = {
    "smoke": _selftest_smoke,
    "causality": _selftest_causality,
    "dense": _selftest_dense,
    "reference": _selftest_reference,
    "cache": _selftest_cache,
    "learning": _selftest_learning,
    "flash-attn": _selftest_flash,
    "triton": _selftest_triton,
}


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# Part II  Triton kernels
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    def _probe() -> None: ...

    triton.jit(_probe)  # reads this file, of which there may be the bytecode alone
    _INTERPRETED = triton.knobs.runtime.interpret  # TRITON_INTERPRET=1: kernels run on the CPU
except Exception:  # not installed, too old for tensor descriptors, or broken: the PyTorch path serves
    triton = tl = TensorDescriptor = None
    _INTERPRETED = False


# A kernel's docstring is its formula. Letters beyond those of the header: Z = B·K key heads in all, and DP or DIM, the
# head dim D as the matrix unit wants it. Each room below is device helpers, kernels, launchers; the launchers have the
# signatures of section 4, and take packed sequences all at once, as a `packing`. Nothing here waits for the GPU, and no
# gradient is summed by atomics, so that results are the same from run to run.


def _kernel(function: Callable | None = None, **options: Any) -> Callable:
    """triton.jit, where there is a Triton; without one, kernels are functions that nobody calls."""
    if function is None:
        return functools.partial(_kernel, **options)
    return function if triton is None else triton.jit(function, **options)


def _constexpr(value: float) -> Any:
    return value if triton is None else tl.constexpr(value)


_TL_LOG2E = _constexpr(_LOG2E)  # exp(x) = exp2(x·log2 e), and exp2 is the instruction that the GPU has
_TL_LN2 = _constexpr(math.log(2.0))
_TL_FORCED = _constexpr(0x7F800000)  # the bits of infinity

# Launch settings: every tile size, in one place. tests/benchmarks/gpu.py times what they give. ────────────────────────

# (query rows, keys, warps, stages) of each kernel's tile by padded head dim. Head dims 64 and 128 are the best of a
# sweep on an H200 in bf16 (G = 1 and 16; the local ones with recent blocks, G = 4 as well); 256 and float32 are right
# but not tuned. Two programs of 4 warps on a multiprocessor overlap one's softmax with the other's products, which
# mostly beats one program of 8 warps.
_SPAN_TILES = {
    "compressed_forward": {64: (64, 64, 4, 2), 128: (128, 64, 4, 2), 256: (128, 64, 8, 2)},
    "compressed_dq": {64: (64, 64, 4, 2), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
    "compressed_dkv": {64: (64, 64, 4, 3), 128: (64, 128, 8, 3), 256: (32, 64, 8, 2)},
    "local_forward": {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (128, 64, 8, 2)},
    "local_dq": {64: (64, 32, 4, 3), 128: (64, 64, 4, 2), 256: (64, 64, 8, 2)},
    "local_dkv": {64: (32, 64, 4, 3), 128: (32, 64, 4, 4), 256: (32, 64, 8, 2)},
    "float32": {64: (32, 32, 8, 1), 128: (16, 16, 4, 1), 256: (16, 16, 4, 1)},
}
_FAR = 2**30  # a window that sees everything, and still fits 32 bits when a position is added
_MAX_ROWS = 128  # the most rows in a tile; where a value of each row is kept, rows are padded to a multiple of it

# (bytes of a number, padded D up to, one head a group): tiles of the scores. With several heads two tiles share a load
# of the queries, and 128 registers let two programs overlap products with exponentials (64/4 heads, 64k: 6.8 ms with
# the choice, 8.1 without the limit, 7.4 with one tile; 32/8: 5.7, 6.9, 5.9). One head, 16/16, 32k: 1.6; two: 1.85.
_SELECT_TILES = {
    (2, 128, True): {"TILES": 1, "TOKENS": 64, "COLUMNS": 128, "num_warps": 8, "num_stages": 2},
    (2, 128, False): {"TILES": 2, "TOKENS": 64, "COLUMNS": 128, "num_warps": 8, "num_stages": 3, "maxnreg": 128},
    (2, 256, True): {"TILES": 1, "TOKENS": 64, "COLUMNS": 64, "num_warps": 4, "num_stages": 2},
    (2, 256, False): {"TILES": 1, "TOKENS": 64, "COLUMNS": 64, "num_warps": 4, "num_stages": 2},
    (4, 128, True): {"TILES": 1, "TOKENS": 32, "COLUMNS": 32, "num_warps": 8, "num_stages": 1},
    (4, 128, False): {"TILES": 1, "TOKENS": 32, "COLUMNS": 32, "num_warps": 8, "num_stages": 1},
    (4, 256, True): {"TILES": 1, "TOKENS": 16, "COLUMNS": 16, "num_warps": 8, "num_stages": 1},
    (4, 256, False): {"TILES": 1, "TOKENS": 16, "COLUMNS": 16, "num_warps": 8, "num_stages": 1},
}

# (pass, bytes of a number, padded D up to): tiles of rows (query, head) and keys. Each comparison is of the kernel in
# one run on an H200, bf16, ms. Forward, 16/16 heads, D 64, 32k: 0.70 (1 stage 0.73, 3 stages 0.78, 128 rows 1.4); 32/8,
# D 128, 64k: 5.6 (1 stage 6.2, 3 stages 7.0, 128 rows 9.0). Backward, 16/16: 1.65 (3 stages 1.8, 32 rows 1.7); 32/8:
# 10.0 (3 stages 11.2, 64 rows and 2 stages 12.5, with 3 and 8 warps 17.2, with 3 stages 31). What spills in the loop
# loses: two sums of 64 × 128 numbers leave few registers. D above 128 and float32 are right but not tuned.
_SELECTIVE_TILES = {
    ("forward", 2, 64): {"ROWS": 64, "KEYS": 64, "num_warps": 4, "num_stages": 2},
    ("forward", 2, 128): {"ROWS": 64, "KEYS": 64, "num_warps": 4, "num_stages": 2},
    ("forward", 2, 256): {"ROWS": 64, "KEYS": 64, "num_warps": 8, "num_stages": 1},
    ("forward", 4, 64): {"ROWS": 32, "KEYS": 32, "num_warps": 8, "num_stages": 1},
    ("forward", 4, 256): {"ROWS": 16, "KEYS": 16, "num_warps": 8, "num_stages": 1},
    ("backward", 2, 64): {"ROWS": 64, "KEYS": 64, "num_warps": 4, "num_stages": 2},
    ("backward", 2, 128): {"ROWS": 32, "KEYS": 64, "num_warps": 4, "num_stages": 4},
    ("backward", 2, 256): {"ROWS": 16, "KEYS": 32, "num_warps": 8, "num_stages": 1},
    ("backward", 4, 64): {"ROWS": 32, "KEYS": 32, "num_warps": 8, "num_stages": 1},
    ("backward", 4, 256): {"ROWS": 16, "KEYS": 16, "num_warps": 8, "num_stages": 1},
}

# Block scores of one chunk of queries take at most this much memory.
_SCORE_BYTES = 256 << 20

# Pairs in a run: the fewer, the more programs; longer where the table of counts would pass its limit.
_RUN = 1024
_COUNT_BYTES = 64 << 20
_PLACE = {"TILE": 32, "num_warps": 1}
_CUT = 2048  # blocks that are cut into tiles at a time

# Heads in a group from which on the query is the outer loop, in the forward. In the backward their rows lie side by
# side, and one stage less will do. 64/4 heads, D 128, 64k: 18.6 ms (4 stages 20.0).
_QUERY_OUTER_GROUP = 16
_LARGE_GROUP_STAGES = 3
# A warp for every 16 heads. 64/4 heads, D 128, 64k: 13.6 ms (2 warps 14.0, 3 stages 14.6, 4 warps and 3 stages 15.2).
_QUERY_TILES = {"KEYS": 64, "STAGES": 2}

# Partial results of one chunk of queries take at most this much memory.
_PARTIAL_BYTES = 2 << 30
_FORWARD_SPAN = 512  # rows that a program takes while a block's keys stay

# Rows that one program sums into dk and dv, by bytes of a number: long sums cost float32 its last digits.
_SPAN = {2: 4096, 4: 512}

# Decoding, (kernel, bytes of a number, padded D up to): keys of a tile, and how many programs a multiprocessor gets.
# 16-bit numbers, D up to 128: the best of `tests/benchmarks/gpu.py decode --sweep` on an H200. The rest is not tuned.
_DECODE_TILES = {
    ("compressed", 2, 128): {"PROGRAMS": 1, "KEYS": 128, "STAGES": 3, "num_warps": 8},
    ("compressed", 2, 256): {"PROGRAMS": 2, "KEYS": 64, "STAGES": 2, "num_warps": 8},
    ("compressed", 4, 128): {"PROGRAMS": 2, "KEYS": 16, "STAGES": 1, "num_warps": 8},
    ("compressed", 4, 256): {"PROGRAMS": 2, "KEYS": 16, "STAGES": 1, "num_warps": 8},
    ("local", 2, 128): {"PROGRAMS": 1, "KEYS": 32, "STAGES": 3, "num_warps": 4},
    ("local", 2, 256): {"PROGRAMS": 2, "KEYS": 64, "STAGES": 2, "num_warps": 8},
    ("local", 4, 128): {"PROGRAMS": 2, "KEYS": 16, "STAGES": 1, "num_warps": 8},
    ("local", 4, 256): {"PROGRAMS": 2, "KEYS": 16, "STAGES": 1, "num_warps": 8},
    ("selected", 2, 128): {"PROGRAMS": 1, "KEYS": 64, "STAGES": 3, "num_warps": 4},
    ("selected", 2, 256): {"PROGRAMS": 2, "KEYS": 64, "STAGES": 2, "num_warps": 8},
    ("selected", 4, 128): {"PROGRAMS": 2, "KEYS": 16, "STAGES": 1, "num_warps": 8},
    ("selected", 4, 256): {"PROGRAMS": 2, "KEYS": 16, "STAGES": 1, "num_warps": 8},
}
_DECODE_MAX_KEYS = 128  # the most keys in a tile
_DECODE_MAX_PARTS = 32  # the most parts of a row in each branch
_DECODE_HEADS = {2: 64, 4: 16}  # the most heads of a group in a tile, by bytes of a number
_DECODE_BYTES = 256 << 20  # partial results of one chunk of new tokens take at most this much memory


def _cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own takes microseconds, some fifty times a step; so does its next power of two."""
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The least one from n on."""
    return 1 << (n - 1).bit_length()


def _unit_stride(x: Tensor) -> Tensor:
    """x itself where its last dimension is contiguous, which is all that the kernels ask for."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _padded(D: int) -> int:
    """The head dim as the matrix unit wants it: a power of two, 16 at least."""
    return max(_power_of_2(D), 16)


def _precision() -> str:
    """float32 products are exact unless torch's own switch allows tf32; half types do not care."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _chunk_tokens(bytes_per_token: int, T: int) -> int:
    """How many queries may have their partial results in memory at a time: a multiple of 64, or all."""
    return min(max(_PARTIAL_BYTES // bytes_per_token // 64, 1) * 64, T)


def _merge_rows(D: int) -> int:
    """Rows that a program of a merge takes: 16 numbers a thread."""
    return max(2048 // _padded(D), 1)


def _unroll(slots: int) -> int:
    """How many slots to read at a time, so that none are left over."""
    return max(n for n in range(1, 8) if slots % n == 0)


def _key_tile(keys: int, select_block_size: int) -> int:
    """A tile of keys, shorter where blocks are."""
    return min(keys, max(_power_of_2(select_block_size), 16))


def _selective_tiles(pass_: str, D: int, select_block_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes for a head dim and type."""
    key = (pass_, dtype.itemsize)
    entry = min(width for *name, width in _SELECTIVE_TILES if tuple(name) == key and width >= _padded(D))
    tiles = dict(_SELECTIVE_TILES[key + (entry,)])
    tiles["KEYS"] = _key_tile(tiles["KEYS"], select_block_size)
    return tiles


# Packed sequences ─────────────────────────────────────────────────────────────────────────────────────────────────────
#
# A kernel knows them by int32 tables, which are None for a batch of equal rows. They are made on the device, by the
# rules of section 3, from what is there; the host knows all sizes and waits for nothing.


def _edges(counts: Tensor) -> Tensor:
    """Where each of some runs of so many rows begins, and where the last one ends."""
    return F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


class _Packing:
    """Sequences that lie one after another in a batch of 1."""

    def __init__(self, cu_seqlens: Tensor, lengths: list[int]) -> None:
        self.edges, self.on_host = cu_seqlens.contiguous(), lengths
        self.lengths = self.edges.diff()
        self.known: dict[_Staircase, tuple[Tensor, Tensor]] = {}

    @functools.cached_property
    def tokens(self) -> tuple[Tensor, Tensor]:
        """The sequence of every token, and the token's position there."""
        return _runs(self.lengths, sum(self.on_host))

    def compressed(self, rule: _Staircase) -> tuple[Tensor, Tensor]:
        """How many compressed keys each sequence has, and their edges."""
        if rule not in self.known:
            counts = rule.span(self.lengths - 1)[1]  # a sequence's last query sees its last key
            self.known[rule] = counts, _edges(counts)
        return self.known[rule]


# Choice of blocks ─────────────────────────────────────────────────────────────────────────────────────────────────────


@_kernel
def _load_tile(base, rows, stride, row_mask, D: tl.constexpr, DP: tl.constexpr):
    """base[rows, :D] as a (len(rows), DP) tile, zero outside; DP is D rounded up to a power of two."""
    d = tl.arange(0, DP)
    pointers = base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(pointers, mask=row_mask[:, None] & (d < D)[None, :], other=0.0)


@_kernel
def _store_tile(base, tile, rows, stride, row_mask, D: tl.constexpr, DP: tl.constexpr):
    """base[rows, :D] = tile."""
    d = tl.arange(0, DP)
    pointers = base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=row_mask[:, None] & (d < D)[None, :])


@_kernel
def _load_pair_rows(
    base, pairs, rows, row_mask, t0, stride_t, stride_h,
    G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """The rows (pair, head) of a (T, G, D) tensor: base[t0 + pair // S, row % G]."""
    d = tl.arange(0, DP)
    offsets = (t0 + pairs // S).to(tl.int64) * stride_t + (rows % G).to(tl.int64) * stride_h
    return tl.load(base + offsets[:, None] + d[None, :], mask=row_mask[:, None] & (d < D)[None, :], other=0.0)


@_kernel
def _fold_importance(
    p, part_first, m: tl.constexpr, r: tl.constexpr,
    TOKENS: tl.constexpr, BLOCKS: tl.constexpr, PART: tl.constexpr, SPILL: tl.constexpr,
):  # fmt: skip
    """score[j] = sum_i overlap(i, j) p[i], i = j r + part_first ...: a block's own share, and what its left lends it.

    In units of the stride, compressed block i covers [i, i + m) and selection block j covers [j r, (j + 1) r). Beside
    the score, what the tile lends to the first SPILL blocks of the next one.
    """
    p = tl.reshape(p, [TOKENS, BLOCKS, PART])
    i = part_first + tl.arange(0, PART)
    jj = tl.arange(0, BLOCKS)
    own = tl.minimum(i + m, r) - i
    score = tl.sum(p * own.to(tl.float32)[None, None, :], axis=2)
    beyond = tl.zeros([TOKENS, BLOCKS], tl.float32)
    for right in tl.static_range(1, SPILL + 1):
        share = tl.maximum(tl.minimum(i + m, (right + 1) * r) - right * r, 0)
        lent = tl.sum(p * share.to(tl.float32)[None, None, :], axis=2)
        source = tl.broadcast_to(tl.maximum(jj - right, 0)[None, :], [TOKENS, BLOCKS])
        score += tl.where((jj >= right)[None, :], tl.gather(lent, source, axis=1), 0.0)
        source = tl.broadcast_to(tl.minimum(jj + (BLOCKS - right), BLOCKS - 1)[None, :], [TOKENS, BLOCKS])
        beyond += tl.where((jj < right)[None, :], tl.gather(lent, source, axis=1), 0.0)
    return score, beyond


@_kernel
def _block_scores_kernel(
    q, k_cmp, lse, scores, tiles,
    C, n_tokens, n_blocks, t0, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_lb, stride_lt, stride_lh,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, SELECT: tl.constexpr,
    TOKENS: tl.constexpr, BLOCKS: tl.constexpr, PART: tl.constexpr, TILES: tl.constexpr, SPILL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """scores[z, t, j] = sum_i overlap(i, j) sum_g exp(scale q[t, g] . k_cmp[i] - lse[t, g]), over the visible i.

    A tile holds BLOCKS selection blocks, the first SPILL of them only to lend to their right; TILES tiles in a row. A
    tile of queries lies in one sequence; where sequences are packed, `tiles` tells in which, and t and i count there.
    """
    m: tl.constexpr = BLOCK // STRIDE
    r: tl.constexpr = SELECT // STRIDE
    z = tl.program_id(2)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    t = t0 + token
    j_first = tl.program_id(1) * TILES * (BLOCKS - SPILL) - SPILL
    last = t0 + tl.minimum((tl.program_id(0) + 1) * TOKENS, n_tokens) - 1
    if tiles is not None:
        tile = tiles + 5 * tl.program_id(0)
        position, begin, length = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
        t, last = position + tl.arange(0, TOKENS), tl.minimum(position + TOKENS, length) - 1
    if (j_first + SPILL) * SELECT > last:  # every block of the tile begins after every query of the tile
        return

    in_chunk = token < n_tokens
    q_base = q + (z // K).to(tl.int64) * stride_qb + (z % K).to(tl.int64) * G * stride_qh
    k_base = k_cmp + (z // K).to(tl.int64) * stride_kb + (z % K).to(tl.int64) * stride_kh
    lse_base = lse + (z // K).to(tl.int64) * stride_lb + (z % K).to(tl.int64) * G * stride_lh
    if tiles is not None:
        in_chunk, C = t < length, tl.load(tile + 4)
        q_base += begin.to(tl.int64) * stride_qt
        k_base += tl.load(tile + 3).to(tl.int64) * stride_kt
        lse_base += begin.to(tl.int64) * stride_lt
    column = tl.arange(0, BLOCKS * PART)
    j_next = j_first + BLOCKS - SPILL  # a second tile, for the same queries, where TILES is 2
    score = tl.zeros([TOKENS, BLOCKS], tl.float32)
    score_next = tl.zeros([TOKENS, BLOCKS], tl.float32)
    for part_first in tl.static_range(0, r, PART):
        inside = part_first + column % PART
        i = (j_first + column // PART) * r + inside
        exists = (inside < r) & (i >= 0) & (i < C)
        keys = tl.trans(_load_tile(k_base, i, stride_kt, exists, D, DP))  # here, so that it stays in shared memory
        p = tl.zeros([TOKENS, BLOCKS * PART], tl.float32)
        if TILES == 2:
            i_next = (j_next + column // PART) * r + inside
            exists_next = (inside < r) & (i_next < C)
            keys_next = tl.trans(_load_tile(k_base, i_next, stride_kt, exists_next, D, DP))
            p_next = tl.zeros([TOKENS, BLOCKS * PART], tl.float32)
        # probabilities, summed over the group; masked once, after the sum
        lse_row = lse_base + t.to(tl.int64) * stride_lt
        lse_next = tl.load(lse_row, mask=in_chunk, other=0.0)
        for g in range(G):
            queries = _load_tile(q_base + g * stride_qh, t, stride_qt, in_chunk, D, DP)
            lse_g = lse_next * _TL_LOG2E
            lse_next = tl.load(lse_row + (g + 1) * stride_lh, mask=in_chunk & (g + 1 < G), other=0.0)
            s = tl.dot(queries, keys, input_precision=PRECISION)
            p += tl.exp2(s * (scale * _TL_LOG2E) - lse_g[:, None])
            if TILES == 2:
                s_next = tl.dot(queries, keys_next, input_precision=PRECISION)
                p_next += tl.exp2(s_next * (scale * _TL_LOG2E) - lse_g[:, None])
        visible = ((i >= 0) & (inside < r))[None, :] & ((i * STRIDE + (BLOCK - 1))[None, :] <= t[:, None])
        score += _fold_importance(tl.where(visible, p, 0.0), part_first, m, r, TOKENS, BLOCKS, PART, SPILL)[0]
        if TILES == 2:
            visible = (inside < r)[None, :] & ((i_next * STRIDE + (BLOCK - 1))[None, :] <= t[:, None])
            p_next = tl.where(visible, p_next, 0.0)
            score_next += _fold_importance(p_next, part_first, m, r, TOKENS, BLOCKS, PART, SPILL)[0]

    jj = tl.arange(0, BLOCKS)
    row = scores + (z.to(tl.int64) * n_tokens + token) * n_blocks
    stored = in_chunk[:, None] & ((jj >= SPILL) & (j_first + jj < n_blocks))[None, :]
    tl.store(row[:, None] + (j_first + jj)[None, :], score, mask=stored)
    if TILES == 2:
        stored = in_chunk[:, None] & ((jj >= SPILL) & (j_next + jj < n_blocks))[None, :]
        tl.store(row[:, None] + (j_next + jj)[None, :], score_next, mask=stored)


@_kernel
def _store_highest(
    score, own, exists, out_row,
    S: tl.constexpr, SP: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, ROWS: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """out_row[:] = the S highest of score[: own + 1], forced ones first, ties to the lower index; ROWS rows at once.

    Scores are not negative, so their bits order as integers: the S-th highest is found by bisection, by counting, and
    a round that counts exactly S ends it. The running count of what is taken is the slot: slots ascend without a sort.
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
    group_top = tl.max(tl.reshape(key, [ROWS, NP // SP, SP]), axis=1)
    threshold = tl.maximum(tl.min(group_top, axis=1), 0)
    n_forced = tl.sum(forced.to(tl.int32), axis=1)
    threshold = tl.where(n_forced >= wanted, _TL_FORCED, tl.minimum(threshold, over - 1))
    over = tl.where(n_forced >= wanted, _TL_FORCED + 1, over)
    while tl.max(over - threshold, axis=0) > 1:
        trial = threshold + (over - threshold) // 2
        reached = tl.sum((key >= trial[:, None]).to(tl.int32), axis=1)
        threshold = tl.where(reached >= wanted, trial, threshold)
        over = tl.where(reached > wanted, over, tl.where(reached == wanted, trial + 1, trial))

    # ties at the threshold: those before `limit` are taken, so that `wanted` are taken in all
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
    chosen = (key > threshold[:, None]) | ((key == threshold[:, None]) & (j < limit[:, None]))
    # the running count in two steps, over quads and within them, as a lane holds four neighbours
    taken = tl.reshape((chosen & candidate).to(tl.int32), [ROWS, NP // QUAD, QUAD])
    quad = tl.sum(taken, axis=2)
    slot = (tl.cumsum(quad, axis=1) - quad)[:, :, None] + tl.cumsum(taken, axis=2) - 1
    slot = tl.reshape(slot, [ROWS, NP])
    tl.store(out_row[:, None] + slot, tl.broadcast_to(j, [ROWS, NP]), mask=chosen & candidate)
    free = tl.arange(0, SP)[None, :]
    empty = exists[:, None] & (free >= wanted[:, None]) & (free < S)
    tl.store(out_row[:, None] + free, tl.full([ROWS, SP], -1, tl.int32), mask=empty)


@_kernel
def _choose_kernel(
    scores, chosen_blocks, tiles, n_tokens, n_blocks, t0, stride_ob, stride_ot, stride_ok,
    K: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, SELECT: tl.constexpr, TOKENS: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, ROWS: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """chosen_blocks[t] = the S highest of scores[t, : t // SELECT + 1]."""
    z = tl.program_id(1)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_chunk = token < n_tokens
    j = tl.arange(0, NP)[None, :]
    row = (z.to(tl.int64) * n_tokens + token) * n_blocks
    score = tl.load(scores + row[:, None] + j, mask=in_chunk[:, None] & (j < n_blocks), other=0.0)  # wide loads
    out = chosen_blocks + (z // K).to(tl.int64) * stride_ob + (z % K) * stride_ok
    t = t0 + token
    position = t
    if tiles is not None:
        tile = tiles + 5 * (token // TOKENS)
        position = tl.load(tile, mask=in_chunk, other=0) + token % TOKENS
        t = tl.load(tile + 1, mask=in_chunk, other=0) + position
        in_chunk = in_chunk & (position < tl.load(tile + 2, mask=in_chunk, other=0))
    out_row = out + t.to(tl.int64) * stride_ot
    _store_highest(score, position // SELECT, in_chunk, out_row, S, SP, INIT, LOCAL, ROWS, NP)


def _spill(block_size: int, stride: int, select_block_size: int) -> tuple[int, int]:
    """Compressed blocks that start in a selection block, and how many selection blocks the last of them lends to."""
    ratio = select_block_size // stride
    return ratio, (ratio + block_size // stride - 2) // ratio


def _select_obstacle(block_size: int, select_block_size: int) -> str | None:
    """Why the choice has no kernel for such blocks; None if it has."""
    return "block_size is more than 32 times select_block_size" if block_size > 32 * select_block_size else None


def _select_tiles(D: int, G: int, ratio: int, spill: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes of the scores: TOKENS queries by BLOCKS selection blocks of PART compressed blocks at a time."""
    part = min(_power_of_2(ratio), 32)
    size = dict(_SELECT_TILES[dtype.itemsize, 128 if _padded(D) <= 128 else 256, G == 1])
    blocks = max(size.pop("COLUMNS") // part, _power_of_2(2 * spill), 2)
    return {**size, "BLOCKS": blocks, "PART": part}


def _query_tiles(packing: _Packing, tokens: int, block_size: int, stride: int) -> Tensor:
    """Tiles of at most so many queries, each of one sequence: int32 (n, 5).

    The position of the first query; the sequence's first token, its length, its first compressed key, their number.
    """
    keys, edges = packing.compressed(_Staircase(block_size, stride))
    sequences = torch.stack([packing.edges[:-1], packing.lengths, edges[:-1], keys], 1)
    tiles = sum(_cdiv(length, tokens) for length in packing.on_host)
    sequence, tile = _runs((packing.lengths + (tokens - 1)) // tokens, tiles)
    return torch.cat([tile[:, None] * tokens, sequences[sequence]], 1)


def _triton_select(
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
    packing: _Packing | None = None,
) -> Tensor:
    """The S blocks of every query and key head, int32 (B, T, K, S): ascending, -1 in the free slots."""
    B, T, H, D = q.shape
    C, K = k_cmp.shape[1:3]
    G, S = H // K, topk_blocks
    q, k_cmp = _unit_stride(q), _unit_stride(k_cmp)
    ratio, spill = _spill(block_size, stride, select_block_size)
    sizes = _select_tiles(D, G, ratio, spill, q.dtype)
    chosen = torch.empty(B, T, K, S, dtype=torch.int32, device=q.device)
    tiles, rows, longest = None, T, T
    if packing is not None:
        tiles, longest = _query_tiles(packing, sizes["TOKENS"], block_size, stride), max(packing.on_host)
        rows = len(tiles) * sizes["TOKENS"]  # of scores; those that fill up a sequence's last tile belong to no query
    row_bytes = 4 * B * K * _selection_count(longest, select_block_size)
    chunk = min(_cdiv(max(_SCORE_BYTES // row_bytes, 1), 128) * 128, rows)
    scores = torch.empty(chunk * row_bytes // 4, dtype=torch.float32, device=q.device)
    for t0 in range(0, rows, chunk):
        n_tokens = min(chunk, rows - t0)
        n_blocks = _selection_count(min(t0 + n_tokens, longest), select_block_size)  # later ones are no candidates yet
        of_chunk = None if tiles is None else tiles[t0 // sizes["TOKENS"] :]
        grid = (
            _cdiv(n_tokens, sizes["TOKENS"]),
            _cdiv(n_blocks, sizes["TILES"] * (sizes["BLOCKS"] - spill)),
            B * K,
        )
        _block_scores_kernel[grid](
            q, k_cmp, lse, scores, of_chunk, C, n_tokens, n_blocks, t0, scale,
            *q.stride()[:3], *k_cmp.stride()[:3], *lse.stride(),
            K=K, G=G, D=D, DP=_padded(D), STRIDE=stride, BLOCK=block_size, SELECT=select_block_size,
            SPILL=spill, PRECISION=_precision(), **sizes,
        )  # fmt: skip
        width = max(_power_of_2(n_blocks), _power_of_2(S))
        rows_each = max(1, 512 // width)
        _choose_kernel[(_cdiv(n_tokens, rows_each), B * K)](
            scores, chosen, of_chunk, n_tokens, n_blocks, t0, *chosen.stride()[:3],
            K=K, S=S, SP=_power_of_2(S), SELECT=select_block_size, TOKENS=sizes["TOKENS"],
            INIT=init_blocks, LOCAL=local_blocks, ROWS=rows_each, NP=width,
            num_warps=min(max(width // 1024, 1), 32),
        )  # fmt: skip
    return chosen


# What a backward needs of each query row ──────────────────────────────────────────────────────────────────────────────
#
# Shift, in powers of two, and delta as in section 4, for row n of key head z: token n // Gp, head n % Gp of the group,
# where Gp is G rounded up to a power of two. Rows that do not exist have a shift of +inf, so that their p is 0.


def _group_pad(G: int) -> int:
    """Gp."""
    return _power_of_2(G)


@_kernel
def _row_terms_kernel(
    do, dlse, gates, o_0, o_1, o_2, lse_0, lse_1, lse_2, dgates, shift, delta, T, rows_pad,
    stride_db, stride_dt, stride_dh, stride_gb, stride_gt, stride_gh, stride_gc,
    K: tl.constexpr, G: tl.constexpr, GROUP_PAD: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, BRANCHES: tl.constexpr,
):  # fmt: skip
    """Of each branch c: dgates[c] = do . o_c, delta[c] = do . o_c - dlse, shift[c] = (lse_c - log gates[c]) log2(e).

    One branch stands alone, ungated, with the gradient of its lse; three are under their gates, which have gradients.
    """
    z = tl.program_id(1)
    b, h = (z // K).to(tl.int64), (z % K) * G
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t, g = (n // GROUP_PAD).to(tl.int64), n % GROUP_PAD
    exists = (t < T) & (g < G)
    row = (b * T + t) * (K * G) + h + g  # of the contiguous (B, T, H)
    d = tl.arange(0, DP)
    mask = exists[:, None] & (d < D)[None, :]
    do_row = b * stride_db + t * stride_dt + (h + g).to(tl.int64) * stride_dh
    d_out = tl.load(do + do_row[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    for c in tl.static_range(BRANCHES):
        o = o_0 if c == 0 else (o_1 if c == 1 else o_2)
        lse = lse_0 if c == 0 else (lse_1 if c == 1 else lse_2)
        term = tl.sum(d_out * tl.load(o + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32), axis=1)
        lse_row = tl.load(lse + row, mask=exists, other=float("-inf"))
        log_gate = tl.zeros([ROWS], tl.float32)
        if BRANCHES > 1:
            gate = b * stride_gb + t * stride_gt + (h + g).to(tl.int64) * stride_gh + c * stride_gc
            tl.store(dgates + row * BRANCHES + c, term.to(dgates.dtype.element_ty), mask=exists)
            log_gate = tl.log2(tl.load(gates + gate, mask=exists, other=0.0).to(tl.float32))
        else:
            term -= tl.load(dlse + row, mask=exists, other=0.0)
        out = (c * tl.num_programs(1) + z).to(tl.int64) * rows_pad + n
        nothing = (lse_row == float("-inf")) | (log_gate == float("-inf"))
        tl.store(shift + out, tl.where(nothing, float("inf"), lse_row * _TL_LOG2E - log_gate))
        tl.store(delta + out, term)


def _launch_row_terms(
    do: Tensor, dlse: Tensor, gates: Tensor, outputs: list[Tensor], lses: list[Tensor], dgates: Tensor, kv_heads: int
) -> list[_RowTerms]:
    """The terms of one branch or of three; what a launch has no use for may be any tensor."""
    B, T, H, D = do.shape
    G, branches = H // kv_heads, len(outputs)
    rows_pad = _cdiv(T * _group_pad(G), _MAX_ROWS) * _MAX_ROWS
    shift, delta = torch.empty(2, branches, B, kv_heads, rows_pad, dtype=torch.float32, device=do.device)
    do, outputs, lses = _unit_stride(do), [x.contiguous() for x in outputs], [x.contiguous() for x in lses]
    rows = _merge_rows(D)
    _row_terms_kernel[(_cdiv(rows_pad, rows), B * kv_heads)](
        do, dlse.contiguous(), gates, *(outputs * 3)[:3], *(lses * 3)[:3], dgates, shift, delta, T, rows_pad,
        *do.stride()[:3], *gates.stride(), K=kv_heads, G=G, GROUP_PAD=_group_pad(G), D=D, DP=_padded(D), ROWS=rows,
        BRANCHES=branches,
    )  # fmt: skip
    return [_RowTerms(*terms) for terms in zip(shift, delta, strict=True)]


def _triton_row_terms(do: Tensor, dlse: Tensor, o: Tensor, lse: Tensor, kv_heads: int) -> _RowTerms:
    return _launch_row_terms(do, dlse, do, [o], [lse], dlse, kv_heads)[0]


def _triton_gated_row_terms(
    do: Tensor, gates: Tensor, outputs: list[Tensor], lses: list[Tensor], kv_heads: int
) -> tuple[Tensor, list[_RowTerms]]:
    dgates = torch.empty(gates.shape, dtype=gates.dtype, device=gates.device)
    return dgates, _launch_row_terms(do, lses[0], gates, outputs, lses, dgates, kv_heads)


# Local and compressed: spans of keys ──────────────────────────────────────────────────────────────────────────────────
#
# In both branches a query sees one contiguous span of keys, so one algorithm serves them. Key i ends at token
# i·d + l − 1 and query t sees the keys that have ended, first(t) ≤ i < end(t):
#
#     compressed   first(t) = 0                    end(t) = (t + 1 − l)//d + 1, at least 0
#     local        first(t) = max(0, t + 1 − W)    end(t) = t + 1, which is the rule above with l = d = 1
#
# A tile of query rows packs tokens × G heads, so that the heads of a group share every key that is loaded: row n of key
# head k is token n // Gp, head k·G + n % Gp, where Gp is G rounded up to a power of two.
#
# Each query chooses its own block and the local_blocks − 1 before it, whatever their scores: its recent blocks. Where
# the window holds them (and both branches have the same keys), the local branch does them for the selective one: it
# reads these keys anyway, for a whole tile of queries, and the products q·k and do·v are the same.
#
#     recent(t) = (t//l' − local_blocks + 1)·l', at least 0, is the first of their keys; without any it is end(t)
#
# The forward takes the recent keys first and writes their o and lse, a part that the selective branch merges. The
# backward adds what both branches give: ds = p_local·(do·v − delta_local) + p_selective·(do·v − delta_selective).
#
# Packed sequences bring tables in place of the arithmetic: `spans` has first(t), recent(t) and end(t) of every query,
# `seen` the first query that sees a key, one past the last to which it is recent, and one past the last that sees it.
# All ascend from sequence to sequence, so a tile may straddle them.


@_kernel
def _span_first(t, WINDOW: tl.constexpr):
    """first(t): the first key that query t sees."""
    first = t * 0
    if WINDOW > 0:
        first = tl.maximum(t + 1 - WINDOW, 0)
    return first


@_kernel
def _span_end(t, BLOCK_SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """end(t): one past the last key that query t sees."""
    return tl.maximum(t + 1 - BLOCK_SIZE + STRIDE, 0) // STRIDE


@_kernel
def _bounds(table, i, exists):
    """(first, recent, end) of `spans` or `seen`, all 0 for what does not exist."""
    first = tl.load(table + 3 * i, mask=exists, other=0)
    recent = tl.load(table + 3 * i + 1, mask=exists, other=0)
    end = tl.load(table + 3 * i + 2, mask=exists, other=0)
    return first, recent, end


@_kernel
def _sees(
    t, spans, exists, BLOCK_SIZE: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    SELECT: tl.constexpr, RECENT: tl.constexpr,
):  # fmt: skip
    """(first, recent, end): query t sees the keys [first, end), and from `recent` on they are in its recent blocks."""
    if spans is not None:
        first, recent, end = _bounds(spans, t, exists)
    else:
        first, end = _span_first(t, WINDOW), _span_end(t, BLOCK_SIZE, STRIDE)
        recent = end
        if RECENT > 0:
            recent = tl.maximum(t // SELECT - (RECENT - 1), 0) * SELECT
    return first, recent, end


@_kernel
def _seen_by(
    key, T, seen, exists, BLOCK_SIZE: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    SELECT: tl.constexpr, RECENT: tl.constexpr,
):  # fmt: skip
    """(first, recent, end): the queries [first, end) see the key, and up to `recent` it is in their recent blocks."""
    if seen is not None:
        first, recent, end = _bounds(seen, key, exists)
    else:
        first = key * STRIDE + (BLOCK_SIZE - 1)
        recent, end = first, first * 0 + T
        if RECENT > 0:
            recent = (key // SELECT + RECENT) * SELECT
        if WINDOW > 0:
            end = tl.minimum(key + WINDOW, T)
    return first, recent, end


@_kernel
def _key_tiles(
    t_low, t_high, spans, KEYS: tl.constexpr, BLOCK_SIZE: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    SELECT: tl.constexpr, RECENT: tl.constexpr,
):  # fmt: skip
    """Tiles of keys that the queries t_low..t_high see: (first key, tiles before the full ones, full ones, the first
    that has recent keys, one past the last that has others, all). Of a full one all see all keys, and none is recent.
    """
    if spans is not None:
        t_low = tl.minimum(t_low, t_high)  # the last tile may begin behind the last query, of which there is no span
    first, recent, _ = _sees(t_low, spans, True, BLOCK_SIZE, STRIDE, WINDOW, SELECT, RECENT)
    first_seen_by_all, recent_of_some, end = _sees(t_high, spans, True, BLOCK_SIZE, STRIDE, WINDOW, SELECT, RECENT)
    if RECENT > 0:
        first = first // KEYS * KEYS  # so that tiles end where blocks do
    before = tl.cdiv(first_seen_by_all - first, KEYS)  # some have moved past the tile's first keys
    recent_tile, others = (recent - first) // KEYS, tl.cdiv(recent_of_some - first, KEYS)
    full = tl.maximum(recent_tile - before, 0)
    return first, before, full, recent_tile, others, tl.cdiv(end - first, KEYS)


@_kernel
def _row_tiles(
    key_low, key_high, T, C, seen, ROWS: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    STRIDE: tl.constexpr, WINDOW: tl.constexpr, SELECT: tl.constexpr, RECENT: tl.constexpr,
):  # fmt: skip
    """Tiles of query rows that see any of the keys key_low..key_high: (first, first full, end of full, end).

    Of a full one all rows see all keys, and have none of them in their recent blocks.
    """
    if seen is not None:
        key_high = tl.minimum(key_high, C - 1)
    t_first, _, t_full_end = _seen_by(key_low, T, seen, True, BLOCK_SIZE, STRIDE, WINDOW, SELECT, RECENT)
    _, t_full, t_end = _seen_by(key_high, T, seen, True, BLOCK_SIZE, STRIDE, WINDOW, SELECT, RECENT)
    first, end = tl.minimum(t_first, T) * GROUP_PAD // ROWS, tl.cdiv(t_end * GROUP_PAD, ROWS)
    full = tl.minimum(tl.cdiv(tl.minimum(t_full, T) * GROUP_PAD, ROWS), end)
    full_end = tl.maximum(t_full_end * GROUP_PAD // ROWS, full)
    return first, full, full_end, end


@_kernel
def _rows_of(tile, T, ROWS: tl.constexpr, GROUP: tl.constexpr, GROUP_PAD: tl.constexpr):
    """The rows of a query tile: their tokens, their heads within the group, and which of them exist."""
    n = tile * ROWS + tl.arange(0, ROWS)
    t, g = n // GROUP_PAD, n % GROUP_PAD
    return t, g, (t < T) & (g < GROUP)


@_kernel
def _row_offsets(strides, b, head, t, exists, D, DIM: tl.constexpr):
    """Where (ROWS, DIM) query rows of a (B, T, H, D) tensor lie, and which of them exist."""
    column = tl.arange(0, DIM)
    row = b.to(tl.int64) * strides[0] + t.to(tl.int64) * strides[1] + head.to(tl.int64) * strides[2]
    return row[:, None] + column[None, :], exists[:, None] & (column < D)[None, :]


@_kernel
def _load_resident_rows(x_ptr, strides, b, head, t, exists, D, DIM: tl.constexpr):
    """(ROWS, DIM) query rows of a (B, T, H, D) tensor that stay for the whole program.

    By plain pointers, because then the tile is a matrix operand in shared memory. Loaded through a descriptor it would
    be one in registers, and ptxas (13.0) has been seen to overwrite such registers inside the loop.
    """
    offsets, mask = _row_offsets(strides, b, head, t, exists, D, DIM)
    return tl.load(x_ptr + offsets, mask=mask, other=0.0)


@_kernel
def _store_rows(x_ptr, strides, x, b, head, t, exists, D, DIM: tl.constexpr):
    """Write (ROWS, DIM) query rows into a (B, T, H, D) tensor; those that do not exist are dropped."""
    offsets, mask = _row_offsets(strides, b, head, t, exists, D, DIM)
    tl.store(x_ptr + offsets, x.to(x_ptr.dtype.element_ty), mask=mask)


@_kernel
def _load_rows(desc, b, k, tile, ROWS: tl.constexpr, GROUP_PAD: tl.constexpr, DIM: tl.constexpr):
    """(ROWS, DIM) query rows of a (B, K, T, G, D) view, inside a loop; what does not exist is zero."""
    n = tile * ROWS
    return desc.load([b, k, n // GROUP_PAD, n % GROUP_PAD, 0]).reshape(ROWS, DIM)


@_kernel
def _load_keys(desc, b, k, start, KEYS: tl.constexpr, DIM: tl.constexpr):
    """(KEYS, DIM) keys or values of a (B, K, C, D) view; those that do not exist are zero."""
    return desc.load([b, k, start, 0]).reshape(KEYS, DIM)


@_kernel
def _forward_tile(
    acc, peak, total, q, k_desc, v_desc, b, k, start, low, high, scale,
    MASKED: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys of the online softmax: s = scale*q.k, p = exp2(s - peak), acc += p.v, total += sum p.

    Where it is masked, a row sees the keys [low, high).
    """
    keys = _load_keys(k_desc, b, k, start, KEYS, DIM)
    s = tl.dot(q, keys.T, input_precision=PRECISION)
    if MASKED:
        key = (start + tl.arange(0, KEYS))[None, :]
        s = tl.where((key >= low[:, None]) & (key < high[:, None]), s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, 1) * scale)
    shift = new_peak
    if MASKED:  # a row without a visible key so far: any finite shift keeps its exponentials at exactly 0
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(s * scale - shift[:, None])
    fade = tl.exp2(peak - shift)
    values = _load_keys(v_desc, b, k, start, KEYS, DIM)
    acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
    return acc, new_peak, total * fade + tl.sum(p, 1)


@_kernel
def _store_attention(
    acc, peak, total, o_ptr, o_strides, lse_ptr, b, head, t, exists, T, H, D, DIM: tl.constexpr
):
    """Normalise; a row that saw nothing has total = 0 and peak = -inf, hence o = 0 and lse = -inf."""
    _store_rows(o_ptr, o_strides, acc / tl.where(total == 0.0, 1.0, total)[:, None], b, head, t, exists, D, DIM)
    tl.store(lse_ptr + (b.to(tl.int64) * T + t) * H + head, (peak + tl.log2(total)) * _TL_LN2, mask=exists)


@_kernel(do_not_specialize=["T"])
def _span_forward_kernel(
    q_ptr, q_strides, k_desc, v_desc, o_ptr, o_strides, lse_ptr, o_recent_ptr, lse_recent_ptr, spans, T, H, K, D, scale,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr,
    SELECT: tl.constexpr, RECENT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o_t = sum_i p_ti v_i, p_ti = exp(scale*q_t.k_i - lse_t), lse_t = log sum_i exp(scale*q_t.k_i), i in span(t).

    Where RECENT, o_recent and lse_recent are the same over the keys in the recent blocks alone.
    """
    # Which tile: the last tokens see the most keys and go first, so that no long program starts late.
    heads = tl.num_programs(0) // tl.cdiv(T * GROUP_PAD, ROWS)  # B * K
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // heads
    b, k = tl.program_id(0) % heads // K, tl.program_id(0) % K
    t, g, exists = _rows_of(tile, T, ROWS, GROUP, GROUP_PAD)
    t_low, t_high = tile * ROWS // GROUP_PAD, tl.minimum((tile * ROWS + ROWS - 1) // GROUP_PAD, T - 1)
    q = _load_resident_rows(q_ptr, q_strides, b, k * GROUP + g, t, exists, D, DIM)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    peak, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    low, recent, high = _sees(t, spans, exists, BLOCK_SIZE, STRIDE, WINDOW, SELECT, RECENT)
    first, before, full, recent_tiles, tiles, end = _key_tiles(
        t_low, t_high, spans, KEYS, BLOCK_SIZE, STRIDE, WINDOW, SELECT, RECENT
    )
    # The recent keys, whose sum is a result by itself; on top of it tiles that every row sees whole, then the ones at
    # both edges of what is left.
    if RECENT > 0:
        for j in range(recent_tiles, end):
            acc, peak, total = _forward_tile(
                acc, peak, total, q, k_desc, v_desc, b, k, first + j * KEYS, recent, high, scale * _TL_LOG2E,
                True, KEYS, DIM, PRECISION,
            )  # fmt: skip
        _store_attention(
            acc, peak, total, o_recent_ptr, o_strides, lse_recent_ptr, b, k * GROUP + g, t, exists, T, H, D, DIM
        )
    for j in range(before, before + full):
        acc, peak, total = _forward_tile(
            acc, peak, total, q, k_desc, v_desc, b, k, first + j * KEYS, low, recent, scale * _TL_LOG2E,
            False, KEYS, DIM, PRECISION,
        )  # fmt: skip
    for j in range(tiles - full):
        start = first + tl.where(j < before, j, j + full) * KEYS
        acc, peak, total = _forward_tile(
            acc, peak, total, q, k_desc, v_desc, b, k, start, low, recent, scale * _TL_LOG2E,
            True, KEYS, DIM, PRECISION,
        )  # fmt: skip
    _store_attention(acc, peak, total, o_ptr, o_strides, lse_ptr, b, k * GROUP + g, t, exists, T, H, D, DIM)


@_kernel
def _dq_tile(
    dq, q, do, shift, delta, selected_shift, selected_delta, k_desc, v_desc, b, k, start, low, recent, high, scale,
    MASKED: tl.constexpr, RECENT: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys: p = exp2(scale*q.k - shift), ds = p * (do.v - delta), dq += ds.k.

    Where it is masked, a row sees the keys [low, high); those from `recent` on in the selective branch as well.
    """
    keys = _load_keys(k_desc, b, k, start, KEYS, DIM)
    values = _load_keys(v_desc, b, k, start, KEYS, DIM)
    s = tl.dot(q, keys.T, input_precision=PRECISION)
    dp = tl.dot(do, values.T, input_precision=PRECISION)
    p = tl.exp2(s * scale - shift[:, None])
    if MASKED:
        key = (start + tl.arange(0, KEYS))[None, :]
        p = tl.where((key >= low[:, None]) & (key < high[:, None]), p, 0.0)
    ds = p * (dp - delta[:, None])
    if MASKED and RECENT > 0:
        p = tl.exp2(s * scale - selected_shift[:, None])
        p = tl.where((key >= recent[:, None]) & (key < high[:, None]), p, 0.0)
        ds += p * (dp - selected_delta[:, None])
    return tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)


@_kernel(do_not_specialize=["T"])
def _span_dq_kernel(
    do_ptr, do_strides, q_ptr, q_strides, k_desc, v_desc, shift_ptr, delta_ptr, selected_shift_ptr, selected_delta_ptr,
    dq_ptr, dq_strides, spans, T, K, D, rows_pad, scale,
    GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, ADD: tl.constexpr, BLOCK_SIZE: tl.constexpr, STRIDE: tl.constexpr,
    WINDOW: tl.constexpr, SELECT: tl.constexpr, RECENT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq_t = scale * sum_i ds_ti k_i, ds_ti = p_ti (do_t.v_i - delta_t), p_ti = exp(scale*q_t.k_i - shift_t).

    Added to what dq holds, where ADD. Where RECENT, ds_ti of the selective branch is added for the recent keys.
    """
    heads = tl.num_programs(0) // (rows_pad // ROWS)  # B * K
    tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // heads
    b, k = tl.program_id(0) % heads // K, tl.program_id(0) % K
    t, g, exists = _rows_of(tile, T, ROWS, GROUP, GROUP_PAD)
    t_low, t_high = tile * ROWS // GROUP_PAD, tl.minimum((tile * ROWS + ROWS - 1) // GROUP_PAD, T - 1)
    do = _load_resident_rows(do_ptr, do_strides, b, k * GROUP + g, t, exists, D, DIM)
    q = _load_resident_rows(q_ptr, q_strides, b, k * GROUP + g, t, exists, D, DIM)
    n = (b.to(tl.int64) * K + k) * rows_pad + tile * ROWS + tl.arange(0, ROWS)
    shift, delta = tl.load(shift_ptr + n), tl.load(delta_ptr + n)
    selected_shift, selected_delta = shift, delta
    if RECENT > 0:
        selected_shift, selected_delta = tl.load(selected_shift_ptr + n), tl.load(selected_delta_ptr + n)
    dq = tl.zeros((ROWS, DIM), tl.float32)
    # Tiles that every row sees whole, then the ones at both edges of the span.
    low, recent, high = _sees(t, spans, exists, BLOCK_SIZE, STRIDE, WINDOW, SELECT, RECENT)
    first, before, full, _, _, end = _key_tiles(
        t_low, t_high, spans, KEYS, BLOCK_SIZE, STRIDE, WINDOW, SELECT, RECENT
    )
    for j in range(before, before + full):
        dq = _dq_tile(
            dq, q, do, shift, delta, selected_shift, selected_delta, k_desc, v_desc, b, k, first + j * KEYS,
            low, recent, high, scale * _TL_LOG2E, False, RECENT, KEYS, DIM, PRECISION,
        )  # fmt: skip
    for j in range(end - full):
        start = first + tl.where(j < before, j, j + full) * KEYS
        dq = _dq_tile(
            dq, q, do, shift, delta, selected_shift, selected_delta, k_desc, v_desc, b, k, start,
            low, recent, high, scale * _TL_LOG2E, True, RECENT, KEYS, DIM, PRECISION,
        )  # fmt: skip
    dq *= scale
    if ADD:
        dq += _load_resident_rows(dq_ptr, dq_strides, b, k * GROUP + g, t, exists, D, DIM)
    _store_rows(dq_ptr, dq_strides, dq, b, k * GROUP + g, t, exists, D, DIM)


@_kernel
def _dkv_tile(
    dk, dv, keys, values, q_desc, do_desc, shift_ptr, delta_ptr, selected_shift_ptr, selected_delta_ptr,
    b, k, tile, low, recent, high, scale,
    MASKED: tl.constexpr, RECENT: tl.constexpr, GROUP_PAD: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of query rows, transposed so that p is an operand as it stands: dv += p'.do, dk += ds'.q.

    Where it is masked, the queries [low, high) see a key; those up to `recent` in the selective branch as well.
    """
    n = tile * ROWS + tl.arange(0, ROWS)
    shift = tl.load(shift_ptr + n)
    delta = tl.load(delta_ptr + n)
    q = _load_rows(q_desc, b, k, tile, ROWS, GROUP_PAD, DIM)
    do = _load_rows(do_desc, b, k, tile, ROWS, GROUP_PAD, DIM)
    s = tl.dot(keys, q.T, input_precision=PRECISION)
    dp = tl.dot(values, do.T, input_precision=PRECISION)
    p = tl.exp2(s * scale - shift[None, :])
    if MASKED:
        t = (n // GROUP_PAD)[None, :]
        p = tl.where((t >= low[:, None]) & (t < high[:, None]), p, 0.0)
    p_sum = p
    if MASKED and RECENT > 0:
        selected = tl.exp2(s * scale - tl.load(selected_shift_ptr + n)[None, :])
        selected = tl.where((t >= low[:, None]) & (t < recent[:, None]), selected, 0.0)
        p_sum += selected
    dv = tl.dot(p_sum.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    if MASKED and RECENT > 0:
        ds += selected * (dp - tl.load(selected_delta_ptr + n)[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@_kernel(do_not_specialize=["T", "C", "B", "row_tiles_per_part"])
def _span_dkv_kernel(
    do_desc, q_desc, k_desc, v_desc, shift_ptr, delta_ptr, selected_shift_ptr, selected_delta_ptr, dk_desc, dv_desc,
    seen, T, K, C, B, rows_pad, row_tiles_per_part, scale, GROUP_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    STRIDE: tl.constexpr, WINDOW: tl.constexpr, SELECT: tl.constexpr, RECENT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv_i = sum_t p_ti do_t and dk_i = scale * sum_t ds_ti q_t over one part of the query rows.

    Where RECENT, p_ti and ds_ti of the selective branch are added for the queries in whose recent blocks the key is.
    """
    # Which part of the rows and which keys: later parts are seen by more keys and go first.
    heads = B * K
    key_tiles = tl.cdiv(C, KEYS)
    part = (tl.num_programs(0) - 1 - tl.program_id(0)) // (heads * key_tiles)
    start = tl.program_id(0) // heads % key_tiles * KEYS
    b, k = tl.program_id(0) % heads // K, tl.program_id(0) % K
    first, full, full_end, end = _row_tiles(
        start, start + KEYS - 1, T, C, seen, ROWS, GROUP_PAD, BLOCK_SIZE, STRIDE, WINDOW, SELECT, RECENT
    )
    low, high = part * row_tiles_per_part, (part + 1) * row_tiles_per_part
    if seen is not None:  # few of all rows see the tile, and it is those that are split
        parts = tl.num_programs(0) // (heads * key_tiles)
        low, high = first + (end - first) * part // parts, first + (end - first) * (part + 1) // parts
    first, end = tl.maximum(first, low), tl.minimum(end, high)
    full = tl.minimum(tl.maximum(full, first), end)
    full_end = tl.maximum(tl.minimum(full_end, end), full)
    # Rows that see every key of the tile, then the ones at both edges.
    keys = _load_keys(k_desc, b, k, start, KEYS, DIM)
    values = _load_keys(v_desc, b, k, start, KEYS, DIM)
    key = start + tl.arange(0, KEYS)
    t_low, t_recent, t_high = _seen_by(key, T, seen, key < C, BLOCK_SIZE, STRIDE, WINDOW, SELECT, RECENT)
    row = (b.to(tl.int64) * K + k) * rows_pad
    shift_ptr += row
    delta_ptr += row
    if RECENT > 0:
        selected_shift_ptr += row
        selected_delta_ptr += row
    dk, dv = tl.zeros((KEYS, DIM), tl.float32), tl.zeros((KEYS, DIM), tl.float32)
    for tile in range(full, full_end):
        dk, dv = _dkv_tile(
            dk, dv, keys, values, q_desc, do_desc, shift_ptr, delta_ptr, selected_shift_ptr, selected_delta_ptr,
            b, k, tile, t_low, t_recent, t_high, scale * _TL_LOG2E, False, RECENT, GROUP_PAD, ROWS, DIM, PRECISION,
        )  # fmt: skip
    for j in range(first, end - full_end + full):
        tile = tl.where(j < full, j, j - full + full_end)
        dk, dv = _dkv_tile(
            dk, dv, keys, values, q_desc, do_desc, shift_ptr, delta_ptr, selected_shift_ptr, selected_delta_ptr,
            b, k, tile, t_low, t_recent, t_high, scale * _TL_LOG2E, True, RECENT, GROUP_PAD, ROWS, DIM, PRECISION,
        )  # fmt: skip
    dk_desc.store([part * B + b, k, start, 0], (dk * scale).to(dk_desc.dtype).reshape(1, 1, KEYS, DIM))
    dv_desc.store([part * B + b, k, start, 0], dv.to(dv_desc.dtype).reshape(1, 1, KEYS, DIM))


def _tile_sizes(kernel: str, q: Tensor, K: int) -> tuple[int, int, dict[str, object]]:
    """(rows, keys, the launch options and constants that all kernels take)."""
    H, D = q.shape[2:]
    assert D <= 256, f"no tile sizes for head dim {D}: at most 256"
    rows, keys, warps, stages = _SPAN_TILES["float32" if q.dtype == torch.float32 else kernel][max(64, _padded(D))]
    constants = {
        "GROUP_PAD": _group_pad(H // K),
        "DIM": _padded(D),
        "PRECISION": _precision(),
    }
    return rows, keys, constants | {"num_warps": warps, "num_stages": stages}


def _empty_aligned(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor that a descriptor can address: rows of a head dim that is no multiple of 16 bytes are padded."""
    dtype = dtype or like.dtype
    unit = 16 // dtype.itemsize
    return like.new_empty((*shape[:-1], _cdiv(shape[-1], unit) * unit), dtype=dtype)[..., : shape[-1]]


def _addressable(x: Tensor) -> bool:
    """Whether a descriptor can address x: its last dimension is contiguous, strides and start multiples of 16 bytes."""
    unit = 16 // x.element_size()
    return x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % unit == 0 for s in x.stride()[:-1])


def _aligned(x: Tensor) -> Tensor:
    """x itself if a descriptor can address it, else a padded copy."""
    return x if _addressable(x) else _empty_aligned(x.shape, x).copy_(x)


def _key_descriptor(x: Tensor, keys: int) -> TensorDescriptor:
    """(B, C, K, D) as (B, K, C, D), in tiles of (keys, D)."""
    (B, C, K, D), (sb, sc, sk, sd) = x.shape, x.stride()
    return TensorDescriptor(x, [B, K, C, D], [sb, sk, sc, sd], [1, 1, keys, _padded(D)])


def _row_descriptor(x: Tensor, K: int, rows: int) -> TensorDescriptor:
    """(B, T, H, D) as (B, K, T, G, D), in tiles of rows that pack tokens and the heads of a group."""
    (B, T, H, D), (sb, st, sh, sd) = x.shape, x.stride()
    G = H // K
    group_pad = _group_pad(G)
    box = [1, 1, max(1, rows // group_pad), min(rows, group_pad), _padded(D)]
    return TensorDescriptor(x, [B, K, T, G, D], [sb, G * sh, st, sh, sd], box)


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; under the interpreter, a number."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _spans(
    packing: _Packing | None, BLOCK_SIZE: int, STRIDE: int, WINDOW: int, SELECT: int, RECENT: int
) -> Tensor | None:
    """`spans` of packed sequences, (T, 3)."""
    if packing is None:
        return None
    sequence, query = packing.tokens
    rule, edges = _Window(WINDOW), packing.edges
    if WINDOW == 0:
        rule = _Staircase(BLOCK_SIZE, STRIDE)
        _, edges = packing.compressed(rule)
    first, end = rule.span(query)
    recent = _Recent(SELECT, RECENT).first(query) if RECENT else end
    return torch.stack([first, recent, end], 1) + edges[sequence, None]


def _seen(
    packing: _Packing | None, keys: int, BLOCK_SIZE: int, STRIDE: int, WINDOW: int, SELECT: int, RECENT: int
) -> Tensor | None:
    """`seen` of packed sequences, (keys, 3)."""
    if packing is None:
        return None
    rule, (sequence, key) = _Window(WINDOW), packing.tokens
    if WINDOW == 0:
        rule = _Staircase(BLOCK_SIZE, STRIDE)
        sequence, key = _runs(packing.compressed(rule)[0], keys)
    first, end = rule.seen_by(key)
    recent = _Recent(SELECT, RECENT).end(key) if RECENT else first
    seen = torch.stack([first, recent, end], 1)
    return seen.minimum(packing.lengths[sequence, None]) + packing.edges[sequence, None]


def _span_forward(
    branch: str, q: Tensor, k: Tensor, v: Tensor, scale: float, packing: _Packing | None, **span: int
) -> tuple[Tensor, ...]:
    """Output and log-sum-exp of the queries over their spans of keys; then over recent blocks, if there are any."""
    B, T, H, D = q.shape
    C, K = k.shape[1:3]
    of_one = lambda: [q.new_empty(q.shape), q.new_empty((B, T, H), dtype=torch.float32)]  # noqa: E731
    results = of_one() + (of_one() if span["RECENT"] else [])
    if q.numel() == 0 or C == 0:
        return tuple(x.fill_(float("-inf") if i % 2 else 0.0) for i, x in enumerate(results))
    q, k, v = _unit_stride(q), _aligned(k), _aligned(v)
    rows, keys, options = _tile_sizes(f"{branch}_forward", q, K)
    grid = (_cdiv(T * options["GROUP_PAD"], rows) * B * K,)
    _span_forward_kernel[grid](
        q, q.stride(), _key_descriptor(k, keys), _key_descriptor(v, keys), results[0], results[0].stride(),
        results[1], *results[-2:], _spans(packing, **span), T, H, K, D, scale,
        GROUP=H // K, **span, ROWS=rows, KEYS=keys, **options,
    )  # fmt: skip
    return tuple(results)


def _span_dq(
    branch: str, do: Tensor, terms: list[_RowTerms], q: Tensor, k: Tensor, v: Tensor, scale: float, dq: Tensor | None,
    packing: _Packing | None, **span: int,
) -> Tensor:  # fmt: skip
    """dq, added to what is there."""
    T, H, D = q.shape[1:]
    K = k.shape[2]
    rows, keys, options = _tile_sizes(f"{branch}_dq", q, K)
    out = q.new_empty(q.shape) if dq is None else dq
    rows_pad = terms[0].shift.shape[-1]
    _span_dq_kernel[(rows_pad // rows * q.shape[0] * K,)](
        do, do.stride(), q, q.stride(), _key_descriptor(k, keys), _key_descriptor(v, keys), *terms[0], *terms[-1],
        out, out.stride(), _spans(packing, **span), T, K, D, rows_pad, scale,
        GROUP=H // K, ADD=dq is not None, **span, ROWS=rows, KEYS=keys, **options,
    )  # fmt: skip
    return out


def _parts(row_tiles: int, programs: int, device: torch.device) -> int:
    """Into how many parts of at least 32 tiles to split the query rows.

    Enough to fill the GPU three times over, since half of the (part, key tile) pairs see nothing; then up to sixteen
    times, which evens out the staircase, as long as the parts stay so long that adding their sums costs little.
    """
    fill, even = (_cdiv(n * _processors(device), programs) for n in (3, 16))
    return max(1, min(fill, row_tiles // 32), min(even, row_tiles // 512))


def _span_dkv(
    branch: str, do: Tensor, terms: list[_RowTerms], q: Tensor, k: Tensor, v: Tensor, scale: float,
    packing: _Packing | None, **span: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv. Few keys with many queries each are split by parts of the queries, whose sums are added after."""
    B, T, _, D = q.shape
    C, K = k.shape[1:3]
    rows, keys, options = _tile_sizes(f"{branch}_dkv", q, K)
    longest = T if packing is None else max(packing.on_host)
    row_tiles, key_tiles = _cdiv(longest * options["GROUP_PAD"], rows), _cdiv(C, keys)
    parts = _parts(row_tiles, key_tiles * B * K, q.device) if span["WINDOW"] == 0 else 1
    dtype = k.dtype if parts == 1 else torch.float32
    dk, dv = (_empty_aligned((parts * B, C, K, D), k, dtype) for _ in range(2))
    _span_dkv_kernel[(parts * key_tiles * B * K,)](
        _row_descriptor(do, K, rows), _row_descriptor(q, K, rows), _key_descriptor(k, keys), _key_descriptor(v, keys),
        *terms[0], *terms[-1], _key_descriptor(dk, keys), _key_descriptor(dv, keys),
        _seen(packing, C, **span), T, K, C, B, terms[0].shift.shape[-1], _cdiv(row_tiles, parts), scale,
        **span, ROWS=rows, KEYS=keys, **options,
    )  # fmt: skip
    if parts > 1:
        dk, dv = (x.unflatten(0, (parts, B)).sum(0).to(k.dtype) for x in (dk, dv))
    return dk.contiguous(), dv.contiguous()


def _span_backward(
    branch: str, do: Tensor, terms: list[_RowTerms], q: Tensor, k: Tensor, v: Tensor, scale: float, dq: Tensor | None,
    packing: _Packing | None, **span: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values; the last terms are those of the selective branch, if blocks are recent."""
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q) if dq is None else dq, torch.zeros_like(k), torch.zeros_like(v)
    do, q, k, v = _aligned(do), _aligned(q), _aligned(k), _aligned(v)
    dq = _span_dq(branch, do, terms, q, k, v, scale, dq, packing, **span)
    return dq, *_span_dkv(branch, do, terms, q, k, v, scale, packing, **span)


def _taken_over(q: Tensor, window: int, select_block_size: int, topk_blocks: int, local_blocks: int) -> _Recent:
    """The recent blocks, if the local branch does them for the selective one.

    The window must hold them, and other blocks must be left to choose. Not in float32: the sums over queries in dk and
    dv are longer here than those of _SPAN, and one of larger numbers lost more than its error budget.
    """
    holds = local_blocks * select_block_size <= window and local_blocks < topk_blocks
    return _Recent(select_block_size, local_blocks) if holds and q.dtype.itemsize == 2 else _NOTHING_RECENT


def _local_span(window: int, recent: _Recent) -> dict[str, int]:
    """What the kernels above must know of the branch."""
    constants = {"BLOCK_SIZE": 1, "STRIDE": 1, "WINDOW": min(window, _FAR)}
    return constants | {"SELECT": recent.select_block_size, "RECENT": recent.blocks}


def _compressed_span(block_size: int, stride: int) -> dict[str, int]:
    """Likewise; nothing is recent here."""
    return {"BLOCK_SIZE": block_size, "STRIDE": stride, "WINDOW": 0, "SELECT": 1, "RECENT": 0}


def _triton_local_forward(
    q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, recent: _Recent = _NOTHING_RECENT,
    packing: _Packing | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Local branch: o (B, T, H, D) and lse (B, T, H); then the same over the recent blocks alone, if there are any."""
    return _span_forward("local", q, k, v, scale, packing, **_local_span(window, recent))


def _triton_local_backward(
    do: Tensor, terms: _RowTerms, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, dq: Tensor | None,
    selective_terms: _RowTerms | None = None, recent: _Recent = _NOTHING_RECENT, packing: _Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Local branch: dq, dk, dv; with what the selective branch adds to them in the recent blocks, if there are any."""
    terms = [terms, selective_terms or terms]
    return _span_backward("local", do, terms, q, k, v, scale, dq, packing, **_local_span(window, recent))


def _triton_compressed_forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, block_size: int, stride: int, scale: float,
    packing: _Packing | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compressed branch: o (B, T, H, D) and lse (B, T, H)."""
    return _span_forward("compressed", q, k_cmp, v_cmp, scale, packing, **_compressed_span(block_size, stride))


def _triton_compressed_backward(
    do: Tensor, terms: _RowTerms, q: Tensor, k_cmp: Tensor, v_cmp: Tensor,
    block_size: int, stride: int, scale: float, dq: Tensor | None, packing: _Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compressed branch: dq, dk_cmp, dv_cmp."""
    span = _compressed_span(block_size, stride)
    return _span_backward("compressed", do, [terms], q, k_cmp, v_cmp, scale, dq, packing, **span)


# Selective: pairs in order of their block ─────────────────────────────────────────────────────────────────────────────
#
# A pair is (query t, slot s), numbered t·S + s. The loops are exchanged: the block is outside, the queries that chose
# it are inside. Pairs are put in order of their block; a program takes one block and a tile of rows (pair, head of the
# group), and a second kernel merges the S partial results of each query. So a block's keys are read once a tile, and no
# query gathers keys. Queries go in chunks, so that the partial results never take more than _PARTIAL_BYTES. For large
# groups, whose heads fill a tile by themselves, the forward keeps the query outside. Where both passes exchange loops
# and one chunk takes all queries, pairs are sorted once: the forward of the whole keeps them for its backward.
#
# Where the local branch does the recent blocks, they and the slots that only they take are left out here.
#
# The blocks of packed sequences are numbered on from one sequence to the next, and cut their tokens into runs as well.
# Two tables: `places` has the position of every query in its sequence and the number of that sequence's first block,
# `edges` the first token of every block, and at the end the number of tokens.


@_kernel
def _position(t, places, mask):
    """The position of a query in its sequence."""
    position = t
    if places is not None:
        position = tl.load(places + 2 * t, mask=mask, other=0)
    return position


@_kernel
def _block_tokens(j, edges, T, SELECT: tl.constexpr):
    """Block j is the tokens [first, end), of which no more than SELECT count."""
    if edges is None:
        first, end = j * SELECT, T
    else:
        first, end = tl.load(edges + j), tl.load(edges + j + 1)
    return first, end


@_kernel
def _counts(j, position, SELECT: tl.constexpr, RECENT: tl.constexpr):
    """Whether a slot holds a block that counts: free slots, blocks after the query, and recent blocks do not."""
    return (j >= 0) & (j <= position // SELECT - RECENT)


@_kernel
def _load_pair_block(
    blocks, pair, in_range, places, t0, stride_t, S: tl.constexpr, SELECT: tl.constexpr, RECENT: tl.constexpr
):
    """The block of each pair, and whether it counts."""
    t = t0 + pair // S
    j = tl.load(blocks + t.to(tl.int64) * stride_t + pair % S, mask=in_range, other=-1)
    valid = in_range & _counts(j, _position(t, places, in_range), SELECT, RECENT)
    if places is not None:
        j += tl.load(places + 2 * t + 1, mask=in_range, other=0)
    return j, valid


@_kernel
def _count_pairs_kernel(
    block_indices, counts, places, n_pairs, n_blocks, n_runs, t0, stride_b, stride_t, stride_k,
    K: tl.constexpr, S: tl.constexpr, SELECT: tl.constexpr, RECENT: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """counts[z, j, run] = how many pairs of this run of RUN pairs chose block j."""
    run, z = tl.program_id(0), tl.program_id(1)
    blocks = block_indices + (z // K).to(tl.int64) * stride_b + (z % K) * stride_k
    pair = run * RUN + tl.arange(0, RUN)
    j, valid = _load_pair_block(blocks, pair, pair < n_pairs, places, t0, stride_t, S, SELECT, RECENT)
    cell = (z.to(tl.int64) * n_blocks + j) * n_runs + run
    tl.atomic_add(counts + cell, 1, mask=valid, sem="relaxed")


@_kernel
def _place_pairs_kernel(
    block_indices, left, ends, pairs, places, n_pairs, n_blocks, n_runs, t0, stride_b, stride_t, stride_k,
    K: tl.constexpr, S: tl.constexpr, SELECT: tl.constexpr, RECENT: tl.constexpr, RUN: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """pairs[ends[z, j, run] - left[z, j, run] + rank] = pair, of the pairs of this run that chose j: a stable sort.

    `left` are those that have no place yet, at first all that were counted, `rank` a pair's rank among them. A run has
    one program, which takes a tile at a time off what is left; so nothing is left to chance.
    """
    run, z = tl.program_id(0), tl.program_id(1)
    blocks = block_indices + (z // K).to(tl.int64) * stride_b + (z % K) * stride_k
    lane = tl.arange(0, TILE)
    weight = tl.where(lane[:, None] < lane[None, :], 1, 1 << 16)  # low half: before me; high half: me and after me
    pair = run * RUN + lane
    j, valid = _load_pair_block(blocks, pair, pair < n_pairs, places, t0, stride_t, S, SELECT, RECENT)
    for first in range(TILE, RUN + TILE, TILE):
        next_pair = run * RUN + first + lane  # asked for early; the round after the last is empty
        in_run = (next_pair < n_pairs) & (first < RUN)
        next_j, next_valid = _load_pair_block(blocks, next_pair, in_run, places, t0, stride_t, S, SELECT, RECENT)
        cell = (z.to(tl.int64) * n_blocks + j) * n_runs + run
        waiting = tl.load(left + cell, mask=valid, other=0)
        place = tl.load(ends + cell, mask=valid, other=0) - waiting
        j = tl.where(valid, j, -1 - lane)  # an invalid pair is alone with its number
        counts = tl.sum(tl.where(j[:, None] == j[None, :], weight, 0), axis=0)
        rank = counts & 0xFFFF
        tl.store(pairs + place + rank, pair, mask=valid)
        tl.debug_barrier()  # every thread has read what was left
        tl.store(left + cell, waiting - rank - 1, mask=valid & (counts >> 16 == 1))
        tl.debug_barrier()  # the next tile reads what this one wrote
        pair, j, valid = next_pair, next_j, next_valid


@_kernel
def _cut_tiles_kernel(
    ends, table, block_of, n_blocks, stride, column, bound, G: tl.constexpr, SIZE: tl.constexpr, NP: tl.constexpr
):
    """The pairs of each block, times G rows, in tiles of SIZE rows: `table` and `block_of` of `_Tiles`."""
    z = tl.program_id(0).to(tl.int64)
    table += z * n_blocks * 4
    block_of += z * bound
    total = 0
    for first in range(0, n_blocks, NP):
        j = first + tl.arange(0, NP)
        exists = j < n_blocks
        cell = z * n_blocks + j
        begin = tl.load(ends + (cell - 1) * stride + column, mask=exists & (cell > 0), other=0)  # the end of the last
        end = tl.load(ends + cell * stride + column, mask=exists, other=0)
        tiles = tl.where(exists, ((end - begin) * G + (SIZE - 1)) // SIZE, 0)
        tile_end = total + tl.cumsum(tiles, axis=0)
        tl.store(table + j * 4, begin, mask=exists)
        tl.store(table + j * 4 + 1, end, mask=exists)
        tl.store(table + j * 4 + 2, tile_end - tiles, mask=exists)
        tl.store(table + j * 4 + 3, tile_end, mask=exists)
        for i in range(0, tl.max(tiles, axis=0)):
            tl.store(block_of + tile_end - tiles + i, j, mask=i < tiles)
        total += tl.sum(tiles, axis=0)
    for i in range(total, bound, NP):
        tile = i + tl.arange(0, NP)
        tl.store(block_of + tile, tile * 0 + n_blocks, mask=tile < bound)


class _BlockTables(NamedTuple):
    """All that the kernels need to know of selection blocks; the tables are those of packed sequences."""

    size: int  # l'
    recent: int  # of each query's last blocks so many are left to the local branch
    count: int  # N
    places: Tensor | None  # (T, 2)
    edges: Tensor | None  # (N + 1,)


def _block_tables(tokens: int, select_block_size: int, recent: int, packing: _Packing | None) -> _BlockTables:
    if packing is None:
        return _BlockTables(select_block_size, recent, _selection_count(tokens, select_block_size), None, None)
    count = sum(_selection_count(length, select_block_size) for length in packing.on_host)
    counts = _selection_count(packing.lengths, select_block_size)
    sequence, position = packing.tokens
    places = torch.stack([position, _edges(counts)[sequence]], 1)
    sequence, block = _runs(counts, count)
    first = packing.edges[sequence] + block * select_block_size
    return _BlockTables(select_block_size, recent, count, places, torch.cat([first, packing.edges[-1:]]))


class _Pairs(NamedTuple):
    """Pairs of a chunk of queries in order of (key head, block)."""

    pairs: Tensor  # (Z * n_tokens * S,) int32
    ends: Tensor  # int32; one past the last pair of block j of key head z is ends[(z N + j) stride + column]
    stride: int
    column: int


class _Tiles(NamedTuple):
    """Sorted pairs, their rows (pair, head) in tiles of one block each.

    table[z, 4 j :]: the first pair of block j and one past its last, its first tile and one past its last.
    """

    pairs: Tensor
    table: Tensor  # (Z, 4 N) int32
    block_of: Tensor  # (Z, bound) int32, of each tile, N where it is not needed
    bound: int  # of the number of tiles, known without looking at the data


def _sort_pairs(block_indices: Tensor, t0: int, n_tokens: int, blocks: _BlockTables) -> _Pairs:
    """A counting sort by block: counts for each run of pairs, a running sum, then every pair goes to its place."""
    B, _, K, S = block_indices.shape
    Z, n_pairs, device = B * K, n_tokens * S, block_indices.device
    run, n_blocks = _RUN, blocks.count
    while run < 16384 and 4 * Z * n_blocks * _cdiv(n_pairs, run) > _COUNT_BYTES:
        run *= 2
    n_runs = _cdiv(n_pairs, run)
    counts = torch.zeros(Z * n_blocks * n_runs, dtype=torch.int32, device=device)
    shape = (blocks.places, n_pairs, n_blocks, n_runs, t0, *block_indices.stride()[:3])
    constants = {"K": K, "S": S, "SELECT": blocks.size, "RECENT": blocks.recent, "RUN": run}
    _count_pairs_kernel[(n_runs, Z)](block_indices, counts, *shape, **constants, num_warps=4)
    ends = counts.cumsum(0, dtype=torch.int32)
    pairs = torch.zeros(Z * n_pairs, dtype=torch.int32, device=device)  # free slots are no pairs; what is left stays 0
    _place_pairs_kernel[(n_runs, Z)](block_indices, counts, ends, pairs, *shape, **constants, **_PLACE, num_stages=1)
    return _Pairs(pairs, ends, n_runs, n_runs - 1)


def _cut_tiles(pairs: _Pairs, Z: int, n_blocks: int, group: int, size: int) -> _Tiles:
    """The rows of each block cut into tiles of at most `size`; their number is bounded by rows / size + blocks."""
    bound = len(pairs.pairs) // Z * group // size + n_blocks
    table, block_of = (pairs.ends.new_empty((Z, n)) for n in (n_blocks * 4, bound))
    _cut_tiles_kernel[(Z,)](
        pairs.ends, table, block_of, n_blocks, pairs.stride, pairs.column, bound,
        G=group, SIZE=size, NP=min(_power_of_2(n_blocks), _CUT),
    )  # fmt: skip
    return _Tiles(pairs.pairs, table, block_of, bound)


def _large_group(q: Tensor, G: int) -> bool:
    """Whether the heads of a group fill a tile of the matrix unit, which has 16 rows, by themselves.

    Measured at D 128: exchanged 4.7 ms against 6.6 for 8 heads a group, by query 13.5 against 16.0 for 16.
    """
    return G >= _QUERY_OUTER_GROUP and q.dtype.itemsize == 2


def _kept_pairs(q: Tensor, K: int, S: int, select_block_size: int, lengths: list[int]) -> list[tuple[int, ...]]:
    """Shapes of the pairs and the table that the forward keeps for the backward, if it does: it sorts once for both.

    By shapes alone: where both exchange the loops, and take all queries in one chunk.
    """
    B, T, H, D = q.shape
    parts = _cdiv(select_block_size, _selective_tiles("backward", D, select_block_size, q.dtype)["KEYS"])
    if _large_group(q, H // K) or _chunk_tokens(B * H * S * parts * D * q.element_size(), T) < T:
        return []
    blocks = sum(_selection_count(length, select_block_size) for length in lengths or [T])
    return [(B * K * T * S,), (B * K, blocks * 4)]


@_kernel
def _rows_of_tile(entry, tile, G: tl.constexpr, SPAN: tl.constexpr):
    """By its block's entry in the table: the block's first pair, and the tile's rows [row_first, row_last) there."""
    first = tl.load(entry)
    row_first = (tile - tl.load(entry + 2)) * SPAN
    return first, row_first, tl.minimum(row_first + SPAN, (tl.load(entry + 1) - first) * G)


# Selective, forward ───────────────────────────────────────────────────────────────────────────────────────────────────


@_kernel
def _selective_partial_kernel(
    q, k, v, pairs, table, block_of, o_part, lse_part, edges,
    T, n_blocks, n_tiles, n_pairs, t0, scale,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    K: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SELECT: tl.constexpr,
    RECENT: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o_part[t, s] = softmax(scale q[t] . k) v over the tokens <= t of the block in slot s; lse_part in base 2.

    One program: a block, whose keys stay, and SPAN of the rows (query, head) that chose it, a tile at a time.
    """
    tile, z = tl.program_id(0), tl.program_id(1)
    j = tl.load(block_of + z.to(tl.int64) * n_tiles + tile)
    if j >= n_blocks:
        return
    first, row_first, row_last = _rows_of_tile(table + (z.to(tl.int64) * n_blocks + j) * 4, tile, G, SPAN)
    q_base = q + (z // K).to(tl.int64) * stride_qb + (z % K).to(tl.int64) * G * stride_qh
    k_base = k + (z // K).to(tl.int64) * stride_kb + (z % K).to(tl.int64) * stride_kh
    v_base = v + (z // K).to(tl.int64) * stride_vb + (z % K).to(tl.int64) * stride_vh
    n = tl.arange(0, KEYS)
    begin, end = _block_tokens(j, edges, T, SELECT)
    token = begin + n
    exists = (n < SELECT) & (token < end)
    keys = tl.trans(_load_tile(k_base, token, stride_kt, exists, D, DP))  # here, so that it stays in shared memory
    values = _load_tile(v_base, token, stride_vt, exists, D, DP)
    row = row_first + tl.arange(0, ROWS)
    pair = tl.load(pairs + first + row // G, mask=row < row_last, other=0)
    for r in tl.range(row_first, row_last, ROWS):
        # the queries that chose this block, by the heads of the group
        row = r + tl.arange(0, ROWS)
        row_mask = row < row_last
        t = tl.where(row_mask, t0 + pair // S, -1)
        queries = _load_pair_rows(q_base, pair, row, row_mask, t0, stride_qt, stride_qh, G, S, D, DP)

        # softmax over the block's first tile of keys, which holds a visible one; a longer block goes on online
        s = tl.dot(queries, keys, input_precision=PRECISION) * (scale * _TL_LOG2E)
        visible = exists[None, :]
        if RECENT == 0:  # else all of the block lies before its queries
            visible &= token[None, :] <= t[:, None]
        s = tl.where(visible, s, float("-inf"))
        top = tl.where(row_mask, tl.max(s, axis=1), 0.0)
        p = tl.exp2(s - top[:, None])
        total = tl.sum(p, axis=1)
        o = tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
        if SELECT > KEYS:
            for n0 in range(KEYS, SELECT, KEYS):
                more = begin + n0 + n
                more_exists = (n0 + n < SELECT) & (more < end)
                more_keys = _load_tile(k_base, more, stride_kt, more_exists, D, DP)
                more_values = _load_tile(v_base, more, stride_vt, more_exists, D, DP)
                s = tl.dot(queries, tl.trans(more_keys), input_precision=PRECISION) * (scale * _TL_LOG2E)
                s = tl.where(more_exists[None, :] & (more[None, :] <= t[:, None]), s, float("-inf"))
                new_top = tl.maximum(top, tl.max(s, axis=1))
                p = tl.exp2(s - new_top[:, None])
                shrink = tl.exp2(top - new_top)
                total = total * shrink + tl.sum(p, axis=1)
                o = o * shrink[:, None] + tl.dot(p.to(more_values.dtype), more_values, input_precision=PRECISION)
                top = new_top

        o = o / tl.where(row_mask, total, 1.0)[:, None]
        out = (z.to(tl.int64) * n_pairs + pair) * G + row % G
        _store_tile(o_part, o, out, D, row_mask, D, DP)
        tl.store(lse_part + out, top + tl.log2(total), mask=row_mask)
        # early: rows that are gathered by numbers of the same round would wait for them
        pair = tl.load(pairs + first + (row + ROWS) // G, mask=row + ROWS < row_last, other=0)


@_kernel
def _output_rows(b, t, z, g, T, K: tl.constexpr, G: tl.constexpr):
    """The rows (t, head) of z = (b, key head) in a contiguous (B, T, H)."""
    return (b.to(tl.int64) * T + t) * (K * G) + z % K * G + g


@_kernel
def _load_gate(pointers, mask):
    """Gates in float32; NaN in place of those below 0, as the gradients have their logarithm."""
    gate = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    return tl.where(gate < 0, float("nan"), gate)


@_kernel
def _store_selective(
    selective, lse_row, o, lse, mixed, gates, local, compressed, row, row_mask, D: tl.constexpr, DP: tl.constexpr
):
    """The branch's own output and log-sum-exp (base 2), and where there are gates the sum of all three branches:

    mixed[row] = gates[row, 0] local[row] + gates[row, 1] compressed[row] + gates[row, 2] selective.
    """
    _store_tile(o, selective, row, D, row_mask, D, DP)
    tl.store(lse + row, lse_row * _TL_LN2, mask=row_mask)
    if gates is not None:
        gate = _load_gate(gates + row * 3 + 2, row_mask)
        total = gate[:, None] * selective
        gate = _load_gate(gates + row * 3, row_mask)
        total += gate[:, None] * _load_tile(local, row, D, row_mask, D, DP).to(tl.float32)
        gate = _load_gate(gates + row * 3 + 1, row_mask)
        total += gate[:, None] * _load_tile(compressed, row, D, row_mask, D, DP).to(tl.float32)
        _store_tile(mixed, total, row, D, row_mask, D, DP)


@_kernel
def _selective_merge_kernel(
    o_part, lse_part, o_recent, lse_recent, block_indices, o, lse, mixed, gates, local, compressed, places,
    T, n_tokens, t0, stride_ib, stride_it, stride_ik,
    K: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SELECT: tl.constexpr,
    RECENT: tl.constexpr, SP: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """lse[t] = log sum_s exp lse_part[t, s]; o[t] = sum_s exp(lse_part[t, s] - lse[t]) o_part[t, s].

    Where RECENT, o_recent and lse_recent are one more part.
    """
    z = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (token, head)
    row_mask = row < n_tokens * G
    t = t0 + row // G
    position = _position(t, places, row_mask)
    blocks = block_indices + (z // K).to(tl.int64) * stride_ib + (z % K) * stride_ik
    d = tl.arange(0, DP)
    part = (z.to(tl.int64) * n_tokens + row // G) * (S * G) + row % G  # slot 0; the next one is G further

    # log-sum-exp over the slots
    s = tl.arange(0, SP)[None, :]
    slot_mask = row_mask[:, None] & (s < S)
    j = tl.load(blocks + t.to(tl.int64)[:, None] * stride_it + s, mask=slot_mask, other=-1)
    taken = _counts(j, position[:, None], SELECT, RECENT)
    lse_s = tl.load(lse_part + part[:, None] + s * G, mask=taken, other=float("-inf"))
    top = tl.max(lse_s, axis=1)
    out = _output_rows(z // K, t, z, row % G, T, K, G)
    if RECENT > 0:
        lse_r = tl.load(lse_recent + out, mask=row_mask, other=float("-inf")) * _TL_LOG2E
        top = tl.maximum(top, lse_r)
    finite = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(lse_s - finite[:, None]), axis=1)
    if RECENT > 0:
        total += tl.exp2(lse_r - finite)
    lse_t = top + tl.log2(total)

    # weighted sum, slot by slot
    merged = tl.zeros([ROWS, DP], tl.float32)
    if RECENT > 0:
        w = tl.where(row_mask, tl.exp2(lse_r - lse_t), 0.0)
        merged += w[:, None] * _load_tile(o_recent, out, D, row_mask, D, DP).to(tl.float32)
    for slot in tl.range(0, S, loop_unroll_factor=UNROLL):
        block = tl.load(blocks + t.to(tl.int64) * stride_it + slot, mask=row_mask, other=-1)
        used = _counts(block, position, SELECT, RECENT)
        w = tl.exp2(tl.load(lse_part + part + slot * G, mask=used, other=float("-inf")) - lse_t)
        mask = used[:, None] & (d < D)[None, :]
        o_slot = tl.load(o_part + (part + slot * G)[:, None] * D + d[None, :], mask=mask, other=0.0)
        merged += tl.where(used, w, 0.0)[:, None] * o_slot.to(tl.float32)
    _store_selective(merged, lse_t, o, lse, mixed, gates, local, compressed, out, row_mask, D, DP)


@_kernel
def _selective_query_kernel(
    q, k_desc, v_desc, o_recent, lse_recent, block_indices, o, lse, mixed, gates, local, compressed, places, scale,
    stride_qb, stride_qt, stride_qh, stride_ib, stride_it, stride_ik,
    K: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SELECT: tl.constexpr,
    RECENT: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o[t] = softmax(scale q[t] . k) v over the tokens <= t of the blocks that t chose; one token, its whole group.

    Where RECENT, o_recent and lse_recent are a part of it.
    """
    t, z = tl.program_id(0), tl.program_id(1)
    position = _position(t, places, True)
    b, h = z // K, z % K
    g = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    q_base = q + b.to(tl.int64) * stride_qb + t.to(tl.int64) * stride_qt + h.to(tl.int64) * G * stride_qh
    queries = _load_tile(q_base, g, stride_qh, g < G, D, DP)
    blocks = block_indices + b.to(tl.int64) * stride_ib + t.to(tl.int64) * stride_it + h * stride_ik
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    merged = tl.zeros([HEADS, DP], tl.float32)
    parts: tl.constexpr = (SELECT + KEYS - 1) // KEYS
    j = tl.load(blocks)
    for step in tl.range(0, S * parts, num_stages=STAGES):
        first = tl.maximum(j, 0) * SELECT + step % parts * KEYS + (t - position)
        n = step % parts * KEYS + tl.arange(0, KEYS)
        keys = tl.reshape(k_desc.load([b, first, h, 0]), [KEYS, DP])
        values = tl.reshape(v_desc.load([b, first, h, 0]), [KEYS, DP])
        s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * _TL_LOG2E)
        visible = _counts(j, position, SELECT, RECENT) & (n < SELECT) & (j * SELECT + n <= position)
        s = tl.where(visible[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - finite[:, None])
        shrink = tl.exp2(top - finite)
        total = total * shrink + tl.sum(p, axis=1)
        merged = merged * shrink[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
        top = new_top
        j = tl.load(blocks + tl.minimum((step + 1) // parts, S - 1))  # early, for the next round's copies
    row = _output_rows(b, t, z, g, tl.num_programs(0), K, G)
    if RECENT > 0:
        lse_r = tl.load(lse_recent + row, mask=g < G, other=0.0) * _TL_LOG2E
        new_top = tl.maximum(top, lse_r)
        shrink, share = tl.exp2(top - new_top), tl.exp2(lse_r - new_top)
        recent = _load_tile(o_recent, row, D, g < G, D, DP).to(tl.float32)
        total, merged, top = total * shrink + share, merged * shrink[:, None] + share[:, None] * recent, new_top
    merged = merged / tl.where(total > 0, total, 1.0)[:, None]
    _store_selective(merged, top + tl.log2(total), o, lse, mixed, gates, local, compressed, row, g < G, D, DP)


def _selective_by_query(q, k, v, recent, block_indices, outputs, blocks, scale, tiles) -> None:
    """Launch the query-outer order: grid (token, key head), so that one key head at a time has the L2."""
    B, T, H, D = q.shape
    K, S = block_indices.shape[2:]
    tile = [1, tiles["KEYS"], 1, _padded(D)]
    k_desc, v_desc = (TensorDescriptor(x, list(x.shape), list(x.stride()), tile) for x in (k, v))
    _selective_query_kernel[(T, B * K, _cdiv(H // K, tiles["HEADS"]))](
        q, k_desc, v_desc, *recent, block_indices, *outputs, blocks.places, scale,
        *q.stride()[:3], *block_indices.stride()[:3],
        K=K, G=H // K, S=S, D=D, DP=_padded(D), SELECT=blocks.size, RECENT=blocks.recent, PRECISION=_precision(),
        **tiles,
    )  # fmt: skip


def _query_outer(q: Tensor, k: Tensor, v: Tensor, G: int) -> bool:
    """Whether the forward keeps the query outside; it reads keys and values by descriptors."""
    return _large_group(q, G) and _addressable(k) and _addressable(v)


def _launch_selective(
    gated: list[Tensor], q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, select_block_size: int, scale: float,
    recent: _Recent, recent_part: tuple[Tensor, ...], packing: _Packing | None,
) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
    """o (B, T, H, D) and lse (B, T, H) of the branch; with [gates, o of local, of compressed] the gated sum, and
    what is kept for the backward. Of recent blocks, `recent_part` has the o and lse.
    """
    block_indices = recent.others(block_indices)
    B, T, H, D = q.shape
    K, S = block_indices.shape[2:]
    G, Z = H // K, B * K
    q, k, v, block_indices = (_unit_stride(x) for x in (q, k, v, block_indices))
    recent_part = recent_part or (None, None)  # its o and lse
    o = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    mixed = torch.empty_like(o) if gated else None
    outputs = (o, lse, mixed, *(x.contiguous() for x in gated)) if gated else (o, lse, *[None] * 4)
    blocks = _block_tables(T, select_block_size, recent.blocks, packing)
    if _query_outer(q, k, v, G):
        heads = min(max(_power_of_2(G), 16), 64)
        tiles = dict(_QUERY_TILES, HEADS=heads, num_warps=heads // 16 * (2 if D > 128 else 1))
        tiles["KEYS"] = _key_tile(tiles["KEYS"], select_block_size)
        _selective_by_query(q, k, v, recent_part, block_indices, outputs, blocks, scale, tiles)
        return o, lse, mixed, []
    tiles = _selective_tiles("forward", D, select_block_size, q.dtype)
    chunk = _chunk_tokens(B * H * S * D * q.element_size(), T)
    o_part = torch.empty(Z * chunk * S * G, D, dtype=q.dtype, device=q.device)
    lse_part = torch.empty(Z * chunk * S * G, dtype=torch.float32, device=q.device)
    merge_rows = _merge_rows(D)
    constants = {"K": K, "G": G, "S": S, "D": D, "DP": _padded(D), "SELECT": blocks.size, "RECENT": blocks.recent}
    for t0 in range(0, T, chunk):
        n_tokens = min(chunk, T - t0)
        pairs = _sort_pairs(block_indices, t0, n_tokens, blocks)
        cut = _cut_tiles(pairs, Z, blocks.count, G, _FORWARD_SPAN)
        _selective_partial_kernel[(cut.bound, Z)](
            q, k, v, *cut[:3], o_part, lse_part, blocks.edges,
            T, blocks.count, cut.bound, n_tokens * S, t0, scale,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], **constants, SPAN=_FORWARD_SPAN, PRECISION=_precision(),
            **tiles,
        )  # fmt: skip
        _selective_merge_kernel[(_cdiv(n_tokens * G, merge_rows), Z)](
            o_part, lse_part, *recent_part, block_indices, *outputs, blocks.places, T, n_tokens, t0,
            *block_indices.stride()[:3], **constants, SP=_power_of_2(S), ROWS=merge_rows, UNROLL=_unroll(S),
        )  # fmt: skip
    keeps = _kept_pairs(q, K, S, select_block_size, [] if packing is None else packing.on_host)
    return o, lse, mixed, list(cut[:2]) if keeps else []


def _triton_selective_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, select_block_size: int, scale: float,
    packing: _Packing | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o (B, T, H, D) and lse (B, T, H): softmax over the tokens up to t of the blocks that t chose."""
    return _launch_selective([], q, k, v, block_indices, select_block_size, scale, _NOTHING_RECENT, (), packing)[:2]


def _triton_gated_selective(
    gates: Tensor, o_local: Tensor, o_compressed: Tensor, q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor,
    select_block_size: int, scale: float, *recent_part: Tensor, recent: _Recent = _NOTHING_RECENT,
    packing: _Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    """Gates where the last branch is written: the outputs of the others are read once, its own not at all."""
    selective = (q, k, v, block_indices, select_block_size, scale, recent, recent_part, packing)
    o, lse, mixed, kept = _launch_selective([gates, o_local, o_compressed], *selective)
    return mixed, o, lse, kept


# Selective, backward ──────────────────────────────────────────────────────────────────────────────────────────────────


@_kernel
def _selective_gradient_kernel(
    do, q, k, v, shift, delta, pairs, table, block_of, dq_part, dk_part, dv_part, edges,
    T, n_blocks, n_tiles, n_pairs, rows_pad, t0, scale,
    stride_db, stride_dt, stride_dh, stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    K: tl.constexpr, G: tl.constexpr, GROUP_PAD: tl.constexpr, S: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, SELECT: tl.constexpr,
    SPAN: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With p = exp(scale q . k - shift) and ds = p (do . v - delta): dv_part = p^T do, dk_part = scale ds^T q over a
    span of the rows that chose the block, and dq_part[t, s] = scale ds k. One program: KEYS keys, SPAN rows.
    """
    tile, part, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    j = tl.load(block_of + z.to(tl.int64) * n_tiles + tile)
    if j >= n_blocks:
        return
    first, row_first, row_last = _rows_of_tile(table + (z.to(tl.int64) * n_blocks + j) * 4, tile, G, SPAN)

    n = part * KEYS + tl.arange(0, KEYS)
    begin, end = _block_tokens(j, edges, T, SELECT)
    token = begin + n
    exists = (n < SELECT) & (token < end)
    b, h = (z // K).to(tl.int64), (z % K).to(tl.int64)
    keys = _load_tile(k + b * stride_kb + h * stride_kh, token, stride_kt, exists, D, DP)
    values = _load_tile(v + b * stride_vb + h * stride_vh, token, stride_vt, exists, D, DP)
    q_base = q + b * stride_qb + h * G * stride_qh
    do_base = do + b * stride_db + h * G * stride_dh
    shift_base, delta_base = shift + z.to(tl.int64) * rows_pad, delta + z.to(tl.int64) * rows_pad
    dq_base = dq_part + (z.to(tl.int64) * n_pairs * PARTS + part) * G * D
    dk = tl.zeros([KEYS, DP], tl.float32)
    dv = tl.zeros([KEYS, DP], tl.float32)
    row = row_first + tl.arange(0, ROWS)
    pair = tl.load(pairs + first + row // G, mask=row < row_last, other=0)
    for r in range(row_first, row_last, ROWS):
        # the queries that chose this block
        row = r + tl.arange(0, ROWS)
        row_mask = row < row_last
        t = tl.where(row_mask, t0 + pair // S, -1)
        term = (t0 + pair // S) * GROUP_PAD + row % G
        queries = _load_pair_rows(q_base, pair, row, row_mask, t0, stride_qt, stride_qh, G, S, D, DP)
        d_out = _load_pair_rows(do_base, pair, row, row_mask, t0, stride_dt, stride_dh, G, S, D, DP)
        shift_t = tl.load(shift_base + term, mask=row_mask, other=0.0)
        delta_t = tl.load(delta_base + term, mask=row_mask, other=0.0)

        # probabilities, transposed: (keys, rows)
        s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (scale * _TL_LOG2E)
        visible = exists[:, None] & (token[:, None] <= t[None, :])
        p = tl.where(visible, tl.exp2(s - shift_t[None, :]), 0.0)
        dv += tl.dot(p.to(d_out.dtype), d_out, input_precision=PRECISION)
        dp = tl.dot(values, tl.trans(d_out), input_precision=PRECISION)
        ds = (p * (dp - delta_t[None, :])).to(queries.dtype)
        dk += tl.dot(ds, queries, input_precision=PRECISION)
        dq = tl.trans(tl.dot(tl.trans(keys), ds, input_precision=PRECISION)) * scale
        _store_tile(dq_base, dq, pair * (PARTS * G) + row % G, D, row_mask, D, DP)
        # early: rows that are gathered by numbers of the same round would wait for them
        pair = tl.load(pairs + first + (row + ROWS) // G, mask=row + ROWS < row_last, other=0)

    out = ((z.to(tl.int64) * n_tiles + tile) * PARTS + part) * KEYS + tl.arange(0, KEYS)
    _store_tile(dk_part, dk * scale, out, D, exists, D, DP)
    _store_tile(dv_part, dv, out, D, exists, D, DP)


@_kernel
def _sum_over_tiles_kernel(
    dk_part, dv_part, table, dk, dv, edges, T, n_blocks, n_tiles,
    stride_kb, stride_kt, stride_kh,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SELECT: tl.constexpr, KEYS: tl.constexpr,
    PARTS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """dk[block j] = sum over the tiles of block j of dk_part, dv likewise; added to what they hold, where ADD."""
    j, part, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    entry = table + (z.to(tl.int64) * n_blocks + j) * 4
    n = part * KEYS + tl.arange(0, KEYS)
    begin, end = _block_tokens(j, edges, T, SELECT)
    token = begin + n
    exists = (n < SELECT) & (token < end)
    base = (z // K).to(tl.int64) * stride_kb + (z % K).to(tl.int64) * stride_kh
    dk_sum = tl.zeros([KEYS, DP], tl.float32)
    dv_sum = tl.zeros([KEYS, DP], tl.float32)
    if ADD:
        dk_sum += _load_tile(dk + base, token, stride_kt, exists, D, DP)
        dv_sum += _load_tile(dv + base, token, stride_kt, exists, D, DP)
    for tile in range(tl.load(entry + 2), tl.load(entry + 3)):
        source = ((z.to(tl.int64) * n_tiles + tile) * PARTS + part) * KEYS + tl.arange(0, KEYS)
        dk_sum += _load_tile(dk_part, source, D, exists, D, DP)
        dv_sum += _load_tile(dv_part, source, D, exists, D, DP)
    _store_tile(dk + base, dk_sum, token, stride_kt, exists, D, DP)
    _store_tile(dv + base, dv_sum, token, stride_kt, exists, D, DP)


@_kernel
def _sum_over_slots_kernel(
    dq_part, block_indices, dq, places, n_tokens, t0, stride_ib, stride_it, stride_ik, stride_qb, stride_qt, stride_qh,
    K: tl.constexpr, G: tl.constexpr, S: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, SELECT: tl.constexpr,
    RECENT: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """dq[t] = sum_s dq_part[t, s], over the slots that hold a block; added to what dq holds, where ADD."""
    z = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # (token, head)
    row_mask = row < n_tokens * G
    t = t0 + row // G
    position = _position(t, places, row_mask)
    blocks = block_indices + (z // K).to(tl.int64) * stride_ib + (z % K) * stride_ik
    d = tl.arange(0, DP)
    part = (z.to(tl.int64) * n_tokens + row // G) * (S * PARTS * G) + row % G  # slot 0; the next one is G further
    head = (z % K) * G + row % G
    out = (z // K).to(tl.int64) * stride_qb + t.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh
    out_mask = row_mask[:, None] & (d < D)[None, :]
    total = tl.zeros([ROWS, DP], tl.float32)
    if ADD:
        total += tl.load(dq + out[:, None] + d[None, :], mask=out_mask, other=0.0).to(tl.float32)
    for slot in tl.range(0, S * PARTS, loop_unroll_factor=UNROLL):
        block = tl.load(blocks + t.to(tl.int64) * stride_it + slot // PARTS, mask=row_mask, other=-1)
        mask = _counts(block, position, SELECT, RECENT)[:, None] & (d < D)[None, :]
        dq_slot = tl.load(dq_part + (part + slot * G)[:, None] * D + d[None, :], mask=mask, other=0.0)
        total += dq_slot.to(tl.float32)
    tl.store(dq + out[:, None] + d[None, :], total.to(dq.dtype.element_ty), mask=out_mask)


def _triton_selective_backward(
    do: Tensor,
    terms: _RowTerms,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    select_block_size: int,
    scale: float,
    dq: Tensor | None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    sorted_pairs: list[Tensor] | None = None,
    recent: _Recent = _NOTHING_RECENT,
    packing: _Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. No atomics: each block's sums are made by programs of its own, in a fixed order.

    They are added to what is given, in place where that is possible. `sorted_pairs` are those that the forward kept.
    Recent blocks are left out: the local branch does them.
    """
    block_indices = recent.others(block_indices)
    B, T, H, D = q.shape
    K, S = block_indices.shape[2:]
    G, Z, DP = H // K, B * K, _padded(D)
    do, q, k, v, block_indices = (_unit_stride(x) for x in (do, q, k, v, block_indices))
    add_dq, add_dk = dq is not None, dk is not None
    dq = dq if add_dq else torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    blocks = _block_tables(T, select_block_size, recent.blocks, packing)
    tiles = _selective_tiles("backward", D, select_block_size, q.dtype)
    if _large_group(q, G) and DP <= 128:
        tiles["num_stages"] = _LARGE_GROUP_STAGES
    parts = _cdiv(select_block_size, tiles["KEYS"])
    span = _SPAN[q.dtype.itemsize]
    chunk = _chunk_tokens(B * H * S * parts * D * q.element_size(), T)
    # a sum over several chunks of queries stays in float32 until the last
    sum_dtype = k.dtype if chunk == T else torch.float32
    empty = (torch.empty(B, T, K, D, dtype=sum_dtype, device=q.device) for _ in range(2))
    dk, dv = (dk.to(sum_dtype), dv.to(sum_dtype)) if add_dk else empty
    dq_part = torch.empty(Z * chunk * S * parts * G, D, dtype=q.dtype, device=q.device)
    merge_rows = _merge_rows(D)
    constants = {"K": K, "D": D, "DP": DP, "SELECT": select_block_size, "PARTS": parts}
    for t0 in range(0, T, chunk):
        n_tokens = min(chunk, T - t0)
        if sorted_pairs:
            pairs = _Pairs(*sorted_pairs, stride=4, column=1)  # the forward's table
        else:
            pairs = _sort_pairs(block_indices, t0, n_tokens, blocks)
        cut = _cut_tiles(pairs, Z, blocks.count, G, span)
        rows = Z * cut.bound * parts * tiles["KEYS"]
        dk_part, dv_part = torch.empty(2, rows, D, dtype=torch.float32, device=q.device)
        _selective_gradient_kernel[(cut.bound, parts, Z)](
            do, q, k, v, *terms, *cut[:3], dq_part, dk_part, dv_part, blocks.edges,
            T, blocks.count, cut.bound, n_tokens * S, terms.shift.shape[-1], t0, scale,
            *do.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            **constants, G=G, GROUP_PAD=_group_pad(G), S=S, SPAN=span, PRECISION=_precision(), **tiles,
        )  # fmt: skip
        _sum_over_tiles_kernel[(blocks.count, parts, Z)](
            dk_part, dv_part, cut.table, dk, dv, blocks.edges, T, blocks.count, cut.bound, *dk.stride()[:3],
            **constants, KEYS=tiles["KEYS"], ADD=add_dk or t0 > 0,
        )  # fmt: skip
        _sum_over_slots_kernel[(_cdiv(n_tokens * G, merge_rows), Z)](
            dq_part, block_indices, dq, blocks.places, n_tokens, t0, *block_indices.stride()[:3], *dq.stride()[:3],
            **constants, G=G, S=S, RECENT=blocks.recent, ROWS=merge_rows, ADD=add_dq, UNROLL=_unroll(S * parts),
        )  # fmt: skip
    return dq, dk.to(k.dtype), dv.to(v.dtype)


# Decoding: split keys ─────────────────────────────────────────────────────────────────────────────────────────────────
#
# A step of M new tokens, mostly 1, is bound by reading keys. A row is one new token and one key head, numbered
# (b·M + m)·K + k; the heads of its group are a tile. Its keys are split into parts, so many that all multiprocessors
# read; a part writes an output and a log-sum-exp of its own:
#
#     compressed  parts of the visible blocks, and from the same scores the importance of the selection blocks
#     choose      the S blocks of each row; beside it, parts of the local window, which wait for no choice
#     attend      parts of the S slots; each merges the other branches' parts while its blocks are on their way, and the
#                 one of a row that is done last adds those of the slots: a softmax in each branch, and the gates
#
# How many parts there are depends on shapes alone, how long they are on the row's position, which only the GPU knows.
# A row of position −1 sees nothing: each part has lse = −inf, and o = 0. Log-sum-exp and scores are to the base 2.

_DECODE_COUNTS = ["m0", "n_tokens", "n_compressed", "first_part", "n_parts"]  # no new kernel for each number of rows


@_kernel
def _decode_row(row, positions, strides, m0, n_tokens, K: tl.constexpr):
    """A row's sequence, token, key head and position."""
    b, m = (row // K // n_tokens).to(tl.int64), (m0 + row // K % n_tokens).to(tl.int64)
    return b, m, row % K, tl.load(positions + b * strides[0] + m * strides[1])


@_kernel
def _decode_begin(
    q, k, v, q_strides, k_strides, v_strides, b, m, h,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """What a part starts from: heads of the group, their queries, where the keys and values lie, an empty softmax."""
    g = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    queries = _load_tile(q + b * q_strides[0] + m * q_strides[1] + h * G * q_strides[2], g, q_strides[2], g < G, D, DP)
    k_base, v_base = k + b * k_strides[0] + h * k_strides[2], v + b * v_strides[0] + h * v_strides[2]
    acc, total = tl.zeros([HEADS, DP], tl.float32), tl.zeros([HEADS, KEYS], tl.float32)
    return g, queries, k_base, v_base, acc, tl.full([HEADS], float("-inf"), tl.float32), total


@_kernel
def _decode_share(tiles, part, parts):
    """The tiles of a part: [begin, end)."""
    return tiles * part // parts, tiles * (part + 1) // parts


@_kernel
def _decode_tile(
    acc, peak, total, queries, k_base, v_base, key, seen, stride_k, stride_v, scale,
    D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys of the online softmax: p = exp2(scale q.k - peak), acc += p.v, total += p; and p itself.

    `total` stays apart by the places of a tile's keys, as a sum over them would make the warps wait for each other.
    """
    keys = _load_tile(k_base, key, stride_k, seen, D, DP)
    s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (scale * _TL_LOG2E)
    s = tl.where(seen[None, :], s, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(s, axis=1))
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(s - shift[:, None])
    fade = tl.exp2(peak - shift)
    values = _load_tile(v_base, key, stride_v, seen, D, DP)
    acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
    return acc, new_peak, total * fade[:, None] + p, p


@_kernel
def _decode_end(
    acc, peak, total, o_part, lse_part, row, part, parts, g, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """o_part[row, part, g] = acc / l, lse_part[row, part, g] = peak + log2 l, l = sum total: 0, -inf without a key."""
    total = tl.sum(total, axis=1)
    out = (row.to(tl.int64) * parts + part) * G + g
    _store_tile(o_part, acc / tl.where(total > 0, total, 1.0)[:, None], out, D, g < G, D, DP)
    tl.store(lse_part + out, peak + tl.log2(total), mask=g < G)


@_kernel
def _lent(lent, row, tile, right, g, n_scores, G: tl.constexpr, BLOCKS: tl.constexpr, SPILL: tl.constexpr):
    """Where a tile lends to block `right` of the next one: heads side by side, as lone numbers are slow to write."""
    return lent + ((row.to(tl.int64) * (n_scores // BLOCKS) + tile) * SPILL + right) * G + g


@_kernel(do_not_specialize=_DECODE_COUNTS)
def _decode_compressed_kernel(
    q, k_cmp, v_cmp, positions, o_part, lse_part, scores, lent, arrived, m0, n_tokens, n_parts, n_scores, scale,
    q_strides, k_strides, v_strides, position_strides,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr,
    HEADS: tl.constexpr, BLOCKS: tl.constexpr, PART: tl.constexpr, SPILL: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A part of softmax(q . k_cmp) v_cmp, and scores[row, g, j] = log2 sum_i overlap(i, j) exp2(scale q[g] . k_cmp[i]).

    A tile has the keys of BLOCKS selection blocks. What its last ones lend to the next tile's first SPILL is in lent.
    It also sets arrived to 0, where the last kernel counts.
    """
    r: tl.constexpr = SELECT // STRIDE
    row, part = tl.program_id(0), tl.program_id(1)
    if part == 0:
        tl.store(arrived + row * tl.num_programs(2) + tl.program_id(2), 0)
    b, m, h, t = _decode_row(row, positions, position_strides, m0, n_tokens, K)
    g, queries, k_base, v_base, acc, peak, total = _decode_begin(
        q, k_cmp, v_cmp, q_strides, k_strides, v_strides, b, m, h, G, D, DP, HEADS, BLOCKS * PART
    )
    end = _span_end(t, BLOCK, STRIDE)
    begin_tile, end_tile = _decode_share(tl.cdiv(end, BLOCKS * r), part, tl.num_programs(1))
    column, jj = tl.arange(0, BLOCKS * PART), tl.arange(0, BLOCKS)
    score_rows = ((row.to(tl.int64) * G + g) * n_scores)[:, None]
    for tile in tl.range(begin_tile, end_tile, num_stages=STAGES):
        i = (tile * BLOCKS + column // PART) * r + column % PART
        seen = (column % PART < r) & (i < end)
        acc, peak, total, p = _decode_tile(
            acc, peak, total, queries, k_base, v_base, i, seen, k_strides[1], v_strides[1], scale, D, DP, PRECISION
        )
        score, beyond = _fold_importance(p, 0, BLOCK // STRIDE, r, HEADS, BLOCKS, PART, SPILL)
        j = (tile * BLOCKS + jj)[None, :]
        score = peak[:, None] + tl.log2(score)  # to stay in the L2 for the next kernel while keys pass by
        tl.store(scores + score_rows + j, score, mask=(g < G)[:, None], eviction_policy="evict_last")
        if SPILL > 0:
            to_lend = _lent(lent, row, tile, jj[None, :], g[:, None], n_scores, G, BLOCKS, SPILL)
            beyond, mask = peak[:, None] + tl.log2(beyond), (g < G)[:, None] & (jj < SPILL)[None, :]
            tl.store(to_lend, beyond, mask=mask, eviction_policy="evict_last")
    _decode_end(acc, peak, total, o_part, lse_part, row, part, n_parts, g, G, D, DP)


@_kernel
def _decode_score(
    lse_part, scores, lent, row, tiles, n_compressed, n_parts, n_scores, G: tl.constexpr, PARTS_PAD: tl.constexpr,
    BLOCKS: tl.constexpr, SPILL: tl.constexpr, HEADS: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """score[j] = sum_g exp2(scores[row, g, j] - lse[g]), and the same of what is lent; lse over the parts: (NP,)."""
    j, part = tl.arange(0, NP)[None, :], tl.arange(0, PARTS_PAD)[None, :]
    NT: tl.constexpr = NP // BLOCKS  # tiles; the first one borrows nothing
    tile, jj = tl.arange(0, max(NT, 1))[None, :], tl.arange(0, BLOCKS)[None, :]
    score = tl.zeros([NP], tl.float32)
    for first in range(0, G, HEADS):
        g = first + tl.arange(0, HEADS)[:, None]
        mask = (g < G) & (j < tiles * BLOCKS)
        own = scores + (row.to(tl.int64) * G + g) * n_scores + j
        own = tl.load(own, mask=mask, other=float("-inf"), eviction_policy="evict_first")  # before it waits for lse
        lse = lse_part + (row.to(tl.int64) * n_parts + part) * G + g
        lse = tl.load(lse, mask=(g < G) & (part < n_compressed), other=float("-inf"))
        top = tl.max(lse, axis=1)
        top = tl.where(top == float("-inf"), 0.0, top)
        lse = (top + tl.log2(tl.sum(tl.exp2(lse - top[:, None]), axis=1)))[:, None]
        score += tl.sum(tl.where(own == float("-inf"), 0.0, tl.exp2(own - lse)), axis=0)
        for right in tl.static_range(SPILL if NT > 1 else 0):
            borrows = (g < G) & (tile > 0) & (tile <= tiles)
            left = _lent(lent, row, tile - 1, right, g, n_scores, G, BLOCKS, SPILL)
            left = tl.load(left, mask=borrows, other=float("-inf"), eviction_policy="evict_first")
            left = tl.sum(tl.where(left == float("-inf"), 0.0, tl.exp2(left - lse)), axis=0)
            score += tl.reshape(tl.where(jj == right, left[:, None], 0.0), [NP])
    return score


@_kernel(do_not_specialize=_DECODE_COUNTS)
def _decode_choose_kernel(
    q, k, v, positions, o_part, lse_part, scores, lent, chosen,
    m0, n_tokens, n_compressed, n_parts, n_scores, scale,
    q_strides, k_strides, v_strides, position_strides,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr, BLOCKS: tl.constexpr, SPILL: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, NP: tl.constexpr, SCORED: tl.constexpr,
    WINDOW: tl.constexpr, PARTS_PAD: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program 0 of a row: chosen[row] = its S highest blocks. The others: a part of softmax(q . k) v in its window."""
    row, part = tl.program_id(0), tl.program_id(1) - 1
    b, m, h, t = _decode_row(row, positions, position_strides, m0, n_tokens, K)
    if part >= 0:
        g, queries, k_base, v_base, acc, peak, total = _decode_begin(
            q, k, v, q_strides, k_strides, v_strides, b, m, h, G, D, DP, HEADS, KEYS
        )
        first, end = _span_first(t, WINDOW), _span_end(t, 1, 1)
        begin_tile, end_tile = _decode_share(tl.cdiv(end - first, KEYS), part, tl.num_programs(1) - 1)
        for tile in tl.range(begin_tile, end_tile, num_stages=STAGES):
            s = first + tile * KEYS + tl.arange(0, KEYS)
            acc, peak, total, _ = _decode_tile(
                acc, peak, total, queries, k_base, v_base, s, s < end, k_strides[1], v_strides[1], scale,
                D, DP, PRECISION,
            )  # fmt: skip
        _decode_end(acc, peak, total, o_part, lse_part, row, n_compressed + part, n_parts, g, G, D, DP)
    elif tl.program_id(2) == 0:
        tiles = tl.cdiv(_span_end(t, BLOCK, STRIDE), BLOCKS * (SELECT // STRIDE))
        score = _decode_score(
            lse_part, scores, lent, row, tiles, n_compressed, n_parts, n_scores,
            G, PARTS_PAD, BLOCKS, SPILL, SCORED, NP,
        )  # fmt: skip
        one = tl.arange(0, 1)
        _store_highest(
            score[None, :], one + t // SELECT, one + t >= 0, chosen + (one + row).to(tl.int64) * S,
            S, SP, INIT, LOCAL, 1, NP,
        )  # fmt: skip


@_kernel
def _decode_gates(gates, strides, b, m, heads, exists):
    """The gates of the local, the compressed and the selective branch."""
    base = gates + b * strides[0] + m * strides[1] + heads * strides[2]
    local, compressed = _load_gate(base, exists), _load_gate(base + strides[3], exists)
    return local, compressed, _load_gate(base + 2 * strides[3], exists)


@_kernel
def _decode_weights(lse_part, rows, first, end, gate, exists, G: tl.constexpr, PARTS_PAD: tl.constexpr):
    """weight[g, n] = gate exp2(lse_part[n] - lse) for the parts [first, end) of a branch, lse their log-sum; else 0."""
    part = tl.arange(0, PARTS_PAD)[None, :]
    mask = exists[:, None] & (part >= first) & (part < end)
    lse = tl.load(lse_part + rows[:, None] + part * G, mask=mask, other=float("-inf"))
    top = tl.max(lse, axis=1)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top)[:, None])
    # the sum is 0 or, as its largest term is 1, at least 1
    return weight * (gate / tl.maximum(tl.sum(weight, axis=1), 1.0))[:, None]


@_kernel
def _decode_merge(
    merged, o_part, weight, rows, first, end, exists,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PARTS_PAD: tl.constexpr,
):  # fmt: skip
    """merged + sum_n weight[g, n] o_part[n] over the parts [first, end)."""
    for n in tl.range(first, end, loop_unroll_factor=4):
        of_part = tl.sum(tl.where(tl.arange(0, PARTS_PAD)[None, :] == n, weight, 0.0), axis=1)
        merged += of_part[:, None] * _load_tile(o_part, rows + n * G, D, exists, D, DP)
    return merged


@_kernel(do_not_specialize=_DECODE_COUNTS)
def _decode_attend_kernel(
    q, k, v, positions, o_part, lse_part, chosen, arrived, gates, o,
    m0, n_tokens, n_compressed, first_part, n_parts, scale,
    q_strides, k_strides, v_strides, position_strides, gate_strides, o_strides,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    S: tl.constexpr, SP: tl.constexpr, SELECT: tl.constexpr, SELECT_PAD: tl.constexpr, PARTS_PAD: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A part of softmax(q . k) v over the tokens up to t of the chosen blocks; a slot is SELECT_PAD keys long.

    The part of a row that is done last writes o[row], all branches merged.
    """
    row, part = tl.program_id(0), tl.program_id(1)
    b, m, h, t = _decode_row(row, positions, position_strides, m0, n_tokens, K)
    g, queries, k_base, v_base, acc, peak, total = _decode_begin(
        q, k, v, q_strides, k_strides, v_strides, b, m, h, G, D, DP, HEADS, KEYS
    )
    slot = tl.arange(0, SP)
    taken = tl.minimum((t + SELECT) // SELECT, S)  # slots that hold a block: as many blocks as have begun
    blocks = tl.load(chosen + row.to(tl.int64) * S + slot, mask=slot < taken, other=-1)
    begin_tile, end_tile = _decode_share(tl.cdiv(taken * SELECT_PAD, KEYS), part, tl.num_programs(1))
    # the other branches meanwhile
    rows, exists = row.to(tl.int64) * n_parts * G + g, g < G  # of part 0; the next one is G further
    local, compressed, gate = _decode_gates(gates, gate_strides, b, m, h * G + g, exists)
    weight = _decode_weights(lse_part, rows, 0, n_compressed, compressed, exists, G, PARTS_PAD)
    weight += _decode_weights(lse_part, rows, n_compressed, first_part, local, exists, G, PARTS_PAD)
    merged = tl.zeros([HEADS, DP], tl.float32)
    merged = _decode_merge(merged, o_part, weight, rows, 0, first_part, exists, G, D, DP, PARTS_PAD)
    for tile in tl.range(begin_tile, end_tile, num_stages=STAGES):
        n = tile * KEYS + tl.arange(0, KEYS)
        of_slot = (n // SELECT_PAD)[:, None] == slot[None, :]
        j = tl.max(tl.where(of_slot, blocks[None, :], -1), axis=1)  # no load, so that those of keys can run far ahead
        s = j * SELECT + n % SELECT_PAD
        seen = (j >= 0) & (n % SELECT_PAD < SELECT) & (s <= t)
        acc, peak, total, _ = _decode_tile(
            acc, peak, total, queries, k_base, v_base, s, seen, k_strides[1], v_strides[1], scale, D, DP, PRECISION
        )
    o_base = o + b * o_strides[0] + m * o_strides[1]
    parts = tl.num_programs(1)
    if parts == 1:
        sums = tl.sum(total, axis=1)
        merged += acc * (gate / tl.where(sums > 0, sums, 1.0))[:, None]
        _store_tile(o_base, merged, h * G + g, o_strides[2], exists, D, DP)
    else:
        _decode_end(acc, peak, total, o_part, lse_part, row, first_part + part, n_parts, g, G, D, DP)
        tl.debug_barrier()  # every thread has written
        place = arrived + row * tl.num_programs(2) + tl.program_id(2)
        if tl.atomic_add(place, 1, sem="acq_rel", scope="gpu") == parts - 1:  # what the others wrote can be read
            weight = _decode_weights(lse_part, rows, first_part, n_parts, gate, exists, G, PARTS_PAD)
            merged = _decode_merge(merged, o_part, weight, rows, first_part, n_parts, exists, G, D, DP, PARTS_PAD)
            _store_tile(o_base, merged, h * G + g, o_strides[2], exists, D, DP)


def _decode_obstacle(block_size: int, stride: int, select_block_size: int) -> str | None:
    """Why decoding has no kernel for such blocks; None if it has."""
    ratio, spill = _spill(block_size, stride, select_block_size)
    if _power_of_2(ratio) * _power_of_2(max(spill, 1)) <= _DECODE_MAX_KEYS:
        return None
    return f"for l/d/l' = {block_size}/{stride}/{select_block_size} the importance takes more keys than fit in a tile"


def _decode_tiles(kernel: str, D: int, dtype: torch.dtype) -> dict[str, int]:
    width = 128 if _padded(D) <= 128 else 256
    return dict(_DECODE_TILES[kernel, dtype.itemsize, width])


def _triton_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_local: Tensor,
    v_local: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    positions: Tensor,
    *,
    local_window: int,
    block_size: int,
    stride: int,
    select_block_size: int,
    topk_blocks: int,
    init_blocks: int,
    local_blocks: int,
    scale: float,
) -> Tensor:
    """o (B, M, H, D): all branches and gates, for M new tokens a row over buffers that hold their keys already."""
    B, M, H, D = q.shape
    K, S = k.shape[2], topk_blocks
    G = H // K
    o = torch.empty(B, M, H, D, dtype=q.dtype, device=q.device)
    if o.numel() == 0:
        return o
    q, k, v, k_local, v_local, k_cmp, v_cmp = map(_unit_stride, (q, k, v, k_local, v_local, k_cmp, v_cmp))
    heads = min(max(_power_of_2(G), 16), _DECODE_HEADS[q.dtype.itemsize])
    head_blocks = _cdiv(G, heads)
    tiles = {name: _decode_tiles(name, D, q.dtype) for name in ("compressed", "local", "selected")}
    programs = [tiles[name].pop("PROGRAMS") * _processors(q.device) for name in tiles]

    # scores: tiles of BLOCKS selection blocks, each of PART compressed ones
    ratio, spill = _spill(block_size, stride, select_block_size)
    part = _power_of_2(ratio)
    blocks = max(tiles["compressed"].pop("KEYS") // part, _power_of_2(max(spill, 1)))
    score_tiles = _cdiv(k_cmp.shape[1], blocks * ratio)
    n_scores = score_tiles * blocks
    select_pad = _power_of_2(select_block_size)
    most = (
        score_tiles,
        _cdiv(min(local_window, k.shape[1]), tiles["local"]["KEYS"]),
        _cdiv(S * select_pad, tiles["selected"]["KEYS"]),
    )
    NP = _power_of_2(max(_cdiv(k.shape[1], select_block_size), S))
    tiles["local"]["num_warps"] = max(tiles["local"]["num_warps"], min(NP // 512, 16))

    chunk = min(max(_DECODE_BYTES // (4 * B * H * (2 * n_scores + 3 * D)), 1), M)
    rows = B * chunk * K
    parts = [max(min(p // (rows * head_blocks), m, _DECODE_MAX_PARTS), 1) for p, m in zip(programs, most, strict=True)]
    n_parts, (n_compressed, n_local, n_selected) = sum(parts), parts
    o_part = torch.empty(rows * n_parts * G * D, dtype=torch.float32, device=q.device)
    lse_part = torch.empty(rows * n_parts * G, dtype=torch.float32, device=q.device)
    scores = torch.empty(rows * G * n_scores, dtype=torch.float32, device=q.device)
    lent = torch.empty(rows * G * score_tiles * spill, dtype=torch.float32, device=q.device)
    chosen, arrived = (torch.empty(rows * n, dtype=torch.int32, device=q.device) for n in (S, head_blocks))
    attend = {"K": K, "G": G, "D": D, "DP": _padded(D), "HEADS": heads, "PRECISION": _precision()}
    blocked = {"BLOCK": block_size, "STRIDE": stride, "SELECT": select_block_size, "BLOCKS": blocks, "SPILL": spill}
    slots = {"S": S, "SP": _power_of_2(S)}
    for m0 in range(0, M, chunk):
        n_tokens = min(chunk, M - m0)
        rows = B * n_tokens * K
        _decode_compressed_kernel[(rows, n_compressed, head_blocks)](
            q, k_cmp, v_cmp, positions, o_part, lse_part, scores, lent, arrived, m0, n_tokens, n_parts, n_scores, scale,
            q.stride(), k_cmp.stride(), v_cmp.stride(), positions.stride(),
            **attend, **blocked, PART=part, **tiles["compressed"],
        )  # fmt: skip
        _decode_choose_kernel[(rows, 1 + n_local, head_blocks)](
            q, k_local, v_local, positions, o_part, lse_part, scores, lent, chosen,
            m0, n_tokens, n_compressed, n_parts, n_scores, scale,
            q.stride(), k_local.stride(), v_local.stride(), positions.stride(),
            **attend, **blocked, **slots, INIT=init_blocks, LOCAL=local_blocks, NP=NP,
            SCORED=max(min(_power_of_2(G), 16384 // NP), 1), WINDOW=min(local_window, _FAR),
            PARTS_PAD=_power_of_2(n_compressed), **tiles["local"],
        )  # fmt: skip
        _decode_attend_kernel[(rows, n_selected, head_blocks)](
            q, k, v, positions, o_part, lse_part, chosen, arrived, gates, o,
            m0, n_tokens, n_compressed, n_compressed + n_local, n_parts, scale,
            q.stride(), k.stride(), v.stride(), positions.stride(), gates.stride(), o.stride(),
            **attend, **slots, SELECT=select_block_size, SELECT_PAD=select_pad, PARTS_PAD=_power_of_2(n_parts),
            **tiles["selected"],
        )  # fmt: skip
    return o


@_once
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _triton_obstacle(q: Tensor, k: Tensor, scale: float) -> str | None:
    """Why the Triton kernels cannot run on such queries and keys; None if they can."""
    if triton is None:
        return "Triton is not installed, or older than 3.4"
    dtypes = [torch.float16, torch.float32] + [torch.bfloat16] * q.is_cuda  # its interpreter gets bfloat16 wrong
    if q.dtype not in dtypes:
        return f"there is no kernel for {q.dtype} on {q.device.type}"
    if q.shape[-1] > 256:
        return f"the head dim is {q.shape[-1]}, and the kernels go to 256"
    if q.shape[0] * k.shape[2] > 65535:
        return f"there are {q.shape[0]} × {k.shape[2]} key heads, and a GPU's grid takes 65535"
    if scale <= 0:
        return f"scale is {scale}, and the kernels take positive ones only"
    if q.is_cuda:
        return "the GPU is older than sm_80" if _capability(q.device) < (8, 0) else None
    interpreted = _INTERPRETED and q.device.type == "cpu"
    return None if interpreted else f"the tensors are on {q.device.type}, and TRITON_INTERPRET=1 is not set"


_BACKENDS["triton"] = _Backend(
    _Branch(_triton_local_forward, _triton_local_backward),
    _Branch(_triton_compressed_forward, _triton_compressed_backward),
    _Branch(_triton_selective_forward, _triton_selective_backward),
    _triton_select,
    _taken_over,
    _triton_gated_selective,
    _kept_pairs,
    _triton_row_terms,
    _triton_gated_row_terms,
    _triton_decode,
)


# End of Part II


if __name__ == "__main__":
    raise SystemExit(_main())
