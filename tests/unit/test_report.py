"""The page: whole, self-contained, escaped, and true to the result."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from fastrecv.bench import report
from fastrecv.bench.results import Gate, Result

from . import results_factory as factory

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Balance(HTMLParser):
    """Keeps the stack of open elements and all text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def result() -> Result:
    return factory.result()


@pytest.fixture(scope="module")
def page(result: Result) -> str:
    return report.render(result)


def test_the_page_is_whole_and_says_everything(result: Result, page: str) -> None:
    parser = parse(page)
    assert parser.seen.count("svg") == 4
    assert parser.seen.count("figcaption") == 4
    for flood in result.floods:
        assert f"{flood.name}: {flood.title}" in parser.text
        for row in flood.configurations:
            assert row.title in parser.text
            assert f"{row.pps_mean:,.0f} ± {row.pps_sstdev:.1f} %" in parser.text
    for expected in (
        "the moon is full",
        "200 prefixes",
        "AMD EPYC",
        "__udp4_lib_lookup",
        "cpu-clock",
        "\u22127.6 %",
        "3.70 %",
    ):
        assert expected in parser.text


def test_the_findings_are_the_estimates(result: Result) -> None:
    (letter,) = [text for text in report.findings(result.floods[0]) if text.startswith("letter:")]
    delta = result.floods[0].row("letter").delta
    assert delta is not None
    assert f"{delta.estimate:.1f}".replace("-", "\u2212") in letter
    assert "slower" in letter


def test_nothing_is_fetched_and_nothing_runs(page: str) -> None:
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert not re.search(r"https?:|src=|@import|url\((?!#)", without_names)
    assert "<script" not in page


def test_ids_are_unique_over_all_plots(page: str) -> None:
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))


def test_what_a_result_says_is_escaped() -> None:
    flood = factory.flood()
    flood.title = "<script>alert(1)</script>"
    page = report.render(factory.result(flood))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    parse(page)


def test_a_failed_gate_stands_at_the_top() -> None:
    flood = factory.flood()
    flood.gates.append(Gate(name="exact counts", passed=False, detail="7 packets are missing"))
    text = parse(report.render(factory.result(flood))).text
    assert "A gate failed: the numbers below mean nothing." in text
    assert text.index("7 packets are missing") < text.index("Plots")
    assert "A gate failed" not in parse(report.render(factory.result())).text


def test_without_a_profile_there_are_no_shares() -> None:
    parser = parse(report.render(factory.result(factory.flood(shares=False))))
    assert "CPU share of" not in parser.text
    assert parser.seen.count("svg") == 3


def test_the_modes_say_what_they_cannot() -> None:
    assert "no network card, driver or GRO" in report.render(factory.result())
    assert "A veth pair is not a network card" in report.render(factory.result(mode="wire"))


def test_a_scale_run_has_its_own_plot() -> None:
    parser = parse(report.render(factory.scale()))
    assert "entries in the rule set" in parser.text
    assert parser.seen.count("svg") == 2


@pytest.mark.parametrize("kind", ["flood", "scale"])
def test_the_main_plot_stands_alone_in_light_and_dark(kind: str) -> None:
    drawn = report.figure(factory.result() if kind == "flood" else factory.scale())
    root = ElementTree.fromstring(drawn)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme: dark" in drawn
    colours = set(re.findall(r"#[0-9a-f]{6}\b", re.sub(r"<style>.*?</style>", "", drawn, flags=re.S)))
    assert not colours  # each is a variable of the style


def test_the_same_result_gives_the_same_page(result: Result, page: str) -> None:
    assert report.render(result) == page
