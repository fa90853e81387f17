"""Copying with a progress bar, on a terminal and for files that take a while."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import IO

_WORTH_A_BAR = 1 << 20


def copy_stream(stream: IO[bytes], target: Path, size: int) -> None:
    """Write what `stream` gives, `size` bytes, to `target`.

    The bar is the Hub client's own, so ``HF_HUB_DISABLE_PROGRESS_BARS=1`` hides it too.
    """
    from huggingface_hub.utils import tqdm

    hidden = True if size < _WORTH_A_BAR else None  # None: shown on a terminal only
    with (
        target.open("wb") as copy,
        tqdm.wrapattr(stream, "read", total=size, desc=target.name, disable=hidden) as reading,
    ):
        shutil.copyfileobj(reading, copy, 1 << 20)
