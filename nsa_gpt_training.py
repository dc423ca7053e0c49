"""Train a character-level GPT of Native Sparse Attention (NSA) blocks, and the same GPT with dense attention.

    python nsa_gpt_training.py                             quick test: both attentions, their losses side by side
    python nsa_gpt_training.py --full                      the full run: 10 M parameters, 5000 iterations, for a GPU
    python nsa_gpt_training.py --data book.txt             any UTF-8 text; Tiny Shakespeare unless told otherwise
    python nsa_gpt_training.py --plot-patterns nsa.png     draw what each branch of each head looked at
    python nsa_gpt_training.py --help                      every setting, with its value in both presets

The data, its 90/10 split and the full run's schedule are those of nanoGPT's Shakespeare example: losses compare.

Sections; each one calls only those above it.

     1 settings       4 NSALanguageModel             7 checkpoint     10 pictures
     2 runtime        5 optimizer and schedule       8 generate       11 main
     3 data           6 evaluate                     9 train
"""

import sys

if __name__ == "__main__" and sys.stderr.isatty():
    print("loading PyTorch ...", end="\r", file=sys.stderr, flush=True)  # seconds on a slow disk: say that we are alive

import argparse
import dataclasses
import hashlib
import http.client
import json
import math
import os
import platform
import shutil
import time
import types
import typing
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from native_sparse_attention import NSABlock, NSAConfig

QUICK_TEST = True  # False: the full run is the default; --quick and --full override it

HERE = Path(__file__).resolve().parent
ATTENTIONS = ("nsa", "dense")


class Stop(Exception):
    """Ends the program with one line for its user, and no traceback."""

    def __init__(self, line: str, exit_code: int = 2) -> None:
        super().__init__(line)
        self.exit_code = exit_code


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 1  Settings: one dataclass is the only home of names, defaults and help texts; the command line is generated from it
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


def setting(default: object, help: str, *, choices: tuple[str, ...] | None = None, least: float | None = None):
    """A field of Settings: its default in the full run, what it means, and which values it takes."""
    return field(default=default, metadata={"help": help, "choices": choices, "least": least})


