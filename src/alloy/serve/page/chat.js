// The chat page. Text of the model only ever becomes text nodes: nothing here reads it as HTML.

const $ = (id) => document.getElementById(id);
const clock = () => performance.now() / 1000;
const count = (n) => n.toLocaleString("en");
const tokens = (n) => `${count(n)} token${n === 1 ? "" : "s"}`;

// make("p.note", {title}, child, ...); the properties may be left out.
function make(tag, ...children) {
	const [name, className] = tag.split(".");
	const props = children[0]?.constructor === Object ? children.shift() : {};
	const node = Object.assign(document.createElement(name), className && {className}, props);
	node.append(...children);
	return node;
}

function icon(name) {
	const all = $("icons").content.firstChild;
	const node = all.cloneNode();
	node.append(all.querySelector(`.${name}`).cloneNode());
	return node;
}

function button(name, label, act, text = "") {
	const node = make("button", {type: "button", className: text ? "plain" : "icon", title: label, ariaLabel: label}, icon(name), text);
	node.onclick = () => act(node);
	return node;
}

function copier(label, text) {
	return button("copy", label, async (node) => {
		const done = await copy(typeof text === "function" ? text() : text);
		node.replaceChild(icon(done ? "done" : "close"), node.firstChild);
		say(done ? "Copied" : "Not copied");
		setTimeout(() => node.replaceChild(icon("copy"), node.firstChild), 1500);
	});
}

async function copy(text) {
	try {
		await navigator.clipboard.writeText(text);
		return true;
	} catch {
		// without https there is no clipboard object: a selection still can be copied
		const area = make("textarea.unseen", {value: text});
		document.body.append(area);
		area.select();
		const done = document.execCommand("copy");
		area.remove();
		return done;
	}
}

const retry = (act) => button("again", "Try again", act, "Try again");
const say = (text) => ($("status").textContent = text);

// Markdown: blocks first, each with its source, so that a growing answer draws its last block only

