"""Where the op runs: ``available()`` says what this machine has, ``use_backend(name)`` forces one, and
``explain(logits)`` says which serves a call and why."""

from rd_kernels.backends.registry import Choice, available, empty_cache, explain, use_backend

__all__ = ["Choice", "available", "empty_cache", "explain", "use_backend"]
