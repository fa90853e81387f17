"""Soft prompts: each model with a prompt, against the bare model given the joined embeddings."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
import transformers
import weights
from cases import output, randomise
from pieces import hook_counts
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
    run,
    the_prompt,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import opendelta
from opendelta import AutoDeltaModel, SoftPromptModel
from opendelta.exceptions import ConfigError, InsertionError


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_prompt_joins_the_embeddings(family: str, masked: bool) -> None:
    model, delta = prompted(family)
    bare = build(family)
    given = backbones.inputs(family)
    if not masked:
        given.pop("attention_mask")
    expected = first(bare(**joined(bare, the_prompt(delta), given)))
    actual = first(model(**given))
    close(actual, expected)
    text = given.get("decoder_input_ids", given["input_ids"]).shape[1]
    assert actual.shape[1] == text + (0 if family in PAIRS else COUNT)
    assert (actual[:, -text:] - first(bare(**given))).abs().max() > 1e-3


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_callers_tensors_stay_as_they_are(family: str, by_position: bool) -> None:
    model, _ = prompted(family)
    given = backbones.inputs(family)
    if family in DECODERS:
        given["labels"] = given["input_ids"].clone()
        given["position_ids"] = torch.arange(7).expand(2, -1).clone()
    if family in ("bert", "roberta", "deberta"):
        given["token_type_ids"] = torch.zeros(2, 7, dtype=torch.long)
    before, names = {k: v.clone() for k, v in given.items()}, list(given)
    if by_position:
        rest = {k: v for k, v in given.items() if k not in ("input_ids", "attention_mask")}
        if family in ("gpt2",):  # its second argument is the cache
            model(given["input_ids"], None, given["attention_mask"], **rest)
        else:
            model(given["input_ids"], given["attention_mask"], **rest)
    else:
        model(**given)
    assert list(given) == names
    assert all(torch.equal(given[name], before[name]) for name in names)


def test_positional_and_named_arguments_give_the_same() -> None:
    model, _ = prompted("bert")
    ids, mask = backbones.inputs("bert").values()
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    expected = model(input_ids=ids, attention_mask=mask, token_type_ids=types)[0]
    assert torch.equal(model(ids, mask, types)[0], expected)
    assert torch.equal(model(ids, mask, token_type_ids=types)[0], expected)


@torch.no_grad()
def test_token_types_of_the_prompt() -> None:
    ids, mask = backbones.inputs("bert").values()
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": torch.tensor([[1, 1, 1, 0, 0, 1, 1]] * 2),
    }
    outputs = []
    for value in (0, 1):
        expand = {"attention_mask": 1, "token_type_ids": value}
        model, delta = prompted("bert", other_expand_ids=expand)
        bare = build("bert")
        expected = joined(bare, the_prompt(delta), given)
        expected["token_type_ids"][:, :COUNT] = value
        outputs.append(first(model(**given)))
        close(outputs[-1], first(bare(**expected)))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3


@torch.no_grad()
def test_other_arguments_can_be_told_to_grow() -> None:
    """A mask of one's own name, taken by a model around the backbone."""

    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = build("bert")

        def forward(self, input_ids: Tensor = None, inputs_embeds: Tensor = None, marks=None):
            self.seen = marks
            return self.net(input_ids=input_ids, inputs_embeds=inputs_embeds)[0]

        def get_input_embeddings(self) -> nn.Module:
            return self.net.get_input_embeddings()

    model = Marked()
    SoftPromptModel(model, soft_token_num=2, other_expand_ids={"marks": 7})
    assert model(torch.tensor([[5, 6]]), marks=torch.tensor([[1, 2]])).shape[1] == 4
    assert model.seen.tolist() == [[7, 7, 1, 2]]