const LONG = 20000; // a paragraph above this stays plain: formatting it would cost more than it shows
const FENCE = /^( {0,3})(`{3,}(?!.*`)|~{3,})[ \t]*(\S{0,40})/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const RULE = /^ {0,3}(?:(?:- *){3,}|(?:\* *){3,}|(?:_ *){3,})$/;
const FORMULA = /^ {0,3}(\$\$|\\\[)/;
const BREAK = /^ {0,3}(`{3}|~{3}|#{1,6}[ \t]|>|\$\$|\\\[)|^ *([-*+]|1[.)]) /;

const indent = (line) => line.length - line.trimStart().length;
const isRule = (line) => line.length < 200 && RULE.test(line);
const interrupts = (line) => BREAK.test(line) || isRule(line);
const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
const math = (text, tag) => make(`${tag}.math`, {dir: "ltr"}, make("code", text), copier("Copy formula", text));

// Blocks of Markdown: {source, draw}; after 5000 blocks and items the rest is one plain paragraph
function parse(text, depth = 0, room = {left: 5000}) {
	const lines = text.split("\n").map((line) => line.replace(/^[ \t]{1,80}/, (space) => space.replaceAll("\t", "    ")));
	const blocks = [];
	let i = 0;
	while ((i = filled()) < lines.length) {
		const start = i;
		const draw = next();
		blocks.push({source: lines.slice(start, i).join("\n"), draw});
	}
	return blocks;

	function filled() {
		let at = i;
		while (at < lines.length && !lines[at].trim()) at++;
		return at;
	}

	function next() {
		const line = lines[i];
		let found;
		if (--room.left < 0) {
			const rest = lines.slice(i).join("\n");
			i = lines.length;
			return () => make("p", rest);
		}
		if ((found = FENCE.exec(line))) return fence(found);
		if ((found = HEADING.exec(line))) return i++, () => make(`h${found[1].length}`, ...inline(found[2]));
		if (isRule(line)) return i++, () => make("hr");
		if ((found = FORMULA.exec(line)) && (found = formula(found[1] === "$$" ? "$$" : "\\]"))) return found;
		if (depth < 8 && QUOTE.test(line)) return quote();
		if (depth < 8 && ITEM.test(line)) return list();
		if (isTable()) return table();
		const from = i++;
		while (lines[i]?.trim() && !interrupts(lines[i]) && !isTable()) i++;
		const paragraph = lines.slice(from, i).join("\n").trim();
		return () => make("p", ...inline(paragraph));
	}

	function inner(rows) {
		const parts = parse(rows.join("\n"), depth + 1, room);
		return () => parts.map((part) => part.draw());
	}

	function fence([, space, mark, language]) {
		const from = ++i;
		const isEnd = (line) => indent(line) < 4 && line.trim().startsWith(mark) && !line.trim().replaceAll(mark[0], "");
		while (i < lines.length && !isEnd(lines[i])) i++;
		const code = lines.slice(from, i++).map((line) => line.slice(Math.min(indent(line), space.length))).join("\n");
		const bar = () => make("div.code-bar", language || "code", copier("Copy code", code));
		return () => make("div.code", {dir: "ltr"}, bar(), make("pre", {tabIndex: 0}, make("code", code)));
	}

	function formula(close) {
		for (let end = i; end < Math.min(lines.length, i + 200); end++) {
			const line = lines[end].trimEnd();
			const at = line.indexOf(close, end === i ? indent(line) + 2 : 0);
			if (at < 0) continue;
			if (at + 2 < line.length) return;
			const source = lines.slice(i, end + 1).join("\n").trim();
			i = end + 1;
			return () => math(source, "div");
		}
	}

	function quote() {
		const rows = [];
		while (i < lines.length && QUOTE.test(lines[i])) rows.push(lines[i++].replace(QUOTE, ""));
		const parts = inner(rows);
		return () => make("blockquote", ...parts());
	}

	function list() {
		const [, space, mark] = ITEM.exec(lines[i]);
		const ordered = mark.length > 1;
		const items = [];
		const width = space.length + 2;
		const isNext = (line) => {
			const found = line !== undefined && !isRule(line) && ITEM.exec(line);
			return found && found[1].length < width && found[2].length > 1 === ordered;
		};
		for (let at = i; isNext(lines[at]) && room.left-- > 0; at = filled()) {
			i = at + 1;
			const lead = ITEM.exec(lines[at])[0].length;
			const rows = [lines[at].slice(lead)];
			while (i < lines.length) {
				const line = lines[i];
				const after = filled();
				if (after > i) {
					if (after === lines.length || indent(lines[after]) < width) break;
					rows.push("");
					i = after;
				} else if (indent(line) < width && (ITEM.test(line) || interrupts(line))) break;
				else {
					rows.push(line.slice(Math.min(indent(line), lead)));
					i++;
				}
			}
			items.push(inner(rows));
		}
		const start = ordered ? {start: parseInt(mark, 10)} : {};
		return () => make(ordered ? "ol" : "ul", start, ...items.map((item) => make("li", ...item())));
	}

	function isTable() {
		const dashes = lines[i + 1] ?? "";
		if (!lines[i].includes("|") || !/^[ :|-]{3,300}$/.test(dashes)) return false;
		const marks = cells(dashes);
		return marks.every((mark) => /^:?-+:?$/.test(mark)) && marks.length === cells(lines[i]).length;
	}

	function table() {
		const head = cells(lines[i]);
		const sides = cells(lines[i + 1]).map((mark) => (!mark.endsWith(":") ? "" : mark[0] === ":" ? "center" : "end"));
		const rows = [];
		for (i += 2; lines[i]?.includes("|"); i++) rows.push(cells(lines[i]));
		const row = (tag, texts) => make("tr", ...sides.slice(0, texts.length).map((className, k) => make(tag, {className}, ...inline(texts[k]))));
		return () => make("div.table", {tabIndex: 0}, make("table", row("th", head), ...rows.map((texts) => row("td", texts))));
	}
}

const INLINE = [
	/(?<math>\\\([^]{1,1000}?\\\)|\\\[[^]{1,1000}?\\\]|\$\$[^$]{1,1000}\$\$|\$(?=[^\s$])[^$\n]{0,1000}?[^\s$\\]\$(?!\d))/,
	/\\(?<escape>[!-/:-@[-`{-~])/,
	/(?<tick>`{1,4})(?!`)(?<code>[^]{0,1000}?[^`])\k<tick>(?!`)/,
	/\*\*(?=\S)(?<strong>[^]{0,1000}?\S)\*\*(?!\*)/,
	/(?<!\w)__(?=\S)(?<strong_>[^_]{0,1000}?\S)__(?!\w)/,
	/\*(?=[^\s*])(?<em>[^*]{0,1000}[^\s*])\*(?!\*)/,
	/(?<!\w)_(?=[^\s_])(?<em_>[^_]{0,1000}[^\s_])_(?!\w)/,
	/~~(?=\S)(?<del>[^~]{1,1000})~~/,
	/!?\[(?<text>[^[\]]{1,500})\]\(<?(?<href>[^\s()<>]{0,1000}(?:\([^\s()]{0,200}\)[^\s()<>]{0,1000})?)>?(?:\s{1,9}"[^"]{0,200}")?\)/,
	/(?<bare>(?<!\w)https?:\/\/[^\s<>"'`]{1,1000})/,
];
const PARTS = new RegExp(INLINE.map((part) => part.source).join("|"), "g");

// Nodes of a line of Markdown; links lead to http and https only.
function inline(text, depth = 0) {
	if (text.length > LONG || depth > 6) return [text];
	const nodes = [];
	let from = 0;
	for (const found of text.matchAll(PARTS)) {
		const part = found.groups;
		let end = found.index + found[0].length;
		if (found.index > from) nodes.push(text.slice(from, found.index));
		const [name, inner] = Object.entries(part).find(([, value]) => value !== undefined);
		if (name === "math") nodes.push(math(inner, "span"));
		else if (name === "escape") nodes.push(inner);
		else if (part.tick) nodes.push(make("code", {dir: "ltr"}, part.code.replace(/^ (.*) $/, "$1")));
		else if (name === "bare") {
			const href = inner.replace(inner.includes("(") ? /[.,;:!?*_\]]+$/ : /[.,;:!?*_\])]+$/, "");
			end = found.index + href.length;
			nodes.push(link(href, [href]));
		} else if (name === "text") nodes.push(link(part.href, inline(inner, depth + 1)));
		else nodes.push(make(name.replace("_", ""), ...inline(inner, depth + 1)));
		from = end;
	}
	if (from < text.length) nodes.push(text.slice(from));
	return nodes;
}

function link(href, children) {
	if (!/^https?:\/\//i.test(href)) return make("span", ...children);
	return make("a", {href, title: href, target: "_blank", rel: "noopener noreferrer nofollow"}, ...children);
}

// What the browser keeps: settings and one entry a chat; the key only as long as the tab

const PREFIX = "alloy.chat.";
const settings = {thinking: true, budget: 20, temperature: "", maxTokens: "", system: "", model: "", ...read(localStorage, "alloy.settings")};

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
		$("warning").textContent = "";
	} catch {
		$("warning").textContent = "The browser's storage is full, this chat is not saved: delete old ones or download it.";
	}
}

