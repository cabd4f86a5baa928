"""The file of an artefact: a zip without compression whose every byte is covered by a hash.

    manifest.json      facts, and size and sha256 of every other member
    ...                the members
    end of the zip     its comment, "effc artefact 1 sha256 <hash>", the seal

The seal is a hash of all that is between the members and of the members' own hashes, so that each
byte is hashed once and none is left out: a file that was cut, changed or added to is refused before
anything in it is read. Hashes guard against damage, not against an author: the objects in an
artefact are native code, as a shared library or a wheel is.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from effc.ir import ArtefactError

__all__ = ["BINARY", "FORMAT", "Contents", "is_artefact", "read_file", "work_folder", "write_file"]

FORMAT = 1  # raised when this effc could not read what the last one wrote, or the other way round
MANIFEST = "manifest.json"
SEAL = re.compile(rb"effc artefact (\d{4}) sha256 ([0-9a-f]{64})")
SEAL_SIZE = len(b"effc artefact 0001 sha256 ") + 64
KINDS = "cpp|cu|so|txt|py|ptx|cubin|amdgcn|hsaco"
MEMBER = re.compile(rf"(\w+\.(py|json|safetensors)|kernels/[\w.-]{{1,200}}\.({KINDS}))", re.ASCII)
BINARY = (".so", ".cubin", ".hsaco", ".safetensors")
MEMBERS = 10_000  # at most
TEXT = 64 << 20  # bytes of a text at most: texts are parsed, which takes many times their size
AGAIN = "get or save the file again"


@dataclass(frozen=True)
class Contents:
    """A file whose hashes all hold. `facts` is its manifest without those."""

    facts: dict[str, Any]
    members: dict[str, bytes]
    manifest: str  # as it is in the file


def is_artefact(path: str | os.PathLike[str]) -> bool:
    """Whether a file looks like one, by its first bytes; the rest is looked at by `read_file`."""
    try:
        with open(path, "rb") as f:
            return f.read(4) == b"PK\x03\x04"
    except OSError:
        return False


# ------------------------------------------------------------------ writing


@contextmanager
def work_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder beside `path` for what becomes part of the file; gone at the end of the block.

    Raises ArtefactError where it cannot be made, or something in it cannot be written.
    """
    target = Path(path).absolute()
    folder = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as e:
        raise ArtefactError(
            f"cannot write {path}", why=e.strerror or str(e),
            fix="name a file in a folder that exists and that you can write to",
        ) from e  # fmt: skip


def write_file(
    folder: Path,
    path: str | os.PathLike[str],
    facts: Mapping[str, Any],
    members: Mapping[str, bytes | Path],
) -> None:
    """Write in `folder`, a `work_folder`, and rename to `path`: there whole, or as it was before.

    A member is bytes or the path of a file. Raises OSError, and ArtefactError for members that
    could not be read again.
    """
    try:
        _write(folder / "artefact", facts, members)
    except _BAD_ZIP as e:
        raise ArtefactError(f"{facts.get('name', 'the model')} cannot be saved", why=str(e)) from e
    os.replace(folder / "artefact", path)


def _write(new: Path, facts: Mapping[str, Any], members: Mapping[str, bytes | Path]) -> None:
    hashes = {name: _hash_of(content) for name, content in members.items()}
    listed = {name: [size, digest.hex()] for name, (size, digest) in hashes.items()}
    manifest = _manifest(facts, listed)
    with zipfile.ZipFile(new, "w", zipfile.ZIP_STORED) as z:
        _add(z, MANIFEST, manifest, len(manifest))
        for name, content in members.items():
            _add(z, name, content, hashes[name][0])
        z.comment = b" " * SEAL_SIZE  # of the length that the seal will have
    hashes[MANIFEST] = _hash_of(manifest)
    with new.open("r+b") as f:
        spans, end = _spans(f)
        seal = _seal(f, spans, end, {name: digest for name, (_, digest) in hashes.items()})
        f.seek(end)
        f.write(b"effc artefact %04d sha256 %s" % (FORMAT, seal.encode()))


def _manifest(facts: Mapping[str, Any], members: Mapping[str, Any]) -> bytes:
    return json.dumps({**facts, "format": FORMAT, "members": members}, indent=1).encode()


def _add(z: zipfile.ZipFile, name: str, content: bytes | Path, size: int) -> None:
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))  # the same bytes whenever it is written
    info.external_attr = 0o644 << 16
    info.file_size = size
    with z.open(info, "w") as out:
        if isinstance(content, bytes):
            out.write(content)
        else:
            with content.open("rb") as file:
                shutil.copyfileobj(file, out, 1 << 20)


def _hash_of(content: bytes | Path) -> tuple[int, bytes]:
    if isinstance(content, bytes):
        return len(content), hashlib.sha256(content).digest()
    digest, size = hashlib.sha256(), 0
    with content.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return size, digest.digest()


# ------------------------------------------------------------------ reading


def read_file(path: str | os.PathLike[str]) -> Contents:
    """Everything in an artefact, checked.

    Raises ArtefactError for what is no artefact, is damaged, or is of another format.
    """
    try:
        with open(path, "rb") as f:
            return _read(f, Path(path).name)
    except OSError as e:
        raise ArtefactError(
            f"cannot read {path}", why=e.strerror or str(e), fix="check the path"
        ) from e


