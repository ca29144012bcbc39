// Pictures and videos of a request: uploads, and videos made here, each with the frames it fills.

import { $, api, ApiError, button, contentUrl, el, frameCount, times, toast } from "./lib.js";

/** Send a file. Return {id, kind, name, width, height, frames, request}. Throws ApiError. */
export async function upload(file) {
  const form = new FormData();
  form.append("file", file, file.name);
  const sent = await api("/v1/files", { method: "POST", form });
  return { ...sent, name: file.name };
}

/** Return a video made here as an item of the list. */
export const itemOf = (video) => ({
  id: video.id, kind: video.mlx_sora.frames === 1 ? "image" : "video", name: video.prompt ?? video.id,
  frames: video.mlx_sora.frames,
});

/** Return an upload or a video of the server as an item of the list. Throws ApiError. */
export async function findItem(id) {
  if (!id.startsWith("file")) return itemOf(await api(`/v1/videos/${encodeURIComponent(id)}`));
  const file = await api(`/v1/files/${encodeURIComponent(id)}`);
  return { ...file, name: file.filename || id };
}

export const thumbnailOf = (id) =>
  id.startsWith("file") ? `/v1/files/${encodeURIComponent(id)}/content?variant=thumbnail`
    : contentUrl(id, "thumbnail");

export class MediaList {
  #entries = [];

  constructor(list, onchange) {
    this.list = list;
    this.onchange = onchange;
    this.ready = Promise.resolve();
  }

  /** Upload files, one item each. `ready` resolves when no upload is open. */
  addFiles(files) {
    this.ready = this.ready.then(async () => {
      for (const file of files) await this.#addFile(file);
    });
    return this.ready;
  }

  async #addFile(file) {
    const waiting = el("li", {}, el("span"), el("p", { className: "name" }, `Reading ${file.name} …`));
    this.list.append(waiting);
    try {
      this.add(await upload(file));
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      toast(`${file.name}: ${error.message}`);
    } finally {
      waiting.remove();
    }
  }

  add(item, use = {}) {
    const entry = { item, use: { ...this.#defaults(item), ...use } };
    entry.row = this.#row(entry);
    this.#entries.push(entry);
    this.list.append(entry.row);
    this.onchange();
  }

  clear() {
    this.#entries = [];
    this.list.replaceChildren();
  }

  /** Return the items with their use, to be stored; `add` takes each. */
  entries() {
    return this.#entries.map(({ item, use }) => ({ item, use }));
  }

  images() {
    return this.#of("image").map(({ item, use }) => [item.id, use.frame, use.strength]);
  }

  videos() {
    return this.#of("video").map(({ item, use }) => [item.id, use.side, use.frames, use.strength]);
  }

  #of(kind) {
    return this.#entries.filter(({ item }) => item.kind === kind);
  }

  #defaults(item) {
    if (item.kind === "image") {
      return { frame: this.#of("image").length ? "last" : "first", strength: "1" };
    }
    return { side: this.#of("video").length ? "after" : "before", frames: "17", strength: "1" };
  }

  #row(entry) {
    const { item, use } = entry;
    const uses = item.kind === "image" ? this.#imageUses(use) : this.#videoUses(use);
    const remove = button("Remove", () => {
      this.#entries = this.#entries.filter((other) => other !== entry);
      entry.row.remove();
      $("files").focus();
      this.onchange();
    }, "small", `Remove ${item.name}`);
    const size = item.width ? `${times(`${item.width}x${item.height}`)}, ` : "";
    const title = item.kind === "image" ? item.name : `${item.name} (${size}${frameCount(item.frames)})`;
    return el("li", {}, el("img", { src: thumbnailOf(item.id), alt: "" }),
      el("div", {}, el("p", { className: "name" }, title), el("div", { className: "uses" }, uses, remove)));
  }

  #imageUses(use) {
    const named = ["first", "last"].includes(use.frame);
    const number = this.#number(use, "frame", "Number", { value: named ? "8" : use.frame, step: "1" });
    number.hidden = named;
    const select = el("select", {},
      el("option", { value: "first" }, "First frame"), el("option", { value: "last" }, "Last frame"),
      el("option", { value: "number" }, "Another frame"));
    select.value = named ? use.frame : "number";
    select.addEventListener("change", () => {
      number.hidden = select.value !== "number";
      use.frame = number.hidden ? select.value : number.querySelector("input").value;
      this.onchange();
    });
    return [el("label", {}, "Shown in", select), number, this.#strength(use)];
  }

  #videoUses(use) {
    const select = el("select", {},
      el("option", { value: "before" }, "Go on from its end"),
      el("option", { value: "after" }, "Lead up to its beginning"));
    select.value = use.side;
    select.addEventListener("change", () => ((use.side = select.value), this.onchange()));
    return [el("label", {}, "Use", select),
      this.#number(use, "frames", "Frames", { min: "1", step: "1" }), this.#strength(use)];
  }

  #strength(use) {
    return this.#number(use, "strength", "Strength", { min: "0.05", max: "1", step: "0.05" });
  }

  #number(use, name, text, attributes) {
    const input = el("input", { type: "number", value: use[name], ...attributes });
    input.addEventListener("input", () => ((use[name] = input.value), this.onchange()));
    return el("label", {}, text, input);
  }
}
