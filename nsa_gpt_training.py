"""Train a GPT of Native Sparse Attention (NSA) blocks, and the same GPT with dense attention, on text or on recall.

    python nsa_gpt_training.py                             quick test: both attentions, their losses side by side
    python nsa_gpt_training.py --full                      the full run: 10 M parameters, 5000 iterations, for a GPU
    python nsa_gpt_training.py --data book.txt             any UTF-8 text; Tiny Shakespeare unless told otherwise
    python nsa_gpt_training.py --task recall               what was said early in a long sequence, asked for at its end
    python nsa_gpt_training.py --full --resume             go on where a run was stopped
    python nsa_gpt_training.py --generate --prompt "To be" text of a trained model, as it comes
    python nsa_gpt_training.py --help                      every setting, with its value in each preset

    torchrun --nproc-per-node 8 -- nsa_gpt_training.py --full     a process for each GPU: same batches, same losses

The data, its 90/10 split and the full run's schedule are those of nanoGPT's Shakespeare example: losses compare.

Sections; each one calls only those above it.

     1 settings       4 NSALanguageModel             7 checkpoint     10 pictures
     2 runtime        5 optimizer and schedule       8 generate       11 main
     3 data           6 evaluate                     9 train
"""

import os
import sys

if __name__ == "__main__" and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
    print("loading PyTorch ...", end="\r", file=sys.stderr, flush=True)  # seconds on a slow disk: say that we are alive

import argparse
import dataclasses
import hashlib
import http.client
import json
import math
import platform
import shutil
import signal
import time
import types
import typing
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from native_sparse_attention import NSABlock, NSACache, NSAConfig

QUICK_TEST = True  # False: the full run is the default; --quick and --full override it

HERE = Path(__file__).resolve().parent
IS_MAIN = os.environ.get("RANK", "0") == "0"  # torchrun numbers the processes; the first one prints and writes
ATTENTIONS = ("nsa", "dense")
BRANCHES = ("local", "compressed", "selective")


class Stop(Exception):
    """Ends the program with one line for its user, and no traceback."""

    def __init__(self, line: str, exit_code: int = 2) -> None:
        super().__init__(line)
        self.exit_code = exit_code


def gist(problem: Exception) -> str:
    """The first line of an exception's message, or the operating system's words without path and number."""
    return (getattr(problem, "strerror", None) or str(problem) or type(problem).__name__).splitlines()[0]


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 1  Settings: one dataclass is the only home of names, defaults and help texts; the command line is generated from it
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


def setting(
    default: object,
    help: str,
    *,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    most: float | None = None,
    free: bool = False,
):
    """A field of Settings: its default in the full run, what it means, which values it takes, and whether it is free to
    differ where a run is resumed."""
    metadata = {"help": help, "choices": choices, "least": least, "most": most, "free": free}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Settings:
    """Everything that shapes a run. The defaults are the full run's; `QUICK` and `RECALL` are the other presets.

    Fields that NSAConfig has too go to it under the same name, and it checks them.
    """

    task: str = setting(
        "text",
        "text: predict the next character; recall: what was said early in a sequence is asked for at its end",
        choices=("text", "recall"),
    )
    attention: str = setting(
        "nsa", "attention to train; both: one after the other", choices=(*ATTENTIONS, "both"), free=True
    )
    data: Path | None = setting(
        None, "UTF-8 text; not given: input.txt beside this script, else Tiny Shakespeare, fetched", free=True
    )
    out: Path = setting(HERE / "out", "folder for checkpoints, pictures and the run's record", free=True)
    resume: bool = setting(False, "go on where the run in the folder --out was stopped", free=True)
    log: Path | None = setting(None, "write every step and evaluation to this file, a JSON object a line", free=True)
    tensorboard: bool = setting(False, "write them for TensorBoard too, into the folder --out", free=True)
    plot_patterns: Path | None = setting(
        None, "draw what each branch of each head looked at, in this PNG file", free=True
    )
    plot_layer: int | None = setting(None, "layer to draw, counted from 1; not given: the last", least=1, free=True)

    device: str = setting(
        "auto", "where to train: cpu, cuda, cuda:1, ...; auto: CUDA if there is one, else the CPU", free=True
    )
    dtype: str = setting(
        "auto",
        "precision of the arithmetic (weights stay float32); auto: bfloat16 on CUDA, float32 elsewhere",
        choices=("auto", "float32", "bfloat16"),
    )
    fsdp: bool = setting(False, "several processes: shard weights and optimizer (FSDP2), for large models", free=True)
    compile: bool = setting(False, "compile the blocks and the loss (torch.compile)", free=True)
    graphs: bool = setting(
        False, "run what is compiled as CUDA graphs, so that no step waits for Python; in one process", free=True
    )
    recompute: bool = setting(False, "compute each block again in the backward: slower, but less memory", free=True)
    seed: int = setting(1337, "seed of weights, batches, dropout and generated text", least=0, most=2**63 - 1)

    layers: int = setting(6, "blocks of attention and feed-forward", least=1)
    dim: int = setting(384, "width of the model")
    heads: int = setting(6, "query heads")
    bias: bool = setting(NSAConfig.bias, "biases in linear layers and norms")
    kv_heads: int | None = setting(None, "key/value heads, each shared by a group of query heads; not given: heads")
    context: int = setting(256, "tokens that the model sees at once; a token of text is a character", least=1)
    rope_theta: float | None = setting(None, "base of rotary positions; not given: a learned position embedding")
    dropout: float = setting(0.2, "on embeddings, attention output and feed-forward")
    init_std: float = setting(0.02, "standard deviation of the first weights", least=0)
    value_dropout: float = setting(
        0.35, "on the values of whole tokens, each head its own: as dropout on attention probabilities would", least=0
    )

    local_window: int = setting(64, "NSA: tokens that the local branch sees")
    block_size: int = setting(32, "NSA: tokens in a compressed block")
    stride: int | None = setting(None, "NSA: tokens between the starts of compressed blocks; not given: block size")
    select_block_size: int | None = setting(None, "NSA: tokens in a selection block; not given: block size")
    topk_blocks: int = setting(4, "NSA: blocks that a query selects, the forced ones included")
    init_blocks: int = setting(NSAConfig.init_blocks, "NSA: forced blocks at the start of the sequence")
    local_blocks: int = setting(NSAConfig.local_blocks, "NSA: forced blocks up to and including the query's own")
    compression: str = setting("grouped_mlp", "NSA: block of keys to one key: grouped_mlp, conv1d or avgpool")
    gate_mode: str = setting("q_cond", "NSA: a gate is a learned number (static), or linear in the input (q_cond)")
    gate_init: tuple[float, float, float] = setting((2.0, -2.0, -2.0), "NSA: logits of the three gates")
    branches: tuple[str, ...] = setting(
        BRANCHES, "NSA: branches to use; the gates of the others stay 0", choices=BRANCHES
    )
    separate_kv: bool = setting(NSAConfig.separate_kv, "NSA: each branch has its own key and value projections")
    use_flash: bool = setting(
        NSAConfig.use_flash, "NSA: accelerated kernels where they exist; else plain PyTorch", free=True
    )

    iterations: int = setting(5000, "optimizer steps", least=1)
    batch_size: int = setting(64, "sequences in a batch, those of all processes together", least=1)
    first_context: int | None = setting(
        None,
        "training begins with sequences that are shorter, by halves, but not below so many tokens, and with as many "
        "more of them in a batch; then they double until they fill context; not given: they fill it from the start",
        least=8,
    )
    growth: float = setting(0.5, "share of the iterations in which sequences grow to context", least=1e-6, most=1)
    accumulate: int = setting(
        1, "parts that a process computes its share of a batch in, to save memory", least=1, free=True
    )
    learning_rate: float = setting(1e-3, "peak learning rate; it decays to a tenth along a cosine", least=0)
    warmup: int = setting(100, "iterations of linear warm-up", least=0)
    weight_decay: float = setting(0.1, "on matrices; not on norms, biases, embeddings and gates", least=0)
    grad_clip: float = setting(1.0, "largest norm of the gradient", least=1e-6)
    eval_interval: int = setting(250, "iterations between evaluations", least=1)
    eval_batches: int = setting(200, "fixed batches of an evaluation, of each split", least=1)

    pairs: int = setting(32, "recall: keys with a value in a sequence; one for 8 tokens where it is short", least=1)
    test_contexts: tuple[int, ...] = setting((), "recall: other lengths to test the trained model at")

    generate: bool = setting(False, "train nothing; continue --prompt with the model of --checkpoint", free=True)
    checkpoint: Path | None = setting(None, "model to generate with; not given: the best one in --out", free=True)
    prompt: tuple[str, ...] | None = setting(
        None, "what generated text begins with, one or more; not given: a new line", free=True
    )
    sample_length: int = setting(500, "characters to generate at the end", least=0, free=True)
    temperature: float = setting(0.8, "of generated text: below 1 is safer, above 1 bolder", least=0.01, free=True)
    top_k: int | None = setting(None, "generate among the k likeliest characters only", least=1, free=True)
    top_p: float | None = setting(None, "generate among the likeliest characters that make up this share", free=True)
    stop: str | None = setting(None, "generated text ends before this text", free=True)

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value, choices = getattr(self, each.name), each.metadata["choices"]
            least, most = each.metadata["least"], each.metadata["most"]
            if least is not None and value is not None and not value >= least:
                raise ValueError(f"{each.name} = {value!r}: must be at least {least}")
            if most is not None and not value <= most:
                raise ValueError(f"{each.name} = {value!r}: must be at most {most}")
            chosen = value if isinstance(value, tuple) else (value,)
            if choices is not None and not set(chosen) <= set(choices):
                raise ValueError(f"{each.name} = {value!r}: must be one of {', '.join(choices)}")
        if self.plot_layer is not None and self.plot_layer > self.layers:
            raise ValueError(f"plot_layer = {self.plot_layer}: there are {self.layers} layers")
        if not self.value_dropout < 1:
            raise ValueError(f"value_dropout = {self.value_dropout}: must be below 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p}: must be above 0 and at most 1")
        if self.stop == "":
            raise ValueError("stop = '': must have a character at least")
        if self.first_context is not None and self.first_context > self.context:
            raise ValueError(f"first_context = {self.first_context}: must be at most context = {self.context}")
        if self.task == "recall":
            self.check_recall()

    def check_recall(self) -> None:
        shortest = min((self.context, *self.test_contexts))
        if self.pairs > RECALL_KEYS:
            raise ValueError(f"pairs = {self.pairs}: must be at most {RECALL_KEYS}, the number of keys")
        if shortest < TOKENS_OF_PAIR * self.pairs:
            rule = f"must be at least {TOKENS_OF_PAIR} * pairs = {TOKENS_OF_PAIR * self.pairs}"
            raise ValueError(f"context = {shortest}: {rule}")
        if self.rope_theta is None and any(length > self.context for length in self.test_contexts):
            raise ValueError(f"test_contexts = {self.test_contexts}: lengths above context need rope_theta")

    def batch_shape(self, iteration: int) -> tuple[int, int]:
        """Sequences in a training batch, and tokens in each. Short ones are more, so that the tokens are as many.

        They stay as short as they begin for half of the time in which they grow.
        """
        halvings = 0  # of context, to get to the first sequences
        least = self.context if self.first_context is None else self.first_context
        while self.context % (2 << halvings) == 0 and self.context >> (halvings + 1) >= least:
            halvings += 1
        grown = min(1.0, iteration / (self.growth * self.iterations))
        doublings = 0 if grown < 0.5 else 1 + int((2 * grown - 1) * (halvings - 1))
        left = max(0, halvings - doublings)
        return self.batch_size << left, self.context >> left

    @property
    def attentions(self) -> tuple[str, ...]:
        return ATTENTIONS if self.attention == "both" else (self.attention,)

    def nsa_config(self) -> NSAConfig:
        shared = {each.name for each in dataclasses.fields(NSAConfig)}
        mine = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name in shared}
        return NSAConfig(seq_len=max(self.context, *self.test_contexts, 1), **mine)

    def plain(self) -> dict[str, typing.Any]:
        """As a dict that JSON and `torch.load(weights_only=True)` take."""
        values = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


