"""The common names: golden transforms, and what inference must find in backbones of any layout."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import backbones
import pytest
import torch
import transformers
from torch import Tensor, nn

from opendelta import AdapterModel, LoraModel
from opendelta.addressing.common_structure import CommonStructureMap
from opendelta.exceptions import AddressingError, DeltaWarning

CASES = json.loads((Path(__file__).parent / "golden" / "manifest.json").read_text())["cases"]
TRANSFORMS = {case["id"]: case for case in CASES if case["kind"] == "transform"}
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def folded(name: str) -> str:
    """`name` with its numbers as ``$``."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "$", name)


def by_role(model: nn.Module, **kwargs: Any) -> dict[str, set[str]]:
    """Role -> the modules that have it, numbers as ``$``."""
    structure = CommonStructureMap(model, **kwargs)
    found: dict[str, set[str]] = {role: set() for role in structure.roles()}
    for name in structure.matched_pairs:
        for common in structure.names(name):
            for role, modules in found.items():
                if common == role or common.endswith("." + role):
                    modules.add(folded(name))
    return found


# --- the six families -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", TRANSFORMS.values(), ids=TRANSFORMS)
def test_golden_transform(case: dict[str, Any]) -> None:
    structure = CommonStructureMap(backbones.build(case["backbone"]))
    table = {key: structure.transform(key, strict=False) for key in case["table"]}
    assert table == case["table"]


def matched(structure: CommonStructureMap, names: list[str], pattern: str) -> set[str]:
    """What a pattern addresses: names that end with it, at a dot."""
    return {
        name
        for name in names
        if any(f".{common}".endswith("." + pattern) for common in structure.names(name))
    }


COMMON = {
    case["id"]: case
    for case in CASES
    if case["kind"] in ("delta", "address")
    and len(case["deltas"]) == 1
    and case["deltas"][0]["kwargs"].get("common_structure")
    and not case["id"].startswith("bitfit-opt")  # its `ff` is no module: see test_golden
}


@pytest.mark.parametrize("case", COMMON.values(), ids=COMMON)
def test_golden_patterns_by_names(case: dict[str, Any]) -> None:
    structure = CommonStructureMap(backbones.build(case["backbone"]))
    found: set[str] = set()
    for pattern in case["deltas"][0]["kwargs"]["modified_modules"]:
        found |= matched(structure, list(structure.matched_pairs), pattern)
    assert found == set(case["matched"])


def test_fused_projections_have_the_name_of_each_role() -> None:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=40, add_cross_attention=True,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    structure = CommonStructureMap(transformers.GPT2LMHeadModel(config))
    block = "transformer.decoder.block.0"
    assert structure.transform("transformer.h.0.attn.c_attn") == f"{block}.attn.qkv"
    assert structure.names("transformer.h.0.attn.c_attn") == (
        f"{block}.attn.q",
        f"{block}.attn.k",
        f"{block}.attn.v",
    )
    assert structure.names("transformer.h.0.crossattention.c_attn") == (
        f"{block}.crossattn.k",
        f"{block}.crossattn.v",
    )
    assert structure.names("transformer.h.0.crossattention.q_attn") == (f"{block}.crossattn.q",)
    assert structure.names("lm_head") == ("lm_head.proj",)
    assert structure.names("transformer.h.0.mlp.act") == (f"{block}.ff.act",)


def test_gated_t5() -> None:
    structure = CommonStructureMap(backbones.build("t5_v11"))
    home = "decoder.block.1.layer.2.DenseReluDense."
    assert structure.transform(home + "wi_0") == "decoder.block.1.ff.w1"
    assert structure.transform(home + "wi_1") == "decoder.block.1.ff.w3"
    assert structure.transform(home + "wo") == "decoder.block.1.ff.w2"
    assert structure.transform("lm_head") == "lm_head.proj"


