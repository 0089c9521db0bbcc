"""Incremental decoding against decoding as a whole, for two kinds of tokenizers."""

import pytest
from byte_tokenizer import CORPUS, byte_level_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from server.detokenizer import LONGEST_WINDOW, REPLACEMENT, Detokenizer

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def metaspace_tokenizer() -> Tokenizer:
    """Unigram with byte fallback and sentencepiece's spaces, as Llama 2 and Mistral have."""
    words = {word for line in CORPUS for word in line.split() if word.isascii()}
    pieces = {SPACE, *words, *(SPACE + word for word in words), *"abcdefghijklmnopqrstuvwxyz.,:#", SPACE * 2}
    bytes_ = [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    vocabulary = [("<unk>", -100.0), *bytes_, *((piece, -float(len(pieces)) / len(piece)) for piece in sorted(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def metaspace_decoder_tokenizer() -> Tokenizer:
    """The same vocabulary with the newer Metaspace decoder."""
    tokenizer = metaspace_tokenizer()
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    return tokenizer


BYTE_LEVEL = byte_level_tokenizer().backend_tokenizer
METASPACE = metaspace_tokenizer()
NEW_METASPACE = metaspace_decoder_tokenizer()
TOKENIZERS = {"byte level": BYTE_LEVEL, "metaspace": METASPACE, "new metaspace": NEW_METASPACE}
each = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)

words = st.sampled_from(
    ["Hello", "world", " ", "  ", "fine", "Größe", "naïve", "漢字", "かな", "😀", "👩‍👩‍👧", "é", ".", "\n", "\t", "END"]
)
texts = st.one_of(
    st.text(max_size=40), st.lists(words, max_size=20).map("".join), st.lists(words, max_size=12).map(" ".join)
)


def feed(tokenizer: Tokenizer, output: list[int], prompt: list[int], skip: frozenset[int] = frozenset()) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode, skip, prompt)
    return [*map(detokenizer.feed, output), detokenizer.flush()]


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


@each
@settings(max_examples=150, deadline=None)
@given(text=texts, cut=st.integers(0, 60))
@example(text="a b", cut=0)
@example(text="😀😀😀", cut=2)
def test_pieces_add_up_to_the_whole(tokenizer: Tokenizer, text: str, cut: int) -> None:
    """Also where the prompt ends inside a character: the piece that completes it has it."""
    tokens = ids(tokenizer, text)
    prompt, output = tokens[:cut], tokens[cut:]
    pieces = feed(tokenizer, output, prompt)
    whole = [tokenizer.decode(prompt[: len(prompt) - unfinished]) for unfinished in range(min(4, len(prompt)))]
    known = next((text for text in whole if not text.endswith(REPLACEMENT)), "")
    assert known + "".join(pieces) == tokenizer.decode(tokens)


@each
@settings(max_examples=100, deadline=None)
@given(text=texts)
def test_no_piece_has_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    if REPLACEMENT in tokenizer.decode(ids(tokenizer, text)):
        return
    assert not any(REPLACEMENT in piece for piece in feed(tokenizer, ids(tokenizer, text), []))


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(4, len(BYTE_LEVEL.get_vocab()) - 1), max_size=50))
def test_any_byte_level_tokens_add_up_to_the_whole(tokens: list[int]) -> None:
    """Byte-level decoding replaces broken bytes by fixed rules, so that even nonsense agrees."""
    assert "".join(feed(BYTE_LEVEL, tokens, [])) == BYTE_LEVEL.decode(tokens)


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.integers(1, len(METASPACE.get_vocab()) - 1), max_size=50))
def test_any_byte_fallback_tokens_end_and_keep_what_is_whole(tokens: list[int]) -> None:
    """A run with one broken byte decodes as broken altogether: what was given out before stays as it was."""
    pieces = "".join(feed(METASPACE, tokens, []))
    whole = METASPACE.decode(tokens)
    if REPLACEMENT not in whole:
        assert pieces == whole
    assert pieces.replace(REPLACEMENT, "").isprintable() or not pieces.isprintable()
    for word in whole.split(REPLACEMENT):
        assert word in pieces


@each
def test_spaces_between_words_stay(tokenizer: Tokenizer) -> None:
    pieces = feed(tokenizer, ids(tokenizer, "Hello world")[1:], ids(tokenizer, "Hello world")[:1])
    assert "".join(pieces) == " world"


@each
def test_text_comes_as_soon_as_it_is_certain(tokenizer: Tokenizer) -> None:
    tokens = ids(tokenizer, "Hello world fine")
    assert all(feed(tokenizer, tokens, [])[:-1])


def test_special_tokens_are_skipped_and_cost_no_space() -> None:
    skip = frozenset({METASPACE.token_to_id("END")})
    tokens = ids(METASPACE, "Hello world")
    special = METASPACE.token_to_id("END")
    pieces = feed(METASPACE, [tokens[0], special, *tokens[1:], special], [special], skip)
    assert "".join(pieces) == "Hello world"


@each
def test_endless_broken_bytes_do_not_pile_up(tokenizer: Tokenizer) -> None:
    token = tokenizer.token_to_id("<0x80>") or tokenizer.token_to_id("Ģ")
    sizes: list[int] = []

    def decode(window: object) -> str:
        sizes.append(len(list(window)))  # type: ignore[call-overload]
        text: str = tokenizer.decode(window)
        return text

    detokenizer = Detokenizer(decode)
    pieces = [detokenizer.feed(token) for _ in range(1000)]
    assert max(sizes) <= LONGEST_WINDOW
    assert len("".join(pieces)) >= 1000 - 2 * LONGEST_WINDOW
    detokenizer.feed(tokenizer.encode("Hello", add_special_tokens=False).ids[-1])
