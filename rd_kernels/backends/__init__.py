"""Where the op runs: ``available()`` says what this machine has, ``use_backend(name)`` forces one."""

from rd_kernels.backends.registry import available, empty_cache, use_backend

__all__ = ["available", "empty_cache", "use_backend"]
