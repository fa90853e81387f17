"""Where a soft prompt comes: beside padding, before packed texts, past a model's own hooks."""

from __future__ import annotations

import gc
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
import transformers
import weights
from cases import randomise
from prompts import COUNT, SIZES, close, first, the_prompt
from torch import Tensor, nn

from opendelta import AutoDeltaModel, LoraModel, SoftPromptModel, route
from opendelta.exceptions import InsertionError

MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "roberta": lambda: transformers.RobertaModel(transformers.RobertaConfig(**SIZES)),
    "mpnet": lambda: transformers.MPNetModel(transformers.MPNetConfig(**SIZES)),
    "electra": lambda: transformers.ElectraModel(transformers.ElectraConfig(**SIZES)),
    "llama": lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZES)),
    "qwen2": lambda: transformers.Qwen2Model(
        transformers.Qwen2Config(**SIZES, num_key_value_heads=2)
    ),
    "gpt2": lambda: transformers.GPT2Model(
        transformers.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2
        )
    ),
    "bloom": lambda: transformers.BloomModel(
        transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    ),
    "opt": lambda: transformers.OPTModel(
        transformers.OPTConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
            word_embed_proj_dim=32,
            init_std=0.2,
        )
    ),
}
TEXT = torch.tensor([[5, 6, 7, 8, 9]])


def model_with_prompt(name: str, **options: Any) -> tuple[nn.Module, SoftPromptModel]:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    delta = SoftPromptModel(model, soft_token_num=COUNT, **options)
    randomise(delta, 1.0)
    return model, delta


# --- padding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("told", [False, True], ids=["no positions", "positions"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_row_does_not_depend_on_its_padding(name: str, told: bool, side: str) -> None:
    model, _ = model_with_prompt(name)
    if told and "position_ids" not in model.forward.__code__.co_varnames:
        told = False
    alone = model(TEXT, attention_mask=torch.ones_like(TEXT)).last_hidden_state[:, COUNT:]
    padding = torch.full((1, 3), 1)
    ids = torch.cat([padding, TEXT] if side == "left" else [TEXT, padding], 1)
    mask = (ids != 1).long()
    start = {"roberta": 2, "mpnet": 2}.get(name, 0)  # these count from behind the padding's id
    more = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0) + start} if told else {}
    states = model(ids, attention_mask=mask, **more).last_hidden_state[:, COUNT:]
    here = states[:, 3:] if side == "left" else states[:, :5]
    if told and start:  # there the prompt has the numbers before, so given ones have no room for it
        return
    close(here, alone, within=1e-5)


# --- packed rows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@torch.no_grad()
def test_each_of_several_texts_in_a_row_has_the_prompt(name: str) -> None:
    model, _ = model_with_prompt(name, trim_output=True)
    others = torch.tensor([[11, 12, 13]])
    packed = torch.cat([TEXT, others], 1)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    states = model(packed, position_ids=positions, use_cache=False).last_hidden_state
    assert states.shape[1] == 8
    close(states[:, :5], model(TEXT).last_hidden_state, within=1e-5)
    close(states[:, 5:], model(others).last_hidden_state, within=1e-5)


def test_labels_of_packed_rows() -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    delta = SoftPromptModel(model, soft_token_num=COUNT)
    randomise(delta, 1.0)
    ids = torch.cat([TEXT, TEXT], 1)
    positions = torch.tensor([[0, 1, 2, 3, 4] * 2])
    whole = model(ids, position_ids=positions, labels=ids, use_cache=False)
    alone = model(TEXT, labels=TEXT)
    assert whole.logits.shape[1] == 2 * (5 + COUNT)
    close(whole.loss, alone.loss, within=1e-5)
    whole.loss.backward()
    assert the_prompt(delta).grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 2, 5])}, "cu_seq_lens_q"),
        ({"position_ids": torch.arange(4)[None]}, r"\(1, 4\), and the text has 5"),
        ({"attention_mask": torch.ones(1, 4)}, "is for 4 tokens, and the text has 5"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, r"attention_mask is not of shape"),
        ({"inputs_embeds": torch.ones(1, 5, 32)}, "both given"),
    ],
    ids=["packed", "positions", "mask", "rank", "both"],
)
def test_what_does_not_fit_is_refused_before_the_forward(given: Any, words: str) -> None:
    model, _ = model_with_prompt("llama")
    model.layers.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(InsertionError, match=words):
        model(TEXT, **given)


