"""The page explore.html in a real browser, compared with the session and with NumPy."""

import base64
import io
import json
import os
import re

import matplotlib.image
import numpy as np
import pytest
import tensorflow.compat.v1 as tf
from conftest import LINEAR, Reference, built, chromium
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

import vae_mnist

pytestmark = pytest.mark.slow
# A three, as fractions of the pad.
STROKE = [(0.3, 0.25), (0.45, 0.15), (0.6, 0.2), (0.65, 0.32), (0.55, 0.42), (0.45, 0.46)]
STROKE += [(0.58, 0.5), (0.68, 0.62), (0.62, 0.78), (0.45, 0.85), (0.3, 0.78)]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = chromium(tmp_path_factory.mktemp("profile"))
    if not browser:
        missing = pytest.fail if "CI" in os.environ else pytest.skip
        missing("needs Chromium or Chrome, and chromedriver")
    yield browser
    browser.quit()


class Page:
    """A page, the session that it was made from, and the same network in NumPy float64."""

    def __init__(self, browser, path, model, sess):
        self.browser, self.path, self.model, self.sess = browser, path, model, sess
        self.reference = Reference(sess.run(tf.trainable_variables()), LINEAR[model.decoder])

    def open(self, width=1400, until="ready", height=900):
        """Load the page anew, and wait until an expression is true; `ready`: all is prepared."""
        device = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
        self.browser.get(self.path.as_uri())
        self.browser.set_script_timeout(30)
        look = f"(function look() {{({until}) ? done() : setTimeout(look, 20)}})()"
        self.browser.execute_async_script(f"const done = arguments[0]; {look}")

    def run(self, script, *arguments):
        return self.browser.execute_script(script, *arguments)

    def element(self, name):
        element = self.browser.find_element("id", name)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        return element

    def pixels(self, name):
        """Return a canvas as an array (height, width, 4), from 0 to 255."""
        png = self.run("return document.getElementById(arguments[0]).toDataURL()", name)
        content = io.BytesIO(base64.b64decode(png.split(",")[1]))
        return np.rint(255 * matplotlib.image.imread(content))

    def text(self, name):
        return self.browser.find_element("id", name).text

    def move_over(self, name, points):
        """Press the mouse on the first of several points, fractions of a canvas; move it on."""
        element = self.element(name)
        side, actions = element.size["width"], ActionChains(self.browser, duration=0)
        for i, (x, y) in enumerate(points):
            actions.move_to_element_with_offset(
                element, round((x - 0.5) * side), round((y - 0.5) * side)
            )
            if i == 0:
                actions.click_and_hold()
        actions.release().perform()


@pytest.fixture(scope="module", params=["tutorial", "mirrored"])
def page(request, browser, trained_runs):
    directory = trained_runs[request.param]
    with built(decoder=request.param) as (model, sess):
        model.restore(directory / "checkpoint", sess)
        yield Page(browser, directory / "explore.html", model, sess)


def assert_shows(pixels, image):
    """A canvas of 28 x 28 shows an image in grey, as nearly as 256 levels allow."""
    assert pixels.shape == (28, 28, 4) and np.all(pixels[..., 3] == 255)
    np.testing.assert_allclose(pixels[..., :3], np.repeat(255 * image[..., None], 3, 2), atol=0.51)


def posterior(reference, x):
    """Return p(z | x) on the grid of the page, from sums over pixels in float64."""
    grid = np.linspace(-3, 3, 101)
    z = np.stack(np.meshgrid(grid, grid[::-1]), axis=-1).reshape(-1, 2)
    reference.inputs, reference.outputs = {}, {}
    logits = reference.forward(z, range(4, len(reference.kernels)))
    log_p = logits @ np.asarray(x, np.float64) - np.sum(np.logaddexp(0, logits), axis=1)
    log_p -= np.sum(z**2, axis=1) / 2
    p = np.exp(log_p - log_p.max())
    return p / p.sum()


def mnist_form(ink):
    """Return ink, an array in [0, 1], as MNIST's authors would: exact averages, whole moves."""
    rows, columns = np.nonzero(ink >= 0.05)
    top, left = rows.min(), columns.min()
    side = max(np.ptp(rows), np.ptp(columns)) + 1
    square = np.zeros((side, side))
    part = ink[top : top + side, left : left + side]
    square[: part.shape[0], : part.shape[1]] = part
    small = square.repeat(20, axis=0).repeat(20, axis=1)  # so that each mean is of whole pixels
    small = small.reshape(20, side, 20, side).mean(axis=(1, 3))
    down, right = (
        round(14 - np.sum(small.sum(axis=1 - axis) * np.arange(20)) / small.sum())
        for axis in (0, 1)
    )
    field = np.zeros((68, 68))  # for what is moved out of the middle of it
    field[20 + down : 40 + down, 20 + right : 40 + right] = small
    return field[20:48, 20:48]