def test_deberta_v2_is_named_like_bert() -> None:
    deberta = CommonStructureMap(backbones.build("deberta"))
    home = "encoder.layer.1"
    assert deberta.transform(f"{home}.intermediate") == "encoder.block.1.ff"
    assert deberta.transform(f"{home}.intermediate.dense") == "encoder.block.1.ff.w1"
    assert deberta.transform(f"{home}.attention.self.query_proj") == "encoder.block.1.attn.q"
    assert set(deberta.roles()) == set(CommonStructureMap(backbones.build("bert")).roles())


def test_attn_does_not_reach_crossattn() -> None:
    structure = CommonStructureMap(backbones.build("t5"))
    names = list(structure.matched_pairs)
    own, cross = (matched(structure, names, role) for role in ("attn.q", "crossattn.q"))
    assert len(own) == 4 and len(cross) == 2 and not own & cross
    assert all("SelfAttention" in name for name in own)
    assert all("EncDecAttention" in name for name in cross)
    assert matched(structure, names, "attn") == {
        f"{stack}.block.{layer}.layer.0" for stack in ("encoder", "decoder") for layer in (0, 1)
    }


@pytest.mark.parametrize("kind", ["bert", "gpt2", "opt", "t5", "deberta", "roberta"])
def test_a_family_is_found_in_any_wrapper(kind: str) -> None:
    bare = backbones.build(kind)
    inner = CommonStructureMap(bare)
    wrapped = nn.ModuleDict({"extra": nn.Linear(2, 2), "deep": nn.ModuleDict({"er": bare})})
    outer = CommonStructureMap(wrapped)
    assert outer.matched_pairs == {
        f"deep.er.{name}": f"deep.er.{common}" for name, common in inner.matched_pairs.items()
    }


@pytest.mark.parametrize(
    ("head", "decoder"),
    [
        (transformers.BertForMaskedLM, "cls.predictions"),
        (transformers.RobertaForMaskedLM, "lm_head"),
    ],
)
def test_head_of_masked_language_models(head: Any, decoder: str) -> None:
    structure = CommonStructureMap(head(head.config_class(**SIZES)))
    assert structure.transform(decoder) == "lm_head"
    assert structure.transform(f"{decoder}.decoder") == "lm_head.proj"
    assert structure.transform(f"{decoder}.decoder.weight") == "lm_head.proj.weight"


def test_encoder_decoder_pair() -> None:
    encoder = transformers.BertConfig(**SIZES)
    decoder = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=40, bos_token_id=1, eos_token_id=2
    )
    pair = transformers.EncoderDecoderModel(
        transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    )
    roles = by_role(pair)
    assert roles["attn.q"] == {
        "encoder.encoder.layer.$.attention.self.query",
        "decoder.transformer.h.$.attn.c_attn",
    }
    assert roles["crossattn.q"] == {"decoder.transformer.h.$.crossattention.q_attn"}
    assert roles["lm_head.proj"] == {"decoder.lm_head"}


def test_a_half_fitting_layout_is_left_to_inference() -> None:
    """MobileBERT has BERT's names and more feed-forwards in each block."""
    config = transformers.MobileBertConfig(
        **SIZES, true_hidden_size=8, intra_bottleneck_size=8, embedding_size=16
    )
    roles = by_role(transformers.MobileBertModel(config))
    assert {f"encoder.layer.$.{n}" for n in ("ffn.$.output.dense", "output.dense")} == roles[
        "ff.w2"
    ]


# --- transform, roles, explain --------------------------------------------------------------------


def test_strict_transform() -> None:
    structure = CommonStructureMap(backbones.build("bert"))
    assert structure.transform("encoder.layer.0.attention.self.query") == "encoder.block.0.attn.q"
    assert structure.transform("encoder.layer.0.attention.self.query.bias") == (
        "encoder.block.0.attn.q.bias"
    )
    assert structure.transform("encoder.layer.0.attention.self") is None
    assert structure.transform("pooler.dense") is None
    with pytest.warns(DeltaWarning, match=r"pooler\.dense"):
        assert structure.transform("pooler.dense", strict=False, warning=True) == "pooler.dense"
    with pytest.raises(AddressingError) as caught:
        structure.transform("encoder.layer.0.attention.self.querry")
    assert "'encoder.layer.0.attention.self.query'" in str(caught.value)


