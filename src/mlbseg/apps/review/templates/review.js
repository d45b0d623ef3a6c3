"use strict";

/* Correcting labels in the viewer, and the server's side of it. The address of the page holds the token. */

class Review {
  constructor(root) {
    this.root = root;
    this.viewer = new Viewer(root);
    root.viewer = this.viewer;
    root.review = this;
    this.said = document.querySelector(".said");
    this.rows = [...document.querySelectorAll("tr[data-number]")];
    this.number = -1;
  }

  find(selector) {
    return document.querySelector(selector);
  }

  say(words) {
    this.said.textContent = words;
  }

  async ask(address, options = {}) {
    const answer = await fetch(address, { ...options, cache: "no-store" });
    if (answer.ok) return answer;
    let words = `${answer.status}`;
    try {
      words = (await answer.json()).error;
    } catch (error) {
      words += ` ${error}`;
    }
    throw Object.assign(new Error(words), { status: answer.status });
  }

  post(address, body = "{}", type = "application/json") {
    return this.ask(address, { method: "POST", headers: { "Content-Type": type }, body });
  }

  /* Do something for a button, and say what went wrong. */
  on(selector, action) {
    this.find(selector)?.addEventListener("click", () => this.attempt(action));
  }

  async attempt(action) {
    try {
      await action();
    } catch (error) {
      this.say(`Not done: ${error.message}`);
    }
  }

  async start() {
    await this.viewer.start();
    this.viewer.nv.onDrawingChanged = (action) => action === "draw" && this.remember();
    this.viewer.onKey = (event) => {
      const selector = { u: ".undo", n: ".copy", t: ".take", s: ".save", a: ".accept" }[event.key.toLowerCase()];
      if (event.key.toLowerCase() === "d") this.find(".draw").click();
      if (event.key.toLowerCase() === "e") {
        this.find(".tool").value = "eraser";
        this.setPen();
      }
      if (selector) this.find(selector).click();
    };
    for (const name of [".draw", ".pen-class", ".tool", ".pen-size"]) this.find(name).addEventListener("change", () => this.setPen());
    this.on(".undo", () => this.undo());
    this.on(".copy", () => this.copy());
    this.on(".take", () => this.take());
    this.on(".take-all", () => this.change((drawing) => drawing.set(this.prediction())));
    this.on(".save", () => this.save());
    for (const [name, what] of [[".accept", "accept"], [".reject", "reject"], [".pass", "skip"]]) this.on(name, () => this.mark(what));
    this.on(".audit", () => this.audit());
    this.on(".merge", () => this.merge());
    this.on(".theirs", () => this.reload());
    this.on(".train", () => this.train());
    this.on(".earlier", () => this.leave() && this.open(this.number, this.head.part - 1));
    this.on(".later", () => this.leave() && this.open(this.number, this.head.part + 1));
    for (const row of this.rows) {
      row.querySelector(".pick").addEventListener("click", () => this.attempt(() => this.leave() && this.open(Number(row.dataset.number))));
    }
    addEventListener("beforeunload", (event) => this.changed() && event.preventDefault());
    if (this.find(".train")) this.attempt(() => this.follow());
    await this.attempt(() => this.open(this.next(-1)));
  }

  /* Say whether what is open may be left. */
  leave() {
    return !this.changed() || confirm("What you have drawn is not saved. Leave it?");
  }

  next(number) {
    const done = (row) => /^(save|accept|reject|skip) /.test(row.querySelector(".state").textContent);
    const after = this.rows.slice(number + 1).find((row) => !done(row)) ?? this.rows[number + 1] ?? this.rows[0];
    return Number(after.dataset.number);
  }

  async fetchCase(number, part) {
    const answer = await this.ask(`case/${number}${part === undefined ? "" : `?part=${part}`}`);
    return new Uint8Array(await answer.arrayBuffer());
  }

