// The start of the page: theme, the stream of events, files dropped anywhere, the token.

import { $, api, ApiError, attempt } from "./lib.js";
import { addFiles, addItem, fillFrom, startForm, wireForm } from "./form.js";
import { handle, refresh, wireJobs } from "./jobs.js";
import { upload } from "./media.js";

const RETRY = [1000, 2000, 4000];

function wireTheme() {
  const saved = localStorage.getItem("mlx_sora theme") ?? "auto";
  const apply = (theme) => (document.documentElement.dataset.theme = theme);
  $("theme").value = saved;
  apply(saved);
  $("theme").addEventListener("change", () => {
    apply($("theme").value);
    localStorage.setItem("mlx_sora theme", $("theme").value);
  });
}

/** Follow the server's events. After a break, load everything anew: events may be missing. */
class Connection {
  #stream = null;
  #failures = 0;
  #timer = null;
  #ready = false;

  open() {
    clearTimeout(this.#timer);
    this.#stream?.close();
    this.#stream = new EventSource("/v1/events");
    this.#stream.onopen = () => this.#load();
    this.#stream.onmessage = (message) => handle(JSON.parse(message.data));
    this.#stream.onerror = () => this.#lost();
  }

  close() {
    clearTimeout(this.#timer);
    this.#stream?.close();
    this.#stream = null;
  }

  async #load() {
    try {
      if (!this.#ready) await startForm();
      this.#ready = true;
      await refresh();
      this.#failures = 0;
      show("");
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.#lost();
    }
  }

  #lost() {
    this.close();
    show("Connection lost. Trying again …");
    api("/v1/videos?limit=1").catch(() => {}); // finds out if a token is needed
    this.#timer = setTimeout(() => this.open(), RETRY[Math.min(this.#failures++, RETRY.length - 1)]);
  }
}

function show(problem) {
  $("connection").textContent = problem;
  $("connection").classList.toggle("lost", Boolean(problem));
}

/** Take files dropped anywhere: in the field they are used, elsewhere a request in them counts. */
function wireDrops() {
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  const field = $("media");
  let depth = 0;
  const mark = (event, change) => {
    if (!hasFiles(event)) return;
    depth = Math.max(0, depth + change);
    $("drop-cover").hidden = depth === 0;
    field.classList.toggle("over", depth > 0 && field.contains(event.target));
  };
  addEventListener("dragenter", (event) => mark(event, 1));
  addEventListener("dragleave", (event) => mark(event, -1));
  addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    mark(event, -depth);
    const files = [...event.dataTransfer.files];
    if (field.contains(event.target)) addFiles(files);
    else attempt(() => take(files));
  });
  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length) addFiles(files);
  });
}

async function take(files) {
  for (const file of files) {
    const item = await upload(file);
    if (item.request) fillFrom(item);
    else addItem(item);
  }
}

function wireToken() {
  document.addEventListener("token-needed", () => {
    connection.close();
    show("");
    if (!$("token").open) $("token").showModal();
  });
  $("token-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const token = $("token-value").value.trim();
    const answer = await fetch("/v1/videos?limit=1", {
      headers: { Authorization: `Bearer ${token}` }, credentials: "omit",
    }).catch(() => null);
    if (answer?.ok) location.href = `/?token=${encodeURIComponent(token)}`;
    else $("token-error").textContent = answer ? "This is not its token." : "The server does not answer.";
  });
}

wireTheme();
wireForm();
wireJobs();
wireDrops();
wireToken();
const connection = new Connection();
connection.open();
// A hidden tab lets go of its connection: browsers allow six to a server, over all tabs.
document.addEventListener("visibilitychange", () => (document.hidden ? connection.close() : connection.open()));
