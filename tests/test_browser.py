"""The site in a real browser: pages behave, ask for nothing off their folder, and can be used by everybody."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import chromium
import numpy as np
import pytest
from test_report import HOSTILE, every_kind, made, stand_in, timed

from mimbench import compare, record, report, stats
from mimbench.record import Record
from mimbench.report import comparing, ranking
from mimbench.report.source import load
from mimbench.report.words import INVISIBLE

sync_api = pytest.importorskip("playwright.sync_api", reason="no driver: pip install playwright")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="no axe: pip install axe-playwright-python"
)
pytestmark = pytest.mark.skipif(
    chromium.path() is None,
    reason="no browser: apt install chromium, or say where it is with MIMBENCH_CHROMIUM",
)

PHONE = {"width": 360, "height": 740}
RECIPE = "dino"  # of the runs that say what they have right
SKILL = {"alpha": 0.75, "beta": 0.6, "noise": 0.3, "labels": 0.9, HOSTILE: 0.5}


def judged(slug: str, seed: int, share: float | None = None, n: int = 360, **more: Any) -> Record:
    """A run that says image by image what it has right, and by class."""
    draw = np.random.default_rng([seed, *slug.encode()])
    right = draw.random(n) < (SKILL[slug] if share is None else share)
    classes = {f"class {i}": 100.0 * float(right[i::7].mean()) for i in range(6)}
    if slug != "noise":
        classes[HOSTILE] = 100.0 * float(right[6::7].mean())
    score = {"top1": stats.accuracy(right)}
    details = {"accuracy": classes}
    return made(
        slug, seed=seed, recipe=RECIPE, metrics=score, correct=record.pack(right), details=details, **more
    )


def judged_runs() -> list[Record]:
    """Five settings under one fingerprint, some of which cannot be compared with others."""
    slow = dataclasses.replace(made().pretrain, device_seconds=184.5)
    gpu = {"cpu": "A processor", "device": "cuda", "gpu": "A GPU"}
    other = {"config": {"mask_ratio": 0.9, "recipe": {"epochs": 20}}, "overrides": {"mask_ratio": 0.9}}
    single = judged("labels", 7, environment=gpu)
    return [
        *(judged("alpha", seed, pretrain=slow) for seed in (0, 1, 2)),
        *(judged("beta", seed) for seed in (1, 2, 3)),
        *(judged("beta", seed, 0.62, **other) for seed in (0, 1, 2)),
        judged("noise", 0),
        single,
        judged(HOSTILE, 4, preset=HOSTILE, config={HOSTILE: HOSTILE}, overrides={HOSTILE: HOSTILE}),
    ]


@dataclasses.dataclass
class Site:
    """A rendered site, and what it was rendered from."""

    folder: Path
    table: ranking.Table  # of judged_runs()

    def url(self, page: str) -> str:
        file, hash, anchor = page.partition("#")
        return (self.folder / file).as_uri() + hash + anchor

    def pages(self) -> list[str]:
        return sorted(file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*.html"))

    def kinds(self) -> list[str]:
        """A page of each kind, the longest, and one of each that shows hostile text."""
        by_folder: dict[str, list[str]] = {}
        for page in self.pages():
            by_folder.setdefault(page.rpartition("/")[0], []).append(page)
        found = by_folder.pop("")
        for group in by_folder.values():
            hostile = [page for page in group if "evil" in (self.folder / page).read_text(encoding="utf-8")]
            found += {max(group, key=lambda page: (self.folder / page).stat().st_size), *hostile[:1]}
        return sorted(found)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Everything that tests/test_report.py makes up, and runs that can be compared."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch, contextlib.contextmanager(stand_in)(folder, patch) as suite:
        patch.setenv("MIMBENCH_RESULTS", str(folder / "results"))
        patch.setenv("MIMBENCH_CACHE", str(folder / "cache"))
        made_up = [*every_kind(suite, folder), *judged_runs()]
        compared = [timed(name="knn-large"), timed(HOSTILE)]
        source = dataclasses.replace(load(folder), records=made_up, faults=[HOSTILE], comparisons=compared)
        patch.setattr(report, "load", lambda folder: source)
        report.report(folder, folder / "site")
        found = [table for table in ranking.tables(source.records, source.papers) if table.recipe == RECIPE]
        assert len(found) == 1
        yield Site(folder / "site", found[0])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        opened = chromium.launch(driver)
        yield opened
        opened.close()


@dataclasses.dataclass
class Watched:
    """A page of the browser, and all that it did and should not have."""

    page: Any
    faults: list[str]

    def open(self, url: str) -> Any:
        self.page.goto("about:blank")  # so that a page that differs by its anchor is loaded anew
        self.page.goto(url, wait_until="load")
        return self.page


@contextlib.contextmanager
def watching(browser: Any, site: Site, **options: Any) -> Iterator[Watched]:
    """A page whose console, dialogs and requests are watched; what asks for more than the site's files gets nothing."""
    context = browser.new_context(**options)
    watched = Watched(context.new_page(), [])
    home = site.folder.as_uri() + "/"

    def route(route: Any) -> None:
        if route.request.url.startswith(home):
            route.continue_()
        else:
            watched.faults.append(f"asks for {route.request.url}")
            route.abort()

    def log(message: Any) -> None:
        if message.type in ("error", "warning"):
            watched.faults.append(f"says {message.text}")

    def dialog(opened: Any) -> None:
        watched.faults.append(f"opens a dialog: {opened.message}")
        opened.dismiss()

    context.route("**/*", route)
    watched.page.on("console", log)
    watched.page.on("pageerror", lambda fault: watched.faults.append(f"fails: {fault}"))
    watched.page.on("dialog", dialog)
    try:
        yield watched
    finally:
        context.close()


