"""Mixed batches: a routed batch computes what its rows compute apart, each with its own delta."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any

import backbones
import cases
import pytest
import torch
import weights
from cases import REENTRANT
from placed import unchanged
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import opendelta
from opendelta import (
    AdapterModel,
    BaseDeltaConfig,
    BitFitModel,
    CompacterModel,
    DeltaBase,
    LoraModel,
    LowRankAdapterModel,
    OpenDeltaError,
    ParallelAdapterModel,
    PrefixModel,
    SoftPromptModel,
)
from opendelta.exceptions import ConfigError, InsertionError

Rows = Sequence[DeltaBase | None]

# Two deltas of each method, of different sizes where rows may differ in that.
METHODS: dict[str, Callable[[nn.Module, int], DeltaBase]] = {
    "lora": lambda model, i: LoraModel(model, lora_r=2 + i, lora_alpha=3 + i),
    "adapter": lambda model, i: AdapterModel(model, bottleneck_dim=3 + i),
    "low_rank_adapter": lambda model, i: LowRankAdapterModel(model, reduction_factor=4 + 4 * i),
    "compacter": lambda model, i: CompacterModel(model, reduction_factor=4 + 4 * i),
    "parallel_adapter": lambda model, i: ParallelAdapterModel(model, bottleneck_dim=3 + i),
    "bitfit": lambda model, i: BitFitModel(model),
    "prefix": lambda model, i: PrefixModel(
        model, prefix_token_num=2 + 3 * i, reparameterize=i == 0, embed_dim=8, mid_dim=8
    ),
    "soft_prompt": lambda model, i: SoftPromptModel(model, soft_token_num=3),
}
METHODS |= {  # and of any other method that is public
    cls.delta_type: lambda model, i, cls=cls: cls(model)
    for cls in (getattr(opendelta, name) for name in cases.METHODS)
    if cls.delta_type not in METHODS
}
BACKBONES = ("bert", "gpt2", "llama", "t5")
MIXED = [name for name in METHODS if name != "soft_prompt"]


def put(method: str, model: nn.Module, i: int = 0) -> DeltaBase:
    """A delta with numbers of its own, detached."""
    delta = METHODS[method](model, i)
    with torch.no_grad():
        for name, p in delta.named_parameters():
            p.copy_(weights.uniform(f"{method} {i} {name}", p.shape, 0.25))
    delta.detach()
    return delta


def rows_for(method: str, model: nn.Module) -> Rows:
    """Four rows with two deltas of a method, and one without any where that may be."""
    first, second = put(method, model), put(method, model, 1)
    return [first, second, second if method == "soft_prompt" else None, first]


def batch(backbone: str, rows: int) -> dict[str, Tensor]:
    """As many different rows as asked for."""

    def many(name: str, value: Tensor) -> Tensor:
        parts = [(value * (7 + i)) % 125 + 2 if "ids" in name else value for i in range(4)]
        return torch.cat(parts)[:rows]

    return {name: many(name, value) for name, value in backbones.inputs(backbone).items()}


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits, the last hidden state, or the tensor that is returned."""
    output = model(**inputs)
    if isinstance(output, Tensor):
        return output
    logits: Tensor | None = getattr(output, "logits", None)
    result: Tensor = output.last_hidden_state if logits is None else logits
    return result


def alone(
    model: nn.Module, rows: Rows, inputs: dict[str, Tensor], compute: Callable[..., Any] = run
) -> list[Any]:
    """What each row computes alone, with its delta attached and no other."""
    results = []
    for number, delta in enumerate(rows):
        for other in opendelta.deltas(model):
            other.detach()
        if delta is not None:
            delta.attach()
        results.append(compute(model, {k: v[number : number + 1] for k, v in inputs.items()}))
    for other in opendelta.deltas(model):
        other.detach()
    return results


def close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


def gradients(rows: Rows) -> list[Tensor]:
    """The gradients of all deltas, taken away from them."""
    taken = []
    for delta in dict.fromkeys(rows):
        for p in () if delta is None else delta.parameters():
            taken.append(torch.zeros_like(p) if p.grad is None else p.grad)
            p.grad = None
    return taken


