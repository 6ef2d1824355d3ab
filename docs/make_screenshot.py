"""Take docs/serve.png: a server of the bundled model, its page in Chromium, two test images classified."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import expect, sync_playwright

OUT = Path(__file__).with_name("serve.png")


def main() -> None:
    """Start the server, click, and save what is seen."""
    command = [sys.executable, "-m", "manidp", "serve", *sys.argv[1:], "--port", "0", "--no-log"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        assert server.stdout
        port = json.loads(server.stdout.readline())["port"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1000, "height": 900})
        page.goto(f"http://127.0.0.1:{port}")
        for number in (4, 8):
            page.get_by_role("button", name=f"test image {number}", exact=True).click()
            expect(page.get_by_role("status")).to_contain_text(f"test image {number}: ", timeout=20_000)
        page.get_by_text("Which channels ran in each layer").first.click()
        page.screenshot(path=OUT)
        browser.close()
        server.terminate()


if __name__ == "__main__":
    main()
