"""PEFT's files of prompt tuning, P-tuning and prefix tuning: one tensor, and heads trained with it.

PEFT (https://github.com/huggingface/peft) is not needed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from opendelta.delta.config import ConfigFields
from opendelta.delta_models.generated import Generated
from opendelta.exceptions import CheckpointError, ConfigError
from opendelta.ground.names import lineage
from opendelta.mechanism.ownership import own_modules
from opendelta.saving.peft_files import Fields, PeftConfig, write_adapter

KEY, PREFIX = "prompt_embeddings", "base_model."  # PEFT wraps the backbone once

# What a class of transformers' models is for, by the end of its name, and what PEFT calls that.
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}
_FIELDS: Fields = {
    "num_virtual_tokens": (0, int),
    "num_transformer_submodules": (1, int),
    "num_layers": (0, int),
    "token_dim": (0, int),
}
_IMMATERIAL = frozenset(  # how it came to be what it is
    "num_attention_heads prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path "
    "tokenizer_kwargs encoder_hidden_size encoder_num_layers encoder_dropout init_weights "
    "encoder_reparameterization_type prefix_projection".split()
)


class PeftPrompt(Generated):
    """Base of the methods whose files in PEFT hold one tensor of vectors for the whole model.

    Class attributes:
        title: what messages call the method.
        peft_types: what PEFT's configs call it; the first is written.
    """

    title: ClassVar[str]
    peft_types: ClassVar[tuple[str, ...]]

    @classmethod
    def reads_peft(cls, values: dict[str, Any]) -> bool:
        """Whether an adapter with this config is of this method."""
        return values.get("peft_type") in cls.peft_types

    @classmethod
    def fields_from_peft(
        cls, values: Tensor, settings: dict[str, Any], backbone: nn.Module
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Our config's fields of the method, and its tensors by our keys.

        Args:
            values: what the file holds, (tokens, ...).
            settings: PEFT's config.
            backbone: for which it is meant.
        """
        raise NotImplementedError

    @classmethod
    def from_peft_form(
        cls, config: PeftConfig, tensors: dict[str, Tensor], backbone: nn.Module
    ) -> tuple[ConfigFields, dict[str, Tensor]]:
        """Our config and tensors from PEFT's; modules that PEFT saved become the delta's own.

        Raises:
            CheckpointError: if the vectors are missing, or another module is not there.
            ConfigError: for vectors in encoder and decoder, and other variants.
        """
        settings = config.checked(_FIELDS, _IMMATERIAL, cls.title)
        if KEY not in tensors:
            raise CheckpointError(f"{config.file.parent} holds no {KEY!r}, as {cls.title} does.")
        count, parts = settings["num_virtual_tokens"], settings["num_transformer_submodules"]
        values = tensors[KEY]
        if parts != 1 and len(values) != count:
            raise ConfigError(
                f"{config.file}: num_transformer_submodules={parts}, one prompt of {count} for the "
                f"encoder and one for the decoder: {cls.title} goes before the encoder's text "
                "alone, so it cannot be read."
            )
        fields, own = cls.fields_from_peft(values, settings, backbone)
        trained = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n != KEY}
        modules = dict(own_modules(backbone))
        wanted = set(settings["modules_to_save"])
        places: list[str] = []
        for name in trained:
            outer = [module for module in lineage(name)[1:] if module in modules]
            place = next((m for m in outer if m.rpartition(".")[2] in wanted), None)
            if place is None and outer:
                place = outer[0]
            if place is None:
                raise CheckpointError(
                    f"{config.file.parent} holds {name!r}, which is no part of this "
                    f"{type(backbone).__name__}."
                )
            places.append(place)
        made = cls.config_class(**fields, own_modules=sorted(set(places)) or None)
        return made, own | trained

    def peft_values(self) -> tuple[Tensor, dict[str, Any]]:
        """The tensor that PEFT's file holds, and fields of its config."""
        raise NotImplementedError

    def export_peft(self, path: str | os.PathLike[str]) -> None:
        """Write this delta as a PEFT adapter: ``PeftModel.from_pretrained(backbone, path)``.

        PEFT puts vectors before the padding on the left of a row, and counts positions otherwise:
        the two compute the same where rows are not padded on the left.

        Args:
            path: the folder; it is made if it does not exist.

        Raises:
            ConfigError: if something else was trained with it, or PEFT has no task for the model.
            CheckpointError: if `path` is a file.
        """
        ends = tuple(name for i in self.insertions if i.of_method for name in [i.file_name] if name)
        others = [name for name in self.checkpoint_tensors() if not {*ends} & {*name.split(".")}]
        if others:
            raise ConfigError(
                f"{others[0]!r} was trained with this {type(self).__name__}, which a PEFT adapter "
                "of its kind does not hold under a name of its own: save_finetuned does."
            )
        kind = type(self.backbone_model).__name__
        task = next((t for end, t in TASKS.items() if kind.endswith(end)), None)
        if task is None:
            raise ConfigError(
                f"PEFT runs prompts by the task of a model, and {kind} is none of "
                f"{', '.join('...' + end for end in TASKS)}."
            )
        values, fields = self.peft_values()
        config = {
            "peft_type": self.peft_types[0],
            "task_type": task,
            "base_model_name_or_path": getattr(self.backbone_model.config, "_name_or_path", None),
            "inference_mode": True,
            "modules_to_save": None,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": len(values),
            **fields,
        }
        write_adapter(Path(path), config, {KEY: values.detach().cpu().contiguous()})
