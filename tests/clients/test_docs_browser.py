"""The documentation in a real browser: it shows every operation, finds them, and its forms speak to the server.

Needs what `test_page_browser` needs. Screenshots go to `HOLDFAST_REPORT_DIR`, if that is set.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from api import openapi
from tests.clients.test_page_browser import (
    CHROMIUM,
    LOOKS,
    OpenWindow,
    Window,
    browser,
    check_accessibility,
    open_window,
    report,
    shop,
)
from tests.server import Server

sync_api = pytest.importorskip("playwright.sync_api", reason="no browser tests: Playwright is not installed")
from playwright.sync_api import Locator, expect  # noqa: E402

__all__ = ["browser", "open_window", "report", "shop"]  # fixtures

pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser tests: {CHROMIUM} is not installed")


class Docs:
    """One reader's window."""

    def __init__(self, window: Window, server: Server, at: str = "") -> None:
        self.window = window
        self.page = window.page
        self.page.goto(f"{server.url}/docs{at}")
        expect(self.page.locator("#listDrops")).to_be_attached()

    def open(self, operation_id: str) -> Locator:
        one = self.page.locator(f"#{operation_id}")
        if one.get_attribute("open") is None:
            one.locator("> summary").click()
        return one

    def send(self, operation_id: str, **fields: str) -> tuple[str, str]:
        """Fill the form of an operation and send it: status and body of the answer."""
        form = self.open(operation_id).locator("form")
        for name, value in fields.items():
            form.locator(".field", has_text=re.compile(rf"^{name}\b")).locator("input, textarea").fill(value)
        form.get_by_role("button", name="Send").click()
        expect(form.locator(".status")).to_be_visible()
        return form.locator(".status").inner_text().split()[0], form.locator(".result > pre").inner_text()


@pytest.fixture
def docs(open_window: OpenWindow, shop: Server) -> Iterator[Docs]:
    window = open_window(shop)
    yield Docs(window, shop)
    assert window.complaints == []


def test_page_shows_every_operation_and_every_shape(docs: Docs) -> None:
    document = openapi.document()
    names = [told["operationId"] for operations in document["paths"].values() for told in operations.values()]

    for name in names:
        expect(docs.open(name).locator(".inside h3").first).to_be_visible()
    for name in document["components"]["schemas"]:
        expect(docs.page.locator(f"#shape-{name}")).to_be_visible()
    expect(docs.page.locator("#about")).to_contain_text("every unit goes to exactly one buyer")


def test_forms_take_a_drop_from_its_making_to_its_sale(docs: Docs) -> None:
    status, body = docs.send("createDrop")
    assert status == "201"
    drop_id = json.loads(body)["data"]["id"]
    for operation, expected in (("reserve", "201"), ("reserve", "409"), ("purchase", "201"), ("showDrop", "200")):
        status, body = docs.send(operation, id=drop_id)
        # The answer before it stands there until the next one comes.
        docs.page.wait_for_function(
            "([id, status]) => document.querySelector(`#${id} .status`).textContent.startsWith(status)",
            arg=[operation, expected],
        )
    assert json.loads(body)["data"]["available_stock"] == 99


def test_user_of_the_page_is_the_one_that_is_said(docs: Docs) -> None:
    user_id = "0190a5a0-0000-7000-8000-0000000000d0"
    docs.page.locator("#who-input").fill(user_id)
    docs.page.locator("#who-input").press("Tab")

    status, body = docs.send("me")
    assert (status, json.loads(body)["data"]["user"]["id"]) == ("200", user_id)


def test_words_of_an_answer_stay_text(docs: Docs) -> None:
    _, body = docs.send("echo", Body='{"email": "a@b.c", "name": "<img src=x onerror=alert(1)>"}')

    assert json.loads(body)["data"]["received"]["name"].startswith("<img")
    expect(docs.page.locator("img")).to_have_count(0)


def test_search_leaves_what_has_the_words(docs: Docs) -> None:
    docs.page.locator("#search").fill("purchases")
    expect(docs.page.locator(".operation:visible")).to_have_count(1)
    docs.page.locator("#search").fill("no such words")
    expect(docs.page.locator("#nothing")).to_be_visible()
    docs.page.locator("#search").fill("")
    expect(docs.page.locator("#reserve")).to_be_visible()


def test_link_to_an_operation_opens_it(open_window: OpenWindow, shop: Server) -> None:
    docs = Docs(open_window(shop), shop, "#cancelReservation")

    expect(docs.page.locator("#cancelReservation h3").first).to_be_visible()


@pytest.mark.parametrize("look", LOOKS)
def test_page_has_no_accessibility_fault_and_fits(
    open_window: OpenWindow,
    shop: Server,
    report: Path,
    node_modules: Path,
    look: str,
) -> None:
    docs = Docs(open_window(shop, **LOOKS[look]), shop, "#createDrop")
    docs.send("createDrop")
    docs.open("createDrop").locator(".answer > summary").first.click()

    docs.page.screenshot(path=report / f"docs-{look}.png", full_page=True)
    width, room = docs.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= room, "it scrolls sideways"
    check_accessibility(docs.window, (node_modules / "axe-core" / "axe.min.js").read_text())
