"""HTML pages about runs and models: one file each, drawn from embedded data, for reading without a network.

`page` makes the file; `static/` has the styles and scripts of all pages.
"""

from jaxrlhf.report.page import page
