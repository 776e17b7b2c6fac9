// Tables of more than eight rows are sorted by a press on a header: upwards, downwards, as written.
// What is to be read from top to bottom has the class in-order, and stays so.
const SORTABLE = 8;

// A number at the start of a cell, such as "−2.5 × 10⁻³ ± 0.1", or the text of the cell.
function valueOf(row, column) {
  const cell = row.cells[column].cloneNode(true);
  cell.querySelectorAll("sup").forEach((power) => power.replaceWith(`^${power.textContent}`));
  const text = cell.textContent.trim().replaceAll("−", "-").replace(/(\d),(?=\d{3})/g, "$1");
  const number = text.replace(/(?:([\d.]+)\s×\s)?10\^(?=-?\d)/, (_, factor) => `${factor ?? 1}e`);
  return /^[-+]?\d/.test(number) ? parseFloat(number) : text;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
  return a.localeCompare(b, document.documentElement.lang, { numeric: true });
}

function sort(table, rows, header) {
  const next = { ascending: "descending", descending: null }[header.ariaSort];
  const order = next === undefined ? "ascending" : next;
  table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
  if (order) header.ariaSort = order;
  const sign = order === "descending" ? -1 : 1, column = header.cellIndex;
  const by = (a, b) => sign * compare(valueOf(a, column), valueOf(b, column));
  table.tBodies[0].append(...(order ? [...rows].sort(by) : rows));
}

for (const table of document.querySelectorAll("article table.table:has(> thead):not(.in-order, :has(> thead a))")) {
  const rows = [...(table.tBodies[0]?.rows ?? [])];
  if (rows.length <= SORTABLE || table.tHead.rows.length > 1 || table.querySelector("[rowspan], [colspan]")) continue;
  for (const header of table.tHead.rows[0].cells) {
    if (!header.textContent.trim()) continue; // above names
    const button = document.createElement("button");
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => sort(table, rows, header));
  }
}