# --- what is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("method", METHODS)
def test_a_routed_batch_equals_its_rows_apart(method: str, backbone: str) -> None:
    model = backbones.build(backbone).requires_grad_(False).double()
    rows, inputs = rows_for(method, model), batch(backbone, 4)
    apart = torch.cat(alone(model, rows, inputs))
    target = weights.uniform("target", apart.shape, 1.0)
    (apart * target).sum().backward()
    expected = gradients(rows)
    bare = run(model, inputs)
    with opendelta.route(model, rows):
        routed = run(model, inputs)
    close(routed, apart)
    (routed * target).sum().backward()
    for actual, wanted in zip(gradients(rows), expected, strict=True):
        close(actual, wanted)
    if bare.shape == routed.shape:
        for number, delta in enumerate(rows):
            assert ((routed - bare)[number].abs().max() > 1e-2) == (delta is not None)


@pytest.mark.parametrize("backbone", [*BACKBONES, "bart", "opt", "vit"])
def test_methods_and_ranks_mix_in_one_batch(backbone: str) -> None:
    model = backbones.build(backbone).requires_grad_(False)
    rows: Rows = [None, *(put(name, model, i) for i in (0, 1) for name in MIXED)]
    rows = [rows[(5 * number) % len(rows)] for number in range(8)]
    inputs = batch(backbone, 8)
    apart = torch.cat(alone(model, rows, inputs))
    for delta in opendelta.deltas(model)[::3]:
        delta.attach()  # whatever is attached, the list alone says what acts
    with unchanged(model), opendelta.route(model, rows), torch.no_grad():
        close(run(model, inputs), apart)


@pytest.mark.parametrize("method", MIXED)
def test_what_is_attached_but_not_named_does_not_act(method: str) -> None:
    model = backbones.build("gpt2")
    named, other = put("lora", model), put(method, model, 1)
    inputs = batch("gpt2", 2)
    (first, second) = alone(model, [named, None], inputs)
    other.attach()
    named.attach()
    acting = run(model, inputs)
    with unchanged(model):
        with opendelta.route(model, [named, None]), torch.no_grad():
            routed = run(model, inputs)
        close(routed, torch.cat([first, second]))
        with opendelta.route(model, [None, None]), torch.no_grad():
            assert torch.equal(run(model, inputs)[1:], second)
    assert torch.equal(run(model, inputs), acting)


def test_what_is_not_named_gets_no_gradient() -> None:
    model = backbones.build("bert").requires_grad_(False)
    others = [put(name, model, 1) for name in MIXED]
    for other in others:
        other.attach()
    named = put("bitfit", model)
    with opendelta.route(model, [named, None]):
        run(model, batch("bert", 2)).sum().backward()
    assert all(p.grad is None for other in others for p in other.parameters())
    assert any(p.grad is not None and p.grad.any() for p in named.parameters())


def test_one_delta_on_all_rows_is_that_delta_attached() -> None:
    model = backbones.build("llama")
    for method in METHODS:
        delta = put(method, model)
        with delta.attached():
            expected = run(model, batch("llama", 3))
        with opendelta.route(model, [delta] * 3):
            close(run(model, batch("llama", 3)), expected)
        delta.remove()


def test_a_detached_delta_follows_its_backbone() -> None:
    model = backbones.build("gpt2")
    deltas = [put(method, model) for method in ("lora", "adapter", "bitfit", "prefix")]
    model.double()  # what is detached stays behind, until it is needed
    inputs = batch("gpt2", 4)
    with opendelta.route(model, deltas):
        routed = run(model, inputs)
    own = [p for delta in deltas if type(delta) is not BitFitModel for p in delta.parameters()]
    assert {p.dtype for p in own} == {torch.float64}
    assert routed.dtype == torch.float64
    close(routed, torch.cat(alone(model, deltas, inputs)))


def test_dropout_of_routed_loras_is_drawn_for_each_row() -> None:
    model: Any = nn.Sequential(nn.Linear(6, 5))
    deltas = [LoraModel(model, modified_modules=["0"], lora_dropout=p) for p in (0.0, 0.5)]
    for delta in deltas:
        with torch.no_grad():
            for p in delta.parameters():
                p.fill_(1.0)
        delta.detach()
    model.train()
    x = torch.ones(2, 4000, 6)
    with opendelta.route(model, deltas):
        term = (model(x) - model[0].forward(x))[..., 0] / 16
    assert torch.allclose(term[0], torch.full((4000,), 6.0), atol=1e-4)
    assert abs(term[1].mean() - 6) < 0.2
    assert term[1].unique().numel() > 5
    for delta in deltas:
        delta.attach()
    deltas[1].eval()
    other = LoraModel(model, lora_dropout=0.5, modified_modules=["0"])
    with opendelta.route(model, [other, deltas[1]]):
        term = (model(x) - model[0].forward(x))[..., 0] / 16
    assert torch.allclose(term[1], torch.full((4000,), 6.0), atol=1e-4)


