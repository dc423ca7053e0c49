"""Train a GPT of Native Sparse Attention (NSA) blocks on text, and the same GPT with dense attention beside it.

    python nsa_gpt_training.py                                quick run: both attentions, half a minute on a CPU
    python nsa_gpt_training.py --full                         full run: 14 M parameters, 5000 iterations, for a GPU
    python nsa_gpt_training.py --data book.txt                any UTF-8 text; Tiny Shakespeare if none is given
    python nsa_gpt_training.py --data src --pattern "*.py"    files of a folder, byte by byte
    python nsa_gpt_training.py --full --resume                go on where a run was stopped
    python nsa_gpt_training.py --generate --prompt "To be"    write on with the model of the quick run
    torchrun --nproc-per-node 8 nsa_gpt_training.py --full    one process for each GPU: same batches, same losses
        ... --attention nsa --context-parallel 4              of which each 4 share their sequences

Text, split and schedule of the full run are those of nanoGPT's Shakespeare example, so that losses compare.
"""

import argparse
import dataclasses
import hashlib
import http.client
import itertools
import json
import math
import os
import signal
import statistics
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from native_sparse_attention import AttentionPatterns, NSABlock, NSACache, NSAConfig, context_parallel

HERE = Path(__file__).resolve().parent
BRANCHES = ("local", "compressed", "selective")
Batch = tuple[Tensor, Tensor]  # tokens (B, T), and targets (B, T): the token that follows each
Evaluation = dict[str, Any]  # iteration; train and val loss; accuracy; gates: of each layer the mean of each branch


class Stop(Exception):
    """End of the program with one line and no traceback: Stop(line, exit_code=2)."""


# ── Settings ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def option(group: str, default: Any, help: str, least: float | None = None, **parsing: Any) -> Any:
    """Field of Settings that is also a flag; `parsing` goes to argparse."""
    return field(default=default, metadata={"group": group, "help": help, "least": least, "parsing": parsing})


