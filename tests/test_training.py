"""The training example: what its user sees, and what it promises about data, checkpoints and comparisons."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import io
import math
import os
import re
import runpy
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_runs import TINY, complaint, flags, make_trainer, prepare, train, write_words

import nsa_gpt_training as script
from native_sparse_attention import NSAConfig

ROOT = Path(script.__file__).resolve().parent
REAL_TEXT = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    return write_words(tmp_path / "words.txt")


@pytest.fixture
def settings(text_file: Path, tmp_path: Path) -> script.Settings:
    return dataclasses.replace(TINY, data=text_file, out=tmp_path / "out")


@pytest.fixture(autouse=True)
def input_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's own input.txt, or reaches the network."""
    monkeypatch.setattr(script, "INPUT", tmp_path / "beside" / "input.txt")
    (tmp_path / "beside").mkdir()
    serve(monkeypatch, OSError("no network in tests"))
    return script.INPUT


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without matplotlib: a test of something else need not wait for it to draw."""
    monkeypatch.setattr(script, "new_figure", lambda *_: None)


def serve(monkeypatch: pytest.MonkeyPatch, answer: bytes | Exception) -> None:
    """What the network says to every request."""

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        assert url == script.SHAKESPEARE_URL, f"{url} was asked for"
        assert timeout <= 15, f"waits {timeout} s for a network that may not be there"
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(script.urllib.request, "urlopen", urlopen)


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------


def test_the_full_run_is_the_one_that_is_documented() -> None:
    full = script.parse_settings(["--full"])
    assert (full.dim, full.heads, full.layers, full.context) == (384, 6, 6, 256)
    assert (full.batch_size, full.iterations, full.dropout, full.warmup, full.learning_rate) == (
        64,
        5000,
        0.2,
        100,
        1e-3,
    )
    config = full.nsa_config()
    assert (config.local_window, config.block_size, config.stride, config.topk_blocks) == (64, 32, 32, 4)
    assert (config.compression, config.gate_mode, config.gate_init) == ("grouped_mlp", "q_cond", (2.0, -2.0, -2.0))
    assert config.seq_len == full.context and full.attention == "nsa"


def test_quick_test_decides_where_no_flag_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert script.QUICK_TEST is True, "the script as it is handed out runs the quick test"
    assert script.parse_settings([]) == script.QUICK
    assert script.QUICK.attentions == ("nsa", "dense")
    monkeypatch.setattr(script, "QUICK_TEST", False)
    assert script.parse_settings([]) == script.FULL
    assert script.parse_settings(["--quick"]) == script.QUICK
    assert script.parse_settings(["--task=recall", "--pairs=8"]) == dataclasses.replace(script.RECALL, pairs=8)


def test_every_setting_has_a_flag_that_reaches_it(settings: script.Settings) -> None:
    changed = dataclasses.replace(
        settings,
        kv_heads=1,
        stride=4,
        select_block_size=16,
        top_k=5,
        top_p=0.9,
        stop="\n",
        rope_theta=100.0,
        value_dropout=0.1,
        branches=("local", "selective"),
        test_contexts=(64, 16),
        first_context=16,
        growth=0.25,
        accumulate=2,
        compile=True,
        graphs=True,
        recompute=True,
        log=Path("a.jsonl"),
        plot_layer=1,
        plot_patterns=Path("a.png"),
        gate_init=(-1.5, 0.0, 1e-3),
        separate_kv=True,
        use_flash=False,
        prompt=("key", "a value"),
        device="cpu",
        dtype="bfloat16",
        compression="conv1d",
        gate_mode="q_cond",
        init_blocks=1,
        seed=5,
        temperature=1.5,
        weight_decay=0.0,
    )
    assert script.parse_settings(flags(changed)) == changed
    assert script.parse_settings(["--full", *flags(changed)]) == changed


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    for each in dataclasses.fields(script.Settings):
        assert each.metadata["help"], f"{each.name} has no help"
        assert f"--{each.name.replace('_', '-')}" in shown, f"{each.name} is missing"


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--heads", "six"], "--heads"),
        (["--attention", "sparse"], "--attention"),
        (["--quick", "--full"], "--full"),
        (["--gate-init", "1", "2"], "--gate-init"),
        (["--iterations", "0"], "iterations = 0"),
        (["--batch-size", "-3"], "batch_size = -3"),
        (["--learning-rate", "nan"], "learning_rate = nan"),
        (["--temperature", "0"], "temperature = 0"),
        (["--plot-layer", "3"], "plot_layer = 3"),
        (["--heads", "5"], "heads = 5"),
        (["--stride", "32", "--block-size", "16"], "stride = 32"),
        (["--compression", "median"], "compression = 'median'"),
        (["--dropout", "1"], "dropout = 1.0"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "meta"),
        (["--prompt", "§"], "§"),
        (["--prompt", "key", ""], "prompt"),
        (["--stop", ""], "stop"),
        (["--seed", str(2**63)], f"seed = {2**63}: must be at most {2**63 - 1}"),
        (["--seed", "1" + 40 * "0"], "must be at most"),
        (["--seed", "-1"], "seed = -1"),
        (["--top-p", "0"], "top_p = 0"),
        (["--value-dropout", "1"], "value_dropout = 1"),
        (["--branches", "local", "global"], "global"),
        (["--batch-size", "6", "--accumulate", "4"], "batch_size = 6"),
        (["--fsdp"], "torchrun"),
        (["--graphs"], "--compile"),
        (["--resume"], "nothing to resume"),
        (["--quick", "--task", "recall"], "--quick"),
        (["--task", "recall", "--pairs", "33"], "pairs = 33"),
        (["--task", "recall", "--context", "255"], "context = 255"),
        (["--first-context", "7"], "first_context = 7: must be at least 8"),
        (["--first-context", "129"], "first_context = 129: must be at most context = 128"),
        (["--growth", "0"], "growth = 0.0: must be at least"),
        (["--growth", "1.5"], "growth = 1.5: must be at most 1"),
        (["--generate", "--checkpoint", "nowhere.pt"], "nowhere.pt"),
        (["--plot-patterns", "patterns.txt"], ".png"),
        (["--attention", "dense", "--plot-patterns", "patterns.png"], "dense"),
    ],
)
def test_a_bad_flag_is_turned_down_in_one_line(
    arguments: list[str], names: str, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert names in complaint(capsys, [f"--data={text_file}", f"--out={out}", *arguments])
    assert not out.exists(), "nothing is written before everything is known to be in order"


@pytest.mark.usefixtures("no_pictures")
def test_the_largest_seed_will_do(settings: script.Settings) -> None:
    settings = dataclasses.replace(settings, seed=2**63 - 1, attention="nsa", iterations=1)
    assert script.main(flags(settings)) == 0
    assert script.main(flags(dataclasses.replace(settings, resume=True))) == 0


@pytest.mark.parametrize(
    "change, device, processes",
    [({"recompute": True}, "cuda", 1), ({"accumulate": 2}, "cuda", 1), ({}, "cuda", 2), ({}, "cpu", 1)],
)
def test_graphs_are_turned_down_where_their_gradients_would_be_overwritten(
    change: dict[str, object], device: str, processes: int, settings: script.Settings
) -> None:
    settings = dataclasses.replace(settings, compile=True, graphs=True)
    script.check_graphs(settings, script.Runtime(torch.device("cuda"), torch.bfloat16))
    runtime = script.Runtime(torch.device(device), torch.bfloat16, world=processes)
    with pytest.raises(script.Stop, match="graphs: "):
        script.check_graphs(dataclasses.replace(settings, **change), runtime)


@pytest.mark.parametrize("graphs", [False, True])
def test_graphs_are_of_what_is_compiled(
    graphs: bool, settings: script.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes, marks = [], []
    monkeypatch.setattr(nn.Module, "compile", lambda module, mode=None: modes.append((type(module).__name__, mode)))
    monkeypatch.setattr(nn.Module, "to", lambda model, device: model)  # there may be no such device
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    settings = dataclasses.replace(settings, compile=True, graphs=graphs)
    model = script.NSALanguageModel(9, settings.nsa_config(), layers=2)
    script.place(model, settings, script.Runtime(torch.device("cuda"), torch.bfloat16))
    mode = "reduce-overhead" if graphs else None
    assert modes == [("NSABlock", mode), ("NSABlock", mode), ("TokenLoss", mode)]
    model(torch.randint(9, (1, 5)))
    assert len(marks) == graphs, "what a forward left in a graph's memory lasts until the next one"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_turned_down_where_there_is_none(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'cuda'" in complaint(capsys, [f"--data={text_file}", "--device=cuda"])


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


def test_characters_survive_the_vocabulary() -> None:
    text = "Ünïcode, 漢字, emoji 🙂\tand\nlines"
    vocabulary = "".join(sorted(set(text)))
    tokens = script.encode(text, vocabulary)
    assert tokens.dtype == torch.long and tokens.max() == len(vocabulary) - 1
    assert script.decode(tokens, vocabulary) == text
    with pytest.raises(ValueError, match="Z"):
        script.encode("Z", vocabulary)


def test_the_split_is_90_to_10_in_order(text_file: Path) -> None:
    text = text_file.read_text()
    corpus = script.make_corpus("words", text, context=32)
    assert len(corpus.train) == int(0.9 * len(text))
    assert script.decode(torch.cat([corpus.train, corpus.val]), corpus.vocabulary) == text


def test_targets_are_the_next_characters(settings: script.Settings) -> None:
    corpus = script.Corpus("numbers", "", train=torch.arange(100), val=torch.arange(50))
    tokens, targets = corpus.draw("train", 500, 10, torch.Generator().manual_seed(0))
    assert tokens.shape == targets.shape == (500, 10)
    assert torch.equal(targets, tokens + 1)
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(10))
    assert tokens.min() == 0 and targets.max() == 99, "every window of the text can be drawn"


def test_evaluations_share_their_batches_but_not_with_training(settings: script.Settings) -> None:
    _, corpus, batches = prepare(settings)
    for name, split in batches.items():
        again = prepare(dataclasses.replace(settings, attention="dense"))[2][name]
        assert len(split) == settings.eval_batches
        assert all(
            torch.equal(a, b) for old, new in zip(split, again, strict=True) for a, b in zip(old, new, strict=True)
        )
    generator = torch.Generator().manual_seed(settings.seed)
    first = corpus.draw("train", settings.batch_size, settings.context, generator)[0]
    assert not torch.equal(first, batches["train"][0][0]), "the first training batch is an evaluation batch"


def test_entropy_of_characters() -> None:
    tokens = torch.tensor([0, 1, 1, 3])
    assert script.entropy(tokens) == pytest.approx(0.25 * math.log(4) * 2 + 0.5 * math.log(2))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read"),
        (b"", "empty"),
        (b"far too short", "too short"),
        (b"x" * 330, "33 characters in its validation split"),
        (b"\xff\xfe not UTF-8 \xff" * 100, "not UTF-8"),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_unusable_text_is_turned_down_and_left_alone(
    content: bytes | None, words: str, beside: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = script.INPUT if beside else tmp_path / "given.txt"
    if content is None:
        path.mkdir()  # the given file is missing, or there is something else in its place
    else:
        path.write_bytes(content)
    data = [] if beside else [f"--data={path}"]
    out = tmp_path / "out"
    line = complaint(capsys, [*data, "--context=32", "--local-window=8", "--block-size=8", f"--out={out}"])
    assert words in line and str(path) in line
    assert not out.exists()
    assert content is None or path.read_bytes() == content


def test_a_missing_file_is_not_replaced_by_another_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.txt" in complaint(capsys, [f"--data={tmp_path / 'nowhere.txt'}"])


def test_the_shortest_text_that_is_long_enough() -> None:
    text = "ab" * 170  # 306 to train on, 34 = context + 2 to validate
    assert len(script.make_corpus("short", text, context=32).val) == 34
    with pytest.raises(script.Stop, match="needs at least 35"):
        script.make_corpus("short", text, context=33)


def test_a_good_download_is_verified_and_kept(
    monkeypatch: pytest.MonkeyPatch, input_elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = b"To be, or not to be. " * 100
    monkeypatch.setattr(script, "SHAKESPEARE_BYTES", len(content))
    monkeypatch.setattr(script, "SHAKESPEARE_SHA256", hashlib.sha256(content).hexdigest())
    serve(monkeypatch, content)
    source, text = script.find_text(None)
    assert text.encode() == content == input_elsewhere.read_bytes()
    assert source == str(input_elsewhere)
    serve(monkeypatch, OSError("asked again for what is already there"))
    assert script.find_text(None) == (source, text)


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>Please log in to this network</html>",
        b"x" * script.SHAKESPEARE_BYTES,
        b"x" * (script.SHAKESPEARE_BYTES + 5),
        OSError("Name or service not known"),
        TimeoutError("timed out"),
        http.client.BadStatusLine("gibberish"),
    ],
    ids=["another page", "corrupted", "too long", "no network", "timeout", "gibberish"],
)
def test_without_a_good_download_python_has_english_text(
    answer: bytes | Exception, monkeypatch: pytest.MonkeyPatch, input_elsewhere: Path
) -> None:
    serve(monkeypatch, answer)
    corpus = script.make_corpus(*script.find_text(None), context=256)
    assert "Python's own help pages" in corpus.source and "Tiny Shakespeare" in corpus.source
    assert "the" in script.decode(corpus.val, corpus.vocabulary).split()
    assert len(str(corpus).splitlines()) == 1
    assert list(input_elsewhere.parent.iterdir()) == [], "nothing is left of a download that went wrong"


@pytest.mark.skipif(not REAL_TEXT.exists(), reason="the real text is not there")
def test_the_real_text_is_what_a_download_is_verified_against() -> None:
    content = REAL_TEXT.read_bytes()
    assert len(content) == script.SHAKESPEARE_BYTES
    assert hashlib.sha256(content).hexdigest() == script.SHAKESPEARE_SHA256
    corpus = script.make_corpus(*script.find_text(REAL_TEXT), context=256)
    assert len(corpus.vocabulary) == 65 and len(corpus.train) == 1_003_854
    assert 3.2 < script.entropy(corpus.train) < 3.4


@pytest.mark.parametrize(("pairs", "context"), [(1, 8), (5, 47), (32, 256), (32, 1024)])
@pytest.mark.parametrize("split", ["train", "val"])
def test_recall_asks_at_the_end_for_what_was_said_in_the_first_half(pairs: int, context: int, split: str) -> None:
    data = script.Recall(pairs)
    tokens, targets = data.draw(split, 40, context, torch.Generator().manual_seed(0))
    assert tokens.shape == targets.shape == (40, context)
    assert 0 <= tokens.min() and tokens.max() < len(set(data.vocabulary)) == len(data.vocabulary)
    is_key = tokens < script.RECALL_KEYS
    is_value = ~is_key & (tokens < script.RECALL_KEYS + script.RECALL_VALUES)
    for row, keys, values, target in zip(tokens, is_key, is_value, targets, strict=True):
        end = context - int((target >= 0).sum()) * 2
        said, asked = keys[:end].nonzero().flatten(), end + keys[end:].nonzero().flatten()
        assert len(said) == len(asked) == int((target >= 0).sum()) <= pairs
        assert said.max() + 1 < context // 2 <= end, "pairs are in the first half, questions behind it"
        assert values.nonzero().flatten().tolist() == (torch.cat([said, asked]) + 1).tolist(), "a value follows its key"
        value_of = dict(zip(row[said].tolist(), row[said + 1].tolist(), strict=True))
        assert len(value_of) == len(said) and set(row[asked].tolist()) == set(value_of), "each key is asked for once"
        assert target[asked].tolist() == row[asked + 1].tolist() == [value_of[key] for key in row[asked].tolist()]
    if pairs > 4:
        orders = {tuple(row[-2 * pairs :: 2].tolist()) for row in tokens}
        assert len(orders) == 40, "the same questions come again"


@pytest.mark.parametrize(("context", "pairs"), [(8, 1), (32, 4), (100, 12), (255, 31), (256, 32), (4096, 32)])
def test_a_short_sequence_has_a_pair_for_8_tokens(context: int, pairs: int) -> None:
    _, targets = script.Recall(32).draw("train", 3, context, torch.Generator().manual_seed(0))
    assert (targets >= 0).sum(1).tolist() == [pairs] * 3


@pytest.mark.parametrize(
    ("context", "first", "stages"),
    [
        (1024, 32, {32: 10, 64: 3, 128: 2, 256: 3, 512: 2, 1024: 20}),
        (1000, 100, {125: 10, 250: 5, 500: 5, 1000: 20}),  # 62.5 tokens are too few, and no whole number
        (1000, 32, {125: 10, 250: 5, 500: 5, 1000: 20}),
        (512, 256, {256: 10, 512: 30}),
        (512, 257, {512: 40}),
        (512, None, {512: 40}),
    ],
)
def test_sequences_grow_and_batches_keep_their_tokens(context: int, first: int | None, stages: dict[int, int]) -> None:
    settings = dataclasses.replace(script.RECALL, context=context, first_context=first, iterations=40, growth=0.5)
    shapes = [settings.batch_shape(iteration) for iteration in range(40)]
    assert [length for _, length in shapes] == [length for length, times in stages.items() for _ in range(times)]
    for rows, length in shapes:
        assert rows * length == settings.batch_size * context and rows % settings.batch_size == 0


def test_text_does_not_grow_unless_told_to() -> None:
    for preset in (script.FULL, script.QUICK):
        assert {preset.batch_shape(n) for n in range(preset.iterations)} == {(preset.batch_size, preset.context)}


def test_recall_cannot_be_learnt_by_heart() -> None:
    data = script.Recall(8)
    tokens, targets = data.draw("val", 2000, 64, torch.Generator().manual_seed(0))
    rows, places = (targets >= 0).nonzero(as_tuple=True)
    answers, questions = targets[rows, places] - script.RECALL_KEYS, tokens[rows, places]
    together = torch.zeros(script.RECALL_KEYS, script.RECALL_VALUES)
    together.index_put_((questions, answers), torch.ones(len(rows)), accumulate=True)
    assert together.max() < 2.5 * together.mean(), "a key has its favourite value"


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------

CONFIGURATIONS = {
    "grouped_mlp": {},
    "conv1d": {"compression": "conv1d", "stride": 4},
    "avgpool": {"compression": "avgpool", "select_block_size": 16},
    "gates from the input": {"gate_mode": "q_cond", "gate_init": (0.0, 0.0, 0.0)},
    "grouped queries": {"kv_heads": 1, "separate_kv": True, "init_blocks": 1},
    "rotary positions": {"rope_theta": 100.0},
}


def make_model(attention: str = "nsa", layers: int = 2, **changes: object) -> script.NSALanguageModel:
    config = {"dim": 32, "heads": 2, "seq_len": 32, "local_window": 8, "block_size": 8, "topk_blocks": 2, **changes}
    torch.manual_seed(0)
    return script.NSALanguageModel(11, NSAConfig(**config), layers, attention)


def random_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(11, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", script.ATTENTIONS)
@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_logits_loss_and_gradients(attention: str, changes: dict[str, object]) -> None:
    model = make_model(attention, **changes)
    tokens = random_tokens(3, 33)
    logits, loss = model(tokens[:, :-1], tokens[:, 1:])
    assert logits.shape == (3, 32, 11)
    expected = -logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).mean()
    torch.testing.assert_close(loss, expected)
    assert abs(loss.item() - math.log(11)) < 0.1, "an untrained model knows nothing"
    assert model(tokens[:, :-1])[1] is None
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), f"{name} has no gradient"


@pytest.mark.parametrize("attention", script.ATTENTIONS)
@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_the_future_changes_nothing(attention: str, changes: dict[str, object]) -> None:
    model = make_model(attention, **changes).double().eval()
    tokens = random_tokens(2, 32)
    for present in (1, 7, 8, 20, 31):
        other = tokens.clone()
        other[:, present:] = (other[:, present:] + 1) % 11
        before, after = model(tokens)[0], model(other)[0]
        torch.testing.assert_close(after[:, :present], before[:, :present], rtol=1e-12, atol=1e-12)
        assert not torch.allclose(after[:, present:], before[:, present:]), "the model does not read its input"


def test_dense_differs_from_nsa_in_nothing_but_what_nsa_adds() -> None:
    nsa, dense = (
        {name: parameter.shape for name, parameter in make_model(attention, kv_heads=1).named_parameters()}
        for attention in script.ATTENTIONS
    )
    extras = {name for name in nsa if re.search(r"\.attn\.(gate_|compress_)", name)}
    assert extras and dense == {name: shape for name, shape in nsa.items() if name not in extras}


@pytest.mark.parametrize("theta", [None, 10.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_dense_attention_is_causal_softmax_attention(kv_heads: int, theta: float | None) -> None:
    torch.manual_seed(0)
    config = NSAConfig(dim=24, heads=4, kv_heads=kv_heads, bias=True, rope_theta=theta)
    attention = script.DenseAttention(config).double()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    q, k, v = (project(x).unflatten(-1, (-1, 6)) for project in (attention.to_q, attention.to_k, attention.to_v))
    if theta is not None:  # the pair (i, i + D/2) as a complex number, turned by position · theta^(−2i/D)
        frequencies = torch.tensor([1.0, theta ** (-2 / 6), theta ** (-4 / 6)], dtype=torch.float64)
        turns = torch.exp(1j * torch.arange(9)[:, None] * frequencies)
        q, k = (torch.complex(*y.chunk(2, -1)) * turns[:, None] for y in (q, k))
        q, k = (torch.cat([y.real, y.imag], -1) for y in (q, k))
    k, v = (y.repeat_interleave(4 // kv_heads, dim=2) for y in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(6)
    scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -math.inf)
    expected = attention.to_out(torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v).flatten(2))
    torch.testing.assert_close(attention(x), expected, rtol=1e-10, atol=1e-10)


def test_initial_weights_follow_nanogpt() -> None:
    model = make_model(dim=128, layers=3)
    for name, parameter in model.named_parameters():
        if re.search(r"(to_out|ffn\.2)\.weight", name):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.1), name
        elif re.search(r"(embedding|to_[qkv]|ffn\.0)\.weight", name):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        elif "gate_bias" in name:
            assert parameter.tolist() == [list(model.cfg.gate_init)] * model.cfg.heads, name
    assert model.head.weight is model.token_embedding.weight


def test_recomputed_blocks_give_the_same_gradients() -> None:
    tokens, gradients = random_tokens(2, 33), []
    for recompute in (False, True):
        model = make_model(dropout=0.2).train()
        model.recompute = recompute
        torch.manual_seed(3)
        model(tokens[:, :-1], tokens[:, 1:])[1].backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, kept)


@pytest.mark.parametrize("attention", script.ATTENTIONS)
def test_value_dropout_falls_on_whole_tokens_of_a_head_in_training_alone(attention: str) -> None:
    model = make_model(attention, dim=64, heads=4, kv_heads=2)
    plain = model.blocks[0].attn.to_v
    script.drop_values(model, 0.25)
    x = torch.randn(500, 32, 64)
    expected = F.linear(x, plain.weight).unflatten(-1, (2, 16))
    model.eval()
    assert torch.equal(plain(x).unflatten(-1, (2, 16)), expected)
    model.train()
    ratio = plain(x).unflatten(-1, (2, 16)) / expected
    kept = ratio[..., 0] != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)  # twelve standard deviations
    torch.testing.assert_close(ratio, kept[..., None].expand_as(ratio) / 0.75)
    assert not torch.equal(kept[..., 0], kept[..., 1]), "heads share their dropout"


def test_a_closed_branch_adds_nothing_and_stays_closed() -> None:
    model = make_model(gate_mode="q_cond", gate_init=(0.0, 0.0, 0.0))
    script.close_gates(model, [False, True, True])
    optimizer = script.make_optimizer(model, script.FULL)
    tokens = random_tokens(2, 33)
    for _ in range(2):
        model(tokens[:, :-1], tokens[:, 1:])[1].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for block in model.blocks:
        assert block.attn.gate_bias[:, 1:].eq(-math.inf).all() and block.attn.gate_bias[:, 0].isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    reach = 2 * (model.cfg.local_window - 1)  # of two layers of the one branch that is left
    other = tokens.clone()
    other[:, 0] = (other[:, 0] + 1) % 11
    before, after = (model.eval()(x[:, :-1])[0] for x in (tokens, other))
    assert not torch.allclose(before[:, : reach + 1], after[:, : reach + 1])
    assert torch.equal(before[:, reach + 1 :], after[:, reach + 1 :])


def test_what_the_model_does_not_take() -> None:
    with pytest.raises(ValueError, match="linear"):
        make_model("linear")
    with pytest.raises(ValueError, match="32"):
        make_model()(random_tokens(1, 33))


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", script.ATTENTIONS)
def test_only_matrices_decay(attention: str) -> None:
    model = make_model(attention, bias=True, gate_mode="q_cond")
    decayed, others = script.make_optimizer(model, script.FULL).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0
    matrix = re.compile(
        r"blocks\.\d\.(attn\.(to_(q|k|v|out)\.weight|gate_weight|compress_[kv]\.method\.w_(in|out))|ffn\.[02]\.weight)"
    )
    got = {names[id(parameter)] for parameter in decayed["params"]}
    assert got == {name for name in names.values() if matrix.fullmatch(name)}
    assert len(decayed["params"]) + len(others["params"]) == len(names), "every parameter is trained once"
    assert decayed["betas"] == (0.9, 0.99)


def test_schedule_warms_up_and_decays_to_a_tenth() -> None:
    rates = [script.learning_rate(iteration, script.FULL) for iteration in range(script.FULL.iterations + 1)]
    assert rates[0] == pytest.approx(1e-3 / 101) and max(rates) == rates[100] == pytest.approx(1e-3)
    assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[2550] == pytest.approx(5.5e-4) and rates[-1] == pytest.approx(1e-4)
    short = dataclasses.replace(TINY, iterations=1, warmup=5)
    assert script.learning_rate(0, short) == pytest.approx(short.learning_rate / 6)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluate, checkpoint, generate
# ---------------------------------------------------------------------------------------------------------------------


def test_evaluation_has_no_dropout_and_leaves_the_mode_as_it_was(settings: script.Settings) -> None:
    settings = dataclasses.replace(settings, dropout=0.5, value_dropout=0.5)
    runtime, corpus, batches = prepare(settings)
    model = script.build_model(corpus, "nsa", settings).double().train()  # so that no answer is a matter of rounding
    first = script.evaluate(model, batches, 0, settings, runtime)
    assert first == script.evaluate(model, batches, 0, settings, runtime)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    expected = sum(model(*batch)[1].item() for batch in batches["val"]) / len(batches["val"])
    assert first.val == pytest.approx(expected, rel=1e-5)
    right = sum((model(x)[0].argmax(-1) == y).float().mean().item() for x, y in batches["val"]) / len(batches["val"])
    assert first.accuracy == pytest.approx(right, rel=1e-5)
    in_parts = script.evaluate(model, batches, 0, dataclasses.replace(settings, accumulate=4), runtime)
    assert dataclasses.astuple(in_parts)[:4] == pytest.approx(dataclasses.astuple(first)[:4], rel=1e-5)


def test_targets_that_nobody_asks_for_do_not_count() -> None:
    model, tokens = make_model().double().eval(), random_tokens(4, 32)
    targets = tokens.roll(-1, 1).masked_fill(torch.arange(32) % 3 > 0, -100)
    loss, accuracy = script.score(model, [(tokens, targets)], 2, script.Runtime(torch.device("cpu"), torch.float32))
    logits = model(tokens)[0][:, ::3].flatten(0, 1)
    assert loss == pytest.approx(F.cross_entropy(logits, targets[:, ::3].flatten()).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(-1) == targets[:, ::3].flatten()).float().mean().item())


@pytest.mark.parametrize("gate_mode", ["static", "q_cond"])
def test_mean_gates_are_those_that_the_layers_use(gate_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, seen = make_model(layers=3, gate_mode=gate_mode).eval(), random_tokens(2, 32), []
    with torch.no_grad():
        for block in model.blocks:
            nn.init.normal_(block.attn.gate_bias)
            if gate_mode == "q_cond":
                nn.init.normal_(block.attn.gate_weight)
            block.attn.register_forward_pre_hook(lambda attention, x: seen.append(attention.attention_patterns(x[0])))
        model(tokens)
    expected = [patterns.gates.mean((0, 1, 2)).tolist() for patterns in seen]
    for got, wanted in zip(script.mean_gates(model, tokens), expected, strict=True):
        assert got == pytest.approx(wanted, rel=1e-5)
    monkeypatch.setattr(script, "EVALUATED_GATES", 5)
    for got, patterns in zip(script.mean_gates(model, tokens), seen, strict=False):
        assert got == pytest.approx(patterns.gates[:, -5:].mean((0, 1, 2)).tolist(), rel=1e-5)
    assert script.mean_gates(make_model("dense"), tokens) == []


@pytest.mark.parametrize("attention", script.ATTENTIONS)
def test_a_checkpoint_gives_the_same_logits(attention: str, settings: script.Settings) -> None:
    settings = dataclasses.replace(settings, kv_heads=1, plot_patterns=Path("a.png"), stride=4, rope_theta=100.0)
    trainer = make_trainer(settings, attention)
    trainer.run.evaluations = [script.Evaluation(iteration=7, train=1.25, val=1.5, accuracy=0.5, gates=[])]
    trainer.save(trainer.best_path)
    loaded, rest = script.load_checkpoint(trainer.best_path)
    tokens = trainer.data.val[:32][None]
    assert torch.equal(loaded(tokens)[0], trainer.model.eval()(tokens)[0])
    assert loaded.attention == attention and loaded.cfg == trainer.model.cfg and not loaded.training
    assert script.Run.of(rest["run"]) == trainer.run
    assert rest["vocabulary"] == trainer.data.vocabulary and rest["settings"] == settings.plain()
    assert list(settings.out.iterdir()) == [trainer.best_path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out" / "model.pt"
    path.parent.mkdir()
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk"), script.replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("disk full")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def continuations(model: script.NSALanguageModel, prompts: list[Tensor], count: int, **options: object) -> list[Tensor]:
    drawn = torch.stack(list(model.generate(prompts, count, **options)), dim=1)
    return [torch.cat([prompt, new]) for prompt, new in zip(prompts, drawn, strict=True)]


@pytest.mark.parametrize("attention", script.ATTENTIONS)
def test_generation_repeats_with_its_seed_and_takes_the_likeliest(attention: str) -> None:
    model = make_model(attention).double().train()  # so that no likeliest token is a matter of rounding
    prompts = list(random_tokens(2, 20))

    def generate(seed: int, **options: object) -> list[Tensor]:
        return continuations(model, prompts, 15, generator=torch.Generator().manual_seed(seed), **options)

    rows = generate(1)
    assert [len(row) for row in rows] == [35, 35]  # past seq_len = 32, so that the beginning is forgotten
    assert all(torch.equal(row, again) for row, again in zip(rows, generate(1), strict=True))
    assert not all(torch.equal(row, other) for row, other in zip(rows, generate(2), strict=True))
    assert model.training
    model.eval()
    greedy = generate(1, top_k=1)
    for length in (20, 25, 32, 33, 34):
        for row in greedy:
            seen = row[script.visible(length, 32) : length]
            assert len(seen) == (length if length <= 32 else length - 16)
            assert row[length] == model(seen[None])[0][0, -1].argmax(), f"token {length}"
    for options in ({"temperature": 1e-6}, {"top_p": 1e-6}):
        assert all(torch.equal(row, again) for row, again in zip(greedy, generate(3, **options), strict=True)), options
    for options in ({"top_k": 99}, {"top_p": 1.0}):
        assert all(torch.equal(row, again) for row, again in zip(rows, generate(1, **options), strict=True)), options


@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_generation_is_the_same_with_and_without_a_cache(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lengths, real = make_model(**changes).double(), [], script.NSALanguageModel.hidden
    prompts = [random_tokens(1, length)[0] for length in (3, 17, 40, 32, 1)]

    def hidden(model: script.NSALanguageModel, tokens: Tensor, *arguments: object, **options: object) -> Tensor:
        lengths.append(tokens.shape[1])
        return real(model, tokens, *arguments, **options)

    monkeypatch.setattr(script.NSALanguageModel, "hidden", hidden)
    cached, anew = (
        continuations(model, prompts, 16, generator=torch.Generator().manual_seed(0), use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert lengths[:16].count(1) > 8 > lengths[16:].count(1), "a cached step reads a token alone"
    for row, expected in zip(cached, anew, strict=True):
        assert torch.equal(row, expected)


@pytest.mark.parametrize("attention", script.ATTENTIONS)
def test_prompts_of_any_lengths_are_continued_as_if_alone(attention: str) -> None:
    model = make_model(attention).double()
    prompts = [random_tokens(1, length)[0] for length in (1, 9, 40, 32, 8)]
    together = continuations(model, prompts, 20, top_k=1)
    for prompt, row in zip(prompts, together, strict=True):
        assert torch.equal(row, continuations(model, [prompt], 20, top_k=1)[0]), f"prompt of {len(prompt)}"


def test_the_likeliest_tokens_that_make_up_a_share() -> None:
    logits = torch.tensor([0.5, 0.05, 0.3, 0.15]).log().expand(40000, 4)
    for top_k, top_p, left in ((None, 0.49, [0]), (None, 0.51, [0, 2]), (None, 0.81, [0, 2, 3]), (2, 0.99, [0, 2])):
        drawn = script.draw_token(logits, top_k=top_k, top_p=top_p, generator=torch.Generator().manual_seed(0))
        assert drawn.unique().tolist() == left, (top_k, top_p)
    drawn = script.draw_token(logits, generator=torch.Generator().manual_seed(0))
    assert (drawn.bincount() / 40000).tolist() == pytest.approx([0.5, 0.05, 0.3, 0.15], abs=0.03)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}])
def test_generation_turns_down_what_has_no_meaning(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        make_model().generate(list(random_tokens(1, 3)), 2, **options)
    with pytest.raises(ValueError, match="T at least 1"):
        make_model().generate(list(random_tokens(1, 0)), 2)


@pytest.mark.parametrize("stop", [None, "ab", "aab", "zz"])
def test_text_ends_before_the_stop_text_and_no_piece_of_it_slips_out(stop: str | None) -> None:
    def pieces(text: str) -> tuple[str, str, bool]:
        out, held = "", ""
        for character in text:
            sure, held, stopped = script.before_stop(held + character, stop)
            out += sure
            assert stop is None or not any(
                stop.startswith(out[-n:]) and text.startswith(out[:-n] + stop) for n in range(1, len(out) + 1)
            ), f"{out!r} holds a beginning of {stop!r}"
            if stopped:
                return out, "", True
        return out, held, False

    for number in range(3**6):
        text = "".join("abz"[number // 3**place % 3] for place in range(6))
        out, held, stopped = pieces(text)
        assert stopped == (stop is not None and stop in text)
        assert out + held == (text[: text.index(stop)] if stopped else text)


def test_generate_without_training(settings: script.Settings, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(settings, "nsa")
    trainer.save(settings.out / "model.pt")
    before = {path: path.read_bytes() for path in settings.out.iterdir()}
    base = ["--generate", f"--checkpoint={settings.out / 'model.pt'}", "--sample-length=30", "--prompt"]
    assert script.main([*base, "key "]) == 0
    alone = capsys.readouterr().out
    assert alone.startswith("key ") and len(alone) == len("key ") + 30 + 1
    assert script.main([*base, "key ", "query", "--stop=e", "--top-k=20", "--top-p=0.99"]) == 0
    first, second = capsys.readouterr().out[:-1].split("\n\n", 1)
    assert first.startswith("key ") and "e" not in first[4:] and second.startswith("query") and "e" not in second[5:]
    assert {path: path.read_bytes() for path in settings.out.iterdir()} == before


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be written
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "path"),
    [
        ("--out", "file/out"),
        ("--out", "/proc/nowhere/out"),
        ("--log", "file/log.jsonl"),
        ("--log", "folder"),
        ("--log", "/dev/full"),
        ("--plot-patterns", "file/patterns.png"),
        ("--plot-patterns", "folder/patterns.png"),
        (None, "out/run.json"),
        (None, "out/loss.png"),
        (None, "out/nsa.last.pt"),
    ],
)
def test_what_cannot_be_written_is_found_before_training(
    flag: str | None,
    path: str,
    settings: script.Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script.Trainer, "train", None)
    (tmp_path / "file").write_text("in the way of a folder")
    for folder in ("folder/patterns.png", "" if flag else path):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    line = complaint(capsys, [*flags(settings), *([f"{flag}={tmp_path / path}"] if flag else [])])
    assert "cannot write" in line and str(tmp_path / path) in line and "Errno" not in line


@pytest.mark.usefixtures("no_pictures")
def test_a_disk_without_room_for_the_checkpoints_is_found_before_training(
    settings: script.Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(free: int) -> None:
        monkeypatch.setattr(script.shutil, "disk_usage", lambda _: types.SimpleNamespace(total=10**12, free=free))

    settings = dataclasses.replace(settings, attention="nsa")
    assert script.main(flags(settings)) == 0
    checkpoints = sum(path.stat().st_size for path in settings.out.glob("*.pt"))
    leave(checkpoints)
    assert script.main(flags(settings)) == 0, "old checkpoints make room for new ones"
    capsys.readouterr()
    for path in settings.out.glob("*.pt"):
        path.unlink()
    monkeypatch.setattr(script.Trainer, "train", None)
    assert "the disk has" in complaint(capsys, flags(settings))


def full(path: Path) -> None:
    """Whoever opens this file can, but there is no room in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to("/dev/full")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("name", ["gates.png", "all of them"])
