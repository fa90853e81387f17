"""Which modules a pattern reaches, against a reference that splits names at dots."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import backbones
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pieces import linears, parameter_names
from placed import PLACED_METHODS, TARGETS, place, trainable, unchanged
from torch import Tensor, nn

import opendelta
from opendelta import (
    AdapterModel,
    AutoDeltaModel,
    BitFitModel,
    DeltaBase,
    DeltaWarning,
    LoraModel,
    OpenDeltaError,
)
from opendelta.exceptions import AddressingError, UnmatchedPatternWarning
from opendelta.utils.name_based_addressing import endswith_in_normal, endswith_in_regex

# --- an independent reference ---------------------------------------------------------------------


def ends(name: str, pattern: str) -> bool:
    """Whether the dotted parts of `pattern` are the last parts of `name`."""
    parts, wanted = name.split("."), pattern.split(".")
    return parts[-len(wanted) :] == wanted


def ends_regex(name: str, expressions: list[str]) -> bool:
    """Whether the last parts of `name` match one expression each (none of which takes a dot)."""
    parts = name.split(".")
    return len(parts) >= len(expressions) and all(
        re.fullmatch(expression, part)
        for expression, part in zip(expressions, parts[-len(expressions) :], strict=True)
    )


def around(name: str) -> list[str]:
    """A name and all names around it."""
    parts = name.split(".")
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


# --- reading off where deltas are -----------------------------------------------------------------


def hosts(model: nn.Module, child: str = "adapter") -> set[str]:
    """Names of the modules that hold a delta submodule called `child`."""
    return {name for name, module in model.named_modules() if child in module._modules}


def adapted(
    backbone: str, modified: list[str] | str, excluded: list[str] | str | None = None
) -> set[str]:
    model = backbones.build(backbone)
    AdapterModel(model, modified_modules=modified, exclude_modules=excluded, bottleneck_dim=1)
    return hosts(model)


def names(backbone: str) -> list[str]:
    return [name for name, _ in backbones.build(backbone).named_modules() if name]


# --- dot-bounded ends -----------------------------------------------------------------------------

SUFFIXES = [
    ("distilbert", "attention.out_lin", 2),
    ("distilbert", "0.attention.out_lin", 1),
    ("bert12", "attention.output.dense", 12),
    ("bert12", "0.attention", 1),  # layer 0, not layer 10
    ("bert12", "1.output.dense", 1),  # neither layer 11 nor an attention's
    ("bert12", "output.dense", 24),
    ("bert12", "dense", 37),
    ("gpt2", "attn", 2),
    ("gpt2", "attn.c_proj", 2),  # not cross_attn, not mlp.c_proj
    ("t5", "wo", 4),
    ("toy", "name_b.0.name_a", 1),
    ("toy", "name_a", 2),
]


@pytest.mark.parametrize(("backbone", "pattern", "count"), SUFFIXES)
def test_a_plain_pattern_is_a_dot_bounded_end(backbone: str, pattern: str, count: int) -> None:
    expected = {name for name in names(backbone) if ends(name, pattern)}
    assert len(expected) == count
    assert adapted(backbone, [pattern]) == expected


def test_part_of_a_name_is_no_match() -> None:
    """`lin` ends every `out_lin`, but not at a dot."""
    with unchanged(model := backbones.build("distilbert")), pytest.raises(AddressingError):
        AdapterModel(model, modified_modules=["lin"])
    with unchanged(model), pytest.raises(AddressingError):
        AdapterModel(model, modified_modules=["transformer.layer.0.attention.out"])


@pytest.mark.parametrize("argument", ["modified_modules", "exclude_modules", "unfrozen_modules"])
def test_a_string_is_a_list_of_one(argument: str) -> None:
    value = {
        "modified_modules": "attention.output.dense",
        "exclude_modules": "encoder.layer.0",
        "unfrozen_modules": "pooler",
    }
    seen = []
    for given_value in (value[argument], [value[argument]]):
        model = backbones.build("bert")
        arguments = {"modified_modules": ["output.dense"], argument: given_value}
        delta = AdapterModel(model, **arguments)
        delta.freeze_module()
        seen.append((hosts(model), trainable(model)))
    assert seen[0] == seen[1]
    assert seen[0][0] or seen[0][1]


def test_a_string_in_freeze_module_is_a_list_of_one() -> None:
    model = backbones.build("bert_cls")
    place("LoraModel", "bert_cls", model).freeze_module(exclude="classifier")
    assert trainable(model) == {"classifier.weight", "classifier.bias"}


def test_the_root_is_never_addressed() -> None:
    """An empty name ends with nothing; a pattern of it would address every module."""
    model = backbones.build("bert")
    with unchanged(model), pytest.raises(OpenDeltaError, match="empty"):
        AdapterModel(model, modified_modules=["output.dense", ""])


def test_a_module_under_two_names_answers_to_both() -> None:
    """It is modified once, under its first name."""
    shared = nn.Linear(2, 2)
    for pattern in (["first"], ["second"], ["first", "second"]):
        model = nn.ModuleDict({"first": shared, "second": shared})
        delta = LoraModel(model, modified_modules=pattern, lora_r=1)
        assert {name for name, _ in delta.named_parameters()} == {
            "first.lora.lora_A",
            "first.lora.lora_B",
        }
        delta.remove()


# --- regular expressions --------------------------------------------------------------------------

REGEXES = [
    ("bert12", r"(\d)+\.output.dense", [r"\d+", "output", "dense"], 12),
    ("bert12", r"[0-5]\.attention", ["[0-5]", "attention"], 6),  # not layers 10 and 11
    ("bert12", r"1[01]\.attention\.output\.dense", ["1[01]", "attention", "output", "dense"], 2),
    ("bert12", r"(query|key)", ["query|key"], 24),
    ("gpt2", r"(attn|mlp)\.c_proj", ["attn|mlp", "c_proj"], 4),
    (
        "t5",
        r"block\.1\.layer\.\d\.DenseReluDense",
        ["block", "1", "layer", r"\d", "DenseReluDense"],
        2,
    ),
    ("toy", r"name_b\.\d", ["name_b", r"\d"], 2),
]


@pytest.mark.parametrize(("backbone", "pattern", "parts", "count"), REGEXES)
def test_a_regular_expression_matches_between_dots(
    backbone: str, pattern: str, parts: list[str], count: int
) -> None:
    expected = {name for name in names(backbone) if ends_regex(name, parts)}
    assert len(expected) == count
    assert adapted(backbone, ["[r]" + pattern]) == expected


def test_a_regular_expression_takes_any_match_of_a_name() -> None:
    """The first match in a name may end in its middle, where a later one reaches its end."""
    delta = place("LoraModel", "mlp")
    assert delta.find_key("encoder.3.attention.x.4.attention", [r"[r][0-5]\.attention"])
    assert delta.find_key("a.a.b.a", ["[r]a"])
    assert delta.find_key("layer.1.layer.1", [r"[r]layer\.\d"])
    assert not delta.find_key("encoder.3.attention.x", [r"[r][0-5]\.attention"])


def test_a_regular_expression_may_cross_dots() -> None:
    expected = {
        name
        for name in names("bert")
        if name.startswith("encoder.layer.1.") and name.endswith("dense")
    }
    assert adapted("bert", [r"[r]encoder\.layer\.1\..*dense"]) == expected
    assert len(expected) == 3


def test_alternatives_stay_inside_their_expression() -> None:
    """The bounds hold for each alternative, not for the first and last alone."""
    delta = place("LoraModel", "mlp")
    assert not delta.find_key("x.aa.z", ["[r]a|b"])
    assert not delta.find_key("x.ab", ["[r]a|b"])
    assert delta.find_key("x.b", ["[r]a|b"])


def test_regular_expressions_survive_json(tmp_path: Path) -> None:
    model = backbones.build("bert12")
    delta = AdapterModel(model, modified_modules=[r"[r][0-5]\.attention"])
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    assert r"[r][0-5]\\.attention" in (tmp_path / "config.json").read_text()
    fresh = backbones.build("bert12")
    AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)
    assert hosts(fresh) == hosts(model) == {f"encoder.layer.{i}.attention" for i in range(6)}


# --- properties -----------------------------------------------------------------------------------

PARTS = ["a", "b", "ab", "0", "1", "10", "a_b", "self", "layer"]
ATOMS = ["a", "b", r"\d", r"\d+", r"(\d)+", "[0-5]", "a|b", "(a|ab)", r"\w+", "a_?b", "layer"]
dotted = st.lists(st.sampled_from(PARTS), min_size=1, max_size=6).map(".".join)
short = st.lists(st.sampled_from(PARTS), min_size=1, max_size=3).map(".".join)
expressions = st.lists(st.sampled_from(ATOMS), min_size=1, max_size=3)
KEYS = place("LoraModel", "mlp")  # find_key needs no module of that name


@given(dotted, st.lists(short, min_size=1, max_size=3))
def test_property_plain_patterns(name: str, patterns: list[str]) -> None:
    expected = any(ends(name, pattern) for pattern in patterns)
    assert KEYS.find_key(name, patterns) is expected
    assert endswith_in_normal(name, patterns) is expected


@given(dotted, st.lists(expressions, min_size=1, max_size=3))
def test_property_regular_expressions(name: str, several: list[list[str]]) -> None:
    texts = [r"\.".join(f"(?:{part})" for part in parts) for parts in several]
    expected = any(ends_regex(name, parts) for parts in several)
    assert KEYS.find_key(name, ["[r]" + text for text in texts]) is expected
    assert endswith_in_regex(name, texts) is expected


@given(dotted, short)
def test_property_a_plain_pattern_is_its_escaped_regular_expression(
    name: str, pattern: str
) -> None:
    assert KEYS.find_key(name, [pattern]) is KEYS.find_key(name, ["[r]" + re.escape(pattern)])


class Grove(nn.Module):
    """Linears three levels deep whose names share parts, prefixes and suffixes."""

    def __init__(self) -> None:
        super().__init__()
        for top in ("a", "b", "0"):
            middle = nn.ModuleDict()
            for inner in ("a", "ab", "1", "10"):
                middle[inner] = nn.ModuleDict({leaf: nn.Linear(2, 2) for leaf in ("a", "b")})
            self.add_module(top, middle)


GROVE_NAMES = [name for name, _ in Grove().named_modules() if name]
LEAVES = [name for name, module in Grove().named_modules() if isinstance(module, nn.Linear)]
grove_pattern = st.one_of(
    st.lists(st.sampled_from(["a", "b", "ab", "0", "1", "10"]), min_size=1, max_size=2).map(
        ".".join
    ),
    st.sampled_from(GROVE_NAMES),
)


@given(
    st.lists(grove_pattern, min_size=1, max_size=2), st.lists(grove_pattern, min_size=0, max_size=2)
)
def test_property_constructing_with_exclusions(modified: list[str], excluded: list[str]) -> None:
    """LoRA reaches the linears in what is addressed, less what an exclusion matches or holds."""
    wanted = {
        leaf for leaf in LEAVES if any(ends(name, p) for name in around(leaf) for p in modified)
    }
    left_out = {
        leaf for leaf in LEAVES if any(ends(name, p) for name in around(leaf) for p in excluded)
    }
    model = Grove()
    each_matches = all(any(ends(name, p) for name in GROVE_NAMES) for p in modified)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnmatchedPatternWarning)
        if each_matches and wanted - left_out:
            LoraModel(model, modified_modules=modified, exclude_modules=excluded, lora_r=1)
            assert hosts(model, "lora") == wanted - left_out
        else:
            with pytest.raises(OpenDeltaError):
                LoraModel(model, modified_modules=modified, exclude_modules=excluded, lora_r=1)
            assert hosts(model, "lora") == set()


# --- exclude_modules ------------------------------------------------------------------------------

EXCLUSIONS: list[tuple[str, Callable[[str], bool]]] = [
    ("encoder.layer.1", lambda n: n.startswith("encoder.layer.1.")),  # not layers 10 and 11
    ("layer.1", lambda n: n.startswith("encoder.layer.1.")),
    ("attention", lambda n: ".attention." in n),
    ("attention.output.dense", lambda n: n.endswith(".attention.output.dense")),
    (r"[r]layer\.1\d", lambda n: n.startswith(("encoder.layer.10.", "encoder.layer.11."))),
    (r"[r][2-9]\.output", lambda n: bool(re.fullmatch(r"encoder\.layer\.[2-9]\.output\.dense", n))),
]


@pytest.mark.parametrize(("pattern", "gone"), EXCLUSIONS, ids=[p for p, _ in EXCLUSIONS])
def test_exclude_modules_takes_out_what_it_matches_and_all_inside(
    pattern: str, gone: Callable[[str], bool]
) -> None:
    every = {name for name in names("bert12") if ends(name, "output.dense")}
    left = {name for name in every if not gone(name)}
    assert left and left != every
    assert adapted("bert12", ["output.dense"], [pattern]) == left


@pytest.mark.parametrize("method", PLACED_METHODS)
def test_every_method_honours_exclude_modules(method: str) -> None:
    model = backbones.build("bert_cls")
    delta = place(method, "bert_cls", model, exclude_modules=["encoder.layer.0"])
    hit = {name for name, _ in delta.named_parameters()}
    assert hit and all("encoder.layer.1." in name for name in hit)
    everywhere = place(method, "bert_cls")
    assert any("encoder.layer.0." in name for name, _ in everywhere.named_parameters())


def test_an_exclusion_inside_a_container() -> None:
    """LoRA on a container leaves out the linears in it that are excluded."""
    model = backbones.build("bert")
    LoraModel(model, modified_modules=["attention"], exclude_modules=["key", "0.attention.output"])
    assert hosts(model, "lora") == {
        "encoder.layer.0.attention.self.query",
        "encoder.layer.0.attention.self.value",
        "encoder.layer.1.attention.self.query",
        "encoder.layer.1.attention.self.value",
        "encoder.layer.1.attention.output.dense",
    }


def test_a_container_that_is_wholly_excluded_inside_stops_no_other() -> None:
    model = backbones.build("bert")
    LoraModel(
        model,
        modified_modules=["attention"],
        exclude_modules=["0.attention.self", "0.attention.output"],
    )
    assert hosts(model, "lora") == {
        f"encoder.layer.1.attention.{part}"
        for part in ("self.query", "self.key", "self.value", "output.dense")
    }


# --- the backbone's own modules only --------------------------------------------------------------


def test_patterns_never_address_the_inside_of_a_delta() -> None:
    """An adapter has an `up_proj` too, as LLaMA's feed-forward does."""
    model = backbones.build("llama")
    AdapterModel(model, modified_modules=["mlp"])
    own = {f"model.layers.{i}.mlp.up_proj" for i in range(2)}
    assert {name for name, _ in model.named_modules() if ends(name, "up_proj")} > own
    LoraModel(model, modified_modules=["up_proj"])
    assert hosts(model, "lora") == own


