// The options beside the text: a control for each field that the server knows.

import { byId, element, tell } from "./dom.js";
import { parse, rangeOf } from "./fields.js";
import { keep, recall } from "./storage.js";

/** Which options stand together. A field that is in none of the lists stands in the last one. */
const GROUPS = [
  ["Common", ["max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop"]],
  ["Against repetition", [
    "repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "dry_multiplier", "dry_base",
    "dry_allowed_length",
  ]],
  ["More ways to sample", [
    "do_sample", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_n_sigma", "xtc_probability", "xtc_threshold",
    "mirostat_tau", "mirostat_eta",
  ]],
  ["Length and end", ["min_new_tokens", "max_time", "eos_token_id", "context_overflow", "pinned_tokens"]],
  ["Single tokens", ["logit_bias", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"]],
  ["Others", []],
];
const LABELS = {
  n: "Number of texts", top_p: "Top P", top_k: "Top K", min_p: "Min P", typical_p: "Typical P",
  stop: "Stop texts", top_n_sigma: "Top n sigma", logit_bias: "Logit bias", eos_token_id: "End tokens",
  bad_words_ids: "Bad words", do_sample: "Sampling", no_repeat_ngram_size: "No repeated n-gram",
  max_time: "Time limit in seconds",
};
const HINTS = {
  texts: "one a line; \\n is a line break",
  ids: "token ids, such as 11, 42",
  sequences: "token ids, such as 11 42; 7",
  biases: "such as 11=-2, 42=5",
};
const WIDEST_SLIDER = 4;

/** The option's name for people. */
export function labelOf(name) {
  if (LABELS[name]) return LABELS[name];
  const words = name.replaceAll("_", " ");
  const capitals = /^(dry|xtc) /.test(words) ? 3 : 1;
  return words.slice(0, capitals).toUpperCase() + words.slice(capitals);
}

export class Options {
  /** `fields`: by name, as `fieldsOf` makes them. `changed` is called after each change. */
  constructor(fields, changed) {
    this.fields = fields;
    this.changed = changed;
    this.rows = new Map();
    this.typed = new Map(Object.entries(recall("options", {})).filter(([, text]) => typeof text === "string"));
    this.context = null;
    this.hidden = new Set();
    const place = byId("options");
    const known = new Set(GROUPS.flatMap(([, names]) => names));
    for (const [title, listed] of GROUPS) {
      const others = () => [...fields.keys()].filter((name) => !known.has(name));
      const names = listed.length ? listed.filter((name) => fields.has(name)) : others();
      if (names.length) place.append(this.group(title, names));
    }
    byId("options-reset").addEventListener("click", () => {
      for (const name of this.fields.keys()) this.set(name, "");
      byId("options-toggle").focus();
    });
    byId("options-toggle").addEventListener("click", () => this.open(place.hidden));
    this.open(!matchMedia("(max-width: 60rem)").matches);
  }

  open(wanted) {
    byId("options").hidden = !wanted;
    byId("options-toggle").setAttribute("aria-expanded", String(wanted));
  }

  group(title, names) {
    const badge = element("span", { class: "badge" });
    const group = element("details", {}, element("summary", {}, element("span", { text: title }), badge));
    group.open = title === "Common";
    for (const name of names) {
      const row = this.control(this.fields.get(name));
      row.group = { element: group, badge, names };
      this.rows.set(name, row);
      group.append(row.element);
      this.show(name);
    }
    return group;
  }

  control(field) {
    const { name, kind } = field;
    const id = `option-${name}`;
    const range = element("span", { class: "range" });
    const error = element("p", { class: "field-error", id: `${id}-error`, hidden: true });
    const words = element("p", { class: "words", id: `${id}-words`, text: field.words });
    words.hidden = field.words === `${labelOf(name)}.`;
    const described = { id, "aria-describedby": `${id}-words ${id}-range ${id}-error` };
    range.id = `${id}-range`;
    let input;
    if (kind === "switch" || kind === "choice") {
      const choices = kind === "switch" ? ["yes", "no"] : field.choices;
      const offered = choices.map((choice) => element("option", { value: choice, text: choice }));
      input = element("select", described, element("option", { value: "" }), ...offered);
    } else if (kind === "texts") {
      input = element("textarea", { ...described, rows: "1", spellcheck: "false" });
    } else {
      const mode = kind === "whole" || kind === "number" ? "decimal" : "text";
      const plain = { type: "text", inputmode: mode, autocomplete: "off", spellcheck: "false" };
      input = element("input", { ...described, ...plain });
    }
    const forget = () => {
      this.set(name, "");
      input.focus();
    };
    const named = { "aria-label": `Reset ${labelOf(name)}`, title: "Reset", text: "×" };
    const reset = element("button", { type: "button", class: "reset", hidden: true, click: forget, ...named });
    const row = { input, range, error, reset, slider: null };
    input.addEventListener("input", () => this.set(name, input.value));
    if (kind === "whole" || kind === "number") input.addEventListener("keydown", (event) => this.step(name, event));
    const line = element("div", { class: "line" }, input);
    if (this.hasSlider(field)) {
      // For the pointer; the keyboard has the arrow keys in the field beside it, which says the same.
      const step = kind === "whole" ? "1" : "0.01";
      row.slider = element("input", { type: "range", tabindex: "-1", "aria-hidden": "true", step });
      row.slider.addEventListener("input", () => this.set(name, this.within(name, Number(row.slider.value))));
      line.prepend(row.slider);
    }
    row.element = element(
      "div",
      { class: `option ${kind}` },
      element("div", { class: "head" }, element("label", { for: id, text: labelOf(name) }), reset, range),
      line,
      error,
      words,
    );
    return row;
  }

  hasSlider(field) {
    if (field.kind === "number") return field.high - field.low <= WIDEST_SLIDER;
    return field.kind === "whole" && (field.high - field.low <= 16 || field.name === "max_tokens");
  }

  /** The number as text, moved inside the open ends of the option's range. */
  within(name, number) {
    const field = this.fields.get(name);
    let inside = number;
    if (field.overLow && inside <= field.low) inside = field.low + 0.01;
    if (field.underHigh && inside >= field.high) inside = field.high - 0.01;
    return String(field.kind === "whole" ? Math.round(inside) : Number(inside.toFixed(2)));
  }

  step(name, event) {
    const direction = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (!direction) return;
    event.preventDefault();
    const field = this.fields.get(name);
    const { input } = this.rows.get(name);
    const from = Number(input.value || this.defaultOf(name) || 0);
    if (!Number.isFinite(from)) return;
    const step = field.kind === "whole" ? 1 : field.high - field.low <= WIDEST_SLIDER ? 0.05 : 0.1;
    const high = Math.min(field.high, this.cap(name) ?? Infinity);
    const moved = Math.min(Math.max(from + direction * step, field.low), high);
    this.set(name, this.within(name, moved));
  }

  cap(name) {
    return name === "max_tokens" ? this.context : null;
  }

  defaultOf(name) {
    return this.defaults?.[name];
  }

  /** Show the defaults and limits of a model, or of two: `cards` as /v1/models lists them. */
  describe(cards) {
    this.defaults = cards[0]?.generation_defaults;
    this.context = cards.length ? Math.min(...cards.map((card) => card.context_length)) : null;
    for (const name of this.fields.keys()) this.show(name);
  }

  /** Leave these options out, because what is shown has no use of them. */
  hide(names) {
    this.hidden = new Set(names);
    for (const [name, row] of this.rows) row.element.hidden = this.hidden.has(name);
  }

  set(name, typed) {
    if (typed) this.typed.set(name, typed);
    else this.typed.delete(name);
    keep("options", Object.fromEntries(this.typed));
    this.show(name);
    this.changed();
  }

  show(name) {
    const row = this.rows.get(name);
    const field = this.fields.get(name);
    const typed = this.typed.get(name) ?? "";
    const { input, slider } = row;
    const usual = defaultText(this.defaultOf(name));
    if (input.value !== typed) input.value = typed;
    if (input.tagName === "SELECT") input.options[0].textContent = usual ? `${usual} (the model's)` : "the model's";
    else input.placeholder = usual || { seed: "drawn", stop: "none" }[name] || "off";
    row.range.textContent = HINTS[field.kind] ?? (field.low === undefined ? "" : rangeOf(field, this.cap(name)));
    row.reset.hidden = !typed;
    if (slider) {
      slider.min = field.low;
      slider.max = Math.min(field.high, this.cap(name) ?? Infinity);
      const number = Number(typed || this.defaultOf(name) || 0);
      if (Number.isFinite(number)) slider.value = number;
      slider.classList.toggle("unset", !typed);
      const share = (slider.value - slider.min) / (slider.max - slider.min || 1);
      slider.style.setProperty("--share", `${share * 100}%`);
    }
    this.fail(name, parse(field, typed, this.cap(name)).error);
    const { badge, names } = row.group;
    const count = names.filter((one) => this.typed.has(one)).length;
    badge.textContent = count ? String(count) : "";
    byId("options-reset").hidden = !this.typed.size;
  }

  /** Show an error at an option, or take it away. */
  fail(name, words) {
    const row = this.rows.get(name);
    tell(row.error, words);
    if (words) row.input.setAttribute("aria-invalid", "true");
    else row.input.removeAttribute("aria-invalid");
  }

  /** Bring an option into view, with the focus. */
  reveal(name) {
    this.open(true);
    const row = this.rows.get(name);
    row.group.element.open = true;
    row.input.focus();
  }

  /** The values of all options that are set, or null where one of them is wrong, which then has the focus. */
  values() {
    const values = {};
    for (const [name, typed] of this.typed) {
      const field = this.fields.get(name);
      if (!field || this.hidden.has(name)) continue;
      const { value, error } = parse(field, typed, this.cap(name));
      if (error) {
        this.reveal(name);
        return null;
      }
      if (value !== undefined) values[name] = value;
    }
    return values;
  }
}

function defaultText(value) {
  if (value === true) return "yes";
  if (value === false) return "no";
  if (value === null || value === undefined) return "";
  if (Array.isArray(value)) return value.map((one) => (Array.isArray(one) ? one.join(" ") : one)).join(", ");
  if (typeof value === "object") return Object.entries(value).map(([id, bias]) => `${id}=${bias}`).join(", ");
  return String(value);
}
