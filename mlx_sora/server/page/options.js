// The panel "All options", made from what the server says about each option.

import { el } from "./lib.js";

/** Options that have a place of their own in the form, or none on a page. */
const ELSEWHERE = new Set([
  "prompt", "source_prompt", "model", "width", "height", "num_frames", "preset", "images", "videos",
  "video", "output", "overwrite", "checkpoint_every", "preview_every", "metadata",
]);

export class OptionPanel {
  constructor(host, filter, count) {
    this.host = host;
    this.count = count;
    this.rows = new Map();
    host.addEventListener("input", () => this.#mark());
    filter.addEventListener("input", (event) => {
      event.stopPropagation();
      this.#filter(filter.value.toLowerCase());
    });
  }

  /** Make the rows of `options`, and keep the values of those that are there already. */
  setSchema(options) {
    const before = this.values();
    this.rows.clear();
    const groups = new Map();
    for (const option of options) {
      if (ELSEWHERE.has(option.name) || !option.flag) continue;
      if (["images", "videos"].includes(option.type)) continue;
      const group = option.group ?? "other";
      if (!groups.has(group)) groups.set(group, el("fieldset", {}, el("legend", {}, group)));
      groups.get(group).append(this.#row(option));
    }
    this.host.replaceChildren(...groups.values());
    this.fill(before);
  }

  /** Return the options that differ from their defaults. Numbers stay text: the server reads it. */
  values() {
    const found = {};
    for (const [name, { input, option }] of this.rows) {
      if (option.type === "bool") {
        if (input.checked !== option.default) found[name] = input.checked;
      } else if (input.value.trim() !== "") found[name] = input.value.trim();
    }
    return found;
  }

  /** Set these options and clear the others. */
  fill(values) {
    for (const [name, { input, option }] of this.rows) {
      const value = values[name] ?? null;
      if (option.type === "bool") input.checked = value ?? option.default;
      else input.value = value === null || value === option.default ? "" : String(value);
    }
    this.#mark();
  }

  #row(option) {
    const id = `option-${option.name}`;
    const described = { id, "aria-describedby": `${id}-hint` };
    const input = control(option, described);
    const label = el("label", { htmlFor: id }, option.name.replaceAll("_", " "));
    const hint = el("p", { id: `${id}-hint`, className: "hint" }, option.help);
    const check = option.type === "bool";
    const row = el("div", { className: check ? "option check" : "option" },
      ...(check ? [input, label, hint] : [label, input, hint]));
    this.rows.set(option.name, { input, option, row });
    return row;
  }

  #mark() {
    const set = this.values();
    for (const [name, { row }] of this.rows) row.classList.toggle("set", name in set);
    const number = Object.keys(set).length;
    this.count.textContent = number ? `${number} set` : "";
  }

  #filter(text) {
    for (const [name, { row, option }] of this.rows) {
      const words = `${name.replaceAll("_", " ")} ${option.flag} ${option.help}`.toLowerCase();
      row.hidden = !words.includes(text);
    }
    for (const group of this.host.children) {
      group.hidden = !group.querySelector(".option:not([hidden])");
    }
  }
}

function control(option, attributes) {
  if (option.type === "bool") {
    return el("input", { type: "checkbox", checked: option.default, ...attributes });
  }
  if (option.choices?.length) {
    const first = option.default === null ? "default of the model" : `${option.default} (default)`;
    const others = option.choices.filter((choice) => choice !== option.default);
    return el("select", attributes, el("option", { value: "" }, first),
      others.map((choice) => el("option", {}, String(choice))));
  }
  const numeric = { int: "numeric", float: "decimal" }[option.type];
  const shown = option.default ?? "";
  return el("input", {
    type: "text", inputMode: numeric ?? "text", autocomplete: "off", spellcheck: false,
    placeholder: shown === "" ? (option.metavar ?? "") : `${shown} (default)`, ...attributes,
  });
}