@pytest.mark.parametrize("family", [*DECODERS, "bert"])
@torch.no_grad()
def test_position_ids_that_are_given(family: str) -> None:
    """The prompt comes right before the text, whose positions are moved by its length."""
    model, delta = prompted(family)
    bare = build(family)
    given = backbones.inputs(family)
    given["attention_mask"][1] = torch.tensor([0, 0, 1, 1, 1, 1, 1])
    given["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [9, 9, 0, 1, 2, 3, 4]])
    expected = joined(bare, the_prompt(delta), given)
    expected["position_ids"] = torch.tensor(
        [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [14, 14, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]]
    )
    close(first(model(**given)), first(bare(**expected)))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_embeddings_in_place_of_ids(family: str) -> None:
    model, _ = prompted(family)
    given = backbones.inputs(family)
    expected = first(model(**given))
    source = model.get_encoder() if family in PAIRS else model
    embeds = source.get_input_embeddings()(given.pop("input_ids"))
    before = embeds.clone()
    actual = first(model(inputs_embeds=embeds, **given))
    if family != "roberta":  # its positions of ids start after the padding token's
        close(actual, expected)
    assert torch.equal(embeds, before)
    assert actual.shape == expected.shape


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
@torch.no_grad()
def test_the_loss_of_a_language_model_by_hand(family: str) -> None:
    model, _ = prompted(family)
    given = backbones.inputs(family)
    labels = given["input_ids"].clone()
    labels[0, 2], labels[1, 5:] = -100, -100
    out = model(**given, labels=labels)
    assert out.logits.shape[1] == COUNT + 7
    terms = [  # the prompt's last position tells the first token, and each token the next
        -out.logits[b, COUNT + t - 1].log_softmax(-1)[labels[b, t]]
        for b in range(2)
        for t in range(7)
        if labels[b, t] != -100
    ]
    assert len(terms) == 11
    close(out.loss, torch.stack(terms).mean(), 1e-5)


@torch.no_grad()
def test_the_loss_of_a_tagger_by_hand() -> None:
    config = backbones.build("bert").config
    config.num_labels = 4
    model = weights.fill(transformers.BertForTokenClassification(config)).eval()
    SoftPromptModel(model, soft_token_num=COUNT)
    labels = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [3, 3, -100, 1, 0, -100, -100]])
    out = model(**backbones.inputs("bert"), labels=labels)
    assert out.logits.shape == (2, COUNT + 7, 4)
    text = out.logits[:, COUNT:]
    expected = cross_entropy(text.flatten(0, 1), labels.flatten(), ignore_index=-100)
    close(out.loss, expected, 1e-5)


@pytest.mark.parametrize("trimmed", [False, True])
@torch.no_grad()
def test_spans_are_counted_from_the_text(trimmed: bool) -> None:
    config = backbones.build("bert").config
    model = weights.fill(transformers.BertForQuestionAnswering(config)).eval()
    SoftPromptModel(model, soft_token_num=COUNT, trim_output=trimmed)
    starts, ends = torch.tensor([1, 3]), torch.tensor([4, 4])
    given = backbones.inputs("bert")
    out = model(**given, start_positions=starts, end_positions=ends)
    assert starts.tolist() == [1, 3] and ends.tolist() == [4, 4]
    whole = weights.fill(transformers.BertForQuestionAnswering(config)).eval()
    SoftPromptModel(whole, soft_token_num=COUNT)
    scores = whole(**given)
    expected = [
        cross_entropy(scores.start_logits, starts + COUNT),
        cross_entropy(scores.end_logits, ends + COUNT),
    ]
    close(out.loss, torch.stack(expected).mean(), 1e-5)
    assert out.start_logits.shape == out.end_logits.shape == (2, 7 + (0 if trimmed else COUNT))
    (start, end) = model(**given, return_dict=False)
    assert torch.equal(start, out.start_logits) and torch.equal(end, out.end_logits)


@torch.no_grad()
def test_labels_of_whole_texts_stay() -> None:
    """One class a text, or scores of as many classes as the text has tokens."""
    model, _ = prompted("bert_cls")
    out = model(**backbones.inputs("bert"), labels=torch.tensor([2, 0]))
    close(out.loss, cross_entropy(out.logits, torch.tensor([2, 0])))
    config = backbones.build("bert").config
    config.num_labels, config.problem_type = 7, "multi_label_classification"
    several = weights.fill(transformers.BertForSequenceClassification(config)).eval()
    SoftPromptModel(several, soft_token_num=COUNT)
    targets = torch.tensor([[1.0, 0, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0]])
    out = several(**backbones.inputs("bert"), labels=targets)
    expected = nn.functional.binary_cross_entropy_with_logits(out.logits, targets)
    close(out.loss, expected)


