"""The code of OpenDelta 0.3.2's documentation, block after block, as its users wrote it.

Each block stands between two comments, followed by what it must have done. The checkpoints are tiny
ones of the same names (`checkpoints.py`), and DeltaCenter is a folder. Shell commands and signatures
are left out. Repaired, because it could not run as printed:

- everywhere: indentation that was lost, lines that the page width broke, blocks that a page divides;
- 1.3: lines marked ``-`` dropped, marks ``+`` taken off; `get_dataloader` and
  `get_optimizer_loss_function`, which nobody defines, are defined here;
- 1.4.2: the adapter at another position is put on a backbone of its own;
- 1.4.5: option 2 goes on from step 4 as option 1 does, so that `model` is the trained one again;
- 1.5.1: ``Visualizaiton`` is ``Visualization``;
- 1.6.1: `delta_model` is taken from 1.5.1;
- 1.12.2: ``intermdiate`` is ``intermediate``;
- 1.15.3: ``modified_moduls`` is ``modified_modules``, JSON's quotes are double ones, and the
  ``...`` around the line are the rest of a config;
- 1.19: `some_dummy_inputs` is one;
- 1.20.1, 1.22: classes are imported, `t5` and `backbone_model` are loaded, and
  ``backbone_model=5`` is ``backbone_model=t5``.
"""

import json
import re
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import opendelta


def get_dataloader():
    ids = torch.randint(5, 100, (8, 4, 6))
    return [{"input_ids": x, "labels": x[:, 0] % 2} for x in ids]


def get_optimizer_loss_function():
    optimizer = torch.optim.AdamW(TRAINED[-1].parameters(), lr=1e-3)
    return optimizer, nn.CrossEntropyLoss()