def test_a_name_that_only_deltas_have_addresses_nothing() -> None:
    model = backbones.build("llama")
    AdapterModel(model, modified_modules=["mlp"])
    for pattern in (
        "adapter",
        "modulelist",
        "mlp.adapter.modulelist.up_proj",
        r"[r]modulelist\..*",
    ):
        with unchanged(model), pytest.raises(AddressingError):
            LoraModel(model, modified_modules=[pattern])


def test_a_container_is_searched_without_the_deltas_in_it() -> None:
    model = backbones.build("llama")
    AdapterModel(model, modified_modules=["mlp"])
    LoraModel(model, modified_modules=["mlp"])
    BitFitModel(model, modified_modules=["mlp"])
    assert hosts(model, "lora") == {
        f"model.layers.{i}.mlp.{part}_proj" for i in range(2) for part in ("gate", "up", "down")
    }
    assert {name for name, _ in opendelta.deltas(model)[2].named_parameters()} == {
        f"model.layers.{i}.mlp.{part}_proj.bias"
        for i in range(2)
        for part in ("gate", "up", "down")
    }


def test_unfrozen_modules_do_not_reach_inside_a_delta_and_exclude_does() -> None:
    own = {f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)}
    model = backbones.build("llama")
    delta = AdapterModel(model, modified_modules=["self_attn"], unfrozen_modules=["up_proj"])
    delta.freeze_module()
    assert trainable(model) == own
    delta.freeze_module(exclude=["modulelist.up_proj"])
    assert trainable(model) == {
        f"model.layers.{i}.self_attn.adapter.modulelist.up_proj.{leaf}"
        for i in range(2)
        for leaf in ("weight", "bias")
    }