const saveSettings = () => write("alloy.settings", settings);
const saveChat = (chat) => chat.messages.length && !chat.deleted && write(PREFIX + chat.id, chat);

function chats() {
	const keys = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
	const all = keys.map((key) => read(localStorage, key));
	return all.filter((chat) => Array.isArray(chat?.messages)).sort((a, b) => b.changed - a.changed);
}

const newChat = () => ({id: `${Date.now()}-${Math.random()}`, changed: Date.now(), system: settings.system, messages: []});

const title = (chat) => chat.messages.find((message) => message.role === "user")?.content.trim().slice(0, 80) || "New chat";

// 0, 16, 24, 32, 48 ... 6144, 8192, then no limit
const BUDGETS = [0, ...Array.from({length: 19}, (_, i) => (i % 2 ? 24 : 16) * 2 ** (i >> 1)), -1];

// Messages on the page

let chat = newChat();
let running = null; // {chat, message, controller}
const views = new WeakMap();

function show() {
	$("log").replaceChildren(...chat.messages.map(view));
	if (!chat.messages.length) {
		const hello = make("h1", "What shall we think about?");
		$("log").append(make("div.empty", hello, make("p", {id: "about"}, about)));
	}
	$("system").value = chat.system;
	$("download").disabled = !chat.messages.length;
	marks();
	controls();
	down();
}

