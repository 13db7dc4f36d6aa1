// The tab that holds a conversation, where the bundle has a chat template.

import { announce, button, byId, copyButton, element, growing, tell } from "./dom.js";
import { summary } from "./complete.js";
import { Result } from "./result.js";
import { Run } from "./run.js";
import { keep, recall } from "./storage.js";

const PATH = "/v1/chat/completions";

export class Chat {
  /** `page` has the models, the options and the view that all tabs share. */
  constructor(page) {
    this.page = page;
    /** What was said: {role, content}, and for answers of this visit the `result` that shows them. */
    this.messages = recall("messages", []).filter(
      (one) => ["user", "assistant"].includes(one?.role) && typeof one.content === "string",
    );
    this.system = byId("system");
    this.system.value = recall("system", "");
    byId("chat").querySelector(".system").open = this.system.value !== "";
    this.message = byId("message");
    this.message.value = recall("message", "");
    this.fits = [growing(this.system), growing(this.message)];
    this.system.addEventListener("input", () => keep("system", this.system.value));
    this.message.addEventListener("input", () => {
      keep("message", this.message.value);
      this.fail("");
    });
    byId("send").addEventListener("click", () => this.start());
    byId("chat-stop").addEventListener("click", () => this.stop());
    byId("chat-clear").addEventListener("click", () => {
      this.stop();
      this.messages = [];
      this.draw();
      this.message.focus();
    });
    byId("chat-code-button").addEventListener("click", () => {
      const said = this.message.value ? [{ role: "user", content: this.message.value }] : [];
      const body = this.body([...this.said(), ...said]);
      if (body?.messages.length) this.page.showCode(PATH, body);
      else if (body) this.fail("Write a message first.");
    });
    this.draw();
  }

  get running() {
    return this.messages.some(({ result }) => result?.run.running);
  }

  said() {
    return this.messages.map(({ role, content }) => ({ role, content }));
  }

  body(messages) {
    const values = this.page.options.values();
    if (values === null) return null;
    const { max_tokens: most, ...others } = values;
    const system = this.system.value ? [{ role: "system", content: this.system.value }] : [];
    const body = { model: this.page.cards()[0].id, messages: [...system, ...messages], ...others };
    if (most !== undefined) body.max_completion_tokens = most;
    if (this.page.view === "tokens") Object.assign(body, { logprobs: true, top_logprobs: this.page.alternatives });
    return body;
  }

  /** Send the message. */
  start() {
    if (this.running) return;
    const content = this.message.value;
    if (!content.trim()) {
      this.fail("Write a message first.");
      this.message.focus();
      return;
    }
    const said = { role: "user", content };
    if (!this.ask([...this.messages, said])) return;
    this.message.value = "";
    keep("message", "");
    for (const fit of this.fits) fit();
  }

  /** Have the model answer `messages`; says whether it was asked. */
  ask(messages) {
    const body = this.body(messages.map(({ role, content }) => ({ role, content })));
    if (body === null) return false;
    this.fail("");
    const answer = { role: "assistant", content: "" };
    const run = new Run(PATH, body, () => this.changed(answer));
    answer.result = new Result(run, { view: this.page.view });
    this.messages = [...messages, answer];
    run.finish();
    announce("Running");
    followed(() => this.draw());
    // The button that was pressed may have gone with the answer before.
    if (document.activeElement === document.body) byId("chat-stop").focus();
    return true;
  }

  changed(answer) {
    const { run } = answer.result;
    if (run.running) {
      answer.result.drawSoon(followed);
      return;
    }
    answer.content = run.texts[0].text;
    if (run.error) this.page.blame(run.error);
    answer.result.draw();
    if (!this.messages.includes(answer)) return;
    announce(summary(answer.result));
    const hadFocus = document.activeElement === byId("chat-stop");
    followed(() => this.draw());
    if (hadFocus) this.message.focus();
  }

  /** Ask for the last answer again. */
  retry() {
    const last = this.messages.findLastIndex(({ role }) => role === "user");
    if (last >= 0) this.ask(this.messages.slice(0, last + 1));
  }

  fail(words) {
    tell(byId("message-error"), words);
    if (words) this.message.setAttribute("aria-invalid", "true");
    else this.message.removeAttribute("aria-invalid");
  }

  stop() {
    for (const { result } of this.messages) result?.run.stop();
  }

  show(view) {
    for (const { result } of this.messages) result?.show(view);
  }

  draw() {
    // A failed answer is not a part of the conversation: the next message follows what was said before.
    keep("messages", this.said().filter(({ role, content }) => role === "user" || content));
    byId("messages").replaceChildren(...this.messages.map((one, place) => this.drawOne(one, place)));
    byId("no-messages").hidden = this.messages.length > 0;
    byId("chat-clear").hidden = !this.messages.length;
    byId("chat-stop").hidden = !this.running;
    byId("send").hidden = this.running;
  }

  drawOne({ role, content, result }, place) {
    const actions = result?.actions ?? element("div", { class: "actions" });
    actions.replaceChildren();
    if (role === "assistant" && !this.running) {
      if (place === this.messages.length - 1) actions.append(button("Retry", () => this.retry()));
      if (content) actions.append(copyButton(() => content));
    }
    return element(
      "div",
      { class: `message ${role}` },
      element("h3", { class: "over", text: role === "user" ? "You" : (result?.run.body.model ?? "Model") }),
      ...(result ? [result.element] : [element("div", { class: "text", text: content }), actions]),
    );
  }
}

/** Draw, and keep the place where one writes in view if it was. */
function followed(draw) {
  const place = byId("message").closest(".sheet");
  const seen = place.getBoundingClientRect().top < innerHeight;
  draw();
  if (seen) place.scrollIntoView({ block: "nearest" });
}
