"""A delta whose module was replaced, moved or resized: noticed, refused in words, or grown."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
import transformers
from cases import METHODS, randomise
from pieces import replicate
from placed import PLACED_METHODS, contents, place, unchanged
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import opendelta
from opendelta import AutoDeltaModel, DeltaBase, LoraModel
from opendelta.exceptions import InsertionError

VERBS: dict[str, Callable[[DeltaBase, Path], Any]] = {
    "freeze": lambda delta, _: delta.freeze_module(),
    "attach": lambda delta, _: delta.attach(),
    "save": lambda delta, folder: delta.save_finetuned(folder / "delta"),
    "checkpoint": lambda delta, folder: delta.save_checkpoint(folder / "delta.bin"),
}


# --- replaced -------------------------------------------------------------------------------------

# What of a backbone is replaced by a copy of itself, and it is where each method sits.
PARTS = {"bert_cls": "bert.encoder.layer.1", "llama": "model.layers.1", "t5": "encoder.block.1"}
HERE = [
    pytest.param(method, backbone, marks=() if backbone == "bert_cls" else pytest.mark.slow)
    for method in METHODS
    for backbone in PARTS
    if method not in ("SoftPromptModel", "CompacterModel", "LowRankAdapterModel")
    if not (method in ("AdapterModel", "ParallelAdapterModel") and backbone == "t5")
]


def put_copy(model: nn.Module, name: str) -> nn.Module:
    """Put a copy of a bare part of a model in its place; the old one."""
    parent, _, child = name.rpartition(".")
    old = model.get_submodule(name)
    bare = backbones.build(BARE[id(model)]).get_submodule(name)
    setattr(model.get_submodule(parent), child, bare)
    return old


BARE: dict[int, str] = {}


def built(method: str, backbone: str) -> tuple[nn.Module, DeltaBase]:
    model = backbones.build(backbone)
    BARE[id(model)] = backbone
    if method == "PrefixModel":
        delta: DeltaBase = opendelta.PrefixModel(model, prefix_token_num=2, reparameterize=False)
    else:
        delta = place(method, backbone, model)
    return model, delta


@pytest.mark.parametrize(("method", "backbone"), HERE)
def test_what_was_replaced_is_noticed(method: str, backbone: str, tmp_path: Path) -> None:
    model, delta = built(method, backbone)
    old = put_copy(model, PARTS[backbone])
    parent, _, child = PARTS[backbone].rpartition(".")
    for verb in VERBS.values():
        with unchanged(model), pytest.raises(InsertionError, match=PARTS[backbone]) as caught:
            verb(delta, tmp_path)
        assert "remove()" in str(caught.value)
    assert not [*tmp_path.iterdir()]
    for _ in range(2):  # as long as nothing was done about it
        with pytest.raises(InsertionError, match=PARTS[backbone]):
            backbones.run.__wrapped__(model, backbone)  # type: ignore[attr-defined]
    setattr(model.get_submodule(parent), child, old)
    delta.freeze_module()
    backbones.run(model, backbone)


@pytest.mark.parametrize(("method", "backbone"), HERE)
def test_what_was_replaced_after_the_first_forward(
    method: str, backbone: str, tmp_path: Path
) -> None:
    model, delta = built(method, backbone)
    delta.freeze_module()
    backbones.run(model, backbone)
    put_copy(model, PARTS[backbone])
    with pytest.raises(InsertionError, match=PARTS[backbone]) as caught:
        delta.save_finetuned(tmp_path)
    assert "state_dict=dict(delta.own_tensors())" in str(caught.value)
    delta.save_finetuned(tmp_path, state_dict=dict(delta.own_tensors()))
    fresh = backbones.build(backbone)
    loaded = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh, check_hash=False)
    for (_, mine), (_, theirs) in zip(delta.own_tensors(), loaded.own_tensors(), strict=True):
        assert torch.equal(mine, theirs)
    delta.remove()
    assert contents(model) == contents(backbones.build(backbone))
    place_again = place(method, backbone, model) if method in PLACED_METHODS else None
    if place_again is not None:
        place_again.freeze_module()


def test_a_layer_that_moved_is_named() -> None:
    model: Any = backbones.build("llama")
    delta = LoraModel(model, modified_modules=["q_proj"])
    model.model.layers = nn.ModuleList([model.model.layers[1], model.model.layers[0]])
    with pytest.raises(InsertionError, match=r"layers\.0\.self_attn\.q_proj' is .*layers\.1\."):
        delta.freeze_module()


def test_a_replaced_head_is_refused_where_it_would_be_merged() -> None:
    model: Any = backbones.build("llama")
    delta = LoraModel(model, modified_modules=["q_proj", "lm_head"])
    model.lm_head = nn.Linear(64, 7, bias=False)
    with unchanged(model), pytest.raises(InsertionError, match="'lm_head' is no part"):
        delta.merge()


# --- no false alarm -------------------------------------------------------------------------------


class Around(nn.Module):
    """A user's own wrapper."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__["_modules"]["inner"]
        return inner if name == "inner" else getattr(inner, name)