RECALL_KEYS = RECALL_VALUES = RECALL_FILLERS = 32  # distinct tokens of each kind
TOKENS_OF_PAIR = 8  # that a sequence to recall from has at least for each of its pairs

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
    value_dropout=0.0,
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
RECALL = dataclasses.replace(
    FULL,
    task="recall",
    attention="both",
    out=FULL.out / "recall",
    layers=2,
    dim=64,
    heads=2,
    context=1024,
    bias=True,
    rope_theta=1e10,  # most of a head turns so slowly that it matches contents at any distance
    dropout=0.0,
    value_dropout=0.0,
    init_std=0.125,  # 1/sqrt(dim): attention differs between keys from the start
    local_window=16,
    block_size=4,  # small ones that overlap: each key is in a block with its value
    stride=2,
    select_block_size=16,
    gate_mode="static",
    gate_init=(0.0, 0.0, 0.0),
    iterations=400,
    learning_rate=5e-3,
    warmup=20,
    eval_interval=100,
    eval_batches=4,
    first_context=32,  # a short sequence has few keys to tell apart: what answers there is found at once, and stays
)


class OneLineParser(argparse.ArgumentParser):
    def print_help(self, file: typing.TextIO | None = None) -> None:
        say(self.format_help(), end="")

    def error(self, message: str) -> typing.NoReturn:
        raise Stop(f"{message} (--help lists the flags)")


def parse_settings(arguments: list[str] | None = None) -> Settings:
    """Settings from the command line: a preset, and whatever flags change in it."""
    parsed = vars(make_parser().parse_args(arguments))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in parsed.items()}
    given = {name: value for name, value in given.items() if value is not None}
    quick = given.pop("quick", None)
    if given.get("task") == "recall":
        if quick is not None:
            raise Stop("--quick and --full are presets for text; --task recall is a preset of its own")
        preset = RECALL
    else:
        preset = QUICK if (QUICK_TEST if quick is None else quick) else FULL
    try:
        return dataclasses.replace(preset, **given)
    except ValueError as problem:
        raise Stop(str(problem)) from problem


