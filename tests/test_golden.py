"""Parity with OpenDelta 0.3.2 on its recorded behaviour (tests/golden/README.md)."""

from __future__ import annotations

import importlib
import json
import re
import statistics
import warnings
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
import weights
from safetensors.torch import load_file

import opendelta
from opendelta import AutoDeltaModel, DeltaWarning, gen_model_hash

GOLDEN = Path(__file__).parent / "golden"
TENSORS = load_file(GOLDEN / "golden.safetensors")
CASES = json.loads((GOLDEN / "manifest.json").read_text())["cases"]


def of_kind(kind: str) -> list[Any]:
    """The cases of a kind whose methods this version has."""

    def known(case: dict[str, Any]) -> bool:
        methods = [name for name in case["method"].split("+") if name.endswith("Model")]
        return all(hasattr(opendelta, name) for name in methods)

    chosen = [case for case in CASES if case["kind"] == kind and known(case)]
    return [pytest.param(case, id=case["id"]) for case in chosen]


def construct(model: torch.nn.Module, case: dict[str, Any]) -> list[opendelta.DeltaBase]:
    return [
        getattr(opendelta, d["class"])(backbone_model=model, **d["kwargs"]) for d in case["deltas"]
    ]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() < tolerance


@pytest.mark.parametrize("name", [k[5:] for k in TENSORS if k.startswith("bare/")])
def test_golden_bare_output(name: str) -> None:
    close(backbones.run(backbones.build(name), name), TENSORS[f"bare/{name}"])


@pytest.mark.parametrize("case", of_kind("delta"))
def test_golden_delta(case: dict[str, Any]) -> None:
    name = case["backbone"]
    model = backbones.build(name)
    bare = dict(model.named_parameters(remove_duplicate=False))
    deltas = construct(model, case)
    model.eval()
    if case.get("unchanged_at_init"):
        assert torch.equal(backbones.run(model, name), backbones.run(backbones.build(name), name))
    if "initial" in case:
        close(backbones.run(model, name), TENSORS[case["initial"]])

    shapes = {k: list(p.shape) for k, p in model.named_parameters(remove_duplicate=False)}
    added = {k: s for k, s in shapes.items() if k not in bare}
    extra = {**case.get("alias_keys", {}), **case.get("optional_keys", {})}
    assert {k: s for k, s in added.items() if k not in extra} == case["keys"]
    assert all(extra[k] == s for k, s in added.items() if k in extra)

    deltas[-1].freeze_module(**case.get("freeze", {}))
    trainable = sorted(k for k, p in model.named_parameters() if p.requires_grad)
    assert trainable == sorted(case["trainable"])
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == case["trainable_parameters"]
    if case["state_dict"] is not None:
        assert set(model.state_dict()) - set(extra) == set(case["state_dict"])
    measured = opendelta.inspect_module_statistics(model, verbose=False)
    for key, values in case["statistics"].items():
        assert measured[key] in values, key

    weights.fill_delta(
        model, set(case["keys"]) | set(case["trainable"]), case.get("delta_scale", 0.25)
    )
    close(backbones.run(model, name), TENSORS[case["output"]])


def modified(model: torch.nn.Module) -> set[str]:
    """Names of modules that carry a delta submodule, by the parameters that came in."""
    names = {n for n, _ in backbones_parameters(model)}
    return {re.sub(r"\.(adapter|lora)(_\d+)?\..*", "", n) for n in names}


def backbones_parameters(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(n, p) for n, p in model.named_parameters() if re.search(r"\.(adapter|lora)\.", n)]


@pytest.mark.parametrize("case", of_kind("address"))
def test_golden_address(case: dict[str, Any]) -> None:
    model = backbones.build(case["backbone"])
    construct(model, case)
    assert modified(model) == set(case["matched"])


@pytest.mark.parametrize("case", of_kind("init"))
def test_golden_init(case: dict[str, Any]) -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    for _ in range(5):
        model = backbones.build(case["backbone"])
        delta = construct(model, case)[0]
        for name, p in delta.named_parameters():
            group = re.sub(r"(?<![^.])\d+(?![^.])", "$", name)
            seen.setdefault(group, []).append(p.detach().flatten())
    assert set(seen) == set(case["groups"]) | set(case.get("groups_dropped") or ())
    for group, facts in case["groups"].items():
        values = torch.cat(seen[group])
        if facts["zero"]:
            assert not values.any(), group
        else:
            deviation = statistics.pstdev(values.tolist())
            assert abs(deviation / facts["std"] - 1) < 0.35, group
            assert values.mean().abs() < 4 * facts["std"] / len(values) ** 0.5, group


@pytest.mark.parametrize("case", of_kind("checkpoint"))
def test_golden_checkpoint(case: dict[str, Any]) -> None:
    model = backbones.build(case["backbone"]).train()
    bare = set(dict(model.named_parameters()))
    with pytest.warns(DeltaWarning, match="not checked") as seen:
        delta = AutoDeltaModel.from_finetuned(GOLDEN / case["path"], backbone_model=model)
    assert [w.category for w in seen] == [DeltaWarning]  # it was hashed with the deltas in place
    assert type(delta).__name__ == case["method"]
    assert not model.training
    shapes = {k: list(p.shape) for k, p in model.named_parameters() if k not in bare}
    optional = case.get("optional_keys", {})
    assert {k: s for k, s in shapes.items() if k not in optional} == case["keys"]
    close(backbones.run(model, case["backbone"]), TENSORS[case["output"]])


@pytest.mark.parametrize("case", of_kind("transform"))
def test_golden_transform(case: dict[str, Any]) -> None:
    structure = opendelta.CommonStructureMap(backbones.build(case["backbone"]))
    for name, common in case["table"].items():
        assert structure.transform(name, strict=False) == common, name


@pytest.mark.parametrize("case", of_kind("hash"))
def test_golden_hash(case: dict[str, Any]) -> None:
    model = backbones.build(case["backbone"])
    assert gen_model_hash(model) == case["with_parameters"]
    assert gen_model_hash(model, with_parameters=False) == case["without_parameters"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opendelta.LoraModel(model, modified_modules=["[r].*(first|name_a)"], lora_r=2)
    assert gen_model_hash(model) == case["with_parameters"]


@pytest.mark.parametrize("case", of_kind("util"))
def test_golden_util(case: dict[str, Any]) -> None:
    function = getattr(importlib.import_module(case["module"]), case["function"])
    for arguments, expected in case["calls"]:
        assert bool(function(*arguments)) is expected, arguments
