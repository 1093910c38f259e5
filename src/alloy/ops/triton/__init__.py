"""Triton kernels for NVIDIA GPUs of compute capability 8.0 and newer; each has a twin that `alloy.ops` calls "torch"."""
