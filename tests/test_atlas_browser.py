"""The atlas in a real browser: clicked through, on a desk and on a phone, without a server."""

import dataclasses
import itertools
import time

import pytest

from clipattr.report.atlas import ClassEntry, Label, Reliance, UnexpectedEntry, write_site
from tests import atlas_sites as small
from tests.browser import Watched, open_browser

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("atlas")
    small.write(path)
    small.write_thumbnails(path)
    return path


@pytest.fixture
def watched(browser, folder):
    missing = f"{small.MISSING_IMAGE}.jpg"
    page = Watched(browser, folder, missing, viewport={"width": 1280, "height": 900})
    yield page
    page.context.close()


def latent_column(page) -> list[str]:
    """The first cells of the rows of the table of latents that are elements now."""
    return page.locator("#latent-table tbody tr:not(.space) th").all_inner_texts()


def outlier(page, figure: str, color: str) -> dict[str, float]:
    """The middle of the pixels of a colour on a canvas, in pixels of the element."""
    return page.evaluate(
        """([figure, role]) => {
            const canvas = document.querySelector(`${figure} canvas`);
            const probe = document.body.appendChild(document.createElement("i"));
            probe.style.color = `var(--${role})`;
            const wanted = getComputedStyle(probe).color.match(/\\d+/g).map(Number);
            const { width, height } = canvas;
            const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
            let [x, y, count] = [0, 0, 0];
            for (let index = 0; index < data.length; index += 4) {
                const differs = (value, each) => Math.abs(value - data[index + each]) > 6;
                if (data[index + 3] < 128 || wanted.some(differs)) continue;
                x += (index / 4) % width;
                y += Math.floor(index / 4 / width);
                count += 1;
            }
            return { x: x / count, y: y / count };
        }""",
        [figure, color],
    )


def test_click_through(watched):
    page = watched.open("index.html", "index")
    assert page.locator("h1").inner_text() == "Atlas <of> latents"
    # The lone unexpected point of the scatter leads to its latent, and names it under the pointer.
    canvas = page.locator("#pairs-plot canvas")
    place = outlier(page, "#pairs-plot", "outlier")
    canvas.hover(position=place)
    assert "word57 #57" in page.locator("#pairs-plot .tip").inner_text()
    canvas.click(position=place)
    watched.ready("#57")
    assert page.locator("h1").inner_text() == "word57 #57"
    assert page.title() == "word57 #57 \u00b7 Atlas <of> latents"
    # On to a class that relies on it, from there to another latent, and back all the way.
    page.get_by_role("link", name="class name 4").first.click()
    watched.ready("#4")
    assert page.locator("h1").inner_text() == "class name 4"
    assert page.locator("#unexpected > li").count() == 3
    page.locator("#others > li").first.get_by_role("link").first.click()
    watched.ready("#50")
    page.go_back()
    watched.ready("#4")
    page.go_back()
    watched.ready("#57")
    page.go_back()
    watched.ready("index")
    watched.check()


def test_sort_and_search_the_latents(watched):
    page = watched.open("index.html", "index")
    table = page.locator("#latent-table")
    table.get_by_role("button", name="frequency").click()
    expected = sorted(range(small.N_LATENTS), key=small.frequency, reverse=True)
    names = [
        f"word{latent} #{latent}" if latent % 50 != 49 else f"latent #{latent}"
        for latent in expected
    ]
    found = latent_column(page)
    assert 12 < len(found) < 60  # a window of the rows, not all of them
    assert found[:12] == names[:12]
    assert table.locator("th[aria-sort=descending]").inner_text().startswith("frequency")
    table.locator(".window").evaluate("each => { each.scrollTop = each.scrollHeight; }")
    page.wait_for_function(
        "name => document.querySelector('#latent-table').innerText.includes(name)", arg=names[-1]
    )
    assert latent_column(page)[-1] == names[-1]
    # Dead latents have no clarity: they are last in both directions.
    for _ in range(2):
        table.get_by_role("button", name="clarity").click()
        assert not any(name.startswith("latent #") for name in latent_column(page)[:12])
    page.locator("#search-latent").fill("word12")
    assert page.locator("#latent-count").inner_text() == "11 of 250 latents"
    page.locator("#search-latent").fill("#24")
    assert set(latent_column(page)) == {
        f"word{latent} #{latent}" if latent != 249 else "latent #249"
        for latent in (24, *range(240, 250))
    }
    watched.check()


