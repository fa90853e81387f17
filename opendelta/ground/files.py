"""Files of a delta: which there are, reading tensors safely, writing whole files or none."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opendelta.exceptions import CheckpointError

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
SAFETENSORS_FILE = "model.safetensors"
TORCH_FILE = "pytorch_model.bin"
WEIGHT_FILES = (SAFETENSORS_FILE, TORCH_FILE)
IN_CHECKPOINT = "delta"  # the folder that `DeltaCallback` writes into a Trainer's checkpoint


def resolve_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a saved delta.

    Raises:
        CheckpointError: if there is no such folder.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    raise CheckpointError(
        f"There is no folder {str(folder)!r}. A delta is saved with "
        "`delta.save_finetuned('some_folder')` and loaded from that folder."
    )


def delta_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a saved delta: `path`, or the one that lies in this checkpoint of a Trainer.

    Raises:
        CheckpointError: if there is no such folder.
    """
    folder = resolve_folder(path)
    inside = folder / IN_CHECKPOINT
    return inside if (inside / CONFIG_FILE).is_file() and not delta_config(folder) else folder


def delta_config(folder: Path) -> dict[str, Any]:
    """The fields of the delta's config in a folder; none where there is no such config."""
    try:
        return read_config(folder) if folder.is_dir() else {}
    except CheckpointError:
        return {}


def read_config(path: str | os.PathLike[str], to_load: bool = False) -> dict[str, Any]:
    """The fields in a delta's ``config.json``.

    Args:
        path: a folder that holds it, or the file itself.
        to_load: whether the delta is to be loaded, so that errors tell what else may be done.

    Raises:
        CheckpointError: if it is missing, is not JSON, or is not a delta's config.
    """
    file = Path(path)
    if file.is_file() and file.suffix in (".safetensors", ".bin", ".pt"):
        raise CheckpointError(
            f"{file} holds weights; name its folder, {str(file.parent)!r}, which holds the "
            f"{CONFIG_FILE} too, or load weights alone with delta.load_checkpoint."
        )
    if not file.is_file():
        file = resolve_folder(path) / CONFIG_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        of_peft = (file.parent / "adapter_config.json").is_file()
        hint = " It is PEFT's: AutoDeltaModel.from_peft reads it." if of_peft else ""
        raise CheckpointError(
            f"{file.parent} holds no {CONFIG_FILE}: no delta was saved there.{hint}"
            f"{_ways_on(file.parent) if to_load else ''}"
        ) from error
    except (ValueError, RecursionError) as error:  # the latter where brackets nest too deep
        raise CheckpointError(f"{file} is not valid JSON ({error}).") from error
    if not isinstance(values, dict) or "delta_type" not in values:
        kind = values.get("model_type") if isinstance(values, dict) else None
        what = f"the config of a {kind!r} backbone" if kind else "not the config of a delta"
        raise CheckpointError(
            f"{file} is {what}: it has no 'delta_type'. Load a backbone with its own class, then "
            "its delta from the folder that save_finetuned wrote."
            f"{_ways_on(file.parent) if to_load else ''}"
        )
    return values


def _ways_on(folder: Path) -> str:
    """How to get at the delta in a folder that was written of a whole model, for a message."""
    runs = [run for run in folder.glob("checkpoint-*") if (run / IN_CHECKPOINT).is_dir()]
    if runs:
        last = max(runs, key=lambda run: (len(run.name), run.name))
        return f" The checkpoints in it hold one each: name one of them, such as {str(last)!r}."
    if not any((folder / name).is_file() for name in (*WEIGHT_FILES, "trainer_state.json")):
        return ""
    return (
        " If a Trainer or save_pretrained wrote it of a model with a delta on it, there are three "
        "ways to go on: pass delta_config=, the config of that delta, to load the tensors that "
        "lie here; or put the same delta on the model with its own class and call "
        f"delta.load_checkpoint({str(folder)!r}); or train with callbacks=[DeltaCallback(delta)], "
        f"which writes a folder {IN_CHECKPOINT!r} that can be loaded into each checkpoint."
    )


