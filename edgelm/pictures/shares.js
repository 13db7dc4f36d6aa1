// Probabilities and shares, as words, colours and bars. edgelm/pictures/shares.py has the same rules.

import { element } from "./elements.js";

/** Probabilities below which the next colour begins. */
const LEVELS = [0.9, 0.5, 0.2, 0.05, 0.01];

export const levelOf = (probability) => LEVELS.filter((least) => probability < least).length;

export function percent(probability) {
  const share = probability * 100;
  if (share < 0.01) return "< 0.01%";
  return `${share >= 99.995 ? "100" : share.toPrecision(share >= 10 ? 3 : 2)}%`;
}

/** A token's text with its white space, and what would steer a text's direction, made visible. */
export const visible = (text) =>
  text
    .replace(/\n/g, "↵")
    .replace(/\t/g, "⇥")
    .replace(/ /g, "␣")
    .replace(/\p{C}/gu, (one) => `\\u{${one.codePointAt(0).toString(16)}}`) || "(nothing)";

/** A row of a token, a bar and a percentage. */
export function shareRow(text, share, chosen = false) {
  const bar = element("span", { class: "share-bar" });
  bar.style.width = `${(share * 100).toFixed(1)}%`;
  return element(
    "div",
    { class: chosen ? "share-row chosen" : "share-row" },
    element("span", { class: "share-text", text: visible(text) }),
    element("span", { class: "share-track", "aria-hidden": "true" }, bar),
    element("span", { class: "share-number", text: percent(share) }),
  );
}
