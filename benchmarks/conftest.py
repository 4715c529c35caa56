"""Pytest's part: options, the order of the runs, the result file. A benchmark module states contests:

    @pytest.mark.contest(cases=CASES, peers=PEERS)
    def test_something(measure):
        measure()

Each case is run ``--repeats`` times, and each repeat runs every implementation once (a b c d, c d a b, ...), so that all
of them see the same drifts of the machine; ratios are taken within a repeat. ``quick=True`` keeps a contest in ``--quick`` runs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import machine
from benchmarks.bench import Bench, Rejected
from benchmarks.peers import Peer
from benchmarks.results import save

REPEATS, QUICK_REPEATS = 5, 3
BENCH = pytest.StashKey[Bench]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rd_kernels benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (default: cpu)")
    group.addoption(
        "--repeats",
        type=int,
        default=None,
        help=f"of every case (default: {REPEATS}, quick: {QUICK_REPEATS})",
    )
    group.addoption("--quick", action="store_true", help="only the contests marked quick")
    group.addoption("--result", type=Path, default=None, help="write the result file here")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if (mark := metafunc.definition.get_closest_marker("contest")) is None:
        return
    quick, device = metafunc.config.getoption("quick"), metafunc.config.getoption("device")
    repeats = metafunc.config.getoption("repeats") or (QUICK_REPEATS if quick else REPEATS)
    entries = [
        pytest.param((case, peer), id=f"{case.name}-{repeat}-{peer.name}")
        for case in mark.kwargs["cases"]
        for repeat in range(repeats)
        for peer in _rotated(mark.kwargs["peers"], repeat)
        if repeat == 0 or not peer.missing(device)  # who is missing is noted once
    ]
    metafunc.parametrize("measure", entries if mark.kwargs.get("quick") or not quick else [], indirect=True)


def _rotated(peers: tuple[Peer, ...], repeat: int) -> tuple[Peer, ...]:
    """a b c d e, c d e a b, e a b c d, ...: memory and caches are as the predecessor left them, so let it change."""
    start = 2 * repeat % len(peers)
    return peers[start:] + peers[:start]


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Bench:
    stash = request.config.stash
    if BENCH not in stash:
        stash[BENCH] = Bench(request.config.getoption("device"))
    return stash[BENCH]


@pytest.fixture
def measure(request: pytest.FixtureRequest, bench: Bench, benchmark) -> Callable[[], None]:
    """Time this test's implementation in this test's case, once more."""
    case, peer = request.param

    def run() -> None:
        try:
            bench.measure(benchmark, case, peer)
        except Rejected as rejected:
            if not rejected.failed:
                pytest.skip(str(rejected))
            if peer.ours:
                pytest.fail(str(rejected))
            pytest.xfail(str(rejected))

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("result")
    bench = session.config.stash.get(BENCH, None)
    if path is not None and bench is not None:
        bench.run.machine["load at the end"] = machine.load()
        save(bench.run, path)
