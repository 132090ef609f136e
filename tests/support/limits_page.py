"""The table of limits in docs/security.md, made of the limits themselves.

    python -m tests.support.limits_page

writes it again; a test holds the page to it.
"""

from __future__ import annotations

from splitonnx.runtime.limits import list_limits
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "security.md"
HEAD = "| limit | default | of what | beyond it |\n| --- | --: | --- | --- |\n"


def render_table() -> str:
    """Write the table, from its head to the end of its last row."""
    rows = (
        f"| {limit.name} | {limit.unset or f'{limit.default:.0f}'} | "
        f"{limit.text[0].lower()}{limit.text[1:]} | {limit.beyond} |\n"
        for limit in list_limits()
    )
    return HEAD + "".join(rows)


def replace_table(page: str) -> str:
    """Replace the table of a page by the one that holds now."""
    before, _, rest = page.partition(HEAD)
    _, _, after = rest.partition("\n\n")
    return f"{before}{render_table()}\n{after}"


if __name__ == "__main__":
    PAGE.write_text(replace_table(PAGE.read_text()))
