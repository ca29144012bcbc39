// The request: what to make, what it would need, and the places it is filled from.

import {
  $, api, ApiError, attempt, button, bytes, debounce, duration, el, frameCount, post, times, toast,
} from "./lib.js";
import { findItem, itemOf, MediaList, thumbnailOf } from "./media.js";
import { OptionPanel } from "./options.js";

const DRAFT = "mlx_sora request";
const panel = new OptionPanel($("options"), $("option-filter"), $("option-count"));
const media = new MediaList($("media-list"), changed);

let models = [];
let schemas = {};
let source = null; // the video that is edited: {id, name}
let planning = null; // AbortController of the plan that is asked for

const replan = debounce(300, plan);

function changed() {
  sessionStorage.setItem(DRAFT, JSON.stringify(draft()));
  $("form-error").hidden = true;
  $("preset-hint").textContent = schemas.presets?.[$("preset").value] ?? "";
  replan();
}

/** Load what the form offers, and what was in it before a reload. */
export async function startForm() {
  const [listed, generate, edit] = await Promise.all([
    api("/v1/models"), api("/v1/options?task=generate"), api("/v1/options?task=edit"),
  ]);
  models = listed.data;
  schemas = { generate: generate.data, edit: edit.data, presets: presetHints(generate.presets) };
  const named = models.map((model) => el("option", { value: model.id }, nameOf(model)));
  $("model").replaceChildren(...named);
  $("preset").replaceChildren(
    el("option", { value: "" }, "None"),
    ...Object.keys(schemas.presets).map((name) => el("option", {}, name)));
  panel.setSchema(schemas.generate);
  showModel();
  restore();
}

/** Wire the controls, once. */
export function wireForm() {
  $("form").addEventListener("input", changed);
  $("form").addEventListener("submit", submit);
  $("model").addEventListener("change", showModel);
  $("size").addEventListener("change", showCustom);
  $("length").addEventListener("change", showCustom);
  $("reset").addEventListener("click", reset);
  $("files").addEventListener("change", () => {
    addFiles([...$("files").files]);
    $("files").value = "";
  });
  $("form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  });
}

export const addFiles = (files) => media.addFiles(files);
export const addItem = (item) => media.add(item);

const nameOf = ({ id, mlx_sora: about }) =>
  (about.fits === false ? `${about.name ?? id} (too large for this machine)` : about.name ?? id);

const presetHints = (presets) => Object.fromEntries(
  (Array.isArray(presets) ? presets : Object.entries(presets ?? {}).map(([name, p]) => ({ name, ...p })))
    .map((preset) => [preset.name, preset.description ?? ""]));

const current = () => models.find(({ id }) => id === $("model").value)?.mlx_sora ?? {};

/** Show what the chosen model can draw, and the sizes and lengths that it knows. */
function showModel() {
  const { description, examples = [], sizes = [], frames = [], defaults = {} } = current();
  $("about").textContent = description ?? "";
  $("examples").replaceChildren(...examples.map((prompt) => el("li", {}, button(prompt, () => {
    $("prompt").value = prompt;
    $("prompt").focus();
    changed();
  }))));
  const fps = defaults.fps ?? 24;
  choices($("size"), sizes.map(String), times, defaults.width && `${defaults.width}x${defaults.height}`);
  choices($("length"), frames.map(String),
    (count) => (count === "1" ? "an image" : duration(count / fps)), defaults.num_frames);
  showCustom();
}

function choices(select, values, describe, standard) {
  const before = select.value;
  const first = source ? "As the video" : standard ? describe(String(standard)) : "Default of the model";
  select.replaceChildren(
    el("option", { value: "" }, first),
    ...values.filter((value) => source || value !== String(standard))
      .map((value) => el("option", { value }, describe(value))),
    el("option", { value: "other" }, "Other …"));
  select.value = before;
  if (select.selectedIndex < 0) select.value = "";
}

function showCustom() {
  $("custom-size").hidden = $("size").value !== "other";
  $("custom-length").hidden = $("length").value !== "other";
  const one = ($("length").value || String(current().defaults?.num_frames)) === "1";
  $("submit").textContent = source ? "Edit video" : one ? "Make image" : "Make video";
}

/** Return the request as the API takes it. */
function request() {
  const body = { model: $("model").value || undefined, prompt: $("prompt").value.trim(), ...panel.values() };
  const [width, height] = $("size").value === "other" ? [$("width").value, $("height").value]
    : $("size").value.split("x");
  if (width) body.width = width;
  if (height) body.height = height;
  const frames = $("length").value === "other" ? $("frames").value : $("length").value;
  if (frames) body.num_frames = frames;
  if (source) {
    return { ...body, kind: "edit", video: { id: source.id }, source_prompt: $("source-prompt").value.trim() };
  }
  if ($("preset").value) body.preset = $("preset").value;
  const [images, videos] = [media.images(), media.videos()];
  if (images.length) body.images = images;
  if (videos.length) body.videos = videos;
  return body;
}

/** Return path and body that record which video the new one comes from. */
function destination({ kind, ...body }) {
  if (source) return ["/v1/videos/edits", body];
  const [[id, side, frames, strength], ...videos] = body.videos ?? [[]];
  if (!id?.startsWith("video_") || [side, frames, strength].join() !== "before,17,1") return ["/v1/videos", body];
  const count = body.num_frames ?? current().defaults?.num_frames;
  return ["/v1/videos/extensions", { ...body, video: { id }, videos, num_frames: count }];
}

async function submit(event) {
  event.preventDefault();
  $("submit").disabled = true;
  try {
    await media.ready;
    await post(...destination(request()));
    toast("It is in the queue.");
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    showError(error.message);
  } finally {
    $("submit").disabled = false;
  }
}

function showError(message) {
  $("form-error").textContent = message;
  $("form-error").hidden = false;
}

/** Ask what the request would need; without a prompt, for one that the model can draw. */
async function plan() {
  planning?.abort();
  planning = new AbortController();
  const { signal } = planning;
  const body = request();
  const example = current().examples?.[0] ?? "video";
  body.prompt ||= example;
  if (source) body.source_prompt ||= example;
  try {
    showPlan(await api("/v1/plan", { method: "POST", json: body, signal }));
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!(error instanceof ApiError)) throw error;
    $("plan").classList.add("bad");
    $("plan").replaceChildren(error.message);
  }
}

