"""The page at /, in a real browser, on the real application with a model that says a script."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from apertus_mlx.server.chat_page import FILES, HEADERS
from apertus_mlx.server.security import Access
from tests.server.browser import browser
from tests.server.running import serving
from tests.server.scripted_port import ScriptedPort, scripted_port

HTML = "<img src=x onerror=\"document.title='broken'\">\n```\nlet code = '<b>';\n```"
CALL = [71, '[{"weather": {"city": "Bern"}}]', 72]
TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "The weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}},
                   "required": ["city"]}}}]  # fmt: skip


class Page:
    """The page as its user meets it."""

    def __init__(self, driver: Any, port: ScriptedPort) -> None:
        self.driver, self.port = driver, port
        self.address = port.base.removesuffix("v1")
        driver.get(self.address)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        found = self.driver.find_elements("css selector", selector)
        return [each.get_attribute("textContent") for each in found]

    def until(self, holds: Callable[[], bool]) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 30, 0.02).until(lambda _: holds())

    def write(self, text: str) -> None:
        self.find("#text").send_keys(text)

    def focused(self) -> str:
        return str(self.driver.execute_script("return document.activeElement.id"))

    def rests(self) -> None:
        self.until(lambda: not self.find("#stop").is_enabled())

    def finished(self, text: str) -> None:
        """Wait until a screen reader is told so."""
        self.until(lambda: text in self.texts("#finished")[0])
        self.rests()

    def set(self, name: str, value: str) -> None:
        script = (
            "const field = document.querySelector(arguments[0]); field.value = arguments[1];"
            "field.dispatchEvent(new Event('input', {bubbles: true}));"
        )
        self.driver.execute_script(script, name, value)


@contextmanager
def opened() -> Iterator[Page]:
    with browser() as driver, scripted_port() as port:
        yield Page(driver, port)


def test_a_question_is_answered_and_nothing_of_the_answer_is_html() -> None:
    with opened() as page:
        page.port.answers = [[HTML]]
        page.write("Hello\n")
        page.finished("let code")
        assert page.texts("article.user .text") == ["Hello"]
        assert page.texts("article.assistant .text")[0] == HTML.split("\n")[0]
        assert page.texts("article.assistant pre code") == ["let code = '<b>';\n"]
        assert page.texts("article img") == [] and page.driver.title == "apertus-mlx"
        assert page.focused() == "text"
        assert [e for e in page.driver.get_log("browser") if e["level"] == "SEVERE"] == []


@pytest.mark.nightly
def test_the_page_does_all_that_it_offers() -> None:
    with opened() as page:
        for each in (thoughts, tool_call, stop, errors, reload_and_export, keyboard, colours):
            each(page)
            page.until(lambda: page.find("#new").is_enabled())
            page.find("#new").click()
            assert page.texts("article") == []


def thoughts(page: Page) -> None:
    page.port.answers = [[69, "Let me see.", 70, "Yes."]]
    page.set("[name=think]", "high")
    page.set("[name=system]", "Be brief.")
    page.write("Is it?")
    page.find("#send").click()
    page.finished("Yes.")
    folded = page.find("article.assistant details")
    assert folded.get_attribute("open") is None
    assert page.texts("article.assistant .thought") == ["Let me see."]
    assert page.texts("article.assistant .text") == ["Yes."]
    page.until(lambda: "tokens/s" in page.find("#figures").text)
    assert "kept of at most" in page.find("#figures").text
    page.set("[name=think]", "")
    page.set("[name=system]", "")


def tool_call(page: Page) -> None:
    page.port.answers = [CALL, ["It rains."]]
    page.set("[name=tools]", json.dumps(TOOLS))
    page.write("Weather?\n")
    page.finished("Calls weather")
    assert page.texts("article .arguments") == ['{"city": "Bern"}']
    assert not page.find("#send").is_enabled()
    page.find("form.results textarea").send_keys("rain")
    page.find("form.results button").click()
    page.finished("It rains.")
    assert page.texts("article.tool .text") == ["rain"]
    page.set("[name=tools]", "[")
    page.write("More?\n")
    page.until(lambda: "not JSON" in page.find("#error").text)
    page.set("[name=tools]", "")
    page.port.answers = [["Fine."]]
    page.find("#retry").click()
    page.finished("Fine.")


def stop(page: Page) -> None:
    page.port.answers = [["one two three four five six seven eight nine ten"]]
    page.port.hold_after = 4
    page.write("Count\n")
    page.until(lambda: any("one" in text for text in page.texts("article.assistant .text")))
    page.find("#stop").click()
    page.finished("Stopped.")
    page.port.hold_after = None
    said = page.texts("article.assistant .text")[0]
    assert "one" in said and "ten" not in said
    # The server has let go of it, and answers the next.
    page.port.answers = [["Again."]]
    page.write("Again\n")
    page.finished("Again.")


def errors(page: Page) -> None:
    for status, words in ((429, "wait 7 s"), (503, "503: too little"), (401, "API key")):
        page.port.refusal = (status, "too little")
        if status == 429:
            page.write("Hello\n")
        else:
            page.find("#retry").click()
        page.until(lambda words=words: words in page.find("#error").text)
        assert page.focused() == "retry"
        assert page.find("#error").get_attribute("role") == "alert"
    page.port.refusal = None
    page.port.answers = [["Now."]]
    page.find("#retry").click()
    page.finished("Now.")
    assert not page.find("#error").is_displayed()
    assert page.texts("article.user .text") == ["Hello"]
    page.driver.set_network_conditions(offline=True, latency=0, throughput=0)
    page.write("And?\n")
    page.until(lambda: "cannot be reached" in page.find("#error").text)
    page.driver.delete_network_conditions()
    page.port.answers = [["Here."]]
    page.find("#retry").click()
    page.finished("Here.")


def reload_and_export(page: Page) -> None:
    page.port.answers = [["It is kept."]]
    page.set("[name=temperature]", "0.5")
    page.write("Keep it\n")
    page.finished("It is kept.")
    before = page.texts("article")
    page.driver.refresh()
    page.until(lambda: page.texts("article") == before)
    assert page.find("[name=temperature]").get_attribute("value") == "0.5"
    page.driver.execute_script(
        "window.saved = []; const make = URL.createObjectURL;"
        "URL.createObjectURL = (b) => { b.text().then((t) => window.saved.push(t));"
        " return make.call(URL, b); };"
    )
    for kind in ("json", "markdown"):
        page.find(f"#export-{kind}").click()
    page.until(lambda: len(page.driver.execute_script("return window.saved")) == 2)
    whole, text = page.driver.execute_script("return window.saved")
    assert json.loads(whole)["messages"] == [
        {"role": "user", "content": "Keep it"},
        {"role": "assistant", "content": "It is kept."},
    ]
    assert text == "## user\n\nKeep it\n\n## assistant\n\nIt is kept.\n"
    page.set("[name=temperature]", "")


def keyboard(page: Page) -> None:
    """Everything is reached by Tab, shows that, and has a name."""
    from selenium.webdriver.common.action_chains import ActionChains

    page.driver.get(page.address)
    page.set("#text", "x")
    reached, unseen = [], []
    for _ in range(20):
        ActionChains(page.driver).send_keys("\ue004").perform()
        focused = page.driver.switch_to.active_element
        style = focused.value_of_css_property("outline-style")
        unseen += [focused.get_attribute("outerHTML")] if style == "none" else []
        reached.append(focused.get_attribute("id") or focused.tag_name)
        if reached[-1] == "send":
            break
    assert reached == ["a", "new", "export-json", "export-markdown", "summary", "messages", "text",
                       "send"]  # fmt: skip
    assert unseen == []
    page.find("#settings summary").send_keys(" ")
    fields = page.driver.find_elements("css selector", "input, textarea, select, button")
    shown = [each for each in fields if each.is_displayed()]
    assert len(shown) > 10
    assert [each.get_attribute("outerHTML") for each in shown if not each.accessible_name] == []
    page.port.answers = [["By keys."]]
    page.set("#text", "")
    page.write("one\ue008\ue007\ue008two\ue007")
    page.finished("By keys.")
    assert page.texts("article.user .text") == ["one\ntwo"]


def colours(page: Page) -> None:
    """What is read stands out by 4.5 to 1, as WCAG 2 reckons it."""
    for scheme in ("light", "dark"):
        feature = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature)
        back = page.find("body").value_of_css_property("background-color")
        assert (luminance(back) > 0.5) == (scheme == "light")
        for selector in ("body", "#help", "#error", "#send"):
            text = page.find(selector).value_of_css_property("color")
            high, low = sorted((luminance(back), luminance(text)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (scheme, selector)


def luminance(colour: str) -> float:
    parts = [int(each) / 255 for each in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_page_is_open_and_all_else_needs_the_key() -> None:
    with serving(access=Access(key="secret")) as server:
        for path in FILES:
            response = server.get(path)
            assert response.status_code == 200, path
            assert {k.lower(): v for k, v in HEADERS.items()}.items() <= dict(
                response.headers
            ).items()
        assert server.get("/v1/status").status_code == 401
        assert server.get("/page/other.js").status_code == 401


def test_a_page_of_this_very_host_may_ask() -> None:
    with serving(access=Access(hosts=["box.example"], any_address=True)) as server:
        for host, origin, expected in (
            ("box.example:8080", "http://box.example:8080", 200),
            ("10.0.0.5:8080", "http://10.0.0.5:8080", 200),
            ("10.0.0.5:8080", "http://10.0.0.6:8080", 403),
            ("evil.example", "http://evil.example", 403),
        ):
            response = server.get("/v1/status", headers={"host": host, "origin": origin})
            assert response.status_code == expected, (host, origin)
