"""Going over the modules and tensors of any network, in a fraction of `nn.Module`'s time."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from opendelta.ground.names import dotted


def every_module(root: nn.Module) -> Iterator[nn.Module]:
    """All modules inside `root`, of deltas and BMTrain's `Block` too, each once, from the top.

    ``modules()`` takes several times as long, and constructing and saving look at all often.
    """
    seen: set[int] = set()
    stack = [root]
    while stack:
        module = stack.pop()
        if "_module" in module.__dict__:
            module = unblocked(module)
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            stack += [child for child in reversed(module._modules.values()) if child is not None]


def every_parameter(root: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of `every_module`, tied ones as often as they are tied."""
    for module in every_module(root):
        for p in module._parameters.values():
            if p is not None:
                yield p


def named_parameters_of(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
    """``module.named_parameters(prefix)``, in a fraction of the time; `prefix` is not empty."""
    seen: set[int] = set()
    stack = [(prefix, module)]
    while stack:
        name, part = stack.pop()
        for own_name, p in part._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                yield f"{name}.{own_name}", p
        children = reversed(part._modules.items())
        stack += [(f"{name}.{key}", child) for key, child in children if child is not None]


def child_of(module: nn.Module, *path: str) -> nn.Module | None:
    """The module inside `module` that `path` leads to, if there is one."""
    found = unblocked(module)
    for part in path:
        # TorchScript's table of children has no get().
        child = found._modules[part] if part in found._modules else None  # noqa: SIM401
        if child is None:
            return None
        found = unblocked(child) if "_module" in child.__dict__ else child
    return found


def unblocked(module: nn.Module) -> nn.Module:
    """The layer inside BMTrain's `Block`; any other module itself.

    A `Block` has its layer's names and is none of its own: children that are set on it are lost,
    and its recomputation calls the layer, not the `Block`.
    """
    inner = module.__dict__.get("_module")  # an attribute, where other wrappers have a child
    return inner if isinstance(inner, nn.Module) else module


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside what `torch.compile` returned; any other module itself."""
    inner = child_of(model, "_orig_mod")
    return model if inner is None else inner


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a full state dict holds, ties repeated: parameters and persistent buffers."""
    for name, part in module.named_modules(remove_duplicate=False):
        for own_name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None and own_name not in part._non_persistent_buffers_set:
                yield dotted(name, own_name), tensor
