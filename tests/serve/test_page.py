"""The chat page in headless Chromium, against a server that plays the protocol: each feature as the DOM shows it."""

import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from tests.serve.stub import CUT, Gate, Reply, Stub, chunk, error, stream, usage

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("needs Chromium on the path", allow_module_level=True)
pytestmark = pytest.mark.slow
WATCH = """
window.violations = [];
document.addEventListener("securitypolicyviolation", (event) => violations.push(`${event.violatedDirective} ${event.blockedURI}`));
"""


class Chat:
    """One tab on the page, and the server behind it."""

    def __init__(self, browser, stub: Stub, **options) -> None:
        self.stub = stub
        self.context = browser.new_context(**{"viewport": {"width": 1100, "height": 700}, **options})
        self.context.add_init_script(WATCH)
        self.context.set_default_timeout(10_000)
        self.urls: list[str] = []
        self.faults: list[str] = []
        self.context.on("request", lambda request: self.urls.append(request.url))
        self.context.on("weberror", lambda fault: self.faults.append(str(fault.error)))
        self.page = self.context.new_page()
        self.page.on("dialog", lambda dialog: dialog.accept())
        self.page.goto(stub.url)

    def ask(self, text: str, *replies: Reply) -> None:
        """Sends a message that the server will answer with the replies."""
        self.stub.replies += replies
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def answered(self, text: str, *replies: Reply):
        """Sends a message and waits for the whole answer; its element."""
        self.ask(text, *replies)
        self.page.wait_for_selector("#send:visible")
        return self.page.locator(".assistant").last

    def show(self, markdown: str):
        """The body of an answer of this text."""
        return self.answered("go", stream(markdown)).locator(".body")

    def messages(self, k: int = -1) -> list[tuple[str, str]]:
        """Role and content of what a request sent."""
        return [(m["role"], m["content"]) for m in self.stub.requests[k]["messages"]]

    def close(self) -> None:
        """Whatever a test did: no request left the origin, nothing broke the policy, no script failed."""
        violations = self.page.evaluate("violations")
        self.context.close()
        assert [u for u in self.urls if not u.startswith((self.stub.url, "data:", f"blob:{self.stub.url}"))] == []
        assert violations == []
        assert self.faults == []


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    server = Stub()
    yield server
    server.close()


@pytest.fixture
def chat(browser, stub: Stub) -> Iterator[Chat]:
    opened = Chat(browser, stub, permissions=["clipboard-read", "clipboard-write"])
    yield opened
    opened.close()


def expect(locator):
    """Playwright's waiting assertions."""
    return sync_api.expect(locator)


def test_answer_streams_and_is_counted(chat: Chat) -> None:
    """Text shows while it arrives; the line below has rate, first token, prompt, cached and answer tokens of the usage."""
    first, second = Gate(), Gate()
    reply = stream("Two", first, " **states**", second, " more", counts=usage(1024, 5214, 960, 214))
    chat.ask("Hello", Reply(tuple(p for p in reply.parts)))
    body = chat.page.locator(".assistant .body")
    expect(body).to_have_text("Two")
    expect(chat.page.locator(".assistant")).to_have_attribute("aria-busy", "true")
    expect(chat.page.locator("#stop")).to_be_visible()
    chat.page.wait_for_timeout(100)
    first.open()
    expect(body.locator("strong")).to_have_text("states")
    expect(chat.page.locator(".assistant .stats")).to_contain_text("tokens/s")
    second.open()
    expect(body).to_have_text("Two states more")
    expect(chat.page.locator(".assistant .stats")).to_have_text(
        re.compile(
            r"^[\d,.]+ tokens/s · first after \d+\.\d\d s · prompt 1,024 \(960 cached\) · answer 5,000 \+ thought 214$"
        )
    )
    sent = chat.stub.requests[0]
    assert sent["path"] == "/v1/chat/completions"
    assert (sent["model"], sent["stream"], sent["stream_options"]) == ("tiny-hybrid", True, {"include_usage": True})