def test_a_finished_run_shows_its_table_whatever_cannot_be_written(
    name: str, settings: script.Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    settings = dataclasses.replace(settings, attention="nsa", iterations=1, plot_patterns=settings.out / "patterns.png")
    names = ["run.json", "loss.png", "gates.png", "patterns.png"]
    for each in names if name == "all of them" else [name]:
        full(settings.out / each)
    assert script.main(flags(settings)) == 1
    shown, errors = capsys.readouterr()
    assert "validation loss, best" in shown and "knowing only how frequent" in shown.splitlines()[-1]
    assert len(errors.splitlines()) == 1, errors
    for each in names:
        is_full = name in (each, "all of them")
        assert (f"cannot write {settings.out / each}: No space left on device" in errors) == is_full
        assert is_full or (settings.out / each).stat().st_size > 0, f"{each} is missing, though it could be written"


@pytest.mark.usefixtures("no_pictures")
def test_a_log_that_fails_on_the_way_costs_nothing_but_itself(
    settings: script.Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, (reader, writer) = script.train_step, os.pipe()

    def train_step(*arguments: object) -> tuple[Tensor, Tensor]:
        with contextlib.suppress(OSError):
            os.close(reader)
        return real(*arguments)

    monkeypatch.setattr(script, "train_step", train_step)
    settings = dataclasses.replace(settings, log=Path(f"/dev/fd/{writer}"))
    assert script.main(flags(settings)) == 1
    os.close(writer)
    shown, errors = capsys.readouterr()
    assert len(errors.splitlines()) == 1 and f"cannot write {settings.log}: Broken pipe" in errors, errors
    assert re.search(r"nsa +dense\nvalidation loss, best", shown)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("attention", "finished"), [("nsa", ["nsa"]), ("both", ["nsa", "dense"])])
def test_a_last_checkpoint_that_cannot_be_written_leaves_the_table(
    attention: str,
    finished: list[str],
    settings: script.Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = script.torch.save

    def save(state: dict, file: io.BufferedIOBase) -> None:
        real(state, file)
        if state["run"]["attention"] == finished[-1] and len(state["run"]["losses"]) == settings.iterations:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.torch, "save", save)
    settings = dataclasses.replace(settings, attention=attention)
    assert script.main(flags(settings)) == 1
    shown, errors = capsys.readouterr()
    assert len(errors.splitlines()) == 1 and "pt: No space left on device" in errors, errors
    assert re.search(" +".join(finished) + r"\nvalidation loss, best", shown)
    assert script.read_checkpoint(settings.out / f"{finished[-1]}.last.pt")["run"]["losses"], "the one before is kept"


@pytest.mark.usefixtures("no_pictures")
def test_text_that_stdout_cannot_spell_is_shown_with_question_marks(
    settings: script.Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = settings.data.read_text().replace("gate", "Törchen").replace("key", "鍵")
    data = settings.data.with_name("Wörter.txt")
    data.write_text(text, encoding="utf-8")
    settings = dataclasses.replace(settings, data=data, attention="nsa", prompt=("鍵",))
    for more in ([], ["--generate", "--prompt", "鍵", "Törchen"]):
        shown = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
        assert script.main([*flags(settings), *more]) == 0
        assert b"?" in shown.getvalue()
    assert capsys.readouterr().err == ""


def with_stdout(monkeypatch: pytest.MonkeyPatch, file: object, arguments: list[str]) -> int:
    """The exit code with another stdout, which must be fit for Python to close it."""
    with file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        return script.main(arguments)


def test_a_closed_pipe_ends_it_quietly(
    settings: script.Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--help"], flags(settings)):
        reader, writer = os.pipe()
        os.close(reader)
        assert with_stdout(monkeypatch, open(writer, "w"), arguments) == 141
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_stdout_is_told_in_one_line(
    settings: script.Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["--help"], flags(settings)):
        assert with_stdout(monkeypatch, open("/dev/full", "w"), arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "cannot write to standard output: No space left on device" in line


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], []])
def test_a_shell_sees_no_traceback_of_a_closed_pipe(arguments: list[str], settings: script.Settings) -> None:
    arguments = arguments or flags(settings)
    command = [sys.executable, str(ROOT / "nsa_gpt_training.py"), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


# ---------------------------------------------------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", script.ATTENTIONS)
def test_the_loss_falls(attention: str, settings: script.Settings) -> None:
    settings = dataclasses.replace(settings, iterations=60, batch_size=8, warmup=10, eval_interval=30)
    trainer = make_trainer(settings, attention)
    run = train(trainer)
    assert [each.iteration for each in run.evaluations] == [0, 30, 60] and len(run.losses) == 60
    assert run.evaluations[0].val == pytest.approx(math.log(len(trainer.data.vocabulary)), abs=0.15)
    assert run.best.val < script.entropy(trainer.data.train) - 0.3, "it learnt no more than how frequent characters are"
    best, _ = script.load_checkpoint(trainer.best_path)
    assert script.evaluate(best, trainer.batches, run.best.iteration, settings, trainer.runtime) == run.best


def test_the_best_model_is_kept_beside_the_last(settings: script.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    vals = iter([9.0, 2.0, 1.5, 1.7, 1.5, 1.6])

    def evaluate(*_: object) -> script.Evaluation:
        return dataclasses.replace(real(*_), val=next(vals))

    real = script.evaluate
    monkeypatch.setattr(script, "evaluate", evaluate)
    trainer = make_trainer(dataclasses.replace(settings, iterations=5, eval_interval=1), "nsa")
    train(trainer)
    kept, last = (script.Run.of(script.read_checkpoint(path)["run"]) for path in (trainer.best_path, trainer.last_path))
    assert kept.best.iteration == len(kept.losses) == trainer.run.best.iteration == 2
    assert last.best.iteration == 2 and len(last.losses) == 5


def test_training_repeats_with_its_seed(settings: script.Settings) -> None:
    settings = dataclasses.replace(settings, dropout=0.3, value_dropout=0.2)
    runs = []
    for _ in range(2):
        torch.rand(3)  # whatever ran before must not matter
        runs.append(train(make_trainer(settings, "nsa")).losses)
    assert runs[0] == runs[1]


def test_parts_of_a_batch_add_up(settings: script.Settings) -> None:
    whole, parts = (
        train(make_trainer(dataclasses.replace(settings, accumulate=accumulate), "nsa")) for accumulate in (1, 4)
    )
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_follows_the_gradient_of_the_whole_batch_clipped_to_its_norm(
    accumulate: int, clipped: bool, settings: script.Settings
) -> None:
    """Plain gradient descent shows the length of a gradient, which Adam hides."""
    runtime, data, _ = prepare(settings)
    model = script.build_model(data, "nsa", settings).double()
    batch = data.draw("train", 4, 32, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.token_embedding.weight.mul_(50)  # parts of the batch then pull in different directions
    for _ in range(2):  # nothing of the first gradient is left in the second
        before = [parameter.detach().clone() for parameter in model.parameters()]
        gradients = torch.autograd.grad(model(*batch)[1], list(model.parameters()))
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        limit = norm / 5 if clipped else 5 * norm
        step = dataclasses.replace(settings, accumulate=accumulate, grad_clip=limit)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loss, found = script.train_step(model, optimizer, batch, 0.1, step, runtime)
        assert found.item() == pytest.approx(norm, rel=1e-4), "the norm is that before clipping"
        for old, new, gradient in zip(before, model.parameters(), gradients, strict=True):
            moved = (old - new.detach()) / (0.1 * min(1.0, limit / norm))
            assert (moved - gradient).norm() < 1e-4 * norm


def test_bfloat16_trains_too(settings: script.Settings) -> None:
    trainer = make_trainer(dataclasses.replace(settings, dtype="bfloat16"), "nsa")
    run = train(trainer)
    assert all(map(math.isfinite, run.losses)) and run.losses[-1] < run.losses[0]
    assert script.load_checkpoint(trainer.best_path)[0].head.weight.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("attention", script.ATTENTIONS)
def test_a_compiled_model_learns_the_same(
    attention: str, settings: script.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated as for any backend of torch.compile, but run without waiting for a C++ compiler."""
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model: real(model, backend="aot_eager"))
    plain, compiled = (
        train(make_trainer(dataclasses.replace(settings, compile=compile, iterations=2, layers=1), attention))
        for compile in (False, True)
    )
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    assert compiled.best.val == pytest.approx(plain.best.val, rel=1e-4)


@pytest.mark.slow
def test_recall_is_learnt_and_not_by_the_window(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = dataclasses.replace(
        script.RECALL,
        **{"out": tmp_path / "out", "attention": "nsa", "pairs": 4, "context": 32, "test_contexts": (64,), "dim": 64},
        **{"heads": 2, "init_std": 0.12, "local_window": 4, "block_size": 4, "learning_rate": 1e-2, "iterations": 100},
        **{"eval_interval": 50, "warmup": 10},
    )
    accuracy = {}
    for branches in (script.BRANCHES, ("local",)):
        assert script.main(flags(dataclasses.replace(tiny, branches=branches))) == 0
        shown = capsys.readouterr().out  # errors are 0.003 and 0.01 with all branches, 0.97 with one of them
        accuracy[branches] = {
            length: float(re.search(rf"accuracy at {length} +(\S+)", shown).group(1)) for length in (32, 64)
        }
    assert accuracy[script.BRANCHES][32] > 0.9 and accuracy[script.BRANCHES][64] > 0.2, accuracy
    assert max(accuracy["local",].values()) < 3 / script.RECALL_VALUES, accuracy
    assert "guessing among 32 values: loss 3.47, accuracy 0.031" in shown


def test_a_diverging_run_says_so(settings: script.Settings, capsys: pytest.CaptureFixture[str]) -> None:
    line = complaint(capsys, flags(dataclasses.replace(settings, learning_rate=math.inf)), exit_code=1)
    assert "--learning-rate" in line


def test_the_whole_script(
    settings: script.Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "pictures" / "patterns.png"
    assert script.main(flags(dataclasses.replace(settings, plot_patterns=picture))) == 0
    shown = capsys.readouterr().out
    first, second = shown.splitlines()[:2]
    assert first.startswith(f"data: {settings.data}") and "cpu, float32" in second and "parameters" in second
    table = re.search(r"nsa +dense\nvalidation loss, best +(\d\.\d+) +(\d\.\d+)\n", shown)
    assert table, f"no two losses side by side in:\n{shown}"
    kept = [script.load_checkpoint(settings.out / f"{attention}.pt")[1]["run"] for attention in script.ATTENTIONS]
    assert [f"{script.Run.of(run).best.val:.4f}" for run in kept] == list(table.groups())
    written = {path.name for path in settings.out.iterdir()}
    checkpoints = {"nsa.pt", "nsa.last.pt", "dense.pt", "dense.last.pt"}
    assert written == {*checkpoints, "loss.png", "gates.png", "run.json"}
    for path in (picture, settings.out / "loss.png", settings.out / "gates.png"):
        assert_is_a_picture(path)


def assert_is_a_picture(path: Path) -> None:
    from matplotlib.image import imread

    pixels = imread(path)
    assert min(pixels.shape[:2]) > 300, f"{path.name} has {pixels.shape} pixels"
    assert len({tuple(pixel) for pixel in pixels.reshape(-1, pixels.shape[2])[::97].tolist()}) > 10, (
        f"{path.name} is bare"
    )


def test_patterns_are_those_of_the_layer(settings: script.Settings) -> None:
    model = make_model(layers=3).eval()
    tokens, seen = random_tokens(1, 32), []
    model.blocks[1].attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(tokens)
    expected = model.blocks[1].attn.attention_patterns(seen[0])
    for got, wanted in zip(model.patterns(tokens, 1), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("missing", ["tqdm", "matplotlib"])
@pytest.mark.slow
def test_optional_packages_are_optional(missing: str, settings: script.Settings, tmp_path: Path) -> None:
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / f"{missing}.py").write_text("raise ImportError('hidden')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "hide")}
    settings = dataclasses.replace(settings, attention="nsa", iterations=1, plot_patterns=tmp_path / "patterns.png")
    arguments = flags(settings)
    done = subprocess.run(
        [sys.executable, str(ROOT / "nsa_gpt_training.py"), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ("skipped, matplotlib is not installed" in done.stdout) == (missing == "matplotlib")
    assert "validation loss, best" in done.stdout


def test_a_terminal_gets_a_bar_with_loss_and_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(script.sys, "stderr", terminal)
    with script.Progress(total=1, title="nsa") as progress:
        time.sleep(2 * progress.bar.mininterval)  # the bar is drawn no more often than that
        progress.advance(2.5, tokens_per_second=12345.6)
    assert "nsa: 100%" in terminal.getvalue() and "loss 2.500, 12,346 tokens/s" in terminal.getvalue()


def test_a_file_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [100.0]
    monkeypatch.setattr(script.time, "monotonic", lambda: clock[0])
    with script.Progress(total=50, title="nsa") as progress:
        for _ in range(50):
            clock[0] += 1.0
            progress.advance(2.5, tokens_per_second=12345.6)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["nsa 16/50", "nsa 32/50", "nsa 48/50"]
    assert lines[0].endswith("loss 2.500, 12,346 tokens/s")


def test_importing_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "nsa_gpt_training.py"), run_name="imported")
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""
