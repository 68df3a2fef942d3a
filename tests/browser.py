"""What tests do with a page in a browser."""

import json
from pathlib import Path
from typing import Any


def wait_for(browser: Any, script: str) -> None:
    """Until an expression in JavaScript holds."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 10).until(lambda driver: driver.execute_script(f"return {script}"))


def drawn(browser: Any, place: int) -> str:
    """The pixels of a canvas of the page, as a data URL."""
    return browser.execute_script(
        f"return document.querySelectorAll('canvas')[{place}].toDataURL()"
    )


def pressed(browser: Any, *keys: str) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def check_looks_and_requests(browser: Any, page: Path) -> None:
    """It has two themes and fits a phone; nothing but the page was asked for, nothing failed."""
    from selenium.webdriver.common.by import By

    colors = set()
    for _ in range(2):
        browser.find_element(By.ID, "theme").click()
        colors.add(browser.execute_script("return getComputedStyle(document.body).color"))
    assert len(colors) == 2
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390

    assert browser.get_log("browser") == []
    sent = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    urls = {
        m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"
    }
    assert {url for url in urls if not url.startswith("data:")} == {page.as_uri()}
