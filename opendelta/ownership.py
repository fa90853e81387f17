"""Which modules and tensors are the backbone's own, and which a delta's."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from opendelta.dispatch import AfterDispatcher, BeforeDispatcher

STANDS_FOR = "_stands_for"  # attribute of a delta module that replaced one of the backbone's


def inserted_names(module: nn.Module) -> tuple[str, ...]:
    """Names under which deltas sit on `module`, attached or not, in order of execution."""
    if not module._forward_hooks and not module._forward_pre_hooks:
        return ()
    dispatchers = (BeforeDispatcher.on(module), AfterDispatcher.on(module))
    entries = [entry for dispatcher in dispatchers if dispatcher for entry in dispatcher.entries]
    return tuple(dict.fromkeys(name for name, _ in entries))


def inserted_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of this module's direct parameters that belong to a delta (BitFit's ``bias``)."""
    return tuple(name for name, p in module._parameters.items() if getattr(p, "_is_delta", False))


def own_modules(
    root: nn.Module, remove_duplicate: bool = True, originals: bool = False
) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules()` of the backbone alone: nothing that sits inside a delta.

    Args:
        root: the backbone or a part of it.
        remove_duplicate: whether a module with several names comes once, under the first.
        originals: whether a replaced module comes in the place of what replaced it, rather than
            being left out.
    """
    seen: set[int] = set()
    stack = [("", unblocked(root))]
    while stack:
        name, module = stack.pop()
        if remove_duplicate and id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        if module._modules:
            prefix = f"{name}." if name else ""
            children = reversed(own_children(module, originals))
            stack += [(prefix + child_name, child) for child_name, child in children]


def own_children(module: nn.Module, originals: bool = False) -> list[tuple[str, nn.Module]]:
    """(name, child) of a module's children that are the backbone's own, see `own_modules`."""
    deltas = inserted_names(module)
    children = []
    for name, child in module._modules.items():
        if child is None or name in deltas:
            continue
        if STANDS_FOR in child.__dict__:
            if not originals:
                continue
            (child,) = child.__dict__[STANDS_FOR]
        children.append((name, unblocked(child)))
    return children


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
    found: nn.Module | None = unblocked(module)
    for part in path:
        child = None if found is None else found._modules.get(part)
        found = None if child is None else unblocked(child)
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
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a full state dict holds, ties repeated: parameters and persistent buffers."""
    for name, part in module.named_modules(remove_duplicate=False):
        for own_name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None and own_name not in part._non_persistent_buffers_set:
                yield dotted(name, own_name), tensor


def dotted(*parts: str) -> str:
    """The dotted name of `parts`, empty ones left out."""
    return ".".join(filter(None, parts))
