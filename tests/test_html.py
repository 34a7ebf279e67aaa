"""report.html as a parser and a browser read it, beside report.md; and two runs in one report (--compare)."""

import base64
import io
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import pytest
import test_evaluate
from PIL import Image
from test_evaluate import SHORT, new_report

from evaluation.compare import read_report
from evaluation.content import document
from evaluation.html import html
from evaluation.markdown import markdown
from evaluation.report import Report
from main import main

run = test_evaluate.run  # the fixture
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NODE = shutil.which("node")
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Every tag with its attributes, and every table as rows of texts; asserts that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.open, self.buttons = [], [], [], []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "button":
            self.buttons.append(tuple(self.open))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def tables_of_markdown(text):
    """The cells of every table without its line of dashes and, as in HTML, without a head of empty cells."""
    tables = []
    for block in text.split("\n\n"):
        if block.startswith("|") and "](" not in block.split("\n")[0]:  # else these are pictures
            lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in block.strip().split("\n")]
            rows = [[unescape(cell.strip().replace("\\|", "|")) for cell in line] for line in lines]
            tables.append(rows[2:] if not any(rows[0]) else [rows[0], *rows[2:]])
    return tables


@pytest.fixture(scope="module")
def evaluated(run):
    """An eval folder of the real command line."""
    before = set(run.rglob("results.json"))
    command = [*SHORT, "--load_ckpt", str(run), "--eval", "classification,ood", "--ood_datasets", "noise,shuffled"]
    assert main(command) == 0
    return new_report(run, before)[1]


def test_the_page_is_whole_by_itself(evaluated):
    page = Page((evaluated / "report.html").read_text())
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert addresses and all(re.match("#|data:image/png;base64,", address) for address in addresses)
    names = json.loads((evaluated / "results.json").read_text())
    pictures = [name for section in ("classification", "ood") for name in names[section]["pictures"]]
    assert len(pictures) >= 3 and [image["alt"] for image in page.all("img")] == pictures
    for image in page.all("img"):
        content = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        assert content == (evaluated / f"{image['alt']}.png").read_bytes()
        Image.open(io.BytesIO(content)).load()
    assert not page.all("link") and page.all("script") == [{}] and "@import" not in page.text
    assert any(meta.get("name") == "viewport" for meta in page.all("meta")) and "@media print" in page.text


def test_contents_and_sorting(evaluated):
    page = Page((evaluated / "report.html").read_text())
    targets = [section["id"] for section in page.all("section")]
    assert [f"#{target}" for target in targets] == [a["href"] for a in page.all("a")] and len(targets) == 2
    heads = [row for rows in page.tables[1:] for row in rows[:1]]  # the first has facts about the run
    assert len(page.buttons) == sum(map(len, heads)) > 15
    assert all(path[-4:] == ("thead", "tr", "th", "button") for path in page.buttons)


def test_both_forms_say_the_same(evaluated):
    page, text = Page((evaluated / "report.html").read_text()), (evaluated / "report.md").read_text()
    tables = tables_of_markdown(text)
    assert page.tables == tables and len(tables) > 5
    results = json.loads((evaluated / "results.json").read_text())
    rows = {row[0]: row for rows in tables for row in rows}
    number = results["classification"]["results"]["accuracy"]
    low, high = number["interval"]
    assert rows["accuracy"][1:3] == [f"{number['value']:.4g} [{low:.4g}, {high:.4g}]", str(number["n"])]
    facts = results["about"] | {"command": results["environment"]["command"]}
    assert all(rows[name][1] == " ".join(fact.split()) for name, fact in facts.items())
    assert all(number["protocol"] in page.text for number in results["ood"]["results"]["AUROC"]["noise"].values())


def test_nothing_is_taken_for_html(tmp_path):
    """Every kind of text may hold what would be a tag, an attribute's end or an entity."""
    nasty = "<img src=x onerror=alert(1)> </script> \" ' & &lt; | {{ 7 * 7 }} \udce9"
    about = {"about": {nasty: nasty}, "options": {}, "environment": {"command": nasty}}
    report = Report(tmp_path, about)
    section = report.section("classification")
    section.add(nasty, 1, 1, nasty)
    section.add(nasty + " table", 2, 2, nasty, at=(nasty, nasty))
    section.note(f"**{nasty}** is bold")
    section.absent[nasty] = nasty
    section.picture("one", nasty, test_evaluate.np.zeros((2, 2, 3), "u1"))
    page, text = Page(html(document(report), tmp_path)), markdown(document(report))
    printed = nasty.replace("\udce9", "\\udce9")
    assert page.text.count(printed) == 12 and page.text.count(f"{printed} is bold") == 1
    assert len(page.all("img")) == len(page.all("script")) == len(page.all("strong")) == 1
    assert page.tables == tables_of_markdown(text) and len(page.tables) == 3
    assert "<" not in text and unescape(text).count(printed.replace("|", "\\|")) + unescape(text).count(printed) == 12