def test_lora_on_convolutions_and_embeddings_and_biases_by_channel() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 6)
            self.conv = nn.Conv1d(6, 4, 3)
            self.norm = nn.GroupNorm(2, 4)
            self.flat = nn.Linear(4, 5, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            hidden = self.norm(self.conv(self.embed(ids).transpose(1, 2)))
            lines: Tensor = self.flat(hidden.transpose(1, 2).flatten(0, 1))  # (rows * tokens, 4)
            return lines.view(len(ids), -1, 5)

    model = Net().eval()
    places = ["embed", "conv", "flat"]
    made: list[DeltaBase] = [LoraModel(model, lora_r=r, modified_modules=places) for r in (1, 2)]
    made += [BitFitModel(model, modified_modules=places[1:] + ["norm"]) for _ in range(2)]
    made += [AdapterModel(model, modified_modules=places) for _ in range(2)]
    for number, delta in enumerate(made):
        with torch.no_grad():
            for name, p in delta.named_parameters():
                p.copy_(weights.uniform(f"{number} {name}", p.shape, 0.5))
        delta.detach()
    rows = [*made[::2], None, *made[1::2], made[0]]
    inputs = {"ids": torch.arange(64).view(8, 8) % 9}
    apart = torch.cat(alone(model, rows, inputs))
    with opendelta.route(model, rows):
        close(run(model, inputs), apart)


def test_a_method_of_ones_own_is_routed_as_it_is() -> None:
    class Scale(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(width))

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden * self.factor

    class ScaleConfig(BaseDeltaConfig):
        """Nothing of its own."""

    class ScaleModel(DeltaBase):
        delta_type = "scale_for_routing"
        config_class = ScaleConfig

        def __init__(self, backbone_model: nn.Module, modified_modules: list[str]) -> None:
            self._construct(locals())

        def update_module(self, module: nn.Module, key: str) -> None:
            _, _, target = self.find_module(module, key)
            widths = self.widths(target)
            for side, width in zip(("before", "after"), widths, strict=True):
                self.insert_module(target, side, Scale(width), f"scale_{side}")

    model = backbones.build("mlp")
    deltas = [ScaleModel(model, ["first", "last.1"]) for _ in range(2)]
    for number, delta in enumerate(deltas):
        for name, p in delta.named_parameters():
            p.data = weights.uniform(f"{number} {name}", p.shape, 2.0)
        delta.detach()
    rows = [deltas[0], None, deltas[1], deltas[0]]
    inputs = backbones.inputs("mlp")
    apart = torch.cat(alone(model, rows, inputs))
    with opendelta.route(model, rows):
        close(run(model, inputs), apart)


# --- generation -----------------------------------------------------------------------------------

GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "returned beams": {"num_beams": 3, "num_return_sequences": 2},
    "without a cache": {"use_cache": False},
}


@pytest.mark.parametrize("how", GENERATION)
@pytest.mark.parametrize("backbone", ["gpt2", "llama", "t5"])
def test_generation_equals_that_of_rows_apart(backbone: str, how: str) -> None:
    model: Any = backbones.build(backbone)
    rows: Rows = [put("lora", model), None, put("prefix", model), put("bitfit", model)]
    rows = [*rows, put("prefix", model, 1), put("adapter", model), put("lora", model, 1)]
    generates(model, rows, backbone, GENERATION[how])


@pytest.mark.parametrize("how", ["greedy", "beams"])
@pytest.mark.parametrize("backbone", ["gpt2", "t5"])
def test_generation_with_soft_prompts(backbone: str, how: str) -> None:
    model: Any = backbones.build(backbone)
    generates(model, rows_for("soft_prompt", model), backbone, GENERATION[how])