@dataclass(frozen=True)
class Settings:
    """Everything that shapes a run. The defaults are the full run's; `QUICK` is the other preset.

    Fields that NSAConfig has too go to it under the same name, and it checks them.
    """

    attention: str = setting("nsa", "attention to train; both: one after the other", choices=(*ATTENTIONS, "both"))
    data: Path | None = setting(
        None, "UTF-8 text; not given: input.txt beside this script, else Tiny Shakespeare, fetched"
    )
    out: Path = setting(HERE / "out", "folder for checkpoints, loss curves and the run's record")
    plot_patterns: Path | None = setting(None, "draw what each branch of each head looked at, in this PNG file")
    plot_layer: int | None = setting(None, "layer to draw, counted from 1; not given: the last", least=1)

    device: str = setting("auto", "where to train: cpu, cuda, cuda:1, ...; auto: CUDA if there is one, else the CPU")
    dtype: str = setting(
        "auto",
        "precision of the arithmetic (weights stay float32); auto: bfloat16 on CUDA, float32 elsewhere",
        choices=("auto", "float32", "bfloat16"),
    )
    seed: int = setting(1337, "seed of weights, batches, dropout and generated text", least=0)

    layers: int = setting(6, "blocks of attention and feed-forward", least=1)
    dim: int = setting(384, "width of the model")
    heads: int = setting(6, "query heads")
    kv_heads: int | None = setting(None, "key/value heads, each shared by a group of query heads; not given: heads")
    context: int = setting(256, "characters that the model sees at once", least=1)
    dropout: float = setting(0.2, "on embeddings, attention output and feed-forward")

    local_window: int = setting(64, "NSA: tokens that the local branch sees")
    block_size: int = setting(32, "NSA: tokens in a compressed block")
    stride: int | None = setting(None, "NSA: tokens between the starts of compressed blocks; not given: block size")
    select_block_size: int | None = setting(None, "NSA: tokens in a selection block; not given: block size")
    topk_blocks: int = setting(4, "NSA: blocks that a query selects, the forced ones included")
    init_blocks: int = setting(NSAConfig.init_blocks, "NSA: forced blocks at the start of the sequence")
    local_blocks: int = setting(NSAConfig.local_blocks, "NSA: forced blocks up to and including the query's own")
    compression: str = setting("grouped_mlp", "NSA: block of keys to one key: grouped_mlp, conv1d or avgpool")
    gate_mode: str = setting("static", "NSA: a gate is a learned number (static), or linear in the input (q_cond)")
    gate_init: tuple[float, float, float] = setting((2.0, -2.0, -2.0), "NSA: logits of the three gates")
    separate_kv: bool = setting(NSAConfig.separate_kv, "NSA: each branch has its own key and value projections")
    use_flash: bool = setting(NSAConfig.use_flash, "NSA: accelerated kernels where they exist; else plain PyTorch")

    iterations: int = setting(5000, "optimizer steps", least=1)
    batch_size: int = setting(64, "sequences in a batch", least=1)
    learning_rate: float = setting(1e-3, "peak learning rate; it decays to a tenth along a cosine", least=0)
    warmup: int = setting(100, "iterations of linear warm-up", least=0)
    weight_decay: float = setting(0.1, "on the matrices of linear layers, and on nothing else", least=0)
    grad_clip: float = setting(1.0, "largest norm of the gradient", least=1e-6)
    eval_interval: int = setting(250, "iterations between evaluations", least=1)
    eval_batches: int = setting(20, "fixed batches of an evaluation, of each split", least=1)

    prompt: str | None = setting(None, "what the generated text begins with; not given: a new line")
    sample_length: int = setting(500, "characters to generate at the end", least=0)
    temperature: float = setting(0.8, "of generated text: below 1 is safer, above 1 bolder", least=0.01)
    top_k: int | None = setting(None, "generate among the k likeliest characters only", least=1)

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value, least, choices = getattr(self, each.name), each.metadata["least"], each.metadata["choices"]
            if least is not None and value is not None and not value >= least:
                raise ValueError(f"{each.name} = {value!r}: must be at least {least}")
            if choices is not None and value not in choices:
                raise ValueError(f"{each.name} = {value!r}: must be one of {', '.join(choices)}")
        if self.plot_layer is not None and self.plot_layer > self.layers:
            raise ValueError(f"plot_layer = {self.plot_layer}: there are {self.layers} layers")

    @property
    def attentions(self) -> tuple[str, ...]:
        return ATTENTIONS if self.attention == "both" else (self.attention,)

    def nsa_config(self) -> NSAConfig:
        shared = {each.name for each in dataclasses.fields(NSAConfig)}
        mine = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name in shared}
        return NSAConfig(seq_len=self.context, **mine)

    def plain(self) -> dict[str, typing.Any]:
        """As a dict that JSON and `torch.load(weights_only=True)` take."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


FULL = Settings()
QUICK = dataclasses.replace(
    FULL,
    attention="both",
    out=FULL.out / "quick",  # a quick test leaves the checkpoints of a full run alone
    layers=2,
    dim=128,
    heads=4,
    context=128,
    dropout=0.0,
    local_window=32,
    block_size=16,
    topk_blocks=2,
    iterations=100,
    batch_size=16,
    learning_rate=3e-3,
    warmup=20,
    eval_interval=20,
    eval_batches=4,
    sample_length=200,
)


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise Stop(f"{message} (--help lists the flags)")


def parse_settings(arguments: list[str] | None = None) -> Settings:
    """Settings from the command line: a preset, and whatever flags change in it."""
    parsed = vars(make_parser().parse_args(arguments))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in parsed.items()}
    given = {name: value for name, value in given.items() if value is not None}
    preset = QUICK if given.pop("quick", QUICK_TEST) else FULL
    try:
        return dataclasses.replace(preset, **given)
    except ValueError as problem:
        raise Stop(str(problem)) from problem


def make_parser() -> argparse.ArgumentParser:
    """A flag for every field of Settings. Flags that are not given stay None, so that the preset decides."""
    summary, usage = __doc__.split("\n\n")[:2]
    parser = OneLineParser(
        description=summary, epilog=usage, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--quick", action="store_true", default=None, help="preset: seconds on a CPU")
    preset.add_argument("--full", dest="quick", action="store_false", default=None, help="preset: for a GPU")
    for each in dataclasses.fields(Settings):
        flag = "--" + each.name.replace("_", "-")
        parser.add_argument(flag, help=help_text(each), **parsing_of(each))
    return parser


def help_text(each: dataclasses.Field) -> str:
    full, quick = (getattr(preset, each.name) for preset in (FULL, QUICK))
    if full is None:
        return each.metadata["help"]
    shown = f"{full}" if full == quick else f"full: {full}, quick: {quick}"
    return f"{each.metadata['help']} ({shown})"


def parsing_of(each: dataclasses.Field) -> dict[str, typing.Any]:
    """What argparse needs to know of a field: from its type `X`, `X | None`, `tuple[X, ...]` or bool."""
    if each.type is bool:
        return {"action": argparse.BooleanOptionalAction}
    parts = typing.get_args(each.type)
    if isinstance(each.type, types.UnionType):
        return {"type": parts[0], "metavar": parts[0].__name__.upper()}
    if parts:
        return {"type": parts[0], "nargs": len(parts), "metavar": parts[0].__name__.upper()}
    metavar = None if each.metadata["choices"] else each.type.__name__.upper()
    return {"type": each.type, "choices": each.metadata["choices"], "metavar": metavar}


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 2  Runtime: where and in which precision the arithmetic happens, and how lines reach the user
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Runtime:
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, settings: Settings) -> "Runtime":
        name = settings.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            number = torch.zeros(1, device=name)
            number.item()  # fails here and now where the device cannot be used
        except (RuntimeError, AssertionError) as problem:
            raise Stop(f"device = {name!r}: {str(problem).splitlines()[0]}") from problem
        device = number.device
        automatic = torch.bfloat16 if device.type == "cuda" else torch.float32
        return cls(device, automatic if settings.dtype == "auto" else getattr(torch, settings.dtype))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def __str__(self) -> str:
        name = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        return f"{self.device}{name}, {str(self.dtype).removeprefix('torch.')}"


def say(line: str = "") -> None:
    print(line, flush=True)  # at once, into a pipe too


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` if the body succeeds, so that `path` is never half written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Stopwatch:
    """Counts the seconds spent inside `with stopwatch`, a GPU's unfinished work included."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.total, self.started = runtime, 0.0, None

    @property
    def seconds(self) -> float:
        return self.total + (0.0 if self.started is None else time.perf_counter() - self.started)

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.runtime.synchronize()
        self.total, self.started = self.seconds, None


