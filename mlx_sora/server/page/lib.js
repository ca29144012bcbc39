// Nodes, words and requests: what the other files share.

export const $ = (id) => document.getElementById(id);

/** Return a new element. `on…` are listeners; names that the element lacks become attributes. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && name !== "list") node[name] = value;
    else node.setAttribute(name, value);
  }
  // Strings become text nodes, so that no text of a prompt, a file or an error is read as HTML.
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

export const button = (text, onclick, className = "", label = undefined) =>
  el("button", { type: "button", className, onclick, "aria-label": label }, text);

export class ApiError extends Error {
  constructor(message, status, body = {}) {
    super(message);
    this.status = status;
    this.body = body;
  }
}

/** Return the JSON that the server answers. Throws ApiError with its one line. */
export async function api(path, { method = "GET", json, form, signal, keepalive } = {}) {
  const headers = json === undefined ? {} : { "Content-Type": "application/json" };
  const body = json === undefined ? form : JSON.stringify(json);
  let response;
  try {
    response = await fetch(path, { method, headers, body, signal, keepalive });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Start it again: python -m mlx_sora serve", 0);
  }
  const answer = parse(await response.text());
  if (response.ok) return answer;
  if (response.status === 401) document.dispatchEvent(new Event("token-needed"));
  const message = answer?.error?.message ?? `The server answers ${response.status}.`;
  throw new ApiError(message, response.status, answer?.error ?? {});
}

export const post = (path, json = {}) => api(path, { method: "POST", json });

function parse(text) {
  try {
    // A seed may have more digits than a JavaScript number holds: it stays text.
    return JSON.parse(text.replace(/("seed":\s*)(\d{16,})/g, '$1"$2"'));
  } catch {
    return null;
  }
}

export const contentUrl = (id, variant, more = "") =>
  `/v1/videos/${encodeURIComponent(id)}/content?variant=${variant}${more}`;

// A number and its unit stay on one line.
const unit = (number, name) => `${number}\u00a0${name}`;

export function duration(seconds) {
  if (seconds < 90) return unit(seconds < 1 ? seconds.toFixed(1) : Math.round(seconds), "s");
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? unit(minutes, "min") : `${unit(Math.floor(minutes / 60), "h")} ${unit(minutes % 60, "min")}`;
}

export function bytes(count) {
  if (count < 1e9) return unit(Math.max(1, Math.round(count / 1e6)), "MB");
  return unit((count / 1e9).toFixed(count < 1e10 ? 1 : 0), "GB");
}

export const times = (size) => String(size ?? "").replace("x", "×");

export const frameCount = (count) => (count === 1 ? "1 frame" : `${count} frames`);

export function debounce(wait, action) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, wait);
  };
}

/** Return a function that runs `action` at most once in `wait` milliseconds, and once at the end. */
export function throttle(wait, action) {
  let timer = null;
  return () => {
    timer ??= setTimeout(() => {
      timer = null;
      action();
    }, wait);
  };
}

/** Show a short message, with a button if `action` is [text, function]. */
export function toast(message, action = null) {
  const box = el("div", { className: "toast" }, el("span", {}, message));
  if (action) {
    box.append(button(action[0], () => (box.remove(), action[1]())));
  }
  const host = $("toasts");
  const older = [...host.children];
  for (const same of older.filter((other) => other.textContent === box.textContent)) same.remove();
  if (older.length > 2) older[0].remove();
  host.append(box);
  if (host.showPopover) { // above an open dialog
    if (host.matches(":popover-open")) host.hidePopover();
    host.showPopover();
  }
  setTimeout(() => box.remove(), action ? 12000 : 6000);
}

/** Run an action of a button; what the server refuses is shown as its line. */
export async function attempt(action) {
  try {
    return await action();
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status !== 401) toast(error.message);
    return undefined;
  }
}

/** Ask a question. Return true if the answer is `yes`. */
export function confirmed(question, detail, yes) {
  const dialog = $("confirm");
  return new Promise((resolve) => {
    const close = (answer) => (dialog.close(), resolve(answer));
    const no = button("Keep", () => close(false));
    dialog.replaceChildren(
      el("h2", { id: "confirm-title" }, question),
      el("p", {}, detail),
      el("p", { className: "actions" }, no, button(yes, () => close(true), "danger")),
    );
    dialog.oncancel = () => resolve(false);
    dialog.showModal();
    no.focus();
  });
}
