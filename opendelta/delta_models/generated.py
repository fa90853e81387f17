"""Deltas whose values a network generates while they are trained, saved without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opendelta.basemodel import DeltaBase
from opendelta.exceptions import ConfigError


class Generated(DeltaBase):
    """Base of the methods whose values may come from a network.

    Files hold what it generates, or, for further training, the network.
    """

    _saves_network = False

    def save_finetuned(
        self, *args: Any, keep_reparameterization: bool = False, **kwargs: Any
    ) -> None:
        """Save the delta, see `DeltaBase.save_finetuned`.

        Args:
            keep_reparameterization: save the network that generates the delta's values, for
                further training, instead of the values.

        Raises:
            ConfigError: to keep a network where there is none.
        """
        with self._saving_network(keep_reparameterization):
            super().save_finetuned(*args, **kwargs)

    def save_checkpoint(
        self, *args: Any, keep_reparameterization: bool = False, **kwargs: Any
    ) -> None:
        """Save the weights alone, see `DeltaBase.save_checkpoint`.

        Args:
            keep_reparameterization: as in `save_finetuned`.
        """
        with self._saving_network(keep_reparameterization):
            super().save_checkpoint(*args, **kwargs)

    @contextmanager
    def _saving_network(self, wanted: bool) -> Iterator[None]:
        if wanted and not self.reparameterize:
            raise ConfigError(
                f"keep_reparameterization=True: no network generates this {type(self).__name__} "
                "(any more); its values are what there is to be saved."
            )
        self._saves_network = wanted
        try:
            yield
        finally:
            self._saves_network = False