def test_thought_folds_when_the_answer_starts(chat: Chat) -> None:
    """Open and dimmed while thinking, folded with seconds and tokens once the answer starts, the reader's after that."""
    thinking, answering = Gate(), Gate()
    thought = [chunk(reasoning="Let me"), chunk(reasoning_content=" see <b>.")]
    chat.ask("Why?", stream(*thought, thinking, "Because", answering, ".", counts=usage(9, 216, 0, 214)))
    pane = chat.page.locator("details.thought")
    expect(pane).to_have_attribute("open", "")
    expect(pane.locator("summary")).to_contain_text(re.compile(r"^Thinking for \d+\.\d s, 2 tokens$"))
    expect(pane.locator(".thought-text")).to_have_text("Let me see <b>.")
    dim, plain = (
        chat.page.locator(s).evaluate("n => getComputedStyle(n).color") for s in (".thought-text", ".user .body")
    )
    assert dim != plain
    before = pane.locator("summary").text_content()
    expect(pane.locator("summary")).not_to_have_text(before)  # the seconds go on while nothing arrives
    thinking.open()
    expect(pane).not_to_have_attribute("open", "")
    pane.locator("summary").click()
    answering.open()
    expect(pane.locator("summary")).to_have_text(re.compile(r"^Thought for \d+\.\d s, 214 tokens$"))
    expect(pane).to_have_attribute("open", "")


def test_budget_slider_is_logarithmic_and_ends_unlimited(chat: Chat) -> None:
    """0, then equal steps of the logarithm up to 8192, then unlimited; switched off it sends no budget."""
    page, slider = chat.page, chat.page.locator("#budget")
    seen = []
    for position in range(21):
        slider.fill(str(position))
        seen.append(page.locator("#budget-text").text_content())
    values = [int(text.split()[0].replace(",", "")) for text in seen[1:-1]]
    assert (seen[0], values[0], values[-1], seen[-1]) == ("0 tokens", 16, 8192, "unlimited")
    assert all(1.3 < b / a < 1.6 for a, b in pairwise(values))
    assert slider.get_attribute("aria-valuetext") == "unlimited"
    for position, budget in (("0", 0), ("11", 512), ("20", -1)):
        slider.fill(position)
        chat.answered("go", stream("ok"))
        assert chat.stub.requests[-1]["thinking_token_budget"] == budget
        assert chat.stub.requests[-1]["chat_template_kwargs"] == {"enable_thinking": True}
    page.uncheck("#thinking")
    expect(page.locator("#budget-text")).to_have_text("off")
    expect(slider).to_be_disabled()
    chat.answered("go", stream("ok"))
    assert "thinking_token_budget" not in chat.stub.requests[-1]
    assert chat.stub.requests[-1]["chat_template_kwargs"] == {"enable_thinking": False}


def test_settings_reach_the_request_and_stay(chat: Chat) -> None:
    """Temperature, max tokens and system prompt are left out until set, then sent, and kept over a reload."""
    chat.answered("go", stream("ok"))
    assert {"temperature", "max_tokens"} & set(chat.stub.requests[0]) == set()
    assert chat.messages() == [("user", "go")]
    for _ in range(2):
        if chat.page.locator("#settings").is_hidden():
            chat.page.click("#gear")
        chat.page.fill("#temperature", "0.3")
        chat.page.fill("#max-tokens", "77")
        chat.page.fill("#system", "Be terse.")
        chat.page.fill("#temperature", "7")  # out of range: not taken
        chat.page.click("#close-settings")
        chat.answered("again", stream("ok"))
        assert (chat.stub.requests[-1]["temperature"], chat.stub.requests[-1]["max_tokens"]) == (0.3, 77)
        assert chat.messages()[0] == ("system", "Be terse.")
        chat.page.reload()
    expect(chat.page.locator("#temperature")).to_have_value("0.3")


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_ends_the_request_and_keeps_the_text(chat: Chat, how: str) -> None:
    """The server sees the client go; what arrived stays and goes into the next request."""
    chat.ask("Count", stream("one two", Gate(), " three"))
    expect(chat.page.locator(".assistant .body")).to_have_text("one two")
    chat.page.click("#stop") if how == "button" else chat.page.keyboard.press("Escape")
    expect(chat.page.locator(".note.stopped")).to_have_text("Stopped.")
    assert chat.stub.gone.wait(5)
    chat.answered("And?", stream("ok"))
    assert chat.messages() == [("user", "Count"), ("assistant", "one two"), ("user", "And?")]


