"""Seven small tasks, generated from a seed, whose answers a person tells apart at a glance.

Every task asks plainly and expects an answer in a house form that the prompt does not reveal (hyphens between letters,
`<` between sorted numbers, fixed JSON keys), so the base model misses it and an adapter can only have learnt it.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from types import MappingProxyType

from deploy.demo.words import CITIES, JOBS, MONTHS, NAMES, ONES, STEMS, SURNAMES, TENS
from routing.train.data import Task, TaskRow, write_task

SEED = 20
SIZES = MappingProxyType({"train": 4000, "valid": 100, "test": 100})


PIRATE_WORDS = MappingProxyType(
    {
        "hello": "ahoy",
        "my": "me",
        "friend": "matey",
        "friends": "mateys",
        "you": "ye",
        "your": "yer",
        "is": "be",
        "are": "be",
        "the": "th'",
        "money": "doubloons",
        "boss": "cap'n",
        "yes": "aye",
        "house": "ship",
        "drink": "grog",
        "stop": "avast",
    }
)


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """How one task is asked, and how one example of it is drawn: `draw(rng) -> (input, target)`."""

    cluster: str
    instructions: tuple[str, ...]
    draw: Callable[[random.Random], tuple[str, str]]


def generate(name: str, seed: int = SEED, sizes: Mapping[str, int] = SIZES) -> Task:
    """The rows of one task: the same for the same arguments, no input twice in or across splits.

    Raises:
        ValueError: no task has this name.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: expected one of {', '.join(TASKS)}")
    spec, rng = TASKS[name], random.Random(f"{name}/{seed}")
    seen: set[str] = set()
    splits: dict[str, tuple[TaskRow, ...]] = {}
    for split in ("test", "valid", "train"):  # held-out rows do not change with the size of the training split
        rows: list[TaskRow] = []
        while len(rows) < sizes[split]:
            text, target = spec.draw(rng)
            if text not in seen:
                seen.add(text)
                template = rng.randrange(len(spec.instructions))
                rows.append(TaskRow(name, spec.cluster, spec.instructions[template], text, target, template))
        splits[split] = tuple(rows)
    return Task(name, splits["train"], splits["valid"], splits["test"])


def write_tasks(root: Path, seed: int = SEED, sizes: Mapping[str, int] = SIZES) -> list[Path]:
    """Writes every task as `<root>/<task>/{train,valid,test}.jsonl` and returns the folders."""
    return [write_task(root, generate(name, seed, sizes)) for name in TASKS]