def test_filters_of_the_ranked_list_survive_the_back_button(watched):
    page = watched.open("index.html", "index")
    rows = page.locator("#ranked > li")
    assert rows.count() == 20
    page.get_by_role("button", name="Show 20 more of 55").click()
    assert rows.count() == 40
    page.locator("#filter-kind").select_option("typography")
    page.locator("#filter-class").select_option(label="class name 9")
    expected = [
        each
        for each in small.unexpected()
        if each.class_number == 9 and each.pair.kind == "typography"
    ]
    assert page.locator("#ranked-count").inner_text() == f"{len(expected)} of 75 pairs"
    assert rows.count() == len(expected) == 1
    assert "evidence 0.245" in " ".join(rows.first.inner_text().split())
    page.get_by_role(
        "link", name="Latents", exact=True
    ).click()  # an entry of its own in the history
    rows.first.get_by_role("link", name="side by side").click()
    watched.ready(f"#{expected[0].pair.latent},{small.HOSTILE_LATENT}")
    assert page.locator("article").count() == 2
    page.go_back()
    watched.ready("index")
    assert page.locator("#filter-kind").input_value() == "typography"
    assert rows.count() == 1
    page.locator("#filter-text").fill("no such words")
    assert page.locator("#ranked-count").inner_text() == "0 of 75 pairs"
    assert page.locator("#no-ranked").is_visible()
    watched.check()


def test_classes_and_map(watched):
    page = watched.open("index.html", "index")
    page.locator("#search-class").fill("name 17")
    assert page.locator("#class-table tbody tr:not(.space)").all_inner_texts() == [
        "class name 17\t30\t3\t0.241"
    ]
    lead = page.locator("#map .lead").inner_text()
    assert "3.1 % and 2.5 % of the variance" in lead
    page.locator("#map-colour").select_option(label="frequency")
    assert page.locator("#map-legend").inner_text().split()[:2] == ["from", "0"]
    # The grid of the map: latent 0 lies in a lower corner, latent 15 in the other.
    box = page.locator("#map-plot canvas").bounding_box()
    inner = (box["width"] - 16) / 1.1
    x = 8 + 0.05 * inner
    y = 8 + (box["height"] - 16) * (1 - 0.05 / 1.1)
    page.locator("#map-plot canvas").click(position={"x": x, "y": y})
    watched.ready("#0")
    watched.check()


def test_a_latent_named_like_its_class_is_shown_by_its_reason(browser, tmp_path):
    names = ["Star  fish", "boat"]
    words = {0: "star  fish", 1: "fish"}
    entries = [
        dataclasses.replace(
            small.latent_entry(latent), labels=[Label(words[latent], 0.3)], reliance=[]
        )
        for latent in words
    ]
    pairs = [
        small.pair(0, 2)._replace(latent=latent, reasons=[f"why {latent}", "and so"])
        for latent in words
    ]
    content = dataclasses.replace(
        small.overview(),
        class_names=names,
        points=[],
        unexpected=[UnexpectedEntry(0, pair) for pair in pairs],
    )
    write_site(tmp_path, content, entries, [ClassEntry(0, pairs), ClassEntry(1, [])])
    small.write_thumbnails(tmp_path)
    watched = Watched(browser, tmp_path)
    page = watched.open("index.html", "index")
    rows = [" ".join(text.split()) for text in page.locator("#ranked > li").all_inner_texts()]
    assert rows[0].startswith("Star fish and latent #0")
    assert rows[1].startswith("Star fish relies on fish #1")
    assert page.locator("#ranked .reason").all_inner_texts() == ["why 0"]
    assert page.locator("#ranked .reasons li").all_inner_texts() == ["and so", "why 1", "and so"]
    page = watched.open("class.html#0", "#0")
    assert page.locator("#unexpected .pair-head a").all_inner_texts() == ["latent #0", "fish #1"]
    assert page.locator("#unexpected .reason").all_inner_texts() == ["why 0"]
    watched.context.close()