def test_regenerate_and_edit(chat: Chat) -> None:
    """Regenerate asks again without the old answer; an edited question drops what follows; an edited answer stays."""
    page = chat.page
    chat.answered("first", stream("A1"))
    chat.answered("second", stream("A2"))
    chat.stub.replies.append(stream("A3"))
    page.locator(".assistant").last.get_by_label("Regenerate the answer").click()
    expect(page.locator(".assistant .body").last).to_have_text("A3")
    assert chat.messages() == [("user", "first"), ("assistant", "A1"), ("user", "second")]
    page.locator(".assistant").first.hover()
    page.locator(".assistant").first.get_by_label("Edit message").click()
    page.fill(".editor textarea", "*B1*")
    page.get_by_role("button", name="Save").click()
    expect(page.locator(".assistant em")).to_have_text("B1")
    page.locator(".user").last.hover()
    page.locator(".user").last.get_by_label("Edit message").click()
    page.press(".editor textarea", "Escape")
    expect(page.locator(".user .body").last).to_have_text("second")
    page.locator(".user").last.get_by_label("Edit message").click()
    chat.stub.replies.append(stream("A4"))
    page.fill(".editor textarea", "third")
    page.press(".editor textarea", "Enter")
    expect(page.locator(".assistant .body").last).to_have_text("A4")
    assert chat.messages() == [("user", "first"), ("assistant", "*B1*"), ("user", "third")]


def test_keys_of_the_composer(chat: Chat) -> None:
    """Shift+Enter breaks the line and grows the box, Enter sends, blank text is not sent."""
    box = chat.page.locator("#prompt")
    box.press("Enter")
    box.type("   ")
    box.press("Enter")
    assert chat.stub.requests == []
    low = box.bounding_box()["height"]
    box.fill("a")
    box.press("Shift+Enter")
    box.type("b")
    assert box.bounding_box()["height"] > low + 15
    chat.stub.replies.append(stream("ok"))
    box.press("Enter")
    chat.page.wait_for_selector(".assistant")
    assert chat.messages() == [("user", "a\nb")]
    expect(box).to_have_value("")


MARKDOWN = """# One
Text with **bold**, *slanted*, `co*d*e`, ~~gone~~, __b2__ and snake_case_name.

1. first
   - inner
2. second

   ```py
   x = "<b>"
   ```

| a | b \\| c |
|:--|--:|
| 1 | **2** |

> quoted

---
Price $5 or $10. Inline $a_1*b*c$ and \\(x^2\\).

$$
E = mc^2 **no**
$$
\\[ y \\]
see [the _page_](https://example.org/a_(b)), https://example.com/x. end
"""


def test_markdown_becomes_elements(chat: Chat) -> None:
    """Headings, lists, tables, code, emphasis, links and formulas, each as its own element."""
    body = chat.show(MARKDOWN)

    def texts(selector: str) -> list[str]:
        return body.locator(selector).all_text_contents()

    assert texts("h1") == ["One"]
    assert texts("p > strong") == ["bold", "b2"]
    assert texts("p > em") == ["slanted"]
    assert texts("p > code") == ["co*d*e"]
    assert texts("del") == ["gone"]
    assert "snake_case_name" in texts("p")[0]
    assert texts("ol > li > ul > li") == ["inner"]
    assert body.locator("ol > li").count() == 2
    assert texts("li pre code") == ['x = "<b>"']
    assert texts("li .code-bar") == ["py"]
    assert (texts("th"), texts("td"), texts("td strong")) == (["a", "b | c"], ["1", "2"], ["2"])
    assert body.locator("td").nth(1).evaluate("n => getComputedStyle(n).textAlign") == "end"
    assert texts("blockquote p") == ["quoted"]
    assert body.locator("hr").count() == 1
    assert texts("span.math") == ["$a_1*b*c$", "\\(x^2\\)"]
    assert texts("div.math") == ["$$\nE = mc^2 **no**\n$$", "\\[ y \\]"]
    links = body.locator("a")
    assert [a.get_attribute("href") for a in links.all()] == ["https://example.org/a_(b)", "https://example.com/x"]
    assert links.all_text_contents() == ["the page", "https://example.com/x"]
    assert {a.get_attribute("rel") for a in links.all()} == {"noopener noreferrer nofollow"}