def test_names_inside_a_delta_are_legal_in_exclude_only() -> None:
    model = backbones.build("bert_cls")
    delta = place("LoraModel", "bert_cls", model)
    delta.freeze_module(exclude=["lora_A"])
    assert (
        trainable(model)
        == {n for n, _ in model.named_parameters() if n.endswith("lora_A")}
        != set()
    )

    model = backbones.build("bert_cls")
    delta = place("LoraModel", "bert_cls", model, unfrozen_modules=["lora_A", "classifier"])
    with pytest.warns(UnmatchedPatternWarning, match="'lora_A'"):
        delta.freeze_module()
    assert trainable(model) == {"classifier.weight", "classifier.bias"}


# --- patterns that match nothing ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("querry", "'query'"),
        ("attention.outptu.dense", "attention.output.dense"),
        ("layer.2", "layer.0"),
    ],
)
def test_a_pattern_without_match_raises_and_names_the_nearest(pattern: str, nearest: str) -> None:
    model = backbones.build("bert_cls")
    with unchanged(model), pytest.raises(AddressingError) as caught:
        AdapterModel(model, modified_modules=[pattern])
    assert repr(pattern) in str(caught.value)
    assert nearest in str(caught.value)


@pytest.mark.parametrize("method", PLACED_METHODS)
def test_each_given_pattern_must_match(method: str) -> None:
    model = backbones.build("bert_cls")
    patterns = [*TARGETS[method]["bert_cls"], "nowhere", "nowhere"]
    with unchanged(model), pytest.raises(AddressingError, match="'nowhere'"):
        place(method, "bert_cls", model, modified_modules=patterns)


