"""Text to learn from: Python's standard library, a local file, or any dataset `datasets` can load.

Whatever the source, the result is a :class:`Corpus`: rows of text to train on and rows held out.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, load_dataset

HELD_OUT_PERCENT = 5
# Vendored, generated or tabular sources: little of them reads like a program somebody wrote.
SKIPPED_FOLDERS = frozenset(
    ["site-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "__pycache__"]
)
BUILDERS = {
    ".txt": "text",
    ".md": "text",
    ".py": "text",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Corpus:
    """Text to train on and text held out.

    Attributes:
        train: rows to train on, text in ``column``.
        held_out: rows no worker trains on.
        column: name of the column of strings.
        rows_are_documents: True if a row is a whole document and so ends with the end-of-text token;
            False for plain text files, where a row is a line and the text simply goes on.
    """

    train: Dataset
    held_out: Dataset
    column: str
    rows_are_documents: bool


def load_corpus(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    text_column: str = "text",
) -> Corpus:
    """Load the corpus the options name, the standard library if they name none.

    Raises:
        ValueError: the options contradict each other, a file has an unknown extension or is empty, the
            text column is missing, or there is no text to train on or to hold out.
        FileNotFoundError: a file or a dataset does not exist.
    """
    if train_file and dataset_name:
        raise ValueError("--train_file and --dataset_name are two sources of text: give one of them.")
    if validation_file and not train_file:
        raise ValueError("--validation_file goes with --train_file: give that too.")
    documents = True
    if dataset_name:
        train, held_out = from_hub(dataset_name, dataset_config_name)
    elif train_file:
        train, held_out = _from_files(train_file, validation_file)
        documents = not _is_plain_text(train_file)
    else:
        train, held_out = from_folder(Path(sysconfig.get_paths()["stdlib"]))
    for name, rows in (("training", train), ("held-out", held_out)):
        _check_column(rows, text_column, name)
    return Corpus(train, held_out, text_column, documents)


def from_folder(root: Path) -> tuple[Dataset, Dataset]:
    """Every Python source under `root`, one row a file, split into (training, held-out) by file name.

    Raises:
        ValueError: no Python source there.
    """
    kept: dict[bool, list[str]] = {False: [], True: []}
    for path in python_sources(root):
        text = path.read_text(encoding="utf-8", errors="replace")
        kept[is_held_out(path.relative_to(root).as_posix())].append(text)
    if not kept[False]:
        raise ValueError(f"No Python source under {root}: name a text with --train_file or --dataset_name.")
    return Dataset.from_dict({"text": kept[False]}), Dataset.from_dict({"text": kept[True]})


def python_sources(root: Path) -> Iterator[Path]:
    """The ``*.py`` files under `root` in sorted order, the skipped folders left out."""
    for folder, subfolders, files in os.walk(root):
        # Trimming in place keeps os.walk out of site-packages, which can be far larger than the rest.
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def is_held_out(name: str) -> bool:
    """Whether the file `name` is held out: about 5 in 100 are, the same ones on every machine."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT


def from_hub(name: str, config: str | None) -> tuple[Dataset, Dataset]:
    """A dataset from the Hub or from a local folder, as (training, held-out) rows."""
    splits = load_dataset(name, config)
    if "train" not in splits:
        raise ValueError(f"{name} has no split called 'train', only {', '.join(splits)}: name another dataset.")
    for other in ("validation", "test"):
        if other in splits:
            return splits["train"], splits[other]
    return _hold_out_last(splits["train"])


def _from_files(train_file: str, validation_file: str | None) -> tuple[Dataset, Dataset]:
    """Local files as (training, held-out) rows; without a validation file the last rows are held out."""
    train = _from_file(train_file)
    if validation_file is None:
        return _hold_out_last(train)
    held_out = _from_file(validation_file)
    if _is_plain_text(train_file) != _is_plain_text(validation_file):
        raise ValueError(f"One of {train_file} and {validation_file} has rows, the other lines: convert one of them.")
    return train, held_out


def _is_plain_text(name: str) -> bool:
    return BUILDERS[Path(name).suffix.lower()] == "text"


def _from_file(name: str) -> Dataset:
    path = Path(name)
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise ValueError(f"Unknown extension '{path.suffix}' of {path}: use one of {', '.join(BUILDERS)}.")
    if not path.is_file():
        raise FileNotFoundError(f"No such file: {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: name a file with some text in it.")
    # Lines keep their breaks, so that joining the rows gives the file back.
    options = {"keep_linebreaks": True, "encoding_errors": "replace"} if builder == "text" else {}
    return load_dataset(builder, data_files=str(path), split="train", **options)


def _hold_out_last(rows: Dataset) -> tuple[Dataset, Dataset]:
    """Split off the last rows: neighbouring rows resemble each other, so random ones would leak."""
    count = max(1, len(rows) * HELD_OUT_PERCENT // 100)
    if len(rows) <= count:
        raise ValueError(
            f"No held-out text: the corpus has {len(rows)} row(s), too few to split. "
            "Give --validation_file, or a dataset with a validation split."
        )
    cut = len(rows) - count
    return rows.select(range(cut)), rows.select(range(cut, len(rows)))


def _check_column(rows: Dataset, column: str, name: str) -> None:
    if not len(rows):
        raise ValueError(f"There are no {name} rows in the corpus: name another with --train_file.")
    if column not in rows.column_names:
        raise ValueError(f"No column '{column}': choose --text_column from {', '.join(rows.column_names)}.")
    kind = getattr(rows.features[column], "dtype", "nested")
    if kind not in ("string", "large_string"):
        raise ValueError(f"Column '{column}' holds {kind} values, not text: choose another --text_column.")
