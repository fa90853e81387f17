"""One process of the test of a page: its code, on the stand-in for CUDA and NCCL.

``bmt_page.py PAGE`` gives the blocks marked ``py`` the names that they speak of.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import backbones
import torch
from bmt_on_cpu import install

install()
page = Path(sys.argv[1])
ids = torch.arange(32).view(4, 8) + 5
batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 2, 1])}
other: Any = backbones.build("bert_cls")
names = {"backbone": backbones.build("bert_cls"), "data": [batch] * 3, "other_model": other}
for block in re.findall(r"^```py\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
    exec(compile(block, str(page), "exec"), names)
with torch.no_grad():
    trained, bare = names["model"].eval()(ids).logits, backbones.build("bert_cls")(ids).logits
    loaded = other(ids).logits
torch.testing.assert_close(loaded, trained, atol=1e-5, rtol=0)
assert (trained - bare).abs().max() > 1e-3
