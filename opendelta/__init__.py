"""OpenDelta: a plug-and-play library for delta tuning (parameter-efficient fine-tuning).

from opendelta import LoraModel

delta = LoraModel(backbone)                        # modifies the backbone in place
delta.freeze_module(exclude=["deltas", "classifier"])
...                                                # train the backbone as before
delta.save_finetuned("my_delta")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opendelta.addressing.common_structure import CommonStructureMap
from opendelta.auto_delta import AutoDeltaConfig, AutoDeltaModel, register
from opendelta.basemodel import DeltaBase
from opendelta.center import (
    DeltaCenter,
    DeltaCenterArguments,
    create_default_name,
    create_delta_center_args,
)
from opendelta.combining import combine
from opendelta.delta_configs import BaseDeltaConfig
from opendelta.delta_models.adapter import AdapterConfig, AdapterModel
from opendelta.delta_models.bitfit import BitFitConfig, BitFitModel
from opendelta.delta_models.compacter import CompacterConfig, CompacterModel
from opendelta.delta_models.dora import DoraConfig, DoraModel
from opendelta.delta_models.ia3 import IA3Config, IA3Model
from opendelta.delta_models.lora import LoraConfig, LoraModel
from opendelta.delta_models.low_rank_adapter import LowRankAdapterConfig, LowRankAdapterModel
from opendelta.delta_models.parallel_adapter import ParallelAdapterConfig, ParallelAdapterModel
from opendelta.delta_models.prefix import PrefixConfig, PrefixModel
from opendelta.delta_models.soft_prompt import SoftPromptConfig, SoftPromptModel
from opendelta.exceptions import BackboneMismatchWarning, DeltaWarning, OpenDeltaError
from opendelta.inspection import (
    Visualization,
    inspect_module_statistics,
    inspect_optimizer_statistics,
    num_delta_parameters,
    num_total_parameters,
    num_trainable_parameters,
)
from opendelta.mechanism.backbone_state import deltas
from opendelta.routing import route
from opendelta.saving.hashing import gen_model_hash, gen_parameter_hash
from opendelta.version import __version__
from opendelta.web import interactive

if TYPE_CHECKING:
    from opendelta.trainer import DeltaCallback, quantised_training

__all__ = [
    "AdapterConfig",
    "AdapterModel",
    "AutoDeltaConfig",
    "AutoDeltaModel",
    "BackboneMismatchWarning",
    "BaseDeltaConfig",
    "BitFitConfig",
    "BitFitModel",
    "CommonStructureMap",
    "CompacterConfig",
    "CompacterModel",
    "DeltaBase",
    "DeltaCallback",
    "DeltaCenter",
    "DeltaCenterArguments",
    "DeltaWarning",
    "DoraConfig",
    "DoraModel",
    "IA3Config",
    "IA3Model",
    "LoraConfig",
    "LoraModel",
    "LowRankAdapterConfig",
    "LowRankAdapterModel",
    "OpenDeltaError",
    "ParallelAdapterConfig",
    "ParallelAdapterModel",
    "PrefixConfig",
    "PrefixModel",
    "SoftPromptConfig",
    "SoftPromptModel",
    "Visualization",
    "__version__",
    "combine",
    "create_default_name",
    "create_delta_center_args",
    "deltas",
    "gen_model_hash",
    "gen_parameter_hash",
    "inspect_module_statistics",
    "inspect_optimizer_statistics",
    "interactive",
    "num_delta_parameters",
    "num_total_parameters",
    "num_trainable_parameters",
    "quantised_training",
    "register",
    "route",
]


def __getattr__(name: str) -> Any:
    """What is for the `Trainer` imports transformers', which takes a second: for who asks."""
    if name in ("DeltaCallback", "quantised_training"):
        from opendelta import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'opendelta' has no attribute {name!r}")
