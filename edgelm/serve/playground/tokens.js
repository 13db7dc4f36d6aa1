// Tokens, coloured by how likely each was, with what else the model thought of.
//
// The tokens of a text are one stop of the Tab key; the arrow keys move among them. The alternatives show while a token
// has the pointer or the focus.

import { byId, element } from "./dom.js";
import { moveByArrows } from "./elements.js";
import { levelOf, percent, shareRow, visible } from "./shares.js";

/** The pointer has so long to reach the alternatives of the token that it leaves. */
const HIDE_MILLISECONDS = 150;

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
    showTip(node, tokenAt(node));
  });
  list.addEventListener("focusout", hideTip);
  moveByArrows(list);
  return { list, show };
}

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
    ...rows.map((one) => shareRow(one.text, Math.exp(one.logprob), one.text === token.text)),
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
