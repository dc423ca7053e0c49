"""The training script: settings, data, model, optimizer, evaluation, samples, pictures, and what its user sees."""

from __future__ import annotations

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
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_runs import CPU, TINY, complaint, flags, make_trainer, train, write_words

import nsa_gpt_training as script
from native_sparse_attention import NSAConfig

SCRIPT = Path(script.__file__).resolve()
REAL_TEXT = SCRIPT.parents[1] / "shared" / "data" / "tinyshakespeare.txt"
ATTENTIONS = ("nsa", "dense")


@pytest.fixture
def settings(tmp_path: Path) -> script.Settings:
    return dataclasses.replace(TINY, data=write_words(tmp_path / "words.txt"), out=tmp_path / "out")


@pytest.fixture(autouse=True)
def input_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep tests away from the user's own input.txt and from the network."""
    monkeypatch.setattr(script, "INPUT", tmp_path / "beside" / "input.txt")
    (tmp_path / "beside").mkdir()
    serve(monkeypatch, OSError("no network in tests"))
    return script.INPUT


def serve(monkeypatch: pytest.MonkeyPatch, answer: bytes | Exception) -> None:
    """Let the network give this answer to every request."""

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        assert url == script.SHAKESPEARE_URL and timeout <= 15
        if isinstance(answer, Exception):
            raise answer
        return io.BytesIO(answer)

    monkeypatch.setattr(script.urllib.request, "urlopen", urlopen)


# ── Settings ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_full_run_is_the_one_that_is_documented() -> None:
    full = script.parse_settings(["--full"])
    assert (full.dim, full.heads, full.layers, full.context, full.attention) == (384, 6, 6, 256, "nsa")
    assert (full.batch_size, full.iterations, full.dropout, full.warmup) == (64, 5000, 0.2, 100)
    config = script.nsa_config(full)
    assert (config.local_window, config.block_size, config.stride, config.topk_blocks) == (64, 32, 32, 4)
    assert (config.compression, config.gate_mode, config.gate_init) == ("grouped_mlp", "q_cond", (2.0, -2.0, -2.0))
    assert config.seq_len == full.context


def test_the_quick_run_is_the_default_and_trains_both_where_sparsity_shows() -> None:
    quick = script.parse_settings([])
    assert quick == script.QUICK and quick.attention == "both" and quick.out != script.Settings().out
    assert quick.context >= 256 and quick.topk_blocks * quick.block_size + quick.local_window <= quick.context / 4


def test_every_flag_reaches_its_setting(settings: script.Settings) -> None:
    changed = dataclasses.replace(
        settings,
        **{"attention": "dense", "resume": True, "generate": True, "prompt": ["key", "a value"], "temperature": 1.5},
        **{"device": "cpu", "compile": "default", "accumulate": 2, "kv_heads": 1, "stride": 4, "select_block_size": 16},
        **{"compression": "conv1d", "gate_mode": "static", "value_dropout": 0.1, "dropout": 0.3, "seed": 5},
        learning_rate=0.5,
    )
    assert script.parse_settings(flags(changed)) == changed
    extras = {"eval_batches": 200, "warmup": 100}
    assert script.parse_settings(["--full", *flags(changed)]) == dataclasses.replace(changed, **extras)