@dataclass(frozen=True)
class Settings:
    """Settings of a run, with the values of the full run. Names that NSAConfig has too mean the same there."""

    attention: str = option("run", "nsa", "attention to train", choices=("nsa", "dense", "both"))
    data: Path | None = option("run", None, "text or folder; default: input.txt here, else Tiny Shakespeare", type=Path)
    pattern: str = option("run", "*.txt", "names of files in a folder and below it")
    out: Path = option("run", HERE / "out" / "full", "folder of checkpoints, logs and pictures")
    resume: bool = option("run", False, "go on with the run in --out; more --iterations extend a finished one")
    overwrite: bool = option("run", False, "replace the checkpoints of an earlier run in --out")
    generate: bool = option("sample", False, "train nothing; continue --prompt with the model in --out")
    prompt: list[str] | None = option("sample", None, "texts to continue; default: a new line", nargs="+", type=str)
    sample_length: int = option("sample", 500, "characters to generate", 0)
    temperature: float = option("sample", 0.8, "below 1 is safer, above 1 bolder", 0.01)
    device: str = option("device", "auto", "cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    compile: str = option("device", "off", "torch.compile and its mode", choices=("off", "default", "reduce-overhead"))
    fsdp: bool = option("device", False, "shard the model over processes (FSDP2) instead of copying it (DDP)")
    context_parallel: int = option("device", 1, "processes that have a part of each sequence; for NSA", 1)
    accumulate: int = option("device", 1, "save memory: parts of a batch, one after the other", 1)
    layers: int = option("model", 6, "blocks of attention and feed-forward", 1)
    dim: int = option("model", 384, "width")
    heads: int = option("model", 6, "query heads")
    kv_heads: int | None = option("model", None, "key/value heads, each shared by a group; default: heads", type=int)
    context: int = option("model", 256, "tokens that the model sees; a token is a character", 1)
    dropout: float = option("model", 0.2, "dropout on embeddings, attention output and feed-forward")
    value_dropout: float = option("model", 0.35, "dropout on the values of whole tokens, for each head", 0)
    local_window: int = option("NSA", 64, "tokens of the local branch")
    block_size: int = option("NSA", 32, "tokens in a compressed block")
    stride: int | None = option("NSA", None, "tokens between starts of blocks; default: block size", type=int)
    select_block_size: int | None = option("NSA", None, "tokens in a selection block; default: block size", type=int)
    topk_blocks: int = option("NSA", 4, "blocks that a query selects")
    compression: str = option("NSA", "grouped_mlp", "block to vector", choices=("grouped_mlp", "conv1d", "avgpool"))
    gate_mode: str = option("NSA", "q_cond", "learned numbers, or linear in the input", choices=("static", "q_cond"))
    seed: int = option("training", 1337, "seed of weights, batches, dropout and samples")
    batch_size: int = option("training", 64, "sequences in a batch, over all processes", 1)
    learning_rate: float = option("training", 1e-3, "peak; it decays to a tenth along a cosine", 0)
    iterations: int = option("length", 5000, "optimizer steps", 1)
    eval_interval: int = option("length", 250, "iterations between evaluations", 1)
    eval_batches: int = 200  # of each split
    warmup: int = 100


QUICK = Settings(
    **{"attention": "both", "out": HERE / "out" / "quick", "sample_length": 200, "layers": 2, "dim": 128, "heads": 4},
    **{"dropout": 0.0, "value_dropout": 0.0, "local_window": 32, "block_size": 8, "iterations": 120, "batch_size": 4},
    **{"learning_rate": 3e-3, "warmup": 20, "eval_interval": 20, "eval_batches": 4},
)


# ── Device and processes ──────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Runtime:
    """A device, a precision, and the number of this process among those that train together."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    cp: context_parallel | None = None  # of the processes that share their sequences

    @property
    def groups(self) -> int:
        """Number of processes, or of groups of them, that have rows of their own."""
        return self.world if self.cp is None else self.world // self.cp.size

    def context(self) -> Any:
        """Context of forward and backward."""
        return self.cp or nullcontext()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def share(self, batch: Batch, parts: int = 1) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Tokens and targets of a batch that are this process's, on the device, in equal parts of its rows.

        The last of the three are the tokens' positions, if they are not those from 0 on.
        """
        mine = [x.chunk(self.groups)[self.rank * self.groups // self.world] for x in batch]
        mine = mine if self.cp is None else [self.cp.shard(x) for x in mine]
        mine = [x.pin_memory() for x in mine] if self.device.type == "cuda" else mine
        tokens, targets = (x.to(self.device, non_blocking=True).chunk(parts) for x in mine)
        positions = None if self.cp is None else self.cp.positions(batch[0].shape[1], self.device)
        return zip(tokens, targets, itertools.repeat(positions, parts), strict=True)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def __str__(self) -> str:
        card = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        name = f"{self.device}{card}, {self.dtype}".replace("torch.", "")
        return name if self.world == 1 else f"{name}, {self.world} processes"


def say(line: str = "", end: str = "\n", file: Any = None) -> None:
    """Print at once, on the first process alone."""
    if os.environ.get("RANK", "0") == "0":
        print(line, end=end, file=file, flush=True)


# ── Data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
class Text:
    """Tokens of a text, those before `train` to train on, or 90 %. A token is a character's index in the vocabulary."""

    def __init__(self, source: str, text: str, train: int | None = None) -> None:
        self.source, self.digest = source, hashlib.sha256(text.encode()).hexdigest()
        self.vocabulary = "".join(sorted(set(text)))
        train = int(0.9 * len(text)) if train is None else train
        self.train, self.val = encode(text, self.vocabulary).tensor_split([train])

    def batch(self, split: str, rows: int, length: int, seed: int) -> Batch:
        """Random windows (rows, length) of a split, and the same windows one character later."""
        tokens, generator = getattr(self, split), torch.Generator().manual_seed(seed)
        starts = torch.randint(len(tokens) - length, (rows, 1), generator=generator)
        windows = tokens[starts + torch.arange(length + 1)]  # (rows, length + 1)
        return windows[:, :-1], windows[:, 1:]


def encode(text: str, vocabulary: str) -> Tensor:
    if not text:
        return torch.empty(0, dtype=torch.long)
    codes = (torch.frombuffer(bytearray(x.encode("utf-32-le")), dtype=torch.int32) for x in (vocabulary, text))
    return torch.searchsorted(*codes)  # characters of the vocabulary ascend


def seed_of(*use: Any) -> int:
    """Seed that differs for each use of random numbers."""
    return int.from_bytes(hashlib.sha256(repr(use).encode()).digest()[:4], "big")


# ── Model ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
class NSALanguageModel(nn.Module):
    """A GPT: token and position embeddings, NSA blocks, norm, and a head tied to the token embedding.

    With `attention="dense"` its blocks have dense attention, and all else is the same.

    >>> model = NSALanguageModel(vocab_size=65, cfg=NSAConfig(dim=64, heads=4, seq_len=128), layers=2)
    >>> logits, loss = model(torch.randint(65, (8, 128)))
    >>> logits.shape
    torch.Size([8, 128, 65])
    """

    def __init__(self, vocab_size: int, cfg: NSAConfig, layers: int, attention="nsa", init_std=0.02) -> None:
        super().__init__()
        self.cfg, self.attention = cfg, attention
        self.token_embedding = nn.Embedding(vocab_size, cfg.dim)
        self.position_embedding = nn.Embedding(cfg.seq_len, cfg.dim) if cfg.rope_theta is None else None
        self.dropout = nn.Dropout(cfg.dropout)
        if attention not in ("nsa", "dense"):
            raise ValueError(f"attention = {attention!r}: must be 'nsa' or 'dense'")
        self.blocks = nn.ModuleList((NSABlock if attention == "nsa" else DenseBlock)(cfg) for _ in range(layers))
        self.norm = nn.LayerNorm(cfg.dim, bias=cfg.bias)
        self.head = nn.Linear(cfg.dim, vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight
        self.initialize(init_std)

    def forward(
        self, tokens: Tensor, targets=None, positions=None, *, caches=None, mask=None
    ) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, vocabulary) of tokens (B, T), and their mean cross-entropy with targets (B, T) other than -100.

        With an NSACache for each block, tokens follow those in the caches; `mask` (B, T) is False at padding. Within
        context_parallel, `positions` (T,) are those of this process's tokens.
        """
        T = tokens.shape[1]
        if T > self.cfg.seq_len:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}: the longest sequence is {self.cfg.seq_len}")
        x = self.token_embedding(tokens)  # (B, T, dim)
        if self.position_embedding is not None:
            start = 0 if caches is None else caches[0].seqlens[:, None]
            if positions is None:
                positions = start + torch.arange(T, device=x.device)  # (T,), or (B, T) with caches
            x = x + self.position_embedding(positions.clamp(max=self.cfg.seq_len - 1))  # padding may lie beyond
        x = self.dropout(x)
        for number, block in enumerate(self.blocks):
            x = block(x) if caches is None else block(x, cache=caches[number], key_padding_mask=mask)
        logits = self.head(self.norm(x))
        loss = None if targets is None else F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        return logits, loss

    def initialize(self, std: float) -> None:
        """Draw weights as nanoGPT does: normal, and smaller where 2·layers branches add up in the residual stream."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, weight in self.named_parameters():
            if name.endswith(("attn.to_out.weight", "ffn.2.weight")):
                nn.init.normal_(weight, std=std / math.sqrt(2 * len(self.blocks)))


class DenseBlock(NSABlock):
    """NSABlock with dense attention in place of NSA."""

    def __init__(self, cfg: NSAConfig) -> None:
        super().__init__(cfg)
        self.attn = DenseAttention(cfg)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class DenseAttention(nn.Module):
    """Causal softmax attention over all tokens, (B, T, dim) → (B, T, dim), with the projections of NSA."""

    def __init__(self, cfg: NSAConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.to_q = nn.Linear(cfg.dim, cfg.heads * cfg.dim_head, bias=cfg.bias)
        self.to_k = nn.Linear(cfg.dim, cfg.kv_heads * cfg.dim_head, bias=cfg.bias)
        self.to_v = nn.Linear(cfg.dim, cfg.kv_heads * cfg.dim_head, bias=cfg.bias)
        self.to_out = nn.Linear(cfg.heads * cfg.dim_head, cfg.dim, bias=cfg.bias)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.cfg.dim_head)) for y in (self.to_q(x), self.to_k(x), self.to_v(x)))
        if self.cfg.rope_theta is not None:
            q, k = rotate(q, self.cfg.rope_theta), rotate(k, self.cfg.rope_theta)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, T, H, D) → (B, H, T, D)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.cfg.kv_heads != self.cfg.heads)
        return self.dropout(self.to_out(o.transpose(1, 2).flatten(2)))  # (B, H, T, D) → (B, T, H·D) → (B, T, dim)


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions as in NSA: dimensions i and i + D/2 of x (B, T, H, D) turn by the angle t·theta^(−2i/D)."""
    T, half = x.shape[1], x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angles = torch.arange(T, device=x.device)[:, None, None] * frequencies  # (T, 1, D/2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def nsa_config(settings: Settings) -> NSAConfig:
    shared = {each.name for each in dataclasses.fields(NSAConfig)} & vars(settings).keys()
    return NSAConfig(seq_len=settings.context, **{name: getattr(settings, name) for name in shared})


def build_model(vocabulary: str, attention: str, settings: Settings) -> NSALanguageModel:
    """Model that the settings describe, on the CPU, the same on every machine."""
    torch.manual_seed(seed_of(settings.seed, "weights"))
    model = NSALanguageModel(len(vocabulary), nsa_config(settings), settings.layers, attention)
    drop_values(model, settings.value_dropout)
    return model


def drop_values(model: NSALanguageModel, p: float) -> None:
    """Add dropout on the values of whole tokens, for each head: in training, a query then misses some tokens it looks
    at, as with dropout on attention probabilities, but no attention kernel needs to know of it."""
    if not 0 <= p < 1:
        raise ValueError(f"value_dropout = {p}: must be at least 0 and below 1")

    def drop(_: nn.Module, __: Any, values: Tensor) -> Tensor | None:
        if model.training:
            values = values.unflatten(-1, (-1, model.cfg.dim_head))  # (B, T, heads, D)
            return (values * F.dropout(torch.ones_like(values[..., :1]), p)).flatten(-2)

    for block in model.blocks if p > 0 else ():
        block.attn.to_v.register_forward_hook(drop)


def distribute(model: NSALanguageModel, settings: Settings, runtime: Runtime) -> nn.Module:
    """Move the model to its device, whole or in shards; returns the module that a training step calls."""
    if settings.fsdp:
        for module in (*model.blocks, model):  # a block at a time, so that the whole never has to fit
            fully_shard(module)
    else:
        model.to(runtime.device)
    net = model if settings.compile == "off" else torch.compile(model, mode=settings.compile)
    if settings.fsdp or runtime.world == 1:
        return net
    ids = [runtime.device] if runtime.device.type == "cuda" else None
    return DistributedDataParallel(net, device_ids=ids, broadcast_buffers=False)


# ── Optimizer ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def make_optimizer(model: NSALanguageModel, settings: Settings) -> torch.optim.AdamW:
    """AdamW. Matrices decay, those of compressors too; norms, biases, embeddings and gate logits do not."""
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and not name.endswith(("embedding.weight", "position", "gate_bias"))
        (decayed if is_matrix else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, settings.learning_rate, betas=(0.9, 0.99), fused=decayed[0].is_cuda)


def learning_rate(iteration: int, settings: Settings) -> float:
    """Linear warm-up to the peak, then a cosine down to a tenth of it at the last iteration."""
    if iteration < settings.warmup:
        return settings.learning_rate * (iteration + 1) / (settings.warmup + 1)
    progress = (iteration - settings.warmup) / max(1, settings.iterations - settings.warmup)
    return settings.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


# ── Evaluate ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def evaluate(net: nn.Module, model: NSALanguageModel, text: Text, settings: Settings, runtime: Runtime) -> Evaluation:
    """Losses, accuracy and gates, on the same batches every time, so that differences are the model's."""
    rows, length, scores = settings.batch_size, settings.context, {}
    for split in ("train", "val"):
        seeds = [seed_of(settings.seed, "evaluation", number) for number in range(settings.eval_batches)]
        scores[split] = score(net, (text.batch(split, rows, length, seed) for seed in seeds), runtime)
    patterns = layer_patterns(model, text.val[None, : min(length, 256)], runtime)  # T × T numbers: a sample will do
    gates = [each.gates.mean((0, 1, 2)).tolist() for each in patterns]
    return {"train": scores["train"][0], "val": scores["val"][0], "accuracy": scores["val"][1], "gates": gates}


