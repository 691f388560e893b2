"""The other process of `nixl.py`: memory to write into, and where it is as a line of JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

TARGET_BYTES = 256 << 20


def agent(name: str) -> Any:
    """A NIXL agent over UCX."""
    from nixl_cu13._api import nixl_agent, nixl_agent_config

    return nixl_agent(name, nixl_agent_config(backends=["UCX"]))


def main() -> None:
    """Serves until its input ends; NIXL has a thread for that."""
    own, memory = agent("target"), np.ones(TARGET_BYTES, np.uint8)
    own.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
    metadata: bytes = own.get_agent_metadata()
    print(json.dumps({"address": memory.ctypes.data, "metadata": metadata.hex()}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
