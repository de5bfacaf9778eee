"""Tests of the explorer: what the page holds is what sampling did, and the page works in a browser.

python -m pytest lesson/test_explorer.py     # half a minute; the browser's part needs selenium, chromium, chromedriver
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import explorer

import sample as tools

# isort: split
import numpy as np
import pytest
import torch
from PIL import Image

import diffratio_mod as method

STEPS, GUIDANCE, SEED = 5, 2.0, 3
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


def records_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def unpack(model: dict, table: dict) -> tuple[np.ndarray, np.ndarray]:
    """Processed (B, T, L, N) and scores in hundredths (B, L, N, T), bit by bit as the page does."""
    B, T, L, N = len(model["prompts"]), len(model["levels"]), model["depth"], tokens_of(model)
    bits, scores = (zlib.decompress(base64.b64decode(table[name])) for name in ("bits", "scores"))
    processed = [bits[i // 8] >> (7 - i % 8) & 1 for i in range(B * T * L * N)]
    values = [0] * len(scores)
    for i, byte in enumerate(scores):
        values[i] = byte if i % T == 0 else (values[i - 1] + byte) % 256
    return np.reshape(processed, (B, T, L, N)), np.reshape(values, (B, L, N, T))


def tokens_of(model: dict) -> int:
    return (model["image_size"] // model["patch_size"]) ** 2


def tile(model: dict, sheet: str, step: int, prompt: int) -> np.ndarray:
    S = model["image_size"]
    image = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheet))), dtype=float)
    return image[prompt * S : (prompt + 1) * S, step * S : (step + 1) * S]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small random model with waking routers, its page, and the records in it."""
    folder = tmp_path_factory.mktemp("explorer")
    words = ("a", "photo", "of", "cat", "dog")
    config = method.Config(words, 16, 4, dim=16, depth=3, heads=2, regions=4)
    model, rng = method.DiT(config).eval(), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data = (1.0 if "router" in name else 0.3) * torch.randn(parameter.shape, generator=rng)
    model.ratios.data = torch.rand(3, 4, generator=rng) * 0.9
    prompts = ["a photo of a cat", "a photo of a dog", "a photo of a cat"]
    checkpoint = {"config": asdict(config), "prompts": prompts, "ema": model.state_dict()}
    torch.save(checkpoint, folder / "small.pt")
    command = [sys.executable, HERE / "explorer.py", folder / "small.pt", "--out", folder / "page.html"]
    options = ["--steps", STEPS, "--guidance", GUIDANCE, "--seed", SEED, "--prompts", 2]
    subprocess.run([str(part) for part in command + options], check=True)
    return model, records_of((folder / "page.html").read_text(encoding="utf-8")), folder


# --- The records ---------------------------------------------------------------------------------------------------------


def test_records_are_what_a_sampling_run_does(small):
    model, data, _ = small
    page, N = data["models"][0], 16
    prompts = ["a photo of a cat", "a photo of a dog"]
    assert [prompt["text"] for prompt in page["prompts"]] == prompts and page["name"] == "Photographs"
    levels = torch.linspace(1, 0, STEPS + 1)[:-1]
    assert page["levels"] == pytest.approx(levels.tolist(), abs=1e-4)
    assert page["columns"] == method.column_of(levels, 4).tolist() == [3, 3, 2, 1, 0]
    noise = [torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(SEED * 1_000_003 + i)) for i in range(2)]
    learned = model.ratios.detach()
    tables = {"learned": learned, "uniform": learned.mean().expand(3, 4), "reversed": learned[:, [3, 2, 1, 0]]}
    tables["dense"] = torch.zeros(3, 4)
    for table in page["tables"]:
        if table["name"] == "random tokens":
            continue
        ratios, inputs, entered, guesses = tables[table["name"]], [], [], []
        hooks = [layer.register_forward_pre_hook(lambda _, z, into=inputs: into.append(z[0])) for layer in model.layers]
        hooks.append(model.register_forward_pre_hook(lambda _, z, into=entered: into.append(z[0])))
        words = tools.encode(model.config, prompts)
        hook = lambda t, x0, into=guesses: into.append(x0)
        method.sample(model, words, torch.stack(noise), STEPS, GUIDANCE, ratios=ratios, hook=hook)
        for handle in hooks:
            handle.remove()
        processed, scores = unpack(page, table)
        assert np.allclose(table["ratios"], ratios, atol=1e-4)
        for step in range(STEPS):
            for layer in range(3):
                k = max(1, round(N * (1 - float(ratios[layer, page["columns"][step]]))))
                assert table["k"][step][layer] == k
                z = inputs[step * 3 + layer][:2]  # of the conditional half
                router = model.layers[layer].router
                score = torch.sigmoid(z @ router.weight[0] + router.bias).detach()
                for b in range(2):
                    best = set(score[b].topk(k).indices.tolist())
                    assert set(np.flatnonzero(processed[b, step, layer])) == best
                    assert np.abs(scores[b, layer, :, step] - 100 * score[b].numpy()).max() <= 0.51
            for b in range(2):
                for sheet, images in (("noisy", entered), ("guess", guesses)):
                    image = (images[step][b].permute(1, 2, 0).numpy() + 1) * 127.5
                    alike = np.corrcoef(tile(page, table[sheet], step, b).ravel(), image.clip(0, 255).ravel())[0, 1]
                    assert alike > 0.9, "JPEG blurs, but this is another image"
        total = tools.sampling_flops(model.config, ratios, STEPS, GUIDANCE)
        assert page["captionFlops"] + sum(table["flops"]) == total