def make_parser() -> argparse.ArgumentParser:
    """A flag for every field of Settings. Flags that are not given stay None, so that the preset decides."""
    summary, *usage = __doc__.split("\n\n")[:3]
    parser = OneLineParser(
        description=summary,
        epilog="\n\n".join(usage),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--quick", action="store_true", default=None, help="preset: seconds on a CPU")
    preset.add_argument("--full", dest="quick", action="store_false", default=None, help="preset: for a GPU")
    for each in dataclasses.fields(Settings):
        flag = "--" + each.name.replace("_", "-")
        parser.add_argument(flag, help=help_text(each), **parsing_of(each))
    return parser


def help_text(each: dataclasses.Field) -> str:
    presets = {"full": FULL, "quick": QUICK, "recall": RECALL}
    values = {name: getattr(preset, each.name) for name, preset in presets.items()}
    if not any(values.values()):
        return each.metadata["help"]
    same = len(set(values.values())) == 1
    shown = f"{values['full']}" if same else ", ".join(f"{name}: {value}" for name, value in values.items())
    return f"{each.metadata['help']} ({shown})"


def parsing_of(each: dataclasses.Field) -> dict[str, typing.Any]:
    """What argparse needs to know of a field: from its type `X`, `tuple[X, ...]`, either of them or None, or bool."""
    if each.type is bool:
        return {"action": argparse.BooleanOptionalAction}
    kind = typing.get_args(each.type)[0] if isinstance(each.type, types.UnionType) else each.type
    items = typing.get_args(kind)
    of = items[0] if items else kind
    parsing = {"type": of, "choices": each.metadata["choices"]}
    if parsing["choices"] is None:
        parsing["metavar"] = of.__name__.upper()
    if items:
        parsing["nargs"] = "+" if items[-1] is Ellipsis else len(items)
    return parsing


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 2  Runtime: where the arithmetic happens, in which precision, in how many processes; how lines reach the user
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


@dataclass(frozen=True)
class Runtime:
    """A device, a precision, and this process's place among those that train together."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def peak_memory(self) -> float:
        """GiB that this process has held at most: of the GPU's memory, or of the host's."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        try:
            import resource
        except ImportError:  # Windows
            return math.nan
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    def share(self, batch: tuple[Tensor, Tensor], parts: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's rows of a batch, in so many equal parts, on the device."""
        rows = len(batch[0]) // (self.world * parts)
        for part in range(self.rank * parts, (self.rank + 1) * parts):
            tokens, targets = (self.send(each[part * rows : (part + 1) * rows]) for each in batch)
            yield tokens, targets

    def send(self, x: Tensor) -> Tensor:
        """To the device; a GPU is not waited for."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x.to(self.device)

    def sum(self, numbers: Tensor) -> Tensor:
        """Over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(numbers)
        return numbers

    def gather(self, value: object) -> list:
        """The value of every process."""
        values = [value]
        if self.world > 1:
            values *= self.world
            dist.all_gather_object(values, value)
        return values

    def on_main(self, function: Callable[..., typing.Any], *arguments: object) -> typing.Any:
        """What the function returns on the first process, for all of them. It runs there alone; a Stop stops all."""
        if self.world == 1:
            return function(*arguments)
        answer: list[typing.Any] = [None]
        if self.rank == 0:
            try:
                answer = [function(*arguments)]
            except Stop as reason:
                answer = [reason]
        dist.broadcast_object_list(answer, device=self.device)
        if isinstance(answer[0], Stop):
            raise answer[0]
        return answer[0]

    def alone(self) -> "Runtime":
        """The same, for work that one process does by itself."""
        return dataclasses.replace(self, rank=0, world=1)

    def __str__(self) -> str:
        name = f" ({torch.cuda.get_device_name(self.device)})" if self.device.type == "cuda" else ""
        processes = f", {self.world} processes" if self.world > 1 else ""
        return f"{self.device}{name}, {str(self.dtype).removeprefix('torch.')}{processes}"


@contextmanager
def joined_processes(settings: Settings) -> Iterator[Runtime]:
    """Joins the processes that torchrun started, if it did, and leaves them whichever way the body ends."""
    together = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if settings.fsdp and not together:
        raise Stop("fsdp: shards a model over processes; start them with torchrun --nproc-per-node N")
    device = find_device(settings.device)
    automatic = torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = automatic if settings.dtype == "auto" else getattr(torch, settings.dtype)
    if not together:
        yield Runtime(device, dtype)
        return
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo", device_id=device if on_cuda else None)
    try:
        yield Runtime(device, dtype, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def find_device(name: str) -> torch.device:
    """The device of that name. Among several processes of one host, each has the GPU of its number."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        number = torch.zeros(1, device=name)
        number.item()  # fails here and now where the device cannot be used
    except (RuntimeError, AssertionError) as problem:
        raise Stop(f"device = {name!r}: {gist(problem)}") from problem
    return number.device


def say(line: str = "", end: str = "\n") -> None:
    """Print on the first process, at once, into a pipe too. Stops where nobody can read it any more."""
    if not IS_MAIN:
        return
    try:
        print(line, end=end, flush=True)
    except OSError as problem:
        with suppress(OSError):  # Python would fail again at its exit, where it writes what is left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(problem, BrokenPipeError):  # the reader has seen enough, as `head` has: end quietly
            raise Stop("", exit_code=141) from problem
        raise Stop(f"cannot write to standard output: {gist(problem)}", exit_code=1) from problem


@contextmanager
def writing(path: Path, exit_code: int = 1) -> Iterator[None]:
    """Stops in one line if the body cannot write `path`."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as problem:  # PyTorch and matplotlib have their own ways of saying it
        raise Stop(f"cannot write {path}: {gist(problem)}", exit_code) from problem


@contextmanager
def postponed(failures: list[Stop]) -> Iterator[None]:
    """Notes a Stop instead of stopping, so that what follows is still done."""
    try:
        yield
    except Stop as reason:
        failures.append(reason)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder, and keeps other runs out of it until the body or this process ends, whichever way it does."""
    path = folder / ".lock"
    with writing(path, exit_code=2):
        folder.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    with file:
        try:
            lock_file(file)
            free = path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))  # else it has just ended
        except (BlockingIOError, PermissionError):
            free = False
        except OSError:
            free = True  # a file system that has no locks
        if not free:
            raise Stop(f"another run is writing to {folder}: wait until it has ended, or choose another --out")
        try:
            with writing(path, exit_code=2):  # fails here and now where the disk is full
                file.truncate(0)
                print(f"process {os.getpid()} of {platform.node()}", file=file, flush=True)
            yield
        finally:
            with suppress(OSError):  # Windows deletes no open file
                path.unlink()


def lock_file(file: typing.IO) -> None:
    """Lock an open file, or fail at once if another process has done so. On a system without locks, do nothing."""
    try:
        import fcntl
    except ImportError:
        with suppress(ImportError):
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that takes the place of `path` if the body succeeds, so that `path` is never half written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class StopRequest:
    """Inside `with`, a first Ctrl-C or SIGTERM only asks, so that the step is finished and saved; a second one ends."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __enter__(self) -> "StopRequest":
        self.handlers = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class InFlight:
    """Numbers on their way from the device. Read once the next step was launched, they keep no GPU waiting."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers.to("cpu", non_blocking=True)
        self.arrived = torch.cuda.Event() if numbers.is_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def read(self) -> list[float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.numbers.tolist()


class Log:
    """A JSON object a line: the run's settings and environment, then every step and evaluation. TensorBoard's too.

    A resumed run goes on in the same file. Where a step comes twice, the later line counts. A file that cannot be
    written from the start stops the run; one that fails later is left alone, and named in `failures`.
    """

    def __init__(self, settings: Settings, runtime: Runtime) -> None:
        self.settings, self.runtime = settings, runtime
        self.file = self.board = None
        self.failures: list[Stop] = []

    def open(self) -> None:
        settings = self.settings
        if settings.log is not None:
            with writing(settings.log, exit_code=2):
                self.file = settings.log.open("a" if settings.resume else "w", encoding="utf-8", buffering=1)
                self.line({"settings": settings.plain(), "environment": environment(self.runtime)})
        if settings.tensorboard:
            with writing(settings.out / "tensorboard", exit_code=2):
                self.board = self.make_board(settings.out / "tensorboard")

    def make_board(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("TensorBoard: skipped, it is not installed")
            return None
        return SummaryWriter(folder)

    def write(self, attention: str, iteration: int, **values: object) -> None:
        if self.failures:
            return
        with postponed(self.failures), writing(self.settings.log):
            self.line({"attention": attention, "iteration": iteration, **values})
        with postponed(self.failures), writing(self.settings.out / "tensorboard"):
            for name, value in values.items() if self.board is not None else ():
                if isinstance(value, float):
                    self.board.add_scalar(f"{attention}/{name}", value, iteration)

    def line(self, values: dict[str, object]) -> None:
        if self.file is not None:
            print(json.dumps(values), file=self.file)

    def __enter__(self) -> "Log":
        self.runtime.on_main(self.open)
        return self

    def __exit__(self, *_: object) -> None:
        for each, path in ((self.file, self.settings.log), (self.board, self.settings.out / "tensorboard")):
            if each is not None:
                with postponed(self.failures), writing(path):
                    each.close()


def environment(runtime: Runtime) -> dict[str, str]:
    """What a run ran on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {**versions, "platform": platform.platform(), "device": str(runtime), "command": " ".join(sys.argv)}


class Progress:
    """A tqdm bar on a terminal. Without tqdm, or into a file, a plain line every 15 seconds."""

    INTERVAL = 15.0

    def __init__(self, total: int, title: str, done: int = 0) -> None:
        self.total, self.title, self.done = total, title, done
        self.bar = self.make_bar()
        self.next_line = time.monotonic() + self.INTERVAL

    def make_bar(self):
        if not (IS_MAIN and sys.stderr.isatty()):
            return None
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        columns, rows = shutil.get_terminal_size()  # 80 × 24 where it is not known: tqdm would draw nothing there
        return tqdm(total=self.total, initial=self.done, desc=self.title, ncols=columns, nrows=rows, leave=False)

    def advance(self, loss: float, tokens_per_second: float) -> None:
        self.done += 1
        if self.bar is not None:
            if self.bar.update():  # drawn only a few times a second
                self.bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s")
        elif time.monotonic() > self.next_line:
            self.say(f"{self.position()}: loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s")
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
# 3  Data: a text and its two splits, or sequences to recall from; and batches of either
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


INPUT = HERE / "input.txt"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DOWNLOAD_TIMEOUT = 10.0  # seconds without a byte
TRAIN_FRACTION = 0.9


Batch = tuple[Tensor, Tensor]  # tokens (B, T) and targets (B, T): what follows each token, or −100 where nobody asks


@dataclass(frozen=True)
class Corpus:
    """A text. Its distinct characters, in order, are the vocabulary; a token is a position in there."""

    source: str  # which text this is
    vocabulary: str
    train: Tensor  # (characters,)
    val: Tensor

    def draw(self, split: str, batch_size: int, context: int, generator: torch.Generator) -> Batch:
        """Random windows of a split, and the same windows one character later."""
        tokens = {"train": self.train, "val": self.val}[split]
        starts = torch.randint(len(tokens) - context, (batch_size, 1), generator=generator)
        windows = tokens[starts + torch.arange(context + 1)]  # (B, T + 1)
        return windows[:, :-1], windows[:, 1:]

    def passage(self, length: int) -> Tensor:
        """The first tokens of the validation split (T,)."""
        return self.val[:length]

    @property
    def identity(self) -> str:
        """Equal for equal texts."""
        return hashlib.sha256(decode(torch.cat([self.train, self.val]), self.vocabulary).encode()).hexdigest()

    @property
    def chance(self) -> str:
        return f"knowing only how frequent each character is: {entropy(self.train):.2f}"

    def __str__(self) -> str:
        size = f"{len(self.train):,} characters to train on, {len(self.val):,} to validate"
        return f"data: {self.source}; {size}, {len(self.vocabulary)} distinct"


@dataclass(frozen=True)
class Recall:
    """Associative recall: keys, each followed by its value, among filler; then the keys again, in another order.

        . . k₁ v₁ . . . k₂ v₂ . k₃ v₃ . . . . . . . . . . . . . . k₂ v₂ k₃ v₃ k₁ v₁
        pairs in the first half, one in each of so many parts     asked for: each value, where its key is repeated

    Keys are distinct and values drawn anew for each sequence, so that nothing can be learnt by heart. A sequence that
    is too short for so many pairs has one for 8 tokens.
    """

    pairs: int
    # Any distinct characters do: a vocabulary is what generated text would be spelled with.
    vocabulary: str = "".join(map(chr, range(0x4E00, 0x4E00 + RECALL_KEYS + RECALL_VALUES + RECALL_FILLERS)))

    def draw(self, split: str, batch_size: int, context: int, generator: torch.Generator) -> Batch:
        """Sequences, of which both splits have as many as they like."""
        first_value, first_filler = RECALL_KEYS, RECALL_KEYS + RECALL_VALUES
        pairs = min(self.pairs, context // TOKENS_OF_PAIR)
        shape, part, end = (batch_size, pairs), context // 2 // pairs, context - 2 * pairs
        keys = torch.rand(batch_size, RECALL_KEYS, generator=generator).argsort(1)[:, :pairs]
        values = first_value + torch.randint(RECALL_VALUES, shape, generator=generator)
        places = torch.arange(pairs) * part + torch.randint(part - 1, shape, generator=generator)
        order = torch.rand(shape, generator=generator).argsort(1)
        tokens = first_filler + torch.randint(RECALL_FILLERS, (batch_size, context), generator=generator)
        tokens.scatter_(1, places, keys).scatter_(1, places + 1, values)
        tokens[:, end::2], tokens[:, end + 1 :: 2] = keys.gather(1, order), values.gather(1, order)
        targets = torch.full_like(tokens, -100)
        targets[:, end::2] = values.gather(1, order)
        return tokens, targets

    def passage(self, length: int) -> Tensor:
        return self.draw("val", 1, length, torch.Generator().manual_seed(0))[0][0]

    @property
    def identity(self) -> str:
        return str(self)

    @property
    def chance(self) -> str:
        loss, accuracy = math.log(RECALL_VALUES), 1 / RECALL_VALUES
        return f"guessing among {RECALL_VALUES} values: loss {loss:.2f}, accuracy {accuracy:.3f}"

    def __str__(self) -> str:
        return f"data: associative recall; {self.pairs} of {RECALL_KEYS} keys, each with one of {RECALL_VALUES} values"


Data = Corpus | Recall


def load_data(settings: Settings, runtime: Runtime) -> Data:
    """The first process reads or fetches the text; the others have it from there."""
    if settings.task == "recall":
        return Recall(settings.pairs)
    return make_corpus(*runtime.on_main(find_text, settings.data), settings.context)


def make_corpus(source: str, text: str, context: int) -> Corpus:
    """The text, encoded and split in order. Stops if it is too short for `context`."""
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


Batches = dict[str, list[Batch]]


def fixed_batches(data: Data, settings: Settings) -> Batches:
    """The batches of every evaluation, whatever the attention: differences of losses are then the model's."""
    generator = torch.Generator().manual_seed(settings.seed + 1)  # not the batches that training begins with
    shape = settings.batch_size, settings.context, generator
    return {split: [data.draw(split, *shape) for _ in range(settings.eval_batches)] for split in ("train", "val")}


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 4  NSALanguageModel
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


class DenseAttention(nn.Module):
    """Causal softmax attention over all tokens, with NativeSparseAttention's projections: what NSA is compared with."""

    def __init__(self, cfg: NSAConfig) -> None:
        super().__init__()
        self.cfg = cfg
        inner, inner_kv = cfg.heads * cfg.dim_head, cfg.kv_heads * cfg.dim_head
        self.to_q = nn.Linear(cfg.dim, inner, bias=cfg.bias)
        self.to_k = nn.Linear(cfg.dim, inner_kv, bias=cfg.bias)
        self.to_v = nn.Linear(cfg.dim, inner_kv, bias=cfg.bias)
        self.to_out = nn.Linear(inner, cfg.dim, bias=cfg.bias)
        self.dropout = nn.Dropout(cfg.dropout)
        turns = None if cfg.rope_theta is None else rotary_turns(cfg.seq_len, cfg.dim_head, cfg.rope_theta)
        self.register_buffer("turns", turns, persistent=False)

    def forward(self, x: Tensor, *, cache: None = None, cu_seqlens: None = None) -> Tensor:
        """(B, T, dim) → (B, T, dim). NSABlock passes more arguments than dense attention has a use for here."""
        q, k, v = (self.split_heads(project(x)) for project in (self.to_q, self.to_k, self.to_v))
        if self.turns is not None:
            q, k = (rotate(each, self.turns[:, : x.shape[1]]) for each in (q, k))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.cfg.kv_heads != self.cfg.heads)
        return self.dropout(self.to_out(o.transpose(1, 2).flatten(2)))  # (B, H, T, D) → (B, T, H·D) → (B, T, dim)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.cfg.dim_head)).transpose(1, 2)  # (B, T, H·D) → (B, H, T, D)


def rotary_turns(length: int, dim: int, theta: float) -> Tensor:
    """Cosine and sine of t·theta^(−2i/D) for every position t and i < D/2: (2, T, D/2)."""
    half = dim // 2
    frequencies = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions, as NSA's: dimensions i and i + D/2 of (B, H, T, D) turn as a pair."""
    cos, sin = turns.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class TokenLoss(nn.Module):
    """Mean cross-entropy in nats of logits (B, T, vocabulary), in float32. Targets (B, T) of −100 are not asked for.

    A module of its own, so that it can be compiled: the float32 copies of large logits then never come into being.
    """

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


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

    `attention="dense"` replaces the attention of every block with DenseAttention and leaves all else as it is. With
    `cfg.rope_theta` positions are rotary, and there is no position embedding.

    >>> model = NSALanguageModel(vocab_size=65, cfg=NSAConfig(dim=64, heads=4, seq_len=128), layers=2)
    >>> logits, loss = model(torch.randint(65, (8, 128)))
    >>> logits.shape
    torch.Size([8, 128, 65])
    """

    recompute = False  # True: blocks keep nothing for the backward, and run again there
    graphs = False  # True: compiled blocks run as CUDA graphs, whose results last until the next forward

    def __init__(
        self, vocab_size: int, cfg: NSAConfig, layers: int, attention: str = "nsa", init_std: float = 0.02
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention = {attention!r}: must be one of {', '.join(ATTENTIONS)}")
        self.cfg = cfg
        self.attention = attention
        self.token_embedding = nn.Embedding(vocab_size, cfg.dim)
        self.position_embedding = nn.Embedding(cfg.seq_len, cfg.dim) if cfg.rope_theta is None else None
        self.dropout = nn.Dropout(cfg.dropout)
        self.blocks = nn.ModuleList(NSABlock(cfg) for _ in range(layers))
        if attention == "dense":
            for block in self.blocks:
                block.attn = DenseAttention(cfg)
        self.norm = nn.LayerNorm(cfg.dim, bias=cfg.bias)
        self.head = nn.Linear(cfg.dim, vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight
        self.loss = TokenLoss()
        self.initialize(init_std)

    def initialize(self, std: float) -> None:
        """As nanoGPT does: normal(std), and less where 2·layers branches add up in the residual stream."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            last_of_ffn = [layer for layer in block.ffn if isinstance(layer, nn.Linear)][-1]
            for projection in (block.attn.to_out, last_of_ffn):
                nn.init.normal_(projection.weight, std=std / math.sqrt(2 * len(self.blocks)))

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """tokens (B, T), targets (B, T) → logits (B, T, vocabulary), and their `TokenLoss` or None."""
        logits = self.head(self.norm(self.hidden(tokens)))
        return logits, None if targets is None else self.loss(logits, targets)

    def hidden(
        self,
        tokens: Tensor,
        layers: int | None = None,
        caches: Sequence[NSACache] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The residual stream (B, T, dim) behind the first `layers` blocks; None: behind all.

        With a cache for each block, tokens go on where their row left off; `mask` (B, T) is False at padding.
        """
        length = tokens.shape[1]
        if length > self.cfg.seq_len:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}: the longest sequence is {self.cfg.seq_len}")
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        x = self.token_embedding(tokens)  # (B, T, dim)
        if self.position_embedding is not None:
            positions = torch.arange(length, device=tokens.device)
            if caches is not None:
                positions = positions + torch.tensor(caches[0].lengths, device=tokens.device)[:, None]
            x = x + self.position_embedding(positions.clamp(max=self.cfg.seq_len - 1))  # padding may lie behind the end
        x = self.dropout(x)
        for number, block in enumerate(self.blocks[:layers]):
            if caches is not None:
                x = block(x, cache=caches[number], key_padding_mask=mask)
            elif self.recompute and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def patterns(self, tokens: Tensor, layer: int):
        """`NativeSparseAttention.attention_patterns` of a layer, counted from 0, on what tokens (B, T) bring it."""
        block = self.blocks[layer]
        with evaluation_mode(self):
            return block.attn.attention_patterns(block.norm1(self.hidden(tokens, layer)))

    def generate(
        self,
        prompts: Sequence[Tensor],
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Iterator[Tensor]:
        """Continue prompts, each (T ≥ 1,) of whatever length: yields the next token of each, (B,), as it comes.

        A token is drawn among the `top_k` likeliest, and among the likeliest that make up `top_p` of the probability.
        A sequence that outgrows `seq_len` forgets its beginning: see `visible`. NSA computes each token once and keeps
        keys and values in an NSACache, or without `use_cache` all of them anew for each token, as dense attention does.
        """
        for number, prompt in enumerate(prompts):
            if prompt.ndim != 1 or len(prompt) == 0:
                raise ValueError(f"prompts[{number}] of shape {tuple(prompt.shape)}: must be (T,) with T at least 1")
        if not temperature > 0:
            raise ValueError(f"temperature = {temperature}: must be above 0; top_k=1 always takes the likeliest token")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k = {top_k}: must be at least 1")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"top_p = {top_p}: must be above 0 and at most 1")
        choice = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "generator": generator}
        return self.continued(list(prompts), max_new_tokens, use_cache and self.attention == "nsa", choice)

    def continued(self, rows: list[Tensor], count: int, use_cache: bool, choice: dict) -> Iterator[Tensor]:
        caches = self.make_caches(len(rows)) if use_cache else None
        for _ in range(count):
            with evaluation_mode(self):
                drawn = draw_token(self.next_logits(rows, caches), **choice)
            rows = [torch.cat([row, token]) for row, token in zip(rows, drawn[:, None], strict=True)]
            yield drawn

    def make_caches(self, batch: int) -> list[NSACache]:
        """A cache for each block, in the precision in which keys and values come here."""
        weight = self.token_embedding.weight
        kind = weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        length = self.cfg.seq_len
        return [NSACache(block.attn.cfg, batch, length, device=weight.device, dtype=dtype) for block in self.blocks]

    def next_logits(self, rows: list[Tensor], caches: list[NSACache] | None) -> Tensor:
        """What follows each row (T,): (B, vocabulary). Caches come from earlier calls with the same rows, shorter."""
        rows = [row[visible(len(row), self.cfg.seq_len) :] for row in rows]
        mask = None
        if caches is not None:
            if any(len(row) <= length for row, length in zip(rows, caches[0].lengths, strict=True)):
                for cache in caches:  # a row has forgotten its beginning, and all of its positions change
                    cache.reset()
            rows = [row[length:] for row, length in zip(rows, caches[0].lengths, strict=True)]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right, where a causal model is blind
        lengths = torch.tensor([len(row) for row in rows], device=tokens.device)
        if caches is not None and len(set(map(len, rows))) > 1:
            mask = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        x = self.hidden(tokens, caches=caches, mask=mask)
        last = x[torch.arange(len(rows), device=x.device), lengths - 1]  # (B, dim)
        return self.head(self.norm(last))


def visible(length: int, seq_len: int) -> int:
    """Where the part of a sequence that the model still sees begins: when it is full, its older half is forgotten."""
    half = max(1, seq_len // 2)
    return max(0, -(-(length - seq_len) // half) * half)


def draw_token(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A token (B,) for each row of logits (B, vocabulary)."""
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    p = logits.softmax(-1)
    if top_p is not None:
        sorted_p, order = p.sort(dim=-1, descending=True)
        dispensable = sorted_p.cumsum(-1) - sorted_p >= top_p  # the likelier ones make it up without this one
        p = p.masked_fill(dispensable.scatter(1, order, dispensable), 0.0)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


def build_model(data: Data, attention: str, settings: Settings) -> NSALanguageModel:
    """The model that these settings ask for, on the CPU, the same on every machine."""
    torch.manual_seed(settings.seed)
    try:
        config = settings.nsa_config()
        model = NSALanguageModel(len(data.vocabulary), config, settings.layers, attention, settings.init_std)
    except (ValueError, TypeError) as problem:
        raise Stop(str(problem)) from problem
    model.recompute = settings.recompute
    if settings.value_dropout > 0:
        drop_values(model, settings.value_dropout)
    if attention == "nsa":
        close_gates(model, [branch not in settings.branches for branch in BRANCHES])
    return model


def drop_values(model: NSALanguageModel, p: float) -> None:
    """In training, a token now and then has no value for a head. A query then misses what it looks at, as with dropout
    on attention probabilities, for which no attention kernel needs to know."""

    def drop(_: nn.Module, __: object, values: Tensor) -> Tensor:
        values = values.unflatten(-1, (-1, model.cfg.dim_head))  # (B, T, heads, D)
        kept = F.dropout(torch.ones_like(values[..., :1]), p, training=model.training)
        return (values * kept).flatten(-2)

    for block in model.blocks:
        block.attn.to_v.register_forward_hook(drop)


@torch.no_grad()
def close_gates(model: NSALanguageModel, closed: list[bool]) -> None:
    """A gate of sigmoid(−∞) is 0, and so is its gradient: a closed branch adds nothing, and stays closed."""
    for block in model.blocks:
        block.attn.gate_bias[:, closed] = -math.inf


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def check_graphs(settings: Settings, runtime: Runtime) -> None:
    """Whether CUDA graphs can be had: their gradients lie where the next backward puts its own."""
    if not settings.compile or runtime.device.type != "cuda":
        raise Stop(f"graphs: they are of what --compile compiles, on a CUDA device; this one is {runtime.device}")
    if settings.recompute or settings.accumulate > 1 or runtime.world > 1:
        raise Stop("graphs: cannot be had together with recompute, accumulate above 1 or several processes")


def place(model: NSALanguageModel, settings: Settings, runtime: Runtime) -> None:
    """Puts the model where it trains: on this process's device, whole or its shard of it."""
    if settings.graphs:
        check_graphs(settings, runtime)
        model.graphs = True
    if settings.compile:
        options = {"mode": "reduce-overhead"} if settings.graphs else {}
        for module in (*model.blocks, model.loss):  # one compilation serves all blocks, and each may be a shard
            module.compile(**options)
    if not settings.fsdp:
        model.to(runtime.device)
        return
    for module in (*model.blocks, model):  # weights move to the device a block at a time
        fully_shard(module)


def replicated(model: NSALanguageModel, settings: Settings, runtime: Runtime) -> nn.Module:
    """What a training step calls in the model's place, so that gradients are averaged over the processes."""
    if settings.fsdp or runtime.world == 1:
        return model
    device_ids = [runtime.device] if runtime.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)  # they are constants


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 5  Optimizer and schedule
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


def make_optimizer(model: NSALanguageModel, settings: Settings) -> torch.optim.AdamW:
    """AdamW. Matrices decay, those of compressors too; norms, biases, embeddings and the gates' logits do not."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim >= 2 and not name.endswith(("embedding.weight", "position", "gate_bias"))].append(
            parameter
        )
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": settings.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.99),
        fused=next(model.parameters()).device.type == "cuda",
    )


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


EVALUATED_GATES = 256  # tokens at the end of a sequence whose gates are averaged


@dataclass(frozen=True)
class Evaluation:
    iteration: int
    train: float  # loss on fixed batches of each split
    val: float
    accuracy: float  # share of the validation targets that the model thinks likeliest
    gates: list[list[float]]  # of each layer: the mean gate of each branch; dense: []


def evaluate(
    model: NSALanguageModel, batches: Batches, iteration: int, settings: Settings, runtime: Runtime
) -> Evaluation:
    with evaluation_mode(model), runtime.autocast():
        train, _ = score(model, batches["train"], settings.accumulate, runtime)
        val, accuracy = score(model, batches["val"], settings.accumulate, runtime)
        gates = mean_gates(model, batches["val"][0][0][:1].to(runtime.device))
    return Evaluation(iteration, train, val, accuracy, gates)


def score(model: NSALanguageModel, batches: list[Batch], parts: int, runtime: Runtime) -> tuple[float, float]:
    """Mean loss, and share of right answers, over all targets of all batches."""
    totals = torch.zeros(3, dtype=torch.float64, device=runtime.device)
    for batch in batches:
        for tokens, targets in runtime.share(batch, parts):
            logits, loss = model(tokens, targets)
            asked = (targets >= 0).sum()
            totals += torch.stack([loss * asked, (logits.argmax(-1) == targets).sum(), asked])
    loss, right, asked = runtime.sum(totals).tolist()
    return loss / asked, right / asked


def mean_gates(model: NSALanguageModel, tokens: Tensor) -> list[list[float]]:
    """Of each layer (local, compressed, selective): its gates, averaged over the heads and the last tokens (B, T)."""
    gates: list[Tensor] = []

    def look(attention: nn.Module, inputs: tuple[Tensor]) -> None:
        # A gate depends on its own token alone, so that the others may be left out.
        patterns = attention.attention_patterns(inputs[0][:, -EVALUATED_GATES:])
        gates.append(patterns.gates.mean((0, 1, 2)))

    if model.attention == "dense":
        return []
    hooks = [block.attn.register_forward_pre_hook(look) for block in model.blocks]
    with torch.compiler.set_stance("force_eager"):  # compiled code has no hooks
        model(tokens)
    for hook in hooks:
        hook.remove()
    return torch.stack(gates).tolist()


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 7  Checkpoint: all that a run is, in one file with a checksum that `torch.load(weights_only=True)` reads
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


@dataclass
class Run:
    """Results of training one model so far."""

    attention: str
    parameters: int
    evaluations: list[Evaluation] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # of every training batch
    seconds: float = 0.0  # in training steps; evaluations not counted
    tokens: int = 0  # seen in them
    tests: dict[int, float] = field(default_factory=dict)  # recall: accuracy at each length

    @property
    def best(self) -> Evaluation | None:
        """The lowest validation loss of a model that has learnt anything at all."""
        return min((each for each in self.evaluations if each.iteration > 0), key=lambda each: each.val, default=None)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @classmethod
    def of(cls, state: dict[str, typing.Any]) -> "Run":
        return cls(**{**state, "evaluations": [Evaluation(**each) for each in state["evaluations"]]})


def save_checkpoint(state: dict[str, typing.Any], *paths: Path) -> None:
    """Each file is whole, the old one or the new one, whenever this is killed."""
    for path in paths:
        with writing(path), replacing(path) as temporary, temporary.open("w+b") as file:
            torch.save(state, file)
            add_checksum(file)


CHECKSUM_BYTES = 64  # a SHA-256 in hexadecimal digits


def add_checksum(file: typing.BinaryIO) -> None:
    """Give a zip archive the SHA-256 of all bytes before it as its comment: whoever reads zip files still reads it."""
    file.seek(-2, os.SEEK_END)  # the length of the comment, until now 0
    file.write(CHECKSUM_BYTES.to_bytes(2, "little"))
    file.write(checksum(file, file.tell()))


def checksum(file: typing.BinaryIO, size: int) -> bytes:
    """SHA-256 of the first bytes of a file, which is then read up to there."""
    digest = hashlib.sha256()
    file.seek(0)
    while piece := file.read(min(size, 2**20)):
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest().encode()


def check_whole(file: typing.BinaryIO) -> None:
    """Raise ValueError unless the checksum is right, or there is none, as in earlier versions and a bare torch.save.

    An archive without a comment ends in 22 bytes that begin with the mark below; the digits of a checksum never do.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 22))
    if file.read(4) != b"PK\x05\x06" and checksum(file, max(0, size - CHECKSUM_BYTES)) != file.read():
        raise ValueError("the checksum is not that of the content")


FIELDS = {  # of a checkpoint
    "model": dict[str, Tensor],
    "optimizer": dict[str, object],
    "position": Tensor,
    "random": list[dict[str, Tensor]],
    "run": Run,
    "config": dict[str, object],
    "vocabulary": str,
    "data": str,
    "settings": dict[str, object],
}


def read_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, typing.Any]:
    """All that a file holds, each field of the right type. No code that may be hidden in there is run."""
    try:
        with path.open("rb") as file:
            check_whole(file)
            file.seek(0)
            state = torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError as problem:
        raise Stop(f"there is no checkpoint {path}") from problem
    except OSError as problem:
        raise Stop(f"cannot read {path}: {gist(problem)}") from problem
    except Exception as problem:  # depends on where the file is damaged, and advises to trust it
        raise Stop(f"{path} is no whole checkpoint: it is cut short, damaged, or of something else") from problem
    if not isinstance(state, dict) or not FIELDS.keys() <= state.keys():
        raise Stop(f"{path} is no checkpoint of {Path(__file__).name}")
    with fitting(path):
        for name, kind in FIELDS.items():
            check_type(name, state[name], kind)
    return state


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Stops in one line if what a checkpoint holds is not what the body needs."""
    try:
        yield
    except Stop:
        raise
    except Exception as problem:
        lacks = f"{problem} is missing" if isinstance(problem, KeyError) else gist(problem)
        raise Stop(f"{path} is damaged, or of another version: {lacks}") from problem


def check_type(name: str, value: typing.Any, kind: typing.Any) -> None:
    """Raise ValueError unless a value is of a type such as dict[str, list[float]]; a dataclass is a dict of fields."""
    if dataclasses.is_dataclass(kind):
        fields = {each.name: each.type for each in dataclasses.fields(kind)}
        check_type(name, value, dict[str, object])
        check_names(name, value, fields)
        for each, its_kind in fields.items():
            check_type(f"{name}.{each}", value[each], its_kind)
        return
    outer, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if not isinstance(value, outer) or (outer is int and isinstance(value, bool)):
        raise ValueError(f"{name} is of type {type(value).__name__}, not {outer.__name__}")
    if outer is dict:
        for key, each in value.items():
            check_type(f"a key of {name}", key, inner[0])
            check_type(f"{name}[{key!r}]", each, inner[1])
    for number, each in enumerate(value if outer is list else ()):
        check_type(f"{name}[{number}]", each, inner[0])


def check_names(name: str, got: dict[str, typing.Any], expected: Iterable[str]) -> None:
    for each in expected:
        if each not in got:
            raise ValueError(f"{name} has no {each}")
    for each in got.keys() - set(expected):
        raise ValueError(f"{name} has a {each}, which is unknown")


def check_tensors(name: str, got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise ValueError unless the names, shapes and dtypes are those expected, and no number is NaN."""
    check_type(name, got, dict[str, Tensor])
    check_names(name, got, expected)
    for each, x in got.items():
        like = expected[each]
        if x.shape != like.shape or x.dtype != like.dtype:
            found, needed = (f"{y.dtype} of shape {tuple(y.shape)}" for y in (x, like))
            raise ValueError(f"{name}[{each!r}] is {found}, not {needed}")
        if x.isnan().any():
            raise ValueError(f"{name}[{each!r}] has NaN in it")