def test_growing_markdown_equals_the_whole(chat: Chat) -> None:
    """An answer that came in pieces of odd lengths has the DOM of one that came at once, and keeps finished blocks."""
    whole = chat.show(MARKDOWN).evaluate("n => n.outerHTML")
    gates = [Gate() for _ in range(0, len(MARKDOWN), 47)]
    pieces = [part for i, gate in enumerate(gates) for part in (MARKDOWN[47 * i : 47 * i + 47], gate)]
    chat.ask("slowly", stream(*pieces))
    body = chat.page.locator(".assistant .body").last
    for i, gate in enumerate(gates):
        if i == 3:
            body.evaluate("n => { n.firstChild.mark = 1; }")
        expect(chat.page.locator(".assistant .stats").last).to_contain_text(f"answer {i + 1}")
        gate.open()
    chat.page.wait_for_selector("#send:visible")
    assert body.evaluate("n => n.outerHTML") == whole
    assert body.evaluate("n => n.firstChild.mark") == 1


def test_copy_buttons(chat: Chat) -> None:
    """Message, code block and formula each copy their source."""
    text = "a $x_1$ b\n\n```c\nint i;\n  j;\n```"
    answer = chat.answered("q", stream(text))
    for label, wanted in (("Copy formula", "$x_1$"), ("Copy code", "int i;\n  j;"), ("Copy message", text)):
        answer.get_by_label(label).click()
        expect(chat.page.locator("#status")).to_have_text("Copied")
        assert chat.page.evaluate("navigator.clipboard.readText()") == wanted


def test_copy_without_a_clipboard(browser, stub: Stub) -> None:
    """Where the browser offers no clipboard object (plain http), copying goes through a selection."""
    chat = Chat(browser, stub, permissions=["clipboard-read", "clipboard-write"])
    answer = chat.answered("q", stream("old way"))
    chat.page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject(new Error('no')); }")
    answer.get_by_label("Copy message").click()
    expect(chat.page.locator("#status")).to_have_text("Copied")
    assert chat.page.evaluate("navigator.clipboard.readText()") == "old way"
    chat.close()


HOSTILE = """<script>window.hit = 1</script><img src=x onerror="window.hit = 1">
[a](javascript:window.hit=1) [b](data:text/html,x) [c]( javascript:x) [d](//evil.example) ![e](https://evil.example/e.png) [f](vbscript:x)
<iframe src="https://evil.example"></iframe> [**g**](JaVaScRiPt:alert(1)) <https://evil.example/"onclick="x>
| <b>t</b> | [j](javascript:x) |
|--|--|
| <svg onload=x> | &lt; |

```"><script>
</code></pre><script>window.hit = 1</script>
```
"""


def test_hostile_text_stays_text(chat: Chat) -> None:
    """Markup in thought, answer, question, model name and title is text; only http links get an address."""
    tag = "<img src=x onerror='window.hit=1'>"
    chat.answered(tag, stream(chunk(reasoning=HOSTILE), HOSTILE))
    log = chat.page.locator("#log")
    assert log.locator("script, img, iframe, svg:not([aria-hidden]), b").count() == 0
    hrefs = [a.get_attribute("href") for a in log.locator("a").all()]
    assert hrefs
    assert [h for h in hrefs if not h.startswith("https://evil.example")] == []
    assert chat.page.evaluate("window.hit") is None
    text = log.locator(".body").last.text_content()
    assert "<script>window.hit = 1</script>" in text
    assert "<svg onload=x>" in text
    assert log.locator(".user .body").text_content() == tag
    assert chat.page.locator(".open").first.text_content() == tag
    assert log.locator(".thought-text").text_content() == HOSTILE


