"""The page of compare.py --html: its data, and in a real browser its behaviour."""
import base64
import html
import io
import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import compare
import html_page
from checkpoint import save_model
from data.image import read_photo
from evaluation import Score
from model.edsr import EDSR

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
COLUMNS = "network", "dataset", "psnr", "ssim", "lpips", "parameters", "ms_per_image", "ms_per_megapixel"
HOSTILE = "</script><script>document.title=1</script><!--<script>", "<img onerror='document.title=1' src=x>&amp;'\udcff"
LAST = HOSTILE[1].replace("\udcff", "?")


@pytest.fixture(scope="module")
def page_of():
    """page_of(labels, sizes) -> the page of these methods on images of these sizes, and {(image number, label): image}."""
    def make(labels, sizes):
        rng = np.random.default_rng(0)
        gallery, results = html_page.Gallery(10, compare.hardest), {}
        images = SimpleNamespace(name="set", scale=2)
        hrs = [rng.integers(256, size=(*size, 3), dtype=np.uint8) for size in sizes]
        for number, label in enumerate(labels):
            gallery.label = label
            for index, hr in enumerate(hrs):
                results[index, label] = hr // (number + 2)
                gallery.write(images, index, f"image {index}", results[index, label], None, hr)
            gallery.add_scores(Score("set", len(hrs), 30.0, 0.9, 1.0, [
                (f"image {index}", 20.0 + 10 * number + index, 0.5) for index in range(len(hrs))],
                perceptual_per_image={f"image {index}": {"lpips": 0.25} for index in range(len(hrs))}))
        rows = [(label, "set x2", "inf" if number == 1 else f"{9 + number}.5", "0.9000", f"0.{number + 1}",
                 f"{1000 * number}", f"{100 / (number + 1):.1f}", "1.0") for number, label in enumerate(labels)]
        return html_page.page("a <b>title</b>", "about", "protocol", COLUMNS, rows, {"lpips": True}, gallery), results
    return make


def data_of(page):
    """Return the data of a page, as a browser reads them: up to the first end of the element."""
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script', page.decode(), re.DOTALL)[1])


