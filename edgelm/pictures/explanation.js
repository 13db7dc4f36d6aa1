// An explanation as a person can explore it: tokens coloured by probability, what else could have come, and where each
// layer and head of attention looked. The data is what edgelm/pictures/explanation_data.py makes.

import { element, moveByArrows } from "./elements.js";
import { levelOf, percent, shareRow, visible } from "./shares.js";

/** Tokens that a list of the strongest shares names. */
const MOST_LOOKED_AT = 6;
/** Height in pixels of the bar under a token that gets all of the attention. Others have roots, as in maps. */
const BAR_PIXELS = 8;
/** A cell of the map is so wide at most. Behind the last one is room for names: this share of all, and at most so much. */
const CELL_PIXELS = 22;
const NAME_SHARE = 0.2;
const NAME_PIXELS = 92;
/** Cells of the map have names beside them from this size on, and gaps between them from that one on. */
const NAMED_PIXELS = 9;
const GAPPED_PIXELS = 4;

/** The shares of attention of every layer and head, or of the mean over some of them. */
class Attention {
  constructor({ attentions, layers, heads, tokens, prefix_tokens: prefix }) {
    this.bytes = Uint8Array.from(atob(attentions), (character) => character.charCodeAt(0));
    this.layers = layers;
    this.heads = heads;
    this.extra = prefix ? 1 : 0;
    this.rows = tokens.length;
    this.size = this.start(this.rows);
  }

  /** Where the row of token `t` begins in the map of one head. */
  start(t) {
    return t * this.extra + (t * (t + 1)) / 2;
  }

  /** All shares of one map, row by row; `layer` and `head` are numbers, or null for the mean over all. */
  map(layer, head) {
    const layers = layer === null ? [...Array(this.layers).keys()] : [layer];
    const heads = head === null ? [...Array(this.heads).keys()] : [head];
    const sums = new Float32Array(this.size);
    for (const one of layers) {
      for (const other of heads) {
        const at = (one * this.heads + other) * this.size;
        for (let place = 0; place < this.size; place++) sums[place] += this.bytes[at + place];
      }
    }
    return sums.map((sum) => sum / (255 * layers.length * heads.length));
  }

  /** The row of token `t` in a map: the prefix first, where there is one, then the tokens up to `t`. */
  row(map, t) {
    return map.subarray(this.start(t), this.start(t + 1));
  }
}

class View {
  constructor(data) {
    this.data = data;
    this.attention = new Attention(data);
    this.layer = null;
    this.head = null;
    this.names = data.tokens.map((token) => visible(token.text));
    this.chosen = data.tokens.length - 1; // the token whose facts show; after the last one comes what follows
    this.shown = this.chosen; // for as long as the pointer is on another one, that one
    this.expected = element("section", { class: "explained-panel", id: "explained-expected" });
    this.looked = element("section", { class: "explained-panel", id: "explained-looked" });
    this.canvas = element("canvas", { role: "img", pointermove: (event) => this.point(event), pointerleave: () => this.show(this.chosen) });
    this.caption = element("p", { class: "explained-note" });
    this.thumbnails = [];
    this.element = element(
      "div",
      { class: "explained" },
      this.makeTokens(),
      element("div", { class: "explained-panels" }, this.expected, this.looked),
      element(
        "div",
        { class: "explained-attention" },
        element("section", {}, element("h3", { text: "Layers and heads" }), this.makeChoice(), this.makeThumbnails()),
        element("section", {}, element("h3", { text: "Who looks at whom" }), this.caption, element("div", { class: "explained-map" }, this.canvas)),
      ),
    );
    this.choose(null, null);
    new ResizeObserver(() => this.drawAll()).observe(this.canvas.parentElement); // first when it has a place
    this.redrawWithTheme();
  }

