"""Where the op runs: ``available()`` says what this machine has, ``use_backend(name)`` forces one."""

from rd_kernels.backends.registry import available, use_backend

__all__ = ["available", "use_backend"]