def compiled(layer: nn.Module) -> nn.Module:
    wrapped: Any = torch.compile(layer, backend="eager")
    return wrapped  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["LoraModel", "AdapterModel", "BitFitModel", "PrefixModel"])
@pytest.mark.parametrize("wrap", [Around, checkpoint_wrapper, compiled])
def test_what_is_wrapped_is_still_there(method: str, wrap: Any, tmp_path: Path) -> None:
    model, delta = built(method, "bert_cls")
    randomise(delta)
    layers: Any = model.get_submodule("bert.encoder.layer")
    layers[0] = wrap(layers[0])
    layers[1].attention = wrap(layers[1].attention)
    delta.freeze_module()
    delta.detach()
    delta.attach()
    delta.save_finetuned(tmp_path)
    if wrap is not compiled:
        assert not torch.equal(
            backbones.run(model, "bert_cls"), backbones.run(backbones.build("bert_cls"), "bert_cls")
        )


@pytest.mark.parametrize("wrap", [nn.DataParallel, compiled, Around])
def test_a_wrapper_around_all_of_it(wrap: Any, tmp_path: Path) -> None:
    model, delta = built("LoraModel", "llama")
    whole = wrap(model)
    delta.freeze_module()
    if wrap is not compiled:
        whole(torch.ones(1, 3, dtype=torch.long))
    delta.save_finetuned(tmp_path)


class Doubled(nn.Module):
    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 2.0))
        self.__dict__["original"] = original

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.scale * self.__dict__["original"](x)
        return out


class Replacing(DeltaBase):
    delta_type = "replacing_for_hosts"
    default_modified_modules: Any = ["first"]

    def __init__(self, backbone_model: nn.Module, modified_modules: Any = None) -> None:
        self._construct()

    def update_module(self, module: nn.Module, key: str) -> None:
        parent, name, child = self.find_module(module, key)
        self.replace_module(parent, name, child, Doubled(child))


@pytest.mark.parametrize("method", ["LoraModel", "AdapterModel", "BitFitModel", "IA3Model"])
@pytest.mark.parametrize("pattern", ["first", "last.1"])
def test_below_a_module_that_another_delta_replaced(
    method: str, pattern: str, tmp_path: Path
) -> None:
    model = backbones.build("mlp")
    below = place(method, "mlp", model)
    randomise(below)
    expected = 2 * backbones.run(model, "mlp") if pattern == "last.1" else None
    replacing = Replacing(model, modified_modules=[pattern])
    below.freeze_module()
    replacing.freeze_module()
    out = backbones.run(model, "mlp")
    if expected is not None:
        assert torch.allclose(out, expected, atol=1e-6)
    below.save_finetuned(tmp_path)
    replacing.detach()
    below.save_finetuned(tmp_path / "again")


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("method", ["LoraModel", "AdapterModel", "BitFitModel"])
def test_copies_have_their_own(method: str, twin: Any, tmp_path: Path) -> None:
    model, _ = built(method, "bert_cls")
    other = twin(model)
    (delta,) = opendelta.deltas(other)
    delta.freeze_module()
    backbones.run(other, "bert_cls")
    delta.save_finetuned(tmp_path)


@pytest.mark.parametrize("method", PLACED_METHODS)
def test_replicas_are_not_compared(method: str) -> None:
    model, delta = backbones.build("mlp"), None
    delta = place(method, "mlp", model)
    replicate(model)(torch.ones(2, 6))  # the first forward is one of a replica
    delta.freeze_module()
    model(torch.ones(2, 6))


def test_a_module_of_two_names_may_have_either() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.append(model[0])
    delta = LoraModel(model, modified_modules=["0"])
    model.add_module("0", nn.Identity())
    with pytest.raises(InsertionError, match="is '2' now"):  # files would name another
        delta.freeze_module()
    model.add_module("0", model[2])
    delta.freeze_module()


