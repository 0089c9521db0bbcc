"""What users of instructor write, against the server at a URL: `python instructor_runs.py NAME URL`.

Run by an interpreter that has instructor, whose dependencies exclude ours. The last line printed is JSON.
"""

import asyncio
import json
import logging
import sys
from collections.abc import Iterable
from typing import Any, Literal

import instructor
from instructor.core.exceptions import InstructorRetryException
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field, field_validator

EMMA = "Turn the sentence into JSON.\nMeet Emma: a surgeon, 48 years old, based in Rome."
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": EMMA}], "temperature": 0, "max_tokens": 160}
Mode = instructor.Mode


class Person(BaseModel):
    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=120)


class Exact(Person):
    """Without more properties, which a small model goes on inventing where it may."""

    model_config = ConfigDict(extra="forbid")


class Job(BaseModel):
    title: Literal["surgeon", "baker", "pilot"]
    city: str | None = Field(max_length=12)


class Team(BaseModel):
    people: list[Person] = Field(min_length=2, max_length=2)
    job: Job


class Refusing:
    """A model that refuses its first so many values, as a check of the user's may."""

    def __init__(self, times: int) -> None:
        self.refused = 0

        class Shouted(Person):
            @field_validator("age")
            @classmethod
            def _once_more(cls, age: int) -> int:
                if self.refused < times:
                    self.refused += 1
                    raise ValueError(f"try again, this was attempt {self.refused}")
                return age

        self.model = Shouted


def whole(client: OpenAI, mode: Mode, model: str, kind: Any, **options: Any) -> Any:
    made = instructor.from_openai(client, mode=mode).chat.completions
    answer, said = made.create_with_completion(model=model, response_model=kind, **ASKED, **options)
    return {"answer": answer.model_dump(), "route": [each["name"] for each in said.lora["adapters"]]}


def partial(client: OpenAI, mode: Mode) -> Any:
    """Every state of an answer that streams; one that is valid so far never loses what it had."""
    made = instructor.from_openai(client, mode=mode).chat.completions
    return [each.model_dump() for each in made.create_partial(model="json_fields", response_model=Person, **ASKED)]


def retried(client: OpenAI, mode: Mode, times: int, most: int) -> Any:
    """The value after so many refusals, and how often was asked."""
    refusing, asked = Refusing(times), []
    made = instructor.from_openai(client, mode=mode)
    made.on("completion:kwargs", lambda *_, **fields: asked.append(len(fields["messages"])))
    try:
        answer = made.chat.completions.create(
            model="json_fields", response_model=refusing.model, max_retries=most, **ASKED
        ).model_dump()
    except InstructorRetryException as error:
        answer = f"gave up after {error.n_attempts}"
    return {"answer": answer, "messages": asked}


async def later(url: str) -> Any:
    """Several at once."""
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        made = instructor.from_openai(client, mode=Mode.JSON_SCHEMA).chat.completions
        names = ("json_fields", "smollm2-135m")
        answers = await asyncio.gather(*(made.create(model=name, response_model=Exact, **ASKED) for name in names))
    return [answer.model_dump() for answer in answers]


def parallel(url: str) -> Any:
    """Calls of several functions in one answer, which are the model's own choice: instructor does not force them."""
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        made = instructor.from_openai(client, mode=Mode.PARALLEL_TOOLS).chat.completions
        answers = made.create(model="tiny", response_model=Iterable[Person | Job], **{**ASKED, "max_tokens": 1000})
        return [{type(each).__name__: each.model_dump()} for each in answers]


def forced(url: str) -> Any:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        several = instructor.from_openai(client, mode=Mode.TOOLS).chat.completions
        mix = {"lora": {"adapters": [{"name": "json_fields", "weight": 0.8}, {"name": "spell", "weight": 0.2}]}}
        return {
            "modes": {
                mode.name: whole(client, mode, "json_fields", Person)
                for mode in (Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON, Mode.JSON_SCHEMA, Mode.MD_JSON)
            },
            "nested": whole(client, Mode.TOOLS_STRICT, "smollm2-135m", Team),
            "mix": whole(client, Mode.JSON_SCHEMA, "smollm2-135m", Exact, extra_body=mix),
            "partial": {mode.name: partial(client, mode) for mode in (Mode.TOOLS, Mode.JSON, Mode.JSON_SCHEMA)},
            "iterable": [
                each.model_dump()
                for each in several.create_iterable(model="json_fields", response_model=Person, **ASKED)
            ],
            "retried": {mode.name: retried(client, mode, 1, 3) for mode in (Mode.TOOLS, Mode.JSON, Mode.JSON_SCHEMA)},
            "given up": retried(client, Mode.TOOLS, 9, 2),
            "async": asyncio.run(later(url)),
        }


if __name__ == "__main__":
    logging.disable()  # it logs what it retries
    sys.stdout.write(f"\n{json.dumps({'forced': forced, 'parallel': parallel}[sys.argv[1]](sys.argv[2]))}\n")
