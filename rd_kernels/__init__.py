"""Group-robust losses fused into one differentiable op.

Importing this imports torch, but neither triton nor the native kernels: a backend is loaded when first used.
"""

from rd_kernels import backends, functional
from rd_kernels.backends import empty_cache, use_backend
from rd_kernels.losses import CrossEntropyLoss, GroupDROLoss, LinearGroupDROLoss
from rd_kernels.objectives import ERM, Batch, ChiSquare, CVaR, GroupDRO, Objective, Update
from rd_kernels.report import GroupReport, GroupStats

__version__ = "0.1.0"

__all__ = [
    "ERM",
    "Batch",
    "CVaR",
    "ChiSquare",
    "CrossEntropyLoss",
    "GroupDRO",
    "GroupDROLoss",
    "GroupReport",
    "GroupStats",
    "LinearGroupDROLoss",
    "Objective",
    "Update",
    "backends",
    "empty_cache",
    "functional",
    "use_backend",
]