def test_shared_modules_exist_under_each_name() -> None:
    model = backbones.build("t5")
    model.again = model.encoder.block[0]
    structure = CommonStructureMap(model)
    assert structure.transform("again.layer.0") is None
    assert structure.transform("encoder.block.0.layer.0") == "encoder.block.0.attn"


def test_matched_pairs_are_all_modules_with_a_common_name() -> None:
    model = backbones.build("opt")
    structure = CommonStructureMap(model)
    expected = {
        name: common
        for name, _ in model.named_modules()
        if (common := structure.transform(name)) is not None
    }
    assert structure.matched_pairs == expected
    assert list(expected) == list(structure.matched_pairs)
    assert expected["model.decoder.layers.1.fc2"] == "model.decoder.block.1.ff.w2"


def test_roles() -> None:
    assert CommonStructureMap(backbones.build("bert")).roles() == [
        "attn", "attn.k", "attn.layer_norm", "attn.proj", "attn.q", "attn.v",
        "embeddings", "ff", "ff.layer_norm", "ff.w1", "ff.w2",
    ]  # fmt: skip
    t5 = CommonStructureMap(backbones.build("t5_v11")).roles()
    assert {"crossattn", "crossattn.q", "ff.w3", "lm_head.proj", "layer_norm"} <= set(t5)


def test_outputs_of_a_role() -> None:
    bert = CommonStructureMap(backbones.build("bert"))
    assert {folded(n) for n in bert.outputs("attn")} == {"encoder.layer.$.attention.output.dense"}
    assert {folded(n) for n in bert.outputs("ff")} == {"encoder.layer.$.output.dense"}
    assert bert.outputs("crossattn") == []


def test_explanation_prints_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    structure = CommonStructureMap(backbones.build("llama"))
    assert capsys.readouterr().out == ""
    text = str(structure.explain())
    row = next(line for line in text.splitlines() if "layers.1.mlp.gate_proj " in line)
    assert [cell.strip() for cell in re.split("[|│]", row)[1:4]] == [
        "model.decoder.block.1",
        "ff.w1",
        "model.layers.1.mlp.gate_proj",
    ]
    assert "64 to 128" in row
    assert repr(structure.explain()) == text


def test_visualize_logs_the_table_only_where_it_is_wanted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = backbones.build("bert")
    with caplog.at_level(logging.INFO, logger="opendelta"):
        CommonStructureMap(model)
    assert not caplog.records
    with caplog.at_level(logging.DEBUG, logger="opendelta"):
        CommonStructureMap(model, visualize=False)
        assert not caplog.records
        CommonStructureMap(model)
    assert "encoder.layer.0.attention.self.query" in caplog.text


def test_deltas_are_not_seen() -> None:
    model = backbones.build("bert")
    before = CommonStructureMap(model).matched_pairs
    LoraModel(model)
    AdapterModel(model)
    assert CommonStructureMap(model).matched_pairs == before


def test_warning_tells_of_blocks_with_gaps() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Attention(8) for _ in range(2))

    with pytest.warns(DeltaWarning) as caught:
        CommonStructureMap(Half(), warning=True)
    assert [str(w.message) for w in caught] == [
        f"No feed-forward is recognised in block.{layer}." for layer in (0, 1)
    ]


# --- nothing to find ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "toy"])
def test_a_backbone_without_blocks_raises_and_advises(name: str) -> None:
    with pytest.raises(AddressingError) as caught:
        CommonStructureMap(nn.Sequential(nn.Linear(3, 4), nn.Tanh()) if name == "mlp" else Plain())
    message = str(caught.value)
    for part in (
        "Available models with default configurations are",
        "BERT, RoBERTa, DeBERTa-v2, GPT2, OPT and T5",
        "manually add",
        "'modified_modules'",
        "visualization of your model's structure",
    ):
        assert part in message
    assert ("1 linear layer" in message) or ("2 linear layers (first, second)" in message)