def test_tokens_drawn_by_chance_have_the_learned_k_but_not_the_routers_choice(small):
    _, data, _ = small
    page = data["models"][0]
    learned, _, _, drawn, _ = page["tables"]
    assert drawn["name"] == "random tokens" and drawn["chance"] and not learned["chance"]
    assert (drawn["k"], drawn["flops"], drawn["ratios"]) == (learned["k"], learned["flops"], learned["ratios"])
    ours, theirs = (unpack(page, table)[0] for table in (learned, drawn))
    assert (ours.sum(axis=3) == theirs.sum(axis=3)).all() and 0.1 < (ours != theirs).mean() < 0.9
    k = np.array(page["tables"][3]["k"])
    step, layer = np.argwhere((k > 2) & (k < 14))[0]
    assert (theirs[0, step, layer] != theirs[1, step, layer]).any(), "each image draws its own"
    first = [tile(page, table["noisy"], 0, 0) for table in page["tables"]]
    assert all((image == first[0]).all() for image in first), "all tables start from the same noise"


def test_what_is_wrong_is_one_line_and_leaves_the_old_page(small, monkeypatch, capsys):
    _, _, folder = small
    page, dense = folder / "page.html", folder / "dense.pt"
    before, checkpoint = page.read_bytes(), torch.load(folder / "small.pt")
    learned = checkpoint["ema"]["ratios"]
    checkpoint["config"]["mode"], checkpoint["ema"]["ratios"] = "dense", learned[:, :1]
    torch.save(checkpoint, dense)

    def complaint(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["explorer.py", *map(str, arguments), "--out", str(page)])
        with pytest.raises(SystemExit) as stopped:
            tools.run_command(explorer.main)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
        return error

    assert "dense.pt is a dense model" in complaint(dense)
    assert "missing.pt" in complaint(folder / "missing.pt")
    assert "--steps" in complaint("--steps", "1")
    monkeypatch.setattr(explorer, "LARGEST", 10_000)
    assert "at most 0.01" in complaint(folder / "small.pt", "--steps", 2, "--prompts", 1)
    assert page.read_bytes() == before


def test_the_page_in_the_repository_is_of_the_shipped_models_and_the_present_template():
    page, template = (HERE / name for name in ("explorer.html", "explorer_template.html"))
    text, data = page.read_text(encoding="utf-8"), records_of(page.read_text(encoding="utf-8"))
    frame = template.read_text(encoding="utf-8").split(explorer.PLACE)
    assert text.startswith(frame[0]) and text.endswith(frame[1]), "run lesson/explorer.py again"
    assert len(text.encode()) < 3_000_000 and not re.search(r"(https?:)?//\w+\.\w", frame[0] + frame[1])
    for model, path in zip(data["models"], explorer.SHIPPED, strict=True):
        shipped, _ = tools.read_checkpoint(path)
        assert model["file"] == path.name and model["depth"] == shipped.config.depth
        assert np.allclose(model["tables"][0]["ratios"], shipped.ratios.detach(), atol=1e-4), "run it again"
    model, pairs = data["models"][0], {}
    for prompt in model["prompts"]:
        words = prompt["text"].split()
        pairs.setdefault(prompt["kind"], set()).update(zip(words[1::5], words[2::5]))
        if len(words) == 8 or "of" in words:
            pairs[prompt["kind"]].add((words[-2], words[-1]))
    held_out = set(explorer.HELD_OUT)
    assert not pairs["seen"] & held_out and pairs["held out"] & held_out


