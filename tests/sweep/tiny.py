"""Tiny random backbones of every architecture in transformers, without a download.

`backbone(model_type)` builds one with some thousand parameters and `batch(model)` an input that
passes through it; `default_size(model_type)` builds the default config on the meta device. A config
is shrunk by what its fields are called: widths, numbers of layers and heads, vocabularies and
images get the same small values everywhere, so that they still fit together. `EXCEPTIONS` says
what that gets wrong.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import configuration_auto, modeling_auto

HIDDEN, INNER, VOCABULARY, IMAGE, PATCH = 32, 48, 100, 32, 8
POSITIONS = 128  # like the vocabulary, room for the 100 of a default soft prompt

# What a field of a config is set to, by its name.
_SIZES: dict[str, int] = {
    name: size
    for size, names in [
        (
            2,
            """num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers depth
            num_decoder_layers num_encoder_layers num_blocks decoder_num_hidden_layers layers
            num_key_value_heads n_head_kv num_kv_heads linear_num_key_heads swa_num_key_value_heads
            cross_num_key_value_heads resampler_depth memory_attention_num_layers text_layers
            num_mel_attn_blocks aligner_num_add_layers num_experts_per_tok window_size
            moe_topk moe_k top_k num_codebooks n_codebooks
            num_local_layers max_window_layers""",
        ),
        (
            4,
            """num_attention_heads num_heads n_head n_heads encoder_attention_heads attention_heads
            decoder_attention_heads linear_num_value_heads swa_num_attention_heads index_n_heads
            cross_num_attention_heads decoder_num_attention_heads resampler_n_heads
            resampler_heads num_local_experts n_routed_experts num_experts moe_num_experts
            qk_rope_head_dim rotary_dim mamba_d_state state_size ssm_state_size time_step_rank
            mamba_dt_rank num_conv_pos_embedding_groups linear_num_heads""",
        ),
        (
            8,
            """head_dim d_kv d_head attention_head_dim v_head_dim qk_nope_head_dim kv_channels
            q_lora_rank kv_lora_rank linear_key_head_dim linear_value_head_dim swa_head_dim
            cross_head_dim resampler_head_dim resampler_dim_head global_head_dim index_head_dim
            dim_head patch_size num_latents resampler_n_latents resampler_num_latents num_queries
            mamba_d_head mamba_head_dim linear_head_dim hidden_size_per_layer_input num_mel_bins
            num_conv_pos_embeddings altup_rank laurel_rank num_filters stem_channels
            chunk_size mamba_chunk_size zero_expert_num attention_window""",
        ),
        (12, "qk_head_dim"),
        (
            HIDDEN,
            """hidden_size d_model dim n_embd embed_dim word_embed_proj_dim projection_dim
            encoder_hidden_dim decoder_hidden_dim hidden_dim d_embed output_dim embedding_dim
            projector_hidden_size vision_hidden_size emb_dim encoder_hidden_size text_embed_dim
            decoder_hidden_size hidden_channels mask_feature_size out_hidden_size embedding_size
            text_hidden_size fusion_hidden_size output_hidden_size image_text_hidden_size
            audio_hidden_size backbone_hidden_size project_dim output_channels fpn_hidden_size
            feature_size cross_hidden_size attention_hidden_size memory_encoder_hidden_size
            memory_attention_hidden_size hidden_size_global codebook_dim image_size img_size
            input_image_size crop_size latent_dim vision_output_dim iou_head_hidden_dim
            base_channels projector_input_dim projector_output_dim descriptor_dim
            unit_embed_dim upsample_initial_channel moe_hidden_size""",
        ),
        (
            INNER,
            """intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff n_inner d_inner
            dim_feedforward ffn_hidden_size moe_intermediate_size shared_expert_intermediate_size
            mlp_dim inner_dim intermediate_size_mlp decoder_intermediate_size linear_units
            encoder_linear_units decoder_linear_units shared_intermediate_size
            expert_ffn_hidden_size
            moe_shared_expert_intermediate_size memory_attention_feed_forward_hidden_size""",
        ),
        (
            POSITIONS,
            """max_position_embeddings n_positions n_ctx max_seq_len max_target_positions
            max_source_positions max_2d_position_embeddings
            max_encoder_position_embeddings max_decoder_position_embeddings""",
        ),
        (64, "codebook_size"),
        (
            VOCABULARY,
            """vocab_size n_words src_vocab_size tgt_vocab_size text_vocab_size
            encoder_vocab_size decoder_vocab_size vocab_size_per_layer_input
            input_vocab_size output_vocab_size unit_hifi_gan_vocab_size""",
        ),
    ]
    for name in names.split()
}
# Fields that name layers, and follow from the rest where they are left out.
_DERIVED = ("out_features", "out_indices", "stage_names")
# The same as `_SIZES` for fields that hold one number for each stage.
_STAGES = {
    "depths": 1,
    "num_heads": 2,
    "num_attention_heads": 2,
    "layers_block": 1,
    "stage_num_blocks": 1,
}
_WIDENING = ("hidden_sizes", "embed_dims", "encoder_hidden_sizes", "embed_dim", "hidden_dims")


def model_types() -> list[str]:
    """Every type of model that transformers knows; of several of one config, the shortest."""
    named = configuration_auto.CONFIG_MAPPING_NAMES
    shortest: dict[str, str] = {}
    for kind in sorted(named, key=len):
        shortest.setdefault(named[kind], kind)
    return [kind for kind in named if shortest[named[kind]] == kind]


def model_class(model_type: str) -> type[nn.Module]:
    """The base model of a type, or the first of its models where it has no base model.

    Raises:
        LookupError: if it has none.
    """
    config_class = configuration_auto.CONFIG_MAPPING[model_type]
    named = modeling_auto.MODEL_MAPPING_NAMES.get(model_type)
    names = [named] if isinstance(named, str) else list(named or ())
    for mapping in (name for name in vars(modeling_auto) if name.endswith("_MAPPING_NAMES")):
        found = getattr(modeling_auto, mapping).get(model_type, ())
        names += [found] if isinstance(found, str) else list(found)
    home = config_class.__module__.replace("configuration_", "modeling_")
    module = importlib.import_module(home)
    for name in names:
        found = getattr(module, name, None)
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    for name, found in vars(module).items():
        is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        if not is_model or found.__module__ != home or name.endswith("PreTrainedModel"):
            continue
        if found.config_class is config_class:
            return found
    raise LookupError(f"{model_type} has no model class.")


def default_size(model_type: str) -> nn.Module:
    """The backbone of the default config, on the meta device."""
    with torch.device("meta"):
        return model_class(model_type)(configuration_auto.CONFIG_MAPPING[model_type]())


def backbone(model_type: str) -> nn.Module:
    """A tiny random backbone, in eval mode."""
    torch.manual_seed(0)
    return model_class(model_type)(config(model_type)).eval()


def config(model_type: str) -> transformers.PretrainedConfig:
    """The default config of a type, shrunk."""
    config_class = configuration_auto.CONFIG_MAPPING[model_type]
    shrunk = _shrink(config_class().to_dict())
    _update(shrunk, EXCEPTIONS.get(model_type, {}))
    return config_class.from_dict(shrunk)


def _update(target: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(target.get(name), dict):
            _update(target[name], value)
        else:
            target[name] = value


def _shrink(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A config's fields with small values; those of configs inside it too."""
    shrunk: dict[str, Any] = {}
    layers = next((fields[n] for n in ("num_hidden_layers", "num_layers") if n in fields), None)
    kinds = fields.get("layer_types") or fields.get("layers_block_type") or ()
    kept = list(dict.fromkeys(kinds)) if isinstance(kinds, list) else []
    special = VOCABULARY
    for name, value in fields.items():
        if name in _DERIVED:
            continue
        if isinstance(value, dict):
            shrunk[name] = _shrink(value)
        elif isinstance(value, bool) or value is None:
            shrunk[name] = value
        elif isinstance(value, int) and value > 0 and name in _SIZES:
            roomy = _SIZES[name] in (POSITIONS, VOCABULARY)
            shrunk[name] = _SIZES[name] if roomy else min(value, _SIZES[name])
        elif isinstance(value, int) and ("token" in name or name.endswith("_id")):
            special -= value >= VOCABULARY
            shrunk[name] = special if value >= VOCABULARY else value
        elif isinstance(value, list) and value and name in _STAGES:
            shrunk[name] = [_STAGES[name]] * len(value)
        elif isinstance(value, list) and _SIZES.get(name) == IMAGE and "image" in name:
            shrunk[name] = [IMAGE] * len(value)
        elif isinstance(value, list) and name in _WIDENING and isinstance(value[0], int):
            shrunk[name] = [8 * (place + 1) for place in range(len(value))]
        elif (
            isinstance(value, list)
            and layers
            and len(value) == layers > 2
            and not name.startswith(("conv", "tdnn"))
        ):
            pick = [kinds.index(kind) for kind in kept] if kept else [0, 1]
            pick = (pick * 2)[: max(2, len(kept))]
            shrunk[name] = [value[place] for place in pick]
        else:
            shrunk[name] = copy.deepcopy(value)
    if len(kept) > 2:
        for name in ("num_hidden_layers", "num_layers"):
            if name in shrunk:
                shrunk[name] = len(kept)
    if "rope_theta" in shrunk and "rope_type" in shrunk:  # rotary embeddings of whole heads
        shrunk["mrope_section"] = [2, 1, 1]
        shrunk.pop("partial_rotary_factor", None)
    if "qk_rope_head_dim" in shrunk:  # latent attention: as many keys as queries
        shrunk["num_key_value_heads"] = shrunk.get("num_attention_heads", 4)
        if "head_dim" in shrunk:
            shrunk["head_dim"] = shrunk["qk_rope_head_dim"]
    return shrunk