def test_strict_false_gives_an_empty_map() -> None:
    structure = CommonStructureMap(Plain(), strict=False)
    assert structure.matched_pairs == {}
    assert structure.roles() == []
    assert structure.names("first") == ("first",)
    assert structure.transform("first.weight", strict=False) == "first.weight"
    assert structure.transform("first") is None


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.second = nn.Linear(4, 5)


# --- inference on known architectures -------------------------------------------------------------


def tiny(kind: str, **more: Any) -> nn.Module:
    """A tiny random backbone of a transformers architecture; None takes a size back."""
    sizes = {name: size for name, size in {**SIZES, **more}.items() if size is not None}
    config = getattr(transformers, kind + "Config")(**sizes)
    return getattr(transformers, kind + "Model")(config)


ATTENTION = {"attn.q": "q_proj", "attn.k": "k_proj", "attn.v": "v_proj"}


def test_bart() -> None:
    roles = by_role(backbones.build("bart"))
    for role, leaf in {**ATTENTION, "attn.proj": "out_proj"}.items():
        assert roles[role] == {
            f"{stack}.layers.$.self_attn.{leaf}" for stack in ("encoder", "decoder")
        }
        assert roles["cross" + role] == {f"decoder.layers.$.encoder_attn.{leaf}"}
    assert roles["ff.w1"] == {f"{stack}.layers.$.fc1" for stack in ("encoder", "decoder")}
    assert roles["ff.w2"] == {f"{stack}.layers.$.fc2" for stack in ("encoder", "decoder")}
    assert roles["embeddings"] == {"shared"}
    structure = CommonStructureMap(backbones.build("bart"))
    assert structure.transform("decoder.layers.1.fc1") == "decoder.block.1.ff.w1"


def test_distilbert() -> None:
    structure = CommonStructureMap(backbones.build("distilbert"))
    home, block = "transformer.layer.1", "transformer.encoder.block.1"
    table = {
        "embeddings.word_embeddings": "embeddings",
        "transformer.layer": "transformer.encoder.block",
        home: block,
        f"{home}.attention": f"{block}.attn",
        f"{home}.attention.q_lin": f"{block}.attn.q",
        f"{home}.attention.k_lin": f"{block}.attn.k",
        f"{home}.attention.v_lin": f"{block}.attn.v",
        f"{home}.attention.out_lin": f"{block}.attn.proj",
        f"{home}.sa_layer_norm": f"{block}.layer_norm",
        f"{home}.ffn": f"{block}.ff",
        f"{home}.ffn.lin1": f"{block}.ff.w1",
        f"{home}.ffn.lin2": f"{block}.ff.w2",
        f"{home}.output_layer_norm": f"{block}.layer_norm",
    }
    assert {name: structure.transform(name) for name in table} == table


def test_llama() -> None:
    structure = CommonStructureMap(backbones.build("llama"))
    home, block = "model.layers.0", "model.decoder.block.0"
    table = {
        "model.embed_tokens": "model.embeddings",
        "model.norm": "model.decoder.layer_norm",
        f"{home}.self_attn": f"{block}.attn",
        f"{home}.self_attn.q_proj": f"{block}.attn.q",
        f"{home}.self_attn.o_proj": f"{block}.attn.proj",
        f"{home}.mlp": f"{block}.ff",
        f"{home}.mlp.gate_proj": f"{block}.ff.w1",
        f"{home}.mlp.up_proj": f"{block}.ff.w3",
        f"{home}.mlp.down_proj": f"{block}.ff.w2",
        f"{home}.input_layernorm": f"{block}.layer_norm",
        "lm_head": "lm_head.proj",
    }
    assert {name: structure.transform(name) for name in table} == table


def test_vit() -> None:
    structure = CommonStructureMap(backbones.build("vit"))
    assert structure.transform("layers.1.attention.q_proj") == "encoder.block.1.attn.q"
    assert structure.transform("layers.1.mlp.fc2") == "encoder.block.1.ff.w2"
    assert structure.transform("layernorm") == "encoder.layer_norm"


