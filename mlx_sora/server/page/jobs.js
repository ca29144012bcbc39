// What is known of the server's videos: the queue and the gallery.

import {
  $, api, ApiError, attempt, button, contentUrl, duration, el, frameCount, post, throttle, times, toast,
} from "./lib.js";
import { openViewer, showInViewer } from "./viewer.js";

const PAGE = 60;
const ACTIVE = ["queued", "running"];
const STAGES = {
  memory: "Waiting for memory", hash: "Checking the weights", encode: "Reading the prompt", read: "Reading media", denoise: "Denoising", decode: "Decoding",
};

const videos = new Map(); // id -> video
const rows = new Map(); // id -> row of the queue
const cards = new Map(); // id -> card of the gallery
let hasMore = false; // the gallery goes on behind its last card
let dragged = null;

const state = (video) => video.mlx_sora.state;

/** Load queue and gallery, as many videos as are shown. */
export async function refresh() {
  const [queued, finished] = await Promise.all([
    pages(ACTIVE, "asc", Infinity), pages(["done", "failed", "cancelled"], "desc", Math.max(cards.size, PAGE)),
  ]);
  const found = new Set([...queued.list, ...finished.list].map(({ id }) => id));
  for (const id of [...videos.keys()]) if (!found.has(id)) remove(id);
  hasMore = finished.hasMore;
  for (const video of [...queued.list, ...finished.list]) update(video);
  showCounts();
}

async function pages(states, order, count, after = null) {
  const list = [];
  for (;;) {
    const more = after ? `&after=${encodeURIComponent(after)}` : "";
    const limit = Math.min(100, Math.max(1, count - list.length));
    const page = await api(`/v1/videos?state=${states.join(",")}&order=${order}&limit=${limit}${more}`);
    list.push(...page.data);
    after = page.data.at(-1)?.id;
    if (!page.has_more || list.length >= count) return { list, hasMore: page.has_more };
  }
}

async function loadMore() {
  if (!hasMore || $("more").disabled) return;
  $("more").disabled = true;
  const last = [...cards.keys()].sort()[0] ?? null;
  const page = await attempt(() => pages(["done", "failed", "cancelled"], "desc", PAGE, last));
  $("more").disabled = false;
  if (!page) return;
  hasMore = page.hasMore;
  page.list.forEach(update);
  showCounts();
  nearEnd.unobserve($("more")); // looks again: a wide screen may show all of it
  nearEnd.observe($("more"));
}

const nearEnd = new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting)) loadMore();
}, { rootMargin: "600px" });

export function wireJobs() {
  $("more").addEventListener("click", loadMore);
  nearEnd.observe($("more"));
  document.addEventListener("deleted", ({ detail }) => (remove(detail), showCounts()));
  const queue = $("queue");
  queue.addEventListener("dragover", dragOver);
  queue.addEventListener("drop", drop);
}

/** Take over what an event says. A change of a job may change the places of others: they are read. */
export function handle(event) {
  if (["job", "deleted"].includes(event.event)) {
    changes.add(event.id);
    sync();
  } else progress(event);
}

const changes = new Set(); // ids of jobs whose state may be another
const sync = throttle(50, readChanges);

async function readChanges() {
  const active = await quietly(() => pages(ACTIVE, "asc", Infinity));
  if (!active) return;
  active.list.forEach(update);
  const open = new Set(active.list.map(({ id }) => id));
  const left = [...changes, ...rows.keys()].filter((id) => !open.has(id));
  changes.clear();
  for (const id of new Set(left)) {
    const video = await quietly(() => api(`/v1/videos/${encodeURIComponent(id)}`), () => remove(id));
    if (video) update(video);
  }
  showCounts();
}

/** Return what is read, or nothing: a lost connection is shown elsewhere. */
async function quietly(read, missing = () => {}) {
  try {
    return await read();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 404) missing();
    return undefined;
  }
}

function progress(event) {
  const video = videos.get(event.id);
  if (!video) return;
  const { mlx_sora: job } = video;
  if (event.event === "preview_ready") job.preview = event.step + 1;
  if (event.event === "step_finished") Object.assign(job, { step: event.step + 1, steps: event.total });
  if (event.event === "stage_started") job.stage = event.stage;
  if ("progress" in event) {
    video.progress = Math.min(99, Math.floor(event.progress * 100));
    job.seconds_left = event.seconds_left;
  }
  update(video);
}

