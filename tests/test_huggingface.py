"""The recipe of docs/huggingface.md, run as it stands: what is kept, what trains, and what generates."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from native_sparse_attention import NSACache

transformers = pytest.importorskip("transformers", minversion="5.0")

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "huggingface.md"
SIZES = dict(
    vocab_size=32,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.2,  # attention that is far from uniform
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
SPARSE = dict(seq_len=128, local_window=8, block_size=4, topk_blocks=2, gate_init=(0.0, 0.0, 0.0))
DENSE = SPARSE | dict(local_window=128, gate_init=(50.0, -50.0, -50.0))  # the window sees all, the rest counts nothing
# Half the window and half the chosen blocks, each of which sees all; as docs/huggingface.md has it.
HALVES = SPARSE | dict(local_window=128, topk_blocks=32, compression="avgpool", gate_init=(0.0, -30.0, 0.0))
LLAMA = transformers.LlamaConfig
# What models call their cache: past_key_values before transformers 5.24.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The names that it defines. Running it trains a model and checks that it prints what its comments say."""
    code = "".join(re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL))
    namespace: dict[str, object] = {"__name__": "recipe"}
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.chdir(tmp_path_factory.mktemp("recipe"))
        exec(compile(code, str(DOCUMENT), "exec"), namespace)
    assert printed.getvalue().splitlines() == re.findall(r"print\(.*\)  # (.*)", code)
    return SimpleNamespace(**namespace)


def causal_model(config: type = LLAMA, **settings: object) -> nn.Module:
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config(**SIZES | settings)).eval()


def swapped(recipe: SimpleNamespace, model: nn.Module, **settings: object) -> nn.Module:
    """A copy with the attention replaced."""
    new = copy.deepcopy(model)
    recipe.use_nsa(new, **settings)
    return new


def sparse_model(recipe: SimpleNamespace) -> nn.Module:
    """Model in float64, so that rounding decides no choice of a block or a token."""
    return swapped(recipe, causal_model().double(), **SPARSE).eval()


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(1, 32, (rows, length), generator=torch.Generator().manual_seed(2))


def generate(model: nn.Module, ids: Tensor, **options: object) -> Tensor:
    """The 24 tokens that follow."""
    greedy = dict(attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
    return model.generate(ids, **greedy | options)[:, ids.shape[1] :]


# ---------------------------------------------------------------------------------------------------------------------
# What is kept
# ---------------------------------------------------------------------------------------------------------------------


def rope(kind: str, **settings: object) -> dict[str, object]:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=500.0, **settings))


OLD = dict(original_max_position_embeddings=32)  # of texts of 70 tokens and a seq_len of 128
FACTORS = dict(short_factor=[1.0, 1.5, 2.0, 3.0], long_factor=[2.0, 4.0, 6.0, 9.0], factor=4.0)
LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **OLD)
FAMILIES = {
    "llama": (LLAMA, rope("default")),
    "llama with biases": (LLAMA, dict(attention_bias=True)),
    "llama with wide heads": (LLAMA, dict(head_dim=16)),
    "llama3": (LLAMA, LLAMA3),
    "linear": (LLAMA, rope("linear", factor=2.0)),
    "dynamic": (LLAMA, rope("dynamic", factor=2.0)),
    "yarn": (LLAMA, rope("yarn", factor=4.0, **OLD)),
    "longrope, long": (LLAMA, rope("longrope", **FACTORS, **OLD)),
    "longrope, short": (LLAMA, rope("longrope", **FACTORS, original_max_position_embeddings=128)),
    "mistral": (transformers.MistralConfig, rope("default")),
    "qwen2": (transformers.Qwen2Config, rope("yarn", factor=4.0, **OLD)),
    "qwen3": (transformers.Qwen3Config, dict(head_dim=8)),
    "qwen3 with wide heads": (transformers.Qwen3Config, dict(head_dim=16) | LLAMA3),
}


