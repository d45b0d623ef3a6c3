"use strict";

/* One viewer for all cases of a page. NiiVue draws; this file unpacks cases, mixes layers, and has the controls. */

class Viewer {
  static VIEWS = { axial: 0, coronal: 1, sagittal: 2, all: 3, render: 4 };

  constructor(root) {
    this.root = root;
    this.canvas = root.querySelector("canvas");
    this.sliders = [...root.querySelectorAll(".position")];
    this.stops = root.dataset.stops.split(" ").map(Viewer.rgb);
    this.drawn = -1; // the layer that NiiVue holds as its drawing, with lines as thin as the screen's pixels
    this.editable = false;
    this.layers = [];
    this.listeners = [];
  }

  static rgb(hex) {
    return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  async start() {
    this.nv = new niivue.Niivue({
      logLevel: "silent",
      isRadiologicalConvention: true,
      isNearestInterpolation: false,
      crosshairColor: [0.3, 0.9, 1, 0.8],
      crosshairWidth: 0.25,
      crosshairWidthUnit: "percent",
      multiplanarShowRender: 1,
      multiplanarPadPixels: 4,
      dragAndDropEnabled: false,
      isForceMouseClickToVoxelCenters: true,
      viewModeHotKey: "",
      clipPlaneHotKey: "",
      cycleClipPlaneHotKey: "",
      mouseEventConfig: {
        leftButton: { primary: 8, withShift: 3, withCtrl: 9 },
        rightButton: 9,
        centerButton: 3,
      },
    });
    // Keys and wheel are ours; NiiVue's own are heard after these, or not at all.
    this.canvas.addEventListener("keydown", (event) => this.keyOnCanvas(event), true);
    this.canvas.addEventListener("keyup", (event) => event.stopImmediatePropagation(), true);
    this.canvas.addEventListener("wheel", (event) => this.wheel(event), { capture: true, passive: false });
    this.root.addEventListener("keydown", (event) => this.digit(event));
    await this.nv.attachToCanvas(this.canvas, false);
    this.nv.onLocationChange = () => this.tellPlace();
    this.canvas.addEventListener("mousemove", (event) => event.buttons && this.tellWindow());
    this.canvas.addEventListener("mouseup", () => this.tellWindow());
    this.canvas.addEventListener("dblclick", () => this.tellWindow());
    for (const button of this.root.querySelectorAll("[data-view]")) {
      button.addEventListener("click", () => {
        this.chosenView = button.dataset.view;
        this.view(this.chosenView);
      });
    }
    for (const slider of this.sliders) slider.addEventListener("input", () => this.goto(this.sliders.map((s) => Number(s.value))));
    this.find(".preset").addEventListener("change", (event) => {
      const { low, high } = this.head.windows[event.target.value];
      this.window(low, high);
    });
    for (const end of [".low", ".high"]) {
      this.find(end).addEventListener("change", () => this.window(Number(this.find(".low").value), Number(this.find(".high").value)));
    }
    this.find(".reset").addEventListener("click", () => this.resetView());
    addEventListener("beforeprint", () => this.nv.drawScene());
  }

  /* --- cases --------------------------------------------------------------------------------------------------- */

  static async inflate(bytes) {
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  static bytes(base64) {
    const text = atob(base64);
    const found = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) found[i] = text.charCodeAt(i);
    return found;
  }

  /* Show what `pack` in packing.py has packed. */
  async show(packed) {
    const length = new DataView(packed.buffer, packed.byteOffset).getUint32(0, true);
    const head = JSON.parse(new TextDecoder().decode(packed.subarray(4, 4 + length)));
    const body = await Viewer.inflate(packed.subarray(4 + length));
    const [nx, ny, nz] = head.size;
    const count = nx * ny * nz;
    this.grey = new Int16Array(count);
    for (let i = 0; i < count; i++) this.grey[i] = body[i] | (body[count + i] << 8);
    this.head = head;
    const kept = new Map(this.layers.map((layer) => [layer.name, layer]));
    this.layers = head.layers.map((layer, i) => {
      const { shown, opacity, single } = kept.get(layer.name) ?? layer;
      return { ...layer, shown, opacity, single, values: body.subarray((2 + i) * count, (3 + i) * count) };
    });
    this.off = new Set();
    this.drawn = this.layers.findIndex((layer) => layer.line || layer.edited);
    const image = await this.volume("image", 4, 16, this.grey, head.step, head.low);
    const { low, high } = head.windows[0];
    [image.cal_min, image.cal_max] = [low, high];
    this.over = await this.volume("layers", 2304, 32, new Uint8Array(4 * count), 1, 0);
    // NiiVue would draw after each of these steps, which takes seconds without a graphics card.
    this.nv.drawScene = this.nv.updateGLVolume = () => {};
    try {
      for (const volume of [...this.nv.volumes]) this.nv.removeVolume(volume);
      this.nv.drawBitmap = null;
      this.nv.opts.isRadiologicalConvention = !head.flat;
      this.nv.opts.isOrientationTextVisible = !head.flat;
      this.nv.addVolume(image);
      this.nv.addVolume(this.over);
      this.compose();
      delete this.nv.updateGLVolume;
      this.nv.updateGLVolume();
      this.buildControls();
      if (this.drawn >= 0) this.loadDrawing(this.layers[this.drawn].values);
      const first = count > 4e6 ? "axial" : "all";
      this.view(head.flat ? "axial" : this.chosenView ?? first);
      this.tellWindow();
      this.resetView();
      this.goto(head.focus);
    } finally {
      delete this.nv.drawScene;
      delete this.nv.updateGLVolume;
    }
    this.nv.drawScene();
    this.root.dataset.ready = head.name;
  }

  /* A volume for NiiVue: a NIfTI-1 file in memory. */
  async volume(name, code, bits, data, slope, inter) {
    const buffer = new ArrayBuffer(352 + data.byteLength);
    const view = new DataView(buffer);
    const { size, affine } = this.head;
    view.setInt32(0, 348, true);
    [3, ...size, 1, 1, 1, 1].forEach((n, i) => view.setInt16(40 + 2 * i, n, true));
    view.setInt16(70, code, true);
    view.setInt16(72, bits, true);
    const sides = [0, 1, 2].map((k) => Math.hypot(affine[0][k], affine[1][k], affine[2][k]));
    [1, ...sides].forEach((mm, i) => view.setFloat32(76 + 4 * i, mm, true));
    view.setFloat32(108, 352, true);
    view.setFloat32(112, slope, true);
    view.setFloat32(116, inter, true);
    view.setUint8(123, 2); // mm
    view.setInt16(254, 2, true); // sform
    for (let row = 0; row < 3; row++) for (let k = 0; k < 4; k++) view.setFloat32(280 + 16 * row + 4 * k, affine[row][k], true);
    view.setInt32(344, 0x00312b6e, true); // "n+1"
    new Uint8Array(buffer, 352).set(new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
    return niivue.NVImage.new(buffer, `${name}.nii`, "gray", 1);
  }

  /* --- layers -------------------------------------------------------------------------------------------------- */

  /* The colour of each value of a layer, as [r, g, b] or null where nothing is drawn. */
  colours(layer) {
    const single = layer.single ? Viewer.rgb(layer.single) : null;
    if (layer.kind === "map") {
      return Array.from({ length: 256 }, (_, level) => {
        if (!level) return null;
        const at = ((level - 1) / 254) * (this.stops.length - 1);
        const low = Math.min(Math.floor(at), this.stops.length - 2);
        return this.stops[low].map((value, i) => Math.round(value + (this.stops[low + 1][i] - value) * (at - low)));
      });
    }
    const classes = layer.classes ?? this.head.classes;
    const own = layer.classes !== undefined;
    return [null, ...classes.map((one, i) => (!own && this.off.has(i + 1) ? null : single ?? Viewer.rgb(one.colour)))];
  }

  /* Show the layers as they are set now. */
  mix() {
    this.compose();
    this.nv.refreshLayers(this.over, 1);
    this.nv.drawScene();
  }

  /* Lay all layers but the drawn one over each other, into one volume of colours. */
  compose() {
    const target = new Uint32Array(this.over.img.buffer, this.over.img.byteOffset, this.over.img.length / 4).fill(0);
    const bytes = this.over.img;
    this.layers.forEach((layer, number) => {
      if (!layer.shown || number === this.drawn || !layer.opacity) return;
      const alpha = layer.opacity / 100;
      const table = new Uint32Array(256);
      this.colours(layer).forEach((c, i) => {
        if (c) table[i] = ((Math.round(255 * alpha) << 24) | (c[2] << 16) | (c[1] << 8) | c[0]) >>> 0;
      });
      const { values } = layer;
      for (let i = 0; i < values.length; i++) {
        const over = values[i] && table[values[i]];
        if (!over) continue;
        const under = target[i];
        if (!under) {
          target[i] = over;
          continue;
        }
        const a = alpha + (under >>> 24) / 255 * (1 - alpha);
        for (let k = 0; k < 3; k++) {
          const [top, below] = [(over >>> (8 * k)) & 255, bytes[4 * i + k]];
          bytes[4 * i + k] = Math.round(below + (top - below) * (alpha / a));
        }
        bytes[4 * i + 3] = Math.round(255 * a);
      }
    });
    this.paintDrawing();
  }

  /* Colours, opacity and lines of the drawn layer. */
  paintDrawing() {
    if (this.drawn < 0) return;
    const layer = this.layers[this.drawn];
    const lut = new Uint8ClampedArray(1024);
    this.colours(layer).forEach((c, i) => c && layer.shown && lut.set([...c, 255], 4 * i));
    this.nv.drawLut = { lut, labels: Array.from({ length: 256 }, (_, i) => String(i)) };
    const opacity = layer.opacity / 100;
    this.nv.drawOpacity = layer.line ? 0.02 * (opacity > 0) : opacity;
    this.nv.drawRimOpacity = layer.line ? opacity : Math.min(1, 2 * opacity);
  }

  loadDrawing(values) {
    const { nv } = this;
    nv.opts.maxDrawUndoBitmaps = 1; // undoing is ours
    nv.createEmptyDrawing();
    nv.clickToSegmentGrowingBitmap = null;
    nv.drawBitmap.set(values);
    // NiiVue sends the whole drawing to the screen's memory with each move of the pen; of an axial slice that alone will do.
    nv.refreshDrawing = (force = true) => {
      const { gl } = nv;
      const [, nx, ny, nz] = nv.back.dims;
      gl.activeTexture(gl.TEXTURE7);
      gl.bindTexture(gl.TEXTURE_3D, nv.drawTexture);
      gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
      const z = nv.drawPenAxCorSag === 0 ? nv.frac2vox(nv.scene.crosshairPos)[2] : -1;
      const [start, depth] = z >= 0 ? [z, 1] : [0, nz];
      const part = nv.drawBitmap.subarray(start * nx * ny, (start + depth) * nx * ny);
      gl.texSubImage3D(gl.TEXTURE_3D, 0, 0, 0, start, nx, ny, depth, gl.RED, gl.UNSIGNED_BYTE, part);
      if (force) nv.drawScene();
    };
    nv.refreshDrawing(false);
  }

  element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === true) made.setAttribute(name, "");
      else if (value !== false && value !== undefined) made.setAttribute(name, value);
    }
    made.append(...children);
    return made;
  }

  swatch(colour) {
    const made = this.element("span", { class: "swatch", "aria-hidden": "true" });
    made.style.background = colour;
    return made;
  }

  buildControls() {
    const { head } = this;
    this.find(".name").textContent = head.name;
    this.find(".caption").textContent = head.caption;
    this.find(".reduced").textContent = head.note;
    this.find(".reduced").hidden = !head.note;
    this.find(".slices").hidden = head.flat;
    this.find(".views").hidden = head.flat;
    this.sliders.forEach((slider, axis) => {
      slider.max = head.size[axis] - 1;
    });
    this.find(".preset").replaceChildren(...head.windows.map((one, i) => this.element("option", { value: i }, one.name)), this.element("option", { value: "own" }, "own"));
    const colours = [["", "by class"], ...["#ffb000", "#00b4d8", "#e76fff", "#7ae582", "#ff5c5c", "#ffffff"].map((c, i) => [c, ["amber", "blue", "pink", "green", "red", "white"][i]])];
    this.find(".layers").replaceChildren(
      ...this.layers.map((layer) => {
        const box = this.element("input", { type: "checkbox", class: "shown", checked: layer.shown });
        box.addEventListener("change", () => this.set(layer, { shown: box.checked }));
        const opacity = this.element("input", { type: "range", class: "opacity", min: 0, max: 100, step: 5, value: layer.opacity, "aria-label": `Opacity of ${layer.name}, per cent` });
        opacity.addEventListener("input", () => this.set(layer, { opacity: Number(opacity.value) }));
        const own = this.element("span", { class: "own" });
        const row = this.element("div", { class: "layer" }, this.element("label", {}, box, layer.name), own);
        if (layer.kind === "mask") {
          const colour = this.element("select", { class: "colour", "aria-label": `Colour of ${layer.name}` }, ...colours.map(([value, name]) => this.element("option", { value, selected: (layer.single ?? "") === value }, name)));
          colour.addEventListener("change", () => this.set(layer, { single: colour.value }));
          own.append(colour);
        } else if (layer.kind === "map") {
          const scale = this.element("span", { class: "scale", title: "0 to 1" });
          scale.style.background = `linear-gradient(to right, ${this.root.dataset.stops.split(" ").join(", ")})`;
          own.append("0", scale, "1");
        }
        own.append(opacity);
        if (layer.classes) {
          row.append(this.element("ul", { class: "legend" }, ...layer.classes.map((one) => this.element("li", {}, this.swatch(one.colour), one.name))));
        }
        return row;
      }),
    );
    const list = this.find(".classes");
    list.hidden = head.classes.length === 0;
    list.querySelector("div").replaceChildren(
      ...head.classes.map((one, i) => {
        const box = this.element("input", { type: "checkbox", class: "class", checked: true });
        box.addEventListener("change", () => {
          if (box.checked) this.off.delete(i + 1);
          else this.off.add(i + 1);
          this.mix();
        });
        return this.element("label", {}, box, this.swatch(one.colour), one.name);
      }),
    );
  }

  set(layer, values) {
    Object.assign(layer, values);
    this.mix();
    this.tellPlace();
  }

  /* --- where and how ------------------------------------------------------------------------------------------- */

  view(name) {
    this.shownView = name;
    this.nv.setSliceType(Viewer.VIEWS[name]);
    for (const button of this.root.querySelectorAll("[data-view]")) button.setAttribute("aria-pressed", button.dataset.view === name);
  }

  window(low, high) {
    const image = this.nv.volumes[0];
    [image.cal_min, image.cal_max] = [low, Math.max(high, low + 1e-6)];
    this.nv.refreshLayers(image, 0);
    this.nv.drawScene();
    this.tellWindow();
  }

  tellWindow() {
    const { cal_min: low, cal_max: high } = this.nv.volumes[0];
    this.find(".low").value = Number(low.toPrecision(5));
    this.find(".high").value = Number(high.toPrecision(5));
    const preset = this.head.windows.findIndex((one) => one.low === low && one.high === high);
    this.find(".preset").value = preset < 0 ? "own" : preset;
  }

  resetView() {
    this.nv.scene.pan2Dxyzmm = [0, 0, 0, 1];
    this.nv.scene.volScaleMultiplier = 1;
    this.nv.setRenderAzimuthElevation(110, 10);
    this.nv.drawScene();
  }

  voxel() {
    return [...this.nv.frac2vox(this.nv.scene.crosshairPos)].slice(0, 3);
  }

  index([x, y, z] = this.voxel()) {
    const [nx, ny] = this.head.size;
    return x + nx * (y + ny * z);
  }

  goto(voxel) {
    const inside = voxel.map((v, axis) => Math.min(Math.max(Math.round(v), 0), this.head.size[axis] - 1));
    this.nv.scene.crosshairPos = this.nv.vox2frac(inside);
    this.nv.createOnLocationChange();
    this.nv.drawScene();
  }

  /* Put the crosshair to a place in mm, towards right, front and up. */
  gotoPlace(mm) {
    const a = this.head.affine;
    // The axes are at right angles: the inverse is the transpose, divided by the squared sides.
    const from = mm.map((v, i) => v - a[i][3]);
    this.goto([0, 1, 2].map((k) => {
      const side = a[0][k] ** 2 + a[1][k] ** 2 + a[2][k] ** 2;
      return (a[0][k] * from[0] + a[1][k] * from[1] + a[2][k] * from[2]) / side;
    }));
  }

  tellPlace() {
    if (!this.head) return;
    const { head } = this;
    const voxel = this.voxel();
    const at = this.index(voxel);
    const mm = [0, 1, 2].map((i) => head.affine[i][3] + voxel.reduce((sum, v, k) => sum + v * head.affine[i][k], 0));
    const letters = [["L", "R"], ["P", "A"], ["I", "S"]];
    const place = head.flat
      ? `x ${mm[0].toFixed(1)}, y ${((head.size[1] - 1 - voxel[1]) * head.affine[1][1]).toFixed(1)} mm`
      : mm.map((v, i) => `${letters[i][Number(v >= 0)]} ${Math.abs(v).toFixed(1)}`).join(", ") + " mm";
    const words = [place, `value ${Number((head.low + head.step * this.grey[at]).toPrecision(4))}`];
    this.layers.forEach((layer, number) => {
      const value = number === this.drawn ? this.nv.drawBitmap[at] : layer.values[at];
      if (layer.kind === "map") {
        if (value) words.push(`${layer.name} ${((value - 1) / 254).toFixed(2)}`);
      } else if (value || layer.kind === "mask") {
        words.push(`${layer.name}: ${value ? (layer.classes ?? head.classes)[value - 1].name : "background"}`);
      }
    });
    this.find(".place").textContent = words.join(" · ");
    this.sliders.forEach((slider, axis) => {
      slider.value = voxel[axis];
      const text = `${voxel[axis] + 1} of ${head.size[axis]}`;
      slider.setAttribute("aria-valuetext", `slice ${text}`);
      slider.parentElement.querySelector(".at").textContent = text;
    });
    const shown = this.layers.filter((layer) => layer.shown).map((layer) => layer.name).join(", ") || "the scan alone";
    this.canvas.setAttribute("aria-label", `${head.name}, ${place}; shown: ${shown}`);
    for (const listener of this.listeners) listener();
  }

  /* --- keys and wheel ------------------------------------------------------------------------------------------ */

  keyOnCanvas(event) {
    event.stopPropagation();
    if (this.digit(event) || event.ctrlKey || event.altKey || event.metaKey) return;
    const side = this.head.flat ? 1 : -1; // a radiologist has the patient's right on the left
    const plane = { coronal: 1, sagittal: 0 }[this.shownView] ?? 2;
    const through = [0, 0, 0].map((_, axis) => Number(axis === plane));
    const across = plane === 0 ? [0, 1, 0] : [side, 0, 0];
    const along = plane === 2 ? [0, 1, 0] : [0, 0, 1];
    const [move, times] = {
      ArrowLeft: [across, -1], ArrowRight: [across, 1], ArrowUp: [along, 1], ArrowDown: [along, -1],
      PageUp: [through, 1], PageDown: [through, -1],
    }[event.key] ?? [];
    event.stopImmediatePropagation();
    if (!move) {
      this.onKey?.(event);
      return;
    }
    event.preventDefault();
    this.goto(this.voxel().map((v, axis) => v + times * move[axis]));
  }

  /* A digit switches the layer of that number. */
  digit(event) {
    if (event.ctrlKey || event.altKey || event.metaKey || /^(number|text)$/.test(event.target.type ?? "")) return false;
    const box = this.root.querySelectorAll(".shown")[Number(event.key) - 1];
    if (!box) return false;
    box.click();
    event.preventDefault();
    return true;
  }

  wheel(event) {
    // Until the picture is clicked or reached by Tab the page scrolls, as it does elsewhere.
    if (document.activeElement !== this.canvas && !event.ctrlKey) event.stopImmediatePropagation();
    else this.nv.opts.dragMode = event.ctrlKey ? 3 : 9;
  }
}

