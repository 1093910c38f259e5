"""Plain PyTorch tuned for CPU cores, with hand-written backwards; each function has a twin that `alloy.ops` calls "torch"."""
