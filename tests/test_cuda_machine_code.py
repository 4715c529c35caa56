"""The CUDA module as nvcc built it, for every architecture in it: no register spills, 16-byte accesses in the hot loops."""

import os
import re
import sysconfig
from pathlib import Path

import pytest

from rd_kernels.backends.machine_code import Cost, architectures, nvidia_costs, nvidia_listings

MODULE = Path(__file__).resolve().parents[1] / "rd_kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
ARCHITECTURES = ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"]
ROW_KERNELS = {"row_forward": 24, "grouped_forward": 6, "row_backward": 12, "softmax_minus_onehot": 18}
OTHERS = {
    "group_reduce": 1,
    "group_update": 1,
    "row_scale": 1,
    "pack_mask": 1,
    "scale_rows": 3,
    "gather_rows": 3,
    "compact": 1,
}
IN_FLIGHT = 4  # pieces of a row that a thread waits for at once


def name_of(cost: Cost) -> str:
    """Of a kernel that the linker knows as _ZN...18row_forward_kernelIfLi256ELb1EE..."""
    return re.search(f"({'|'.join([*ROW_KERNELS, *OTHERS])})_kernel", cost.kernel)[1]


def complaints(cost: Cost) -> list[str]:
    """What is wrong with the machine code of a kernel that walks over rows."""
    found = []
    if cost.stack or cost.local:
        found.append(f"{cost.stack} bytes of stack, {cost.local} of local memory")
    name = name_of(cost)
    if name not in ROW_KERNELS:
        return found
    # With smoothing, class weights are read too, 4 bytes at a time, as their start is not a row's.
    smooth = name == "row_backward" and "Lb1E" in cost.kernel
    narrow = {8, 16, 64} if smooth or name == "row_forward" else {8, 16, 32, 64}
    copied = name == "softmax_minus_onehot" and "KeepE2" in cost.kernel  # by the copy engine: no loads at all
    wide = 0 if copied else IN_FLIGHT
    if narrow & set(cost.loads) or cost.loads.get(128, 0) < wide:
        found.append(f"loads of {cost.loads} bits in the loop over a row")
    if name in ("row_backward", "softmax_minus_onehot") and set(cost.stores) != {128}:
        found.append(f"stores of {cost.stores} bits in the loop over a row")
    return found


def require(architecture: str) -> str:
    """Skip if there is no nvcc, or if someone chose other architectures."""
    if not MODULE.exists():
        pytest.skip("rd_kernels._cuda was not built: there is no nvcc here (docs/building.md)")
    if architecture not in architectures(MODULE) and os.environ.get("TORCH_CUDA_ARCH_LIST"):
        pytest.skip(f"TORCH_CUDA_ARCH_LIST left {architecture} out")
    return architecture


@pytest.fixture(scope="module", params=ARCHITECTURES)
def costs(request):
    return list(nvidia_costs(MODULE, require(request.param), hot="MUFU.EX2"))


def test_newest_architecture_is_there_as_ptx_too():
    """For GPUs that do not exist yet. None of sm_103, which CUDA 13 is reported to compile wrongly."""
    if not MODULE.exists() or os.environ.get("TORCH_CUDA_ARCH_LIST"):
        pytest.skip("built for chosen architectures, or not at all")
    assert architectures(MODULE) == ARCHITECTURES
    assert architectures(MODULE, "ptx") == ["sm_120"]


def test_every_kernel_is_there(costs):
    names = [name_of(cost) for cost in costs]
    assert {name: names.count(name) for name in names} == ROW_KERNELS | OTHERS


def test_no_spills_and_wide_accesses(costs):
    bad = {cost.kernel: complaints(cost) for cost in costs if complaints(cost)}
    assert not bad


def test_enough_blocks_are_resident(costs):
    """64 registers let 1,024 threads of the row kernels share a multiprocessor."""
    assert max(cost.registers for cost in costs if name_of(cost) in ROW_KERNELS) <= 64


@pytest.mark.parametrize(("architecture", "is_there"), [("sm_80", False), ("sm_90a", True)])
def test_hopper_instructions_stand_behind_their_guards(architecture, is_there):
    """Bulk copies to shared memory, barriers of a cluster, waiting for the kernel before: nowhere else, and there."""
    listings = nvidia_listings(MODULE, require(architecture))
    by_copy_engine = [text for name, text in listings.items() if "KeepE2" in name]
    assert len(by_copy_engine) == 6
    assert all(("UBLKCP" in text) == is_there for text in by_copy_engine)
    rows = [text for name, text in listings.items() if "row_forward_kernel" in name and "Li256E" in name]
    assert len(rows) == 12
    assert all(("UCGABAR_WAIT" in text) == is_there for text in rows)
    assert all(("ACQBULK" in text) == is_there for text in listings.values())


GOOD = Cost("_ZN2rd3_cu19row_backward_kernelIfLi256ELb0EEEv", 40, 0, 0, {128: 6}, {128: 5})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"stack": 8}, "8 bytes of stack"),
        ({"local": 4}, "4 of local memory"),
        ({"loads": {64: 12}}, "loads of"),
        ({"loads": {16: 1, 128: 6}}, "loads of"),
        ({"loads": {128: 2}}, "loads of"),
        ({"stores": {32: 16, 128: 1}}, "stores of"),
    ],
)
def test_a_worse_kernel_is_noticed(change, complaint):
    found = complaints(Cost(**{**vars(GOOD), **change}))
    assert (complaint in found[0]) if complaint else not found
