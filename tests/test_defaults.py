"""Where deltas go that no one named modules for, and common names that reach other towers."""

from __future__ import annotations

import warnings
from typing import Any

import backbones
import pytest
import torch
import transformers
from placed import PLACED_METHODS, hosts, unchanged
from torch import Tensor, nn

import opendelta
from opendelta import (
    AdapterModel,
    BitFitModel,
    CompacterModel,
    LoraModel,
    LowRankAdapterModel,
    ParallelAdapterModel,
)
from opendelta.exceptions import AddressingError, InsertionError

TEXT: dict[str, Any] = {
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
IDS = torch.tensor([[5, 6, 7, 8, 9, 3, 4, 2], [4, 3, 9, 8, 7, 6, 5, 2]])


def clip() -> nn.Module:
    part = {k: v for k, v in TEXT.items() if "token" not in k and k != "vocab_size"}
    vision = {**part, "image_size": 8, "patch_size": 4}
    text = {**part, "vocab_size": 40, "eos_token_id": 2}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    ).eval()


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        **TEXT, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2
    )
    return transformers.MixtralModel(config).eval()


def changed_by_training(model: nn.Module, delta: nn.Module, **inputs: Tensor) -> bool:
    """Whether one step on the delta's parameters alone changes what the model computes."""
    delta.freeze_module()
    with torch.no_grad():
        first = model(**inputs)[0]
        for name, p in delta.named_parameters():
            if name.endswith("lora_B"):
                p.normal_()
    target = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
    loss = (model(**inputs)[0] - target).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in delta.parameters())
    torch.optim.SGD(delta.parameters(), 0.1).step()
    return not torch.equal(first, model(**inputs)[0])


# --- towers ---------------------------------------------------------------------------------------

TOWERS = {
    "attn.q": {"text_model"},
    "text.attn.q": {"text_model"},
    "vision.attn.q": {"vision_model"},
    "all.attn.q": {"text_model", "vision_model"},
    "vision.0.attn.q": {"vision_model"},
}


@pytest.mark.parametrize(("pattern", "towers"), TOWERS.items(), ids=TOWERS)
def test_other_towers_are_reached_by_name(pattern: str, towers: set[str]) -> None:
    delta = LoraModel(clip(), modified_modules=[pattern], common_structure=True)
    layers = (0,) if ".0." in pattern else (0, 1)
    assert hosts(delta) == [
        f"{tower}.encoder.layers.{layer}.self_attn.q_proj"
        for tower in sorted(towers)
        for layer in layers
    ]


def test_a_tower_can_be_excluded_and_its_roles_too() -> None:
    delta = LoraModel(
        clip(),
        modified_modules=["all.attn.q"],
        common_structure=True,
        exclude_modules=["vision.1.attn"],
    )
    assert [n for n in hosts(delta) if n.startswith("vision")] == [
        "vision_model.encoder.layers.0.self_attn.q_proj"
    ]


def test_an_unknown_tower_raises_with_those_that_there_are() -> None:
    model = clip()
    with unchanged(model), pytest.raises(AddressingError, match="towers are text, vision"):
        LoraModel(model, modified_modules=["audio.attn.q"], common_structure=True)


@pytest.mark.parametrize("method", ["ParallelAdapterModel", "PrefixModel", "CompacterModel"])
@pytest.mark.parametrize("tower", ["vision", "all"])
def test_methods_that_need_widths_reach_other_towers(method: str, tower: str) -> None:
    model = clip()
    patterns = [f"{tower}.attn"] * (2 if method == "ParallelAdapterModel" else 1)
    delta = getattr(opendelta, method)(model, modified_modules=patterns, common_structure=True)
    found = {n.split(".")[0] for n in hosts(delta)}
    assert found == ({"vision_model", "text_model"} if tower == "all" else {"vision_model"})
    image = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for p in delta.parameters():
            p.normal_()
        changed = model(input_ids=IDS, pixel_values=image).image_embeds
        delta.detach()
        assert not torch.equal(model(input_ids=IDS, pixel_values=image).image_embeds, changed)


def test_widths_of_another_tower_are_read_without_a_forward() -> None:
    model = clip()

    def refuse(*_: Any) -> None:
        raise AssertionError("no forward is needed")

    model.register_forward_pre_hook(refuse)
    delta = ParallelAdapterModel(model, modified_modules=["vision.attn"] * 2, common_structure=True)
    assert {n.split(".")[0] for n in hosts(delta)} == {"vision_model"}