@torch.no_grad()
def score(net: nn.Module, batches: Iterable[Batch], runtime: Runtime) -> tuple[float, float]:
    """Mean loss and share of right answers, over all targets of all batches."""
    totals = torch.zeros(3, dtype=torch.float64, device=runtime.device)
    net.eval()
    for batch in batches:
        tokens, targets, positions = next(runtime.share(batch))
        with runtime.context(), runtime.autocast():
            logits, loss = net(tokens, targets, positions)
        asked = (targets >= 0).sum()
        totals += torch.stack([loss * asked, (logits.argmax(-1) == targets).sum(), asked])
    net.train()
    loss, right, asked = runtime.sum(totals).tolist()
    return loss / asked, right / asked


@torch.no_grad()
def layer_patterns(model: NSALanguageModel, tokens: Tensor, runtime: Runtime) -> list[AttentionPatterns]:
    """Attention patterns of every NSA layer for tokens (B, T): T × T numbers for each head."""
    patterns, hooks, training = [], [], model.training
    for block in model.blocks if model.attention == "nsa" else ():  # what norm1 returns is what attention takes
        look = lambda _, __, x, attn=block.attn: patterns.append(attn.attention_patterns(x))  # noqa: E731
        hooks.append(block.norm1.register_forward_hook(look))
    model.eval()(tokens.to(runtime.device))
    model.train(training)
    for hook in hooks:
        hook.remove()
    return patterns