MAMBA = {"attn.q": "mixer.in_proj", "attn.v": "mixer.in_proj", "attn.proj": "mixer.out_proj"}
EXPECTED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "Phi3": ({}, {
        "attn.q": "layers.$.self_attn.qkv_proj", "attn.v": "layers.$.self_attn.qkv_proj",
        "attn.proj": "layers.$.self_attn.o_proj", "ff.w1": "layers.$.mlp.gate_up_proj",
        "ff.w3": "layers.$.mlp.gate_up_proj", "ff.w2": "layers.$.mlp.down_proj",
    }),
    "GPTNeoX": ({}, {
        "attn.q": "layers.$.attention.query_key_value", "attn.proj": "layers.$.attention.dense",
        "ff.w1": "layers.$.mlp.dense_h_to_4h", "ff.w2": "layers.$.mlp.dense_4h_to_h",
    }),
    "Mamba": ({}, {role: "layers.$." + name for role, name in MAMBA.items()}),
    "Mixtral": ({"num_local_experts": 2, "num_key_value_heads": 2}, {
        "attn.q": "layers.$.self_attn.q_proj", "ff": "layers.$.mlp.experts",
    }),
    "Albert": ({"embedding_size": 8}, {
        "attn.q": "encoder.albert_layer_groups.$.albert_layers.$.attention.query",
        "ff.w1": "encoder.albert_layer_groups.$.albert_layers.$.ffn",
        "ff.w2": "encoder.albert_layer_groups.$.albert_layers.$.ffn_output",
    }),
    "XLM": ({"emb_dim": 16, "n_layers": 2, "n_heads": 2, "n_words": 40}, {
        "attn.q": "attentions.$.q_lin", "attn.proj": "attentions.$.out_lin",
        "attn": "attentions.$", "ff": "ffns.$", "ff.w1": "ffns.$.lin1", "ff.w2": "ffns.$.lin2",
    }),
    "MPNet": ({}, {
        "attn.q": "encoder.layer.$.attention.attn.q", "ff.w2": "encoder.layer.$.output.dense",
        "attn.proj": "encoder.layer.$.attention.attn.o",
    }),
    "DeepseekV3": ({"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                    "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8}, {
        "attn.q": "layers.$.self_attn.q_b_proj", "attn.k": "layers.$.self_attn.kv_b_proj",
        "attn.v": "layers.$.self_attn.kv_b_proj", "attn.proj": "layers.$.self_attn.o_proj",
    }),
    "Swin": ({"num_attention_heads": None, "num_hidden_layers": None, "image_size": 16,
              "patch_size": 4, "embed_dim": 8, "depths": [1, 1],
              "num_heads": [2, 2], "window_size": 2}, {
        "attn.q": "encoder.layers.$.blocks.$.attention.q_proj",
        "ff.w2": "encoder.layers.$.blocks.$.mlp.fc2",
    }),
    "SwitchTransformers": ({"d_model": 16, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2,
                            "d_kv": 8, "num_heads": 2, "num_experts": 2}, {
        "crossattn.q": "decoder.block.$.layer.$.EncDecAttention.q",
    }),
}  # fmt: skip


@pytest.mark.parametrize("kind", EXPECTED)
def test_architectures(kind: str) -> None:
    sizes, expected = EXPECTED[kind]
    with torch.device("meta"):
        roles = by_role(tiny(kind, **sizes))
    assert {role: roles[role] for role in expected} == {r: {n} for r, n in expected.items()}


def test_fused_experts_are_one_feed_forward_each() -> None:
    sizes, _ = EXPECTED["DeepseekV3"]
    with torch.device("meta"):
        structure = CommonStructureMap(tiny("DeepseekV3", **sizes))
    assert structure.names("layers.1.mlp.experts") == ("decoder.block.1.ff",)
    assert structure.outputs("ff") == [
        "layers.0.mlp.down_proj",
        "layers.1.mlp.experts",
        "layers.1.mlp.shared_experts.down_proj",
    ]
    assert "layers.1.mlp.gate" not in structure.matched_pairs


