"""Inference with a cache: every split against one forward, ragged rows, truncate, reorder, reset, and bad input."""

from __future__ import annotations

import copy
import pickle
import random as python_random
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import pytest
import torch
from cases import (
    BASE,
    CONFIGS,
    PAPER,
    Random,
    build,
    build_block,
    draw_config,
    edges,
    every_config,
    every_config_with,
    interpreted,
    needs_triton,
    slow,
    surround,
    whether_the_host_reads,
)
from conftest import assert_close64, assert_within_budget
from torch import Tensor, nn

import native_sparse_attention as nsa
from native_sparse_attention import NativeSparseAttention, NSABlock, NSACache, NSAConfig


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    """A cache serves inference, and refuses to be called where a gradient is wanted."""
    with torch.no_grad():
        yield


def room(attention: NativeSparseAttention, batch: int, max_len: int = 64, **options: Any) -> NSACache:
    return NSACache(attention.cfg, batch, max_len, **{"dtype": torch.float64} | options)


def pieces(pick: python_random.Random, total: int) -> list[int]:
    """Random lengths, many of them 1, that add up to the total."""
    lengths = []
    while total > 0:
        lengths.append(min(total, pick.choice([1, 1, 1, 2, 3, 5, 8, 24])))
        total -= lengths[-1]
    return lengths


def feed(module: nn.Module, cache: NSACache, x: Tensor, lengths: list[int]) -> Tensor:
    """Outputs of x (B, T, dim), piece by piece."""
    return torch.cat([module(part, cache=cache) for part in x.split(lengths, dim=1)], dim=1)


def padded(pick: python_random.Random, x: Tensor, starts: tuple[int, ...], counts: list[int]) -> tuple[Tensor, Tensor]:
    """The next `counts` tokens of each row of x with padding left, right or in between, which is NaN; and the mask."""
    columns = max(counts) + pick.choice([0, 0, 3])
    rows, mask = torch.full((len(counts), columns, x.shape[2]), torch.nan, dtype=x.dtype), []
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        left, right = torch.arange(columns) >= columns - count, torch.arange(columns) < count
        anywhere = torch.zeros(columns, dtype=torch.bool).index_fill(
            0, torch.tensor(pick.sample(range(columns), count), dtype=torch.int64), True
        )
        mask.append(pick.choice([left, right, anywhere]))
        rows[row, mask[-1]] = x[row, start : start + count]
    return rows, torch.stack(mask)


def append(
    module: nn.Module, cache: NSACache, x: Tensor, counts: list[int], pick: python_random.Random
) -> list[Tensor]:
    """Outputs of the next `counts` tokens of each row of x, which were padded on the way."""
    rows, mask = padded(pick, x, cache.lengths, counts)
    lengths = [length + count for length, count in zip(cache.lengths, counts, strict=True)]
    y = module(rows, cache=cache, key_padding_mask=mask)
    assert list(cache.lengths) == lengths
    assert not y[~mask].any(), "padding gives something else than 0"
    return [y[row, mask[row]] for row in range(len(counts))]


# ---------------------------------------------------------------------------------------------------------------------
# Any split is one forward
# ---------------------------------------------------------------------------------------------------------------------


@whether_the_host_reads
@every_config_with("seed", range(3))
def test_any_split_of_every_config(name: str, seed: int, random: Random) -> None:
    attention, x = build(random, **CONFIGS[name]), random((2, 64, 12))
    lengths = pieces(python_random.Random(seed), 64)
    assert_close64(feed(attention, room(attention, 2), x, lengths), attention(x).detach(), f"split in {lengths}")


@every_config
def test_one_by_one_from_the_first_token(name: str, random: Random) -> None:
    attention, x = build(random, **CONFIGS[name]), random((2, 40, 12))
    assert_close64(feed(attention, room(attention, 2), x, [1] * 40), attention(x).detach())


@whether_the_host_reads
@pytest.mark.parametrize("seed", range(40))
def test_random_configs_and_random_splits(seed: int, random: Random) -> None:
    """Rows that begin together, and ragged ones whose tokens come with padding."""
    pick = python_random.Random(seed)
    attention = draw_config(pick, random)
    batch, tokens = pick.choice([1, 2, 3]), pick.choice([1, 5, 18, 33, 64])
    x = random((batch, tokens, attention.cfg.dim))
    exact, lengths = attention(x).detach(), pieces(pick, tokens)
    assert_close64(feed(attention, room(attention, batch), x, lengths), exact, f"split in {lengths}")

    cache, outputs = room(attention, batch), [[] for _ in range(batch)]
    while min(cache.lengths) < tokens:
        counts = [min(tokens - length, pick.choice([0, 1, 1, 4, 20])) for length in cache.lengths]
        for row, output in enumerate(append(attention, cache, x, counts, pick)):
            outputs[row].append(output)
    assert_close64(torch.stack([torch.cat(row) for row in outputs]), exact, "ragged rows")


