"""From text to blocks of tokens: a byte-level BPE tokenizer, and packing."""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from datasets import Dataset, Features, NamedSplit, Value
from datasets import Sequence as ListOf
from huggingface_hub import constants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 512  # of the default recipe and of what is measured on it
SMALLEST_VOCABULARY = 257  # the 256 bytes and the end-of-text token
# Merges are settled long before this much text; a corpus of many gigabytes need not be read twice.
TOKENIZER_CHARACTERS = 64_000_000


def cache_folder() -> Path:
    """The recipe's cache, beside those of the Hugging Face libraries (HF_HOME, XDG_CACHE_HOME)."""
    return Path(constants.HF_HOME) / "layup"


def cached_tokenizer(rows: Dataset, column: str, vocab_size: int, cache: Path) -> PreTrainedTokenizerFast:
    """The tokenizer trained on `rows`, from `cache` if the same text has been seen before.

    Args:
        rows: training text, in `column`; its first 64 million characters are used.
        vocab_size: entries at most, the end-of-text token included; fewer for a short text.
        cache: folder, created if missing.

    Raises:
        ValueError: `vocab_size` below 257.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"--vocab_size {vocab_size} is too small: every byte needs an entry, so 257 or more.")
    texts = list(_first_characters(rows, column, TOKENIZER_CHARACTERS))
    file = cache / f"tokenizer-{corpus_key(texts, vocab_size)}.json"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            unfinished = Path(folder, file.name)
            train_bpe(texts, vocab_size).save(str(unfinished))
            # Only ever a whole file under the final name, even if two machines share the cache.
            os.replace(unfinished, file)
    return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def corpus_key(texts: Iterable[str], vocab_size: int) -> str:
    """A name for the tokenizer of these texts: equal for equal texts in equal order, 16 hex digits."""
    digest = hashlib.sha256(f"bpe-{vocab_size}".encode())
    for text in texts:
        data = text.encode("utf-8", errors="surrogatepass")
        # The length keeps ["ab", "c"] apart from ["a", "bc"].
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:16]


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A lossless byte-level BPE tokenizer of at most `vocab_size` entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pack(token_lists: Iterable[Sequence[int]], block_size: int) -> Iterator[list[int]]:
    """Join the lists and cut the result into blocks of `block_size`; the last short block is dropped."""
    pending: list[int] = []
    for tokens in token_lists:
        pending.extend(tokens)
        whole = len(pending) - len(pending) % block_size
        for start in range(0, whole, block_size):
            yield pending[start : start + block_size]
        del pending[:whole]


def tokenize(
    rows: Dataset,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    rows_are_documents: bool,
    batch_size: int = 256,
) -> Iterator[list[int]]:
    """The tokens of each row that has any text, with the end-of-text token behind whole documents.

    Fast tokenizers spread a batch of rows over the cores.
    """
    ending = [tokenizer.eos_token_id] if rows_are_documents and tokenizer.eos_token_id is not None else []
    for batch in rows.select_columns(column).iter(batch_size=batch_size):
        texts = [text for text in batch[column] if text]
        if texts:
            # verbose=False: no warning that a document is longer than the model; it is cut afterwards.
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
            yield from (tokens + ending for tokens in encoded["input_ids"])


def make_blocks(
    rows: Dataset,
    column: str,
    tokenizer: PreTrainedTokenizerBase,
    rows_are_documents: bool,
    *,
    block_size: int,
    most: int | None,
    name: str,
    cache: Path,
) -> Dataset:
    """Tokenise and pack `rows`, or take the result from `cache`.

    Returns:
        A dataset of at most `most` blocks, evenly spread over the rows, whose one column ``input_ids``
        holds `block_size` tokens.

    Raises:
        ValueError: `block_size` below 2 or `most` below 1, or not enough text for one block.
    """
    if block_size < 2:
        raise ValueError(f"--block_size {block_size}: a block needs two tokens or more to predict one.")
    if most is not None and most < 1:
        raise ValueError(f"--max_train_blocks and --max_eval_blocks must be 1 or more, not {most}.")
    source = {
        "rows": rows,
        "column": column,
        "tokenizer": tokenizer,
        "rows_are_documents": rows_are_documents,
    }
    # A few rows mostly settle it, and every worker has to look.
    _require_one_block(tokenize(**source, batch_size=4), block_size, name)
    blocks = Dataset.from_generator(
        _packed_rows,
        features=Features({"input_ids": ListOf(Value("int32"), length=block_size)}),
        gen_kwargs={**source, "block_size": block_size},
        cache_dir=str(cache),
        split=NamedSplit(name.replace("-", "_")),
    )
    if most is not None and most < len(blocks):
        blocks = blocks.select([i * len(blocks) // most for i in range(most)])
    return blocks.with_format("torch")


def collate(blocks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch from blocks: ``input_ids`` and ``labels``, both int64 (batch, block_size).

    They are the same tokens: causal models shift the labels themselves.
    """
    tokens = torch.stack([block["input_ids"] for block in blocks]).long()
    return {"input_ids": tokens, "labels": tokens}


def _packed_rows(block_size: int, **source: object) -> Iterator[dict[str, list[int]]]:
    for block in pack(tokenize(**source), block_size):
        yield {"input_ids": block}


def _require_one_block(token_lists: Iterable[Sequence[int]], block_size: int, name: str) -> None:
    count = 0
    for tokens in token_lists:
        count += len(tokens)
        if count >= block_size:
            return
    if count < 2:
        raise ValueError(f"The {name} text is empty: name a file or dataset with some text in it.")
    raise ValueError(
        f"The {name} text has {count} tokens, less than one block of {block_size}: "
        f"take more text, or --block_size {count} or less."
    )


def _first_characters(rows: Dataset, column: str, most: int) -> Iterator[str]:
    for batch in rows.select_columns(column).iter(batch_size=256):
        for text in batch[column]:
            if text and most > 0:
                yield text[:most]
                most -= len(text)
        if most <= 0:
            return
