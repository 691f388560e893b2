"""Match, get and put over shared memory, for the embedded store and the daemon's clients alike."""

from kvstore.session.base import CommandPort, Hit, Miss, NamespaceHandle, PutResult
from kvstore.session.local import LocalSession, View

__all__ = ["CommandPort", "Hit", "LocalSession", "Miss", "NamespaceHandle", "PutResult", "View"]