@pytest.mark.parametrize(
    "name, before", [("overlapping_conv1d", 0), ("small_selection_blocks", 5), ("paper_rope_bias", 37)]
)
def test_every_pair_of_pieces(name: str, before: int, random: Random) -> None:
    """Pieces that end before, at and after the edge of every kind of block."""
    attention, x = build(random, **CONFIGS[name]), random((1, 64, 12))
    exact = attention(x).detach()
    for length in range(1, 64 - before):
        cache = room(attention, 1)
        y = feed(attention, cache, x[:, : before + length + 1], [before] * (before > 0) + [length, 1])
        assert_close64(y, exact[:, : before + length + 1], f"{before} + {length} + 1 tokens")


@whether_the_host_reads
def test_a_stack_of_blocks(random: Random) -> None:
    """Ragged prompts, then a token at a time: what a language model does."""
    cfg, pick = NSAConfig(**BASE | PAPER, rope_theta=100.0), python_random.Random(0)
    layers = [NSABlock(cfg).double() for _ in range(3)]
    caches, x = [NSACache(cfg, 3, 64, dtype=torch.float64) for _ in layers], random((3, 50, 12))
    exact = nn.Sequential(*layers)(x).detach()
    for counts in ([20, 1, 33], *[[1, 1, 1]] * 12, [5, 0, 5], [0, 30, 0]):
        starts = caches[0].lengths
        rows, mask = padded(pick, x, starts, counts)
        for layer, cache in zip(layers, caches, strict=True):
            rows = layer(rows, cache=cache, key_padding_mask=mask)
        assert not rows[~mask].any()
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            assert_close64(rows[row, mask[row]], exact[row, start : start + count], f"row {row} from {start}")


@whether_the_host_reads
def test_packed_sequences_go_on_from_the_rows(random: Random) -> None:
    attention, x = build(random, **PAPER, rope_theta=50.0), random((3, 40, 12))
    exact, cache = attention(x).detach(), room(attention, 3)
    for counts in ([17, 0, 4], [1, 9, 1], [3, 5, 11]):
        spans = [slice(length, length + count) for length, count in zip(cache.lengths, counts, strict=True)]
        tokens = torch.cat([x[row, span] for row, span in enumerate(spans)])[None]
        cu_seqlens = torch.tensor([0, *counts]).cumsum(0).int()
        y = attention(tokens, cache=cache, cu_seqlens=cu_seqlens)
        assert_close64(y[0], torch.cat([exact[row, span] for row, span in enumerate(spans)]))
    assert cache.lengths == (21, 14, 16)


@whether_the_host_reads
def test_no_tokens_at_all(random: Random) -> None:
    attention, x = build(random, rope_theta=10.0), random((2, 14, 12))
    cache, exact, nobody = room(attention, 2), attention(x).detach(), torch.zeros(2, 3, dtype=torch.bool)
    for start in (0, 7):
        assert attention(x[:, :0], cache=cache).shape == (2, 0, 12)
        assert not attention(x[:, :3], cache=cache, key_padding_mask=nobody).any()
        assert cache.lengths == (start, start)
        assert_close64(attention(x[:, start : start + 7], cache=cache), exact[:, start : start + 7])


def test_a_full_cache_holds_all_of_max_len(random: Random) -> None:
    attention, x = build(random, block_size=6, stride=2), random((1, 23, 12))
    cache = room(attention, 1, max_len=23)
    assert_close64(feed(attention, cache, x, [20, 1, 1, 1]), attention(x).detach())
    with pytest.raises(ValueError, match=r"cache.lengths\[0\] = 23: must leave room for 1 more within max_len = 23"):
        attention(x[:, :1], cache=cache)


@pytest.mark.parametrize("name, value", [("use_flash", False), ("backend", "torch")])
def test_the_backend_may_change_between_steps(name: str, value: Any, random: Random) -> None:
    attention, x = build(random), random((1, 20, 12))
    cache = room(attention, 1)
    attention.cfg = copy.copy(attention.cfg)
    setattr(attention.cfg, name, value)
    assert_close64(feed(attention, cache, x, [15, 5]), attention(x).detach())


# ---------------------------------------------------------------------------------------------------------------------
# truncate, reorder, reset, copies
# ---------------------------------------------------------------------------------------------------------------------


@whether_the_host_reads
@every_config
def test_truncate_and_go_on_differently(name: str, random: Random) -> None:
    attention, x, other = build(random, **CONFIGS[name]), random((2, 40, 12)), random((2, 40, 12))
    cache = room(attention, 2)
    attention(x, cache=cache)
    for kept in (38, 21, 8, 3, 0):
        cache.truncate(kept)
        assert cache.lengths == (kept, kept)
        whole = torch.cat([x[:, :kept], other[:, kept:]], dim=1)
        y = feed(attention, cache, whole[:, kept:], [1, 39 - kept])
        assert_close64(y, attention(whole)[:, kept:].detach(), f"cut at {kept}")
        cache.truncate(kept)
        attention(x[:, kept:], cache=cache)


