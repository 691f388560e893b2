"""Blocks on NVMe: what lies on a volume, how it is found again, and who writes it."""
