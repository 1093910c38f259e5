// The chat page. Text of the model only ever becomes text nodes: nothing here reads it as HTML.

const $ = (id) => document.getElementById(id);
const clock = () => performance.now() / 1000;
const count = (n) => n.toLocaleString("en");
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

function make(tag, props = {}, ...children) {
	const node = Object.assign(document.createElement(tag), props);
	node.append(...children);
	return node;
}

function icon(name) {
	const node = $("icons").content.querySelector(`.${name}`).cloneNode(true);
	node.setAttribute("aria-hidden", "true");
	return node;
}

function button(name, label, act, text = "") {
	const node = make("button", { type: "button", className: text ? "plain" : "icon", title: text ? "" : label }, icon(name), text);
	node.setAttribute("aria-label", label);
	node.addEventListener("click", () => act(node));
	return node;
}

function copier(label, text) {
	return button("copy", label, async (node) => {
		const done = await copy(typeof text === "function" ? text() : text);
		node.replaceChild(icon(done ? "done" : "close"), node.firstChild);
		say(done ? "Copied" : "Copying is not allowed here");
		setTimeout(() => node.replaceChild(icon("copy"), node.firstChild), 1500);
	});
}

async function copy(text) {
	try {
		await navigator.clipboard.writeText(text);
		return true;
	} catch {
		// without https there is no clipboard object: a selection still can be copied
		const area = make("textarea", { value: text, className: "unseen" });
		document.body.append(area);
		area.select();
		const done = document.execCommand("copy");
		area.remove();
		return done;
	}
}

const say = (text) => ($("status").textContent = text);

// Markdown: blocks first, each with its source, so that a growing answer renders its last block only

const LONG = 20000; // a paragraph above this stays plain: formatting it would cost more than it shows
const FENCE = /^( {0,3})(`{3,}|~{3,})[ \t]*([^\s`]{0,40})/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const RULE = /^ {0,3}(?:(?:- *){3,}|(?:\* *){3,}|(?:_ *){3,})$/;
const FORMULA = /^ {0,3}(\$\$|\\\[)/;
const DASHES = /^\s*:?-+:?\s*$/;

const blank = (line) => line.trim() === "";
const indent = (line) => line.length - line.trimStart().length;
const isRule = (line) => line.length < 200 && RULE.test(line);
const interrupts = (line) => FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || /^ *([-*+]|1[.)]) /.test(line) || isRule(line) || FORMULA.test(line);

