"""The training example: what its user sees, and what it promises about data, checkpoints and comparisons."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import io
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nsa_gpt_training as script
from native_sparse_attention import NSAConfig

ROOT = Path(script.__file__).resolve().parent
REAL_TEXT = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
WORDS = ["attention", "block", "gate", "key", "local", "query", "sparse", "token", "value", "window", "\n"]
TINY = dataclasses.replace(
    script.QUICK,
    layers=2,
    dim=32,
    heads=2,
    context=32,
    local_window=8,
    block_size=8,
    iterations=6,
    batch_size=4,
    warmup=2,
    eval_interval=3,
    eval_batches=2,
    sample_length=20,
)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Words in random order: enough structure to learn, small enough to be quick."""
    choices = torch.randint(len(WORDS), (3000,), generator=torch.Generator().manual_seed(7))
    path = tmp_path / "words.txt"
    path.write_text(" ".join(WORDS[choice] for choice in choices), encoding="utf-8")
    return path


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


def serve(monkeypatch: pytest.MonkeyPatch, answer: bytes | Exception) -> None:
    """What the network says to every request."""

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        assert url == script.SHAKESPEARE_URL, f"{url} was asked for"
        assert timeout <= 15, f"waits {timeout} s for a network that may not be there"
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(script.urllib.request, "urlopen", urlopen)


def flags(settings: script.Settings) -> list[str]:
    """The command line that says the same as `settings`."""
    line = []
    for each in dataclasses.fields(settings):
        value, flag = getattr(settings, each.name), "--" + each.name.replace("_", "-")
        if isinstance(value, bool):
            line += [flag if value else flag.replace("--", "--no-", 1)]
        elif isinstance(value, tuple):
            line += [flag, *map(str, value)]
        elif value is not None:
            line += [f"{flag}={value}"]
    return line


def prepare(settings: script.Settings) -> tuple[script.Runtime, script.Corpus, script.Batches]:
    corpus = script.load_corpus(settings.data, settings.context)
    return script.Runtime.of(settings), corpus, script.fixed_batches(corpus, settings)


def complaint(capsys: pytest.CaptureFixture[str], arguments: list[str], exit_code: int = 2) -> str:
    """The one line on stderr with which the script turns these arguments down."""
    assert script.main(arguments) == exit_code, f"exit code of {arguments}"
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, f"{len(lines)} lines on stderr: {lines}"
    return lines[0]


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
    assert (config.compression, config.gate_mode, config.gate_init) == ("grouped_mlp", "static", (2.0, -2.0, -2.0))
    assert config.seq_len == full.context and full.attention == "nsa"


def test_quick_test_decides_where_no_flag_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert script.QUICK_TEST is True, "the script as it is handed out runs the quick test"
    assert script.parse_settings([]) == script.QUICK
    assert script.QUICK.attentions == ("nsa", "dense")
    monkeypatch.setattr(script, "QUICK_TEST", False)
    assert script.parse_settings([]) == script.FULL
    assert script.parse_settings(["--quick"]) == script.QUICK