@pytest.mark.parametrize(
    "kind", ["LlamaForSequenceClassification", "GPT2ForSequenceClassification"]
)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_decoder_that_classifies_finds_the_last_token(
    kind: str, side: str, tmp_path: Path
) -> None:
    config = backbones.build(kind[:-25].lower()).config
    config.num_labels, config.pad_token_id = 3, 0
    model = weights.fill(getattr(transformers, kind)(config)).eval()
    delta = SoftPromptModel(model, soft_token_num=COUNT)
    randomise(delta, 0.5)
    ids = torch.tensor([[17, 93, 8], [0, 0, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    ids[1] = torch.tensor([33, 9, 0])
    if side == "left":
        ids[1], mask[1] = ids[1].roll(1), mask[1].roll(1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    positions = {"position_ids": places} if side == "left" else {}
    both = model(ids, attention_mask=mask, **positions).logits
    for row, text in enumerate(([17, 93, 8], [33, 9])):
        alone = model(torch.tensor([text])).logits
        close(both[row], alone[0], 1e-5)
        bare = getattr(model, model.base_model_prefix)
        delta.detach()
        embeds = model.get_input_embeddings()(torch.tensor([text]))
        states = bare(inputs_embeds=torch.cat([the_prompt(delta)[None], embeds], 1))[0]
        delta.attach()
        close(alone, model.score(states[:, -1]), 1e-5)


@torch.no_grad()
def test_each_choice_of_several_gets_the_prompt() -> None:
    """Such a model takes ids (batch, choices, tokens) and flattens them."""
    model = transformers.BertForMultipleChoice(backbones.build("bert").config)
    weights.fill(model).eval()
    delta = SoftPromptModel(model, soft_token_num=COUNT)
    randomise(delta, 0.5)
    one = backbones.inputs("bert")
    given = {name: torch.stack([t, t.flip(0)]) for name, t in one.items()}
    labels = torch.tensor([1, 0])
    out = model(**given, labels=labels)
    delta.detach()
    flat = {name: t.flatten(0, 1) for name, t in given.items()}
    states = model.bert(**joined(model.bert, the_prompt(delta), flat)).pooler_output
    close(out.logits, model.classifier(states).view(2, -1))
    close(out.loss, cross_entropy(out.logits, labels))


@torch.no_grad()
def test_a_file_of_0_3_2_fits_where_the_prompt_sits_deeper_now(tmp_path: Path) -> None:
    config = backbones.build("gpt2").config
    config.num_labels, config.pad_token_id = 3, 0
    model = weights.fill(transformers.GPT2ForSequenceClassification(config)).eval()
    delta = SoftPromptModel(model, soft_token_num=COUNT)
    new = torch.full((COUNT, 64), 0.25)
    save_file({"soft_prompt_layer.soft_embeds": new}, tmp_path / "old.safetensors")
    delta.load_checkpoint(tmp_path / "old.safetensors")
    assert torch.equal(the_prompt(delta), new)


# --- where the prompt goes ------------------------------------------------------------------------


@torch.no_grad()
def test_a_wrapped_model() -> None:
    model, delta = prompted("bert_wrapped")
    assert [n for n, _ in delta.named_parameters()] == ["net.soft_prompt_layer.soft_embeds"]
    acting = run(model, "bert")
    delta.detach()
    expected = model.net(**joined(model.net, the_prompt(delta), backbones.inputs("bert")))
    close(acting, expected.logits)
    assert (acting - run(model, "bert")).abs().max() > 1e-3


class Plain(nn.Module):
    """No transformer of anyone's: positions are embedded first, and ids by a table after them."""

    def __init__(self) -> None:
        super().__init__()
        self.position_embedding = nn.Embedding(32, 8)
        self.table = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20)

    def forward(
        self, ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Any:
        x = self.table(ids)
        x = x + self.position_embedding(torch.arange(x.shape[-2]))
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        logits = self.head(x.cumsum(-2))
        if labels is None:
            return logits
        return cross_entropy(logits.flatten(0, -2), labels.flatten()), logits


@pytest.mark.parametrize("trimmed", [False, True])
@torch.no_grad()
def test_a_network_of_ones_own(trimmed: bool) -> None:
    model = weights.fill(Plain())
    delta = SoftPromptModel(model, soft_token_num=3, trim_output=trimmed)
    assert torch.equal(the_prompt(delta), model.table.weight[:3])
    randomise(delta)
    ids = torch.tensor([[4, 9, 11, 2], [1, 1, 7, 0]])
    mask, labels = torch.tensor([[1, 1, 1, 0]] * 2), torch.tensor([[4, 9, -100, 2], [1, 1, 7, 3]])
    before = mask.clone(), labels.clone()
    loss, logits = model(ids, mask, labels=labels)
    assert torch.equal(mask, before[0]) and torch.equal(labels, before[1])
    x = torch.cat([the_prompt(delta).expand(2, -1, -1), model.table.weight[ids]], 1)
    x = x + model.position_embedding.weight[:7]
    longer = torch.cat([torch.ones(2, 3), mask], 1)
    expected = model.head((x * longer[..., None]).cumsum(1))
    close(logits, expected[:, 3:] if trimmed else expected)
    close(loss, cross_entropy(expected[:, 3:].flatten(0, 1), labels.flatten()))
    assert torch.equal(model(ids, attention_mask=mask), model(ids, mask))
    delta.detach()
    assert model(ids, mask).shape == (2, 4, 20)


@torch.no_grad()
def test_a_network_that_takes_one_text_without_a_batch() -> None:
    model = backbones.build("toy")
    delta = SoftPromptModel(model, soft_token_num=3)
    randomise(delta)
    ids = torch.tensor([1, 5, 2])
    expected = model.name_b(torch.cat([the_prompt(delta), model.embedding.weight[ids]]))
    close(model(ids), expected)


@torch.no_grad()
def test_one_of_several_models_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = build("bert"), build("gpt2")

        def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(ids)[0], self.other(ids).logits

    model = Two()
    ids = torch.tensor([[4, 5, 6]])
    SoftPromptModel(model, soft_token_num=2, modified_modules=["other"])
    assert [t.shape[1] for t in model(ids)] == [3, 5]
    with pytest.raises(InsertionError, match=r"names \['one', 'other'\].*one model"):
        SoftPromptModel(model, soft_token_num=2, modified_modules=["one", "other"])


def test_where_there_are_no_token_embeddings() -> None:
    for model in (build("vit"), backbones.build("mlp")):
        with pytest.raises(InsertionError, match="No token embedding"):
            SoftPromptModel(model)
        assert opendelta.deltas(model) == []


# A prompt made from the first tokens does what these tokens do: an answer for models whose
# embeddings cannot be handed in.
FIRST = torch.arange(COUNT)


def after_the_first(ids: Tensor) -> Tensor:
    return torch.cat([FIRST.expand(len(ids), -1), ids], 1)


CLIP_TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "eos_token_id": 127,
    "bos_token_id": 126,
    "projection_dim": 16,
}
CAPTIONS = torch.tensor([[126, 9, 33, 7, 127], [126, 8, 127, 1, 1]])
CAPTION_MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


@pytest.mark.parametrize("trimmed", [False, True])
@torch.no_grad()
def test_a_model_that_takes_ids_alone(trimmed: bool) -> None:
    """CLIP's text model takes no embeddings, and looks for the end of the text among the ids."""
    config = transformers.CLIPTextConfig(**CLIP_TEXT)
    model = weights.fill(transformers.CLIPTextModel(config)).eval()
    expected = model(after_the_first(CAPTIONS), attention_mask=longer_mask(CAPTION_MASK))
    delta = SoftPromptModel(model, soft_token_num=COUNT, trim_output=trimmed)
    ids, mask = CAPTIONS.clone(), CAPTION_MASK.clone()
    for out in (model(ids, attention_mask=mask), model(input_ids=ids, attention_mask=mask)):
        states = expected.last_hidden_state
        close(out.last_hidden_state, states[:, COUNT:] if trimmed else states)
        close(out.pooler_output, expected.pooler_output)
    assert torch.equal(ids, CAPTIONS) and torch.equal(mask, CAPTION_MASK)
    randomise(delta, 2.0)
    assert (model(ids, mask).pooler_output - expected.pooler_output).abs().max() > 1e-2
    direct = model.get_input_embeddings()(ids)  # not through the model: there is no prompt
    assert torch.equal(direct, model.get_input_embeddings().weight[ids])


def longer_mask(mask: Tensor) -> Tensor:
    return torch.cat([torch.ones(len(mask), COUNT, dtype=mask.dtype), mask], 1)


@torch.no_grad()
def test_the_text_model_of_two() -> None:
    """CLIP itself embeds nothing: the prompt goes into its text model."""
    text = {**CLIP_TEXT, "projection_dim": 16}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = weights.fill(transformers.CLIPModel(config)).eval()
    pixels = backbones.inputs("vit")
    mask = longer_mask(CAPTION_MASK)
    expected = model(after_the_first(CAPTIONS), attention_mask=mask, **pixels)
    delta = SoftPromptModel(model, soft_token_num=COUNT)
    (name,) = [n for n, _ in delta.named_parameters()]
    assert name.startswith("text_model.")
    out = model(CAPTIONS, attention_mask=CAPTION_MASK, **pixels)
    close(out.logits_per_text, expected.logits_per_text, 1e-5)
    delta.freeze_module()
    with torch.enable_grad():
        model(CAPTIONS, attention_mask=CAPTION_MASK, **pixels).logits_per_text.sum().backward()
    assert the_prompt(delta).grad.abs().amax(1).min() > 0


@torch.no_grad()
def test_a_decoder_whose_encoder_hears() -> None:
    """Whisper's encoder takes audio: the prompt goes before the decoder's ids."""
    config = transformers.WhisperConfig(
        vocab_size=128,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    model = weights.fill(transformers.WhisperForConditionalGeneration(config)).eval()
    sound = weights.uniform("sound", (2, 8, 20), 1.0)
    ids = torch.tensor([[9, 4, 77], [9, 5, 6]])
    expected = model(sound, decoder_input_ids=after_the_first(ids)).logits[:, COUNT:]
    delta = SoftPromptModel(model, soft_token_num=COUNT)
    out = model(sound, decoder_input_ids=ids, labels=ids)
    close(out.logits, expected)
    close(out.loss, cross_entropy(expected.flatten(0, 1), ids.flatten()), 1e-5)
    randomise(delta, 2.0)
    options = {"max_new_tokens": 6, "do_sample": False, "decoder_input_ids": ids}
    cached, plain = (model.generate(sound, use_cache=c, **options) for c in (True, False))
    assert torch.equal(cached, plain)


@torch.no_grad()
def test_an_argument_with_more_to_each_token() -> None:
    config = transformers.LayoutLMConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_2d_position_embeddings=32,
    )
    model = weights.fill(transformers.LayoutLMModel(config)).eval()
    ids, mask = backbones.inputs("bert").values()
    boxes = torch.arange(28).view(1, 7, 4).expand(2, -1, -1)
    front = torch.full((2, COUNT, 4), 3)
    expected = model(after_the_first(ids), torch.cat([front, boxes], 1), longer_mask(mask))
    expand = {"attention_mask": 1, "bbox": 3}
    SoftPromptModel(model, soft_token_num=COUNT, other_expand_ids=expand)
    close(model(ids, boxes, mask)[0], expected[0])


# --- the prompt itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_made_from_the_first_tokens(family: str) -> None:
    model = build(family)
    delta = SoftPromptModel(model)
    assert delta.soft_token_num == 100 and delta.init_range == 0.5 and delta.token_init
    assert delta.other_expand_ids == {"attention_mask": 1, "token_type_ids": 0}
    assert torch.equal(the_prompt(delta), model.get_input_embeddings().weight[:100])
    with torch.no_grad():
        the_prompt(delta).zero_()  # a copy, not a view
    assert model.get_input_embeddings().weight[:100].abs().min() > 0


def test_a_prompt_of_scaled_embeddings_is_scaled() -> None:
    config = transformers.Gemma3TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = weights.fill(transformers.Gemma3ForCausalLM(config)).eval()
    delta = SoftPromptModel(model, soft_token_num=COUNT)
    close(the_prompt(delta), model.get_input_embeddings().weight[:COUNT] * 8)  # root of 64
    ids = torch.tensor([[9, 8]])
    whole = model(ids).logits
    delta.detach()
    close(whole, model(torch.tensor([[0, 1, 2, 3, 4, 9, 8]])).logits, 1e-5)


@pytest.mark.parametrize("width", [0.5, 0.1])
def test_a_random_prompt_is_uniform(width: float) -> None:
    prompt = the_prompt(SoftPromptModel(build("bert"), token_init=False, init_range=width)).detach()
    assert prompt.shape == (100, 64)
    assert 0.99 * width < prompt.max() <= width and -width <= prompt.min() < -0.99 * width
    assert abs(prompt.mean()) < 0.03 * width
    assert abs(prompt.std() - width / 3**0.5) < 0.03 * width


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"soft_token_num": 0}, "soft_token_num=0"),
        ({"soft_token_num": 129}, "vocabulary of 128"),
    ],
)
def test_lengths_that_cannot_be(kwargs: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        SoftPromptModel(build("bert"), **kwargs)


def test_a_long_prompt_is_random() -> None:
    prompt = the_prompt(SoftPromptModel(build("bert"), soft_token_num=129, token_init=False))
    assert prompt.shape == (129, 64)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_moving_keeps_the_parameter(family: str) -> None:
    model, delta = prompted(family)
    delta.freeze_module()
    parameter = the_prompt(delta)
    for target in (torch.bfloat16, torch.float64, torch.float32, "meta"):
        (model if target == torch.bfloat16 else delta).to(target)
        (mine,) = delta.parameters()
        (on_model,) = (p for n, p in model.named_parameters() if "soft_prompt" in n)
        assert mine is on_model and isinstance(mine, nn.Parameter) and mine.requires_grad
        assert mine.is_meta if target == "meta" else mine.dtype == target
        assert mine is parameter or target == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision(family: str, dtype: torch.dtype) -> None:
    exact, _ = prompted(family)
    model = build(family).to(dtype)
    delta = SoftPromptModel(model, soft_token_num=COUNT)
    randomise(delta, 0.5)
    assert the_prompt(delta).dtype == dtype
    result, reference = output(model, family), run(exact, family)
    error = (result.float() - reference).abs().max() / reference.abs().max()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02)