function update(video) {
  const before = videos.get(video.id);
  video.mlx_sora.preview ??= before?.mlx_sora.preview;
  videos.set(video.id, video);
  if (ACTIVE.includes(state(video))) {
    dropCard(video.id);
    showRow(video);
  } else {
    dropRow(video.id);
    showCard(video);
    if (before && ACTIVE.includes(state(before))) announce(video);
  }
  showInViewer(video);
}

function remove(id) {
  videos.delete(id);
  dropRow(id);
  dropCard(id);
  showInViewer({ id, deleted: true });
}

function announce(video) {
  const words = { done: "Finished", failed: "Failed", cancelled: "Cancelled" }[state(video)];
  toast(`${words}: ${titleOf(video)}`, ["Show", () => openViewer(video, neighbour)]);
}

const titleOf = (video) => video.prompt || video.id;

function showCounts() {
  const waiting = [...videos.values()].filter((video) => state(video) === "queued").length;
  const running = [...videos.values()].find((video) => state(video) === "running");
  $("queue-empty").hidden = rows.size > 0;
  $("gallery-empty").hidden = cards.size > 0;
  $("queue-count").textContent = waiting ? `${waiting} waiting` : "";
  $("more").hidden = !hasMore;
  document.title = running ? `${running.progress}% - mlx_sora` : "mlx_sora";
}

// The queue

function showRow(video) {
  let row = rows.get(video.id);
  if (!row) {
    row = makeRow(video);
    rows.set(video.id, row);
  }
  row.show(video);
  place($("queue"), row.node, [...rows.values()], (a, b) => orderOf(a) - orderOf(b));
}

const orderOf = (row) => (state(row.video) === "running" ? -1 : row.video.mlx_sora.position ?? 0);

/** Put a node where `compare` says, and move it only if it stands elsewhere: focus stays. */
function place(list, node, all, compare) {
  const order = all.sort(compare).map((entry) => entry.node);
  const next = order[order.indexOf(node) + 1] ?? null;
  if (node.parentNode === list && node.nextSibling === next) return;
  const focused = node.contains(document.activeElement) ? document.activeElement : null;
  list.insertBefore(node, next?.parentNode === list ? next : null);
  focused?.focus();
}

function makeRow(video) {
  const title = titleOf(video);
  const picture = el("div", { className: "picture" });
  const bar = el("progress", { max: 100, "aria-label": `Progress: ${title}` });
  const status = el("p", { className: "meta" });
  const up = button("↑", () => moveBy(row, -1), "small", `Move up: ${title}`);
  const down = button("↓", () => moveBy(row, 1), "small", `Move down: ${title}`);
  const cancel = button("Cancel", () => attempt(() => post(`/v1/videos/${video.id}/cancel`)), "small",
    `Cancel: ${title}`);
  const node = el("li", { className: "job" }, picture,
    el("div", { className: "body" }, el("p", { className: "prompt" }, title), bar, status),
    el("div", { className: "actions" }, up, down, cancel));
  const row = { node, video, show };
  node.addEventListener("dragstart", (event) => {
    dragged = row;
    event.dataTransfer.setData("text/plain", title);
    node.classList.add("dragged");
  });
  node.addEventListener("dragend", () => {
    dragged = null;
    for (const other of rows.values()) other.node.classList.remove("dragged", "before");
  });

  function show(now) {
    row.video = now;
    const running = state(now) === "running";
    node.classList.toggle("running", running);
    node.draggable = !running;
    up.hidden = down.hidden = running;
    bar.hidden = !running;
    bar.value = now.progress;
    status.textContent = running ? runningText(now) : `Waiting. ${factsOf(now)}`;
    if (!picture.querySelector("img")) picture.textContent = running ? `${now.progress}%` : now.mlx_sora.position + 1;
    showPreview(picture, now);
  }
  return row;
}

function runningText(video) {
  const { stage, step, steps, seconds_left: left } = video.mlx_sora;
  const parts = [STAGES[stage] ?? "Starting"];
  if (stage === "denoise" && steps) parts.push(`step ${step ?? 0} of ${steps}`);
  if (left !== null && left !== undefined) parts.push(`${duration(left)} left`);
  return parts.join(", ");
}

