"""Configs, the registry and the auto classes."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import backbones
import pytest
from cases import built
from hypothesis import given
from hypothesis import strategies as st
from placed import PLACED_METHODS, TARGETS, place, told, unchanged
from torch import nn

import opendelta
from opendelta import (
    AdapterConfig,
    AutoDeltaConfig,
    AutoDeltaModel,
    BaseDeltaConfig,
    CompacterConfig,
    DeltaBase,
    LoraConfig,
    LoraModel,
    LowRankAdapterConfig,
    LowRankAdapterModel,
    OpenDeltaError,
    ParallelAdapterConfig,
)
from opendelta.exceptions import ConfigError, UnknownArgumentError

GOLDEN = Path(__file__).parent / "golden"
TYPES = {  # of the methods that the specification names
    "LoraModel": "lora",
    "AdapterModel": "adapter",
    "LowRankAdapterModel": "low_rank_adapter",
    "CompacterModel": "compacter",
    "ParallelAdapterModel": "parallel_adapter",
    "BitFitModel": "bitfit",
}
TYPES |= {m: getattr(opendelta, m).delta_type for m in PLACED_METHODS if m not in TYPES}
CHECKPOINTS = [  # what 0.3.2 wrote of these methods
    folder
    for folder in sorted((GOLDEN / "checkpoints").iterdir())
    if json.loads((folder / "config.json").read_text())["delta_type"] in TYPES.values()
]
each_method = pytest.mark.parametrize("method", PLACED_METHODS)

BASE_FIELDS: dict[str, Any] = {  # specification 1.20.1
    "modified_modules": None,
    "exclude_modules": None,
    "unfrozen_modules": ["deltas"],
    "common_structure": False,
    "backbone_class": None,
    "backbone_checkpoint_name": None,
    "backbone_hash": None,
    "own_modules": None,  # ours
}
METHOD_FIELDS: dict[str, dict[str, Any]] = {  # specification 1.21
    "LoraModel": {
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "rank_pattern": None,
        "alpha_pattern": None,
    },
    "AdapterModel": {"bottleneck_dim": 24, "non_linearity": "gelu_new"},
    "LowRankAdapterModel": {
        "reduction_factor": 32,
        "non_linearity": "gelu_new",
        "low_rank_w_init": "glorot-uniform",
        "low_rank_rank": 1,
    },
    "CompacterModel": {
        "reduction_factor": 16,
        "non_linearity": "gelu_new",
        "phm_c_init": "normal",
        "hypercomplex_division": 4,
        "learn_phm": True,
        "hypercomplex_nonlinearity": "glorot-uniform",
        "shared_phm_rule": False,
        "factorized_phm": True,
        "shared_W_phm": False,
        "factorized_phm_rule": False,
        "phm_rank": 1,
        "phm_init_range": 1e-4,
        "kronecker_prod": None,
        "use_bias_up_sampler": True,
        "use_bias_down_sampler": True,
    },
    "ParallelAdapterModel": {"bottleneck_dim": 24, "non_linearity": "gelu_new", "scaled": 1.0},
    "BitFitModel": {},
}


BASE_ARGUMENTS = {"backbone_model", "interactive_modify", "backend", *BASE_FIELDS}
METHOD_FIELDS |= {  # of any other method: what its constructor takes beyond the base arguments
    method: {
        name: parameter.default
        for name, parameter in inspect.signature(getattr(opendelta, method)).parameters.items()
        if name not in BASE_ARGUMENTS
    }
    for method in PLACED_METHODS
    if method not in METHOD_FIELDS
}


def model_class(method: str) -> type[DeltaBase]:
    found: type[DeltaBase] = getattr(opendelta, method)
    return found


# --- fields and defaults --------------------------------------------------------------------------


def test_the_base_config_has_the_documented_signature() -> None:
    parameters = inspect.signature(BaseDeltaConfig).parameters
    fields = {n: p.default for n, p in parameters.items() if p.kind is not p.VAR_KEYWORD}
    assert list(fields.items()) == list(BASE_FIELDS.items())
    assert {name: getattr(BaseDeltaConfig(), name) for name in BASE_FIELDS} == BASE_FIELDS


@each_method
def test_every_method_has_a_config_of_its_own(method: str) -> None:
    cls = model_class(method)
    assert cls.config_class is getattr(opendelta, method.replace("Model", "Config"))
    assert issubclass(cls.config_class, BaseDeltaConfig)
    assert cls.delta_type == cls.config_class.delta_type == TYPES[method]
    assert len({model_class(m).config_class for m in PLACED_METHODS}) == len(PLACED_METHODS)


@each_method
def test_defaults_of_config_and_constructor_are_equal(method: str) -> None:
    config = model_class(method).config_class()
    parameters = inspect.signature(model_class(method)).parameters
    own = {name: getattr(config, name) for name in METHOD_FIELDS[method]}
    assert own == METHOD_FIELDS[method] == {n: parameters[n].default for n in METHOD_FIELDS[method]}
    assert {name: getattr(config, name) for name in BASE_FIELDS} == BASE_FIELDS


@each_method
def test_the_configs_signature_shows_its_fields(method: str) -> None:
    parameters = inspect.signature(model_class(method).config_class).parameters
    assert {
        n: p.default for n, p in parameters.items() if n in METHOD_FIELDS[method]
    } == METHOD_FIELDS[method]
    assert set(BASE_FIELDS) <= set(parameters)


def test_a_configs_lists_are_its_own() -> None:
    first, second = BaseDeltaConfig(), BaseDeltaConfig()
    first.unfrozen_modules.append("classifier")
    assert second.unfrozen_modules == ["deltas"]
    lora = LoraConfig(rank_pattern={"query": 2})
    lora.to_dict()["rank_pattern"]["key"] = 3
    assert lora.rank_pattern == {"query": 2}


def test_a_config_takes_its_methods_fields_by_position_and_name() -> None:
    assert LoraConfig(4, 8).to_dict() == LoraConfig(lora_r=4, lora_alpha=8).to_dict()
    assert LoraConfig(4, lora_dropout=0.5).lora_dropout == 0.5
    with pytest.raises(TypeError):
        LoraConfig(4, lora_r=5)


# --- dicts and JSON -------------------------------------------------------------------------------


def values_for(default: Any) -> st.SearchStrategy[Any]:
    """Values of the type of a default."""
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int):
        return st.integers(1, 64)
    if isinstance(default, float):
        return st.floats(0, 0.9)
    if isinstance(default, str):
        return st.sampled_from(["relu", "gelu_new", "normal"])
    return st.none()


patterns = st.lists(
    st.sampled_from(["attn.q", r"[r][0-5]\.attention", "bias"]), min_size=1, max_size=3
)


@st.composite
def fields_of(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    method = draw(st.sampled_from(PLACED_METHODS))
    fields = {name: values_for(default) for name, default in METHOD_FIELDS[method].items()}
    fields |= {
        "modified_modules": patterns,
        "exclude_modules": st.none() | patterns,
        "unfrozen_modules": patterns,
        "common_structure": st.booleans(),
        "backbone_class": st.none() | st.just("BertModel"),
        "backbone_hash": st.none() | st.just("0" * 32),
    }
    chosen = draw(st.sets(st.sampled_from(sorted(fields))))
    return method, {name: draw(fields[name]) for name in sorted(chosen)}


@given(fields_of())
def test_property_round_trips(chosen: tuple[str, dict[str, Any]]) -> None:
    method, fields = chosen
    cls = model_class(method).config_class
    config = cls(**fields)
    for name, value in fields.items():
        assert getattr(config, name) == value
    assert config.get_config_dict() == config.to_dict()
    assert config.to_dict()["delta_type"] == TYPES[method]
    through_json = json.loads(config.to_json_string())
    assert through_json == config.to_dict()
    for loader in (cls, AutoDeltaConfig):
        again = loader.from_dict(through_json)
        assert type(again) is cls
        assert again == config
        assert again.to_dict() == config.to_dict()


def test_tuples_round_trip(tmp_path: Path) -> None:
    """JSON has lists only."""
    config = LoraConfig(modified_modules=("query", "value"), exclude_modules=("layer.0",))
    config.save_finetuned(tmp_path)
    assert LoraConfig.from_finetuned(tmp_path) == config


def test_configs_differ_by_method_and_field() -> None:
    assert LoraConfig() == LoraConfig()
    assert LoraConfig() != LoraConfig(lora_r=9)
    assert AdapterConfig() != ParallelAdapterConfig()
    assert LoraConfig() != {"delta_type": "lora"}


@each_method
def test_files_round_trip(method: str, tmp_path: Path) -> None:
    config = model_class(method).config_class(
        modified_modules=[r"[r]\d+\.x"], exclude_modules=["y"]
    )
    config.save_finetuned(tmp_path / "new" / "folder")
    file = tmp_path / "new" / "folder" / "config.json"
    assert [path.name for path in file.parent.iterdir()] == ["config.json"]
    text = file.read_text()
    assert json.loads(text)["delta_type"] == TYPES[method]
    assert r"[r]\\d+\\.x" in text
    for loader in (model_class(method).config_class, AutoDeltaConfig):
        for path in (file.parent, str(file.parent), file, str(file)):
            loaded = loader.from_finetuned(path)
            assert type(loaded) is type(config)
            assert loaded == config


def test_a_file_of_any_name_is_read(tmp_path: Path) -> None:
    (tmp_path / "configuration.json").write_text(LoraConfig(lora_r=3).to_json_string())
    assert AutoDeltaConfig.from_finetuned(tmp_path / "configuration.json").lora_r == 3


def test_keyword_arguments_beat_the_dict(tmp_path: Path) -> None:
    values = {"delta_type": "lora", "lora_r": 4, "modified_modules": ["q"]}
    for loader in (LoraConfig, AutoDeltaConfig):
        config = loader.from_dict(values, lora_r=5, modified_modules=["v"])
        assert (config.lora_r, config.modified_modules) == (5, ["v"])
    assert values == {"delta_type": "lora", "lora_r": 4, "modified_modules": ["q"]}
    LoraConfig(lora_r=4).save_finetuned(tmp_path)
    assert LoraConfig.from_finetuned(tmp_path, lora_r=6).lora_r == 6
    assert AutoDeltaConfig.from_finetuned(tmp_path, lora_r=7).lora_r == 7


def test_the_examples_of_the_specification() -> None:
    assert AutoDeltaConfig.from_dict({"delta_type": "lora"}).lora_r == 8
    assert AutoDeltaConfig.from_dict({"delta_type": "lora", "lora_r": 5}).lora_r == 5
    model = backbones.build("t5")
    config = AutoDeltaConfig.from_dict(
        {
            "delta_type": "lora",
            "modified_modules": ["SelfAttention.q", "SelfAttention.v", "SelfAttention.o"],
            "lora_r": 4,
        }
    )
    delta = AutoDeltaModel.from_config(config, backbone_model=model)
    assert type(delta) is LoraModel
    assert {tuple(p.shape) for n, p in delta.named_parameters() if n.endswith("lora_A")} == {
        (4, 64)
    }
    assert len(list(delta.parameters())) == 2 * 4 * 3


def test_both_spellings_of_low_rank_adapter() -> None:
    """The specification's text says lowrankadapter, 0.3.2's files low_rank_adapter."""
    for spelling in ("lowrankadapter", "low_rank_adapter"):
        config = AutoDeltaConfig.from_dict({"delta_type": spelling, "low_rank_rank": 2})
        assert type(config) is LowRankAdapterConfig
        assert config == LowRankAdapterConfig.from_dict(
            {"delta_type": spelling, "low_rank_rank": 2}
        )
        delta = AutoDeltaModel.from_config(
            {"delta_type": spelling, "modified_modules": ["wo"]}, backbones.build("t5")
        )
        assert type(delta) is LowRankAdapterModel


def test_a_file_with_the_other_spelling_loads(tmp_path: Path) -> None:
    delta = place("LowRankAdapterModel", "mlp")
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert text.count("low_rank_adapter") == 1
    (tmp_path / "config.json").write_text(text.replace("low_rank_adapter", "lowrankadapter"))
    assert type(LowRankAdapterConfig.from_finetuned(tmp_path)) is LowRankAdapterConfig
    for loader in (LowRankAdapterModel, AutoDeltaModel):
        loaded = loader.from_finetuned(tmp_path, backbones.build("mlp"))
        assert type(loaded) is LowRankAdapterModel


# --- what 0.3.2 wrote -----------------------------------------------------------------------------


@pytest.mark.parametrize("folder", CHECKPOINTS, ids=lambda path: path.name)
def test_configs_of_0_3_2_load(folder: Path) -> None:
    written = json.loads((folder / "config.json").read_text())
    config = AutoDeltaConfig.from_finetuned(folder)
    assert config.delta_type == written["delta_type"]
    assert config.modified_modules == [p.replace("@", "") for p in written["modified_modules"]]
    assert bool(config.common_structure) is bool(written["common_structure"])
    assert config.exclude_modules == written["exclude_modules"]
    assert config.unfrozen_modules == written.get("unfrozen_modules", ["deltas"])
    assert config.backbone_hash == written["backbone_hash"]
    for name in set(METHOD_FIELDS[type(config).__name__.replace("Config", "Model")]) & set(written):
        assert getattr(config, name) == written[name]


def test_every_key_of_0_3_2s_files_is_known() -> None:
    def read(cls: type[BaseDeltaConfig], **stray: Any) -> dict[str, Any]:
        written = {"opendelta_version": "0.3.0", "transformers_version": "4.38.2"}
        values = cls.from_dict({**written, **stray}).to_dict()
        return {name: value for name, value in values.items() if name not in written}

    assert (
        read(CompacterConfig, sequential=True, bottleneck_dim=None) == CompacterConfig().to_dict()
    )
    assert read(ParallelAdapterConfig, scaled=None) == ParallelAdapterConfig().to_dict()
    assert read(AdapterConfig, sequential=True) == AdapterConfig().to_dict()
    assert ParallelAdapterConfig.from_dict({"scaled": None}).scaled == 1.0


def test_keys_of_0_3_2_are_unknown_in_todays_configs() -> None:
    for stray in ({"sequential": True}, {"scaled": 2.0}):
        with pytest.raises(OpenDeltaError, match=next(iter(stray))):
            AdapterConfig.from_dict(stray)


def test_marks_of_common_names_are_read_and_regexes_left_alone() -> None:
    config = LoraConfig.from_dict(
        {
            "modified_modules": ["attn@.q@", "[r]a@b"],
            "exclude_modules": "ff@",
            "unfrozen_modules": ["lm_head@"],
        }
    )
    assert config.modified_modules == ["attn.q", "[r]a@b"]
    assert config.exclude_modules in ("ff", ["ff"])
    assert config.unfrozen_modules == ["lm_head"]


def test_registraction_name_is_accepted() -> None:
    assert LoraConfig.from_dict({"registraction_name": "deltas"}) == LoraConfig()
    assert LoraConfig(registraction_name="deltas") == LoraConfig()
    assert BaseDeltaConfig(registraction_name="deltas") == BaseDeltaConfig()


# --- arguments of loading, and unknown ones -------------------------------------------------------

LOADING = {"backbone_model": nn.Linear(1, 1), "cache_dir": "somewhere", "revision": "main",
           "force_download": True, "local_files_only": True, "check_hash": False}  # fmt: skip


@each_method
@pytest.mark.parametrize("argument", LOADING)
def test_arguments_of_loading_are_accepted_and_are_no_configuration(
    method: str, argument: str, tmp_path: Path
) -> None:
    cls = model_class(method).config_class
    plain = cls()
    plain.save_finetuned(tmp_path)
    given_argument = {argument: LOADING[argument]}
    loaded = [
        cls.from_dict({"delta_type": TYPES[method]}, **given_argument),
        AutoDeltaConfig.from_dict({"delta_type": TYPES[method]}, **given_argument),
        cls.from_finetuned(tmp_path, **given_argument),
        AutoDeltaConfig.from_finetuned(tmp_path, **given_argument),
    ]
    for config in loaded:
        assert argument not in config.to_dict()
        assert not hasattr(config, argument)
        assert {n: getattr(config, n) for n in METHOD_FIELDS[method]} == METHOD_FIELDS[method]


@each_method
def test_anything_else_is_rejected_with_the_nearest_name(method: str, tmp_path: Path) -> None:
    cls = model_class(method).config_class
    cls().save_finetuned(tmp_path)
    calls = [
        lambda **wrong: cls(**wrong),
        lambda **wrong: cls.from_dict(wrong),
        lambda **wrong: cls.from_dict({}, **wrong),
        lambda **wrong: AutoDeltaConfig.from_dict({"delta_type": TYPES[method], **wrong}),
        lambda **wrong: cls.from_finetuned(tmp_path, **wrong),
        lambda **wrong: AutoDeltaConfig.from_finetuned(tmp_path, **wrong),
    ]
    for call in calls:
        with pytest.raises(OpenDeltaError, match="'modifed_modules'.*'modified_modules'"):
            call(modifed_modules=["q"])


def test_a_field_of_another_method_is_unknown() -> None:
    with pytest.raises(TypeError, match="'lora_r'"):
        AdapterConfig(lora_r=3)
    with pytest.raises(ValueError, match="'bottleneck_dm'.*'bottleneck_dim'"):
        AdapterConfig(bottleneck_dm=3)


def test_without_a_method_it_is_an_error() -> None:
    for call in (
        lambda: AutoDeltaConfig.from_dict({"lora_r": 3}),
        lambda: AutoDeltaModel.from_config({"lora_r": 3}, nn.Linear(2, 2)),
        lambda: AutoDeltaModel.from_config(BaseDeltaConfig(), nn.Linear(2, 2)),
    ):
        with pytest.raises(OpenDeltaError, match="delta_type.*lora"):
            call()


def test_the_auto_classes_are_not_instantiated() -> None:
    for cls in (AutoDeltaConfig, AutoDeltaModel):
        for arguments in ((), ({"delta_type": "lora"},)):
            with pytest.raises(OSError, match=cls.__name__):
                cls(*arguments)


@each_method
def test_a_delta_knows_its_config(method: str) -> None:
    delta = place(method, "bert_cls", exclude_modules=["layer.0"])
    config = delta.config
    assert type(config) is type(delta).config_class
    assert config.modified_modules == TARGETS[method]["bert_cls"]
    assert config.exclude_modules == ["layer.0"]
    assert {n: getattr(config, n) for n in METHOD_FIELDS[method]} == METHOD_FIELDS[method]


# --- config files with bad values ----------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"delta_type": ["lora"]},
        {"delta_type": None},
        {"backbone_hash_excludes": 5},
        {"backbone_hash_format": "2"},
        {"backbone_hash_excludes": "encoder.layer"},
        {"weights_sha256": 5},
        {"weights_file": ["model.safetensors"]},
        {"opendelta_version": ["9"]},
        {"lora_r": "8"},
        {"modified_modules": 5},
        {"exclude_modules": {"a": 1}},
    ],
    ids=str,
)
def test_a_config_file_with_a_value_of_the_wrong_kind(
    change: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever stands in ``config.json``, the error is the library's own and nothing is put on."""
    _, delta = built("LoraModel", "bert")
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    fresh = backbones.build("bert")
    with unchanged(fresh), pytest.raises(ConfigError):
        AutoDeltaModel.from_finetuned(tmp_path, backbone_model=fresh)


