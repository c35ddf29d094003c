"""The report and the index in a real browser: a headless Chromium, one page, no network."""

import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn
from urllib.parse import quote, unquote, urlsplit

import pandas as pd
import pytest

from biojepa.models import ABLATION_MODELS
from biojepa.qc_report import build_qc_report
from biojepa.report import IndexEntry, ReportInputs, build_index, build_report
from biojepa.report.glossary import category_label, metric_text, model_text
from qc_case import make_qc_inputs
from report_case import HOSTILE, NASTY, make_inputs

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DESKTOP, PHONE = {"width": 1300, "height": 900}, {"width": 375, "height": 812}
PAGE_ROWS = 15


def browser_path() -> str:
    """Where a Chromium is: ``CHROMIUM`` names one, or the first on the path."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        not_here("no Chromium here: apt-get install chromium, or name one: CHROMIUM=/path/to/chromium")
    return found


def not_here(reason: str) -> NoReturn:
    """Skip for lack of a browser; fail where ``BIOJEPA_REQUIRE_BROWSER`` says that there is one."""
    if os.environ.get("BIOJEPA_REQUIRE_BROWSER"):
        pytest.fail(f"BIOJEPA_REQUIRE_BROWSER is set, but {reason}")
    pytest.skip(reason)


@dataclass
class Report:
    """A page that is open, and what it asked for and complained about since."""

    page: object
    url: str
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, browser, path: Path, viewport: dict, fragment: str = "") -> "Report":
        page = browser.new_page(viewport=viewport, color_scheme="light")
        report = cls(page, path.as_uri() + fragment)
        page.on("request", lambda request: report.requests.append(request.url))
        page.on("console", lambda message: report.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: report.complaints.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (report.complaints.append("a dialog"), dialog.dismiss()))
        page.goto(report.url)
        return report

    def scroll_through(self) -> None:
        """Show every part of the page once, so that each figure is drawn."""
        step, height = 700, self.page.evaluate("document.documentElement.scrollHeight")
        for top in range(0, height, step):
            self.page.evaluate(f"scrollTo(0, {top})")
            self.page.wait_for_timeout(20)
        self.page.wait_for_function("document.querySelectorAll('.plot:not(.js-plotly-plot)').length === 0")

    def close(self) -> None:
        """Close the page; it must have been silent and must have read itself alone."""
        self.page.close()
        assert self.complaints == []
        assert {url.split("#")[0] for url in self.requests} == {self.url.split("#")[0]}

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_text_contents()


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright import sync_api
    except ImportError:
        not_here("no playwright here: ./run.sh test")
    path = browser_path()
    with sync_api.sync_playwright() as playwright:
        # A container's root cannot have Chromium's sandbox; the page under test is our own.
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def inputs() -> ReportInputs:
    """The inputs with a link that needs quoting, and with more ablations than a table shows at once."""
    made = make_inputs()
    link = {"label": "evaluate/50% #1.tsv", "href": quote("evaluate/50% #1.tsv")}
    row = made.summary[made.summary["model"] == "pca_predictor"]
    names = [name for name in ABLATION_MODELS if name not in made.models][:8]
    summary = pd.concat([made.summary, *(row.assign(model=name) for name in names)])
    return ReportInputs(**{**made.__dict__, "downloads": [link], "summary": summary})


@pytest.fixture(scope="module")
def path(inputs: ReportInputs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("a folder, 5% #2") / "report.html"
    found.write_text(build_report(inputs), encoding="utf-8")
    (found.parent / "evaluate").mkdir()
    (found.parent / "evaluate" / "50% #1.tsv").write_text("x\n")
    return found


@pytest.fixture(scope="module")
def report(browser, path: Path):
    opened = Report.open(browser, path, DESKTOP)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def phone(browser, path: Path):
    opened = Report.open(browser, path, PHONE)
    yield opened
    opened.close()


@pytest.mark.parametrize(("required", "outcome"), [("1", pytest.fail), ("", pytest.skip)])
def test_without_a_browser_these_tests_fail_only_where_one_is_required(monkeypatch, required, outcome):
    monkeypatch.setenv("BIOJEPA_REQUIRE_BROWSER", required)
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(outcome.Exception, match="no Chromium here"):
        browser_path()


def scores(inputs: ReportInputs, metric: str, model: str) -> dict[str, float]:
    """Return the mean score of each perturbation, from the table of metrics."""
    rows = inputs.metrics[(inputs.metrics["metric"] == metric) & (inputs.metrics["model"] == model)]
    return rows.groupby("perturbation")["value"].mean().to_dict()


def number(text: str) -> float:
    return float(text.replace("−", "-"))


def column(report: Report, title: str) -> int:
    return report.texts("#x-table th button").index(title)


def shown(report: Report, title: str) -> list[str]:
    """Return one column of the table of perturbations."""
    at = column(report, title) + 1
    return report.texts(f"#x-table tbody td:nth-child({at})")


def sort_by(report: Report, title: str) -> str:
    """Click a heading and return the order that it announces."""
    head = report.page.locator("#x-table th").nth(column(report, title))
    head.locator("button").click()
    return head.get_attribute("aria-sort")


def choose(report: Report, **options: str) -> None:
    for name, value in options.items():
        report.page.select_option(f"#x-{name}", value)


def test_verdict_and_headline_table_are_on_the_first_screen(report: Report, inputs: ReportInputs) -> None:
    page = report.page
    assert page.locator(".verdict .sentence").inner_text() == inputs.verdict["sentence"]
    for selector in (".verdict .sentence", ".verdict .advice", "table.decision"):
        box = page.locator(selector).bounding_box()
        assert box["y"] + box["height"] <= DESKTOP["height"], selector
    unusable = page.locator("table.decision tr.unusable").evaluate_all(
        "rows => rows.map(r => r.dataset.metric)"
    )
    assert unusable == ["weighted_r2_delta"]


def test_every_figure_is_drawn_in_silence(report: Report) -> None:
    report.scroll_through()
    assert report.page.locator(".plot .main-svg").count() >= 20
    assert report.complaints == []
    assert len(report.requests) == 1


@pytest.mark.parametrize(("metric", "sign"), [("rank_l2", 1), ("additive_l2_difference", -1)])
def test_a_click_on_a_heading_sorts_by_the_scores_of_the_metrics_table(
    report: Report, inputs: ReportInputs, metric: str, sign: int
) -> None:
    choose(report, metric=metric, a="knn", b="multihot", category="")
    report.page.fill("#x-filter", "")
    first, second = scores(inputs, metric, "knn"), scores(inputs, metric, "multihot")
    title = model_text("knn").label
    assert sort_by(report, title) == "descending"
    falling = sorted(first, key=lambda name: -first[name])[:PAGE_ROWS]
    assert shown(report, "Perturbation") == falling
    assert [number(text) for text in shown(report, title)] == pytest.approx(
        [first[name] for name in falling], abs=6e-4
    )
    assert sort_by(report, title) == "ascending"
    rising = sorted(first, key=first.get)[:PAGE_ROWS]
    assert shown(report, "Perturbation") == rising
    gains = [number(text) for text in shown(report, "Better by")]
    assert gains == pytest.approx([sign * (first[name] - second[name]) for name in rising], abs=6e-4)
    report.page.click("#x-next")
    assert shown(report, "Perturbation") == sorted(first, key=first.get)[PAGE_ROWS:]


def test_a_name_or_a_category_filters_the_table(report: Report, inputs: ReportInputs) -> None:
    names = sorted(set(inputs.metrics["perturbation"]) - {"*"})
    choose(report, metric="rank_l2", category="")
    report.page.fill("#x-filter", "gene1")
    expected = [name for name in names if "gene1" in name.lower()]
    assert 0 < len(expected) < len(names)
    assert sorted(shown(report, "Perturbation")) == expected[:PAGE_ROWS]
    assert report.texts("#x-count")[0].startswith(f"{len(expected)} of {len(names)} ")
    report.page.fill("#x-filter", "")
    choose(report, category="combo_seen0")
    assert set(shown(report, "Category")) == {category_label("combo_seen0")}
    choose(report, category="")


def pick(report: Report, name: str) -> None:
    report.page.fill("#x-filter", name)
    report.page.locator("#x-table button.pick").filter(has_text=re.compile(f"^{re.escape(name)}$")).click()


def test_a_picked_perturbation_shows_its_genes_and_gene_sets(report: Report, inputs: ReportInputs) -> None:
    pick(report, HOSTILE)
    profile = inputs.profiles[HOSTILE]
    order = sorted(range(len(profile.genes)), key=lambda k: (-abs(profile.observed[k]), k))[:12]
    rows = report.page.locator("#x-gene-table tbody tr")
    table = [rows.nth(k).locator("td").all_text_contents() for k in range(rows.count())]
    assert [row[0] for row in table] == [profile.genes[k] for k in order]
    values = [[number(text) for text in row[1:]] for row in table]
    models = ("biojepa", "multihot", "duplicate")
    for k, found in zip(order, values, strict=True):
        expected = [profile.observed[k], *(profile.predicted[model][k] for model in models)]
        assert found == pytest.approx(expected, abs=0.0055)
    report.page.select_option("#x-model", "multihot")
    drawn = report.page.evaluate("(({x, y}) => ({x, y}))(document.getElementById('x-genes').data[1])")
    assert drawn["x"] == pytest.approx(profile.observed, rel=5e-3, abs=1e-9)
    assert drawn["y"] == pytest.approx(profile.predicted["multihot"], rel=5e-3, abs=1e-9)
    table = inputs.enrichment[inputs.enrichment["perturbation"] == HOSTILE]
    report.page.locator("#x-sets").scroll_into_view_if_needed()
    traces = report.page.evaluate("document.getElementById('x-sets').data.map(({name, x}) => ({name, x}))")
    said = {trace["name"]: trace["x"] for trace in traces}
    own = table[table["model"] == "biojepa"]
    own = own.iloc[(-own["nes_true"].abs()).argsort(kind="stable")]
    assert said["observed"] == pytest.approx(own["nes_true"].tolist(), rel=5e-3)
    assert said["BioJEPA"] == pytest.approx(own["nes_pred"].tolist(), rel=5e-3)


@pytest.mark.parametrize("name", NASTY)
def test_a_name_that_looks_like_markup_is_shown_as_it_is(report: Report, name: str) -> None:
    pick(report, name)
    assert shown(report, "Perturbation") == [name]
    assert report.texts("#x-name")[0].startswith(f"{name}, ")
    inside = "#x-table b, #x-table script, #x-name *, main script, [onerror]"
    assert report.page.locator(inside).count() == 0
    short = name if len(name) <= 16 else name[:15] + "…"
    assert report.texts("#x-bars .xtick text") == [short]
    assert report.page.locator("#x-bars .xtick [style*=bold]").count() == 0


def test_an_address_with_a_perturbation_opens_there(browser, path: Path) -> None:
    opened = Report.open(browser, path, DESKTOP, f"#p={quote(NASTY[1], safe='')}")
    for name in (NASTY[1], "GENE3+GENE6"):
        opened.page.evaluate("name => { location.hash = '#p=' + encodeURIComponent(name); }", name)
        opened.page.wait_for_function(
            "name => document.getElementById('x-name').textContent.startsWith(name + ', ')", arg=name
        )
        assert 0 <= opened.page.locator("#x-detail").bounding_box()["y"] < DESKTOP["height"]
    opened.close()


def test_the_button_turns_page_and_figures_dark_and_back(report: Report) -> None:
    def colours() -> list[str]:
        return report.page.evaluate(
            "[getComputedStyle(document.body).backgroundColor, "
            "document.getElementById('x-bars').layout.font.color]"
        )

    light = colours()
    report.page.click("#theme")
    dark = colours()
    assert light[0] == "rgb(255, 255, 255)"
    assert all(a != b for a, b in zip(light, dark, strict=True))
    assert max(map(int, re.findall(r"\d+", dark[0]))) < 60
    report.page.click("#theme")
    assert colours() == light


def test_many_ablations_fold_and_unfold(report: Report) -> None:
    row = report.page.locator('#summary tr[data-model="pca_predictor"]')
    button = report.page.locator("#summary button.fold")
    assert (row.is_visible(), button.get_attribute("aria-expanded")) == (False, "false")
    button.click()
    assert (row.is_visible(), button.get_attribute("aria-expanded")) == (True, "true")
    button.click()
    assert not row.is_visible()


def test_links_lead_to_the_files_beside_the_page(report: Report, path: Path) -> None:
    addresses = report.page.locator("#methods ul.files a").evaluate_all("links => links.map(a => a.href)")
    assert [Path(unquote(urlsplit(address).path)) for address in addresses] == [
        path.parent / "evaluate" / "50% #1.tsv"
    ]
    assert Path(unquote(urlsplit(addresses[0]).path)).is_file()


def test_a_phone_scrolls_down_and_never_sideways(phone: Report) -> None:
    phone.scroll_through()
    assert phone.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert phone.page.locator(".verdict .sentence").bounding_box()["y"] < PHONE["height"] / 2
    sizes = phone.page.locator("main p, main td").evaluate_all(
        "all => all.map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 11


def test_print_shows_the_verdict_every_figure_and_every_caption(phone: Report) -> None:
    page = phone.page
    printed = page.pdf(format="A4")  # fires the events of printing
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) >= 4
    page.emulate_media(media="print")
    assert page.locator(".verdict .sentence").is_visible()
    captions = page.locator("figure figcaption")
    assert captions.count() == page.locator("figure").count() >= 20
    hidden = captions.evaluate_all(
        "all => all.filter(e => !e.checkVisibility() || !e.textContent.trim()).length"
    )
    assert hidden == 0
    assert page.locator(".plot:not(.js-plotly-plot)").count() == 0
    assert not page.locator("#theme").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_index_sorts_and_shows_names_as_they_are(browser, inputs: ReportInputs, tmp_path: Path) -> None:
    shifts = {"alpha": 0.3, HOSTILE: -0.2, "zeta": 0.0}
    summaries = [inputs.summary.assign(mean=inputs.summary["mean"] + shift) for shift in shifts.values()]
    entries = [
        IndexEntry(name, "gene", summary, inputs.verdict, f"{k}/report.html")
        for k, (name, summary) in enumerate(zip(shifts, summaries, strict=True))
    ]
    path = tmp_path / "index.html"
    path.write_text(build_index(entries), encoding="utf-8")
    opened = Report.open(browser, path, DESKTOP)
    names = "#overview tbody th"
    assert opened.texts(names) == list(shifts)
    head = opened.page.locator("#overview thead th", has_text="Score")
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert opened.texts(names) == ["alpha", "zeta", HOSTILE]
    pooled = inputs.pooled.set_index(["model", "metric"])["mean"]["biojepa", inputs.headline_metrics[0]]
    assert opened.texts("#overview tbody td b") == [f"{pooled + shift:.3f}" for shift in (0.3, 0.0, -0.2)]
    head.locator("button").click()
    assert opened.texts(names) == [HOSTILE, "zeta", "alpha"]
    assert metric_text(inputs.headline_metrics[0]).label in opened.texts("#overview tbody td")[5]
    opened.page.set_viewport_size(PHONE)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    opened.close()


def test_quality_control_is_summed_up_first_and_its_table_sorts_and_filters(browser, tmp_path: Path) -> None:
    inputs = make_qc_inputs()
    path = tmp_path / "qc.html"
    path.write_text(build_qc_report(inputs), encoding="utf-8")
    opened = Report.open(browser, path, DESKTOP)
    page = opened.page
    box = page.locator("ul.told").bounding_box()
    assert page.locator(".verdict").bounding_box()["y"] < box["y"]
    assert box["y"] + box["height"] <= DESKTOP["height"]
    opened.scroll_through()

    def first(column: int) -> list[str]:
        return opened.texts(f"#q-table tbody td:nth-child({column})")

    # Opened by effect, the order of the table, in which names look like markup.
    assert first(1) == inputs.perturbations["perturbation"].tolist()[:25]
    page.locator("#q-table th button").nth(1).click()
    by_cells = inputs.perturbations["n_cells"].sort_values(ascending=False)
    assert [number(text) for text in first(2)] == by_cells.tolist()[:25]
    page.select_option("#q-flag", "weak")
    weak = inputs.perturbations[inputs.perturbations["flag"] == "weak"]
    assert sorted(first(1)) == sorted(weak["perturbation"])
    page.select_option("#q-flag", "")
    page.fill("#q-filter", HOSTILE.upper())
    assert first(1) == [HOSTILE]
    assert page.locator("#q-table td *").count() == 0
    page.select_option('[data-select="map"]', "UMIs")
    page.click("#theme")
    assert page.evaluate("document.querySelector('[data-figure=map]').data[0].marker.cmin > 0")
    page.set_viewport_size(PHONE)
    page.wait_for_function(
        "w => document.documentElement.scrollWidth === w", arg=PHONE["width"], timeout=5000
    )
    opened.close()
