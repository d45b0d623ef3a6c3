"use strict";

/* --- light and dark ------------------------------------------------------------------------------------------- */

const theme = document.getElementById("theme");
const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  const asked = document.documentElement.dataset.theme;
  return asked ? asked === "dark" : prefersDark.matches;
}

function nameTheme() {
  theme.textContent = isDark() ? "Light page" : "Dark page";
}

theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
});
prefersDark.addEventListener("change", nameTheme);
theme.hidden = false;
nameTheme();

/* --- tables ---------------------------------------------------------------------------------------------------- */

const collator = new Intl.Collator(undefined, { numeric: true });

function order(row, column) {
  const cell = row.cells[column];
  return cell.dataset.order ?? cell.textContent.trim();
}

function number(text) {
  return text === "-inf" ? -Infinity : text === "" ? NaN : Number(text);
}

function compare(a, b) {
  const [x, y] = [number(a), number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? collator.compare(a, b) : x === y ? 0 : x < y ? -1 : 1;
}

for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => (down ? -1 : 1) * compare(order(a, column), order(b, column)));
      table.tBodies[0].append(...rows);
    });
  });
}

/* --- paper ----------------------------------------------------------------------------------------------------- */

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = true;
    details.dataset.opened = "";
  }
});
addEventListener("afterprint", () => {
  for (const details of document.querySelectorAll("details[data-opened]")) {
    details.open = false;
    delete details.dataset.opened;
  }
});

if (!document.querySelector(".viewer")) document.documentElement.dataset.ready = "";