# ── Checkpoint ────────────────────────────────────────────────────────────────────────────────────────────────────────
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # the same file, however many processes there are


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Content of a checkpoint. The checksums of the zip archive find damage, and no code inside is run."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        state = torch.load(path, map_location="cpu", weights_only=True)
        if damaged or not {"model", "optimizer", "run", "settings", "vocabulary", "text"} <= set(state):
            raise ValueError("it is damaged, or of another program or version")
    except Exception as problem:  # depends on where the file is damaged
        raise Stop(f"cannot read the checkpoint {path}: {first_line(problem)}") from problem
    return state


def load_model(path: Path, device: torch.device | str = "cpu") -> tuple[NSALanguageModel, str]:
    """Model of a checkpoint, in evaluation mode, and its vocabulary."""
    state = read_checkpoint(path)
    model = build_model(state["vocabulary"], state["run"]["attention"], Settings(**state["settings"]))
    model.load_state_dict(state["model"])
    return model.to(device).eval(), state["vocabulary"]


def identity(settings: Settings) -> dict[str, Any]:
    """Settings that a resumed run must share with its checkpoint: all that a step depends on."""
    free = {"run", "sample", "device", "length"}
    fields = [each.name for each in dataclasses.fields(settings) if each.metadata.get("group") not in free]
    return {name: getattr(settings, name) for name in fields}


def first_line(problem: Exception) -> str:
    return (getattr(problem, "strerror", None) or str(problem) or type(problem).__name__).splitlines()[0]


# ── Train ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Run:
    """Progress and results of training one model."""

    attention: str
    parameters: int
    iteration: int = 0
    seconds: float = 0.0  # in training steps, without evaluations
    losses: list[float] = field(default_factory=list)  # of every training batch
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def best(self) -> Evaluation:
        return min(self.evaluations, key=lambda each: each["val"])


class Trainer:
    """A model in training, with its optimizer, its run, and its files."""

    def __init__(self, model: NSALanguageModel, text: Text, settings: Settings, runtime: Runtime) -> None:
        self.model, self.text, self.settings, self.runtime = model, text, settings, runtime
        self.best_path, self.last_path = (settings.out / f"{model.attention}{kind}.pt" for kind in ("", ".last"))
        self.run = Run(model.attention, sum(parameter.numel() for parameter in model.parameters()))
        self.net = distribute(model, settings, runtime)
        self.optimizer = make_optimizer(model, settings)
        if settings.resume and self.last_path.exists():
            self.resume()

    def train(self, request: "StopRequest") -> bool:
        """Train to the last iteration and return True, or to where Ctrl-C stops it and return False."""
        run, settings, runtime = self.run, self.settings, self.runtime
        with closing(Log(run, settings, runtime)) as log:
            while True:
                if runtime.sum(torch.tensor(float(request.asked))).item() > 0:  # on all processes after the same step
                    if run.iteration > 0:  # else there is no optimizer state yet
                        self.save(self.last_path)
                    return False

                finished = run.iteration >= settings.iterations
                evaluated = [0, *(each["iteration"] for each in run.evaluations)]  # a resumed run may begin at the last
                if (finished or run.iteration % settings.eval_interval == 0) and run.iteration not in evaluated:
                    now = {"iteration": run.iteration, **evaluate(self.net, self.model, self.text, settings, runtime)}
                    run.evaluations.append(now)
                    log.evaluation(now)
                    if not math.isfinite(now["train"] + now["val"]):
                        raise Stop(f"the loss of {run.attention} is not finite: try a lower --learning-rate", 1)
                    self.save(*([self.best_path] if now is run.best else []), self.last_path)
                if finished:
                    return True

                # Each step has seeds of its own: a resumed run, on any number of processes, draws the same batches.
                begin, seed = time.perf_counter(), seed_of(settings.seed, "batch", run.iteration)
                batch = self.text.batch("train", settings.batch_size, settings.context, seed)
                torch.manual_seed(seed_of(settings.seed, "dropout", run.iteration, runtime.rank))
                rate = learning_rate(run.iteration, settings)
                loss, norm = train_step(self.net, self.optimizer, batch, rate, settings, runtime)
                run.losses.append(loss.item())
                run.iteration, seconds = run.iteration + 1, time.perf_counter() - begin
                run.seconds += seconds
                log.step(seconds, loss=run.losses[-1], learning_rate=rate, gradient_norm=norm.item())

    def save(self, *paths: Path) -> None:
        """Gather the state of all processes and write it on the first."""
        weights, moments = get_state_dict(self.model, self.optimizer, options=WHOLE)
        state = {"model": weights, "optimizer": moments, "run": vars(self.run), "settings": identity(self.settings)}
        state |= {"vocabulary": self.text.vocabulary, "text": self.text.digest}
        for path in paths if self.runtime.rank == 0 else ():
            temporary = path.with_suffix(".tmp")
            try:
                torch.save(state, temporary)
                os.replace(temporary, path)  # a file is whole at any moment, the old one or the new one
            except (OSError, RuntimeError) as problem:  # PyTorch has its own words for a full disk
                temporary.unlink(missing_ok=True)
                raise Stop(f"cannot write {path}: {first_line(problem)}", 1) from problem

    def resume(self) -> None:
        """Load the last state, to go on as if the run had never been stopped."""
        path, state, settings = self.last_path, read_checkpoint(self.last_path), identity(self.settings)
        if state["text"] != self.text.digest:
            raise Stop(f"{path} was trained on another text than {self.text.source}")
        for name, then in state["settings"].items():
            if then != settings.get(name):
                raise Stop(f"{path} was trained with {name} = {then!r}, not {settings.get(name)!r}")
        self.run = Run(**state["run"])
        if self.run.iteration > self.settings.iterations:
            raise Stop(f"iterations = {self.settings.iterations}: {path} is at iteration {self.run.iteration} already")
        states = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizer, **states, options=WHOLE)


