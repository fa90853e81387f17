"""What every method does on every backbone, through the public API."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import backbones
import pytest
import torch
from cases import (
    BACKBONES,
    FOLDING,
    IMPOSSIBLE,
    METHODS,
    OWN_LAYERS,
    PAIRS,
    REENTRANT,
    built,
    loss,
    marked,
    put,
    randomise,
)
from pieces import hook_counts
from placed import contents, unchanged
from safetensors.torch import load_file
from torch import nn
from torch.ao.quantization import quantize_dynamic

import opendelta
from opendelta import AutoDeltaModel
from opendelta.auto_delta import REGISTRY
from opendelta.exceptions import AddressingError, InsertionError

everywhere = pytest.mark.parametrize(("method", "backbone"), marked(PAIRS))


def test_no_method_is_left_out() -> None:
    """Whatever the registry holds of the library's own is a public name, and is tried below."""
    own = {cls for cls in REGISTRY.values() if cls.__module__.startswith("opendelta.")}
    assert own == {getattr(opendelta, method) for method in METHODS}
    assert set(METHODS) >= OWN_LAYERS | {method for method, _ in IMPOSSIBLE}


@pytest.mark.parametrize(("method", "backbone"), sorted(IMPOSSIBLE))
def test_where_a_method_cannot_act_it_says_so(method: str, backbone: str) -> None:
    model = backbones.build(backbone)
    with unchanged(model), pytest.raises((InsertionError, AddressingError)):
        put(method, backbone, model)


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@everywhere
def test_output_is_unchanged_at_initialisation(method: str, backbone: str) -> None:
    bare = backbones.run(backbones.build(backbone), backbone)
    model, _ = built(method, backbone)
    assert torch.equal(backbones.run(model, backbone), bare) is (method in FOLDING)


@everywhere
def test_randomised_delta_changes_the_output(method: str, backbone: str) -> None:
    bare = backbones.run(backbones.build(backbone), backbone)
    model, delta = built(method, backbone)
    randomise(delta)
    assert (backbones.run(model, backbone) - bare).abs().max() > 1e-3


