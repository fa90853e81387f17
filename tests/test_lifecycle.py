"""Random lives of up to four deltas on one backbone, each step against a backbone built afresh."""

from __future__ import annotations

import copy
import tempfile
import warnings
from dataclasses import dataclass, field
from typing import Any

import backbones
import pytest
import torch
import weights
from cases import METHODS, OWN_LAYERS
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from placed import contents, digest
from torch import Tensor, nn

import opendelta
from opendelta import AutoDeltaModel, BackboneMismatchWarning, DeltaBase
from opendelta.exceptions import InsertionError

BACKBONE = "bert"
AFTER = "attention.output.dense"  # where deltas of several methods meet
OWN = "embeddings.LayerNorm"  # of which several deltas have one of their own
SITES: list[tuple[str, dict[str, Any]]] = [
    ("LoraModel", {"modified_modules": ["query", "value"], "lora_r": 2}),
    ("LoraModel", {"modified_modules": [AFTER, "query"], "lora_r": 3, "lora_dropout": 0.1}),
    ("LoraModel", {"modified_modules": ["word_embeddings", AFTER], "lora_r": 1}),
    ("AdapterModel", {"modified_modules": [AFTER], "bottleneck_dim": 3}),
    ("LowRankAdapterModel", {"modified_modules": ["1.intermediate.dense"]}),
    ("CompacterModel", {"modified_modules": [AFTER]}),
    ("ParallelAdapterModel", {"modified_modules": ["query", AFTER], "bottleneck_dim": 3}),
    ("BitFitModel", {"modified_modules": ["attention"]}),
    ("BitFitModel", {"modified_modules": [AFTER, "pooler"]}),
    ("PrefixModel", {"prefix_token_num": 2, "reparameterize": False}),
    ("SoftPromptModel", {"soft_token_num": 2}),
    ("LoraModel", {"modified_modules": ["query"], "lora_r": 2, "own_modules": [OWN]}),
    ("AdapterModel", {"modified_modules": [AFTER], "bottleneck_dim": 2, "own_modules": [OWN]}),
]
# A method that is not named above acts where no other does, once at a time.
ALONE = [method for method in METHODS if method not in {name for name, _ in SITES}]
FREE = ("0.intermediate.dense", "0.output.dense", "1.output.dense")
SITES += [(m, {"modified_modules": [FREE[i % len(FREE)]]}) for i, m in enumerate(ALONE)]
NONLINEAR = ("AdapterModel", "CompacterModel", "LowRankAdapterModel")


@dataclass
class Life:
    """What ought to be true of one delta."""

    delta: DeltaBase
    method: str
    arguments: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    state: str = "attached"

    @property
    def sites(self) -> set[str]:
        return set(self.arguments.get("modified_modules", ()))


def make(method: str, model: nn.Module, arguments: dict[str, Any]) -> DeltaBase:
    delta: DeltaBase = getattr(opendelta, method)(model, **arguments)
    return delta


