"""Every Triton kernel compiles for every GPU we name, without one, keeps its values in registers, and costs no more
than the table of costs beside this file says.

The compiler runs in a process of its own: under TRITON_INTERPRET, as the other tests set it, there is none.
"""

import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from rd_kernels.backends import machine_code, triton_aot
from rd_kernels.backends.triton_aot import COST_TABLE, Cost, regressions

KERNELS = {
    "row_forward", "row_backward", "softmax_minus_onehot", "group_partials", "group_totals", "group_update", "row_scale",
    "pack_mask",
    "scale_rows", "column_partials", "column_totals", "compact_counts", "compact_places", "gather_rows", "label_logits",
    "finish_rows", "settle_tiles",
}  # fmt: skip
PRODUCTS = {
    "exponentials", "live_product", "overflow_forward", "overflow_grad_hidden", "overflow_grad_weight",
}  # fmt: skip
EVERY_TIME = ("sm_90", "gfx942")  # one of each vendor; the others take as long again and are slow
PER_TARGET = pytest.mark.parametrize(
    "target",
    [
        target if target in EVERY_TIME else pytest.param(target, marks=pytest.mark.slow)
        for target in triton_aot.TARGETS
    ],
)


def compile_all(folder, *options):
    """-> the table as printed, the costs as written."""
    report = folder / "costs.json"
    command = [sys.executable, "-m", "rd_kernels.backends.triton_aot", "--json", str(report), *options]
    environment = {**os.environ, "TRITON_INTERPRET": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert report.exists(), result.stderr
    # The exit status is the verdict of the table: see test_nothing_spills for which variant.
    costs = list(triton_aot.from_table(json.loads(report.read_text())))
    assert result.returncode == any(cost.spills or cost.stack for cost in costs), result.stderr
    return result.stdout, costs


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory):
    """For the targets of the tests that were chosen."""
    chosen = {
        item.callspec.params.get("target") for item in request.session.items if hasattr(item, "callspec")
    }
    targets = [target for target in triton_aot.TARGETS if target in chosen | set(EVERY_TIME)]
    return compile_all(tmp_path_factory.mktemp("aot"), "--target", *targets)


def assert_nothing_spills(costs):
    bad = [cost for cost in costs if cost.spills or cost.stack]
    assert not bad, "\n".join(f"{cost.target} {cost.variant}" for cost in bad)


@PER_TARGET
def test_nothing_spills(compiled, target):
    costs = [cost for cost in compiled[1] if cost.target == target]
    found = {re.match(r"\w+", cost.variant)[0] for cost in costs}
    assert found >= KERNELS | PRODUCTS
    assert ("grouped_forward" in found) == (target != "gfx942")
    assert all(cost.registers > 0 for cost in costs)
    assert_nothing_spills(costs)


@PER_TARGET
def test_16_bit_products_use_the_matrix_units(compiled, target):
    seen = set()
    for cost in compiled[1]:
        kernel = re.match(r"\w+", cost.variant)[0]
        if cost.target == target and kernel in PRODUCTS and "fp32" not in cost.variant:
            assert cost.mma > 0, cost
            seen.add(kernel)
    assert seen == PRODUCTS


@PER_TARGET
def test_long_rows_move_16_bytes_at_a_time(compiled, target):
    """Whatever V is: in bfloat16 the rows of V = 30522 begin at multiples of 4 bytes only."""
    aligned = set()
    for cost in compiled[1]:
        if cost.target == target and cost.loads:
            assert max(cost.loads) == 128, cost
            if not cost.variant.startswith(("row_forward", "grouped_forward")):
                assert max(cost.stores) == 128, cost
            aligned.add("V%16=0" in cost.variant)
    assert aligned == {True, False}


def test_costs_are_no_worse_than_the_table(compiled):
    """With another triton than the table's, what only its compiler decides (registers, shared memory, narrow accesses
    at the edges, the list of variants) is not compared."""
    table, version = json.loads(COST_TABLE.read_text()), importlib.metadata.version("triton")
    targets = {cost.target for cost in compiled[1]}
    table["costs"] = [row for row in table["costs"] if row[1] in targets]
    found = regressions(compiled[1], table, version)
    note = "" if version == table["triton"] else f" (triton {version}: only spills, stacks, widest accesses)"
    assert not found, "\n".join(
        [
            f"worse than {COST_TABLE.name}, of triton {table['triton']}{note}:",
            *found,
            f"if meant: {triton_aot.UPDATE}",
        ]
    )


def test_table_has_a_line_for_each_variant(compiled):
    table, costs = compiled
    lines = table.splitlines()
    assert len(lines) == len(costs) + 1
    printed = {(*line.split()[:4], line[line.index("  ", 70) :].split("  ")[-1]) for line in lines[1:]}
    numbers = ((str(n) for n in (cost.registers, cost.spills, cost.stack)) for cost in costs)
    assert printed == {(cost.target, *n, cost.variant) for cost, n in zip(costs, numbers, strict=True)}