class Progress:
    """A tqdm bar on a terminal. Without tqdm, or into a file, a plain line every 15 seconds."""

    INTERVAL = 15.0

    def __init__(self, total: int, title: str) -> None:
        self.total, self.title, self.done = total, title, 0
        self.bar = self.make_bar()
        self.next_line = time.monotonic() + self.INTERVAL

    def make_bar(self):
        if not sys.stderr.isatty():
            return None
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        columns, rows = shutil.get_terminal_size()  # 80 × 24 where it is not known: tqdm would draw nothing there
        return tqdm(total=self.total, desc=self.title, ncols=columns, nrows=rows, leave=False)

    def advance(self, loss: Tensor, tokens_per_second: float) -> None:
        self.done += 1
        if self.bar is not None:
            if self.bar.update():  # drawn only a few times a second; reading the loss makes a GPU wait
                self.bar.set_postfix_str(f"loss {loss.item():.3f}, {tokens_per_second:,.0f} tokens/s")
        elif time.monotonic() > self.next_line:
            self.say(f"{self.position()}: loss {loss.item():.3f}, {tokens_per_second:,.0f} tokens/s")
            self.next_line = time.monotonic() + self.INTERVAL

    def position(self) -> str:
        return f"{self.title} {self.done:>{len(str(self.total))}}/{self.total}"

    def say(self, line: str) -> None:
        if self.bar is not None:
            self.bar.clear()
        say(line)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 3  Data: which text, its vocabulary, its two splits, and batches of it
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

INPUT = HERE / "input.txt"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOAD_TIMEOUT = 10.0  # seconds without a byte
TRAIN_FRACTION = 0.9


@dataclass(frozen=True)
class Corpus:
    source: str  # which text this is
    vocabulary: str  # its distinct characters, in order; a token is a position in here
    train: Tensor  # (characters,)
    val: Tensor

    def __str__(self) -> str:
        size = f"{len(self.train):,} characters to train on, {len(self.val):,} to validate"
        return f"data: {self.source}; {size}, {len(self.vocabulary)} distinct"


def load_corpus(data: Path | None, context: int) -> Corpus:
    """The text, encoded and split in order. Stops if it is not there, not text, or too short for `context`."""
    source, text = find_text(data)
    vocabulary = "".join(sorted(set(text)))
    tokens = encode(text, vocabulary)
    boundary = int(TRAIN_FRACTION * len(tokens))
    train, val = tokens[:boundary], tokens[boundary:]
    for name, split in (("training", train), ("validation", val)):
        if len(split) < context + 2:
            needed = f"a context of {context} needs at least {context + 2}"
            raise Stop(f"{source} is too short: {len(split)} characters in its {name} split, {needed}")
    return Corpus(source, vocabulary, train, val)