def generates(model: Any, rows: Rows, backbone: str, options: dict[str, Any]) -> None:
    model.generation_config.eos_token_id = None
    inputs = batch(backbone, len(rows))
    inputs = {name: value for name, value in inputs.items() if "decoder" not in name}
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])

    def generate(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        ids: Tensor = model.generate(**inputs, max_new_tokens=6, pad_token_id=0, **options)
        return ids

    apart = torch.cat(alone(model, rows, inputs, generate))
    bare = generate(model, inputs)
    with unchanged(model), opendelta.route(model, rows):
        assert torch.equal(generate(model, inputs), apart)
    assert not torch.equal(bare, apart)


# --- the context ----------------------------------------------------------------------------------


def test_an_inner_route_takes_the_place_of_the_outer_one() -> None:
    model = backbones.build("bert")
    a, b = put("lora", model), put("bitfit", model)
    inputs = batch("bert", 2)
    expected = {rows: torch.cat(alone(model, rows, inputs)) for rows in [(a, b), (b, None)]}
    b.attach()
    with unchanged(model), torch.no_grad(), opendelta.route(model, [a, b]):
        close(run(model, inputs), expected[a, b])
        with opendelta.route(model, (b, None)):
            close(run(model, inputs), expected[b, None])
            close(run(model, inputs), expected[b, None])
        close(run(model, inputs), expected[a, b])


def test_routes_on_two_backbones_do_not_meet() -> None:
    first, second = backbones.build("bert"), backbones.build("bert")
    a, b, c = put("lora", first), put("adapter", first), put("lora", second, 1)
    inputs = batch("bert", 2)
    expected = torch.cat(alone(first, [a, b], inputs)), torch.cat(alone(second, [None, c], inputs))
    c.attach()
    whole = run(second, inputs)
    with opendelta.route(first, [a, b]):
        close(run(second, inputs), whole)
        with opendelta.route(second, [None, c]):
            close(run(first, inputs), expected[0])
            close(run(second, inputs), expected[1])


@pytest.mark.parametrize("method", METHODS)
def test_an_error_inside_leaves_the_backbone_as_before(method: str) -> None:
    model = backbones.build("gpt2")
    rows = rows_for(method, model)
    assert rows[0] is not None
    rows[0].attach()
    inputs = batch("gpt2", 4)
    expected = run(model, inputs)
    handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)  # type: ignore[union-attr]
    error = pytest.raises(ZeroDivisionError)
    with unchanged(model), error, opendelta.route(model, rows), torch.no_grad():
        run(model, inputs)
    handle.remove()
    assert torch.equal(run(model, inputs), expected)


def test_what_is_switched_inside_acts_afterwards() -> None:
    model = backbones.build("gpt2")
    attached, detached, removed = (put("bitfit", model, i) for i in range(3))
    attached.attach()
    removed.attach()
    inputs = batch("gpt2", 2)
    with torch.no_grad():
        expected = torch.cat(alone(model, [detached, None], inputs))
        attached.attach()
        removed.attach()
        with opendelta.route(model, [detached, None]):
            assert attached.is_attached and not detached.is_attached
            with attached.detached(), detached.attached():
                close(run(model, inputs), expected)
            detached.attach()
            attached.detach()
            removed.remove()
            close(run(model, inputs), expected)
        assert detached.is_attached and not attached.is_attached and not removed.is_attached
        expected = torch.cat(alone(model, [detached, detached], inputs))
        detached.attach()
        close(run(model, inputs), expected)


def test_what_is_constructed_inside_does_not_act() -> None:
    model = backbones.build("gpt2")
    rows = [put("lora", model), None]
    inputs = batch("gpt2", 2)
    with torch.no_grad(), opendelta.route(model, rows):
        expected = run(model, inputs)
        put("adapter", model).attach()
        assert torch.equal(run(model, inputs), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps], ids=["copied", "pickled"])
def test_a_backbone_is_not_copied_inside(copied: Callable[[nn.Module], Any]) -> None:
    model = backbones.build("gpt2")
    delta = put("bitfit", model)
    with (
        unchanged(model),
        opendelta.route(model, [delta, None]),
        pytest.raises(InsertionError, match="route"),
    ):
        copied(model)