  async open(number, part) {
    this.say("opening ...");
    const began = performance.now();
    const packed = await this.fetchCase(number, part);
    this.number = number;
    await this.show(packed);
    this.base = this.drawing().slice();
    this.before = this.base.slice();
    this.undone = [];
    for (const row of this.rows) row.toggleAttribute("aria-current", Number(row.dataset.number) === number);
    this.say(this.head.readonly ? `Cannot be corrected here: ${this.head.readonly}` : `opened in ${((performance.now() - began) / 1000).toFixed(1)} s`);
    if (this.head.predicting) this.awaitPrediction(number);
  }

  async show(packed) {
    const length = new DataView(packed.buffer, packed.byteOffset).getUint32(0, true);
    const head = JSON.parse(new TextDecoder().decode(packed.subarray(4, 4 + length)));
    // The label is drawn on; the prediction lies beside it.
    for (const layer of head.layers) {
      layer.line = false;
      layer.edited = layer.name === "label";
      if (layer.name === "prediction") Object.assign(layer, { shown: false, opacity: 45, single: "#ffffff" });
      if (layer.name === "suspected") Object.assign(layer, { shown: true, opacity: 30 });
    }
    const text = new TextEncoder().encode(JSON.stringify(head));
    const again = new Uint8Array(4 + text.length + packed.length - 4 - length);
    new DataView(again.buffer).setUint32(0, text.length, true);
    again.set(text, 4);
    again.set(packed.subarray(4 + length), 4 + text.length);
    await this.viewer.show(again);
    this.head = this.viewer.head;
    this.find(".editor").hidden = false;
    this.find(".conflict").hidden = true;
    const chosen = this.find(".pen-class").value;
    this.find(".pen-class").replaceChildren(...this.head.classes.map((one, i) => this.viewer.element("option", { value: i + 1 }, one.name === "unknown" ? "this part is unknown" : one.name)));
    if ([...this.find(".pen-class").options].some((option) => option.value === chosen)) this.find(".pen-class").value = chosen;
    this.find(".parts").hidden = this.head.parts < 2;
    this.find(".part-words").textContent = `part ${this.head.part + 1} of ${this.head.parts}, from below`;
    this.find(".earlier").disabled = this.head.part === 0;
    this.find(".later").disabled = this.head.part === this.head.parts - 1;
    for (const name of [".save", ".draw", ".undo", ".copy"]) this.find(name).disabled = Boolean(this.head.readonly);
    for (const name of [".take", ".take-all"]) this.find(name).disabled = Boolean(this.head.readonly) || !this.layer("prediction");
    this.setPen();
    if (this.head.audited) this.viewer.find(".caption").textContent = this.head.audited;
  }

  /* The prediction comes when it has been computed; what is drawn meanwhile stays. */
  async awaitPrediction(number) {
    for (;;) {
      await new Promise((done) => setTimeout(done, 1500));
      if (this.number !== number) return;
      const state = (await (await this.ask("list")).json())[number];
      if (this.number !== number || state.failed) {
        if (state.failed) this.say(`No prediction: ${state.failed}`);
        return;
      }
      if (!state.predicted) continue;
      const packed = await this.fetchCase(number, this.head.part);
      if (this.number !== number) return;
      const [drawing, known, place] = [this.drawing().slice(), this.head.base, this.viewer.voxel()];
      const classes = JSON.stringify(this.head.classes);
      await this.show(packed);
      this.head.base = known; // what was drawn is of that label, whatever the file holds now
      if (JSON.stringify(this.head.classes) === classes) this.put(drawing);
      else this.before = (this.base = this.drawing().slice()).slice();
      this.viewer.goto(place);
      return;
    }
  }

  layer(name) {
    return this.viewer.layers.find((layer) => layer.name === name);
  }

  drawing() {
    return this.viewer.nv.drawBitmap;
  }

  prediction() {
    const found = this.layer("prediction");
    if (!found) throw new Error("there is no prediction (yet)");
    return found.values;
  }

