"""The node process: what makes a daemon a member of a cluster, beside its core, as a client of it.

It maps the pool, so blocks go from and to other hosts without a copy in between, and it decides by
`kvstore.cluster` alone. Its death costs the node's part in the cluster, not the store on this host.
"""
