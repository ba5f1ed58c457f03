"""Tables and figures that hold texts of others: none of it becomes markup or a formula."""

from html.parser import HTMLParser

import pandas as pd

from neft_utils.compare import run_plots, tables

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
