"""Generating with a soft prompt, and outputs that are as long as the text."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import backbones
import pytest
import torch
import transformers
import weights
from cases import randomise
from prompts import (
    COUNT,
    DECODERS,
    FAMILIES,
    GENERATING,
    PAIRS,
    build,
    close,
    first,
    joined,
    prompt_of,
    prompted,
    the_prompt,
)
from torch import Tensor

from opendelta import DeltaBase, PrefixModel, SoftPromptModel
from opendelta.delta_models import cache
from opendelta.exceptions import DeltaWarning, InsertionError
from opendelta.ground import seams

# --- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", GENERATING)
def test_generation_with_cache_equals_without_and_the_bare_models(family: str, beams: int) -> None:
    model, delta = prompted(family)
    randomise(delta, 2.0)
    options = {**prompt_of(family), "max_new_tokens": 8, "num_beams": beams}
    cached = model.generate(**options, use_cache=True)
    assert torch.equal(cached, model.generate(**options, use_cache=False))
    bare = build(family)
    assert not torch.equal(cached, bare.generate(**options))
    given = joined(bare, the_prompt(delta), options)
    by_hand = bare.generate(**given)
    if family not in PAIRS and family != "bart_lm":  # without ids, only what is new is returned
        by_hand = torch.cat([options["input_ids"], by_hand], 1)
    assert torch.equal(cached, by_hand)


@pytest.mark.parametrize("family", DECODERS)
def test_left_padding_changes_nothing(family: str) -> None:
    model, _ = prompted(family)
    options = {**prompt_of(family), "max_new_tokens": 4}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    together = model.generate(**options)
    options["input_ids"] = options["input_ids"][1:, 2:]
    options["attention_mask"] = options["attention_mask"][1:, 2:]
    alone = model.generate(**options)
    assert torch.equal(together.sequences[1, 7:], alone.sequences[0, 5:])
    close(together.logits[0][1], alone.logits[0][0], 1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_generation_from_embeddings(family: str) -> None:
    model, _ = prompted(family)
    options = {**prompt_of(family), "max_new_tokens": 6}
    expected = model.generate(**options)[:, 7:]
    embeds = model.get_input_embeddings()(options.pop("input_ids"))
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), expected)


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_step_by_step_logits_equal_those_of_the_whole(family: str) -> None:
    model, _ = prompted(family)
    ids = backbones.inputs(family)["input_ids"]
    whole = model(ids).logits
    steps, cache = [], None
    for start, stop in ((0, 3), (3, 4), (4, 7)):
        out = model(
            ids[:, start:stop],
            attention_mask=torch.ones(2, stop).long(),
            position_ids=torch.arange(start, stop)[None],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        steps.append(out.logits)
    close(torch.cat(steps, 1), whole, 1e-5)
    assert cache.get_seq_length() == COUNT + 7


@pytest.mark.parametrize("kind", ["Mamba", "Mamba2", "Jamba"])
def test_generation_of_recurrent_models(kind: str) -> None:
    """Their cache does not count positions: the prompt must join only once all the same."""
    sizes: dict[str, Any] = {
        "Mamba": {"state_size": 8},
        "Mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 4},
        "Jamba": {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 64,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    }[kind]
    config = getattr(transformers, kind + "Config")(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, pad_token_id=0, eos_token_id=2, **sizes
    )
    model = weights.fill(getattr(transformers, kind + "ForCausalLM")(config)).eval()
    delta = SoftPromptModel(model, soft_token_num=COUNT)
    randomise(delta, 2.0)
    ids = backbones.inputs("gpt2")["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(ids, use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    for one, other in zip(cached.logits, plain.logits, strict=True):
        close(one, other, 1e-4)


def test_a_static_cache_is_refused_by_name() -> None:
    model, delta = prompted("llama")
    options = {**prompt_of("llama"), "max_new_tokens": 4, "disable_compile": True}
    options["cache_implementation"] = "static"
    with pytest.raises(InsertionError, match=r"attention_mask is not of shape .* Static caches"):
        model.generate(**options)
    delta.detach()
    assert model.generate(**options).shape == (2, 11)


# --- trimmed output ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_trimmed_outputs_have_the_length_of_the_text(family: str) -> None:
    whole, _ = prompted(family)
    model, _ = prompted(family, trim_output=True)
    if family != "deberta":
        whole.set_attn_implementation("eager")
        model.set_attn_implementation("eager")
    given = backbones.inputs(family)
    ours = model(**given, output_hidden_states=True, output_attentions=True)
    theirs = whole(**given, output_hidden_states=True, output_attentions=True)
    assert list(ours) == list(theirs)
    cut = {"last_hidden_state", "logits", "hidden_states"}
    if family in PAIRS:
        cut = {"encoder_last_hidden_state", "encoder_hidden_states"}
    assert cut & set(ours)
    for name in ours:
        for one, other in zip(tensors(ours[name]), tensors(theirs[name]), strict=True):
            assert torch.equal(one, other[:, COUNT:] if name in cut else other), name
            assert name not in cut or one.shape[1] == 7
    if family not in PAIRS:
        out = model(**given, return_dict=False)
        assert torch.equal(out[0], first(ours))


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in tensors(part)] if isinstance(value, tuple) else []


@pytest.mark.parametrize("family", ["t5", "bart"])
@torch.no_grad()
def test_states_that_the_caller_has_are_not_trimmed(family: str) -> None:
    model, _ = prompted(family, trim_output=True)
    given = backbones.inputs(family)
    expected = first(model(**given))
    ids, mask = given.pop("input_ids"), given["attention_mask"]
    encoded = model.get_encoder()(ids, mask)
    assert encoded.last_hidden_state.shape[1] == COUNT + 7
    out = model(encoder_outputs=encoded, **given)
    assert out.encoder_last_hidden_state.shape[1] == COUNT + 7
    close(first(out), expected)


@torch.no_grad()
def test_trimming_goes_by_positions_alone() -> None:
    """As many heads as positions, as many classes as positions: neither is cut."""
    config = backbones.build("bert").config
    config.num_labels = COUNT + 7
    model = weights.fill(transformers.BertForSequenceClassification(config)).eval()
    SoftPromptModel(model, soft_token_num=COUNT, trim_output=True)
    assert model(**backbones.inputs("bert")).logits.shape == (2, COUNT + 7)
    ids = torch.tensor([[7, 8, 9]])
    model = build("bert")
    model.set_attn_implementation("eager")
    SoftPromptModel(model, soft_token_num=1, trim_output=True)  # four positions, four heads
    out = model(ids, output_attentions=True)
    assert out.last_hidden_state.shape[1] == 3
    assert out.attentions[0].shape == (1, 4, 4, 4)


@torch.no_grad()
def test_trimming_leaves_what_follows_on_a_cache() -> None:
    model, _ = prompted("gpt2", trim_output=True)
    ids = torch.arange(40).view(2, 20) + 3
    out = model(ids[:, :2], use_cache=True)
    mask = torch.ones(2, 2 + COUNT + 2).long()  # as many new tokens as prompt and text before
    out = model(ids[:, 2 : 4 + COUNT], past_key_values=out.past_key_values, attention_mask=mask)
    assert out.logits.shape[1] == COUNT + 2


@torch.no_grad()
def test_generation_with_trimmed_output() -> None:
    for family in GENERATING:
        whole, _ = prompted(family)
        model, _ = prompted(family, trim_output=True)
        options = {**prompt_of(family), "max_new_tokens": 6}
        assert torch.equal(model.generate(**options), whole.generate(**options))


# --- going on from a cache ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("more", [1, 4])
def test_going_on_from_a_cache(name: str, more: int) -> None:
    model, delta = prompted(name)
    randomise(delta, 2.0)
    ids = prompt_of(name)["input_ids"][:1]
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    first_half = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, **options)
    new = torch.tensor([[11, 12, 13, 14]])[:, :more]
    whole = torch.cat([first_half.sequences, new], 1)
    fresh = model.generate(whole, max_new_tokens=3, **options)[:, whole.shape[1] :]

    cache = copy.deepcopy(first_half.past_key_values)
    with pytest.raises(InsertionError, match="Pass the ids that are not in the cache alone"):
        model.generate(whole, max_new_tokens=3, past_key_values=cache, **options)
    last = whole[:, first_half.sequences.shape[1] - 1 :]  # the last one was not run yet
    mask = torch.ones_like(whole)
    going_on = model.generate(
        last, attention_mask=mask, max_new_tokens=3, past_key_values=cache, **options
    )
    assert torch.equal(going_on[:, last.shape[1] :], fresh)


# --- releases of transformers ---------------------------------------------------------------------


@pytest.mark.parametrize("method", [SoftPromptModel, PrefixModel])
def test_a_release_that_was_not_tried_is_told_once(
    method: type[DeltaBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    monkeypatch.setattr(cache, "_told", [])
    seams.untried_transformers.cache_clear()
    try:
        model = backbones.build("llama")
        method(model, 2)
        ids = torch.tensor([[5, 9, 3]])
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeltaWarning)
            model(ids)
        with pytest.warns(DeltaWarning, match=r"up to 5\.24, and this is 5\.99\.0") as told:
            for _ in range(2):
                model.generate(ids, max_new_tokens=2, do_sample=False)
        assert len([w for w in told if "up to" in str(w.message)]) == 1
    finally:
        monkeypatch.undo()
        seams.untried_transformers.cache_clear()