// Builds one message; what changes while it grows is set by `paint`.
function view(message) {
	const own = message.role === "user";
	const root = make(`article.message ${message.role}`);
	const made = {root, blocks: []};
	root.append(make("h2.unseen", own ? "You" : "Model"));
	made.summary = make("summary", {onclick: () => (made.touched = true)});
	made.text = document.createTextNode("");
	made.pane = make("div.thought-text", {dir: "auto", tabIndex: 0}, made.text);
	made.details = make("details.thought", {hidden: true}, made.summary, made.pane);
	made.body = make("div.body", {dir: "auto"});
	made.note = make("div.note", {hidden: true});
	made.stats = make("span.stats");
	made.tools = make("span.tools", copier("Copy message", () => message.content), button("edit", "Edit message", () => edit(message)));
	if (!own) {
		made.tools.append(button("again", "Regenerate the answer", () => again(message)));
		root.append(made.details);
	}
	root.append(made.body, made.note, make("footer", made.stats, made.tools));
	views.set(message, made);
	paint(message);
	return root;
}

// Brings the page up to what the message holds.
function paint(message) {
	const made = views.get(message);
	if (!made) return;
	const busy = running?.message === message;
	made.root.ariaBusy = busy;
	if (message.role === "user") return made.body.append(message.content);
	paintThought(message, made, busy);
	const blocks = parse(message.content);
	let same = 0;
	while (same < blocks.length && blocks[same].source === made.blocks[same]) same++;
	while (made.body.childNodes.length > same) made.body.lastChild.remove();
	made.body.append(...blocks.slice(same).map((block) => block.draw()));
	made.blocks = blocks.map((block) => block.source);
	made.stats.textContent = meter(message);
	made.tools.hidden = busy || !(message.content || message.reasoning);
	paintNote(message, made);
}

function paintThought(message, made, busy) {
	const thinks = busy && !message.content;
	made.details.hidden = !message.reasoning;
	if (!message.reasoning) return;
	const stick = isDown(made.pane);
	made.text.appendData(message.reasoning.slice(made.text.length));
	const seconds = thinks ? clock() - running.first : message.stats.thought;
	made.summary.textContent = `${thinks ? "Thinking" : "Thought"} for ${seconds.toFixed(1)} s, ${tokens(message.stats.thoughtTokens)}`;
	// open while it grows, folded once; after that it is the reader's
	if (!made.touched) made.details.open = thinks;
	if (thinks && stick) down(made.pane);
}

function meter(message) {
	const {first, rate, prompt, cached, answer, thoughtTokens} = message.stats;
	const parts = [];
	if (rate) parts.push(`${rate < 100 ? rate.toFixed(1) : count(Math.round(rate))} tokens/s`);
	if (first) parts.push(`first after ${first.toFixed(2)} s`);
	if (prompt) parts.push(`prompt ${count(prompt)}${cached ? ` (${count(cached)} cached)` : ""}`);
	if (answer) parts.push(`answer ${count(answer)}${thoughtTokens ? ` + thought ${count(thoughtTokens)}` : ""}`);
	return parts.join(" · ");
}

function paintNote(message, made) {
	const note = message.note;
	if (made.shown === note) return;
	made.shown = note;
	made.note.hidden = !note;
	made.note.className = `note ${note?.kind ?? ""}`;
	made.note.replaceChildren(note?.text ?? "");
	if (note?.kind === "key") made.note.append(keyForm(() => again(message)));
	if (/error|lost/.test(note?.kind)) made.note.append(retry(() => again(message)));
}