def test_a_copy_is_a_branch(random: Random) -> None:
    attention, x = build(random, rope_theta=10.0), random((2, 40, 12))
    cache, exact = room(attention, 2), attention(x).detach()
    attention(x[:, :25], cache=cache)
    attention(random((2, 30, 12)), cache=copy.deepcopy(cache))
    assert_close64(attention(x[:, 25:], cache=cache), exact[:, 25:])


@whether_the_host_reads
def test_truncate_each_row_by_itself(random: Random) -> None:
    """Speculative decoding: of 5 guesses, some are kept."""
    attention, x, pick = build(random, **PAPER, rope_theta=50.0), random((3, 50, 12)), python_random.Random(5)
    cache, exact = room(attention, 3), attention(x).detach()
    attention(x[:, :20], cache=cache)
    while min(cache.lengths) < 45:
        lengths = cache.lengths
        counts = [min(5, 50 - length) for length in lengths]
        kept = [length + pick.randint(0, count) for length, count in zip(lengths, counts, strict=True)]
        guesses = x.clone()
        for row, length in enumerate(kept):
            guesses[row, length:] = random((50 - length, 12))
        outputs = append(attention, cache, guesses, counts, pick)
        for row, (start, stop) in enumerate(zip(lengths, kept, strict=True)):
            assert_close64(outputs[row][: stop - start], exact[row, start:stop], f"row {row} from {start} to {stop}")
        cache.truncate(pick.choice([list, tuple, torch.tensor])(kept))
        assert cache.lengths == tuple(kept)


@whether_the_host_reads
@every_config_with("indices", [[2, 0, 1], [1, 1, 1], [0, 1, 2], [0, 2, 2]])
def test_reorder(name: str, indices: list[int], random: Random) -> None:
    attention, x, pick = build(random, **CONFIGS[name]), random((3, 40, 12)), python_random.Random(1)
    cache = room(attention, 3)
    append(attention, cache, x, [13, 22, 9], pick)
    cache.reorder(torch.tensor(indices) if indices[0] == 2 else indices)
    assert cache.lengths == tuple([13, 22, 9][source] for source in indices)
    x, starts = x[indices], cache.lengths
    exact = attention(x).detach()
    outputs = append(attention, cache, x, [11, 11, 11], pick)
    for row, start in enumerate(starts):
        assert_close64(outputs[row], exact[row, start : start + 11], f"row {row}")


def test_reset(random: Random) -> None:
    attention, x = build(random, **PAPER), random((2, 30, 12))
    cache = room(attention, 2)
    first = feed(attention, cache, x, [20, 10])
    cache.reset()
    assert cache.lengths == (0, 0)
    assert torch.equal(feed(attention, cache, x, [20, 10]), first)


@whether_the_host_reads
def test_rows_of_different_ages(random: Random) -> None:
    """One row starts anew while the other goes on."""
    attention, x, pick = build(random, rope_theta=10.0), random((2, 40, 12)), python_random.Random(2)
    cache, exact = room(attention, 2), attention(x).detach()
    attention(x[:, :20], cache=cache)
    cache.truncate([20, 0])
    outputs = append(attention, cache, x, [3, 16], pick)
    assert_close64(outputs[0], exact[0, 20:23])
    assert_close64(outputs[1], exact[1, :16])


# ---------------------------------------------------------------------------------------------------------------------
# Random use
# ---------------------------------------------------------------------------------------------------------------------

ROOM = 23  # tokens of a row, where blocks of no kind end
LAYOUTS = ("rows", "packed", "padded")
# Whether the host looks at values, and whether it may keep count: as on a CPU, after a call of compiled code there, as
# on a GPU, and as on a GPU where a step was captured in a graph.
KNOWLEDGE = {
    "reads": (True, True),
    "reads_but_forgets": (True, False),
    "counts": (False, True),
    "knows_nothing": (False, False),
}