@pytest.fixture
def watched(browser: Any, site: Site) -> Iterator[Watched]:
    with watching(browser, site) as found:
        yield found
        assert found.faults == []


def test_every_page_keeps_to_itself_fits_a_phone_and_runs_nothing_that_a_record_says(
    browser: Any, site: Site
) -> None:
    shown = 0
    with watching(browser, site, viewport=PHONE) as watched:
        for name in site.pages():
            page = watched.open(site.url(name))
            width, scripts, handlers, text = page.evaluate(
                """() => [
                    document.documentElement.scrollWidth,
                    document.querySelectorAll("script:not([src])").length,
                    [...document.querySelectorAll("*")].flatMap((each) => each.getAttributeNames())
                        .filter((name) => name.startsWith("on")).length,
                    document.body.innerText,
                ]"""
            )
            assert width == PHONE["width"], f"{name} scrolls sideways"
            assert (scripts, handlers) == (0, 0), f"{name} lets a script in"
            assert "undefined" not in text, name
            assert watched.faults == [], name
            shown += "<script>alert(1)</script>" in text
    assert shown > 5


def test_what_is_watched_for_is_seen(browser: Any, site: Site) -> None:
    with watching(browser, site) as watched:
        page = watched.open(site.url("about.html"))
        page.evaluate(
            "() => { console.error('oh'); alert('no'); setTimeout(() => { throw Error('ah'); });"
            " for (const src of ['https://mimbench.invalid/', '../elsewhere.png']) new Image().src = src; }"
        )
        page.wait_for_timeout(200)
        said = " ".join(watched.faults)
        for expected in (
            "says oh",
            "dialog: no",
            "asks for https://mimbench.invalid/",
            "elsewhere.png",
            "fails: ah",
        ):
            assert expected in said


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Any, site: Site, scheme: str) -> None:
    compared = f"compare.html#{site.table.anchor}&rows=alpha,noise,labels"
    rules: dict[str, Any] = {"resultTypes": ["violations"]}
    if scheme == "dark":  # which differs by its colours
        rules["runOnly"] = ["color-contrast", "link-in-text-block"]
    with watching(browser, site, color_scheme=scheme) as watched:
        for name in (*site.kinds(), compared):
            page = watched.open(site.url(name))
            found = axe.Axe().run(page, options=rules)
            grave = [
                f"{name}: {fault['id']}, {fault['help']}: {node['target']} {node['html']}"
                for fault in found.response["violations"]
                if fault["impact"] in ("serious", "critical")
                for node in fault["nodes"]
            ]
            assert grave == []


def test_tables_sort_by_mouse_and_by_keyboard(watched: Watched, site: Site) -> None:
    page = watched.open(site.url("protocols/linear.html"))
    table = page.locator(f".ranking:has(#{site.table.anchor}-caption)")

    def column(at: int) -> list[float]:
        cells = table.locator(f"tbody tr td:nth-child({at})").all()
        return [float(cell.get_attribute("data-sort")) for cell in cells]

    scores = column(3)
    assert scores == sorted(scores, reverse=True)
    head = table.locator("thead th").nth(2)
    head.get_by_role("button").click()
    assert (head.get_attribute("aria-sort"), column(3)) == ("descending", scores)
    head.get_by_role("button").click()
    assert (head.get_attribute("aria-sort"), column(3)) == ("ascending", scores[::-1])
    seeds = table.locator("thead th").nth(4)
    seeds.get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert (head.get_attribute("aria-sort"), seeds.get_attribute("aria-sort")) == (None, "descending")
    assert column(5) == sorted(column(5), reverse=True) != column(3)
    page.keyboard.press("Space")
    assert column(5) == sorted(column(5))
    page.keyboard.press("Space")
    assert (seeds.get_attribute("aria-sort"), column(3)) == (None, scores)


