"""The recipe of docs/huggingface.md, run as it stands: what is kept, what trains, and what generates."""

from __future__ import annotations

import contextlib
import copy
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
LLAMA = transformers.LlamaConfig
# What models call their cache: past_key_values before transformers 5.24.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"


@pytest.fixture(scope="module")
def recipe() -> SimpleNamespace:
    """The names that it defines. Running it trains a model and checks that it prints what its comments say."""
    [code] = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    namespace: dict[str, object] = {"__name__": "recipe"}
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
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


@pytest.mark.parametrize(
    "config, settings",
    [
        (LLAMA, dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))),
        (LLAMA, dict(attention_bias=True)),
        (LLAMA, dict(head_dim=16)),
        (transformers.MistralConfig, {}),
        (transformers.Qwen2Config, {}),
    ],
    ids=["llama", "bias", "head_dim", "mistral", "qwen2"],
)
def test_where_nsa_is_full_attention_the_logits_are_those_of_the_original(
    recipe: SimpleNamespace, config: type, settings: dict[str, object]
) -> None:
    model = causal_model(config, **settings)
    with torch.no_grad():  # biases start as zeros
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
        expected, actual = (each(tokens(2, 70)).logits for each in (model, swapped(recipe, model, **DENSE)))
        sparse = swapped(recipe, model, **SPARSE)(tokens(2, 70)).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert (sparse - expected).abs().max() > 0.1, "the model does not depend on its attention"


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


@pytest.mark.parametrize(
    "config, settings",
    [
        (LLAMA, dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=10000.0))),
        (transformers.Qwen3Config, dict(head_dim=8)),
    ],
    ids=["scaled RoPE", "normed queries"],
)
def test_a_model_that_would_not_be_kept_is_refused(
    recipe: SimpleNamespace, config: type, settings: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match="scales its RoPE, or its attention has more"):
        recipe.use_nsa(causal_model(config, **settings))


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