class Use:
    """Random calls of a cache; plain lists of the tokens that each of its rows should hold, and one forward of them."""

    def __init__(
        self, exact: nn.Module, seed: int, random: Random, reads: bool, counts: bool, kernels: bool = False
    ) -> None:
        self.exact, self.reads, self.counts, self.kernels = exact, reads, counts, kernels
        self.module = copy.deepcopy(exact).float() if kernels else exact
        self.attention, dtype = getattr(self.module, "attn", self.module), next(self.module.parameters()).dtype
        self.cache, self.rows = room(self.attention, 3, ROOM, dtype=dtype), [[], [], []]
        self.pick, self.embeddings = python_random.Random(seed), random((30, self.attention.cfg.dim), dtype)

    @property
    def known(self) -> bool:
        return self.reads or self.cache._known is not None

    def call(self, counts: list[int], layout: str) -> Callable[[], list[Tensor]]:
        """A call with so many new tokens for each row, which returns the outputs of each."""
        self.new = [self.pick.choices(range(30), k=n) for n in counts]
        rows = [self.embeddings[new] for new in self.new]
        if layout == "packed":
            x, cu_seqlens = torch.cat(rows)[None], edges(counts)
            return lambda: self.module(x, cache=self.cache, cu_seqlens=cu_seqlens)[0].split(counts)
        if layout == "rows":
            x = torch.stack(rows)
            return lambda: list(self.module(x, cache=self.cache))
        x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        x, mask = padded(self.pick, x, (0, 0, 0), counts)
        outputs = lambda: self.module(x, cache=self.cache, key_padding_mask=mask)  # noqa: E731
        return lambda: [row[of_row] for row, of_row in zip(outputs(), mask, strict=True)]

    def append(self) -> None:
        layout, n = self.pick.choice(LAYOUTS), self.pick.choice([0, 1, 1, 1, 2, 3, 8, 20])
        self.append_tokens([n if layout == "rows" else self.pick.randint(0, n) for _ in self.rows], layout)

    def append_tokens(self, counts: list[int], layout: str) -> None:
        call, known = self.call(counts, layout), self.known and (layout == "rows" or self.reads)
        if known and any(len(row) + n > self.cache.max_len for row, n in zip(self.rows, counts, strict=True)):
            with pytest.raises(ValueError, match="must leave room for"):
                call()
            return
        for row, new, y in zip(self.rows, self.new, call(), strict=True):
            start = len(row)
            row.extend(new[: ROOM - start])  # where the host does not know that they are too many
            if not row[start:]:
                continue
            expected, what = self.forward(row)[start:], f"{layout}: {start} + {len(new)} tokens"
            if self.kernels:
                torch.testing.assert_close(y[: len(row) - start].double(), expected, rtol=1e-4, atol=1e-4)
            else:
                assert_close64(y[: len(row) - start], expected, what)

    def forward(self, row: list[int]) -> Tensor:
        """One forward of the PyTorch path in float64."""
        kernels = nsa._BACKENDS.pop("triton", None) if self.kernels else None
        y = self.exact(self.embeddings[row].double()[None])[0]
        if kernels:
            nsa._BACKENDS["triton"] = kernels
        return y

    def fail(self) -> None:
        """Half way, and at the door."""
        what = self.pick.choice(["to_out", "ffn", "dtype", "width"])
        call = self.call([2, 2, 2], "rows")
        if what in ("dtype", "width"):
            x = self.embeddings[:6].unflatten(0, (3, 2))
            x = x.half() if what == "dtype" else x[..., 1:]
            with pytest.raises(ValueError, match=r"x\.(dtype|shape)"):
                self.module(x, cache=self.cache)
            return

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        part = getattr(self.module, "ffn", self.attention.to_out) if what == "ffn" else self.attention.to_out
        handle = part.register_forward_hook(fail)
        with pytest.raises((KeyboardInterrupt, ValueError)):  # or there is no room
            call()
        handle.remove()

    def numbers(self, values: list[int]) -> tuple[list[int] | tuple[int, ...] | Tensor, bool]:
        """The values in some form, and whether bad ones among them are refused."""
        form = self.pick.choice([list, tuple, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)])
        values = form(values)
        return values, self.reads or not isinstance(values, Tensor)

    def truncate(self) -> None:
        lengths = [len(row) for row in self.rows]
        if self.pick.random() < 0.3:
            kept = [self.pick.randint(0, max(lengths))] * 3
            n, refuses = kept[0], True
        else:
            spread = self.pick.choice([0, 0, 0, 2])
            kept = [self.pick.randint(max(0, n - 6), n) + self.pick.randint(-spread, spread) for n in lengths]
            n, refuses = self.numbers(kept)
        too_many = self.known and any(n > length for n, length in zip(kept, lengths, strict=True))
        if refuses and (min(kept) < 0 or too_many):
            with pytest.raises(ValueError, match=r"n\[\d\] = "):
                self.cache.truncate(n)
            return
        self.cache.truncate(n)
        self.rows = [row[: max(0, n)] for row, n in zip(self.rows, kept, strict=True)]

    def reorder(self) -> None:
        low, high = self.pick.choice([(0, 2), (0, 2), (-1, 3)])
        sources = [self.pick.randint(low, high) for _ in self.rows]
        indices, refuses = self.numbers(sources)
        if refuses and (min(sources) < 0 or max(sources) > 2):
            with pytest.raises(ValueError, match=r"indices\[\d\] = "):
                self.cache.reorder(indices)
            return
        self.cache.reorder(indices)
        self.rows = [self.rows[min(max(i, 0), 2)][:] for i in sources]

    def reset(self) -> None:
        self.cache.reset()
        self.rows = [[], [], []]

    def copy(self) -> None:
        self.cache = self.pick.choice([copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])(self.cache)

    def go_on(self, calls: int) -> None:
        often = {self.append: 10, self.fail: 2, self.truncate: 4, self.reorder: 2, self.copy: 1, self.reset: 0.5}
        for call in self.pick.choices(list(often), list(often.values()), k=calls):
            call()
            lengths = tuple(map(len, self.rows))
            assert self.cache.lengths == lengths, call.__name__
            assert tuple(self.cache.seqlens.clamp(max=ROOM).tolist()) == lengths
            assert self.cache._known in (None, lengths), "the host counts wrongly"
            longest = lengths[0] if len(set(lengths)) == 1 else f"{min(lengths)}..{max(lengths)}"
            assert f"max_len={ROOM}, lengths={longest}," in repr(self.cache)
            if not self.counts:
                self.cache._know(None)


