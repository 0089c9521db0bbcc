"""Kinds of tasks made up for a measurement."""

import pytest

from loadtests.topics import DETAILS, FORMS, SUBJECTS, make_topics


def test_every_kind_has_samples_and_other_prompts() -> None:
    topics = make_topics(100, samples=20, prompts=3)
    assert len({topic.name for topic in topics}) == 100
    texts = [text for topic in topics for text in (*topic.samples, *topic.prompts)]
    assert len(texts) == len(set(texts)) == 100 * 23
    assert all((len(topic.samples), len(topic.prompts)) == (20, 3) for topic in topics)
    assert topics == make_topics(100, samples=20, prompts=3)
    assert topics[:7] == make_topics(7, samples=20, prompts=3)
    assert topics != make_topics(100, samples=20, prompts=3, seed=1)


def test_names_are_names_of_adapters() -> None:
    topics = make_topics(len(FORMS) * len(SUBJECTS), 1, 1)
    assert all(topic.name.replace("-", "").isalnum() for topic in topics)
    assert len({topic.name for topic in topics}) == len(topics)


@pytest.mark.parametrize(
    ("count", "samples", "prompts", "part"),
    [(0, 1, 1, "0 topics"), (10_000, 1, 1, "10000 topics"), (1, len(DETAILS), 1, "1 prompts"), (1, 0, 1, "0 samples")],
)
def test_more_than_there_are(count: int, samples: int, prompts: int, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        make_topics(count, samples, prompts)