def find_text(data: Path | None) -> tuple[str, str]:
    """(source, text): the given file, else input.txt, else Tiny Shakespeare from the network, else what Python has."""
    if data is not None:
        return str(data), read_text(data)
    missing = None if INPUT.exists() else download_shakespeare(INPUT)
    if missing is None:
        return str(INPUT), read_text(INPUT)
    return f"Python's own help pages, as {missing}", python_help_pages()


def read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise Stop(f"{path} is not UTF-8 text: {problem.reason} at byte {problem.start}") from problem
    except OSError as problem:
        raise Stop(f"cannot read {path}: {problem.strerror or problem}") from problem
    if not text:
        raise Stop(f"{path} is empty")
    return text


def download_shakespeare(path: Path) -> str | None:
    """Fetch Tiny Shakespeare, verify it, and put it at `path`. None if all went well, else why not."""
    say(f"fetching Tiny Shakespeare from {SHAKESPEARE_URL}")
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=DOWNLOAD_TIMEOUT) as response:
            content = response.read(SHAKESPEARE_BYTES + 1)
        if len(content) != SHAKESPEARE_BYTES or hashlib.sha256(content).hexdigest() != SHAKESPEARE_SHA256:
            return "what was downloaded is not Tiny Shakespeare, and was discarded"
        with replacing(path) as temporary:
            temporary.write_bytes(content)
    except (OSError, http.client.HTTPException) as problem:
        return f"Tiny Shakespeare cannot be downloaded ({problem})"
    return None


def python_help_pages() -> str:
    """English prose that comes with Python: the help on its syntax and terms."""
    try:
        from pydoc_data.topics import topics
    except ImportError as problem:
        raise Stop("no text to train on: no network, and this Python has no help pages; give --data") from problem
    return "\n\n".join(topics[name] for name in sorted(topics))


def encode(text: str, vocabulary: str) -> Tensor:
    token = {character: index for index, character in enumerate(vocabulary)}
    unknown = set(text) - token.keys()
    if unknown:
        raise ValueError(f"not in the text's vocabulary: {''.join(sorted(unknown))!r}")
    return torch.tensor([token[character] for character in text], dtype=torch.long)


def decode(tokens: Tensor, vocabulary: str) -> str:
    return "".join(vocabulary[token] for token in tokens.tolist())


def entropy(tokens: Tensor) -> float:
    """Of single characters, in nats: the loss of a model that knows nothing but how frequent each one is."""
    p = tokens.bincount() / len(tokens)
    return -torch.special.xlogy(p, p).sum().item()