def check_run(run: Run, expected: Run, settings: Settings) -> None:
    """Raise ValueError unless these settings lead to such a run; `expected` is one that has not begun."""
    done = len(run.losses)
    due = [n for n in range(done + 1) if n % settings.eval_interval == 0 or n == settings.iterations]
    gates = [len(BRANCHES)] * settings.layers if run.attention == "nsa" else []
    rules = {
        "attention": (run.attention, expected.attention),
        "parameters": (run.parameters, expected.parameters),
        "tokens": (run.tokens, done * settings.batch_size * settings.context),
        "evaluated iterations": ([each.iteration for each in run.evaluations], due),
        "gates": ([list(map(len, each.gates)) for each in run.evaluations], [gates] * len(due)),
    }
    for name, (got, rule) in rules.items():
        if got != rule:
            raise ValueError(f"run: {name} = {got}, not {rule}, after {done} iterations")
    if done > settings.iterations:
        raise ValueError(f"run: {done} losses, but only {settings.iterations} iterations")
    numbers = [run.seconds, *(x for each in run.evaluations for x in (each.train, each.val, each.accuracy))]
    if not all(math.isfinite(x) and x >= 0 for x in numbers):
        raise ValueError("run: its seconds, or a result of an evaluation, is negative or not finite")


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> tuple[NSALanguageModel, dict[str, typing.Any]]:
    """The model of a checkpoint, in evaluation mode, and everything else that the file holds."""
    state = read_checkpoint(path, device)
    with fitting(path):
        config = NSAConfig(**state["config"])
        layers, attention = state["settings"]["layers"], state["run"]["attention"]
        model = NSALanguageModel(len(state["vocabulary"]), config, layers, attention)
        check_tensors("model", state["model"], model.state_dict())
        model.load_state_dict(state.pop("model"))
    return model.to(device).eval(), state


