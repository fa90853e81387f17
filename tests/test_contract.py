"""What a method of one's own may ask for, tried by methods written as a user would."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
from cases import REENTRANT, randomise
from own_methods import (
    AdaModel,
    AffineModel,
    FusionModel,
    LastTokenModel,
    OldFoldModel,
    OtherParameterModel,
)
from pieces import forward_hooks, linears
from placed import contents, told, unchanged
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import opendelta
from opendelta import (
    AutoDeltaModel,
    BitFitModel,
    DeltaCallback,
    DoraModel,
    IA3Model,
    LoraModel,
    OpenDeltaError,
)

# --- call_arguments: a scale on the last real token ----------------------------------------------

HOSTS = ["mlp.down_proj"]
FACTORS = torch.linspace(0.5, 2, backbones.H)


def llama(training: bool = False) -> Any:
    return backbones.build("llama").train(training)


def text(seed: int, lengths: tuple[int, ...], width: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, backbones.VOCAB, (len(lengths), width), generator=generator)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    return {"input_ids": ids, "attention_mask": mask}


# Of one shape, so that the mask of another call would be taken without a word.
TEXTS = text(1, (6, 2)), text(2, (3, 5))


def by_hand(model: Any, batch: dict[str, Tensor], factors: Tensor = FACTORS) -> Any:
    """A model without deltas, whose last tokens' outputs of `HOSTS` a hook of ours scales."""
    last = batch["attention_mask"].sum(1) - 1
    rows = torch.arange(len(last))

    def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        factor = torch.ones_like(output)
        factor[rows, last] = factors
        return output * factor

    hooks = [
        m.register_forward_hook(scale) for n, m in model.named_modules() if n.endswith(HOSTS[0])
    ]
    output = model(**batch)
    for hook in hooks:
        hook.remove()
    return output


def last_token(model: Any) -> LastTokenModel:
    delta = LastTokenModel(model, modified_modules=HOSTS)
    delta.freeze_module()
    return delta


def gradients(delta: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in delta.named_parameters() if p.grad is not None}


def test_the_mask_of_the_call_is_told_deep_inside() -> None:
    model = llama()
    expected = [by_hand(model, batch).logits for batch in TEXTS]
    last_token(model)
    for batch, logits in zip(TEXTS, expected, strict=True):
        torch.testing.assert_close(model(**batch).logits, logits)
    ids, mask = TEXTS[0].values()
    torch.testing.assert_close(model(ids, mask).logits, expected[0])  # by position, and by name


def test_what_was_passed_is_told_by_name() -> None:
    seen: list[dict[str, Any]] = []

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(opendelta.call_arguments())
            return x

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor, scale: float = 1.0, *more: Any, flag: Any = None) -> Tensor:
            return self.inner(x)

    model, x = Root(), torch.ones(1, 2)
    opendelta.DeltaBase(model).insert_module(model.inner, "after", Asks(), "asks")
    model(x)
    model(x, 2.0, 3, 4, flag="f")
    model(scale=3.0, x=x)
    assert seen == [
        {"x": x},
        {"x": x, "scale": 2.0, "more": (3, 4), "flag": "f"},
        {"scale": 3.0, "x": x},
    ]


def test_without_a_running_call_there_is_nothing_to_tell() -> None:
    model = llama()
    delta = last_token(model)
    layer: Any = delta.insertions[0].module
    for ask in (opendelta.call_arguments, lambda: layer(torch.ones(2, 6, backbones.H))):
        with pytest.raises(OpenDeltaError, match="call the backbone itself"):
            ask()
    model(**TEXTS[0])
    with pytest.raises(OpenDeltaError, match="call the backbone itself"):
        opendelta.call_arguments()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_broke_off_is_not_taken_for_the_running_one(error: Any) -> None:
    model = llama()
    expected = by_hand(model, TEXTS[1]).logits
    last_token(model)

    def fail(*_: Any) -> None:
        raise error

    handle = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(error):
        model(**TEXTS[0])
    handle.remove()
    torch.testing.assert_close(model(**TEXTS[1]).logits, expected)
    with pytest.raises(OpenDeltaError, match="call the backbone itself"):
        opendelta.call_arguments()