def test_a_name_of_another_architecture_is_answered_by_those_that_there_are() -> None:
    with pytest.raises(AddressingError) as caught:
        AdapterModel(backbones.build("bert12"), modified_modules=["attention.selfish"])
    message = str(caught.value)
    assert "'attention.self'" in message  # a suggestion can be used as it is
    listed = message.partition("Its innermost modules are called")[2]
    assert "query, key, value, dense" in listed and "usual places" in listed
    assert not re.search(r"\d", listed)


def test_an_exclusion_without_match_warns_and_names_the_nearest() -> None:
    model = backbones.build("bert_cls")
    with pytest.warns(UnmatchedPatternWarning, match="exclude_modules.*'pooller'.*'pooler'"):
        AdapterModel(model, modified_modules=["dense"], exclude_modules=["pooller"])
    assert "bert.pooler.dense" in hosts(model)


def test_an_exclude_without_match_warns_and_names_the_nearest() -> None:
    model = backbones.build("bert_cls")
    delta = place("LoraModel", "bert_cls", model)
    of = "'clasifier' names no .* of this BertForSequenceClassification.*'classifier'"
    with pytest.warns(UnmatchedPatternWarning, match=of):
        delta.freeze_module(exclude=["deltas", "clasifier"])
    assert trainable(model) == {name for name, _ in delta.named_parameters()}