# --- The page in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    if not BROWSER or not DRIVER:
        pytest.skip("no chromium or no chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    flags = "headless no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
    for flag in [*flags.split(), "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(chromium):
    """The page, freshly loaded at 1280 x 900 in light; after the test the console must be empty."""
    look(chromium, 1280)
    chromium.get((HERE / "explorer.html").as_uri())
    wait(chromium, "return !!view[0].pictures && document.getElementById('clock').textContent !== ''")
    yield chromium
    assert chromium.get_log("browser") == []


def look(driver, width: int, dark: bool = False, calm: bool = False) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wanted = {"color-scheme": "dark" if dark else "light", "reduced-motion": "reduce" if calm else "no-preference"}
    features = [{"name": f"prefers-{name}", "value": value} for name, value in wanted.items()]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def wait(driver, condition: str) -> None:
    end = time.monotonic() + 20
    while not driver.execute_script(condition):
        assert time.monotonic() < end, condition
        time.sleep(0.05)


def choose(driver, select: str, value: str) -> None:
    """As a user's choice; returns when the page shows it."""
    change = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change'))"
    driver.execute_script(change, driver.find_element("id", select), value)
    wanted = "return `${state.model} ${state.tables}` === render.built && document.getElementById('prompt').value === "
    wait(driver, wanted + "`${state.model} ${state.prompt}`")


def text(driver, selector: str) -> str:
    return driver.find_element("css selector", selector).text


def pixels(driver, selector: str) -> str:
    return driver.execute_script(f"return document.querySelector('{selector}').toDataURL()")


def cells(driver, selector: str) -> list[np.ndarray]:
    """The inside of each token of a canvas, in order."""
    content = base64.b64decode(pixels(driver, selector).partition(",")[2])
    image, side = np.asarray(Image.open(io.BytesIO(content))), driver.execute_script("return model().side")
    size = len(image) // side
    return [
        image[y + 2 : y + size - 2, x + 2 : x + size - 2]
        for y in range(0, side * size, size)
        for x in range(0, side * size, size)
    ]


def press(element, *names: str) -> None:
    from selenium.webdriver.common.keys import Keys

    element.send_keys(*(getattr(Keys, name) for name in names))


def test_page_loads_from_its_file_alone_and_shows_the_records(page):
    assert (
        page.execute_script("return performance.getEntriesByType('resource').filter(e => !/^data:/.test(e.name))") == []
    )
    model = records_of((HERE / "explorer.html").read_text(encoding="utf-8"))["models"][0]
    processed, scores = unpack(model, model["tables"][0])
    page.execute_script("state.step = 7; state.prompt = 4; draw()")
    for i, sheet in enumerate(("noisy", "guess")):
        shown = np.array(
            [cell.mean(axis=(0, 1))[:3] for cell in cells(page, f"#image figure:nth-child({i + 1}) canvas")]
        )
        side, p = model["image_size"] // model["patch_size"], model["patch_size"]
        kept = (
            tile(model, model["tables"][0][sheet], 7, 4).reshape(side, p, side, p, 3).mean(axis=(1, 3)).reshape(-1, 3)
        )
        assert np.corrcoef(shown.ravel(), kept.ravel())[0, 1] > 0.98
    for layer in range(model["depth"]):
        seen = page.execute_script("return routing(tables()[0], arguments[0])", layer)
        assert seen["processed"] == processed[4, 7, layer].tolist()
        assert np.allclose(seen["score"], scores[4, layer, :, 7] / 100)
        assert (
            seen["k"] == sum(seen["processed"])
            and sum(seen["processed"][n] for n in seen["order"][: seen["k"]]) == seen["k"]
        )
        bypassed = f"{tokens_of(model) - seen['k']} of {tokens_of(model)} bypass"
        assert bypassed in text(page, f"#layers .pane figure:nth-child({layer + 1}) figcaption")
        bright = cells(page, f"#layers .pane figure:nth-child({layer + 1}) canvas")
        guess = cells(page, "#image .pane figure:nth-child(2) canvas")
        assert [bool((x == y).all()) for x, y in zip(bright, guess)] == [bool(z) for z in seen["processed"]]


def test_slider_and_play_change_pictures_layers_column_and_cost(page):
    watched = ["#image .pane figure:nth-child(1) canvas", "#image .pane figure:nth-child(2) canvas"]
    watched += ["#layers .pane figure:nth-child(4) canvas", "#close .scores canvas", "#close .bars canvas"]

    def state() -> list[str]:
        return [*(pixels(page, selector) for selector in watched), text(page, "#clock"), text(page, "#bill .cost")]

    before, slider = state(), page.find_element("id", "step")
    press(slider, *["ARROW_RIGHT"] * 6)
    after = state()
    assert all(old != new for old, new in zip(before, after)) and "step 12 of 20" in text(page, "#clock")
    assert (
        "column 0.4\u20130.5" in text(page, "#clock")
        and page.execute_script(
            "return [...document.querySelectorAll('.heat thead .now')].map(cell => cell.textContent)"
        )
        == [".4\u2013.5"] * 2
    )
    press(slider, "END")
    assert "step 20 of 20" in text(page, "#clock")
    page.find_element("id", "play").click()
    wait(page, "return state.step >= 2")
    assert text(page, "#play") == "Pause"
    page.find_element("id", "play").click()
    at = page.execute_script("return state.step")
    time.sleep(0.7)
    assert text(page, "#play") == "Play" and page.execute_script("return state.step") == at


def test_tables_and_prompts_change_images_and_cost(page):
    names = page.execute_script("return model().tables.map(table => table.name)")
    assert names == ["learned", "uniform", "reversed", "random tokens", "dense"]
    press(page.find_element("id", "step"), "END")
    images, costs = set(), {}
    for i, name in enumerate(names):
        choose(page, "table1", str(i))
        assert text(page, "#image .pane:last-child .tag") == f"B: {name}"
        images.add(pixels(page, "#image .pane:last-child figure:nth-child(2) canvas"))
        costs[name] = text(page, "#bill .pane:last-child .cost")
    assert len(images) == 5
    assert costs["learned"] == costs["reversed"] == costs["random tokens"] != costs["uniform"]
    data = records_of((HERE / "explorer.html").read_text(encoding="utf-8"))["models"][0]
    totals = [data["captionFlops"] + sum(table["flops"]) for table in data["tables"]]
    for name, total in zip(names, totals):  # at the last step: so far, and the whole image
        assert costs[name].count(f"{total / 1e9:.2f}") >= 2
        assert costs[name].count(f"{100 * (1 - total / totals[-1]):.0f} % saved") == 2
    choose(page, "table1", "3")
    assert "drawn by chance" in text(page, "#close .pane:last-child figcaption")
    assert "seen in training" in text(page, "#kind")
    choose(page, "prompt", "0 3")
    assert "ever trained on" in text(page, "#kind")
    learned = pixels(page, "#image .pane figure:nth-child(2) canvas")
    choose(page, "prompt", "1 1")
    assert pixels(page, "#image .pane figure:nth-child(2) canvas") != learned and len(text(page, "#kind")) < 40
    groups = [group.get_attribute("label") for group in page.find_elements("css selector", "optgroup")]
    assert groups == ["Coloured shapes: pairs seen in training", "Coloured shapes: held-out pairs", "Photographs"]


def test_cell_of_the_table_is_reached_by_click_and_by_keyboard(page):
    cell = "#table .pane button[data-layer='%d'][data-column='%d']"
    page.find_element("css selector", cell % (4, 2)).click()
    assert "t = 0.30" in text(page, "#clock") and text(page, "#h-close") == "Layer 5, up close"
    assert page.execute_script("return document.querySelectorAll('#layers .chosen').length") == 2
    button = page.find_element("css selector", cell % (4, 2))
    assert button.get_attribute("tabindex") == "0" and button.get_attribute("aria-current") == "true"
    press(button, "ARROW_UP", "ARROW_LEFT", "ARROW_LEFT")  # only moves the focus; noise is on the left
    assert "t = 0.30" in text(page, "#clock")
    press(page.switch_to.active_element, "ENTER")
    assert "t = 0.50" in text(page, "#clock") and text(page, "#h-close") == "Layer 4, up close"
    assert page.switch_to.active_element.get_attribute("aria-label") == button_label(page, 3, 4)


def button_label(driver, layer: int, c: int) -> str:
    ratio = driver.execute_script("return tables()[0].ratios[arguments[0]][arguments[1]].toFixed(2)", layer, c)
    return f"layer {layer + 1}, noise {c / 10:g} to {(c + 1) / 10:g}: ratio {ratio}"


def test_token_tells_its_score_to_pointer_and_keyboard(page):
    from selenium.webdriver import ActionChains

    maps = page.find_elements("css selector", "#layers .pane:nth-child(2) .map")
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", maps[4])
    ActionChains(page).move_to_element_with_offset(maps[4], 2, 2).perform()  # right of and below the middle
    side = page.execute_script("return model().side")
    n = side // 2 * side + side // 2
    seen = page.execute_script("return routing(tables()[0], 4)")
    assert page.execute_script("return [state.layer, state.token]") == [4, n]
    assert text(page, "#tip").startswith(
        f"layer 5, row {side // 2 + 1}, column {side // 2 + 1}: score {seen['score'][n]:.2f}"
    )
    assert f"rank {seen['order'].index(n) + 1} of {side**2}, k = {seen['k']}" in text(page, "#tip")
    assert ("goes through" if seen["processed"][n] else "bypasses") in text(page, "#token")
    press(maps[4], "ARROW_LEFT", "ARROW_DOWN", "PAGE_DOWN")
    assert page.execute_script("return [state.layer, state.token]") == [5, n - 1 + side]
    assert page.switch_to.active_element == maps[5] and "layer 6" in text(page, "#tip")
    press(maps[5], *["ARROW_RIGHT"] * 20)  # stays within the image
    assert page.execute_script("return state.token") == n // side * side + 2 * side - 1


def test_questions_unfold_and_set_the_page_up(page):
    choose(page, "prompt", "1 0")
    for number, names in (("1", "learned,dense"), ("2", "learned,reversed"), ("3", "random tokens,uniform")):
        details = page.find_element("id", f"q{number}")
        assert not details.find_element("tag name", "p").is_displayed()
        press(details.find_element("tag name", "summary"), "ENTER")
        assert details.find_element("tag name", "p").is_displayed() and len(details.text) > 200
        page.find_element("css selector", f"[data-show='{number}']").click()
        wait(
            page,
            f"return String(tables().map(table => table.name)) === '{names}' && render.built === '0 ' + state.tables",
        )
        assert page.execute_script("return state.model") == 0


def test_no_sideways_scrolling_on_a_phone_and_every_control_has_a_name(page):
    for width in (375, 320, 768, 1280):
        look(page, width)
        for prompt in ("0 0", "1 0"):
            choose(page, "prompt", prompt)
            assert page.execute_script("return document.documentElement.scrollWidth") <= width
    nodes = page.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    nodes = [node for node in nodes if not node["ignored"]]
    controls = ("button", "combobox", "slider", "application", "image")
    names = [(z["role"]["value"], z["name"]["value"]) for z in nodes if z.get("role", {}).get("value") in controls]
    assert len(names) > 150 and all(name for _, name in names), [role for role, name in names if not name]
    assert {"button", "slider", "application"} <= {role for role, _ in names}


def test_dark_and_calm_are_followed(page):
    colour = "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
    light = page.execute_script(colour)
    bars = pixels(page, "#close .bars canvas")
    look(page, 1280, dark=True, calm=True)
    dark = page.execute_script(colour)
    bright, dim = (sum(map(int, re.findall(r"\d+", colours[0]))) for colours in (light, dark))
    assert bright > 600 and dim < 150 and light[1] != dark[1]
    wait(page, f"return document.querySelector('#close .bars canvas').toDataURL() !== '{bars}'")
    assert page.execute_script("return getComputedStyle(document.querySelector('.bill i')).transitionDuration") == "0s"
