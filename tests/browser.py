"""A real browser for tests of pages: headless Chromium, driven over its debugging pipe."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
# Widths of a laptop's and of a phone's window, light and dark.
SCREENS = ((1280, "light"), (1280, "dark"), (390, "light"), (390, "dark"))


class Browser:
    """Chromium's debugging pipe: commands in, answers and events out, each ended by a zero byte."""

    def __init__(self, profile: Path) -> None:
        out_read, self.out = os.pipe()
        self.inp, in_write = os.pipe()
        command = (
            f'exec "{CHROMIUM}" --headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe '
            f'--no-first-run --user-data-dir="{profile}" --window-size=1200,1500 about:blank '
            f"3<&{out_read} 4>&{in_write}"
        )
        # The tests' preloaded BLAS does not survive in Chromium's sandboxed processes.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(
            ["bash", "-c", command], pass_fds=(out_read, in_write), env=environment, **quiet
        )
        os.close(out_read)
        os.close(in_write)
        self.numbers, self.buffer, self.events = itertools.count(1), b"", []

    def call(self, method, session=None, **parameters):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        os.write(self.out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def read(self):
        while b"\0" not in self.buffer:
            data = os.read(self.inp, 1 << 16)
            assert data, "chromium ended"
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.inp)


def opened(browser, page, drawn="!!document.querySelector('svg')"):
    """The session of a page, a file or an address, that has been drawn, when the JavaScript ``drawn`` holds, and what
    evaluates it there."""
    target = browser.call("Target.createTarget", url="about:blank")["targetId"]
    session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
        browser.call(f"{domain}.enable", session)
    browser.call("Page.navigate", session, url=page if isinstance(page, str) else page.as_uri())

    def evaluate(expression):
        found = browser.call("Runtime.evaluate", session, expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    deadline = time.monotonic() + 60
    while not evaluate("document.readyState === 'complete'") or not evaluate(drawn):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return session, evaluate


# Texts of a picture that lie on each other or outside it; a pixel of overlap is rounding.
COLLISIONS = """[...document.querySelectorAll('svg')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 1;
  const outside = ([, r]) => r.left < frame.left - 1 || r.right > frame.right + 1 ||
    r.top < frame.top - 1 || r.bottom > frame.bottom + 1;
  return [...texts.filter(outside).map(([name]) => svg.ariaLabel + ': ' + name + ' outside'),
    ...texts.flatMap(([name, a], i) => texts.slice(i + 1).filter(([, b]) => meet(a, b)).map(([other]) =>
      svg.ariaLabel + ': ' + name + ' on ' + other))];
})"""
TEXTS = "[...document.querySelectorAll('svg')].map(svg => svg.querySelectorAll('text').length)"
PAPER = "[...document.querySelectorAll('svg')].map(svg => getComputedStyle(svg).backgroundColor)"


def check_pictures(browser, session, evaluate, name, least):
    """On every screen: no label meets another, each picture has ``least``, nothing is wider than the window."""
    for width, scheme in SCREENS:
        show(browser, session, width, scheme)
        if keep := os.environ.get("RSGWM_SCREENSHOTS"):
            keep_screenshot(browser, session, Path(keep) / f"{name}-{width}-{scheme}.png")
        assert min(evaluate(TEXTS)) >= least
        found = evaluate(COLLISIONS)
        assert not found, found[:8]
        assert evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert set(evaluate(PAPER)) == {"rgb(255, 255, 255)"}  # the ink of the pictures is black
    evaluate("{const t = document.querySelector('svg text'); t.parentNode.append(t.cloneNode(true));}")
    assert len(evaluate(COLLISIONS)) == 1  # a label on another is seen


def show(browser, session, width, scheme):
    """Make the window that wide, light or dark."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.call("Emulation.setDeviceMetricsOverride", session, **size)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.call("Emulation.setEmulatedMedia", session, features=[feature])


def keep_screenshot(browser, session, path):
    shot = browser.call("Page.captureScreenshot", session, format="png", captureBeyondViewport=True)
    picture = base64.b64decode(shot["data"])
    assert picture.startswith(b"\x89PNG")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture)
