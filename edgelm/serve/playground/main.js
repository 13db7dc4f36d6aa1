// The page: what its tabs share, and the keys.

import { ApiError, getJson } from "./api.js";
import { Chat } from "./chat.js";
import { showCode } from "./code.js";
import { Complete } from "./complete.js";
import { byId, element, press, tell } from "./dom.js";
import { Explain } from "./explain.js";
import { fieldsOf } from "./fields.js";
import { Options } from "./options.js";
import { apiKey, keep, recall, useApiKey } from "./storage.js";
import { hideTip } from "./tokens.js";

const REQUEST = "CompletionRequest";
const ALTERNATIVES = 8;
const TABS = ["complete", "chat", "explain"];

class Page {
  constructor(models, openapi) {
    this.models = models;
    this.needsKey = openapi.security !== undefined;
    const most = openapi.components.schemas[REQUEST].properties.logprobs.anyOf.find((one) => one.maximum !== undefined);
    this.alternatives = Math.min(ALTERNATIVES, most.maximum);
    this.view = recall("view", "text") === "tokens" ? "tokens" : "text";
    this.options = new Options(fieldsOf(openapi, REQUEST), () => {});
    this.tabs = { complete: new Complete(this), chat: new Chat(this), explain: new Explain(this) };
    this.tab = "complete";
    this.setUpModels();
    this.setUpTabs();
    this.setUpViews();
    this.setUpKeys();
    byId("key-button").hidden = !this.needsKey;
    byId("tab-chat").hidden = !this.chatting.length;
    this.choose(recall("tab", "complete"));
  }

  get chatting() {
    return this.models.filter((card) => card.has_chat_template);
  }

  /** The models that are chosen: one, or two that are compared. */
  cards() {
    const named = (id) => this.models.find((card) => card.id === byId(id).value);
    return this.comparing ? [named("model"), named("model-b")] : [named("model")];
  }

  get comparing() {
    return this.tab === "complete" && byId("compare").getAttribute("aria-pressed") === "true";
  }

  setUpModels() {
    byId("compare").setAttribute("aria-pressed", String(this.models.length > 1 && recall("compare", false)));
    for (const id of ["model", "model-b"]) {
      byId(id).addEventListener("change", () => {
        keep(id, byId(id).value);
        this.drawModels();
      });
    }
    byId("compare").addEventListener("click", () => {
      const on = byId("compare").getAttribute("aria-pressed") !== "true";
      byId("compare").setAttribute("aria-pressed", String(on));
      keep("compare", on);
      this.drawModels();
    });
  }

  fillModels() {
    const offered = this.tab === "chat" ? this.chatting : this.models;
    for (const [id, otherwise] of [["model", 0], ["model-b", Math.min(1, offered.length - 1)]]) {
      const wanted = recall(id, "");
      byId(id).replaceChildren(...offered.map((card) => element("option", { value: card.id, text: card.id })));
      byId(id).value = offered.some((card) => card.id === wanted) ? wanted : offered[otherwise].id;
    }
    byId("compare").hidden = this.tab !== "complete" || this.models.length < 2;
    this.drawModels();
  }

  drawModels() {
    const cards = this.cards();
    byId("second").hidden = !this.comparing;
    byId("model-facts").textContent = this.comparing ? "" : factsOf(cards[0]);
    this.options.describe(cards);
  }

  setUpTabs() {
    for (const name of TABS) {
      const button = byId(`tab-${name}`);
      button.addEventListener("click", () => this.choose(name));
      button.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!step) return;
        const offered = TABS.filter((one) => !byId(`tab-${one}`).hidden);
        const other = offered.at((offered.indexOf(name) + step) % offered.length);
        this.choose(other);
        byId(`tab-${other}`).focus();
      });
    }
  }

  choose(tab) {
    this.tab = TABS.includes(tab) && !byId(`tab-${tab}`).hidden ? tab : "complete";
    keep("tab", this.tab);
    for (const name of TABS) {
      const chosen = name === this.tab;
      byId(name).hidden = !chosen;
      byId(`tab-${name}`).setAttribute("aria-selected", String(chosen));
      byId(`tab-${name}`).tabIndex = chosen ? 0 : -1;
    }
    document.querySelector(".skip").href = { complete: "#prompt", chat: "#message", explain: "#explain-text" }[this.tab];
    document.querySelector("main").classList.toggle("wide", this.tab === "explain");
    this.options.hide(this.tab === "chat" ? ["n"] : []);
    this.fillModels();
    for (const area of byId(this.tab).querySelectorAll("textarea")) area.dispatchEvent(new Event("input"));
  }

  /** Explain `text` as the model `id` sees it, in the tab for that. */
  explain(id, text) {
    keep("model", id);
    this.choose("explain");
    this.tabs.explain.take(text);
    byId("explain-text").focus();
  }

  setUpViews() {
    const buttons = [...document.querySelectorAll("[data-view]")];
    const draw = () => {
      press(buttons, "view", this.view);
      for (const legend of document.querySelectorAll(".legend")) legend.hidden = this.view !== "tokens";
    };
    for (const button of buttons) {
      button.addEventListener("click", () => {
        this.view = button.dataset.view;
        keep("view", this.view);
        draw();
        for (const tab of Object.values(this.tabs)) tab.show(this.view);
      });
    }
    draw();
  }

  setUpKeys() {
    addEventListener("keydown", (event) => {
      if (document.querySelector("dialog[open]")) return;
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        this.tabs[this.tab].start();
      } else if (event.key === "Escape") {
        hideTip();
        this.tabs[this.tab].stop();
      }
    });
  }

  showCode(path, body) {
    hideTip();
    const card = this.cards()[0];
    const base = this.models.find((other) => other.id === card.base) ?? card;
    showCode({
      path,
      body,
      needsKey: this.needsKey,
      folder: card.embedded ? null : base.id,
      prefix: card.base === null ? null : card.id,
    });
  }

  /** Show an error at the option that it names, or ask for a key; says whether it did. */
  blame(error) {
    if (error.status === 401) {
      askForKey("The server does not know this key.");
      return true;
    }
    const name = (error.param ?? "").split(".")[0].replace("max_completion_tokens", "max_tokens");
    if (!this.options.rows.has(name)) return false;
    this.options.reveal(name);
    this.options.fail(name, error.message);
    return true;
  }
}

/** A model's card in a few words. */
function factsOf(card) {
  return `${card.precision} · ${card.context_length.toLocaleString("en")} tokens of context`;
}

const keyDialog = byId("key-dialog");

function askForKey(words = "") {
  byId("key").value = apiKey();
  tell(byId("key-error"), words);
  if (!keyDialog.open) keyDialog.showModal();
}

byId("key-button").addEventListener("click", () => askForKey());
byId("key-cancel").addEventListener("click", () => keyDialog.close());
byId("key-form").addEventListener("submit", () => {
  useApiKey(byId("key").value.trim());
  if (!page) start();
});

let page = null;

async function start() {
  tell(byId("page-error"), "");
  try {
    const [models, openapi] = await Promise.all([getJson("/v1/models"), getJson("/openapi.json")]);
    page = new Page(models.data, openapi);
    document.body.dataset.ready = "yes";
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) {
      byId("key-button").hidden = false;
      askForKey(apiKey() ? "The server does not know this key." : "");
    }
    tell(byId("page-error"), error.message);
  }
}

start();