def assert_same_logits(actual: nn.Module, expected: nn.Module, ids: Tensor) -> None:
    with torch.no_grad():
        # In float64; but transformers' rotary embeddings and norms are float32 all the same.
        torch.testing.assert_close(actual(ids).logits, expected(ids).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("settings", [DENSE, HALVES], ids=["window", "halves"])
@pytest.mark.parametrize("family", FAMILIES)
def test_where_nsa_is_full_attention_the_logits_are_those_of_the_original(
    recipe: SimpleNamespace, family: str, settings: dict[str, object]
) -> None:
    config, fields = FAMILIES[family]
    model = causal_model(config, **fields).double()
    with torch.no_grad():  # biases start as zeros, norms as ones
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
                parameter.normal_()
        for length in (70, 128 if "long" in family else 9):
            assert_same_logits(swapped(recipe, model, **settings), model, tokens(2, length))
        change = swapped(recipe, model, **SPARSE)(tokens(2, 70)).logits - model(tokens(2, 70)).logits
    assert change.abs().max() > 0.1, "the model does not depend on its attention"


def test_dynamic_frequencies_are_those_of_the_longest_text(recipe: SimpleNamespace) -> None:
    fresh = lambda: causal_model(max_position_embeddings=32, **rope("dynamic", factor=2.0)).double()  # noqa: E731
    new = swapped(recipe, fresh(), **DENSE | dict(seq_len=70))
    assert_same_logits(new, fresh(), tokens(2, 70))
    with pytest.raises(AssertionError, match="not close"):
        assert_same_logits(new, fresh(), tokens(2, 50))  # it keeps the frequencies of the longest text that it has seen


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_is_read_from_the_mask(recipe: SimpleNamespace, left: bool) -> None:
    model, ids = causal_model(), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, slice(15) if left else slice(25, None)] = 0
    with torch.no_grad():
        dense, nsa = swapped(recipe, model, **DENSE), sparse_model(recipe)
        expected, actual = (each(ids, attention_mask=mask).logits[mask.bool()] for each in (model, dense))
        alone = nsa(ids[1:, mask[1].bool()]).logits[0]
        padded = nsa(ids, attention_mask=mask).logits[1, mask[1].bool()]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers", "one layer"])
@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_a_model_comes_back_from_where_it_was_saved(
    recipe: SimpleNamespace, family: str, layers: list[int] | None, tmp_path: Path
) -> None:
    config, fields = FAMILIES[family]
    model, ids = swapped(recipe, causal_model(config, **fields), layers=layers, **SPARSE), tokens(2, 40)
    for parameter in model.parameters():  # as after training
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    loaded = recipe.load_nsa(tmp_path).eval()
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert torch.equal(generate(model, ids), generate(loaded, ids))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(recipe.load_nsa(tmp_path / "again").eval()(ids).logits, loaded(ids).logits)
    low = recipe.load_nsa(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}


OTHERS = {
    "Gemma 3 has layers of two kinds": transformers.Gemma3TextConfig(**SIZES, head_dim=8),
    "Phi-3 has queries, keys and values in one projection": transformers.Phi3Config(**SIZES),
    "GPT-2 has .* learned positions": transformers.GPT2Config(n_embd=48, n_layer=1, n_head=2, vocab_size=32),
    "'olmo2': must be one of llama, .*not been tested": transformers.Olmo2Config(**SIZES),
}


