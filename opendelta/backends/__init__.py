"""The engines on which a backbone may run."""

from __future__ import annotations

from opendelta.exceptions import ConfigError

BACKENDS = ("hf",)


def check_backend(backend: str | None) -> None:
    """Refuse an engine that this version does not know.

    Raises:
        ConfigError: naming those it knows.
    """
    if backend not in BACKENDS:
        extra = " BMTrain ('bmt') is not supported yet." if backend == "bmt" else ""
        raise ConfigError(
            f"backend={backend!r}: this version knows {', '.join(map(repr, BACKENDS))}, which "
            f"serves transformers and any other torch module.{extra}"
        )