def train_step(
    net: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, rate: float, settings: Settings, runtime: Runtime
) -> tuple[Tensor, Tensor]:
    """Update the weights once; returns the loss of the whole batch, and the norm of its gradient before clipping."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    total = torch.zeros((), device=runtime.device)
    for tokens, targets, positions in runtime.share(batch, settings.accumulate):
        with runtime.context():
            with runtime.autocast():
                loss = net(tokens, targets, positions)[1] / settings.accumulate
            loss.backward()
        total += loss.detach()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return runtime.sum(total) / runtime.world, norm.full_tensor() if isinstance(norm, DTensor) else norm


class Log:
    """Record of a run, in JSON lines: settings and environment, then each step and evaluation; and a progress bar."""

    def __init__(self, run: Run, settings: Settings, runtime: Runtime) -> None:
        self.run, self.settings, self.begin, self.bar = run, settings, run.iteration, None
        self.on_cpu, self.seconds, is_first = runtime.device.type == "cpu", 0.0, runtime.rank == 0
        path = settings.out / f"{run.attention}.jsonl" if is_first else Path(os.devnull)
        self.file = path.open("a" if run.iteration else "w", encoding="utf-8")
        environment = {"torch": torch.__version__, "device": str(runtime), "command": " ".join(sys.argv)}
        self.write(settings=vars(settings), environment=environment)
        with suppress(ImportError):
            from tqdm import tqdm

            options = {"leave": False, "disable": None if is_first else True}  # None: unless on a terminal
            self.bar = tqdm(desc=run.attention, initial=run.iteration, total=settings.iterations, **options)

    def write(self, **values: Any) -> None:
        print(json.dumps(values, default=str), file=self.file, flush=True)

    def step(self, seconds: float, **values: float) -> None:
        run, settings = self.run, self.settings
        speed = settings.batch_size * settings.context / seconds
        self.write(iteration=run.iteration, **values, tokens_per_second=speed)
        if self.bar is not None and self.bar.update():  # which draws a few times a second
            self.bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed:,.0f} tokens/s")
        self.seconds += seconds
        evaluations = 2 / 3 * settings.eval_batches / settings.eval_interval  # for each step; a forward is 1/3 of one
        steps = (settings.iterations - run.iteration) * (1 + evaluations)
        minutes = self.seconds / (run.iteration - self.begin) * steps / 60
        if self.on_cpu and self.seconds - seconds < 10 <= self.seconds and minutes > 1:  # once, after ten seconds
            time_left = f"{minutes:.0f} minutes" if minutes < 100 else f"{minutes / 60:,.0f} hours"
            say(f"{run.attention}: about {time_left} to go on this CPU")

    def evaluation(self, now: Evaluation) -> None:
        self.write(**now)
        if self.bar is not None:
            self.bar.clear()
        position = f"{now['iteration']:>{len(str(self.settings.iterations))}}/{self.settings.iterations}"
        losses = f"loss {now['train']:.4f}  validation {now['val']:.4f}  accuracy {now['accuracy']:.3f}"
        say(f"{self.run.attention:<5} {position}  {losses}")

    def close(self) -> None:
        self.file.close()
        if self.bar is not None:
            self.bar.close()


class StopRequest:
    """Request by Ctrl-C or SIGTERM to stop after the current step; a second one stops at once. Active until `close`."""

    def __init__(self) -> None:
        self.asked = False
        self.handlers = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nstopping after this step; Ctrl-C again stops at once\n")  # print may interrupt a print

    def close(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


# ── Sample ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@torch.no_grad()
def generate(model, prompts: list[Tensor], count, temperature=1.0, generator=None, use_cache=True) -> Iterator[Tensor]:
    """Continue prompts, each (T ≥ 1,) of any length, with a model in evaluation mode; yields tokens (B,) `count` times.

    NSA computes each token once and keeps keys and values in an NSACache for each layer; on CUDA, a graph replays this
    step. When the longest sequence fills the model's context, all go on from the last half of it.
    """
    weight, limit, caches, step = model.token_embedding.weight, model.cfg.seq_len, [], None
    if use_cache and model.attention == "nsa":
        room = {"max_len": limit, "device": weight.device, "dtype": weight.dtype}
        caches = [NSACache(block.attn.cfg, len(prompts), **room) for block in model.blocks]
    noise = torch.empty(len(prompts), len(weight), device=weight.device)

    def draw(tokens: Tensor, lengths: Tensor | None = None) -> Tensor:  # (B, T) → (B, 1)
        mask = None if lengths is None else torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        logits = model(tokens, caches=caches or None, mask=mask)[0]
        logits = logits[:, -1] if lengths is None else logits[torch.arange(len(tokens)), lengths - 1]
        return ((logits.float() / temperature).softmax(-1) / noise).argmax(-1, keepdim=True)

    rows = [prompt.to(weight.device)[-limit:] for prompt in prompts]
    while count > 0:
        drawn = []  # tokens (B, 1) that follow the rows
        for _ in range(min(count, limit + 1 - max(map(len, rows))) if caches else 1):
            if len(drawn) == 2 and step is None and weight.is_cuda:  # after a step that has compiled all it needs
                step = capture(draw, drawn[-1])
            noise.exponential_(generator=generator)  # as torch.multinomial does, which would wait for the device
            if drawn:
                drawn.append((step or draw)(drawn[-1]))
            else:  # padded on the right, where a causal model is blind
                lengths, ragged = [len(row) for row in rows], len(set(map(len, rows))) > 1
                tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
                drawn.append(draw(tokens, torch.tensor(lengths, device=weight.device) if ragged else None))
            yield drawn[-1][:, 0]
        count -= len(drawn)
        rows = [torch.cat(pair) for pair in zip(rows, torch.cat(drawn, dim=1), strict=True)]
        if max(map(len, rows)) > limit:
            rows = [row[-max(1, limit // 2) :] for row in rows]
        for cache in caches:
            cache.reset()


def capture(step: Callable[[Tensor], Tensor], tokens: Tensor) -> Callable[[Tensor], Tensor]:
    """Step that replays step(tokens) from a CUDA graph, with other tokens; `step` itself where that fails."""
    try:
        graph, stream, tokens = torch.cuda.CUDAGraph(), torch.cuda.Stream(tokens.device), tokens.clone()
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):  # an error ends the first alone
            result = step(tokens)
    except Exception as problem:  # an error of the step itself comes again with the next one
        cause = first_line(problem.__context__ or problem)  # PyTorch puts "failed due to a previous error" on top
        say(f"\n{Path(__file__).name}: generating without a CUDA graph: {cause}", file=sys.stderr)
        return step

    def replay(new: Tensor) -> Tensor:
        tokens.copy_(new)
        graph.replay()
        return result.clone()

    return replay


def encode_prompts(vocabulary: str, settings: Settings) -> list[Tensor]:
    prompts = settings.prompt or ("\n" if "\n" in vocabulary else vocabulary[0],)
    for prompt in prompts:
        if not prompt or not set(prompt) <= set(vocabulary):
            raise Stop(f"prompt = {prompt!r}: must be one or more characters of the text that the model learns")
    return [encode(prompt, vocabulary) for prompt in prompts]


def say_text(model: NSALanguageModel, vocabulary: str, settings: Settings, runtime: Runtime) -> None:
    """Print prompts and their continuations, a single one as it comes, several one after the other; and the speed."""
    prompts = encode_prompts(vocabulary, settings)
    texts = ["".join(vocabulary[token] for token in prompt) for prompt in prompts]
    stream = (lambda text: say(text, end="")) if len(texts) == 1 else (lambda text: None)
    stream(texts[0])
    times, generator = [], torch.Generator(runtime.device).manual_seed(seed_of(settings.seed, "sample"))
    for drawn in generate(model, prompts, settings.sample_length, settings.temperature, generator):
        texts = [text + vocabulary[token] for text, token in zip(texts, drawn.tolist(), strict=True)]
        stream(texts[0][-1])
        times.append(time.perf_counter())
    say("" if len(texts) == 1 else "\n\n".join(texts))
    if len(times) > 1:  # the first token is that of the prompts
        seconds = statistics.median(after - before for before, after in itertools.pairwise(times))
        say(f"\n{len(texts) / seconds:,.0f} tokens/s: median of the steps after the prompts")


# ── Pictures ──────────────────────────────────────────────────────────────────────────────────────────────────────────
COLORS = {"nsa": "#c2410c", "dense": "#1d4ed8", "local": "#1d6fb8", "compressed": "#d9690f", "selective": "#2b8a3e"}
COLOR_MAPS = ("Blues", "Oranges", "Greens")  # of the branches


def draw_pictures(runs: list[Run], model: NSALanguageModel, text: Text, out: Path, runtime: Runtime) -> None:
    try:
        figures = {"loss.png": loss_figure(runs)}
        if model.attention == "nsa":
            figures |= {"gates.png": gates_figure(runs[0]), "patterns.png": patterns_figure(model, text, runtime)}
        for name, figure in figures.items():
            figure.savefig(out / name)
        say(f"\npictures: {', '.join(figures)} in {out}")
    except ImportError:
        say("\npictures: skipped, matplotlib is not installed")


def loss_figure(runs: list[Run]) -> Any:
    """Loss of every training batch, thin, and of the evaluations."""
    from matplotlib.figure import Figure  # which needs no screen

    figure = Figure((8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="iteration", ylabel="cross-entropy of a token, nats")
    for run in runs:
        color = COLORS[run.attention]
        axes.plot(run.losses, color=color, alpha=0.25, linewidth=0.8)
        for split, line in (("train", "--"), ("val", "o-")):
            points = [(each["iteration"], each[split]) for each in run.evaluations]
            axes.plot(*zip(*points, strict=True), line, color=color, markersize=4, label=f"{run.attention}, {split}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def gates_figure(run: Run) -> Any:
    """Mean gate of each branch over training, a panel for each layer."""
    from matplotlib.figure import Figure

    layers, iterations = len(run.evaluations[0]["gates"]), [each["iteration"] for each in run.evaluations]
    figure = Figure((2 + 1.6 * layers, 2.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, layers, sharey=True, squeeze=False)[0]
    for layer, axes in enumerate(panels):
        for number, (branch, line) in enumerate(zip(BRANCHES, ("-", "--", ":"), strict=True)):  # they may coincide
            gates = [each["gates"][layer][number] for each in run.evaluations]
            axes.plot(iterations, gates, line, color=COLORS[branch], label=branch)
        axes.set(title=f"layer {layer + 1}", xlabel="iteration", ylim=(0, 1))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("mean gate")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def patterns_figure(model: NSALanguageModel, text: Text, runtime: Runtime, heads: int = 2) -> Any:
    """Keys that each query looks at in the last layer: rows are the first heads, columns the branches."""
    from matplotlib.figure import Figure

    T, heads = model.cfg.seq_len, min(heads, model.cfg.heads)
    patterns = layer_patterns(model, text.val[None, :T], runtime)[-1]
    figure = Figure((9, 0.9 + 2.85 * heads), dpi=150, layout="constrained")
    grid = figure.subplots(heads, len(BRANCHES), sharex=True, sharey=True, squeeze=False)
    for column, branch in enumerate(BRANCHES):
        for head, axes in enumerate(grid[:, column]):
            weights = getattr(patterns, branch)[0, head].float().cpu()  # (T, T), or (T, C) for compressed keys
            width = weights.shape[1] * (model.cfg.stride if branch == "compressed" else 1)
            axes.fill([0, 0, T], [0, T, T], color="0.9", linewidth=0, zorder=-1)  # what dense attention looks at
            scale = {"norm": "log", "vmin": 1e-3, "vmax": 1.0, "cmap": COLOR_MAPS[column], "extent": (0, width, T, 0)}
            image = axes.imshow(weights.where(weights >= 1e-3, math.nan).numpy(), interpolation="nearest", **scale)
            gate = patterns.gates[0, :, head, column].mean().item()
            axes.set(xlim=(0, T), ylim=(T, 0), aspect="equal", title=f"{branch}, gate {gate:.2f}")
            axes.set_ylabel(f"head {head + 1}: query" if column == 0 else "")
        grid[-1, column].set_xlabel("key")
        figure.colorbar(image, ax=grid[:, column], location="bottom", shrink=0.85, aspect=30, label="attention weight")
    return figure


# ── Main: command line, text files, processes, report ─────────────────────────────────────────────────────────────────
INPUT = HERE / "input.txt"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def parse_settings(arguments: list[str] | None = None) -> Settings:
    """Settings of the quick or the full run, with what the flags change in them."""

    def refuse(message: str) -> None:
        raise Stop(f"{message} (--help lists the flags)")

    summary, usage, *_ = __doc__.split("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=usage, formatter_class=raw, allow_abbrev=False)
    parser.error = refuse
    parser.add_argument("--full", action="store_true", help="the full run instead of the quick one; for a GPU")
    groups: dict[str, Any] = {}
    for each in dataclasses.fields(Settings):
        if each.metadata:
            name, help = each.metadata["group"], each.metadata["help"]
            groups[name] = groups.get(name) or parser.add_argument_group(name)
            full, quick = (str(value).replace(f"{HERE}/", "") for value in (each.default, getattr(QUICK, each.name)))
            if full not in ("None", "False"):
                help += f" ({full})" if full == quick else f" ({quick}; full: {full})"
            kind = {"action": "store_true"} if each.default is False else {"type": type(each.default)}
            kind |= each.metadata["parsing"]
            groups[name].add_argument(f"--{each.name.replace('_', '-')}", help=help, default=None, **kind)
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    settings = dataclasses.replace(Settings() if given.pop("full") else QUICK, **given)
    for each in dataclasses.fields(settings):
        value, least = getattr(settings, each.name), each.metadata.get("least")
        if least is not None and not value >= least:
            raise Stop(f"{each.name} = {value!r}: must be at least {least}")
    if settings.compile == "reduce-overhead" and settings.accumulate > 1:  # a CUDA graph overwrites its own gradients
        raise Stop("accumulate: must be 1 with --compile reduce-overhead")
    parts, world = settings.context_parallel, int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" not in os.environ and (settings.fsdp or parts > 1):
        name = "fsdp" if settings.fsdp else "context_parallel"
        raise Stop(f"{name}: start several processes with torchrun --nproc-per-node N")
    if world % parts != 0 or (parts > 1 and settings.context % (2 * parts) != 0):
        rule = f"must divide the number of processes, {world}, and half of the context, {settings.context}"
        raise Stop(f"context_parallel = {parts}: {rule}")
    if parts > 1 and settings.attention != "nsa":
        raise Stop(f"context_parallel = {parts}: dense attention has all tokens; give --attention nsa")
    if settings.resume and settings.overwrite:
        raise Stop("resume and overwrite: give only one of them")
    return settings


def read_folder(folder: Path, pattern: str) -> tuple[str, str, int]:
    """Source, text and characters to train on: each byte a character, files joined by zeros in order of their names.

    Every tenth file, from the fifth on, is to validate on, and stands behind those to train on.
    """
    files = sorted(path for path in folder.rglob(pattern) if path.is_file())
    if len(files) < 10:
        raise Stop(f"{folder} has {len(files)} files {pattern!r} (--pattern): must be at least 10, one to validate on")
    texts = [path.read_bytes().decode("latin-1") + "\0" for path in files]
    val = [texts.pop(number) for number in range(4, len(texts), 10)[::-1]][::-1]
    source = f"{len(files):,} files {pattern!r} of {folder}, {len(val):,} of them to validate on"
    return source, "".join(texts + val), sum(map(len, texts))


def find_text(data: Path | None, pattern: str = "*.txt") -> tuple[str, str, int | None]:
    """Arguments of Text for the given file or folder, input.txt, Tiny Shakespeare, or else the help pages of Python."""
    path = data or INPUT
    if path.is_dir():
        return read_folder(path, pattern)
    if data is None and not INPUT.exists():
        say(f"downloading Tiny Shakespeare from {SHAKESPEARE_URL}")
        try:
            with urllib.request.urlopen(SHAKESPEARE_URL, timeout=10) as response:
                content = response.read()
            if hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
                raise OSError("what came is something else")
            INPUT.write_bytes(content)
        except (OSError, http.client.HTTPException) as problem:
            from pydoc_data.topics import topics

            source = f"the help pages of Python, as there is no Tiny Shakespeare: {first_line(problem)}"
            return source, "\n\n".join(topics[name] for name in sorted(topics)), None
    try:
        return str(path), path.read_text(encoding="utf-8"), None
    except (OSError, UnicodeDecodeError) as problem:
        raise Stop(f"cannot read {path}: {first_line(problem)}") from problem


@contextmanager
def start_runtime(settings: Settings) -> Iterator[Runtime]:
    """Find the device, and join the other processes if torchrun started this one."""
    launched, name = "RANK" in os.environ, settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and launched else name
    try:
        device = torch.zeros(1).to(name).cpu().to(name).device  # fails here and now if it cannot be used
    except (RuntimeError, AssertionError) as problem:
        raise Stop(f"device = {name!r}: {first_line(problem)}") from problem
    on_cuda = device.type == "cuda"
    runtime = Runtime(device, torch.bfloat16 if on_cuda else torch.float32)
    if launched:
        if on_cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
        runtime = dataclasses.replace(runtime, rank=dist.get_rank(), world=dist.get_world_size())
        if settings.context_parallel > 1:
            shape = (runtime.world // settings.context_parallel, settings.context_parallel)
            mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=("dp", "cp"))
            runtime = dataclasses.replace(runtime, cp=context_parallel(mesh["cp"], layout="zigzag"))
    try:
        yield runtime
    finally:
        if launched:
            dist.destroy_process_group()


def claim_folder(attentions: tuple[str, ...], settings: Settings) -> None:
    """Make the folder of a run. A run that would overwrite another one's files, even one in progress, is refused."""
    settings.out.mkdir(parents=True, exist_ok=True)
    there = [path for each in attentions for path in settings.out.glob(f"{each}.*") if path.suffix in (".pt", ".jsonl")]
    if settings.resume and not any(path.match("*.last.pt") for path in there):
        raise Stop(f"nothing to resume: there is no checkpoint {settings.out / attentions[0]}.last.pt")
    if there and not settings.resume and not settings.overwrite:
        raise Stop(f"{there[0]} exists: --resume continues that run, --overwrite replaces it, or choose another --out")
    for path in there if settings.overwrite else ():
        path.unlink()