function factsOf({ size, model, mlx_sora: { kind, frames } }) {
  return [kind === "edit" ? "edit" : "", times(size), frames ? frameCount(frames) : "", model]
    .filter(Boolean).join(", ");
}

function showPreview(picture, video) {
  const { preview } = video.mlx_sora;
  if (!preview || picture.dataset.step === String(preview)) return;
  picture.dataset.step = preview;
  const image = el("img", { alt: `Preview after step ${preview}`, className: tiny(video) });
  image.addEventListener("load", () => picture.replaceChildren(image));
  image.src = contentUrl(video.id, "preview", `&step=${preview}`);
}

export const tiny = (video) => (parseInt(video.size, 10) <= 160 ? "tiny" : "");

function waiting() {
  return [...rows.values()].filter((row) => state(row.video) === "queued")
    .sort((a, b) => orderOf(a) - orderOf(b));
}

function moveBy(row, step) {
  const order = waiting();
  const index = order.indexOf(row);
  const target = index + step;
  if (target < 0 || target >= order.length) return;
  move(row, order[step > 0 ? target + 1 : target] ?? null);
}

function move(row, before) {
  attempt(async () => {
    await post(`/v1/videos/${row.video.id}/move`, { before: before?.video.id ?? null });
    await readChanges();
    const place = waiting().indexOf(row) + 1;
    toast(`${titleOf(row.video)}: place ${place} of ${waiting().length}.`);
  });
}

function rowAt(event) {
  const node = event.target.closest?.(".job");
  return waiting().find((row) => row.node === node);
}

function dragOver(event) {
  if (!dragged) return;
  event.preventDefault();
  const over = rowAt(event);
  for (const row of rows.values()) row.node.classList.toggle("before", row === over && row !== dragged);
}

function drop(event) {
  if (!dragged) return;
  event.preventDefault();
  const order = waiting();
  const target = rowAt(event);
  if (!target || target === dragged) return;
  const down = order.indexOf(dragged) < order.indexOf(target);
  move(dragged, down ? order[order.indexOf(target) + 1] ?? null : target);
}

function dropRow(id) {
  rows.get(id)?.node.remove();
  rows.delete(id);
}

// The gallery

function showCard(video) {
  let card = cards.get(video.id);
  if (!card) {
    card = makeCard(video);
    cards.set(video.id, card);
    place($("gallery"), card.node, [...cards.values()], newestFirst);
  } else card.show(video);
}

// Identifiers sort by time.
const newestFirst = (a, b) => (a.video.id < b.video.id ? 1 : -1);

function makeCard(video) {
  const picture = el("div", { className: "picture" });
  const prompt = el("p", { className: "prompt" });
  const meta = el("p", { className: "meta" });
  const open = button("", () => openViewer(card.video, neighbour));
  open.append(picture, prompt, meta);
  const node = el("li", { className: "card" }, open);
  const card = { node, video, show };
  open.addEventListener("pointerenter", () => playIn(picture, card.video));
  open.addEventListener("pointerleave", () => picture.querySelector("video")?.remove());
  show(video);

  function show(now) {
    card.video = now;
    const done = state(now) === "done";
    node.classList.toggle("failed", state(now) === "failed");
    prompt.textContent = titleOf(now);
    meta.textContent = done ? factsOf(now) : stopText(now);
    const image = done && el("img", {
      loading: "lazy", decoding: "async", alt: "", className: tiny(now), src: contentUrl(now.id, "thumbnail"),
    });
    if (!done || !picture.querySelector("img")) picture.replaceChildren(image || "—");
  }
  return card;
}

const stopText = (video) =>
  (state(video) === "failed" ? `Failed: ${video.error?.message ?? "no reason is known"}` : "Cancelled");

function playIn(picture, video) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (still || state(video) !== "done" || video.mlx_sora.frames === 1) return;
  const film = el("video", {
    src: contentUrl(video.id, "video"), muted: true, loop: true, autoplay: true, playsInline: true,
    className: tiny(video), "aria-hidden": "true",
  });
  film.addEventListener("error", () => film.remove());
  picture.append(film);
}

/** Return the video `step` places behind this one in the gallery. */
function neighbour(id, step) {
  const order = [...cards.values()].sort(newestFirst);
  return order[order.findIndex((card) => card.video.id === id) + step]?.video;
}

function dropCard(id) {
  cards.get(id)?.node.remove();
  cards.delete(id);
}