def test_network_of_the_page_is_that_of_the_session(page, mnist):
    page.open(until="vae")
    codes = np.random.default_rng(0).normal(size=(50, 2))
    images = page.run("return arguments[0].map(z => [...vae.decode(z)])", codes.tolist())
    decoded = page.model.decode(codes, page.sess).reshape(50, -1)
    np.testing.assert_allclose(images, decoded, atol=1e-5, rtol=0)
    x = vae_mnist.scale(mnist[1][0][:50])
    encoded = page.run("return arguments[0].map(x => vae.encode(x))", x.tolist())
    for name, values in zip(("mu", "log_sig_sq"), page.model.encode(x, page.sess)):
        np.testing.assert_allclose([e[name] for e in encoded], values, atol=1e-5, rtol=0)


def test_posterior_is_the_exact_one(page, mnist):
    page.open()
    for x in vae_mnist.scale(mnist[1][0][:4]):
        found = page.run(
            "const {n, p} = vae.posterior(arguments[0]); return {n, p: [...p]}", x.tolist()
        )
        expected = posterior(page.reference, x)
        assert found["n"] == 101 and sum(found["p"]) == pytest.approx(1)
        np.testing.assert_allclose(found["p"], expected, atol=1e-3 * expected.max(), rtol=0)


@pytest.mark.parametrize("page", ["mirrored"], indirect=True)
def test_mouse_finger_and_keys_move_z(page):
    page.open(until="vae")
    plane = page.element("plane")
    side = plane.size["width"]
    page.move_over("plane", [(0.25, 0.4)])
    z = page.run("return vae.z")
    np.testing.assert_allclose(z, [-1.5, 0.6], atol=12 / side)
    assert_shows(page.pixels("digit"), page.model.decode([z], page.sess)[0])
    assert page.text("z") == f"z = ({z[0]:.2f}, {z[1]:.2f})"
    box = page.run(
        "const {x, y} = document.getElementById('plane').getBoundingClientRect(); return {x, y}"
    )
    finger = {"x": box["x"] + 0.75 * side, "y": box["y"] + 0.9 * side}
    for kind, points in (("touchStart", [finger]), ("touchEnd", [])):
        touch = {"type": kind, "touchPoints": points}
        page.browser.execute_cdp_cmd("Input.dispatchTouchEvent", touch)
    np.testing.assert_allclose(page.run("return vae.z"), [1.5, -2.4], atol=12 / side)
    before = np.array(page.run("return vae.z"))
    page.run("document.getElementById('plane').focus({preventScroll: true})")
    for keys, step in ((Keys.ARROW_RIGHT, [0.1, 0]), (Keys.ARROW_UP * 2, [0, 0.2])):
        ActionChains(page.browser).send_keys(keys).perform()
        before = before + step
        np.testing.assert_allclose(page.run("return vae.z"), before)
    ActionChains(page.browser).key_down(Keys.SHIFT).send_keys(Keys.ARROW_LEFT).perform()
    ActionChains(page.browser).key_up(Keys.SHIFT).send_keys(Keys.ARROW_DOWN * 40).perform()
    z = page.run("return vae.z")
    np.testing.assert_allclose(z, [before[0] - 0.01, -3])  # the edge of the plane
    assert_shows(page.pixels("digit"), page.model.decode([z], page.sess)[0])


