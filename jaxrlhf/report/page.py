"""HTML pages in one file: styles, scripts and data are inside, so that a page opens from disk without a network."""

import html
import json
import math
from pathlib import Path
from typing import Any, Literal

STATIC = Path(__file__).parent / "static"
_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<main id="page"><noscript>This page draws its content with JavaScript, which is disabled.</noscript></main>
<script type="application/json" id="data">{data}</script>
<script>
{script}</script>
</body>
</html>
"""


def page(title: str, kind: Literal["run", "compare"], data: Any) -> str:
    """An HTML page that draws `data`, a JSON value, with the script of its `kind`. Floats that are not finite, which
    JSON does not have, become null. The result can be encoded as UTF-8, whatever the texts hold."""
    script = "".join((STATIC / f"{name}.js").read_text(encoding="utf-8") for name in ("report", kind))
    text = _TEMPLATE.format(
        title=html.escape(title),
        style=(STATIC / "report.css").read_text(encoding="utf-8"),
        script=script,
        data=embed(data),
    )
    return text.encode("utf-8", "backslashreplace").decode()  # in JSON, \\udxxx is an unpaired surrogate


def embed(data: Any) -> str:
    """JSON that cannot end the <script> element it stands in, nor a line of a script."""
    text = json.dumps(_finite(data), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
