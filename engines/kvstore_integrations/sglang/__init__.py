"""SGLang: the store below its host memory, as a storage backend of HiCache (`storage.py`)."""
