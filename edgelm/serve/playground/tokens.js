// Tokens, coloured by how likely each was, with what else the model thought of.
//
// The tokens of a text are one stop of the Tab key; the arrow keys move among them. The alternatives show while a token
// has the pointer or the focus.

import { byId, element } from "./dom.js";

/** Probabilities below which the next colour begins. */
const LEVELS = [0.9, 0.5, 0.2, 0.05, 0.01];
/** The pointer has so long to reach the alternatives of the token that it leaves. */
const HIDE_MILLISECONDS = 150;

export const levelOf = (probability) => LEVELS.filter((least) => probability < least).length;

export function percent(probability) {
  const share = probability * 100;
  if (share < 0.01) return "< 0.01%";
  return `${share >= 99.995 ? "100" : share.toPrecision(share >= 10 ? 3 : 2)}%`;
}

/** A token's text with its white space made visible. */
export const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣") || "(nothing)";

/** An element that shows tokens; `show(tokens)` adds those that are new. */
export function tokenList(label) {
  const roles = { role: "listbox", "aria-label": label, "aria-orientation": "horizontal" };
  const list = element("div", { class: "tokens", ...roles });
  let shown = [];
  const tokenAt = (node) => shown[[...list.children].indexOf(node)];

  function show(tokens) {
    for (const token of tokens.slice(shown.length)) {
      const probability = Math.exp(token.logprob);
      list.append(
        element("span", {
          role: "option",
          class: "token",
          "data-level": levelOf(probability),
          tabindex: list.childElementCount ? "-1" : "0",
          "aria-selected": "false",
          "aria-label": `${visible(token.text)}, ${percent(probability)}`,
          text: token.text.replace(/\n/g, "↵\n"),
        }),
      );
    }
    shown = tokens.slice();
  }

  const option = (event) => event.target.closest?.("[role=option]");
  list.addEventListener("pointerover", (event) => option(event) && showTip(option(event), tokenAt(option(event))));
  list.addEventListener("pointerleave", hideTipSoon);
  list.addEventListener("focusin", (event) => {
    const node = option(event);
    if (!node) return;
    list.querySelectorAll("[tabindex='0']").forEach((other) => (other.tabIndex = -1));
    node.tabIndex = 0;
    showTip(node, tokenAt(node));
  });
  list.addEventListener("focusout", hideTip);
  list.addEventListener("keydown", (event) => {
    const next = {
      ArrowRight: (node) => node.nextElementSibling,
      ArrowLeft: (node) => node.previousElementSibling,
      ArrowDown: (node) => inNextLine(node, 1),
      ArrowUp: (node) => inNextLine(node, -1),
      Home: () => list.firstElementChild,
      End: () => list.lastElementChild,
    }[event.key];
    if (!next || !option(event)) return;
    event.preventDefault();
    next(option(event))?.focus();
  });
  return { list, show };
}

/** The token nearest to the middle of `node` in the line below (`step` 1) or above (-1). */
function inNextLine(node, step) {
  const from = node.getBoundingClientRect();
  const middle = (from.left + from.right) / 2;
  let best = null;
  let line = null;
  for (let other = sibling(node, step); other; other = sibling(other, step)) {
    const box = other.getClientRects()[0];
    if (!box || Math.abs(box.top - from.top) < 4) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > 4) break;
    const distance = Math.abs((box.left + box.right) / 2 - middle);
    if (best === null || distance < best.distance) best = { other, distance };
  }
  return best?.other;
}

const sibling = (node, step) => (step > 0 ? node.nextElementSibling : node.previousElementSibling);

let hiding = 0;
let described = null;

function showTip(node, token) {
  clearTimeout(hiding);
  const tip = byId("tip");
  described?.removeAttribute("aria-describedby");
  described = node;
  node.setAttribute("aria-describedby", "tip");
  const rows = token.top.some((one) => one.text === token.text) ? token.top : [...token.top, token];
  tip.replaceChildren(
    element("p", { class: "tip-title", text: "How likely here, before temperature" }),
    ...rows.map((one) => {
      const probability = Math.exp(one.logprob);
      const bar = element("span", { class: "tip-bar" });
      bar.style.width = `${(probability * 100).toFixed(1)}%`;
      return element(
        "div",
        { class: one.text === token.text ? "tip-row chosen" : "tip-row" },
        element("span", { class: "tip-text", text: visible(one.text) }),
        element("span", { class: "tip-track", "aria-hidden": "true" }, bar),
        element("span", { class: "tip-share", text: percent(probability) }),
      );
    }),
  );
  tip.hidden = false;
  const box = node.getClientRects()[0] ?? node.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left), innerWidth - tip.offsetWidth - 8);
  const below = box.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? box.bottom + 6 : Math.max(8, box.top - 6 - tip.offsetHeight)}px`;
}

export function hideTip() {
  clearTimeout(hiding);
  byId("tip").hidden = true;
  described?.removeAttribute("aria-describedby");
  described = null;
}

function hideTipSoon() {
  hiding = setTimeout(() => {
    if (document.activeElement?.getAttribute("role") !== "option") hideTip();
  }, HIDE_MILLISECONDS);
}

byId("tip").addEventListener("pointerenter", () => clearTimeout(hiding));
byId("tip").addEventListener("pointerleave", hideTipSoon);
addEventListener("scroll", () => document.activeElement?.getAttribute("role") !== "option" && hideTip(), true);
