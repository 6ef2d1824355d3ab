"""The page, in a real browser: what people see and do with mouse, keyboard, or a screen reader's names."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, FilePayload, Page, expect, sync_playwright

from manidp.data.images import load_sample
from manidp.formats.checkpoint import save_checkpoint
from manidp.predict import predict
from manidp.serve.describe import SAMPLES
from serve.served import IMAGES, engine, png, process, small_model

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("page") / "small.safetensors"
    save_checkpoint(small_model(), path)
    with process(path, "--threads", 2, "--target", 10_000, "--no-log") as (_, port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def page(browser: Browser, origin: str) -> Iterator[Page]:
    """The page, and afterwards: nothing went wrong in it, and nothing came from elsewhere."""
    page = browser.new_page()
    page.set_default_timeout(20_000)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request", lambda asked: None if asked.url.startswith((origin, "blob:", "data:")) else wrong.append(asked.url)
    )
    page.goto(origin)
    expect(page.get_by_role("heading", level=1)).to_have_text("manidp small")
    yield page
    page.close()
    assert not [line for line in wrong if "422" not in line]  # the browser's own line for a picture that is refused


def test_a_test_image_by_keyboard_shows_class_cost_and_channels(page: Page) -> None:
    page.get_by_role("button", name="test image 1", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("of the dense cost")
    answer = page.get_by_role("list").last.get_by_role("listitem").first
    expect(answer.locator(".macs")).to_contain_text("multiply-adds, beside")
    page.get_by_text("Which channels ran in each layer").focus()
    page.keyboard.press("Enter")
    kept = engine().run(load_sample(SAMPLES).images[:1]).kept
    rows = answer.get_by_role("img", name="channels ran")
    expect(rows).to_have_count(len(kept))
    for gate, mask in kept.items():
        expect(page.get_by_role("img", name=f"{gate}: {mask.sum()} of {mask.size} channels ran")).to_be_visible()


def test_pictures_that_are_chosen_are_classified_at_the_point_chosen(page: Page) -> None:
    page.get_by_role("radio", name="25%").check()
    files: list[FilePayload] = [
        {"name": f"<b>{i}</b>.png", "mimeType": "image/png", "buffer": png(image)} for i, image in enumerate(IMAGES)
    ]
    page.get_by_label("Choose pictures").set_input_files(files)
    expect(page.locator("#results > li")).to_have_count(4)
    wanted = predict(engine(), IMAGES, budget="25%")
    shown = page.locator("#results .answer").all_text_contents()[::-1]
    assert [text.partition(",")[0] for text in shown] == [one.label for one in wanted]
    assert all("operating point 25%" in text for text in page.locator("#results .macs").all_text_contents())
    expect(page.get_by_role("img", name="<b>0</b>.png")).to_be_visible()  # names are text, never markup


def test_what_is_no_picture_is_told_in_one_line(page: Page, tmp_path: Path) -> None:
    (tmp_path / "note.png").write_text("no picture")
    page.get_by_label("Choose pictures").set_input_files(tmp_path / "note.png")
    expect(page.get_by_role("status")).to_contain_text("note.png: picture 0: not a readable JPEG")
    assert page.locator("#results > li").count() == 0


def test_a_dropped_picture_is_classified(page: Page) -> None:
    page.evaluate(
        """async () => {
            const data = new DataTransfer();
            const picture = await (await fetch("v1/samples/3")).blob();
            data.items.add(new File([picture], "dropped.png", {type: "image/png"}));
            document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
        }"""
    )
    expect(page.get_by_role("status")).to_contain_text("dropped.png: ")


def test_the_curve_and_the_load_say_what_is_in_force(page: Page) -> None:
    expect(page.locator("#in-force")).to_have_text("default")
    expect(page.get_by_role("img", name="3 operating points")).to_be_visible()
    assert page.locator("#curve circle").count() == 3
    assert page.locator("#curve circle.force").count() == 1


def test_everything_that_can_be_done_has_a_name_and_is_reached_by_tab(page: Page) -> None:
    page.locator("body").focus()
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName + ' ' + (document.activeElement.type || '')"))
    assert {"INPUT file", "INPUT radio", "BUTTON button"} <= reached
    unnamed = page.evaluate(
        """[...document.querySelectorAll('button, input, img, svg[role=img]')].filter(one =>
            !(one.labels?.length || one.alt || one.getAttribute('aria-label') || one.getAttribute('aria-labelledby')
              || one.querySelector('img[alt]'))).map(one => one.outerHTML)"""
    )
    assert unnamed == []
