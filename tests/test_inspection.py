"""Pictures, counts and tables, against bigmodelvis's pictures and figures worked out by hand."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import backbones
import bigmodelvis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from placed import place, unchanged
from rich.console import Console
from rich.text import Text
from torch import nn

import opendelta
from opendelta import DeltaBase
from opendelta.exceptions import DeltaWarning
from opendelta.inspection import (
    Visualization,
    inspect_module_statistics,
    inspect_optimizer_statistics,
    num_delta_parameters,
    num_frozen_parameters,
    num_total_parameters,
    num_trainable_parameters,
    print_log,
    summary,
)

Line = tuple[int, str]  # depth, text
MANIFEST = json.loads((Path(backbones.__file__).parent / "manifest.json").read_text())


# --- reading pictures -----------------------------------------------------------------------------


def lines_of(text: str) -> list[Line]:
    """A printed tree as depths and texts."""
    return [
        (len(guides) // 4, content)
        for guides, content in re.findall(r"^((?:[│├└─]| )*)(.*)$", text.rstrip("\n"), re.MULTILINE)
    ]


def ours(model: nn.Module, **options: Any) -> list[Line]:
    return lines_of(str(Visualization(model).structure_graph(printTree=False, **options)))


def theirs(model: nn.Module, **options: Any) -> list[Line]:
    """bigmodelvis's picture, each of the names that it puts on one line on a line of its own.

    It writes ``q,v(Linear) weight:[4]``, also of different classes, where it meets the first; here
    each name returns to its place among the children of its module.
    """
    tree = bigmodelvis.Visualization(model).structure_graph(printTree=False, **options)

    def walk(node: Any, module: nn.Module, depth: int) -> Iterator[Line]:
        order = list(module._modules)
        found: list[tuple[int, list[Line]]] = []
        for child in node.children:
            text = Text.from_markup(child.label).plain
            if child.is_param_node:
                found.append((-1, [(depth, text.strip())]))
                continue
            heads = re.findall(r"([\w,-]+) ?\((\w+)\),?", text)
            shapes = text[text.rindex(")") + 1 :]
            for names, kind in heads:
                numbered = re.fullmatch(r"\d+-\d+", names)
                for name in [names] if numbered else names.split(","):
                    first = name.split("-")[0]
                    line = f"{name}{'' if numbered else ' '}({kind}){shapes}"
                    inside = walk(child, module.get_submodule(first), depth + 1)
                    found.append((order.index(first), [(depth, line), *inside]))
        for _, lines in sorted(found, key=lambda item: item[0]):
            yield from lines

    return [(0, "root"), *walk(tree, model, 1)]


@pytest.mark.parametrize("name", backbones.NAMES)
@pytest.mark.parametrize(
    "options",
    [{}, {"keep_non_params": True}, {"keep_non_params": True, "expand_params": True}],
    ids=["plain", "non_params", "expanded"],
)
def test_bare_backbones_look_as_in_bigmodelvis(name: str, options: dict[str, bool]) -> None:
    model = backbones.build(name)
    assert ours(model, **options) == theirs(model, **options)


def test_twelve_layers_are_one_line() -> None:
    assert (3, "0-11(BertLayer)") in ours(backbones.build("bert12"))


def colored(model: nn.Module, **options: Any) -> list[tuple[str, str]]:
    """Each text of the picture with the colour that a terminal shows it in, in order."""
    tree = Visualization(model).structure_graph(printTree=False, **options)
    console = Console(file=io.StringIO(), width=200, color_system="truecolor", force_terminal=True)
    return [
        (segment.text.strip(), segment.style.color.name)
        for segment in console.render(tree)
        if segment.style is not None and segment.style.color is not None
    ]


# --- pictures of models with deltas ---------------------------------------------------------------

PLACES = {  # backbone: a module, its input and output width; those of t5 and llama have no bias
    "bert_cls": ("self.query", 64, 64),
    "roberta": ("intermediate.dense", 64, 128),
    "deberta": ("self.value_proj", 64, 64),
    "gpt2": ("c_attn", 64, 192),
    "opt": ("fc2", 128, 64),
    "t5": ("SelfAttention.q", 64, 64),
    "bart": ("fc1", 64, 128),
    "llama": ("v_proj", 64, 32),
    "vit": ("mlp.fc2", 128, 64),
}


def with_delta(
    lines: list[Line], name: str, added: list[Line], bias: str = ""
) -> tuple[list[Line], list[str]]:
    """`lines` with a delta on each module whose dotted name ends in `name`.

    Args:
        added: the lines of the delta, with their depths below the module.
        bias: what the line of the module itself ends in.

    Returns:
        The new lines, and what of them is purple.
    """
    result: list[Line] = []
    purple: list[str] = []
    path: list[str] = []
    for depth, text in lines:
        path[depth:] = [text.split()[0]]
        if not ".".join(path).endswith("." + name):
            result.append((depth, text))
            continue
        result.append((depth, text.removesuffix(f" {bias}") + f" {bias}".rstrip()))
        result += [(depth + more, line) for more, line in added]
        purple += re.findall(r"\w+:\[[\d, ]+\]", " ".join([bias, *(line for _, line in added)]))
    assert purple, f"{name} is not in the picture"
    return result, purple


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("method", ["LoraModel", "AdapterModel", "BitFitModel"])
def test_deltas_in_the_picture(name: str, method: str) -> None:
    module, width_in, width_out = PLACES[name]
    added, bias = {
        "LoraModel": (
            [(1, f"lora (LoraLayer) lora_A:[8, {width_in}] lora_B:[{width_out}, 8]")],
            "",
        ),
        "AdapterModel": (
            [
                (1, "adapter (AdapterLayer)"),
                (2, "modulelist (Bottleneck)"),
                (3, f"down_proj (Linear) weight:[24, {width_out}] bias:[24]"),
                (3, f"up_proj (Linear) weight:[{width_out}, 24] bias:[{width_out}]"),
            ],
            "",
        ),
        "BitFitModel": ([], f"bias:[{width_out}]"),
    }[method]
    bare = theirs(backbones.build(name))
    model = backbones.build(name)
    getattr(opendelta, method)(model, modified_modules=[module])
    lines, purple = with_delta(bare, module, added, bias)
    assert ours(model) == lines
    assert [text for text, color in colored(model) if color == "rgb(175,0,255)"] == purple


class Small(nn.Module):
    """A delta of four values."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


