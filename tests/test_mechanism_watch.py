"""Which deltas forwards reach, and what is told of those that they do not."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from cases import METHODS
from torch import nn

import opendelta


class Bypassed(nn.Module):
    """Reads the weight of one of its linears and calls the other."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        by_name = self._modules["read"]  # as code reads it that is not looked at before
        assert isinstance(by_name, nn.Linear)
        return nn.functional.linear(self.called(x), by_name.weight)


def test_a_delta_that_the_first_forward_never_reaches_is_named_once() -> None:
    model = Bypassed()
    opendelta.LoraModel(model, modified_modules=["called", "read"], lora_r=1).freeze_module()
    with pytest.warns(opendelta.DeltaWarning, match=r"no effect on it: read\.lora\."):
        model(torch.ones(1, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(1, 3))


def test_a_delta_that_is_reached_or_detached_is_not_named() -> None:
    model = Bypassed()
    opendelta.LoraModel(model, modified_modules=["called"], lora_r=1).freeze_module()
    unreached = opendelta.LoraModel(model, modified_modules=["read"], lora_r=1)
    unreached.freeze_module()
    unreached.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.ones(1, 3))


class Layers(nn.Module):
    """Layers of which training skips as many as it is told, and one module that none calls."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Bypassed() for _ in range(count))
        self.skipped: set[int] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            if not self.training or number not in self.skipped:
                x = layer(x)
        return x


def told_in(model: nn.Module, forwards: int) -> list[str]:
    """What is told in so many forwards, one text each where something is."""
    found = []
    for number in range(forwards):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model(torch.ones(1, 3))
        found += [f"{number}: {w.message}" for w in caught]
    return found


def test_layers_that_training_skips_are_not_named() -> None:
    model = Layers()
    opendelta.LoraModel(model, modified_modules=["called"], lora_r=1).freeze_module()
    model.train().skipped = {1}
    assert told_in(model, 20) == []
    model.eval()
    assert told_in(model, 2) == []


def test_where_some_layer_runs_what_is_reached_in_none_is_named_at_once() -> None:
    model = Layers()
    opendelta.LoraModel(model, modified_modules=["called", "read"], lora_r=1).freeze_module()
    model.train().skipped = {0, 2}
    (text,) = told_in(model, 20)
    assert text.startswith("0: ") and "called.lora" not in text
    assert all(f"layers.{number}.read.lora" in text for number in range(3))
    model.eval()
    assert told_in(model, 2) == []


def test_where_all_layers_are_skipped_nothing_can_be_told_yet() -> None:
    model = Layers()
    opendelta.LoraModel(model, modified_modules=["called"], lora_r=1).freeze_module()
    model.train().skipped = {0, 1, 2}
    assert told_in(model, 3) == []
    model.skipped = {2}
    assert told_in(model, 20) == []


@pytest.mark.parametrize("training", [True, False])
def test_a_delta_that_is_never_reached_is_named_in_the_end(training: bool) -> None:
    model = Layers()
    opendelta.LoraModel(model, modified_modules=["read"], lora_r=1).freeze_module()
    model.train(training)
    (text,) = told_in(model, 20)
    assert text.startswith("6: " if training else "0: ") and "layers.0.read.lora" in text


def test_a_layer_that_evaluation_never_reaches_is_named_then() -> None:
    model = Layers()
    opendelta.LoraModel(model, modified_modules=["called"], lora_r=1).freeze_module()
    model.train().skipped = {1}
    assert told_in(model, 20) == []
    model.eval()
    model.layers = nn.ModuleList([*model.layers])
    model.forward = lambda x: model.layers[2](model.layers[0](x))  # type: ignore[method-assign]
    (text,) = told_in(model, 2)
    assert "layers.1.called.lora" in text and "layers.0" not in text


def test_what_compiled_code_calls_is_not_named() -> None:
    model = Layers(2)
    opendelta.LoraModel(model, modified_modules=["called"], lora_r=1).freeze_module()
    model.eval()
    torch._dynamo.reset()
    model.layers[0].compile(backend="eager")
    assert told_in(model, 2) == []
    torch._dynamo.reset()


WAV2VEC2 = {
    "vocab_size": 20,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}


@pytest.mark.parametrize("method", [m for m in METHODS if m != "SoftPromptModel"])
@pytest.mark.parametrize("seed", [1, 2])
def test_layerdrop_raises_no_alarm(method: str, seed: int) -> None:
    config = transformers.Wav2Vec2Config(**WAV2VEC2, layerdrop=0.6)
    model = transformers.Wav2Vec2Model(config).train()
    getattr(opendelta, method)(model).freeze_module()
    torch.manual_seed(seed)
    sound = torch.randn(2, 400)
    with warnings.catch_warnings():
        warnings.simplefilter("error", opendelta.DeltaWarning)
        for _ in range(3):
            model(sound)
        model.eval()(sound)