def test_rows_of_different_numbers_of_texts_are_refused() -> None:
    model, _ = model_with_prompt("llama")
    with pytest.raises(InsertionError, match=r"\[1, 2\] texts"):
        model(TEXT.expand(2, -1), position_ids=torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]]))


@pytest.mark.parametrize(("name", "most"), [("bert", 66), ("roberta", 64), ("opt", 2048)])
def test_no_room_among_learned_positions(name: str, most: int) -> None:
    model, _ = model_with_prompt(name)
    model(torch.full((1, most - COUNT), 5))
    with pytest.raises(InsertionError, match=f"make {most + 1} positions, .* learned {most}"):
        model(torch.full((1, most - COUNT + 1), 5))


@pytest.mark.parametrize("start", [2, 40])
@pytest.mark.parametrize("name", ["roberta", "llama", "bert", "gpt2"])
@torch.no_grad()
def test_positions_that_start_elsewhere(name: str, start: int) -> None:
    """As real tokens before the text, which has its positions after theirs."""
    model, delta = model_with_prompt(name)
    positions = torch.arange(5)[None] + start
    actual = model(TEXT, position_ids=positions).last_hidden_state
    delta.detach()
    embeds = torch.cat([the_prompt(delta).detach()[None], model.get_input_embeddings()(TEXT)], 1)
    told = torch.arange(5 + COUNT)[None] + start
    close(actual, model(inputs_embeds=embeds, position_ids=told).last_hidden_state, within=1e-5)


@torch.no_grad()
def test_packed_texts_that_start_elsewhere() -> None:
    model, _ = model_with_prompt("llama", trim_output=True)
    positions = torch.tensor([[1, 2, 3, 4, 5, 1, 2, 3, 4, 5]])
    ids = torch.cat([TEXT, TEXT], 1)
    states = model(ids, position_ids=positions, use_cache=False).last_hidden_state
    alone = model(TEXT).last_hidden_state
    close(states, torch.cat([alone, alone], 1), within=1e-5)


@pytest.mark.parametrize("kept", [torch.tensor([0, 3]), torch.tensor([-1, -2])])
@torch.no_grad()
def test_positions_of_which_logits_are_wanted(kept: Tensor) -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    SoftPromptModel(model, soft_token_num=COUNT)
    whole = model(TEXT).logits[:, COUNT:]
    close(model(TEXT, logits_to_keep=kept).logits, whole[:, kept], within=1e-5)


def test_arguments_that_count_positions_are_refused() -> None:
    config = transformers.LukeConfig(**{**SIZES, "entity_vocab_size": 8, "entity_emb_size": 32})
    model = transformers.LukeModel(config).eval()
    SoftPromptModel(model, soft_token_num=COUNT)
    entities = {"entity_ids": torch.tensor([[3]]), "entity_attention_mask": torch.ones(1, 1)}
    with pytest.raises(InsertionError, match="entity_position_ids counts positions"):
        model(TEXT, **entities, entity_position_ids=torch.tensor([[[0, 1]]]))


@torch.no_grad()
def test_a_span_that_is_none_is_the_first_token_as_ever() -> None:
    torch.manual_seed(0)
    model = transformers.BertForQuestionAnswering(transformers.BertConfig(**SIZES)).eval()
    SoftPromptModel(model, soft_token_num=COUNT)
    first, none = torch.tensor([0]), torch.tensor([-1])
    losses = [model(TEXT, start_positions=s, end_positions=s).loss for s in (first, none)]
    assert torch.equal(*losses)


# --- past the hooks of the model ------------------------------------------------------------------


HEADS = {
    "bert": transformers.BertForSequenceClassification,
    "roberta": transformers.RobertaForSequenceClassification,
    "mpnet": transformers.MPNetForSequenceClassification,
    "electra": transformers.ElectraForTokenClassification,
    "llama": transformers.LlamaForCausalLM,
    "qwen2": transformers.Qwen2ForSequenceClassification,
}