@pytest.mark.parametrize("use_reentrant", REENTRANT)
@pytest.mark.parametrize("together", [True, False])
def test_recomputed_blocks_are_told_their_own_call(use_reentrant: bool, together: bool) -> None:
    """Two forwards with different masks wait for one backward, or for two in the other order."""
    plain, model = llama(training=True), llama(training=True)
    plain.requires_grad_(False)
    factors = {i: FACTORS.clone().requires_grad_() for i in range(2)}
    expected = sum(by_hand(plain, b, factors[0]).logits.square().mean() for b in TEXTS)
    expected.backward()
    delta = last_token(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    losses = [model(**batch).logits.square().mean() for batch in TEXTS]
    if together:
        sum(losses).backward()
    else:
        for loss in losses:
            loss.backward()
    total = sum(gradients(delta).values())
    torch.testing.assert_close(total, factors[0].grad)


class Region(nn.Module):
    """A model that checkpoints a part of itself by hand."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.use_reentrant = use_reentrant

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        entering = self.first(hidden).requires_grad_()
        return checkpoint(self.last, entering, use_reentrant=self.use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_region_checkpointed_by_hand(use_reentrant: bool) -> None:
    model = Region(use_reentrant)
    delta = LastTokenModel(model, modified_modules=["last"])
    hidden = torch.randn(2, 4, 3)
    masks = [torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]), torch.ones(2, 4, dtype=torch.int64)]
    waiting = model(hidden, masks[0])
    del waiting  # a graph that is gone asks for nothing
    model(hidden, masks[0]).sum().backward()
    (grad,) = gradients(delta).values()
    with delta.detached():
        expected = model.last(model.first(hidden))[[0, 1], [2, 0]].sum(0)
    torch.testing.assert_close(grad, expected)
    losses = [model(hidden, mask).sum() for mask in masks]
    with pytest.raises(OpenDeltaError, match="2 forwards wait.*gradient_checkpointing_enable"):
        sum(losses).backward()


def test_threads_are_told_their_own_call() -> None:
    """Both are inside the model at once."""
    model = llama()
    expected = [by_hand(model, batch).logits for batch in TEXTS]
    last_token(model)
    meeting = threading.Barrier(2, timeout=20)
    made: dict[int, Tensor] = {}

    def meet(*_: Any) -> None:
        meeting.wait()

    def work(number: int) -> None:
        made[number] = model(**TEXTS[number]).logits

    # Before and after each host, so that neither goes through it alone.
    for name, module in model.named_modules():
        if name.endswith(HOSTS[0]):
            module.register_forward_pre_hook(meet)
            module.register_forward_hook(meet)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        torch.testing.assert_close(made[number], expected[number])


def test_generate_with_a_cache() -> None:
    """Padded on the left, the last real token of each step is the one that is computed."""
    model = llama()
    batch = text(3, (6, 3))
    batch = {name: tensor.flip(1) for name, tensor in batch.items()}
    options: dict[str, Any] = {
        "max_new_tokens": 5,
        "do_sample": False,
        "eos_token_id": None,
        "use_cache": True,
        "return_dict_in_generate": True,
        "output_logits": True,
    }

    def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, -1] = output[:, -1] * FACTORS
        return output

    hosts = [m for n, m in model.named_modules() if n.endswith(HOSTS[0])]
    hooks = [host.register_forward_hook(scale) for host in hosts]
    expected = model.generate(**batch, **options)
    for hook in hooks:
        hook.remove()
    bare = model.generate(**batch, **options)
    last_token(model)
    tuned = model.generate(**batch, **options)
    assert torch.equal(tuned.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(tuned.logits), torch.stack(expected.logits))
    assert not torch.allclose(torch.stack(tuned.logits), torch.stack(bare.logits))


# --- fusion ---------------------------------------------------------------------------------------


class ScaleOnly(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.linspace(1, 2, width))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.factor


def fused() -> tuple[nn.Module, Any, LoraModel, FusionModel, Tensor]:
    model = backbones.build("mlp")
    scale = opendelta.DeltaBase(model)
    scale.insert_module(model.first, "after", ScaleOnly(8), "scale")
    lora = LoraModel(model, modified_modules=["first"], lora_r=2)
    randomise(lora)
    fusion = FusionModel(model, modified_modules=["first"])
    return model, scale, lora, fusion, torch.randn(4, 6)


def test_a_fusion_is_handed_what_the_others_make() -> None:
    model, scale, lora, fusion, x = fused()
    host: Any = model.first
    bare = nn.functional.linear(x, host.weight, host.bias)
    scaled = bare * host.scale.factor
    low_rank = x @ (host.lora.lora_B @ host.lora.lora_A).T * 8  # alpha / r
    both, alone = bare + 0.75 * scaled - 0.5 * (bare + low_rank), bare + 0.75 * scaled
    torch.testing.assert_close(host(x), both)
    lora.detach()
    torch.testing.assert_close(host(x), alone)
    lora.attach()
    torch.testing.assert_close(host(x), both)
    scale.detach()
    torch.testing.assert_close(host(x), bare - 0.5 * (bare + low_rank))
    scale.attach()
    fusion.detach()
    torch.testing.assert_close(host(x), scaled + low_rank)
    fusion.attach()
    later = opendelta.DeltaBase(model)  # it acts on what was fused
    later.insert_module(host, "after", ScaleOnly(8), "scale")
    torch.testing.assert_close(host(x), both * torch.linspace(1, 2, 8))
    for delta in (later, fusion, lora, scale):
        delta.remove()
    assert torch.equal(host(x), bare)


def test_a_fusion_trains_itself_and_the_others() -> None:
    model, scale, lora, fusion, x = fused()
    model(x).sum().backward()
    for delta in (scale, lora, fusion):
        assert all(p.grad is not None and p.grad.any() for p in delta.parameters())


def test_in_a_route_each_delta_is_told_the_arguments_of_its_rows() -> None:
    model, mixed = llama(), {n: torch.cat([t[n] for t in TEXTS]) for n in TEXTS[0]}
    rows = [{n: t[i : i + 1] for n, t in mixed.items()} for i in range(4)]
    bare = [model(**row).logits for row in rows]
    one, other = last_token(model), last_token(model)
    with torch.no_grad():
        for p in other.parameters():
            p.neg_()
    plain = llama()
    alone = [by_hand(plain, rows[0]).logits, by_hand(plain, rows[1], -FACTORS).logits]
    alone += [bare[2], by_hand(plain, rows[3]).logits]
    with opendelta.route(model, [one, other, None, one]):
        torch.testing.assert_close(model(**mixed).logits, torch.cat(alone))


def test_a_call_that_hands_its_argument_through_is_let_go() -> None:
    """Its graph is then the argument's too, which would hold on to it for ever."""

    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor, more: Any) -> tuple[Tensor, Tensor]:
            return x, self.inner(x)

    class Marker:
        pass

    model = Through()
    LoraModel(model, modified_modules=["inner"], lora_r=1)
    x, marker = torch.ones(1, 2, requires_grad=True) * 2, Marker()
    is_there = weakref.ref(marker)
    output = model(x, marker)
    assert output[0] is x
    del output, marker
    gc.collect()
    assert is_there() is None