def test_threads_have_their_own_routes() -> None:
    model = backbones.build("bert")
    deltas = [put(method, model) for method in ("lora", "prefix", "bitfit", "parallel_adapter")]
    deltas[0].attach()
    inputs = batch("bert", 2)
    lists: list[Rows] = [[deltas[i], deltas[i - 1]] for i in range(4)]
    expected = [torch.cat(alone(model, rows, inputs)) for rows in lists]
    deltas[0].attach()
    together = threading.Barrier(5)
    results: dict[int, Tensor] = {}

    def meet(*_: Any) -> None:  # every thread stands in the middle of its forward
        together.wait(timeout=60)

    def work(number: int) -> None:
        with torch.no_grad():
            if number == 4:  # this one is in no route
                results[number] = run(model, inputs)
                return
            with opendelta.route(model, lists[number]):
                results[number] = run(model, inputs)

    whole = run(model, inputs)
    handle = model.encoder.layer[1].register_forward_pre_hook(meet)  # type: ignore[union-attr,index]
    with unchanged(model):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    handle.remove()
    for number in range(4):
        close(results[number], expected[number])
    close(results[4], whole)


@pytest.mark.parametrize("when", ["before the forward", "after the forward"])
def test_a_route_may_end_while_another_thread_calls_its_hooks(when: str) -> None:
    model: Any = backbones.build("bert")
    delta = put("bitfit", model)
    inputs = batch("bert", 1)
    expected = run(model, inputs)
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with opendelta.route(model, [delta]):
            entered.set()
            leave.wait(timeout=60)

    thread = threading.Thread(target=work)
    thread.start()
    entered.wait(timeout=60)
    host, register = {  # torch has listed the module's own hooks when it runs these
        "before the forward": (model, torch_module.register_module_forward_pre_hook),
        "after the forward": (
            model.encoder.layer[0].attention.self.query,
            torch_module.register_module_forward_hook,
        ),
    }[when]

    def end(module: nn.Module, *_: Any) -> None:
        if module is host:
            leave.set()
            thread.join()

    handle = register(end)
    try:
        assert torch.equal(run(model, inputs), expected)
    finally:
        handle.remove()
        leave.set()


@pytest.mark.parametrize("thread", ["the same", "another"])
@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing(reentrant: bool, thread: str) -> None:
    """A device's backward runs in a thread of its own, where the forward is run again."""
    model: Any = backbones.build("llama").requires_grad_(False).train()
    rows: Rows = [put("lora", model), put("prefix", model), None, put("bitfit", model)]
    inputs = batch("llama", 4)
    with opendelta.route(model, rows):
        run(model, inputs).pow(2).mean().backward()
    expected = gradients(rows)
    assert all(any(g.any() for g in expected[i::5]) for i in range(5))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.disable_input_require_grads()  # some models have no embeddings that could
    with opendelta.route(model, rows):
        loss = run(model, inputs).pow(2).mean()
        backward: Callable[[], None] = loss.backward
        if thread == "another":
            worker = threading.Thread(target=backward)
            worker.start()
            worker.join()
        else:
            backward()
    for actual, wanted in zip(gradients(rows), expected, strict=True):
        close(actual, wanted)


def test_a_compiled_backbone_runs_eagerly_in_a_route() -> None:
    torch.compiler.reset()
    model = backbones.build("gpt2")
    a, b = put("lora", model), put("bitfit", model)
    inputs = batch("gpt2", 2)
    apart = torch.cat(alone(model, [a, b], inputs))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    bare = run(model, inputs)
    close(run(compiled, inputs), bare)  # type: ignore[arg-type]
    with opendelta.route(compiled, [a, b]):  # type: ignore[arg-type]
        close(run(compiled, inputs), apart)  # type: ignore[arg-type]
    a.attach()
    close(run(compiled, inputs), run(model, inputs))  # type: ignore[arg-type]
    torch.compiler.reset()


# --- bad input ------------------------------------------------------------------------------------