function keyForm(then) {
	const input = make("input", {type: "password", placeholder: "API key", ariaLabel: "API key", autocomplete: "off", required: true});
	const form = make("form.key", input, make("button.plain", "Use this key"));
	form.onsubmit = (event) => {
		event.preventDefault();
		sessionStorage.setItem("alloy.key", input.value.trim());
		models();
		then();
	};
	return form;
}

// Puts an editor in the place of a message.
function edit(message) {
	const made = views.get(message);
	const owner = chat;
	const area = make("textarea", {value: message.content, dir: "auto", ariaLabel: "Edit message"});
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
	const later = own && message !== chat.messages.at(-1) ? make("span.hint", "Messages after this one are replaced.") : "";
	const cancel = make("button.plain", {type: "button", onclick: close}, "Cancel");
	const row = make("div.row", later, make("span.gap"), cancel, make("button.plain strong", own ? "Send" : "Save"));
	const editor = make("form.message editor", area, row);
	editor.onsubmit = (event) => (event.preventDefault(), save());
	area.onkeydown = (event) => {
		if (event.key === "Escape") event.stopPropagation(), close();
		if (own && isSend(event)) event.preventDefault(), save();
	};
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
	chat.messages.push({role: "user", content: text});
	$("prompt").value = "";
	grow($("prompt"));
	answer();
}

function request(owner) {
	const messages = owner.messages.filter((message) => message.content || message.reasoning);
	const sent = messages.map(({role, content, reasoning}) => ({role, content, ...(reasoning && {reasoning})}));
	if (owner.system.trim()) sent.unshift({role: "system", content: owner.system});
	const {model, thinking, budget, temperature, maxTokens} = settings;
	const body = {model, messages: sent, stream: true, stream_options: {include_usage: true}, chat_template_kwargs: {enable_thinking: thinking}};
	if (thinking) body.thinking_token_budget = BUDGETS[budget];
	if (temperature !== "") body.temperature = Number(temperature);
	if (maxTokens !== "") body.max_tokens = Number(maxTokens);
	return body;
}

async function answer() {
	const owner = chat;
	const message = {role: "assistant", content: "", reasoning: "", model: settings.model, stats: {thought: 0, thoughtTokens: 0}, pending: true};
	owner.messages.push(message);
	owner.changed = Date.now();
	const run = (running = {chat: owner, message, controller: new AbortController(), spoken: 0, saidAt: clock()});
	saveChat(owner);
	show();
	try {
		await exchange(run, request(owner));
	} catch (error) {
		if (run.controller.signal.aborted) message.note = {kind: "stopped", text: "Stopped."};
		else message.note = {kind: error.kind ?? "lost", text: error.kind ? error.message : message.content || message.reasoning ? "The connection was lost. What arrived is kept." : UNREACHED};
	}
	delete message.pending;
	running = null;
	saveChat(owner);
	cancelAnimationFrame(run.frame);
	follow(run);
	marks();
	controls();
	say([message.content.slice(run.spoken), message.note?.text ?? "The answer is complete."].join(" "));
}

const UNREACHED = "The server cannot be reached.";
const told = (kind, text) => Object.assign(new Error(text), {kind});

async function exchange(run, body) {
	const {message, controller} = run;
	for (;;) {
		const began = clock();
		const response = await call("v1/chat/completions", {method: "POST", body: JSON.stringify(body), signal: controller.signal});
		if (response.ok) return receive(run, response, began);
		const error = (await response.json().catch(() => null))?.error;
		if (response.status === 401) throw told("key", key() ? "The server refuses this key." : "The server asks for a key.");
		const wait = Math.ceil(response.headers.get("retry-after")) || 5;
		if (![429, 503].includes(response.status) || error?.code === "engine_dead") throw told("error", error?.message ?? `The server answered with status ${response.status}.`);
		await countdown(message, wait, controller.signal);
	}
}

const key = () => sessionStorage.getItem("alloy.key");

function call(path, options = {}) {
	const headers = {"content-type": "application/json", ...(key() && {authorization: `Bearer ${key()}`})};
	return fetch(path, {...options, headers});
}