def check_resumable(state: dict[str, typing.Any], path: Path, attention: str, data: Data, settings: Settings) -> None:
    """Stops unless these settings and data would have led to this checkpoint."""
    if state["run"]["attention"] != attention:
        raise Stop(f"{path} is of {state['run']['attention']} attention, not {attention}")
    if (state["data"], state["vocabulary"]) != (data.identity, data.vocabulary):
        raise Stop(f"{path} was trained on other data")
    for each in dataclasses.fields(settings):
        if not each.metadata["free"]:
            then, now = state["settings"].get(each.name), settings.plain()[each.name]
            if then != now:
                raise Stop(f"{path} was trained with {each.name} = {then!r}, not {now!r}")


def gathered(state: typing.Any, keep: bool) -> typing.Any:
    """A state dict with whole tensors, on the host, in place of shards. All processes take part; some keep them."""
    if isinstance(state, dict):
        return {name: gathered(value, keep) for name, value in state.items()}
    if isinstance(state, DTensor):
        state = state.full_tensor()
    if isinstance(state, Tensor):
        return state.cpu() if keep else None
    return state


def sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """The shard of a whole tensor that this process holds, if that is what `like` is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, typing.Any]) -> None:
    """Weights and optimizer as they were, in shards if that is what they are now."""
    own = model.state_dict()
    check_tensors("model", state["model"], own)
    model.load_state_dict({name: sharded_like(whole, own[name]) for name, whole in state["model"].items()})
    check_optimizer(state["optimizer"], optimizer, len(state["run"]["losses"]))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {name: sharded_like(x, parameters[number]) if x.ndim > 0 else x for name, x in of.items()}
        for number, of in state["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})  # settings are this run's, not the file's


def check_optimizer(state: dict[str, typing.Any], optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Raise ValueError unless a state is AdamW's after so many steps. Parameters that had no gradient have none."""
    numbers, expected = ([group["params"] for group in x["param_groups"]] for x in (state, optimizer.state_dict()))
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    if numbers != expected or not state["state"].keys() <= parameters.keys():
        raise ValueError("optimizer: its parameters are not those of the model")
    taken = [0]
    for number, moments in state["state"].items():
        like = parameters[number]
        check_tensors(f"optimizer[{number}]", moments, {"step": torch.zeros(()), "exp_avg": like, "exp_avg_sq": like})
        taken.append(moments["step"].item())
    if min(taken[1:], default=steps) < min(1, steps) or max(taken) != steps:
        raise ValueError(f"optimizer: its counts of steps are not those of {steps} iterations")