def wrong_lists() -> dict[str, tuple[Callable[[nn.Module], Any], str]]:
    def removed(model: nn.Module) -> list[DeltaBase]:
        delta = put("lora", model)
        delta.remove()
        return [delta, delta]

    def merged(model: nn.Module) -> list[DeltaBase | None]:
        delta = LoraModel(model)
        delta.merge()
        return [delta, None]

    def soft(model: nn.Module) -> list[DeltaBase]:
        return [SoftPromptModel(model, soft_token_num=2), SoftPromptModel(model, soft_token_num=3)]

    return {
        "nothing": (lambda model: [], r"\[\]"),
        "no list": (lambda model: put("lora", model), "list"),
        "a name": (lambda model: [None, "lora"], r"deltas\[1\] is a str"),
        "another backbone's": (
            lambda model: [None, put("lora", backbones.build("gpt2"))],
            r"deltas\[1\] is a LoraModel that is not on this backbone",
        ),
        "removed": (removed, "removed"),
        "merged": (merged, "merged"),
        "soft prompts of two lengths": (soft, r"\[2, 3\]"),
        "a soft prompt and none": (lambda model: [put("soft_prompt", model), None], r"\[3, 0\]"),
    }


@pytest.mark.parametrize("what", wrong_lists())
def test_a_wrong_list_raises_on_entry(what: str) -> None:
    model = backbones.build("gpt2")
    put("bitfit", model).attach()
    make, message = wrong_lists()[what]
    rows = make(model)
    error = pytest.raises(OpenDeltaError, match=message)
    with unchanged(model), error, opendelta.route(model, rows):
        pytest.fail("entered")


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_a_list_that_is_not_as_long_as_the_batch_raises_in_the_forward(count: int) -> None:
    model = backbones.build("gpt2")
    delta = put("lora", model)
    error = pytest.raises(ConfigError, match=f"4 rows .* {count} deltas")
    with unchanged(model), error, opendelta.route(model, [delta] * count), torch.no_grad():
        run(model, batch("gpt2", 4))
    with opendelta.route(model, [delta] * 4):
        run(model, batch("gpt2", 4))


def test_a_module_whose_rows_cannot_be_told_is_named() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert = nn.Linear(6, 6)
            self.all = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            chosen: Tensor = self.expert(x.flatten(0, 1)[:5])
            result: Tensor = self.all(x)
            return result + chosen.sum()

    model = Experts()
    x = {"x": torch.ones(2, 3, 6)}
    for make in (LoraModel, AdapterModel, BitFitModel):
        bad, good = (make(model, modified_modules=[name]) for name in ("expert", "all"))
        with opendelta.route(model, [bad, None]), pytest.raises(InsertionError, match="'expert'"):
            run(model, x)
        with opendelta.route(model, [good, None]):
            run(model, x)


def test_a_bias_that_is_not_added_to_an_output_raises_on_entry() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.odd = Odd()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.odd(self.attention(x, x, x)[0])
            return result

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.bias) ** 2

    model = Read()
    for name in ("attention", "odd"):
        delta = BitFitModel(model, modified_modules=[name])
        error = pytest.raises(InsertionError, match=f"'bias' in '{name}")
        with unchanged(model), error, opendelta.route(model, [delta, None]):
            pytest.fail("entered")
        delta.remove()


def test_a_replaced_module_cannot_be_routed_but_stands_aside() -> None:
    class SwapConfig(BaseDeltaConfig):
        """Nothing of its own."""

    class SwapModel(DeltaBase):
        delta_type = "swap_for_routing"
        config_class = SwapConfig

        def __init__(self, backbone_model: nn.Module, modified_modules: list[str]) -> None:
            self._construct(locals())

        def update_module(self, module: nn.Module, key: str) -> None:
            parent, child_name, child = self.find_module(module, key)
            self.replace_module(parent, child_name, child, nn.Linear(6, 8))

    model = backbones.build("mlp")
    inputs = backbones.inputs("mlp")
    bare = run(model, inputs)
    swap = SwapModel(model, ["first"])
    swapped = run(model, inputs)
    with unchanged(model):
        with pytest.raises(InsertionError, match="'first'"), opendelta.route(model, [swap] * 4):
            pytest.fail("entered")
        with opendelta.route(model, [None] * 4), torch.no_grad():
            assert torch.equal(run(model, inputs), bare)
    assert torch.equal(run(model, inputs), swapped)
    assert not torch.equal(bare, swapped)


def test_data_parallel_is_refused() -> None:
    model = nn.DataParallel(backbones.build("bert"))
    delta = LoraModel(model.module)
    with pytest.raises(InsertionError, match="DataParallel"), opendelta.route(model, [delta]):
        pass
