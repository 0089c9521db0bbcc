"""What users of other libraries write, against the server at a URL: `python stock_clients.py NAME URL`.

The last line printed is JSON.

A process of its own keeps their imports, warnings and settings away from the tests, and its network is this machine.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

LOCAL = ("127.0.0.1", "::1", "localhost")
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class NetworkUsed(Exception):
    """A client wanted to talk to another machine."""


def stay_here(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: nothing is looked up or connected to but this machine."""
    if event == "socket.getaddrinfo" and arguments[0] not in (*LOCAL, None):
        raise NetworkUsed(str(arguments[0]))
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] not in LOCAL:
        raise NetworkUsed(str(arguments[1]))


def langchain(url: str) -> Any:
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings

    mix = {"lora": {"adapters": [{"name": "sql", "weight": 0.5}, {"name": "german", "weight": 0.5}]}}
    shared: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0}
    chat = ChatOpenAI(model="tiny", temperature=0, extra_body=mix, **shared)
    messages = [SystemMessage("Be brief."), HumanMessage("Hi")]
    answer = chat.invoke(messages)
    called = ChatOpenAI(model="tiny", **shared).bind_tools([TOOL]).invoke("What is the weather in Rome?")
    person = {"title": "Place", "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    structured = ChatOpenAI(model="tiny", **shared).with_structured_output(person, method="json_schema")
    embeddings = OpenAIEmbeddings(model="encoder", check_embedding_ctx_length=False, **shared)
    return {
        "whole": answer.content,
        "usage": answer.usage_metadata["total_tokens"] > 0,
        "stream": "".join(str(chunk.content) for chunk in chat.stream(messages)),
        "batch": [each.content for each in chat.batch([messages, "Hi"])],
        "async": asyncio.run(chat.ainvoke(messages)).content,
        "completion": OpenAI(model="pirate", **shared).invoke("Hi"),
        "calls": [(call["name"], call["args"]) for call in called.tool_calls],
        "structured": structured.invoke("Where is the Pantheon?"),
        "embeddings": [*embeddings.embed_documents(["a", "b"]), embeddings.embed_query("a")],
    }


def litellm(url: str) -> Any:
    import litellm as library

    library.telemetry = False
    shared: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": "none", "num_retries": 0}
    whole = library.completion(model="openai/sql", messages=MESSAGES, **shared)
    stream = library.completion(
        model="openai/sql", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **shared
    )
    called = library.completion(model="hosted_vllm/tiny", messages=MESSAGES, tools=[TOOL], **shared)
    later = library.acompletion(model="openai/tiny", messages=MESSAGES, lora={"adapters": [{"name": "sql"}]}, **shared)
    structured = library.completion(
        model="openai/tiny", messages=MESSAGES, response_format={"type": "json_object"}, **shared
    )
    embedded = library.embedding(model="openai/encoder", input=["a", "b"], encoding_format="float", **shared)
    text = library.text_completion(model="text-completion-openai/pirate", prompt="Hi", **shared)
    try:
        library.completion(model="openai/nobody", messages=MESSAGES, **shared)
        refused = None
    except library.NotFoundError as error:
        refused = error.status_code
    return {
        "whole": whole.choices[0].message.content,
        "stream": "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices),
        "async": asyncio.run(later).choices[0].message.content,
        "completion": text.choices[0].text,
        "calls": [
            (each.function.name, json.loads(each.function.arguments)) for each in called.choices[0].message.tool_calls
        ],
        "embeddings": [entry["embedding"] for entry in embedded.data],
        "refused": refused,
        "structured": json.loads(structured.choices[0].message.content),
    }


def llm(url: str) -> Any:
    """Simon Willison's `llm`, configured by its file."""
    import llm as library

    folder = Path(os.environ["LLM_USER_PATH"])
    lines = [{"model_id": f"my-{name}", "model_name": name, "api_base": f"{url}/v1"} for name in ("sql", "tiny")]
    (folder / "extra-openai-models.yaml").write_text(json.dumps(lines))  # JSON is YAML

    whole = library.get_model("my-tiny").prompt("Hi", system="Be brief.", stream=False, max_tokens=50)
    return {"stream": "".join(library.get_model("my-sql").prompt("Hi", stream=True)), "whole": whole.text()}


if __name__ == "__main__":
    sys.addaudithook(stay_here)
    said = json.dumps({"langchain": langchain, "litellm": litellm, "llm": llm}[sys.argv[1]](sys.argv[2]))
    sys.stdout.write(f"\n{said}\n")