def test_help_lists_every_flag_in_groups_with_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    listed = re.findall(r"^  (?:-h, )?(--[a-z-]+)", shown, flags=re.MULTILINE)
    options = [each for each in dataclasses.fields(script.Settings) if each.metadata]
    assert set(listed) == {"--help", "--full", *("--" + each.name.replace("_", "-") for each in options)}
    assert len(listed) <= 36 and not any(flag.startswith("--no-") for flag in listed)
    for group in {each.metadata["group"] for each in options}:
        assert f"\n{group}:\n" in shown
    assert "{nsa,dense,both}" in shown and "{grouped_mlp,conv1d,avgpool}" in shown


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--heads", "six"], "--heads"),
        (["--attention", "sparse"], "--attention"),
        (["--iterations", "0"], "iterations = 0"),
        (["--learning-rate", "nan"], "learning_rate = nan"),
        (["--heads", "5"], "heads = 5"),
        (["--stride", "32", "--block-size", "16"], "stride = 32"),
        (["--value-dropout", "1"], "value_dropout = 1"),
        (["--dropout", "1"], "dropout = 1.0"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "meta"),
        (["--prompt", "§"], "§"),
        (["--prompt", "key", ""], "prompt"),
        (["--batch-size", "6", "--accumulate", "4"], "batch_size = 6"),
        (["--compile", "reduce-overhead", "--accumulate", "2"], "accumulate"),
        (["--context-parallel", "2", "--attention", "nsa"], "context_parallel: start several processes with torchrun"),
        (["--fsdp"], "torchrun"),
        (["--resume"], "nothing to resume"),
        (["--resume", "--overwrite"], "only one of them"),
        (["--generate"], "nsa.pt"),
        (["--data", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_a_bad_flag_is_refused_in_one_line(
    arguments: list[str], names: str, settings: script.Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    line = complaint(capfd, ["--data", str(settings.data), "--out", str(settings.out), *arguments])
    assert names in line and not list(settings.out.glob("*")), "nothing is written before all is known to be in order"


def test_a_folder_that_cannot_be_made_is_refused(settings: script.Settings, capfd: pytest.CaptureFixture[str]) -> None:
    blocked = dataclasses.replace(settings, out=settings.data / "out")  # under a file
    assert str(settings.data) in complaint(capfd, flags(blocked), exit_code=1)


# ── Data ──────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_split_is_90_to_10_in_order_and_characters_survive() -> None:
    words = "Ünïcode, 漢字, emoji 🙂\tand\nlines" * 20
    text = script.Text("words", words)
    assert len(text.train) == int(0.9 * len(words))
    assert "".join(text.vocabulary[token] for token in torch.cat([text.train, text.val])) == words


def test_targets_are_the_next_characters() -> None:
    text = script.Text("letters", "".join(map(chr, range(0x4E00, 0x4E00 + 120))))
    tokens, targets = text.batch("train", 500, 10, seed=0)
    assert tokens.shape == targets.shape == (500, 10)
    assert torch.equal(targets, tokens + 1) and torch.equal(tokens, tokens[:, :1] + torch.arange(10))
    assert tokens.min() == 0 and targets.max() == 107, "every window of the split can be drawn, and no other"
    assert not torch.equal(tokens, text.batch("train", 500, 10, seed=1)[0])


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "too short"), (b"x" * 320, "too short"), (b"\xff\xfe \xff" * 100, "utf-8")]
)
def test_unusable_text_is_refused_and_left_alone(
    content: bytes, words: str, settings: script.Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    settings.data.write_bytes(content)
    line = complaint(capfd, flags(settings))
    assert words in line and str(settings.data) in line and settings.data.read_bytes() == content


def test_a_good_download_is_verified_and_kept(monkeypatch: pytest.MonkeyPatch, input_elsewhere: Path) -> None:
    content = b"To be, or not to be. " * 100
    monkeypatch.setattr(script, "SHAKESPEARE_SHA256", hashlib.sha256(content).hexdigest())
    serve(monkeypatch, content)
    found = script.find_text(None)
    assert found == (str(input_elsewhere), content.decode(), None) and input_elsewhere.read_bytes() == content
    serve(monkeypatch, OSError("asked again for what is already there"))
    assert script.find_text(None) == found


@pytest.mark.parametrize("answer", [b"<html>Please log in</html>", OSError("x"), http.client.BadStatusLine("x")])
def test_without_a_good_download_python_has_english_text(
    answer: bytes | Exception, monkeypatch: pytest.MonkeyPatch, input_elsewhere: Path
) -> None:
    serve(monkeypatch, answer)
    source, text, _ = script.find_text(None)
    assert "help pages of Python" in source and len(source.splitlines()) == 1 and " the " in text
    assert list(input_elsewhere.parent.iterdir()) == [], "nothing is left of a download that went wrong"


@pytest.mark.skipif(not REAL_TEXT.exists(), reason="the real text is not there")
def test_the_real_text_is_what_a_download_is_verified_against() -> None:
    assert hashlib.sha256(REAL_TEXT.read_bytes()).hexdigest() == script.SHAKESPEARE_SHA256
    text = script.Text(*script.find_text(REAL_TEXT))
    assert len(text.vocabulary) == 65 and len(text.train) == 1_003_854


def test_a_folder_is_split_by_file(settings: script.Settings, capfd: pytest.CaptureFixture[str]) -> None:
    folder = settings.data.parent / "sources"
    folder.mkdir()
    for number in range(25):
        path = folder / f"{number % 3}" / f"{number:02}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([number]) * 5 + b"\xe4")
    (folder / "a.txt").write_text("another pattern")
    source, content, count = script.find_text(folder, "*.py")
    text = script.Text(source, content, count)
    assert "25 files" in source and "3 of them" in source and str(folder) in source
    names = sorted(f"{number % 3}/{number:02}" for number in range(25))
    expected = [names[number::10] for number in range(10)]
    val = "".join(chr(int(name[-2:])) * 5 + "\xe4\0" for name in expected[4])
    assert "".join(text.vocabulary[token] for token in text.val) == val
    assert len(text.train) == 22 * 7 and set(content[:count]).isdisjoint(set(val) - set("\xe4\0"))
    line = complaint(capfd, [*flags(settings), "--data", str(folder)])
    assert "1 files '*.txt'" in line and "--pattern" in line


# ── Model ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
CONFIGURATIONS = {
    "grouped_mlp": {},
    "conv1d": {"compression": "conv1d", "stride": 4},
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


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_logits_loss_gradients_and_causality(attention: str, changes: dict[str, object]) -> None:
    model, tokens = make_model(attention, **changes).double(), random_tokens(3, 33)
    logits, loss = model(tokens[:, :-1], tokens[:, 1:])
    assert logits.shape == (3, 32, 11) and model(tokens[:, :-1])[1] is None
    expected = -logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(loss.item() - math.log(11)) < 0.1, "an untrained model knows nothing"
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), f"{name} has no gradient"
    for present in (1, 8, 20):
        other = tokens[:, :-1].clone()
        other[:, present:] = (other[:, present:] + 1) % 11
        after = model(other)[0]
        torch.testing.assert_close(after[:, :present], logits[:, :present], rtol=1e-10, atol=1e-10)
        assert not torch.allclose(after[:, present:], logits[:, present:]), "the model does not read its input"


def test_dense_differs_from_nsa_in_nothing_but_what_nsa_adds() -> None:
    nsa, dense = (
        {name: parameter.shape for name, parameter in make_model(attention, kv_heads=1).named_parameters()}
        for attention in ATTENTIONS
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


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_value_dropout_falls_on_whole_tokens_of_a_head_in_training_alone(attention: str) -> None:
    model = make_model(attention, dim=64, heads=4, kv_heads=2)
    to_v = model.blocks[0].attn.to_v
    script.drop_values(model, 0.25)
    x = torch.randn(500, 32, 64)
    expected = F.linear(x, to_v.weight).unflatten(-1, (2, 16))
    model.eval()
    assert torch.equal(to_v(x).unflatten(-1, (2, 16)), expected)
    model.train()
    ratio = to_v(x).unflatten(-1, (2, 16)) / expected
    kept = ratio[..., 0] != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)  # twelve standard deviations
    torch.testing.assert_close(ratio, kept[..., None].expand_as(ratio) / 0.75)
    assert not torch.equal(kept[..., 0], kept[..., 1]), "heads share their dropout"


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_value_dropout_changes_what_a_model_returns(attention: str) -> None:
    model, tokens = make_model(attention), random_tokens(2, 32)
    plain = model(tokens)[0]
    script.drop_values(model, 0.9)
    assert not torch.allclose(model(tokens)[0], plain) and torch.equal(model.eval()(tokens)[0], plain)


def test_what_the_model_does_not_take() -> None:
    with pytest.raises(ValueError, match="attention = 'linear'"):
        make_model("linear")
    with pytest.raises(ValueError, match="longest sequence is 32"):
        make_model()(random_tokens(1, 33))


# ── Optimizer ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_only_matrices_decay(attention: str) -> None:
    model = make_model(attention, bias=True, gate_mode="q_cond")
    decayed, others = script.make_optimizer(model, TINY).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrix = re.compile(
        r"blocks\.\d\.(attn\.(to_(q|k|v|out)\.weight|gate_weight|compress_[kv]\.method\.w_(in|out))|ffn\.[02]\.weight)"
    )
    assert decayed["weight_decay"] > 0 == others["weight_decay"]
    got = {names[id(each)] for each in decayed["params"]}
    assert got == {name for name in names.values() if matrix.fullmatch(name)}
    assert len(decayed["params"]) + len(others["params"]) == len(names), "every parameter is trained once"


def test_schedule_warms_up_and_decays_to_a_tenth() -> None:
    rates = [script.learning_rate(iteration, script.Settings()) for iteration in range(5001)]
    assert rates[0] == pytest.approx(1e-3 / 101) and max(rates) == rates[100] == pytest.approx(1e-3)
    assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[2550] == pytest.approx(5.5e-4) and rates[-1] == pytest.approx(1e-4)


@pytest.mark.parametrize("scale", [0.1, 50.0], ids=["short gradient", "clipped gradient"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_follows_the_gradient_of_the_whole_batch_clipped_to_1(
    accumulate: int, scale: float, settings: script.Settings
) -> None:
    """Use plain gradient descent, which shows the length of a gradient; Adam hides it."""
    model, tokens = make_model().double(), random_tokens(4, 33)
    with torch.no_grad():
        model.token_embedding.weight.mul_(scale)
    batch, settings = (tokens[:, :-1], tokens[:, 1:]), dataclasses.replace(settings, accumulate=accumulate)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):  # nothing of the first gradient is left in the second
        before = [parameter.detach().clone() for parameter in model.parameters()]
        expected = model(*batch)[1]
        gradients = torch.autograd.grad(expected, list(model.parameters()))
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
        assert (norm > 1) == (scale > 1)
        loss, found = script.train_step(model, optimizer, batch, 1e-3, settings, CPU)
        assert (loss.item(), found.item()) == pytest.approx((expected.item(), norm), rel=1e-4)
        for old, new, gradient in zip(before, model.parameters(), gradients, strict=True):
            moved = (old - new.detach()) / (1e-3 * min(1.0, 1 / norm))
            assert (moved - gradient).norm() < 1e-4 * norm


# ── Evaluate ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_evaluation_repeats_its_batches_without_dropout_and_leaves_no_trace(settings: script.Settings) -> None:
    settings = dataclasses.replace(settings, dropout=0.5, value_dropout=0.5)
    trainer = make_trainer(settings)
    model, text = trainer.model.double(), trainer.text
    first = script.evaluate(model, model, text, settings, CPU)
    assert first == script.evaluate(model, model, text, settings, CPU)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    seeds = [script.seed_of(settings.seed, "evaluation", number) for number in range(settings.eval_batches)]
    batches = [text.batch("val", settings.batch_size, settings.context, seed) for seed in seeds]
    results = [(logits, loss, y) for x, y in batches for logits, loss in [model(x, y)]]
    assert first["val"] == pytest.approx(sum(loss.item() for _, loss, _ in results) / len(results), rel=1e-5)
    right = torch.cat([(logits.argmax(-1) == y).flatten() for logits, _, y in results]).double().mean().item()
    assert first["accuracy"] == pytest.approx(right, rel=1e-6)
    assert torch.tensor(first["gates"]).shape == (2, 3)


def test_targets_that_nobody_asks_for_do_not_count() -> None:
    model, tokens = make_model().double().eval(), random_tokens(4, 32)
    targets = tokens.roll(-1, 1).masked_fill(torch.arange(32) % 3 > 0, -100)
    loss, accuracy = script.score(model, [(tokens, targets)], CPU)
    logits = model.eval()(tokens)[0][:, ::3].flatten(0, 1)
    assert loss == pytest.approx(F.cross_entropy(logits, targets[:, ::3].flatten()).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(-1) == targets[:, ::3].flatten()).double().mean().item())


def test_patterns_are_those_of_each_layer() -> None:
    model, tokens = make_model(layers=3, gate_mode="q_cond").eval(), random_tokens(2, 32)
    positions = torch.arange(32)
    with torch.no_grad():
        x = model.token_embedding(tokens) + model.position_embedding(positions)
        for block, patterns in zip(model.blocks, script.layer_patterns(model, tokens, CPU), strict=True):
            for got, expected in zip(patterns, block.attn.attention_patterns(block.norm1(x)), strict=True):
                torch.testing.assert_close(got, expected)
            x = block(x)
    assert script.layer_patterns(make_model("dense"), tokens, CPU) == []


# ── Sample ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def continuations(model: script.NSALanguageModel, prompts: list[Tensor], count: int, **options: object) -> list[Tensor]:
    generator = torch.Generator(model.token_embedding.weight.device).manual_seed(0)
    options = {"temperature": 1e-6, "generator": generator, **options}
    drawn = torch.stack(list(script.generate(model.eval(), prompts, count, **options)), dim=1).cpu()
    return [torch.cat([prompt, new]) for prompt, new in zip(prompts, drawn, strict=True)]


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_generation_takes_the_likeliest_token_and_forgets_the_first_half_of_a_full_context(attention: str) -> None:
    model, prompt = make_model(attention).double(), random_tokens(1, 20)[0]
    (row,) = continuations(model, [prompt], 30)
    for length in range(20, 50):
        seen = row[:length] if length <= 32 else row[length - 16 - (length - 33) % 17 : length]
        assert row[length] == model(seen[None])[0][0, -1].argmax(), f"token {length}"


@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_prompts_of_any_lengths_continue_alike_with_a_cache_without_one_and_alone(changes: dict[str, object]) -> None:
    model, lengths = make_model(**changes).double(), []
    model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    prompts = [random_tokens(1, length)[0] for length in (3, 17, 1, 9)]
    cached = continuations(model, prompts, 15, temperature=1.0)
    assert lengths == [17, *[1] * 14], "a cached step reads one token of each row"
    for row, anew in zip(cached, continuations(model, prompts, 15, temperature=1.0, use_cache=False), strict=True):
        assert torch.equal(row, anew)
    for prompt, row in zip(prompts, continuations(model, prompts, 15), strict=True):
        assert torch.equal(row, continuations(model, [prompt], 15)[0]), f"prompt of {len(prompt)}"


def test_a_sample_repeats_with_its_seed() -> None:
    model, prompts = make_model().double(), list(random_tokens(2, 20))
    first, again, other = (
        continuations(model, prompts, 20, temperature=1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert all(map(torch.equal, first, again)) and not all(map(torch.equal, first, other))


def test_tokens_are_drawn_as_multinomial_draws_them() -> None:
    model, prompt = make_model(), random_tokens(1, 5)[0]
    (row,) = continuations(model, [prompt], 1, temperature=0.5)
    probabilities = (model(prompt[None])[0][0, -1] / 0.5).softmax(-1)
    assert row[-1] == torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(0))


# A graph needs a GPU: here parameters only say that they are on one.
@pytest.mark.parametrize("captures", [True, False])
def test_steps_are_captured_once_or_run_as_they_are(
    captures: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("no graph today\nand no second line")

    def capture(step: Callable[[Tensor], Tensor], tokens: Tensor) -> Callable[[Tensor], Tensor]:
        captured.append(tokens)
        return lambda tokens: replayed.append(tokens) or step(tokens)

    model, prompts, captured, replayed = make_model(), [random_tokens(1, n)[0] for n in (3, 17)], [], []
    expected = continuations(model, prompts, 40)
    monkeypatch.setattr(nn.Parameter, "is_cuda", True, raising=False)
    monkeypatch.setattr(*(script, "capture", capture) if captures else (torch.cuda, "CUDAGraph", fail))
    assert all(map(torch.equal, continuations(model, prompts, 40), expected))
    line = "\nnsa_gpt_training.py: generating without a CUDA graph: no graph today\n"
    assert capfd.readouterr().err == ("" if captures else line)
    # 16 tokens fill the context, 17 each time that its half is kept: their first is read with the whole, eagerly.
    assert (len(captured), len(replayed)) == ((1, 14 + 16 + 6) if captures else (0, 0))


@pytest.mark.gpu
@pytest.mark.parametrize("changes", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
@pytest.mark.parametrize("temperature", [1e-6, 1.0])
def test_a_graph_writes_what_eager_steps_write(
    temperature: float, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model, prompts = make_model(**changes, seq_len=96).cuda(), [random_tokens(1, n)[0] for n in (3, 40, 1)]
    replayed = continuations(model, prompts, 120, temperature=temperature)
    assert capfd.readouterr().err == "", "the step was captured"
    monkeypatch.setattr(script, "capture", lambda step, tokens: step)
    assert all(map(torch.equal, replayed, continuations(model, prompts, 120, temperature=temperature)))


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_runs_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not in a graph")

    model, prompts = make_model().cuda(), [random_tokens(1, 9)[0]]
    expected = continuations(model, prompts, 40)
    model.register_forward_hook(fail)
    assert all(map(torch.equal, continuations(model, prompts, 40), expected))
    assert capfd.readouterr().err == "\nnsa_gpt_training.py: generating without a CUDA graph: not in a graph\n"
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


def test_generate_without_training(settings: script.Settings, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(settings)
    trainer.run.iteration = 1
    trainer.save(trainer.best_path)
    before = trainer.best_path.read_bytes()
    base = ["--generate", "--out", str(settings.out), "--sample-length", "30", "--prompt"]
    assert script.main([*base, "key "]) == 0
    speed = r"\n\n[0-9,]+ tokens/s: median of the steps after the prompts\n"
    assert re.fullmatch(r"key [^§]{30}" + speed, capsys.readouterr().out)
    assert script.main([*base, "key ", "query"]) == 0
    assert re.fullmatch(r"key [^§]{30}\n\nquery[^§]{30}" + speed, capsys.readouterr().out)
    assert script.main([*base[:3], "--sample-length", "1", "--prompt", "key "]) == 0
    assert re.fullmatch(r"key [^§]\n", capsys.readouterr().out), "one token has no step"
    assert list(settings.out.iterdir()) == [trainer.best_path] and trainer.best_path.read_bytes() == before


def test_a_reader_that_has_seen_enough_ends_it_quietly(
    settings: script.Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(settings)
    trainer.run.iteration = 1
    trainer.save(trainer.best_path)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        assert script.main(["--generate", "--out", str(settings.out)]) == 141
    assert capfd.readouterr().err == ""


# ── The whole script ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_whole_script(settings: script.Settings, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert script.main(flags(dataclasses.replace(settings, attention="both"))) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"data: {settings.data}; ") and "cpu, float32" in shown
    table = re.search(r"nsa +dense\nvalidation loss, best +(\d\.\d+) +(\d\.\d+)\n", shown)
    assert table, f"no two losses side by side in:\n{shown}"
    runs = [script.Run(**script.read_checkpoint(settings.out / f"{name}.pt")["run"]) for name in ATTENTIONS]
    assert [f"{run.best['val']:.4f}" for run in runs] == list(table.groups())
    suffixes = (".pt", ".last.pt", ".jsonl")
    files = {*(name + suffix for name in ATTENTIONS for suffix in suffixes), "loss.png", "gates.png", "patterns.png"}
    assert {path.name for path in settings.out.iterdir()} == files
    for path in settings.out.glob("*.png"):
        assert_is_a_picture(path)


def assert_is_a_picture(path: Path) -> None:
    from matplotlib.image import imread

    pixels = imread(path)
    assert min(pixels.shape[:2]) > 300, f"{path.name} has {pixels.shape} pixels"
    colors = {tuple(pixel) for pixel in pixels.reshape(-1, pixels.shape[2])[::97].tolist()}
    assert len(colors) > 10, f"{path.name} is bare"


def test_the_picture_of_patterns_has_two_heads_and_three_branches(settings: script.Settings) -> None:
    pytest.importorskip("matplotlib")
    model, text = make_model(heads=4), script.Text("letters", "abcdefghijk" * 40)
    panels = [axes for axes in script.patterns_figure(model, text, CPU).axes if axes.get_title()]
    assert len(panels) == 2 * 3 and [axes.get_title().split(",")[0] for axes in panels[:3]] == list(script.BRANCHES)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_finished_run_shows_its_table_even_if_a_picture_cannot_be_written(
    settings: script.Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    settings.out.mkdir()
    (settings.out / "loss.png").symlink_to("/dev/full")
    assert script.main(flags(dataclasses.replace(settings, iterations=1))) == 1
    shown, errors = capfd.readouterr()
    assert "validation loss, best" in shown and "No space left" in errors and len(errors.splitlines()) == 1


def test_text_that_stdout_cannot_spell_is_shown_with_question_marks(
    settings: script.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.data.write_text(settings.data.read_text().replace("key", "鍵"), encoding="utf-8")
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    monkeypatch.setattr(script, "draw_pictures", lambda *_: None)
    assert script.main(flags(dataclasses.replace(settings, iterations=1, prompt=["鍵"]))) == 0
    assert b"?" in shown.getvalue()


def test_a_diverging_run_says_so(settings: script.Settings, capfd: pytest.CaptureFixture[str]) -> None:
    line = complaint(capfd, flags(dataclasses.replace(settings, learning_rate=math.inf)), exit_code=1)
    assert "--learning-rate" in line


def test_a_terminal_gets_a_bar_with_loss_and_speed(settings: script.Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(tqdm.tqdm, "mininterval", 0, raising=False)
    assert train(make_trainer(settings))
    assert re.search(r"nsa: +\d+%", terminal.getvalue())


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["tqdm", "matplotlib"])
def test_optional_packages_are_optional(missing: str, settings: script.Settings, tmp_path: Path) -> None:
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / f"{missing}.py").write_text("raise ImportError('hidden')")
    command = [sys.executable, str(SCRIPT), *flags(dataclasses.replace(settings, iterations=1))]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "hide")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("skipped, matplotlib is not installed" in done.stdout) == (missing == "matplotlib")
    assert "validation loss, best" in done.stdout


@pytest.mark.slow
def test_recall_is_learnt_and_not_by_the_window(tmp_path: Path) -> None:
    """Errors are 0.003 with all branches and 0.97 with the window alone."""
    learn = SCRIPT.parent / "tests" / "benchmarks" / "learn.py"
    command = [sys.executable, str(learn), "recall", "--out", str(tmp_path)]
    command += ["--contexts", "32", "--variants", "nsa", "local", "--seeds", "1", "--"]
    command += ["--pairs=4", "--local-window=4", "--learning-rate=1e-2", "--iterations=100"]
    command += ["--eval-interval=50", "--warmup=10", "--batch-size=64"]
    done = subprocess.run(command, capture_output=True, text=True)
    shares = {name: float(share) for name, share in re.findall(r"^\| (nsa|local) \| ([\d.]+) \|$", done.stdout, re.M)}
    assert shares["nsa"] > 0.9 and shares["local"] < 0.1, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_compiled_model_learns_the_same(
    attention: str, settings: script.Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated as for any backend of torch.compile, but run without waiting for a C++ compiler."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode: real(model, backend="aot_eager"))
    runs = []
    for mode in ("off", "default"):
        trainer = make_trainer(dataclasses.replace(settings, compile=mode, iterations=2, layers=1), attention)
        assert train(trainer)
        runs.append(trainer.run)
    assert isinstance(trainer.net, nn.Module) and trainer.net is not trainer.model
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=1e-4)
    assert runs[1].best["val"] == pytest.approx(runs[0].best["val"], rel=1e-4)


def test_importing_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(SCRIPT), run_name="imported")
    shown = capsys.readouterr()
    assert shown.out == shown.err == ""


def test_the_model_stands_within_the_first_200_lines() -> None:
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 1000
    assert lines.index("class NSALanguageModel(nn.Module):") < 200