@pytest.mark.parametrize("name", HEADS)
def test_forward_called_by_itself_has_the_prompt(name: str) -> None:
    torch.manual_seed(0)
    config = MODELS[name]().config
    model = HEADS[name](config).eval()
    delta = SoftPromptModel(model, soft_token_num=COUNT)
    randomise(delta, 1.0)
    ids = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
    called = model(ids).logits
    direct = model.forward(ids).logits
    bare = delta_free(model, delta, ids)
    close(direct, called)
    assert (direct[:, -5:] - bare).abs().max() > 1e-3
    direct.sum().backward()
    assert the_prompt(delta).grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["bert", "electra", "llama"])
def test_labels_of_tokens_given_to_forward_itself_are_refused(name: str) -> None:
    kinds = {**HEADS, "bert": transformers.BertForTokenClassification}
    torch.manual_seed(0)
    model = kinds[name](MODELS[name]().config)
    SoftPromptModel(model, soft_token_num=COUNT)
    labels = torch.zeros_like(TEXT)
    with pytest.raises(InsertionError, match=r"labels.*model\(\.\.\., labels"):
        model.forward(TEXT, labels=labels)
    assert model(TEXT, labels=labels).loss.isfinite()


def delta_free(model: nn.Module, delta: SoftPromptModel, ids: Tensor) -> Tensor:
    with delta.detached(), torch.no_grad():
        logits: Tensor = model(ids).logits
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_where_nothing_inside_could_carry_it_that_is_refused(name: str) -> None:
    model, delta = model_with_prompt(name)
    with pytest.raises(InsertionError, match=r"forward was called past its hooks.*model\(\.\.\.\)"):
        model.forward(TEXT)
    model(TEXT)
    model.get_input_embeddings()(TEXT)  # which is nobody's forward
    delta.detach()
    model.forward(TEXT)


def test_an_error_inside_ends_the_call() -> None:
    model, _ = model_with_prompt("bert")
    handle = model.encoder.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(TEXT)
    handle.remove()
    with pytest.raises(InsertionError, match="past its hooks"):
        model.forward(TEXT)


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_that_is_over_holds_nothing(fails: bool) -> None:
    model, _ = model_with_prompt("bert")
    if fails:
        model.encoder.register_forward_pre_hook(lambda *_: 1 / 0)

    def call() -> Any:
        ids = TEXT.clone()
        if fails:
            with pytest.raises(ZeroDivisionError):
                model(ids)
        else:
            model(ids)
        return weakref.ref(ids)

    was_given = call()
    gc.collect()
    assert was_given() is None


# --- compiled code and threads --------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_compiled_forward_has_the_prompt(name: str) -> None:
    torch.manual_seed(0)
    model = HEADS[name](MODELS[name]().config).eval()
    delta = SoftPromptModel(model, soft_token_num=COUNT)
    randomise(delta, 1.0)
    with torch.no_grad():
        expected = model(TEXT).logits
        close(torch.compile(model.forward, backend="eager")(TEXT).logits, expected, within=1e-5)
        close(torch.compile(model, backend="eager")(TEXT).logits, expected, within=1e-5)


@torch.no_grad()
def test_a_compiled_base_model_has_the_prompt() -> None:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    delta = SoftPromptModel(model, soft_token_num=COUNT)
    randomise(delta, 1.0)
    expected = model(TEXT).logits
    states = torch.compile(model.model, backend="eager")(TEXT).last_hidden_state
    close(model.lm_head(states), expected, within=1e-5)
    model.model.compile(backend="eager")
    for _ in range(2):  # inside the model, whose own hooks run as they are
        close(model(TEXT).logits, expected, within=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
def test_compiled_code_that_nothing_could_carry_it_into_is_refused(name: str) -> None:
    model, _ = model_with_prompt(name)
    with pytest.raises(InsertionError, match="past its hooks"):
        torch.compile(model.forward, backend="eager")(TEXT)
    model(TEXT)


def test_packed_rows_are_refused_in_compiled_code() -> None:
    model, _ = model_with_prompt("llama")
    compiled = torch.compile(model, backend="eager")
    compiled(TEXT, position_ids=torch.tensor([[0, 1, 2, 3, 4]]), use_cache=False)
    with pytest.raises(RuntimeError, match="several texts"):
        compiled(TEXT, position_ids=torch.tensor([[0, 1, 2, 0, 1]]), use_cache=False)


@pytest.mark.parametrize("name", ["gpt2", "roberta"])
def test_threads_do_not_meet(name: str) -> None:
    model, _ = model_with_prompt(name, trim_output=True)
    texts = [torch.full((1, length), 5 + length) for length in (3, 7)]
    masks = [torch.tensor([[0, 1, 1]]), torch.tensor([[0, 0, 0, 1, 1, 1, 1]])]
    ids = [torch.where(m > 0, t, torch.ones_like(t)) for t, m in zip(texts, masks, strict=True)]
    with torch.no_grad():
        pairs = list(zip(ids, masks, strict=True))
        alone = [model(i, attention_mask=m).last_hidden_state for i, m in pairs]
    gate, wrong = threading.Barrier(2), list[str]()

    def work(number: int) -> None:
        gate.wait()
        with torch.no_grad():
            for _ in range(60):
                i, m = pairs[number]
                states = model(i, attention_mask=m).last_hidden_state
                if not torch.equal(states, alone[number]):
                    wrong.append(f"{tuple(states.shape)}")

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]