def test_hybrid_of_state_space_and_attention() -> None:
    config = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 4}
    with torch.device("meta"):
        structure = CommonStructureMap(tiny("Jamba", **config, num_key_value_heads=2))
    assert structure.names("layers.0.mamba.in_proj")[0] == "decoder.block.0.attn.q"
    assert structure.names("layers.1.self_attn.q_proj") == ("decoder.block.1.attn.q",)
    assert structure.outputs("attn") == ["layers.0.mamba.out_proj", "layers.1.self_attn.o_proj"]


def test_convolutional_blocks_have_an_input_and_an_output() -> None:
    with torch.device("meta"):
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic"
        )
        roles = by_role(transformers.ResNetModel(config))
    assert roles["attn.q"] == roles["attn.v"] == {"encoder.stages.$.layers.$.layer.$.convolution"}
    assert not any("shortcut" in name for name in roles["attn.q"] | roles["attn.proj"])


# --- inference on layouts of one's own ------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int, names: str = "q k v o") -> None:
        super().__init__()
        for name in names.split():
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x


def stack(*parts: tuple[str, nn.Module], layers: int = 2) -> nn.Module:
    """A backbone of `layers` blocks, each with copies of `parts`."""
    root = nn.Module()
    root.blocks = nn.ModuleList()
    for _ in range(layers):
        block = nn.Module()
        for name, part in parts:
            setattr(block, name, part)
        root.blocks.append(block)
    return root


def test_an_inner_width_below_the_hidden_width() -> None:
    """What leads back is the way down, though it widens."""
    roles = by_role(
        stack(("att", Attention(8)), ("a", nn.Linear(8, 4)), ("b", nn.Linear(4, 8)), layers=1)
    )
    assert roles["ff.w1"] == {"blocks.$.a"}
    assert roles["ff.w2"] == {"blocks.$.b"}


def test_an_inner_width_equal_to_the_hidden_width() -> None:
    ff = nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8), "gate": nn.Linear(8, 8)})
    ordered = nn.ModuleDict({name: ff[name] for name in ("gate", "up", "down")})
    roles = by_role(stack(("att", Attention(8)), ("mlp", ordered), layers=1))
    assert [roles[f"ff.w{n}"] for n in (1, 2, 3)] == [
        {f"blocks.$.mlp.{name}"} for name in ("gate", "down", "up")
    ]


def test_projections_in_the_block_itself() -> None:
    parts = [(name, nn.Linear(8, 8)) for name in ("query", "key", "value", "out_proj")]
    ff = [("fc1", nn.Linear(8, 32)), ("fc2", nn.Linear(32, 8))]
    structure = CommonStructureMap(stack(*parts, *ff, layers=1))
    assert structure.transform("blocks.0.query") == "block.0.attn.q"
    assert structure.transform("blocks.0.fc2") == "block.0.ff.w2"


@pytest.mark.parametrize(("width_out", "name"), [(24, "anything"), (12, "W_pack")])
def test_a_nameless_fused_projection(width_out: int, name: str) -> None:
    attention = nn.ModuleDict({name: nn.Linear(8, width_out), "back": nn.Linear(8, 8)})
    ff = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    roles = by_role(stack(("attention", attention), ("ff", ff), layers=1))
    assert roles["attn.q"] == roles["attn.v"] == {f"blocks.$.attention.{name}"}
    assert roles["ff.w1"] == {"blocks.$.ff.$"}


def test_names_that_only_look_like_projections() -> None:
    attention = Attention(8, "q k v o q_norm rel_k pos_q_proj gate_v")
    ff = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    roles = by_role(stack(("attention", attention), ("ff", ff)))
    assert [roles[f"attn.{c}"] for c in "qkv"] == [{f"blocks.$.attention.{c}"} for c in "qkv"]
    assert roles["attn.proj"] == {"blocks.$.attention.o"}


