"""The report of a bench run as Markdown, HTML and figures, from `results.json` alone."""

from ._claims import audit as audit
from ._compare import Compared as Compared
from ._compare import Comparison as Comparison
from ._compare import compare as compare
from ._constraints import parse_constraints as parse_constraints
from ._data import ReportData as ReportData
from ._data import load_data as load_data
from ._markdown import report_markdown as report_markdown
from ._money import parse_prices as parse_prices
from ._numbers import format_field as format_field
from ._run import read_run as read_run
from ._selection_text import selection_rows as selection_rows
from ._summary import summarise as summarise
from ._write import page_of as page_of
from ._write import write_page as write_page
from ._write import write_report as write_report
from .figures import FIGURES as FIGURES
from .page import page_html as page_html
