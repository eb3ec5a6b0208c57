"""From text to blocks: nothing is lost but the tail, and nothing is done twice."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from recipes.parts.tokens import (
    END_OF_TEXT,
    cached_tokenizer,
    collate,
    corpus_key,
    make_blocks,
    pack,
    tokenize,
    train_bpe,
)


@pytest.fixture(scope="module")
def rows(sources):
    return Dataset.from_dict({"text": sources})


@pytest.fixture(scope="module")
def tokenizer(rows, tmp_path_factory):
    return cached_tokenizer(rows, "text", 400, tmp_path_factory.mktemp("cache"))


def blocks_of(rows, tokenizer, cache, *, block_size=32, most=None, documents=True):
    return make_blocks(
        rows, "text", tokenizer, documents, block_size=block_size, most=most, name="training", cache=cache
    )


@given(st.lists(st.lists(st.integers(0, 9), max_size=20), max_size=20), st.integers(1, 12))
def test_packing_loses_nothing_but_the_tail(token_lists, block_size):
    joined = [token for tokens in token_lists for token in tokens]
    before = [list(tokens) for tokens in token_lists]
    blocks = list(pack(token_lists, block_size))
    assert all(len(block) == block_size for block in blocks)
    assert len(blocks) == len(joined) // block_size
    assert [token for block in blocks for token in block] == joined[: len(blocks) * block_size]
    assert token_lists == before


def test_the_tokenizer_gives_real_text_back(tokenizer, sources):
    assert len(tokenizer) == 400
    for text in sources:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@given(st.text())
def test_the_tokenizer_gives_any_text_back(tokenizer, text):
    if END_OF_TEXT not in text:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_tokenizer_is_trained_once(rows, tmp_path, monkeypatch):
    first = cached_tokenizer(rows, "text", 300, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr("recipes.parts.tokens.train_bpe", lambda *_: pytest.fail("trained again"))
    second = cached_tokenizer(rows, "text", 300, tmp_path)
    assert first.get_vocab() == second.get_vocab()


def test_a_failed_training_leaves_nothing_in_the_cache(rows, tmp_path, monkeypatch):
    def broken(texts, vocab_size):
        raise KeyboardInterrupt

    monkeypatch.setattr("recipes.parts.tokens.train_bpe", broken)
    with pytest.raises(KeyboardInterrupt):
        cached_tokenizer(rows, "text", 300, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_key_depends_on_the_text_its_division_and_the_vocabulary(sources):
    key = corpus_key(sources, 4096)
    assert key == corpus_key(list(sources), 4096)
    assert len({key, corpus_key(sources, 4097), corpus_key(sources[::-1], 4096), corpus_key(sources[1:], 4096)}) == 4
    assert corpus_key(["ab", "c"], 300) != corpus_key(["a", "bc"], 300)


def test_equal_text_gives_equal_tokenizers(sources):
    assert train_bpe(sources, 500).to_str() == train_bpe(sources, 500).to_str()


def test_a_vocabulary_smaller_than_the_bytes_is_refused(rows, tmp_path):
    with pytest.raises(ValueError, match="257 or more"):
        cached_tokenizer(rows, "text", 256, tmp_path)


@pytest.mark.parametrize("documents", [True, False])
def test_only_documents_get_an_ending(rows, tokenizer, documents, sources):
    tokens = [token for row in tokenize(rows, "text", tokenizer, documents) for token in row]
    assert tokens.count(tokenizer.eos_token_id) == (len(sources) if documents else 0)
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "".join(sources)


def test_rows_without_text_are_passed_over(tokenizer):
    rows = Dataset.from_dict({"text": ["", "x", None, "y"]})
    tokens = [token for row in tokenize(rows, "text", tokenizer, False) for token in row]
    assert tokenizer.decode(tokens) == "xy"


def test_blocks_hold_the_text(rows, tokenizer, tmp_path, sources):
    blocks = blocks_of(rows, tokenizer, tmp_path)
    expected = [token for text in sources for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    tokens = torch.cat([block["input_ids"] for block in blocks])
    assert len(blocks) == len(expected) // 32
    assert tokens.tolist() == expected[: len(blocks) * 32]


def test_blocks_are_made_once(rows, tokenizer, tmp_path, sources, monkeypatch):
    first = blocks_of(rows, tokenizer, tmp_path)
    monkeypatch.setattr("recipes.parts.tokens.pack", lambda *_: pytest.fail("packed again"))
    # What another worker has: the same text and the same tokenizer, but objects of its own.
    again = cached_tokenizer(rows, "text", 400, tmp_path)
    second = blocks_of(Dataset.from_dict({"text": list(sources)}), again, tmp_path)
    assert first.cache_files == second.cache_files


def test_fewer_blocks_are_spread_over_the_text(rows, tokenizer, tmp_path):
    everything = blocks_of(rows, tokenizer, tmp_path)["input_ids"][:]
    some = blocks_of(rows, tokenizer, tmp_path, most=5)["input_ids"][:]
    assert len(some) == 5
    assert some.tolist() == [everything[i * len(everything) // 5].tolist() for i in range(5)]
    assert len(blocks_of(rows, tokenizer, tmp_path, most=10**9)) == len(everything)


def test_a_batch_is_64_bit_and_its_own_label(rows, tokenizer, tmp_path):
    blocks = blocks_of(rows, tokenizer, tmp_path)
    batch = collate([blocks[i] for i in range(3)])
    assert batch["input_ids"].shape == (3, 32)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])


def test_too_little_text_says_how_much_there_is(tokenizer, tmp_path):
    rows = Dataset.from_dict({"text": ["import os\n"]})
    count = len(tokenizer("import os\n")["input_ids"]) + 1
    with pytest.raises(ValueError, match=f"{count} tokens, less than one block of 32.*--block_size {count}"):
        blocks_of(rows, tokenizer, tmp_path)
    assert len(blocks_of(rows, tokenizer, tmp_path, block_size=count)) == 1


def test_text_without_a_character_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="is empty"):
        blocks_of(Dataset.from_dict({"text": ["", ""]}), tokenizer, tmp_path)


@pytest.mark.parametrize("option", [{"block_size": 1}, {"most": 0}])
def test_sizes_out_of_range_are_refused(rows, tokenizer, tmp_path, option):
    with pytest.raises(ValueError, match="--"):
        blocks_of(rows, tokenizer, tmp_path, **option)
