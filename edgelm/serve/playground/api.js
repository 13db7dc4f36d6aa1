// Requests to the server that this page came from.

import { apiKey } from "./storage.js";

/** An error that the server told, or that kept its answer away. */
export class ApiError extends Error {
  /** `param`: the field of the request that is wrong, if the server names one. */
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

function headers(more = {}) {
  return apiKey() ? { ...more, authorization: `Bearer ${apiKey()}` } : more;
}

async function request(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, redirect: "error", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is edgelm serve still running?");
  }
  if (!response.ok) throw await told(response);
  return response;
}

async function told(response) {
  const status = response.status;
  try {
    const { error } = await response.json();
    const seconds = response.headers.get("retry-after");
    const later = seconds && (status === 429 || status === 503) ? ` Try again in ${seconds} s.` : "";
    return new ApiError(sentence(error.message) + later, { status, param: error.param });
  } catch {
    return new ApiError(`The server answered ${status} without saying why.`, { status });
  }
}

const sentence = (words) => words.charAt(0).toUpperCase() + words.slice(1) + (/[.!?]$/.test(words) ? "" : ".");

/** The JSON at `path`. */
export async function getJson(path) {
  return (await request(path, { headers: headers() })).json();
}

/** Send `body`; the JSON of the answer. */
export async function postJson(path, body, signal) {
  return (await post(path, body, signal)).json();
}

function post(path, body, signal) {
  const sent = { method: "POST", headers: headers({ "content-type": "application/json" }), body: JSON.stringify(body) };
  return request(path, { ...sent, signal });
}

/** Send `body`, and call `receive` with the content of each event of the answer. */
export async function streamEvents(path, body, signal, receive) {
  const response = await post(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      break;
    }
    if (piece.done) break;
    const lines = (left + piece.value).split("\n");
    left = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      const content = line.slice("data: ".length);
      if (content === "[DONE]") return;
      const event = JSON.parse(content);
      if (event.error) throw new ApiError(sentence(event.error.message), { param: event.error.param });
      receive(event);
    }
  }
  throw new ApiError("The connection ended before the text was complete.");
}