def test_unfrozen_modules_without_match_warn() -> None:
    delta = place("LoraModel", "bert_cls", unfrozen_modules=["deltas", "clasifier"])
    with pytest.warns(UnmatchedPatternWarning, match="'clasifier'"):
        delta.freeze_module()


def test_the_warning_is_a_delta_warning() -> None:
    """One class silences all of the library's advice."""
    assert issubclass(UnmatchedPatternWarning, DeltaWarning)


def test_a_loaded_config_does_not_warn(tmp_path: Path) -> None:
    """Its patterns were checked when it was made; the file may serve a smaller backbone."""
    delta = place("LoraModel", "bert_cls")
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    text = (tmp_path / "config.json").read_text()
    text = text.replace('"exclude_modules": null', '"exclude_modules": ["lm_head"]')
    text = text.replace('"unfrozen_modules": null', '"unfrozen_modules": ["deltas", "lm_head"]')
    text = re.sub(
        r'"unfrozen_modules": \[\s*"deltas"\s*\]', '"unfrozen_modules": ["deltas", "lm_head"]', text
    )
    assert text.count("lm_head") == 2
    (tmp_path / "config.json").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = AutoDeltaModel.from_finetuned(tmp_path, backbone_model=backbones.build("bert_cls"))
        loaded.freeze_module()
    assert trainable(loaded.backbone_model) == {name for name, _ in loaded.named_parameters()}


