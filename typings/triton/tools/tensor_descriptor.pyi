# Kernels are a language of their own, which Python's types do not describe: everything of Triton's is Any.
from typing import Any

def __getattr__(name: str) -> Any: ...
