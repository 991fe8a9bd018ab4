"use strict";
// A scatter on a canvas. The same data stand in the tables, which is what screen readers use.

// At most `wanted` round numbers within [low, high].
atlas.ticks = (low, high, wanted) => {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const ticks = [];
  for (let index = Math.ceil(low / step); index * step <= high + step * 1e-9; index += 1) ticks.push(index * step);
  return ticks;
};

// Smallest and largest value with a little room, and of a width above 0.
atlas.extent = (values) => {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value === null) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low > high) return [0, 1];
  const room = 0.05 * (high - low) || 0.5 * Math.abs(high) || 0.5;
  return [low - room, high + room];
};

// fill takes x, y (arrays), roles (CSS variables of the colours), role(index), radius(index), order (later ones on
// top), names (indices that are named if there is room, first ones first), name(index), describe(index) (lines
// of text), open(index), axes ([x, y] or null).
atlas.Scatter = class {
  constructor(figure) {
    this.near = -1;
    this.canvas = figure.querySelector("canvas");
    this.tip = figure.querySelector(".tip");
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.canvas.addEventListener("pointermove", (event) => this.hover(event));
    this.canvas.addEventListener("pointerleave", () => this.point(-1));
    this.canvas.addEventListener("click", (event) => {
      const index = this.nearest(event);
      if (index >= 0) this.open(index);
    });
  }

  fill(options) {
    Object.assign(this, options, { ranges: [atlas.extent(options.x), atlas.extent(options.y)] });
    this.point(-1);
    this.draw();
  }

  colorOf(role) { return getComputedStyle(document.documentElement).getPropertyValue(`--${role}`).trim(); }

  // Place of a point in pixels of the page.
  place(index) {
    const { left, top, width, height } = this.frame;
    const [[lowX, highX], [lowY, highY]] = this.ranges;
    return [left + width * (this.x[index] - lowX) / (highX - lowX),
      top + height * (1 - (this.y[index] - lowY) / (highY - lowY))];
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !this.ranges) return;
    const scale = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    this.pen = this.canvas.getContext("2d");
    this.pen.scale(scale, scale);
    this.frame = this.axes ? { left: 62, top: 12, width: width - 76, height: height - 60 }
      : { left: 8, top: 8, width: width - 16, height: height - 16 };
    this.palette = Object.fromEntries(this.roles.map((role) => [role, this.colorOf(role)]));
    if (this.axes) this.drawAxes();
    for (const index of this.order) this.drawPoint(index);
    this.pen.globalAlpha = 1;
    this.drawNames();
  }

  drawPoint(index) {
    if (this.x[index] === null || this.y[index] === null) return;
    const [x, y] = this.place(index);
    const radius = this.radius(index);
    this.pen.fillStyle = this.palette[this.role(index)];
    this.pen.globalAlpha = 0.8;
    if (radius < 2) { this.pen.fillRect(x - radius, y - radius, 2 * radius, 2 * radius); return; }
    this.pen.beginPath();
    this.pen.arc(x, y, radius, 0, 2 * Math.PI);
    this.pen.fill();
  }

  drawAxes() {
    const { left, top, width, height } = this.frame;
    const [[lowX, highX], [lowY, highY]] = this.ranges;
    const pen = this.pen;
    pen.font = "12px system-ui, sans-serif";
    pen.lineWidth = 1;
    const line = (x1, y1, x2, y2, role) => {
      pen.strokeStyle = this.colorOf(role);
      pen.beginPath(); pen.moveTo(x1, y1); pen.lineTo(x2, y2); pen.stroke();
    };
    pen.fillStyle = this.colorOf("muted");
    pen.textAlign = "center"; pen.textBaseline = "top";
    for (const tick of atlas.ticks(lowX, highX, Math.max(4, width / 90))) {
      const x = left + width * (tick - lowX) / (highX - lowX);
      line(x, top, x, top + height, Math.abs(tick) < 1e-12 ? "muted" : "line");
      pen.fillText(atlas.tickText(tick), x, top + height + 6);
    }
    pen.fillText(this.axes[0], left + width / 2, top + height + 26, width);
    pen.textAlign = "right"; pen.textBaseline = "middle";
    for (const tick of atlas.ticks(lowY, highY, Math.max(4, height / 50))) {
      const y = top + height * (1 - (tick - lowY) / (highY - lowY));
      line(left, y, left + width, y, Math.abs(tick) < 1e-12 ? "muted" : "line");
      pen.fillText(atlas.tickText(tick), left - 6, y);
    }
    pen.save();
    pen.translate(8, top + height / 2);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "center";
    pen.fillText(this.axes[1], 0, 0, height);
    pen.restore();
  }

  // Names beside their points, left out where they would lie on another name or on a named point.
  drawNames() {
    const pen = this.pen;
    pen.font = "12px system-ui, sans-serif";
    pen.textBaseline = "middle"; pen.textAlign = "left"; pen.lineJoin = "round"; pen.lineWidth = 3;
    pen.strokeStyle = this.colorOf("card"); pen.fillStyle = this.colorOf("ink");
    const shown = this.names.filter((index) => this.x[index] !== null && this.y[index] !== null);
    const taken = shown.map((index) => atlas.boxAround(...this.place(index), 4));
    const [first, last] = [this.frame.left, this.frame.left + this.frame.width];
    for (const index of shown) {
      const [x, y] = this.place(index);
      const text = atlas.shortened(this.name(index), 34);
      const width = pen.measureText(text).width;
      const start = [x + 8, x - 8 - width].find((left) => left >= first && left + width <= last
        && !taken.some((box) => box[0] < left + width + 4 && left - 4 < box[2] && box[1] < y + 8 && y - 8 < box[3]));
      if (start === undefined) continue;
      taken.push([start, y - 8, start + width, y + 8]);
      pen.strokeText(text, start, y);
      pen.fillText(text, start, y);
    }
  }

  // The point under a pointer, or -1; of equally near ones the one on top.
  nearest(event) {
    if (!this.frame) return -1;
    const reach = event.pointerType === "touch" ? 22 : 12;
    const { left, top } = this.canvas.getBoundingClientRect();
    let [best, smallest] = [-1, reach * reach];
    for (const index of this.order) {
      if (this.x[index] === null || this.y[index] === null) continue;
      const [x, y] = this.place(index);
      const distance = (x - event.clientX + left) ** 2 + (y - event.clientY + top) ** 2;
      if (distance <= smallest) [best, smallest] = [index, distance];
    }
    return best;
  }

  hover(event) {
    if (event.pointerType !== "touch") this.point(this.nearest(event));
  }

  point(index) {
    if (index === this.near) return;
    this.near = index;
    this.tip.hidden = index < 0;
    this.canvas.classList.toggle("at-point", index >= 0);
    if (index < 0) return;
    this.tip.replaceChildren(...this.describe(index).map((text) => atlas.element("span", null, text)));
    const [x, y] = this.place(index);
    const limit = this.canvas.clientWidth - this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(0, Math.min(x + 12, limit))}px`;
    this.tip.style.top = `${y + 14}px`;
  }
};

atlas.boxAround = (x, y, half) => [x - half, y - half, x + half, y + half];

atlas.tickText = (tick) => (Math.abs(tick) < 1e-12 ? "0" : atlas.number(Number(tick.toPrecision(6)))
  .replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, ""));

atlas.shortened = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}\u2026` : text);
