// One video at full size: playback, facts, record, and what can be done with it.

import {
  $, api, attempt, button, bytes, confirmed, contentUrl, duration, el, frameCount, post, times, toast,
} from "./lib.js";
import { changeThis, editBy, goOn } from "./form.js";

const RELATIONS = {
  remix: "A remix of", edit: "An edit of", extend: "Goes on from", repeat: "Made again from",
};
const dialog = $("viewer");
let shown = null; // the video in the dialog
let neighbour = null; // (id, step) -> a video beside it

dialog.addEventListener("close", () => {
  shown = null;
  dialog.replaceChildren();
});
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
dialog.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const inside = event.target.closest("video, pre, input");
  const next = step && !inside && shown && neighbour?.(shown.id, step);
  if (next) openViewer(next, neighbour);
});

export function openViewer(video, find) {
  shown = video;
  neighbour = find;
  dialog.replaceChildren(
    el("div", { className: "title" }, el("h2", { id: "viewer-title" }, video.prompt || video.id),
      button("Close", () => dialog.close())),
    el("div", { className: "columns" }, film(video),
      el("div", { className: "info" }, actions(video), problem(video), facts(video), record(video))));
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

/** Show the new state of the video in the dialog, if it is this one. */
export function showInViewer(video) {
  if (!shown || shown.id !== video.id) return;
  if (video.deleted || ["queued", "running"].includes(video.mlx_sora.state)) dialog.close();
  else if (video.mlx_sora.state !== shown.mlx_sora.state) openViewer(video, neighbour);
}

function film(video) {
  const { state, frames } = video.mlx_sora;
  if (state !== "done") return el("div", { className: "film none" }, state === "failed" ? "Failed" : "Cancelled");
  const small = parseInt(video.size, 10) <= 160 ? " tiny" : "";
  const src = contentUrl(video.id, "video");
  const label = video.prompt || video.id;
  const image = () => el("img", { className: `film${small}`, src, alt: label });
  if (frames === 1) return image();
  const node = el("video", {
    className: `film${small}`, src, controls: true, loop: true, muted: true, playsInline: true,
    autoplay: !matchMedia("(prefers-reduced-motion: reduce)").matches, "aria-label": label,
  });
  // A gif or webp is a picture to browsers.
  node.addEventListener("error", () => node.replaceWith(image()));
  return node;
}

function actions(video) {
  const { state, kind } = video.mlx_sora;
  const leave = (action) => () => (dialog.close(), action(video));
  const send = (path, json, message) => () => attempt(async () => {
    await post(`/v1/videos/${video.id}/${path}`, json);
    toast(message);
  });
  const list = [];
  if (state === "done") {
    list.push(button("Same again", send("repeat", { changes: {} }, "It is made again, with the same seed.")));
    if (kind !== "edit") {
      list.push(button("Another one", send("repeat", { changes: { seed: null } }, "Another seed is in the queue.")));
    }
  } else {
    list.push(button(state === "cancelled" ? "Go on" : "Try again", send("resume", {}, "It is back in the queue.")));
  }
  list.push(button("Change this", leave(changeThis)));
  if (state === "done") {
    list.push(
      button("Edit by prompt", leave(editBy)),
      button("Go on from here", leave(goOn)),
      el("a", { className: "button", href: contentUrl(video.id, "video"), download: fileName(video) }, "Download"));
  }
  list.push(button("Delete", () => remove(video), "danger"));
  return el("div", { className: "actions" }, list);
}

function fileName({ prompt, id, mlx_sora: { options, frames } }) {
  const words = (prompt ?? "").normalize("NFKD").toLowerCase().match(/[a-z0-9]+/g) ?? [id];
  return `${words.join("-").slice(0, 60)}.${options.output ?? (frames === 1 ? "png" : "mp4")}`;
}

async function remove(video) {
  const question = video.mlx_sora.state === "done" ? "Delete this video?" : "Delete this job?";
  if (!(await confirmed(question, "It is removed from the computer that runs the server.", "Delete"))) return;
  await attempt(async () => {
    await api(`/v1/videos/${video.id}`, { method: "DELETE" });
    document.dispatchEvent(new CustomEvent("deleted", { detail: video.id }));
  });
}

function problem(video) {
  const { state, warnings } = video.mlx_sora;
  if (state === "failed") return el("p", { className: "error" }, video.error?.message ?? "It failed.");
  return warnings?.length ? el("ul", { className: "hint" }, warnings.map((text) => el("li", {}, text))) : null;
}

function facts(video) {
  const { frames, fps, seed, peak_memory: peak, parent, parent_kind: relation, kind } = video.mlx_sora;
  const took = video.mlx_sora.finished_at && video.mlx_sora.started_at
    ? duration(video.mlx_sora.finished_at - video.mlx_sora.started_at) : null;
  const rows = {
    Size: video.size && `${times(video.size)}, ${frameCount(frames)}`,
    Length: frames > 1 && fps ? `${duration(frames / fps)} at ${fps} frames per second` : null,
    Model: video.model,
    Seed: kind === "edit" ? null : seed,
    Took: took,
    "Peak memory": peak && bytes(peak),
    Made: new Date(video.created_at * 1000).toLocaleString(),
  };
  const list = Object.entries(rows).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const origin = parent && RELATIONS[relation] ? [el("dt", {}, RELATIONS[relation]), el("dd", {}, parentLink(parent))] : [];
  return el("dl", {}, list.map(([name, value]) => [el("dt", {}, name), el("dd", {}, String(value))]), origin);
}

const parentLink = (id) => button("that video", () => attempt(async () =>
  openViewer(await api(`/v1/videos/${encodeURIComponent(id)}`), neighbour)), "quiet small");

function record(video) {
  if (video.mlx_sora.state !== "done") return null;
  const text = el("pre", { tabIndex: 0 }, "Reading …");
  const details = el("details", {}, el("summary", {}, "Record"), text);
  details.addEventListener("toggle", async () => {
    const found = await attempt(() => api(contentUrl(video.id, "record")));
    text.textContent = found ? JSON.stringify(found, null, 2) : "It has none.";
  }, { once: true });
  return details;
}