def run_training(settings: Settings, runtime: Runtime) -> None:
    found = [find_text(settings.data, settings.pattern) if runtime.rank == 0 else None]
    if runtime.world > 1:
        dist.broadcast_object_list(found)
    text = Text(*found[0])
    say(f"data: {text.source}; {len(text.train):,} characters to train on, {len(text.val):,} to validate on")
    if len(text.val) <= settings.context:
        rule = f"what it validates on must be longer than the context, {settings.context}"
        raise Stop(f"{text.source} is too short: {rule}")
    encode_prompts(text.vocabulary, settings)
    parts = runtime.groups * settings.accumulate
    if settings.batch_size % parts != 0:
        of = "processes / context_parallel * accumulate"
        raise Stop(f"batch_size = {settings.batch_size}: must be divisible by {of} = {parts}")
    attentions = ("nsa", "dense") if settings.attention == "both" else (settings.attention,)
    try:
        models = [build_model(text.vocabulary, attention, settings) for attention in attentions]
    except (ValueError, TypeError) as problem:
        raise Stop(first_line(problem)) from problem
    if runtime.rank == 0:
        claim_folder(attentions, settings)
    runs = []
    with closing(StopRequest()) as request:
        for model in models:
            trainer = Trainer(model, text, settings, runtime)
            run = trainer.run
            say(f"{run.attention}: {run.parameters:,} parameters; {runtime}")
            if not trainer.train(request):
                line = f"stopped after iteration {run.iteration} of {run.attention}; --resume goes on from there"
                raise Stop(line, 130)
            runs.append(run)
    if runtime.rank == 0:
        report(runs, text, settings, runtime)


