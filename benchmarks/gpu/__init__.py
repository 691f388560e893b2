"""Speed of the kernels on a GPU, beside others and the GPU's limits: `python -m benchmarks.gpu`."""
