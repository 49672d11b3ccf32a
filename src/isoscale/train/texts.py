"""Where text comes from: the embedded corpus, files and folders, or a dataset hub.

Everything becomes a list of `Text`s, each with a name for error messages, a content hash for the cache, and a function
that reads and checks the bytes. Texts must be UTF-8 without NUL bytes; a file that is not is named with the offset.
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

from isoscale._base.errors import DataError, did_you_mean, nearest
from isoscale._base.files import sha256
from isoscale._base.optional import need

BUILTIN = {
    "austen": ("jane-austen.txt.xz", "ae4140c6e5ab543cc81f68358120258f0935ac9e27a30f44a7a564b349307867"),
    "web": ("web-bible-sword.txt.xz", "8868e15a58fee1499e2326c4187d421e9b7c5717056877db7af96387a5e33661"),
}


@dataclass(frozen=True)
class Text:
    """One text.

    Attributes:
        name: a path or `builtin:name`, for messages.
        sha256: hash of the bytes.
        read: reads and checks the bytes; raises `DataError`.
    """

    name: str
    sha256: str
    read: Callable[[], bytes]


def find_texts(source: str | Sequence[str]) -> list[Text]:
    """The texts that a source names, in order.

    Args:
        source: `builtin:austen+web` (or one of the two), `hub:<dataset>`, the path of a file or folder, or several of
            these. Folders are read with their sub-folders in sorted order; hidden and empty files are left out.

    Raises:
        DataError: a file or built-in text that does not exist (names the nearest), or no text at all.
        MissingDependencyError: a hub source without the package `datasets`.
    """
    sources = [source] if isinstance(source, str) else list(source)
    texts = [text for one in sources for text in _expand(str(one))]
    if not texts:
        raise DataError("no text", key="data", value=source, hint="builtin:austen+web, a file, or a folder of files")
    return texts


def _expand(source: str) -> Iterator[Text]:
    kind, colon, rest = source.partition(":")
    if colon and kind == "builtin":
        yield from map(_builtin, rest.split("+"))
    elif colon and kind == "hub":
        yield _hub(rest)
    else:
        path = Path(source).expanduser()
        if path.is_dir():
            files = [file for file in _walk(path) if file.stat().st_size]
            if not files:
                raise DataError("this folder holds no text", key="data", place=source)
        elif path.is_file():
            files = [path]
        else:
            raise _missing(path, source)
        for file in files:
            yield Text(str(file), _hash(file), partial(_read_file, file))


def _walk(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)
        elif entry.is_file():
            yield entry


def _missing(path: Path, source: str) -> DataError:
    names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    close = [str(path.parent / name) for name in nearest(path.name, names)]
    if close:
        hint = f"did you mean {' or '.join(close)}?"
    elif names or path.parent.is_dir():
        hint = f"nothing of a similar name in {path.parent.resolve()}; built in: builtin:austen+web"
    else:
        hint = f"the folder {path.parent} does not exist either; built in: builtin:austen+web"
    return DataError("no such file or folder", key="data", value=source, hint=hint)


def _hash(file: Path) -> str:
    try:
        return sha256(file)
    except OSError as error:
        raise DataError(f"cannot read this file: {error.strerror}", key="data", place=str(file)) from error


def _read_file(file: Path) -> bytes:
    return check_text(file.read_bytes(), str(file))


def _builtin(name: str) -> Text:
    if name not in BUILTIN:
        raise DataError("no such built-in text", key="data", value=f"builtin:{name}", hint=did_you_mean(name, BUILTIN))
    file, digest = BUILTIN[name]
    return Text(f"builtin:{name}", digest, partial(_read_builtin, file, digest))


def _read_builtin(file: str, digest: str) -> bytes:
    try:
        data = lzma.decompress((resources.files("isoscale.train") / "corpus" / file).read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise DataError("the embedded text is missing or damaged: reinstall isoscale", key=file) from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise DataError("the embedded text is not the one shipped: reinstall isoscale", key=file)
    return data


def _hub(name: str) -> Text:
    """The column `text` of the split `train` of a hub dataset, rows joined by an empty line; needs a network."""
    library = need("datasets", "hub")
    rows = library.load_dataset(name, split="train")
    if "text" not in rows.column_names:
        raise DataError(
            "this dataset has no column `text`", key="data", value=f"hub:{name}", hint=str(rows.column_names)
        )
    data = "\n\n".join(rows["text"]).encode()
    return Text(f"hub:{name}", hashlib.sha256(data).hexdigest(), lambda: check_text(data, f"hub:{name}"))


def check_text(data: bytes, place: str) -> bytes:
    """The bytes, if they are UTF-8 text.

    Raises:
        DataError: empty, a NUL byte, or not UTF-8; says which file and offset.
    """
    if not data:
        raise DataError("empty text", key="data", place=place)
    nul = data.find(b"\0")
    if nul >= 0:
        raise DataError("binary, not text: a NUL byte", key="data", place=f"{place}, byte {nul}")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        hint = "convert it to UTF-8 first, for instance with iconv"
        raise DataError("not UTF-8 text", key="data", place=f"{place}, byte {error.start}", hint=hint) from error
    return data
