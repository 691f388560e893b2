"""Thin CPU inference engines that keep their KV cache in pages the store can fill directly."""
