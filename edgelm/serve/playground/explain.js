// The tab that explains a text: how likely each token was, what else could have come, and where attention looked.

import { postJson } from "./api.js";
import { announce, byId, element, growing, tell } from "./dom.js";
import { explanationView } from "./explanation.js";
import { keep, recall } from "./storage.js";

const PATH = "/v1/explain";

export class Explain {
  /** `page` has the models. */
  constructor(page) {
    this.page = page;
    this.abort = null; // of the request that runs
    this.text = byId("explain-text");
    this.text.value = recall("explain", "");
    this.fit = growing(this.text);
    this.text.addEventListener("input", () => {
      keep("explain", this.text.value);
      this.fail("");
    });
    byId("explain-run").addEventListener("click", () => this.start());
    byId("explain-stop").addEventListener("click", () => this.stop());
  }

  /** Explain `text` instead of what was written. */
  take(text) {
    this.text.value = text;
    keep("explain", text);
    this.fit();
    this.start();
  }

  async start() {
    this.stop();
    this.fail("");
    const abort = (this.abort = new AbortController());
    this.drawButtons();
    announce("Reading");
    const body = { model: this.page.cards()[0].id, text: this.text.value, top: this.page.alternatives };
    try {
      this.draw(await postJson(PATH, body, abort.signal));
    } catch (error) {
      if (error.name !== "AbortError") this.tell(error);
    }
    if (this.abort !== abort) return; // another one took its place
    this.abort = null;
    this.drawButtons();
  }

  stop() {
    this.abort?.abort();
  }

  show() {} // there is one view only

  draw(data) {
    const legend = document.querySelector(".legend").cloneNode(true);
    legend.hidden = false;
    const words = `${data.tokens.length} tokens · ${data.layers} layers of ${data.heads} heads`;
    const head = element("div", { class: "explanation-head" }, element("p", { class: "facts", text: words }), legend);
    const sheet = element("article", { class: "result explanation", "aria-label": "Explanation" }, head, explanationView(data));
    byId("explanation").replaceChildren(sheet);
    announce(`Done: ${words}.`);
  }

  tell(error) {
    if (this.page.blame(error)) return;
    if (error.param === "text") this.fail(error.message);
    else byId("explanation").replaceChildren(element("p", { class: "alert", role: "alert", text: error.message }));
  }

  fail(words) {
    tell(byId("explain-error"), words);
    if (words) this.text.setAttribute("aria-invalid", "true");
    else this.text.removeAttribute("aria-invalid");
  }

  drawButtons() {
    const hadFocus = document.activeElement === byId("explain-stop");
    byId("explain-stop").hidden = !this.abort;
    if (hadFocus && !this.abort) byId("explain-run").focus();
  }
}