  /** Draw again when the theme changes, until another view has taken this one's place. */
  redrawWithTheme() {
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const redraw = () => {
      if (this.element.isConnected) {
        requestAnimationFrame(() => this.drawAll());
        return;
      }
      dark.removeEventListener("change", redraw);
      observer.disconnect();
    };
    const observer = new MutationObserver(redraw);
    dark.addEventListener("change", redraw);
    observer.observe(document.documentElement, { attributeFilter: ["data-theme"] });
  }

  makeTokens() {
    const label = "The tokens of the text; the arrow keys move among them";
    const list = element("div", { class: "tokens", role: "listbox", "aria-label": label, "aria-orientation": "horizontal" });
    const described = { role: "option", tabindex: "-1", "aria-selected": "false", "aria-describedby": "explained-expected explained-looked" };
    this.nodes = this.data.tokens.map((token, place) => {
      const chance = token.logprob === null ? "the first token" : percent(Math.exp(token.logprob));
      const level = token.logprob === null ? "none" : levelOf(Math.exp(token.logprob));
      const text = token.text.replace(/\n/g, "↵");
      return element("span", { ...described, class: "token", "data-level": level, "aria-label": `${this.names[place]}, ${chance}`, text });
    });
    this.nodes.push(element("span", { ...described, class: "token next", "aria-label": "What comes next", text: " … " }));
    // A line ends behind the token that ends it.
    const lineEnd = (place) => (this.data.tokens[place]?.text.includes("\n") ? ["\n"] : []);
    list.append(...this.nodes.flatMap((node, place) => [node, ...lineEnd(place)]));
    this.nodes[this.chosen].tabIndex = 0;
    moveByArrows(list);
    const placeOf = (event) => this.nodes.indexOf(event.target.closest?.("[role=option]"));
    list.addEventListener("pointerover", (event) => placeOf(event) >= 0 && this.show(placeOf(event)));
    list.addEventListener("pointerleave", () => this.show(this.chosen));
    for (const name of ["focusin", "click"]) {
      list.addEventListener(name, (event) => {
        if (placeOf(event) < 0) return;
        this.chosen = placeOf(event);
        this.show(this.chosen);
      });
    }
    return list;
  }

  makeChoice() {
    const select = (name, count, plural, chosen) => {
      const options = [[`All ${plural}`, ""], ...Array.from({ length: count }, (_, at) => [`${name} ${at + 1}`, at])];
      const made = element("select", { "aria-label": name, change: () => chosen(made.value === "" ? null : Number(made.value)) });
      made.append(...options.map(([text, value]) => element("option", { value: String(value), text })));
      return made;
    };
    this.layerSelect = select("Layer", this.data.layers, "layers", (layer) => this.choose(layer, this.head));
    this.headSelect = select("Head", this.data.heads, "heads", (head) => this.choose(this.layer, head));
    this.meanButton = element("button", { type: "button", class: "quiet", text: "Mean of all", click: () => this.choose(null, null) });
    return element("div", { class: "explained-choice" }, this.layerSelect, this.headSelect, this.meanButton);
  }

  /** A small map of every head, a line for each layer. */
  makeThumbnails() {
    const { layers, heads } = this.data;
    const label = "Maps of all heads, a line for each layer; the arrow keys move among them";
    const list = element("div", { class: "explained-heads", role: "listbox", "aria-label": label });
    list.style.setProperty("--heads", heads);
    for (let layer = 0; layer < layers; layer++) {
      list.append(element("span", { class: "explained-layer", "aria-hidden": "true", text: layer + 1 }));
      for (let head = 0; head < heads; head++) {
        const canvas = element("canvas", { width: this.attention.rows + this.attention.extra, height: this.attention.rows });
        const name = `Layer ${layer + 1}, head ${head + 1}`;
        const choose = () => this.choose(layer, head);
        const node = element(
          "span",
          { role: "option", tabindex: this.thumbnails.length ? "-1" : "0", "aria-selected": "false", "aria-label": name, title: name, click: choose, focus: choose },
          canvas,
        );
        this.thumbnails.push({ layer, head, canvas, node, map: this.attention.map(layer, head) });
        list.append(node);
      }
    }
    moveByArrows(list);
    return element("div", { class: "explained-scroll" }, list);
  }