def draw_batch(tokens: Tensor, batch_size: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of the text, and the same windows one character later: (B, T) and (B, T)."""
    starts = torch.randint(len(tokens) - context, (batch_size, 1), generator=generator)
    windows = tokens[starts + torch.arange(context + 1)]  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


Batches = dict[str, list[tuple[Tensor, Tensor]]]


def fixed_batches(corpus: Corpus, settings: Settings) -> Batches:
    """The batches of every evaluation, whatever the attention: differences of losses are then the model's."""
    generator = torch.Generator().manual_seed(settings.seed + 1)  # not the batches that training begins with
    shape = settings.batch_size, settings.context, generator
    splits = {"train": corpus.train, "val": corpus.val}
    return {name: [draw_batch(split, *shape) for _ in range(settings.eval_batches)] for name, split in splits.items()}


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 4  NSALanguageModel
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


class DenseAttention(nn.Module):
    """Causal softmax attention over all tokens, with NativeSparseAttention's projections: what NSA is compared with."""

    def __init__(self, cfg: NSAConfig) -> None:
        super().__init__()
        assert cfg.rope_theta is None, "dense attention here has no rotary position embedding"
        self.cfg = cfg
        inner, inner_kv = cfg.heads * cfg.dim_head, cfg.kv_heads * cfg.dim_head
        self.to_q = nn.Linear(cfg.dim, inner, bias=cfg.bias)
        self.to_k = nn.Linear(cfg.dim, inner_kv, bias=cfg.bias)
        self.to_v = nn.Linear(cfg.dim, inner_kv, bias=cfg.bias)
        self.to_out = nn.Linear(inner, cfg.dim, bias=cfg.bias)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(project(x)) for project in (self.to_q, self.to_k, self.to_v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.cfg.kv_heads != self.cfg.heads)
        return self.dropout(self.to_out(o.transpose(1, 2).flatten(2)))  # (B, H, T, D) → (B, T, H·D) → (B, T, dim)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.cfg.dim_head)).transpose(1, 2)  # (B, T, H·D) → (B, H, T, D)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no graph inside; the mode that the model was in, afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class NSALanguageModel(nn.Module):
    """A GPT of NSA blocks: token and position embeddings, blocks, LayerNorm, a head tied to the token embedding.

    `attention="dense"` replaces the attention of every block with DenseAttention and leaves all else as it is.

    >>> model = NSALanguageModel(vocab_size=65, cfg=NSAConfig(dim=64, heads=4, seq_len=128), layers=2)
    >>> logits, loss = model(torch.randint(65, (8, 128)))
    >>> logits.shape
    torch.Size([8, 128, 65])
    """

    def __init__(self, vocab_size: int, cfg: NSAConfig, layers: int, attention: str = "nsa") -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention = {attention!r}: must be one of {', '.join(ATTENTIONS)}")
        self.cfg = cfg
        self.attention = attention
        self.token_embedding = nn.Embedding(vocab_size, cfg.dim)
        self.position_embedding = nn.Embedding(cfg.seq_len, cfg.dim)
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(NSABlock(cfg) for _ in range(layers))
        if attention == "dense":
            for block in self.blocks:
                block.attn = DenseAttention(cfg)
        self.norm = nn.LayerNorm(cfg.dim, bias=cfg.bias)
        self.head = nn.Linear(cfg.dim, vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight
        self.initialize()

    def initialize(self) -> None:
        """As nanoGPT does: normal(0.02), and less where 2·layers branches add up in the residual stream."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            last_of_ffn = [layer for layer in block.ffn if isinstance(layer, nn.Linear)][-1]
            for projection in (block.attn.to_out, last_of_ffn):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * len(self.blocks)))

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """tokens (B, T), targets (B, T) → logits (B, T, vocabulary), mean cross-entropy in nats or None."""
        logits = self.head(self.norm(self.hidden(tokens)))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def hidden(self, tokens: Tensor, layers: int | None = None) -> Tensor:
        """The residual stream (B, T, dim) behind the first `layers` blocks; None: behind all."""
        length = tokens.shape[1]
        if length > self.cfg.seq_len:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}: the longest sequence is {self.cfg.seq_len}")
        positions = torch.arange(length, device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))  # (B, T, dim)
        for block in self.blocks[:layers]:
            x = block(x)
        return x

    def patterns(self, tokens: Tensor, layer: int):
        """`NativeSparseAttention.attention_patterns` of a layer, counted from 0, on what tokens (B, T) bring it."""
        block = self.blocks[layer]
        with evaluation_mode(self):
            return block.attn.attention_patterns(block.norm1(self.hidden(tokens, layer)))

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue tokens (B, T), T ≥ 1, one at a time, each drawn from what the last `seq_len` tokens predict."""
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}: must be (B, T) with T at least 1")
        if not temperature > 0:
            raise ValueError(f"temperature = {temperature}: must be above 0; top_k=1 always takes the likeliest token")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k = {top_k}: must be at least 1")
        with evaluation_mode(self):
            for _ in range(max_new_tokens):
                logits = self(tokens[:, -self.cfg.seq_len :])[0][:, -1].float() / temperature  # (B, vocabulary)
                if top_k is not None:
                    least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -math.inf)
                drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
                tokens = torch.cat([tokens, drawn], dim=1)
        return tokens


def build_model(corpus: Corpus, attention: str, settings: Settings, runtime: Runtime) -> NSALanguageModel:
    torch.manual_seed(settings.seed)
    try:
        model = NSALanguageModel(len(corpus.vocabulary), settings.nsa_config(), settings.layers, attention)
    except (ValueError, TypeError) as problem:
        raise Stop(str(problem)) from problem
    return model.to(runtime.device)


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 5  Optimizer and schedule
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


def make_optimizer(model: NSALanguageModel, settings: Settings) -> torch.optim.AdamW:
    """AdamW. The matrices of linear layers decay; norms, biases, embeddings, gates and compressors do not."""
    linear = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    decayed = [weight for weight in linear if weight is not model.token_embedding.weight]  # the head's weight is tied
    ids = {id(weight) for weight in decayed}
    others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    fused = others[0].device.type == "cuda"
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99), fused=fused)


