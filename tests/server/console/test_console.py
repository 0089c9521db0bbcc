"""The console in a real browser, against a real server."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from served import Served

from loadtests.upload import upload

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

KEY = "the-admin-key"
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
HOSTILE = "<img src=x onerror='document.title=1'>"


class Reader:
    """Somebody at the console."""

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self.url = url

    def open(self, tab: str = "") -> None:
        self.driver.get(f"{self.url}/console{tab}")

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def until(self, condition: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, 60, ignored_exceptions=(Exception,)).until(lambda _: condition())

    def press(self, selector: str) -> None:
        """Enter, at a button that may be drawn anew at any moment."""
        self.until(lambda: self.find(selector).send_keys(Keys.ENTER) is None)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    def log_in(self, key: str = KEY) -> None:
        self.until(lambda: self.find("#login").is_displayed())
        field = self.find("#login input[name=key]")
        field.send_keys(key, Keys.ENTER)

    @property
    def errors(self) -> list[Any]:
        """What the browser complains of; that the server refused something is no fault of the page."""
        severe = [entry for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return [entry for entry in severe if not re.search(r"status of (401|403|404) ", entry["message"])]


@pytest.fixture(scope="module")
def served(served_model: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("adapters-to-serve")
    shutil.copytree(adapters["all4"], folder / "all4")
    data = tmp_path_factory.mktemp("data")
    served = Served(served_model, data, "--adapters", str(folder), "--admin-key", KEY, "--engines", "2", key=KEY)
    yield served
    assert served.stop() == 0


@pytest.fixture
def reader(served: Served, tmp_path: Path) -> Iterator[Reader]:
    if shutil.which("chromedriver") is None:
        pytest.fail("chromedriver is missing: run `make tools` first, as `make test-slow` does")
    options = webdriver.ChromeOptions()
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", *QUIET):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(120)
    try:
        reader = Reader(driver, served.url)
        yield reader
        assert reader.errors == []
    finally:
        driver.quit()


def test_a_wrong_key_is_refused_and_the_right_one_shows_what_the_server_does(reader: Reader, served: Served) -> None:
    reader.open()
    reader.log_in("wrong")
    reader.until(lambda: "does not know this key" in reader.text("#login-error"))
    reader.log_in()
    reader.until(lambda: "2 engines, cpu, float32" in reader.text("#server"))
    lines = reader.text("#meters").splitlines()
    assert [line for line in lines if line.startswith("Engine ")] == [
        "Engine 0 0 running, 0 waiting",
        "Engine 1 0 running, 0 waiting",
    ]
    with served.client() as client:
        body = {"model": "all4", "prompt": "ab", "max_tokens": 5, "ignore_eos": True}
        client.post("/v1/completions", json=body).raise_for_status()
    # Its first token is told before it has ended, so that an earlier reading shows the request as not yet counted.
    reader.until(lambda: re.search(r"^all4 1 5 ", reader.text("#by-adapter"), re.MULTILINE))
    assert "blocks" in reader.text("#meters")
    reader.find("#leave").click()
    reader.until(lambda: reader.find("#login").is_displayed())
    assert reader.driver.execute_script("return sessionStorage.length") == 0


def test_an_adapter_is_registered_pinned_and_deleted_by_keyboard(
    reader: Reader, served: Served, adapters: dict[str, Path]
) -> None:
    reader.open("#adapters")
    reader.log_in()
    reader.until(lambda: "all4" in reader.text("#adapter-table"))
    reader.find("#register summary").send_keys(Keys.ENTER)
    reader.find("#register input[name=name]").send_keys("qv16")
    for part, file in (("config", "adapter_config.json"), ("weights", "adapter_model.safetensors")):
        reader.find(f"#register input[name={part}]").send_keys(str(adapters["qv16"] / file))
    reader.find("#register input[name=description]").send_keys(HOSTILE)
    reader.find("#register button").send_keys(Keys.ENTER)
    reader.until(lambda: "qv16 is registered: rank 16" in reader.text("#notice"))
    reader.press("[aria-label='Pin qv16']")
    reader.until(lambda: reader.driver.switch_to.active_element.get_attribute("aria-label") == "Unpin qv16")
    with served.client() as client:
        shown = client.get("/admin/v1/adapters/qv16").json()
        assert (shown["pinned"], shown["description"]) == (True, HOSTILE)
        reader.find("#filter").send_keys("onerror")
        reader.until(lambda: "all4" not in reader.text("#adapter-table"))
        reader.press("[aria-label='Delete qv16']")
        assert reader.driver.switch_to.active_element.text == "Keep"
        reader.driver.switch_to.active_element.send_keys(Keys.ENTER)
        reader.until(lambda: not reader.find("#confirm").is_displayed())
        assert client.get("/admin/v1/adapters/qv16").status_code == 200
        reader.press("[aria-label='Delete qv16']")
        reader.driver.switch_to.active_element.send_keys(Keys.TAB)
        reader.driver.switch_to.active_element.send_keys(Keys.ENTER)
        reader.until(lambda: "qv16 is deleted" in reader.text("#notice"))
        assert client.get("/admin/v1/adapters/qv16").status_code == 404
    assert reader.driver.title.startswith("Adapters")


def test_what_is_kept_stays_whatever_is_answered_next(
    reader: Reader, served: Served, adapters: dict[str, Path]
) -> None:
    with served.client() as client:
        for name in ("kept", "gone"):
            upload(client, name, adapters["wide24"])
        reader.open("#adapters")
        reader.log_in()
        reader.until(lambda: "kept" in reader.text("#adapter-table"))
        reader.driver.execute_script(
            """for (const [name, answer] of [["kept", "no"], ["gone", "yes"]]) {
              document.querySelector(`[aria-label="Delete ${name}"]`).click();
              document.querySelector(`#confirm button[value=${answer}]`).click();
            }"""
        )
        reader.until(lambda: "gone is deleted" in reader.text("#notice"))
        assert client.get("/admin/v1/adapters/kept").status_code == 200
        reader.press("[aria-label='Delete kept']")
        reader.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
        reader.until(lambda: not reader.find("#confirm").is_displayed())
        assert client.get("/admin/v1/adapters/kept").status_code == 200


def test_the_playground_streams_an_answer_and_shows_its_route(reader: Reader) -> None:
    reader.open("#playground")
    reader.log_in()
    reader.until(lambda: reader.find("[name=model]").get_attribute("value") == "tiny")
    model = reader.find("[name=model]")
    model.clear()
    model.send_keys("all4")
    reader.find("[name=max_tokens]").clear()
    reader.find("[name=max_tokens]").send_keys("12")
    reader.find("[name=prompt]").send_keys(HOSTILE, Keys.CONTROL, Keys.ENTER)
    reader.until(lambda: "pieces in" in reader.text("#timing"))
    assert reader.text("#route td") == "all4"
    assert "Named in the request" in reader.text("#route")
    assert reader.find("#stop").get_attribute("disabled") == "true"
    model.clear()
    model.send_keys("nothing", Keys.CONTROL, Keys.ENTER)
    reader.until(lambda: "'nothing'" in reader.text("#notice"))


def test_a_tenants_key_sees_its_own(reader: Reader, served: Served) -> None:
    with served.client() as client:
        client.post("/admin/v1/tenants", json={"id": "acme", "quotas": {"concurrency": 7}}).raise_for_status()
        key = client.post("/admin/v1/tenants/acme/keys", json={"label": "console"}).raise_for_status().json()["key"]
    reader.open("#tenants")
    reader.log_in()
    reader.until(lambda: "acme" in reader.text("#tenant-table"))
    row = next(line for line in reader.text("#tenant-table").splitlines() if line.startswith("acme"))
    assert row.split()[1:5] == ["1", "unlimited", "unlimited", "7"]
    reader.find("#leave").click()
    reader.log_in(key)
    reader.until(lambda: "No adapter is registered yet" in reader.text("#adapter-table"))
    assert [link.text for link in reader.driver.find_elements(By.CSS_SELECTOR, "nav a") if link.is_displayed()] == [
        "Adapters",
        "Playground",
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_at_phone_width_in_light_and_dark(scheme: str, reader: Reader) -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    reader.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    reader.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    reader.open()
    reader.log_in()
    reader.until(lambda: reader.find(".card").is_displayed())
    for tab in ("overview", "adapters", "tenants", "playground"):
        reader.open(f"#{tab}")
        reader.until(lambda tab=tab: reader.find(f"#{tab}").is_displayed())
        assert reader.driver.execute_script("return document.documentElement.scrollWidth") == 390
        reader.until(lambda: reader.driver.execute_script("return scrollY") == 0)  # with the header in sight
    leave = reader.find("#leave").rect
    assert leave["y"] < reader.find("nav").rect["y"]
    assert leave["x"] + leave["width"] <= 390
    ground = reader.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    on_colour = """const mark = document.createElement("mark"); mark.className = "c0"; document.body.append(mark);
        return getComputedStyle(mark).color === getComputedStyle(document.body).color;"""
    assert reader.driver.execute_script(on_colour)
    assert (sum(map(int, ground.removeprefix("rgb(").removesuffix(")").split(","))) > 380) == (scheme == "light")


def test_metrics_are_read_as_prometheus_reads_them(reader: Reader, served: Served) -> None:
    text = served.get("/metrics").text + 'odd{name="a\\"b\\\\c\\nd",more="{}"} +Inf\n'
    expected = [
        [sample.name, sample.labels, str(sample.value)]
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    ]
    reader.open()
    found = reader.driver.execute_async_script(
        """const [text, done] = arguments;
        import("/console/metrics.js").then(({ parse }) => done(JSON.stringify([...parse(text)].flatMap(
          ([name, samples]) => samples.map(({ labels, value }) => [name, labels, String(value)])))));""",
        text,
    )
    read = {(name, json.dumps(labels, sort_keys=True)): value for name, labels, value in json.loads(found)}
    assert len(read) == len(expected)
    for name, labels, value in expected:
        assert float(read[name, json.dumps(labels, sort_keys=True)].replace("Infinity", "inf")) == float(value)


def test_quantiles_interpolate_within_buckets_of_what_is_new(reader: Reader) -> None:
    def reading(*counts: int) -> str:
        bounds = ("0.1", "0.2", "0.4", "+Inf")
        return "".join(f'h_bucket{{a="x",le="{bound}"}} {n}\n' for bound, n in zip(bounds, counts, strict=True))

    reader.open()
    found = reader.driver.execute_async_script(
        """const [before, after, done] = arguments;
        import("/console/metrics.js").then(({ parse, quantile }) => {
          const [old, now] = [parse(before), parse(after)];
          done([quantile(now, null, "h", 0.5), quantile(now, old, "h", 0.5), quantile(now, old, "h", 0.99),
                quantile(old, old, "h", 0.5), quantile(now, null, "h", 0.5, { a: "y" })]);
        });""",
        reading(10, 10, 10, 10),
        reading(10, 14, 20, 22),
    )
    # 22 values: the 11th is a quarter into (0.1, 0.2]; of the 12 new ones the 6th is a third into (0.2, 0.4]
    assert found == pytest.approx([0.125, 0.2 + 0.2 / 3, 0.4, None, None])
