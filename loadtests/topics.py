"""Kinds of tasks, each with samples of what users write and with prompts that are not among them."""

import random
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SUBJECTS = _words(
    """accounting astronomy baking beekeeping bicycles birds bridges cameras carpentry chess climbing cinema coffee
    computers cotton dentistry diving elections electricity farming fashion ferries fishing football gardening geology
    glaciers glass horses hospitals insurance jazz kites languages law libraries mathematics museums opera painting
    parliaments photography physics pottery railways rivers robots sailing schools ships soil taxes tennis theatre
    tourism trees vaccines volcanoes weather whales"""
)
FORMS = (
    ("summary", "Summarise this article about {subject}: {detail}."),
    ("quiz", "Make three quiz questions on {subject}, with answers, for {detail}."),
    ("letter", "Write a letter of complaint about {subject}; it concerns {detail}."),
    ("poem", "Write a short poem on {subject} in which {detail} appears."),
    ("headline", "Find a newspaper headline for a story on {subject} and {detail}."),
    ("glossary", "Explain the most important terms of {subject} that have to do with {detail}."),
    ("advert", "Write an advertisement for a {subject} shop that praises {detail}."),
    ("dialogue", "Write a dialogue between two experts in {subject} who disagree about {detail}."),
)
DETAILS = (
    "an old lighthouse",
    "a lost letter",
    "the winter of 1963",
    "a broken window",
    "my grandfather",
    "the price of copper",
    "a red bicycle",
    "the neighbours",
    "a long journey",
    "the second chapter",
    "a late delivery",
    "three children",
    "a new machine",
    "the mayor",
    "bad weather",
    "a museum guard",
    "the first Monday",
    "a yellow coat",
    "two rivals",
    "a secret recipe",
    "an empty train",
    "the northern coast",
    "a wrong number",
    "a small budget",
    "the last prize",
    "a quiet village",
    "too much salt",
    "a sleepless night",
    "the annual report",
    "an open door",
)


@dataclass(frozen=True)
class Topic:
    """One adapter's kind of task."""

    name: str
    samples: tuple[str, ...]
    prompts: tuple[str, ...]


def make_topics(count: int, samples: int, prompts: int, seed: int = 0) -> list[Topic]:
    """The first `count` kinds, each with as many samples and as many other prompts.

    Raises:
        ValueError: there are not so many kinds, or details to tell texts apart.
    """
    kinds = [(form, subject) for form in FORMS for subject in SUBJECTS]
    if not 0 < count <= len(kinds):
        raise ValueError(f"{count} topics: expected 1 to {len(kinds)}")
    if samples < 1 or prompts < 0 or samples + prompts > len(DETAILS):
        raise ValueError(f"{samples} samples and {prompts} prompts: expected at most {len(DETAILS)} in all")
    rng = random.Random(seed)
    rng.shuffle(kinds)
    topics = []
    for (form, template), subject in kinds[:count]:
        details = rng.sample(DETAILS, samples + prompts)
        texts = tuple(template.format(subject=subject, detail=detail) for detail in details)
        topics.append(Topic(f"{form}-{subject}", texts[:samples], texts[samples:]))
    return topics
