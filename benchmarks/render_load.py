"""Write the table of docs/serve.md from benchmarks/load.json, the record of `benchmarks/load.py`.

`make load` measures and renders; `python benchmarks/render_load.py` renders only.
"""

import json
import re
from pathlib import Path
from typing import Any

from load import HEADING, Row, markdown_row

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "load.json"
DOCUMENT = ROOT / "docs" / "serve.md"
BETWEEN = re.compile(r"(?<=<!-- load -->\n).*?(?=<!-- /load -->)", re.DOTALL)


def rendered(document: str, record: dict[str, Any]) -> str:
    """The document with the table of a record, and what it was measured with."""
    options, machine = record["options"], record["machine"]
    rows = [markdown_row(Row(**row)) for row in record["rows"]]
    most = ", ".join(f"{name} {rate:.0f}" for name, rate in record["saturation_requests_per_second"].items())
    told = (
        f"`{options['model']}` beside `{options['dense']}`, requests of {options['pictures']} pictures of "
        f"{options['images']:,}, target {options['target']:g} ms, {options['seconds']:g} s for each load; requests a "
        f"second at most: {most}. {machine['cpu']}, {machine['cores']} cores."
    )
    table = "\n".join([HEADING, *rows, "", told, ""])
    return BETWEEN.sub(lambda _: table, document)


if __name__ == "__main__":
    DOCUMENT.write_text(rendered(DOCUMENT.read_text(), json.loads(RECORD.read_text())))