  changed() {
    if (!this.base || this.number < 0) return false;
    const drawing = this.drawing();
    return this.base.some((value, i) => value !== drawing[i]);
  }

  /* --- drawing ------------------------------------------------------------------------------------------------- */

  setPen() {
    const { nv } = this.viewer;
    const tool = this.find(".tool").value;
    const erases = tool.startsWith("eras");
    nv.opts.penSize = Math.max(1, Number(this.find(".pen-size").value) || 1);
    nv.setPenValue(erases ? 0 : Number(this.find(".pen-class").value), tool === "fill" || tool === "erase-area");
    nv.opts.drawingEnabled = this.find(".draw").checked && !this.head?.readonly;
    nv.opts.crosshairWidth = nv.opts.drawingEnabled ? 0.1 : 0.25;
    nv.drawScene();
  }

  /* Note what has changed since the last time, to undo it. */
  remember() {
    const drawing = this.drawing();
    const places = [];
    for (let i = 0; i < drawing.length; i++) if (drawing[i] !== this.before[i]) places.push(i);
    if (!places.length) return 0;
    this.undone.push({ places, values: places.map((i) => this.before[i]) });
    if (this.undone.length > 100) this.undone.shift();
    for (const i of places) this.before[i] = drawing[i];
    this.viewer.tellPlace();
    return places.length;
  }

  undo() {
    const last = this.undone.pop();
    if (!last) throw new Error("there is nothing to undo");
    const drawing = this.drawing();
    last.places.forEach((i, k) => {
      drawing[i] = this.before[i] = last.values[k];
    });
    this.viewer.nv.refreshDrawing();
    this.viewer.tellPlace();
  }

  /* Change the drawing by a function, as one step that can be undone. */
  change(action) {
    if (this.head.readonly) throw new Error(this.head.readonly);
    action(this.drawing());
    const count = this.remember();
    this.viewer.nv.refreshDrawing();
    this.say(`${count} voxels changed`);
  }

  put(values) {
    this.drawing().set(values);
    this.before = values.slice();
    this.viewer.nv.refreshDrawing();
    this.viewer.tellPlace();
  }

  copy() {
    const [nx, ny, nz] = this.head.size;
    const place = this.viewer.voxel();
    const axis = { coronal: 1, sagittal: 0 }[this.viewer.shownView] ?? 2;
    if (place[axis] + 1 >= [nx, ny, nz][axis]) throw new Error("this is the last slice");
    const step = [1, nx, nx * ny][axis];
    this.change((drawing) => {
      for (let z = 0; z < nz; z++) {
        for (let y = 0; y < ny; y++) {
          for (let x = 0; x < nx; x++) {
            if ([x, y, z][axis] !== place[axis]) continue;
            const at = x + nx * (y + ny * z);
            drawing[at + step] = drawing[at];
          }
        }
      }
    });
    place[axis] += 1;
    this.viewer.goto(place);
  }

  /* Take over the prediction in the suspected region at the crosshair; without one there, in the connected difference. */
  take() {
    const predicted = this.prediction();
    const drawing = this.drawing();
    const start = this.viewer.index();
    const suspected = this.layer("suspected")?.values;
    const inside = suspected?.[start] ? (i) => suspected[i] : (i) => predicted[i] !== drawing[i];
    if (!inside(start)) throw new Error("put the crosshair on a suspected region, or where label and prediction differ");
    const [nx, ny, nz] = this.head.size;
    const seen = new Uint8Array(drawing.length);
    const found = [start];
    seen[start] = 1;
    for (let at = 0; at < found.length; at++) {
      const i = found[at];
      const [x, y, z] = [i % nx, Math.floor(i / nx) % ny, Math.floor(i / (nx * ny))];
      const near = [x > 0 && i - 1, x < nx - 1 && i + 1, y > 0 && i - nx, y < ny - 1 && i + nx, z > 0 && i - nx * ny, z < nz - 1 && i + nx * ny];
      for (const j of near) {
        if (j === false || seen[j] || !inside(j)) continue;
        seen[j] = 1;
        found.push(j);
      }
    }
    this.change(() => {
      for (const i of found) drawing[i] = predicted[i];
    });
  }