def table_script(page, rows):
    """The page's own sorting, run on the first cells of ``rows``, up and down."""
    script = page[page.index("<script>") + 8 : page.index("</script>")]
    return (
        "const document = { querySelectorAll: () => [] };"
        + script
        + f"const rows = {json.dumps(rows)}.map(text => ({{ cells: [{{ textContent: text }}] }}));"
        + "const body = { rows, append(...all) { console.log(JSON.stringify(all.map(r => r.cells[0].textContent))) } };"
        + "sortRows(body, 0, 1); sortRows(body, 0, -1);"
    )


@pytest.mark.skipif(NODE is None, reason="no node")
@pytest.mark.parametrize(
    ("cells", "ascending"),
    [
        (
            ["0.9 [0.8, 1]", "", "-2 ≠", "1e-05", "10", "9.5"],
            ["-2 ≠", "1e-05", "0.9 [0.8, 1]", "9.5", "10", ""],
        ),
        (["L2 1", "buffer", "", "L2 0.5", "2"], ["2", "buffer", "L2 0.5", "L2 1", ""]),
    ],
)
def test_rows_sort_by_number_or_text(evaluated, cells, ascending):
    script = table_script((evaluated / "report.html").read_text(), cells)
    up, down = subprocess.run([NODE, "-e", script], capture_output=True, text=True, check=True).stdout.splitlines()
    assert json.loads(up) == ascending
    assert json.loads(down) == [*reversed(ascending[:-1]), ""]


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_a_browser_shows_and_sorts_it(evaluated, tmp_path):
    """In the page that the browser draws, a click on the second head has sorted the rows by their numbers."""
    clicks = "<script>document.querySelectorAll('table')[1].querySelectorAll('button')[1].click()</script>"
    copy = tmp_path / "report.html"
    copy.write_text((evaluated / "report.html").read_text().replace("</body>", f"{clicks}</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'user'}"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60, "check": True}
    subprocess.run([*command, "--window-size=390,844", "--screenshot=page.png", copy.as_uri()], **options)
    with Image.open(tmp_path / "page.png") as picture:
        assert picture.size == (390, 844) and len(picture.convert("L").getcolors()) > 10
    before = Page(copy.read_text()).tables[1]
    page = Page(subprocess.run([*command, "--dump-dom", copy.as_uri()], **options).stdout)
    assert page.tables[1][1:] == sorted(before[1:], key=lambda row: float(row[1].split()[0])) != before[1:]


# ---------------------------------------------------------------------------------------------- two runs


def changed(evaluated, folder):
    """Another run whose eval folder differs in some places, and what its results.json holds."""
    shutil.copytree(evaluated, folder / "eval")
    path = folder / "eval" / "results.json"
    results = json.loads(path.read_text())
    numbers = results["classification"]["results"]
    numbers["accuracy"] |= {"value": 0.1234, "interval": None}
    numbers["cross-entropy (nats)"]["n"] = 19
    numbers["accuracy of each class"]["3"]["accuracy"]["protocol"] = "by hand"
    results["options"]["n_sample_steps"] = 77
    results["classification"]["notes"] = ["a note of its own"]
    del results["ood"]["results"]["AUROC"]["noise"]
    results["quality"] = results["ood"]
    path.write_text(json.dumps(results))
    Image.new("RGB", (3, 3), "red").save(folder / "eval" / "confusion_matrix.png")
    (folder / "eval" / "ood_log_p_x.png").write_bytes(b"no picture")
    return results


def test_two_runs_side_by_side(run, evaluated, tmp_path):
    other, before = changed(evaluated, tmp_path / "other"), set(run.rglob("results.json"))
    command = [*SHORT, "--load_ckpt", str(run), "--eval", "classification,ood", "--ood_datasets", "noise,shuffled"]
    assert main([*command, "--compare", str(tmp_path / "other")]) == 0
    mine, folder = new_report(run, before)
    page, text = Page((folder / "report.html").read_text()), (folder / "report.md").read_text()
    assert page.tables == tables_of_markdown(text)
    facts, options, numbers, classes = page.tables[:4]
    assert facts[0] == ["", "this run", "other run"]
    assert options == [["option", "this run", "other run"], ["--n_sample_steps", "1", "77"]]

    names = numbers[0]
    assert names[1:3] == ["value [95 % interval], this run", "value [95 % interval], other run"]
    rows = {row[0]: row for row in numbers}
    accuracy = mine["classification"]["results"]["accuracy"]
    assert accuracy["value"] != 0.1234
    assert rows["accuracy"][1].startswith(f"{accuracy['value']:.4g} [")
    assert rows["accuracy"][2:] == ["0.1234", "20", "(1)"]  # the same protocol and number of images: no mark
    assert rows["cross-entropy (nats)"][2].endswith("≠") and rows["cross-entropy (nats)"][3] == "20 / 19"
    unmarked = "log p(x) of test images (nats)"
    assert rows[unmarked][1] == rows[unmarked][2]
    (third,) = (row for row in classes if row[0] == "3")
    assert third[2] == f"{third[1]} ≠" and " / " in third[-1] and re.search(r"- \(\d+\) by hand", text)

    auroc = next(table for table in page.tables if table[0][-3] == "-|grad log p(x)|, other run")
    noise = next(row for row in auroc if row[0] == "noise")
    assert noise[1] and noise[2] == "" and noise[-2:] == ["40 / –", "(2) / –"]
    assert "Other run: a note of its own" in page.text and "Measured in the other run only: quality." in page.text
    assert "Other run: picture ood_log_p_x" in page.text and "missing or broken" in page.text

    sources = [base64.b64decode(image["src"].partition(",")[2]) for image in page.all("img")]
    both = [folder / "confusion_matrix.png", tmp_path / "other" / "eval" / "confusion_matrix.png"]
    assert sources[:2] == [path.read_bytes() for path in both]
    assert len(sources) == 2 * len(page.all("section")) - 1 + 2 * (len(mine["ood"]["pictures"]) - 1)
    for name in re.findall(r"\]\((\S+\.png)\)", text):
        Image.open(folder / name).load()
    assert "0.1234" not in (folder / "results.json").read_text() and other["about"] == mine["about"]


def test_numbers_on_other_images_are_all_marked(evaluated, tmp_path):
    changed(evaluated, tmp_path)
    report = read_report(str(evaluated))
    report.other = read_report(str(tmp_path / "eval"))
    plain = markdown(document(report)).count("≠")
    report.other.header["options"]["dataset"] = "mnist"
    everything = markdown(document(report))
    n = sum(len(section.scalars()) for section in report.other.sections.values() if section.name in report.sections)
    assert plain == 3 and everything.count("≠") == n + 1 and "| --dataset | digits | mnist |" in everything


def test_a_report_read_back_is_the_report(evaluated):
    """Also the check that nothing of it is lost on the way through results.json."""
    report = read_report(str(evaluated))
    assert report.as_dict() == json.loads((evaluated / "results.json").read_text())
    assert markdown(document(report)) == (evaluated / "report.md").read_text()
    assert html(document(report), evaluated) == (evaluated / "report.html").read_text()


def broken(name):
    number = {"value": 1, "interval": None, "n": 2, "protocol": "p"}
    section = {"results": {"a": number}, "notes": [], "absent": {}, "pictures": {}}
    good = {"about": {}, "options": {}, "environment": {}, "classification": section}
    changes = {
        "no JSON": "{",
        "no UTF-8": b"\xff",
        "deep": "[" * 100_000,
        "a list": [],
        "no facts": {k: v for k, v in good.items() if k != "about"},
        "no numbers": good | {"classification": section | {"results": [1]}},
        "not finite": good | {"classification": section | {"results": {"a": number | {"value": float("nan")}}}},
        "a text": good | {"classification": section | {"results": {"a": number | {"value": "1"}}}},
        "half an interval": good | {"classification": section | {"results": {"a": number | {"interval": [1]}}}},
        "a note": good | {"classification": section | {"notes": [1]}},
    }
    content = changes[name]
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    return text if isinstance(text, bytes) else text.encode()


@pytest.mark.parametrize(
    "name",
    "no JSON,no UTF-8,deep,a list,no facts,no numbers,not finite,a text,half an interval,a note".split(","),
)
def test_a_broken_results_json_is_one_line_before_anything_is_measured(name, run, tmp_path, capsys):
    (tmp_path / "results.json").write_bytes(broken(name))
    refused(run, str(tmp_path), f"--compare {tmp_path / 'results.json'} is broken", capsys)


@pytest.mark.parametrize("place", ["nowhere", "", "x" * 300, "nul\0", "empty"])
def test_a_run_without_results_is_one_line(place, run, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty" / "eval").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    refused(run, place, "no results.json there or in its folder eval" if place else "--compare is empty", capsys)


def refused(run, place, message, capsys):
    before = sorted(run.rglob("*"))
    assert main([*SHORT, "--load_ckpt", str(run), "--eval", "classification", "--compare", place]) == 2
    out, err = capsys.readouterr()
    assert message in err and len(err.strip().splitlines()) == 1 and "classification ..." not in out
    assert sorted(run.rglob("*")) == before
