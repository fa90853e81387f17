"""LoRA to PEFT and back, each direction judged by PEFT itself."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import backbones
import peft
import pytest
import torch
import weights
from cases import randomise
from placed import place, unchanged
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BartConfig, BartModel, LlamaConfig, LlamaForCausalLM

from opendelta import AdapterModel, AutoDeltaModel, DeltaBase, LoraModel
from opendelta.exceptions import AddressingError, CheckpointError, ConfigError, InsertionError


class Mixed(nn.Module):
    """Layers that the tiny transformers lack; ``a`` is also the end of ``inner.a``."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.line = nn.Conv1d(6, 6, 3, padding=1)
        self.plane = nn.Conv2d(1, 3, 3, stride=2, padding=1)
        self.a = nn.Linear(9, 5)
        self.inner = nn.ModuleDict({"a": nn.Linear(5, 5), "head": nn.Linear(5, 5)})
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 4)
        self.my_head = nn.Linear(4, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.line(self.table(input_ids).transpose(1, 2))
        x = self.plane(x[:, None]).flatten(2).mean(1)
        x = self.inner["head"](self.inner["a"](self.a(x)))
        out: Tensor = self.my_head(self.head(self.norm(x)))
        return out


def fresh(backbone: str) -> nn.Module:
    """A backbone in float64, so that only a wrong formula makes a difference."""
    if backbone == "mixed":
        return weights.fill(Mixed()).double().eval()
    if backbone == "scaled":  # its embeddings multiply their rows by sqrt(16)
        bart = BartConfig(
            vocab_size=128,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_ffn_dim=8,
            decoder_ffn_dim=8,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            scale_embedding=True,
        )
        return weights.fill(BartModel(bart)).double().eval()
    if backbone == "tied":
        llama = LlamaConfig(
            vocab_size=128,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
        return weights.fill(LlamaForCausalLM(llama)).double().eval()
    return backbones.build(backbone).double().eval()


@torch.no_grad()
def outputs(model: nn.Module, backbone: str) -> Tensor:
    if backbone == "mixed":
        result: Tensor = model(torch.tensor([[1, 5, 2, 0, 3, 8], [4, 4, 7, 6, 1, 2]]))
        return result
    inputs = backbones.inputs("bart" if backbone == "scaled" else backbone)
    if backbone == "vit":
        inputs = {"pixel_values": inputs["pixel_values"].double()}
    output = model(**inputs)
    if isinstance(output, Tensor):
        return output
    found: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return found


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def train(model: nn.Module) -> None:
    """Move everything that trains, as training would, to values that follow from the names."""
    for name, p in model.named_parameters():
        if p.requires_grad and p.is_floating_point():
            p.add_(weights.uniform("trained:" + name, p.shape, 0.3))


# --- from ours to PEFT -----------------------------------------------------------------------

EXPORTS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "bert": ("bert", {}, []),
    "gpt2": ("gpt2", {}, []),
    "llama": ("llama", {}, []),
    "t5": ("t5", {}, []),
    "vit": ("vit", {}, []),
    "a classifier": ("bert_cls", {"lora_r": 3, "lora_dropout": 0.1}, ["classifier"]),
    "nested heads": ("bert_cls", {}, ["pooler", "classifier"]),
    "one layer": ("bart", {"modified_modules": ["encoder.layers.0.fc1"]}, []),
    "Conv1D of two sizes": ("gpt2", {"modified_modules": ["attn.c_proj", "c_fc"]}, []),
    "a tied embedding": ("gpt2", {"modified_modules": ["wte"]}, []),
    "a tied embedding that trains": ("gpt2", {}, ["wte"]),
    "one that has LoRA too": ("gpt2", {"modified_modules": ["wte", "c_fc"]}, ["wte"]),
    "a tied head": ("gpt2", {"modified_modules": ["lm_head"]}, []),
    "biases": ("bert", {}, ["bias"]),
    "a parameter of a container": ("vit", {"modified_modules": ["projection"]}, ["embeddings"]),
    "scaled embeddings": ("scaled", {"modified_modules": ["embed_tokens", "fc1"]}, []),
    "convolutions": ("mixed", {"modified_modules": ["line", "plane", "table"], "lora_r": 2}, []),
    "the end of another name": ("mixed", {"modified_modules": ["[r]^a"]}, []),
    "a head whose name others end in": ("mixed", {"modified_modules": ["table"]}, ["[r]^head"]),
    "buffers": ("mixed", {"modified_modules": ["table"]}, ["norm", "my_head"]),
    "patterns": (
        "bert",
        {
            "modified_modules": ["query", "value", "word_embeddings"],
            "rank_pattern": {"value": 2, "word_embeddings": 3, "1.attention.self.query": 5},
            "alpha_pattern": {"0.attention.self.value": 7, "query": 1.5},
        },
        [],
    ),
}


def trained(case: str) -> tuple[str, nn.Module, LoraModel]:
    backbone, arguments, exclude = EXPORTS[case]
    model = fresh(backbone)
    delta = LoraModel(model, **arguments)
    randomise(delta)
    delta.freeze_module(exclude=["deltas", *exclude])
    train(model)
    return backbone, model, delta


def in_peft(path: Path, backbone: str) -> peft.PeftModel:
    model: peft.PeftModel = peft.PeftModel.from_pretrained(fresh(backbone), path)
    return model


def lora_places(model: nn.Module) -> set[str]:
    """Where PEFT put LoRA, by the backbone's names."""
    prefix = "base_model.model."
    layers = ((n, m) for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    return {name.removeprefix(prefix) for name, _ in layers}


@pytest.mark.parametrize("case", EXPORTS)
def test_peft_computes_the_same(case: str, tmp_path: Path) -> None:
    backbone, model, delta = trained(case)
    expected = outputs(model, backbone)
    assert not torch.allclose(expected, outputs(fresh(backbone), backbone))
    delta.export_peft(tmp_path)
    loaded = in_peft(tmp_path, backbone)
    same(outputs(loaded, backbone), expected)
    assert lora_places(loaded) == {insertion.host_name for insertion in delta.insertions}
    assert {file.name for file in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize("case", EXPORTS)
def test_what_is_exported_is_read_back(case: str, tmp_path: Path) -> None:
    backbone, model, delta = trained(case)
    delta.export_peft(tmp_path)
    again = fresh(backbone)
    loaded = AutoDeltaModel.from_peft(tmp_path, again)
    same(outputs(again, backbone), outputs(model, backbone))
    was, has = delta.checkpoint_tensors(), loaded.checkpoint_tensors()
    assert all(torch.equal(has.pop(name), tensor) for name, tensor in was.items())
    buffers = dict(model.named_buffers())
    assert all(torch.equal(tensor, buffers[name]) for name, tensor in has.items())
    loaded.freeze_module()
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


def config_of(case: str, path: Path) -> dict[str, Any]:
    trained(case)[2].export_peft(path)
    values: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    return values


@pytest.mark.parametrize(
    ("case", "field", "expected"),
    [
        ("bert", "target_modules", ["query", "value"]),
        ("t5", "target_modules", ["SelfAttention.q", "SelfAttention.v"]),
        ("one layer", "target_modules", ["encoder.layers.0.fc1"]),
        ("the end of another name", "target_modules", "a"),
        ("a classifier", "modules_to_save", ["classifier"]),
        ("a classifier", "lora_dropout", 0.1),
        ("nested heads", "modules_to_save", ["bert.pooler.dense", "classifier"]),
        ("a tied embedding that trains", "modules_to_save", None),
        ("buffers", "modules_to_save", ["my_head", "norm"]),
        ("gpt2", "fan_in_fan_out", True),
        ("bert", "fan_in_fan_out", False),
        ("bert", "rank_pattern", {}),
        ("scaled embeddings", "lora_alpha", 4),
        ("scaled embeddings", "alpha_pattern", {"fc1": 16}),
        (
            "patterns",
            "rank_pattern",
            {
                "word_embeddings": 3,
                r"0\.attention\.self\.query": 8,
                r"1\.attention\.self\.query": 5,
            },
        ),
    ],
)
def test_what_servers_read(case: str, field: str, expected: Any, tmp_path: Path) -> None:
    assert config_of(case, tmp_path)[field] == expected


def test_alphas_are_integers_where_they_can_be(tmp_path: Path) -> None:
    assert '"lora_alpha": 16,' in json.dumps(config_of("bert", tmp_path))


@pytest.mark.parametrize("state", ["among others", "detached", "merged"])
def test_only_the_delta_itself_is_exported(state: str, tmp_path: Path) -> None:
    model = fresh("bert_cls")
    delta = place("LoraModel", "bert_cls", model)
    if state == "among others":
        place("AdapterModel", "bert_cls", model)
        place("BitFitModel", "bert_cls", model)
        LoraModel(model, modified_modules=["query", "key"])
    assert isinstance(delta, LoraModel)
    delta.freeze_module(exclude=[delta, "classifier"])
    randomise(delta)
    train(model)
    if state == "detached":
        delta.detach()
    if state == "merged":
        delta.merge()
    with unchanged(model):
        delta.export_peft(tmp_path)
    alone = fresh("bert_cls")
    with torch.no_grad():
        for name, p in alone.named_parameters():
            if name.startswith("classifier"):
                p.copy_(model.get_parameter(name))
    copy = place("LoraModel", "bert_cls", alone)
    copy.load_state_dict(delta.state_dict())
    same(outputs(in_peft(tmp_path, "bert_cls"), "bert_cls"), outputs(alone, "bert_cls"))


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
        (nn.Conv1d(4, 4, 3, dilation=2), "dilation=(2,)"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm=1.0"),
    ],
)
@pytest.mark.parametrize("direction", ["to PEFT", "from PEFT"])
def test_layers_on_which_peft_differs(
    layer: nn.Module, told: str, direction: str, tmp_path: Path
) -> None:
    model = nn.Sequential(layer)
    if direction == "to PEFT":
        delta = LoraModel(model, modified_modules=["0"], lora_r=2)
        with pytest.raises(ConfigError) as caught:
            delta.export_peft(tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
    else:
        arguments = peft.LoraConfig(r=2, target_modules=["0"])
        peft.get_peft_model(model, arguments).save_pretrained(tmp_path)
        bare = nn.Sequential(layer)
        with pytest.raises(ConfigError) as caught, unchanged(bare):
            AutoDeltaModel.from_peft(tmp_path, bare)
    assert told in str(caught.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        trained("bert")[2].export_peft(file)


def test_peft_itself_is_not_needed() -> None:
    code = "import sys; sys.modules['peft'] = None; import opendelta.saving.peft_files, opendelta"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- from PEFT to ours -----------------------------------------------------------------------

IMPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "a list": ("bert", {"target_modules": ["query", "value"]}),
    "a regular expression": ("bert", {"target_modules": r".*layer\.1\..*\.(query|key)"}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "T5": ("t5", {"target_modules": ["q", "wo"]}),
    "fan_in_fan_out": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "rsLoRA": ("llama", {"target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 5}),
    "patterns": (
        "bert",
        {
            "target_modules": ["query", "value", "dense"],
            "rank_pattern": {r"layer\.1\..*\.dense": 3, "query": 5, "uery": 7},
            "alpha_pattern": {"^encoder.layer.0.attention.self.query": 9, "(value|key)": 2.5},
        },
    ),
    "patterns of rsLoRA": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": True,
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 7},
        },
    ),
    "some layers": ("bert", {"target_modules": ["query"], "layers_to_transform": 1}),
    "layers by pattern": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    ),
    "exclusions": (
        "bert",
        {"target_modules": ["query"], "exclude_modules": ["0.attention.self.query"]},
    ),
    "a classifier": ("bert_cls", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "a task": ("bert_cls", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    "all biases": ("bert_cls", {"target_modules": ["query"], "bias": "all"}),
    "LoRA's biases": ("bert_cls", {"target_modules": ["query"], "bias": "lora_only"}),
    "embeddings": ("bert", {"target_modules": ["word_embeddings", "query"]}),
    "embeddings that PEFT saves": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "scaled embeddings": ("scaled", {"target_modules": ["embed_tokens"]}),
    "tied embeddings": ("gpt2", {"target_modules": ["wte"]}),
    "tied weights trained as one": (
        "tied",
        {
            "target_modules": ["q_proj"],
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "LoRA of tied weights": (
        "tied",
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "convolutions": ("mixed", {"target_modules": ["line", "plane"]}),
    "the end of another name": ("mixed", {"target_modules": "a"}),
    "a head whose name others end in": (
        "mixed",
        {"target_modules": ["line"], "modules_to_save": ["head"]},
    ),
    "dropout": ("bert", {"target_modules": ["query"], "lora_dropout": 0.2}),
}


def saved_by_peft(backbone: str, path: Path, **arguments: Any) -> Tensor:
    """Train with PEFT and save; returns what its model computes."""
    model = peft.get_peft_model(fresh(backbone), peft.LoraConfig(**{"r": 4, **arguments}))
    train(model)
    model.eval().save_pretrained(path)
    return outputs(model, backbone)


@pytest.mark.parametrize("case", IMPORTS)
def test_ours_computes_the_same(case: str, tmp_path: Path) -> None:
    backbone, arguments = IMPORTS[case]
    expected = saved_by_peft(backbone, tmp_path / "peft", **arguments)
    assert not torch.allclose(expected, outputs(fresh(backbone), backbone))
    model = fresh(backbone)
    delta = AutoDeltaModel.from_peft(tmp_path / "peft", model)
    assert type(delta) is LoraModel and delta.lora_dropout == arguments.get("lora_dropout", 0)
    same(outputs(model, backbone), expected)

    delta.save_finetuned(tmp_path / "ours")
    again = fresh(backbone)
    AutoDeltaModel.from_finetuned(tmp_path / "ours", again)
    assert torch.equal(outputs(again, backbone), outputs(model, backbone))

    delta.export_peft(tmp_path / "back")
    same(outputs(in_peft(tmp_path / "back", backbone), backbone), expected)


@pytest.mark.parametrize("case", ["a classifier", "all biases", "LoRA's biases"])
def test_what_peft_trained_trains_on(case: str, tmp_path: Path) -> None:
    backbone, arguments = IMPORTS[case]
    saved_by_peft(backbone, tmp_path, **arguments)
    model = fresh(backbone)
    AutoDeltaModel.from_peft(tmp_path, model).freeze_module()
    theirs = peft.get_peft_model(fresh(backbone), peft.LoraConfig(r=4, **arguments))
    renamed = {
        n.removeprefix("base_model.model.")
        .replace(".base_layer", "")
        .replace(".modules_to_save.default", "")
        .replace("lora_A.default.weight", "lora.lora_A")
        .replace("lora_B.default.weight", "lora.lora_B")
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert {n for n, p in model.named_parameters() if p.requires_grad} == renamed


def test_a_file_of_torch(tmp_path: Path) -> None:
    expected = saved_by_peft("bert", tmp_path, target_modules=["query"])
    file = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(file), tmp_path / "adapter_model.bin")
    file.unlink()
    model = fresh("bert")
    AutoDeltaModel.from_peft(tmp_path, model)
    same(outputs(model, "bert"), expected)


def test_beside_other_deltas(tmp_path: Path) -> None:
    saved_by_peft("bert_cls", tmp_path, **IMPORTS["a classifier"][1])
    models = [fresh("bert_cls"), fresh("bert_cls")]
    deltas: list[DeltaBase] = []
    for model in models:
        deltas.append(AutoDeltaModel.from_peft(tmp_path, model))
    with unchanged(models[1]), pytest.raises(AddressingError, match="in whose place"):
        LoraModel(models[1], modified_modules=["query", "classifier"])
    adapter = LoraModel(models[1], modified_modules=["query", "key"])
    randomise(adapter)
    second = fresh("bert_cls")
    on_head = LoraModel(second, modified_modules=["classifier"])
    with unchanged(second), pytest.raises(InsertionError, match="another LoraModel modifies"):
        AutoDeltaModel.from_peft(tmp_path, second)
    on_head.remove()
    other = LoraModel(second, modified_modules=["query", "key"])
    randomise(other)
    AutoDeltaModel.from_peft(tmp_path, second)
    same(outputs(second, "bert_cls"), outputs(models[1], "bert_cls"))
    adapter.remove()
    assert torch.equal(outputs(models[1], "bert_cls"), outputs(models[0], "bert_cls"))


# --- tied weights ----------------------------------------------------------------------------


def test_a_tied_weight_that_peft_trained_apart_is_refused(tmp_path: Path) -> None:
    saved_by_peft("gpt2", tmp_path, target_modules=["c_attn"], modules_to_save=["lm_head"])
    model = fresh("gpt2")
    with pytest.raises(CheckpointError, match="untie them first"), unchanged(model):
        AutoDeltaModel.from_peft(tmp_path, model)


@pytest.mark.parametrize("equal", [True, False])
def test_both_ends_of_a_tie(equal: bool, tmp_path: Path) -> None:
    saved_by_peft("gpt2", tmp_path, target_modules=["c_attn"], modules_to_save=["lm_head", "wte"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    ends = ["base_model.model.lm_head.weight", "base_model.model.transformer.wte.weight"]
    if equal:
        tensors[ends[0]] = tensors[ends[1]].clone()
        save_file(tensors, file)
    model = fresh("gpt2")
    if equal:
        delta = AutoDeltaModel.from_peft(tmp_path, model)
        assert torch.equal(model.lm_head.weight, tensors[ends[1]])
        delta.save_finetuned(tmp_path / "ours")
    else:
        with pytest.raises(CheckpointError, match="untie them first"), unchanged(model):
            AutoDeltaModel.from_peft(tmp_path, model)


# --- bad input -------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    saved_by_peft("bert_cls", tmp_path, **IMPORTS["a classifier"][1])
    return tmp_path


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
    "no method": ({"peft_type": None}, "peft_type=None"),
    "biases of LoRA's own": ({"lora_bias": True}, "lora_bias=True"),
    "parameters": ({"target_parameters": ["weight"]}, "target_parameters=['weight']"),
    "single tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices=[1]"),
    "repeated layers": ({"layer_replication": [[0, 2]]}, "layer_replication="),
    "a field of the future": ({"use_xlora": {"a": 1}}, "use_xlora="),
    "PiSSA": ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
    "an alpha of words": ({"lora_alpha": "eight"}, "lora_alpha='eight'"),
    "an infinite alpha": ({"lora_alpha": math.inf}, "lora_alpha=inf"),
    "a dropout of 1": ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
    "a list of patterns": ({"alpha_pattern": ["query"]}, "alpha_pattern=['query']"),
    "no expression": ({"alpha_pattern": {"(": 1}}, "alpha_pattern: '('"),
    "no number": ({"alpha_pattern": {"q": "8"}}, "'8' is no number"),
    "no list": ({"modules_to_save": "classifier"}, "modules_to_save='classifier'"),
    "no names": ({"modules_to_save": [1]}, "modules_to_save=[1]"),
}


def refused(adapter: Path, kind: type[Exception], told: str, backbone: str = "bert_cls") -> None:
    model = fresh(backbone)
    with pytest.raises(kind) as caught, unchanged(model):
        AutoDeltaModel.from_peft(adapter, model)
    assert told in str(caught.value)


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_refused(case: str, adapter: Path) -> None:
    changes, told = CONFIGS[case]
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    refused(adapter, ConfigError, told)


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", None])
def test_initialisations_that_do_not_matter(start: Any, adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": start}))
    AutoDeltaModel.from_peft(adapter, fresh("bert_cls"))


LAYER = "base_model.model.bert.encoder.layer.1.attention.self.query."
TENSORS: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "a missing factor": (
        {LAYER + "lora_B.weight": None},
        "layer.1.attention.self.query.lora.lora_B",
    ),
    "a narrow factor": ({LAYER + "lora_A.weight": torch.zeros(4, 5)}, "(4, 5) in the file"),
    "another rank": ({LAYER + "lora_B.weight": torch.zeros(64, 3)}, "(64, 3) in the file"),
    "a number": ({LAYER + "lora_A.weight": torch.tensor(1.0)}, "() in the file"),
    "an empty factor": ({LAYER + "lora_A.weight": torch.zeros(0, 64)}, "(0, 64) in the file"),
    "a magnitude": ({LAYER + "lora_magnitude_vector": torch.zeros(64)}, "lora_magnitude_vector"),
    "another head": ({"base_model.model.score.weight": torch.zeros(3, 64)}, "score.weight"),
    "a head of other labels": (
        {"base_model.model.classifier.weight": torch.zeros(9, 64)},
        "bias (3,), weight (9, 64)",
    ),
    "a module that is not there": (
        {
            "base_model.model.bert.encoder.layer.7.attention.self.query.lora_A.weight": torch.zeros(
                4, 64
            )
        },
        "'bert.encoder.layer.7.attention.self.query'",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_are_refused(case: str, adapter: Path) -> None:
    changes, told = TENSORS[case]
    file = adapter / "adapter_model.safetensors"
    tensors: dict[str, Any] = {**load_file(file), **changes}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, file)
    refused(adapter, CheckpointError, told)


def test_another_backbone(adapter: Path) -> None:
    refused(adapter, CheckpointError, "which BertModel does not have. Did you mean", "bert")


def test_a_file_without_lora(adapter: Path) -> None:
    save_file(
        {"base_model.model.classifier.bias": torch.zeros(3)}, adapter / "adapter_model.safetensors"
    )
    refused(adapter, CheckpointError, "holds no LoRA")


def test_modules_that_are_no_linear_maps(adapter: Path) -> None:
    key = "base_model.model.bert.embeddings.LayerNorm.lora_{}.weight"
    tensors = {key.format("A"): torch.zeros(4, 64), key.format("B"): torch.zeros(64, 4)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    refused(adapter, InsertionError, "'bert.embeddings.LayerNorm' is a LayerNorm")


def test_a_backbone_without_weights(adapter: Path) -> None:
    with torch.device("meta"):
        model = backbones._bare("bert_cls")
    with pytest.raises(CheckpointError, match="meta device"):
        AutoDeltaModel.from_peft(adapter, model)
    assert all("lora" not in name for name, _ in model.named_modules())


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("code of the file ran",))


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("adapter_config.json", None, "adapter_config.json"),
        ("adapter_config.json", b"{", "is not valid JSON"),
        ("adapter_model.safetensors", None, "holds neither"),
        ("adapter_model.safetensors", b"\0" * 99, "cannot be read"),
        ("adapter_model.bin", pickle.dumps({"a": Bomb()}), "could run code"),
    ],
)
def test_files_that_cannot_be_read(
    file: str, content: bytes | None, told: str, adapter: Path
) -> None:
    if file.endswith(".bin"):
        (adapter / "adapter_model.safetensors").unlink()
    if content is None:
        (adapter / file).unlink()
    else:
        (adapter / file).write_bytes(content)
    refused(adapter, CheckpointError, told)


def test_folder_and_backbone_exchanged(adapter: Path) -> None:
    with pytest.raises(ConfigError, match="first the folder"):
        AutoDeltaModel.from_peft(fresh("bert_cls"), adapter)  # type: ignore[arg-type]


def test_a_method_that_peft_has_not_says_so(tmp_path: Path) -> None:
    delta = AdapterModel(backbones.build("bert"))
    with pytest.raises(ConfigError, match="AdapterModel has no form in PEFT"):
        delta.export_peft(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