@pytest.mark.parametrize(
    "unit",
    [
        "word ",
        "*",
        "_a",
        "[",
        "](",
        "`",
        "$",
        "\\(",
        "> ",
        "- ",
        "|",
        "(",
        "~",
        "#",
        "a\n",
        "|\n",
        "- \n",
        "$$\n",
        "\\[\n",
        "    -",
        "\n",
    ],
)
def test_large_answers_do_not_hang(chat: Chat, unit: str) -> None:
    """A megabyte of one unit in a single line, or a third of one in many lines, ends within seconds and is all there."""
    text = "x" + unit * ((300_000 if "\n" in unit else 1_000_000) // len(unit)) + " end"
    chat.page.set_default_timeout(40_000)
    began = chat.page.evaluate("performance.now()")
    body = chat.show(text)
    assert chat.page.evaluate("performance.now()") - began < 30_000
    assert body.evaluate("n => n.textContent.trimEnd().endsWith('end')")


def test_large_answer_in_many_pieces(chat: Chat) -> None:
    """20,000 chunks of one line do not render 20,000 times."""
    began = chat.page.evaluate("performance.now()")
    text = chat.answered("go", stream(*["lorem ipsum "] * 20_000)).locator(".body").text_content()
    assert chat.page.evaluate("performance.now()") - began < 30_000
    assert len(text) == 20_000 * 12 - 1


def test_chats_live_in_local_storage_only(chat: Chat) -> None:
    """Chats survive a reload, can be opened, continued and deleted; no cookie, no database, no key among them."""
    page = chat.page
    chat.answered("older", stream("A"))
    page.click("#new")
    chat.answered("newer", stream("B"))
    page.reload()
    expect(page.locator(".open")).to_have_text(["newer", "older"])
    assert page.locator(".message").count() == 0
    page.get_by_role("button", name="older", exact=True).click()
    expect(page.locator(".body")).to_have_text(["older", "A"])
    chat.answered("more", stream("C"))
    assert chat.messages() == [("user", "older"), ("assistant", "A"), ("user", "more")]
    assert chat.context.cookies() == []
    assert page.evaluate("indexedDB.databases()") == []
    assert page.evaluate("sessionStorage.length") == 0
    page.hover("#list li:first-child")
    page.get_by_label("Delete chat: older").click()
    expect(page.locator(".open")).to_have_text(["newer"])
    assert "older" not in page.evaluate("JSON.stringify(localStorage)")


def test_closed_page_keeps_what_arrived(chat: Chat) -> None:
    """After a reload in the middle of an answer, or a crash, its beginning is there with a note."""
    page = chat.page
    chat.ask("long", stream("half of", Gate()))
    expect(page.locator(".assistant .body")).to_have_text("half of")
    page.reload()
    page.click(".open")
    expect(page.locator(".assistant .body")).to_have_text("half of")
    expect(page.locator(".note.lost")).to_be_visible()
    page.evaluate(
        "() => { const key = Object.keys(localStorage).find((k) => k.startsWith('alloy.chat.')), chat = JSON.parse(localStorage[key]);"
        "delete chat.messages[1].note; chat.messages[1].pending = true; localStorage[key] = JSON.stringify(chat); }"
    )
    page.reload()
    page.click(".open")
    expect(page.locator(".assistant .body")).to_have_text("half of")
    expect(page.locator(".note.lost")).to_contain_text("The page was closed before the answer ended.")


def test_answer_goes_on_in_another_chat(chat: Chat) -> None:
    """A new chat may be opened while an answer arrives; the answer is whole when one comes back."""
    gate = Gate()
    chat.ask("slow", stream("be", gate, "gun"))
    expect(chat.page.locator(".assistant .body")).to_have_text("be")
    chat.page.click("#new")
    expect(chat.page.locator(".message")).to_have_count(0)
    gate.open()
    chat.page.wait_for_selector("#send:visible")
    chat.page.click(".open")
    expect(chat.page.locator(".assistant .body")).to_have_text("begun")


def test_full_storage_does_not_lose_the_answer(chat: Chat) -> None:
    """When the browser refuses to store more, the chat goes on and the page says that it is not saved."""
    chat.page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }; }"
    )
    answer = chat.answered("q", stream("still here"))
    expect(answer.locator(".body")).to_have_text("still here")
    expect(chat.page.locator("#warning")).to_contain_text("not saved")