def stack(layers: int, width: int = 4) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))


def put(model: nn.Module, name: str) -> DeltaBase:
    """Put a delta on the module `name`."""
    delta = DeltaBase(model, modified_modules=[name])
    delta.insert_sequential_module(model.get_submodule(name), Small(), "small")
    return delta


def test_blocks_fold_also_when_some_carry_a_delta() -> None:
    model = stack(6)
    delta = put(model, "1")
    assert ours(model) == [
        (0, "root"),
        (1, "0,2-5(Linear) weight:[4, 4] bias:[4]"),
        (1, "1 (Linear) weight:[4, 4] bias:[4]"),
        (2, "small (Small) scale:[4]"),
    ]
    delta.detach()
    assert ours(model) == [(0, "root"), (1, "0-5(Linear) weight:[4, 4] bias:[4]")]


def test_blocks_that_train_differently_stay_apart() -> None:
    model = stack(3)
    model[0].requires_grad_(False)
    assert [text for _, text in ours(model)] == [
        "root",
        "0 (Linear) weight:[4, 4] bias:[4]",
        "1-2(Linear) weight:[4, 4] bias:[4]",
    ]


def test_different_classes_and_names_stay_apart() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "7": nn.Bilinear(4, 1, 4)})
    model["8"] = nn.Linear(4, 4)
    model["9"] = nn.Linear(4, 4)
    assert [text.split()[0] for _, text in ours(model)] == ["root", "a", "b", "7", "8-9(Linear)"]


