"""The public protocol of kvstore. Each version of it is a package of its own."""