def test_torch_transformer_layers() -> None:
    """`nn.MultiheadAttention` reads its output projection without calling it: it has no role."""
    layer = nn.TransformerDecoderLayer(8, 2, 16)
    structure = CommonStructureMap(nn.TransformerDecoder(layer, 2))
    assert structure.names("layers.0.self_attn") == ("block.0.attn",)
    assert structure.names("layers.1.linear2") == ("block.1.ff.w2",)
    assert "layers.0.self_attn.out_proj" not in structure.matched_pairs
    assert {folded(n) for n in structure.outputs("attn")} == {
        "layers.$.self_attn",
        "layers.$.multihead_attn",
    }


def test_names_of_classes_and_config_do_not_matter() -> None:
    model = backbones.build("llama")
    expected = CommonStructureMap(model).matched_pairs

    def anonymous(module: nn.Module) -> nn.Module:
        """A bare copy of the skeleton: other classes, no config, same attributes of leaves."""
        if not module._modules:
            return module
        copy = nn.ModuleList() if isinstance(module, nn.ModuleList) else nn.Module()
        copy.__dict__.update(
            {k: v for k, v in vars(module).items() if k in ("is_causal", "training")}
        )
        for name, child in module._modules.items():
            copy._modules[name] = None if child is None else anonymous(child)
        return copy

    found = CommonStructureMap(anonymous(model)).matched_pairs
    outside = {"model.embed_tokens", "lm_head"}  # known from the model's own methods
    assert found == {name: common for name, common in expected.items() if name not in outside}


def test_depth_is_linear_in_time() -> None:
    """Sixteen times the layers take about sixteen times as long; quadratic would be 256 times."""

    def seconds(layers: int) -> float:
        with torch.device("meta"):
            model = tiny("Llama", num_hidden_layers=layers, num_key_value_heads=2)
        times = []
        for _ in range(3):
            start = time.process_time()
            CommonStructureMap(model)
            times.append(time.process_time() - start)
        return min(times)

    few, many = seconds(16), seconds(256)
    assert many < 50 * few


# --- towers ---------------------------------------------------------------------------------------


def clip() -> nn.Module:
    part = {k: v for k, v in SIZES.items() if "token" not in k and k != "vocab_size"}
    text = {**part, "vocab_size": 40, "eos_token_id": 2}
    vision = {**part, "image_size": 8, "patch_size": 4}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    )


def test_the_default_scope_is_the_tower_of_the_input_embeddings() -> None:
    model = clip()
    structure = CommonStructureMap(model)
    assert structure.towers == {"text": "text_model", "vision": "vision_model"}
    assert by_role(model)["attn.q"] == {"text_model.encoder.layers.$.self_attn.q_proj"}
    assert structure.names("vision_model.encoder.layers.0.self_attn.q_proj") == (
        "vision_model.encoder.layers.0.self_attn.q_proj",
    )


def test_other_towers_by_name_and_all() -> None:
    model = clip()
    text, vision = (f"{t}_model.encoder.layers.$.self_attn.q_proj" for t in ("text", "vision"))
    assert by_role(model, scope="vision")["attn.q"] == {vision}
    assert by_role(model, scope="all")["attn.q"] == {text, vision}
    structure = CommonStructureMap(model)
    tower, pattern = structure.scoped("vision.attn.q")
    assert pattern == "attn.q" and "vision_model.encoder.layers.0.self_attn.q_proj" in (
        matched(tower, list(tower.matched_pairs), pattern)
    )
    assert structure.scoped("attn.q") == (structure, "attn.q")
    with pytest.raises(AddressingError, match=r"scope='audio'.*'text', 'vision', 'all'"):
        CommonStructureMap(model, scope="audio")


def test_an_image_encoder_with_a_text_decoder_is_one_model() -> None:
    vision = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        image_size=8, patch_size=4,
    )  # fmt: skip
    text = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=40, bos_token_id=1, eos_token_id=2
    )
    pair = transformers.VisionEncoderDecoderModel(
        transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(vision, text)
    )
    assert by_role(pair)["attn.q"] == {
        "encoder.layers.$.attention.q_proj",
        "decoder.transformer.h.$.attn.c_attn",
    }
