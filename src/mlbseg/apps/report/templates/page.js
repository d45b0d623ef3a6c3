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

/* --- slices ---------------------------------------------------------------------------------------------------- */

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

/* A map's 256 colours; 0 stands for no value. */
function ramp(stops) {
  const colours = stops.map(rgb);
  return Array.from({ length: 256 }, (_, level) => {
    const at = (Math.max(level - 1, 0) / 254) * (colours.length - 1);
    const low = Math.min(Math.floor(at), colours.length - 2);
    return colours[low].map((value, i) => Math.round(value + (colours[low + 1][i] - value) * (at - low)));
  });
}

async function inflated(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

class Browser {
  constructor(root) {
    this.root = root;
    this.data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
    this.canvas = root.querySelector("canvas");
    this.position = root.querySelector(".position");
    this.place = root.querySelector(".place");
    this.shown = [...root.querySelectorAll(".shown")];
    this.opacity = [...root.querySelectorAll(".opacity")];
    this.tile = document.createElement("canvas");
    [this.tile.width, this.tile.height] = this.data.size;
  }

  async start() {
    this.image = new Image();
    this.image.src = this.data.image;
    await this.image.decode();
    for (const layer of this.data.layers) {
      layer.values = await inflated(layer.data);
      delete layer.data;
      layer.ramp = layer.style === "map" ? ramp(this.data.stops) : [[0, 0, 0], ...layer.colours.map(rgb)];
    }
    this.root.addEventListener("input", () => this.draw());
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("click", () => this.position?.focus());
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    this.draw();
    this.root.dataset.ready = "";
  }

  /* A digit switches the layer of that number. */
  key(event) {
    const box = this.shown[Number(event.key) - 1];
    if (!box || event.ctrlKey || event.altKey || event.metaKey) return;
    box.checked = !box.checked;
    event.preventDefault();
    this.draw();
  }

  draw() {
    const { data, canvas } = this;
    const at = this.position ? Number(this.position.value) : 0;
    const [width, height] = data.size;
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * devicePixelRatio));
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * devicePixelRatio));
    const pen = canvas.getContext("2d");
    pen.imageSmoothingQuality = "high";
    const [column, row] = [at % data.columns, Math.floor(at / data.columns)];
    pen.drawImage(this.image, column * width, row * height, width, height, 0, 0, canvas.width, canvas.height);
    const visible = data.layers.filter((_, i) => this.shown[i].checked);
    const lines = (layer) => layer.style === "line" || layer.style === "dash";
    // Lines come last, so that no area hides them.
    const order = [...data.layers.keys()].sort((a, b) => lines(data.layers[a]) - lines(data.layers[b]));
    order.forEach((i) => {
      const layer = data.layers[i];
      if (!this.shown[i].checked) return;
      const values = layer.values.subarray(at * width * height, (at + 1) * width * height);
      pen.globalAlpha = this.opacity[i].value / 100;
      if (lines(layer)) this.outline(pen, layer, values);
      else this.fill(pen, layer, values);
    });
    pen.globalAlpha = 1;
    const words = data.of > 1 ? `${data.slices[at]} of ${data.of}` : "";
    if (this.place) this.place.textContent = words;
    this.position?.setAttribute("aria-valuetext", `slice ${words}`);
    const over = visible.map((layer) => layer.name).join(", ") || "the scan alone";
    canvas.setAttribute("aria-label", `${data.name}${words ? `, slice ${words}` : ""}; shown: ${over}`);
    for (const item of this.root.querySelectorAll(".legend [data-for]")) {
      const wanted = item.dataset.for;
      item.hidden = !visible.some((layer) => wanted === `map ${layer.name}` || (wanted === "differ" && layer.differs));
    }
  }

  fill(pen, layer, values) {
    const [width, height] = this.data.size;
    const small = this.tile.getContext("2d");
    const pixels = small.createImageData(width, height);
    values.forEach((value, i) => {
      if (value) pixels.data.set([...layer.ramp[value], 255], 4 * i);
    });
    small.putImageData(pixels, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(this.tile, 0, 0, pen.canvas.width, pen.canvas.height);
    pen.imageSmoothingEnabled = true;
  }

  /* The edges between pixels of different classes, as lines that stay thin however large a pixel is drawn. */
  outline(pen, layer, values) {
    const [width, height] = this.data.size;
    const [dx, dy] = [pen.canvas.width / width, pen.canvas.height / height];
    const paths = layer.colours.map(() => new Path2D());
    const edge = (a, b, x0, y0, x1, y1) => {
      if (a === b) return;
      const path = paths[(b || a) - 1];
      path.moveTo(x0 * dx, y0 * dy);
      path.lineTo(x1 * dx, y1 * dy);
    };
    for (let y = 0; y <= height; y++) {
      for (let x = 0; x <= width; x++) {
        const here = x < width && y < height ? values[y * width + x] : 0;
        const left = x > 0 && y < height ? values[y * width + x - 1] : 0;
        const above = y > 0 && x < width ? values[(y - 1) * width + x] : 0;
        if (y < height) edge(left, here, x, y, x, y + 1);
        if (x < width) edge(above, here, x, y, x + 1, y);
      }
    }
    pen.lineWidth = 1.75 * devicePixelRatio;
    pen.lineCap = "round";
    pen.setLineDash(layer.style === "dash" ? [3 * devicePixelRatio, 5 * devicePixelRatio] : []);
    paths.forEach((path, i) => {
      pen.strokeStyle = layer.colours[i];
      pen.stroke(path);
    });
    pen.setLineDash([]);
  }
}

/* One after the other, so that the first are there at once on a page of many. */
(async () => {
  for (const root of document.querySelectorAll(".browser")) {
    try {
      await new Browser(root).start();
    } catch (error) {
      const note = document.createElement("p");
      note.className = "note";
      note.textContent = `This browser cannot show the slices (${error}); a version of 2023 or later can.`;
      root.append(note);
    }
  }
  document.documentElement.dataset.ready = "";
})();

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
