// The fields of a request, with the limits that the server's OpenAPI document states: the page has none of its own.

const NOT_OPTIONS = new Set([
  "model", "prompt", "messages", "stream", "stream_options", "echo", "best_of", "logprobs", "top_logprobs",
  "max_completion_tokens", "response_format", "modalities",
]);
const HUGE = 1e9; // limits beyond it only keep numbers in their types, and say nothing to a reader

/** The options of the request `schemaName`, by name, in the document's order. */
export function fieldsOf(openapi, schemaName) {
  const fields = new Map();
  for (const [name, schema] of Object.entries(openapi.components.schemas[schemaName].properties)) {
    if (NOT_OPTIONS.has(name) || /^(No effect|Not supported): /.test(schema.description ?? "")) continue;
    const members = (schema.anyOf ?? [schema]).filter((member) => member.type !== "null");
    const form = formOf(members);
    if (form) fields.set(name, { name, words: wordsOf(schema.description), ...form });
  }
  return fields;
}

function formOf(members) {
  const kinds = new Map(members.map((member) => [member.type, member]));
  const text = kinds.get("string");
  const list = kinds.get("array");
  const object = kinds.get("object");
  if (text?.enum) return { kind: "choice", choices: text.enum };
  if (kinds.has("boolean")) return { kind: "switch" };
  if (kinds.has("integer")) return { kind: "whole", ...bounds(kinds.get("integer")) };
  if (kinds.has("number")) return { kind: "number", ...bounds(kinds.get("number")) };
  if (list?.items.type === "string") return { kind: "texts", most: list.maxItems, longest: list.items.maxLength };
  if (list?.items.type === "integer") return { kind: "ids", most: list.maxItems };
  if (list?.items.type === "array") return { kind: "sequences", most: list.maxItems, longest: list.items.maxItems };
  if (object?.patternProperties) {
    return { kind: "biases", most: object.maxProperties, ...bounds(Object.values(object.patternProperties)[0]) };
  }
  return null;
}

function bounds(schema) {
  const { minimum, maximum, exclusiveMinimum, exclusiveMaximum } = schema;
  const whole = schema.type === "integer";
  const high = whole && exclusiveMaximum !== undefined ? exclusiveMaximum - 1 : (maximum ?? exclusiveMaximum);
  return {
    low: minimum ?? exclusiveMinimum ?? -Infinity,
    high: high ?? Infinity,
    overLow: exclusiveMinimum !== undefined,
    underHigh: !whole && exclusiveMaximum !== undefined,
  };
}

/** The first sentence of a description, without the marks of Markdown. */
function wordsOf(description = "") {
  const plain = description.replace(/\s*\(?\[[^\]]*\]\([^)]*\)\)?/g, "").replaceAll("`", "");
  return plain.match(/^.*?[.!?](?=\s|$)/s)?.[0] ?? plain;
}

/** What a number may be, in words; "" where any number may be. `cap` is a limit that comes from elsewhere, or null. */
export function rangeOf(field, cap = null) {
  const high = Math.min(field.high, cap ?? Infinity);
  const low = field.overLow ? `above ${shown(field.low)}` : shown(field.low);
  if (field.low < -HUGE && high > HUGE) return "";
  if (high >= HUGE) return field.overLow ? low : `${low} or more`;
  return field.underHigh ? `${low} to below ${shown(high)}` : `${low} to ${shown(high)}`;
}

const shown = (number) => number.toLocaleString("en", { maximumFractionDigits: 6 });

/** The value of what was typed: {value}, {error}, or {} for nothing. */
export function parse(field, typed, cap = null) {
  const text = field.kind === "texts" ? typed : typed.trim();
  if (!text) return {};
  try {
    return { value: readers[field.kind](text, field, cap) };
  } catch (error) {
    if (error instanceof RangeError) return { error: error.message };
    throw error;
  }
}

const readers = {
  choice: (text) => text,
  switch: (text) => text === "yes",
  whole(text, field, cap) {
    if (!/^[+-]?\d+$/.test(text)) throw new RangeError(`Give a whole number, not “${brief(text)}”.`);
    return inRange(Number(text), field, cap);
  },
  number(text, field, cap) {
    const number = Number(text.replace(",", "."));
    if (!Number.isFinite(number)) throw new RangeError(`Give a number, not “${brief(text)}”.`);
    return inRange(number, field, cap);
  },
  texts(text, field) {
    const texts = text.split("\n").filter(Boolean).map(unescaped);
    if (texts.length > field.most) throw new RangeError(`${texts.length} texts are more than ${field.most}.`);
    const long = texts.find((one) => [...one].length > field.longest);
    if (long) throw new RangeError(`“${brief(long)}” is longer than ${field.longest} characters.`);
    return texts;
  },
  ids(text, field) {
    return atMost(idsIn(text), field);
  },
  sequences(text, field) {
    const sequences = text.split(/[;\n]/).filter((part) => part.trim()).map(idsIn);
    const long = sequences.find((one) => one.length > field.longest);
    if (long) throw new RangeError(`A sequence of ${long.length} ids is longer than ${field.longest}.`);
    return atMost(sequences, field);
  },
  biases(text, field) {
    const biases = {};
    for (const part of text.split(/[,;\n]/).filter((one) => one.trim())) {
      const [, id, bias] = part.match(/^\s*(\d+)\s*[=:]\s*([+-]?[\d.]+)\s*$/) ?? [];
      if (id === undefined) throw new RangeError(`“${brief(part)}” is not like 11=-2: a token id and a number.`);
      biases[id] = inRange(Number(bias), field, null);
    }
    atMost(Object.keys(biases), field);
    return biases;
  },
};

function idsIn(text) {
  const parts = text.split(/[\s,]+/).filter(Boolean);
  const wrong = parts.find((part) => !/^\d+$/.test(part));
  if (wrong) throw new RangeError(`“${brief(wrong)}” is not a token id.`);
  return parts.map(Number);
}

function atMost(items, field) {
  if (items.length > field.most) throw new RangeError(`${items.length} are more than ${field.most}.`);
  return items;
}

function inRange(number, field, cap) {
  const high = Math.min(field.high, cap ?? Infinity);
  const under = field.overLow ? number <= field.low : number < field.low;
  const over = field.underHigh ? number >= high : number > high;
  if (Number.isNaN(number) || under || over) {
    throw new RangeError(`Must be ${rangeOf(field, cap)}, not ${shown(number)}.`);
  }
  if (Number.isInteger(number) && !Number.isSafeInteger(number)) {
    throw new RangeError(`This page can send whole numbers up to ${shown(Number.MAX_SAFE_INTEGER)}.`);
  }
  return number;
}

const brief = (text) => (text.length > 24 ? `${text.slice(0, 24)}…` : text);

const unescaped = (text) =>
  text.replace(/\\([nrt\\])/g, (_, letter) => ({ n: "\n", r: "\r", t: "\t", "\\": "\\" })[letter]);