def _read(f: IO[bytes], name: str) -> Contents:
    sealed = _read_seal(f, name)
    try:
        spans, end = _spans(f)
    except _BAD_ZIP as e:
        raise _damaged(name, str(e) or type(e).__name__) from e
    contents = {}
    for span in spans:
        f.seek(span.start)
        contents[span.name] = f.read(span.size)
    digests = {n: hashlib.sha256(content).digest() for n, content in contents.items()}
    manifest = contents.pop(MANIFEST, b"")
    if _seal(f, spans, end, digests) != sealed:
        changed = [n for n, row in _listed(manifest).items() if not _is(row, n, contents, digests)]
        raise _damaged(name, f"{changed[0] if changed else 'it'} is not as it was written")
    listed = _listed(manifest)
    if not listed:
        raise _damaged(name, "it has no manifest")
    for n in contents.keys() | listed.keys():
        if n not in contents or not _is(listed.get(n), n, contents, digests):
            raise _damaged(name, f"its manifest and its {n} do not agree")
    facts = json.loads(manifest)
    facts.pop("members")
    return Contents(facts, contents, manifest.decode())


def _read_seal(f: IO[bytes], name: str) -> str:
    """The hash in the file's last bytes."""
    size = f.seek(0, os.SEEK_END)
    f.seek(0)
    start = f.read(4)
    f.seek(max(0, size - SEAL_SIZE))
    found = SEAL.fullmatch(f.read())
    if found is None and start != b"PK\x03\x04":
        raise ArtefactError(
            f"{name} is not an artefact of effc", fix="name a file that .save() of a compiled "
            "model wrote",
        )  # fmt: skip
    if found is None:
        raise _damaged(name, "its end is missing: it is cut off, or no artefact")
    if int(found[1]) != FORMAT:
        raise ArtefactError(
            f"{name} has format {int(found[1])}, and this effc reads format {FORMAT}",
            fix="load it with the effc that wrote it, or save it again with this one",
        )
    return found[2].decode()


# what zipfile is known to raise for bytes that are no zip
_BAD_ZIP = (
    zipfile.BadZipFile, NotImplementedError, ValueError, KeyError, IndexError, OverflowError,
    EOFError, struct.error,
)  # fmt: skip


def _damaged(name: str, why: str) -> ArtefactError:
    return ArtefactError(f"{name} is damaged", why=why, fix=AGAIN)


@dataclass(frozen=True)
class _Span:
    name: str
    start: int
    size: int


def _spans(f: IO[bytes]) -> tuple[list[_Span], int]:
    """Where the bytes of each member lie, in order, and where the seal begins.

    Raises what is in _BAD_ZIP for anything that `_write` would not have written.
    """
    end = f.seek(0, os.SEEK_END) - SEAL_SIZE
    with zipfile.ZipFile(f) as z:
        infos = sorted(z.infolist(), key=lambda i: i.header_offset)
    if len(infos) > MEMBERS:
        raise ValueError(f"{len(infos)} members, and {MEMBERS} at most are allowed")
    spans: list[_Span] = []
    position = 0
    for info in infos:
        span = _span(f, info)
        if span.start < position or span.start + span.size > end:
            raise ValueError(f"{info.filename} lies outside the file or inside another member")
        position = span.start + span.size
        spans.append(span)
    if len({s.name for s in spans}) != len(spans):
        raise ValueError("a member is there twice")
    return spans, end


def _span(f: IO[bytes], info: zipfile.ZipInfo) -> _Span:
    name, size = info.orig_filename, info.file_size
    if not MEMBER.fullmatch(name):
        raise ValueError(f"no artefact has a member called {name[:80]!r}")
    if info.compress_type != zipfile.ZIP_STORED or size != info.compress_size:
        raise ValueError(f"{name} is compressed")  # so sizes are bounded by the file's own
    if size > TEXT and not name.endswith(BINARY):
        raise ValueError(f"{name} has {size} bytes, and {TEXT} at most are allowed")
    f.seek(info.header_offset)
    header = f.read(30)
    name_size, extra_size = struct.unpack("<HH", header[26:30])
    return _Span(name, info.header_offset + 30 + name_size + extra_size, size)


def _seal(f: IO[bytes], spans: list[_Span], end: int, digests: Mapping[str, bytes]) -> str:
    """Hash of the bytes between the members and of the members' hashes, up to `end`."""
    whole = hashlib.sha256()
    position = 0
    for span in spans:
        f.seek(position)
        whole.update(f.read(span.start - position))
        whole.update(digests[span.name])
        position = span.start + span.size
    f.seek(position)
    whole.update(f.read(end - position))
    return whole.hexdigest()


def _listed(manifest: bytes) -> dict[str, Any]:
    """The manifest's rows of members; none where it cannot be read."""
    try:
        members = json.loads(manifest)["members"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return members if isinstance(members, dict) else {}


def _is(row: Any, name: str, contents: Mapping[str, bytes], digests: Mapping[str, bytes]) -> bool:
    return name in contents and row == [len(contents[name]), digests[name].hex()]