def batch(model: nn.Module) -> dict[str, Tensor]:
    """An input that passes through a backbone made here: the plainest that does.

    Raises:
        RuntimeError: if none does, with what the last attempt raised.
    """
    failure: Exception | None = None
    for inputs in _attempts(model):
        try:
            with torch.no_grad():
                model(**copy.deepcopy(inputs))
        except Exception as error:  # whatever a model makes of an input not meant for it
            failure = error
        else:
            return inputs
    raise RuntimeError(f"{type(failure).__name__}: {failure}") from failure


def _attempts(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inputs to try, the likeliest first."""
    main = getattr(model, "main_input_name", "input_ids")
    required = [
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind.value < 2
    ]
    accepted = inspect.signature(model.forward).parameters
    mains = main if isinstance(main, list) else [main]
    base = [*(name for name in mains if name in accepted), *required]
    more = [n for n in ("input_ids", "pixel_values", "input_features", "bbox") if n in accepted]
    for extra in ([], *([name] for name in more), more):
        names = list(dict.fromkeys([*base, *extra]))
        for values in itertools.product(*(_values(model, name) for name in names)):
            inputs = dict(zip(names, values, strict=True))
            if "input_ids" in inputs and "attention_mask" in accepted:
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            if "decoder_input_ids" in accepted:
                inputs["decoder_input_ids"] = _ids(2, 5)
            if "encoder_hidden_states" in accepted:  # what a decoder alone attends to
                yield inputs | {"encoder_hidden_states": _noise(2, 5, HIDDEN)}
            yield inputs


def _ids(*shape: int) -> Tensor:
    return torch.randint(10, 40, shape, generator=torch.Generator().manual_seed(0))


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _values(model: nn.Module, name: str) -> list[Tensor]:
    """What an input called `name` may look like."""
    parts = [model.config, *(getattr(model.config, n, None) for n in model.config.sub_configs)]

    def field(*names: str, default: Any) -> Any:
        found = (getattr(part, n, None) for n in names for part in parts if part is not None)
        return next((value for value in found if value), default)

    if name == "pixel_values":
        size = field("image_size", default=IMAGE)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels, frames = field("num_channels", default=3), field("num_frames", default=2)
        image = (channels, height, width)
        return [_noise(2, *image), _noise(2, frames, *image)]
    if name in ("input_features", "input_values", "audio_values"):
        bins = field("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel",
                     "feature_size", default=0)  # fmt: skip
        frames = field("max_length", default=2 * field("max_source_positions", default=POSITIONS))
        waves = [_noise(2, 2400), _noise(2, 1, 2400)]
        spectra = [_noise(2, bins, frames), _noise(2, frames, bins), _noise(2, 1, frames, bins)]
        return spectra + waves if bins and name == "input_features" else waves + spectra
    if name == "bbox":
        return [torch.ones(2, 7, 4, dtype=torch.long)]
    if name == "past_values":
        length = field("context_length", default=8)
        return [_noise(2, length, field("num_input_channels", default=1)), _noise(2, length)]
    if name in ("inputs_embeds", "hidden_states", "query_embeds", "context", "inputs"):
        return [_noise(2, 7, field("hidden_size", "d_model", default=HIDDEN))]
    return [_ids(2, 7)]


_SWIN = {"image_size": 32, "patch_size": 4, "depths": [1, 1], "num_heads": [2, 2], "embed_dim": 8}

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "align_vision_model": {"width_coefficient": 0.5, "depth_coefficient": 0.3},
    "esm": {
        "vocab_size": VOCABULARY,
        "pad_token_id": 1,
        "mask_token_id": VOCABULARY - 1,
        "token_dropout": True,
    },
    "esmc": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": [INNER, INNER],
        "activation_sparsity_pattern": [0.95, 0.0],
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "luke": {"entity_vocab_size": 10},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "perceiver": {
        "num_latents": 4,
        "d_latents": 32,
        "d_model": 32,
        "num_self_attends_per_block": 2,
    },
    "roc_bert": {"pronunciation_vocab_size": 10, "shape_vocab_size": 10},
    "glpn": {"image_size": 64},
    "pvt_v2": {"image_size": 64},
    "mobilevit": {"initializer_range": 0.2},  # else its convolutions fade all values to nothing
    "rwkv": {"use_cache": False},  # its cache is written in place, which no backward survives
    "univnet": {"model_hidden_channels": 8},
    "switch_transformers": {"num_experts": 2},
    "swin": _SWIN,
    "donut-swin": _SWIN,
    "swinv2": {**_SWIN, "pretrained_window_sizes": [0, 0]},
}
