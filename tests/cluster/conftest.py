"""Fixtures of all tests of clusters."""

from cluster.etcd_rig import etcd, shared_etcd

__all__ = ["etcd", "shared_etcd"]