TRAINED: list[nn.Module] = []  # whose parameters `get_optimizer_loss_function` is to train


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_1_3_quick_start(capsys):
    # ---
    from transformers import AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_pretrained("bert-large-cased")

    from opendelta import AdapterModel
    delta_model = AdapterModel(model)
    delta_model.freeze_module(exclude=["deltas", "classifier"]) # leave the delta tuning modules and the newly initialized classification head tunable.
    # delta_model.log() # optional: to visualize how the `model` changes.
    # ---
    TRAINED.append(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    # ---
    training_dataloader = get_dataloader()
    optimizer, loss_function = get_optimizer_loss_function()
    for batch in training_dataloader:
        optimizer.zero_grad()
        targets = batch.pop('labels')
        outputs = model(**batch).logits
        loss = loss_function(outputs, targets)
        loss.backward()
        optimizer.step()
        print(loss)

    delta_model.save_finetuned("finetuned_bert")
    # ---
    assert capsys.readouterr().out.count("tensor(") == 8
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trainable(model)
    assert all(".adapter." in name or name.startswith("classifier.") for name in moved)
    torch.manual_seed(5)
    fresh = AutoModelForSequenceClassification.from_pretrained("bert-large-cased")
    opendelta.AutoDeltaModel.from_finetuned("finetuned_bert", backbone_model=fresh)
    assert torch.equal(fresh(**batch).logits, model.eval()(**batch).logits)


def test_1_4_custom_usage(capsys):
    # ---
    from transformers import AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_pretrained("facebook/bart-base") # suppose we load BART

    from bigmodelvis import Visualization
    Visualization(model).structure_graph()
    # ---
    assert "fc2" in capsys.readouterr().out
    # ---
    from opendelta import AdapterModel
    delta_model = AdapterModel(backbone_model=model, modified_modules=['fc2'], bottleneck_dim=12)
    delta_model.log() # This will visualize the backbone after modification and other information.
    # ---
    assert "adapter" in capsys.readouterr().out
    assert {m.fc2.adapter.modulelist.down_proj.out_features for m in model.model.encoder.layers} == {12}
    used = model
    model = AutoModelForSequenceClassification.from_pretrained("facebook/bart-base")
    # ---
    delta_model = AdapterModel(backbone_model=model, modified_modules=['final_layer_norm'], bottleneck_dim=12)
    # ---
    assert hasattr(model.model.decoder.layers[1].final_layer_norm, "adapter")
    model, (delta_model,) = used, opendelta.deltas(used)
    # ---
    delta_model.freeze_module(exclude=["deltas", "layernorm_embedding"])
    delta_model.log()

    delta_model.freeze_module(exclude=["deltas", "layernorm_embedding"], set_state_dict=True)
    # ---
    assert all("adapter" in n or "layernorm_embedding" in n for n in trainable(model))
    assert set(model.state_dict()) == trainable(model)

    with torch.no_grad():
        for p in delta_model.parameters():
            p.normal_(std=0.3)
    ids = torch.tensor([[5, 9, 3, 2]])
    hidden = model.eval().model(ids).last_hidden_state
    trained = model
    # ---
    delta_model.save_finetuned("some_local_path/")

    from transformers import AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_pretrained("facebook/bart-base")
    from opendelta import AutoDeltaModel
    delta_model = AutoDeltaModel.from_finetuned("some_local_path/", backbone_model=model)
    # ---
    assert torch.equal(model.model(ids).last_hidden_state, hidden)
    assert trainable(model) == {name for name, _ in model.named_parameters()}  # "fully trainable"
    model = trained
    # ---
    torch.save(model.state_dict(), "some_local_path/pytorch_model.bin")

    from transformers import AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_pretrained("facebook/bart-base")
    from opendelta import AdapterModel
    delta_model = AdapterModel(backbone_model=model, modified_modules=['fc2'], bottleneck_dim=12)
    model.load_state_dict(torch.load("some_local_path/pytorch_model.bin"), strict=False)
    # ---
    assert torch.equal(model.eval().model(ids).last_hidden_state, hidden)


def test_1_5_1_auto_delta_from_a_dict_and_1_6_1_sharing(capsys):
    # ---
    from opendelta import AutoDeltaConfig, AutoDeltaModel
    from transformers import T5ForConditionalGeneration

    backbone_model = T5ForConditionalGeneration.from_pretrained("t5-base")

    config_dict = {
        "delta_type":"lora",
        "modified_modules":[
            "SelfAttention.q",
            "SelfAttention.v",
            "SelfAttention.o"
        ],
        "lora_r":4}

    delta_config = AutoDeltaConfig.from_dict(config_dict)

    delta_model = AutoDeltaModel.from_config(delta_config, backbone_model=backbone_model)

    # now visualize the modified backbone_model
    from bigmodelvis import Visualization
    Visualization(backbone_model).structure_graph()
    # ---
    assert type(delta_model) is opendelta.LoraModel
    ranks = [p.shape[0] for name, p in delta_model.named_parameters() if "lora_A" in name]
    assert ranks == [4] * (3 * 2 * 2)  # three projections, two layers, encoder and decoder
    assert "lora" in capsys.readouterr().out
    # ---
    delta_model.save_finetuned("test_delta_model", push_to_dc = True)
    # ---
    fresh = T5ForConditionalGeneration.from_pretrained("t5-base")
    assert AutoDeltaModel.from_finetuned("t5-base_lora", backbone_model=fresh).lora_r == 4


def test_1_5_2_and_1_6_2_a_delta_of_delta_center(capsys):
    # ---
    # use tranformers as usual.
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    t5 = AutoModelForSeq2SeqLM.from_pretrained("t5-large")
    t5_tokenizer = AutoTokenizer.from_pretrained("t5-large")
    # A running example
    inputs_ids = t5_tokenizer.encode("Is Harry Poter wrtten by JKrowling", return_tensors="pt")
    t5_tokenizer.decode(t5.generate(inputs_ids)[0])
    # >>> '<pad><extra_id_0>? Is it Harry Potter?</s>'
    # ---
    assert "Potter" not in t5_tokenizer.decode(t5.generate(inputs_ids)[0])
    # ---
    # use existing delta models
    from opendelta import AutoDeltaModel, AutoDeltaConfig
    # use existing delta models from DeltaCenter
    delta = AutoDeltaModel.from_finetuned("thunlp/Spelling_Correction_T5_LRAdapter_demo", backbone_model=t5)
    # freeze the whole backbone model except the delta models.
    delta.freeze_module()
    # visualize the change
    delta.log()

    t5_tokenizer.decode(t5.generate(inputs_ids)[0])
    # >>> <pad> Is Harry Potter written by JK Rowling?</s>
    # ---
    corrected = t5_tokenizer.decode(t5.generate(inputs_ids)[0])
    assert corrected == "<pad> Is Harry Potter written by JK Rowling ? </s>"
    assert "low_rank_adapter" in capsys.readouterr().out
    assert trainable(t5) and all("low_rank_adapter" in name for name in trainable(t5))


def test_1_7_composition(capsys):
    # ---
    from transformers import AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_pretrained("roberta-base")
    from opendelta import LoraModel, AdapterModel
    delta_model = LoraModel(backbone_model=model, modified_modules=['key'], lora_r=1)
    delta_model2 = AdapterModel(backbone_model=model, modified_modules=['output'], bottleneck_dim=12)
    delta_model.log()
    # ---
    layer = model.roberta.encoder.layer[0]
    assert hasattr(layer.attention.self.key, "lora")
    assert hasattr(layer.output, "adapter") and hasattr(layer.attention.output, "adapter")
    # ---
    from transformers import AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_pretrained("facebook/bart-base")
    from opendelta import AdapterModel, LowRankAdapterModel
    delta_model = AdapterModel(backbone_model=model, modified_modules=['fc2'])
    delta_model2 = AdapterModel(backbone_model=model, modified_modules=['fc2'], bottleneck_dim=12)
    delta_model3 = LowRankAdapterModel(backbone_model=model, modified_modules=['fc2'], reduction_factor=12)
    delta_model.log()
    # ---
    fc2 = model.model.encoder.layers[0].fc2
    assert [n for n, _ in fc2.named_children()] == ["adapter", "adapter_1", "low_rank_adapter"]
    calls = []
    for name, delta in fc2.named_children():
        delta.register_forward_hook(lambda *_, name=name: calls.append(name))
    fc2(torch.zeros(1, fc2.in_features))
    assert calls == ["adapter", "adapter_1", "low_rank_adapter"]


def test_1_8_multitask(capsys):
    ids = torch.tensor([[5, 9, 3, 2]])

    def filled(delta):
        torch.manual_seed(len(delta.delta_type))
        for p in delta.parameters():
            nn.init.normal_(p, std=0.3)

    def logits():
        return model.eval()(ids).logits.detach()

    # ---
    from transformers import AutoModelForSequenceClassification
    model = AutoModelForSequenceClassification.from_pretrained("facebook/bart-base")
    from opendelta import LoraModel
    delta_model = LoraModel(backbone_model=model, modified_modules=['fc2'])
    delta_model.log()
    # ---
    assert "lora" in capsys.readouterr().out
    filled(delta_model)
    with_lora = logits()
    # ---
    delta_model.detach()
    delta_model.log()
    # ---
    assert "lora" not in capsys.readouterr().out
    bare = logits()
    assert not torch.equal(bare, with_lora)
    # ---
    delta_model.attach()
    delta_model.log()
    # ---
    assert "lora" in capsys.readouterr().out
    assert torch.equal(logits(), with_lora)
    # ---
    # continue from the above example
    from opendelta import AdapterModel
    delta_model2 = AdapterModel(backbone_model=model, modified_modules=['fc1'])
    delta_model2.log()
    # ---
    filled(delta_model2)
    assert not torch.equal(logits(), with_lora)
    # ---
    delta_model.detach() # detach the lora delta
    delta_model.log()
    # ---
    assert not torch.equal(logits(), bare) and not torch.equal(logits(), with_lora)
    # ---
    delta_model2.detach() # detach the adapter delta
    delta_model.attach() # reattach the lora delta
    delta_model.log()
    # ---
    assert torch.equal(logits(), with_lora)
    delta_model.detach()
    assert torch.equal(logits(), bare)


def test_1_12_visualize(capsys):
    # ---
    from transformers import BertForMaskedLM
    backbone_model = BertForMaskedLM.from_pretrained("bert-base-uncased")
    print(backbone_model)

    from bigmodelvis import Visualization
    model_vis = Visualization(backbone_model)
    model_vis.structure_graph()
    # ---
    assert "word_embeddings" in capsys.readouterr().out
    # ---
    print(backbone_model.bert.encoder.layer[0].intermediate)
    # ---
    assert "BertIntermediate" in capsys.readouterr().out
    # ---
    from opendelta import LowRankAdapterModel
    delta_model = LowRankAdapterModel(backbone_model)
    delta_model.freeze_module(exclude=["cls", "intermediate", "LayerNorm"])
    Visualization(backbone_model).structure_graph()
    # ---
    assert "low_rank_adapter" in capsys.readouterr().out
    named = ("cls.", ".intermediate.", ".LayerNorm.")
    tied = {"bert.embeddings.word_embeddings.weight"}  # the weight of cls.predictions.decoder
    assert {n for n in trainable(backbone_model) if not any(x in n for x in named)} <= tied
    # ---
    Visualization(backbone_model).structure_graph(keep_non_params=True)
    # ---
    assert "dropout" in capsys.readouterr().out
    opendelta.Visualization(backbone_model).structure_graph()  # scripts of 0.3.2 use ours as well
    assert "low_rank_adapter" in capsys.readouterr().out


def test_1_14_3_pseudo_input():
    # ---
    pseudo_input = torch.tensor([[0,0,0]])
    # or
    pseudo_input = torch.tensor([0,0,0])
    # ---
    root = toy_net()
    opendelta.AdapterModel(root, modified_modules=["name_b"])  # a Sequential: no width to be read
    assert root(pseudo_input).shape == (3, 5)


def toy_net():
    # ---
    import torch.nn as nn
    class MyNet1(nn.Module):
        def __init__(self,):
            super().__init__()
            self.name_a = nn.Linear(5,5)
        def forward(self, hiddens):
            return self.name_a(hiddens)

    class MyNet2(nn.Module):
        def __init__(self,):
            super().__init__()
            self.embedding = nn.Embedding(10,5)
            self.name_b = nn.Sequential(MyNet1(), MyNet1())
        def forward(self, input_ids):
            hiddens = self.embedding(input_ids)
            return self.name_b(hiddens)

    root = MyNet2()
    print(root.name_b[0].name_a)
    # Linear(in_features=5, out_features=5, bias=True)
    # ---
    return root


def test_1_15_1_name_of_a_submodule(capsys):
    root = toy_net()
    assert capsys.readouterr().out == "Linear(in_features=5, out_features=5, bias=True)\n"
    # ---
    from bigmodelvis import Visualization
    Visualization(root).structure_graph()
    # ---
    assert "adapter" not in capsys.readouterr().out
    # ---
    from opendelta import AdapterModel
    AdapterModel(backbone_model=root, modified_modules=['name_b.0.name_a'])
    Visualization(root).structure_graph()
    # ---
    assert "adapter" in capsys.readouterr().out
    assert hasattr(root.name_b[0].name_a, "adapter") and not hasattr(root.name_b[1].name_a, "adapter")
    assert root(torch.tensor([[1, 2, 3]])).shape == (1, 3, 5)


def test_1_15_3_patterns():
    from transformers import AutoModelForSequenceClassification

    def modified(pattern):
        model = AutoModelForSequenceClassification.from_pretrained("roberta-base")
        opendelta.AdapterModel(model, modified_modules=[pattern])
        hosts = (name for name, module in model.named_modules() if hasattr(module, "adapter"))
        return [name.removeprefix("roberta.encoder.layer.") for name in hosts]

    # ---
    suffix = r'[r](\d)+\.output.dense'
    layers = r'[r][0-5]\.attention'
    ordinary = 'attention.output.dense'
    # ---
    assert modified(suffix) == [f"{i}.output.dense" for i in range(3)]
    assert modified(layers) == [f"{i}.attention" for i in range(3)]
    assert modified(ordinary) == [f"{i}.attention.output.dense" for i in range(3)]

    config = opendelta.AutoDeltaConfig.from_dict(json.loads(r"""
    {
        "delta_type": "adapter",
        "modified_modules": ["[r][0-5]\\.attention"],
        "bottleneck_dim": 12
    }
    """))
    assert config.modified_modules == [layers]


def clicking(names, read: Callable[[], str]):
    """Submit a selection of `names` on the page whose link shows up in what `read` returns."""
    printed, deadline = "", time.monotonic() + 20
    while "?token=" not in printed:
        assert time.monotonic() < deadline
        time.sleep(0.01)
        printed += read()
    link = next(line for line in printed.splitlines() if "?token=" in line)
    request = urllib.request.Request(
        link.replace("/?", "/submit?"),
        data=json.dumps({"names": names}).encode(),
        headers={"Content-Type": "application/json"},
    )
    urllib.request.urlopen(request).close()


def test_1_15_3_interactive_selection(capsys):
    names = [f"bert.encoder.layer.{i}.output.dense" for i in range(3)]
    with ThreadPoolExecutor() as pool:
        user = pool.submit(clicking, names, lambda: capsys.readouterr().out)
        # ---
        from transformers import BertForMaskedLM
        model = BertForMaskedLM.from_pretrained("bert-base-cased")
        # suppose we load BERT

        from opendelta import LoraModel # use lora as an example, others are same
        delta_model = LoraModel(backbone_model=model, interactive_modify=True)
        # ---
        user.result()
    assert capsys.readouterr().out.startswith(f"modified_modules:\n[{', '.join(names)}]\n")
    assert [name for name, module in model.named_modules() if hasattr(module, "lora")] == names


def test_1_16_2_common_structure(capsys):
    # ---
    mapping = {
        "bert.embeddings.word_embeddings": {"__name__":"embeddings"},
        "bert.embeddings.position_embeddings": {"__name__":""},
        "bert.embeddings.token_type_embeddings": {"__name__":""},
        "bert.embeddings.LayerNorm": {"__name__":""},
        "bert.encoder": {"__name__":"encoder",
            "layer": {"__name__":"block",
                "$": {"__name__":"$",
                    "attention": {"__name__":"attn",
                        "self.query": {"__name__":"q"},
                        "self.key": {"__name__":"k"},
                        "self.value": {"__name__":"v"},
                        "output.dense": {"__name__":"proj"},
                        "output.LayerNorm": {"__name__":"layer_norm"},
                    },
                    "output": {"__name__":"ff",
                        "dense": {"__name__":"w2"},
                        "LayerNorm": {"__name__":"layer_norm"}
                    },
                    "intermediate.dense": {"__name__":"ff.w1"},
                }
            }
        },
        "cls.predictions": {"__name__": "lm_head",
            "transform.dense": {"__name__":""},
            "transform.LayerNorm": {"__name__":""},
            "decoder": {"__name__":"proj"},
        }
    }
    # ---
    from transformers import BertForMaskedLM

    from opendelta import CommonStructureMap, Visualization

    model = BertForMaskedLM.from_pretrained("bert-base-cased")
    common = CommonStructureMap(model)
    assert common.transform("bert.encoder.layer.2.attention.self.query") == "bert.encoder.block.2.attn.q"
    assert common.transform("bert.encoder.layer.0.intermediate.dense") == "bert.encoder.block.0.ff.w1"
    capsys.readouterr()
    Visualization(model).structure_graph(common_structure=True, mapping=mapping, only_common=True)
    drawn = re.findall(r"── (\S+) \(", capsys.readouterr().out)
    attention, feed_forward = "attn q k v proj layer_norm", "ff w1 w2 layer_norm"
    assert drawn == f"embeddings encoder block {attention} {feed_forward} lm_head proj".split()


def test_1_19_dummy_inputs():
    backbone_model = toy_net()
    some_dummy_inputs = {"input_ids": torch.tensor([[1, 2]])}
    seen = []
    backbone_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    # ---
    setattr(backbone_model, 'dummy_inputs', some_dummy_inputs)
    # ---
    opendelta.AdapterModel(backbone_model, modified_modules=["name_b"])
    assert [ids.tolist() for ids in seen] == [[[1, 2]]]


def test_1_20_1_and_1_22_configs_and_auto_classes():
    from transformers import AutoModelForSeq2SeqLM
    t5 = AutoModelForSeq2SeqLM.from_pretrained("t5-large")
    backbone_model = AutoModelForSeq2SeqLM.from_pretrained("t5-base")
    from opendelta import AdapterConfig, AutoDeltaConfig, AutoDeltaModel
    # ---
    delta_config = AdapterConfig.from_finetuned("thunlp/FactQA_T5-large_Adapter", backbone_model=t5)
    # ---
    assert type(delta_config) is AdapterConfig and delta_config.bottleneck_dim == 24
    # ---
    config = AutoDeltaConfig.from_dict({"delta_type":"lora"}) # This will load the dault lora config.
    # ---
    assert (type(config), config.lora_r) == (opendelta.LoraConfig, 8)
    # ---
    config = AutoDeltaConfig.from_dict({"delta_type":"lora", "lora_r":5}) # Will load the default lora config, with lora_r = 5
    # ---
    assert config.lora_r == 5
    # ---
    from transformers import AutoConfig
    delta_config = AutoDeltaConfig.from_finetuned("thunlp/FactQA_T5-large_Adapter")
    # ---
    assert type(delta_config) is AdapterConfig
    # ---
    config = AutoDeltaConfig.from_finetuned("DeltaHub/lora_t5-base_mrpc")
    delta_model = AutoDeltaModel.from_config(config, backbone_model)
    # ---
    assert type(delta_model) is opendelta.LoraModel
    fresh = {p.abs().sum().item() for n, p in delta_model.named_parameters() if "lora_B" in n}
    assert fresh == {0.0}  # "will not load the finetuned weight file"
    # ---
    delta_model = AutoDeltaModel.from_finetuned("thunlp/FactQA_T5-large_Adapter", backbone_model=t5)
    # ---
    assert type(delta_model) is opendelta.AdapterModel and opendelta.deltas(t5) == [delta_model]


# Where 0.3.2 kept what sections 1.20 to 1.23 describe.
PLACES = {
    "opendelta.auto_delta": "AutoDeltaConfig AutoDeltaModel",
    "opendelta.basemodel": "DeltaBase",
    "opendelta.delta_configs": "BaseDeltaConfig",
    "opendelta.delta_models.adapter": "AdapterConfig AdapterModel",
    "opendelta.delta_models.bitfit": "BitFitConfig BitFitModel",
    "opendelta.delta_models.compacter": "CompacterConfig CompacterModel",
    "opendelta.delta_models.lora": "LoraConfig LoraModel",
    "opendelta.delta_models.low_rank_adapter": "LowRankAdapterConfig LowRankAdapterModel",
    "opendelta.delta_models.parallel_adapter": "ParallelAdapterConfig ParallelAdapterModel",
    "opendelta.delta_models.prefix": "PrefixConfig PrefixModel",
    "opendelta.delta_models.soft_prompt": "SoftPromptConfig SoftPromptModel",
    "opendelta.utils.inspect": "inspect_module_statistics inspect_optimizer_statistics",
    "opendelta.utils.model_md5": "gen_model_hash gen_parameter_hash",
    "opendelta.utils.name_based_addressing": (
        "endswith_in_normal endswith_in_regex is_child_key superstring_in"
    ),
    "opendelta.utils.saving_loading_utils": "SaveLoadMixin",
    "opendelta.utils.signature": "get_arg_names get_arg_names_inside_func signature",
    "opendelta.utils.structure_mapping": "CommonStructureMap",
    "opendelta.utils.visualization": "Visualization",
}


@pytest.mark.parametrize("module", PLACES)
def test_imports_from_their_old_places(module):
    namespace: dict[str, object] = {}
    exec(f"from {module} import {', '.join(PLACES[module].split())}", namespace)
    for name in set(PLACES[module].split()) & set(opendelta.__all__):
        assert namespace[name] is getattr(opendelta, name)
