"""Kernels run in Triton's interpreter here, on CPU tensors; Triton reads the variable at import."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
