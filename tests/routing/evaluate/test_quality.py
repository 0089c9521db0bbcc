import pytest

from routing.evaluate.bleu import bleu
from routing.evaluate.quality import METRICS, exact, exact_set, scores
from routing.evaluate.rouge import rouge_1, rouge_l

PAIRS = [
    ("The Mill is a pub in riverside.", "Near the river, The Mill is a pub."),
    ("find . -name '*.txt'", 'find /tmp -type f -name "*.txt" -delete'),
    ("a b c d e f", "f e d c b a"),
    ("when did it rain in 1962", "How much did it rain in 1962?"),
    ("the the the the", "the cat the mat"),
    ("police killed the gunman", "police kill the gunman"),
]

# of rouge-score 0.1.2, without stemming
ROUGE_1 = [0.6667, 0.6, 1.0, 0.7692, 0.5, 0.75]
ROUGE_L = [0.6667, 0.6, 0.1667, 0.7692, 0.5, 0.75]

# of nltk 3.10, sentence_bleu with smoothing method 2 over the same tokens
BLEU = [0.47113, 0.16467, 0.30214, 0.57568, 0.37992, 0.5]


def test_rouge_is_that_of_the_usual_package() -> None:
    assert [rouge_1(answer, [reference]) for answer, reference in PAIRS] == pytest.approx(ROUGE_1, abs=1e-4)
    assert [rouge_l(answer, [reference]) for answer, reference in PAIRS] == pytest.approx(ROUGE_L, abs=1e-4)


def test_bleu_is_that_of_the_usual_package() -> None:
    assert [bleu(answer, [reference]) for answer, reference in PAIRS] == pytest.approx(BLEU, abs=1e-5)
    both = [PAIRS[0][1], "The Mill is a riverside pub"]
    assert bleu(PAIRS[0][0], both) == pytest.approx(0.62872, abs=1e-5)


@pytest.mark.parametrize("metric", [rouge_1, rouge_l, bleu])
def test_nothing_and_everything(metric) -> None:
    assert metric("", ["some words"]) == 0.0
    assert metric("!", ["some words"]) == 0.0
    assert metric("Four words, no more", ["four words no less", "Four words, no more"]) == pytest.approx(1.0)
    assert metric("été déjà", ["Été déjà"]) == pytest.approx(1.0)


def test_exact_match_ignores_case_and_full_stops() -> None:
    assert exact("  The U.S.A. ", ["the usa"]) == 1.0
    assert exact("the us a", ["the usa"]) == 0.0
    assert exact("7", ["seven", "7"]) == 1.0
    assert exact("", ["a"]) == 0.0


def test_sets_have_no_order_but_a_number() -> None:
    assert exact_set("dog, cat.", ["Cat,dog"]) == 1.0
    assert exact_set("dog, cat, cat", ["cat, dog"]) == 0.0
    assert exact("dog, cat", ["cat, dog"]) == 0.0


def test_scores_by_metric() -> None:
    assert scores("em", "A.", ["a"]) == {"score": 1.0, "em": 1.0}
    found = scores("rougeL", *[PAIRS[2][0], [PAIRS[2][1]]])
    assert found == pytest.approx(
        {"score": 1 / 6, "em": 0.0, "rouge1": 1.0, "rougeL": 1 / 6, "bleu": 0.30214}, abs=1e-5
    )
    assert scores("bleu_multi", "a b c d", ["x", "a b c d"])["score"] == pytest.approx(1.0)
    assert set(METRICS) == {"em", "em_any", "em_set", "rouge1", "rougeL", "bleu", "bleu_multi"}
    with pytest.raises(ValueError, match="metric: 'accuracy' is none of em, "):
        scores("accuracy", "a", ["a"])
