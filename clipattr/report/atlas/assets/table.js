"use strict";
// A sortable table of which only the rows in view are elements: 30,000 rows cost as much as 30.
// columns: {title, explanation, value(row) for sorting, cell(row) for show, isText}.

atlas.Table = class {
  constructor(place, { caption, columns, size, onChange }) {
    Object.assign(this, { columns, size, onChange, rows: [], sorted: 0, descending: false });
    this.body = atlas.element("tbody");
    this.heads = columns.map((column, index) => this.head(column, index));
    const head = atlas.element("tr", { "aria-rowindex": 1 }, ...this.heads);
    this.table = atlas.element("table", { class: "virtual", "aria-label": caption },
      atlas.element("thead", null, head), this.body);
    this.scroller = atlas.element("div", { class: "scroll window", tabindex: 0, role: "region", "aria-label": caption }, this.table);
    this.scroller.addEventListener("scroll", () => this.later(), { passive: true });
    new ResizeObserver(() => this.later()).observe(this.scroller);
    place.replaceChildren(this.scroller);
  }

  head(column, index) {
    const button = atlas.element("button", { type: "button", title: column.explanation }, column.title);
    button.addEventListener("click", () => {
      const again = this.sorted === index;
      this.sort(index, again ? !this.descending : !column.isText);
    });
    return atlas.element("th", { scope: "col", class: column.isText ? "words-cell" : "" }, button);
  }

  // Show the rows for which `matches` holds, in the present order.
  filter(matches) {
    this.rows = Array.from({ length: this.size }, (_, row) => row).filter(matches);
    this.sort(this.sorted, this.descending);
  }

  sort(index, descending) {
    Object.assign(this, { sorted: index, descending });
    const { value, isText } = this.columns[index];
    const keys = new Map(this.rows.map((row) => [row, value(row)]));
    const order = isText ? new Intl.Collator("en").compare : (a, b) => a - b;
    // Rows without a value are last in both directions; ties keep the order of the numbers.
    this.rows.sort((a, b) => {
      const [left, right] = [keys.get(a), keys.get(b)];
      if (left === null || right === null) return (left === null) - (right === null) || a - b;
      return (descending ? order(right, left) : order(left, right)) || a - b;
    });
    this.heads.forEach((head, each) => head.setAttribute("aria-sort",
      each !== index ? "none" : descending ? "descending" : "ascending"));
    this.scroller.scrollTop = 0;
    this.table.setAttribute("aria-rowcount", this.rows.length + 1);
    this.first = null;
    this.draw();
    this.onChange();
  }

  later() {
    if (!this.waiting) this.waiting = requestAnimationFrame(() => { this.waiting = 0; this.draw(); });
  }

  draw() {
    if (!this.size) return;
    if (!this.height) {
      this.body.replaceChildren(this.row(0, 0));
      this.height = this.body.firstChild.getBoundingClientRect().height;
    }
    const margin = 8;
    const first = Math.max(0, Math.floor(this.scroller.scrollTop / this.height) - margin);
    const last = Math.min(this.rows.length, first + Math.ceil(this.scroller.clientHeight / this.height) + 2 * margin);
    if (first === this.first && last === this.last) return;
    Object.assign(this, { first, last });
    const rows = this.rows.slice(first, last).map((row, offset) => this.row(row, first + offset));
    this.body.replaceChildren(this.space(first), ...rows, this.space(this.rows.length - last));
  }

  space(rows) {
    const cell = atlas.element("td", { colspan: this.columns.length });
    cell.style.height = `${rows * this.height}px`;
    return atlas.element("tr", { class: "space", "aria-hidden": "true" }, cell);
  }

  row(row, place) {
    const cells = this.columns.map((column, index) => atlas.element(index ? "td" : "th",
      { class: column.isText ? "words-cell" : "", ...(index ? {} : { scope: "row" }) }, column.cell(row)));
    return atlas.element("tr", { "aria-rowindex": place + 2 }, ...cells);
  }
};