def test_download_is_json(chat: Chat, tmp_path: Path) -> None:
    """The file holds messages with thought and counts, the system prompt and the settings."""
    expect(chat.page.locator("#download")).to_be_disabled()
    chat.answered("q", stream(chunk(reasoning="hm"), "a", counts=usage(3, 2, 1, 1)))
    with chat.page.expect_download() as started:
        chat.page.click("#download")
    assert started.value.suggested_filename == "alloy-chat.json"
    started.value.save_as(tmp_path / "chat.json")
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert [(m["role"], m["content"]) for m in saved["messages"]] == [("user", "q"), ("assistant", "a")]
    assert saved["messages"][1]["reasoning"] == "hm"
    assert saved["messages"][1]["stats"]["cached"] == 1
    assert (saved["model"], saved["settings"]["budget"]) == ("tiny-hybrid", -1)


def test_unauthorized_asks_for_a_key(chat: Chat) -> None:
    """401 shows a field in place; the key goes with the next request and into the session's storage only."""
    chat.ask("q", error(401, "invalid_api_key", "no key", www_authenticate="Bearer"))
    note = chat.page.locator(".note.key")
    expect(note).to_contain_text("The server asks for a key.")
    chat.stub.replies += [error(401, "invalid_api_key", "wrong"), stream("welcome")]
    note.get_by_label("API key").fill("wrong")
    note.get_by_role("button").click()
    expect(note).to_contain_text("The server refuses this key.")
    note.get_by_label("API key").fill("secret-1")
    note.get_by_label("API key").press("Enter")
    expect(chat.page.locator(".assistant .body")).to_have_text("welcome")
    assert chat.stub.keys == [None, "Bearer wrong", "Bearer secret-1"]
    assert chat.messages() == [("user", "q")]
    assert chat.page.evaluate("sessionStorage['alloy.key']") == "secret-1"
    assert "secret-1" not in chat.page.evaluate("JSON.stringify(localStorage) + document.cookie")


def test_key_is_asked_for_at_the_start(browser, stub: Stub) -> None:
    """Where even the list of models needs a key, the empty page asks."""
    stub.models = error(401, "invalid_api_key", "no key")
    chat = Chat(browser, stub)
    expect(chat.page.locator("#about")).to_contain_text("This server asks for a key.")
    stub.models = None
    chat.page.get_by_label("API key").fill("k")
    chat.page.get_by_role("button", name="Use this key").click()
    expect(chat.page.locator("#model")).to_have_value("tiny-hybrid")
    expect(chat.page.locator("#about")).to_have_text("")
    chat.close()


def test_busy_server_is_asked_again(chat: Chat) -> None:
    """503 counts down the seconds of Retry-After and asks again by itself; stop ends the waiting."""
    chat.ask("q", error(503, "server_overloaded", "busy", retry_after="2"), stream("at last"))
    note = chat.page.locator(".note.busy")
    expect(note).to_have_text("The server is busy, retrying in 2 s")
    expect(note).to_have_text("The server is busy, retrying in 1 s")
    expect(chat.page.locator(".assistant .body")).to_have_text("at last")
    expect(chat.page.locator(".note")).to_have_count(2)
    expect(chat.page.locator(".note:visible")).to_have_count(0)
    assert len(chat.stub.requests) == 2
    chat.ask("q2", error(503, "server_overloaded", "busy", retry_after="60"))
    expect(chat.page.locator(".note.busy")).to_contain_text("60 s")
    chat.page.click("#stop")
    expect(chat.page.locator(".note.stopped")).to_be_visible()
    assert len(chat.stub.requests) == 3


