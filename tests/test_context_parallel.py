"""One sequence over several processes, by gloo: outputs and all gradients are those of one process."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from cases import Last, Random, edges, slow
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import native_sparse_attention as nsa
from native_sparse_attention import NativeSparseAttention, NSABlock, NSACache, NSAConfig, context_parallel

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

LAYOUTS = ("contiguous", "zigzag")
BASE = {"dim": 24, "heads": 4, "seq_len": 96, "local_window": 5, "block_size": 4, "topk_blocks": 3}
# Sizes, tokens: 96 are 12 in each part of 4 ranks in zigzag, 16 are 2.
CASES: dict[str, tuple[dict[str, object], int]] = {
    "rows": ({}, 48),
    "grouped_queries": ({"kv_heads": 1, "rope_theta": 100.0, "select_block_size": 8, "init_blocks": 1}, 48),
    "overlapping_blocks": ({"kv_heads": 2, "block_size": 8, "stride": 2, "select_block_size": 4}, 40),
    "separate_kv": ({"separate_kv": True, "gate_mode": "q_cond", "kv_heads": 2, "stride": 2}, 48),
    "rope_separate_kv": ({"separate_kv": True, "rope_theta": 100.0, "bias": True, "stride": 2, "recompute": True}, 48),
    "normed": ({"qk_norm": 1e-6, "rope_frequencies": (1.0, 0.3, 0.1), "rope_scale": 1.2, "separate_kv": True}, 48),
    "conv1d": ({"compression": "conv1d", "block_size": 8, "stride": 4}, 48),
    "avgpool": ({"compression": "avgpool", "rope_theta": 1e4}, 48),
    "compressor_of_the_user": ({"compression": Last}, 48),
    "window_longer_than_a_part": ({"local_window": 31, "gate_mode": "q_cond"}, 48),
    "parts_shorter_than_a_block": ({"block_size": 8, "stride": 4, "select_block_size": 8, "local_window": 3}, 16),
    "shorter_than_a_block": ({"block_size": 32, "stride": 4}, 16),
    "one_token_a_part": ({}, 8),
}
PACKED: dict[str, tuple[dict[str, object], list[int]]] = {
    "every_way": ({"kv_heads": 2, "rope_theta": 100.0, "block_size": 8, "stride": 4}, [5, 0, 1, 23, 3, 16]),
    "one_over_all": ({"separate_kv": True, "gate_mode": "q_cond", "rope_theta": 100.0, "stride": 2}, [48]),
    "ends_at_the_ranks_ends": ({"compression": "conv1d"}, [12, 12, 0, 24]),
    "last_token_alone": ({"kv_heads": 1, "compression": "avgpool", "local_window": 31}, [47, 1]),
    "no_block": ({"block_size": 8}, [3] * 16),
    "normed": ({"qk_norm": 1e-6, "rope_frequencies": (1.0, 0.3, 0.1), "kv_heads": 2}, [9, 30, 9]),
}
PADDED = ("grouped_queries", "overlapping_blocks", "rope_separate_kv", "normed", "conv1d", "avgpool")
PADDED += ("compressor_of_the_user",)


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


def process(
    rank: int, check: Callable[..., None], ranks: int, path: str, backend: str, arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)
    if backend != "gloo":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{path}", rank=rank, world_size=ranks)
    try:
        check(*arguments)
    except Exception:
        Path(f"{path}.{rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def in_processes(ranks: int, path: Path, check: Callable[..., None], *arguments: object, backend: str = "gloo") -> None:
    """check(*arguments) in that many processes."""
    try:
        torch.multiprocessing.spawn(process, (check, ranks, str(path / "group"), backend, arguments), ranks)
    except Exception as error:
        first = next((log.read_text() for log in sorted(path.glob("group.*"))), str(error))
        pytest.fail(first, pytrace=False)


@contextmanager
def group_of_one(path: Path) -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", init_method=f"file://{path / 'one'}", rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------------------------------
# Outputs and gradients
# ---------------------------------------------------------------------------------------------------------------------


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{what}: {text}")


def compare(
    what: str, model: nn.Module, x: Tensor, upstream: Tensor, layout: str, call: Callable[..., Tensor] | None = None
) -> None:
    """Output, and gradients of x and of all parameters: of all tokens at once, and of each rank's."""
    call, what = call or (lambda model, x: model(x)), f"{what}, {layout}"
    model.zero_grad()
    whole = x.clone().requires_grad_()
    y = call(model, whole)
    y.backward(upstream)
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with context_parallel(dist.group.WORLD, layout) as cp:
        part = cp.shard(x).clone().requires_grad_()
        mine = call(model, part)
        mine.backward(cp.shard(upstream))
        close(mine, cp.shard(y), f"{what}: output")
        close(part.grad, cp.shard(whole.grad), f"{what}: gradient of x")
        close(cp.unshard(mine), y, f"{what}: output of all ranks")
    for name, p in model.named_parameters():
        dist.all_reduce(p.grad)
        close(p.grad, expected[name], f"{what}: gradient of {name}")


