"""The section on the study's claims, from the audit of a made-up study."""

import copy
import re
from pathlib import Path

import pytest
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg

from moejax.errors import BadFileError
from moejax.report import FIGURES, ReportData, load_data, report_markdown
from moejax.report._captions import caption
from moejax.report._study_text import study_section
from moejax.report.figures import CLAIMS_FIGURES, STYLE

from ..bench._made_up_study import audited_results
from ._factory import results, without_links, write_run

TIMES = "\N{MULTIPLICATION SIGN}"


@pytest.fixture(scope="module")
def content() -> dict:
    return audited_results()


@pytest.fixture(scope="module")
def data(content, tmp_path_factory) -> ReportData:
    return load_data(write_run(tmp_path_factory.mktemp("audited"), content))


def test_counts_and_every_row_are_told(data, content):
    assert data.run.study is not None
    text = without_links("\n\n".join(study_section(data, data.run.study, [])))
    found = [row["verdict"] for row in content["audit"]]
    assert "Of the 177 figures and statements" in text
    for verdict, said in (
        ("contradicts itself", "are excluded by other claims"),
        ("reproduced", "were reproduced"),
        ("not reproduced", "were not reproduced"),
    ):
        assert f"{found.count(verdict)} {said}" in text
    folded = text[text.index("<details>") : text.index("</details>")]
    assert "<summary>Every claim (177 rows)</summary>\n\n|" in folded
    lines = [line for line in folded.splitlines() if line.startswith("| `")]
    assert len(lines) == 177
    assert {line.count(" | ") for line in lines} == {7}
    # The surprising verdicts come first.
    verdicts = [line.split(" | ")[6] for line in lines]
    order = list(dict.fromkeys(verdicts))
    assert order == sorted(order, key=["contradicts itself", "depends on assumption",
                                       "not reproduced", "reproduced"].index)  # fmt: skip
    assert "| `latency_ms.on_demand.batch1_mean` | 1,045.2 ms | 270 ms |" in folded


def test_surprises_are_the_rows_numbers(data):
    study = data.run.study
    assert study is not None
    sentences = without_links(study_section(data, study, [])[1]).splitlines()
    assert len(sentences) == 4
    hits = study.row("hit_rate_percent.intelligent.mean").ours_otherwise
    assert isinstance(hits, float)
    assert f"`intelligent` hits {hits:.1f} % instead of 78.5 %" in sentences[0]
    assert f"16.0{TIMES} as long as one request" in sentences[1]
    assert f"it takes 6.96{TIMES} (`" in sentences[1]
    # Compute 0.02 of 0.27 s: hiding the rest behind it gives 1 + 0.02 / 0.25.
    assert f"at most 1.08{TIMES}" in sentences[2]
    assert "23.7 requests a second, is ten times what its latency gives (2.37)" in sentences[3]


def test_the_report_puts_figures_beside_the_claims(data):
    text = report_markdown(data, ["latency", *CLAIMS_FIGURES], {})
    section = text[text.index("## The study's claims") : text.index("## Measured on")]
    images = re.findall(r"!\[[^]]*]\(([^)]*)\)", section)
    assert images == [f"figures/{name}.png" for name in CLAIMS_FIGURES]
    assert "claims_budget" not in text[: text.index("## The study's claims")]
    assert "The geometry differs" not in section
    for entry in data.claims["known_conflicts"]:
        assert f"- `{entry['id']}`: " in section


def test_without_an_audit_the_section_says_how_to_make_one(tmp_path: Path):
    plain = load_data(write_run(tmp_path, results(num_runs=2)))
    reasons = dict.fromkeys(CLAIMS_FIGURES, "the run has no audit")
    text = report_markdown(plain, [], reasons)
    assert "`moejax bench --audit`" in text
    assert "the run has no audit" not in text


@pytest.mark.parametrize("name", CLAIMS_FIGURES)
def test_figures_are_drawn(data, name: str):
    with style.context(dict(STYLE), after_reset=True):
        figure = FIGURES[name](data)
        FigureCanvasAgg(figure).draw()
    assert all(axes.lines or axes.patches for axes in figure.axes)
    assert all(axes.get_xlabel() or axes.get_title("left") for axes in figure.axes)
    legends = {text.get_text() for legend in figure.legends for text in legend.get_texts()}
    ticks = {tick.get_text() for axes in figure.axes for tick in axes.get_yticklabels()}
    assert {"oracle", "multi_look", "top_k", "intelligent"} <= legends | ticks
    assert caption(name, data)


def test_the_figures_show_the_cells(data):
    with style.context(dict(STYLE), after_reset=True):
        axes = FIGURES["claims_oracle"](data).axes[0]
    lines = [line for line in axes.lines if len(line.get_xdata()) == 6]
    assert len(lines) == 4
    # 2, 4, 9, 16, 32 and 48 slots of 28 layers x 28.5 MB.
    assert list(lines[0].get_xdata()) == pytest.approx([n * 0.798 for n in (2, 4, 9, 16, 32, 48)])
    study = data.run.study
    expected = study.mean("on_demand", "latency_s") / study.mean("oracle", "latency_s", slots=9)
    assert lines[0].get_ydata()[2] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda c: c.pop("study"), "study is missing"),
        (lambda c: c.pop("audit"), "audit is missing"),
        (lambda c: c["audit"][3].update(verdict="true"), "audit[3].verdict is 'true'"),
        (lambda c: c["audit"][0].update(ours=True), "audit[0].ours is True"),
        (lambda c: c["audit"][0].update(interval=[1.0]), "audit[0].interval"),
        (lambda c: c["audit"][0].update(conflicts=[3]), "audit[0].conflicts"),
        (lambda c: c["study"]["grid"][2].update(latency_s=[]), "study.grid[2] has an empty list"),
        (lambda c: c["study"]["grid"].pop(0), "no cell of on_demand at (1, 'sequential', 32)"),
        (lambda c: c["study"]["facts"].pop("num_experts"), "study.facts.num_experts"),
        (lambda c: c.update(audit=[]), "audit has no row of"),
        (lambda c: c["study"]["settings"]["slots"].pop("stated"), "study.settings.slots.stated"),
    ],
)
def test_a_damaged_audit_is_named(content, tmp_path: Path, spoil, said: str):
    damaged = copy.deepcopy(content)
    spoil(damaged)
    with pytest.raises(BadFileError) as caught:
        load_data(write_run(tmp_path, damaged))
    assert said in str(caught.value)
