"""The report as one HTML file that needs nothing else: no network, no file beside it."""

from ._document import page_html as page_html