def weights_in(path: str | os.PathLike[str], preferred: str | None = None) -> Path:
    """The weights file that `path` is, or that lies in the folder `path`.

    Args:
        path: a file or folder.
        preferred: the one of `WEIGHT_FILES` to take where a folder holds both.

    Raises:
        CheckpointError: if there is none.
    """
    file = Path(path)
    if file.is_file():
        return file
    folder = resolve_folder(file)
    first = (preferred,) if preferred in WEIGHT_FILES else ()  # names in configs are no paths
    for name in (*first, *WEIGHT_FILES):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"{folder} holds neither {SAFETENSORS_FILE} nor {TORCH_FILE}.")


def read_tensors(file: Path, load_func: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """The tensors in a weights file, on the CPU.

    Args:
        file: ``.safetensors``, or any other suffix for a torch file, which is read with
            ``weights_only=True``.
        load_func: called with the file's path instead.

    Raises:
        CheckpointError: if the file is damaged, foreign, or would run code.
    """
    try:
        if load_func is not None:
            content = load_func(str(file))
        elif file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{file} is not a plain file of tensors, and reading more than tensors could run code; "
            "ask its author for a .safetensors file."
        ) from error
    except Exception as error:  # each reader has its own errors; all mean an unreadable file
        raise CheckpointError(f"{file} cannot be read as tensors: {error}") from error
    require_tensors(content, str(file))
    return dict(content)


def read_verified(folder: Path, named: str | None, sha256: str | None) -> dict[str, Tensor]:
    """The tensors in a folder whose config names their file and its sha256, or neither.

    Raises:
        CheckpointError: if the file is missing or damaged, or not the one that was saved.
    """
    file = weights_in(folder, named)
    if sha256 and sha256_of(file) != sha256:
        raise CheckpointError(
            f"{file} is not the file that was saved: its sha256 differs from the one in "
            f"{CONFIG_FILE} ({sha256[:12]}...). It was damaged or exchanged."
        )
    return read_tensors(file)


def require_tensors(content: Any, source: str) -> None:
    """Refuse what is no dict of tensors.

    Raises:
        CheckpointError: naming `source`.
    """
    if not isinstance(content, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise CheckpointError(f"{source} holds no dict of tensors, so it is not a delta's weights.")


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], save_func: Callable[..., Any] | None = None
) -> str | None:
    """Write tensors to `file`; the suffix decides the format.

    Returns:
        The file's sha256; None if `save_func` wrote nothing (as on ranks other than the first).

    Raises:
        CheckpointError: if `save_func` wrote another file.
    """
    content = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}

    def write(temporary: str) -> None:
        if save_func is not None:
            save_func(content, temporary)
        elif file.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(content, temporary, metadata={"format": "pt"})
        else:
            torch.save(content, temporary)

    return _replace(file, write)


def write_atomically(file: Path, content: bytes) -> str | None:
    """Write bytes to `file` through a temporary name; readers see the old file or the whole new."""
    return _replace(file, lambda temporary: Path(temporary).write_bytes(content) and None)


def copy_atomically(source: Path, file: Path) -> None:
    """Copy a file through a temporary name; readers see the old file or the whole new."""
    _replace(file, lambda temporary: shutil.copyfile(source, temporary))


def sha256_of(file: Path) -> str:
    """The hex sha256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while piece := stream.read(1 << 16):
            digest.update(piece)
    return digest.hexdigest()


def _replace(file: Path, write: Callable[[str], Any]) -> str | None:
    """Let `write` make a file of that name in a folder of its own, then put it in place."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as folder:
        temporary = Path(folder) / file.name
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask leaves of an ordinary file
        temporary.unlink()
        write(str(temporary))
        others = sorted(other.name for other in Path(folder).iterdir() if other != temporary)
        if others:
            raise CheckpointError(
                f"The save function was asked to write {file.name} and wrote {others[0]}."
            )
        if not temporary.exists():
            logger.info("The save function wrote nothing; %s is left as it was.", file)
            return None
        digest = sha256_of(temporary)
        temporary.chmod(mode)
        os.replace(temporary, file)
    return digest
