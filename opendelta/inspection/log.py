"""What ``delta.log()`` prints: the tree, the ratios and the memory (specification 1.20.2)."""

from __future__ import annotations

from torch import nn

from opendelta.inspection.statistics import inspect_module_statistics, ratio
from opendelta.inspection.visualization import Visualization


def print_log(
    backbone: nn.Module,
    delta_ratio: bool = True,
    trainable_ratio: bool = True,
    visualization: bool = True,
    cuda_memory: bool = True,
) -> None:
    """Print how a delta changed its backbone.

    Args:
        backbone: the model with its deltas.
        delta_ratio: print the share of parameters that belong to deltas.
        trainable_ratio: print the share of parameters that train.
        visualization: print the tree.
        cuda_memory: print the memory that is taken, CPU and CUDA, now and at most.
    """
    if visualization:
        Visualization(backbone).structure_graph()
    stat = inspect_module_statistics(backbone, verbose=False)
    if trainable_ratio:
        print(_ratio("Trainable Ratio", stat["trainable_parameters"], stat["total_parameters"]))
    if delta_ratio:
        print(_ratio("Delta Parameter Ratio", stat["delta_parameters"], stat["total_parameters"]))
    if cuda_memory:
        print(_memory("CPU Memory", stat["cpumem"], stat["maxcpumem"]))
        print(_memory("CUDA Memory", stat["cudamem"], stat["maxcudamem"]))


def _ratio(title: str, part: int, whole: int) -> str:
    return f"{title}: {part}/{whole}={100 * ratio(part, whole):.6f}%"


def _memory(title: str, now: float | None, at_most: float | None) -> str:
    figures = ["unknown" if gib is None else f"{gib:.2f} GB" for gib in (now, at_most)]
    return f"{title}: {figures[0]} now, {figures[1]} at most"
