"""Make docs/playground.png of a running server: ``python -m tests.serve.make_screenshot``.

It looks best with the font Inter (Debian: fonts-inter).
"""

from playwright.sync_api import sync_playwright

from tests.conftest import ROOT
from tests.serve.browsers import CHROMIUM
from tests.serve.conftest import server_process

PROMPT = "Once upon a time there was a small robot who"


def main() -> None:
    """Complete a prompt with the embedded model, and take a picture of its tokens."""
    embedded = ROOT / "models" / "edgelm_models" / "stories-6m-int8"
    other = ROOT / "models" / "dialogue-6m-int8"
    with server_process("-m", str(other), model=embedded) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 760}, device_scale_factor=1.25)
        page.goto(server.url)
        page.fill("#prompt", PROMPT)
        page.fill("#option-seed", "7")
        page.fill("#option-max_tokens", "120")
        page.click("#complete [data-view=tokens]")
        page.click("#run")
        page.locator("#results .result[aria-busy=false]").wait_for()
        page.evaluate("[document.documentElement, document.querySelector('.options')].map(one => one.scrollTo(0, 0))")
        page.locator("#results .token", has_text="dig").first.hover()
        page.screenshot(path=ROOT / "docs" / "playground.png")
        browser.close()


if __name__ == "__main__":
    main()