function cells(line) {
	const row = line.trim().replace(/^\|/, "").replace(/\|$/, "");
	return row.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function isTable(lines, i) {
	const dashes = lines[i + 1];
	if (!lines[i].includes("|") || !dashes || !dashes.includes("-") || dashes.length > 2000) return false;
	const marks = cells(dashes);
	return marks.every((mark) => DASHES.test(mark)) && marks.length === cells(lines[i]).length;
}

/** Blocks of Markdown: {kind, source, ...}. */
function parse(text, depth = 0) {
	const lines = text.split("\n").map((line) => line.replace(/^[ \t]{1,80}/, (space) => space.replaceAll("\t", "    ")));
	const blocks = [];
	let i = 0;
	while (i < lines.length) {
		if (blank(lines[i])) {
			i++;
			continue;
		}
		const start = i;
		const block = next();
		block.source = lines.slice(start, i).join("\n");
		blocks.push(block);
	}
	return blocks;

	function next() {
		let found;
		if ((found = FENCE.exec(lines[i]))) return fence(found);
		if ((found = HEADING.exec(lines[i]))) return { kind: "heading", level: found[1].length, text: lines[i++] && found[2] };
		if (isRule(lines[i])) return { kind: "rule", at: i++ };
		if ((found = FORMULA.exec(lines[i])) && (found = formula(found[1] === "$$" ? "$$" : "\\]"))) return found;
		if (depth < 8 && QUOTE.test(lines[i])) return quote();
		if (depth < 8 && ITEM.test(lines[i])) return list();
		if (isTable(lines, i)) return table();
		const from = i++;
		while (i < lines.length && !blank(lines[i]) && !interrupts(lines[i]) && !isTable(lines, i)) i++;
		return { kind: "paragraph", text: lines.slice(from, i).join("\n").trim() };
	}

	function fence([, space, mark, language]) {
		const from = ++i;
		while (i < lines.length && !(indent(lines[i]) < 4 && lines[i].trim().startsWith(mark) && !lines[i].trim().replaceAll(mark[0], ""))) i++;
		const code = lines.slice(from, i++).map((line) => line.slice(Math.min(indent(line), space.length)));
		return { kind: "code", language, text: code.join("\n") };
	}

	function formula(close) {
		for (let end = i; end < Math.min(lines.length, i + 200); end++) {
			const line = lines[end].trimEnd();
			const at = line.indexOf(close, end === i ? indent(line) + 2 : 0);
			if (at < 0) continue;
			if (at + 2 < line.length) return null;
			const text = lines.slice(i, end + 1).join("\n").trim();
			i = end + 1;
			return { kind: "formula", text };
		}
		return null;
	}

	function quote() {
		const inner = [];
		while (i < lines.length && QUOTE.test(lines[i])) inner.push(lines[i++].replace(QUOTE, ""));
		return { kind: "quote", blocks: parse(inner.join("\n"), depth + 1) };
	}

	function list() {
		const [, space, mark] = ITEM.exec(lines[i]);
		const ordered = mark.length > 1;
		const items = [];
		const width = space.length + 2;
		const isNext = (line) => {
			const found = ITEM.exec(line);
			return found && found[1].length < width && found[2].length > 1 === ordered && !isRule(line);
		};
		while (i < lines.length && isNext(lines[i])) {
			const lead = ITEM.exec(lines[i])[0].length;
			const inner = [lines[i++].slice(lead)];
			while (i < lines.length) {
				let after = i;
				while (after < lines.length && blank(lines[after])) after++;
				if (after > i) {
					if (after === lines.length || indent(lines[after]) < width) break;
					inner.push("");
					i = after;
				} else if (indent(lines[i]) >= width) {
					inner.push(lines[i].slice(Math.min(indent(lines[i]), lead)));
					i++;
				} else if (ITEM.test(lines[i]) || interrupts(lines[i])) {
					break;
				} else {
					inner.push(lines[i++]);
				}
			}
			items.push(parse(inner.join("\n"), depth + 1));
			let after = i;
			while (after < lines.length && blank(lines[after])) after++;
			if (after < lines.length && isNext(lines[after])) i = after;
		}
		return { kind: "list", ordered, first: parseInt(mark, 10), items };
	}

	function table() {
		const head = cells(lines[i]);
		const sides = cells(lines[i + 1]).map((mark) => (!mark.endsWith(":") ? "" : mark.startsWith(":") ? "center" : "end"));
		const rows = [];
		for (i += 2; i < lines.length && lines[i].includes("|"); i++) rows.push(cells(lines[i]));
		return { kind: "table", head, sides, rows };
	}
}

function math(text, display) {
	return make(display ? "div" : "span", { className: "math", dir: "ltr" }, make("code", {}, text), copier("Copy formula", text));
}

/** The DOM of one block. */
function draw(block) {
	if (block.kind === "heading") return make(`h${block.level}`, {}, ...inline(block.text));
	if (block.kind === "rule") return make("hr");
	if (block.kind === "formula") return math(block.text, true);
	if (block.kind === "quote") return make("blockquote", {}, ...block.blocks.map(draw));
	if (block.kind === "list") {
		const node = make(block.ordered ? "ol" : "ul", {}, ...block.items.map((item) => make("li", {}, ...item.map(draw))));
		if (block.ordered && block.first !== 1) node.start = block.first;
		return node;
	}
	if (block.kind === "code") {
		const bar = make("div", { className: "code-bar" }, make("span", {}, block.language || "code"), copier("Copy code", block.text));
		return make("div", { className: "code", dir: "ltr" }, bar, make("pre", { tabIndex: 0 }, make("code", {}, block.text)));
	}
	if (block.kind === "table") {
		const row = (tag, texts) => make("tr", {}, ...block.head.map((_, i) => make(tag, { className: block.sides[i] }, ...inline(texts[i] ?? ""))));
		const body = make("tbody", {}, ...block.rows.map((texts) => row("td", texts)));
		return make("div", { className: "table", tabIndex: 0 }, make("table", {}, make("thead", {}, row("th", block.head)), body));
	}
	return make("p", {}, ...inline(block.text));
}

const INLINE = new RegExp(
	[
		/(?<math>\\\([^]{1,1000}?\\\)|\\\[[^]{1,1000}?\\\]|\$\$[^$]{1,1000}\$\$|\$(?=[^\s$])[^$\n]{0,1000}?[^\s$\\]\$(?!\d))/,
		/\\(?<escape>[!-/:-@[-`{-~])/,
		/(?<tick>`{1,4})(?!`)(?<code>[^]{0,1000}?[^`])\k<tick>(?!`)/,
		/\*\*(?=\S)(?<strong>[^]{0,1000}?\S)\*\*(?!\*)/,
		/(?<!\w)__(?=\S)(?<strong2>[^_]{0,1000}?\S)__(?!\w)/,
		/\*(?=[^\s*])(?<em>[^*]{0,1000}[^\s*])\*(?!\*)/,
		/(?<!\w)_(?=[^\s_])(?<em2>[^_]{0,1000}[^\s_])_(?!\w)/,
		/~~(?=\S)(?<del>[^~]{1,1000})~~/,
		/!?\[(?<text>[^[\]]{1,500})\]\(<?(?<href>[^\s()<>]{0,1000}(?:\([^\s()]{0,200}\)[^\s()<>]{0,1000})?)>?(?:\s{1,9}"[^"]{0,200}")?\)/,
		/(?<bare>(?<!\w)https?:\/\/[^\s<>"'`]{1,1000})/,
	]
		.map((part) => part.source)
		.join("|"),
	"g",
);

/** Nodes of a line of Markdown; links lead to http and https only. */
function inline(text, depth = 0) {
	if (text.length > LONG || depth > 6) return [text];
	const nodes = [];
	let from = 0;
	for (const found of text.matchAll(INLINE)) {
		const part = found.groups;
		let end = found.index + found[0].length;
		if (found.index > from) nodes.push(text.slice(from, found.index));
		if (part.math) nodes.push(math(part.math, false));
		else if (part.escape) nodes.push(part.escape);
		else if (part.tick) nodes.push(make("code", { dir: "ltr" }, part.code.replace(/^ (.*) $/, "$1")));
		else if (part.strong ?? part.strong2) nodes.push(make("strong", {}, ...inline(part.strong ?? part.strong2, depth + 1)));
		else if (part.em ?? part.em2) nodes.push(make("em", {}, ...inline(part.em ?? part.em2, depth + 1)));
		else if (part.del) nodes.push(make("del", {}, ...inline(part.del, depth + 1)));
		else if (part.bare) {
			const href = part.bare.replace(part.bare.includes("(") ? /[.,;:!?*_\]]+$/ : /[.,;:!?*_\])]+$/, "");
			end = found.index + href.length;
			nodes.push(link(href, [href]));
		} else nodes.push(link(part.href, inline(part.text, depth + 1)));
		from = end;
	}
	if (from < text.length) nodes.push(text.slice(from));
	return nodes;
}

