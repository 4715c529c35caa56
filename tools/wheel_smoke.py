"""Uses the installed rd_kernels as a stranger would: no source tree, no pytest, the losses computed again in float64.

Run by check_wheel.py and by cibuildwheel, with the Python of the environment that has the wheel.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from unittest import mock

import torch

import rd_kernels as rd

GROUPS, STEP = 3, 0.5


def group_dro(logits, labels, groups):  # [N, V], [N], [N]
    """Loss, gradient and new weights in float64, from the definition: q_g exp(step m_g), normalised."""
    z = logits.detach().double()
    log_p = z - z.logsumexp(1, keepdim=True)
    onehot = torch.nn.functional.one_hot(labels.clamp(min=0), z.shape[1])
    losses = -(log_p * onehot).sum(1)
    members = [(groups == g) & (labels >= 0) for g in range(GROUPS)]
    means = torch.stack([losses[rows].mean() for rows in members])
    q = (STEP * means).exp() / (STEP * means).exp().sum()
    scale = sum(q[g] * rows / rows.sum() for g, rows in enumerate(members))
    return q @ means, (log_p.exp() - onehot) * scale[:, None], q


def check_group_dro(dtype: torch.dtype, backend: str, tolerance: float) -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(60, 1003)).to(dtype).requires_grad_()
    labels, groups = torch.randint(1003, (60,)), torch.arange(60) % GROUPS
    labels[::7] = -100
    loss_fn = rd.GroupDROLoss(GROUPS, objective=rd.GroupDRO(step_size=STEP), backend=backend)
    loss = loss_fn(logits, labels, groups)
    loss.backward()
    expected_loss, expected_gradient, expected_q = group_dro(logits, labels, groups)
    torch.testing.assert_close(loss.detach().double(), expected_loss, rtol=tolerance, atol=tolerance)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), expected_gradient, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(loss_fn.group_weights.double(), expected_q, rtol=tolerance, atol=tolerance)


def check_cpu_backend() -> None:
    assert rd.backends.available()["cpu"] is None, rd.backends.available()["cpu"]
    from rd_kernels.backends.cpu import CPUBackend

    original = CPUBackend.row_backward
    with mock.patch.object(CPUBackend, "row_backward", autospec=True, side_effect=original) as called:
        check_group_dro(torch.float32, "auto", 1e-5)
    assert called.called, "auto did not choose the native kernels"


def check_cuda(wanted: bool | None) -> str:
    """The module loads without a driver; what is missing is said, not crashed on."""
    there = importlib.util.find_spec("rd_kernels._cuda") is not None
    assert wanted is None or there == wanted, f"rd_kernels._cuda: {there}"
    if not there:
        return "no CUDA module"
    importlib.import_module("rd_kernels._cuda")
    reason = rd.backends.available()["cuda"]
    if torch.version.cuda and torch.cuda.is_available():
        assert reason is None, reason
        return "CUDA backend available"
    assert reason, "a CUDA backend without a GPU"
    assert "module" not in reason, reason
    return f"CUDA module loads; backend missing: {reason}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cuda", choices=["auto", "yes", "no"], default="auto")
    wanted = {"auto": None, "yes": True, "no": False}[parser.parse_args().cuda]

    installed = Path(rd.__file__).resolve()
    assert installed.is_relative_to(Path(sysconfig.get_path("platlib")).resolve()), (
        f"{installed} is not installed"
    )
    assert rd.__version__ == importlib.metadata.version("rd-kernels")
    info = subprocess.run(
        [sys.executable, "-I", "-m", "rd_kernels.info"], capture_output=True, text=True, check=True
    ).stdout
    assert f"rd_kernels {rd.__version__}" in info, info
    assert "auto on c" in info, info

    check_cpu_backend()
    check_group_dro(torch.float64, "reference", 1e-6)  # q is float32
    check_group_dro(torch.bfloat16, "cpu", 1e-2)
    print(
        f"Python {sys.version.split()[0]}, torch {torch.__version__}: CPU kernels right, {check_cuda(wanted)}"
    )


if __name__ == "__main__":
    main()