# --- two prompts, one of them in the place of ids -------------------------------------------------


@torch.no_grad()
def test_two_prompts_in_the_place_of_ids() -> None:
    model, one = model_with_prompt("roberta")
    alone = model(TEXT).last_hidden_state
    other = SoftPromptModel(model, soft_token_num=2)
    randomise(other, 2.0)
    both = model(TEXT).last_hidden_state
    assert both.shape[1] == 5 + COUNT + 2
    embeds = torch.cat(
        [
            the_prompt(one).detach()[None],
            the_prompt(other).detach()[None],
            model.embeddings.word_embeddings(TEXT),
        ],
        1,
    )
    for delta in (one, other):
        delta.detach()
    close(both, model(inputs_embeds=embeds).last_hidden_state, within=1e-5)
    one.attach()
    close(model(TEXT).last_hidden_state, alone)


@torch.no_grad()
def test_rows_with_prompts_in_the_place_of_ids() -> None:
    model, one = model_with_prompt("roberta")
    alone = model(TEXT).last_hidden_state
    one.detach()
    other = SoftPromptModel(model, soft_token_num=COUNT)
    randomise(other, 2.0)
    second = model(TEXT).last_hidden_state
    with route(model, [one, other]):
        both = model(TEXT.expand(2, -1)).last_hidden_state
    close(both, torch.cat([alone, second]), within=1e-5)


@pytest.mark.parametrize("first_of_both", ["prompt", "LoRA"])
@pytest.mark.parametrize("name", ["roberta", "llama"])
@torch.no_grad()
def test_a_delta_on_the_token_embedding_leaves_the_prompt_alone(
    name: str, first_of_both: str
) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    embedding = model.get_input_embeddings()
    where = next(n for n, module in model.named_modules() if module is embedding)
    deltas: dict[str, Any] = {}
    for method in [first_of_both, *({"prompt", "LoRA"} - {first_of_both})]:
        deltas[method] = (
            SoftPromptModel(model, soft_token_num=COUNT)
            if method == "prompt"
            else LoraModel(model, modified_modules=[where], lora_r=2)
        )
        randomise(deltas[method], 1.0)
    both = model(TEXT).last_hidden_state
    deltas["prompt"].detach()
    embeds = torch.cat([the_prompt(deltas["prompt"]).detach()[None], embedding(TEXT)], 1)
    close(both, model(inputs_embeds=embeds).last_hidden_state, within=1e-5)


# --- sentence-transformers ------------------------------------------------------------------------


def sentence_transformer(folder: Path) -> Any:
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="an engine's extra")
    from sentence_transformers.models import Pooling, Transformer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(vocab_file=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    sizes = {**SIZES, "pad_token_id": 0}
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder)
    inner = Transformer(str(folder))
    return sentence_transformers.SentenceTransformer(modules=[inner, Pooling(32)], device="cpu")


TEXTS = ["a b c", "d e"]


