"""The engines on which a backbone may run."""

from __future__ import annotations

from opendelta.backends.bmt import require_bmtrain
from opendelta.exceptions import ConfigError

BACKENDS = ("hf", "bmt")


def check_backend(backend: str | None) -> None:
    """Refuse an engine that is not known, or cannot run here.

    Raises:
        ConfigError: naming those that are known, or what the engine lacks.
    """
    if backend not in BACKENDS:
        raise ConfigError(
            f"backend={backend!r}; expected 'hf', which serves transformers and any other torch "
            "module, or 'bmt' for BMTrain and ModelCenter."
        )
    if backend == "bmt":
        require_bmtrain()
