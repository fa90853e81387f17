"""OpenDelta: a plug-and-play library for delta tuning (parameter-efficient fine-tuning).

from opendelta import LoraModel

delta = LoraModel(backbone)                        # modifies the backbone in place
delta.freeze_module(exclude=["deltas", "classifier"])
...                                                # train the backbone as before
delta.save_finetuned("my_delta")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from opendelta.delta import registry as _registry

# The public names, by the module that holds them: imported when one of them is first asked for.
_HOMES = {
    "addressing.common_structure": "CommonStructureMap",
    "auto_delta": "AutoDeltaConfig AutoDeltaModel",
    "basemodel": "DeltaBase",
    "center": "DeltaCenter DeltaCenterArguments create_default_name create_delta_center_args",
    "combining": "combine",
    "delta.registry": "register",
    "delta_configs": "BaseDeltaConfig",
    "delta_models.adapter": "AdapterConfig AdapterModel",
    "delta_models.bitfit": "BitFitConfig BitFitModel",
    "delta_models.compacter": "CompacterConfig CompacterModel",
    "delta_models.dora": "DoraConfig DoraModel",
    "delta_models.ia3": "IA3Config IA3Model",
    "delta_models.lora": "LoraConfig LoraModel",
    "delta_models.low_rank_adapter": "LowRankAdapterConfig LowRankAdapterModel",
    "delta_models.parallel_adapter": "ParallelAdapterConfig ParallelAdapterModel",
    "delta_models.prefix": "PrefixConfig PrefixModel",
    "delta_models.soft_prompt": "SoftPromptConfig SoftPromptModel",
    "exceptions": "BackboneMismatchWarning DeltaWarning OpenDeltaError",
    "inspection": "Visualization inspect_module_statistics inspect_optimizer_statistics "
    "num_delta_parameters num_total_parameters num_trainable_parameters",
    "mechanism.backbone_state": "deltas",
    "mechanism.calls": "call_arguments",
    "routing": "route",
    "saving.hashing": "gen_model_hash gen_parameter_hash",
    "trainer": "DeltaCallback quantised_training",
    "version": "__version__",
    "web": "interactive",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
_registry.homes(f"opendelta.{home}" for home in _HOMES if home.startswith("delta_models."))

__all__ = [*_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        try:  # a module of the library, as attribute
            return importlib.import_module(f"opendelta.{name}")
        except ModuleNotFoundError:
            raise AttributeError(f"module 'opendelta' has no attribute {name!r}") from None
    found = globals()[name] = getattr(importlib.import_module(f"opendelta.{_HOME_OF[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from opendelta.addressing.common_structure import CommonStructureMap as CommonStructureMap
    from opendelta.auto_delta import AutoDeltaConfig as AutoDeltaConfig
    from opendelta.auto_delta import AutoDeltaModel as AutoDeltaModel
    from opendelta.basemodel import DeltaBase as DeltaBase
    from opendelta.center import DeltaCenter as DeltaCenter
    from opendelta.center import DeltaCenterArguments as DeltaCenterArguments
    from opendelta.center import create_default_name as create_default_name
    from opendelta.center import create_delta_center_args as create_delta_center_args
    from opendelta.combining import combine as combine
    from opendelta.delta.registry import register as register
    from opendelta.delta_configs import BaseDeltaConfig as BaseDeltaConfig
    from opendelta.delta_models.adapter import AdapterConfig as AdapterConfig
    from opendelta.delta_models.adapter import AdapterModel as AdapterModel
    from opendelta.delta_models.bitfit import BitFitConfig as BitFitConfig
    from opendelta.delta_models.bitfit import BitFitModel as BitFitModel
    from opendelta.delta_models.compacter import CompacterConfig as CompacterConfig
    from opendelta.delta_models.compacter import CompacterModel as CompacterModel
    from opendelta.delta_models.dora import DoraConfig as DoraConfig
    from opendelta.delta_models.dora import DoraModel as DoraModel
    from opendelta.delta_models.ia3 import IA3Config as IA3Config
    from opendelta.delta_models.ia3 import IA3Model as IA3Model
    from opendelta.delta_models.lora import LoraConfig as LoraConfig
    from opendelta.delta_models.lora import LoraModel as LoraModel
    from opendelta.delta_models.low_rank_adapter import LowRankAdapterConfig as LowRankAdapterConfig
    from opendelta.delta_models.low_rank_adapter import LowRankAdapterModel as LowRankAdapterModel
    from opendelta.delta_models.parallel_adapter import (
        ParallelAdapterConfig as ParallelAdapterConfig,
    )
    from opendelta.delta_models.parallel_adapter import ParallelAdapterModel as ParallelAdapterModel
    from opendelta.delta_models.prefix import PrefixConfig as PrefixConfig
    from opendelta.delta_models.prefix import PrefixModel as PrefixModel
    from opendelta.delta_models.soft_prompt import SoftPromptConfig as SoftPromptConfig
    from opendelta.delta_models.soft_prompt import SoftPromptModel as SoftPromptModel
    from opendelta.exceptions import BackboneMismatchWarning as BackboneMismatchWarning
    from opendelta.exceptions import DeltaWarning as DeltaWarning
    from opendelta.exceptions import OpenDeltaError as OpenDeltaError
    from opendelta.inspection import Visualization as Visualization
    from opendelta.inspection import inspect_module_statistics as inspect_module_statistics
    from opendelta.inspection import inspect_optimizer_statistics as inspect_optimizer_statistics
    from opendelta.inspection import num_delta_parameters as num_delta_parameters
    from opendelta.inspection import num_total_parameters as num_total_parameters
    from opendelta.inspection import num_trainable_parameters as num_trainable_parameters
    from opendelta.mechanism.backbone_state import deltas as deltas
    from opendelta.mechanism.calls import call_arguments as call_arguments
    from opendelta.routing import route as route
    from opendelta.saving.hashing import gen_model_hash as gen_model_hash
    from opendelta.saving.hashing import gen_parameter_hash as gen_parameter_hash
    from opendelta.trainer import DeltaCallback as DeltaCallback
    from opendelta.trainer import quantised_training as quantised_training
    from opendelta.version import __version__ as __version__
    from opendelta.web import interactive as interactive