def learning_rate(iteration: int, settings: Settings) -> float:
    """Linear warm-up to the peak, then a cosine down to a tenth of it at the last iteration."""
    peak, warmup = settings.learning_rate, settings.warmup
    if iteration < warmup:
        return peak * (iteration + 1) / (warmup + 1)
    progress = (iteration - warmup) / max(1, settings.iterations - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 6  Evaluate
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Evaluation:
    iteration: int
    train: float
    val: float


def evaluate(model: NSALanguageModel, batches: Batches, iteration: int, runtime: Runtime) -> Evaluation:
    """Losses on the fixed batches of both splits."""
    with evaluation_mode(model), runtime.autocast():
        means = {name: mean_loss(model, split, runtime.device) for name, split in batches.items()}
    return Evaluation(iteration, **means)


def mean_loss(model: NSALanguageModel, batches: list[tuple[Tensor, Tensor]], device: torch.device) -> float:
    losses = [model(tokens.to(device), targets.to(device))[1] for tokens, targets in batches]
    return torch.stack(losses).mean().item()


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 7  Checkpoint: the best model so far, in one file that `torch.load(weights_only=True)` reads
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


class Keeper:
    """Keeps the model with the lowest validation loss, on disk; `best` says which one lies there."""

    def __init__(self, path: Path, vocabulary: str, settings: Settings) -> None:
        self.path, self.vocabulary, self.settings = path, vocabulary, settings
        self.best: Evaluation | None = None

    def offer(self, model: NSALanguageModel, evaluation: Evaluation) -> None:
        if self.best is None or evaluation.val < self.best.val:
            save_checkpoint(self.path, model, evaluation, self.vocabulary, self.settings)
            self.best = evaluation

    def __str__(self) -> str:
        if self.best is None:
            return "no checkpoint had been written yet"
        return f"{self.path} keeps iteration {self.best.iteration} (validation loss {self.best.val:.4f})"


def save_checkpoint(
    path: Path, model: NSALanguageModel, evaluation: Evaluation, vocabulary: str, settings: Settings
) -> None:
    checkpoint = {
        "model": model.state_dict(),
        "config": dataclasses.asdict(model.cfg),
        "layers": len(model.blocks),
        "attention": model.attention,
        "vocabulary": vocabulary,
        "settings": settings.plain(),
        **dataclasses.asdict(evaluation),
    }
    with replacing(path) as temporary:
        torch.save(checkpoint, temporary)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[NSALanguageModel, dict[str, typing.Any]]:
    """The model of a checkpoint, in evaluation mode, and everything else that the file holds."""
    checkpoint = torch.load(path, map_location=device, weights_only=True)
    config = NSAConfig(**checkpoint["config"])
    model = NSALanguageModel(len(checkpoint["vocabulary"]), config, checkpoint["layers"], checkpoint["attention"])
    model.load_state_dict(checkpoint.pop("model"))
    return model.to(device).eval(), checkpoint


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 8  Generate
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


def encode_prompt(vocabulary: str, settings: Settings) -> Tensor:
    prompt = settings.prompt
    if prompt is None:
        prompt = "\n" if "\n" in vocabulary else vocabulary[0]
    try:
        tokens = encode(prompt, vocabulary)
    except ValueError as problem:
        raise Stop(f"prompt = {prompt!r}: {problem}") from problem
    if len(tokens) == 0:
        raise Stop("prompt = '': must have a character at least")
    return tokens[None]  # (1, T)


def generate_text(model: NSALanguageModel, vocabulary: str, settings: Settings, runtime: Runtime) -> str:
    prompt = encode_prompt(vocabulary, settings).to(runtime.device)
    with runtime.autocast():
        tokens = model.generate(
            prompt,
            settings.sample_length,
            temperature=settings.temperature,
            top_k=settings.top_k,
            generator=runtime.generator(settings.seed),
        )
    return decode(tokens[0], vocabulary)


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 9  Train
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


@dataclass
class Run:
    """What came of training one model."""

    attention: str
    parameters: int
    checkpoint: Path
    best: Evaluation
    evaluations: list[Evaluation]
    losses: list[float]  # of every training batch
    seconds: float  # in training steps; evaluations not counted
    tokens_per_second: float


def train(model: NSALanguageModel, corpus: Corpus, batches: Batches, settings: Settings, runtime: Runtime) -> Run:
    """Train, evaluate now and then, keep the best model. Ctrl-C and a diverging loss end it with a clear line."""
    torch.manual_seed(settings.seed)
    optimizer = make_optimizer(model, settings)
    generator = torch.Generator().manual_seed(settings.seed)  # both attentions see the same batches
    keeper = Keeper(settings.out / f"{model.attention}.pt", corpus.vocabulary, settings)
    stopwatch = Stopwatch(runtime)
    losses: list[Tensor] = []
    evaluations: list[Evaluation] = []
    try:
        with Progress(settings.iterations, model.attention) as progress:
            for due in (*range(0, settings.iterations, settings.eval_interval), settings.iterations):
                with stopwatch:
                    while len(losses) < due:
                        batch = draw_batch(corpus.train, settings.batch_size, settings.context, generator)
                        losses.append(train_step(model, optimizer, batch, len(losses), settings, runtime))
                        progress.advance(losses[-1], tokens_per_second(len(losses), stopwatch.seconds, settings))
                now = evaluate(model, batches, due, runtime)
                if not math.isfinite(now.train + now.val):
                    raise Stop(f"the loss is not finite any more: try a lower --learning-rate; {keeper}", exit_code=1)
                if due > 0:  # a model that has learnt nothing is not worth a file
                    keeper.offer(model, now)
                evaluations.append(now)
                progress.say(f"{progress.position()}  loss {now.train:.4f}  validation {now.val:.4f}")
    except KeyboardInterrupt:
        raise Stop(f"interrupted in iteration {len(losses)} of {model.attention}; {keeper}", exit_code=130) from None
    return Run(
        attention=model.attention,
        parameters=count_parameters(model),
        checkpoint=keeper.path,
        best=keeper.best,
        evaluations=evaluations,
        losses=torch.stack(losses).tolist(),
        seconds=stopwatch.seconds,
        tokens_per_second=tokens_per_second(len(losses), stopwatch.seconds, settings),
    )


def train_step(
    model: NSALanguageModel,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    iteration: int,
    settings: Settings,
    runtime: Runtime,
) -> Tensor:
    """One update; returns the batch's loss before it, left on the device so that nothing waits for it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(iteration, settings)
    tokens, targets = (each.to(runtime.device) for each in batch)
    with runtime.autocast():
        loss = model(tokens, targets)[1]
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
    optimizer.step()
    return loss.detach()


def tokens_per_second(iterations: int, seconds: float, settings: Settings) -> float:
    return iterations * settings.batch_size * settings.context / seconds


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 10  Pictures: loss curves, and attention patterns
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════

COLORS = {"nsa": "#c2410c", "dense": "#1d4ed8"}
BRANCHES = ("local", "compressed", "selective")


def new_figure(width: float, height: float):
    """An empty matplotlib figure that needs no screen; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def plot_losses(runs: Iterable[Run], path: Path) -> str:
    """Loss of every training batch, thin, and of the evaluations. Returns a line that says what was done."""
    figure = new_figure(8, 4.5)
    if figure is None:
        return "loss curves: skipped, matplotlib is not installed"
    axes = figure.add_subplot(xlabel="iteration", ylabel="cross-entropy per character, nats")
    for run in runs:
        color, iterations = COLORS[run.attention], [each.iteration for each in run.evaluations]
        axes.plot(run.losses, color=color, alpha=0.25, linewidth=0.8)
        train, val = [each.train for each in run.evaluations], [each.val for each in run.evaluations]
        axes.plot(iterations, train, "--", color=color, label=f"{run.attention}, training")
        axes.plot(iterations, val, "o-", color=color, markersize=4, label=f"{run.attention}, validation")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)
    return f"loss curves: {path}"


