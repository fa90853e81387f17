"""DoRA against PEFT and against the weight that it stands for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import backbones
import peft
import pytest
import torch
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
    same_values,
    wave,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import opendelta
from opendelta import AutoDeltaModel, DoraModel, LoraModel
from opendelta.exceptions import CheckpointError, ConfigError, InsertionError


def theirs_of(model: nn.Module, **kwargs: Any) -> nn.Module:
    config = peft.LoraConfig(use_dora=True, target_modules=["first", "last"], **kwargs)
    return peft.get_peft_model(copy.deepcopy(model), config)


def pairs_of(delta: nn.Module, model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Our parameters beside PEFT's: A, B and the magnitude of each module."""
    ours, theirs = dict(delta.named_parameters()), []
    for name in ours:
        host, _, leaf = name.rpartition(".dora.")
        layer = model.get_submodule(f"base_model.model.{host}")
        kind = "lora_magnitude_vector" if leaf == "magnitude" else leaf
        theirs.append(getattr(layer, kind)["default"].weight)
    return list(zip(ours.values(), theirs, strict=True))


# --- numbers ----------------------------------------------------------------------------------


def test_reference_values() -> None:
    model = Net()
    delta = DoraModel(model, 2, 3, modified_modules=["lin"])
    close(delta.lin.dora.magnitude, model.lin.weight.norm(dim=1))
    for j, p in enumerate(delta.parameters()):
        fill(p, 10 * (j + 1), 0.3)
    close(model(rows())[0], torch.tensor([0.015453, -0.319927, 0.469014, 0.216177]))


KINDS = ["linear", "Conv1D", "conv2", "conv1", "conv3"]
SEEDS = [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 40))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_random_configurations_against_peft(seed: int) -> None:
    model, x = random_net(seed, KINDS)
    r, alpha = seed % 4 + 1, 2.5 * seed + 1
    ranks, alphas = {"last": seed % 3 + 1}, {"first": 4}
    theirs = theirs_of(model, r=r, lora_alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas)
    options = {"rank_pattern": ranks, "alpha_pattern": alphas}
    delta = DoraModel(model, r, alpha, modified_modules=["first", "last"], **options)
    delta.freeze_module()
    pairs = pairs_of(delta, theirs)
    for ours, other in pairs:
        assert ours.numel() == other.numel()
    same_values(pairs, seed)
    compare(model, theirs, pairs, x)


@pytest.mark.parametrize("backbone", ["bert", "gpt2", "llama"])
def test_backbones_against_peft(backbone: str) -> None:
    model = backbones.build(backbone)
    delta = DoraModel(model, lora_r=3)
    names = "|".join(i.host_name for i in delta.insertions)
    config = peft.LoraConfig(
        r=3, lora_alpha=16, use_dora=True, target_modules=names, fan_in_fan_out=backbone == "gpt2"
    )
    theirs = peft.get_peft_model(backbones.build(backbone), config).eval()
    delta.freeze_module()
    same_values(pairs_of(delta, theirs), 1)
    close(backbones.run(model, backbone), backbones.run(theirs, backbone))


def test_a_host_that_can_only_be_called() -> None:
    plain = Two(nn.Linear(300, 5), nn.Linear(5, 3))
    hosts = [Opaque(layer) for layer in plain.double().children()]
    opaque, dense = Two(*hosts), Two(*(host.dense() for host in hosts))
    theirs = theirs_of(dense, r=2, lora_alpha=3).double()
    delta = DoraModel(opaque, 2, 3, modified_modules=["first", "last"])
    delta.freeze_module()
    pairs = pairs_of(delta, theirs)
    for ours, other in pairs[2::3]:
        close(ours, other, 1e-6)  # the magnitudes, from calls of the host
    same_values(pairs, 0)
    compare(opaque, theirs, pairs, torch.randn(40, 300).double(), 1e-10)


