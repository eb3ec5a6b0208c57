"""Trains sentence embeddings by the trainer of sentence-transformers, and writes what a test wants to know.

python sentences.py FOLDER PATH, with the path where sentence-transformers is.
"""

import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
from accelerate import PartialState
from transformers import BertConfig, BertModel, BertTokenizerFast, set_seed
from worker import leave, same_everywhere, write_result

from layup_hf import LayupMixin, LayupOptions

sys.path.append(sys.argv[2])
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    losses,
    models,
)

FOLDER = Path(sys.argv[1], os.environ["RANK"])
WORDS = [f"w{number}" for number in range(100)]


@dataclass
class Config(LayupOptions, SentenceTransformerTrainingArguments):
    pass


class Trainer(LayupMixin, SentenceTransformerTrainer):
    pass


def write_parts():
    """Before there is a process group: in one, a model is saved by rank 0 alone."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(vocab_file=str(FOLDER / "vocab.txt")).save_pretrained(FOLDER)
    set_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=105, max_position_embeddings=16, **sizes)).save_pretrained(FOLDER)


def make_model():
    return SentenceTransformer(modules=[models.Transformer(str(FOLDER)), models.Pooling(16)], device="cpu")


def pairs(seed, count):
    draw = random.Random(seed)
    rows = [{name: " ".join(draw.choices(WORDS, k=4)) for name in ("anchor", "positive")} for _ in range(count)]
    return datasets.Dataset.from_list(rows)


def labelled(seed, count):
    """Pairs of which one in three is said to belong together."""
    return pairs(seed, count).add_column("label", [number % 3 for number in range(count)])


def train(data, make_loss, **options):
    model = make_model()
    loss = make_loss(model)
    own = {} if isinstance(loss, dict) else {n: p for n, p in loss.named_parameters() if not n.startswith("model.")}
    before = {name: parameter.detach().clone() for name, parameter in own.items()}
    fixed = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    args = Config(str(FOLDER / "out"), per_device_train_batch_size=4, num_train_epochs=1, **fixed, **options)
    trainer = Trainer(model=model, args=args, train_dataset=data, loss=loss)
    output = trainer.train()
    return {
        "steps": output.global_step,
        "loss": output.training_loss,
        "same": all(same_everywhere(parameter.detach()) for parameter in (*model.parameters(), *own.values())),
        "trained of the loss": [name for name, parameter in own.items() if not parameter.equal(before[name])],
    }


def refused(data, make_loss):
    try:
        return train(data, make_loss)
    except ValueError as error:
        return {"message": str(error)}


def ranking(model, **options):
    return losses.MultipleNegativesRankingLoss(model, **options)


write_parts()
rank = PartialState(cpu=True).process_index
both = {"a": pairs(1, 64), "b": pairs(2, 33)}
results = {
    "one": train(pairs(1, 64), ranking),
    "several": train(both, ranking),
    "several of datasets": train(datasets.DatasetDict(both), lambda model: {"a": ranking(model), "b": ranking(model)}),
    "no duplicates": train(pairs(1, 64), ranking, batch_sampler="no_duplicates"),
    "cached": train(pairs(1, 64), lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)),
    "with parameters": train(labelled(1, 64), lambda model: losses.SoftmaxLoss(model, 16, num_labels=3)),
    "gathers": refused(pairs(1, 64), lambda model: ranking(model, gather_across_devices=True)),
}
write_result(rank, results)
leave()