def test_keys_of_old_files_are_accepted_from_old_files_alone() -> None:
    """Leftovers in configs of 0.3.2 are passed over; elsewhere they are mistakes."""
    legacy = {"delta_type": "lora", "bottleneck_dim": 64, "scaled": None, "sequential": False}
    with pytest.raises(UnknownArgumentError, match="bottleneck_dim|scaled|sequential"):
        AutoDeltaConfig.from_dict(legacy)
    with pytest.raises(UnknownArgumentError, match="bottleneck_dim"):
        LoraConfig(bottleneck_dim=64)
    read = AutoDeltaConfig.from_dict({**legacy, "opendelta_version": "0.3.2", "lora_r": 3})
    assert isinstance(read, LoraConfig)
    assert read.to_dict()["lora_r"] == 3
    assert not {"bottleneck_dim", "scaled", "sequential"} & set(read.to_dict())


# --- configs that are refused --------------------------------------------------------------------


CONFIG_TEXTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "no JSON": ("{'delta_type': 'lora'}", ("config.json", "JSON")),
    "cut short": ('{"delta_type": "lora", "lor', ("config.json", "JSON")),
    "empty": ("", ("config.json", "JSON")),
    "a list": ('["delta_type"]', ("config.json", "delta_type")),
    "a backbone's": (
        '{"model_type": "gpt2", "n_layer": 2}',
        ("config.json", "'gpt2'", "delta_type"),
    ),
    "of an unknown method": ('{"delta_type": "adaptor"}', ("'adaptor'",)),
    "with an unknown field": ('{"delta_type": "lora", "lora_rnak": 8}', ("'lora_rnak'", "'lora_r")),
    "of a newer version": (
        '{"delta_type": "lora", "opendelta_version": "42.1.0", "new_field": 1}',
        ("42.1.0", "newer", opendelta.__version__),
    ),
    "of no version": (
        '{"delta_type": "lora", "opendelta_version": "latest"}',
        ("'latest'", "version"),
    ),
}


