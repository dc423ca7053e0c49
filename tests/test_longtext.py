"""tests/benchmarks/longtext.py: equal parameters, the choice of blocks, and ways from dense attention to NSA."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

import nsa_gpt_training as script
from native_sparse_attention import NativeSparseAttention, NSAConfig

TINY = {
    **{"layers": 2, "dim": 32, "heads": 4, "kv_heads": 2, "context": 128, "batch_size": 2, "local_window": 16},
    **{"block_size": 8, "stride": 4, "select_block_size": 8, "topk_blocks": 5, "iterations": 4, "eval_interval": 2},
    **{"eval_batches": 1, "test_batches": 1, "warmup": 2, "device": "cpu"},
    "compile": "off",
}


@pytest.fixture(scope="module")
def longtext() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).resolve().parent / "benchmarks")
        import longtext

        yield longtext


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    for number in range(10):
        (folder / f"{number}.py").write_text(f"def function_{number}(x):\n    return x + {number}\n" * 20)
    return folder


def attention_of(**changes: object) -> tuple[NativeSparseAttention, torch.Tensor]:
    torch.manual_seed(0)
    sizes = {name: TINY[name] for name in ("dim", "heads", "kv_heads", "local_window", "block_size", "stride")}
    sizes |= {"select_block_size": 8, "topk_blocks": 5, "init_blocks": 1, "local_blocks": 2, "seq_len": 128}
    attention = NativeSparseAttention(NSAConfig(**sizes | changes)).double()
    with torch.no_grad():
        attention.to_q.weight *= 8  # so that attention differs between keys
    return attention, torch.randn(2, 101, 32, dtype=torch.float64)


def test_models_of_all_attentions_have_the_same_number_of_parameters(longtext: ModuleType) -> None:
    counts = {}
    for variant in ("nsa", "dense", "window"):
        counts[variant] = longtext.parameters_of(longtext.build_model(longtext.Long(variant=variant, layers=2), 256))
    assert max(counts.values()) < 1.001 * min(counts.values()), counts


@pytest.mark.parametrize(("flags", "words"), [("--variant sparse", "'nsa' or"), ("--context 1000", "multiple of 64")])
def test_flags_that_are_refused(flags: str, words: str, longtext: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        longtext.parse_settings(flags.split())
    assert words in capsys.readouterr().err


def test_a_window_is_attention_to_the_last_tokens(longtext: ModuleType) -> None:
    cfg = NSAConfig(dim=32, heads=4, kv_heads=2, seq_len=64, local_window=10, rope_theta=100.0)
    torch.manual_seed(0)
    window, dense = longtext.WindowAttention(cfg), script.DenseAttention(cfg)
    dense.load_state_dict(window.state_dict())
    x = torch.randn(1, 50, 32)
    y = window(x)
    for t in (3, 9, 30, 49):  # rotary positions are relative
        torch.testing.assert_close(y[:, t], dense(x[:, max(0, t - 9) : t + 1])[:, -1], atol=1e-5, rtol=1e-5)


def test_shares_of_blocks_are_those_of_the_attention_patterns(longtext: ModuleType) -> None:
    attention, x = attention_of(rope_theta=100.0)
    t = torch.tensor([7, 8, 15, 50, 99, 100])
    dense, importance, chosen = longtext.block_shares(attention, x, t)
    patterns = attention.attention_patterns(x)
    assert torch.equal(chosen, patterns.block_indices[:, t].long())
    blocks = torch.arange(24)[:, None] * 4, torch.arange(13) * 8
    overlap = torch.minimum(blocks[0] + 8, blocks[1] + 8) - torch.maximum(*blocks)
    expected = patterns.compressed[:, :, t] @ (overlap.clamp(min=0) / 8).to(patterns.compressed)
    expected = expected.unflatten(1, (2, 2)).mean(2).transpose(1, 2)
    torch.testing.assert_close(importance, expected.float(), atol=1e-6, rtol=1e-5)
    everything = NativeSparseAttention(dataclasses.replace(attention.cfg, topk_blocks=13, local_window=1)).double()
    everything.load_state_dict(attention.state_dict())
    expected = F.pad(everything.attention_patterns(x).selective[:, :, t], (0, 3)).unflatten(-1, (13, 8)).sum(-1)
    expected = expected.unflatten(1, (2, 2)).mean(2).transpose(1, 2)
    torch.testing.assert_close(dense, expected.float(), atol=1e-6, rtol=1e-5)


def test_best_blocks_hold_most_and_forced_ones_least(longtext: ModuleType) -> None:
    attention, x = attention_of()
    shares = longtext.held_shares(attention, x, torch.arange(60, 101))
    assert shares["forced"] < shares["random"] < shares["best"] and shares["forced"] < shares["chosen"]
    assert shares["chosen"] < shares["best"] <= 1


def test_selection_loss_brings_the_chosen_blocks_nearer_to_the_best(longtext: ModuleType) -> None:
    attention, x = attention_of(selection_loss=1.0)
    t, optimizer = torch.arange(40, 101), torch.optim.Adam(attention.compress_k.parameters(), 3e-3)
    before = longtext.held_shares(attention, x, t)["chosen"]
    for _ in range(60):
        (attention(x) * 0).sum().backward()  # no other loss
        optimizer.step()
        optimizer.zero_grad()
    assert longtext.held_shares(attention, x, t)["chosen"] > before + 0.01


@pytest.fixture(scope="module")
def dense_run(longtext: ModuleType, sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "dense-0.001-1337"
    longtext.train(longtext.Long(**TINY, variant="dense", data=sources, out=out))
    return out


def settings_of(longtext: ModuleType, dense_run: Path, sources: Path, **changes: object) -> object:
    common = {"start": str(dense_run), "data": sources, "out": dense_run.parent / "new"}
    return longtext.Long(**TINY | common | changes)


def test_a_swapped_model_begins_as_the_dense_one_where_window_and_selection_see_all(
    longtext: ModuleType, dense_run: Path, sources: Path
) -> None:
    sees_all = {"local_window": 128, "topk_blocks": 16, "gate_init": (0.0, -60.0, 0.0)}
    dense = longtext.build_model(settings_of(longtext, dense_run, sources, variant="dense"), 29).double()
    swapped = longtext.build_model(settings_of(longtext, dense_run, sources, **sees_all), 29).double()
    tokens = torch.randint(29, (2, 128), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(swapped(tokens)[0], dense(tokens)[0], atol=1e-9, rtol=1e-9)


def test_compressors_of_heads_are_told_apart(longtext: ModuleType, sources: Path, tmp_path: Path) -> None:
    settings = longtext.Long(**TINY, compressors="own", data=sources, out=tmp_path)
    model = longtext.build_model(settings, 29)
    attention = model.blocks[0].attn
    with torch.no_grad():
        for parameter in attention.compress_k.of_heads[0].parameters():
            parameter.zero_()
    k_cmp = attention._compress_rows(torch.randn(1, 64, 2, 8), torch.randn(1, 64, 2, 8))[0]
    assert k_cmp.shape == (1, 15, 2, 8) and (k_cmp[:, :, 0] == 0).all() and (k_cmp[:, :, 1] != 0).any()
    longtext.train(settings)


def test_fixed_gates_stay(longtext: ModuleType, dense_run: Path, sources: Path) -> None:
    settings = settings_of(longtext, dense_run, sources, gates="fixed", gate_init=(1.0, 2.0, 3.0), frozen=2)
    longtext.train(settings)
    after = torch.load(settings.out / "model.pt", weights_only=True)
    for name in ("blocks.0.attn.gate_bias", "blocks.1.attn.gate_bias"):
        assert torch.equal(after[name], torch.tensor([1.0, 2.0, 3.0]).expand(4, 3))


@pytest.mark.slow
def test_what_was_frozen_learns_afterwards_in_compiled_code_too(
    longtext: ModuleType, dense_run: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, mode: compiled(net, backend="aot_eager"))
    settings = settings_of(longtext, dense_run, sources, frozen=2, compile="default")
    longtext.train(settings)
    before, after = (torch.load(folder / "model.pt", weights_only=True) for folder in (dense_run, settings.out))
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_other_seeds_take_the_best_rate_of_the_first(longtext: ModuleType, sources: Path, tmp_path: Path) -> None:
    import learn

    sizes = [word for name, value in TINY.items() if name != "iterations" for word in (f"--{name}", str(value))]
    extra = [word.replace("_", "-") for word in sizes] + ["--iterations", "2", "--data", str(sources), "--layers", "1"]
    words = ["long", "--out", str(tmp_path), "--variants", "dense", "--seeds", "3", "1", "--rates", "1e-5", "3e-3"]
    assert learn.main([*words, "--dense-steps", "1", "--side-by-side", "2", "--", *extra, "--eval-interval", "1"]) == 0
    runs = {log.name: log.value("iteration") for log in longtext.read_logs(tmp_path / "long")}
    full = {"dense-1e-05-3": 2, "dense-0.003-3": 2, "dense-0.003-1": 2}
    assert runs == full | {"dense-as-long-as-nsa-3": 1, "dense-as-long-as-nsa-1": 1}
    with pytest.raises(ValueError, match="no complete run of dense attention"):
        longtext.best_dense(tmp_path / "none")


@pytest.mark.parametrize("recipe", ["distilled", "choice taught", "compressors first", "every fourth layer dense"])
def test_recipes_change_what_they_say(longtext: ModuleType, dense_run: Path, sources: Path, recipe: str) -> None:
    changes = longtext.RECIPES[recipe] | ({"frozen": 4} if recipe == "compressors first" else {})
    changes |= {"dense_every": 2} if "dense_every" in changes else {}
    settings = settings_of(longtext, dense_run, sources, **changes)
    longtext.train(settings)
    before, after = (torch.load(folder / "model.pt", weights_only=True) for folder in (dense_run, settings.out))
    kept = {name for name in before if torch.equal(before[name], after[name])}
    assert kept == (set(before) if recipe == "compressors first" else set())
    assert ("blocks.1.attn.gate_bias" in after) == (recipe != "every fourth layer dense")
    log = longtext.Log(settings.out)
    final = log.value("final")
    assert len(final["by_position"]) == longtext.BINS and final["loss"] == pytest.approx(
        sum(final["by_position"]) / longtext.BINS, rel=1e-5
    )
    assert [each["iteration"] for each in log.evaluations] == [0, 2, 4]


def test_a_distilled_model_that_is_its_teacher_has_the_loss_of_the_text(
    longtext: ModuleType, dense_run: Path, sources: Path
) -> None:
    settings = settings_of(longtext, dense_run, sources, variant="dense")
    text = script.Text(*script.find_text(sources, "*.py"))
    model = longtext.build_model(settings, len(text.vocabulary))
    tokens, targets = text.batch("val", 2, 100, 0)
    plain = model(tokens, targets)[1]
    distilled = longtext.Distilled(model, longtext.build_model(settings, len(text.vocabulary)), 0.25)
    assert distilled(tokens, targets, None)[1].item() == pytest.approx(0.75 * plain.item(), rel=1e-5)


def test_tables_and_drawings_come_from_the_logs(
    longtext: ModuleType, dense_run: Path, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    for variant in ("nsa", "window"):
        longtext.train(longtext.Long(**TINY, variant=variant, data=sources, out=dense_run.parent / variant))
    longtext.train(settings_of(longtext, dense_run, sources, out=tmp_path / "convert" / "as-is"))
    goes_on = settings_of(longtext, dense_run, sources, variant="dense", out=tmp_path / "convert" / "dense-goes-on")
    longtext.train(goes_on)
    logs = longtext.read_logs(dense_run.parent)
    longtext.long_tables(logs)
    longtext.convert_tables(longtext.read_logs(tmp_path / "convert"))
    longtext.remedy_tables([log for log in logs if log.name == "nsa"] * 2)
    shown = capsys.readouterr().out
    for log in logs:
        bits = f"{log.value('final')['loss'] / math.log(2):.4f}"
        assert bits in shown and (f"| nsa | {bits} / {bits} | " in shown) == (log.name == "nsa")
    import draw

    for what in ("positions", "choice", "recovery"):
        runs = tmp_path / "convert" if what == "recovery" else dense_run.parent
        draw.main([what, str(runs), "--out", str(tmp_path / f"{what}.png")])
        assert (tmp_path / f"{what}.png").stat().st_size > 10_000
