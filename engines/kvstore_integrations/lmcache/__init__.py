"""LMCache on the store: a tier below its server's memory, and a remote connector for engines."""
