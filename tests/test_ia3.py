"""(IA)³ against PEFT, on fused projections, and folded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import backbones
import peft
import pytest
import torch
import transformers
from peft_reference import (
    Net,
    Opaque,
    Two,
    close,
    compare,
    fill,
    folded,
    random_net,
    randomise,
    rows,
)
from safetensors.torch import load_file
from torch import Tensor, nn

import opendelta
from opendelta import AutoDeltaModel, IA3Model
from opendelta.exceptions import AddressingError, ConfigError, InsertionError


def theirs_of(model: nn.Module, on_input: list[str]) -> nn.Module:
    config = peft.IA3Config(target_modules=["first", "last"], feedforward_modules=on_input)
    return peft.get_peft_model(copy.deepcopy(model), config)


def pairs_of(delta: nn.Module, model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    found = []
    for name, ours in delta.named_parameters():
        layer = model.get_submodule("base_model.model." + name.removesuffix(".ia3.scale"))
        found.append((ours, layer.ia3_l["default"]))
    return found


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_input", "expected"),
    [
        ([], [-0.635471, -0.296406, 0.049067, 0.071975]),
        (["lin"], [0.375535, -0.360803, 0.377311, 0.323872]),
    ],
)
def test_reference_values(on_input: list[str], expected: list[float]) -> None:
    model = Net()
    delta = IA3Model(model, on_input, modified_modules=["lin"])
    (scale,) = delta.parameters()
    fill(scale, 10, 0.3)
    close(model(rows())[0], torch.tensor(expected))


KINDS = ["linear", "Conv1D", "conv2", "conv3", "linear"]  # of one dimension PEFT knows none
SEEDS = [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 40))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_random_configurations_against_peft(seed: int) -> None:
    model, x = random_net(seed, KINDS)
    on_input = [[], ["last"], ["first"], ["first", "last"]][seed // 2 % 4]
    theirs = theirs_of(model, on_input)
    delta = IA3Model(model, on_input, modified_modules=["first", "last"])
    delta.freeze_module()
    pairs = pairs_of(delta, theirs)
    randomise(delta, seed)
    with torch.no_grad():
        for ours, other in pairs:
            other.copy_(ours.view(other.shape))
    compare(model, theirs, pairs, x)


def test_a_host_that_can_only_be_called() -> None:
    hosts = [Opaque(nn.Linear(6, 5)), Opaque(nn.Linear(5, 4))]
    model, plain = Two(*hosts), Two(*(host.dense() for host in hosts))
    delta, other = (IA3Model(m, "last", ["first", "last"]) for m in (model, plain))
    randomise(delta)
    other.load_state_dict(delta.state_dict())
    x = torch.randn(3, 6)
    close(model(x), plain(x))


# --- folding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("on_input", [[], ["first", "last"]])
@pytest.mark.parametrize("seed", range(5))
def test_folds_compute_the_same(seed: int, on_input: list[str]) -> None:
    model, x = random_net(seed, ["linear", "Conv1D", "conv1", "conv2", "conv3"])
    bare = model(x)
    delta = IA3Model(model, on_input, modified_modules=["first", "last"])
    randomise(delta)
    assert (model(x) - bare).abs().max() > 1e-2
    close(folded(delta)(x), model(x))


@pytest.mark.parametrize("on_input", [[], ["0"]])
@pytest.mark.parametrize(("groups", "mode"), [(2, "zeros"), (4, "circular"), (2, "reflect")])
def test_folds_of_convolutions_with_groups(on_input: list[str], groups: int, mode: str) -> None:
    layer = nn.Conv2d(4, 8, 3, 2, 1, 1, groups, padding_mode=mode)
    model, x = nn.Sequential(layer), torch.randn(2, 4, 9, 8)
    delta = IA3Model(model, on_input, modified_modules=["0"])
    randomise(delta)
    (scale,) = delta.parameters()
    by_channel = scale.view(-1, 1, 1)
    expected = layer.forward(x * by_channel) if on_input else layer.forward(x) * by_channel
    close(model(x), expected)
    close(folded(delta)(x), model(x))


# --- fused projections ------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
}
FUSED: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64),
    "phi3": lambda: transformers.Phi3Config(**SMALL, num_key_value_heads=2),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL),
    "falcon": lambda: transformers.FalconConfig(**SMALL, alibi=False, bias=True),
    "falcon, its own groups": lambda: transformers.FalconConfig(
        **SMALL, new_decoder_architecture=True, num_kv_heads=2, bias=True
    ),
    "bigcode, one key head": lambda: transformers.GPTBigCodeConfig(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64
    ),
    "bigcode, all heads": lambda: transformers.GPTBigCodeConfig(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, multi_query=False
    ),
    "persimmon": lambda: transformers.PersimmonConfig(**SMALL, qk_layernorm=False),
}


def decoder(case: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(FUSED[case]())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(torch.tensor([[5, 9, 3, 2, 7]])).logits
    return found


@torch.no_grad()
def times(delta: nn.Module, factor: float) -> None:
    for p in delta.parameters():
        p.fill_(factor)


@pytest.mark.parametrize("case", FUSED)
def test_of_a_fused_projection_its_part_is_scaled(case: str) -> None:
    """Keys times 2 and queries by 2 change nothing, nor values times 2 and their sum by 2."""
    model = decoder(case)
    bare = logits(model)
    keys, queries, values = (
        IA3Model(model, modified_modules=[role], common_structure=True)
        for role in ("attn.k", "attn.q", "attn.v")
    )
    times(keys, 2.0)
    changed = logits(model)
    assert not torch.allclose(changed, bare, atol=1e-3)
    times(queries, 0.5)
    close(logits(model), bare, 1e-4)
    times(values, 2.0)
    assert not torch.allclose(logits(model), bare, atol=1e-3)
    sums = IA3Model(model, ["attn.proj"], modified_modules=["attn.proj"], common_structure=True)
    times(sums, 0.5)
    close(logits(model), bare, 1e-4)


def test_defaults_of_a_fused_projection(tmp_path: Path) -> None:
    model = decoder("phi3")
    delta = IA3Model(model)
    shapes = {n.replace("model.layers.", ""): len(p) for n, p in delta.named_parameters()}
    assert shapes == {
        f"{layer}.{name}.ia3.scale": width
        for layer in (0, 1)
        for name, width in (("self_attn.qkv_proj", 2 * 16), ("mlp.down_proj", 48))
    }
    randomise(delta)
    delta.save_finetuned(tmp_path)
    fresh = decoder("phi3")
    AutoDeltaModel.from_finetuned(tmp_path, fresh)
    assert torch.equal(logits(fresh), logits(model))
    close(logits(folded(delta)), logits(model))


def test_named_itself_a_fused_projection_is_scaled_whole() -> None:
    delta = IA3Model(decoder("gpt2"), modified_modules=["c_attn"])
    assert {len(p) for p in delta.parameters()} == {96}


def test_a_layout_that_cannot_be_seen_is_refused() -> None:
    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64)
    model = transformers.BloomForCausalLM(config).eval()
    hooks = {n: (len(m._forward_hooks), m.training) for n, m in model.named_modules()}
    with pytest.raises(InsertionError, match="query_key_value.*could not be seen"):
        IA3Model(model)
    assert hooks == {n: (len(m._forward_hooks), m.training) for n, m in model.named_modules()}
    assert torch.is_grad_enabled()
    assert len(list(IA3Model(model, modified_modules=["query_key_value"]).parameters())) == 2


# --- PEFT's files -----------------------------------------------------------------------------


@pytest.mark.parametrize("on_input", [[], ["last"], ["first", "last"]])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_files_of_peft_both_ways(seed: int, on_input: list[str], tmp_path: Path) -> None:
    model, x = random_net(seed, KINDS)
    theirs = theirs_of(model, on_input).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn(p.shape) * p.requires_grad)
    expected = theirs(x)
    theirs.save_pretrained(tmp_path / "theirs")
    delta = AutoDeltaModel.from_peft(tmp_path / "theirs", model)
    assert type(delta) is IA3Model and delta.on_input == on_input
    close(model(x), expected)
    delta.save_finetuned(tmp_path / "saved")
    again, _ = random_net(seed, KINDS)
    AutoDeltaModel.from_finetuned(tmp_path / "saved", again)
    assert torch.equal(again(x), model(x))
    delta.export_peft(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(random_net(seed, KINDS)[0], tmp_path / "ours")
    close(back(x), expected)
    ours, written = (load_file(tmp_path / n / FILE) for n in ("ours", "theirs"))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in written.items()}


FILE = "adapter_model.safetensors"


@pytest.mark.parametrize("backbone", ["bert", "gpt2", "t5", "llama"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_defaults_go_to_peft_and_come_back(backbone: str, tmp_path: Path) -> None:
    model = backbones.build(backbone)
    delta = IA3Model(model)
    randomise(delta)
    expected = backbones.run(model, backbone)
    delta.export_peft(tmp_path)
    theirs = peft.PeftModel.from_pretrained(backbones.build(backbone), tmp_path).eval()
    close(backbones.run(theirs, backbone), expected)
    fresh = backbones.build(backbone)
    AutoDeltaModel.from_peft(tmp_path, fresh)
    close(backbones.run(fresh, backbone), expected)


def test_an_input_whose_name_others_end_in(tmp_path: Path) -> None:
    """PEFT finds inputs by the bare ends of names: ``last`` would be ``at_last`` too."""
    model = nn.ModuleDict({"at_last": nn.Linear(4, 4), "last": nn.Linear(4, 4)})
    delta = IA3Model(model, ["last"], ["at_last", "last"])
    randomise(delta)
    delta.export_peft(tmp_path)
    again = nn.ModuleDict({"at_last": nn.Linear(4, 4), "last": nn.Linear(4, 4)})
    again.load_state_dict(model.state_dict(), strict=False)
    theirs = peft.PeftModel.from_pretrained(again, tmp_path).base_model.model
    x = torch.randn(2, 4)
    for name in model:
        close(theirs[name](x), model[name](x))


def test_what_peft_has_not_is_refused(tmp_path: Path) -> None:
    delta = IA3Model(nn.Sequential(nn.Conv1d(4, 4, 3)), modified_modules=["0"])
    with pytest.raises(ConfigError, match="of one dimension"):
        delta.export_peft(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# --- behaviour --------------------------------------------------------------------------------


def test_default_places() -> None:
    model = backbones.build("llama")
    delta = IA3Model(model)
    sides = {i.host_name.rpartition(".")[2]: i.side.__name__ for i in delta.insertions}
    assert sides == {
        "k_proj": "AfterDispatcher",
        "v_proj": "AfterDispatcher",
        "down_proj": "BeforeDispatcher",
    }
    widths = {len(i.module.scale) for i in delta.insertions if "down" in i.host_name}
    assert widths == {model.model.layers[0].mlp.down_proj.in_features}


@pytest.mark.parametrize("whole", [False, True])
def test_in_16_bits(whole: bool) -> None:
    model = Net().to(torch.bfloat16)
    delta = IA3Model(model, modified_modules=["lin"])
    if whole:
        delta.float()
    randomise(delta)
    (scale,) = delta.parameters()
    x = rows().to(torch.bfloat16)
    out = model(x)
    assert out.dtype == torch.bfloat16
    expected = model.lin.forward(x).float() * scale.float()
    torch.testing.assert_close(out.float(), expected, rtol=1e-2, atol=1e-2)


def test_a_sum_is_one_of_differences_from_one() -> None:
    model = Net()
    one, other = (IA3Model(model, modified_modules=["lin"]) for _ in range(2))
    randomise(one, 1), randomise(other, 2)
    made = opendelta.combine([one, other], [0.7, -0.2])
    a, b, c = (next(iter(delta.parameters())).detach() for delta in (one, other, made))
    close(c, 1 + 0.7 * (a - 1) - 0.2 * (b - 1))


# --- refusals ---------------------------------------------------------------------------------


def test_a_pattern_for_inputs_that_addresses_nothing() -> None:
    model = backbones.build("llama")
    with pytest.raises(AddressingError, match="on_input: 'down_prj'.*down_proj"):
        IA3Model(model, ["down_prj"], ["k_proj", "down_proj"])
    assert not opendelta.deltas(model)


@pytest.mark.parametrize(
    ("where", "why"), [("embed_tokens", "is an embedding"), ("act_fn", "is no linear map")]
)
def test_other_hosts_are_refused(where: str, why: str) -> None:
    model = backbones.build("llama")
    with pytest.raises(InsertionError, match=why):
        IA3Model(model, modified_modules=[where])
    assert not opendelta.deltas(model)


def test_one_half_of_a_fused_feed_forward_is_refused() -> None:
    with pytest.raises(InsertionError, match="w1 and w3 in one"):
        IA3Model(decoder("phi3"), modified_modules=["ff.w1"], common_structure=True)