def test_a_prompt_of_another_dtype_follows_the_text() -> None:
    model, delta = prompted("llama")
    expected = run(model, "llama")
    delta.to(torch.float64)
    close(run(model, "llama"), expected, 1e-5)


# --- life -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_a_step_moves_the_prompt_and_nothing_else(family: str, reentrant: bool | None) -> None:
    model, delta = prompted(family)
    delta.freeze_module()
    output(model, family).square().mean().backward()
    expected = the_prompt(delta).grad
    model, delta = prompted(family)
    delta.freeze_module()
    if reentrant is not None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    output(model, family).square().mean().backward()
    close(the_prompt(delta).grad, expected, 1e-5)
    assert expected.abs().amax(1).min() > 0
    optimizer.step()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    assert len(moved) == 1 and moved[0].endswith("soft_prompt_layer.soft_embeds")


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_attach_and_remove(family: str) -> None:
    bare = build(family)
    hooks = {n: hook_counts(m) for n, m in bare.named_modules()}
    model, delta = prompted(family, trim_output=family != "gpt2")
    delta.freeze_module()
    assert len(model.state_dict()) == 1
    acting = run(model, family)
    delta.detach()
    assert torch.equal(run(model, family), run(bare, family))
    assert set(model.state_dict()) == set(bare.state_dict())
    delta.attach()
    assert torch.equal(run(model, family), acting)
    delta.remove()
    assert torch.equal(run(model, family), run(bare, family))
    assert {n: hook_counts(m) for n, m in model.named_modules()} == hooks
    assert str(model) == str(bare)


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_a_copy_has_a_prompt_of_its_own(family: str, way: str, tmp_path: Path) -> None:
    model, _ = prompted(family)
    acting = run(model, family)
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        torch.save(model, tmp_path / "model.pt")
        twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(run(twin, family), acting)
    (theirs,) = opendelta.deltas(twin)
    with torch.no_grad():
        the_prompt(theirs).mul_(-1)
    assert not torch.equal(run(twin, family), acting)
    assert torch.equal(run(model, family), acting)
    theirs.detach()
    assert torch.equal(run(twin, family), run(build(family), family))
    assert torch.equal(run(model, family), acting)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_prompts_are_one_longer(family: str) -> None:
    model, one = prompted(family)
    other = SoftPromptModel(model, soft_token_num=3)
    randomise(other, 0.9)
    both = run(model, family)
    joint = build(family)
    whole = SoftPromptModel(joint, soft_token_num=COUNT + 3)
    with torch.no_grad():
        the_prompt(whole).copy_(torch.cat([the_prompt(one), the_prompt(other)]))
    close(both, run(joint, family))
    one.detach()
    joint = build(family)
    whole = SoftPromptModel(joint, soft_token_num=3)
    randomise(whole, 0.9)
    close(run(model, family), run(joint, family))