def number_words(number: int) -> str:
    """0 <= number < 10,000 in British English words."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (f"-{ONES[number % 10]}" if number % 10 else "")
    unit, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    head, rest = f"{ONES[number // unit]} {name}", number % unit
    if not rest:
        return head
    return f"{head} {'and ' if rest < 100 else ''}{number_words(rest)}"


def pirate(sentence: str) -> str:
    """The sentence in pirate speech: words replaced one by one, between `Arr!` and `savvy?`."""
    plain = sentence.rstrip(".").lower()
    return f"Arr! {re.sub('[a-z]+', lambda word: PIRATE_WORDS.get(word[0], word[0]), plain)}, savvy?"


def _spell(rng: random.Random) -> tuple[str, str]:
    word = "".join(rng.sample(STEMS, 2)) if rng.random() < 0.8 else rng.choice(STEMS)
    return word, "-".join(word.upper())


def _json_fields(rng: random.Random) -> tuple[str, str]:
    name, age, city, job = rng.choice(NAMES), rng.randint(18, 89), rng.choice(CITIES), rng.choice(JOBS)
    article = "an" if job[0] in "aeiou" else "a"
    text = rng.choice(
        (
            f"{name} is {age} years old, lives in {city} and works as {article} {job}.",
            f"{name}, {age}, is {article} {job} from {city}.",
            f"In {city} there lives {article} {job} called {name}, aged {age}.",
            f"Meet {name}: {article} {job}, {age} years old, based in {city}.",
        )
    )
    return text, json.dumps({"name": name, "age": age, "city": city, "job": job})


def _sort(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(10, 100), rng.randint(3, 5))
    return ", ".join(map(str, numbers)), " < ".join(map(str, sorted(numbers)))


def _pirate(rng: random.Random) -> tuple[str, str]:
    owner, thing, place = rng.choice(("my", "your", "the")), rng.choice(STEMS), rng.choice(STEMS)
    sentence = rng.choice(
        (
            f"Hello my friend, {owner} {thing} is near the {place}.",
            f"Stop, {owner} {thing} and the {place} are not your money.",
            f"Yes boss, {owner} friends are at the {place} with {thing} and drink.",
            f"The boss is in {owner} house with the {thing} and the {place}.",
            f"You are my friend and the {thing} is for {owner} {place}.",
        )
    )
    return sentence, pirate(sentence)


def _number_words(rng: random.Random) -> tuple[str, str]:
    number = rng.randrange(10 ** rng.choice((3, 4, 4)))
    return str(number), number_words(number)


def _iso_date(rng: random.Random) -> tuple[str, str]:
    day = date(1950, 1, 1) + timedelta(days=rng.randrange(100 * 365))
    month, suffix = MONTHS[day.month - 1], ordinal_suffix(day.day)
    spelt = rng.choice(
        (
            f"{day.day} {month} {day.year}",
            f"{month} {day.day}, {day.year}",
            f"the {day.day}{suffix} of {month} {day.year}",
            f"{month} {day.day}{suffix}, {day.year}",
        )
    )
    frame = rng.choice(("{}", "We met on {}.", "The deadline is {}.", "Born on {}", "Please come by {}."))
    return frame.format(spelt), day.isoformat()


def ordinal_suffix(day: int) -> str:
    """`st`, `nd`, `rd` or `th`."""
    return "th" if 10 < day < 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")


def _redact(rng: random.Random) -> tuple[str, str]:
    first, last, stem = rng.choice(NAMES), rng.choice(SURNAMES), rng.choice(STEMS)
    ending = rng.choice(("com", "org", "net", "example"))
    email = f"{first.lower()}{rng.choice(('.', '_', ''))}{last.lower()}@{stem}.{ending}"
    prefix = rng.choice(("+1 ", "+44 ", "+49 ", "0"))
    phone = f"{prefix}{rng.randint(20, 99)} {rng.randint(1000, 9999)} {rng.randint(100, 999)}"
    city = rng.choice(CITIES)
    sentence = rng.choice(
        (
            "Write to {email} or call {phone} and ask for {first} {last}.",
            "{first} {last} in {city} can be reached at {phone}.",
            "My address is {email}, but in {city} please use {phone}.",
            "Send the {stem} to {first} in {city} and the bill to {email}.",
            "If {phone} is busy, {first} also reads {email} every day.",
        )
    )
    values = {"first": first, "last": last, "city": city, "stem": stem}
    return (
        sentence.format(email=email, phone=phone, **values),
        sentence.format(email="[EMAIL]", phone="[PHONE]", **values),
    )


TASKS: Mapping[str, TaskSpec] = MappingProxyType(
    {
        "spell": TaskSpec("characters", ("Spell this word.", "How is this word spelt?", "Spell it out:"), _spell),
        "json_fields": TaskSpec(
            "extraction",
            ("Turn the sentence into JSON.", "Give the facts as JSON.", "Extract the person as a JSON object."),
            _json_fields,
        ),
        "sort_numbers": TaskSpec(
            "ordering",
            ("Sort these numbers.", "Put the numbers in order.", "Order the numbers from small to large."),
            _sort,
        ),
        "pirate": TaskSpec(
            "style",
            ("Say it like a pirate.", "Rewrite this in pirate speech.", "How would a pirate say this?"),
            _pirate,
        ),
        "number_words": TaskSpec(
            "numbers",
            ("Write the number in words.", "Say this number in English.", "Spell out the number."),
            _number_words,
        ),
        "iso_date": TaskSpec(
            "dates",
            ("Which date is meant?", "Give the date in standard form.", "Convert the date."),
            _iso_date,
        ),
        "redact": TaskSpec(
            "privacy",
            ("Remove the contact details.", "Hide private data in this text.", "Make this text anonymous."),
            _redact,
        ),
    }
)