def test_every_setting_has_a_flag_that_reaches_it(settings: script.Settings) -> None:
    changed = dataclasses.replace(
        settings,
        kv_heads=1,
        stride=4,
        select_block_size=16,
        top_k=5,
        plot_layer=1,
        plot_patterns=Path("a.png"),
        gate_init=(-1.5, 0.0, 1e-3),
        separate_kv=True,
        use_flash=False,
        prompt="key",
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
        (["--prompt", ""], "prompt"),
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
    corpus = script.load_corpus(text_file, context=32)
    assert len(corpus.train) == int(0.9 * len(text))
    assert script.decode(torch.cat([corpus.train, corpus.val]), corpus.vocabulary) == text


def test_targets_are_the_next_characters(settings: script.Settings) -> None:
    text = torch.arange(100)
    tokens, targets = script.draw_batch(text, 500, 10, torch.Generator().manual_seed(0))
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
    first = script.draw_batch(corpus.train, settings.batch_size, settings.context, generator)[0]
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


def test_the_shortest_text_that_is_long_enough(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("ab" * 170)  # 306 to train on, 34 = context + 2 to validate
    assert len(script.load_corpus(path, context=32).val) == 34
    with pytest.raises(script.Stop, match="needs at least 35"):
        script.load_corpus(path, context=33)


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
    corpus = script.load_corpus(None, context=256)
    assert "Python's own help pages" in corpus.source and "Tiny Shakespeare" in corpus.source
    assert "the" in script.decode(corpus.val, corpus.vocabulary).split()
    assert len(str(corpus).splitlines()) == 1
    assert list(input_elsewhere.parent.iterdir()) == [], "nothing is left of a download that went wrong"


@pytest.mark.skipif(not REAL_TEXT.exists(), reason="the real text is not there")
def test_the_real_text_is_what_a_download_is_verified_against() -> None:
    content = REAL_TEXT.read_bytes()
    assert len(content) == script.SHAKESPEARE_BYTES
    assert hashlib.sha256(content).hexdigest() == script.SHAKESPEARE_SHA256
    corpus = script.load_corpus(REAL_TEXT, context=256)
    assert len(corpus.vocabulary) == 65 and len(corpus.train) == 1_003_854
    assert 3.2 < script.entropy(corpus.train) < 3.4


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------

CONFIGURATIONS = {
    "grouped_mlp": {},
    "conv1d": {"compression": "conv1d", "stride": 4},
    "avgpool": {"compression": "avgpool", "select_block_size": 16},
    "gates from the input": {"gate_mode": "q_cond", "gate_init": (0.0, 0.0, 0.0)},
    "grouped queries": {"kv_heads": 1, "separate_kv": True, "init_blocks": 1},
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


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_dense_attention_is_causal_softmax_attention(kv_heads: int) -> None:
    torch.manual_seed(0)
    attention = script.DenseAttention(NSAConfig(dim=24, heads=4, kv_heads=kv_heads, bias=True)).double()
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    q, k, v = (project(x).unflatten(-1, (-1, 6)) for project in (attention.to_q, attention.to_k, attention.to_v))
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


def test_what_the_model_does_not_take() -> None:
    with pytest.raises(ValueError, match="linear"):
        make_model("linear")
    with pytest.raises(ValueError, match="32"):
        make_model()(random_tokens(1, 33))


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and schedule
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", script.ATTENTIONS)
def test_only_matrices_of_linear_layers_decay(attention: str) -> None:
    model = make_model(attention, bias=True, gate_mode="q_cond")
    decayed, others = script.make_optimizer(model, script.FULL).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and others["weight_decay"] == 0
    in_attention_or_ffn = re.compile(r"blocks\.\d\.(attn\.to_(q|k|v|out)|ffn\.[02])\.weight")
    got = {names[id(parameter)] for parameter in decayed["params"]}
    assert got == {name for name in names.values() if in_attention_or_ffn.fullmatch(name)}
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
    settings = dataclasses.replace(settings, dropout=0.5)
    runtime, corpus, batches = prepare(settings)
    model = script.build_model(corpus, "nsa", settings, runtime).train()
    first = script.evaluate(model, batches, 0, runtime)
    assert first == script.evaluate(model, batches, 0, runtime)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    expected = sum(model.eval()(*batch)[1].item() for batch in batches["val"]) / len(batches["val"])
    assert first.val == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("attention", script.ATTENTIONS)
def test_a_checkpoint_gives_the_same_logits(attention: str, settings: script.Settings, tmp_path: Path) -> None:
    settings = dataclasses.replace(settings, kv_heads=1, plot_patterns=Path("a.png"), stride=4)
    _, corpus, _ = prepare(settings)
    model = script.build_model(corpus, attention, settings, script.Runtime.of(settings)).eval()
    evaluation = script.Evaluation(iteration=7, train=1.25, val=1.5)
    path = tmp_path / "model.pt"
    script.save_checkpoint(path, model, evaluation, corpus.vocabulary, settings)
    loaded, rest = script.load_checkpoint(path)
    tokens = corpus.val[:32][None]
    assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    assert loaded.attention == attention and loaded.cfg == model.cfg
    assert (rest["iteration"], rest["train"], rest["val"]) == (7, 1.25, 1.5)
    assert rest["vocabulary"] == corpus.vocabulary and rest["settings"] == settings.plain()
    assert list(tmp_path.glob("*.tmp")) == []


def test_only_a_better_model_is_kept(settings: script.Settings) -> None:
    settings.out.mkdir()
    keeper = script.Keeper(settings.out / "nsa.pt", "abcdefghijk", settings)
    model = make_model()
    for iteration, val in enumerate([2.0, 1.5, 1.7, 1.5, 1.6]):
        nn.init.constant_(model.norm.weight, iteration)
        keeper.offer(model, script.Evaluation(iteration, 1.0, val))
    loaded, rest = script.load_checkpoint(keeper.path)
    assert rest["iteration"] == keeper.best.iteration == 1
    assert loaded.norm.weight.eq(1).all()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out" / "model.pt"
    path.parent.mkdir()
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk"), script.replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise RuntimeError("disk full")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_generation_repeats_with_its_seed_and_respects_top_k() -> None:
    model = make_model().train()
    prompt = random_tokens(2, 5)

    def generate(seed: int, **options: object) -> Tensor:
        return model.generate(prompt, 40, generator=torch.Generator().manual_seed(seed), **options)

    tokens = generate(1)
    assert tokens.shape == (2, 45) and torch.equal(tokens[:, :5], prompt)  # past seq_len = 32: the context is cropped
    assert torch.equal(tokens, generate(1)) and not torch.equal(tokens, generate(2))
    assert model.training
    model.eval()
    greedy = generate(1, top_k=1)
    for length in (5, 20, 44):
        likeliest = model(greedy[:, max(0, length - 32) : length])[0][:, -1].argmax(-1)
        assert torch.equal(greedy[:, length], likeliest), f"token {length}"
    torch.testing.assert_close(generate(3, temperature=1e-6), greedy)
    assert torch.equal(generate(1, top_k=99), tokens), "more than there are is all of them"


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": -1.0}, {"top_k": 0}])
def test_generation_turns_down_what_has_no_meaning(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        make_model().generate(random_tokens(1, 3), 2, **options)
    with pytest.raises(ValueError, match="T at least 1"):
        make_model().generate(random_tokens(1, 0), 2)


# ---------------------------------------------------------------------------------------------------------------------
# Train
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", script.ATTENTIONS)
def test_the_loss_falls(attention: str, settings: script.Settings) -> None:
    settings = dataclasses.replace(settings, iterations=60, batch_size=8, warmup=10, eval_interval=30)
    settings.out.mkdir()
    runtime, corpus, batches = prepare(settings)
    run = script.train(script.build_model(corpus, attention, settings, runtime), corpus, batches, settings, runtime)
    assert [each.iteration for each in run.evaluations] == [0, 30, 60] and len(run.losses) == 60
    assert run.evaluations[0].val == pytest.approx(math.log(len(corpus.vocabulary)), abs=0.15)
    assert run.best.val < script.entropy(corpus.train) - 0.3, "it learnt more than how frequent each character is"
    best, _ = script.load_checkpoint(run.checkpoint)
    assert script.evaluate(best, batches, run.best.iteration, runtime) == run.best


def test_training_repeats_with_its_seed(settings: script.Settings) -> None:
    settings = dataclasses.replace(settings, dropout=0.3)
    settings.out.mkdir()
    runtime, corpus, batches = prepare(settings)

    def losses() -> list[float]:
        torch.rand(3)  # whatever ran before must not matter
        return script.train(
            script.build_model(corpus, "nsa", settings, runtime), corpus, batches, settings, runtime
        ).losses

    assert losses() == losses()


def test_bfloat16_trains_too(settings: script.Settings) -> None:
    settings = dataclasses.replace(settings, dtype="bfloat16")
    settings.out.mkdir()
    runtime, corpus, batches = prepare(settings)
    run = script.train(script.build_model(corpus, "nsa", settings, runtime), corpus, batches, settings, runtime)
    assert all(map(math.isfinite, run.losses)) and run.losses[-1] < run.losses[0]
    assert script.load_checkpoint(run.checkpoint)[0].head.weight.dtype == torch.float32


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
    kept = [script.load_checkpoint(settings.out / f"{attention}.pt")[1]["val"] for attention in script.ATTENTIONS]
    assert [f"{loss:.4f}" for loss in kept] == list(table.groups())
    written = {path.name for path in settings.out.iterdir()}
    assert written == {"nsa.pt", "dense.pt", "loss.png", "run.json"}
    for path in (picture, settings.out / "loss.png"):
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
def test_optional_packages_are_optional(missing: str, settings: script.Settings, tmp_path: Path) -> None:
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / f"{missing}.py").write_text("raise ImportError('hidden')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "hide")}
    arguments = flags(dataclasses.replace(settings, attention="nsa", plot_patterns=tmp_path / "patterns.png"))
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
        progress.advance(torch.tensor(2.5), tokens_per_second=12345.6)
    assert "nsa: 100%" in terminal.getvalue() and "loss 2.500, 12,346 tokens/s" in terminal.getvalue()


def test_a_file_gets_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = [100.0]
    monkeypatch.setattr(script.time, "monotonic", lambda: clock[0])
    with script.Progress(total=50, title="nsa") as progress:
        for _ in range(50):
            clock[0] += 1.0
            progress.advance(torch.tensor(2.5), tokens_per_second=12345.6)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["nsa 16/50", "nsa 32/50", "nsa 48/50"]
    assert lines[0].endswith("loss 2.500, 12,346 tokens/s")


def test_importing_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "nsa_gpt_training.py"), run_name="imported")
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""


def test_ctrl_c_keeps_the_last_checkpoint(settings: script.Settings) -> None:
    endless = flags(dataclasses.replace(settings, attention="nsa", iterations=10**6, eval_interval=2))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "nsa_gpt_training.py"), *endless],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while "8/1000000" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert len(errors.splitlines()) == 1 and "interrupted" in errors, errors
    _, kept = script.load_checkpoint(settings.out / "nsa.pt")
    assert f"iteration {kept['iteration']} " in errors, errors
    assert list(settings.out.glob("*.tmp")) == []


def test_ctrl_c_before_the_first_checkpoint(
    settings: script.Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> Tensor:
        raise KeyboardInterrupt

    settings.out.mkdir()
    (settings.out / "nsa.pt").write_text("of an earlier run")
    monkeypatch.setattr(script, "train_step", interrupt)
    line = complaint(capsys, flags(settings), exit_code=130)
    assert "interrupted" in line and "no checkpoint" in line
    assert (settings.out / "nsa.pt").read_text() == "of an earlier run"
