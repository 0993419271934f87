"""What is wrong with how a page looks and reads: axe-core, and parts that are cut off."""

from pathlib import Path

import pytest
from playwright.async_api import Page

_FOLDER = Path(__file__).parents[1] / "acceptance"

RUN = """async () => (await axe.run()).violations.map(({ id, help, nodes }) =>
  `${id}: ${help}: ${nodes.slice(0, 3).map(({ html, failureSummary }) => html + " " + failureSummary).join("; ")}`)"""

# Nothing is outside the page unless an ancestor scrolls or shortens it, and text is shortened only with an ellipsis.
CUT_OFF = """() => {
  const wide = document.documentElement.scrollWidth - innerWidth;
  const found = wide > 0 ? [`the page is ${wide} px too wide`] : [];
  const scrolls = (element) => element
    && (getComputedStyle(element).overflowX !== "visible" || scrolls(element.parentElement));
  for (const element of document.querySelectorAll("body *")) {
    const box = element.getBoundingClientRect();
    const { overflowX, textOverflow, clipPath, visibility } = getComputedStyle(element);
    if (!box.width || !box.height || clipPath !== "none" || visibility === "hidden") continue;
    if ((box.right > innerWidth + 1 || box.left < -1) && !scrolls(element.parentElement)) {
      found.push(`outside: ${element.outerHTML.slice(0, 120)}`);
    }
    const isShortened = overflowX === "hidden" && element.scrollWidth > element.clientWidth + 1;
    if (isShortened && textOverflow !== "ellipsis" && !element.childElementCount) {
      found.push(`cut: ${element.outerHTML.slice(0, 120)}`);
    }
  }
  return found;
}"""


async def violations(page: Page) -> list[str]:
    """What axe-core finds. Skips the test where it is not installed."""
    script = _FOLDER / "node_modules/axe-core/axe.min.js"
    if not script.exists():
        pytest.skip(f"There is no axe-core here: run npm install in {_FOLDER}.")
    await page.evaluate(script.read_text(encoding="utf-8"))
    found: list[str] = await page.evaluate(RUN)
    return found


async def cut_off(page: Page) -> list[str]:
    """What is wider than the page, or cut."""
    found: list[str] = await page.evaluate(CUT_OFF)
    return found