def report(runs: list[Run], text: Text, settings: Settings, runtime: Runtime) -> None:
    """Show a sample of the best model, pictures, files and the table, which is not lost if something fails."""
    files = [f"{run.attention}.pt" for run in runs]
    try:
        model, vocabulary = load_model(settings.out / files[0], runtime.device)
        say()
        say_text(model, vocabulary, settings, runtime)
        draw_pictures(runs, model, text, settings.out, runtime)
        say(f"checkpoints: {', '.join(files)} in {settings.out}")
    finally:
        say(f"\n{loss_table(runs, settings)}")
        p = text.train.bincount() / len(text.train)
        say(f"for comparison, knowing only how frequent each character is: {-torch.special.xlogy(p, p).sum():.2f}")


def loss_table(runs: list[Run], settings: Settings) -> str:
    columns = [("", "validation loss, best", "training loss, then", "at iteration", "parameters", "tokens/s")]
    for run in runs:
        best, speed = run.best, settings.batch_size * settings.context * run.iteration / run.seconds
        losses = (f"{best['val']:.4f}", f"{best['train']:.4f}", f"{best['iteration']}")
        columns.append((run.attention, *losses, f"{run.parameters:,}", f"{speed:,.0f}"))
    rows = zip(*columns, strict=True)
    return "\n".join(f"{title:<24}" + "".join(f"{cell:>12}" for cell in cells) for title, *cells in rows)


def run_generation(settings: Settings, runtime: Runtime) -> None:
    name = "dense.pt" if settings.attention == "dense" else "nsa.pt"
    say_text(*load_model(settings.out / name, runtime.device), settings, runtime)


def main(arguments: list[str] | None = None) -> int:
    line, exit_code = "", 0
    sys.stdout.reconfigure(errors="replace")  # what a terminal cannot spell ends no run
    try:
        settings = parse_settings(arguments)
        with start_runtime(settings) as runtime:
            (run_generation if settings.generate else run_training)(settings, runtime)
    except Stop as reason:
        line, exit_code = (*reason.args, 2)[:2]
    except BrokenPipeError:  # nobody reads on, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        exit_code = 141
    except OSError as problem:
        line, exit_code = f"{problem.filename or 'cannot write'}: {first_line(problem)}", 1
    except KeyboardInterrupt:
        line, exit_code = "interrupted", 130
    if line:
        say(f"{Path(__file__).name}: {line}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
