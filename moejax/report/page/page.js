"use strict";

// Numbers as the report writes them: 28.7 ms, 1.66 GB, 25.4 GB/s, 1,440, 6.7 %, 2.61×.
const UNITS = {
  ns: 1e-9, us: 1e-6, ms: 1e-3, s: 1, B: 1, kB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12,
  GFLOP: 1e9, TFLOP: 1e12,
};

function numberIn(text) {
  const found = text.match(/([-−+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?)\s*([A-Za-z]*)/);
  if (!found) return null;
  return Number(found[1].replaceAll(",", "").replace("−", "-")) * (UNITS[found[2]] ?? 1);
}

function keyOf(row, column, isNumber) {
  const text = row.cells[column].textContent.trim();
  return isNumber ? numberIn(text) : text;
}

// What has no value comes last in both directions.
function compare(a, b, direction) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a === "string") return direction * a.localeCompare(b, "en", { numeric: true });
  return direction * (a - b);
}

function sortBy(table, column, header) {
  const isUp = header.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", isUp ? "descending" : "ascending");
  const isNumber = header.classList.contains("number");
  const body = table.tBodies[0];
  const keyed = [...body.rows].map((row) => [keyOf(row, column, isNumber), row]);
  keyed.sort((a, b) => compare(a[0], b[0], isUp ? -1 : 1));
  body.append(...keyed.map((pair) => pair[1]));
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = "Sort by this column";
    button.append(...header.childNodes);
    button.addEventListener("click", () => sortBy(table, column, header));
    header.append(button);
  });
}

// A link into something folded opens it.
function reveal() {
  const target = document.getElementById(location.hash.slice(1));
  if (!target) return;
  for (let fold = target.closest("details"); fold; fold = fold.parentElement.closest("details")) {
    fold.open = true;
  }
  target.scrollIntoView();
}
addEventListener("hashchange", reveal);
reveal();

// On a small screen the contents would fill the first page.
const isNarrow = matchMedia("(max-width: 70rem)");
const contents = document.querySelector("details.contents");
function fold() { contents.open = !isNarrow.matches; }
isNarrow.addEventListener("change", fold);
fold();