COST = Cost("k(bf16)", "sm_90", 8, 64, 0, 0, 128, 4, {16: 2, 128: 4}, {128: 4})


def compare(*costs, version="1"):
    return regressions(costs, json.loads(triton_aot.to_table([COST], "1")), version)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"registers": 63}, None),
        ({"registers": 65}, "registers"),  # 3 blocks of 8 warps instead of 4
        ({"spills": 8}, "spills"),
        ({"stack": 8}, "stack"),
        ({"shared": 129}, "shared memory"),
        ({"mma": 0}, "no tensor-core instructions"),
        ({"loads": {16: 2, 64: 8}}, "narrower loads"),
        ({"loads": {16: 3, 128: 4}}, "narrower loads"),
        ({"stores": {}}, "narrower stores"),
        ({"variant": "other"}, "not in the table"),
    ],
)
def test_what_counts_as_worse(change, reason):
    found = compare(dataclasses.replace(COST, **change))
    assert len(found) == (0 if reason is None else 2 if reason == "not in the table" else 1)
    if reason is not None:
        assert any(text.startswith(reason) for text in found)
        assert "table sm_90" in found[-1]


def test_registers_that_fit_as_many_programs_are_no_worse():
    slack = dataclasses.replace(COST, registers=57)
    assert slack.resident == COST.resident == 4
    assert dataclasses.replace(COST, target="gfx942", registers=65, warps=4).resident == 7


def test_another_compiler_is_held_to_spills_stacks_and_widths_only():
    assert (
        compare(dataclasses.replace(COST, registers=200, shared=9999, loads={16: 9, 128: 1}), version="2")
        == []
    )
    assert compare(version="2") == []
    assert compare(version="1")[0].startswith("gone")
    worse = compare(dataclasses.replace(COST, stack=8, loads={64: 8}), version="2")
    assert worse[0].startswith("stack, narrower loads")


def test_update_writes_the_whole_table_only(capsys):
    with pytest.raises(SystemExit, match="2"):
        triton_aot.main(["--update", "--target", "sm_90"])
    assert "--update writes the whole table" in capsys.readouterr().err


def test_the_table_is_sorted_and_names_each_variant_once():
    rows = [(cost.target, cost.variant) for cost in triton_aot.from_table(json.loads(COST_TABLE.read_text()))]
    assert rows == sorted(set(rows))


def test_under_the_interpreter_it_says_so(monkeypatch):
    kernels = {"INTERPRETED": SimpleNamespace(value=True)}
    monkeypatch.setattr(triton_aot._Recorder, "_kernels", kernels)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        triton_aot.variants("sm_90", ["bf16"], thorough=False)


def test_unknown_target_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        triton_aot.main(["--target", "sm_70"])
    assert "sm_70" in capsys.readouterr().err


SASS = [
    "LDG.E.64 R2, desc[UR10][R2.64]",
    "@!P1 LDG.E.128 R4, desc[UR10][R8.64]",
    "LDG.E.U16 R4, desc[UR10][R8.64]",
    "STG.E desc[UR10][R2.64], R7",
    "@!P1 BRA 0x10",
    "STG.E.U8 desc[UR10][R2.64], R7",
]
AMD = [
    "\tglobal_load_dwordx2 v[2:3], v[4:5], off",
    "\tglobal_load_dwordx4 v[6:9], v[4:5], off",
    "\tbuffer_load_ushort v39, v36, s[4:7], 0 offen",
    "\tglobal_store_dword v1, v0, s[4:5]",
    "\ts_cbranch_scc0 .LBB0_1",
    "\tglobal_store_byte v1, v0, s[0:1]",
]


@pytest.mark.parametrize(("lines", "access"), [(SASS, "_nvidia_access"), (AMD, "_amd_access")])
def test_only_accesses_inside_a_loop_are_counted(lines, access):
    backward_jump = [(4, 1), (0, 5)]
    accesses = machine_code._loop_accesses(lines, backward_jump, getattr(machine_code, access))
    assert accesses == {"loads": {16: 1, 128: 1}, "stores": {32: 1}}
    everywhere = machine_code._loop_accesses(lines, [(0, 5)], getattr(machine_code, access))
    assert everywhere == {"loads": {16: 1, 64: 1, 128: 1}, "stores": {8: 1, 32: 1}}


@pytest.mark.slow
def test_every_combination_of_arguments(tmp_path):
    _, costs = compile_all(tmp_path, "--thorough", "--dtype", *triton_aot.DTYPES)
    assert len(costs) > 700
    assert_nothing_spills(costs)