def test_a_sentence_transformer_encodes_with_the_prompt(tmp_path: Path) -> None:
    whole = sentence_transformer(tmp_path)
    bare = whole.encode(TEXTS, convert_to_tensor=True)
    delta = SoftPromptModel(whole, soft_token_num=COUNT)
    randomise(delta, 1.0)
    encoded = whole.encode(TEXTS, convert_to_tensor=True)

    with tempfile.TemporaryDirectory() as folder:
        delta.freeze_module()
        delta.save_finetuned(folder)
        other = sentence_transformer(tmp_path)
        AutoDeltaModel.from_finetuned(folder, backbone_model=other)
    close(other.encode(TEXTS, convert_to_tensor=True), encoded)

    delta.detach()
    close(whole.encode(TEXTS, convert_to_tensor=True), bare)
    model = whole[0].model
    batch = whole[0].tokenizer(TEXTS, padding=True, return_tensors="pt")
    embeds = model.embeddings.word_embeddings(batch["input_ids"])
    embeds = torch.cat([the_prompt(delta).detach().expand(2, -1, -1), embeds], 1)
    mask = torch.cat([torch.ones(2, COUNT), batch["attention_mask"]], 1)
    with torch.no_grad():
        states = model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[:, COUNT:]
    weight = batch["attention_mask"].unsqueeze(-1)
    close(encoded, (states * weight).sum(1) / weight.sum(1), within=1e-5)


def test_on_the_model_inside_encoding_is_refused(tmp_path: Path) -> None:
    whole = sentence_transformer(tmp_path)
    SoftPromptModel(whole[0].model, soft_token_num=COUNT)
    with pytest.raises(InsertionError, match="construct the delta on the wrapper"):
        whole.encode(TEXTS)


# --- transformers' Trainer ------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_trainer_need_not_know_of_the_prompt(smoothing: float, tmp_path: Path) -> None:
    model = backbones.build("llama")
    delta = SoftPromptModel(model, soft_token_num=COUNT)
    delta.freeze_module()
    rows = [{"input_ids": row, "labels": row} for row in backbones.inputs("llama")["input_ids"]]
    seen: list[tuple[int, ...]] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"same": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        label_smoothing_factor=smoothing,
        report_to=[],
        use_cpu=True,
    )
    trainer = transformers.Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics
    )
    before = the_prompt(delta).detach().clone()
    trainer.train()
    assert not torch.equal(the_prompt(delta), before)
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))
    assert seen == [(2, 7, 128)]
    with torch.no_grad():
        by_hand = model(**backbones.inputs("llama"))
    assert first(by_hand).shape[1] == 7 + COUNT


def test_weights_are_in_place() -> None:
    """The tiny models here differ in what they compute with the prompt moved."""
    model = weights.fill(MODELS["bert"]()).eval()
    delta = SoftPromptModel(model, soft_token_num=COUNT, trim_output=True)
    with torch.no_grad():
        before = model(TEXT).last_hidden_state
        randomise(delta, 1.0)
        assert (model(TEXT).last_hidden_state - before).abs().max() > 1e-3


# --- images ---------------------------------------------------------------------------------------

IMAGE, START, END = 50, 52, 53


def seeing() -> Any:
    """A model whose positions of images are found by ids, on a grid."""
    torch.manual_seed(0)
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [1, 1, 2],
            "rope_theta": 10000.0,
        },
    }
    vision = {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=51,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return transformers.Qwen2VLForConditionalGeneration(config).eval()


def with_image(ids: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == IMAGE).long(),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4, generator=generator),
    }


@torch.no_grad()
def test_images_keep_their_places_on_the_grid() -> None:
    ids = torch.tensor([[5, 6, START, IMAGE, IMAGE, IMAGE, IMAGE, END, 7, 8]])
    tokens = torch.tensor([[7, 11, 5]])
    model = seeing()
    whole = with_image(torch.cat([tokens, ids], 1))
    expected = model(**whole).logits[:, 3:]
    options = {"max_new_tokens": 5, "do_sample": False}
    words = model.generate(**whole, **options)[:, 13:]
    delta = SoftPromptModel(model, soft_token_num=3, trim_output=True)
    with delta.detached():
        the_prompt(delta).copy_(model.get_input_embeddings()(tokens)[0])
    close(model(**with_image(ids)).logits, expected, within=1e-5)
    assert torch.equal(model.generate(**with_image(ids), **options)[:, 10:], words)
    padded = torch.cat([torch.zeros_like(ids[:, :2]), ids], 1)
    close(model(**with_image(padded)).logits[:, 2:], expected, within=1e-5)