def plot_patterns(model: NSALanguageModel, corpus: Corpus, settings: Settings, runtime: Runtime) -> str:
    """Draw, for each head and branch of one layer, which keys each query of a validation passage looked at."""
    cfg, layer = model.cfg, settings.plot_layer or settings.layers
    figure = new_figure(10.5, 1.2 + 2.9 * cfg.heads)
    if figure is None:
        return "attention patterns: skipped, matplotlib is not installed"
    tokens = corpus.val[: cfg.seq_len]
    patterns = model.patterns(tokens.to(runtime.device)[None], layer - 1)
    grid = figure.subplots(cfg.heads, len(BRANCHES), sharex=True, sharey=True, squeeze=False)
    for head, row in enumerate(grid):
        for branch, axes in enumerate(row):
            image = draw_branch(axes, patterns, head, branch, cfg)
        row[0].set_ylabel(f"head {head + 1}\nquery position")
    for axes in grid[-1]:
        axes.set_xlabel("key position")
    figure.colorbar(image, ax=grid, shrink=1 / min(cfg.heads, 2), aspect=40, label="attention weight")
    passage = decode(tokens[:60], corpus.vocabulary).replace("\n", "⏎")
    figure.suptitle(f"What each branch looked at: layer {layer} of {settings.layers}, on “{passage} …”", fontsize=11)
    figure.savefig(settings.plot_patterns)
    return f"attention patterns: {settings.plot_patterns}"


