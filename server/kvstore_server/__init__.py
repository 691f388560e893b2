"""The daemon: `kvstore-server`."""