def assert_random_use(name: str, knowledge: str, seed: int, random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    make = (build, build_block)[seed % 2]
    use = Use(make(random, **CONFIGS[name]), seed, random, *KNOWLEDGE[knowledge])
    if not use.reads:
        monkeypatch.setattr(nsa, "_readable", lambda x: False)
    use.go_on(30)


@pytest.mark.parametrize("seed", [0, 1])
@every_config_with("knowledge", list(KNOWLEDGE))
def test_random_use(name: str, knowledge: str, seed: int, random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_random_use(name, knowledge, seed, random, monkeypatch)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["grouped_mlp", "paper_rope_bias", slow("rope_overlapping"), slow("separate_kv")])
def test_nothing_is_written_past_the_end(name: str, layout: str, random: Random, nobody_looks: None) -> None:
    """Where the host does not know that a cache is full: what had room stays, and the row goes on after a cut."""
    use = Use(build(random, **CONFIGS[name]), 0, random, reads=False, counts=False)
    cache, margins = use.cache, surround(use.cache)
    for counts in ([19, 15, 2], [3, 7, 0], [1, 1, 1], [2, 2, 2], [30, 0, 4], [1, 1, 1], [40, 40, 40]):
        use.append_tokens([counts[0]] * 3 if layout == "rows" else counts, layout)
        cache._know(None)
        assert cache.lengths == tuple(map(len, use.rows))
        for row, tokens in enumerate(use.rows):
            alone = room(use.attention, 1, ROOM)
            use.attention(use.embeddings[tokens][None], cache=alone)
            n, blocks = len(tokens), oracle.compressed_count(len(tokens), cache.cfg.block_size, cache.cfg.stride)
            assert_close64(cache.tokens[:, row, :n], alone.tokens[:, 0, :n], f"row {row}")
            assert_close64(cache.blocks[:, row, :blocks], alone.blocks[:, 0, :blocks], f"row {row}")
        for buffer, margin in margins.items():
            assert (margin == 7).all(), f"written outside of {buffer}"
    assert cache.lengths == (ROOM,) * 3
    cache.truncate(torch.tensor([ROOM, 11, 0]))
    use.rows = [use.rows[0], use.rows[1][:11], []]
    use.append_tokens([4] * 3, layout)


@pytest.fixture
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that the kernels can do is theirs."""
    kernels = nsa._BACKENDS["triton"]
    monkeypatch.setitem(nsa._BACKENDS, "triton", kernels._replace(preferred=lambda device: True))


@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # −inf − −inf, as on a GPU
@pytest.mark.parametrize("layout", [slow("rows"), slow("packed"), "padded"])
@pytest.mark.parametrize("name", ["paper_rope_bias", *map(slow, ("grouped_mlp", "rope_overlapping", "separate_kv"))])
def test_kernels_write_nothing_past_the_end(
    name: str, layout: str, random: Random, nobody_looks: None, poisoned: None, by_kernels: None
) -> None:
    """By tokens one at a time and many at a time; `conftest` checks that they stay within their arguments."""
    block = build_block(random, **CONFIGS[name] | {"topk_blocks": 12})
    use = Use(block, 0, random, reads=False, counts=False, kernels=True)
    margins = surround(use.cache)
    for counts in ([15, 9, 2], [1, 1, 1], [9, 2, 0], [1, 1, 1], [18, 0, 20]):
        use.append_tokens([counts[0]] * 3 if layout == "rows" else counts, layout)
        use.cache._know(None)
        assert use.cache.lengths == tuple(map(len, use.rows))
        for buffer, margin in margins.items():
            assert (margin == 7).all(), f"written outside of {buffer}"
    use.cache.truncate(torch.tensor([ROOM, 11, 0]))
    use.rows = [use.rows[0], use.rows[1][:11], []]
    use.append_tokens([1] * 3, layout)


@interpreted
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("seed", range(2))
@every_config_with("knowledge", list(KNOWLEDGE))
def test_random_use_of_kernels(
    name: str, knowledge: str, seed: int, random: Random, by_kernels: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of its own for each configuration."""
    exact = build_block(random, **CONFIGS[name] | {"topk_blocks": 12})
    use = Use(exact, 2 * list(CONFIGS).index(name) + seed, random, *KNOWLEDGE[knowledge], kernels=True)
    if not use.reads:
        monkeypatch.setattr(nsa, "_readable", lambda x: False)
    use.go_on(12)


@pytest.mark.slow
@pytest.mark.parametrize("knowledge", KNOWLEDGE)
@every_config
def test_much_random_use(name: str, knowledge: str, random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(2, 5):
        assert_random_use(name, knowledge, seed, random, monkeypatch)


# ---------------------------------------------------------------------------------------------------------------------
# Memory, work, gradients, precision
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "per_token"), [({}, 2), ({"rope_theta": 10.0}, 3), ({"separate_kv": True, "rope_theta": 10.0}, 6)]
)
def test_memory_is_allocated_once_and_as_promised(fields: dict[str, Any], per_token: int, random: Random) -> None:
    attention, x = build(random, **fields, block_size=4, stride=2), random((2, 64, 12))
    cache = room(attention, 2)

    def held() -> dict[int, int]:
        storages = (x.untyped_storage() for x in vars(cache).values() if isinstance(x, Tensor))
        return {storage.data_ptr(): storage.nbytes() for storage in storages}

    before = held()
    spare = per_token + 2  # a row of each
    assert sum(before.values()) == 8 * 2 * 2 * 6 * (64 * per_token + 2 * 31 + spare) + 4 * 2
    feed(attention, cache, x, [30, 1, 1, 32])
    cache.reorder([1, 0])
    cache.truncate(3)
    assert held() == before