function link(href, children) {
	if (!/^https?:\/\//i.test(href) || !URL.canParse(href)) return make("span", { className: "dead-link" }, ...children);
	return make("a", { href, title: href, target: "_blank", rel: "noopener noreferrer nofollow" }, ...children);
}

// What the browser keeps: settings and one entry a chat; the key only as long as the tab

const PREFIX = "alloy.chat.";
const settings = { thinking: true, budget: 20, temperature: "", maxTokens: "", system: "", model: "", ...read(localStorage, "alloy.settings") };

function read(area, key) {
	try {
		return JSON.parse(area.getItem(key));
	} catch {
		return null;
	}
}

function write(key, value) {
	try {
		localStorage.setItem(key, JSON.stringify(value));
	} catch {
		say("The browser's storage is full: this chat is not saved. Delete old chats or download this one.");
	}
}

const saveSettings = () => write("alloy.settings", settings);
const saveChat = (chat) => chat.messages.length && !chat.deleted && write(PREFIX + chat.id, chat);

function chats() {
	const keys = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
	const all = keys.map((key) => read(localStorage, key)).filter((chat) => Array.isArray(chat?.messages));
	return all.sort((a, b) => b.changed - a.changed);
}

const newChat = () => ({ id: `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`, changed: Date.now(), system: settings.system, messages: [] });

const title = (chat) => chat.messages.find((message) => message.role === "user")?.content.trim().slice(0, 80) || "New chat";

// 0, 16, 24, 32, 48 ... 6144, 8192, then no limit
const BUDGETS = [0, ...Array.from({ length: 19 }, (_, i) => (i % 2 ? 24 : 16) * 2 ** (i >> 1)), -1];

// Messages on the page

let chat = newChat();
let running = null; // {chat, message, controller}
const views = new WeakMap();

function show() {
	$("log").replaceChildren(...chat.messages.map(view));
	if (!chat.messages.length) {
		const hello = make("h1", {}, "What shall we think about?");
		$("log").append(make("div", { className: "empty" }, hello, make("p", { id: "about" }, about)));
	}
	$("system").value = chat.system;
	$("download").disabled = !chat.messages.length;
	marks();
	controls();
	down(true);
}

/** Builds one message; what changes while it grows is set by `paint`. */
function view(message) {
	const own = message.role === "user";
	const root = make("article", { className: `message ${message.role}` });
	const made = { root, blocks: [], thought: "" };
	root.append(make("h2", { className: "unseen" }, own ? "You" : "Model"));
	made.summary = make("span", {});
	made.text = document.createTextNode("");
	made.pane = make("div", { className: "thought-text", dir: "auto", tabIndex: 0 }, made.text);
	made.details = make("details", { className: "thought", hidden: true }, make("summary", {}, made.summary), made.pane);
	made.details.firstChild.addEventListener("click", () => (made.touched = true));
	made.body = make("div", { className: "body", dir: "auto" });
	made.note = make("div", { className: "note", hidden: true });
	made.stats = make("span", { className: "stats" });
	made.tools = make("span", { className: "tools" }, copier("Copy message", () => message.content), button("edit", "Edit message", () => edit(message)));
	if (!own) made.tools.append(button("again", "Regenerate the answer", () => again(message)));
	root.append(made.details, made.body, made.note, make("footer", {}, made.stats, made.tools));
	views.set(message, made);
	paint(message);
	return root;
}

/** Brings the page up to what the message holds. */
function paint(message) {
	const made = views.get(message);
	if (!made?.root.isConnected && made?.painted) return;
	made.painted = true;
	const busy = running?.message === message;
	made.root.classList.toggle("busy", busy);
	made.root.setAttribute("aria-busy", busy);
	if (message.role === "user") made.body.textContent = message.content;
	else {
		paintThought(message, made, busy);
		const blocks = parse(message.content);
		let same = 0;
		while (same < blocks.length && blocks[same].source === made.blocks[same]) same++;
		while (made.body.childNodes.length > same) made.body.lastChild.remove();
		made.body.append(...blocks.slice(same).map(draw));
		made.blocks = blocks.map((block) => block.source);
		made.stats.textContent = meter(message);
		paintNote(message, made);
	}
}

function paintThought(message, made, busy) {
	const thinks = busy && !message.content;
	made.details.hidden = !message.reasoning;
	if (!message.reasoning) return;
	const atEnd = made.pane.scrollHeight - made.pane.scrollTop - made.pane.clientHeight < 40;
	made.text.appendData(message.reasoning.slice(made.thought.length));
	made.thought = message.reasoning;
	const spent = `${(message.stats.thought ?? 0).toFixed(1)} s, ${plural(message.stats.thoughtTokens ?? 0, "token")}`;
	made.summary.textContent = thinks ? `Thinking for ${spent}` : `Thought for ${spent}`;
	made.details.classList.toggle("live", thinks);
	// open while it grows, folded once; after that it is the reader's
	if (!made.touched && made.details.open !== thinks) made.details.open = thinks;
	if (thinks && atEnd) made.pane.scrollTop = made.pane.scrollHeight;
}

function meter(message) {
	const { first, rate, prompt, cached, answer, thoughtTokens } = message.stats;
	const parts = [];
	if (rate) parts.push(`${rate < 100 ? rate.toFixed(1) : count(Math.round(rate))} tokens/s`);
	if (first !== undefined) parts.push(`first after ${first.toFixed(2)} s`);
	if (prompt !== undefined) parts.push(`prompt ${count(prompt)}${cached ? ` (${count(cached)} cached)` : ""}`);
	if (answer !== undefined) parts.push(`answer ${count(answer)}${thoughtTokens ? ` + thought ${count(thoughtTokens)}` : ""}`);
	return parts.join(" · ");
}

function paintNote(message, made) {
	const note = message.note;
	if (made.shown === note) return;
	made.shown = note;
	made.note.hidden = !note;
	made.note.className = `note ${note?.kind ?? ""}`;
	made.note.replaceChildren();
	if (!note) return;
	made.seconds = make("span", {}, note.text);
	made.note.append(made.seconds);
	if (note.kind === "key") made.note.append(keyForm(() => again(message)));
	if (note.kind === "error" || note.kind === "lost") made.note.append(button("again", "Try again", () => again(message), "Try again"));
}

function keyForm(then) {
	const input = make("input", { type: "password", placeholder: "API key", autocomplete: "off", required: true });
	input.setAttribute("aria-label", "API key");
	const form = make("form", { className: "key" }, input, make("button", { className: "plain" }, "Use this key"));
	form.addEventListener("submit", (event) => {
		event.preventDefault();
		sessionStorage.setItem("alloy.key", input.value.trim());
		models();
		then();
	});
	return form;
}

/** Puts an editor in the place of a message. */
function edit(message) {
	const made = views.get(message);
	const owner = chat;
	const area = make("textarea", { value: message.content, dir: "auto" });
	area.setAttribute("aria-label", "Edit message");
	const own = message.role === "user";
	const close = () => {
		editor.replaceWith(made.root);
		made.root.querySelector("[aria-label='Edit message']").focus();
	};
	const save = () => {
		if (!area.value.trim() || (own && running)) return;
		message.content = area.value;
		if (!own) {
			saveChat(owner);
			close();
			return paint(message);
		}
		owner.messages.length = owner.messages.indexOf(message) + 1;
		show();
		answer();
	};
	const later = own && message !== chat.messages.at(-1) ? make("span", { className: "hint" }, "Messages after this one are replaced.") : "";
	const row = make("div", { className: "row" }, later, make("span", { className: "gap" }), make("button", { type: "button", className: "plain", onclick: close }, "Cancel"), make("button", { className: "plain strong" }, own ? "Send" : "Save"));
	const editor = make("form", { className: "message editor" }, area, row);
	editor.addEventListener("submit", (event) => (event.preventDefault(), save()));
	area.addEventListener("keydown", (event) => {
		if (event.key === "Escape") event.stopPropagation(), close();
		if (event.key === "Enter" && own && !event.shiftKey && !event.isComposing) event.preventDefault(), save();
	});
	made.root.replaceWith(editor);
	grow(area);
	area.focus();
}

function again(message) {
	if (running) return;
	chat.messages.length = chat.messages.indexOf(message);
	answer();
}

// One answer

function send() {
	const text = $("prompt").value.trim();
	if (!text || running) return;
	chat.messages.push({ role: "user", content: text });
	$("prompt").value = "";
	grow($("prompt"));
	answer();
}

function request(owner, upTo) {
	const messages = owner.messages.slice(0, upTo).filter((message) => message.content || message.reasoning);
	const sent = messages.map(({ role, content, reasoning }) => ({ role, content, ...(reasoning && { reasoning }) }));
	if (owner.system.trim()) sent.unshift({ role: "system", content: owner.system });
	const body = { model: settings.model, messages: sent, stream: true, stream_options: { include_usage: true }, chat_template_kwargs: { enable_thinking: settings.thinking } };
	if (settings.thinking) body.thinking_token_budget = BUDGETS[settings.budget];
	if (settings.temperature !== "") body.temperature = Number(settings.temperature);
	if (settings.maxTokens !== "") body.max_tokens = Number(settings.maxTokens);
	return body;
}

async function answer() {
	const owner = chat;
	const message = { role: "assistant", content: "", reasoning: "", model: settings.model, stats: {}, pending: true };
	owner.messages.push(message);
	owner.changed = Date.now();
	running = { chat: owner, message, controller: new AbortController(), spoken: 0, saidAt: clock() };
	const run = running;
	saveChat(owner);
	show();
	try {
		await exchange(run, request(owner, owner.messages.length - 1));
	} catch (error) {
		if (run.controller.signal.aborted) message.note = { kind: "stopped", text: "Stopped." };
		else if (error instanceof Told) message.note = { kind: error.kind, text: error.message };
		else if (message.content || message.reasoning) message.note = { kind: "lost", text: "The connection was lost. What arrived is kept." };
		else message.note = { kind: "lost", text: "The server cannot be reached." };
	}
	delete message.pending;
	running = null;
	saveChat(owner);
	cancelAnimationFrame(run.frame);
	paint(message);
	marks();
	controls();
	if (owner === chat) down();
	say([message.content.slice(run.spoken), message.note?.text ?? "The answer is complete."].join(" "));
}

class Told extends Error {
	constructor(kind, text) {
		super(text);
		this.kind = kind;
	}
}

async function exchange(run, body) {
	const { message, controller } = run;
	for (;;) {
		const began = clock();
		const response = await call("v1/chat/completions", { method: "POST", body: JSON.stringify(body), signal: controller.signal });
		if (response.ok) return receive(run, response, began);
		const error = (await response.json().catch(() => null))?.error;
		if (response.status === 401) throw new Told("key", sessionStorage.getItem("alloy.key") ? "The server refuses this key." : "The server asks for a key.");
		const wait = Number(response.headers.get("retry-after") ?? NaN);
		const isBusy = response.status === 503 || response.status === 429;
		if (!isBusy || error?.code === "engine_dead") throw new Told("error", error?.message ?? `The server answered with status ${response.status}.`);
		await countdown(message, Math.min(Math.max(wait || 5, 1), 600), controller.signal);
	}
}

function call(path, options = {}) {
	const key = sessionStorage.getItem("alloy.key");
	const headers = { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
	return fetch(path, { ...options, headers, credentials: "same-origin", cache: "no-store" });
}

async function countdown(message, seconds, signal) {
	const until = clock() + seconds;
	for (let left = seconds; left > 0; left = Math.ceil(until - clock())) {
		message.note = { kind: "busy", text: `The server is busy, retrying in ${Math.ceil(left)} s` };
		paint(message);
		if (left === seconds) say(message.note.text);
		await new Promise((resolve) => setTimeout(resolve, Math.min(1000, left * 1000)));
		signal.throwIfAborted();
	}
	message.note = null;
	paint(message);
}

/** Data of server-sent events, one string an event. */
async function* events(response) {
	const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
	let rest = "";
	let data = [];
	for (;;) {
		const { value, done } = await reader.read();
		if (done) return;
		const lines = (rest + value).split(/\r\n|\n|\r/);
		rest = lines.pop();
		for (const line of lines) {
			if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
			if (line || !data.length) continue;
			yield data.join("\n");
			data = [];
		}
	}
}

async function receive(run, response, began) {
	const { message } = run;
	const { stats } = message;
	let tokens = 0;
	let first = 0;
	let ended = false;
	for await (const data of events(response)) {
		if (data === "[DONE]") {
			ended = true;
			break;
		}
		const chunk = JSON.parse(data);
		if (chunk.error) throw new Told("error", chunk.error.message ?? "The server ended the answer with an error.");
		const choice = chunk.choices?.[0];
		const thought = choice?.delta?.reasoning ?? choice?.delta?.reasoning_content ?? "";
		const content = choice?.delta?.content ?? "";
		const now = clock();
		if (thought || content) {
			// until the usage comes a chunk counts as a token
			tokens++;
			first ||= now;
			stats.first = first - began;
			if (thought) stats.thoughtTokens = (stats.thoughtTokens ?? 0) + 1;
			if (message.reasoning || thought) stats.thought = message.content ? stats.thought : now - first;
			message.reasoning += thought;
			message.content += content;
			stats.answer = tokens - (stats.thoughtTokens ?? 0);
			run.last = now;
		}
		if (chunk.usage) {
			tokens = chunk.usage.completion_tokens;
			stats.prompt = chunk.usage.prompt_tokens;
			stats.cached = chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
			stats.thoughtTokens = chunk.usage.completion_tokens_details?.reasoning_tokens ?? stats.thoughtTokens ?? 0;
			stats.answer = tokens - stats.thoughtTokens;
		}
		if (tokens > 1 && run.last > first) stats.rate = (tokens - 1) / (run.last - first);
		if (choice?.finish_reason) finish(message, choice.finish_reason);
		ended ||= Boolean(choice?.finish_reason);
		schedule(run);
		speak(run);
	}
	if (!ended) throw new TypeError("the stream ended early");
}

function finish(message, reason) {
	if (reason !== "length") return;
	const text = message.content ? "The answer reached its limit of tokens." : "The limit of tokens was reached inside the thought: raise max tokens or lower the thinking budget.";
	message.note = { kind: "length", text };
}

/** Paints at most once a frame, and seldom enough that painting takes a quarter of the time. */
function schedule(run) {
	run.late = true;
	if (run.frame) return;
	run.late = false;
	run.frame = requestAnimationFrame(() => {
		const began = performance.now();
		const stick = isDown();
		paint(run.message);
		if (stick && run.chat === chat) down(true);
		const rest = Math.min((performance.now() - began) * 3, 2000);
		setTimeout(() => {
			run.frame = 0;
			if (running === run && run.late) schedule(run);
		}, rest);
	});
}

/** Reads the answer out a few sentences at a time, and saves what arrived. */
function speak(run) {
	if (clock() - run.saidAt < 4) return;
	run.saidAt = clock();
	saveChat(run.chat);
	const text = run.message.content.slice(run.spoken);
	const end = Math.max(text.lastIndexOf(". "), text.lastIndexOf("\n")) + 1;
	if (!run.message.content) say("Thinking");
	if (end <= 0) return;
	say(text.slice(0, end));
	run.spoken += end;
}

// The page around the messages

let about = "";

async function models() {
	const select = $("model");
	try {
		const response = await call("v1/models");
		if (response.status === 401) return tell("This server asks for a key.", keyForm(() => tell("")));
		if (!response.ok) throw new Error(response.status);
		const { data } = await response.json();
		select.replaceChildren(...data.map(({ id }) => make("option", { value: id }, id)));
		if (!data.some(({ id }) => id === settings.model)) settings.model = data[0]?.id ?? "";
		select.value = settings.model;
		const limit = data.find(({ id }) => id === settings.model)?.max_model_len;
		$("context").textContent = limit ? `Thought and answer together; with the prompt at most ${count(limit)}.` : "Thought and answer together.";
		tell(data.length ? "" : "The server offers no model.");
	} catch {
		tell("The server cannot be reached.", button("again", "Try again", models, "Try again"));
	}
}

/** Says something where a new chat has no messages yet. */
function tell(text, ...more) {
	about = text;
	$("about")?.replaceChildren(text, ...more);
	if (text) say(text);
}

function marks() {
	const rows = chats().map((item) => {
		const open = make("button", { type: "button", className: "open", dir: "auto" }, title(item));
		if (item.id === chat.id) open.setAttribute("aria-current", "true");
		open.addEventListener("click", () => load(item));
		return make("li", {}, open, button("bin", `Delete chat: ${title(item)}`, () => remove(item)));
	});
	$("list").replaceChildren(...rows);
}

function load(item) {
	chat = running?.chat.id === item.id ? running.chat : item;
	for (const message of chat.messages) {
		if (!message.pending || message === running?.message) continue;
		delete message.pending;
		message.note = { kind: "lost", text: "The page was closed before the answer ended." };
	}
	show();
	if (isNarrow()) panel("chats", false);
}

function remove(item) {
	if (!confirm(`Delete "${title(item)}"?`)) return;
	if (running?.chat.id === item.id) {
		running.chat.deleted = true;
		running.controller.abort();
	}
	localStorage.removeItem(PREFIX + item.id);
	if (chat.id === item.id) chat = newChat();
	show();
}

function download() {
	const { system, messages } = chat;
	const { thinking, budget, temperature, maxTokens, model } = settings;
	const text = JSON.stringify({ model, system, settings: { thinking, budget: BUDGETS[budget], temperature, max_tokens: maxTokens }, messages }, null, 2);
	const href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
	make("a", { href, download: `chat-${new Date(chat.changed).toISOString().slice(0, 16).replace(":", "-")}.json` }).click();
	setTimeout(() => URL.revokeObjectURL(href), 10000);
}

const isNarrow = () => innerWidth < 900;
const isDown = () => $("scroll").scrollHeight - $("scroll").scrollTop - $("scroll").clientHeight < 80;

function down(force = false) {
	if (force || isDown()) $("scroll").scrollTop = $("scroll").scrollHeight;
}

function grow(area) {
	area.style.height = "auto";
	area.style.height = `${area.scrollHeight + 2}px`;
}

function panel(id, open) {
	if (open && isNarrow()) for (const other of ["chats", "settings"]) $(other).hidden = true;
	$(id).hidden = !open;
	$("menu").setAttribute("aria-expanded", !$("chats").hidden);
	$("gear").setAttribute("aria-expanded", !$("settings").hidden);
	if (open) $(id).querySelector("button").focus();
}

function controls() {
	$("send").hidden = Boolean(running);
	$("stop").hidden = !running;
	$("budget").disabled = !settings.thinking;
	const budget = BUDGETS[settings.budget];
	$("budget-text").textContent = !settings.thinking ? "off" : budget < 0 ? "unlimited" : plural(budget, "token");
	$("budget").setAttribute("aria-valuetext", $("budget-text").textContent);
}

function bind(id, key, value) {
	const node = $(id);
	if (node.type === "checkbox") node.checked = settings[key];
	else node.value = settings[key];
	node.addEventListener("input", () => {
		if (node.validity.valid) settings[key] = value(node);
		saveSettings();
		controls();
	});
}

for (const node of document.querySelectorAll("[data-icon]")) node.prepend(icon(node.dataset.icon));
bind("thinking", "thinking", (node) => node.checked);
bind("budget", "budget", (node) => Number(node.value));
bind("temperature", "temperature", (node) => node.value);
bind("max-tokens", "maxTokens", (node) => node.value);
bind("system", "system", (node) => (chat.system = node.value));
$("system").addEventListener("change", () => saveChat(chat));
$("model").addEventListener("change", () => ((settings.model = $("model").value), saveSettings()));
$("new").addEventListener("click", () => {
	chat = newChat();
	show();
	if (isNarrow()) panel("chats", false);
	$("prompt").focus();
});
for (const [open, id] of [["menu", "chats"], ["gear", "settings"]]) {
	$(open).addEventListener("click", () => panel(id, $(id).hidden));
	$(`close-${id}`).addEventListener("click", () => (panel(id, false), $(open).focus()));
}
$("shade").addEventListener("click", () => (panel("chats", false), panel("settings", false)));
$("download").addEventListener("click", download);
$("stop").addEventListener("click", () => running?.controller.abort());
$("composer").addEventListener("submit", (event) => (event.preventDefault(), send()));
$("prompt").addEventListener("input", () => grow($("prompt")));
$("prompt").addEventListener("keydown", (event) => {
	if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
	event.preventDefault();
	send();
});
document.addEventListener("keydown", (event) => {
	if (event.key !== "Escape" || event.isComposing) return;
	if (running) running.controller.abort();
	else if (!$("settings").hidden) panel("settings", false);
	else if (isNarrow()) panel("chats", false);
});
addEventListener("pagehide", () => running && saveChat(running.chat));
addEventListener("storage", (event) => {
	if (!event.key?.startsWith(PREFIX)) return;
	// another tab wrote this chat: show what it wrote, unless this tab is writing too
	const changed = event.key === PREFIX + chat.id && running?.chat !== chat && read(localStorage, event.key);
	if (changed) load(changed);
	else marks();
});

panel("chats", !isNarrow());
show();
models();
$("prompt").focus();