def random_state(runtime: Runtime) -> dict[str, Tensor]:
    """Of the generators that dropout draws from."""
    on_cuda = runtime.device.type == "cuda"
    return {"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state(runtime.device)} if on_cuda else {})}


def set_random_state(state: dict[str, Tensor], runtime: Runtime) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and runtime.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), runtime.device)


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 8  Generate
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


def encode_prompts(vocabulary: str, settings: Settings) -> list[Tensor]:
    prompts = settings.prompt
    if prompts is None:
        prompts = ("\n" if "\n" in vocabulary else vocabulary[0],)
    for prompt in prompts:
        try:
            if len(encode(prompt, vocabulary)) == 0:
                raise ValueError("must have a character at least")
        except ValueError as problem:
            raise Stop(f"prompt = {prompt!r}: {problem}") from problem
    return [encode(prompt, vocabulary) for prompt in prompts]


def generate_text(
    model: NSALanguageModel, vocabulary: str, settings: Settings, runtime: Runtime
) -> Iterator[tuple[int, str]]:
    """Text as it comes: (which prompt, the next characters after it). It ends before the stop text, if there is one."""
    prompts = [prompt.to(runtime.device) for prompt in encode_prompts(vocabulary, settings)]
    options = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
    tokens = model.generate(prompts, settings.sample_length, generator=runtime.generator(settings.seed), **options)
    held = [""] * len(prompts)  # characters that may yet turn out to be the beginning of the stop text
    going = set(range(len(prompts)))
    with runtime.autocast():
        for drawn in tokens:
            for row in sorted(going):
                held[row] += vocabulary[drawn[row]]
                text, held[row], stopped = before_stop(held[row], settings.stop)
                yield row, text
                if stopped:
                    going.remove(row)
            if not going:
                return
    for row in sorted(going):
        yield row, held[row]


def before_stop(text: str, stop: str | None) -> tuple[str, str, bool]:
    """(what comes before the stop text for sure, what may be its beginning, whether it is there)."""
    if stop is None:
        return text, "", False
    if stop in text:
        return text[: text.index(stop)], "", True
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return text[:-length], text[-length:], False
    return text, "", False


def say_text(model: NSALanguageModel, vocabulary: str, settings: Settings, runtime: Runtime) -> None:
    """Prompts and what the model makes of them: one as it comes, several one after the other."""
    prompts = [decode(prompt, vocabulary) for prompt in encode_prompts(vocabulary, settings)]
    texts = list(prompts)
    if len(prompts) == 1:
        say(prompts[0], end="")
    for row, text in generate_text(model, vocabulary, settings, runtime):
        texts[row] += text
        if len(prompts) == 1:
            say(text, end="")
    say("" if len(prompts) == 1 else "\n\n".join(texts))


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 9  Train
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


