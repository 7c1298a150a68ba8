"use strict";
// A heading sorts by its column: figures from the greatest, words from A; once more the other way round.
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, body = document.querySelector("tbody"), at = head.cellIndex;
  const isFigure = head.classList.contains("figure"), before = head.ariaSort;
  const order = before ? (before === "ascending" ? "descending" : "ascending") : isFigure ? "descending" : "ascending";
  for (const other of head.parentElement.cells) other.ariaSort = null;
  head.ariaSort = order;
  const value = (row) => {
    const text = row.cells[at].innerText;
    return isFigure ? parseFloat(text.replace(/,/g, "")) : text;
  };
  const isKnown = (row) => !isFigure || !Number.isNaN(value(row));
  const compare = (a, b) => (isFigure ? value(a) - value(b) : value(a).localeCompare(value(b)));
  const sign = order === "ascending" ? 1 : -1;
  body.append(...[...body.rows].sort((a, b) => isKnown(b) - isKnown(a) || (isKnown(a) && sign * compare(a, b))));
});