def test_excluding_everything_raises() -> None:
    model = backbones.build("bert_cls")
    with unchanged(model), pytest.raises(AddressingError, match="exclude_modules"):
        AdapterModel(model, modified_modules=["output.dense"], exclude_modules=["encoder"])


# --- common names ---------------------------------------------------------------------------------


def test_default_roles_that_a_backbone_lacks_are_skipped() -> None:
    """BertModel has no language-model head, which BitFit's defaults name."""
    assert "lm_head.proj" in BitFitModel.default_modified_modules
    model = backbones.build("bert")
    delta = BitFitModel(model)
    assert any(name.startswith("encoder.layer.1.attention") for name, _ in delta.named_parameters())


def test_without_any_default_role_it_raises() -> None:
    model = backbones.build("mlp")
    with (
        unchanged(model),
        pytest.raises(OpenDeltaError, match="(?i)available models with default.*modified_modules"),
    ):
        LoraModel(model)


def test_a_role_that_the_user_names_must_be_there() -> None:
    model = backbones.build("bert")
    with unchanged(model), pytest.raises(AddressingError, match="lm_head.proj"):
        BitFitModel(model, modified_modules=["attn", "lm_head.proj"], common_structure=True)


@pytest.mark.parametrize("pattern", ["1.attention", "1.attn", "block.1.attn", "layer.1.attention"])
def test_raw_and_common_names_both_match_in_exclude(pattern: str) -> None:
    for how in ("exclude", "unfrozen_modules"):
        model = backbones.build("bert")
        unfrozen = [pattern] if how == "unfrozen_modules" else None
        delta = LoraModel(model, unfrozen_modules=unfrozen)
        assert delta.common_structure
        delta.freeze_module(exclude=[pattern] if how == "exclude" else None)
        assert trainable(model) == {
            name
            for name, _ in model.named_parameters()
            if name.startswith("encoder.layer.1.attention.")
        }


