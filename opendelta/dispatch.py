"""The import path of release 1.0 for what stands in `opendelta.mechanism.dispatch`."""

from opendelta.mechanism.dispatch import (
    ADDITIVE,
    AfterDispatcher,
    BeforeDispatcher,
    Dispatcher,
    after,
    before,
    onto,
    parallel,
)

__all__ = [
    "ADDITIVE",
    "AfterDispatcher",
    "BeforeDispatcher",
    "Dispatcher",
    "after",
    "before",
    "onto",
    "parallel",
]
