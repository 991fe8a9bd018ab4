"use strict";
// A (class, latent) pair as a row of a list, with what speaks for its being unexpected.

atlas.pairRow = (pair, { showClass }) => {
  // "star fish relies on star fish" would say nothing: there the reason is what is unexpected.
  const isNamesake = pair.unexpected && pair.word.toLowerCase() === atlas.className(pair.number).toLowerCase();
  const verb = isNamesake ? "and" : "relies on";
  const head = atlas.element("div", { class: "pair-head" },
    ...(showClass ? [atlas.classLink(pair.number), atlas.element("span", { class: "muted" }, verb)] : []),
    atlas.latentLink(pair.latent, isNamesake ? "" : pair.word),
    pair.kind ? atlas.element("span", { class: "tag" }, pair.kind) : null);
  const numbers = atlas.element("dl", { class: "numbers" },
    atlas.term("attribution", atlas.number(pair.attribution)),
    atlas.term("of images", atlas.percent(pair.share)),
    ...(pair.positive === null ? [] : [atlas.term("positive", atlas.percent(pair.positive))]),
    atlas.term("alignment", atlas.number(pair.alignment)),
    ...(pair.evidence === null ? [] : [atlas.term("evidence", atlas.number(pair.evidence))]));
  const row = atlas.element("li", { class: "pair" }, atlas.thumbnails(pair.pictures),
    atlas.element("div", { class: "pair-words" }, head));
  const [first, others] = [pair.reasons.slice(0, isNamesake ? 1 : 0), pair.reasons.slice(isNamesake ? 1 : 0)];
  row.lastChild.append(...first.map((reason) => atlas.element("p", { class: "reason" }, reason)), numbers);
  if (others.length) row.lastChild.append(atlas.element("ul", { class: "reasons" },
    ...others.map((reason) => atlas.element("li", null, reason))));
  if (pair.counterpart !== null) row.lastChild.append(atlas.counterpart(pair));
  return row;
};

atlas.counterpart = (pair) => atlas.element("p", { class: "note counterpart" }, "Aligned counterpart: ",
  atlas.latentLink(pair.counterpart, pair.counterpartWord), " \u00b7 ",
  atlas.element("a", { href: `latent.html#${pair.latent},${pair.counterpart}` }, "side by side"));

// Fills a list with the first rows, and adds more on demand.
atlas.LongList = class {
  constructor(list, button, step, makeRow) {
    Object.assign(this, { list, button, step, makeRow, shown: step });
    button.addEventListener("click", () => this.more());
  }

  fill(items, shown) {
    this.items = items;
    this.shown = shown;
    this.list.replaceChildren(...items.slice(0, shown).map(this.makeRow));
    this.offer();
  }

  more() {
    const fresh = this.items.slice(this.shown, this.shown + this.step).map(this.makeRow);
    this.shown += this.step;
    this.list.append(...fresh);
    this.offer();
    const link = fresh.length && fresh[0].querySelector("a");
    if (link) link.focus();
  }

  offer() {
    const left = this.items.length - this.shown;
    this.button.hidden = left <= 0;
    this.button.textContent = `Show ${Math.min(left, this.step)} more of ${left.toLocaleString("en")}`;
  }
};