/* The cases that the page itself holds. */
async function openPage(root) {
  const packed = [...root.querySelectorAll(".packed")];
  const names = [...root.querySelectorAll(".case option")].map((option) => option.textContent);
  if (!packed.length) return;
  const viewer = new Viewer(root);
  root.viewer = viewer;
  await viewer.start();
  let turn = 0;
  const open = async (number, mm = "") => {
    const mine = ++turn;
    const content = Viewer.bytes(packed[number].textContent);
    if (mine !== turn) return;
    await viewer.show(content);
    if (root.querySelector(".case")) root.querySelector(".case").value = number;
    if (mm) viewer.gotoPlace(mm.split(" ").map(Number));
  };
  root.querySelector(".case")?.addEventListener("change", (event) => open(Number(event.target.value)));
  for (const button of document.querySelectorAll("button.open")) {
    const number = names.length ? names.indexOf(button.dataset.case) : 0;
    button.addEventListener("click", async () => {
      await open(number, button.dataset.mm);
      root.scrollIntoView({ block: "start" });
      viewer.canvas.focus({ preventScroll: true });
    });
  }
  await open(0);
}

(async () => {
  for (const root of document.querySelectorAll(".viewer")) {
    try {
      await openPage(root);
    } catch (error) {
      const note = document.createElement("p");
      note.className = "note failed";
      note.textContent = `This browser cannot show the scans (${error}); one of 2023 or later with WebGL2 can.`;
      root.append(note);
    }
  }
  document.documentElement.dataset.ready = "";
})();
