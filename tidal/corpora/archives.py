"""Reading .deb and .tar.gz archives in memory: nothing is unpacked onto the disk, installed or run.

```text
NAME.deb = ar archive   debian-binary │ control.tar.xz │ data.tar.xz
                                                          └─ the files
```
"""

from __future__ import annotations

import io
import lzma
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tidal.cli import UserError

MAGIC = b"!<arch>\n"
MOST_BYTES = 1 << 29
"""An archive whose files are larger together than this is refused: it is not one of ours."""


def files(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Names (relative, with slashes) and contents of the regular files in a .deb or .tar.gz, in its own order.

    Links, devices and folders are passed over, so nothing outside the archive is ever read.

    Raises:
        UserError: it cannot be read, is damaged, unpacks to more than `MOST_BYTES`, or holds a name that leads
            out of it (absolute, or with `..`).
    """
    room = MOST_BYTES
    try:
        with tarfile.open(fileobj=io.BytesIO(_tar(archive)), mode="r:*") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise UserError(f"{archive} holds {member.name!r}, which leads out of it; do not use this archive")
                if member.isreg():
                    room -= member.size
                    if room < 0:
                        raise UserError(f"{archive} unpacks to more than {MOST_BYTES:,} bytes; do not use this archive")
                    content = tar.extractfile(member)
                    assert content is not None  # it is a regular file
                    yield path.as_posix(), content.read()
    except (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{archive} is damaged: {error}; fetch it again") from error
    except OSError as error:
        raise UserError(f"cannot read {archive}: {error.strerror or error}; fetch it again") from error


def text(data: bytes, name: str, archive: Path, encoding: str = "utf-8") -> str:
    """The text of the file `name` of an archive. Raises UserError where it has another encoding."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{name} in {archive} is damaged, or of another encoding: {error}; fetch it again, or take the "
                        "pinned version") from error  # fmt: skip


def _tar(archive: Path) -> bytes:
    """The tar archive with the files, still compressed where tarfile can undo that."""
    data = archive.read_bytes()
    if not data.startswith(MAGIC):
        return data
    for name, content in _ar(data, archive):
        if name in ("data.tar", "data.tar.gz", "data.tar.xz", "data.tar.bz2"):
            return content
        if name == "data.tar.zst":  # Python learns zstd in 3.14
            return _dpkg_deb(archive)
    raise UserError(f"{archive} is no Debian package: it has no data.tar; fetch it again")


def _ar(data: bytes, archive: Path) -> Iterator[tuple[str, bytes]]:
    """Members of an ar archive: a header of 60 bytes (name 16, …, size 10 at 48), content, padding to even."""
    at = len(MAGIC)
    while at < len(data):
        header, at = data[at : at + 60], at + 60
        size = header[48:58].strip()
        if len(header) < 60 or header[58:] != b"`\n" or not size.isdigit() or at + int(size) > len(data):
            raise UserError(f"{archive} is damaged: it ends early, or is no ar archive; fetch it again")
        yield header[:16].decode("latin-1").strip().rstrip("/"), data[at : at + int(size)]
        at += int(size) + int(size) % 2


def _dpkg_deb(archive: Path) -> bytes:
    if shutil.which("dpkg-deb") is None:
        raise UserError(f"{archive} is compressed with zstd, for which dpkg-deb is needed; run this on Debian")
    done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise UserError(f"dpkg-deb cannot read {archive}: {said}; fetch it again")
    return done.stdout