  /* --- the server ---------------------------------------------------------------------------------------------- */

  async save() {
    if (this.head.readonly) throw new Error(this.head.readonly);
    const drawn = this.drawing().slice();
    const stream = new Blob([drawn]).stream().pipeThrough(new CompressionStream("deflate"));
    const body = await new Response(stream).arrayBuffer();
    this.say("saving ...");
    const query = new URLSearchParams({ part: this.head.part, base: this.head.base, values: this.head.classes.map((one) => one.value) });
    try {
      const answer = await this.post(`case/${this.number}/save?${query}`, body, "application/octet-stream");
      this.head.base = (await answer.json()).base;
    } catch (error) {
      this.find(".conflict").hidden = error.status !== 409;
      throw error;
    }
    this.base = drawn;
    this.find(".conflict").hidden = true;
    await this.refresh();
    this.say("saved");
  }

  async reload() {
    await this.open(this.number, this.head.part);
  }

  /* Bring mine and theirs together: whoever changed a voxel has it; where both did, mine stays, and is counted. */
  async merge() {
    const [mine, base] = [this.drawing().slice(), this.base];
    const classes = JSON.stringify(this.head.classes);
    const packed = await this.fetchCase(this.number, this.head.part);
    await this.show(packed);
    if (JSON.stringify(this.head.classes) !== classes) throw new Error("the other label has other classes (drop yours, or note it down first)");
    const theirs = this.drawing().slice();
    let both = 0;
    const merged = theirs.map((value, i) => {
      if (mine[i] === base[i]) return value;
      if (value !== base[i] && value !== mine[i]) both += 1;
      return mine[i];
    });
    this.base = theirs;
    this.undone = [];
    this.put(merged);
    this.say(`merged; ${both} voxels were changed by both and are yours now. Look at it, then save.`);
  }

  async mark(what) {
    if (what === "accept" && this.changed()) await this.save();
    else if (!this.leave()) return;
    await this.post(`case/${this.number}/mark`, JSON.stringify({ what }));
    await this.refresh();
    await this.open(this.next(this.number));
  }

  async audit() {
    if (this.changed()) throw new Error("save first: the saved label is what is judged");
    this.say("judging ...");
    const { audited } = await (await this.post(`case/${this.number}/audit`)).json();
    await this.refresh();
    await this.open(this.number, this.head.part);
    this.say(audited);
  }

  async refresh() {
    for (const item of await (await this.ask("list")).json()) {
      this.rows[item.number].querySelector(".why").textContent = item.reason;
      this.rows[item.number].querySelector(".state").textContent = item.state;
    }
  }

  async train() {
    if (!confirm("Start mlbseg train --init with the labels as they are saved now?")) return;
    await this.post("train");
    await this.follow();
  }

  async follow() {
    const words = this.find(".training");
    for (;;) {
      const found = await (await this.ask("train")).json();
      if (found.state === "none") return;
      words.textContent = [`${found.out}: ${found.state}`, found.step, found.words, ...(found.dice ?? []), ...(found.changes ?? [])].filter(Boolean).join("; ");
      if (found.state === "failed" || (found.state === "done" && found.changes.length >= Math.min(5, this.rows.length))) return;
      await new Promise((done) => setTimeout(done, 2000));
    }
  }
}

document.documentElement.removeAttribute("data-ready");
(async () => {
  const review = new Review(document.querySelector(".viewer"));
  try {
    await review.start();
  } catch (error) {
    review.say(`This browser cannot show the scans (${error}); one of 2023 or later with WebGL2 can.`);
  }
  document.documentElement.dataset.ready = "";
})();