async function countdown(message, seconds, signal) {
	for (let left = seconds; left > 0; left--) {
		message.note = {kind: "busy", text: `The server is busy, retrying in ${left} s`};
		paint(message);
		if (left === seconds) say(message.note.text);
		await new Promise((resolve) => setTimeout((signal.onabort = resolve), 1000));
		signal.throwIfAborted();
	}
	message.note = null;
	paint(message);
}

// Data of server-sent events, one string an event.
async function* events(response) {
	const reader = response.body.getReader();
	const decoder = new TextDecoder();
	let rest = "";
	let data = [];
	for (;;) {
		const {value, done} = await reader.read();
		if (done) return;
		const lines = (rest + decoder.decode(value, {stream: true})).split(/\r\n|\n|\r/);
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
	const {message} = run;
	const {stats} = message;
	let total = 0;
	let ended = false;
	for await (const data of events(response)) {
		if (data === "[DONE]") return;
		const chunk = JSON.parse(data);
		if (chunk.error) throw told("error", chunk.error.message ?? "The server ended the answer with an error.");
		const {delta, finish_reason: reason} = chunk.choices?.[0] ?? {};
		const thought = delta?.reasoning ?? delta?.reasoning_content ?? "";
		const content = delta?.content ?? "";
		const now = clock();
		if (thought || content) {
			// until the usage comes a chunk counts as a token
			total++;
			run.first ??= now;
			stats.first = run.first - began;
			if (thought) stats.thoughtTokens++;
			if (!message.content) stats.thought = now - run.first;
			message.reasoning += thought;
			message.content += content;
			stats.answer = total - stats.thoughtTokens;
			run.last = now;
		}
		if (chunk.usage) {
			total = chunk.usage.completion_tokens;
			stats.prompt = chunk.usage.prompt_tokens;
			stats.cached = chunk.usage.prompt_tokens_details?.cached_tokens ?? 0;
			stats.thoughtTokens = chunk.usage.completion_tokens_details?.reasoning_tokens ?? stats.thoughtTokens;
			stats.answer = total - stats.thoughtTokens;
		}
		// a rate over less than this would be noise
		if (run.last - run.first > 0.05) stats.rate = (total - 1) / (run.last - run.first);
		ended ||= reason;
		if (reason === "length") message.note = {kind: "length", text: message.content ? "The answer reached its limit of tokens." : "The limit of tokens fell inside the thought: raise max tokens or lower the budget."};
		schedule(run);
		speak(run);
	}
	if (!ended) throw new TypeError("the stream ended early");
}

function follow(run) {
	const stick = run.chat === chat && isDown();
	paint(run.message);
	if (stick) down();
}

// Paints at most once a frame, and seldom enough that painting takes a quarter of the time.
function schedule(run) {
	run.late = true;
	if (run.frame) return;
	run.late = false;
	run.frame = requestAnimationFrame(() => {
		const began = performance.now();
		follow(run);
		const rest = Math.min((performance.now() - began) * 3, 2000);
		setTimeout(() => {
			run.frame = 0;
			if (running === run && run.late) schedule(run);
		}, rest);
	});
}

// Reads the answer out a few sentences at a time, and saves what arrived.
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
	try {
		const response = await call("v1/models");
		if (response.status === 401) return tell("This server asks for a key.", keyForm(() => tell("")));
		const {data} = await response.json();
		$("model").replaceChildren(...data.map(({id}) => make("option", {value: id}, id)));
		if (!data.some(({id}) => id === settings.model)) settings.model = data[0]?.id ?? "";
		$("model").value = settings.model;
		tell(data.length ? "" : "The server offers no model.");
	} catch {
		tell(UNREACHED, retry(models));
	}
}

// Says something where a new chat has no messages yet.
function tell(text, ...more) {
	about = text;
	$("about")?.replaceChildren(text, ...more);
	if (text) say(text);
}

function marks() {
	const rows = chats().map((item) => {
		const open = make("button.open", {dir: "auto", ariaCurrent: item.id === chat.id, onclick: () => load(item)}, title(item));
		return make("li", open, button("bin", `Delete chat: ${title(item)}`, () => remove(item)));
	});
	$("list").replaceChildren(...rows);
}

