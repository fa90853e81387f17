"""Which way a soft prompt enters a model, found out by running it.

Many models do more with ids than to embed them (positions, masking, further embeddings). Handed
embeddings, those compute something else. So a few tokens are run both ways, in evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opendelta.backends.sharding import is_sharded
from opendelta.delta.pseudo_input import tried
from opendelta.exceptions import InsertionError
from opendelta.ground.blocks import undone
from opendelta.ground.containers import first_hidden, hidden_of

# Parts of the names of arguments that hold what is no text.
_OTHERS = ("pixel", "image", "video", "audio", "input_features", "input_values", "patches")

_PADDING, _TOKENS = 3, 5  # of the two rows that are run


class Way(NamedTuple):
    """How a soft prompt enters a model.

    Attributes:
        by_embeddings: whether the model is handed embeddings, with the prompt among them; else the
            prompt comes behind the token embedding, in the place of ids that stand for it.
        counts_positions: whether the model counts the padding on the left of a row, unless it is
            told positions.
    """

    by_embeddings: bool
    counts_positions: bool


_THROUGH_IDS = Way(False, False)
_found: dict[tuple[Any, str], Way] = {}  # by class and config


def way_into(
    backbone: nn.Module, host: Any, embedding: nn.Module, names: Sequence[str], prompt_id: int
) -> Way:
    """How a soft prompt enters a model: by embeddings where these give what ids give.

    Sharded, offloaded and meta models are not run, nor those that take more than text, which find
    places of images and sounds by ids: there it comes in the place of ids.

    Args:
        backbone: which holds the model.
        host: the model; `embedding`: its token embedding; `names`: its arguments.
        prompt_id: what would stand for the prompt among ids.

    Raises:
        InsertionError: if it can be prompted neither way.
    """
    others = any(part in name for name in names for part in _OTHERS)
    away = any(p.is_meta for p in host.parameters()) or is_sharded(host)
    if "inputs_embeds" not in names or others or away:
        return _THROUGH_IDS
    config: Any = getattr(host, "config", None)
    if not hasattr(config, "to_dict"):
        return _compared(backbone, host, embedding, names, prompt_id)
    known = type(host), json.dumps(config.to_dict(), sort_keys=True, default=str)
    if known not in _found:
        _found[known] = _compared(backbone, host, embedding, names, prompt_id)
    return _found[known]


def require_tensor(embedding: nn.Module, embeds: Any) -> Tensor:
    """What a token embedding returned.

    Raises:
        InsertionError: if it is no tensor.
    """
    if isinstance(embeds, Tensor):
        return embeds
    raise InsertionError(
        f"The token embedding, a {type(embedding).__name__}, returns a {type(embeds).__name__} in "
        "place of a tensor, among which no prompt can be put. Use a PrefixModel."
    )


def _compared(
    backbone: nn.Module, host: Any, embedding: nn.Module, names: Sequence[str], prompt_id: int
) -> Way:
    ids, mask = _rows(host, embedding)
    common: dict[str, Any] = {"attention_mask": mask} if "attention_mask" in names else {}
    if "use_cache" in names:
        common["use_cache"] = False
    with tried(backbone):
        plain = _run(host, {"input_ids": ids, **common})
        if isinstance(plain, Exception):  # it takes more than a text
            return _THROUGH_IDS
        embeds = require_tensor(embedding, embedding(ids))
        embedded = _run(host, {"inputs_embeds": embeds, **common})
        if isinstance(embedded, Tensor) and _equal(_texts(plain, mask), _texts(embedded, mask)):
            first, second = _texts(plain, mask)
            if _equal([first], [second]) or not {"attention_mask", "position_ids"} <= {*names}:
                return Way(True, False)
            common["position_ids"] = ((mask.cumsum(1) > 0).cumsum(1) - 1).clamp(min=0)
            told = _run(host, {"input_ids": ids, **common})  # some count from another number
            helps = isinstance(told, Tensor) and _equal(_texts(told, mask), [first, first])
            return Way(True, helps)
        marked = ids.clone()
        marked[0, 0] = prompt_id
        seen: list[bool] = []

        def see(module: nn.Module, args: Any, kwargs: Any) -> Any:
            seen.append(torch.equal(first_hidden(args, kwargs), marked))
            return (ids, *args[1:]), kwargs

        handle = embedding.register_forward_pre_hook(see, with_kwargs=True)
        with undone(handle.remove):
            through = _run(host, {"input_ids": marked, **common})
    if not isinstance(through, Exception) and not all(seen):
        through = ValueError("its embedding is given others")
    if isinstance(through, Exception):
        raise InsertionError(
            f"{type(host).__name__} computes something else of embeddings than of ids, and fails "
            f"on ids that stand for a soft prompt ({type(through).__name__}: {through}): it cannot "
            "be prompted. Use a PrefixModel, or name a model inside in modified_modules."
        ) from through
    return _THROUGH_IDS


def _rows(host: Any, embedding: Any) -> tuple[Tensor, Tensor]:
    """Ids and mask of one text twice, padded on the right and on the left."""
    config: Any = getattr(host, "config", None)
    said = config.to_dict() if hasattr(config, "to_dict") else {}
    named = [value for key, value in said.items() if key.endswith("_token_id")]
    special = {i for value in named for i in (value if isinstance(value, list) else [value])}
    size = getattr(embedding, "num_embeddings", None) or len(embedding.weight)
    usual = [n for n in range(size) if n not in special] or [0]
    pad = said.get("pad_token_id")
    text = (usual * _TOKENS)[-_TOKENS:]
    padding = [pad if isinstance(pad, int) and pad >= 0 else 0] * _PADDING
    device = next(embedding.parameters()).device
    ids = torch.tensor([text + padding, padding + text], device=device)
    mask = torch.ones_like(ids)
    mask[0, _TOKENS:] = mask[1, :_PADDING] = 0
    return ids, mask


def _run(host: nn.Module, given: dict[str, Any]) -> Tensor | Exception:
    try:
        return hidden_of(host(**given)).float()
    except Exception as error:  # of the user's model, whatever it is
        return error


def _texts(output: Tensor, mask: Tensor) -> list[Tensor]:
    """What a model returns for the text in each of the rows."""
    if output.shape[:2] != mask.shape:
        return list(output)
    return [row[shown != 0] for row, shown in zip(output, mask, strict=True)]


def _equal(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(ones) == len(others) and all(
        one.shape == other.shape and bool((one - other).abs().max() <= 1e-3 * one.abs().max())
        for one, other in zip(ones, others, strict=True)
    )