class Shifted(nn.Module):
    """A linear whose bias is called otherwise."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.matrix, self.shift = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix.t() + self.shift


def test_a_bias_of_another_name_is_not_rescaled() -> None:
    plain = Net()
    foreign = nn.Sequential()
    foreign.lin = Shifted(copy.deepcopy(plain.lin))
    one, other = (DoraModel(model, 2, modified_modules=["lin"]) for model in (plain, foreign))
    randomise(one)
    other.load_state_dict(one.state_dict())
    close(foreign(rows()), plain(rows()))


def test_a_host_that_is_offloaded() -> None:
    model, plain = random_net(0, ["linear"])[0], random_net(0, ["linear"])[0]
    x = random_net(0, ["linear"])[1]
    accelerate.cpu_offload(model, execution_device="cpu")
    deltas = [DoraModel(m, 2, modified_modules=["first", "last"]) for m in (model, plain)]
    for ours, theirs in zip(*(delta.parameters() for delta in deltas), strict=True):
        assert ours.device.type == "cpu" and (ours.dim() > 1 or torch.equal(ours, theirs))
    randomise(deltas[0])
    deltas[1].load_state_dict(deltas[0].state_dict())
    calls = []
    model.first.forward = lambda v, f=model.first.forward: calls.append(len(v)) or f(v)
    close(model(x), plain(x))
    assert calls == [len(x), 3]  # the two rows of A and one of zeros, and no unit vectors again


# --- convolutions -----------------------------------------------------------------------------

CONVOLUTIONS = [
    (1, "zeros", 0, 1, 2),
    (2, "zeros", 2, 2, 1),
    (2, "circular", 2, 1, 2),
    (4, "reflect", 3, 3, 1),
    (1, "replicate", "same", 1, 2),
    (2, "zeros", "same", 1, 3),
    (1, "zeros", "valid", 2, 1),
]


@pytest.mark.parametrize("dimensions", [1, 2])
@pytest.mark.parametrize(("groups", "mode", "padding", "stride", "dilation"), CONVOLUTIONS)
def test_convolutions_against_their_weight(
    dimensions: int, groups: int, mode: str, padding: Any, stride: int, dilation: int
) -> None:
    torch.manual_seed(3)
    options: Any = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    layer = (nn.Conv1d, nn.Conv2d)[dimensions - 1](
        4, 8, (3, 2)[:dimensions], padding_mode=mode, **options
    )
    model = nn.Sequential(layer)
    bare = copy.deepcopy(layer)
    x = torch.randn(2, 4, *(11,) * dimensions)
    delta = DoraModel(model, 2, 3, modified_modules=["0"])
    assert torch.equal(model(x), bare(x))
    randomise(delta)
    a, b, magnitude = (p.detach().clone().requires_grad_() for p in delta.parameters())
    total = bare.weight.detach() + 1.5 * (b.flatten(1) @ a.flatten(1)).view(bare.weight.shape)
    lengths = total.flatten(1).norm(dim=1).detach()
    weight = total * (magnitude / lengths).view(-1, *(1,) * (dimensions + 1))
    expected = torch.func.functional_call(bare, {"weight": weight}, x)
    actual = model(x)
    close(actual, expected)
    expected.square().sum().backward()
    actual.square().sum().backward()
    for p, q in zip(delta.parameters(), (a, b, magnitude), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)
    close(folded(delta)(x), actual)


# --- folding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_folds_compute_the_same(seed: int) -> None:
    model, x = random_net(seed, KINDS)
    delta = DoraModel(model, 2, 3, modified_modules=["first", "last"])
    randomise(delta)
    twin = folded(delta)
    assert not list(opendelta.deltas(twin))
    close(twin(x), model(x))
    assert (model(x) - random_net(seed, KINDS)[0](x)).abs().max() > 1e-2


# --- what it reads and keeps ------------------------------------------------------------------


class Made(TorchDispatchMode):
    """Notes every tensor of at least a size that is made, less what is another view of `of`."""

    def __init__(self, size: int, of: Tensor) -> None:
        super().__init__()
        self.size, self.of = size, of.untyped_storage().data_ptr()
        self.large: list[tuple[Any, tuple[int, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            large = isinstance(tensor, Tensor) and tensor.numel() >= self.size
            if large and tensor.untyped_storage().data_ptr() != self.of:
                self.large.append((function, tuple(tensor.shape)))
        return out


def test_a_step_makes_nothing_of_the_size_of_the_weight() -> None:
    model = nn.Sequential(nn.Linear(60, 70))
    delta = DoraModel(model, modified_modules=["0"])
    delta.freeze_module()
    with Made(60 * 70, of=model[0].weight) as made:
        model(torch.randn(40, 60)).sum().backward()
    assert not made.large


def test_a_weight_that_is_loaded_later_is_the_one_that_counts() -> None:
    model, again = Two(nn.Linear(6, 5), nn.Linear(5, 4)), Two(nn.Linear(6, 5), nn.Linear(5, 4))
    x = torch.randn(3, 6)
    delta = DoraModel(model, modified_modules=["first"])
    model(x)
    model.load_state_dict(again.state_dict(), strict=False)
    other = DoraModel(again, modified_modules=["first"])
    randomise(delta)
    other.load_state_dict(delta.state_dict())
    assert not torch.equal(model(x), Two(*again.children())(torch.zeros_like(x)))
    close(model(x), again(x))


def test_a_weight_that_a_fused_optimizer_trains_is_the_one_that_counts() -> None:
    """Which writes into it without raising its version."""
    model = Net()
    delta = DoraModel(model, 2, 3, modified_modules=["lin"])
    delta.freeze_module(exclude=["deltas", "lin"])
    optimizer = torch.optim.AdamW([model.lin.weight], lr=0.1, fused=True)
    for _ in range(2):
        model(rows()).square().sum().backward()
        optimizer.step()
    weight = next(iter(delta.folds(delta.insertions[0]).values()))
    close(model(rows()), rows() @ weight.T + model.lin.bias)


def test_a_row_of_zeros_stays_its_bias() -> None:
    model = Net()
    with torch.no_grad():
        model.lin.weight[1] = 0
    delta = DoraModel(model, modified_modules=["lin"])
    assert torch.equal(model(rows()), model.lin.forward(rows()))
    randomise_b(delta)
    out = model(rows())
    assert out.isfinite().all() and torch.equal(out[:, 1], model.lin.bias[1].expand(2))
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in delta.parameters())


def randomise_b(delta: DoraModel) -> None:
    with torch.no_grad():
        delta.lin.dora.lora_B.normal_()


# --- PEFT's files -----------------------------------------------------------------------------


def trained_by_peft(seed: int, folder: Path) -> tuple[Tensor, Tensor]:
    model, x = random_net(seed, KINDS)
    theirs = theirs_of(model, r=3, lora_alpha=5, rank_pattern={"last": 2}).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn(p.shape) * p.requires_grad)
    theirs.save_pretrained(folder)
    return x, theirs(x)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_files_of_peft_both_ways(seed: int, tmp_path: Path) -> None:
    x, expected = trained_by_peft(seed, tmp_path / "theirs")
    model, _ = random_net(seed, KINDS)
    delta = AutoDeltaModel.from_peft(tmp_path / "theirs", model)
    assert type(delta) is DoraModel and delta.config.rank_pattern == {"last": 2}
    close(model(x), expected)
    delta.export_peft(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(random_net(seed, KINDS)[0], tmp_path / "ours")
    close(back(x), expected)
    ours, theirs = (load_file(tmp_path / n / FILE) for n in ("ours", "theirs"))
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}


FILE = "adapter_model.safetensors"


def test_the_newer_name_of_a_magnitude(tmp_path: Path) -> None:
    x, expected = trained_by_peft(0, tmp_path)
    tensors = load_file(tmp_path / FILE)
    old = [name for name in tensors if name.endswith("lora_magnitude_vector")]
    assert len(old) == 2
    save_file(
        {f"{n}.weight" if n in old else n: tensor for n, tensor in tensors.items()}, tmp_path / FILE
    )
    model, _ = random_net(0, KINDS)
    AutoDeltaModel.from_peft(tmp_path, model)
    close(model(x), expected)


def test_a_file_without_magnitudes_is_refused(tmp_path: Path) -> None:
    trained_by_peft(0, tmp_path)
    tensors = load_file(tmp_path / FILE)
    save_file({n: t for n, t in tensors.items() if "first.lora_mag" not in n}, tmp_path / FILE)
    model, _ = random_net(0, KINDS)
    with pytest.raises(CheckpointError, match=r"first\.dora\.magnitude"):
        AutoDeltaModel.from_peft(tmp_path, model)
    assert not opendelta.deltas(model)


# --- behaviour --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_norms_are_those_of_32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128)).to(dtype)
    exact = nn.Sequential(nn.Linear(256, 128))
    exact.load_state_dict(model.state_dict())
    delta = DoraModel(model, modified_modules=["0"])
    twin = DoraModel(exact, modified_modules=["0"])
    randomise(delta)
    twin.load_state_dict(delta.state_dict())
    layer, other = delta.get_submodule("0").dora, twin.get_submodule("0").dora
    norms, expected = layer.norms_and_bias(model[0])[0], other.norms_and_bias(exact[0])[0]
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms, expected, rtol=1e-3, atol=0)
    x = torch.randn(40, 256).to(dtype)
    out = model(x)
    assert out.dtype == dtype
    error = (out.float() - exact(x.float())).abs().max() / exact(x.float()).abs().max()
    assert error < (0.03 if dtype == torch.bfloat16 else 0.004)
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in delta.parameters())


def test_autocast_computes_norms_in_full() -> None:
    model = Net()
    delta = DoraModel(model, modified_modules=["lin"])
    randomise(delta)
    layer = delta.lin.dora
    expected = layer.norms_and_bias(model.lin)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.norms_and_bias(model.lin)[0], expected)
        assert model(rows()).dtype == torch.bfloat16


def test_dropout_acts_on_the_low_rank_path_alone() -> None:
    model = Net()
    delta = DoraModel(model, 2, lora_dropout=0.5, modified_modules=["lin"])
    model.train()
    assert torch.equal(model(rows()), model.lin.forward(rows()))
    randomise_b(delta)
    assert not torch.equal(model(rows()), model(rows()))
    model.eval()
    assert torch.equal(model(rows()), model(rows()))


# --- refusals ---------------------------------------------------------------------------------


def test_embeddings_are_refused() -> None:
    model = backbones.build("bert")
    with pytest.raises(InsertionError, match="word_embeddings.* is an embedding"):
        DoraModel(model, modified_modules=["word_embeddings"])
    assert not opendelta.deltas(model)


def test_combine_is_refused() -> None:
    model = Net()
    one, other = (DoraModel(model, modified_modules=["lin"]) for _ in range(2))
    with pytest.raises(ConfigError, match="do not add up"):
        opendelta.combine([one, other], [0.5, 0.5])
    assert opendelta.deltas(model) == [one, other]


def test_two_act_in_the_order_of_construction() -> None:
    model = Net()
    bare = copy.deepcopy(model.lin)
    lora = LoraModel(model, 2, modified_modules=["lin"])
    dora = DoraModel(model, 2, modified_modules=["lin"])
    randomise(lora, 1), randomise(dora, 2)
    total = bare.weight + lora.lin.lora.scaling * lora.lin.lora.lora_B @ lora.lin.lora.lora_A
    layer = dora.lin.dora
    update = layer.scaling * layer.lora_B @ layer.lora_A
    gain = layer.magnitude / (bare.weight + update).norm(dim=1)
    expected = (gain.unsqueeze(1) * (total + update)) @ rows().t() + bare.bias.unsqueeze(1)
    close(model(rows()), expected.t())


def test_wave_is_what_the_values_were_made_of() -> None:
    close(wave((3,), 1), 0.5 * torch.sin(torch.tensor([2.0, 5.0, 10.0])))
