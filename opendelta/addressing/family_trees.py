"""The six documented families, each as a tree from original to common names (specification 1.16).

A tree maps paths below a family's base model to nodes. A node's ``__name__`` is its common name,
which is appended to its parent's; ``""`` says that the module has none. ``$`` stands for every
element of a list. ``qkv`` and ``kv`` name projections that are fused in one module.

A tree is recognised by its layout, not by a class: it holds below every module that has the
family's `signature`, if it names something in every part of every block there. So it is found in
any wrapper and in derived models (ELECTRA and XLM-R have BERT's layout), and never half fits.
What no tree covers is left to `opendelta.addressing.inference`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opendelta.addressing.graph import Graph
from opendelta.ground.names import dotted, parent_of

Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Family:
    """One family's layout.

    Attributes:
        name: what the explanation of a mapping calls it.
        signature: paths that exist below the base model of every member.
        body: the tree below the base model.
        head: the tree of the head, which stands beside the base model or inside it.
    """

    name: str
    signature: tuple[str, ...]
    body: Tree
    head: Tree


def _bert_attention(role: str, suffix: str) -> Tree:
    return {
        "__name__": role,
        f"self.query{suffix}": {"__name__": "q"},
        f"self.key{suffix}": {"__name__": "k"},
        f"self.value{suffix}": {"__name__": "v"},
        "output.dense": {"__name__": "proj"},
        "output.LayerNorm": {"__name__": "layer_norm"},
    }


def _bert_body(suffix: str = "") -> Tree:
    return {
        "embeddings.word_embeddings": {"__name__": "embeddings"},
        "embeddings.position_embeddings": {"__name__": ""},
        "embeddings.token_type_embeddings": {"__name__": ""},
        "embeddings.LayerNorm": {"__name__": ""},
        "encoder": {
            "__name__": "encoder",
            "layer": {
                "__name__": "block",
                "$": {
                    "__name__": "$",
                    "attention": _bert_attention("attn", suffix),
                    "crossattention": _bert_attention("crossattn", suffix),
                    "intermediate": {"__name__": "ff", "dense": {"__name__": "w1"}},
                    "output": {
                        "__name__": "ff",
                        "dense": {"__name__": "w2"},
                        "LayerNorm": {"__name__": "layer_norm"},
                    },
                },
            },
        },
    }


_BERT_HEAD: Tree = {
    "cls.predictions": {
        "__name__": "lm_head",
        "transform.dense": {"__name__": ""},
        "transform.LayerNorm": {"__name__": ""},
        "decoder": {"__name__": "proj"},
    },
}

_ROBERTA_HEAD: Tree = {"lm_head": {"__name__": "lm_head", "decoder": {"__name__": "proj"}}}

BERT = Family(
    "BERT or RoBERTa",  # one body; the heads differ
    (
        "encoder.layer.0.attention.self.query",
        "encoder.layer.0.attention.output.dense",
        "encoder.layer.0.intermediate.dense",
        "encoder.layer.0.output.dense",
    ),
    _bert_body(),
    {**_BERT_HEAD, **_ROBERTA_HEAD},
)

DEBERTA_V2 = Family(
    "DeBERTa-v2",
    (
        "encoder.layer.0.attention.self.query_proj",
        "encoder.layer.0.attention.output.dense",
        "encoder.layer.0.intermediate.dense",
        "encoder.layer.0.output.dense",
    ),
    _bert_body("_proj"),
    _BERT_HEAD,
)

GPT2 = Family(
    "GPT2",
    ("wte", "h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.mlp.c_fc", "h.0.mlp.c_proj"),
    {
        "wte": {"__name__": "embeddings"},
        "wpe": {"__name__": ""},
        "h": {
            "__name__": "decoder.block",
            "$": {
                "__name__": "$",
                "ln_1": {"__name__": "attn.layer_norm"},
                "attn": {
                    "__name__": "attn",
                    "c_attn": {"__name__": "qkv"},
                    "c_proj": {"__name__": "proj"},
                },
                "ln_cross_attn": {"__name__": "crossattn.layer_norm"},
                "crossattention": {
                    "__name__": "crossattn",
                    "q_attn": {"__name__": "q"},
                    "c_attn": {"__name__": "kv"},
                    "c_proj": {"__name__": "proj"},
                },
                "ln_2": {"__name__": "ff.layer_norm"},
                "mlp": {
                    "__name__": "ff",
                    "c_fc": {"__name__": "w1"},
                    "c_proj": {"__name__": "w2"},
                },
            },
        },
        "ln_f": {"__name__": "decoder.layer_norm"},
    },
    {"lm_head": {"__name__": "lm_head.proj"}},
)

OPT = Family(
    "OPT",
    (
        "decoder.layers.0.self_attn.q_proj",
        "decoder.layers.0.self_attn.out_proj",
        "decoder.layers.0.self_attn_layer_norm",
        "decoder.layers.0.fc1",
        "decoder.layers.0.fc2",
    ),
    {
        "decoder": {
            "__name__": "decoder",
            "layers": {
                "__name__": "block",
                "$": {
                    "__name__": "$",
                    "self_attn": {
                        "__name__": "attn",
                        "q_proj": {"__name__": "q"},
                        "k_proj": {"__name__": "k"},
                        "v_proj": {"__name__": "v"},
                        "out_proj": {"__name__": "proj"},
                    },
                    "self_attn_layer_norm": {"__name__": "layer_norm"},
                    "fc1": {"__name__": "ff.w1"},
                    "fc2": {"__name__": "ff.w2"},
                    "final_layer_norm": {"__name__": "layer_norm"},
                },
            },
        },
    },
    {"lm_head": {"__name__": "lm_head.proj"}},
)


def _t5_attention(role: str, name: str) -> Tree:
    return {
        "__name__": role,
        f"{name}.q": {"__name__": "q"},
        f"{name}.k": {"__name__": "k"},
        f"{name}.v": {"__name__": "v"},
        f"{name}.o": {"__name__": "proj"},
        "layer_norm": {"__name__": "layer_norm"},
    }


_T5_FEED_FORWARD: Tree = {
    "__name__": "ff",
    "DenseReluDense.wi": {"__name__": "w1"},
    "DenseReluDense.wi_0": {"__name__": "w1"},  # v1.1: the gate
    "DenseReluDense.wi_1": {"__name__": "w3"},
    "DenseReluDense.wo": {"__name__": "w2"},
    "layer_norm": {"__name__": "layer_norm"},
}

T5 = Family(
    "T5",
    (
        "encoder.block.0.layer.0.SelfAttention.q",
        "encoder.block.0.layer.0.SelfAttention.o",
        "encoder.block.0.layer.1.DenseReluDense.wo",
    ),
    {
        "shared": {"__name__": "embeddings"},
        "encoder": {
            "__name__": "encoder",
            "block": {
                "__name__": "block",
                "$": {
                    "__name__": "$",
                    "layer.0": _t5_attention("attn", "SelfAttention"),
                    "layer.1": _T5_FEED_FORWARD,
                },
            },
            "final_layer_norm": {"__name__": "layer_norm"},
        },
        "decoder": {
            "__name__": "decoder",
            "block": {
                "__name__": "block",
                "$": {
                    "__name__": "$",
                    "layer.0": _t5_attention("attn", "SelfAttention"),
                    "layer.1": _t5_attention("crossattn", "EncDecAttention"),
                    "layer.2": _T5_FEED_FORWARD,
                },
            },
            "final_layer_norm": {"__name__": "layer_norm"},
        },
    },
    {"lm_head": {"__name__": "lm_head.proj"}},
)

FAMILIES = (BERT, DEBERTA_V2, GPT2, OPT, T5)


def apply_tree(tree: Tree, graph: Graph, path: str, common: str) -> dict[str, str]:
    """Common names that `tree` gives to the modules below `path`, whose common name is `common`."""
    names: dict[str, str] = {}
    for key, node in tree.items():
        if key == "__name__":
            continue
        if key == "$":
            found = [(dotted(path, child), child) for child in graph.children[path]]
        else:
            found = [(dotted(path, key), "")]
        for name, number in found:
            if name not in graph.modules:
                continue
            own = node["__name__"].replace("$", number)
            if own:
                names[name] = dotted(common, own)
            names.update(apply_tree(node, graph, name, names.get(name, common)))
    return names


def family_at(graph: Graph, path: str) -> tuple[Family, dict[str, str]] | None:
    """The family whose base model is the module called `path`, and the names that it gives."""
    for family in FAMILIES:
        if family.signature[0].split(".")[0] not in graph.children[path]:
            continue  # spares most modules the paths below
        if all(dotted(path, entry) in graph.modules for entry in family.signature):
            names = apply_tree(family.body, graph, path, path)
            if _covers(graph, names):
                outside = parent_of(path)
                for place in dict.fromkeys((outside, path)):
                    names.update(apply_tree(family.head, graph, place, place))
                return family, names
    return None


def _covers(graph: Graph, names: dict[str, str]) -> bool:
    """Whether `names` holds every linear layer of every block, or a module around or inside it."""
    named = set()
    for name in names:
        while name and name not in named:
            named.add(name)
            name = parent_of(name)
    blocks = [name for name, common in names.items() if common.rpartition(".")[2].isdigit()]
    return bool(blocks) and all(
        linear in named for block in blocks for linear in graph.linears_below(block)
    )
