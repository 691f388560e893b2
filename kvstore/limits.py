"""Every limit of the project, in one place. Past a limit the caller gets a typed error."""

from __future__ import annotations

KEY_BYTES = 32
GRANULE_BYTES = 4096  # the unit in which pools are divided; a slot starts on a granule
MAX_BLOCK_BYTES = 64 << 20
MAX_CELLS = 256
MAX_KEYS_PER_CALL = 65_536
MAX_FRAME_BYTES = 8 << 20  # one message on the same-host channel
MAX_CONNECTIONS = 256
MAX_NAMESPACES = 1024
MAX_NAMESPACE_NAME_BYTES = 256
MAX_LAYOUT_BYTES = 4096
MAX_PENDING_BLOCKS = 65_536  # reserved but not yet sealed, per store
MAX_LEASED_BLOCKS_PER_CONNECTION = 65_536
MAX_DEADLINE_MS = 3_600_000
MAX_INDEX_PROBE = 128
MIN_POOL_BYTES = 1 << 20
TOUCH_BATCH = 4096
TOUCH_INTERVAL_MS = 100
RETRY_AFTER_MS = 50
