"""Rows of Parquet files and of Hugging Face datasets; both need packages of the extra `data`."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from tidal.cli import UserError

KEYS = ("text", "prompt", "completion")
ROWS = 1024
"""Rows of a Parquet file held at once."""


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file, only those of its columns that are in KEYS; its first six columns if none is.

    Raises:
        UserError: pyarrow is not installed, or the file cannot be read.
    """
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        _missing(str(path), "pyarrow")
    try:
        with ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            for batch in file.iter_batches(ROWS, columns=[name for name in names if name in KEYS] or names[:6]):
                yield from batch.to_pylist()
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's errors are such
        raise UserError(f"cannot read {path}: {error}; check the file") from error


def hugging_face_rows(name: str) -> Iterator[dict[str, Any]]:
    """Stream `hf:DATASET[@CONFIGURATION][:SPLIT[:ROWS]]`, by default all of `train`, without storing it.

        hf:roneneldan/TinyStories        hf:HuggingFaceFW/fineweb@sample-10BT:train:100000

    It must come in the same order each time: preparing reads it more than once.

    Raises:
        UserError: datasets is not installed, a number of rows that is none, or what cannot be fetched.
    """
    dataset, _, rest = name.removeprefix("hf:").partition(":")
    split, _, count = rest.partition(":")
    dataset, _, configuration = dataset.partition("@")
    if not dataset or not (count.isdecimal() or not count):
        raise UserError(f"{name!r} is no dataset; write hf:DATASET, or hf:DATASET@CONFIGURATION:SPLIT:ROWS")
    try:
        from datasets import load_dataset
    except ImportError:
        _missing(name, "datasets")
    try:
        rows = load_dataset(dataset, configuration or None, split=split or "train", streaming=True)
        yield from islice(rows, int(count) if count else None)
    # not found, no connection; no such configuration or split; a dataset that is a script
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot fetch {name}: {error}; check the name and the connection") from error


def _missing(what: str, package: str) -> NoReturn:
    raise UserError(f'{what} needs {package}: pip install -e ".[data]"') from None
