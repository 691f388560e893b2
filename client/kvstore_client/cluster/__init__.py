"""A client of many nodes: `ClusterSession`, which looks to its user as one store does."""