  /** Show the attention of a layer and a head, or the mean over all of either where it is null. */
  choose(layer, head) {
    this.layer = layer;
    this.head = head;
    this.map = this.attention.map(layer, head);
    this.layerSelect.value = layer === null ? "" : String(layer);
    this.headSelect.value = head === null ? "" : String(head);
    this.meanButton.hidden = layer === null && head === null;
    for (const one of this.thumbnails) {
      const within = (layer === null || one.layer === layer) && (head === null || one.head === head);
      one.node.setAttribute("aria-selected", String(within && layer !== null && head !== null));
      one.node.classList.toggle("within", within);
    }
    this.canvas.setAttribute("aria-label", `Map of attention among ${this.names.length} tokens, ${this.whose()}; the list names the largest shares of a token`);
    this.drawAll();
    this.show(this.shown);
  }

  whose() {
    const layer = this.layer === null ? "all layers" : `layer ${this.layer + 1}`;
    const head = this.head === null ? "all heads" : `head ${this.head + 1}`;
    return this.layer === null && this.head === null ? "mean of all layers and heads" : `${layer}, ${head}`;
  }

  /** Show what stands at `place`: what else could have come, and where its token looks. */
  show(place) {
    this.shown = place;
    this.nodes.forEach((node, at) => node.setAttribute("aria-selected", String(at === place)));
    const token = this.data.tokens[place];
    this.expected.replaceChildren(...(token ? this.expectation(token, place) : this.continuation()));
    this.looked.replaceChildren(...(token ? this.glances(place) : []));
    this.looked.hidden = !token;
    const row = token ? this.attention.row(this.map, place) : [];
    this.nodes.forEach((node, at) => {
      const share = row[at + this.attention.extra] ?? 0;
      node.style.setProperty("--look", `${share >= 0.01 ? (Math.sqrt(share) * BAR_PIXELS).toFixed(1) : 0}px`);
    });
    this.caption.textContent = this.whose();
    this.drawMap();
  }

  expectation(token, place) {
    const title = element("h3", {}, "What could have stood at ", element("b", { text: this.names[place] }));
    if (token.logprob === null) return [title, element("p", { class: "explained-note", text: "Nothing stands before the first token, so nothing predicts it." })];
    const probability = Math.exp(token.logprob);
    const rank = token.top.findIndex((one) => one.token_id === token.token_id);
    const words = rank === 0 ? "the likeliest token" : rank > 0 ? `number ${rank + 1} of the likeliest` : `not among the ${token.top.length} likeliest`;
    const rows = token.top.map((one) => shareRow(one.text, Math.exp(one.logprob), one.token_id === token.token_id));
    if (rank < 0) rows.push(shareRow(token.text, probability, true));
    return [title, element("p", { class: "explained-note", text: `It had ${percent(probability)}: ${words}.` }), ...rows];
  }

  continuation() {
    const rows = this.data.following.map((one) => shareRow(one.text, Math.exp(one.logprob)));
    return [element("h3", { text: "What could come next" }), ...rows];
  }

  glances(place) {
    const { extra } = this.attention;
    const all = [...this.attention.row(this.map, place)].map((share, at) => ({ share, at: at - extra }));
    const best = all.sort((one, other) => other.share - one.share).slice(0, MOST_LOOKED_AT).filter(({ share }) => share >= 0.005);
    const name = (at) => (at < 0 ? `prefix (${this.data.prefix_tokens} tokens)` : this.data.tokens[at].text);
    const title = element("h3", {}, "Where ", element("b", { text: this.names[place] }), " looks");
    const rows = best.map(({ share, at }) => shareRow(at === place ? `${name(at)} (itself)` : name(at), share, at === place));
    return [title, element("p", { class: "explained-note", text: `Shares of attention, ${this.whose()}.` }), ...rows];
  }

