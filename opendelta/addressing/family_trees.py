"""The six documented families, each as a table from original to common names (specification 1.16).

The names begin below a family's base model. ``$`` stands for every element of a list, and what has
no common name is in no row. ``qkv`` and ``kv`` name projections that are fused in one module.

A family is recognised by its layout, not by a class: below every module that has, in its first
block, the rows with a ``*``, if the table names something in every part of every block there. So it
is found in any wrapper and in derived models (ELECTRA and XLM-R have BERT's layout), and never half
fits. What no table covers is left to `opendelta.addressing.inference`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from opendelta.addressing.graph import Graph
from opendelta.ground.names import dotted, parent_of


def _rows_like(rows: str, *changes: tuple[str, str]) -> str:
    """The same rows with other words, each of them optional."""
    for old, new in (("*", " "), *changes):
        rows = rows.replace(old, new)
    return rows


_BERT_ATTENTION = """
    encoder.layer.$.attention                   encoder.block.$.attn
  * encoder.layer.$.attention.self.query        encoder.block.$.attn.q
    encoder.layer.$.attention.self.key          encoder.block.$.attn.k
    encoder.layer.$.attention.self.value        encoder.block.$.attn.v
  * encoder.layer.$.attention.output.dense      encoder.block.$.attn.proj
    encoder.layer.$.attention.output.LayerNorm  encoder.block.$.attn.layer_norm
"""
_BERT = f"""
    embeddings.word_embeddings                  embeddings
    encoder                                     encoder
    encoder.layer                               encoder.block
    encoder.layer.$                             encoder.block.$
{_BERT_ATTENTION}
{_rows_like(_BERT_ATTENTION, (".attention", ".crossattention"), ("attn", "crossattn"))}
    encoder.layer.$.intermediate                encoder.block.$.ff
  * encoder.layer.$.intermediate.dense          encoder.block.$.ff.w1
    encoder.layer.$.output                      encoder.block.$.ff
  * encoder.layer.$.output.dense                encoder.block.$.ff.w2
    encoder.layer.$.output.LayerNorm            encoder.block.$.ff.layer_norm
"""
_BERT_HEAD = """
    cls.predictions                             lm_head
    cls.predictions.decoder                     lm_head.proj
"""
_ROBERTA_HEAD = """
    lm_head                                     lm_head
    lm_head.decoder                             lm_head.proj
"""
_GPT2 = """
  * wte                                         embeddings
    h                                           decoder.block
    h.$                                         decoder.block.$
    h.$.ln_1                                    decoder.block.$.attn.layer_norm
    h.$.attn                                    decoder.block.$.attn
  * h.$.attn.c_attn                             decoder.block.$.attn.qkv
  * h.$.attn.c_proj                             decoder.block.$.attn.proj
    h.$.ln_cross_attn                           decoder.block.$.crossattn.layer_norm
    h.$.crossattention                          decoder.block.$.crossattn
    h.$.crossattention.q_attn                   decoder.block.$.crossattn.q
    h.$.crossattention.c_attn                   decoder.block.$.crossattn.kv
    h.$.crossattention.c_proj                   decoder.block.$.crossattn.proj
    h.$.ln_2                                    decoder.block.$.ff.layer_norm
    h.$.mlp                                     decoder.block.$.ff
  * h.$.mlp.c_fc                                decoder.block.$.ff.w1
  * h.$.mlp.c_proj                              decoder.block.$.ff.w2
    ln_f                                        decoder.layer_norm
"""
_OPT = """
    decoder                                     decoder
    decoder.layers                              decoder.block
    decoder.layers.$                            decoder.block.$
    decoder.layers.$.self_attn                  decoder.block.$.attn
  * decoder.layers.$.self_attn.q_proj           decoder.block.$.attn.q
    decoder.layers.$.self_attn.k_proj           decoder.block.$.attn.k
    decoder.layers.$.self_attn.v_proj           decoder.block.$.attn.v
  * decoder.layers.$.self_attn.out_proj         decoder.block.$.attn.proj
  * decoder.layers.$.self_attn_layer_norm       decoder.block.$.layer_norm
  * decoder.layers.$.fc1                        decoder.block.$.ff.w1
  * decoder.layers.$.fc2                        decoder.block.$.ff.w2
    decoder.layers.$.final_layer_norm           decoder.block.$.layer_norm
