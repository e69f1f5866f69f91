"""What TensorBoard's pages show, read from the browser."""

import time
from typing import Any, NamedTuple

WALK = """
function all(root, found) {
  for (const e of root.querySelectorAll("*")) {
    found.push(e);
    if (e.shadowRoot) all(e.shadowRoot, found);
  }
  return found;
}
"""
OPEN = (
    WALK
    + """
for (const head of all(document, []).filter(e => e.matches("button.heading"))) {
  const content = head.parentNode.querySelector("iron-collapse");
  if (content && !content.opened) head.click();
}
"""
)
CHARTS = (
    WALK
    + """
const cards = all(document, []).filter(
  e => /^TF-(CUSTOM-SCALAR-.*-CARD|SCALAR-CARD)$/.test(e.tagName));
return cards.map(card => {
  const inner = all(card.shadowRoot || card, []);
  const head = inner.find(e => e.tagName === "TF-CARD-HEADING");
  const names = all(head.shadowRoot || head, []).filter(e => e.matches("[itemprop=name], .name"));
  return [
    names.map(e => e.textContent.trim()).join(" "),
    inner.filter(e => e.matches(".error-content")).map(e => e.textContent.trim()).join(" "),
    inner.filter(e => e.matches(".render-area path") && e.getAttribute("d")).length,
  ];
});
"""
)


class Chart(NamedTuple):
    """A chart of a page.

    Attributes:
        title: Its heading.
        error: What its red boxes say, also those that are folded away.
        drawn: How many lines, areas and points it draws.
    """

    title: str
    error: str
    drawn: int


def charts(driver: Any, address: str, patience: float = 60) -> list[Chart]:
    """The charts of a page with all of its groups unfolded, once they have their data.

    Args:
        driver: Of the browser.
        address: Of the page.
        patience: Seconds after which charts that draw nothing are taken for empty ones.
    """
    driver.set_window_size(1300, 4000)
    driver.get("about:blank")
    driver.get(address)
    until, found = time.monotonic() + patience, []
    while time.monotonic() < until:
        time.sleep(1)
        before = found
        driver.execute_script(OPEN)
        found = [Chart(*c) for c in driver.execute_script(CHARTS)]
        settled = len(found) == len(before) and bool(found)
        if settled and (all(c.drawn for c in found) or any(c.error for c in found)):
            break
    return found