def test_every_block_is_compressed_once(random: Random) -> None:
    class Counting(nn.Module):
        blocks = 0

        def __init__(self, dim: int, block: int, stride: int) -> None:
            super().__init__()
            self.block, self.stride = block, stride

        def forward(self, x: Tensor) -> Tensor:
            y = x.unfold(1, self.block, self.stride).sum(-1)
            Counting.blocks += y.shape[0] * y.shape[1]
            return y

    attention, x = build(random, compression=Counting, block_size=6, stride=2), random((2, 64, 12))
    feed(attention, room(attention, 2), x, [3, 1, 1, 1, 20, 1, 1, 30, 6])
    assert Counting.blocks == 2 * 2 * 2 * 30, "of keys and of values, 2 rows, 2 heads, (64 - 6)/2 + 1 blocks"


@pytest.mark.parametrize("at", [33, 40, 47])
def test_a_step_reads_nothing_but_its_window_its_blocks_and_the_compressed_keys(at: int, random: Random) -> None:
    """Everything else is NaN, which would show even where it is masked."""
    attention, x = build(random, **PAPER, rope_theta=50.0), random((2, 64, 12))
    cfg, cache = attention.cfg, room(attention, 2)
    exact, chosen = attention(x)[:, at].detach(), attention.attention_patterns(x).block_indices[:, at]
    attention(x[:, :at], cache=cache)
    token = torch.arange(64)
    in_chosen = (token[:, None, None] // cfg.select_block_size == chosen[:, None]).any(-1)  # (B, T, K)
    assert not in_chosen[:, : at + 1].all()
    for buffer in (cache.k, cache.v):
        buffer[~in_chosen] = torch.nan
    for buffer in (cache.k_local, cache.v_local):
        buffer[:, : at - cfg.local_window + 1] = torch.nan
    for buffer in (cache.k_raw, cache.v_raw):
        buffer[:, : at - cfg.block_size + 1] = torch.nan
    assert_close64(attention(x[:, at : at + 1], cache=cache)[:, 0], exact)


@torch.enable_grad()
def test_nothing_is_recorded_for_gradients(random: Random) -> None:
    block = NSABlock(NSAConfig(**BASE)).double().requires_grad_(False)
    x, cache = random((1, 20, 12)), NSACache(block.attn.cfg, 1, 64, dtype=torch.float64)
    for part in x.split([12, 1, 7], dim=1):
        assert not block(part, cache=cache).requires_grad
        assert not block.attn(part, cache=cache, key_padding_mask=torch.ones(part.shape[:2]).bool()).requires_grad
    assert not any(value.requires_grad for value in vars(cache).values() if isinstance(value, Tensor))


@pytest.mark.parametrize("made_inside", [False, True])
def test_inference_mode(made_inside: bool, random: Random) -> None:
    attention, x = build(random, **PAPER), random((2, 40, 12))
    exact = attention(x).detach()
    with torch.inference_mode(made_inside):
        cache = room(attention, 2)
    with torch.inference_mode():
        parts = [attention(part, cache=cache) for part in x[:, :30].split([20, 1, 9], dim=1)]
        cache.reorder([0, 0])
        cache.reorder([0, 1])
    attention(x[:, 30:], cache=cache)
    assert_close64(torch.cat(parts, dim=1), exact[:, :30])


@pytest.mark.parametrize("name", ["overlapping_conv1d", "paper_rope_bias", "overlapping_avgpool"])
@pytest.mark.parametrize("how", [torch.float32, torch.bfloat16, torch.float16, "autocast"], ids=str)
def test_lower_precision_keeps_to_the_error_of_one_forward(name: str, how: Any, random: Random) -> None:
    """Slots for every block: rounding must not turn the choice, or outputs could not be compared."""
    exact = build(random, **CONFIGS[name] | {"topk_blocks": 40})
    x = random((2, 40, 12), torch.float32)
    dtype, enabled = (torch.bfloat16, True) if how == "autocast" else (how, False)
    attention = copy.deepcopy(exact).to(torch.float32 if enabled else dtype)
    x = x if enabled else x.to(dtype)
    cache = room(attention, 2, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        actual, plain = feed(attention, cache, x, [17, 1, 1, 1, 13, 7]), attention(x)
    assert actual.dtype == plain.dtype
    assert_within_budget(actual, plain, exact(x.double()), terms=40)


def test_autocast_reaches_the_keys_of_a_cache(random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is attended with has the dtype of the cache, and the branches do their arithmetic in float32."""
    attention, x, seen = build(random, torch.float32, rope_theta=50.0), random((2, 20, 12), torch.float32), []
    plain = nsa._BACKENDS["torch"]

    def decode(*arguments: Any) -> Tensor:
        seen.append(({tensor.dtype for tensor in arguments[:3]}, torch.is_autocast_enabled("cpu")))
        return plain.decode(*arguments)

    monkeypatch.setitem(nsa._BACKENDS, "torch", plain._replace(decode=decode))
    with torch.autocast("cpu", torch.bfloat16):
        y = feed(attention, room(attention, 2, dtype=torch.bfloat16), x, [13, 1, 6])
        assert y.dtype == attention(x).dtype
    assert seen == [({torch.bfloat16}, False)] * 2, "the first piece is a forward like any other"


@needs_triton
@interpreted
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")  # −inf − −inf, as on a GPU
@pytest.mark.parametrize("name", [slow("overlapping_avgpool"), "paper_rope_bias"])
def test_the_kernels_of_a_step(name: str, random: Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the module, rows of different lengths among them; `test_decode_kernels.py` has the awkward sizes."""
    exact, x = build(random, **CONFIGS[name] | {"topk_blocks": 12}), random((2, 24, 12), torch.float32)
    attention, exact_y, pick = copy.deepcopy(exact).float(), exact(x.double()), python_random.Random(0)
    plain, steps = attention(x), []
    settings = NativeSparseAttention._settings.fget
    kernels = property(lambda self: settings(self) | {"backend": "triton"})
    monkeypatch.setattr(NativeSparseAttention, "_settings", kernels)
    cache = room(attention, 2, max_len=24, dtype=torch.float32)
    y = feed(attention, cache, x[:, :19], [16, 1, 2])
    assert_within_budget(y, plain[:, :19], exact_y[:, :19], "rows of one length", terms=24)
    cache.truncate([19, 17])
    for row, output in enumerate(append(attention, cache, x, [1, 3], pick)):
        start = (19, 17)[row]
        steps.append((output, *(of[row, start : start + len(output)] for of in (plain, exact_y))))
    assert_within_budget(*map(torch.cat, zip(*steps, strict=True)), "rows of two lengths", terms=24)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input leaves the cache as it was
# ---------------------------------------------------------------------------------------------------------------------

FULL = torch.ones(2, 3, dtype=torch.bool)
BAD: dict[str, tuple[str, Callable[[NativeSparseAttention, NSACache, Tensor], Any]]] = {
    "full": (r"cache.lengths\[0\] = 30: .* 35 more .* max_len = 64", lambda a, c, x: a(x[:, :35], cache=c)),
    "one row full": (
        r"cache.lengths\[1\] = 30: .* 35 more",
        lambda a, c, x: a(x, cache=c, key_padding_mask=torch.arange(64) < torch.tensor([[34], [35]])),
    ),
    "longer than seq_len": ("seq_len = 64", lambda a, c, x: a(torch.cat([x, x], 1), cache=c)),
    "no cache": ("cache = 'dict'", lambda a, c, x: a(x[:, :3], cache={})),
    "batch": ("cache.batch = 2", lambda a, c, x: a(x[:1, :3], cache=c)),
    "sequences": (
        "cache.batch = 2",
        lambda a, c, x: a(x[:1, :3], cache=c, cu_seqlens=torch.tensor([0, 1, 2, 3]).int()),
    ),
    "width": ("x.shape", lambda a, c, x: a(x[:, :3, :5], cache=c)),
    "dtype of x": ("x.dtype", lambda a, c, x: a(x[:, :3].float(), cache=c)),
    "dtype": ("cache.dtype = torch.float64", lambda a, c, x: copy.deepcopy(a).float()(x[:, :3].float(), cache=c)),
    "device": ("cache.device = 'cpu'", lambda a, c, x: copy.deepcopy(a).to("meta")(x[:, :3].to("meta"), cache=c)),
    "config": ("cache.cfg.stride = 2", lambda a, c, x: a_config(stride=4)(x[:, :3], cache=c)),
    "config's rope": ("cache.cfg.rope_theta = None", lambda a, c, x: a_config(rope_theta=10.0)(x[:, :3], cache=c)),
    "mask and cu_seqlens": (
        "key_padding_mask, cu_seqlens = 'both'",
        lambda a, c, x: a(x[:, :3], cache=c, key_padding_mask=FULL, cu_seqlens=torch.tensor([0, 1, 3]).int()),
    ),
    "mask's shape": ("key_padding_mask.shape", lambda a, c, x: a(x[:, :4], cache=c, key_padding_mask=FULL)),
    "mask's dtype": ("key_padding_mask.dtype", lambda a, c, x: a(x[:, :3], cache=c, key_padding_mask=FULL.int())),
    "truncate to more": (r"n\[0\] = 31", lambda a, c, x: c.truncate(31)),
    "truncate below 0": (r"n\[1\] = -1", lambda a, c, x: c.truncate([3, -1])),
    "truncate too few": (r"n = \[3\]", lambda a, c, x: c.truncate([3])),
    "truncate to a float": ("n = 3.0", lambda a, c, x: c.truncate(3.0)),
    "truncate to a bool": ("n = .*True", lambda a, c, x: c.truncate(True)),
    "reorder behind the end": (r"indices\[1\] = 2", lambda a, c, x: c.reorder([0, 2])),
    "reorder below 0": (r"indices\[0\] = -1", lambda a, c, x: c.reorder([-1, 0])),
    "reorder too many": ("indices = ", lambda a, c, x: c.reorder([0, 1, 1])),
    "reorder by floats": ("indices.dtype = ", lambda a, c, x: c.reorder(torch.tensor([0.0, 1.0]))),
}


def a_config(**fields: Any) -> NativeSparseAttention:
    return NativeSparseAttention(NSAConfig(**BASE | PAPER | fields)).double()


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("of_block", [False, True])
def test_bad_input_leaves_the_cache_as_it_was(what: str, of_block: bool, random: Random) -> None:
    message, call = BAD[what]
    module = NSABlock(NSAConfig(**BASE | PAPER)).double() if of_block else build(random, **PAPER)
    attention, x = module.attn if of_block else module, random((2, 64, 12))
    cache, exact = room(attention, 2), module(x).detach()
    module(x[:, :30], cache=cache)
    with pytest.raises((ValueError, TypeError), match=message):
        call(module if what not in ("width", "dtype of x") else attention, cache, x)
    assert cache.lengths == (30, 30)
    assert_close64(feed(module, cache, x[:, 30:], [1, 20, 13]), exact[:, 30:])


@whether_the_host_reads
@pytest.mark.parametrize("where", ["attn", "attn.compress_v", "attn.to_out", "norm2", "ffn"])
def test_what_fails_half_way_leaves_the_cache_as_it_was(where: str, random: Random) -> None:
    block, x = NSABlock(NSAConfig(**BASE)).double(), random((2, 64, 12))
    cache, exact = NSACache(block.attn.cfg, 2, 64, dtype=torch.float64), block(x).detach()
    block(x[:, :30], cache=cache)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = block.get_submodule(where).register_forward_hook(fail)
    for options in ({}, {"key_padding_mask": torch.arange(9) < torch.tensor([[9], [4]])}):
        with pytest.raises(KeyboardInterrupt):
            block(random((2, 9, 12)), cache=cache, **options)
        assert cache.lengths == (30, 30)
    handle.remove()
    assert_close64(feed(block, cache, x[:, 30:], [1, 33]), exact[:, 30:])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cfg": BASE}, TypeError, "cfg = "),
        ({"batch": 0}, ValueError, "batch = 0"),
        ({"batch": 2.0}, TypeError, "batch = 2.0"),
        ({"max_len": 0}, ValueError, "max_len = 0"),
        ({"max_len": 65}, ValueError, "max_len = 65: must be at most seq_len = 64"),
        ({"dtype": torch.int32}, TypeError, "dtype = torch.int32"),
        ({"dtype": "float32"}, TypeError, "dtype = 'float32'"),
    ],
)
def test_bad_settings(change: dict[str, Any], error: type[Exception], message: str) -> None:
    settings = {"cfg": NSAConfig(**BASE), "batch": 2, "max_len": 64} | change
    with pytest.raises(error, match=message):
        NSACache(**settings)


def test_defaults_and_repr() -> None:
    cache = NSACache(NSAConfig(**BASE), batch=3, max_len=2)
    assert (cache.dtype, cache.device, cache.lengths) == (torch.float32, torch.device("cpu"), (0, 0, 0))
    assert cache.k_cmp.shape == (3, oracle.compressed_count(2, 4, 4), 2, 6), "shorter than a block"
    assert repr(cache) == "NSACache(batch=3, max_len=2, lengths=0, dtype=torch.float32, device=cpu)"
    NativeSparseAttention(cache.cfg)(torch.randn(3, 1, 12), cache=cache)
    cache.truncate([1, 0, 1])
    assert "lengths=0..1," in repr(cache)
