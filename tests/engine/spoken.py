"""A tiny model that has a tokenizer, so that its outputs are texts."""

import shutil
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<s>", "</s>"]
CORPUS = [
    '{"name": "value", "count": 12, "list": [true, false, null]}\n',
    "aa ab abc abcd yes no maybe",
    "Größe 漢字 😀",
]


def tokenizer() -> Tokenizer:
    """Byte-level BPE of 300 tokens, which end of text, id 1, is one of; the tiny model has 512."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def spoken(model: Path, folder: Path) -> Path:
    """`model` with the tokenizer, in a new folder."""
    shutil.copytree(model, folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder
