"""One forward of a pseudo input: how wide the modules are that do not say it themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from opendelta.exceptions import InsertionError
from opendelta.ground.blocks import undone, within
from opendelta.ground.containers import first_hidden, hidden_of
from opendelta.mechanism.backbone_state import probing
from opendelta.mechanism.ownership import own_modules


def measure_widths(
    backbone: nn.Module, modules: Mapping[str, nn.Module]
) -> dict[str, tuple[int, int]]:
    """(input, output) width of each of `modules`, from one forward of a pseudo input.

    The pseudo input is ``backbone.dummy_inputs`` where the user set it (a dict, tuple or tensor),
    or that of the transformers model that holds the modules, or is made from its
    ``main_input_name``; for any other network it is ``tensor([[0, 0, 0]])``, then
    ``tensor([0, 0, 0])``. The backbone's train mode, random state and buffers stay as found.

    Raises:
        InsertionError: if the forward fails, or never reaches one of the modules.
    """
    measured: dict[str, tuple[int, int]] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            widths = first_hidden(args, kwargs).shape[-1], hidden_of(output).shape[-1]
            measured.setdefault(name, widths)

        return hook

    with hooked({m: record(n) for n, m in modules.items()}, with_kwargs=True):
        run_pseudo_input(backbone, modules)
    missed = [name for name in modules if name not in measured]
    if missed:
        raise InsertionError(
            f"A forward of the pseudo input never calls {missed[0]!r}, so its width cannot be "
            "measured. Name a module that is called, or set `backbone.dummy_inputs` to an input "
            "that reaches it."
        )
    return measured


@contextmanager
def hooked(after: Mapping[nn.Module, Any], **options: Any) -> Iterator[None]:
    """Within a ``with`` block the modules have these forward hooks too."""
    handles: list[RemovableHandle] = []

    def take_off() -> None:
        for handle in handles:
            handle.remove()

    with undone(take_off):
        for module, hook in after.items():
            handles.append(module.register_forward_hook(hook, **options))
        yield


def run_pseudo_input(backbone: nn.Module, modules: Iterable[str]) -> None:
    """One forward of a pseudo input that runs the modules called `modules`.

    Train mode, random state and buffers stay as found; no gradients are kept.

    Raises:
        InsertionError: if it fails, with its cause and what to do.
    """
    with tried(backbone):
        _run(_runner(backbone, list(modules)))


@contextmanager
def tried(backbone: nn.Module) -> Iterator[None]:
    """A ``with`` block in which parts of a backbone run in evaluation; it stays as found.

    Train mode, random state and buffers are put back; no gradients are kept.
    """
    with within(_untouched(backbone), probing(backbone)):
        yield


def _runner(backbone: nn.Module, modules: Sequence[str]) -> nn.Module:
    """The outermost module that holds all `modules` and knows a pseudo input, else `backbone`."""
    for name, module in own_modules(backbone):
        inside = all(not name or n == name or n.startswith(name + ".") for n in modules)
        if inside and _pseudo_input(module) is not None:
            return module
    return backbone


def _pseudo_input(module: nn.Module) -> Any:
    """The pseudo input that `module` names or whose form it declares, else None."""
    own = module.__dict__.get("dummy_inputs")  # set by the user
    if own is not None:
        return own
    main, config = getattr(module, "main_input_name", None), getattr(module, "config", None)
    if main is None or config is None:
        return getattr(module, "dummy_inputs", None)
    if main == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        return {main: torch.zeros(1, getattr(config, "num_channels", 3), height, width)}
    if main in ("input_values", "input_features"):
        mel_bins = getattr(config, "num_mel_bins", None)
        frames = 2 * getattr(config, "max_source_positions", 1500)
        return {main: torch.zeros(1, mel_bins, frames) if mel_bins else torch.zeros(1, 16000)}
    inputs = dict(getattr(module, "dummy_inputs", None) or {main: torch.tensor([[0, 0, 0]])})
    if getattr(config, "is_encoder_decoder", False):
        inputs.setdefault("decoder_input_ids", inputs[main])
    vocabulary = getattr(config, "vocab_size", None)
    if isinstance(vocabulary, int):
        inputs = {
            key: value.clamp(max=vocabulary - 1) if key.endswith("input_ids") else value
            for key, value in inputs.items()
        }
    return inputs


def _with_image(model: nn.Module, inputs: Any) -> list[Any]:
    """`inputs` and an image, for a model of both that does not run on text alone (CLIP)."""
    vision = getattr(getattr(model, "config", None), "vision_config", None)
    takes = inspect.signature(model.forward).parameters
    if vision is None or not isinstance(inputs, dict) or "pixel_values" not in takes:
        return []
    size = getattr(vision, "image_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    image = torch.zeros(1, getattr(vision, "num_channels", 3), height, width)
    return [{**inputs, "pixel_values": image}]


def _run(model: nn.Module) -> None:
    """One forward of a pseudo input; the last attempt's error is raised with advice."""
    known = _pseudo_input(model)
    guesses = [torch.tensor([[0, 0, 0]]), torch.tensor([0, 0, 0])]
    attempts = guesses if known is None else [known, *_with_image(model, known)]
    place = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))

    def fit(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(place.device, place.dtype if value.is_floating_point() else None)

    for attempt in attempts:
        try:
            if isinstance(attempt, Mapping):
                model(**{key: fit(value) for key, value in attempt.items()})
            elif isinstance(attempt, (tuple, list)):
                model(*(fit(value) for value in attempt))
            else:
                model(fit(attempt))
            return
        except Exception as error:  # any error of the user's model: told below with its cause
            failure = error
    raise InsertionError(
        "A pseudo input must pass through the model to tell the width of the modified modules, but "
        f"{type(model).__name__} failed on the automatic one ({type(failure).__name__}: {failure})."
        f" Before creating the delta, set `{_how_to_set(model)}` to anything that makes "
        "`backbone_model(**dummy_inputs)` succeed, such as {'x': torch.zeros(1, 8)}; only its form "
        "and shape matter. Modules that say their width themselves (linears, convolutions, "
        "embeddings, norms) need none."
    ) from failure


def _how_to_set(model: nn.Module) -> str:
    """How to give a model a pseudo input; transformers' models have a property in the way."""
    if isinstance(getattr(type(model), "dummy_inputs", None), property):
        return "backbone_model.__dict__['dummy_inputs']"
    return "backbone_model.dummy_inputs"


@contextmanager
def random_state_kept_on_error() -> Iterator[None]:
    """After an error, torch's random state is what it was: new layers drew from it in vain."""
    state = torch.get_rng_state()
    try:
        yield
    except BaseException:
        torch.set_rng_state(state)
        raise


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; train modes, buffers and random state are put back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}

    @torch.no_grad()
    def put_back() -> None:
        for module, mode in modes:
            module.training = mode
        for buffer, value in buffers:
            buffer.copy_(value)

    device = torch.device("cpu")  # also where a plan makes its layers on meta
    random = torch.random.fork_rng(devices=list(devices))
    with undone(put_back), within(device, random, torch.no_grad()):
        model.eval()
        yield