class Lives(RuleBasedStateMachine):
    """One backbone, the deltas on it, and for each what it should be doing."""

    bare = backbones.build(BACKBONE)
    bare_contents = contents(bare)

    def __init__(self) -> None:
        super().__init__()
        self.model = copy.deepcopy(self.bare)
        self.lives: list[Life] = []
        self.made = 0

    # --- what happens -----------------------------------------------------------------------

    @precondition(lambda self: len(self.lives) < 4)
    @rule(site=st.sampled_from(SITES), freeze=st.booleans())
    def construct(self, site: tuple[str, dict[str, Any]], freeze: bool) -> None:
        method, arguments = site
        if method in ALONE and any(life.method == method for life in self.lives):
            return
        delta = make(method, self.model, arguments)
        self.made += 1
        with torch.no_grad():
            for name, p in delta.named_parameters():
                p.copy_(weights.uniform(f"{self.made}:{name}", p.shape, 0.2))
        if freeze:
            delta.freeze_module()
        tensors = {name: tensor.clone() for name, tensor in delta.state_dict().items()}
        self.lives.append(Life(delta, method, arguments, tensors))

    some_delta = precondition(lambda self: bool(self.lives))
    index = st.integers(0, 3)

    def chosen(self, i: int) -> Life:
        return self.lives[i % len(self.lives)]

    @some_delta
    @rule(i=index, state=st.sampled_from(["attached", "detached"]))
    def switch(self, i: int, state: str) -> None:
        life = self.chosen(i)
        call = life.delta.attach if state == "attached" else life.delta.detach
        if life.state == "merged":
            with pytest.raises(InsertionError, match="unmerge"):
                call()
        else:
            call()
            life.state = state

    @some_delta
    @rule(i=index)
    def merge(self, i: int) -> None:
        life = self.chosen(i)
        if self.can_merge(life):
            life.delta.merge(safe=True)
            life.state = "merged"
        else:
            with pytest.raises(InsertionError):
                life.delta.merge()

    def can_merge(self, life: Life) -> bool:
        """Not below an earlier bias that acts, nor behind an earlier delta that is not linear."""
        earlier = self.lives[: self.lives.index(life)]
        if life.method in OWN_LAYERS or life.state != "attached":
            return False
        rivals = {"LoraModel": NONLINEAR, "BitFitModel": ("BitFitModel",)}.get(life.method, ())
        return not any(
            other.method in rivals
            and other.state != "merged"
            and {AFTER, "attention"} & other.sites & self.covers(life)
            for other in earlier
        )

    @staticmethod
    def covers(life: Life) -> set[str]:
        """The sites that share a module with a delta; attention holds its output."""
        met = {AFTER, "attention"} & life.sites
        return {AFTER, "attention"} if met and life.method == "BitFitModel" else met

    @precondition(lambda self: any(life.state == "merged" for life in self.lives))
    @rule(i=index)
    def unmerge(self, i: int) -> None:
        merged = [life for life in self.lives if life.state == "merged"]
        life = merged[i % len(merged)]
        life.delta.unmerge()
        life.state = "attached"

    @some_delta
    @rule(i=index)
    def remove(self, i: int) -> None:
        life = self.chosen(i)
        life.delta.remove()
        self.lives.remove(life)

    @some_delta
    @rule(i=index)
    def save_remove_and_load(self, i: int) -> None:
        life = self.chosen(i)
        life.delta.freeze_module()
        with tempfile.TemporaryDirectory() as folder:
            life.delta.save_finetuned(folder)
            self.remove(self.lives.index(life))
            with warnings.catch_warnings():
                warnings.simplefilter("error", BackboneMismatchWarning)
                life.delta = AutoDeltaModel.from_finetuned(folder, backbone_model=self.model)
        life.state = "attached"
        self.lives.append(life)

    @some_delta
    @rule()
    def go_on_with_a_copy(self) -> None:
        self.model = copy.deepcopy(self.model)
        for life, delta in zip(self.lives, opendelta.deltas(self.model), strict=True):
            life.delta = delta

    # --- what must be true ------------------------------------------------------------------

    @invariant()
    def it_computes_what_its_deltas_say(self) -> None:
        fresh = copy.deepcopy(self.bare)
        for life in self.lives:
            if life.state != "detached":
                make(life.method, fresh, life.arguments).load_state_dict(life.tensors)
        expected = backbones.run(fresh, BACKBONE)
        actual = backbones.run(self.model, BACKBONE)
        if any(life.state == "merged" for life in self.lives):
            assert (actual - expected).abs().max() < 1e-5 * max(1, expected.abs().max())
        else:
            assert torch.equal(actual, expected)

    @invariant()
    def the_deltas_are_in_order_and_as_they_were(self) -> None:
        assert [life.delta for life in self.lives] == opendelta.deltas(self.model)
        for life in self.lives:
            assert life.delta.is_attached is (life.state == "attached")
            assert life.delta.is_merged is (life.state == "merged")
            held = life.delta.state_dict()
            assert held.keys() == life.tensors.keys()
            assert all(torch.equal(held[name], life.tensors[name]) for name in held)

    @invariant()
    def the_bare_backbone_can_be_had_back(self) -> None:
        twin = copy.deepcopy(self.model)
        if any(life.state == "attached" for life in self.lives):
            for delta in opendelta.deltas(twin):
                delta.remove()
        else:  # nothing of the deltas is in the way even now, once merged ones are out
            for delta in opendelta.deltas(twin):
                if delta.is_merged:
                    delta.unmerge()
                    delta.detach()
        assert contents(twin) == self.bare_contents
        for delta in opendelta.deltas(twin):
            delta.remove()
        assert all(p.requires_grad for p in twin.parameters())
        hooks = [m._forward_hooks or m._forward_pre_hooks for m in twin.modules()]
        assert not any(hooks) and not twin._state_dict_hooks


class TestLives(Lives.TestCase):
    """Enough to walk through every pair of steps."""


# A minute in `make test`, some minutes more in `make test-all`.
QUICK = {"max_examples": 90, "stateful_step_count": 12}
SLOW = {"max_examples": 120, "stateful_step_count": 25}
COMMON: dict[str, Any] = {"suppress_health_check": [HealthCheck.too_slow]}
TestLives.settings = settings(**QUICK, **COMMON)


@pytest.mark.slow
class TestLongLives(Lives.TestCase):
    """The same for longer."""


TestLongLives.settings = settings(**SLOW, **COMMON)


@pytest.mark.parametrize("method", ["LoraModel", "BitFitModel"])
def test_a_delta_may_be_removed_while_it_is_set_aside(method: str) -> None:
    model = backbones.build("t5")
    before = {name: digest(tensor) for name, tensor in model.state_dict().items()}
    delta: DeltaBase = getattr(opendelta, method)(model)
    with delta.detached():
        delta.remove()
    assert {name: digest(tensor) for name, tensor in model.state_dict().items()} == before
    assert not delta.is_attached
    hooks = [value for m in model.modules() for key, value in vars(m).items() if "_hooks" in key]
    assert not any(hooks)
