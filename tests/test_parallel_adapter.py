"""ParallelAdapter: one module under two hosts."""

from __future__ import annotations

import threading

import backbones
import pytest
import torch
from cases import built, put, randomise

# --- threads and halves --------------------------------------------------------------------------


def test_a_parallel_adapter_serves_several_threads() -> None:
    """What one thread's forward holds back is not taken up by another's."""
    model, delta = built("ParallelAdapterModel", "bert")
    randomise(delta)
    batches = [torch.randint(1, 128, (4, 16)) for _ in range(4)]
    with torch.no_grad():
        expected = [model(ids)[0] for ids in batches]
    wrong: list[int] = []

    def run(k: int) -> None:
        with torch.no_grad():
            for _ in range(15):
                try:
                    right = torch.equal(model(batches[k])[0], expected[k])
                except Exception:
                    wrong.append(k)
                    raise
                if not right:
                    wrong.append(k)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("half", [0, 1])
def test_half_of_a_pair_is_detached_with_the_other_half(half: int) -> None:
    """A ParallelAdapter acts on both its modules or on none of them."""
    model = backbones.build("mlp")
    bare = backbones.run(model, "mlp")
    delta = put("ParallelAdapterModel", "mlp", model)
    randomise(delta)
    expected = backbones.run(model, "mlp")
    host = model.get_submodule(["first", "last.1"][half])
    delta.detach(module=host)
    assert torch.equal(backbones.run(model, "mlp"), bare)
    delta.attach(module=host)
    assert torch.equal(backbones.run(model, "mlp"), expected)
