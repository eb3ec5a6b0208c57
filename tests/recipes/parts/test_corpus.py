"""Where the text comes from: sources, splits, and what is refused."""

import json

import pytest
from datasets import Dataset

from recipes.parts.corpus import from_folder, is_held_out, load_corpus, python_sources


@pytest.fixture
def folder(tmp_path):
    """A source tree whose every file says its own name."""
    for name in [f"package/module_{i}.py" for i in range(200)] + ["test/test_it.py", "site-packages/other.py", "a.txt"]:
        file = tmp_path / "tree" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    return tmp_path / "tree"


def test_the_standard_library_is_the_default():
    corpus = load_corpus()
    characters = sum(map(len, corpus.train["text"]))
    assert characters > 5_000_000
    assert corpus.rows_are_documents
    assert 0.01 < len(corpus.held_out) / len(corpus.train) < 0.1
    assert not set(corpus.train["text"]) & (set(corpus.held_out["text"]) - {""})
    assert any("class ThreadPoolExecutor" in text for text in [*corpus.train["text"], *corpus.held_out["text"]])


def test_each_file_is_either_trained_on_or_held_out(folder):
    train, held_out = (set(rows["text"]) for rows in from_folder(folder))
    assert len(train) + len(held_out) == 200
    assert not train & held_out
    assert held_out == {name for name in train | held_out if is_held_out(name)}


def test_the_order_of_files_is_fixed_and_foreign_folders_are_left_out(folder):
    names = [path.relative_to(folder).as_posix() for path in python_sources(folder)]
    assert names == sorted(names)
    assert {name.split("/")[0] for name in names} == {"package"}


def test_a_folder_without_sources_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--train_file"):
        from_folder(tmp_path)


def test_plain_text_comes_back_whole_and_its_end_is_held_out(hub_cache, text_file):
    corpus = load_corpus(train_file=str(text_file))
    assert not corpus.rows_are_documents
    joined = "".join([*corpus.train["text"], *corpus.held_out["text"]])
    assert joined == text_file.read_text("utf-8")
    assert len(corpus.held_out) == (len(corpus.train) + len(corpus.held_out)) * 5 // 100


@pytest.mark.parametrize("extension", [".json", ".jsonl", ".parquet"])
def test_rows_are_documents(hub_cache, tmp_path, sources, extension):
    files = [tmp_path / f"{name}{extension}" for name in ("train", "held_out")]
    for file, rows in zip(files, (sources[:4], sources[4:]), strict=True):
        if extension == ".parquet":
            Dataset.from_dict({"code": rows}).to_parquet(file)
        else:
            file.write_text("".join(json.dumps({"code": row}) + "\n" for row in rows))
    corpus = load_corpus(train_file=str(files[0]), validation_file=str(files[1]), text_column="code")
    assert corpus.rows_are_documents
    assert [*corpus.train["code"], *corpus.held_out["code"]] == sources


@pytest.mark.parametrize("held_out", ["validation", "test", None])
def test_a_local_dataset(hub_cache, tmp_path, sources, held_out):
    folder = tmp_path / "dataset"
    folder.mkdir()
    splits = {"train": sources[:4], held_out: sources[4:]} if held_out else {"train": sources}
    for split, rows in splits.items():
        Dataset.from_dict({"text": rows}).to_parquet(folder / f"{split}.parquet")
    corpus = load_corpus(dataset_name=str(folder))
    assert corpus.train["text"][:] == sources[:4]
    assert corpus.held_out["text"][:] == sources[4:]


def test_two_sources_are_refused():
    with pytest.raises(ValueError, match="--train_file and --dataset_name"):
        load_corpus(train_file="a.txt", dataset_name="b")


def test_a_validation_file_alone_is_refused():
    with pytest.raises(ValueError, match="goes with --train_file"):
        load_corpus(validation_file="a.txt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        load_corpus(train_file=str(tmp_path / "nowhere.txt"))


def test_an_unknown_extension_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Unknown extension '\.docx'.*\.jsonl"):
        load_corpus(train_file=str(tmp_path / "letter.docx"))


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="is empty"):
        load_corpus(train_file=str(tmp_path / "empty.txt"))


def test_a_single_row_leaves_nothing_to_hold_out(hub_cache, tmp_path):
    (tmp_path / "short.txt").write_text("one line\n")
    with pytest.raises(ValueError, match=r"No held-out text.*--validation_file"):
        load_corpus(train_file=str(tmp_path / "short.txt"))


def test_lines_and_rows_are_not_mixed(hub_cache, tmp_path, text_file):
    (tmp_path / "held_out.jsonl").write_text('{"text": "a document"}\n')
    with pytest.raises(ValueError, match="convert one of them"):
        load_corpus(train_file=str(text_file), validation_file=str(tmp_path / "held_out.jsonl"))


@pytest.mark.parametrize(
    ("column", "message"), [("body", "No column 'body'.*title"), ("year", "int64 values, not text")]
)
def test_a_column_without_text_is_refused(hub_cache, tmp_path, column, message):
    file = tmp_path / "books.jsonl"
    file.write_text('{"title": "Middlemarch", "year": 1871}\n' * 40)
    with pytest.raises(ValueError, match=message):
        load_corpus(train_file=str(file), text_column=column)