def test_a_fusion_of_a_batch_is_not_routed() -> None:
    model, _, lora, fusion, _ = fused()
    for rows in ([fusion, None], [lora, fusion]):
        with (
            unchanged(model),
            pytest.raises(OpenDeltaError, match=r"'fusion'.*'first'.*cannot be routed"),
            opendelta.route(model, rows),
        ):
            pass


def test_a_fused_delta_is_not_merged_nor_is_the_fusion() -> None:
    model, scale, lora, fusion, _ = fused()
    with unchanged(model), pytest.raises(OpenDeltaError, match="FusionModel cannot be merged"):
        fusion.merge()
    scale.remove()
    with unchanged(model), pytest.raises(OpenDeltaError, match="fusion"):
        lora.merge()  # the fusion would no longer be handed it


def test_a_fusion_is_saved_and_loaded(tmp_path: Path) -> None:
    model, _, lora, fusion, x = fused()
    randomise(fusion)
    for delta in (lora, fusion):
        delta.save_finetuned(tmp_path / delta.delta_type)
    fresh, *_, other, _ = fused()
    other.remove()
    loaded = AutoDeltaModel.from_finetuned(tmp_path / "test_fusion", fresh)
    assert type(loaded) is FusionModel
    torch.testing.assert_close(fresh(x), model(x))