def test_a_class_says_how_many_are_left_out_and_over_which_images(watched):
    page = watched.open("class.html#5", "#5")
    assert "1,234 more" in page.locator("#left-out").inner_text()
    assert page.locator("#unexpected-count").inner_text() == "(3 of 1,237)"
    assert "over all images" in page.locator("#class").inner_text()
    page = watched.open("class.html#6", "#6")
    assert not page.locator("#left-out").is_visible()
    assert page.locator("#unexpected-count").inner_text() == "(3)"
    assert page.locator("#others-count").inner_text() == "(27)"
    watched.check()


def test_classes_that_a_latent_raises_and_lowers(browser, tmp_path):
    values = {4: 0.2, 2: 0.1, 7: -0.5, 6: -0.3}
    reliance = [Reliance(number, value, 0.5, 0.75, 0.1) for number, value in values.items()]
    entries = [
        dataclasses.replace(small.latent_entry(0), reliance=reliance),
        dataclasses.replace(small.latent_entry(1), reliance=reliance[:2]),
    ]
    content = dataclasses.replace(small.overview(), points=[], unexpected=[])
    classes = [ClassEntry(number, []) for number in range(small.N_CLASSES)]
    write_site(tmp_path, content, entries, classes)
    small.write_thumbnails(tmp_path)
    watched = Watched(browser, tmp_path)
    page = watched.open("latent.html#0", "#0")
    for title, numbers in (("raises", [4, 2]), ("lowers", [7, 6])):
        table = page.get_by_role("region", name=f"Classes that it {title} most")
        names = [f"class name {number}" for number in numbers]
        assert table.locator("tbody th a").all_inner_texts() == names
    page = watched.open("latent.html#1", "#1")
    assert page.get_by_role("region", name="Classes that it lowers most").count() == 0
    # Nothing is on the ranked list: the page says why.
    page = watched.open("index.html", "index")
    assert page.locator("#no-ranked").inner_text() == "Nothing is above chance."
    assert not page.locator("#filter-text").is_visible()
    watched.check()
    watched.context.close()


def test_words_of_the_data_stay_words(watched):
    page = watched.open("index.html", "index")
    assert small.HOSTILE.split()[0] in page.locator(".summary").inner_text()
    hostile = " ".join(small.HOSTILE.split())
    for name, ready in (("index.html", "index"), ("latent.html#7", "#7"), ("class.html#3", "#3")):
        watched.open(name, ready)
        assert hostile in " ".join(page.locator("main").inner_text().split())
    assert page.evaluate("window.hacked") is None
    assert all(url.rpartition("/")[2] != "x" for url in watched.requests)


def test_heatmaps_and_missing_pictures(watched):
    page = watched.open("latent.html#7", "#7")
    heat = page.locator("canvas.heat").first
    drawn = heat.evaluate(
        "each => Array.from(each.getContext('2d').getImageData(0, 0, each.width, each.height).data)"
    )
    flat = [value for row in small.HEAT for value in row]
    assert drawn[3::4] == pytest.approx([0.8 * value for value in flat], abs=0.6)
    assert heat.evaluate("each => [each.width, each.height]") == [3, 2]
    # A thumbnail that is not square shows its middle, which is what the model saw.
    fit = page.locator("figure img").first.evaluate("each => getComputedStyle(each).objectFit")
    assert fit == "cover"
    page.get_by_label("heatmaps").uncheck()
    assert not heat.is_visible()
    missing = page.locator("figure", has_text=f"image {small.MISSING_IMAGE}").first
    page.wait_for_function("document.querySelectorAll('.no-picture').length === 2")
    assert missing.locator("img").count() == 0
    assert missing.locator(".tile").bounding_box()["width"] == 112
    watched.check()