function load(item) {
	chat = running?.chat.id === item.id ? running.chat : item;
	for (const message of chat.messages) {
		if (!message.pending || message === running?.message) continue;
		delete message.pending;
		message.note = {kind: "lost", text: "The page was closed before the answer ended."};
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
	const {system, messages} = chat;
	const {thinking, budget, temperature, maxTokens, model} = settings;
	const text = JSON.stringify({model, system, settings: {thinking, budget: BUDGETS[budget], temperature, max_tokens: maxTokens}, messages}, null, 2);
	const href = URL.createObjectURL(new Blob([text], {type: "application/json"}));
	make("a", {href, download: "alloy-chat.json"}).click();
	setTimeout(() => URL.revokeObjectURL(href), 10000);
}

const isSend = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;
const isNarrow = () => innerWidth < 900;
const isDown = (box = $("scroll")) => box.scrollHeight - box.scrollTop - box.clientHeight < 80;
const down = (box = $("scroll")) => (box.scrollTop = box.scrollHeight);

function grow(area) {
	area.style.height = "auto";
	area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
}

function panel(id, open) {
	if (open && isNarrow()) for (const other of ["chats", "settings"]) $(other).hidden = true;
	$(id).hidden = !open;
	$("menu").ariaExpanded = !$("chats").hidden;
	$("gear").ariaExpanded = !$("settings").hidden;
}

function controls() {
	$("send").hidden = Boolean(running);
	$("stop").hidden = !running;
	$("budget").disabled = !settings.thinking;
	const budget = BUDGETS[settings.budget];
	$("budget-text").textContent = !settings.thinking ? "off" : budget < 0 ? "unlimited" : tokens(budget);
	$("budget").ariaValueText = $("budget-text").textContent;
}

function bind(id, key, value) {
	const node = $(id);
	if (node.type === "checkbox") node.checked = settings[key];
	else node.value = settings[key];
	node.oninput = () => {
		if (node.validity.valid) settings[key] = value(node);
		saveSettings();
		controls();
	};
}

for (const node of document.querySelectorAll("[data-icon]")) {
	node.prepend(icon(node.dataset.icon));
	node.title ||= node.ariaLabel ?? "";
}
bind("thinking", "thinking", (node) => node.checked);
bind("budget", "budget", (node) => Number(node.value));
bind("temperature", "temperature", (node) => node.value);
bind("max-tokens", "maxTokens", (node) => node.value);
bind("system", "system", (node) => (chat.system = node.value));
$("system").onchange = () => saveChat(chat);
$("model").onchange = () => {
	settings.model = $("model").value;
	saveSettings();
};
$("new").onclick = () => {
	load(newChat());
	$("prompt").focus();
};
$("menu").onclick = () => panel("chats", $("chats").hidden);
$("gear").onclick = () => panel("settings", $("settings").hidden);
$("shade").onclick = $("close-chats").onclick = $("close-settings").onclick = () => {
	if (isNarrow()) panel("chats", false);
	panel("settings", false);
};
$("download").onclick = download;
$("stop").onclick = () => running?.controller.abort();
$("composer").onsubmit = (event) => (event.preventDefault(), send());
$("prompt").oninput = () => grow($("prompt"));
$("prompt").onkeydown = (event) => {
	if (isSend(event)) event.preventDefault(), send();
};
onkeydown = (event) => {
	if (event.key !== "Escape" || event.isComposing) return;
	if (running) running.controller.abort();
	else $("shade").click();
};
onpagehide = () => running && saveChat(running.chat);
onstorage = (event) => {
	if (!event.key?.startsWith(PREFIX)) return;
	// another tab wrote: show it, unless this tab is writing too
	const changed = event.key === PREFIX + chat.id && running?.chat !== chat && read(localStorage, event.key);
	if (changed) load(changed);
	else marks();
};
// a thought's seconds go on while nothing arrives
setInterval(() => running && schedule(running), 500);

panel("chats", !isNarrow());
show();
models();
$("prompt").focus();