"""
_T5_SELF = """
    encoder                                     encoder
    encoder.final_layer_norm                    encoder.layer_norm
    encoder.block                               encoder.block
    encoder.block.$                             encoder.block.$
    encoder.block.$.layer.0                     encoder.block.$.attn
  * encoder.block.$.layer.0.SelfAttention.q     encoder.block.$.attn.q
    encoder.block.$.layer.0.SelfAttention.k     encoder.block.$.attn.k
    encoder.block.$.layer.0.SelfAttention.v     encoder.block.$.attn.v
  * encoder.block.$.layer.0.SelfAttention.o     encoder.block.$.attn.proj
    encoder.block.$.layer.0.layer_norm          encoder.block.$.attn.layer_norm
"""
_T5_FEED_FORWARD = """
    encoder.block.$.layer.1                      encoder.block.$.ff
    encoder.block.$.layer.1.DenseReluDense.wi    encoder.block.$.ff.w1
    encoder.block.$.layer.1.DenseReluDense.wi_0  encoder.block.$.ff.w1
    encoder.block.$.layer.1.DenseReluDense.wi_1  encoder.block.$.ff.w3
  * encoder.block.$.layer.1.DenseReluDense.wo    encoder.block.$.ff.w2
    encoder.block.$.layer.1.layer_norm           encoder.block.$.ff.layer_norm
"""
_T5_DECODER_SELF = _rows_like(_T5_SELF, ("encoder", "decoder"))
_T5_CROSS = _rows_like(
    _T5_DECODER_SELF, ("Self", "EncDec"), ("layer.0", "layer.1"), ("attn", "crossattn")
)
_T5_DECODER_FEED_FORWARD = _rows_like(
    _T5_FEED_FORWARD, ("encoder", "decoder"), ("layer.1", "layer.2")
)
_T5 = f"""
    shared                                      embeddings
{_T5_SELF}
{_T5_FEED_FORWARD}
{_T5_DECODER_SELF}
{_T5_CROSS}
{_T5_DECODER_FEED_FORWARD}
"""
_HEAD = """
    lm_head                                     lm_head.proj
"""


@dataclass(frozen=True)
class Family:
    """One family's layout.

    Attributes:
        name: what the explanation of a mapping calls it.
        body: the table of the base model.
        head: the table of the head, which stands beside the base model or inside it.
    """

    name: str
    body: str
    head: str

    @cached_property
    def signature(self) -> list[str]:
        """Paths that exist below the base model of every member."""
        rows = re.findall(r"^ *\* (\S+)", self.body, re.MULTILINE)
        return [row.replace("$", "0") for row in rows]


FAMILIES = (
    Family("BERT or RoBERTa", _BERT, _BERT_HEAD + _ROBERTA_HEAD),  # one body; the heads differ
    Family("DeBERTa-v2", re.sub(r"(self\.\w+)", r"\1_proj", _BERT), _BERT_HEAD),
    Family("GPT2", _GPT2, _HEAD),
    Family("OPT", _OPT, _HEAD),
    Family("T5", _T5, _HEAD),
)


def names_by(table: str, graph: Graph, path: str) -> dict[str, str]:
    """Common names that a table gives to the modules below `path`."""
    names: dict[str, str] = {}
    for row in filter(str.strip, table.splitlines()):
        original, common = row.replace("*", " ").split()
        holder, in_list, _ = original.partition(".$")
        for number in graph.children[dotted(path, holder)] if in_list else [""]:
            name = dotted(path, original.replace("$", number))
            if name in graph.modules:
                names[name] = dotted(path, common.replace("$", number))
    return names


def family_at(graph: Graph, path: str) -> tuple[str, dict[str, str]] | None:
    """The family whose base model is the module called `path`, and the names that it gives."""
    for family in FAMILIES:
        if family.signature[0].split(".")[0] not in graph.children[path]:
            continue  # spares most modules the paths below
        if all(dotted(path, entry) in graph.modules for entry in family.signature):
            names = names_by(family.body, graph, path)
            if _covers(graph, names):
                for place in dict.fromkeys((parent_of(path), path)):
                    names.update(names_by(family.head, graph, place))
                return family.name, names
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
