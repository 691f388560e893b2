"""vLLM: a tier below its host memory (`tier.py`), and a connector of its own (`connector.py`)."""
