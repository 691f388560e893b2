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
MAX_TOUCHES_KEPT = 65_536  # touches a client keeps until it can report them; the rest is lost
STAGING_BYTES = 64 << 20  # a copy-in client's staging memory, unless one block is larger
TICK_MS = 100  # deadlines of blocks are rounded up to it, so that many fall due at once
MAX_TTL_MS = 30 * 86_400_000
MAX_HINT_MS = 7 * 86_400_000
MAX_PINNED_SHARE = 0.5  # of a pool's bytes: what may be pinned by hints
MAX_GRANTED_SHARE = 0.75  # of a pool's bytes: what one connection may have reserved, not sealed
# Empty slots that clients hold ahead: of one client this part of the pool (1 / 32) and no more than
# so many bytes, of all together that part.
AHEAD_SHARE = 32
MAX_AHEAD_BYTES = 32 << 20
ALL_AHEAD_SHARE = 8
HISTORY_ENTRIES = 1 << 18  # of blocks that are gone, so that `explain` can say why; a power of two
MAX_PARTS_WAIT_MS = 60_000  # a put whose other ranks never come is dropped, once nobody writes it
MAX_LOOKUPS_PER_TOUCH = 1 << 32  # counters have 63 bits on the wire
FIRST_INDEX_BLOCKS = 16_384  # what a new index is made for; it grows fourfold
MIN_SCAN = 1024  # entries that an eviction policy looks at for any call, if it has as many
MAX_POSITION = (1 << 31) - 1  # of a block in its chain
MAX_POPULATED_BYTES = 64 << 30  # of a pool whose pages a client maps ahead; 2 MiB of tables a GiB
MAX_LAYOUTS_EXPLAINED = 16  # of one name, in which `explain` looks for a key
MAX_UNREAD_BYTES = 64 << 20  # of unfinished records on the channel, of all clients of one user
NVME_WRITE_BYTES = 8 << 20  # of a batch of blocks, unless one block is larger
NVME_READ_BYTES = 4 << 20  # of one read, likewise
NVME_GATHER_MS = 100  # how long a batch waits for more blocks, unless somebody waits for it
NVME_QUEUE_SHARE = 4  # the part (1 / 4) of a pool that may wait to be written
NVME_COMING_SHARE = 4  # the part of a pool that may be filled from NVMe at one time
MAX_COMING_BYTES = 256 << 20
MAX_PREFETCHES = 64  # chains that are brought from NVMe ahead of need, of all clients together
NVME_AGAIN_SHARE = 4  # the part of a segment's blocks that are written again when it makes room
MAX_NVME_READ_ERRORS = 8  # one after another; then the volume is given up
NVME_SCRUB_MS = 50  # between two reads of the scrubber
MAX_EARLY_DROPS = 1 << 18  # keys that are dropped before all is found that lies on NVMe
MAX_FORGET_MS = 5000  # how long a drop waits to be durable; then it is answered all the same
MAX_CASTS = 16  # commands of a client whose answers it leaves unread until its next call
MAX_MEMBERS = 4096  # of a cluster
MAX_MEMBER_WEIGHT = 1024
MAX_REPLICAS = 7
MAX_PARTS_AT_ONCE = 16  # puts of some cells of blocks that a node carries out at one time
MAX_AGENT_BYTES = 64 << 10  # of what describes a transfer agent
MAX_CLUSTER_SESSIONS = 1024  # of clients and other nodes at one node
MAX_AGENT_REGIONS = 256  # memories that a transfer agent registers
TRANSFER_CLOSE_S = 5.0  # how long the end of a connection waits for the calls that are in it
STREAM_CHUNK_BYTES = 1 << 20  # of blocks' bytes in one frame of the transfer by stream
STREAM_CHUNK_PIECES = 1024  # in one such frame
STREAM_CHUNKS_AHEAD = 8  # asked for or sent, and not answered, on one connection
MAX_SHARED_MEMORIES = 16  # that an agent hands to other processes of its host
MAX_SHM_CONNECTIONS = 256  # of other processes that map what an agent shares
SHM_HELLO_S = 0.5  # until memories were asked for, and handed over; then another way is taken


def default_max_blocks(pool_bytes: int, nvme_bytes: int = 0) -> int:
    """How many blocks a pool of this size is made for: the smallest slots, up to a million; and
    on NVMe as many of 16 KiB, up to four million."""
    in_memory = min(1 << 20, max(64, pool_bytes // GRANULE_BYTES))
    return in_memory + min(1 << 22, nvme_bytes // (16 << 10))