def padded(x: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
    """x (7, T, dim) with NaN at padding, and a call with its mask, of which a rank gives its part."""
    T = x.shape[1]
    place, mask = torch.arange(T), torch.rand(7, T, generator=torch.Generator().manual_seed(0)) < 0.7
    for row, tokens in enumerate((place >= 0, place >= 0.4 * T, place < 0.4 * T, place == T - 2, place < 0)):
        mask[row] = tokens  # all; padding on the left and on the right; ranks without a token; a row without one
    mask[5] &= (place < T // 8) | (place >= T * 7 // 8)  # all in the middle is padding
    mask = mask.to(x.device)
    part = lambda: mask if nsa._CONTEXT is None else nsa._CONTEXT.shard(mask)  # noqa: E731
    return x.masked_fill(~mask[..., None], torch.nan), lambda model, x: model(x, key_padding_mask=part())


class Derived(NativeSparseAttention):
    """Attention whose forward a block calls with tensors."""

    def forward(self, x: Tensor, **given: object) -> Tensor:
        return super().forward(x, **given)


def build(**sizes: object) -> NativeSparseAttention:
    torch.manual_seed(1)
    return NativeSparseAttention(NSAConfig(**BASE | sizes)).double()


def check_modules() -> None:
    """On 8 ranks, each layout takes another quarter of the cases."""
    random = Random(seed=3)
    for first, layout in enumerate(LAYOUTS):
        few = slice(first, None, 4) if dist.get_world_size() == 8 else slice(None)
        for name, (sizes, tokens) in list(CASES.items())[few]:
            if tokens % (2 * dist.get_world_size()):
                continue  # on 8 ranks
            compare(name, build(**sizes), random((2, tokens, 24)), random((2, tokens, 24)), layout)
        for name, (sizes, lengths) in list(PACKED.items())[few]:
            packed = partial(nn.Module.__call__, cu_seqlens=edges(lengths))
            compare(name, build(**sizes), random((1, 48, 24)), random((1, 48, 24)), layout, packed)
        for name in PADDED[few]:
            x, call = padded(random((7, 48, 24)))
            compare(f"padded, {name}", build(**CASES[name][0]), x, random((7, 48, 24)), layout, call)
        stack = nn.Sequential(*(NSABlock(NSAConfig(**BASE, rope_theta=100.0)) for _ in range(2))).double()
        again = lambda model, x: checkpoint(model, x, use_reentrant=False)  # noqa: E731
        compare("blocks", stack, x := random((1, 48, 24)), random((1, 48, 24)), layout)
        x_padded, call = padded(random((7, 48, 24)))
        compare("padded block", stack[0], x_padded, random((7, 48, 24)), layout, call)
        stack[0].attn.__class__ = Derived
        compare("attention of the user", stack[0], x_padded, random((7, 48, 24)), layout, call)
        compare("checkpoint", stack, x, random((1, 48, 24)), layout, again)


def check_without_the_host() -> None:
    """Tables on the device take the place of rows, as on a GPU, where the host looks at no values."""
    nsa._readable = nsa._on_host = lambda x: False
    random = Random(seed=4)
    for layout in LAYOUTS:
        for name in ("rows", "rope_separate_kv", "parts_shorter_than_a_block"):
            sizes, tokens = CASES[name]
            compare(name, build(**sizes), random((2, tokens, 24)), random((2, tokens, 24)), layout)
        for name, (sizes, lengths) in PACKED.items():
            packed = partial(nn.Module.__call__, cu_seqlens=edges(lengths))
            compare(name, build(**sizes), random((1, 48, 24)), random((1, 48, 24)), layout, packed)
        x, call = padded(random((7, 48, 24)))
        compare("padded", build(**CASES["rope_separate_kv"][0]), x, random((7, 48, 24)), layout, call)


def test_the_host_does_not_look(tmp_path: Path) -> None:
    in_processes(2, tmp_path, check_without_the_host)


@pytest.mark.parametrize("ranks", [2, 4, slow(8)])
def test_each_rank_has_its_part_of_the_whole(ranks: int, tmp_path: Path) -> None:
    in_processes(ranks, tmp_path, check_modules)


def check_data_parallel(parallel: str) -> None:
    """Means over a rank's tokens, whose gradients are averaged over a mesh (dp, cp): those of the mean over all."""
    mesh, random = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp")), Random(seed=5)
    make = lambda: (torch.manual_seed(1), NSABlock(NSAConfig(**BASE, rope_theta=100.0)).double())[1]  # noqa: E731
    x, targets, alone, model = random((4, 24, 24)), random((4, 24, 24)), make(), make()
    nn.functional.mse_loss(alone(x), targets).backward()
    if parallel == "DDP":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=mesh)
    rows = mesh["dp"].get_local_rank() * 2 + torch.arange(2)
    with context_parallel(mesh["cp"], "zigzag") as cp:
        loss = nn.functional.mse_loss(model(cp.shard(x[rows])), cp.shard(targets[rows]))
        loss.backward()
    for (name, p), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        whole = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        close(whole, expected.grad, f"{parallel}: gradient of {name}")


def check_compiled() -> None:
    """One graph for all steps, each of which has a context of its own."""
    block, random = NSABlock(NSAConfig(**BASE, rope_theta=100.0)).double(), Random(seed=7)
    block.load_state_dict({name: random(tuple(x.shape)) / 9 for name, x in block.state_dict().items()})
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            run = lambda model, x, step=step: (model if x.shape[1] == 48 else compiled)(x)  # noqa: E731
            compare(f"step {step}", block, random((1, 48, 24)), random((1, 48, 24)), "zigzag", run)
    for step in range(2):
        x, call = padded(random((7, 48, 24)))
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            run = lambda model, x, call=call: call(model if x.shape[1] == 48 else compiled, x)  # noqa: E731
            compare(f"padded, step {step}", block, x, random((7, 48, 24)), "zigzag", run)


def test_compiled(tmp_path: Path) -> None:
    in_processes(2, tmp_path, check_compiled)


@pytest.mark.parametrize("parallel", ["DDP", "FSDP2"])
def test_data_parallel(parallel: str, tmp_path: Path) -> None:
    in_processes(4, tmp_path, check_data_parallel, parallel)


def check_gpus() -> None:
    """bfloat16 by the kernels: as one GPU but for rounding, and the same to the bit in every run."""
    device, sizes = torch.device("cuda", dist.get_rank()), {"block_size": 32, "stride": 16, "select_block_size": 64}
    sizes |= {"dim": 512, "heads": 16, "kv_heads": 1, "seq_len": 4096, "topk_blocks": 16, "rope_theta": 1e4}
    rows = lambda x: (x, lambda model, x: model(x))  # noqa: E731
    cu_seqlens = edges([1000, 1, 0, 2500, 595]).to(device)
    packed = lambda x: (x, partial(nn.Module.__call__, cu_seqlens=cu_seqlens))  # noqa: E731
    own_keys = {"separate_kv": True, "stride": 32}
    for more, kind in (({"local_blocks": 2}, rows), ({"local_blocks": 2}, padded), (own_keys, packed)):
        torch.manual_seed(1)
        model = NSABlock(NSAConfig(**sizes | more, init_blocks=1)).to(device, torch.bfloat16)
        shape = (7 if kind is padded else 1, 4096, 512)
        x, upstream = (torch.randn(shape).to(device, torch.bfloat16) for _ in range(2))
        x, call = kind(x)
        call = partial(call, model)
        call(x).backward(upstream)
        expected = [p.grad.float() for p in model.parameters()]
        for layout in LAYOUTS:
            with context_parallel(dist.group.WORLD, layout) as cp:
                runs = []
                for _ in range(2):
                    model.zero_grad()
                    mine = call(cp.shard(x))
                    mine.backward(cp.shard(upstream))
                    runs.append([mine, *(p.grad.clone() for p in model.parameters())])
                assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), f"{layout}: two runs differ"
                pairs = [(mine.float(), cp.shard(call_alone(call, x)).float())]
            for grad, whole in zip(runs[0][1:], expected, strict=True):
                total = grad.float()
                dist.all_reduce(total)
                pairs.append((total, whole))
            errors = [((a - b).norm() / b.norm()).item() for a, b in pairs]
            # the gates' biases have small sums of many terms
            assert errors[0] < 0.01 and max(errors) < 0.05, f"{layout}, {shape}: {errors}"