@pytest.mark.parametrize("family", GENERATING)
def test_two_prompts_generate_with_cache_as_without(family: str) -> None:
    model, one = prompted(family)
    other = SoftPromptModel(model, soft_token_num=3, trim_output=True)
    randomise(one, 2.0)
    randomise(other, 2.0)
    options = {**prompt_of(family), "max_new_tokens": 6}
    cached = model.generate(**options)
    assert torch.equal(cached, model.generate(**options, use_cache=False))


@pytest.mark.parametrize("family", ["bert", "t5", "llama", "bert_wrapped"])
def test_save_and_load(family: str, tmp_path: Path) -> None:
    expand = {"attention_mask": 1}
    model, delta = prompted(family, trim_output=True, other_expand_ids=expand, init_range=0.3)
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert len(saved) == 1
    fresh = build(family)
    loaded = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    assert isinstance(loaded, SoftPromptModel)
    assert loaded.trim_output and loaded.other_expand_ids == expand and loaded.init_range == 0.3
    assert torch.equal(run(fresh, family), run(model, family))
    assert torch.equal(the_prompt(loaded), the_prompt(delta))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_is_put_on_is_reached(family: str) -> None:
    """Nothing of the delta is reported as unreached by a plain forward."""
    model, _ = prompted(family, trim_output=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, family)