def assert_seen(page, x):
    """The page shows mu, losses and reconstruction of x, and its posterior on the plane."""
    mu, log_sig_sq = (v[0].astype(np.float64) for v in page.model.encode([x], page.sess))
    assert_shows(page.pixels("reconstruction"), page.model.decode([mu], page.sess)[0])
    numbers = [float(n) for n in re.findall(r"-?\d+\.\d+", page.text("losses"))]
    page.reference.run([x], np.zeros((1, 2)))  # so that z = mu
    logits = page.reference.logits[0]
    rec_loss = np.sum(np.logaddexp(0, logits) - x * logits)
    kld = 0.5 * np.sum(np.exp(log_sig_sq) - log_sig_sq + mu**2 - 1)
    np.testing.assert_allclose(numbers, [*mu, rec_loss, kld], atol=0.0051)
    shown = page.pixels("plane").astype(int)
    page.run("document.getElementById('clear').click()")
    changed = np.abs(shown - page.pixels("plane")).max(axis=2) > 60
    # What picking it changed on the plane is within four sigma of either, and in its midst.
    p, grid = posterior(page.reference, x).reshape(101, 101), np.linspace(-3, 3, 101)
    rows, columns = np.nonzero(changed)
    for k, (place, weights) in enumerate(((columns, p.sum(0)), (-rows, p.sum(1)[::-1]))):
        place = (place + (0 if k == 0 else 840)) / 140 - 3
        mean = np.sum(weights * grid)
        spread = 4 * np.sqrt(np.sum(weights * (grid - mean) ** 2)) + 0.2
        reach = 2 * np.exp(log_sig_sq[k] / 2) + 0.1
        assert place.min() > min(mean - spread, mu[k] - reach)
        assert place.max() < max(mean + spread, mu[k] + reach)
        assert place.min() < np.clip(mu[k], -2.9, 2.9) < place.max()
    around = np.linspace(0, 2 * np.pi, 60)
    for times in (1, 2):  # the ellipses
        x, y = (times * np.exp(log_sig_sq / 2) * np.stack([np.cos(around), np.sin(around)], 1)).T
        columns, rows = 140 * (mu[0] + x + 3), 140 * (3 - mu[1] - y)
        inside = (columns >= 0) & (columns < 840) & (rows >= 0) & (rows < 840)
        line = shown[rows[inside].astype(int), columns[inside].astype(int), :3]
        assert inside.sum() > 20 and np.mean(line.min(axis=1) > 150) > 0.9
    place = np.unravel_index(p.argmax(), p.shape)
    red, _, blue = shown[tuple(min(round(8.4 * i), 839) for i in place)][:3]
    assert red > blue  # the glow


@pytest.mark.parametrize("page", ["mirrored"], indirect=True)
def test_drawing_is_brought_into_mnists_form_and_encoded(page):
    page.open()
    page.move_over("draw", STROKE)
    ink = page.pixels("draw")[..., 0] / 255
    assert 0.02 < ink.mean() < 0.4
    drawn = np.array(page.run("return [...vae.drawn]"))
    np.testing.assert_allclose(drawn.reshape(28, 28), mnist_form(ink), atol=1e-6)
    assert_seen(page, drawn)
    assert not np.any(page.run("return [...vae.drawn]"))  # it cleared the pad
    assert not page.pixels("draw")[..., :3].any() and page.text("losses") == ""
    page.browser.find_element("css selector", "#shown button").click()
    page.move_over("draw", STROKE)  # begins anew: the test image is not part of it
    assert np.array_equal(page.pixels("draw")[..., 0] / 255, ink)
    page.element("clear").click()
    page.move_over("draw", [(0.9, 0.1)])  # a dot in a corner, then a line along the edge
    page.move_over("draw", [(0.98, 0.5), (0.98, 0.99)])
    drawn = np.reshape(page.run("return [...vae.drawn]"), (28, 28))
    np.testing.assert_allclose(drawn, mnist_form(page.pixels("draw")[..., 0] / 255), atol=1e-6)


