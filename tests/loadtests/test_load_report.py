"""Figures of a run, its tables and its page."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.page import html_page, markdown, over_time, split_rows, summary_rows
from loadtests.plots import cumulative, plot
from loadtests.records import Record, by, read_records, write_records
from loadtests.report import compare, jain, latencies, report

ONE = Record(0, "default", "sql", 0.0, 0.0, (0.5, 0.6, 0.8), 1.0, 10, 3, 3)


def test_latencies_by_hand() -> None:
    found = latencies([ONE, replace(ONE, times=(1.5,), end=2.0, output_tokens=1)])
    assert found["requests"] == 2
    assert found["ttft"]["p50"] == pytest.approx(1000)
    assert found["ttft"]["mean"] == pytest.approx(1000)
    assert found["itl"]["p50"] == pytest.approx(150)  # 100 and 200 ms
    assert found["e2e"]["p99"] == pytest.approx(1990)
    assert latencies([])["ttft"] == {}


def test_a_run_by_hand() -> None:
    records = [
        ONE,
        replace(ONE, index=1, sent=1.0, at=0.9, times=(7.0, 7.5, 8.0), end=9.0, cold=True),
        replace(ONE, index=2, tenant="acme", adapter=None, status="http 429", times=(), output_tokens=0, end=0.1),
    ]
    found = report(records)
    assert (found["requests"], found["statuses"]) == (3, {"ok": 2, "http 429": 1})
    assert found["seconds"] == 10.0
    assert found["tokens_per_second"] == pytest.approx(0.6)
    assert found["requests_per_second"] == pytest.approx(0.2)
    assert found["slo_attainment"] == pytest.approx(1 / 3)  # the second took 7 s, the third failed
    assert found["late_ms"] == pytest.approx(100)
    assert (found["cold"]["requests"], found["warm"]["requests"]) == (1, 1)
    assert found["fairness_tenants"] == pytest.approx(0.5)  # one tenant got everything
    assert set(found["tenants"]) == {"acme", "default"}
    assert report([])["slo_attainment"] is None


@given(st.lists(st.floats(0.001, 1e3), min_size=1, max_size=20), st.floats(0.01, 100))
def test_jains_index(values: list[float], factor: float) -> None:
    index = jain(values)
    assert index is not None
    assert 1 / len(values) - 1e-9 <= index <= 1 + 1e-9
    assert jain([value * factor for value in values]) == pytest.approx(index)
    assert jain([values[0]] * len(values)) == pytest.approx(1)
    assert jain([values[0]] + [0.0] * 9) == pytest.approx(0.1)


def test_nothing_has_no_fairness() -> None:
    assert jain([]) is None
    assert jain([0.0]) is None


def test_ratios_are_above_one_where_the_first_is_better() -> None:
    fast = report([ONE])
    slow = report([replace(ONE, times=(1.0, 1.2, 1.6), end=2.0)])
    ratios = compare(fast, slow)
    assert ratios["tokens_per_second"] == pytest.approx(2)
    assert ratios["ttft_p50"] == pytest.approx(2)
    assert ratios["itl_mean"] == pytest.approx(2)
    nothing = compare(fast, report([replace(ONE, times=(), status="lost", output_tokens=0)]))
    assert nothing["ttft_p50"] is nothing["tokens_per_second"] is None


def test_records_survive_being_written(tmp_path: Path) -> None:
    records = [ONE, replace(ONE, adapter=None, times=(), status="http 503")]
    write_records(tmp_path / "records.jsonl", records)
    assert read_records(tmp_path / "records.jsonl") == records
    assert list(by(records, "adapter")) == ["(base model)", "sql"]


class Page(HTMLParser):
    """Tags that are open at the end, and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        """Opens nothing."""

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f" {data}"


def test_the_page_is_whole_and_escapes_names() -> None:
    records = [replace(ONE, index=number, sent=float(number), tenant=f"<t{number % 2}>") for number in range(8)]
    page = Page()
    html = html_page("a <b> & c", {"<run>": (report(records), records)})
    page.feed(html)
    assert page.open == []
    assert html.count("<svg") == 4
    assert "a <b> & c" in page.text
    assert "tenant <t1>" in page.text
    assert "http" not in html  # nothing is fetched


def test_tables() -> None:
    rows = summary_rows({"run": report([ONE]), "none": report([])})
    assert [len(row) for row in rows] == [10] * 3
    assert rows[1][:5] == ["run", "1", "0", "3.0", "500.0 / 500.0"]
    assert markdown([["a", "b"], ["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert [row[0] for row in split_rows(report([ONE]))] == ["", "first use of an adapter", "other requests"]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=2000))
def test_shares_rise_to_one(values: list[float]) -> None:
    points = cumulative(values)
    assert points[-1] == (max(values), 1.0)
    assert points == sorted(points)
    assert len(points) < 900


def test_plots_of_little() -> None:
    assert plot("t", "x", {}) == ""
    assert plot("t", "x", {"a": [(0.0, 1.0)]}, log=True) == ""
    assert "<path" in plot("t", "x", {"a": [(1.0, 1.0)]}, log=True)
    assert over_time([replace(ONE, times=())]) == []
    assert sum(rate for _, rate in over_time([ONE])) * 0.8 / 60 == pytest.approx(3)
