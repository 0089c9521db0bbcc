"""A tiny sentence encoder: a random BERT over single characters, mean pooling, normalised."""

import string
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WIDTH = 16
MAX_TOKENS = 96
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_encoder(folder: Path, seed: int = 1) -> Path:
    """Writes the encoder into `folder`, as sentence-transformers saves one."""
    characters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    symbols = [*SPECIAL, *characters, *(f"##{character}" for character in characters)]
    backend = Tokenizer(models.WordPiece({symbol: i for i, symbol in enumerate(symbols)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    named = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    inner = folder / "transformer"
    PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=128, **named).save_pretrained(inner)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(symbols),
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(inner)
    transformer = Transformer(str(inner), max_seq_length=MAX_TOKENS)
    model = SentenceTransformer(modules=[transformer, Pooling(WIDTH), Normalize()], device="cpu")
    model.save(str(folder / "encoder"), create_model_card=False)
    return folder / "encoder"