def test_colours() -> None:
    model = nn.ModuleDict({"body": stack(2), "head": nn.Linear(4, 2), "last": nn.Linear(4, 3)})
    model["head"].weight.requires_grad_(False)
    put(model, "last")
    assert dict(colored(model)) == {
        "root": "white",
        "body": "white",
        "(Sequential)": "green",
        "0-1": "red",
        "(Linear)": "green",
        "weight:[4, 4]": "cyan",
        "bias:[4]": "cyan",
        "head": "white",
        "weight:[2, 4]": "grey50",
        "bias:[2]": "cyan",
        "last": "white",
        "weight:[3, 4]": "cyan",
        "bias:[3]": "cyan",
        "small": "white",
        "(Small)": "green",
        "scale:[4]": "rgb(175,0,255)",
    }


def test_root_parameters_are_shown() -> None:
    model = nn.Module()
    model.token = nn.Parameter(torch.zeros(1, 4))
    assert ours(model) == [(0, "root token:[1, 4]")]
    assert ours(model, expand_params=True) == [(0, "root"), (1, "token:[1, 4]")]


def test_modules_without_parameters_are_left_out_at_every_depth() -> None:
    model = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Sequential(nn.Dropout())), nn.Linear(1, 1))
    assert ours(model) == [(0, "root"), (1, "1 (Linear) weight:[1, 1] bias:[1]")]
    kept = ours(model, keep_non_params=True)
    assert (3, "0 (Dropout)") in kept


def test_odd_models() -> None:
    assert ours(nn.Module()) == [(0, "root")]
    assert ours(nn.Sequential(nn.LazyLinear(3))) == [
        (0, "root"),
        (1, "0 (LazyLinear) weight:[?] bias:[?]"),
    ]
    shared = nn.Linear(2, 2)
    twice = nn.ModuleDict({"a": shared, "b": shared})  # bigmodelvis drops into a debugger here
    assert [text.split()[0] for _, text in ours(twice)] == ["root", "a", "b"]
    loop = nn.Module()
    loop.child = nn.Linear(2, 2)
    loop.child.parent = loop
    assert ours(loop) == [
        (0, "root"),
        (1, "child (Linear) weight:[2, 2] bias:[2]"),
    ]


def test_brackets_and_tags_in_names_are_printed_as_they_are() -> None:
    model = nn.ModuleDict(
        {"[red]": nn.Linear(1, 1), "<b>": nn.Linear(1, 1), "a\\": nn.Linear(1, 1)}
    )
    assert [text.split()[0] for _, text in ours(model)] == ["root", "[red]", "<b>", "a\\"]
    page = Visualization(model)._repr_html_()
    assert "&lt;b&gt;" in page and "<b>" not in page


def test_notebook_tree_folds_without_script() -> None:
    page = Visualization(backbones.build("bert"))._repr_html_()
    assert page.count("<details open>") == page.count("</details>") > 5
    assert "script" not in page
    text = re.sub("<[^>]+>", " ", page)
    assert [word for word in text.split() if word.startswith("0-1")] == ["0-1"]


def deep_model(layers: int) -> nn.Module:
    block = nn.TransformerEncoderLayer(8, 2, 16)
    return nn.TransformerEncoder(block, layers, enable_nested_tensor=False)


def test_192_layers_fit_on_a_screen_and_take_no_time() -> None:
    model = deep_model(192)
    start = time.perf_counter()
    tree = Visualization(model).structure_graph(printTree=False)
    text = str(tree)
    assert time.perf_counter() - start < 1.5
    assert "0-191(TransformerEncoderLayer)" in text
    assert len(text.splitlines()) < 24


def in_new_process(code: str, **environment: str) -> str:
    """Standard output, a pipe, of `code`."""
    env = {**os.environ, "PYTHONIOENCODING": "utf-8", **environment}
    command = [sys.executable, "-c", code]
    process = subprocess.run(
        command, check=False, capture_output=True, text=True, env=env, encoding="utf-8"
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


PRINT_WIDE = """
from torch import nn
from opendelta.inspection import Visualization
name = "n" * 200
Visualization(nn.ModuleDict({name: nn.Linear(2, 2)})).structure_graph()
"""


def test_pipes_get_plain_unwrapped_text() -> None:
    wide = f"└── {'n' * 200} (Linear) weight:[2, 2] bias:[2]"
    assert in_new_process(PRINT_WIDE) == f"root\n{wide}\n"


@pytest.mark.parametrize("variable, colored", [("NO_COLOR", False), ("COLORTERM", True)])
def test_no_color_is_obeyed_in_a_terminal(variable: str, colored: bool) -> None:
    out = in_new_process(PRINT_WIDE, FORCE_COLOR="1", TERM="xterm-256color", **{variable: "1"})
    assert bool(re.search("\x1b\\[[0-9;]*3[0-9]", out)) == colored


def test_print_tree(capsys: pytest.CaptureFixture[str]) -> None:
    model = backbones.build("toy")
    tree = Visualization(model).structure_graph(rootname="toy", printTree=False)
    assert capsys.readouterr().out == ""
    Visualization(model).structure_graph(rootname="toy")
    assert capsys.readouterr().out.rstrip() == str(tree)
    assert str(tree).startswith("toy\n")


# --- common structure -----------------------------------------------------------------------------

BERT = {  # specification 1.16.2, without the head that BertModel does not have
    "embeddings.word_embeddings": {"__name__": "embeddings"},
    "embeddings.position_embeddings": {"__name__": ""},
    "encoder": {
        "__name__": "encoder",
        "layer": {
            "__name__": "block",
            "$": {
                "__name__": "$",
                "attention": {
                    "__name__": "attn",
                    "self.query": {"__name__": "q"},
                    "self.key": {"__name__": "k"},
                    "self.value": {"__name__": "v"},
                    "output.dense": {"__name__": "proj"},
                    "output.LayerNorm": {"__name__": "layer_norm"},
                },
                "output": {
                    "__name__": "ff",
                    "dense": {"__name__": "w2"},
                    "LayerNorm": {"__name__": "layer_norm"},
                },
                "intermediate.dense": {"__name__": "ff.w1"},
            },
        },
    },
}

BERT_COMMON = """\
root
├── embeddings (Embedding) weight:[128, 64]
└── encoder (BertEncoder)
    └── block (ModuleList)
        └── 0-1(BertLayer)
            ├── attn (BertAttention)
            │   ├── q (Linear) weight:[64, 64] bias:[64]
            │   ├── k (Linear) weight:[64, 64] bias:[64]
            │   ├── v (Linear) weight:[64, 64] bias:[64]
            │   ├── proj (Linear) weight:[64, 64] bias:[64]
            │   └── layer_norm (LayerNorm) weight:[64] bias:[64]
            └── ff (BertOutput)
                ├── w1 (Linear) weight:[128, 64] bias:[128]
                ├── w2 (Linear) weight:[64, 128] bias:[64]
                └── layer_norm (LayerNorm) weight:[64] bias:[64]"""

BERT_UNCOMMON = """\
├── embeddings.position_embeddings (Embedding) weight:[160, 64]
├── embeddings.token_type_embeddings (Embedding) weight:[2, 64]
├── embeddings.LayerNorm (LayerNorm) weight:[64] bias:[64]
"""


def common(model: nn.Module, **options: Any) -> str:
    vis = Visualization(model)
    return str(vis.structure_graph(common_structure=True, printTree=False, **options))


def test_common_structure_of_a_mapping() -> None:
    model = backbones.build("bert")
    assert common(model, mapping=BERT, only_common=True) == BERT_COMMON
    first, *rest = BERT_COMMON.splitlines(keepends=True)
    body = "".join(rest).replace("└── encoder", "├── encoder")
    body = re.sub("(?m)^    ", "│   ", body)
    assert common(model, mapping=BERT) == (
        first
        + body.replace("├── encoder", BERT_UNCOMMON + "├── encoder")
        + "\n└── pooler.dense (Linear) weight:[64, 64] bias:[64]"
    )


def test_names_without_a_common_one_are_grey() -> None:
    shown = dict(colored(backbones.build("bert"), common_structure=True, mapping=BERT))
    assert shown["pooler.dense"] == shown["embeddings.position_embeddings"] == "grey50"
    assert shown["q"] == "white"


def test_dotted_common_names_get_a_virtual_node() -> None:
    mapping = {"0": {"__name__": "ff.w1"}, "1": {"__name__": "ff.w2"}}
    assert lines_of(common(stack(2), mapping=mapping)) == [
        (0, "root"),
        (1, "ff (Virtual)"),
        (2, "w1 (Linear) weight:[4, 4] bias:[4]"),
        (2, "w2 (Linear) weight:[4, 4] bias:[4]"),
    ]


@pytest.mark.parametrize("only_common", [False, True])
def test_deltas_are_in_the_common_structure(only_common: bool) -> None:
    model = backbones.build("bert")
    put(model, "encoder.layer.1.attention.self.query")
    put(model, "pooler.dense")
    lines = lines_of(common(model, mapping=BERT, only_common=only_common))
    second_block = lines[lines.index((3, "1 (BertLayer)")) :]
    query = second_block.index((5, "q (Linear) weight:[64, 64] bias:[64]"))
    assert second_block[query + 1] == (6, "small (Small) scale:[4]")
    if only_common:
        assert lines[-1] == (1, "pooler.dense.small (Small) scale:[4]")


def paths_of(lines: list[Line]) -> set[str]:
    """The dotted names of the modules with parameters in a picture, folded ones unfolded."""
    found: set[str] = set()
    path: list[str] = []
    for depth, text in lines:
        path[depth:] = [re.split(r"[ (]", text)[0]]
        if ":[" in text:
            found |= unfold(".".join(path[1:]))
    return found


TRANSFORMS = [case for case in MANIFEST["cases"] if case["kind"] == "transform"]


@pytest.mark.parametrize("case", TRANSFORMS, ids=lambda case: case["id"])
def test_common_structure_without_a_mapping(case: dict[str, Any]) -> None:
    model = backbones.build(case["backbone"])
    shown = paths_of(lines_of(common(model)))
    holders = {name for name, module in model.named_modules() if module._parameters}
    assert {new for old, new in case["table"].items() if old in holders} <= shown


def test_only_common_without_a_mapping() -> None:
    named = BERT_COMMON.replace("ff (BertOutput)", "ff (BertIntermediate,BertOutput)")
    assert common(backbones.build("bert"), only_common=True) == named
    assert common(backbones.build("mlp"), only_common=True) == "root"


def test_grey_and_common_modules_of_one_name_stay_apart() -> None:
    lines = lines_of(common(backbones.build("vit")))
    assert (
        1,
        "embeddings (ViTEmbeddings) cls_token:[1, 1, 64] position_embeddings:[1, 5, 64]",
    ) in lines
    assert (1, "embeddings (ViTPatchEmbeddings)") in lines


def test_build_common_tree_adds_to_a_tree() -> None:
    vis = Visualization(stack(2))
    tree = vis.build_common_tree(vis.plm, {"$": {"__name__": "$"}})
    assert [node.module_name for node in tree.children] == ["0", "1"]
    assert vis.build_common_tree(vis.plm, {"0": {"__name__": "first"}}, tree) is tree
    assert [node.module_name for node in tree.children] == ["0", "1", "first", "1"]


def test_common_structure_has_no_place_for_modules_without_parameters() -> None:
    with pytest.raises(RuntimeError, match="keep_non_params cannot be used with common_structure"):
        Visualization(stack(1)).structure_graph(keep_non_params=True, common_structure=True)


# --- counts -------------------------------------------------------------------------------------


class Tied(nn.Module):
    """12 + 6 + 6 values, of which 12 are tied and 6 shared."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.first = self.second = nn.Linear(3, 2, bias=False)
        self.lone = nn.Linear(2, 3, bias=False)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight


def test_shared_and_tied_parameters_count_once() -> None:
    model = Tied()
    model.embedding.weight.requires_grad_(False)
    assert num_total_parameters(model) == 24
    assert num_trainable_parameters(model) == 12
    assert num_frozen_parameters(model) == 12
    delta, shared = DeltaBase(model), Small()
    for part in (model.first, model.lone):
        delta.insert_sequential_module(part, shared, "small")
    assert num_delta_parameters(model) == 4
    assert num_total_parameters(model) == 28


def test_attached_deltas_count_wherever_they_are_frozen_or_not() -> None:
    model = stack(3)
    on_first, _ = put(model, "0"), put(model, "2")
    assert num_delta_parameters(model) == 8
    model.requires_grad_(False)
    assert num_delta_parameters(model) == 8
    assert num_delta_parameters(model[2]) == 4
    on_first.detach()
    assert num_delta_parameters(model) == 4


def test_lazy_and_sharded_parameters() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(2, 2))
    assert num_total_parameters(model) == 6
    inspect_module_statistics(model, verbose=False)
    weight: Any = model[1].weight
    weight.data, weight.ds_numel = torch.empty(0), 40  # how ZeRO-3 marks one that lives elsewhere
    assert num_total_parameters(model) == 42


def test_module_statistics(caplog: pytest.LogCaptureFixture) -> None:
    model = Tied()
    model.requires_grad_(False)
    put(model, "lone")
    with caplog.at_level(logging.INFO):
        stat = inspect_module_statistics(model, verbose=False)
        assert not caplog.records
        inspect_module_statistics(model)
        assert "'delta_parameters': 4" in caplog.text
    assert stat["cpumem"] is None or 0.01 < stat["cpumem"] <= stat["maxcpumem"]
    assert 0 <= stat["cudamem"] <= stat["maxcudamem"]
    counts = {key: value for key, value in stat.items() if "mem" not in key}
    assert counts == {
        "total_parameters": 28,
        "trainable_parameters": 4,
        "trainable_ratio": pytest.approx(1 / 7),
        "delta_parameters": 4,
        "delta_ratio": pytest.approx(1 / 7),
        "state_dict_bytes": 28 * 4,
    }


def test_state_dict_bytes_are_those_of_the_saved_file(tmp_path: object) -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300)).half()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    told = inspect_module_statistics(model, verbose=False)["state_dict_bytes"]
    assert 0 <= file.tell() - told < 4000  # the file also holds names


def test_a_model_without_parameters() -> None:
    stat = inspect_module_statistics(nn.ReLU(), verbose=False)
    assert stat["total_parameters"] == stat["trainable_ratio"] == stat["delta_ratio"] == 0


# --- optimizer ------------------------------------------------------------------------------------


def test_every_group_of_an_optimizer() -> None:
    a, b = nn.Linear(2, 2), nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(
        [{"params": a.parameters(), "lr": 0.5}, {"params": b.parameters(), "weight_decay": 0.25}]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stat = inspect_optimizer_statistics(optimizer, verbose=False)
    assert (stat["param_group_0"]["total_parameters"], stat["param_group_0"]["lr"]) == (6, 0.5)
    assert stat["param_group_1"]["total_parameters"] == 12
    assert stat["param_group_1"]["weight_decay"] == 0.25
    assert "params" not in stat["param_group_0"]
    assert (stat["total_parameters"], stat["trainable_ratio"]) == (18, 1.0)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_given_twice_counts_once() -> None:
    p = nn.Parameter(torch.zeros(3))
    stat = inspect_optimizer_statistics(torch.optim.SGD([p, p], lr=0.1), verbose=False)
    assert stat["total_parameters"] == stat["param_group_0"]["trainable_parameters"] == 3


def test_frozen_parameters_in_an_optimizer_warn() -> None:
    model = stack(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[:4].requires_grad_(False)
    with pytest.warns(DeltaWarning, match=r"shape \(4, 4\).* and 5 more \(80 values\)") as caught:
        stat = inspect_optimizer_statistics(optimizer, verbose=False)
    assert caught[0].filename == __file__
    assert stat["trainable_parameters"] == stat["param_group_0"]["trainable_parameters"] == 20
    assert stat["trainable_ratio"] == 0.2
    with pytest.warns(DeltaWarning, match="0.weight, 0.bias, 1.weight and 5 more"):
        inspect_optimizer_statistics(optimizer, verbose=False, model=model)


def test_trainable_parameters_that_an_optimizer_lacks_warn() -> None:
    model = stack(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    put(model, "1")
    with pytest.warns(DeltaWarning, match=r"lacks .*: 1\.small\.scale \(4 values\)"):
        inspect_optimizer_statistics(optimizer, verbose=False, model=model)


def test_optimizer_statistics_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        inspect_optimizer_statistics(torch.optim.SGD(stack(1).parameters(), lr=0.125))
    assert "'lr': 0.125" in caplog.text


# --- summary --------------------------------------------------------------------------------------


def test_summary_folds_numbers_and_counts() -> None:
    deltas = [(f"layer.{i}.{name}", "small", Small()) for i in (0, 1, 2, 4) for name in "qv"]
    deltas[0][2].requires_grad_(False)
    table = summary([*deltas, ("head", "bias", nn.Parameter(torch.zeros(3).half()))], 1000)
    assert [(row.pattern, row.delta, row.count, row.shape) for row in table.rows] == [
        ("layer.0-2,4.q", "small", 4, "scale:[4]"),
        ("layer.0-2,4.v", "small", 4, "scale:[4]"),
        ("head", "bias", 1, "[3]"),
    ]
    counts = [(r.counts.parameters, r.counts.trainable, r.counts.bytes) for r in table.rows]
    assert counts == [(16, 12, 64), (16, 16, 64), (3, 3, 6)]
    assert (table.total.parameters, table.total.trainable, table.total.bytes) == (35, 31, 134)


def test_summary_splits_rows_by_shape_and_counts_shared_deltas_once() -> None:
    shared = Small()
    table = summary([("0.up", "p", shared), ("0.down", "p", shared), ("1.up", "p", nn.PReLU())], 8)
    assert [(r.pattern, r.shape, r.counts.parameters) for r in table.rows] == [
        ("0.up", "scale:[4]", 4),
        ("0.down", "scale:[4]", 0),
        ("1.up", "weight:[1]", 1),
    ]
    assert table.total.parameters == 5


def test_summary_prints_itself() -> None:
    table = summary([("[b]<x>", "small", Small())], 1600)
    rows = [re.split(r"\s*[│┃]\s*", line.strip())[1:-1] for line in str(table).splitlines()]
    assert ["[b]<x>", "small", "1", "scale:[4]", "4", "4", "16"] in rows
    assert ["total", "", "1", "", "4", "4", "16"] in rows
    assert str(table).endswith("\n4 of 1,600 parameters = 0.25 %")
    assert repr(table) == str(table)
    page = table._repr_html_()
    assert "<td>[b]&lt;x&gt;</td><td>small</td><td>1</td><td>scale:[4]</td>" in page
    assert "4 of 1,600 parameters = 0.25 %" in page


def test_empty_summary() -> None:
    assert str(summary([], 0)).endswith("0 of 0 parameters = 0 %")


# --- log ------------------------------------------------------------------------------------------


def test_log_prints_tree_ratios_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    model = stack(2)
    model.requires_grad_(False)
    put(model, "1")
    print_log(model)
    tree, *figures = capsys.readouterr().out.split("scale:[4]\n")
    assert tree.startswith("root\n├── 0 (Linear)")
    lines = figures[0].splitlines()
    assert lines[:2] == ["Trainable Ratio: 4/44=9.090909%", "Delta Parameter Ratio: 4/44=9.090909%"]
    assert re.fullmatch(r"CPU Memory: (\d+\.\d\d GB|unknown) now, \S+( GB)? at most", lines[2])
    assert re.fullmatch(r"CUDA Memory: \d+\.\d\d GB now, \d+\.\d\d GB at most", lines[3])
    assert len(lines) == 4


@pytest.mark.parametrize(
    "option, gone",
    [
        ("visualization", "root"),
        ("trainable_ratio", "Trainable"),
        ("delta_ratio", "Delta"),
        ("cuda_memory", "Memory"),
    ],
)
def test_each_part_of_the_log_can_be_left_out(
    option: str, gone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"root", "Trainable", "Delta", "Memory"}
    print_log(stack(1), **{option: False})
    out = capsys.readouterr().out
    assert {word for word in words if word in out} == words - {gone}


# --- folding --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers, text",
    [
        ([], ""),
        ([3], "3"),
        (range(12), "0-11"),
        ([5, 0, 3, 2, 4], "0,2-5"),
        ([1, 2, 9, 9, 11], "1-2,9,11"),
    ],
)
def test_number_ranges(numbers: list[int], text: str) -> None:
    assert list(folded([str(number) for number in numbers])) == ([text] if text else [])


def folded(names: list[str]) -> dict[str, int]:
    """The rows that a table has for deltas on the modules `names`, and how many each counts."""
    table = summary([(name, "small", Small()) for name in names], 0)
    assert len({row.pattern for row in table.rows}) == len(table.rows)
    return {row.pattern: row.count for row in table.rows}


def test_names_that_differ_in_numbers_alone_fold() -> None:
    names = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"]
    names += [f"layers.2.blocks.{i}" for i in range(6)] + ["head", "01.x", "2.x"]
    assert folded(names) == {
        "layers.0-1.blocks.0-1": 4,
        "layers.2.blocks.0-5": 6,
        "head": 1,
        "01.x": 1,
        "2.x": 1,
    }


def unfold(pattern: str) -> set[str]:
    """Every name that a pattern stands for."""
    names = [""]
    for part in pattern.split("."):
        values = [part]
        if re.fullmatch(r"\d+([-,]\d+)*", part):
            values = []
            for run in part.split(","):
                first, _, last = run.partition("-")
                values += [str(i) for i in range(int(first), int(last or first) + 1)]
        names = [f"{name}.{value}" for name in names for value in values]
    return {name[1:] for name in names}


@given(
    st.lists(
        st.lists(st.sampled_from(["a", "b", "0", "1", "2", "3"]), min_size=1, max_size=4).map(
            ".".join
        ),
        unique=True,
    )
)
def test_folding_says_each_name_once(names: list[str]) -> None:
    rows = folded(names)
    assert all(len(unfold(pattern)) == count for pattern, count in rows.items())
    assert sorted(name for pattern in rows for name in unfold(pattern)) == sorted(names)


# --- what log prints -----------------------------------------------------------------------------


def logged(delta: DeltaBase, capsys: pytest.CaptureFixture[str], **flags: Any) -> str:
    capsys.readouterr()
    delta.log(**flags)
    return capsys.readouterr().out


def test_log_shows_the_tree_and_the_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    delta = place("LoraModel", "bert_cls")
    delta.freeze_module()
    text = logged(delta, capsys)
    assert "lora" in text and "query" in text
    own = sum(p.numel() for p in delta.parameters())
    total = sum(p.numel() for p in delta.backbone_model.parameters())
    assert text.count(f"{own}/{total}") == 2  # trainable and delta


@pytest.mark.parametrize("flag", ["delta_ratio", "trainable_ratio", "visualization", "cuda_memory"])
def test_each_part_of_log_can_be_left_out(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    delta = place("LoraModel", "bert_cls")
    every = ("delta_ratio", "trainable_ratio", "visualization", "cuda_memory")
    signs = {
        "delta_ratio": "Delta Parameter Ratio",
        "trainable_ratio": "Trainable Ratio",
        "visualization": "query",
        "cuda_memory": "CUDA Memory",
    }
    without = logged(delta, capsys, **{flag: False})
    assert [name for name in every if signs[name] not in without] == [flag]
    alone = logged(delta, capsys, **{name: name == flag for name in every})
    assert [name for name in every if signs[name] in alone] == [flag]


def test_log_of_a_part_and_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    delta = place("LoraModel", "bert_cls")
    model: Any = delta.backbone_model
    part = logged(delta, capsys, module=model.bert.encoder.layer[0])
    assert "lora" in part and "classifier" not in part
    nothing = {
        "delta_ratio": False,
        "trainable_ratio": False,
        "visualization": False,
        "cuda_memory": False,
    }
    assert logged(delta, capsys, **nothing) == ""
    with unchanged(model):
        logged(delta, capsys)