# --- a step and a term ----------------------------------------------------------------------------


def ada(**kwargs: Any) -> tuple[Any, AdaModel]:
    model = backbones.build("bert_cls").train()
    delta = AdaModel(model, modified_modules=["query", "value"], **kwargs)
    delta.freeze_module()
    with torch.no_grad():
        for insertion in delta.insertions:
            insertion.module.e.uniform_(0.1, 1)
    return model, delta


BATCH = {**backbones.inputs("bert"), "labels": torch.tensor([2, 0])}


def test_a_term_is_added_to_the_loss_once_and_in_training_only() -> None:
    model, delta = ada()
    plain = {"input_ids": BATCH["input_ids"], "attention_mask": BATCH["attention_mask"]}

    def bare() -> Tensor:
        return nn.functional.cross_entropy(model(**plain).logits, BATCH["labels"])

    term = delta.loss_term()
    assert term > 0.1
    torch.testing.assert_close(model(**BATCH).loss, bare() + term)
    model(**BATCH).loss.backward()
    by_model = gradients(delta)
    delta.zero_grad()
    (bare() + delta.loss_term()).backward()  # as a loop of one's own does
    torch.testing.assert_close(gradients(delta), by_model)
    with torch.no_grad():
        torch.testing.assert_close(model(**BATCH).loss, bare())
    with delta.detached():
        torch.testing.assert_close(model(**BATCH).loss, bare())
    model.eval()
    torch.testing.assert_close(model(**BATCH).loss, bare())
    model.train()
    second = AdaModel(model, modified_modules=["key"])
    torch.testing.assert_close(model(**BATCH).loss, bare() + delta.loss_term() + second.loss_term())
    delta.remove()
    torch.testing.assert_close(model(**BATCH).loss, bare() + second.loss_term())


def test_ranks_that_training_changed_are_saved_as_they_are(tmp_path: Path) -> None:
    model, delta = ada(r=3, budget=5, prunes_at=2)
    layers = {i.host_name: i.module for i in delta.insertions}
    for step in (1, 2):
        delta.zero_grad()
        model(**BATCH).loss.backward()
        importance = {n: (m.e * m.e.grad).abs().tolist() for n, m in layers.items()}
        delta.on_step(step)
        if step == 1:
            assert [len(layer.e) for layer in layers.values()] == [3] * len(layers)
    least = sorted(itertools.chain(*importance.values()))[-5]
    ranks = {name: sum(v >= least for v in values) for name, values in importance.items()}
    assert sum(ranks.values()) == 5 and len(set(ranks.values())) > 1
    assert delta.ranks == delta.config.ranks == ranks
    delta.save_finetuned(tmp_path)
    shapes = {n: tuple(t.shape) for n, t in load_file(tmp_path / "model.safetensors").items()}
    assert shapes == {
        f"{host}.ada.{name}": shape
        for host, r in ranks.items()
        for name, shape in {"A": (r, 64), "e": (r,), "B": (64, r)}.items()
    }
    fresh = backbones.build("bert_cls")
    loaded = AutoDeltaModel.from_finetuned(tmp_path, fresh)
    assert type(loaded) is AdaModel and loaded.ranks == ranks
    assert torch.equal(backbones.run(fresh, "bert_cls"), backbones.run(model.eval(), "bert_cls"))