@everywhere
def test_one_step_moves_the_delta_and_nothing_else(method: str, backbone: str) -> None:
    model, delta = built(method, backbone)
    delta.freeze_module()
    randomise(delta)
    before = snapshot(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    loss(model, backbone).backward()
    optimizer.step()
    trained = {id(p) for p in delta.parameters()}
    for name, p in model.named_parameters():
        moved = not torch.equal(p, before[name])
        if id(p) not in trained:
            assert not moved, f"{name} is frozen"
        elif not is_key_bias(name):
            assert moved, f"{name} belongs to the delta"
    assert all(p.grad is not None for p in delta.parameters())


def is_key_bias(name: str) -> bool:
    """The gradient of an attention's key bias is zero: softmax ignores what all keys share."""
    return name.endswith((".key.bias", ".k_proj.bias", ".k.bias", ".key_proj.bias"))


@pytest.mark.parametrize(
    ("method", "backbone"), marked(("LoraModel", backbone) for backbone in BACKBONES)
)
def test_lora_b_moves_first_then_a(method: str, backbone: str) -> None:
    model, delta = built(method, backbone)
    delta.freeze_module()
    optimizer = torch.optim.SGD(delta.parameters(), lr=1.0)
    moved = []
    for _ in range(2):
        before = snapshot(delta)
        optimizer.zero_grad()
        loss(model, backbone).backward()
        optimizer.step()
        moved.append({n for n, p in delta.named_parameters() if not torch.equal(p, before[n])})
    names = {name for name, _ in delta.named_parameters()}
    assert moved[0] == {name for name in names if name.endswith("lora_B")}
    assert moved[1] == names


@everywhere
def test_freezing_twice_leaves_the_same_trainable_set(method: str, backbone: str) -> None:
    model, delta = built(method, backbone)
    sets = []
    for train in (True, False, True):
        model.train(train)
        delta.freeze_module()
        sets.append({n for n, p in model.named_parameters() if p.requires_grad})
        assert model.training is train
    assert sets[0] == sets[1] == sets[2] == {n for n, _ in named_as_on(model, delta)}


def named_as_on(model: nn.Module, delta: nn.Module) -> list[tuple[str, nn.Parameter]]:
    own = {id(p) for p in delta.parameters()}
    return [(name, p) for name, p in model.named_parameters() if id(p) in own]


@everywhere
def test_the_backbone_stays_the_users_own_object(method: str, backbone: str) -> None:
    model = backbones.build(backbone)
    seen = (type(model), inspect.signature(model.forward), model.forward.__doc__, set(dir(model)))
    forwards = {name: type(m).forward for name, m in model.named_modules()}
    values = {key: value for key, value in vars(model).items() if not key.endswith("_hooks")}
    children = dict(model.named_children())
    delta = put(method, backbone, model)
    added = dict(model.named_children()).keys() - children.keys()  # a prompt before the first
    assert all(model.get_submodule(name) in set(delta.modules()) for name in added)
    names = set(dir(model)) - added
    assert seen == (type(model), inspect.signature(model.forward), model.forward.__doc__, names)
    for name, m in model.named_modules():
        assert "forward" not in vars(m)
        assert forwards.get(name, type(m).forward) is type(m).forward
    assert {k for k in vars(model) if not k.endswith("_hooks")} == set(values)
    assert all(vars(model)[key] is value for key, value in values.items())


@everywhere
def test_save_and_load_into_a_fresh_backbone(method: str, backbone: str, tmp_path: Path) -> None:
    model, delta = built(method, backbone)
    delta.freeze_module()
    randomise(delta)
    delta.save_finetuned(tmp_path)
    fresh = backbones.build(backbone)
    loaded = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    assert type(loaded) is type(delta)
    assert torch.equal(backbones.run(fresh, backbone), backbones.run(model, backbone))


def check_independent_copy(model: nn.Module, twin: nn.Module, backbone: str) -> None:
    """`twin` computes what `model` does, with a delta of its own."""
    with_delta = backbones.run(model, backbone)
    assert torch.equal(backbones.run(twin, backbone), with_delta)
    (theirs,), (ours,) = opendelta.deltas(twin), opendelta.deltas(model)
    assert type(theirs) is type(ours) and theirs is not ours
    assert theirs.backbone_model is twin
    assert not {id(p) for p in theirs.parameters()} & {id(p) for p in ours.parameters()}
    own = {id(p) for p in twin.parameters()}
    assert all(id(p) in own for p in theirs.parameters())
    assert all(getattr(p, "_is_delta", False) for p in theirs.parameters())
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.5)
    assert torch.equal(backbones.run(model, backbone), with_delta)
    assert not torch.equal(backbones.run(twin, backbone), with_delta)
    theirs.detach()
    assert torch.equal(backbones.run(model, backbone), with_delta)
    bare = backbones.run(backbones.build(backbone), backbone)
    assert torch.equal(backbones.run(twin, backbone), bare)


@everywhere
def test_deepcopy(method: str, backbone: str) -> None:
    model, delta = built(method, backbone)
    delta.freeze_module()
    randomise(delta)
    twin = copy.deepcopy(model)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {n for n, p in twin.named_parameters() if p.requires_grad} == trainable
    assert set(twin.state_dict()) == set(model.state_dict())
    check_independent_copy(model, twin, backbone)


@everywhere
def test_pickle(method: str, backbone: str, tmp_path: Path) -> None:
    model, delta = built(method, backbone)
    delta.freeze_module()
    randomise(delta)
    torch.save(model, tmp_path / "model.pt")
    check_independent_copy(model, torch.load(tmp_path / "model.pt", weights_only=False), backbone)


_IN_A_NEW_PROCESS = """
import sys
sys.path[:0] = sys.argv[1].split("|")
import torch, backbones, opendelta
from cases import put, randomise
torch.set_num_threads(1)
results = {}
for file in sys.argv[2:]:
    method, backbone = file.rsplit("/", 1)[-1].removesuffix(".pt").split("@")
    model = torch.load(file, weights_only=False)
    first = backbones.run(model, backbone)
    second = put(method, backbone, model)
    randomise(second, 0.3)
    both = backbones.run(model, backbone)
    second.detach()
    one = backbones.run(model, backbone)
    results[file] = (first, both, one, [d.delta_type for d in opendelta.deltas(model)])
torch.save(results, sys.argv[2] + ".out")
"""