def pixels(source):
    """Return the pixels of a data URI."""
    return np.array(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def test_the_page_holds_the_images_bit_for_bit_and_needs_no_network(page_of):
    page, results = page_of(["bicubic", "net"], [(40, 50), (33, 20)])
    data = data_of(page)
    for index, entry in enumerate(data["images"]):
        assert [result["label"] for result in entry["results"]] == ["bicubic", "net", "HR"]
        for result in entry["results"][:-1]:
            np.testing.assert_array_equal(pixels(result["source"]), results[index, result["label"]])
    assert data["images"][1]["results"][1]["scores"] == {"PSNR": "31.00", "SSIM": "0.5000", "lpips": "0.2500"}
    assert not re.search(r"https?://|url\(|import |<link| src=", html_page.TEMPLATE.read_text())
    assert b"default-src 'none'; img-src data:" in page


def test_of_a_large_image_the_part_with_the_largest_error_is_shown(monkeypatch):
    monkeypatch.setattr(html_page, "SIDE", 64)
    hr = np.zeros((100, 150, 3), np.uint8)
    sr = hr.copy()
    sr[80:90, 110:120] = 200
    gallery = html_page.Gallery(1, compare.hardest)
    gallery.label = "bicubic"
    for index in range(2):
        gallery.write(SimpleNamespace(name="set", scale=2), index, f"{index}", sr, None, hr)
    (entry,) = gallery.entries.values()  # of the second image there is none
    assert (entry["width"], entry["height"], entry["whole"]) == (64, 64, [150, 100])
    shown = pixels(entry["results"][0]["source"])
    assert shown.shape == (64, 64, 3) and (shown == 200).any(2).sum() == 100
    x, y = (round(value) for value in entry["focus"])
    assert (shown[y - 24:y + 24, x - 24:x + 24] == 200).any()


def test_compare_writes_the_page(run_main, tiny_data, tmp_path):
    torch.manual_seed(0)
    save_model(EDSR(2, n_resblocks=1, n_feats=4), tmp_path / "net.pt")
    flags = (f"--cpu --dir_data {tiny_data} --data_test tiny --ckp_path a&b={tmp_path / 'net.pt'} "
             f"--ckp_dir {tmp_path / 'out'} ")
    status, out, err = run_main("compare", flags + "--html --html_images 3 --metric_space rgb --shave 3")
    assert status == 0 and any("compare.html" in line for line in out), err
    data = data_of((tmp_path / "out" / "compare.html").read_bytes())
    table = [line.split(",") for line in (tmp_path / "out" / "compare.csv").read_text().splitlines()]
    assert data["rows"] == table[1:] and [row[0] for row in data["rows"]] == ["bicubic", "a&b"]
    assert "RGB, 3 pixels shaved" in data["protocol"] and len(data["images"]) == 3
    for index, entry in enumerate(data["images"]):
        assert [result["label"] for result in entry["results"]] == ["bicubic", "a&b", "HR"]
        hr = read_photo(tiny_data / "tiny" / "HR" / f"{index}.png")
        np.testing.assert_array_equal(pixels(entry["results"][-1]["source"]), hr)


@pytest.mark.parametrize("extra, words", [("--html_images 3", "--html"), ("--html --html_images 0", "1..65536"),
                                          ("--html --data_test Demo --dir_demo {demo}", "no HR images")])
def test_a_mistake_is_one_line_before_anything_is_upscaled(run_main, tiny_data, tmp_path, extra, words):
    save_model(EDSR(2, n_resblocks=1, n_feats=4), tmp_path / "net.pt")
    status, _, err = run_main("compare", f"--cpu --dir_data {tiny_data} --data_test tiny --ckp_path {tmp_path / 'net.pt'} "
                              f"--ckp_dir {tmp_path / 'out'} {extra.format(demo=tiny_data / 'tiny' / 'HR')}")
    assert status == 2 and len(err) == 1 and words in err[0] and not list(tmp_path.rglob("*.html"))


# ---- in a browser

PROBE = """<script>
(async () => {
  const found = {}, $ = (id) => document.getElementById(id), viewer = $("viewer");
  viewer.setPointerCapture = () => {};  // dispatched events belong to no pointer
  const press = (key, more) => document.body.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, ...more }));
  const choose = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("change")); };
  const column = (k) => [...$("rows").rows].map((row) => row.cells[k].textContent);
  const sort = (k) => { $("columns").cells[k].querySelector("button").click(); return column(k); };
  const clips = () => ["left", "right"].map((side) => Number($(`${side}-layer`).style.clipPath.match(/([1-9][0-9]*)px/)[1]));
  const tags = () => ["left", "right"].map((side) => $(`${side}-tag`).textContent);
  const pointer = (type, x, y, target = viewer) => {
    const box = viewer.getBoundingClientRect();
    target.dispatchEvent(new PointerEvent(type, { clientX: box.left + x, clientY: box.top + y, button: 0, bubbles: true }));
  };
  const image = (side) => $(`${side}-layer`).querySelector(".result");
  const place = () => { const box = image("left").getBoundingClientRect(), outer = viewer.getBoundingClientRect();
                        return [box.left - outer.left, box.top - outer.top, box.width].map(Math.round); };
  const width = viewer.clientWidth;
  found.title = [document.title, $("title").textContent, $("title").children.length];
  found.resources = performance.getEntriesByType("resource").filter((entry) => !entry.name.startsWith("data:"));
  found.labels = [...$("left").options].map((option) => option.textContent);
  found.rows = column(0);
  found.wide = document.documentElement.scrollWidth > innerWidth;

  found.psnr = [sort(2), sort(2)];
  found.sorted = [...$("columns").cells].map((cell) => cell.getAttribute("aria-sort"));
  found.ms = sort(6);
  found.names = sort(0);
  found.best = [...$("rows").querySelectorAll(".best")].map((cell) => cell.textContent).sort();

  found.tags = tags();
  found.half = clips().map((value) => value / width);
  $("position").value = 20; $("position").dispatchEvent(new Event("input"));
  found.fifth = clips().map((value) => value / width);
  press("ArrowRight"); press("ArrowRight", { shiftKey: true });
  found.keys = clips()[1] / width;
  pointer("pointerdown", 0, 50, $("divider")); pointer("pointermove", width * 0.75, 50);
  pointer("pointerup", width * 0.75, 50);
  found.dragged = clips()[1] / width;
  choose("right", 2); choose("left", 1);
  found.chosen = tags();
  press("x"); found.exchanged = tags();
  $("tiles").children[0].click(); $("tiles").children[2].dispatchEvent(new MouseEvent("click", { shiftKey: true }));
  found.tiles = tags();
  found.captions = [...$("tiles").children].map((tile) => tile.innerText.split("\\n").filter(Boolean));

  press("1"); const before = place();
  viewer.dispatchEvent(new WheelEvent("wheel", { deltaY: -400, clientX: viewer.getBoundingClientRect().left + before[0],
    clientY: viewer.getBoundingClientRect().top + before[1], cancelable: true }));
  found.wheel = [before, place()];
  pointer("pointerdown", 9, 9); pointer("pointermove", 39, 29); pointer("pointerup", 39, 29);
  found.panned = place();
  dispatchEvent(new Event("resize")); found.resized = [place()];
  $("fit").click(); found.fit = place();
  dispatchEvent(new Event("resize")); found.resized.push(place());
  const frame = () => [$("frame").style.left, $("frame").style.top].map(parseFloat);
  const scale = found.fit[2] / 50;
  pointer("pointerdown", found.fit[0] + 25 * scale, found.fit[1] + 20 * scale);
  pointer("pointerup", found.fit[0] + 25 * scale, found.fit[1] + 20 * scale);
  found.frame = frame().map((value, k) => (value - found.fit[k]) / scale);

  const read = async (side) => {
    await image(side).decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image(side).naturalWidth, image(side).naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(image(side), 0, 0);
    return [canvas.width, canvas.height, ...context.getImageData(3, 5, 1, 1).data];
  };
  choose("left", 0);
  found.pixel = [await read("left")];
  press("n"); found.pixel.push(await read("left"));
  found.image = $("image").textContent;
  press("e"); found.errors = [getComputedStyle($("left-layer")).filter, $("errors").getAttribute("aria-pressed")];
  $("errors").click(); found.plain = getComputedStyle($("left-layer")).filter;
  document.body.append(Object.assign(document.createElement("pre"), { id: "found", textContent: JSON.stringify(found) }));
})().catch((error) => document.body.append(Object.assign(document.createElement("pre"), {
  id: "found", textContent: JSON.stringify(String(error.stack)) })));
</script>"""


@pytest.fixture(scope="module")
def in_browser(page_of, tmp_path_factory):
    """What a script in a headless Chromium found in the page, and the images of the page."""
    if not CHROMIUM:
        pytest.skip("there is no Chromium here: the page is not tested in a browser")
    folder = tmp_path_factory.mktemp("page")
    page, results = page_of([HOSTILE[0], "b10", "b9", HOSTILE[1]], [(40, 50), (33, 60)])
    (folder / "page.html").write_bytes(page.replace(b"</body>", PROBE.encode() + b"</body>"))
    ran = subprocess.run([CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom",
                          f"--user-data-dir={folder / 'profile'}", "--window-size=1000,900", "--virtual-time-budget=10000",
                          (folder / "page.html").as_uri()], capture_output=True, check=False, timeout=100)
    found = re.search(r'<pre id="found">(.*?)</pre>', ran.stdout.decode(errors="replace"), re.DOTALL)
    assert found, ran.stderr.decode()[-2000:]
    found = json.loads(html.unescape(found[1]))
    assert type(found) is dict, found
    return found, results


def test_labels_are_shown_as_they_are(in_browser):
    found, _ = in_browser
    labels = [HOSTILE[0], "b10", "b9", LAST]
    assert found["title"] == ["a <b>title</b>"] * 2 + [0] and found["rows"] == labels and found["resources"] == []
    assert found["labels"] == [*labels, "HR"] and not found["wide"]


def test_the_table_sorts_by_a_click(in_browser):
    found, _ = in_browser
    assert found["psnr"] == [["inf", "12.5", "11.5", "9.5"], ["9.5", "11.5", "12.5", "inf"]]  # not as text
    assert found["sorted"] == [None, None, "ascending", None, None, None, None, None]
    assert found["ms"] == ["25.0", "33.3", "50.0", "100.0"]
    assert [name for name in found["names"] if name.startswith("b")] == ["b9", "b10"]
    assert found["best"] == sorted(["inf", *["0.9000"] * 4, "0.1"])  # the lowest LPIPS


def test_the_divider_follows_the_slider_the_keys_and_the_pointer(in_browser):
    found, _ = in_browser
    for name, expected in (("half", [0.5, 0.5]), ("fifth", [0.8, 0.2]), ("keys", 0.31), ("dragged", 0.75)):
        assert found[name] == pytest.approx(expected, abs=0.003), name


def test_any_two_results_are_beside_each_other(in_browser):
    found, _ = in_browser
    assert found["tags"] == [f"{HOSTILE[0]}  20.00 dB", f"{LAST}  50.00 dB"]
    assert found["chosen"] == ["b10  30.00 dB", "b9  40.00 dB"] and found["exchanged"] == found["chosen"][::-1]
    assert found["tiles"] == ["b9  40.00 dB", f"{HOSTILE[0]}  20.00 dB"]
    assert found["captions"][1] == ["b10", "30.00 dB", "SSIM 0.5000", "lpips 0.2500"]
    assert found["captions"][-1] == ["HR", "ground truth"]


def test_zoom_keeps_the_pixel_under_the_pointer_and_dragging_moves_the_image(in_browser):
    found, _ = in_browser
    (left, top, width), (zoomed_left, zoomed_top, zoomed_width) = found["wheel"]
    assert width == 50
    assert (zoomed_left, zoomed_top, zoomed_width) == pytest.approx((left, top, 50 * 1.0015**400), abs=1.1)
    assert found["panned"] == pytest.approx([zoomed_left + 30, zoomed_top + 20, zoomed_width], abs=1.1)
    assert found["resized"] == [found["panned"], found["fit"]]
    assert found["fit"][2] % 50 == 0 and found["fit"][2] > 300  # a whole number of pixels for one
    assert found["frame"] == pytest.approx([25 - 21, 20 - 21], abs=1.5)


def test_the_browser_shows_the_pixels_and_the_errors(in_browser):
    found, results = in_browser
    for index, (width, height) in enumerate([(50, 40), (60, 33)]):
        assert found["pixel"][index] == [width, height, *results[index, HOSTILE[0]][5, 3], 255]
    assert found["image"].startswith("set x2: image 1, 60 \u00d7 33 pixels")
    assert found["errors"] == ["brightness(8)", "true"] and found["plain"] == "none"