# --- resized --------------------------------------------------------------------------------------


def language_model(kind: str) -> Any:
    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 4, "intermediate_size": 64}
    if kind == "llama":
        config: Any = transformers.LlamaConfig(**small, **heads, num_key_value_heads=2)
        made: Any = transformers.LlamaForCausalLM(config)
    elif kind == "gpt2":  # whose head is tied to the embedding
        config = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4)
        made = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.BertConfig(**small, **heads)
        made = transformers.BertForMaskedLM(config)
    return made.eval()


EMBEDDINGS = {"llama": "embed_tokens", "gpt2": "wte", "bert": "word_embeddings"}
OLD, NEW = torch.tensor([[3, 59, 7]]), torch.tensor([[61, 3, 63]])


def grown(kind: str, size: int = 64) -> tuple[Any, DeltaBase]:
    model = language_model(kind)
    delta = LoraModel(model, modified_modules=[EMBEDDINGS[kind]], lora_r=4)
    randomise(delta)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model, delta


def a_and_b(delta: DeltaBase) -> Any:
    layer: Any = delta.insertions[0].module
    return layer.lora_A, layer.lora_B


@pytest.mark.parametrize("verb", ["freeze", "attach"])
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_lora_grows_with_its_embedding(kind: str, verb: str, tmp_path: Path) -> None:
    model, delta = grown(kind)
    before = a_and_b(delta)[0]
    old = before.detach().clone()
    VERBS[verb](delta, tmp_path)
    a, b = a_and_b(delta)
    assert a is before and a.shape == (4, 64) and torch.equal(a[:, :60], old)
    assert 0 < a[:, 60:].abs().max() < 5
    with torch.no_grad():
        out = model(NEW).logits
        table = (
            model.get_input_embeddings().weight + delta.insertions[0].module.scaling * (b @ a).t()
        )
        delta.detach()
        embeds = nn.functional.embedding(NEW, table)
        expected = model(inputs_embeds=embeds).logits
        delta.attach()
    assert torch.allclose(out, expected, atol=1e-5)
    VERBS[verb](delta, tmp_path)  # which has nothing to do
    assert torch.equal(a_and_b(delta)[0][:, :60], old)
    delta.save_finetuned(tmp_path)
    other = language_model(kind)
    other.resize_token_embeddings(64, mean_resizing=False)
    other.load_state_dict({n: p for n, p in model.state_dict().items() if "lora" not in n}, False)
    loaded = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=other, check_hash=False)
    assert torch.equal(a_and_b(loaded)[0], a)


def test_grown_rows_start_as_loras_do() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 16))
    delta = LoraModel(model, modified_modules=["0"], lora_r=32)
    model[0].weight = nn.Parameter(torch.zeros(1000, 16))  # without the attribute, as ties do
    delta.freeze_module()
    new = a_and_b(delta)[0].detach()[:, 10:]
    assert new.shape == (32, 990) and new.std() == pytest.approx(3**-0.5, rel=0.05)
    assert abs(new.mean()) < 0.02


@pytest.mark.parametrize("verb", ["freeze", "attach"])
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_new_rows_train(kind: str, verb: str, tmp_path: Path) -> None:
    model = language_model(kind)
    delta = LoraModel(model, modified_modules=[EMBEDDINGS[kind]], lora_r=4)
    randomise(delta)
    delta.freeze_module()
    model.resize_token_embeddings(64, mean_resizing=False)  # which freezes the factors, too
    VERBS[verb](delta, tmp_path)
    assert all(p.requires_grad for p in delta.parameters())
    optimizer = torch.optim.Adam(delta.parameters(), lr=0.1)
    old = a_and_b(delta)[0].detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(NEW).logits.square().mean().backward()
        optimizer.step()
    moved = (a_and_b(delta)[0] - old).abs().amax(dim=0) > 0
    assert moved.nonzero().flatten().tolist() == NEW.unique().tolist()


def test_what_is_frozen_stays_so_when_it_grows() -> None:
    model = language_model("llama")
    delta = LoraModel(model, modified_modules=["embed_tokens", "q_proj"], lora_r=4)
    delta.freeze_module(exclude=["deltas", "lm_head"])
    delta.freeze_module(exclude=["q_proj"])
    model.resize_token_embeddings(64, mean_resizing=False)
    delta.attach()
    trained = {name for name, p in delta.named_parameters() if p.requires_grad}
    assert trained and all("q_proj" in name for name in trained)