  drawAll() {
    const colour = this.colour();
    for (const { canvas, map } of this.thumbnails) paint(canvas, this.attention, map, colour);
    this.drawMap();
  }

  /** The colour of shares in the present theme, as [red, green, blue]. */
  colour() {
    const probe = element("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });
    probe.fillStyle = getComputedStyle(this.element).accentColor; // a custom property would still name both themes
    probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  }

  drawMap() {
    const { extra, rows } = this.attention;
    const columns = rows + extra;
    const room = this.canvas.parentElement.clientWidth;
    if (!room) return;
    const names = Math.min(NAME_PIXELS, room * NAME_SHARE);
    const named = Math.floor((room - names) / columns) >= NAMED_PIXELS;
    const most = Math.min(CELL_PIXELS, (room - (named ? names : 0)) / columns);
    const cell = most >= GAPPED_PIXELS ? Math.floor(most) : most; // a long text has cells of less than a pixel
    const inside = most >= GAPPED_PIXELS ? cell - 1 : cell;
    const [width, height] = [named ? room : columns * cell, rows * cell];
    const scale = devicePixelRatio;
    this.cell = cell;
    this.canvas.width = width * scale;
    this.canvas.height = height * scale;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${height}px`;
    const pen = this.canvas.getContext("2d");
    pen.scale(scale, scale);
    const style = getComputedStyle(this.element);
    const [red, green, blue] = this.colour();
    pen.font = `${Math.min(13, cell - 1)}px ${style.fontFamily}`;
    pen.textBaseline = "middle";
    for (let t = 0; t < rows; t++) {
      pen.fillStyle = getComputedStyle(this.caption).color;
      pen.globalAlpha = 0.1;
      pen.fillRect(0, t * cell, (t + extra) * cell + inside, inside);
      pen.globalAlpha = 1;
      this.attention.row(this.map, t).forEach((share, at) => {
        pen.fillStyle = `rgb(${red} ${green} ${blue} / ${Math.sqrt(share)})`;
        pen.fillRect(at * cell, t * cell, inside, inside);
      });
      if (named) {
        pen.fillStyle = t === this.shown ? style.color : getComputedStyle(this.caption).color;
        pen.fillText(this.names[t], (t + 1 + extra) * cell + 4, (t + 0.5) * cell, room - (t + 1 + extra) * cell - 4);
      }
    }
    if (this.shown < rows) {
      pen.strokeStyle = style.color;
      pen.strokeRect(0.5, this.shown * cell - 0.5, (this.shown + 1 + extra) * cell - 1, cell);
    }
  }

  /** The pointer is on a cell of the map. */
  point(event) {
    const { extra, rows } = this.attention;
    const box = this.canvas.getBoundingClientRect();
    const t = Math.floor((event.clientY - box.top) / this.cell);
    const at = Math.floor((event.clientX - box.left) / this.cell);
    if (t < 0 || t >= rows) return;
    if (t !== this.shown) this.show(t);
    const share = this.attention.row(this.map, t)[at];
    const to = at < extra ? "the prefix" : this.names[at - extra];
    this.caption.textContent = share === undefined ? this.whose() : `${this.names[t]} looks at ${to}: ${percent(share)}`;
  }
}

/** Paint a map pixel by pixel. Roots of shares, because most shares are small. */
function paint(canvas, attention, map, [red, green, blue]) {
  const pen = canvas.getContext("2d");
  const image = pen.createImageData(canvas.width, canvas.height);
  for (let t = 0; t < attention.rows; t++) {
    attention.row(map, t).forEach((share, at) => {
      image.data.set([red, green, blue, Math.round(255 * Math.sqrt(share))], 4 * (t * canvas.width + at));
    });
  }
  pen.putImageData(image, 0, 0);
}

/** An element that shows `data`. */
export const explanationView = (data) => new View(data).element;
