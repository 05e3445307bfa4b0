"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const body = document.querySelector("#table tbody"), heads = [...document.querySelectorAll("#table thead th")];
const number = (text) => {
  const found = parseFloat(text);  // "67.20 ± 1.90" is 67.2, "-" is no number
  return Number.isNaN(found) ? null : found;
};
heads.forEach((head, column) => {
  head.querySelector("button").addEventListener("click", () => {
    const downward = head.getAttribute("aria-sort") !== "descending";
    for (const other of heads) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", downward ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => [row, row.cells[column].textContent]);
    rows.sort(([, a], [, b]) => {
      const [x, y] = [number(a), number(b)];
      if (column === 0) return downward ? b.localeCompare(a) : a.localeCompare(b);
      if (x === null || y === null) return (x === null) - (y === null);  // what is not defined stays below
      return downward ? y - x : x - y;
    });
    body.append(...rows.map(([row]) => row));
  });
});
document.getElementById("search").addEventListener("input", (event) => {
  const needle = event.target.value.trim().toLowerCase();
  for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(needle);
});
drawAll(data.charts);