@pytest.mark.parametrize("backbone", ["bert", "t5", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_pickle_in_a_new_process_that_adds_another_delta(backbone: str, tmp_path: Path) -> None:
    files, expected = [], {}
    for method in METHODS:
        model, delta = built(method, backbone)
        randomise(delta)
        files.append(str(tmp_path / f"{method}@{backbone}.pt"))
        torch.save(model, files[-1])
        one = backbones.run(model, backbone)
        randomise(put(method, backbone, model), 0.3)
        expected[files[-1]] = (one, backbones.run(model, backbone))
    here = Path(__file__).parent
    script = [sys.executable, "-c", _IN_A_NEW_PROCESS, f"{here}|{here / 'golden'}", *files]
    subprocess.run(script, check=True, cwd=here.parent)
    for file, (first, both, one, kinds) in torch.load(files[0] + ".out").items():
        assert torch.equal(first, expected[file][0]), file
        assert torch.equal(one, expected[file][0]), file
        assert torch.equal(both, expected[file][1]), file
        assert not torch.equal(first, both), file
        assert len(kinds) == 2


@everywhere
@pytest.mark.parametrize("frozen", [False, True])
def test_detach_gives_the_bare_backbone_and_attach_the_delta(
    method: str, backbone: str, frozen: bool
) -> None:
    plain = backbones.build(backbone)
    model, delta = built(method, backbone)
    randomise(delta)
    if frozen:
        delta.freeze_module()
    with_delta, keys = backbones.run(model, backbone), list(model.state_dict())
    grads = {n: p.requires_grad for n, p in model.named_parameters()}
    delta.detach()
    assert torch.equal(backbones.run(model, backbone), backbones.run(plain, backbone))
    state, expected = model.state_dict(), plain.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    for name, p in model.named_parameters():
        if not name.endswith("bias"):  # BitFit's biases are other tensors while it is attached
            assert p.requires_grad == grads[name]
    delta.attach()
    assert torch.equal(backbones.run(model, backbone), with_delta)
    assert set(model.state_dict()) == set(keys)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == grads


@everywhere
def test_remove_leaves_no_trace(method: str, backbone: str) -> None:
    plain, model = backbones.build(backbone), backbones.build(backbone)
    hooks = {n: hook_counts(m) for n, m in model.named_modules()}
    delta = put(method, backbone, model)
    delta.freeze_module()
    randomise(delta)
    delta.remove()
    assert {n: hook_counts(m) for n, m in model.named_modules()} == hooks
    assert torch.equal(backbones.run(model, backbone), backbones.run(plain, backbone))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert all(p.requires_grad for p in model.parameters() if p.is_floating_point())
    assert opendelta.deltas(model) == []
    assert str(model) == str(plain)


@everywhere
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(method: str, backbone: str, dtype: torch.dtype) -> None:
    exact, delta = built(method, backbone)
    randomise(delta, 0.05)
    reference = backbones.run(exact, backbone)
    model = backbones.build(backbone).to(dtype)
    delta = put(method, backbone, model)
    assert {p.dtype for p in delta.parameters()} == {dtype}
    randomise(delta, 0.05)
    delta.freeze_module()
    rounded = backbones.inputs(backbone)
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in rounded.items()}
    result = model(**given)
    result = result if isinstance(result, torch.Tensor) else result[0]
    assert result.dtype == dtype
    error = (result.float() - reference).abs().max() / reference.abs().max()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02)
    result.float().pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in delta.parameters())


