"""The store as a cache of vLLM, SGLang and LMCache; each engine's part is a package of its own."""