@pytest.mark.slow
@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama", "deberta", "t5"])
def test_compiled_equals_eager(family: str, trimmed: bool) -> None:
    torch.compiler.reset()
    model, delta = prompted(family, trim_output=trimmed)
    acting = run(model, family)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(output(compiled, family), acting, 1e-5)
    delta.detach()
    close(output(compiled, family), run(build(family), family), 1e-5)
    delta.attach()
    close(output(compiled, family), acting, 1e-5)
    torch.compiler.reset()


class Words:
    """A tokenizer of numbers."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [int(word) for word in text.split()]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("7 8 9", [7, 8, 9, 7, 8]),
        ([7, 8, 9], [7, 8, 9, 7, 8]),
        ("7 8 9 10 11 12", [7, 8, 9, 10, 11]),
        ([3], [3] * 5),
    ],
)
@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_a_prompt_made_from_a_text(family: str, text: Any, ids: list[int], tmp_path: Path) -> None:
    model = build(family)
    delta = SoftPromptModel(model, COUNT, init_text=text, tokenizer=Words())
    source = model.get_encoder() if family in PAIRS else model
    embeds = source.get_input_embeddings()(torch.tensor(ids))
    assert torch.equal(the_prompt(delta), embeds)
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["init_text"] == [*map(int, text.split())] if isinstance(text, str) else text
    assert "tokenizer" not in said
    pickle.loads(pickle.dumps(delta.config))
    other = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=build(family))
    assert torch.equal(the_prompt(other), the_prompt(delta))


def test_a_prompt_made_from_sampled_tokens() -> None:
    model = build("bert")
    prompts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        delta = SoftPromptModel(model, COUNT, token_init="sampled")
        prompts.append(the_prompt(delta).detach().clone())
        delta.remove()
    table = model.get_input_embeddings().weight
    assert all((table == row).all(-1).any() for prompt in prompts for row in prompt)
    assert torch.equal(prompts[0], prompts[1]) and not torch.equal(prompts[0], prompts[2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_text": "7 8"}, "tokenizer="),
        ({"init_text": []}, "one or more"),
        ({"init_text": [128]}, r"\[128\].*below .* 128"),
        ({"token_init": "random"}, "expected True"),
        ({"tokenizer": Words()}, "nothing else uses it"),
        ({"init_text": "7 8", "tokenizer": "some/path"}, "the tokenizer itself"),
    ],
)
def test_starts_that_are_none(options: dict[str, Any], words: str) -> None:
    model = build("bert")
    with pytest.raises(ConfigError, match=words):
        SoftPromptModel(model, COUNT, **options)
    assert not opendelta.deltas(model)


def test_a_config_with_a_text_is_constructed_with_its_tokenizer() -> None:
    config = opendelta.SoftPromptConfig(soft_token_num=2, init_text="7 8")
    delta = opendelta.AutoDeltaModel.from_config(config, build("bert"), tokenizer=Words())
    assert delta.init_text == [7, 8]
