"""The text that models are measured on."""

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from recipes.parts.corpus import load_corpus
from recipes.parts.tokens import VOCABULARY, cache_folder, cached_tokenizer, make_blocks


def load_blocks(
    state: PartialState,
    block_size: int,
    count: int,
    vocab_size: int = VOCABULARY,
    train_file: str | None = None,
) -> tuple[PreTrainedTokenizerBase, Dataset]:
    """A tokenizer of the text, and `count` blocks of it. The default text if no file is given. Collective."""
    corpus, cache = load_corpus(train_file=train_file), cache_folder()
    with state.main_process_first():
        tokenizer = cached_tokenizer(corpus.train, corpus.column, vocab_size, cache)
        rows = (corpus.train, corpus.column, tokenizer, corpus.rows_are_documents)
        return tokenizer, make_blocks(*rows, block_size=block_size, most=count, name="training", cache=cache)