@pytest.mark.parametrize("reason", OTHERS)
def test_a_model_that_would_not_be_kept_is_refused(recipe: SimpleNamespace, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        recipe.use_nsa(transformers.AutoModelForCausalLM.from_config(OTHERS[reason]))


def test_a_second_swap_is_refused(recipe: SimpleNamespace) -> None:
    model = swapped(recipe, causal_model(), layers=[0], **SPARSE)
    with pytest.raises(ValueError, match="the model has NSA already"):
        recipe.use_nsa(model, layers=[1], **SPARSE)


@pytest.mark.parametrize("layers", [[2], [-1], ["0"]], ids=str)
def test_layers_that_do_not_exist_are_refused(recipe: SimpleNamespace, layers: list[object]) -> None:
    with pytest.raises(ValueError, match=r"^layers = \[.*\]: must be numbers of layers, from 0 to 1"):
        recipe.use_nsa(causal_model(), layers=layers, **SPARSE)


# ---------------------------------------------------------------------------------------------------------------------
# Some layers only
# ---------------------------------------------------------------------------------------------------------------------

MIXED = {
    "first": (LLAMA, {}, [0]),
    "last": (LLAMA, {}, [1]),
    "beside a sliding window": (transformers.MistralConfig, dict(sliding_window=16), [0]),
    "behind a sliding window": (transformers.MistralConfig, dict(sliding_window=16), [1]),
}


@pytest.mark.parametrize("kind", MIXED)
def test_some_layers_stay_dense(recipe: SimpleNamespace, kind: str) -> None:
    """Logits by forwards, by a cache in pieces and by generate, with padding and beams."""
    config, fields, layers = MIXED[kind]
    model, ids = causal_model(config, **fields).double(), tokens(2, 37)
    mixed = swapped(recipe, model, layers=layers, **SPARSE)
    assert isinstance(mixed.model.layers[1 - layers[0]].self_attn, type(model.model.layers[0].self_attn))
    mask = torch.ones_like(ids)
    mask[1, :16] = 0
    written = generate(mixed, ids, attention_mask=mask)
    assert torch.equal(written[:1], greedily(mixed, ids[:1]))
    assert torch.equal(written[1:], greedily(mixed, ids[1:, 16:]))
    options = dict(attention_mask=mask, num_beams=3)
    assert torch.equal(generate(mixed, ids, **options), generate(mixed, ids, use_cache=False, **options))
    with torch.no_grad():
        cache = transformers.DynamicCache(config=model.config)
        pieces = [mixed(part, use_cache=True, **{CACHE: cache}).logits for part in ids.split([11, 1, 25], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), mixed(ids).logits, rtol=1e-4, atol=1e-4)
        if "window" not in kind:
            assert_same_logits(swapped(recipe, model, layers=layers, **DENSE), model, ids)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def test_a_few_steps_lower_the_loss_and_gradients_reach_every_weight(recipe: SimpleNamespace) -> None:
    model, ids = sparse_model(recipe).train(), tokens(4, 48)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        missing = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
        assert not missing, f"no gradient reaches {missing}"
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.parametrize("loss", ["distillation_loss", "attention_loss"])
def test_a_loss_that_brings_the_dense_outputs_back(recipe: SimpleNamespace, loss: str) -> None:
    """It is 0 where the student equals the teacher, in layers that are dense too, and falls where it does not."""
    teacher, ids = causal_model().double(), tokens(4, 48)
    loss = functools.partial(getattr(recipe, loss), teacher=teacher, input_ids=ids, attention_mask=ids.sign())
    assert 0 <= loss(swapped(recipe, teacher, layers=[1], **HALVES)).item() < 1e-9
    student = swapped(recipe, teacher, **SPARSE)
    optimizer, losses = torch.optim.AdamW(student.parameters(), lr=1e-3), []
    for _ in range(8):
        losses.append(loss(student))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0], losses
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(layer.self_attn._forward_hooks for layer in teacher.model.layers)


# ---------------------------------------------------------------------------------------------------------------------
# Generating
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, recipe: SimpleNamespace) -> list[tuple[int, bool]]:
    """Tokens of each forward of an attention, and whether there was a cache."""
    seen, forward = [], recipe.NativeSparseAttention.forward

    def counted(self: nn.Module, x: Tensor, **options: object) -> Tensor:
        seen.append((x.shape[1], isinstance(options.get("cache"), NSACache)))
        return forward(self, x, **options)

    monkeypatch.setattr(recipe.NativeSparseAttention, "forward", counted)
    return seen