def test_hostile_text_is_text_in_what_scripts_show(watched: Watched, site: Site) -> None:
    page = watched.open(site.url(f"compare.html#{site.table.anchor}&rows=alpha,{quote(HOSTILE, safe='')}"))
    page.wait_for_selector("#result:not([hidden])")
    text = page.locator("#result").inner_text()
    assert "<script>alert(1)</script>" in text
    assert "\\u202eevil" in text
    assert "\u202e" not in text
    page = watched.open(site.url("compare.html#<img src=x onerror=alert(1)>&rows=<b>"))
    assert "“<img src=x onerror=alert(1)>”" in page.locator("#trouble").inner_text()


def test_all_can_be_read_without_javascript(browser: Any, site: Site) -> None:
    with watching(browser, site, java_script_enabled=False) as watched:
        tables = 0
        for name in site.kinds():
            page = watched.open(site.url(name))
            hidden = page.locator("table:not(:visible):not(details:not([open]) table)")
            assert hidden.count() == 0, f"{name} hides a table"
            tables += page.locator("table").count()
        assert tables > 30
        page = watched.open(site.url("compare.html"))
        assert "nothing can be picked without JavaScript" in page.locator("main").inner_text()
        assert page.locator("select:visible, input:visible").count() == 0
        assert "mimbench compare labels alpha" in page.locator(".candidates .terminal").first.inner_text()


# The comparison page ----------------------------------------------------------------------------------


def sides(site: Site) -> dict[str, compare.Side]:
    """The rows of the table as mimbench.compare has them, by key."""
    return {
        choice.key: compare.Side(choice.label.translate(INVISIBLE), tuple(choice.row.runs))
        for choice in comparing.choices(site.table)
    }


def calculated(page: Any, site: Site, keys: list[str]) -> dict[str, Any]:
    """What the page's script makes of rows."""
    script = """([anchor, keys]) => {
        const table = mimbench.tables.get(anchor);
        const found = mimbench.compare(keys.map((key) => table.rows[key]), table.labels);
        for (const pair of found.pairs)
            for (const name in pair.classes) pair.classes[name] = Object.fromEntries(pair.classes[name]);
        return found;
    }"""
    found: dict[str, Any] = page.evaluate(script, [site.table.anchor, keys])
    return found


def test_the_page_computes_what_the_command_does(watched: Watched, site: Site) -> None:
    known = sides(site)
    assert len(known) == 6
    page = watched.open(site.url(f"compare.html#{site.table.anchor}"))
    page.wait_for_function("mimbench.tables.size > 0")
    tested, refused = 0, set()
    choices = [*itertools.combinations(known, 2), *itertools.combinations(known, 3), tuple(known)]
    for keys in map(list, choices):
        ours = compare.compare([known[key] for key in keys])
        theirs = calculated(page, site, keys)
        groups = [ours.groups[known[key].name] for key in keys] if ours.groups else []
        assert theirs["groups"] == groups
        for mine, other in zip(ours.pairs, theirs["pairs"], strict=True):
            expected = dataclasses.asdict(mine)
            classes = {name: shown(cells) for name, cells in expected.pop("classes").items()}
            assert other.pop("classes") == {
                name: {label: pytest.approx(values, abs=3e-6) for label, values in cells.items()}
                for name, cells in classes.items()
            }
            refused |= set(mine.obstacles)
            if mine.paired:
                tested += 1
                assert other.pop("paired") == pytest.approx(expected.pop("paired"), rel=1e-9, abs=1e-9)
            for name in ("seconds", "images", "p_corrected"):
                wanted = expected.pop(name)
                assert other.pop(name) == (None if wanted is None else pytest.approx(wanted, rel=1e-9))
            assert other == expected
    assert tested > 30
    assert refused == {"they have no seed in common"}


def shown(cells: dict[str, Any]) -> dict[str, Any]:
    return {label.translate(INVISIBLE): values for label, values in cells.items()}


