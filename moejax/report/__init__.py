"""The report of a bench run as Markdown, HTML and figures, from `results.json` alone."""

from ._claims import audit as audit
from ._data import ReportData as ReportData
from ._data import load_data as load_data
from ._markdown import report_markdown as report_markdown
from ._run import read_run as read_run
from ._summary import summarise as summarise
from ._write import write_report as write_report
from .figures import FIGURES as FIGURES
from .page import page_html as page_html