class Trainer:
    """A model on its way: everything that changes from step to step, and so all that a checkpoint has to hold."""

    def __init__(
        self, model: NSALanguageModel, data: Data, batches: Batches, settings: Settings, runtime: Runtime
    ) -> None:
        self.model, self.data, self.batches, self.settings, self.runtime = model, data, batches, settings, runtime
        self.run = Run(model.attention, count_parameters(model))
        self.best_path, self.last_path = (settings.out / f"{model.attention}{kind}.pt" for kind in ("", ".last"))
        place(model, settings, runtime)
        self.optimizer = make_optimizer(model, settings)
        self.generator = torch.Generator().manual_seed(settings.seed)  # both attentions see the same batches
        self.random: list[dict[str, Tensor]] = []  # of every process, where a run is resumed
        self.iteration = 0
        self.stopping = False  # a process was asked to
        self.pending: InFlight | None = None  # what the last step found
        self.since = 0.0  # when the clock was read last

    def train(self, log: Log) -> Run:
        """Train, evaluate now and then, keep the best model and the last. Stops with a clear line on Ctrl-C."""
        run, settings, self.log = self.run, self.settings, log
        self.seed_dropout()
        self.net = replicated(self.model, settings, self.runtime)
        try:
            with Progress(settings.iterations, run.attention, self.iteration) as self.progress:
                with StopRequest() as request:
                    self.steps(request)
        finally:
            self.net = None  # lets go of the process group, which waits for that when it is left
        if self.stopping:
            line = f"interrupted after iteration {self.iteration} of {run.attention}; --resume goes on from there"
            raise Stop(line, exit_code=130)
        return run

    def steps(self, request: StopRequest) -> None:
        settings = self.settings
        if not self.run.evaluations:
            self.review()
        self.since = time.perf_counter()
        while self.iteration < settings.iterations and not self.stopping:
            self.step(request)
            if self.iteration % settings.eval_interval == 0 or self.iteration == settings.iterations:
                self.settle()
                self.review()
        self.settle()
        asked = torch.full((), float(request.asked), device=self.runtime.device)  # in the last evaluation, too
        self.stopping = self.stopping or self.runtime.sum(asked).item() > 0
        if self.stopping:
            self.save(self.last_path)

    def seed_dropout(self) -> None:
        if len(self.random) == self.runtime.world:
            set_random_state(self.random[self.runtime.rank], self.runtime)
        else:  # a new run, or one that other processes began
            torch.manual_seed(self.settings.seed + self.runtime.rank)

    def step(self, request: StopRequest) -> None:
        """One update is launched; what the one before it found is read meanwhile."""
        settings, runtime = self.settings, self.runtime
        batch = self.data.draw("train", *settings.batch_shape(self.iteration), self.generator)
        rate = learning_rate(self.iteration, settings)
        loss, norm = train_step(self.net, self.optimizer, batch, rate, settings, runtime)
        asked = torch.full((), float(request.asked), device=runtime.device)
        found = InFlight(torch.stack([*runtime.sum(torch.stack([loss, asked])), norm]))
        self.settle()
        self.pending, self.iteration = found, self.iteration + 1
        if runtime.device.type != "cuda":
            self.settle()

    def settle(self) -> None:
        """Reads what the last step found, notes it, and shows it."""
        if self.pending is None:
            return
        run, settings = self.run, self.settings
        loss, asked, norm = self.pending.read()
        self.pending = None
        self.stopping = self.stopping or asked > 0  # on all processes after the same step
        now, tokens = time.perf_counter(), settings.batch_size * settings.context  # of every batch, short sequences too
        seconds, self.since = now - self.since, now
        run.losses.append(loss)
        run.seconds, run.tokens = run.seconds + seconds, run.tokens + tokens
        self.log.write(
            run.attention,
            len(run.losses),
            loss=loss,
            learning_rate=learning_rate(len(run.losses) - 1, settings),
            gradient_norm=norm,
            tokens_per_second=tokens / seconds,
            peak_memory_gib=self.runtime.peak_memory(),
        )
        self.progress.advance(loss, run.tokens_per_second)

    def review(self) -> None:
        """Evaluate the model as it is now, and save it."""
        now = evaluate(self.model, self.batches, self.iteration, self.settings, self.runtime)
        if not math.isfinite(now.train + now.val):
            raise Stop(f"the loss is not finite any more: try a lower --learning-rate; {self.kept()}", exit_code=1)
        self.run.evaluations.append(now)
        values = dataclasses.asdict(now)
        self.log.write(self.run.attention, values.pop("iteration"), **values)
        losses = f"loss {now.train:.4f}  validation {now.val:.4f}  accuracy {now.accuracy:.3f}"
        self.progress.say(f"{self.progress.position()}  {losses}")
        if now is self.run.best:  # first, so that the last checkpoint never tells of a best one that is not there
            self.save(self.best_path, self.last_path)
        elif self.iteration > 0:  # a model that has learnt nothing is not worth a file
            self.save(self.last_path)
        self.since = time.perf_counter()  # the clock stops around evaluations

    @property
    def finished(self) -> bool:
        return any(each.iteration == self.settings.iterations for each in self.run.evaluations)

    def kept(self) -> str:
        best = self.run.best
        if best is None:
            return "no checkpoint had been written yet"
        return f"{self.best_path} keeps iteration {best.iteration} (validation loss {best.val:.4f})"

    def save(self, *paths: Path) -> None:
        """Every process adds its part; the first one writes."""
        is_main = self.runtime.rank == 0
        state = {
            "model": gathered(self.model.state_dict(), is_main),
            "optimizer": gathered(self.optimizer.state_dict(), is_main),  # the schedule follows from run and settings
            "position": self.generator.get_state(),  # in the data
            "random": self.runtime.gather(random_state(self.runtime)),
            "run": dataclasses.asdict(self.run),
            "config": dataclasses.asdict(self.model.cfg),
            "vocabulary": self.data.vocabulary,
            "data": self.data.identity,
            "settings": self.settings.plain(),
        }
        self.runtime.on_main(save_checkpoint, state, *paths)

    def resume(self) -> None:
        """Go on from the last checkpoint, as if the run had never been stopped."""
        state = read_checkpoint(self.last_path)
        with fitting(self.last_path):
            check_resumable(state, self.last_path, self.model.attention, self.data, self.settings)
            run = Run.of(state["run"])
            check_run(run, self.run, self.settings)
            NSAConfig(**state["config"])
            load_state(self.model, self.optimizer, state)
            self.generator.set_state(state["position"])
            for each in state["random"] or [{}]:  # that of every process, so that all of them find what is wrong
                set_random_state(each, self.runtime)
        if run.best is not None:
            kept = Run.of(read_checkpoint(self.best_path)["run"]).best
            if kept is None or kept.val > run.best.val:
                raise Stop(f"{self.best_path} is not the best model that {self.last_path} tells of")
        self.random, self.run, self.iteration = state["random"], run, len(run.losses)


def train_step(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    rate: float,
    settings: Settings,
    runtime: Runtime,
) -> tuple[Tensor, Tensor]:
    """One update; returns this process's share of the batch's loss before it, and the norm of the whole gradient."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    total = torch.zeros((), device=runtime.device)
    for part, (tokens, targets) in enumerate(runtime.share(batch, settings.accumulate), start=1):
        exchange_gradients(net, part == settings.accumulate)
        with runtime.autocast():
            loss = net(tokens, targets)[1] / settings.accumulate
        loss.backward()
        total += loss.detach() / runtime.world
    norm = nn.utils.clip_grad_norm_(net.parameters(), settings.grad_clip)
    optimizer.step()
    optimizer.zero_grad()
    return total, norm.full_tensor() if isinstance(norm, DTensor) else norm


def exchange_gradients(net: nn.Module, now: bool) -> None:
    """Whether the next backward averages gradients over processes: only that of a batch's last part needs to."""
    if isinstance(net, DistributedDataParallel):
        net.require_backward_grad_sync = now
    elif isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(now)


def make_trainers(models: dict[str, NSALanguageModel], data: Data, *shared: typing.Any) -> list[Trainer]:
    """A trainer for each model. To be resumed, one of them must have a checkpoint."""
    trainers = [Trainer(model, data, *shared) for model in models.values()]
    if trainers[0].settings.resume and not any(trainer.last_path.exists() for trainer in trainers):
        raise Stop(f"nothing to resume: there is no checkpoint {trainers[0].last_path}")
    return trainers


def resume_trainers(trainers: list[Trainer]) -> None:
    """If told to, go on with each model that has a checkpoint."""
    for trainer in trainers:
        if trainer.settings.resume and trainer.last_path.exists():
            trainer.resume()


# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════
# 10  Pictures: loss curves, gates, and attention patterns
# ══════════════════════════════════════════════════════════════════════════════════════════════════════════════════════


COLORS = {"nsa": "#c2410c", "dense": "#1d4ed8"}