def test_lost_connection_keeps_what_was_received(chat: Chat) -> None:
    """A stream that breaks off keeps its text and offers to try again."""
    gate = Gate()
    chat.ask("q", Reply((chunk(content="so far"), gate, CUT)))
    answer = chat.page.locator(".assistant")
    expect(answer.locator(".body")).to_have_text("so far")
    gate.open()
    expect(answer.locator(".note.lost")).to_contain_text("The connection was lost. What arrived is kept.")
    expect(answer.locator(".body")).to_have_text("so far")
    chat.stub.replies.append(stream("whole"))
    answer.get_by_role("button", name="Try again").click()
    expect(chat.page.locator(".assistant .body")).to_have_text("whole")


def test_quiet_end_without_a_finish_is_lost(chat: Chat) -> None:
    """A stream that ends properly as HTTP but without finish reason or [DONE] is a lost one."""
    answer = chat.answered("q", Reply((chunk(content="so far"), b'data: {"half')))
    expect(answer.locator(".note.lost")).to_be_visible()
    expect(answer.locator(".body")).to_have_text("so far")


def test_unreachable_server(chat: Chat) -> None:
    """No server: said in place, with the question kept."""
    chat.context.set_offline(True)
    answer = chat.answered("q")
    expect(answer.locator(".note.lost")).to_contain_text("The server cannot be reached.")
    chat.context.set_offline(False)
    chat.stub.replies.append(stream("back"))
    answer.get_by_role("button", name="Try again").click()
    expect(chat.page.locator(".assistant .body")).to_have_text("back")


def test_errors_show_the_servers_sentence(chat: Chat) -> None:
    """A refusal, and an error in the middle of a stream, show the server's own message."""
    answer = chat.answered("q", error(400, "context_length_exceeded", "prompt has <b>9,120</b> tokens"))
    expect(answer.locator(".note.error")).to_contain_text("prompt has <b>9,120</b> tokens")
    late = {"error": {"message": "the engine stopped", "type": "server_error", "param": None, "code": "engine_dead"}}
    answer = chat.answered("q", Reply((chunk(content="part"), late, b"data: [DONE]\n\n")))
    expect(answer.locator(".note.error")).to_contain_text("the engine stopped")
    expect(answer.locator(".body")).to_have_text("part")
    answer = chat.answered("q", error(503, "engine_dead", "the engine has died"))
    expect(answer.locator(".note.error")).to_contain_text("the engine has died")


def test_limits_are_named(chat: Chat) -> None:
    """finish_reason length says whether the answer or the thought was cut."""
    answer = chat.answered("q", stream("cut", finish="length"))
    expect(answer.locator(".note")).to_have_text("The answer reached its limit of tokens.")
    answer = chat.answered("q", stream(chunk(reasoning="hm"), finish="length"))
    expect(answer.locator(".note")).to_contain_text("inside the thought")


def test_events_in_odd_forms(chat: Chat) -> None:
    """Comments, CR LF, cut UTF-8, no space after the colon, and data over two lines are all server-sent events."""
    data = json.dumps(chunk(content="سلام 🎈"), ensure_ascii=False).encode()
    cut = data.index("🎈".encode()) + 2
    two = json.dumps(chunk(content=" b")).encode().split(b",", 1)
    parts = (
        b": hi\r\n\r\ndata:" + data[:cut],
        data[cut:] + b"\r\n\r",
        b"\nevent: x\ndata: " + two[0] + b",\ndata: " + two[1] + b"\n\n",
    )
    answer = chat.answered("q", Reply((*parts, chunk(finish="stop"), b"data: [DONE]\n\n")))
    expect(answer.locator(".body")).to_have_text("سلام 🎈 b")
    expect(answer.locator(".note")).to_be_hidden()


def test_direction_follows_the_text(chat: Chat) -> None:
    """Persian runs from the right, English from the left; code and formulas always from the left."""
    body = chat.show("سلام `a`\n\n```py\nx\n```\n\n1. یک")
    assert body.get_attribute("dir") == "auto"
    assert body.evaluate("n => getComputedStyle(n).direction") == "rtl"
    assert body.locator("pre").evaluate("n => getComputedStyle(n).direction") == "ltr"
    assert chat.show("hello").evaluate("n => getComputedStyle(n).direction") == "ltr"
    assert chat.page.locator("#prompt").get_attribute("dir") == "auto"