def greedily(model: nn.Module, ids: Tensor) -> Tensor:
    """The 24 most probable tokens that follow, each from a forward over everything before it, without a cache."""
    written = ids
    with torch.no_grad():
        for _ in range(24):
            written = torch.cat([written, model(written, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return written[:, ids.shape[1] :]


def test_greedy_generation_writes_what_forwards_over_the_whole_text_do(
    recipe: SimpleNamespace, calls: list[tuple[int, bool]]
) -> None:
    model, ids = sparse_model(recipe), tokens(2, 37)
    written = generate(model, ids)
    assert calls == [(37, True)] * 2 + [(1, True)] * 46, "generate does not go on from a cache"
    assert torch.equal(written, greedily(model, ids))
    assert len(written.unique()) > 4, f"the model writes next to nothing: {written}"


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_writes_what_it_writes_without(recipe: SimpleNamespace, beams: int) -> None:
    model, ids = sparse_model(recipe), tokens(2, 37)
    mask = torch.ones_like(ids)
    mask[1, :16] = 0  # on the left, as generate wants it
    options = dict(attention_mask=mask, num_beams=beams)
    assert torch.equal(generate(model, ids, **options), generate(model, ids, use_cache=False, **options))


def test_a_padded_batch_generates_what_each_row_does_alone(recipe: SimpleNamespace) -> None:
    model, ids = sparse_model(recipe), tokens(2, 37)
    mask = torch.ones_like(ids)
    mask[1, :16] = 0
    together = generate(model, ids, attention_mask=mask)
    assert torch.equal(together[:1], generate(model, ids[:1]))
    assert torch.equal(together[1:], generate(model, ids[1:, 16:]))


@pytest.mark.parametrize("config", [{}, dict(config=LLAMA(**SIZES))], ids=["lazy", "config"])
def test_a_cache_that_is_passed_along_goes_on_and_starts_anew_after_reset(
    recipe: SimpleNamespace, config: dict[str, object]
) -> None:
    model, ids = sparse_model(recipe), tokens(2, 30)
    cache = transformers.DynamicCache(**config)
    with torch.no_grad():
        whole = model(ids).logits
        for _ in range(2):
            pieces = [model(part, use_cache=True, **{CACHE: cache}).logits for part in ids.split([11, 1, 18], 1)]
            torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-4)
            assert cache.get_seq_length() == 30
            cache.reset()
            assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_attention_goes_on_from_a_cache_under_either_name(recipe: SimpleNamespace, name: str) -> None:
    attention, x = sparse_model(recipe).model.layers[0].self_attn, torch.randn(2, 30, 48, dtype=torch.float64)
    cache = transformers.DynamicCache()
    with torch.no_grad():
        pieces = [attention(hidden_states=part, use_cache=True, **{name: cache})[0] for part in x.split([29, 1], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), attention(hidden_states=x)[0], rtol=1e-4, atol=1e-4)


def test_two_caches_do_not_meet(recipe: SimpleNamespace) -> None:
    model, ids = sparse_model(recipe), tokens(2, 30)
    caches = [transformers.DynamicCache(config=model.config) for _ in range(2)]
    with torch.no_grad():
        for step in ids.split(10, 1):
            last = [model(row[None], **{CACHE: cache}).logits for row, cache in zip(step, caches, strict=True)]
        torch.testing.assert_close(torch.cat(last), model(ids).logits[:, 20:], rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def can_offload() -> bool:
    """Whether transformers can make an offloaded cache: with torch built for CUDA it needs a GPU for that."""
    try:
        transformers.DynamicCache(offloading=True)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(cache_implementation="static"), "the cache is a StaticCache, must be a DynamicCache"),
        pytest.param(
            dict(cache_implementation="offloaded"),
            "must be a DynamicCache without offloading",
            marks=pytest.mark.skipif(not can_offload(), reason="transformers cannot offload a cache here"),
        ),
        (dict(prompt_lookup_num_tokens=2, eos_token_id=0), "(?i)assisted decoding"),
        (dict(assistant_model=causal_model()), "(?i)assisted decoding"),
    ],
    ids=["static", "offloaded", "prompt lookup", "assistant"],
)
def test_generation_that_would_need_another_cache_is_refused(
    recipe: SimpleNamespace, options: dict[str, object], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        generate(sparse_model(recipe), tokens(1, 37), **options)
    assert "\n" not in str(refusal.value)


def test_a_model_that_assists_another_is_refused(recipe: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="(?i)assisted decoding"):
        generate(causal_model(), tokens(1, 37), assistant_model=sparse_model(recipe))


def test_a_cache_that_dense_attention_has_filled_is_refused(recipe: SimpleNamespace) -> None:
    model, ids, cache = causal_model(), tokens(1, 20), transformers.DynamicCache()
    with torch.no_grad():
        model(ids, **{CACHE: cache})
        with pytest.raises(ValueError, match="holds the keys of another attention"):
            swapped(recipe, model, **SPARSE)(ids, **{CACHE: cache})


def test_a_cache_under_an_unknown_name_is_refused(recipe: SimpleNamespace) -> None:
    attention, x = sparse_model(recipe).model.layers[0].self_attn, torch.randn(1, 8, 48, dtype=torch.float64)
    with pytest.raises(ValueError, match="no cache was passed as past_key_values or cache"):
        attention(hidden_states=x, use_cache=True, renamed=transformers.DynamicCache())


def test_packed_positions_are_refused(recipe: SimpleNamespace) -> None:
    model, ids = sparse_model(recipe), tokens(1, 20)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    with pytest.raises(ValueError, match="position_ids must go up by one"):
        model(ids, position_ids=positions)


def test_masks_of_other_attention_implementations_are_refused(recipe: SimpleNamespace) -> None:
    ids = tokens(1, 20)
    model = swapped(recipe, causal_model(attn_implementation="eager"), **SPARSE)
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        model(ids)