def draw_branch(axes, patterns, head: int, branch: int, cfg: NSAConfig):
    """One panel: queries downwards, keys to the right; a compressed key stands at the start of its block."""
    from matplotlib.colors import LogNorm

    name = BRANCHES[branch]
    weights = getattr(patterns, name)[0, head].float().cpu()  # (T, T), or (T, C) for compressed keys
    length = weights.shape[0]
    width = weights.shape[1] * cfg.stride if name == "compressed" else length
    gate = patterns.gates[0, :, head, branch].float().mean().item()
    axes.set_title(f"{name}, gate {gate:.2f}", fontsize=10)
    axes.set_facecolor("black")
    axes.set(xlim=(0, length), ylim=(length, 0), aspect="equal")
    return axes.imshow(
        weights.numpy(),
        extent=(0, width, length, 0),
        norm=LogNorm(1e-3, 1.0, clip=False),
        cmap="inferno",
        interpolation="nearest",
    )


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 11  Main
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


def check_before_work(settings: Settings, corpus: Corpus) -> None:
    """Find out before hours of training, not after them, what would go wrong behind them."""
    encode_prompt(corpus.vocabulary, settings)
    picture = settings.plot_patterns
    if picture is not None and picture.suffix != ".png":
        raise Stop(f"plot_patterns = {str(picture)!r}: must end in .png")
    if picture is not None and "nsa" not in settings.attentions:
        raise Stop("plot_patterns: dense attention has no branches to draw; give --attention nsa or both")
    try:
        for folder in (settings.out, picture.parent if picture else settings.out):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise Stop(f"cannot make folder {problem.filename}: {problem.strerror}") from problem


def loss_table(runs: list[Run]) -> str:
    rows = [("", *(run.attention for run in runs))]
    rows += [("validation loss, best", *(f"{run.best.val:.4f}" for run in runs))]
    rows += [("training loss, then", *(f"{run.best.train:.4f}" for run in runs))]
    rows += [("at iteration", *(f"{run.best.iteration}" for run in runs))]
    rows += [("parameters", *(f"{run.parameters:,}" for run in runs))]
    rows += [("tokens/s", *(f"{run.tokens_per_second:,.0f}" for run in runs))]
    rows += [("seconds of training", *(f"{run.seconds:.1f}" for run in runs))]
    return "\n".join("".join((f"{title:<24}", *(f"{cell:>12}" for cell in cells))) for title, *cells in rows)


def write_record(runs: list[Run], settings: Settings, runtime: Runtime) -> None:
    """A run that can be read and repeated later: what it was told, on what it ran, and what came of it."""
    environment = {"torch": torch.__version__, "python": platform.python_version(), "device": str(runtime)}
    results = [dataclasses.asdict(run) for run in runs]
    record = {"settings": settings.plain(), "environment": environment, "runs": results}
    (settings.out / "run.json").write_text(json.dumps(record, indent=1, default=str), encoding="utf-8")


def run(settings: Settings) -> None:
    runtime = Runtime.of(settings)
    corpus = load_corpus(settings.data, settings.context)
    say(str(corpus))
    models = {attention: build_model(corpus, attention, settings, runtime) for attention in settings.attentions}
    sizes = ", ".join(f"{attention} {count_parameters(model):,}" for attention, model in models.items())
    say(f"device: {runtime}; parameters: {sizes}")
    check_before_work(settings, corpus)

    batches = fixed_batches(corpus, settings)
    runs = [train(model, corpus, batches, settings, runtime) for model in models.values()]
    write_record(runs, settings, runtime)

    best, _ = load_checkpoint(runs[0].checkpoint, runtime.device)
    say(f"\n{generate_text(best, corpus.vocabulary, settings, runtime).strip()}\n")
    say(plot_losses(runs, settings.out / "loss.png"))
    if settings.plot_patterns is not None:
        say(plot_patterns(best, corpus, settings, runtime))
    for each in runs:
        say(f"checkpoint: {each.checkpoint}")
    say(f"\n{loss_table(runs)}")
    say(f"knowing only how frequent each character is: {entropy(corpus.train):.2f}")


def main(arguments: list[str] | None = None) -> int:
    try:
        run(parse_settings(arguments))
    except Stop as reason:
        print(f"{Path(__file__).name}: {reason}", file=sys.stderr, flush=True)
        return reason.exit_code
    except KeyboardInterrupt:
        print(f"{Path(__file__).name}: interrupted", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
