"""Speed and memory beside the peers and the machine's own limits, in one run."""