def test_screen_reader_hears_sentences_seldom(chat: Chat) -> None:
    """The polite region gets whole sentences at most every few seconds and, over time, the whole answer once."""
    status = chat.page.locator("#status")
    assert (status.get_attribute("aria-live"), status.get_attribute("role")) == ("polite", "status")
    chat.page.evaluate(
        "() => { window.heard = []; const node = document.getElementById('status');"
        "new MutationObserver(() => heard.push(node.textContent)).observe(node, {childList: true, characterData: true, subtree: true}); }"
    )
    gate = Gate()
    words = ["One. ", "Two. ", "Thr"]
    chat.ask("q", stream(*words, gate, "ee. "))
    expect(chat.page.locator(".assistant .body")).to_have_text("One. Two. Thr")
    assert chat.page.evaluate("heard") == []
    gate.open()
    chat.page.wait_for_selector("#send:visible")
    assert chat.page.evaluate("heard") == ["One. Two. Three.  The answer is complete."]
    assert chat.page.locator("#log").get_attribute("aria-live") is None


def test_every_control_has_a_name(chat: Chat) -> None:
    """Each button, field and list can be found by a screen reader."""
    chat.answered("q", stream("a\n\n```\nb\n```\n\n$c$"))
    chat.page.click("#gear")
    unnamed = chat.page.locator("button, input, textarea, select, output").evaluate_all(
        "nodes => nodes.filter((n) => !(n.ariaLabel || n.textContent.trim() || n.labels?.[0]?.textContent.trim())).map((n) => n.outerHTML)"
    )
    assert unnamed == []


@pytest.mark.parametrize("width", [360, 700, 1400])
def test_nothing_overflows(browser, stub: Stub, width: int) -> None:
    """At 360 px neither long words, wide tables nor code make the page scroll sideways, and panels close."""
    chat = Chat(browser, stub, viewport={"width": width, "height": 640})
    wide = (
        "| "
        + " | ".join(["column"] * 12)
        + " |\n"
        + "|--" * 12
        + "|\n\n```\n"
        + "y" * 300
        + "\n```\n"
        + "z" * 300
        + " $"
        + "q" * 200
        + "$"
    )
    chat.answered("w" * 200, stream(chunk(reasoning="v" * 300), wide))
    sizes = "() => [document.documentElement.scrollWidth, document.getElementById('scroll').scrollWidth - document.getElementById('scroll').clientWidth]"
    assert chat.page.evaluate(sizes) == [width, 0]
    for control in ("#prompt", "#send", "#budget", "#gear"):
        box = chat.page.locator(control).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    chat.page.click("#gear")
    expect(chat.page.locator("#settings")).to_be_visible()
    assert chat.page.evaluate(sizes)[0] == width
    chat.page.keyboard.press("Escape")
    expect(chat.page.locator("#settings")).to_be_hidden()
    chat.close()


def test_colours_follow_the_system(browser, stub: Stub) -> None:
    """Dark and light differ, and text keeps a contrast of 4.5 in both."""
    grounds = set()
    for scheme in ("light", "dark"):
        chat = Chat(browser, stub, color_scheme=scheme)
        answer = chat.answered("q", stream(chunk(reasoning="hm"), "text"))
        answer.locator("summary").click()
        ground = channels(chat.page.evaluate("getComputedStyle(document.body).backgroundColor"))
        grounds.add(ground)
        for selector in (".body", ".thought-text", ".stats", "summary"):
            colour = channels(answer.locator(selector).evaluate("n => getComputedStyle(n).color"))
            assert contrast(colour, ground) >= 4.5, (scheme, selector)
        chat.close()
    assert len(grounds) == 2


def channels(colour: str) -> tuple[int, ...]:
    """Red, green and blue of `rgb(...)`."""
    return tuple(int(value) for value in re.findall(r"\d+", colour)[:3])


def contrast(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """WCAG 2.2's ratio of relative luminances."""

    def luminance(colour: tuple[int, ...]) -> float:
        linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)