def test_a_trainer_calls_the_step_while_gradients_are_there(tmp_path: Path) -> None:
    model, delta = ada()
    told: list[tuple[int, bool]] = []

    def on_step(step: int) -> None:
        told.append((step, all(p.grad is not None for p in delta.parameters())))

    delta.on_step = on_step  # type: ignore[method-assign]
    data = [{name: tensor[0] for name, tensor in BATCH.items()}] * 8
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=data, callbacks=[DeltaCallback(delta)]).train()  # type: ignore[arg-type]
    assert told == [(1, True), (2, True), (3, True)]


# --- insert_parameter -----------------------------------------------------------------------------


def test_another_parameter_stands_in_the_place() -> None:
    model = linears()
    own, bias, x = model[0].weight, model[0].bias, torch.randn(3, 8)
    delta = OtherParameterModel(model, modified_modules=["0"])
    (name, inserted), *more = delta.named_parameters()
    assert name == "0.weight" and not more
    assert model[0].weight is inserted and inserted is not own
    expected = model[1](nn.functional.linear(x, 2 * own, bias))
    torch.testing.assert_close(model(x), expected)
    delta.freeze_module()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"0.weight"}
    model(x).sum().backward()
    assert inserted.grad is not None and own.grad is None
    delta.detach()
    assert model[0].weight is own
    delta.attach()
    assert model[0].weight is inserted
    delta.merge()
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(model[0].weight, inserted) and model[0].weight is own
    delta.unmerge()
    delta.remove()
    assert model[0].weight is own and own.requires_grad and not any(own.grad or [])


def test_tied_places_get_it_together() -> None:
    model: Any = backbones.build("gpt2")
    own = model.lm_head.weight
    assert model.transformer.wte.weight is own
    delta = OtherParameterModel(model, modified_modules=["lm_head"])
    assert model.lm_head.weight is model.transformer.wte.weight is next(delta.parameters())
    untied = copy.deepcopy(model)
    assert untied.lm_head.weight is untied.transformer.wte.weight is not model.lm_head.weight
    delta.detach()
    assert model.lm_head.weight is model.transformer.wte.weight is own


def test_one_that_never_trains_or_is_never_saved(tmp_path: Path) -> None:
    constant = OtherParameterModel(linears(), learns=False, modified_modules=["0"])
    constant.freeze_module(exclude=["deltas", "1"])
    assert [p.requires_grad for p in constant.parameters()] == [False]
    assert "0.weight" in constant.backbone_model.state_dict()  # a constant of the delta
    constant.save_finetuned(tmp_path / "constant")
    assert "0.weight" in load_file(tmp_path / "constant" / "model.safetensors")
    model = linears()
    delta = OtherParameterModel(model, is_saved=False, modified_modules=["0"])
    lora = LoraModel(model, modified_modules=["1"])
    for saved in (delta, lora):
        saved.save_finetuned(tmp_path / saved.delta_type)
    assert not load_file(tmp_path / "test_other_parameter" / "model.safetensors")
    fresh = copy.deepcopy(model)
    for loaded in opendelta.deltas(fresh):
        loaded.remove()
    x = torch.randn(3, 8)
    AutoDeltaModel.from_finetuned(tmp_path / "test_other_parameter", fresh)
    torch.testing.assert_close(fresh(x), model(x))