def test_the_statistics_equal_those_of_python(watched: Watched, site: Site) -> None:
    page = watched.open(site.url("compare.html"))
    draw = np.random.default_rng(0)
    compute = "([a, b]) => mimbench.paired(a.map(mimbench.unpack), b.map(mimbench.unpack))"
    least = 1.0
    for seeds, n, effect in itertools.product((1, 2, 3, 4, 10), (2, 9, 360, 10_000), (0, 0.02, 0.4, 1)):
        base = draw.random(n) < 0.5
        a, b = (base ^ (draw.random((seeds, n)) < 0.2) for _ in range(2))
        a |= draw.random((seeds, n)) < effect
        expected = dataclasses.asdict(stats.paired(a, b))
        found = page.evaluate(compute, [[record.pack(run) for run in side] for side in (a, b)])
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
        if expected["p"] > 1e-290:
            assert found["p"] == pytest.approx(expected["p"], rel=1e-9, abs=0)
            least = min(least, expected["p"])
    assert least < 1e-100
    p = draw.random(12).tolist()
    assert page.evaluate("(p) => mimbench.holm(p)", p) == pytest.approx(stats.holm(p))
    for _ in range(20):
        scores, apart = draw.integers(0, 9, 7), draw.random((7, 7)) < 0.7
        apart |= apart.T
        places = page.evaluate(
            "([scores, apart]) => mimbench.rankGroups(scores, (i, j) => apart[i][j])",
            [scores.tolist(), apart.tolist()],
        )
        assert places == stats.rank_groups(scores.tolist(), apart)


def test_rows_are_picked_and_the_link_carries_the_choice(watched: Watched, site: Site) -> None:
    page = watched.open(site.url("compare.html"))
    said, result = page.locator("#said"), page.locator("#result")
    page.get_by_label("Table").select_option(site.table.anchor)
    section = page.locator(f"#{site.table.anchor}")
    assert page.locator(".candidates:visible").count() == 1
    sync_api.expect(said).to_have_text("Pick two rows or more.")
    section.get_by_label("alpha").check()
    sync_api.expect(said).to_have_text("Pick a second row.")
    assert not result.is_visible()
    box = section.locator("tr", has_text="mask_ratio=0.9").get_by_role("checkbox")
    box.focus()
    page.keyboard.press("Space")
    result.wait_for()
    other = next(key for key, side in sides(site).items() if "mask_ratio=0.9" in side.name)
    assert page.evaluate("location.hash") == f"#{site.table.anchor}&rows=alpha,{other}"
    found = compare.compare([sides(site)["alpha"], sides(site)[other]]).pairs[0]
    assert found.paired is not None
    assert said.inner_text().startswith(
        f"alpha is better than {found.b}, by {found.paired.difference:.2f} points"
    )
    row = result.get_by_label("Differences").locator("tbody tr")
    cells = " ".join(row.inner_text().replace("−", "-").split())
    assert f"{found.paired.difference:+.2f}" in cells
    assert f"{found.paired.low:+.2f} to {found.paired.high:+.2f}" in cells
    assert f"{found.paired.only_a} / {found.paired.only_b}" in cells
    assert "3.00 1.00" in cells  # times the device time and the images
    order = result.locator("details th[scope=row]").all_inner_texts()
    differences = {c.translate(INVISIBLE): abs(d) for c, (_, _, d) in found.classes["accuracy"].items()}
    assert order == sorted(differences, key=lambda label: -differences[label])
    setting = result.get_by_label("What differs in setting").locator("tbody tr", has_text="mask_ratio")
    assert setting.inner_text().split() == ["mask_ratio", "0.75", "0.9"]
    whole, address = page.locator("main").inner_text(), page.url
    page = watched.open(address)
    result.wait_for()
    assert page.locator("main").inner_text() == whole
    box.uncheck()
    sync_api.expect(said).to_have_text("Pick a second row.")
    assert not result.is_visible()
    page.get_by_label("Find a row").fill("NOISE")
    assert section.locator("tbody tr:visible").count() == 1


def test_what_cannot_be_compared_is_said_with_what_can_be(watched: Watched, site: Site) -> None:
    page = watched.open(site.url(f"compare.html#{site.table.anchor}&rows=alpha,labels"))
    page.locator("#result").wait_for()
    assert "cannot be tested" in page.locator("#said").inner_text()
    text = page.locator("#result").inner_text()
    assert "not comparable: they have no seed in common" in text
    assert "device times are of different machines: A GPU and A processor, threads: None" in text
    assert "mimbench compare alpha labels --protocol linear:dino --dataset digits --preset smoke" in text
    unjudged = next(
        part for part in page.locator(".candidates").all() if "cached" in (part.text_content() or "")
    )
    page = watched.open(site.url(f"compare.html#{unjudged.get_attribute('id')}&rows=alpha,beta"))
    page.locator("#result").wait_for()
    assert (
        "alpha has no per-image correctness of top1; beta has no per-image"
        in page.locator("#result").inner_text()
    )