def test_common_names_are_unknown_without_common_structure() -> None:
    model = backbones.build("bert")
    delta = LoraModel(model, modified_modules=["query"])
    with pytest.warns(UnmatchedPatternWarning, match="'attn'"):
        delta.freeze_module(exclude=["deltas", "attn"])
    with pytest.raises(AddressingError):
        LoraModel(backbones.build("bert"), modified_modules=["attn.q"])


def test_exclude_modules_without_modified_modules_keeps_the_defaults() -> None:
    """0.3.2 dropped the common structure then, and matched nothing."""
    model = backbones.build("bert")
    LoraModel(model, exclude_modules=["layer.0"])
    assert hosts(model, "lora") == {
        f"encoder.layer.1.attention.self.{q}" for q in ("query", "value")
    }


# --- replacements and blocks ---------------------------------------------------------------------


def test_patterns_do_not_reach_inside_what_replaced_a_module() -> None:
    """A replacement is a delta: neither other deltas nor names in `exclude` go into it."""
    model = linears()
    delta = DeltaBase(model)
    delta.replace_module(model, "0", model[0], nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    for pattern in ("0.0", "[r]0\\.\\d"):
        with pytest.raises(AddressingError):
            LoraModel(model, modified_modules=[pattern])
    lora = LoraModel(model, modified_modules=["[r]\\d"])
    assert parameter_names(lora) == ["1.lora.lora_A", "1.lora.lora_B"]


class Wide(nn.Module):
    """Holds linears, and says how wide it is."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 8
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def test_lora_reaches_the_linears_of_a_block_that_tells_its_widths() -> None:
    """A module that holds linears stands for them, whatever attributes it has."""
    delta = LoraModel(nn.Sequential(Wide()), modified_modules=["0"])
    assert parameter_names(delta) == [
        f"0.{part}.lora.lora_{x}" for part in ("up", "down") for x in "AB"
    ]


# --- find_key and find_module --------------------------------------------------------------------


def test_find_key() -> None:
    delta = LoraModel(backbones.build("toy"), modified_modules=["name_a"])
    assert delta.find_key("name_b.0.name_a", ["name_a"])
    assert delta.find_key("name_b.0.name_a", ["elsewhere", "0.name_a"])
    assert delta.find_key("name_b.0.name_a", "name_b.0.name_a")
    assert delta.find_key("model.encoder.layer.0.attention", ["attention"])
    assert delta.find_key("name_b.0.name_a", [r"[r]\d\.name_a"])
    assert not delta.find_key("name_b.0.name_a", ["name_b", "ame_a", "1.name_a"])
    assert not delta.find_key("name_b.0.name_a", [])


def test_find_key_by_common_names() -> None:
    delta = LoraModel(backbones.build("bert"))
    assert delta.find_key("encoder.layer.0.attention.self.query", ["attn.q"])
    assert not delta.find_key("encoder.layer.0.attention.self.query", ["attn.v"])


def test_find_module() -> None:
    model: Any = backbones.build("toy")
    delta = LoraModel(model, modified_modules=["name_a"])
    parent, name, child = delta.find_module(model, "name_b.0.name_a")
    assert (parent, name, child) == (model.name_b[0], "name_a", model.name_b[0].name_a)
    assert delta.find_module(model, "embedding") == (model, "embedding", model.embedding)
    assert delta.find_module(model, "name_b.1") == (model.name_b, "1", model.name_b[1])
    assert delta.find_module(model.name_b, "1.name_a") == (
        model.name_b[1],
        "name_a",
        model.name_b[1].name_a,
    )


@pytest.mark.parametrize("key", ["name_c", "name_b.2", "name_b.0.name_a.weight", "name_b..name_a"])
def test_find_module_of_a_wrong_name(key: str) -> None:
    model = backbones.build("toy")
    delta = LoraModel(model, modified_modules=["name_a"])
    with unchanged(model), pytest.raises(AddressingError, match=key.replace(".", r"\.")):
        delta.find_module(model, key)