@pytest.mark.parametrize("page", ["mirrored"], indirect=True)
def test_test_digits_can_be_picked(page, mnist):
    page.open()
    images, labels = mnist[1]
    buttons = page.browser.find_elements("css selector", "#shown button")
    assert len(buttons) == 20
    for i, press in ((3, lambda button: button.click()), (18, lambda b: b.send_keys(Keys.ENTER))):
        page.run("arguments[0].scrollIntoView({block: 'center'})", buttons[i])
        press(buttons[i])
        pressed = [b.get_attribute("aria-pressed") == "true" for b in buttons]
        assert pressed == [j == i for j in range(20)]
        image = images[np.flatnonzero(labels == i // 2)[i % 2]]
        assert buttons[i].get_attribute("aria-label") == f"A test image of {i // 2}"
        pad = page.pixels("draw")[2::5, 2::5, 0]
        assert np.array_equal(pad, image)
        assert_seen(page, image.reshape(-1) / 255.0)


@pytest.mark.parametrize("page", ["mirrored"], indirect=True)
def test_both_backgrounds_show_what_they_say(page, mnist):
    page.open()
    plane = page.pixels("plane")
    for row, column in ((1, 2), (27, 15), (13, 28)):  # where no line crosses
        z = [-2.9 + 0.2 * column, 2.9 - 0.2 * row]
        tile = plane[28 * row : 28 * row + 28, 28 * column : 28 * column + 28]
        assert_shows(tile, page.model.decode([z], page.sess)[0])
    assert not page.element("legend").is_displayed()
    page.browser.find_element("css selector", "[value=codes]").click()
    assert page.element("legend").text.split() == [str(n) for n in range(10)]
    plane = page.pixels("plane")
    mu, _ = page.model.encode(vae_mnist.scale(mnist[1][0]), page.sess)
    places, found = 140 * (mu * [1, -1] + 3), []
    for i, (place, label) in enumerate(zip(places, mnist[1][1])):
        colour = [int(vae_mnist.COLOURS[label][at : at + 2], 16) for at in (1, 3, 5)]
        alone = np.all(np.abs(places[i + 1 :] - place).max(axis=1) > 5)  # none is drawn over it
        if alone and np.all((place > 0) & (place < 840)):
            found.append(np.array_equal(plane[int(place[1]), int(place[0]), :3], colour))
    assert len(found) > 500 and np.mean(found) > 0.9  # some lie beneath a line
    around = np.linspace(0, 2 * np.pi, 720)
    circle = np.stack([np.cos(around), np.sin(around)], axis=1)
    square = circle / np.abs(circle).max(axis=1, keepdims=True)
    for line, dashed in (
        (circle, True),
        (2 * circle, True),
        (2 * square, True),
        (1.5 * circle, False),
    ):
        columns, rows = np.floor(140 * (line + 3)).astype(int).T
        found = plane[rows, columns]  # one and two sigma, what latent.png shows, and no line
        dark = (found[:, :3].max(axis=1) < 80) & (found[:, 3] > 200)
        assert np.mean(dark) > 0.3 if dashed else np.mean(dark) < 0.1
    page.browser.find_element("css selector", "[value=manifold]").click()
    assert not page.element("legend").is_displayed()


@pytest.mark.parametrize("page", ["mirrored"], indirect=True)
@pytest.mark.parametrize("width", [400, 820, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_its_window(width, scheme, page):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.open(width, until="vae")
    assert "mirrored decoder, 1,000 iterations, seed 0." in page.text("what")
    assert page.run("return document.documentElement.scrollWidth") <= width
    script = """return ["plane", "digit", "draw", "reconstruction"].map(
        id => document.getElementById(id).getBoundingClientRect().toJSON())"""
    plane, digit, draw, reconstruction = boxes = page.run(script)
    assert all(abs(b["width"] - b["height"]) < 1 and b["width"] > 140 for b in boxes)
    beside = digit["left"] > plane["right"] and digit["top"] < plane["bottom"]
    assert beside == (width >= 800)
    assert digit["bottom"] < 900  # z and its digit are seen together
    assert abs(draw["top"] - reconstruction["top"]) < 1
    script = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    ink, paper = (sum(map(int, re.findall(r"\d+", c))) for c in page.run(script))
    assert (ink > 600 and paper < 100) if scheme == "dark" else (ink < 100 and paper > 600)
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.parametrize("page", ["mirrored"], indirect=True)
def test_low_screen_leaves_room_to_scroll_beside_the_plane(page):
    page.open(width=667, height=375, until="vae")
    assert page.element("plane").size["width"] < 375


@pytest.mark.parametrize("page", ["mirrored"], indirect=True)
def test_page_asks_nobody_for_anything(page):
    content = page.path.read_text()
    assert len(content.encode()) <= 3_000_000
    for log in ("browser", "performance"):
        page.browser.get_log(log)
    page.open()
    page.move_over("draw", STROKE)
    events = [json.loads(e["message"])["message"] for e in page.browser.get_log("performance")]
    requests = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    urls = {r["request"]["url"] for r in requests if r["documentURL"].startswith("file:")}
    assert urls == {page.path.as_uri()}
    assert page.browser.get_log("browser") == []
    # Nor could it: its own policy forbids every connection.
    script = """const done = arguments[0];
        document.addEventListener("securitypolicyviolation", e => done(e.effectiveDirective));
        fetch("https://example.org").catch(() => setTimeout(done, 1000, "not forbidden"))"""
    assert page.browser.execute_async_script(script) == "connect-src"


def test_without_the_frame_there_is_a_picture_and_no_page(tmp_path, monkeypatch, capsys):
    data = vae_mnist.HERE / "data" / "mnist.npz"
    monkeypatch.setattr(vae_mnist, "HERE", tmp_path)
    options = ["--iterations", "3", "--data", str(data), "--output-dir", str(tmp_path / "run")]
    assert vae_mnist.main(options) == 0
    assert (tmp_path / "run" / "latent.png").exists()
    assert not (tmp_path / "run" / "explore.html").exists()
    assert capsys.readouterr().out.endswith(f"codes is in {tmp_path / 'run' / 'latent.png'}\n")