def new_figure(width: float, height: float):
    """An empty matplotlib figure that needs no screen; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def save_picture(figure, path: Path, title: str) -> str:
    with writing(path):
        figure.savefig(path)
    return f"{title}: {path}"


def plot_losses(runs: Iterable[Run], path: Path) -> str:
    """Loss of every training batch, thin, and of the evaluations. Returns a line that says what was done."""
    figure = new_figure(8, 4.5)
    if figure is None:
        return "loss curves: skipped, matplotlib is not installed"
    axes = figure.add_subplot(xlabel="iteration", ylabel="cross-entropy of a token, nats")
    for run in runs:
        color, iterations = COLORS[run.attention], [each.iteration for each in run.evaluations]
        axes.plot(run.losses, color=color, alpha=0.25, linewidth=0.8)
        train, val = [each.train for each in run.evaluations], [each.val for each in run.evaluations]
        axes.plot(iterations, train, "--", color=color, label=f"{run.attention}, training")
        axes.plot(iterations, val, "o-", color=color, markersize=4, label=f"{run.attention}, validation")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return save_picture(figure, path, "loss curves")


def plot_gates(run: Run, path: Path) -> str:
    """The mean gate of each branch over training, a panel for each layer."""
    layers = len(run.evaluations[0].gates)
    figure = new_figure(2.2 + 2.0 * layers, 3.2)
    if figure is None:
        return "gates: skipped, matplotlib is not installed"
    iterations = [each.iteration for each in run.evaluations]
    panels = figure.subplots(1, layers, sharey=True, squeeze=False)[0]
    for layer, axes in enumerate(panels):
        for number, (branch, line) in enumerate(zip(BRANCHES, ("-", "--", ":"), strict=True)):  # they may coincide
            axes.plot(iterations, [each.gates[layer][number] for each in run.evaluations], line, label=branch)
        axes.set(title=f"layer {layer + 1}", xlabel="iteration", ylim=(0, 1))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("gate")
    panels[-1].legend(frameon=False)
    return save_picture(figure, path, "gates")


def plot_patterns(model: NSALanguageModel, data: Data, settings: Settings, runtime: Runtime) -> str:
    """Draw, for each head and branch of one layer, which keys each query of a validation passage looked at."""
    cfg, layer = model.cfg, settings.plot_layer or settings.layers
    figure = new_figure(10.5, 1.2 + 2.9 * cfg.heads)
    if figure is None:
        return "attention patterns: skipped, matplotlib is not installed"
    tokens = data.passage(settings.context)
    patterns = model.patterns(tokens.to(runtime.device)[None], layer - 1)
    grid = figure.subplots(cfg.heads, len(BRANCHES), sharex=True, sharey=True, squeeze=False)
    for head, row in enumerate(grid):
        for branch, axes in enumerate(row):
            image = draw_branch(axes, patterns, head, branch, cfg)
        row[0].set_ylabel(f"head {head + 1}\nquery position")
    for axes in grid[-1]:
        axes.set_xlabel("key position")
    figure.colorbar(image, ax=grid, shrink=1 / min(cfg.heads, 2), aspect=40, label="attention weight")
    passage = decode(tokens[:60], data.vocabulary).replace("\n", "⏎") if settings.task == "text" else settings.task
    figure.suptitle(f"What each branch looked at: layer {layer} of {settings.layers}, on “{passage} …”", fontsize=11)
    return save_picture(figure, settings.plot_patterns, "attention patterns")


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


RECALL_TESTS = 8  # batches at each length


def check_before_work(settings: Settings, data: Data, processes: int) -> None:
    """Find out before hours of training, not after them, what would go wrong behind them."""
    encode_prompts(data.vocabulary, settings)
    picture, parts = settings.plot_patterns, processes * settings.accumulate
    if settings.batch_size % parts != 0:
        rule = f"must be divisible by processes * accumulate = {processes} * {settings.accumulate}"
        raise Stop(f"batch_size = {settings.batch_size}: {rule}")
    if picture is not None and picture.suffix != ".png":
        raise Stop(f"plot_patterns = {str(picture)!r}: must end in .png")
    if picture is not None and "nsa" not in settings.attentions:
        raise Stop("plot_patterns: dense attention has no branches to draw; give --attention nsa or both")


def check_outputs(trainers: list[Trainer], settings: Settings) -> None:
    """Find out before training whether all that will be written can be. Nothing is left of it but folders."""
    checkpoints = [path for trainer in trainers for path in (trainer.best_path, trainer.last_path)]
    others = [settings.out / name for name in ("run.json", "loss.png", "gates.png")]
    for path in (*checkpoints, *others, settings.plot_patterns, settings.log):
        if path is not None:
            with writing(path, exit_code=2):
                path.parent.mkdir(parents=True, exist_ok=True)
                is_new = not os.path.lexists(path)
                path.open("ab").close()
                if is_new:
                    path.unlink()
    sizes = [12 * trainer.run.parameters for trainer in trainers]  # float32 weights, and two moments of each
    there = sum(path.stat().st_size for path in checkpoints if path.exists())
    needed, disk = 2 * sum(sizes) + max(sizes) - there, shutil.disk_usage(settings.out)  # one more while it is written
    if disk.total > 0 and disk.free < needed:
        free, all_of_it = (f"{size / 2**20:,.1f} MiB" for size in (disk.free, needed))
        raise Stop(f"out = {str(settings.out)!r}: checkpoints need {all_of_it}, and the disk has {free} left")


def loss_table(runs: list[Run]) -> str:
    rows = [("", *(run.attention for run in runs))]
    rows += [("validation loss, best", *(f"{run.best.val:.4f}" for run in runs))]
    rows += [("training loss, then", *(f"{run.best.train:.4f}" for run in runs))]
    rows += [("at iteration", *(f"{run.best.iteration}" for run in runs))]
    rows += [(f"accuracy at {length:,}", *(f"{run.tests[length]:.4f}" for run in runs)) for length in runs[0].tests]
    rows += [("parameters", *(f"{run.parameters:,}" for run in runs))]
    rows += [("tokens/s", *(f"{run.tokens_per_second:,.0f}" for run in runs))]
    rows += [("seconds of training", *(f"{run.seconds:.1f}" for run in runs))]
    return "\n".join("".join((f"{title:<24}", *(f"{cell:>12}" for cell in cells))) for title, *cells in rows)


def write_record(runs: list[Run], settings: Settings, runtime: Runtime) -> None:
    """A run that can be read and repeated later: what it was told, on what it ran, and what came of it."""
    results = [dataclasses.asdict(run) for run in runs]
    record = {"settings": settings.plain(), "environment": environment(runtime), "runs": results}
    with writing(settings.out / "run.json"):
        (settings.out / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def test_lengths(model: NSALanguageModel, data: Data, settings: Settings, runtime: Runtime) -> dict[int, float]:
    """Accuracy on fresh sequences of the training length and of others, as many tokens in a batch at each."""
    accuracy = {}
    for length in (settings.context, *settings.test_contexts):
        generator = torch.Generator().manual_seed(settings.seed + 2)
        rows = max(1, settings.batch_size * settings.context // length)
        batches = [data.draw("val", rows, length, generator) for _ in range(RECALL_TESTS)]
        with evaluation_mode(model), runtime.autocast():
            accuracy[length] = score(model, batches, 1, runtime)[1]
    return accuracy


def report(trainers: list[Trainer], data: Data, settings: Settings, runtime: Runtime, failures: list[Stop]) -> None:
    """Show what came of it: a sample, pictures, paths, and at the end the table, whatever else cannot be had."""
    runs = [trainer.run for trainer in trainers]
    try:
        with postponed(failures):
            if settings.task == "recall":
                models = [load_checkpoint(trainer.best_path, runtime.device)[0] for trainer in trainers]
                for run, model in zip(runs, models, strict=True):
                    run.tests = test_lengths(model, data, settings, runtime)
        with postponed(failures):
            write_record(runs, settings, runtime)
        with postponed(failures):
            show_best(trainers[0].best_path, data, settings, runtime)
        with postponed(failures):
            say(plot_losses(runs, settings.out / "loss.png"))
        with postponed(failures):
            if runs[0].attention == "nsa":
                say(plot_gates(runs[0], settings.out / "gates.png"))
        for trainer in trainers:
            say(f"checkpoint: {trainer.best_path}")
    finally:
        say(f"\n{loss_table(runs)}")
        say(data.chance)
    if failures:
        raise Stop("; ".join(dict.fromkeys(map(str, failures))), failures[0].exit_code)


def show_best(path: Path, data: Data, settings: Settings, runtime: Runtime) -> None:
    """A sample of text from the best model, and a picture of what it looks at."""
    best, _ = load_checkpoint(path, runtime.device)
    if settings.task == "text":
        say()
        say_text(best, data.vocabulary, settings, runtime)
        say()
    if settings.plot_patterns is not None:
        say(plot_patterns(best, data, settings, runtime))


def run_training(settings: Settings) -> None:
    with joined_processes(settings) as runtime, ExitStack() as until_the_end:
        data = load_data(settings, runtime)
        say(str(data))
        models = {attention: build_model(data, attention, settings) for attention in settings.attentions}
        sizes = ", ".join(f"{attention} {count_parameters(model):,}" for attention, model in models.items())
        say(f"device: {runtime}; parameters: {sizes}")
        runtime.on_main(check_before_work, settings, data, runtime.world)
        batches = fixed_batches(data, settings)
        trainers = make_trainers(models, data, batches, settings, runtime)
        runtime.on_main(until_the_end.enter_context, locked(settings.out))
        resume_trainers(trainers)
        runtime.on_main(check_outputs, trainers, settings)
        log = Log(settings, runtime)
        train_all(trainers, log)
        if IS_MAIN:
            report(trainers, data, settings, runtime.alone(), log.failures)


def train_all(trainers: list[Trainer], log: Log) -> None:
    """One after the other. Where one of them stops, the table of those that are finished is not lost."""
    try:
        with log:
            for trainer in trainers:
                trainer.train(log)
    except Stop:
        finished = [trainer.run for trainer in trainers if trainer.finished]
        if finished:
            say(f"\n{loss_table(finished)}")
        raise


def run_generation(settings: Settings) -> None:
    with joined_processes(settings) as runtime:
        path = settings.checkpoint or settings.out / f"{settings.attentions[0]}.pt"
        model, state = load_checkpoint(path, runtime.device)
        say_text(model, state["vocabulary"], settings, runtime)


def main(arguments: list[str] | None = None) -> int:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # what a terminal cannot spell ends no run
    try:
        settings = parse_settings(arguments)
        (run_generation if settings.generate else run_training)(settings)
    except Stop as reason:
        line, exit_code = str(reason), reason.exit_code
    except KeyboardInterrupt:
        line, exit_code = "interrupted", 130
    else:
        return 0
    if IS_MAIN and line:
        print(f"{Path(__file__).name}: {' '.join(line.splitlines())}", file=sys.stderr, flush=True)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