WRONG_PLACES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "another name": ({"which": "wieght"}, ("'0'", "'wieght'", "weight", "bias")),
    "another shape": ({"rows_more": 1}, ("(9, 8)", "'weight'", "'0'", "(8, 8)")),
    "no module's": ({"modified_modules": ["2"]}, ("'2'", "'bias'", "no parameter")),
}


@pytest.mark.parametrize("case", WRONG_PLACES)
def test_a_parameter_that_does_not_fit(case: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False))
    arguments, words = WRONG_PLACES[case]
    arguments = {"modified_modules": ["0"], **arguments}
    if case == "no module's":
        arguments["which"] = "bias"
    with unchanged(model), pytest.raises(OpenDeltaError) as caught:
        OtherParameterModel(model, **arguments)
    told(caught.value, words)


# --- folds ----------------------------------------------------------------------------------------


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 4), (2, 3)),
    "Conv1D": (lambda: Conv1D(4, 3), (2, 3)),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3, groups=2, dilation=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 5, 5)),
}


def hosting(kind: str) -> tuple[nn.Module, Tensor]:
    layer = KINDS[kind][0]()
    nn.init.uniform_(layer.bias)  # type: ignore[arg-type]
    return nn.ModuleDict({"layer": layer}), torch.randn(KINDS[kind][1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_fold_merges_exactly_biases_included(kind: str) -> None:
    model, x = hosting(kind)
    layer: Any = model["layer"]  # type: ignore[index]
    before = contents(layer)
    delta = AffineModel(model, modified_modules=["layer"])
    randomise(delta)
    assert layer.bias.abs().min() > 0
    expected = layer(x)
    delta.merge()
    assert not layer._forward_hooks and set(layer.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)
    delta.unmerge()
    assert torch.equal(layer(x), expected)
    delta.remove()
    assert contents(layer) == before


WRONG_FOLDS = {
    "another name": ("no parameter", "layer.wieght", "'weight'"),
    "another shape": ("AffineModel", "'weight'", "'layer'", "shape"),
    "without the bias": ("'layer'", "AffineModel", "not merged"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fold", WRONG_FOLDS)
def test_a_fold_that_computes_something_else_is_refused(fold: str, kind: str) -> None:
    model, _ = hosting(kind)
    good = LoraModel(model, modified_modules=["layer"], lora_r=1)
    randomise(good)
    good.merge()  # what is merged already stays so
    delta = AffineModel(model, fold, modified_modules=["layer"])
    randomise(delta)
    for act in (delta.merge, partial(delta.merge, safe=True), delta.merge_and_remove):
        with unchanged(model), pytest.raises(OpenDeltaError) as caught:
            act()
        told(caught.value, (*WRONG_FOLDS[fold], "Nothing was merged"))
    assert delta.is_attached and good.is_merged


def test_a_fold_that_is_right_where_there_is_no_bias() -> None:
    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    delta = AffineModel(model, "without the bias", modified_modules=["0"])
    with torch.no_grad():
        delta.insertions[0].module.factor.uniform_()
    x = torch.randn(2, 3)
    expected = model(x)
    delta.merge()
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("out", list(itertools.permutations(range(3))))
def test_folds_of_several_deltas_come_off_in_any_order(out: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    before, x = contents(model), torch.randn(4, 8)
    deltas: list[Any] = [
        LoraModel(model, modified_modules=["0"], lora_r=2),
        OldFoldModel(model, modified_modules=["0"]),
        AffineModel(model, modified_modules=["2"]),
    ]
    for delta in deltas:
        randomise(delta)
    together = model(x)
    for delta in deltas:
        delta.merge()
        torch.testing.assert_close(model(x), together, atol=1e-5, rtol=1e-5)
    assert all(delta.is_merged for delta in deltas) and not forward_hooks(model)
    for number in out:
        deltas[number].unmerge()
        torch.testing.assert_close(model(x), together, atol=1e-5, rtol=1e-5)
        deltas[number].detach()
        with deltas[number].attached():
            torch.testing.assert_close(model(x), together, atol=1e-5, rtol=1e-5)
        together = model(x)
    assert contents(model) == before


# Two deltas on one host: whether either may be folded in while the other is not. What acts nearer
# to the host has to be in its weight first, unless both only add.
PAIRS: dict[str, tuple[Any, Any, bool, bool]] = {
    "two sums": (LoraModel, OldFoldModel, True, True),
    "a scale on a sum": (LoraModel, AffineModel, True, False),
    "a sum on a scale": (AffineModel, LoraModel, True, False),
    "two scales": (AffineModel, IA3Model, True, False),
    "a scaled input below a sum": (partial(IA3Model, on_input=["0"]), LoraModel, False, True),
    "a scaled input above a sum": (LoraModel, partial(IA3Model, on_input=["0"]), True, False),
    "a scaled input and a scale": (partial(IA3Model, on_input=["0"]), AffineModel, True, True),
    "two scaled inputs": (*[partial(IA3Model, on_input=["0"])] * 2, True, False),
    "a scale on a bias": (BitFitModel, AffineModel, True, False),
    "a bias below a scale": (AffineModel, BitFitModel, False, True),
    "a sum on a bias": (BitFitModel, LoraModel, True, True),
    "a bias below a sum": (LoraModel, BitFitModel, True, True),
    "a scaled input and a bias": (partial(IA3Model, on_input=["0"]), BitFitModel, True, True),
    "another weight below a sum": (LoraModel, OtherParameterModel, False, True),
    "rescaled rows on a sum": (LoraModel, DoraModel, False, False),
    "a sum on rescaled rows": (DoraModel, LoraModel, True, False),
}


@pytest.mark.parametrize("case", PAIRS)
def test_what_acts_otherwise_beside_a_merged_one_keeps_it_out(case: str) -> None:
    *methods, first_alone, second_alone = PAIRS[case]
    model = nn.Sequential(nn.Linear(8, 8))
    x = torch.randn(4, 8)
    pair = [method(model, modified_modules=["0"]) for method in methods]
    for delta in pair:
        randomise(delta)
    expected, alone = model(x), [first_alone, second_alone]

    def agrees() -> None:
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)

    for delta, may in zip(pair, alone, strict=True):
        if may:
            delta.merge()
            agrees()
            delta.unmerge()
            assert torch.equal(model(x), expected)
        else:
            with unchanged(model), pytest.raises(OpenDeltaError, match="beside a merged"):
                delta.merge()
    if not any(alone):
        return
    order = pair if first_alone else pair[::-1]
    for delta in order:
        delta.merge()
        agrees()
    assert not forward_hooks(model)
    for delta, may in zip(pair, alone, strict=True):  # alone merged is what is left by the other
        other = pair[1] if delta is pair[0] else pair[0]
        if may:
            other.unmerge()
            agrees()
            other.merge()
            agrees()
        else:
            with unchanged(model), pytest.raises(OpenDeltaError, match="beside a merged"):
                other.unmerge()
    order[0].remove()  # which acts no more
    alone_is = model(x)
    order[1].unmerge()
    torch.testing.assert_close(model(x), alone_is, atol=1e-5, rtol=1e-5)


def test_merges_into_and_merged_of_1_0() -> None:
    model, x = linears(), torch.randn(3, 8)
    delta = OldFoldModel(model, 0.25, modified_modules=["0"])
    expected = model(x)
    by_hand_ = nn.functional.linear(x, model[0].weight + 0.25, model[0].bias)
    torch.testing.assert_close(expected, model[1](by_hand_))
    delta.merge()
    assert not model[0]._forward_hooks
    torch.testing.assert_close(model(x), expected)
    delta.unmerge()
    assert delta.config.start == delta.start == 0.25