def test_a_gradient_of_the_old_size_goes() -> None:
    model = language_model("llama")
    delta = LoraModel(model, modified_modules=["embed_tokens"], lora_r=4)
    randomise(delta)
    delta.freeze_module()
    model(OLD).logits.mean().backward()
    model.resize_token_embeddings(64, mean_resizing=False)
    delta.attach()
    assert a_and_b(delta)[0].grad is None
    model(NEW).logits.mean().backward()
    assert a_and_b(delta)[0].grad.shape == (4, 64)


@pytest.mark.parametrize("kind", EMBEDDINGS)
@pytest.mark.parametrize("is_first", [True, False])
def test_noticed_in_a_forward_it_is_refused_with_the_order(
    kind: str, is_first: bool, tmp_path: Path
) -> None:
    model = language_model(kind)
    delta = LoraModel(model, modified_modules=[EMBEDDINGS[kind]], lora_r=4)
    delta.freeze_module()
    if not is_first:
        model(OLD)
    model.resize_token_embeddings(64, mean_resizing=False)
    for ids in (OLD, NEW):
        with pytest.raises(InsertionError, match=r"60 -> 32, and 64 .*attach\(\) or freeze_module"):
            model(ids)
    for verb in ("save", "checkpoint"):
        with pytest.raises(InsertionError, match="60 -> 32, and 64"):
            VERBS[verb](delta, tmp_path)
    with pytest.raises(InsertionError, match="60 -> 32, and 64"):
        delta.merge(untie=True)
    delta.attach()
    model(NEW)
    delta.save_finetuned(tmp_path)


def test_noticed_in_a_routed_batch() -> None:
    model = language_model("llama")
    first, second = (LoraModel(model, modified_modules=["embed_tokens"], lora_r=4) for _ in "ab")
    with opendelta.route(model, [first, second]):
        model(torch.cat([OLD, OLD]))
    model.resize_token_embeddings(64, mean_resizing=False)
    with (
        opendelta.route(model, [first, second]),
        pytest.raises(InsertionError, match=r"60 -> 32, and 64 .*attach\(\) or freeze_module"),
    ):
        model(torch.cat([NEW, NEW]))
    first.freeze_module()  # the others that are attached grow with it
    with opendelta.route(model, [first, second]):
        model(torch.cat([NEW, NEW]))


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_an_embedding_that_shrank_is_refused(kind: str, tmp_path: Path) -> None:
    model, delta = grown(kind, 50)
    for verb in VERBS.values():
        with pytest.raises(InsertionError, match=r"60 -> 32, and 50 .*remove\(\)"):
            verb(delta, tmp_path)
    with pytest.raises(InsertionError, match="60 -> 32, and 50"):
        model(torch.tensor([[3, 4]]))
    delta.remove()
    model(torch.tensor([[3, 4]]))


@pytest.mark.parametrize("method", ["LoraModel", "DoraModel"])
@pytest.mark.parametrize("name", ["first", "last.1"])
def test_a_linear_that_grew_in_place_is_refused(method: str, name: str) -> None:
    model = backbones.build("mlp")
    delta = place(method, "mlp", model)
    host: Any = model.get_submodule(name)
    host.out_features += 2
    host.weight = nn.Parameter(torch.zeros(host.out_features, host.in_features))
    with unchanged(model), pytest.raises(InsertionError, match=f"{name}.*does not fit"):
        delta.freeze_module()
    with pytest.raises(InsertionError, match=f"{name}.*does not fit"):
        model(torch.ones(2, 6))


@pytest.mark.parametrize("method", ["AdapterModel", "LowRankAdapterModel"])
def test_what_does_not_depend_on_the_vocabulary_takes_a_larger_one(
    method: str, tmp_path: Path
) -> None:
    model = language_model("llama")
    delta: DeltaBase = getattr(opendelta, method)(model, modified_modules=["embed_tokens"])
    randomise(delta)
    model.resize_token_embeddings(64, mean_resizing=False)
    delta.freeze_module()
    model(NEW)
    delta.save_finetuned(tmp_path)


def test_growing_is_undone_with_the_rest() -> None:
    """Where freezing fails for another reason, nothing has grown."""
    _, delta = grown("llama")
    with pytest.raises(opendelta.OpenDeltaError):
        delta.freeze_module(exclude=[3])  # type: ignore[list-item]
    assert a_and_b(delta)[0].shape == (4, 60)
