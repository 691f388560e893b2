"""The namespaces of one store: by id, and by name and layout."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass

from kvstore import limits
from kvstore.block import header_bytes
from kvstore.errors import InvalidArgument, StaleNamespace
from kvstore.keys import namespace_key
from kvstore.layout import Layout


@dataclass(slots=True, eq=False)
class Namespace:
    """One tenant's blocks of one layout.

    lineage: the same through all generations of one name and layout. blocks: live ones.
    """

    id: int
    lineage: int
    name: str
    layout: Layout
    key: bytes
    generation: int
    header_bytes: int
    slot_bytes: int
    blocks: int = 0


class Namespaces:
    """At most `limits.MAX_NAMESPACES`; past that the longest unused empty one makes room."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._by_id: dict[int, Namespace] = {}  # in the order of their last opening
        self._next = 1

    def open(self, name: str, encoded_layout: bytes, pool_bytes: int) -> Namespace | None:
        """The namespace, made where it is new; None where all places are taken.

        `InvalidArgument` for a bad name or layout, or blocks that a pool of so many bytes
        cannot hold.
        """
        if not 0 < len(name.encode()) <= limits.MAX_NAMESPACE_NAME_BYTES or "\n" in name:
            most = limits.MAX_NAMESPACE_NAME_BYTES
            raise InvalidArgument("name", f"1 to {most} bytes in one line, please")
        layout = Layout.decode(encoded_layout)
        known = next((n for n in self if n.name == name and n.layout == layout), None)
        if known:
            self._by_id[known.id] = self._by_id.pop(known.id)
            return known
        granules = -(-(header_bytes(layout.n_cells) + layout.block_bytes) // limits.GRANULE_BYTES)
        slot_bytes = granules * limits.GRANULE_BYTES
        if slot_bytes > pool_bytes:
            raise InvalidArgument(
                "layout", f"a block takes {slot_bytes} bytes, the pool has {pool_bytes}"
            )
        if len(self._by_id) >= limits.MAX_NAMESPACES:
            return None
        key = namespace_key(self._secret, layout_fingerprint=layout.fingerprint(), name=name)
        number = self._take_id()
        made = Namespace(
            id=number,
            lineage=number,
            name=name,
            layout=layout,
            key=key,
            generation=0,
            header_bytes=header_bytes(layout.n_cells),
            slot_bytes=slot_bytes,
        )
        self._by_id[number] = made
        return made

    def get(self, number: int) -> Namespace:
        """The namespace of that id; `StaleNamespace` where there is none any more."""
        found = self._by_id.get(number)
        if found is None:
            raise StaleNamespace(f"namespace {number} was dropped or never opened: open it again")
        return found

    def known(self, number: int) -> bool:
        """Whether there is a namespace of that id."""
        return number in self._by_id

    def move_on(self, namespace: Namespace) -> None:
        """The next generation: the old id is never used again."""
        del self._by_id[namespace.id]
        namespace.id = self._take_id()
        namespace.generation += 1
        namespace.blocks = 0
        self._by_id[namespace.id] = namespace

    def close_unused(self, busy: Container[int]) -> bool:
        """Forgets the empty namespace that nobody opened for longest, and whose id is not busy;
        False where there is none."""
        unused = next((n for n in self if not n.blocks and n.id not in busy), None)
        if unused is None:
            return False
        del self._by_id[unused.id]
        return True

    def __iter__(self) -> Iterator[Namespace]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def _take_id(self) -> int:
        number = self._next
        self._next += 1
        return number
