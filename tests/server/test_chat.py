"""The tokenizer of the served model, against transformers."""

import asyncio
import threading
from pathlib import Path

import pytest
from byte_tokenizer import TEMPLATE, byte_level_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from test_detokenizer import METASPACE
from transformers import PreTrainedTokenizerFast

from server.chat import LONG_TEXT, RESERVED, ChatTokenizer, TokenizerError
from server.errors import BadRequest

ORIGINAL = byte_level_tokenizer()
USER = {"role": "user", "content": "Hi"}


@pytest.fixture
def chat() -> ChatTokenizer:
    return ChatTokenizer(ORIGINAL)


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=50))
def test_text_is_tokenised_as_transformers_does(text: str) -> None:
    expected = ORIGINAL(text)["input_ids"]
    assert asyncio.run(ChatTokenizer(ORIGINAL).encode(text)) == expected


@settings(max_examples=50, deadline=None)
@given(content=st.text(max_size=50))
def test_messages_are_tokenised_as_transformers_does(content: str) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": content}]
    expected = ORIGINAL.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert asyncio.run(ChatTokenizer(ORIGINAL).encode_chat(messages)) == expected


async def test_a_template_that_writes_the_begin_token_gets_no_second_one() -> None:
    chat = ChatTokenizer(byte_level_tokenizer("<s>" + TEMPLATE))
    tokens = await chat.encode_chat([USER])
    assert tokens.count(0) == 1
    assert tokens[0] == 0


async def test_a_begin_token_in_plain_text_is_not_doubled(chat: ChatTokenizer) -> None:
    assert await chat.encode("<s>Hi") == await chat.encode("Hi")


async def test_what_the_template_refuses_is_the_clients_error(chat: ChatTokenizer) -> None:
    with pytest.raises(BadRequest, match="the system message must come first"):
        await chat.encode_chat([USER, {"role": "system", "content": "late"}])


async def test_variables_reach_the_template_that_reads_them() -> None:
    template = "{% if thinking is defined and not thinking %}<think></think>{% endif %}" + TEMPLATE
    original = byte_level_tokenizer(template)
    chat = ChatTokenizer(original)
    expected = original.apply_chat_template([USER], add_generation_prompt=True, return_dict=False, thinking=False)
    assert await chat.encode_chat([USER], variables={"thinking": False}) == expected
    assert await chat.encode_chat([USER], variables={"other": 1}) == await chat.encode_chat([USER]) != expected


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "messages", "continue_final_message", "return_tensors"])
def test_what_steers_the_library_is_no_variable(name: str) -> None:
    assert name in RESERVED


async def test_without_a_template_there_is_no_chat() -> None:
    with pytest.raises(BadRequest, match="no chat template") as refused:
        await ChatTokenizer(byte_level_tokenizer(None)).encode_chat([USER])
    assert refused.value.code == "no_chat_template"


@pytest.mark.parametrize("length", [10, LONG_TEXT + 1])
async def test_long_texts_are_tokenised_elsewhere(
    chat: ChatTokenizer, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    threads: list[threading.Thread] = []
    original = chat._encode

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        threads.append(threading.current_thread())
        return original(text, add_special_tokens)

    monkeypatch.setattr(chat, "_encode", encode)
    await chat.encode("a" * length)
    assert (threads[0] is threading.main_thread()) == (length < LONG_TEXT)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_the_bytes_of_tokens_add_up_to_the_text(text: str) -> None:
    for tokenizer in (ORIGINAL, PreTrainedTokenizerFast(tokenizer_object=METASPACE)):
        chat = ChatTokenizer(tokenizer)
        tokens = asyncio.run(chat.encode(text, add_special_tokens=False))
        joined = b"".join(map(chat.token_bytes, tokens)).decode()
        assert joined.removeprefix(" " if tokenizer is not ORIGINAL else "") == asyncio.run(chat.decode(tokens))


def test_special_tokens_have_their_own_bytes(chat: ChatTokenizer) -> None:
    assert chat.token_bytes(0) == b"<s>"
    assert chat.token_bytes(10**6) == b""


async def test_no_text_of_a_context_is_longer_than_the_bound(chat: ChatTokenizer) -> None:
    text = "Hello world, this is a fine answer. " * 5
    assert len(text) <= len(await chat.encode(text)) * chat.max_token_characters


def test_a_saved_folder_is_read_back(tmp_path: Path) -> None:
    ORIGINAL.save_pretrained(tmp_path)
    chat = ChatTokenizer.from_folder(tmp_path)
    assert asyncio.run(chat.encode("Hello wörld")) == ORIGINAL("Hello wörld")["input_ids"]
    assert asyncio.run(chat.encode_chat([USER])) == asyncio.run(ChatTokenizer(ORIGINAL).encode_chat([USER]))


@pytest.mark.parametrize("content", [None, "{", '{"version": "1.0"}'])
def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(TokenizerError) as refused:
        ChatTokenizer.from_folder(tmp_path)
    assert "\n" not in str(refused.value)
    assert "tokenizer" in str(refused.value)
