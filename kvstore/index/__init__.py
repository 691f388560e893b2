"""The shared index: one writer process, many lock-free reader processes.

`format` is the layout in memory, `table` the writer's side and `reader` the readers' side; `boards`
is where clients show blocks that the table does not have yet.
"""

from typing import TYPE_CHECKING

from kvstore.later import later

if TYPE_CHECKING:
    from kvstore.index.format import IndexView, capacity_for, index_bytes
    from kvstore.index.reader import IndexReader, Lookup, Match
    from kvstore.index.table import IndexTable
else:
    __getattr__ = later(
        __name__,
        {
            "kvstore.index.format": (
                "IndexView",
                "capacity_for",
                "index_bytes",
            ),
            "kvstore.index.reader": (
                "IndexReader",
                "Lookup",
                "Match",
            ),
            "kvstore.index.table": ("IndexTable",),
        },
    )

__all__ = [
    "IndexReader",
    "IndexTable",
    "IndexView",
    "Lookup",
    "Match",
    "capacity_for",
    "index_bytes",
]