def call_alone(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The output of one process, in the middle of a context."""
    context, nsa._CONTEXT = nsa._CONTEXT, None
    try:
        return call(x)
    finally:
        nsa._CONTEXT = context


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus(tmp_path: Path) -> None:
    in_processes(2, tmp_path, check_gpus, backend="cpu:gloo,cuda:nccl")


# ---------------------------------------------------------------------------------------------------------------------
# The context
# ---------------------------------------------------------------------------------------------------------------------

PARTS = {("contiguous", 2): [[0, 1], [2, 3]], ("zigzag", 2): [[0, 3], [1, 2]]}  # of 4


def check_parts() -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for layout in LAYOUTS:
        with context_parallel(dist.group.WORLD, layout) as cp:
            assert (cp.rank, cp.size, cp.layout) == (rank, ranks, layout)
            mine = torch.tensor(PARTS[layout, ranks][rank])
            expected = (mine[:, None] * 3 + torch.arange(3)).flatten()
            assert torch.equal(cp.positions(12), expected)
            x = Random(seed=1)((2, 12, 5))
            for dim in (1, -2):
                assert torch.equal(cp.shard(x, dim), x[:, expected])
                assert torch.equal(cp.unshard(cp.shard(x, dim), dim), x)
            for dim in (0, -1):
                assert torch.equal(cp.unshard(cp.shard(x.movedim(1, dim), dim), dim), x.movedim(1, dim))
            assert torch.equal(cp.unshard(expected[None]), torch.arange(12)[None])
            part = cp.shard(x).requires_grad_()
            (cp.unshard(part) * (1 + rank)).sum().backward()  # the sum of all ranks' losses
            assert torch.equal(part.grad, torch.full_like(part, sum(range(1, ranks + 1))))


def test_parts(tmp_path: Path) -> None:
    in_processes(2, tmp_path, check_parts)


def check_complaints() -> None:
    """Disagreement of ranks is an error on each of them, and the next context works."""
    attention, rank = NativeSparseAttention(NSAConfig(**BASE)), dist.get_rank()
    x = torch.randn(1, 8, 24)
    with (
        pytest.raises(ValueError, match="layout.*must be the same on all ranks"),
        context_parallel(dist.group.WORLD, LAYOUTS[rank]),
    ):
        attention(x)
    for layout in LAYOUTS:
        with pytest.raises(ValueError, match=r"rank 0: .*\(1, 8, 24\).*; rank 1: .*\(1, 6, 24\)"):
            with context_parallel(dist.group.WORLD, layout):
                attention(x[:, : 8 - 2 * rank])
        with pytest.raises(ValueError, match="must be the same"), context_parallel(dist.group.WORLD, layout):
            attention(x if rank else x.double())
        with pytest.raises(ValueError, match=r"rank 1: .*\[0, 3, 16\]"), context_parallel(dist.group.WORLD, layout):
            attention(x, cu_seqlens=edges([4 - rank, 12 + rank]))
        for mask in (torch.ones(1, 8 + rank, dtype=torch.bool), torch.ones(1, 8) > 0 if rank else None):
            with pytest.raises(ValueError, match="rank 1: .*key_padding_mask.* must be the same"):
                with context_parallel(dist.group.WORLD, layout):
                    attention(x, key_padding_mask=mask)
        with pytest.raises(ValueError, match="must be the same"), context_parallel(dist.group.WORLD, layout) as cp:
            cp.unshard(x[:, rank:])
        with context_parallel(dist.group.WORLD, layout) as cp:
            assert attention(x).shape == x.shape
            with pytest.raises(ValueError, match=r"x.shape = \(1, 50, 24\): must have T, 100 on all ranks, of at most"):
                attention(torch.randn(1, 50, 24))
            with pytest.raises(ValueError, match=r"cu_seqlens\[-1\] = 8: must be 16, the number of tokens"):
                attention(x, cu_seqlens=edges([8]))
            with pytest.raises(ValueError, match=r"cache = 'NSACache': cannot be given under context_parallel"):
                attention(x, cache=NSACache(attention.cfg, 1, 20))
            with pytest.raises(ValueError, match=r"key_padding_mask.shape = \(1, 16\): must be .*\(1, 8\)"):
                attention(x, key_padding_mask=torch.ones(1, 16, dtype=torch.bool))
            with pytest.raises(ValueError, match="needs the whole sequence"):
                attention.attention_patterns(x)
            attention.cfg.selection_loss = 0.1
            with pytest.raises(ValueError, match="selection_loss = 0.1: must be 0 under context_parallel"):
                attention(x)
            attention.cfg.selection_loss = 0.0
            parts = 2 if layout == "contiguous" else 4
            rule = rf"x.shape\[1\] = 7: must be a multiple of {parts} in layout '{layout}'; pad them to 8"
            with pytest.raises(ValueError, match=rule):
                cp.shard(x[:, :7])
            with pytest.raises(ValueError, match="must be a multiple"):
                cp.positions(7)
    with context_parallel(dist.group.WORLD, "zigzag") as cp:
        with pytest.raises(ValueError, match="must be a multiple of 4"):
            cp.unshard(x[:, :3])


def test_complaints(tmp_path: Path) -> None:
    in_processes(2, tmp_path, check_complaints)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_of_one(layout: str, random: Random, tmp_path: Path) -> None:
    """Nothing changes, whatever the number of tokens."""
    block = NSABlock(NSAConfig(**BASE)).double()
    x = random((2, 7, 24))
    mask = torch.arange(7) < torch.tensor([[7], [3]])
    with group_of_one(tmp_path) as group, context_parallel(group, layout) as cp:
        assert cp.shard(x) is x or torch.equal(cp.shard(x), x)
        assert torch.equal(cp.unshard(x), x) and cp.positions(7).tolist() == list(range(7))
        within, padded = block(x), block(x, key_padding_mask=mask)
    assert torch.equal(within, block(x)) and torch.equal(padded, block(x, key_padding_mask=mask))


def test_contexts_do_not_nest(tmp_path: Path) -> None:
    with group_of_one(tmp_path) as group:
        with context_parallel(group):
            with pytest.raises(ValueError, match="is within another one"), context_parallel(group):
                pass
            assert nsa._CONTEXT is not None, "the outer one goes on"
        with pytest.raises(KeyError), context_parallel(group):
            raise KeyError
        with context_parallel(group):
            pass
    assert nsa._CONTEXT is None


def test_what_makes_a_context(tmp_path: Path) -> None:
    with group_of_one(tmp_path) as group:
        with pytest.raises(ValueError, match="layout = 'striped': must be 'contiguous' or 'zigzag'"):
            context_parallel(group, "striped")
        for wrong in (None, 4, "cp"):
            with pytest.raises(TypeError, match="must be a DeviceMesh of one dimension, or a process group"):
                context_parallel(wrong)
        mesh = dist.init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "cp"))
        with pytest.raises(ValueError, match="must be a DeviceMesh of one dimension"):
            context_parallel(mesh)
        with context_parallel(mesh["cp"]) as cp:
            assert (cp.rank, cp.size) == (0, 1)