@everywhere
def test_a_delta_in_float32_on_a_backbone_in_16_bits(
    method: str, backbone: str, tmp_path: Path
) -> None:
    """What a GradScaler asks for: trained and saved in float32, with autocast and without."""
    dtype = torch.float16
    given = {
        k: v.to(dtype) if v.is_floating_point() else v
        for k, v in backbones.inputs(backbone).items()
    }

    def run(model: nn.Module) -> torch.Tensor:
        result = model(**given)
        return (result if isinstance(result, torch.Tensor) else result[0]).float()

    model = backbones.build(backbone).to(dtype)
    delta = put(method, backbone, model)
    randomise(delta, 0.05)
    in_16_bits = run(model).detach()
    delta.float()
    delta.freeze_module()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    torch.testing.assert_close(run(model), in_16_bits, atol=2e-2, rtol=2e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for autocast in (True, False):
        before = [p.detach().clone() for p in delta.parameters()]
        with torch.autocast("cpu", dtype, enabled=autocast):
            cost = run(model).square().mean()
        scaler.scale(cost).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = [not torch.equal(p, b) for p, b in zip(delta.parameters(), before, strict=True)]
        assert any(moved) and all(p.isfinite().all() for p in delta.parameters())
    delta.save_finetuned(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in saved.values() if t.is_floating_point()} == {torch.float32}
    other = backbones.build(backbone).to(dtype)
    AutoDeltaModel.from_finetuned(tmp_path, backbone_model=other).float()
    torch.testing.assert_close(run(other), run(model), atol=2e-2, rtol=2e-2)
    with_delta = run(model).detach()
    delta.detach()
    assert torch.equal(run(model), run(backbones.build(backbone).to(dtype).requires_grad_(False)))
    delta.attach()
    assert torch.equal(run(model), with_delta)
    delta.half()
    assert {p.dtype for p in model.parameters()} == {dtype}
    torch.testing.assert_close(run(model), with_delta, atol=2e-2, rtol=2e-2)


@everywhere
def test_dynamic_quantisation_after_a_delta(method: str, backbone: str) -> None:
    """It runs, or is refused: torch puts modules without the deltas in the place of those with."""
    model, delta = built(method, backbone)
    randomise(delta)
    expected = backbones.run(model, backbone)
    on_linears = any(type(i.host) is nn.Linear and i.dispatcher for i in delta.insertions)

    def quantised(model: nn.Module) -> torch.Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return backbones.run(quantize_dynamic(model, {nn.Linear}, torch.qint8), backbone)

    if on_linears:
        for attached in (True, False):
            with pytest.raises(InsertionError, match="took over its hooks.*merge_and_remove"):
                quantised(model)
            if attached:
                delta.detach()
        delta.attach()
        if method not in FOLDING:
            return
        delta.merge_and_remove()
    assert (quantised(model) - expected).norm() < 0.25 * expected.norm()


@pytest.mark.parametrize(("method", "backbone"), marked(pair for pair in PAIRS if pair[1] != "mlp"))
@pytest.mark.parametrize("reentrant", REENTRANT)
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
def test_gradient_checkpointing(method: str, backbone: str, reentrant: bool) -> None:
    grads = []
    for checkpointing in (False, True):
        model, delta = built(method, backbone)
        randomise(delta)
        delta.freeze_module()
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss(model, backbone).backward()
        grads.append({n: p.grad for n, p in delta.named_parameters()})
    assert all(g is not None for g in grads[0].values())
    for name, expected in grads[0].items():
        actual = grads[1][name]
        assert actual is not None, name
        assert (actual - expected).abs().max() < 1e-6 + 1e-5 * expected.abs().max(), name


LANGUAGE_MODELS = ("gpt2", "opt", "llama", "t5")


@pytest.mark.parametrize(
    ("method", "backbone"), marked(pair for pair in PAIRS if pair[1] in LANGUAGE_MODELS)
)
def test_generation_agrees_with_and_without_cache(method: str, backbone: str) -> None:
    model, delta = built(method, backbone)
    ids = backbones.inputs(backbone)["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    plain = model.generate(ids, use_cache=True, **options)
    randomise(delta)
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert plain.shape[0] == cached.shape[0]


# BitFit is folded into biases that the backbone has: of these some, or all, have none.
NO_BIAS = {("BitFitModel", b) for b in ("gpt2", "opt", "t5", "llama", "mlp")}


@everywhere
def test_merged_into_the_weights_or_refused_in_words(method: str, backbone: str) -> None:
    model, delta = built(method, backbone)
    randomise(delta)
    with_delta, before = backbones.run(model, backbone), contents(model)
    if method in OWN_LAYERS or (method, backbone) in NO_BIAS:
        with unchanged(model), pytest.raises(InsertionError, match="merge"):
            delta.merge()
        return
    delta.merge()
    assert delta.is_merged and not delta.is_attached
    merged = backbones.run(model, backbone)
    assert (merged - with_delta).abs().max() < 1e-5 * max(1, with_delta.abs().max())
    assert not set(model.state_dict()) & {name for name, _ in delta.named_parameters()} - set(
        backbones.build(backbone).state_dict()
    )
    delta.unmerge()
    assert contents(model) == before
    assert torch.equal(backbones.run(model, backbone), with_delta)