def test_neighbours_and_wrong_addresses(watched):
    page = watched.open("latent.html#100", "#100")
    page.keyboard.press("ArrowLeft")  # latent 99 stands in another file
    watched.ready("#99")
    assert "dead" in page.locator("article").inner_text()
    page.get_by_role("link", name="next").click()
    watched.ready("#100")
    page.locator("#go").fill("249")
    page.locator("#go").press("Enter")
    watched.ready("#249")
    assert page.locator("#next").get_attribute("href") is None
    page.goto(page.url.replace("#249", "#250"))
    page.wait_for_function(
        "document.querySelector('#status').textContent.includes('from 0 to 249')"
    )
    assert page.locator("article").count() == 0
    page.goto(page.url.replace("#250", "#words"))
    page.wait_for_function(
        "document.querySelector('#status').textContent.includes('Add the number')"
    )
    watched.check()


def test_a_data_file_that_is_gone_is_said(browser, tmp_path):
    small.write(tmp_path)
    (tmp_path / "data" / "latents-1.js").unlink()
    watched = Watched(browser, tmp_path)
    watched.page.goto(f"{tmp_path.as_uri()}/latent.html#120")
    watched.page.wait_for_function(
        "document.querySelector('#status').textContent.includes('data/latents-1.js is missing')"
    )
    watched.context.close()


def test_the_policy_refuses_markup_inline_scripts_and_servers(watched):
    page = watched.open("index.html", "index")
    refused = page.evaluate(
        """async () => {
            const fails = [];
            try { document.body.innerHTML = "<b>x</b>"; } catch { fails.push("markup"); }
            const script = document.createElement("script");
            try { script.src = "https://example.org/x.js"; } catch { fails.push("script"); }
            try { await fetch("https://example.org/"); } catch { fails.push("fetch"); }
            try { atlas.policy.createScriptURL("../x.js"); } catch { fails.push("address"); }
            return fails;
        }"""
    )
    assert refused == ["markup", "script", "fetch", "address"]
    assert not any(url.startswith("http") for url in watched.requests)


NUMBERS = {
    "0": "0",
    "12345": "12,345",
    "0.0123456": "0.0123",
    "-0.5": "\u22120.500",
    "2e-7": "2.00e\u22127",
    "1234.5": "1235",
    "null": "\u2013",
}


def test_numbers_and_ticks(watched):
    page = watched.open("class.html#0", "#0")
    for value, text in NUMBERS.items():
        assert page.evaluate(f"atlas.number({value})") == text
    for low, high, wanted in ((0, 1, 5), (-0.37, 0.412, 4), (1e-6, 3e-6, 7), (-120, 8000, 6.3)):
        ticks = page.evaluate(f"atlas.ticks({low}, {high}, {wanted})")
        assert 2 <= len(ticks) <= wanted + 1
        assert low <= min(ticks) + 1e-12
        assert max(ticks) <= high * (1 + 1e-9)
        steps = {f"{after - before:.6g}" for before, after in itertools.pairwise(ticks)}
        assert len(steps) == 1
        assert steps.pop().strip("0.").partition("e")[0] in {"1", "2", "5"}


@pytest.mark.slow
def test_thirty_thousand_latents_open_in_two_seconds(browser, tmp_path):
    n_latents, entry = 30_000, small.latent_entry(8)
    latents = (dataclasses.replace(entry, latent=latent) for latent in range(n_latents))
    classes = (small.class_entry(number) for number in range(small.N_CLASSES))
    write_site(tmp_path, small.overview(), latents, classes)
    small.write_thumbnails(tmp_path)
    for name, ready in (("index.html", "index"), ("latent.html#12345", "#12345")):
        watched = Watched(browser, tmp_path, f"{small.MISSING_IMAGE}.jpg")
        start = time.perf_counter()
        page = watched.open(name, ready)
        assert time.perf_counter() - start < 2
        assert page.locator("*").count() < 5000
        watched.check()
        watched.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_scrolls_sideways_on_a_phone(browser, folder, scheme):
    phone = {"width": 390, "height": 844}
    watched = Watched(browser, folder, viewport=phone, has_touch=True, color_scheme=scheme)
    pages = ("index.html", "latent.html#7", "latent.html#7,8", "class.html#3")
    for name in pages:
        page = watched.open(name, name.partition("#")[1] + name.partition("#")[2] or "index")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(251, 251, 249)" if scheme == "light" else "rgb(19, 22, 25)")
    watched.context.close()