@pytest.mark.parametrize(
    ("link", "trouble"),
    [
        ("t-0&rows=alpha", "The link names a table that is not here: “t-0”. It may be of other records"),
        ("TABLE&rows=alpha,nobody,labels", "The link names a row that this table does not have: “nobody”."),
        ("TABLE&rows=beta,alpha", "“beta” has 2 rows in this table: pick one of them."),
        ("TABLE&rows=%E0%A4%A", "The link is damaged."),
        ("constructor", "not here: “constructor”"),
    ],
)
def test_a_bad_link_gives_a_clear_sentence(watched: Watched, site: Site, link: str, trouble: str) -> None:
    page = watched.open(site.url(f"compare.html#{link.replace('TABLE', site.table.anchor)}"))
    sync_api.expect(page.locator("#trouble")).to_contain_text(trouble)
    assert page.locator(".candidates:visible").count() == 1
    section = page.locator(".candidates:visible")
    for box in section.get_by_role("checkbox", checked=True).all()[::-1]:
        box.uncheck()
    for box in section.get_by_role("checkbox").all()[:2]:  # and the page goes on
        box.check()
    page.locator("#result").wait_for()
    assert not page.locator("#trouble").is_visible()


def test_a_script_that_is_missing_is_said(browser: Any, site: Site) -> None:
    with watching(browser, site) as watched:
        watched.page.context.route("**/data/bits/*", lambda route: route.abort())
        page = watched.open(site.url("compare.html"))
        sync_api.expect(page.locator("#trouble")).to_contain_text(
            "cannot be read: is the site’s folder complete?"
        )
        assert all("ERR_FAILED" in fault for fault in watched.faults)


# The front page: search, filters, sorting and the link that restores them -------------------------------


def order(table: Any) -> list[str]:
    """The lines that a table shows, as they begin."""
    return [row.locator("th").inner_text() for row in table.locator("tbody tr:visible").all()]


def test_the_front_page_filters_and_sorts_and_its_link_restores_both(watched: Watched, site: Site) -> None:
    page = watched.open(site.url("index.html"))
    table = page.locator(".lines").first
    everything = order(table)
    page.get_by_label("Search").fill("B")
    searched = order(table)
    assert searched == [line for line in everything if "b" in line.lower()] != everything
    page.get_by_label("Family").select_option("image-ssl")
    filtered = order(table)
    assert filtered == [line for line in searched if "labels" not in line and "<script" not in line]
    assert f"{len(filtered)} of {len(everything)}" in page.locator(".shown").inner_text()
    head = table.locator("thead th", has_text="Parameters").get_by_role("button")
    head.click()
    table.locator("thead th", has_text="linear").first.get_by_role("button").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    ascending = order(table)
    assert sorted(ascending) == sorted(filtered)
    rows = table.locator("tbody tr:visible").all()
    values = [float(row.locator("td").first.get_attribute("data-sort")) for row in rows]
    assert values == sorted(values)
    assert ascending != filtered
    page = watched.open(page.url)
    page.wait_for_timeout(50)
    assert order(table) == ascending
    assert page.get_by_label("Search").input_value() == "B"
    page.get_by_role("button", name="Show all").click()
    sync_api.expect(table.locator("tbody tr:visible")).to_have_count(len(everything))
    assert order(table) == everything


def test_lines_picked_on_the_front_page_are_compared(watched: Watched, site: Site) -> None:
    page = watched.open(site.url("index.html"))
    link = page.locator(".controls .compare")
    page.get_by_label("compare alpha, smoke").first.check()
    assert not link.is_visible()
    page.get_by_label("compare noise, smoke").first.check()
    link.click()
    page.locator("#result").wait_for()
    assert page.locator(".candidates:visible input:checked").count() == 2
    assert "alpha − noise" in page.get_by_label("Differences").inner_text()


def test_the_front_page_in_one_file_asks_for_nothing(browser: Any, site: Site, tmp_path: Path) -> None:
    file = report.single_file(tmp_path, tmp_path / "page.html")
    with watching(browser, dataclasses.replace(site, folder=tmp_path), viewport=PHONE) as watched:
        page = watched.open(file.as_uri())
        assert page.locator("table:visible").count() >= 1
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
        assert "Content-Security-Policy" in page.content()
        assert watched.faults == []
