"""How an encoder reads texts, from its folder's files alone: the server counts tokens without the encoder's process."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from routing.encoder_model import EncoderError, transformer_files


class EncoderTokenizer:
    """Tokens of an encoder. It reads `max_tokens` of a text, the marks around it included."""

    def __init__(self, backend: Tokenizer, max_tokens: int) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.max_tokens = max_tokens
        self.vocab_size = int(backend.get_vocab_size())

    @classmethod
    def from_folder(cls, folder: Path) -> "EncoderTokenizer":
        """Of a sentence-transformers folder. Raises EncoderError if it has no tokenizer.json or names no limit."""
        at, limit = transformer_files(folder)
        if limit is None:
            raise EncoderError(f"{folder}: expected a limit of tokens, max_seq_length in sentence_bert_config.json")
        try:
            backend = Tokenizer.from_file(str(at / "tokenizer.json"))
        except Exception as error:  # the library raises plain Exception
            raise EncoderError(f"{at / 'tokenizer.json'}: expected a tokenizer ({error})") from error
        return cls(backend, limit)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, marks included. Other threads go on meanwhile."""
        return [len(encoded.ids) for encoded in self._backend.encode_batch(list(texts))]

    def text(self, tokens: Sequence[int]) -> str | None:
        """The text that has exactly these tokens, with or without the marks; None if there is none."""
        text: str = self._backend.decode(list(tokens), skip_special_tokens=True)
        plain = self._backend.encode_batch([text], add_special_tokens=False)[0].ids
        marked = self._backend.encode_batch([text])[0].ids
        return text if list(tokens) in (plain, marked) else None