function showPlan(found) {
  const facts = [`peak ${bytes(found.peak)}`];
  if (found.capacity) facts[0] += ` of ${bytes(found.capacity)}`;
  if (found.seconds) facts.push(`about ${duration(found.seconds)}`);
  facts.push(times(found.size), frameCount(found.frames));
  $("plan").classList.toggle("bad", !found.fits);
  $("plan").replaceChildren(
    el("span", { className: "fits" }, found.fits ? "Fits in memory: " : "Does not fit in memory: "),
    found.fits ? facts.join(", ") : found.error,
    found.warnings?.length ? el("ul", {}, found.warnings.map((text) => el("li", {}, text))) : "",
    found.fits ? "" : suggestions(found));
}

/** Return buttons that set options which would fit, or without any what to do. */
function suggestions({ suggestions: list, fix }) {
  if (!list?.length) return ` ${fix}`;
  return el("p", { className: "chips" }, "These would fit:", list.map((options) => {
    const { width, height, num_frames: count, ...others } = options;
    const words = Object.entries(others).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`);
    const text = [width && `${width}×${height}`, count && frameCount(count), ...words].filter(Boolean).join(", ");
    return button(text, () => fill({ ...valuesNow(), ...options }));
  }));
}

const valuesNow = () => {
  const { images, videos, video, ...rest } = request();
  return rest;
};

/** Put options of a request into the form. Media stay if `values` has none. */
export function fill(values, items = null) {
  if (models.some(({ id }) => id === values.model)) $("model").value = values.model;
  showModel();
  $("prompt").value = values.prompt ?? "";
  $("preset").value = values.preset ?? "";
  choose("size", values.width && values.height ? `${values.width}x${values.height}` : "");
  $("width").value = values.width ?? "";
  $("height").value = values.height ?? "";
  choose("length", String(values.num_frames ?? ""));
  $("frames").value = values.num_frames ?? "";
  panel.fill(values);
  if (items) {
    media.clear();
    for (const { item, use } of items) media.add(item, use);
  }
  showCustom();
  changed();
}

function choose(id, value) {
  const same = [...$(id).options].some((option) => option.value === value);
  const { width, height, num_frames: count } = current().defaults ?? {};
  const standard = !source && value === (id === "size" ? `${width}x${height}` : String(count));
  $(id).value = standard ? "" : same ? value : "other";
}

/** Make a new video, or edit `video` by a prompt. */
function setSource(video, prompt = "") {
  source = video;
  for (const node of document.querySelectorAll(".edit-only")) node.hidden = !video;
  $("media").hidden = Boolean(video);
  $("preset").parentElement.hidden = Boolean(video);
  $("preset-hint").hidden = Boolean(video);
  $("form-title").textContent = video ? "Edit by prompt" : "New video";
  $("prompt-label").textContent = video ? "What it should show instead" : "Prompt";
  $("source-prompt").value = prompt;
  $("source").hidden = !video;
  $("source").replaceChildren(...(video ? [
    el("img", { src: thumbnailOf(video.id), alt: "" }), el("p", { className: "name" }, video.name)] : []));
  if (schemas.edit) panel.setSchema(video ? schemas.edit : schemas.generate);
  showModel();
}

function show() {
  $("form").parentElement.scrollTop = 0;
  $("form").scrollIntoView({ block: "start" });
  $("prompt").focus();
}

/** Fill the form with the request of a video made here. */
export async function changeThis(video) {
  const { options, kind, parent } = video.mlx_sora;
  const edited = kind === "edit" ? { id: options.video ?? parent, name: options.source_prompt } : null;
  setSource(edited, options.source_prompt);
  fill({ model: video.model, ...options }, await itemsOf(options));
  show();
}

export function editBy(video) {
  const name = video.prompt || video.id;
  setSource({ id: video.id, name }, video.prompt ?? "");
  fill({ model: video.model, prompt: video.prompt ?? "" }, []);
  show();
}

export function goOn(video) {
  setSource(null);
  const { images, videos, seed, ...options } = video.mlx_sora.kind === "edit"
    ? { prompt: video.prompt } : video.mlx_sora.options;
  // Its last 17 frames are the first ones of the new video, which has to be longer than these.
  const model = models.find(({ id }) => id === video.model)?.mlx_sora;
  const longest = Math.max(...(model?.frames ?? []), 34);
  options.num_frames = video.mlx_sora.frames === 1 ? null : Math.min(video.mlx_sora.frames + 17, longest);
  fill({ model: video.model, ...options }, [{ item: itemOf(video) }]);
  show();
}

/** Fill the form with the request that a file carries. */
export function fillFrom(file) {
  setSource(null);
  const { images, videos, ...options } = file.request;
  fill(options, []);
  show();
  const left = images?.length || videos?.length ? " Its pictures and videos are not in the file: add them." : "";
  toast(`The form has the request of ${file.name}.${left}`, ["Use the file itself", () => addItem(file)]);
}

/** Return the pictures and videos of a request for the list, but for those that are deleted. */
async function itemsOf({ images = [], videos = [] }) {
  const named = { 0: "first", "-1": "last" };
  const uses = [
    ...images.map(([id, frame, strength]) => [id, { frame: named[frame ?? 0] ?? String(frame), strength }]),
    ...videos.map(([id, side, frames, strength]) => [id, { side, frames, strength }]),
  ];
  const items = await Promise.all(uses.map(([id]) => attempt(() => findItem(id))));
  return items.map((item, index) => ({ item, use: withoutGaps(uses[index][1]) })).filter(({ item }) => item);
}

const withoutGaps = (use) => Object.fromEntries(Object.entries(use).filter(([, value]) => value !== undefined));

function reset() {
  setSource(null);
  fill({ model: $("model").value }, []);
  $("prompt").focus();
}

function draft() {
  return { source, sourcePrompt: $("source-prompt").value, values: valuesNow(), items: media.entries() };
}

function restore() {
  let saved = null;
  try {
    saved = JSON.parse(sessionStorage.getItem(DRAFT));
  } catch { /* a draft of another version */ }
  setSource(saved?.source ?? null, saved?.sourcePrompt);
  fill(saved?.values ?? { model: $("model").value }, saved?.items ?? []);
}