@pytest.mark.parametrize("case", CONFIG_TEXTS)
def test_config_files(case: str, model: Any, tmp_path: Path) -> None:
    text, words = CONFIG_TEXTS[case]
    delta = place("LoraModel", "bert_cls")
    delta.freeze_module()
    delta.save_finetuned(tmp_path)
    (tmp_path / "config.json").write_text(text)
    for call in (
        lambda: AutoDeltaConfig.from_finetuned(tmp_path),
        lambda: LoraConfig.from_finetuned(tmp_path),
        lambda: AutoDeltaModel.from_finetuned(tmp_path, model),
        lambda: LoraModel.from_finetuned(tmp_path, model),
    ):
        with unchanged(model), pytest.raises(Exception) as caught:
            call()
        told(caught.value, words)


def test_a_config_that_is_not_there(model: Any, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        for call in (
            lambda folder=folder: AutoDeltaConfig.from_finetuned(folder),
            lambda folder=folder: AutoDeltaModel.from_finetuned(folder, model),
        ):
            with unchanged(model), pytest.raises(OpenDeltaError, match=re.escape(str(folder))):
                call()


def test_the_config_of_another_method(model: Any, tmp_path: Path) -> None:
    AdapterConfig().save_finetuned(tmp_path)
    with pytest.raises(OpenDeltaError, match="'adapter'.*'lora'"):
        LoraConfig.from_finetuned(tmp_path)
    with unchanged(model), pytest.raises(OpenDeltaError, match="AdapterModel.*LoraModel"):
        LoraModel.from_finetuned(tmp_path, model)


@pytest.mark.parametrize("value", [None, "lora", ["delta_type", "lora"], 5])
def test_configs_from_what_is_no_dict(value: Any) -> None:
    for cls in (AutoDeltaConfig, LoraConfig):
        with pytest.raises(OpenDeltaError, match=f"dict.*{type(value).__name__}"):
            cls.from_dict(value)


def test_saving_a_config_badly(tmp_path: Path) -> None:
    file = tmp_path / "a file"
    file.write_text("x")
    with pytest.raises(OpenDeltaError, match="a file"):
        LoraConfig().save_finetuned(file)
    with pytest.raises(OpenDeltaError, match="'ovrewrite'"):
        LoraConfig().save_finetuned(tmp_path, ovrewrite=True)
    assert file.read_text() == "x" and not (tmp_path / "config.json").exists()
