"""HTML pages about runs and models: one file each, drawn from embedded data, for reading without a network.

`run` collects what the report of a run shows, with `curves`, `tokens` and `verdict`; `page` makes the file; `static/`
has the styles and scripts of all pages.
"""

from jaxrlhf.report.page import page
from jaxrlhf.report.run import REPORT, write