def test_hints_where_names_are_of_the_other_kind() -> None:
    model = clip()
    with unchanged(model), pytest.raises(AddressingError, match="pass common_structure=True"):
        LoraModel(model, modified_modules=["vision.attn.q"])
    with unchanged(model), pytest.raises(AddressingError, match="leave out common_structure"):
        LoraModel(model, modified_modules=["q_proj"], common_structure=True)
    with unchanged(model), pytest.raises(AddressingError, match=r"mean 'vision\.attn\.q'"):
        LoraModel(model, modified_modules=["visoin.attn.q"], common_structure=True)


# --- roles ----------------------------------------------------------------------------------------


def test_a_role_that_is_not_there_raises_with_the_roles_that_are() -> None:
    model = backbones.build("bert")
    with unchanged(model), pytest.raises(AddressingError) as raised:
        LoraModel(model, modified_modules=["crossattn.q"], common_structure=True)
    told = str(raised.value)
    assert "'crossattn.q'" in told and "Did you mean 'attn.q'" in told
    roles = (
        "attn, attn.k, attn.layer_norm, attn.proj, attn.q, attn.v, embeddings, ff, ff.layer_norm"
    )
    assert f"Its roles are {roles}, ff.w1, ff.w2 (" in told


def test_lora_goes_on_the_feed_forward_where_there_is_no_attention() -> None:
    sizes = {k: v for k, v in TEXT.items() if k != "num_attention_heads"}
    model = transformers.FNetModel(transformers.FNetConfig(**sizes)).eval()
    delta = LoraModel(model)
    assert hosts(delta) == [
        f"encoder.layer.{layer}.{part}.dense"
        for layer in (0, 1)
        for part in ("intermediate", "output")
    ]
    assert changed_by_training(model, delta, input_ids=IDS)


def test_default_places_whose_weights_are_read_are_left_out_with_one_warning() -> None:
    """WavLM's attention hands the weights of its projections to a function of torch's."""
    sizes = {k: v for k, v in TEXT.items() if k != "max_position_embeddings"}
    shape = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
    more = {"num_feat_extract_layers": 2, "layerdrop": 0.0, "mask_time_prob": 0.0}
    config = transformers.WavLMConfig(**sizes, **shape, **positions, **more)
    model = transformers.WavLMModel(config).eval()
    feed_forward = {
        "LoraModel": ["intermediate_dense", "output_dense"],
        "DoraModel": ["intermediate_dense", "output_dense"],
        "IA3Model": ["output_dense"],
    }
    for method, leaves in feed_forward.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", opendelta.DeltaWarning)
            delta = getattr(opendelta, method)(model)
            model(torch.randn(1, 400))
        (warning,) = [str(w.message) for w in caught if w.category is opendelta.DeltaWarning]
        assert f"{method} left out 'encoder.layers.0." in warning and " and 1 more, " in warning
        names = [f"encoder.layers.{i}.feed_forward.{leaf}" for i in (0, 1) for leaf in leaves]
        assert hosts(delta) == names
        assert getattr(opendelta, method).preview(model).modules == names
        delta.remove()
    with pytest.raises(InsertionError, match="v_proj' is read by its parent"):
        LoraModel(model, modified_modules=["v_proj"])
    AdapterModel(model)


def test_lora_on_queries_that_the_backbone_scales_in_place() -> None:
    config = transformers.LongformerConfig(**TEXT, attention_window=4)
    model = transformers.LongformerModel(config).eval()
    assert changed_by_training(model, LoraModel(model), input_ids=IDS)


# --- experts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [AdapterModel, LowRankAdapterModel, CompacterModel])
def test_fused_experts_take_one_adapter(method: type[opendelta.DeltaBase]) -> None:
    model = mixtral()
    delta = method(model)
    assert hosts(delta) == [
        f"layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn.o_proj", "mlp.experts")
    ]
    assert changed_by_training(model, delta, input_ids=IDS)


def test_fused_experts_take_a_parallel_adapter() -> None:
    model = mixtral()
    delta = ParallelAdapterModel(model)
    assert set(hosts(delta)) == {
        f"layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn", "mlp.experts")
    }
    assert changed_by_training(model, delta, input_ids=IDS)


@pytest.mark.parametrize("method", [LoraModel, BitFitModel])
def test_experts_have_no_linear_and_no_bias(method: type[opendelta.DeltaBase]) -> None:
    model = mixtral()
    with unchanged(model), pytest.raises(InsertionError, match=r"experts.*AdapterModel"):
        method(model, modified_modules=["ff"], common_structure=True)


@pytest.mark.parametrize("method", PLACED_METHODS)
def test_every_method_has_defaults_on_a_mixture_of_experts(method: str) -> None:
    model = mixtral()
    with torch.no_grad():
        before = model(IDS)[0]
        delta = getattr(opendelta, method)(model)
        delta.detach()
        assert torch.equal(model(IDS)[0], before)
