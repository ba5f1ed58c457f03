"""Tables of older runs, and texts of others in tables and figures: no markup and no formula."""

import shutil
from html.parser import HTMLParser

import pandas as pd
import pytest

from neft_utils.base.files import ROOT
from neft_utils.compare import run_plots, tables
from neft_utils.compare.results import Results
from neft_utils.compare.runs import OlderItems

EVIL = "<script>alert('x')</script><img src=x onerror=alert(9)> & </td> $\\frac{1}{0}$"


class Tags(HTMLParser):
    """The tags of a page and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


def test_texts_in_cells_rows_and_columns_are_text():
    index = pd.Index([f"asked {EVIL}"], name="prompt")
    frame = pd.DataFrame({f"arm {EVIL}": [f"said {EVIL}"]}, index=index)
    page = Tags(tables.escaped(frame).to_html())
    assert page.tags == {"style", "table", "thead", "tr", "th", "tbody", "td"}
    for where in ("asked", "arm", "said"):
        assert f"{where} {EVIL}" in page.text
    assert "mathjax_ignore" in tables.escaped(frame).to_html()  # else $ begins a formula


def test_a_file_name_in_a_figure_is_no_formula(tmp_path):
    figure = run_plots.funnel([{"step": "rows of $\\frac$.json", "rows": 3}])
    figure.savefig(tmp_path / "funnel.png")  # a formula is read when it is drawn
    assert figure.axes[0].get_yticklabels()[0].get_text() == "rows of \\$\\frac\\$.json"


def test_items_of_an_older_version_are_read_and_what_they_lack_is_named(tmp_path):
    """Two stored runs, as they were scored without wrong answers, and then with them."""
    folder = tmp_path / "cpu"
    for run in ("baseline-s0", "neft_a15-s0"):
        shutil.copytree(
            ROOT / "results" / "reference" / "cpu" / "runs" / run, folder / "runs" / run
        )
        path = folder / "runs" / run / "task_items.csv"
        items = pd.read_csv(path)
        items[["task", "item_id", "correct", "gold_logprob", "correct_norm"]].to_csv(path)
    missing = ["arithmetic", "arithmetic_accuracy", "knowledge", "knowledge_accuracy"]
    old = Results(folder)
    assert old.seeds[missing].isna().all(axis=None) and old.seeds.siqa.notna().all()
    assert old.ledger["reasoning"].interval is None is old.ledger["no_new_knowledge"].interval
    (note,) = (one for one in old.caveats if isinstance(one, OlderItems))
    assert note.runs == ("baseline-s0", "neft_a15-s0")
    assert "arithmetic, knowledge and their accuracies are missing" in str(note)
    for run, margin in (("baseline-s0", 0.5), ("neft_a15-s0", -0.25)):
        path = folder / "runs" / run / "task_items.csv"
        pd.read_csv(path).assign(margin=margin).to_csv(path)
    new = Results(folder)
    assert not any(isinstance(one, OlderItems) for one in new.caveats)
    values = new.seeds.set_index("arm")[missing].to_dict("index")
    assert list(values["baseline"].values()) == [0.5, 1.0, 0.5, 1.0]
    assert list(values["neft_a15"].values()) == [-0.25, 0.0, -0.25, 0.0]
    assert new.ledger["reasoning"].estimate == pytest.approx(-0.75)
